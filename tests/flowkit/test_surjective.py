"""Surjective and stochastic layers against closed forms, quadrature and enumeration: what is exact is, and bounds are bounds.

For a bound, the noise is not drawn but put on a quadrature's nodes, so that the mean of log p's estimate (at most log p) and
the mean of its exp (p itself) are numbers, not statistics.
"""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import (Exponential, Gamma, HalfNormal, Independent, LogNormal, MultivariateNormal, Normal,
                                 TransformedDistribution)
from torch.distributions.transforms import AffineTransform

from flowkit.core import Compose, Flow, Inverse, StandardNormal
from flowkit.coupling import Coupling
from flowkit.linear import Reverse
from flowkit.nets import MLP
from flowkit.surjective import Abs, Argmax, Max, Slice, Sort, Split, VAELayer, draw

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def randomise(module, seed=1):
    g = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / math.sqrt(p.shape[-1] if p.ndim > 1 else 1))
    return module


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(mean, std):
    return Independent(Normal(mean, std), 1)


class Conditional(nn.Module):
    """A net that gives a diagonal Gaussian on (..., d_out), with weights of order one."""

    def __init__(self, d_in, d_out, seed=1):
        super().__init__()
        self.net = randomise(MLP(d_in, 2 * d_out, hidden=(16,)), seed)

    def forward(self, z, context=None):
        mean, log_std = self.net(z if context is None else torch.cat([z, context], -1)).chunk(2, -1)
        return normal(mean, (0.4 * torch.tanh(log_std)).exp())


class AtNodes:
    """A distribution of Gaussians whose "draws" are quadrature nodes, one a row of the batch."""

    def __init__(self, mean, std, nodes):
        self.p, self.nodes = normal(mean.expand_as(nodes), std * torch.ones_like(nodes)), nodes
        self.event_shape, self.batch_shape, self.has_rsample = self.p.event_shape, self.p.batch_shape, True

    def rsample(self):
        return self.p.mean + self.p.stddev * self.nodes

    def log_prob(self, z):
        return self.p.log_prob(z)


def gauss_hermite(n, dim=1):
    """Nodes (n^dim, dim) and weights that integrate against N(0, I)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n))
    return (torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim),
            torch.cartesian_prod(*[weights / weights.sum()] * dim).reshape(-1, dim).prod(-1))


def integrates_to_one(flow, low, high, atol=2e-3, n=400, off=0.0):
    """The density summed over a grid of midpoints, the two axes moved apart by `off` cells where it jumps along x1 = x2."""
    axis, step = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n, (high - low) / n
    with torch.no_grad():
        total = flow.log_prob(torch.cartesian_prod(axis, axis + off * step)).exp().sum().item() * step ** 2
    assert abs(total - 1) < atol, total


class Spoilt(nn.Module):
    """A layer whose contribution is doubled, as a check that the checks can fail."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.exact = layer, layer.exact

    def forward(self, x):
        z, contribution = self.layer(x)
        return z, 2 * contribution


def negative_exponential(rate):
    """A base on (..., 1): minus an exponential variable."""
    return Independent(TransformedDistribution(Exponential(tensor(rate)), AffineTransform(0, -1)), 1)


class OrderStatistics(nn.Module):
    """The sorted vector of D independent standard normals: density D! prod_i phi(z_i)."""

    def __init__(self, dim):
        super().__init__()
        self.event_shape, self.batch_shape = torch.Size([dim]), torch.Size()

    def sample(self, shape=()):
        return torch.randn(*shape, *self.event_shape, dtype=torch.float64).sort(-1).values

    def log_prob(self, z):
        return Normal(0.0, 1.0).log_prob(z).sum(-1) + math.lgamma(z.shape[-1] + 1)


