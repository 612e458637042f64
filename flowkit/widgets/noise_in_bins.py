"""View 11, `dequantize`: noise fills the bin of each integer, and a density's bound on log P(x) is as tight as the noise is well chosen.

    P(x) = integral of p(x + u) over u in [0, 1],        log P(x) >= E_q[log p(x + u) - log q(u | x)],   u ~ q(u | x)

The gap is KL(q(u | x) || p(x + u) / P(x)). Uniform noise has log q = 0, and is the best only where p is flat in the bin; the
best q of all has p's own shape there, and no gap. (Theis et al. 2016, "A note on the evaluation of generative models",
section 3.1; Ho et al. 2019, "Flow++", section 3.1.)
"""
import math

import numpy as np
import torch

from . import scene
from .asked import answer, like, or_else
from .view import View, seed, slider

CELLS = 200                         # of a bin, for its integrals
NOISE = 40                          # draws that are shown in each bin
DRAWS = 2000                        # in each bin, of somebody's own q
COLUMNS = 20                        # of their histogram

# log p(v) but for a constant, v from 0 to the number of levels, and a centre c.
SHAPES = {
    "a hump": lambda v, c: np.logaddexp(np.log(0.06), np.log(0.94 / 0.4) - 0.5 * ((v - c) / 0.4) ** 2),
    "a broad hump": lambda v, c: -0.5 * ((v - c) / 1.5) ** 2,
    "spikes": lambda v, c: np.log(0.02 + np.exp(-0.5 * ((v - c + 0.5) % 1 - 0.5) ** 2 / 0.07 ** 2)),
    "flat in each bin": lambda v, c: 0.25 * np.cos(2 * (np.floor(v) + 0.5 - c)) - 0.5 * ((np.floor(v) + 0.5 - c) / 1.2) ** 2,
}
PRESETS = {
    "a hump on an edge": {"shape": "a hump", "centre": 2.0},
    "a hump in a bin": {"shape": "a hump", "centre": 1.5},
    "a broad hump": {"shape": "a broad hump", "centre": 1.8},
    "spikes": {"shape": "spikes", "centre": 0.3},
    "flat in each bin": {"shape": "flat in each bin", "centre": 1.7},
}


def dequantize(q=None, levels=4, log_prob=None):
    """Fill the bins of integers with noise, uniform or better, and compare the bounds on log P(x) with its exact value.

    q: a proposal of yours, u, log_q = q(x), x (B, 1) integers, u (B, 1) in [0, 1], log_q (B,); its bound is a mean over draws,
    with two standard errors. levels: how many integers. log_prob: a density of yours on [0, 1], y = (x + u) / levels (B, 1) to
    (B,), in the place of those that are here. Left and right lead q from uniform to the best one, up and down move the hump,
    which can be dragged; 1 to 5 choose a density. What cannot be shown of yours, or is no bound, is named under the picture.
    """
    if not 2 <= levels <= 16:
        raise ValueError(f"levels must lie between 2 and 16, got {levels}")
    said = {}

    def compute(state, coarse):
        def picture(log_prob, q):
            bins = Bins(levels, (lambda v: _shape(state, levels, v)) if log_prob is None else lambda v: _density(log_prob, v, levels))
            asked = _Proposal(q, bins, state["seed"]) if q is not None else None
            return [_picture(bins, asked, state)], asked.trouble(bins) if asked is not None else ""
        made, words = or_else(lambda: picture(log_prob, q), lambda: picture(None, None))
        said["words"] = words or made[1]
        return made[0]

    def drag(state, name, index, x, y):
        return {"centre": float(np.clip(x, 0, levels))}

    controls, start = {"seed": seed()}, {"state": {"towards": 0.0, "shape": "a hump", "centre": 2.0}}
    if log_prob is None:
        controls = {"centre": slider("centre", 2.0, 0.0, float(levels), 0.1), **controls}
        start |= {"presets": PRESETS, "press": lambda state, digit: {"preset": list(PRESETS)[min(digit, len(PRESETS)) - 1]}}
    if q is None:
        controls = {"towards": slider("best q", 0.5, 0.0, 1.0, 0.05), **controls}
    return View("Dequantize: noise fills the bins", compute, lambda state: said["words"] or _caption(state, q is not None), controls,
                steps=[name for name in ("towards", "centre", "seed") if name in controls][:2], drag=drag, rate=12, **start)


def _caption(state, own):
    if state["shape"] == "flat in each bin":
        return "Flat in each bin: there uniform noise already is the best, and its bound is exact. Choose another density, and it is not."
    if own:
        return ("Your q in purple: its draws as bars, its log_q as points, which must lie along them. "
                "Its bound must not pass log P(x), and should come closer than uniform noise does.")
    return ("The bound falls short of log P(x) by the KL divergence between q (purple) and p's own shape in the bin (green): lead q there "
            "and the gap closes, whatever the density.")


