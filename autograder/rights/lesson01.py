"""Differently written right answers of lesson 01: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# --- monotone_direction ----------------------------------------------------------------------------------------------


def direction_slices(f, x):
    y = f(x)
    if torch.all(y[1:] > y[:-1]):
        return 1
    if torch.all(y[1:] < y[:-1]):
        return -1
    return 0


def direction_signs(f, x):
    """The one sign of all steps, or 0."""
    signs = torch.diff(f(x)).sign().unique()
    return int(signs.item()) if len(signs) == 1 else 0


def direction_numpy(f, x):
    steps = np.diff(f(x).numpy())
    return int((steps > 0).all()) - int((steps < 0).all())


def direction_loop(f, x):
    found = set()
    for a, b in zip(x[:-1], x[1:]):
        left, right = float(f(a)), float(f(b))
        found.add((right > left) - (right < left))
    return found.pop() if len(found) == 1 else 0


def direction_sorted(f, x):
    """A strictly increasing function sorts its grid, without doubles."""
    values = f(x).tolist()
    if len(set(values)) < len(values):
        return 0
    return 1 if values == sorted(values) else -1 if values == sorted(values, reverse=True) else 0


def direction_tensor(f, x):
    """A tensor with one entry is a number as well."""
    d = f(x).diff()
    return (d > 0).all().long() - (d < 0).all().long()


# --- log_prob_1d -----------------------------------------------------------------------------------------------------

def density_vmap(x, f, base):
    slope = torch.func.vmap(torch.func.grad(f))(x)
    return base.log_prob(f(x)) + torch.log(torch.abs(slope))


def density_jacobian(x, f, base):
    """The diagonal of the whole Jacobian."""
    slope = torch.autograd.functional.jacobian(f, x).diagonal()
    return slope.abs().log() + base.log_prob(f(x))


def density_jvp(x, f, base):
    z, slope = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    return base.log_prob(z) + 0.5 * torch.log(slope**2)


def density_loop(x, f, base):
    found = []
    for v in x:
        v = v.clone().requires_grad_(True)
        z = f(v)
        z.backward()
        found.append(base.log_prob(z).detach() + math.log(abs(v.grad.item())))
    return torch.stack(found)


def density_differences(x, f, base, h=1e-5):
    """Central differences are good enough in float64."""
    return base.log_prob(f(x)) + ((f(x + h) - f(x - h)) / (2 * h)).abs().log()


def density_asks_x(x, f, base):
    """Asks the caller's own x for gradients."""
    x.requires_grad_(True)
    z = f(x)
    (slope,) = torch.autograd.grad(z, x, torch.ones_like(z), create_graph=True)
    return base.log_prob(z) + slope.abs().log()


# --- inverse_cdf_sample ----------------------------------------------------------------------------------------------

def sample_loop(u, cdf, lo, hi, steps=60):
    found = []
    for v in u:
        a, b = lo, hi
        for _ in range(steps):
            m = (a + b) / 2
            if cdf(torch.tensor(m)) < v:
                a = m
            else:
                b = m
        found.append((a + b) / 2)
    return torch.tensor(found)


def sample_masks(u, cdf, lo, hi, steps=60):
    low, high = lo * torch.ones_like(u), hi * torch.ones_like(u)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        left = cdf(middle) >= u
        high[left] = middle[left]
        low[~left] = middle[~left]
    return low


def sample_strides(u, cdf, lo, hi, steps=60):
    """From lo upwards by strides that halve."""
    x, stride = torch.full(u.shape, float(lo)), float(hi - lo)
    for _ in range(steps):
        stride = stride / 2
        x = x + stride * (cdf(x + stride) < u)
    return x


def sample_centre(u, cdf, lo, hi, steps=60):
    """Middle and half-width."""
    middle, half = torch.full_like(u, (lo + hi) / 2), (hi - lo) / 2
    for _ in range(steps):
        half = half / 2
        middle = middle - half * torch.sign(cdf(middle) - u)
    return middle


