"""What the probes of several lessons share: sizes, a small net of given weights, a map of mixtures, and a list of the costly calls that
an answer makes.
"""
import contextlib

import torch

from autograder.probes.record import Record, Stop, quiet_world, tensor, unpack

SIZES = ("D=2 ", "D=6 ")
COSTLY = ("det", "slogdet", "logdet", "inv", "inverse", "lu_factor", "lu", "qr", "svd", "svdvals", "eig", "eigvals", "pinv", "matrix_exp")


def sizes(inputs):
    """Those of SIZES that the inputs are for."""
    return [s for s in SIZES if s + "x" in inputs]


def tanh_net(w):
    """The function x -> tanh(x W1 + b1) W2 + b2 with the judge's weights; a plain function, nothing to iterate over."""

    def net(x):
        return torch.tanh(x @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]

    return net


def mixture_map(name, out, f, inputs, line=None):
    """The record of f(x, weights, means, log_scales) -> (out, ldj): one point, a batch, far out, in float32, and the gradient in the means."""
    record = Record()

    def call(step, x, dtype, prefix=""):
        p = [tensor(inputs[prefix + k], dtype) for k in ("weights", "means", "log_scales")]
        with contextlib.suppress(Stop):
            record.many(step, lambda: f(tensor(x, dtype), *p), out, "ldj")

    def loss(means):
        (y, _), (ldj, _) = unpack(name, f(tensor(inputs["x"]), tensor(inputs["weights"]), means, tensor(inputs["log_scales"])), out, "ldj")
        return (tensor(inputs["c"]) * y).sum() + (tensor(inputs["r"]) * ldj).sum()

    def along():
        means = tensor(inputs["means"]).requires_grad_()
        value = loss(means)
        return (torch.autograd.grad(value, means)[0] * tensor(inputs["direction"])).sum() if value.requires_grad else torch.zeros(())

    with quiet_world():
        call(name, inputs["x"], torch.float64)
        call(f"{name} nearby", inputs["near"], torch.float64)
        call(f"{name} on a batch", inputs["many.x"], torch.float64, "many.")
        call(f"{name} far out", inputs["far"], torch.float64)
        if line:
            call(f"{name} on the line", inputs[line], torch.float64)
        with contextlib.suppress(Stop):
            record.one("gradient", along, "along")
            nudged = [tensor(inputs["means"]) + t * tensor(inputs["direction"]) for t in inputs["nudges"]]
            record.one("gradient", lambda: torch.stack([loss(m).detach() for m in nudged]), "nudged")
        torch.set_default_dtype(torch.float32)
        call(f"{name} in float32", inputs["far"], torch.float32)
    return record


class Calls(torch.overrides.TorchFunctionMode):
    """Writes down which of the costly linear-algebra functions are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").removeprefix("linalg_")
        if name in COSTLY:
            self.names.add(name)
        return func(*args, **(kwargs or {}))
