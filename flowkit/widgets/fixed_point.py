"""View 9, `contraction`: the inverse of a residual layer by a fixed-point iteration, as a cobweb.

    z = x + g(x),    x_0 = z,    x_(n+1) = z - g(x_n),    |x_n - x*| <= L^n |x_0 - x*|

L is the Lipschitz constant of g. While L < 1 the iteration contracts, whatever z is: there is one x, and the error falls by
at least the factor L a step. From L = 1 on nothing is promised: x + g(x) may turn round, so that several x share one z, and
the iteration may run to one of them, to and fro, or away. (Behrmann et al. 2019, "Invertible Residual Networks", theorem 1
and algorithm 1.)
"""
import math

import numpy as np
import torch

from . import scene
from .asked import answer, like, or_else
from .view import View, slider

X = (-4.0, 4.0)
FAR = 30.0                          # x* is looked for from -FAR to FAR
MOST = 30                           # iterations
FLOOR = -9                          # log10 of the smallest error that is drawn

# Each with Lipschitz constant 1: the slider multiplies them.
BRANCHES = {
    "g = −L sin x": lambda x: -np.sin(x),
    "g = L sin x": np.sin,
    "g = L tanh x": np.tanh,
    "g = −L x": lambda x: -x,
}
PRESETS = {name: {"branch": branch, "scale": scale, "z": z, "start": start} for name, branch, scale, z, start in (
    ("slow and sure", "g = −L sin x", 0.9, 0.06, 1.8),
    ("to and fro", "g = L sin x", 0.8, 1.0, None),
    ("the worst case", "g = −L x", 0.9, 0.3, None),
    ("much quicker than L", "g = L tanh x", 0.9, 2.5, None),
    ("L > 1: three x", "g = −L sin x", 1.6, 0.2, None),
    ("L > 1: a cycle", "g = L tanh x", 1.4, 0.3, None),
    ("L > 1: runs away", "g = −L x", 1.2, 0.3, None))}


def contraction(g=None):
    """Step through the fixed-point iteration x <- z - g(x) of a residual layer on the line: a cobweb, and its rate against L.

    g: a residual branch of yours, (B, 1) -> (B, 1); its slider multiplies it, so that one sees at which scale it stops
    contracting. Left and right take steps of the iteration, up and down change L, 1 to 7 choose a case; drag z (on the left)
    and the start x_0 (the square). A branch that answers in another shape, or not with finite numbers, is named under the
    picture.
    """
    said = {}
    if g is None:
        start = {"presets": PRESETS, "state": {"branch": "g = −L sin x", "start": None},
                 "press": lambda state, digit: {"preset": list(PRESETS)[min(digit, len(PRESETS)) - 1]}}
    else:
        start = {"state": {"branch": "yours", "start": None}}

    def branch(state):
        return BRANCHES.get(state["branch"]) or (lambda x: _asked(g, x))

    def compute(state, coarse):
        def picture(one):
            found = Iteration(lambda x: state["scale"] * one(x), state["z"], state["z"] if state["start"] is None else state["start"])
            said["caption"] = _caption(found)
            return [_picture(found, state, own=g is not None)]
        frames, words = or_else(lambda: picture(branch(state)), lambda: picture(np.zeros_like))
        said["caption"] = words or said["caption"]
        return frames

    def drag(state, name, index, x, y):
        return {"z": float(np.clip(y, *X))} if name == "z" else {"start": float(np.clip(x, *X))}

    scale = slider("L", 0.8, 0.0, 2.0, 0.05) if g is None else slider("times g", 1.0, 0.0, 2.0, 0.05)
    controls = {"n": slider("steps n", 6, 0, MOST, 1), "scale": scale, "z": slider("z", 0.6, *X, 0.1)}
    return View("Contraction: x ← z − g(x) undoes z = x + g(x)", compute, lambda state: said["caption"], controls, steps=("n", "scale"),
                drag=drag, rate=3, **start)


def _asked(g, x):
    flat = torch.from_numpy(np.reshape(x, (-1, 1))).to(like(g))
    with torch.no_grad():
        return answer("g(x)", g(flat), flat.shape).reshape(np.shape(x))


class Iteration:
    """A branch g, a z and a start: the iterates, every x with x + g(x) = z, the Lipschitz constant and the slope of g at x*."""

    def __init__(self, g, z, start):
        self.g, self.z = g, z
        line = np.linspace(-FAR, FAR, 24_001)
        value = g(line)
        self.lipschitz = float(np.abs(np.diff(value)).max() / (line[1] - line[0]))
        rest = line + value - z
        # Each is refined by bisection; a place where rest is 0 itself belongs to one piece only.
        left = np.flatnonzero((rest[1:] > 0) != (rest[:-1] > 0))
        low, high, sign = line[left], line[left + 1], rest[left] > 0
        for _ in range(45):
            middle = (low + high) / 2
            same = (middle + g(middle) - z > 0) == sign
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        self.roots = (low + high) / 2
        x = [float(start)]
        for _ in range(10 * MOST):
            x.append(float(z - g(np.array([x[-1]]))[0]) if abs(x[-1]) < 1e6 else x[-1])
        self.x, last = np.array(x[:MOST + 1]), x[-1]
        self.goal = float(self.roots[np.abs(self.roots - np.clip(last, -FAR, FAR)).argmin()]) if len(self.roots) else None
        self.error = np.abs(self.x - self.goal) if self.goal is not None else None
        near = np.array([-1e-3, 1e-3]) + (self.goal or 0.0)
        self.slope = float(np.diff(g(near))[0] / 2e-3)
        if abs(last) > FAR:
            self.fate = "away"
        else:
            arrived = self.goal is not None and abs(last - self.goal) < 1e-3
            self.fate = "there" if arrived else "cycle" if abs(x[-3] - last) < 1e-3 else "slowly"