class FoldedNormal(nn.Module):
    """|X| for X ~ N(m, I): density phi(z - m) + phi(z + m)."""

    def __init__(self, mean):
        super().__init__()
        self.mean, self.event_shape, self.batch_shape = mean, mean.shape, torch.Size()

    def sample(self, shape=()):
        return (self.mean + torch.randn(*shape, *self.event_shape, dtype=torch.float64)).abs()

    def log_prob(self, z):
        return torch.logaddexp(Normal(0.0, 1.0).log_prob(z - self.mean), Normal(0.0, 1.0).log_prob(z + self.mean)).sum(-1)


# --- exact: Split

def split(dim=5, keep=2, seed=1):
    return Split(Conditional(keep, dim - keep, seed), keep)


def test_split_is_the_chain_rule():
    """A joint Gaussian as marginal times conditional, mean m2 + S21 S11^-1 (z - m1) and covariance S22 - S21 S11^-1 S12."""
    a = torch.randn(4, 4, dtype=torch.float64)
    mean, cov = torch.randn(4, dtype=torch.float64), a @ a.T + 0.1 * torch.eye(4, dtype=torch.float64)
    gain = cov[2:, :2] @ cov[:2, :2].inverse()

    def p(z):
        return MultivariateNormal(mean[2:] + (z - mean[:2]) @ gain.T, cov[2:, 2:] - gain @ cov[:2, 2:])

    flow = Flow(MultivariateNormal(mean[:2], cov[:2, :2]), Split(p, 2))
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    joint = MultivariateNormal(mean, cov)
    torch.testing.assert_close(flow.log_prob(x), joint.log_prob(x), **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(Flow(flow.base, Spoilt(flow.transform)).log_prob(x), joint.log_prob(x), **CLOSE)
    # Samples: each whitened coordinate is standard normal; Kolmogorov-Smirnov, a right answer fails with probability 4e-6.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (flow.sample(4000) - mean).T, upper=False)
    assert all(stats.kstest(row.numpy(), "norm").pvalue > 1e-6 for row in white)


def test_split_integrates_to_one_and_inverts():
    layer = split(2, 1)
    integrates_to_one(Flow(StandardNormal(1).double(), layer), -9, 9)
    with pytest.raises(AssertionError):
        integrates_to_one(Flow(StandardNormal(1).double(), Spoilt(layer)), -9, 9)
    layer, z = split(), torch.randn(4, 3, 2, dtype=torch.float64)
    x = layer.inverse(z)
    assert x.shape == (4, 3, 5) and torch.equal(layer(x)[0], z) and not torch.equal(x, layer.inverse(z))
    assert layer(x)[1].shape == (4, 3)
    # An unconditional p is taken for every row, and each row gets a draw of its own.
    x = Split(lambda z: normal(torch.zeros(3).double(), 1.0), 2).inverse(z)
    assert x[..., 2:].reshape(12, 3).unique(dim=0).shape == (12, 3)


# --- exact: Abs

def test_abs_of_a_folded_normal_is_the_normal():
    """For x ~ N(m, 1), |x| is folded normal and the sign's log-odds given |x| = z is 2 m z."""
    mean = tensor(0.7, -1.3, 0.0)
    flow = Flow(FoldedNormal(mean), Abs(lambda z: 2 * mean * z))
    x = 2 * torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), normal(mean, 1.0).log_prob(x), **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(Flow(flow.base, Spoilt(flow.transform)).log_prob(x), normal(mean, 1.0).log_prob(x), **CLOSE)
    # Samples have the signs back; Kolmogorov-Smirnov, a right answer fails with probability 3e-6.
    samples = flow.sample(4000) - mean
    assert all(stats.kstest(column.numpy(), "norm").pvalue > 1e-6 for column in samples.T)


