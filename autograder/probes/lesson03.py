"""How to run the answers of lesson 03 (autoregressive flows)."""
import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from autograder.probes.common import sizes, tanh_net
from autograder.probes.lesson02 import gradients, weights
from autograder.probes.record import (
    Complaint, Record, Stop, bijection, describe, is_module, parameters, part, quiet_world, readable, tensor, unpack,
)

# =====================================================================================================================
# Masks, affine autoregressive flows, NAF: made_masks, affine_forms, maf, iaf, naf
# =====================================================================================================================

MADE_LAYERS = 20  # masks in one answer: far above anything that is asked for
AFFINE_FORMS = ("shift", "gate")


def made_masks(objects, inputs):
    (make,) = objects
    record = Record()

    def call(dim, hidden, params):
        """The masks for a list of widths; an answer that can only take a tuple gets one."""
        try:
            return make(dim, list(hidden), params)
        except TypeError as e:
            try:
                return make(dim, hidden, params)
            except TypeError:
                raise e from None

    def masks_of(name, value):
        if type(value) not in (tuple, list):
            raise Complaint(f"made_masks should return a list of masks; it returned {describe(value)}")
        if not 0 < len(value) <= MADE_LAYERS:
            raise Complaint(f"made_masks should return one mask for each layer; it returned a list of {len(value)}")
        found = [readable("made_masks", f"mask {i}", m)[1] for i, m in enumerate(value, 1)]
        for i, m in enumerate(found, 1):
            if m.ndim != 2:
                raise Complaint(f"made_masks: mask {i} has shape {m.shape}; a mask is a matrix, (out, in)")
        return found

    def through(dim, masks):
        """Which input reaches which output, on any path; a Complaint if the masks do not fit one another."""
        seen = np.eye(dim, dtype=bool)
        for i, m in enumerate(masks, 1):
            if m.shape[1] != len(seen):
                raise Complaint(f"mask {i} of {len(masks)} has shape {m.shape}, but {len(seen)} numbers come in; a mask is (out, in)")
            seen = (m != 0).astype(float) @ seen > 0
        return seen.astype(int)

    with quiet_world():
        for name in dict.fromkeys(k.rsplit(".", 1)[0] for k in inputs):
            mine = part(inputs, name + ".")
            dim, params, hidden = int(mine["dim"]), int(mine["params"]), tuple(int(h) for h in mine["hidden"])
            with contextlib.suppress(Stop):
                masks = record.run(name, lambda d=dim, h=hidden, p=params, n=name: masks_of(n, call(d, h, p)))
                record[f"{name}.shapes"] = np.array([m.shape for m in masks])
                record[f"{name}.binary"] = np.array(all(np.isin(m, (0, 1)).all() for m in masks))
                record[f"{name}.paths"] = record.run(f"{name}.paths", lambda m=masks, d=dim: through(d, m))
    return record


def affine_forms(objects, inputs):
    (f,) = objects
    record = Record()
    x, mu, a = (inputs[k] for k in ("x", "mu", "a"))

    def call(step, form, x, mu, a):
        return record.many(step, lambda: f(tensor(x), tensor(mu), tensor(a), form), "y", "ldj")

    def gradient(form):
        step = f"{form} gradient"

        def loss(mu, a):
            (y, _), (ldj, _) = unpack("affine_forms", f(tensor(x), mu, a, form), "y", "ldj")
            total = (tensor(inputs["c"]) * y).sum()
            return total + (tensor(inputs["r"]) * ldj.reshape(-1)).sum() if ldj.numel() == len(x) else total

        def along():
            at = [tensor(mu).requires_grad_(), tensor(a).requires_grad_()]
            value = loss(*at)
            if not value.requires_grad:
                return torch.zeros(())
            grads = torch.autograd.grad(value, at, allow_unused=True)
            found = [(g * tensor(inputs[d])).sum() for g, d in zip(grads, ("mu direction", "a direction")) if g is not None]
            return sum(found) + torch.zeros(())

        record.one(step, along, "along")
        moved = [[tensor(p + t * inputs[f"{name} direction"]) for name, p in (("mu", mu), ("a", a))] for t in inputs["nudges"]]
        record.one(step, lambda: torch.stack([loss(*m).detach() for m in moved]), "nudged")

    with quiet_world():
        for form in AFFINE_FORMS:
            with contextlib.suppress(Stop):
                sent = tensor(x)
                record.many(form, lambda form=form, sent=sent: f(sent, tensor(mu), tensor(a), form), "y", "ldj")
                record.keep(f"{form}.x after", lambda sent=sent: sent)
            with contextlib.suppress(Stop):
                each = len(inputs["near"]) // len(x)
                call(f"{form} nearby", form, inputs["near"], *(np.repeat(p, each, 0) for p in (mu, a)))
            with contextlib.suppress(Stop):
                call(f"{form} with a = {inputs['far'].min():g}", form, x, mu, inputs["far"])
            with contextlib.suppress(Stop):
                if "nudges" in inputs:
                    gradient(form)
            with contextlib.suppress(Stop):
                if "line" in inputs:
                    line = inputs["line"][:, None]
                    call(f"{form} on a line", form, line, np.ones(line.shape), np.full(line.shape, -1.0))
                    record[f"{form} on a line.y"] = record[f"{form} on a line.y"].reshape(-1)
    return record


