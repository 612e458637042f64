"""Lesson 07, inference: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import copy
import itertools
import math
import re

import numpy as np
import torch

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import B, deviating, flowkit_class, function, gradient_arrives
from autograder.judge import compared
from flowkit import plotting

ASSIGNMENT = "07_inference"
TITLE = "Variational inference with flows"
# What a class run must not let a submission import: this module holds the references of this lesson.
REFERENCES = ("flowkit.inference",)
TEXTS = {"forward_vs_reverse_text": 2.0}  # the written answer, marked by hand: cell -> points

LOG_2PI = math.log(2 * math.pi)


# --- shared: nets, a flow and its density, numbers of the right shape ----------------------------------------------------

def inference_given(rng, **arrays):
    """Arrays that gradients reach, net.name, each with a direction to nudge it along: short, for many weights are nudged at once."""
    given = {f"net.{k}": v for k, v in arrays.items()}
    return given | {f"direction.{k}": 0.25 * rng.standard_normal(v.shape) for k, v in arrays.items()}


def inference_net(rng, name, d_in, d_out, hidden=12):
    """Weights of order one of autograder.probes.common.tanh_net."""
    scale = {"W1": 1 / d_in**0.5, "b1": 0.5, "W2": 1.2 / hidden**0.5, "b2": 0.3}
    shapes = {"W1": (d_in, hidden), "b1": (hidden,), "W2": (hidden, d_out), "b2": (d_out,)}
    return inference_given(rng, **{f"{name} {k}": scale[k] * rng.standard_normal(s) for k, s in shapes.items()})


def inference_tanh(inputs, name, x):
    W1, b1, W2, b2 = (inputs[f"net.{name} {k}"] for k in ("W1", "b1", "W2", "b2"))
    return np.tanh(x @ W1 + b1) @ W2 + b2


def inference_moments(inputs, name, x):
    loc, s = np.split(inference_tanh(inputs, name, x), 2, -1)
    return loc, np.exp(0.5 * s)


def inference_normal(x, loc, scale):
    """The log-density of independent normals, summed over the last dimension."""
    return (-0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * LOG_2PI).sum(-1)


def inference_rows(outputs, key, name, batch):
    """A student's numbers, one for each row; Fail if the shape is another."""
    got = outputs[f"{key}.{name}"]
    if got.shape != (batch,):
        raise Fail(f"The result has shape {got.shape} for a batch of {batch}{' row' * (batch == 1)}; it should be (B,) = {(batch,)}.")
    return got


def inference_meddled(inputs, outputs, key="x after", x="net.x"):
    """A word where an answer touched what is not its own, which spoils all numbers; or None."""
    for name in ("seeded", "backward"):
        if int(outputs.arrays.get(name, 0)):
            return name
    after = outputs.arrays.get(key)
    return "in place" if after is not None and not np.array_equal(after, inputs[x]) else None


def inference_seen(compare, *met, meddled=inference_meddled, ran=()):
    """Features: the arrays of `compare`, whether the first is as precise as its inputs, and which steps of `ran` could be run.

    Or a word, for an answer that meddled with what is not its own, and where two things met in each other's place and their sizes tell which:
    `met` = (step, pattern, word).
    """

    def features(inputs, outputs):
        if word := meddled(inputs, outputs):
            return {compare[0]: np.asarray(word)}
        for step, pattern, word in met:
            kind, sentence = outputs.complaint(step) or ("", "")
            if kind == "raised" and re.search(pattern, sentence):
                return {compare[0]: np.asarray(word)}
        found = compared(compare, outputs)
        found["precise"] = np.asarray(found[compare[0]].dtype != np.float32)
        if (late := [v for k, v in outputs.arrays.items() if k.startswith("in float64.")]):
            found["precise by default"] = np.asarray(late[0].dtype != np.float32)
        return found | {step: np.asarray("ran" if any(k.startswith(f"{step}.") for k in outputs.arrays) else "did not run") for step in ran}

    return features


def inference_own(outputs, *keys):
    """The generator was not seeded, and what is made of float64 is float64."""
    for key in keys:
        if outputs[key].dtype != np.float64:
            raise Fail("The result is float32 where all that was handed in is float64: half of the digits are lost on the way.")


def inference_unseeded(outputs):
    if int(outputs["seeded"]):
        raise Fail("The generator is seeded inside: every draw that follows is the same in each call, here and in the program around.")


def inference_left(inputs, outputs, key):
    """The answer gave `key`, and left x as it was."""
    outputs[key]
    if not np.array_equal(outputs["x after"], inputs["net.x"]):
        raise Fail("`x` was changed in place: the caller's tensor is overwritten.")


def kl_weights(rng, D, bend=0.6):
    return inference_given(rng, m=0.5 * rng.standard_normal(D), s=0.3 * rng.standard_normal(D), u=bend * rng.standard_normal(D - 1), v=0.5 * rng.standard_normal(D - 1))


def kl_conditioned(inputs, prefix, x1):
    """Shift and log-scale of autograder.probes.lesson07.KLMap, (N, D) each."""
    m, s, u, v = (inputs[f"{prefix}net.{k}"] for k in "msuv")
    zero = np.zeros_like(x1)
    return m + np.concatenate([zero, x1 * v], -1), s + np.concatenate([zero, np.tanh(x1) * u], -1)


def kl_base(z, width):
    return inference_normal(z, 0.0, width * np.ones(z.shape[-1]))


def kl_draws(inputs, prefix, n, width=1.0):
    """x (n, D) and log q (n,) of the first n rows of noise, for a base of that width."""
    z = width * inputs[f"{prefix}noise"][:n]
    m, s = inputs[f"{prefix}net.m"], inputs[f"{prefix}net.s"]
    shift, log_scale = kl_conditioned(inputs, prefix, m[:1] + z[:, :1] * np.exp(s[:1]))
    return shift + z * np.exp(log_scale), kl_base(z, width) - log_scale.sum(-1)


def kl_log_prob(inputs, prefix, x, width=1.0):
    shift, log_scale = kl_conditioned(inputs, prefix, x[:, :1])
    return kl_base((x - shift) * np.exp(-log_scale), width) - log_scale.sum(-1)


def kl_log_target(means, log_scale, x):
    return np.logaddexp.reduce(inference_normal(x[:, None], means, np.exp(log_scale)), -1) - math.log(len(means))


def kl_number(outputs, key, want, why=""):
    """The answer's number `key`.kl must be `want`."""
    got = outputs[f"{key}.kl"]
    if got.shape != ():
        raise Fail(f"The result has shape {got.shape}; one number, of shape (), is asked for.")
    if not laws.close(got, want, laws.tolerance(got)):
        raise Fail(f"The result is not what it should be{why}.", laws.expected(want, float(got)))


KL_LINE = np.linspace(-12, 12, 4801)
KL_HUMPS = (-2.0, 2.0)
KL_LOG_SCALE = math.log(0.5)
KL_MOST = 0.9
"""Nats that either training may leave. The best normal distribution is at 0.69 of KL(q || p), on one hump, and at 0.72 of KL(p || q), on both;
both start at N(1, 1), with 2.1 of either; fitted by the other divergence it is at 2.1 and more."""


def kl_training(rng):
    """The same target, start and steps for both divergences. By their name ("grid") only the answer itself trains."""
    shares = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(32.0) + 0.5) / 32).double().numpy()[:, None]
    return {"train.humps": np.array(KL_HUMPS)[:, None], "train.log_scale": np.array([KL_LOG_SCALE]), "train.start": np.array([1.0, 0.0]),
            "train.rate": np.array(0.15), "train.steps": np.array(50), "train.noise grid": shares,
            "train.x grid": np.concatenate([c + math.exp(KL_LOG_SCALE) * shares for c in KL_HUMPS])}


def kl_on_the_line(numbers):
    """log p and log q on KL_LINE for a trained flow's mean and log-scale."""
    m, s = numbers.astype(float)
    return kl_log_target(np.array(KL_HUMPS)[:, None], np.array([KL_LOG_SCALE]), KL_LINE[:, None]), inference_normal(KL_LINE[:, None], m, np.exp(s))


def kl_of(a, b):
    return float((np.exp(a) * (a - b)).sum() * (KL_LINE[1] - KL_LINE[0]))