def test_abs_uniform_and_learnt_signs():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    z, contribution = Abs()(x)
    assert torch.equal(z, x.abs())
    torch.testing.assert_close(contribution, torch.full((4, 3), -5 * math.log(2), dtype=torch.float64))
    half_normal = Independent(HalfNormal(torch.ones(2).double()), 1)
    learnt = Abs(randomise(MLP(2, 2, hidden=(16,))))
    for layer in (Abs(), learnt):
        integrates_to_one(Flow(half_normal, layer), -8, 8)
        with pytest.raises(AssertionError):
            integrates_to_one(Flow(half_normal, Spoilt(layer)), -8, 8)
    z = torch.rand(1000, 2, dtype=torch.float64)
    assert torch.equal(learnt(learnt.inverse(z))[0], z)
    flow = Flow(half_normal, learnt)
    x, log_prob = flow.sample_and_log_prob(100)
    torch.testing.assert_close(log_prob, flow.log_prob(x), **CLOSE)
    log_prob.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in learnt.parameters())


# --- exact: Max

def test_max_of_negative_exponentials():
    """For independent x_i = -Exp(1): max x is -Exp(D), and the others lie an independent Exp(1) below it."""
    for dim in (2, 5):
        flow = Flow(negative_exponential(float(dim)), Max(Exponential(tensor(1.0).squeeze()), dim))
        x = -Exponential(1.0).sample((3, 20, dim)).double()
        torch.testing.assert_close(flow.log_prob(x), x.sum(-1), **CLOSE)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(Flow(flow.base, Spoilt(flow.transform)).log_prob(x), x.sum(-1), **CLOSE)
        # Kolmogorov-Smirnov on every coordinate of the samples, a right answer fails with probability 7e-6.
        assert all(stats.kstest(-column.numpy(), "expon").pvalue > 1e-6 for column in flow.sample(4000).T)


@pytest.mark.parametrize("excess", [HalfNormal(tensor(0.8).squeeze()), Gamma(tensor(2.5).squeeze(), 1.5),
                                    LogNormal(tensor(0.0, -0.5), 0.6), HalfNormal(tensor(0.5, 1.5))],
                         ids=["half-normal", "gamma", "log-normal, each", "half-normal, each"])
def test_max_is_the_sum_over_the_places_of_the_largest(excess):
    """Brute force: which k was drawn is summed over, with density zero where an excess would be negative."""
    layer, base = Max(excess, 2), StandardNormal(1).double()
    x = torch.randn(200, 2, dtype=torch.float64)
    want = torch.zeros(200, dtype=torch.float64)
    for k in range(2):
        gap = x[:, k] - x[:, 1 - k]
        scores = excess.log_prob(gap.abs()[:, None].expand(-1, 2))[:, 1 - k].exp()
        want += 0.5 * base.log_prob(x[:, k:k + 1]).exp() * scores * (gap > 0)
    torch.testing.assert_close(Flow(base, layer).log_prob(x).exp(), want, **CLOSE)
    integrates_to_one(Flow(base, layer), -12, 9, n=700, off=0.5)
    with pytest.raises(AssertionError):
        integrates_to_one(Flow(base, Spoilt(layer)), -12, 9, n=700, off=0.5)


def test_max_inverse():
    layer, z = Max(Gamma(torch.tensor([2.0, 3.0, 4.0]), 1.0)), torch.randn(5000, 2, 1)
    x = layer.inverse(z)
    assert x.shape == (5000, 2, 3) and x.dtype == torch.float32 and torch.equal(layer(x)[0], z)
    # The place is uniform: chi-square, a right answer fails with probability 1e-6.
    assert stats.chisquare(np.bincount(x.argmax(-1).flatten().numpy(), minlength=3)).pvalue > 1e-6
    assert Max(Exponential(1.0), 4).inverse(z).shape == (5000, 2, 4)
    x, contribution = layer.inverse_and_ldj(z)
    torch.testing.assert_close(contribution, layer(x)[1])


# --- exact: Sort