def _shape(state, levels, v):
    """log p(v) of one of SHAPES, which integrates to one from 0 to `levels`."""
    middles = (np.arange(levels * CELLS) + 0.5) / CELLS
    whole = np.exp(SHAPES[state["shape"]](middles, state["centre"])).sum() / CELLS
    return SHAPES[state["shape"]](v, state["centre"]) - math.log(whole)


def _density(log_prob, v, levels):
    y = torch.from_numpy(np.reshape(v, (-1, 1)) / levels).to(like(log_prob))
    with torch.no_grad():
        return answer("log_prob(y)", log_prob(y), (len(y),)).reshape(np.shape(v)) - math.log(levels)


class Bins:
    """A density log_p(v) over the bins of 0 .. K - 1: P(x), and the bound that each q leaves."""

    def __init__(self, levels, log_p):
        self.levels, self.log_p = levels, log_p
        self.u = (np.arange(CELLS) + 0.5) / CELLS
        self.at = log_p(np.arange(levels)[:, None] + self.u)                            # (K, CELLS)
        self.log_P = np.log(np.exp(self.at).mean(1))
        self.best = np.exp(self.at - self.log_P[:, None])                               # the best q(u | x)
        self.uniform = self.at.mean(1)

    def tilted(self, towards):
        """q(u | x) between uniform (0) and the best (1), each normalised p^towards, (K, CELLS)."""
        q = np.exp(towards * (self.at - self.at.max(1, keepdims=True)))
        return q / q.mean(1, keepdims=True)

    def bound(self, q):
        """E_q[log p(x + u) - log q(u | x)], (K,), of q (K, CELLS)."""
        return (q * (self.at - np.log(np.maximum(q, 1e-300)))).mean(1)


class _Proposal:
    """What somebody's q answers: draws u (K, DRAWS), their log_q, and the bounds with their standard errors."""

    def __init__(self, q, bins, seed):
        K = bins.levels
        x = torch.arange(K).repeat_interleave(DRAWS)[:, None]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            pair = q(x)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"q(x) must return u and log_q, got {type(pair).__name__}")
        u, log_q = answer("u", pair[0], x.shape), answer("log_q", pair[1], (len(x),))
        if u.min() < 0 or u.max() > 1:
            raise ValueError(f"u must lie in [0, 1], got values from {u.min():.3g} to {u.max():.3g}")
        self.u, self.log_q = u.reshape(K, DRAWS), log_q.reshape(K, DRAWS)
        values = bins.log_p(np.arange(K)[:, None] + np.clip(self.u, 1e-6, 1 - 1e-6)) - self.log_q
        self.bound, self.error = values.mean(1), values.std(1) / math.sqrt(DRAWS)

    def trouble(self, bins):
        """A sentence if a bound lies above the exact value by more than chance (five standard errors) and rounding allow."""
        above = self.bound - bins.log_P - 5 * self.error - 1e-3
        if above.max() <= 0:
            return ""
        x = int(above.argmax())
        return (f"Careful: at x = {x} your bound is {self.bound[x]:.2f} and log P(x) is {bins.log_P[x]:.2f}: above it, "
                "so log_q is not the log-density of your u.").replace(" -", " −")


def _noise(q, seed):
    """Draws u (K, NOISE) of q (K, CELLS), by its distribution function, one from each of NOISE equal shares."""
    shares = (np.arange(NOISE) + np.random.default_rng(seed).random((len(q), NOISE))) / NOISE
    edges = np.linspace(0, 1, CELLS + 1)
    return np.stack([np.interp(s, np.concatenate([[0], row.cumsum() / CELLS]), edges) for s, row in zip(shares, q)])