def kl_picture(other, words):
    """The target, the flow trained by the answer and, dashed, what the other divergence leads to."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(7, 3.4), layout="constrained")
        ax = figure.subplots()
        log_p, log_other = kl_on_the_line(other)
        ax.fill_between(KL_LINE, np.exp(log_p), color="#cccccc", label="target p")
        numbers = outputs.arrays.get("training.mean and log scale")
        if numbers is None or numbers.shape != (2,) or not np.isfinite(numbers).all():
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        else:
            ax.plot(KL_LINE, np.exp(kl_on_the_line(numbers)[1]), color=plotting.PALETTE["blue"], linewidth=2, label="q, trained by yours")
        ax.plot(KL_LINE, np.exp(log_other), "--", color=plotting.PALETTE["orange"], label=words)
        ax.set_xlim(-6, 6), ax.set_ylim(0, 1.25), ax.set_xlabel("x", fontsize=plotting.FONT)
        ax.legend(fontsize=plotting.FONT - 1, frameon=False, loc="upper left")
        return figure

    return draw


# --- reverse_kl ------------------------------------------------------------------------------------------------------

def reverse_inputs(rng):
    curved = kl_weights(rng, 2) | inference_given(rng, means=1.5 * rng.standard_normal((2, 2)))
    # More rows of noise than are asked for, so that a second set of draws is another one.
    curved |= {"noise": rng.standard_normal((24, 2)), "n": np.array(7), "target.log_scale": 0.3 * rng.standard_normal(2)}
    curved["target.means"] = curved["net.means"]
    D = 3
    # Points with mean 0 and covariance I: a mean over them of anything quadratic is the expectation itself.
    gaussian = kl_weights(rng, D, 0.0) | {"noise": np.concatenate([math.sqrt(D) * np.concatenate([np.eye(D), -np.eye(D)]), rng.standard_normal((3 * D, D))]), "n": np.array(2 * D)}
    gaussian |= {"target.means": rng.standard_normal((1, D)), "target.log_scale": 0.3 * rng.standard_normal(D)}
    line = kl_weights(rng, 1) | {"noise": rng.standard_normal((24, 1)), "target.means": rng.standard_normal((2, 1)), "target.log_scale": 0.3 * rng.standard_normal(1)}
    inputs = {f"{name}.{k}": v for name, given in (("curved", curved), ("gaussian", gaussian), ("line", line)) for k, v in given.items()}
    return inputs | kl_training(rng) | {"nudges": laws.STEP * laws.OFFSETS, "width": np.array(1.6)}


def reverse_want(inputs, n, offset=0.0, name="curved.", width=1.0):
    x, log_q = kl_draws(inputs, name, n, width)
    return (log_q - kl_log_target(inputs[f"{name}target.means"], inputs[f"{name}target.log_scale"], x) - offset).mean()


def reverse_gaussian(inputs, outputs, reference):
    m, s, v = (inputs[f"gaussian.net.{k}"] for k in "msv")
    A = np.diag(np.exp(s))
    A[1:, 0] = v * np.exp(s[0])
    mean = m + np.append(0.0, v * m[0])
    t, log_r = inputs["gaussian.target.means"][0], inputs["gaussian.target.log_scale"]
    want = 0.5 * ((((A**2).sum(1) + (mean - t) ** 2) * np.exp(-2 * log_r)).sum() - len(m)) + log_r.sum() - s.sum()
    kl_number(outputs, "two Gaussians", want, " for two normal distributions, whose KL(q || p) is a closed form")


def reverse_value(inputs, outputs, reference):
    inference_unseeded(outputs)
    n = int(inputs["curved.n"])
    for key, count, offset, why in (("samples", n, 0.0, f" for the flow's {n} draws"), ("one sample", 1, 0.0, " for n = 1"),
                                    ("target far below", n, -2000.0, " for a target that is not normalised, log p - 2000"),
                                    ("target above", n, 50.0, " for a target that is not normalised, log p + 50"),
                                    ("under no_grad", n, 0.0, " under no_grad"), ("in float32", n, 0.0, " in float32")):
        kl_number(outputs, key, reverse_want(inputs, count, offset), why)
    kl_number(outputs, "one coordinate", reverse_want(inputs, n, name="line."), " for points (n, 1) with one coordinate")
    kl_number(outputs, "another base", reverse_want(inputs, n, width=float(inputs["width"])), " for a flow whose base is another than the standard normal distribution")


def reverse_gradient(inputs, outputs, reference):
    kl_shape(outputs, "samples")
    gradient_arrives(outputs, "", "the result", "the flow's weights, through its samples and its density, and those of `log_target`")


def kl_shape(outputs, key):
    if outputs[f"{key}.kl"].shape != ():
        raise Fail("One number, of shape (), is asked for.")


def reverse_trained(inputs, outputs, reference):
    log_p, log_q = kl_on_the_line(outputs["training.mean and log scale"])
    if not (left := kl_of(log_q, log_p)) <= KL_MOST:
        raise Fail("Training by it does not make KL(q || p) small: a normal distribution should end on the nearer of two humps.", f"{left:.2f} nats are left, {KL_MOST} at most are asked for")


def kl_from_base(sign):
    """Draws by base and transform, with log q = log base + sign * ldj."""

    def draw(flow, n):
        z = flow.base.sample((n,))
        x, ldj = flow.transform.inverse_and_ldj(z)
        return x, flow.base.log_prob(z) + sign * ldj

    return draw


def kl_wrong_way(flow, n):
    z = flow.base.sample((n,))
    x, ldj = flow.transform.forward(z)
    return x, flow.base.log_prob(z) - ldj


def kl_latents(flow, n):
    z = flow.base.sample((n,))
    return z, flow.log_prob(z)


def kl_target_at_latents(flow, n):
    z = flow.base.sample((n,))
    return z, flow.log_prob(flow.transform.inverse(z))


def kl_base_at_x(flow, n):
    x = flow.sample(n)
    return x, flow.base.log_prob(x)


def kl_cut(flow, n):
    x = flow.sample(n).detach()
    return x, flow.log_prob(x)


def kl_cut_for_target(flow, n):
    x, log_q = flow.sample_and_log_prob(n)
    return x.detach(), log_q


def kl_two_sets(q_first):
    """log q at one set of samples, x another; which of them is drawn first makes other numbers."""

    def draw(flow, n):
        if q_first:
            log_q = flow.log_prob(flow.sample(n))
            return flow.sample(n), log_q
        x = flow.sample(n)
        return x, flow.log_prob(flow.sample(n))

    return draw


def kl_normal_base(flow, n):
    x = flow.sample(n)
    z, ldj = flow.transform(x)
    return x, (-0.5 * z**2 - 0.5 * LOG_2PI).sum(-1) + ldj


def kl_seeded(flow, n):
    torch.default_generator.manual_seed(0)
    return flow.sample_and_log_prob(n)


def kl_backward(kl):
    kl.backward(retain_graph=True)
    return kl


KL_SEEDED = "The generator is seeded inside: every draw that follows is the same in each call, here and in the program around."
KL_BACKWARD = "`backward` is called inside: it belongs to the training loop; here the number is returned, with its graph."
KL_FLOAT = "The result is turned into float32, whatever the precision of the flow."


def kl_own_noise(flow, n):
    x = flow.transform.inverse(torch.randn(n, *flow.base.event_shape))
    return x, flow.log_prob(x)


def reverse_by(draw=lambda flow, n: flow.sample_and_log_prob(n), log_p=lambda target, x: target(x), end=lambda q, p: (q - p).mean()):
    """A function `reverse_kl` in its plainest form, in which a mistake changes one part."""

    def reverse_kl(flow, log_target, n):
        x, log_q = draw(flow, n)
        return end(log_q, log_p(log_target, x))

    return function(reverse_kl)


def reverse_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, reverse_by(**parts))


REVERSE_COMPARED = ("two Gaussians.kl", "samples.kl", "one sample.kl", "target far below.kl", "target above.kl", "one coordinate.kl", "another base.kl", "gradient.along")
REVERSE = Exercise(
    id="reverse_kl", title="Reverse KL: a flow for a density that can only be evaluated", minutes=12, difficulty=3,
    hints=(
        "KL(q || p) is an expectation over q, so draw n points from the flow, and average over them what the logarithm of q / p gives. Nothing is drawn from p; it is only evaluated.",
        "The points depend on the flow's weights, and the gradient has to go through them: flowkit's `flow.sample(n)` draws under no_grad, `flow.sample_and_log_prob(n)` gives x and log q(x) with everything alive. Then the mean of log_q - log_target(x).",
    ),
    inputs=reverse_inputs, reference=flowkit_class("inference", "reverse_kl"),
    cases=(
        Case("KL between two normal distributions, against the closed form", 2, reverse_gaussian),
        Case("the mean of log q(x) - log p(x) over n draws of the flow, normalised or not", 1.5, reverse_value),
        Case("in the precision of the flow", 0.5, lambda i, o, r: inference_own(o, "samples.kl")),
        Case("the gradient goes through the samples", 3, reverse_gradient),
        Case("training by it finds a hump", 1, reverse_trained),
    ),
    misconceptions=(
        reverse_wrong("turned", "sign", "value", "The sign is turned: log p - log q is minus the divergence, and making it small drives q away from p.", end=lambda q, p: (p - q).mean()),
        reverse_wrong("added", "sign", "value", "log q and log p are added; KL(q || p) has their difference.", end=lambda q, p: (q + p).mean()),
        reverse_wrong("added_turned", "sign", "value", "Both logarithms have a minus sign; log q counts with a plus.", end=lambda q, p: -(q + p).mean()),
        reverse_wrong("no_log_q", "missing term", "value", "log q is missing: without the entropy of q the flow would shrink to the target's highest point.", end=lambda q, p: -p.mean()),
        reverse_wrong("no_log_q_plus", "missing term", "value", "log q is missing: the mean of log p alone is returned.", end=lambda q, p: p.mean()),
        reverse_wrong("no_log_p", "missing term", "value", "log p is missing: what is left is minus the entropy of q, which knows nothing of the target.", end=lambda q, p: q.mean()),
        reverse_wrong("no_log_p_minus", "missing term", "value", "log p is missing: what is returned is the entropy of q, which knows nothing of the target.", end=lambda q, p: -q.mean()),
        reverse_wrong("not_averaged", "reduction", "value", "There is one number for each sample; their mean is asked for.", end=lambda q, p: q - p),
        reverse_wrong("sum", "reduction", "value", "The samples are summed; their mean is the estimate of the divergence.", end=lambda q, p: (q - p).sum()),
        reverse_wrong("mean_kept", "shape", "value", "The mean has shape (1,): the dimension that was averaged over is still there; one number, of shape (), is asked for.", end=lambda q, p: (q - p).mean(0, keepdim=True)),
        reverse_wrong("log_p_summed", "reduction", "value", "log p is summed over the samples, log q averaged; both are means.", end=lambda q, p: q.mean() - p.sum()),
        reverse_wrong("log_q_summed", "reduction", "value", "log q is summed over the samples, log p averaged; both are means.", end=lambda q, p: q.sum() - p.mean()),
        reverse_wrong("weighted", "extra term", "value", "Each sample is weighted by q(x); they are drawn from q already, so their plain mean is the expectation.", end=lambda q, p: (q.exp() * (q - p)).mean()),
        reverse_wrong("weighted_sum", "extra term", "value", "This is the sum of q log(q / p) over the samples, as over the states of a table; the samples are drawn from q already, so the plain mean of log(q / p) is meant.", end=lambda q, p: (q.exp() * (q - p)).sum()),
        reverse_wrong("forward", "exchanged", "value", "This is KL(p || q), by importance weights p / q; q and p have changed places.", end=lambda q, p: ((p - q).exp() * (p - q)).mean()),
        reverse_wrong("log_mean_exp", "order", "value", "The mean is taken of p / q, and then the logarithm: that estimates the normaliser of p. Take the logarithm first, then the mean.", end=lambda q, p: -torch.logsumexp(p - q, 0) + math.log(len(p))),
        reverse_wrong("log_mean_exp_turned", "order", "value", "The mean is taken of q / p, and then the logarithm; take the logarithm first, then the mean.", end=lambda q, p: torch.logsumexp(q - p, 0) - math.log(len(p))),
        reverse_wrong("ratio", "wrong function", "value", "The two logarithms are divided; the logarithm of q / p is their difference.", end=lambda q, p: (q / p).mean()),
        reverse_wrong("product", "wrong function", "value", "The two logarithms are multiplied; the logarithm of q / p is their difference.", end=lambda q, p: (q * p).mean()),
        reverse_wrong("ratio_itself", "missing function", "value", "The mean of q / p itself is returned; the mean of its logarithm is asked for.", end=lambda q, p: (q - p).exp().mean()),
        reverse_wrong("through_exp", "wrong function", "value", "The densities themselves are formed and divided before the logarithm; far from the target they underflow. The logarithms are there: subtract them.", end=lambda q, p: (q.exp() / p.exp()).log().mean()),
        reverse_wrong("exp_of_target", "extra term", "value", "exp is taken of `log_target`; the divergence has the logarithm itself.", end=lambda q, p: (q - p.exp()).mean()),
        reverse_wrong("log_of_target", "extra term", "value", "A logarithm is taken of `log_target`, which is one already.", end=lambda q, p: (q - p.abs().log()).mean()),
        reverse_wrong("log_of_log_q", "extra term", "value", "A logarithm is taken of log q, which is one already.", end=lambda q, p: (q.abs().log() - p).mean()),
        reverse_wrong("absolute", "extra term", "value", "The absolute value is taken of each sample's difference; single differences may be negative, and an unnormalised target makes their mean so.", end=lambda q, p: (q - p).abs().mean()),
        reverse_wrong("absolute_of_mean", "extra term", "value", "The absolute value is taken of the mean; for a target that is not normalised KL - c may be negative.", end=lambda q, p: (q - p).mean().abs()),
        reverse_wrong("clamped", "extra term", "value", "The result is kept from becoming negative; for a target that is not normalised KL - c may be.", end=lambda q, p: (q - p).mean().clamp(min=0)),
        reverse_wrong("squared", "wrong function", "value", "The squared difference of the logarithms is averaged; the divergence is the mean of the difference itself.", end=lambda q, p: ((q - p) ** 2).mean()),
        reverse_wrong("bits", "extra term", "value", "The result is divided by log 2, which makes it bits; nats are asked for.", end=lambda q, p: (q - p).mean() / math.log(2)),
        reverse_wrong("per_dimension", "extra term", "value", "The result is divided by the number of dimensions; nats for each point are asked for.",
                      draw=lambda flow, n: (lambda x, q: (x, q / x.shape[1]))(*flow.sample_and_log_prob(n)), log_p=lambda t, x: t(x) / x.shape[1]),
        reverse_wrong("ldj_sign", "sign", "value", "log q has the log-determinant with the wrong sign: log q(x) = log base(z) + log|det dz/dx|, with the sign that ldj has in both directions.", draw=kl_from_base(-1)),
        reverse_wrong("no_ldj", "missing term", "value", "log q is the base's log-density alone: the log-determinant is missing.", draw=kl_from_base(0)),
        reverse_wrong("base_at_x", "wrong function", "value", "log q is the base's density at x; the flow's own density is meant, `flow.log_prob(x)`.", draw=kl_base_at_x),
        reverse_wrong("wrong_way", "direction", "value", "The base's draws are sent forward, from data to latent; samples come from `inverse`.", draw=kl_wrong_way),
        reverse_wrong("at_latents", "missing function", "value", "Both densities are asked about the base's draws z; they have to go through the flow first, to become samples x.", draw=kl_latents),
        reverse_wrong("target_at_latents", "wrong function", "value", "log_target is asked about the latents z; it is a density of the samples x.", draw=kl_target_at_latents),
        reverse_wrong("own_noise", "wrong function", "value", "The samples are made of your own normal noise; the flow has a base, and draws by itself.", draw=kl_own_noise),
        reverse_wrong("exchanged", "exchanged", "value", "x and log q are taken from flow.sample_and_log_prob in the wrong order: it gives (x, log_q).", draw=lambda flow, n: flow.sample_and_log_prob(n)[::-1]),
        reverse_wrong("n_ignored", "constant", "value", "The number of samples is fixed, whatever `n` is.", draw=lambda flow, n: flow.sample_and_log_prob(100)),
        reverse_wrong("one_only", "constant", "value", "Only one sample is drawn, whatever `n` is.", draw=lambda flow, n: flow.sample_and_log_prob(1)),
        reverse_wrong("samples_cut_off", "detached", "gradient", "The samples are cut off from the computation graph (detach or no_grad), so the target's slope never reaches the flow: it cannot learn where p is high.", draw=kl_cut),
        reverse_wrong("target_cut_off", "detached", "gradient", "log_target is asked about samples that are cut off from the computation graph: the target's slope never reaches the flow, and only its entropy is trained.", draw=kl_cut_for_target),
        reverse_wrong("log_p_no_grad", "detached", "gradient", "log p is computed under no_grad or detached: the target's slope never reaches the flow, and only its entropy is trained.", end=lambda q, p: (q - p.detach()).mean()),
        reverse_wrong("log_q_cut_off", "detached", "gradient", "log q is cut off from the computation graph, so nothing keeps the flow from shrinking to a point.", end=lambda q, p: (q.detach() - p).mean()),
        reverse_wrong("detached", "detached", "gradient", "The result is cut off from the computation graph, so nothing can be trained by it.", end=lambda q, p: (q - p).mean().detach()),
        reverse_wrong("seeded", "state", "state", KL_SEEDED, draw=kl_seeded),
        reverse_wrong("two_sets", "state", "value", "The samples are drawn twice: log q belongs to other points than log p. One set of n samples serves both.", draw=kl_two_sets(True)),
        reverse_wrong("two_sets_turned", "state", "value", "The samples are drawn twice: log p belongs to other points than log q. One set of n samples serves both.", draw=kl_two_sets(False)),
        reverse_wrong("normal_base", "constant", "value", "The flow's base is taken to be a standard normal distribution; the flow's own base is meant.", draw=kl_normal_base),
        reverse_wrong("squeezed_for_target", "shape", "value", "`log_target` is asked about squeezed samples: points with one coordinate lose it, and n points become one.", log_p=lambda target, x: target(x.squeeze())),
        reverse_wrong("squeezed", "shape", "value", "The samples are squeezed: points with one coordinate lose it, and n points become one.", draw=lambda flow, n: (lambda x: (x, flow.log_prob(x)))(flow.sample(n).squeeze())),
        reverse_wrong("backward_inside", "extra term", "gradient", KL_BACKWARD, end=lambda q, p: kl_backward((q - p).mean())),
        reverse_wrong("float32", "type", "value", KL_FLOAT, end=lambda q, p: (q - p).mean().float()),
        reverse_wrong("item", "type", "value", "A plain number is returned, which has no gradient; the tensor itself is asked for.", end=lambda q, p: (q - p).mean().item()),
    ),
    compare=REVERSE_COMPARED, features=inference_seen(REVERSE_COMPARED, ("two Gaussians", r"log_target is given a tensor of shape \(6,\)", "log_q for x")),
    picture=kl_picture(np.array([0.0, math.log(math.sqrt(4.25))]), "what forward KL leads to"),
)


# --- forward_kl ------------------------------------------------------------------------------------------------------

def forward_inputs(rng):
    inputs = {}
    for D in (2, 6):
        mine = kl_weights(rng, D, 0.3) | inference_given(rng, x=1.5 * rng.standard_normal((B, D))) | {"noise": rng.standard_normal((B, D))}
        inputs |= {f"D={D} {k}": v for k, v in mine.items()}
    narrow = kl_weights(rng, 2, 0.3) | {"noise": rng.standard_normal((B, 2))}
    narrow["net.s"] = narrow["net.s"] - 3.0     # a density above 1, so that its logarithm is positive
    narrow["x"], _ = kl_draws(narrow, "", B)
    inputs |= {f"narrow {k}": v for k, v in narrow.items()}
    line = kl_weights(rng, 1) | {"noise": rng.standard_normal((B, 1)), "x": rng.standard_normal((B, 1))}
    inputs |= {f"line {k}": v for k, v in line.items()} | {"width": np.array(1.6)}
    return inputs | kl_training(rng) | {"nudges": laws.STEP * laws.OFFSETS}


def forward_value(inputs, outputs, reference):
    inference_unseeded(outputs)
    x = inputs["D=2 net.x"]
    asked = [("D=2 points", "D=2 ", x, ""), ("D=6 points", "D=6 ", inputs["D=6 net.x"], " with D = 6"), ("one point", "D=2 ", x[:1], " for one point")]
    asked += [("points far out", "D=2 ", 1e3 * x, " for points far out"), ("narrow density", "narrow ", inputs["narrow x"], " for a narrow density"), ("under no_grad", "D=2 ", x, " under no_grad"), ("in float32", "D=2 ", x, " in float32")]
    asked += [("one coordinate", "line ", inputs["line x"], " for points (N, 1) with one coordinate"), ("another base", "D=2 ", x, " for a flow whose base is another than the standard normal distribution")]
    for key, prefix, points, why in asked:
        kl_number(outputs, key, -kl_log_prob(inputs, prefix, points, float(inputs["width"]) if key == "another base" else 1.0).mean(), why)
    if not np.array_equal(outputs["D=2 points.x after"], x):
        raise Fail("`x` was changed in place: the caller's tensor is overwritten.")


def forward_gradient(inputs, outputs, reference):
    kl_shape(outputs, "D=2 points")
    gradient_arrives(outputs, "", "the result", "`x` and the flow's weights")


def forward_trained(inputs, outputs, reference):
    log_p, log_q = kl_on_the_line(outputs["training.mean and log scale"])
    if not (left := kl_of(log_p, log_q)) <= KL_MOST:
        m, s = outputs["training.mean and log scale"].astype(float)
        raise Fail("Training by it does not cover the data: a normal distribution should end up over both humps, in the middle and wide.", f"it is at {m:.2f} with width {math.exp(min(s, 50.0)):.2f}, and {left:.2f} nats are left")


def forward_by(log_q=lambda flow, x: flow.log_prob(x), end=lambda q: -q.mean()):
    def forward_kl(flow, x):
        return end(log_q(flow, x))

    return function(forward_kl)


def forward_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, forward_by(**parts))


def forward_of_latents(sign):
    def log_q(flow, x):
        z, ldj = flow.transform(x)
        return flow.base.log_prob(z) + sign * ldj

    return log_q


def forward_in_place(flow, x):
    x -= x.mean(0)
    return flow.log_prob(x)


def forward_normal_base(flow, x):
    z, ldj = flow.transform(x)
    return (-0.5 * z**2 - 0.5 * LOG_2PI).sum(-1) + ldj


def forward_seeded(flow, x):
    torch.default_generator.manual_seed(0)
    return flow.log_prob(x)


def no_grad_log_prob(flow, x):
    with torch.no_grad():
        return flow.log_prob(x)


FORWARD_COMPARED = ("D=2 points.kl", "D=6 points.kl", "one point.kl", "points far out.kl", "narrow density.kl", "one coordinate.kl", "another base.kl", "gradient.along", "D=2 points.x after")
FORWARD = Exercise(
    id="forward_kl", title="Forward KL: a flow fitted to data", minutes=6, difficulty=2,
    hints=(
        "KL(p || q) is an expectation over p, and the rows of x are draws from p. Of its two terms one, the entropy of the data, does not depend on the flow: leave it out.",
        "What is left is -E_p[log q(x)], estimated by the mean over the rows of x: the loss of maximum likelihood, one number.",
    ),
    inputs=forward_inputs, reference=flowkit_class("inference", "forward_kl"),
    cases=(
        Case("the mean of -log q(x) over the points, one number", 2.5, forward_value),
        Case("in the precision of the flow", 0.5, lambda i, o, r: inference_own(o, "D=2 points.kl")),
        Case("the gradient reaches the flow and x", 1, forward_gradient),
        Case("training by it covers both humps", 1, forward_trained),
    ),
    misconceptions=(
        forward_wrong("sign", "sign", "value", "The sign is turned: this is the mean log-likelihood, and making it small makes the data unlikely.", end=lambda q: q.mean()),
        forward_wrong("not_averaged", "reduction", "value", "There is one number for each point; their mean is asked for.", end=lambda q: -q),
        forward_wrong("not_averaged_sign", "reduction", "value", "The log-densities of the points are returned as they are; minus their mean is asked for.", end=lambda q: q),
        forward_wrong("sum", "reduction", "value", "The points are summed; their mean is the estimate of the expectation.", end=lambda q: -q.sum()),
        forward_wrong("sum_sign", "sign", "value", "This is the summed log-likelihood with the wrong sign; minus its mean is asked for.", end=lambda q: q.sum()),
        forward_wrong("mean_kept", "shape", "value", "The mean has shape (1,): the dimension that was averaged over is still there; one number, of shape (), is asked for.", end=lambda q: -q.mean(0, keepdim=True)),
        forward_wrong("density", "missing function", "value", "This is minus the mean of q(x) itself; the logarithm belongs inside.", end=lambda q: -q.exp().mean()),
        forward_wrong("log_mean_exp", "order", "value", "The mean of q(x) is taken before the logarithm; take the logarithm first, then the mean.", end=lambda q: -torch.logsumexp(q, 0) + math.log(len(q))),
        forward_wrong("log_of_log", "extra term", "value", "A logarithm is taken of `log_prob`, which is one already.", end=lambda q: -q.abs().log().mean()),
        forward_wrong("absolute", "extra term", "value", "The absolute value is taken of each log-density; where the density is above 1 its logarithm is positive, and counts with a minus.", end=lambda q: q.abs().mean()),
        forward_wrong("clamped", "extra term", "value", "The result is kept from becoming negative; densities may be above 1.", end=lambda q: (-q.mean()).clamp(min=0)),
        forward_wrong("weighted", "extra term", "value", "Each point is weighted by q(x); they are drawn from p already, so their plain mean is the expectation.", end=lambda q: -(q.exp() * q).mean()),
        forward_wrong("squared", "wrong function", "value", "The squares of the log-densities are averaged; minus the log-densities themselves are meant.", end=lambda q: (q**2).mean()),
        forward_wrong("bits", "extra term", "value", "The result is divided by log 2, which makes it bits; nats are asked for.", end=lambda q: -q.mean() / math.log(2)),
        forward_wrong("per_dimension", "extra term", "value", "The result is divided by the number of dimensions; nats for each point are asked for.", log_q=lambda flow, x: flow.log_prob(x) / x.shape[1]),
        forward_wrong("exp_of_mean", "extra term", "value", "exp is taken of the result, as for a perplexity; nats are asked for.", end=lambda q: (-q.mean()).exp()),
        forward_wrong("own_samples", "exchanged", "value", "The mean is over the flow's own samples, which is the entropy of q and knows nothing of the data; the expectation is over the rows of x.", log_q=lambda flow, x: flow.log_prob(flow.sample(len(x)))),
        forward_wrong("reverse", "exchanged", "value", "q's density at its own samples is compared with that of the data: the expectation in KL(p || q) is over the data alone.", log_q=lambda flow, x: flow.log_prob(x) - flow.log_prob(flow.sample(len(x)))),
        forward_wrong("log_q_of_latents", "extra term", "value", "The flow's density is asked about the latents; it is a density of x.", log_q=lambda flow, x: flow.log_prob(flow.transform(x)[0])),
        forward_wrong("no_ldj", "missing term", "value", "The base's log-density at z stands for log q: the log-determinant is missing.", log_q=forward_of_latents(0)),
        forward_wrong("ldj_sign", "sign", "value", "The log-determinant has the wrong sign in log q; it is added as it comes.", log_q=forward_of_latents(-1)),
        forward_wrong("base_at_x", "wrong function", "value", "The base's density is asked about x; the flow's own density is meant.", log_q=lambda flow, x: flow.base.log_prob(x)),
        forward_wrong("in_place", "in place", "input", "x is changed in place: the caller's tensor is overwritten, and the points that are judged are others.", log_q=lambda flow, x: forward_in_place(flow, x)),
        forward_wrong("x_cut_off", "detached", "gradient", "x is cut off from the computation graph (detach, or made anew), so nothing before the flow could be trained.", log_q=lambda flow, x: flow.log_prob(x.detach())),
        forward_wrong("no_grad", "detached", "gradient", "log_prob is asked under no_grad, or its result is detached: nothing can be trained by it.", log_q=no_grad_log_prob),
        forward_wrong("normal_base", "constant", "value", "The flow's base is taken to be a standard normal distribution; the flow's own base is meant.", log_q=forward_normal_base),
        forward_wrong("squeezed", "shape", "value", "x is squeezed: points with one coordinate lose it, and N points become one.", log_q=lambda flow, x: flow.log_prob(x.squeeze())),
        forward_wrong("backward_inside", "extra term", "gradient", KL_BACKWARD, end=lambda q: kl_backward(-q.mean())),
        forward_wrong("seeded", "state", "state", KL_SEEDED, log_q=forward_seeded),
        forward_wrong("float32", "type", "value", KL_FLOAT, end=lambda q: -q.mean().float()),
        forward_wrong("item", "type", "value", "A plain number is returned, which has no gradient; the tensor itself is asked for.", end=lambda q: -q.mean().item()),
    ),
    compare=FORWARD_COMPARED, features=inference_seen(FORWARD_COMPARED, meddled=lambda i, o: inference_meddled(i, o, "D=2 points.x after", "D=2 net.x")),
    picture=kl_picture(np.array([2.0, KL_LOG_SCALE]), "what reverse KL leads to"),
)


# --- elbo ------------------------------------------------------------------------------------------------------------

ELBO_D, ELBO_Z = 3, 2
ELBO_ROLLS = 3  # draws of the encoder, any of which an answer may use


def elbo_inputs(rng):
    inputs = inference_net(rng, "encoder", ELBO_D, 2 * ELBO_Z) | inference_net(rng, "decoder", ELBO_Z, 2 * ELBO_D)
    flow = part_named("flow ", kl_weights(rng, ELBO_Z))
    inputs |= flow | inference_given(rng, **{"prior m": rng.standard_normal(ELBO_Z), "prior s": 0.4 * rng.standard_normal(ELBO_Z), "x": 1.5 * rng.standard_normal((B, ELBO_D))})
    inputs |= {"z noise": rng.standard_normal((B, ELBO_Z)), "x noise": rng.standard_normal((B, ELBO_D)), "r": rng.standard_normal(B), "nudges": laws.STEP * laws.OFFSETS}
    # A linear model with two numbers on either side: its posterior is normal, and made by a linear flow of another normal distribution.
    a, b, log_s = rng.uniform(0.7, 1.3, 2), 0.5 * rng.standard_normal(2), -0.5 + 0.2 * rng.standard_normal(2)
    m, log_t = 0.5 * rng.standard_normal(2), 0.3 * rng.standard_normal(2)
    shift, log_scale = 0.5 * rng.standard_normal(2), 0.4 + 0.3 * rng.random(2)
    v = 1 / (np.exp(-2 * log_t) + a**2 * np.exp(-2 * log_s))
    gain = v * a * np.exp(-2 * log_s)
    encoder = np.stack([np.exp(log_scale) * gain, shift + np.exp(log_scale) * (v * m * np.exp(-2 * log_t) - gain * b), log_scale + 0.5 * np.log(v)])
    linear = inference_given(rng, m=shift, s=log_scale, u=np.zeros(1), v=np.zeros(1))
    ideal = linear | {"x": 1.5 * rng.standard_normal((B, 2)), "noise": rng.standard_normal((B, 2)), "encoder": encoder, "decoder": np.stack([a, b, log_s]), "prior m": m, "prior s": log_t}
    return inputs | {f"ideal.{k}": v for k, v in ideal.items()}


def part_named(name, given):
    """net.k and direction.k as net.name k and direction.name k."""
    return {k.replace(".", f".{name}", 1): v for k, v in given.items()}


def elbo_flow(inputs, z0):
    flow = {f"net.{k}": inputs[f"net.flow {k}"] for k in "msuv"}
    shift, log_scale = kl_conditioned(flow, "", z0[:, :1])
    return (z0 - shift) * np.exp(-log_scale), -log_scale.sum(-1)


def elbo_want(inputs, x, roll, sign=1):
    loc, scale = inference_moments(inputs, "encoder", x)
    z0 = loc + sign * scale * np.roll(inputs["z noise"], -roll, 0)[:len(x)]
    z, ldj = elbo_flow(inputs, z0)
    return (inference_normal(x, *inference_moments(inputs, "decoder", z)) + inference_normal(z, inputs["net.prior m"], np.exp(inputs["net.prior s"]))
            - inference_normal(z0, loc, scale) + ldj)


def elbo_close(inputs, outputs, key, rows=B, sign=1, why=""):
    x = inputs["net.x"][:rows]
    got = inference_rows(outputs, key, "elbo", rows)
    wants = [elbo_want(inputs, x, k, sign) for k in range(ELBO_ROLLS)]
    if not any(laws.close(got, want, laws.tolerance(got)).all() for want in wants):
        laws.expect("elbo", x, got, wants[0], why=why)


def elbo_value(inputs, outputs, reference):
    inference_unseeded(outputs)
    elbo_close(inputs, outputs, "elbo")
    elbo_close(inputs, outputs, "elbo again", sign=-1, why=" in a second call, for which the encoder draws anew")
    elbo_close(inputs, outputs, "one row", 1, why=" for a batch of one row")
    for key in ("under no_grad", "in float32"):
        elbo_close(inputs, outputs, key, why=f" {key}")


def elbo_as_given(inputs, outputs, reference):
    inference_left(inputs, outputs, "elbo.elbo")
    elbo_close(inputs, outputs, "images", why=", if each row of x is an image")
    inference_own(outputs, "elbo.elbo", "in float64.elbo")


def elbo_ideal(inputs, outputs, reference):
    mine = {k[len("ideal."):]: v for k, v in inputs.items() if k.startswith("ideal.")}
    a, b, log_s = mine["decoder"]
    got = inference_rows(outputs, "ideal encoder", "elbo", B)
    want = inference_normal(mine["x"], a * mine["prior m"] + b, np.sqrt(a**2 * np.exp(2 * mine["prior s"]) + np.exp(2 * log_s)))
    laws.expect("elbo", mine["x"], got, want, why=": when encoder and flow give the true posterior, each draw gives log p(x) itself")


def elbo_gradient(inputs, outputs, reference):
    inference_rows(outputs, "elbo", "elbo", B)
    gradient_arrives(outputs, "", "the ELBO", "x and the weights of `encoder`, `flow`, `decoder` and `prior`, through the draw of z0")


def elbo_by(draw=lambda q: q.rsample(), through=lambda flow, z0: flow.forward(z0), log_x=lambda x, decoder, z, z0: decoder(z).log_prob(x),
            log_z=lambda prior, z, z0: prior.log_prob(z), log_q=lambda q, z0, z: q.log_prob(z0), ask=lambda encoder, x: encoder(x),
            end=lambda log_x, log_z, log_q, ldj: log_x + log_z - log_q + ldj):
    """A function `elbo` in its plainest form, in which a mistake changes one part."""

    def elbo(x, encoder, flow, decoder, prior):
        q = ask(encoder, x)
        z0 = draw(q)
        z, ldj = through(flow, z0)
        return end(log_x(x, decoder, z, z0), log_z(prior, z, z0), log_q(q, z0, z), ldj)

    return function(elbo)


def elbo_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, elbo_by(**parts))


def elbo_backwards(flow, z0):
    z = flow.inverse(z0)
    return z, flow.forward(z)[1]


def elbo_no_grad(flow, z0):
    with torch.no_grad():
        return flow.forward(z0)


def elbo_asked(change):
    """The encoder is asked about `change(x)`."""
    return lambda encoder, x: encoder(change(x))


def elbo_seeded(q):
    torch.default_generator.manual_seed(0)
    return q.rsample()


def elbo_kept():
    """A draw that is kept for as long as its shape fits."""
    kept = []

    def draw(q):
        if not kept or kept[0].shape != q.mean.shape or kept[0].dtype != q.mean.dtype:
            kept[:] = [q.rsample().detach()]
        return kept[0] + 0 * q.mean

    return elbo_by(draw=draw)()


def elbo_kl(prior, q):
    """KL(q(z0) || prior) in closed form, for normal distributions."""
    (m, s), (a, b) = (q.mean, q.stddev), (prior.mean, prior.stddev)
    return ((s**2 + (m - a) ** 2) / (2 * b**2) - 0.5 + b.log() - s.log()).sum(-1)


def elbo_of_gaussian(x, encoder, flow, decoder, prior):
    q = encoder(x)
    z0 = q.rsample()
    return decoder(z0).log_prob(x) - elbo_kl(prior, q)


def elbo_of_closed_form(x, encoder, flow, decoder, prior):
    q = encoder(x)
    z, ldj = flow.forward(q.rsample())
    return decoder(z).log_prob(x) - elbo_kl(prior, q) + ldj


ELBO_COMPARED = ("elbo.elbo", "elbo again.elbo", "one row.elbo", "ideal encoder.elbo", "gradient.along")
ELBO = Exercise(
    id="elbo", title="The evidence lower bound, with a flow in the posterior", minutes=12, difficulty=3,
    hints=(
        "Draw z0 once from `encoder(x)`, send it through the flow, and write down three log-densities: of x given z, of z under the prior, of z given x. The last is the density of what the flow makes of z0.",
        "log q(z | x) = log q(z0 | x) - ldj: where the flow expands, z is spread out and its density lower. The bound subtracts it. Draw by `rsample`, or the encoder learns nothing from the decoder.",
    ),
    inputs=elbo_inputs, reference=flowkit_class("inference", "elbo"),
    cases=(
        Case("log p(x | z) + log p(z) - log q(z0 | x) + ldj for one draw of z0, (B,)", 4, elbo_value),
        Case("a linear model with its true posterior: each draw gives log p(x)", 2, elbo_ideal),
        Case("gradients reach x, encoder, flow, decoder and prior", 1.5, elbo_gradient),
        Case("x of any shape and precision, left as it was", 0.5, elbo_as_given),
    ),
    misconceptions=(
        elbo_wrong("ldj_sign", "sign", "value", "ldj is subtracted from the bound: that is log q0 + ldj for log q(z | x). Where the flow expands, the density of z is lower, so log q(z | x) = log q0 - ldj.", end=lambda x, z, q, ldj: x + z - q - ldj),
        elbo_wrong("no_ldj", "missing term", "value", "ldj is missing: log q(z0 | x) is the density of z0, and the flow has stretched it since.", end=lambda x, z, q, ldj: x + z - q),
        elbo_wrong("log_q_sign", "sign", "value", "log q(z0 | x) is added; the draw has to be paid for, so it is subtracted.", end=lambda x, z, q, ldj: x + z + q + ldj),
        elbo_wrong("both_signs", "sign", "value", "log q(z | x) is added as a whole; the draw has to be paid for, so it is subtracted.", end=lambda x, z, q, ldj: x + z + q - ldj),
        elbo_wrong("no_log_q", "missing term", "value", "log q(z0 | x) is missing: without it the posterior would shrink to a point.", end=lambda x, z, q, ldj: x + z + ldj),
        elbo_wrong("no_posterior", "missing term", "value", "Both parts of log q(z | x) are missing, log q(z0 | x) and ldj.", end=lambda x, z, q, ldj: x + z),
        elbo_wrong("no_prior", "missing term", "value", "The prior's log p(z) is missing: the joint density is p(x | z) p(z).", end=lambda x, z, q, ldj: x - q + ldj),
        elbo_wrong("no_decoder", "missing term", "value", "log p(x | z) is missing: nothing asks how well z explains x.", end=lambda x, z, q, ldj: z - q + ldj),
        elbo_wrong("only_decoder", "missing term", "value", "Only log p(x | z) is left; the prior and log q(z | x) are missing.", end=lambda x, z, q, ldj: x),
        elbo_wrong("prior_sign", "sign", "value", "log p(z) is subtracted; it is part of the joint density, and added.", end=lambda x, z, q, ldj: x - z - q + ldj),
        elbo_wrong("decoder_sign", "sign", "value", "log p(x | z) is subtracted; it is part of the joint density, and added.", end=lambda x, z, q, ldj: -x + z - q + ldj),
        elbo_wrong("only_ldj", "missing term", "value", "Only ldj is left; the three log-densities are missing.", end=lambda x, z, q, ldj: ldj),
        elbo_wrong("joint_sign", "sign", "value", "The difference is turned round: log p(x, z) is subtracted, and log q(z0 | x) added. The bound is log p(x, z) - log q(z | x).", end=lambda x, z, q, ldj: q - x - z + ldj),
        elbo_wrong("exchanged", "exchanged", "value", "z and ldj are taken from flow.forward in the wrong order: it gives (z, ldj).", through=lambda flow, z0: flow.forward(z0)[::-1]),
        elbo_wrong("loss", "sign", "value", "The sign of the whole is turned: this is the loss to be minimised; the bound on log p(x) is asked for.", end=lambda x, z, q, ldj: q - ldj - x - z),
        elbo_wrong("prior_at_z0", "wrong function", "value", "The prior is asked about z0, before the flow; it is the density of z.", log_z=lambda prior, z, z0: prior.log_prob(z0)),
        elbo_wrong("decoder_at_z0", "wrong function", "value", "The decoder is given z0, before the flow; it is given z.", log_x=lambda x, decoder, z, z0: decoder(z0).log_prob(x)),
        elbo_wrong("both_at_z0", "wrong function", "value", "Prior and decoder are asked about z0, before the flow; both belong to z.", log_x=lambda x, decoder, z, z0: decoder(z0).log_prob(x), log_z=lambda prior, z, z0: prior.log_prob(z0)),
        elbo_wrong("encoder_at_z", "wrong function", "value", "The encoder's density is asked about z, after the flow; it is the density of z0.", log_q=lambda q, z0, z: q.log_prob(z)),
        elbo_wrong("standard_prior", "constant", "value", "The prior is taken to be a standard normal distribution; the one that is passed in is meant.", log_z=lambda prior, z, z0: (-0.5 * z**2 - 0.5 * LOG_2PI).sum(-1)),
        elbo_wrong("no_flow", "missing function", "value", "z0 is used as it is; it goes through the flow first.", through=lambda flow, z0: (z0, torch.zeros(len(z0)))),
        Misconception("plain_vae", "missing function", "value", "This is the bound of a VAE without a flow, with KL(q || prior) in closed form; the flow makes q another distribution, and its KL has none.", function(elbo_of_gaussian)),
        Misconception("kl_closed_form", "wrong function", "value", "KL(encoder || prior) in closed form stands for log q(z0 | x) - log p(z): the prior belongs to z, after the flow, and that KL has no closed form.", function(elbo_of_closed_form)),
        elbo_wrong("flow_backwards", "direction", "value", "The flow is run by its inverse; here it goes from z0 to z by `forward`.", through=elbo_backwards),
        elbo_wrong("entropy", "wrong function", "value", "Minus the entropy of the encoder stands for log q(z0 | x): that is its mean, and the log-density at the very z0 that was drawn is asked for.", log_q=lambda q, z0, z: -q.entropy()),
        elbo_wrong("mean", "missing function", "value", "z0 is the encoder's mean; it should be drawn.", draw=lambda q: q.mean),
        elbo_wrong("drawn_twice", "state", "value", "z0 is drawn twice: log q(z0 | x) belongs to another draw than the one that went through the flow.", log_q=lambda q, z0, z: q.log_prob(q.rsample())),
        elbo_wrong("squared_error", "wrong function", "value", "Minus the squared error stands for log p(x | z); the decoder is a distribution with a width of its own.", log_x=lambda x, decoder, z, z0: -((x - decoder(z).mean) ** 2).sum(-1)),
        elbo_wrong("decoder_sampled", "wrong function", "value", "The decoder's density is asked about a draw of its own; it is asked about the x that was given.", log_x=lambda x, decoder, z, z0: (lambda p: p.log_prob(p.sample()))(decoder(z))),
        elbo_wrong("exp", "extra term", "value", "exp is taken of the result: that is the weight p(x, z) / q(z | x) itself; its logarithm is asked for.", end=lambda x, z, q, ldj: (x + z - q + ldj).exp()),
        elbo_wrong("batch_mean", "reduction", "value", "The mean over the batch is returned; every row has its own bound, (B,).", end=lambda x, z, q, ldj: (x + z - q + ldj).mean()),
        elbo_wrong("batch_mean_loss", "reduction", "value", "The mean over the batch with a minus sign is returned: that is the loss; every row has its own bound, (B,).", end=lambda x, z, q, ldj: -(x + z - q + ldj).mean()),
        elbo_wrong("batch_sum", "reduction", "value", "The sum over the batch is returned; every row has its own bound, (B,).", end=lambda x, z, q, ldj: (x + z - q + ldj).sum()),
        elbo_wrong("ldj_sum", "reduction", "value", "ldj is summed over the batch; every row has its own.", end=lambda x, z, q, ldj: x + z - q + ldj.sum()),
        elbo_wrong("ldj_mean", "reduction", "value", "ldj is averaged over the batch; every row has its own.", end=lambda x, z, q, ldj: x + z - q + ldj.mean()),
        elbo_wrong("column", "shape", "value", "The result has shape (B, 1); it is (B,).", end=lambda x, z, q, ldj: (x + z - q + ldj)[:, None]),
        elbo_wrong("not_reparameterised", "detached", "gradient", "z0 is drawn by `sample`, or detached, which cuts it off from the encoder: it learns nothing from the decoder. `rsample` keeps the gradient.", draw=lambda q: q.sample()),
        elbo_wrong("flow_no_grad", "detached", "gradient", "The flow is run under no_grad, or its results are detached: neither flow nor encoder learn through it.", through=elbo_no_grad),
        elbo_wrong("z_cut_off", "detached", "gradient", "z is cut off from the computation graph after the flow: neither flow nor encoder learn from prior and decoder.", through=lambda flow, z0: (lambda z, ldj: (z.detach(), ldj))(*flow.forward(z0))),
        elbo_wrong("ldj_cut_off", "detached", "gradient", "ldj is cut off from the computation graph, so the flow does not learn to spread out.", end=lambda x, z, q, ldj: x + z - q + ldj.detach()),
        elbo_wrong("log_q_cut_off", "detached", "gradient", "log q(z0 | x) is cut off from the computation graph, so nothing keeps the encoder from shrinking to a point.", end=lambda x, z, q, ldj: x + z - q.detach() + ldj),
        elbo_wrong("x_cut_off", "detached", "gradient", "What the encoder is given is cut off from x: whatever made x could not be trained.", ask=lambda encoder, x: encoder(x.detach())),
        elbo_wrong("detached", "detached", "gradient", "The result is cut off from the computation graph, so nothing can be trained by it.", end=lambda x, z, q, ldj: (x + z - q + ldj).detach()),
        elbo_wrong("seeded", "state", "state", KL_SEEDED, draw=elbo_seeded),
        Misconception("kept", "state", "state", "z0 is drawn once and kept; every call draws anew.", elbo_kept),
        elbo_wrong("in_place", "in place", "input", "x is changed in place: the caller's tensor is overwritten, and all that comes after sees another x.", ask=elbo_asked(lambda x: x.detach().sub_(0.1))),
        elbo_wrong("flattened", "shape", "value", "x is flattened before the encoder sees it; the encoder takes x as it comes, an image in the shape of an image.", ask=elbo_asked(lambda x: x.reshape(len(x), -1))),
        elbo_wrong("row_squeezed", "shape", "value", "z is squeezed before the decoder: a batch of one row loses the dimension of the batch.", log_x=lambda x, decoder, z, z0: decoder(z.squeeze()).log_prob(x)),
        elbo_wrong("float32", "type", "value", "The result is turned into float32, whatever the precision of x and the nets.", end=lambda x, z, q, ldj: (x + z - q + ldj).float()),
    ),
    compare=ELBO_COMPARED,
    features=inference_seen(ELBO_COMPARED, ("elbo", rf"\(1x{B} and {ELBO_Z}x\d+\)|tensor a \(({B}|{ELBO_Z})\) must match the size of tensor b \(({B}|{ELBO_Z})\)", "z for ldj"), ran=("images",)),
    picture=pictures.agreement(("elbo.elbo", "ideal encoder.elbo"), "one draw of the bound"),
)


# --- iwae_log_prob ---------------------------------------------------------------------------------------------------

IWAE_D, IWAE_Z = 3, 2
IWAE_STEPS = {"k = 1": 1, "k = 5": 5, "k = 7": 7}
IWAE_FAR = {"weights far below": (-4000.0, 200.0), "weights far above": (9000.0, 200.0)}  # offset and steepness of the logarithm of the joint density


def iwae_inputs(rng):
    x = 1.5 * rng.standard_normal((B, IWAE_D))
    x[:, 0] = 0.6 * rng.permutation(B) - 2.1    # a row is known by its first number: these stand apart
    inputs = inference_net(rng, "encoder", IWAE_D, 2 * IWAE_Z) | inference_net(rng, "decoder", IWAE_Z, 2 * IWAE_D) | inference_given(rng, x=x)
    inputs |= {"noise": rng.standard_normal((B, max(IWAE_STEPS.values()), IWAE_Z)), "r": rng.standard_normal(B), "nudges": laws.STEP * laws.OFFSETS}
    a, b, log_s = rng.uniform(0.8, 1.2), rng.uniform(-0.3, 0.3), math.log(rng.uniform(0.5, 0.8))
    v = 1 / (1 + a**2 * math.exp(-2 * log_s))
    gain = v * a * math.exp(-2 * log_s)
    names = 0.5 * np.arange(B)[:, None]
    ideal = {"p": np.array([a, b, log_s]), "q": np.array([gain, -gain * b, 0.5 * math.log(v)]), "x": np.concatenate([names, 1.5 * rng.standard_normal((B, 2))], 1), "noise": rng.standard_normal((B, 4, 2))}
    # A proposal that draws one of three numbers, and a row for each way that k draws can turn out: expectations over q without chance.
    rough = {"p": ideal["p"], "q": ideal["q"] + np.array([-0.3, 0.4, 0.3])}
    three = np.array([-1.3, 0.1, 1.2]) + 0.1 * rng.standard_normal(3)
    for k in (1, 2, 3):
        draws = np.array(list(itertools.product(three, repeat=k)))[:, :, None]
        rough |= {f"noise {k}": draws, f"x {k}": np.stack([0.5 * np.arange(len(draws)), np.full(len(draws), 0.7)], 1)}
    return inputs | {f"ideal.{k}": v for k, v in ideal.items()} | {f"rough.{k}": v for k, v in rough.items()}


def iwae_log_weights(inputs, k, rows=B, offset=0.0, steep=1.0):
    """log p(x, z_i) - log q(z_i | x), (rows, k)."""
    x = inputs["net.x"][:rows]
    loc, scale = (t[:, None] for t in inference_moments(inputs, "encoder", x))
    z = loc + scale * inputs["noise"][:rows, :k]
    joint = inference_normal(x[:, None], *inference_moments(inputs, "decoder", z)) + inference_normal(z, 0, 1.0)
    return steep * joint + offset - inference_normal(z, loc, scale)


def log_mean_exp(t):
    return np.logaddexp.reduce(t, -1) - math.log(t.shape[-1])


def iwae_value(inputs, outputs, reference):
    asked = [(key, k, B, f" for {key}") for key, k in IWAE_STEPS.items()] + [("under no_grad", 5, B, " under no_grad"), ("in float32", 5, B, " in float32")]
    inference_unseeded(outputs)
    for key, k, rows, why in asked + [("one row", 5, 1, " for a batch of one row")]:
        got = inference_rows(outputs, key, "log_prob", rows)
        laws.expect("iwae_log_prob", inputs["net.x"][:rows], got, log_mean_exp(iwae_log_weights(inputs, k, rows)), why=why)


def iwae_ideal(inputs, outputs, reference):
    a, b, log_s = inputs["ideal.p"]
    x, got = inputs["ideal.x"], inference_rows(outputs, "ideal q", "log_prob", B)
    want = inference_normal(x[:, 1:], b, math.sqrt(a**2 + math.exp(2 * log_s)))
    laws.expect("iwae_log_prob", x, got, want, why=": when q is the true posterior all weights are p(x), so every k gives log p(x) itself")


def iwae_most(inputs):
    """The logarithm of the mean weight, over the three numbers that the rough proposal draws."""
    (a, b, log_s), (qa, qb, q_log_s) = inputs["rough.p"], inputs["rough.q"]
    x, eps = inputs["rough.x 1"][:, 1:], inputs["rough.noise 1"][:, :, 0]
    z = qa * x + qb + math.exp(q_log_s) * eps
    log_q = inference_normal(z, qa * x + qb, math.exp(q_log_s))
    return float(log_mean_exp(inference_normal(x, a * z + b, math.exp(log_s)) + inference_normal(z, 0, 1.0) - log_q))


def iwae_rises(inputs, outputs, reference):
    """Over all ways that the draws can turn out: no chance."""
    means, whole = [], []
    for k in (1, 2, 3):
        got = inference_rows(outputs, f"all draws, k = {k}", "log_prob", 3**k).astype(float)
        means.append(got.mean()), whole.append(float(log_mean_exp(got)))
    words = f"k = 1, 2, 3: the means are {laws.point(means)}"
    if not means[0] < means[1] - 1e-6 or not means[1] < means[2] - 1e-6:
        raise Fail("The bound does not rise with k in the mean.", words)
    most = iwae_most(inputs)
    if means[2] > most + 1e-6:
        raise Fail("The bound lies above what it bounds in the mean.", f"{words}; the logarithm of the mean weight is {most:.3g}")
    if max(abs(v - most) for v in whole) > 1e-5:
        raise Fail("The mean of exp of your bound depends on k; it is the mean weight, whatever k.", f"its logarithm is {laws.point(whole)} for k = 1, 2, 3; expected {most:.3g}")


def iwae_stable(inputs, outputs, reference):
    for key, (offset, steep) in IWAE_FAR.items():
        got = outputs.arrays.get(f"{key}.log_prob")
        if got is not None and not np.isfinite(got).all():
            raise Fail("The result is not finite where the weights are very small or very large: they leave the range of floating-point numbers before the logarithm. Stay in logarithms.")
        got = inference_rows(outputs, key, "log_prob", B)
        laws.expect("iwae_log_prob", inputs["net.x"], got, log_mean_exp(iwae_log_weights(inputs, 5, B, offset, steep)), why=" for " + key)


def iwae_as_given(inputs, outputs, reference):
    inference_left(inputs, outputs, "k = 5.log_prob")
    laws.expect("iwae_log_prob", inputs["net.x"], inference_rows(outputs, "images", "log_prob", B), log_mean_exp(iwae_log_weights(inputs, 5)), why=", if each row of x is an image")
    inference_own(outputs, "k = 5.log_prob", "in float64.log_prob")


def iwae_gradient(inputs, outputs, reference):
    inference_rows(outputs, "k = 5", "log_prob", B)
    gradient_arrives(outputs, "", "the bound", "x and the weights of `q` and `log_joint`")


def iwae_drawn(q, x, k):
    """Log q and x for k draws, (k, B) each and (k B, ...)."""
    many = x.repeat(k, *(1,) * (x.ndim - 1))
    z, log_q = q(many)
    return many, z, log_q


def iwae_by(draw=iwae_drawn, log_p=lambda log_joint, x, z: log_joint(x, z), weight=lambda p, q: p - q, fold=lambda w, k: w.reshape(k, -1),
            end=lambda w, k: torch.logsumexp(w, 0) - math.log(k)):
    """A function `iwae_log_prob` in its plainest form, in which a mistake changes one part."""

    def iwae_log_prob(x, log_joint, q, k):
        many, z, log_q = draw(q, x, k)
        return end(fold(weight(log_p(log_joint, many, z), log_q), k), k)

    return function(iwae_log_prob)


def iwae_wrong(id, kind, place, sentence, **parts):
    return Misconception(id, kind, place, sentence, iwae_by(**parts))


def iwae_one_draw(q, x, k):
    z, log_q = q(x)
    return torch.cat([x] * k), z.repeat(k, 1), log_q.repeat(k)


def iwae_once(q, x, k):
    z, log_q = q(x)
    return x, z, log_q


def iwae_fixed(q, x, k):
    """Three draws whatever k, the mean over three."""
    return iwae_drawn(q, x, 3)


def iwae_interleaved(q, x, k):
    many = x.repeat_interleave(k, 0)
    z, log_q = q(many)
    return many, z, log_q


def iwae_log_q_apart(q, x, k):
    many = torch.cat([x] * k)
    return many, q(x)[0].repeat(k, 1), q(many)[1]


def iwae_rows_only(q, x, k):
    many = x.repeat(k, 1)
    return many, *q(many)


def iwae_in_place(q, x, k):
    x.detach().sub_(0.1)
    return iwae_drawn(q, x, k)


def iwae_seeded(q, x, k):
    torch.default_generator.manual_seed(0)
    return iwae_drawn(q, x, k)


def iwae_buffer(w, k):
    """The weights in a tensor of the default precision."""
    rows = w.reshape(k, -1)
    buffer = torch.zeros(rows.shape)
    for i in range(k):
        buffer[i] = rows[i]
    return buffer


def iwae_no_grad(q, x, k):
    with torch.no_grad():
        return iwae_drawn(q, x, k)


def iwae_z_cut_off(q, x, k):
    many, z, log_q = iwae_drawn(q, x, k)
    return many, z.detach(), log_q


def iwae_x_cut_off(q, x, k):
    return iwae_drawn(q, x.detach(), k)


def iwae_exponentials(w, k):
    return w.exp().mean(0).log()


def iwae_self_normalised(w, k):
    return (torch.softmax(w, 0) * w).sum(0)


def iwae_one_shift(w, k):
    """One maximum for the whole batch."""
    return (w - w.max()).exp().mean(0).log() + w.max()


def iwae_picture(inputs, outputs, reference):
    """The mean of the bound over all ways that k = 1, 2, 3 draws can turn out, below what it bounds; and the bounds of k = 1, 5, 7 row by row."""
    figure = plotting.Picture(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = [f"all draws, k = {k}.log_prob" for k in (1, 2, 3)]
    rows = list(IWAE_STEPS)
    left.axhline(iwae_most(inputs), linestyle=":", color="black", label="log of the mean weight")
    for outs, style, label in ((reference.arrays, {"color": "#999999", "marker": "s", "markersize": 10, "markerfacecolor": "none"}, "reference"), (outputs.arrays, {"color": plotting.PALETTE["blue"], "marker": "o"}, "yours")):
        means = [float(outs[k].mean()) if k in outs and np.isfinite(outs[k]).all() else np.nan for k in keys]
        left.plot((1, 2, 3), means, label=label if np.isfinite(means).any() else f"{label}: {'not solved yet' if pictures.unsolved(outputs) else 'nothing to draw'}", **style)
    left.set_xticks((1, 2, 3)), left.set_xlabel("k", fontsize=plotting.FONT), left.set_title("mean of the bound", fontsize=plotting.FONT)
    left.legend(fontsize=plotting.FONT - 3, frameon=False)
    order = np.argsort(reference.arrays[f"{rows[-1]}.log_prob"])
    for key, colour in zip(rows, ("orange", "green", "blue")):
        mine = outputs.arrays.get(f"{key}.log_prob")
        right.plot(reference.arrays[f"{key}.log_prob"][order], "-", color=plotting.PALETTE[colour], linewidth=1, label=key)
        if mine is not None and mine.shape == (B,) and np.isfinite(mine).all():
            right.plot(mine[order], "o", color=plotting.PALETTE[colour])
    right.set_xlabel("row of x, in order", fontsize=plotting.FONT), right.set_title("one set of draws, yours as dots", fontsize=plotting.FONT)
    right.legend(fontsize=plotting.FONT - 3, frameon=False)
    return figure


IWAE_COMPARED = ("k = 1.log_prob", "k = 5.log_prob", "k = 7.log_prob", "one row.log_prob", "weights far below.log_prob", "weights far above.log_prob", "gradient.along")
IWAE = Exercise(
    id="iwae_log_prob", title="The importance-weighted bound", minutes=15, difficulty=3,
    hints=(
        "Each of k draws gives a weight p(x, z_i) / q(z_i | x), whose mean over q is p(x). The bound is the logarithm of the mean of k weights; every row of x has its own.",
        "Either call q k times, or once with x repeated; then mind which entries belong to one row of x. The logarithms of the weights go through torch.logsumexp over the k draws, and log k is subtracted: exp alone would underflow.",
    ),
    inputs=iwae_inputs, reference=flowkit_class("inference", "iwae_log_prob"),
    cases=(
        Case("log of the mean of k weights p(x, z) / q(z | x), for k = 1, 5, 7, (B,)", 4, iwae_value),
        Case("q the true posterior of a linear model: log p(x) for every draw", 1, iwae_ideal),
        Case("rises with k in the mean, and stays below", 1.5, iwae_rises),
        Case("stable where weights are very small or very large", 1.5, iwae_stable),
        Case("gradients reach x, q and log_joint", 1.5, iwae_gradient),
        Case("x of any shape and precision, left as it was", 0.5, iwae_as_given),
    ),
    misconceptions=(
        iwae_wrong("mean_of_logs", "order", "value", "The logarithms of the weights are averaged: that is the ELBO with k draws, which does not rise with k. The mean is taken of the weights, and then the logarithm.", end=lambda w, k: w.mean(0)),
        iwae_wrong("mean_of_logs_less", "order", "value", "The logarithms of the weights are averaged, and log k subtracted; the mean is taken of the weights, and then the logarithm.", end=lambda w, k: w.mean(0) - math.log(k)),
        iwae_wrong("sum_of_logs", "order", "value", "The logarithms of the weights are summed: that is the logarithm of their product. Their mean is meant, and then the logarithm.", end=lambda w, k: w.sum(0)),
        iwae_wrong("no_log_k", "missing term", "value", "log k is missing: this is the logarithm of the sum of the weights, not of their mean.", end=lambda w, k: torch.logsumexp(w, 0)),
        iwae_wrong("log_k_sign", "sign", "value", "log k is added; to divide the sum of the weights by k it is subtracted.", end=lambda w, k: torch.logsumexp(w, 0) + math.log(k)),
        iwae_wrong("divided_by_k", "order", "value", "The logarithm of the sum is divided by k; k belongs inside the logarithm, so log k is subtracted.", end=lambda w, k: torch.logsumexp(w, 0) / k),
        iwae_wrong("k_subtracted", "missing function", "value", "k itself is subtracted; it is log k.", end=lambda w, k: torch.logsumexp(w, 0) - k),
        iwae_wrong("divided_inside", "order", "value", "The logarithms of the weights are divided by k; the weights themselves are.", end=lambda w, k: torch.logsumexp(w / k, 0)),
        iwae_wrong("log_k_in_exp_twice", "extra term", "value", "log k is subtracted twice: the mean over the draws has it already.", end=lambda w, k: torch.logsumexp(w, 0) - 2 * math.log(k)),
        iwae_wrong("log_batch", "constant", "value", "The logarithm of the size of the batch is subtracted; it is the number of draws, k.", end=lambda w, k: torch.logsumexp(w, 0) - math.log(w.shape[1])),
        iwae_wrong("unstable", "wrong function", "value", "The weights themselves are formed, averaged, and then the logarithm is taken: with hundreds of pixels they underflow. torch.logsumexp does the same in logarithms.", end=iwae_exponentials),
        iwae_wrong("one_shift", "wrong axis", "value", "The largest logarithm is taken off over the whole batch; rows far below it underflow. Each row needs its own.", end=iwae_one_shift),
        iwae_wrong("no_log", "missing function", "value", "What is returned is the mean weight itself; its logarithm is asked for.", end=lambda w, k: w.exp().mean(0)),
        iwae_wrong("largest", "wrong function", "value", "The largest weight alone is kept; the logarithm of their mean is asked for.", end=lambda w, k: w.max(0).values),
        iwae_wrong("largest_less", "wrong function", "value", "The largest weight stands for their sum.", end=lambda w, k: w.max(0).values - math.log(k)),
        iwae_wrong("self_normalised", "wrong function", "value", "The logarithms are averaged with the normalised weights (softmax); the logarithm of the weights' own mean is asked for.", end=iwae_self_normalised),
        iwae_wrong("over_batch", "wrong axis", "value", "The mean is over the batch instead of the k draws: rows are different data, and each has its own bound.", end=lambda w, k: torch.logsumexp(w, 1) - math.log(w.shape[1])),
        iwae_wrong("over_all", "reduction", "value", "The mean is over draws and batch together; each row has its own bound, (B,).", end=lambda w, k: torch.logsumexp(w.reshape(-1), 0) - math.log(w.numel())),
        iwae_wrong("batch_mean", "reduction", "value", "The mean over the batch is returned; each row has its own bound, (B,).", end=lambda w, k: (torch.logsumexp(w, 0) - math.log(k)).mean()),
        iwae_wrong("batch_mean_loss", "reduction", "value", "The mean over the batch with a minus sign is returned: that is the loss; each row has its own bound, (B,).", end=lambda w, k: -(torch.logsumexp(w, 0) - math.log(k)).mean()),
        iwae_wrong("batch_sum", "reduction", "value", "The sum over the batch is returned; each row has its own bound, (B,).", end=lambda w, k: (torch.logsumexp(w, 0) - math.log(k)).sum()),
        iwae_wrong("draws_left", "reduction", "value", "There is one logarithm for each draw and row, (k, B); the mean over the draws is missing.", end=lambda w, k: w),
        iwae_wrong("kept", "shape", "value", "The result has shape (1, B): the dimension of the draws is still there; it is (B,).", end=lambda w, k: torch.logsumexp(w, 0, keepdim=True) - math.log(k)),
        iwae_wrong("squeezed", "shape", "value", "For a batch of one row the dimension of the batch is lost (squeeze): the result is (B,) for every B.", end=lambda w, k: (torch.logsumexp(w, 0) - math.log(k)).squeeze()),
        iwae_wrong("loss", "sign", "value", "The sign of the whole is turned: this is a loss; the bound on log p(x) is asked for.", end=lambda w, k: math.log(k) - torch.logsumexp(w, 0)),
        iwae_wrong("rows_mixed", "wrong axis", "value", "The draws of different rows get mixed: x is repeated row by row, but the result is taken apart block by block (or the other way round).", draw=iwae_interleaved),
        iwae_wrong("repeated_along", "wrong axis", "value", "x is repeated along its coordinates; the rows are to be repeated, (k B, D).", draw=lambda q, x, k: (lambda many: (many, *q(many)))(x.repeat(1, k))),
        iwae_wrong("joint_exchanged", "exchanged", "value", "x and z are handed to log_joint in the wrong order: it is log_joint(x, z).", log_p=lambda log_joint, x, z: log_joint(z, x)),
        iwae_wrong("q_exchanged", "exchanged", "value", "z and log_q are taken from q in the wrong order: q(x) gives (z, log_q).", draw=lambda q, x, k: (lambda many: (many, *q(many)[::-1]))(torch.cat([x] * k))),
        iwae_wrong("weight_turned", "sign", "value", "The weight is the wrong way up, q / p: its logarithm is log p(x, z) - log q(z | x).", weight=lambda p, q: q - p),
        iwae_wrong("log_q_sign", "sign", "value", "log q is added; the weight is p(x, z) / q(z | x), so it is subtracted.", weight=lambda p, q: p + q),
        iwae_wrong("no_log_q", "missing term", "value", "log q is missing: the draws come from q, and the weight makes up for that.", weight=lambda p, q: p),
        iwae_wrong("no_log_p", "missing term", "value", "log p(x, z) is missing from the weights.", weight=lambda p, q: -q),
        iwae_wrong("ratio", "wrong function", "value", "The two logarithms are divided; the logarithm of the weight is their difference.", weight=lambda p, q: p / q),
        iwae_wrong("exp_of_weights", "extra term", "value", "exp is taken of the weights' logarithms before torch.logsumexp, which does so itself.", weight=lambda p, q: (p - q).exp()),
        iwae_wrong("one_draw", "state", "value", "Only one z is drawn for each row, whatever k: the mean of k copies of one weight is that weight, and the bound stays the ELBO. q has to draw k times.", draw=iwae_one_draw),
        iwae_wrong("k_ignored_less", "constant", "value", "Only one draw is made, and log k subtracted all the same.", draw=iwae_once, fold=lambda w, k: w[None]),
        iwae_wrong("k_fixed", "constant", "value", "The number of draws is fixed, whatever k is.", draw=iwae_fixed, fold=lambda w, k: w.reshape(3, -1), end=lambda w, k: torch.logsumexp(w, 0) - math.log(3)),
        iwae_wrong("last_left_out", "off by one", "value", "One draw fewer than k enters the mean.", fold=lambda w, k: w.reshape(k, -1)[:max(k - 1, 1)]),
        iwae_wrong("asked_twice", "state", "value", "q is asked once for z and once for log q; it draws anew each time, so log q belongs to another z.", draw=iwae_log_q_apart),
        iwae_wrong("q_no_grad", "detached", "gradient", "q is asked under no_grad: it cannot be trained by the bound.", draw=iwae_no_grad),
        iwae_wrong("z_cut_off", "detached", "gradient", "z is cut off from the computation graph, so q learns nothing from log_joint.", draw=iwae_z_cut_off),
        iwae_wrong("x_cut_off", "detached", "gradient", "x is cut off from the computation graph: whatever made x could not be trained.", draw=iwae_x_cut_off),
        iwae_wrong("log_q_cut_off", "detached", "gradient", "log q is cut off from the computation graph, so nothing keeps q from shrinking to a point.", weight=lambda p, q: p - q.detach()),
        iwae_wrong("log_p_cut_off", "detached", "gradient", "log p(x, z) is cut off from the computation graph: the model is not trained, and q never learns where it should go.", weight=lambda p, q: p.detach() - q),
        iwae_wrong("detached", "detached", "gradient", "The result is cut off from the computation graph, so nothing can be trained by it.", end=lambda w, k: (torch.logsumexp(w, 0) - math.log(k)).detach()),
        iwae_wrong("rows_only", "shape", "value", "x is repeated as if it had two dimensions (B, D); it may have more, as images have.", draw=iwae_rows_only),
        iwae_wrong("in_place", "in place", "input", "x is changed in place: the caller's tensor is overwritten, and all that comes after sees another x.", draw=iwae_in_place),
        iwae_wrong("seeded", "state", "state", "The generator is seeded inside: the draws are the same each time, and seeded for each of the k draws they are one draw k times.", draw=iwae_seeded),
        iwae_wrong("float32", "type", "value", "The result is turned into float32, whatever the precision of x and the nets.", end=lambda w, k: (torch.logsumexp(w, 0) - math.log(k)).float()),
        iwae_wrong("buffer", "type", "value", "The weights are written into a tensor of the default precision (and device); it takes those of x.", fold=iwae_buffer),
    ),
    compare=IWAE_COMPARED,
    features=inference_seen(IWAE_COMPARED, ("k = 1", rf"\(1x{B} and {IWAE_Z}x\d+\)", "z for log_q"), ("k = 1", rf"\({B}x{IWAE_D} and {IWAE_Z}x\d+\)", "x for z"),
                            ("k = 5", rf"\({B}x{5 * IWAE_D} and {IWAE_D}x\d+\)", "x along its coordinates"), ran=("images",)),
    picture=iwae_picture,
)


# --- iaf_posterior ---------------------------------------------------------------------------------------------------

IAF_D, IAF_Z, IAF_CONTEXT = 4, 3, 2
IAF_ROWS = 2500
IAF_OFF = 0.03
"""How far a share of the noise may be off. Hoeffding: 10,000 draws miss it with probability 2 exp(-2 * 10,000 * 0.03^2) = 3e-8, so 4e-7 for thirteen shares."""


def iaf_nets(rng, latents):
    inputs = inference_net(rng, "encoder", IAF_D, 2 * latents + IAF_CONTEXT)
    for layer, name in itertools.product(("first", "second"), ("scale", "shift")):
        inputs |= inference_given(rng, **{f"flow {layer} {name} A": 0.7 * rng.standard_normal((latents, latents)), f"flow {layer} {name} U": 0.6 * rng.standard_normal((IAF_CONTEXT, latents)),
                                          f"flow {layer} {name} b": 0.5 * rng.standard_normal(latents)})
    return inputs | inference_given(rng, x=1.5 * rng.standard_normal((B, IAF_D))) | {"sizes": np.array([latents, IAF_CONTEXT])}


def iaf_inputs(rng):
    inputs = iaf_nets(rng, IAF_Z) | {f"two.{k}": v for k, v in iaf_nets(rng, 2).items()}
    inputs |= {"many grid": 1.5 * rng.standard_normal((4, IAF_D)), "rows": np.array(IAF_ROWS)}
    return inputs | {"c": rng.standard_normal((B, IAF_Z)), "r": rng.standard_normal(B), "nudges": laws.STEP * laws.OFFSETS}


def iaf_encoded(inputs, x):
    latents = int(inputs["sizes"][0])
    mu, log_sigma, context = np.split(inference_tanh(inputs, "encoder", x), [latents, 2 * latents], -1)
    return mu, 0.6 * np.tanh(log_sigma), context


def iaf_flow(inputs, z0, context):
    """z (N, Z) and ldj (N,) of autograder.probes.lesson07.PosteriorFlow."""
    z, ldj = z0, 0.0
    for layer in ("first", "second"):
        found = []
        for name in ("scale", "shift"):
            A, U, b = (inputs[f"net.flow {layer} {name} {k}"] for k in "AUb")
            found.append(z @ np.triu(A, 1) + context @ U + b)
        log_scale = 0.5 * np.tanh(found[0])
        z, ldj = (z * np.exp(log_scale) + found[1])[:, ::-1], ldj + log_scale.sum(-1)
    return z, ldj


def iaf_z0(outputs, step, batch, latents=IAF_Z):
    """What the flow was given, (batch, Z); Fail if it was not."""
    if not int(outputs[f"{step}.passes"]):
        outputs[f"{step}.z"]
        raise Fail("sample never calls flow.forward: z0 does not go through the flow.")
    z0 = outputs[f"{step}.z0"]
    if z0.shape != (batch, latents):
        raise Fail(f"flow.forward is given z0 of shape {z0.shape} for a batch of {batch}; mu and sigma have shape {(batch, latents)}, and so has z0.")
    return z0


IAF_STEPS = {"sample": "", "sample again": " in a second call", "sample of one row": " for a batch of one row", "under no_grad": " under no_grad", "in float32": " in float32"}


IAF_OTHERS = {"sample of two latents": " with two latents", "sample without a context": " without a context (it is None)"}


def iaf_batch(inputs, step):
    """The nets' weights and x of a step."""
    if step == "sample of two latents":
        inputs = {k[len("two."):]: v for k, v in inputs.items() if k.startswith("two.")}
    x = inputs["net.x"]
    return inputs, x[:1] if step == "sample of one row" else x


