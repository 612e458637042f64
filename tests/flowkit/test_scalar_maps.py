"""Scalar maps against closed forms and scipy, in the tails, and their inverse by bisection."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowkit import MLP, Affine, MixCoupling, MixLogitCDF, Shift, invert_increasing, mix_logit_cdf, mixture_cdf


def mixture(k=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = torch.softmax(torch.randn(k, generator=g, dtype=torch.float64), -1)
    means, log_scales = 2 * torch.randn(k, generator=g, dtype=torch.float64), torch.randn(k, generator=g, dtype=torch.float64) - 0.5
    return [p.to(dtype) for p in (weights, means, log_scales)]


def scipy_mixture(x, weights, means, log_scales):
    parts = stats.logistic(loc=means.numpy(), scale=log_scales.exp().numpy())
    w, x = weights.numpy(), x.numpy()[:, None]
    return (w * parts.cdf(x)).sum(-1), (w * parts.sf(x)).sum(-1), (w * parts.pdf(x)).sum(-1)


@pytest.mark.parametrize("k", [1, 4])
def test_mixture_against_scipy(k):
    x, p = torch.linspace(-12, 12, 97, dtype=torch.float64), mixture(k)
    cdf, sf, pdf = scipy_mixture(x, *p)
    z, ldj = mixture_cdf(x, *p)
    np.testing.assert_allclose(z.numpy(), cdf, rtol=1e-12)
    np.testing.assert_allclose(ldj.numpy(), np.log(pdf), rtol=1e-9, atol=1e-12)
    y, ldj = mix_logit_cdf(x, *p)
    np.testing.assert_allclose(y.numpy(), np.log(cdf / sf), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(ldj.numpy(), np.log(pdf / cdf / sf), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("f", [mixture_cdf, mix_logit_cdf])
def test_slope_is_autograds_and_parameters_broadcast(f):
    x = torch.linspace(-9, 9, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
    weights, means, log_scales = mixture()
    z, ldj = f(x, weights, means.expand(5, 3, 4), log_scales.expand(3, 4))
    assert z.shape == ldj.shape == x.shape
    slope, = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(ldj, slope.log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_mix_logit_cdf_keeps_its_tails_in_float32(seed):
    x, p = torch.linspace(-30, 30, 2401, dtype=torch.float64), mixture(seed=seed)
    exact = mix_logit_cdf(x.float().double(), *(q.float().double() for q in p))
    for got, want in zip(mix_logit_cdf(x.float(), *(q.float() for q in p)), exact):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_far_beyond_the_tails():
    x = torch.tensor([-1e4, -300, 300, 1e4])
    for value in (*mix_logit_cdf(x, *mixture(dtype=torch.float32)), *mixture_cdf(x, *mixture(dtype=torch.float32))):
        assert torch.isfinite(value).all()


def test_a_weight_of_zero_is_harmless():
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    means, log_scales = torch.tensor([5.0, -1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x = torch.tensor([0.5], dtype=torch.float64)
    y, ldj = mix_logit_cdf(x, weights, means, log_scales)
    torch.testing.assert_close(y, x + 1)
    (y + ldj).sum().backward()
    assert torch.isfinite(weights.grad).all()


def test_columns_of_params_go_by_parameter_and_then_by_dimension():
    x = torch.tensor([[2.0, 3.0]])
    z, slope = Affine().forward(x, torch.tensor([[0.1, 0.2, 10.0, 20.0]]))
    torch.testing.assert_close(z, torch.tensor([[2 * math.exp(0.1) + 10, 3 * math.exp(0.2) + 20]]))
    torch.testing.assert_close(slope, torch.tensor([[0.1, 0.2]]))
    # logits, means, log-scales of two components, a, b; each for both dimensions.
    p = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 1.0, 2.0, 0.0, math.log(2), 0.0, math.log(2), 0.3, 0.4, 5.0, 6.0]])
    z, slope = MixLogitCDF(2).forward(x, p)
    torch.testing.assert_close(z, torch.tensor([[math.exp(0.3) + 5, 0.5 * math.exp(0.4) + 6]]))
    torch.testing.assert_close(slope, torch.tensor([[0.3, 0.4 - math.log(2)]]))


def test_bounded_affine_never_leaves_its_bound():
    params = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.01, 0.0]], dtype=torch.float64)
    slope = Affine(bound=2).forward(torch.ones(3, 1, dtype=torch.float64), params)[1]
    torch.testing.assert_close(slope[:, 0], torch.tensor([2.0, -2.0, 0.01], dtype=torch.float64), rtol=1e-4, atol=0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), x=st.floats(-40, 40), spread=st.floats(0, 3))
def test_mixture_map_round_trips_for_any_parameters(seed, k, x, spread):
    bend, x = MixLogitCDF(k), torch.tensor([[x]], dtype=torch.float64)
    params = spread * torch.randn(1, bend.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z, slope = bend.forward(x, params)
    back, slope_back = bend.inverse(z, params)
    # Where the curve is flat, z fixes x only to rounding divided by the slope.
    error = 1e-13 * (1 + z.abs() + params.abs().max().exp()) * torch.exp(-slope)
    assert ((back - x).abs() <= 1e-9 * (1 + x.abs()) + error).all()


@pytest.mark.parametrize("bend", [Shift(), Affine(), Affine(bound=1), MixLogitCDF(3)], ids=lambda m: type(m).__name__)
def test_map_and_inverse_agree(bend):
    x, params = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2 * bend.num_params, dtype=torch.float64)
    z, slope = bend.forward(x, params)
    back, slope_back = bend.inverse(z, params)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope_back, slope, rtol=1e-8, atol=1e-8)


def test_mix_coupling_round_trips_in_float32_out_to_8_sigma():
    layer = MixCoupling(MLP(1, 26, activation=torch.nn.Tanh), components=8)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1] if p.ndim > 1 else 1))
    x = torch.cartesian_prod(torch.linspace(-8, 8, 41), torch.linspace(-8, 8, 161))
    torch.testing.assert_close(layer.inverse(layer(x)[0]), x, rtol=0, atol=1e-4)
    # Every latent out to 8 sigma has its data point, too.
    torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=0, atol=1e-4)


def cubic(scale):
    return lambda x: (scale * (x + x ** 3), torch.log(scale * (1 + 3 * x ** 2)))


def test_bracket_is_widened_as_far_as_needed():
    root = torch.tensor([-1e4, -3.0, 0.0, 0.2, 50.0, 1e6], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(invert_increasing(cubic(one), cubic(one)(root)[0]), root, rtol=1e-10, atol=1e-10)
    wrong = invert_increasing(cubic(one), cubic(one)(root)[0], low=torch.full_like(root, 7), high=torch.full_like(root, 8))
    torch.testing.assert_close(wrong, root, rtol=1e-10, atol=1e-10)


def test_implicit_gradients_against_differences():
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([-2.0, 0.1, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, s: invert_increasing(cubic(s), z), (z, scale))


def test_a_staircase_is_inverted():
    """Narrow components make Newton's rule jump about; bisection has to take over."""
    means = torch.arange(-3.0, 4.0, dtype=torch.float64)
    p = torch.full((7,), 1 / 7, dtype=torch.float64), means, torch.full((7,), -4.0, dtype=torch.float64)
    x = torch.linspace(-3.2, 3.2, 200, dtype=torch.float64)
    y = mix_logit_cdf(x, *p)[0]
    back = invert_increasing(lambda x: mix_logit_cdf(x, *p), y)
    torch.testing.assert_close(mix_logit_cdf(back, *p)[0], y, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_inverted_says_so():
    with pytest.raises(FloatingPointError, match="must be finite"):
        invert_increasing(cubic(1.0), torch.tensor([math.nan]))
    with pytest.raises(FloatingPointError, match="range of the map"):
        invert_increasing(lambda x: (torch.sigmoid(x), torch.zeros_like(x)), torch.tensor([2.0]))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5]])
def test_weights_must_be_normalised(weights):
    with pytest.raises(ValueError, match="weights must be positive and sum to 1"):
        mix_logit_cdf(torch.zeros(1), torch.tensor(weights), torch.zeros(2), torch.zeros(2))


def test_bad_parameters():
    with pytest.raises(ValueError, match=r"params must have shape \(\.\.\., D\) with D = 4, got \(3, 2\)"):
        Affine().forward(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="bound must be positive or None, got -1"):
        Affine(bound=-1)
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        MixLogitCDF(0)