def sample_secant(u, cdf, lo, hi, steps=60):
    """False position every other step, within the bracket; never less than a halving every second step, so it checks its ends as well."""
    a, b = torch.full_like(u, lo), torch.full_like(u, hi)
    for _ in range(steps):
        m = torch.lerp(a, b, 0.5)
        below = (cdf(m) < u).to(u.dtype)
        a, b = a + below * (m - a), m + below * (b - m)
    return (a + b) / 2


def sample_numpy(u, cdf, lo, hi, steps=60):
    """numpy in between, and a check of the bracket."""
    ends = cdf(torch.tensor([lo, hi]))
    assert ends[0] <= u.min() and u.max() <= ends[1]
    a, b = np.full(len(u), lo), np.full(len(u), hi)
    for _ in range(steps):
        m = (a + b) / 2
        right = cdf(torch.from_numpy(m)).numpy() < u.numpy()
        a, b = np.where(right, m, a), np.where(right, b, m)
    return torch.from_numpy((a + b) / 2)


# --- mixture_cdf -----------------------------------------------------------------------------------------------------

def mixture_sech(x, weights, means, log_scales):
    """sigmoid'(u) = 1 / (4 cosh^2(u / 2)), with the logarithm of cosh by softplus."""
    scale = log_scales.exp()
    u = (x.unsqueeze(-1) - means) / scale
    log_cosh = u.abs() / 2 + F.softplus(-u.abs()) - math.log(2)
    return torch.sum(weights * torch.sigmoid(u), -1), torch.logsumexp(weights.log() - 2 * log_cosh - math.log(4) - log_scales, -1)


def mixture_loop(x, weights, means, log_scales):
    z, terms = 0, []
    for k in range(weights.shape[-1]):
        w, s = weights[..., k], log_scales[..., k]
        u = (x - means[..., k]) / torch.exp(s)
        z = z + w / (1 + torch.exp(-u.clamp(-700 if u.dtype == torch.float64 else -80)))
        terms.append(torch.log(w) - F.softplus(u) - F.softplus(-u) - s)
    return z, torch.stack(terms).logsumexp(0)


def mixture_tanh(x, weights, means, log_scales):
    u = (x[..., None] - means) * (-log_scales).exp()
    z = 0.5 * (weights * (1 + torch.tanh(u / 2))).sum(-1)
    log_pdf = F.logsigmoid(u) * 2 - u - log_scales
    top = (weights.log() + log_pdf).amax(-1, keepdim=True)
    return z, (top + torch.exp(weights.log() + log_pdf - top).sum(-1, keepdim=True).log()).squeeze(-1)


def mixture_distributions(x, weights, means, log_scales):
    """A logistic variable is a uniform one through a logit: torch.distributions knows its density."""
    base = torch.distributions.Uniform(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype), validate_args=False)
    u = (x[..., None] - means) / log_scales.exp()
    jacobian = torch.distributions.SigmoidTransform().log_abs_det_jacobian(u, torch.sigmoid(u))
    assert float(base.low) == 0
    return (weights * torch.sigmoid(u)).sum(-1), torch.logsumexp(torch.log(weights) + jacobian - log_scales, dim=-1)


def mixture_softmax(x, weights, means, log_scales):
    """Weights as the exponentials of normalised logits; z from logarithms as well."""
    u = (x[..., None] - means) * torch.exp(-log_scales)
    log_w = torch.log_softmax(weights.log(), -1)
    both = F.logsigmoid(torch.stack([u, -u]))
    return (log_w + both[0]).logsumexp(-1).exp(), (log_w + both.sum(0) - log_scales).logsumexp(-1)


def mixture_double(x, weights, means, log_scales):
    """Computes in float64 and gives back the type that came in."""
    w, m, s = (p.double() for p in (weights, means, log_scales))
    u = (x.double()[..., None] - m) * torch.exp(-s)
    ldj = torch.logsumexp(w.log() - u.abs() - 2 * torch.log1p(torch.exp(-u.abs())) - s, -1)
    return torch.einsum("...k,...k->...", w.expand_as(u), torch.sigmoid(u)).to(x.dtype), ldj.to(x.dtype)


# --- log_abs_det_jacobian --------------------------------------------------------------------------------------------

def log_det_forward_mode(f, x):
    return torch.linalg.slogdet(torch.vmap(torch.func.jacfwd(f))(x)).logabsdet


