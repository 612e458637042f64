"""Residual flows: z = x + g(x) is a bijection as soon as g is a contraction, Lip(g) = L < 1, whatever its architecture.

    log|det dz/dx| = log det(I + J) = tr(J) - tr(J^2) / 2 + tr(J^3) / 3 - ...,        J = dg/dx

The spectral norm of each weight is bounded, so that g contracts; the inverse is the fixed point of x = z - g(x); the traces
are estimated by v^T J^k v. Cut off after n terms the series is biased; Russian roulette cuts it off at random and is not.

Behrmann et al. 2019, "Invertible Residual Networks" (i-ResNet), sections 2 and 3; Chen et al. 2019, "Residual Flows for
Invertible Generative Modeling", sections 3.1 (roulette, Neumann gradient) and 3.3 (LipSwish).
"""
import math
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, conv_transpose2d, linear, normalize, softplus

from .core import Transform, check_finite, check_input, given


# --- contractive nets

SMALL = 128     # up to this size a matrix is decomposed, which is quicker than iterating


def _generic(shape, like):
    """The same unit vector at each call, orthogonal to nothing that a weight would single out; no global seed is touched."""
    v = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    return (v / v.norm()).to(like)


def _top_singular_vector(normal, v, tol, max_iter):
    """The v with the largest s = |W v| among the combinations of all power iterates v, A v, A^2 v, ..., A = W^T W.

    Power iteration keeps only the last iterate; their whole span (Lanczos) needs the square root of its number of steps.
    `normal` applies A. Stops at |A v - s^2 v| <= tol s^2; returns v and whether that was reached.
    """
    shape, v = v.shape, v.flatten()
    basis, small = v.new_empty(max_iter, len(v)), v.new_zeros(max_iter, max_iter)
    for k in range(1, min(max_iter, len(v)) + 1):
        basis[k - 1] = v
        image = normal(v.reshape(shape)).flatten()
        small[k - 1, :k] = basis[:k] @ image
        rest = image - small[k - 1, :k] @ basis[:k]
        squares, vectors = torch.linalg.eigh(small[:k, :k])
        reached = bool(rest.norm() * vectors[-1, -1].abs() <= tol * squares[-1])
        if reached:
            break
        v = rest / rest.norm()
    return normalize(vectors[:, -1] @ basis[:k], dim=0).reshape(shape), reached


def spectral_normalize(weight, c, n_iter):
    """Scale a matrix so that its spectral norm is at most c: W / max(1, s / c), with s from n_iter power iterations.

    weight (d_out, d_in), returned with the same shape, untouched when s <= c. n_iter iterations find s from below, so
    few of them leave the norm above c. Differentiable: ds = u^T dW v. Behrmann et al. 2019, section 2.1.
    """
    w, v = weight.detach(), _generic(weight.shape[1:], weight)
    for _ in range(n_iter):
        v = normalize(w.T @ (w @ v), dim=0, eps=torch.finfo(w.dtype).tiny)
    return weight / ((weight @ v).norm() / c).clamp_min(1)


