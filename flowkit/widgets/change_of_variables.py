"""View 1, `bend`: the change of variables on a line. Bend the map z(x), and see what the density of x must do.

    p(x) dx = p(z) dz,        so        p(x) = p(z(x)) dz/dx

The two shaded areas are the same probability, seen from both sides. Who forgets dz/dx still draws a curve, but no density: the
meter says what it integrates to. The curve is a monotone cubic through the knots (Fritsch & Carlson 1980, "Monotone Piecewise Cubic
Interpolation").
"""
import math

import numpy as np
import torch

from . import scene
from .view import View, slider, switch

X, Z = (-4.0, 4.0), (-4.0, 4.0)
WIDTH = 0.5                         # of the probe, in x
FAR = 40.0                          # the integral goes from -FAR to FAR
LEAST = 0.08                        # between two knots
START = np.linspace(-3, 3, 5)

PRESETS = {
    "one hump to two": {"knots": np.stack([START, [-2.6, -0.6, 0.0, 0.6, 2.6]], 1)},
    "nothing": {"knots": np.stack([START, START], 1)},
    "squeezed together": {"knots": np.stack([START, [-3.6, -2.8, 0.0, 2.8, 3.6]], 1)},
    "leaning": {"knots": np.stack([START, [-3.4, -2.9, -2.0, -0.4, 3.4]], 1)},
}


def bend(layer=None):
    """Drag the knots of a monotone map z(x) from data to a standard normal; the density of x follows.

    Left and right move the probe, a digit chooses a knot, up and down move it. layer: instead of the knots, a layer of
    yours on one dimension, forward(x) -> (z, ldj) for x (N, 1); its ldj is what it says, right or wrong. Raises ValueError if it
    cannot be asked.
    """
    def compute(state, coarse):
        ask = (lambda x: _layer_at(layer, x)) if layer is not None else (lambda x: monotone(state["knots"], x))
        return [_picture(state, ask, 241 if coarse else 801, layer is None)]

    def drag(state, name, index, x, z):
        if name == "probe":
            return {"probe": float(np.clip(x - WIDTH / 2, X[0], X[1] - WIDTH))}
        return {"selected": index, "knots": _moved(state["knots"], index, x, z)}

    def lift(state, by):
        knots, k = state["knots"], state["selected"]
        return {"knots": _moved(knots, k, knots[k, 0], knots[k, 1] + 0.1 * by)}

    controls = {"probe": slider("probe", 0.4, X[0], X[1] - WIDTH, 0.1), "forget": switch("forget the Jacobian")}
    knots = {} if layer is not None else {
        "state": {"knots": START, "selected": 1}, "presets": PRESETS, "drag": drag,
        "press": lambda state, digit: {"selected": min(digit, len(state["knots"])) - 1}}
    if layer is not None:
        knots["drag"] = drag
    return View("Bend: the change of variables", compute, _caption, controls, steps=("probe", lift) if layer is None else ("probe",),
                rate=20, **knots)


def _caption(state):
    if state["forget"]:
        return "Without dz/dx the curve is p(z(x)) alone: the areas differ, and it does not integrate to one."
    return "The shaded areas are one and the same probability: where the map is steep, little x carries much z, and the density of x is high."


def monotone(knots, x):
    """z and log dz/dx of the increasing cubic through knots (K, 2) at points x (N,); straight on beyond the outermost knots."""
    at, to = np.asarray(knots, float).T
    rise = np.diff(to) / np.diff(at)
    h = np.diff(at)
    # The harmonic mean of the neighbouring slopes keeps every piece increasing (Fritsch & Butland 1984).
    a, b = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    slope = np.concatenate([rise[:1], (a + b) / (a / rise[:-1] + b / rise[1:]), rise[-1:]])
    i = np.clip(np.searchsorted(at, x) - 1, 0, len(h) - 1)
    t = np.clip((x - at[i]) / h[i], 0, 1)
    m0, m1 = slope[i] * h[i], slope[i + 1] * h[i]
    z = to[i] + (to[i + 1] - to[i]) * t * t * (3 - 2 * t) + m0 * t * (1 - t) ** 2 + m1 * t * t * (t - 1)
    dz = (6 * t * (1 - t) * (to[i + 1] - to[i]) + m0 * (1 - t) * (1 - 3 * t) + m1 * t * (3 * t - 2)) / h[i]
    z = z + np.where(x < at[0], (x - at[0]) * slope[0], 0) + np.where(x > at[-1], (x - at[-1]) * slope[-1], 0)
    return z, np.log(dz)


def _layer_at(layer, x):
    like = next(layer.parameters(), torch.zeros(())) if hasattr(layer, "parameters") else torch.zeros(())
    with torch.no_grad():
        z, ldj = layer.forward(torch.from_numpy(x)[:, None].to(like.detach()))
    if z.shape != (len(x), 1) or ldj.shape != (len(x),):
        raise ValueError(f"forward must give z of shape {(len(x), 1)} and ldj of shape {(len(x),)}, got {tuple(z.shape)} and {tuple(ldj.shape)}")
    return scene.array(z[:, 0], np.float64), scene.array(ldj, np.float64)


