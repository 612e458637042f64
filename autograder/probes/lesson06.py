"""How to run the answers of lesson 06 (flows on images)."""
import contextlib
import itertools
import math

import numpy as np
import torch
from torch import distributions, nn
from torch.nn import functional as F

from autograder.probes.common import tanh_net
from autograder.probes.lesson02 import Wrapped, build, gradients, scalar_loss, weights
from autograder.probes.lesson05 import (
    SurvaeNoise, SurvaeNormal, cell_density, survae_double, survae_forward, survae_gradient, survae_run, survae_weights,
)
from autograder.probes.record import (
    Complaint, Record, Stop, bijection, describe, is_module, one_line, parameters, part, plain, quiet_world, saved, tensor, to_float,
    unpack, words,
)

def channels_last(t):
    """The same images with other strides: the channels last in memory, as behind a permute or an einsum."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def not_contiguous(what, f, t):
    """f of the images t with other strides; that `view` cannot take these apart is said in other words than torch's."""
    try:
        return f(channels_last(t))
    except RuntimeError as e:
        if type(e) is RuntimeError and "view size" in one_line(e):
            raise Complaint(f"{what} fails for images that are not contiguous in memory, as they are behind a permute or a 1x1 convolution: "
                            "`view` cannot join dimensions of these") from None
        raise


def once_more(record, step, layer, inputs, ldj="ldj", inverse=True):
    """The same images in another order and with other strides, after all else: nothing may be kept from the calls before."""
    with contextlib.suppress(Stop):
        record.many(step + "forward once more", lambda: not_contiguous("forward", layer.forward, tensor(inputs["x"]).flip(0)), "z", ldj)
    with contextlib.suppress(Stop):
        if inverse:
            record.one(step + "inverse once more", lambda: not_contiguous("inverse", layer.inverse, tensor(inputs["z"]).flip(0)), "x")


# --- bits_per_dim ----------------------------------------------------------------------------------------------------

BITS_CALLS = (((1, 8, 8), 17), ((3, 4, 6), 256), ((2, 5, 3), 1))    # (C, H, W), levels


def bits_step(shape, levels):
    return f"bits_per_dim(log_prob, {shape}, {levels})"


def bits_per_dim(objects, inputs):
    (f,) = objects
    record = Record()

    def one_call(shape, levels):
        step, given = bits_step(shape, levels), inputs[bits_step(shape, levels)]

        def trained():
            """The value, what became of the argument, and the gradient of a weighted sum of the values."""
            leaf = tensor(given).requires_grad_()
            sent = leaf * 1     # no leaf, as out of a flow: so that to write into it is possible, and seen
            ((bits, _),) = unpack(step, f(sent, shape, levels), "bits")
            return leaf, sent, bits

        leaf, sent, bits = record.run(step, trained)
        record.one(step, lambda: bits, "bits")
        record.keep(f"{step} after", lambda: sent)

        def gradient():
            if not bits.requires_grad or bits.numel() != leaf.numel():
                return torch.zeros_like(leaf)
            (g,) = torch.autograd.grad((tensor(inputs["c"]) * bits.reshape(-1)).sum(), leaf, allow_unused=True)
            return torch.zeros_like(leaf) if g is None else g

        record.one(f"gradient of {step}", gradient, "gradient")
        with contextlib.suppress(Stop):
            record.one(f"{step} of a uniform density", lambda: f(torch.zeros(4), shape, levels), "bits")
        with contextlib.suppress(Stop):
            record.one(f"{step} of one image", lambda: f(tensor(given[:1]), shape, levels), "bits")

    with quiet_world():
        for shape, levels in BITS_CALLS:
            with contextlib.suppress(Stop):
                one_call(shape, levels)
        with contextlib.suppress(Stop):
            if "line" in inputs:
                record.one("bits_per_dim on the line", lambda: f(tensor(inputs["line"]), *BITS_CALLS[0]), "bits")
    return record


# --- squeeze ---------------------------------------------------------------------------------------------------------

SQUEEZE_SHAPES = ((3, 1, 4, 6), (2, 3, 6, 2), (1, 2, 2, 4))


def squeezed_shape(shape):
    B, C, H, W = shape
    return B, 4 * C, H // 2, W // 2


def squeeze_steps(shape):
    """(step, the function's index, the input's name) of both functions for images of that shape."""
    return (f"squeeze of shape {shape}", 0, f"x {shape}"), (f"unsqueeze of shape {squeezed_shape(shape)}", 1, f"z {shape}")