def _caption(it):
    if it.lipschitz < 1 - 1e-3:
        return (f"L = {it.lipschitz:.2f} < 1: one x for each z, from any start; the error falls by the factor L at least (dashed), "
                f"and near x* by |g'(x*)| = {abs(it.slope):.2f}. Follow the cobweb into the crossing.")
    ways = {"away": "runs away", "there": "still arrives", "cycle": "goes to and fro for ever", "slowly": "has not arrived"}
    many = "" if len(it.roots) < 2 else f", and {len(it.roots)} x share this z, so there is no inverse to find"
    return (f"L = {it.lipschitz:.2f}, not below 1: nothing is promised (red: the iteration's slope is at least 1). "
            f"Here it {ways[it.fate]}{many}.")


def _picture(it, state, own):
    n, z, ticks = state["n"], it.z, [-4, -2, 0, 2, 4]
    x = np.linspace(*X, 401)
    value, shown = it.g(x), it.x[:n + 1]
    steep = np.abs(np.gradient(value, x)) >= 1
    inside = np.clip(it.x, -50, 50)
    web = np.stack([np.repeat(inside[:n + 1], 2)[:-1], np.repeat(inside[:n + 1], 2)[1:]], 1)      # (x0, x0), (x0, x1), (x1, x1), ...
    roots = it.roots[np.abs(it.roots) < X[1] * 1.5]
    forth = scene.panel([
        scene.lines([(X[0], X[0]), (X[1], X[1])], "quiet", 1.5, "dotted"), scene.lines(_curve(x, x + value), "blue", 4),
        scene.lines([[(r, X[0]), (r, z)] for r in roots] or np.zeros((0, 2, 2)), "green", 2, "dashed"),
        scene.lines([(X[0], z), (X[1], z)], "purple", 2),
        scene.points(_curve(roots, np.full(len(roots), z)), "green", "ring", 9, 1),
        scene.handles([(X[0], z)], "z", ["purple"], ["diamond"]),
    ], (*X, *X), "z = x + g(x)", "x", xticks=ticks, yticks=ticks, equal=True)
    marks = [scene.lines([(X[0], X[0]), (X[1], X[1])], "quiet", 2, "dotted"), scene.lines(_curve(x, z - value), "ink", 3.5)]
    if steep.any():
        pieces = np.stack([_curve(x, z - value)[:-1], _curve(x, z - value)[1:]], 1)
        marks.append(scene.lines(pieces[steep[:-1]], "red", 7))
    marks += [scene.lines(web, "orange", 2.5), scene.points(_curve(roots, roots), "green", "ring", 9, 1),
              scene.handles([(inside[0], inside[0])], "start", ["orange"], ["square"])]
    back = scene.panel(marks, (*X, *X), "cobweb of x ← z − g(x)", "x", xticks=ticks, yticks=ticks, equal=True)
    panels = [forth, back, _errors(it, n)]
    gap = "" if it.error is None else f", off by {it.error[n]:.1e}"
    label = f"{'g times ' if own else 'L = '}{state['scale']:.2f}{f', L = {it.lipschitz:.2f}' if own else ''}; x_{n} = {shown[-1]:.5g}{gap}"
    return scene.frame([panels], label.replace("-", "−"))


def _errors(it, n):
    """log10 of the error, step by step, against what L promises."""
    steps = np.arange(MOST + 1)
    marks = [scene.text("no x has this z", MOST / 2, -4, weight="600")]
    if it.error is not None:
        height = np.clip(np.log10(np.maximum(it.error, 1e-30)), FLOOR, 3)
        marks = [scene.lines(_curve(steps, height), "faint", 2), scene.lines(_curve(steps[:n + 1], height[:n + 1]), "orange", 3),
                 scene.points(_curve(steps[:n + 1], height[:n + 1]), "orange", "square", 4, 1)]
        if it.lipschitz < 1 and it.error[0] > 0:
            promise = math.log10(it.error[0]) + steps * math.log10(max(it.lipschitz, 1e-9))
            marks.insert(0, scene.lines(_curve(steps, np.maximum(promise, FLOOR - 3)), "ink", 3, "dashed"))
    return scene.panel(marks, (-0.5, MOST + 0.5, FLOOR - 0.5, 3), "log₁₀ of the error", "n",
                       xticks=[0, 10, 20, 30], yticks=[-9, -6, -3, 0, 3], width=0.8)


def _curve(x, y):
    return np.stack([x, y], -1)
