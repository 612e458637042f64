"""View 6, `sigmoidal`: the transformer of a neural autoregressive flow, a deep sigmoidal flow (DSF) of one variable.

    y = logit(F(x)),   F(x) = sum_k w_k sigmoid(a_k x + b_k),   a_k > 0, w_k > 0, sum_k w_k = 1;   p(x) = p(y) dy/dx

x is the data, y the latent. An affine transformer has one slope; this one has inflection points, and each steep place gives a hump to p(x), each
flat place one to p(y): whichever of the two is the known normal, the other may have several. (Huang et al. 2018, "Neural Autoregressive Flows",
section 3.1 and figure 5.)
"""
import math

import numpy as np

from . import scene
from .view import View, dropdown, slider

X, Y = (-4.0, 4.0), (-4.0, 4.0)
TICKS = [-3, 0, 3]
KNOWN = ("p(y)", "p(x)")
DASHES = ("solid", "dashed", "dotted")


def _mixture(a, centres, w, known=KNOWN[0]):
    a, centres = np.array(a, float), np.array(centres, float)
    return {"a": a, "b": -a * centres, "w": np.array(w, float), "selected": 0, "known": known}


PRESETS = {
    "two humps of x": _mixture([5, 5], [-1.6, 1.4], [0.4, 0.6]),
    "affine-like": _mixture([1.7, 1.7], [-0.1, 0.1], [0.5, 0.5]),
    "three humps of x": _mixture([7, 7, 7], [-2.4, 0, 2.2], [0.3, 0.4, 0.3]),
    "a long tail": _mixture([4, 0.8], [-1.2, 0.8], [0.6, 0.4]),
    "two humps of y": _mixture([8, 0.6], [0, 0], [0.6, 0.4], KNOWN[1]),
}


def sigmoidal(a=None, b=None, w=None):
    """Move the sigmoids of a deep sigmoidal flow: its inflection points come and go, and with them the humps of a density.

    Digits choose a sigmoid, left and right move its centre -b/a, up and down its weight. a, b, w: parameters of yours, each (K,), already
    constrained (a > 0, w > 0 summing to 1). Raises ValueError if they are not, or not all three are given.
    """
    if a is None and b is None and w is None:
        first = next(iter(PRESETS.values()))
        start = {"presets": {name: values | _sliders(values, values["selected"]) for name, values in PRESETS.items()}}
    else:
        first = _checked(a, b, w) | {"selected": 0, "known": KNOWN[0]}
        start = {}
    at, centres = _sliders(first, 0), -first["b"] / first["a"]

    def drag(state, name, index, x, y):
        return _select(state, index) | {"centre": float(np.clip(x, *X)), "weight": float(np.clip(2 * y, 0, 1))}

    controls = {
        "known": dropdown("one normal", KNOWN), "centre": slider("centre", at["centre"], min(X[0], *centres), max(X[1], *centres), 0.1),
        "steepness": slider("slope a", at["steepness"], min(0.2, *first["a"]), max(10.0, *first["a"]), 0.1),
        "weight": slider("weight", at["weight"], 0.0, 1.0, 0.02)}
    return View("Sigmoidal: inflection points make humps", lambda state, coarse: [_picture(state, 161 if coarse else 401)], _caption, controls,
                {name: first[name] for name in ("a", "b", "w", "selected")}, steps=("centre", "weight"), drag=drag,
                press=lambda state, digit: _select(state, min(digit, len(state["a"])) - 1), rate=20, **start)


def _checked(a, b, w):
    if a is None or b is None or w is None:
        raise ValueError("a, b and w must be given together, each (K,)")
    a, b, w = (scene.array(v, np.float64) for v in (a, b, w))
    if not (a.ndim == 1 and a.shape == b.shape == w.shape and len(a) > 0):
        raise ValueError(f"a, b and w must each have shape (K,), got {a.shape}, {b.shape} and {w.shape}")
    if not (np.isfinite([a, b, w]).all() and (a > 0).all() and (w >= 0).all() and abs(w.sum() - 1) < 1e-3):
        raise ValueError("a must be above 0, and w at least 0 with sum 1: softplus and softmax make them so")
    return {"a": a, "b": b, "w": w / w.sum()}


def _sliders(values, k):
    """What the sliders show of sigmoid k."""
    return {"centre": float(-values["b"][k] / values["a"][k]), "steepness": float(values["a"][k]), "weight": float(values["w"][k])}


def parameters(state):
    """a, b, w (K,) as they are: the selected sigmoid's are on the sliders, and the others share the weight that it leaves."""
    a, b, w, k = state["a"].copy(), state["b"].copy(), state["w"].copy(), state["selected"]
    a[k], b[k] = state["steepness"], -state["steepness"] * state["centre"]
    if len(w) > 1:
        rest, others = 1 - w[k], np.arange(len(w)) != k
        w[others] = w[others] * (1 - state["weight"]) / rest if rest > 1e-9 else (1 - state["weight"]) / (len(w) - 1)
        w[k] = state["weight"]
    return a, b, w


def _select(state, k):
    values = dict(zip("abw", parameters(state)))
    return values | {"selected": k} | _sliders(values, k)


def transformer(x, a, b, w):
    """y (N,), dy/dx and d2y/dx2 of a deep sigmoidal flow at x (N,)."""
    u = np.asarray(x, float)[:, None] * a + b
    below, above = -np.logaddexp(0, -u), -np.logaddexp(0, u)
    with np.errstate(divide="ignore"):
        log_w = np.log(w)
    # F and 1 - F leave the range of numbers far out; the ratio of each sigmoid's slope to F (1 - F) does not.
    log_F, log_rest = (np.logaddexp.reduce(log_w + v, axis=1) for v in (below, above))
    share = np.exp(log_w + below + above - (log_F + log_rest)[:, None])
    slope = share @ a
    return log_F - log_rest, slope, (share * (np.exp(above) - np.exp(below))) @ a ** 2 - slope ** 2 * (np.exp(log_rest) - np.exp(log_F))