def squeeze(objects, inputs):
    record = Record()

    def graphed(step, f, given):
        leaf = tensor(given).requires_grad_()
        sent = leaf * 1
        ((y, _),) = unpack(step, f(sent), "value")
        return leaf, sent, y

    def gradient(leaf, y):
        """The gradient of the sum of all values, each weighted by its number."""
        if not y.requires_grad:
            return torch.zeros_like(leaf)
        (g,) = torch.autograd.grad((y.reshape(-1) * torch.arange(1, y.numel() + 1, dtype=y.dtype)).sum(), leaf, allow_unused=True)
        return torch.zeros_like(leaf) if g is None else g

    def whole(i, given):
        """Of integers, as the digits are; what torch cannot do with these is not an unsolved exercise."""
        try:
            y = plain("value", objects[i](given))
        except (NotImplementedError, RuntimeError) as e:
            text = one_line(e)
            if not text.startswith("exercise ") and ("not implemented for" in text or "Long" in text or "type" in text):
                raise Complaint(f"{('squeeze', 'unsqueeze')[i]} fails for images of integers, as the digits are: torch has the function that it uses for floating-point numbers only") from None
            raise
        if y.dtype != given.dtype:
            raise Complaint(f"{('squeeze', 'unsqueeze')[i]} makes {y.dtype} of integers: it gives another type of number than it gets")
        return y

    with quiet_world():
        for shape in SQUEEZE_SHAPES:
            for step, i, name in squeeze_steps(shape):
                with contextlib.suppress(Stop):
                    given = inputs[name]
                    leaf, sent, y = record.run(step, lambda step=step, i=i, given=given: graphed(step, objects[i], given))
                    record.one(step, lambda y=y: y, "value")
                    record.keep(f"{step} after", lambda sent=sent: sent)
                    record.one(f"gradient of {step}", lambda leaf=leaf, y=y: gradient(leaf, y), "gradient")
                    there_and_back = f"{('unsqueeze', 'squeeze')[i]} after {step}"
                    record.one(there_and_back, lambda i=i, y=y: objects[1 - i](y.detach().double()), "value")
        for step, i, name in squeeze_steps(SQUEEZE_SHAPES[1]):
            with contextlib.suppress(Stop):
                record.one(f"{step}, strided", lambda i=i, name=name: not_contiguous(("squeeze", "unsqueeze")[i], objects[i], tensor(inputs[name])), "value")
        for step, i, name in squeeze_steps(SQUEEZE_SHAPES[2]):
            with contextlib.suppress(Stop):
                record.one(f"{step} of integers", lambda i=i, name=name: whole(i, tensor(inputs[name]).long()), "value")
        for step, i, name in reversed(squeeze_steps(SQUEEZE_SHAPES[0])):    # unsqueeze first: squeeze had another shape before
            with contextlib.suppress(Stop):
                record.one(f"{step} in float32", lambda i=i, name=name: objects[i](tensor(inputs[name], torch.float32)), "value")
        with contextlib.suppress(Stop):
            if "photo" in inputs:
                record.one("picture", lambda: objects[0](tensor(inputs["photo"])), "value")
    return record


squeeze.takes = 2


# --- conv1x1 ---------------------------------------------------------------------------------------------------------

CONV_IMAGES = {"D=24 ": (3, 2, 4), "D=30 ": (2, 5, 3)}      # (C, H, W), by what the steps are called
CONV_OTHER = (3, 4, 3)      # another size of image for the layer of the first


def in_double(name, make, *args):
    """A layer as an answer makes it, in double precision if it is a module, in which the judge's differences need it."""
    layer = make(*args)
    return layer.double() if is_module(layer) else layer


def conv1x1(objects, inputs):
    (Conv1x1,) = objects
    record = Record()
    seed = int(inputs["noise"])

    def trainable(layer):
        if not is_module(layer):
            raise Complaint(f"Conv1x1 should be an nn.Module, so that its weights can be trained; it is {describe(layer)}")
        return [p for p in parameters("Conv1x1", layer) if p.requires_grad]

    def nudge(params, t, noise):
        with torch.no_grad():
            for p in params:
                p.add_(t * torch.randn(p.shape, generator=noise, dtype=p.dtype))

    def gradients(layer, params, mine):
        def value():
            (z, _), (ldj, _) = unpack("forward", layer.forward(tensor(mine["x"])), "z", "ldj")
            return scalar_loss(z, ldj, mine)

        def along():
            loss = value()
            if not (params and loss.requires_grad):
                return torch.zeros(2)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            noise = torch.Generator().manual_seed(seed)
            steps = [torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in params]
            found = sum((g * s).sum() for g, s in zip(grads, steps) if g is not None) + torch.zeros(())
            return torch.stack([found, torch.tensor(float(sum(int((g != 0).sum()) for g in grads if g is not None)))])

        def nudged():
            values = []
            for t in mine["nudges"]:
                nudge(params, t, torch.Generator().manual_seed(seed))
                values.append(value().detach())
                nudge(params, -t, torch.Generator().manual_seed(seed))
            return torch.stack(values)

        with contextlib.suppress(Stop):
            record.one("gradient", along, "along")
            record.one("gradient", nudged, "nudged")

    def reloaded(layer, x):
        fresh = in_double("Conv1x1", Conv1x1, x.shape[1])
        fresh.load_state_dict(saved("Conv1x1", layer))
        return fresh.forward(tensor(x))

    def same_for_all(params):
        with torch.no_grad():
            for shape, values in ((inputs["squares"].shape[1:], inputs["squares"]), (inputs["vectors"].shape[1:], inputs["vectors"])):
                for p, value in zip([p for p in params if p.squeeze().shape == shape], values):
                    p.copy_(tensor(value).reshape(p.shape))

    with quiet_world(seed):
        for size, (C, _, _) in CONV_IMAGES.items():
            mine = part(inputs, size)
            if not mine:
                continue
            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda C=C: in_double("Conv1x1", Conv1x1, C))
                record.many(size + "start", lambda: layer.forward(tensor(mine["x"])), "z", "ldj")
                params = record.run(size + "parameters", lambda: trainable(layer))
                record.run(size + "parameters", lambda: nudge(params, 0.3, torch.Generator().manual_seed(seed + 1)))
                bijection(record, size, layer, mine)
                once_more(record, size, layer, mine)
                if size != "D=24 ":
                    continue
                with contextlib.suppress(Stop):
                    record.many("forward of other images", lambda: layer.forward(tensor(inputs["other"])), "z", "ldj")
                gradients(layer, params, mine)
                with contextlib.suppress(Stop):
                    record.many("after load_state_dict", lambda: reloaded(layer, mine["x"]), "z", "ldj")
                # The numbers that most layers of this kind have, set to the judge's: so a slip can be recognised, whatever they start
                # from; and a matrix that is a parameter itself has a negative determinant.
                with contextlib.suppress(Stop):
                    record.run("same numbers", lambda: same_for_all(params))
                    bijection(record, "same numbers ", layer, mine)
    return record


