"""What the probes of several lessons share: sizes, a small net of given weights, and a list of the costly calls that an answer makes."""
import torch

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
