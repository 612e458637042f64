"""Scalar maps against closed forms and scipy, in the tails, and their inverse by bisection."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowkit import (DDSF, DSF, MLP, Affine, GatedAffine, Logit, MixCoupling, MixGaussianCDF, MixLogitCDF, Shift, ddsf_layer, dsf,
                     invert_increasing, mix_logit_cdf, mixture_cdf)


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


MAPS = {"gate": GatedAffine(), "dsf": DSF(4), "ddsf": DDSF((3, 4)), "mix_logit": MixLogitCDF(3), "mix_gaussian": MixGaussianCDF(3)}


@pytest.mark.parametrize("name", MAPS)
def test_slopes_are_autograds_and_inverses_undo(name):
    bend = MAPS[name]
    x = torch.linspace(-6, 6, 14, dtype=torch.float64).reshape(7, 2).requires_grad_()
    params = torch.randn(7, 2 * bend.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z, log_slope = bend.forward(x, params)
    slope, = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-8, atol=1e-8)
    back, log_slope_back = bend.inverse(z, params)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_slope_back, log_slope, rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["dsf", "ddsf", "mix_gaussian"]), seed=st.integers(0, 10**6), x=st.floats(-30, 30), spread=st.floats(0, 3))
def test_maps_round_trip_for_any_parameters(name, seed, x, spread):
    bend, x = MAPS[name], torch.tensor([[x]], dtype=torch.float64)
    params = spread * torch.randn(1, bend.num_params, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z, slope = bend.forward(x, params)
    assert torch.isfinite(z).all() and torch.isfinite(slope).all()
    back, _ = bend.inverse(z, params)
    error = 1e-12 * (1 + z.abs() + params.abs().max().exp()) * torch.exp(-slope)
    assert ((back - x).abs() <= 1e-8 * (1 + x.abs()) + error).all()


def test_dsf_is_the_mixture_cdf_in_other_parameters():
    x, (w, m, s) = torch.linspace(-30, 30, 61, dtype=torch.float64), mixture()
    for got, want in zip(dsf(x, torch.exp(-s), -m * torch.exp(-s), w), mix_logit_cdf(x, w, m, s)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("f, error", [("dsf", 2e-5), ("mix_gaussian", 1e-4)])
def test_float32_keeps_the_tails(f, error):
    """A Gaussian's log-density at 30 deviations is -450, of which float32 keeps 5e-5; a logistic's is -30."""
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)[:, None]
    bend = MAPS[f]
    params = torch.randn(1, bend.num_params, generator=torch.Generator().manual_seed(1)).expand(601, -1)
    for got, want in zip(bend.forward(x.float(), params), bend.forward(x.float().double(), params.double())):
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error)


def test_ddsf_layers_chain_their_slopes_as_matrices():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, generator=g).requires_grad_()
    h, log_slope = x[..., None], torch.zeros(5, 2, 1, dtype=torch.float64)
    for d_in, d_out in [(1, 3), (3, 3), (3, 1)]:
        w, u = (torch.randn(5, 2, d_out, n, dtype=torch.float64, generator=g).softmax(-1) for n in (d_out, d_in))
        a, b = torch.rand(5, 2, d_out, dtype=torch.float64, generator=g) + 0.2, torch.randn(5, 2, d_out, dtype=torch.float64, generator=g)
        # The formula as it stands on the slide, against the one in logs.
        naive = torch.logit((w @ torch.sigmoid(a * (u @ h[..., None])[..., 0] + b)[..., None])[..., 0])
        h, log_slope = ddsf_layer(h, log_slope, w, u, a, b)
        torch.testing.assert_close(h, naive)
    slope, = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(log_slope[..., 0], slope.log())


def test_mixture_of_gaussians_against_scipy():
    """z is the normal quantile of the mixture's CDF, out to where the CDF rounds to 0 or 1 in float64."""
    logits, means, log_scales = torch.tensor([0.3, -0.2]).double(), torch.tensor([-1.0, 2.0]).double(), torch.tensor([-0.5, 0.4]).double()
    x = torch.linspace(-40, 60, 101, dtype=torch.float64)[:, None]
    params = torch.cat([logits, means, log_scales]).expand(101, -1)
    z, log_slope = MixGaussianCDF(2).forward(x, params)
    w, parts = logits.softmax(-1).numpy(), stats.norm(means.numpy(), log_scales.exp().numpy())
    log_below, log_above = (np.logaddexp.reduce(np.log(w) + f(x.numpy()), -1) for f in (parts.logcdf, parts.logsf))
    np.testing.assert_allclose(stats.norm.logcdf(z[:, 0].numpy()), log_below, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(stats.norm.logsf(z[:, 0].numpy()), log_above, rtol=1e-9, atol=1e-14)
    log_pdf = np.logaddexp.reduce(np.log(w) + parts.logpdf(x.numpy()), -1)
    np.testing.assert_allclose(log_slope[:, 0].numpy(), log_pdf - stats.norm.logpdf(z[:, 0].numpy()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_logit_against_its_formula_and_both_ways(alpha):
    layer = Logit(alpha, event_dims=3)
    x = 0.01 + 0.98 * torch.rand(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, ldj = layer(x)
    assert ldj.shape == (3,)
    torch.testing.assert_close(z, torch.logit(alpha + (1 - 2 * alpha) * x))
    slopes = torch.autograd.functional.jacobian(lambda v: layer(v)[0].sum(), x)
    torch.testing.assert_close(ldj, slopes.log().flatten(1).sum(1))
    back, ldj_back = layer.inverse_and_ldj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(ldj_back, ldj)
    torch.testing.assert_close(layer.inverse(z), x)


def test_logit_refuses_what_lies_outside():
    with pytest.raises(ValueError, match=r"^x must lie in \[0, 1\] for Logit, got values from 0 to 1\.5$"):
        Logit()(torch.tensor([[0.0, 1.5]]))
    with pytest.raises(ValueError, match=r"^alpha must lie in \[0, 1/2\), got 0.5$"):
        Logit(0.5)


def test_extreme_parameters_stay_finite():
    """Raw slopes far below zero, where softplus underflows, and far above."""
    x = torch.tensor([[-3.0, 0.5]])
    for raw in (-200.0, 50.0):
        z, log_slope = DSF(2).forward(x, torch.cat([torch.full((1, 4), raw), torch.zeros(1, 8)], -1).requires_grad_())
        assert torch.isfinite(z).all() and torch.isfinite(log_slope).all()
    params = torch.full((1, 12), -200.0).requires_grad_()
    z, log_slope = DSF(2).forward(x, params)
    (z.sum() + log_slope.sum()).backward()
    assert torch.isfinite(params.grad).all()
