"""View 8, `flow_in_time`: points, a grid and the density carried along a vector field, as far as a solver's steps carry them.

    dx/dt = f(t, x),    d log p(x(t))/dt = -Tr(df/dx)

x(0) is the data and x(1) the latent; the density is known, N(0, I), at one of the two ends, and follows from there along each path. Euler's
step moves by h f, RK4's by a mean of four f; the trace is integrated with the same steps. A step that is too long shows in the third
panel, and in what the claimed density integrates to. (Chen et al. 2018, "Neural Ordinary Differential Equations", theorem 1.)
"""
import math

import numpy as np
import torch

from ..continuous import ProbabilityFlow, _value_and_trace
from . import scene
from .asked import answer, like, or_else
from .layer_by_layer import _lattice, _shaded, _square, net_of
from .view import View, dropdown, slider

REACH, MESH = 3.6, 61               # of the normal end's density, and its nodes each way
LINES, ALONG = 11, 31               # of the grid
POINTS = 400
FINE = 40                           # steps of RK4 that are taken for exact
SOLVERS = ("Euler", "RK4")
ENDS = ("t = 0", "t = 1")
_TRIANGLES = net_of(MESH)
_CLUMPS, _WIDTH = torch.tensor([[-1.3, -0.75], [1.3, -0.75], [0.0, 1.5]]), 0.5


def _score(t, x):
    """The gradient of log p_t of three clumps that a diffusion turns into one normal."""
    scale, std = _DIFFUSION.perturbation_kernel(t)
    away, variance = scale * _CLUMPS.to(x) - x[:, None], (scale * _WIDTH) ** 2 + std ** 2
    weights = torch.softmax(-0.5 * away.square().sum(-1) / variance, -1)
    return (weights[..., None] * away).sum(1) / variance


_DIFFUSION = ProbabilityFlow(_score)


def _turn(t, x):
    return 4 * torch.stack([-x[:, 1], x[:, 0]], -1)


def _wave(t, x):
    """A swirl that turns the other way half way through."""
    return torch.stack([1.8 * torch.cos(math.pi * t) * torch.sin(1.5 * x[:, 1]), 1.2 * torch.tanh(x[:, 0]) - 0.5 * x[:, 1]], -1)


FIELDS = {"saddle": lambda t, x: x * x.new_tensor([0.9, -0.9]), "source": lambda t, x: 0.8 * x, "rotation": _turn,
          "a swirl that turns": _wave, "three clumps by diffusion": _DIFFUSION}
PRESETS = {name: {"field": name, "normal": ENDS[name.startswith("three")], "point": np.array([0.9, 1.2 if name == "saddle" else 0.6])}
           for name in FIELDS}


def flow_in_time(f=None, steps=20):
    """Carry points, a grid and a density along dx/dt = f(t, x) by Euler's method or RK4, and see what the steps leave out.

    f: a field of yours, f(t, x) -> dx/dt, both (B, 2), t a scalar tensor; x(0) is data and x(1), by default, normal.
    steps: of the solver, from t = 0 to 1. Left and right move t, up and down the number of steps, 1 to 5 choose a field;
    drag the square, where the marked path begins. A field that answers in another shape, or not with finite numbers, is
    named under the picture.
    """
    if f is not None:
        start = {"state": {"field": "yours", "point": np.array([0.9, 0.6])}}
    else:
        start = {"presets": PRESETS, "state": {"field": "saddle", "point": PRESETS["saddle"]["point"]},
                 "press": lambda state, digit: {"preset": list(PRESETS)[min(digit, len(PRESETS)) - 1]}}
    kept, said = {}, {}

    def remember(name, key, make):
        if kept.get(name, (None,))[0] != key:
            kept[name] = key, make()
        return kept[name][1]

    def travel(field, state):
        """All that moves, the marked path, and the same path taken for exact."""
        normal, plan, point = state["normal"], (state["solver"], state["steps"]), state["point"][None]
        return (field, remember("all", (field, normal, *plan), lambda: _all(field, normal, *plan)),
                remember("path", (field, normal, *plan, *point[0]), lambda: _solve(field, point, normal, *plan)),
                remember("fine", (field, normal, *point[0]), lambda: _solve(field, point, normal, "RK4", FINE)))

    def compute(state, coarse):
        own = FIELDS.get(state["field"], f)
        found, said["words"] = or_else(lambda: travel(own, state), lambda: travel(_rest, state))
        return [_picture(*found, state)]

    def drag(state, name, index, x, y):
        return {"point": np.clip([x, y], -REACH, REACH)}

    controls = {"t": slider("t", 0.0, 0.0, 1.0, 0.05), "steps": slider("steps", int(steps), 1, max(60, int(steps)), 1),
                "solver": dropdown("solver", SOLVERS), "normal": dropdown("normal at", ENDS, ENDS[f is not None])}
    return View("Flow in time: a field carries the density", compute, lambda state: said["words"] or _caption(state), controls,
                steps=("t", "steps"), drag=drag, rate=20, **start)


