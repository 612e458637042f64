"""Two-dimensional targets whose log-density and entropy are known, so that a fit can be measured in nats.

The mean of -log q(x) over a target's own samples exceeds its entropy by KL(p || q), which is 0 only for the target
itself. Densities are closed forms, except along a curve (two_spirals, two_moons), where one integral over the
curve is done by Gauss-Legendre quadrature.
"""
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Callable

import numpy as np
import torch


@dataclass(frozen=True)
class Toy:
    """A target: `sample(n)` gives (n, 2), `log_prob(x)` (nats) takes (..., 2); `entropy` in nats; `limits` frame a picture.

    `entropy` is the integral of -p log p over a grid of step 0.02 that goes one unit beyond the limits, to 6 digits.
    """
    name: str
    entropy: float
    limits: tuple
    _sample: Callable = field(repr=False)
    _log_prob: Callable = field(repr=False)

    def sample(self, n, generator=None, seed=None):
        """`n` independent points (n, 2) float32, from a CPU `generator`, a `seed`, or torch's global generator."""
        if seed is not None:
            generator = torch.Generator("cpu").manual_seed(seed)
        # Drawn on the CPU, so a seed means the same points on every device.
        with torch.device("cpu"):
            x = self._sample(n, generator)
        return x.float().to(torch.get_default_device())

    @torch.no_grad()
    def log_prob(self, x):
        """log p(x) in nats, x (..., 2) -> (...); computed in float64 without gradients, to 1e-5 wherever samples fall.

        Far from two_spirals it stops at log 1e-14 = -32.2; off the checkerboard it is -inf.
        """
        if x.shape[-1:] != (2,) or not x.is_floating_point():
            raise ValueError(f"x must be a floating-point tensor of shape (..., 2), got {x.dtype} of shape {tuple(x.shape)}")
        points = x.reshape(-1, 2).double().cpu()
        with torch.device("cpu"):
            # In chunks that stay in the cache, since a quadrature makes hundreds of numbers of a point.
            parts = [self._log_prob(chunk) for chunk in points.split(128)]
        return torch.cat(parts or [points[:, 0]]).reshape(x.shape[:-1]).to(x)