@pytest.mark.parametrize("dim", [2, 5])
def test_sort_of_order_statistics_is_the_independent_sample(dim):
    flow, x = Flow(OrderStatistics(dim), Sort()), torch.randn(3, 20, dim, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), Normal(0.0, 1.0).log_prob(x).sum(-1), **CLOSE)
    z, contribution = flow.transform(x)
    assert torch.equal(z, x.sort(-1).values) and contribution.shape == (3, 20)
    torch.testing.assert_close(contribution, torch.full((3, 20), -math.log(math.factorial(dim)), dtype=torch.float64))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(Flow(flow.base, Spoilt(Sort())).log_prob(x), Normal(0.0, 1.0).log_prob(x).sum(-1), **CLOSE)


def test_sort_integrates_to_one_and_draws_every_permutation():
    integrates_to_one(Flow(OrderStatistics(2), Sort()), -7, 7)
    z = torch.arange(3.0).expand(12_000, 3)
    x = Sort().inverse(z)
    assert torch.equal(Sort()(x)[0], z)
    # Six permutations alike: chi-square, a right answer fails with probability 1e-6.
    counts = np.unique((x @ torch.tensor([9.0, 3.0, 1.0])).numpy(), return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-6


# --- bounds: Slice

def test_slice_is_a_bound_whose_exp_has_the_right_mean():
    """x, z2 jointly Gaussian with correlation r, q(z2 | x) Gaussian; tight for q = p(z2 | x) = N(r x, 1 - r^2)."""
    r, nodes = 0.8, gauss_hermite(80)
    base = MultivariateNormal(torch.zeros(2).double(), tensor([1, r], [r, 1]))
    for x0 in (-1.0, 0.4, 2.0):
        x = tensor([x0]).expand(80, 1)
        exact = Normal(0.0, 1.0).log_prob(tensor(x0).squeeze())
        for mean, std, tight in ((r * x, math.sqrt(1 - r * r), True), (0.3 + 0.5 * x, 1.1, False)):
            flow = Flow(base, Slice(lambda x: draw(AtNodes(mean, std, nodes[0])), 1))
            estimate = flow.log_prob(x, bound=True)
            mean_of_log, mean_of_exp = (nodes[1] * estimate).sum(), (nodes[1] * estimate.exp()).sum()
            torch.testing.assert_close(mean_of_exp.log(), exact, rtol=1e-6, atol=1e-6)
            if tight:
                torch.testing.assert_close(estimate, exact.expand(80), **CLOSE)
            else:
                assert mean_of_log < exact - 0.1
            spoilt = Flow(base, Spoilt(flow.transform)).log_prob(x, bound=True)
            assert abs(((nodes[1] * spoilt.exp()).sum().log() - exact).item()) > 0.01


def test_slice_augments_any_flow_and_cuts_it_off_again():
    q = Conditional(3, 2)
    layer = Slice(lambda x: draw(q(x)), 3)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    z, contribution = layer(x)
    assert z.shape == (4, 6, 5) and contribution.shape == (4, 6) and torch.equal(layer.inverse(z), x)
    torch.testing.assert_close(contribution, -q(x).log_prob(z[..., 3:]))
    flow = Flow(StandardNormal(5).double(), Compose([layer, randomise(Coupling(MLP(2, 6))), Reverse()]))
    assert not flow.exact and flow.sample(7).shape == (7, 3)
    flow.log_prob(x, bound=True).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in q.parameters())


# --- bounds: Argmax

