"""Dequantization: floors back exactly, and a bound on the mass of a cell, by quadrature over the noise."""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import Normal

from flowkit.core import Compose, Flow, Inverse, StandardNormal
from flowkit.coupling import Coupling
from flowkit.dequantization import (FlowProposal, UniformDequantizer, VariationalDequantizer, uniform_dequantize,
                                    variational_bound)
from flowkit.linear import Reverse
from flowkit.nets import MLP
from flowkit.surjective import Slice

LEVELS = 5


def fgm_log_density(y, a=0.9):
    """A density on [0, 1]^2 with uniform marginals and correlation: 1 + a (1 - 2 y1)(1 - 2 y2)."""
    return torch.log1p(a * (1 - 2 * y).prod(-1))


def fgm_cell(x, a=0.9):
    """Its mass on the cells of integers x (..., 2): integral of 1 - 2 y over [x, x + 1] / K is (1 - (2 x + 1) / K) / K."""
    return 1 / LEVELS ** 2 + a * ((1 - (2 * x.double() + 1) / LEVELS) / LEVELS).prod(-1)


def gauss_legendre(n, dim):
    """Nodes (n^dim, dim) and weights for integrals over [0, 1]^dim."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(n))
    nodes, weights = (nodes + 1) / 2, weights / 2
    return (torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim),
            torch.cartesian_prod(*[weights] * dim).reshape(-1, dim).prod(-1))


class OnUnitSquare(nn.Module):
    """fgm_log_density as a base."""
    event_shape, batch_shape = torch.Size([2]), torch.Size()

    def log_prob(self, y):
        return fgm_log_density(y)

    def sample(self, shape=()):
        return torch.rand(*shape, 2)


class Identity(nn.Module):
    """Noise on the nodes u of a quadrature, v = logit(u), as if drawn from the density of a logistic around `shift`."""

    def __init__(self, u, shift=0.0):
        super().__init__()
        self.u, self.shift = u, shift

    def forward(self, x):
        v = self.shift + torch.logit(self.u)
        e = v - self.shift
        return v, (nn.functional.logsigmoid(e) + nn.functional.logsigmoid(-e)).sum(-1)


ALL_CELLS = torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS))


# --- the bounds, by quadrature over the noise

@pytest.fixture
def noise_at(monkeypatch):
    """Makes torch.rand give chosen numbers."""
    def put(u):
        monkeypatch.setattr(torch, "rand", lambda shape, device=None: u.reshape(shape))
    return put


def test_uniform_is_a_bound_whose_exp_has_the_right_mean(noise_at):
    u, weights = gauss_legendre(12, 2)
    noise_at(u)
    for cell in ALL_CELLS:
        x = cell.expand(len(u), 2)
        y, contribution = uniform_dequantize(x, LEVELS)
        torch.testing.assert_close(y, (x + u) / LEVELS)
        torch.testing.assert_close(contribution, torch.full((len(u),), -2 * math.log(LEVELS), dtype=torch.float64))
        estimate = Flow(OnUnitSquare(), UniformDequantizer(LEVELS)).log_prob(x, bound=True)
        torch.testing.assert_close(estimate, fgm_log_density(y) + contribution)
        mean_of_exp, mean = (weights * estimate.exp()).sum(), (weights * estimate).sum()
        torch.testing.assert_close(mean_of_exp, fgm_cell(cell), rtol=1e-9, atol=0)
        assert mean < fgm_cell(cell).log() - 1e-6
        # The check can fail: a doubled contribution, or one of a single dimension, is seen.
        for wrong in (2, 0.5):
            spoilt = (weights * (fgm_log_density(y) + wrong * contribution).exp()).sum()
            assert abs(spoilt / fgm_cell(cell) - 1) > 0.1


def test_masses_sum_to_one():
    torch.testing.assert_close(fgm_cell(ALL_CELLS).sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_variational_is_a_bound_whose_exp_has_the_right_mean(shift):
    """u = sigmoid(v) with v logistic around `shift`; with shift 0 that is uniform noise."""
    nodes, weights = gauss_legendre(60, 2)
    flow = Flow(OnUnitSquare(), VariationalDequantizer(Identity(nodes, shift), LEVELS))
    for cell in ALL_CELLS:
        x = cell.expand(len(nodes), 2)
        estimate = flow.log_prob(x, bound=True)
        torch.testing.assert_close((weights * estimate.exp()).sum(), fgm_cell(cell), rtol=1e-7, atol=0)
        assert (weights * estimate).sum() < fgm_cell(cell).log() - 1e-6
        y, contribution = flow.transform(x)
        u = torch.sigmoid(shift + torch.logit(nodes))
        torch.testing.assert_close(y, (x + u) / LEVELS)
        # log q(u) by the change of variables from v, once with autograd's derivative of the logit.
        u.requires_grad_()
        slope, = torch.autograd.grad(torch.logit(u).sum(), u)
        e = torch.logit(u.detach()) - shift
        log_q = (nn.functional.logsigmoid(e) + nn.functional.logsigmoid(-e) + slope.log()).sum(-1)
        torch.testing.assert_close(contribution, -log_q - 2 * math.log(LEVELS))
        assert abs((weights * (fgm_log_density(y) + 2 * contribution).exp()).sum() / fgm_cell(cell) - 1) > 0.1


def ideal(x):
    """u drawn from the density's own conditional in the cell: u1 from its marginal there, then u2 given u1."""
    k, a = LEVELS, 0.9
    c2 = (1 - (2 * x[:, 1].double() + 1) / k)
    u1 = _invert_linear(1 + a * c2 * (1 - 2 * x[:, 0].double() / k), -2 * a * c2 / k)
    g1 = 1 - 2 * (x[:, 0] + u1) / k
    u2 = _invert_linear(1 + a * g1 * (1 - 2 * x[:, 1].double() / k), -2 * a * g1 / k)
    u = torch.stack([u1, u2], -1)
    return u, fgm_log_density((x + u) / k) - 2 * math.log(k) - fgm_cell(x).log()


