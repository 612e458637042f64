"""View 1, `bend`: the change of variables on a line. Bend the map z(x), and see what the density of x must do.

    p(x) dx = p(z) |dz|,        so        p(x) = p(z(x)) |dz/dx|

The two shaded areas are the same probability, seen from both sides. Who forgets |dz/dx| still draws a curve, but no density: the
meter says what it integrates to. Nor is it one where the map turns round, since several x then claim the probability of one z. The curve is a
cubic through the knots that is monotone between each two (Fritsch & Carlson 1980, "Monotone Piecewise Cubic Interpolation").
"""
import math

import numpy as np
import torch

from . import scene
from .view import View, slider, switch

X = (-4.0, 4.0)
WIDTH = 0.5                         # of the probe, in x
FAR = 40.0                          # the integral goes from -FAR to FAR
LEAST = 0.01                        # between two knots, of the picture
SAMPLES = 24                        # of a uniform base, evenly spaced


def _normal(z):
    return np.exp(-0.5 * z ** 2) / math.sqrt(2 * math.pi)


# The density of z, the picture's range and ticks, and the height of the density's picture.
BASES = {"normal": (_normal, (-4.0, 4.0), [-4, -2, 0, 2, 4], 0.5),
         "uniform": (lambda z: ((z >= 0) & (z <= 1)).astype(float), (-0.15, 1.15), [0, 0.5, 1], 1.25)}


def _preset(to, base="normal", free=False):
    return {"knots": np.stack([np.linspace(-3, 3, 5), to], 1), "base": base, "free": free}


PRESETS = {
    "one hump to two": _preset([-2.6, -0.6, 0.0, 0.6, 2.6]),
    "nothing": _preset(np.linspace(-3, 3, 5)),
    "squeezed together": _preset([-3.6, -2.8, 0.0, 2.8, 3.6]),
    "leaning": _preset([-3.4, -2.9, -2.0, -0.4, 3.4]),
    "decreasing": _preset([3.2, 1.8, 0.9, -0.9, -2.8]),
    "turning: no inverse": _preset([-2.8, 0.9, 0.0, -0.9, 2.8], free=True),
    "flat: no inverse": _preset([-2.4, 0.3, 0.3, 0.3, 2.6], free=True),
    "uniform base": _preset([0.03, 0.38, 0.5, 0.66, 0.97], "uniform"),
}


def bend(layer=None):
    """Drag the knots of a map z(x) from data to a base, normal or uniform; the density of x follows.

    Left and right move the probe, a digit chooses a knot, up and down move it. The presets include a decreasing map, and two without an
    inverse, whose knots move freely. layer: instead of the knots, a layer of yours on one dimension, forward(x) -> (z, ldj) for x (N, 1)
    and a normal base; its ldj is what it says, right or wrong. Raises ValueError if it cannot be asked.
    """
    def asked(state):
        return (lambda x: _layer_at(layer, x)) if layer is not None else (lambda x: cubic(state["knots"], x))

    def drag(state, name, index, x, z):
        if name == "probe":
            return {"probe": float(np.clip(x - WIDTH / 2, X[0], X[1] - WIDTH))}
        return {"selected": index, "knots": _moved(state, index, x, z)}

    def lift(state, by):
        (x, z), (low, high) = state["knots"][state["selected"]], BASES[state["base"]][1]
        return {"knots": _moved(state, state["selected"], x, z + (high - low) / 80 * by)}

    controls = {"probe": slider("probe", 0.4, X[0], X[1] - WIDTH, 0.1), "forget": switch("forget the Jacobian")}
    if layer is not None:
        more = {"state": {"base": "normal"}, "steps": ("probe",)}
    else:
        more = {"state": {"selected": 1}, "presets": PRESETS, "steps": ("probe", lift),
                "press": lambda state, digit: {"selected": min(digit, len(state["knots"])) - 1}}
    return View("Bend: the change of variables", lambda state, coarse: [_picture(state, asked(state), 241 if coarse else 801)],
                lambda state: _caption(state["forget"], way(asked(state))), controls, drag=drag, rate=20, **more)


def way(ask):
    """Which way a map goes on the line: "up", "down", "flat" (it halts, and never turns round) or "turning"."""
    x = np.linspace(*X, 801)
    steps = np.diff(ask(x)[0])
    halts = np.abs(steps) < 1e-9
    if (steps[~halts] > 0).all() or (steps[~halts] < 0).all():
        return "flat" if halts.any() else "up" if steps[0] > 0 else "down"
    return "turning"


