"""A flow is a base distribution and a transform, and one equation holds them together (everything in nats):

    log p(x) = log p(z) + contribution,        z, contribution = transform(x)

Data are x, latents are z; `forward` goes from data to latent and `inverse` samples. For a bijection the
contribution is ldj = log|det dz/dx|, with that sign in every method and in both directions. A layer that is
stochastic from data to latent returns a one-sample estimate instead, whose expectation is a lower bound.

Rezende & Mohammed 2015, "Variational Inference with Normalizing Flows", section 3.1; the common contract for
bijective, surjective and stochastic layers: Nielsen et al. 2020, "SurVAE Flows", table 1.
"""
import math

import torch
from torch import nn


def check_input(x, name="x", dim=None, at_least=1):
    """Raise one sentence unless `x` is a floating-point tensor (..., dim); used by every vector layer."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {x.dtype}")
    if x.ndim == 0 or x.shape[-1] < at_least or (dim is not None and x.shape[-1] != dim):
        wanted = f"{dim}" if dim is not None else f"D >= {at_least}"
        raise ValueError(f"{name} must have shape (..., D) with {'D = ' * (dim is not None)}{wanted}, got {tuple(x.shape)}")


def all_finite(*tensors):
    """Whether all numbers are finite: a sum is finite only if its terms are, and one that overflowed is looked at term by term."""
    return all(torch.isfinite(t.detach().sum()) or torch.isfinite(t).all() for t in tensors)


def check_finite(layer, before, **after):
    """Raise FloatingPointError, naming the layer, unless every tensor of `after` is finite."""
    for name, value in after.items():
        if not all_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            cause = "" if torch.isfinite(before).all() else "; its input was not finite already"
            raise FloatingPointError(f"{layer}: {name} has {bad} non-finite values out of {value.numel()}{cause}")


def given(context):
    """The arguments that hand on a context: none if there is none, so a net that needs none is called net(x)."""
    return () if context is None else (context,)


class Transform(nn.Module):
    """What all layers have in common: z, ldj = forward(x) and x = inverse(z).

    The flags say what a layer is: `bijective`, `surjective` (many x to one z, or the reverse) or `stochastic`;
    `exact` is False where `ldj` is only an estimate, so that its flow gives a bound and not a likelihood.
    Vector layers take x (..., D) and return z (..., D) and ldj (...,), in nats, of x's dtype and device. A layer writes
    forward and one of the two inverses; the other follows.
    """
    bijective, surjective, stochastic, exact = True, False, False, True

    def forward(self, x, context=None):
        """Data to latent: z and ldj = log|det dz/dx|."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z, context=None):
        """Latent to data: the x with forward(x) = z, differentiable."""
        if type(self).inverse_and_ldj is Transform.inverse_and_ldj:
            raise NotImplementedError(f"{type(self).__name__} has no inverse")
        return self.inverse_and_ldj(z, context)[0]

    def inverse_and_ldj(self, z, context=None):
        """x = inverse(z) and, still from data to latent, ldj = log|det dz/dx| there; a layer that can, does both in one pass."""
        x = self.inverse(z, context)
        return x, self.forward(x, context)[1]


class Compose(Transform):
    """Run transforms one after the other: z = f_T(... f_1(x)), ldj = sum of the steps' ldj (chain rule).

    `transforms`: modules with forward(x) -> (z, ldj) and inverse(z) -> x, listed from data to latent; it is exact if
    all of them are. A step whose result is not finite raises FloatingPointError with its number and name.
    """

    def __init__(self, transforms):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        if len(self.transforms) == 0:
            raise ValueError("transforms must hold at least one transform, got an empty list")
        self.bijective = all(getattr(t, "bijective", True) for t in self.transforms)
        self.surjective = any(getattr(t, "surjective", False) for t in self.transforms)
        self.stochastic = any(getattr(t, "stochastic", False) for t in self.transforms)

    @property
    def exact(self):
        return all(getattr(t, "exact", True) for t in self.transforms)

    def __len__(self):
        return len(self.transforms)

    def __iter__(self):
        return iter(self.transforms)

    def __getitem__(self, index):
        return Compose(self.transforms[index]) if isinstance(index, slice) else self.transforms[index]

    def _name(self, i):
        return f"step {i} ({type(self.transforms[i]).__name__})"

    def _find_fault(self, run, name, x, context):
        """Go through the steps again, up to the one whose result is not finite, and raise in its name."""
        for i, transform in enumerate(self.transforms) if name == "z" else reversed(list(enumerate(self.transforms))):
            before = x
            x, ldj = run(transform)(x, *given(context))
            check_finite(self._name(i), before, **{name: x, "ldj": ldj})
        raise FloatingPointError(f"Compose: {name} had non-finite values, which did not come again in a second run")

    def forward(self, x, context=None):
        z, total = x, 0
        for transform in self.transforms:
            z, ldj = transform(z, *given(context))
            total = total + ldj
        # One look at the end, since a check at each step would cost a training step 6%; the steps only if it fails.
        if not all_finite(z, total):
            self._find_fault(lambda transform: transform, "z", x, context)
        return z, total

    def inverse(self, z, context=None):
        x = z
        for transform in reversed(self.transforms):
            x = transform.inverse(x, *given(context))
        if not all_finite(x):
            self._find_fault(lambda transform: lambda z, *c: (transform.inverse(z, *c), torch.zeros(())), "x", z, context)
        return x

    def inverse_and_ldj(self, z, context=None):
        x, total = z, 0
        for transform in reversed(self.transforms):
            x, ldj = transform.inverse_and_ldj(x, *given(context))
            total = total + ldj
        if not all_finite(x, total):
            self._find_fault(lambda transform: transform.inverse_and_ldj, "x", z, context)
        return x, total