def log_det_functional(f, x):
    """The Jacobian of the whole batch, and the blocks of its diagonal."""
    J = torch.autograd.functional.jacobian(f, x)
    return torch.linalg.slogdet(torch.stack([J[i, :, i] for i in range(len(x))]))[1]


def log_det_backward(f, x):
    """One backward pass for each output."""
    x = x.detach().clone().requires_grad_(True)
    z = f(x)
    rows = [torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return torch.slogdet(torch.stack(rows, 1))[1]


def log_det_columns(f, x):
    """One forward-mode pass for each input: the columns of the Jacobian; singular values multiply to |det|."""
    columns = [torch.func.jvp(f, (x,), (torch.eye(x.shape[1])[i].expand_as(x),))[1] for i in range(x.shape[1])]
    return torch.linalg.svdvals(torch.stack(columns, -1)).log().sum(-1)


def log_det_qr(f, x):
    """Row by row; |det J| is the product of the diagonal of R in J = Q R."""
    found = []
    for row in x:
        J = torch.func.jacrev(lambda v: f(v[None])[0])(row)
        found.append(torch.linalg.qr(J)[1].diagonal().abs().log().sum())
    return torch.stack(found)


def log_det_differences(f, x, h=1e-4):
    """Central differences of fourth order, in float64."""
    J = []
    for e in torch.eye(x.shape[1]):
        J.append((8 * (f(x + h * e) - f(x - h * e)) - (f(x + 2 * h * e) - f(x - 2 * h * e))) / (12 * h))
    return torch.linalg.slogdet(torch.stack(J, -1))[1]


# --- flow ------------------------------------------------------------------------------------------------------------

class FlowIndependent(nn.Module):
    """Joins the coordinates to one event."""

    def __init__(self, base, transform):
        super().__init__()
        self.base, self.transform = torch.distributions.Independent(base, 1), transform

    def log_prob(self, x):
        z, ldj = self.transform(x)
        return ldj + self.base.log_prob(z)

    def sample(self, n):
        with torch.no_grad():
            return self.transform.inverse(self.base.rsample(torch.Size([n])))


class FlowPlain:
    """No module; asks the shape of the base's answer before it sums."""

    def __init__(self, base, transform):
        self.p, self.f = base, transform

    def log_prob(self, x):
        z, ldj = self.f.forward(x)
        log_p = self.p.log_prob(z)
        while log_p.dim() > 1:
            log_p = log_p.sum(-1)
        return torch.add(log_p, ldj)

    def sample(self, n):
        return self.f.inverse(torch.stack([self.p.sample() for _ in range(n)]))


class FlowByHand(nn.Module):
    """Noise made of loc and scale."""

    def __init__(self, base, transform):
        super().__init__()
        self.base, self.transform = base, transform

    def log_prob(self, x):
        z, ldj = self.transform.forward(x)
        u = (z - self.base.loc) / self.base.scale
        return ldj - (0.5 * u**2 + torch.log(self.base.scale) + 0.5 * math.log(2 * math.pi)).sum(dim=1)

    def sample(self, n):
        z = self.base.loc + self.base.scale * torch.randn(n, self.base.loc.shape[0])
        return self.transform.inverse(z).detach()


class FlowEinsum(nn.Module):
    def __init__(self, base, transform):
        super().__init__()
        self.add_module("transform", transform)
        self.base = base

    def log_prob(self, x):
        z, ldj = self.transform(x)
        return torch.einsum("bd->b", self.base.log_prob(z)) + ldj.reshape(-1)

    def sample(self, n):
        return self.transform.inverse(self.base.expand((n, *self.base.batch_shape)).sample())


class FlowRows(nn.Module):
    """Row by row; samples in two halves."""

    def __init__(self, base, transform):
        super().__init__()
        self.base, self.transform = base, transform

    def log_prob(self, x):
        found = []
        for row in x.split(1):
            z, ldj = self.transform.forward(row)
            found.append(self.base.log_prob(z[0]).sum() + ldj[0])
        return torch.stack(found)

    def sample(self, n):
        return torch.cat([self.transform.inverse(self.base.sample((k,))) for k in (n // 2, n - n // 2)])


class FlowQuantiles(FlowByHand):
    """Inverse transform sampling for the base, too."""

    def sample(self, n):
        return self.transform.inverse(self.base.icdf(torch.rand(n, len(self.base.mean))))


# --- compose ---------------------------------------------------------------------------------------------------------

class ComposeSequential(nn.Module):
    """Layers kept in an nn.Sequential; the sum of a list."""

    def __init__(self, transforms):
        super().__init__()
        self.steps = nn.Sequential(*transforms)

    def forward(self, x):
        ldjs = []
        for step in self.steps:
            x, ldj = step(x)
            ldjs.append(ldj)
        return x, sum(ldjs)

    def inverse(self, z):
        for i in range(len(self.steps) - 1, -1, -1):
            z = self.steps[i].inverse(z)
        return z


class ComposeRecursive(nn.Module):
    def __init__(self, transforms):
        super().__init__()
        self.first = transforms[0]
        self.rest = ComposeRecursive(transforms[1:]) if len(transforms) > 1 else None

    def forward(self, x):
        z, ldj = self.first.forward(x)
        if self.rest is None:
            return z, ldj
        z, more = self.rest.forward(z)
        return z, ldj + more

    def inverse(self, z):
        return self.first.inverse(z if self.rest is None else self.rest.inverse(z))


class ComposeRegistered(nn.Module):
    """A plain list, and the layers registered one by one."""

    def __init__(self, transforms):
        super().__init__()
        self.order = list(transforms)
        for i, t in enumerate(self.order):
            self.add_module(f"step{i}", t)

    def forward(self, x):
        z, total = x, x.new_zeros(x.shape[0])
        for t in self.order:
            z, ldj = t.forward(z)
            total += ldj
        return [z, total]

    def inverse(self, z):
        for t in self.order[::-1]:
            z = t.inverse(z)
        return z


class ComposeStacked(nn.ModuleList):
    """A ModuleList itself; the log-determinants stacked and summed."""

    def forward(self, x):
        found = []
        for t in self:
            x, ldj = t.forward(x)
            found.append(ldj)
        return x, torch.stack(found, -1).sum(-1)

    def inverse(self, z):
        for t in reversed(self):
            z = t.inverse(z)
        return z


class ComposeParameters(nn.Module):
    """Layers in a plain tuple, and a parameters() of its own."""

    def __init__(self, transforms):
        super().__init__()
        self.transforms = tuple(transforms)

    def parameters(self, recurse=True):
        for t in self.transforms:
            yield from t.parameters()

    def forward(self, x):
        z, total = x, 0.0
        for t in self.transforms:
            z, ldj = t(z)
            total = total + ldj
        return z, total

    @torch.no_grad()
    def inverse(self, z):
        stack = list(self.transforms)
        while stack:
            z = stack.pop().inverse(z)
        return z


class ComposeReduce(nn.Module):
    def __init__(self, transforms):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, x):
        from functools import reduce

        def step(state, t):
            z, ldj = t.forward(state[0])
            return z, state[1] + ldj

        return reduce(step, self.transforms, (x, torch.zeros(len(x), dtype=x.dtype)))

    def inverse(self, z):
        from functools import reduce

        return reduce(lambda x, t: t.inverse(x), reversed(list(self.transforms)), z)


# --- planar ----------------------------------------------------------------------------------------------------------

class PlanarRezende(nn.Module):
    """The parameters as columns and rows, u first."""

    def __init__(self, dim):
        super().__init__()
        self.u = nn.Parameter(0.1 * torch.randn(dim, 1))
        self.w = nn.Parameter(0.1 * torch.randn(1, dim))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        wu = torch.mm(self.w, self.u)
        m = torch.log1p(torch.exp(wu)) - 1
        u = self.u + (m - wu) * self.w.t() / self.w.pow(2).sum()
        a = torch.mm(x, self.w.t()) + self.b
        psi = (1 - torch.tanh(a) ** 2) * self.w
        return x + torch.mm(torch.tanh(a), u.t()), torch.log((1 + torch.mm(psi, u)).abs()).squeeze(1)


class PlanarLinear(nn.Module):
    """w and b in an nn.Linear; another function above -1."""

    def __init__(self, dim):
        super().__init__()
        self.inner = nn.Linear(dim, 1)
        self.u = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        w = self.inner.weight[0]
        free = torch.dot(w, self.u)
        wu = torch.where(free > 0, free, torch.expm1(free))  # as ELU does
        u = self.u + (wu - free) * w / w.square().sum()
        h = torch.tanh(self.inner(x)[:, 0])
        return x + torch.outer(h, u), torch.log1p(wu * (1 - h.square()))


class PlanarSplit(nn.Module):
    """u made of a part across w, which is free, and a part along w, which is positive enough."""

    def __init__(self, dim):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.s, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        square = (self.w**2).sum()
        wu = self.s.exp() - 1
        u = self.v - (self.v @ self.w) / square * self.w + wu * self.w / square
        a = x @ self.w + self.b
        slope = 1 / torch.cosh(a) ** 2
        return x + torch.tanh(a)[:, None] * u[None], torch.log(1 + slope * wu)


class PlanarOneTensor(nn.Module):
    """All numbers in one parameter; autograd for the slope of tanh."""

    def __init__(self, dim):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(2 * dim + 1) / dim)

    def forward(self, x):
        d = x.shape[1]
        w, u, b = self.theta[:d], self.theta[d:-1], self.theta[-1]
        wu = torch.einsum("i,i->", w, u)
        u = u + (F.softplus(wu + 0.3) - 1 - wu) * w / torch.einsum("i,i->", w, w)
        a = torch.einsum("bi,i->b", x, w) + b
        slope = torch.func.vmap(torch.func.grad(torch.tanh))(a)
        return x + torch.einsum("b,i->bi", torch.tanh(a), u), (1 + slope * torch.einsum("i,i->", w, u)).abs().log()


class PlanarSharper(nn.Module):
    """Keeps w.u above -1 by scaling it with a sigmoid; b comes first among the parameters."""

    def __init__(self, dim):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(0.1))
        self.w = nn.Parameter(torch.ones(dim) / dim)
        self.u = nn.Parameter(torch.linspace(-1, 1, dim) + 0.3)

    def forward(self, x):
        free = (self.w * self.u).sum()
        wu = 3 * torch.sigmoid(free) - 0.99
        u = self.u - self.w * (free - wu) / self.w.norm() ** 2
        h = torch.tanh(F.linear(x, self.w[None], self.bias[None]))  # (B, 1)
        return x + h * u, (1 + (1 - h**2) * wu).log().sum(-1)


class PlanarRows(nn.Module):
    """Row by row."""

    def __init__(self, dim):
        super().__init__()
        self.w, self.u, self.b = (nn.Parameter(torch.randn(n)) for n in (dim, dim, 1))

    def forward(self, x):
        wu = self.w.dot(self.u)
        u = self.u + (torch.logaddexp(wu, torch.zeros(())) - 1 - wu) * self.w / self.w.dot(self.w)
        zs, ldjs = [], []
        for row in x:
            h = torch.tanh(self.w.dot(row) + self.b)
            zs.append(row + u * h)
            ldjs.append(torch.log(1 + u.dot(self.w) * (1 - h * h))[0])
        return torch.stack(zs), torch.stack(ldjs)


# --- radial ----------------------------------------------------------------------------------------------------------

class RadialRezende(nn.Module):
    """alpha by softplus; 1 + beta h + beta h' r as it stands in the paper."""

    def __init__(self, dim):
        super().__init__()
        self.z0 = nn.Parameter(torch.randn(1, dim))
        self.log_alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.d = dim

    def forward(self, x):
        alpha = F.softplus(self.log_alpha)
        beta = -alpha + F.softplus(self.beta)
        diff = x - self.z0
        r = torch.norm(diff, dim=1, keepdim=True)
        h = 1 / (alpha + r)
        h_slope = -1 / (alpha + r) ** 2
        ldj = (self.d - 1) * torch.log(1 + beta * h) + torch.log(1 + beta * h + beta * h_slope * r)
        return x + beta * h * diff, ldj.squeeze(-1)


class RadialRatio(nn.Module):
    """beta as a multiple of alpha above -1."""

    def __init__(self, dim):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(2))
        self.centre = nn.Parameter(torch.zeros(dim) + 0.3)

    def forward(self, x):
        alpha = self.raw[0].exp()
        beta = alpha * torch.expm1(self.raw[1])
        r = torch.linalg.vector_norm(x - self.centre, dim=-1)
        h = torch.reciprocal(alpha + r)
        stretch = 1 + beta * h
        return self.centre + stretch[:, None] * (x - self.centre), (x.shape[1] - 1) * stretch.log() + torch.log1p(alpha * beta * h**2)