def test_argmax_is_a_bound_whose_exp_has_the_right_mean():
    """Two classes, z ~ N(m, I): P(x = 1) = Phi((m_1 - m_0) / sqrt 2). Three: a one-dimensional integral."""
    for m, n in ((tensor(0.3, -0.5), 60), (tensor(0.3, -0.5, 0.8), 40)):
        K = len(m)
        nodes, weights = gauss_hermite(n, K)
        base = normal(m, 1.0)
        line = torch.linspace(-9, 9, 4001).double()
        for c in range(K):
            others = [Normal(m[i], 1.0).cdf(line) for i in range(K) if i != c]
            exact = torch.trapezoid(Normal(m[c], 1.0).log_prob(line).exp() * torch.stack(others).prod(0), line)
            if K == 2:
                torch.testing.assert_close(exact, Normal(0.0, 1.0).cdf((m[c] - m[1 - c]) / math.sqrt(2)), rtol=1e-6, atol=1e-6)
            x = torch.full((len(nodes),), c)
            # Wide enough for the importance weights to have a small variance.
            mean = m + 0.7 * torch.eye(K).double()[c]
            layer = Argmax(lambda x: draw(AtNodes(mean, 1.4, nodes)))
            flow = Flow(base, layer)
            estimate = flow.log_prob(x, bound=True)
            torch.testing.assert_close((weights * estimate.exp()).sum(), exact, rtol=5e-3, atol=0)
            assert (weights * estimate).sum() < exact.log() - 0.05
            assert torch.equal(layer.inverse(layer(x)[0]), x)
            spoilt = (weights * Flow(base, Spoilt(layer)).log_prob(x, bound=True).exp()).sum()
            assert abs(spoilt / exact - 1) > 0.05


def test_argmax_is_tight_for_the_ideal_q():
    """Two classes: given argmax z = x the gap d = z_x - z_i is a truncated normal and the sum an independent normal."""
    m = tensor(0.3, -0.5)
    gap = (m[1] - m[0]).item()
    root = math.sqrt(2)

    def q(x):
        sign = 2 * x - 1.0
        u, total = torch.rand(len(x), dtype=torch.float64), Normal(m.sum(), root).sample((len(x),))
        # d = sign (z_1 - z_0) > 0 is N(sign gap, 2) above zero.
        p_positive = Normal(0.0, 1.0).cdf(sign * gap / root)
        d = sign * gap + root * Normal(0.0, 1.0).icdf(1 - u * p_positive)
        v_x = (total + d) / 2
        v_i = v_x - torch.log(torch.expm1(d))
        # Density of (d, total), which is half of that of (z_x, z_i), then log |dz_i / dv_i|.
        log_q = Normal(sign * gap, root).log_prob(d) - p_positive.log() + Normal(m.sum(), root).log_prob(total) + math.log(2)
        log_q = log_q + torch.nn.functional.logsigmoid(v_x - v_i)
        return torch.where(x[:, None] == torch.arange(2), v_x[:, None], v_i[:, None]), log_q

    x = torch.randint(2, (300,))
    want = Normal(0.0, 1.0).cdf((2 * x - 1.0).double() * gap / root).log()
    torch.testing.assert_close(Flow(normal(m, 1.0), Argmax(q)).log_prob(x, bound=True), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax_never_loses_its_class(dtype):
    """Also where softplus(v_x - v_i) is far below the rounding of v_x, and for every integer dtype and batch shape."""
    x = torch.randint(5, (20_000, 3), dtype=torch.uint8)
    v = (30 * torch.randn(20_000, 3, 5)).to(dtype).requires_grad_()
    layer = Argmax(lambda x: (v, v.sum((-2, -1))))
    z, contribution = layer(x)
    assert torch.equal(layer.inverse(z), x.long()) and contribution.shape == (20_000,)
    assert z.dtype == contribution.dtype == dtype and torch.isfinite(contribution).all()
    top = z.gather(-1, x.long()[..., None])
    assert ((z < top).sum(-1) == 4).all()
    # A step of v_x moves z_x by itself and z_i by 1 - sigmoid(v_x - v_i), one of v_i by the rest, wherever z_i was rounded.
    grad, = torch.autograd.grad(z.sum(), v)
    top = v.gather(-1, x.long()[..., None])
    is_x = torch.nn.functional.one_hot(x.long(), 5).bool()
    want = torch.sigmoid(top - v).masked_fill(is_x, 0)
    want = torch.where(is_x, 1 + (torch.sigmoid(v - top).masked_fill(is_x, 0)).sum(-1, True), want)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_argmax_contribution_is_autograds():
    """-log q(z | x) with the density of z got from that of v by autograd's Jacobian; and log_q for each place or for all."""
    v = torch.randn(2, 4, 3, dtype=torch.float64)
    x = torch.randint(3, (2, 4))

    def z_of(v):
        return Argmax(lambda x: (v, v.new_zeros(2)))(x)[0]

    jacobian = torch.autograd.functional.jacobian(z_of, v).reshape(24, 24)
    joint, each = (Argmax(lambda x: (v, log_q))(x)[1] for log_q in (torch.zeros(2).double(), torch.zeros(2, 4).double()))
    torch.testing.assert_close(joint.sum(), torch.linalg.slogdet(jacobian)[1], **CLOSE)
    assert joint.shape == (2,) and each.shape == (2, 4)
    torch.testing.assert_close(each.sum(-1), joint, **CLOSE)


# --- bounds: VAELayer

def linear_gaussian():
    """z ~ N(0, I) on R^2, x | z ~ N(W z + b, s^2 I) on R^3; its evidence N(b, W W^T + s^2 I) and posterior."""
    W, b, s = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64), 0.7
    precision = torch.eye(2).double() + W.T @ W / s ** 2
    evidence = MultivariateNormal(b, W @ W.T + s ** 2 * torch.eye(3).double())
    decoder = lambda z: normal(z @ W.T + b, s)  # noqa: E731
    posterior = lambda x: MultivariateNormal((x - b) @ W @ precision.inverse() / s ** 2, precision_matrix=precision)  # noqa: E731
    return evidence, decoder, posterior