def iaf_made(inputs, outputs, step):
    """z0 as the flow was given it, the right z, log_q, and z if the flow is run without the context."""
    mine, x = iaf_batch(inputs, step)
    mu, log_sigma, context = iaf_encoded(mine, x)
    z0 = iaf_z0(outputs, step, len(x), mu.shape[1])
    if "without" in step:
        context = 0 * context
    z, ldj = iaf_flow(mine, z0, context)
    return x, z, inference_normal(z0, mu, np.exp(log_sigma)) - ldj, iaf_flow(mine, z0, 0 * context)[0]


def iaf_noise(inputs, outputs, reference):
    x = np.tile(inputs["many grid"], (IAF_ROWS, 1))
    z0 = iaf_z0(outputs, "many samples", len(x))
    mu, log_sigma, _ = iaf_encoded(inputs, x)
    eps = (z0 - mu) * np.exp(-log_sigma)
    if np.abs(eps).max() < 1e-6:
        raise Fail("z0 is mu itself: no noise is added.")
    if np.abs(eps - eps[:1]).max() < 1e-6:
        raise Fail("All rows of the batch get the same noise; each draws its own.")
    if np.abs(eps - eps[:, :1]).max() < 1e-6:
        raise Fail("All coordinates of a row get the same noise; each has its own.")
    normal = {t: 0.5 * math.erfc(-t / math.sqrt(2)) for t in (-1.0, 0.0, 1.0)}
    shares = [((eps[:, i] < t).mean(), p) for i in range(IAF_Z) for t, p in normal.items()]
    shares += [((eps[:, 0] * eps[:, 1] > 0).mean(), 0.5)] + [((eps[1:, i] * eps[:-1, i] > 0).mean(), 0.5) for i in range(IAF_Z)]
    if any(abs(got - p) > IAF_OFF for got, p in shares):
        raise Fail("z0 is not mu + sigma eps with eps standard normal and sigma = exp(log_sigma).",
                   f"(z0 - mu) / sigma has mean {eps.mean():.2f} and standard deviation {eps.std():.2f} over {len(eps)} draws; expected 0 and 1")
    first, second = (iaf_z0(outputs, s, B) for s in ("sample", "sample again"))
    if np.abs(first - second).max() < 1e-9:
        raise Fail("Two calls draw the same noise: it is made once, or the generator is seeded inside.")


