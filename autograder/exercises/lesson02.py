"""Lesson 02, coupling flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import copy
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import (
    B, both_sizes, deviating, flowkit_class, function, gradient_arrives, layer_inputs, ldj_mistakes, loss_inputs, mixture, net_inputs, once,
)
from autograder.probes.common import COSTLY, SIZES, sizes, tanh_net
from autograder.probes.lesson02 import HumpFlow
from autograder.probes.record import part, quiet_world, tensor

ASSIGNMENT = "02_coupling"
TITLE = "Coupling flows"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.coupling", "flowkit.linear", "flowkit.elementwise", "flowkit.nets", "flowkit.training")
TEXTS = {"bonus_study_text": 0.0}  # written answers, marked by hand: cell -> points (the bonus is outside the maximum)


# --- coupling --------------------------------------------------------------------------------------------------------


def coupling_inputs(outputs_per_dim):
    def draw(rng):
        inputs = {}
        for prefix in SIZES:
            D = int(prefix[2])
            inputs |= layer_inputs(rng, D, prefix) | loss_inputs(rng, D, prefix)
            inputs |= net_inputs(rng, D // 2, outputs_per_dim * (D // 2), prefix)
        return inputs | pictures.grid("D=2 ")

    return draw


def kept_and_changed(inputs, outputs, prefix):
    """The coordinates that forward passes on, and those that it changes; Fail unless each is half of them."""
    x, z = inputs[prefix + "x"], outputs[prefix + "forward.z"]
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be (B, D) = {x.shape}.")
    kept = np.isclose(z, x, atol=1e-6).all(0)
    D = x.shape[1]
    if kept.all():
        raise Fail("forward returns x unchanged, so there is nothing here to judge yet.")
    if kept.sum() != D // 2:
        raise Fail(f"Of {D} coordinates forward passes {kept.sum()} on unchanged; it should be {D // 2}, one half.")
    return np.flatnonzero(kept), np.flatnonzero(~kept)


def only_two(inputs):
    """For slips: D = 2 alone, and no gradients."""
    return {k: v for k, v in inputs.items() if not k.startswith(("D=6 ", "wide", "float32")) and "gradient" not in k and "nudges" not in k}


def first_half_passed_on(inputs, outputs, prefix):
    kept, changed = kept_and_changed(inputs, outputs, prefix)
    D = inputs[prefix + "x"].shape[1]
    if not np.array_equal(kept, np.arange(D // 2)):
        raise Fail(f"Another part of x is passed on than its first half (for D = {D}, the columns {kept.tolist()}).")


def tanh_net_at(inputs, prefix, x1):
    """What the judge's net gives for rows x1."""
    with torch.no_grad():
        return tanh_net({k: tensor(v) for k, v in part(inputs, prefix + "net.").items()})(tensor(x1)).numpy()


def affine_in_second_half(inputs, outputs, prefix, scaled=True, net_at=tanh_net_at):
    """z2 = x2 * exp(alpha) + mu with alpha and mu from the net: exact shift, and log-scales that grow with alpha.

    Any order of the net's output columns passes, and any bounded or softened alpha: the shift must be one column of
    the net's output for each changed coordinate, the log-scale an increasing function of another one.
    """
    x = inputs[prefix + "x"]
    kept, changed = kept_and_changed(inputs, outputs, prefix)
    J, _ = laws.own_jacobian(inputs, outputs, prefix)
    block = J[:, changed][:, :, changed]
    slope = np.einsum("bii->bi", block)
    if np.abs(block - slope[:, :, None] * np.eye(len(changed))).max() > 1e-4:
        raise Fail("A changed coordinate depends on another changed coordinate: each should be scaled and shifted by itself.")
    if (slope <= 0).any():
        i = laws.first_bad(x, (slope <= 0).any(1))
        raise Fail("The scale of the second half is not positive everywhere.", f"at x = {laws.point(x[i])} it is {laws.point(slope[i])}")
    z = outputs[prefix + "forward.z"]
    net = net_at(inputs, prefix, x[:, kept])
    shift = z[:, changed] - slope * x[:, changed]
    tol = 1e-3
    columns = [[c for c in range(net.shape[1]) if np.abs(shift[:, i] - net[:, c]).max() < tol] for i in range(len(changed))]
    if not all(columns):
        raise Fail("The shift of the second half is not mu, an output of net(x1)." if scaled else "The second half is not x2 + net(x1).")
    if not scaled:
        if np.abs(slope - 1).max() > tol:
            raise Fail("The second half is scaled; an additive coupling only shifts it.")
        return
    if np.abs(np.log(slope)).max() < 1e-3:
        raise Fail("The second half is shifted but not scaled: alpha has no effect on z.")
    taken = {c[0] for c in columns}
    for i in range(len(changed)):
        logs = np.log(slope[:, i])
        if not any(increasing(net[:, c], logs) for c in range(net.shape[1]) if c not in taken):
            raise Fail("The scale of the second half does not grow with alpha, an output of net(x1).")


def increasing(a, b):
    order = np.argsort(a)
    return bool((np.diff(b[order]) > -1e-4).all()) and np.ptp(b) > 1e-3


def gradients_reach_net(inputs, outputs, prefix):
    gradient_arrives(outputs, prefix, "z and ldj", "the weights of `net`")


BIJECTION = ("forward.z", "forward.ldj", "inverse.x", "x after", "z after")


def sized(keys):
    return tuple(f"{p}{k}" for p in SIZES for k in keys)


