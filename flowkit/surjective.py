"""Layers that lose something on the way: what one direction forgets, the other draws, and log p pays for the draw.

    log p(x) >= E[log p(z) + contribution],     contribution = log p(x | z) - log q(z | x),     z ~ q(z | x)

A generative surjection has x = f(z): its forward draws z, the contribution is -log q(z | x), and log p is bounded
from below (Slice, Argmax, the dequantizers). An inference surjection has z = f(x): its inverse draws x, the
contribution is log p(x | z), and log p is exact (Split, Abs, Max, Sort). A stochastic layer draws both ways and
pays both terms (VAELayer). The mean of exp(log p(z) + contribution) is p(x) in every case. All in nats.

Nielsen et al. 2020, "SurVAE Flows", tables 1 and 2; argmax: Hoogeboom et al. 2021, "Argmax Flows", section 3.
"""
import math

import torch
from torch.nn.functional import logsigmoid, softplus

from .core import Transform, check_finite, check_input, given


def check_classes(x, levels, name="x"):
    """Raise one sentence unless `x` is of integer dtype with values in 0 .. levels - 1 (any, if `levels` is None)."""
    if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        got = f"dtype {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of integer dtype, such as torch.long, got {got}")
    if levels is not None and x.numel() and not (0 <= x.min() and x.max() < levels):
        raise ValueError(f"{name} must hold integers in 0 .. {levels - 1}, got values from {x.min()} to {x.max()}")


def draw(distribution):
    """One draw of a torch.distributions object and its log-probability (nats), reparameterised where the distribution can.

    Turns a conditional distribution into a proposal: `q = lambda x: draw(encoder(x))`.
    """
    sample = distribution.rsample() if getattr(distribution, "has_rsample", False) else distribution.sample()
    return sample, distribution.log_prob(sample)


def propose(q, x, context=None, batch=None):
    """Call a proposal `q(x) -> (sample, log_q)`; raise one sentence unless log_q has the shape `batch` and sample starts with it.

    If `batch` is None, log_q may have any leading part of x's shape.
    """
    sample, log_q = q(x, *given(context))
    batch = tuple(x.shape[:log_q.ndim]) if batch is None else tuple(batch)
    if log_q.shape != batch or sample.shape[:len(batch)] != batch:
        raise ValueError(f"q must return (sample, log_q) that both start with the batch {batch} and log_q no more than that, "
                         f"for x of shape {tuple(x.shape)}, got shapes {tuple(sample.shape)} and {tuple(log_q.shape)}")
    return sample, log_q


def _joint(distribution, name, batch, event):
    """The distribution, expanded to the batch; raise one sentence unless each of its draws is a whole event."""
    if distribution.event_shape != event or distribution.batch_shape not in ((), batch):
        raise ValueError(f"{name} must return a distribution of batch_shape {tuple(batch)} and event_shape {tuple(event)}, got "
                         f"{tuple(distribution.batch_shape)} and {tuple(distribution.event_shape)}; "
                         "torch.distributions.Independent(p, 1) makes the last dimension the event")
    return distribution if distribution.batch_shape == batch else distribution.expand(batch)


class Bound(Transform):
    """What the layers have in common whose forward draws z ~ q(z | x): log p(z) + contribution is a lower bound in the mean.

    They have no inverse_and_ldj, since the z that sampling starts from is no draw of q(z | x): there the same
    expression lies *above* log p(x) in the mean. For a bound on a sample's log p, call forward on the sample.
    """
    bijective, exact = False, False

    def inverse_and_ldj(self, z, context=None):
        raise NotImplementedError(f"{type(self).__name__} has no inverse_and_ldj, because at a z that is not drawn from q(z | x) "
                                  "the contribution gives no lower bound; call inverse, then forward on the result")


class Slice(Bound):
    """Append drawn coordinates: z = (x, z2) with z2 ~ q(. | x); the inverse drops them, x = z[..., :keep].

    contribution = -log q(z2 | x), a lower bound in the mean, tight for q = p(z2 | x). A generative surjection: many z
    to one x, and the inverse draws nothing. `q(x)`, or q(x, context), gives z2 (..., D - keep) and log_q (...,); x
    (..., keep), z (..., D). As the first layer of a flow this *is* the augmented flow. Raises ValueError for a q of other shapes.

    SurVAE, section 3 (tensor slicing); Huang et al. 2020, "Augmented Normalizing Flows"; Chen et al. 2020, "VFlow".
    """
    surjective = True

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x, context=None):
        check_input(x, dim=self.keep)
        z2, log_q = propose(self.q, x, context, x.shape[:-1])
        return torch.cat([x, z2], -1), -log_q

    def inverse(self, z, context=None):
        check_input(z, "z", at_least=self.keep)
        return z[..., :self.keep]