def iaf_value(inputs, outputs, reference):
    for step, why in (IAF_STEPS | IAF_OTHERS).items():
        x, want, _, alone = iaf_made(inputs, outputs, step)
        z = outputs[f"{step}.z"]
        if "without" not in step and z.shape == want.shape and laws.close(z, alone, laws.tolerance(z)).all():
            raise Fail("The flow is run without the context: its layers never learn which x they are at.")
        laws.expect("z", x, z, want, why=f", flow.forward(z0, context) for the z0 that the flow was given{why}")


def iaf_log_q(inputs, outputs, reference):
    for step, why in (IAF_STEPS | IAF_OTHERS).items():
        x, _, want, _ = iaf_made(inputs, outputs, step)
        got = inference_rows(outputs, step, "log_q", len(x))
        laws.expect("log_q", x, got, want, why=f", the log-density of the z that was drawn{why}")


def iaf_one_pass(inputs, outputs, reference):
    for step in IAF_STEPS:
        iaf_z0(outputs, step, len(iaf_batch(inputs, step)[1]))
        passes, backs = int(outputs[f"{step}.passes"]), int(outputs[f"{step}.backs"])
        if backs:
            raise Fail("A draw runs the flow's inverse, which takes one pass for each coordinate; z and log_q both come from one forward pass.")
        if passes != 1:
            raise Fail(f"A draw runs the flow {passes} times; z and ldj come from one and the same pass.")