def _invert_linear(b, m):
    """A draw from the density (b + m u) / (b + m / 2) on [0, 1], by inverting its CDF."""
    w = torch.rand(len(b), dtype=torch.float64) * (b + m / 2)
    return 2 * w / (b + (b ** 2 + 2 * m * w).sqrt())


def test_both_are_tight_for_the_ideal_noise():
    x = ALL_CELLS.repeat(40, 1)
    want = fgm_cell(x).log()

    def q(x):
        u, log_q = ideal(x)
        v = torch.logit(u)
        return v, log_q + (nn.functional.logsigmoid(v) + nn.functional.logsigmoid(-v)).sum(-1)

    estimate = Flow(OnUnitSquare(), VariationalDequantizer(q, LEVELS)).log_prob(x, bound=True)
    torch.testing.assert_close(estimate, want, rtol=1e-9, atol=1e-9)
    bound = variational_bound(x, ideal, lambda y: fgm_log_density(y / LEVELS) - 2 * math.log(LEVELS))
    torch.testing.assert_close(bound, want, rtol=1e-9, atol=1e-9)


def test_variational_bound_is_a_bound_whose_exp_has_the_right_mean():
    nodes, weights = gauss_legendre(40, 2)
    log_prob = lambda y: fgm_log_density(y / LEVELS) - 2 * math.log(LEVELS)  # noqa: E731
    # u = w^2, so q(u) = 1 / (2 sqrt u) in each dimension.
    q = lambda x: (nodes ** 2, -(2 * nodes).log().sum(-1))  # noqa: E731
    for cell in ALL_CELLS:
        estimate = variational_bound(cell.expand(len(nodes), 2), q, log_prob)
        assert estimate.shape == (len(nodes),)
        torch.testing.assert_close((weights * estimate.exp()).sum(), fgm_cell(cell), rtol=1e-9, atol=0)
        assert (weights * estimate).sum() < fgm_cell(cell).log() - 1e-3


def test_variational_bound_keeps_to_the_cell():
    """Noise that rounds up to 1 in x + u would be asked about in the next cell, or outside [0, K]."""
    x = torch.randint(256, (1000, 3))
    seen = []
    q = lambda x: (torch.full(x.shape, 1 - 2.0 ** -24), torch.zeros(1000))  # noqa: E731
    variational_bound(x, q, lambda y: seen.append(y) or y.sum(-1))
    assert torch.equal(seen[0].floor(), x.float())


# --- rounding

