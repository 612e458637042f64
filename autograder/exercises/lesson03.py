"""Lesson 03, autoregressive flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import math
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception, Outputs
from autograder.exercises.common import (
    B, both_sizes, deviating, flowkit_class, function, gradient_arrives, layer_inputs, ldj_mistakes, loss_inputs, net_inputs,
)
from autograder.exercises.lesson02 import BIJECTION, NO_SUM, returns_exchanged, sized
from autograder.judge import compared
from autograder.probes.common import SIZES, sizes
from autograder.probes.lesson03 import AFFINE_FORMS, CAUSAL_LAYERS, CAUSAL_STACK, CAUSAL_TRAINED, DDSF_LAYERS, DDSF_NAMES, pixel_calls
from flowkit import plotting

ASSIGNMENT = "03_autoregressive"
TITLE = "Autoregressive flows"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.autoregressive", "flowkit.nets", "flowkit.elementwise", "flowkit.coupling")
TEXTS = {}

# =====================================================================================================================
# Masks, affine autoregressive flows, NAF: made_masks, affine_forms, maf, iaf, naf
# =====================================================================================================================

# --- made_masks ------------------------------------------------------------------------------------------------------

MADE_WIDE = ("two dimensions", "one hidden layer", "two hidden layers", "three hidden layers")  # with all widths >= dim - 1
MADE_NETS = (*MADE_WIDE, "narrow layers")
MADE_SHOWN = "one hidden layer"


def made_inputs(rng):
    low, high = rng.integers(6, 9), rng.integers(9, 13)
    nets = zip(MADE_NETS, ((2, (rng.integers(3, 8),), 2), (4, (low,), 3), (5, (4, high), 1), (6, (high, 5, low), 2), (7, (2, 3), 2)))
    return {f"{name}.{k}": np.array(v) for name, net in nets for k, v in zip(("dim", "hidden", "params"), net)}


def made_net(inputs, name):
    return int(inputs[f"{name}.dim"]), [int(h) for h in inputs[f"{name}.hidden"]], int(inputs[f"{name}.params"])


def made_words(inputs, name):
    dim, hidden, params = made_net(inputs, name)
    return f"dim = {dim}, hidden = {hidden}, out_per_dim = {params}"


def made_shapes(inputs, outputs, reference):
    for name in MADE_NETS:
        dim, hidden, params = made_net(inputs, name)
        widths = [dim, *hidden, params * dim]
        want, got = [(b, a) for a, b in zip(widths, widths[1:])], [tuple(int(n) for n in s) for s in outputs[f"{name}.shapes"]]
        if len(got) != len(want):
            raise Fail(f"There are {len(got)} masks for {len(hidden)} hidden layers; each hidden layer and the output layer has one.", made_words(inputs, name))
        for i, (g, w) in enumerate(zip(got, want), 1):
            if g != w:
                raise Fail(f"Mask {i} of {len(want)} has shape {g}; it should be (out, in) = {w}.", made_words(inputs, name))
        if not outputs[f"{name}.binary"]:
            raise Fail("A mask holds other numbers than 0 and 1.", made_words(inputs, name))


def made_paths(inputs, outputs, name):
    """Which input reaches which output: (params, dim, dim), [p, i, j]; Fail without one for each parameter of each dimension."""
    dim, _, params = made_net(inputs, name)
    paths = outputs[f"{name}.paths"]
    if paths.shape != (params * dim, dim):
        raise Fail(f"The masks lead to {paths.shape[0]} outputs; {params} for each of {dim} dimensions are asked for.", made_words(inputs, name))
    return paths.reshape(params, dim, dim) > 0


def made_blind(names):
    """Each block of the product of the masks is strictly lower triangular, and not zero altogether."""

    def judge(inputs, outputs, reference):
        for name in names:
            paths = made_paths(inputs, outputs, name)
            if not paths.any():
                raise Fail("No input reaches any output: the masks close all paths.", made_words(inputs, name))
            for p, i, j in np.argwhere(paths):
                if j >= i:
                    which = "its own" if i == j else "a later"
                    raise Fail(f"An output sees {which} coordinate: the product of the masks is not strictly lower triangular in each block.",
                               f"{made_words(inputs, name)}: output {p * paths.shape[1] + i}, parameter {p} of coordinate {i}, depends on x[{j}]")

    return judge


def made_open(inputs, outputs, reference):
    for name in MADE_WIDE:
        paths = made_paths(inputs, outputs, name)
        for p, i, j in np.argwhere(~paths):
            if j < i:
                raise Fail("An output does not see all earlier coordinates, though the layers are wide enough.",
                           f"{made_words(inputs, name)}: output {p * paths.shape[1] + i}, parameter {p} of coordinate {i}, does not depend on x[{j}]")


def alike_in_words(found):
    """Arrays as they are; of exceptions the words alone, since the numbers in them are those of one way to write it."""
    return {k: np.asarray(shape_words(str(v))) if v.dtype.kind == "U" and "raised" in str(v) else v for k, v in found.items()}


def shape_words(text):
    """What torch says of shapes that do not fit; which of two sizes comes first does not matter, nor do those of pieces that are joined."""
    words = re.sub(r"\d+", "#", text)
    return f"{words} {sorted(re.findall(r'[0-9]+', text))}" if "non-singleton" in text else words


def made_features(inputs, outputs):
    return alike_in_words({k: np.asarray(re.sub(r"\d+", "#", str(v))) if "non-singleton" in str(v) else v for k, v in compared(MADE_COMPARED, outputs).items()})


MADE_COMPARED = tuple(f"{n}.{k}" for n in MADE_WIDE for k in ("shapes", "binary", "paths"))


def made_picture(inputs, outputs, reference):
    """Connectivity as a matrix: which output (row) sees which input (column)."""
    figure, axes = plotting.side_by_side(3, ["yours", "reference", "difference"], size=3.4)
    theirs = reference.arrays[f"{MADE_SHOWN}.paths"]
    mine = outputs.arrays.get(f"{MADE_SHOWN}.paths")
    _, dim = theirs.shape
    usable = mine is not None and mine.shape == theirs.shape
    for ax, matrix, limits in ((axes[0], mine, (0, 1)), (axes[1], theirs, (0, 1)), (axes[2], mine - theirs if usable else None, (-1, 1))):
        if not usable and matrix is not theirs:
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            continue
        ax.imshow(matrix, cmap="cividis" if limits[0] == 0 else "PuOr", vmin=limits[0], vmax=limits[1], aspect="auto")
        for row in range(dim, len(theirs), dim):
            ax.axhline(row - 0.5, color="white" if limits[0] == 0 else "black", linewidth=2)
        ax.set_xticks(range(dim)), ax.set_yticks(range(0, len(theirs), dim))
        ax.set_xlabel("input", fontsize=plotting.FONT)
    axes[0].set_ylabel("output, a block for each parameter", fontsize=plotting.FONT - 2)
    return figure


def made_by(inputs=lambda dim: torch.arange(1, dim + 1), hidden=lambda dim, width: torch.arange(width) % (dim - 1) + 1, first=torch.ge, between=torch.ge,
            last=torch.gt, blocks=lambda degrees, params: degrees.repeat(params), end=lambda masks: masks):
    """A function `made_masks` in its plainest form, in which a mistake changes one part."""

    def made_masks(dim, widths, out_per_dim):
        degrees = [inputs(dim), *(hidden(dim, w) for w in widths), blocks(inputs(dim), out_per_dim)]
        compare = [first, *[between] * (len(widths) - 1), last]
        return end([f(above[:, None], below[None, :]).double() for f, below, above in zip(compare, degrees, degrees[1:])])

    return function(made_masks)


MADE_MASKS = Exercise(
    id="made_masks", title="The masks of MADE", minutes=20, difficulty=3,
    hints=(
        "Give each unit a degree, the number of coordinates that it may see: inputs 1 to D, hidden units from 1 to D - 1, as evenly as their number allows. "
        "A mask compares the degrees of a layer's outputs, as a column, with those of its inputs, as a row.",
        "A hidden unit of degree m may look at units of degree m or less. An output of coordinate i must not know x_i itself, so there equal degrees are "
        "closed. The outputs come in blocks: all coordinates for parameter 0, then all for parameter 1, which `repeat` does.",
    ),
    inputs=made_inputs, reference=flowkit_class("nets", "made_masks"),
    cases=(
        Case("a list of masks, each (out, in), of zeros and ones", 2, made_shapes),
        Case("no output sees its own coordinate or a later one", 3, made_blind(MADE_WIDE)),
        Case("every earlier coordinate is seen", 2, made_open),
        Case("narrow layers do not see too much either", 1, made_blind(MADE_NETS[-1:])),
    ),
    misconceptions=(
        Misconception("output_equal", "wrong function", "value", "The output mask lets equal degrees through (`>=`): each output sees its own coordinate, and the Jacobian is not that of an autoregressive map.", made_by(last=torch.ge)),
        Misconception("hidden_strict", "wrong function", "value", "The hidden masks close equal degrees (`>`): with every layer the units see one coordinate less.", made_by(first=torch.gt, between=torch.gt)),
        Misconception("first_strict", "wrong function", "value", "The first mask closes equal degrees (`>`): its units see one coordinate less than their degree says.", made_by(first=torch.gt)),
        Misconception("between_strict", "wrong function", "value", "The masks between hidden layers close equal degrees (`>`): from the second hidden layer on, the units see less than their degree says.", made_by(between=torch.gt)),
        Misconception("comparisons_exchanged", "exchanged", "value", "The two comparisons have changed places: hidden layers close equal degrees, and the output layer opens them.", made_by(first=torch.gt, between=torch.gt, last=torch.ge)),
        Misconception("degrees_from_zero", "missing term", "value", "The hidden degrees start at 0, while the inputs' start at 1: units of degree 0 see nothing, and no unit sees the last but one coordinate.", made_by(hidden=lambda dim, width: torch.arange(width) % (dim - 1))),
        Misconception("inputs_from_zero", "off by one", "value", "The inputs' degrees start at 0, while the hidden ones start at 1 and the outputs count like the inputs: the second output misses the first coordinate.", made_by(inputs=lambda dim: torch.arange(dim))),
        Misconception("degrees_too_few", "off by one", "value", "The hidden degrees stop at D - 2: no unit may see the last but one coordinate, so the last output misses it.", made_by(hidden=lambda dim, width: torch.arange(width) % max(dim - 2, 1) + 1)),
        Misconception("all_degrees_one", "sign", "value", "No hidden unit has a degree above 1 (do the degrees fall, where they should rise?), so nothing but the first coordinate reaches the outputs.", made_by(hidden=lambda dim, width: torch.ones(width).long())),
        Misconception("interleaved", "order", "value", "The outputs are in the order i * out_per_dim + p; the parameters come in blocks, column p * dim + i.", made_by(blocks=lambda degrees, params: degrees.repeat_interleave(params))),
        Misconception("not_repeated", "shape", "value", "The output mask has one row for each dimension; each dimension has `out_per_dim` outputs.", made_by(blocks=lambda degrees, params: degrees)),
        Misconception("transposed", "shape", "value", "The masks are transposed, (in, out); they multiply the weights of `nn.Linear`, which are (out, in).", made_by(end=lambda masks: [m.T for m in masks])),
        Misconception("later_ones_seen", "direction", "value", "The comparisons are the wrong way round: an output sees the coordinates after its own, instead of those before.", made_by(first=torch.le, between=torch.le, last=torch.lt)),
        Misconception("output_reversed", "direction", "value", "The output mask's comparison is the wrong way round: it opens what should be closed.", made_by(last=torch.lt)),
        Misconception("hidden_reversed", "direction", "value", "The hidden masks' comparisons are the wrong way round: a unit sees what its degree should hide.", made_by(first=torch.le, between=torch.le)),
        Misconception("no_output_mask", "missing term", "value", "The mask of the output layer is missing.", made_by(end=lambda masks: masks[:-1])),
        Misconception("no_input_mask", "missing term", "value", "The mask of the first layer is missing.", made_by(end=lambda masks: masks[1:])),
        Misconception("all_open", "missing function", "value", "All masks are ones: nothing is masked.", made_by(first=lambda a, b: (a + b) > 0, between=lambda a, b: (a + b) > 0, last=lambda a, b: (a + b) > 0)),
        Misconception("output_open", "missing function", "value", "The output layer is not masked: its mask is all ones.", made_by(last=lambda a, b: (a + b) > 0)),
        Misconception("complement", "sign", "value", "Zeros and ones have changed places: the masks are 1 where a connection must be cut.", made_by(end=lambda masks: [1 - m for m in masks])),
        Misconception("rows_with_rows", "wrong axis", "value", "Degrees are compared entry by entry, a row with a row or a column with a column; a mask compares a column, `[:, None]`, with a row, `[None, :]`.", made_by(first=lambda a, b: a.T >= b)),
        Misconception("hidden_turned", "exchanged", "value", "In the hidden masks the layer below and the layer above have changed places: they are (in, out), and open where they should be closed.", made_by(first=lambda a, b: (b >= a).T, between=lambda a, b: (b >= a).T)),
        Misconception("output_turned", "exchanged", "value", "In the output mask the layer below and the outputs have changed places: it is (in, out).", made_by(last=lambda a, b: (a > b).T)),
        Misconception("order_of_layers", "order", "value", "The masks come in reverse order, the output layer's first.", made_by(end=lambda masks: masks[::-1])),
    ),
    compare=MADE_COMPARED, features=made_features, picture=made_picture,
)


# --- affine_forms ----------------------------------------------------------------------------------------------------

AFFINE_FAR = -900.0  # exp and sigmoid of it round to 0 in float64


def affine_inputs(rng):
    x = 1.5 * rng.standard_normal((B, 3))
    a = rng.standard_normal((B, 3))
    a[-1] = [4.0, -4.0, 2.5]  # gates nearly open and nearly closed
    far = np.where(rng.random((B, 3)) < 0.5, AFFINE_FAR, a)
    inputs = {"x": x, "near": laws.near(x), "mu": 1.5 * rng.standard_normal((B, 3)), "a": a, "far": far, "line": np.linspace(-4, 4, 81)}
    return inputs | {f"{k} direction": rng.standard_normal((B, 3)) for k in ("mu", "a")} | loss_inputs(rng, 3)


def affine_scale(form, a):
    return np.exp(a) if form == "shift" else 1 / (1 + np.exp(-a))


def affine_value(form):
    def judge(inputs, outputs, reference):
        x, mu, sigma = inputs["x"], inputs["mu"], affine_scale(form, inputs["a"])
        want = mu + sigma * x if form == "shift" else sigma * x + (1 - sigma) * mu
        laws.expect("y", x, outputs[f"{form}.y"], want, why=f' in the form "{form}"')
        if not np.array_equal(outputs[f"{form}.x after"], x):
            raise Fail("The input `x` was changed in place: the caller's tensor was overwritten.")

    return judge


def affine_jacobian(inputs, outputs, form):
    """dy/dx (B, D, D) of the student's own y."""
    x, y = inputs["x"], outputs[f"{form} nearby.y"]
    if y.shape != inputs["near"].shape:
        raise Fail(f"`y` has shape {y.shape} for an input of shape {inputs['near'].shape}.")
    return laws.jacobian(y, x.shape)


def affine_ldj(inputs, outputs, reference):
    for form in AFFINE_FORMS:
        det = np.linalg.slogdet(affine_jacobian(inputs, outputs, form))[1]
        if not np.isfinite(det).all():
            raise Fail(f'In the form "{form}" `y` does not depend on all of x: its Jacobian determinant is zero.')
        laws.expect("ldj", inputs["x"], outputs[f"{form}.ldj"], det, max(laws.tolerance(outputs[f"{form} nearby.y"]), 1e-5), f' in the form "{form}"')


def affine_gate(inputs, outputs, reference):
    slope = affine_jacobian(inputs, outputs, "gate")
    own = np.einsum("bii->bi", slope)
    if np.abs(slope - own[:, :, None] * np.eye(3)).max() > 1e-3:
        raise Fail('In the form "gate" a coordinate of y depends on another coordinate of x.')
    if not ((own > 0) & (own < 1)).all():
        x, bad = inputs["x"], ~((own > 0) & (own < 1)).all(1)
        i = laws.first_bad(x, bad)
        raise Fail('The slope dy/dx of the form "gate" is not between 0 and 1: a gate never expands.', f"x = {laws.point(x[i])}: dy/dx = {laws.point(own[i])}")
    if (outputs["gate.ldj"] >= 0).any():
        raise Fail('The form "gate" never expands, so its `ldj` is negative; yours is not everywhere.')


def affine_far(inputs, outputs, reference):
    for form in AFFINE_FORMS:
        a = inputs["far"]
        want = (a if form == "shift" else np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))).sum(1)
        laws.expect("ldj", a, outputs[f"{form} with a = {AFFINE_FAR:g}.ldj"], want, 1e-4, f' in the form "{form}", where some sigma underflow')


def affine_trained(inputs, outputs, reference):
    for form in AFFINE_FORMS:
        gradient_arrives(outputs, f"{form} ", "y and ldj", f'mu and a in the form "{form}"')


def affine_by(scale=lambda form, a: a.exp() if form == "shift" else torch.sigmoid(a), shift=lambda x, mu, s: mu + s * x,
              gate=lambda x, mu, s: s * x + (1 - s) * mu, shift_ldj=lambda s, a: a, gate_ldj=lambda s, a: F.logsigmoid(a),
              total=lambda t: t.sum(-1), end=lambda y, ldj, form: (y, ldj), form=lambda form: form, params=lambda mu, a: (mu, a)):
    """A function `affine_forms` in its plainest form, in which a mistake changes one part."""

    def affine_forms(x, mu, a, name):
        name, (mu, a) = form(name), params(mu, a)
        s = scale(name, a)
        y, log_slope = (shift(x, mu, s), shift_ldj(s, a)) if name == "shift" else (gate(x, mu, s), gate_ldj(s, a))
        return end(y, total(log_slope), name)

    return function(affine_forms)


def affine_total(name, total):
    kind, sentence, _ = laws.LDJ_FAULTS[name]
    return Misconception(name, kind, "ldj", sentence, affine_by(total=total))


