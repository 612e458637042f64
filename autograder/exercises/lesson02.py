"""Lesson 02, coupling flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.probes.lesson02 import COSTLY, SIZES, AffineFlow, HumpFlow, tanh_net
from autograder.probes.record import part, quiet_world, tensor

ASSIGNMENT = "02_coupling"
TITLE = "Coupling flows"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.coupling", "flowkit.linear", "flowkit.elementwise", "flowkit.nets", "flowkit.training")
TEXTS = {"bonus_study_text": 0.0}  # written answers, marked by hand: cell -> points (the bonus is outside the maximum)

B = 8  # rows in most checks: more than the number of outputs, so that a tensor cannot be unpacked as a pair by accident


def flowkit_class(module, name):
    """A reference, imported when it is needed: inputs and hints can be read without building it."""

    def make():
        import importlib

        return (getattr(importlib.import_module(f"flowkit.{module}"), name),)

    return make


def both_sizes(law):
    """A case's judge that asks `law` at D = 2 and at D = 6."""

    def judge(inputs, outputs, reference):
        for prefix in SIZES:
            law(inputs, outputs, prefix)

    return judge


def once(law):
    return lambda inputs, outputs, reference: law(inputs, outputs)


# --- coupling --------------------------------------------------------------------------------------------------------

def net_inputs(rng, d_in, d_out, prefix, hidden=16):
    """Weights of order one of autograder.probes.lesson02.tanh_net, and a direction to nudge them along."""
    shapes = {"W1": (d_in, hidden), "b1": (hidden,), "W2": (hidden, d_out), "b2": (d_out,)}
    scale = {"W1": 1 / d_in**0.5, "b1": 0.5, "W2": 1.2 / hidden**0.5, "b2": 0.3}
    w = {f"{prefix}net.{k}": scale[k] * rng.standard_normal(s) for k, s in shapes.items()}
    return w | {f"{prefix}direction.{k}": rng.standard_normal(s) for k, s in shapes.items()}


def layer_inputs(rng, D, prefix="", spread=1.5):
    x = spread * rng.standard_normal((B, D))
    return {f"{prefix}x": x, f"{prefix}near": laws.near(x), f"{prefix}z": spread * rng.standard_normal((B, D))}


def loss_inputs(rng, D, prefix=""):
    return {f"{prefix}c": rng.standard_normal((B, D)), f"{prefix}r": rng.standard_normal(B), f"{prefix}nudges": laws.STEP * laws.OFFSETS}


