"""How to run the answers of lesson 03 (autoregressive flows)."""
import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from autograder.probes.common import sizes, tanh_net
from autograder.probes.lesson02 import gradients, weights
from autograder.probes.record import Complaint, Record, Stop, bijection, describe, part, quiet_world, readable, tensor, unpack

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


PROBES = {p.__name__: p for p in (made_masks, affine_forms, maf, iaf, naf)}