class PlainCoupling:
    """A coupling layer in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, net):
        self.net = net

    def params(self, x1):
        return self.net(x1).chunk(2, -1)

    def bend(self, x2, alpha, mu):
        return x2 * alpha.exp() + mu

    def unbend(self, z2, alpha, mu):
        return (z2 - mu) * (-alpha).exp()

    def ldj(self, alpha):
        return alpha.sum(-1)

    def join(self, a, b):
        return torch.cat([a, b], -1)

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        alpha, mu = self.params(x1)
        return self.join(x1, self.bend(x2, alpha, mu)), self.ldj(alpha)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        alpha, mu = self.params(z1)
        return torch.cat([z1, self.unbend(z2, alpha, mu)], -1)


# Faults of a log-determinant that are the same for every layer: what becomes of the right one, (B,). Their kinds and
# sentences are those of the generic faults in autograder.laws.


def returns_exchanged(base):
    return deviating(base)("returns_exchanged", "exchanged", "forward", "forward returns `ldj` first and `z` second; the order is (z, ldj).",
                           forward=lambda self, x: base.forward(self, x)[::-1])


def exchanged_conditioner(self, x):
    x1, x2 = x.chunk(2, -1)
    alpha, mu = self.params(x2)
    return self.join(x1, self.bend(x2, alpha, mu)), self.ldj(alpha)


def inverse_from_second(self, z):
    z1, z2 = z.chunk(2, -1)
    alpha, mu = self.params(z2)
    return torch.cat([z1, self.unbend(z2, alpha, mu)], -1)


def inverse_of_first(self, z):
    z2, z1 = z.chunk(2, -1)
    alpha, mu = self.params(z1)
    return torch.cat([self.unbend(z2, alpha, mu), z1], -1)


def inverse_of_swapped(self, z):
    z2, z1 = z.chunk(2, -1)
    alpha, mu = self.params(z1)
    return torch.cat([z1, self.unbend(z2, alpha, mu)], -1)


def forward_cut_at_one(self, x):
    alpha, mu = self.params(x[:, :1])
    return self.join(x[:, :1], self.bend(x[:, 1:], alpha, mu)), self.ldj(alpha)


def inverse_cut_at_one(self, z):
    alpha, mu = self.params(z[:, :1])
    return torch.cat([z[:, :1], self.unbend(z[:, 1:], alpha, mu)], -1)


def forward_of_first(self, x):
    x2, x1 = x.chunk(2, -1)
    alpha, mu = self.params(x1)
    return torch.cat([self.bend(x2, alpha, mu), x1], -1), self.ldj(alpha)


def inverse_exchanged(self, z):
    z1, z2 = z.chunk(2, -1)
    mu, alpha = self.params(z1)
    return torch.cat([z1, self.unbend(z2, alpha, mu)], -1)


def forward_in_place(self, x):
    x1, x2 = x.chunk(2, -1)
    alpha, mu = self.params(x1)
    x2.copy_(self.bend(x2, alpha, mu))
    return x, self.ldj(alpha)


def forward_exchanged(self, x):
    x1, x2 = x.chunk(2, -1)
    mu, alpha = self.params(x1)
    return self.join(x1, self.bend(x2, alpha, mu)), self.ldj(alpha)


def inverse_in_place(self, z):
    z1, z2 = z.chunk(2, -1)
    alpha, mu = self.params(z1)
    z2.copy_(self.unbend(z2, alpha, mu))
    return z


def params_no_grad(self, x1):
    with torch.no_grad():
        return self.net(x1).chunk(2, -1)


wrong = deviating(PlainCoupling)
NO_SUM = "`ldj` still has one number for each dimension: the sum over the dimensions is missing. With D = 2 the shape (B, 1) hides it, but it is not (B,)."
COUPLING_MISTAKES = (
    wrong("inverse_alpha_sign", "sign", "inverse", "In inverse, alpha has the same sign as in forward: the stretch is applied once more instead of being undone.",
          unbend=lambda self, z2, alpha, mu: (z2 - mu) * alpha.exp()),
    wrong("inverse_mu_sign", "sign", "inverse", "In inverse, mu is added as in forward: the shift is applied once more instead of being undone.",
          unbend=lambda self, z2, alpha, mu: (z2 + mu) * (-alpha).exp()),
    wrong("inverse_order", "order", "inverse", "inverse undoes the two steps in the order in which forward made them; the last one made must be undone first.",
          unbend=lambda self, z2, alpha, mu: z2 * (-alpha).exp() - mu),
    wrong("inverse_no_mu", "missing term", "inverse", "inverse undoes the stretch but forgets the shift mu.",
          unbend=lambda self, z2, alpha, mu: z2 * (-alpha).exp()),
    wrong("inverse_no_scale", "missing term", "inverse", "inverse undoes the shift but forgets the stretch.",
          unbend=lambda self, z2, alpha, mu: z2 - mu),
    wrong("inverse_exchanged", "exchanged", "inverse", "alpha and mu are taken from the net's output in one order in forward and in the other order in inverse.",
          inverse=inverse_exchanged),
    wrong("forward_exchanged", "exchanged", "forward", "alpha and mu are taken from the net's output in one order in inverse and in the other order in forward.",
          forward=forward_exchanged),
    wrong("inverse_from_second", "wrong function", "inverse", "inverse feeds the second half to the net; only the first half is the same before and after, so only from it can the net's output be recovered.",
          inverse=inverse_from_second),
    wrong("inverse_of_first", "exchanged", "inverse", "inverse changes the first half, while forward changed the second: the halves are swapped in one direction.",
          inverse=inverse_of_first),
    wrong("forward_of_first", "exchanged", "forward", "forward changes the first half, while inverse changes the second: the halves are swapped in one direction.",
          forward=forward_of_first),
    wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.",
          inverse=lambda self, z: z),
    wrong("inverse_is_forward", "direction", "inverse", "inverse applies the forward map a second time.",
          unbend=lambda self, z2, alpha, mu: z2 * alpha.exp() + mu),
    wrong("forward_cat_order", "order", "forward", "In forward, the two halves are joined in the wrong order: the changed half stands first.",
          join=lambda self, a, b: torch.cat([b, a], -1)),
    wrong("halves_change_places", "order", "forward", "forward puts the changed half first and the half that was passed on second, and inverse turns that round; both halves should stay in their places.",
          join=lambda self, a, b: torch.cat([b, a], -1), inverse=inverse_of_swapped),
    wrong("forward_cat_axis", "wrong axis", "forward", "In forward, the halves are joined along the batch instead of along the dimensions.",
          join=lambda self, a, b: torch.cat([a, b], 0)),
    wrong("forward_no_mu", "missing term", "forward", "forward scales the second half but does not shift it by mu.",
          bend=lambda self, x2, alpha, mu: x2 * alpha.exp()),
    wrong("forward_no_scale", "missing term", "forward", "forward shifts the second half but does not scale it.",
          bend=lambda self, x2, alpha, mu: x2 + mu),
    wrong("forward_no_exp", "missing function", "forward", "In forward, x2 is multiplied by alpha itself; alpha is the logarithm of the scale.",
          bend=lambda self, x2, alpha, mu: x2 * alpha + mu),
    wrong("no_exp", "missing function", "forward", "The scale is alpha itself in both directions; alpha is the logarithm of the scale, which is therefore never zero or negative.",
          bend=lambda self, x2, alpha, mu: x2 * alpha + mu, unbend=lambda self, z2, alpha, mu: (z2 - mu) / alpha),
    wrong("no_exp_logs", "missing function", "forward", "The scale is alpha itself, in both directions and in ldj; alpha is the logarithm of the scale, which is therefore never zero or negative.",
          bend=lambda self, x2, alpha, mu: x2 * alpha + mu, unbend=lambda self, z2, alpha, mu: (z2 - mu) / alpha,
          ldj=lambda self, alpha: alpha.abs().log().sum(-1)),
    wrong("half_hard_coded", "constant", "forward", "x is cut at a fixed place, which is its middle for D = 2 only; the check also uses D = 6.", forward=forward_cut_at_one, inverse=inverse_cut_at_one),
    wrong("shift_first", "order", "forward", "The second half is shifted before it is scaled; the shift comes last.",
          bend=lambda self, x2, alpha, mu: (x2 + mu) * alpha.exp(), unbend=lambda self, z2, alpha, mu: z2 * (-alpha).exp() - mu),
    wrong("directions_swapped", "direction", "forward", "forward and inverse have changed places: forward does what inverse should do.",
          bend=lambda self, x2, alpha, mu: (x2 - mu) * (-alpha).exp(), unbend=lambda self, z2, alpha, mu: z2 * alpha.exp() + mu,
          ldj=lambda self, alpha: -alpha.sum(-1)),
    wrong("alpha_negated", "sign", "forward", "alpha has the opposite sign throughout: where it is large, forward shrinks the second half instead of stretching it.",
          bend=lambda self, x2, alpha, mu: x2 * (-alpha).exp() + mu, unbend=lambda self, z2, alpha, mu: (z2 - mu) * alpha.exp(),
          ldj=lambda self, alpha: -alpha.sum(-1)),
    wrong("forward_alpha_sign", "sign", "forward", "In forward, the scale is exp of minus alpha: it shrinks where it should stretch, and does not fit ldj and inverse.",
          bend=lambda self, x2, alpha, mu: x2 * (-alpha).exp() + mu),
    wrong("forward_mu_sign", "sign", "forward", "In forward, mu is subtracted; there it should be added.",
          bend=lambda self, x2, alpha, mu: x2 * alpha.exp() - mu),
    wrong("self_conditioned", "wrong function", "net", "The net is fed the half that is being changed: the second half conditions itself, so its scale and shift cannot be recovered in inverse.",
          forward=exchanged_conditioner, inverse=inverse_from_second),
    wrong("forward_from_second", "wrong function", "net", "forward feeds the second half to the net; it is the first half, the one that is passed on, that decides scale and shift.",
          forward=exchanged_conditioner),
    wrong("halves_swapped", "exchanged", "forward", "The halves are swapped in both directions: the second half is passed on and the first one changed.",
          forward=forward_of_first, inverse=inverse_of_first),
    wrong("ldj_no_sum", "shape", "ldj", NO_SUM, ldj=lambda self, alpha: alpha),
    *ldj_mistakes(PlainCoupling, "ldj_keepdim", "ldj_batch_sum", "ldj_sign", "ldj_zero", "ldj_det"),
    wrong("ldj_wrong_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the dimensions.", ldj=lambda self, alpha: alpha.sum(0)),
    wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, alpha: alpha.mean(-1)),
    wrong("ldj_exp", "wrong function", "ldj", "`ldj` adds up the scales exp(alpha); it is their logarithms that add up.", ldj=lambda self, alpha: alpha.exp().sum(-1)),
    wrong("ldj_detached", "detached", "ldj", "`ldj` is cut off from the computation graph, so training would not feel the log-determinant.", ldj=lambda self, alpha: alpha.detach().sum(-1)),
    wrong("net_no_grad", "detached", "net", "The net's output is cut off from the computation graph (no_grad or detach), so the net would never learn.", params=params_no_grad),
    wrong("forward_in_place", "in place", "input", "forward writes its result into the tensor x that it was given: the caller's data are overwritten.", forward=forward_in_place),
    wrong("inverse_in_place", "in place", "input", "inverse writes its result into the tensor z that it was given: the caller's tensor is overwritten.", inverse=inverse_in_place),
)


def exchange_halves(names=("W2", "b2")):
    """Inputs with alpha and mu exchanged in the net: misconceptions of an answer that chunks mu first."""

    def variant(inputs):
        out = dict(inputs)
        for p in sizes(inputs):
            for n in names:
                for group in ("net.", "direction."):
                    a = inputs[f"{p}{group}{n}"]
                    half = a.shape[-1] // 2
                    out[f"{p}{group}{n}"] = np.concatenate([a[..., half:], a[..., :half]], -1)
        return out

    return variant


COUPLING = Exercise(
    id="coupling", title="The coupling layer", minutes=20, difficulty=2,
    hints=(
        "`x.chunk(2, dim=-1)` gives both halves; the same call splits the net's output. `forward` and `inverse` see the same first half, so both can ask the net the same question.",
        "Stretch first, shift second; on the way back undo the shift first. The Jacobian is triangular with ones and exp(alpha) on its diagonal: take the logarithm of the product of the diagonal, for each row of the batch.",
    ),
    inputs=coupling_inputs(2), reference=flowkit_class("coupling", "Coupling"),
    cases=(
        Case("shapes: z (B, D), ldj (B,), x (B, D)", 1, both_sizes(laws.shapes)),
        Case("the first half is passed on", 1, both_sizes(first_half_passed_on)),
        Case("z2 = x2 exp(alpha) + mu", 2, both_sizes(affine_in_second_half)),
        Case("ldj = log|det dz/dx|", 2, both_sizes(laws.ldj_is_log_det)),
        Case("inverse undoes forward, and forward inverse", 2, both_sizes(laws.round_trip)),
        Case("gradients reach the net", 1, both_sizes(gradients_reach_net)),
        Case("the input is left as it was", 1, both_sizes(laws.untouched)),
    ),
    misconceptions=COUPLING_MISTAKES, compare=sized(BIJECTION + ("gradient.along",)), variants=(exchange_halves(),), light=only_two,
    faults=lambda i, o: laws.ldj_faults(i, o, SIZES), picture=pictures.warp_and_density("D=2 "),
)


# --- make_net --------------------------------------------------------------------------------------------------------

def make_net_inputs(rng):
    return {"x": rng.standard_normal((B, 1)), "line": np.linspace(-3, 3, 61)[:, None], "c": rng.standard_normal((B, 2)), "noise": rng.integers(2**31)}


def net_shape(inputs, outputs, reference):
    got = outputs["net.output"].shape
    if got != (B, 2):
        raise Fail(f"For x1 of shape (B, 1) = {(B, 1)} the net returns shape {got}; alpha and mu together are (B, 2).")


def net_trains(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    weights_of(outputs)
    if bool(outputs["shared"]):
        raise Fail("Two calls of make_net return nets that share their weights; every coupling layer needs its own.")
    reached = outputs["gradient.sizes"] > 0
    if not reached.all():
        raise Fail(f"{(~reached).sum()} of the {len(reached)} weight tensors of the net get no gradient.")


def weights_of(outputs):
    """Fail, with the reason, unless the net has weights that can be trained."""
    if outputs["parameters"].size:
        return
    if outputs["frozen"]:
        raise Fail("The net has weights, but none of them asks for a gradient.")
    if outputs["module"]:
        raise Fail("PyTorch finds no weights in the net: layers in a plain list, say, are not registered.")
    raise Fail("What make_net returns is a plain function without weights; a net is an nn.Module.")


def net_bends(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    weights_of(outputs)
    y = outputs["net with other weights.output"]
    if y.shape != (61, 2):
        raise Fail(f"On 61 rows the net returns shape {y.shape}.")
    t = inputs["line"]
    for c, name in enumerate(("alpha", "mu")):
        line = np.polynomial.polynomial.Polynomial.fit(t[:, 0], y[:, c], 1)
        off = np.abs(y[:, c] - line(t[:, 0])).max()
        if np.ptp(y[:, c]) < 1e-6:
            raise Fail(f"Output {c + 1} of the net does not depend on its input, whatever the weights.")
        if off < 1e-3 * np.ptp(y[:, c]):
            raise Fail("The net is a straight line in its input: without a non-linearity between the layers, several linear layers are one.")


def net_signs(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    weights_of(outputs)
    low, high = outputs["shakes.low"], outputs["shakes.high"]  # over eight draws of the weights
    if low.shape != (8, 2):
        raise Fail("Called again, the net returns a result of another shape.")
    for name, never in (("negative", low.min(0) >= 0), ("positive", high.max(0) <= 0)):
        if never.any():
            squeezed = " and never above 1, as after a sigmoid" if name == "negative" and high.max() <= 1 else ", as after a ReLU" if name == "negative" else ""
            raise Fail(f"Whatever the weights, an output of the net is never {name}{squeezed}; alpha and mu must be free to take either sign.")
    if np.abs(outputs["net with large weights.output"]).max(initial=0) <= 1:
        raise Fail("Whatever the weights, both outputs of the net stay between -1 and 1, as after a tanh: no point could be shifted by more than 1.")


def net_is_a_function(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    a, b, one = (outputs[k] for k in ("net with other weights.output", "net with other weights again.output", "net with other weights on one row.output"))
    if a.shape != b.shape or not np.allclose(a, b):
        raise Fail("The net gives two answers to one question: it draws random numbers (dropout?), so inverse could not undo forward.")
    if one.shape != (1, *a.shape[1:]):
        raise Fail(f"For one row the net returns shape {one.shape}; it should be (1, 2).")
    if not np.allclose(a[:1], one, atol=1e-6):
        raise Fail("The net's answer for a point depends on the other points of the batch (batch normalisation?), so sampling and density would disagree.")


def make_net_features(inputs, outputs):
    """The verdicts of the cases and the sentences behind them: nets are as free as the people who write them."""
    text = str(sorted(outputs.complaints().values()))
    sizes = re.search(r"shapes cannot be multiplied \(8x(\d+) and (\d+)x", text)
    kind = "" if sizes is None else "two inputs" if sizes.groups() == ("1", "2") else "sizes"
    found = {"complaint": kind or re.sub(r"\d+", "#", text)}  # sizes are the student's own
    for case in MAKE_NET_CASES:
        try:
            case.judge(inputs, outputs, None)
            found[case.name] = "ok"
        except Fail as e:
            found[case.name] = kind or e.sentence
    return found


MAKE_NET_CASES = (
    Case("x1 (B, 1) to alpha and mu, (B, 2) together", 2, net_shape),
    Case("trainable, and a new net at each call", 1, net_trains),
    Case("not a straight line", 1, net_bends),
    Case("alpha and mu are free in sign and size", 0.5, net_signs),
    Case("one answer for one input", 0.5, net_is_a_function),
)


def net_of(*layers):
    return lambda: (lambda: nn.Sequential(*(make() for make in layers)),)


def linear(i, o):
    return lambda: nn.Linear(i, o)


def shared_net():
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
    return (lambda: net,)


def frozen_net():
    def make():
        net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        return net.requires_grad_(False)

    return (make,)


class ListNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


MAKE_NET = Exercise(
    id="make_net", title="A net for the coupling layer", minutes=10, difficulty=1,
    hints=(
        "For D = 2 the net reads one number, x1, and answers with two, alpha and mu. `nn.Sequential` chains `nn.Linear` layers.",
        "Between two linear layers belongs an activation, after the last one none. 32 to 128 hidden units are plenty here.",
    ),
    inputs=make_net_inputs, reference=lambda: (reference_net,), cases=MAKE_NET_CASES, features=make_net_features,
    misconceptions=(
        Misconception("one_output", "shape", "net", "The net has one output; it must give alpha and mu, two numbers for each row.", net_of(linear(1, 32), nn.Tanh, linear(32, 1))),
        Misconception("two_inputs", "shape", "net", "The net expects both coordinates; it is fed the first half only, one number for each row.", net_of(linear(2, 32), nn.Tanh, linear(32, 2))),
        Misconception("sizes_do_not_fit", "exchanged", "net", "The sizes of the linear layers do not fit together: of the two numbers of `nn.Linear` the first is what comes in, and it must be what the layer before gives out.", net_of(linear(32, 1), nn.Tanh, linear(32, 2))),
        Misconception("tanh_last", "extra term", "net", "The last layer ends in a tanh, so neither alpha nor mu can leave the interval from -1 to 1.", net_of(linear(1, 32), nn.Tanh, linear(32, 2), nn.Tanh)),
        Misconception("linear_net", "missing function", "net", "The net has no activation between its linear layers, so all of it is one straight line.", net_of(linear(1, 32), linear(32, 2))),
        Misconception("relu_last", "extra term", "net", "The last layer ends in a ReLU, so alpha and mu can never be negative.", net_of(linear(1, 32), nn.ReLU, linear(32, 2), nn.ReLU)),
        Misconception("sigmoid_last", "extra term", "net", "The last layer ends in a function that squeezes its output to (0, 1), so alpha and mu are not free.", net_of(linear(1, 32), nn.Tanh, linear(32, 2), nn.Sigmoid)),
        Misconception("shared_net", "state", "parameters", "make_net returns the same net at each call, so all coupling layers would share their weights.", shared_net),
        Misconception("frozen_net", "detached", "parameters", "The net's weights do not ask for gradients, so nothing would be trained.", frozen_net),
        Misconception("layers_in_a_list", "state", "parameters", "The net keeps its layers in a plain list, where PyTorch does not find their weights; nn.Sequential and nn.ModuleList register them.", lambda: (ListNet,)),
        Misconception("no_weights", "type", "net", "make_net returns a plain function without weights; there is nothing to train in it.", lambda: (lambda: (lambda x: torch.cat([x, x**2], -1)),)),
        Misconception("dropout", "extra term", "net", "The net contains dropout: it draws new random numbers at each call, so inverse cannot undo forward.", net_of(linear(1, 32), nn.Tanh, lambda: nn.Dropout(0.3), linear(32, 2))),
        Misconception("batch_norm", "extra term", "net", "The net contains batch normalisation: its answer for one point depends on the rest of the batch.", net_of(linear(1, 32), lambda: nn.BatchNorm1d(32), nn.Tanh, linear(32, 2))),
    ),
    picture=pictures.curves("net with other weights.output", "line", ("alpha", "mu"), "your net, with other weights"),
)


def reference_net():
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


# --- permute ---------------------------------------------------------------------------------------------------------

def permute_inputs(rng):
    order = np.array([2, 0, 3, 1])  # of order four: it is not its own inverse, as a reversal would be
    while True:
        order = rng.permutation(4)
        if (order[order] != np.arange(4)).sum() == 4:
            break
    return layer_inputs(rng, 4) | {"order": order}


def permuted(inputs, outputs, reference):
    x, z = inputs["x"], outputs["forward.z"]
    if not np.array_equal(outputs["x after"], x):
        raise Fail("forward changed its input `x` in place: the caller's tensor was overwritten.")
    laws.expect("z", x, z, x[:, inputs["order"]], why=f" for order = {inputs['order'].tolist()}")


def unpermuted(inputs, outputs, reference):
    z, x = inputs["z"], outputs["inverse.x"]
    laws.expect("x", z, x, z[:, np.argsort(inputs["order"])], why=f" for order = {inputs['order'].tolist()}")


def zero_ldj(inputs, outputs, reference):
    ldj = outputs["forward.ldj"]
    if ldj.shape != (B,):
        raise Fail(f"`ldj` has shape {ldj.shape}; it should be one number for each row, (B,) = {(B,)}.")
    if (ldj != 0).any():
        raise Fail("`ldj` is not zero, though a permutation stretches nothing.", f"got {laws.point(ldj[:3])}, ...")


class PlainPermute:
    def __init__(self, order):
        self.order = torch.as_tensor(order)

    def forward(self, x):
        return self.there(x), self.ldj(x)

    def there(self, x):
        return x[:, self.order]

    def ldj(self, x):
        return torch.zeros(len(x))

    def inverse(self, z):
        return z[:, self.order.argsort()]


wrong = deviating(PlainPermute)
PERMUTE = Exercise(
    id="permute", title="Permutations", minutes=8, difficulty=1,
    hints=(
        "Indexing with a list shuffles the columns. Which index list puts them back?",
        "If z[:, j] = x[:, order[j]], then x's column order[j] must be filled from z's column j; sorting `order` and keeping the positions does exactly that.",
    ),
    inputs=permute_inputs, reference=flowkit_class("linear", "Permute"),
    cases=(
        Case("z = x[:, order]", 2, permuted),
        Case("inverse puts the columns back", 2, unpermuted),
        Case("ldj is zero, one for each row", 1, zero_ldj),
    ),
    misconceptions=(
        wrong("inverse_same_order", "direction", "inverse", "inverse applies the same order once more; that undoes a reversal, but not every permutation.", inverse=lambda self, z: z[:, self.order]),
        wrong("inverse_flip", "wrong function", "inverse", "inverse reverses the columns, whatever the order was.", inverse=lambda self, z: z.flip(-1)),
        wrong("inverse_missing", "missing function", "inverse", "inverse returns z as it came: the columns are not put back.", inverse=lambda self, z: z),
        wrong("directions_swapped", "direction", "forward", "forward and inverse have changed places: forward sends column j to place order[j] instead of fetching column order[j].",
              there=lambda self, x: x[:, self.order.argsort()], inverse=lambda self, z: z[:, self.order]),
        wrong("forward_inverted", "direction", "forward", "forward sends column j to place order[j]; it should fetch column order[j] into place j.", there=lambda self, x: x[:, self.order.argsort()]),
        wrong("forward_flip", "wrong function", "forward", "forward reverses the columns, whatever the order is.", there=lambda self, x: x.flip(-1)),
        wrong("rows", "wrong axis", "forward", "The rows of the batch are shuffled; it is the columns, the dimensions, that are meant.", there=lambda self, x: x[self.order], ldj=lambda self, x: torch.zeros(len(x))),
        wrong("inverse_rows", "wrong axis", "inverse", "inverse shuffles the rows of the batch; it is the columns, the dimensions, that are to be put back.", inverse=lambda self, z: z[self.order.argsort()]),
        returns_exchanged(PlainPermute),
        wrong("ldj_scalar", "shape", "ldj", "`ldj` is a single zero; every row needs its own, shape (B,).", ldj=lambda self, x: torch.zeros(())),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` has one zero for each entry of x; every row needs one, shape (B,).", ldj=lambda self, x: torch.zeros(x.shape)),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1); it should be (B,).", ldj=lambda self, x: torch.zeros(len(x), 1)),
        wrong("ldj_dims", "shape", "ldj", "`ldj` has one number for each dimension; every row of the batch needs one, shape (B,).", ldj=lambda self, x: torch.zeros(x.shape[1])),
        wrong("ldj_one", "constant", "ldj", "`ldj` is the determinant, 1 in size; its logarithm is asked for.", ldj=lambda self, x: torch.ones(len(x))),
    ),
    compare=BIJECTION[:3], picture=pictures.matrices(),
)


# --- train_flow ------------------------------------------------------------------------------------------------------

HUMP_GAP = 0.25  # nats; the untrained flow stands at 3.5, 250 steps of Adam at 0.09, of plain gradient descent at 0.19


def train_inputs(rng):
    humps = rng.choice([-2.0, 2.0], (250, 256, 1)) + 0.5 * rng.standard_normal((250, 256, 1))
    x = np.array([1.0, -0.5]) + np.array([2.0, 0.7]) * rng.standard_normal((64, 2))
    return {"x": x, "a": 0.3 * rng.standard_normal(2), "b": 0.3 * rng.standard_normal(2), "humps": humps}


def affine_nll(inputs, params):
    """Mean negative log-likelihood of the probe's AffineFlow on x, and its gradient, at params = (a, b)."""
    a, b, x = params[:2], params[2:], inputs["x"]
    z = x * np.exp(a) + b
    nll = -(laws.normal_log_prob(z) + a.sum()).mean()
    return nll, np.concatenate([(z * x * np.exp(a)).mean(0) - 1, z.mean(0)])