def coupling_inputs(outputs_per_dim):
    def draw(rng):
        inputs = {}
        for prefix in SIZES:
            D = int(prefix[2])
            inputs |= layer_inputs(rng, D, prefix) | loss_inputs(rng, D, prefix)
            inputs |= net_inputs(rng, D // 2, outputs_per_dim * (D // 2), prefix)
        return inputs | {"D=2 grid": pictures.grid()}

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


def first_half_passed_on(inputs, outputs, prefix):
    kept, changed = kept_and_changed(inputs, outputs, prefix)
    D = inputs[prefix + "x"].shape[1]
    if not np.array_equal(kept, np.arange(D // 2)):
        raise Fail(f"Another part of x is passed on than its first half (for D = {D}, the columns {kept.tolist()}).")


def affine_in_second_half(inputs, outputs, prefix, scaled=True):
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
    with torch.no_grad():
        net = tanh_net({k: tensor(v) for k, v in part(inputs, prefix + "net.").items()})(tensor(x[:, kept])).numpy()
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
    got = float(outputs[prefix + "gradient.along"])
    want = laws.directional(outputs[prefix + "gradient.nudged"])
    if abs(want) < 1e-9:
        raise Fail("The net has no influence on z or ldj.")
    if abs(got - want) > 1e-3 * (1 + abs(want)):
        what = "No gradient" if got == 0 else "Not the whole gradient"
        raise Fail(f"{what} of z and ldj reaches the weights of `net`, so training would not work.")


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


def deviating(base):
    """mistake(id, kind, place, sentence, name=function, ...): a Misconception that overrides methods of `base`."""

    def mistake(id, kind, place, sentence, **methods):
        return Misconception(id, kind, place, sentence, lambda: (type(id, (base,), methods),))

    return mistake


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
    wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1): the dimension that was summed over is still there, so it is not (B,).",
          ldj=lambda self, alpha: alpha.sum(-1, keepdim=True)),
    wrong("ldj_batch_sum", "reduction", "ldj", "`ldj` adds up the whole batch; every row needs its own number, shape (B,).", ldj=lambda self, alpha: alpha.sum()),
    wrong("ldj_wrong_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the dimensions.", ldj=lambda self, alpha: alpha.sum(0)),
    wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the dimensions; the logarithm of a product is a sum.", ldj=lambda self, alpha: alpha.mean(-1)),
    wrong("ldj_sign", "sign", "ldj", "`ldj` is the log-determinant of the inverse map, log|det dx/dz|; its sign is turned.", ldj=lambda self, alpha: -alpha.sum(-1)),
    wrong("ldj_zero", "missing term", "ldj", "`ldj` is zero, though forward does stretch space.", ldj=lambda self, alpha: 0 * alpha.sum(-1)),
    wrong("ldj_det", "missing function", "ldj", "`ldj` is the determinant itself; its logarithm is asked for.", ldj=lambda self, alpha: alpha.sum(-1).exp()),
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
        for p in SIZES:
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
    misconceptions=COUPLING_MISTAKES, compare=sized(BIJECTION + ("gradient.along",)), variants=(exchange_halves(),),
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
    n = outputs["parameters"]
    if n.size == 0:
        raise Fail("The net has no parameters that an optimiser could train.")
    if bool(outputs["shared"]):
        raise Fail("Two calls of make_net return nets that share their weights; every coupling layer needs its own.")
    reached = outputs["gradient.sizes"] > 0
    if not reached.all():
        raise Fail(f"{(~reached).sum()} of the {len(reached)} weight tensors of the net get no gradient.")


def net_bends(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    y = outputs["shaken net.output"]
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
    low, high = outputs["shakes.low"], outputs["shakes.high"]  # over eight draws of the weights
    for name, never in (("negative", low.min(0) >= 0), ("positive", high.max(0) <= 0)):
        if never.any():
            squeezed = " and never above 1, as after a sigmoid" if name == "negative" and high.max() <= 1 else ", as after a ReLU" if name == "negative" else ""
            raise Fail(f"Whatever the weights, an output of the net is never {name}{squeezed}; alpha and mu must be free to take either sign.")


def net_is_a_function(inputs, outputs, reference):
    net_shape(inputs, outputs, reference)
    a, b, one = (outputs[k] for k in ("shaken net.output", "shaken net again.output", "shaken net on one row.output"))
    if not np.allclose(a, b):
        raise Fail("The net gives two answers to one question: it draws random numbers (dropout?), so inverse could not undo forward.")
    if not np.allclose(a[:1], one, atol=1e-6):
        raise Fail("The net's answer for a point depends on the other points of the batch (batch normalisation?), so sampling and density would disagree.")


def make_net_features(inputs, outputs):
    """The verdicts of the cases and the sentences behind them: nets are as free as the people who write them."""
    found = {"complaint": str(sorted(outputs.complaints().values()))}
    for case in MAKE_NET_CASES:
        try:
            case.judge(inputs, outputs, None)
            found[case.name] = "ok"
        except Fail as e:
            found[case.name] = e.sentence
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
        Misconception("linear_net", "missing function", "net", "The net has no activation between its linear layers, so all of it is one straight line.", net_of(linear(1, 32), linear(32, 2))),
        Misconception("relu_last", "extra term", "net", "The last layer ends in a ReLU, so alpha and mu can never be negative.", net_of(linear(1, 32), nn.ReLU, linear(32, 2), nn.ReLU)),
        Misconception("sigmoid_last", "extra term", "net", "The last layer ends in a function that squeezes its output to (0, 1), so alpha and mu are not free.", net_of(linear(1, 32), nn.Tanh, linear(32, 2), nn.Sigmoid)),
        Misconception("shared_net", "state", "parameters", "make_net returns the same net at each call, so all coupling layers would share their weights.", shared_net),
        Misconception("frozen_net", "detached", "parameters", "The net's weights do not ask for gradients, so nothing would be trained.", frozen_net),
        Misconception("dropout", "extra term", "net", "The net contains dropout: it draws new random numbers at each call, so inverse cannot undo forward.", net_of(linear(1, 32), nn.Tanh, lambda: nn.Dropout(0.3), linear(32, 2))),
        Misconception("batch_norm", "extra term", "net", "The net contains batch normalisation: its answer for one point depends on the rest of the batch.", net_of(linear(1, 32), lambda: nn.BatchNorm1d(32), nn.Tanh, linear(32, 2))),
    ),
    picture=pictures.curves("shaken net.output", "line", ("alpha", "mu"), "your net after its weights were shaken: alpha and mu as functions of x1"),
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
        wrong("ldj_scalar", "shape", "ldj", "`ldj` is a single zero; every row needs its own, shape (B,).", ldj=lambda self, x: torch.zeros(())),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` has one zero for each entry of x; every row needs one, shape (B,).", ldj=lambda self, x: torch.zeros(x.shape)),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1); it should be (B,).", ldj=lambda self, x: torch.zeros(len(x), 1)),
        wrong("ldj_dims", "shape", "ldj", "`ldj` has one number for each dimension; every row of the batch needs one, shape (B,).", ldj=lambda self, x: torch.zeros(x.shape[1])),
        wrong("ldj_one", "constant", "ldj", "`ldj` is the determinant, 1 in size; its logarithm is asked for.", ldj=lambda self, x: torch.ones(len(x))),
    ),
    compare=BIJECTION[:3],
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
    losses, diary, end_ = outputs["training.losses"], outputs["training.diary"], outputs["training.end"]
    start = np.concatenate([inputs["a"], inputs["b"]])
    nll, _ = affine_nll(inputs, start)
    n, D = inputs["x"].shape
    readings = {"nll": nll, "-nll": -nll, "sum": nll * n, "-sum": -nll * n, "per dimension": nll / D}
    first = losses[0] if len(losses) else np.nan
    loss = next((k for k, v in readings.items() if np.isclose(first, v, rtol=1e-5)), "other")
    stops = np.concatenate([diary, end_[None]])
    moved = np.abs(np.diff(stops, axis=0)).max(1) > 1e-12 if len(stops) > 1 else np.zeros(0, bool)
    values = [affine_nll(inputs, p)[0] for p in stops]
    slopes = [affine_nll(inputs, p)[1] for p in diary]
    grad = outputs["training.grad"]
    if not np.any(grad):
        gradient = "none left"
    else:
        unit = {"nll": 1, "-nll": -1, "sum": n, "-sum": -n, "per dimension": 1 / D}.get(loss, 1)
        gradient = ("fresh" if slopes and np.allclose(grad, unit * slopes[-1], rtol=1e-4, atol=1e-8) else
                    "accumulated" if slopes and np.allclose(grad, unit * sum(slopes), rtol=1e-4, atol=1e-8) else "other")
    still = outputs["training with lr = 0.end"]
    return {
        "loss": loss, "count": len(losses), "looked": len(diary), "moved": "".join("yn"[not m] for m in moved),
        "downhill": "down" if values[-1] < values[0] - 1e-9 else "up" if values[-1] > values[0] + 1e-9 else "flat",
        "gradient": gradient, "graph": bool(outputs["training.graph"]), "lr": "used" if np.allclose(still, start, atol=1e-9) else "ignored",
    }


def trained_losses(inputs, outputs, reference):
    t = training(inputs, outputs)
    if t["count"] != 3:
        raise Fail(f"For 3 batches there are {t['count']} losses; there should be one for each.")
    if t["loss"] != "nll":
        nll, _ = affine_nll(inputs, np.concatenate([inputs["a"], inputs["b"]]))
        raise Fail("The first loss is not the mean negative log-likelihood of the first batch.",
                   f"expected {nll:.4f}, got {outputs['training.losses'][0]:.4f}")
    if t["graph"]:
        raise Fail("The losses still hold their computation graphs, which fill the memory batch by batch; plain numbers are asked for.")


def trained_downhill(inputs, outputs, reference):
    t = training(inputs, outputs)
    if t["downhill"] == "flat":
        raise Fail("After three batches the parameters of the flow are where they were.")
    if t["downhill"] == "up":
        raise Fail("The parameters move uphill: the data become less likely under the flow with every step.")
    if t["moved"] != "yyy":
        raise Fail("The parameters do not move with every batch.")


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


def hump_gap(theta):
    """KL(two humps || the trained flow) in nats, by quadrature."""
    x = np.linspace(-6, 6, 2401)
    p = np.exp(-0.5 * ((x[:, None] - [-2.0, 2.0]) / 0.5) ** 2).sum(1) / (2 * 0.5 * np.sqrt(2 * np.pi))
    with torch.no_grad(), quiet_world():
        log_q = HumpFlow(theta).log_prob(tensor(x[:, None])).numpy()
    return float((p * (np.log(np.maximum(p, 1e-300)) - log_q)).sum() * (x[1] - x[0]))


def trained_humps(inputs, outputs, reference):
    theta = outputs["training on two humps.theta"]
    if theta.shape != (9,):
        raise Fail("The flow that was trained has lost its parameters.")
    gap = hump_gap(theta)
    if not gap < HUMP_GAP:
        raise Fail(f"After 250 batches of a two-humped target the flow is {gap:.3f} nats away from it; under {HUMP_GAP} is asked for.")


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


def looping(loss=lambda flow, x: -flow.log_prob(x).mean(), zero=True, back=True, step=True, keep=lambda l: l.item(), rate=None, first_only=False, back_loss=None):
    """A training loop with one thing wrong with it."""

    def train(flow, batches, lr):
        optimiser = torch.optim.Adam(flow.parameters(), lr=lr if rate is None else rate)
        losses = []
        for x in batches:
            value = loss(flow, x)
            if zero:
                optimiser.zero_grad()
            if back:
                (value if back_loss is None else back_loss(value)).backward()
            if step:
                optimiser.step()
            losses.append(keep(value))
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
        Misconception("graph_kept", "detached", "loss", "The list holds the loss tensors themselves, with all that they were computed from, instead of plain numbers.", looping(keep=lambda v: v)),
        Misconception("lr_ignored", "constant", "parameters", "The argument `lr` is not passed on to the optimiser.", looping(rate=1e-3)),
        Misconception("first_batch_only", "order", "value", "Only the first batch is used: the function returns from inside the loop.", looping(first_only=True)),
        Misconception("sign_recorded", "sign", "loss", "The losses written down are log-likelihoods; the training itself goes the right way.", looping(keep=lambda v: -v.item())),
    ),
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
    features=lambda i, o: {"same": str(_study(o, i) is not None and len(set(_study(o, i))) == 1),
                           "complaint": str(sorted(k + s.split(";")[0] + s.split("it is")[-1][:10] for k, s in o.complaints().values()))},
)


def _study(outputs, inputs):
    keys = [f"study({int(s)}).result" for s in inputs["settings"]]
    return [float(outputs.arrays[k]) for k in keys] if all(k in outputs for k in keys) else None


FIRST = (COUPLING, MAKE_NET, PERMUTE, TRAIN_FLOW, BONUS_STUDY)
EXERCISES = FIRST