def _caption(forget, way):
    if forget:
        return "Without |dz/dx| the curve is p(z(x)) alone: the areas differ, and it does not integrate to one."
    return {
        "up": "The shaded areas are one and the same probability: where the map is steep, little x carries much z, and the density of x is high.",
        "down": "Falling: as x runs up z runs down, so the limits of the integral turn round, and |dz/dx| makes of the negative slope a density.",
        "flat": "Flat: a whole stretch of x has one z, so z does not tell which x it was, and there log p(x) is −∞.",
        "turning": "It turns round: where several x have one z (rings) each claims its whole probability, so this is no density and no inverse.",
    }[way]


def cubic(knots, x):
    """z and log|dz/dx| of the curve through knots (K, 2) at points x (N,): it turns at knots only, and is straight beyond the outermost."""
    at, to = np.asarray(knots, float).T
    rise = np.diff(to) / np.diff(at)
    h = np.diff(at)
    # The harmonic mean of the neighbouring slopes keeps every piece monotone (Fritsch & Butland 1984); a knot between up and down is a turn.
    a, b = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    same = rise[:-1] * rise[1:] > 0
    before, after = np.where(same, rise[:-1], 1), np.where(same, rise[1:], 1)
    slope = np.concatenate([rise[:1], np.where(same, (a + b) / (a / before + b / after), 0), rise[-1:]])
    i = np.clip(np.searchsorted(at, x) - 1, 0, len(h) - 1)
    t = np.clip((x - at[i]) / h[i], 0, 1)
    m0, m1 = slope[i] * h[i], slope[i + 1] * h[i]
    z = to[i] + (to[i + 1] - to[i]) * t * t * (3 - 2 * t) + m0 * t * (1 - t) ** 2 + m1 * t * t * (t - 1)
    dz = (6 * t * (1 - t) * (to[i + 1] - to[i]) + m0 * (1 - t) * (1 - 3 * t) + m1 * t * (3 * t - 2)) / h[i]
    z = z + np.where(x < at[0], (x - at[0]) * slope[0], 0) + np.where(x > at[-1], (x - at[-1]) * slope[-1], 0)
    with np.errstate(divide="ignore"):
        return z, np.log(np.abs(dz))


def _layer_at(layer, x):
    like = next(layer.parameters(), torch.zeros(())) if hasattr(layer, "parameters") else torch.zeros(())
    with torch.no_grad():
        z, ldj = layer.forward(torch.from_numpy(x)[:, None].to(like.detach()))
    if z.shape != (len(x), 1) or ldj.shape != (len(x),):
        raise ValueError(f"forward must give z of shape {(len(x), 1)} and ldj of shape {(len(x),)}, got {tuple(z.shape)} and {tuple(ldj.shape)}")
    return scene.array(z[:, 0], np.float64), scene.array(ldj, np.float64)


def _moved(state, k, x, z):
    """The knots with one of them moved as far towards (x, z) as its neighbours allow; freely up and down if the map may turn."""
    knots, range_ = np.array(state["knots"]), BASES[state["base"]][1]
    least = LEAST * np.array([X[1] - X[0], range_[1] - range_[0]])
    low, high = np.array([X[0], range_[0]]) + least, np.array([X[1], range_[1]]) - least
    down = not state["free"] and knots[0, 1] > knots[-1, 1]
    if down:
        knots[:, 1] *= -1
        low[1], high[1], z = -high[1], -low[1], -z
    axes = slice(0, 1 if state["free"] else 2)
    if k > 0:
        low[axes] = (knots[k - 1] + least)[axes]
    if k < len(knots) - 1:
        high[axes] = (knots[k + 1] - least)[axes]
    knots[k] = np.clip([x, z], low, high)
    if down:
        knots[:, 1] *= -1
    return knots