def training(inputs, outputs):
    """What a run did, in words: a training loop is free in everything else."""
    diary, end_ = outputs["training.diary"], outputs["training.end"]
    losses = outputs.arrays.get("training.losses", np.zeros(0))
    if not len(diary):
        raise Fail("The flow that was passed in was never asked for log_prob: was a copy trained in its place?")
    start = np.concatenate([inputs["a"], inputs["b"]])
    n, D = inputs["x"].shape
    stops = np.concatenate([diary, end_[None]])
    # Whoever looks at the likelihood twice between two steps stands still in between: that is no step.
    moved = np.append(True, np.abs(np.diff(stops, axis=0)).max(1) > 1e-12)
    stops = stops[moved]
    values = [affine_nll(inputs, p)[0] for p in stops]
    slopes = [affine_nll(inputs, p)[1] for p in stops[:-1]] or [affine_nll(inputs, start)[1]]
    true = np.array(values[:-1]) if len(values) > 1 else np.array(values)
    readings = {"nll": true, "-nll": -true, "sum": true * n, "-sum": -true * n, "per dimension": true / D, "after the step": np.array(values[1:])}
    if len(values) == 1:  # nothing moved: every loss is the first one
        readings = {k: np.resize(v, len(losses)) for k, v in readings.items() if len(v)}
    loss = next((k for k, v in readings.items() if len(losses) == len(v) and np.allclose(losses, v, rtol=1e-5)), "other" if len(losses) else "none")
    grad = outputs["training.grad"]
    if not np.any(grad):
        gradient = "none left"
    else:
        # Their length is the student's (a sum for a mean, clipping); their direction is not.
        gradient = "fresh" if parallel(grad, slopes[-1]) else "accumulated" if parallel(grad, sum(slopes)) else "other"
    still = outputs["training with lr = 0.end"]
    return {
        "loss": loss, "count": len(losses), "steps": len(stops) - 1, "backward": bool(outputs["training.backwards"]),
        "downhill": "down" if values[-1] < values[0] - 1e-9 else "up" if values[-1] > values[0] + 1e-9 else "flat",
        "gradient": gradient, "graph": bool(outputs.arrays.get("training.graph", False)), "lr": "used" if np.allclose(still, start, atol=1e-9) else "ignored",
    }