class RadialDet(nn.Module):
    """Forms the Jacobian and its determinant, at more cost: no case forbids it here."""

    def __init__(self, dim):
        super().__init__()
        self.x0, self.a, self.b = (nn.Parameter(torch.randn(n)) for n in (dim, 1, 1))

    def forward(self, x):
        alpha = torch.exp(self.a)
        beta = torch.exp(self.b) - alpha
        away = x - self.x0
        r = (away**2).sum(1).sqrt()[:, None]
        h = 1 / (alpha + r)
        eye = torch.eye(x.shape[1])
        J = eye + (beta * h)[..., None] * eye - (beta * h**2 / r)[..., None] * away[:, :, None] * away[:, None, :]
        return x + beta * h * away, torch.linalg.slogdet(J)[1]


class RadialOneTensor(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(dim + 2))

    def forward(self, x):
        x0, alpha, extra = self.theta[:-2], F.softplus(self.theta[-2]) + 1e-3, F.softplus(self.theta[-1])
        beta = extra - alpha
        r = torch.cdist(x, x0[None])[:, 0]
        across = (r + extra) / (alpha + r)  # 1 + beta h
        along = 1 + alpha * beta / (alpha + r) ** 2
        return x0 + across.unsqueeze(1) * (x - x0), torch.log(across) * (x.size(1) - 1) + torch.log(along)


