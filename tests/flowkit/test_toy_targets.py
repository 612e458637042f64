"""Each target: its density integrates to one and gives the entropy stated, and its samples follow it."""
import math

import numpy as np
import pytest
import torch
from scipy import stats

from flowkit import toys


def grid(limits, step=0.05):
    left, right, bottom, top = limits
    x = torch.arange(left - 1 + step / 2, right + 1, step, dtype=torch.float64)
    y = torch.arange(bottom - 1 + step / 2, top + 1, step, dtype=torch.float64)
    return torch.cartesian_prod(x, y), step ** 2


@pytest.mark.parametrize("name", toys.NAMES)
def test_density_and_entropy_by_quadrature(name):
    toy = toys.get(name)
    x, area = grid(toy.limits)
    p = toy.log_prob(x).exp()
    assert abs(p.sum().item() * area - 1) < 1e-6
    assert abs(-torch.special.xlogy(p, p).sum().item() * area - toy.entropy) < 2e-6
    inside = (x > torch.tensor(toy.limits)[[0, 2]]).all(-1) & (x < torch.tensor(toy.limits)[[1, 3]]).all(-1)
    assert p[inside].sum() * area > 1 - 1e-4, "the picture's frame cuts something off"


# Sixteen comparisons with a fixed seed, at 4 standard errors: 1 in 1000 seeds would fail.
@pytest.mark.parametrize("name", toys.NAMES)
def test_samples_follow_the_density(name):
    toy, n = toys.get(name), 20_000
    x = toy.sample(n, seed=5)
    surprise = -toy.log_prob(x).double()
    error = max(surprise.std().item() / n ** 0.5, 1e-6)
    assert abs(surprise.mean().item() - toy.entropy) < 4 * error
    # Counts in a 10 x 10 histogram against the density integrated over its cells.
    points, area = grid(toy.limits)
    mass = toy.log_prob(points).exp().numpy() * area
    edges = [np.linspace(lo - 1, hi + 1, 11) for lo, hi in (toy.limits[:2], toy.limits[2:])]
    expected = n * np.histogram2d(*points.T.numpy(), bins=edges, weights=mass)[0].ravel()
    count = np.histogram2d(*x.T.numpy(), bins=edges)[0].ravel()
    full = expected > 5
    chi2 = ((count - expected)[full] ** 2 / expected[full]).sum()
    assert chi2 < stats.chi2.isf(3e-5, full.sum())
    assert count[~full].sum() < expected[~full].sum() + 4 * expected[~full].sum() ** 0.5 + 2


def test_two_spirals_is_the_lectures():
    """An independent oracle: the task's sampler as the convolution it is, by a fine trapezoid rule over u with scipy."""
    assert round(toys.get("two_spirals").entropy, 3) == 2.645
    x = np.array([[1.0, -0.7], [0.0, 0.0], [3.1, 0.2], [-2.0, 1.5]])
    u = (np.arange(200_000) + 0.5) / 200_000
    angle = np.sqrt(u) * 540 * 2 * np.pi / 360
    want = []
    for point in x:
        p = 0
        for side in (1, -1):
            arm = side * np.stack([-np.cos(angle) * angle, np.sin(angle) * angle]) / 3
            near, far = np.minimum(0, side * 0.5 / 3), np.maximum(0, side * 0.5 / 3)
            box = [(stats.norm.cdf(v - c - near, scale=0.1) - stats.norm.cdf(v - c - far, scale=0.1)) * 6 for v, c in zip(point, arm)]
            p += 0.5 * (box[0] * box[1]).mean()
        want.append(np.log(p))
    np.testing.assert_allclose(toys.get("two_spirals").log_prob(torch.from_numpy(x)).numpy(), want, atol=1e-5)


def test_known_entropies():
    assert toys.get("checkerboard").entropy == math.log(32)
    assert abs(toys.get("eight_gaussians").entropy - 2.832) < 5e-4
    one = 1 + math.log(2 * math.pi) + 2 * math.log(0.2)
    assert abs(toys.get("grid_of_gaussians").entropy - (one + math.log(25))) < 2e-3


@pytest.mark.parametrize("name", toys.NAMES)
def test_seeds_shapes_and_dtypes(name):
    toy = toys.get(name)
    a, b = toy.sample(7, seed=3), toy.sample(7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, b) and a.shape == (7, 2) and a.dtype == torch.float32
    torch.manual_seed(1)
    c = toy.sample(7)
    torch.manual_seed(1)
    assert torch.equal(c, toy.sample(7)) and not torch.equal(c, toy.sample(7))
    assert toy.sample(0).shape == (0, 2) and toy.log_prob(toy.sample(0)).shape == (0,)
    assert toy.log_prob(a.reshape(7, 1, 2)).shape == (7, 1) and toy.log_prob(a.double()).dtype == torch.float64


def test_bad_input():
    with pytest.raises(ValueError, match="^name must be one of two_spirals, .*, got 'spiral'$"):
        toys.get("spiral")
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\), got torch.float32 of shape \(5, 3\)$"):
        toys.get("rings").log_prob(torch.zeros(5, 3))