def parallel(a, b):
    """Whether two vectors have the same direction, up to sign (a loss with the wrong sign has its own case)."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return bool(min(np.abs(a - b).max(), np.abs(a + b).max()) < 1e-5)


def trained_losses(inputs, outputs, reference):
    t = training(inputs, outputs)
    outputs["training.losses"]
    if t["count"] != 3:
        raise Fail(f"For 3 batches there are {t['count']} losses; there should be one for each.")
    if t["loss"] != "nll":
        nll, _ = affine_nll(inputs, np.concatenate([inputs["a"], inputs["b"]]))
        raise Fail("The losses are not the mean negative log-likelihoods of the batches, each before its own step.",
                   f"the first should be {nll:.4f}; you have {laws.point(outputs['training.losses'])}")
    if t["graph"]:
        raise Fail("The losses still hold their computation graphs, which fill the memory batch by batch; plain numbers are asked for.")


def trained_downhill(inputs, outputs, reference):
    t = training(inputs, outputs)
    if t["downhill"] == "flat":
        raise Fail("After three batches the parameters of the flow are where they were.")
    if t["downhill"] == "up":
        raise Fail("The parameters move uphill: the data become less likely under the flow with every step.")
    if t["steps"] != 3:
        raise Fail(f"For 3 batches the parameters move {t['steps']} times; they should move once for each.")


def trained_fresh(inputs, outputs, reference):
    t = training(inputs, outputs)
    if t["downhill"] == "flat":
        raise Fail("Nothing moved, so there are no gradients to look at.")
    if t["gradient"] == "accumulated":
        raise Fail("Each step uses the sum of all gradients so far: they are never cleared between batches.")
    if t["gradient"] == "other":
        raise Fail("After training, the gradients in the parameters are not those of the last batch.")


def trained_rate(inputs, outputs, reference):
    t = training(inputs, outputs)
    if t["downhill"] == "flat":
        raise Fail("Nothing moved, so `lr` had no effect.")
    if t["lr"] == "ignored":
        raise Fail("With lr = 0 the parameters still move: the argument `lr` does not reach the optimiser.")


LINE = np.linspace(-6, 6, 2401)
HUMPS = np.exp(-0.5 * ((LINE[:, None] - [-2.0, 2.0]) / 0.5) ** 2).sum(1) / (2 * 0.5 * np.sqrt(2 * np.pi))


def hump_gap(theta):
    """KL(two humps || the trained flow) in nats, by quadrature."""
    with torch.no_grad(), quiet_world():
        log_q = HumpFlow(theta).log_prob(tensor(LINE[:, None])).numpy()
    return float((HUMPS * (np.log(np.maximum(HUMPS, 1e-300)) - log_q)).sum() * (LINE[1] - LINE[0]))


def trained_humps(inputs, outputs, reference):
    theta = outputs["training on two humps.theta"]
    if theta.shape != (9,):
        raise Fail("The flow that was trained has lost its parameters.")
    gap = hump_gap(theta)
    if not gap < HUMP_GAP:
        far = f"{gap:.3f}" if gap < 100 else "over 100"
        raise Fail(f"After 250 batches of a two-humped target the flow is {far} nats away from it; under {HUMP_GAP} is asked for.")


def trained_density(outputs):
    theta = outputs.arrays.get("training on two humps.theta")
    if theta is None or theta.shape != (9,) or not np.isfinite(theta).all():
        return None
    with torch.no_grad(), quiet_world():
        return np.exp(HumpFlow(theta).log_prob(tensor(LINE[:, None])).numpy())


def plain_train(flow, batches, lr):
    optimiser = torch.optim.Adam(flow.parameters(), lr=lr)
    losses = []
    for x in batches:
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def looping(loss=lambda flow, x: -flow.log_prob(x).mean(), zero=True, back=True, step=True, keep=lambda l: l.item(), rate=None, first_only=False, zero_late=False, look_again=False):
    """A training loop with one thing wrong with it."""

    def train(flow, batches, lr):
        optimiser = torch.optim.Adam(flow.parameters(), lr=lr if rate is None else rate)
        losses = []
        for x in batches:
            value = loss(flow, x)
            if zero:
                optimiser.zero_grad()
            if back:
                value.backward()
            if zero_late:
                optimiser.zero_grad()
            if step:
                optimiser.step()
            losses.append(keep(loss(flow, x) if look_again else value))
            if first_only:
                break
        return losses

    return lambda: (train,)


TRAIN_FLOW = Exercise(
    id="train_flow", title="Maximum likelihood", minutes=15, difficulty=2,
    hints=(
        "For every batch: compute the loss from `flow.log_prob`, clear the old gradients, go backward, let the optimiser step, write the loss down.",
        "The loss is what should become small when the data become likely, averaged over the rows. `torch.optim.Adam(flow.parameters(), lr=lr)` does the stepping; `.item()` turns a loss into a float.",
    ),
    inputs=train_inputs, reference=lambda: (plain_train,),
    cases=(
        Case("losses: the mean negative log-likelihood of each batch", 2, trained_losses),
        Case("every batch moves the parameters downhill", 3, trained_downhill),
        Case("gradients are fresh for every batch", 2, trained_fresh),
        Case("lr reaches the optimiser", 1, trained_rate),
        Case(f"a two-humped target is fitted to {HUMP_GAP} nats", 2, trained_humps),
    ),
    features=lambda i, o: {k: str(v) for k, v in training(i, o).items()},
    misconceptions=(
        Misconception("loss_sign", "sign", "loss", "The loss is the log-likelihood itself, and training makes it small: the data become less likely.", looping(lambda f, x: f.log_prob(x).mean())),
        Misconception("loss_sum", "reduction", "loss", "The loss is the sum over the batch; the mean is asked for, so that it does not depend on the batch size.", looping(lambda f, x: -f.log_prob(x).sum())),
        Misconception("loss_sum_sign", "sign", "loss", "The loss is the summed log-likelihood with the wrong sign: the data become less likely.", looping(lambda f, x: f.log_prob(x).sum())),
        Misconception("loss_per_dimension", "reduction", "loss", "The loss is divided by the number of dimensions; nats for each point are asked for.", looping(lambda f, x: -f.log_prob(x).mean() / x.shape[1])),
        Misconception("no_zero_grad", "missing term", "gradient", "The gradients are never cleared, so each step uses the sum of all batches so far.", looping(zero=False)),
        Misconception("no_step", "missing term", "parameters", "The optimiser never takes a step, so the parameters stay where they were.", looping(step=False)),
        Misconception("no_backward", "missing term", "gradient", "The loss is never sent backward, so there are no gradients to step along.", looping(back=False)),
        Misconception("zeroed_before_step", "order", "gradient", "The gradients are cleared between the backward pass and the step, so the step has none to go along.", looping(zero_late=True)),
        Misconception("loss_after_step", "order", "loss", "The loss that is written down is computed anew after the step; it should be the one that the step was made for.", looping(look_again=True)),
        Misconception("copy_trained", "wrong function", "parameters", "A copy of the flow is trained; the flow that was passed in stays where it was.", lambda: (lambda flow, batches, lr: plain_train(copy.deepcopy(flow), batches, lr),)),
        Misconception("graph_kept", "detached", "loss", "The list holds the loss tensors themselves, with all that they were computed from, instead of plain numbers.", looping(keep=lambda v: v)),
        Misconception("lr_ignored", "constant", "parameters", "The argument `lr` is not passed on to the optimiser.", looping(rate=1e-3)),
        Misconception("first_batch_only", "order", "value", "Only the first batch is used: the function returns from inside the loop.", looping(first_only=True)),
        Misconception("sign_recorded", "sign", "loss", "The losses written down are log-likelihoods; the training itself goes the right way.", looping(keep=lambda v: -v.item())),
    ),
    picture=pictures.density_on_a_line(LINE, HUMPS, trained_density),
)


# --- bonus_study -----------------------------------------------------------------------------------------------------

def study_runs(inputs, outputs, reference):
    for s in inputs["settings"]:
        outputs[f"study({int(s)}).result"]


def study_varies(inputs, outputs, reference):
    a, b = (float(outputs[f"study({int(s)}).result"]) for s in inputs["settings"])
    if a == b:
        raise Fail(f"The settings {inputs['settings'].tolist()} give the same number, {a:.4g}: the setting has no effect.")


BONUS_STUDY = Exercise(
    id="bonus_study", title="Bonus: a study of your own", minutes=20, difficulty=3, bonus=True,
    hints=(
        "Build a flow in which one thing depends on `setting`, train it as above for `settings.steps(...)` batches, and return its gap to the entropy.",
        "`float(-flow.log_prob(target.sample(5000)).mean()) - target.entropy` is the gap in nats. Seed inside `study`, so that only the setting differs.",
    ),
    inputs=lambda rng: {"settings": np.array([1, 4])}, reference=lambda: (lambda setting: 1.0 / setting,),
    cases=(Case("study(1) and study(4) return finite floats", 1, study_runs), Case("the setting makes a difference", 1, study_varies)),
    misconceptions=(
        Misconception("setting_ignored", "constant", "value", "study returns the same number whatever the setting: it is not used.", lambda: (lambda setting: 0.5,)),
        Misconception("returns_none", "missing term", "value", "study returns None: the gap is computed but not returned, or not computed.", lambda: (lambda setting: None,)),
        Misconception("returns_losses", "type", "value", "study returns the list of losses; one float is asked for.", lambda: (lambda setting: [0.5, 0.4],)),
    ),
    features=lambda i, o: {"values": study_values(i, o), "complaints": str(sorted(o.complaints().values()))},
    picture=pictures.bars(lambda inputs: [f"study({int(s)}).result" for s in inputs["settings"]], "gap in nats"),
)


def study_values(inputs, outputs):
    """Whether the numbers that came back are one and the same; the numbers themselves are the student's own."""
    values = [float(outputs.arrays[k]) for s in inputs["settings"] if (k := f"study({int(s)}).result") in outputs]
    return f"{len(values)} numbers, {len(set(values))} different"


# --- additive_coupling -----------------------------------------------------------------------------------------------

def zero_ldj_at(inputs, outputs, prefix=""):
    laws.moves(inputs, outputs, prefix)
    ldj = outputs[prefix + "forward.ldj"]
    if ldj.shape != (B,):
        raise Fail(f"`ldj` has shape {ldj.shape}; it should be one number for each row, (B,) = {(B,)}.")
    if (ldj != 0).any():
        raise Fail("`ldj` is not exactly zero, though a shift stretches nothing.", f"got {laws.point(ldj[:3])}, ...")


class PlainAdditive(PlainCoupling):
    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        shift = self.params(x1)
        return self.join(x1, self.bend(x2, shift)), self.ldj(shift)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        return torch.cat([z1, self.unbend(z2, self.params(z1))], -1)

    def params(self, x1):
        return self.net(x1)

    def bend(self, x2, shift):
        return x2 + shift

    def unbend(self, z2, shift):
        return z2 - shift

    def ldj(self, shift):
        return torch.zeros(len(shift))


def additive_no_grad(self, x1):
    with torch.no_grad():
        return self.net(x1)