def inflections(a, b, w, low=X[0], high=X[1]):
    """The x between low and high at which the slope of y turns from rising to falling or back."""
    def bend(x):
        return transformer(x, a, b, w)[2]

    x = np.linspace(low, high, 2001)
    value = bend(x)
    # Where y is straight its second derivative is rounding error, whose sign means nothing.
    x, value = x[np.abs(value) > 1e-7], value[np.abs(value) > 1e-7]
    where = np.flatnonzero(value[1:] * value[:-1] < 0)
    left, right, sign = x[where], x[where + 1], np.sign(value[where])
    for _ in range(50):
        middle = (left + right) / 2
        same = np.sign(bend(middle)) == sign
        left, right = np.where(same, middle, left), np.where(same, right, middle)
    return (left + right) / 2


def humps(p):
    """How many local maxima a curve (N,) has that are more than rounding error."""
    turns = np.sign(np.diff(p))[np.abs(np.diff(p)) > 1e-9 * p.max()]
    return int((np.diff(turns) < 0).sum())


def _normal(v):
    return np.exp(-0.5 * v ** 2) / math.sqrt(2 * math.pi)


def _caption(state):
    if state["known"] == KNOWN[0]:
        return ("x is data, y the latent, y = logit(sum w sigmoid(a x + b)): p(y) is one hump, and p(x) may have one at each place where the map is steep "
                "(thick: slope above 1), parted by inflection points (diamonds).")
    return ("The paper's figure: x is normal, y = logit(sum w sigmoid(a x + b)) is what comes out; where the map is steep "
            "(thick: slope above 1) p(y) is thin, and on the flat either side of it y piles up.")


def _picture(state, n):
    a, b, w = parameters(state)
    forth, k = state["known"] == KNOWN[0], state["selected"]
    x, wide = np.linspace(*X, n), np.linspace(3 * X[0], 3 * X[1], 3 * n - 2)
    y, slope, _ = transformer(x, a, b, w)
    p_x = _normal(y) * slope if forth else _normal(x)
    if forth:
        y_range = np.linspace(*Y, n)
        p_y = _normal(y_range)
    else:
        y_range, stretch, _ = transformer(wide, a, b, w)
        p_y = _normal(wide) / stretch
    turns = inflections(a, b, w)
    heights = transformer(turns, a, b, w)[0]
    tall, broad = (min(4.0, max(0.5, 1.15 * float(p.max()))) for p in (p_x, p_y))
    guide = {"colour": "quiet", "width": 1.5, "dash": "dotted"}
    marked = [scene.lines([[(t, 0), (t, tall)] for t in turns], **guide)] if len(turns) else []
    data = scene.panel([scene.area(_closed(x, p_x), "sky", 0.6), scene.lines(_curve(x, p_x), "ink", 3), *marked], (*X, 0, tall),
                       "p(x) = p(y) dy/dx" if forth else "p(x)", xticks=TICKS, yticks=scene.axis(0, tall, 3))
    each = w * np.exp(-np.logaddexp(0, -(x[:, None] * a + b)))
    colour = [scene.SEQUENCE[i % len(scene.SEQUENCE)] for i in range(len(a))]
    parts = scene.panel(
        [scene.lines(_curve(x, each.sum(1)), "ink", 2)]
        + [scene.lines(_curve(x, each[:, i]), colour[i], 5 if i == k else 2.5, DASHES[i % 3]) for i in range(len(a))]
        + [scene.handles(_curve(-b / a, w / 2), "sigmoid", colour, [scene.MARKERS[i % 4] for i in range(len(a))], k)],
        (*X, 0, 1.05), "sigmoids, and sum F", xticks=TICKS, yticks=[0, 1])
    drop = [scene.lines([[(t, Y[0]), (t, h)] for t, h in zip(turns, heights)], **guide)] if len(turns) else []
    the_map = scene.panel(
        drop + [scene.lines([(X[0], X[0]), (X[1], X[1])], "quiet", 1.2, "dotted"), scene.lines(_pieces(x, y, slope <= 1), "ink", 2.5),
                scene.lines(_pieces(x, y, slope > 1), "blue", 6), scene.points(_curve(turns, heights), "red", "diamond", 8, 1)],
        (*X, *Y), "y = logit F", xticks=TICKS, yticks=TICKS)
    latent = scene.panel([scene.area(_closed(y_range, p_y)[:, ::-1], "orange", 0.6), scene.lines(_curve(p_y, y_range), "ink", 3)], (0, broad, *Y),
                         "p(y)" if forth else "p(x) dx/dy", width=0.6)
    count, name = (humps(p_x), "p(x)") if forth else (humps(p_y), "p(y)")
    label = f"{len(turns)} inflection point{'s' * (len(turns) != 1)}, {count} hump{'s' * (count != 1)} of {name}; sigmoid {k + 1} of {len(a)} moves"
    return scene.frame([[data, parts, the_map, latent]], label)


def _curve(x, y):
    return np.stack([x, y], -1)


def _closed(x, y):
    """What lies between a curve and zero, as a polygon."""
    return np.concatenate([_curve(x, y), [(x[-1], 0), (x[0], 0)]])


def _pieces(x, y, where):
    """The pieces of a curve that begin where a mask is True, (N, 2, 2)."""
    curve = _curve(x, y)
    return np.stack([curve[:-1], curve[1:]], 1)[where[:-1]]
