"""Scalar monotone maps: how one variable is bent, whoever gives the parameters (a coupling or an autoregressive net).

A map has `num_params` parameters P for each dimension, z, log_slope = forward(x, params) and x, log_slope =
inverse(z, params), all elementwise: x, z and log_slope = log dz/dx (nats, not yet summed) have the shape (..., d).
`params` is (..., P * d), and column p * d + i is parameter p of dimension i.

Affine: Dinh et al. 2017, "Density estimation using Real NVP", section 3.2. Shift: Dinh et al. 2015, "NICE", section 3.2.
Mixture of logistics: Ho et al. 2019, "Flow++", section 3.2.
"""
import math

import torch
from torch.nn.functional import logsigmoid

from .core import check_input


def _check_weights(weights):
    if (weights < 0).any() or ((weights.sum(-1) - 1).abs() > 1e-3).any():
        raise ValueError("weights must be positive and sum to 1 over their last dimension; torch.softmax(logits, -1) does it")


def _log(weights):
    """log(weights), where a weight of 0 gives -inf and yet a gradient that is finite."""
    tiny = torch.finfo(weights.dtype).tiny
    return torch.where(weights > 0, weights.clamp_min(tiny).log(), -math.inf)


def mixture_cdf(x, weights, means, log_scales):
    """CDF of a mixture of logistics, z = sum_k w_k sigmoid((x - m_k) exp(-s_k)), and ldj = log dz/dx (nats).

    x (...), parameters (..., K) that broadcast against x[..., None], weights summing to 1; z and ldj (...).
    """
    _check_weights(weights)
    u = (x[..., None] - means) * torch.exp(-log_scales)
    z = (weights * torch.sigmoid(u)).sum(-1)
    # The slope of a sigmoid is sigmoid(u) sigmoid(-u); in logs it keeps its precision where it underflows.
    ldj = torch.logsumexp(_log(weights) + logsigmoid(u) + logsigmoid(-u) - log_scales, -1)
    return z, ldj


def mix_logit_cdf(x, weights, means, log_scales):
    """Logit of the mixture CDF F, y = log F(x) - log(1 - F(x)), and ldj = log dy/dx (nats); arguments as in mixture_cdf.

    F is 1 in float32 long before x = 30, so neither F nor 1 - F is ever formed: 1 - sigmoid(u) = sigmoid(-u)
    gives both as sums of positive terms, and the sums are taken in logs. dy/dx = F' / (F (1 - F)).
    """
    _check_weights(weights)
    return _mix_logit_cdf(x, _log(weights), means, log_scales)


def _mix_logit_cdf(x, log_weights, means, log_scales):
    u = (x[..., None] - means) * torch.exp(-log_scales)
    log_below, log_above = logsigmoid(u), logsigmoid(-u)
    log_cdf = torch.logsumexp(log_weights + log_below, -1)
    log_rest = torch.logsumexp(log_weights + log_above, -1)
    log_pdf = torch.logsumexp(log_weights + log_below + log_above - log_scales, -1)
    return log_cdf - log_rest, log_pdf - log_cdf - log_rest


def invert_increasing(f, z, low=None, high=None):
    """Solve f(x) = z elementwise for an increasing f, where f(x) returns (value, log_slope).

    Bisection on [low, high] (default [-1, 1]), which is first widened until it holds the root. A step goes by
    Newton's rule where that stays inside and the last one at least halved the error; otherwise it halves the
    interval, so the worst case is bisection's and the usual one takes few steps. The result is differentiable
    (once) in z and in the parameters that f closes over, by the implicit function theorem: dx = (dz - df) / f'(x).
    Raises FloatingPointError for a z that is not finite or that f does not reach.
    """
    if not torch.isfinite(z).all():
        raise FloatingPointError("the value to invert by bisection must be finite; z, or the parameters given by the net, are not")
    with torch.no_grad():
        low = torch.full_like(z, -1) if low is None else low.clone()
        high = torch.full_like(z, 1) if high is None else high.clone()
        _widen(f, z, low, high)
        x, error = (low + high) / 2, torch.full_like(z, math.inf)
        eps = torch.finfo(z.dtype).eps
        for _ in range(200):
            value, log_slope = f(x)
            last, error = error, (value - z).abs()
            low, high = torch.where(value <= z, x, low), torch.where(value >= z, x, high)
            # Both bounds are near what rounding leaves of the value and of the interval.
            if ((error <= 2 * eps * (1 + z.abs())) | (high - low <= 2 * eps * x.abs())).all():
                break
            newton = x + (z - value) * torch.exp(-log_slope)
            trust = (newton > low) & (newton < high) & (error <= last / 2)
            x = torch.where(trust, newton, (low + high) / 2)
    if not torch.is_grad_enabled():
        return x
    # Adds zero to the value, and the implicit function theorem to the gradient. The bound keeps that zero from
    # meeting an infinite 1 / slope where the curve is flat to rounding.
    value, log_slope = f(x)
    change = (z - z.detach()) - (value - value.detach())
    return x + change * torch.exp(-log_slope.detach().clamp_min(-40))