@pytest.mark.parametrize("levels", [2, 17, 49, 256, 65536])
def test_millions_of_float32_draws_floor_back(levels):
    torch.manual_seed(levels)
    layer = UniformDequantizer(levels)
    for _ in range(4):
        x = torch.randint(levels, (1000, 1000))
        y, _ = layer(x)
        assert y.dtype == torch.float32 and y.min() > 0 and y.max() < 1 and torch.equal(layer.inverse(y), x)
    # Noise at its ends, where x + u is the next integer in float32 or sigmoid(v) is 1.
    v = torch.cat([torch.full((1000,), s) for s in (-120.0, -80.0, -17.0, -9.0, 9.0, 16.6, 17.4, 80.0)])
    layer = VariationalDequantizer(lambda x: (v[:, None], torch.zeros(len(x))), levels)
    x = torch.cat([torch.tensor([0, 1, levels - 2, levels - 1]), torch.randint(levels, (7996,))])[:, None]
    y, contribution = layer(x)
    assert torch.equal(layer.inverse(y), x) and y.min() >= 0 and y.max() < 1 and torch.isfinite(contribution).all()
    # No move is more than the rounding of x + u and of the quotient, which three spacings of floats cover.
    exact = (x.double() + torch.sigmoid(v.double())[:, None]) / levels
    assert ((y - exact).abs() <= 3 * 2.0 ** -24 * exact.clamp_min(1e-30)).all()


def test_uniform_noise_is_uniform():
    """Kolmogorov-Smirnov of 200,000 numbers, in cells of 17 and 256 levels; a right answer fails with probability 2e-6."""
    for levels in (17, 256):
        x = torch.randint(levels, (1000, 200))
        y, _ = uniform_dequantize(x, levels)
        assert stats.kstest((levels * y.double() - x).flatten().numpy(), "uniform").pvalue > 1e-6


def test_noise_that_is_zero_does_not_meet_the_logit(noise_at):
    noise_at(torch.zeros(4, 3))
    assert uniform_dequantize(torch.zeros(4, 3, dtype=torch.long), 256)[0].min() > 0


# --- the contract