# --- image_coupling --------------------------------------------------------------------------------------------------

COUPLED_IMAGES = {"D=12 ": (2, 2, 3), "D=24 ": (4, 3, 2)}


def image_net(w):
    """The function (B, C1, H, W) -> (B, c_out, H, W) with the judge's weights: a 3x3 convolution, tanh, a 1x1 convolution."""

    def net(x):
        return F.conv2d(torch.tanh(F.conv2d(x, w["W1"], w["b1"], padding=1)), w["W2"], w["b2"])

    return net


def image_forms(w):
    """The forms of a net that an answer may expect, as `net_forms` of lesson 02: one output, a tuple, a pair."""
    half = len(w["b2"]) // 2
    alpha, mu = (image_net({**w, "W2": w["W2"][at], "b2": w["b2"][at]}) for at in (slice(half), slice(half, None)))
    pair = Wrapped(alpha), Wrapped(mu)
    return [("one output", Wrapped(image_net(w))), ("tuple", Wrapped(lambda x: (alpha(x), mu(x)))), ("pair", pair), ("ModuleList", nn.ModuleList(pair))]


def image_coupling(objects, inputs):
    (ImageCoupling,) = objects
    record = Record()
    with quiet_world():
        for size in COUPLED_IMAGES:
            mine = part(inputs, size)
            if not mine:
                continue
            with contextlib.suppress(Stop):
                layer, form = build(record, size, ImageCoupling, image_forms(weights(mine)), tensor(mine["x"]))
                bijection(record, size, layer, mine)
                gradients(record, size, lambda w, form=form: ImageCoupling(image_forms(w)[form][1]), mine)

                def without_graph():
                    with torch.no_grad():
                        return layer.forward(tensor(mine["x"]))

                with contextlib.suppress(Stop):
                    record.many(size + "forward under no_grad", without_graph, "z", "ldj")
                once_more(record, size, layer, mine)

                def along_x(mine=mine, layer=layer):
                    """The derivative of the loss along a direction in x: by autograd, and the loss at points nearby."""
                    side = torch.randn(mine["x"].shape, generator=torch.Generator().manual_seed(0))

                    def loss(x):
                        (z, _), (ldj, _) = unpack("forward", layer.forward(x), "z", "ldj")
                        return scalar_loss(z, ldj, mine)

                    leaf = tensor(mine["x"]).requires_grad_()
                    value = loss(leaf * 1)
                    g = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
                    near = torch.stack([loss(tensor(mine["x"]) + t * side).detach() for t in mine["nudges"]])
                    return (torch.zeros(()) if g is None else (g * side).sum()), near

                with contextlib.suppress(Stop):
                    record.many(size + "gradient of x", along_x, "along", "nudged")

                def found(form=form, mine=mine):
                    """Whether parameters() of a layer that is a module gives those of a net that is a single module."""
                    net = image_forms(weights(mine))[form][1]
                    if form > 1:
                        return True
                    net.own = nn.Parameter(torch.zeros(()))
                    layer = ImageCoupling(net)
                    return not is_module(layer) or any(p is net.own for p in itertools.islice(layer.parameters(), 100))

                with contextlib.suppress(Stop):
                    record.keep(size + "parameters.found", found)
    return record


# --- gated blocks: gated_conv, gated_attention -----------------------------------------------------------------------

GATE_NUDGES = (-1.0, 1.0, 2.0, -40.0, 40.0)     # of one number of the parameters at a time
GATE_ROWS = 160     # so many numbers at most
GATE_STEP = 1e-9    # of the gradient's differences: so small that a kink, as of a ReLU, hardly ever lies between
GATE_NEAR_ZERO = 1e-14


def block_made(record, x, make, *args):
    """The block in evaluation mode (dropout off) and in double precision, and its parameters."""

    def made():
        layer = make(*args)
        if not is_module(layer):
            record.run("forward", lambda: layer.forward(x))     # what is not solved, or raises, says so itself
            raise Complaint(f"the block should be an nn.Module, so that its weights can be trained; it is {describe(layer)}")
        layer.double().eval()
        return layer, [p for p in parameters("the block", layer) if p.requires_grad]

    return record.run("construction", made)


