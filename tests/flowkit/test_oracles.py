"""The same weights in other people's layers: zuko, nflows, normflows and pyro must give the same z and the same log-density.

Each was written by others from the papers, so a misreading of ours that obeys all laws would show here.
"""
import math

import normflows
import nflows.transforms as nflows
import pyro.distributions.transforms as pyro
import pytest
import torch
import zuko
from layer_laws import of_order_one
from nflows.transforms.made import MADE as NflowsMADE
from torch.distributions.transforms import AffineTransform

from flowkit import (DSF, MADE, MAF, MLP, ActNorm, ActNorm2d, AdditiveCoupling, Autoregressive, Conv1x1, Coupling, GatedAffine,
                     ImageCoupling, InvertibleLinear, Planar, Radial, Squeeze)


def order_one(net, seed=0):
    torch.manual_seed(seed)
    return of_order_one(net.double())


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def same(ours, theirs):
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


class Interleaved(torch.nn.Module):
    """A net's two blocks as normflows wants them: shift, scale, shift, scale, ... along dimension 1."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        alpha, mu = self.net(x).chunk(2, 1)
        return torch.stack([mu, alpha], 2).flatten(1, 2)


@pytest.mark.parametrize("dim", [2, 5])
def test_affine_coupling_is_zukos_and_normflows(dim):
    half = dim // 2
    net, x = order_one(MLP(half, 2 * (dim - half))), points(6, dim)

    def bend(x1):
        alpha, mu = net(x1).chunk(2, -1)
        return AffineTransform(mu, alpha.exp())

    theirs = zuko.transforms.CouplingTransform(bend, torch.arange(dim) < half)
    # zuko leaves torch's AffineTransform to sum over nothing; the sum over coordinates is its DependentTransform's.
    theirs.meta = lambda x1: zuko.transforms.DependentTransform(bend(x1), 1)
    same(Coupling(net)(x), theirs.call_and_ladj(x))
    peer = normflows.flows.AffineCoupling(Interleaved(net))
    (_, z2), ldj = peer((x[:, :half], x[:, half:]))
    same(Coupling(net)(x), (torch.cat([x[:, :half], z2], -1), ldj))


def test_additive_coupling_is_nflows():
    net, x = order_one(MLP(2, 3)), points(6, 5)
    peer = nflows.AdditiveCouplingTransform(torch.tensor([-1.0, -1, 1, 1, 1]), lambda d_in, d_out: _Contextless(net))
    same(AdditiveCoupling(net)(x), peer(x))
    same((AdditiveCoupling(net).inverse(x),), peer.inverse(x)[:1])


class _Contextless(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, context=None):
        return self.net(x)


def test_act_norm_is_nflows_from_its_first_batch():
    x = 3 * points(50, 4) + 1
    ours, theirs = ActNorm(4).double(), nflows.ActNorm(4).double()
    z, ldj = ours(x)
    want, want_ldj = theirs(x)
    # nflows divides by the unbiased deviation: n - 1 for n.
    shrink = math.sqrt(49 / 50)
    same((z * shrink, ldj + 4 * math.log(shrink)), (want, want_ldj))
    image, layer, peer = 2 * points(6, 3, 4, 2), ActNorm2d(3).double(), nflows.ActNorm(3).double()
    layer.transform.initialised.fill_(True)
    peer.initialized.fill_(True)
    with torch.no_grad():
        for ours, theirs in [(layer.transform.log_scale, peer.log_scale), (layer.transform.shift, peer.shift)]:
            ours.copy_(torch.randn(3))
            theirs.copy_(ours)
    same(layer(image), peer(image))


def test_lu_linear_and_1x1_convolution_are_nflows():
    dim = 4
    ours, theirs = order_one(InvertibleLinear(dim)), nflows.LULinear(dim).double()
    # nflows has a positive diagonal; with D the signs, P L U = P D (D L D)(D U), and D U has one.
    sign = ours.sign
    with torch.no_grad():
        theirs.lower_entries.copy_((sign[:, None] * ours.lower * sign)[theirs.lower_indices])
        theirs.upper_entries.copy_((sign[:, None] * ours.upper)[theirs.upper_indices])
        theirs.unconstrained_upper_diag.copy_(torch.log(torch.expm1(ours.log_s.exp() - theirs.eps)))
        theirs.bias.zero_()
    x = points(6, dim)
    z, ldj = theirs(x)
    same(ours(x), (z * sign @ ours.permutation.T, ldj))
    image, conv, peer = points(3, dim, 2, 5), Conv1x1(dim).double(), normflows.flows.Invertible1x1Conv(dim).double()
    conv.transform = ours
    # normflows' forward goes from latent to data.
    peer.use_lu = False
    peer.W = torch.nn.Parameter(ours.weight().detach())
    z, ldj = peer.inverse(image)
    same(conv(image), (z, ldj.expand(3)))


def test_squeeze_is_nflows_up_to_the_order_of_channels():
    image = points(2, 3, 4, 6)
    z, ldj = Squeeze()(image)
    want, want_ldj = nflows.SqueezeTransform()(image)
    assert torch.equal(z, want) and torch.equal(ldj, want_ldj.to(ldj))


def test_image_coupling_is_normflows():
    net, image = order_one(torch.nn.Conv2d(2, 6, 3, padding=1)), points(3, 5, 4, 2)
    (_, z2), ldj = normflows.flows.AffineCoupling(Interleaved(net))((image[:, :2], image[:, 2:]))
    same(ImageCoupling(net)(image), (torch.cat([image[:, :2], z2], 1), ldj))


def test_planar_and_radial_are_normflows():
    for ours, theirs in [(order_one(Planar(3)), normflows.flows.Planar((3,)).double()),
                         (order_one(Radial(3), 1), normflows.flows.Radial((3,)).double())]:
        with torch.no_grad():
            if isinstance(ours, Planar):
                # normflows keeps w.u above -1 by another shift of the same u: softplus(w.u) - 1. Give it the u that we use.
                u, wu = ours.constrained_u()
                theirs.w.copy_(ours.w[None])
                free = torch.log(torch.expm1(wu + 1))
                theirs.u.copy_((u + (free - wu) * ours.w / (ours.w @ ours.w))[None])
                theirs.b.copy_(ours.b[None])
            else:
                alpha, beta = ours.alpha_beta()
                theirs.alpha.copy_(alpha[None])
                theirs.beta.copy_(torch.log(torch.expm1(beta + alpha))[None])
                theirs.z_0.copy_(ours.center[None])
        x = points(6, 3)
        same(ours(x), theirs(x))


def test_made_is_nflows_made():
    """Hidden units in another order, parameters of a coordinate side by side: after both reorderings, number by number."""
    dim, width, params = 4, 12, 3
    ours = order_one(MADE(dim, params, (width, width)))
    theirs = NflowsMADE(dim, width, num_blocks=1, output_multiplier=params, use_residual_blocks=False, activation=torch.tanh).double()
    layers = [theirs.initial_layer, theirs.blocks[0].linear, theirs.final_layer]
    # Their degrees go 1, 2, 3, 1, 2, 3, ...; ours 1, 1, 1, 1, 2, ...: `sort` lists their units in our order.
    sort = theirs.initial_layer.degrees.argsort(stable=True)
    rows = [sort, sort, torch.arange(params * dim).reshape(dim, params).T.flatten()]
    columns = [torch.arange(dim), sort, sort]
    with torch.no_grad():
        for i, (peer, layer) in enumerate(zip(layers, ours.layers)):
            peer.weight[rows[i][:, None], columns[i]] = layer.weight
            peer.bias[rows[i]] = layer.bias
            assert torch.equal(peer.mask[rows[i][:, None], columns[i]], getattr(ours, f"mask_{i}").to(peer.mask))
    x = points(6, dim)
    want = torch.nn.functional.linear(torch.tanh(layers[1](torch.tanh(layers[0](x)))), layers[2].weight * layers[2].mask, layers[2].bias)
    torch.testing.assert_close(ours(x), want[:, rows[2]])


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_maf_is_zukos_autoregressive_transform(order):
    dim = 4
    net, x = order_one(MADE(dim, 2, order=order)), points(6, dim)

    def bend(x):
        alpha, mu = net(x).chunk(2, -1)
        return zuko.transforms.DependentTransform(AffineTransform(mu, alpha.exp()), 1)

    theirs = zuko.transforms.AutoregressiveTransform(bend, passes=dim)
    same(MAF(net)(x), theirs.call_and_ladj(x))
    same((MAF(net).inverse(x),), (theirs.inv(x),))


class Pieces(torch.nn.Module):
    """Our MADE with the face of pyro's AutoRegressiveNN: a tuple of parameters."""

    def __init__(self, net, pieces):
        super().__init__()
        self.net, self.pieces, self.permutation = net, pieces, net.order.tolist()

    def forward(self, x):
        return self.pieces(self.net(x))


@pytest.mark.parametrize("stable", [False, True])
def test_both_affine_forms_are_pyros(stable):
    net, x = order_one(MADE(4, 2)), points(6, 4)
    theirs = pyro.AffineAutoregressive(Pieces(net, lambda p: p.chunk(2, -1)[::-1]), stable=stable, sigmoid_bias=0.0)
    ours = Autoregressive(net, GatedAffine()) if stable else MAF(net)
    z = theirs(x)
    same(ours(x), (z, theirs.log_abs_det_jacobian(x, z)))
    # (pyro's own inverse makes float32 zeros, and so refuses float64.)
    same((ours.inverse(z),), (x,))


def test_deep_sigmoidal_flow_is_pyros():
    k = 5
    net, x = order_one(MADE(4, 3 * k)), points(6, 4)

    def pieces(params):
        a, b, w = params.unflatten(-1, (3, k, 4)).unbind(-3)
        return a, w, b

    theirs = pyro.NeuralAutoregressive(Pieces(net, pieces), hidden_units=k)
    z = theirs(x)
    for got, want in zip(Autoregressive(net, DSF(k))(x), (z, theirs.log_abs_det_jacobian(x, z))):
        # pyro adds 1e-8 to each slope, and its clamped sigmoids cost some digits.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
