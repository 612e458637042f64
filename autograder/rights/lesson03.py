"""Differently written right answers of lesson 03: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

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
    "causal_conv1d": [(CausalPlain,), (CausalCut,), (CausalCat,), (CausalTaps,), (CausalToeplitz,), (CausalUnfold,), (CausalMasked,)],
    "pixelcnn_mask": [(pixel_plain,), (pixel_triangle,), (pixel_compare,), (pixel_lists,), (pixel_numpy,), (pixel_kron,)],
    "causal_attention": [(attention_plain,), (attention_added,), (attention_renormalised,), (attention_where,), (attention_loop,), (attention_torch,), (attention_online,)],
    "dsf": [(dsf_plain,), (dsf_softplus,), (dsf_loop,), (dsf_mixture,), (dsf_differentiated,), (dsf_odds,), (dsf_cosh,)],
    "ddsf": [(ddsf_plain,), (ddsf_matmul,), (ddsf_factors,), (ddsf_loops,), (ddsf_exponentials,), (ddsf_by_shares,)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason; a person has looked at them.
CONFIRMED = {}
