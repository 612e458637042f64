"""Flows on discrete sets: a bijection only renames the states, so there is no volume, log p(x) = log p(z).

Classes 0 .. K-1 are shifted and scaled modulo K (Tran et al. 2019, "Discrete Flows", section 3), integers are
shifted (Hoogeboom et al. 2019, "Integer Discrete Flows", section 3). What a net says is made discrete on
the forward pass and taken for continuous on the backward pass: the straight-through estimator, whose gradient is biased.
"""
import math

import torch
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid, one_hot

from .core import Transform, check_finite, given
from .coupling import Coupling
from .elementwise import ScalarMap
from .surjective import check_classes


def _inverses(K, device=None):
    """The inverse modulo K of each 0 .. K-1, and 0 where there is none (where gcd > 1)."""
    return torch.tensor([pow(s, -1, K) if math.gcd(s, K) == 1 else 0 for s in range(K)], device=device)


def _coprime(sigma, K, device):
    sigma = torch.as_tensor(sigma, device=device)
    check_classes(sigma, None, "sigma")
    sigma = sigma.long() % K
    if (torch.gcd(sigma, torch.full_like(sigma, K)) != 1).any():
        raise ValueError(f"sigma must be coprime to K = {K} everywhere, got {sigma.unique().tolist()} modulo {K}")
    return sigma


def modular_shift(x, mu, sigma, K):
    """z = (mu + sigma x) mod K on integers 0 .. K-1, elementwise; the contribution to log p is zero.

    x, mu, sigma: integers or integer tensors that broadcast; z has x's dtype. Raises ValueError unless gcd(sigma, K) = 1
    everywhere, and for x outside 0 .. K-1; TypeError for x of another dtype. Tran et al. 2019, section 3.
    """
    check_classes(x, K)
    return ((mu + _coprime(sigma, K, x.device) * x.long()) % K).to(x.dtype)


def modular_unshift(z, mu, sigma, K):
    """x = sigma^-1 (z - mu) mod K, which undoes modular_shift; arguments and errors as there."""
    check_classes(z, K, "z")
    return (_inverses(K, z.device)[_coprime(sigma, K, z.device)] * (z.long() - mu) % K).to(z.dtype)


def one_hot_argmax_st(logits, tau):
    """The one-hot vector of the argmax of logits (..., K), with the gradient of softmax(logits / tau) (straight through).

    tau > 0: a small one makes the softmax resemble the argmax, and its gradient large and rare. Tran et al. 2019, section 3.
    """
    soft = torch.softmax(logits / tau, -1)
    # The hard value plus an exact zero, so the result is one-hot to the last bit.
    return one_hot(logits.argmax(-1), logits.shape[-1]).to(soft) + (soft - soft.detach())


def round_st(x):
    """The nearest integer (halves to even), with the gradient of x (straight through). Hoogeboom et al. 2019, section 3."""
    return x.detach().round() + (x - x.detach())


