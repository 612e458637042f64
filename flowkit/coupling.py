"""Coupling: one half of the vector passes unchanged and says how the other half is bent, coordinate by coordinate.

The Jacobian is block triangular, so its log-determinant is the sum of log-slopes, and the inverse needs no
inverse of the net. NICE shifts (Dinh et al. 2015, section 3.2), RealNVP is affine (Dinh et al. 2017, section 3.2),
Flow++ uses a mixture CDF (Ho et al. 2019, section 3.2); here they differ in the scalar map alone.
"""
import torch

from .core import Transform, check_input, given
from .elementwise import Affine, MixLogitCDF, Shift
from .nets import MLP


class Coupling(Transform):
    """z1 = x1, z2 = map(x2; net(x1)); ldj = sum of the map's log-slopes over x2.

    x (..., D) is cut after its first d = D // 2 coordinates. `net`: (..., d) -> (..., P (D - d)), with P = map.num_params
    and the layout of elementwise.py (blocks alpha, mu for the affine map), called net(x1, context) if there is a context.
    Raises ValueError for D < 2 and for a net whose output has another shape.
    """

    def __init__(self, net, map=Affine()):
        super().__init__()
        self.net, self.map = net, map

    def _halves(self, x, name, context):
        check_input(x, name, at_least=2)
        first, second = x.tensor_split([x.shape[-1] // 2], -1)
        params = self.net(first, *given(context))
        wanted = (*second.shape[:-1], self.map.num_params * second.shape[-1])
        if getattr(params, "shape", None) != wanted:
            got = getattr(params, "shape", None)
            raise ValueError(f"net must return a tensor of shape {wanted} for {name} of shape {tuple(x.shape)}, "
                             f"got {type(params).__name__ if got is None else tuple(got)}")
        return first, second, params

    def forward(self, x, context=None):
        x1, x2, params = self._halves(x, "x", context)
        z2, log_slope = self.map.forward(x2, params)
        return torch.cat([x1, z2], -1), log_slope.sum(-1)

    def inverse_and_ldj(self, z, context=None):
        z1, z2, params = self._halves(z, "z", context)
        x2, log_slope = self.map.inverse(z2, params)
        return torch.cat([z1, x2], -1), log_slope.sum(-1)


class AdditiveCoupling(Coupling):
    """NICE: z2 = x2 + net(x1), ldj = 0; net (..., d) -> (..., D - d)."""

    def __init__(self, net):
        super().__init__(net, Shift())


class MixCoupling(Coupling):
    """Flow++: z2 = logit(mixture CDF(x2)) exp(a) + b; net (..., d) -> (..., (3 components + 2) (D - d)),
    in blocks logits, means, log-scales, a, b."""

    def __init__(self, net, components):
        super().__init__(net, MixLogitCDF(components))

    @classmethod
    def spread(cls, dim, components=32, hidden=(32, 32, 32, 32, 32), reach=4.0):
        """A coupling of D = `dim` coordinates with an MLP of its own, both made so that they look at all of [-reach, reach] from the start:
        the net's first units switch, and the logistics have their means, evenly over it.

        With the usual start the logistics are all alike and take long to part. benchmarks/fit.py measures what that costs.
        """
        d = dim // 2
        map = MixLogitCDF(components)
        net = MLP(d, map.num_params * (dim - d), hidden, zero_last=True, spread=(4.0, reach))
        with torch.no_grad():
            net[-1].bias.copy_(map.spread(dim - d, reach))
        return cls(net, components)