class CountedNet(nn.Module):
    """An autoregressive net (B, D) -> (B, 2 D) of the judge's masked weights, which counts how often it is asked."""

    def __init__(self, w):
        super().__init__()
        self.function, self.asked = tanh_net(w), 0

    def forward(self, x):
        self.asked += 1
        return self.function(x)


def affine_autoregressive(objects, inputs, quick):
    """Runs a MAF or an IAF; `quick(layer)` has as `forward` the direction of one pass, through which gradients are asked for."""
    (Layer,) = objects
    record = Record()

    def passes(size, mine):
        net = CountedNet(weights(mine))
        layer = record.run(size + "construction", lambda: Layer(net))
        for way, x in (("forward", mine["x"]), ("inverse", mine["z"])):
            net.asked = 0
            with contextlib.suppress(Stop):
                record.run(size + way, lambda way=way, x=x: getattr(layer, way)(tensor(x)))
                record[f"{size}passes.{way}"] = np.array(net.asked)

    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda mine=mine: Layer(CountedNet(weights(mine))))
                bijection(record, size, layer, mine)
                passes(size, mine)
                gradients(record, size, lambda w: quick(Layer(CountedNet(w))), mine)
    return record


def maf(objects, inputs):
    return affine_autoregressive(objects, inputs, lambda layer: layer)


def iaf(objects, inputs):
    def sampling(layer):
        """What training by samples differentiates: x = inverse(z), with no ldj."""
        return SimpleNamespace(forward=lambda z: (layer.inverse(z), torch.zeros(len(z))))

    return affine_autoregressive(objects, inputs, sampling)


def naf_conditioner(w, dim):
    """x (B, D) -> (B, D, 3K) of the judge's masked weights, whose output column p * D + i is parameter p of coordinate i."""
    net = tanh_net(w)
    return Asked(lambda x: net(x).reshape(len(x), -1, dim).transpose(1, 2).contiguous())


