"""View 12, `surjection`: layers that map many x to one z, or draw one of many z for an x, and what the likelihood pays for it.

    log p(x) = log p(z) + log p(x | z)  for z = f(x);        log p(x) >= E[log p(z) - log q(z | x)]  for x = f(z), z ~ q(z | x)

One point x goes forward to z, and back: the inverse draws among all x that share this z. The contribution is the log-probability of such a
draw (abs, max, sort: exact), or what the forward's own draw costs (slice: a bound). Left out, or wrong, the density integrates to
another number than one. (Nielsen et al. 2020, "SurVAE Flows", tables 1 and 2.)
"""
import math

import numpy as np
import torch
from torch.distributions import Exponential, Normal

from ..linear import Reverse
from ..surjective import Abs, Max, Slice, Sort, Split, draw
from . import scene
from .asked import answer, like, or_else
from .view import View, seed, slider

REACH = 3.5
BOX = (-REACH, REACH) * 2
CELLS = 81                          # of the plane's picture, each way
LINE = 701                          # of the line's
FAR = 12.0                          # densities are integrated from -FAR to FAR
MANY = 24                           # draws for the one point
CLOUD = 400                         # draws of the whole
EACH = 512                          # draws for each x of a bound
SLOPE = 0.8                         # of the plane's normal: its correlation


def _conditional(mean, std):
    """A proposal z2 ~ N(mean x, std^2), as Slice asks for it."""
    def q(x):
        z2, log_q = draw(Normal(mean * x, torch.full_like(x, std)))
        return z2, log_q.sum(-1)
    return q


LAYERS = {
    "abs": Abs, "abs, one sign likelier": lambda: Abs(lambda z: 2 * torch.tanh(z)),
    "max": lambda: Max(Exponential(1.0), dim=2), "sort": Sort,
    "split": lambda: Split(lambda z: torch.distributions.Independent(Normal(torch.sin(2 * z), torch.full_like(z, 0.5)), 1), 1),
    "slice": lambda: Slice(_conditional(0.0, 1.0), 1),
    "slice, the best q": lambda: Slice(_conditional(SLOPE, math.sqrt(1 - SLOPE ** 2)), 1),
}
PRESETS = {name: {"layer": name, "a": 1.4, "b": -0.6} for name in LAYERS}


def surjection(layer=None):
    """Take one point through a surjective layer and back: the many x of its z (or z of its x), and the likelihood contribution.

    layer: one of yours on the line or the plane, forward(x) -> (z, contribution) for x (B, 1) or (B, 2), and inverse(z) -> x if it has one.
    Left and right move the point, up and down its second coordinate, or on the line to the next seed; it can be dragged; 1 to 7
    choose a layer. What is wrong with yours, an integral that is not one among it, is named under the picture.
    """
    made, said = {}, {}
    if layer is None:
        start = {"presets": PRESETS, "state": {"layer": "abs", "b": -0.6},
                 "press": lambda state, digit: {"preset": list(PRESETS)[min(digit, len(PRESETS)) - 1]}}
    else:
        start = {"state": {"layer": "yours", "b": -0.6}}

    def whole(state):
        """What does not depend on the point, computed once for each layer and seed."""
        wanted = state["layer"], state["seed"]
        if made.get("of") != wanted:
            made.update(of=None, whole=Whole(layer if layer is not None else LAYERS[state["layer"]](), state["seed"]))
            made["of"] = wanted
        return made["whole"]

    def compute(state, coarse):
        def own():
            one = whole(state)
            said["caption"] = one.caption()
            return _picture(one, state)
        frame, words = or_else(own, lambda: _picture(Whole(Reverse(), state["seed"]), state))
        said["caption"] = words or said["caption"]
        return [frame]

    def drag(state, name, index, x, y):
        a, b = (float(np.clip(v, -REACH, REACH)) for v in (x, y))
        return {"a": a, "b": b} if name == "point" else {"a": a}

    def lift(state, by):
        if "whole" in made and made["whole"].dim == 1:
            return {"seed": max(0, state["seed"] + by)}
        return {"b": float(np.clip(state["b"] + 0.1 * by, -REACH, REACH))}

    controls = {"a": slider("x₁", 1.4, -REACH, REACH, 0.1), "seed": seed()}
    return View("Surjection: many to one, and the price", compute, lambda state: said["caption"], controls, steps=("a", lift),
                drag=drag, rate=12, **start)