def additive_from_second(self, x):
    x1, x2 = x.chunk(2, -1)
    shift = self.params(x2)
    return self.join(x1, self.bend(x2, shift)), self.ldj(shift)


def additive_inverse_from_second(self, z):
    z1, z2 = z.chunk(2, -1)
    return torch.cat([z1, self.unbend(z2, self.params(z2))], -1)


def additive_first(self, x):
    x2, x1 = x.chunk(2, -1)
    shift = self.params(x1)
    return torch.cat([self.bend(x2, shift), x1], -1), self.ldj(shift)


def additive_inverse_first(self, z):
    z2, z1 = z.chunk(2, -1)
    return torch.cat([self.unbend(z2, self.params(z1)), z1], -1)


def additive_inverse_along_batch(self, z):
    z1, z2 = z.chunk(2, -1)
    return torch.cat([z1, self.unbend(z2, self.params(z1))], 0)


wrong = deviating(PlainAdditive)
ADDITIVE = Exercise(
    id="additive_coupling", title="NICE: shift only", minutes=8, difficulty=1,
    hints=(
        "It is your `Coupling` with alpha left out: the net has one output for each entry of the second half.",
        "Nothing is stretched, so what is the logarithm of the determinant? It still needs one entry for each row.",
    ),
    inputs=coupling_inputs(1), reference=flowkit_class("coupling", "AdditiveCoupling"),
    cases=(
        Case("the first half is passed on", 0.5, both_sizes(first_half_passed_on)),
        Case("z2 = x2 + net(x1)", 1.5, both_sizes(lambda i, o, p: affine_in_second_half(i, o, p, scaled=False))),
        Case("ldj is exactly zero, one for each row", 1, both_sizes(zero_ldj_at)),
        Case("inverse undoes forward, and forward inverse", 1.5, both_sizes(laws.round_trip)),
        Case("gradients reach the net", 0.5, both_sizes(gradients_reach_net)),
    ),
    misconceptions=(
        wrong("inverse_adds", "sign", "inverse", "inverse adds the shift as forward does: it is applied once more instead of being undone.", unbend=lambda self, z2, shift: z2 + shift),
        wrong("shift_subtracted", "sign", "forward", "forward subtracts the net's output and inverse adds it; it should be the other way round.", bend=lambda self, x2, shift: x2 - shift, unbend=lambda self, z2, shift: z2 + shift),
        wrong("forward_subtracts", "sign", "forward", "forward subtracts the net's output, as inverse does.", bend=lambda self, x2, shift: x2 - shift),
        wrong("forward_multiplies", "wrong function", "forward", "forward multiplies by the net's output instead of adding it.", bend=lambda self, x2, shift: x2 * shift),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
        wrong("inverse_from_second", "wrong function", "inverse", "inverse feeds the second half to the net; only the first half is the same before and after.", inverse=additive_inverse_from_second),
        wrong("forward_from_second", "wrong function", "net", "forward feeds the second half to the net; it is the first half that decides the shift.", forward=additive_from_second),
        wrong("self_conditioned", "wrong function", "net", "The second half is fed to the net in both directions, so it conditions itself and cannot be recovered.", forward=additive_from_second, inverse=additive_inverse_from_second),
        wrong("halves_swapped", "exchanged", "forward", "The halves are swapped in both directions: the second half is passed on and the first one shifted.", forward=additive_first, inverse=additive_inverse_first),
        wrong("forward_of_first", "exchanged", "forward", "forward shifts the first half, while inverse changes the second: the halves are swapped in one direction.", forward=additive_first),
        wrong("inverse_of_first", "exchanged", "inverse", "inverse shifts the first half, while forward changed the second: the halves are swapped in one direction.", inverse=additive_inverse_first),
        wrong("forward_cat_order", "order", "forward", "In forward, the two halves are joined in the wrong order.", join=lambda self, a, b: torch.cat([b, a], -1)),
        wrong("forward_cat_axis", "wrong axis", "forward", "In forward, the halves are joined along the batch instead of along the dimensions.", join=lambda self, a, b: torch.cat([a, b], 0)),
        wrong("inverse_cat_axis", "wrong axis", "inverse", "In inverse, the halves are joined along the batch instead of along the dimensions.", inverse=additive_inverse_along_batch),
        returns_exchanged(PlainAdditive),
        wrong("ldj_shift", "wrong function", "ldj", "`ldj` adds up the shifts, as if they were logarithms of scales; a shift stretches nothing.", ldj=lambda self, shift: shift.sum(-1)),
        wrong("ldj_one", "missing function", "ldj", "`ldj` is the determinant, which is 1; its logarithm is asked for.", ldj=lambda self, shift: torch.ones(len(shift))),
        wrong("ldj_scalar", "shape", "ldj", "`ldj` is a single zero; every row needs its own, shape (B,).", ldj=lambda self, shift: torch.zeros(())),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` has one zero for each dimension; every row needs one, shape (B,).", ldj=lambda self, shift: torch.zeros_like(shift)),
        wrong("net_no_grad", "detached", "net", "The net's output is cut off from the computation graph (no_grad or detach), so the net would never learn.", params=additive_no_grad),
    ),
    compare=sized(BIJECTION + ("gradient.along",)), light=only_two, picture=pictures.warp_and_density("D=2 "),
)


# --- act_norm --------------------------------------------------------------------------------------------------------

def act_norm_inputs(rng):
    shift, scale = 3 * rng.standard_normal(3), np.exp(rng.uniform(-1, 1, 3))
    return layer_inputs(rng, 3) | {
        "first": shift + scale * rng.standard_normal((64, 3)), "second": -shift + 2 * scale * rng.standard_normal((64, 3)), "c": rng.standard_normal((B, 3)),
    }


def normalised(z):
    """Mean zero and variance one, whichever of the two estimates of the variance was used."""
    return np.abs(z.mean(0)).max() < 1e-3 and np.abs(z.std(0) - 1).max() < 0.02


def first_batch_normalised(inputs, outputs, reference):
    z, x = outputs["first batch.z"], inputs["first"]
    if z.shape != x.shape:
        raise Fail(f"For the first batch `z` has shape {z.shape}; it should be {x.shape}.")
    if not normalised(z):
        raise Fail("The first batch does not leave with mean zero and variance one in every dimension.",
                   f"means {laws.point(z.mean(0))}, standard deviations {laws.point(z.std(0))}")


def same_numbers(inputs, outputs, key):
    """Whether `key` maps the second batch as the first one was mapped."""
    a, b, first, second = inputs["first"], inputs["second"], outputs["first batch.z"], outputs[key]
    for z, x in ((first, a), (second, b)):
        if z.shape != x.shape:
            raise Fail(f"`z` has shape {z.shape}; it should be {x.shape}.")
    i, j = a.argmin(0), a.argmax(0)
    at = np.arange(a.shape[1])
    slope = (first[j, at] - first[i, at]) / (a[j, at] - a[i, at])
    return np.allclose(second, first[i, at] + slope * (b - a[i, at]), atol=1e-4)


def second_batch_kept(inputs, outputs, reference):
    z, x = outputs["first batch.z"], inputs["first"]
    if z.shape == x.shape and np.abs(z - x).max() < 1e-9:
        raise Fail("The first batch leaves as it came, so there is nothing here to judge yet.")
    if not same_numbers(inputs, outputs, "second batch.z"):
        again = " It is normalised anew." if normalised(outputs["second batch.z"]) else ""
        raise Fail(f"The second batch is not mapped with the numbers that the first one set.{again}")


def reload_kept(inputs, outputs, reference):
    second_batch_kept(inputs, outputs, reference)
    if not same_numbers(inputs, outputs, "after load_state_dict.z"):
        again = " It starts again from the batch it sees." if normalised(outputs["after load_state_dict.z"]) else ""
        raise Fail(f"A layer that was loaded with load_state_dict does not map a batch as the saved one did.{again}")


def act_norm_ldj(inputs, outputs, reference):
    laws.shapes(inputs, outputs)
    laws.ldj_is_log_det(inputs, outputs)
    first, later = outputs["first batch.ldj"], outputs["forward.ldj"]
    if first.shape != (len(inputs["first"]),) or not np.allclose(first, later[0], rtol=1e-4):
        raise Fail("`ldj` of the first batch is not that of the scale which the first batch set.")


def scale_is_trained(inputs, outputs, reference):
    sizes = outputs["gradient.sizes"]
    if sizes.size < 2 * inputs["x"].shape[1] or (sizes <= 0).any():
        raise Fail("Not every scale and shift is a parameter that gets a gradient.")
    if bool(outputs["replaced"]):
        raise Fail("The parameters after the first batch are not the objects that they were before, so an optimiser made before it would not train them.")


def ldj_category(inputs, outputs):
    """The names of the generic faults of ldj, "right", or "other"."""
    try:
        found = laws.ldj_faults(inputs, outputs)
        if found:
            return "+".join(f[0] for f in found)
        laws.ldj_is_log_det(inputs, outputs)
        return "right"
    except Fail as e:
        return e.sentence


def inverse_category(inputs, outputs, affine):
    """What inverse does with z, seen with the student's own forward x -> A x + b."""
    try:
        z, x = inputs["z"], outputs["inverse.x"]
        A, b = affine(inputs, outputs)
    except Fail as e:
        return e.sentence
    diagonal = np.diag(np.diag(A))
    readings = {
        "right": (z - b) @ np.linalg.pinv(A).T, "identity": z, "forward again": z @ A.T + b, "transposed": (z - b) @ A, "inverse transposed": (z - b) @ np.linalg.pinv(A),
        "shift last": z @ np.linalg.pinv(A).T - b, "shift added": (z + b) @ np.linalg.pinv(A).T, "scaled again": (z - b) @ A.T, "diagonal only": (z - b) @ np.linalg.pinv(diagonal),
    }
    return next((k for k, v in readings.items() if x.shape == v.shape and np.allclose(x, v, atol=1e-4)), "other")


def own_affine(inputs, outputs):
    """A and b of the student's forward, if it is affine."""
    J, _ = laws.own_jacobian(inputs, outputs)
    x, z = inputs["x"], outputs["forward.z"]
    if z.shape != x.shape:
        raise Fail(f"`z` has shape {z.shape}; it should be {x.shape}.")
    return J.mean(0), (z - np.einsum("bij,bj->bi", J, x)).mean(0)


def act_norm_features(inputs, outputs):
    def of(judge):
        try:
            judge(inputs, outputs, None)
            return "ok"
        except Fail as e:
            return e.sentence

    try:
        z, x = outputs["first batch.z"], inputs["first"]
        mean, first = x.mean(0), "other"
        for std in (x.std(0), x.std(0, ddof=1)):  # either estimate of the variance is right
            readings = {"ok": (x - mean) / std, "variance": (x - mean) / std**2, "centred only": x - mean, "scaled only": x / std,
                        "multiplied": (x - mean) * std, "multiplied, shift divided": x * std - mean / std, "shift not scaled": x / std - mean,
                        "rows": (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), "all": (x - x.mean()) / x.std(), "all, ddof": (x - x.mean()) / x.std(ddof=1)}
            first = next((k for k, v in readings.items() if z.shape == v.shape and np.allclose(z, v, rtol=1e-3, atol=1e-3)), first).removesuffix(", ddof")
    except Fail as e:
        first = e.sentence
    return {"first": first, "second": of(second_batch_kept), "reload": of(reload_kept), "trained": of(scale_is_trained),
            "ldj": ldj_category(inputs, outputs), "inverse": inverse_category(inputs, outputs, own_affine)}


class PlainActNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_shift(dim)
        self.register_buffer("ready", torch.tensor(False))

    def scale_shift(self, dim):
        self.log_scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def statistics(self, x):
        return x.mean(0), x.std(0, correction=0)

    @torch.no_grad()
    def start(self, x):
        mean, std = self.statistics(x)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)

    def begin(self, x):
        if not self.ready:
            self.start(x)
            self.ready.fill_(True)

    def forward(self, x):
        self.begin(x)
        return x * self.log_scale.exp() + self.shift, self.ldj(x)

    def ldj(self, x):
        return self.log_scale.sum() * torch.ones(len(x))

    def inverse(self, z):
        return (z - self.shift) * (-self.log_scale).exp()


def python_flag(self, x):
    if not getattr(self, "seen", False):
        self.start(x)
        self.seen = True


def buffers_only(self, dim):
    self.register_buffer("log_scale", torch.zeros(dim))
    self.register_buffer("shift", torch.zeros(dim))


@torch.no_grad()
def start_by_variance(self, x):
    self.log_scale.copy_(-x.var(0).log())
    self.shift.copy_(-x.mean(0) / x.var(0))


@torch.no_grad()
def start_unscaled_shift(self, x):
    self.log_scale.copy_(-x.std(0).log())
    self.shift.copy_(-x.mean(0))


@torch.no_grad()
def start_multiplied(self, x):
    self.log_scale.copy_(x.std(0).log())
    self.shift.copy_(-x.mean(0) * x.std(0))


@torch.no_grad()
def start_by_positive_log(self, x):
    self.log_scale.copy_(x.std(0).log())
    self.shift.copy_(-x.mean(0) / x.std(0))


def start_by_new_parameters(self, x):
    self.log_scale = nn.Parameter(-x.std(0).log())
    self.shift = nn.Parameter(-x.mean(0) / x.std(0))


wrong = deviating(PlainActNorm)
ACT_NORM = Exercise(
    id="act_norm", title="ActNorm", minutes=15, difficulty=3,
    hints=(
        "Two parameters of length `dim` hold scale and shift; a *buffer* (`register_buffer`) remembers that the first batch has been seen, because buffers are saved and loaded with the parameters.",
        "On the first batch, inside `torch.no_grad()`, choose scale and shift from the batch's mean and standard deviation over dim 0 with `copy_`, then flip the buffer with `fill_(True)`. After that it is an ordinary affine map.",
    ),
    inputs=act_norm_inputs, reference=flowkit_class("linear", "ActNorm"),
    cases=(
        Case("the first batch leaves with mean 0 and variance 1", 2, first_batch_normalised),
        Case("the second batch keeps the numbers of the first", 1, second_batch_kept),
        Case("a loaded layer does not start again", 1, reload_kept),
        Case("ldj = log|det dz/dx|, one for each row", 2, act_norm_ldj),
        Case("inverse undoes forward, and forward inverse", 1, once(laws.round_trip)),
        Case("scale and shift are trained", 1, scale_is_trained),
    ),
    misconceptions=(
        wrong("every_batch", "state", "state", "Every batch is normalised by its own numbers, as in batch normalisation; only the first batch may set them.", begin=lambda self, x: self.start(x)),
        wrong("flag_not_saved", "state", "state", "Whether the first batch has been seen is not saved with the layer, so a loaded one starts again; only parameters and buffers are in a state_dict.", begin=python_flag),
        wrong("variance_for_std", "wrong function", "state", "The first batch is divided by its variance instead of its standard deviation.", start=start_by_variance),
        wrong("shift_not_scaled", "missing term", "state", "The shift is chosen as if it came before the scale: after scaling, the mean is not zero.", start=start_unscaled_shift),
        wrong("multiplied_by_std", "sign", "state", "The first batch is multiplied by its standard deviation instead of being divided by it.", start=start_multiplied),
        wrong("log_scale_sign", "sign", "state", "The scale is set to the standard deviation instead of to one over it: the logarithm's sign is turned.", start=start_by_positive_log),
        wrong("parameters_replaced", "state", "parameters", "The first batch puts new parameters in the place of the old ones; an optimiser that was made before goes on training the old ones.", start=start_by_new_parameters),
        wrong("over_everything", "wrong axis", "state", "Mean and standard deviation are taken over all entries together; every dimension needs its own.", statistics=lambda self, x: (x.mean() * torch.ones(x.shape[1]), x.std(correction=0) * torch.ones(x.shape[1]))),
        wrong("buffers_only", "detached", "parameters", "No gradient reaches scale and shift (are they parameters, and nothing detached?), so they would stay what the first batch made them.", scale_shift=buffers_only),
        *ldj_mistakes(PlainActNorm, "ldj_sign", "ldj_one_number", "ldj_times_batch", "ldj_zero", "ldj_det"),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` still has one number for each dimension: the sum is missing.", ldj=lambda self, x: self.log_scale.expand(len(x), -1)),
        wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, x: self.log_scale.mean() * torch.ones(len(x))),
        wrong("inverse_order", "order", "inverse", "inverse undoes scale and shift in the order in which forward made them.", inverse=lambda self, z: z * (-self.log_scale).exp() - self.shift),
        wrong("inverse_scale_sign", "sign", "inverse", "inverse multiplies by the scale once more instead of dividing by it.", inverse=lambda self, z: (z - self.shift) * self.log_scale.exp()),
        wrong("inverse_shift_sign", "sign", "inverse", "inverse adds the shift once more instead of subtracting it.", inverse=lambda self, z: (z + self.shift) * (-self.log_scale).exp()),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
    ),
    features=act_norm_features, faults=lambda i, o: laws.ldj_faults(i, o), picture=pictures.clouds("first", "first batch.z"),
)