class Asked(nn.Module):
    """A function as a module, as real nets are: nothing to iterate over, and a layer must be able to keep it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class GridConditioner(nn.Module):
    """The smallest conditioner that can be trained: x (B, 2) -> (B, 2, 3K), with a few tanh units of x_1 for x_2."""

    def __init__(self, inputs):
        super().__init__()
        self.own = nn.Parameter(tensor(inputs["own"]))
        self.inner, self.outer = nn.Parameter(tensor(inputs["inner"])), nn.Parameter(tensor(inputs["outer"]))

    def forward(self, x):
        second = self.own[1] + torch.tanh(x[:, :1] * self.inner) @ self.outer
        return torch.stack([self.own[0].expand(len(x), -1), second], 1)


def naf(objects, inputs):
    (NAF,) = objects
    record = Record()

    def forward(step, layer, x):
        return record.many(step, lambda: layer.forward(x), "z", "ldj")

    def one_size(size, mine):
        dim = mine["x"].shape[1]
        layer = record.run(size + "construction", lambda: NAF(naf_conditioner(weights(mine), dim)))
        x = tensor(mine["x"])
        with contextlib.suppress(Stop):
            forward(size + "forward", layer, x)
            record.keep(size + "x after", lambda: x)
        for step, points in (("forward near", mine["near"]), ("forward of one row", mine["x"][:1])):
            with contextlib.suppress(Stop):
                forward(size + step, layer, tensor(points))
        gradients(record, size, lambda w: NAF(naf_conditioner(w, dim)), mine)

    def trained(mine):
        """Maximum likelihood on the grid of Gaussians, one step of Adam for each batch."""
        conditioner = GridConditioner(mine)
        step, weights_ = "training on the grid", list(conditioner.parameters())
        layer = record.run(step, lambda: NAF(conditioner))
        optimiser = torch.optim.Adam(weights_, lr=float(inputs["rate"]))

        def train():
            for batch in mine["batches"]:
                optimiser.zero_grad()
                (z, _), (ldj, _) = unpack("forward", layer.forward(tensor(batch)), "z", "ldj")
                loss = (0.5 * z.square().sum(-1) - ldj).mean()
                if not loss.requires_grad:
                    raise Complaint("forward is cut off from the computation graph: nothing can be trained through it")
                loss.backward()
                optimiser.step()

        record.run(step, train)
        for name in ("test", "test near", "cells"):
            with torch.no_grad():
                forward(f"{step} {name}", layer, tensor(mine[name]))
        record["training on the grid.log_prob"] = normal_log_prob(record, f"{step} cells")

    def normal_log_prob(record, step):
        """The density on the picture's cells, from what the layer gave for them."""
        z, ldj = record[f"{step}.z"], record.get(f"{step}.ldj", np.zeros(0))
        if z.ndim != 2 or ldj.shape != z.shape[:1]:
            return np.zeros(0)
        return ldj - 0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * np.log(2 * np.pi)

    with quiet_world():
        for size in sizes(inputs):
            with contextlib.suppress(Stop):
                one_size(size, part(inputs, size))
        with contextlib.suppress(Stop):
            mine = {k.removesuffix(" grid"): v for k, v in inputs.items() if k.endswith(" grid")}
            if mine:
                trained(mine)
    return record


# =====================================================================================================================
# Masked nets for sequences and images (causal_conv1d, pixelcnn_mask, causal_attention), then sigmoidal flows (dsf, ddsf)
# =====================================================================================================================

# --- causal_conv1d ---------------------------------------------------------------------------------------------------

CAUSAL_LAYERS = {  # how a layer is made: (c_in, c_out, kernel_size), what else is said, the length of its sequence
    "CausalConv1d(2, 4, 3)": ((2, 4, 3), {}, 8),
    "CausalConv1d(2, 2, 1)": ((2, 2, 1), {}, 4),
    "CausalConv1d(1, 2, 3, dilation=4)": ((1, 2, 3), {"dilation": 4}, 12),
    "CausalConv1d(2, 1, 2, dilation=5)": ((2, 1, 2), {"dilation": 5}, 3),  # a sequence shorter than the reach
    "CausalConv1d(2, 4, 2, exclusive=True)": ((2, 4, 2), {"exclusive": True}, 7),
    "CausalConv1d(1, 1, 1, exclusive=True)": ((1, 1, 1), {"exclusive": True}, 5),
    "CausalConv1d(1, 2, 3, dilation=3, exclusive=True)": ((1, 2, 3), {"dilation": 3, "exclusive": True}, 11),
}
CAUSAL_STACK = (((1, 2, 2), {"exclusive": True}), ((2, 2, 2), {"dilation": 1}), ((2, 2, 2), {"dilation": 2}),
                ((2, 1, 2), {"dilation": 4}))
CAUSAL_TRAINED = "CausalConv1d(2, 4, 2, exclusive=True)"


def causal_weights(params, seed, positive):
    """Set each parameter to numbers of size 0.5 to 1.5, which depend on its shape alone: so no response is zero by chance."""
    streams = {}
    with torch.no_grad():
        for p in params:
            rng = streams.setdefault(tuple(p.shape), np.random.default_rng([seed, *p.shape]))
            sign = 1.0 if positive else rng.choice([-1.0, 1.0], p.shape)
            p.copy_(torch.as_tensor(sign * rng.uniform(0.5, 1.5, p.shape)))


def one_by_one(x):
    """The sequence x (1, C, L), and then once more for each of its entries, which is greater by 1: (1 + C L, C, L)."""
    return torch.cat([x, x + torch.eye(x.numel()).reshape(-1, *x.shape[1:])])


