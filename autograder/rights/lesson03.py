"""Differently written right answers: none of them may lose a point."""
import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# =====================================================================================================================
# Masks, affine autoregressive flows, NAF: made_masks, affine_forms, maf, iaf, naf
# =====================================================================================================================

# --- made_masks ------------------------------------------------------------------------------------------------------


def masks_in_turn(dim, hidden, out_per_dim):
    """Plainly: degrees in turn, comparisons by broadcasting."""
    degrees = torch.arange(1, dim + 1)
    masks, below = [], degrees
    for width in hidden:
        above = torch.arange(width) % (dim - 1) + 1
        masks.append((above[:, None] >= below[None, :]).float())
        below = above
    last = degrees.repeat(out_per_dim)
    masks.append((last[:, None] > below[None, :]).float())
    return masks


def masks_in_pairs(dim, hidden, out_per_dim):
    """All degrees in a list first, and the masks of neighbours."""
    degrees = [torch.arange(1, dim + 1)]
    for width in hidden:
        degrees.append(1 + torch.arange(width) % (dim - 1))
    masks = []
    for below, above in zip(degrees[:-1], degrees[1:]):
        masks.append((below[None, :] <= above[:, None]).double())
    outputs = torch.cat([degrees[0]] * out_per_dim)
    masks.append((degrees[-1][None, :] < outputs[:, None]).double())
    return masks


def masks_of_differences(dim, hidden, out_per_dim):
    """All degrees in a list first; a list is joined from three; a comparison written as a difference."""
    m = [torch.arange(dim)] + [torch.arange(h) % (dim - 1) for h in hidden] + [torch.cat([torch.arange(dim)] * out_per_dim) - 1]
    return [torch.where(m[i + 1].unsqueeze(1) - m[i].unsqueeze(0) >= 0, 1.0, 0.0) for i in range(len(m) - 1)]