def _picture(bins, asked, state):
    K, x = bins.levels, np.arange(bins.levels)
    v = x[:, None] + np.linspace(0, 1, CELLS + 1)
    p = np.exp(bins.log_p(np.clip(v, x[:, None] + 1e-6, x[:, None] + 1 - 1e-6)))
    tall, ticks = 1.22 * float(p.max()), np.arange(K + 1) if K <= 8 else np.arange(0, K + 1, 4)
    q = bins.tilted(state["towards"]) if asked is None else None
    u = _noise(q, state["seed"]) if asked is None else asked.u[:, :NOISE]
    bound, error = (bins.bound(q), np.zeros(K)) if asked is None else (asked.bound, asked.error)
    marks = []
    for k in range(K):
        outline = np.concatenate([np.stack([v[k], p[k]], 1), [(k + 1, 0), (k, 0)]])
        marks.append(scene.area(outline, ("sky", "yellow")[k % 2], 0.55))
    rug = (x[:, None] + u).ravel()
    marks += [scene.lines(np.stack([v, p], -1), "ink", 3), scene.lines([[(t, 0), (t, 0.07 * tall)] for t in rug], "purple", 2, alpha=0.7)]
    if K <= 8:
        marks += [scene.text(f"{math.exp(bins.log_P[k]):.2f}", k + 0.5, 0.94 * tall, weight="600") for k in x]
    if state["shape"] == "a hump" and "centre" in state and "preset" in state:
        marks.append(scene.handles([(state["centre"], 0.5 * tall)], "centre", ["red"], ["diamond"]))
    density = scene.panel(marks, (0, K, 0, tall), "density p(x + u), its bins' areas P(x)", xticks=ticks,
                          yticks=scene.axis(0, tall, 3), width=1.5)
    shown = q.max() if asked is None else np.quantile(np.exp(asked.log_q), 0.98)
    high = float(np.clip(1.15 * max(bins.best.max(), shown), 1.5, 8))
    at = x[:, None] + bins.u
    noise = []
    if asked is not None:
        counts = np.stack([np.histogram(row, COLUMNS, (0, 1))[0] for row in asked.u]) * COLUMNS / DRAWS
        left = x[:, None] + np.arange(COLUMNS) / COLUMNS
        boxes = np.stack([left, left + 1 / COLUMNS, 0 * left, counts], -1).reshape(-1, 4)
        noise = [scene.bars(boxes, ["purple"] * len(boxes)),
                 scene.points(np.stack([x[:, None] + asked.u, np.exp(asked.log_q)], -1)[:, :150].reshape(-1, 2), "ink", "disc", 2.5, 0.8)]
    noise += [scene.lines([[(k, 1), (k + 1, 1)] for k in x], "orange", 3, "dotted"),
              scene.lines(np.stack([at, bins.best], -1), "green", 3.5, "dashed")]
    if asked is None:
        noise.append(scene.lines(np.stack([at, q], -1), "purple", 3.5))
    noise.append(scene.lines([[(k, 0), (k, high)] for k in range(1, K)], "faint", 2))
    proposal = scene.panel(noise, (0, K, 0, high), "noise q(u | x): uniform, q, the best", "x + u", xticks=ticks,
                           yticks=scene.axis(0, high, 3), width=1.5, height=0.8)
    label = _sums(bins, bound)
    return scene.frame([[density, _bounds(bins, bound, error)], [proposal, _gaps(bins, bound, error)]], label.replace("-", "−"))


def _bounds(bins, bound, error):
    """P(x), and what the exponentials of the two bounds leave of it."""
    exact, uniform, ours = np.exp(bins.log_P), np.exp(bins.uniform), np.exp(bound)
    top, marks = 1.3 * float(max(exact.max(), ours.max())), []
    for k in range(bins.levels):
        marks += [scene.bars([(k - 0.38 + 0.26 * i, k - 0.13 + 0.26 * i, 0, value[k]) for i, value in enumerate((exact, uniform, ours))],
                             ["ink", "orange", "purple"]),
                  scene.lines([(k + 0.265, np.exp(bound[k] - 2 * error[k])), (k + 0.265, np.exp(bound[k] + 2 * error[k]))], "ink", 3)]
    legend = [scene.text(words, (0.17, 0.5, 0.83)[i] * bins.levels - 0.5, 0.93 * top, colour, weight="600")
              for i, (words, colour) in enumerate((("P(x)", "ink"), ("uniform", "orange"), ("q", "purple")))]
    return scene.panel(marks + legend, (-0.5, bins.levels - 0.5, 0, top), "P(x), and exp of its bounds", xticks=_classes(bins),
                       yticks=scene.axis(0, top, 3))


def _gaps(bins, bound, error):
    uniform, ours = bins.log_P - bins.uniform, bins.log_P - bound
    top = max(0.1, 1.2 * float(max(uniform.max(), ours.max())))
    marks = []
    for k in range(bins.levels):
        marks += [scene.bars([(k - 0.35, k - 0.02, 0, uniform[k]), (k + 0.02, k + 0.35, 0, ours[k])], ["orange", "purple"]),
                  scene.lines([(k + 0.185, ours[k] - 2 * error[k]), (k + 0.185, ours[k] + 2 * error[k])], "ink", 3)]
    low = min(0.0, 1.1 * float(ours.min()))
    return scene.panel(marks, (-0.5, bins.levels - 0.5, low, top), "gap: log P(x) − bound, nats", "x",
                       xticks=_classes(bins), yticks=scene.axis(low, top, 3), height=0.8)


def _classes(bins):
    return range(bins.levels) if bins.levels <= 8 else range(0, bins.levels, 4)


def _sums(bins, bound):
    P = np.exp(bins.log_P)
    exact, uniform, ours = (float(P @ value) for value in (bins.log_P, bins.uniform, bound))
    return f"mean over x, in nats: log P(x) = {exact:.3f}, bound with uniform noise {uniform:.3f}, with q {ours:.3f}"
