"""The layers of layers.py as the peer libraries have them, each as a Contestant with the same nets as flowkit's.

nflows 0.14, normflows 1.7.3, zuko 1.6, FrEIA 0.2 and pyro-ppl 1.9.2, as their own documentation uses them. A layer that cannot
be made the same is left out, and each function says which and why. Small differences that a user cannot avoid are told in
`note`; a contestant that computes another map has `counts=False` and is shown, not compared with.
"""
import math
from dataclasses import dataclass
from typing import Callable

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pyro.distributions
import pyro.distributions.transforms
import pyro.nn
import torch
import zuko
from torch import nn

from flowkit import MLP

NF, NFT, ZF, ZT, PT = normflows.flows, nflows.transforms, zuko.flows, zuko.transforms, pyro.distributions.transforms
HIDDEN = (64, 64)


@dataclass
class Contestant:
    """A flow of some library. log_prob(x) gives (n,), sample(n) gives (n, D); None where the library has no such direction.

    `same_size`: it should have as many parameters as flowkit's flow. `after_step`: what the library asks for after a step.
    """
    name: str
    module: nn.Module
    log_prob: Callable | None
    sample: Callable | None = None
    note: str = ""
    counts: bool = True
    same_size: bool = True
    after_step: Callable = lambda: None


def of_nflows(dim, transforms, **how):
    flow = nflows.flows.Flow(NFT.CompositeTransform(transforms), nflows.distributions.StandardNormal([dim]))
    return Contestant("nflows", flow, flow.log_prob, flow.sample, **how)


def of_normflows(dim, flows, **how):
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), flows)
    # Its residual block sets requires_grad on the tensor that it is given.
    return Contestant("normflows", flow, lambda x: flow.log_prob(x.detach()), lambda n: flow.sample(n)[0], **how)


def of_zuko(dim, transforms, **how):
    normal = zuko.distributions.DiagNormal
    flow = ZF.Flow(transforms, ZF.UnconditionalDistribution(normal, torch.zeros(dim), torch.ones(dim), buffer=True))
    return Contestant("zuko", flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), **how)


def of_pyro(dim, transforms, has_sample=True, **how):
    """`transforms` listed from latent to data."""
    flow = pyro.distributions.TransformedDistribution(pyro.distributions.Normal(torch.zeros(dim), torch.ones(dim)), transforms)
    modules = nn.ModuleList(m for t in transforms for m in (t, t.inv) if isinstance(m, nn.Module))
    # A tensor of its own each time, since a transform that sees its last input again returns its last output.
    sample = (lambda n: flow.sample((n,))) if has_sample else None
    return Contestant("pyro", modules, lambda x: flow.log_prob(x.view_as(x)), sample, **how)


def of_freia(dim, inn, **how):
    def log_prob(x):
        z, ldj = inn(x)
        return ldj - 0.5 * (z * z).sum(-1) - 0.5 * dim * math.log(2 * math.pi)

    return Contestant("FrEIA", inn, log_prob, lambda n: inn(torch.randn(n, dim), rev=True, jac=False)[0], **how)


class _WithContext(nn.Module):
    """nflows calls its nets net(x, context)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        return self.net(x)


def coupling(dim, layers=8):
    """Affine couplings with the order of the coordinates turned round after each (zuko: masks that alternate)."""
    half, rest = dim // 2, dim - dim // 2
    mask, backwards = [0] * half + [1] * rest, torch.arange(dim).flip(0)
    nets = [MLP(half, 2 * rest, HIDDEN) for _ in range(layers)]
    inn = FrEIA.framework.SequenceINN(dim)
    for _ in range(layers):
        inn.append(FrEIA.modules.AffineCouplingOneSided, subnet_constructor=lambda a, b: MLP(a, b, HIDDEN), clamp=1.0,
                   clamp_activation=lambda u: u, split_len=half)
        inn.append(FrEIA.modules.PermuteRandom)
        inn[-1].perm.data, inn[-1].perm_inv.data = backwards.clone(), backwards.clone()
    return [
        of_nflows(dim, [t for _ in range(layers) for t in (
            NFT.AffineCouplingTransform(mask, lambda a, b: _WithContext(MLP(a, b, HIDDEN))), NFT.ReversePermutation(dim))],
            note="scale is a sigmoid"),
        of_normflows(dim, [f for net in nets for f in (NF.Permute(dim, mode="swap"), NF.AffineCouplingBlock(net))]),
        of_zuko(dim, [ZF.coupling.GeneralCouplingTransform(dim, mask=[(i < half) == (layer % 2 == 0) for i in range(dim)],
                                                          hidden_features=HIDDEN, activation=nn.Tanh) for layer in range(layers)],
                note="log-scale softly clipped"),
        of_freia(dim, inn),
        of_pyro(dim, [t for _ in range(layers) for t in (
            PT.Permute(backwards), PT.AffineCoupling(half, pyro.nn.DenseNN(half, HIDDEN, [rest, rest], nonlinearity=nn.Tanh())))],
            note="log-scale clamped"),
    ]


def _pyro_made(dim, params, layer):
    order = torch.arange(dim) if layer % 2 == 0 else torch.arange(dim).flip(0)
    return pyro.nn.AutoRegressiveNN(dim, list(HIDDEN), params, permutation=order, nonlinearity=nn.Tanh())


def maf(dim, layers=5):
    """MAF, orders alternating. normflows' MADE has no activation after its first layer, so one is added. FrEIA has none."""
    settings = dict(num_blocks=1, use_residual_blocks=False, activation=torch.tanh)

    def normflows_maf():
        flow = NF.MaskedAffineAutoregressive(dim, HIDDEN[0], **settings)
        flow.autoregressive_net.initial_layer = nn.Sequential(flow.autoregressive_net.initial_layer, nn.Tanh())
        return NF.Reverse(flow)

    return [
        of_nflows(dim, [t for _ in range(layers) for t in (
            NFT.MaskedAffineAutoregressiveTransform(dim, HIDDEN[0], **settings), NFT.ReversePermutation(dim))],
            note="scale is a softplus"),
        of_normflows(dim, [f for _ in range(layers) for f in (NF.Permute(dim, mode="swap"), normflows_maf())],
                     note="scale is a sigmoid"),
        of_zuko(dim, [ZF.MaskedAutoregressiveTransform(dim, order=torch.arange(dim) if i % 2 == 0 else torch.arange(dim).flip(0),
                                                      hidden_features=HIDDEN, activation=nn.Tanh) for i in range(layers)],
                note="log-scale softly clipped"),
        of_pyro(dim, [PT.AffineAutoregressive(_pyro_made(dim, [1, 1], i)).inv for i in range(layers)], note="log-scale clamped"),
    ]