def masks_by_loops(dim, hidden, out_per_dim):
    """Entry by entry, degrees spread evenly, filled into zeros of integers; only takes widths as a tuple."""
    sizes = (dim,) + hidden + (out_per_dim * dim,)
    degrees = [list(range(dim))]
    degrees += [[k * (dim - 1) // width for k in range(width)] for width in hidden]
    masks = []
    for layer in range(len(hidden)):
        mask = torch.zeros(sizes[layer + 1], sizes[layer], dtype=torch.long)
        for k in range(sizes[layer + 1]):
            for j in range(sizes[layer]):
                if degrees[layer][j] <= degrees[layer + 1][k]:
                    mask[k, j] = 1
        masks.append(mask)
    last = torch.zeros(sizes[-1], sizes[-2], dtype=torch.long)
    for p in range(out_per_dim):
        for i in range(dim):
            for j in range(sizes[-2]):
                last[p * dim + i, j] = 1 if degrees[-1][j] < i else 0
    return (*masks, last)


def boolean_masks(dim, hidden, out_per_dim):
    """Booleans; degrees up to dim, which waste some units of a wide layer and none of a layer of dim - 1."""
    steps = [torch.arange(1, dim + 1), *(torch.arange(h) % (dim if h >= dim else dim - 1) + 1 for h in hidden)]
    masks = [b[:, None] >= a for a, b in itertools.pairwise(steps)]
    return masks + [(steps[0][:, None] > steps[-1]).repeat(out_per_dim, 1)]


def masks_from_triangles(dim, hidden, out_per_dim):
    """Rows and columns picked from a triangular matrix; the last block tiled."""
    lower = torch.tril(torch.ones(dim, dim))
    own = [torch.arange(dim), *(torch.linspace(0, dim - 2, h).round().long() for h in hidden)]
    masks = [lower[above][:, below] for below, above in zip(own, own[1:])]
    return [*masks, torch.tril(lower, -1)[:, own[-1]].tile(out_per_dim, 1)]


def masks_from_numpy(dim, hidden, out_per_dim):
    """numpy inside; degrees in a random order, each of them taken."""
    rng = np.random.default_rng(3)
    m = [np.arange(dim)] + [rng.permutation(np.resize(np.arange(dim - 1), h)) for h in hidden]
    masks = [np.less_equal.outer(a, b).T for a, b in zip(m[:-1], m[1:])]
    masks += [np.tile(np.less.outer(m[-1], m[0]).T, (out_per_dim, 1))]
    return [torch.from_numpy(np.ascontiguousarray(mask)).double() for mask in masks]


# --- affine_forms ----------------------------------------------------------------------------------------------------


def two_forms(x, mu, a, form):
    """Plainly."""
    if form == "shift":
        sigma = torch.exp(a)
        y = mu + sigma * x
        ldj = a.sum(-1)
    else:
        sigma = torch.sigmoid(a)
        y = sigma * x + (1 - sigma) * mu
        ldj = F.logsigmoid(a).sum(-1)
    return y, ldj


def forms_in_logs(x, mu, a, form):
    """The logarithm of sigma first; the gate as a step from mu towards x."""
    log_sigma = a if form == "shift" else F.logsigmoid(a)
    sigma = log_sigma.exp()
    y = sigma * x + mu if form == "shift" else mu + sigma * (x - mu)
    return y, log_sigma.sum(dim=-1)


def forms_by_weights(x, mu, a, form):
    """A table of weights; an unknown form raises."""
    if form not in ("shift", "gate"):
        raise ValueError(f"form must be 'shift' or 'gate', got {form!r}")
    gate = form == "gate"
    sigma, rest = (a.sigmoid(), (-a).sigmoid()) if gate else (a.exp(), torch.ones_like(a))
    ldj = -F.softplus(-a).sum(1) if gate else a.sum(1)
    return torch.addcmul(sigma * x, rest, mu), ldj


def forms_by_lerp(x, mu, a, form):
    """torch.lerp for the gate; einsum for the sum; a list for the result."""
    if form == "gate":
        return [torch.lerp(mu, x, torch.sigmoid(a)), torch.einsum("bd->b", -torch.logaddexp(torch.zeros_like(a), -a))]
    return [torch.exp(a).mul(x).add(mu), torch.einsum("bd->b", a)]


def forms_in_one(x, mu, a, form):
    """Both forms at once, one of them chosen in the end; the gate's logarithm where it cannot overflow."""
    gate = a.clamp(max=0) - torch.log1p(torch.exp(-a.abs()))
    ys = {"shift": x * a.exp() + mu, "gate": x / (1 + torch.exp(-a)) + mu / (1 + torch.exp(a))}
    return ys[form], torch.sum({"shift": a, "gate": gate}[form], dim=1)


def forms_in_single(x, mu, a, form):
    """float32 throughout."""
    return forms_in_logs(x.float(), mu.float(), a.float(), form)


# --- maf -------------------------------------------------------------------------------------------------------------


class PassByPass(nn.Module):
    """Plainly: one column a pass, written into zeros."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        alpha, mu = self.net(x).chunk(2, dim=-1)
        z = x * torch.exp(alpha) + mu
        return z, alpha.sum(dim=-1)

    def inverse(self, z):
        x = torch.zeros_like(z)
        for i in range(z.shape[-1]):
            alpha, mu = self.net(x).chunk(2, dim=-1)
            x[:, i] = (z[:, i] - mu[:, i]) * torch.exp(-alpha[:, i])
        return x


class Spliced(nn.Module):
    """A new tensor in every pass, from what stands left and right of the column."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        alpha, mu = self.net(x).chunk(2, 1)
        return mu + alpha.exp() * x, torch.sum(alpha, -1)

    def inverse(self, z):
        x = z
        for i in range(z.shape[1]):
            alpha, mu = self.net(x).chunk(2, 1)
            new = (z[:, i] - mu[:, i]) / torch.exp(alpha[:, i])
            x = torch.cat((x[:, :i], new[:, None], x[:, i + 1:]), 1)
        return x


class AllColumns(nn.Module):
    """Every pass computes all the columns, of which one more is right; exp(alpha) divides."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        d = x.shape[1]
        out = self.net(x)
        alpha, mu = out[:, :d], out[:, d:]
        return alpha.exp() * x + mu, torch.sum(alpha, 1)

    def inverse(self, z):
        x, d = z, z.shape[1]
        for _ in range(d):
            out = self.net(x)
            alpha, mu = out[:, :d], out[:, d:]
            x = (z - mu) / alpha.exp()
        return x


class Joined(nn.Module):
    """No writing at all: the known columns are padded with zeros."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        alpha, mu = torch.split(self.net(x), x.size(1), dim=1)
        z = mu + x * alpha.exp()
        return z, alpha.sum(1)

    def inverse(self, z):
        known = z[:, :0]
        for i in range(z.size(1)):
            padded = F.pad(known, (0, z.size(1) - i))
            alpha, mu = torch.split(self.net(padded), z.size(1), dim=1)
            x_i = (z[:, i] - mu[:, i]) * torch.exp(-alpha[:, i])
            known = torch.cat([known, x_i.unsqueeze(1)], 1)
        return known


class Standardised:
    """Not a module; the means and deviations of the Gaussian conditionals; a pass more than needed, without gradients."""

    def __init__(self, net):
        self.conditionals = net

    def moments(self, x):
        alpha, mu = self.conditionals(x).unflatten(-1, (2, -1)).unbind(-2)
        deviation = torch.exp(-alpha)
        return -mu * deviation, deviation

    def forward(self, x):
        mean, deviation = self.moments(x)
        return (x - mean) / deviation, -deviation.log().sum(-1)

    @torch.no_grad()
    def inverse(self, z):
        x = 0 * z
        for _ in range(z.shape[-1] + 1):
            mean, deviation = self.moments(x)
            x = mean + deviation * z
        return x


class Recursive(nn.Module):
    """The inverse by recursion on the number of known columns; einsum; a list for the result."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def both(self, x):
        return self.net(x).reshape(len(x), 2, x.shape[1]).transpose(0, 1)

    def forward(self, x):
        alpha, mu = self.both(x)
        return [torch.addcmul(mu, x, alpha.exp()), torch.einsum("bd->b", alpha)]

    def inverse(self, z):
        return self.known(z, z.shape[1])

    def known(self, z, k):
        if k == 0:
            return torch.zeros_like(z)
        x = self.known(z, k - 1)
        alpha, mu = self.both(x)
        return torch.where(torch.arange(z.shape[1]) == k - 1, (z - mu) * torch.exp(-alpha), x)


class SingleMAF(PassByPass):
    """float32 throughout."""

    def forward(self, x):
        x = x.float()
        alpha, mu = self.net(x.double()).float().chunk(2, -1)
        return x * alpha.exp() + mu, alpha.sum(-1)

    def inverse(self, z):
        x, z = torch.zeros_like(z, dtype=torch.float32), z.float()
        for i in range(z.shape[1]):
            alpha, mu = self.net(x.double()).float().chunk(2, -1)
            x = x.index_copy(1, torch.tensor([i]), ((z - mu) / alpha.exp())[:, [i]])
        return x


# --- iaf -------------------------------------------------------------------------------------------------------------


class Sequential(nn.Module):
    """Plainly: forward fills one column a pass, and keeps the last pass's alpha."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z = torch.zeros_like(x)
        for i in range(x.shape[-1]):
            alpha, mu = self.net(z).chunk(2, dim=-1)
            z[:, i] = (x[:, i] - mu[:, i]) * torch.exp(-alpha[:, i])
        return z, -alpha.sum(dim=-1)

    def inverse(self, z):
        alpha, mu = self.net(z).chunk(2, dim=-1)
        return z * torch.exp(alpha) + mu


class SplicedIAF(nn.Module):
    """A new tensor in every pass, from what stands left and right of the column; ldj is added up on the way."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z, ldj = x, torch.zeros(len(x), dtype=x.dtype)
        for i in range(x.shape[1]):
            alpha, mu = self.net(z).chunk(2, 1)
            new = (x[:, i] - mu[:, i]) / torch.exp(alpha[:, i])
            z = torch.cat((z[:, :i], new[:, None], z[:, i + 1:]), 1)
            ldj = ldj - alpha[:, i]
        return z, ldj

    def inverse(self, z):
        alpha, mu = self.net(z).chunk(2, 1)
        return mu + alpha.exp() * z


class Iterated(nn.Module):
    """All columns in every pass; then once more for the log-determinant."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z, d = x, x.shape[1]
        for _ in range(d):
            out = self.net(z)
            z = (x - out[:, d:]) / out[:, :d].exp()
        return z, torch.sum(-self.net(z)[:, :d], 1)

    def inverse(self, z):
        d = z.shape[1]
        out = self.net(z)
        return out[:, :d].exp() * z + out[:, d:]


class Columns(nn.Module):
    """The columns and their log-slopes in lists, no writing."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        columns, log_slopes = [], []
        for i in range(x.shape[1]):
            known = torch.stack(columns + [torch.zeros_like(x[:, 0])] * (x.shape[1] - i), 1)
            alpha, mu = self.net(known).chunk(2, 1)
            columns.append((x[:, i] - mu[:, i]) * (-alpha[:, i]).exp())
            log_slopes.append(-alpha[:, i])
        return torch.stack(columns, 1), torch.stack(log_slopes).sum(0)

    def inverse(self, z):
        alpha, mu = self.net(z).chunk(2, 1)
        return mu + z * alpha.exp()


class TurnedRound:
    """A MAF with its directions exchanged; not a module."""

    def __init__(self, net):
        self.maf = PassByPass(net)

    def forward(self, x):
        z = self.maf.inverse(x)
        return z, -self.maf.forward(z)[1]

    def inverse(self, z):
        return self.maf.forward(z)[0]


class RunningSum(nn.Module):
    """ldj is added up on the way, columns by a mask, the density without gradients."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, x):
        z, ldj = torch.zeros_like(x), torch.zeros(len(x), dtype=x.dtype)
        for i in range(x.shape[1]):
            scale, shift = self.net(z).tensor_split(2, dim=1)
            mask = torch.arange(x.shape[1]) == i
            z = z + mask * (x - shift) * torch.exp(-scale)
            ldj = ldj - scale[:, i]
        return z, ldj

    def inverse(self, z):
        scale, shift = self.net(z).tensor_split(2, dim=1)
        return shift.addcmul(z, scale.exp())


class SingleIAF(Sequential):
    """float32 throughout."""

    def forward(self, x):
        z, x = torch.zeros_like(x, dtype=torch.float32), x.float()
        for i in range(x.shape[1]):
            alpha, mu = self.net(z.double()).float().chunk(2, -1)
            z[:, i] = ((x - mu) / alpha.exp())[:, i]
        return z, -alpha.sum(1)

    def inverse(self, z):
        alpha, mu = self.net(z).float().chunk(2, -1)
        return z.float() * alpha.exp() + mu


# --- naf -------------------------------------------------------------------------------------------------------------


class LogitOfMixture(nn.Module):
    """Plainly, by the formula: the mixture, its slope, the logit of it."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x):
        a, b, w = self.conditioner(x).chunk(3, dim=-1)
        a = F.softplus(a)
        w = torch.softmax(w, dim=-1)
        s = torch.sigmoid(a * x.unsqueeze(-1) + b)
        p = torch.sum(w * s, dim=-1)
        slope = torch.sum(w * a * s * (1 - s), dim=-1) / (p * (1 - p))
        z = torch.log(p) - torch.log(1 - p)
        return z, torch.log(slope).sum(dim=-1)


def stable_dsf(x, a, b, w):
    u = a * x.unsqueeze(-1) + b
    low, high, log_w = F.logsigmoid(u), F.logsigmoid(-u), w.log()
    log_p, log_q = torch.logsumexp(log_w + low, -1), torch.logsumexp(log_w + high, -1)
    ldj = torch.logsumexp(log_w + a.log() + low + high, -1) - log_p - log_q
    return log_p - log_q, ldj.sum(-1)


class WithDSF(nn.Module):
    """A function `dsf` does the work, as in the lesson."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x):
        a, b, w = self.conditioner(x).chunk(3, dim=-1)
        return stable_dsf(x, F.softplus(a), b, torch.softmax(w, dim=-1))


class Split(nn.Module):
    """split by K, softplus and softmax written out, torch.logit; the logit's derivative in logarithms."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x):
        params = self.conditioner(x)
        k = params.shape[-1] // 3
        raw, b, logits = torch.split(params, k, dim=-1)
        a = torch.log1p(torch.exp(raw))
        w = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        u = b + a * x[..., None]
        p = (w * torch.sigmoid(u)).sum(-1)
        log_slope = (w * a * torch.sigmoid(u) * torch.sigmoid(-u)).sum(-1).log() - p.log() - torch.log1p(-p)
        return torch.logit(p), log_slope.sum(1)


class PerDimension:
    """Not a module; one coordinate after the other, parameters indexed; a list for the result."""

    def __init__(self, conditioner):
        self.theta = conditioner

    def forward(self, x):
        theta = self.theta(x).unflatten(-1, (3, -1))
        z, ldj = [], 0
        for i in range(x.shape[1]):
            raw, b, logits = theta[:, i:i + 1].unbind(2)
            z_i, ldj_i = stable_dsf(x[:, i:i + 1], F.softplus(raw), b, logits.softmax(-1))
            z, ldj = [*z, z_i], ldj + ldj_i
        return [torch.cat(z, 1), ldj]


class BySlope(nn.Module):
    """The log-slopes by automatic differentiation of z with the parameters held."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x):
        raw, b, logits = self.conditioner(x).tensor_split(3, -1)
        with torch.enable_grad():
            t = x.detach().clone().requires_grad_()
            z, _ = stable_dsf(t, F.softplus(raw), b, logits.softmax(-1))
            (slope,) = torch.autograd.grad(z.sum(), t, create_graph=True)
        return z, slope.log().sum(-1)


class SingleNAF(WithDSF):
    """float32 throughout, and an inverse that nobody asks for."""

    def forward(self, x):
        a, b, w = self.conditioner(x).float().chunk(3, -1)
        return stable_dsf(x.float(), F.softplus(a), b, w.softmax(-1))

    def inverse(self, z):
        raise RuntimeError("not asked for")


RIGHT = {
    "made_masks": [(f,) for f in (masks_in_turn, masks_in_pairs, masks_of_differences, masks_by_loops, boolean_masks,
                                  masks_from_triangles, masks_from_numpy)],
    "affine_forms": [(f,) for f in (two_forms, forms_in_logs, forms_by_weights, forms_by_lerp, forms_in_one, forms_in_single)],
    "maf": [(c,) for c in (PassByPass, Spliced, AllColumns, Joined, Standardised, Recursive, SingleMAF)],
    "iaf": [(c,) for c in (Sequential, SplicedIAF, Iterated, Columns, TurnedRound, RunningSum, SingleIAF)],
    "naf": [(c,) for c in (LogitOfMixture, WithDSF, Split, PerDimension, BySlope, SingleNAF)],
}
CONFIRMED = {}