class _Spectral:
    """A linear layer whose operator W has a spectral norm of at most coeff (mixed into nn.Linear and nn.Conv2d).

    The weight is W / max(1, sigma / coeff). `direction`, the right singular vector v of sigma = |W v|, and `seen`, the weight
    it belongs to, are buffers: the iteration starts from the stored vector, and runs only if the weight (or the image
    size) is another than last time, so two calls with the same weights agree to the last bit, in train and eval mode.
    It stops at a relative residual of tol (default sqrt(eps) of the dtype). sigma has the exact gradient u^T dW v.

    After k = max_iter steps without that, the estimate s is still a lower bound of sigma, and g might not contract.
    `slack` then raises it to the upper bound s cosh(asinh(1 / a) / (2 k - 1)), where a is how much of the top singular
    vector the start contained: the layer contracts a little more than asked (0.2% for n = 1000 inputs), and the gradient of
    sigma is approximate. The start is generic, so a > 1e-4 / sqrt(n) but for one start in a thousand. (W stretches
    no p(A) v of the span by more than s; take p(s^2 (1 - t^2)) = T_{2k-1}(t) / t with Chebyshev's polynomial T.)
    """

    def _setup(self, coeff, tol, max_iter):
        if not coeff > 0:
            raise ValueError(f"coeff must be positive, got {coeff}")
        self.coeff, self.tol, self.max_iter = coeff, tol, max_iter
        self.register_buffer("direction", torch.empty(0))
        self.register_buffer("seen", torch.zeros_like(self.weight.detach()))
        self.register_buffer("slack", torch.ones(()))

    # Vectors made in inference mode could not be used in training afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _refresh(self, shape):
        weight = self.weight.detach()
        if self.direction.shape == shape and torch.equal(self.seen, weight):
            return
        v, slack = self._find(weight, shape)
        self.direction, self.seen, self.slack = v, weight.clone(), torch.full_like(self.slack, slack)

    def _find(self, weight, shape):
        """The top singular vector, of that shape, and the slack."""
        start = _generic(shape, weight)
        if self.direction.shape == shape:
            # The stored vector alone may be a singular vector of the new weight too, and no longer the top one.
            start = self.direction + 0.1 * start
        tol = torch.finfo(weight.dtype).eps ** 0.5 if self.tol is None else self.tol
        v, reached = _top_singular_vector(lambda v: self._adjoint(weight, self._operator(weight, v)),
                                          start / start.norm(), tol, self.max_iter)
        return v, 1 if reached else math.cosh(math.asinh(1e4 * math.sqrt(v.numel())) / (2 * self.max_iter - 1))

    def bounded_weight(self, shape):
        """The weight that is applied to an input of this shape (without its batch)."""
        check_finite(type(self).__name__, self.weight.new_zeros(()), weight=self.weight)
        self._refresh((1, *shape))
        # With v fixed, the norm's gradient is u^T dW v.
        sigma = self.slack * torch.linalg.vector_norm(self._operator(self.weight, self.direction))
        return self.weight / (sigma / self.coeff).clamp_min(1)

    def forward(self, x):
        return self._operator(self.bounded_weight(x.shape[1 - self.weight.ndim:]), x, self.bias)

    def _save_to_state_dict(self, *args):
        # What is saved belongs together, so that a loaded layer starts with nothing to do.
        if self.direction.numel() > 0 and torch.isfinite(self.weight).all():
            self._refresh(self.direction.shape)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "direction" in state_dict:
            self.direction = self.direction.new_empty(state_dict[prefix + "direction"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SpectralLinear(_Spectral, nn.Linear):
    """A linear layer (..., d_in) -> (..., d_out) with Lipschitz constant at most coeff.

    y = x W^T / max(1, sigma(W) / coeff) + b. With at most SMALL inputs or outputs sigma is exact; else the iteration stops
    at a relative residual of tol, and goes on from where it was when the weight has changed; details, and what happens at
    max_iter: _Spectral. Behrmann et al. 2019, section 2.1.
    """

    def __init__(self, d_in, d_out, coeff=0.9, tol=None, max_iter=100):
        super().__init__(d_in, d_out)
        self._setup(coeff, tol, max_iter)

    def _find(self, weight, shape):
        if min(weight.shape) > SMALL:
            return super()._find(weight, shape)
        wide = self.out_features < self.in_features
        top = torch.linalg.eigh(weight @ weight.T if wide else weight.T @ weight)[1][:, -1]
        return normalize(top @ weight if wide else top, dim=0).reshape(shape), 1

    def _operator(self, weight, v, bias=None):
        return linear(v, weight, bias)

    def _adjoint(self, weight, u):
        return u @ weight


class SpectralConv2d(_Spectral, nn.Conv2d):
    """A convolution (B, c_in, H, W) -> (B, c_out, H, W), zero padded, with Lipschitz constant at most coeff.

    sigma is the norm of the convolution as an operator on H x W images (that of the kernel as a matrix may be well below
    it), found with the convolution and its transpose; another image size has another sigma and starts anew.
    kernel_size must be odd. Behrmann et al. 2019, section 2.1 and appendix (Gouk et al. 2018).
    """

    def __init__(self, c_in, c_out, kernel_size, coeff=0.9, tol=None, max_iter=100):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the image keeps its size, got {kernel_size}")
        super().__init__(c_in, c_out, kernel_size, padding=kernel_size // 2)
        self._setup(coeff, tol, max_iter)

    def _operator(self, weight, v, bias=None):
        return conv2d(v, weight, bias, padding=self.padding)

    def _adjoint(self, weight, u):
        return conv_transpose2d(u, weight, padding=self.padding)


def lip_swish(z, beta):
    """z sigmoid(beta z) / 1.1 elementwise, with slope in (-0.1, 1) for any beta > 0. Chen et al. 2019, section 3.3."""
    return z * torch.sigmoid(beta * z) / 1.1


class LipSwish(nn.Module):
    """lip_swish with a learnt beta = softplus(raw_beta) > 0: its curvature does not vanish where its slope is near 1."""

    def __init__(self, beta=0.5):
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(math.log(math.expm1(beta))))

    def forward(self, x):
        return lip_swish(x, softplus(self.raw_beta))


# Smooth activations of slope at most 1, to compare as in Chen et al. 2019, figure 4: where ELU and softplus are steepest they are
# straight (on a half-line), tanh is steepest at one point but saturates on both sides; LipSwish does neither.
ACTIVATIONS = {"LipSwish": LipSwish, "ELU": nn.ELU, "Softplus": nn.Softplus, "tanh": nn.Tanh}


def _contraction(make, sizes, lipschitz, activation):
    if not 0 < lipschitz < 1:
        raise ValueError(f"lipschitz must lie between 0 and 1 for a contraction, got {lipschitz}")
    layers = [make(*size, coeff=lipschitz ** (1 / len(sizes))) for size in sizes]
    return nn.Sequential(layers[0], *(m for layer in layers[1:] for m in (activation(), layer)))


def lipschitz_mlp(dim, hidden=(64, 64), lipschitz=0.9, activation=LipSwish):
    """A contraction g: (..., dim) -> (..., dim) with Lip(g) <= lipschitz, shared evenly by its SpectralLinear layers.

    `activation`: constructor of one with slope at most 1, see ACTIVATIONS.
    """
    return _contraction(SpectralLinear, list(pairwise((dim, *hidden, dim))), lipschitz, activation)


def lipschitz_convnet(channels, hidden=(32, 32), kernel_sizes=(3, 1, 3), lipschitz=0.9, activation=LipSwish):
    """A contraction g: (B, channels, H, W) to the same with Lip(g) <= lipschitz, of SpectralConv2d layers, as in
    Chen et al. 2019, appendix E; one kernel size a layer."""
    if len(kernel_sizes) != len(hidden) + 1:
        raise ValueError(f"kernel_sizes must have one entry more than hidden, got {len(kernel_sizes)} and {len(hidden)}")
    pairs = pairwise((channels, *hidden, channels))
    return _contraction(SpectralConv2d, [(*pair, k) for pair, k in zip(pairs, kernel_sizes)], lipschitz, activation)


# --- how many terms

class _Terms:
    """N = exact_terms + an integer from 0 on, so that P(N >= k) = 1 for k <= exact_terms."""

    def __init__(self, exact_terms):
        if exact_terms < 1:
            raise ValueError(f"exact_terms must be at least 1, got {exact_terms}")
        self.exact_terms = exact_terms

    def sample(self):
        """One N, an int >= 1, from torch's global generator."""
        return self.exact_terms + self._extra()

    def survival(self, k):
        """P(N >= k), a float."""
        return 1.0 if k <= self.exact_terms else self._tail(k - self.exact_terms)


class Geometric(_Terms):
    """The number of terms N = exact_terms + geometric from 0: P(N >= exact_terms + j) = (1 - p)^j.

    exact_terms + (1 - p) / p terms on average. The roulette's variance is finite if L^2 < 1 - p, so take p well under
    1 - L^2, whatever the number of exact terms. Chen et al. 2019, section 3.1.
    """

    def __init__(self, p, exact_terms=2):
        super().__init__(exact_terms)
        if not 0 < p < 1:
            raise ValueError(f"p must lie between 0 and 1, got {p}")
        self.p = p

    def _extra(self):
        # Tensor.geometric_ counts from 1, torch.distributions.Geometric from 0; float32 would cut the tail off.
        return int(torch.empty((), dtype=torch.float64, device="cpu").geometric_(self.p)) - 1

    def _tail(self, j):
        return (1 - self.p) ** j


class ShiftedPoisson(_Terms):
    """The number of terms N = exact_terms + Poisson(rate): P(N >= exact_terms + j) = P(Poisson(rate) >= j).

    exact_terms + rate terms on average. Its tail falls faster than any L^k, so the roulette is unbiased with an infinite
    variance for every L > 0 (unless J is nilpotent): rare, huge values. Prefer Geometric. Chen et al. 2019, appendix E.
    """

    def __init__(self, rate, exact_terms=2):
        super().__init__(exact_terms)
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.rate = torch.tensor(float(rate), dtype=torch.float64, device="cpu")

    def _extra(self):
        return int(torch.poisson(self.rate))

    def _tail(self, j):
        return torch.special.gammainc(torch.full_like(self.rate, j), self.rate).item()


# --- the series: x and v (B, ...), results (B,); g must treat each sample by itself

def residual_inverse(g, z, n_iter):
    """n_iter steps of x <- z - g(x) from x = z, towards the x with x + g(x) = z; the error shrinks by L a step.

    z and x of any shape that g takes. Behrmann et al. 2019, algorithm 1.
    """
    x = z
    for _ in range(n_iter):
        x = z - g(x)
    return x


def _linked(g, x):
    """x, made to carry a graph where it does not, and g(x); in no_grad mode too."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return x, g(x)


def _vjp(g_x, x, v):
    """v^T J, with a graph of its own in grad mode and without one under no_grad."""
    return torch.autograd.grad(g_x, x, v, retain_graph=True, create_graph=torch.is_grad_enabled())[0]


def _dot(a, b, event_dims=None):
    """The inner product of each sample; without event_dims, all dimensions but the first are the sample's."""
    return (a * b).flatten(-event_dims if event_dims else min(1, a.ndim - 1)).sum(-1)


def roulette_sum(delta, n, survival):
    """The single-sample estimate sum_{k=1..n} delta_k / P(N >= k) of the whole series, unbiased if n is drawn from N.

    `delta`: a function of k = 1, 2, ..., called in this order, or the sequence delta_1, delta_2, ...; `survival(k)` =
    P(N >= k). Chen et al. 2019, equation 5.
    """
    if n < 1:
        raise ValueError(f"the number of terms must be at least 1, got {n}")
    term = delta if callable(delta) else lambda k: delta[k - 1]
    return sum(term(k) / survival(k) for k in range(1, n + 1))


def _sums(g_x, x, v, n, survival):
    """The roulette's sums of (-1)^(k+1) / k v^T J^k and of (-1)^k v^T J^k, from the same n vjps, stacked (2, *x.shape)."""
    power = v

    def delta(k):
        nonlocal power
        power = _vjp(g_x, x, power)
        return (-1) ** k * torch.stack([-power / k, power])

    return roulette_sum(delta, n, survival)


def power_series_logdet(g, x, n_terms, v):
    """The series cut off after n_terms, sum_{k=1..n} (-1)^(k+1) / k v^T J^k v (nats): a biased estimate of log det(I + J).

    x and v (B, D) or (B, C, H, W), v of mean 0 and covariance I; the result (B,). Averaged over v its error is at most
    D L^(n+1) / ((n+1) (1 - L)). Behrmann et al. 2019, section 3.2 and theorem 3.
    """
    return russian_roulette_logdet(g, x, v, n_terms, lambda k: 1)


def russian_roulette_logdet(g, x, v, n, survival):
    """An unbiased estimate of log det(I + J) (nats): sum_{k=1..n} (-1)^(k+1) / k v^T J^k v / P(N >= k), n drawn from N.

    x, v and the result as in power_series_logdet; survival(k) = P(N >= k). Unbiased for log p(x), hence not for p(x).
    Its gradient by autograd is unbiased too, with memory that grows with n. Chen et al. 2019, theorem 1.
    """
    x, g_x = _linked(g, x)
    return _dot(_sums(g_x, x, v, n, survival)[0], v)


def neumann_gradient(g, x, v, n, survival):
    """A surrogate (B,) whose gradient, in x and in g's parameters, is an unbiased estimate of that of log det(I + J).

    (sum_{k=0..n} (-1)^k / P(N >= k) v^T J^k) J v, where the bracket is held constant, so memory does not grow with n.
    Its value means nothing. One number a sample, so any weighting of the samples is right. Chen et al. 2019, theorem 2.
    """
    x, g_x = _linked(g, x)
    with torch.no_grad():
        left = v + _sums(g_x, x, v, n, survival)[1]
    return _dot(_vjp(g_x, x, left), v)


# --- the layer

_TOO_STEEP = "Residual: g must be contractive (Lipschitz constant below 1, as lipschitz_mlp makes it), but"


class _Implicit(torch.autograd.Function):
    """The identity; backward turns the gradient v in x into solve(v)."""

    @staticmethod
    def forward(ctx, x, solve):
        ctx.solve = solve
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, v):
        return ctx.solve(v), None


class Residual(Transform):
    """z = x + g(x) for a contraction g, with ldj = log det(I + J), J = dg/dx.

    x (..., D), or exactly (B, C, H, W) with event_dims=3; `g` keeps the shape, treats each sample by itself, and is called
    g(x, context) if there is a context (it must contract in x). `logdet` says how ldj (nats) is found:
    - "exact": D vjps and a determinant, for small D; the only one with `exact` = True;
    - "series": the first n_terms terms with one noise vector, biased;
    - "roulette": unbiased, one noise vector and one N from `terms` for the whole batch (Chen et al. 2019, theorem 1). Its
      `gradient` is "neumann" (theorem 2, memory that does not grow with N) or "autograd" (through the sum).
    `noise`: "gaussian" or "rademacher".

    The inverse iterates x <- z - g(x) until |step| L / (1 - L), which bounds the error, is at most tol (1 + |x|) (default tol
    10 eps), or until rounding stops it; L is `lipschitz`, or else the largest rate at which the steps were seen to
    shrink. It is differentiable (once) in z and in g's parameters by the implicit function theorem: dx = (I + J)^-1 (dz - dg).
    Raises FloatingPointError if max_iter steps are not enough or if det(I + J) <= 0: then g does not contract.
    Behrmann et al. 2019, sections 2 and 3.
    """

    def __init__(self, g, logdet="exact", gradient="neumann", noise="gaussian", terms=Geometric(0.1), n_terms=10, event_dims=1,
                 lipschitz=None, tol=None, max_iter=2000):
        super().__init__()
        allowed = {"logdet": ("exact", "series", "roulette"), "gradient": ("neumann", "autograd"),
                   "noise": ("gaussian", "rademacher"), "event_dims": (1, 3)}
        for (name, values), value in zip(allowed.items(), (logdet, gradient, noise, event_dims)):
            if value not in values:
                raise ValueError(f"{name} must be one of {values}, got {value!r}")
        if lipschitz is not None and not 0 <= lipschitz < 1:
            raise ValueError(f"lipschitz must lie in [0, 1) or be None, got {lipschitz}")
        self.g, self.logdet, self.gradient, self.noise, self.terms, self.n_terms = g, logdet, gradient, noise, terms, n_terms
        self.event_dims, self.lipschitz, self.tol, self.max_iter = event_dims, lipschitz, tol, max_iter

    @property
    def exact(self):
        return self.logdet == "exact"

    def _check(self, x, name):
        check_input(x, name)
        if self.event_dims == 3 and x.ndim != 4:
            raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}")

    def _g(self, x, context):
        out = self.g(x, *given(context))
        if getattr(out, "shape", None) != x.shape:
            raise ValueError(f"g must return a tensor of its input's shape {tuple(x.shape)}, got "
                             f"{tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__}")
        return out

    def _norm(self, x):
        return torch.linalg.vector_norm(x, dim=tuple(range(-self.event_dims, 0)), keepdim=True)

    def forward(self, x, context=None):
        self._check(x, "x")
        linked, g_x = _linked(lambda x: self._g(x, context), x)
        return x + g_x, self._exact_ldj(g_x, linked) if self.exact else self._estimate(g_x, linked)

    def _exact_ldj(self, g_x, x):
        event = x.shape[-self.event_dims:]
        eye = torch.eye(event.numel(), dtype=x.dtype, device=x.device)
        rows = [_vjp(g_x, x, e.reshape(event).expand_as(x)).flatten(-self.event_dims) for e in eye]
        sign, ldj = torch.linalg.slogdet(eye + torch.stack(rows, -2))
        bad = (sign <= 0) & ~ldj.isnan()
        if bad.any():
            raise FloatingPointError(f"{_TOO_STEEP} det(I + J) <= 0 at {int(bad.sum())} of {bad.numel()} points")
        return ldj

    def _estimate(self, g_x, x):
        v = torch.randn_like(x) if self.noise == "gaussian" else torch.empty_like(x).bernoulli_() * 2 - 1
        series = self.logdet == "series"
        n, survival = (self.n_terms, lambda k: 1) if series else (self.terms.sample(), self.terms.survival)
        through_sum = series or self.gradient == "autograd"
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_sum):
            total, left = _sums(g_x, x, v, n, survival)
            value = _dot(total, v, self.event_dims)
        if through_sum or not torch.is_grad_enabled():
            return value
        surrogate = _dot(_vjp(g_x, x, v + left), v, self.event_dims)
        return value + (surrogate - surrogate.detach())

    def inverse(self, z, context=None):
        self._check(z, "z")
        check_finite("Residual", z, z=z)
        with torch.no_grad():
            x = self._fixed_point(lambda x: z - self._g(x, context), z, lambda x: 1 + self._norm(x))
        if not torch.is_grad_enabled():
            return x
        linked, g_x = _linked(lambda x: self._g(x, context), x)

        def solve(v):
            # w^T (I + J) = v^T is the same kind of fixed point, w = v - J^T w, and contracts as fast.
            check_finite("Residual, backward through the inverse", v, gradient=v)
            return self._fixed_point(lambda w: v - _vjp(g_x, linked, w), v, lambda w: self._norm(v))

        # Adds zero to the value, and dz - dg at a fixed x to the gradient.
        return _Implicit.apply(x + (z - z.detach()) - (g_x - g_x.detach()), solve)

    def _fixed_point(self, f, x, scale):
        """The x with x = f(x), each sample to the tolerance times its scale(x)."""
        info = torch.finfo(x.dtype)
        tol = 10 * info.eps if self.tol is None else self.tol
        rate = x.new_full((), self.lipschitz or 0)
        last, done = None, torch.zeros_like(self._norm(x), dtype=torch.bool)
        for _ in range(self.max_iter):
            new = f(x)
            step, size = self._norm(new - x), scale(new)
            # A sample that has arrived stays, so that what it gets does not depend on the rest of its batch.
            x = torch.where(done, x, new)
            if last is not None:
                rate = torch.maximum(rate, step / last.clamp_min(info.tiny)) if self.lipschitz is None else rate
                # The steps of a contraction shrink for as long as they are more than rounding.
                rounding = (step >= last) & (step <= 100 * info.eps * size)
                done = done | (step * rate <= tol * size * (1 - rate)) | rounding
            last = step
            if done.all():
                return x
        raise FloatingPointError(f"{_TOO_STEEP} the fixed point of its inverse or gradient has not settled at "
                                 f"{int((~done).sum())} of {done.numel()} points after {self.max_iter} steps")
