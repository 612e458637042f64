"""View 4, `planar`: one planar layer, and the fold that comes when w.u goes below -1.

    z = x + u tanh(a),   a = w.x + b,   det dz/dx = 1 + w.u (1 - tanh(a)^2)

Along w the layer is a map of one variable, a -> a + w.u tanh(a), with slope 1 + w.u at a = 0. Below -1 it turns round: between the two
planes where the determinant is 0 it is negative, there the plane is folded, and three x have one z. (Rezende & Mohammed 2015,
appendix A.1.)
"""
import math

import numpy as np
import torch

from . import scene
from .view import View, slider

BOX = (-3.0, 3.0, -3.0, 3.0)
LONG = 4.0                          # half a side of the picture along w
GRID = scene.grid((-6, 6, -6, 6), 25, 121)
MOVED = ("w.u and b", "u", "w", "z")        # by the arrow keys, after 1 to 4

_START = {"angle": 0.4, "length": 1.5, "across": 0.3, "b": 0.0, "point": np.array([-0.4, 1.3]), "selected": 0}
PRESETS = {
    "squeeze": _START | {"wu": -0.7},
    "stretch": _START | {"wu": 1.5},
    "edge: w.u = −1": _START | {"wu": -1.0},
    "fold": _START | {"wu": -2.2},
    "u across w": _START | {"wu": 0.0, "across": 1.2},
}


def planar(layer=None):
    """Move w.u of a planar layer through -1: the grid folds, the determinant turns negative, and a point z has three x.

    Left and right move w.u, up and down b; 2, 3 and 4 put u, w and the point z under the arrow keys, and all three can be dragged. layer: a
    planar layer of yours on the plane, with attributes w (2,) and b and a forward; its u is the one that forward uses.
    Raises ValueError if it is none.
    """
    values = PRESETS["squeeze"] if layer is None else _START | _read(layer)
    low, high = min(-3.0, values["wu"]), max(2.0, values["wu"])

    def drag(state, name, index, x, y):
        tip = np.clip([x, y], BOX[0], BOX[1])
        if name == "point":
            return {"point": tip, "selected": 3}
        if index == 1:
            return {"angle": math.atan2(tip[1], tip[0]), "length": float(np.clip(np.hypot(*tip), 0.3, 3)), "selected": 2}
        w = vectors(state)[0]
        side = np.array([-w[1], w[0]]) / np.hypot(*w)
        return {"wu": float(w @ tip), "across": float(side @ tip), "selected": 1}

    def nudge(axis):
        def move(state, by):
            which = state["selected"]
            if which == 0:
                name, least, most = (("wu", low, high), ("b", -2.0, 2.0))[axis]
                return {name: float(np.clip(state[name] + 0.05 * by, least, most))}
            w, u = vectors(state)
            tip = (u, w, state["point"])[which - 1] + 0.05 * by * np.eye(2)[axis]
            return drag(state, "point" if which == 3 else "arrow", which - 1, *tip)
        return move

    controls = {"wu": slider("w.u", values["wu"], low, high, 0.05), "b": slider("b", values["b"], -2.0, 2.0, 0.05)}
    return View("Planar: a layer that folds when w.u is below −1", lambda state, coarse: [_picture(state)], _caption,
                controls, {name: value for name, value in values.items() if name not in controls}, PRESETS if layer is None else None,
                steps=(nudge(0), nudge(1)), walk="wu", drag=drag, press=lambda state, digit: {"selected": min(digit, 4) - 1}, rate=20)


def vectors(state):
    """w and u, each (2,): w by its angle and length, u by its product with w and its part across w."""
    along = np.array([math.cos(state["angle"]), math.sin(state["angle"])])
    return state["length"] * along, state["wu"] / state["length"] * along + state["across"] * np.array([-along[1], along[0]])


def turn(wu):
    """The a > 0 at which the determinant is 0, so that it is negative between -a and a; None where it is positive everywhere."""
    return math.atanh(math.sqrt(1 + 1 / wu)) if wu < -1 else None


def roots(wu, value):
    """All a with a + w.u tanh(a) = value, rising: one, or three within a fold. Bisection on each piece that has one direction."""
    reach, edge = abs(wu) + 1, turn(wu)
    ends = [value - reach, value + reach] if edge is None else sorted([value - reach, -edge, edge, value + reach])
    found = []
    for low, high in zip(ends, ends[1:]):
        below = low + wu * math.tanh(low) < value
        if below == (high + wu * math.tanh(high) < value):
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (middle + wu * math.tanh(middle) < value) == below else (low, middle)
        found.append((low + high) / 2)
    return found


def preimages(state):
    """All x (N, 2) that the layer carries to the point z."""
    w, u = vectors(state)
    a = np.array(roots(state["wu"], w @ state["point"] + state["b"]))
    return state["point"] - np.tanh(a)[:, None] * u