def iaf_gradient(inputs, outputs, reference):
    inference_rows(outputs, "sample", "log_q", B)
    gradient_arrives(outputs, "", "z and log_q", "x and the weights of `encoder` and `flow`, through the draw of z0")
    missing = int(outputs.arrays.get("unregistered", 0))
    if missing:
        raise Fail("PyTorch does not find all weights of `encoder` and `flow` among the parameters of your module, so an optimiser would not train them: kept in a plain list or dict, modules are not registered.")


def iaf_alone(inputs, outputs, reference):
    inference_left(inputs, outputs, "sample.z")
    x, z, log_q, _ = iaf_made(inputs, outputs, "sample of images")
    laws.expect("z", x, outputs["sample of images.z"], z, why=", if each row of x is an image")
    laws.expect("log_q", x, inference_rows(outputs, "sample of images", "log_q", B), log_q, why=", if each row of x is an image")
    inference_own(outputs, *(f"{step}.{k}" for step in ("sample", "in float64") for k in ("z", "log_q")))
    for name, shape in (("z", (1, IAF_Z)), ("log_q", (1,))):
        got = outputs[f"sample of one row.{name}"]
        if got.shape != shape:
            raise Fail(f"`{name}` has shape {got.shape} for a batch of one row; it should be {shape}.")