class Base:
    """p(z) for a layer, by where its z lie: on the line or the plane, anywhere, not negative ("half"), or in order ("sorted")."""

    def __init__(self, dim, kind):
        self.dim, self.kind = dim, kind

    def log_prob(self, z):
        """log p(z), (B,), of z (B, dim); for z outside its support minus infinity."""
        if self.kind == "half":
            # |v|, v ~ N(1.4, 0.6^2): a hump away from zero.
            each = np.logaddexp(*(-0.5 * ((s * z - 1.4) / 0.6) ** 2 for s in (1, -1))) - math.log(0.6 * math.sqrt(2 * math.pi))
            return np.where(z >= 0, each, -np.inf).sum(1)
        if self.kind == "sorted":
            # The lower is normal, and the distance to the upper has the density r exp(-r).
            gap = z[:, 1] - z[:, 0]
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(gap >= 0, _normal(z[:, 0], -0.9, 0.6) + np.log(np.maximum(gap, 0)) - gap, -np.inf)
        if self.kind == "tilted":
            return _normal(z[:, 0], 0, 1) + _normal(z[:, 1], SLOPE * z[:, 0], math.sqrt(1 - SLOPE ** 2))
        return _normal(z, 0.3, 0.9).sum(1)

    def sample(self, count, seed):
        """z (count, dim)."""
        noise = np.random.default_rng(seed)
        z = noise.standard_normal((count, self.dim))
        if self.kind == "half":
            return np.abs(1.4 + 0.6 * z)
        if self.kind == "sorted":
            low = -0.9 + 0.6 * z[:, 0]
            return np.stack([low, low + noise.gamma(2.0, 1.0, count)], 1)
        if self.kind == "tilted":
            return np.stack([z[:, 0], SLOPE * z[:, 0] + math.sqrt(1 - SLOPE ** 2) * z[:, 1]], 1)
        return 0.3 + 0.9 * z


