"""View 13, `two_kl`: a normal q is led to a target of two humps by one Kullback-Leibler divergence or by the other.

    KL(p||q) = int p log(p/q),  maximum likelihood: covers;        KL(q||p) = int q log(q/p),  variational inference: seeks

The first pays where p is and q is not, so q spreads over both humps and the valley. The second pays where q is and p is not, so q settles
on one hump and never hears of the other. A q that can be p ends at zero by either. Both are integrals over the line, with no draws.
(Bishop 2006, "Pattern Recognition and Machine Learning", section 10.1.2.)
"""
import math

import numpy as np

from . import scene
from .view import View, dropdown, slider

X = (-6.0, 6.0)
LINE = np.linspace(-24, 24, 4801)   # of the integrals
STEP = LINE[1] - LINE[0]
WIDTH = 0.6                         # of each hump of p
NARROW, WIDE = 0.2, 3.5             # a q's standard deviation lies between them
MOST = 60                           # steps of descent
RATE = 0.3
LOSSES = ("KL(p‖q)", "KL(q‖p)")
KINDS = ("one normal", "two normals")
BASIN = 61, 41                      # means and widths of the landscape


def _preset(loss, start, apart=4.4, share=0.6):
    return {"loss": loss, "start": np.array(start, float), "n": 0, "apart": apart, "share": share, "kind": KINDS[len(start) > 1]}


PRESETS = {
    "KL(p‖q): covers": _preset(LOSSES[0], [[0.6, 0.8, 1]]),
    "KL(q‖p): seeks": _preset(LOSSES[1], [[0.6, 0.8, 1]]),
    "KL(q‖p): from the left": _preset(LOSSES[1], [[-0.6, 0.8, 1]]),
    "humps close together": _preset(LOSSES[1], [[0.6, 0.8, 1]], apart=1.6),
    "a q that can be p": _preset(LOSSES[1], [[-1.0, 1.0, 0.5], [1.0, 1.0, 0.5]]),
}


def two_kl(apart=4.4, share=0.6):
    """Drag a normal q over a target p of two humps, or let it go down one of the two KL divergences, step by step.

    apart: between the middles of the humps, in units of x; share: the left hump's part of p. Left and right move q, up and down its
    width; 1 is a step down KL(p||q), 2 one down KL(q||p), and space goes on with the one chosen. Both are shown in nats, with what each
    pays at every x, and with the chosen one over all means and widths. Raises ValueError if 0 < share < 1 or 0 <= apart <= 8 does not hold.
    """
    if not (0 < share < 1 and 0 <= apart <= 8):
        raise ValueError(f"share must lie between 0 and 1 and apart between 0 and 8, got {share} and {apart}")
    presets = {name: values if values["apart"] < 4 else values | {"apart": apart, "share": share} for name, values in PRESETS.items()}
    kept = {}

    def path(state):
        """The q of each step so far, (n + 1, K, 3), continued where it was left."""
        key = (state["loss"], state["apart"], state["share"], components(state).tobytes())
        if kept.get("key") != key:
            kept.update(key=key, path=[components(state)])
        log_p = target(state)
        while len(kept["path"]) <= state["n"]:
            kept["path"].append(descend(kept["path"][-1], log_p, state["loss"]))
        return np.stack(kept["path"][:state["n"] + 1])

    def landscape(state):
        key = (state["loss"], state["apart"], state["share"])
        if kept.get("land") != key:
            kept.update(land=key, basin=basin(target(state), state["loss"]))
        return kept["basin"]

    def compute(state, coarse):
        return [_picture(state, path(state), landscape(state) if state["kind"] == KINDS[0] else None)]

    def put(state, k, mean, std):
        q = path(state)[-1].copy()
        q[k, :2] = np.clip(mean, *X), np.clip(std, NARROW, WIDE)
        return {"start": q, "n": 0}

    def drag(state, name, index, x, y):
        if name == "basin":
            return put(state, 0, x, y)
        return put(state, index, x, path(state)[-1][index, 2] / (max(y, 1e-3) * math.sqrt(2 * math.pi)))

    def nudge(mean, widen):
        def move(state, by):
            q = path(state)[-1]
            return put(state, len(q) - 1, q[-1, 0] + mean * by, q[-1, 1] * math.exp(widen * by))
        return move

    def press(state, digit):
        if digit > len(LOSSES):
            return {}
        if state["loss"] == LOSSES[digit - 1]:
            return {"n": min(MOST, state["n"] + 1)}
        return {"loss": LOSSES[digit - 1], "start": path(state)[-1], "n": 1}

    controls = {"n": slider("steps", 0, 0, MOST, 1), "loss": dropdown("down", LOSSES), "kind": dropdown("q", KINDS),
                "apart": slider("apart", apart, 0.0, 8.0, 0.2), "share": slider("left share", share, 0.02, 0.98, 0.02)}
    return View("Two divergences: covering against seeking", compute, _caption, controls, {"start": PRESETS["KL(p‖q): covers"]["start"]}, presets,
                steps=(nudge(0.1, 0), nudge(0, 0.05)), drag=drag, press=press, rate=12, walk="n")


