"""Lesson 05, discrete and surjective flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import itertools
import math
import re

import numpy as np
import torch
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import (
    B, both_sizes, deviating, flowkit_class, function, gradient_arrives, loss_inputs, net_inputs,
)
from autograder.exercises.lesson02 import returns_exchanged, sized
from autograder.judge import compared
from autograder.probes.common import SIZES
from autograder.probes.lesson05 import (
    DEQUANTIZED, MODULAR_SIZES, ONE_HOT_BATCHES, ONE_HOT_SHAPES, SURVAE_DRAWS, modular_others, modular_units,
)
from flowkit import plotting

ASSIGNMENT = "05_discrete_surjective"
TITLE = "Discrete and surjective flows"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.discrete", "flowkit.dequantization", "flowkit.surjective")
TEXTS = {}


# --- modular_shift ---------------------------------------------------------------------------------------------------

MODULAR_NAMES = ("modular_shift", "modular_unshift")


def modular_inputs(rng):
    return {"x": rng.integers(0, 7, (4, 3)), "mu": rng.permutation(12).reshape(4, 3) % 7}


def modular_table(name, K):
    """What is right for each sigma that has an inverse, each mu and each of 0 .. K - 1: (units, K, K)."""
    sigma, mu, x = np.array(modular_units(K))[:, None, None], np.arange(K)[:, None], np.arange(K)
    z = (mu + sigma * x) % K
    return z if name == "modular_shift" else z.argsort(-1)


def modular_own(outputs, name, K):
    """A student's table; Fail with an example unless it holds integers in 0 .. K - 1, and if nothing is moved at all."""
    table = outputs[f"{name}, K = {K}.result"]
    right = modular_table(name, K)
    if table.shape != right.shape:
        raise Fail(f"{name} does not return one integer for each.")
    bad = (table != np.round(table)) | (table < 0) | (table >= K)
    if bad.any():
        u, mu, x = next(zip(*np.nonzero(bad)))
        raise Fail(f"{name} leaves the integers 0 .. K - 1.", modular_words(name, K, u, mu, x, table))
    if (table == np.arange(K)).all():
        raise Fail(f"{name} returns what it is given, so there is nothing here to judge yet.")
    return table.astype(int)


def modular_words(name, K, u, mu, x, table):
    letters = ("x", "z") if name == "modular_shift" else ("z", "x")
    return f"K = {K}, mu = {mu}, sigma = {modular_units(K)[u]}: {letters[0]} = {x} gives {letters[1]} = {table[u, mu, x]:.4g}"


def modular_value(inputs, outputs, reference):
    for K in MODULAR_SIZES:
        table, right = modular_own(outputs, "modular_shift", K), modular_table("modular_shift", K)
        if (table != right).any():
            u, mu, x = next(zip(*np.nonzero(table != right)))
            raise Fail("modular_shift is not (mu + sigma x) mod K.", modular_words("modular_shift", K, u, mu, x, table) + f", expected {right[u, mu, x]}")


def modular_undone(inputs, outputs, reference):
    """All states, all mu, all sigma that have an inverse: nothing is left to chance."""
    for K in MODULAR_SIZES:
        there, back = (modular_own(outputs, name, K) for name in MODULAR_NAMES)
        for u, mu in np.ndindex(there.shape[:2]):
            if len(set(there[u, mu])) < K:
                raise Fail("modular_shift is no bijection: two states go to one.", f"K = {K}, mu = {mu}, sigma = {modular_units(K)[u]}: 0 .. {K - 1} go to {laws.point(there[u, mu])}")
            again = back[u, mu][there[u, mu]]
            if (again != np.arange(K)).any():
                x = int(np.nonzero(again != np.arange(K))[0][0])
                raise Fail("modular_unshift does not undo modular_shift.", f"{modular_words('modular_shift', K, u, mu, x, there)}, which comes back as {again[x]}")


def modular_refused(inputs, outputs, reference):
    for name in MODULAR_NAMES:
        for K in MODULAR_SIZES:
            modular_own(outputs, name, K)
            refused = outputs[f"{name}, K = {K}, sigma without an inverse"]
            if not refused.all():
                sigma = modular_others(K)[int(np.argmin(refused))]
                raise Fail(f"{name} accepts a sigma that has a divisor in common with K, for which several states would go to one; it should raise.",
                           f"K = {K}, sigma = {sigma}: gcd = {math.gcd(sigma, K)}")


def modular_batch(inputs, outputs, reference):
    x, mu = inputs["x"], inputs["mu"]
    for name in MODULAR_NAMES:
        got, after = outputs[f"{name} of a batch.result"], outputs[f"{name} of a batch.after"]
        modular_own(outputs, name, 7)
        if got.shape != x.shape:
            raise Fail(f"{name} returns shape {got.shape} for integers of shape {x.shape}.")
        if not np.array_equal(got, outputs[f"{name}, K = 7.result"][modular_units(7).index(3)][mu, x]):
            raise Fail(f"{name} gives other numbers for a table of integers, each with its own mu (an integer tensor of that shape), than for one mu after the other.")
        if got.dtype.kind == "f":
            raise Fail(f"{name} returns floating-point numbers; the states are integers, and so is the result.")
        if not np.array_equal(after, x) or not np.array_equal(outputs[f"{name} of a batch.mu after"], mu):
            raise Fail(f"{name} writes into a tensor that it was given: the caller's integers are overwritten.")


def modular_by(shift=lambda x, mu, s, K: (mu + s * x) % K, unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - mu) % K,
               refuses=(lambda s, K: math.gcd(s, K) != 1,) * 2, end=lambda z, s: z, exchanged=False):
    """The two functions in their plainest form, in which a mistake changes one part."""

    def ask(which, s, K):
        if refuses[which](s, K):
            raise ValueError("sigma has no inverse")

    def modular_shift(x, mu, s, K):
        ask(0, s, K)
        return end(shift(x, mu, s, K), s)

    def modular_unshift(z, mu, s, K):
        ask(1, s, K)
        return unshift(z, mu, s, K)

    return lambda: (modular_unshift, modular_shift) if exchanged else (modular_shift, modular_unshift)


def modular_inverse(s, K):
    """The inverse modulo K by search, 0 where there is none."""
    return next((t for t in range(K) if s * t % K == 1), 0)


def modular_searched(z, mu, s, K):
    return modular_inverse(s, K) * (z - mu) % K


def modular_in_place(x, mu, s, K):
    return x.mul_(s).add_(mu).remainder_(K)


def modular_back_in_place(z, mu, s, K):
    return z.sub_(mu).mul_(pow(s, -1, K)).remainder_(K)


def never(s, K):
    return False


def first_entry(mu):
    return torch.as_tensor(mu).flatten()[0]


def modular_wrong(id, kind, sentence, **parts):
    return Misconception(id, kind, "value", sentence, modular_by(**parts))


def modular_picture(inputs, outputs, reference):
    """Where each state goes, for one sigma of each K: yours over the reference's."""
    figure, axes = plotting.side_by_side(len(MODULAR_SIZES), size=3.6)
    for ax, K in zip(axes, MODULAR_SIZES):
        u, mu, x = len(modular_units(K)) // 2, 1, np.arange(K)
        right, mine = modular_table("modular_shift", K)[u, mu], outputs.arrays.get(f"modular_shift, K = {K}.result")
        for i in x:
            ax.plot([0, 1], [i, right[i]], color="#bbbbbb", linewidth=5, label="reference" if i == 0 else None)
        if mine is not None and mine.shape == modular_table("modular_shift", K).shape:
            for i in x:
                ax.plot([0, 1], [i, np.clip(mine[u, mu, i], -1, K)], color=plotting.PALETTE["red"], label="yours" if i == 0 else None)
        else:
            ax.set_xlabel("yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw", fontsize=plotting.FONT)
        ax.set_title(f"K = {K}, mu = {mu}, sigma = {modular_units(K)[u]}", fontsize=plotting.FONT - 1)
        ax.set_xticks([0, 1], ["x", "z"], fontsize=plotting.FONT), ax.set_yticks(x), ax.set_ylim(K - 0.5, -1.6)
        ax.legend(fontsize=plotting.FONT - 4, frameon=False, loc="upper center", ncols=2)
    return figure


def modular_reference():
    from flowkit.discrete import modular_shift, modular_unshift

    return modular_shift, modular_unshift