class Split(Transform):
    """Drop coordinates: z = x[..., :keep]; the inverse draws the rest ~ p(. | z).

    contribution = log p(rest | z), exact (the chain rule). An inference surjection: many x to one z. `p(z)`, or p(z,
    context), gives a torch.distributions object with event (D - keep,); x (..., D), z (..., keep). Raises ValueError
    if its shapes are others.

    SurVAE, section 3 (tensor slicing, in the inference direction); the multi-scale flow of Dinh et al. 2017, section 3.6.
    """
    bijective, surjective = False, True

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x, context=None):
        check_input(x, at_least=self.keep + 1)
        z, rest = x[..., :self.keep], x[..., self.keep:]
        return z, _joint(self.p(z, *given(context)), "p", z.shape[:-1], rest.shape[-1:]).log_prob(rest)

    def inverse(self, z, context=None):
        check_input(z, "z", self.keep)
        p = self.p(z, *given(context))
        return torch.cat([z, draw(_joint(p, "p", z.shape[:-1], p.event_shape[-1:] or ("D - keep",)))[0]], -1)


class Abs(Transform):
    """Forget the signs: z = |x|; the inverse draws them, + with probability sigmoid(log_odds(z)), or 1/2 if that is None.

    contribution = sum_i log p(sign x_i | z), exact; -log 2 a dimension if uniform. An inference surjection: 2^D x to one
    z, so the base must live on z >= 0 (a half-normal, say). `log_odds`: (..., D) -> (..., D). Raises ValueError for a negative z.

    SurVAE, section 3.1 (absolute value surjection).
    """
    bijective, surjective = False, True

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds

    def _log_odds(self, z, context):
        return torch.zeros_like(z) if self.log_odds is None else self.log_odds(z, *given(context))

    def forward(self, x, context=None):
        check_input(x)
        z = x.abs()
        log_odds = self._log_odds(z, context)
        return z, logsigmoid(torch.where(x >= 0, log_odds, -log_odds)).sum(-1)

    def inverse(self, z, context=None):
        check_input(z, "z")
        if (z < 0).any():
            raise ValueError(f"z must be an absolute value, so not negative, got {z.min().item():.3g}; choose a base on z >= 0")
        return torch.where(torch.rand_like(z) < torch.sigmoid(self._log_odds(z, context)), z, -z)


class Max(Transform):
    """Keep the largest coordinate: z = max_i x_i; the inverse draws its place k uniformly, x_k = z, and x_i = z - e_i elsewhere.

    contribution = -log D + sum_{i != k} log excess(z - x_i), exact. An inference surjection: many x to one z. `excess`:
    a torch.distributions object of one positive number (with batch_shape (D,) if the coordinates differ, then e_i
    has the i-th). `dim`: D, which only the inverse needs, and only if excess does not tell it. x (..., D), z (..., 1).

    SurVAE, section 3.1 (max surjection).
    """
    bijective, surjective = False, True

    def __init__(self, excess, dim=None):
        super().__init__()
        if len(excess.event_shape) > 0 or len(excess.batch_shape) > 1:
            raise ValueError("excess must be a distribution of single numbers, one for all coordinates or one for each, got "
                             f"batch_shape {tuple(excess.batch_shape)} and event_shape {tuple(excess.event_shape)}")
        self.excess, self.dim = excess, excess.batch_shape[0] if excess.batch_shape else dim

    def forward(self, x, context=None):
        check_input(x, dim=self.dim)
        z, k = x.max(-1, keepdim=True)
        # The largest has no excess: the mean, a value inside the support, stands in for it, and is then left out.
        stand_in = torch.ones_like(x) * self.excess.mean.to(x)
        is_max = torch.zeros_like(x, dtype=torch.bool).scatter(-1, k, True)
        log_excess = self.excess.log_prob(torch.where(is_max, stand_in, z - x))
        return z, log_excess.masked_fill(is_max, 0).sum(-1) - math.log(x.shape[-1])

    def inverse(self, z, context=None):
        check_input(z, "z", 1)
        if self.dim is None:
            raise ValueError("dim must be given, as Max(excess, dim), to sample x (..., dim) from z (..., 1), got None")
        excess = self.excess.expand((*z.shape[:-1], self.dim))
        k = torch.randint(self.dim, z.shape, device=z.device)
        return z - draw(excess)[0].to(z).scatter(-1, k, 0)


