"""Modular and integer flows: bijections by enumeration, masses that sum to one, straight-through gradients that train."""
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from layer_laws import input_is_untouched, round_trip, rows_do_not_mix, shape_and_dtype
from scipy import stats
from torch import nn
from torch.nn.functional import one_hot

from flowkit.core import Compose, Flow
from flowkit.coupling import Coupling
from flowkit.discrete import (DiscretisedLogistic, FactorisedCategorical, IDFCoupling, ModularCoupling, RoundedShift,
                              modular_shift, modular_unshift, one_hot_argmax_st, round_st)
from flowkit.linear import Reverse
from flowkit.nets import MLP


def randomise(module, seed=1, gain=1.0):
    """Weights whose nets put out numbers of order `gain`, in float64."""
    g = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(gain * torch.randn(p.shape, generator=g, dtype=p.dtype) / math.sqrt(p.shape[-1] if p.ndim > 1 else 1))
    return module


def states(dim, K):
    """All K^dim one-hot states, (K^dim, dim, K)."""
    return one_hot(torch.tensor(list(itertools.product(range(K), repeat=dim))), K).double()


def grid(low, high, dim=2):
    return torch.cartesian_prod(*[torch.arange(low, high + 1, dtype=torch.float64)] * dim)


def modular(dim, K, scale, flip=False, seed=1):
    d = dim // 2
    return randomise(ModularCoupling(MLP(d * K, (1 + scale) * (dim - d) * K, hidden=(16,)), scale=scale, flip=flip), seed, gain=3)


