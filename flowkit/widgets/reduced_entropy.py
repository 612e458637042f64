"""View 14, `temperature`: latents drawn with less spread, x = f(T z), beside the density that is truly colder, p(x)^(1/T^2).

    log p_T(x) = log N(z(x); 0, T^2) + log |dz/dx|        against        log p(x) / T^2 - log Z

The two are one where |dz/dx| is the same everywhere, as in an affine flow. Else they part: annealing goes to the mode of p, while T z goes to 0,
and x to f(0), on the line the median of p, which may lie in a valley. (Chen et al. 2019, "Residual Flows", appendix A and figure 7, on
the sampling of Kingma & Dhariwal 2018, "Glow", section 6.)
"""
import math

import numpy as np
import torch

from . import scene
from .divergences import log_mixture
from .view import View, slider

X, Z = (-5.0, 5.0), (-3.2, 3.2)
LINE = np.linspace(-12, 12, 2401)   # of the integrals
STEP = LINE[1] - LINE[0]
LEAST, MOST = 0.1, 1.4              # temperatures
DRAWS = np.array([-2.0, -1.4, -0.95, -0.6, -0.3, 0.0, 0.3, 0.6, 0.95, 1.4, 2.0])     # some latents at T = 1

# Mean, standard deviation and weight of each part of p.
TARGETS = {
    "two humps": [[-2.2, 0.6, 0.502], [2.2, 0.6, 0.498]],
    "one hump: affine flow": [[0.6, 1.3, 1.0]],
    "one high, one broad": [[-2.4, 0.25, 0.3], [1.0, 1.2, 0.7]],
    "a long tail": [[-1.6, 0.4, 0.4], [-0.7, 0.8, 0.3], [1.2, 1.5, 0.3]],
}
PRESETS = {name: {"target": name, "T": 1.0} for name in TARGETS}


def temperature():
    """Cool a flow's latents by T, and compare what comes out with the density that is truly colder, p(x)^(1/T^2).

    The flow is the exact one, z = Phi^-1(F(x)) of a mixture on the line, so that all is known: densities, medians and entropies in nats.
    Left and right move T, which can be dragged; up and down, or 1 to 4, choose another p.
    """
    names = list(PRESETS)

    def choose(state, by):
        return {"preset": names[min(max(names.index(state["target"]) + by, 0), len(names) - 1)], "T": state["T"]}

    return View("Temperature: cold latents are not a cold density", lambda state, coarse: [_picture(Cooled(state["target"]), state["T"])], _caption,
                {"T": slider("T", 1.0, LEAST, MOST, 0.05)}, {"target": names[0]}, PRESETS, steps=("T", choose),
                drag=lambda state, name, index, x, y: {"T": float(np.clip(abs(x), LEAST, MOST))},
                press=lambda state, digit: {"preset": names[min(digit, len(names)) - 1], "T": state["T"]}, rate=12)


class Cooled:
    """A p of TARGETS and its flow on LINE: log p, and z(x)."""

    def __init__(self, name):
        mean, std, weight = torch.tensor(TARGETS[name], dtype=torch.float64).T[:, :, None]
        u = (torch.from_numpy(LINE) - mean) / std
        # The smaller of F and 1 - F keeps its digits far out.
        below, above = ((weight * torch.special.log_ndtr(sign * u).exp()).sum(0) for sign in (1, -1))
        self.z = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).numpy()
        self.log_p = log_mixture(LINE, np.array(TARGETS[name]))

    def reduced(self, T):
        """log density on LINE of x = f(T z)."""
        # log N(z; 0, T^2) + log dz/dx, and the latter is log p(x) - log N(z; 0, 1).
        return self.log_p - math.log(T) - 0.5 * self.z ** 2 * (1 / T ** 2 - 1)

    def annealed(self, T):
        """log density on LINE of p^(1/T^2)."""
        cold = self.log_p / T ** 2
        return cold - np.logaddexp.reduce(cold) - math.log(STEP)

    def x_of(self, z):
        """f(z)."""
        return np.interp(z, self.z, LINE)

    @property
    def mode(self):
        """Where p is highest."""
        return float(LINE[self.log_p.argmax()])


def entropy(log_density):
    """Of a density on LINE, in nats."""
    return -float(np.exp(log_density) @ log_density) * STEP