AFFINE = Exercise(
    id="affine_forms", title="Two affine forms", minutes=10, difficulty=1,
    hints=(
        "Both forms scale x by sigma and add something, for each entry by itself, so the Jacobian is diagonal with sigma on it. Only how sigma comes from `a`, and what is added, differs.",
        '"shift": sigma = exp(a), so log sigma is `a` itself. "gate": sigma = sigmoid(a), and its logarithm is `F.logsigmoid(a)`. Add the logarithms up over the dimensions, for each row.',
    ),
    inputs=affine_inputs, reference=lambda: (affine_reference,),
    cases=(
        Case("shift: y = mu + sigma x", 1, affine_value("shift")),
        Case("gate: y = sigma x + (1 - sigma) mu", 1, affine_value("gate")),
        Case("ldj = log|det dy/dx| in both forms", 1.5, affine_ldj),
        Case("ldj is exact where sigma underflows", 0.5, affine_far),
        Case("the gate never expands", 0.5, affine_gate),
        Case("gradients reach mu and a", 0.5, affine_trained),
    ),
    misconceptions=(
        Misconception("gate_sides", "exchanged", "value", "In the gate sigma stands on the wrong side: it weighs mu, and 1 - sigma weighs x.", affine_by(gate=lambda x, mu, s: s * mu + (1 - s) * x)),
        Misconception("gate_sides_ldj", "exchanged", "value", "In the gate sigma stands on the wrong side, in `y` and in `ldj`: it weighs mu, and 1 - sigma weighs x.", affine_by(gate=lambda x, mu, s: s * mu + (1 - s) * x, gate_ldj=lambda s, a: F.logsigmoid(-a))),
        Misconception("gate_ldj_other", "wrong function", "ldj", "The gate's `ldj` is the logarithm of 1 - sigma, the weight of mu; x is multiplied by sigma.", affine_by(gate_ldj=lambda s, a: F.logsigmoid(-a))),
        Misconception("gate_ldj_a", "missing function", "ldj", "The gate's `ldj` adds up `a` itself, as in the form \"shift\"; there sigma is exp(a), in the gate it is sigmoid(a).", affine_by(gate_ldj=lambda s, a: a)),
        Misconception("gate_ldj_slope", "wrong function", "ldj", "The gate's `ldj` uses the derivative of the sigmoid; y is differentiated with respect to x, not to a.", affine_by(gate_ldj=lambda s, a: F.logsigmoid(a) + F.logsigmoid(-a))),
        Misconception("shift_ldj_sigma", "missing function", "ldj", "In the form \"shift\" `ldj` adds up sigma itself; it is its logarithm that is asked for.", affine_by(shift_ldj=lambda s, a: s)),
        Misconception("gate_ldj_sigma", "missing function", "ldj", "In the form \"gate\" `ldj` adds up sigma itself; it is its logarithm that is asked for.", affine_by(gate_ldj=lambda s, a: s)),
        Misconception("both_ldj_sigma", "missing function", "ldj", "`ldj` adds up sigma itself in both forms; it is its logarithm that is asked for.", affine_by(shift_ldj=lambda s, a: s, gate_ldj=lambda s, a: s)),
        Misconception("shift_ldj_log_a", "extra term", "ldj", "In the form \"shift\" `ldj` takes the logarithm of `a`, which is a logarithm already.", affine_by(shift_ldj=lambda s, a: a.log())),
        Misconception("gate_unweighted", "missing term", "value", "In the gate mu is added in full: its weight 1 - sigma is missing.", affine_by(gate=lambda x, mu, s: s * x + mu)),
        Misconception("gate_weight_sigma", "wrong function", "value", "In the gate mu has the weight sigma too; its weight is what sigma leaves, 1 - sigma.", affine_by(gate=lambda x, mu, s: s * x + s * mu)),
        Misconception("gate_no_mu", "missing term", "value", "In the gate mu is missing.", affine_by(gate=lambda x, mu, s: s * x)),
        Misconception("gate_minus", "sign", "value", "In the gate the two parts are subtracted; they are added, as a weighted mean.", affine_by(gate=lambda x, mu, s: s * x - (1 - s) * mu)),
        Misconception("shift_no_mu", "missing term", "value", "In the form \"shift\" mu is missing.", affine_by(shift=lambda x, mu, s: s * x)),
        Misconception("shift_no_sigma", "missing term", "value", "In the form \"shift\" x is not multiplied by sigma.", affine_by(shift=lambda x, mu, s: mu + x)),
        Misconception("shift_first", "order", "value", "In the form \"shift\" mu is multiplied by sigma too: x is scaled first, and shifted afterwards.", affine_by(shift=lambda x, mu, s: (mu + x) * s)),
        Misconception("shift_undone", "direction", "value", "In the form \"shift\" y is (x - mu) / sigma, the map that undoes the one that is asked for.", affine_by(shift=lambda x, mu, s: (x - mu) / s)),
        Misconception("shift_minus", "sign", "value", "In the form \"shift\" mu is subtracted; it is added.", affine_by(shift=lambda x, mu, s: s * x - mu)),
        Misconception("sigma_on_mu", "exchanged", "value", "In the form \"shift\" sigma multiplies mu instead of x.", affine_by(shift=lambda x, mu, s: x + s * mu)),
        Misconception("no_exp", "missing function", "value", "In the form \"shift\" sigma is `a` itself; it is exp(a), which is never negative.", affine_by(scale=lambda form, a: a if form == "shift" else torch.sigmoid(a), shift_ldj=lambda s, a: s.abs().log())),
        Misconception("no_exp_but_ldj", "missing function", "value", "In the form \"shift\" x is multiplied by `a` itself; sigma is exp(a), as `ldj` has it.", affine_by(scale=lambda form, a: a if form == "shift" else torch.sigmoid(a), shift_ldj=lambda s, a: a)),
        Misconception("exp_sign", "sign", "value", "In the form \"shift\" sigma is exp(-a): the sign of `a` is turned.", affine_by(scale=lambda form, a: (-a).exp() if form == "shift" else torch.sigmoid(a), shift_ldj=lambda s, a: -a)),
        Misconception("exp_sign_value", "sign", "value", "In the form \"shift\" x is multiplied by exp(-a): the sign of `a` is turned, though not in `ldj`.", affine_by(scale=lambda form, a: (-a).exp() if form == "shift" else torch.sigmoid(a))),
        Misconception("gate_exp", "wrong function", "value", "The gate's sigma is exp(a), which may be above 1; a gate is sigmoid(a).", affine_by(scale=lambda form, a: a.exp(), gate_ldj=lambda s, a: a)),
        Misconception("gate_exp_value", "wrong function", "value", "In `y` of the gate sigma is exp(a), which may be above 1; a gate is sigmoid(a).", affine_by(scale=lambda form, a: a.exp())),
        Misconception("gate_tanh", "wrong function", "value", "The gate's sigma is tanh(a), which may be negative; a gate is sigmoid(a).", affine_by(scale=lambda form, a: a.exp() if form == "shift" else a.tanh(), gate_ldj=lambda s, a: s.abs().log())),
        Misconception("gate_tanh_value", "wrong function", "value", "In `y` of the gate sigma is tanh(a), which may be negative; a gate is sigmoid(a).", affine_by(scale=lambda form, a: a.exp() if form == "shift" else a.tanh())),
        Misconception("gate_no_sigmoid", "missing function", "value", "The gate's sigma is `a` itself; it is sigmoid(a), between 0 and 1.", affine_by(scale=lambda form, a: a.exp() if form == "shift" else a, gate_ldj=lambda s, a: F.logsigmoid(a))),
        Misconception("shift_sigmoid", "wrong function", "value", "Both forms use sigmoid(a); in the form \"shift\" sigma is exp(a), which may stretch as well.", affine_by(scale=lambda form, a: torch.sigmoid(a), shift_ldj=lambda s, a: F.logsigmoid(a))),
        Misconception("forms_exchanged", "exchanged", "value", "The two forms have changed places: \"shift\" computes the gate, and \"gate\" the shift.", affine_by(form=lambda form: "gate" if form == "shift" else "shift")),
        Misconception("always_shift", "missing function", "value", "The argument `form` has no effect: the form \"gate\" gives what \"shift\" gives.", affine_by(form=lambda form: "shift")),
        Misconception("always_gate", "missing function", "value", "The argument `form` has no effect: the form \"shift\" gives what \"gate\" gives.", affine_by(form=lambda form: "gate")),
        Misconception("mu_a_exchanged", "exchanged", "value", "mu and `a` have changed places: what should shift scales.", affine_by(params=lambda mu, a: (a, mu))),
        Misconception("gate_ldj_underflows", "wrong function", "ldj", "The gate's `ldj` is put together from exp or sigma: where `a` is very negative sigma rounds to 0 (and exp(-a) to infinity), and the logarithm is lost.", affine_by(gate_ldj=lambda s, a: s.log())),
        Misconception("shift_ldj_underflows", "wrong function", "ldj", "In the form \"shift\" `ldj` is put together from exp or sigma: where `a` is very negative sigma rounds to 0 (and exp(-a) to infinity), and the logarithm is lost.", affine_by(shift_ldj=lambda s, a: s.log())),
        Misconception("both_ldj_underflow", "wrong function", "ldj", "`ldj` is put together from exp or sigma: where `a` is very negative sigma rounds to 0 (and exp(-a) to infinity), and the logarithm is lost.", affine_by(shift_ldj=lambda s, a: s.log(), gate_ldj=lambda s, a: s.log())),
        affine_total("ldj_no_sum", lambda t: t), affine_total("ldj_sign", lambda t: -t.sum(-1)), affine_total("ldj_zero", lambda t: 0 * t.sum(-1)),
        affine_total("ldj_batch_sum", lambda t: t.sum()), affine_total("ldj_batch_sum_kept", lambda t: t.sum(0)), affine_total("ldj_mean", lambda t: t.mean(-1)),
        affine_total("ldj_keepdim", lambda t: t.sum(-1, keepdim=True)), affine_total("ldj_det", lambda t: t.sum(-1).exp()),
        affine_total("ldj_batch_mean", lambda t: t.mean()),
        Misconception("shift_returns_exchanged", "exchanged", "value", "In the form \"shift\" `ldj` is returned first and `y` second; the order is (y, ldj).", affine_by(end=lambda y, ldj, form: (ldj, y) if form == "shift" else (y, ldj))),
        Misconception("gate_returns_exchanged", "exchanged", "value", "In the form \"gate\" `ldj` is returned first and `y` second; the order is (y, ldj).", affine_by(end=lambda y, ldj, form: (ldj, y) if form == "gate" else (y, ldj))),
        Misconception("y_and_ldj_exchanged", "exchanged", "value", "`ldj` is returned first and `y` second; the order is (y, ldj).", affine_by(end=lambda y, ldj, form: (ldj, y))),
        Misconception("ldj_detached", "detached", "ldj", "`ldj` is cut off from the computation graph, so training would not feel the log-determinant.", affine_by(end=lambda y, ldj, form: (y, ldj.detach()))),
        Misconception("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", affine_by(end=lambda y, ldj, form: (y.detach(), ldj.detach()))),
        Misconception("only_y", "missing term", "value", "Only `y` is returned; `ldj` belongs to it: (y, ldj).", affine_by(end=lambda y, ldj, form: y)),
    ),
    compare=tuple(f"{form}{k}" for form in AFFINE_FORMS for k in (".y", ".ldj", ".x after", " gradient.along", f" with a = {AFFINE_FAR:g}.ldj")),
    picture=pictures.against_reference(("shift on a line.y", "gate on a line.y"), "line", ('"shift", mu = 1, a = -1', '"gate", mu = 1, a = -1'), (-4, 4)),
)


def affine_reference(x, mu, a, form):
    """flowkit's scalar maps behind the exercise's signature."""
    from flowkit.elementwise import Affine, GatedAffine

    scalar, params = (Affine(), (a, mu)) if form == "shift" else (GatedAffine(), (a, mu))
    y, log_slope = scalar.forward(x, torch.cat(params, -1))
    return y, log_slope.sum(-1)


# --- maf and iaf -----------------------------------------------------------------------------------------------------

AUTOREGRESSIVE_UNITS = 20


def masked_net_inputs(rng, dim, params, prefix):
    """Weights of an autoregressive tanh_net (B, D) -> (B, params D) in blocks, and a direction to nudge them along that leaves it autoregressive."""
    inputs = net_inputs(rng, dim, params * dim, prefix, AUTOREGRESSIVE_UNITS)
    sees, unit = np.arange(dim), np.arange(AUTOREGRESSIVE_UNITS) % (dim - 1)  # unit k sees the coordinates 0 .. unit[k]
    masks = {"W1": sees[:, None] <= unit, "W2": unit[:, None] < np.tile(sees, params)}
    return {k: v * masks.get(k.rsplit(".", 1)[1], 1) for k, v in inputs.items()}


def affine_layer_inputs(rng):
    inputs = {}
    for prefix in SIZES:
        dim = int(prefix[2])
        inputs |= layer_inputs(rng, dim, prefix) | loss_inputs(rng, dim, prefix) | masked_net_inputs(rng, dim, 2, prefix)
    return inputs | pictures.grid("D=2 ")