def naf(layers=2, components=16):
    """DSF at D = 2. pyro has no inverse; zuko's NAF bends by a monotone MLP, which is another map. No other peer has one."""
    other = ZF.NAF(2, transforms=layers, signal=components, network={"hidden_features": HIDDEN}, hidden_features=HIDDEN,
                   activation=nn.Tanh)
    return [
        of_pyro(2, [PT.NeuralAutoregressive(_pyro_made(2, [components] * 3, i), components).inv for i in range(layers)],
                has_sample=False, note="not in logs, so not stable"),
        of_zuko(2, list(other.transform.transforms), counts=False, same_size=False, note="another map"),
    ]


def _one_way(dim, layers, pyro_layer, normflows_layer=None, **how):
    """Layers closed in one direction only: the flow whose density has it and, for `sample`, the flow turned round."""
    flows = []
    for library, make, turned in ((of_pyro, pyro_layer, lambda t: t.inv), (of_normflows, normflows_layer, NF.Reverse)):
        if make is not None:
            flows.append(library(dim, [turned(make()) for _ in range(layers)], **how))
            flows[-1].sample = library(dim, [make() for _ in range(layers)]).sample
    return flows


def planar(dim, layers=8):
    return _one_way(dim, layers, lambda: PT.Planar(dim), lambda: NF.Planar((dim,)))


def radial(dim, layers=8):
    """normflows may start with an alpha near 0, a spike in the density: here it starts at 1."""
    def normflows_radial():
        layer = NF.Radial((dim,))
        nn.init.ones_(layer.alpha)
        return layer

    return _one_way(dim, layers, lambda: PT.Radial(dim), normflows_radial)


def sylvester(dim, layers=8):
    """pyro only, where Q is a product of Householder reflections and the rank is D."""
    return _one_way(dim, layers, lambda: PT.Sylvester(dim, count_transforms=dim), same_size=False, note="Q of reflections")


def linear(dim, layers=8):
    """ActNorm and a matrix in its LU form. zuko has no ActNorm: an elementwise affine map stands in; no permutation in zuko and
    nflows. pyro's GeneralizedChannelPermute takes images only, FrEIA's linear layers are fixed or orthogonal: left out."""
    def zuko_pair():
        return [ZF.UnconditionalTransform(ZT.MonotonicAffineTransform, torch.zeros(dim), torch.zeros(dim)),
                ZF.UnconditionalTransform(ZT.LULinearTransform, torch.linalg.qr(torch.randn(dim, dim))[0] + 2 * torch.eye(dim))]

    return [
        of_nflows(dim, [t for _ in range(layers) for t in (NFT.ActNorm(dim), NFT.LULinear(dim, identity_init=False))],
                  same_size=False, note="triangles packed, a bias"),
        of_normflows(dim, [f for _ in range(layers) for f in (NF.InvertibleAffine(dim), NF.ActNorm((dim,)))]),
        of_zuko(dim, [t for _ in range(layers) for t in zuko_pair()], same_size=False, note="triangles packed"),
    ]


class _ZukoCNF(zuko.lazy.LazyTransform):
    def __init__(self, field, **tolerances):
        super().__init__()
        self.field, self.tolerances = field, tolerances

    def forward(self, c=None):
        return ZT.FreeFormJacobianTransform(self.field, 0.0, 1.0, tuple(self.parameters()), exact=True, **self.tolerances)


def cnf(field, dim, **tolerances):
    """dopri5 with the same field. zuko holds every element to the tolerance, the trace to a hundred times it. No other peer."""
    return [of_zuko(dim, [_ZukoCNF(field, **tolerances)], note="checkpointed adjoint")]


def residual(exact, lipschitz=0.9, layers=8):
    """normflows at D = 2, without the Swish that its net starts with, five power iterations after each step.

    N = 3 + a geometric from 0 with p = 1/2. Its inverse stops at steps of 0.003. FrEIA's i-ResNet gives its log-determinant
    no gradient, so its training step is another thing: left out.
    """
    def net():
        return nn.Sequential(*normflows.nets.LipschitzMLP([2, *HIDDEN, 2], lipschitz ** (1 / 3), init_zeros=False).net[1:])

    flow = of_normflows(2, [NF.Residual(net(), brute_force=exact, reduce_memory=not exact) for _ in range(layers)],
                        same_size=False, note="inverse to 0.003 only")
    flow.after_step = lambda: normflows.utils.update_lipschitz(flow.module, 5)
    normflows.utils.update_lipschitz(flow.module, 50)
    return [flow]