def block_shake(params, seed, scale=1.0, biases=True):
    """Weights of order one times `scale`, the same for all blocks of one layout; gains, which start at one, stay near it."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params:
            new = torch.randn(p.shape, generator=noise, dtype=p.dtype)
            if p.dim() > 1:
                new = new / (p.numel() / p.shape[0]) ** 0.5
            else:
                gain = bool((p == 1).all()) if not hasattr(p, "was_gain") else p.was_gain
                p.was_gain = gain
                new = 1 + 0.2 * new if gain else 0.3 * new * biases
            p.copy_(scale * new)


def block_call(layer, x, name="forward"):
    """forward without a graph, on a copy of x, and its one result."""
    with torch.no_grad():
        ((y, _),) = unpack(name, layer.forward(x.clone()), "y")
    return y


def block_gates(record, step, layer, params, x, channels, seed):
    """What forward gives, and what when single numbers of the parameters move: one for each row (or column) that may belong to a channel's gate;
    and what is left when all weights are near zero."""
    y = record.one(step, lambda: block_call(layer, x, step), "y")
    if y.shape != x.shape:
        return

    def moved():
        places = []
        for p in reversed(params):
            fits = [n in (channels, 2 * channels) for n in p.shape[:2]]
            axes = [0] if fits[:1] == [True] else []
            if p.dim() == 2 and fits[1] and p.shape[0] != 2 * channels:     # a matrix may have the outputs last
                axes.append(1)
            for axis in axes:
                rest = [n // 2 if i > 1 else 0 for i, n in enumerate(p.shape)]
                places += [(p, (*rest[:axis], r, *rest[axis + 1:])) for r in range(p.shape[axis])]
        found = []
        for p, at in places[:GATE_ROWS]:
            for t in GATE_NUDGES:
                found.append(nudged_call(p, at, t))
        return torch.stack(found).reshape(-1, len(GATE_NUDGES), *y.shape) if found else torch.zeros(0, len(GATE_NUDGES), *y.shape)

    def nudged_call(p, at, t):
        """forward with one number moved; what is done around it does not count as the answer's own work (autograder.slips.Budget)."""
        with torch.no_grad():
            with torch._C.DisableTorchFunction():
                before, sent = p[at].clone(), x.clone()
                p[at] += t
            try:
                result = layer.forward(sent)
            finally:
                with torch._C.DisableTorchFunction():
                    p[at] = before
            with torch._C.DisableTorchFunction():
                result = plain(step, result)
                if result.shape != y.shape:
                    raise Complaint(f"{step}: the result has another shape from call to call")
                return result

    record.one(f"{step} with nudged weights", moved, "y")
    record.run(f"{step} near zero", lambda: block_shake(params, seed, GATE_NEAR_ZERO))
    record.one(f"{step} near zero", lambda: block_call(layer, x, step), "y")
    record.run(f"{step} near zero", lambda: block_shake(params, seed))


def block_gradient(record, layer, params, x, c, seed):
    """The derivative of (c * y).sum() along a direction in the weights, and in one in x: by autograd, and from values nearby."""
    noise = torch.Generator().manual_seed(seed)
    steps = [torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in params]
    side = torch.randn(x.shape, generator=noise, dtype=x.dtype)

    def loss(x):
        ((y, _),) = unpack("forward", layer.forward(x), "y")
        if y.shape != c.shape:
            raise Complaint(f"forward makes shape {tuple(y.shape)} of x with shape {tuple(x.shape)}; the shape should be kept")
        return (c * y).sum()

    def along():
        leaf = x.clone().requires_grad_()
        value = loss(leaf * 1)
        if not value.requires_grad:
            return torch.zeros(2)
        grads = torch.autograd.grad(value, [leaf, *params], allow_unused=True)
        return torch.stack([sum(((g * s).sum() for g, s in zip(grads[1:], steps) if g is not None), torch.zeros(())),
                            torch.zeros(()) if grads[0] is None else (grads[0] * side).sum()])

    def nudged():
        found = []
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for k in (-2, -1, 1, 2):
                for p, b, s in zip(params, before, steps):
                    p.copy_(b + k * GATE_STEP * s)
                found.append(loss(x.clone()))
            for p, b in zip(params, before):
                p.copy_(b)
            found += [loss(x + k * GATE_STEP * side) for k in (-2, -1, 1, 2)]
        return torch.stack(found).reshape(2, 4)

    with contextlib.suppress(Stop):
        record.one("gradient", along, "along")
        record.one("gradient", nudged, "nudged")


def block_copy(make, args, layer, x):
    """What a fresh block gives that was loaded with this one's weights."""
    fresh = make(*args).double().eval()
    fresh.load_state_dict(saved("the block", layer))
    return block_call(fresh, x)


def block_common(record, layer, params, inputs, seed, make, *args):
    """What both blocks are asked: one image, images of other sizes, the input afterwards, weights near zero, the same again, a loaded copy."""
    x = tensor(inputs["x"])
    sent = x.clone()

    def whole():
        ((y, _),) = unpack("forward", layer.forward(sent), "y")
        return y

    with contextlib.suppress(Stop):
        record.one("forward of a batch", whole, "y")
        record.keep("x after", lambda: sent)
    with contextlib.suppress(Stop):
        record.one("forward once more", lambda: block_call(layer, x), "y")
        record.one("forward after load_state_dict", lambda: block_copy(make, args, layer, x), "y")
    with contextlib.suppress(Stop):
        record.one("forward of one image", lambda: block_call(layer, x[:1]), "y")
    with contextlib.suppress(Stop):
        record.one("forward of other images", lambda: block_call(layer, tensor(inputs["other"])), "y")
    record["number of parameters"] = np.array(sum(p.numel() for p in params))
    block_gradient(record, layer, params, x, tensor(inputs["c"]), seed)
    with contextlib.suppress(Stop):
        record.run("forward with weights near zero", lambda: block_shake(params, seed, GATE_NEAR_ZERO))
        record.one("forward with weights near zero", lambda: block_call(layer, x), "y")
        record.run("forward with weights near zero", lambda: block_shake(params, seed))