def components(state):
    """q at the first step, (K, 3): mean, standard deviation and weight of each of its normals."""
    start, K = state["start"], 1 + KINDS.index(state["kind"])
    if len(start) == K:
        return start
    mean, std = start[:, 2] @ start[:, 0], start[:, 2] @ start[:, 1]
    return np.array([[mean, std, 1.0]] if K == 1 else [[mean - 0.5, std, 0.5], [mean + 0.5, std, 0.5]])


def _log_parts(x, q):
    """log of weight times normal density, (K, N)."""
    mean, std, weight = q.T[:, :, None]
    with np.errstate(divide="ignore"):
        return np.log(weight) - 0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)


def log_mixture(x, q):
    """log density (N,) at x (N,) of a mixture of normals q (K, 3)."""
    return np.logaddexp.reduce(_log_parts(x, q), axis=0)


def target(state):
    """log p on LINE."""
    half = state["apart"] / 2
    return log_mixture(LINE, np.array([[-half, WIDTH, state["share"]], [half, WIDTH, 1 - state["share"]]]))


def paid(log_p, log_q):
    """What each divergence pays at every x, p log(p/q) and q log(q/p), (2, N)."""
    return np.stack([np.exp(log_p) * (log_p - log_q), np.exp(log_q) * (log_q - log_p)])


def both(log_p, q):
    """KL(p||q) and KL(q||p) in nats; not below 0, where rounding would take them."""
    return np.maximum(paid(log_p, log_mixture(LINE, q)).sum(1) * STEP, 0.0)


def gradient(q, log_p, loss):
    """d loss / d (mean, log std, logit of the weight), (K, 3)."""
    parts, log_q = _log_parts(LINE, q), log_mixture(LINE, q)
    away = (LINE - q[:, :1]) / q[:, 1:2]
    share = np.exp(parts - log_q)
    # d log q / d (mean, log std, logit), and what weighs it: -p, or q (log q - log p); the integral of q itself does not change.
    score = np.stack([share * away / q[:, 1:2], share * (away ** 2 - 1), share - q[:, 2:]], -1)
    weight = -np.exp(log_p) if loss == LOSSES[0] else np.exp(log_q) * (log_q - log_p)
    return np.einsum("kni,n->ki", score, weight) * STEP


def descend(q, log_p, loss):
    """One step of gradient descent, scaled by each normal's own Fisher information and halved until the loss falls; q (K, 3) again."""
    w = q[:, 2]
    scale = np.stack([q[:, 1] ** 2 / w, 0.5 / w, 1 / w], 1)
    move = np.clip(-RATE * scale * gradient(q, log_p, loss), -0.25, 0.25)
    which, now = LOSSES.index(loss), both(log_p, q)
    for halving in range(30):
        by = move / 2 ** halving
        mean, std = np.clip(q[:, 0] + by[:, 0], *X), np.clip(q[:, 1] * np.exp(by[:, 1]), NARROW, WIDE)
        weight = w * np.exp(by[:, 2] - (w * np.exp(by[:, 2])).max())
        weight = np.maximum(weight / weight.sum(), 1e-3)
        new = np.stack([mean, std, weight / weight.sum()], 1)
        if both(log_p, new)[which] < now[which]:
            return new
    return q


def basin(log_p, loss):
    """The loss of one normal over means (columns), from X, and standard deviations (rows), from NARROW to WIDE."""
    means, stds = np.linspace(*X, BASIN[0]), np.linspace(NARROW, WIDE, BASIN[1])[:, None]
    if loss == LOSSES[0]:
        p = np.exp(log_p) * STEP
        first, entropy = p @ LINE, -p @ log_p
        spread = p @ LINE ** 2 - 2 * first * means + means ** 2
        return 0.5 * spread / stds ** 2 + np.log(stds) + 0.5 * math.log(2 * math.pi) - entropy
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    at = means[..., None] + stds[..., None] * nodes
    # Far out in its tails p has nearly parabolic logs, between whose values one may draw straight lines: LINE is fine.
    return -np.log(stds) - 0.5 * math.log(2 * math.pi * math.e) - np.interp(at, LINE, log_p) @ weights / weights.sum()