def alpha_and_mu(inputs, prefix, at):
    """What the net gives there, in numpy."""
    w = {k: inputs[f"{prefix}net.{k}"] for k in ("W1", "b1", "W2", "b2")}
    return np.split(np.tanh(at @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"], 2, -1)


def jacobian_is_triangular(inputs, outputs, prefix):
    """dz_i/dx_j = 0 for j > i, and positive for j = i."""
    laws.moves(inputs, outputs, prefix)
    J, _ = laws.own_jacobian(inputs, outputs, prefix)
    x, tol = inputs[prefix + "x"], 10 * laws.tolerance(outputs[prefix + "forward near.z"])
    above = np.abs(np.triu(J, 1)).max((1, 2)) > tol * (1 + np.abs(J).max((1, 2)))
    if above.any():
        b = laws.first_bad(x, above)
        i, j = max(zip(*np.triu_indices(J.shape[1], 1)), key=lambda ij: abs(J[b][ij]))
        raise Fail("The Jacobian dz/dx is not triangular: a coordinate of z depends on a later coordinate of x.",
                   f"x = {laws.point(x[b])}: dz[{i}]/dx[{j}] = {J[b, i, j]:.3g}")
    flat = (np.einsum("bii->bi", J) <= 0).any(1)
    if flat.any():
        raise Fail("A coordinate of z does not grow with the same coordinate of x.", f"x = {laws.point(x[laws.first_bad(x, flat)])}")


def maf_formula(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    alpha, mu = alpha_and_mu(inputs, prefix, x)
    laws.expect("z", x, outputs[prefix + "forward.z"], x * np.exp(alpha) + mu, why=": it is x * exp(alpha) + mu with alpha, mu = net(x), in this order")


def gaussian_conditionals(inputs, outputs, prefix):
    """log p(x) is the sum of log N(x_i; m_i, s_i), whose means and deviations the net gives at x: no layer, no Jacobian."""
    x, z, ldj = inputs[prefix + "x"], outputs[prefix + "forward.z"], outputs[prefix + "forward.ldj"]
    alpha, mu = alpha_and_mu(inputs, prefix, x)
    mean, deviation = -mu * np.exp(-alpha), np.exp(-alpha)
    want = (-0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation) - 0.5 * math.log(2 * math.pi)).sum(1)
    if z.shape != x.shape or ldj.shape != (len(x),):
        raise Fail(f"`z` and `ldj` from forward have the shapes {z.shape} and {ldj.shape}; they should be (B, D) and (B,).")
    laws.expect("log N(z) + ldj", x, laws.normal_log_prob(z.astype(float)) + ldj, want, max(laws.tolerance(z), laws.tolerance(ldj)),
                ": the density of the data is not the product of its Gaussian conditionals")


def iaf_formula(inputs, outputs, prefix):
    z = inputs[prefix + "z"]
    alpha, mu = alpha_and_mu(inputs, prefix, z)
    laws.expect("x", z, outputs[prefix + "inverse.x"], z * np.exp(alpha) + mu, why=": inverse(z) is z * exp(alpha) + mu with alpha, mu = net(z), in this order")


def iaf_sample_density(inputs, outputs, prefix):
    """The ldj that forward gives for x = inverse(z) is -sum alpha(z), which the net tells."""
    z, got = inputs[prefix + "z"], outputs[prefix + "forward of inverse.ldj"]
    alpha, _ = alpha_and_mu(inputs, prefix, z)
    laws.expect("ldj", z, got, -alpha.sum(1), why=" for the samples x = inverse(z) of these z")


def passes_counted(quick, slow):
    """`quick` asks the net once, `slow` D times (D + 1 are allowed)."""

    def judge(inputs, outputs, prefix):
        D = inputs[prefix + "x"].shape[1]
        laws.moves(inputs, outputs, prefix)
        asked = {way: int(outputs[f"{prefix}passes.{way}"]) for way in (quick, slow)}
        if asked[quick] != 1:
            raise Fail(f"With D = {D}, {quick} asks the net {asked[quick]} times; one pass gives the parameters of all coordinates.")
        if not D <= asked[slow] <= D + 1:
            raise Fail(f"With D = {D}, {slow} asks the net {times(asked[slow])}; coordinate after coordinate it takes D = {D} passes (D + 1 are allowed).")

    return judge


def times(n):
    return "once" if n == 1 else f"{n} times"


def quick_gradients(where):
    return lambda i, o, p: gradient_arrives(o, p, where, "the weights of `net`")


def counted_features(quick, slow):
    """What is compared, and the numbers of passes in words: those of the slow direction only where the way there and back is right."""

    def features(inputs, outputs):
        found = alike_in_words(compared(AFFINE_LAYER, outputs))
        for prefix in sizes(inputs):
            D = inputs[prefix + "x"].shape[1]
            for way, most in ((quick, 1), (slow, D + 1)):
                asked = outputs.arrays.get(f"{prefix}passes.{way}")
                found[f"{prefix}{way} passes"] = np.asarray("" if asked is None else "too many" if asked > most else "few")
        return found

    return features


AFFINE_LAYER = sized((*BIJECTION, "gradient.along"))


class PlainAutoregressive:
    """An affine autoregressive layer in its plainest form, one method a step: `read` gives v from u in one pass, `fill` u from v in D passes."""

    def __init__(self, net):
        self.net = net

    def params(self, u):
        return self.net(u).chunk(2, -1)

    def bend(self, u, alpha, mu):
        return u * alpha.exp() + mu

    def unbend(self, v, alpha, mu):
        return (v - mu) * (-alpha).exp()

    def read(self, u):
        alpha, mu = self.params(u)
        return self.bend(u, alpha, mu), alpha

    def start(self, v):
        return torch.zeros_like(v)

    def turns(self, v):
        return range(v.shape[1])

    def fill(self, v):
        u = self.start(v)
        for i in self.turns(v):
            alpha, mu = self.params(u)
            u = torch.cat([u[:, :i], self.unbend(v, alpha, mu)[:, i:i + 1], u[:, i + 1:]], -1)
        return u, alpha


class PlainMAF(PlainAutoregressive):
    """u = x, v = z."""

    def ldj(self, alpha):
        return alpha.sum(-1)

    def forward(self, x):
        z, alpha = self.read(x)
        return z, self.ldj(alpha)

    def inverse(self, z):
        return self.fill(z)[0]


class PlainIAF(PlainAutoregressive):
    """u = z, v = x."""

    def ldj(self, alpha):
        return -alpha.sum(-1)

    def forward(self, x):
        z, alpha = self.fill(x)
        return z, self.ldj(alpha)

    def inverse(self, z):
        return self.read(z)[0]


def read_exchanged(self, u):
    mu, alpha = self.params(u)
    return self.bend(u, alpha, mu), alpha


def fill_exchanged(self, v):
    u = self.start(v)
    for i in self.turns(v):
        mu, alpha = self.params(u)
        u = torch.cat([u[:, :i], self.unbend(v, alpha, mu)[:, i:i + 1], u[:, i + 1:]], -1)
    return u, alpha


def fill_from_other(self, v):
    alpha, mu = self.params(v)
    return self.unbend(v, alpha, mu), alpha


def fill_at_once(self, v):
    alpha, mu = self.params(self.start(v))
    return self.unbend(v, alpha, mu), alpha


def fill_in_place(self, v):
    u = v
    for i in self.turns(v):
        alpha, mu = self.params(u)
        u[:, i] = self.unbend(v, alpha, mu)[:, i]
    return u, alpha


def fill_rows(self, v):
    u = self.start(v)
    for i in self.turns(v):
        alpha, mu = self.params(u)
        u_i = (v[i, :] - mu[:, i]) * (-alpha[:, i]).exp()
        u = torch.cat([u[:, :i], u_i[:, None], u[:, i + 1:]], -1)
    return u, alpha


def fill_pieces(self, v):
    u = self.start(v)
    for i in self.turns(v):
        alpha, mu = self.params(u)
        u = torch.cat([u[:i, :], self.unbend(v, alpha, mu)[:, i:i + 1], u[:, i + 1:]], -1)
    return u, alpha


def fill_overlapping(self, v):
    u = self.start(v)
    for i in self.turns(v):
        alpha, mu = self.params(u)
        u = torch.cat([u[:, :i], self.unbend(v, alpha, mu)[:, i:i + 1], u[:, i:]], -1)
    return u, alpha


def read_in_place(self, u):
    alpha, mu = self.params(u)
    u.copy_(self.bend(u, alpha, mu))
    return u, alpha


def read_slowly(self, u):
    columns = [self.bend(u, *self.params(u))[:, i] for i in range(u.shape[1])]
    return torch.stack(columns, -1), self.params(u)[0]


def other_filled(self, u):
    """v_i = u_i exp(alpha(v)_i) + mu(v)_i, one after the other: the net is fed what comes out."""
    v = self.start(u)
    for i in self.turns(u):
        alpha, mu = self.params(v)
        v = torch.cat([v[:, :i], self.bend(u, alpha, mu)[:, i:i + 1], v[:, i + 1:]], -1)
    return v, alpha


def params_without_gradient(self, u):
    with torch.no_grad():
        return self.net(u).chunk(2, -1)


def affine_layer_mistakes(base, quick, slow, u, v):
    """The mistakes of MAF and IAF, which are each other's with the directions exchanged: `quick` reads u, `slow` fills it from v."""
    wrong, sign = deviating(base), 1 if base is PlainMAF else -1
    log = "sum of alpha" if sign > 0 else "negative sum of alpha"
    return (
        wrong("slow_from_other", "wrong function", slow, f"{slow} feeds {v} to the net, in one pass; alpha and mu are functions of {u}, which has to be filled coordinate by coordinate.", fill=fill_from_other),
        wrong("slow_at_once", "missing function", slow, f"{slow} uses what the net says when nothing of {u} is known: it is asked once, or the last coordinate is filled first. Each coordinate needs the ones before it.", fill=fill_at_once),
        wrong("slow_first_skipped", "off by one", slow, f"{slow} starts with the second coordinate: the first one keeps its starting value.", turns=lambda self, v: range(1, v.shape[1])),
        wrong("slow_last_skipped", "off by one", slow, f"{slow} stops one pass too early: the last coordinate keeps its starting value.", turns=lambda self, v: range(v.shape[1] - 1)),
        wrong("slow_many_passes", "extra term", slow, f"{slow} goes on asking the net when all coordinates are known: D passes suffice.", turns=lambda self, v: [*range(v.shape[1])] * 2),
        wrong("slow_rows", "wrong axis", slow, f"{slow} takes rows of {v}, mu or alpha for columns: the batch comes first, so coordinate i of all points is column i.", fill=fill_rows),
        wrong("slow_pieces", "wrong axis", slow, f"The pieces that {slow} joins do not fit: one is cut out along the batch, stands as a row, or all are joined along the wrong dimension. Each should have B rows.", fill=fill_pieces),
        wrong("slow_pieces_overlap", "missing term", slow, f"{slow} puts the old coordinate back behind the one that was just found: with every pass {u} gets a column too many.", fill=fill_overlapping),
        wrong("slow_in_place", "in place", "input", f"{slow} writes its result into the tensor {v} that it was given: the caller's tensor is overwritten.", fill=fill_in_place),
        wrong("quick_in_place", "in place", "input", f"{quick} writes its result into the tensor {u} that it was given: the caller's tensor is overwritten.", read=read_in_place),
        wrong("quick_many_passes", "extra term", quick, f"{quick} asks the net for every coordinate anew; all of {u} is known, so one pass gives all parameters.", read=read_slowly),
        wrong("other_flow", "direction", "net", f"The net is fed {v} instead of {u}, in both directions: the quick direction and the slow one have changed places, as in the other of the two flows.",
              read=other_filled, fill=fill_from_other),
        wrong("params_exchanged", "exchanged", "net", "mu is taken from the first block of the net's output and alpha from the second, in both directions; the blocks are alpha, mu.",
              params=lambda self, u: PlainAutoregressive.params(self, u)[::-1]),
        wrong("params_interleaved", "order", "net", "alpha and mu are taken from the net's output in turns, two columns for each coordinate; they come in two blocks of D columns.",
              params=lambda self, u: (self.net(u)[:, 0::2], self.net(u)[:, 1::2])),
        wrong("quick_exchanged", "exchanged", quick, f"In {quick} mu is taken from the first block of the net's output and alpha from the second; the blocks are alpha, mu.", read=read_exchanged),
        wrong("slow_exchanged", "exchanged", slow, f"In {slow} mu is taken from the first block of the net's output and alpha from the second; the blocks are alpha, mu.", fill=fill_exchanged),
        wrong("quick_no_exp", "missing function", quick, f"In {quick}, {u} is multiplied by alpha itself; alpha is the logarithm of the scale.", bend=lambda self, u, alpha, mu: u * alpha + mu),
        wrong("no_exp", "missing function", quick, "The scale is alpha itself in both directions; alpha is the logarithm of the scale, which is therefore never zero or negative.",
              bend=lambda self, u, alpha, mu: u * alpha + mu, unbend=lambda self, v, alpha, mu: (v - mu) / alpha),
        wrong("no_exp_logs", "missing function", quick, "The scale is alpha itself, in both directions and in ldj; alpha is the logarithm of the scale, which is therefore never zero or negative.",
              bend=lambda self, u, alpha, mu: u * alpha + mu, unbend=lambda self, v, alpha, mu: (v - mu) / alpha, ldj=lambda self, alpha: sign * alpha.abs().log().sum(-1)),
        wrong("shift_first", "order", quick, f"{u} is shifted before it is scaled, in both directions; the shift comes last.",
              bend=lambda self, u, alpha, mu: (u + mu) * alpha.exp(), unbend=lambda self, v, alpha, mu: v * (-alpha).exp() - mu),
        wrong("shift_subtracted_first", "order", quick, f"The quick direction is ({u} - mu) * exp(alpha), which mixes the map with its inverse; it should scale first, and add mu last.",
              bend=lambda self, u, alpha, mu: (u - mu) * alpha.exp(), unbend=lambda self, v, alpha, mu: v * (-alpha).exp() + mu),
        wrong("directions_swapped", "direction", quick, f"The map and its inverse have changed places: {v} is made from {u} by subtracting mu and dividing by the scale, as some papers write it.",
              bend=lambda self, u, alpha, mu: (u - mu) * (-alpha).exp(), unbend=lambda self, v, alpha, mu: v * alpha.exp() + mu, ldj=lambda self, alpha: -sign * alpha.sum(-1)),
        wrong("alpha_negated", "sign", quick, f"alpha has the opposite sign throughout: where it is large, {u} is shrunk instead of stretched.",
              bend=lambda self, u, alpha, mu: u * (-alpha).exp() + mu, unbend=lambda self, v, alpha, mu: (v - mu) * alpha.exp(), ldj=lambda self, alpha: -sign * alpha.sum(-1)),
        wrong("mu_negated", "sign", quick, f"mu has the opposite sign in both directions: {quick} subtracts it.",
              bend=lambda self, u, alpha, mu: u * alpha.exp() - mu, unbend=lambda self, v, alpha, mu: (v + mu) * (-alpha).exp()),
        wrong("quick_alpha_sign", "sign", quick, f"In {quick}, the scale is exp of minus alpha: it shrinks where it should stretch.", bend=lambda self, u, alpha, mu: u * (-alpha).exp() + mu),
        wrong("quick_mu_sign", "sign", quick, f"In {quick}, mu is subtracted; there it should be added.", bend=lambda self, u, alpha, mu: u * alpha.exp() - mu),
        wrong("quick_no_mu", "missing term", quick, f"{quick} scales {u} but does not shift it by mu.", bend=lambda self, u, alpha, mu: u * alpha.exp()),
        wrong("quick_no_scale", "missing term", quick, f"{quick} shifts {u} but does not scale it.", bend=lambda self, u, alpha, mu: u + mu),
        wrong("slow_alpha_sign", "sign", slow, f"In {slow}, alpha has the same sign as in {quick}: the stretch is applied once more instead of being undone.", unbend=lambda self, v, alpha, mu: (v - mu) * alpha.exp()),
        wrong("slow_mu_sign", "sign", slow, f"In {slow}, mu is added as in {quick}: the shift is applied once more instead of being undone.", unbend=lambda self, v, alpha, mu: (v + mu) * (-alpha).exp()),
        wrong("slow_order", "order", slow, f"{slow} undoes the two steps in the order in which {quick} makes them; the last one made must be undone first.", unbend=lambda self, v, alpha, mu: v * (-alpha).exp() - mu),
        wrong("slow_no_mu", "missing term", slow, f"{slow} undoes the stretch but forgets the shift mu.", unbend=lambda self, v, alpha, mu: v * (-alpha).exp()),
        wrong("slow_no_scale", "missing term", slow, f"{slow} undoes the shift but forgets the stretch.", unbend=lambda self, v, alpha, mu: v - mu),
        wrong("slow_is_quick", "direction", slow, f"{slow} scales and shifts as {quick} does, instead of undoing it.", unbend=lambda self, v, alpha, mu: v * alpha.exp() + mu),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came.", inverse=lambda self, z: z),
        wrong("inverse_is_forward", "direction", "inverse", "inverse applies forward once more.", inverse=lambda self, z: self.forward(z)[0]),
        wrong("net_no_grad", "detached", "net", "The net's output is cut off from the computation graph (no_grad or detach), so the net would never learn.", params=params_without_gradient),
        wrong("ldj_no_sum", "shape", "ldj", NO_SUM, ldj=lambda self, alpha: sign * alpha),
        wrong("ldj_wrong_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the dimensions.", ldj=lambda self, alpha: sign * alpha.sum(0)),
        wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, alpha: sign * alpha.mean(-1)),
        wrong("ldj_exp", "wrong function", "ldj", f"`ldj` adds up the scales exp(alpha); it is their logarithms that add up, the {log}.", ldj=lambda self, alpha: sign * alpha.exp().sum(-1)),
        wrong("ldj_number", "missing term", "ldj", "`ldj` is the number 0 that a sum starts from: nothing is added to it.", ldj=lambda self, alpha: 0),
        wrong("ldj_last", "missing term", "ldj", "`ldj` holds the log-slope of the last coordinate only; those of the others are missing.", ldj=lambda self, alpha: sign * alpha[:, -1]),
        *ldj_mistakes(base, "ldj_sign", "ldj_zero", "ldj_det", "ldj_keepdim", "ldj_batch_sum", "ldj_times_batch"),
        returns_exchanged(base),
    )


def ldj_at_start(self, x):
    z, _ = self.fill(x)
    return z, self.ldj(self.params(self.start(x))[0])


def ldj_of_rows(self, x):
    z, ldj = self.start(x), 0
    for i in self.turns(x):
        alpha, mu = self.params(z)
        z = torch.cat([z[:, :i], self.unbend(x, alpha, mu)[:, i:i + 1], z[:, i + 1:]], -1)
        ldj = ldj - alpha[i, :]
    return z, ldj


def ldj_every_turn(self, x):
    z, alpha = torch.zeros_like(x), 0
    for i in range(x.shape[1]):
        a, mu = self.params(z)
        z = torch.cat([z[:, :i], ((x - mu) * torch.exp(-a))[:, i:i + 1], z[:, i + 1:]], 1)
        alpha = alpha + a
    return z, self.ldj(alpha)


def ldj_at_x(self, x):
    z, _ = self.fill(x)
    return z, self.ldj(self.params(x)[0])


def jacobians(inputs, outputs, reference):
    """dz/dx for D = 6 as a heat picture, the largest entry over the points of the check: what lies above the diagonal must be white."""
    figure = plotting.Picture(figsize=(11, 4.2), layout="constrained")
    prefix = SIZES[-1]
    shape = inputs[prefix + "x"].shape

    def size_of(arrays):
        z = arrays.get(prefix + "forward near.z")
        return np.abs(laws.jacobian(z, shape)).max(0) if z is not None and z.shape == inputs[prefix + "near"].shape and np.isfinite(z).all() else None

    mine, theirs = size_of(outputs.arrays), size_of(reference.arrays)
    axes = figure.subplots(1, 3)
    pictures.square(axes[1], theirs, "reference")
    if mine is None:
        pictures.empty(axes[0], "yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        pictures.empty(axes[2], "")
    else:
        pictures.square(axes[0], mine, "yours: largest |dz/dx|", max(1.0, np.abs(theirs).max()))
        pictures.square(axes[2], mine - theirs, "difference", max(1.0, np.abs(theirs).max()))
    return figure


MAF = Exercise(
    id="maf", title="The masked autoregressive flow", minutes=20, difficulty=2,
    hints=(
        "`forward` has all of x, so it asks the net once: `self.net(x).chunk(2, dim=-1)`. `inverse` has z alone: it starts with any x, say zeros, and learns one more coordinate of x with every pass.",
        "In pass i of `inverse`, ask the net about what is known of x; its parameters for coordinate i need the coordinates before i only, so x_i = (z_i - mu_i) exp(-alpha_i) is right from then on. The Jacobian is triangular: what is its diagonal?",
    ),
    inputs=affine_layer_inputs, reference=flowkit_class("autoregressive", "MAF"),
    cases=(
        Case("shapes: z (B, D), ldj (B,), x (B, D)", 1, both_sizes(laws.shapes)),
        Case("the Jacobian is triangular", 1, both_sizes(jacobian_is_triangular)),
        Case("z = x exp(alpha) + mu", 1, both_sizes(maf_formula)),
        Case("ldj = log|det dz/dx|", 2, both_sizes(laws.ldj_is_log_det)),
        Case("the density is the product of its Gaussian conditionals", 1, both_sizes(gaussian_conditionals)),
        Case("inverse undoes forward, and forward inverse", 2, both_sizes(laws.round_trip)),
        Case("one pass for the density, D for sampling", 1, both_sizes(passes_counted("forward", "inverse"))),
        Case("gradients reach the net", 0.5, both_sizes(quick_gradients("z and ldj"))),
        Case("the input is left as it was", 0.5, both_sizes(laws.untouched)),
    ),
    misconceptions=(
        *affine_layer_mistakes(PlainMAF, "forward", "inverse", "x", "z"),
        deviating(PlainMAF)("ldj_detached", "detached", "ldj", "`ldj` is cut off from the computation graph, so training would not feel the log-determinant.", ldj=lambda self, alpha: alpha.detach().sum(-1)),
    ),
    compare=AFFINE_LAYER, features=counted_features("forward", "inverse"),
    faults=lambda i, o: laws.ldj_faults(i, o, SIZES), picture=jacobians,
)

IAF = Exercise(
    id="iaf", title="The inverse autoregressive flow", minutes=15, difficulty=2,
    hints=(
        "It is the MAF turned round. Sampling, `inverse`, has all of z and asks the net once. The density, `forward`, has x alone and has to find z one coordinate a pass.",
        "`forward` here does what `inverse` did in the MAF, with the letters exchanged: z_i = (x_i - mu_i) exp(-alpha_i). The log-determinant is asked for dz/dx, while exp(alpha) is the slope dx/dz: which sign follows?",
    ),
    inputs=affine_layer_inputs, reference=flowkit_class("autoregressive", "IAF"),
    cases=(
        Case("shapes: z (B, D), ldj (B,), x (B, D)", 1, both_sizes(laws.shapes)),
        Case("the Jacobian is triangular", 1, both_sizes(jacobian_is_triangular)),
        Case("x = z exp(alpha) + mu", 1, both_sizes(iaf_formula)),
        Case("ldj = log|det dz/dx|", 1.5, both_sizes(laws.ldj_is_log_det)),
        Case("the density of its own samples", 0.5, both_sizes(iaf_sample_density)),
        Case("inverse undoes forward, and forward inverse", 1, both_sizes(laws.round_trip)),
        Case("one pass for sampling, D for the density", 1, both_sizes(passes_counted("inverse", "forward"))),
        Case("gradients of the samples reach the net", 0.5, both_sizes(quick_gradients("the samples x = inverse(z)"))),
        Case("the input is left as it was", 0.5, both_sizes(laws.untouched)),
    ),
    misconceptions=(
        *affine_layer_mistakes(PlainIAF, "inverse", "forward", "z", "x"),
        deviating(PlainIAF)("ldj_at_start", "wrong function", "ldj", "`ldj` is made of the net's first answer, when z was not known yet; alpha is needed at the z that was found.", forward=ldj_at_start),
        Misconception("is_maf", "exchanged", "forward", "This is a MAF: forward and inverse have changed places. In an IAF x = z exp(alpha) + mu, with alpha and mu computed from z.", lambda: (PlainMAF,)),
        deviating(PlainIAF)("ldj_every_turn", "extra term", "ldj", "`ldj` is added up in every turn, over all coordinates: each alpha is counted D times.", forward=ldj_every_turn),
        deviating(PlainIAF)("ldj_rows", "wrong axis", "ldj", "`ldj` adds up rows of alpha instead of columns: it has a number for each coordinate, where each point needs one.", forward=ldj_of_rows),
        deviating(PlainIAF)("ldj_at_x", "wrong function", "ldj", "`ldj` is made of net(x); alpha is a function of z.", forward=ldj_at_x),
    ),
    compare=AFFINE_LAYER, features=counted_features("inverse", "forward"),
    faults=lambda i, o: laws.ldj_faults(i, o, SIZES), picture=pictures.warp_and_density("D=2 "),
)


# --- naf -------------------------------------------------------------------------------------------------------------

NAF_K, NAF_LEARNT = 4, 5        # sigmoids of each coordinate: in the laws, and in the training
NAF_STEPS, NAF_RATE = 60, 0.2
NAF_GRID = 1.5 * np.arange(-2, 3)       # the grid of Gaussians: five places each way, standard deviation 0.2
NAF_DEVIATION = 0.2
NAF_BOX, NAF_CELLS = 4.0, 48
# The best that any affine autoregressive layer can do: its conditionals are Gaussians, and those of the target have this variance wherever x_1 is.
NAF_AFFINE = math.log(2 * math.pi * math.e * (NAF_GRID.var() + NAF_DEVIATION**2))   # nats, over both coordinates: 4.35
NAF_BETTER = 0.3        # nats, by which it is to be beaten; the entropy of the target is 2.84


def naf_grid_points(rng, *shape):
    return rng.choice(NAF_GRID, (*shape, 2)) + NAF_DEVIATION * rng.standard_normal((*shape, 2))


def naf_training(rng):
    """All that the training needs. The names end in "grid", so the bank of wrong answers, which compares laws alone, is spared it, and random answers train for a few batches only."""
    test, places = naf_grid_points(rng, 400), np.linspace(-3, 3, NAF_LEARNT)
    own = np.tile(np.concatenate([np.full(NAF_LEARNT, math.log(math.expm1(2.0))), -2 * places, np.zeros(NAF_LEARNT)]), (2, 1))
    inputs = {"batches": naf_grid_points(rng, NAF_STEPS, 150), "test": test, "test near": laws.near(test), "own": own, "inner": rng.standard_normal(8),
              "outer": 0.05 * rng.standard_normal((8, 3 * NAF_LEARNT)), 
              "cells": plotting.grid_points((-NAF_BOX, NAF_BOX) * 2, NAF_CELLS).astype(float)}
    return {f"{k} grid": v for k, v in inputs.items()}


def naf_inputs(rng):
    inputs = {}
    for prefix in SIZES:
        dim = int(prefix[2])
        inputs |= layer_inputs(rng, dim, prefix) | loss_inputs(rng, dim, prefix) | masked_net_inputs(rng, dim, 3 * NAF_K, prefix)
    return inputs | naf_training(rng) | {"rate": np.array(NAF_RATE)}


def naf_shapes(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    rows, D = x.shape
    for key, want, letters in (("forward.z", (rows, D), "(B, D)"), ("forward.ldj", (rows,), "(B,)"),
                               ("forward of one row.z", (1, D), "(B, D)"), ("forward of one row.ldj", (1,), "(B,)")):
        got = outputs[prefix + key].shape
        if got != want:
            one = " for a batch of one row" if "one row" in key else ""
            raise Fail(f"`{key.rsplit('.', 1)[1]}` from forward has shape {got}{one}; it should be {letters} = {want}.")
    if not np.array_equal(outputs[prefix + "x after"], x):
        raise Fail("forward changed its input `x` in place: the caller's tensor was overwritten.")


def naf_formula(inputs, outputs, prefix):
    """z in numpy: the logit of a mixture of sigmoids, the parameters from the conditioner."""
    x = inputs[prefix + "x"]
    w = {k: inputs[f"{prefix}net.{k}"] for k in ("W1", "b1", "W2", "b2")}
    raw = (np.tanh(x @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]).reshape(len(x), 3, NAF_K, -1)     # columns p * D + i
    a, b, logits = (raw[:, i].transpose(0, 2, 1) for i in range(3))
    u = np.log1p(np.exp(a)) * x[..., None] + b
    weight = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    below, above = ((weight / (1 + np.exp(sign * u))).sum(-1) for sign in (-1, 1))
    laws.expect("z", x, outputs[prefix + "forward.z"], np.log(below / above), max(1e-4, laws.tolerance(outputs[prefix + "forward.z"])),
                ": it is logit(sum_k w_k sigmoid(a_k x_i + b_k)) with a (softplus), b, w (softmax) in this order from the conditioner")


def naf_cross_entropy(inputs, outputs):
    """-E log p over fresh points of the target, with the log-determinant of the student's own z by differences."""
    x, z, near = inputs["test grid"], outputs["training on the grid test.z"], outputs["training on the grid test near.z"]
    if z.shape != x.shape or near.shape != inputs["test near grid"].shape:
        raise Fail(f"`z` from forward has shape {z.shape} for {len(x)} points.")
    det = np.linalg.slogdet(laws.jacobian(near, x.shape))[1]
    return float(-(laws.normal_log_prob(z.astype(float)) + det).mean())


def naf_trains(inputs, outputs, reference):
    reached, limit = naf_cross_entropy(inputs, outputs), NAF_AFFINE - NAF_BETTER
    if not reached < limit:
        how = f"it is at {reached:.2f} nats" if np.isfinite(reached) else "it squeezed space flat"
        raise Fail(f"After {NAF_STEPS} batches of the grid of Gaussians {how}; the best affine layer reaches {NAF_AFFINE:.2f}, under {limit:.2f} is asked for.")


def naf_picture(inputs, outputs, reference):
    return pictures.densities("training on the grid.log_prob", NAF_BOX, NAF_CELLS, NAF_BOX)(inputs, outputs, reference)


class PlainNAF:
    """A NAF in its plainest form, one method a step."""

    def __init__(self, conditioner):
        self.conditioner = conditioner

    def params(self, x):
        return self.conditioner(x).chunk(3, -1)

    def slopes(self, a):
        return F.softplus(a)

    def weights(self, w):
        return w.softmax(-1)

    def inner(self, x, a, b):
        return a * x[..., None] + b

    def inner_slope(self, a):
        return a

    def logit(self, below, above):
        return below.log() - above.log()

    def logit_slope(self, below, above):
        return -below.log() - above.log()

    def mixture_slope(self, u, w, a):
        return (w * self.inner_slope(a) * torch.sigmoid(u) * torch.sigmoid(-u)).sum(-1).log()

    def ldj(self, log_slope):
        return log_slope.sum(-1)

    def forward(self, x):
        a, b, w = self.params(x)
        a, w = self.slopes(a), self.weights(w)
        u = self.inner(x, a, b)
        below, above = (w * torch.sigmoid(u)).sum(-1), (w * torch.sigmoid(-u)).sum(-1)
        return self.logit(below, above), self.ldj(self.mixture_slope(u, w, a) + self.logit_slope(below, above))


class ReferenceNAF:
    """flowkit's NAF behind the exercise's conditioner (B, D, 3K)."""

    def __init__(self, conditioner):
        self.conditioner = conditioner

    def forward(self, x):
        from flowkit.elementwise import dsf

        a, b, w = self.conditioner(x).chunk(3, -1)
        z, log_slope = dsf(x, F.softplus(a), b, w.softmax(-1))
        return z, log_slope.sum(-1)


def naf_permuted(*order):
    return lambda self, x: tuple(PlainNAF.params(self, x)[i] for i in order)


def naf_without_gradient(self, x):
    with torch.no_grad():
        return PlainNAF.params(self, x)


def naf_in_place(self, x):
    z, ldj = PlainNAF.forward(self, x.clone())
    with torch.no_grad():
        x.copy_(z)
    return z, ldj


def naf_interleaved(self, x):
    return self.conditioner(x).unflatten(-1, (-1, 3)).unbind(-1)


def naf_shifted(self, x):
    """The parameters of the next coordinate, which know this one."""
    return PlainNAF.params(self, x)[0].roll(-1, 1), *PlainNAF.params(self, x)[1:]


def naf_slope_in_logs(self, u, w, a):
    return torch.logsumexp(w.log() + a.log() + F.logsigmoid(u) + F.logsigmoid(-u), -1)


naf_wrong = deviating(PlainNAF)
NAF_MISTAKES = (
    naf_wrong("no_logit", "missing function", "forward", "`z` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, in `z` and in `ldj`.", logit=lambda self, below, above: below, logit_slope=lambda self, below, above: 0 * below),
    naf_wrong("value_no_logit", "missing function", "forward", "`z` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, though `ldj` reckons with it.", logit=lambda self, below, above: below),
    naf_wrong("ldj_no_logit", "missing term", "ldj", "`ldj` lacks the derivative of the logit: it is the log-slope of the mixture of sigmoids alone.", logit_slope=lambda self, below, above: 0 * below),
    naf_wrong("ldj_logit_sign", "sign", "ldj", "In `ldj` the logit's derivative has the wrong sign: it is 1 / (p (1 - p)), which is large where p is near 0 or 1.", logit_slope=lambda self, below, above: below.log() + above.log()),
    naf_wrong("ldj_half_logit", "missing term", "ldj", "In `ldj` half of the logit's derivative is missing: of 1 / (p (1 - p)) only 1 / p is there.", logit_slope=lambda self, below, above: -below.log()),
    naf_wrong("ldj_no_a", "missing term", "ldj", "In `ldj` the slopes a of the inner maps a x + b are missing.", inner_slope=lambda self, a: torch.ones_like(a)),
    naf_wrong("ldj_no_weights", "missing term", "ldj", "In `ldj` the weights w of the mixture are missing.", mixture_slope=lambda self, u, w, a: (a * torch.sigmoid(u) * torch.sigmoid(-u)).sum(-1).log()),
    naf_wrong("ldj_jensen", "order", "ldj", "In `ldj` the logarithms of the components' slopes are averaged; the slopes must be averaged first, and then their logarithm taken.", mixture_slope=lambda self, u, w, a: (w * (a * torch.sigmoid(u) * torch.sigmoid(-u)).log()).sum(-1)),
    naf_wrong("ldj_sigmoid_slope", "wrong function", "ldj", "In `ldj` the derivative of the sigmoid is taken for the sigmoid itself; it is sigmoid(u) (1 - sigmoid(u)).", mixture_slope=lambda self, u, w, a: (w * a * torch.sigmoid(u)).sum(-1).log()),
    naf_wrong("no_softplus", "missing function", "forward", "The slopes a are used raw: without the softplus some are negative, and the map does not rise everywhere.", slopes=lambda self, a: a),
    naf_wrong("no_softplus_logs", "missing function", "forward", "The slopes a are used raw: without the softplus some are negative, and have no logarithm.", slopes=lambda self, a: a, mixture_slope=naf_slope_in_logs),
    naf_wrong("exp_for_softplus", "wrong function", "forward", "The slopes a are exp of the raw numbers; the softplus is asked for.", slopes=lambda self, a: a.exp()),
    naf_wrong("sigmoid_for_softplus", "wrong function", "forward", "The slopes a are a sigmoid of the raw numbers, so none is above 1; the softplus is asked for.", slopes=lambda self, a: a.sigmoid()),
    naf_wrong("relu_for_softplus", "wrong function", "forward", "The slopes a are cut off at 0 instead of passing a softplus: where all are 0 the map is flat, and has no inverse.", slopes=lambda self, a: a.relu()),
    naf_wrong("softmax_for_slopes", "wrong function", "forward", "The slopes a are put through a softmax; that is for the weights, slopes take a softplus.", slopes=lambda self, a: a.softmax(-1)),
    naf_wrong("no_softmax", "missing function", "forward", "The weights w are used raw: the softmax that makes them positive and adds them up to one is missing.", weights=lambda self, w: w),
    naf_wrong("no_softmax_logs", "missing function", "forward", "The weights w are used raw: without the softmax some are negative, and have no logarithm.", weights=lambda self, w: torch.where(w > 0, w, torch.nan), mixture_slope=naf_slope_in_logs),
    naf_wrong("softmax_dimensions", "wrong axis", "forward", "The softmax of w runs over the dimensions of x; the weights of one coordinate's K components must add up to one.", weights=lambda self, w: w.softmax(1)),
    naf_wrong("softmax_batch", "wrong axis", "forward", "The softmax of w runs over the batch, so the rows influence each other; it belongs to the K components, the last dimension.", weights=lambda self, w: w.softmax(0)),
    naf_wrong("log_softmax", "wrong function", "forward", "The weights are a log_softmax, that is their logarithms; what is mixed here is weighted with w itself.", weights=lambda self, w: w.log_softmax(-1)),
    naf_wrong("softplus_weights", "wrong function", "forward", "The weights w pass a softplus: they are positive, but do not add up to one; that takes a softmax.", weights=lambda self, w: F.softplus(w)),
    naf_wrong("softplus_normalised", "wrong function", "forward", "The weights w pass a softplus and are divided by their sum: positive and adding up to one, but here w is a softmax of the conditioner's numbers.", weights=lambda self, w: F.softplus(w) / F.softplus(w).sum(-1, keepdim=True)),
    naf_wrong("sigmoid_weights", "wrong function", "forward", "The weights w pass a sigmoid: they are positive, but do not add up to one; that takes a softmax.", weights=lambda self, w: w.sigmoid()),
    naf_wrong("equal_weights", "missing term", "forward", "The weights w are not used: all components count alike.", weights=lambda self, w: torch.ones_like(w) / w.shape[-1]),
    naf_wrong("blocks_b_a_w", "exchanged", "forward", "a and b are taken from the conditioner's output in the wrong order: the blocks are a, b, w.", params=naf_permuted(1, 0, 2)),
    naf_wrong("blocks_a_w_b", "exchanged", "forward", "b and w are taken from the conditioner's output in the wrong order: the blocks are a, b, w.", params=naf_permuted(0, 2, 1)),
    naf_wrong("blocks_w_b_a", "exchanged", "forward", "a and w are taken from the conditioner's output in the wrong order: the blocks are a, b, w.", params=naf_permuted(2, 1, 0)),
    naf_wrong("blocks_w_a_b", "order", "forward", "The conditioner's output is taken as w, a, b; the blocks are a, b, w.", params=naf_permuted(1, 2, 0)),
    naf_wrong("interleaved", "order", "forward", "The parameters are taken from the conditioner's output in turns, a, b, w for each component; they come in blocks of K.", params=naf_interleaved),
    naf_wrong("next_slopes", "off by one", "net", "A coordinate is bent with parameters of the next one, which know it: the map is not autoregressive.", params=naf_shifted),
    naf_wrong("no_b", "missing term", "forward", "The shifts b are not used.", inner=lambda self, x, a, b: a * x[..., None]),
    naf_wrong("b_sign", "sign", "forward", "The shifts b are subtracted; the inner map is a x + b.", inner=lambda self, x, a, b: a * x[..., None] - b),
    naf_wrong("scaled_shift", "order", "forward", "The inner map is a (x + b); it is a x + b: the shift is not scaled.", inner=lambda self, x, a, b: a * (x[..., None] + b)),
    naf_wrong("centred", "wrong function", "forward", "The inner map is a (x - b), as if b were a centre; it is a x + b.", inner=lambda self, x, a, b: a * (x[..., None] - b)),
    naf_wrong("divided", "direction", "forward", "The inner map is (x - b) / a, as for a scale; a is a slope, and the map is a x + b.", inner=lambda self, x, a, b: (x[..., None] - b) / a, inner_slope=lambda self, a: 1 / a),
    naf_wrong("not_monotone_in_a", "missing term", "forward", "x is not multiplied by the slopes a.", inner=lambda self, x, a, b: x[..., None] + b, inner_slope=lambda self, a: torch.ones_like(a)),
    naf_wrong("z_sign", "sign", "forward", "`z` has the wrong sign: the logit is log p - log(1 - p), and rises with x.", logit=lambda self, below, above: above.log() - below.log()),
    naf_wrong("only_log", "missing term", "forward", "`z` is the logarithm of the mixture: of the logit log p - log(1 - p) the second term is missing.", logit=lambda self, below, above: below.log()),
    naf_wrong("ldj_no_sum", "shape", "ldj", NO_SUM, ldj=lambda self, s: s),
    naf_wrong("ldj_wrong_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the dimensions.", ldj=lambda self, s: s.sum(0)),
    naf_wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, s: s.mean(-1)),
    naf_wrong("ldj_slopes", "missing function", "ldj", "`ldj` adds up the slopes; it is their logarithms that add up.", ldj=lambda self, s: s.exp().sum(-1)),
    naf_wrong("ldj_detached", "detached", "ldj", "`ldj` is cut off from the computation graph, so training would not feel the log-determinant.", ldj=lambda self, s: s.detach().sum(-1)),
    *ldj_mistakes(PlainNAF, "ldj_sign", "ldj_zero", "ldj_det", "ldj_keepdim", "ldj_batch_sum"),
    naf_wrong("net_no_grad", "detached", "net", "The conditioner's output is cut off from the computation graph (no_grad or detach), so it would never learn.", params=naf_without_gradient),
    naf_wrong("in_place", "in place", "input", "forward writes its result into the tensor x that it was given: the caller's data are overwritten.", forward=naf_in_place),
    returns_exchanged(PlainNAF),
)


def light_naf(inputs):
    """For slips: D = 6 alone, and no training."""
    return {k: v for k, v in inputs.items() if not k.startswith("D=2 ") and not k.endswith("grid")}


NAF = Exercise(
    id="naf", title="The neural autoregressive flow", minutes=15, difficulty=3,
    hints=(
        "`self.conditioner(x)` is (B, D, 3K): `chunk(3, dim=-1)` gives raw a, b and w, each (B, D, K). Make them what `dsf` asks for: a positive, the weights of each coordinate positive with sum one.",
        "`F.softplus` for a, `softmax(-1)` for w, nothing for b; then `dsf(x, a, b, w)` does all the rest. Whether the map is triangular is the conditioner's business: what coordinate i is given comes from those before it.",
    ),
    inputs=naf_inputs, reference=lambda: (ReferenceNAF,),
    cases=(
        Case("shapes: z (B, D), ldj (B,)", 1, both_sizes(naf_shapes)),
        Case("the Jacobian is triangular, its diagonal positive", 1, both_sizes(jacobian_is_triangular)),
        Case("z is the DSF of each coordinate", 2, both_sizes(naf_formula)),
        Case("ldj = log|det dz/dx|", 2, both_sizes(laws.ldj_is_log_det)),
        Case("gradients reach the conditioner", 0.5, both_sizes(lambda i, o, p: gradient_arrives(o, p, "z and ldj", "the conditioner"))),
        Case("trained on the grid of Gaussians it beats every affine layer", 1.5, naf_trains),
    ),
    misconceptions=NAF_MISTAKES, compare=sized(("forward.z", "forward.ldj", "x after", "gradient.along")), light=light_naf,
    faults=lambda i, o: laws.ldj_faults(i, o, SIZES), picture=naf_picture,
)


# =====================================================================================================================
# Masked nets for sequences and images (causal_conv1d, pixelcnn_mask, causal_attention), then sigmoidal flows (dsf, ddsf)
# =====================================================================================================================


def piecewise(make):
    """mistake(id, kind, place, sentence, name=function, ...): a Misconception whose object is the function `make(name=function, ...)`."""

    def mistake(id, kind, place, sentence, **pieces):
        return Misconception(id, kind, place, sentence, lambda: (make(**pieces),))

    return mistake


def same_after(inputs, outputs, names):
    """The caller's tensors are as they were: "x after" against the input "x"."""
    for name in names:
        got = outputs[f"{name} after"]
        if got.shape != inputs[name].shape or not np.array_equal(got, inputs[name]):
            raise Fail(f"The input `{name}` was changed in place: the caller's tensor was overwritten.")


def seen_beside(panels):
    """For "what sees what": the matrices of `panels(inputs, outputs)`, a list of (title, matrix or None, across, down), expected beside yours."""

    def draw(inputs, outputs, reference):
        wanted, mine = panels(inputs, reference), panels(inputs, outputs)
        n = len(wanted)
        figure = plotting.Picture(figsize=(3.6 * n, 7) if n > 1 else (8, 4), layout="constrained")
        axes = figure.subplots(2, n) if n > 1 else figure.subplots(1, 2)[:, None]
        for row, found, who in zip(axes, (wanted, mine), ("expected", "yours")):
            for ax, (title, matrix, across, down), (_, want, *_) in zip(row, found, wanted):
                ax.set_title(f"{title}\n{who}", fontsize=plotting.FONT - 1)
                if matrix is None or matrix.shape != want.shape or not np.isfinite(matrix).all():
                    pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
                    continue
                ax.imshow(np.abs(matrix), cmap="Greys", vmin=0, vmax=1)
                for i, j in np.argwhere(np.abs(matrix - want) > 1e-3):
                    ax.plot(j, i, "x", color=plotting.PALETTE["red"], markersize=min(9, 90 / len(want)), markeredgewidth=2)
                ax.set_xticks([]), ax.set_yticks([])
                ax.set_xlabel(across, fontsize=plotting.FONT - 2), ax.set_ylabel(down, fontsize=plotting.FONT - 2)
        return figure

    return draw


# --- causal_conv1d ---------------------------------------------------------------------------------------------------

def causal_inputs(rng):
    inputs = {"noise": np.array(rng.integers(2**31)), "stack.x": rng.standard_normal((1, 1, 13))}
    for name, ((c_in, *_), _, length) in CAUSAL_LAYERS.items():
        x, other = rng.standard_normal((2, c_in, length))
        inputs[f"{name}.x"] = np.stack([x, 2 * x, 0 * x, other])
    return inputs


def causal_lags(name):
    (_, _, k), more, _ = CAUSAL_LAYERS[name]
    return [int(more.get("exclusive", False)) + j * more.get("dilation", 1) for j in range(k)]


STACK_LAGS = list(range(1, 10))  # of CAUSAL_STACK: 1 and 2 in the first layer, then 0 and each dilation


def lagged(length, lags):
    """[t, s]: whether the output at t should see the input at s."""
    t = np.arange(length)
    return np.isin(t[:, None] - t, lags)


def causal_responses(outputs, key, c_in, length):
    """How much the output at t moves with the input at s, [c_out, t, c_in, s], of the student's own layer."""
    y = outputs[key]
    if y.ndim != 3 or len(y) != 1 + c_in * length or y.shape[2] != length:
        raise Fail(f"For x of shape {(1 + c_in * length, c_in, length)} the result has shape {y.shape}; it should be as long as x: (B, c_out, L).")
    return np.moveaxis((y[1:] - y[:1]).reshape(c_in, length, y.shape[1], length), (2, 3), (0, 1))


def causal_moved(responses):
    return np.abs(responses) > (1e-3 if responses.dtype == np.float32 else 1e-9)


def causal_words(lags, t="t"):
    return ", ".join(t if k == 0 else f"{t} {'-' if k > 0 else '+'} {abs(k)}" for k in lags) or "nothing"


def sees(outputs, key, c_in, length, lags, what):
    """Each output at t sees all channels of x at t - lag, for these lags, and nothing else."""
    moved = causal_moved(causal_responses(outputs, key, c_in, length))
    want = lagged(length, lags)
    got = moved.any((0, 2))
    t, s = np.nonzero(got != want)
    if len(t):
        later = s > t if 0 in lags else s >= t
        i = int(np.argmax(later & got[t, s])) if (later & got[t, s]).any() else 0
        seen = sorted({int(b - a) for b, a in np.argwhere(got)})
        told = f"{what} should see x at {causal_words(lags)}; yours sees x at {causal_words(seen)}"
        if sorted(seen) == sorted(lags) or not seen:
            told = f"In {what} the output at t should see x at {causal_words(lags)}, for every t"
        raise Fail(f"{told}.", f"y[{t[i]}] {'moves' if got[t[i], s[i]] else 'does not move'} when x[{s[i]}] does")
    if (moved.any(2).any(0) != want).any() or not (moved == want[None, :, None, :]).all():
        raise Fail(f"In {what} not every output channel sees every input channel.")


def causal_shapes(inputs, outputs, reference):
    for name, ((_, c_out, _), _, length) in CAUSAL_LAYERS.items():
        for rows, key in ((4, f"forward of {name}.y"), (1, f"forward of {name} (one sequence).y")):
            got = outputs[key].shape
            if got != (rows, c_out, length):
                raise Fail(f"{name} makes {got} of x with shape {(rows, *inputs[f'{name}.x'].shape[1:])}; it should be (B, c_out, L) = {(rows, c_out, length)}.")
        got = outputs[f"{name}.x after"]
        if got.shape != inputs[f"{name}.x"].shape or not np.array_equal(got, inputs[f"{name}.x"]):
            raise Fail("forward changed its input `x` in place: the caller's tensor was overwritten.")


def causal_sees(exclusive):
    def judge(inputs, outputs, reference):
        for name, ((c_in, *_), more, length) in CAUSAL_LAYERS.items():
            if more.get("exclusive", False) == exclusive:
                sees(outputs, f"forward of {name} (entry by entry).y", c_in, length, causal_lags(name), name)

    return judge


def causal_stack(inputs, outputs, reference):
    sees(outputs, "forward of the stack.y", 1, inputs["stack.x"].shape[2], STACK_LAGS, f"a stack of an exclusive layer and the dilations 1, 2, 4 ({len(CAUSAL_STACK)} layers)")


def convolves(inputs, outputs, name):
    """One set of weights for all t, linear in x, zeros before the start, rows apart."""
    (c_in, _, _), _, length = CAUSAL_LAYERS[name]
    step = f"forward of {name}"
    responses = causal_responses(outputs, f"{step} (entry by entry).y", c_in, length)
    y, one = outputs[f"{step}.y"], outputs[f"{step} (one sequence).y"]
    tol = 1e-4 if y.dtype == np.float32 else 1e-8
    if y.ndim != 3 or len(y) != 4 or y.shape[2] != length or one.shape != (1, *y.shape[1:]):
        raise Fail(f"{name} makes {y.shape} of x with shape {inputs[f'{name}.x'].shape}; the shape should be (B, c_out, L).")
    if not laws.close(one[0], y[0], tol).all():
        raise Fail(f"{name}: the sequences of a batch influence each other.")
    if not laws.close(y[1] - y[2], 2 * (y[0] - y[2]).astype(float), tol).all():
        raise Fail(f"{name}: a convolution is linear in x, but where x is doubled the output (less its value at x = 0) is not.")
    if np.ptp(y[2], 1).max() > tol:
        raise Fail(f"{name}: for x = 0 the output should be the same at every t; something else than zeros stands before the start, or the result was shifted instead of the input, so that the bias is missing there.")
    for lag in range(1 - length, length):
        band = np.diagonal(responses, -lag, 1, 3)  # the responses to the input `lag` steps before, at all t
        if np.ptp(band, -1).max(initial=0) > tol:
            raise Fail(f"{name}: a convolution has the same weights at every t; yours weighs x[t {'-' if lag >= 0 else '+'} {abs(lag)}] differently for different t.")


def causal_trains(outputs):
    (c_in, c_out, k), _, length = CAUSAL_LAYERS[CAUSAL_TRAINED]
    weights, x = outputs["gradient.reached"]
    if not outputs["module"] or weights < c_in * c_out * k:
        raise Fail(f"The gradient reaches {weights:g} numbers among the parameters; the kernel of {CAUSAL_TRAINED} has {c_in * c_out * k} weights to train.")
    if x < c_in * (length - 1):
        raise Fail("No gradient reaches x, so layers below could not be trained.")


def causal_convolution(inputs, outputs, reference):
    for name in CAUSAL_LAYERS:
        convolves(inputs, outputs, name)
    causal_trains(outputs)


def causal_features(inputs, outputs):
    """What sees what, which laws of a convolution break and where: the same for all ways to keep the weights."""
    found = {}

    def text(key):
        kind, sentence = outputs.complaint(key.rsplit(".", 1)[0]) or outputs.first_complaint() or ("", "did not run")
        return f"{kind}: {sentence}"

    for name in CAUSAL_LAYERS:
        key = f"forward of {name} (entry by entry).y"
        if key not in outputs:
            found[name] = text(key)
            continue
        y = outputs[key]
        found[name] = causal_moved(y[1:] - y[:1]).astype(int) if y.ndim == 3 else str(y.shape)
        try:
            convolves(inputs, outputs, name)
            found[f"{name} law"] = ""
        except Fail as e:
            found[f"{name} law"] = e.sentence
    found["gradient"] = outputs.arrays.get("gradient.reached", text("gradient.reached"))
    return found


def causal_panels(inputs, outputs):
    panels = []
    for title, name in (("kernel 3, dilation 4", "CausalConv1d(1, 2, 3, dilation=4)"), ("kernel 2, exclusive", "CausalConv1d(2, 4, 2, exclusive=True)"), ("a stack of four", None)):
        key = f"forward of {name} (entry by entry).y" if name else "forward of the stack.y"
        try:
            matrix = causal_moved(causal_responses(outputs, key, *inputs[f"{name or 'stack'}.x"].shape[1:])).any((0, 2)).astype(float)
        except Fail:
            matrix = None
        panels.append((title, matrix, "input x[s]", "output y[t]"))
    return panels


class PlainCausal(nn.Module):
    """A causal convolution in small steps, for the misconceptions to deviate from."""

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__()
        self.k, self.d, self.exclusive = kernel_size, dilation, exclusive
        self.conv = self.make(c_in, c_out)

    def make(self, c_in, c_out):
        return nn.Conv1d(c_in, c_out, self.k, dilation=self.d)

    def reach(self):
        return (self.k - 1) * self.d

    def shift(self):
        return int(self.exclusive)

    def pad(self, x):
        return F.pad(x, (self.reach() + self.shift(), -self.shift()))

    def convolve(self, x):
        return self.conv(x)

    def finish(self, y, x):
        return y

    def forward(self, x):
        return self.finish(self.convolve(self.pad(x)), x)


def masked_tap(self, x):
    """Exclusive by a hole in the kernel: the weight of the present is zero."""
    mask = torch.ones_like(self.conv.weight)
    if self.exclusive:
        mask[:, :, -1] = 0
    return F.conv1d(x, self.conv.weight * mask, self.conv.bias, dilation=self.d)


def masked_half(self, x):
    """A centred kernel with the weights of the future set to zero."""
    mask = torch.ones_like(self.conv.weight)
    mask[:, :, self.k // 2 + (self.k > 1):] = 0
    return F.conv1d(x, self.conv.weight * mask, self.conv.bias, dilation=self.d)


def centred(self, x):
    right = self.reach() // 2
    return F.pad(x, (self.reach() - right + self.shift(), right - self.shift()))


def padded(mode, **value):
    return lambda self, x: F.pad(F.pad(x, (0, -self.shift())), (self.reach() + self.shift(), 0), mode, **value)


wrong = deviating(PlainCausal)
CAUSAL_CONV1D = Exercise(
    id="causal_conv1d", title="A convolution that sees the past only", minutes=15, difficulty=3,
    hints=(
        "Write down which inputs the output at t is made of: the present and kernel_size - 1 earlier ones, dilation steps apart. How many places before the start does the output at t = 0 reach for? So many zeros are missing there, all on one side.",
        "`F.pad(x, (left, right))` adds places before the start and after the end of the last dimension, and a negative number cuts off. An ordinary `nn.Conv1d` without padding of its own does the rest. For `exclusive` the whole row of inputs moves by one place: one more zero comes in, and one input falls out.",
    ),
    inputs=causal_inputs, reference=flowkit_class("nets", "CausalConv1d"),
    cases=(
        Case("the result is as long as x: (B, c_out, L)", 1, causal_shapes),
        Case("the output at t sees t, t - d, t - 2d, ..., and nothing else", 2, causal_sees(False)),
        Case("an exclusive layer sees t - 1, t - 1 - d, ..., and never t", 2, causal_sees(True)),
        Case("a stack sees x[t-1] and never x[t]; its receptive field", 2, causal_stack),
        Case("the same weights at every t, zeros before the start, all trained", 1, causal_convolution),
    ),
    misconceptions=(
        wrong("both_sides", "direction", "forward", "The zeros are divided between both sides, as for a picture: the output at t sees what comes after t.", pad=centred),
        wrong("pad_right", "direction", "forward", "The zeros stand after the end instead of before the start: the output at t sees t and what comes after it.", pad=lambda self, x: F.pad(x, (self.shift(), self.reach() - self.shift()))),
        wrong("time_reversed", "exchanged", "forward", "Before and after have changed places: the layer sees t and what comes after it.", forward=lambda self, x: self.conv(self.pad(x.flip(-1))).flip(-1)),
        wrong("no_padding", "missing term", "forward", "There is no padding, so the result is shorter than x, and its first entry does not belong to t = 0.", pad=lambda self, x: F.pad(x, (self.shift(), -self.shift()))),
        wrong("end_not_cut", "shape", "forward", "Zeros are added on both sides and what is too much at the end is not cut off: the result is longer than x.", pad=lambda self, x: F.pad(x, (self.reach() + self.shift(), self.reach() - self.shift()))),
        wrong("padding_without_dilation", "missing term", "parameters", "The number of zeros does not depend on the dilation: with gaps in the kernel it reaches further back.", reach=lambda self: self.k - 1),
        wrong("padding_of_dilation", "missing term", "parameters", "The number of zeros is the dilation, whatever the kernel's size.", reach=lambda self: self.d),
        wrong("padding_off_by_one", "missing term", "parameters", "There are zeros for kernel_size steps back, one too many: the kernel's last tap is the present. So the result is longer than x.", reach=lambda self: self.k * self.d),
        wrong("off_by_one_cut", "off by one", "forward", "Every output sees what the one before should see: the kernel's last tap stands at t - d, for there is padding for one step back too many.", reach=lambda self: self.k * self.d, finish=lambda self, y, x: y[..., :x.shape[-1]]),
        wrong("padding_one_more", "off by one", "forward", "One zero too many stands before the start, and the result is one entry longer than x.", reach=lambda self: (self.k - 1) * self.d + 1),
        wrong("dilation_ignored", "missing term", "parameters", "The dilation is not used at all: the layer sees t, t - 1, t - 2, ...", make=lambda self, c_in, c_out: nn.Conv1d(c_in, c_out, self.k), reach=lambda self: self.k - 1),
        wrong("kernel_without_dilation", "missing term", "parameters", "The zeros are counted with the dilation, but the convolution itself is made without it.", make=lambda self, c_in, c_out: nn.Conv1d(c_in, c_out, self.k)),
        wrong("dilation_as_stride", "exchanged", "parameters", "The dilation is handed to the convolution as its stride (the fourth argument): it leaves out outputs instead of inputs.", make=lambda self, c_in, c_out: nn.Conv1d(c_in, c_out, self.k, self.d)),
        wrong("kernel_and_dilation_exchanged", "exchanged", "parameters", "The size of the kernel and the dilation have changed places.", make=lambda self, c_in, c_out: nn.Conv1d(c_in, c_out, self.d, dilation=self.k), reach=lambda self: (self.d - 1) * self.k),
        wrong("kernel_and_channels_exchanged", "exchanged", "parameters", "c_out and kernel_size have changed places where the convolution is made.", make=lambda self, c_in, c_out: nn.Conv1d(c_in, self.k, c_out, dilation=self.d)),
        wrong("reach_and_exclusive_exchanged", "exchanged", "parameters", "The number of zeros and `exclusive` have changed places where they are stored.", pad=lambda self, x: F.pad(x, (self.exclusive + 1, -1) if self.reach() else (self.exclusive, 0))),
        wrong("channels_exchanged", "exchanged", "parameters", "c_in and c_out have changed places where the convolution is made.", make=lambda self, c_in, c_out: nn.Conv1d(c_out, c_in, self.k, dilation=self.d)),
        wrong("depthwise", "missing term", "parameters", "The convolution works on each channel by itself (groups); every output channel should see every input channel.", make=lambda self, c_in, c_out: nn.Conv1d(c_in, c_out, self.k, dilation=self.d, groups=c_in)),
        wrong("centre_mask", "wrong function", "forward", "A centred kernel with the future set to zero loses half of its taps, and reaches only half as far back.", pad=centred, convolve=masked_half),
        wrong("exclusive_ignored", "missing term", "forward", "`exclusive` changes nothing: the output at t still sees x at t.", shift=lambda self: 0),
        wrong("exclusive_always", "extra term", "forward", "Every layer is shifted by one, whether `exclusive` or not: a stack of them leaves out the nearest past.", shift=lambda self: 1),
        wrong("exclusive_turned", "sign", "forward", "The condition is turned round: layers are shifted just when `exclusive` is False.", shift=lambda self: int(not self.exclusive)),
        wrong("exclusive_twice", "off by one", "forward", "`exclusive` shifts by two places: x at t - 1 is never seen.", shift=lambda self: 2 * int(self.exclusive)),
        wrong("exclusive_by_dilation", "wrong function", "forward", "`exclusive` shifts by the dilation; it should be by one place, whatever the dilation.", shift=lambda self: self.d * int(self.exclusive)),
        wrong("exclusive_by_kernel", "wrong function", "forward", "`exclusive` shifts by the size of the kernel; it should be by one place.", shift=lambda self: self.k * int(self.exclusive)),
        wrong("exclusive_forward", "direction", "forward", "`exclusive` shifts in the wrong direction: the output at t sees x at t + 1.", shift=lambda self: -int(self.exclusive)),
        wrong("exclusive_rolled", "wrong function", "forward", "`exclusive` turns the sequence round in a circle (roll): the last entry comes in at the start, and the first output sees the end.", pad=lambda self, x: F.pad(x.roll(self.shift(), -1), (self.reach(), 0))),
        wrong("exclusive_longer", "shape", "forward", "With `exclusive` one more zero comes in at the start, but no input falls out at the end: the result is one entry longer than x.", pad=lambda self, x: F.pad(x, (self.reach() + self.shift(), 0))),
        wrong("exclusive_shorter", "missing term", "forward", "With `exclusive` the last input is cut off, but no zero comes in at the start: the result is too short, and the output at t still sees t.", pad=lambda self, x: F.pad(x, (self.reach(), -self.shift()))),
        wrong("exclusive_cut_at_both_ends", "sign", "forward", "With `exclusive` an input falls out at both ends; at the start a zero should come in.", pad=lambda self, x: F.pad(x, (self.reach() - self.shift(), -self.shift()))),
        wrong("exclusive_longer_at_both_ends", "sign", "forward", "With `exclusive` a zero comes in at both ends; at the end an input should fall out.", pad=lambda self, x: F.pad(x, (self.reach() + self.shift(), self.shift()))),
        wrong("exclusive_sides_exchanged", "exchanged", "forward", "With `exclusive` before and after have changed places: zeros come in at the end, and the first input falls out.", pad=lambda self, x: F.pad(x, (-1, self.reach() + 1) if self.exclusive else (self.reach(), 0))),
        wrong("other_sides_exchanged", "exchanged", "forward", "Where the layer is not exclusive, before and after have changed places: it sees t and what comes after it.", pad=lambda self, x: F.pad(x, (self.reach() + 1, -1) if self.exclusive else (0, self.reach()))),
        wrong("exclusive_without_reach", "missing term", "forward", "With `exclusive` there is one zero for the shift and none for the rest of the kernel: the result is shorter than x.", pad=lambda self, x: F.pad(x, (1, -1) if self.exclusive else (self.reach(), 0))),
        wrong("exclusive_tap", "wrong function", "forward", "`exclusive` puts a hole into the kernel at the present, which costs a tap; the whole kernel should be shifted by one place.", convolve=masked_tap),
        wrong("replicated", "wrong function", "forward", "The first entry is repeated before the start; there should be zeros, for nothing is known there.", pad=padded("replicate")),
        wrong("circular", "wrong function", "forward", "The end of the sequence is put before its start (circular padding): the first outputs see the future.", pad=padded("circular")),
        wrong("padded_with_ones", "constant", "forward", "Ones stand before the start instead of zeros.", pad=padded("constant", value=1.0)),
        wrong("activation_inside", "extra term", "forward", "An activation is applied inside; this layer is a convolution and nothing else.", finish=lambda self, y, x: F.relu(y)),
        wrong("weights_detached", "detached", "gradient", "The weights are cut off from the computation graph, so they cannot be trained.", convolve=lambda self, x: F.conv1d(x, self.conv.weight.detach(), self.conv.bias.detach(), dilation=self.d)),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", finish=lambda self, y, x: y.detach()),
    ),
    features=causal_features, picture=seen_beside(causal_panels),
)


# --- pixelcnn_mask ---------------------------------------------------------------------------------------------------

def pixel_inputs(rng):
    return {"sizes": np.array([(1, 3), (3, 3), (1, 5), (2, 1), (rng.integers(4, 6), rng.integers(2, 4) * 2 + 1)])}


def centre_open(kind, channels):
    """[out, in] of the centre."""
    c = np.arange(channels)
    return (c < c[:, None] if kind == "A" else c <= c[:, None]).astype(float)


def pixel_mask_of(outputs, step, channels, size):
    mask = outputs[f"{step}.mask"]
    if mask.shape != (channels, channels, size, size):
        raise Fail(f"{step} has shape {mask.shape}; it should be (channels, channels, k, k) = {(channels, channels, size, size)}.")
    return mask.astype(float)


def pixel_shapes(inputs, outputs, reference):
    for step, _, channels, size in pixel_calls(inputs):
        mask = pixel_mask_of(outputs, step, channels, size)
        if not np.isin(mask, (0, 1)).all():
            raise Fail(f"{step} should hold zeros and ones and nothing else.")


def past_of(size):
    """[row, column] of a kernel: what comes before the centre in reading order."""
    return (np.arange(size * size) < size * size // 2).reshape(size, size)


def pixel_past(inputs, outputs, reference):
    for step, _, channels, size in pixel_calls(inputs):
        mask, past = pixel_mask_of(outputs, step, channels, size), past_of(size)
        for row, column in np.argwhere(past):
            if not (mask[:, :, row, column] == 1).all():
                where = "to the left of the centre" if row == size // 2 else "in a row above the centre"
                raise Fail(f"In {step} not everything {where} is open: row {row}, column {column} of the kernel (from 0) belongs to the past, in all channels.")


def pixel_future(inputs, outputs, reference):
    for step, _, channels, size in pixel_calls(inputs):
        mask = pixel_mask_of(outputs, step, channels, size)
        future = past_of(size)[::-1, ::-1]
        for row, column in np.argwhere(future):
            if mask[:, :, row, column].any():
                where = "to the right of the centre" if row == size // 2 else "in a row below the centre"
                raise Fail(f"{step} lets through what stands {where}: row {row}, column {column} of the kernel (from 0) is the future.")
        if not mask.any() and size > 1:
            raise Fail(f"{step} hides everything.")


def pixel_centre(inputs, outputs, reference):
    for step, kind, channels, size in pixel_calls(inputs):
        got, want = pixel_mask_of(outputs, step, channels, size)[:, :, size // 2, size // 2], centre_open(kind, channels)
        if not np.array_equal(got, want):
            o, i = np.argwhere(got != want)[0]
            rule = "those before it" if kind == "A" else "itself and those before it"
            raise Fail(f"At the centre of {step} output channel {o} should see, of the input channels, only {rule}; so input channel {i} should be {'open' if want[o, i] else 'hidden'} there.")


def pixel_depends(masks, channels, height=4, width=4):
    """[pixel and channel out, pixel and channel in] of convolutions with these masks, one after another; pixel after pixel, channel after channel."""
    n = height * width * channels
    total = np.eye(n)
    for mask in masks:
        k = mask.shape[-1]
        step = np.zeros((height, width, channels, height, width, channels))
        for i, j in np.ndindex(height, width):
            for r, c in np.ndindex(k, k):
                y, x = i + r - k // 2, j + c - k // 2
                if 0 <= y < height and 0 <= x < width:
                    step[i, j, :, y, x, :] += mask[:, :, r, c]
        total = np.minimum(step.reshape(n, n) @ total, 1.0)
    return total


def pixel_stack(inputs, outputs, reference):
    (_, _), (channels, size) = inputs["sizes"][:2]
    a, b = (pixel_mask_of(outputs, f'pixelcnn_mask("{kind}", {channels}, {size})', channels, size) for kind in "AB")
    seen = pixel_depends((a, b, b), channels) > 0
    if np.triu(seen).any():
        o, i = np.argwhere(np.triu(seen))[0]
        which = "itself" if o == i else "what comes after it"
        raise Fail(f"In a stack of kind A, B, B on {channels} channels, a value sees {which}: channel {o % channels} of pixel {o // channels} sees channel {i % channels} of pixel {i // channels} (of a row of 4).")
    before = np.arange(1, len(seen))
    if not seen[before, before - 1].reshape(-1)[(before % (4 * channels)) != 0].all():
        raise Fail("In a stack of kind A, B, B a value does not see the one just before it: too much is hidden.")


def pixel_by(past=past_of, centre=centre_open, join=lambda mask: mask, everywhere=False):
    """The mask from its two parts, for the misconceptions to deviate from."""

    def pixelcnn_mask(kind, channels, kernel_size):
        k = kernel_size
        mask = np.tile(past(k).astype(float), (channels, channels, 1, 1))
        if everywhere:
            mask *= centre("B", channels)[:, :, None, None]
        mask[:, :, k // 2, k // 2] = centre(kind, channels)
        return torch.from_numpy(np.ascontiguousarray(join(mask)))

    return pixelcnn_mask


def rule(a, b):
    """The centre by two rules on (out, in), one for each kind."""

    def centre(kind, channels):
        out, into = np.indices((channels, channels))
        return (a if kind == "A" else b)(out, into).astype(float)

    return centre


def grid_rule(holds):
    """The past by a rule on (row, column, middle)."""

    def past(k):
        row, column = np.indices((k, k))
        return holds(row, column, k // 2)

    return past


def pixel_features(inputs, outputs):
    return {f"{n} {kind}": outputs.arrays.get(f"{step}.mask", np.asarray(str(outputs.complaint(step) or "did not run")))
            for n, (step, kind, _, _) in enumerate(pixel_calls(inputs))}


def pixel_panels(inputs, outputs):
    def mask(kind, channels, size):
        try:
            return pixel_mask_of(outputs, f'pixelcnn_mask("{kind}", {channels}, {size})', channels, size)
        except Fail:
            return None

    one, three, b = mask("A", 1, 5), mask("A", 3, 3), mask("B", 3, 3)
    stack = None if three is None or b is None else (pixel_depends((three, b, b), 3, 3, 3) > 0).astype(float)
    channels = "input channel", "output channel"
    return [("kind A, 1 channel", None if one is None else one[0, 0], "column", "row"), ("centre of A, 3 channels", None if three is None else three[:, :, 1, 1], *channels),
            ("centre of B, 3 channels", None if b is None else b[:, :, 1, 1], *channels), ("stack A, B, B, 3 x 3 pixels", stack, "input value", "output value")]


wrong = piecewise(pixel_by)
PIXELCNN_MASK = Exercise(
    id="pixelcnn_mask", title="The mask of a PixelCNN", minutes=12, difficulty=3,
    hints=(
        "Begin with one channel and draw the kernel. Pixels are read row after row: all rows above the centre are the past, and in the centre's row what stands to the left. Only the centre itself depends on kind and channels.",
        "At the centre you need a (channels, channels) matrix over [out, in]. With `out = torch.arange(channels)[:, None]` and `into = torch.arange(channels)[None, :]` a comparison of the two gives it; A leaves out the channel itself, B does not.",
    ),
    inputs=pixel_inputs, reference=flowkit_class("nets", "pixelcnn_mask"),
    cases=(
        Case("shape (channels, channels, k, k), zeros and ones", 1, pixel_shapes),
        Case("the past is open: rows above, and the left of the centre's row", 1, pixel_past),
        Case("the future is hidden: rows below, and the right of the centre's row", 1, pixel_future),
        Case("the centre: A sees channels before its own, B its own too", 2, pixel_centre),
        Case("a stack A, B, B never sees itself nor what comes later", 1, pixel_stack),
    ),
    misconceptions=(
        wrong("kinds_exchanged", "exchanged", "value", "A and B have changed places: A is the one that hides a channel from itself.", centre=lambda kind, c: centre_open("B" if kind == "A" else "A", c)),
        wrong("transposed", "exchanged", "value", "The mask is [in, out]: output and input channels have changed places, so a channel sees the ones after it.", join=lambda m: m.swapaxes(0, 1)),
        wrong("always_b", "missing term", "value", "The kind makes no difference: A opens the centre as B does, and a value sees itself.", centre=lambda kind, c: centre_open("B", c)),
        wrong("always_a", "missing term", "value", "The kind makes no difference: B hides a channel from itself, which only the first layer has to do.", centre=lambda kind, c: centre_open("A", c)),
        wrong("no_channel_order", "order", "value", "The channels have no order: at the centre A hides all of them and B opens all.", centre=rule(lambda o, i: o < 0 * i, lambda o, i: o == o)),
        wrong("a_hides_all", "missing term", "value", "At the centre A hides all channels; those before the output's own are known already.", centre=rule(lambda o, i: o != o, lambda o, i: i <= o)),
        wrong("b_opens_all", "missing term", "value", "At the centre B opens all channels; those after the output's own are the future.", centre=rule(lambda o, i: i < o, lambda o, i: o == o)),
        wrong("a_hides_itself_only", "wrong function", "value", "At the centre A hides the channel itself and nothing else; the channels after it are the future as well.", centre=rule(lambda o, i: i != o, lambda o, i: i <= o)),
        wrong("b_itself_only", "wrong function", "value", "At the centre B opens the channel itself and nothing else; those before it are known as well.", centre=rule(lambda o, i: i < o, lambda o, i: i == o)),
        wrong("channel_order_everywhere", "extra term", "value", "The order of the channels is applied to the whole kernel; pixels of the past are known in all channels.", everywhere=True),
        wrong("rows_below_open", "missing term", "value", "The rows below the centre are open: that is the future.", past=grid_rule(lambda r, c, m: (r != m) | (c < m))),
        wrong("right_open", "missing term", "value", "To the right of the centre the row is open: these pixels come later.", past=grid_rule(lambda r, c, m: r <= m)),
        wrong("left_hidden", "missing term", "value", "To the left of the centre the row is hidden; these pixels are known already.", past=grid_rule(lambda r, c, m: r < m)),
        wrong("rows_above_hidden", "missing term", "value", "The rows above the centre are hidden; only what stands to the left of it is open.", past=grid_rule(lambda r, c, m: (r == m) & (c < m))),
        wrong("nothing_hidden", "missing term", "value", "Only the centre is masked: everything around it is open, the future as well.", past=grid_rule(lambda r, c, m: r == r)),
        wrong("quadrant", "wrong function", "value", "Only what stands above and to the left is open; in the rows above the whole width belongs to the past.", past=grid_rule(lambda r, c, m: (r <= m) & (c <= m))),
        wrong("left_columns", "wrong axis", "value", "The columns to the left are open in every row, below the centre as well: rows and columns have changed roles.", past=grid_rule(lambda r, c, m: (c < m) | ((c == m) & (r < m)))),
        wrong("turned_round", "direction", "value", "Past and future have changed places: what is open comes after the centre.", past=grid_rule(lambda r, c, m: (r > m) | ((r == m) & (c > m)))),
        wrong("complement", "sign", "value", "Zeros and ones have changed places: a one should mean that the input is seen.", join=lambda m: 1 - m),
        wrong("row_off_by_one", "off by one", "value", "The rows above end one row too early.", past=grid_rule(lambda r, c, m: (r < m - 1) | ((r == m) & (c < m)))),
        wrong("centre_left_off_by_one", "off by one", "value", "In the centre's row the pixel just before the centre is hidden.", past=grid_rule(lambda r, c, m: (r < m) | ((r == m) & (c < m - 1)))),
        wrong("right_off_by_one", "off by one", "value", "In the centre's row the pixel just after the centre is open.", past=grid_rule(lambda r, c, m: (r < m) | ((r == m) & (c < m + 2)))),
        wrong("first_row_only", "constant", "value", "The middle of the kernel is taken to be 1, which is right for size 3 alone.", past=grid_rule(lambda r, c, m: (r < 1) | ((r == 1) & (c < 1)))),
        wrong("spatial_only", "shape", "value", "The mask has no dimensions for the channels; its shape should be (channels, channels, k, k).", join=lambda m: m[0, 0]),
        wrong("channels_last", "order", "value", "The channels come last; the shape should be (channels, channels, k, k), like the weight of a convolution.", join=lambda m: m.transpose(2, 3, 0, 1)),
        wrong("one_in_channel", "shape", "value", "The mask has one input channel only; its shape should be (channels, channels, k, k).", join=lambda m: m[:, :1]),
    ),
    features=pixel_features, picture=seen_beside(pixel_panels),
)


# --- causal_attention ------------------------------------------------------------------------------------------------

def attention_inputs(rng):
    B, H, T, d = 3, 2, 5, 4
    inputs = {k: rng.standard_normal((B, T, d)) for k in "qkv"}
    inputs |= {f"heads.{k}": rng.standard_normal((B, H, T, d)) for k in "qkv"} | {f"square.{k}": rng.standard_normal((B, d, d)) for k in "qkv"}
    inputs |= {f"direction.{k}": rng.standard_normal((B, T, d)) for k in "qkv"}
    return inputs | {"change": rng.choice([-1.0, 1.0], d) * rng.uniform(0.5, 1.5, d), "c": rng.standard_normal((B, T, d)),
                     "nudges": laws.STEP * laws.OFFSETS}


def few_calls(inputs):
    """Without what takes many calls: differences by the neighbours of a point."""
    return {k: v for k, v in inputs.items() if k not in ("nudges", "square.nudges", "change", "near")}


def attention_truth(q, k, v):
    T = q.shape[-2]
    scores = np.where(np.tril(np.ones((T, T), bool)), q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def attention_shapes(inputs, outputs, reference):
    for key, want in (("causal_attention.out", inputs["q"].shape), ("causal_attention of one sequence.out", (1, *inputs["q"].shape[1:])),
                      ("causal_attention at one position.out", (len(inputs["q"]), 1, inputs["q"].shape[2]))):
        got = outputs[key].shape
        if got != want:
            raise Fail(f"The result for q, k, v of shape {want} has shape {got}; there is one vector of values for each query.")
    same_after(inputs, outputs, "qkv")


def attention_moved(inputs, outputs, letter):
    """[t, s]: whether the result at t moves when q, k or v at s does."""
    out, changed = outputs["causal_attention.out"], outputs[f"causal_attention with another {letter}.out"]
    T = inputs["q"].shape[1]
    if out.shape != inputs["q"].shape or changed.shape != (T, *out.shape):
        raise Fail(f"The result for q, k, v of shape {inputs['q'].shape} has shape {out.shape}; there is one vector of values for each query.")
    return (np.abs(changed - out) > (1e-4 if out.dtype == np.float32 else 1e-8)).any((1, 3)).T


def no_look_ahead(inputs, outputs, reference):
    T = inputs["q"].shape[1]
    name = {"q": "query", "k": "key", "v": "value"}
    for letter in "vkq":
        moved = attention_moved(inputs, outputs, letter)
        wanted = np.eye(T, dtype=bool) if letter == "q" else np.tril(np.ones((T, T), bool))
        if (moved & ~wanted).any():
            t, s = np.argwhere(moved & ~wanted)[0]
            what = "looks ahead" if s > t else "depends on another query than its own"
            raise Fail(f"The result at t = {t} {what}: it moves when the {name[letter]} at {s} does.")
        # A single key has all the weight, so at t = 0 the result moves with its value alone.
        missing = ~moved & wanted & (letter == "v" or np.arange(T)[:, None] > 0)
        if missing.any():
            t, s = np.argwhere(missing)[0]
            raise Fail(f"The result at t = {t} does not see the {name[letter]} at {s}, though that is {'its own' if s == t else 'the past'}.")


def ones_give_ones(inputs, outputs, reference):
    out = outputs["causal_attention with v = 1.out"]
    if out.shape != inputs["q"].shape:
        raise Fail(f"The result for q, k, v of shape {inputs['q'].shape} has shape {out.shape}; there is one vector of values for each query.")
    wrong = ~laws.close(out, np.ones_like(out), 1e-5 if out.dtype == np.float64 else 1e-4).all((0, 2))
    if wrong.any():
        t = int(np.argmax(wrong))
        raise Fail(f"Where all values are 1 the result should be 1, since it is a mean; at t = {t} it is {out[0, t, 0]:.4g}: the weights over the keys do not add up to one.")


def attention_values(inputs, outputs, reference):
    got, want = outputs["causal_attention.out"], attention_truth(inputs["q"], inputs["k"], inputs["v"])
    if got.shape != want.shape:
        raise Fail(f"The result for q, k, v of shape {want.shape} has shape {got.shape}.")
    wrong = ~laws.close(got, want, laws.tolerance(got)).all((0, 2))
    if wrong.any():
        t = int(np.argmax(wrong))
        raise Fail("The result is not softmax(q k^T / sqrt(d)) v over the keys at positions <= t.", f"at t = {t}: expected {laws.point(want[0, t])}, got {laws.point(got[0, t])}")
    along, nudged = outputs["gradient.along"], outputs["gradient.nudged"]
    gradients_arrive(along, nudged, "qkv", "the result")


def gradients_arrive(along, nudged, names, what):
    """Autograd's derivative along a direction in each argument by itself against differences of the student's own values."""
    for got, values, name in zip(along, nudged, names):
        want = laws.directional(values)
        if abs(got - want) > 1e-3 * (1 + abs(want)):
            raise Fail(f"{'No gradient' if got == 0 else 'Not the whole gradient'} of {what} reaches {name}, so training would not work.")


def attention_heads(inputs, outputs, reference):
    got, want = outputs["causal_attention with heads.out"], attention_truth(*(inputs[f"heads.{k}"] for k in "qkv"))
    if got.shape != want.shape:
        raise Fail(f"For q, k, v of shape (B, H, L, d) = {want.shape} the result has shape {got.shape}; each head attends by itself.")
    if not laws.close(got, want, laws.tolerance(got)).all():
        raise Fail("For q, k, v of shape (B, H, L, d) the result is not that of each head by itself.")


def lower(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def attention_by(scores=lambda q, k: q @ k.transpose(-1, -2), scale=lambda s, q: s / math.sqrt(q.shape[-1]), visible=lower, length=lambda q: q.shape[-2], hide=lambda s, see: s.masked_fill(~see, -math.inf),
                 normalise=lambda s: s.softmax(-1), after=lambda p, q: p, mix=lambda p, v: p @ v, before=lambda q, k, v: (q, k, v), end=lambda out: out):
    """Attention piece by piece, for the misconceptions to deviate from."""

    def causal_attention(q, k, v):
        q, k, v = before(q, k, v)
        s = scale(scores(q, k), q)
        return end(mix(after(normalise(hide(s, visible(length(q)))), q), v))

    return causal_attention


def see_all(T):
    return torch.ones(T, T, dtype=torch.bool)


def scaled_in_place(q, k, v):
    q /= math.sqrt(q.shape[-1])
    return q, k, v


def attention_panels(inputs, outputs):
    out, changed = (outputs.arrays.get(k) for k in ("causal_attention.out", "causal_attention with another v.out"))
    usable = out is not None and changed is not None and out.shape == inputs["q"].shape and changed.shape == (out.shape[1], *out.shape)
    weights = ((changed - out)[:, 0, :, 0] / inputs["change"][0]).T if usable else None
    return [("weight of each value", weights, "value at s", "result at t")]


wrong = piecewise(attention_by)
CAUSAL_ATTENTION = Exercise(
    id="causal_attention", title="Attention that does not look ahead", minutes=12, difficulty=2,
    hints=(
        "Three steps: the scores of all pairs of positions, q times k transposed, divided by the square root of d; then for each query weights over the keys, positive and of sum one; then the weighted mean of the values. Where do the keys after t have to disappear, so that the weights still add up to one?",
        "Before the softmax, a score of minus infinity becomes a weight of zero: `scores.masked_fill(hidden, -math.inf)`, with `hidden` the part of a (L, L) matrix above the diagonal (`torch.triu` with `diagonal=1`). `transpose(-1, -2)` works for any leading dimensions.",
    ),
    inputs=attention_inputs, reference=flowkit_class("nets", "causal_attention"),
    cases=(
        Case("one result for each query; q, k and v stay as they were", 1, attention_shapes),
        Case("the result at t sees all keys and values up to t, none later", 2, no_look_ahead),
        Case("v = ones gives ones", 1, ones_give_ones),
        Case("softmax(q k^T / sqrt(d)) v, with its gradients", 1, attention_values),
        Case("the same for (B, H, L, d)", 1, attention_heads),
    ),
    misconceptions=(
        wrong("no_mask", "missing term", "value", "Nothing is hidden: every position looks at the whole sequence, the future included.", visible=see_all),
        wrong("mask_upper", "direction", "value", "The mask is the wrong triangle: position t sees the keys from t on, that is the future.", visible=lambda T: lower(T).T),
        wrong("mask_strict", "off by one", "value", "Position t does not see its own key; the first position sees none at all, and its softmax over nothing is NaN.", visible=lambda T: lower(T).tril(-1)),
        wrong("mask_strict_repaired", "off by one", "value", "Position t does not see its own key, and the NaN of the first position, which sees none at all, is replaced by 0.", visible=lambda T: lower(T).tril(-1), end=lambda out: out.nan_to_num(0.0)),
        wrong("mask_one_ahead", "off by one", "value", "The mask leaves one key too many: position t sees t + 1.", visible=lambda T: see_all(T).tril(1)),
        wrong("mask_complement", "sign", "value", "The mask is turned round: the past is hidden, and what comes after t is seen.", visible=lambda T: ~lower(T)),
        wrong("diagonal_only", "wrong function", "value", "Position t sees its own key and nothing else, so the result is v.", visible=lambda T: torch.eye(T, dtype=torch.bool)),
        wrong("mask_after_softmax", "order", "value", "The mask comes after the softmax: the weights that are left do not add up to one.", hide=lambda s, see: s, after=lambda p, q: p * lower(p.shape[-1])),
        wrong("zeros_for_infinity", "constant", "value", "Hidden scores are set to 0, and exp(0) = 1 is no small weight; the score whose weight is 0 is minus infinity.", hide=lambda s, see: s * see),
        wrong("small_number", "constant", "value", "Hidden scores are lowered by 1; that is far from enough to make their weight vanish.", hide=lambda s, see: s - (~see).to(s.dtype)),
        wrong("plus_infinity", "sign", "value", "Hidden scores are set to plus infinity, which gives them all the weight.", hide=lambda s, see: s.masked_fill(~see, math.inf)),
        wrong("softmax_over_queries", "wrong axis", "value", "The softmax goes over the queries; for each query the weights of the keys should add up to one.", normalise=lambda s: s.softmax(-2)),
        wrong("softmax_over_batch", "wrong axis", "value", "The softmax goes over the batch.", normalise=lambda s: s.softmax(0)),
        wrong("softmax_over_all", "reduction", "value", "The softmax goes over all pairs of positions at once; each query needs weights of its own.", normalise=lambda s: s.flatten(-2).softmax(-1).reshape(s.shape)),
        wrong("no_softmax", "missing function", "value", "The scores themselves are used as weights: the softmax is missing.", hide=lambda s, see: s * see, normalise=lambda s: s),
        wrong("no_sum", "missing term", "value", "The weights are exp(scores), not divided by their sum.", normalise=lambda s: s.exp()),
        wrong("hidden_by_ten", "constant", "value", "Hidden scores are lowered by 10 or set to -10; that is not far enough to make their weight vanish.", hide=lambda s, see: s.masked_fill(~see, -10.0)),
        wrong("sigmoid", "wrong function", "value", "A sigmoid stands in the place of the softmax: the weights do not add up to one.", normalise=lambda s: s.sigmoid()),
        wrong("log_softmax", "wrong function", "value", "The weights are a log_softmax, which is negative.", hide=lambda s, see: s.masked_fill(~see, -1e9), normalise=lambda s: s.log_softmax(-1)),
        wrong("no_scale", "missing term", "value", "The scores are not divided by sqrt(d).", scale=lambda s, q: s),
        wrong("scale_d", "missing function", "value", "The scores are divided by d; the square root is missing.", scale=lambda s, q: s / q.shape[-1]),
        wrong("scale_times", "sign", "value", "The scores are multiplied by sqrt(d) instead of being divided by it.", scale=lambda s, q: s * math.sqrt(q.shape[-1])),
        wrong("scale_length", "wrong function", "value", "The scores are divided by the root of the length L; it should be the root of d, the size of a query.", scale=lambda s, q: s / math.sqrt(q.shape[-2])),
        wrong("scale_after", "order", "value", "The division by sqrt(d) comes after the softmax, so that the weights no longer add up to one; it belongs to the scores.", scale=lambda s, q: s, after=lambda p, q: p / math.sqrt(q.shape[-1])),
        wrong("scores_negative", "sign", "value", "The scores have the wrong sign: what fits best gets the smallest weight.", scale=lambda s, q: -s / math.sqrt(q.shape[-1])),
        wrong("q_k_exchanged", "exchanged", "value", "Queries and keys have changed places: the scores are k q^T.", before=lambda q, k, v: (k, q, v)),
        wrong("k_v_exchanged", "exchanged", "value", "Keys and values have changed places.", before=lambda q, k, v: (q, v, k)),
        wrong("q_for_k", "wrong function", "value", "The queries are compared with themselves; the keys are not used.", before=lambda q, k, v: (q, q, v)),
        wrong("k_mixed", "wrong function", "value", "It is the keys that are averaged; the weights belong to the values.", before=lambda q, k, v: (q, k, k)),
        wrong("equal_weights", "missing term", "value", "All keys up to t get the same weight: the scores are not used.", scores=lambda q, k: 0 * (q @ k.transpose(-1, -2))),
        wrong("products_of_columns", "exchanged", "value", "The scores are k^T q, d x d numbers: rows and columns have changed places; there is one score for each pair of positions.", scores=lambda q, k: k.transpose(-1, -2) @ q),
        wrong("scores_are_q", "missing term", "value", "The queries themselves stand for the scores; they have not been compared with the keys.", scores=lambda q, k: q),
        wrong("length_and_size_exchanged", "exchanged", "value", "The length L and the size d have changed places: L is the last but one of the dimensions, d the last.", length=lambda q: q.shape[-1], scale=lambda s, q: s / math.sqrt(q.shape[-2])),
        wrong("weights_transposed", "exchanged", "value", "The weights are transposed before they meet the values.", mix=lambda p, v: p.transpose(-1, -2) @ v),
        wrong("weights_alone", "missing term", "value", "The weights are returned; the mean of the values is missing.", mix=lambda p, v: p),
        wrong("scores_elementwise", "wrong function", "value", "Each key is compared with the query at its own position only (q * k); every query has to meet every key, q k^T.", scores=lambda q, k: (q * k).sum(-1)[..., None, :].expand(*q.shape[:-1], q.shape[-2])),
        wrong("transpose_1_2", "wrong axis", "value", "k is transposed along dimensions 1 and 2, which is right without heads only: it should be the last two.", scores=lambda q, k: q @ k.transpose(1, 2)),
        wrong("transpose_t", "wrong axis", "value", "k is transposed along the wrong dimensions (.T turns all of them round); it should be the last two.", scores=lambda q, k: q @ k.permute(*range(k.ndim - 1, -1, -1))),
        wrong("last_row_only", "reduction", "value", "Only the last position gets a result; each query has one of its own.", end=lambda out: out[..., -1:, :]),
        wrong("input_scaled", "in place", "input", "q is divided by sqrt(d) in place: the caller's tensor is overwritten.", before=scaled_in_place, scale=lambda s, q: s),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", end=lambda out: out.detach()),
    ),
    compare=("causal_attention.out", "causal_attention with v = 1.out", "causal_attention at one position.out", "causal_attention with heads.out", "causal_attention with T = d.out", "q after", "gradient.along"),
    light=few_calls,
    picture=seen_beside(attention_panels),
)


# --- dsf -------------------------------------------------------------------------------------------------------------

def log_sum_exp(t, axis=-1):
    return np.logaddexp.reduce(t, axis)


def sigmoids_mixed(v, log_dv, w):
    """y = logit(sum_k w_k sigmoid(v_k)) and log dy/dx over the last axis, in numpy and in logarithms."""
    below, above, log_w = -np.logaddexp(0, -v), -np.logaddexp(0, v), np.log(w)
    log_cdf, log_rest = log_sum_exp(log_w + below), log_sum_exp(log_w + above)
    return log_cdf - log_rest, log_sum_exp(log_w + below + above + log_dv) - log_cdf - log_rest


def dsf_truth(x, a, b, w):
    y, slope = sigmoids_mixed(a * x[..., None] + b, np.log(a), w)
    return y, slope.sum(-1)


def sigmoidal_parameters(rng, *shape):
    """a, b, w of these shapes: a > 0, and the rows of w positive with sum 1."""
    return {"a": rng.uniform(0.5, 2.0, shape), "b": 1.5 * rng.standard_normal(shape), "w": rng.dirichlet(3 * np.ones(shape[-1]), shape[:-1])}


def on_the_simplex(rng, w):
    """A direction along which the rows of w keep their sum."""
    g = rng.standard_normal(w.shape)
    return w * (g - (w * g).sum(-1, keepdims=True))


def dsf_inputs(rng):
    B, D, K = 5, 3, 4
    x = rng.uniform(-2.5, 2.5, (B, D))
    inputs = {"x": x, "near": laws.near(x)} | sigmoidal_parameters(rng, B, D, K)
    inputs |= {f"direction.{k}": 0.5 * rng.standard_normal(inputs[k].shape) for k in "xab"} | {"direction.w": on_the_simplex(rng, inputs["w"])}
    far = {f"far.{k}": v for k, v in sigmoidal_parameters(rng, 1, 1, K).items()}
    far["far.a"] = rng.uniform(4.2, 6.0, (1, 1, K))  # so steep that sigmoid(-u) is 0 in float32 within the tail, and for steps that can be seen
    far["far.b"] = -far["far.a"] * (np.array([-3.5, -1.2, 1.2, 3.5]) + rng.uniform(-0.3, 0.3, K))
    return inputs | far | {"far": np.linspace(-30, 30, 61), "grid": np.linspace(-6, 6, 121), "c": rng.standard_normal((B, D)), "r": rng.standard_normal(B),
                           "nudges": laws.STEP * laws.OFFSETS}


def dsf_reference():
    from flowkit import elementwise

    def dsf(x, a, b, w):
        y, log_slope = elementwise.dsf(x, a, b, w)
        return y, log_slope.sum(-1)

    return (dsf,)


def dsf_shapes(inputs, outputs, reference):
    B, D = inputs["x"].shape
    for step, rows, columns in (("dsf", B, D), ("dsf for one row", 1, D), ("dsf in one dimension", B, 1)):
        for name, want, letters in (("y", (rows, columns), "(B, D)"), ("ldj", (rows,), "(B,)")):
            got = outputs[f"{step}.{name}"].shape
            if got != want:
                raise Fail(f"`{name}` from {step} has shape {got}; it should be {letters} = {want}.")
    same_after(inputs, outputs, ("x", "a", "b", "w"))


def dsf_values(inputs, outputs, reference):
    y = outputs["dsf.y"]
    if y.dtype != np.float64:
        raise Fail("`y` is float32 for an x in float64: digits are lost on the way out.")
    laws.expect("y", inputs["x"], y, dsf_truth(*(inputs[k] for k in "xabw"))[0], 1e-5, why=": it should be logit(sum_k w_k sigmoid(a_k x + b_k)), each dimension with its own parameters")


def dsf_slopes(inputs, outputs, reference):
    """ldj against the differences of the student's own y, which must be increasing entry by entry; and against the closed form."""
    x, ldj, near = inputs["x"], outputs["dsf.ldj"], outputs["dsf nearby.y"]
    if near.shape != inputs["near"].shape:
        raise Fail(f"`y` has shape {near.shape} for x of shape {inputs['near'].shape}.")
    J = laws.jacobian(near, x.shape)
    slope = np.einsum("bii->bi", J)
    if np.abs(J - slope[..., None] * np.eye(x.shape[1])).max() > 1e-6:
        raise Fail("The dimensions influence each other: `y` at dimension i should move with x at dimension i alone.")
    if (slope <= 0).any():
        raise Fail("`y` does not increase with x everywhere.")
    laws.expect("ldj", x, ldj, np.log(slope).sum(1), 1e-5, why=": it should be log|det dy/dx| of your own y, the sum over the dimensions of log dy/dx")
    laws.expect("ldj", x, ldj, dsf_truth(*(inputs[k] for k in "xabw"))[1], 1e-5)


def finite_tail(x, got, want, name, step):
    """Finite in float32, and right to three digits; told by the x nearest to 0 that shows it."""
    if got is not None and got.shape == want.shape and not np.isfinite(got).all():
        i = laws.first_bad(x, ~np.isfinite(got))
        raise Fail(f"In float32 `{name}` is not finite in the tails.", f"x = {x[i]:.3g}: expected {want[i]:.4g}, got {got[i]}")
    if got is None or got.shape != want.shape:
        raise Fail(f"`{name}` from {step} has shape {None if got is None else got.shape}; it should be {want.shape}.")
    laws.expect(name, x, got, want, 1e-3, why=" in the tails, in float32")


def dsf_tails(inputs, outputs, reference):
    step = "dsf far out in float32"
    y, ldj = dsf_truth(inputs["far"][:, None], *(inputs[f"far.{k}"] for k in "abw"))
    for name, want in (("y", y[:, 0]), ("ldj", ldj)):
        got = outputs.arrays.get(f"{step}.{name}")
        if got is None:
            outputs[f"{step}.{name}"]  # says why
        finite_tail(inputs["far"], got[:, 0] if name == "y" and got.shape == (len(want), 1) else got, want, name, step)


def sigmoidal_gradients(names, what):
    return lambda inputs, outputs, reference: gradients_arrive(outputs["gradient.along"], outputs["gradient.nudged"], names, what)


def tail_category(far):
    """What became of the tails of [(got, wanted), ...], rising in x; moot where the middle is wrong already."""
    if any(g is None or g.shape != w.shape for g, w in far):
        return "moot"
    middle = slice(len(far[0][0]) // 2 - 2, len(far[0][0]) // 2 + 2)
    if not all(laws.close(np.nan_to_num(g[middle]), w[middle], 1e-3).all() for g, w in far):
        return "moot"
    return "not finite" if not all(np.isfinite(g).all() for g, _ in far) else "right" if all(laws.close(g, w, 1e-3).all() for g, w in far) else "inaccurate"


def dsf_far(inputs, outputs):
    y, ldj = dsf_truth(inputs["far"][:, None], *(inputs[f"far.{k}"] for k in "abw"))
    got = outputs.arrays.get("dsf far out in float32.y")
    return [(got[:, 0] if got is not None and got.shape == y.shape else None, y[:, 0]), (outputs.arrays.get("dsf far out in float32.ldj"), ldj)]


def sigmoidal_features(keys, far):
    """The arrays themselves, what became of the tails, and which arguments no gradient reaches."""

    def features(inputs, outputs):
        raw = {k: outputs.arrays.get(k, np.asarray(str(outputs.complaint(k.split(".")[0])))) for k in keys}
        along = outputs.arrays.get("gradient.along")
        return raw | {"tail": tail_category(far(inputs, outputs)), "cut off": "none" if along is None else str((along == 0).tolist())}

    return features


def dsf_faults(inputs, outputs):
    """The generic faults of a log-determinant, which know the names z and forward."""
    names = {"dsf nearby.y": "forward near.z", "dsf.y": "forward.z", "dsf.ldj": "forward.ldj"}
    return laws.ldj_faults(inputs, Outputs({names.get(k, k): v for k, v in outputs.arrays.items()}))


def dsf_by(inner=lambda x, a, b: a * x[..., None] + b, weights=lambda w: w, log_w=torch.log, below=F.logsigmoid, above=lambda u: F.logsigmoid(-u), collect=lambda t: torch.logsumexp(t, -1),
           y=lambda cdf, rest: cdf - rest, term=lambda w, b, a, d: w + b + a + d, gather=lambda t: torch.logsumexp(t, -1), slope=lambda pdf, cdf, rest: pdf - cdf - rest,
           log_a=lambda a: a.log(), ldj=lambda s: s.sum(-1), before=lambda a, b, w: (a, b, w), end=lambda y, ldj: (y, ldj)):
    """DSF in logarithms, piece by piece, for the misconceptions to deviate from."""

    def dsf(x, a, b, w):
        a, b, w = before(a, b, w)
        u, lw = inner(x, a, b), log_w(weights(w))
        lo, hi = below(u), above(u)
        cdf, rest = collect(lw + lo), collect(lw + hi)
        return end(y(cdf, rest), ldj(slope(gather(term(lw, lo, hi, log_a(a))), cdf, rest)))

    return dsf


def dsf_formed(x, a, b, w):
    """The formula as it stands in the paper: the mixture of sigmoids first, its logit afterwards."""
    s = torch.sigmoid(a * x[..., None] + b)
    p = (w * s).sum(-1)
    slope = (w * s * (1 - s) * a).sum(-1) / (p * (1 - p))
    return torch.log(p) - torch.log(1 - p), slope.log().sum(-1)


def dsf_clamped(x, a, b, w):
    u = a * x[..., None] + b
    p = (w * torch.sigmoid(u)).sum(-1).clamp(1e-6, 1 - 1e-6)
    pdf = torch.logsumexp(w.log() + F.logsigmoid(u) + F.logsigmoid(-u) + a.log(), -1)
    return torch.logit(p), (pdf - p.log() - (1 - p).log()).sum(-1)


def dsf_weights_outside(x, a, b, w):
    u = a * x[..., None] + b
    return (w * u).sum(-1), (w * a).sum(-1).log().sum(-1)


def dsf_averaged_logs(x, a, b, w):
    u = a * x[..., None] + b
    y, _ = dsf_by()(x, a, b, w)
    below, above = torch.logsumexp(w.log() + F.logsigmoid(u), -1), torch.logsumexp(w.log() + F.logsigmoid(-u), -1)
    return y, ((w * (F.logsigmoid(u) + F.logsigmoid(-u) + a.log())).sum(-1) - below - above).sum(-1)


def dsf_mean_of_log_cdf(x, a, b, w):
    u = a * x[..., None] + b
    cdf, rest = (w * F.logsigmoid(u)).sum(-1), (w * F.logsigmoid(-u)).sum(-1)
    return cdf - rest, (torch.logsumexp(w.log() + F.logsigmoid(u) + F.logsigmoid(-u) + a.log(), -1) - cdf - rest).sum(-1)


wrong = piecewise(dsf_by)
TAIL_LOST = "The mixture is formed first and its logit taken afterwards: where it rounds to 0 or 1 in float32, nothing is left for the logit."
TAIL_FLAT = "The mixture is kept away from 0 and 1 before its logit: y is finite in the tails, but flat there, which no increasing map may be."
DETACHED = "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it."
DSF = Exercise(
    id="dsf", title="A deep sigmoidal flow in one layer", minutes=18, difficulty=3,
    hints=(
        "You know this map: it is the mixture of logistics with the scale turned into a slope a. A weighted sum of sigmoids lies between 0 and 1, and the logit brings it back to the whole line. The slope is the product of three: the logit's, the sigmoids' (with their weights), and a.",
        "In logarithms, with u = a x + b: log S = `torch.logsumexp(log w + F.logsigmoid(u), -1)`, and log(1 - S) is the same with -u. The logit is their difference and its slope is 1 / (S (1 - S)). The slope of a sigmoid is sigmoid(u) sigmoid(-u). At the end sum over the dimensions.",
    ),
    inputs=dsf_inputs, reference=dsf_reference,
    cases=(
        Case("shapes: y (B, D), ldj (B,); nothing changed in place", 1, dsf_shapes),
        Case("y = logit(sum_k w_k sigmoid(a_k x + b_k))", 2, dsf_values),
        Case("y increases with x, and ldj = log|det dy/dx|", 3, dsf_slopes),
        Case("finite and right in float32, from -30 to 30", 1, dsf_tails),
        Case("gradients reach x, a, b and w", 1, sigmoidal_gradients("xabw", "y and ldj")),
    ),
    misconceptions=(
        wrong("no_logit", "missing function", "value", "`y` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, in `y` and in `ldj`.", y=lambda cdf, rest: cdf.exp(), slope=lambda pdf, cdf, rest: pdf),
        wrong("value_no_logit", "missing function", "value", "`y` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, though `ldj` counts it.", y=lambda cdf, rest: cdf.exp()),
        wrong("ldj_no_logit", "missing term", "ldj", "In `ldj` the derivative of the logit is missing.", slope=lambda pdf, cdf, rest: pdf),
        wrong("ldj_half_logit", "missing term", "ldj", "In `ldj` one factor of the logit's derivative 1 / (S (1 - S)) is missing: 1 - S.", slope=lambda pdf, cdf, rest: pdf - cdf),
        wrong("ldj_other_half_logit", "missing term", "ldj", "In `ldj` one factor of the logit's derivative 1 / (S (1 - S)) is missing: S.", slope=lambda pdf, cdf, rest: pdf - rest),
        wrong("ldj_logit_sign", "sign", "ldj", "In `ldj` the derivative of the logit has the wrong sign: S (1 - S) divides.", slope=lambda pdf, cdf, rest: pdf + cdf + rest),
        wrong("ldj_logit_quotient", "sign", "ldj", "In `ldj` the derivative of the logit is taken to be (1 - S) / S; it is 1 / (S (1 - S)).", slope=lambda pdf, cdf, rest: pdf - cdf + rest),
        wrong("ldj_logit_quotient_turned", "sign", "ldj", "In `ldj` the derivative of the logit is taken to be S / (1 - S); it is 1 / (S (1 - S)).", slope=lambda pdf, cdf, rest: pdf + cdf - rest),
        wrong("ldj_only_logit", "missing term", "ldj", "`ldj` holds the derivative of the logit alone; that of the mixture is missing.", slope=lambda pdf, cdf, rest: -cdf - rest),
        wrong("ldj_no_sigmoid", "missing term", "ldj", "In `ldj` the derivative of the sigmoids is missing.", term=lambda w, b, a, d: w + d + 0 * b),
        wrong("ldj_sigmoid_itself", "missing term", "ldj", "In `ldj` the sigmoid stands where its derivative belongs: the factor sigmoid(-u) is missing.", term=lambda w, b, a, d: w + b + d),
        wrong("ldj_other_sigmoid", "missing term", "ldj", "In `ldj` a factor of the sigmoid's derivative is missing: sigmoid(u).", term=lambda w, b, a, d: w + a + d),
        wrong("ldj_sigmoid_divided", "sign", "ldj", "In `ldj` one factor of the sigmoid's derivative divides; it is a product, sigmoid(u) sigmoid(-u).", term=lambda w, b, a, d: w + b - a + d),
        wrong("ldj_other_divided", "sign", "ldj", "In `ldj` sigmoid(u) divides; the derivative of the sigmoid is a product.", term=lambda w, b, a, d: w - b + a + d),
        wrong("ldj_no_a", "missing term", "ldj", "In `ldj` the inner slope a is missing.", term=lambda w, b, a, d: w + b + a),
        wrong("ldj_a_divided", "sign", "ldj", "In `ldj` the terms are divided by a; the chain rule multiplies by it.", term=lambda w, b, a, d: w + b + a - d),
        wrong("ldj_a_not_logged", "missing function", "ldj", "In `ldj` a is added to logarithms as it is; its logarithm belongs there.", log_a=lambda a: a),
        wrong("ldj_no_w", "missing term", "ldj", "In `ldj` the weights are missing.", term=lambda w, b, a, d: b + a + d),
        Misconception("ldj_averaged_logs", "order", "ldj", "In `ldj` the logarithms of the terms are averaged; the terms are added up first, and then the logarithm is taken.", lambda: (dsf_averaged_logs,)),
        wrong("w_not_logged", "missing function", "value", "The weights are added to logarithms as they are; their logarithm belongs there.", log_w=lambda w: w),
        wrong("w_softmaxed", "extra term", "value", "The weights are put through a softmax, though they add up to one already.", weights=lambda w: w.softmax(-1)),
        wrong("w_forgotten", "missing term", "value", "The weights are not used: all sigmoids count alike.", weights=lambda w: torch.ones_like(w) / w.shape[-1]),
        wrong("w_unnormalised", "missing term", "value", "The sigmoids are added up without weights, so that the sum is no share between 0 and 1.", weights=torch.ones_like),
        Misconception("w_outside", "order", "value", "The weights mix the lines a x + b, outside of sigmoid and logit, so that y is a line as well; they belong to the sigmoids.", lambda: (dsf_weights_outside,)),
        Misconception("log_mixed", "order", "value", "The logarithms of the sigmoids are averaged; the sigmoids are averaged first, and then the logarithm is taken.", lambda: (dsf_mean_of_log_cdf,)),
        wrong("a_softplus", "extra term", "value", "a is put through a softplus, though it is positive already.", before=lambda a, b, w: (F.softplus(a), b, w)),
        wrong("a_exp", "extra term", "value", "exp is applied to a, though it is the slope itself and positive already.", before=lambda a, b, w: (a.exp(), b, w)),
        wrong("a_forgotten", "missing term", "value", "a is not used: all sigmoids are equally steep.", before=lambda a, b, w: (torch.ones_like(a), b, w)),
        wrong("value_a_forgotten", "missing term", "value", "In the sigmoids a is missing, though `ldj` counts it.", inner=lambda x, a, b: x[..., None] + b + 0 * a),
        wrong("b_forgotten", "missing term", "value", "b is not used: all sigmoids have their step at x = 0.", inner=lambda x, a, b: a * x[..., None]),
        wrong("x_forgotten", "missing term", "value", "x is missing in the sigmoids.", inner=lambda x, a, b: a + b + 0 * x[..., None]),
        wrong("x_added", "wrong function", "value", "a is added to x; it should multiply it.", inner=lambda x, a, b: a + x[..., None] + b),
        wrong("b_sign", "sign", "value", "b is subtracted; the sigmoids are those of a x + b.", inner=lambda x, a, b: a * x[..., None] - b),
        wrong("b_inside", "order", "value", "x is shifted before it is scaled; the sigmoids are those of a x + b.", inner=lambda x, a, b: a * (x[..., None] + b)),
        wrong("like_a_mixture", "wrong function", "value", "a and b are taken for scale and mean; here the sigmoids are those of a x + b.", inner=lambda x, a, b: (x[..., None] - b) / a, log_a=lambda a: -a.log()),
        wrong("a_b_exchanged", "exchanged", "value", "a and b have changed places.", before=lambda a, b, w: (b, a, w)),
        wrong("b_w_exchanged", "exchanged", "value", "b and w have changed places.", before=lambda a, b, w: (a, w, b)),
        wrong("a_divides", "sign", "value", "x is divided by a; the sigmoids are those of a x + b.", inner=lambda x, a, b: x[..., None] / a + b),
        wrong("y_sign", "exchanged", "value", "`y` has the wrong sign: the logit is log S - log(1 - S).", y=lambda cdf, rest: rest - cdf),
        wrong("y_sum", "sign", "value", "In the logit the two logarithms are added; log(1 - S) is subtracted.", y=lambda cdf, rest: cdf + rest),
        wrong("y_log", "missing term", "value", "`y` is log S; of the logit the part log(1 - S) is missing.", y=lambda cdf, rest: cdf),
        wrong("y_log_rest", "missing term", "value", "`y` is -log(1 - S); of the logit the part log S is missing.", y=lambda cdf, rest: -rest),
        wrong("wrong_axis", "wrong axis", "value", "The sum goes over the dimensions instead of over the K sigmoids.", collect=lambda t: torch.logsumexp(t, 1), gather=lambda t: torch.logsumexp(t, 1)),
        wrong("over_the_batch", "wrong axis", "value", "The sum goes over the batch instead of over the K sigmoids.", collect=lambda t: torch.logsumexp(t, 0), gather=lambda t: torch.logsumexp(t, 0)),
        wrong("slope_over_the_batch", "wrong axis", "ldj", "In `ldj` the terms are added up over the batch instead of over the K sigmoids.", gather=lambda t: torch.logsumexp(t, 0)),
        wrong("new_dimension_in_front", "wrong axis", "value", "x gets its new dimension in front; the K sigmoids are in the last one.", inner=lambda x, a, b: a * x[None, ...] + b),
        wrong("above_is_below", "sign", "value", "For 1 - sigmoid(u) a sign is missing: what stands there is sigmoid(u) once more.", above=F.logsigmoid),
        wrong("ldj_only_a", "missing term", "ldj", "In `ldj` each term is a alone; weights and sigmoids are missing.", term=lambda w, b, a, d: d + 0 * b),
        wrong("ldj_only_above", "missing term", "ldj", "In `ldj` the weights and one factor of the sigmoid's derivative, sigmoid(u), are missing.", term=lambda w, b, a, d: a + d),
        wrong("tanh", "wrong function", "value", "A tanh stands where the sigmoid belongs; it runs from -1 to 1, and its logarithm is not there below 0.", below=lambda u: torch.tanh(u).log(), above=lambda u: (1 - torch.tanh(u)).log()),
        wrong("ldj_no_sum", "shape", "ldj", laws.LDJ_FAULTS["ldj_no_sum"][1], ldj=lambda s: s),
        wrong("ldj_keepdim", "shape", "ldj", laws.LDJ_FAULTS["ldj_keepdim"][1], ldj=lambda s: s.sum(-1, keepdim=True)),
        wrong("ldj_mean", "reduction", "ldj", laws.LDJ_FAULTS["ldj_mean"][1], ldj=lambda s: s.mean(-1)),
        wrong("ldj_batch_sum", "reduction", "ldj", laws.LDJ_FAULTS["ldj_batch_sum"][1], ldj=lambda s: s.sum()),
        wrong("ldj_batch_sum_kept", "wrong axis", "ldj", laws.LDJ_FAULTS["ldj_batch_sum_kept"][1], ldj=lambda s: s.sum(0)),
        wrong("ldj_sign", "sign", "ldj", laws.LDJ_FAULTS["ldj_sign"][1], ldj=lambda s: -s.sum(-1)),
        wrong("ldj_det", "missing function", "ldj", "`ldj` adds up the slopes themselves; it is their logarithms that are added.", ldj=lambda s: s.exp().sum(-1)),
        wrong("ldj_product", "missing function", "ldj", laws.LDJ_FAULTS["ldj_det"][1], ldj=lambda s: s.sum(-1).exp()),
        wrong("ldj_log_of_sum", "order", "ldj", "`ldj` is the logarithm of the sum of the slopes; the determinant is their product, so the logarithms are added.", ldj=lambda s: torch.logsumexp(s, -1)),
        wrong("exchanged", "exchanged", "value", "y and ldj are returned in the wrong order.", end=lambda y, ldj: (ldj, y)),
        wrong("only_y", "missing term", "value", "Only y is returned; ldj is missing.", end=lambda y, ldj: y),
        wrong("ldj_detached", "detached", "gradient", "`ldj` is cut off from the computation graph, so training would not see it.", end=lambda y, ldj: (y, ldj.detach())),
        wrong("detached", "detached", "gradient", DETACHED, end=lambda y, ldj: (y.detach(), ldj.detach())),
        Misconception("tail_lost", "wrong function", "value", TAIL_LOST, lambda: (dsf_formed,)),
        Misconception("tail_flat", "wrong function", "value", TAIL_FLAT, lambda: (dsf_clamped,)),
    ),
    features=sigmoidal_features(("dsf.y", "dsf.ldj", "dsf for one row.y", "dsf for one row.ldj"), dsf_far), faults=dsf_faults, light=few_calls,
    compare=("dsf.y", "dsf.ldj", "dsf for one row.y", "dsf for one row.ldj", "dsf far out in float32.y", "dsf far out in float32.ldj", "gradient.along"),
    picture=pictures.against_reference(("picture.y", "picture.ldj"), "grid", ("y", "log dy/dx"), (-6, 6)),
)


# --- ddsf ------------------------------------------------------------------------------------------------------------

DDSF_WIDTHS = (1, 3, 3, 1)


def dense_parameters(rng, B, D, d_in, d_out, prefix=""):
    a_b = sigmoidal_parameters(rng, B, D, d_out)
    return {f"{prefix}w": rng.dirichlet(2 * np.ones(d_out), (B, D, d_out)), f"{prefix}u": rng.dirichlet(2 * np.ones(d_in), (B, D, d_out)),
            f"{prefix}a": a_b["a"], f"{prefix}b": a_b["b"]}


def ddsf_inputs(rng):
    B, D, d_in, d_out = 4, 3, 2, 5
    inputs = {"h": 1.5 * rng.standard_normal((B, D, d_in)), "log_slope": rng.standard_normal((B, D, d_in))} | dense_parameters(rng, B, D, d_in, d_out)
    inputs |= {"square.h": 1.5 * rng.standard_normal((B, D, 3)), "square.log_slope": rng.standard_normal((B, D, 3))} | dense_parameters(rng, B, D, 3, 3, "square.")
    inputs |= {f"direction.{k}": on_the_simplex(rng, inputs[k]) if k in "wu" else 0.5 * rng.standard_normal(inputs[k].shape) for k in DDSF_NAMES}
    for prefix, i, o in zip(DDSF_LAYERS, DDSF_WIDTHS, DDSF_WIDTHS[1:]):
        inputs |= dense_parameters(rng, B, D, i, o, prefix)
    x, nudges = rng.uniform(-2.5, 2.5, (B, D)), laws.STEP * laws.OFFSETS
    far = np.linspace(-30, 30, 15)[None, :, None] + np.zeros((B, 1, D))
    more = {"nudges": nudges, "square.nudges": nudges, "x": x, "near": (x[:, None] + nudges[:, None]).reshape(-1, D), "far": far.reshape(-1, D), "grid": np.linspace(-6, 6, 121)}
    return inputs | more | {"c": rng.standard_normal((B, D, d_out)), "r": rng.standard_normal((B, D, d_out))}


def ddsf_truth(h, log_slope, w, u, a, b):
    v = a * (u * h[..., None, :]).sum(-1) + b
    log_dv = np.log(a) + log_sum_exp(np.log(u) + log_slope[..., None, :])
    return sigmoids_mixed(v[..., None, :], log_dv[..., None, :], w)


def ddsf_network(inputs, x, each=1):
    """h and log dh/dx (N, D) of the network of the check."""
    h = x[..., None]
    log_slope = np.zeros_like(h)
    for prefix in DDSF_LAYERS:
        h, log_slope = ddsf_truth(h, log_slope, *(np.repeat(inputs[prefix + k], each, 0) for k in DDSF_NAMES[2:]))
    return h[..., 0], log_slope[..., 0]


DDSF_STEPS = (("ddsf_layer", ""), ("ddsf_layer with d_in = d_out", "square."))


def ddsf_shapes(inputs, outputs, reference):
    for step, prefix in (*DDSF_STEPS, ("ddsf_layer for one row", "")):
        want = inputs[f"{prefix}a"].shape
        want = (1, *want[1:]) if "one row" in step else want
        for name in ("h", "log_slope"):
            got = outputs[f"{step}.{name}"].shape
            if got != want:
                raise Fail(f"`{name}` from {step} has shape {got} for an input of shape {(want[0], *inputs[f'{prefix}h'].shape[1:])}; it should be (B, D, d_out) = {want}.")
    same_after(inputs, outputs, DDSF_NAMES)


def expect_rows(name, h, got, want, tol, why):
    """laws.expect, with all that belongs to a row of h as one point."""
    if got.shape != want.shape:
        raise Fail(f"`{name}` has shape {got.shape}; it should be {want.shape}.")
    laws.expect(name, *(t.reshape(len(t), -1) for t in (h, got, want)), tol, why)


def ddsf_values(inputs, outputs, reference):
    for step, prefix in DDSF_STEPS:
        h = outputs[f"{step}.h"]
        if h.dtype != np.float64:
            raise Fail("`h` is float32 for an h in float64: digits are lost on the way out.")
        want, _ = ddsf_truth(*(inputs[prefix + k] for k in DDSF_NAMES))
        expect_rows("h", inputs[f"{prefix}h"], h, want, 1e-5, why=f" from {step}: it should be logit(w sigmoid(a (u h) + b)), with matrices w and u")


def ddsf_slopes(inputs, outputs, reference):
    """If each h_i goes on with speed exp(log_slope_i), each h'_j goes on with speed exp(log_slope'_j)."""
    for step, prefix in DDSF_STEPS:
        log_slope, near, want = outputs[f"{step}.log_slope"], outputs[f"{step} nearby.h"], inputs[f"{prefix}a"].shape
        if near.shape != (4 * want[0], *want[1:]):
            raise Fail(f"`h` from {step} has shape {near.shape} for an input of {4 * want[0]} rows; it should be (B, D, d_out) = {(4 * want[0], *want[1:])}.")
        speed = np.einsum("bkdj,k->bdj", near.reshape(want[0], 4, *want[1:]).astype(float), laws.WEIGHTS) / laws.STEP
        if (speed <= 0).any():
            raise Fail(f"In {step} not every output increases when all inputs do.")
        at = inputs[f"{prefix}h"]
        expect_rows("log_slope", at, log_slope, np.log(speed), 1e-4, why=f" from {step}: it should be log dh'/dx of your own h', where the inputs have the slopes exp(log_slope) in x")
        expect_rows("log_slope", at, log_slope, ddsf_truth(*(inputs[prefix + k] for k in DDSF_NAMES))[1], 1e-5, why=f" from {step}")


def ddsf_in_a_network(inputs, outputs, reference):
    x, (B, D) = inputs["x"], inputs["x"].shape
    for key in ("the network.h", "the network.log_slope"):
        if outputs[key].shape != (B, D, 1):
            raise Fail(f"{key.split('.')[1]} of the network 1-3-3-1 has shape {outputs[key].shape}; it should be (B, D, 1) = {(B, D, 1)}.")
    near = outputs["the network nearby.h"]
    if near.shape != (4 * B, D, 1):
        raise Fail(f"`h` of the network 1-3-3-1 has shape {near.shape} for {4 * B} rows.")
    slope = np.einsum("bkd,k->bd", near.reshape(B, 4, D).astype(float), laws.WEIGHTS) / laws.STEP
    if (slope <= 0).any():
        raise Fail("In the network 1-3-3-1 the result does not increase with x everywhere.")
    laws.expect("log_slope", x, outputs["the network.log_slope"][..., 0], np.log(slope), 1e-4, why=" after the widths 1-3-3-1: it should be log dy/dx of your own network, slopes multiplied as matrices from layer to layer")
    laws.expect("h", x, outputs["the network.h"][..., 0], ddsf_network(inputs, x)[0], 1e-5, why=" after the widths 1-3-3-1")


def ddsf_far(inputs, outputs):
    far = inputs["far"]
    wants = ddsf_network(inputs, far, len(far) // len(inputs["x"]))
    found = [outputs.arrays.get(f"the network far out in float32.{k}") for k in ("h", "log_slope")]
    order = np.argsort(far[:, 0], kind="stable")  # the middle of the tails' points is the middle of x
    return [(None if g is None or g.shape != (*far.shape, 1) else g[order, :, 0], want[order]) for g, want in zip(found, wants)]


def ddsf_tails(inputs, outputs, reference):
    step = "the network far out in float32"
    far = np.sort(inputs["far"][:, 0], kind="stable")
    for name, (got, want) in zip(("h", "log_slope"), ddsf_far(inputs, outputs)):
        raw = outputs.arrays.get(f"{step}.{name}")
        if raw is None:
            outputs[f"{step}.{name}"]  # says why
        if got is None:
            raise Fail(f"`{name}` from {step} has shape {raw.shape}; it should be (B, D, 1) = {(*want.shape, 1)}.")
        for d in range(want.shape[1]):
            finite_tail(far, got[:, d], want[:, d], name, step)


def ddsf_by(mixed=lambda u, h: (u * h[..., None, :]).sum(-1), line=lambda a, m, b: a * m + b, log_u=torch.log, arriving=lambda lu, s: torch.logsumexp(lu + s[..., None, :], -1),
            speed=lambda la, s: la + s, log_a=torch.log, log_w=torch.log, below=F.logsigmoid, above=lambda v: F.logsigmoid(-v), share=lambda lw, t: lw + t[..., None, :], term=lambda b, a, s: b + a + s,
            collect=lambda t: torch.logsumexp(t, -1), gather=lambda lw, t: torch.logsumexp(lw + t[..., None, :], -1), y=lambda cdf, rest: cdf - rest,
            slope=lambda pdf, cdf, rest: pdf - cdf - rest, before=lambda h, s, w, u, a, b: (h, s, w, u, a, b), end=lambda h, s: (h, s)):
    """A layer of DDSF in logarithms, piece by piece, for the misconceptions to deviate from."""

    def ddsf_layer(h, log_slope, w, u, a, b):
        h, log_slope, w, u, a, b = before(h, log_slope, w, u, a, b)
        v = line(a, mixed(u, h), b)
        log_dv = speed(log_a(a), arriving(log_u(u), log_slope))
        lw, lo, hi = log_w(w), below(v), above(v)
        cdf, rest = collect(share(lw, lo)), collect(share(lw, hi))
        return end(y(cdf, rest), slope(gather(lw, term(lo, hi, log_dv)), cdf, rest))

    return ddsf_layer


def ddsf_formed(h, log_slope, w, u, a, b):
    """The formula as it stands in the paper: the mixture first, its logit afterwards, slopes as they are."""
    s = torch.sigmoid(a * (u * h[..., None, :]).sum(-1) + b)
    p = (w * s[..., None, :]).sum(-1)
    dv = a * (u * log_slope.exp()[..., None, :]).sum(-1)
    slope = (w * (s * (1 - s) * dv)[..., None, :]).sum(-1) / (p * (1 - p))
    return torch.log(p) - torch.log(1 - p), slope.log()


def ddsf_clamped(h, log_slope, w, u, a, b):
    v, log_dv = ddsf_no_w(h, log_slope, w, u, a, b)
    p = (w * torch.sigmoid(v)[..., None, :]).sum(-1).clamp(1e-6, 1 - 1e-6)
    pdf = torch.logsumexp(w.log() + (F.logsigmoid(v) + F.logsigmoid(-v) + log_dv)[..., None, :], -1)
    return torch.logit(p), pdf - p.log() - (1 - p).log()


def elementwise_slopes(lu, s):
    """Each unit of the next layer gets the slope of the unit at its own place (or of the mean, where there are more)."""
    return s if lu.shape[-2] == s.shape[-1] else s.mean(-1, keepdim=True).expand(lu.shape[:-1])


def turned(m):
    return m.transpose(-1, -2) if m.shape[-1] == m.shape[-2] else m


def averaged(log_weights, t):
    return (log_weights.exp() * t[..., None, :]).sum(-1)


def ddsf_no_w(h, log_slope, w, u, a, b):
    """The second matrix left out: logit and sigmoid undo each other."""
    return a * (u * h[..., None, :]).sum(-1) + b, a.log() + torch.logsumexp(u.log() + log_slope[..., None, :], -1)


def ddsf_w_outside(h, log_slope, w, u, a, b):
    v, log_dv = ddsf_no_w(h, log_slope, w, u, a, b)
    return (w * v[..., None, :]).sum(-1), torch.logsumexp(w.log() + log_dv[..., None, :], -1)


wrong = piecewise(ddsf_by)
DENSE = Exercise(
    id="ddsf", title="A dense layer of sigmoids", minutes=20, difficulty=5,
    hints=(
        "Forward there are two matrices: u mixes the d_in inputs into d_out lines v = a (u h) + b, and w mixes the d_out sigmoids of these lines; the logit is taken entry by entry. For the slopes follow the same way with the chain rule: each of these steps has a slope, and that of a matrix is the matrix itself.",
        "In logarithms a matrix times a vector is `torch.logsumexp(log M + log_vector[..., None, :], -1)`. You need it for u with the slopes that arrive, for w with the sigmoids, and for w with the slopes of the sigmoids' terms. The logit's slope 1 / (S (1 - S)) comes last, with S from the sum over w.",
    ),
    inputs=ddsf_inputs, reference=flowkit_class("elementwise", "ddsf_layer"),
    cases=(
        Case("h and log_slope are (B, D, d_out); nothing changed in place", 1, ddsf_shapes),
        Case("h = logit(w sigmoid(a (u h) + b))", 2, ddsf_values),
        Case("log_slope of one layer, with the slopes that arrive", 3, ddsf_slopes),
        Case("widths 1-3-3-1: increasing, and log_slope = log dy/dx", 2, ddsf_in_a_network),
        Case("finite and right in float32, from -30 to 30", 1, ddsf_tails),
        Case("gradients reach h, log_slope and all parameters", 1, sigmoidal_gradients(DDSF_NAMES, "h and log_slope")),
    ),
    misconceptions=(
        wrong("slopes_elementwise", "wrong function", "ldj", "The slopes that arrive are multiplied entry by entry; u mixes the inputs, so it mixes their slopes as well: slopes multiply as matrices.", arriving=elementwise_slopes),
        wrong("slopes_dropped", "missing term", "ldj", "The slopes that arrive are not used: `log_slope` is that of this layer alone.", arriving=lambda lu, s: torch.logsumexp(lu, -1)),
        wrong("slopes_added_up", "missing term", "ldj", "The slopes that arrive are added up without the weights u.", log_u=torch.zeros_like),
        wrong("slopes_averaged_in_logs", "order", "ldj", "The logarithms of the slopes that arrive are averaged with u; it is the slopes that are averaged, and then the logarithm is taken (log-sum-exp).", arriving=averaged),
        wrong("slopes_not_exp", "missing function", "ldj", "u is multiplied with `log_slope` itself, and then a logarithm is taken; `log_slope` has to be turned into slopes first.", arriving=lambda lu, s: (lu.exp() * s[..., None, :]).sum(-1).log()),
        wrong("slopes_sign", "sign", "ldj", "The slopes that arrive have the wrong sign in the logarithm: they are divided by.", arriving=lambda lu, s: torch.logsumexp(lu - s[..., None, :], -1)),
        wrong("slopes_divide_u", "sign", "ldj", "The slopes that arrive are divided by u; u multiplies them.", arriving=lambda lu, s: torch.logsumexp(s[..., None, :] - lu, -1)),
        wrong("u_not_logged", "missing function", "ldj", "In the sum of the slopes u stands as it is among logarithms; its logarithm belongs there.", log_u=lambda u: u),
        wrong("slope_no_a", "missing term", "ldj", "In `log_slope` the inner slope a is missing.", log_a=torch.zeros_like),
        wrong("slope_a_divided", "sign", "ldj", "In `log_slope` a divides; the chain rule multiplies by it.", speed=lambda la, s: s - la),
        wrong("slope_a_not_logged", "missing function", "ldj", "In `log_slope` a is added to logarithms as it is; its logarithm belongs there.", log_a=lambda a: a),
        wrong("slope_no_w", "missing term", "ldj", "In `log_slope` the weights w are missing.", gather=lambda lw, t: torch.logsumexp(0 * lw + t[..., None, :], -1)),
        wrong("slope_w_elementwise", "wrong function", "ldj", "In `log_slope` the terms are not mixed by w: each output has the slope of its own line only.", gather=lambda lw, t: t),
        wrong("slope_averaged_in_logs", "order", "ldj", "In `log_slope` the logarithms of the terms are averaged with w; the terms are averaged first, and then the logarithm is taken.", gather=averaged),
        wrong("slope_no_logit", "missing term", "ldj", "In `log_slope` the derivative of the logit is missing.", slope=lambda pdf, cdf, rest: pdf),
        wrong("slope_half_logit", "missing term", "ldj", "In `log_slope` one factor of the logit's derivative 1 / (S (1 - S)) is missing: 1 - S.", slope=lambda pdf, cdf, rest: pdf - cdf),
        wrong("slope_other_half_logit", "missing term", "ldj", "In `log_slope` one factor of the logit's derivative 1 / (S (1 - S)) is missing: S.", slope=lambda pdf, cdf, rest: pdf - rest),
        wrong("slope_logit_sign", "sign", "ldj", "In `log_slope` the derivative of the logit has the wrong sign: S (1 - S) divides.", slope=lambda pdf, cdf, rest: pdf + cdf + rest),
        wrong("slope_logit_quotient", "sign", "ldj", "In `log_slope` the derivative of the logit is taken to be (1 - S) / S; it is 1 / (S (1 - S)).", slope=lambda pdf, cdf, rest: pdf - cdf + rest),
        wrong("slope_only_logit", "missing term", "ldj", "`log_slope` holds the derivative of the logit alone.", slope=lambda pdf, cdf, rest: -cdf - rest),
        wrong("slope_no_sigmoid", "missing term", "ldj", "In `log_slope` the derivative of the sigmoids is missing.", term=lambda b, a, s: s + 0 * b),
        wrong("slope_sigmoid_itself", "missing term", "ldj", "In `log_slope` the sigmoid stands where its derivative belongs: the factor sigmoid(-v) is missing.", term=lambda b, a, s: b + s),
        wrong("slope_other_sigmoid", "missing term", "ldj", "In `log_slope` a factor of the sigmoid's derivative is missing: sigmoid(v).", term=lambda b, a, s: a + s),
        wrong("slope_sigmoid_divided", "sign", "ldj", "In `log_slope` one factor of the sigmoid's derivative divides; it is a product, sigmoid(v) sigmoid(-v).", term=lambda b, a, s: b - a + s),
        wrong("slope_not_arriving", "missing term", "ldj", "In `log_slope` the slope of the lines is missing: both a and what arrives through u.", term=lambda b, a, s: b + a + 0 * s),
        wrong("slope_itself", "missing function", "ldj", "`log_slope` is the slope itself; its logarithm is asked for.", end=lambda h, s: (h, s.exp())),
        wrong("slope_sign", "sign", "ldj", "`log_slope` has the wrong sign: it is the log-slope of the way back.", end=lambda h, s: (h, -s)),
        wrong("slope_summed", "reduction", "ldj", "`log_slope` is summed over the units; each has its own until the end.", end=lambda h, s: (h, s.sum(-1))),
        wrong("slope_summed_over_d", "reduction", "ldj", "`log_slope` is summed over the dimensions of x; that sum comes after the last layer only, outside.", end=lambda h, s: (h, s.sum(1))),
        wrong("u_transposed", "exchanged", "value", "u is transposed where it is square: its rows belong to the outputs, [d_out, d_in].", before=lambda h, s, w, u, a, b: (h, s, w, turned(u), a, b)),
        wrong("w_transposed", "exchanged", "value", "w is transposed: each of its rows, which add up to 1, makes one output.", before=lambda h, s, w, u, a, b: (h, s, turned(w), u, a, b)),
        wrong("u_w_exchanged", "exchanged", "value", "u and w have changed places: u mixes what comes in, w mixes the sigmoids.", before=lambda h, s, w, u, a, b: (h, s, u, w, a, b)),
        wrong("a_b_exchanged", "exchanged", "value", "a and b have changed places.", before=lambda h, s, w, u, a, b: (h, s, w, u, b, a)),
        wrong("w_softmaxed", "extra term", "value", "w is put through a softmax, though its rows add up to one already.", before=lambda h, s, w, u, a, b: (h, s, w.softmax(-1), u, a, b)),
        wrong("u_softmaxed", "extra term", "value", "u is put through a softmax, though its rows add up to one already.", before=lambda h, s, w, u, a, b: (h, s, w, u.softmax(-1), a, b)),
        wrong("both_softmaxed", "extra term", "value", "w and u are put through a softmax, though their rows add up to one already.", before=lambda h, s, w, u, a, b: (h, s, w.softmax(-1), u.softmax(-1), a, b)),
        wrong("a_softplus", "extra term", "value", "a is put through a softplus, though it is positive already.", before=lambda h, s, w, u, a, b: (h, s, w, u, F.softplus(a), b)),
        wrong("a_exp", "extra term", "value", "exp is applied to a, though it is the slope itself and positive already.", before=lambda h, s, w, u, a, b: (h, s, w, u, a.exp(), b)),
        wrong("a_forgotten", "missing term", "value", "a is not used: all sigmoids are equally steep.", before=lambda h, s, w, u, a, b: (h, s, w, u, torch.ones_like(a), b)),
        wrong("value_a_forgotten", "missing term", "value", "In v the slope a is missing, though `log_slope` counts it.", line=lambda a, m, b: m + b + 0 * a),
        wrong("b_forgotten", "missing term", "value", "b is not used.", line=lambda a, m, b: a * m),
        wrong("b_sign", "sign", "value", "b is subtracted; v = a (u h) + b.", line=lambda a, m, b: a * m - b),
        wrong("b_inside", "order", "value", "b is added before a multiplies; v = a (u h) + b.", line=lambda a, m, b: a * (m + b)),
        wrong("a_added", "wrong function", "value", "a is added in v; it should multiply u h.", line=lambda a, m, b: a + m + b),
        wrong("a_divides", "sign", "value", "u h is divided by a; v = a (u h) + b.", line=lambda a, m, b: m / a + b),
        wrong("u_forgotten", "missing term", "value", "u is not used: the inputs are added up as they are.", before=lambda h, s, w, u, a, b: (h, s, w, torch.ones_like(u), a, b)),
        wrong("value_u_mean", "missing term", "value", "In v the inputs are averaged without the weights u, though `log_slope` counts them.", mixed=lambda u, h: (0 * u + h[..., None, :]).mean(-1)),
        wrong("w_forgotten", "missing term", "value", "w is not used: all sigmoids count alike, so all outputs of a layer are the same.", before=lambda h, s, w, u, a, b: (h, s, torch.ones_like(w) / w.shape[-1], u, a, b)),
        Misconception("no_w", "missing term", "value", "The sigmoids are not mixed by w, and then the logit undoes them: the layer is a line.", lambda: (ddsf_no_w,)),
        Misconception("w_outside", "order", "value", "w mixes the lines v, outside of sigmoid and logit, so that the layer is a line; w belongs to the sigmoids.", lambda: (ddsf_w_outside,)),
        wrong("log_mixed", "order", "value", "The logarithms of the sigmoids are averaged with w; the sigmoids are averaged first, and then the logarithm is taken.", share=lambda lw, t: averaged(lw, t)[..., None]),
        wrong("w_not_logged", "missing function", "value", "w is added to logarithms as it is; its logarithm belongs there.", log_w=lambda w: w),
        wrong("no_logit", "missing function", "value", "`h` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, in `h` and in `log_slope`.", y=lambda cdf, rest: cdf.exp(), slope=lambda pdf, cdf, rest: pdf),
        wrong("value_no_logit", "missing function", "value", "`h` is the mixture of sigmoids itself, between 0 and 1: the logit is missing, though `log_slope` counts it.", y=lambda cdf, rest: cdf.exp()),
        wrong("y_sign", "exchanged", "value", "`h` has the wrong sign: the logit is log S - log(1 - S).", y=lambda cdf, rest: rest - cdf),
        wrong("y_sum", "sign", "value", "In the logit the two logarithms are added; log(1 - S) is subtracted.", y=lambda cdf, rest: cdf + rest),
        wrong("y_log", "missing term", "value", "`h` is log S; of the logit the part log(1 - S) is missing.", y=lambda cdf, rest: cdf),
        wrong("y_log_rest", "missing term", "value", "`h` is -log(1 - S); of the logit the part log S is missing.", y=lambda cdf, rest: -rest),
        wrong("sum_along_outputs", "wrong axis", "value", "The sigmoids are added up along the wrong dimension of w, over the outputs.", collect=lambda t: torch.logsumexp(t, -2), gather=lambda lw, t: torch.logsumexp(lw + t[..., None, :], -2)),
        wrong("over_the_batch", "wrong axis", "value", "The sigmoids are added up over the batch.", collect=lambda t: torch.logsumexp(t, 0), gather=lambda lw, t: torch.logsumexp(lw + t[..., None, :], 0)),
        wrong("slopes_over_the_batch", "wrong axis", "ldj", "The slopes that arrive are added up over the batch.", arriving=lambda lu, s: torch.logsumexp(lu + s[..., None, :], 0)),
        wrong("terms_over_the_batch", "wrong axis", "ldj", "In `log_slope` the terms are added up over the batch.", gather=lambda lw, t: torch.logsumexp(lw + t[..., None, :], 0)),
        wrong("new_dimension_in_front", "wrong axis", "value", "A vector gets its new dimension in front of all others; a matrix meets it along its last one, and the new one belongs before that.", mixed=lambda u, h: (u * h[None, ..., :]).sum(-1)),
        wrong("column_in_front", "wrong axis", "value", "h gets its new dimension in front of all others, so it is no column for the matrix u.", mixed=lambda u, h: (u @ h[None, ...])[..., 0]),
        wrong("first_row_taken", "wrong axis", "value", "Of u h the first row of the batch is taken; it is the last dimension that should go.", mixed=lambda u, h: (u @ h[..., None])[0]),
        wrong("above_is_below", "sign", "value", "For 1 - sigmoid(v) a sign is missing: what stands there is sigmoid(v) once more.", above=F.logsigmoid),
        wrong("exchanged", "exchanged", "value", "h and log_slope are returned in the wrong order.", end=lambda h, s: (s, h)),
        wrong("only_h", "missing term", "value", "Only h is returned; log_slope is missing.", end=lambda h, s: h),
        wrong("slope_detached", "detached", "gradient", "`log_slope` is cut off from the computation graph, so training would not see it.", end=lambda h, s: (h, s.detach())),
        wrong("detached", "detached", "gradient", DETACHED, end=lambda h, s: (h.detach(), s.detach())),
        Misconception("tail_lost", "wrong function", "value", TAIL_LOST, lambda: (ddsf_formed,)),
        Misconception("tail_flat", "wrong function", "value", TAIL_FLAT, lambda: (ddsf_clamped,)),
    ),
    features=sigmoidal_features(tuple(f"{step}.{k}" for step, _ in DDSF_STEPS for k in ("h", "log_slope")) + ("the network.h", "the network.log_slope"), ddsf_far),
    compare=(*(f"{step}.{k}" for step, _ in DDSF_STEPS for k in ("h", "log_slope")), "the network far out in float32.h", "the network far out in float32.log_slope", "gradient.along"), light=few_calls,
    picture=pictures.against_reference(("picture.h", "picture.log_slope"), "grid", ("y of the widths 1-3-3-1", "log dy/dx"), (-6, 6)),
)


EXERCISES = (MADE_MASKS, AFFINE, MAF, IAF, CAUSAL_CONV1D, PIXELCNN_MASK, CAUSAL_ATTENTION, DSF, DENSE, NAF)
