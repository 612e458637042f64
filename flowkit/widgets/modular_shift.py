"""View 10, `modulo`: a modular affine shift of classes, z = (sigma x + mu) mod K, which does nothing to probabilities but rename them.

    p(z) = p(x),        since classes have no volume

The bars keep their heights and change places. That holds while sigma is coprime to K, so that sigma has an inverse modulo K;
else several x land on one z, whose bar is a sum, and other z are never reached. (Tran et al. 2019, "Discrete Flows: Invertible
Generative Models of Discrete Data", section 3.)
"""
import math

import numpy as np
import torch

from . import scene
from .asked import answer, or_else
from .view import View, slider

MOST = 12                           # classes
TALL = 0.30                         # of a row of bars
LOW, HIGH = 0.11, 0.71              # the two rows' feet, of z and of x
# Yellow lines would not be seen on white.
COLOURS = (*(name for name in scene.SEQUENCE if name != "yellow"), "quiet")
_WEIGHTS = np.array([2.0, 7.0, 4.0, 1.0, 3.0, 6.0, 2.5, 5.0, 1.5, 3.5, 4.5, 0.8])

PRESETS = {
    "shift only": {"sigma": 1, "mu": 2, "K": 7},
    "shift and scale": {"sigma": 3, "mu": 2, "K": 7},
    "turned round": {"sigma": 5, "mu": 0, "K": 6},
    "σ = 2, K = 6: no inverse": {"sigma": 2, "mu": 1, "K": 6},
    "σ = 3, K = 6: no inverse": {"sigma": 3, "mu": 0, "K": 6},
    "σ = 0: all on one": {"sigma": 0, "mu": 3, "K": 7},
}


def modulo(shift=None):
    """Shift and scale classes modulo K: the bars of p(x) only change places, unless gcd(sigma, K) is above 1.

    shift: a function of yours, shift(x, mu, sigma, K) -> z, x (K,) integers, mu and sigma integer tensors (); it may refuse a
    sigma that has no inverse by a ValueError. Left and right change mu, up and down sigma, 1 to 9 choose x = 0 to 8; drag the
    bars of p(x). A z that is wrong, of another shape or no class at all is named under the picture.
    """
    said = {}

    def compute(state, coarse):
        K, sigma, mu = state["K"], state["sigma"] % state["K"], state["mu"] % state["K"]
        x = np.arange(K)
        plain = (sigma * x + mu) % K
        z, said["words"] = (plain, "") if shift is None else or_else(lambda: _asked(shift, K, sigma, mu), lambda: plain)
        if shift is not None and math.gcd(sigma, K) > 1 and said["words"].startswith("Careful: " + _REFUSED):
            said["words"] = f"Your shift refuses σ = {sigma} for K = {K}, as it should: this is what it would do. "
        elif shift is not None and not said["words"] and (z != plain).any():
            first = int(np.flatnonzero(z != plain)[0])
            said["words"] = f"Careful: at x = {first} your z is {z[first]}, and (σ x + μ) mod K is {plain[first]}."
        said.update(z=z, top=_top(state, z))
        return [_picture(state, z)]

    def drag(state, name, index, x, y):
        weights, K = state["weights"].copy(), state["K"]
        wanted = float(np.clip((y - HIGH) / TALL * said["top"], 0.001, 0.9))
        rest = weights[:K].sum() - weights[index]
        weights[index] = wanted / (1 - wanted) * rest
        return {"weights": weights, "chosen": index}

    controls = {"K": slider("K", 7, 2, MOST, 1), "sigma": slider("σ", 3, 0, MOST - 1, 1), "mu": slider("μ", 2, 0, MOST - 1, 1)}
    def caption(state):
        return said["words"] if said["words"].startswith("Careful") else said["words"] + _caption(state, said["z"])

    return View("Modulo: z = (σ x + μ) mod K", compute, caption, controls, {"weights": _WEIGHTS, "chosen": 1}, PRESETS,
                steps=("mu", "sigma"), drag=drag, rate=2, press=lambda state, digit: {"chosen": min(digit, state["K"]) - 1})


_REFUSED = "ValueError of your own: "


def _asked(shift, K, sigma, mu):
    x = torch.arange(K)
    try:
        value = shift(x, torch.tensor(mu), torch.tensor(sigma), K)
    except ValueError as e:
        raise ValueError(_REFUSED + str(e)) from e
    z = answer("z", value, (K,))
    if value.is_floating_point() or (z < 0).any() or (z >= K).any():
        raise ValueError(f"z must hold integers from 0 to {K - 1}, got {value.tolist()}")
    return z.astype(int)


def probabilities(state):
    """p(x), (K,)."""
    weights = state["weights"][:state["K"]]
    return weights / weights.sum()