class Sort(Transform):
    """Forget the order: z = sort(x), ascending; the inverse draws a permutation, all D! equally likely.

    contribution = -log D!, exact. An inference surjection: D! x to one z, so the base must live on sorted vectors, and
    the density of x is one of exchangeable coordinates. x and z (..., D). Raises ValueError for a z that is not sorted.

    SurVAE, section 3.1 (sort surjection).
    """
    bijective, surjective = False, True

    def forward(self, x, context=None):
        check_input(x)
        return x.sort(-1).values, x.new_full(x.shape[:-1], -math.lgamma(x.shape[-1] + 1))

    def inverse(self, z, context=None):
        check_input(z, "z")
        if (z.diff(dim=-1) < 0).any():
            raise ValueError("z must be sorted in ascending order, got a row that is not; choose a base on sorted vectors")
        return z.gather(-1, torch.rand_like(z).argsort(-1))


class Argmax(Bound):
    """Lift classes to vectors: z ~ q(z | x) with argmax z = x; the inverse takes the argmax.

    v, log_q = q(x) is free, v (..., K), and is bent under its x-th coordinate: z_x = v_x, z_i = v_x - softplus(v_x - v_i). So
    contribution = -log q(z | x) = -log_q + sum_{i != x} log sigmoid(v_x - v_i), a lower bound in the mean. A generative
    surjection: many z to one x, and the inverse draws nothing. x: integer classes (...), z: (..., K). log_q has x's shape
    or a leading part of it, and so has the contribution: a q on whole sequences x (B, D) gives (B,). Raises TypeError
    for float x and ValueError for classes beyond K.

    Hoogeboom et al. 2021, "Argmax Flows and Multinomial Diffusion", section 3 (thresholding by a softplus).
    """
    surjective = True

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x, context=None):
        check_classes(x, None)
        v, log_q = propose(self.q, x, context)
        if v.shape[:-1] != x.shape:
            raise ValueError(f"q must return v of shape {(*x.shape, 'K')} for x of shape {tuple(x.shape)}, got {tuple(v.shape)}")
        check_classes(x, v.shape[-1])
        index = x.long()[..., None]
        is_x = torch.zeros_like(v, dtype=torch.bool).scatter(-1, index, True)
        top = v.gather(-1, index)
        z = top - softplus(top - v)
        # Where the softplus is below rounding, the next number below top keeps the argmax, and z keeps its gradient.
        below = torch.nextafter(top.detach(), top.new_tensor(-math.inf))
        z = torch.where(is_x, top, z + (torch.minimum(z, below) - z).detach())
        log_slope = logsigmoid(top - v).masked_fill(is_x, 0)
        return z, log_slope.sum(tuple(range(log_q.ndim, v.ndim))) - log_q

    def inverse(self, z, context=None):
        check_input(z, "z")
        # An integer hides what was not finite, so it is looked for here.
        check_finite("Argmax", z, z=z)
        return z.argmax(-1)


class VAELayer(Bound):
    """A variational autoencoder as one layer: forward draws z ~ encoder(x), the inverse x ~ decoder(z).

    contribution = log p(x | z) - log q(z | x), a lower bound in the mean (the ELBO, with the rest of the flow as prior), equal
    to log p(x) for the exact posterior. Stochastic both ways. `encoder(x)` and `decoder(z)`, called with the context too if
    there is one, give torch.distributions objects whose event is a whole z and a whole x, of any rank. Raises ValueError else.

    SurVAE, table 1, "stochastic"; Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 2.2.
    """
    stochastic = True

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x, context=None):
        q = self.encoder(x, *given(context))
        z, log_q = draw(q)
        p = self.decoder(z, *given(context))
        batch = x.shape[:x.ndim - len(p.event_shape)]
        _joint(q, "encoder", batch, z.shape[len(batch):])
        return z, _joint(p, "decoder", batch, x.shape[len(batch):]).log_prob(x) - log_q

    def inverse(self, z, context=None):
        return draw(self.decoder(z, *given(context)))[0]