def test_vae_layer_is_exact_for_the_exact_posterior():
    evidence, decoder, posterior = linear_gaussian()
    x = 2 * torch.randn(50, 3, dtype=torch.float64)
    flow = Flow(StandardNormal(2).double(), VAELayer(posterior, decoder))
    torch.testing.assert_close(flow.log_prob(x, bound=True), evidence.log_prob(x), **CLOSE)
    # Samples: whitened by the evidence, Kolmogorov-Smirnov, a right answer fails with probability 3e-6.
    root = torch.linalg.cholesky(evidence.covariance_matrix)
    white = torch.linalg.solve_triangular(root, (flow.sample(4000) - evidence.mean).T, upper=False)
    assert all(stats.kstest(row.numpy(), "norm").pvalue > 1e-6 for row in white)


def test_vae_layer_is_a_bound_whose_exp_has_the_right_mean():
    evidence, decoder, posterior = linear_gaussian()
    nodes, weights = gauss_hermite(60, 2)
    x = torch.randn(3, dtype=torch.float64)
    mean, std = posterior(x[None]).mean + 0.2, 1.5 * posterior(x[None]).stddev
    layer = VAELayer(lambda x: AtNodes(mean, std, nodes), decoder)
    estimate = Flow(StandardNormal(2).double(), layer).log_prob(x.expand(len(nodes), 3), bound=True)
    exact = evidence.log_prob(x)
    torch.testing.assert_close((weights * estimate.exp()).sum().log(), exact, rtol=1e-5, atol=1e-5)
    # The gap is KL(q || p(z | x)), in closed form.
    gap = torch.distributions.kl_divergence(MultivariateNormal(mean[0], torch.diag(std[0] ** 2)), posterior(x))
    torch.testing.assert_close((weights * estimate).sum(), exact - gap, rtol=1e-6, atol=1e-6)
    spoilt = Flow(StandardNormal(2).double(), Spoilt(layer)).log_prob(x.expand(len(nodes), 3), bound=True)
    assert abs((weights * spoilt).sum() - (exact - gap)) > 0.1


def test_vae_layer_trains_and_takes_events_of_any_rank():
    encoder, decoder = Conditional(4, 2), Conditional(2, 4)
    image = lambda z: Independent(Normal(decoder(z).mean.unflatten(-1, (1, 2, 2)), 1.0), 3)  # noqa: E731
    layer = VAELayer(lambda x: encoder(x.flatten(1)), image)
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    z, contribution = layer(x)
    assert z.shape == (5, 2) and contribution.shape == (5,) and layer.inverse(z).shape == x.shape
    flow = Flow(StandardNormal(2).double(), layer)
    flow.log_prob(x, bound=True).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())


