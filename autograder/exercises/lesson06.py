"""Lesson 06, flows on images: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import math
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import (
    B, deviating, every_size, flowkit_class, function, gradient_arrives, ldj_mistakes, loss_inputs, net_inputs,
)
from autograder.exercises.lesson02 import (
    BIJECTION, affine_in_second_half, first_half_passed_on, inverse_category, own_affine, returns_exchanged,
)
from autograder.exercises.lesson03 import piecewise
from autograder.exercises.lesson05 import (
    BOUND_GAP, BOUND_LEVELS, bound_mass, bound_means, bound_of_uniform, survae_kept, survae_light, survae_normal,
    survae_paid_mistakes, survae_tanh, survae_x,
)
from autograder.judge import compared
from autograder.probes.lesson06 import (
    BITS_CALLS, CONV_IMAGES, CONV_OTHER, COUPLED_IMAGES, DEQ_SHAPES, FACTOR_SHAPES, FRECHET_PAIRS, GATE_STEP, HYBRID_NAMES,
    SCALE_SHAPES, SQUEEZE_SHAPES, TEMPERATURES, bits_step, image_net, squeeze_steps, squeezed_shape,
)
from autograder.probes.record import part, tensor
from flowkit import plotting

ASSIGNMENT = "06_images"
TITLE = "Flows on images: Flow++ in miniature"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.images", "flowkit.nets", "flowkit.linear", "flowkit.dequantization", "flowkit.surjective", "flowkit.inference")
TEXTS = {}


# --- bits_per_dim ----------------------------------------------------------------------------------------------------

BITS_ROWS = 6


def bits_inputs(rng):
    inputs = {"c": rng.standard_normal(BITS_ROWS), "line": np.linspace(-300, 100, 81)}
    inputs |= {bits_step(*call): rng.uniform(-300, 100, BITS_ROWS) for call in BITS_CALLS}
    inputs[bits_step(*BITS_CALLS[1])][-1] -= 3000      # as of a large image, the density of which is no number any more
    return inputs


def bits_expect(got, want, at, call):
    if got.shape != want.shape:
        raise Fail(f"The result has shape {got.shape} for log_prob of shape {want.shape}; it is one number for each image.")
    if got.dtype != np.float64:
        raise Fail(f"The result is {got.dtype} for a log_prob in float64: digits are lost on the way out.")
    wrong = ~laws.close(got, want, 1e-9)
    if wrong.any():
        i = laws.first_bad(at, wrong)
        shape, levels = call
        raise Fail("The result is not -log_prob / (D log 2) + log2(levels).",
                   f"log_prob = {at[i]:.4g} for images {shape} of {levels} level{'s' * (levels > 1)}: {laws.expected(want[i], got[i])}")


def bits_right(log_prob, shape, levels):
    return -log_prob / (math.prod(shape) * math.log(2)) + math.log2(levels)


def bits_uniform(inputs, outputs, reference):
    for call in BITS_CALLS[:2]:
        bits_expect(outputs[f"{bits_step(*call)} of a uniform density.bits"], np.full(4, math.log2(call[1])), np.zeros(4), call)


def bits_values(calls):
    def judge(inputs, outputs, reference):
        for call in calls:
            given = inputs[bits_step(*call)]
            bits_expect(outputs[f"{bits_step(*call)}.bits"], bits_right(given, *call), given, call)

    return judge


def bits_as_a_loss(inputs, outputs, reference):
    for call in BITS_CALLS:
        step = bits_step(*call)
        given, one = inputs[step], outputs[f"{step} of one image.bits"]
        if one.shape != (1,):
            raise Fail(f"For a batch of one image the result has shape {one.shape}; it should be (1,).")
        got, want = outputs[f"gradient of {step}.gradient"], -inputs["c"] / (math.prod(call[0]) * math.log(2))
        if not got.any():
            raise Fail("No gradient reaches log_prob, so a flow could not be trained on its bits per dimension.")
        if got.shape != want.shape or not laws.close(got, want, 1e-9).all():
            raise Fail("The gradient in log_prob is not -1 / (D log 2) for each image.")
        after = outputs[f"{step} after"]
        if after.shape != given.shape or not np.array_equal(after, given):
            raise Fail("The argument log_prob was changed in place: the caller's tensor was overwritten.")


def bits_by(count=math.prod, nats=lambda lp: -lp, unit=lambda v, D: v / (D * math.log(2)), levels_in=lambda levels, D: math.log2(levels), end=lambda v: v):
    """The function in small steps, for the misconceptions to deviate from."""

    def bits_per_dim(log_prob, shape, levels):
        D = count(shape)
        return end(unit(nats(log_prob), D) + levels_in(levels, D))

    return bits_per_dim


def bits_in_place(log_prob, shape, levels):
    return log_prob.neg_().div_(math.prod(shape) * math.log(2)).add_(math.log2(levels))


wrong = piecewise(bits_by)
BITS = Exercise(
    id="bits_per_dim", title="Bits per dimension", minutes=6, difficulty=1,
    hints=(
        "Three steps: the code length of an image in nats, then in bits, then for one of its D numbers. How many numbers does an image of shape (C, H, W) hold?",
        "One nat is 1 / log 2 bits. The density lives on [0, 1]^D, where one level is 1 / levels wide: what does that add for each number? With `math.prod(shape)`, `math.log` and `math.log2` it is one line; no mean over the batch is taken.",
    ),
    inputs=bits_inputs, reference=flowkit_class("images", "bits_per_dim"),
    cases=(
        Case("the uniform density on [0, 1]^D costs log2(levels) bits", 1, bits_uniform),
        Case("-log_prob / (D log 2) + log2(levels), for each image", 1.5, bits_values(BITS_CALLS[:2])),
        Case("levels = 1 adds nothing", 0.5, bits_values(BITS_CALLS[2:])),
        Case("one image, gradients, and log_prob is left as it was", 1, bits_as_a_loss),
    ),
    misconceptions=(
        wrong("sign", "sign", "value", "The sign of log_prob is missing: a code length is minus the log-probability, so likely images cost few bits.", nats=lambda lp: lp),
        wrong("sign_and_nats", "sign", "value", "Two faults in the first term: the sign of log_prob is missing, and so is the division by log 2.", nats=lambda lp: lp, unit=lambda v, D: v / D),
        wrong("sign_and_two", "sign", "value", "Two faults in the first term: the sign of log_prob is missing, and it is divided by 2 where the logarithm of 2 is meant.", nats=lambda lp: lp, unit=lambda v, D: v / (2 * D)),
        wrong("sign_and_sum", "sign", "value", "Two faults in the first term: the sign of log_prob is missing, and D and log 2 are added where they are to be multiplied.", nats=lambda lp: lp, unit=lambda v, D: v / (D + math.log(2))),
        wrong("sign_and_whole", "sign", "value", "Two faults in the first term: the sign of log_prob is missing, and so is the division by D.", nats=lambda lp: lp, unit=lambda v, D: v / math.log(2)),
        wrong("all_signs", "sign", "value", "The whole result has the wrong sign: these are minus the bits per dimension.", end=lambda v: -v),
        wrong("levels_sign", "sign", "value", "log2(levels) is subtracted; a density on [0, 1]^D is levels times as high for each number as the probability of a level, so it must be added.", levels_in=lambda levels, D: -math.log2(levels)),
        wrong("nats", "missing term", "value", "The result is in nats, not in bits: the division by log 2 is missing.", unit=lambda v, D: v / D),
        wrong("nats_per_dim", "wrong function", "value", "Everything is in nats: log_prob is not divided by log 2, and the levels enter by a natural logarithm.", unit=lambda v, D: v / D, levels_in=lambda levels, D: math.log(levels)),
        wrong("times_log2", "sign", "value", "Nats become bits when they are divided by log 2; here they are multiplied by it (are brackets missing in `/ D * log 2`?).", unit=lambda v, D: v / D * math.log(2)),
        wrong("divided_by_two", "missing function", "value", "log_prob is divided by 2 D; it is the logarithm of 2 that turns nats into bits.", unit=lambda v, D: v / (D * 2)),
        wrong("log_base_ten", "wrong function", "value", "log_prob is divided by the decimal logarithm of 2; it is in nats, so the natural one is needed.", unit=lambda v, D: v / (D * math.log10(2))),
        wrong("levels_natural", "wrong function", "value", "The levels enter by their natural logarithm; in bits it is the logarithm to base 2.", levels_in=lambda levels, D: math.log(levels)),
        wrong("no_levels", "missing term", "value", "The levels are not used: the log2(levels) that the step from integers to [0, 1]^D costs is missing.", levels_in=lambda levels, D: 0.0),
        wrong("levels_256", "constant", "value", "256 levels are taken whatever `levels` says; the digits, for one, have 17.", levels_in=lambda levels, D: 8.0),
        wrong("levels_less_one", "off by one", "value", "One level too few is counted: the integers 0 .. levels - 1 are `levels` in number.", levels_in=lambda levels, D: math.log2(max(levels - 1, 1))),
        wrong("levels_times_d", "extra term", "value", "log2(levels) is multiplied by D; it is what each single number of the image costs.", levels_in=lambda levels, D: D * math.log2(levels)),
        wrong("levels_divided", "extra term", "value", "log2(levels) is divided by D as well; it is already for one number of the image.", levels_in=lambda levels, D: math.log2(levels) / D),
        wrong("levels_themselves", "missing function", "value", "`levels` is added itself; its logarithm to base 2 is asked for.", levels_in=lambda levels, D: levels),
        wrong("not_per_dim", "missing term", "value", "The bits are those of a whole image: the division by D = C H W is missing.", unit=lambda v, D: v / math.log(2)),
        wrong("times_d", "sign", "value", "log_prob is multiplied by D; for one dimension it is divided by it.", unit=lambda v, D: v * D / math.log(2)),
        wrong("channels_forgotten", "missing term", "value", "D counts the pixels only, H W; an image has C numbers for each of them.", count=lambda s: s[-1] * s[-2]),
        wrong("only_channels", "wrong function", "value", "D is taken as the first entry of shape, the number of channels; it is C H W.", count=lambda s: s[0]),
        wrong("sizes_added", "wrong function", "value", "D is the sum of the sizes in shape; an image holds their product.", count=sum),
        wrong("number_of_axes", "wrong function", "value", "D is taken as the length of shape, 3; an image holds C H W numbers.", count=len),
        wrong("mean", "reduction", "value", "The mean over the batch is returned; one number for each image is asked for.", end=lambda v: v.mean()),
        wrong("sum", "reduction", "value", "The sum over the batch is returned; one number for each image is asked for.", end=lambda v: v.sum()),
        wrong("divided_by_batch", "reduction", "value", "log_prob is divided by the size of the batch; it already holds one number for each image.", nats=lambda lp: -lp / len(lp)),
        wrong("mean_everywhere", "reduction", "value", "log_prob is averaged over the batch before it is used; each image has its own.", nats=lambda lp: -lp.mean() + 0 * lp),
        wrong("power_of_two", "extra term", "value", "2 to the power of the bits is returned; the bits themselves are asked for.", end=lambda v: 2 ** v),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, item, numpy or no_grad), so nothing could be trained by it.", end=lambda v: v.detach()),
        wrong("kept_dimension", "shape", "value", "The result has shape (B, 1); one number for each image is asked for, shape (B,).", end=lambda v: v[:, None]),
        Misconception("in_place", "in place", "input", "log_prob is changed in place: the caller's tensor is overwritten.", lambda: (bits_in_place,)),
    ),
    compare=tuple(f"{bits_step(*call)}{k}" for call in BITS_CALLS for k in (".bits", " after", " of one image.bits")) + tuple(f"gradient of {bits_step(*call)}.gradient" for call in BITS_CALLS),
    picture=pictures.against_reference(("bits_per_dim on the line.bits",), "line", ("bits per dimension of 8 x 8 images with 17 levels",), (-300, 100), axis="log_prob (nats)"),
)


# --- squeeze ---------------------------------------------------------------------------------------------------------

SQUEEZE_NAMES = ("squeeze", "unsqueeze")


def squeeze_inputs(rng):
    """Images of whole numbers, each of which occurs once: so where a number comes from can be read off."""
    inputs = {}
    for shape in SQUEEZE_SHAPES:
        for name, s in (("x", shape), ("z", squeezed_shape(shape))):
            inputs[f"{name} {shape}"] = rng.permutation(math.prod(s)).astype(float).reshape(s)
    r, c = np.mgrid[-1:1:8j, -1:1:8j]
    return inputs | {"photo": (np.hypot(r, c) + 0.3 * r)[None, None]}


def squeeze_sources(given, got, shape, step):
    """For each entry of what came back, the place in `given` that its number comes from, as (b, c, h, w); Fail unless it is a rearrangement."""
    if got.shape != shape:
        raise Fail(f"{step.split(' of ')[0]} makes shape {got.shape} of shape {given.shape}; it should be {shape}.")
    whole = np.round(got).astype(int)
    if (np.abs(got - whole) > 1e-6).any() or (np.sort(whole.ravel()) != np.arange(given.size)).any():
        raise Fail(f"{step.split(' of ')[0]} does not only rearrange: some numbers of its input are missing, or others have come in.")
    places = np.argsort(given.ravel())      # the flat place of each whole number
    return np.stack(np.unravel_index(places[whole], given.shape), -1)


def squeeze_found(inputs, outputs, shape, i):
    """Where the entries of squeeze(x) (i = 0) or unsqueeze(z) (i = 1) come from, (..., 4)."""
    step, _, name = squeeze_steps(shape)[i]
    return squeeze_sources(inputs[name], outputs[f"{step}.value"], (squeezed_shape(shape), shape)[i], step)


def squeeze_shapes(inputs, outputs, reference):
    for shape in SQUEEZE_SHAPES:
        for i, (step, _, name) in enumerate(squeeze_steps(shape)):
            got, want = outputs[f"{step}.value"].shape, (squeezed_shape(shape), shape)[i]
            if got != want:
                raise Fail(f"{SQUEEZE_NAMES[i]} makes shape {got} of shape {inputs[name].shape}; it should be {want}.")


def squeeze_blocks(sources, words):
    """sources (B, 4 C, H / 2, W / 2, 4): the place in the image that each channel holds at each coarse pixel."""
    b, c, h, w = np.moveaxis(sources, -1, 0)
    rows, _, i, j = np.indices(b.shape)
    if (b != rows).any():
        raise Fail(f"{words}: numbers of one image end up in another one of the batch.")
    far = (h // 2 != i) | (w // 2 != j)
    if far.any():
        at = tuple(np.argwhere(far)[0])
        raise Fail(f"{words}: the channels of a coarse pixel are not the four pixels of its own 2 x 2 block, so neighbours are torn apart.",
                   f"the coarse pixel ({i[at]}, {j[at]}) should hold rows {2 * i[at]}, {2 * i[at] + 1} and columns {2 * j[at]}, {2 * j[at] + 1}, and has a number from row {h[at]}, column {w[at]}")
    corner = np.stack([c, h % 2, w % 2])
    if (corner != corner[:, :1, :, :1, :1]).any():
        raise Fail(f"{words}: one channel holds different corners of different blocks, or different channels; each should be a coarse picture of its own.")


def squeeze_neighbours(inputs, outputs, reference):
    for shape in SQUEEZE_SHAPES:
        squeeze_blocks(squeeze_found(inputs, outputs, shape, 0), "squeeze")


def squeeze_undone(inputs, outputs, reference):
    squeeze_shapes(inputs, outputs, reference)
    for shape in SQUEEZE_SHAPES:
        for i, (step, _, name) in enumerate(squeeze_steps(shape)):
            squeeze_found(inputs, outputs, shape, i)
            got, want = outputs[f"{SQUEEZE_NAMES[1 - i]} after {step}.value"], inputs[name]
            words = ("unsqueeze(squeeze(x))", "squeeze(unsqueeze(z))")[i]
            if got.shape != want.shape:
                raise Fail(f"{words} has shape {got.shape}; it should be {want.shape}.")
            if not np.array_equal(got, want):
                at = tuple(np.argwhere(got != want)[0])
                raise Fail(f"{words} is not {'xz'[i]}: the numbers come back in other places.", f"at (b, c, h, w) = {tuple(int(a) for a in at)}: expected {want[at]:g}, got {got[at]:g}")


def squeeze_graph_of(inputs, outputs, i):
    for shape in SQUEEZE_SHAPES:
        step, _, name = squeeze_steps(shape)[i]
        given, value = inputs[name], outputs[f"{step}.value"]
        squeeze_found(inputs, outputs, shape, i)
        got, order = outputs[f"gradient of {step}.gradient"], np.argsort(value.ravel()) + 1
        if not got.any():
            raise Fail(f"No gradient passes through {SQUEEZE_NAMES[i]}: what it returns is cut off from the computation graph.")
        if got.shape != given.shape or not np.array_equal(got, order[given.astype(int)]):
            raise Fail(f"The gradient that passes through {SQUEEZE_NAMES[i]} is not the rearranged one.")
        after = outputs[f"{step} after"]
        if after.shape != given.shape or not np.array_equal(after, given):
            raise Fail(f"{SQUEEZE_NAMES[i]} writes into the tensor that it is given: the caller's image is overwritten.")
        if outputs[f"{step}.value"].dtype != np.float64:
            raise Fail(f"{SQUEEZE_NAMES[i]} makes float32 of float64: it gives another type of number than it gets, and digits are lost.")
    again = outputs[f"{squeeze_steps(SQUEEZE_SHAPES[0])[i][0]} in float32.value"]
    if again.dtype != np.float32:
        raise Fail(f"{SQUEEZE_NAMES[i]} gives another type of number than it gets (is a tensor made without dtype?).")
    for shape, words, how in ((SQUEEZE_SHAPES[0], " in float32", "once more, after images of another size"), (SQUEEZE_SHAPES[1], ", strided", "for an image that is not contiguous in memory, as behind a permute"),
                              (SQUEEZE_SHAPES[2], " of integers", "for an image of integers")):
        step = squeeze_steps(shape)[i][0]
        got = outputs[f"{step}{words}.value"]
        if not np.array_equal(got, outputs[f"{step}.value"]):
            raise Fail(f"{SQUEEZE_NAMES[i]} puts the numbers in other places when it is asked {how}.")


def squeeze_graph(inputs, outputs, reference):
    for i in (0, 1):
        squeeze_graph_of(inputs, outputs, i)


def squeeze_coarse(sources, shape, i):
    """The flat sources as (4 C, rest), the channels in an order that does not depend on how somebody numbers them."""
    flat = np.ravel_multi_index(tuple(np.moveaxis(sources, -1, 0)), (shape, squeezed_shape(shape))[i])
    if i == 1:
        B, C, H, W = shape
        flat = flat.reshape(B, C, H // 2, 2, W // 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(squeezed_shape(shape))
    channels = np.moveaxis(flat, 1, 0).reshape(flat.shape[1], -1)
    return channels[np.argsort(channels[:, 0], kind="stable")]


def squeeze_features(inputs, outputs):
    """Where the numbers come from, whatever the order of the channels; there and back; and what the last case says."""
    found = {}
    for shape in SQUEEZE_SHAPES:
        for i, (step, _, name) in enumerate(squeeze_steps(shape)):
            try:
                found[step] = squeeze_coarse(squeeze_found(inputs, outputs, shape, i), shape, i)
            except Fail as e:
                found[step] = compared([f"{step}.value"], outputs)[f"{step}.value"] if "rearrange" in e.sentence else e.sentence
            back = f"{SQUEEZE_NAMES[1 - i]} after {step}.value"
            found[back] = compared([back], outputs)[back]
    for i, name in enumerate(SQUEEZE_NAMES):
        try:
            squeeze_graph_of(inputs, outputs, i)
            found[f"{name} graph"] = "ok"
        except Fail as e:
            found[f"{name} graph"] = e.sentence
    return found


def squeeze_faults(inputs, outputs):
    """Both functions are right by themselves and number the channels in different ways."""
    try:
        squeeze_neighbours(inputs, outputs, None)
        for shape in SQUEEZE_SHAPES:
            b, k, h, w = np.moveaxis(squeeze_found(inputs, outputs, shape, 1), -1, 0)
            i, j = np.indices(b.shape)[2:] // 2
            if (h != i).any() or (w != j).any():
                return []
        squeeze_undone(inputs, outputs, None)
    except Fail as e:
        if e.sentence.endswith("come back in other places."):
            return [("channels_numbered_otherwise", "order", "value", "squeeze and unsqueeze number the four corners and the channels in different orders; each by itself would do.")]
    return []


def squeeze_split(x):
    B, C, H, W = x.shape
    return x.reshape(B, C, H // 2, 2, W // 2, 2)


def unsqueeze_split(z):
    B, C, H, W = z.shape
    return z.reshape(B, C // 4, 2, 2, H, W)


def squeeze_by(order=(0, 1, 3, 5, 2, 4), back=(0, 1, 4, 2, 5, 3), begin=squeeze_split, begin_back=unsqueeze_split, end=lambda z, x: z, end_back=lambda x, z: x, exchanged=False):
    """The two functions in their plainest form, in which a mistake changes one part."""

    def squeeze(x):
        B, C, H, W = x.shape
        return end(begin(x).permute(order).reshape(B, 4 * C, H // 2, W // 2), x)

    def unsqueeze(z):
        B, C, H, W = z.shape
        return end_back(begin_back(z).permute(back).reshape(B, C // 4, 2 * H, 2 * W), z)

    return lambda: (unsqueeze, squeeze) if exchanged else (squeeze, unsqueeze)


def squeeze_wrong(id, kind, sentence, place="value", **parts):
    return Misconception(id, kind, place, sentence, squeeze_by(**parts))


def squeeze_plain_reshape(x):
    B, C, H, W = x.shape
    return x.reshape(B, C, 2, 2, H // 2, W // 2)


def squeeze_quarters_split(x):
    """The four quarters of the image for the four corners of its blocks."""
    B, C, H, W = x.shape
    return x.reshape(B, C, 2, H // 2, 2, W // 2).permute(0, 1, 3, 2, 5, 4)


def unsqueeze_interleaved(z):
    B, C, H, W = z.shape
    return z.reshape(B, 2, 2, C // 4, H, W).permute(0, 3, 1, 2, 4, 5)


def squeeze_overwrites(z, x):
    x.copy_(z.reshape(x.shape))
    return z


def squeeze_picture(inputs, outputs, reference):
    """A small picture, and the four channels that squeeze makes of it: yours over the reference's."""
    figure = plotting.Picture(figsize=(10, 4.4), layout="constrained")
    axes, photo = figure.subplots(2, 5), inputs["photo"][0, 0]
    view = {"cmap": "cividis", "vmin": photo.min(), "vmax": photo.max()}
    for row, found, who in zip(axes, (outputs, reference), ("yours", "reference")):
        row[0].imshow(photo, **view), row[0].set_title("x, 8 x 8", fontsize=plotting.FONT - 2), row[0].set_ylabel(who, fontsize=plotting.FONT)
        channels = found.arrays.get("picture.value")
        for k, ax in enumerate(row[1:]):
            ax.set_title(f"channel {k}", fontsize=plotting.FONT - 2)
            if channels is None or channels.shape != (1, 4, 4, 4) or not np.isfinite(channels).all():
                pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            else:
                ax.imshow(channels[0, k], **view)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    return figure


def squeeze_reference():
    from flowkit.images import Squeeze

    layer = Squeeze()   # a layer of a flow, which takes no integers
    return (lambda x: layer.forward(x.double())[0].to(x.dtype)), (lambda z: layer.inverse(z.double()).to(z.dtype))


SQUEEZE = Exercise(
    id="squeeze", title="Squeeze: pixels become channels", minutes=12, difficulty=2,
    hints=(
        "Cut H into H / 2 blocks of 2 and W into W / 2 blocks of 2 by a reshape to six dimensions. Which of the six should stand beside the channels before they are joined?",
        "`x.reshape(B, C, H // 2, 2, W // 2, 2)`: the first of each pair says which block, the second which corner. `permute` brings both corners next to C, and a last `reshape` joins them. unsqueeze makes the same steps backwards, with the permutation that undoes the first.",
    ),
    inputs=squeeze_inputs, reference=squeeze_reference,
    cases=(
        Case("shapes: (B, C, H, W) to (B, 4 C, H / 2, W / 2), and back", 1, squeeze_shapes),
        Case("the channels of a coarse pixel are the 2 x 2 block at its place", 2, squeeze_neighbours),
        Case("unsqueeze undoes squeeze, and squeeze unsqueeze, exactly", 2, squeeze_undone),
        Case("gradients pass, numbers keep their type (integers too), the input is left as it was", 1, squeeze_graph),
    ),
    misconceptions=(
        squeeze_wrong("reshape_only", "missing function", "Both functions only reshape: the shape is right, but numbers that are neighbours in memory become channels' rows, and the 2 x 2 blocks are torn apart.", order=(0, 1, 2, 3, 4, 5), begin=squeeze_plain_reshape, back=(0, 1, 2, 3, 4, 5)),
        squeeze_wrong("squeeze_reshape_only", "missing function", "squeeze only reshapes: the shape is right, but the 2 x 2 blocks are torn apart, and unsqueeze does not undo it.", order=(0, 1, 2, 3, 4, 5), begin=squeeze_plain_reshape),
        squeeze_wrong("unsqueeze_reshape_only", "missing function", "unsqueeze only reshapes: the shape is right, but the four corners do not go back to their block.", back=(0, 1, 2, 3, 4, 5)),
        squeeze_wrong("quarters", "exchanged", "The image is cut into four quarters instead of into blocks of 2 x 2: in the reshape the 2 and the half stand in the wrong order, in both functions.", begin=squeeze_quarters_split, back=(0, 1, 2, 4, 3, 5)),
        squeeze_wrong("squeeze_quarters", "exchanged", "squeeze cuts the image into four quarters instead of into blocks of 2 x 2: in its reshape the 2 and the half stand in the wrong order.", begin=squeeze_quarters_split),
        squeeze_wrong("unsqueeze_quarters", "exchanged", "unsqueeze puts the four channels side by side as quarters of the image, instead of into the corners of its 2 x 2 blocks.", back=(0, 1, 2, 4, 3, 5)),
        squeeze_wrong("same_permutation", "direction", "unsqueeze permutes by the same order as squeeze; it needs the permutation that undoes that one.", back=(0, 1, 3, 5, 2, 4)),
        squeeze_wrong("corners_exchanged", "exchanged", "unsqueeze exchanges row and column within each block: two of the four corners come back in each other's place.", back=(0, 1, 4, 3, 5, 2)),
        squeeze_wrong("channels_in_another_order", "order", "unsqueeze expects the channels in another order than squeeze writes them: corners first here, channels first there.", begin_back=unsqueeze_interleaved),
        squeeze_wrong("unsqueeze_is_identity", "missing function", "unsqueeze returns z as it came: nothing is undone.", end_back=lambda x, z: z),
        squeeze_wrong("squeeze_is_identity", "missing function", "squeeze returns x as it came: no pixel has become a channel.", end=lambda z, x: x),
        squeeze_wrong("exchanged_functions", "direction", "squeeze and unsqueeze have changed places: look at their order in `check`, or at which does what.", exchanged=True),
        squeeze_wrong("height_width", "exchanged", "squeeze returns the images on their side: height and width have changed places.", end=lambda z, x: z.transpose(2, 3)),
        squeeze_wrong("averaged", "wrong function", "squeeze averages each block, as a pooling layer does; all four numbers must be kept, or nothing could be undone.", end=lambda z, x: F.avg_pool2d(x, 2).repeat(1, 4, 1, 1)),
        squeeze_wrong("subsampled", "missing term", "squeeze keeps one corner of each block and drops the other three; the four of them become channels.", end=lambda z, x: x[:, :, ::2, ::2]),
        squeeze_wrong("returns_ldj", "extra term", "squeeze returns two things, z and its log-determinant perhaps; here only z is asked for, the layer around it adds the zeros.", end=lambda z, x: (z, torch.zeros(len(z)))),
        squeeze_wrong("both_return_ldj", "extra term", "Both functions return two things; only the rearranged images are asked for.", end=lambda z, x: (z, torch.zeros(len(z))), end_back=lambda x, z: (x, torch.zeros(len(x)))),
        squeeze_wrong("squeeze_detached", "detached", "squeeze cuts its result off from the computation graph (detach, numpy or no_grad), so no layer below it could be trained.", "gradient", end=lambda z, x: z.detach()),
        squeeze_wrong("unsqueeze_detached", "detached", "unsqueeze cuts its result off from the computation graph (detach, numpy or no_grad).", "gradient", end_back=lambda x, z: x.detach()),
        squeeze_wrong("detached", "detached", "Both functions cut their result off from the computation graph (detach, numpy or no_grad), so nothing could be trained through them.", "gradient", end=lambda z, x: z.detach(), end_back=lambda x, z: x.detach()),
        squeeze_wrong("in_place", "in place", "squeeze writes into the tensor that it is given: the caller's image is overwritten.", "input", end=squeeze_overwrites),
        squeeze_wrong("type_of_number", "type", "squeeze gives another type of number than it gets: a tensor is made without the dtype of x.", end=lambda z, x: torch.zeros(z.shape) + z),
    ),
    features=squeeze_features, faults=squeeze_faults, picture=squeeze_picture,
    compare=tuple(k for shape in SQUEEZE_SHAPES for i, (step, _, _) in enumerate(squeeze_steps(shape))
                  for k in (f"{step}.value", f"{step} after", f"gradient of {step}.gradient", f"{SQUEEZE_NAMES[1 - i]} after {step}.value")),
)


