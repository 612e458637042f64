"""Differently written right answers of lesson 03: none of them may lose a point."""
import itertools
import math

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


# =====================================================================================================================
# Masked nets for sequences and images (causal_conv1d, pixelcnn_mask, causal_attention), then sigmoidal flows (dsf, ddsf)
# =====================================================================================================================

# --- causal_conv1d ---------------------------------------------------------------------------------------------------


class CausalPlain(nn.Module):
    """Zeros before the start; an exclusive layer gets one more, and forgets the last input."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, dilation=dilation)
        self.left = (kernel_size - 1) * dilation
        self.exclusive = exclusive

    def forward(self, x):
        if self.exclusive:
            x = F.pad(x[:, :, :-1], (1, 0))
        return self.conv(F.pad(x, (self.left, 0)))


class CausalCut(nn.Module):
    """The convolution pads both sides; what is too much is cut off at the end."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.padding = (kernel_size - 1) * dilation + (1 if exclusive else 0)
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, dilation=dilation, padding=self.padding)

    def forward(self, x):
        return self.conv(x)[:, :, :x.shape[2]]


class CausalCat(nn.Conv1d):
    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__(c_in, c_out, kernel_size, dilation=dilation)
        self.zeros = (kernel_size - 1) * dilation + int(exclusive)

    def forward(self, x):
        zeros = x.new_zeros(x.shape[0], x.shape[1], self.zeros)
        y = super().forward(torch.cat([zeros, x], dim=2))
        return y[:, :, :x.shape[2]]


class CausalTaps(nn.Module):
    """No convolution at all: one matrix for each step back in time, without a bias."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.taps = nn.ModuleList(nn.Linear(c_in, c_out, bias=False) for _ in range(kernel_size))
        self.lags = [int(exclusive) + k * dilation for k in range(kernel_size)]

    def forward(self, x):
        rows, length = x.transpose(1, 2), x.shape[2]
        y = 0
        for lag, tap in zip(self.lags, self.taps):
            past = F.pad(rows, (0, 0, lag, 0))[:, :length]
            y = y + tap(past)
        return y.transpose(1, 2)


class CausalToeplitz(nn.Module):
    """One matrix for the whole sequence, its bands filled from the kernel."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kernel_size, c_out, c_in) / (kernel_size * c_in) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.dilation, self.first = dilation, int(exclusive)

    def forward(self, x):
        length = x.shape[-1]
        y = self.bias[:, None].expand(len(x), -1, length)
        time = torch.arange(length)
        for k, w in enumerate(self.weight):
            band = (time[:, None] - time == self.first + k * self.dilation).to(x.dtype)
            y = y + torch.einsum("oc,bcs,ts->bot", w, x, band)
        return y


class CausalUnfold(nn.Module):
    """Windows of the padded sequence, and a linear layer on each."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.reach, self.step, self.exclusive = (kernel_size - 1) * dilation, dilation, exclusive
        self.linear = nn.Linear(c_in * kernel_size, c_out)

    def forward(self, x):
        padded = F.pad(x, (self.reach + self.exclusive, -int(self.exclusive)))
        windows = padded.unfold(2, self.reach + 1, 1)[..., ::self.step]  # (B, C, L, k)
        return self.linear(windows.permute(0, 2, 1, 3).flatten(2)).transpose(1, 2)


class CausalMasked(nn.Module):
    """A kernel that is centred, with the half of the future masked, in two dimensions."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        half = (kernel_size - 1) * dilation + int(exclusive)
        self.weight = nn.Parameter(0.3 * torch.randn(c_out, c_in, 1, 2 * half + 1))
        mask = torch.zeros(2 * half + 1)
        mask[[half - int(exclusive) - k * dilation for k in range(kernel_size)]] = 1
        self.register_buffer("mask", mask)
        self.half = half

    def forward(self, x):
        return F.conv2d(x[:, :, None], self.weight * self.mask, padding=(0, self.half))[:, :, 0]