class PlainPosterior(torch.nn.Module):
    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def ask(self, x):
        return self.encoder(x)

    def noise(self, mu):
        return torch.randn_like(mu)

    def sigma(self, log_sigma):
        return torch.exp(log_sigma)

    def start(self, mu, sigma, eps):
        return mu + sigma * eps

    def through(self, z0, context):
        return self.flow.forward(z0, context)

    def log_start(self, mu, log_sigma, eps, z0):
        return (-0.5 * eps**2 - log_sigma - 0.5 * LOG_2PI).sum(-1)

    def log_q(self, log_q0, ldj):
        return log_q0 - ldj

    def end(self, z, log_q):
        return z, log_q

    def sample(self, x):
        mu, log_sigma, context = self.ask(x)
        eps = self.noise(mu)
        z0 = self.start(mu, self.sigma(log_sigma), eps)
        z, ldj = self.through(z0, context)
        return self.end(z, self.log_q(self.log_start(mu, log_sigma, eps, z0), ldj))


def posterior_at_z(self, x):
    """log q0 at z, after the flow."""
    mu, log_sigma, context = self.ask(x)
    z, ldj = self.flow.forward(mu + log_sigma.exp() * self.noise(mu), context)
    return z, PlainPosterior.log_start(self, mu, log_sigma, (z - mu) / log_sigma.exp(), z) - ldj


