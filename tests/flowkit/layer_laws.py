"""The registry of layers and the laws that each must obey.

A layer is entered once, as name -> constructor; every law then runs on it with weights of order one, never at the
initialisation only. A law is a function law(layer, x) that asserts, so that a test can also show it turning red.
"""
import math

import torch
from torch.func import functional_call

from flowkit import (DDSF, DSF, IAF, MADE, MAF, MLP, NAF, ActNorm, AdditiveCoupling, Affine, Autoregressive, Compose,
                     Coupling, Flow, GatedAffine, Inverse, InvertibleLinear, MaskedTransformer, MixCoupling,
                     MixGaussianCDF, Permute, PixelCNN, Planar, Radial, Reverse, StandardNormal, Sylvester, WaveNet)
from flowkit.continuous import CNF, VectorField
from flowkit.residual import Residual, lipschitz_mlp


def net(dim, params):
    """A conditioner for a coupling of `dim` coordinates whose map has `params` parameters for each."""
    return MLP(dim // 2, params * (dim - dim // 2), hidden=(16,), activation=torch.nn.Tanh)


def _affine(dim):
    return Coupling(net(dim, 2))


def made(dim, params, **more):
    return MADE(dim, params, hidden=(12, 9), **more)


LAYERS = {
    "coupling": _affine,
    "coupling_bounded": lambda dim: Coupling(net(dim, 2), Affine(bound=0.7)),
    "additive_coupling": lambda dim: AdditiveCoupling(net(dim, 1)),
    "mix_coupling": lambda dim: MixCoupling(net(dim, 11), components=3),
    "reverse": lambda dim: Reverse(),
    "permute": lambda dim: Permute(torch.arange(dim).roll(1)),
    "act_norm": ActNorm,
    "invertible_linear": InvertibleLinear,
    "planar": Planar,
    "radial": Radial,
    "sylvester": lambda dim: Sylvester(dim, 2),
    "sylvester_full": lambda dim: Sylvester(dim, dim),
    "coupling_gate": lambda dim: Coupling(net(dim, 2), GatedAffine()),
    "coupling_dsf": lambda dim: Coupling(net(dim, 9), DSF(3)),
    "maf": lambda dim: MAF(made(dim, 2)),
    "maf_any_order": lambda dim: MAF(made(dim, 2, order=torch.arange(dim).roll(1))),
    "maf_gate": lambda dim: Autoregressive(made(dim, 2), GatedAffine()),
    "iaf": lambda dim: IAF(made(dim, 2)),
    "made_mog": lambda dim: Autoregressive(made(dim, 9), MixGaussianCDF(3)),
    "naf_dsf": lambda dim: NAF(made(dim, 9), components=3),
    "naf_ddsf": lambda dim: Autoregressive(made(dim, DDSF((4, 4)).num_params), DDSF((4, 4))),
    "maf_wavenet": lambda dim: MAF(WaveNet(1, 2, width=6, blocks=2, event_dims=1)),
    "maf_pixelcnn": lambda dim: MAF(PixelCNN(1, 2, width=6, blocks=2, event_dims=1)),
    "maf_transformer": lambda dim: Autoregressive(MaskedTransformer(1, 2, width=8, heads=2), Affine(bound=2)),
    "cnf": lambda dim: CNF(VectorField(dim, hidden=(8,)), t1=0.5, solver="rk4", steps=20),
    "residual": lambda dim: Residual(lipschitz_mlp(dim, (16,))),
    "inverse": lambda dim: Inverse(MixCoupling(net(dim, 11), components=3)),
    "compose": lambda dim: Compose([_affine(dim), Reverse(), InvertibleLinear(dim), ActNorm(dim), _affine(dim)]),
}
WITH_WEIGHTS = [name for name in LAYERS if name not in ("reverse", "permute")]


def build(name, dim, dtype=torch.float64, seed=1):
    """The layer with random weights of order one, past any data-dependent initialisation."""
    torch.manual_seed(seed)
    layer = LAYERS[name](dim).to(dtype)
    layer(points(dim, dtype))
    return of_order_one(layer)


def of_order_one(module):
    """The module with random weights. Fan-in scaling keeps what nets put out, and not only what they hold, of order one."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p[0].numel() if p.ndim > 1 else 1))
    return module


def points(dim, dtype=torch.float64, n=6, seed=2):
    return torch.randn(n, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def jacobian(f, row):
    return torch.autograd.functional.jacobian(lambda r: f(r[None])[0], row)


def round_trip(layer, x):
    z, _ = layer(x)
    torch.testing.assert_close(layer.inverse(z), x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=1e-8, atol=1e-8)


def ldj_is_autograds(layer, x):
    _, ldj = layer(x)
    want = torch.stack([torch.linalg.slogdet(jacobian(lambda r: layer(r)[0], row))[1] for row in x])
    torch.testing.assert_close(ldj, want, rtol=1e-8, atol=1e-8)


def inverse_jacobian_is_autograds(layer, x):
    """The inverse is differentiable: its Jacobian at z is the inverse matrix of the forward one at x."""
    z = layer(x)[0].detach()
    for row_x, row_z in zip(x, z):
        there = jacobian(lambda r: layer(r)[0], row_x)
        back = jacobian(layer.inverse, row_z)
        torch.testing.assert_close(back @ there, torch.eye(len(row_x), dtype=x.dtype), rtol=1e-6, atol=1e-6)


def both_directions_agree(layer, x):
    z, ldj = layer(x)
    back, ldj_back = layer.inverse_and_ldj(z)
    torch.testing.assert_close(back, layer.inverse(z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ldj_back, ldj, rtol=1e-7, atol=1e-7)


def shape_and_dtype(layer, x):
    for batch in (x, x[0], x.reshape(2, 3, -1), x[:0]):
        z, ldj = layer(batch)
        back, ldj_back = layer.inverse_and_ldj(batch)
        for out in (z, back, layer.inverse(batch)):
            assert out.shape == batch.shape and out.dtype == x.dtype
        for out in (ldj, ldj_back):
            assert out.shape == batch.shape[:-1] and out.dtype == x.dtype


def rows_do_not_mix(layer, x):
    z, ldj = layer(x)
    back, ldj_back = layer.inverse_and_ldj(x)
    for i in range(len(x)):
        for batch, alone in zip((z, ldj, back, ldj_back), (*layer(x[i:i + 1]), *layer.inverse_and_ldj(x[i:i + 1]))):
            torch.testing.assert_close(batch[i], alone[0], rtol=1e-10, atol=1e-10)


def input_is_untouched(layer, x):
    before = x.clone()
    layer(x)
    layer.inverse(x)
    layer.inverse_and_ldj(x)
    assert torch.equal(x, before)


def gradients(layer, x):
    """Under weights that differ from sample to sample, gradients in the layer's weights and in its input match
    central differences, for forward and inverse."""
    generator = torch.Generator().manual_seed(3)
    sample_weight = torch.randn(len(x), generator=generator, dtype=x.dtype)
    out_weight = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    values = {"x": x.clone(), **{k: v.detach().clone() for k, v in layer.named_parameters()}}

    for call in ("forward", "inverse_and_ldj"):
        def loss(values):
            weights = {"layer." + k: v for k, v in values.items() if k != "x"}
            out, ldj = functional_call(_Call(layer, call), weights, (values["x"],))
            return (sample_weight * (ldj + (out_weight * out).sum(-1))).sum()

        leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
        got = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, got):
            direction = torch.randn(values[name].shape, generator=generator, dtype=x.dtype)
            step = 1e-5
            up, down = ({**values, name: values[name] + s * step * direction} for s in (1, -1))
            want = (loss(up) - loss(down)) / (2 * step)
            grad = torch.zeros_like(direction) if grad is None else grad
            torch.testing.assert_close((grad * direction).sum(), want, rtol=1e-5, atol=1e-5, msg=lambda m: f"{call}, {name}: {m}")


class _Call(torch.nn.Module):
    """Calls another method of a layer, so that functional_call can reach it."""

    def __init__(self, layer, method):
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, x):
        return getattr(self.layer, self.method)(x)


def density_integrates_to_one(layer, x):
    """In the plane: the flow's density, summed over a fine grid that holds nearly all of it, is 1."""
    dim = 2
    flow = Flow(StandardNormal(dim).to(x.dtype), layer)
    with torch.no_grad():
        # The grid covers the samples' range with a margin, each axis on its own.
        samples = flow.sample(4000)
        low, high = samples.min(0).values, samples.max(0).values
        low, high = low - 0.4 * (high - low), high + 0.4 * (high - low)
        n = 300
        axes = [low[i] + (high[i] - low[i]) * (torch.arange(n, dtype=x.dtype) + 0.5) / n for i in range(dim)]
        density = flow.log_prob(torch.cartesian_prod(*axes)).exp()
        total = density.sum() * torch.prod((high - low) / n)
    assert abs(total.item() - 1) < 5e-3, f"the density integrates to {total:.4f}"


LAWS = [round_trip, ldj_is_autograds, inverse_jacobian_is_autograds, both_directions_agree, shape_and_dtype,
        rows_do_not_mix, input_is_untouched, gradients]