def _widen(f, z, low, high):
    """Move low down and high up, in place, by strides that double, until f(low) <= z <= f(high)."""
    stride = high - low + 1
    while True:
        too_high, too_low = f(low)[0] > z, f(high)[0] < z
        if not (too_high | too_low).any():
            return
        low -= stride * too_high
        high += stride * too_low
        stride = 2 * stride
        if not torch.isfinite(stride).all():
            raise FloatingPointError("z must lie in the range of the map, and no bracket around its root was found")


class ScalarMap:
    """The protocol of a scalar map; see the top of this file. A map has no weights of its own."""
    num_params: int

    def forward(self, x, params):
        """z and log dz/dx, each of the shape of x."""
        raise NotImplementedError

    def inverse(self, z, params):
        """The x with forward(x) = z, and log dz/dx there."""
        raise NotImplementedError

    def split(self, x, params):
        """View params (..., P * d) as (..., P, d), for x (..., d)."""
        check_input(params, "params", self.num_params * x.shape[-1])
        return params.unflatten(-1, (self.num_params, x.shape[-1]))


class Shift(ScalarMap):
    """z = x + mu, volume preserving: log_slope = 0. Parameter: mu."""
    num_params = 1

    def forward(self, x, params):
        return x + self.split(x, params)[..., 0, :], torch.zeros_like(x)

    def inverse(self, z, params):
        return z - self.split(z, params)[..., 0, :], torch.zeros_like(z)


class Affine(ScalarMap):
    """z = x exp(alpha) + mu, log_slope = alpha. Parameters: alpha, mu.

    With a `bound` c, alpha is c tanh(alpha / c) instead, so no slope leaves [exp(-c), exp(c)].
    """
    num_params = 2

    def __init__(self, bound=None):
        if bound is not None and not bound > 0:
            raise ValueError(f"bound must be positive or None, got {bound}")
        self.bound = bound

    def _alpha_mu(self, x, params):
        alpha, mu = self.split(x, params).unbind(-2)
        if self.bound is not None:
            alpha = self.bound * torch.tanh(alpha / self.bound)
        return alpha, mu

    def forward(self, x, params):
        alpha, mu = self._alpha_mu(x, params)
        return x * torch.exp(alpha) + mu, alpha

    def inverse(self, z, params):
        alpha, mu = self._alpha_mu(z, params)
        return (z - mu) * torch.exp(-alpha), alpha


class MixLogitCDF(ScalarMap):
    """Flow++: z = logit(F(x)) exp(a) + b with F the CDF of a mixture of K logistics; inverted by bisection.

    Parameters: K logits of the weights (before the softmax), K means, K log-scales, a, b; so P = 3 K + 2.
    """

    def __init__(self, components):
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.components, self.num_params = components, 3 * components + 2

    def _parts(self, x, params):
        p, k = self.split(x, params).transpose(-1, -2), self.components
        logits, means, log_scales, a, b = p.split([k, k, k, 1, 1], -1)
        return torch.log_softmax(logits, -1), means, log_scales, a[..., 0], b[..., 0]

    def forward(self, x, params):
        *mixture, a, b = self._parts(x, params)
        y, log_slope = _mix_logit_cdf(x, *mixture)
        return y * torch.exp(a) + b, log_slope + a

    def inverse(self, z, params):
        *mixture, a, b = self._parts(z, params)
        y = (z - b) * torch.exp(-a)
        # F is a mean of its components, so the root lies between theirs, which have the closed form m + exp(s) y.
        _, means, log_scales = mixture
        roots = (means + torch.exp(log_scales) * y[..., None]).detach()
        x = invert_increasing(lambda x: _mix_logit_cdf(x, *mixture), y, roots.amin(-1), roots.amax(-1))
        return x, _mix_logit_cdf(x, *mixture)[1] + a