def posterior_twice(self, x):
    """z from one draw, log q from another."""
    z, _ = PlainPosterior.sample(self, x)
    return z, PlainPosterior.sample(self, x)[1]


def posterior_backwards(self, z0, context):
    z = self.flow.inverse(z0, context)
    return z, -self.flow.forward(z, context)[1]


def posterior_two_passes(self, z0, context):
    return self.flow.forward(z0, context)[0], self.flow.forward(z0, context)[1]


def posterior_no_grad(self, z0, context):
    with torch.no_grad():
        return self.flow.forward(z0, context)


def posterior_change(name):
    """x, or the log_sigma that the encoder gave, is overwritten."""

    def ask(self, x):
        if name == "x":
            x.detach().sub_(0.1)
            return self.encoder(x)
        mu, log_sigma, context = self.encoder(x)
        return mu, log_sigma.exp_(), context

    return ask


def posterior_backwards_plus(self, z0, context):
    z = self.flow.inverse(z0, context)
    return z, self.flow.forward(z, context)[1]


def posterior_copied(which):
    def init(self, encoder, flow):
        PlainPosterior.__init__(self, *(copy.deepcopy(m) if which == name else m for name, m in (("encoder", encoder), ("flow", flow))))

    return init


def posterior_needs_context(self, z0, context):
    return self.flow.forward(z0, torch.cat([context], -1))


class ListedPosterior(PlainPosterior):
    def __init__(self, encoder, flow):
        super().__init__(None, None)
        del self.encoder, self.flow
        self.parts = [encoder, flow]

    def __getattr__(self, name):
        parts = self.__dict__.get("parts", [])
        return parts[0] if name == "encoder" and parts else parts[1] if name == "flow" and parts else super().__getattr__(name)


def posterior_fixed(self, encoder, flow):
    PlainPosterior.__init__(self, encoder, flow)
    self.eps = None


def posterior_kept_noise(self, mu):
    """Drawn in the first call, and kept."""
    if self.eps is None or self.eps.shape != mu.shape:
        self.eps = torch.randn_like(mu)
    return self.eps


def posterior_seeded(self, mu):
    torch.default_generator.manual_seed(0)
    return torch.randn_like(mu)


IAF_COMPARED = ("sample.z", "sample.log_q", "sample.z0", "sample of one row.z", "sample of one row.log_q", "sample of two latents.z", "sample of two latents.log_q", "gradient.along",
                "x after", "sample.passes", "sample.backs", "unregistered")
IAF_RAN = ("sample of two latents", "sample of images", "sample without a context")


def iaf_features(inputs, outputs):
    """The arrays that do not depend on how noise is drawn beyond its seed, how often the flow was run, which steps could be, and whether two calls differ.

    Or a word, where something was overwritten, the flow run backwards, or no noise is drawn: that spoils the numbers in as many ways as there are to write it.
    """
    z0, ran = outputs.arrays.get("sample.z0"), "sample.z" in outputs.arrays
    for word, seen in (("in place", inference_meddled(inputs, outputs)), ("encoder in place", int(outputs.arrays.get("changed", 0))),
                       ("backwards", int(outputs.arrays.get("sample.backs", 0))),
                       ("no noise", z0 is not None and z0.shape == (B, IAF_Z) and np.allclose(z0, iaf_encoded(inputs, inputs["net.x"])[0], atol=1e-9))):
        if seen and ran:
            return {"sample.z": word}
    found = {step: "ran" if f"{step}.z" in outputs.arrays else "did not run" for step in IAF_RAN}
    for name, key in (("precise", "sample.log_q"), ("precise by default", "in float64.log_q")):
        found[name] = key not in outputs.arrays or outputs.arrays[key].dtype != np.float32
    for key in IAF_COMPARED:
        if key in outputs.arrays:
            found[key] = outputs.arrays[key]
        else:
            kind, sentence = outputs.complaint(key) or outputs.complaint(key.rsplit(".", 1)[0]) or ("", "did not run")
            found[key] = "did not run" if key.startswith(IAF_RAN) else f"{kind}: {sentence}"
    a, b = (outputs.arrays.get(f"{s}.z0", np.zeros(0)) for s in ("sample", "sample again"))
    found["again"] = a.shape == b.shape and np.array_equal(a, b)
    return found


