"""Planar, radial and Sylvester layers: their constraints hold for any weights, and they agree with one another."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit import Planar, Radial, Sylvester

BUILD = {"planar": Planar, "radial": Radial, "sylvester": lambda dim: Sylvester(dim, max(1, dim - 1))}


def wild(name, dim, seed, spread):
    torch.manual_seed(seed)
    layer = BUILD[name](dim).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(spread * torch.randn_like(p))
    return layer


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(BUILD)), dim=st.integers(1, 5), seed=st.integers(0, 10 ** 6), spread=st.floats(0.01, 3))
def test_invertible_with_any_weights(name, dim, seed, spread):
    layer = wild(name, dim, seed, spread)
    x = 3 * torch.randn(8, dim, dtype=torch.float64)
    z, ldj = layer(x)
    back, ldj_back = layer.inverse_and_ldj(z)
    # Where the map is nearly flat, z fixes x only to rounding divided by the smallest slope.
    slope = torch.exp(-ldj.abs().max() - dim * math.log(10))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12 * (1 + z.abs().max().item()) / slope.item())
    jacobian = torch.func.vmap(torch.func.jacrev(lambda r: layer(r[None])[0][0]))(x)
    sign, want = torch.linalg.slogdet(jacobian)
    assert (sign > 0).all()
    torch.testing.assert_close(ldj, want, rtol=1e-6, atol=1e-6)


def test_sylvester_with_one_column_is_planar():
    planar, sylvester = wild("planar", 4, 0, 1), Sylvester(4, 1).double()
    with torch.no_grad():
        # With u along w, both layers move points along w alone.
        planar.u.copy_(planar.w * 0.7)
        _, wu = planar.constrained_u()
        length = planar.w.norm()
        sylvester.frame.copy_(planar.w[:, None])
        direction = sylvester.factors()[0][:, 0] @ planar.w / length
        sylvester.log_s.copy_(length.log()[None])
        # r s = w.u, whatever the sign of the frame that QR chooses, since tanh is odd and b is turned with it.
        sylvester.raw_product.copy_((torch.expm1(1 + wu).log() - math.log(math.e - 1))[None])
        sylvester.b.copy_((planar.b * direction.sign())[None])
    x = torch.randn(6, 4, dtype=torch.float64)
    for got, want in zip(sylvester(x), planar(x)):
        torch.testing.assert_close(got, want)


def test_the_planar_slope_stays_positive_on_its_ridge():
    """w.x + b = 0 is where tanh is steepest; without the constraint the determinant would be 1 - 5 there."""
    layer = Planar(2).double()
    with torch.no_grad():
        layer.w.copy_(torch.tensor([1.0, 0.0]))
        layer.u.copy_(torch.tensor([-5.0, 2.0]))
    z, ldj = layer(torch.zeros(1, 2, dtype=torch.float64))
    assert math.isfinite(ldj.item()) and ldj.item() < 0
    u, wu = layer.constrained_u()
    assert -1 < wu < 0 and u[1] == 2


@pytest.mark.parametrize("name", BUILD)
def test_the_constraint_is_silent_at_zero_and_tame_far_out(name):
    layer = wild(name, 3, 1, 1)
    far = 1e6 * torch.eye(3, dtype=torch.float64)
    z, ldj = layer(far)
    assert torch.isfinite(z).all() and ldj.abs().max() < 1e-3
    torch.testing.assert_close(layer.inverse(z), far, rtol=1e-9, atol=1e-9)
    float32 = layer.float()(far.float())[1]
    assert torch.isfinite(float32).all()


def test_radial_at_its_centre_and_its_quadratic():
    layer = wild("radial", 3, 2, 1)
    x = torch.cat([layer.center.detach()[None], layer.center.detach()[None] + torch.tensor([[1e-9, 0, 0]], dtype=torch.float64)])
    z, ldj = layer(x)
    alpha, beta = layer.alpha_beta()
    torch.testing.assert_close(ldj[0], 3 * torch.log1p(beta / alpha))
    torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make, message", [
    (lambda: Sylvester(3, 4), "^m must lie between 1 and dim = 3, got 4$"),
    (lambda: Sylvester(3, 0), "^m must lie between 1 and dim = 3, got 0$"),
    (lambda: Planar(3)(torch.zeros(2, 4)), r"^x must have shape \(\.\.\., D\) with D = 3, got \(2, 4\)$"),
    (lambda: Radial(3).inverse(torch.zeros(2, 4)), r"^z must have shape \(\.\.\., D\) with D = 3, got \(2, 4\)$"),
    (lambda: Planar(3).inverse(torch.full((2, 3), math.nan)), "must be finite"),
])
def test_bad_input(make, message):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        make()