# --- invertible_linear -----------------------------------------------------------------------------------------------

def linear_inputs(rng):
    return layer_inputs(rng, 4) | {"noise": rng.integers(2**31), "c": rng.standard_normal((B, 4)),
                                   "squares": 0.4 * rng.standard_normal((2, 4, 4)), "vectors": 0.4 * rng.standard_normal((2, 4))}


def upper_first(inputs):
    """The layer's numbers in the order in which one who wrote U before L has them."""
    return inputs | {"squares": inputs["squares"][::-1].copy()}


def is_linear(inputs, outputs, reference=None):
    laws.moves(inputs, outputs)
    J, _ = laws.own_jacobian(inputs, outputs)
    if np.abs(J - J.mean(0)).max() > 1e-3:
        raise Fail("forward is not linear: its Jacobian is not the same at every point.")
    A = J.mean(0)
    if (np.abs(A) < 1e-6).any():
        i, j = np.argwhere(np.abs(A) < 1e-6)[0]
        raise Fail(f"With general weights, z[{i}] does not depend on x[{j}]: the matrix should be full.")


def few_costs(inputs, outputs, reference):
    """Nothing of order D^3 for the determinant: none of the functions that factor or invert is called in forward."""
    is_linear(inputs, outputs)
    called = [n for n, c in zip(COSTLY, outputs["forward calls"]) if c]
    if called:
        raise Fail(f"forward calls {' and '.join(called)}; with the LU form at hand, ldj costs only D additions.")


def linear_ldj(inputs, outputs, reference):
    is_linear(inputs, outputs)
    laws.shapes(inputs, outputs)
    laws.ldj_is_log_det(inputs, outputs)


def starts_invertible(inputs, outputs, reference):
    x, z = inputs["x"], outputs["start.z"]
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be {x.shape}.")
    trained, wanted = int((outputs["gradient.sizes"] > 0).sum()), x.shape[1] ** 2
    if trained < wanted:
        raise Fail(f"Only {trained} numbers of the layer get a gradient; L, U and s together have {wanted} for D = {x.shape[1]}.")
    if np.linalg.matrix_rank(z, tol=1e-6) < x.shape[1]:
        raise Fail("A fresh layer maps space onto something flat: its matrix has no inverse.")


def linear_features(inputs, outputs):
    try:
        is_linear(inputs, outputs)
        A, _ = own_affine(inputs, outputs)
        lower, upper = np.abs(np.triu(A, 1)).max() < 1e-6, np.abs(np.tril(A, -1)).max() < 1e-6
        shape = "full"
    except Fail as e:
        try:
            A, _ = own_affine(inputs, outputs)
            lower, upper = np.abs(np.triu(A, 1)).max() < 1e-6, np.abs(np.tril(A, -1)).max() < 1e-6
            shape = "diagonal" if lower and upper else "lower" if lower else "upper" if upper else "partly"
        except Fail:
            shape = e.sentence
    calls = [n for n, c in zip(COSTLY, outputs.arrays.get("forward calls", ())) if c]
    trained = "enough" if (outputs.arrays.get("gradient.sizes", np.zeros(0)) > 0).sum() >= inputs["x"].shape[1] ** 2 else "too few"
    return {"matrix": shape, "calls": str(bool(calls)), "ldj": ldj_category(inputs, outputs),
            "inverse": inverse_category(inputs, outputs, own_affine), "trained": trained, "complaints": str(sorted(outputs.complaints().values()))}