def _caption(state):
    one = Cooled(state["target"])
    if len(TARGETS[state["target"]]) == 1:
        return "The flow is affine: dz/dx is the same everywhere, and colder latents (solid) are the colder density (dashed). This is the one case in which they are."
    return (f"T to 0 takes z to 0, and x to f(0) = {one.x_of(0.0):.2f}, the median of p (square). The density that is truly colder (dashed) goes to the mode, "
            f"{one.mode:.2f} (ring).").replace("-", "−")


def _normal(z, T):
    return np.exp(-0.5 * (z / T) ** 2) / (T * math.sqrt(2 * math.pi))


def _picture(one, T):
    z, seen = np.linspace(*Z, 321), (LINE >= X[0]) & (LINE <= X[1])
    x, ticks = LINE[seen], [-4, -2, 0, 2, 4]
    top = min(2.0, 1.15 * _normal(0.0, min(T, 1.0)))
    peak = min(float(_normal(T, T)), 0.95 * top)
    latents = scene.panel(
        [scene.lines(_curve(z, _normal(z, 1.0)), "quiet", 2, "dotted"), scene.area(_curve(z, _normal(z, T)), "sky", 0.5),
         scene.lines(_curve(z, _normal(z, T)), "blue", 3), scene.points(_curve(T * DRAWS, np.full(len(DRAWS), 0.02 * top)), "ink", "disc", 4, 1),
         scene.handles([(T, peak)], "T", ["orange"], ["diamond"])],
        (*Z, 0, top), "latents: N(0, T²)", "z", xticks=[-2, 0, 2], yticks=scene.axis(0, top, 3), width=0.75)
    out = one.x_of(T * DRAWS)
    ways = [[(a, X[0]), (a, b), (Z[1], b)] for a, b in zip(T * DRAWS, out)]
    the_map = scene.panel(
        [scene.lines(ways, "sky", 1.5), scene.lines(_curve(one.z, LINE), "ink", 4), scene.points(_curve(T * DRAWS, out), "ink", "disc", 4, 1)],
        (*Z, *X), "x = f(z)", "z", xticks=[-2, 0, 2], yticks=ticks, width=0.75)
    curves = [np.exp(log_p[seen]) for log_p in (one.log_p, one.reduced(T), one.annealed(T))]
    broad = min(2.5, 1.1 * float(max(curve.max() for curve in curves)))
    densities = scene.panel(
        [scene.area(np.concatenate([_curve(curves[1], x), [(0, X[1]), (0, X[0])]]), "sky", 0.5), scene.lines(_curve(curves[0], x), "quiet", 2, "dotted"),
         scene.lines(_curve(curves[1], x), "blue", 3), scene.lines(_curve(curves[2], x), "red", 3.5, "dashed"),
         scene.points([(0.03 * broad, one.x_of(0.0))], "blue", "square", 7, 1), scene.points([(0.03 * broad, one.mode)], "red", "ring", 8, 1)],
        (0, broad, *X), "densities of x", "density", xticks=scene.axis(0, broad, 3), yticks=ticks, width=0.9)
    return scene.frame([[latents, the_map, densities, _entropies(one, T)]], _label(one, T))


def _label(one, T):
    reduced, annealed = entropy(one.reduced(T)), entropy(one.annealed(T))
    return f"T = {T:.2f}: entropy {reduced:.2f} nats for f(T z), {annealed:.2f} for p^(1/T²); p itself {entropy(one.log_p):.2f}".replace("-", "−")


def _entropies(one, T):
    """Entropies over T: of the latents, of x = f(T z), and of the colder density."""
    at = np.linspace(LEAST, MOST, 40)
    latent = 0.5 * math.log(2 * math.pi * math.e) + np.log(at)
    reduced, annealed = (np.array([entropy(way(t)) for t in at]) for way in (one.reduced, one.annealed))
    low, high = -1.7, 3.0
    marks = [scene.lines([(T, low), (T, high)], "orange", 2)]
    marks += [scene.lines(_curve(at, np.clip(values, low, high)), colour, width, dash)
              for values, colour, width, dash in ((latent, "quiet", 2, "dotted"), (reduced, "blue", 3, "solid"), (annealed, "red", 3.5, "dashed"))]
    marks += [scene.points([(T, float(np.interp(T, at, values)))], colour, marker, 6, 1)
              for values, colour, marker in ((reduced, "blue", "square"), (annealed, "red", "ring"))]
    return scene.panel(marks, (LEAST - 0.05, MOST + 0.05, low, high), "entropy, nats", "T (dotted: of z)", xticks=[0.5, 1], yticks=[-1, 0, 1, 2, 3], width=0.75)


def _curve(x, y):
    return np.stack([x, y], -1)