def small_proposal(dim=2):
    flow = Flow(StandardNormal(dim), Compose([Coupling(ContextNet(dim // 2, 2 * (dim - dim // 2), dim)), Reverse(),
                                              Coupling(ContextNet(dim - dim // 2, 2 * (dim // 2), dim))]))
    return FlowProposal(flow, lambda x: x.flatten(1) / LEVELS - 0.5)


class ContextNet(nn.Module):
    def __init__(self, d_in, d_out, d_context):
        super().__init__()
        self.net = MLP(d_in + d_context, d_out, hidden=(16,))

    def forward(self, x1, context):
        return self.net(torch.cat([x1, context], -1))


LAYERS = {"uniform": lambda: UniformDequantizer(LEVELS),
          "variational": lambda: VariationalDequantizer(small_proposal(12), LEVELS)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(7, 12), (7, 3, 2, 2), (0, 12)])
def test_shapes_flags_and_round_trip(name, dtype, shape):
    layer = LAYERS[name]()
    assert (layer.bijective, layer.surjective, layer.stochastic, layer.exact) == (False, True, False, False)
    x = torch.randint(LEVELS, shape, dtype=dtype)
    before = x.clone()
    y, contribution = layer(x)
    assert y.shape == x.shape and contribution.shape == shape[:1] and y.dtype == contribution.dtype == torch.float32
    assert torch.equal(layer.inverse(y), x.long()) and layer.inverse(y).dtype == torch.long and torch.equal(x, before)
    if len(x):
        assert not torch.equal(layer(x)[0], y)


def test_rows_of_rank_one():
    x = torch.randint(LEVELS, (6,))
    y, contribution = uniform_dequantize(x, LEVELS)
    torch.testing.assert_close(contribution, torch.full((6,), -math.log(LEVELS)))
    y, contribution = VariationalDequantizer(lambda x: (torch.zeros(6), torch.zeros(6)), LEVELS)(x)
    torch.testing.assert_close(y, (x + 0.5) / LEVELS)
    torch.testing.assert_close(contribution, torch.full((6,), 2 * math.log(0.5) - math.log(LEVELS)))


def test_the_inverse_clamps():
    layer = UniformDequantizer(LEVELS)
    assert layer.inverse(torch.tensor([[-0.1, 0.0, 0.2, 0.99, 1.0, 7.0]])).tolist() == [[0, 0, 1, 4, 4, 4]]


def test_a_flow_of_it_is_a_bound():
    for make in LAYERS.values():
        flow = Flow(StandardNormal(12), make())
        x = torch.randint(LEVELS, (3, 12))
        assert flow.log_prob(x, bound=True).shape == (3,) and flow.sample(4).dtype == torch.long
        with pytest.raises(ValueError, match="pass bound=True"):
            flow.log_prob(x)
        with pytest.raises(NotImplementedError, match="Dequantizer has no inverse_and_ldj, because at a z that is not drawn"):
            flow.sample_and_log_prob(3, bound=True)
        with pytest.raises(ValueError, match="must be bijective to be turned round"):
            Inverse(flow.transform)


def test_float64_by_default_dtype():
    x = torch.randint(LEVELS, (3, 4))
    torch.set_default_dtype(torch.float64)
    try:
        y, contribution = uniform_dequantize(x, LEVELS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == contribution.dtype == torch.float64


# --- FlowProposal

def test_flow_proposal_is_the_conditional_flow():
    q, x = small_proposal(), torch.randint(LEVELS, (9, 2))
    v, log_q = q(x)
    assert v.shape == (9, 2) and log_q.shape == (9,)
    torch.testing.assert_close(log_q, q.flow.log_prob(v, context=q.embed(x)), rtol=1e-4, atol=1e-4)
    # As any proposal, it also serves elsewhere, and the outer context goes to the embedding.
    layer = Slice(FlowProposal(q.flow, lambda x, context: x + context), 2)
    assert layer(torch.randn(4, 2), torch.ones(4, 2))[0].shape == (4, 4)


def test_learnt_noise_beats_uniform_noise_and_stays_a_bound():
    """A sharp known density: uniform noise loses nats, a trained q few, and it does not pass log P (by more than 4 standard
    errors, which a right answer does with probability 3e-5)."""
    torch.manual_seed(0)
    centre, width = torch.tensor([0.47, 0.52]), 0.06

    def log_density(y):
        return Normal(centre, width).log_prob(y).sum(-1)

    edges = torch.arange(LEVELS + 1) / LEVELS
    cdf = Normal(centre[:, None], width).cdf(edges)
    mass = (cdf[:, 1:] - cdf[:, :-1]).clamp_min(1e-30)
    probability = torch.einsum("i,j->ij", *mass)
    x = ALL_CELLS[torch.multinomial(probability.flatten(), 2000, True)]
    exact = probability[x[:, 0], x[:, 1]].log()
    layer = VariationalDequantizer(small_proposal(), LEVELS)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(250):
        y, contribution = layer(x[torch.randint(2000, (256,))])
        loss = -(log_density(y) + contribution).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        gaps = []
        for dequantizer in (UniformDequantizer(LEVELS), layer):
            y, contribution = dequantizer(x)
            gaps.append(exact - log_density(y) - contribution)
    uniform, learnt = gaps
    assert uniform.mean() > 0.5 and -4 * learnt.std() / 2000 ** 0.5 < learnt.mean() < 0.2 * uniform.mean()


# --- bad input

def test_bad_input_is_told_in_one_sentence():
    x = torch.randint(LEVELS, (4, 3))
    layers = (UniformDequantizer(LEVELS), VariationalDequantizer(lambda x: (torch.zeros(x.shape), torch.zeros(len(x))), LEVELS))
    for layer in layers:
        for bad, got in ((x.float(), "dtype torch.float32"), (x > 2, "dtype torch.bool"), (x.numpy(), "ndarray")):
            with pytest.raises(TypeError, match=f"^x must be a tensor of integer dtype, such as torch.long, got {got}$"):
                layer(bad)
        for bad in (x - 9, x + 9):
            with pytest.raises(ValueError, match=rf"^x must hold integers in 0 \.\. 4, got values from {bad.min()} to "):
                layer(bad)
        with pytest.raises(FloatingPointError, match="Dequantizer: z has 1 non-finite values out of 2"):
            layer.inverse(torch.tensor([[0.0, math.nan]]))
    for levels in (1, 2 ** 16 + 1):
        with pytest.raises(ValueError, match=rf"^levels must lie in 2 \.\. 65536, got {levels}$"):
            UniformDequantizer(levels)
        with pytest.raises(ValueError, match="^levels must lie in"):
            uniform_dequantize(x, levels)
    with pytest.raises(TypeError, match="^x must be a tensor of integer dtype"):
        variational_bound(x.float(), ideal, fgm_log_density)
    for q in (lambda x: (torch.zeros(4, 3), torch.zeros(4, 1)), lambda x: (torch.zeros(3, 4), torch.zeros(4))):
        with pytest.raises(ValueError, match=r"^q must return \(sample, log_q\) that both start with the batch \(4,\)"):
            VariationalDequantizer(q, LEVELS)(x)
    with pytest.raises(ValueError, match=r"^q must return v with as many numbers as x of shape \(4, 3\), got \(4, 2\)$"):
        VariationalDequantizer(lambda x: (torch.zeros(4, 2), torch.zeros(4)), LEVELS)(x)
    with pytest.raises(ValueError, match="^flow must be exact to be a proposal, got one whose log_prob is a bound$"):
        FlowProposal(Flow(StandardNormal(2), UniformDequantizer(4)), nn.Identity())