def gated_conv(objects, inputs):
    (GatedConv,) = objects
    record, seed = Record(), int(inputs["noise"])
    with quiet_world(), contextlib.suppress(Stop):
        C = inputs["x"].shape[1]
        layer, params = block_made(record, tensor(inputs["x"]), GatedConv, C)
        record.run("parameters", lambda: block_shake(params, seed))
        block_common(record, layer, params, inputs, seed, GatedConv, C)
        with contextlib.suppress(Stop):
            block_gates(record, "forward", layer, params, tensor(inputs["line"]), C, seed)
        with contextlib.suppress(Stop):
            record.one("forward of images with one changed number", lambda: block_call(layer, tensor(inputs["spots"])), "y")
    return record


def block_unused(layer, params, x, c):
    """How many rows of the matrices among the weights have no influence on the result at all."""
    ((y, _),) = unpack("forward", layer.forward(x.clone()), "y")
    wide = [p for p in params if p.dim() > 1]
    if not y.requires_grad or y.shape != c.shape or not wide:
        return torch.zeros(())
    grads = torch.autograd.grad((c * y).sum(), wide, allow_unused=True)
    return torch.tensor(float(sum(len(p) if g is None else int((g == 0).flatten(1).all(1).sum()) for p, g in zip(wide, grads))))


def gated_attention(objects, inputs):
    (GatedAttention,) = objects
    record, seed = Record(), int(inputs["noise"])
    C = inputs["x"].shape[1]

    def of_heads(heads):
        step = f"forward with {heads} head{'s' * (heads > 1)}"
        layer, params = block_made(record, tensor(inputs["x"]), GatedAttention, C, heads)
        record.run("parameters", lambda: block_shake(params, seed))
        if heads == 2:
            block_common(record, layer, params, inputs, seed, GatedAttention, C, heads)
            record.one("weights without influence", lambda: block_unused(layer, params, tensor(inputs["x"]), tensor(inputs["c"])), "count")
            with contextlib.suppress(Stop):
                record.one("forward of images with one changed pixel", lambda: block_call(layer, tensor(inputs["spots"])), "y")
            with contextlib.suppress(Stop):
                record.one("forward of one spot", lambda: block_call(layer, tensor(inputs["spot"])), "y")
        probe = tensor(inputs["probe"])
        with contextlib.suppress(Stop):
            if heads < 4:
                block_gates(record, step, layer, params, probe, C, seed)
            else:
                record.one(step, lambda: block_call(layer, probe), "y")
        with contextlib.suppress(Stop):
            record.run(step, lambda: block_shake(params, seed, biases=False))
            record.one(f"{step}, no biases", lambda: block_call(layer, torch.cat([probe, 2 * probe, 0 * probe[:1], 1e-4 * probe[:1], 2e-4 * probe[:1]])), "y")

    with quiet_world():
        for heads in (2, 1, 4):
            with contextlib.suppress(Stop):
                of_heads(heads)
    return record


# --- variational_dequantization --------------------------------------------------------------------------------------

DEQ_SHAPES = {"D=6 ": (2, 1, 3), "D=12 ": (1, 4, 3)}  # channels, height, width: neither square nor alike


class DeqProposal(nn.Module):
    """A proposal of the judge's numbers, and how often it was asked. Asked again it gives those of the next rows."""

    def __init__(self, v, log_q):
        super().__init__()
        self.v, self.log_q, self.asked = v, log_q, 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        turn, self.asked = self.asked, self.asked + 1
        return self.scale * self.v.roll(-turn, 0)[:len(x)], self.log_q.roll(-turn, 0)[:len(x)]


class DeqTrained(nn.Module):
    """The smallest q that can be trained: v = a_x + b_x eps, with a and b for each integer, eps the judge's normal points."""

    def __init__(self, eps, levels):
        super().__init__()
        self.eps, self.a, self.log_b = eps, nn.Parameter(torch.zeros(levels)), nn.Parameter(torch.full((levels,), 0.4))

    def forward(self, x):
        a, log_b = self.a[x.long()], self.log_b[x.long()]
        log_q = -0.5 * self.eps**2 - 0.5 * math.log(2 * math.pi) - log_b
        return a + log_b.exp() * self.eps, log_q.flatten(1).sum(1)