def idf(dim, seed=1):
    return randomise(IDFCoupling(MLP(dim // 2, dim - dim // 2, hidden=(16,))), seed, gain=3)


# --- the exercises' functions

@pytest.mark.parametrize("K", [1, 2, 4, 6, 7])
def test_modular_shift_is_a_bijection_for_every_mu_and_sigma(K):
    x = torch.arange(K)
    for mu, sigma in itertools.product(range(-K, 2 * K), range(-K, 2 * K)):
        if math.gcd(sigma, K) != 1:
            with pytest.raises(ValueError, match=f"^sigma must be coprime to K = {K} everywhere, got .* modulo {K}$"):
                modular_shift(x, mu, sigma, K)
            with pytest.raises(ValueError, match="^sigma must be coprime"):
                modular_unshift(x, mu, sigma, K)
            continue
        z = modular_shift(x, mu, sigma, K)
        assert z.tolist() == [(mu + sigma * i) % K for i in range(K)] and sorted(z.tolist()) == list(range(K))
        assert torch.equal(modular_unshift(z, mu, sigma, K), x)


def test_modular_shift_takes_tensors_and_small_dtypes():
    x = torch.randint(250, (5, 3), dtype=torch.uint8)
    mu, sigma = torch.randint(-300, 300, (5, 3)), torch.tensor([1, 3, 249])
    z = modular_shift(x, mu, sigma, 250)
    assert z.dtype == torch.uint8 and torch.equal(z.long(), (mu + sigma * x.long()) % 250)
    assert torch.equal(modular_unshift(z, mu, sigma, 250), x)
    with pytest.raises(ValueError, match=r"sigma must be coprime to K = 4 everywhere, got \[1, 2\] modulo 4"):
        modular_shift(torch.tensor([0, 1]), 0, torch.tensor([1, 2]), 4)
    with pytest.raises(TypeError, match="^x must be a tensor of integer dtype, such as torch.long, got dtype torch.float32$"):
        modular_shift(torch.zeros(3), 0, 1, 4)
    with pytest.raises(ValueError, match=r"^z must hold integers in 0 \.\. 3, got values from 0 to 4$"):
        modular_unshift(torch.arange(5), 0, 1, 4)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_one_hot_argmax_st(tau):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64)
    out = one_hot_argmax_st(logits, tau)
    assert torch.equal(out.detach(), one_hot(logits.argmax(-1), 4).double())
    got, = torch.autograd.grad((out * weight).sum(), logits)
    want, = torch.autograd.grad((torch.softmax(logits / tau, -1) * weight).sum(), logits)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 1e-3


def test_round_st():
    x = torch.tensor([-2.5, -0.7, -0.5, 0.0, 0.49999997, 0.5, 1.5, 1e7 + 1, 2.0 ** 23 - 0.5], requires_grad=True)
    y = round_st(x)
    assert torch.equal(y.detach(), x.detach().round())
    assert torch.autograd.grad((3 * y).sum(), x)[0].tolist() == [3] * len(x)


# --- modular flows

@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dim, K", [(2, 4), (2, 7), (3, 6), (4, 3)])
def test_modular_coupling_permutes_the_states_exactly(dim, K, scale, flip):
    layer, x = modular(dim, K, scale, flip), states(dim, K)
    z, ldj = layer(x)
    assert ldj.shape == (K ** dim,) and ldj.dtype == x.dtype and (ldj == 0).all()
    assert ((z == 0) | (z == 1)).all() and torch.equal(z.unique(dim=0), x.unique(dim=0))
    assert torch.equal(layer.inverse(z), x) and torch.equal(layer(layer.inverse(x))[0], x)
    back, ldj = layer.inverse_and_ldj(z)
    assert torch.equal(back, x) and (ldj == 0).all()
    # Not the identity, so the equalities above say something; and the half that gives passes unchanged.
    fixed = slice(dim - dim // 2, None) if flip else slice(None, dim // 2)
    assert not torch.equal(z, x) and torch.equal(z[:, fixed], x[:, fixed])


@pytest.mark.parametrize("scale", [False, True])
def test_modular_coupling_is_modular_shift_of_the_nets_argmax(scale):
    dim, K = 5, 6
    layer, x = modular(dim, K, scale), one_hot(torch.randint(6, (50, 5)), 6).double()
    logits = layer.net(x[:, :2].flatten(1)).reshape(50, 1 + scale, 3, K)
    mu, sigma = logits[:, 0].argmax(-1), torch.ones(50, 3, dtype=torch.long)
    if scale:
        coprime = torch.tensor([math.gcd(s, K) == 1 for s in range(K)])
        sigma = torch.where(coprime, logits[:, 1], -math.inf).argmax(-1)
        assert len(sigma.unique()) > 1
    assert len(mu.unique()) > 3
    want = modular_shift(x[:, 2:].argmax(-1), mu, sigma, K)
    assert torch.equal(layer(x)[0][:, 2:].argmax(-1), want)


@pytest.mark.parametrize("scale", [False, True])
def test_modular_flow_sums_to_one_over_all_states(scale):
    for dim, K in ((2, 5), (3, 4), (2, 6)):
        base = randomise(FactorisedCategorical(dim, K))
        flow = Flow(base, Compose([modular(dim, K, scale), modular(dim, K, scale, True, 2), modular(dim, K, scale, seed=3)]))
        x = states(dim, K)
        log_prob = flow.log_prob(x)
        assert flow.exact and log_prob.shape == (K ** dim,)
        torch.testing.assert_close(log_prob.exp().sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(base.log_prob(x).exp().sum(), torch.ones((), dtype=torch.float64))
        # The same masses as the base's, on renamed states.
        torch.testing.assert_close(log_prob.sort().values, base.log_prob(x).sort().values)
        # The check can fail: a contribution of one is seen.
        with pytest.raises(AssertionError):
            torch.testing.assert_close((log_prob + 1).exp().sum(), torch.ones((), dtype=torch.float64))


def test_modular_flow_samples_what_it_says():
    """Chi-square of 20,000 samples on 36 states; a right answer fails with probability 1e-6."""
    flow = Flow(randomise(FactorisedCategorical(2, 6)), Compose([modular(2, 6, True), modular(2, 6, True, True)]))
    x = states(2, 6)
    samples, n = flow.sample(20_000), 20_000
    assert samples.shape == (n, 2, 6) and samples.dtype == torch.float64
    counts = torch.bincount((samples.argmax(-1) * torch.tensor([6, 1])).sum(-1), minlength=36)
    expected = n * flow.log_prob(x).exp().detach().numpy()
    assert expected.min() > 5 and stats.chisquare(counts.numpy(), expected).pvalue > 1e-6
    points, log_prob = flow.sample_and_log_prob(10)
    torch.testing.assert_close(log_prob, flow.log_prob(points))


def test_straight_through_gradients_pass_through_several_layers():
    for scale in (False, True):
        flow = Flow(randomise(FactorisedCategorical(4, 5)), Compose([modular(4, 5, scale), modular(4, 5, scale, True, 2)]))
        x = one_hot(torch.randint(5, (64, 4)), 5).double().requires_grad_()
        flow.log_prob(x).sum().backward()
        for name, p in flow.named_parameters():
            assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
        assert x.grad.abs().sum() > 0


def test_the_gradient_in_mu_is_the_gain_of_each_shift():
    """d log p / d mu_k is what log p would be had the shift been k, the quantity that straight-through estimation relies on."""
    K = 5
    base = randomise(FactorisedCategorical(2, K))
    logits = torch.randn(1, K, dtype=torch.float64, requires_grad=True)
    tau = 0.7
    x = one_hot(torch.tensor([[1, 3]]), K).double()
    Flow(base, ModularCoupling(lambda x1: logits, tau=tau)).log_prob(x).sum().backward()
    with torch.no_grad():
        gain = torch.stack([base.log_prob(one_hot(torch.tensor([1, (3 + k) % K]), K).double()) for k in range(K)])
    leaf = logits.detach().clone().requires_grad_()
    (torch.softmax(leaf[0] / tau, -1) * gain).sum().backward()
    torch.testing.assert_close(logits.grad, leaf.grad)


class ByContext(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.net = nn.Linear(3, d)

    def forward(self, x1, context):
        return self.net(context)


def test_context_reaches_the_nets():
    context = torch.randn(8, 3)
    for layer, x in ((ModularCoupling(ByContext(5)), one_hot(torch.randint(5, (8, 2)), 5).float()),
                     (IDFCoupling(ByContext(1)), torch.randint(9, (8, 2)).float())):
        z, ldj = layer(x, context)
        assert torch.equal(layer.inverse(z, context), x) and ldj.tolist() == [0] * 8


# --- integer flows

@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("law", [round_trip, shape_and_dtype, rows_do_not_mix, input_is_untouched], ids=lambda law: law.__name__)
def test_law(law, dim):
    x = torch.randint(-9, 9, (6, dim)).double()
    law(idf(dim), x)
    law(Compose([idf(dim), Reverse(), idf(dim, 2)]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_idf_is_an_exact_bijection_of_integers(dtype):
    layer = Compose([idf(4), Reverse(), idf(4, 2)]).to(dtype)
    x = torch.randint(-1000, 1000, (5000, 4)).to(dtype)
    z, ldj = layer(x)
    assert torch.equal(z, z.round()) and (ldj == 0).all() and z.dtype == dtype
    assert torch.equal(layer.inverse(z), x) and torch.equal(layer(layer.inverse(x))[0], x)
    assert not torch.equal(z.flip(-1), x)


def test_idf_adds_the_rounded_net():
    layer, x = idf(5), torch.randint(-5, 6, (7, 5))
    z, ldj = layer(x)
    assert z.dtype == torch.float64 and z.requires_grad
    want = torch.cat([x[:, :2].double(), x[:, 2:] + layer.net(x[:, :2].double()).round()], 1)
    torch.testing.assert_close(z.detach(), want.detach())
    assert torch.equal(layer.inverse(z.long()).detach(), x.double())
    assert torch.equal(Coupling(layer.net, RoundedShift())(x.double())[0], z)
    # A net without weights does not say which float type it wants.
    assert IDFCoupling(lambda x1: 0.6 + x1)(torch.tensor([[1, 2]]))[0].tolist() == [[1, 4]]


@pytest.mark.parametrize("components", [1, 3])
def test_idf_sums_to_one_over_the_integers(components):
    base = randomise(DiscretisedLogistic(2, components=components))
    flow = Flow(base, Compose([idf(2), Reverse(), idf(2, 2)]))
    for model in (base, flow):
        log_prob = model.log_prob(grid(-150, 150))
        torch.testing.assert_close(log_prob.exp().sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-9)
        with pytest.raises(AssertionError):
            torch.testing.assert_close((log_prob + 1).exp().sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-9)
    assert flow.exact


def test_discretised_logistic_is_a_difference_of_scipys_cdfs():
    base = randomise(DiscretisedLogistic(2, components=3))
    m, s = base.means.detach().numpy(), base.log_scales.exp().detach().numpy()
    w = torch.softmax(base.logits, 0).detach().numpy()
    for z in (-30, -3, 0, 1, 4):
        point = torch.tensor([z, 2.0], dtype=torch.float64)
        parts = stats.logistic.cdf(point.numpy() + 0.5, m, s) - stats.logistic.cdf(point.numpy() - 0.5, m, s)
        np.testing.assert_allclose(base.log_prob(point).item(), np.log((w * parts).sum(0)).sum(), rtol=1e-9)


def test_discretised_logistic_keeps_its_tails_in_float32():
    """As the difference of sigmoids in 50 digits, on the side where both are small; the other side by symmetry."""
    for log_scale in (-6, -2, 0, 3, 10):
        base = DiscretisedLogistic(1)
        with torch.no_grad():
            base.log_scales.fill_(log_scale)
        points = [*range(40), 100, 200]
        with mpmath.workdps(50):
            s = mpmath.exp(log_scale)
            below = [1 / (1 + mpmath.exp((z + mpmath.mpf(k) / 2) / s)) for z in points for k in (-1, 1)]
            want = torch.tensor([float(mpmath.log(a - b)) for a, b in zip(below[::2], below[1::2])])
        for side in (1, -1):
            got = base.log_prob(side * torch.tensor(points)[:, None].float())
            assert torch.isfinite(got).all() and got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


def test_discretised_logistic_samples_what_it_says():
    """Chi-square of 20,000 samples, cells of expectation over 5; a right answer fails with probability 1e-6."""
    base, n = randomise(DiscretisedLogistic(2, components=2), seed=4), 20_000
    samples = base.sample((n,))
    assert samples.shape == (n, 2) and base.sample().shape == (2,) and base.sample((3, 4)).shape == (3, 4, 2)
    z = grid(-40, 40)
    expected = n * base.log_prob(z).exp().detach().numpy()
    counts = np.zeros_like(expected)
    inside = (samples.abs() <= 40).all(-1)
    np.add.at(counts, ((samples[inside] + 40) * torch.tensor([81, 1])).sum(-1).long().numpy(), 1)
    big = expected > 5
    assert big.sum() > 20
    observed, wanted = np.append(counts[big], n - counts[big].sum()), np.append(expected[big], n - expected[big].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-6


def test_bases_gradients_and_float_types():
    for base, z in ((DiscretisedLogistic(3, components=2), torch.randint(-4, 4, (5, 3)).float()),
                    (FactorisedCategorical(3, 4), one_hot(torch.randint(4, (5, 3)), 4).float())):
        z.requires_grad_()
        log_prob = base.log_prob(z)
        log_prob.sum().backward()
        assert log_prob.shape == (5,) and all(g.abs().sum() > 0 for g in (z.grad, *(p.grad for p in base.parameters())))
        assert base.sample((2,)).dtype == torch.float32 and base.double().sample((2,)).dtype == torch.float64
        assert not base.sample((2,)).requires_grad and base.sample((2,)).shape == (2, *base.event_shape)


# --- training through straight-through gradients

def train(flow, data, steps, lr=1e-2):
    optimiser = torch.optim.Adam(flow.parameters(), lr)
    for _ in range(steps):
        loss = -flow.log_prob(data[torch.randint(len(data), (256,))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return -flow.log_prob(data).mean().item()


def entropy(p):
    return -(p[p > 0] * p[p > 0].log()).sum().item()


def test_a_modular_flow_learns_a_correlation():
    """x2 = 5 x1 + noise mod 6: beyond the best factorised base, whose loss is the sum of the marginals' entropies."""
    torch.manual_seed(3)
    K, n = 6, 4000
    x1 = torch.multinomial(torch.tensor([.3, .25, .2, .12, .08, .05]), n, True)
    x2 = (5 * x1 + torch.multinomial(torch.tensor([.7, .2, .05, .02, .02, .01]), n, True)) % K
    joint = torch.bincount(K * x1 + x2, minlength=K * K).reshape(K, K) / n
    factorised = entropy(joint.sum(0)) + entropy(joint.sum(1))
    layers = [ModularCoupling(MLP(K, K, hidden=(32,)), flip=flip) for flip in (False, True)]
    flow = Flow(FactorisedCategorical(2, K), Compose(layers))
    loss = train(flow, one_hot(torch.stack([x1, x2], 1), K).float(), 400)
    assert entropy(joint) - 1e-4 < loss < factorised - 0.5, (entropy(joint), loss, factorised)


def test_an_integer_flow_learns_a_correlation():
    torch.manual_seed(0)
    x1 = (3 * torch.randn(4000)).round()
    data = torch.stack([x1, (x1 + 0.8 * torch.randn(4000)).round()], 1)
    n = [torch.unique(data[:, i], return_counts=True)[1] / 4000 for i in (0, 1)]
    flow = Flow(DiscretisedLogistic(2, components=2), Compose([IDFCoupling(MLP(1, 1, hidden=(32,))), Reverse(),
                                                               IDFCoupling(MLP(1, 1, hidden=(32,)))]))
    loss = train(flow, data, 400)
    joint = torch.unique(data, dim=0, return_counts=True)[1] / 4000
    factorised = entropy(n[0]) + entropy(n[1])
    assert entropy(joint) - 1e-4 < loss < factorised - 0.5, (entropy(joint), loss, factorised)


# --- bad input

def test_bad_input_is_told_in_one_sentence():
    layer = ModularCoupling(MLP(3, 3))
    with pytest.raises(TypeError, match=r"^x must be one-hot floats \(\.\.\., D, K\), got dtype torch.int64; one-hot encode "):
        layer(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="^z must be one-hot floats .* got list"):
        layer.inverse([0])
    for bad in (torch.zeros(4, 2, 3), torch.full((4, 2, 3), 1 / 3), torch.ones(4, 2, 3), torch.full((4, 2, 3), math.nan)):
        with pytest.raises(ValueError, match=r"^x must be one-hot over its last dimension, of shape \(\.\.\., D, K\), "
                                             r"got shape \(4, 2, 3\) with rows that are not one-hot$"):
            layer(bad)
    with pytest.raises(ValueError, match=r"got shape \(3,\)$"):
        layer(torch.zeros(3))
    good = one_hot(torch.zeros(4, 2, dtype=torch.long), 3).float()
    with pytest.raises(ValueError, match=r"^net must return a tensor of shape \(4, 6\) for x of shape .*, got \(4, 3\)$"):
        ModularCoupling(MLP(3, 3), scale=True)(good)
    with pytest.raises(FloatingPointError, match="^ModularCoupling: logits has 12 non-finite values out of 12$"):
        ModularCoupling(lambda x1: x1 * math.nan)(good)
    layer = IDFCoupling(MLP(1, 1))
    with pytest.raises(ValueError, match=r"^x must hold integers that torch.float32 can count to, got 0.5$"):
        layer(torch.tensor([[1.0, 0.5]]))
    with pytest.raises(ValueError, match="^z must hold integers .* got 16777216.0$"):
        layer.inverse(torch.tensor([[1.0, 2.0 ** 24]]))
    with pytest.raises(TypeError, match="^x must be a tensor that holds integers, got ndarray$"):
        layer(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"with D >= 2, got \(3, 1\)$"):
        layer(torch.zeros(3, 1))
    with pytest.raises(FloatingPointError, match="^IDFCoupling: params has 4 non-finite values out of 4$"):
        Compose([IDFCoupling(lambda x1: x1 * math.nan), IDFCoupling(MLP(1, 1))])(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"^z must have shape \(\.\.\., 2\), got \(4, 3\)$"):
        DiscretisedLogistic(2).log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="^z must hold integers"):
        DiscretisedLogistic(2).log_prob(torch.full((4, 2), 0.3))
    with pytest.raises(ValueError, match=r"^z must have shape \(\.\.\., 2, 4\), got \(4, 2, 3\)$"):
        FactorisedCategorical(2, 4).log_prob(good)