def check_one_hot(x, name="x"):
    """Raise one sentence unless `x` is a floating-point tensor (..., D, K), one-hot over its last dimension."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be one-hot floats (..., D, K), got {got}; one-hot encode classes by "
                        "torch.nn.functional.one_hot(classes, K).float()")
    if x.ndim < 2 or not (((x == 0) | (x == 1)).all() and (x.sum(-1) == 1).all()):
        raise ValueError(f"{name} must be one-hot over its last dimension, of shape (..., D, K), got shape {tuple(x.shape)}"
                         + (" with rows that are not one-hot" if x.ndim > 1 else ""))


class ModularCoupling(Transform):
    """A bipartite modular flow on one-hot vectors: z2 = (mu(x1) + sigma(x1) x2) mod K, z1 = x1; the contribution is zero.

    x (..., D, K) one-hot floats, so that gradients pass through several layers; z likewise, exactly one-hot. x1 are the first
    D // 2 positions, or the last ones with `flip`. `net`: x1 flattened, (..., d K) -> (..., P (D - d) K), the logits of mu
    and, with `scale` (P = 2, else 1), the logits of sigma after them; a sigma not coprime to K is never chosen.
    mu and sigma are one_hot_argmax_st(logits, tau). Memory grows as K^2 a position. Raises TypeError for classes
    that are not one-hot encoded, ValueError for rows that are not one-hot and for a net of another shape.

    Tran et al. 2019, section 3 (the bipartite flow and its training).
    """

    def __init__(self, net, scale=False, flip=False, tau=1.0):
        super().__init__()
        self.net, self.scale, self.flip, self.tau = net, scale, flip, tau

    def _run(self, x, name, context, move):
        check_one_hot(x, name)
        K, cut = x.shape[-1], x.shape[-2] // 2
        parts = x.split([x.shape[-2] - cut, cut] if self.flip else [cut, x.shape[-2] - cut], -2)
        given_by, moved = parts[::-1] if self.flip else parts
        logits = self.net(given_by.flatten(-2), *given(context))
        wanted = (*x.shape[:-2], (1 + self.scale) * moved.shape[-2] * K)
        if logits.shape != wanted:
            raise ValueError(f"net must return a tensor of shape {wanted} for {name} of shape {tuple(x.shape)}, "
                             f"got {tuple(logits.shape)}")
        check_finite(type(self).__name__, x, logits=logits)
        k = torch.arange(K, device=x.device)
        location, scale = logits.unflatten(-1, (1 + self.scale, moved.shape[-2], K)).split([1, int(self.scale)], -3)
        scale = scale.masked_fill(torch.gcd(k, k.new_tensor(K)) != 1, -math.inf)
        moved = move(moved, k, *one_hot_argmax_st(torch.cat([location, scale], -3), self.tau).unbind(-3))
        return torch.cat([moved, given_by] if self.flip else [given_by, moved], -2), x.new_zeros(x.shape[:-2])

    # In both, a sum over all values of sigma (of mu) of the permuted x, of which the one-hot sigma (mu) picks one.
    def _shift(self, x, k, mu, sigma=None):
        if sigma is not None:
            x = (x[..., k[:, None] * _inverses(len(k), k.device) % len(k)] * sigma[..., None, :]).sum(-1)
        return (x[..., (k[:, None] - k) % len(k)] * mu[..., None, :]).sum(-1)

    def _unshift(self, z, k, mu, sigma=None):
        x = (z[..., (k[:, None] + k) % len(k)] * mu[..., None, :]).sum(-1)
        return x if sigma is None else (x[..., k[:, None] * k % len(k)] * sigma[..., None, :]).sum(-1)

    def forward(self, x, context=None):
        return self._run(x, "x", context, self._shift)

    def inverse_and_ldj(self, z, context=None):
        return self._run(z, "z", context, self._unshift)


def _integral(x, name, like):
    """x, as floats of `like`'s dtype if its own is an integer one; raise one sentence unless all its values are integers."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor that holds integers, got {type(x).__name__}")
    x = x if x.is_floating_point() else x.to(like.dtype)
    # Beyond 2 / eps floats skip integers, so x + mu would not be exact.
    fine = (x == x.round()) & (x.abs() < 2 / torch.finfo(x.dtype).eps)
    if not fine.all():
        raise ValueError(f"{name} must hold integers that {x.dtype} can count to, got {x[~fine][0].item()}")
    return x


class RoundedShift(ScalarMap):
    """z = x + round(mu), on integers; log_slope = 0. Parameter: mu, its gradient straight through. Hoogeboom et al. 2019."""
    num_params = 1

    def forward(self, x, params):
        return x + round_st(self.blocks(x, params)[0]), torch.zeros_like(x)

    def inverse(self, z, params):
        return z - round_st(self.blocks(z, params)[0]), torch.zeros_like(z)


class IDFCoupling(Coupling):
    """Integer discrete flow: z2 = x2 + round(net(x1)), z1 = x1, a bijection of the integers; the contribution is zero.

    x (..., D) holds integers in floats, or is of integer dtype and becomes floats of the weights' dtype (z carries gradients, so
    it is a float tensor). net: (..., D // 2) -> (..., D - D // 2). Exact both ways while all numbers stay below 2^24 in float32
    (2^53 in float64). Raises ValueError for numbers that are not integers. Hoogeboom et al. 2019, section 3.
    """

    def __init__(self, net):
        super().__init__(net, RoundedShift())

    def _halves(self, x, name, context):
        like = next(self.parameters(), torch.empty(0))
        first, second, params = super()._halves(_integral(x, name, like), name, context)
        # Told here, since to the next layer NaN would only be a number that is no integer.
        check_finite(type(self).__name__, first, params=params)
        return first, second, params