def variational_dequantization(objects, inputs):
    (VariationalDequantizer,) = objects
    record = Record()

    def proposal(mine, name=""):
        return DeqProposal(tensor(mine[name + "v"]), tensor(mine[name + "log_q"]))

    def forward(step, mine, name="", rows=None):
        """Forward of a fresh layer; which layer, which q and the x that was sent."""
        q = proposal(mine, name)
        layer = record.run(step.removesuffix("forward") + "construction", lambda: VariationalDequantizer(q, int(mine["levels"])))
        x = tensor(mine["x"][:rows])
        found = record.many(step, lambda: layer.forward(x), "y", "contribution")
        return layer, q, x, found[0]

    def one_size(size, mine):
        with contextlib.suppress(Stop):
            layer, q, x, y = forward(size + "forward", mine)
            record[size + "asked"] = np.array(q.asked)
            record.keep(size + "x after", lambda: x)
            record.one(size + "inverse of forward", lambda: layer.inverse(y.detach().double()), "x")
            record.many(size + "forward again", lambda: layer.forward(tensor(mine["x"])), "y", "contribution")
        with contextlib.suppress(Stop):
            layer = record.run(size + "construction", lambda: VariationalDequantizer(proposal(mine), int(mine["levels"])))
            y = tensor(mine["y"])
            record.one(size + "inverse", lambda: layer.inverse(y), "x")
            record.keep(size + "y after", lambda: y)
            record.one(size + "inverse of one row", lambda: layer.inverse(tensor(mine["y"][:1])), "x")
        for step, name, rows in (("forward of one row", "", 1), ("forward far out", "far ", None), ("forward with a uniform q", "uniform ", None)):
            with contextlib.suppress(Stop):
                forward(size + step, mine, name, rows)
        with contextlib.suppress(Stop):
            record.many(size + "gradient", lambda: gradient(mine), "v", "log_q")

    def gradient(mine):
        """The gradients of a weighted sum of y and contribution in what q gave."""
        q = proposal(mine)
        v, log_q = q.v.requires_grad_(), q.log_q.requires_grad_()
        (y, _), (paid, _) = unpack("forward", VariationalDequantizer(q, int(mine["levels"])).forward(tensor(mine["x"])), "y", "contribution")
        value = torch.zeros(())
        if y.shape == v.shape:
            value = value + (tensor(mine["c"]) * y).sum()
        if paid.numel() == len(v):
            value = value + (tensor(mine["r"]) * paid.reshape(-1)).sum()
        if not value.requires_grad:
            return torch.zeros_like(v), torch.zeros_like(log_q)
        by_v, by_log_q = torch.autograd.grad(value, (v, log_q), allow_unused=True)
        return torch.zeros_like(v) if by_v is None else by_v, torch.zeros_like(log_q) if by_log_q is None else by_log_q

    def found():
        """Whether parameters() of a layer that is a module gives the weights of q; one that is no module cannot be asked."""
        q = proposal(part(inputs, "D=6 "))
        layer = VariationalDequantizer(q, 2)
        return not is_module(layer) or any(p is q.scale for p in itertools.islice(layer.parameters(), 100))

    def train():
        x, levels = tensor(inputs["train.x grid"]), int(inputs["train.K"])
        q, density = DeqTrained(tensor(inputs["train.eps grid"]), levels), cell_density(part(inputs, "density."))
        layer = VariationalDequantizer(q, levels)

        optimiser = torch.optim.Adam(q.parameters(), lr=float(inputs["train.rate"]))
        for _ in range(int(inputs["train.steps"])):
            optimiser.zero_grad()
            (y, _), (paid, _) = unpack("forward", layer.forward(x), "y", "contribution")
            if not (y.requires_grad and paid.requires_grad):
                raise Complaint("forward is cut off from the computation graph: q cannot be trained through it")
            (-(density(levels * y.flatten(1)) + paid).mean()).backward()
            optimiser.step()
        return torch.stack([q.a.detach(), q.log_b.detach()])

    with quiet_world():
        for size in DEQ_SHAPES:
            if size + "x" in inputs:
                one_size(size, part(inputs, size))
        with contextlib.suppress(Stop):
            record.keep("parameters.found", found)
        with contextlib.suppress(Stop):
            if "train.x grid" in inputs:
                record.one("training", train, "weights of q")
    return record


# --- factor_out ------------------------------------------------------------------------------------------------------

FACTOR_SHAPES = {"D=2 ": (2, 1, 1), "D=24 ": (4, 2, 3)}  # of x: channels, height, width


def factor_prior(w, noise):
    """What gives a distribution of images (C / 2, H, W), with the event in its last three dimensions, by the judge's weights."""
    net = tanh_net(w)

    def prior(z):
        loc, s = net(z.flatten(1)).chunk(2, -1)
        return distributions.Independent(SurvaeNormal(loc.reshape(z.shape), torch.exp(0.5 * s).reshape(z.shape), noise), 3)

    return prior


class FactorPrior(nn.Module):
    """One that can be registered, with a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return distributions.Independent(distributions.Normal(torch.zeros_like(z), self.scale), 3)


def factor_out(objects, inputs):
    (FactorOut,) = objects
    record = Record()

    def found():
        prior = FactorPrior()
        layer = FactorOut(prior)
        return not is_module(layer) or any(p is prior.scale for p in itertools.islice(layer.parameters(), 100))

    with quiet_world():
        for size in FACTOR_SHAPES:
            mine = part(inputs, size)
            noise = SurvaeNoise(mine["noise"])

            def make(w, noise=noise):
                return FactorOut(factor_prior(part(w, "net."), noise))

            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda make=make, mine=mine: make(survae_weights(mine)))
                survae_run(record, size, layer, mine, (noise,))
                once_more(record, size, layer, mine, "contribution", inverse=False)
                survae_gradient(record, size, lambda w, make=make: (make(w), w["net.x"]), mine)
                if "line" in mine:
                    survae_forward(record, f"{size}forward on the line", layer, mine["line"])
        with contextlib.suppress(Stop):
            record.keep("parameters.found", found)
    return record


# --- multi_scale -----------------------------------------------------------------------------------------------------

SCALE_SHAPES = {"D=8 ": ((2, 2, 2), 1), "D=32 ": ((1, 4, 8), 2), "D=64 ": ((1, 8, 8), 3)}  # of x, and how many levels


class ScaleStep(nn.Module):
    """z = asinh(W x) along the channels, in which everything depends on every channel of its pixel; it writes down what it is given."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.given = weight if weight.requires_grad else nn.Parameter(weight), []

    def fits(self, x):
        """In words that tell more than torch's: what was given to a step says what went wrong before it."""
        if x.ndim != 4 or x.shape[1] != len(self.weight):
            raise ValueError(f"a step for images of {len(self.weight)} channels was given shape {tuple(x.shape)}")

    def forward(self, x):
        self.fits(x)
        self.given.append(x)
        y = torch.einsum("oc,bchw->bohw", self.weight, x)
        log_slope = -0.5 * torch.log1p(y**2).flatten(1).sum(1)
        return torch.asinh(y), log_slope + x.shape[2] * x.shape[3] * torch.linalg.slogdet(self.weight)[1]

    def inverse(self, z):
        self.fits(z)
        return torch.einsum("oc,bchw->bohw", torch.linalg.inv(self.weight), torch.sinh(z))

    def inverse_and_ldj(self, z):
        x = self.inverse(z)
        return x, self.forward(x)[1]