class PlainLinear(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lower, self.upper = nn.Parameter(torch.randn(dim, dim) / dim), nn.Parameter(torch.randn(dim, dim) / dim)
        self.log_s = nn.Parameter(torch.zeros(dim))

    def factors(self):
        n = len(self.log_s)
        return self.lower.tril(-1) + torch.eye(n), self.upper.triu(1) + torch.diag(self.log_s.exp())

    def weight(self):
        lower, upper = self.factors()
        return lower @ upper

    def forward(self, x):
        return x @ self.weight().T, self.ldj(x)

    def ldj(self, x):
        return self.log_s.sum() * torch.ones(len(x))

    def inverse(self, z):
        return z @ torch.linalg.inv(self.weight()).T


def factors_with_fixed_lower(self):
    n = len(self.log_s)
    return self.lower.detach().tril(-1) + torch.eye(n), self.upper.triu(1) + torch.diag(self.log_s.exp())


wrong = deviating(PlainLinear)
LINEAR = Exercise(
    id="invertible_linear", title="An LU-factored linear layer", minutes=15, difficulty=3,
    hints=(
        "`tril(-1)` and `triu(1)` cut the strict triangles out of a square parameter; add the identity to the one and `torch.diag(s.exp())` to the other.",
        "The determinant of a product is the product of the determinants, and that of a triangular matrix is its diagonal's product: only s is left. For the inverse, `torch.linalg.solve_triangular` undoes one factor after the other (or invert W, which is allowed there).",
    ),
    inputs=linear_inputs, reference=flowkit_class("linear", "InvertibleLinear"),
    cases=(
        Case("a trainable layer that starts invertible", 1, starts_invertible),
        Case("z = W x with a full matrix W", 2, is_linear),
        Case("ldj = log|det W|, one for each row", 2, linear_ldj),
        Case("ldj costs O(D): no determinant, no inverse in forward", 1, few_costs),
        Case("inverse undoes forward, and forward inverse", 2, once(laws.round_trip)),
    ),
    misconceptions=(
        wrong("lower_only", "missing term", "forward", "Only the lower triangular factor is used, so W cannot be full.", weight=lambda self: self.factors()[0] * self.log_s.exp()),
        wrong("upper_only", "missing term", "forward", "Only the upper triangular factor is used, so W cannot be full.", weight=lambda self: self.factors()[1]),
        *ldj_mistakes(PlainLinear, "ldj_sign", "ldj_one_number", "ldj_zero", "ldj_det", "ldj_times_batch"),
        wrong("ldj_slogdet", "wrong function", "ldj", "`ldj` is right, but it is computed from the full matrix, at a cost of D^3; the LU form gives it for D additions.", ldj=lambda self, x: torch.linalg.slogdet(self.weight())[1] * torch.ones(len(x))),
        wrong("inverse_transpose", "wrong function", "inverse", "inverse multiplies by the transpose; only for a rotation is that the inverse.", inverse=lambda self, z: z @ self.weight()),
        wrong("inverse_transposed", "wrong axis", "inverse", "forward and inverse disagree about a transpose: inverse undoes the transposed matrix.", inverse=lambda self, z: z @ torch.linalg.inv(self.weight())),
        wrong("lower_not_trained", "detached", "parameters", "The lower factor L is not trained: it gets no gradient.", factors=factors_with_fixed_lower),
        wrong("inverse_is_forward", "direction", "inverse", "inverse multiplies by W once more instead of undoing it.", inverse=lambda self, z: z @ self.weight().T),
        wrong("inverse_is_identity", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
    ),
    features=linear_features, faults=lambda i, o: laws.ldj_faults(i, o), picture=pictures.matrices(compare=False), variants=(upper_first,),
    compare=("same numbers forward.z", "same numbers forward.ldj", "same numbers inverse.x", "forward calls", "start.z!"),
)


# --- mix_logit_cdf ---------------------------------------------------------------------------------------------------


def mix_inputs(rng):
    x = rng.uniform(-5, 5, 12)
    many = {f"many.{k}": v for k, v in mixture(rng, 5, 2, 3).items()} | {"many.x": 2 * rng.standard_normal((5, 2))}
    return {"x": x, "near": (x[:, None] + laws.STEP * laws.OFFSETS).ravel(), "far": np.linspace(-30, 30, 121)} | mixture(rng, 4) | many | {
        "c": rng.standard_normal(12), "r": rng.standard_normal(12), "direction": rng.standard_normal(4), "nudges": laws.STEP * laws.OFFSETS}


def mix_values(inputs, outputs, reference):
    if outputs["mix_logit_cdf.y"].dtype != np.float64:
        raise Fail("`y` is float32 for an x in float64: digits are lost on the way out.")
    laws.expect("y", inputs["x"], outputs["mix_logit_cdf.y"], reference["mix_logit_cdf.y"], 1e-8)
    laws.expect("y", inputs["many.x"], outputs["mix_logit_cdf on a batch.y"], reference["mix_logit_cdf on a batch.y"], 1e-8, why=" for x of shape (B, d) with parameters (B, d, K)")


def mix_slopes(inputs, outputs, reference):
    """ldj = log dy/dx by differences of the student's own y, entry by entry."""
    y, ldj = outputs["mix_logit_cdf nearby.y"], outputs["mix_logit_cdf.ldj"]
    if y.shape != inputs["near"].shape:
        raise Fail(f"`y` has shape {y.shape} for x of shape {inputs['near'].shape}.")
    slope = y.reshape(-1, 4) @ laws.WEIGHTS / laws.STEP
    if (slope <= 0).any():
        raise Fail("`y` does not increase with x everywhere.")
    laws.expect("ldj", inputs["x"], ldj, np.log(slope), 1e-5, why=": it should be the logarithm of dy/dx, for each entry of x")
    if outputs["mix_logit_cdf on a batch.ldj"].shape != inputs["many.x"].shape:
        raise Fail(f"For x of shape {inputs['many.x'].shape} `ldj` has shape {outputs['batch.ldj'].shape}; here it is one number for each entry.")


def mix_float32(inputs, outputs, reference):
    mix_values(inputs, outputs, reference)
    for name in ("y", "ldj"):
        got, want = outputs[f"mix_logit_cdf in float32.{name}"], outputs[f"mix_logit_cdf far out.{name}"]
        if want.shape != inputs["far"].shape:
            raise Fail(f"`{name}` has shape {want.shape}; it should be {inputs['far'].shape}.")
        if got.shape != want.shape:
            raise Fail(f"`{name}` has shape {got.shape}; it should be {want.shape}.")
        wrong = ~laws.close(got, want, 1e-4)
        if wrong.any():
            i = laws.first_bad(inputs["far"], wrong)
            raise Fail(f"In float32 `{name}` loses its digits in the tail.", f"x = {inputs['far'][i]:.3g}: float64 gives {want[i]:.5g}, float32 {got[i]:.5g}")


def mix_features(inputs, outputs):
    raw = {k: outputs.arrays.get(k, np.asarray(str(outputs.complaint(k.split(".")[0])))) for k in ("mix_logit_cdf.y", "mix_logit_cdf.ldj", "mix_logit_cdf on a batch.y", "mix_logit_cdf on a batch.ldj")}
    reference = far_reference(inputs)
    far = []
    for name in ("y", "ldj"):
        got, want = outputs.arrays.get(f"mix_logit_cdf in float32.{name}"), reference[f"mix_logit_cdf far out.{name}"]
        far.append("right" if got is not None and got.shape == want.shape and np.isfinite(got).all() and laws.close(got, want, 1e-3).all() else "lost")
    own = outputs.arrays.get("mix_logit_cdf far out.y")
    if own is None or own.shape != reference["mix_logit_cdf far out.y"].shape or not laws.close(np.nan_to_num(own[40:80]), reference["mix_logit_cdf far out.y"][40:80], 1e-4).all():
        far = ["moot"]  # a wrong formula is wrong in the tail as well; only a right one can lose its digits there
    return raw | {"tail": str(far), "gradient": str(float(outputs.arrays.get("gradient.along", 1.0)) == 0)}


def far_reference(inputs):
    from flowkit.elementwise import mix_logit_cdf

    with quiet_world(), torch.no_grad():
        y, ldj = mix_logit_cdf(tensor(inputs["far"]), *(tensor(inputs[k]) for k in ("weights", "means", "log_scales")))
    return {"mix_logit_cdf far out.y": y.numpy(), "mix_logit_cdf far out.ldj": ldj.numpy()}


def stable(x, w, m, s, scaled=lambda x, m, s: (x - m) * torch.exp(-s), logits=True, pdf_scale=True, pdf_logit=True):
    """The stable formula with one piece left out or exchanged."""
    u = scaled(x[..., None], m, s)
    below, above = F.logsigmoid(u), F.logsigmoid(-u)
    log_cdf, log_rest = torch.logsumexp(w.log() + below, -1), torch.logsumexp(w.log() + above, -1)
    log_pdf = torch.logsumexp(w.log() + below + above - (s if pdf_scale else 0 * s), -1)
    return (log_cdf - log_rest if logits else log_cdf.exp()), log_pdf - ((log_cdf + log_rest) if pdf_logit else 0)


def by_cdf(x, w, m, s):
    u = (x[..., None] - m) * torch.exp(-s)
    cdf = (w * torch.sigmoid(u)).sum(-1)
    pdf = (w * torch.sigmoid(u) * torch.sigmoid(-u) * torch.exp(-s)).sum(-1)
    return torch.logit(cdf), pdf.log() - cdf.log() - (1 - cdf).log()


def mixed_arguments(x, w, m, s):
    u = (w * (x[..., None] - m) * torch.exp(-s)).sum(-1)
    return u, (w * torch.exp(-s)).sum(-1).log() + 0 * u


def log_of_means(x, w, m, s):
    y, _ = stable(x, w, m, s)
    u = (x[..., None] - m) * torch.exp(-s)
    pdf = (w * (F.logsigmoid(u) + F.logsigmoid(-u) - s)).sum(-1)
    return y, pdf - torch.logsumexp(w.log() + F.logsigmoid(u), -1) - torch.logsumexp(w.log() + F.logsigmoid(-u), -1)


MIX_LOGIT_CDF = Exercise(
    id="mix_logit_cdf", title="The mixture-of-logistics map", minutes=20, difficulty=4,
    hints=(
        "Stay in logarithms: log F is a `torch.logsumexp` of log-weights plus `F.logsigmoid`, and so is log(1 - F), because 1 - sigmoid(u) = sigmoid(-u) and the weights add up to one.",
        "y = log F - log(1 - F), so dy/dx = F' / F + F' / (1 - F) = F' / (F (1 - F)). The derivative of sigmoid(u) is sigmoid(u) sigmoid(-u), times du/dx.",
    ),
    inputs=mix_inputs, reference=flowkit_class("elementwise", "mix_logit_cdf"),
    cases=(
        Case("y is the logit of the mixture's CDF", 2, mix_values),
        Case("ldj = log dy/dx, for each entry", 3, mix_slopes),
        Case("float32 agrees with float64 from -30 to 30", 2, mix_float32),
        Case("gradients reach the parameters", 1, lambda i, o, r: gradient_arrives(o, "", "y and ldj", "the means")),
    ),
    misconceptions=(
        Misconception("no_logit", "missing function", "value", "`y` is the mixture's CDF itself: the logit is missing, in `y` and in `ldj`.", function(lambda x, w, m, s: stable(x, w, m, s, logits=False, pdf_logit=False))),
        Misconception("value_no_logit", "missing function", "value", "`y` is the mixture's CDF itself: the logit is missing.", function(lambda x, w, m, s: stable(x, w, m, s, logits=False))),
        Misconception("ldj_no_logit", "missing term", "ldj", "`ldj` is the log-density of the mixture: the derivative of the logit is missing.", function(lambda x, w, m, s: stable(x, w, m, s, pdf_logit=False))),
        Misconception("ldj_no_scale", "missing term", "ldj", "In `ldj` the derivative of the inner map (x - mean) exp(-log_scale) is missing.", function(lambda x, w, m, s: stable(x, w, m, s, pdf_scale=False))),
        Misconception("scale_sign", "sign", "value", "x - mean is multiplied by exp(log_scale); a large scale should make the step wide, not steep.", function(lambda x, w, m, s: stable(x, w, m, -s))),
        Misconception("scale_not_exp", "missing function", "value", "x - mean is divided by log_scale itself; it is the logarithm of the scale.", function(lambda x, w, m, s: stable(x, w, m, s, scaled=lambda x, m, s: (x - m) / s))),
        Misconception("scale_forgotten", "missing term", "value", "The scales are not used in y.", function(lambda x, w, m, s: stable(x, w, m, 0 * s))),
        Misconception("mean_sign", "sign", "value", "The means are added to x instead of being subtracted.", function(lambda x, w, m, s: stable(x, w, -m, s))),
        Misconception("ldj_sign", "sign", "ldj", "`ldj` has the wrong sign: it is the log-slope of the inverse map.", function(lambda x, w, m, s: (stable(x, w, m, s)[0], -stable(x, w, m, s)[1]))),
        Misconception("ldj_det", "missing function", "ldj", "`ldj` is dy/dx itself; its logarithm is asked for.", function(lambda x, w, m, s: (stable(x, w, m, s)[0], stable(x, w, m, s)[1].exp()))),
        Misconception("ldj_summed", "reduction", "ldj", "`ldj` is summed over the entries of x; here every entry keeps its own.", function(lambda x, w, m, s: (stable(x, w, m, s)[0], stable(x, w, m, s)[1].sum(-1)))),
        Misconception("ldj_jensen", "order", "ldj", "In `ldj` the logarithms of the components are averaged; the densities must be averaged first, and then their logarithm taken.", function(log_of_means)),
        Misconception("weights_softmaxed", "extra term", "value", "The weights are put through a softmax, though they are normalised already.", function(lambda x, w, m, s: stable(x, w.softmax(-1), m, s))),
        Misconception("weights_forgotten", "missing term", "value", "The weights are not used: all components count alike.", function(lambda x, w, m, s: stable(x, torch.ones_like(w) / w.shape[-1], m, s))),
        Misconception("mixed_arguments", "order", "value", "The components are mixed before the sigmoid; it is the sigmoids that are mixed.", function(mixed_arguments)),
        Misconception("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", function(torch.no_grad()(lambda x, w, m, s: stable(x, w, m, s)))),
        Misconception("y_and_ldj_exchanged", "exchanged", "value", "y and ldj are returned in the wrong order.", function(lambda x, w, m, s: stable(x, w, m, s)[::-1])),
        Misconception("y_sign", "sign", "value", "`y` has the wrong sign: it should grow with x.", function(lambda x, w, m, s: (-stable(x, w, m, s)[0], stable(x, w, m, s)[1]))),
        Misconception("weights_not_logged", "missing function", "value", "The weights enter the sums of logarithms as they are; among logarithms belongs their logarithm.", function(lambda x, w, m, s: stable(x, w.exp(), m, s))),
        Misconception("tail_lost", "wrong function", "value", "The CDF is formed first and its logit taken afterwards: where the CDF rounds to 0 or 1 nothing is left for the logit.", function(by_cdf)),
    ),
    features=mix_features, picture=pictures.against_reference(("mix_logit_cdf far out.y", "mix_logit_cdf far out.ldj"), "far", ("y", "ldj"), (-8, 8)),
)


# --- mix_coupling ----------------------------------------------------------------------------------------------------

K = 3


def mix_coupling_inputs(rng):
    inputs = {"components": np.array(K)}
    for prefix in SIZES:
        D = int(prefix[2])
        inputs |= layer_inputs(rng, D, prefix) | loss_inputs(rng, D, prefix)
        net = net_inputs(rng, D // 2, (3 * K + 2) * (D // 2), prefix)
        inputs |= {k: 0.6 * v if k.endswith(("W2", "b2")) else v for k, v in net.items()}
        # What comes back from there lies outside of a narrow bracket, on either side, and within the one of the statement.
        inputs[prefix + "z"][-2:, D // 2:] = [[15.0], [-15.0]]
    wide = np.stack([np.resize(np.linspace(-2, 2, 5), 33), np.linspace(-8, 8, 33)], 1)
    return inputs | {"wide": wide} | pictures.grid("D=2 ")


def component_order(inputs):
    """The same net with the columns of each of its first three blocks in the order (d, K) instead of (K, d)."""
    out = dict(inputs)
    for p in sizes(inputs):
        d = int(p[2]) // 2
        block = np.arange(K * d).reshape(d, K).T.ravel()
        columns = np.concatenate([b * K * d + block for b in range(3)] + [np.arange(3 * K * d, (3 * K + 2) * d)])
        for group in ("net.", "direction."):
            for n in ("W2", "b2"):
                out[f"{p}{group}{n}"] = inputs[f"{p}{group}{n}"][..., columns]
    return out


def mix_formula(inputs, outputs, prefix):
    kept_and_changed(inputs, outputs, prefix)
    z = outputs[prefix + "forward.z"]
    with torch.no_grad(), quiet_world():
        x = tensor(inputs[prefix + "x"])
        for variant in (inputs, component_order(inputs)):
            net = tanh_net({k: tensor(v) for k, v in part(variant, prefix + "net.").items()})
            (layer,) = flowkit_class("coupling", "MixCoupling")()
            if np.allclose(layer(net, K).forward(x)[0].numpy(), z, atol=1e-5):
                return
    raise Fail("`z` is not the mixture map of x2, scaled by exp(a) and shifted by b, with the parameters that net(x1) gives in the order of the statement.")


def mix_wide(inputs, outputs, reference):
    x, z = inputs["wide"], outputs["float32 forward.z"]
    if z.shape != x.shape:
        raise Fail(f"`z` from forward has shape {z.shape}; it should be {x.shape}.")
    if np.abs(z - x).max() < 1e-9:
        raise Fail("forward returns x unchanged, so there is nothing here to judge yet.")
    back = outputs["float32 inverse.x"]
    if back.shape != x.shape:
        raise Fail(f"inverse returns shape {back.shape}; it should be {x.shape}.")
    wrong = ~(np.abs(back - x) < 1e-4 * (1 + np.abs(x))).all(1)
    if wrong.any():
        i = laws.first_bad(x, wrong)
        raise Fail("In float32 inverse(forward(x)) does not give x back, for x2 out to 8 standard deviations.", f"x = {laws.point(x[i])} comes back as {laws.point(back[i])}")


class PlainMix(PlainCoupling):
    def __init__(self, net, components):
        super().__init__(net)
        self.K = components

    def params(self, x1):
        d, out = x1.shape[-1], self.net(x1)
        logits, means, log_scales = (t.reshape(len(x1), self.K, d).transpose(1, 2) for t in out[:, : 3 * self.K * d].split(self.K * d, -1))
        a, b = out[:, 3 * self.K * d:].split(d, -1)
        return self.weights(logits), means, log_scales, a, b

    def weights(self, logits):
        return logits.softmax(-1)

    def mix(self, x2, w, m, s):
        return stable(x2, w, m, s)

    def after(self, y, a, b):
        return y * a.exp() + b

    def before(self, z2, a, b):
        return (z2 - b) * (-a).exp()

    def affine_ldj(self, a, b):
        return a

    def ldj(self, slope, a):
        return (slope + a).sum(-1)

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        w, m, s, a, b = self.params(x1)
        y, slope = self.mix(x2, w, m, s)
        return self.join(x1, self.after(y, a, b)), self.ldj(slope, self.affine_ldj(a, b))

    def bracket(self):
        return -1e3, 1e3

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        w, m, s, a, b = self.params(z1)
        target = self.before(z2, a, b)
        low, high = (torch.full_like(z2, v) for v in self.bracket())
        for _ in range(80):
            middle = (low + high) / 2
            above = self.mix(middle, w, m, s)[0] > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return torch.cat([z1, (low + high) / 2], -1)


def affine_in_between(self, z):
    z1, z2 = z.chunk(2, -1)
    w, m, s, a, b = self.params(z1)
    return torch.cat([z1, self.before(z2, a, b)], -1)


wrong = deviating(PlainMix)
MIX_COUPLING = Exercise(
    id="mix_coupling", title="Flow++'s mixture coupling", minutes=25, difficulty=5,
    hints=(
        "Split the net's output with `split([K*d, K*d, K*d, d, d], -1)`, bring the first three to shape (B, d, K), and put a softmax on the logits. `forward` is then your `mix_logit_cdf` followed by an affine map, and the two log-slopes add up.",
        "For `inverse` undo the affine map, then bisect: start from a bracket that surely holds the answer (say -1000 to 1000), halve it 60 to 100 times with `torch.where`, all entries at once.",
    ),
    inputs=mix_coupling_inputs, reference=flowkit_class("coupling", "MixCoupling"),
    cases=(
        Case("shapes: z (B, D), ldj (B,), x (B, D)", 1, both_sizes(laws.shapes)),
        Case("the first half is passed on", 1, both_sizes(first_half_passed_on)),
        Case("z2 = logit MixLogCDF(x2) exp(a) + b", 2, both_sizes(mix_formula)),
        Case("ldj = log|det dz/dx|", 2, both_sizes(laws.ldj_is_log_det)),
        Case("inverse undoes forward, and forward inverse", 2, both_sizes(lambda i, o, p: laws.round_trip(i, o, p, tol=1e-5))),
        Case("the same in float32, out to 8 standard deviations", 1, mix_wide),
        Case("gradients reach the net", 1, both_sizes(gradients_reach_net)),
    ),
    misconceptions=(
        wrong("no_softmax", "missing function", "net", "The logits are used as weights: the softmax that makes them positive and adds them up to one is missing.", weights=lambda self, logits: logits),
        wrong("scale_sign", "sign", "forward", "x2 - mean is multiplied by exp(log_scale); a large scale should make the step wide, not steep.", mix=lambda self, x2, w, m, s: stable(x2, w, m, -s)),
        wrong("a_b_exchanged", "exchanged", "forward", "a and b have changed places: the block that should scale shifts, and the other way round.", after=lambda self, y, a, b: y * b.exp() + a, before=lambda self, z2, a, b: (z2 - a) * (-b).exp(), affine_ldj=lambda self, a, b: b),
        wrong("ldj_no_a", "missing term", "ldj", "`ldj` forgets the scale exp(a) of the affine map that follows the mixture map.", ldj=lambda self, slope, a: slope.sum(-1)),
        wrong("ldj_only_a", "missing term", "ldj", "`ldj` holds only the affine map's part; the mixture map's log-slope is missing.", ldj=lambda self, slope, a: a.sum(-1)),
        *ldj_mistakes(PlainMix, "ldj_sign", "ldj_keepdim", "ldj_batch_sum"),
        wrong("ldj_a_sign", "sign", "ldj", "In `ldj` the affine map's part has the wrong sign.", ldj=lambda self, slope, a: (slope - a).sum(-1)),
        wrong("ldj_no_sum", "shape", "ldj", NO_SUM, ldj=lambda self, slope, a: slope + a),
        wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, slope, a: (slope + a).mean(-1)),
        wrong("no_affine", "missing term", "forward", "The affine map after the mixture map is missing, in both directions.", after=lambda self, y, a, b: y, before=lambda self, z2, a, b: z2, ldj=lambda self, slope, a: slope.sum(-1)),
        wrong("forward_no_exp", "missing function", "forward", "forward multiplies by a itself; a is the logarithm of the scale.", after=lambda self, y, a, b: y * a + b),
        wrong("shift_first", "order", "forward", "The affine map shifts before it scales; the shift comes last.", after=lambda self, y, a, b: (y + b) * a.exp(), before=lambda self, z2, a, b: z2 * (-a).exp() - b),
        wrong("no_logit", "missing function", "forward", "The mixture's CDF is used without its logit.", mix=lambda self, x2, w, m, s: stable(x2, w, m, s, logits=False, pdf_logit=False)),
        wrong("inverse_a_sign", "sign", "inverse", "In inverse the affine map's scale is applied once more instead of being undone.", before=lambda self, z2, a, b: (z2 - b) * a.exp()),
        wrong("inverse_order", "order", "inverse", "inverse undoes the affine map in the order in which forward made it.", before=lambda self, z2, a, b: z2 * (-a).exp() - b),
        wrong("inverse_skips_affine", "missing term", "inverse", "inverse bisects for z2 itself: the affine map has not been undone before.", before=lambda self, z2, a, b: z2),
        wrong("inverse_no_bisection", "missing function", "inverse", "inverse undoes the affine map only; the mixture map is still there.", inverse=affine_in_between),
        wrong("bracket_unit", "constant", "inverse", "The bisection looks between 0 and 1 only; x2 can be any real number.", bracket=lambda self: (0.0, 1.0)),
        wrong("bracket_narrow", "constant", "inverse", "The bisection's bracket is too narrow: points outside it come back as its edge.", bracket=lambda self: (-5.0, 5.0)),
    ),
    compare=sized(("forward.z", "forward.ldj", "inverse.x", "gradient.along")) + ("float32 inverse.x",), variants=(component_order,), light=only_two,
    faults=lambda i, o: laws.ldj_faults(i, o, SIZES), picture=pictures.warp_and_density("D=2 "),
)


EXERCISES = (COUPLING, MAKE_NET, PERMUTE, TRAIN_FLOW, ADDITIVE, ACT_NORM, LINEAR, MIX_LOGIT_CDF, MIX_COUPLING, BONUS_STUDY)
