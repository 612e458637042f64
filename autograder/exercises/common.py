"""What the exercises of several lessons share: inputs, laws asked at several sizes, and mistakes made by one changed method."""
import numpy as np

from autograder import laws
from autograder.exercise import Fail, Misconception
from autograder.probes.common import SIZES

B = 8  # rows in most checks: more than the number of outputs, so that a tensor cannot be unpacked as a pair by accident


def flowkit_class(module, name):
    """A reference, imported when it is needed: inputs and hints can be read without building it."""

    def make():
        import importlib

        return (getattr(importlib.import_module(f"flowkit.{module}"), name),)

    return make


def every_size(sizes):
    """A maker of cases' judges, which ask law(inputs, outputs, prefix) at each of `sizes`, the prefixes of the arrays' names."""

    def asking(law):
        def judge(inputs, outputs, reference):
            for prefix in sizes:
                law(inputs, outputs, prefix)

        return judge

    return asking


both_sizes = every_size(SIZES)  # D = 2 and D = 6


def once(law):
    return lambda inputs, outputs, reference: law(inputs, outputs)


def net_inputs(rng, d_in, d_out, prefix, hidden=16):
    """Weights of order one of autograder.probes.common.tanh_net, and a direction to nudge them along."""
    shapes = {"W1": (d_in, hidden), "b1": (hidden,), "W2": (hidden, d_out), "b2": (d_out,)}
    scale = {"W1": 1 / d_in**0.5, "b1": 0.5, "W2": 1.2 / hidden**0.5, "b2": 0.3}
    w = {f"{prefix}net.{k}": scale[k] * rng.standard_normal(s) for k, s in shapes.items()}
    return w | {f"{prefix}direction.{k}": rng.standard_normal(s) for k, s in shapes.items()}


def layer_inputs(rng, D, prefix="", spread=1.5):
    x = spread * rng.standard_normal((B, D))
    return {f"{prefix}x": x, f"{prefix}near": laws.near(x), f"{prefix}z": spread * rng.standard_normal((B, D))}


def loss_inputs(rng, D, prefix=""):
    return {f"{prefix}c": rng.standard_normal((B, D)), f"{prefix}r": rng.standard_normal(B), f"{prefix}nudges": laws.STEP * laws.OFFSETS}


def gradient_arrives(outputs, prefix, what, where):
    """The student's autograd against differences of the student's own values along one direction."""
    got, want = float(outputs[prefix + "gradient.along"]), laws.directional(outputs[prefix + "gradient.nudged"])
    if abs(want) < 1e-9:
        raise Fail(f"{what} do not depend on {where}.")
    if abs(got - want) > 1e-3 * (1 + abs(want)):
        how = "No gradient" if got == 0 else "Not the whole gradient"
        raise Fail(f"{how} of {what} reaches {where}, so training would not work.")


def deviating(base):
    """mistake(id, kind, place, sentence, name=function, ...): a Misconception that overrides methods of `base`."""

    def mistake(id, kind, place, sentence, **methods):
        return Misconception(id, kind, place, sentence, lambda: (type(id, (base,), methods),))

    return mistake


LDJ_MISTAKES = {
    "ldj_sign": lambda right: -right, "ldj_zero": lambda right: 0 * right, "ldj_det": lambda right: right.exp(),
    "ldj_keepdim": lambda right: right[:, None], "ldj_batch_sum": lambda right: right.sum(), "ldj_one_number": lambda right: right.mean(),
    "ldj_times_batch": lambda right: len(right) * right,
}


def ldj_mistakes(base, *names):
    """The misconceptions of these names for a layer whose method `ldj` returns (B,)."""

    def method(apply):
        return lambda self, *args: apply(base.ldj(self, *args))

    return tuple(deviating(base)(n, laws.LDJ_FAULTS[n][0], "ldj", laws.LDJ_FAULTS[n][1], ldj=method(LDJ_MISTAKES[n])) for n in names)


def mixture(rng, *shape):
    weights = rng.dirichlet(3 * np.ones(shape[-1]), shape[:-1])
    return {"weights": weights, "means": 2 * rng.standard_normal(shape), "log_scales": 0.5 * rng.standard_normal(shape)}


def function(f):
    return lambda: (f,)