class RadialRows(nn.Module):
    """Row by row; the stretch along the ray as a quotient."""

    def __init__(self, dim):
        super().__init__()
        self.x0, self.a, self.b = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        alpha = self.a.exp()
        beta = self.b.exp() - alpha

        zs, ldjs = [], []
        for row in x:
            r = torch.sqrt(((row - self.x0) ** 2).sum())
            ratio = 1 + beta / (alpha + r)
            zs.append(self.x0 + ratio * (row - self.x0))
            ldjs.append((len(row) - 1) * ratio.log() + torch.log(((alpha + r) ** 2 + alpha * beta) / (alpha + r) ** 2))
        return torch.stack(zs), torch.stack(ldjs)


# --- sylvester -------------------------------------------------------------------------------------------------------

class SylvesterTanh(nn.Module):
    """Both diagonals bounded by tanh, so their product lies above -1; everything in column vectors."""

    def __init__(self, dim, m):
        super().__init__()
        self.A = nn.Parameter(torch.randn(dim, m))
        self.r1, self.r2 = nn.Parameter(torch.randn(m, m)), nn.Parameter(torch.randn(m, m))
        self.d1, self.d2, self.bias = (nn.Parameter(torch.randn(m)) for _ in range(3))

    def forward(self, x):
        Q = torch.linalg.qr(self.A).Q
        d1, d2 = torch.tanh(self.d1), torch.tanh(self.d2)
        R, S = torch.triu(self.r1, 1) + torch.diag_embed(d1), torch.triu(self.r2, 1) + torch.diag_embed(d2)
        a = torch.einsum("ij,jk,bk->bi", S, Q.T, x) + self.bias
        slope = torch.cosh(a) ** -2
        return x + torch.einsum("dk,ki,bi->bd", Q, R, torch.tanh(a)), torch.log1p(slope * d1 * d2).sum(1)