def _rest(t, x):
    """The field in which nothing moves, in the place of one that cannot be asked."""
    return torch.zeros_like(x)


def _caption(state):
    if state["field"] == "rotation":
        return ("No trace, so log p stays the same; but Euler's steps go outwards, and what they claim is no density (its integral). "
                "Try RK4, or more steps.")
    return ("Follow one square of the grid: where the field spreads, Tr df/dx > 0, log p falls along the path, which begins at "
            "the green square. Few steps of Euler leave the exact curve, RK4 hardly.")


def rate(field, t, y):
    """dy/dt of y (N, 3), which are points and the integral of the trace along their paths. Raises ValueError for an answer that is none."""
    def asked(x):
        value = field(t, x)
        answer("f(t, x)", value, x.shape)
        return value

    velocity, trace = _value_and_trace(asked, y[:, :2])
    return torch.cat([velocity.detach(), trace.detach()[:, None]], 1)


def step(field, t, y, h, solver):
    """y at t + h from y at t, by one step of Euler's method or of RK4."""
    k1 = rate(field, t, y)
    if solver == "Euler":
        return y + h * k1
    k2 = rate(field, t + h / 2, y + h / 2 * k1)
    k3 = rate(field, t + h / 2, y + h / 2 * k2)
    end = (t + h).clamp(0, 1)           # by rounding it may lie outside, where a field need not exist
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(field, end, y + h * k3))


def _solve(field, x, normal, solver, steps):
    """Points x (N, 2) and the integral of the trace, (steps + 1, N, 3), from the normal end to the other."""
    begin = float(ENDS.index(normal))
    h = torch.tensor((1 - 2 * begin) / steps).to(like(field))
    y = torch.cat([torch.from_numpy(np.asarray(x)).to(h), h.new_zeros(len(x), 1)], 1)
    made = [y]
    for k in range(steps):
        made.append(step(field, begin + k * h, made[-1], h, solver))
        answer("x(t)", made[-1], y.shape)
    return torch.stack(made)


def _all(field, normal, solver, steps):
    """All that travels, in one batch: the mesh, the grid and the points."""
    x = torch.linspace(-1, 1, 6).reshape(3, 2).to(like(field)).requires_grad_()
    value = field(x.new_tensor(0.5), x)
    if answer("f(t, x)", value, x.shape).std(0).max() > 0 and not value.requires_grad:
        raise ValueError("f(t, x) depends on x and gives no gradient, so there is no trace")
    noise = np.random.default_rng(0).standard_normal((POINTS, 2))
    grid = scene.grid((-2.5, 2.5, -2.5, 2.5), LINES, ALONG)
    start = np.concatenate([_lattice((-REACH, REACH) * 2, MESH), grid.reshape(-1, 2), noise])
    return _solve(field, start, normal, solver, steps)


def _at(field, y, state, solver, steps):
    """y at the state's t: whole steps, and then a shorter one."""
    begin = float(ENDS.index(state["normal"]))
    done = abs(state["t"] - begin) * steps
    k = min(int(done + 1e-6), steps)
    h = y.new_tensor((1 - 2 * begin) / steps)
    return y[k] if done - k < 1e-6 else step(field, begin + k * h, y[k], (done - k) * h, solver)


def _log_p(y, y0):
    """log p of what stands at y, normal where it was at y0."""
    return -0.5 * y0[..., :2].square().sum(-1) - math.log(2 * math.pi) - y[..., 2]


def integral(x, log_p):
    """What a density integrates to over the triangles of the mesh x (MESH * MESH, 2)."""
    a, b, c = (x[corner] for corner in _TRIANGLES.T)
    (ax, ay), (bx, by) = (b - a).T, (c - a).T
    return float((0.5 * np.abs(ax * by - ay * bx) * np.exp(log_p)[_TRIANGLES].mean(1)).sum())


