"""Scalar monotone maps: how one variable is bent, whoever gives the parameters (a coupling or an autoregressive net).

A map has `num_params` parameters P for each dimension, z, log_slope = forward(x, params) and x, log_slope =
inverse(z, params), all elementwise: x, z and log_slope = log dz/dx (nats, not yet summed) have the shape (..., d).
`params` is (..., P * d), and column p * d + i is parameter p of dimension i.

Affine: Dinh et al. 2017, "Density estimation using Real NVP", section 3.2. Shift: Dinh et al. 2015, "NICE", section 3.2.
Gate: Kingma et al. 2016, "Improving Variational Inference with IAF", equation 14. Mixture of logistics: Ho et al. 2019,
"Flow++", section 3.2. DSF and DDSF: Huang et al. 2018, "Neural Autoregressive Flows", sections 3.1 to 3.3.
Mixture of Gaussians: Papamakarios et al. 2017, "Masked Autoregressive Flow", section 3.5.
"""
import math
from itertools import pairwise

import torch
from torch.nn.functional import logsigmoid, softplus

from .core import Transform, check_input


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
    return _logit_mixture((x[..., None] - means) * torch.exp(-log_scales), -log_scales, _log(weights))


def dsf(x, a, b, w):
    """Deep sigmoidal flow: y = logit(sum_k w_k sigmoid(a_k x + b_k)) and log_slope = log dy/dx (nats).

    x (...); a > 0, b and the weights w, which sum to 1, are (..., K). It is mix_logit_cdf with a = exp(-s), b = -m exp(-s).
    """
    _check_weights(w)
    return _logit_mixture(a * x[..., None] + b, a.log(), _log(w))


def ddsf_layer(h, log_slope, w, u, a, b):
    """One dense layer of DDSF: h'_j = logit(sum_k w_jk sigmoid(v_k)) with v_k = a_k sum_i u_ki h_i + b_k.

    h and log_slope = log dh/dx are (..., d_in), w (..., d_out, d_out), u (..., d_out, d_in), a > 0 and b (..., d_out);
    the rows of w and u are positive and sum to 1. Returns h' and log dh'/dx, both (..., d_out): the slopes multiply
    as matrices (chain rule), and the product is taken in logs.
    """
    _check_weights(w)
    _check_weights(u)
    return _ddsf_layer(h, log_slope, _log(w), _log(u), a.log(), b)


def _ddsf_layer(h, log_slope, log_w, log_u, log_a, b):
    v = torch.exp(log_a) * (torch.exp(log_u) * h[..., None, :]).sum(-1) + b
    log_dv = log_a + torch.logsumexp(log_u + log_slope[..., None, :], -1)
    return _logit_mixture(v[..., None, :], log_dv[..., None, :], log_w)


def _logit_mixture(u, log_du, log_weights):
    """y = logit(sum_k w_k sigmoid(u_k)) and log dy/dx, where log_du = log du/dx: what all mixtures of sigmoids share."""
    log_below = logsigmoid(u)
    log_above = log_below - u
    log_cdf = torch.logsumexp(log_weights + log_below, -1)
    log_rest = torch.logsumexp(log_weights + log_above, -1)
    log_pdf = torch.logsumexp(log_weights + log_below + log_above + log_du, -1)
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
        done = trust = torch.zeros_like(z, dtype=torch.bool)
        eps = torch.finfo(z.dtype).eps
        for _ in range(200):
            value, log_slope = f(x)
            last, error = error, (value - z).abs()
            low, high = torch.where(value <= z, x, low), torch.where(value >= z, x, high)
            # Both bounds are near what rounding leaves of the value and of the interval; and this near to the root a step
            # by Newton's rule halves the error unless rounding is all that is left of it.
            floor = eps * (1 + z.abs())
            stuck = trust & (error > last / 2) & (error <= 100 * floor)
            done = done | stuck | (error <= 2 * floor) | (high - low <= 2 * eps * x.abs())
            if done.all():
                break
            newton = x + (z - value) * torch.exp(-log_slope)
            trust = (newton > low) & (newton < high) & (error <= last / 2)
            x = torch.where(done, x, torch.where(trust, newton, (low + high) / 2))
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

    def blocks(self, x, params):
        """The P parameters, each (..., d), that params (..., P * d) holds for x (..., d)."""
        check_input(params, "params", self.num_params * x.shape[-1])
        return params.chunk(self.num_params, -1)

    def groups(self, x, params, sizes):
        """The same in groups (..., d, size) of several parameters, such as the K means of each coordinate."""
        check_input(params, "params", self.num_params * x.shape[-1])
        return params.unflatten(-1, (self.num_params, x.shape[-1])).transpose(-1, -2).split(sizes, -1)