# --- the contract

EXACT = {"split": (split, 5, 2), "abs": (Abs, 4, 4), "max": (lambda: Max(Exponential(1.0), 4), 4, 1), "sort": (Sort, 4, 4)}
BOUNDS = {"slice": lambda: Slice(lambda x: draw(normal(torch.zeros_like(x), 1.0)), 3),
          "argmax": lambda: Argmax(lambda x: (torch.zeros(len(x), 3), torch.zeros(len(x)))),
          "vae": lambda: VAELayer(lambda x: normal(x, 1.0), lambda z: normal(z, 1.0))}


@pytest.mark.parametrize("name", EXACT)
def test_exact_layers(name):
    make, dim, latent = EXACT[name]
    layer = make()
    assert (layer.bijective, layer.surjective, layer.stochastic, layer.exact) == (False, True, False, True)
    with pytest.raises(ValueError, match="must be bijective to be turned round"):
        Inverse(layer)
    for dtype in (torch.float32, torch.float64):
        layer = make().to(dtype)
        x = torch.randn(6, dim, dtype=dtype)
        # torch's Independent has no log_prob for an empty batch, so Split has none either.
        for batch in (x, x[0], x.reshape(2, 3, dim), *([] if name == "split" else [x[:0]])):
            before = batch.clone()
            z, contribution = layer(batch)
            assert z.shape == (*batch.shape[:-1], latent) and contribution.shape == batch.shape[:-1]
            assert z.dtype == contribution.dtype == dtype and torch.equal(batch, before)
            before, back = z.clone(), layer.inverse(z)
            assert back.shape == batch.shape and back.dtype == dtype and torch.equal(z, before)
            assert torch.equal(layer(back)[0], z)
        for i in range(6):
            torch.testing.assert_close(layer(x[i:i + 1])[1][0], layer(x)[1][i])
    compose = Compose([layer, Reverse()])
    assert compose.exact and compose.surjective and not compose.bijective
    x = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.forward, x)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_not_passed_off_as_likelihoods(name):
    layer = BOUNDS[name]()
    flags = (False, False, True) if name == "vae" else (False, True, False)
    assert (layer.bijective, layer.surjective, layer.stochastic) == flags and not layer.exact
    x = torch.zeros(4, dtype=torch.long) if name == "argmax" else torch.randn(4, 3)
    flow = Flow(StandardNormal(6 if name == "slice" else 3), Compose([layer, Reverse()]))
    assert not flow.exact and flow.log_prob(x, bound=True).shape == (4,) and flow.sample(5).shape[:1] == (5,)
    with pytest.raises(ValueError, match="pass bound=True"):
        flow.log_prob(x)
    with pytest.raises(NotImplementedError, match=f"^{type(layer).__name__} has no inverse_and_ldj, because at a z that"):
        flow.sample_and_log_prob(3, bound=True)
    with pytest.raises(ValueError, match="must be bijective to be turned round"):
        Inverse(layer)


def test_context_reaches_the_nets():
    x, context = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    p = Conditional(3, 2)
    assert Split(p, 1)(x, context)[1].shape == (6,) and Split(p, 1).inverse(x[:, :1], context).shape == (6, 3)
    log_odds = lambda z, context: z[:, :2] * context  # noqa: E731
    assert Abs(log_odds)(x[:, :2], context)[1].shape == (6,) and Abs(log_odds).inverse(x[:, :2].abs(), context).shape == (6, 2)
    assert Slice(lambda x, c: draw(Conditional(5, 2)(x, c)), 3)(x, context)[0].shape == (6, 5)
    assert Argmax(lambda x, c: (c, c.sum(-1)))(torch.zeros(6, dtype=torch.long), context)[0].shape == (6, 2)
    vae = VAELayer(Conditional(5, 2), Conditional(4, 3))
    assert vae.inverse(vae(x, context)[0], context).shape == (6, 3)