def _picture(field, trip, path, fine, state):
    plan = state["solver"], state["steps"]
    now, begin = _at(field, trip, state, *plan), float(ENDS.index(state["normal"]))
    mesh, lines, points = now.split([MESH * MESH, 2 * LINES * ALONG, POINTS])
    log_p = _log_p(mesh, trip[0, :len(mesh)])
    ends = torch.cat([trip[0, -POINTS:, :2], trip[-1, -POINTS:, :2]])
    box = _square(ends.quantile(0.005, 0), ends.quantile(0.995, 0), 0.2)
    last = _log_p(trip[-1, :len(mesh)], trip[0, :len(mesh)])
    likely = last > last.max() - 3
    top = min(max(float(last[likely].quantile(0.9).exp()), 1 / (2 * math.pi)), 8 / (2 * math.pi))
    ticks = scene.axis(box[0], box[1], 5), scene.axis(box[2], box[3], 5)
    lines = scene.array(lines[:, :2]).reshape(2 * LINES, ALONG, 2)
    here, exact = (_at(field, y, state, *way) for y, way in ((path, plan), (fine, ("RK4", FINE))))
    times = (begin + (1 - 2 * begin) * np.linspace(0, 1, len(y)) for y in (path, fine))
    mine, true = (np.stack([t, scene.array(_log_p(y, y[:1])[:, 0])], 1) for t, y in zip(times, (path, fine)))
    gone = abs(mine[:, 0] - begin) < abs(state["t"] - begin) + 1e-6
    trail = np.concatenate([scene.array(path[gone][:, 0, :2]), scene.array(here[:, :2])])
    plane = scene.panel([
        scene.lines(lines[:LINES], "sky", 1.6), scene.lines(lines[LINES:], "quiet", 1.6, alpha=0.7),
        scene.points(points[:, :2], "blue", size=2.2),
        scene.arrows(_arrows(field, state["t"], box, now), "orange", 1.6), scene.lines(trail, "purple", 4),
        scene.points(here[:, :2], "purple", "diamond", 9, 1), scene.handles(path[0][:, :2], "start", ["green"], ["square"]),
    ], box, "points, grid, field f", xticks=ticks[0], yticks=ticks[1], equal=True)
    image = _shaded(mesh[:, :2], log_p, box, top, _TRIANGLES)
    density = scene.panel([scene.heat(image, box), scene.lines(trail, "purple", 3), scene.points(here[:, :2], "purple", "diamond", 9, 1)],
                          box, "√ density", xticks=ticks[0], equal=True)
    both = np.concatenate([mine, true])[:, 1]
    low, high = both.min() - 0.3, both.max() + 0.3
    low, high = (low - (2 - (high - low)) / 2, high + (2 - (high - low)) / 2) if high - low < 2 else (low, high)
    level, sure = (float(_log_p(y, y0[:1])) for y, y0 in ((here, path[0]), (exact, fine[0])))
    along = scene.panel([
        scene.lines([(state["t"], low), (state["t"], high)], "quiet", 1.5, "dotted"), scene.lines(true, "ink", 3),
        scene.lines(mine, "purple", 2.5, "dashed"), scene.points(mine, "purple", "disc", 4, 1),
        scene.points([(state["t"], level)], "purple", "diamond", 9, 1)],
        (-0.04, 1.04, low, high), "log p along the path", "t", xticks=[0, 0.5, 1], yticks=scene.axis(low, high, 5), width=0.85)
    whole = integral(scene.array(mesh[:, :2], np.float64), scene.array(log_p, np.float64))
    label = f"t = {state['t']:.2f}: log p = {level:.2f} on the path, exactly {sure:.2f}; the density integrates to {whole:.2f}"
    return scene.frame([[plane, density, along]], label.replace("-", "−"))


def _arrows(field, t, box, now):
    """The field at time t on 8 x 8 places, the longest arrow nearly as long as they are apart."""
    left, right, bottom, top = box
    apart = (right - left) / 8
    x = _lattice((left + apart / 2, right - apart / 2, bottom + apart / 2, top - apart / 2), 8)
    with torch.no_grad():
        v = answer("f(t, x)", field(now.new_tensor(t), torch.from_numpy(x).to(now)), x.shape)
    v = v * 0.9 * apart / max(float(np.hypot(*v.T).max()), 1e-9)
    return np.stack([x, x + v], 1)