def multi_scale(objects, inputs):
    (MultiScale,) = objects
    record = Record()

    def steps(w, levels):
        return [ScaleStep(w[f"net.{i}"]) for i in range(levels)]

    def one_size(size, mine, levels):
        own = steps(survae_weights(mine), levels)
        theirs = record.run(size + "construction", lambda: MultiScale(list(own)))
        x = tensor(mine["x"])
        with contextlib.suppress(Stop):
            z, _ = record.many(size + "forward", lambda: theirs.forward(x), "z", "ldj")
            record.keep(size + "x after", lambda: x)
            record[size + "levels.calls"] = np.array([len(s.given) for s in own])
            if all(len(s.given) == 1 for s in own):
                first = own[0].given[0]
                record.keep(size + "levels.shapes", lambda: np.array([s.given[0].shape for s in own]))
                record.keep(size + "levels.first", lambda: first.detach().double())
            record.one(size + "inverse of forward", lambda: theirs.inverse(z.detach().double()), "x")
        with contextlib.suppress(Stop):
            record.many(size + "forward near", lambda: theirs.forward(tensor(mine["near"])), "z", "ldj")
        with contextlib.suppress(Stop):
            z = tensor(mine["z"])
            back = record.one(size + "inverse", lambda: theirs.inverse(z), "x")
            record.keep(size + "z after", lambda: z)
            record.many(size + "forward of inverse", lambda: theirs.forward(survae_double(back)), "z", "ldj")
            record.one(size + "inverse of one row", lambda: theirs.inverse(tensor(mine["z"][:1])), "x")
        with contextlib.suppress(Stop):
            record.many(size + "forward of one row", lambda: theirs.forward(tensor(mine["x"][:1])), "z", "ldj")
        for level in range(levels):
            def moved(level=level):
                w = survae_weights(mine)
                w[f"net.{level}"] = 1.5 * w[f"net.{level}"]
                return MultiScale(steps(w, levels)).forward(tensor(mine["x"][:2]))

            with contextlib.suppress(Stop):
                record.many(f"{size}forward with another step {level}", moved, "z", "ldj")
        survae_gradient(record, size, lambda w: (MultiScale(steps(w, levels)), w["net.x"]), mine)
        if levels > 1:
            record[size + "parameters.found"] = record.run("parameters", lambda: torch.tensor(scale_registered(theirs, own)).numpy())

    with quiet_world():
        for size, (_, levels) in SCALE_SHAPES.items():
            if size + "x" in inputs:
                with contextlib.suppress(Stop):
                    one_size(size, part(inputs, size), levels)
    return record


def scale_registered(theirs, steps):
    """How many of the steps' weights `theirs.parameters()` gives, and how many there are."""
    if not is_module(theirs):
        raise Complaint(f"MultiScale should be an nn.Module, so that a flow's optimiser finds the weights of its steps; it is {describe(theirs)}")
    wanted = {id(p) for s in steps for p in s.parameters()}
    return [len(wanted & {id(p) for p in itertools.islice(theirs.parameters(), 100)}), len(wanted)]


# --- temperature -----------------------------------------------------------------------------------------------------

TEMPERATURES = {"T = 0.5": 0.5, "T = 1": 1.0, "T = 1.6": 1.6}


class TemperedMap(nn.Module):
    """x = sinh(w z) elementwise, of points of any shape."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        y = torch.asinh(x)
        ldj = (-self.w.log() - 0.5 * torch.log1p(x**2)).flatten(1).sum(1)
        return y / self.w, ldj

    def inverse(self, z):
        return torch.sinh(self.w * z)


class PackedMap(nn.Module):
    """x = integral of exp(-c z^2), on the line: its slope falls so fast that far latents are packed together."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x):
        z = torch.erfinv(2 * x * math.sqrt(self.c / math.pi)) / math.sqrt(self.c)
        return z, (self.c * z**2).flatten(1).sum(1)

    def inverse(self, z):
        return 0.5 * math.sqrt(math.pi / self.c) * torch.erf(math.sqrt(self.c) * z)


class TemperedFlow(nn.Module):
    """A flow like that of lesson 01: base, transform, log_prob and sample."""

    def __init__(self, base, transform):
        super().__init__()
        self.base, self.transform = base, transform

    def log_prob(self, x):
        z, ldj = self.transform(x)
        return self.base.log_prob(z) + ldj

    def sample(self, n):
        return self.transform.inverse(self.base.sample((n,)))