def causal_conv1d(objects, inputs):
    (CausalConv1d,) = objects
    record = Record()
    seed = int(inputs["noise"])

    def made(name, sizes, more, positive=False):
        """A layer with the judge's weights, and its parameters."""
        layer = record.run(f"construction of {name}", lambda: CausalConv1d(*sizes, **more))
        params = record.run(f"construction of {name}", lambda: parameters("CausalConv1d", layer))
        record.run(f"construction of {name}", lambda: causal_weights(params, seed, positive))
        return layer, params

    def trained(layer, params, x):
        """For how many entries of the parameters, and of x, the gradient of a weighted sum of the outputs is not zero."""
        x = x.requires_grad_()
        ((y, _),) = unpack("forward", layer.forward(x), "y")
        params = [p for p in params if p.requires_grad]
        if not y.requires_grad:
            return torch.zeros(2)
        torch.manual_seed(seed)
        grads = torch.autograd.grad((torch.randn(y.shape) * y).sum(), [x, *params], allow_unused=True)
        hit = [0 if g is None else int((g != 0).sum()) for g in grads]
        return torch.tensor([float(sum(hit[1:])), float(hit[0])])

    with quiet_world():
        for name, (widths, more, _) in CAUSAL_LAYERS.items():
            if f"{name}.x" not in inputs:
                continue
            x, step = inputs[f"{name}.x"], f"forward of {name}"
            with contextlib.suppress(Stop):
                layer, params = made(name, widths, more)
                if name == CAUSAL_TRAINED:
                    record["module"] = np.array(is_module(layer))
                    with contextlib.suppress(Stop):
                        record.one("gradient", lambda: trained(layer, params, tensor(x)), "reached")
                sent = tensor(x)
                record.one(step, lambda: layer.forward(sent), "y")
                record.keep(f"{name}.x after", lambda: sent)
                record.one(f"{step} (one sequence)", lambda: layer.forward(tensor(x[:1])), "y")
                record.one(f"{step} (entry by entry)", lambda: layer.forward(one_by_one(tensor(x[:1]))), "y")
        with contextlib.suppress(Stop):
            layers = [made("the stack", sizes, more, True)[0] for sizes, more in CAUSAL_STACK]

            def stacked():
                h = one_by_one(tensor(inputs["stack.x"]))
                for layer in layers:
                    h = layer.forward(h)
                return h

            record.one("forward of the stack", stacked, "y")
    return record


# --- pixelcnn_mask ---------------------------------------------------------------------------------------------------

def pixel_calls(inputs):
    """(how it is called, kind, channels, kernel_size) of every mask that is asked for."""
    return [(f'pixelcnn_mask("{kind}", {c}, {k})', kind, int(c), int(k)) for c, k in inputs["sizes"] for kind in "AB"]


def pixelcnn_mask(objects, inputs):
    (mask,) = objects
    record = Record()
    with quiet_world():
        for step, kind, channels, size in pixel_calls(inputs):
            with contextlib.suppress(Stop):
                record.one(step, lambda kind=kind, c=channels, k=size: mask(kind, c, k), "mask")
    return record


# --- causal_attention ------------------------------------------------------------------------------------------------

def argument_gradients(record, losses, inputs, names):
    """The derivative of a loss along a direction in each argument by itself: by autograd, and from values at nudged arguments.

    `losses(*arguments)` gives one number for each B rows of its arguments; all nudged ones go through the answer as one batch.
    """

    def direction(k):
        return tensor(inputs[f"direction.{k}"])

    def along():
        values = [tensor(inputs[k]).requires_grad_() for k in names]
        value = losses(*values).sum()
        grads = torch.autograd.grad(value, values, allow_unused=True) if value.requires_grad else [None] * len(names)
        return torch.stack([torch.zeros(()) if g is None else (g * direction(k)).sum() for k, g in zip(names, grads)])

    def nudged():
        steps = [(moved, t) for moved in names for t in inputs["nudges"]]
        values = [torch.cat([tensor(inputs[k]) + (t if k == moved else 0.0) * direction(k) for moved, t in steps]) for k in names]
        return losses(*values).reshape(len(names), -1)

    with contextlib.suppress(Stop):
        record.one("gradient", along, "along")
        if "nudges" in inputs:
            record.one("gradient", nudged, "nudged")


def weighted(weights, value):
    """The sums of `value` (N B, ...) times weights (B, ...), one for each B rows."""
    return (tensor(weights) * value.reshape(-1, *weights.shape)).flatten(1).sum(1)