def _normal(v, mean, std):
    return -0.5 * ((v - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


class Whole:
    """A layer with a base that suits it: its density on a grid, draws of all x, and the integral of the density."""

    def __init__(self, layer, seed):
        self.layer, self.seed, self.like = layer, seed, like(layer)
        self.dim, self.to, kind = self._kind()
        self.base, self.bound = Base(self.to, kind), self.to > self.dim
        line = np.linspace(-FAR, FAR, 4801 if self.dim == 1 else 241)
        x = line[:, None] if self.dim == 1 else _plane(line)
        p = np.exp(self.log_p(x)[1])
        self.integral = float(p.sum() * (line[1] - line[0]) ** self.dim)
        self.z = self.base.sample(CLOUD, seed)
        self.back, self.trouble = or_else(self._there_and_back, lambda: None)
        if self.bound:
            self._measure()
        else:
            self.p = np.exp(self.log_p(np.linspace(-REACH, REACH, LINE)[:, None] if self.dim == 1 else _plane(_centres()))[1])

    def _measure(self):
        """Of a bound: the exact p(x), exp of the bound, and by how much the bound is too high on average, if it is."""
        line = np.linspace(-REACH, REACH, 71)
        values = self.log_p(np.repeat(line, EACH)[:, None])[1].reshape(71, EACH)
        above = (values - _normal(line, 0, 1)[:, None]).mean(0)         # a mean over x for each draw: their mean is at most 0
        self.above = float(above.mean() - 5 * above.std() / math.sqrt(EACH))
        self.p, self.low = np.exp(_normal(np.linspace(-REACH, REACH, LINE), 0, 1)), np.stack([line, np.exp(values.mean(1))], 1)

    def _there_and_back(self):
        """x = inverse(z) of the base's draws. Raises ValueError if the layer's two ways do not fit together."""
        if not hasattr(self.layer, "inverse"):
            return None
        back = self.inverse(self.z)
        off = self.inverse(self.forward(back)[0]) - back if self.bound else self.forward(back)[0] - self.z
        off = float(np.abs(off).max())
        if off > 1e-3:
            ways = "inverse(forward(x)) is not x" if self.bound else "forward(inverse(z)) is not z"
            raise ValueError(f"{ways}: they differ by up to {off:.2g}")
        return back

    def _kind(self):
        """Dimension of x and of z, and which base suits z. The line is tried first, unless the layer does nothing there."""
        for dim in (1, 2):
            x = np.random.default_rng(0).uniform(-2, 2, (40, dim))
            # Any exception: a layer of the plane may refuse the line in its own words.
            try:
                z, contribution = self.forward(x)
            except Exception as e:
                why = e
                continue
            if dim == 1 and z.shape == x.shape and np.allclose(z, x) and np.allclose(contribution, 0):
                continue
            if dim < z.shape[1]:
                return dim, z.shape[1], "tilted"
            if (z >= 0).all():
                return dim, z.shape[1], "half"
            return dim, z.shape[1], "sorted" if z.shape[1] == 2 and (z[:, 0] <= z[:, 1]).all() else "any"
        raise why

    def forward(self, x):
        """z (B, 1 or 2) and contribution (B,) of x (B, dim), the same draws each time."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            pair = self.layer.forward(torch.from_numpy(np.asarray(x)).to(self.like))
        z, contribution = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, None)
        shape = tuple(getattr(z, "shape", ()))
        if contribution is None or shape not in ((len(x), 1), (len(x), 2)):
            got = f"{type(pair).__name__}" if contribution is None else f"z of shape {shape}"
            raise ValueError(f"forward must give z (B, 1) or (B, 2) and a contribution (B,) for x of shape {np.shape(x)}, got {got}")
        return answer("z", z, shape), answer("the contribution", contribution, (len(x),))

    def inverse(self, z):
        """x (B, dim), drawn among those that z may come from."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            return answer("inverse(z)", self.layer.inverse(torch.from_numpy(z).to(self.like)), (len(z), self.dim))

    def log_p(self, x):
        """z, and log p(z) + contribution, (B,), of x (B, dim)."""
        z, contribution = self.forward(x)
        return z, self.base.log_prob(z) + contribution

    def caption(self):
        """What to look at, or what is wrong."""
        if self.trouble:
            return self.trouble
        # A bound's integral is a mean of exponentials, which a narrow q leaves below one.
        if (not 0.5 < self.integral < 1.5 or self.above > 0.02) if self.bound else abs(self.integral - 1) > 0.04:
            fault = f"the density integrates to {self.integral:.2f} and not to 1"
            fault = "the bound lies above log p(x)" if self.bound and self.above > 0.02 else fault
            meant = "−log q of the draw" if self.bound else "the log-probability of x among those that share a z"
            return f"Careful: {fault}, so the contribution is not {meant}."
        if self.bound:
            return ("One x, many z (rings): a coordinate z₂ is drawn, and the inverse drops it. Each draw pays −log q(z₂ | x); "
                    "their mean (purple bar) stays below the exact log p(x) (dashed), unless q is p(z₂ | x).")
        return ("One z (purple), many x: the inverse draws one of those that share it (rings), and the contribution is the "
                "log-probability of that choice. Move x among its rings: z stays.")


def _centres():
    return (np.arange(CELLS) + 0.5) / CELLS * 2 * REACH - REACH


def _plane(line):
    x, y = np.meshgrid(line, line)
    return np.stack([x.ravel(), y.ravel()], 1)


def _picture(one, state):
    x = np.array([[state["a"], state["b"]][:one.dim]])
    there, contributions = one.forward(np.repeat(x, MANY if one.bound else 1, 0))
    z = there[:1]
    draws = one.inverse(np.repeat(z, MANY, 0)) if one.back is not None and not one.bound else x
    data = _side(one.dim, "x", one.p, one.back, draws, x, one.low if one.bound else None)
    p_z = np.exp(one.base.log_prob(np.linspace(-REACH, REACH, LINE)[:, None] if one.to == 1 else _plane(_centres())))
    latent = _side(one.to, "z", p_z, one.z, there, None)
    log_z = one.base.log_prob(there)
    meter, total = _meter(one, log_z, contributions, x)
    if one.bound:
        words = f"one x, {MANY} draws of z; mean of log p(z) + contribution = {total:.2f}"
    else:
        many = len(np.unique(draws.round(3), axis=0))
        words = f"z = {_point(z[0])}; {MANY} draws back: {many} different x; log p(x) = {total:.2f}"
    label = f"x = {_point(x[0])}; {words}; ∫p = {one.integral:.2f}"
    return scene.frame([[data, latent, meter]], label.replace("-", "−"))


def _point(v):
    return f"{v[0]:.2f}" if len(v) == 1 else f"({', '.join(f'{c:.2f}' for c in v)})"


def _side(dim, name, p, cloud, draws, handle, low=None):
    """The line or the plane, its density, some points, and those that belong to the one point."""
    ticks = [-2, 0, 2]
    title = f"{'data' if name == 'x' else 'latent'} {name}, and {'√' * (dim == 2)}p({name})"
    if dim == 2:
        marks = [scene.heat(np.sqrt(p).reshape(CELLS, CELLS), BOX)]
        if cloud is not None:
            marks.append(scene.points(cloud, "sky", size=2, alpha=0.7))
        marks.append(scene.points(draws, "purple", "ring", 8, 1))
        if handle is not None:
            marks.append(scene.handles(handle, "point", ["red"], ["diamond"]))
        return scene.panel(marks, BOX, title, f"{name}₁", f"{name}₂", ticks, ticks, equal=True)
    line, tall = np.linspace(-REACH, REACH, LINE), 1.25 * max(0.4, float(p.max()))
    curve = np.stack([line, p], 1)
    marks = [scene.area(np.concatenate([curve, [(REACH, 0), (-REACH, 0)]]), "sky", 0.5), scene.lines(curve, "ink", 3)]
    if low is not None:
        marks.append(scene.lines(low, "purple", 3.5, "dashed"))
        title = "p(x), and exp of the bound"
    if cloud is not None:
        marks.append(scene.lines([[(v, 0), (v, 0.05 * tall)] for v in cloud[:200, 0]], "blue", 1.5, alpha=0.6))
    marks.append(scene.points(_piled(draws[:, 0], tall), "purple", "ring", 7, 1))
    if handle is not None:
        marks.append(scene.handles([(handle[0, 0], 0.0)], "line", ["red"], ["diamond"]))
    return scene.panel(marks, (-REACH, REACH, 0, tall), title, name, xticks=ticks, yticks=scene.axis(0, tall, 3))


def _piled(values, tall):
    """Points above a line (N, 2), those of one value on top of each other."""
    seen, made = {}, []
    for v in values:
        level = seen[round(v, 2)] = seen.get(round(v, 2), 0) + 1
        made.append((v, (0.06 + 0.037 * level) * tall))
    return np.array(made)


def _meter(one, log_z, contributions, x):
    """Bars of log p(z), the contribution and their sum (nats); of a bound the draws, their mean and the exact value besides."""
    values = [float(log_z.mean()), float(contributions.mean()), float((log_z + contributions).mean())]
    shown = [v if np.isfinite(v) else -9.0 for v in values]
    each = np.stack([log_z, contributions, log_z + contributions])
    low = max(-9.0, min(-3.0, 1.25 * min(shown), 1.1 * float(each[np.isfinite(each)].min(initial=0))))
    high = max(0.0, float(each[np.isfinite(each)].max(initial=0)))
    high += 0.22 * (high - low)
    marks = [scene.bars([(i + 0.15, i + 0.85, min(0, v), max(0, v)) for i, v in enumerate(shown)], ["orange", "green", "purple"]),
             scene.lines([(0, 0), (3, 0)], "ink", 2)]
    if one.bound:
        exact = float(_normal(x[0, 0], 0, 1))
        spread = np.linspace(0.25, 0.75, len(log_z))
        marks += [scene.points(np.stack([i + spread, np.maximum(each[i], low)], 1), "ink", "disc", 3, 0.8) for i in range(3)]
        marks.append(scene.lines([(2, exact), (3, exact)], "ink", 4, "dashed"))
    for i, (value, name) in enumerate(zip(values, ("log p(z)", "contrib.", "sum" if one.bound else "log p(x)"))):
        words = f"{value:.2f}".replace("-", "−") if np.isfinite(value) else "−∞"
        marks += [scene.text(words, i + 0.5, high - 0.05 * (high - low), weight="600"),
                  scene.text(name, i + 0.5, low - 0.03 * (high - low), "quiet", base="top")]
    return scene.panel(marks, (0, 3, low, high), "log-likelihood, nats", yticks=scene.axis(low, high, 5), width=1.0), values[2]