class SylvesterHouseholder(nn.Module):
    """Q from Householder reflections."""

    def __init__(self, dim, m):
        super().__init__()
        self.v, self.m = nn.Parameter(torch.randn(3, dim)), m
        self.r, self.s = nn.Parameter(torch.randn(m, m)), nn.Parameter(torch.randn(m, m))
        self.b = nn.Parameter(torch.randn(m))

    def forward(self, x):
        Q = torch.eye(x.shape[1])
        for v in self.v:
            Q = Q - 2 * torch.outer(Q @ v, v) / (v @ v)
        Q = Q[:, : self.m]
        s = F.softplus(self.s.diag()) + 0.1
        product = F.elu(self.r.diag()) * 0.99
        R, S = self.r.triu(1) + (product / s).diag(), self.s.triu(1) + s.diag()
        h = torch.tanh(x @ (Q @ S.T) + self.b)
        return x + h @ (Q @ R).T, torch.log(1 + (1 - h**2) * product).sum(-1)


class SylvesterFixed(nn.Module):
    """Q is fixed: orthogonal, and not trained."""

    def __init__(self, dim, m):
        super().__init__()
        self.register_buffer("q", torch.linalg.qr(torch.randn(dim, m))[0])
        self.packed = nn.Parameter(torch.randn(2, m, m))
        self.b = nn.Parameter(torch.randn(m))

    def forward(self, x):
        r, s = (p.triu(1) + torch.diag(torch.tanh(p.diagonal()) * 0.999) for p in self.packed)
        h = torch.tanh(F.linear(F.linear(x, self.q.T), s, self.b))
        return x + F.linear(F.linear(h, r), self.q), torch.log((1 + r.diagonal() * s.diagonal() * (1 - h * h)).abs()).sum(dim=1)