# --- pixelcnn_mask ---------------------------------------------------------------------------------------------------


def pixel_plain(kind, channels, kernel_size):
    middle = kernel_size // 2
    mask = torch.zeros(channels, channels, kernel_size, kernel_size)
    mask[:, :, :middle, :] = 1
    mask[:, :, middle, :middle] = 1
    for o in range(channels):
        for i in range(channels):
            if i < o or (kind == "B" and i == o):
                mask[o, i, middle, middle] = 1
    return mask


def pixel_triangle(kind, channels, kernel_size):
    """All open, then the future closed, then the centre by a triangle."""
    middle = kernel_size // 2
    mask = torch.ones(channels, channels, kernel_size, kernel_size)
    mask[:, :, middle + 1:, :] = 0
    mask[:, :, middle, middle + 1:] = 0
    mask[:, :, middle, middle] = torch.tril(torch.ones(channels, channels), diagonal=-1 if kind == "A" else 0)
    return mask


def pixel_compare(kind, channels, kernel_size):
    """Everything by comparing positions in reading order."""
    place = torch.arange(kernel_size ** 2).reshape(kernel_size, kernel_size)
    centre = place[kernel_size // 2, kernel_size // 2]
    out, into = torch.arange(channels)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    seen = into < out if kind == "A" else into <= out
    return ((place < centre) | ((place == centre) & seen)).double()


def pixel_lists(kind, channels, kernel_size):
    """Python lists, as integers."""
    m = kernel_size // 2

    def entry(o, i, r, c):
        if (r, c) == (m, m):
            return int(i < o) if kind == "A" else int(i <= o)
        return int((r, c) < (m, m))

    side = range(kernel_size)
    return torch.tensor([[[[entry(o, i, r, c) for c in side] for r in side] for i in range(channels)] for o in range(channels)])


def pixel_numpy(kind, channels, kernel_size):
    """Booleans, from numpy."""
    flat = np.zeros((channels, channels, kernel_size ** 2), dtype=bool)
    flat[:, :, :kernel_size ** 2 // 2] = True
    flat[:, :, kernel_size ** 2 // 2] = np.tri(channels, k=-1 if kind == "A" else 0, dtype=bool)
    return torch.from_numpy(flat.reshape(channels, channels, kernel_size, kernel_size))


def pixel_kron(kind, channels, kernel_size):
    """Two kinds of past, put together as outer products."""
    flat = torch.arange(kernel_size * kernel_size)
    before = (flat < len(flat) // 2).float().reshape(1, 1, kernel_size, kernel_size)
    here = (flat == len(flat) // 2).float().reshape(1, 1, kernel_size, kernel_size)
    seen = torch.ones(channels, channels).tril(0 if kind == "B" else -1)
    return before.expand(channels, channels, -1, -1) + seen[:, :, None, None] * here


# --- causal_attention ------------------------------------------------------------------------------------------------


def attention_plain(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    T = q.shape[-2]
    future = torch.triu(torch.ones(T, T), diagonal=1)
    scores = scores.masked_fill(future == 1, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    return weights @ v


def attention_added(q, k, v):
    """A matrix of zeros and minus infinities is added to the scores."""
    T, d = q.shape[-2:]
    hidden = torch.full((T, T), -math.inf).triu(1)
    weights = (torch.einsum("...td,...sd->...ts", q, k) * d ** -0.5 + hidden).softmax(-1)
    return torch.einsum("...ts,...sd->...td", weights, v)


def attention_renormalised(q, k, v):
    """The mask after the softmax, and then the sum of what is left is made one again."""
    scores = (q / q.shape[-1] ** 0.5) @ k.mT
    weights = torch.tril(torch.exp(scores - scores.amax(-1, keepdim=True)))
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def attention_where(q, k, v):
    """A large negative number in the place of minus infinity."""
    t = torch.arange(q.shape[-2])
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(k.shape[-1])
    scores = torch.where(t[:, None] >= t[None, :], scores, torch.tensor(-1e9, dtype=scores.dtype))
    return torch.matmul(F.softmax(scores, -1), v)


def attention_loop(q, k, v):
    """Query after query, each with the keys so far."""
    rows = []
    for t in range(q.shape[-2]):
        scores = (k[..., :t + 1, :] * q[..., t:t + 1, :]).sum(-1) / math.sqrt(q.shape[-1])
        rows.append((scores.softmax(-1)[..., None] * v[..., :t + 1, :]).sum(-2))
    return torch.stack(rows, -2)


def attention_torch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril())


def attention_online(q, k, v):
    """Key after key, with the running maximum of the scores: the softmax of a stream."""
    scale = q.shape[-1] ** -0.5
    top = torch.full_like(q[..., :1], -math.inf)
    total, mean = torch.zeros_like(top), torch.zeros_like(v)
    place = torch.arange(q.shape[-2])[:, None]
    for s in range(q.shape[-2]):
        score = (q * k[..., s:s + 1, :]).sum(-1, keepdim=True) * scale
        score = torch.where(place >= s, score, torch.tensor(-math.inf, dtype=q.dtype))
        new = torch.maximum(top, score)
        shift = new.nan_to_num(neginf=0.0)
        old, weight = torch.exp(top - shift), torch.exp(score - shift)
        total, mean, top = total * old + weight, mean * old + weight * v[..., s:s + 1, :], new
    return mean / total


# --- dsf -------------------------------------------------------------------------------------------------------------


def dsf_plain(x, a, b, w):
    u = a * x.unsqueeze(-1) + b
    log_p = torch.logsumexp(torch.log(w) + F.logsigmoid(u), dim=-1)
    log_q = torch.logsumexp(torch.log(w) + F.logsigmoid(-u), dim=-1)
    log_slope = torch.logsumexp(torch.log(w) + torch.log(a) + F.logsigmoid(u) + F.logsigmoid(-u), dim=-1)
    return log_p - log_q, (log_slope - log_p - log_q).sum(dim=-1)


def dsf_softplus(x, a, b, w):
    """Everything by softplus: log sigmoid(u) = -softplus(-u)."""
    u = x[:, :, None] * a + b
    down, up, log_w = F.softplus(-u), F.softplus(u), w.log()
    p, rest = (log_w - down).logsumexp(2), (log_w - up).logsumexp(2)
    terms = (log_w + a.log() - down - up).logsumexp(2)
    y = p - rest
    ldj = (terms - p - rest).sum(1)
    return y, ldj


def dsf_loop(x, a, b, w):
    """Sigmoid after sigmoid, added up by logaddexp; no dimension for the components."""
    p = rest = terms = torch.full_like(x, -math.inf)
    for k in range(a.shape[-1]):
        u = a[..., k] * x + b[..., k]
        below, above, share = F.logsigmoid(u), F.logsigmoid(-u), w[..., k].log()
        p = torch.logaddexp(p, share + below)
        rest = torch.logaddexp(rest, share + above)
        terms = torch.logaddexp(terms, share + a[..., k].log() + below + above)
    return p - rest, torch.sum(terms - p - rest, -1)


def dsf_mixture(x, a, b, w):
    """As a mixture of logistics with means -b / a and scales 1 / a."""
    means, log_scales = -b / a, -a.log()
    u = (x[..., None] - means) * torch.exp(-log_scales)
    log_density = -u - log_scales - 2 * F.softplus(-u)
    p = torch.logsumexp(w.log() - F.softplus(-u), -1)
    rest = torch.logsumexp(w.log() - u - F.softplus(-u), -1)
    return p - rest, (torch.logsumexp(w.log() + log_density, -1) - p - rest).sum(-1)


def dsf_differentiated(x, a, b, w):
    """The slope by autograd, from a stable y."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        u = a * x[..., None] + b
        y = torch.logsumexp(w.log() + F.logsigmoid(u), -1) - torch.logsumexp(w.log() + F.logsigmoid(-u), -1)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, slope.log().sum(-1)


def dsf_odds(x, a, b, w):
    """The slope as the mean of a (1 - sigmoid) and of a sigmoid, with the shares of the terms: no third logsumexp."""
    u = a * x[..., None] + b
    left, right = w.log() + F.logsigmoid(u), w.log() + F.logsigmoid(-u)
    y = left.logsumexp(-1) - right.logsumexp(-1)
    slope = (left.softmax(-1) * a * torch.sigmoid(-u)).sum(-1) + (right.softmax(-1) * a * torch.sigmoid(u)).sum(-1)
    return y, slope.log().sum(-1)


def dsf_cosh(x, a, b, w):
    """The slope of a sigmoid as 1 / (2 cosh(u / 2))^2, whose logarithm is even in u."""
    u = a * x[..., None] + b
    size = u.abs()
    even = size + 2 * torch.log1p(torch.exp(-size))
    p = torch.logsumexp(w.log() - 0.5 * (even - u), -1)
    rest = torch.logsumexp(w.log() - 0.5 * (even + u), -1)
    return p - rest, (torch.logsumexp(w.log() + a.log() - even, -1) - p - rest).sum(-1)


# --- ddsf ------------------------------------------------------------------------------------------------------------


def ddsf_plain(h, log_slope, w, u, a, b):
    v = a * torch.matmul(u, h.unsqueeze(-1)).squeeze(-1) + b
    log_dv = torch.log(a) + torch.logsumexp(torch.log(u) + log_slope.unsqueeze(-2), dim=-1)
    below, above, log_dv = F.logsigmoid(v).unsqueeze(-2), F.logsigmoid(-v).unsqueeze(-2), log_dv.unsqueeze(-2)
    log_p = torch.logsumexp(torch.log(w) + below, dim=-1)
    log_q = torch.logsumexp(torch.log(w) + above, dim=-1)
    log_dp = torch.logsumexp(torch.log(w) + below + above + log_dv, dim=-1)
    return log_p - log_q, log_dp - log_p - log_q


def ddsf_matmul(h, log_slope, w, u, a, b):
    """Matrices where nothing can overflow, and a logarithm of a matrix product as a function of its own."""

    def times(m, log_t):
        return torch.logsumexp(m.log() + log_t[..., None, :], -1)

    v = a * (u @ h[..., None]).squeeze(-1) + b
    below, above = -F.softplus(-v), -F.softplus(v)
    p, rest = times(w, below), times(w, above)
    inner = below + above + a.log() + times(u, log_slope)
    return p - rest, times(w, inner) - p - rest


def ddsf_factors(h, log_slope, w, u, a, b):
    """The log-Jacobian matrices of the three steps, one after the other."""
    v = torch.einsum("bdki,bdi->bdk", u, h) * a + b
    first = u.log() + a.log()[..., None]  # dv / dh
    second = w.log() + (F.logsigmoid(v) + F.logsigmoid(-v))[..., None, :]  # dp / dv
    log_p, log_q = ((w.log() + t[..., None, :]).logsumexp(-1) for t in (F.logsigmoid(v), F.logsigmoid(-v)))
    second = second - (log_p + log_q)[..., None]
    whole = torch.logsumexp(second[..., :, :, None] + first[..., None, :, :], -2)  # dh' / dh, (B, D, d_out, d_in)
    return log_p - log_q, torch.logsumexp(whole + log_slope[..., None, :], -1)


def ddsf_loops(h, log_slope, w, u, a, b):
    """Unit after unit."""
    d_in, d_out = h.shape[-1], a.shape[-1]
    v, dv = [], []
    for k in range(d_out):
        v.append(a[..., k] * sum(u[..., k, i] * h[..., i] for i in range(d_in)) + b[..., k])
        terms = [u[..., k, i].log() + log_slope[..., i] for i in range(d_in)]
        dv.append(a[..., k].log() + torch.logsumexp(torch.stack(terms), 0))
    out, slopes = [], []
    below, above = [F.logsigmoid(t) for t in v], [F.logsigmoid(-t) for t in v]
    for j in range(d_out):
        log_w = [w[..., j, k].log() for k in range(d_out)]
        p = torch.logsumexp(torch.stack([log_w[k] + below[k] for k in range(d_out)]), 0)
        q = torch.logsumexp(torch.stack([log_w[k] + above[k] for k in range(d_out)]), 0)
        t = torch.logsumexp(torch.stack([log_w[k] + below[k] + above[k] + dv[k] for k in range(d_out)]), 0)
        out.append(p - q)
        slopes.append(t - p - q)
    return torch.stack(out, -1), torch.stack(slopes, -1)


def ddsf_exponentials(h, log_slope, w, u, a, b):
    """Matrix products of exponentials, the largest taken out before and put back afterwards."""

    def times(m, log_t):
        top = log_t.amax(-1, keepdim=True).detach()
        return top + torch.log((m @ torch.exp(log_t - top)[..., None])[..., 0])

    v = a * (u @ h[..., None])[..., 0] + b
    log_dv = a.log() + times(u, log_slope)
    p, q = times(w, F.logsigmoid(v)), times(w, F.logsigmoid(-v))
    return p - q, times(w, F.logsigmoid(v) + F.logsigmoid(-v) + log_dv) - p - q


def ddsf_by_shares(h, log_slope, w, u, a, b):
    """The slope of the logit of a mixture as two means with the shares of its terms."""
    v = a * torch.einsum("...ki,...i->...k", u, h) + b
    left, right = (w.log() + F.logsigmoid(s)[..., None, :] for s in (v, -v))
    y = left.logsumexp(-1) - right.logsumexp(-1)
    log_dv = a.log() + (u.log() + log_slope[..., None, :]).logsumexp(-1)
    both = torch.stack([left.log_softmax(-1) + F.logsigmoid(-v)[..., None, :], right.log_softmax(-1) + F.logsigmoid(v)[..., None, :]])
    return y, torch.logsumexp(both + log_dv[..., None, :], dim=(0, -1))


RIGHT = {
    "made_masks": [(f,) for f in (masks_in_turn, masks_in_pairs, masks_of_differences, masks_by_loops, boolean_masks,
                                  masks_from_triangles, masks_from_numpy)],
    "affine_forms": [(f,) for f in (two_forms, forms_in_logs, forms_by_weights, forms_by_lerp, forms_in_one, forms_in_single)],
    "maf": [(c,) for c in (PassByPass, Spliced, AllColumns, Joined, Standardised, Recursive, SingleMAF)],
    "iaf": [(c,) for c in (Sequential, SplicedIAF, Iterated, Columns, TurnedRound, RunningSum, SingleIAF)],
    "naf": [(c,) for c in (LogitOfMixture, WithDSF, Split, PerDimension, BySlope, SingleNAF)],
    "causal_conv1d": [(CausalPlain,), (CausalCut,), (CausalCat,), (CausalTaps,), (CausalToeplitz,), (CausalUnfold,), (CausalMasked,)],
    "pixelcnn_mask": [(pixel_plain,), (pixel_triangle,), (pixel_compare,), (pixel_lists,), (pixel_numpy,), (pixel_kron,)],
    "causal_attention": [(attention_plain,), (attention_added,), (attention_renormalised,), (attention_where,), (attention_loop,), (attention_torch,), (attention_online,)],
    "dsf": [(dsf_plain,), (dsf_softplus,), (dsf_loop,), (dsf_mixture,), (dsf_differentiated,), (dsf_odds,), (dsf_cosh,)],
    "ddsf": [(ddsf_plain,), (ddsf_matmul,), (ddsf_factors,), (ddsf_loops,), (ddsf_exponentials,), (ddsf_by_shares,)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason; a person has looked at them.
CONFIRMED = {}