def causal_attention(objects, inputs):
    (attention,) = objects
    record = Record()
    name = "causal_attention"

    def given(prefix=""):
        return [tensor(inputs[prefix + k]) for k in "qkv"]

    def changed(which):
        """The results (T, B, T, d) when what stands at position s of q, k or v is another, for each s in turn."""
        found = []
        for s in range(inputs["q"].shape[1]):
            qkv = given()
            qkv[which][:, s] += tensor(inputs["change"])
            found.append(readable(name, "out", attention(*qkv))[0])
        return torch.stack(found)

    def losses(*qkv):
        ((out, _),) = unpack(name, attention(*qkv), "out")
        return weighted(inputs["c"], out)

    with quiet_world():
        with contextlib.suppress(Stop):
            sent = given()
            record.one(name, lambda: attention(*sent), "out")
            for letter, t in zip("qkv", sent):
                record.keep(f"{letter} after", lambda t=t: t)
        q, k, v = given()
        steps = {
            f"{name} with v = 1": lambda: attention(q.clone(), k.clone(), torch.ones_like(v)),
            f"{name} of one sequence": lambda: attention(q[:1].clone(), k[:1].clone(), v[:1].clone()),
            f"{name} at one position": lambda: attention(q[:, :1].clone(), k[:, :1].clone(), v[:, :1].clone()),
            f"{name} with heads": lambda: attention(*given("heads.")), f"{name} with T = d": lambda: attention(*given("square.")),
        }
        if "change" in inputs:
            steps |= {f"{name} with another {letter}": lambda which=which: changed(which) for which, letter in enumerate("qkv")}
        for step, call in steps.items():
            with contextlib.suppress(Stop):
                record.one(step, call, "out")
        argument_gradients(record, losses, inputs, "qkv")
    return record


# --- dsf and ddsf ----------------------------------------------------------------------------------------------------

def dsf(objects, inputs):
    (f,) = objects
    record = Record()
    names = ("x", "a", "b", "w")

    def repeated(x, dtype=torch.float64):
        """x and the parameters, each row as often as x has rows for it."""
        each = len(x) // len(inputs["a"])
        return [tensor(x, dtype), *(tensor(inputs[k], dtype).repeat_interleave(each, 0) for k in "abw")]

    def one_dimension(x, dtype=torch.float64):
        """x (N,) as (N, 1), with the parameters "far" for all of it."""
        return [tensor(x, dtype)[:, None], *(tensor(inputs[f"far.{k}"], dtype).expand(len(x), 1, -1).clone() for k in "abw")]

    def losses(*values):
        (y, _), (ldj, _) = unpack("dsf", f(*values), "y", "ldj")
        if y.shape != values[0].shape or ldj.shape != y.shape[:1]:
            shapes = [tuple(t.shape) for t in (y, ldj, values[0])]
            raise Complaint("dsf returns y of shape {} and ldj of shape {} for x of shape {}".format(*shapes))
        return weighted(inputs["c"], y) + weighted(inputs["r"], ldj)

    def drawn():
        (y, _), (ldj, _) = unpack("dsf", f(*one_dimension(inputs["grid"])), "y", "ldj")
        return y.reshape(-1), ldj.reshape(-1)

    with quiet_world():
        with contextlib.suppress(Stop):
            sent = [tensor(inputs[k]) for k in names]
            record.many("dsf", lambda: f(*sent), "y", "ldj")
            for k, t in zip(names, sent):
                record.keep(f"{k} after", lambda t=t: t)
        calls = {"dsf for one row": lambda: f(*(tensor(inputs[k][:1]) for k in names)),
                 "dsf in one dimension": lambda: f(*(tensor(inputs[k][:, :1]) for k in names))}
        if "near" in inputs:
            calls["dsf nearby"] = lambda: f(*repeated(inputs["near"]))
        for step, call in calls.items():
            with contextlib.suppress(Stop):
                record.many(step, call, "y", "ldj")
        argument_gradients(record, losses, inputs, names)
        if "grid" in inputs:
            with contextlib.suppress(Stop):
                record.many("picture", drawn, "y", "ldj")
        with contextlib.suppress(Stop):
            torch.set_default_dtype(torch.float32)
            record.many("dsf far out in float32", lambda: f(*one_dimension(inputs["far"], torch.float32)), "y", "ldj")
    return record