class TemperedNormal(SurvaeNormal):
    """A centred normal base that draws as many rows of the judge's noise as its sample_shape says."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise.take(math.prod(sample_shape)).reshape(*sample_shape, *self.loc.shape)


def temperature(objects, inputs):
    (sample_at_temperature,) = objects
    record = Record()

    def flow_of(scale, noise, transform):
        base = TemperedNormal(torch.zeros_like(tensor(scale)), tensor(scale), SurvaeNoise(noise))
        return TemperedFlow(distributions.Independent(base, np.ndim(scale)), transform)

    def state(flow):
        """What a call may leave behind on the flow or for torch as a whole."""
        return flow.training, sorted(vars(flow)), [p.requires_grad for p in flow.parameters()], torch.is_grad_enabled(), torch.initial_seed()

    def ask(step, flow, n, T):
        base, before, after = flow.base, state(flow), []

        def call():
            x = sample_at_temperature(flow, n, T)
            after[:] = state(flow)
            return x

        x = record.one(step, call, "x")
        record.keep(step + ".base kept", lambda: flow.base is base)
        record.keep(step + ".left", lambda: np.array([a != b for a, b in zip(after, before)]))
        return x

    with quiet_world(40961):    # a seed that nobody else would choose
        for name in ("vectors", "images"):
            mine = part(inputs, f"{name}.")

            def flow(mine=mine):
                return flow_of(mine["scale"], mine["noise"], TemperedMap(tensor(mine["w"])))

            for words, T in TEMPERATURES.items():
                with contextlib.suppress(Stop):
                    step = f"{name}, {words}"
                    tempered = flow()
                    x = ask(step, tempered, len(mine["noise"]), T)
                    record.keep(step + ".w after", lambda tempered=tempered: tempered.transform.w)
                    if name == "vectors" and x.shape == mine["noise"].shape:
                        record.many(step + " latents", lambda tempered=tempered, x=x: tempered.transform(x.detach().double()), "z", "ldj")
            with contextlib.suppress(Stop):
                ask(f"{name}, one sample", flow(), 1, 0.7)
        for words, T in (("T = 0.5", 0.5), ("T = 1", 1.0)):
            with contextlib.suppress(Stop):
                packed = flow_of(np.ones(1), inputs["packed noise"], PackedMap(float(inputs["packed c"])))
                ask(f"packed, {words}", packed, len(inputs["packed noise"]), T)
    return record


# --- hybrid_loss -----------------------------------------------------------------------------------------------------

HYBRID_NAMES = ("hybrid_loss", "hybrid_loss (one row)", "hybrid_loss (two classes)", "hybrid_loss (logits far apart)")


def hybrid_loss(objects, inputs):
    (f,) = objects
    record = Record()

    def call(step, mine, lam, name="loss"):
        given = tensor(mine["log_prob"]), tensor(mine["logits"]), tensor(mine["labels"])
        record.one(step, lambda: f(*given, lam), name)
        record.keep(step + ".logits after", lambda: given[1])
        record.keep(step + ".log_prob after", lambda: given[0])

    def gradient(mine):
        log_prob, logits = (tensor(mine[k]).requires_grad_() for k in ("log_prob", "logits"))
        ((value, _),) = unpack("hybrid_loss", f(log_prob, logits, tensor(mine["labels"]), float(mine["lam"])), "loss")
        if not value.requires_grad or value.numel() != 1:
            return torch.zeros_like(log_prob), torch.zeros_like(logits)
        found = torch.autograd.grad(value.reshape(()), (log_prob, logits), allow_unused=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip((log_prob, logits), found))

    with quiet_world():
        for name in HYBRID_NAMES:
            mine = part(inputs, f"{name}.")
            with contextlib.suppress(Stop):
                call(name, mine, float(mine["lam"]))
        mine = part(inputs, f"{HYBRID_NAMES[0]}.")
        for words, lam in (("lam = 0", 0), ("lam = 1", 1), ("lam = 1/D", 1 / 64)):
            with contextlib.suppress(Stop):
                call(f"hybrid_loss ({words})", mine, lam)
        with contextlib.suppress(Stop):
            record.many("gradient", lambda: gradient(mine), "log_prob", "logits")
    return record


# --- frechet_distance ------------------------------------------------------------------------------------------------

FRECHET_PAIRS = ("two features", "five features", "common axes", "one set moved", "one set twice", "the rows in another order", "b and a",
                 "fewer rows than features", "features that depend on each other")


def frechet_distance(objects, inputs):
    (f,) = objects
    record = Record()

    def ask(step, sent):
        record[f"{step}.distance"] = record.run(step, lambda: to_float("frechet_distance", "the distance", f(*sent), "a number"))

    with quiet_world():
        for name in FRECHET_PAIRS:
            with contextlib.suppress(Stop):
                sent = [tensor(inputs[f"{name}.{k}"]) for k in "ab"]
                ask(f"frechet_distance ({name})", sent)
                record.keep(f"{name}.kept", lambda sent=sent, name=name: all(np.array_equal(t.numpy(), inputs[f"{name}.{k}"]) for t, k in zip(sent, "ab")))
    return record


PROBES = {p.__name__: p for p in (
    bits_per_dim, squeeze, conv1x1, image_coupling, gated_conv, gated_attention, variational_dequantization, factor_out,
    multi_scale, temperature, hybrid_loss, frechet_distance,
)}