class DiscretisedLogistic(nn.Module):
    """A base on integer vectors: P(z) = sigmoid((z + 1/2 - m) / s) - sigmoid((z - 1/2 - m) / s) in each coordinate, or a mixture.

    `event_shape`: the sizes of a point, as for StandardNormal; `components`: how many logistics each coordinate mixes. Weights:
    means m, log_scales log s and, before the softmax, logits, each (components, *event_shape). log_prob (nats) takes integers
    in any dtype and raises ValueError for other numbers; sample gives floats. Hoogeboom et al. 2019, section 3; the mixture:
    Salimans et al. 2017, "PixelCNN++", section 2.1.
    """

    def __init__(self, *event_shape, components=1):
        super().__init__()
        self.event_shape, self.batch_shape = torch.Size(event_shape), torch.Size()
        ones = torch.ones(components, *event_shape)
        # Apart, one unit each, since equal components would get equal gradients for ever.
        self.means = nn.Parameter(ones.cumsum(0) - (components + 1) / 2)
        self.log_scales, self.logits = nn.Parameter(torch.zeros_like(ones)), nn.Parameter(torch.zeros_like(ones))

    def log_prob(self, z):
        n = len(self.event_shape)
        z = _integral(z, "z", self.means)
        if z.shape[z.ndim - n:] != self.event_shape:
            raise ValueError(f"z must have shape (..., {', '.join(map(str, self.event_shape))}), got {tuple(z.shape)}")
        step = torch.exp(-self.log_scales)
        centred = z.unsqueeze(-1 - n) - self.means
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose logs have no tail to lose.
        log_mass = logsigmoid((centred + 0.5) * step) + logsigmoid((0.5 - centred) * step) + torch.log(-torch.expm1(-step))
        log_mass = torch.logsumexp(log_mass + log_softmax(self.logits, 0), -1 - n)
        return log_mass.sum(tuple(range(-n, 0)))

    @torch.no_grad()
    def sample(self, sample_shape=()):
        weights = torch.softmax(self.logits, 0).movedim(0, -1)
        k = torch.distributions.Categorical(weights).sample(sample_shape).unsqueeze(len(sample_shape))
        m, log_s = (p.expand(*sample_shape, *p.shape).gather(len(sample_shape), k) for p in (self.means, self.log_scales))
        noise = torch.logit(torch.rand_like(m), eps=torch.finfo(m.dtype).eps / 4)
        return (m + torch.exp(log_s) * noise).round().squeeze(len(sample_shape))


class FactorisedCategorical(nn.Module):
    """A base on one-hot vectors (D, K): log p(z) = sum_d z_d . log_softmax(logits_d), nats, differentiable in z.

    Weights: logits (D, K), which start at random, because a uniform base gives the flow before it no gradient. log_prob
    takes z (..., D, K) and raises as check_one_hot; sample gives one-hot floats. Tran et al. 2019, section 3.
    """

    def __init__(self, dim, classes):
        super().__init__()
        self.event_shape, self.batch_shape = torch.Size((dim, classes)), torch.Size()
        self.logits = nn.Parameter(torch.randn(dim, classes))

    def log_prob(self, z):
        check_one_hot(z, "z")
        if z.shape[-2:] != self.event_shape:
            raise ValueError(f"z must have shape (..., {', '.join(map(str, self.event_shape))}), got {tuple(z.shape)}")
        return (z * log_softmax(self.logits, -1)).sum((-2, -1))

    @torch.no_grad()
    def sample(self, sample_shape=()):
        k = torch.distributions.Categorical(logits=self.logits).sample(sample_shape)
        return one_hot(k, self.event_shape[1]).to(self.logits.dtype)