def _moved(knots, k, x, z):
    """The knots with one of them moved as far towards (x, z) as its neighbours allow."""
    knots = np.array(knots)
    low, high = np.array([X[0], Z[0]]) + 0.1, np.array([X[1], Z[1]]) - 0.1
    if k > 0:
        low = knots[k - 1] + LEAST
    if k < len(knots) - 1:
        high = knots[k + 1] - LEAST
    knots[k] = np.clip([x, z], low, high)
    return knots


def _normal(z):
    return np.exp(-0.5 * z ** 2) / math.sqrt(2 * math.pi)


def _picture(state, ask, n, knots):
    forget = state["forget"]

    def p_x(x):
        z, ldj = ask(x)
        return _normal(z) * (1 if forget else np.exp(ldj))

    x = np.linspace(*X, n)
    z = ask(x)[0]
    low, high = state["probe"], state["probe"] + WIDTH
    inside = np.linspace(low, high, 41)
    z_inside = ask(inside)[0]
    z_range = np.linspace(*Z, n)
    area_x = float(np.trapezoid(p_x(inside), inside))
    area_z = float(np.trapezoid(_normal(z_inside), z_inside))
    far = np.concatenate([np.linspace(-FAR, X[0], 400, endpoint=False), x, np.linspace(X[1], FAR, 401)[1:]])
    whole = float(np.trapezoid(p_x(far), far))
    tall = max(0.55, 1.12 * float(p_x(x).max()))
    wide = 0.5
    guide = {"colour": "quiet", "width": 1.5, "dash": "dashed"}
    sides = [[(v, Z[0]), (v, w)] for v, w in ((low, z_inside[0]), (high, z_inside[-1]))]
    level = [[(v, w), (X[1], w)] for v, w in ((low, z_inside[0]), (high, z_inside[-1]))]
    ticks = [-4, -2, 0, 2, 4]
    middle = (low + high) / 2
    marks = [scene.lines(np.array(sides), **guide), scene.lines(np.array(level), **guide), scene.lines(_curve(x, z), "ink", 3.5),
             scene.lines(_curve(inside, z_inside), "red", 6)]
    if knots:
        marks.append(scene.handles(state["knots"], "knot", ["green"] * len(state["knots"]), ["square"] * len(state["knots"]), state["selected"]))
    the_map = scene.panel(marks, (*X, *Z), "the map z(x)", ylabel="z", yticks=ticks, width=1.5)
    beside = scene.panel([
        scene.area(_under(z_inside, _normal(z_inside), upright=True), "orange", 0.75), scene.lines(_curve(_normal(z_range), z_range), "ink", 3),
        scene.lines([(0, z_inside[0]), (float(_normal(z_inside[0])), z_inside[0])], **guide),
        scene.lines([(0, z_inside[-1]), (float(_normal(z_inside[-1])), z_inside[-1])], **guide),
    ], (0, wide, *Z), "p(z)", width=0.75)
    below = scene.panel([
        scene.area(_under(inside, p_x(inside)), "blue", 0.75), scene.lines(_curve(x, p_x(x)), "ink", 3, "dotted" if forget else "solid"),
        scene.handles([(middle, 0.05 * tall)], "probe", ["red"], ["diamond"]),
    ], (*X, 0, tall), "p(z(x)), no density" if forget else "p(x) = p(z) dz/dx", xlabel="x", xticks=ticks, ylabel="p", yticks=scene.axis(0, tall, 3),
        width=1.5, height=0.72)
    top = max(1.3, 1.2 * whole)
    values = [(area_x, "blue", "in x"), (area_z, "orange", "in z"), (whole, "green", "all x")]
    meter = [scene.lines([(0, 1), (3, 1)], "ink", 2, "dashed")]
    for i, (value, colour, name) in enumerate(values):
        meter += [scene.bars([(i + 0.2, i + 0.8, 0, value)], [colour]), scene.text(f"{value:.2f}", i + 0.5, value + 0.03 * top, base="bottom", weight="600"),
                  scene.text(name, i + 0.5, -0.04 * top, colour="quiet", base="top")]
    measures = scene.panel(meter, (0, 3, 0, top), "area under the curves", yticks=[0, 1], width=0.75, height=0.72, framed=False)
    slope = float((z_inside[-1] - z_inside[0]) / WIDTH)
    return scene.frame([[the_map, beside], [below, measures]], f"x = {middle:+.2f}, dz/dx = {slope:.2f}".replace("-", "−"))


def _curve(x, y):
    return np.stack([x, y], -1)


def _under(x, y, upright=False):
    """The area between a curve and zero as a polygon."""
    outline = np.concatenate([_curve(x, y), [(x[-1], 0), (x[0], 0)]])
    return outline if not upright else np.concatenate([_curve(y, x), [(0, x[-1]), (0, x[0])]])