MODULAR = Exercise(
    id="modular_shift", title="Shift and scale modulo K", minutes=12, difficulty=2,
    hints=(
        "`modular_shift` is one line once sigma is known to be good: `math.gcd` tells whether it is. In `modular_unshift` there is no division by sigma: what number, times sigma, leaves the remainder 1 modulo K?",
        "Python's `pow(sigma, -1, K)` is the inverse of sigma modulo K; for small K one can also try all of 0 .. K - 1. Undo in the opposite order: the shift comes off first. `%` in Python and torch gives 0 .. K - 1 for negative numbers too.",
    ),
    inputs=modular_inputs, reference=modular_reference,
    cases=(
        Case("modular_shift: z = (mu + sigma x) mod K", 1.5, modular_value),
        Case("a bijection of 0 .. K - 1, undone by modular_unshift, for K = 4, 6, 7", 2, modular_undone),
        Case("a sigma with gcd(sigma, K) > 1 raises", 1, modular_refused),
        Case("integers of any shape, each with its own mu, and the input is left as it was", 0.5, modular_batch),
    ),
    misconceptions=(
        modular_wrong("unshift_sigma", "missing function", "modular_unshift multiplies by sigma itself; what undoes it is the number that gives 1 with sigma modulo K. For K = 4 and 6 they are the same, for K = 7 they are not.", unshift=lambda z, mu, s, K: s * (z - mu) % K),
        modular_wrong("unshift_quotient", "wrong function", "modular_unshift divides by sigma as among real numbers, and the results are no integers; modulo K one multiplies by the inverse of sigma.", unshift=lambda z, mu, s, K: (z - mu) / s % K),
        modular_wrong("unshift_quotient_outside", "wrong function", "modular_unshift takes the remainder and then divides by sigma as among real numbers; modulo K one multiplies by the inverse of sigma.", unshift=lambda z, mu, s, K: (z - mu) % K / s),
        modular_wrong("unshift_floor", "wrong function", "modular_unshift divides by sigma and rounds down, so several z come back as one x; modulo K one multiplies by the inverse of sigma.", unshift=lambda z, mu, s, K: (z - mu) // s % K),
        modular_wrong("unshift_floor_outside", "wrong function", "modular_unshift takes the remainder, divides by sigma and rounds down; modulo K one multiplies by the inverse of sigma.", unshift=lambda z, mu, s, K: (z - mu) % K // s),
        modular_wrong("unshift_fermat", "wrong function", "The inverse of sigma is taken as sigma^(K - 2), which is right for a prime K only; the check also uses K = 4 and 6.", unshift=lambda z, mu, s, K: s ** (K - 2) * (z - mu) % K),
        modular_wrong("unshift_order", "order", "modular_unshift multiplies first and then takes mu off; modular_shift added mu last, so it must come off first.", unshift=lambda z, mu, s, K: (pow(s, -1, K) * z - mu) % K),
        modular_wrong("unshift_mu_sign", "sign", "modular_unshift adds mu once more instead of taking it off.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (z + mu) % K),
        modular_wrong("unshift_turned", "sign", "In modular_unshift the difference is the wrong way round: it is taken from mu.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (mu - z) % K),
        modular_wrong("unshift_no_mu", "missing term", "modular_unshift undoes sigma but forgets mu.", unshift=lambda z, mu, s, K: pow(s, -1, K) * z % K),
        modular_wrong("unshift_no_sigma", "missing term", "modular_unshift takes mu off but forgets sigma.", unshift=lambda z, mu, s, K: (z - mu) % K),
        modular_wrong("unshift_no_mod", "missing function", "In modular_unshift the remainder modulo K is missing: results leave 0 .. K - 1.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - mu)),
        modular_wrong("unshift_mod_inside", "order", "In modular_unshift the remainder is taken before the multiplication by the inverse, which leads out of 0 .. K - 1 again.", unshift=lambda z, mu, s, K: pow(s, -1, K) * ((z - mu) % K)),
        modular_wrong("unshift_negative", "wrong function", "modular_unshift gives negative numbers: its remainder keeps the sign of z - mu, as C's and `fmod` do; it should lie in 0 .. K - 1.", unshift=lambda z, mu, s, K: torch.fmod(pow(s, -1, K) * (z - mu), K)),
        modular_wrong("unshift_absolute", "extra term", "modular_unshift takes an absolute value of z - mu; a negative difference is fine, its remainder modulo K is what counts.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - mu).abs() % K),
        modular_wrong("unshift_mod_less", "off by one", "modular_unshift takes the remainder modulo K - 1; the states 0 .. K - 1 are K in number.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - mu) % (K - 1)),
        modular_wrong("unshift_all_zero", "exchanged", "modular_unshift gives 0 for every z: the factor that should undo sigma is 0, as when the arguments of `pow` stand in another order.", unshift=lambda z, mu, s, K: pow(s, K, -1) * (z - mu) % K),
        modular_wrong("unshift_is_shift", "direction", "modular_unshift does once more what modular_shift does.", unshift=lambda z, mu, s, K: (mu + s * z) % K),
        modular_wrong("unshift_is_identity", "missing function", "modular_unshift returns z as it came: nothing is undone.", unshift=lambda z, mu, s, K: z),
        modular_wrong("exchanged_functions", "direction", "modular_shift and modular_unshift have changed places: look at their order in `check`, or at which does what.", exchanged=True),
        modular_wrong("shift_no_mod", "missing function", "In modular_shift the remainder modulo K is missing: results leave 0 .. K - 1.", shift=lambda x, mu, s, K: mu + s * x),
        modular_wrong("no_mod", "missing function", "The remainder modulo K is missing in both functions: results leave 0 .. K - 1.", shift=lambda x, mu, s, K: mu + s * x, unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - mu)),
        modular_wrong("shift_mod_inside", "order", "In modular_shift mu is added after the remainder was taken (`%` binds as strongly as `*`), which leads out of 0 .. K - 1 again.", shift=lambda x, mu, s, K: mu + s * x % K),
        modular_wrong("mod_inside", "order", "In both functions the last step comes after the remainder was taken, which leads out of 0 .. K - 1 again.", shift=lambda x, mu, s, K: mu + s * x % K, unshift=lambda z, mu, s, K: pow(s, -1, K) * ((z - mu) % K)),
        modular_wrong("shift_mod_less", "off by one", "modular_shift takes the remainder modulo K - 1, so the state K - 1 is never reached.", shift=lambda x, mu, s, K: (mu + s * x) % (K - 1)),
        modular_wrong("shift_mod_more", "off by one", "modular_shift takes the remainder modulo K + 1, so K itself may come out, which is no state.", shift=lambda x, mu, s, K: (mu + s * x) % (K + 1)),
        modular_wrong("shift_order", "order", "modular_shift adds mu before it multiplies by sigma; mu comes last.", shift=lambda x, mu, s, K: s * (x + mu) % K),
        modular_wrong("order", "order", "mu is added before sigma multiplies, and modular_unshift undoes just that; in z = mu + sigma x the shift comes last.", shift=lambda x, mu, s, K: s * (x + mu) % K, unshift=lambda z, mu, s, K: (pow(s, -1, K) * z - mu) % K),
        modular_wrong("shift_exchanged", "exchanged", "In modular_shift mu and sigma have changed places: mu multiplies, and sigma is added.", shift=lambda x, mu, s, K: (s + mu * x) % K),
        modular_wrong("shift_mu_sign", "sign", "In modular_shift mu is subtracted; it is added.", shift=lambda x, mu, s, K: (s * x - mu) % K),
        modular_wrong("mu_sign", "sign", "The sign of mu is turned in both functions: modular_shift subtracts it and modular_unshift adds it.", shift=lambda x, mu, s, K: (s * x - mu) % K, unshift=lambda z, mu, s, K: pow(s, -1, K) * (z + mu) % K),
        modular_wrong("shift_x_sign", "sign", "In modular_shift sigma x is subtracted from mu; it is added.", shift=lambda x, mu, s, K: (mu - s * x) % K),
        modular_wrong("shift_no_mu", "missing term", "modular_shift multiplies by sigma but forgets mu.", shift=lambda x, mu, s, K: s * x % K),
        modular_wrong("shift_no_sigma", "missing term", "modular_shift adds mu but forgets sigma.", shift=lambda x, mu, s, K: (mu + x) % K),
        modular_wrong("no_sigma", "missing term", "sigma is used in neither function: all that is left is a shift.", shift=lambda x, mu, s, K: (mu + x) % K, unshift=lambda z, mu, s, K: (z - mu) % K),
        modular_wrong("shift_inverse", "direction", "modular_shift multiplies by the inverse of sigma; that belongs to modular_unshift.", shift=lambda x, mu, s, K: (mu + pow(s, -1, K) * x) % K),
        modular_wrong("shift_is_identity", "missing function", "modular_shift returns x as it came: nothing is moved.", shift=lambda x, mu, s, K: x),
        modular_wrong("shift_unasked", "missing function", "modular_shift takes any sigma: whether it has a divisor in common with K is asked in modular_unshift only, when the states are lost already.", refuses=(never, lambda s, K: math.gcd(s, K) != 1)),
        modular_wrong("unshift_unasked", "missing function", "modular_unshift takes any sigma, though one with a divisor in common with K has no inverse; it should raise.", unshift=modular_searched, refuses=(lambda s, K: math.gcd(s, K) != 1, never)),
        modular_wrong("unasked", "missing function", "Neither function asks whether sigma has a divisor in common with K; such a sigma sends several states to one, and should raise.", unshift=modular_searched, refuses=(never, never)),
        modular_wrong("only_zero_refused", "wrong function", "Only sigma = 0 is refused; every sigma with a divisor in common with K sends several states to one.", unshift=modular_searched, refuses=(lambda s, K: s == 0,) * 2),
        modular_wrong("shift_only_zero_refused", "wrong function", "modular_shift refuses sigma = 0 only; every sigma with a divisor in common with K sends several states to one.", refuses=(lambda s, K: s == 0, lambda s, K: math.gcd(s, K) != 1)),
        modular_wrong("only_divisors_refused", "wrong function", "A sigma that divides K is refused; but one that only has a divisor in common with K, such as 4 for K = 6, is as bad.", unshift=modular_searched, refuses=(lambda s, K: s == 0 or s > 1 and K % s == 0,) * 2),
        modular_wrong("shift_only_divisors_refused", "wrong function", "modular_shift refuses a sigma that divides K; but one that only has a divisor in common with K, such as 4 for K = 6, is as bad.", refuses=(lambda s, K: s == 0 or s > 1 and K % s == 0, lambda s, K: math.gcd(s, K) != 1)),
        modular_wrong("volume", "extra term", "modular_shift returns two things: is one of them log sigma? States are only renamed, there is no volume that could change: z alone is asked for.", end=lambda z, s: (z, torch.full(z.shape[:1], math.log(s)))),
        modular_wrong("in_place", "in place", "Both functions write into the tensor that they are given: the caller's integers are overwritten.", shift=modular_in_place, unshift=modular_back_in_place),
        modular_wrong("first_mu", "shape", "Of mu only the first entry is used; mu may be a tensor of x's shape, and then each number has its own.", shift=lambda x, mu, s, K: (first_entry(mu) + s * x) % K, unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - first_entry(mu)) % K),
        modular_wrong("shift_first_mu", "shape", "modular_shift uses only the first entry of mu; mu may be a tensor of x's shape, and then each number has its own.", shift=lambda x, mu, s, K: (first_entry(mu) + s * x) % K),
        modular_wrong("unshift_first_mu", "shape", "modular_unshift uses only the first entry of mu; mu may be a tensor of z's shape, and then each number has its own.", unshift=lambda z, mu, s, K: pow(s, -1, K) * (z - first_entry(mu)) % K),
        modular_wrong("shift_in_place", "in place", "modular_shift writes into the tensor x that it is given: the caller's integers are overwritten.", shift=modular_in_place),
    ),
    compare=tuple(f"{name}{k}" for name in MODULAR_NAMES for k in (*(f", K = {K}{k}" for K in MODULAR_SIZES for k in (".result", ", sigma without an inverse")), " of a batch.result", " of a batch.after")),
    picture=modular_picture,
)


# --- one_hot_argmax_st -----------------------------------------------------------------------------------------------

ONE_HOT_GRADIENT = 2e-5  # a softmax in float32 is off by some 1e-6 after the division by tau, wrong gradients by tenths


def one_hot_inputs(rng):
    inputs = {"line": np.linspace(-3, 3, 121), "line tau": np.array(0.5)}
    for name, shape, tau in zip(ONE_HOT_BATCHES, ONE_HOT_SHAPES, (0.7, 2.0, 0.4, 1.0)):
        logits = rng.standard_normal(shape)
        if name == ONE_HOT_BATCHES[2]:
            logits[:, -1] = logits.min() - 0.5      # so that a number of classes counted from what won is too small
        inputs |= {f"{name}.logits": logits, f"{name}.c": rng.standard_normal(shape), f"{name}.tau": np.array(tau)}
    return inputs


def softmax(t):
    e = np.exp(t - t.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def one_hot_value(inputs, outputs, reference):
    for name in ONE_HOT_BATCHES:
        logits, y = inputs[f"{name}.logits"], outputs[f"{name}.value"]
        if y.shape != logits.shape:
            raise Fail(f"The result has shape {y.shape} for logits of shape {logits.shape}; a one-hot vector has one entry for each class.")
        want = np.eye(logits.shape[-1])[logits.argmax(-1)]
        wrong = (np.abs(y - want) > 1e-5).any(-1)
        if wrong.any():
            at = next(zip(*np.nonzero(wrong)))
            raise Fail("The result is not the one-hot vector of the largest logit.", f"logits = {laws.point(logits[at])}: {laws.expected(want[at], y[at])}")


def one_hot_exact(inputs, outputs, reference):
    """soft - soft is 0, so exactness costs nothing; (1 + soft) - soft is off in a few of a hundred entries."""
    one_hot_value(inputs, outputs, reference)
    for name in ONE_HOT_BATCHES:
        y = outputs[f"{name}.value"]
        off = (y != 0) & (y != 1)
        if off.any():
            raise Fail("Some entries miss their 0 or 1 by a rounding error, so that the result is not one-hot any more.",
                       f"{off.sum()} of {y.size} entries, one of them {np.round(y[off][0]):.0f} with an error of {abs(y[off][0] - np.round(y[off][0])):.1g}")


def one_hot_gradient(inputs, outputs, reference):
    for name in ONE_HOT_BATCHES:
        logits, c, tau = (inputs[f"{name}.{k}"] for k in ("logits", "c", "tau"))
        p = softmax(logits / tau)
        want, got = p * (c - (p * c).sum(-1, keepdims=True)) / tau, outputs[f"gradient for {name}.gradient"]
        if not outputs[f"{name}.in the graph"]:
            raise Fail("The result is cut off from the computation graph: no gradient reaches the logits.")
        if outputs[f"{name}.value"].shape != logits.shape:
            raise Fail(f"The result has shape {outputs[f'{name}.value'].shape} for logits of shape {logits.shape}.")
        if not got.any():
            raise Fail("The gradient is zero everywhere: the argmax is flat, and nothing else lets a gradient through.")
        wrong = ~laws.close(got, want, ONE_HOT_GRADIENT).all(-1)
        if wrong.any():
            at = next(zip(*np.nonzero(wrong)))
            raise Fail("The gradient is not that of softmax(logits / tau).",
                       f"logits = {laws.point(logits[at])}, tau = {float(tau)}, gradient of c . y with c = {laws.point(c[at])}: {laws.expected(want[at], got[at])}")


def one_hot_untouched(inputs, outputs, reference):
    for name in ONE_HOT_BATCHES:
        if outputs[f"{name}.value"].shape != inputs[f"{name}.logits"].shape:
            raise Fail("The result has not the shape of the logits, so there is nothing here to judge yet.")
        if not np.array_equal(outputs[f"{name}.after"], inputs[f"{name}.logits"]):
            raise Fail("The logits are overwritten in place: the caller's tensor is changed.")
        if np.array_equal(outputs[f"{name}.value"], inputs[f"{name}.logits"]):
            raise Fail("The logits come back as they are, so there is nothing here to judge yet.")


def one_hot_features(inputs, outputs):
    """The arrays, and whether the values are 0 and 1 to the last bit, which comparing arrays would not see."""
    values = [outputs.arrays.get(f"{name}.value", np.zeros(0)) for name in ONE_HOT_BATCHES]
    exact = all(((v == 0) | (v == 1)).all() for v in values)
    near = all((np.minimum(np.abs(v), np.abs(v - 1)) < 1e-5).all() for v in values)
    return compared(ONE_HOT_COMPARED, outputs) | {"exact": np.asarray("one-hot" if exact else "nearly" if near else "not one-hot")}


ONE_HOT_COMPARED = tuple(k for name in ONE_HOT_BATCHES for k in (f"{name}.value", f"gradient for {name}.gradient", f"{name}.in the graph", f"{name}.after"))


def one_hot_by(soft=lambda logits, tau: torch.softmax(logits / tau, -1), hard=lambda logits, soft: F.one_hot(logits.argmax(-1), logits.shape[-1]),
               join=lambda hard, soft: hard + (soft - soft.detach())):
    """A function `one_hot_argmax_st` in its plainest form, in which a mistake changes one part."""

    def one_hot_argmax_st(logits, tau):
        s = soft(logits, tau)
        return join(hard(logits, s).to(logits) if hard is not one_hot_index else hard(logits, s), s)

    return function(one_hot_argmax_st)


def one_hot_index(logits, soft):
    return logits.argmax(-1)


def one_hot_across(logits, dim):
    """The one-hot vectors of the largest entries along another dimension than the last."""
    return F.one_hot(logits.argmax(dim), logits.shape[dim]).movedim(-1, dim)


def one_hot_counted(logits, soft):
    return F.one_hot(logits.argmax(-1))


def one_hot_overwriting(logits, tau):
    return torch.softmax(logits.div_(tau), -1)


def one_hot_data_overwriting(logits, tau):
    logits.data /= tau
    return torch.softmax(logits, -1)


def one_hot_passed(logits, tau):
    return logits


def one_hot_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, one_hot_by(**parts))


def one_hot_gumbel(logits, tau):
    return F.gumbel_softmax(logits, tau, hard=True)


ONE_HOT = Exercise(
    id="one_hot_argmax_st", title="One-hot argmax, straight through", minutes=10, difficulty=2,
    hints=(
        "Two tensors are needed: a hard one (`F.one_hot` of `argmax`; tell it the number of classes) and a soft one (the softmax of logits / tau). The value should be that of the first, the gradient that of the second.",
        "Add something to the hard tensor whose value is zero and whose gradient is that of the soft one. `detach()` keeps a value and drops its gradient: what is a tensor minus its own detached copy?",
    ),
    inputs=one_hot_inputs, reference=flowkit_class("discrete", "one_hot_argmax_st"),
    cases=(
        Case("the value is one-hot at the largest logit", 1.5, one_hot_value),
        Case("it is one-hot to the last bit", 0.5, one_hot_exact),
        Case("the gradient is that of softmax(logits / tau)", 2.5, one_hot_gradient),
        Case("the logits are left as they were", 0.5, one_hot_untouched),
    ),
    misconceptions=(
        one_hot_wrong("soft", "missing function", "value", "What is returned is the softmax itself, which is not one-hot: its gradient is right, its value should be hard.", join=lambda hard, soft: soft),
        one_hot_wrong("hard", "missing term", "value", "The result is no part of the computation graph: the hard vector is returned alone, or the soft one is cut off as well (detach, no_grad).", join=lambda hard, soft: hard),
        one_hot_wrong("not_detached", "detached", "gradient", "The gradient is zero: soft is added and subtracted with its gradient, so that both cancel. One of the two must be detached.", join=lambda hard, soft: soft + (hard - soft)),
        one_hot_wrong("gradient_sign", "sign", "value", "The gradient has the wrong sign: the soft tensor that keeps its gradient is subtracted.", join=lambda hard, soft: hard + (soft.detach() - soft)),
        one_hot_wrong("gradient_doubled", "extra term", "value", "The gradient arrives twice: two soft tensors keep theirs.", join=lambda hard, soft: hard + 2 * (soft - soft.detach())),
        one_hot_wrong("sum", "missing term", "value", "The soft tensor is added to the hard one, and its value is not taken off again.", join=lambda hard, soft: hard + soft),
        one_hot_wrong("sum_detached", "sign", "value", "The detached soft tensor is added instead of taken off, so that the value is hard plus twice soft.", join=lambda hard, soft: hard + (soft + soft.detach())),
        one_hot_wrong("hard_dropped", "missing term", "value", "The value is zero everywhere: the hard part is missing.", join=lambda hard, soft: soft - soft.detach()),
        one_hot_wrong("hard_taken_off", "sign", "value", "The value is the negative of a one-hot vector: hard is subtracted.", join=lambda hard, soft: (soft - soft.detach()) - hard),
        one_hot_wrong("no_tau", "missing term", "value", "tau is not used: the gradient is that of softmax(logits).", soft=lambda logits, tau: torch.softmax(logits, -1)),
        one_hot_wrong("tau_multiplies", "wrong function", "value", "The logits are multiplied by tau; they are divided by it, so that a small tau makes the softmax sharp.", soft=lambda logits, tau: torch.softmax(logits * tau, -1)),
        one_hot_wrong("tau_outside", "order", "value", "The softmax is divided by tau; it is the logits that are divided, before the softmax.", soft=lambda logits, tau: torch.softmax(logits, -1) / tau),
        one_hot_wrong("tau_turned", "exchanged", "value", "tau is divided by the logits; it is the other way round.", soft=lambda logits, tau: torch.softmax(tau / logits, -1)),
        one_hot_wrong("no_softmax", "missing function", "value", "The gradient is that of logits / tau: the softmax is missing.", soft=lambda logits, tau: logits / tau),
        one_hot_wrong("logits_passed", "missing function", "value", "The gradient passes to the logits unchanged, as in rounding; here it should be that of softmax(logits / tau).", soft=one_hot_passed),
        one_hot_wrong("log_softmax", "wrong function", "value", "The gradient is that of the logarithm of the softmax.", soft=lambda logits, tau: torch.log_softmax(logits / tau, -1)),
        one_hot_wrong("sigmoid", "wrong function", "value", "The gradient is that of a sigmoid of each logit; the softmax lets the classes compete.", soft=lambda logits, tau: torch.sigmoid(logits / tau)),
        one_hot_wrong("softmax_axis", "wrong axis", "value", "The softmax is taken along the wrong dimension, over the batch; the classes are the last one.", soft=lambda logits, tau: torch.softmax(logits / tau, 0)),
        one_hot_wrong("softmax_axis_one", "wrong axis", "value", "The softmax is taken along dimension 1, which is the classes' for a matrix only; the classes are the last dimension.", soft=lambda logits, tau: torch.softmax(logits / tau, 1)),
        one_hot_wrong("argmax_axis", "wrong axis", "value", "The largest logit is looked for along the wrong dimension, over the batch; the classes are the last one.", hard=lambda logits, soft: one_hot_across(logits, 0)),
        one_hot_wrong("argmax_axis_one", "wrong axis", "value", "The largest logit is looked for along dimension 1, which is the classes' for a matrix only; the classes are the last dimension.", hard=lambda logits, soft: one_hot_across(logits, 1)),
        one_hot_wrong("axis", "wrong axis", "value", "Both the largest logit and the softmax are taken along the wrong dimension, over the batch; the classes are the last one.", hard=lambda logits, soft: one_hot_across(logits, 0), soft=lambda logits, tau: torch.softmax(logits / tau, 0)),
        one_hot_wrong("axis_one", "wrong axis", "value", "Both the largest logit and the softmax are taken along dimension 1, which is the classes' for a matrix only.", hard=lambda logits, soft: one_hot_across(logits, 1), soft=lambda logits, tau: torch.softmax(logits / tau, 1)),
        one_hot_wrong("index", "missing function", "value", "What is returned are the numbers of the classes; a one-hot vector has an entry for each class.", hard=one_hot_index, join=lambda hard, soft: hard),
        one_hot_wrong("classes_counted", "shape", "value", "The one-hot vectors are as long as the largest class that won, not as there are classes: where the last class never wins an entry is missing.", hard=one_hot_counted, join=lambda hard, soft: hard + (soft - soft.detach())[..., :hard.shape[-1]]),
        one_hot_wrong("rounded", "wrong function", "value", "The softmax is rounded (or compared with 1/2): where no class has more than half of the probability, no entry is 1.", hard=lambda logits, soft: soft.detach().round()),
        one_hot_wrong("argmin", "direction", "value", "The entry of the smallest logit is 1; it should be that of the largest.", hard=lambda logits, soft: F.one_hot(logits.argmin(-1), logits.shape[-1])),
        one_hot_wrong("largest_kept", "missing function", "value", "At the largest logit the softmax' value is kept; a one-hot vector has a 1 there.", hard=lambda logits, soft: (soft * (soft == soft.amax(-1, keepdim=True))).detach()),
        Misconception("gumbel", "wrong function", "value", "The class is drawn (Gumbel-softmax); here it is the largest logit that wins, and nothing is random: the flow must be undone with the same mu.", function(one_hot_gumbel)),
        one_hot_wrong("in_place", "in place", "input", "The logits are divided by tau in place: the caller's tensor is overwritten.", soft=one_hot_overwriting),
        one_hot_wrong("in_place_data", "in place", "input", "The logits are overwritten by logits / tau through `.data`: the caller's tensor is changed, and the gradient does not see the division.", soft=one_hot_data_overwriting),
        one_hot_wrong("nearly", "order", "value", "The soft tensor is added to the hard one and then taken off, which leaves a rounding error: the result is not exactly one-hot.", join=lambda hard, soft: hard + soft - soft.detach()),
    ),
    features=one_hot_features, compare=ONE_HOT_COMPARED,
    picture=pictures.against_reference(("picture.value", "picture.slope"), "line", ("first entry of the result for logits (t, 0)", "its slope in t, tau = 1/2"), (-3, 3), "t"),
)


# --- round_st --------------------------------------------------------------------------------------------------------

ROUNDED = ("round_st", "round_st of a row")


def round_points(rng, *shape):
    """Numbers of both signs that keep away from the halves, where to round up is as right as to round to even."""
    return rng.integers(-6, 7, shape) + rng.uniform(0.03, 0.47, shape) * rng.choice([-1.0, 1.0], shape)


def round_inputs(rng):
    return {"x": round_points(rng, B, 6), "c": rng.standard_normal((B, 6)), "row": round_points(rng, 5), "row c": rng.standard_normal(5), "line": np.linspace(-2.6, 2.6, 260)}


def round_given(inputs, step):
    return (inputs["x"], inputs["c"]) if step == ROUNDED[0] else (inputs["row"], inputs["row c"])


def round_rounded(inputs, outputs, step):
    """The student's values; Fail unless they have x's shape and are not x itself."""
    x, y = round_given(inputs, step)[0], outputs[f"{step}.value"]
    if y.shape != x.shape:
        raise Fail(f"The result has shape {y.shape} for x of shape {x.shape}.")
    if np.abs(y - x).max() < 1e-6:
        raise Fail("x comes back as it is: nothing is rounded.")
    return x, y


def round_value(inputs, outputs, reference):
    for step in ROUNDED:
        x, y = round_rounded(inputs, outputs, step)
        wrong = np.abs(y - np.round(x)) > 1e-5
        if wrong.any():
            i = laws.first_bad(x.ravel(), wrong.ravel())
            raise Fail("The result is not the nearest integer.", f"x = {x.ravel()[i]:.4g}: expected {np.round(x.ravel()[i]):g}, got {y.ravel()[i]:.4g}")


def round_exact(inputs, outputs, reference):
    """x - x is 0 and round(x) - x has no rounding error (they are within a factor of 2, or round(x) = 0), so exactness costs nothing."""
    round_value(inputs, outputs, reference)
    for step in ROUNDED:
        x, y = round_rounded(inputs, outputs, step)
        off = y != np.round(y)
        if off.any():
            raise Fail("Some results miss their integer by a rounding error, so that they are no integers any more.",
                       f"x = {x[off][0]:.4g}: got {y[off][0]:.0f} with an error of {abs(y[off][0] - np.round(y[off][0])):.1g}")


def round_gradient(inputs, outputs, reference):
    for step in ROUNDED:
        round_rounded(inputs, outputs, step)
        c, got = round_given(inputs, step)[1], outputs[f"gradient for {step}.gradient"]
        if not outputs[f"{step}.in the graph"]:
            raise Fail("The result is cut off from the computation graph: no gradient reaches x.")
        if not got.any():
            raise Fail("The gradient is zero everywhere, as that of the rounding itself.")
        if not laws.close(got, c, 1e-5).all():
            raise Fail("The gradient is not 1 for each entry: it should pass as if nothing had been rounded.")


def round_untouched(inputs, outputs, reference):
    for step in ROUNDED:
        round_rounded(inputs, outputs, step)
        if not np.array_equal(outputs[f"{step}.after"], round_given(inputs, step)[0]):
            raise Fail("x is rounded in place: the caller's tensor is overwritten.")


def round_features(inputs, outputs):
    """The arrays, and whether the values are integers to the last bit, which comparing arrays would not see."""
    found = compared(ROUND_COMPARED, outputs)
    values = [outputs.arrays.get(f"{step}.value", np.zeros(0)) for step in ROUNDED]
    exact = all((v == np.round(v)).all() for v in values)
    # Values that are nowhere near an integer are no matter of rounding errors.
    near = all((np.abs(v - np.round(v)) < 1e-9).all() for v in values)
    return found | {"exact": np.asarray("integers" if exact else "nearly" if near else "no integers")}


ROUND_COMPARED = tuple(k for step in ROUNDED for k in (f"{step}.value", f"gradient for {step}.gradient", f"{step}.in the graph", f"{step}.after"))


def round_wrong(id, kind, place, sentence, f):
    return Misconception(id, kind, place, sentence, function(f))


def round_passing(hard):
    """A function with the values of `hard` and the gradient of x."""
    return lambda x: hard(x).detach() + (x - x.detach())


def round_in_place(x):
    y = x - x.detach()
    x.data.round_()
    return x.detach().clone() + y


ROUND = Exercise(
    id="round_st", title="Rounding, straight through", minutes=5, difficulty=1,
    hints=(
        "The slope of rounding is zero almost everywhere, so a net behind it would never learn. The straight-through estimator says: round on the way there, and on the way back act as if you had not.",
        "Write the result as x plus a correction. The value needs the correction, the gradient must not see it: `detach()` does that.",
    ),
    inputs=round_inputs, reference=flowkit_class("discrete", "round_st"),
    cases=(
        Case("the value is the nearest integer", 1, round_value),
        Case("it is an integer to the last bit", 0.5, round_exact),
        Case("the gradient is 1", 1.5, round_gradient),
        Case("x is left as it was", 0.5, round_untouched),
    ),
    misconceptions=(
        round_wrong("floor", "wrong function", "value", "The result is rounded down, as the slide's formula prints it; the nearest integer is asked for.", round_passing(torch.floor)),
        round_wrong("ceil", "wrong function", "value", "The result is rounded up; the nearest integer is asked for.", round_passing(torch.ceil)),
        round_wrong("trunc", "wrong function", "value", "The digits behind the point are cut off (trunc, int), which rounds towards zero; the nearest integer is asked for.", round_passing(torch.trunc)),
        round_wrong("half_up_truncated", "wrong function", "value", "1/2 is added and then the digits are cut off, which is right for positive numbers only.", round_passing(lambda x: torch.trunc(x + 0.5))),
        round_wrong("flat", "detached", "gradient", "The gradient is zero: that of the rounding is, and one that is added and subtracted with its gradient cancels. Some part must be detached, some part must not.", torch.round),
        round_wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad, or a whole number type), so no gradient reaches x.", lambda x: x.detach().round()),
        round_wrong("identity", "missing function", "value", "x comes back as it is: the correction that rounds it is missing.", lambda x: x * 1),
        round_wrong("zero", "missing term", "value", "The value is zero everywhere: of the two parts only the one that carries the gradient is there.", lambda x: x - x.detach()),
        round_wrong("not_taken_off", "missing term", "value", "x is added to its rounded value for the sake of the gradient, but its value is not taken off again.", lambda x: x.detach().round() + x),
        round_wrong("correction_alone", "missing term", "value", "What is returned is the correction round(x) - x; x itself is missing.", lambda x: (x.round() - x)),
        round_wrong("correction_turned", "sign", "value", "The correction has the wrong sign: x - round(x) is added, so the result is as far from the integer as x was, twice over.", lambda x: x + (x - x.round()).detach()),
        round_wrong("correction_detached_less", "sign", "value", "The two parts of the correction are added instead of subtracted.", lambda x: x + (x.round() + x).detach()),
        round_wrong("rounded_negative", "sign", "value", "The rounded value is subtracted: the result is its negative.", lambda x: (x - x.detach()) - x.detach().round()),
        round_wrong("gradient_sign", "sign", "value", "The gradient is -1: the x that keeps its gradient is subtracted.", lambda x: x.detach().round() + (x.detach() - x)),
        round_wrong("gradient_doubled", "extra term", "value", "The gradient is 2: x is added twice with its gradient.", lambda x: 2 * x + (x.round() - 2 * x).detach()),
        round_wrong("sawtooth_gradient", "wrong function", "value", "The gradient is multiplied by round(x) / x: the result is x times a factor, and the factor is not what should carry it.", lambda x: x * (x.round() / x).detach()),
        round_wrong("smooth", "wrong function", "value", "The result is a smooth curve through the integers (x - sin(2 pi x) / 2 pi), which between them gives no integers.", lambda x: x - torch.sin(2 * math.pi * x) / (2 * math.pi)),
        round_wrong("smooth_gradient", "wrong function", "value", "The gradient is that of a smooth step; straight through means 1 for each entry.", lambda x: (s := x - torch.sin(2 * math.pi * x) / (2 * math.pi)) + (x.round() - s).detach()),
        round_wrong("clipped_gradient", "extra term", "value", "The gradient is stopped where x leaves -1 .. 1, as for binary nets; here it passes everywhere.", lambda x: x.detach().round() + (x.clamp(-1, 1) - x.clamp(-1, 1).detach())),
        round_wrong("sign", "wrong function", "value", "The result is the sign of x; the nearest integer is asked for.", round_passing(torch.sign)),
        round_wrong("nearly", "order", "value", "x is added to the rounded value and then taken off, which leaves a rounding error: the results are not exactly integers.", lambda x: (x.detach().round() + x) - x.detach()),
        round_wrong("in_place", "in place", "input", "x is rounded in place: the caller's tensor is overwritten.", round_in_place),
    ),
    features=round_features, compare=ROUND_COMPARED,
    picture=pictures.against_reference(("picture.value",), "line", ("round_st(x)",), (-2.6, 2.6)),
)


# --- idf_coupling ----------------------------------------------------------------------------------------------------

INTEGER_SCALE = {"W1": 0.3, "b1": 1, "W2": 3.0, "b2": 3.0}      # so that shifts are several units, and units are not saturated
INTEGER_MARGIN = 0.02       # how far the net's outputs stay away from the halves, where rounding is a matter of taste


def integer_net(inputs, prefix, x1, nudge=0.0):
    """What the net gives there, in numpy, with its weights moved along their direction."""
    w = {k: inputs[f"{prefix}net.{k}"] + nudge * inputs[f"{prefix}direction.{k}"] for k in ("W1", "b1", "W2", "b2")}
    return np.tanh(x1 @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]


def idf_inputs(rng):
    inputs = {"grid": np.stack(np.meshgrid(np.arange(-4.0, 5), np.arange(-4.0, 5)), -1).reshape(-1, 2)}
    for prefix in SIZES:
        D, drawn = int(prefix[2]), {}
        while drawn.keys() != {"x", "z"}:   # a net now and then rounds to zero almost everywhere
            drawn, net = {}, {k: v * INTEGER_SCALE.get(k.rsplit(".", 1)[1], 1) for k, v in net_inputs(rng, D // 2, D // 2, prefix).items()}
            for name in ("x", "z"):
                rows = rng.integers(-6, 7, (40 * B, D)).astype(float)
                mu = integer_net(net, prefix, rows[:, :D // 2])
                clear = (np.abs(mu % 1 - 0.5) > INTEGER_MARGIN).all(1) & (np.round(mu) != 0).any(1)
                if clear.sum() >= B:
                    drawn[name] = rows[clear][:B]
        inputs |= net | {prefix + name: rows for name, rows in drawn.items()} | {f"{prefix}c": rng.standard_normal((B, D))}
    return inputs


def idf_first_half(inputs, outputs, prefix):
    laws.moves(inputs, outputs, prefix)
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    half = x.shape[1] // 2
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be {x.shape}.")
    laws.expect("z1", x, z[:, :half], x[:, :half], why=": the first half is passed on as it is")


def idf_second_half(inputs, outputs, prefix):
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    half = x.shape[1] // 2
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be {x.shape}.")
    shift = z[:, half:] - x[:, half:]
    if np.abs(shift - np.round(shift)).max() > 1e-5:
        raise Fail("forward gives numbers that are no integers.", f"x = {laws.point(x[0])}: z = {laws.point(z[0])}")
    laws.expect("z2", x, z[:, half:], x[:, half:] + np.round(integer_net(inputs, prefix, x[:, :half])), why=": it is x2 + round(net(x1))")


def idf_exact(inputs, outputs, prefix):
    """No tolerance: sums of integers below 2^24 are exact in float32, so a bijection of the integers costs no bit."""
    laws.round_trip(inputs, outputs, prefix)
    for key in ("forward.z", "inverse.x"):
        got = outputs[prefix + key]
        if (got != np.round(got)).any():
            raise Fail(f"{key.split('.')[0]} gives numbers that are not exactly integers: they are off by a rounding error, or more.")
    for given, key in (("x", "inverse of forward.x"), ("z", "forward of inverse.z")):
        if (outputs[prefix + key] != inputs[prefix + given]).any():
            raise Fail(f"There and back again does not give {given} to the last bit; a code without loss needs just that.")


def idf_no_volume(inputs, outputs, prefix):
    laws.moves(inputs, outputs, prefix)
    ldj = outputs[prefix + "forward.ldj"]
    if ldj.shape != (B,):
        raise Fail(f"`ldj` from forward has shape {ldj.shape}; it should be (B,) = {(B,)}.")
    if (ldj != 0).any():
        raise Fail("`ldj` is not zero: on the integers states are only renamed, log p(x) = log p(z).")


def idf_gradient(inputs, outputs, prefix):
    laws.moves(inputs, outputs, prefix)
    x, c, got = inputs[prefix + "x"], inputs[prefix + "c"], outputs[prefix + "gradient.along"]
    half, t = x.shape[1] // 2, laws.STEP * laws.OFFSETS
    by_w = laws.directional([(c[:, half:] * integer_net(inputs, prefix, x[:, :half], h)).sum() for h in t])
    by_x = (c**2).sum() + laws.directional([(c[:, half:] * integer_net(inputs, prefix, x[:, :half] + h * c[:, :half])).sum() for h in t])
    for g, want, where in ((got[0], by_w, "the weights of `net`"), (got[1], by_x, "x, and with it the layers before")):
        if abs(g - want) > 1e-3 * (1 + abs(want)):
            how = "No gradient" if g == 0 else "Not the gradient of the shift without rounding"
            raise Fail(f"{how} reaches {where}: it should pass the rounding straight through.", f"expected {want:.4g}, got {g:.4g}")


class PlainIDF:
    """The layer in its plainest form, one method a step."""

    def __init__(self, net):
        self.net = net

    def rounded(self, mu):
        return mu + (mu.round() - mu).detach()

    def shift(self, x1):
        return self.rounded(self.net(x1))

    def back(self, z1):
        return self.shift(z1)

    def bend(self, x2, mu):
        return x2 + mu

    def unbend(self, z2, mu):
        return z2 - mu

    def join(self, a, b):
        return torch.cat([a, b], -1)

    def ldj(self, x, mu):
        return torch.zeros(len(x))

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        mu = self.shift(x1)
        return self.join(x1, self.bend(x2, mu)), self.ldj(x, mu)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        return torch.cat([z1, self.unbend(z2, self.back(z1))], -1)


def idf_both(step):
    """The same wrong rounding in both directions."""
    return {"rounded": lambda self, mu: step(mu)}


def idf_forward_second(self, x):
    x1, x2 = x.chunk(2, -1)
    mu = self.shift(x2)
    return torch.cat([x1, x2 + mu], -1), self.ldj(x, mu)


def idf_inverse_second(self, z):
    z1, z2 = z.chunk(2, -1)
    return torch.cat([z1, z2 - self.shift(z2)], -1)


def idf_forward_first(self, x):
    x1, x2 = x.chunk(2, -1)
    mu = self.shift(x2)
    return torch.cat([x1 + mu, x2], -1), self.ldj(x, mu)


def idf_inverse_first(self, z):
    z1, z2 = z.chunk(2, -1)
    return torch.cat([z1 - self.shift(z2), z2], -1)


def idf_forward_in_place(self, x):
    x1, x2 = x.chunk(2, -1)
    mu = self.shift(x1)
    with torch.no_grad():
        x2.data.add_(mu.data)
    return torch.cat([x1, x2.detach() + (x2 - x2.detach()) + (mu - mu.detach())], -1), self.ldj(x, mu)


def idf_inverse_in_place(self, z):
    z1, z2 = z.chunk(2, -1)
    z2.data.sub_(self.shift(z1).data)
    return z


def idf_cut_at_one(self, x):
    mu = self.shift(x[:, :1])
    return torch.cat([x[:, :1], x[:, 1:] + mu], -1), self.ldj(x, mu)


def idf_uncut_at_one(self, z):
    return torch.cat([z[:, :1], z[:, 1:] - self.shift(z[:, :1])], -1)


IDF_COMPARED = sized(("forward.z", "forward.ldj", "inverse.x", "inverse of forward.x", "x after", "z after", "gradient.along"))


def idf_features(inputs, outputs):
    """The arrays, and whether z holds integers to the last bit, which comparing arrays would not see."""
    z = outputs.arrays.get("D=6 forward.z", np.zeros(0))
    off = np.abs(z - np.round(z)).max(initial=0)
    return compared(IDF_COMPARED, outputs) | {"exact": np.asarray("integers" if off == 0 else "nearly" if off < 1e-9 else "no integers")}


def idf_picture(inputs, outputs, reference):
    """Where the states of a square lattice go, yours and the reference's: each column is moved as a whole."""
    figure, axes = plotting.side_by_side(2, ("yours", "reference"), size=4.4)
    x = inputs["grid"]
    for ax, z, colour in zip(axes, (outputs.arrays.get("picture.z"), reference.arrays["picture.z"]), ("blue", "black")):
        if z is None or z.shape != x.shape or not np.isfinite(z).all():
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            continue
        ax.scatter(*x.T, s=30, facecolors="none", edgecolors="#aaaaaa", zorder=1, label="x")
        ax.scatter(*z.T, s=10, color=plotting.PALETTE[colour], zorder=2, label="z")
        ax.legend(fontsize=plotting.FONT - 3, loc="upper left")
        ax.set_xlabel("z1", fontsize=plotting.FONT), ax.set_ylabel("z2", fontsize=plotting.FONT), ax.grid(alpha=0.3)
    return figure


idf_wrong = deviating(PlainIDF)
IDF = Exercise(
    id="idf_coupling", title="Integer discrete flow", minutes=12, difficulty=2,
    hints=(
        "It is the additive coupling of lesson 02 with one thing changed: the shift is rounded. The first half is passed on, so inverse can ask the net the same question and gets the same integers.",
        "Use your `round_st` on what the net returns, in both directions. There is no volume on the integers: `ldj` is a zero for each row of the batch.",
    ),
    inputs=idf_inputs, reference=flowkit_class("discrete", "IDFCoupling"),
    cases=(
        Case("the first half is passed on", 0.5, both_sizes(idf_first_half)),
        Case("z2 = x2 + round(net(x1)): integers in, integers out", 1.5, both_sizes(idf_second_half)),
        Case("inverse undoes forward to the last bit, and forward inverse", 2, both_sizes(idf_exact)),
        Case("log p(x) = log p(z): ldj is zero, (B,)", 1, both_sizes(idf_no_volume)),
        Case("gradients pass the rounding", 1.5, both_sizes(idf_gradient)),
        Case("the input is left as it was", 0.5, both_sizes(laws.untouched)),
    ),
    misconceptions=(
        idf_wrong("not_rounded", "missing function", "forward", "The shift is not rounded, in neither direction: integers go in, and no integers come out.", **idf_both(lambda mu: mu)),
        idf_wrong("forward_not_rounded", "missing function", "forward", "In forward the shift is not rounded, in inverse it is.", shift=lambda self, x1: self.net(x1), back=lambda self, z1: self.net(z1).round()),
        idf_wrong("inverse_not_rounded", "missing function", "inverse", "In inverse the shift is not rounded, so what comes back is no integer.", back=lambda self, z1: self.net(z1)),
        idf_wrong("floor", "wrong function", "forward", "The shift is rounded down, as the slide's formula prints it; the nearest integer is asked for.", **idf_both(lambda mu: mu + (mu.floor() - mu).detach())),
        idf_wrong("trunc", "wrong function", "forward", "The shift is cut off behind the point (trunc, int), which rounds towards zero; the nearest integer is asked for.", **idf_both(lambda mu: mu + (mu.trunc() - mu).detach())),
        idf_wrong("inverse_floor", "wrong function", "inverse", "In inverse the shift is rounded down, in forward to the nearest integer.", back=lambda self, z1: self.net(z1).floor()),
        idf_wrong("flat_rounding", "detached", "gradient", "No gradient reaches the net: its output is rounded without the straight-through estimator, or cut off (no_grad, detach, a whole number type).", rounded=lambda self, mu: mu.round()),
        idf_wrong("all_detached", "detached", "gradient", "z is cut off from the computation graph as a whole, so no layer before this one would learn either.", forward=lambda self, x: tuple(t.detach() for t in PlainIDF.forward(self, x))),
        idf_wrong("x_detached", "detached", "gradient", "The net sees a detached x1 (or x1 as whole numbers): its weights learn, but the layers before do not learn through it.", shift=lambda self, x1: self.rounded(self.net(x1.detach()))),
        idf_wrong("sum_flat", "detached", "gradient", "The sum x2 + net(x1) is rounded without the straight-through estimator: no gradient passes to x2, nor to the net.", rounded=lambda self, mu: mu, bend=lambda self, x2, mu: (x2 + mu).round(), unbend=lambda self, z2, mu: (z2 - mu).round()),
        idf_wrong("nearly", "order", "forward", "The rounding leaves a rounding error: the net's output is added to the rounded one and then taken off, so z is not exactly an integer.", rounded=lambda self, mu: (mu.round().detach() + mu) - mu.detach()),
        idf_wrong("inverse_sign", "sign", "inverse", "inverse adds the shift once more instead of taking it off.", unbend=lambda self, z2, mu: z2 + mu),
        idf_wrong("forward_sign", "sign", "forward", "forward subtracts the shift; it is added there, and taken off in inverse.", bend=lambda self, x2, mu: x2 - mu),
        idf_wrong("signs", "sign", "forward", "The sign of the shift is turned in both directions: forward subtracts it and inverse adds it.", bend=lambda self, x2, mu: x2 - mu, unbend=lambda self, z2, mu: z2 + mu),
        idf_wrong("inverse_turned", "sign", "inverse", "In inverse the difference is the wrong way round: z2 is taken from the shift.", unbend=lambda self, z2, mu: mu - z2),
        idf_wrong("forward_turned", "sign", "forward", "In forward x2 is taken from the shift.", bend=lambda self, x2, mu: mu - x2),
        idf_wrong("forward_shift_alone", "missing term", "forward", "forward returns the rounded shift in place of x2 + shift: x2 is lost.", bend=lambda self, x2, mu: mu + 0 * x2),
        idf_wrong("forward_no_shift", "missing term", "forward", "forward does not add the shift.", bend=lambda self, x2, mu: x2),
        idf_wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
        idf_wrong("inverse_shift_alone", "missing term", "inverse", "inverse returns the shift alone: z2 is lost.", unbend=lambda self, z2, mu: -mu),
        idf_wrong("inverse_from_second", "wrong function", "inverse", "inverse feeds the second half to the net; only the first half is the same before and after.", inverse=idf_inverse_second),
        idf_wrong("forward_from_second", "wrong function", "net", "forward feeds the second half to the net; it is the first half that decides the shift.", forward=idf_forward_second),
        idf_wrong("self_conditioned", "wrong function", "net", "The second half is fed to the net in both directions, so it conditions itself and cannot be recovered.", forward=idf_forward_second, inverse=idf_inverse_second),
        idf_wrong("halves_swapped", "exchanged", "forward", "The halves are swapped in both directions: the second half is passed on and the first one shifted.", forward=idf_forward_first, inverse=idf_inverse_first),
        idf_wrong("forward_of_first", "exchanged", "forward", "forward shifts the first half, while inverse changes the second: the halves are swapped in one direction.", forward=idf_forward_first),
        idf_wrong("inverse_of_first", "exchanged", "inverse", "inverse shifts the first half, while forward changed the second: the halves are swapped in one direction.", inverse=idf_inverse_first),
        idf_wrong("cat_order", "order", "forward", "In forward the two halves are joined in the wrong order: the shifted half stands first.", join=lambda self, a, b: torch.cat([b, a], -1)),
        idf_wrong("cat_axis", "wrong axis", "forward", "In forward the halves are joined along the batch instead of along the dimensions.", join=lambda self, a, b: torch.cat([a, b], 0)),
        idf_wrong("inverse_cat_axis", "wrong axis", "inverse", "In inverse the halves are joined along the batch instead of along the dimensions.", inverse=lambda self, z: torch.cat(PlainIDF.inverse(self, z).chunk(2, -1), 0)),
        idf_wrong("inverse_cat_order", "order", "inverse", "In inverse the two halves are joined in the wrong order.", inverse=lambda self, z: torch.cat(PlainIDF.inverse(self, z).chunk(2, -1)[::-1], -1)),
        idf_wrong("half_hard_coded", "constant", "forward", "x is cut at a fixed place, which is its middle for D = 2 only; the check also uses D = 6.", forward=idf_cut_at_one, inverse=idf_uncut_at_one),
        idf_wrong("clamped", "extra term", "forward", "z is clamped to a range: states beyond it fall together, so forward is no bijection of the integers.", bend=lambda self, x2, mu: (x2 + mu).clamp(min=0)),
        idf_wrong("ldj_shift", "extra term", "ldj", "`ldj` adds up the shift; a shift renames the integers and changes no probability.", ldj=lambda self, x, mu: mu.sum(-1)),
        idf_wrong("ldj_zero_no_sum", "shape", "ldj", "`ldj` has a zero for each dimension; it is (B,), one for each row.", ldj=lambda self, x, mu: torch.zeros_like(x)),
        idf_wrong("ldj_zero_half", "shape", "ldj", "`ldj` has a zero for each shifted dimension; it is (B,), one for each row.", ldj=lambda self, x, mu: torch.zeros_like(mu)),
        idf_wrong("ldj_zero_kept", "shape", "ldj", "`ldj` has shape (B, 1); it is (B,).", ldj=lambda self, x, mu: torch.zeros(len(x), 1)),
        idf_wrong("ldj_one_zero", "shape", "ldj", "`ldj` is one zero for the whole batch; every row has its own, (B,).", ldj=lambda self, x, mu: torch.zeros(())),
        idf_wrong("ldj_zero_columns", "exchanged", "ldj", "`ldj` has a zero for each column of x; it is (B,), one for each row.", ldj=lambda self, x, mu: torch.zeros(x.shape[1])),
        idf_wrong("ldj_number", "type", "ldj", "`ldj` is the Python number 0; a tensor of zeros is asked for, one for each row.", ldj=lambda self, x, mu: 0.0),
        idf_wrong("ldj_ones", "missing function", "ldj", "`ldj` is 1, the determinant; its logarithm is asked for.", ldj=lambda self, x, mu: torch.ones(len(x))),
        returns_exchanged(PlainIDF),
        idf_wrong("only_z", "missing term", "ldj", "forward returns z alone; `ldj` belongs to it, though it is zero: (z, ldj).", forward=lambda self, x: PlainIDF.forward(self, x)[0]),
        idf_wrong("forward_in_place", "in place", "input", "forward writes its result into the tensor x that it was given: the caller's data are overwritten.", forward=idf_forward_in_place),
        idf_wrong("inverse_in_place", "in place", "input", "inverse writes its result into the tensor z that it was given: the caller's tensor is overwritten.", inverse=idf_inverse_in_place),
    ),
    features=idf_features, compare=IDF_COMPARED, picture=idf_picture,
)


# --- uniform_dequantize ----------------------------------------------------------------------------------------------

# What is drawn at random is held against bounds that a right answer breaks in less than one of 10^7 checks each, and so in less than one
# of 10^6 together: the distribution by Dvoretzky, Kiefer and Wolfowitz (one), the mean of exp by Hoeffding (two), each of five
# correlations by the normal distribution's tail beyond 5.5 (4e-8).
RARE = 1e-7
UNIFORM_TWO, UNIFORM_THREE, UNIFORM_ONE, UNIFORM_CELL = DEQUANTIZED
UNIFORM_TOL = 1e-5  # of y in a cell, as float32 may round x + u up to x + 1


def uniform_inputs(rng):
    inputs = {}
    for name, x, K in ((UNIFORM_TWO, rng.integers(0, 8, (2000, 2)), 8), (UNIFORM_THREE, rng.integers(0, 5, (6, 3)), 5),
                       (UNIFORM_ONE, rng.integers(0, 256, (1, 4)), 256), (UNIFORM_CELL, np.tile([1, 2], (6000, 1)), 5)):     # not D = 2 with K = 4: 2 log 4 = 4 log 2
        inputs |= {f"{name}.x": x, f"{name}.K": np.array(K)}
    return inputs


def uniform_noise(inputs, outputs, name):
    """u = K y - x of a student's y; Fail if y has not x's shape."""
    x, y = inputs[f"{name}.x"], outputs[f"{name}.y"]
    if y.shape != x.shape:
        raise Fail(f"`y` has shape {y.shape} for x of shape {x.shape}.")
    return y.astype(float) * int(inputs[f"{name}.K"]) - x


def uniform_cells(inputs, outputs, reference):
    for name in DEQUANTIZED:
        u, K = uniform_noise(inputs, outputs, name), int(inputs[f"{name}.K"])
        wrong = (u < -UNIFORM_TOL * K) | (u > 1 + UNIFORM_TOL * K)
        if wrong.any():
            at = next(zip(*np.nonzero(wrong)))
            x, y = inputs[f"{name}.x"][at], outputs[f"{name}.y"][at]
            raise Fail("`y` leaves the cell of its integer, so rounding K y down would not give x back.", f"x = {x}, K = {K}: y = {y:.4g}, the cell is {x / K:.4g} .. {(x + 1) / K:.4g}")
        if np.abs(u).max() < 1e-9:
            raise Fail("`y` is x / K, with no noise at all: the data are as discrete as before.")


def uniform_is_uniform(inputs, outputs, reference):
    uniform_cells(inputs, outputs, reference)
    u = uniform_noise(inputs, outputs, UNIFORM_TWO)
    shared = uniform_shared(inputs, outputs)
    if shared:
        raise Fail(shared)
    ranks = np.sort(u.ravel())
    gap = np.abs(ranks - (np.arange(ranks.size) + 0.5) / ranks.size).max()
    if gap > math.sqrt(math.log(2 / RARE) / (2 * ranks.size)) + 1 / ranks.size:
        raise Fail("The noise u = K y - x is not uniform on 0 .. 1.", f"its mean is {u.mean():.3f} and its deviation {u.std():.3f}; a uniform one has 0.500 and 0.289")
    limit = 5.5 / math.sqrt(len(u))
    related = max(abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]), *(abs(np.corrcoef(u[1:, i], u[:-1, i])[0, 1]) for i in range(2)))
    if related > limit:
        raise Fail("The noise of one number depends on that of another; each number has its own.", f"a correlation of {related:.2f}, where chance gives less than {limit:.2f}")
    held = max(abs(np.corrcoef(u[:, i], inputs[f"{UNIFORM_TWO}.x"][:, i])[0, 1]) for i in range(2))
    if held > limit:
        raise Fail("The noise depends on x.", f"a correlation of {held:.2f}, where chance gives less than {limit:.2f}")


def uniform_shared(inputs, outputs):
    """A sentence if numbers share their noise, else nothing."""
    u = uniform_noise(inputs, outputs, UNIFORM_TWO)
    tol = 1e-4 if outputs[f"{UNIFORM_TWO}.y"].dtype == np.float32 else 1e-9
    again = outputs["uniform_dequantize (a second call).y"]
    repeated = again.shape == u.shape and np.abs(again - outputs[f"{UNIFORM_TWO}.y"]).max() < tol
    if np.ptp(u) < tol and repeated:
        return "Nothing is drawn: the noise is one and the same number everywhere and in every call."
    if np.ptp(u) < tol:
        return "All numbers of the batch get one and the same noise; each has its own."
    if np.ptp(u, axis=1).max() < tol:
        return "The numbers of a point share their noise; each has its own, or the cell would be a diagonal only."
    if np.ptp(u, axis=0).max() < tol:
        return "The points of the batch share their noise; each has its own."
    if repeated:
        return "A second call gives the same noise: is a seed set inside? Fresh noise in every epoch is what fills the cells."
    return ""


def uniform_contribution(inputs, outputs, reference):
    for name in DEQUANTIZED:
        x, K = inputs[f"{name}.x"], int(inputs[f"{name}.K"])
        got, want = outputs[f"{name}.contribution"], -x.shape[1] * math.log(K)
        if got.shape != x.shape[:1]:
            raise Fail(f"`contribution` has shape {got.shape} for x of shape {x.shape}; it should be (B,) = {x.shape[:1]}.")
        if not laws.close(got, want, 1e-5).all():
            raise Fail("`contribution` is not the logarithm of how much a cell shrinks when y = (x + u) / K.", f"D = {x.shape[1]}, K = {K}: {laws.expected([want], got[:1])}")


def uniform_is_a_bound(inputs, outputs, reference):
    """For p(y) = prod 3 y_i^2, whose cells have a mass in closed form: mean of exp is P(x), mean is below log P(x)."""
    uniform_cells(inputs, outputs, reference)
    x, y, contribution = inputs[f"{UNIFORM_CELL}.x"], outputs[f"{UNIFORM_CELL}.y"].astype(float), outputs[f"{UNIFORM_CELL}.contribution"]
    if contribution.shape != x.shape[:1]:
        raise Fail(f"`contribution` has shape {contribution.shape} for x of shape {x.shape}; it should be (B,) = {x.shape[:1]}.")
    K, ends = int(inputs[f"{UNIFORM_CELL}.K"]), np.stack([x[0], x[0] + 1])
    mass = np.prod(np.diff((ends / K) ** 3, axis=0))
    spread = np.diff(np.prod(3 * (ends / K) ** 2, 1))[0] / K ** x.shape[1]
    margin = spread * math.sqrt(math.log(2 / RARE) / (2 * len(x)))
    bound = np.log(3 * y**2).sum(1) + contribution
    if abs(np.exp(np.minimum(bound, 50)).mean() - mass) > margin:
        raise Fail("The mean of exp(log p(y) + contribution) is not P(x), so log p(y) + contribution estimates no log-likelihood of x.",
                   f"for p(y) = prod 3 y_i^2, x = (1, 2), K = {K}: P(x) = {mass:.4f}, the mean is {np.exp(np.minimum(bound, 50)).mean():.4f} (chance moves it by {margin:.4f} at most)")
    if bound.mean() > math.log(mass) + margin / mass:
        raise Fail("The mean of log p(y) + contribution lies above log P(x): it is no lower bound.")


UNIFORM_PLACES = (  # where a student's y may lie: the first that fits all numbers; y -> what should lie between the two limits
    ("no noise", lambda x, y, K: K * y - x, 0, 0), ("in its cell", lambda x, y, K: K * y - x, 0, 1), ("in half a cell around", lambda x, y, K: K * y - x, -0.5, 0.5),
    ("divided by K - 1", lambda x, y, K: (K - 1) * y - x, 0, 1), ("divided by K + 1", lambda x, y, K: (K + 1) * y - x, 0, 1),
    ("noise not divided", lambda x, y, K: y - x / K, 0, 1), ("not divided", lambda x, y, K: y - x, 0, 1), ("noise alone divided", lambda x, y, K: K * (y - x), 0, 1),
    ("multiplied", lambda x, y, K: y / K - x, 0, 1), ("noise taken off", lambda x, y, K: x - K * y, 0, 1), ("divided twice", lambda x, y, K: K**2 * y - x, 0, 1), ("noise alone", lambda x, y, K: K * y, 0, 1), ("noise alone, not divided", lambda x, y, K: y, 0, 1),
)


def uniform_features(inputs, outputs):
    """Words for where y lies and how it is spread, as noise is drawn in many ways; where no words fit, the numbers."""
    kind, sentence = outputs.complaint(UNIFORM_TWO) or ("", "")
    if kind == "raised" and re.search("not implemented for '(Long|Int)'", sentence):  # in torch's words for rand_like, and others for uniform_, randn_like
        return {"outputs": "noise of the type of x"}
    x, y = inputs[f"{UNIFORM_TWO}.x"], outputs[f"{UNIFORM_TWO}.y"].astype(float)
    K = int(inputs[f"{UNIFORM_TWO}.K"])
    if y.shape != x.shape:
        return compared(UNIFORM_COMPARED, outputs)
    place, width = "elsewhere", 0.0
    for name, take, low, high in UNIFORM_PLACES:
        t = take(x, y, K)
        if t.min() >= low - 1e-4 and t.max() <= high + 1e-4:
            place, width = name, t.std()
            break
    shared = uniform_shared(inputs, outputs) if place == "in its cell" else ""
    flat = abs(width - math.sqrt(1 / 12)) < 0.02 or place == "no noise" or shared.startswith("Nothing is drawn")
    found = {k: v for k, v in compared(UNIFORM_COMPARED, outputs).items() if not k.endswith(".y")}
    found |= {"place": np.asarray(place), "shared": np.asarray(shared)}
    return found if flat and place != "elsewhere" else found | {"y": y}


UNIFORM_COMPARED = tuple(f"{name}.{k}" for name in DEQUANTIZED[:3] for k in ("y", "contribution"))


def uniform_by(noise=torch.rand, place=lambda x, u, K: (x + u) / K, contribution=lambda x, K: torch.full((len(x),), -x.shape[1] * math.log(K)), end=lambda y, c: (y, c)):
    """A function `uniform_dequantize` in its plainest form, in which a mistake changes one part."""

    def uniform_dequantize(x, K):
        return end(place(x, noise(x.shape), K), contribution(x, K))

    return function(uniform_dequantize)


def uniform_seeded(shape):
    torch.manual_seed(0)
    return torch.rand(shape)


def uniform_wrong(id, kind, place, sentence, **parts):
    parts = {"place" if k == "put" else k: v for k, v in parts.items()}
    return Misconception(id, kind, place, sentence, uniform_by(**parts))


def uniform_reference(x, K):
    from flowkit.dequantization import uniform_dequantize

    return uniform_dequantize(x, K)


def uniform_picture(inputs, outputs, reference):
    """The points y of one batch over the cells of their integers, yours and the reference's."""
    figure, axes = plotting.side_by_side(2, ("yours", "reference"), size=4.4)
    K = int(inputs[f"{UNIFORM_TWO}.K"])
    for ax, y, colour in zip(axes, (outputs.arrays.get(f"{UNIFORM_TWO}.y"), reference.arrays[f"{UNIFORM_TWO}.y"]), ("blue", "black")):
        if y is None or y.shape != inputs[f"{UNIFORM_TWO}.x"].shape or not np.isfinite(y).all():
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            continue
        ax.scatter(*y.T, s=3, color=plotting.PALETTE[colour])
        ax.set_xlim(-0.1, 1.15), ax.set_ylim(-0.1, 1.15)
        ax.set_xticks(np.arange(K + 1) / K, [f"{i}/{K}" if i % 2 == 0 else "" for i in range(K + 1)]), ax.set_yticks(np.arange(K + 1) / K, [""] * (K + 1))
        ax.grid(alpha=0.4), ax.set_xlabel("y1", fontsize=plotting.FONT), ax.set_ylabel("y2", fontsize=plotting.FONT)
    return figure


UNIFORM = Exercise(
    id="uniform_dequantize", title="Uniform dequantization", minutes=8, difficulty=1,
    hints=(
        "Each integer owns a cell of width 1. Put the point anywhere in its cell, each number with noise of its own, and then shrink everything by K. `torch.rand(x.shape)` draws; x holds integers, so `rand_like(x)` does not.",
        "The mass of a cell is a density times its volume. After the shrinking a cell has the volume K^-D: take its logarithm, once for each row, (B,). The uniform noise has density 1, whose logarithm adds nothing.",
    ),
    inputs=uniform_inputs, reference=function(uniform_reference),
    cases=(
        Case("y lies in the cell of its integer: floor(K y) = x", 1, uniform_cells),
        Case("the noise is uniform, each number with its own, fresh in each call", 1, uniform_is_uniform),
        Case("contribution = -D log K, (B,)", 1.5, uniform_contribution),
        Case("in the mean exp(log p(y) + contribution) is P(x)", 1.5, uniform_is_a_bound),
    ),
    misconceptions=(
        uniform_wrong("no_noise", "missing term", "value", "`y` is x / K: there is no noise, so a density fitted to it can grow without bound at a few points.", noise=torch.zeros),
        uniform_wrong("centred", "sign", "value", "The noise lies between -1/2 and 1/2, as for rounding; here a cell reaches from x to x + 1, and x = floor(K y).", noise=lambda shape: torch.rand(shape) - 0.5),
        uniform_wrong("noise_taken_off", "sign", "value", "The noise is subtracted, so y lies in the cell before that of x.", put=lambda x, u, K: (x - u) / K),
        uniform_wrong("x_forgotten", "missing term", "value", "`y` is the noise alone, divided by K: x is missing.", put=lambda x, u, K: u / K),
        uniform_wrong("noise_alone", "missing term", "value", "`y` is the noise alone: x is missing.", put=lambda x, u, K: u),
        uniform_wrong("normal", "wrong function", "value", "The noise is normal (randn), which has no bounds: y leaves its cell.", noise=torch.randn),
        uniform_wrong("two_uniforms", "wrong function", "value", "The noise is the mean of two uniform numbers: it lies in the cell, but prefers its middle.", noise=lambda shape: (torch.rand(shape) + torch.rand(shape)) / 2),
        uniform_wrong("narrow", "constant", "value", "The noise fills only a K-th of its cell: it is divided by K twice.", put=lambda x, u, K: (x + u / K) / K),
        uniform_wrong("noise_per_row", "wrong axis", "value", "The numbers of a point share their noise, so only the diagonal of each cell is filled; each number has its own.", noise=lambda shape: torch.rand(shape[0], 1).expand(shape)),
        uniform_wrong("noise_per_column", "wrong axis", "value", "The points of the batch share their noise; each point has its own.", noise=lambda shape: torch.rand(shape[1:]).expand(shape)),
        uniform_wrong("one_noise", "wrong axis", "value", "One number is drawn for the whole batch; each number of each point has its own noise.", noise=lambda shape: torch.rand(()).expand(shape)),
        uniform_wrong("constant", "missing function", "value", "Nothing is drawn: the noise is one and the same number everywhere and in every call, so the data are as discrete as before.", noise=lambda shape: torch.full(shape, 0.5)),
        uniform_wrong("integer_noise", "type", "value", "x holds integers, so noise of the same type cannot be drawn, as `rand_like(x)` tries: draw floating-point numbers of x's shape.", put=lambda x, u, K: (x + torch.rand_like(x)) / K),
        uniform_wrong("seeded", "state", "value", "A second call gives the same noise: is a seed set inside? Fresh noise in every epoch is what fills the cells.", noise=uniform_seeded),
        uniform_wrong("not_divided", "missing function", "value", "`y` is x + u: it is not divided by K, though `contribution` counts the division.", put=lambda x, u, K: x + u),
        uniform_wrong("not_divided_zero", "missing function", "value", "`y` is x + u, and `contribution` zero: for a density on [0, K]^D that fits, but y is asked for on [0, 1]^D.", put=lambda x, u, K: x + u, contribution=lambda x, K: torch.zeros(len(x))),
        uniform_wrong("noise_not_divided", "order", "value", "x is divided by K, and the noise added afterwards in its full width; both are divided.", put=lambda x, u, K: x / K + u),
        uniform_wrong("noise_alone_divided", "order", "value", "Only the noise is divided by K (a pair of brackets is missing); x + u is divided as a whole.", put=lambda x, u, K: x + u / K),
        uniform_wrong("divided_by_less", "off by one", "value", "x + u is divided by K - 1, so that the last cell lies beyond 1; there are K cells.", put=lambda x, u, K: (x + u) / (K - 1)),
        uniform_wrong("divided_by_less_twice", "off by one", "value", "K - 1 stands for K, in y and in `contribution`: the last cell lies beyond 1; there are K cells.", put=lambda x, u, K: (x + u) / (K - 1), contribution=lambda x, K: torch.full((len(x),), -x.shape[1] * math.log(K - 1))),
        uniform_wrong("divided_by_more", "off by one", "value", "x + u is divided by K + 1; there are K cells.", put=lambda x, u, K: (x + u) / (K + 1)),
        uniform_wrong("divided_twice", "extra term", "value", "x + u is divided by K twice; once brings it to [0, 1].", put=lambda x, u, K: (x + u) / K / K),
        uniform_wrong("multiplied", "wrong function", "value", "x + u is multiplied by K; it is divided by it, to lie on [0, 1].", put=lambda x, u, K: (x + u) * K),
        uniform_wrong("contribution_sign", "sign", "ldj", "`contribution` has the wrong sign: shrinking by K raises the density by K^D, and the mass of a cell is that density times K^-D.", contribution=lambda x, K: torch.full((len(x),), x.shape[1] * math.log(K))),
        uniform_wrong("contribution_zero", "missing term", "ldj", "`contribution` is zero; y = (x + u) / K shrinks the cells, and that is what it should count.", contribution=lambda x, K: torch.zeros(len(x))),
        uniform_wrong("contribution_no_dims", "missing term", "ldj", "`contribution` counts one dimension: the factor D is missing.", contribution=lambda x, K: torch.full((len(x),), -math.log(K))),
        uniform_wrong("contribution_no_log", "missing function", "ldj", "`contribution` has K itself where its logarithm belongs.", contribution=lambda x, K: torch.full((len(x),), -float(x.shape[1] * K))),
        uniform_wrong("contribution_no_K", "missing term", "ldj", "`contribution` is the number of dimensions: log K is missing.", contribution=lambda x, K: torch.full((len(x),), -float(x.shape[1]))),
        uniform_wrong("contribution_mass", "missing function", "ldj", "`contribution` is the volume of the cell, K^-D; its logarithm is asked for.", contribution=lambda x, K: torch.full((len(x),), float(K) ** -x.shape[1])),
        uniform_wrong("contribution_bits", "constant", "ldj", "`contribution` is in bits (log2); all is in nats here.", contribution=lambda x, K: torch.full((len(x),), -x.shape[1] * math.log2(K))),
        uniform_wrong("contribution_power", "wrong function", "ldj", "`contribution` is D over log K; the logarithm of K^D is their product.", contribution=lambda x, K: torch.full((len(x),), -x.shape[1] / math.log(K))),
        uniform_wrong("contribution_turned", "exchanged", "ldj", "D and K have changed places in `contribution`: it is K log D; the volume of a cell is K^-D.", contribution=lambda x, K: torch.full((len(x),), -K * math.log(x.shape[1]))),
        uniform_wrong("contribution_added", "wrong function", "ldj", "`contribution` adds D and log K; the logarithm of K^D is their product.", contribution=lambda x, K: torch.full((len(x),), -x.shape[1] + math.log(K))),
        uniform_wrong("contribution_less", "off by one", "ldj", "`contribution` counts K - 1 cells; the states 0 .. K - 1 are K in number.", contribution=lambda x, K: torch.full((len(x),), -x.shape[1] * math.log(K - 1))),
        uniform_wrong("contribution_batch", "exchanged", "ldj", "`contribution` counts the rows of the batch as dimensions; D is the number of numbers in a point.", contribution=lambda x, K: torch.full((len(x),), -len(x) * math.log(K))),
        uniform_wrong("contribution_all", "reduction", "ldj", "`contribution` adds up the whole batch; every row has its own D dimensions.", contribution=lambda x, K: torch.full((len(x),), -x.numel() * math.log(K))),
        uniform_wrong("contribution_shape", "shape", "ldj", "`contribution` still has one number for each dimension: the sum over the dimensions is missing.", contribution=lambda x, K: torch.full(x.shape, -math.log(K))),
        uniform_wrong("contribution_kept", "shape", "ldj", "`contribution` has shape (B, 1); it is (B,).", contribution=lambda x, K: torch.full((len(x), 1), -x.shape[1] * math.log(K))),
        uniform_wrong("contribution_one", "shape", "ldj", "`contribution` is one number for the whole batch; every row has its own, (B,).", contribution=lambda x, K: torch.tensor(-x.shape[1] * math.log(K))),
        uniform_wrong("contribution_sum", "reduction", "ldj", "`contribution` is the sum over the whole batch, one number; every row has its own, (B,).", contribution=lambda x, K: torch.tensor(-x.numel() * math.log(K))),
        uniform_wrong("contribution_columns", "exchanged", "ldj", "`contribution` has a number for each column of x; every row has its own, (B,).", contribution=lambda x, K: torch.full(x.shape[1:], -x.shape[1] * math.log(K))),
        uniform_wrong("contribution_number", "type", "ldj", "`contribution` is a Python number; a tensor is asked for, one number for each row.", contribution=lambda x, K: -x.shape[1] * math.log(K)),
        uniform_wrong("exchanged", "exchanged", "value", "`contribution` is returned first and `y` second; the order is (y, contribution).", end=lambda y, c: (c, y)),
        uniform_wrong("only_y", "missing term", "value", "Only `y` is returned; `contribution` belongs to it: (y, contribution).", end=lambda y, c: y),
    ),
    features=uniform_features, compare=UNIFORM_COMPARED, picture=uniform_picture,
)


# --- variational_bound -----------------------------------------------------------------------------------------------

BOUND_LEVELS = 4
BOUND_NODES, BOUND_WEIGHTS = (lambda t, w: ((t + 1) / 2, w / 2))(*np.polynomial.legendre.leggauss(16))     # for integrals over a cell, to 1e-9
BOUND_GAP = 0.15        # nats that uniform noise costs at least, so that there is something to learn
BOUND_NORMAL = 64       # points for the integral over the trained q


def bound_inputs(rng):
    K, D = BOUND_LEVELS, 2
    inputs = {}
    while not inputs or bound_of_uniform(inputs) > np.log(bound_mass(inputs, np.arange(K))).mean() - BOUND_GAP:
        inputs = {"density.weights": rng.dirichlet(3 * np.ones(3)), "density.means": rng.uniform(0.2, K - 0.2, 3), "density.scales": rng.uniform(0.35, 0.7, 3)}
    points = {"x": rng.integers(0, K, (B, D)), "u": rng.random((B, D)), "log_q": rng.standard_normal(B), "c": rng.standard_normal(B)}
    points["log_q"][0] = -8.0     # one draw of the bound that lies above 0
    ideal = {"x": rng.integers(0, K, (B, D)), "u": rng.random((B, D))}
    ideal["log_q"] = (bound_density(inputs, ideal["x"] + ideal["u"]) - np.log(bound_mass(inputs, ideal["x"]))).sum(1)
    cells = {"x": np.repeat(np.arange(K), len(BOUND_NODES))[:, None], "u": np.tile(BOUND_NODES, K)[:, None], "log_q": np.zeros(K * len(BOUND_NODES))}
    # Normal points at the middles of 16 equal shares, for each integer: training without chance. By their name ("grid") only the answer trains.
    shares = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(16.0) + 0.5) / 16).numpy().astype(float)
    train = {"x grid": np.repeat(np.arange(K), 16)[:, None], "eps grid": np.tile(shares, K)[:, None], "K": np.array(K), "rate": np.array(0.1), "steps": np.array(40)}
    for name, group in (("points", points), ("ideal", ideal), ("cells", cells), ("train", train)):
        inputs |= {f"{name}.{k}": v for k, v in group.items()}
    return inputs


def bound_density(inputs, y):
    """log p of each number of y."""
    w, m, s = (inputs[f"density.{k}"] for k in ("weights", "means", "scales"))
    t = (y[..., None] - m) / s
    return np.log((w * np.exp(-0.5 * t**2) / (s * math.sqrt(2 * math.pi))).sum(-1))


def bound_mass(inputs, x):
    """P of each integer: the mass of its cell."""
    w, m, s = (inputs[f"density.{k}"] for k in ("weights", "means", "scales"))
    cdf = np.vectorize(lambda t: 0.5 * (1 + math.erf(t / math.sqrt(2))))
    return (w * (cdf((x[..., None] + 1 - m) / s) - cdf((x[..., None] - m) / s))).sum(-1)


def bound_own(inputs, outputs, name):
    got, want = outputs[f"{name}.bound"], inputs[f"{name}.log_q"].shape
    if got.shape != want:
        raise Fail(f"The result has shape {got.shape} for a batch of {want[0]}; it should be (B,) = {want}.")
    return got


def bound_value(inputs, outputs, reference):
    for name in ("points", "ideal"):
        x, u, log_q = (inputs[f"{name}.{k}"] for k in ("x", "u", "log_q"))
        if int(outputs[f"{name}.asked"]) > 1:
            raise Fail(f"q is asked {int(outputs[f'{name}.asked'])} times; it draws, so u and log_q must come from one and the same call.")
        laws.expect("variational_bound", x, bound_own(inputs, outputs, name), bound_density(inputs, x + u).sum(1) - log_q)


def bound_jensen(inputs, outputs, reference):
    """Uniform noise, integrated over the cell: no chance."""
    got = bound_own(inputs, outputs, "cells").astype(float).reshape(BOUND_LEVELS, -1)
    mass = bound_mass(inputs, np.arange(BOUND_LEVELS))
    for x in range(BOUND_LEVELS):
        mean, whole = got[x] @ BOUND_WEIGHTS, np.exp(np.minimum(got[x], 50)) @ BOUND_WEIGHTS
        if abs(whole - mass[x]) > 1e-4 * mass[x]:
            raise Fail("For a uniform q the mean of exp of your bound is not P(x).", f"x = {x}: P(x) = {mass[x]:.4f}, the mean is {whole:.4f}")
        if mean > math.log(mass[x]) + 1e-4:
            raise Fail("For a uniform q the mean of your bound lies above log P(x): it is no bound.", f"x = {x}: log P(x) = {math.log(mass[x]):.4f}, the mean is {mean:.4f}")


def bound_tight(inputs, outputs, reference):
    x, got = inputs["ideal.x"], bound_own(inputs, outputs, "ideal")
    laws.expect("variational_bound", x, got, np.log(bound_mass(inputs, x)).sum(1), max(1e-6, laws.tolerance(got) / 10), ": for the ideal q(u | x) = p(x + u) / P(x) each draw gives log P(x) itself")


def bound_gradient(inputs, outputs, reference):
    """By u it is the slope of log p, by log_q it is -1, each times the weight of its row."""
    bound_own(inputs, outputs, "points")
    y, c = inputs["points.x"] + inputs["points.u"], inputs["points.c"]
    slope = sum(w * bound_density(inputs, y + t) for w, t in zip(laws.WEIGHTS, laws.STEP * laws.OFFSETS)) / laws.STEP
    for name, want in (("u", c[:, None] * slope), ("log_q", -c)):
        got = outputs[f"gradient.{name}"]
        if not laws.close(got, want, 1e-3).all():
            how = "Not the right gradient" if got.any() else "No gradient"
            raise Fail(f"{how} reaches `{name}`, so q could not be trained through the bound.")


def bound_means(inputs, weights):
    """The bound of a q of these weights, and that of uniform noise, both means over the integers, by quadrature."""
    a, log_b = weights.astype(float)
    t, w = np.polynomial.hermite_e.hermegauss(BOUND_NORMAL)
    v = a[:, None] + np.exp(log_b)[:, None] * t
    u = 1 / (1 + np.exp(-np.clip(v, -500, 500)))
    log_q = -0.5 * t**2 - 0.5 * math.log(2 * math.pi) - log_b[:, None] + np.logaddexp(0, v) + np.logaddexp(0, -v)
    x = np.arange(BOUND_LEVELS)[:, None]
    learnt = ((bound_density(inputs, x + u) - log_q) @ (w / w.sum())).mean()
    return learnt, bound_of_uniform(inputs)


def bound_of_uniform(inputs):
    return (bound_density(inputs, np.arange(BOUND_LEVELS)[:, None] + BOUND_NODES) @ BOUND_WEIGHTS).mean()


def bound_trained(inputs, outputs, reference):
    weights = outputs["training.weights of q"]
    learnt, uniform = bound_means(inputs, weights)
    most = np.log(bound_mass(inputs, np.arange(BOUND_LEVELS))).mean()
    if not learnt >= uniform:
        raise Fail("A q trained by your bound gives a worse bound than uniform noise.", f"after {int(inputs['train.steps'])} steps {learnt:.3f} nats, uniform noise {uniform:.3f}, log P(x) {most:.3f}")


def bound_by(ask=lambda q, x: q(x), point=lambda x, u: x + u, log_p=lambda log_prob: log_prob, end=lambda log_p, log_q: log_p - log_q):
    """A function `variational_bound` in its plainest form, in which a mistake changes one part."""

    def variational_bound(x, q, log_prob):
        u, log_q = ask(q, x)
        return end(log_p(log_prob)(point(x, u)), log_q)

    return function(variational_bound)


def bound_asked_twice(q, x):
    return q(x)[0], q(x)[1]


def bound_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, bound_by(**parts))


BOUND_COMPARED = ("points.bound", "cells.bound", "ideal.bound", "gradient.u", "gradient.log_q")


def bound_features(inputs, outputs):
    """The arrays, and where no gradient reaches u alone, how log_prob was asked; or a word for one of two faults.

    Where u and log_q have met in each other's place their sizes tell it, whatever is done to them afterwards; where x + u was divided, the
    point that log_prob was asked about does, whatever the number.
    """
    found = compared(BOUND_COMPARED, outputs)
    y, point = inputs["points.x"] + inputs["points.u"], outputs.arrays.get("points.point", np.zeros(0))
    if point.shape == y.shape and (factor := (point / y).mean()) < 0.99 and np.abs(point - factor * y).max() < 1e-6 and factor > 0:
        return {"points.bound": np.asarray("x + u divided")}
    by_u, by_log_q = (outputs.arrays.get(f"gradient.{k}", np.zeros(0)) for k in ("u", "log_q"))
    if by_log_q.any() and not by_u.any():
        found["log_prob"] = outputs.arrays["gradient.log_prob"]
    kind, sentence = outputs.complaint("points") or ("", "")
    met = kind == "raised" and re.search(rf"tensor a \(({B}|2)\) must match the size of tensor b \(({B}|2)\)", sentence)
    return {"points.bound": np.asarray("u for log_q")} if met or found["points.bound"].shape == (B, 2) else found


BOUND = Exercise(
    id="variational_bound", title="The variational bound", minutes=10, difficulty=3,
    hints=(
        "Ask q once: it gives the noise u for each number and log q(u | x) for each row. The density lives on [0, K]^D, so the point to ask it about is x with its noise, and nothing is divided by K.",
        "Jensen's inequality: log of the integral of p(x + u) = log E_q[p(x + u) / q(u | x)], which is at least the mean of the logarithm. One draw of that logarithm is asked for, (B,), with the gradients of both parts alive.",
    ),
    inputs=bound_inputs, reference=flowkit_class("dequantization", "variational_bound"),
    cases=(
        Case("log p(x + u) - log q(u | x) for one draw of q, (B,)", 2, bound_value),
        Case("uniform q: at most log P(x) in the mean, and exp of it P(x) in the mean", 1, bound_jensen),
        Case("the ideal q makes it tight", 1, bound_tight),
        Case("gradients reach u and log_q", 1, bound_gradient),
        Case("training q by it gives at least the uniform bound", 1, bound_trained),
    ),
    misconceptions=(
        bound_wrong("log_q_sign", "sign", "value", "log q(u | x) is added; it is subtracted, since the noise's own surprise must not count for the data.", end=lambda p, q: p + q),
        bound_wrong("no_log_q", "missing term", "value", "log q(u | x) is missing: that is right for uniform noise only.", end=lambda p, q: p),
        bound_wrong("no_log_p", "missing term", "value", "log p(x + u) is missing: only -log q(u | x) is returned.", end=lambda p, q: -q),
        bound_wrong("log_q_alone", "missing term", "value", "What is returned is log q(u | x) alone.", end=lambda p, q: q),
        bound_wrong("loss", "sign", "value", "The sign is turned: log q - log p is the loss to be minimised; the bound itself is asked for.", end=lambda p, q: q - p),
        bound_wrong("loss_sum", "sign", "value", "Both logarithms have a minus sign; log p counts with a plus.", end=lambda p, q: -p - q),
        bound_wrong("ratio", "wrong function", "value", "The two logarithms are divided; the logarithm of a ratio is a difference.", end=lambda p, q: p / q),
        bound_wrong("product", "wrong function", "value", "The two logarithms are multiplied; the logarithm of a ratio is a difference.", end=lambda p, q: p * q),
        bound_wrong("exp", "missing function", "value", "What is returned is the ratio p / q itself, whose mean is P(x); its logarithm is asked for.", end=lambda p, q: (p - q).exp()),
        bound_wrong("exp_log_q", "wrong function", "value", "q itself is subtracted, not its logarithm: `log_q` is a logarithm already.", end=lambda p, q: p - q.exp()),
        bound_wrong("log_log_q", "extra term", "value", "A logarithm is taken of `log_q`, which is one already.", end=lambda p, q: p - q.abs().log()),
        bound_wrong("no_x", "missing term", "value", "The density is asked about u alone; the point is x + u.", point=lambda x, u: u),
        bound_wrong("no_u", "missing term", "value", "The density is asked about x without its noise; the point is x + u.", point=lambda x, u: x + 0 * u),
        bound_wrong("u_taken_off", "sign", "value", "The noise is subtracted from x; the cell of x reaches from x to x + 1.", point=lambda x, u: x - u),
        bound_wrong("x_taken_off", "sign", "value", "x is subtracted from the noise; the point is x + u.", point=lambda x, u: u - x),
        bound_wrong("u_multiplied", "wrong function", "value", "x is multiplied by its noise; the point is x + u.", point=lambda x, u: x * u),
        bound_wrong("x_divided", "wrong function", "value", "x is divided by its noise; the point is x + u.", point=lambda x, u: x / u),
        bound_wrong("centred", "extra term", "value", "1/2 is taken off the noise, as for rounding; here the cell of x reaches from x to x + 1.", point=lambda x, u: x + u - 0.5),
        bound_wrong("squashed", "extra term", "value", "The noise passes a sigmoid; here u lies between 0 and 1 already, and log_q is that of u itself.", point=lambda x, u: x + torch.sigmoid(u)),
        bound_wrong("sigmoid_of_point", "extra term", "value", "x + u passes a sigmoid; the density lives on [0, K]^D.", point=lambda x, u: torch.sigmoid(x + u)),
        bound_wrong("divided", "extra term", "value", "x + u is divided by a number of levels; the density lives on [0, K]^D, so nothing is divided.", point=lambda x, u: (x + u) / 4),
        bound_wrong("exchanged", "exchanged", "value", "u and log_q are taken from q in the wrong order: q(x) gives (u, log_q).", ask=lambda q, x: q(x)[::-1]),
        bound_wrong("asked_twice", "state", "value", "q is asked twice, once for u and once for log_q; it draws anew each time, so log_q belongs to another u.", ask=bound_asked_twice),
        bound_wrong("mean", "reduction", "value", "The mean over the batch is returned; every row has its own bound, (B,).", end=lambda p, q: (p - q).mean()),
        bound_wrong("sum", "reduction", "value", "The sum over the batch is returned; every row has its own bound, (B,).", end=lambda p, q: (p - q).sum()),
        bound_wrong("mean_loss", "reduction", "value", "The mean over the batch is returned, with a minus sign: that is the loss; every row has its own bound, (B,).", end=lambda p, q: -(p - q).mean()),
        bound_wrong("log_q_mean", "reduction", "value", "The mean of log_q over the batch is subtracted; every row has its own.", end=lambda p, q: p - q.mean()),
        bound_wrong("log_q_sum", "reduction", "value", "The sum of log_q over the batch is subtracted; every row has its own.", end=lambda p, q: p - q.sum()),
        bound_wrong("log_mean_exp", "order", "value", "The mean of exp is taken over the batch before the logarithm; rows are different data, and each has its own bound.", end=lambda p, q: torch.logsumexp(p - q, 0) - math.log(len(p))),
        bound_wrong("kept", "shape", "value", "The result has shape (B, 1); it is (B,).", end=lambda p, q: (p - q)[:, None]),
        bound_wrong("all_pairs", "shape", "value", "The result is a matrix (B, B): a column met a row. Both logarithms are (B,) already.", end=lambda p, q: p[:, None] - q),
        bound_wrong("clamped", "extra term", "value", "The result is clamped to be at most 0; one draw may well lie above, only its mean is bounded.", end=lambda p, q: (p - q).clamp(max=0)),
        bound_wrong("detached", "detached", "gradient", "The result is cut off from the computation graph, so q cannot be trained through it.", end=lambda p, q: (p - q).detach()),
        bound_wrong("u_detached", "detached", "gradient", "u is cut off from the computation graph: q learns from log_q alone, and never where the density is high.", point=lambda x, u: x + u.detach()),
        bound_wrong("log_p_no_grad", "detached", "gradient", "log_prob is asked under no_grad, so no gradient passes through the density to u: q learns from log_q alone, and never where the density is high.", log_p=torch.no_grad()),
        bound_wrong("log_p_detached", "detached", "gradient", "log p(x + u) is cut off from the computation graph: q learns from log_q alone, and never where the density is high.", end=lambda p, q: p.detach() - q),
        bound_wrong("log_q_detached", "detached", "gradient", "log_q is cut off from the computation graph: q learns to go where the density is high, and nothing tells it to stay spread out.", end=lambda p, q: p - q.detach()),
    ),
    features=bound_features, compare=BOUND_COMPARED,
    picture=pictures.agreement(("points.bound", "cells.bound", "ideal.bound"), "one draw of the bound"),
)


# =====================================================================================================================
# Layers that draw one way: slice_layer, split_layer, abs_layer, max_layer, sort_layer, argmax_layer, stochastic_layer
# =====================================================================================================================

LOG_2PI = math.log(2 * math.pi)
SURVAE_CUTS = {"D=2 ": (1, 1), "D=6 ": (4, 2)}  # how many coordinates are kept, and how many are drawn: not halves
SURVAE_OFF = 0.03
"""How far a share may be off. Hoeffding: 10,000 draws miss it with probability 2 exp(-2 * 10,000 * 0.03^2) = 3e-8, so 2.5e-7 for eight shares."""
SURVAE_ROLLS = 4  # calls of a proposal, any of which an answer may use


def survae_x(rng, x, prefix=""):
    """x once more, as what gradients reach, and a direction to nudge it along."""
    return {f"{prefix}net.x": x, f"{prefix}direction.x": rng.standard_normal(x.shape)}


def survae_tanh(w, prefix, x):
    """The probe's net."""
    return np.tanh(x @ w[f"{prefix}net.W1"] + w[f"{prefix}net.b1"]) @ w[f"{prefix}net.W2"] + w[f"{prefix}net.b2"]


def survae_moments(w, prefix, x):
    """What the probe makes of its net's output: loc and scale (N, d)."""
    loc, s = np.split(survae_tanh(w, prefix, x), 2, -1)
    return loc, np.exp(0.5 * s)


def survae_normal(x, loc, scale):
    """log N(x; loc, scale^2), summed over the last dimension."""
    return (-0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI).sum(-1)


def survae_log_sigmoid(t):
    return -np.logaddexp(0, -t)


def survae_paid(inputs, outputs, key, x, want, why=""):
    laws.expect("contribution", x, outputs[key], want, 1e-3 if outputs[key].dtype == np.float32 else 1e-7, why)


def survae_drawn(name, x, got, loc, scale, noise, before=None, why=""):
    """What was drawn is loc + scale * noise for the noise of one of the first calls, and `before` stands before it."""
    wants = [loc + scale * np.roll(noise, -k, 0)[:len(x)] for k in range(SURVAE_ROLLS)]
    wants = wants if before is None else [np.concatenate([before, w], -1) for w in wants]
    if any(got.shape == w.shape and laws.close(got, w, max(laws.tolerance(got), 1e-6)).all() for w in wants):
        return
    laws.expect(name, x, got, wants[0], why=why)


def survae_kept(inputs, outputs, prefix="", names=("x", "z"), rows=True):
    """The caller's tensors are as they were, and one row alone gives what it gives in the batch."""
    for name, way in (("x", "forward"), ("z", "inverse")):
        if name in names and not np.array_equal(outputs[f"{prefix}{name} after"], inputs[prefix + name]):
            raise Fail(f"{way} changed its input `{name}` in place: the caller's tensor was overwritten.")
    if rows:
        for name in ("z", "contribution"):
            whole, one = outputs[f"{prefix}forward.{name}"], outputs[f"{prefix}forward of one row.{name}"]
            if not whole.size or not whole.ndim or one.shape != (1, *whole.shape[1:]):
                raise Fail(f"`{name}` from forward has shape {one.shape} for a batch of one row, and {whole.shape} for {B} rows.")
            if not laws.close(one[0], whole[0], laws.tolerance(whole)).all():
                raise Fail(f"The rows of a batch influence each other: `{name}` of the first row is another one when it comes alone.")
        whole, one = outputs[f"{prefix}inverse.x"], outputs[f"{prefix}inverse of one row.x"]
        if one.shape != (1, *whole.shape[1:]):
            raise Fail(f"`x` from inverse has shape {one.shape} for a batch of one row, and {whole.shape} for {B} rows.")


def survae_back(inputs, outputs, prefix, given, key, words):
    """What goes there and back is what it was."""
    want, got = inputs[prefix + given], outputs[prefix + key]
    if got.shape != want.shape:
        raise Fail(f"{words} has shape {got.shape}; it should be {want.shape}.")
    off = ~laws.close(got, want, 1e-5).reshape(len(want), -1).all(1)  # an answer in float32 is right to 1e-7
    if off.any():
        i = laws.first_bad(want, off)
        raise Fail(f"{words} does not give {given} back.", f"{given} = {laws.point(want[i])} comes back as {laws.point(got[i])}")


def survae_stored(key, given, what, prefixes=SIZES):
    """Faults: forward and then inverse give x itself, which inverse cannot know from z."""

    def faults(inputs, outputs):
        for prefix in prefixes:
            got, x = outputs.arrays.get(prefix + key), inputs[prefix + given]
            if got is None or got.shape != x.shape or not laws.close(got, x, 1e-5).all():
                return []
        return [("forward_remembered", "state", "inverse", f"forward stores {what} in self, and inverse puts it back. inverse must draw: when one samples, forward need not have run.")]

    return faults


def survae_spaced(rng, D):
    """Rows whose coordinates stand apart, in any order: nudging x does not change which is which."""
    x = np.cumsum(0.3 + rng.exponential(0.4, (B, D)), 1)
    return rng.permuted(x - x.mean(1, keepdims=True) + rng.standard_normal((B, 1)), axis=1)


def survae_line(rng, ideal, rough):
    """Three x on the line, each with the nodes of a Gauss-Hermite rule for the noise: expectations over q without chance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x = np.array([-1.0, 0.3, 1.2]) + rng.uniform(-0.2, 0.2, 3)
    return {"line x": np.repeat(x, len(nodes))[:, None], "line noise": np.tile(nodes, 3)[:, None], "line weights": weights / weights.sum(),
            "ideal q": np.array(ideal), "rough q": np.array(rough)}


def survae_bound(what, log_base, log_x):
    """log p(z) + contribution is log p(x) for the ideal `what`; for another it is less in the mean, and the mean of its exp is p(x)."""

    def judge(inputs, outputs, reference):
        x, weights = inputs["line x"], inputs["line weights"]
        truth = log_x(inputs, x[:: len(weights), 0])
        values = {}
        for name in ("ideal", "rough"):
            step = f"forward with the {name} {what}"
            z, paid = outputs[f"{step}.z"], outputs[f"{step}.contribution"]
            if z.ndim != 2 or len(z) != len(x) or paid.shape != (len(x),):
                raise Fail(f"For {len(x)} points on the line `z` has shape {z.shape} and `contribution` {paid.shape}; they should be ({len(x)}, ...) and ({len(x)},).")
            value = log_base(inputs, z.astype(float)) + paid
            values[name] = value.reshape(3, -1), 1e-3 if np.float32 in (z.dtype, paid.dtype) else 1e-6
        value, tol = values["rough"]
        with np.errstate(divide="ignore"):
            mean, total = value @ weights, np.log(np.exp(np.minimum(value, 50)) @ weights)
        i = (mean - truth).argmax()
        if mean[i] > truth[i] + tol:
            raise Fail(f"log p(z) + contribution is no lower bound: its mean over the draws lies above log p(x) for some {what}.", f"x = {x[i * len(weights), 0]:.3g}, another than the ideal {what}: log p(x) = {truth[i]:.4g}, the mean is {mean[i]:.4g}")
        i = np.abs(total - truth).argmax()
        if np.abs(total - truth)[i] > tol:
            raise Fail("The mean of exp(log p(z) + contribution) over the draws is not p(x).", f"x = {x[i * len(weights), 0]:.3g}: p(x) = {math.exp(truth[i]):.4g}, the mean is {math.exp(min(total[i], 50)):.4g}")
        value, tol = values["ideal"]
        if np.abs(value - truth[:, None]).max() > tol:
            raise Fail(f"With the ideal {what}, the exact posterior, log p(z) + contribution should be log p(x) at every draw; yours is not.")

    return judge


SURVAE_PAID = {
    # how a right contribution goes wrong, whatever the layer: name -> (kind, sentence, function)
    "paid_sign": ("sign", "`contribution` has the wrong sign.", lambda right: -right),
    "paid_zero": ("missing term", "`contribution` is zero everywhere: what is drawn has to be paid for.", lambda right: 0 * right),
    "paid_exp": ("missing function", "`contribution` is a density or a probability itself; it is its logarithm that is added.", lambda right: right.exp()),
    "paid_keepdim": ("shape", "`contribution` has shape (B, 1); it should be (B,).", lambda right: right[:, None]),
    "paid_batch_sum": ("reduction", "`contribution` adds up the whole batch; every row needs its own number, shape (B,).", lambda right: right.sum()),
    "paid_batch_mean": ("reduction", "`contribution` is averaged over the batch; every row needs its own number, shape (B,).", lambda right: right.mean()),
}


def survae_paid_mistakes(base, *names, **sentences):
    """The misconceptions of these names for a layer whose method `paid` returns (B,); `sentences` replace the common ones."""

    def method(apply):
        return lambda self, *args: apply(base.paid(self, *args))

    return tuple(deviating(base)(n, SURVAE_PAID[n][0], "ldj", sentences.get(n, SURVAE_PAID[n][1]), paid=method(SURVAE_PAID[n][2])) for n in names)


def survae_light(*left_out):
    """What slips are run on: the inputs without those for laws that nothing is compared in."""
    return lambda inputs: {k: v for k, v in inputs.items() if not k.endswith(left_out)}


def survae_exchanged(base):
    return deviating(base)("returns_exchanged", "exchanged", "forward", "forward returns `contribution` first and `z` second; the order is (z, contribution).",
                           forward=lambda self, x: base.forward(self, x)[::-1])


def survae_sized(*keys):
    return tuple(p + k for p in SIZES for k in keys)


def survae_picture(log_density, name="density of x", steps=("forward on the grid",)):
    """exp(log p(z) + contribution) over the plane: yours, the reference's, and the difference."""

    def density(inputs, outputs):
        step = next((s for s in steps if f"{s}.z" in outputs), None)
        if step is None or f"{step}.contribution" not in outputs:
            return None
        z, paid = outputs.arrays[f"{step}.z"], outputs.arrays[f"{step}.contribution"]
        if z.ndim != 2 or len(z) != pictures.CELLS**2 or paid.size != len(z):
            return None
        with np.errstate(all="ignore"):
            logs = log_density(inputs, z) + paid.reshape(-1)
        return np.exp(np.minimum(np.where(np.isfinite(logs), logs, -np.inf), 5)).reshape(pictures.CELLS, -1) if logs.size == pictures.CELLS**2 else None

    def draw(inputs, outputs, reference):
        figure, axes = plotting.side_by_side(3, ["yours", "reference", "difference"], size=3.4)
        mine, theirs = density(inputs, outputs), density(inputs, reference)
        view = {"extent": (-pictures.LIMIT, pictures.LIMIT) * 2, "origin": "lower"}
        top = theirs.max()
        for ax, values, colours in ((axes[0], mine, ("cividis", 0)), (axes[1], theirs, ("cividis", 0)), (axes[2], None if mine is None else mine - theirs, ("PuOr", -top))):
            if values is None:
                pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            else:
                ax.imshow(values, cmap=colours[0], vmin=colours[1], vmax=top, **view)
                ax.set_xticks([]), ax.set_yticks([])
        axes[0].set_ylabel(name, fontsize=plotting.FONT)
        return figure

    return draw


def survae_bound_picture(what, log_base, log_x):
    """log p(z) + contribution of every draw around log p(x), for the ideal and for a rough proposal."""

    def draw(inputs, outputs, reference):
        figure, axes = plotting.side_by_side(2, [f"{name} {what}" for name in ("ideal", "rough")], size=3.8)
        x, line = inputs["line x"][:, 0], np.linspace(-2, 2, 81)
        likely = np.tile(inputs["line weights"], 3) > 1e-3
        for ax, name in zip(axes, ("ideal", "rough")):
            ax.plot(line, log_x(inputs, line), color=plotting.PALETTE["black"], label="log p(x)")
            z, paid = (outputs.arrays.get(f"forward with the {name} {what}.{k}") for k in ("z", "contribution"))
            if z is None or paid is None or z.ndim != 2 or len(z) != len(x) or paid.shape != x.shape:
                ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
            else:
                value = log_base(inputs, z.astype(float)) + paid
                shown = likely & np.isfinite(value)
                ax.plot(x[shown], value[shown], ".", color=plotting.PALETTE["blue"], label="log p(z) + contribution, draws")
                mean = np.where(np.isfinite(value), value, 0).reshape(3, -1) @ inputs["line weights"]
                ax.plot(x[:: len(x) // 3], mean, "_", color=plotting.PALETTE["red"], markersize=18, label="their mean")
            ax.set_xlabel("x", fontsize=plotting.FONT)
            ax.set_ylim(-8, 2.5)  # room for the legend above the curve; the unlikeliest draws lie below
            ax.legend(fontsize=plotting.FONT - 4, frameon=False, loc="upper center")
        return figure

    return draw


# --- slice_layer -----------------------------------------------------------------------------------------------------

def slice_inputs(rng):
    inputs = {}
    for prefix, (keep, rest) in SURVAE_CUTS.items():
        inputs |= {f"{prefix}x": 1.5 * rng.standard_normal((B, keep)), f"{prefix}z": 1.5 * rng.standard_normal((B, keep + rest)),
                   f"{prefix}noise": rng.standard_normal((B, rest))} | net_inputs(rng, keep, 2 * rest, prefix) | loss_inputs(rng, keep + rest, prefix)
        inputs |= survae_x(rng, inputs[f"{prefix}x"], prefix)
    rho = rng.uniform(0.5, 0.7)
    s = math.sqrt(1 - rho**2)
    return inputs | {"rho": np.array(rho)} | survae_line(rng, (rho, 0.0, s), (rho - 0.4, 0.4, 1.2 * s))


def slice_base(inputs, z):
    """The base of the case on the line: two normal coordinates of correlation rho."""
    rho = float(inputs["rho"])
    if z.shape[1] != 2:
        raise Fail(f"`z` has shape {z.shape} for x of shape {(len(z), 1)}; one coordinate is appended.")
    return survae_normal(z[:, :1], 0, 1.0) + survae_normal(z[:, 1:], rho * z[:, :1], math.sqrt(1 - rho**2))


def slice_value(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    loc, scale = survae_moments(inputs, prefix, x)
    survae_drawn("z", x, outputs[prefix + "forward.z"], loc, scale, inputs[prefix + "noise"], before=x, why=": it is x, and then what q drew")


def slice_paid(inputs, outputs, prefix):
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    loc, scale = survae_moments(inputs, prefix, x)
    if z.shape != (B, x.shape[1] + loc.shape[1]):
        raise Fail(f"`z` has shape {z.shape}; it should be (B, D) = {(B, x.shape[1] + loc.shape[1])}.")
    survae_paid(inputs, outputs, prefix + "forward.contribution", x, -survae_normal(z[:, x.shape[1]:], loc, scale), " for the coordinates in your z")


def slice_inverse(inputs, outputs, prefix):
    z = inputs[prefix + "z"]
    laws.expect("x", z, outputs[prefix + "inverse.x"], z[:, :SURVAE_CUTS[prefix][0]], 1e-6, " from inverse")
    survae_back(inputs, outputs, prefix, "x", "inverse of forward.x", "inverse(forward(x))")


class PlainSlice:
    def __init__(self, q, keep):
        self.q, self.keep = q, keep

    def draw(self, x):
        return self.q(x)

    def join(self, x, z2):
        return torch.cat([x, z2], 1)

    def paid(self, log_q, x, z2):
        return -log_q

    def forward(self, x):
        z2, log_q = self.draw(x)
        return self.join(x, z2), self.paid(log_q, x, z2)

    def inverse(self, z):
        return z[:, :self.keep]


def standard_normal(t):
    return -0.5 * (t**2 + LOG_2PI).sum(-1)


def slice_log_x(inputs, x):
    return survae_normal(x[:, None], 0, 1.0)


wrong = deviating(PlainSlice)
SLICE = Exercise(
    id="slice_layer", title="More dimensions: slice", minutes=10, difficulty=2,
    hints=(
        "Sampling only cuts, so that direction is deterministic. Its other direction has to invent the coordinates that were cut off, and `q` does that: it gives them and their log-density in one call.",
        "log p(x) = log p(z) + log p(x | z) - log q(z | x) in the mean, at most. Given z, x is certain, so the second term is 0; what remains is what q said, with which sign?",
    ),
    inputs=slice_inputs, reference=flowkit_class("surjective", "Slice"),
    cases=(
        Case("forward keeps x and appends what q drew", 2, both_sizes(slice_value)),
        Case("contribution = -log q(z2 | x), one number for each row", 2, both_sizes(slice_paid)),
        Case("inverse drops what was appended", 1, both_sizes(slice_inverse)),
        Case("a lower bound in the mean, and exact for the ideal q", 1, survae_bound("proposal", slice_base, slice_log_x)),
        Case("one row alone, inputs left as they were", 0.5, both_sizes(survae_kept)),
        Case("gradients reach x and q", 0.5, both_sizes(lambda i, o, p: gradient_arrives(o, p, "z and contribution", "x and the weights of `q`"))),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainSlice, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` is + log q: a coordinate that q finds likely would make x more likely. The bound divides by q, so log q is subtracted.",
                              paid_exp="`contribution` is 1 / q itself; it is the logarithm that is added to log p(z)."),
        wrong("base_counted_twice", "extra term", "ldj", "`contribution` adds the base's log-density of the appended coordinates; they are part of z, so log p(z) counts them already.", paid=lambda self, log_q, x, z2: standard_normal(z2) - log_q),
        wrong("per_dimension", "reduction", "ldj", "`contribution` is divided by the number of appended coordinates; the bound takes log q as it is.", paid=lambda self, log_q, x, z2: -log_q / z2.shape[1]),
        wrong("two_calls", "wrong function", "ldj", "The coordinates come from one call of q and log q from another: each call draws anew, so the two do not belong together.", forward=lambda self, x: (self.join(x, self.q(x)[0]), -self.q(x)[1])),
        wrong("prepended", "order", "forward", "forward puts the drawn coordinates before x; x comes first, as inverse expects.", join=lambda self, x, z2: torch.cat([z2, x], 1)),
        wrong("prepended_both", "order", "forward", "The drawn coordinates come first, in both directions; x = z[:, :keep] are the first ones.", join=lambda self, x, z2: torch.cat([z2, x], 1), inverse=lambda self, z: z[:, -self.keep:]),
        wrong("nothing_appended", "missing function", "forward", "forward returns x as it came: nothing is appended, so z has no more dimensions than x.", join=lambda self, x, z2: x),
        wrong("only_drawn", "missing term", "forward", "forward returns the drawn coordinates alone: x itself is missing in z.", join=lambda self, x, z2: z2),
        wrong("zeros_appended", "missing function", "forward", "forward appends zeros; the coordinates that `contribution` pays for are those that q drew.", join=lambda self, x, z2: torch.cat([x, 0 * z2], 1)),
        wrong("added", "wrong function", "forward", "forward adds the draw to x; it should stand beside x, as further coordinates.", join=lambda self, x, z2: torch.cat([x + z2[:, :1], z2], 1)),
        wrong("inverse_rest", "exchanged", "inverse", "inverse returns the coordinates that were appended; x is the other part.", inverse=lambda self, z: z[:, self.keep:]),
        wrong("inverse_last", "exchanged", "inverse", "inverse keeps the last coordinates; forward puts x first.", inverse=lambda self, z: z[:, -self.keep:]),
        wrong("inverse_drops_one", "wrong function", "inverse", "inverse drops one coordinate, however many there were appended.", inverse=lambda self, z: z[:, :-1]),
        wrong("inverse_rows", "wrong axis", "inverse", "inverse keeps the first rows of the batch; it is the first coordinates that are meant.", inverse=lambda self, z: z[:self.keep]),
        wrong("inverse_half", "wrong function", "inverse", "inverse keeps half of the coordinates; it should keep as many as `keep` says.", inverse=lambda self, z: z[:, :z.shape[1] // 2]),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came: nothing is cut off.", inverse=lambda self, z: z),
        wrong("inverse_forward", "direction", "inverse", "inverse does what forward does; it should cut off what forward appends.", inverse=lambda self, z: self.forward(z)[0]),
        wrong("draw_detached", "detached", "gradient", "The drawn coordinates are cut off from the computation graph, so q could not be trained by them.", join=lambda self, x, z2: torch.cat([x, z2.detach()], 1)),
        wrong("all_detached", "detached", "gradient", "What q returns is cut off from the computation graph (detach or no_grad), so q could not be trained.", draw=lambda self, x: tuple(t.detach() for t in self.q(x))),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so q would not feel what its draws cost.", paid=lambda self, log_q, x, z2: -log_q.detach()),
        wrong("asked_detached", "detached", "gradient", "What q is asked about is cut off from x (detach or no_grad): earlier layers would not learn from what q makes of it.", draw=lambda self, x: self.q(x.detach())),
        wrong("x_detached", "detached", "gradient", "The x in z is cut off from x (detach or no_grad): earlier layers would not learn from it.", join=lambda self, x, z2: torch.cat([x.detach(), z2], 1)),
        survae_exchanged(PlainSlice),
    ),
    compare=survae_sized("forward.z", "forward.contribution", "inverse.x", "gradient.along", "x after"), light=survae_light("line x"),
    picture=survae_bound_picture("proposal", lambda inputs, z: slice_base(inputs, z) if z.shape[1] == 2 else np.full(len(z), np.nan), slice_log_x),
)


# --- split_layer -----------------------------------------------------------------------------------------------------

def split_inputs(rng):
    inputs = {}
    for prefix, (keep, rest) in SURVAE_CUTS.items():
        inputs |= {f"{prefix}x": 1.5 * rng.standard_normal((B, keep + rest)), f"{prefix}z": 1.5 * rng.standard_normal((B, keep)),
                   f"{prefix}noise": rng.standard_normal((B, rest))} | net_inputs(rng, keep, 2 * rest, prefix) | loss_inputs(rng, keep, prefix)
        inputs |= survae_x(rng, inputs[f"{prefix}x"], prefix)
    heights = np.array([-1.0, 0.4, 1.5]) + rng.uniform(-0.2, 0.2, 3)
    line = np.linspace(-40, 40, 801)
    inputs["D=2 line"] = np.stack(np.broadcast_arrays(heights[:, None], line), -1).reshape(-1, 2)
    return inputs | {"D=2 grid": pictures.cells()}


def split_value(inputs, outputs, prefix):
    x, keep = inputs[prefix + "x"], SURVAE_CUTS[prefix][0]
    laws.expect("z", x, outputs[prefix + "forward.z"], x[:, :keep], 1e-6, f" for keep = {keep}")


def split_paid(inputs, outputs, prefix):
    x, keep = inputs[prefix + "x"], SURVAE_CUTS[prefix][0]
    survae_paid(inputs, outputs, prefix + "forward.contribution", x, survae_normal(x[:, keep:], *survae_moments(inputs, prefix, x[:, :keep])))


def split_inverse(inputs, outputs, prefix):
    z = inputs[prefix + "z"]
    survae_drawn("x", z, outputs[prefix + "inverse.x"], *survae_moments(inputs, prefix, z), inputs[prefix + "noise"], before=z, why=" from inverse: it is z, and then a draw of p(. | z)")


def split_back(inputs, outputs, prefix):
    survae_back(inputs, outputs, prefix, "z", "forward of inverse.z", "forward(inverse(z))")


def split_mass(inputs, outputs, reference):
    """By the trapezoid rule, of a smooth density: 801 points over 80 units, 5 and more a standard deviation of above 0.2."""
    paid, points = outputs["D=2 forward on the line.contribution"], inputs["D=2 line"]
    if paid.shape != (len(points),):
        raise Fail(f"`contribution` has shape {paid.shape} for {len(points)} points; it should hold one number for each.")
    area = np.exp(np.minimum(paid.astype(float), 50)).reshape(3, -1).sum(1) * (points[1, 1] - points[0, 1])
    if np.abs(area - 1).max() > 1e-3:
        raise Fail("exp(contribution) is no density of what is dropped: integrated over it, at a fixed z, it does not give 1.", f"z = {points[0, 0]:.3g}: it gives {area[0]:.3g}")


class PlainSplit:
    def __init__(self, p, keep):
        self.p, self.keep = p, keep

    def cut(self, x):
        return x[:, :self.keep], x[:, self.keep:]

    def paid(self, z, rest):
        return self.p(z).log_prob(rest)

    def forward(self, x):
        z, rest = self.cut(x)
        return z, self.paid(z, rest)

    def draw(self, z):
        return self.p(z).sample()

    def join(self, z, rest):
        return torch.cat([z, rest], 1)

    def inverse(self, z):
        return self.join(z, self.draw(z))


def split_last(self, x):
    return x[:, -self.keep:], x[:, :-self.keep]


wrong = deviating(PlainSplit)
SPLIT = Exercise(
    id="split_layer", title="Fewer dimensions: split", minutes=10, difficulty=2,
    hints=(
        "The density of (z, rest) is the density of z times that of the rest given z. Which of the two does the flow that follows know, and which has this layer to add?",
        "`p(z)` is a distribution object of the dropped coordinates: ask it for the log-density of those that x really has in forward, and for a draw in inverse.",
    ),
    inputs=split_inputs, reference=flowkit_class("surjective", "Split"),
    cases=(
        Case("forward keeps the first coordinates", 1, both_sizes(split_value)),
        Case("contribution = log p(rest | z), one number for each row", 2, both_sizes(split_paid)),
        Case("exp(contribution) integrates to 1 over what is dropped", 1, split_mass),
        Case("inverse draws the rest from p(. | z)", 1.5, both_sizes(split_inverse)),
        Case("forward(inverse(z)) = z", 0.5, both_sizes(split_back)),
        Case("one row alone, inputs left as they were", 0.5, both_sizes(survae_kept)),
        Case("gradients reach x and p", 0.5, both_sizes(lambda i, o, p: gradient_arrives(o, p, "z and contribution", "x and the weights of `p`"))),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainSplit, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` is - log p(rest | z): the chain rule multiplies the density of z by that of the rest, so its logarithm is added.",
                              paid_zero="`contribution` is zero: the dropped coordinates are forgotten, as if they had the density 1 wherever they are."),
        wrong("per_dimension", "reduction", "ldj", "`contribution` is divided by the number of dropped coordinates; log p of the whole rest is asked for.", paid=lambda self, z, rest: self.p(z).log_prob(rest) / rest.shape[1]),
        wrong("paid_for_a_draw", "wrong function", "ldj", "`contribution` is the log-density of a fresh draw; it should be that of the coordinates that x has.", paid=lambda self, z, rest: self.p(z).log_prob(self.p(z).sample())),
        wrong("standard_normal", "wrong function", "ldj", "`contribution` takes the rest for standard normal, whatever z is; `p(z)` says how it is distributed.", paid=lambda self, z, rest: standard_normal(rest)),
        wrong("kept_counted_too", "extra term", "ldj", "`contribution` adds a log-density of z as well; the flow that follows counts z.", paid=lambda self, z, rest: self.p(z).log_prob(rest) + standard_normal(z)),
        wrong("paid_at_mean", "wrong function", "ldj", "`contribution` is the log-density at the mean of p(. | z), whatever the rest of x is.", paid=lambda self, z, rest: self.p(z).log_prob(self.p(z).mean)),
        wrong("parts_exchanged", "exchanged", "forward", "forward returns the coordinates that should be dropped; z = x[:, :keep] is the other part.", forward=lambda self, x: (x[:, self.keep:], PlainSplit.forward(self, x)[1])),
        wrong("keeps_last", "exchanged", "forward", "forward keeps the last coordinates, and drops the first.", cut=split_last),
        wrong("keeps_all", "missing function", "forward", "forward returns x as it came: nothing is dropped.", forward=lambda self, x: (x, PlainSplit.forward(self, x)[1])),
        wrong("half", "wrong function", "forward", "x is cut in halves; `keep` says how many coordinates stay.", cut=lambda self, x: tuple(x.chunk(2, 1))),
        wrong("rows", "wrong axis", "forward", "The rows of the batch are cut; it is the coordinates, the columns, that are meant.", cut=lambda self, x: (x[:self.keep], x[self.keep:])),
        wrong("rows_dropped", "wrong axis", "forward", "The rest is made of the last rows of the batch; it is the last coordinates of every row.", cut=lambda self, x: (x[:, :self.keep], x[self.keep:])),
        wrong("inverse_mean", "missing function", "inverse", "inverse fills in the mean of p(. | z); it should draw, or all samples of one z are the same.", draw=lambda self, z: self.p(z).mean),
        wrong("inverse_normal", "wrong function", "inverse", "inverse draws the rest from a standard normal, whatever z is; `p(z)` says how it is distributed.", draw=lambda self, z: torch.randn_like(self.p(z).mean)),
        wrong("inverse_zeros", "missing function", "inverse", "inverse fills in zeros; it should draw the rest.", draw=lambda self, z: torch.zeros_like(self.p(z).mean)),
        wrong("inverse_order", "order", "inverse", "inverse puts the drawn coordinates first; z comes first, as forward has it.", join=lambda self, z, rest: torch.cat([rest, z], 1)),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came: the dropped coordinates are not drawn.", inverse=lambda self, z: z),
        wrong("inverse_only_drawn", "missing term", "inverse", "inverse returns the drawn coordinates alone; z belongs to x too.", join=lambda self, z, rest: rest),
        wrong("inverse_pair", "type", "inverse", "inverse returns a pair; it should return x alone, the two parts in one tensor.", join=lambda self, z, rest: (z, rest)),
        wrong("one_draw", "reduction", "inverse", "inverse draws once for the whole batch; every row needs a draw of its own.", draw=lambda self, z: self.p(z[:1]).sample().expand(len(z), -1)),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so p could not be trained.", paid=lambda self, z, rest: self.p(z).log_prob(rest).detach()),
        wrong("asked_detached", "detached", "gradient", "What p is asked about is cut off from x (detach or no_grad): earlier layers would not learn from p(. | z).", paid=lambda self, z, rest: self.p(z.detach()).log_prob(rest)),
        wrong("rest_detached", "detached", "gradient", "The rest is cut off from x (detach or no_grad): earlier layers would not learn from its log-density.", paid=lambda self, z, rest: self.p(z).log_prob(rest.detach())),
        wrong("z_detached", "detached", "gradient", "The z that is returned is cut off from x (detach or no_grad): earlier layers would not learn from the flow that follows.", forward=lambda self, x: (self.cut(x)[0].detach(), PlainSplit.forward(self, x)[1])),
        survae_exchanged(PlainSplit),
    ),
    compare=survae_sized("forward.z", "forward.contribution", "inverse.x", "gradient.along", "z after"), light=survae_light("D=2 line"),
    faults=survae_stored("inverse of forward.x", "x", "the dropped coordinates"),
    picture=survae_picture(lambda inputs, z: survae_normal(z, 0, 1.0), steps=("D=2 forward on the grid",)),
)


# --- abs_layer -------------------------------------------------------------------------------------------------------

ABS_ODDS = np.log([3.0, 1 / 3])  # 3 to 1 and 1 to 3


def abs_inputs(rng):
    inputs = {}
    for prefix, D in (("D=2 ", 2), ("D=6 ", 6)):
        signs = np.where(rng.random((B, D)) < 0.5, 1.0, -1.0)
        signs[0], signs[1] = 1.0, -1.0
        x = np.where(rng.random((B, D)) < 0.5, 1.0, -1.0) * rng.uniform(0.1, 2.5, (B, D))
        x[:, 0] = np.abs(x[:, 0]) * np.tile([1.0, -1.0], B // 2)
        inputs |= {f"{prefix}x": x, f"{prefix}z": rng.uniform(0.1, 2.5, (B, D)), f"{prefix}certain": signs * rng.uniform(40, 60, (B, D))}
        inputs |= net_inputs(rng, D, D, prefix) | loss_inputs(rng, D, prefix) | survae_x(rng, x, prefix)
        inputs[f"{prefix}far"] = 120 * signs
    return inputs | {"odds": ABS_ODDS, "many": rng.uniform(0.1, 2.5, (SURVAE_DRAWS, 2)), "grid": pictures.cells()}


def abs_value(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    laws.expect("z", x, outputs[prefix + "forward.z"], np.abs(x), 1e-6)


def abs_paid(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    odds = 2 * survae_tanh(inputs, prefix, np.abs(x))
    survae_paid(inputs, outputs, prefix + "forward.contribution", x, survae_log_sigmoid(np.sign(x) * odds).sum(1), " where log_odds is a net")


def abs_uniform(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    survae_paid(inputs, outputs, prefix + "forward without log_odds.contribution", x, np.full(len(x), -x.shape[1] * math.log(2)), " where there are no log_odds")
    laws.expect("z", x, outputs[prefix + "forward without log_odds.z"], np.abs(x), 1e-6, " where there are no log_odds")


def abs_far(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    want = survae_log_sigmoid(np.sign(x) * inputs[prefix + "certain"]).sum(1)
    survae_paid(inputs, outputs, prefix + "forward where signs are nearly certain.contribution", x, want, " where log_odds is 40 and more in size")
    want = survae_log_sigmoid(np.sign(x) * inputs[prefix + "far"]).sum(1)
    survae_paid(inputs, outputs, prefix + "forward in float32.contribution", x, want, " where log_odds is 120 in size, in float32")


def abs_inverse(inputs, outputs, prefix):
    """The odds are e^40 and more: a sign is another one with probability below 5e-18."""
    z = inputs[prefix + "z"]
    got, want = outputs[prefix + "inverse.x"], z * np.sign(inputs[prefix + "certain"])
    if got.shape != z.shape:
        raise Fail(f"`x` from inverse has shape {got.shape}; it should be (B, D) = {z.shape}.")
    laws.expect("the size of x", z, np.abs(got), z, 1e-6, " from inverse: |x| is z")
    laws.expect("x", z, got, want, 1e-6, ": inverse takes another sign than log_odds makes all but certain")
    survae_back(inputs, outputs, prefix, "z", "forward of inverse.z", "forward(inverse(z))")


def abs_shares(step, p):
    """How often each of the four patterns of signs is drawn, (+, +), (+, -), (-, +), (-, -)."""

    def judge(inputs, outputs, reference):
        z, x = inputs["many"], outputs[step + ".x"]
        if x.shape != z.shape or not laws.close(np.abs(x), z, 1e-6).all():
            raise Fail("The size of x from inverse is not z.")
        want = [a * b for a, b in itertools.product((p[0], 1 - p[0]), (p[1], 1 - p[1]))]
        got = [((x > 0) == s).all(1).mean() for s in itertools.product((True, False), repeat=2)]
        if np.abs(np.subtract(got, want)).max() > SURVAE_OFF:
            odds = "without log_odds" if p[0] == 0.5 else "with odds of 3 to 1 for the first sign and 1 to 3 for the second"
            raise Fail(f"Among {len(z)} draws {odds} the signs are not as frequent, or not as independent, as they should be.",
                       f"(+, +), (+, -), (-, +), (-, -): expected {laws.point(want, 2)}, got {laws.point(got, 2)}")

    return judge


class PlainAbs:
    def __init__(self, log_odds=None):
        self.log_odds = log_odds

    def bend(self, x):
        return x.abs()

    def odds(self, z, x):
        return torch.zeros_like(z) if self.log_odds is None else self.log_odds(z)

    def terms(self, x, odds):
        return F.logsigmoid(torch.where(x > 0, odds, -odds))

    def uniform(self, x):
        return torch.full((len(x),), -x.shape[1] * math.log(2))

    def paid(self, x):
        return self.uniform(x) if self.log_odds is None else self.terms(x, self.odds(self.bend(x), x)).sum(1)

    def forward(self, x):
        return self.bend(x), self.paid(x)

    def chance(self, odds):
        return torch.sigmoid(odds)

    def signs(self, p):
        return torch.where(torch.rand_like(p) < p, 1.0, -1.0)

    def inverse(self, z):
        return z * self.signs(self.chance(self.odds(z, z)))


def abs_paid_no_sum(self, x):
    return torch.full(x.shape, -math.log(2)) if self.log_odds is None else self.terms(x, self.odds(self.bend(x), x))


wrong = deviating(PlainAbs)
ABS = Exercise(
    id="abs_layer", title="Data with a mirror: abs", minutes=15, difficulty=3,
    hints=(
        "|x| loses one sign in each coordinate. The likelihood of x is that of |x| times the probability of the very signs that x has; D independent coins make a product, so a sum of logarithms.",
        "`log_odds` is the log-odds of being positive: that has probability sigmoid(log_odds), being negative sigmoid(-log_odds). `F.logsigmoid` gives the logarithm of either without underflow; for the draw compare `torch.rand_like` with the probability.",
    ),
    inputs=abs_inputs, reference=flowkit_class("surjective", "Abs"),
    cases=(
        Case("forward: z = |x|", 1, both_sizes(abs_value)),
        Case("contribution = log p(signs of x | z), summed over the dimensions", 2, both_sizes(abs_paid)),
        Case("without log_odds: -log 2 a dimension", 1, both_sizes(abs_uniform)),
        Case("contribution is exact where a sign is nearly impossible", 0.5, both_sizes(abs_far)),
        Case("inverse draws signs only, and the likely ones", 1.5, both_sizes(abs_inverse)),
        Case("signs are as frequent as log_odds says", 1, abs_shares("inverse draws", (0.75, 0.25))),
        Case("without log_odds all signs are equally frequent", 1, abs_shares("inverse draws without log_odds", (0.5, 0.5))),
        Case("one row alone, inputs left as they were", 0.5, both_sizes(survae_kept)),
        Case("gradients reach x and log_odds", 0.5, both_sizes(lambda i, o, p: gradient_arrives(o, p, "z and contribution", "x and the weights of `log_odds`"))),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainAbs, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` is minus the log-probability of the signs; the probability multiplies the density of |x|, so its logarithm is added."),
        wrong("paid_no_sum", "shape", "ldj", "`contribution` still has one number for each dimension: the signs are independent, so their log-probabilities are added up to (B,).", paid=abs_paid_no_sum),
        wrong("paid_mean", "reduction", "ldj", "`contribution` is a mean over the dimensions; the logarithm of a product of probabilities is a sum.", paid=lambda self, x: PlainAbs.paid(self, x) / x.shape[1]),
        wrong("always_positive", "sign", "ldj", "`contribution` takes every sign for positive; a negative x_i has the probability of the minus sign.", terms=lambda self, x, odds: F.logsigmoid(odds)),
        wrong("signs_turned", "sign", "ldj", "`contribution` has the probabilities of plus and minus exchanged: `log_odds` is that of being positive.", terms=lambda self, x, odds: F.logsigmoid(torch.where(x > 0, -odds, odds))),
        wrong("no_log", "missing function", "ldj", "`contribution` adds up probabilities; among log-densities belong their logarithms.", terms=lambda self, x, odds: torch.sigmoid(torch.where(x > 0, odds, -odds))),
        wrong("no_sigmoid", "missing function", "ldj", "`contribution` adds up the log-odds themselves; the sigmoid makes probabilities of them, and then their logarithms are taken.", terms=lambda self, x, odds: torch.where(x > 0, odds, -odds)),
        wrong("odds_at_x", "wrong function", "ldj", "`log_odds` is asked at x, signs and all; it is a function of z = |x|, or sampling could not use it.", odds=lambda self, z, x: torch.zeros_like(z) if self.log_odds is None else self.log_odds(x)),
        wrong("underflow", "wrong function", "ldj", "The probability of a minus sign is 1 - sigmoid(log_odds), which rounds to 0 where log_odds is large, and its logarithm is infinite.",
              terms=lambda self, x, odds: torch.where(x > 0, torch.sigmoid(odds), 1 - torch.sigmoid(odds)).log()),
        wrong("underflow_single", "wrong function", "ldj", "The sigmoid itself rounds to 0 in float32 where log_odds is large in size, and its logarithm is infinite; `F.logsigmoid` gives the logarithm at once.",
              terms=lambda self, x, odds: torch.where(x > 0, odds, -odds).sigmoid().log()),
        wrong("uniform_once", "missing term", "ldj", "Without log_odds `contribution` is -log 2 once; every dimension has a sign of its own.", uniform=lambda self, x: torch.full((len(x),), -math.log(2))),
        wrong("uniform_sign", "sign", "ldj", "Without log_odds `contribution` is + log 2 a dimension; the sign that x has is one of two, so its probability lowers the density.", uniform=lambda self, x: torch.full((len(x),), x.shape[1] * math.log(2))),
        wrong("uniform_zero", "missing term", "ldj", "Without log_odds `contribution` is zero; a fair coin has the probability 1/2, not 1.", uniform=lambda self, x: torch.zeros(len(x))),
        wrong("uniform_half", "missing function", "ldj", "Without log_odds `contribution` adds up -1/2 or 1/2 a dimension; it is the logarithm of 1/2 that counts.", uniform=lambda self, x: torch.full((len(x),), 0.5 * x.shape[1])),
        wrong("not_abs", "missing function", "forward", "forward returns x as it came, with its signs.", forward=lambda self, x: (x, PlainAbs.paid(self, x))),
        wrong("squared", "wrong function", "forward", "forward squares x; |x| keeps lengths as they are, so no slope has to be paid for.", bend=lambda self, x: x**2),
        wrong("relu", "wrong function", "forward", "forward sets negative coordinates to 0 instead of turning their sign: their size is lost.", bend=lambda self, x: x.relu()),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z: the signs are not drawn, so all samples are positive.", inverse=lambda self, z: z),
        wrong("inverse_only_signs", "missing term", "inverse", "inverse returns the signs alone; each is to be multiplied by z.", inverse=lambda self, z: self.signs(self.chance(self.odds(z, z)))),
        wrong("inverse_mode", "wrong function", "inverse", "inverse always takes the likelier sign; it should draw it, with the probability that log_odds says.", signs=lambda self, p: torch.where(p >= 0.5, 1.0, -1.0)),
        wrong("inverse_mode_bit", "wrong function", "inverse", "inverse always takes the likelier sign, as 0 or 1 instead of -1 or 1; nothing is drawn.", signs=lambda self, p: (p > 0.5).to(p.dtype)),
        wrong("inverse_turned", "sign", "inverse", "In inverse plus and minus have changed places: `log_odds` is that of being positive.", signs=lambda self, p: torch.where(torch.rand_like(p) < p, -1.0, 1.0)),
        wrong("inverse_fair", "missing function", "inverse", "inverse draws fair signs, whatever log_odds says.", chance=lambda self, odds: torch.full_like(odds, 0.5)),
        wrong("inverse_no_sigmoid", "missing function", "inverse", "inverse takes log_odds for a probability; it is the sigmoid that makes one of it.", chance=lambda self, odds: odds),
        wrong("inverse_row_sign", "reduction", "inverse", "inverse draws one number for a whole row; every coordinate needs a draw of its own.", signs=lambda self, p: torch.where(torch.rand_like(p[:, :1]) < p, 1.0, -1.0)),
        wrong("inverse_batch_sign", "reduction", "inverse", "inverse draws the same random numbers for all rows; every row needs its own.", signs=lambda self, p: torch.where(torch.rand_like(p[:1]) < p, 1.0, -1.0)),
        wrong("inverse_zero", "wrong function", "inverse", "inverse multiplies by 0 and 1 where it should by -1 and 1: a drawn bit is not yet a sign.", signs=lambda self, p: torch.bernoulli(p.clamp(0, 1))),
        wrong("inverse_mean", "wrong function", "inverse", "inverse multiplies z by the mean of the sign; it should draw a sign, -1 or 1.", signs=lambda self, p: 2 * p - 1),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so log_odds could not be trained.", paid=lambda self, x: PlainAbs.paid(self, x).detach()),
        wrong("asked_detached", "detached", "gradient", "What log_odds is asked about is cut off from x (detach or no_grad): earlier layers would not learn from the signs' probabilities.", odds=lambda self, z, x: PlainAbs.odds(self, z.detach(), x)),
        wrong("z_detached", "detached", "gradient", "The z that is returned is cut off from x (detach or no_grad): earlier layers would not learn from the flow that follows.", forward=lambda self, x: (self.bend(x).detach(), self.paid(x))),
        survae_exchanged(PlainAbs),
    ),
    compare=survae_sized("forward.z", "forward.contribution", "forward without log_odds.contribution", "forward where signs are nearly certain.contribution", "forward in float32.contribution", "inverse.x", "gradient.along",
                         "x after") + ("inverse draws.patterns", "inverse draws without log_odds.patterns", "inverse draws.sizes", "inverse one by one.patterns"),
    faults=survae_stored("inverse of forward.x", "x", "the signs"),
    picture=survae_picture(lambda inputs, z: survae_normal(z, [1.0, 0.5], np.array([0.5, 0.8])) + 2 * math.log(2), "density of x", ("picture",)),
)


# --- max_layer -------------------------------------------------------------------------------------------------------

MAX_D = 4
MAX_RATIOS = np.array([1.0, 1.9, 1.7, 0.4])  # of the scales of the excesses: no two alike, and none the same from behind


def max_inputs(rng):
    x = survae_spaced(rng, MAX_D)
    x[np.arange(MAX_D), np.arange(MAX_D)] += 5  # each place is the largest one once
    scale = rng.uniform(0.5, 0.8)
    scales = scale * MAX_RATIOS
    m, nodes = np.arange(-8, 8.1, 0.25), np.polynomial.legendre.leggauss(60)
    e = 5 * scale * (nodes[0] + 1)  # 0 .. 10 standard deviations of the excess
    top, below = (a.ravel() for a in np.broadcast_arrays(m[:, None], m[:, None] - e))
    plane = np.concatenate([np.stack([top, below], 1), np.stack([below, top], 1)])
    inputs = {"x": x, "z": 1.5 * rng.standard_normal((B, 1)), "scales": scales, "plane": plane,
              "plane weights": np.tile(0.25 * 5 * scale * nodes[1], 2 * len(m)), "many": 1.5 * rng.standard_normal((SURVAE_DRAWS, 1)),
              "levels": np.array([0.67448975]), "grid": pictures.cells()}
    inputs |= {"net.x": x, "direction.x": rng.standard_normal(x.shape), "net.scales": scales, "direction.scales": rng.uniform(0.5, 1, MAX_D)}
    return inputs | loss_inputs(rng, 1)


def max_excess(e, scale):
    return math.log(2) - 0.5 * (e / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI


def max_scales(inputs, outputs):
    """Of the coordinates of x: the probe hands an answer that takes one law for all the first alone."""
    return inputs["scales"] if outputs["form"] == 0 else np.full(MAX_D, inputs["scales"][0])


def max_others(x, terms):
    """The sum of `terms(excess)` (B, D) over all coordinates but the largest."""
    largest = x.argmax(1)[:, None] == np.arange(x.shape[1])
    return np.where(largest, 0, terms(np.where(largest, 1, x.max(1, keepdims=True) - x))).sum(1)


def max_value(inputs, outputs, reference):
    x = inputs["x"]
    laws.expect("z", x, outputs["forward.z"], x.max(1, keepdims=True), 1e-6)


def max_paid(inputs, outputs, reference):
    x = inputs["x"]
    scales = max_scales(inputs, outputs)
    want = max_others(x, lambda e: max_excess(e, scales)) - math.log(x.shape[1])
    why = f" for D = {MAX_D}" + (" and another scale of excess for each coordinate" if outputs["form"] == 0 else "")
    survae_paid(inputs, outputs, "forward.contribution", x, want, why)


def max_gamma(inputs, outputs, reference):
    """A Gamma excess: its log-density at 0, the place of the largest coordinate, is minus infinity."""
    x, s = inputs["x"], max_scales(inputs, outputs)
    c = 1.5 + s
    want = max_others(x, lambda e: -c * np.log(s) + (c - 1) * np.log(e) - e / s - [math.lgamma(v) for v in c]) - math.log(x.shape[1])
    key = "forward with a Gamma excess.contribution"
    if key in outputs and not np.isfinite(outputs.arrays[key]).all():
        raise Fail("With a Gamma excess `contribution` is not finite: the density of an excess of 0 gets into it, which only the largest coordinate has.")
    survae_paid(inputs, outputs, key, x, want, " for a Gamma excess")
    key = "with a Gamma excess gradient.along"
    if key in outputs and np.isnan(outputs.arrays[key]):
        raise Fail("With a Gamma excess `contribution` is right, but its gradient is NaN: `log_prob` was asked at the excess of the largest coordinate, 0.")
    gradient_arrives(outputs, "with a Gamma excess ", "z and contribution", "x and the parameters of a Gamma excess")


def max_mass(inputs, outputs, reference):
    """exp(log p(z) + contribution) over the plane, by a rule along the maximum and along the excess; the base is standard normal."""
    z, paid = outputs["forward on the plane.z"], outputs["forward on the plane.contribution"]
    n = len(inputs["plane"])
    if z.shape != (n, 1) or paid.shape != (n,):
        raise Fail(f"For {n} points of the plane `z` has shape {z.shape} and `contribution` {paid.shape}; they should be {(n, 1)} and {(n,)}.")
    mass = np.exp(np.minimum(survae_normal(z.astype(float), 0, 1.0) + paid, 50)) @ inputs["plane weights"]
    if abs(mass - 1) > 1e-4:
        raise Fail(f"With a standard normal base exp(log p(z) + contribution) integrates to {mass:.4g} over the plane; a density integrates to 1.")


def max_inverse(inputs, outputs, reference):
    z, x = inputs["many"], outputs["inverse draws.x"]
    if x.shape != (len(z), MAX_D):
        raise Fail(f"`x` from inverse has shape {x.shape} for z of shape {z.shape}; it should be (B, D) = {(len(z), MAX_D)}.")
    laws.expect("the largest x_i", z, x.max(1, keepdims=True), z, 1e-6, " from inverse: it is z")
    if ((np.abs(x - z) < 1e-12).sum(1) > 1).any():
        raise Fail("inverse makes several coordinates equal to z; one of them is, and the others lie below.")
    survae_back(inputs, outputs, "", "z", "forward of inverse.z", "forward(inverse(z))")


def max_places(inputs, outputs, reference):
    x = outputs["inverse draws.x"]
    if x.shape != (SURVAE_DRAWS, MAX_D):
        raise Fail(f"`x` from inverse has shape {x.shape}; it should be (B, D) = {(SURVAE_DRAWS, MAX_D)}.")
    got = [(x.argmax(1) == i).mean() for i in range(MAX_D)]
    if np.abs(np.array(got) - 1 / MAX_D).max() > SURVAE_OFF:
        raise Fail("The place of the largest coordinate is not drawn uniformly, and anew for each row.", f"among {len(x)} draws the places have the shares {laws.point(got, 2)}")


def max_excesses(inputs, outputs, reference):
    """By Dvoretzky, Kiefer and Wolfowitz 7,500 draws are off by 0.04 with probability 2 exp(-2 * 7,500 * 0.04^2) = 8e-11, for each coordinate."""
    x = outputs["inverse draws.x"]
    if x.shape != (SURVAE_DRAWS, MAX_D):
        raise Fail(f"`x` from inverse has shape {x.shape}; it should be (B, D) = {(SURVAE_DRAWS, MAX_D)}.")
    e = x.max(1, keepdims=True) - x.astype(float)
    if (np.diff(np.sort(e, 1)[:, 1:], axis=1) < 1e-9).any(1).mean() > 0.5:
        raise Fail("The coordinates below the largest one all have the same excess; each needs a draw of its own.")
    for i, scale in enumerate(max_scales(inputs, outputs)):
        u = np.sort([math.erf(v / scale / math.sqrt(2)) for v in e[x.argmax(1) != i, i]])
        off = np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max(initial=0)
        if off > 0.04:
            raise Fail("What the other coordinates lie below z is not distributed as `excess` says, one distribution for each coordinate.",
                       f"coordinate {i}: the CDF of the draws is off by {off:.2g}")


class PlainMax:
    def __init__(self, excess, dim=None):
        self.excess, self.dim = excess, excess.batch_shape[0]

    def top(self, x):
        return x.max(1, keepdim=True).values

    def mask(self, x):
        return F.one_hot(x.argmax(1), x.shape[1]).bool()

    def below(self, x):
        return self.top(x) - x

    def safe(self, e, x):
        """1 where the largest is: it has no excess, and at 0 the density may be 0."""
        return torch.where(self.mask(x), torch.ones_like(e), e)

    def log_excess(self, x):
        """One number for each coordinate; that of the largest is not yet left out."""
        return self.excess.log_prob(self.safe(self.below(x), x))

    def others(self, terms, x):
        return terms.masked_fill(self.mask(x), 0).sum(1)

    def spot(self, x):
        return -math.log(x.shape[1])

    def paid(self, x):
        return self.others(self.log_excess(x), x) + self.spot(x)

    def forward(self, x):
        return self.top(x), self.paid(x)

    def draw(self, z):
        return self.excess.sample(z.shape[:1])

    def index(self, z):
        return torch.randint(self.dim, z.shape)

    def lower(self, z, e):
        return z - e

    def inverse(self, z):
        return self.lower(z, self.draw(z).scatter(1, self.index(z), 0.0))


def max_nothing_kept(self, z):
    return z - self.draw(z)


def max_shuffled(self, z):
    """z first, the others after it, and then any order: an excess may land in a coordinate that is not its own."""
    x = z - self.draw(z).scatter(1, torch.zeros_like(z).long(), 0.0)
    return x.gather(1, torch.rand_like(x).argsort(1))


def max_set_after(self, z):
    x = z.expand(-1, self.dim).clone()
    return x.scatter(1, self.index(z), z - self.draw(z)[:, :1])


wrong = deviating(PlainMax)
MAX = Exercise(
    id="max_layer", title="Only the largest: max", minutes=20, difficulty=4,
    hints=(
        "Say how x is made from z, and its density follows: one of D places gets z, each with probability 1/D, and every other coordinate lies below z by an independent excess. How many factors does the density have?",
        "The largest coordinate has no excess of its own: its place in the sum must be left out, for instance by a mask from `argmax`, and already before `log_prob` sees an excess of 0. In inverse the same mask puts a 0 among the drawn excesses. `excess.batch_shape` tells D.",
    ),
    inputs=max_inputs, reference=flowkit_class("surjective", "Max"),
    cases=(
        Case("forward: z = max(x), of shape (B, 1)", 1, max_value),
        Case("contribution = -log D + sum of log excess(z - x_i)", 2, max_paid),
        Case("also where the excess has no density at 0, with its gradient", 0.5, max_gamma),
        Case("in the plane the density integrates to 1", 1, max_mass),
        Case("inverse: the largest coordinate is z", 1.5, max_inverse),
        Case("every place is the largest equally often", 1, max_places),
        Case("the others lie below z as `excess` says", 1, max_excesses),
        Case("one row alone, inputs left as they were", 0.5, lambda i, o, r: survae_kept(i, o)),
        Case("gradients reach x and excess", 0.5, lambda i, o, r: gradient_arrives(o, "", "z and contribution", "x and the parameters of `excess`")),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainMax, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean"),
        wrong("place_sign", "sign", "ldj", "log D is added; the place has the probability 1/D, which lowers the density.", spot=lambda self, x: math.log(x.shape[1])),
        wrong("place_missing", "missing term", "ldj", "The probability of the place is missing: which coordinate is the largest was drawn too, one of D.", spot=lambda self, x: 0.0),
        wrong("place_no_log", "missing function", "ldj", "1/D or D itself stands among logarithms; the logarithm of the place's probability is asked for.", spot=lambda self, x: 1 / x.shape[1]),
        wrong("place_minus_d", "missing function", "ldj", "D itself is subtracted; among logarithms belongs that of D.", spot=lambda self, x: -x.shape[1]),
        wrong("place_factorial", "wrong function", "ldj", "log D! is subtracted; only the place of the largest one is drawn, so there are D possibilities, not D!.", spot=lambda self, x: -math.lgamma(x.shape[1] + 1)),
        wrong("place_log2", "wrong function", "ldj", "The probability of the place is taken as 1/2; it is 1/D.", spot=lambda self, x: -math.log(2)),
        wrong("place_times_d", "extra term", "ldj", "log D is subtracted once for each coordinate; one place is drawn, so it counts once.", spot=lambda self, x: -x.shape[1] * math.log(x.shape[1])),
        wrong("largest_too", "extra term", "ldj", "The largest coordinate is counted too, with an excess of 0; it has none, for it is z itself.", safe=lambda self, e, x: e, others=lambda self, t, x: t.sum(1)),
        wrong("stand_in_counted", "extra term", "ldj", "The number that stands in for the excess of the largest coordinate is counted; its term must be left out of the sum.", others=lambda self, t, x: t.sum(1)),
        wrong("stand_in_exchanged", "exchanged", "ldj", "The two sides of the mask have changed places: the stand-in is used for the others, and the largest keeps its excess of 0.", safe=lambda self, e, x: torch.where(self.mask(x), e, torch.ones_like(e))),
        wrong("no_stand_in", "order", "gradient", "The largest coordinate is masked only after `log_prob` was asked at its excess of 0: where the density is 0 there, the gradient is NaN in spite of the mask.", safe=lambda self, e, x: e),
        wrong("excess_sign", "sign", "ldj", "The log-densities of the excesses are subtracted; a density is a product, so they are added.", others=lambda self, t, x: -PlainMax.others(self, t, x)),
        wrong("excess_missing", "missing term", "ldj", "The excesses are missing: how far the other coordinates lie below z was drawn too.", others=lambda self, t, x: 0 * t.sum(1)),
        wrong("excess_mean", "reduction", "ldj", "The log-densities of the excesses are averaged; independent draws make a product, so a sum.", others=lambda self, t, x: PlainMax.others(self, t, x) / (x.shape[1] - 1)),
        wrong("excess_mean_all", "reduction", "ldj", "The log-densities of the excesses are divided by D; independent draws make a product, so a sum.", others=lambda self, t, x: PlainMax.others(self, t, x) / x.shape[1]),
        wrong("excess_mean_too", "reduction", "ldj", "The log-densities of all excesses are averaged, that of the largest among them; they are added up, without the largest.", safe=lambda self, e, x: e, others=lambda self, t, x: t.mean(1)),
        wrong("excess_no_log", "missing function", "ldj", "Densities of the excesses are added up; it is their logarithms that are added.", others=lambda self, t, x: PlainMax.others(self, t.exp(), x)),
        wrong("excess_no_sum", "shape", "ldj", "`contribution` still has one number for each coordinate: the sum over the others is missing, so its shape is not (B,).",
              others=lambda self, t, x: t.masked_fill(self.mask(x), 0)),
        wrong("excess_no_sum_too", "shape", "ldj", "`contribution` still has one number for each coordinate, the largest among them: it is the sum over the others, shape (B,).", safe=lambda self, e, x: e, others=lambda self, t, x: t),
        wrong("excess_over_batch", "wrong axis", "ldj", "The log-densities are summed over the batch; they are to be summed over the coordinates of a row.", others=lambda self, t, x: t.masked_fill(self.mask(x), 0).sum(0)),
        wrong("negative_excess", "sign", "ldj", "The excess is taken as x_i - z, which is negative; it is how far x_i lies below z.", below=lambda self, x: x - self.top(x)),
        wrong("excess_of_x", "missing term", "ldj", "`excess` is asked at x_i itself; it is the density of the distance from z.", below=lambda self, x: x),
        wrong("excess_of_sum", "sign", "ldj", "`excess` is asked at z + x_i; it is the density of the distance from z.", below=lambda self, x: self.top(x) + x),
        wrong("excess_sorted", "order", "ldj", "x is sorted before `excess` is asked: it holds one distribution for each coordinate, in the order of x.", paid=lambda self, x: PlainMax.paid(self, x.sort(1).values)),
        wrong("excess_sorted_down", "order", "ldj", "x is sorted, the largest first, before `excess` is asked: it holds one distribution for each coordinate, in the order of x.", paid=lambda self, x: PlainMax.paid(self, x.sort(1, descending=True).values)),
        wrong("excess_reversed", "order", "ldj", "The distributions of `excess` are paired with the coordinates from behind: the first belongs to the first coordinate.", log_excess=lambda self, x: self.excess.log_prob(self.safe(self.below(x), x).flip(1)).flip(1)),
        wrong("excess_of_z", "missing term", "ldj", "`excess` is asked at z; it is the density of the distance between z and x_i.", below=lambda self, x: self.top(x).expand_as(x)),
        wrong("min", "wrong function", "forward", "forward returns the smallest coordinate; the largest is asked for.", forward=lambda self, x: (x.min(1, keepdim=True).values, PlainMax.paid(self, x))),
        wrong("z_squeezed", "shape", "forward", "`z` has shape (B,); it should keep its dimension, (B, 1).", forward=lambda self, x: (self.top(x)[:, 0], self.paid(x))),
        wrong("one_number", "reduction", "forward", "forward takes the largest number of the whole batch; every row has its own maximum.", forward=lambda self, x: (x.max(), self.paid(x))),
        wrong("over_batch", "wrong axis", "forward", "forward takes the maximum over the batch; it is over the coordinates of a row.", forward=lambda self, x: (x.max(0, keepdim=True).values, self.paid(x))),
        wrong("place_returned", "exchanged", "forward", "forward returns where the largest coordinate is; z is its value.", forward=lambda self, x: (x.argmax(1, keepdim=True), self.paid(x))),
        wrong("inverse_none_kept", "missing term", "inverse", "inverse lowers every coordinate, so none of them is z any more; the one at the drawn place has no excess.", inverse=max_nothing_kept),
        wrong("inverse_raises", "sign", "inverse", "inverse adds the excesses, so z is the smallest coordinate; the others lie below the largest.", lower=lambda self, z, e: z + e),
        wrong("inverse_turned", "sign", "inverse", "inverse subtracts z from the excesses; it is the other way round.", lower=lambda self, z, e: e - z),
        wrong("inverse_no_z", "missing term", "inverse", "inverse returns the excesses alone; they are to be subtracted from z.", lower=lambda self, z, e: e),
        wrong("inverse_minus_excess", "missing term", "inverse", "inverse forgets z: what it returns is minus the excesses.", lower=lambda self, z, e: -e),
        wrong("inverse_quotient", "wrong function", "inverse", "inverse divides or multiplies z by the excesses; they are subtracted.", lower=lambda self, z, e: z * e),
        wrong("inverse_all_equal", "missing function", "inverse", "inverse gives all coordinates the value z; the others lie below it, by draws of `excess`.", lower=lambda self, z, e: z.expand(-1, self.dim)),
        wrong("inverse_first", "constant", "inverse", "inverse always puts z into the same place; the place is drawn, uniformly.", index=lambda self, z: torch.zeros_like(z).long()),
        wrong("inverse_last", "constant", "inverse", "inverse always puts z into the last place; the place is drawn, uniformly.", index=lambda self, z: torch.full(z.shape, self.dim - 1)),
        wrong("inverse_one_place", "reduction", "inverse", "inverse draws one place for the whole batch; every row needs a draw of its own.", index=lambda self, z: torch.randint(self.dim, (1, 1)).expand_as(z)),
        wrong("inverse_place_missed", "off by one", "inverse", "One of the places is never drawn.", index=lambda self, z: torch.randint(self.dim - 1, z.shape)),
        wrong("inverse_place_first_missed", "off by one", "inverse", "The first place is never drawn: places are counted from 0.", index=lambda self, z: torch.randint(1, self.dim, z.shape)),
        wrong("inverse_mean", "missing function", "inverse", "inverse subtracts the mean excess everywhere; the excesses are drawn.", draw=lambda self, z: self.excess.mean.expand(len(z), -1)),
        wrong("inverse_one_excess", "reduction", "inverse", "inverse draws one excess for all coordinates of a row; each needs its own.", draw=lambda self, z: self.excess.sample(z.shape[:1])[:, :1].expand(-1, self.dim)),
        wrong("inverse_same_for_rows", "reduction", "inverse", "inverse draws the excesses once for the whole batch; every row needs its own.", draw=lambda self, z: self.excess.sample().expand(len(z), -1)),
        wrong("inverse_reversed", "order", "inverse", "inverse gives the drawn excesses to the coordinates from behind: `excess` holds one distribution for each, the first for the first coordinate.", draw=lambda self, z: PlainMax.draw(self, z).flip(1)),
        wrong("inverse_shuffled", "order", "inverse", "inverse shuffles the coordinates after the excesses were drawn: `excess` holds one distribution for each coordinate, so only the place of the largest is drawn.", inverse=max_shuffled),
        wrong("inverse_other_way", "exchanged", "inverse", "In inverse the two sides of the mask have changed places: one coordinate is lowered, and all others are z.", inverse=max_set_after),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came; D coordinates are to be made of it.", inverse=lambda self, z: z),
        wrong("x_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so neither x nor excess could be trained through it.", paid=lambda self, x: PlainMax.paid(self, x).detach()),
        survae_exchanged(PlainMax),
    ),
    compare=("forward.z", "forward.contribution", "inverse draws.place", "inverse draws.moves", "inverse draws.excess", "inverse draws.distinct", "inverse draws.kept", "inverse far out.signs", "inverse.kept", "gradient.along", "forward with a Gamma excess.contribution", "with a Gamma excess gradient.along", "x after"), light=survae_light("plane"),
    faults=survae_stored("inverse of forward.x", "x", "which coordinate is the largest, or x", ("",)),
    picture=survae_picture(lambda inputs, z: survae_normal(z, 0, 1.0)),
)


# --- sort_layer ------------------------------------------------------------------------------------------------------

def sort_inputs(rng):
    inputs = {}
    for prefix, D in (("D=2 ", 2), ("D=6 ", 6)):
        x = survae_spaced(rng, D)
        inputs |= {f"{prefix}x": x, f"{prefix}z": np.sort(1.5 * rng.standard_normal((B, D)), 1), f"{prefix}net.x": x, f"{prefix}direction.x": rng.standard_normal((B, D))}
        inputs |= loss_inputs(rng, D, prefix)
    return inputs | {"many": np.sort(rng.standard_normal((SURVAE_DRAWS, 3)), 1), "D=30 x": rng.standard_normal((B, 30)), "grid": pictures.cells()}


def sort_value(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    laws.expect("z", x, outputs[prefix + "forward.z"], np.sort(x, 1), 1e-6, ": it is x in ascending order")


def sort_paid(prefixes):
    def judge(inputs, outputs, reference):
        for prefix, D in prefixes:
            x = inputs[prefix + "x"]
            survae_paid(inputs, outputs, prefix + "forward.contribution", x, np.full(len(x), -math.lgamma(D + 1)), f" for D = {D}")

    return judge


def sort_inverse(inputs, outputs, prefix):
    z, x = inputs[prefix + "z"], outputs[prefix + "inverse.x"]
    if x.shape != z.shape:
        raise Fail(f"`x` from inverse has shape {x.shape}; it should be (B, D) = {z.shape}.")
    if x.shape[1] == 6 and np.array_equal(x, z):  # by chance once in 720^8 times
        raise Fail("inverse returns z as it came: no order was drawn.")
    laws.expect("inverse, put in order again,", z, np.sort(x, 1), z, 1e-6, ": a row must hold the numbers of its own z")
    survae_back(inputs, outputs, prefix, "z", "forward of inverse.z", "forward(inverse(z))")


def sort_orders(inputs, outputs, reference):
    z, x = inputs["many"], outputs["inverse draws.x"]
    if x.shape != z.shape:
        raise Fail(f"`x` from inverse has shape {x.shape}; it should be (B, D) = {z.shape}.")
    got = [(x.argsort(1) == o).all(1).mean() for o in itertools.permutations(range(3))]
    if np.abs(np.array(got) - 1 / 6).max() > SURVAE_OFF:
        raise Fail("The six orders of three numbers are not drawn equally often, and anew for each row.", f"among {len(z)} draws they have the shares {laws.point(got, 2)}")


class PlainSort:
    def order(self, x):
        return x.sort(1).values

    def log_orders(self, D):
        return math.lgamma(D + 1)

    def paid(self, x):
        return torch.full((len(x),), -float(self.log_orders(x.shape[1])), dtype=x.dtype)

    def forward(self, x):
        return self.order(x), self.paid(x)

    def shuffle(self, z):
        return torch.rand_like(z).argsort(1)

    def inverse(self, z):
        return z.gather(1, self.shuffle(z))


def sort_swapped(self, z):
    """Two places exchanged, whatever they are."""
    order = torch.arange(z.shape[1]).repeat(len(z), 1)
    a, b = torch.randint(z.shape[1], (2, len(z), 1))
    return order.scatter(1, a, b).scatter(1, b, a)


def sort_rolled(self, z):
    return (torch.arange(z.shape[1]) + torch.randint(z.shape[1], (len(z), 1))) % z.shape[1]


def sort_int64(self, D):
    """log of a product of 64-bit integers, as torch takes it."""
    return torch.arange(1, D + 1).prod().abs().clamp_min(1).log()


wrong = deviating(PlainSort)
SORT = Exercise(
    id="sort_layer", title="Without an order: sort", minutes=12, difficulty=2,
    hints=(
        "Sorting forgets which of the D! orders x had. Inverse chooses one of them, all alike; what is the probability of the one that x has?",
        "Logarithms of factorials are what `math.lgamma` knows, shifted by one. Random keys for each row, and the `argsort` of these along the coordinates, give a permutation for each row; `gather` applies it.",
    ),
    inputs=sort_inputs, reference=flowkit_class("surjective", "Sort"),
    cases=(
        Case("forward: z is x in ascending order", 1, both_sizes(sort_value)),
        Case("contribution = -log D!, one number for each row", 2, sort_paid((("D=2 ", 2), ("D=6 ", 6)))),
        Case("also for 30 coordinates", 0.5, sort_paid((("D=30 ", 30),))),
        Case("inverse: the same numbers in each row", 1, both_sizes(sort_inverse)),
        Case("all orders are equally frequent", 1.5, sort_orders),
        Case("one row alone, inputs left as they were", 0.5, both_sizes(survae_kept)),
        Case("gradients reach x", 0.5, both_sizes(lambda i, o, p: gradient_arrives(o, p, "z and contribution", "x"))),
    ),
    misconceptions=(
        wrong("paid_sign", "sign", "ldj", "`contribution` is + log D!; the order that x has is one of D!, so its probability lowers the density.", log_orders=lambda self, D: -math.lgamma(D + 1)),
        wrong("paid_zero", "missing term", "ldj", "`contribution` is zero: the order that x has was drawn, one of D!, and has to be paid for.", log_orders=lambda self, D: 0.0),
        wrong("log_d", "wrong function", "ldj", "`contribution` is -log D; that is the number of places of one coordinate, and there are D! orders of all.", log_orders=lambda self, D: math.log(D)),
        wrong("d_log_d", "wrong function", "ldj", "`contribution` is -D log D, as if places could be taken twice; a permutation uses each one once.", log_orders=lambda self, D: D * math.log(D)),
        wrong("d_log_2", "wrong function", "ldj", "`contribution` is -D log 2, that of D signs; sorting forgets an order, one of D!.", log_orders=lambda self, D: D * math.log(2)),
        wrong("one_less", "missing term", "ldj", "`contribution` is -log (D - 1)!: the gamma function at D is the factorial of D - 1.", log_orders=lambda self, D: math.lgamma(D)),
        wrong("one_more", "off by one", "ldj", "`contribution` is -log (D + 1)!; there are D! orders of D numbers.", log_orders=lambda self, D: math.lgamma(D + 2)),
        wrong("no_log", "missing function", "ldj", "`contribution` is -D! itself; the logarithm of the number of orders is asked for.", log_orders=lambda self, D: math.factorial(D)),
        wrong("probability", "missing function", "ldj", "`contribution` is 1 / D! itself; the logarithm of the probability is asked for.", log_orders=lambda self, D: -1 / math.factorial(D)),
        wrong("minus_d", "missing function", "ldj", "`contribution` is -D; it is the logarithm of D! that is subtracted.", log_orders=lambda self, D: D),
        wrong("batch_factorial", "exchanged", "ldj", "`contribution` counts the orders of the batch; it is the coordinates of a row that are sorted.", paid=lambda self, x: torch.full((len(x),), -math.lgamma(len(x) + 1))),
        wrong("overflow", "wrong function", "ldj", "D! is multiplied out before its logarithm is taken: from D = 21 on it does not fit into an integer of 64 bits.", log_orders=sort_int64),
        wrong("scalar", "shape", "ldj", "`contribution` is one number for the whole batch; every row needs its own, shape (B,).", paid=lambda self, x: torch.tensor(-math.lgamma(x.shape[1] + 1))),
        wrong("keepdim", "shape", "ldj", "`contribution` has shape (B, 1); it should be (B,).", paid=lambda self, x: PlainSort.paid(self, x)[:, None]),
        wrong("no_sum", "shape", "ldj", "`contribution` has one number for each coordinate; every row needs one, shape (B,).", paid=lambda self, x: torch.full(x.shape, -math.lgamma(x.shape[1] + 1))),
        wrong("by_dimension", "shape", "ldj", "`contribution` has one number for each dimension; every row of the batch needs one, shape (B,).", paid=lambda self, x: torch.full((x.shape[1],), -math.lgamma(x.shape[1] + 1))),
        wrong("times_batch", "reduction", "ldj", "`contribution` is multiplied by the size of the batch; every row counts once.", paid=lambda self, x: len(x) * PlainSort.paid(self, x)),
        wrong("descending", "direction", "forward", "forward sorts in descending order; ascending is asked for.", order=lambda self, x: x.sort(1, descending=True).values),
        wrong("over_batch", "wrong axis", "forward", "forward sorts along the batch; it is the coordinates of each row that are to be sorted.", order=lambda self, x: x.sort(0).values),
        wrong("all_entries", "wrong axis", "forward", "forward sorts all entries of the batch together; each row is sorted by itself.", order=lambda self, x: x.flatten().sort().values.view_as(x)),
        wrong("rows_sorted", "wrong axis", "forward", "forward puts the rows of the batch in order; it is the coordinates within each row that are to be sorted.", order=lambda self, x: x[x[:, 0].argsort()]),
        wrong("indices", "exchanged", "forward", "forward returns the indices of the sorting; z holds the sorted values.", order=lambda self, x: x.argsort(1)),
        wrong("not_sorted", "missing function", "forward", "forward returns x as it came: nothing is sorted.", order=lambda self, x: x),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came, so all samples are in ascending order; a permutation is to be drawn.", inverse=lambda self, z: z),
        wrong("inverse_flip", "wrong function", "inverse", "inverse turns the order round; it should draw one of all D! orders.", inverse=lambda self, z: z.flip(1)),
        wrong("inverse_one_order", "reduction", "inverse", "inverse draws one permutation for the whole batch; every row needs its own.", shuffle=lambda self, z: torch.randperm(z.shape[1]).expand(len(z), -1)),
        wrong("inverse_rows", "wrong axis", "inverse", "inverse shuffles the rows of the batch; it is the coordinates within each row that are to be shuffled.", inverse=lambda self, z: z[torch.randperm(len(z))]),
        wrong("inverse_columns", "wrong axis", "inverse", "inverse shuffles each column over the batch: rows exchange their numbers.", shuffle=lambda self, z: torch.rand_like(z).argsort(0), inverse=lambda self, z: z.gather(0, self.shuffle(z))),
        wrong("inverse_all_entries", "wrong axis", "inverse", "inverse shuffles all entries of the batch together: rows exchange their numbers.", inverse=lambda self, z: z.flatten()[torch.randperm(z.numel())].view_as(z)),
        wrong("inverse_repeats", "wrong function", "inverse", "inverse draws each place for itself, so some numbers come twice and others get lost; a permutation uses each once.", shuffle=lambda self, z: torch.randint(z.shape[1], z.shape)),
        wrong("inverse_rolled", "wrong function", "inverse", "inverse only shifts the numbers round in a circle: that reaches D of the D! orders.", shuffle=sort_rolled),
        wrong("inverse_swapped", "wrong function", "inverse", "inverse exchanges two numbers only: that does not reach all D! orders.", shuffle=sort_swapped),
        wrong("x_detached", "detached", "gradient", "`z` is cut off from the computation graph, so nothing before this layer could be trained.", order=lambda self, x: x.sort(1).values.detach()),
        survae_exchanged(PlainSort),
    ),
    compare=survae_sized("forward.z", "forward.contribution", "gradient.along", "x after") + ("D=30 forward.contribution", "inverse draws.orders", "inverse draws.own", "D=2 forward of inverse.z"),
    faults=survae_stored("inverse of forward.x", "x", "the order"),
    picture=survae_picture(lambda inputs, z: survae_normal(z[:, :1], -0.8, 0.5) + survae_normal(z[:, 1:], 0.9, 0.7)),
)


# --- argmax_layer ----------------------------------------------------------------------------------------------------

ARGMAX_K = 8  # as many as rows: what is summed or broadcast along the wrong one of the two still gives numbers, which tell more than an exception
ARGMAX_BASE = np.array([0.7, -0.2])  # of the case in the plane: P(x = 0) is that of the first coordinate being the larger
ARGMAX_Q = (0.5, 1.2), (-1.0, 1.5)  # mean and deviation of v_0 and of v_1 - v_0


def argmax_inputs(rng):
    def classes():
        """The last class comes last, so that the rows before do not have it."""
        return np.append(rng.permutation([0, 1, 2, 3, 5, 6]), [7, 7])

    x = classes()
    while (np.eye(ARGMAX_K)[x] == np.eye(ARGMAX_K)[x].T).all(1).sum() > 4:  # rows and columns must not look alike
        x = classes()
    inputs = {"x": x, "z": 1.5 * rng.standard_normal((B, ARGMAX_K)), "noise": rng.standard_normal((B, ARGMAX_K))} | loss_inputs(rng, ARGMAX_K)
    inputs |= {"net.table": 1.2 * rng.standard_normal((ARGMAX_K, ARGMAX_K)), "net.log_scale": rng.uniform(-0.5, 0.3, ARGMAX_K)}
    inputs |= {"direction.table": rng.standard_normal((ARGMAX_K, ARGMAX_K)), "direction.log_scale": rng.standard_normal(ARGMAX_K)}
    top, gap = (a.ravel() for a in np.meshgrid(np.arange(-8, 8.1, 0.25), np.arange(-16, 27.1, 0.25)))
    log_q = survae_normal(np.stack([top, gap], 1), *np.array(ARGMAX_Q).T)
    return inputs | {"plane v": np.stack([top, top + gap], 1), "plane log_q": log_q, "grid": 1.5 * rng.standard_normal((300, 2))}


def argmax_v(inputs, k=0):
    x = inputs["x"]
    return inputs["net.table"][x] + np.exp(inputs["net.log_scale"][x])[:, None] * np.roll(inputs["noise"], -k, 0)


def argmax_bent(v, x):
    top = v[np.arange(len(x)), x][:, None]
    z = top - np.logaddexp(0, top - v)
    z[np.arange(len(x)), x] = top[:, 0]
    return z


def argmax_value(inputs, outputs, reference):
    x, got = inputs["x"], outputs["forward.z"]
    wants = [argmax_bent(argmax_v(inputs, k), x) for k in range(SURVAE_ROLLS)]
    if not any(got.shape == w.shape and laws.close(got, w, max(laws.tolerance(got), 1e-6)).all() for w in wants):
        laws.expect("z", x, got, wants[0], why=": z_x = v_x, and the others are bent below it")


def argmax_back(inputs, outputs, reference):
    x, z = inputs["x"], outputs["forward.z"]
    if z.shape != (B, ARGMAX_K):
        raise Fail(f"`z` has shape {z.shape}; it should be (B, K) = {(B, ARGMAX_K)}.")
    if (z.argmax(1) != x).any():
        i = int((z.argmax(1) != x).argmax())
        raise Fail("The largest coordinate of z is not that of the class.", f"x = {x[i]}: z = {laws.point(z[i])}")
    survae_back(inputs, outputs, "", "x", "inverse of forward.x", "inverse(forward(x))")


def argmax_inverse(inputs, outputs, reference):
    z, x = inputs["z"], outputs["inverse.x"]
    if x.dtype.kind == "f" and not np.array_equal(x, x.round()):
        raise Fail("`x` from inverse holds no whole numbers; it is the class, an index from 0 to K - 1.")
    laws.expect("x", z, x, z.argmax(1), 0, " from inverse")


def argmax_paid(inputs, outputs, reference):
    """From the v that are in the student's own z, whichever call of q they are from."""
    x, z, best = inputs["x"], outputs["forward.z"], None
    for k in range(SURVAE_ROLLS):
        v = argmax_v(inputs, k)
        slope = survae_log_sigmoid(v[np.arange(B), x][:, None] - v)
        slope[np.arange(B), x] = 0
        want = slope.sum(1) - survae_normal(v, inputs["net.table"][x], np.exp(inputs["net.log_scale"][x])[:, None])
        if best is None or z.shape == v.shape and laws.close(z, argmax_bent(v, x), 1e-4).all():
            best = want
    survae_paid(inputs, outputs, "forward.contribution", x, best)


def argmax_mass(inputs, outputs, reference):
    """Over a grid of v, dense enough for densities of deviation 1 (trapezoid rule, step 0.25): the mean of exp(log p(z) + contribution), and of its log."""
    z, paid, log_q = outputs["forward on the plane.z"], outputs["forward on the plane.contribution"], inputs["plane log_q"]
    if z.shape != (len(log_q), 2) or paid.shape != log_q.shape:
        raise Fail(f"For {len(log_q)} classes, K = 2, `z` has shape {z.shape} and `contribution` {paid.shape}; they should be {(len(log_q), 2)} and {log_q.shape}.")
    value, q = survae_normal(z.astype(float), ARGMAX_BASE, 1.0) + paid, np.exp(log_q) * 0.25**2
    # q is tiny where -log_q is large: one exponential for both
    total, mean = np.exp(np.minimum(value + log_q, 50)).sum() * 0.25**2, value @ q
    truth = 0.5 * (1 + math.erf((ARGMAX_BASE[0] - ARGMAX_BASE[1]) / 2))
    if mean > math.log(truth) + 1e-3:
        raise Fail("log p(z) + contribution is no lower bound: its mean over the draws lies above log P(x).", f"log P(x) = {math.log(truth):.4g}, the mean is {mean:.4g}")
    if abs(total / truth - 1) > 1e-3:
        raise Fail("The mean of exp(log p(z) + contribution) over the draws is not P(x).", f"P(x) = {truth:.4g}, the mean is {total:.4g}")


def argmax_picture(inputs, outputs, reference):
    """v of two classes, and what forward makes of them: each class on its own side of the diagonal."""
    figure, axes = plotting.side_by_side(3, ["v, as q drew it", "yours: z", "reference: z"], size=3.4)
    for ax, z in zip(axes, (inputs["grid"], outputs.arrays.get("picture.z"), reference.arrays["picture.z"])):
        if z is None or z.shape != inputs["grid"].shape or not np.isfinite(z).all():
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            continue
        for k, colour in enumerate(("blue", "red")):
            ax.plot(*z[k::2].T, ".", color=plotting.PALETTE[colour], label=f"class {k}")
        ax.plot([-5, 5], [-5, 5], ":", color="black")
        ax.set_xlim(-5, 5), ax.set_ylim(-5, 5), ax.set_xlabel("coordinate 0", fontsize=plotting.FONT)
    axes[0].legend(fontsize=plotting.FONT - 3)
    return figure


def argmax_faults(inputs, outputs):
    """A batch without the last class gives something else than in a batch that has it, where all is right."""
    argmax_value(inputs, outputs, None)
    argmax_paid(inputs, outputs, None)
    for name in ("z", "contribution"):
        part = outputs.arrays.get(f"forward without the last class.{name}")
        if part is None or part.shape != outputs[f"forward.{name}"][:ARGMAX_K - 2].shape or not laws.close(part, outputs[f"forward.{name}"][:ARGMAX_K - 2], 1e-4).all():
            return [("classes_counted", "missing term", "forward", "The number of classes is read off from x, as `F.one_hot(x)` does: the last class need not occur in x, so K has to be said, the number of columns of v.")]
    return []


class PlainArgmax:
    def __init__(self, q):
        self.q = q

    def draw(self, x):
        return self.q(x)

    def top(self, v, x):
        return v.gather(1, x[:, None])

    def bend(self, v, top):
        return top - F.softplus(top - v)

    def merge(self, bent, v, x):
        return torch.where(self.mask(v, x), v, bent)

    def mask(self, v, x):
        return F.one_hot(x, v.shape[1]).bool()

    def slopes(self, v, top):
        return F.logsigmoid(top - v)

    def others(self, slopes, v, x):
        return slopes.masked_fill(self.mask(v, x), 0).sum(1)

    def spent(self, log_q):
        return -log_q

    def paid(self, v, log_q, x):
        return self.spent(log_q) + self.others(self.slopes(v, self.top(v, x)), v, x)

    def forward(self, x):
        v, log_q = self.draw(x)
        return self.merge(self.bend(v, self.top(v, x)), v, x), self.paid(v, log_q, x)

    def inverse(self, z):
        return z.argmax(1)


wrong = deviating(PlainArgmax)
ARGMAX = Exercise(
    id="argmax_layer", title="Classes by argmax", minutes=20, difficulty=4,
    hints=(
        "v is free; z must have its largest entry at place x. Keep v_x, and bend every other v_i below it: the softplus of the distance is positive, so subtracting it from v_x never passes v_x.",
        "z has the density of v divided by the slopes dz_i / dv_i of the bent coordinates, and these are sigmoids. Take the logarithm of that density with a minus sign; the place x is not bent, so it has no slope.",
    ),
    inputs=argmax_inputs, reference=flowkit_class("surjective", "Argmax"),
    cases=(
        Case("forward: z_x = v_x, z_i = v_x - softplus(v_x - v_i)", 2, argmax_value),
        Case("the largest coordinate of z is that of the class", 1, argmax_back),
        Case("inverse: x = argmax z, one class for each row", 1, argmax_inverse),
        Case("contribution = -log_q + sum of log sigmoid(v_x - v_i), i not x", 2.5, argmax_paid),
        Case("a lower bound in the mean; the mean of exp is P(x)", 1, argmax_mass),
        Case("one row alone, inputs left as they were", 0.5, lambda i, o, r: survae_kept(i, o)),
        Case("gradients reach q", 1, lambda i, o, r: gradient_arrives(o, "", "z and contribution", "the parameters of `q`")),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainArgmax, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean"),
        wrong("log_q_sign", "sign", "ldj", "In `contribution` log_q has the wrong sign: what q spent is subtracted.", spent=lambda self, log_q: log_q),
        wrong("log_q_missing", "missing term", "ldj", "In `contribution` log_q is missing: the draw of v has to be paid for.", spent=lambda self, log_q: 0 * log_q),
        wrong("slope_missing", "missing term", "ldj", "In `contribution` the slopes of the softplus are missing: bending v changes its density.", others=lambda self, s, v, x: 0 * s.sum(1)),
        wrong("slope_sign", "sign", "ldj", "In `contribution` the log-slopes have the wrong sign: bending presses the others together, which makes the density of z larger, and minus its logarithm smaller.", others=lambda self, s, v, x: -PlainArgmax.others(self, s, v, x)),
        wrong("slope_turned", "exchanged", "ldj", "In `contribution` v_x and v_i have changed places inside the logsigmoid.", slopes=lambda self, v, top: F.logsigmoid(v - top)),
        wrong("slope_no_log", "missing function", "ldj", "In `contribution` the slopes themselves are added up; it is their logarithms that are added.", slopes=lambda self, v, top: torch.sigmoid(top - v)),
        wrong("slope_no_sigmoid", "missing function", "ldj", "In `contribution` the distances v_x - v_i are added up; the slope of the softplus is their sigmoid, whose logarithm counts.", slopes=lambda self, v, top: top - v),
        wrong("slope_softplus", "wrong function", "ldj", "In `contribution` stands the softplus itself; its derivative is asked for, a sigmoid, and its logarithm.", slopes=lambda self, v, top: F.softplus(top - v)),
        wrong("slope_tanh", "wrong function", "ldj", "In `contribution` stands a tanh; the derivative of the softplus is a sigmoid.", slopes=lambda self, v, top: (top - v).tanh()),
        wrong("slope_sum_of_v", "sign", "ldj", "In `contribution` v_x and v_i are added inside the logsigmoid; it is their difference.", slopes=lambda self, v, top: F.logsigmoid(top + v)),
        wrong("slope_v_x", "missing term", "ldj", "In `contribution` the logsigmoid is taken at v_x alone; it is that of the difference v_x - v_i.", slopes=lambda self, v, top: F.logsigmoid(top.expand_as(v))),
        wrong("slope_v_i", "missing term", "ldj", "In `contribution` the logsigmoid is taken at v_i alone; it is that of the difference v_x - v_i.", slopes=lambda self, v, top: F.logsigmoid(-v)),
        wrong("slope_at_z", "wrong function", "ldj", "In `contribution` the slope is taken at z_i; it is the derivative with respect to v_i, at v_i.", slopes=lambda self, v, top: F.logsigmoid(top - self.bend(v, top))),
        wrong("class_counted", "extra term", "ldj", "`contribution` counts the coordinate of the class as well, with log sigmoid(0) = -log 2; it is not bent, so it has no slope to pay for.", others=lambda self, s, v, x: s.sum(1)),
        wrong("slope_no_sum", "shape", "ldj", "In `contribution` the sum of the log-slopes over the classes is missing, so it has more than one number for each row.", others=lambda self, s, v, x: s.masked_fill(self.mask(v, x), 0)),
        wrong("slope_over_batch", "wrong axis", "ldj", "In `contribution` the log-slopes are summed over the batch; they are to be summed over the classes of each row.", others=lambda self, s, v, x: s.masked_fill(self.mask(v, x), 0).sum(0)),
        wrong("index_row", "wrong axis", "forward", "The classes are looked up as a row, so v_x is taken from other rows of the batch; each row of v has its own class, in a column of indices.", top=lambda self, v, x: v.gather(1, x[None, :])),
        wrong("slope_mean", "reduction", "ldj", "In `contribution` the log-slopes are averaged; the logarithm of a product is a sum.", others=lambda self, s, v, x: PlainArgmax.others(self, s, v, x) / v.shape[1]),
        wrong("slope_mean_others", "reduction", "ldj", "In `contribution` the log-slopes are averaged over the other classes; the logarithm of a product is a sum.", others=lambda self, s, v, x: PlainArgmax.others(self, s, v, x) / (v.shape[1] - 1)),
        wrong("slope_only_class", "exchanged", "ldj", "In `contribution` the wrong side of the mask is summed: the coordinate of the class is counted, and the others are left out.", others=lambda self, s, v, x: s.masked_fill(~self.mask(v, x), 0).sum(1)),
        wrong("two_calls", "wrong function", "ldj", "v comes from one call of q and log_q from another: each call draws anew, so the two do not belong together.", draw=lambda self, x: (self.q(x)[0], self.q(x)[1])),
        wrong("class_bent", "missing function", "forward", "The coordinate of the class is bent too, to v_x - log 2; z_x = v_x stays as it is, or it may not be the largest.", merge=lambda self, bent, v, x: bent),
        wrong("not_bent", "missing function", "forward", "forward returns v as q drew it; nothing makes its largest entry that of the class.", merge=lambda self, bent, v, x: v),
        wrong("mask_turned", "exchanged", "forward", "The two sides of the mask have changed places: the class is bent, and the others are left as they were.", merge=lambda self, bent, v, x: torch.where(self.mask(v, x), bent, v)),
        wrong("bent_above", "sign", "forward", "The softplus is added to v_x, so the other coordinates lie above that of the class; it is subtracted.", bend=lambda self, v, top: top + F.softplus(top - v)),
        wrong("bend_turned", "exchanged", "forward", "v_x and v_i have changed places inside the softplus: the larger v_i was, the smaller z_i becomes.", bend=lambda self, v, top: top - F.softplus(v - top)),
        wrong("bend_no_top", "missing term", "forward", "The bent coordinates start from 0 instead of v_x: z_i is minus the softplus alone.", bend=lambda self, v, top: -F.softplus(top - v)),
        wrong("bend_v_i", "wrong function", "forward", "The softplus is subtracted from v_i; it is subtracted from v_x, the threshold.", bend=lambda self, v, top: v - F.softplus(top - v)),
        wrong("bend_only_softplus", "missing term", "forward", "z_i is the softplus alone; it is subtracted from v_x.", bend=lambda self, v, top: F.softplus(top - v)),
        wrong("bend_sum", "sign", "forward", "v_x and v_i are added inside the softplus; it is that of their difference.", bend=lambda self, v, top: top - F.softplus(top + v)),
        wrong("bend_at_v_x", "missing term", "forward", "The softplus is taken of v_x alone; it is that of the difference v_x - v_i.", bend=lambda self, v, top: top - F.softplus(top).expand_as(v)),
        wrong("bend_at_v_i", "missing term", "forward", "The softplus is taken of -v_i alone; it is that of the difference v_x - v_i.", bend=lambda self, v, top: top - F.softplus(-v)),
        wrong("bend_product", "wrong function", "forward", "v_x and the softplus are multiplied; the softplus is subtracted from v_x.", bend=lambda self, v, top: top * F.softplus(top - v)),
        wrong("bend_turned_round", "sign", "forward", "v_x is subtracted from the softplus; it is the other way round.", bend=lambda self, v, top: F.softplus(top - v) - top),
        wrong("bend_exp", "wrong function", "forward", "The distance is bent by exp, whose slope is not the sigmoid that `contribution` has; the softplus is asked for.", bend=lambda self, v, top: top - (top - v).exp()),
        wrong("hard_minimum", "wrong function", "forward", "The other coordinates are cut off at v_x; many v then give the same z, which has no density any more. The softplus bends instead.", bend=lambda self, v, top: torch.minimum(v, top)),
        wrong("top_is_max", "wrong function", "forward", "The threshold is the largest entry of v; it is v_x, the entry at the place of the class.", top=lambda self, v, x: v.max(1, keepdim=True).values),
        wrong("inverse_over_batch", "wrong axis", "inverse", "inverse takes the argmax over the batch; it is over the K coordinates of each row.", inverse=lambda self, z: z.argmax(0)),
        wrong("inverse_all", "wrong axis", "inverse", "inverse takes one argmax of the whole batch; every row has its own.", inverse=lambda self, z: z.argmax()),
        wrong("inverse_keepdim", "shape", "inverse", "`x` from inverse has shape (B, 1); it should be (B,), one class for each row.", inverse=lambda self, z: z.argmax(1, keepdim=True)),
        wrong("inverse_max", "wrong function", "inverse", "inverse returns the largest value; the class is its place.", inverse=lambda self, z: z.max(1).values),
        wrong("inverse_argmin", "direction", "inverse", "inverse looks for the smallest coordinate; the class is the place of the largest.", inverse=lambda self, z: z.argmin(1)),
        wrong("inverse_softmax", "wrong function", "inverse", "inverse returns probabilities; the class is the place of the largest coordinate, one whole number a row.", inverse=lambda self, z: z.softmax(1)),
        wrong("inverse_sampled", "extra term", "inverse", "inverse draws the class from a softmax; argmax is deterministic, all the chance is in forward.", inverse=lambda self, z: torch.multinomial(z.softmax(1), 1)[:, 0]),
        wrong("inverse_one_hot", "missing function", "inverse", "inverse returns one-hot vectors; the class itself is asked for, one whole number a row.", inverse=lambda self, z: F.one_hot(z.argmax(1), z.shape[1])),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came; the place of its largest coordinate is the class.", inverse=lambda self, z: z),
        wrong("z_detached", "detached", "gradient", "`z` is cut off from the computation graph, so q could not be trained through it.", merge=lambda self, bent, v, x: PlainArgmax.merge(self, bent, v, x).detach()),
        wrong("all_detached", "detached", "gradient", "What q returns is cut off from the computation graph (detach or no_grad), so q could not be trained.", draw=lambda self, x: tuple(t.detach() for t in self.q(x))),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so q would not feel what its draws cost.", paid=lambda self, *a: PlainArgmax.paid(self, *a).detach()),
        survae_exchanged(PlainArgmax),
    ),
    compare=("forward.z", "forward.contribution", "inverse.x", "gradient.along", "x after"), light=survae_light("plane v"), faults=argmax_faults, picture=argmax_picture,
)


# --- stochastic_layer ------------------------------------------------------------------------------------------------

VAE_D, VAE_Z = 3, 2


def vae_inputs(rng):
    inputs = {"x": 1.5 * rng.standard_normal((B, VAE_D)), "z": 1.2 * rng.standard_normal((B, VAE_Z)), "z noise": rng.standard_normal((B, VAE_Z)), "x noise": rng.standard_normal((B, VAE_D))}
    inputs |= net_inputs(rng, VAE_D, 2 * VAE_Z, "encoder ") | net_inputs(rng, VAE_Z, 2 * VAE_D, "decoder ") | loss_inputs(rng, VAE_Z)
    inputs |= survae_x(rng, inputs["x"])
    a, b, s = rng.uniform(0.8, 1.2), rng.uniform(-0.3, 0.3), rng.uniform(0.6, 0.9)
    v = 1 / (1 + (a / s) ** 2)  # variance of the posterior of a linear decoder
    gain = v * a / s**2
    return inputs | {"line p": np.array([a, b, s])} | survae_line(rng, (gain, -gain * b, math.sqrt(v)), (gain - 0.3, 0.3, 1.2 * math.sqrt(v)))


def vae_log_x(inputs, x):
    a, b, s = inputs["line p"]
    return survae_normal(x[:, None], b, math.hypot(a, s))


def vae_base(inputs, z):
    return survae_normal(z, 0, 1.0)


def vae_value(inputs, outputs, reference):
    x = inputs["x"]
    survae_drawn("z", x, outputs["forward.z"], *survae_moments(inputs, "encoder ", x), inputs["z noise"], why=": it is a draw of encoder(x)")


def vae_paid(inputs, outputs, reference):
    x, z = inputs["x"], outputs["forward.z"]
    if z.shape != (B, VAE_Z):
        raise Fail(f"`z` has shape {z.shape}; it should be {(B, VAE_Z)}, that of a draw of encoder(x).")
    z = z.astype(float)
    want = survae_normal(x, *survae_moments(inputs, "decoder ", z)) - survae_normal(z, *survae_moments(inputs, "encoder ", x))
    survae_paid(inputs, outputs, "forward.contribution", x, want, " for the z that forward returned")


def vae_inverse(inputs, outputs, reference):
    z = inputs["z"]
    survae_drawn("x", z, outputs["inverse.x"], *survae_moments(inputs, "decoder ", z), inputs["x noise"], why=" from inverse: it is a draw of decoder(z)")


class PlainVAE:
    def __init__(self, encoder, decoder):
        self.encoder, self.decoder = encoder, decoder

    def draw(self, q):
        return q.rsample()

    def log_p(self, x, z):
        return self.decoder(z).log_prob(x)

    def log_q(self, q, z):
        return q.log_prob(z)

    def join(self, p, q, z):
        return p - q

    def paid(self, x, z, q):
        return self.join(self.log_p(x, z), self.log_q(q, z), z)

    def forward(self, x):
        q = self.encoder(x)
        z = self.draw(q)
        return z, self.paid(x, z, q)

    def inverse(self, z):
        return self.decoder(z).sample()


def vae_twice(self, x):
    """z from one distribution's draw, log q at another's."""
    q = self.encoder(x)
    z = q.rsample()
    return z, self.log_p(x, z) - q.log_prob(q.rsample())


def vae_decoder_redrawn(self, x):
    q = self.encoder(x)
    z = q.rsample()
    return z, self.log_p(x, q.rsample()) - q.log_prob(z)


def vae_kl(self, q, z):
    """KL(q || standard normal) in closed form, in place of log q."""
    mean, var = q.mean, q.variance
    return 0.5 * (mean**2 + var - var.log() - 1).sum(-1)


wrong = deviating(PlainVAE)
VAE = Exercise(
    id="stochastic_layer", title="Both ways at random: a VAE as a layer", minutes=12, difficulty=3,
    hints=(
        "Follow the table's row for a stochastic layer: what the way from z to x gives, minus what the way from x to z spent. The prior of z is not among it: the flow that follows has it.",
        "Draw z once from `encoder(x)`, in the way that lets gradients pass (`rsample`), and use that very z for both logarithms. inverse is one draw of `decoder(z)`.",
    ),
    inputs=vae_inputs, reference=flowkit_class("surjective", "VAELayer"),
    cases=(
        Case("forward draws z from encoder(x)", 1.5, vae_value),
        Case("contribution = log p(x | z) - log q(z | x), one number for each row", 2.5, vae_paid),
        Case("inverse draws x from decoder(z)", 1, vae_inverse),
        Case("a lower bound in the mean, and exact for the true posterior", 1, survae_bound("encoder", vae_base, vae_log_x)),
        Case("one row alone, inputs left as they were", 0.5, lambda i, o, r: survae_kept(i, o)),
        Case("gradients reach x and both nets, through the draw of z", 1, lambda i, o, r: gradient_arrives(o, "", "z and contribution", "x and the weights of `encoder` and `decoder`")),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainVAE, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` has the wrong sign: this is a loss, log q - log p; the bound on log p(x) needs log p - log q."),
        wrong("both_added", "sign", "ldj", "log q is added; what the draw of z spent is subtracted.", join=lambda self, p, q, z: p + q),
        wrong("log_q_missing", "missing term", "ldj", "log q(z | x) is missing: the draw of z has to be paid for, or the encoder would shrink to a point.", join=lambda self, p, q, z: p),
        wrong("log_p_missing", "missing term", "ldj", "log p(x | z) is missing: nothing asks how well z explains x.", join=lambda self, p, q, z: -q),
        wrong("log_q_alone", "missing term", "ldj", "`contribution` is log q alone; it is log p(x | z) that log q is subtracted from.", join=lambda self, p, q, z: q),
        wrong("prior_too", "extra term", "ldj", "`contribution` adds the log-density of z under a standard normal; the flow that follows has its own prior, so z would count twice.", join=lambda self, p, q, z: p - q + standard_normal(z)),
        wrong("kl", "wrong function", "ldj", "The KL divergence from a standard normal stands where log q should: it has the prior in it, which belongs to the flow that follows.", log_q=vae_kl),
        wrong("log_q_at_mean", "wrong function", "ldj", "log q is taken at the encoder's mean; it is needed at the z that was drawn.", log_q=lambda self, q, z: q.log_prob(q.mean)),
        wrong("entropy", "wrong function", "ldj", "Minus the entropy stands where log q should: that is its mean, not its value at the z that was drawn.", log_q=lambda self, q, z: -(0.5 + 0.5 * LOG_2PI + 0.5 * q.variance.log()).sum(-1)),
        wrong("log_p_at_mean", "wrong function", "ldj", "log p(x | z) is taken at the encoder's mean; it is needed at the z that was drawn.", log_p=lambda self, x, z: self.decoder(self.encoder(x).mean).log_prob(x)),
        wrong("squared_error", "wrong function", "ldj", "The squared error stands where log p(x | z) should; the decoder has a variance, and its log-density takes account of it.", log_p=lambda self, x, z: -((x - self.decoder(z).mean) ** 2).sum(-1)),
        wrong("log_q_of_another", "wrong function", "ldj", "log q is taken at a second draw; it is needed at the z that forward returns.", forward=vae_twice),
        wrong("log_p_of_another", "wrong function", "ldj", "log p(x | z) is taken at a second draw of z; it is needed at the z that forward returns.", forward=vae_decoder_redrawn),
        wrong("p_of_a_draw", "wrong function", "ldj", "log p(x | z) is taken at a draw of the decoder; it is needed at the x that was given.", log_p=lambda self, x, z: (lambda p: p.log_prob(p.sample()))(self.decoder(z))),
        wrong("z_mean", "missing function", "forward", "z is the encoder's mean; it should be drawn.", draw=lambda self, q: q.mean),
        wrong("z_from_prior", "wrong function", "forward", "z is drawn from a standard normal, whatever x is; it is drawn from encoder(x).", draw=lambda self, q: torch.randn_like(q.mean)),
        wrong("z_not_reparameterised", "detached", "gradient", "z is drawn by `sample`, which cuts it off from the computation graph: the encoder would not learn from log p(x | z).", draw=lambda self, q: q.sample()),
        wrong("z_returned_detached", "detached", "gradient", "The z that is returned is cut off from the computation graph, so the flow that follows could not train the encoder.", forward=lambda self, x: (lambda z, paid: (z.detach(), paid))(*PlainVAE.forward(self, x))),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so neither encoder nor decoder could be trained by it.", paid=lambda self, *a: PlainVAE.paid(self, *a).detach()),
        wrong("inverse_mean", "missing function", "inverse", "inverse returns the decoder's mean; it should draw x.", inverse=lambda self, z: self.decoder(z).mean),
        wrong("inverse_encoder", "direction", "inverse", "inverse asks the encoder, as forward does; x is drawn from decoder(z).", inverse=lambda self, z: self.encoder(z).sample()),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came; x is drawn from decoder(z).", inverse=lambda self, z: z),
        wrong("inverse_distribution", "type", "inverse", "inverse returns the distribution itself; a draw of it is asked for.", inverse=lambda self, z: self.decoder(z)),
        wrong("inverse_log_prob", "extra term", "inverse", "inverse returns a pair; it should return the draw x alone.", inverse=lambda self, z: (lambda p, x: (x, p.log_prob(x)))(self.decoder(z), self.decoder(z).sample())),
        wrong("exchanged", "exchanged", "parameters", "Encoder and decoder have changed places.", __init__=lambda self, encoder, decoder: PlainVAE.__init__(self, decoder, encoder)),
        wrong("asked_detached", "detached", "gradient", "What the encoder is asked about is cut off from x (detach or no_grad): earlier layers would not learn from it.", forward=lambda self, x: (lambda q, z: (z, self.paid(x, z, q)))(*(lambda q: (q, self.draw(q)))(self.encoder(x.detach())))),
        wrong("x_detached", "detached", "gradient", "The x in log p(x | z) is cut off from x (detach or no_grad): earlier layers would not learn from it.", log_p=lambda self, x, z: self.decoder(z).log_prob(x.detach())),
        survae_exchanged(PlainVAE),
    ),
    compare=("forward.z", "forward.contribution", "inverse.x", "gradient.along", "x after"), light=survae_light("line x"),
    picture=survae_bound_picture("encoder", vae_base, vae_log_x),
)


EXERCISES = (SLICE, SPLIT, ABS, MAX, SORT, ARGMAX, VAE)


EXERCISES = (MODULAR, ONE_HOT, ROUND, IDF, VAE, UNIFORM, BOUND, SLICE, SPLIT, ABS, MAX, SORT, ARGMAX)