# --- laws of layers on images (conv1x1, image_coupling) --------------------------------------------------------------

class Flat:
    """The inputs or outputs with each image as a row of its numbers, as the laws of autograder.laws want them."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        value = self.arrays[key]
        return value.reshape(len(value), -1) if value.ndim == 4 else value

    def get(self, key, default=None):
        return self[key] if key in self else default


def image_law(law, prefixes):
    """A case's judge that asks one of autograder.laws of layers on images; an example of many numbers is left out."""

    def judge(inputs, outputs, reference):
        for prefix in prefixes:
            image_shape(inputs, outputs, prefix)
            try:
                law(Flat(inputs), Flat(outputs), prefix)
            except Fail as e:
                raise Fail(e.sentence, e.example if len(e.example) < 120 else "") from None

    return judge


def image_shape(inputs, outputs, prefix):
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be (B, C, H, W) = {x.shape}.")


def image_shapes(inputs, outputs, prefix):
    """z and x are (B, C, H, W), ldj is (B,), also for a batch of one image."""
    x = inputs[prefix + "x"]
    for step, name, want in (("forward", "z", x.shape), ("forward", "ldj", x.shape[:1]), ("inverse", "x", x.shape),
                             ("forward of one row", "z", (1, *x.shape[1:])), ("forward of one row", "ldj", (1,))):
        got = outputs[f"{prefix}{step}.{name}"].shape
        if got != want:
            one = " for a batch of one image" if "one row" in step else ""
            raise Fail(f"`{name}` from {step.split(' ')[0]} has shape {got}{one}; it should be {'(B,)' if name == 'ldj' else '(B, C, H, W)'} = {want}.")


def image_inputs(rng, shape, prefix, rows):
    C, H, W = shape
    x = rng.standard_normal((rows, C, H, W))
    near = laws.near(x.reshape(rows, -1)).reshape(-1, C, H, W)
    return {f"{prefix}x": x, f"{prefix}near": near, f"{prefix}z": rng.standard_normal((rows, C, H, W))}


# --- conv1x1 ---------------------------------------------------------------------------------------------------------

CONV_ROWS = 4


def conv_inputs(rng):
    inputs = {"noise": rng.integers(2**31), "other": rng.standard_normal((CONV_ROWS, *CONV_OTHER))}
    for prefix, shape in CONV_IMAGES.items():
        inputs |= image_inputs(rng, shape, prefix, CONV_ROWS)
    first, C = "D=24 ", CONV_IMAGES["D=24 "][0]
    squares = rng.standard_normal((2, C, C))
    for s in squares:       # well away from singular, and the determinants negative
        u, size, v = np.linalg.svd(s)
        s[:] = u * np.clip(size, 0.4, None) @ v
        s[0] *= -np.sign(np.linalg.det(s))
    return inputs | {f"{first}c": rng.standard_normal((CONV_ROWS, *CONV_IMAGES[first])), f"{first}r": rng.standard_normal(CONV_ROWS),
                     f"{first}nudges": 0.05 * laws.STEP * laws.OFFSETS, "squares": squares, "vectors": 0.4 * rng.standard_normal((2, C))}


def conv_prefixed(inputs):
    """The inputs for the run with the judge's numbers are those of the first size."""
    return inputs | {f"same numbers {k}": inputs[f"D=24 {k}"] for k in ("x", "near", "z")}


CONV_PREFIXES = (*CONV_IMAGES, "same numbers ")


def conv_matrix(inputs, outputs, prefix):
    """W (C, C), the same at all pixels, from the Jacobian of the student's own forward; Fail if it is no 1x1 convolution."""
    x = inputs[prefix + "x"]
    image_shape(inputs, outputs, prefix)
    laws.moves(Flat(inputs), Flat(outputs), prefix)
    _, C, H, W = x.shape
    J, _ = laws.own_jacobian(Flat(inputs), Flat(outputs), prefix)
    if np.abs(J - J.mean(0)).max() > 1e-3:
        raise Fail("forward is not linear: its Jacobian is not the same for every image.")
    A = J.mean(0).reshape(C, H * W, C, H * W)
    pixels = np.einsum("ipjp->pij", A)
    inside = np.zeros_like(A)
    inside[:, range(H * W), :, range(H * W)] = pixels
    if np.abs(A - inside).max() > 1e-4:
        raise Fail("Pixels are mixed: with a 1x1 convolution z at a pixel depends on x at that pixel alone.")
    if np.abs(pixels - pixels[0]).max() > 1e-4:
        raise Fail("The matrix is not the same at all pixels.")
    return pixels[0]


def conv_linear(inputs, outputs, reference):
    inputs = conv_prefixed(inputs)
    for prefix in CONV_IMAGES:
        matrix = conv_matrix(inputs, outputs, prefix)
        if (np.abs(matrix) < 1e-6).any():
            i, j = np.argwhere(np.abs(matrix) < 1e-6)[0]
            raise Fail(f"With general weights, channel {i} of z does not depend on channel {j} of x: the matrix should be full.")
    if outputs["forward of other images.z"].shape != inputs["other"].shape:
        raise Fail("For images of another size `z` has not the shape of x.")


def conv_ldj(inputs, outputs, reference):
    """log|det| of the student's own Jacobian is H W log|det W|; and the same layer on images of another size."""
    wide = conv_prefixed(inputs)
    for prefix in CONV_PREFIXES:
        conv_matrix(wide, outputs, prefix)
        ldj = outputs[prefix + "forward.ldj"]
        if ldj.shape != (CONV_ROWS,):
            raise Fail(f"`ldj` has shape {ldj.shape}; it should be one number for each image, (B,) = ({CONV_ROWS},).")
        image_law(laws.ldj_is_log_det, (prefix,))(wide, outputs, reference)
    first, other = outputs["D=24 forward.ldj"], outputs["forward of other images.ldj"]
    (_, H, W), (_, h, w) = CONV_IMAGES["D=24 "], CONV_OTHER
    want = np.full(CONV_ROWS, first.mean() * h * w / (H * W))
    if other.shape != want.shape or not laws.close(other, want, 1e-5).all():
        raise Fail(f"For images of another size ({h} x {w} after {H} x {W}) `ldj` is not H W log|det W|.", f"expected {want[0]:.4g}, got {laws.point(other.ravel()[:1])}")
    if np.abs(first).max() < 1e-9:
        raise Fail("With general weights the volume does not change: W should be any matrix that has an inverse.")


def conv_undone(inputs, outputs, reference):
    image_law(laws.round_trip, CONV_PREFIXES)(conv_prefixed(inputs), outputs, reference)


def conv_shapes(inputs, outputs, reference):
    for prefix in CONV_IMAGES:
        conv_matrix(inputs, outputs, prefix)
        image_shapes(inputs, outputs, prefix)
        image_law(laws.rows_apart, (prefix,))(inputs, outputs, reference)
        image_law(laws.untouched, (prefix,))(inputs, outputs, reference)
        image_once_more(inputs, outputs, prefix)


def conv_trained(inputs, outputs, reference):
    conv_linear(inputs, outputs, reference)
    C = inputs["D=24 x"].shape[1]
    start = outputs["D=24 start.z"]
    if start.shape != inputs["D=24 x"].shape or np.linalg.matrix_rank(np.moveaxis(start, 1, -1).reshape(-1, C), tol=1e-6) < C:
        raise Fail("A fresh layer maps the channels onto something flat: its matrix has no inverse.")
    found = outputs["gradient.along"]
    if found.shape != (2,) or found[1] < C * C:
        raise Fail(f"Only {int(found[-1])} numbers of the layer get a gradient; a matrix of {C} x {C} has {C * C}.")
    gradient_arrives({"gradient.along": found[0] * 0.05, "gradient.nudged": outputs["gradient.nudged"]}, "", "z and ldj", "the matrix")


def conv_saved(inputs, outputs, reference):
    conv_linear(inputs, outputs, reference)
    z, again = outputs["D=24 forward.z"], outputs["after load_state_dict.z"]
    if again.shape != z.shape or not laws.close(again, z, 1e-6).all():
        raise Fail("A layer that was loaded with load_state_dict does not map images as the saved one did: something that forward needs is neither parameter nor buffer.")


def conv_ldj_category(inputs, outputs, prefix):
    """What `ldj` is, read with the student's own matrix."""
    x, ldj = inputs[prefix + "x"], outputs.arrays.get(prefix + "forward.ldj")
    matrix = conv_matrix(inputs, outputs, prefix)
    if ldj is None:
        outputs[prefix + "forward.ldj"]
    B, C, H, W = x.shape
    one, det = np.linalg.slogdet(matrix)[1], np.linalg.det(matrix)
    with np.errstate(all="ignore"):
        readings = {
            "right": H * W * one, "sign": -H * W * one, "one pixel": one, "sign, one pixel": -one, "H": H * one, "W": W * one, "C": C * one, "D": C * H * W * one, "H squared": H * H * one,
            "W squared": W * W * one, "batch": B * H * W * one, "batch for W": B * H * one, "batch for H": B * W * one, "zero": 0, "det": det, "det of all": det ** (H * W), "abs det of all": abs(det) ** (H * W),
            "H W det": H * W * det, "H W abs det": H * W * abs(det), "added": H * W + one, "sum H W": (H + W) * one, "quotient": one / (H * W), "H over W": H / W * one, "W over H": W / H * one,
            "diagonal": H * W * np.log(np.abs(np.diag(matrix))).sum(), "trace": H * W * np.trace(matrix), "sign of det": H * W * np.sign(det), "sum of entries": H * W * matrix.sum(),
        }
    nan = not np.isfinite(ldj).all()
    name = "NaN" if nan else next((k for k, v in readings.items() if np.isfinite(v) and laws.close(ldj, v, 1e-4).all()), "other")
    return f"{name}, shape {ldj.shape}"


def conv_features(inputs, outputs):
    wide, found = conv_prefixed(inputs), {}

    def told(judge):
        try:
            return judge() or "ok"
        except Fail as e:
            return e.sentence

    for prefix in CONV_PREFIXES:
        found[f"{prefix}matrix"] = told(lambda p=prefix: conv_matrix(wide, outputs, p) is None)
        found[f"{prefix}ldj"] = told(lambda p=prefix: conv_ldj_category(wide, outputs, p))
    mine = {k.removeprefix("D=24 "): v for k, v in inputs.items()}
    own = {k.removeprefix("D=24 "): v for k, v in outputs.arrays.items() if not k.startswith(("D=30 ", "same"))}
    found["inverse"] = told(lambda: inverse_category(Flat(mine), Flat(type(outputs)(own)), own_affine))
    for name, judge in (("full", conv_linear), ("trained", conv_trained), ("saved", conv_saved), ("shapes", conv_shapes)):
        found[name] = told(lambda judge=judge: judge(inputs, outputs, None))
    return found


def image_once_more(inputs, outputs, prefix, ldj="ldj", inverse=True):
    """The same images in another order, with other strides: the same results; those of a bijection in the precision of x."""
    keys = (("forward", "z"), ("forward", ldj)) + (("inverse", "x"),) * inverse
    for step, name in keys:
        got, again = outputs[f"{prefix}{step}.{name}"], outputs[f"{prefix}{step} once more.{name}"]
        if again.shape != got.shape or not laws.close(again[::-1], got, 1e-3 if got.dtype == np.float32 else 1e-6).all():
            raise Fail(f"{step} gives something else for the same images in another order and with another layout in memory: something is kept from one call to the next, or `x` is read as if it were contiguous.")
        if got.dtype == np.float32 and ldj == "ldj":
            raise Fail(f"`{name}` from {step} is float32 for images and weights in float64: digits are lost on the way.")