def _caption(state, z):
    K = state["K"]
    if len(set(z)) == K:
        return ("Every height comes back, at another place: the classes are renamed, and log p(x) = log p(z) with no volume term. "
                "Follow one colour down, and round the circle.")
    shared = next(int(k) for k in z if (z == k).sum() > 1)
    names = ", ".join(str(x) for x in np.flatnonzero(z == shared))
    return (f"gcd(σ, K) = {math.gcd(state['sigma'], K)}: no bijection. x = {names} share z = {shared}, whose bar is their sum, "
            f"and {K - len(set(z))} of the z (crosses) are never reached.")


def _top(state, z):
    """The height of both rows of bars, as a probability."""
    return next(top for top in (0.2, 0.3, 0.5, 1.0) if np.bincount(z, probabilities(state)).max() <= top + 1e-9)


def _picture(state, z):
    K, p, chosen = state["K"], probabilities(state), min(state["chosen"], state["K"] - 1)
    sigma, mu = state["sigma"] % K, state["mu"] % K
    p_z = np.bincount(z, p, K)
    unit, colours = TALL / _top(state, z), [COLOURS[i % len(COLOURS)] for i in range(K)]
    many = np.bincount(z, minlength=K)
    foot, boxes, marks = np.zeros(K), [], []
    for x in range(K):
        boxes.append((z[x] - 0.38, z[x] + 0.38, LOW + unit * foot[z[x]], LOW + unit * (foot[z[x]] + p[x])))
        foot[z[x]] += p[x]
    for x in range(K):
        way = np.array([(x, HIGH - 0.09), (z[x], LOW + unit * p_z[z[x]] + 0.085)])
        colour, width = ("ink", 5) if x == chosen else (colours[x], 2.5)
        marks.append(scene.lines(way, colour, width, "dashed" if many[z[x]] > 1 else "solid"))
    marks += [scene.bars([(x - 0.38, x + 0.38, HIGH, HIGH + unit * p[x]) for x in range(K)], colours), scene.bars(boxes, colours)]
    for k in range(K):
        from_x = ", ".join(str(x) for x in np.flatnonzero(z == k))
        marks += [scene.text(str(k), k, HIGH - 0.045, weight="600"), scene.text(str(k), k, LOW - 0.04, weight="600"),
                  scene.text(from_x, k, LOW + unit * p_z[k] + 0.035, "quiet")]
    missing = np.flatnonzero(many == 0)
    marks += [scene.text(words, -0.62, y, align="right", weight="600")
              for words, y in (("x", HIGH - 0.045), ("p(x)", HIGH + 0.12), ("z", LOW - 0.04), ("p(z)", LOW + 0.12))]
    marks += [scene.points(np.stack([missing, np.full(len(missing), LOW + 0.04)], 1), "red", "cross", 8, 1),
              scene.handles(np.stack([np.arange(K), HIGH + unit * p], 1), "bar", colours, [scene.MARKERS[i % 4] for i in range(K)], chosen)]
    bars = scene.panel(marks, (-1.9, K - 0.4, 0, 1.08), "p(x); below p(z), and which x it comes from", width=1.7, framed=False)
    gcd = math.gcd(sigma, K)
    inverse = f"σ⁻¹ = {pow(sigma, -1, K) % K}" if gcd == 1 else "σ has no inverse"
    label = (f"z = ({sigma} x + {mu}) mod {K}; gcd({sigma}, {K}) = {gcd}, {inverse}; x = {chosen} to z = {z[chosen]}, "
             f"log p(x) = {math.log(p[chosen]):.2f}, log p(z) = {math.log(p_z[z[chosen]]) + 0.0:.2f}")
    return scene.frame([[bars, _circle(z, colours, chosen, many)]], label.replace("-", "−"))


def _circle(z, colours, chosen, many):
    """The classes on a circle, clockwise from the top, and an arrow from each x to its z."""
    K = len(z)
    turn = 2 * np.pi * np.arange(K) / K
    at = np.stack([np.sin(turn), np.cos(turn)], 1)
    round_ = np.linspace(0, 2 * np.pi, 121)
    marks = [scene.lines(np.stack([np.sin(round_), np.cos(round_)], 1), "faint", 2)]
    for x in sorted(range(K), key=lambda x: x == chosen):
        colour, width = ("ink", 5) if x == chosen else (colours[x], 3)
        if z[x] == x:
            marks.append(scene.points(at[x][None], colour, "ring", 15, 1))
        else:
            along = at[z[x]] - at[x]
            along = 0.09 * along / np.hypot(*along)
            marks.append(scene.arrows([at[x] + along, at[z[x]] - along], colour, width, "dashed" if many[z[x]] > 1 else "solid"))
    for k in range(K):
        marks += [scene.points(at[k][None], colours[k], scene.MARKERS[k % 4], 7, 1), scene.text(str(k), *(1.2 * at[k]), weight="600")]
    missing = np.flatnonzero(many == 0)
    marks.append(scene.points(at[missing], "red", "cross", 12, 1))
    return scene.panel(marks, (-1.4, 1.4, -1.4, 1.4), "from x to z, round the circle", equal=True, framed=False)