DDSF_NAMES = ("h", "log_slope", "w", "u", "a", "b")
DDSF_LAYERS = ("first.", "second.", "third.")


def ddsf(objects, inputs):
    (layer,) = objects
    record = Record()

    def expanded(mine, each, dtype=torch.float64):
        """w, u, a and b of a layer, each row `each` times."""
        return [tensor(mine[k], dtype).repeat_interleave(each, 0) for k in DDSF_NAMES[2:]]

    def network(x, each=1, dtype=torch.float64):
        """h and log dh/dx (N, D) after the layers 1-3-3-1, for x (N, D) in which each row's parameters stand for `each` rows."""
        h = tensor(x, dtype)[..., None]
        log_slope = torch.zeros_like(h)
        for prefix in DDSF_LAYERS:
            result = layer(h, log_slope, *expanded(part(inputs, prefix), each, dtype))
            (h, _), (log_slope, _) = unpack("the network", result, "h", "log_slope")
        return h, log_slope

    def nearby(mine):
        """The layer where its inputs have gone on for a short time, each with the speed exp(log_slope): (4 B, D, d_out)."""
        h = mine["h"][:, None] + inputs["nudges"][:, None, None] * np.exp(mine["log_slope"])[:, None]  # (B, 4, D, d_in)
        rest = tensor(mine["log_slope"]).repeat_interleave(4, 0), *expanded(mine, 4)
        return layer(tensor(h.reshape(-1, *h.shape[2:])), *rest)

    def losses(*values):
        (h, _), (log_slope, _) = unpack("ddsf_layer", layer(*values), "h", "log_slope")
        want = tuple(values[4].shape)
        if tuple(h.shape) != want or tuple(log_slope.shape) != want:
            shapes = f"h of shape {tuple(h.shape)} and log_slope of shape {tuple(log_slope.shape)}"
            raise Complaint(f"ddsf_layer returns {shapes}; both should be (B, D, d_out) = {want}")
        return weighted(inputs["c"], h) + weighted(inputs["r"], log_slope)

    def drawn():
        """The network on a line, with the parameters of the first row and dimension."""
        h = tensor(inputs["grid"])[:, None, None]
        log_slope = torch.zeros_like(h)
        for prefix in DDSF_LAYERS:
            p = [tensor(inputs[prefix + k][:1, :1]).repeat_interleave(len(h), 0) for k in DDSF_NAMES[2:]]
            (h, _), (log_slope, _) = unpack("the network", layer(h, log_slope, *p), "h", "log_slope")
        return h.reshape(-1), log_slope.reshape(-1)

    with quiet_world():
        for step, prefix in (("ddsf_layer", ""), ("ddsf_layer with d_in = d_out", "square.")):
            mine = part(inputs, prefix)
            with contextlib.suppress(Stop):
                sent = [tensor(mine[k]) for k in DDSF_NAMES]
                record.many(step, lambda: layer(*sent), "h", "log_slope")
                if not prefix:
                    for k, t in zip(DDSF_NAMES, sent):
                        record.keep(f"{k} after", lambda t=t: t)
            with contextlib.suppress(Stop):
                if "nudges" in mine:
                    record.many(f"{step} nearby", lambda: nearby(mine), "h", "log_slope")
        with contextlib.suppress(Stop):
            record.many("ddsf_layer for one row", lambda: layer(*(tensor(inputs[k][:1]) for k in DDSF_NAMES)), "h", "log_slope")
        argument_gradients(record, losses, inputs, DDSF_NAMES)
        for step, name, each in (("the network", "x", 1), ("the network nearby", "near", 4)):
            with contextlib.suppress(Stop):
                if name in inputs:
                    record.many(step, lambda: network(inputs[name], each), "h", "log_slope")
        if "grid" in inputs:
            with contextlib.suppress(Stop):
                record.many("picture", drawn, "h", "log_slope")
        with contextlib.suppress(Stop):
            torch.set_default_dtype(torch.float32)
            each = len(inputs["far"]) // len(inputs["x"])
            record.many("the network far out in float32", lambda: network(inputs["far"], each, torch.float32), "h", "log_slope")
    return record


PROBES = {p.__name__: p for p in (
    made_masks, affine_forms, maf, iaf, causal_conv1d, pixelcnn_mask, causal_attention, dsf, ddsf, naf,
)}