class SylvesterSmallDet(nn.Module):
    """The determinant of size m by slogdet, as Sylvester's identity has it."""

    def __init__(self, dim, m):
        super().__init__()
        self.frame = nn.Parameter(torch.randn(dim, m))
        self.upper, self.lower = nn.Parameter(torch.randn(m, m)), nn.Parameter(torch.randn(m, m))
        self.b = nn.Parameter(torch.randn(m))

    def forward(self, x):
        q, _ = torch.linalg.qr(self.frame)
        s = torch.triu(self.upper, 1) + torch.diag(torch.exp(torch.diag(self.upper)))
        r = torch.triu(self.lower, 1) + torch.diag((F.softplus(torch.diag(self.lower)) - 1) / torch.exp(torch.diag(self.upper)))
        h = torch.tanh(x @ q @ s.T + self.b)
        small = torch.eye(len(self.b)) + (1 - h**2)[:, :, None] * (s @ r)
        return x + h @ r.T @ q.T, torch.linalg.slogdet(small)[1]


class SylvesterGram(nn.Module):
    """Gram and Schmidt by hand; the product of the two diagonals is e^p - 1."""

    def __init__(self, dim, m):
        super().__init__()
        self.columns = nn.ParameterList([nn.Parameter(torch.randn(dim)) for _ in range(m)])
        self.r, self.s, self.b = (nn.Parameter(torch.randn(n)) for n in ((m, m), (m, m), m))

    def forward(self, x):
        basis = []
        for v in self.columns:
            for e in basis:
                v = v - (e @ v) * e
            basis.append(v / v.norm())
        Q = torch.stack(basis, 1)
        S = torch.triu(self.s, 1) + torch.diag(self.s.diagonal().exp())
        R = torch.triu(self.r, 1) + torch.diag(torch.expm1(self.r.diagonal()) * torch.exp(-self.s.diagonal()))
        a = (S @ Q.T @ x.T).T + self.b
        h, slope = torch.tanh(a), torch.sigmoid(2 * a) * torch.sigmoid(-2 * a) * 4
        return x + (Q @ R @ h.T).T, torch.log1p(slope * R.diagonal() * S.diagonal()).sum(-1)


class PlanarPlain(nn.Module):
    """The formulas line by line, in the lesson's parametrisation and other names: slips are made in it."""

    def __init__(self, dim):
        super().__init__()
        self.direction, self.push = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        w = self.direction
        product = torch.dot(w, self.push)
        wanted = F.softplus(product) - 1
        u = self.push + w * (wanted - product) / w.pow(2).sum()
        h = torch.tanh((x * w).sum(dim=1) + self.offset)
        slope = 1 - h.square()
        factor = 1 + slope * torch.dot(u, w)
        return x + torch.outer(h, u), torch.log(torch.abs(factor))