class Inverse(Transform):
    """Turn a bijection round: its inverse becomes forward, so ldj changes sign (IAF is the Inverse of MAF)."""

    def __init__(self, transform):
        super().__init__()
        if not getattr(transform, "bijective", True):
            raise ValueError(f"transform must be bijective to be turned round, got {type(transform).__name__}")
        self.transform = transform

    @property
    def exact(self):
        return getattr(self.transform, "exact", True)

    def forward(self, x, context=None):
        z, ldj = self.transform.inverse_and_ldj(x, *given(context))
        return z, -ldj

    def inverse(self, z, context=None):
        return self.transform(z, *given(context))[0]

    def inverse_and_ldj(self, z, context=None):
        x, ldj = self.transform(z, *given(context))
        return x, -ldj


class StandardNormal(nn.Module):
    """N(0, I) on vectors (or on any event shape): log p(z) = -(|z|^2 + D log 2 pi) / 2.

    A module, so that a flow's `.to(device)` or `.double()` moves its samples too. `sample` gives (n, D), `log_prob` (n,).
    """

    def __init__(self, *event_shape):
        super().__init__()
        self.event_shape, self.batch_shape = torch.Size(event_shape), torch.Size()
        self.register_buffer("origin", torch.zeros(self.event_shape), persistent=False)

    def sample(self, sample_shape=()):
        return torch.randn((*sample_shape, *self.event_shape), dtype=self.origin.dtype, device=self.origin.device)

    def log_prob(self, z):
        event = tuple(range(-len(self.event_shape), 0))
        return -0.5 * (z ** 2 + math.log(2 * math.pi)).sum(event)


class Flow(nn.Module):
    """A base distribution seen through a transform: log p(x) = log p(z) + ldj, in nats.

    `base`: a StandardNormal, or a torch.distributions object whose event is one whole point (wrap scalars in
    `Independent(..., 1)`). `log_prob` of a flow that is not `exact` is a random estimate of a lower bound; it is
    given only to those who ask for it with `bound=True`.
    """

    def __init__(self, base, transform):
        super().__init__()
        if len(base.event_shape) == 0 or len(base.batch_shape) > 0:
            raise ValueError("base must have a whole point as its event and no batch, got event_shape "
                             f"{tuple(base.event_shape)} and batch_shape {tuple(base.batch_shape)}; "
                             "torch.distributions.Independent(base, 1) joins the coordinates")
        self.base, self.transform = base, transform

    @property
    def exact(self):
        return getattr(self.transform, "exact", True)

    def _ask(self, bound):
        if not (self.exact or bound):
            raise ValueError("this flow's log_prob is an estimate of a lower bound, not a likelihood; "
                             "pass bound=True to get it")

    def _check_finite(self, before, **after):
        if not isinstance(self.transform, Compose):     # which has looked, and knows the step
            check_finite(type(self.transform).__name__, before, **after)

    def log_prob(self, x, context=None, bound=False):
        """log p(x) in nats, shape x.shape without the event."""
        self._ask(bound)
        z, ldj = self.transform(x, *given(context))
        self._check_finite(x, z=z, ldj=ldj)
        return self.base.log_prob(z) + ldj

    @torch.no_grad()
    def sample(self, n, context=None):
        """`n` points (n, D), without gradients; `sample_and_log_prob` has them."""
        z = self.base.sample((n,))
        x = self.transform.inverse(z, *given(context))
        self._check_finite(z, x=x)
        return x

    def sample_and_log_prob(self, n, context=None, bound=False):
        """`n` points and their log p(x), in one pass from latent to data; differentiable (reparameterised)."""
        self._ask(bound)
        z = self.base.rsample((n,)) if getattr(self.base, "has_rsample", False) else self.base.sample((n,))
        x, ldj = self.transform.inverse_and_ldj(z, *given(context))
        self._check_finite(z, x=x, ldj=ldj)
        return x, self.base.log_prob(z) + ldj
