"""Dequantization: integers get noise in their cell, so that a density on [0, 1]^D can be fitted to them.

The model's probability of x is the mass of its cell, P(x) = integral of p((x + u) / K) / K^D over u in [0, 1]^D, and
Jensen's inequality with any q(u | x) gives, all in nats,

    log P(x) >= E_{u ~ q}[log p((x + u) / K) - D log K - log q(u | x)]

Uniform u: Uria et al. 2013, "RNADE", section 5. A learnt q, which is a conditional flow: Ho et al. 2019, "Flow++",
section 3.1. Both are generative surjections, x = floor(K y) (Nielsen et al. 2020, "SurVAE Flows", section 3).
"""
import math

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from .core import check_finite, given
from .surjective import Bound, check_classes, propose


def _in_cell(x, u, levels):
    """y = (x + u) / levels, moved by its last bits where rounding took it out of the cell floor(levels * y) = x.

    x + u is x + 1 in float32 for u near 1, and 1 / 49 * 49 is below 1. The move is no larger than the rounding was.
    """
    y = (x + u) / levels
    kept = y.detach()
    for _ in range(3):
        cell = (kept * levels).floor()
        kept = torch.nextafter(kept, torch.where(cell > x, -math.inf, torch.where(cell < x, math.inf, kept)))
    return y + (kept - y.detach())


def _check_levels(levels):
    # A cell must hold many floats, and float32 has 2^24 in [0, 1].
    if not 2 <= levels <= 2 ** 16:
        raise ValueError(f"levels must lie in 2 .. 65536, got {levels}")


def uniform_dequantize(x, K):
    """Spread integers x in 0 .. K-1 evenly over their cells: y = (x + u) / K, u uniform, and contribution = -D log K (nats).

    x (B, ...) of integer dtype gives y (B, ...) in [0, 1), of the default float dtype, and the contribution (B,); D counts
    all numbers of a point. Raises TypeError for another dtype and ValueError for values outside 0 .. K-1. Uria et al. 2013.
    """
    _check_levels(K)
    check_classes(x, K)
    u = torch.rand(x.shape, device=x.device)
    # Half the generator's step for 0, since the logit that often follows has no value there.
    y = _in_cell(x, u.clamp_min(torch.finfo(u.dtype).eps / 4), K)
    return y, y.new_full(x.shape[:1], -math.log(K) * math.prod(x.shape[1:]))


def variational_bound(x, q, log_prob):
    """One-sample estimate log p(x + u) - log q(u | x) of the lower bound on log P(x), (B,), in nats.

    `u, log_q = q(x)` with u (B, ...) in [0, 1) like x; `log_prob`: the density on [0, K]^D, (B, ...) -> (B,). x (B, ...) of
    integer dtype. Raises TypeError for another dtype and ValueError for a q of other shapes. Ho et al. 2019, section 3.1.
    """
    check_classes(x, None)
    u, log_q = propose(q, x, batch=x.shape[:1])
    return log_prob(_in_cell(x, u, 1)) - log_q


class UniformDequantizer(Bound):
    """Uniform noise as a layer: y = (x + u) / levels, contribution -D log levels; the inverse is x = floor(levels y).

    A generative surjection and a lower bound in the mean. x (B, ...) integers in 0 .. levels - 1, y (B, ...); the inverse
    gives torch.long, clamped to the levels. Raises TypeError for float x, ValueError for levels out of range. Uria et al. 2013.
    """
    surjective = True

    def __init__(self, levels):
        super().__init__()
        _check_levels(levels)
        self.levels = levels

    def forward(self, x, context=None):
        return uniform_dequantize(x, self.levels)

    def inverse(self, z, context=None):
        # An integer hides what was not finite, so it is looked for here.
        check_finite(type(self).__name__, z, z=z)
        return (z * self.levels).floor().clamp(0, self.levels - 1).long()


class VariationalDequantizer(UniformDequantizer):
    """Learnt noise: v, log_q = q(x), u = sigmoid(v), y = (x + u) / levels; the inverse is x = floor(levels y).

    contribution = -log q(u | x) - D log levels with log q(u | x) = log_q - sum_i log sigmoid'(v_i): a lower bound in the mean,
    tight where q(u | x) is the model's own density in the cell. `q(x)`, or q(x, context), gives v (B, ...) on all
    of R, as many numbers as x, and log_q (B,); FlowProposal makes one. Raises as UniformDequantizer, and ValueError for
    a q of other shapes. Ho et al. 2019, section 3.1.
    """

    def __init__(self, q, levels):
        super().__init__(levels)
        self.q = q

    def forward(self, x, context=None):
        check_classes(x, self.levels)
        v, log_q = propose(self.q, x, context, x.shape[:1])
        if v.numel() != x.numel():
            raise ValueError(f"q must return v with as many numbers as x of shape {tuple(x.shape)}, got {tuple(v.shape)}")
        v = v.reshape(x.shape)
        log_slope = (logsigmoid(v) + logsigmoid(-v)).unsqueeze(-1).flatten(1).sum(1)
        return _in_cell(x, torch.sigmoid(v), self.levels), log_slope - log_q - math.log(self.levels) * math.prod(x.shape[1:])


class FlowProposal(nn.Module):
    """A conditional flow as a proposal: q(x) -> (sample (B, *event), log_q (B,) in nats), reparameterised.

    `embed`: x (B, ...) -> context (B, ...) of floats, called with the outer context too if there is one; `flow`: an exact
    Flow whose nets take that context, and whose inverse, which runs here, should be the fast direction. Raises
    ValueError for a flow that is not exact, since its log_q would make no bound. Ho et al. 2019, section 3.1.
    """

    def __init__(self, flow, embed):
        super().__init__()
        if not flow.exact:
            raise ValueError("flow must be exact to be a proposal, got one whose log_prob is a bound")
        self.flow, self.embed = flow, embed

    def forward(self, x, context=None):
        return self.flow.sample_and_log_prob(len(x), context=self.embed(x, *given(context)))