def _read(layer):
    """The numbers of somebody's planar layer: w and b are attributes, and u is what moves its points."""
    def asked(x):
        with torch.no_grad():
            return scene.array(layer.forward(torch.from_numpy(x).to(layer.w.detach()))[0], np.float64)

    if not all(hasattr(layer, name) for name in ("w", "b", "forward")) or np.shape(scene.array(layer.w)) != (2,):
        raise ValueError("layer must have w of shape (2,), b, and forward(x) -> (z, ldj)")
    w, b = scene.array(layer.w, np.float64), scene.array(layer.b, np.float64).item()
    x = scene.grid(BOX, 5, 5).reshape(-1, 2).astype(np.float64)
    h = np.tanh(x @ w + b)
    u = h @ (asked(x) - x) / (h @ h)
    if not np.allclose(asked(x), x + h[:, None] * u, atol=1e-3):
        raise ValueError(f"forward of {type(layer).__name__} is not x + u tanh(w.x + b) for its w and b and any u")
    length = float(np.hypot(*w))
    across = float((w[0] * u[1] - w[1] * u[0]) / length)
    return {"angle": math.atan2(w[1], w[0]), "length": length, "wu": float(w @ u), "across": across, "b": b}


def _caption(state):
    if state["wu"] < -1 - 1e-9:
        return ("Folded: between the dashed lines the determinant is negative, the grid lies over itself, and inside the band three x share one z: "
                "there is no inverse.")
    if state["wu"] < -1 + 1e-9:
        return "The edge: on one line the determinant is 0 and log p(x) has no value; one step further the plane folds."
    return "The plane is pressed together where w.x + b = 0, or pulled apart; while w.u is above −1 every z has one x. Move w.u through −1."


def _band(w, middle, half):
    """The strip |w.x - middle| < half as a polygon, and its two edges (2, 2, 2)."""
    along, side = w / (w @ w), np.array([-w[1], w[0]]) / np.hypot(*w)
    edges = np.stack([[(middle + s * half) * along - 20 * side, (middle + s * half) * along + 20 * side] for s in (-1, 1)])
    return np.concatenate([edges[0], edges[1][::-1]]), edges


def _inside(w, b, edge):
    """Those pieces of the grid's lines where |w.x + b| < edge, (L, 31, 2)."""
    start, end = GRID[:, 0].astype(float), GRID[:, -1].astype(float)
    a, slope = start @ w + b, (end - start) @ w
    with np.errstate(divide="ignore"):              # a line along the strip lies in it as a whole, or not at all
        low, high = np.sort(np.clip([(-edge - a) / slope, (edge - a) / slope], 0, 1), axis=0)[:, :, None]
    pieces = start[:, None] + (low + (high - low) * np.linspace(0, 1, 31))[..., None] * (end - start)[:, None]
    return pieces[high[:, 0] > low[:, 0]]


def _picture(state):
    (w, u), wu, b, z = vectors(state), state["wu"], state["b"], state["point"]
    edge, selected = turn(wu), state["selected"]
    image = scene.array(GRID + np.tanh(GRID @ w + b)[..., None] * u)
    left, right, along = [scene.lines(GRID, "blue", 1.2, alpha=0.6)], [scene.lines(image, "blue", 1.4, alpha=0.75)], []
    t = np.linspace(-LONG, LONG, 241)
    if edge is not None:
        inside = _inside(w, b, edge)
        high = abs(edge + wu * math.tanh(edge))
        for marks, lines, half in ((left, inside, edge), (right, inside + np.tanh(inside @ w + b)[..., None] * u, high)):
            area, edges = _band(w, -b, half)
            marks += [scene.area(area, "orange", 0.22), scene.lines(lines, "red", 2),
                      scene.lines(edges, "red", 2.5, "dashed")]
        folded = np.linspace(-edge, edge, 61)
        along = [scene.area([(-LONG, -high), (LONG, -high), (LONG, high), (-LONG, high)], "orange", 0.22)]
    x = preimages(state)
    a, level = x @ w + b, float(z @ w + b)
    left += [scene.arrows([[0, 0], w], "ink", 4), scene.arrows([[0, 0], u], "green", 4, "dashed"), scene.points(x, "purple", "diamond", 9, 1),
             scene.text("w", *_beyond(w), weight="600"), scene.text("u", *_beyond(u), weight="600"),
             scene.handles([u, w], "arrow", ["green", "ink"], ["square", "disc"], selected - 1 if selected in (1, 2) else None)]
    right += [scene.handles([z], "point", ["purple"], ["diamond"], 0 if selected == 3 else None)]
    along += [scene.lines([(-LONG, -LONG), (LONG, LONG)], "quiet", 1.5, "dotted"), scene.lines(np.stack([t, t + wu * np.tanh(t)], 1), "blue", 3.5)]
    if edge is not None:
        along.append(scene.lines(np.stack([folded, folded + wu * np.tanh(folded)], 1), "red", 5, "dashed"))
    along += [scene.lines([(-LONG, level), (LONG, level)], "purple", 2),
              scene.points(np.stack([a, np.full(len(a), level)], 1), "purple", "diamond", 9, 1)]
    ticks, many = [-2, 0, 2], len(x)
    panels = [scene.panel(left, BOX, "x", xticks=ticks, yticks=ticks, equal=True),
              scene.panel(right, BOX, "z = x + u tanh(w.x + b)", xticks=ticks, yticks=ticks, equal=True),
              scene.panel(along, (-LONG, LONG, -LONG, LONG), "along w", xlabel="w.x + b", ylabel="w.z + b", xticks=ticks, yticks=ticks, equal=True)]
    label = (f"w.u = {wu:.2f}, determinant from {min(1, 1 + wu):.2f} to {max(1, 1 + wu):.2f}, {many} x for this z; "
             f"arrows move {MOVED[selected]}")
    return scene.frame([panels], label.replace("-", "−"))


def _beyond(tip):
    length = float(np.hypot(*tip))
    return tip + (0.45 / length * tip if length > 0.05 else np.array([0.45, 0.0]))