class Shift(ScalarMap):
    """z = x + mu, volume preserving: log_slope = 0. Parameter: mu."""
    num_params = 1

    def forward(self, x, params):
        return x + self.blocks(x, params)[0], torch.zeros_like(x)

    def inverse(self, z, params):
        return z - self.blocks(z, params)[0], torch.zeros_like(z)


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
        alpha, mu = self.blocks(x, params)
        if self.bound is not None:
            alpha = self.bound * torch.tanh(alpha / self.bound)
        # On scattered numbers exp is ten times slower.
        return alpha.contiguous(), mu

    def forward(self, x, params):
        alpha, mu = self._alpha_mu(x, params)
        return x * torch.exp(alpha) + mu, alpha

    def inverse(self, z, params):
        alpha, mu = self._alpha_mu(z, params)
        return (z - mu) * torch.exp(-alpha), alpha


class GatedAffine(ScalarMap):
    """z = sigma x + (1 - sigma) mu with sigma = sigmoid(a), log_slope = log sigma < 0: it never expands. Parameters: a, mu."""
    num_params = 2

    def forward(self, x, params):
        a, mu = self.blocks(x, params)
        return torch.sigmoid(a) * x + torch.sigmoid(-a) * mu, logsigmoid(a)

    def inverse(self, z, params):
        a, mu = self.blocks(z, params)
        # (z - (1 - sigma) mu) / sigma, where (1 - sigma) / sigma = exp(-a)
        return z + torch.exp(-a) * (z - mu), logsigmoid(a)


class _Mixture(ScalarMap):
    """A mixture of K sigmoids through its logit: logit(sum_k w_k sigmoid(u_k)), each u_k = a_k x + b_k rising in x."""

    def __init__(self, components, num_params):
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.components, self.num_params = components, num_params


class MixLogitCDF(_Mixture):
    """Flow++: z = logit(F(x)) exp(a) + b with F the CDF of a mixture of K logistics; inverted by bisection.

    Parameters: K logits of the weights (before the softmax), K means, K log-scales, a, b; so P = 3 K + 2.
    """

    def __init__(self, components):
        super().__init__(components, 3 * components + 2)

    def spread(self, d, reach):
        """Parameters (P * d) to begin learning with: equal weights, means evenly over [-reach, reach], scales 0.6 of their distance."""
        means = torch.linspace(-reach, reach, self.components)
        scale = torch.full_like(means, 0.6 * 2 * reach / max(1, self.components - 1))
        one = torch.cat([torch.zeros_like(means), means, scale.log(), means.new_zeros(2)])
        return one.repeat_interleave(d)

    def _parts(self, x, params):
        k = self.components
        logits, means, log_scales, a, b = self.groups(x, params, [k, k, k, 1, 1])
        return torch.log_softmax(logits, -1), means, log_scales, a[..., 0], b[..., 0]

    @staticmethod
    def _bend(x, log_weights, means, log_scales):
        return _logit_mixture((x[..., None] - means) * torch.exp(-log_scales), -log_scales, log_weights)

    def forward(self, x, params):
        *mixture, a, b = self._parts(x, params)
        y, log_slope = self._bend(x, *mixture)
        return y * torch.exp(a) + b, log_slope + a

    def inverse(self, z, params):
        *mixture, a, b = self._parts(z, params)
        _, means, log_scales = mixture
        y = (z - b) * torch.exp(-a)
        x, log_slope = _invert_mixture(lambda x: self._bend(x, *mixture), y, means + torch.exp(log_scales) * y[..., None])
        return x, log_slope + a


class DSF(_Mixture):
    """NAF's deep sigmoidal flow: z = logit(sum_k w_k sigmoid(a_k x + b_k)); inverted by bisection.

    Parameters: K raw slopes (a is their softplus), K shifts b, K logits of the weights w; so P = 3 K.
    """

    def __init__(self, components):
        super().__init__(components, 3 * components)

    def _parts(self, x, params):
        raw, b, logits = self.groups(x, params, [self.components] * 3)
        return _log_softplus(raw), b, torch.log_softmax(logits, -1)

    @staticmethod
    def _bend(x, log_a, b, log_w):
        return _logit_mixture(torch.exp(log_a) * x[..., None] + b, log_a, log_w)

    def forward(self, x, params):
        return self._bend(x, *self._parts(x, params))

    def inverse(self, z, params):
        log_a, b, log_w = self._parts(z, params)
        return _invert_mixture(lambda x: self._bend(x, log_a, b, log_w), z, (z[..., None] - b) * torch.exp(-log_a))


class DDSF(ScalarMap):
    """NAF's deep dense sigmoidal flow: layers of `ddsf_layer` of the given hidden widths between x and z; inverted by
    bisection.

    `widths`: the hidden widths d_1 .. d_L, at least one; x and z have width 1. Parameters, layer after layer: raw a
    (softplus) and b, d_out each, logits of the rows of w, d_out^2, and of u, d_out d_in. Far out it is linear, so its
    range is all.
    """

    def __init__(self, widths=(8, 8)):
        if len(widths) == 0 or min(widths) < 1:
            raise ValueError(f"widths must be at least one positive number, got {tuple(widths)}")
        self.layers = list(pairwise((1, *widths, 1)))
        self.num_params = sum(d_out * (2 + d_out + d_in) for d_in, d_out in self.layers)

    def _parts(self, x, params):
        sizes = [size for d_in, d_out in self.layers for size in (d_out, d_out, d_out * d_out, d_out * d_in)]
        groups, layers = iter(self.groups(x, params, sizes)), []
        for (_, d_out), raw, b, w, u in zip(self.layers, groups, groups, groups, groups):
            log_w, log_u = (torch.log_softmax(m.unflatten(-1, (d_out, -1)), -1) for m in (w, u))
            layers.append((log_w, log_u, _log_softplus(raw), b))
        return layers

    @staticmethod
    def _bend(x, layers):
        h, log_slope = x[..., None], torch.zeros_like(x)[..., None]
        for parts in layers:
            h, log_slope = _ddsf_layer(h, log_slope, *parts)
        return h[..., 0], log_slope[..., 0]

    def forward(self, x, params):
        return self._bend(x, self._parts(x, params))

    def inverse(self, z, params):
        layers = self._parts(z, params)
        x = invert_increasing(lambda x: self._bend(x, layers), z)
        return x, self._bend(x, layers)[1]