def _rand(n, generator):
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _randn(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def _pick(n, k, generator):
    return torch.randint(k, (n,), generator=generator)


@cache
def _gauss_legendre(count, low, high):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (torch.from_numpy(low + (high - low) * (nodes + 1) / 2), torch.from_numpy(weights * (high - low) / 2))


# Mixtures of Gaussians with equal weights and one standard deviation.

def _gaussians(name, entropy, centres, std, limits):
    centres = torch.tensor(centres, dtype=torch.float64)

    def sample(n, generator):
        return centres[_pick(n, len(centres), generator)] + std * _randn(n, generator)

    def log_prob(x):
        square = (x[:, None] - centres).square().sum(-1) / std ** 2
        return torch.logsumexp(-square / 2, -1) - math.log(2 * math.pi * std ** 2 * len(centres))

    return Toy(name, entropy, limits, sample, log_prob)


def _circle(count, radius):
    return [(radius * math.cos(2 * math.pi * i / count), radius * math.sin(2 * math.pi * i / count)) for i in range(count)]


# The lecture's task: two arms, one the other turned by half a circle, with box and then Gaussian noise.

_TURN, _BOX, _STD = 3 * math.pi, 0.5 / 3, 0.1


def _spiral(angle):
    return torch.stack([-torch.cos(angle) * angle, torch.sin(angle) * angle], -1)


def _sample_spirals(n, generator):
    arm = _spiral(_rand(n, generator).sqrt() * _TURN)
    jitter = 0.5 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    side = 2 * _pick(n, 2, generator)[:, None] - 1
    return side * (arm + jitter) / 3 + _STD * _randn(n, generator)


def _log_prob_spirals(x):
    # angle = sqrt(1 + q) - 1 spreads nodes in q evenly along the arm and has no singularity at its start.
    q, weights = _gauss_legendre(192, 0.0, (1 + _TURN) ** 2 - 1)
    root = (1 + q).sqrt()
    angle = root - 1
    # The angle is sqrt(u) * _TURN with u uniform, so it has density 2 angle / _TURN^2.
    weights = weights * (0.5 / root) * (2 * angle / _TURN ** 2)
    weights = weights / (2 * (2 * _BOX) ** 2)
    middle = _spiral(angle) / 3 + _BOX / 2
    scale = _STD * math.sqrt(2)
    half, total = _BOX / 2 / scale, 0
    for side in (1, -1):
        # A box convolved with a Gaussian, in each coordinate.
        x_minus = (side * x[:, None, :] - middle) / scale
        box = torch.erf(x_minus + half) - torch.erf(x_minus - half)
        total = total + box.prod(-1) @ weights
    return total.clamp_min(1e-14).log()


# Two half circles that hold each other.

_MOON_STD = 0.2


def _moon(angle):
    return torch.stack([2 * torch.cos(angle) - 1, 2 * torch.sin(angle) - 0.5], -1)


def _sample_moons(n, generator):
    arm = _moon(math.pi * _rand(n, generator))
    side = 2 * _pick(n, 2, generator)[:, None] - 1
    return side * arm + _MOON_STD * _randn(n, generator)


def _log_prob_moons(x):
    angle, weights = _gauss_legendre(48, 0.0, math.pi)
    middle = torch.cat([_moon(angle), -_moon(angle)])
    square = (x[:, None] - middle).square().sum(-1) / _MOON_STD ** 2
    log_weights = (torch.cat([weights, weights]) / (2 * math.pi)).log()
    return torch.logsumexp(log_weights - square / 2, -1) - math.log(2 * math.pi * _MOON_STD ** 2)


# Uniform on the eight dark squares, of side 2, of a board of 4 x 4.

def _sample_checkerboard(n, generator):
    row, column = _pick(n, 4, generator), 2 * _pick(n, 2, generator)
    corner = torch.stack([column + row % 2, row], -1)
    return 2 * (corner + torch.rand(n, 2, generator=generator, dtype=torch.float64)) - 4


def _log_prob_checkerboard(x):
    square = torch.floor(x / 2)
    dark = (x.abs() < 4).all(-1) & (square.sum(-1) % 2 == 0)
    return torch.where(dark, -math.log(32), -math.inf)


# Circles with Gaussian noise: the integral over the angle is a Bessel function.

_RADII, _RING_STD = (1.0, 2.0, 3.0), 0.15


def _sample_rings(n, generator):
    radius = torch.tensor(_RADII, dtype=torch.float64)[_pick(n, len(_RADII), generator)]
    angle = 2 * math.pi * _rand(n, generator)
    circle = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return circle + _RING_STD * _randn(n, generator)


def _log_prob_rings(x):
    r, radii, variance = x.norm(dim=-1, keepdim=True), torch.tensor(_RADII, dtype=torch.float64), _RING_STD ** 2
    ring = -(r - radii) ** 2 / (2 * variance) + torch.special.i0e(r * radii / variance).log()
    return torch.logsumexp(ring, -1) - math.log(2 * math.pi * variance * len(_RADII))


# Five long Gaussians, each along a ray, turned by an angle that grows with the radius; that keeps areas.

_ARMS, _ARM_MIDDLE, _ARM_STD, _SWIRL = 5, 2.0, (0.6, 0.15), 0.6


def _rotate(x, angle):
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([c * x[..., 0] - s * x[..., 1], s * x[..., 0] + c * x[..., 1]], -1)


def _sample_pinwheel(n, generator):
    x = _randn(n, generator) * torch.tensor(_ARM_STD) + torch.tensor([_ARM_MIDDLE, 0.0])
    return _rotate(x, 2 * math.pi / _ARMS * _pick(n, _ARMS, generator) + _SWIRL * x.norm(dim=-1))


def _log_prob_pinwheel(x):
    back = -2 * math.pi / _ARMS * torch.arange(_ARMS) - _SWIRL * x.norm(dim=-1, keepdim=True)
    ray = _rotate(x[:, None], back) - torch.tensor([_ARM_MIDDLE, 0.0])
    square = (ray / torch.tensor(_ARM_STD, dtype=torch.float64)).square().sum(-1)
    return torch.logsumexp(-square / 2, -1) - math.log(2 * math.pi * math.prod(_ARM_STD) * _ARMS)


_BOX4, _BOX5 = (-4.0, 4.0, -4.0, 4.0), (-5.0, 5.0, -5.0, 5.0)
_TOYS = {toy.name: toy for toy in (
    Toy("two_spirals", 2.645450, _BOX4, _sample_spirals, _log_prob_spirals),
    Toy("two_moons", 2.393879, _BOX4, _sample_moons, _log_prob_moons),
    _gaussians("eight_gaussians", 2.831578, _circle(8, 4 / math.sqrt(2)), 0.5 / math.sqrt(2), _BOX5),
    Toy("checkerboard", math.log(32), _BOX5, _sample_checkerboard, _log_prob_checkerboard),
    Toy("rings", 3.051258, _BOX4, _sample_rings, _log_prob_rings),
    Toy("pinwheel", 2.035272, _BOX5, _sample_pinwheel, _log_prob_pinwheel),
    _gaussians("grid_of_gaussians", 2.837047, [(1.5 * i, 1.5 * j) for i in range(-2, 3) for j in range(-2, 3)], 0.2, _BOX5),
    _gaussians("two_gaussians", 2.508780, [(-1.5, -1.5), (1.5, 1.5)], 0.6, _BOX4),
)}
NAMES = tuple(_TOYS)


def get(name) -> Toy:
    """The toy of that name; NAMES lists them."""
    if name not in _TOYS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return _TOYS[name]