def _picture(state, ask, n):
    forget, (p_z, z_box, z_ticks, wide) = state["forget"], BASES[state["base"]]
    which = way(ask)

    def p_x(x):
        z, ldj = ask(x)
        return p_z(z) * (1 if forget else np.exp(ldj))

    x = np.linspace(*X, n)
    z = ask(x)[0]
    low, high = state["probe"], state["probe"] + WIDTH
    middle = (low + high) / 2
    inside = np.linspace(low, high, 41)
    z_inside = ask(inside)[0]
    start, end = float(z_inside[0]), float(z_inside[-1])
    z_range = np.linspace(*z_box, n)
    area_x = float(np.trapezoid(p_x(inside), inside))
    area_z = abs(float(np.trapezoid(p_z(z_inside), z_inside)))
    far = np.concatenate([np.linspace(-FAR, X[0], 400, endpoint=False), x, np.linspace(X[1], FAR, 401)[1:]])
    whole = float(np.trapezoid(p_x(far), far))
    tall = min(4.0, max(0.55, 1.12 * float(p_x(x).max())))
    guide = {"colour": "quiet", "width": 1.5, "dash": "dashed"}
    # Which way x goes and which way z goes with it, at a length that can be seen.
    span, side = z_box[1] - z_box[0], X[1] - 0.3
    foot = z_box[0] + 0.05 * span
    way_z = 0.11 * span * np.sign(end - start) * np.array([-1, 1]) + (start + end) / 2
    marks = [scene.lines(np.array([[(v, z_box[0]), (v, w)] for v, w in ((low, start), (high, end))]), **guide),
             scene.lines(np.array([[(v, w), (X[1], w)] for v, w in ((low, start), (high, end))]), **guide),
             scene.lines(_curve(x, z), "ink", 3.5), scene.lines(_curve(inside, z_inside), "red", 6),
             scene.arrows([[(middle - 0.5, foot), (middle + 0.5, foot)], [(side, way_z[0]), (side, way_z[1])]], "red", 4)]
    ticks, rug = [-4, -2, 0, 2, 4], []
    if state["base"] == "uniform":
        u = (np.arange(SAMPLES) + 0.5) / SAMPLES
        drawn = np.interp(u, z, x) if which == "up" else np.interp(-u, -z, x)
        marks.insert(0, scene.lines([[(X[1], v), (t, v), (t, z_box[0])] for t, v in zip(drawn, u)], "sky", 1.2))
        rug = [scene.lines([[(t, 0), (t, 0.1 * tall)] for t in drawn], "blue", 2.5)]
    level = float(ask(np.array([middle]))[0][0])
    met = x[1:][(z[1:] > level) != (z[:-1] > level)]
    if which == "turning":
        marks.append(scene.points(_curve(met, np.full(len(met), level)), "red", "ring", 9, 1))
    if "knots" in state:
        marks.append(scene.handles(state["knots"], "knot", ["green"] * len(state["knots"]), ["square"] * len(state["knots"]), state["selected"]))
    the_map = scene.panel(marks, (*X, *z_box), "the map z(x)", ylabel="z", yticks=z_ticks, width=1.5)
    beside = scene.panel([
        scene.area(_under(z_inside, p_z(z_inside), upright=True), "orange", 0.75), scene.lines(_curve(p_z(z_range), z_range), "ink", 3),
        scene.lines([[(0, v), (float(p_z(np.array(v))), v)] for v in (start, end)], **guide),
    ], (0, wide, *z_box), "p(z)", width=0.75)
    no_density = forget or which == "turning"
    title = ("p(z(x))" if forget else "p(z) |dz/dx|") + ", no density" if no_density else "p(x) = p(z) |dz/dx|"
    below = scene.panel([
        scene.area(_under(inside, p_x(inside)), "blue", 0.75), scene.lines(_curve(x, p_x(x)), "ink", 3, "dotted" if no_density else "solid"), *rug,
        scene.handles([(middle, 0.05 * tall)], "probe", ["red"], ["diamond"]),
    ], (*X, 0, tall), title, xlabel="x", xticks=ticks, ylabel="p", yticks=scene.axis(0, tall, 3), width=1.5, height=0.72)
    top = max(1.3, 1.2 * whole)
    values = [(area_x, "blue", "in x"), (area_z, "orange", "in z"), (whole, "green", "all x")]
    meter = [scene.lines([(0, 1), (3, 1)], "ink", 2, "dashed")]
    for i, (value, colour, name) in enumerate(values):
        meter += [scene.bars([(i + 0.2, i + 0.8, 0, value)], [colour]),
                  scene.text(f"{value:.2f}", i + 0.5, value + 0.03 * top, base="bottom", weight="600"),
                  scene.text(name, i + 0.5, -0.04 * top, colour="quiet", base="top")]
    measures = scene.panel(meter, (0, 3, 0, top), "area under the curves", yticks=[0, 1], width=0.75, height=0.72, framed=False)
    label = f"x from {low:.2f} to {high:.2f}: z from {start:.2f} {'down ' if end < start else ''}to {end:.2f}, slope {(end - start) / WIDTH:.2f}"
    if which == "turning":
        label += f"; {len(met)} x with one z" if len(met) > 1 else "; one x with this z"
    return scene.frame([[the_map, beside], [below, measures]], label.replace("-", "−"))


def _curve(x, y):
    return np.stack([x, y], -1)


def _under(x, y, upright=False):
    """The area between a curve and zero, as a polygon."""
    outline = np.concatenate([_curve(x, y), [(x[-1], 0), (x[0], 0)]])
    return outline if not upright else np.concatenate([_curve(y, x), [(0, x[-1]), (0, x[0])]])