class PlainConv1x1(nn.Module):
    """The layer in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, channels):
        super().__init__()
        self.W = self.start(torch.linalg.qr(torch.randn(channels, channels))[0])

    def start(self, matrix):
        return nn.Parameter(matrix)

    def mix(self, x):
        return torch.einsum("ij,bjhw->bihw", self.W, x)

    def one(self):
        return torch.linalg.slogdet(self.W)[1]

    def pixels(self, x):
        return x.shape[2] * x.shape[3]

    def ldj(self, x):
        return (self.pixels(x) * self.one()).expand(len(x))

    def forward(self, x):
        return self.mix(x), self.ldj(x)

    def undo(self):
        return torch.linalg.inv(self.W)

    def inverse(self, z):
        return torch.einsum("ij,bjhw->bihw", self.undo(), z)


def conv_with_bias(self, channels):
    nn.Module.__init__(self)
    self.W, self.b = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0]), nn.Parameter(torch.randn(channels))


def conv_fresh(self, channels):
    nn.Module.__init__(self)
    self.turned = torch.linalg.qr(torch.randn(channels, channels))[0]
    self.W0 = nn.Parameter(torch.eye(channels))
    type(self).W = property(lambda s: s.turned @ s.W0)


def conv_picture(inputs, outputs, reference):
    """Your W, what inverse must do, and what it gives back."""
    figure = plotting.Picture(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    try:
        matrix = conv_matrix(inputs, outputs, "D=24 ")
    except Fail:
        for ax in axes:
            pictures.empty(ax, "yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        return figure
    pictures.square(axes[0], matrix, "your W, with other weights")
    pictures.square(axes[1], np.linalg.pinv(matrix), "what inverse must do")
    x, back = inputs["D=24 x"], outputs.arrays.get("D=24 inverse of forward.x")
    if back is None or back.shape != x.shape or not np.isfinite(back).all():
        pictures.empty(axes[2], "inverse: nothing to draw")
        return figure
    axes[2].scatter(x.ravel(), back.ravel(), color=plotting.PALETTE["red"], s=20)
    axes[2].plot([-3, 3], [-3, 3], ":", color="black")
    axes[2].set_title("inverse(forward(x)) against x", fontsize=plotting.FONT)
    return figure


wrong = deviating(PlainConv1x1)
CONV = Exercise(
    id="conv1x1", title="The invertible 1x1 convolution", minutes=12, difficulty=3,
    hints=(
        "At every pixel the vector of its C channels is multiplied by one and the same matrix W (C, C). For all H W pixels together the Jacobian is block-diagonal: what is the log-determinant of so many equal blocks?",
        "`torch.einsum('ij,bjhw->bihw', W, x)`, or `F.conv2d(x, W[:, :, None, None])`, mixes the channels; `torch.linalg.slogdet(W)[1]` is log|det W|, whatever its sign. Start W as a rotation (`torch.linalg.qr` of a random matrix), so that it has an inverse.",
    ),
    inputs=conv_inputs, reference=flowkit_class("images", "Conv1x1"),
    cases=(
        Case("shapes, one image, and the input is left as it was", 1, conv_shapes),
        Case("z = W x at each pixel, with one full matrix W, for images of any size", 2, conv_linear),
        Case("ldj = H W log|det W|, one for each image", 2, conv_ldj),
        Case("inverse undoes forward, and forward inverse", 2, conv_undone),
        Case("W starts with an inverse, and gradients of z and ldj reach all of it", 1, conv_trained),
        Case("a loaded layer is the saved one", 0.5, conv_saved),
    ),
    misconceptions=(
        wrong("ldj_one_pixel", "missing term", "ldj", "`ldj` is log|det W| of a single pixel; W acts at all H W of them, each with the same determinant.", pixels=lambda self, x: 1),
        wrong("ldj_height_only", "missing term", "ldj", "`ldj` counts the rows of the image only: the factor W for its width is missing.", pixels=lambda self, x: x.shape[2]),
        wrong("ldj_width_only", "missing term", "ldj", "`ldj` counts the columns of the image only: the factor H for its height is missing.", pixels=lambda self, x: x.shape[3]),
        wrong("ldj_square", "exchanged", "ldj", "`ldj` takes the image for a square, H H pixels; it has H W.", pixels=lambda self, x: x.shape[2] ** 2),
        wrong("ldj_all_numbers", "extra term", "ldj", "`ldj` counts all C H W numbers of the image; the matrix acts once for each pixel, H W times.", pixels=lambda self, x: x[0].numel()),
        wrong("ldj_channels", "wrong function", "ldj", "`ldj` multiplies by the number of channels; W acts once for each pixel, H W times.", pixels=lambda self, x: x.shape[1]),
        wrong("ldj_batch", "extra term", "ldj", "`ldj` is multiplied by the size of the batch as well; every image counts once.", pixels=lambda self, x: len(x) * x.shape[2] * x.shape[3]),
        wrong("ldj_added", "wrong function", "ldj", "H W is added to log|det W|; so many equal determinants multiply, so their logarithm is taken H W times.", ldj=lambda self, x: (self.pixels(x) + self.one()).expand(len(x))),
        wrong("ldj_divided", "sign", "ldj", "log|det W| is divided by the number of pixels; it counts once for each of them.", ldj=lambda self, x: (self.one() / self.pixels(x)).expand(len(x))),
        wrong("ldj_mean_size", "wrong function", "ldj", "Height and width are added where the number of pixels, their product, is asked for.", pixels=lambda self, x: x.shape[2] + x.shape[3]),
        wrong("ldj_sign", "sign", "ldj", laws.LDJ_FAULTS["ldj_sign"][1], one=lambda self: -torch.linalg.slogdet(self.W)[1]),
        wrong("ldj_zero", "missing function", "ldj", laws.LDJ_FAULTS["ldj_zero"][1], ldj=lambda self, x: torch.zeros(len(x))),
        wrong("ldj_pixels_alone", "missing term", "ldj", "`ldj` is the number of pixels alone: the factor log|det W| is missing.", ldj=lambda self, x: self.pixels(x)),
        wrong("starts_singular", "constant", "parameters", "W starts as a matrix without an inverse (all zeros or all ones); a rotation is a good start.", start=lambda self, matrix: nn.Parameter(torch.ones_like(matrix))),
        wrong("ldj_no_log", "missing function", "ldj", "`ldj` is H W times the determinant; its logarithm is asked for.", one=lambda self: torch.det(self.W)),
        wrong("ldj_no_log_abs", "missing function", "ldj", "`ldj` is H W times |det W|; its logarithm is asked for.", one=lambda self: torch.det(self.W).abs()),
        wrong("ldj_no_abs", "missing function", "ldj", "The logarithm of a negative determinant is NaN: the absolute value is missing (det may be negative, also for a rotation with a reflection).", one=lambda self: torch.logdet(self.W)),
        wrong("ldj_sign_of_det", "off by one", "ldj", "`ldj` uses the sign of the determinant: `slogdet` returns the pair (sign, log|det|), and the second entry is wanted.", one=lambda self: torch.linalg.slogdet(self.W)[0]),
        wrong("ldj_diagonal", "wrong function", "ldj", "`ldj` adds up the logarithms of W's diagonal; that is log|det W| for triangular matrices only.", one=lambda self: self.W.diagonal().abs().log().sum()),
        wrong("ldj_one_number", "shape", "ldj", laws.LDJ_FAULTS["ldj_one_number"][1], ldj=lambda self, x: self.pixels(x) * self.one()),
        wrong("ldj_of_one", "shape", "ldj", "`ldj` has a single entry, shape (1,); every image needs its own, shape (B,).", ldj=lambda self, x: (self.pixels(x) * self.one()).reshape(1)),
        wrong("ldj_keepdim", "shape", "ldj", laws.LDJ_FAULTS["ldj_keepdim"][1], ldj=lambda self, x: (self.pixels(x) * self.one()).expand(len(x), 1)),
        wrong("ldj_map", "shape", "ldj", "`ldj` is a map with one number for each pixel: the sum over H and W is missing.", ldj=lambda self, x: self.one().expand(len(x), *x.shape[2:])),
        wrong("ldj_detached", "detached", "gradient", "`ldj` is cut off from the computation graph (detach, item or numpy), so training would not feel how W changes the volume.", one=lambda self: torch.linalg.slogdet(self.W)[1].detach()),
        wrong("not_trained", "detached", "parameters", "W is no parameter (or it is cut off from the graph), so it would stay what it was at the start.", start=lambda self, matrix: matrix),
        wrong("inverse_transpose", "wrong function", "inverse", "inverse multiplies by the transpose of W; that is its inverse only while W is a rotation, and training takes it away from that.", undo=lambda self: self.W.T),
        wrong("inverse_transposed", "wrong axis", "inverse", "forward and inverse disagree about a transpose: inverse undoes the transposed matrix.", undo=lambda self: torch.linalg.inv(self.W).T),
        wrong("inverse_is_forward", "direction", "inverse", "inverse multiplies by W once more instead of undoing it.", undo=lambda self: self.W),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
        wrong("inverse_pair", "extra term", "inverse", "inverse returns two things; x alone is asked for.", inverse=lambda self, z: (PlainConv1x1.inverse(self, z), -self.ldj(z))),
        wrong("bias_not_undone", "missing term", "inverse", "forward adds a bias (nn.Conv2d has one by default) that inverse does not take off.", __init__=conv_with_bias, mix=lambda self, x: PlainConv1x1.mix(self, x) + self.b[:, None, None]),
        wrong("depthwise", "wrong function", "forward", "Each channel is only multiplied by a number of its own (groups, or elementwise): the channels are not mixed.", mix=lambda self, x: self.W.diagonal()[:, None, None] * x, one=lambda self: self.W.diagonal().abs().log().sum(), undo=lambda self: torch.diag(1 / self.W.diagonal())),
        wrong("not_saved", "state", "state", "Something that forward needs is neither a parameter nor a buffer, so a loaded layer is another one.", __init__=conv_fresh),
        returns_exchanged(PlainConv1x1),
    ),
    features=conv_features, picture=conv_picture,
    compare=tuple(f"same numbers {k}" for k in ("forward.z", "forward.ldj", "inverse.x", "inverse of forward.x")) + ("D=24 start.z!",),
)


# --- image_coupling --------------------------------------------------------------------------------------------------

COUPLED_ROWS = 8


def coupled_inputs(rng):
    inputs = {}
    for prefix, shape in COUPLED_IMAGES.items():
        C1, hidden = shape[0] // 2, 6
        inputs |= image_inputs(rng, shape, prefix, COUPLED_ROWS)
        shapes = {"W1": (hidden, C1, 3, 3), "b1": (hidden,), "W2": (2 * C1, hidden, 1, 1), "b2": (2 * C1,)}
        scale = {"W1": 1 / (9 * C1) ** 0.5, "b1": 0.5, "W2": 1.2 / hidden**0.5, "b2": 0.3}
        inputs |= {f"{prefix}net.{k}": scale[k] * rng.standard_normal(s) for k, s in shapes.items()}
        inputs |= {f"{prefix}direction.{k}": 0.3 * rng.standard_normal(s) for k, s in shapes.items()}
        inputs |= {f"{prefix}c": rng.standard_normal((COUPLED_ROWS, *shape)), f"{prefix}r": rng.standard_normal(COUPLED_ROWS), f"{prefix}nudges": laws.STEP * laws.OFFSETS}
    return inputs


def coupled_exchanged(inputs):
    """The net's two blocks of channels in the other order."""
    return inputs | {k: np.roll(v, len(v) // 2, 0) for k, v in inputs.items() if k.endswith((".W2", ".b2"))}


def coupled_net_at(prefix_inputs, prefix, x1):
    """What the judge's net gives for the rows x1 of flattened first halves, flattened."""
    C, H, W = COUPLED_IMAGES[prefix]
    w = {k: tensor(v) for k, v in part(prefix_inputs.arrays, prefix + "net.").items()}
    with torch.no_grad():
        return image_net(w)(tensor(x1).reshape(-1, C // 2, H, W)).flatten(1).numpy()


def coupled_affine(inputs, outputs, prefix):
    affine_in_second_half(inputs, outputs, prefix, net_at=coupled_net_at)


def coupled_first_half(inputs, outputs, prefix):
    """The first half of the numbers of an image in memory are the first half of its channels."""
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    kept = np.isclose(x, z, atol=1e-6).all(0)
    try:
        first_half_passed_on(inputs, outputs, prefix)
    except Fail as e:
        if kept.sum() != len(kept) // 2:
            raise
        C, H, W = COUPLED_IMAGES[prefix]
        channels = sorted({int(i) // (H * W) for i in np.flatnonzero(kept)})
        where = f"for C = {C}, of channels {channels}" if len(channels) > C // 2 else f"for C = {C}, channels {channels}"
        raise Fail(f"Another part of x is passed on than the first half of its channels ({where}).") from e


def coupled_shapes(inputs, outputs, reference):
    for prefix in COUPLED_IMAGES:
        laws.moves(Flat(inputs), Flat(outputs), prefix)
        image_shapes(inputs, outputs, prefix)
        image_law(laws.rows_apart, (prefix,))(inputs, outputs, reference)
        image_once_more(inputs, outputs, prefix)


def coupled_ldj(inputs, outputs, reference):
    for prefix in COUPLED_IMAGES:
        ldj = outputs[prefix + "forward.ldj"]
        if ldj.shape != (COUPLED_ROWS,):
            raise Fail(f"`ldj` has shape {ldj.shape}; it should be one number for each image, (B,) = ({COUPLED_ROWS},).")
    image_law(laws.ldj_is_log_det, COUPLED_IMAGES)(inputs, outputs, reference)


def coupled_trained(inputs, outputs, reference):
    for prefix in COUPLED_IMAGES:
        laws.moves(Flat(inputs), Flat(outputs), prefix)
        gradient_arrives(outputs, prefix, "z and ldj", "the weights of `net`")
        z, again = outputs[prefix + "forward.z"], outputs[prefix + "forward under no_grad.z"]
        if again.shape != z.shape or not laws.close(again, z, 1e-6).all():
            raise Fail("Under torch.no_grad() forward gives something else.")
        gradient_arrives({f"gradient.{k}": outputs[f"{prefix}gradient of x.{k}"] for k in ("along", "nudged")}, "", "z and ldj", "x (through the net as well)")
        if not outputs[prefix + "parameters.found"].all():
            raise Fail("parameters() of your layer does not give the weights of `net` (it is kept in a plain list or a function), so an optimiser would never move them.")


def coupled_light(inputs):
    """For slips: the first size alone, and no gradients."""
    kept = {k: v for k, v in inputs.items() if k.startswith("D=12 ") and "nudges" not in k and "gradient" not in k}
    return {k: v[:COUPLED_ROWS] if k.endswith("near") else v for k, v in kept.items()}


class PlainImageCoupling:
    """The layer in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, net):
        self.net = net

    def halves(self, x):
        return x.chunk(2, 1)

    def params(self, x1):
        return self.net(x1).chunk(2, 1)

    def bend(self, x2, alpha, mu):
        return x2 * alpha.exp() + mu

    def unbend(self, z2, alpha, mu):
        return (z2 - mu) * (-alpha).exp()

    def ldj(self, alpha):
        return alpha.sum((1, 2, 3))

    def join(self, a, b):
        return torch.cat([a, b], 1)

    def join_back(self, a, b):
        return torch.cat([a, b], 1)

    def forward(self, x):
        x1, x2 = self.halves(x)
        alpha, mu = self.params(x1)
        return self.join(x1, self.bend(x2, alpha, mu)), self.ldj(alpha)

    def inverse(self, z):
        z1, z2 = self.halves(z)
        alpha, mu = self.params(z1)
        return self.join_back(z1, self.unbend(z2, alpha, mu))


def coupled_forward(order=lambda x1, x2: x1, params=lambda self, u: self.params(u), first=False):
    """forward with another half for the net, other parameters, or the first half changed."""

    def forward(self, x):
        x1, x2 = self.halves(x)
        if first:
            alpha, mu = params(self, x2)
            return self.join(self.bend(x1, alpha, mu), x2), self.ldj(alpha)
        alpha, mu = params(self, order(x1, x2))
        return self.join(x1, self.bend(x2, alpha, mu)), self.ldj(alpha)

    return forward


def coupled_inverse(order=lambda z1, z2: z1, params=lambda self, u: self.params(u), first=False):
    def inverse(self, z):
        z1, z2 = self.halves(z)
        if first:
            alpha, mu = params(self, z2)
            return self.join_back(self.unbend(z1, alpha, mu), z2)
        alpha, mu = params(self, order(z1, z2))
        return self.join_back(z1, self.unbend(z2, alpha, mu))

    return inverse


def coupled_in_place(self, x):
    x1, x2 = self.halves(x)
    alpha, mu = self.params(x1)
    x2.copy_(self.bend(x2, alpha, mu))
    return x, self.ldj(alpha)


def coupled_inverse_in_place(self, z):
    z1, z2 = self.halves(z)
    alpha, mu = self.params(z1)
    z2.copy_(self.unbend(z2, alpha, mu))
    return z


def coupled_without_graph(self, x1):
    with torch.no_grad():
        return self.net(x1).chunk(2, 1)


def coupled_split(axis):
    return {"halves": lambda self, x: x.chunk(2, axis), "join": lambda self, a, b: torch.cat([a, b], axis), "join_back": lambda self, a, b: torch.cat([a, b], axis)}


def coupled_picture(inputs, outputs, reference):
    """One image of 4 channels: x, z, and what inverse gives back, beside the reference's z."""
    prefix = "D=24 "
    figure = plotting.Picture(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(4, 4)
    x = inputs[prefix + "x"]
    rows = (("x", x), ("your z", outputs.arrays.get(prefix + "forward.z")), ("reference z", reference.arrays[prefix + "forward.z"]), ("your inverse(z)", outputs.arrays.get(prefix + "inverse of forward.x")))
    for r, (row, (name, images)) in enumerate(zip(axes, rows)):
        row[0].set_ylabel(name, fontsize=plotting.FONT - 2)
        for c, ax in enumerate(row):
            if r == 0:
                ax.set_title(f"channel {c}", fontsize=plotting.FONT - 2)
            if images is None or images.shape != x.shape or not np.isfinite(images).all():
                pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            else:
                ax.imshow(images[0, c].T, cmap="PuOr", vmin=-3, vmax=3, aspect="auto")
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    return figure


wrong = deviating(PlainImageCoupling)
COUPLED = Exercise(
    id="image_coupling", title="Coupling along the channels", minutes=10, difficulty=2,
    hints=(
        "It is your `Coupling` with images: the halves are halves of the channels, dimension 1, in all that is cut and joined. What is the volume's change of one image the sum of?",
        "`x.chunk(2, dim=1)`, and the net's output (B, 2 C2, H, W) is cut along the channels as well. alpha has a number for each channel and pixel of x2, so `ldj` sums over three dimensions and keeps the batch.",
    ),
    inputs=coupled_inputs, reference=flowkit_class("images", "ImageCoupling"),
    cases=(
        Case("shapes: z (B, C, H, W), ldj (B,), x (B, C, H, W)", 1, coupled_shapes),
        Case("the first half of the channels is passed on", 1, image_law(coupled_first_half, COUPLED_IMAGES)),
        Case("z2 = x2 exp(alpha) + mu", 1.5, image_law(coupled_affine, COUPLED_IMAGES)),
        Case("ldj = log|det dz/dx|, the sum over channels and pixels", 2, coupled_ldj),
        Case("inverse undoes forward, and forward inverse", 1.5, image_law(laws.round_trip, COUPLED_IMAGES)),
        Case("gradients reach the net", 0.5, coupled_trained),
        Case("the input is left as it was", 0.5, image_law(laws.untouched, COUPLED_IMAGES)),
    ),
    misconceptions=(
        wrong("ldj_channels_only", "shape", "ldj", "`ldj` is summed over the channels only, so a map (B, H, W) is left; the sums over H and W are missing.", ldj=lambda self, a: a.sum(1)),
        wrong("ldj_pixels_only", "shape", "ldj", "`ldj` is summed over the pixels only, so one number for each channel is left; the sum over the channels is missing.", ldj=lambda self, a: a.sum((2, 3))),
        wrong("ldj_last_axis", "shape", "ldj", "`ldj` is summed over the last dimension only, as for vectors; an image has three, C, H and W.", ldj=lambda self, a: a.sum(-1)),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` still has one number for each entry of x2: the sum over channels and pixels is missing.", ldj=lambda self, a: a),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1, 1, 1): the dimensions that were summed over are still there.", ldj=lambda self, a: a.sum((1, 2, 3), keepdim=True)),
        wrong("ldj_keepdim_flat", "shape", "ldj", laws.LDJ_FAULTS["ldj_keepdim"][1], ldj=lambda self, a: a.flatten(1).sum(1, keepdim=True)),
        wrong("ldj_batch_sum", "reduction", "ldj", laws.LDJ_FAULTS["ldj_batch_sum"][1], ldj=lambda self, a: a.sum()),
        wrong("ldj_over_batch", "wrong axis", "ldj", "`ldj` is summed over the batch, dimension 0, too or instead; every image keeps its own number.", ldj=lambda self, a: a.sum((0, 2, 3))),
        wrong("ldj_batch_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over channels and pixels.", ldj=lambda self, a: a.sum(0)),
        wrong("ldj_batch_axis_flat", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the numbers of each image.", ldj=lambda self, a: a.flatten(1).sum(0)),
        wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over channels and pixels; the logarithm of a product is a sum.", ldj=lambda self, a: a.mean((1, 2, 3))),
        wrong("ldj_pixel_mean", "reduction", "ldj", "`ldj` is a mean over the pixels; every pixel adds its own log-scales.", ldj=lambda self, a: a.mean((2, 3)).sum(1)),
        wrong("ldj_mean_all", "reduction", "ldj", laws.LDJ_FAULTS["ldj_batch_mean"][1], ldj=lambda self, a: a.mean()),
        wrong("ldj_sign", "sign", "ldj", laws.LDJ_FAULTS["ldj_sign"][1], ldj=lambda self, a: -a.sum((1, 2, 3))),
        wrong("ldj_scales", "missing function", "ldj", "`ldj` adds up the scales exp(alpha); it is the sum of their logarithms, of alpha itself.", ldj=lambda self, a: a.exp().sum((1, 2, 3))),
        wrong("ldj_det", "missing function", "ldj", laws.LDJ_FAULTS["ldj_det"][1], ldj=lambda self, a: a.sum((1, 2, 3)).exp()),
        wrong("ldj_zero", "missing function", "ldj", laws.LDJ_FAULTS["ldj_zero"][1], ldj=lambda self, a: torch.zeros(len(a))),
        wrong("split_width", "wrong axis", "forward", "x is cut along its width, the last dimension, as vectors are; halves of the channels are asked for, dimension 1.", **coupled_split(-1)),
        wrong("split_height", "wrong axis", "forward", "x is cut along its height; halves of the channels are asked for, dimension 1.", **coupled_split(2)),
        wrong("params_width", "wrong axis", "net", "The net's output is cut along its width; alpha and mu are blocks of channels, dimension 1.", params=lambda self, x1: self.net(x1).chunk(2, -1)),
        wrong("join_width", "wrong axis", "forward", "In forward, the halves are joined along the width; they were cut along the channels.", join=lambda self, a, b: torch.cat([a, b], -1)),
        wrong("join_batch", "wrong axis", "forward", "In forward, the halves are joined along the batch; they were cut along the channels.", join=lambda self, a, b: torch.cat([a, b], 0)),
        wrong("join_back_width", "wrong axis", "inverse", "In inverse, the halves are joined along the width; they were cut along the channels.", join_back=lambda self, a, b: torch.cat([a, b], -1)),
        wrong("join_back_batch", "wrong axis", "inverse", "In inverse, the halves are joined along the batch; they were cut along the channels.", join_back=lambda self, a, b: torch.cat([a, b], 0)),
        wrong("join_order", "order", "forward", "In forward, the two halves are joined in the wrong order: the changed half stands first.", join=lambda self, a, b: torch.cat([b, a], 1)),
        wrong("join_back_order", "order", "inverse", "In inverse, the two halves are joined in the wrong order.", join_back=lambda self, a, b: torch.cat([b, a], 1)),
        wrong("inverse_alpha_sign", "sign", "inverse", "In inverse, alpha has the same sign as in forward: the stretch is applied once more instead of being undone.", unbend=lambda self, z2, a, m: (z2 - m) * a.exp()),
        wrong("inverse_mu_sign", "sign", "inverse", "In inverse, mu is added as in forward: the shift is applied once more instead of being undone.", unbend=lambda self, z2, a, m: (z2 + m) * (-a).exp()),
        wrong("inverse_order", "order", "inverse", "inverse undoes the two steps in the order in which forward made them; the last one made must be undone first.", unbend=lambda self, z2, a, m: z2 * (-a).exp() - m),
        wrong("inverse_no_mu", "missing term", "inverse", "inverse undoes the stretch but forgets the shift mu.", unbend=lambda self, z2, a, m: z2 * (-a).exp()),
        wrong("inverse_no_scale", "missing term", "inverse", "inverse undoes the shift but forgets the stretch.", unbend=lambda self, z2, a, m: z2 - m),
        wrong("inverse_is_forward", "direction", "inverse", "inverse applies the forward map a second time.", unbend=lambda self, z2, a, m: z2 * a.exp() + m),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
        wrong("inverse_from_second", "wrong function", "inverse", "inverse feeds the second half of the channels to the net; only the first half is the same before and after.", inverse=coupled_inverse(lambda z1, z2: z2)),
        wrong("forward_from_second", "wrong function", "net", "forward feeds the second half of the channels to the net; it is the first half that decides how the second is changed.", forward=coupled_forward(lambda x1, x2: x2)),
        wrong("self_conditioned", "wrong function", "net", "The second half is fed to the net in both directions, so it conditions itself and cannot be recovered.", forward=coupled_forward(lambda x1, x2: x2), inverse=coupled_inverse(lambda z1, z2: z2)),
        wrong("halves_swapped", "exchanged", "forward", "The halves are swapped in both directions: the second half of the channels is passed on and the first one changed.", forward=coupled_forward(first=True), inverse=coupled_inverse(first=True)),
        wrong("forward_of_first", "exchanged", "forward", "forward changes the first half, while inverse changes the second: the halves are swapped in one direction.", forward=coupled_forward(first=True)),
        wrong("inverse_of_first", "exchanged", "inverse", "inverse changes the first half, while forward changed the second: the halves are swapped in one direction.", inverse=coupled_inverse(first=True)),
        wrong("inverse_exchanged", "exchanged", "inverse", "alpha and mu are taken from the net's output in one order in forward and in the other order in inverse.", inverse=coupled_inverse(params=lambda self, u: self.params(u)[::-1])),
        wrong("forward_exchanged", "exchanged", "forward", "alpha and mu are taken from the net's output in one order in inverse and in the other order in forward.", forward=coupled_forward(params=lambda self, u: self.params(u)[::-1])),
        wrong("no_exp", "missing function", "forward", "x2 is multiplied by alpha itself; the scale is exp(alpha), which is never zero or negative.", bend=lambda self, x2, a, m: x2 * a + m),
        wrong("forward_no_mu", "missing term", "forward", "In forward, the shift mu is missing.", bend=lambda self, x2, a, m: x2 * a.exp()),
        wrong("forward_no_scale", "missing term", "forward", "In forward, the stretch exp(alpha) is missing.", bend=lambda self, x2, a, m: x2 + m),
        wrong("mu_sign", "sign", "forward", "forward subtracts mu and inverse adds it; it should be the other way round.", bend=lambda self, x2, a, m: x2 * a.exp() - m, unbend=lambda self, z2, a, m: (z2 + m) * (-a).exp()),
        wrong("forward_mu_sign", "sign", "forward", "forward subtracts mu, as inverse does.", bend=lambda self, x2, a, m: x2 * a.exp() - m),
        wrong("forward_alpha_sign", "sign", "forward", "forward divides by exp(alpha), as inverse does.", bend=lambda self, x2, a, m: x2 * (-a).exp() + m),
        wrong("alpha_sign", "sign", "forward", "forward divides by exp(alpha) and inverse multiplies; `ldj` is minus the sum of alpha then. It should be the other way round.", bend=lambda self, x2, a, m: x2 * (-a).exp() + m, unbend=lambda self, z2, a, m: (z2 - m) * a.exp(), ldj=lambda self, a: -a.sum((1, 2, 3))),
        wrong("net_no_grad", "detached", "net", "The net's output is cut off from the computation graph (no_grad or detach), so the net would never learn.", params=coupled_without_graph),
        wrong("in_place", "in place", "input", "forward changes its input in place: the caller's x is overwritten.", forward=coupled_in_place),
        wrong("inverse_in_place", "in place", "input", "inverse changes its input in place: the caller's z is overwritten.", inverse=coupled_inverse_in_place),
        wrong("one_scale_a_channel", "reduction", "net", "alpha is averaged over the pixels, so all pixels of a channel are stretched alike; each has its own.", params=lambda self, x1: (lambda a, m: (a.mean((2, 3), keepdim=True) + 0 * m, m))(*PlainImageCoupling.params(self, x1))),
        returns_exchanged(PlainImageCoupling),
    ),
    compare=tuple(f"{p}{k}" for p in COUPLED_IMAGES for k in (*BIJECTION, "gradient.along")), variants=(coupled_exchanged,),
    light=coupled_light,
    faults=lambda i, o: laws.ldj_faults(Flat(i), Flat(o), COUPLED_IMAGES), picture=coupled_picture,
)


# --- gated blocks: gated_conv, gated_attention -----------------------------------------------------------------------

# A gate is found whatever the layout: along one number of the weights (or a bias) of g, the branch b = y - x is u sigmoid(g + t h), so
# 1 / b = (1 + exp(-g - t h)) / u is a constant and a geometric sequence in t; no other number of any block does that. Three differences
# say whether it holds, and give u and the gate.


def gate_curve(b, moved):
    """(u, gate, where) of the branch b (...) and its values at t = -1, 1, 2 (3, ...): `where` the numbers can be told; None if it is no gate."""
    with np.errstate(all="ignore"):
        r, (before, after, later) = 1 / b, 1 / moved
        d1, d2, d3 = before - r, r - after, after - later
        where = np.isfinite(d1 + d2 + d3) & (np.abs(d2) > 1e-3 * np.abs(r))
        fits = np.abs(d2**2 - d1 * d3) <= 1e-7 * (d2**2 + np.abs(d1 * d3))
        inverse = r - d2 / (1 - d3 / d2)
        gate = inverse / r
        where &= np.abs(gate) > 1e-6      # also of an exponential, which has no bound u, nothing is left here
        if not where.any() or not fits[where].all() or not ((gate[where] > 0) & (gate[where] < 1 - 1e-6)).all():
            return None
        return np.where(where, 1 / inverse, np.nan), np.where(where, gate, np.nan), where


def gate_found(inputs, outputs, step, at):
    """u and gate, (B, C, H, W) with NaN where they cannot be told; Fail, with what is there instead, unless each channel has a gate."""
    x, y = inputs[at], outputs[f"{step}.y"]
    if y.shape != x.shape:
        raise Fail(f"The result has shape {y.shape} for x of shape {x.shape}; the shape should be kept.")
    if np.abs(y - x).max() < 1e-9:
        raise Fail("x comes back unchanged, so there is nothing here to judge yet.")
    if np.ptp(y - x, 1).max() < 1e-9:
        raise Fail("All channels get the same branch; u and g should have as many channels as x.")
    nudged = outputs[f"{step} with nudged weights.y"]
    still = outputs.arrays.get(f"{step} near zero.y", x)     # what the branch is added to, where that is not x, which another case says
    starts = (x, still) if still.shape == x.shape and np.isfinite(still).all() else (x,)
    u, gate = np.full(x.shape, np.nan), np.full(x.shape, np.nan)
    for c in range(x.shape[1]):
        best = 0
        for start in starts:
            for row in nudged[:, :3, :, c]:
                found = gate_curve(y[:, c] - start[:, c], row - start[:, c])
                if found is not None and found[2].sum() > best:
                    u[:, c], gate[:, c], best = found[0], found[1], found[2].sum()
            if best:
                break
        if not best:
            raise Fail(GATES[gate_instead(x[:, c], y[:, c], nudged[:, :, :, c])])
        if np.nanstd(gate[:, c]) < 1e-9 and best > 1:
            raise Fail("The gate is the same for all images and pixels; it should be computed from x, as u is.")
    sums = gate.sum(1)
    if np.isfinite(sums).sum() > 1 and np.abs(sums[np.isfinite(sums)] - 1).max() < 1e-7:
        raise Fail("The gates of all channels sum to 1 at each pixel, as those of a softmax do; with a sigmoid each channel opens and closes by itself.")
    return u, gate


GATES = {
    "tanh": "The gate is a tanh, between -1 and 1, so it turns signs round; a sigmoid opens it between 0 and 1.",
    "added": "u and sigmoid(g) are added; the gate multiplies u, so that it can close.",
    "divided": "u is divided by the gate or multiplied by an exponential, which has no bound; sigmoid(g) multiplies u.",
    "self": "u is its own gate: what should open and close it, the other half of the channels, is not used.",
    "ungated": "There is no gate: nothing among the weights lets a number between 0 and 1 multiply the branch.",
    "product": "u is multiplied by something that is no sigmoid: it is not bounded by 0 and 1.",
}


def gate_instead(x, y, nudged):
    """Which of GATES a channel shows, x and y (B, H, W), nudged (rows, 5, B, H, W)."""
    b, moved = y - x, nudged - x
    size = np.abs(b).max()
    reacts = np.abs(moved[:, 1] - b).max((1, 2, 3), initial=0) > 1e-9
    for before, after, _, low, high in moved[reacts]:
        if (np.abs(high + low) <= 1e-6 * (np.abs(high) + np.abs(low))).all() and np.abs(high).max() > size:
            return "tanh"
        if np.abs(high - low).max() < 1 + 1e-9 and (np.abs(np.abs(high - low) - 1) < 1e-6).any():
            return "added"
    for before, after, later, low, high in moved[reacts]:
        if np.abs(low).max() < 1e-6 and (high - b).min() > 20:
            return "self"
        d1, d2, d3 = before - b, b - after, after - later
        if (np.abs(d2**2 - d1 * d3) <= 1e-7 * d2**2).all() and (np.abs(d3 - d2) > 1e-2 * np.abs(d2)).all():
            return "divided"
    for before, after, *_ in moved[reacts]:
        if np.abs(after - b - 1).max() < 1e-9 and np.abs(b - before - 1).max() < 1e-9:
            return "ungated"
    return "product"


def block_told(judge, *args):
    try:
        judge(*args)
        return "ok"
    except Fail as e:
        return e.sentence


def block_shapes(inputs, outputs, reference):
    x = inputs["x"]
    y = outputs["forward of a batch.y"]
    if y.shape == x.shape and np.abs(y - x).max() < 1e-9:
        raise Fail("x comes back unchanged, so there is nothing here to judge yet.")
    for step, want in (("a batch", x.shape), ("one image", (1, *x.shape[1:])), ("other images", inputs["other"].shape)):
        got = outputs[f"forward of {step}.y"].shape
        if got != want:
            raise Fail(f"For x of shape {want} the result has shape {got}; the block keeps the shape.")
    if y.dtype != np.float64:
        raise Fail("The result is float32 for weights and x in float64: digits are lost on the way.")
    again = outputs["forward once more.y"]
    if again.shape != y.shape or not laws.close(again, y, 1e-6).all():
        raise Fail("The same images give something else when they are asked for again: something is drawn at random, or layers are made, in each call of forward.")
    if not laws.close(outputs["forward of one image.y"][0], y[0], 1e-6).all():
        raise Fail("The images of a batch influence each other: alone, an image gives something else.")
    after = outputs["x after"]
    if after.shape != x.shape or not np.array_equal(after, x):
        raise Fail("forward changed its input `x` in place: the caller's tensor was overwritten.")


def block_residual(inputs, outputs, reference):
    x, y, general = inputs["x"], outputs["forward with weights near zero.y"], outputs["forward of a batch.y"]
    if y.shape != x.shape:
        raise Fail(f"The result has shape {y.shape} for x of shape {x.shape}; the block keeps the shape.")
    if general.shape == x.shape and np.abs(general - x).max() < 1e-9:
        raise Fail("x comes back unchanged whatever the weights, so there is nothing here to judge yet.")
    if np.abs(y - x).max() > 1e-5:
        constant = f"x + {np.mean(y - x):.2g}: the branch does not end with weights that could make it vanish" if np.ptp(y - x) < 1e-5 else ""
        said = constant or next((words for words, wrong in (("0: x is not added to the branch", 0), ("-x: x is subtracted", -x), ("2 x: x is added twice", 2 * x)) if np.abs(y - wrong).max() < 1e-5),
                    "something else: either x is not added as it is, or the branch does not end with weights")
        raise Fail(f"With all weights near zero the branch should vanish and x come through unchanged; yours gives {said}.")


def block_gradients(inputs, outputs, reference):
    block_shapes(inputs, outputs, reference)
    if outputs["number of parameters"] == 0:
        raise Fail("PyTorch finds no weights in the block: it needs layers as attributes, not in a plain list, say.")
    loaded, y = outputs["forward after load_state_dict.y"], outputs["forward of a batch.y"]
    if loaded.shape != y.shape or not laws.close(loaded, y, 1e-6).all():
        raise Fail("A block that was loaded with load_state_dict does not do what the saved one does: PyTorch does not find all of the weights (does a layer stand in a plain list?).")
    along, nudged = outputs["gradient.along"], outputs["gradient.nudged"]
    if along.shape != (2,) or nudged.shape != (2, 4):
        raise Fail("forward gives results of another shape from call to call.")
    for got, values, where in zip(along, nudged, ("the weights", "x")):
        want = laws.directional(values, GATE_STEP)
        if abs(got - want) > 1e-3 * (1 + abs(want)):
            raise Fail(f"{'No gradient' if got == 0 else 'Not the whole gradient'} of the result reaches {where}: something is cut off from the computation graph.")


def block_inputs(rng, C, rows, shape, other):
    x = rng.standard_normal((rows, C, *shape))
    return {"noise": np.array(rng.integers(2**31)), "x": x, "c": rng.standard_normal(x.shape), "other": rng.standard_normal((2, C, *other))}


def block_residual_category(inputs, outputs):
    y, x = outputs.arrays.get("forward with weights near zero.y"), inputs["x"]
    if y is None or y.shape != x.shape or np.isfinite(y).all():
        return block_told(block_residual, inputs, outputs, None)
    return "not finite"


# --- gated_conv ------------------------------------------------------------------------------------------------------

CONV_C, SPOT_IMAGES, SPOT_SIDE = 5, 4, 5


def gated_inputs(rng):
    inputs = block_inputs(rng, CONV_C, 3, (3, 4), (5, 2))
    a, b = rng.standard_normal((2, CONV_C, 2, 3))
    bases = rng.standard_normal((SPOT_IMAGES, CONV_C, SPOT_SIDE, SPOT_SIDE))
    spots = [bases]
    for c in range(CONV_C):
        for size in (10.0, -10.0):
            changed = bases.copy()
            changed[:, c, SPOT_SIDE // 2, SPOT_SIDE // 2] += size
            spots.append(changed)
    return inputs | {"line": np.stack([a, b, (a + b) / 2]), "spots": np.concatenate(spots)}


def gated_seen(outputs):
    """Where, and in which channels, the result moves with a channel of the pixel in the middle: (C_in, C_out, side, side)."""
    y = outputs["forward of images with one changed number.y"]
    if y.shape != (SPOT_IMAGES * (1 + 2 * CONV_C), CONV_C, SPOT_SIDE, SPOT_SIDE):
        raise Fail(f"For {SPOT_IMAGES * (1 + 2 * CONV_C)} images of {CONV_C} x {SPOT_SIDE} x {SPOT_SIDE} the result has shape {y.shape}; the block keeps the shape.")
    base, *others = y.reshape(1 + 2 * CONV_C, SPOT_IMAGES, *y.shape[1:])
    return (np.abs(np.stack(others) - base) > 1e-9).reshape(CONV_C, 2, SPOT_IMAGES, *y.shape[1:]).any((1, 2))


def gated_neighbours(inputs, outputs, reference):
    seen = gated_seen(outputs)
    pixels, channels = seen.any((0, 1)), seen.any((2, 3))
    m = SPOT_SIDE // 2
    near = pixels[m - 1:m + 2, m - 1:m + 2]
    if not near.all():
        if near.sum() <= 1:
            raise Fail("A pixel of the result sees x at its own place only: a 3 x 3 convolution lets it see its neighbours.")
        raise Fail(f"A pixel should be seen by all nine of its 3 x 3 neighbourhood; here it is by {near.sum()}.")
    if not channels.all():
        i, j = np.argwhere(~channels)[0]
        raise Fail(f"Channel {j} of the result does not depend on channel {i} of x: the convolution should mix all channels.")


def gated_gate(inputs, outputs, reference):
    gate_found(inputs, outputs, "forward", "line")


def gated_bends(inputs, outputs, reference):
    """u, or the whole branch where no gate is found, at the middle of two images is not the mean of what it is at these."""
    x, y = inputs["line"], outputs["forward.y"]
    if y.shape != x.shape:
        raise Fail(f"The result has shape {y.shape} for x of shape {x.shape}; the shape should be kept.")
    try:
        u = gate_found(inputs, outputs, "forward", "line")[0]
    except Fail:
        u = y - x
    a, b, middle = u
    told = np.isfinite(a + b + middle)
    if not told.any() or (np.abs(middle - (a + b) / 2)[told] <= 1e-6 * (1 + np.abs(middle[told]))).all():
        raise Fail("What the gate multiplies is linear in x: the block needs a nonlinearity around its 3 x 3 convolution.")


def gated_features(inputs, outputs):
    try:
        seen = gated_seen(outputs)
        pixels, channels = seen.any((0, 1)).astype(int), seen.any((2, 3)).astype(int)
    except Fail as e:
        pixels = channels = e.sentence
    return {"pixels": pixels, "channels": channels, "shapes": block_told(block_shapes, inputs, outputs, None), "residual": block_residual_category(inputs, outputs),
            "gate": block_told(gated_gate, inputs, outputs, None), "bends": block_told(gated_bends, inputs, outputs, None), "gradients": block_told(block_gradients, inputs, outputs, None),
            "complaints": str(sorted(outputs.complaints().values()))}


class PlainGatedConv(nn.Module):
    """The block in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.last = self.make(channels), self.make_last(channels)

    def make(self, channels):
        return nn.Conv2d(channels, channels, 3, padding=1)

    def make_last(self, channels):
        return nn.Conv2d(channels, 2 * channels, 1)

    def hidden(self, x):
        return F.elu(self.conv(F.elu(x)))

    def split(self, h):
        return self.last(h).chunk(2, 1)

    def gated(self, u, g):
        return u * torch.sigmoid(g)

    def end(self, x, branch):
        return x + branch

    def forward(self, x):
        return self.end(x, self.gated(*self.split(self.hidden(x))))


def gated_without_gate(self, channels):
    return nn.Conv2d(channels, channels, 1)


def gated_fixed(self, channels):
    nn.Module.__init__(self)
    self.conv, self.last, self.g = self.make(channels), nn.Conv2d(channels, channels, 1), nn.Parameter(torch.randn(channels, 1, 1))


def gated_listed(self, channels):
    nn.Module.__init__(self)
    self.layers = [self.make(channels), self.make_last(channels)]


def gated_in_place(self, x):
    return x.add_(self.gated(*self.split(self.hidden(x))))


def gated_picture(inputs, outputs, reference):
    """Where one pixel is seen, and the gate of a channel."""
    figure = plotting.Picture(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, found, who in ((axes[0], reference, "reference"), (axes[1], outputs, "yours")):
        ax.set_title(f"who sees the middle: {who}", fontsize=plotting.FONT - 3)
        try:
            ax.imshow(gated_seen(found).any((0, 1)), cmap="Greys", vmin=0, vmax=1)
        except Fail:
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
    gate_panel(axes[2], inputs, outputs, "forward", "line")
    axes[0].set_xticks([]), axes[0].set_yticks([]), axes[1].set_xticks([]), axes[1].set_yticks([])
    return figure


def gate_panel(ax, inputs, outputs, step, at):
    """The branch against u, with the two lines between which a gate keeps it."""
    ax.set_title("the branch between 0 and u", fontsize=plotting.FONT - 3)
    try:
        u, gate = (v.ravel() for v in gate_found(inputs, outputs, step, at))
    except Fail:
        pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "no gate to draw")
        return
    told = np.isfinite(u)
    line = np.array([np.min(u[told]), np.max(u[told])])
    ax.plot(line, line, ":", color="black"), ax.plot(line, 0 * line, ":", color="black")
    ax.scatter(u[told], (u * gate)[told], color=plotting.PALETTE["red"], s=14)
    ax.set_xlabel("u", fontsize=plotting.FONT - 2), ax.set_ylabel("u sigmoid(g)", fontsize=plotting.FONT - 2)


def block_mistakes(base):
    """The mistakes that both blocks share, in their last two steps."""
    wrong = deviating(base)
    return (
        wrong("no_branch", "missing term", "forward", "forward returns x as it came: the branch is not added to it.", end=lambda self, x, branch: x),
        wrong("last_of_two", "missing term", "parameters", "The last layer makes two channels in all, so every channel of x gets the same branch; it needs 2 C of them.", make_last=lambda self, C: nn.Conv2d(C, 2, 1)),
        wrong("no_residual", "missing term", "forward", "The residual is missing: x is not added to the gated branch, so near zero weights nothing of x comes through.", end=lambda self, x, branch: branch),
        wrong("residual_sign", "sign", "forward", "x is subtracted from the branch; it is added.", end=lambda self, x, branch: branch - x),
        wrong("residual_twice", "extra term", "forward", "x is added twice: the branch already holds it, or the sum stands in two places.", end=lambda self, x, branch: x + (x + branch)),
        wrong("gate_tanh", "wrong function", "forward", "The gate is tanh(g), which turns signs round; sigmoid(g) lies between 0 and 1.", gated=lambda self, u, g: u * torch.tanh(g)),
        wrong("gate_no_sigmoid", "missing function", "forward", "u is multiplied by g itself: without its sigmoid nothing keeps the factor between 0 and 1.", gated=lambda self, u, g: u * g),
        wrong("gate_added", "wrong function", "forward", "u and sigmoid(g) are added; the gate multiplies u, so that it can close.", gated=lambda self, u, g: u + torch.sigmoid(g)),
        wrong("gate_divides", "sign", "forward", "u is divided by sigmoid(g); the gate multiplies, so that it can close.", gated=lambda self, u, g: u / torch.sigmoid(g)),
        wrong("gate_alone", "missing term", "forward", "Only the gate sigmoid(g) is added to x: the u that it should let through is missing.", gated=lambda self, u, g: torch.sigmoid(g)),
        wrong("gate_u_alone", "missing term", "forward", "Only u is added to x: the gate that should multiply it is missing.", gated=lambda self, u, g: u),
        wrong("gate_both_squashed", "extra term", "forward", "The sigmoid is taken of both halves; it belongs to g alone, and u stays as it is.", gated=lambda self, u, g: torch.sigmoid(u) * torch.sigmoid(g)),
        wrong("gate_of_u", "exchanged", "forward", "u gates itself, u sigmoid(u): the second half of the channels, g, is not used.", gated=lambda self, u, g: u * torch.sigmoid(u)),
        wrong("gate_detached", "detached", "gradient", "The gate is cut off from the computation graph, so it would never learn to open or close.", gated=lambda self, u, g: u * torch.sigmoid(g.detach())),
        wrong("branch_detached", "detached", "gradient", "The branch is cut off from the computation graph (detach, no_grad or numpy), so its weights would never learn.", end=lambda self, x, branch: x + branch.detach()),
        wrong("x_detached", "detached", "gradient", "The x that is added is cut off from the computation graph: layers below would learn through the branch only.", end=lambda self, x, branch: x.detach() + branch),
        wrong("returns_pair", "extra term", "forward", "forward returns two things, a log-determinant perhaps; this is a part of a net, not a flow, and returns one tensor.", end=lambda self, x, branch: (x + branch, torch.zeros(len(x)))),
    )


wrong = deviating(PlainGatedConv)
GATED_CONV = Exercise(
    id="gated_conv", title="A gated convolution", minutes=12, difficulty=2,
    hints=(
        "Nonlinearity, 3 x 3 convolution that keeps the size, nonlinearity, then a 1 x 1 convolution to twice the channels, of which one half gates the other; and x itself is added at the end.",
        "`nn.Conv2d(channels, channels, 3, padding=1)` and `nn.Conv2d(channels, 2 * channels, 1)`; `u, g = h.chunk(2, dim=1)`. In forward the branch is u times the sigmoid of g, and the result is x plus the branch.",
    ),
    inputs=gated_inputs, reference=flowkit_class("nets", "GatedConv"),
    cases=(
        Case("(B, C, H, W) to the same, for images of any size; x is left as it was", 1, block_shapes),
        Case("a residual: with weights near zero x comes through", 1, block_residual),
        Case("a pixel sees its 3 x 3 neighbourhood, and all channels", 1, gated_neighbours),
        Case("the gate: u sigmoid(g), both computed from x", 2, gated_gate),
        Case("a nonlinearity before the gate", 0.5, gated_bends),
        Case("gradients reach the weights and x", 1, block_gradients),
    ),
    misconceptions=(
        *block_mistakes(PlainGatedConv),
        wrong("no_nonlinearity", "missing function", "forward", "There is no nonlinearity around the 3 x 3 convolution: two convolutions in a row are one.", hidden=lambda self, x: self.conv(x)),
        wrong("no_padding", "missing term", "parameters", "The 3 x 3 convolution has no padding, so its result is smaller than x and cannot be added to it.", make=lambda self, C: nn.Conv2d(C, C, 3)),
        wrong("one_by_one", "wrong function", "parameters", "The first convolution is 1 x 1 as well, so no pixel sees its neighbours; it should be 3 x 3.", make=lambda self, C: nn.Conv2d(C, C, 1)),
        wrong("depthwise", "wrong function", "parameters", "The convolutions work on each channel by itself (groups): no channel sees another.", make=lambda self, C: nn.Conv2d(C, C, 3, padding=1, groups=C), make_last=lambda self, C: nn.Conv2d(C, 2 * C, 1, groups=C)),
        wrong("row_kernel", "wrong axis", "parameters", "The kernel reaches along the rows only, 1 x 3: the neighbours above and below are not seen.", make=lambda self, C: nn.Conv2d(C, C, (1, 3), padding=(0, 1))),
        wrong("last_too_narrow", "missing term", "parameters", "The last convolution makes C channels, half of them for u and half for g: it needs 2 C, so that u has the channels of x.", make_last=gated_without_gate),
        wrong("split_width", "wrong axis", "forward", "u and g are cut along the width of the image; they are halves of the channels, dimension 1.", split=lambda self, h: self.last(h).chunk(2, -1)),
        wrong("split_batch", "wrong axis", "forward", "u and g are cut along the batch; they are halves of the channels, dimension 1.", split=lambda self, h: self.last(h).chunk(2, 0)),
        wrong("fixed_gate", "wrong function", "parameters", "The gate is a parameter of its own, the same for all images and pixels; it should be computed from x, as u is.", __init__=gated_fixed, split=lambda self, h: (self.last(h), self.g + 0 * h)),
        wrong("not_registered", "type", "parameters", "The layers stand in a plain list, where PyTorch does not find their weights; use attributes or an nn.ModuleList.", __init__=gated_listed, hidden=lambda self, x: F.elu(self.layers[0](F.elu(x))), split=lambda self, h: self.layers[1](h).chunk(2, 1)),
        wrong("in_place", "in place", "input", "forward changes its input in place: the caller's x is overwritten.", forward=gated_in_place),
        wrong("nonlinearity_in_place", "in place", "input", "The first nonlinearity works in place, so x itself is overwritten, and what is added at the end is not x any more.", hidden=lambda self, x: F.elu(self.conv(F.elu(x, inplace=True)))),
        wrong("activation_at_the_end", "extra term", "forward", "A nonlinearity is applied to the sum x + branch; then x does not come through unchanged.", end=lambda self, x, branch: F.elu(x + branch)),
        wrong("residual_of_activation", "wrong function", "forward", "What is added is x after the nonlinearity, because the name x was used again; x as it came in is asked for.", end=lambda self, x, branch: F.elu(x) + branch),
        wrong("dropout_left_on", "state", "forward", "Numbers are dropped also in evaluation mode (F.dropout without `training=self.training`): the answer changes from call to call.", hidden=lambda self, x: F.dropout(F.elu(self.conv(F.elu(x))), 0.5)),
    ),
    features=gated_features, compare=("forward of a batch.y", "forward of one image.y", "forward with weights near zero.y", "gradient.along", "x after"),
    picture=gated_picture,
)


# --- gated_attention -------------------------------------------------------------------------------------------------

# In an image of a's one corner is b. Pixels inside are compared, far from it: there a last convolution of 3 x 3 would be as right as one of 1 x 1.
ATTENTION_C, ATTENTION_SHAPE, ATTENTION_AT, ATTENTION_INSIDE, ATTENTION_FAR = 4, (3, 5), (0, 0), (6, 7, 8), (7, 8)
ATTENTION_SPOT_SHAPE, ATTENTION_SPOT = (5, 7), (1, 1)      # a larger image of a's, with one b
ATTENTION_STEPS = {heads: f"forward with {heads} head{'s' * (heads > 1)}" for heads in (1, 2, 4)}


def attention_inputs(rng):
    inputs = block_inputs(rng, ATTENTION_C, 3, ATTENTION_SHAPE, (1, 5))
    H, W = ATTENTION_SHAPE
    image, (a, b) = rng.standard_normal((ATTENTION_C, H, W)), 0.4 * rng.standard_normal((2, ATTENTION_C, 1, 1))  # small, so that no gate is quite open
    mixed = a + np.zeros((ATTENTION_C, H, W))
    mixed[:, ATTENTION_AT[0], ATTENTION_AT[1]] = b[:, 0, 0]
    spots = np.repeat(image[None], 1 + H * W, 0)
    for p in range(H * W):
        spots[1 + p, :, p // W, p % W] += rng.standard_normal(ATTENTION_C)
    spot = np.zeros((1, ATTENTION_C, *ATTENTION_SPOT_SHAPE)) + a
    spot[0, :, ATTENTION_SPOT[0], ATTENTION_SPOT[1]] = b[:, 0, 0]
    return inputs | {"spot": spot, "probe": np.stack([0.4 * image, a + 0 * image, b + 0 * image, mixed]), "spots": spots}


def attention_reads(outputs):
    """[p, q]: how far the result at pixel p moves when x at pixel q does."""
    H, W = ATTENTION_SHAPE
    y = outputs["forward of images with one changed pixel.y"]
    if y.shape != (1 + H * W, ATTENTION_C, H, W):
        raise Fail(f"For {1 + H * W} images of shape {(ATTENTION_C, H, W)} the result has shape {y.shape}; the block keeps the shape.")
    return np.abs(y[1:] - y[0]).max(1).reshape(H * W, H * W).T


def attention_mixes(inputs, outputs, reference):
    moved = attention_reads(outputs) > 1e-9
    apart = ~np.eye(len(moved), dtype=bool)
    if not moved[apart].any():
        raise Fail("A pixel of the result depends on x at its own place only: attention lets it look at all pixels.")
    if not moved.all():
        p, q = np.argwhere(~moved)[0]
        W = ATTENTION_SHAPE[1]
        raise Fail("Not every pixel sees every other one: attention goes over all H W pixels, in both directions of the image and without a mask.",
                   f"the result at (h, w) = {(int(p // W), int(p % W))} does not move with x at {(int(q // W), int(q % W))}")


def attention_places(outputs, heads):
    """Whether positions have a part in it, and whether something normalises x first: then some laws below do not apply."""
    y = outputs[f"{ATTENTION_STEPS[heads]}, no biases.y"]
    if y.shape != (11, ATTENTION_C, *ATTENTION_SHAPE):
        raise Fail(f"For 11 images the result has shape {y.shape}; the block keeps the shape.")
    return np.ptp(y[8].reshape(ATTENTION_C, -1), 1).max() > 1e-9


def attention_normalised(inputs, outputs, heads):
    y, x = outputs[f"{ATTENTION_STEPS[heads]}, no biases.y"], inputs["probe"]
    if y.shape != (11, *x.shape[1:]):
        raise Fail(f"For 11 images the result has shape {y.shape}; the block keeps the shape.")
    once, twice = y[:4] - x, y[4:8] - 2 * x
    return bool(np.abs(once - twice).max() < 1e-3 * np.abs(once).max())


def attention_values(inputs, outputs, heads):
    y, x = outputs[f"{ATTENTION_STEPS[heads]}.y"], inputs["probe"]
    if y.shape != x.shape:
        raise Fail(f"The result has shape {y.shape} for x of shape {x.shape}; the block keeps the shape.")
    if np.abs(y - x).max() < 1e-9:
        raise Fail("x comes back unchanged, so there is nothing here to judge yet.")
    return y


def attention_even(inputs, outputs, reference):
    """Where all pixels are alike, so is the result: a wrong reshape of the heads mixes channels with positions, and shows here."""
    for heads in (2, 1):
        y = attention_values(inputs, outputs, heads)
        if attention_places(outputs, heads):
            continue
        flat = y[1:3].reshape(2, ATTENTION_C, -1)[..., ATTENTION_INSIDE]
        if np.ptp(flat, -1).max() > 1e-8 * (1 + np.abs(flat).max()):
            raise Fail("For an image whose pixels are all alike the result is not the same at all pixels: where the heads are cut or joined, channels and positions get mixed up (a reshape without its transpose?).")


def attention_at_home(inputs, outputs, reference):
    """What a pixel receives stands at its place: far from the one b, which asks other questions, all pixels of an image of a's are alike.

    Pixels at the border are left out, and those beside b: there a last convolution of 3 x 3 would be right too.
    """
    attention_even(inputs, outputs, reference)
    if attention_places(outputs, 2):
        return
    y = outputs["forward of one spot.y"]
    if y.shape != inputs["spot"].shape:
        raise Fail(f"For x of shape {inputs['spot'].shape} the result has shape {y.shape}; the block keeps the shape.")
    (h, w), (H, W) = ATTENTION_SPOT, ATTENTION_SPOT_SHAPE
    far = np.array([y[0, :, i, j] for i in range(1, H - 1) for j in range(1, W - 1) if max(abs(i - h), abs(j - w)) > 1])
    if np.ptp(far, 0).max() > 1e-9 * (1 + np.abs(far).max()):
        raise Fail("What a pixel receives comes out at another pixel: where the pixels become an image again, they are in another order than where the image became a row of pixels.")


def attention_used(inputs, outputs, reference):
    block_gradients(inputs, outputs, reference)
    count = outputs["weights without influence.count"]
    if count.any():
        raise Fail(f"{np.ravel(count)[0]:g} rows of the weights have no influence on the result: something that a layer makes is not used, as when q stands in the place of k, or k in that of v.")


def attention_lengths(inputs, outputs, heads):
    """How far u of the image of a's with one b has gone from u of a to u of b, for each channel that can be told, at the pixels far from the b (C', pixels).

    With one head each is the attention's weight on the b: its values are v(a) and v(b), and the last layer is affine.
    """
    attention_values(inputs, outputs, heads)
    if attention_places(outputs, heads) or attention_normalised(inputs, outputs, heads):
        return None
    u, _ = gate_found(inputs, outputs, ATTENTION_STEPS[heads], "probe")
    u = u.reshape(4, ATTENTION_C, -1)
    a, b, mixed = u[1, :, ATTENTION_FAR[0]], u[2, :, ATTENTION_FAR[0]], u[3][:, ATTENTION_FAR]
    told = np.isfinite(a + b + mixed.sum(1)) & (np.abs(b - a) > 1e-3)
    return (mixed - a[:, None])[told] / (b - a)[told][:, None]


def attention_weights(inputs, outputs, reference):
    w = attention_lengths(inputs, outputs, 1)
    if w is None or not len(w):
        return
    if np.abs(w - w[0]).max() > 1e-5 * (1 + np.abs(w).max()) or w.min() < -1e-9 or w.max() > 1 + 1e-9:
        raise Fail("With one head, what a pixel receives is no mean of the values with positive weights that sum to 1: the softmax goes over the keys, the pixels that are looked at.")
    if np.abs(w - 1 / math.prod(ATTENTION_SHAPE)).max() < 1e-9:
        raise Fail("Every pixel gets the same weight whatever is in the image; the weights should be softmax(q . k), computed from x.")


def attention_heads(inputs, outputs, reference):
    one, two = (attention_values(inputs, outputs, heads) for heads in (1, 2))
    attention_values(inputs, outputs, 4)
    if np.abs(one - two).max() < 1e-9:
        raise Fail("With 1 head and with 2 the result is the same: the number of heads changes nothing.")
    try:
        w = attention_lengths(inputs, outputs, 2)
    except Fail as e:
        if "gate" in e.sentence or "bounded" in e.sentence or "sigmoid" in e.sentence:
            return      # another case says so
        raise
    if w is not None and len(w) > 1 and np.abs(w - w[0]).max() < 1e-7:
        raise Fail("Both heads weigh the pixels alike: each head should have weights of its own, from its own part of q and k.")


def attention_gate(inputs, outputs, reference):
    for heads in (2, 1):
        u, gate = (found.reshape(4, ATTENTION_C, -1) for found in gate_found(inputs, outputs, ATTENTION_STEPS[heads], "probe"))
        if attention_places(outputs, heads):
            continue
        alike = [np.abs(t[3][:, ATTENTION_FAR] - t[1][:, ATTENTION_FAR]) for t in (u, gate)]
        told = np.isfinite(alike[0] + alike[1])
        if told.any() and alike[0][told].max() > 1e-6 and alike[1][told].max() < 1e-10:
            raise Fail("The gate at a pixel does not notice what the attention brings from the other pixels: u and g are both computed from the attention's result.")


def attention_shapes(inputs, outputs, reference):
    block_shapes(inputs, outputs, reference)
    for heads in (1, 4):
        attention_values(inputs, outputs, heads)


def attention_features(inputs, outputs):
    try:
        reads = (attention_reads(outputs) > 1e-9).astype(int)
    except Fail as e:
        reads = e.sentence
    def growth():
        """By which power of x the branch grows near zero, and whether all pixels of an image receive the same."""
        if attention_normalised(inputs, outputs, 1) or attention_places(outputs, 1):
            return "normalised, or with positions"
        y, x = outputs[f"{ATTENTION_STEPS[1]}, no biases.y"], inputs["probe"][0]
        once, twice = (np.abs(y[9 + k] - (1 + k) * 1e-4 * x).sum() for k in (0, 1))
        power = round(float(np.log2(twice / once))) if min(once, twice) > 1e-15 else "none"
        u, _ = gate_found(inputs, outputs, ATTENTION_STEPS[1], "probe")
        alike = all(np.ptp(c[np.isfinite(c)]) < 1e-6 for c in u[0] if np.isfinite(c).any())
        return f"power {power}, {'all alike' if alike else 'different'}"

    try:
        found = growth()
    except Fail as e:
        found = e.sentence
    judges = {"shapes": attention_shapes, "gate": attention_gate, "even": attention_at_home, "weights": attention_weights, "heads": attention_heads, "gradients": attention_used}
    return {k: block_told(judge, inputs, outputs, None) for k, judge in judges.items()} | {
        "growth": found, "reads": reads, "residual": block_residual_category(inputs, outputs), "complaints": str(sorted(outputs.complaints().values()))}


def attention_faults(inputs, outputs):
    """What torch says of shapes that do not fit, in the terms of the exercise: batch, channels and pixels of the images are known."""
    C, said = ATTENTION_C, " ".join(sentence for kind, sentence in outputs.complaints().values() if kind == "raised")
    of_batch, pixels = len(inputs["x"]), math.prod(ATTENTION_SHAPE)
    cut = re.search(r"shape '\[(\d+)([^\]]*)\]' is invalid for input of size (\d+)", said)
    if cut and cut[1] == str(C):
        return [("batch_and_channels", "exchanged", "forward", "The shape of x is taken apart in another order than (B, C, H, W): the batch and the channels have changed places.")]
    wanted = cut and math.prod(int(n) for n in re.findall(r"-?\d+", cut[1] + cut[2])[:12])
    if cut and wanted == 3 * C * of_batch * pixels and int(cut[3]) % (of_batch * pixels) == 0:
        made = int(cut[3]) // (of_batch * pixels)
        return [("first_width", "missing term" if made in (3, C) else "wrong function", "parameters", f"The first layer makes {made} channel{'s' * (made > 1)} of {C}; q, k and v need as many as x each, 3 C together.")]
    if re.search(r"size of tensor a \(\d+\) must match the size of tensor b \(\d+\) at non-singleton dimension 1\b", said) and not cut:
        return [("last_width", "wrong function", "parameters", "The last layer does not make 2 C channels, of which u and g take C each: what is added to x, or u and g themselves, differ in their channels.")]
    return []


def attention_picture(inputs, outputs, reference):
    """Which pixel moves with which, and the gate."""
    figure = plotting.Picture(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, found, who in ((axes[0], reference, "reference"), (axes[1], outputs, "yours")):
        ax.set_title(f"who reads whom: {who}", fontsize=plotting.FONT - 3)
        try:
            reads = attention_reads(found)
            off = reads * (1 - np.eye(len(reads)))
            ax.imshow(off / max(off.max(), 1e-12), cmap="Greys", vmin=0, vmax=1)
            ax.set_xlabel("x at pixel q", fontsize=plotting.FONT - 2), ax.set_ylabel("result at pixel p", fontsize=plotting.FONT - 2)
        except Fail:
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
        ax.set_xticks([]), ax.set_yticks([])
    gate_panel(axes[2], inputs, outputs, ATTENTION_STEPS[2], "probe")
    return figure


class PlainGatedAttention(nn.Module):
    """The block in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.last = nn.Conv2d(channels, 3 * channels, 1), self.make_last(channels)

    def make_last(self, channels):
        return nn.Conv2d(channels, 2 * channels, 1)

    def cut(self, t):
        """(B, C, H W) to (B, heads, H W, d)."""
        return t.unflatten(1, (self.heads, -1)).transpose(2, 3)

    def three(self, x):
        return [self.cut(t) for t in self.qkv(x).flatten(2).chunk(3, 1)]

    def scores(self, q, k):
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])

    def weights(self, s):
        return torch.softmax(s, -1)

    def attend(self, q, k, v):
        return self.weights(self.scores(q, k)) @ v

    def joined(self, out, x):
        return out.transpose(2, 3).flatten(1, 2).unflatten(-1, x.shape[2:])

    def split(self, h):
        return self.last(h).chunk(2, 1)

    def gated(self, u, g):
        return u * torch.sigmoid(g)

    def end(self, x, branch):
        return x + branch

    def forward(self, x):
        return self.end(x, self.gated(*self.split(self.joined(self.attend(*self.three(x)), x))))


def attention_listed(self, channels, heads):
    nn.Module.__init__(self)
    self.heads = heads
    self.layers = [nn.Conv2d(channels, 3 * channels, 1), self.make_last(channels)]


def attention_rows(self, x):
    """Attention along the rows of the image only."""
    B, C, H, W = x.shape
    q, k, v = (t.permute(0, 2, 3, 1).unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.qkv(x).chunk(3, 1))
    out = self.attend(q, k, v).transpose(2, 3).flatten(3).permute(0, 3, 1, 2)
    return self.end(x, self.gated(*self.split(out)))


def attention_causal(self, s):
    return torch.softmax(s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf), -1)


def attention_over_batch(self, x):
    """Attention among the images of the batch at each pixel."""
    q, k, v = (self.qkv(x).permute(2, 3, 0, 1).chunk(3, -1))
    out = self.attend(q, k, v).permute(2, 3, 0, 1)
    return self.end(x, self.gated(*self.split(out)))


def attention_over_channels(self, x):
    """Attention among the channels: (C, C) weights."""
    q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
    out = self.attend(q, k, v).unflatten(-1, x.shape[2:])
    return self.end(x, self.gated(*self.split(out)))


def attention_mean_scores(self, q, k):
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return s.mean(1, keepdim=True).expand_as(s)


wrong = deviating(PlainGatedAttention)
GATED_ATTENTION = Exercise(
    id="gated_attention", title="Gated self-attention among pixels", minutes=20, difficulty=4,
    hints=(
        "The pixels are the H W positions of a sequence, the channels their features. A 1 x 1 convolution makes q, k and v; each head takes C / heads of the channels. After attention the pixels become an image again, and the end is that of `GatedConv`.",
        "From (B, C, H W) go to (B, heads, H W, C / heads): first split the channels into heads, then transpose; a reshape alone would mix channels with positions. `softmax(q @ k.transpose(-1, -2) / sqrt(d), -1) @ v`, or `F.scaled_dot_product_attention`, and the same two steps back.",
    ),
    inputs=attention_inputs, reference=flowkit_class("nets", "GatedAttention"),
    cases=(
        Case("(B, C, H, W) to the same, for images of any size; x is left as it was", 1, attention_shapes),
        Case("a residual: with weights near zero x comes through", 1, block_residual),
        Case("every pixel sees every other", 1, attention_mixes),
        Case("the heads are cut and joined without mixing channels and positions", 1, attention_at_home),
        Case("weights that sum to 1 over the pixels looked at, computed from x", 1.5, attention_weights),
        Case("each head has weights of its own", 1, attention_heads),
        Case("the gate: u sigmoid(g), both computed from x", 1, attention_gate),
        Case("gradients reach the weights and x", 0.5, attention_used),
    ),
    misconceptions=(
        *block_mistakes(PlainGatedAttention),
        wrong("heads_reshaped", "wrong axis", "forward", "The heads are cut out, or joined again, by a reshape alone, (B, C, H W) to (B, heads, H W, d) or back: that mixes channels with positions; a transpose must come in between.", cut=lambda self, t: t.reshape(len(t), self.heads, t.shape[2], -1)),
        wrong("heads_ignored", "missing function", "forward", "`heads` is not used: there is one attention over all channels, whatever their number.", cut=lambda self, t: t[:, None].transpose(2, 3)),
        wrong("heads_alike", "wrong function", "forward", "The scores of the heads are averaged, so all heads weigh the pixels alike; each needs weights of its own.", scores=attention_mean_scores),
        wrong("softmax_queries", "wrong axis", "forward", "The softmax goes over the queries; over the keys, the last dimension, the weights of one pixel must sum to 1.", weights=lambda self, s: torch.softmax(s, -2)),
        wrong("softmax_heads", "wrong axis", "forward", "The softmax goes over the heads instead of over the keys, so the weights of one pixel do not sum to 1.", weights=lambda self, s: torch.softmax(s, 1)),
        wrong("no_softmax", "missing function", "forward", "The scores themselves are used as weights: the softmax is missing.", weights=lambda self, s: s),
        wrong("uniform", "missing term", "forward", "All pixels get the same weight, as if q and k were not used: this is a mean over the image.", weights=lambda self, s: torch.softmax(0 * s, -1)),
        wrong("no_attention", "missing function", "forward", "v goes on as it is: attention itself is missing, so no pixel sees another one.", attend=lambda self, q, k, v: v),
        wrong("rows_only", "wrong axis", "forward", "Attention goes along the rows of the image only; all H W pixels should be in one sequence.", forward=attention_rows),
        wrong("causal", "extra term", "forward", "There is a causal mask; here nothing is generated in order, and every pixel sees all others.", weights=attention_causal),
        wrong("over_batch", "wrong axis", "forward", "Attention goes over the images of the batch (which dimension stands where in nn.MultiheadAttention?); it goes over the pixels of one image.", forward=attention_over_batch),
        wrong("over_channels", "wrong axis", "forward", "Attention goes over the channels, as if they were the positions: q and k want a transpose, (B, heads, H W, d).", forward=attention_over_channels),
        wrong("split_width", "wrong axis", "forward", "u and g are cut along the width of the image; they are halves of the channels, dimension 1.", split=lambda self, h: self.last(h).chunk(2, -1)),
        wrong("last_too_narrow", "missing term", "parameters", "The last convolution makes C channels, half of them for u and half for g: it needs 2 C, so that u has the channels of x.", make_last=lambda self, C: nn.Conv2d(C, C, 1)),
        wrong("sides_exchanged", "exchanged", "forward", "Height and width have changed places where the pixels become an image again.", joined=lambda self, out, x: out.transpose(2, 3).flatten(1, 2).reshape(*x.shape[:2], x.shape[3], x.shape[2])),
        wrong("not_registered", "type", "parameters", "The layers stand in a plain list, where PyTorch does not find their weights; use attributes or an nn.ModuleList.", __init__=attention_listed, three=lambda self, x: [self.cut(t) for t in self.layers[0](x).flatten(2).chunk(3, 1)], split=lambda self, h: self.layers[1](h).chunk(2, 1)),
        wrong("in_place", "in place", "input", "forward changes its input in place: the caller's x is overwritten.", end=lambda self, x, branch: x.add_(branch)),
    ),
    features=attention_features, compare=("forward of a batch.y", "forward of one image.y", "forward with 1 head.y", "forward with weights near zero.y", "gradient.along", "x after"),
    faults=attention_faults, picture=attention_picture,
)


def image_expect(name, got, want, tol=None, why=""):
    """Equality of a student's tensor of images with the judge's; Fail names the first entry that differs."""
    if got.shape != want.shape:
        raise Fail(f"`{name}` has shape {got.shape}; it should be {want.shape}.")
    wrong = ~laws.close(got, want, laws.tolerance(got) if tol is None else tol)
    if wrong.any():
        i = tuple(int(k[0]) for k in np.nonzero(wrong))
        raise Fail(f"`{name}` is not what it should be{why}.", f"at {list(i)}: {laws.expected(want[i], got[i])}")


# --- variational_dequantization --------------------------------------------------------------------------------------

DEQ_LEVELS = {"D=6 ": 17, "D=12 ": 5}


def deq_inputs(rng):
    inputs = {}
    for prefix, shape in DEQ_SHAPES.items():
        K, D = DEQ_LEVELS[prefix], math.prod(shape)
        x, cell = rng.integers(0, K, (2, B, *shape))
        x.flat[:2] = cell.flat[:2] = 0, K - 1
        v, u = 1.5 * rng.standard_normal((B, *shape)), rng.uniform(0.02, 0.98, (B, *shape))
        log_q = rng.standard_normal(B)
        log_q[:2] -= D * (math.log(K) + 2)      # contributions near 0 too, for which exp of one is no rounding error
        mine = {"x": x, "v": v, "log_q": log_q, "levels": np.array(K), "y": (cell + rng.uniform(0.1, 0.9, cell.shape)) / K,
                "far v": np.where(rng.random(v.shape) < 0.5, 1, -1) * rng.uniform(40, 300, v.shape), "far log_q": rng.standard_normal(B),
                "uniform v": np.log(u / (1 - u)), "uniform log_q": np.log(u * (1 - u)).reshape(B, D).sum(1),
                "c": rng.standard_normal(v.shape), "r": rng.standard_normal(B)}
        inputs |= {prefix + k: a for k, a in mine.items()}
    return inputs | deq_training(rng)


def deq_training(rng):
    """A density on the line with cells of uneven mass, and the integers with normal points at the middles of equal shares: training without chance."""
    K, inputs = BOUND_LEVELS, {}
    while not inputs or bound_of_uniform(inputs) > np.log(bound_mass(inputs, np.arange(K))).mean() - BOUND_GAP:
        inputs = {"density.weights": rng.dirichlet(3 * np.ones(3)), "density.means": rng.uniform(0.2, K - 0.2, 3), "density.scales": rng.uniform(0.35, 0.7, 3)}
    shares = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(16.0) + 0.5) / 16).numpy().astype(float)
    train = {"x grid": np.repeat(np.arange(K), 16), "eps grid": np.tile(shares, K), "K": np.array(K), "rate": np.array(0.1), "steps": np.array(40)}
    return inputs | {f"train.{k}": a.reshape(-1, 1, 1, 1) if k.endswith("grid") else a for k, a in train.items()}


def deq_sigmoid(v):
    return np.exp(-np.logaddexp(0, -v))


def deq_right(inputs, prefix, name="", turn=0):
    """y and contribution, when q gives the rows that begin `turn` further on."""
    K, x = int(inputs[prefix + "levels"]), inputs[prefix + "x"]
    v, log_q = (np.roll(inputs[prefix + name + k], -turn, 0) for k in ("v", "log_q"))
    log_slope = -(np.logaddexp(0, -v) + np.logaddexp(0, v)).reshape(B, -1).sum(1)
    return (x + deq_sigmoid(v)) / K, log_slope - log_q - math.log(K) * x[0].size


deq_each = every_size(DEQ_SHAPES)


def deq_asked(outputs, prefix):
    if prefix + "asked" in outputs and int(outputs[prefix + "asked"]) > 1:
        raise Fail(f"q is asked {int(outputs[prefix + 'asked'])} times in one forward; it draws, so v and log_q must come from one and the same call.")


def deq_place(inputs, outputs, prefix):
    y = outputs[prefix + "forward.y"]
    deq_asked(outputs, prefix)
    image_expect("y", y, deq_right(inputs, prefix)[0], why=f", (x + sigmoid(v)) / levels with levels = {DEQ_LEVELS[prefix]}")


def deq_paid(inputs, outputs, prefix):
    paid = outputs[prefix + "forward.contribution"]
    deq_asked(outputs, prefix)
    laws.expect("contribution", inputs[prefix + "x"].reshape(B, -1), paid, deq_right(inputs, prefix)[1], why=", -log q(u | x) - D log levels")


def deq_uniform(inputs, outputs, prefix):
    """If v is logistic, u is uniform and log q(u | x) = 0, whatever was drawn."""
    paid = outputs[prefix + "forward with a uniform q.contribution"]
    want = np.full(B, -math.log(DEQ_LEVELS[prefix]) * math.prod(DEQ_SHAPES[prefix]))
    laws.expect("contribution", inputs[prefix + "x"].reshape(B, -1), paid, want, why=": this v is logistic, so u is uniform on (0, 1), log q(u | x) is 0, and what remains is uniform dequantization's")


def deq_far(inputs, outputs, prefix):
    deq_paid(inputs, outputs, prefix)
    y, paid = (outputs[f"{prefix}forward far out.{k}"] for k in ("y", "contribution"))
    want = deq_right(inputs, prefix, "far ")
    image_expect("y", y, want[0], why=" for v far from 0")
    laws.expect("contribution", inputs[prefix + "x"].reshape(B, -1), paid, want[1], why=" for v far from 0")


def deq_inverse(inputs, outputs, prefix):
    y, x = inputs[prefix + "y"], inputs[prefix + "x"]
    image_expect("x", outputs[prefix + "inverse.x"], np.floor(y * DEQ_LEVELS[prefix]), 0, " from inverse: it is the cell of y")
    image_expect("x", outputs[prefix + "inverse of forward.x"], x, 0, " from inverse(forward(x))")


def deq_kept(inputs, outputs, prefix):
    deq_place(inputs, outputs, prefix), deq_inverse(inputs, outputs, prefix)
    for key, given in (("x after", "x"), ("y after", "y")):
        if not np.array_equal(outputs[prefix + key], inputs[prefix + given]):
            raise Fail(f"{'forward' if given == 'x' else 'inverse'} changed its input `{given}` in place: the caller's tensor was overwritten.")
    for name, want in zip(("y", "contribution"), deq_right(inputs, prefix)):
        image_expect(name, outputs[f"{prefix}forward of one row.{name}"], want[:1], why=" for a batch of one row")
    for name, want in zip(("y", "contribution"), deq_right(inputs, prefix, turn=1)):
        image_expect(name, outputs[f"{prefix}forward again.{name}"], want, why=" in a second call, for which q draws anew")
    image_expect("x", outputs[prefix + "inverse of one row.x"], np.floor(inputs[prefix + "y"][:1] * DEQ_LEVELS[prefix]), 0, " from inverse for a batch of one row")


def deq_gradient(inputs, outputs, reference):
    for prefix in DEQ_SHAPES:
        outputs[prefix + "forward.contribution"]
        u, c, r = deq_sigmoid(inputs[prefix + "v"]), inputs[prefix + "c"], inputs[prefix + "r"]
        want = {"v": c * u * (1 - u) / DEQ_LEVELS[prefix] + r[:, None, None, None] * (1 - 2 * u), "log_q": -r}
        for name in want:
            got = outputs[f"{prefix}gradient.{name}"]
            if not laws.close(got, want[name], 1e-3).all():
                how = "Not the right gradient" if got.any() else "No gradient"
                raise Fail(f"{how} of y and contribution reaches `{name}`, so q could not be trained.")
    if not outputs["parameters.found"]:
        raise Fail("parameters() of your layer does not give the weights of `q`, so an optimiser would never move them.")


def deq_trained(inputs, outputs, reference):
    learnt, uniform = bound_means(inputs, outputs["training.weights of q"])
    most = np.log(bound_mass(inputs, np.arange(BOUND_LEVELS))).mean()
    if not learnt >= uniform + 0.3 * (most - uniform):
        raise Fail("A q trained through your layer is hardly better than uniform noise.", f"after {int(inputs['train.steps'])} steps {learnt:.3f} nats, uniform noise {uniform:.3f}, log P(x) {most:.3f}")


class PlainDequantizer(nn.Module):
    """The layer in its plainest form, in which a mistake changes one part."""

    def __init__(self, q, levels):
        super().__init__()
        self.q, self.levels = q, levels

    def ask(self, x):
        return self.q(x)

    def squash(self, v):
        return torch.sigmoid(v)

    def put(self, x, u):
        return (x + u) / self.levels

    def log_slope(self, v):
        return (F.logsigmoid(v) + F.logsigmoid(-v)).sum((1, 2, 3))

    def size(self, x):
        return x[0].numel()

    def cell(self, x):
        return self.size(x) * math.log(self.levels)

    def paid(self, x, v, log_q):
        return self.log_slope(v) - log_q - self.cell(x)

    def forward(self, x):
        v, log_q = self.ask(x)
        return self.put(x, self.squash(v)), self.paid(x, v, log_q)

    def inverse(self, y):
        return torch.floor(y * self.levels).long()


def deq_twice(self, x):
    return self.q(x)[0], self.q(x)[1]


def deq_naive(self, v):
    u = torch.sigmoid(v)
    return (torch.log(u) + torch.log(1 - u)).sum((1, 2, 3))


def deq_hidden(self, q, levels):
    nn.Module.__init__(self)
    self.proposals, self.levels = [q], levels


def deq_stored(self, x):
    if not hasattr(self, "noise"):
        self.noise = self.q(x)
    return self.noise


def deq_picture(inputs, outputs, reference):
    """Where y lies in its cell, over v; and the contributions, yours against the reference's."""
    figure, axes = plotting.side_by_side(2, ("where y lies in its cell", "contribution"), size=4.2)
    prefix = "D=6 "
    v, x, K = inputs[prefix + "v"], inputs[prefix + "x"], DEQ_LEVELS[prefix]
    order = np.argsort(v.ravel())
    axes[0].plot(v.ravel()[order], (K * reference.arrays[prefix + "forward.y"] - x).ravel()[order], color=plotting.PALETTE["black"], alpha=0.4, linewidth=4, label="reference")
    want = reference.arrays[prefix + "forward.contribution"]
    axes[1].plot([want.min(), want.max()], [want.min(), want.max()], color=plotting.PALETTE["black"], alpha=0.4, linewidth=4, label="reference")
    y, paid = (outputs.arrays.get(f"{prefix}forward.{k}") for k in ("y", "contribution"))
    missing = "yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw"
    for ax, good, at, values in ((axes[0], y is not None and y.shape == v.shape and np.isfinite(y).all(), v.ravel(), None if y is None or y.shape != v.shape else (K * y - x).ravel()),
                                 (axes[1], paid is not None and paid.shape == want.shape and np.isfinite(paid).all(), want, paid)):
        ax.plot(at if good else [], values if good else [], "o" if good else " ", markersize=4, color=plotting.PALETTE["red"], label="yours" if good else missing)
        ax.legend(fontsize=plotting.FONT - 3, frameon=False)
    axes[0].set_xlabel("v", fontsize=plotting.FONT), axes[0].set_ylabel("levels y - x", fontsize=plotting.FONT)
    axes[1].set_xlabel("reference", fontsize=plotting.FONT), axes[1].set_ylabel("yours", fontsize=plotting.FONT)
    return figure


def deq_faults(inputs, outputs):
    """By what Python and torch say when things are mixed up."""
    raised = [(step.split(" ", 1)[-1], sentence) for step, (kind, sentence) in outputs.complaints().items() if kind == "raised"]
    for way in ("forward", "inverse"):
        said = " ".join(sentence for step, sentence in raised if step.startswith(way))
        for pattern, *faults in DEQ_RAISED[way]:
            if re.search(pattern, said):
                return faults
    return []


DEQ_ROWS_AND_NUMBERS = rf"tensor a \(({B}|6)\) must match the size of tensor b \(({B}|6)\) at non-singleton dimension "
DEQ_RAISED = {
    "forward": (
        (r"'int' object is not callable", ("q_and_levels", "exchanged", "parameters", "What is called as q is the integer `levels`: the two have changed places where the layer is made.")),
        (r"range of \[-1, 0\], but got 1",
         ("q_exchanged", "exchanged", "forward", "v and log_q are taken from q in the wrong order: q(x) gives (v, log_q), and it is log_q that has one number for each image."),
         ("log_q_summed", "reduction", "ldj", "Or else log_q is summed over an image: it is the log-density of the whole image already.")),
        (DEQ_ROWS_AND_NUMBERS + "1", ("slope_per_number", "shape", "ldj", "The log-slopes are still one for each number of an image where `contribution` has one for each image: their sum is missing.")),
        (DEQ_ROWS_AND_NUMBERS + "0", ("slope_over_batch", "wrong axis", "ldj", "The log-slopes are summed over the batch; the sum goes over the numbers of each image.")),
        (r"^forward of one row \(with D = 6\) raised IndexError: index 1 is out of bounds for dimension 0 with size 1",
         ("second_row", "off by one", "ldj", "The size of an image is read off the second row, x[1]; a batch may have one row only.")),
    ),
    "inverse": (
        (r"'int' object has no attribute 'floor'|floor\(\).* must be Tensor, not int", ("y_missing", "missing term", "inverse", "In inverse the floor is taken of `levels` alone: y is missing.")),
    ),
}

wrong = deviating(PlainDequantizer)
DEQ = Exercise(
    id="variational_dequantization", title="Variational dequantization", minutes=15, difficulty=3,
    hints=(
        "q gives v on the whole line and log_q, the log-density of v. The noise that is added is u = sigmoid(v), and the contribution needs the log-density of u: what does the change of variables from v to u do to log_q?",
        "log q(u | x) = log_q - sum of log sigmoid'(v) over all numbers of an image, and sigmoid'(v) = sigmoid(v) sigmoid(-v), whose logarithm `logsigmoid` gives for any v. The contribution subtracts that, and D log levels with D = C H W, once for each image.",
    ),
    inputs=deq_inputs, reference=flowkit_class("dequantization", "VariationalDequantizer"),
    cases=(
        Case("y = (x + sigmoid(v)) / levels", 1, deq_each(deq_place)),
        Case("contribution = -log q(u | x) - D log levels, (B,)", 2.5, deq_each(deq_paid)),
        Case("a logistic v makes it uniform dequantization", 0.5, deq_each(deq_uniform)),
        Case("finite for v far from 0", 0.5, deq_each(deq_far)),
        Case("inverse floors back to integers", 1, deq_each(deq_inverse)),
        Case("fresh noise in each call, one row alone, inputs left as they were", 0.5, deq_each(deq_kept)),
        Case("gradients reach v and log_q, and the weights of q are found", 1, deq_gradient),
        Case("a q trained through the layer is better than uniform noise", 1, deq_trained),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainDequantizer, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` has the wrong sign as a whole: log q(u | x) and D log levels are both subtracted from log p(y).",
                              paid_zero="`contribution` is zero everywhere: the noise that q draws has to be paid for, and the cells that shrink too."),
        wrong("log_q_sign", "sign", "ldj", "`contribution` adds log_q; the bound divides by q(u | x), so its logarithm is subtracted.", paid=lambda self, x, v, log_q: self.log_slope(v) + log_q - self.cell(x)),
        wrong("no_log_q", "missing term", "ldj", "`contribution` lacks log_q, the log-density of v: the noise is not uniform, and how likely it was has to be subtracted.", paid=lambda self, x, v, log_q: self.log_slope(v) - self.cell(x)),
        wrong("no_log_slope", "missing term", "ldj", "`contribution` takes log_q for the log-density of u; it is that of v, and the sigmoid between them squeezes space.", paid=lambda self, x, v, log_q: -log_q - self.cell(x)),
        wrong("log_slope_sign", "sign", "ldj", "The log-slope of the sigmoid has the wrong sign: q(u | x) = q(v | x) / sigmoid'(v), and the contribution is minus its logarithm.", paid=lambda self, x, v, log_q: -self.log_slope(v) - log_q - self.cell(x)),
        wrong("both_signs", "sign", "ldj", "log q(u | x) is added: log_q and the log-slope of the sigmoid both have the wrong sign.", paid=lambda self, x, v, log_q: -self.log_slope(v) + log_q - self.cell(x)),
        wrong("no_cell", "missing term", "ldj", "`contribution` lacks -D log levels: y = (x + u) / levels shrinks every cell, and that must be counted.", paid=lambda self, x, v, log_q: self.log_slope(v) - log_q),
        wrong("cell_sign", "sign", "ldj", "D log levels is added; the mass of a cell is its density times levels^-D, so it is subtracted.", paid=lambda self, x, v, log_q: self.log_slope(v) - log_q + self.cell(x)),
        wrong("one_dimension", "missing term", "ldj", "`contribution` has log levels once; each of the D = C H W numbers shrinks by it.", size=lambda self, x: 1),
        wrong("channels_only", "wrong axis", "ldj", "`contribution` counts the channels only; D is C H W, all numbers of an image.", size=lambda self, x: x.shape[1]),
        wrong("width_only", "wrong axis", "ldj", "`contribution` counts the last dimension only; D is C H W, all numbers of an image.", size=lambda self, x: x.shape[-1]),
        wrong("pixels_only", "missing term", "ldj", "`contribution` counts pixels, H W; D is C H W, all numbers of an image.", size=lambda self, x: x.shape[2] * x.shape[3]),
        wrong("batch_counted", "reduction", "ldj", "D counts the batch too (x.numel()); it is C H W, the numbers of one image.", size=lambda self, x: x.numel()),
        wrong("levels_256", "constant", "ldj", "`contribution` takes 256 levels; how many there are is in `levels`, and digits have 17.", cell=lambda self, x: x[0].numel() * math.log(256)),
        wrong("levels_256_both", "constant", "forward", "256 stands where `levels` belongs; how many there are is given, and digits have 17.", put=lambda self, x, u: (x + u) / 256, cell=lambda self, x: x[0].numel() * math.log(256), inverse=lambda self, y: torch.floor(256 * y).long()),
        wrong("levels_less", "off by one", "ldj", "`contribution` has log(levels - 1); there are `levels` cells.", cell=lambda self, x: x[0].numel() * math.log(self.levels - 1)),
        wrong("cell_bits", "constant", "ldj", "D log2(levels) is in bits; all is in nats here.", cell=lambda self, x: x[0].numel() * math.log2(self.levels)),
        wrong("cell_no_log", "missing function", "ldj", "`contribution` has D levels where D log(levels) belongs.", cell=lambda self, x: float(x[0].numel() * self.levels)),
        wrong("half_slope", "missing term", "ldj", "The sigmoid's slope is sigmoid(v) (1 - sigmoid(v)); only one of the two factors is there.", log_slope=lambda self, v: F.logsigmoid(v).sum((1, 2, 3))),
        wrong("other_half_slope", "missing term", "ldj", "The sigmoid's slope is sigmoid(v) (1 - sigmoid(v)); only the second factor is there.", log_slope=lambda self, v: F.logsigmoid(-v).sum((1, 2, 3))),
        wrong("slope_no_log", "missing function", "ldj", "The slope of the sigmoid is added itself; its logarithm is what log-densities change by.", log_slope=lambda self, v: (torch.sigmoid(v) * torch.sigmoid(-v)).sum((1, 2, 3))),
        wrong("slope_of_u", "wrong function", "ldj", "The slope of the sigmoid is taken at u = sigmoid(v) instead of at v: the sigmoid is applied twice.", log_slope=lambda self, v: PlainDequantizer.log_slope(self, torch.sigmoid(v))),
        wrong("slope_mean", "reduction", "ldj", "The log-slopes are averaged over an image; the log-density of u takes their sum.", log_slope=lambda self, v: (F.logsigmoid(v) + F.logsigmoid(-v)).mean((1, 2, 3))),
        wrong("slope_over_all", "reduction", "ldj", "The log-slopes are summed over the whole batch; every image has its own sum.", log_slope=lambda self, v: (F.logsigmoid(v) + F.logsigmoid(-v)).sum()),
        wrong("slope_unsummed", "shape", "ldj", "The log-slopes are summed over one dimension only, so `contribution` is no (B,): the sum goes over C, H and W.", paid=lambda self, x, v, log_q: (F.logsigmoid(v) + F.logsigmoid(-v)).sum(-1) - log_q[:, None, None] - self.cell(x)),
        wrong("slope_overflows", "wrong function", "ldj", "log(u) + log(1 - u) is infinite where sigmoid(v) rounds to 1; `logsigmoid` of v and of -v is finite for any v.", log_slope=deq_naive),
        wrong("no_sigmoid", "missing function", "forward", "forward adds v itself; it lives on the whole line, and the noise u = sigmoid(v) in its cell.", squash=lambda self, v: v),
        wrong("tanh", "wrong function", "forward", "The noise is squashed by tanh, to (-1, 1); a cell reaches from x to x + 1, and sigmoid goes to (0, 1).", squash=lambda self, v: torch.tanh(v)),
        wrong("centred", "extra term", "forward", "1/2 is taken off the noise; a cell reaches from x to x + 1, and x = floor(levels y).", squash=lambda self, v: torch.sigmoid(v) - 0.5),
        wrong("noise_taken_off", "sign", "forward", "The noise is subtracted, so y lies in the cell before that of x.", put=lambda self, x, u: (x - u) / self.levels),
        wrong("no_noise", "missing term", "forward", "`y` is x / levels: no noise is added.", put=lambda self, x, u: x / self.levels + 0 * u),
        wrong("noise_alone", "missing term", "forward", "`y` is the noise alone, divided by levels: x is missing.", put=lambda self, x, u: u / self.levels),
        wrong("not_divided", "missing function", "forward", "`y` is x + u: it is not divided by levels, though `contribution` counts the division.", put=lambda self, x, u: x + u),
        wrong("noise_not_divided", "order", "forward", "x is divided by levels, and the noise added in its full width; both are divided.", put=lambda self, x, u: x / self.levels + u),
        wrong("noise_alone_divided", "order", "forward", "Only the noise is divided by levels (a pair of brackets is missing).", put=lambda self, x, u: x + u / self.levels),
        wrong("divided_by_less", "off by one", "forward", "x + u is divided by levels - 1, so that the last cell lies beyond 1.", put=lambda self, x, u: (x + u) / (self.levels - 1)),
        wrong("uniform_noise", "wrong function", "forward", "The noise is uniform, whatever q draws: y is made of torch.rand, and what q learns has no effect on it.", squash=lambda self, v: torch.rand_like(v)),
        wrong("asked_twice", "state", "forward", "q is asked twice, once for v and once for log_q; it draws anew each time, so log_q belongs to another v.", ask=deq_twice),
        wrong("q_exchanged", "exchanged", "forward", "v and log_q are taken from q in the wrong order: q(x) gives (v, log_q).", ask=lambda self, x: self.q(x)[::-1]),
        wrong("noise_stored", "state", "state", "The noise is drawn once and kept for later calls; each call draws anew.", ask=deq_stored),
        wrong("inverse_rounds", "wrong function", "inverse", "inverse rounds to the nearest integer; the cell of x reaches from x to x + 1, so it is rounded down.", inverse=lambda self, y: torch.round(y * self.levels).long()),
        wrong("inverse_ceil", "wrong function", "inverse", "inverse rounds up; the cell of x reaches from x to x + 1, so it is rounded down.", inverse=lambda self, y: torch.ceil(y * self.levels).long()),
        wrong("inverse_no_floor", "missing function", "inverse", "inverse gives levels * y with its noise; floor takes the noise off.", inverse=lambda self, y: y * self.levels),
        wrong("inverse_not_multiplied", "missing term", "inverse", "inverse gives 0 everywhere: y lies between 0 and 1, so it is multiplied by levels before the floor is taken.", inverse=lambda self, y: torch.floor(y).long()),
        wrong("inverse_below_0", "missing term", "inverse", "inverse gives -1 everywhere: it is held below -1, and levels is missing in that bound.", inverse=lambda self, y: torch.floor(y * self.levels).clamp(0, -1).long()),
        wrong("inverse_bound_sign", "sign", "inverse", "inverse gives 1 - levels everywhere: the bound under which it is held has the wrong sign.", inverse=lambda self, y: torch.floor(y * self.levels).clamp(0, 1 - self.levels).long()),
        wrong("inverse_all_last", "wrong function", "inverse", "inverse gives the last integer, levels - 1, everywhere: y is added to levels or divides it, where the two are multiplied.", inverse=lambda self, y: torch.floor(self.levels + y).clamp(0, self.levels - 1).long()),
        wrong("inverse_added", "wrong function", "inverse", "inverse adds levels to y; they are multiplied.", inverse=lambda self, y: torch.floor(self.levels + y).long()),
        wrong("inverse_quotient", "wrong function", "inverse", "inverse divides levels by y; they are multiplied.", inverse=lambda self, y: torch.floor(self.levels / y).long()),
        wrong("inverse_less", "off by one", "inverse", "inverse multiplies by levels - 1; there are `levels` cells.", inverse=lambda self, y: torch.floor(y * (self.levels - 1)).long()),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns y as it came.", inverse=lambda self, y: y),
        wrong("inverse_forward", "direction", "inverse", "inverse does what forward does; it should take the noise off.", inverse=lambda self, y: self.forward(y)[0]),
        wrong("v_detached", "detached", "gradient", "v is cut off from the computation graph, so q learns from log_q alone, and never where the density is high.", forward=lambda self, x: (lambda v, log_q: (self.put(x, self.squash(v.detach())), self.paid(x, v.detach(), log_q)))(*self.q(x))),
        wrong("y_detached", "detached", "gradient", "`y` is cut off from the computation graph, so q never learns where the density is high.", put=lambda self, x, u: PlainDequantizer.put(self, x, u.detach())),
        wrong("all_detached", "detached", "gradient", "What q returns is cut off from the computation graph (detach or no_grad), so q could not be trained.", ask=lambda self, x: tuple(t.detach() for t in self.q(x))),
        wrong("log_q_detached", "detached", "gradient", "log_q is cut off from the computation graph, so nothing tells q to stay spread out.", paid=lambda self, x, v, log_q: PlainDequantizer.paid(self, x, v, log_q.detach())),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so q would not feel what its noise costs.", paid=lambda self, x, v, log_q: PlainDequantizer.paid(self, x, v, log_q).detach()),
        wrong("slope_detached", "detached", "gradient", "The log-slope of the sigmoid is cut off from the computation graph, so q would not feel it.", log_slope=lambda self, v: PlainDequantizer.log_slope(self, v.detach())),
        wrong("q_hidden", "state", "parameters", "The layer keeps q where PyTorch does not find its weights (in a plain list or a function), so an optimiser would never move them.", __init__=deq_hidden, ask=lambda self, x: self.proposals[0](x)),
        wrong("returns_exchanged", "exchanged", "forward", "forward returns `contribution` first and `y` second; the order is (y, contribution).", forward=lambda self, x: PlainDequantizer.forward(self, x)[::-1]),
        wrong("only_y", "missing term", "forward", "forward returns `y` alone; `contribution` belongs to it.", forward=lambda self, x: PlainDequantizer.forward(self, x)[0]),
    ),
    compare=(*(p + k for p in DEQ_SHAPES for k in ("forward.y", "forward.contribution", "forward far out.contribution", "forward again.y", "inverse.x", "gradient.v", "gradient.log_q", "x after")), "parameters.found"),
    light=lambda inputs: {k: v for k, v in inputs.items() if not k.startswith("D=12 ")}, faults=deq_faults, picture=deq_picture,
)


# --- factor_out ------------------------------------------------------------------------------------------------------

def factor_inputs(rng):
    inputs = {}
    for prefix, (C, H, W) in FACTOR_SHAPES.items():
        D = C * H * W
        x = 1.5 * rng.standard_normal((B, C, H, W))
        inputs |= {f"{prefix}x": x, f"{prefix}z": 1.5 * rng.standard_normal((B, C // 2, H, W)), f"{prefix}noise": rng.standard_normal((B, C // 2, H, W)),
                   f"{prefix}c": rng.standard_normal((B, C // 2, H, W)), f"{prefix}r": rng.standard_normal(B), f"{prefix}nudges": laws.STEP * laws.OFFSETS}
        mine = net_inputs(rng, D // 2, D, prefix) | survae_x(rng, x, prefix)
        # Short ways, since the whole net moves along them: the difference quotients are right to h^4.
        inputs |= {k: 0.3 * v if "direction." in k else v for k, v in mine.items()}
    heights = np.array([-1.0, 0.4, 1.5]) + rng.uniform(-0.2, 0.2, 3)
    line = np.linspace(-40, 40, 801)
    inputs["D=2 line"] = np.stack(np.broadcast_arrays(heights[:, None], line), -1).reshape(-1, 2, 1, 1)
    return inputs


def factor_moments(inputs, prefix, z):
    """loc and scale of the prior, (N, C / 2 H W)."""
    loc, s = np.split(survae_tanh(inputs, prefix, z.reshape(len(z), -1)), 2, -1)
    return loc, np.exp(0.5 * s)


factor_each = every_size(FACTOR_SHAPES)


def factor_value(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    image_expect("z", outputs[prefix + "forward.z"], x[:, :x.shape[1] // 2], 1e-6, ": the first half of the channels stays")


def factor_paid(inputs, outputs, prefix):
    x = inputs[prefix + "x"]
    z, rest = np.split(x, 2, 1)
    want = survae_normal(rest.reshape(B, -1), *factor_moments(inputs, prefix, z))
    paid = outputs[prefix + "forward.contribution"]
    laws.expect("contribution", x.reshape(B, -1), paid, want, 1e-3 if paid.dtype == np.float32 else 1e-7, ", log prior(rest given z)")


def factor_inverse(inputs, outputs, prefix):
    """z, and then loc + scale * noise for the noise of one of the first draws."""
    z, got = inputs[prefix + "z"], outputs[prefix + "inverse.x"]
    loc, scale = (m.reshape(z.shape) for m in factor_moments(inputs, prefix, z))
    wants = [np.concatenate([z, loc + scale * np.roll(inputs[prefix + "noise"], -k, 0)], 1) for k in range(4)]
    if not any(got.shape == w.shape and laws.close(got, w, max(laws.tolerance(got), 1e-6)).all() for w in wants):
        image_expect("x", got, wants[0], why=" from inverse: it is z, and then a draw of prior(z)")


def factor_mass(inputs, outputs, reference):
    """By the trapezoid rule, of a smooth density: 801 points over 80 units, 5 and more a standard deviation of above 0.2."""
    paid, points = outputs["D=2 forward on the line.contribution"], inputs["D=2 line"].reshape(-1, 2)
    if paid.shape != (len(points),):
        raise Fail(f"`contribution` has shape {paid.shape} for {len(points)} images; it should hold one number for each.")
    area = np.exp(np.minimum(paid.astype(float), 50)).reshape(3, -1).sum(1) * (points[1, 1] - points[0, 1])
    if np.abs(area - 1).max() > 1e-3:
        raise Fail("exp(contribution) is no density of what leaves: integrated over it, at a fixed z, it does not give 1.", f"z = {points[0, 0]:.3g}: it gives {area[0]:.3g}")


def factor_gradient(inputs, outputs, reference):
    for prefix in FACTOR_SHAPES:
        gradient_arrives(outputs, prefix, "z and contribution", "x and the weights of `prior`")
    if not outputs["parameters.found"]:
        raise Fail("parameters() of your layer does not give the weights of `prior`, so an optimiser would never move them.")


def factor_kept(inputs, outputs, prefix):
    survae_kept(inputs, outputs, prefix)
    image_once_more(inputs, outputs, prefix, "contribution", inverse=False)


class PlainFactorOut(nn.Module):
    """The layer in its plainest form, in which a mistake changes one part."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def cut(self, x):
        return x.chunk(2, 1)

    def paid(self, z, rest):
        return self.prior(z).log_prob(rest)

    def forward(self, x):
        z, rest = self.cut(x)
        return z, self.paid(z, rest)

    def draw(self, z):
        return self.prior(z).sample()

    def join(self, z, rest):
        return torch.cat([z, rest], 1)

    def inverse(self, z):
        return self.join(z, self.draw(z))


def factor_normal(rest):
    return (-0.5 * (rest**2 + math.log(2 * math.pi))).flatten(1).sum(1)


def factor_hidden(self, prior):
    nn.Module.__init__(self)
    self.priors = [prior]


def factor_stored(inputs, outputs):
    """Faults: forward and then inverse give x itself, which inverse cannot know from z."""
    for prefix in FACTOR_SHAPES:
        got, x = outputs.arrays.get(prefix + "inverse of forward.x"), inputs[prefix + "x"]
        if got is None or got.shape != x.shape or not laws.close(got, x, 1e-5).all():
            return []
    return [("forward_remembered", "state", "inverse", "forward stores the channels that leave in self, and inverse puts them back. inverse must draw: when one samples, forward need not have run.")]


def factor_picture(inputs, outputs, reference):
    """exp(contribution) over what leaves, at three z: a density of it."""
    figure = plotting.Picture(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    key, points = "D=2 forward on the line.contribution", inputs["D=2 line"].reshape(3, -1, 2)
    theirs, mine = reference.arrays[key].reshape(3, -1), outputs.arrays.get(key)
    near = np.abs(points[0, :, 1]) < 8
    good = mine is not None and mine.shape == (points.shape[0] * points.shape[1],)
    for i, colour in enumerate(("blue", "green", "orange")):
        ax.plot(points[i, near, 1], np.exp(theirs[i, near]), color=plotting.PALETTE[colour], linewidth=5, alpha=0.35, label=f"reference, z = {points[i, 0, 0]:.2g}")
        if good:
            ax.plot(points[i, near, 1], np.exp(np.clip(np.nan_to_num(mine.reshape(3, -1)[i, near], nan=-50.0), -50, 2)), "--", color=plotting.PALETTE[colour], label=f"yours, z = {points[i, 0, 0]:.2g}")
    if not good:
        ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.set_xlabel("the number that leaves", fontsize=plotting.FONT), ax.set_ylabel("exp(contribution)", fontsize=plotting.FONT)
    ax.legend(fontsize=plotting.FONT - 4, frameon=False)
    return figure


wrong = deviating(PlainFactorOut)
FACTOR = Exercise(
    id="factor_out", title="Factoring out half of the channels", minutes=10, difficulty=2,
    hints=(
        "The density of (z, rest) is the density of z times that of the rest given z. Which of the two does the flow that follows know, and which has this layer to add?",
        "`x.chunk(2, 1)` cuts along the channels. `prior(z)` is a distribution object of one image of the rest, its event the last three dimensions: `log_prob` of the channels that x has gives (B,) in forward, a draw of it fills them in inverse.",
    ),
    inputs=factor_inputs, reference=flowkit_class("images", "FactorOut"),
    cases=(
        Case("forward keeps the first half of the channels", 1, factor_each(factor_value)),
        Case("contribution = log prior(rest given z), (B,)", 1.5, factor_each(factor_paid)),
        Case("exp(contribution) integrates to 1 over what leaves", 0.5, factor_mass),
        Case("inverse draws the rest from prior(z)", 1.5, factor_each(factor_inverse)),
        Case("forward(inverse(z)) = z", 0.5, factor_each(lambda i, o, p: image_expect("z", o[p + "forward of inverse.z"], i[p + "z"], 1e-5, " from forward(inverse(z))"))),
        Case("one row alone, inputs left as they were", 0.5, factor_each(factor_kept)),
        Case("gradients reach x and prior, whose weights are found", 0.5, factor_gradient),
    ),
    misconceptions=(
        *survae_paid_mistakes(PlainFactorOut, "paid_sign", "paid_zero", "paid_exp", "paid_keepdim", "paid_batch_sum", "paid_batch_mean",
                              paid_sign="`contribution` is - log prior(rest given z): the chain rule multiplies the density of z by that of the rest, so its logarithm is added.",
                              paid_zero="`contribution` is zero: the channels that leave are forgotten, as if they had the density 1 wherever they are."),
        wrong("per_dimension", "reduction", "ldj", "`contribution` is divided by how many numbers leave; log prior of the whole rest is asked for.", paid=lambda self, z, rest: self.prior(z).log_prob(rest) / rest[0].numel()),
        wrong("paid_for_a_draw", "wrong function", "ldj", "`contribution` is the log-density of a fresh draw; it should be that of the channels that x has.", paid=lambda self, z, rest: self.prior(z).log_prob(self.prior(z).sample())),
        wrong("standard_normal", "wrong function", "ldj", "`contribution` takes the rest for standard normal, whatever z is; `prior(z)` says how it is distributed.", paid=lambda self, z, rest: factor_normal(rest)),
        wrong("kept_counted_too", "extra term", "ldj", "`contribution` adds a log-density of z as well; the flow that follows counts z.", paid=lambda self, z, rest: self.prior(z).log_prob(rest) + factor_normal(z)),
        wrong("kept_asked", "exchanged", "ldj", "`contribution` asks prior(z) about z itself; it is the channels that leave whose density is wanted.", paid=lambda self, z, rest: self.prior(z).log_prob(z)),
        wrong("paid_turned", "exchanged", "ldj", "z and the rest have changed places in `contribution`: it is the density of the rest, given z.", paid=lambda self, z, rest: self.prior(rest).log_prob(z)),
        wrong("prior_of_rest", "exchanged", "ldj", "The prior is asked for the distribution given the rest; when one samples, z is all there is.", paid=lambda self, z, rest: self.prior(rest).log_prob(rest)),
        wrong("paid_at_mean", "wrong function", "ldj", "`contribution` is the log-density at the mean of prior(z), whatever the rest of x is.", paid=lambda self, z, rest: self.prior(z).log_prob(self.prior(z).mean)),
        wrong("keeps_second", "exchanged", "forward", "forward keeps the second half of the channels; the first half stays.", cut=lambda self, x: x.chunk(2, 1)[::-1]),
        wrong("keeps_second_both", "exchanged", "forward", "The second half of the channels stays, in both directions; the first half should.", cut=lambda self, x: x.chunk(2, 1)[::-1], join=lambda self, z, rest: torch.cat([rest, z], 1)),
        wrong("returns_rest", "exchanged", "forward", "forward returns the channels that leave; z is the first half, which stays.", forward=lambda self, x: (self.cut(x)[1], self.paid(*self.cut(x)))),
        wrong("keeps_all", "missing function", "forward", "forward returns x as it came: no channels leave.", forward=lambda self, x: (x, self.paid(*self.cut(x)))),
        wrong("every_other", "wrong function", "forward", "Every other channel stays; it is the first half, one after the other.", cut=lambda self, x: (x[:, ::2], x[:, 1::2])),
        wrong("height", "wrong axis", "forward", "The image is cut along its height; it is the channels, dimension 1, that are halved.", cut=lambda self, x: x.chunk(2, 2)),
        wrong("width", "wrong axis", "forward", "The image is cut along its width, the last dimension; it is the channels, dimension 1, that are halved.", cut=lambda self, x: x.chunk(2, -1)),
        wrong("rows", "wrong axis", "forward", "The rows of the batch are cut; it is the channels, dimension 1, that are halved.", cut=lambda self, x: x.chunk(2, 0)),
        wrong("inverse_mean", "missing function", "inverse", "inverse fills in the mean of prior(z); it should draw, or all samples of one z are the same.", draw=lambda self, z: self.prior(z).mean),
        wrong("inverse_normal", "wrong function", "inverse", "inverse draws the rest from a standard normal, whatever z is; `prior(z)` says how it is distributed.", draw=lambda self, z: torch.randn_like(z)),
        wrong("inverse_zeros", "missing function", "inverse", "inverse fills in zeros; it should draw the rest.", draw=lambda self, z: torch.zeros_like(z)),
        wrong("inverse_copies", "wrong function", "inverse", "inverse fills in z a second time; it should draw the rest.", draw=lambda self, z: z),
        wrong("inverse_order", "order", "inverse", "inverse puts the drawn channels first; z comes first, as forward has it.", join=lambda self, z, rest: torch.cat([rest, z], 1)),
        wrong("inverse_joined_rows", "wrong axis", "inverse", "inverse joins z and the draw along the batch; they belong beside each other, along the channels.", join=lambda self, z, rest: torch.cat([z, rest], 0)),
        wrong("inverse_joined_height", "wrong axis", "inverse", "inverse joins z and the draw along the height; they belong together along the channels.", join=lambda self, z, rest: torch.cat([z, rest], 2)),
        wrong("inverse_joined_width", "wrong axis", "inverse", "inverse joins z and the draw along the width, the last dimension; they belong together along the channels.", join=lambda self, z, rest: torch.cat([z, rest], -1)),
        wrong("inverse_identity", "missing function", "inverse", "inverse returns z as it came: the channels that left are not drawn.", inverse=lambda self, z: z),
        wrong("inverse_only_drawn", "missing term", "inverse", "inverse returns the drawn channels alone; z belongs to x too.", join=lambda self, z, rest: rest),
        wrong("inverse_pair", "type", "inverse", "inverse returns a pair; it should return x alone, the two parts in one tensor.", join=lambda self, z, rest: (z, rest)),
        wrong("inverse_forward", "direction", "inverse", "inverse does what forward does: it halves z; it should double the channels, by a draw.", inverse=lambda self, z: self.forward(z)[0]),
        wrong("one_draw", "reduction", "inverse", "inverse draws once for the whole batch; every image needs a draw of its own.", draw=lambda self, z: self.prior(z[:1]).sample().expand(z.shape)),
        wrong("paid_detached", "detached", "gradient", "`contribution` is cut off from the computation graph, so the prior could not be trained.", paid=lambda self, z, rest: self.prior(z).log_prob(rest).detach()),
        wrong("asked_detached", "detached", "gradient", "What the prior is asked about is cut off from x (detach or no_grad): earlier layers would not learn from prior(z).", paid=lambda self, z, rest: self.prior(z.detach()).log_prob(rest)),
        wrong("rest_detached", "detached", "gradient", "The rest is cut off from x (detach or no_grad): earlier layers would not learn from its log-density.", paid=lambda self, z, rest: self.prior(z).log_prob(rest.detach())),
        wrong("z_detached", "detached", "gradient", "The z that is returned is cut off from x (detach or no_grad): earlier layers would not learn from the flow that follows.", forward=lambda self, x: (self.cut(x)[0].detach(), self.paid(*self.cut(x)))),
        wrong("prior_hidden", "state", "parameters", "The layer keeps the prior where PyTorch does not find its weights (in a plain list or a function), so an optimiser would never move them.",
              __init__=factor_hidden, paid=lambda self, z, rest: self.priors[0](z).log_prob(rest), draw=lambda self, z: self.priors[0](z).sample()),
        wrong("returns_exchanged", "exchanged", "forward", "forward returns `contribution` first and `z` second; the order is (z, contribution).", forward=lambda self, x: PlainFactorOut.forward(self, x)[::-1]),
    ),
    compare=(*(p + k for p in FACTOR_SHAPES for k in ("forward.z", "forward.contribution", "inverse.x", "gradient.along", "z after")), "parameters.found"),
    light=survae_light("D=2 line"), faults=factor_stored, picture=factor_picture,
)


# --- multi_scale -----------------------------------------------------------------------------------------------------

SCALE_ROWS = 3


def scale_inputs(rng):
    inputs = {}
    for prefix, (shape, levels) in SCALE_SHAPES.items():
        D = math.prod(shape)
        x = rng.standard_normal((SCALE_ROWS, *shape))
        inputs |= {f"{prefix}x": x, f"{prefix}near": laws.near(x.reshape(SCALE_ROWS, D)).reshape(-1, *shape), f"{prefix}z": rng.uniform(-1, 1, (SCALE_ROWS + 2, D)),
                   f"{prefix}c": rng.standard_normal((SCALE_ROWS, D)), f"{prefix}r": rng.standard_normal(SCALE_ROWS), f"{prefix}nudges": laws.STEP * laws.OFFSETS}
        inputs |= survae_x(rng, x, prefix)
        for i in range(levels):
            C = shape[0] * 2 ** (i + 2)
            turn = np.linalg.qr(rng.standard_normal((C, C)))[0]
            inputs[f"{prefix}net.{i}"] = 1.4 * turn * np.exp(0.2 * rng.standard_normal(C))
            inputs[f"{prefix}direction.{i}"] = rng.standard_normal((C, C)) / C
    return inputs


def scale_each(law):
    return every_size(SCALE_SHAPES)(lambda inputs, outputs, prefix: (scale_moves(inputs, outputs, prefix), law(inputs, outputs, prefix)))


def scale_moves(inputs, outputs, prefix):
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    if z.size == x.size and np.abs(z.reshape(x.shape) - x).max() < 1e-9:
        raise Fail("forward returns x unchanged, so there is nothing here to judge yet.")


def scale_words(prefix):
    shape, levels = SCALE_SHAPES[prefix]
    return f"(C, H, W) = {shape}, {levels} level{'s' * (levels > 1)}"


def scale_dimensions(inputs, outputs, prefix):
    D = math.prod(SCALE_SHAPES[prefix][0])
    for key, shape in (("forward.z", (SCALE_ROWS, D)), ("forward.ldj", (SCALE_ROWS,)), ("forward of one row.z", (1, D)), ("forward of one row.ldj", (1,))):
        got = outputs[prefix + key].shape
        if got != shape:
            letters = "(B, C H W)" if key.endswith("z") else "(B,)"
            raise Fail(f"`{key.rsplit('.')[-1]}` from forward has shape {got}; it should be {letters} = {shape}: dimensions are neither lost nor added.", scale_words(prefix))


def scale_levels(inputs, outputs, prefix):
    """Each step is run once, on a squeezed image of half the channels that the step before gave; the first on 2 x 2 blocks, in any order of the channels."""
    (C, H, W), levels = SCALE_SHAPES[prefix]
    calls = outputs[prefix + "levels.calls"]
    if (calls != 1).any():
        i = int((calls != 1).argmax())
        raise Fail(f"The step of level {i + 1} is run {calls[i]} times in one forward; it should be once.", scale_words(prefix))
    want = np.array([(SCALE_ROWS, C * 2 ** (i + 2), H >> (i + 1), W >> (i + 1)) for i in range(levels)])
    shapes = outputs[prefix + "levels.shapes"]
    if shapes.shape != want.shape or (shapes != want).any():
        raise Fail("The steps are given images of other shapes than squeeze and the half that stays would have.", f"{scale_words(prefix)}: {shapes.tolist()}, expected {want.tolist()}")
    blocks = inputs[prefix + "x"].reshape(SCALE_ROWS, C, H // 2, 2, W // 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(want[0])
    if not laws.close(np.sort(outputs[prefix + "levels.first"], 1), np.sort(blocks, 1), 1e-6).all():
        raise Fail("What the first step is given is not squeezed: the channels of a pixel should be a 2 x 2 neighbourhood of x.", scale_words(prefix))


def scale_leaves(inputs, outputs, prefix):
    """Another step at level i changes all that has not left before: D / 2^i numbers of z."""
    (C, H, W), levels = SCALE_SHAPES[prefix]
    scale_dimensions(inputs, outputs, prefix)
    z = outputs[prefix + "forward.z"][:2]
    for i in range(levels):
        other, want = outputs[f"{prefix}forward with another step {i}.z"], C * H * W // 2**i
        if other.shape != z.shape:
            raise Fail(f"`z` has another shape, {other.shape}, for two images.", scale_words(prefix))
        moved = int((np.abs(other - z) > 1e-6).any(0).sum())
        if moved != want:
            raise Fail(f"{moved} of the {C * H * W} numbers in z depend on the step of level {i + 1}; it should be {want}: half of the channels leave at each level but the last.", scale_words(prefix))


def scale_flat(inputs, prefix):
    """x as vectors, for the laws of vectors."""
    x = inputs[prefix + "x"]
    return inputs | {prefix + "x": x.reshape(len(x), -1)}


def scale_ldj(inputs, outputs, prefix):
    laws.ldj_is_log_det(scale_flat(inputs, prefix), outputs, prefix)


def scale_round_trip(inputs, outputs, prefix):
    image_expect("x", outputs[prefix + "inverse of forward.x"], inputs[prefix + "x"], 1e-5, " from inverse(forward(x))")
    image_expect("z", outputs[prefix + "forward of inverse.z"], inputs[prefix + "z"], 1e-5, " from forward(inverse(z))")
    one = outputs[prefix + "inverse of one row.x"]
    if one.shape != (1, *SCALE_SHAPES[prefix][0]):
        raise Fail(f"`x` from inverse has shape {one.shape} for one row of z; it should be {(1, *SCALE_SHAPES[prefix][0])}.", scale_words(prefix))


def scale_kept(inputs, outputs, prefix):
    for key, given in (("x after", "x"), ("z after", "z")):
        if not np.array_equal(outputs[prefix + key], inputs[prefix + given]):
            raise Fail(f"{'forward' if given == 'x' else 'inverse'} changed its input `{given}` in place: the caller's tensor was overwritten.")
    for name in ("z", "ldj"):
        whole, one = outputs[f"{prefix}forward.{name}"], outputs[f"{prefix}forward of one row.{name}"]
        if one.shape != (1, *whole.shape[1:]) or not laws.close(one[0], whole[0], laws.tolerance(whole)).all():
            raise Fail(f"`{name}` of the first row is another one when it comes alone: the rows of a batch influence each other.")


def scale_gradient(inputs, outputs, prefix):
    gradient_arrives(outputs, prefix, "z and ldj", "x and the weights of the steps")
    if SCALE_SHAPES[prefix][1] > 1:
        found, there = outputs[prefix + "parameters.found"]
        if found < there:
            raise Fail(f"parameters() of your MultiScale gives {found} of the {there} weights of its steps: kept in a plain list, steps are not found by PyTorch.")


def scale_faults(inputs, outputs):
    for prefix in SCALE_SHAPES:     # to give x back for z of another batch is what only a layer can that has stored nothing else
        x, got = inputs[prefix + "x"], outputs.arrays.get(prefix + "inverse.x")
        if got is None or got.shape != x.shape or not laws.close(got, x, 1e-5).all():
            break
    else:
        return [("forward_remembered", "state", "inverse", "forward stores x in self, and inverse gives it back whatever z is; it should be made of z.")]
    raised = [(step, sentence) for step, (kind, sentence) in outputs.complaints().items() if kind == "raised"]
    if found := scale_lost(outputs):
        return found
    for way in ("forward", "inverse"):
        said = " ".join(sentence for step, sentence in raised if step.split(" ", 1)[-1].startswith(way))
        for pattern, *faults in SCALE_RAISED[way]:
            if re.search(pattern, said):
                return [(name, kind, way, f"In {way} {sentence}") for name, kind, sentence in faults]
        if said and way == "forward":
            return []       # what was raised there tells more than what follows from it in inverse
        if re.search("shape|[Ss]ize|[Dd]imension|out of bounds|out of range", said):
            return [("inverse_sizes", "shape", "inverse", "The pieces into which inverse cuts z, or the shapes that it gives them, are not those that left in forward: of the "
                     "C 2^(l+1) channels at level l half left.")]
    flat = inputs
    for prefix in SCALE_SHAPES:
        flat = scale_flat(flat, prefix)
    return laws.ldj_faults(flat, outputs, tuple(SCALE_SHAPES))


def scale_lost(outputs):
    """The channels that left are lost: z is what stayed to the end, and no more, whatever inverse makes of it."""
    for prefix, (shape, levels) in SCALE_SHAPES.items():
        z = outputs.arrays.get(prefix + "forward.z")
        if z is None or z.shape != (SCALE_ROWS, math.prod(shape) >> (levels - 1)):
            return []
    if len(z[0]) == math.prod(shape):
        return []
    return [("dropped", "missing term", "forward", "The channels that leave are dropped: z is what stays to the end only, and has fewer dimensions than x.")]


SCALE_MIXED = (r"is not callable|expected Tensor as element|must be int, not tuple|not supported between instances",
               ("mixed_up", "exchanged", "something is handed on where another thing is expected: look at the order in which things are unpacked and given."))
SCALE_VECTOR = (r"expected 4, got 2|pixel_unshuffle expects",
                ("forward_of_a_vector", "direction", "a vector is squeezed as if it were an image: inverse begins with what forward ended with."))
# What Python, torch and the judge's steps say when things are mixed up: a pattern, and each fault that has it, (id, kind, the rest of the sentence).
SCALE_RAISED = {
    "forward": (
        SCALE_MIXED, SCALE_VECTOR,
        (r"can only concatenate list|unsupported operand type\(s\) for \+=?: '(int|list|Tensor)' and '(list|Tensor)'",
         ("list_added", "exchanged", "a list and a tensor are added: the list of what left and the sum of the ldj have changed places, or a tensor stands where a list of it belongs.")),
        (r"range of \[-1, 0\], but got 1",
         ("ldj_goes_on", "exchanged", "a vector of one number for each image is taken for an image: a step gives (z, ldj), in this order.")),
        (r"match except in dimension 0", ("joined_rows", "wrong axis", "the parts of z are joined along the batch; they belong side by side in one row for each image.")),
        (r"\(with D = 32\) raised ValueError: a step for images of 8 channels was given shape \(\d+, 16, 1, 2\)",
         ("nothing_leaves", "missing function", "no channels leave before the second level, whose step is made for half as many."),
         ("last_turned", "sign", "or else the comparison that asks whether this level is the last is turned round.")),
    ),
    "inverse": (
        SCALE_MIXED, SCALE_VECTOR,
        (r"images of 8 channels was given shape \((5|3), 8\)", ("end_not_reshaped", "missing function", "a step is given a flat piece of z; what stayed to the end is made an image again first.")),
        (r"was given shape \(\d+, \d+\)", ("pieces_exchanged", "exchanged", "a step is given what left, still flat, where what stayed to the end belongs.")),
        (r"same number of dimensions: got 4 and 2",
         ("flat_joined", "missing function", "an image is joined with a flat piece of z, which is to be reshaped first."),
         ("pieces_exchanged", "exchanged", "or else the piece that comes back and what is left of z have changed places.")),
        (r"\(with D = 8\) raised (RuntimeError: shape '\[\d+, \d+, 1, 1\]' is invalid for input of size 0|IndexError: (list|tuple) index out of range|IndexError: pop from empty)",
         ("joined_at_the_last", "missing term", "something is to come back at the last level too, where nothing left (a - 1 is missing in the count of levels?)."),
         ("last_sign", "sign", "or else the 1 is added to the count of levels instead of subtracted.")),
        (r"^inverse of forward \(with D = 64\) raised RuntimeError: shape '\[\d+, 2, 4, 4\]' is invalid for input of size 0",
         ("less_rows", "wrong axis", "the pieces that left are cut along the batch where the numbers of each row should be cut."),
         ("before_sign", "sign", "or else numbers that left are counted from the beginning of z where they should be counted from behind.")),
        (r"^inverse of one row \(with D = 32\) raised IndexError: index 1 is out of bounds for dimension 0 with size 1",
         ("second_row", "off by one", "the size of an image is read off the second row, x[1]; a batch may have one row only.")),
    ),
}


class PlainMultiScale(nn.Module):
    """The layer in its plainest form, in which a mistake changes one part."""

    def __init__(self, steps):
        super().__init__()
        self.steps = self.keep(steps)

    def keep(self, steps):
        return nn.ModuleList(steps)

    def squeeze(self, x):
        return F.pixel_unshuffle(x, 2)

    def unsqueeze(self, x):
        return F.pixel_shuffle(x, 2)

    def halve(self, x):
        return x.chunk(2, 1)

    def leaves(self, i):
        return i < len(self.steps) - 1

    def add(self, total, ldj):
        return total + ldj

    def level(self, x, step):
        return step(self.squeeze(x))

    def flat(self, parts):
        return torch.cat([p.flatten(1) for p in parts], 1)

    def ldj(self, total):
        return total

    def forward(self, x):
        self.remember(x)
        left, total = [], torch.zeros(len(x), dtype=x.dtype)
        for i, step in enumerate(self.steps):
            x, ldj = self.level(x, step)
            total = self.add(total, ldj)
            if self.leaves(i):
                x, gone = self.halve(x)
                left.append(gone)
        return self.flat(self.order(left, x)), self.ldj(total)

    def order(self, left, x):
        return [*left, x]

    def remember(self, x):
        self.shape = x.shape[1:]

    def rows(self, z):
        return len(z)

    def shapes(self):
        c, h, w = self.shape
        return [(c * 2 ** (i + 2), h >> (i + 1), w >> (i + 1)) for i in range(len(self.steps))]

    def back(self, x, step):
        return self.unsqueeze(step.inverse(x))

    def rejoin(self, x, gone):
        return torch.cat([x, gone], 1)

    def cut(self, z, shapes):
        *parts, x = z.split([*(math.prod(s) // 2 for s in shapes[:-1]), math.prod(shapes[-1])], 1)
        return parts, x

    def way(self):
        return reversed(range(len(self.steps)))

    def inverse(self, z):
        shapes = self.shapes()
        parts, x = self.cut(z, shapes)
        x = x.reshape(self.rows(z), *shapes[-1])
        for i in self.way():
            if i < len(parts):
                x = self.rejoin(x, parts[i].reshape(x.shape))
            x = self.back(x, self.steps[i])
        return x


class PeeledMultiScale(PlainMultiScale):
    """The same with an inverse that takes one piece after the other off the end of z."""

    def before(self, z, n):
        return z[:, :-n]

    def end(self, z, n):
        return z[:, -n:]

    def less(self, left, n):
        return left[:, :-n]

    def piece(self, left, n):
        return left[:, -n:]

    def inverse(self, z):
        shape = self.shapes()[-1]
        n = math.prod(shape)
        left, x = self.before(z, n), self.end(z, n).reshape(-1, *shape)
        for i in self.way():
            if self.leaves(i):
                n = x[0].numel()
                gone = self.piece(left, n).reshape(x.shape)
                left, x = self.less(left, n), self.rejoin(x, gone)
            x = self.back(x, self.steps[i])
        return x


def scale_rows_stored(self, x):
    self.shape, self.many = x.shape[1:], len(x)


def scale_by_view(self, x):
    return x.reshape(len(x), 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2)


def scale_unview(self, x):
    return x.reshape(len(x), x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])


def scale_first_only(self, total, ldj):
    return total if total.any() else ldj


def scale_picture(inputs, outputs, reference):
    """The image, and what left at each level: yours over the reference's, channels side by side."""
    prefix = "D=64 "
    (C, H, W), levels = SCALE_SHAPES[prefix]
    shapes = [(C * 2 ** (i + 1 + (i == levels - 1)), H >> (i + 1), W >> (i + 1)) for i in range(levels)]
    figure = plotting.Picture(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(2, levels + 1)
    for row, (name, z) in enumerate((("yours", outputs.arrays.get(prefix + "forward.z")), ("reference", reference.arrays[prefix + "forward.z"]))):
        axes[row, 0].imshow(inputs[prefix + "x"][0, 0], cmap="cividis"), axes[row, 0].set_ylabel(name, fontsize=plotting.FONT)
        if row == 0:
            axes[row, 0].set_title("x", fontsize=plotting.FONT)
        parts = np.split(z[0], np.cumsum([math.prod(s) for s in shapes])[:-1]) if z is not None and z.shape == (SCALE_ROWS, C * H * W) and np.isfinite(z).all() else [None] * levels
        for i, (ax, values, shape) in enumerate(zip(axes[row, 1:], parts, shapes)):
            if row == 0:
                ax.set_title(f"leaves at level {i + 1}" if i < levels - 1 else "stays to the end", fontsize=plotting.FONT)
            if values is None:
                pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
                continue
            across = shape[0] // 2
            tiles = values.reshape(2, across, *shape[1:]).transpose(0, 2, 1, 3).reshape(2 * shape[1], across * shape[2])
            ax.imshow(tiles, cmap="cividis", vmin=-2, vmax=2)
            for k in range(1, across):
                ax.axvline(k * shape[2] - 0.5, color="white", linewidth=2)
            ax.axhline(shape[1] - 0.5, color="white", linewidth=2)
            ax.set_xlabel(f"{shape[0]} channels of {shape[1]} x {shape[2]}", fontsize=plotting.FONT - 2)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    return figure


wrong, peeled = deviating(PlainMultiScale), deviating(PeeledMultiScale)
SCALE = Exercise(
    id="multi_scale", title="A multi-scale flow", minutes=20, difficulty=4,
    hints=(
        "A loop over the steps: squeeze, run the step, add its ldj, and (not at the last level) cut the channels in halves, one of which goes on while the other is put aside, flattened. At the end what was put aside and what is left are joined into one vector for each image.",
        "inverse needs to know how many numbers left at each level, and in which shape: remember (C, H, W) in forward. The step of level l, l = 1, 2, ..., works on (C 2^(l+1), H / 2^l, W / 2^l), half of which left. Go through the levels backwards: join the halves, `step.inverse`, unsqueeze.",
    ),
    inputs=scale_inputs, reference=flowkit_class("images", "MultiScale"),
    cases=(
        Case("z is (B, C H W) and ldj (B,): dimensions are kept", 1, scale_each(scale_dimensions)),
        Case("each level squeezes, and its step gets half of the channels of the level before", 1.5, scale_each(scale_levels)),
        Case("half of the channels leave at each level but the last", 1, scale_each(scale_leaves)),
        Case("ldj = log|det dz/dx| over all levels", 2, scale_each(scale_ldj)),
        Case("inverse undoes forward and forward inverse, for any batch", 2.5, scale_each(scale_round_trip)),
        Case("rows apart, inputs left as they were", 0.5, scale_each(scale_kept)),
        Case("gradients reach x and all steps, whose weights are found", 0.5, scale_each(scale_gradient)),
    ),
    misconceptions=(
        *ldj_mistakes(PlainMultiScale, "ldj_sign", "ldj_zero", "ldj_det", "ldj_keepdim", "ldj_batch_sum", "ldj_times_batch"),
        wrong("last_ldj_only", "missing term", "ldj", "`ldj` is that of the last step alone; the steps' ldj add up.", add=lambda self, total, ldj: ldj),
        wrong("first_ldj_only", "missing term", "ldj", "`ldj` is that of the first step alone; the steps' ldj add up.", add=scale_first_only),
        wrong("ldj_mean_of_levels", "reduction", "ldj", "`ldj` is averaged over the levels; the logarithm of a product is a sum.", ldj=lambda self, total: total / len(self.steps)),
        wrong("ldj_multiplied", "wrong function", "ldj", "The steps' ldj are multiplied; determinants multiply, their logarithms add up.", add=lambda self, total, ldj: total * ldj if total.any() else ldj),
        wrong("ldj_halved", "extra term", "ldj", "`ldj` of a level is halved, as if the channels that leave did not count; they have passed the step as well.", ldj=lambda self, total: total / 2),
        wrong("dropped", "missing term", "forward", "The channels that leave are dropped: z is what stays to the end only, and has fewer dimensions than x.", order=lambda self, left, x: [x]),
        wrong("only_left", "missing term", "forward", "What stays to the end is missing in z, which holds only what left before.", order=lambda self, left, x: left or [x[:, :0]]),
        wrong("nothing_leaves", "missing function", "forward", "No channels leave, so from the second level on there are twice as many as the steps are made for.", leaves=lambda self, i: False),
        wrong("same_half", "exchanged", "forward", "The half that stays is put aside, and goes on as well, so the other half is lost.", halve=lambda self, x: (x.chunk(2, 1)[0],) * 2),
        wrong("other_half_twice", "exchanged", "forward", "The half that leaves goes on as well, so the half that should stay is lost.", halve=lambda self, x: (x.chunk(2, 1)[1],) * 2),
        wrong("no_squeeze", "missing function", "forward", "The images are not squeezed before the step, which is made for four times as many channels.", squeeze=lambda self, x: x),
        wrong("squeezed_by_view", "wrong function", "forward", "The squeeze is a plain reshape or view: it cuts rows of pixels into channels, so that the channels of a pixel are no 2 x 2 neighbourhood.", squeeze=scale_by_view, unsqueeze=scale_unview),
        wrong("halved_height", "wrong axis", "forward", "The image is halved along its height; it is half of the channels, dimension 1, that leaves.", halve=lambda self, x: x.chunk(2, 2)),
        wrong("halved_width", "wrong axis", "forward", "The image is halved along its width, the last dimension; it is half of the channels, dimension 1, that leaves.", halve=lambda self, x: x.chunk(2, -1)),
        wrong("halved_rows", "wrong axis", "forward", "The batch is halved; it is half of the channels, dimension 1, that leaves.", halve=lambda self, x: x.chunk(2, 0)),
        wrong("joined_rows", "wrong axis", "forward", "The parts of z are joined along the batch; they belong side by side in one row for each image.", flat=lambda self, parts: torch.cat([p.reshape(len(p), -1) for p in parts], 0) if len(parts) == 1 else torch.cat([p.flatten() for p in parts])[:, None]),
        wrong("all_flattened", "shape", "forward", "`z` is one long vector: the batch is flattened too; flatten from dimension 1 on.", flat=lambda self, parts: torch.cat([p.flatten() for p in parts])),
        wrong("not_flattened", "shape", "forward", "What left is not flattened, so images of different sizes are joined.", flat=lambda self, parts: torch.cat(parts, 1)),
        wrong("list_returned", "type", "forward", "`z` is a list of parts; they are flattened and joined into one tensor (B, C H W).", flat=lambda self, parts: list(parts)),
        wrong("leaves_at_the_last", "missing term", "forward", "Channels leave at the last level too (a - 1 is missing in the count of levels?); what is there stays together, as inverse expects it.", leaves=lambda self, i: True),
        wrong("end_first", "order", "forward", "What stays to the end is put first in z, while inverse looks for it at the end.", order=lambda self, left, x: [x, *left]),
        wrong("step_exchanged", "exchanged", "forward", "The two things that a step returns have changed places: it gives (z, ldj).", level=lambda self, x, step: step(self.squeeze(x))[::-1]),
        wrong("inverse_same_order", "order", "inverse", "inverse goes through the levels in the order of forward; the last level is undone first.", way=lambda self: range(len(self.steps))),
        wrong("inverse_parts_turned", "order", "inverse", "inverse takes the parts that left in the wrong order: what left last comes back first.", cut=lambda self, z, shapes: (lambda parts, x: (parts[::-1], x))(*PlainMultiScale.cut(self, z, shapes))),
        wrong("inverse_halves_exchanged", "exchanged", "inverse", "inverse joins the halves of the channels the other way round than forward cut them.", rejoin=lambda self, x, gone: torch.cat([gone, x], 1)),
        wrong("inverse_joined_height", "wrong axis", "inverse", "inverse joins the halves along the height; they are halves of the channels.", rejoin=lambda self, x, gone: torch.cat([x, gone], 2)),
        wrong("inverse_joined_rows", "wrong axis", "inverse", "inverse joins the halves along the batch; they are halves of the channels.", rejoin=lambda self, x, gone: torch.cat([x, gone], 0)),
        wrong("inverse_not_unsqueezed", "missing function", "inverse", "inverse does not unsqueeze after a step, so the image stays small.", unsqueeze=lambda self, x: x),
        wrong("inverse_unsqueezed_before", "order", "inverse", "inverse unsqueezes before it undoes the step; the step comes after the squeeze in forward, so it is undone first.", back=lambda self, x, step: step.inverse(self.unsqueeze(x))),
        wrong("inverse_steps_forward", "direction", "inverse", "inverse runs the steps forward; each has an inverse of its own.", back=lambda self, x, step: self.unsqueeze(step(x)[0])),
        wrong("inverse_no_steps", "missing function", "inverse", "inverse joins and unsqueezes only: the steps are not undone.", back=lambda self, x, step: self.unsqueeze(x)),
        wrong("inverse_first_end", "exchanged", "inverse", "inverse takes the first numbers of z for what stayed to the end; forward puts them last.", cut=lambda self, z, shapes: PlainMultiScale.cut(self, z.roll(-math.prod(shapes[-1]), 1), shapes)),
        peeled("inverse_before_rows", "wrong axis", "inverse", "inverse takes what stayed to the end off z along the batch; the rest is z without its last numbers in each row.", before=lambda self, z, n: z[:-n]),
        peeled("inverse_end_rows", "wrong axis", "inverse", "inverse looks for what stayed to the end in the last rows of z; it is the last numbers of each row.", end=lambda self, z, n: z[-n:]),
        peeled("inverse_piece_rows", "wrong axis", "inverse", "inverse takes the piece that comes back from the last rows of what left; it is the last numbers of each row.", piece=lambda self, left, n: left[-n:]),
        peeled("inverse_end_sign", "sign", "inverse", "inverse leaves as many numbers out at the beginning of z as stayed to the end, and takes all that follow; the end is counted from behind.", end=lambda self, z, n: z[:, n:]),
        peeled("inverse_less_sign", "sign", "inverse", "inverse keeps as many numbers of what left as have just come back; these are the ones that go, counted from behind.", less=lambda self, left, n: left[:, :n]),
        peeled("inverse_piece_sign", "sign", "inverse", "inverse leaves out the first numbers of what left and takes all that follow; the piece that comes back is counted from behind.", piece=lambda self, left, n: left[:, n:]),
        wrong("inverse_flat", "missing function", "inverse", "inverse returns z as it came: a vector, and no image.", inverse=lambda self, z: z),
        wrong("inverse_forward", "direction", "inverse", "inverse does what forward does.", inverse=lambda self, z: self.forward(z)[0]),
        wrong("batch_remembered", "state", "inverse", "inverse takes the size of the batch from the last forward; z may be another batch, and its own length counts.", remember=scale_rows_stored, rows=lambda self, z: self.many),
        wrong("steps_in_a_list", "state", "parameters", "The steps are kept in a plain list, where PyTorch does not find their weights; nn.ModuleList registers them.", keep=lambda self, steps: list(steps)),
        wrong("one_step", "wrong function", "forward", "The first step is run alone: the loop over the levels ends after one.", keep=lambda self, steps: nn.ModuleList(list(steps)[:1])),
        wrong("left_detached", "detached", "gradient", "What leaves is cut off from the computation graph, so the steps learn from the last level only.", order=lambda self, left, x: [*(t.detach() for t in left), x]),
        wrong("ldj_detached", "detached", "gradient", "`ldj` is cut off from the computation graph, so the steps would not feel it.", ldj=lambda self, total: total.detach()),
        wrong("returns_exchanged", "exchanged", "forward", "forward returns `ldj` first and `z` second; the order is (z, ldj).", forward=lambda self, x: PlainMultiScale.forward(self, x)[::-1]),
    ),
    compare=tuple(p + k for p in SCALE_SHAPES for k in ("forward.z", "forward.ldj", "inverse of forward.x", "inverse.x", "gradient.along", *(("parameters.found",) if SCALE_SHAPES[p][1] > 1 else ()))),
    light=lambda inputs: {k: v for k, v in inputs.items() if not k.endswith("near")}, faults=scale_faults, picture=scale_picture,
)


# --- temperature -----------------------------------------------------------------------------------------------------

def temperature_inputs(rng):
    n, inputs = 12, {}
    for name, shape in (("vectors", (3,)), ("images", (1, 2, 2))):
        inputs |= {f"{name}.scale": rng.uniform(0.5, 1.3, shape), f"{name}.w": rng.uniform(0.6, 1.2, shape), f"{name}.noise": rng.standard_normal((n, *shape))}
    many = 400      # normal points in the middles of equal shares: a sample without chance
    shares = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(float(many), dtype=torch.float64) + 0.5) / many).numpy()
    return inputs | {"packed noise": rng.permutation(shares)[:, None], "packed c": np.array(rng.uniform(1.6, 2.4))}


def temperature_map(inputs, name, z):
    return np.sinh(inputs[f"{name}.w"] * z)


def temperature_value(name):
    def judge(inputs, outputs, reference):
        for words, T in TEMPERATURES.items():
            got = outputs[f"{name}, {words}.x"]
            wants = [temperature_map(inputs, name, T * inputs[f"{name}.scale"] * np.roll(inputs[f"{name}.noise"], -k, 0)) for k in range(4)]
            if not any(got.shape == w.shape and laws.close(got, w, max(1e-6, laws.tolerance(got))).all() for w in wants):
                image_expect("x", got, wants[0], why=f" for {words}: it is the inverse of T times a sample of the flow's base")

    return judge


def temperature_latent(inputs, outputs, reference):
    """The latents' covariance has the determinant T^(2 D) times that at T = 1, exactly, as the noise is the same."""
    D = inputs["vectors.noise"].shape[1]
    entropy = {}
    for words in TEMPERATURES:
        if outputs[f"vectors, {words}.x"].shape != inputs["vectors.noise"].shape:
            raise Fail(f"`x` has shape {outputs[f'vectors, {words}.x'].shape}; it should be (n, D) = {inputs['vectors.noise'].shape}.")
        entropy[words] = 0.5 * np.linalg.slogdet(np.cov(outputs[f"vectors, {words} latents.z"].T))[1]
    for words, T in TEMPERATURES.items():
        moved = entropy[words] - entropy["T = 1"]
        if not abs(moved - D * math.log(T)) < 1e-2:     # also NaN, of samples that are all the same
            raise Fail("The entropy of the latents does not move by D log T.", f"D = {D}, {words}: expected {D * math.log(T):.3g} nats, got {moved:.3g}")


def temperature_entropy(x):
    """The entropy of a sample on the line by its spacings, in nats, without the two outermost."""
    gaps = np.diff(np.sort(x.ravel()))
    return np.log(np.maximum(len(x) * gaps, 1e-12))[1:-1].mean()


def temperature_packed(inputs, outputs, reference):
    entropies = []
    for words, T in (("T = 0.5", 0.5), ("T = 1", 1.0)):
        got = outputs[f"packed, {words}.x"]
        if got.shape != inputs["packed noise"].shape:
            raise Fail(f"`x` has shape {got.shape} for n = {len(inputs['packed noise'])} on the line; it should be {inputs['packed noise'].shape}.")
        entropies.append(temperature_entropy(got.astype(float)))
        right = temperature_entropy(reference[f"packed, {words}.x"])
        if abs(entropies[-1] - right) > 0.02:
            raise Fail("On a flow that packs far latents together your samples have another entropy than samples at that temperature.", f"{words}: expected {right:.3f} nats, got {entropies[-1]:.3f}")
    if entropies[0] < entropies[1]:
        raise Fail("On a flow that packs far latents together the entropy of the samples should rise as T falls; yours falls.")


TEMPERATURE_LEFT = ("the flow is in another mode, train or eval, than before", "the flow has other attributes than before", "other weights of the flow are to be trained than before (requires_grad)",
                    "gradients are switched off, or on, for everything that follows", "torch's generator has another seed, so all samples that follow are the same from run to run")


def temperature_kept(inputs, outputs, reference):
    for name in ("vectors", "images"):
        got, shape = outputs[f"{name}, one sample.x"], (1, *inputs[f"{name}.noise"].shape[1:])
        if got.shape != shape:
            raise Fail(f"`x` has shape {got.shape} for n = 1; it should be {shape}.")
        want = temperature_map(inputs, name, 0.7 * inputs[f"{name}.scale"] * inputs[f"{name}.noise"])
        if not any(laws.close(got[0], w, max(1e-6, laws.tolerance(got))).all() for w in want[:4]):
            image_expect("x", got, want[:1], why=" for n = 1")
        for words in TEMPERATURES:
            outputs[f"{name}, {words}.x"]
            if not outputs[f"{name}, {words}.base kept"] or not np.array_equal(outputs[f"{name}, {words}.w after"], inputs[f"{name}.w"]):
                raise Fail("The flow was changed: afterwards it has another base or other weights than before.")
            for left, what in zip(outputs[f"{name}, {words}.left"].ravel(), TEMPERATURE_LEFT):
                if left:
                    raise Fail(f"The call leaves something behind: {what}.")


def temperature_by(latent=lambda flow, n, T: T * flow.base.sample((n,)), carry=lambda flow, z: flow.transform.inverse(z), end=lambda x, T: x):
    """A function `sample_at_temperature` in its plainest form, in which a mistake changes one part."""

    def sample_at_temperature(flow, n, T):
        return end(carry(flow, latent(flow, n, T)), T)

    return function(sample_at_temperature)


def temperature_base_replaced(flow, n, T):
    base = flow.base
    flow.base = torch.distributions.TransformedDistribution(base, torch.distributions.AffineTransform(0.0, T, base.base_dist.loc.ndim))
    return T * base.sample((n,))


def temperature_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, temperature_by(**parts))


def temperature_picture(inputs, outputs, reference):
    """Histograms of the samples on the line at both temperatures: the packed flow's entropy rises as T falls."""
    figure, axes = plotting.side_by_side(2, ("T = 1", "T = 0.5"), size=4.2)
    edge = 0.5 * math.sqrt(math.pi / float(inputs["packed c"]))
    bins = np.linspace(-edge, edge, 25)
    for ax, words in zip(axes, ("T = 1", "T = 0.5")):
        key = f"packed, {words}.x"
        ax.hist(reference.arrays[key].ravel(), bins, color=plotting.PALETTE["black"], alpha=0.3, label=f"reference, {temperature_entropy(reference.arrays[key]):.2f} nats")
        mine = outputs.arrays.get(key)
        if mine is not None and mine.shape == reference.arrays[key].shape and np.isfinite(mine).all():
            ax.hist(np.clip(mine.ravel(), -edge, edge), bins, histtype="step", linewidth=2, color=plotting.PALETTE["red"], label=f"yours, {temperature_entropy(mine.astype(float)):.2f} nats")
        else:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        ax.set_xlabel("x", fontsize=plotting.FONT), ax.legend(fontsize=plotting.FONT - 3, frameon=False, loc="upper center")
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    return figure


TEMPERATURE_STEPS = tuple(f"{name}, {words}.x" for name in ("vectors", "images") for words in TEMPERATURES)
TEMPERATURE = Exercise(
    id="temperature", title="Sampling at a temperature", minutes=8, difficulty=1,
    hints=(
        "Sampling has two steps: a latent from `flow.base`, and `flow.transform.inverse` of it. Between the two the latent is made T times as long.",
        "`flow.base.sample((n,))` gives n latents of the base that the flow really has, in their shape. Multiply them by T, not by its square or root, and carry them through the inverse once.",
    ),
    inputs=temperature_inputs, reference=flowkit_class("inference", "sample_at_temperature"),
    cases=(
        Case("n points x = inverse(T z), z from the flow's base", 1.5, temperature_value("vectors")),
        Case("the same for a flow of images", 0.5, temperature_value("images")),
        Case("the latents' entropy moves by D log T", 1, temperature_latent),
        Case("where far latents are packed together the data's entropy rises as T falls", 0.5, temperature_packed),
        Case("n = 1, and the flow is left as it was", 0.5, temperature_kept),
    ),
    misconceptions=(
        temperature_wrong("no_T", "missing term", "value", "T is not used: these are samples of the flow itself.", latent=lambda flow, n, T: flow.base.sample((n,))),
        temperature_wrong("divided", "wrong function", "value", "The latents are divided by T; a temperature below 1 brings them closer to the middle.", latent=lambda flow, n, T: flow.base.sample((n,)) / T),
        temperature_wrong("squared", "wrong function", "value", "The latents are multiplied by T^2; it is their variance that T^2 belongs to.", latent=lambda flow, n, T: T**2 * flow.base.sample((n,))),
        temperature_wrong("rooted", "wrong function", "value", "The latents are multiplied by the root of T; T is a factor of their standard deviation here, not of their variance.", latent=lambda flow, n, T: math.sqrt(T) * flow.base.sample((n,))),
        temperature_wrong("inverse_root", "wrong function", "value", "The latents are divided by the root of T, as if T were a precision.", latent=lambda flow, n, T: flow.base.sample((n,)) / math.sqrt(T)),
        temperature_wrong("added", "wrong function", "value", "T is added to the latents; it is a factor.", latent=lambda flow, n, T: T + flow.base.sample((n,))),
        temperature_wrong("data_scaled", "order", "value", "T multiplies the samples, which are data already; it belongs to the latents, before the inverse.", latent=lambda flow, n, T: flow.base.sample((n,)), end=lambda x, T: T * x),
        temperature_wrong("both_scaled", "extra term", "value", "T multiplies the latents and the samples too; the latents alone are scaled.", end=lambda x, T: T * x),
        temperature_wrong("clamped", "wrong function", "value", "The latents are cut off at T (truncation); a temperature scales them.", latent=lambda flow, n, T: flow.base.sample((n,)).clamp(-T, T)),
        temperature_wrong("power", "wrong function", "value", "The latents are raised to the power T; T is a factor.", latent=lambda flow, n, T: flow.base.sample((n,)).abs() ** T * flow.base.mean.add(1)),
        temperature_wrong("forward", "direction", "value", "The latents go through the transform's forward; from latent to data it is inverse.", carry=lambda flow, z: flow.transform(z)[0]),
        temperature_wrong("not_carried", "missing function", "value", "What is returned are the latents: `flow.transform.inverse` is missing.", carry=lambda flow, z: z),
        temperature_wrong("carried_twice", "extra term", "value", "The result of `flow.sample` goes through the inverse once more; the latents come from `flow.base`.", latent=lambda flow, n, T: T * flow.sample(n)),
        temperature_wrong("one_latent", "reduction", "value", "One latent is drawn for all n samples; each has its own.", latent=lambda flow, n, T: (T * flow.base.sample((1,))).expand(n, *flow.base.event_shape)),
        temperature_wrong("one_sample", "shape", "value", "One sample is returned, whatever n is.", latent=lambda flow, n, T: T * flow.base.sample((1,))),
        temperature_wrong("no_batch", "shape", "value", "One latent without a batch is drawn: `sample` wants the shape (n,).", latent=lambda flow, n, T: T * flow.base.sample()),
        temperature_wrong("mean", "missing function", "value", "The latents are all the base's mean: nothing is drawn.", latent=lambda flow, n, T: (T * flow.base.mean).expand(n, *flow.base.event_shape)),
        temperature_wrong("base_replaced", "state", "state", "The flow's base is replaced and stays so: afterwards the flow is another one.", latent=temperature_base_replaced),
        temperature_wrong("pair", "type", "value", "A pair is returned; the samples alone are asked for.", end=lambda x, T: (x, T)),
    ),
    compare=(*TEMPERATURE_STEPS, *(f"{name}, one sample.x" for name in ("vectors", "images")), *(f"vectors, {words}.base kept" for words in TEMPERATURES), "packed, T = 0.5.x"),
    picture=temperature_picture,
)


# --- hybrid_loss -----------------------------------------------------------------------------------------------------

def hybrid_inputs(rng):
    inputs = {}
    for name, n, classes in zip(HYBRID_NAMES, (B, 1, 5, 4), (10, 10, 2, 3)):
        inputs |= {f"{name}.log_prob": 4 * rng.standard_normal(n) - 10, f"{name}.logits": 2 * rng.standard_normal((n, classes)),
                   f"{name}.labels": rng.permutation(n) % classes, f"{name}.lam": np.array(rng.uniform(0.1, 0.6))}
    inputs[f"{HYBRID_NAMES[2]}.log_prob"] += 20     # densities above one
    far = f"{HYBRID_NAMES[3]}.logits"
    inputs[far] = inputs[far] + 900 * np.eye(3)[[0, 1, 2, 1]]     # at the label, beside it, ...: no exp of these is finite
    return inputs


def hybrid_right(inputs, name, lam=None):
    log_prob, logits, labels = (inputs[f"{name}.{k}"] for k in ("log_prob", "logits", "labels"))
    lam = float(inputs[f"{name}.lam"]) if lam is None else lam
    top = logits.max(1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return (log_sum - logits[np.arange(len(labels)), labels]).mean() - lam * log_prob.mean()


def hybrid_one(outputs, step):
    got = outputs[f"{step}.loss"]
    if got.size != 1:
        raise Fail(f"The loss has shape {got.shape}; it is one number, a mean over the batch.")
    return float(got.reshape(())), 1e-4 if got.dtype == np.float32 else 1e-7


def hybrid_same(outputs, step, want, why):
    got, tol = hybrid_one(outputs, step)
    if abs(got - want) > tol * (1 + abs(want)):
        raise Fail(f"The loss is not what it should be{why}.", laws.expected(want, got))


def hybrid_value(inputs, outputs, reference):
    for name in HYBRID_NAMES[:3]:
        lam = float(inputs[f"{name}.lam"])
        hybrid_same(outputs, name, hybrid_right(inputs, name), f" for {len(inputs[f'{name}.labels'])} rows, {inputs[f'{name}.logits'].shape[1]} classes and lam = {lam:.3g}")


def hybrid_limits(inputs, outputs, reference):
    for words, lam in (("lam = 0", 0), ("lam = 1", 1), ("lam = 1/D", 1 / 64)):
        what = {0: ": it is the classifier's cross-entropy alone", 1: ": it is minus the mean of log p(x, label)"}.get(lam, ", with D = 64")
        hybrid_same(outputs, f"hybrid_loss ({words})", hybrid_right(inputs, HYBRID_NAMES[0], lam), f" for {words}{what}")


def hybrid_far(inputs, outputs, reference):
    hybrid_value(inputs, outputs, reference)
    hybrid_same(outputs, HYBRID_NAMES[3], hybrid_right(inputs, HYBRID_NAMES[3]), " for logits that are far apart")


def hybrid_gradient(inputs, outputs, reference):
    hybrid_one(outputs, HYBRID_NAMES[0])
    mine = {k: inputs[f"{HYBRID_NAMES[0]}.{k}"] for k in ("log_prob", "logits", "labels", "lam")}
    p = np.exp(mine["logits"] - mine["logits"].max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - np.eye(p.shape[1])[mine["labels"]]
    for name, want in (("log_prob", np.full(B, -mine["lam"] / B)), ("logits", p / B)):
        got = outputs[f"gradient.{name}"]
        if not laws.close(got, want, 1e-4).all():
            how = "Not the right gradient" if got.any() else "No gradient"
            raise Fail(f"{how} of the loss reaches `{name}`, so the {'flow' if name == 'log_prob' else 'classifier'} would not be trained by it.")


def hybrid_kept(inputs, outputs, reference):
    hybrid_one(outputs, HYBRID_NAMES[0])
    for name in HYBRID_NAMES:
        for given in ("logits", "log_prob"):
            if not np.array_equal(outputs[f"{name}.{given} after"], inputs[f"{name}.{given}"]):
                raise Fail(f"`{given}` was changed in place: the caller's tensor was overwritten.")
        if outputs[f"{name}.loss"].shape != ():
            raise Fail(f"The loss has shape {outputs[f'{name}.loss'].shape}; it is one number, of shape ().")


def hybrid_by(entropy=lambda logits, labels: F.cross_entropy(logits, labels), likelihood=lambda log_prob: log_prob.mean(), end=lambda c, p, lam: c - lam * p):
    """A function `hybrid_loss` in its plainest form, in which a mistake changes one part."""

    def hybrid_loss(log_prob, logits, labels, lam):
        return end(entropy(logits, labels), likelihood(log_prob), lam)

    return function(hybrid_loss)


def hybrid_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, hybrid_by(**parts))


def hybrid_picture(inputs, outputs, reference):
    """The loss against lam: a line that starts at the cross-entropy and whose slope is minus the mean log-likelihood."""
    figure = plotting.Picture(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    lam = np.array([0, 1 / 64, float(inputs[f"{HYBRID_NAMES[0]}.lam"]), 1])
    ax.plot(lam, [hybrid_right(inputs, HYBRID_NAMES[0], v) for v in lam], color=plotting.PALETTE["black"], linewidth=5, alpha=0.35, label="reference")
    keys = ("hybrid_loss (lam = 0)", "hybrid_loss (lam = 1/D)", HYBRID_NAMES[0], "hybrid_loss (lam = 1)")
    found = [(v, float(outputs.arrays[f"{k}.loss"].reshape(-1)[0])) for v, k in zip(lam, keys) if f"{k}.loss" in outputs and outputs.arrays[f"{k}.loss"].size == 1]
    found = [(v, loss) for v, loss in found if math.isfinite(loss)]
    if found:
        ax.plot(*zip(*found), "o", color=plotting.PALETTE["red"], label="yours")
    else:
        ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.set_xlabel("lam", fontsize=plotting.FONT), ax.set_ylabel("loss, nats", fontsize=plotting.FONT), ax.legend(fontsize=plotting.FONT - 2, frameon=False)
    return figure


HYBRID = Exercise(
    id="hybrid_loss", title="One loss for classifier and density", minutes=6, difficulty=1,
    hints=(
        "Two means over the batch: how surprised the classifier is by the labels (torch.nn.functional has that, from logits), and how likely the flow finds the images. Which of the two should become small, and which large?",
        "`F.cross_entropy(logits, labels)` takes logits as they are and averages already. The likelihood is to grow while a loss falls, so it gets a minus sign, and lam is its weight alone.",
    ),
    inputs=hybrid_inputs, reference=flowkit_class("inference", "hybrid_loss"),
    cases=(
        Case("cross-entropy - lam * log_prob, means over the batch", 1.5, hybrid_value),
        Case("lam = 0, 1/D and 1", 1, hybrid_limits),
        Case("finite for logits that are far apart", 0.5, hybrid_far),
        Case("gradients reach log_prob and logits", 0.5, hybrid_gradient),
        Case("one number, and the inputs are left as they were", 0.5, hybrid_kept),
    ),
    misconceptions=(
        hybrid_wrong("likelihood_added", "sign", "value", "lam * log_prob is added: training would make the data unlikely. A loss falls, so the log-likelihood is subtracted.", end=lambda c, p, lam: c + lam * p),
        hybrid_wrong("entropy_subtracted", "sign", "value", "The cross-entropy is subtracted: the classifier would learn to be wrong.", end=lambda c, p, lam: -c - lam * p),
        hybrid_wrong("objective", "sign", "value", "The sign of the whole is turned: that is what should grow; the loss to be minimised is asked for.", end=lambda c, p, lam: lam * p - c),
        hybrid_wrong("lam_on_entropy", "exchanged", "value", "lam weighs the cross-entropy; it weighs the log-likelihood.", end=lambda c, p, lam: lam * c - p),
        hybrid_wrong("lam_on_both", "extra term", "value", "lam weighs both terms; the cross-entropy counts in full.", end=lambda c, p, lam: lam * (c - p)),
        hybrid_wrong("blended", "extra term", "value", "The cross-entropy is weighed by 1 - lam; it counts in full, whatever lam is.", end=lambda c, p, lam: (1 - lam) * c - lam * p),
        hybrid_wrong("no_lam", "missing term", "value", "lam is not used: the log-likelihood counts in full.", end=lambda c, p, lam: c - p),
        hybrid_wrong("no_likelihood", "missing term", "value", "The log-likelihood is missing: this is the classifier's loss alone.", end=lambda c, p, lam: c + 0 * p),
        hybrid_wrong("no_entropy", "missing term", "value", "The cross-entropy is missing: the labels have no effect.", end=lambda c, p, lam: 0 * c - lam * p),
        hybrid_wrong("divided", "wrong function", "value", "The log-likelihood is divided by lam; it is multiplied.", end=lambda c, p, lam: c - p / lam),
        hybrid_wrong("likelihood_sum", "reduction", "value", "log_prob is summed over the batch, while the cross-entropy is a mean; both are means.", likelihood=lambda p: p.sum()),
        hybrid_wrong("entropy_sum", "reduction", "value", "The cross-entropy is summed over the batch; both terms are means.", entropy=lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum")),
        hybrid_wrong("both_sums", "reduction", "value", "Both terms are summed over the batch; they are means, so that the loss does not grow with it.", entropy=lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"), likelihood=lambda p: p.sum()),
        hybrid_wrong("entropy_rows", "reduction", "value", "The cross-entropy is not averaged: the loss has a number for each row.", entropy=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")),
        hybrid_wrong("likelihood_rows", "reduction", "value", "log_prob is not averaged: the loss has a number for each row.", likelihood=lambda p: p),
        hybrid_wrong("both_rows", "reduction", "value", "The loss has a number for each row; it is the mean over the batch.", entropy=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"), likelihood=lambda p: p),
        hybrid_wrong("softmax_first", "extra term", "value", "The logits pass a softmax before `cross_entropy`, which has one inside.", entropy=lambda logits, labels: F.cross_entropy(logits.softmax(1), labels)),
        hybrid_wrong("nll_of_logits", "missing function", "value", "`nll_loss` takes log-probabilities, and gets raw logits: a log_softmax is missing.", entropy=lambda logits, labels: F.nll_loss(logits, labels)),
        hybrid_wrong("nll_of_softmax", "missing function", "value", "`nll_loss` takes log-probabilities, and gets probabilities: the logarithm is missing.", entropy=lambda logits, labels: F.nll_loss(logits.softmax(1), labels)),
        hybrid_wrong("log_of_softmax", "wrong function", "value", "The logarithm of a softmax is infinite where a probability rounds to 0; `log_softmax` or `cross_entropy` is finite.", entropy=lambda logits, labels: F.nll_loss(logits.softmax(1).log(), labels)),
        hybrid_wrong("softmax_over_batch", "wrong axis", "value", "The softmax is taken over the batch; it runs over the classes of each row.", entropy=lambda logits, labels: F.nll_loss(logits.log_softmax(0), labels)),
        hybrid_wrong("all_classes", "reduction", "value", "The mean over all classes is taken; only the log-probability of each row's own label counts.", entropy=lambda logits, labels: -logits.log_softmax(1).mean()),
        hybrid_wrong("labels_shared", "wrong axis", "value", "Every row is asked about the labels of all rows (`[:, labels]`); each row has one label.", entropy=lambda logits, labels: -logits.log_softmax(1)[:, labels].mean()),
        hybrid_wrong("probability", "missing function", "value", "log_prob is turned into a density by exp; the log-likelihood itself is asked for.", likelihood=lambda p: p.exp().mean()),
        hybrid_wrong("bits", "constant", "value", "log_prob is turned into bits; both terms are in nats.", likelihood=lambda p: p.mean() / math.log(2)),
        hybrid_wrong("accuracy", "wrong function", "value", "The share of wrong labels stands for the cross-entropy; it has no gradient.", entropy=lambda logits, labels: (logits.argmax(1) != labels).double().mean()),
        hybrid_wrong("likelihood_detached", "detached", "gradient", "log_prob is cut off from the computation graph: the flow would not be trained.", likelihood=lambda p: p.detach().mean()),
        hybrid_wrong("entropy_detached", "detached", "gradient", "The cross-entropy is cut off from the computation graph: the classifier would not be trained.", entropy=lambda logits, labels: F.cross_entropy(logits.detach(), labels)),
        hybrid_wrong("detached", "detached", "gradient", "The loss is cut off from the computation graph (detach, item or no_grad).", end=lambda c, p, lam: (c - lam * p).detach()),
        hybrid_wrong("kept", "shape", "value", "The loss has shape (1,); it is one number, of shape ().", end=lambda c, p, lam: (c - lam * p)[None]),
        hybrid_wrong("number", "type", "value", "The loss is a Python number (`item`), which cannot be trained; a tensor of shape () is asked for.", end=lambda c, p, lam: (c - lam * p).item()),
    ),
    compare=(*(f"{name}.loss" for name in HYBRID_NAMES), "hybrid_loss (lam = 0).loss", "hybrid_loss (lam = 1).loss", "gradient.log_prob", "gradient.logits"),
    picture=hybrid_picture,
)


# --- frechet_distance ------------------------------------------------------------------------------------------------

FRECHET_RANK = FRECHET_PAIRS[7:]        # pairs with covariances that are not of full rank
# A root of an eigenvalue that should be 0 has the root of the rounding error, so float32 or a ridge of 1e-6 cost 1e-3 a direction there.
FRECHET_TOLERANCE = {name: 2e-2 if name in FRECHET_RANK else 3e-4 for name in FRECHET_PAIRS}


def frechet_inputs(rng):
    def rows(n, dim, rank=None, shift=1.0):
        rank = rank or dim
        return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, dim)) + shift * rng.standard_normal(dim)

    inputs = {}
    for name, (n, m, dim, rank) in zip(FRECHET_PAIRS, ((9, 14, 2, None), (23, 16, 5, None), (8, 8, 3, None), (12, 12, 4, None), (11, 11, 3, None),
                                                       (10, 10, 3, None), (16, 23, 5, None), (4, 5, 6, None), (20, 30, 6, 3))):
        inputs |= {f"{name}.a": rows(n, dim, rank), f"{name}.b": rows(m, dim, rank)}
    a = inputs["five features.a"]
    inputs |= {"b and a.a": inputs["five features.b"], "b and a.b": a, "one set twice.b": inputs["one set twice.a"]}
    inputs["one set moved.b"] = inputs["one set moved.a"] + rng.standard_normal(4)
    inputs["the rows in another order.b"] = inputs["the rows in another order.a"][rng.permutation(10)]
    # Corners of a cube, so that the covariance is 8 / 7 or 1 times the squares of the axes, in both sets along the same ones.
    cube = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    turn, s = np.linalg.qr(rng.standard_normal((3, 3)))[0], rng.uniform(0.3, 2.0, (2, 3))
    inputs |= {"common axes.a": (cube * s[0]) @ turn.T, "common axes.b": (cube * s[1]) @ turn.T + rng.standard_normal(3), "common axes.scales": s}
    return inputs


def frechet_right(a, b, less):
    """The distance with n - less in the divisor of the covariances, by eigenvectors."""
    s_a, s_b = (np.atleast_2d(np.cov(rows.T, ddof=less)) for rows in (a, b))
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s_b @ root), 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * cross


def frechet_less(inputs, outputs):
    """1 if the answer's covariances have n - 1 in the divisor, 0 if n: both are in use, and either is right if it is the same throughout."""
    got = float(outputs["frechet_distance (five features).distance"])
    a, b = (inputs[f"five features.{k}"] for k in "ab")
    return min((1, 0), key=lambda less: abs(got - frechet_right(a, b, less)))


def frechet_same(inputs, outputs, name, want, why):
    got = float(outputs[f"frechet_distance ({name}).distance"])
    if abs(got - want) > FRECHET_TOLERANCE[name] * (1 + abs(want)):
        a, b = (inputs[f"{name}.{k}"].shape for k in "ab")
        raise Fail(f"The distance is not what it should be{why}.", f"a {a}, b {b}: {laws.expected(want, got)}")


def frechet_value(inputs, outputs, reference):
    less = frechet_less(inputs, outputs)
    for name in FRECHET_PAIRS[:2]:
        frechet_same(inputs, outputs, name, frechet_right(*(inputs[f"{name}.{k}"] for k in "ab"), less), f" for sets of {name}")


def frechet_closed(inputs, outputs, reference):
    """Covariances that commute: |m_a - m_b|^2 + sum of (s_a - s_b)^2."""
    less = frechet_less(inputs, outputs)
    apart = (inputs["common axes.a"].mean(0) - inputs["common axes.b"].mean(0)) ** 2
    s = inputs["common axes.scales"] * math.sqrt(8 / (8 - less))
    frechet_same(inputs, outputs, "common axes", apart.sum() + ((s[0] - s[1]) ** 2).sum(), " for two sets with the same axes, where it is the squared distance of the means and of the standard deviations")
    moved = (inputs["one set moved.a"] - inputs["one set moved.b"])[0]
    frechet_same(inputs, outputs, "one set moved", (moved**2).sum(), " for a set and the same set moved, where it is the squared length of the way")


def frechet_zero(inputs, outputs, reference):
    frechet_value(inputs, outputs, reference)
    for name in FRECHET_PAIRS[4:6]:
        what = "a set and itself" if name == "one set twice" else "a set and its rows in another order"
        scale = np.trace(np.cov(inputs[f"{name}.a"].T))
        if abs(float(outputs[f"frechet_distance ({name}).distance"])) > 1e-3 * (1 + scale):
            raise Fail(f"The distance of {what} is not 0.", f"got {float(outputs[f'frechet_distance ({name}).distance']):.4g}")
    frechet_same(inputs, outputs, "b and a", float(outputs["frechet_distance (five features).distance"]), " when the two sets change places: it should stay as it was")


def frechet_rank(inputs, outputs, reference):
    less = frechet_less(inputs, outputs)
    for name in FRECHET_RANK:
        frechet_same(inputs, outputs, name, frechet_right(*(inputs[f"{name}.{k}"] for k in "ab"), less), f" for {name}, where covariances have eigenvalues 0")


def frechet_kept(inputs, outputs, reference):
    frechet_value(inputs, outputs, reference)
    if not all(outputs[f"{name}.kept"] for name in FRECHET_PAIRS):
        raise Fail("A set of features was changed in place: the caller's tensor was overwritten.")


def frechet_covariance(rows, less=1):
    centred = rows - rows.mean(0)
    return centred.T @ centred / (len(rows) - less)


def frechet_root(matrix):
    """The root of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_cross(s_a, s_b):
    root = frechet_root(s_a)
    return torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()


def frechet_by(covariance=frechet_covariance, means=lambda a, b: (a.mean(0) - b.mean(0)).square().sum(), cross=frechet_cross,
               traces=lambda s_a, s_b: torch.trace(s_a) + torch.trace(s_b), end=lambda m, t, c: m + t - 2 * c):
    """A function `frechet_distance` in its plainest form, in which a mistake changes one part."""

    def frechet_distance(a, b):
        s_a, s_b = covariance(a), covariance(b)
        return end(means(a, b), traces(s_a, s_b), cross(s_a, s_b))

    return function(frechet_distance)


def frechet_negative(s_a, s_b):
    """Roots of eigenvalues as they come: where some should be 0, rounding makes some negative."""
    full = min(torch.linalg.matrix_rank(s_a), torch.linalg.matrix_rank(s_b)) == len(s_a)
    return frechet_cross(s_a, s_b) if full else torch.tensor(math.nan)


def frechet_cholesky(s_a, s_b):
    factor = torch.linalg.cholesky(s_a)
    return torch.linalg.eigvalsh(factor.T @ s_b @ factor).sqrt().sum()


def frechet_in_place(rows):
    rows -= rows.mean(0)
    return rows.T @ rows / (len(rows) - 1)


def frechet_shrunk(inputs):
    """The inputs for which n - 1 in the divisor gives what n gives on the others."""
    changed = {}
    for name in FRECHET_PAIRS:
        for k in "ab":
            rows = inputs[f"{name}.{k}"]
            changed[f"{name}.{k}"] = rows.mean(0) + (rows - rows.mean(0)) * math.sqrt((len(rows) - 1) / len(rows))
    return inputs | changed


def frechet_features(inputs, outputs):
    """The distances; where covariances are not of full rank, and NaN or an exception came, a word for it."""
    found = {}
    for name in FRECHET_PAIRS:
        key = f"frechet_distance ({name}).distance"
        value = outputs.arrays.get(key)
        if value is None:
            kind, sentence = outputs.complaint(key) or outputs.complaint(key.removesuffix(".distance")) or ("", "did not run")
            found[key] = np.asarray("no value" if name in FRECHET_RANK and kind == "raised" else f"{kind}: {sentence.replace(f' ({name})', '')}")
        elif name in FRECHET_RANK:      # to four digits, as different ways to a root differ there
            found[key] = np.asarray("no number") if not np.isfinite(value) else np.round(value, 2)
        else:
            found[key] = np.round(value, 6)
        found[f"{name}.kept"] = outputs.arrays.get(f"{name}.kept", np.asarray(True))
    return found


def frechet_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, frechet_by(**parts))


def frechet_picture(inputs, outputs, reference):
    """The pair of two features with the ellipses of one standard deviation, and the distance of every pair."""
    figure = plotting.Picture(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    t = np.linspace(0, 2 * np.pi, 100)
    for k, colour in zip("ab", ("blue", "orange")):
        rows = inputs[f"two features.{k}"]
        values, vectors = np.linalg.eigh(np.cov(rows.T))
        circle = rows.mean(0) + (np.stack([np.cos(t), np.sin(t)], 1) * np.sqrt(values)) @ vectors.T
        left.plot(*rows.T, "o", markersize=4, color=plotting.PALETTE[colour], label=k), left.plot(*circle.T, color=plotting.PALETTE[colour])
        left.plot(*rows.mean(0), "+", markersize=14, color=plotting.PALETTE[colour])
    left.set_title("two features", fontsize=plotting.FONT), left.legend(fontsize=plotting.FONT - 2, frameon=False)
    height = np.arange(len(FRECHET_PAIRS))
    theirs = [float(reference.arrays[f"frechet_distance ({n}).distance"]) for n in FRECHET_PAIRS]
    right.barh(height, theirs, color="#cccccc", label="reference")
    mine = [(i, float(outputs.arrays[key])) for i, n in enumerate(FRECHET_PAIRS) if (key := f"frechet_distance ({n}).distance") in outputs and np.isfinite(outputs.arrays[key])]
    if mine:
        right.plot([np.clip(v, -1, 1.5 * max(theirs)) for _, v in mine], [i for i, _ in mine], "D", color=plotting.PALETTE["red"], label="yours")
    else:
        right.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    right.set_yticks(height, FRECHET_PAIRS, fontsize=plotting.FONT - 4), right.invert_yaxis()
    right.set_title("distance", fontsize=plotting.FONT), right.legend(fontsize=plotting.FONT - 2, frameon=False)
    return figure


FRECHET = Exercise(
    id="frechet_distance", title="The Frechet distance", minutes=12, difficulty=3,
    hints=(
        "Means and covariances of both sets first: `a.mean(0)`, `torch.cov(a.T)`. The means give a squared length; the covariances give two traces and the trace of a root. No eigenvectors of the root are needed: its trace is the sum of its eigenvalues.",
        "The eigenvalues of (S_a S_b)^(1/2) are the roots of those of S_a S_b, which are real and at least 0 though S_a S_b is not symmetric. `torch.linalg.eigvals` gives them as complex numbers, and rounding may leave one that should be 0 a little below it: take the real part and clamp at 0 before the root.",
    ),
    inputs=frechet_inputs, reference=flowkit_class("images", "frechet_distance"),
    cases=(
        Case("|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))", 2, frechet_value),
        Case("Gaussians in closed form: common axes, and a set that was moved", 1, frechet_closed),
        Case("0 for equal sets, and the same for b and a", 1, frechet_zero),
        Case("covariances that are not of full rank", 1, frechet_rank),
        Case("inputs are left as they were", 0.5, frechet_kept),
    ),
    misconceptions=(
        frechet_wrong("no_means", "missing term", "value", "The distance of the means is missing.", means=lambda a, b: 0.0),
        frechet_wrong("only_means", "missing term", "value", "Only the means are compared: the covariances have no effect.", end=lambda m, t, c: m),
        frechet_wrong("means_not_squared", "missing function", "value", "The distance of the means is not squared.", means=lambda a, b: (a.mean(0) - b.mean(0)).norm()),
        frechet_wrong("means_absolute", "wrong function", "value", "The means' differences are added up without their squares (absolute values).", means=lambda a, b: (a.mean(0) - b.mean(0)).abs().sum()),
        frechet_wrong("means_averaged", "reduction", "value", "The squared differences of the means are averaged over the features; they are added up.", means=lambda a, b: (a.mean(0) - b.mean(0)).square().mean()),
        frechet_wrong("one_mean", "reduction", "value", "Each set has one mean over all features; every feature has its own.", means=lambda a, b: (a.mean() - b.mean()).square()),
        frechet_wrong("means_sign", "sign", "value", "The distance of the means is subtracted; it is added.", end=lambda m, t, c: t - 2 * c - m),
        frechet_wrong("no_cross", "missing term", "value", "The term -2 tr (S_a S_b)^(1/2) is missing, so equal sets have a distance.", end=lambda m, t, c: m + t),
        frechet_wrong("cross_sign", "sign", "value", "2 tr (S_a S_b)^(1/2) is added; it is subtracted, so that equal sets have the distance 0.", end=lambda m, t, c: m + t + 2 * c),
        frechet_wrong("no_two", "missing term", "value", "The factor 2 before tr (S_a S_b)^(1/2) is missing, so equal sets have a distance.", end=lambda m, t, c: m + t - c),
        frechet_wrong("no_traces", "missing term", "value", "The traces of S_a and S_b are missing.", end=lambda m, t, c: m - 2 * c),
        frechet_wrong("one_trace", "missing term", "value", "The trace of S_b is missing.", traces=lambda s_a, s_b: torch.trace(s_a)),
        frechet_wrong("other_trace", "missing term", "value", "The trace of S_a is missing.", traces=lambda s_a, s_b: torch.trace(s_b)),
        frechet_wrong("traces_sign", "sign", "value", "The trace of S_b is subtracted; it is added.", traces=lambda s_a, s_b: torch.trace(s_a) - torch.trace(s_b)),
        frechet_wrong("all_entries", "reduction", "value", "All entries of the covariances are summed; a trace is the sum along the diagonal.", traces=lambda s_a, s_b: (s_a + s_b).sum()),
        frechet_wrong("no_root", "missing function", "value", "The trace of S_a S_b is taken without the root.", cross=lambda s_a, s_b: torch.trace(s_a @ s_b)),
        frechet_wrong("root_of_trace", "order", "value", "The root is taken of the trace of S_a S_b; it is the trace of the root.", cross=lambda s_a, s_b: torch.trace(s_a @ s_b).clamp_min(0).sqrt()),
        frechet_wrong("elementwise_root", "wrong function", "value", "The root is taken of each entry of S_a S_b; the root of a matrix is another thing, whose square as a matrix is S_a S_b.", cross=lambda s_a, s_b: torch.trace((s_a @ s_b).sqrt())),
        frechet_wrong("product_of_roots", "wrong function", "value", "The trace of S_a^(1/2) S_b^(1/2) is taken: that is right only if the two covariances have the same axes.", cross=lambda s_a, s_b: torch.trace(frechet_root(s_a) @ frechet_root(s_b))),
        frechet_wrong("elementwise_product", "wrong function", "value", "S_a and S_b are multiplied entry by entry; a product of matrices is meant.", cross=lambda s_a, s_b: torch.linalg.eigvalsh(s_a * s_b).clamp_min(0).sqrt().sum()),
        frechet_wrong("symmetric_solver", "wrong function", "value", "S_a S_b is not symmetric, but its eigenvalues are taken by `eigvalsh`, which looks at one triangle only.", cross=lambda s_a, s_b: torch.linalg.eigvalsh(s_a @ s_b).clamp_min(0).sqrt().sum()),
        frechet_wrong("singular_values", "wrong function", "value", "The singular values of S_a S_b are taken for its eigenvalues; the matrix is not symmetric, so they are others.", cross=lambda s_a, s_b: torch.linalg.svdvals(s_a @ s_b).sqrt().sum()),
        frechet_wrong("eigenvalues_apart", "wrong function", "value", "The roots of the eigenvalues of S_a and of S_b are multiplied one by one, as if the two had the same axes.", cross=lambda s_a, s_b: (torch.linalg.eigvalsh(s_a).clamp_min(0) * torch.linalg.eigvalsh(s_b).clamp_min(0)).sqrt().sum()),
        frechet_wrong("diagonal", "wrong function", "value", "Only the variances of the features are compared; how features go together, the rest of the covariance, is left out.", covariance=lambda rows: torch.diag(rows.var(0)), cross=lambda s_a, s_b: (torch.diagonal(s_a) * torch.diagonal(s_b)).sqrt().sum()),
        frechet_wrong("not_centred", "missing term", "value", "The covariance is that of rows that are not centred: the mean is still in it.", covariance=lambda rows: rows.T @ rows / (len(rows) - 1)),
        frechet_wrong("not_divided", "missing term", "value", "The covariance is not divided by the number of rows.", covariance=lambda rows: (rows - rows.mean(0)).T @ (rows - rows.mean(0))),
        frechet_wrong("wrong_axis", "wrong axis", "value", "The covariance is one of the rows; it is one of the features: `torch.cov` wants features in rows, a.T.", covariance=lambda rows: torch.cov(rows)),
        frechet_wrong("correlation", "wrong function", "value", "Correlations stand for covariances: the features' spread is lost.", covariance=lambda rows: torch.corrcoef(rows.T)),
        frechet_wrong("rooted", "extra term", "value", "A root is taken of the whole: what is asked for, and what FID is, is the squared distance.", end=lambda m, t, c: (m + t - 2 * c).clamp_min(0).sqrt()),
        frechet_wrong("negative_roots", "missing function", "value", "Where a covariance is not of full rank, eigenvalues that should be 0 come out a little below it, and their roots are NaN: clamp them at 0 first.", cross=frechet_negative),
        frechet_wrong("cholesky", "wrong function", "value", "A covariance that is not of full rank, as one of fewer rows than features, is refused (by a Cholesky factor or an inverse); its eigenvalues 0 are allowed.", cross=frechet_cholesky),
        frechet_wrong("in_place", "in place", "input", "The rows are centred in place (`-=`): the caller's features are overwritten, and their means with them.", covariance=frechet_in_place),
    ),
    features=frechet_features, compare=tuple(f"frechet_distance ({name}).distance" for name in FRECHET_PAIRS),
    variants=(frechet_shrunk,), picture=frechet_picture,
)


EXERCISES = (BITS, SQUEEZE, CONV, COUPLED, GATED_CONV, GATED_ATTENTION, DEQ, FACTOR, SCALE, TEMPERATURE, FRECHET, HYBRID)