def _caption(state):
    if state["kind"] == KINDS[1]:
        return "Two normals can be p: down either of the two the same q is reached, and both divergences fall to zero. That is what flexible flows are for."
    if state["loss"] == LOSSES[0]:
        return ("Maximum likelihood goes down KL(p‖q): it pays wherever p has mass that q does not expect, so q covers both humps, and the valley "
                "between them too.")
    return ("Variational inference goes down KL(q‖p): it pays wherever q puts mass that p has not, so q withdraws to one hump, and which one "
            "depends on where it began.")


def _picture(state, path, land):
    log_p, q = target(state), path[-1]
    seen = (LINE >= X[0]) & (LINE <= X[1])
    x, which = LINE[seen], LOSSES.index(state["loss"])
    log_q = log_mixture(LINE, q)
    p_x, q_x = np.exp(log_p[seen]), np.exp(log_q[seen])
    peaks = np.stack([q[:, 0], q[:, 2] / (q[:, 1] * math.sqrt(2 * math.pi))], 1)
    tall = max(0.45, 1.12 * float(max(p_x.max(), q_x.max())))
    densities = scene.panel(
        [scene.area(_closed(x, p_x), "sky", 0.5), scene.lines(_curve(x, p_x), "blue", 3), scene.lines(_curve(x, q_x), "red", 4, "dashed"),
         scene.handles(peaks, "q", ["red"] * len(q), ["square"] * len(q))],
        (*X, 0, tall), "p (shaded) and q (dashed)", "x", xticks=[-4, -2, 0, 2, 4], yticks=scene.axis(0, tall, 4), width=1.15)
    cost = np.clip(paid(log_p, log_q)[:, seen], -3, 3)
    low, high = min(-0.1, 1.1 * cost.min()), max(0.4, 1.1 * cost.max())
    places = scene.panel(
        [scene.lines([(X[0], 0), (X[1], 0)], "quiet", 1.2), scene.area(_closed(x, cost[which]), COLOURS[which], 0.3)]
        + [scene.lines(_curve(x, cost[i]), COLOURS[i], 4 if i == which else 2, DASHES[i]) for i in (1 - which, which)],
        (*X, low, high), "what each pays at x", "p log p/q; dashed q log q/p", xticks=[-4, -2, 0, 2, 4], yticks=scene.axis(low, high, 4),
        width=0.95)
    kl = both(log_p, q)
    label = f"step {state['n']} down {state['loss']}: KL(p‖q) = {kl[0]:.2f}, KL(q‖p) = {kl[1]:.2f} nats"
    if len(q) == 1:
        label += f"; q = N({q[0, 0]:.2f}, {q[0, 1]:.2f}²)"
    third = _basin_panel(path[:, 0], land, state["loss"]) if land is not None else _chart(path, log_p)
    return scene.frame([[densities, places, third]], label.replace("-", "−"))


COLOURS, DASHES = ("blue", "red"), ("solid", "dashed")


def _basin_panel(path, land, loss):
    """The loss over means and widths, brighter where it is lower, and the way down."""
    box = (*X, NARROW, WIDE)
    shade = 1 - np.minimum((land - land.min()) / 2.5, 1) ** 0.5
    way = path[:, :2]
    marks = [scene.heat(shade, box, 1.0), scene.lines(way, "orange", 4), scene.points(way, "orange", "disc", 3, 1),
             scene.handles(way[-1:], "basin", ["red"], ["square"])]
    return scene.panel(marks, box, f"{loss}: bright is low", "mean; upwards the width", xticks=[-4, -2, 0, 2, 4], yticks=[1, 2, 3], width=0.9)


def _chart(path, log_p):
    """Both divergences, step by step."""
    values = np.array([both(log_p, q) for q in path])
    high, steps = max(0.2, 1.1 * float(values.max())), np.arange(len(values))
    marks = [mark for i in range(2) for mark in (scene.lines(_curve(steps, values[:, i]), COLOURS[i], 3.5, DASHES[i]),
                                                 scene.points(_curve(steps, values[:, i])[-1:], COLOURS[i], ("disc", "square")[i], 6, 1))]
    return scene.panel(marks, (-1, MOST + 1, -0.05 * high, high), "KL(p‖q) solid, KL(q‖p) dashed", "steps", xticks=[0, 20, 40, 60],
                       yticks=scene.axis(0, high, 4), width=0.9)


def _curve(x, y):
    return np.stack([x, y], -1)


def _closed(x, y):
    """What lies between a curve and zero, as a polygon."""
    return np.concatenate([_curve(x, y), [(x[-1], 0), (x[0], 0)]])