def iaf_picture(inputs, outputs, reference):
    """The draws z of one x, with the density's contours behind, and log_q against the right one."""
    figure = plotting.Picture(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.tile(inputs["many grid"], (IAF_ROWS, 1))
    _, _, context = iaf_encoded(inputs, x)
    z, log_q, z0 = (outputs.arrays.get(f"many samples.{k}") for k in ("z", "log_q", "z0"))
    drawable = all(v is not None and v.shape == s and np.isfinite(v).all() for v, s in ((z, (len(x), IAF_Z)), (log_q, (len(x),)), (z0, (len(x), IAF_Z))))
    if not drawable:
        for ax in (left, right):
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
        return figure
    for i, colour in zip(range(4), ("blue", "red", "green", "orange")):
        left.scatter(*z[i:1600:4, :2].T, s=4, color=plotting.PALETTE[colour], alpha=0.6, label=f"x {i + 1}")
    left.legend(fontsize=plotting.FONT - 3, markerscale=3, frameon=False), left.set_title("your draws z for four x, two coordinates", fontsize=plotting.FONT)
    mu, log_sigma, _ = iaf_encoded(inputs, x)
    want = inference_normal(z0, mu, np.exp(log_sigma)) - iaf_flow(inputs, z0, context)[1]
    right.plot([want.min(), want.max()], [want.min(), want.max()], ":", color="black")
    right.scatter(want[:800], log_q[:800], s=4, color=plotting.PALETTE["blue"])
    right.set_xlabel("log-density of your z", fontsize=plotting.FONT), right.set_ylabel("your log_q", fontsize=plotting.FONT)
    return figure


wrong = deviating(PlainPosterior)
IAF = Exercise(
    id="iaf_posterior", title="The posterior of an inverse autoregressive flow", minutes=15, difficulty=4,
    hints=(
        "The encoder gives a normal distribution and a context. Draw z0 from the normal distribution, with fresh noise for each row and coordinate, and send it through the flow together with the context.",
        "log_q is the density of z, so the normal log-density of z0, -eps^2 / 2 - log_sigma - log(2 pi) / 2 summed over the coordinates, and from it the flow's ldj is subtracted. z and ldj come from one and the same call of flow.forward.",
    ),
    inputs=iaf_inputs, reference=flowkit_class("inference", "FlowPosterior"),
    cases=(
        Case("z0 = mu + exp(log_sigma) eps with fresh standard normal noise", 2, iaf_noise),
        Case("z = flow.forward(z0, context): the context reaches every layer", 2, iaf_value),
        Case("log_q = log N(z0; mu, sigma) - ldj, (B,)", 3, iaf_log_q),
        Case("one pass of the flow a draw", 1, iaf_one_pass),
        Case("gradients reach x, encoder and flow, whose weights are registered", 1.5, iaf_gradient),
        Case("one row alone, x of any shape and precision, left as it was", 0.5, iaf_alone),
    ),
    misconceptions=(
        wrong("ldj_sign", "sign", "ldj", "ldj is added to log q0; where the flow expands, the density of z is lower, so it is subtracted.", log_q=lambda self, q, ldj: q + ldj),
        wrong("no_ldj", "missing term", "ldj", "ldj is missing from log_q: this is the density of z0, and the flow has stretched it since.", log_q=lambda self, q, ldj: q),
        wrong("ldj_alone", "missing term", "ldj", "log_q is -ldj alone; the log-density of z0 is missing.", log_q=lambda self, q, ldj: -ldj),
        wrong("ldj_plain", "missing term", "ldj", "log_q is ldj alone; the log-density of z0 is missing, and ldj is subtracted from it.", log_q=lambda self, q, ldj: ldj),
        wrong("turned", "sign", "ldj", "log_q has the wrong sign: ldj - log q0 is minus the log-density of z.", log_q=lambda self, q, ldj: ldj - q),
        wrong("both_minus", "sign", "ldj", "log q0 is subtracted in log_q; it counts with a plus.", log_q=lambda self, q, ldj: -q - ldj),
        wrong("exp", "missing function", "ldj", "log_q is the density itself; its logarithm is asked for.", log_q=lambda self, q, ldj: (q - ldj).exp()),
        wrong("no_log_sigma", "missing term", "ldj", "log_sigma is missing from log_q: this is the density of eps, and sigma has stretched it since.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - 0.5 * LOG_2PI).sum(-1)),
        wrong("log_sigma_sign", "sign", "ldj", "log_sigma is added in log_q; a wider normal distribution is lower, so it is subtracted.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 + s - 0.5 * LOG_2PI).sum(-1)),
        wrong("sigma_subtracted", "extra term", "ldj", "sigma itself is subtracted in log_q; its logarithm is.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s.exp() - 0.5 * LOG_2PI).sum(-1)),
        wrong("half_log_sigma", "constant", "ldj", "Half of log_sigma is subtracted in log_q, as if it were the logarithm of the variance.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - 0.5 * s - 0.5 * LOG_2PI).sum(-1)),
        wrong("no_constant", "missing term", "ldj", "The constant of the normal density, log(2 pi) / 2 for each coordinate, is missing from log_q.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s).sum(-1)),
        wrong("constant_once", "missing term", "ldj", "The constant of the normal density, log(2 pi) / 2, is counted once; every coordinate has it.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s).sum(-1) - 0.5 * LOG_2PI),
        wrong("constant_doubled", "missing term", "ldj", "The constant of the normal density is log(2 pi) for each coordinate; half of that is right.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s - LOG_2PI).sum(-1)),
        wrong("constant_sign", "sign", "ldj", "The constant of the normal density has the wrong sign in log_q.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s + 0.5 * LOG_2PI).sum(-1)),
        wrong("no_half", "missing term", "ldj", "The factor 1/2 of eps^2 is missing from log_q.", log_start=lambda self, mu, s, eps, z0: (-eps**2 - s - 0.5 * LOG_2PI).sum(-1)),
        wrong("square_sign", "sign", "ldj", "eps^2 has the wrong sign in log_q: far from the middle the density is lower.", log_start=lambda self, mu, s, eps, z0: (0.5 * eps**2 - s - 0.5 * LOG_2PI).sum(-1)),
        wrong("eps_not_squared", "missing function", "ldj", "eps is not squared in log_q.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps - s - 0.5 * LOG_2PI).sum(-1)),
        wrong("no_square", "missing term", "ldj", "eps^2 is missing from log_q.", log_start=lambda self, mu, s, eps, z0: (-s - 0.5 * LOG_2PI).sum(-1)),
        wrong("standard_at_z0", "wrong function", "ldj", "log_q takes z0 for standard normal; it is normal around mu with width sigma.", log_start=lambda self, mu, s, eps, z0: (-0.5 * z0**2 - 0.5 * LOG_2PI).sum(-1)),
        wrong("no_mu", "missing term", "ldj", "mu is not taken off z0 in log_q; the density is that around mu.", log_start=lambda self, mu, s, eps, z0: (-0.5 * (z0 / s.exp()) ** 2 - s - 0.5 * LOG_2PI).sum(-1)),
        wrong("entropy", "missing term", "ldj", "eps^2 is missing from log_q, and 1 stands in its place: that is minus the entropy, the mean of the log-density and not its value at the z0 that was drawn.", log_start=lambda self, mu, s, eps, z0: (-0.5 - s - 0.5 * LOG_2PI).sum(-1)),
        wrong("kl", "wrong function", "ldj", "log_q is the KL divergence from the prior in closed form; the log-density of z is asked for.", log_start=lambda self, mu, s, eps, z0: (0.5 * (mu**2 + (2 * s).exp() - 1) - s).sum(-1)),
        wrong("not_summed", "shape", "ldj", "log_q still has one number for each coordinate: the sum over them is missing.", log_start=lambda self, mu, s, eps, z0: -0.5 * eps**2 - s - 0.5 * LOG_2PI, log_q=lambda self, q, ldj: q - ldj[:, None]),
        wrong("not_summed_met", "shape", "ldj", "log q0 still has one number for each coordinate when ldj, one for each row, is taken off: the sum over the coordinates is missing.", log_start=lambda self, mu, s, eps, z0: -0.5 * eps**2 - s - 0.5 * LOG_2PI),
        wrong("summed_over_rows", "wrong axis", "ldj", "log q0 is summed over the batch instead of over the coordinates.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s - 0.5 * LOG_2PI).sum(0)),
        wrong("flow_exchanged", "exchanged", "forward", "z and ldj are taken from flow.forward in the wrong order: it gives (z, ldj).", through=lambda self, z0, context: self.flow.forward(z0, context)[::-1]),
        wrong("averaged", "reduction", "ldj", "log q0 is averaged over the coordinates; the log-density of independent coordinates is their sum.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s - 0.5 * LOG_2PI).mean(-1)),
        wrong("summed_all", "reduction", "ldj", "log q0 is summed over the whole batch; each row has its own.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s - 0.5 * LOG_2PI).sum()),
        wrong("batch_mean", "reduction", "ldj", "log_q is averaged over the batch; each row has its own, (B,).", log_q=lambda self, q, ldj: (q - ldj).mean()),
        wrong("batch_sum", "reduction", "ldj", "log_q is summed over the batch; each row has its own, (B,).", log_q=lambda self, q, ldj: (q - ldj).sum()),
        wrong("kept", "shape", "ldj", "log_q has shape (B, 1); it is (B,).", log_q=lambda self, q, ldj: (q - ldj)[:, None]),
        wrong("at_z", "wrong function", "ldj", "The normal density is asked about z, after the flow; it is that of z0.", sample=posterior_at_z),
        wrong("drawn_twice", "state", "ldj", "z and log_q come from two draws: log_q belongs to another z.", sample=posterior_twice),
        wrong("two_passes", "extra term", "forward", "The flow is run twice, once for z and once for ldj; one pass gives both.", through=posterior_two_passes),
        wrong("no_context", "missing term", "forward", "The context is not handed to the flow: its layers never learn which x they are at.", through=lambda self, z0, context: self.flow.forward(z0)),
        wrong("context_cut_off", "detached", "gradient", "The context is cut off from the computation graph, so the encoder does not learn what to tell the flow.", through=lambda self, z0, context: self.flow.forward(z0, context.detach())),
        wrong("backwards", "direction", "forward", "The flow is run by its inverse, one pass for each coordinate; an IAF posterior goes from z0 to z by `forward`, in one.", through=posterior_backwards),
        wrong("no_flow", "missing function", "forward", "z0 never goes through the flow.", through=lambda self, z0, context: (z0, torch.zeros(len(z0)))),
        wrong("z0_returned", "missing function", "forward", "z0 is returned; z is what the flow makes of it.", through=lambda self, z0, context: (z0, self.flow.forward(z0, context)[1])),
        wrong("no_noise", "missing term", "forward", "z0 is mu itself; noise is added, or q would be a point.", start=lambda self, mu, sigma, eps: mu),
        wrong("no_mean", "missing term", "forward", "mu is missing from z0.", start=lambda self, mu, sigma, eps: sigma * eps),
        wrong("no_sigma", "missing term", "forward", "The noise is not scaled by sigma.", start=lambda self, mu, sigma, eps: mu + eps),
        wrong("noise_alone", "missing term", "forward", "z0 is the noise itself: neither mu nor sigma enter, so it knows nothing of x.", start=lambda self, mu, sigma, eps: eps),
        wrong("noise_alone_throughout", "missing term", "forward", "z0 is the noise itself, and log_q its density: neither mu nor sigma enter.", start=lambda self, mu, sigma, eps: eps, log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - 0.5 * LOG_2PI).sum(-1)),
        wrong("divided", "wrong function", "forward", "The noise is divided by sigma; it is multiplied.", start=lambda self, mu, sigma, eps: mu + eps / sigma),
        wrong("outside", "order", "forward", "mu is added to the noise before it is scaled; z0 = mu + sigma eps.", start=lambda self, mu, sigma, eps: sigma * (mu + eps)),
        wrong("sigma_plus", "wrong function", "forward", "sigma is added to the noise; it scales it.", start=lambda self, mu, sigma, eps: mu + sigma + eps),
        wrong("log_sigma_as_sigma", "missing function", "forward", "log_sigma is used as sigma; take exp of it.", sigma=lambda self, s: s),
        wrong("variance", "constant", "forward", "exp(log_sigma / 2) is used, as if log_sigma were the logarithm of the variance.", sigma=lambda self, s: torch.exp(0.5 * s)),
        wrong("softplus", "wrong function", "forward", "sigma is softplus of log_sigma; it is exp.", sigma=lambda self, s: torch.nn.functional.softplus(s)),
        wrong("variance_throughout", "constant", "forward", "log_sigma is taken for the logarithm of the variance, in the draw and in log_q; it is that of the standard deviation.",
              sigma=lambda self, s: torch.exp(0.5 * s), log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - 0.5 * s - 0.5 * LOG_2PI).sum(-1)),
        wrong("uniform", "wrong function", "forward", "The noise is uniform on [0, 1] (torch.rand); it is standard normal.", noise=lambda self, mu: torch.rand_like(mu)),
        wrong("one_noise_a_batch", "shape", "forward", "All rows of the batch share one noise; each draws its own.", noise=lambda self, mu: torch.randn(mu.shape[-1]).expand_as(mu)),
        wrong("one_noise_a_row", "shape", "forward", "The coordinates of a row share one noise; each has its own.", noise=lambda self, mu: torch.randn(len(mu), 1).expand_as(mu)),
        wrong("noise_kept", "state", "state", "The noise is drawn once and kept; every call draws anew.", __init__=posterior_fixed, noise=posterior_kept_noise),
        wrong("seeded", "state", "state", "The generator is seeded inside, so every call draws the same noise.", noise=posterior_seeded),
        wrong("mu_sigma_exchanged", "exchanged", "net", "mu and log_sigma are taken from the encoder in the wrong order.", ask=lambda self, x: (lambda m, s, c: (s, m, c))(*self.encoder(x))),
        wrong("returned_exchanged", "exchanged", "value", "z and log_q are returned in the wrong order: sample gives (z, log_q).", end=lambda self, z, q: (q, z)),
        wrong("z_alone", "missing term", "value", "Only z is returned; sample gives the pair (z, log_q).", end=lambda self, z, q: z),
        wrong("exchanged", "exchanged", "parameters", "Encoder and flow have changed places.", __init__=lambda self, encoder, flow: PlainPosterior.__init__(self, flow, encoder)),
        Misconception("not_registered", "state", "parameters", "Encoder and flow are kept in a plain list or dict, where PyTorch does not find their weights: an optimiser would train nothing.", function(ListedPosterior)),
        wrong("draw_cut_off", "detached", "gradient", "z0 is cut off from the computation graph (detach or no_grad): the encoder learns nothing of where z should go.", start=lambda self, mu, sigma, eps: (mu + sigma * eps).detach()),
        wrong("flow_no_grad", "detached", "gradient", "The flow is run under no_grad: it is not trained, and the encoder learns nothing through it.", through=posterior_no_grad),
        wrong("z_cut_off", "detached", "gradient", "The z that is returned is cut off from the computation graph: decoder and prior could not train the posterior.", end=lambda self, z, q: (z.detach(), q)),
        wrong("log_q_cut_off", "detached", "gradient", "log_q is cut off from the computation graph, so nothing keeps the posterior from shrinking to a point.", end=lambda self, z, q: (z, q.detach())),
        wrong("ldj_cut_off", "detached", "gradient", "ldj is cut off from the computation graph, so the flow does not learn to spread out.", log_q=lambda self, q, ldj: q - ldj.detach()),
        wrong("log_sigma_cut_off", "detached", "gradient", "log_sigma, or log q0 as a whole, is cut off from the computation graph in log_q, so nothing keeps the posterior from shrinking to a point.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s.detach() - 0.5 * LOG_2PI).sum(-1)),
        wrong("sigma_cut_off", "detached", "gradient", "sigma is cut off from the computation graph in z0: the encoder does not learn how wide to be.", sigma=lambda self, s: s.exp().detach()),
        wrong("mu_cut_off", "detached", "gradient", "mu is cut off from the computation graph in z0: the encoder does not learn where z should go.", start=lambda self, mu, sigma, eps: mu.detach() + sigma * eps),
        wrong("in_place", "in place", "input", "x is changed in place: the caller's tensor is overwritten, and all that comes after sees another x.", ask=posterior_change("x")),
        wrong("encoder_in_place", "in place", "net", "What the encoder gave (mu, log_sigma or context) is changed in place: it is another thing wherever it is used afterwards.", ask=posterior_change("log_sigma")),
        wrong("flow_copied", "state", "parameters", "The flow is copied: the weights that are trained or used are not those of the flow that was handed in.", __init__=posterior_copied("flow")),
        wrong("encoder_copied", "state", "parameters", "The encoder is copied: the weights that are trained or used are not those of the encoder that was handed in.", __init__=posterior_copied("encoder")),
        wrong("needs_context", "type", "net", "The context is taken for a tensor; an encoder may give None, and the flow is run all the same.", through=posterior_needs_context),
        wrong("flattened", "shape", "net", "x is flattened before the encoder sees it; the encoder takes x as it comes, an image in the shape of an image.", ask=lambda self, x: self.encoder(x.reshape(len(x), -1))),
        wrong("size_of_noise", "constant", "forward", "The noise has a fixed number of coordinates; it has as many as mu.", noise=lambda self, mu: torch.randn(len(mu), IAF_Z)),
        wrong("size_of_constant", "constant", "ldj", "The constant of the normal density is that of a fixed number of coordinates; it counts once for each coordinate of z0.", log_start=lambda self, mu, s, eps, z0: (-0.5 * eps**2 - s).sum(-1) - 0.5 * IAF_Z * LOG_2PI),
        wrong("float32", "type", "value", "The results are turned into float32, whatever the precision of x and the nets.", end=lambda self, z, q: (z.float(), q.float())),
        wrong("x_cut_off", "detached", "gradient", "What the encoder is given is cut off from x: whatever made x could not be trained.", ask=lambda self, x: self.encoder(x.detach())),
    ),
    compare=IAF_COMPARED, features=iaf_features,
    picture=iaf_picture,
)


EXERCISES = (REVERSE, FORWARD, ELBO, IWAE, IAF)