class MixGaussianCDF(_Mixture):
    """z = Phi^-1(F(x)) with F the CDF of a mixture of K Gaussians; under a standard normal base x has just that mixture's
    density.

    log_slope = log F'(x) - log phi(z), phi and Phi the standard normal's density and CDF; inverted by bisection.
    Parameters: K logits of the weights, K means, K log-scales; so P = 3 K. With a MADE it is MADE MoG.
    """

    def __init__(self, components):
        super().__init__(components, 3 * components)

    def _parts(self, x, params):
        logits, means, log_scales = self.groups(x, params, [self.components] * 3)
        return torch.log_softmax(logits, -1), means, log_scales

    @staticmethod
    def _bend(x, log_weights, means, log_scales):
        u = (x[..., None] - means) * torch.exp(-log_scales)
        log_cdf = torch.logsumexp(log_weights + torch.special.log_ndtr(u), -1)
        log_rest = torch.logsumexp(log_weights + torch.special.log_ndtr(-u), -1)
        log_pdf = torch.logsumexp(log_weights - 0.5 * u ** 2 - log_scales, -1)
        # The smaller tail is the one that is known precisely.
        tail = _normal_quantile(torch.minimum(log_cdf, log_rest))
        z = torch.where(log_cdf < log_rest, tail, -tail)
        return z, log_pdf + 0.5 * z ** 2

    def forward(self, x, params):
        return self._bend(x, *self._parts(x, params))

    def inverse(self, z, params):
        mixture = self._parts(z, params)
        _, means, log_scales = mixture
        return _invert_mixture(lambda x: self._bend(x, *mixture), z, means + torch.exp(log_scales) * z[..., None])


def _normal_quantile(log_p):
    """The z <= 0 with log Phi(z) = log_p, for log_p <= log(1/2) however small."""
    with torch.no_grad():
        # log Phi is concave and the start lies left of the root, so Newton's steps rise to it and never overshoot.
        z = -torch.sqrt(-2 * log_p)
        for _ in range(8):
            value = torch.special.log_ndtr(z)
            z = z + (log_p - value) * torch.exp(value + 0.5 * z ** 2) * math.sqrt(2 * math.pi)
        slope = torch.exp(log_p + 0.5 * z ** 2) * math.sqrt(2 * math.pi)
    return z + (log_p - log_p.detach()) * slope


def _log_softplus(raw):
    """log(softplus(raw)), also where softplus underflows: there softplus(raw) = exp(raw)."""
    return torch.where(raw < -20, raw, softplus(raw.clamp_min(-20)).log())


def _invert_mixture(bend, y, roots):
    """Solve bend(x) = y; a mixture of rising curves meets y between the `roots` (..., K) of its components."""
    with torch.no_grad():
        bound = torch.finfo(y.dtype).max ** 0.5
        roots = roots.clamp(-bound, bound)
        low, high = roots.amin(-1), roots.amax(-1)
    x = invert_increasing(bend, y, low, high)
    return x, bend(x)[1]


class Logit(Transform):
    """From the cube to all of space: z = log(y / (1 - y)) with y = alpha + (1 - 2 alpha) x, elementwise.

    ldj = sum of log(1 - 2 alpha) - log y - log(1 - y) over the last `event_dims` dimensions (3 for images). x in [0, 1];
    alpha > 0 keeps z finite at the walls (Dinh et al. 2017, section 4.1). Raises ValueError for x outside.
    """

    def __init__(self, alpha=0.05, event_dims=1):
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must lie in [0, 1/2), got {alpha}")
        self.alpha, self.event_dims = alpha, event_dims

    def _ldj(self, z):
        # log y + log(1 - y) = logsigmoid(z) + logsigmoid(-z)
        log_slope = math.log1p(-2 * self.alpha) - logsigmoid(z) - logsigmoid(-z)
        return log_slope.sum(tuple(range(-self.event_dims, 0)))

    def forward(self, x, context=None):
        check_input(x)
        if ((x < 0) | (x > 1)).any():
            raise ValueError(f"x must lie in [0, 1] for Logit, got values from {x.min():.3g} to {x.max():.3g}")
        z = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        return z, self._ldj(z)

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z")
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha), self._ldj(z)