# --- bad input

def test_bad_input_is_told_in_one_sentence():
    x = torch.randn(4, 3)
    for layer in (Abs(), Sort(), Max(Exponential(1.0)), split(), BOUNDS["slice"]()):
        with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
            layer(torch.zeros(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="^z must be an absolute value, so not negative, got -1; choose a base on z >= 0$"):
        Abs().inverse(torch.tensor([[2.0, -1.0]]))
    with pytest.raises(ValueError, match="^z must be sorted in ascending order, got a row that is not; choose a base"):
        Sort().inverse(torch.tensor([[2.0, 3.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match=r"^dim must be given, as Max\(excess, dim\), to sample x .*, got None$"):
        Max(Exponential(1.0)).inverse(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"^excess must be a distribution of single numbers, .* and event_shape \(3,\)$"):
        Max(Independent(Exponential(torch.ones(3)), 1))
    with pytest.raises(ValueError, match=r"with D = 2, got \(4, 3\)$"):
        Max(Exponential(1.0), 2)(x)
    with pytest.raises(ValueError, match=r"with D >= 3, got \(4, 2\)$"):
        split(3, 2)(x[:, :2].double())
    with pytest.raises(ValueError, match=r"^p must return .* \(4,\) and event_shape \(2,\), got \(4, 2\) and \(\)"):
        Split(lambda z: Normal(torch.zeros(4, 2), 1.0), 1)(x)
    for shape in ((4, 1), (4, 3)):
        with pytest.raises(ValueError, match="^p must return a distribution of"):
            Split(lambda z: normal(torch.zeros(shape), 1.0), 1)(x)
    with pytest.raises(ValueError, match="^p must return a distribution of"):
        Split(lambda z: Normal(torch.zeros(4, 2), 1.0), 1).inverse(x[:, :1])
    for log_q in (torch.zeros(4, 1), torch.zeros(())):
        with pytest.raises(ValueError, match=r"^q must return \(sample, log_q\) that both start with the batch \(4,\) and"):
            Slice(lambda x: (x, log_q), 3)(x)
    with pytest.raises(ValueError, match=r"with D >= 3, got \(4, 2\)$"):
        Slice(lambda x: (x, x.sum(-1)), 3).inverse(x[:, :2])
    classes = torch.tensor([0, 1, 2, 2])
    with pytest.raises(TypeError, match="^x must be a tensor of integer dtype, such as torch.long, got dtype torch.float32$"):
        BOUNDS["argmax"]()(classes.float())
    with pytest.raises(ValueError, match=r"^x must hold integers in 0 \.\. 1, got values from 0 to 2$"):
        Argmax(lambda x: (torch.zeros(4, 2), torch.zeros(4)))(classes)
    with pytest.raises(ValueError, match=r"^q must return v of shape \(4, 'K'\) for x of shape \(4,\), got \(4,\)$"):
        Argmax(lambda x: (torch.zeros(4), torch.zeros(4)))(classes)
    with pytest.raises(ValueError, match=r"^q must return \(sample, log_q\)"):
        Argmax(lambda x: (torch.zeros(4, 3), torch.zeros(4, 1)))(classes)
    with pytest.raises(FloatingPointError, match="^Argmax: z has 1 non-finite values out of 3"):
        BOUNDS["argmax"]().inverse(torch.tensor([[0.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"^encoder must return .* \(4,\) and event_shape \(3,\), got \(4, 3\) and \(\)"):
        VAELayer(lambda x: Normal(x, 1.0), lambda z: normal(z, 1.0))(x)
    with pytest.raises(ValueError, match="^decoder must return a distribution of batch_shape"):
        VAELayer(lambda x: normal(x, 1.0), lambda z: normal(z[:, :2], 1.0))(x)
