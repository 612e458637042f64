"""Lesson 03, autoregressive flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import math
import re

import numpy as np
import torch
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import (
    B, both_sizes, deviating, flowkit_class, function, gradient_arrives, layer_inputs, ldj_mistakes, loss_inputs, net_inputs,
)
from autograder.exercises.lesson02 import BIJECTION, NO_SUM, returns_exchanged, sized
from autograder.judge import compared
from autograder.probes.common import SIZES, sizes
from autograder.probes.lesson03 import AFFINE_FORMS
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
                               f"{made_words(inputs, name)}: output {p * paths.shape[1] + i}, parameter {p} of dimension {i}, depends on x[{j}]")

    return judge


def made_open(inputs, outputs, reference):
    for name in MADE_WIDE:
        paths = made_paths(inputs, outputs, name)
        for p, i, j in np.argwhere(~paths):
            if j < i:
                raise Fail("An output does not see all earlier coordinates, though the layers are wide enough.",
                           f"{made_words(inputs, name)}: output {p * paths.shape[1] + i}, parameter {p} of dimension {i}, does not depend on x[{j}]")


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
        Misconception("gate_ldj_underflows", "wrong function", "ldj", "The gate's `ldj` takes the logarithm of a sigma that was computed first: where `a` is very negative sigma rounds to 0, and its logarithm to minus infinity.", affine_by(gate_ldj=lambda s, a: s.log())),
        Misconception("shift_ldj_underflows", "wrong function", "ldj", "In the form \"shift\" `ldj` takes the logarithm of a sigma that was computed first: where `a` is very negative sigma rounds to 0, and its logarithm to minus infinity.", affine_by(shift_ldj=lambda s, a: s.log())),
        Misconception("both_ldj_underflow", "wrong function", "ldj", "`ldj` takes the logarithm of a sigma that was computed first: where `a` is very negative sigma rounds to 0, and its logarithm to minus infinity.", affine_by(shift_ldj=lambda s, a: s.log(), gate_ldj=lambda s, a: s.log())),
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


EXERCISES = (MADE_MASKS, AFFINE, MAF, IAF, NAF)