class RadialPlain(nn.Module):
    """The formulas line by line, in the lesson's parametrisation and other names: slips are made in it."""

    def __init__(self, dim):
        super().__init__()
        self.centre = nn.Parameter(torch.randn(dim))
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        alpha = torch.exp(self.a)
        beta = -alpha + F.softplus(self.b)
        d = x - self.centre
        r = d.square().sum(dim=1).sqrt()
        h = 1 / (alpha + r)
        slope = -h.square()
        z = x + (beta * h)[:, None] * d
        side = 1 + beta * h
        ray = 1 + beta * h + beta * slope * r
        return z, (x.shape[1] - 1) * torch.log(side.abs()) + torch.log(ray.abs())


class SylvesterPlain(nn.Module):
    """The formulas line by line, in the lesson's parametrisation and other names: slips are made in it."""

    def __init__(self, dim, m):
        super().__init__()
        self.columns = nn.Parameter(torch.randn(dim, m))
        self.first, self.second = nn.Parameter(torch.randn(m, m)), nn.Parameter(torch.randn(m, m))
        self.shift = nn.Parameter(torch.zeros(m))

    def forward(self, x):
        q = torch.linalg.qr(self.columns)[0]
        lower = torch.exp(self.second.diagonal())
        upper = (F.softplus(self.first.diagonal()) - 1) / lower
        r = self.first.triu(1) + torch.diag(upper)
        rt = self.second.triu(1) + torch.diag(lower)
        h = torch.tanh(x @ q @ rt.T + self.shift)
        slope = 1 - h.square()
        z = x + h @ r.T @ q.T
        factors = 1 + slope * r.diagonal() * rt.diagonal()
        return z, torch.log(torch.abs(factors)).sum(dim=1)


RIGHT = {
    "monotone_direction": [(direction_slices,), (direction_signs,), (direction_numpy,), (direction_loop,), (direction_sorted,), (direction_tensor,)],
    "log_prob_1d": [(density_vmap,), (density_jacobian,), (density_jvp,), (density_loop,), (density_differences,), (density_asks_x,)],
    "inverse_cdf_sample": [(sample_loop,), (sample_masks,), (sample_strides,), (sample_centre,), (sample_secant,), (sample_numpy,)],
    "mixture_cdf": [(mixture_sech,), (mixture_loop,), (mixture_tanh,), (mixture_distributions,), (mixture_softmax,), (mixture_double,)],
    "log_abs_det_jacobian": [(log_det_forward_mode,), (log_det_functional,), (log_det_backward,), (log_det_columns,), (log_det_qr,), (log_det_differences,)],
    "flow": [(FlowIndependent,), (FlowPlain,), (FlowByHand,), (FlowEinsum,), (FlowRows,), (FlowQuantiles,)],
    "compose": [(ComposeSequential,), (ComposeRecursive,), (ComposeRegistered,), (ComposeStacked,), (ComposeParameters,), (ComposeReduce,)],
    "planar": [(PlanarPlain,), (PlanarRezende,), (PlanarLinear,), (PlanarSplit,), (PlanarOneTensor,), (PlanarSharper,), (PlanarRows,)],
    "radial": [(RadialPlain,), (RadialRezende,), (RadialRatio,), (RadialDet,), (RadialOneTensor,), (RadialRows,)],
    "sylvester": [(SylvesterPlain,), (SylvesterTanh,), (SylvesterHouseholder,), (SylvesterFixed,), (SylvesterSmallDet,), (SylvesterGram,)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason; a person has looked at them.
CONFIRMED = {
    "planar": {"forward: a sign turned, x @ self.w + self.b -> x @ self.w - self.b": "b is free, and -b as good as b"},
    "radial": {"forward: a sign turned, x - self.x0 -> x + self.x0": "x0 is free, and -x0 as good as x0"},
    "sylvester": {
        "forward: a sign turned, x @ Q @ Rt.T + self.b -> x @ Q @ Rt.T - self.b": "b is free, and -b as good as b",
        "forward: exp dropped, self.rt.diagonal().exp() -> self.rt.diagonal()": "r_ii is divided by rt_ii whatever its sign, so the product is constrained all the same",
    },
}
