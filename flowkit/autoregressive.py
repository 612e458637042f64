"""Autoregressive flows: each coordinate is bent by a scalar map whose parameters come from the coordinates before it.

    z_i = map(x_i; net(x)_i),   net(x)_i a function of x_1 .. x_{i-1}

The Jacobian is triangular, so ldj is the sum of the map's log-slopes. Density takes one evaluation of the net; sampling has to
fill the coordinates one after the other, D evaluations. Turned round (`Inverse`), the cheap direction is sampling.

MAF: Papamakarios et al. 2017, section 3.1. IAF: Kingma et al. 2016, section 3. NAF: Huang et al. 2018, section 3.
Any number of coordinates a pass and any shape of points: see nets.py for the conditioners.
"""
import torch
from torch import nn

from .core import Inverse, Transform, check_input, given
from .elementwise import DSF, Affine
from .surjective import check_classes


class Autoregressive(Transform):
    """z_i = map(x_i; net(x)_i) and ldj = sum_i log-slope_i, for any autoregressive net and any scalar map.

    `net`: points to P parameters a coordinate in blocks, P = map.num_params; (..., D) -> (..., P D) for vectors. It may
    say `event_dims` (2 for (B, C, L), 3 for (B, C, H, W); default 1) and `passes(shape)`, the groups of coordinates in
    the order of sampling (default: one by one, as they stand). The inverse evaluates the net once a group and solves for
    that group alone; MADE does all its D turns at about the cost of one. Raises ValueError for a net whose output has
    another size. Whether the net is autoregressive is not looked at.
    """

    def __init__(self, net, map=Affine()):
        super().__init__()
        self.net, self.map = net, map
        self.event_dims = getattr(net, "event_dims", 1)

    def _flat(self, x, name):
        check_input(x, name)
        return x if self.event_dims == 1 else x.flatten(-self.event_dims)

    def _params(self, x, name, context):
        """(..., P d) for x (..., d) flattened."""
        params = self.net(x, *given(context))
        where = x.ndim - self.event_dims       # the dimension of coordinates or channels, in which the P blocks lie
        wanted = (*x.shape[:where], self.map.num_params * x.shape[where], *x.shape[where + 1:])
        if getattr(params, "shape", None) != wanted:
            got = getattr(params, "shape", None)
            raise ValueError(f"net must return a tensor of shape {wanted} for {name} of shape {tuple(x.shape)}, "
                             f"got {type(params).__name__ if got is None else tuple(got)}")
        return params if self.event_dims == 1 else params.flatten(-self.event_dims)

    def forward(self, x, context=None):
        flat = self._flat(x, "x")
        z, log_slope = self.map.forward(flat, self._params(x, "x", context))
        return z.reshape(x.shape), log_slope.sum(-1)

    def inverse_and_ldj(self, z, context=None):
        flat = self._flat(z, "z")
        if hasattr(self.net, "unroll"):
            if context is not None:
                context = context.expand(*flat.shape[:-1], context.shape[-1]).reshape(-1, context.shape[-1])
            x, ldj = self._unrolled(flat.reshape(-1, flat.shape[-1]), context)
        else:
            x, ldj = self._in_passes(flat, z.shape, context)
        return x.reshape(z.shape), ldj.reshape(flat.shape[:-1])

    def _in_passes(self, z, shape, context):
        event = shape[len(shape) - self.event_dims:]
        groups = self.net.passes(event) if hasattr(self.net, "passes") else [[i] for i in range(z.shape[-1])]
        x, ldj = torch.zeros_like(z), 0
        for group in groups:
            params = self._params(x.reshape(shape), "z", context).unflatten(-1, (self.map.num_params, -1))[..., group].flatten(-2)
            found, log_slope = self.map.inverse(z[..., group], params)
            x = x.index_copy(-1, torch.tensor(group, device=x.device), found)
            ldj = ldj + log_slope.sum(-1)
        return x, ldj

    def _unrolled(self, z, context):
        turns, x, found, ldj = self.net.unroll(z, context), {}, None, 0
        for _ in range(z.shape[-1]):
            i, params = turns.send(found)
            found, log_slope = self.map.inverse(z[:, i:i + 1], params)
            x[i], ldj = found, ldj + log_slope[:, 0]
        return torch.cat([x[i] for i in range(z.shape[-1])], -1), ldj


class MAF(Autoregressive):
    """Masked autoregressive flow: z_i = x_i exp(alpha_i) + mu_i; one pass for density, D for sampling. net (..., D) ->
    (..., 2 D).

    The lecture's other affine form is Autoregressive(net, GatedAffine()); MADE MoG is Autoregressive(net, MixGaussianCDF(K)).
    """

    def __init__(self, net):
        super().__init__(net, Affine())


class IAF(Inverse):
    """Inverse autoregressive flow: x_i = z_i exp(alpha_i) + mu_i with net(z); one pass for sampling, D for density."""

    def __init__(self, net):
        super().__init__(MAF(net))


class NAF(Autoregressive):
    """Neural autoregressive flow with a deep sigmoidal flow of K components a coordinate: net (..., D) -> (..., 3 K D).

    Its dense form is Autoregressive(net, DDSF(widths)).
    """

    def __init__(self, net, components):
        super().__init__(net, DSF(components))


class CategoricalPixels(nn.Module):
    """Integer images pixel after pixel, P(x) = prod_i softmax(net(x)_i)[x_i]: the autoregressive model itself, without a flow.

    x (B, C, H, W) of levels 0 .. levels - 1; `net`: an autoregressive net with `levels` parameters a coordinate, such as
    PixelCNN(C, levels), which sees 2 x / (levels - 1) - 1; `shape`: (C, H, W). log_prob (B,), in nats, takes one pass, a sample
    len(net.passes(shape)). Raises TypeError for floats and ValueError for other levels. Van den Oord et al. 2016,
    "Pixel Recurrent Neural Networks", section 2.
    """
    exact = True

    def __init__(self, net, shape, levels):
        super().__init__()
        self.net, self.shape, self.levels = net, tuple(shape), levels

    def _log_probs(self, x):
        """The logarithms of all levels' probabilities, (B, levels, C, H, W)."""
        weight = next(self.net.parameters())
        out = self.net(x.to(weight) / ((self.levels - 1) / 2) - 1)
        return torch.log_softmax(out.unflatten(1, (self.levels, -1)), 1)

    def log_prob(self, x):
        check_classes(x, self.levels)
        return self._log_probs(x).gather(1, x[:, None]).flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, n):
        """`n` images (n, C, H, W), long."""
        x = torch.zeros(n, *self.shape, dtype=torch.long, device=next(self.net.parameters()).device)
        for group in self.net.passes(self.shape):
            p = self._log_probs(x).flatten(2)[..., group].exp()
            x.flatten(1)[:, group] = torch.multinomial(p.movedim(1, -1).flatten(0, 1), 1).reshape(n, -1)
        return x
