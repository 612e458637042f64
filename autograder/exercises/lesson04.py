"""Lesson 04, continuous and residual flows: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import math
import re

import numpy as np
import torch
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Outputs
from autograder.exercises.common import B, flowkit_class, gradient_arrives, net_inputs
from autograder.exercises.lesson01 import each_jacobian, left_alone, mistakes, shape_is
from autograder.judge import compared
from autograder.probes.common import SIZES
from autograder.probes.lesson04 import (
    BRANCH, DIFFUSION_TIMES, FLOW_RUNS, SPECTRAL, STEP_FIELDS, STEP_NUMBERS, STEP_SIZES, TRACE_FIELDS,
)
from autograder.probes.record import part
from flowkit import plotting

ASSIGNMENT = "04_continuous_residual"
TITLE = "Continuous and residual flows"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.continuous", "flowkit.residual")
TEXTS = {}

# =====================================================================================================================
# Continuous flows: rk4_step, exact_trace, hutchinson_trace, cnf_log_prob, probability_flow
# =====================================================================================================================

GENTLE = 0.6    # of the directions along which gradients are measured: the difference quotients' error falls with its fourth power


def gentle(inputs):
    return {k: GENTLE * v if "direction" in k else v for k, v in inputs.items()}


# --- fields whose paths are known ------------------------------------------------------------------------------------


def field_inputs(rng, D=2):
    """autograder.probes.lesson04.bent_field and affine_field, both closed forms."""
    R = np.linalg.qr(rng.standard_normal((D, D)))[0]
    A = np.array([[-0.4, -1.0, 0.2], [1.0, 0.9, -0.3], [0.3, -0.2, 0.5]])[:D, :D] + 0.2 * rng.standard_normal((D, D))
    sign = rng.choice([-1.0, 1.0], (3, D))
    w = {"R": R, "A": A, "c0": sign[0] * rng.uniform(0.3, 0.8, D), "c1": sign[1] * rng.uniform(0.3, 0.6, D),
         "a0": rng.uniform(0.8, 1.2), "a1": rng.uniform(0.4, 0.6)}
    return {f"field.{k}": np.asarray(v) for k, v in w.items()}


def field_points(rng, inputs, t):
    """Points whose distance from the moving centre is of order one along each axis of the field."""
    return field_centre(inputs, t) + rng.uniform(-2, 2, (B, len(inputs["field.R"]))) @ inputs["field.R"]


def field_centre(inputs, t):
    return inputs["field.c0"] + inputs["field.c1"] * math.sin(2 * t)


def field_rate(inputs, a, b, steady=False):
    """The integral of alpha from a to b."""
    wave = (math.cos(3 * a) - math.cos(3 * b)) / 3
    return float(inputs["field.a0"] * (b - a) + (0 if steady else inputs["field.a1"] * wave))


def field_path(inputs, x, a, b, name="f(t, x)"):
    """Where the points x at time a are at time b, and the integral of the trace along the way: closed forms."""
    if name == "f(t)":
        return x + field_centre(inputs, b) - field_centre(inputs, a), np.zeros(len(x))
    still = name == "f(x)"
    here, there = (inputs["field.c0"],) * 2 if still else (field_centre(inputs, a), field_centre(inputs, b))
    rate = field_rate(inputs, a, b, still)
    if name == "an affine field":
        moved = (x - here) @ torch.linalg.matrix_exp(torch.from_numpy(inputs["field.A"] * rate)).numpy().T
        return there + moved, np.full(len(x), np.trace(inputs["field.A"]) * rate)
    u = np.tan((x - here) @ inputs["field.R"].T / 2)      # of dy/dt = alpha sin(y) the tangent of y / 2 grows as an exponential
    grown = u * math.exp(rate)
    return there + 2 * np.arctan(grown) @ inputs["field.R"], (rate + np.log1p(u**2) - np.log1p(grown**2)).sum(1)


def falling(sizes, errors):
    """The power of the step size with which the errors fall, from the largest to the smallest step."""
    return math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1]) if errors[-1] > 0 else math.inf


# --- rk4_step --------------------------------------------------------------------------------------------------------

RK4_ROUNDED = 1e-12     # an error below this is rounding, and says nothing of its power


def rk4_inputs(rng):
    inputs = field_inputs(rng) | {"start": np.array(rng.uniform(0.2, 0.4)), "h": np.array(0.2)}
    inputs |= {name: np.array(True) for name in (*STEP_SIZES, "backwards", *(f"{n} steps" for n in STEP_NUMBERS))}     # what is to be run
    inputs |= {"y": field_points(rng, inputs, float(inputs["start"]))}
    return inputs | {"c": rng.standard_normal((B, 2)), "y direction": GENTLE * rng.standard_normal((B, 2)), "nudges": laws.STEP * laws.OFFSETS}


def rk4_truth(inputs, name, h):
    start = float(inputs["start"])
    return field_path(inputs, inputs["y"], start, start + h, name)[0]


def rk4_errors(inputs, outputs, name):
    """The errors (root of the mean square) of single steps of size h, h / 2, h / 4, h / 8."""
    h = float(inputs["h"]) * (-1 if name == "backwards" else 1)
    field = "f(t, x)" if name == "backwards" else name
    found = []
    for k, size in enumerate(STEP_SIZES):
        got, want = outputs[f"{name} {size}.y"], rk4_truth(inputs, field, h / 2**k)
        if got.shape != want.shape:
            raise Fail(f"For y of shape {want.shape} the result has shape {got.shape}; it should be the new y, of the same shape.")
        found.append(float(np.sqrt(np.mean((got - want) ** 2))))
    return found


def rk4_fifth(name, words):
    """The error of one step falls as h^5: on draws RK4 and the 3/8 rule lie above 4.8, and methods of order 3 below 4.2."""

    def judge(inputs, outputs, reference):
        errors = rk4_errors(inputs, outputs, name)
        slope = falling([2.0**-k for k in range(1, len(errors))], errors[1:])
        if slope < 4.6 and errors[-1] > RK4_ROUNDED:
            raise Fail(f"For {words} the error of one step falls only as h^{max(slope, 0):.1f}; that of RK4 falls as h^5.",
                       f"Steps of {inputs['h'] / 2:.2g} and {inputs['h'] / 8:.3g} are off by {errors[1]:.2g} and {errors[-1]:.2g}")

    return judge


def rk4_shapes(inputs, outputs, reference):
    shape_is(outputs, "one step.y", inputs["y"].shape, "that of y,")
    shape_is(outputs, "one number.y", (), "that of y,")
    shape_is(outputs, "float32.y", inputs["y"].shape, "that of y,")
    if outputs["float32.y"].dtype != np.float32:
        raise Fail("For y in float32 the result is in float64; it should have y's precision.")
    left_alone(inputs, outputs, "y after", "y")
    if np.abs(outputs["one step.y"] - inputs["y"]).max() < 1e-9:
        raise Fail("y is returned unchanged: no step was taken.")


def rk4_interval(inputs, outputs, reference):
    """The global error falls as h^4; on draws RK4 lies above 3.8."""
    want = field_path(inputs, inputs["y"], 0.0, 1.0)[0]
    errors = []
    for n in STEP_NUMBERS:
        got = outputs[f"{n} steps.y"]
        if got.shape != want.shape:
            raise Fail(f"After {n} steps y has shape {got.shape}; it should be {want.shape}.")
        errors.append(float(np.sqrt(np.mean((got - want) ** 2))))
    slope = falling([1 / n for n in STEP_NUMBERS], errors)
    if slope < 3.5 and errors[-1] > RK4_ROUNDED:
        raise Fail(f"Over an interval the error falls only as h^{max(slope, 0):.1f}; that of RK4 falls as h^4.",
                   f"{STEP_NUMBERS[0]} and {STEP_NUMBERS[-1]} steps are off by {errors[0]:.2g} and {errors[-1]:.2g}")


def rk4_four(inputs, outputs, reference):
    rk4_fifth("f(t, x)", "f(t, x)")(inputs, outputs, reference)
    if bool(outputs["evaluations of f.too many"]):
        raise Fail("One step asks f more than four times; the four slopes take one evaluation each.")


def rk4_by(times=(0, 0.5, 0.5, 1), inner=(0.5, 0.5, 1), weights=(1, 2, 2, 1), over=6, source=lambda k, y: k[-1], ask=lambda f, t, y: f(t, y),
           within=lambda y, h, k: y + h * k, step=lambda y, h, slope: y + h * slope, end=lambda new, t, h: new):
    """RK4 with its numbers as arguments: the times and the inner steps of its slopes, and their weights."""

    def rk4_step(f, t, y, h):
        slopes = [ask(f, t + times[0] * h, y)]
        for at, share in zip(times[1:], inner):
            slopes.append(ask(f, t + at * h, within(y, share * h, source(slopes, y))))
        return end(step(y, h, sum(w * k for w, k in zip(weights, slopes)) / over), t, h)

    return rk4_step


def rk4_in_place(f, t, y, h):
    new = rk4_by()(f, t, y, h)
    return y.copy_(new)


def rk4_running(f, t, y, h):
    k1 = f(t, y)
    y2 = y + h / 2 * k1
    k2 = f(t + h / 2, y2)
    y3 = y2 + h / 2 * k2
    k3 = f(t + h / 2, y3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(t + h, y3 + h * k3))


def rk4_inner_without_h(f, t, y, h):
    k1 = f(t, y)
    k2 = f(t + h / 2, y + k1 / 2)
    k3 = f(t + h / 2, y + k2 / 2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(t + h, y + k3))


def rk4_unbracketed(f, t, y, h):
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    return y + h / 6 * k1 + 2 * k2 + 2 * k3 + f(t + h, y + h * k3)


def rk4_every_time(f, t, y, h):
    def k1():
        return f(t, y)

    def k2():
        return f(t + h / 2, y + h / 2 * k1())

    def k3():
        return f(t + h / 2, y + h / 2 * k2())

    return y + h / 6 * (k1() + 2 * k2() + 2 * k3() + f(t + h, y + h * k3()))


def rk4_light(inputs):
    """For slips: one step of each field."""
    return {k: v for k, v in inputs.items() if not any(word in k for word in (*STEP_SIZES[1:], "backwards", " steps", "gradient", "nudges"))}


def rk4_picture(inputs, outputs, reference):
    """The error of one step against its size, in logarithms: yours, the reference's, and a line of slope 5."""
    figure = plotting.Picture(figsize=(11, 3.8), layout="constrained")
    h = float(inputs["h"]) * 0.5 ** np.arange(len(STEP_SIZES))
    for ax, name in zip(figure.subplots(1, len(STEP_FIELDS)), STEP_FIELDS):
        theirs = rk4_errors(inputs, reference, name)
        ax.loglog(h, theirs, "-", color=plotting.PALETTE["black"], linewidth=4, alpha=0.4, label="reference")
        try:
            mine = rk4_errors(inputs, outputs, name)
        except Fail:
            mine = None
        if mine is None:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        else:
            ax.loglog(h, np.maximum(mine, 1e-17), "o--", color=plotting.PALETTE["red"], label="yours")
        ax.loglog(h, 3 * theirs[0] * (h / h[0]) ** 5, ":", color=plotting.PALETTE["black"], label="$h^5$")
        ax.set_title(f"dx/dt = {name}", fontsize=plotting.FONT), ax.set_xlabel("h", fontsize=plotting.FONT)
        ax.set_xticks(h, [f"{v:.3g}" for v in h]), ax.minorticks_off()
        ax.legend(fontsize=plotting.FONT - 3, frameon=False)
    figure.axes[0].set_ylabel("error of one step", fontsize=plotting.FONT)
    return figure


RK4_COMPARED = (*(f"{name} {size}.y" for name in (*STEP_FIELDS, "backwards") for size in STEP_SIZES[:2]), "one step.y", "y after", "one number.y",
                "evaluations of f.too many", *(f"{n} steps.y" for n in STEP_NUMBERS), "gradient.along")

wrong = mistakes(rk4_by)
RK4_STEP = Exercise(
    id="rk4_step", title="One step of RK4", minutes=10, difficulty=2,
    hints=(
        "Four slopes: the first where you are; two half a step ahead, each reached along the slope before it; the last a whole step ahead, reached along the third. Each is f at a time and at a y, and both move.",
        "k1 at (t, y); k2 and k3 at t + h/2; k4 at t + h. The new y goes along their weighted mean: the slopes in the middle count twice, so the weights 1, 2, 2, 1 add up to six.",
    ),
    inputs=rk4_inputs, reference=lambda: (rk4_by(),),
    cases=(
        Case("the new y, with y left as it was", 0.5, rk4_shapes),
        Case("the error of a step falls as h^5 where f depends on y", 1, rk4_fifth("f(x)", "a field that does not depend on t")),
        Case("and where f depends on t", 1, rk4_fifth("f(t)", "a field that depends on t alone")),
        Case("and on both, forwards and backwards", 1, lambda i, o, r: (rk4_fifth("f(t, x)", "a field that depends on t and on y")(i, o, r),
                                                                       rk4_fifth("backwards", "a step backwards, h < 0,")(i, o, r))),
        Case("over an interval the error falls as h^4", 0.5, rk4_interval),
        Case("four evaluations of f", 0.5, rk4_four),
        Case("gradients reach y and f", 0.5, lambda i, o, r: gradient_arrives(o, "", "the new y", "y and f")),
    ),
    misconceptions=(
        wrong("time_stands", "missing term", "value", "All four slopes are taken at the time t; two belong to t + h/2 and one to t + h.", times=(0, 0, 0, 0)),
        wrong("last_time_half", "constant", "value", "The last slope is taken at t + h/2; it belongs to the end of the step, t + h.", times=(0, 0.5, 0.5, 0.5)),
        wrong("last_time_missing", "missing term", "value", "The last slope is taken at the time t; it belongs to the end of the step, t + h.", times=(0, 0.5, 0.5, 0)),
        wrong("second_time", "missing term", "value", "The second slope is taken at the time t; it belongs to the middle of the step.", times=(0, 0, 0.5, 1)),
        wrong("third_time", "missing term", "value", "The third slope is taken at the time t; it belongs to the middle of the step.", times=(0, 0.5, 0, 1)),
        wrong("middle_times", "missing term", "value", "The two slopes in the middle are taken at the time t; they belong to the middle of the step.", times=(0, 0, 0, 1)),
        wrong("second_time_whole", "constant", "value", "The second slope is taken at t + h; it belongs to the middle of the step, t + h/2.", times=(0, 1, 0.5, 1)),
        wrong("third_time_whole", "constant", "value", "The third slope is taken at t + h; it belongs to the middle of the step, t + h/2.", times=(0, 0.5, 1, 1)),
        wrong("times_whole", "missing term", "value", "The slopes in the middle are taken at t + h; the middle of the step is t + h/2.", times=(0, 1, 1, 1)),
        wrong("time_back", "sign", "value", "The times of the slopes run backwards: h is subtracted from t, but added to y.", times=(0, -0.5, -0.5, -1)),
        wrong("last_half", "constant", "value", "The y of the last slope goes half a step along the third one; it goes a whole step.", inner=(0.5, 0.5, 0.5)),
        wrong("inner_whole", "missing term", "value", "For the slopes in the middle y goes a whole step; it goes half a step, as the time does.", inner=(1, 1, 1)),
        wrong("inner_second_whole", "missing term", "value", "For the second slope y goes a whole step; it goes half a step, as the time does.", inner=(1, 0.5, 1)),
        wrong("inner_third_whole", "missing term", "value", "For the third slope y goes a whole step; it goes half a step, as the time does.", inner=(0.5, 1, 1)),
        wrong("inner_no_h", "missing term", "value", "Inside f the slopes are added to y without the factor h.", within=lambda y, h, k: y + (1 if abs(h) > 0 else 0) * k),
        wrong("inner_minus", "sign", "value", "Inside f the slopes are subtracted from y; each stage goes ahead along the slope before it.", within=lambda y, h, k: y - h * k),
        wrong("inner_y_stands", "missing term", "value", "All four slopes are taken at the same y; each stage goes ahead along the slope before it.", within=lambda y, h, k: y),
        wrong("inner_no_y", "missing term", "value", "Inside f the y itself is missing: a slope times h is a step from y, not a place.", within=lambda y, h, k: h * k),
        wrong("from_first", "exchanged", "value", "All stages go along the first slope; the third goes along the second, and the last along the third.", source=lambda k, y: k[0]),
        wrong("third_from_first", "exchanged", "value", "The third slope goes along the first; it goes along the second.", source=lambda k, y: k[(0, 0, 2)[len(k) - 1]]),
        wrong("last_from_second", "exchanged", "value", "The last stage goes along the second slope; it goes along the third.", source=lambda k, y: k[min(len(k) - 1, 1)]),
        wrong("equal_weights", "constant", "value", "The four slopes are averaged with equal weights; the two in the middle count twice.", weights=(1, 1, 1, 1), over=4),
        wrong("not_doubled", "missing term", "value", "The slopes in the middle are not doubled: divided by six, the weights must add up to six.", weights=(1, 1, 1, 1)),
        wrong("ends_doubled", "exchanged", "value", "The first and the last slope count twice; it is the two in the middle that do.", weights=(2, 1, 1, 2)),
        wrong("second_not_doubled", "missing term", "value", "The second slope counts once; both slopes in the middle count twice.", weights=(1, 1, 2, 1)),
        wrong("third_not_doubled", "missing term", "value", "The third slope counts once; both slopes in the middle count twice.", weights=(1, 2, 1, 1)),
        wrong("last_forgotten", "missing term", "value", "The last slope is left out of the mean.", weights=(1, 2, 2, 0)),
        wrong("over_four", "constant", "value", "The sum of the slopes is divided by four; the weights 1, 2, 2, 1 add up to six.", over=4),
        wrong("not_divided", "missing term", "value", "The weighted sum of the slopes is not divided by six, so the step is six times too long.", over=1),
        wrong("no_h", "missing term", "value", "The mean slope is added to y without the factor h.", step=lambda y, h, slope: y + slope),
        wrong("minus", "sign", "value", "The step is subtracted from y; it is added.", step=lambda y, h, slope: y - h * slope),
        wrong("h_squared", "extra term", "value", "The step has the factor h twice.", step=lambda y, h, slope: y + h * h * slope),
        wrong("only_increment", "missing term", "value", "The increment is returned; the new y is y plus it.", step=lambda y, h, slope: h * slope),
        wrong("only_slope", "missing term", "value", "The mean slope is returned; the new y is y + h times it.", step=lambda y, h, slope: slope),
        wrong("euler", "missing term", "value", "This is a step of Euler, along the first slope alone.", weights=(1, 0, 0, 0), over=1),
        wrong("midpoint", "missing term", "value", "This is a step of the midpoint rule, along the second slope alone; RK4 averages four.", weights=(0, 1, 0, 0), over=1),
        wrong("heun", "missing term", "value", "This is a step of Heun's method, with two slopes; RK4 averages four.", inner=(1, 1, 1), times=(0, 1, 1, 1), weights=(1, 1, 0, 0), over=2),
        wrong("last_only", "missing term", "value", "The step goes along the last slope alone; RK4 averages four.", weights=(0, 0, 0, 1), over=1),
        wrong("arguments", "exchanged", "value", "f is called with y first and the time second; it is f(t, y).", ask=lambda f, t, y: f(y, t)),
        wrong("returns_time", "extra term", "value", "More than the new y is returned; the time is the caller's business.", end=lambda new, t, h: (t + h, new)),
        wrong("last_alone_divided", "missing term", "value", "Brackets are missing around the sum of the slopes: only the last one is divided by six.", weights=(6, 12, 12, 1)),
        wrong("slopes_cut", "detached", "gradient", "The slopes are cut off from the computation graph (detach or no_grad), so no gradient reaches f, and not all of it y.", ask=lambda f, t, y: f(t, y).detach()),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", end=lambda new, t, h: new.detach()),
        mistakes(lambda: rk4_inner_without_h)("inner_half_no_h", "missing term", "value", "Inside f the slopes are added to y without the factor h: y goes h/2 along a slope, or h, not 1/2 or 1."),
        mistakes(lambda: rk4_unbracketed)("unbracketed", "missing term", "value", "Brackets are missing around the sum of the slopes: only the first one is multiplied by h/6."),
        mistakes(lambda: rk4_running)("running", "extra term", "value", "The stages start where the stage before them stood; each starts anew at y."),
        mistakes(lambda: rk4_in_place)("in_place", "in place", "input", "The caller's tensor y is overwritten; a new tensor is asked for."),
        mistakes(lambda: rk4_every_time)("asked_again", "extra term", "value", "Slopes are computed more than once: keep each of the four in a variable."),
    ),
    compare=RK4_COMPARED, light=rk4_light, picture=rk4_picture,
)


# --- exact_trace and hutchinson_trace --------------------------------------------------------------------------------

TRACE_WIDE = 6      # dimensions in which passes are counted


def trace_inputs(rng):
    D = 3
    a = rng.choice([-1.0, 1.0]) * rng.uniform(0.8, 1.4)
    inputs = {"A": rng.standard_normal((D, D)), "u": rng.standard_normal(D), "a": np.array([a]), "one dimension x": rng.standard_normal((B, 1)),
              "wide x": rng.standard_normal((B, TRACE_WIDE)), "r": rng.choice([-1.0, 1.0], B) * rng.uniform(0.5, 1.5, B), "nudges": laws.STEP * laws.OFFSETS}
    inputs |= {f"{name} x": rng.standard_normal((B, D)) for name in ("a linear field", "a curved field")}
    wide = {f"wide {k}": v for k, v in net_inputs(rng, TRACE_WIDE, TRACE_WIDE, "").items() if k.startswith("net.")}
    return gentle(inputs | {"x direction": rng.standard_normal((B, D))} | net_inputs(rng, D, D, "") | wide)


def trace_jacobian(inputs, name):
    """df/dx (B, D, D), [b, out, in]."""
    x = inputs[f"{name} x"]
    if name == "a linear field":
        return np.broadcast_to(inputs["A"], (len(x), *inputs["A"].shape))
    if name == "one dimension":
        return (inputs["a"] * np.cos(inputs["a"] * x))[..., None]
    prefix = "wide " if name == "wide" else ""
    W1, b1, W2 = (inputs[f"{prefix}net.{k}"] for k in ("W1", "b1", "W2"))
    J = np.einsum("jk,bk,ki->bij", W1, 1 - np.tanh((np.roll(x, 1, 1) if prefix else x) @ W1 + b1) ** 2, W2)
    return np.roll(J, -1, 2) if prefix else J      # there the field is that of the rolled x


def trace_truth(inputs, name):
    return np.einsum("bii->b", trace_jacobian(inputs, name))


def trace_values(truth, words, names):
    def judge(inputs, outputs, reference):
        for name in names:
            laws.expect(words, inputs[f"{name} x"], outputs[f"{name}.trace"], truth(inputs, name), 1e-6, why=f" for {name}")

    return judge


def trace_shapes(inputs, outputs, reference):
    for name in TRACE_FIELDS:
        shape_is(outputs, f"{name}.trace", (B,), "(B,)")
        left_alone(inputs, outputs, f"{name}.x after", f"{name} x")
        if bool(outputs[f"{name}.x asked"]):
            raise Fail("The caller's x requires a gradient afterwards (requires_grad_), though it did not before: leave it as it is.")
    shape_is(outputs, "one row.trace", (1,), "(B,)")


def trace_unrecorded(truth, words):
    """The value under torch.no_grad()."""

    def judge(inputs, outputs, reference):
        if "a curved field.trace" in outputs and "under no_grad.trace" not in outputs:
            raise Fail(UNRECORDED)
        laws.expect(words, inputs["a curved field x"], outputs["under no_grad.trace"], truth(inputs, "a curved field"), 1e-6, why=" under torch.no_grad()")

    return judge


def unrecorded(outputs, recorded, key):
    """What torch.no_grad() does to an answer, whatever else is wrong with it: "" for nothing."""
    there, got = outputs.arrays.get(recorded), outputs.arrays.get(key)
    if there is None:
        return ""
    return "raised" if got is None else "" if got.shape == there.shape and np.allclose(got, there, equal_nan=True) else "another value"


def trace_passes(truth, words, most, sentence):
    """Not more than `most` passes; the value must be right as well, and not come from differences of f."""

    def judge(inputs, outputs, reference):
        trace_values(truth, words, ("wide",))(inputs, outputs, reference)
        number = float(outputs["wide.passes"])
        if number == 0:
            raise Fail("No derivative of f is taken by autograd: differences of its values are only nearly right.")
        if number > most + 1e-6:
            raise Fail(f"With D = {TRACE_WIDE}, {number:.3g} passes backwards through f were made for the batch; {sentence}.")

    return judge


def trace_gradients(inputs, outputs, reference):
    for prefix, where in (("weights ", "the weights of f"), ("x ", "`x`")):
        gradient_arrives(outputs, prefix, "the values", where)


def trace_features(most):
    def features(inputs, outputs):
        number = outputs.arrays.get("wide.passes")
        words = "" if number is None else "none" if number == 0 else "few" if number < most + 1e-6 else "D" if number < TRACE_WIDE + 1e-6 else "too many"
        flags = {"wide.passes": np.asarray(words), "under no_grad": np.asarray(unrecorded(outputs, "a curved field.trace", "under no_grad.trace"))}
        return compared(TRACE_COMPARED + ("all signs.trace", "once more.trace") * (most == 1), outputs) | flags

    return features


TRACE_COMPARED = (*(f"{name}.{k}" for name in TRACE_FIELDS for k in ("trace", "x after", "x asked")), "one row.trace", "wide.trace",
                  "weights gradient.along", "x gradient.along")


def diagonal(J):
    return J.diagonal(dim1=-2, dim2=-1)


def trace_by(at=lambda f, x: x, jacobian=each_jacobian, value=lambda J: diagonal(J).sum(-1), end=lambda trace: trace):
    def exact_trace(f, x):
        return end(value(jacobian(f, at(f, x))))

    return exact_trace


def trace_reference():
    from flowkit.continuous import exact_trace

    return (exact_trace,)


def whole_jacobian(f, x):
    """Of the whole batch, (B, D, B, D), one pass for each of its B D rows; its blocks on the diagonal."""
    return torch.einsum("bibj->bij", torch.autograd.functional.jacobian(f, x, create_graph=True))


def trace_looped(start=lambda x: x.clone().requires_grad_(), times=lambda x: x.shape[1], column=lambda y, i: y[:, i].sum(), own=lambda g, i: g[:, i],
                 grad=lambda y, x: torch.autograd.grad(y, x, create_graph=True)[0], recording=torch.enable_grad()):
    """A loop over the columns of f(x), as it stands in most answers."""

    @recording
    def exact_trace(f, x):
        x = start(x)
        y = f(x)
        trace = torch.zeros(len(x))
        for i in range(times(x)):
            trace = trace + own(grad(column(y, i), x), i)
        return trace

    return exact_trace


def differences(f, x, h=1e-5):
    """df/dx by central differences."""
    steps = h * torch.eye(x.shape[-1])
    return torch.stack([(f(x + s) - f(x - s)) / (2 * h) for s in steps], -1)


def one_sided(f, x, h=1e-4):
    return torch.stack([(f(x + s) - f(x)) / h for s in h * torch.eye(x.shape[-1])], -1)


KEPT = "The graph of the derivative is not kept (create_graph), or the result is detached, so nothing can be trained through the trace."
X_CUT = "x is cut off from its graph, so within a solver the gradient would not reach what x was computed from."

UNRECORDED = "Under torch.no_grad() nothing is recorded, so there is no gradient to take: switch recording on inside, with torch.enable_grad()."
X_ASKED = "The caller's own x is made to require a gradient (requires_grad_); leave it as it is, and ask a copy or `x.detach()`."
NOT_ASKED = "No gradient is asked of x (requires_grad_), so autograd has nothing to differentiate with respect to."
FREED = "The graph is freed by the first pass, and the next one finds nothing: it has to be kept, by create_graph=True."

wrong, looped = mistakes(trace_by), mistakes(trace_looped)
EXACT_TRACE = Exercise(
    id="exact_trace", title="The trace, one pass a dimension", minutes=15, difficulty=3,
    hints=(
        "The trace needs one entry of each row of the Jacobian: how output i depends on input i. The rows of the batch do not mix, so the gradient of the sum of output i over the batch holds each row's own derivative.",
        "Take a copy of x that requires a gradient and evaluate f once. For each i, `torch.autograd.grad` of column i's sum gives (B, D): keep column i. With create_graph=True the result can be trained through.",
    ),
    inputs=trace_inputs, reference=trace_reference,
    cases=(
        Case("one number for each row, x left as it was", 1, trace_shapes),
        Case("linear fields: Tr A", 0.5, trace_values(trace_truth, "Tr(df/dx)", ("a linear field",))),
        Case("curved fields: each row has its own", 1, trace_values(trace_truth, "Tr(df/dx)", TRACE_FIELDS[1:])),
        Case("under torch.no_grad() too", 0.5, trace_unrecorded(trace_truth, "Tr(df/dx)")),
        Case("D passes backwards, and no more", 1, trace_passes(trace_truth, "Tr(df/dx)", TRACE_WIDE, f"D = {TRACE_WIDE} suffice, one for each column of f(x)")),
        Case("gradients reach f and x", 1, trace_gradients),
    ),
    misconceptions=(
        wrong("all_entries", "reduction", "value", "All entries of the Jacobian are added up: the outputs are summed before they are differentiated. Only the diagonal belongs to the trace.", value=lambda J: J.sum((-1, -2))),
        wrong("column_sums", "reduction", "value", "The gradient of the sum of all outputs is returned, shape (B, D); its column i holds all outputs' dependence on x_i.", value=lambda J: J.sum(-2)),
        wrong("all_added_up", "reduction", "value", "The gradient of the sum of all outputs is added up over the whole batch; each row has its own trace, of the diagonal alone.", value=lambda J: J.sum()),
        wrong("no_sum", "shape", "value", "The diagonal itself is returned, shape (B, D); the trace is its sum.", value=diagonal),
        wrong("mean", "reduction", "value", "The diagonal is averaged; the trace is its sum.", value=lambda J: diagonal(J).mean(-1)),
        wrong("batch_sum", "reduction", "value", "The traces of the whole batch are added up; every row needs its own number, shape (B,).", end=lambda t: t.sum()),
        wrong("batch_mean", "reduction", "value", "The traces are averaged over the batch; every row needs its own number, shape (B,).", end=lambda t: t.mean()),
        wrong("batch_axis", "wrong axis", "value", "The diagonal is summed over the batch instead of over the dimensions.", value=lambda J: diagonal(J).sum(0)),
        wrong("every_row_alike", "reduction", "value", "Each row holds the sum of all rows' traces.", end=lambda t: t.sum().expand(len(t))),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", end=lambda t: t[:, None]),
        wrong("first_column", "exchanged", "value", "Of each gradient column 0 is kept; output i is differentiated with respect to input i.", value=lambda J: J[..., 0].sum(-1)),
        wrong("first_output", "exchanged", "value", "It is always output 0 that is differentiated; each dimension has its own output.", value=lambda J: J[..., 0, :].sum(-1)),
        wrong("one_entry", "missing term", "value", "Only the first entry of the diagonal is taken; the trace adds up all D of them.", value=lambda J: J[..., 0, 0]),
        wrong("last_entry", "missing term", "value", "Only the last entry of the diagonal is taken (the loop overwrites what it found before); the trace adds up all D of them.", value=lambda J: J[..., -1, -1]),
        wrong("accumulated", "state", "value", "The gradients of earlier passes are still there: `backward` adds to `x.grad`, which has to be emptied before each pass.", jacobian=lambda f, x: each_jacobian(f, x).cumsum(-2)),
        wrong("sign", "sign", "value", "The sign is wrong: the minus of the instantaneous change of variables does not belong to the trace.", end=lambda t: -t),
        wrong("absolute", "extra term", "value", "Absolute values are added up; entries of the diagonal may be negative.", value=lambda J: diagonal(J).abs().sum(-1)),
        wrong("product", "wrong function", "value", "The entries of the diagonal are multiplied; the trace is their sum.", value=lambda J: diagonal(J).prod(-1)),
        wrong("log_det", "wrong function", "value", "This is log|det J|, which belongs to a finite step; in continuous time its place is taken by the trace.", value=lambda J: torch.linalg.slogdet(J)[1]),
        wrong("det", "wrong function", "value", "This is the determinant of the Jacobian; its trace is asked for.", value=torch.linalg.det),
        wrong("log", "extra term", "value", "The logarithm of the trace is returned; the trace itself is a rate of log-density already.", end=lambda t: t.abs().log()),
        wrong("squares", "wrong function", "value", "The squares of all entries are added up; that is the squared norm of the Jacobian.", value=lambda J: J.square().sum((-1, -2))),
        wrong("first_row", "reduction", "value", "The Jacobian of the first row is used for all rows; a curved field has another one at each point.", jacobian=lambda f, x: each_jacobian(f, x)[:1].expand(len(x), -1, -1)),
        wrong("mean_jacobian", "reduction", "value", "The Jacobians of all rows are averaged; each row has its own.", jacobian=lambda f, x: each_jacobian(f, x).mean(0).expand(len(x), -1, -1)),
        wrong("at_zero", "constant", "value", "The derivative is taken at the origin; each row needs it at its own point.", at=lambda f, x: 0 * x),
        wrong("at_value", "wrong function", "value", "The derivative is taken at f(x); it is needed at x.", at=lambda f, x: f(x)),
        wrong("times_x", "extra term", "value", "The derivatives are multiplied by x; the trace holds the derivatives alone.", jacobian=lambda f, x: each_jacobian(f, x) * x[:, None, :]),
        wrong("value_sum", "missing function", "value", "The values of f are added up; it is derivatives that the trace is made of.", jacobian=lambda f, x: torch.diag_embed(f(x))),
        wrong("whole_batch", "extra term", "value", "The Jacobian of the whole batch is built, B D passes backwards, most of them for zeros; D passes suffice.", jacobian=whole_jacobian),
        wrong("differences", "wrong function", "value", "Differences of f stand for its derivatives; autograd gives them exactly, at the same cost.", jacobian=differences),
        wrong("one_sided", "wrong function", "value", "One-sided differences of f stand for its derivatives, which leaves an error of the size of the step; autograd is exact.", jacobian=one_sided),
        mistakes(lambda: lambda f, x: 0)("not_added", "missing term", "value", "The sum stays the number 0 that it starts with: what each pass finds is not added to it."),
        looped("row_for_column", "wrong axis", "value", "Row i of f(x) is summed and differentiated; it is column i, over the whole batch.", column=lambda y, i: y[i, :].sum()),
        looped("row_of_gradient", "wrong axis", "value", "Of each gradient row i is kept; it is column i, which has a number for each row of the batch.", own=lambda g, i: g[i, :]),
        looped("loop_over_batch", "exchanged", "value", "The loop goes over the rows of the batch, x.shape[0]; it goes over the dimensions.", times=lambda x: x.shape[0]),
        looped("column_mean", "reduction", "value", "Column i is averaged over the batch before it is differentiated, which divides every derivative by B; it is summed.", column=lambda y, i: y[:, i].mean()),
        looped("not_scalar", "reduction", "value", "A gradient is asked of a whole column; it takes one number, the column's sum.", column=lambda y, i: y[:, i]),
        looped("grad_exchanged", "exchanged", "value", "`torch.autograd.grad` is given x first; it takes what is differentiated, and then with respect to what.", grad=lambda y, x: torch.autograd.grad(x, y, create_graph=True)[0]),
        looped("not_asked", "missing function", "gradient", NOT_ASKED, start=lambda x: x),
        looped("not_recorded", "missing function", "gradient", UNRECORDED, recording=lambda trace: trace),
        looped("x_asked", "in place", "input", X_ASKED, start=lambda x: x.requires_grad_()),
        looped("freed", "missing function", "gradient", FREED, grad=lambda y, x: torch.autograd.grad(y, x)[0]),
        wrong("x_cut", "detached", "gradient", X_CUT, at=lambda f, x: x.detach()),
        wrong("not_kept", "detached", "gradient", KEPT, end=lambda t: t.detach()),
    ),
    compare=TRACE_COMPARED, features=trace_features(TRACE_WIDE),
    picture=pictures.agreement(tuple(f"{name}.trace" for name in TRACE_FIELDS), "Tr(df/dx), all rows"),
)


# --- hutchinson_trace ------------------------------------------------------------------------------------------------


def hutchinson_inputs(rng):
    inputs = trace_inputs(rng)
    inputs |= {f"{name} eps": rng.standard_normal(inputs[f"{name} x"].shape) for name in (*TRACE_FIELDS, "wide")}
    return inputs | {"signs": np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3, indexing="ij"), -1).reshape(-1, 3)}


def hutchinson_truth(inputs, name):
    eps = inputs[f"{name} eps"]
    return np.einsum("bi,bij,bj->b", eps, trace_jacobian(inputs, name), eps)


def hutchinson_values(names):
    return trace_values(hutchinson_truth, "eps^T (df/dx) eps", names)


def hutchinson_shapes(inputs, outputs, reference):
    trace_shapes(inputs, outputs, reference)
    left_alone(inputs, outputs, "eps after", "a linear field eps")
    if not np.allclose(outputs["once more.trace"], outputs["a linear field.trace"]):
        raise Fail("The same eps gives another number at the second call: the noise is the one that is handed in, and none is drawn inside.")


def hutchinson_mean(inputs, outputs, reference):
    """Over all 2^D sign vectors, which have mean 0 and covariance I, the mean is the trace without any chance."""
    got = outputs["all signs.trace"]
    if got.shape != (len(inputs["signs"]),):
        raise Fail(f"For {len(inputs['signs'])} rows the result has shape {got.shape}; it should be (B,).")
    want = trace_truth(inputs, "a curved field")[0]
    if np.ptp(got) < 1e-9:
        raise Fail("Every eps gives the same number, so this is no estimate of the trace by noise.")
    if abs(got.mean() - want) > 1e-6 * (1 + abs(want)):
        raise Fail("The mean over all vectors of signs is not the trace, so the estimate is biased.", f"The mean is {got.mean():.4g}, the trace {want:.4g}")


def rows_times_jacobian(f, x, eps):
    """eps^T (df/dx), (B, D)."""
    return torch.func.vjp(f, x)[1](eps)[0]


def hutchinson_by(at=lambda f, x: x, noise=lambda e, x: e, left=lambda e: e, product=rows_times_jacobian, dot=lambda v, e, x: (v * e).sum(-1),
                  end=lambda t: t):
    def hutchinson_trace(f, x, eps):
        x, eps = at(f, x), noise(eps, x)
        return end(dot(product(f, x, left(eps)), eps, x))

    return hutchinson_trace


def hutchinson_reference():
    from flowkit.continuous import hutchinson_trace

    return (hutchinson_trace,)


def hutchinson_full(f, x, eps):
    return torch.einsum("bi,bij->bj", eps, each_jacobian(f, x))


def hutchinson_diagonal(f, x, eps):
    return torch.stack([torch.func.jvp(f, (x,), (s.expand_as(x),))[1][:, i] for i, s in enumerate(torch.eye(x.shape[-1]))], -1) * eps


def hutchinson_differences(f, x, eps, h=1e-5):
    """(df/dx) eps, by central differences."""
    return (f(x + h * eps) - f(x - h * eps)) / (2 * h)


def hutchinson_whole(f, x, eps):
    return (eps[:, None, :] @ whole_jacobian(f, x))[:, 0]


def hutchinson_grad(start=lambda x: x.clone().requires_grad_(), grad=lambda y, x, e: torch.autograd.grad(y, x, e, create_graph=True)[0],
                    recording=torch.enable_grad()):
    """With `torch.autograd.grad`, as it stands in most answers."""

    @recording
    def hutchinson_trace(f, x, eps):
        x = start(x)
        return (grad(f(x), x, eps) * eps).sum(-1)

    return hutchinson_trace


wrong, graded = mistakes(hutchinson_by), mistakes(hutchinson_grad)
HUTCHINSON_TRACE = Exercise(
    id="hutchinson_trace", title="The trace from one pass", minutes=10, difficulty=2,
    hints=(
        "eps^T (df/dx) is a vector, and backpropagation gives it in one pass without building the matrix: it is the gradient of the number eps . f(x), with eps held fixed.",
        "`torch.autograd.grad` takes eps as `grad_outputs` and gives (B, D), row by row eps^T (df/dx). What is left is the product with eps once more, and the sum over the dimensions.",
    ),
    inputs=hutchinson_inputs, reference=hutchinson_reference,
    cases=(
        Case("one number for each row, from the eps that is handed in", 1, hutchinson_shapes),
        Case("linear fields: eps^T A eps", 0.5, hutchinson_values(("a linear field",))),
        Case("curved fields: each row has its own", 1, hutchinson_values(TRACE_FIELDS[1:])),
        Case("under torch.no_grad() too", 0.5, trace_unrecorded(hutchinson_truth, "eps^T (df/dx) eps")),
        Case("the mean over all signs is the trace", 1, hutchinson_mean),
        Case("one pass backwards, no Jacobian", 1, trace_passes(hutchinson_truth, "eps^T (df/dx) eps", 1, "one suffices, and no Jacobian is built")),
        Case("gradients reach f and x", 1, trace_gradients),
    ),
    misconceptions=(
        wrong("no_dot", "shape", "value", "The product eps^T (df/dx) is returned, shape (B, D); its product with eps is missing.", dot=lambda v, e, x: v),
        wrong("not_summed", "shape", "value", "The sum over the dimensions is missing: the result has shape (B, D).", dot=lambda v, e, x: v * e),
        wrong("no_second_eps", "missing term", "value", "The product eps^T (df/dx) is summed without being multiplied by eps again.", dot=lambda v, e, x: v.sum(-1)),
        wrong("no_first_eps", "missing term", "value", "The outputs are summed without the weights eps before they are differentiated; eps appears on one side only.", left=torch.ones_like),
        wrong("no_eps", "missing term", "value", "eps has no effect: all entries of the Jacobian are added up.", left=torch.ones_like, dot=lambda v, e, x: v.sum(-1)),
        wrong("mean", "reduction", "value", "The products are averaged over the dimensions; they are summed.", dot=lambda v, e, x: (v * e).mean(-1)),
        wrong("averaged_first", "reduction", "value", "The products eps f(x) are averaged before they are differentiated, which divides the result by B D; they are summed.", product=lambda f, x, e: rows_times_jacobian(f, x, e) / x.numel()),
        wrong("batch_sum", "reduction", "value", "The whole batch is added up; every row needs its own number, shape (B,).", end=lambda t: t.sum()),
        wrong("batch_mean", "reduction", "value", "The whole batch is averaged; every row needs its own number, shape (B,).", end=lambda t: t.mean()),
        wrong("batch_axis", "wrong axis", "value", "The products are summed over the batch instead of over the dimensions.", dot=lambda v, e, x: (v * e).sum(0)),
        wrong("all_pairs", "wrong axis", "value", "Every row is multiplied by every other row's eps, shape (B, B); each has only its own.", dot=lambda v, e, x: v @ e.T),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", end=lambda t: t[:, None]),
        wrong("sign", "sign", "value", "The sign is wrong: the minus of the instantaneous change of variables does not belong to the trace.", end=lambda t: -t),
        wrong("dot_x", "exchanged", "value", "The product eps^T (df/dx) is multiplied by x; it is multiplied by eps.", dot=lambda v, e, x: (v * x).sum(-1)),
        wrong("squared", "wrong function", "value", "The product eps^T (df/dx) is multiplied by itself; that estimates the squared norm of the Jacobian.", dot=lambda v, e, x: v.square().sum(-1)),
        wrong("norm", "wrong function", "value", "The length of eps^T (df/dx) is returned; its product with eps is asked for.", dot=lambda v, e, x: v.norm(dim=-1)),
        wrong("added", "wrong function", "value", "eps is added to eps^T (df/dx); the two are multiplied.", dot=lambda v, e, x: (v + e).sum(-1)),
        wrong("divided", "wrong function", "value", "eps^T (df/dx) is divided by eps; the two are multiplied.", dot=lambda v, e, x: (v / e).sum(-1)),
        wrong("length_taken_out", "extra term", "value", "The result is divided by eps . eps, or eps is scaled to length one: its covariance is not I then, and the estimate is biased.", dot=lambda v, e, x: (v * e).sum(-1) / e.square().sum(-1)),
        wrong("over_d", "extra term", "value", "The result is divided by the square root of D; with eps of covariance I nothing is to be divided.", end=lambda t: t / 3**0.5),
        wrong("signs_only", "extra term", "value", "Only the signs of eps are used; the noise is the one that is handed in, Gaussian or not.", noise=lambda e, x: e.sign()),
        wrong("own_noise", "extra term", "value", "Noise is drawn inside and the eps that is handed in has no effect; within one solve it must stay fixed.", noise=lambda e, x: torch.randn_like(x)),
        wrong("own_signs", "extra term", "value", "Random signs are drawn inside and the eps that is handed in has no effect; within one solve it must stay fixed.", noise=lambda e, x: torch.randint(0, 2, x.shape) * 2.0 - 1),
        wrong("one_for_all", "reduction", "value", "The first row's eps is used for all rows; each has its own.", noise=lambda e, x: e[:1].expand_as(x)),
        wrong("no_derivative", "missing function", "value", "eps meets the values of f, not its derivatives.", product=lambda f, x, e: f(x)),
        wrong("no_derivative_twice", "missing function", "value", "eps is multiplied by the values of f, and then by itself again; no derivative is taken.", product=lambda f, x, e: f(x) * e),
        wrong("diagonal", "wrong function", "value", "Only the diagonal of the Jacobian meets eps, which takes D passes; one vjp with the whole of eps is enough.", product=hutchinson_diagonal),
        wrong("exact", "wrong function", "value", "This is the exact trace, by D passes; eps has no effect.", product=lambda f, x, e: diagonal(each_jacobian(f, x)), dot=lambda v, e, x: v.sum(-1)),
        wrong("jacobian_built", "extra term", "value", "The whole Jacobian is built, D passes backwards; one vjp gives eps^T (df/dx) at once.", product=hutchinson_full),
        wrong("batch_jacobian", "extra term", "value", "The Jacobian of the whole batch is built, B D passes backwards; one vjp gives eps^T (df/dx) at once.", product=hutchinson_whole),
        wrong("differences", "wrong function", "value", "Differences of f along eps stand for its derivative; one vjp gives it exactly.", product=hutchinson_differences),
        wrong("at_value", "wrong function", "value", "The derivative is taken at f(x); it is needed at x.", at=lambda f, x: f(x)),
        wrong("at_eps", "exchanged", "value", "The derivative is taken at x + eps; eps is a direction, and the point is x.", product=lambda f, x, e: rows_times_jacobian(f, x + e, e)),
        graded("not_asked", "missing function", "gradient", NOT_ASKED, start=lambda x: x),
        graded("not_recorded", "missing function", "gradient", UNRECORDED, recording=lambda trace: trace),
        graded("x_asked", "in place", "input", X_ASKED, start=lambda x: x.requires_grad_()),
        graded("x_for_eps", "exchanged", "value", "x and eps have changed places in `torch.autograd.grad`: what is differentiated, then x, then the weights eps.", grad=lambda y, x, e: torch.autograd.grad(y, e, x, create_graph=True)[0]),
        graded("grad_exchanged", "exchanged", "value", "`torch.autograd.grad` is given x first; it takes what is differentiated, and then with respect to what.", grad=lambda y, x, e: torch.autograd.grad(x, y, e, create_graph=True)[0]),
        graded("not_scalar", "reduction", "value", "A gradient is asked of many numbers at once; it takes one, their sum weighted by eps.", grad=lambda y, x, e: torch.autograd.grad(y, x, create_graph=True)[0]),
        wrong("x_cut", "detached", "gradient", X_CUT, at=lambda f, x: x.detach()),
        wrong("not_kept", "detached", "gradient", KEPT, end=lambda t: t.detach()),
    ),
    compare=TRACE_COMPARED + ("all signs.trace", "once more.trace"), features=trace_features(1),
    picture=lambda inputs, outputs, reference: hutchinson_picture(inputs, outputs, reference),
)


def hutchinson_picture(inputs, outputs, reference):
    """At one point, the estimate for each vector of signs, their mean, and the trace."""
    figure = plotting.Picture(figsize=(8, 3.6), layout="constrained")
    ax = figure.subplots()
    theirs, mine = reference.arrays["all signs.trace"], outputs.arrays.get("all signs.trace")
    at, names = np.arange(len(theirs)), ["".join("+" if v > 0 else "-" for v in s) for s in inputs["signs"]]
    ax.bar(at, theirs, color="#cccccc", width=0.8, label="reference")
    if mine is not None and mine.shape == theirs.shape and np.isfinite(mine).all():
        ax.bar(at, mine, color=plotting.PALETTE["blue"], width=0.3, label="yours")
        ax.axhline(mine.mean(), color=plotting.PALETTE["blue"], linewidth=2, label="the mean of yours")
    else:
        ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.axhline(trace_truth(inputs, "a curved field")[0], color=plotting.PALETTE["red"], linestyle="--", linewidth=2, label="the trace")
    ax.set_xticks(at, names), ax.set_xlabel("eps", fontsize=plotting.FONT), ax.set_ylabel(r"$\epsilon^T J \epsilon$", fontsize=plotting.FONT)
    ax.legend(fontsize=plotting.FONT - 3, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- cnf_log_prob ----------------------------------------------------------------------------------------------------


def cnf_inputs(rng):
    inputs = field_inputs(rng) | {step: np.array(n) for step, (_, n) in FLOW_RUNS.items()} | net_inputs(rng, 2, 2, "", 8)
    inputs |= {"x": field_points(rng, inputs, 0.0), "loc": rng.uniform(-0.5, 0.5, 2), "scale": rng.uniform(1.0, 1.6, 2)}
    inputs |= {"r": rng.choice([-1.0, 1.0], B) * rng.uniform(0.5, 1.5, B), "nudges": laws.STEP * laws.OFFSETS, "x direction": rng.standard_normal((B, 2))}
    wide = field_inputs(rng, 3)
    wide |= {"x": field_points(rng, wide, 0.0), "loc": rng.uniform(-0.5, 0.5, 3), "scale": rng.uniform(1.0, 1.6, 3)}
    inputs |= {f"wide {k}": v for k, v in wide.items()}
    return gentle(inputs) | {"grid": plotting.grid_points((-CNF_BOX, CNF_BOX) * 2, CNF_CELLS).astype(float)}


CNF_BOX, CNF_CELLS = 2.0, 32
CNF_NEAR = 5e-3     # in nats: RK4 is off by less than a tenth of it in 8 steps, Euler's method by far more than it
CNF_ROUNDED = 1e-6  # an error below this says nothing of its power


def cnf_truth(inputs, name):
    """log p(x) in closed form."""
    z, integral = field_path(inputs, inputs["x"], 0.0, 1.0, "an affine field" if name == "an affine field" else "f(t, x)")
    return laws.normal_log_prob((z - inputs["loc"]) / inputs["scale"]) - np.log(inputs["scale"]).sum() + integral


def cnf_same_again(outputs):
    first, again = (outputs.arrays.get(f"{step}.log_prob") for step in ("one row", "once more"))
    if first is not None and again is not None and not np.array_equal(first, again):
        raise Fail("A second call gives another number: the trace is to be exact, without noise.")


def cnf_values(name):
    def judge(inputs, outputs, reference):
        cnf_same_again(outputs)
        laws.expect("log p(x)", inputs["x"], outputs[f"{name} in 8 steps.log_prob"], cnf_truth(inputs, name), CNF_NEAR, why=f" for {name}")

    return judge


def cnf_affine(inputs, outputs, reference):
    """In the plane and in three dimensions."""
    cnf_values("an affine field")(inputs, outputs, reference)
    wide = part(inputs, "wide ")
    laws.expect("log p(x)", wide["x"], outputs["three dimensions.log_prob"], cnf_truth(wide, "an affine field"), CNF_NEAR, why=" for D = 3")


def cnf_unrecorded(inputs, outputs, reference):
    """The value under torch.no_grad()."""
    if "an affine field in 8 steps.log_prob" in outputs and "under no_grad.log_prob" not in outputs:
        raise Fail(UNRECORDED)
    cnf_same_again(outputs)
    laws.expect("log p(x)", inputs["x"], outputs["under no_grad.log_prob"], cnf_truth(inputs, "an affine field"), CNF_NEAR, why=" under torch.no_grad()")


def cnf_features(inputs, outputs):
    plane = "an affine field in 8 steps.log_prob"
    flags = {"under no_grad": unrecorded(outputs, plane, "under no_grad.log_prob"),
             "three dimensions": "raised" if plane in outputs and "three dimensions.log_prob" not in outputs else ""}
    return compared(CNF_COMPARED, outputs) | {k: np.asarray(v) for k, v in flags.items()}


def cnf_shapes(inputs, outputs, reference):
    for step in FLOW_RUNS:
        shape_is(outputs, f"{step}.log_prob", (B,), "(B,)")
        left_alone(inputs, outputs, f"{step}.x after", "x")
    shape_is(outputs, "one row.log_prob", (1,), "(B,)")


def cnf_order(inputs, outputs, reference):
    """RK4 makes the error 16 times smaller with twice as many steps, at least 9 times on draws; a method of order 2, 4 times."""
    errors, want = [], cnf_truth(inputs, "a curved field")
    for n in (4, 8):
        got = outputs[f"a curved field in {n} steps.log_prob"]
        if got.shape != want.shape:
            raise Fail(f"In {n} steps the result has shape {got.shape}; it should be (B,) = {want.shape}.")
        errors.append(float(np.sqrt(np.mean((got - want) ** 2))))
    if not bool(outputs["8 steps against 4.more"]):
        raise Fail("f is asked as often for 4 steps as for 8: the number of steps has no effect.")
    if errors[1] > 0.7 * errors[0] and errors[1] > CNF_NEAR:
        raise Fail("More steps hardly bring the log-densities nearer to the closed form: something else than the solver is wrong.",
                   f"4 and 8 steps are off by {errors[0]:.2g} and {errors[1]:.2g}")
    if errors[1] > errors[0] / 6 and errors[1] > CNF_ROUNDED:
        raise Fail("With twice as many steps the error falls too little: path and integral must both be solved by RK4, which makes it 16 times smaller.",
                   f"4 and 8 steps are off by {errors[0]:.2g} and {errors[1]:.2g}")


def cnf_rk4(rates, t, state, h):
    return rk4_by()(rates, t, state, h)


def cnf_left(rates, t, state, h):
    """The path by RK4, the integral of the trace from its value at the start of the step."""
    moved = cnf_rk4(rates, t, state, h)
    return torch.cat([moved[:, :-1], (state + h * rates(t, state))[:, -1:]], 1)


def cnf_right(rates, t, state, h):
    """The same from its value at the end of the step."""
    moved = cnf_rk4(rates, t, state, h)
    return torch.cat([moved[:, :-1], state[:, -1:] + h * rates(t + h, moved)[:, -1:]], 1)


def cnf_no_h(rates, t, state, h):
    moved = cnf_rk4(rates, t, state, h)
    return torch.cat([moved[:, :-1], state[:, -1:] + rates(t, state)[:, -1:]], 1)


def cnf_h_twice(rates, t, state, h):
    moved = cnf_rk4(rates, t, state, h)
    return torch.cat([moved[:, :-1], state[:, -1:] + h * (moved - state)[:, -1:]], 1)


def cnf_last_only(rates, t, state, h):
    moved = cnf_rk4(rates, t, state, h)
    return torch.cat([moved[:, :-1], (moved - state)[:, -1:]], 1)


def cnf_trace(g, x):
    from flowkit.continuous import exact_trace

    return exact_trace(g, x)


def cnf_by(field=lambda f, t, x: f(t, x), trace=lambda g, x, start: cnf_trace(g, x), width=lambda steps: 1 / steps, count=lambda steps: steps,
           time=lambda k, h: k * h, advance=cnf_rk4, value=lambda base, z, x: base.log_prob(z), join=lambda p, integral: p + integral,
           end=lambda log_prob: log_prob, begin=lambda x: torch.zeros_like(x[:, :1]), points=lambda state: state[:, :-1],
           column=lambda trace: trace[:, None], at_end=lambda state: state[:, :-1], integral=lambda state: state[:, -1]):
    def cnf_log_prob(x, f, base, steps):
        def rates(t, state):
            z = points(state)
            return torch.cat([field(f, t, z), column(trace(lambda z: field(f, t, z), z, x))], -1)

        h, state = width(steps), torch.cat([x, begin(x)], -1)
        for k in range(count(steps)):
            state = advance(rates, torch.tensor(time(k, h)), state, h)
        return end(join(value(base, at_end(state), x), integral(state)))

    return cnf_log_prob


def cnf_in_place(x, f, base, steps):
    """The path is added to x itself."""
    value = cnf_by()(x, f, base, steps)
    x += 1
    return value


def cnf_moved(x, f, base, steps):
    """Where the points go, and nothing of their density."""
    def rates(t, z):
        return f(t, z)

    for k in range(steps):
        x = rk4_by()(rates, k / steps, x, 1 / steps)
    return x


def cnf_light(inputs):
    """For slips: few steps, no gradients."""
    return {k: v for k, v in inputs.items() if not any(word in k for word in ("8 steps", "gradient", "nudges", "wide"))}


CNF_COMPARED = (*(f"{step}.{k}" for step in FLOW_RUNS for k in ("log_prob", "x after")), "one row.log_prob",
                "8 steps against 4.more", "gradient.along")

wrong = mistakes(cnf_by)
CNF_LOG_PROB = Exercise(
    id="cnf_log_prob", title="The density of a continuous flow", minutes=20, difficulty=3,
    hints=(
        "Two things move together from t = 0 to t = 1: the points, along f, and a number for each of them, which grows at the rate Tr(df/dx) where the point just is. At the end the base is asked where the points have arrived.",
        "Put both into one state (B, D + 1), the last column starting at zero, and write the function of (t, state) that gives both rates; then take `steps` steps of size 1/steps with your `rk4_step`. The last column is added to the base's log-density.",
    ),
    inputs=cnf_inputs, reference=lambda: (cnf_by(),),
    cases=(
        Case("one number for each row, x left as it was", 1, cnf_shapes),
        Case("an affine field, against the closed form", 3, cnf_affine),
        Case("a curved field, against the closed form", 3, cnf_values("a curved field")),
        Case("twice the steps, a sixteenth of the error", 1, cnf_order),
        Case("under torch.no_grad() too", 0.5, cnf_unrecorded),
        Case("gradients reach f and x", 1.5, lambda i, o, r: gradient_arrives(o, "", "the log-densities", "x and the weights of f")),
    ),
    misconceptions=(
        wrong("minus_integral", "sign", "value", "The integral of the trace is subtracted. The log-density falls by it along the path from data to latents; to come back to the data it is added.", join=lambda p, i: p - i),
        wrong("no_integral", "missing term", "value", "The integral of the trace is missing: this is the base's log-density at the latent point alone.", join=lambda p, i: p),
        wrong("only_integral", "missing term", "value", "The base's log-density is missing: this is the integral of the trace alone.", join=lambda p, i: i),
        wrong("exponent", "missing function", "value", "The base's density is used without its logarithm.", value=lambda base, z, x: base.log_prob(z).exp()),
        wrong("base_at_x", "wrong function", "value", "The base is asked at the data; its points are the latents, x at t = 1.", value=lambda base, z, x: base.log_prob(x)),
        wrong("standard_normal", "constant", "value", "The base is taken to be a standard normal, whatever was handed in.", value=lambda base, z, x: -0.5 * z.square().sum(-1) - z.shape[1] / 2 * math.log(2 * math.pi)),
        wrong("batch_sum_base", "reduction", "value", "The base's log-densities of the whole batch are added up; every row has its own.", value=lambda base, z, x: base.log_prob(z).sum()),
        wrong("batch_mean_base", "reduction", "value", "The base's log-densities are averaged over the batch; every row has its own.", value=lambda base, z, x: base.log_prob(z).mean()),
        wrong("batch_sum", "reduction", "value", "The log-densities of the whole batch are added up; every row needs its own number, shape (B,).", end=lambda p: p.sum()),
        wrong("batch_mean", "reduction", "value", "The log-densities are averaged over the batch; every row needs its own number, shape (B,).", end=lambda p: p.mean()),
        wrong("loss", "extra term", "value", "The mean negative log-likelihood is returned; the log-density of each row is asked for.", end=lambda p: -p.mean()),
        wrong("negative", "sign", "value", "The result has the wrong sign: it is -log p(x).", end=lambda p: -p),
        wrong("density", "extra term", "value", "The density is returned; its logarithm is asked for.", end=torch.exp),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", end=lambda p: p[:, None]),
        wrong("all_rows_paired", "shape", "value", "A column (B, 1) meets a row (B,), which gives (B, B): the integral has a dimension too many.", join=lambda p, i: p + i[:, None]),
        wrong("backwards", "direction", "value", "The solution runs from t = 1 to t = 0. That is the way of sampling; data start at t = 0, and their latents are at t = 1.", width=lambda n: -1 / n, time=lambda k, h: 1 + k * h),
        wrong("against_field", "direction", "value", "The field is followed against its direction, -f; that is the way back from latents to data.", field=lambda f, t, x: -f(t, x)),
        wrong("time_turned", "direction", "value", "f is asked at the time 1 - t; the data's time is t = 0, and it runs to 1.", field=lambda f, t, x: f(1 - t, x)),
        wrong("time_stands", "missing term", "value", "The field is frozen at t = 0; it changes with time, and must be asked at the time of each slope.", field=lambda f, t, x: f(torch.tensor(0.0), x)),
        wrong("step_time_stands", "missing term", "value", "Every step starts at t = 0 again: the time does not move on from step to step.", time=lambda k, h: 0.0),
        wrong("time_counts", "missing term", "value", "The number of the step is taken for the time; the step k starts at t = k h.", time=lambda k, h: float(k)),
        wrong("time_ahead", "off by one", "value", "Every step starts at the time at which it should end: the first one starts at t = 0.", time=lambda k, h: (k + 1) * h),
        wrong("step_more", "off by one", "value", "One step too many is taken, beyond t = 1.", count=lambda n: n + 1),
        wrong("step_fewer", "off by one", "value", "One step too few is taken: t = 1 is not reached.", count=lambda n: n - 1),
        wrong("one_step", "missing function", "value", "Only one step is taken; it takes `steps` of them to reach t = 1.", count=lambda n: 1),
        wrong("h_one", "constant", "value", "Every step has size 1, so the end is at t = steps; it should be at t = 1.", width=lambda n: 1.0),
        wrong("steps_ignored", "constant", "value", "The number of steps is fixed inside; `steps` has no effect.", width=lambda n: 1 / 10, count=lambda n: 10),
        wrong("euler", "wrong function", "value", "The steps are Euler's, along the slope at the start of the step; RK4 is far more exact.", advance=lambda rates, t, s, h: s + h * rates(t, s)),
        wrong("left_sum", "wrong function", "value", "The points are solved by RK4, but the integral of the trace only from its value at the start of each step. Let both be solved together.", advance=cnf_left),
        wrong("right_sum", "wrong function", "value", "The points are solved by RK4, but the integral of the trace only from its value at the end of each step. Let both be solved together.", advance=cnf_right),
        wrong("sum_without_h", "missing term", "value", "The traces of the steps are added up without the factor h: a sum is no integral.", advance=cnf_no_h),
        wrong("h_twice", "extra term", "value", "The integral of the trace has the factor h twice.", advance=cnf_h_twice),
        wrong("last_only", "missing term", "value", "Only the last step's part of the integral is kept; the parts of all steps are added up.", advance=cnf_last_only),
        wrong("trace_at_data", "wrong function", "value", "The trace is always taken at the data; it is needed where the point is at that time.", trace=lambda g, x, start: cnf_trace(g, start)),
        wrong("trace_minus", "sign", "value", "The trace enters the rates with a minus: on the way from data to latents the integral of +Tr(df/dx) is collected.", trace=lambda g, x, start: -2 * cnf_trace(g, x)),
        wrong("all_entries", "reduction", "value", "The whole Jacobian of f is added up instead of its diagonal, the trace.", trace=lambda g, x, start: each_jacobian(g, x).sum((-1, -2))),
        wrong("trace_mean", "reduction", "value", "The trace is divided by the number of dimensions.", trace=lambda g, x, start: cnf_trace(g, x) / x.shape[1]),
        wrong("cut_off_first", "exchanged", "value", "Points and integral are taken from the wrong columns of the state: the integral is the last one, as it was put there.", at_end=lambda s: s[:, 1:], integral=lambda s: s[:, 0]),
        wrong("one_trace", "reduction", "value", "The traces of the batch are added up; every row has its own.", trace=lambda g, x, start: cnf_trace(g, x).sum().expand(len(x))),
        wrong("trace_log", "extra term", "value", "The logarithm of the trace is integrated; the trace itself is a rate of log-density already.", trace=lambda g, x, start: cnf_trace(g, x).abs().log()),
        wrong("log_det", "wrong function", "value", "log|det df/dx| is integrated; in continuous time its place is taken by the trace.", trace=lambda g, x, start: torch.linalg.slogdet(each_jacobian(g, x))[1]),
        wrong("trace_cut", "detached", "gradient", "The trace is cut off from the computation graph (is create_graph missing?), so training would not feel the integral.", trace=lambda g, x, start: cnf_trace(g, x).detach()),
        wrong("x_cut", "detached", "gradient", "For the trace the points are cut off from their path (detach), so training would not feel how f moves them.", trace=lambda g, x, start: cnf_trace(g, x.detach())),
        wrong("path_cut", "detached", "gradient", "The latent points are cut off from the computation graph, so training would feel the integral alone.", value=lambda base, z, x: base.log_prob(z.detach())),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", end=lambda p: p.detach()),
        wrong("not_recorded", "missing function", "gradient", UNRECORDED, trace=lambda g, x, start: trace_looped(recording=lambda trace: trace)(g, x)),
        wrong("two_dimensions", "constant", "value", "The number of dimensions is fixed at two; x is (B, D), and the integral stands in the last column, whatever D is.",
              points=lambda s: s[:, :2], at_end=lambda s: s[:, :2], integral=lambda s: s[:, 2]),
        wrong("arguments", "exchanged", "value", "f is called with x first and the time second; it is f(t, x).", field=lambda f, t, x: f(x, t)),
        wrong("place_rows", "wrong axis", "value", "Within the rates the last row of the state is cut off; it is the last column that holds the integral.", points=lambda s: s[:-1]),
        wrong("end_rows", "wrong axis", "value", "At the end the last row of the state is cut off; it is the last column that holds the integral.", at_end=lambda s: s[:-1]),
        wrong("integral_row", "wrong axis", "value", "The last row of the state is taken for the integral; it stands in the last column.", integral=lambda s: s[-1]),
        wrong("begin_row", "wrong axis", "value", "The zeros that the integral starts from are a row; they are a column, (B, 1).", begin=lambda x: torch.zeros_like(x[:1])),
        wrong("trace_row", "wrong axis", "value", "The trace joins the rates as a row, (1, B); it is a column, (B, 1).", column=lambda trace: trace[None, :]),
        wrong("trace_flat", "shape", "value", "The trace, (B,), cannot be joined to the rates (B, D) as it is: it takes a column, (B, 1).", column=lambda trace: trace),
        wrong("state_at_end", "exchanged", "value", "The base is asked at the whole state; its points are without the last column, the integral.", at_end=lambda s: s),
        mistakes(lambda: cnf_in_place)("in_place", "in place", "input", "The caller's tensor x is overwritten; work on a tensor of your own."),
        mistakes(lambda: cnf_moved)("latents", "missing function", "value", "The latent points are returned, (B, D); their density is asked for, (B,)."),
    ),
    compare=CNF_COMPARED, features=cnf_features, light=cnf_light,
    picture=pictures.densities("picture.log_prob", CNF_BOX, CNF_CELLS, CNF_BOX),
)


# --- probability_flow ------------------------------------------------------------------------------------------------

FLOW_NEAR = 5e-3    # in nats: the probe's solver is off by less than a tenth of it


def diffusion_inputs(rng):
    sign = rng.choice([-1.0, 1.0])
    means = np.array([[1.2, 0.6], [-1.0, 0.9], [0.2, -1.3]]) * sign + 0.2 * rng.standard_normal((3, 2))
    mixture = {"means": means, "stds": rng.uniform(0.5, 0.8, 3), "weights": rng.dirichlet(10 * np.ones(3))}
    inputs = {f"mixture.{k}": v for k, v in mixture.items()} | {"x": rng.standard_normal((B, 3)), "mix": rng.standard_normal((3, 3)), "shift": 1 + rng.random(3)}
    starts = means[np.arange(B) % 3] + 0.5 * rng.standard_normal((B, 2))
    return inputs | {"starts": starts, "grid": np.linspace(-3, 3, 25)}


def diffused_log_prob(inputs, t, x):
    """log p_t(x) of the mixture, diffused until t, in closed form."""
    keep = math.exp(-0.1 * t - 9.95 * t**2)
    spread = keep * inputs["mixture.stds"] ** 2 + 1 - keep
    square = ((x[:, None] - math.sqrt(keep) * inputs["mixture.means"]) ** 2).sum(-1)
    return np.log((inputs["mixture.weights"] * np.exp(-0.5 * square / spread) / (2 * math.pi * spread)).sum(1))


def diffusion_values(inputs, outputs, reference):
    x = inputs["x"]
    for name, t in DIFFUSION_TIMES.items():
        score = np.sin(x @ inputs["mix"].T + 2 * t) - inputs["shift"] * t
        laws.expect("the field", x, outputs[f"{name}.field"], -0.5 * (0.1 + 19.9 * t) * (x + score), 1e-6, why=f" at {name}, for a score that is any function of t and x")


def diffusion_shapes(inputs, outputs, reference):
    for name in DIFFUSION_TIMES:
        shape_is(outputs, f"{name}.field", inputs["x"].shape, "(B, D)")
        left_alone(inputs, outputs, f"{name}.x after", "x")
    shape_is(outputs, "one row.field", (1, 2), "(B, D)")


def diffusion_densities(inputs, outputs, reference):
    """log p_0(x) = log p_1(x(1)) + the integral of the trace: what a continuous flow with this field makes of the diffusion's end."""
    state, x = outputs["from data to latents.state"], inputs["starts"]
    if state.shape != (len(x), 3):
        raise Fail(f"The field cannot be followed from t = 0 to t = 1: the points have the shape {state.shape} with their integrals.")
    with np.errstate(divide="ignore", over="ignore"):
        got = diffused_log_prob(inputs, 1.0, state[:, :-1]) + state[:, -1]
    want = diffused_log_prob(inputs, 0.0, x)
    if not np.isfinite(got).all():
        raise Fail("Followed from t = 0 to t = 1, the field carries points far away from where the diffusion has any density.")
    laws.expect("log p(x)", x, got, want, FLOW_NEAR, why=": followed from the mixture at t = 0 to the diffusion's end at t = 1, the field does not carry the one density into the other")


def diffusion_by(beta=lambda t: 0.1 + 19.9 * t, ask=lambda score, t, x: score(t, x), join=lambda b, x, s: -0.5 * b * (x + s), end=lambda field: field):
    def probability_flow(score, t, x):
        return end(join(beta(t), x, ask(score, t, x)))

    return probability_flow


def diffusion_reference(score, t, x):
    """flowkit's field behind the exercise's signature."""
    from flowkit.continuous import ProbabilityFlow

    return ProbabilityFlow(score)(t, x)


def diffusion_in_place(score, t, x):
    x += score(t, x)
    x *= -0.5 * (0.1 + 19.9 * t)
    return x


def diffusion_picture(inputs, outputs, reference):
    """On the line, the paths from a mixture of two at t = 0 to the normal at t = 1: yours and the reference's."""
    figure = plotting.Picture(figsize=(11, 3.8), layout="constrained")
    for ax, title, arrays, colour in zip(figure.subplots(1, 2, sharey=True), ("yours", "reference"), (outputs.arrays, reference.arrays), ("blue", "black")):
        paths = arrays.get("picture.paths")
        ax.set_title(title, fontsize=plotting.FONT), ax.set_xlabel("t", fontsize=plotting.FONT), ax.set_ylim(-4, 4)
        if paths is None or paths.ndim != 2:
            pictures.empty(ax, "not solved yet" if pictures.unsolved(outputs) else "nothing to draw")
            continue
        ax.plot(np.linspace(0, 1, len(paths)) ** 2, np.where(np.abs(paths) < 100, paths, np.nan), color=plotting.PALETTE[colour], linewidth=1)
    figure.axes[0].set_ylabel("x", fontsize=plotting.FONT)
    return figure


def diffusion_light(inputs):
    """For slips: the values alone, no path."""
    return {k: v for k, v in inputs.items() if k not in ("starts", "one row.field", "from data to latents.state")}


DIFFUSION_COMPARED = (*(f"{name}.{k}" for name in DIFFUSION_TIMES for k in ("field", "x after")), "one row.field", "from data to latents.state")

wrong = mistakes(diffusion_by)
PROBABILITY_FLOW = Exercise(
    id="probability_flow", title="A diffusion as a flow", minutes=5, difficulty=1,
    hints=(
        "The noise of the diffusion spreads a density as a field along -(beta / 2) score would carry it. So the field is the pull to the origin, -(beta / 2) x, and this.",
        "beta grows on a line from 0.1 at t = 0 to 20 at t = 1. Both parts of the field have the same factor, -beta / 2: bracket x and the score.",
    ),
    inputs=diffusion_inputs, reference=lambda: (diffusion_reference,),
    cases=(
        Case("a field of x's shape, x left as it was", 1, diffusion_shapes),
        Case("-beta / 2 (x + score), at any time", 1.5, diffusion_values),
        Case("it carries a mixture to the end of its diffusion", 1.5, diffusion_densities),
    ),
    misconceptions=(
        wrong("no_half", "missing term", "value", "The factor 1/2 is missing.", join=lambda b, x, s: -b * (x + s)),
        wrong("times_two", "wrong function", "value", "beta is doubled where it should be halved.", join=lambda b, x, s: -b * 2 * (x + s)),
        wrong("sign", "sign", "value", "The sign is wrong: this field runs from the latents at t = 1 back to the data.", join=lambda b, x, s: 0.5 * b * (x + s)),
        wrong("score_minus", "sign", "value", "The score has the wrong sign: noise spreads a density from where there is much to where there is little, against the score.", join=lambda b, x, s: -0.5 * b * (x - s)),
        wrong("x_minus", "sign", "value", "x has the wrong sign: the diffusion pulls to the origin.", join=lambda b, x, s: 0.5 * b * (x - s)),
        wrong("reverse_sde", "missing term", "value", "The score counts twice. That is the drift of the reversed diffusion, which adds noise again; without noise it is half as much.", join=lambda b, x, s: -0.5 * b * x - b * s),
        wrong("x_twice", "missing term", "value", "The factor 1/2 is missing at x, though the score has it.", join=lambda b, x, s: -b * x - 0.5 * b * s),
        wrong("no_score", "missing term", "value", "The score is missing: this is the drift of the diffusion, which without its noise pulls everything to the origin.", join=lambda b, x, s: -0.5 * b * x),
        wrong("no_x", "missing term", "value", "The pull to the origin, -beta / 2 x, is missing.", join=lambda b, x, s: -0.5 * b * s),
        wrong("brackets", "missing term", "value", "The factor -beta / 2 belongs to x and to the score; the brackets are missing.", join=lambda b, x, s: -0.5 * b * x + s),
        wrong("score_not_scaled", "missing term", "value", "The score is subtracted without the factor beta / 2.", join=lambda b, x, s: -0.5 * b * x - s),
        wrong("score_no_beta", "missing term", "value", "The score lacks the factor beta.", join=lambda b, x, s: -0.5 * b * x - 0.5 * s),
        wrong("no_beta", "missing term", "value", "beta is missing: the diffusion does not run at the same speed at all times.", join=lambda b, x, s: -0.5 * (x + s)),
        wrong("divided", "sign", "value", "The field is divided by beta; it is multiplied by it.", join=lambda b, x, s: -0.5 * (x + s) / b),
        wrong("product", "wrong function", "value", "x is multiplied by the score; they are added.", join=lambda b, x, s: -0.5 * b * x * s),
        wrong("beta_squared", "extra term", "value", "beta is squared: the square of the noise's factor sqrt(beta) is beta already.", beta=lambda t: (0.1 + 19.9 * t) ** 2),
        wrong("beta_root", "extra term", "value", "The square root of beta is used, the factor of the noise; the field has beta itself.", beta=lambda t: (0.1 + 19.9 * t) ** 0.5),
        wrong("beta_twenty", "missing term", "value", "beta is 0.1 + 20 t; at t = 1 it should be 20, so its slope is 19.9.", beta=lambda t: 0.1 + 20 * t),
        wrong("beta_still_small", "missing term", "value", "beta is 0.1 at all times; it grows on a line to 20 at t = 1.", beta=lambda t: 0.1),
        wrong("beta_still_large", "missing term", "value", "beta does not change with t; it is 0.1 + 19.9 t.", beta=lambda t: 0.1 + 19.9),
        wrong("beta_from_zero", "missing term", "value", "beta starts at 0; it is 0.1 at t = 0.", beta=lambda t: 19.9 * t),
        wrong("beta_turned", "exchanged", "value", "beta runs backwards, from 20 to 0.1; data are at t = 0, where there is little noise.", beta=lambda t: 20 - 19.9 * t),
        wrong("beta_exchanged", "exchanged", "value", "The two numbers of beta have changed places: it is 0.1 at t = 0, and grows by 19.9.", beta=lambda t: 19.9 + 0.1 * t),
        wrong("beta_minus", "sign", "value", "beta falls with t; it grows.", beta=lambda t: 0.1 - 19.9 * t),
        wrong("beta_integral", "extra term", "value", "beta is integrated over time; the field takes its value at t.", beta=lambda t: 0.1 * t + 9.95 * t**2),
        wrong("score_turned", "direction", "value", "The score is asked at the time 1 - t; it is needed at t.", ask=lambda score, t, x: score(1 - t, x)),
        wrong("score_at_data", "constant", "value", "The score is asked at t = 0; it is the score of the density at t.", ask=lambda score, t, x: score(0 * t, x)),
        wrong("score_arguments", "exchanged", "value", "The score is called with x first and the time second; it is score(t, x).", ask=lambda score, t, x: score(x, t)),
        wrong("score_minus_x", "sign", "value", "The score is asked at -x.", ask=lambda score, t, x: score(t, -x)),
        wrong("score_cut", "detached", "gradient", "The score is cut off from the computation graph, so the trace of the field misses its derivative.", ask=lambda score, t, x: score(t, x).detach()),
        wrong("detached", "detached", "gradient", "The field is cut off from the computation graph (detach, no_grad or numpy), so it has no trace.", end=lambda field: field.detach()),
        wrong("added_up", "reduction", "value", "The field is summed over the dimensions; it has a direction, (B, D).", end=lambda field: field.sum(-1)),
        wrong("with_noise", "extra term", "value", "Noise is added. The paths of this field are smooth: only the densities are the diffusion's.", end=lambda field: field + torch.randn_like(field)),
        mistakes(lambda: diffusion_in_place)("in_place", "in place", "input", "The caller's tensor x is overwritten; a new tensor is asked for."),
    ),
    compare=DIFFUSION_COMPARED, light=diffusion_light, picture=diffusion_picture,
)


# =====================================================================================================================
# The second sitting: lip_swish, spectral_normalize, residual_inverse, power_series_logdet, roulette_sum,
# russian_roulette_logdet, neumann_gradient
# =====================================================================================================================

DETACHED = "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it."


def same_shape(key, given, name):
    """A case's first question: a result has the shape of the input `given`, which is as it was."""

    def judge(inputs, outputs, reference):
        got, want = outputs[key].shape, inputs[given].shape
        if got != want:
            raise Fail(f"The result has shape {got} for `{name}` of shape {want}; it should have the same.")

    return judge


def raised_alike(keys, outputs):
    """What a diagnosis compares; where shapes did not fit only that they did not: torch's words are those of one way to write the program."""
    return {k: np.asarray("shapes do not fit") if v.dtype.kind == "U" and re.match(r"raised.*RuntimeError.*(shapes?|size)\b", str(v)) else v
            for k, v in compared(keys, outputs).items()}


# --- lip_swish -------------------------------------------------------------------------------------------------------

LIP_FAR = (-800.0, -60.0, 60.0, 800.0)  # exp of the last, and of minus the first, is infinite in float32
LIP_STEP = 0.02


def lip_inputs(rng):
    return {"z": 2 * rng.standard_normal(B), "table": rng.standard_normal((3, 2, 4)), "beta": np.array(rng.uniform(0.4, 2.5)),
            "betas": np.array([0.3, 1.0, rng.uniform(2, 4)]), "line": LIP_STEP * np.arange(-1000, 1001), "far": np.array(LIP_FAR),
            "picture": np.linspace(-6, 6, 121)}


def lip_truth(z, beta):
    return z / (1 + np.exp(-beta * z)) / 1.1


def lip_slope(z, beta):
    s = 1 / (1 + np.exp(-beta * z))
    return s * (1 + beta * z * (1 - s)) / 1.1


def lip_value(inputs, outputs, reference):
    for key, given in (("lip_swish.value", "z"), ("a table of numbers.value", "table")):
        same_shape(key, given, "z")(inputs, outputs, reference)
        got, z = outputs[key], inputs[given]
        laws.expect("LipSwish(z)", z.reshape(-1), got.reshape(-1), lip_truth(z, inputs["beta"]).reshape(-1), why=f" for beta = {inputs['beta']:.3g}")
    left_alone(inputs, outputs, "lip_swish.z after", "z"), left_alone(inputs, outputs, "a table of numbers.z after", "table")


def lip_curves(inputs, outputs):
    """For each beta: the points of the line, and slope and curvature by differences of the student's own values."""
    for i, beta in enumerate(inputs["betas"]):
        z, y = inputs["line"], outputs[f"beta {i}.value"].astype(float)
        if y.shape != z.shape:
            raise Fail(f"The result has shape {y.shape} for `z` of shape {z.shape}; it should have the same.")
        # Midpoints: the mean slope between two points is a slope of the function, so a bound on slopes bounds it too.
        slopes = np.diff(y) / LIP_STEP
        yield beta, (z[1:] + z[:-1]) / 2, slopes


def lip_steep(inputs, outputs, reference):
    for beta, z, slopes in lip_curves(inputs, outputs):
        top = np.abs(slopes).argmax()
        if np.abs(slopes[top]) > 1 + 1e-3:
            raise Fail(f"The slope is above 1, so the activation is no building block of a contraction: {slopes[top]:.4g} for beta = {beta:.3g}.",
                       f"z = {z[top]:.3g}")
        if slopes.max() < 0.99:
            raise Fail(f"The slope never comes near 1, so each layer shrinks more than it must: at most {slopes.max():.4g} for beta = {beta:.3g}.")


def lip_bent(inputs, outputs, reference):
    for beta, z, slopes in lip_curves(inputs, outputs):
        steep = (slopes[1:] > 0.95) & (slopes[1:] <= 1 + 1e-3)
        flat = steep & (np.abs(np.diff(slopes)) / LIP_STEP < 1e-4 * beta)
        if not steep.any():
            raise Fail(f"The slope is nowhere between 0.95 and 1 for beta = {beta:.3g}, so there is nothing to look at.")
        if flat.sum() > 0.05 * steep.sum():
            raise Fail("Where the slope is near 1 the function is straight: its second derivative is zero, and with it the gradient of the Jacobian.",
                       f"z = {z[1:][flat][0]:.3g}, beta = {beta:.3g}")


def lip_trained(inputs, outputs, reference):
    z, beta = inputs["z"], float(inputs["beta"])
    s = 1 / (1 + np.exp(-beta * z))
    for key, want, name in (("gradient.z", lip_slope(z, beta), "z"), ("gradient of beta.beta", np.array((z**2 * s * (1 - s)).sum() / 1.1), "beta")):
        got = outputs[key].astype(float)
        if not got.any():
            raise Fail(f"No gradient reaches `{name}`.")
        if got.shape != want.shape or not laws.close(got, want, 1e-4).all():
            raise Fail(f"The gradient with respect to `{name}` is not that of z sigmoid(beta z) / 1.1.")


def lip_far(inputs, outputs, reference):
    """In float32: the values and slopes at +-800, to the last bits; of the sum of their rounding errors nothing is near 1e-4."""
    z, beta = inputs["far"], float(inputs["beta"])
    for key, what in (("far out in float32.value", "value"), ("slope far out in float32.slope", "slope")):
        got = outputs.arrays.get(key)
        if got is not None and not np.isfinite(got).all():
            bad = z[~np.isfinite(got)][0] if got.shape == z.shape else z[-1]
            raise Fail(f"In float32 the {what} is NaN or infinite far out: an exponential overflows.", f"z = {bad:g}")
    with np.errstate(over="ignore"):
        for key, want in (("far out in float32.value", lip_truth(z, beta)), ("slope far out in float32.slope", lip_slope(z, beta))):
            laws.expect("the result far out", z, outputs[key], want, 1e-4, why=" in float32")


def lip_by(gate=lambda z, beta: torch.sigmoid(beta * z), apply=lambda z, s, beta: z * s, scale=lambda y: y / 1.1,
           taken=lambda z, beta: (z, beta), end=lambda y: y):
    """`lip_swish` in its plainest form, in which a mistake changes one part."""

    def lip_swish(z, beta):
        z, beta = taken(z, beta)
        return end(scale(apply(z, gate(z, beta), beta)))

    return lip_swish


def lip_in_place(z, beta):
    s = torch.sigmoid(beta * z)
    return z.mul_(s).div_(1.1)


wrong = mistakes(lip_by)
LIP_SWISH = Exercise(
    id="lip_swish", title="An activation that can be steep and bent", minutes=5, difficulty=1,
    hints=(
        "Swish is z times a gate between 0 and 1; the gate is a sigmoid whose steepness is beta. Differentiate it: its slope reaches 1.0998 for every beta, so what must it be divided by?",
        "Three factors: z itself, `torch.sigmoid` of beta times z, and 1 / 1.1 outside of the sigmoid. All of it is elementwise, so it works for z of any shape.",
    ),
    inputs=lip_inputs, reference=flowkit_class("residual", "lip_swish"),
    cases=(
        Case("z sigmoid(beta z) / 1.1, elementwise, z left as it was", 1, lip_value),
        Case("the slope comes near 1 and is never above, for any beta", 0.5, lip_steep),
        Case("where it is steep it is bent", 0.5, lip_bent),
        Case("gradients reach z and beta", 0.5, lip_trained),
        Case("finite far out in float32", 0.5, lip_far),
    ),
    misconceptions=(
        wrong("no_scale", "missing term", "value", "The division by 1.1 is missing: this is Swish, whose slope reaches 1.0998.", scale=lambda y: y),
        wrong("scale_turned", "sign", "value", "The result is multiplied by 1.1 instead of divided: the slope reaches 1.21.", scale=lambda y: y * 1.1),
        wrong("scale_subtracted", "wrong function", "value", "1.1 is subtracted; only a division makes the slope smaller.", scale=lambda y: y - 1.1),
        wrong("scale_constant", "constant", "value", "The result is divided by 0.011, or by another constant far from 1.1: the slope is about 100 times too large.", scale=lambda y: y / 0.011),
        wrong("scale_inside", "order", "value", "1.1 stands inside the sigmoid: that changes the place where the function is steep, not how steep it gets.", gate=lambda z, beta: torch.sigmoid(beta * z / 1.1), scale=lambda y: y),
        wrong("no_beta", "missing term", "value", "beta is not used: the sigmoid is that of z itself.", gate=lambda z, beta: torch.sigmoid(z)),
        wrong("beta_outside", "order", "value", "beta multiplies outside of the sigmoid: it then scales the slope, which is no longer bounded by 1.", gate=lambda z, beta: beta * torch.sigmoid(z)),
        wrong("beta_twice", "extra term", "value", "beta multiplies z inside the sigmoid and outside of it too, which scales the slope by beta.", apply=lambda z, s, beta: beta * z * s),
        wrong("beta_divides", "sign", "value", "z is divided by beta in the sigmoid; it is multiplied.", gate=lambda z, beta: torch.sigmoid(z / beta)),
        wrong("beta_added", "wrong function", "value", "beta is added to z in the sigmoid; it is multiplied by it.", gate=lambda z, beta: torch.sigmoid(z + beta)),
        wrong("z_dropped_inside", "missing term", "value", "The sigmoid is that of beta alone: the gate does not depend on z, and the function is a straight line.", gate=lambda z, beta: torch.sigmoid(beta)),
        wrong("beta_softplus", "extra term", "value", "softplus is applied to beta, which is positive already: that belongs to the layer that holds the parameter.", gate=lambda z, beta: torch.sigmoid(F.softplus(beta) * z)),
        wrong("beta_exp", "extra term", "value", "exp is applied to beta, which is positive already.", gate=lambda z, beta: torch.sigmoid(beta.exp() * z)),
        wrong("gate_turned", "sign", "value", "The sigmoid's argument has the wrong sign: the gate closes for positive z.", gate=lambda z, beta: torch.sigmoid(-beta * z)),
        wrong("no_z", "missing term", "value", "z does not multiply the sigmoid: this is the gate alone, a sigmoid that saturates on both sides.", apply=lambda z, s, beta: s),
        wrong("z_added", "wrong function", "value", "z and the sigmoid are added; they are multiplied.", apply=lambda z, s, beta: z + s),
        wrong("z_divided", "sign", "value", "z is divided by the sigmoid; it is multiplied by it.", apply=lambda z, s, beta: z / s),
        wrong("no_sigmoid", "missing function", "value", "The sigmoid is missing: z is multiplied by beta z.", gate=lambda z, beta: beta * z),
        wrong("tanh", "wrong function", "value", "The gate is a tanh, which is negative for negative z; the gate of Swish is a sigmoid.", gate=lambda z, beta: torch.tanh(beta * z)),
        wrong("logsigmoid", "wrong function", "value", "The gate is the logarithm of the sigmoid.", gate=lambda z, beta: F.logsigmoid(beta * z)),
        wrong("relu", "wrong function", "value", "This is a ReLU, without curvature on either side; LipSwish is z times a sigmoid.", apply=lambda z, s, beta: F.relu(z)),
        wrong("elu", "wrong function", "value", "This is an ELU, which is straight where its slope is 1; LipSwish is z times a sigmoid.", apply=lambda z, s, beta: F.elu(z), scale=lambda y: y),
        wrong("softplus", "wrong function", "value", "This is a softplus, which is straight where its slope is near 1; LipSwish is z times a sigmoid.", apply=lambda z, s, beta: F.softplus(beta * z) / beta, scale=lambda y: y),
        wrong("arguments_exchanged", "exchanged", "value", "z and beta have changed places in front of the sigmoid: z is what the gate multiplies.", apply=lambda z, s, beta: beta * s),
        wrong("derivative", "wrong function", "value", "This is the derivative of the activation, not the activation.", apply=lambda z, s, beta: s * (1 + beta * z * (1 - s))),
        wrong("summed", "reduction", "value", "The result is summed; an activation acts on each number by itself.", end=lambda y: y.sum()),
        wrong("summed_last", "reduction", "value", "The result is summed over the last dimension; an activation acts on each number by itself.", end=lambda y: y.sum(-1)),
        wrong("softmax", "wrong function", "value", "The gate is a softmax, which mixes the entries; an activation acts on each number by itself.", gate=lambda z, beta: torch.softmax(beta * z, -1)),
        wrong("beta_detached", "detached", "gradient", "beta is cut off from the computation graph, so it could not be learnt.", taken=lambda z, beta: (z, beta.detach() if isinstance(beta, torch.Tensor) else beta)),
        wrong("detached", "detached", "gradient", DETACHED, end=lambda y: y.detach()),
        mistakes(lambda: lip_in_place)("in_place", "in place", "input", "z is overwritten in place: the caller's tensor holds the result."),
        wrong("overflow", "order", "value", "The sigmoid is put together from exp(beta z): for large z that is infinite, and infinity by infinity is NaN.", gate=lambda z, beta: (beta * z).exp() / (1 + (beta * z).exp())),
        wrong("overflow_slope", "order", "gradient", "The sigmoid is put together from exp(-beta z): for very negative z that is infinite, and the gradient NaN; `torch.sigmoid` knows better.", gate=lambda z, beta: 1 / (1 + (-beta * z).exp())),
    ),
    compare=("lip_swish.value", "lip_swish.profile", "a table of numbers.value", "gradient.z", "gradient of beta.beta", "lip_swish.z after",
             "far out in float32.value", "slope far out in float32.slope"),
    picture=pictures.against_reference(("picture.value", "picture of the slope.slope"), "picture", ("LipSwish, beta = 1", "its slope"), (-6, 6), axis="z"),
)


# --- spectral_normalize ----------------------------------------------------------------------------------------------

SPECTRAL_STEPS = 40  # with a second singular value of 0.6 times the first: what is left of a start is below 1e-17 of it
SPECTRAL_STARTS = {"square": (4, 4), "wide": (3, 6), "tall": (6, 3), "small": (4, 3), "just below": (3, 3), "c is 1": (4, 4), "between c and 1": (4, 3),
                   "blind": (5, 4)}


def with_singular_values(rng, shape, values, first=lambda rng, n: rng.standard_normal(n)):
    """A matrix of random directions with these singular values; the first ones are along `first`, on either side."""
    left, right = (np.linalg.qr(np.column_stack([first(rng, n), rng.standard_normal((n, n - 1))]))[0][:, :len(values)] for n in shape)
    return left * values @ right.T


def orthogonal_to_ones(rng, n):
    """A direction orthogonal to (1, ..., 1) and to (1, 0, ..., 0)."""
    rest = rng.standard_normal(n - 1)
    return np.append(0, rest - rest.mean())


def nearly_symmetric(rng, values, turn):
    """The same with left directions turned a little against the right ones, so that the matrix has powers of some size."""
    n = len(values)
    right, skew = np.linalg.qr(rng.standard_normal((n, n)))[0], turn * rng.standard_normal((n, n))
    return right @ np.linalg.solve(np.eye(n) + skew - skew.T, np.eye(n) - skew + skew.T) * values @ right.T


def spectral_inputs(rng):
    inputs = {"steps": np.array(SPECTRAL_STEPS), "direction": rng.standard_normal(SPECTRAL_STARTS["wide"])}
    for name, shape in SPECTRAL_STARTS.items():
        # "square" and "tall" stretch everything by more than c, the others only some directions.
        values = np.concatenate([[1.0], np.sort(rng.uniform(0.4 if name in ("square", "tall", "c is 1") else 0.1, 0.6, min(shape) - 1))[::-1]])
        c = {"c is 1": 1.0, "tall": rng.uniform(1.2, 1.8), "between c and 1": rng.uniform(0.5, 0.8)}.get(name, rng.uniform(0.5, 0.95))  # also a bound above 1
        top = {"small": 0.3 * c, "just below": 0.98 * c, "between c and 1": c**0.5}.get(name, c * rng.uniform(3, 5))
        if name == "blind":  # rounding gives such a start 1e-16 of the first direction, which 40 rounds make (1 / 0.8)^80 = 6e7 times as large
            matrix = with_singular_values(rng, shape, top * np.array([1, 0.8, 0.4, 0.3]), orthogonal_to_ones)
        else:
            matrix = nearly_symmetric(rng, top * values, 0.06) if shape == (4, 4) else with_singular_values(rng, shape, top * values)
        inputs |= {f"{name}.W": matrix, f"{name}.c": np.array(c)}
    # So many singular values near the first that one iteration finds a lower norm from any start.
    # And one so large that a vector which is never made a unit vector overflows in float32, 10^80 after 40 rounds.
    return inputs | {"slow.W": with_singular_values(rng, (30, 30), 2 * np.linspace(1, 0.5, 30)), "slow.c": np.array(0.9),
                     "large.W": with_singular_values(rng, (5, 3), np.array([10, 5, 2])), "large.c": np.array(0.9)}


def norm_of(matrix):
    return float(np.linalg.svd(matrix.astype(float), compute_uv=False)[0])


def spectral_shape(inputs, outputs, reference):
    for name in SPECTRAL:
        same_shape(f"{name}.weight", f"{name}.W", "weight")(inputs, outputs, reference)
        left_alone(inputs, outputs, f"{name}.W after", f"{name}.W")
    W = inputs["large.W"]
    for name, default in (("float32", "float64"), ("float64", "float32")):
        key = f"a {name} weight.weight"
        if key not in outputs:
            raise Fail(f"A {name} weight fails where torch's default dtype is {default}: the start vector needs the weight's dtype.", Outputs(outputs.arrays).complaint(key.rsplit(".", 1)[0])[1])
        got = outputs.arrays[key]
        if not np.isfinite(got).all():
            raise Fail(f"For a {name} weight of norm {norm_of(W):.3g} the result holds NaN: in {SPECTRAL_STEPS} rounds a vector that is not normalised in each overflows.")
        if outputs[f"a {name} weight.dtype"] != f"torch.{name}":
            raise Fail(f"For a {name} weight the result is {outputs[f'a {name} weight.dtype']}; it has the weight's dtype.")


def divided_by(W, c, got):
    """What was taken for s instead of |W v|, in words; None if it is neither of these. Both depend on the start, so no misconception has their numbers."""
    u, s, _ = np.linalg.svd(W)
    taken = c * s[0] / max(norm_of(got), 1e-300)
    signs = 1 - 2 * np.array(list(np.ndindex((2,) * W.shape[1])))
    if np.isclose(taken, s[0], rtol=1e-6):
        return None
    if np.isclose(taken, np.linalg.norm(signs @ W.T, axis=1), rtol=1e-6).any():
        return "v has entries 1 and -1: `F.normalize` takes dim 1, so of a column, (in, 1), it makes each entry a unit vector; it needs dim=0."
    if np.isclose(taken, abs(s[0] * u[:, 0].sum()), rtol=1e-6):
        return "The entries of W v are added up, which gives another number, of either sign; s is its length, |W v|."
    return None


def spectral_bound(inputs, outputs, reference):
    names = ("square", "wide", "tall", "c is 1", "between c and 1", "blind")
    for name in names:
        W, got = inputs[f"{name}.W"], outputs.arrays.get(f"{name}.weight", np.zeros(()))
        if got.shape == W.shape and np.isfinite(got).all() and (found := divided_by(W, float(inputs[f"{name}.c"]), got)):
            raise Fail(found)
    for name in names:
        same_shape(f"{name}.weight", f"{name}.W", "weight")(inputs, outputs, reference)
        W, c, got = inputs[f"{name}.W"], float(inputs[f"{name}.c"]), outputs[f"{name}.weight"]
        norm, shape = norm_of(got), f"a weight {W.shape} of norm {norm_of(W):.3g}, c = {c:.3g}"
        if norm > c * (1 + laws.tolerance(got)):
            if name == "blind" and np.isclose(norm, c / 0.8, rtol=1e-3):
                raise Fail(BLIND)
            raise Fail(f"The spectral norm of the result is {norm:.4g}, above the bound.", shape)
        if norm < c * (1 - laws.tolerance(got)):
            raise Fail(f"The spectral norm of the result is {norm:.4g}: scaled down more than needed.", shape)
        if not laws.close(got, W * c / norm_of(W), laws.tolerance(got)).all():
            raise Fail("The result is not a multiple of the weight: all entries are scaled by the same number.", shape)


def spectral_untouched(inputs, outputs, reference):
    same_shape("square.weight", "square.W", "weight")(inputs, outputs, reference)
    if laws.close(outputs["square.weight"], inputs["square.W"], 1e-9).all():
        raise Fail("No weight is scaled at all, so there is nothing here to judge yet.")
    for name in ("small", "just below"):
        W, c, got = inputs[f"{name}.W"], float(inputs[f"{name}.c"]), outputs[f"{name}.weight"]
        if got.shape != W.shape or not laws.close(got, W, laws.tolerance(got)).all():
            raise Fail("A weight whose norm is below c already is changed; it should stay as it is.", f"norm {norm_of(W):.3g}, c = {c:.3g}")


def finds_less(inputs, outputs):
    """Whether one iteration leaves the norm of the slow matrix above c, as every start does but for one in 1e10."""
    got = outputs.arrays.get("one iteration.weight", np.zeros(()))
    return got.shape == inputs["slow.W"].shape and bool(np.isfinite(got).all()) and norm_of(got) > float(inputs["slow.c"]) * 1.005


def spectral_steps(inputs, outputs, reference):
    got, W, c = outputs["one iteration.weight"], inputs["slow.W"], float(inputs["slow.c"])
    if got.shape != W.shape:
        raise Fail(f"The result has shape {got.shape} for a weight of shape {W.shape}.")
    if not finds_less(inputs, outputs):
        raise Fail("`n_iter` has no effect: a single power iteration cannot find the whole norm of a matrix with many singular values of nearly the same size.")
    if norm_of(got) > 0.999 * norm_of(W):
        raise Fail("With one iteration nothing is scaled at all, though even that sees most of the norm.", f"norm {norm_of(W):.3g}, c = {c:.3g}")


def spectral_trained(inputs, outputs, reference):
    """The gradient of sum(R * c W / s) with respect to W, where ds = u^T dW v."""
    W, c, R, got = inputs["wide.W"], float(inputs["wide.c"]), inputs["direction"], outputs["gradient.W"]
    u, s, vt = np.linalg.svd(W)
    want = c * (R / s[0] - (R * W).sum() / s[0] ** 2 * np.outer(u[:, 0], vt[0]))
    if got.shape != W.shape or not got.any():
        raise Fail("No gradient reaches the weight, so it could not be trained.")
    if not laws.close(got, want, 1e-3).all():
        raise Fail("The gradient misses the norm: when the weight changes its norm changes too, by u^T dW v.")


BLIND = ("The start vector is always the same, ones or an axis: the iteration misses a first singular vector that is orthogonal to it. "
         "A random start is orthogonal to nothing.")


def unit(v):
    return v / v.norm()


def spectral_power(w, n_iter, step=lambda w, v: w.T @ (w @ v), normal=unit, start=None):
    v = torch.linspace(1, 2, w.shape[1], dtype=w.dtype) if start is None else start(w)
    v = unit(v)
    for _ in range(n_iter):
        v = normal(step(w, v))
    return v


def spectral_by(vector=lambda w, n: spectral_power(w, n), norm=lambda w, v: (w @ v).norm(), factor=lambda s, c: (s / c).clamp(min=1),
                divide=lambda w, f: w / f, estimate_of=lambda w: w.detach(), norm_of=lambda w: w, end=lambda out, s: out):
    """`spectral_normalize` in its plainest form, in which a mistake changes one part."""

    def spectral_normalize(weight, c, n_iter):
        s = norm(norm_of(weight), vector(estimate_of(weight), n_iter))
        return end(divide(weight, factor(s, c)), s)

    return spectral_normalize


def spectral_in_place(weight, c, n_iter):
    with torch.no_grad():
        return weight.div_((weight @ spectral_power(weight, n_iter)).norm().div(c).clamp(min=1))


def spectral_picture(inputs, outputs, reference):
    """Singular values before and after, with the bound."""
    figure = plotting.Picture(figsize=(11, 3.6), layout="constrained")
    for ax, name in zip(figure.subplots(1, 3), ("square", "wide", "small")):
        before = np.linalg.svd(inputs[f"{name}.W"], compute_uv=False)
        mine, at = outputs.arrays.get(f"{name}.weight"), np.arange(len(before))
        ax.bar(at - 0.2, before, 0.4, color=plotting.PALETTE["sky"], label="the weight's")
        if mine is not None and mine.shape == inputs[f"{name}.W"].shape and np.isfinite(mine).all():
            ax.bar(at + 0.2, np.linalg.svd(mine.astype(float), compute_uv=False), 0.4, color=plotting.PALETTE["blue"], label="yours")
        else:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
        ax.axhline(float(inputs[f"{name}.c"]), color=plotting.PALETTE["red"], linestyle="--", label="c")
        ax.set_title({"small": "below c already"}.get(name, f"{name}, {inputs[f'{name}.W'].shape}"), fontsize=plotting.FONT)
        ax.set_xticks([]), ax.set_xlabel("singular values", fontsize=plotting.FONT)
        ax.set_ylim(0, 1.6 * max(before[0], float(inputs[f"{name}.c"]))), ax.legend(fontsize=plotting.FONT - 4, frameon=False, loc="upper right")
    return figure


SPECTRAL_COMPARED = (*(f"{name}.weight" for name in SPECTRAL), "gradient.W", *(f"{name}.W after" for name in SPECTRAL))
wrong = mistakes(spectral_by)
SPECTRAL_NORMALIZE = Exercise(
    id="spectral_normalize", title="Spectral normalisation by power iteration", minutes=15, difficulty=3,
    hints=(
        "The spectral norm is the largest |W v| over unit vectors v. Repeating v <- W^T W v, made a unit vector each time, turns any start towards the v that reaches it; then s = |W v|.",
        "Divide by max(1, s / c), so that a small weight stays as it is. Find v without gradients, from `weight.detach()`; but compute s = |weight v| from the weight itself, so that the gradient sees the norm.",
    ),
    inputs=spectral_inputs, reference=flowkit_class("residual", "spectral_normalize"),
    cases=(
        Case("a matrix of the same shape; the weight is left as it was", 1, spectral_shape),
        Case("the norm comes down to c: square, wide and tall", 3, spectral_bound),
        Case("untouched where the norm is below c", 1, spectral_untouched),
        Case("n_iter iterations: one finds less than many", 1, spectral_steps),
        Case("the gradient sees the norm", 1, spectral_trained),
    ),
    misconceptions=(
        wrong("always_scaled", "missing function", "value", "A weight whose norm is below c is scaled up to it: `max(1, ...)` is missing.", factor=lambda s, c: s / c),
        wrong("never_scaled", "exchanged", "value", "`min` stands where `max` belongs: large weights stay as they are, and small ones grow.", factor=lambda s, c: (s / c).clamp(max=1)),
        wrong("no_c", "missing term", "value", "c is not used: the norm comes down to 1.", factor=lambda s, c: s.clamp(min=1)),
        wrong("compared_with_one", "wrong function", "value", "s is compared with 1 instead of with c: a norm between c and 1 stays above c.", factor=lambda s, c: s / c if s > 1 else torch.ones_like(s)),
        wrong("blind_start", "constant", "value", BLIND, vector=lambda w, n: spectral_power(w, n, start=lambda w: torch.ones(w.shape[1], dtype=w.dtype))),
        wrong("c_after", "order", "value", "The weight is divided by max(1, s) and then multiplied by c: a weight that is small enough already is shrunk.", factor=lambda s, c: s.clamp(min=1) / c),
        wrong("clamped_at_c", "order", "value", "The weight is divided by max(c, s): the norm comes down to 1, not to c.", factor=lambda s, c: s.clamp(min=c)),
        wrong("times_c", "sign", "value", "s is multiplied by c; the factor is max(1, s / c).", factor=lambda s, c: (s * c).clamp(min=1)),
        wrong("c_over_s", "exchanged", "value", "The weight is divided by c / s, or multiplied by s / c: it grows where it should shrink.", factor=lambda s, c: (c / s).clamp(min=1)),
        wrong("multiplied", "sign", "value", "The weight is multiplied by max(1, s / c); it should be divided by it.", divide=lambda w, f: w * f),
        wrong("squared_norm", "missing function", "value", "s is the square of the norm, v^T W^T W v: the root is missing.", norm=lambda w, v: v @ (w.T @ (w @ v))),
        wrong("frobenius", "missing term", "value", "The norm is taken of W itself, not of W v: this is the Frobenius norm, to which all singular values add, and the weight is shrunk too much.", norm=lambda w, v: w.norm()),
        wrong("nuclear", "wrong function", "value", "This is the sum of all singular values; the largest is asked for.", norm=lambda w, v: torch.linalg.matrix_norm(w, ord="nuc")),
        wrong("largest_entry", "wrong function", "value", "The size of the weight is measured by its largest entry; a sum of many small ones can stretch more.", norm=lambda w, v: w.abs().max()),
        wrong("row_sums", "wrong function", "value", "The size of the weight is measured by the sums of its rows; that bounds the largest entry of W v, not its length.", norm=lambda w, v: w.abs().sum(1).max()),
        wrong("column_sums", "wrong function", "value", "The size of the weight is measured by the sums of its columns; that is another norm.", norm=lambda w, v: w.abs().sum(0).max()),
        wrong("largest_row", "wrong function", "value", "The size of the weight is measured by its longest row; W may stretch other directions more.", norm=lambda w, v: w.norm(dim=1).max()),
        wrong("each_row", "wrong axis", "value", "Each row is scaled by its own length; all entries are divided by the same number.", norm=lambda w, v: w.norm(dim=1, keepdim=True)),
        wrong("smallest", "wrong function", "value", "This is the smallest singular value; the largest is asked for.", norm=lambda w, v: torch.linalg.svdvals(w)[-1]),
        wrong("w_only", "exchanged", "value", "The iteration applies W, once or twice, and never W^T: v lives among the inputs, so the transpose must bring W v back, v <- W^T W v.", vector=lambda w, n: spectral_power(w, n, step=lambda w, v: w @ v)),
        wrong("wt_only", "exchanged", "value", "The iteration applies W^T, once or twice, and never W: v <- W^T W v needs both.", vector=lambda w, n: spectral_power(w, n, step=lambda w, v: w.T @ v)),
        wrong("last_not_unit", "missing function", "value", "v is no unit vector when |W v| is taken: it still has the length s of W^T u, so the square of the norm comes out.", vector=lambda w, n: w.T @ unit(w @ spectral_power(w, n))),
        wrong("order_of_matrices", "order", "value", "The iteration applies W^T first and W afterwards: W W^T is for u, among the outputs, v needs W^T W.", vector=lambda w, n: spectral_power(w, n, step=lambda w, v: w @ (w.T @ v))),
        wrong("transposed_norm", "exchanged", "value", "At the end W^T is applied to v, which is a vector for W.", norm=lambda w, v: (w.T @ v).norm()),
        wrong("never_unit", "missing function", "value", "v is never made a unit vector, so |W v| grows with every iteration and says nothing of W.", vector=lambda w, n: spectral_power(w, n, normal=lambda v: v)),
        wrong("unit_squared", "wrong function", "value", "v is divided by the square of its length; a unit vector is v / |v|.", vector=lambda w, n: spectral_power(w, n, normal=lambda v: v / (v @ v))),
        wrong("not_iterated", "missing function", "value", "There is no iteration: s is |W v| of the vector that it starts from.", vector=lambda w, n: spectral_power(w, 0)),
        wrong("iterated_once", "missing function", "value", "`n_iter` has no effect: there is a single iteration.", vector=lambda w, n: spectral_power(w, 1)),
        wrong("always_many", "missing term", "value", "`n_iter` has no effect: the norm is found exactly, by a decomposition or a fixed number of iterations.", vector=lambda w, n: spectral_power(w, 400)),
        wrong("norm_detached", "detached", "gradient", "The norm is cut off from the graph, so the gradient misses how it changes with the weight; only v is a constant.", norm_of=lambda w: w.detach()),
        wrong("detached", "detached", "gradient", DETACHED, end=lambda out, s: out.detach()),
        mistakes(lambda: spectral_in_place)("in_place", "in place", "input", "The weight is overwritten in place; a new matrix is asked for."),
        wrong("only_s", "exchanged", "value", "The norm is returned; the scaled weight is asked for.", end=lambda out, s: s),
        wrong("with_s", "extra term", "value", "Two things are returned; the scaled weight alone is asked for.", end=lambda out, s: (out, s)),
        wrong("unchanged", "missing function", "value", "The weight is returned as it came: it is not divided.", divide=lambda w, f: w),
        wrong("only_factor", "missing term", "value", "The factor max(1, s / c) is returned, without the weight.", divide=lambda w, f: f),
        wrong("transposed", "exchanged", "value", "The result is transposed.", end=lambda out, s: out.T),
    ),
    features=lambda i, o: raised_alike(SPECTRAL_COMPARED, o) | {"finds less": finds_less(i, o)}, compare=SPECTRAL_COMPARED, picture=spectral_picture,
)


# --- residual_inverse ------------------------------------------------------------------------------------------------

INVERSE_MANY, INVERSE_FEW, INVERSE_COUNTS = 80, 5, (1, 2, 4, 8)
INVERSE_L, INVERSE_RATE = 0.6, 0.8  # of the branches, 0.6^80 = 2e-18; of the rotation


def branch_inputs(rng, D, lipschitz, prefix="", hidden=8):
    """Weights of autograder.probes.lesson04.Branch with Lip(g) = `lipschitz` at most, the product of the two spectral norms, and nearly reached.

    W1 W2 is `lipschitz` times a matrix of norm 1 with eigenvalues of that size, all in one half of the plane: the power series converges slowly.
    """
    wide = np.linalg.qr(rng.standard_normal((hidden, D)))[0]
    steep = rng.choice([-1, 1]) * nearly_symmetric(rng, np.append(1.0, rng.uniform(0.7, 1, D - 1)), 0.15)
    w = {"W1": 0.7 * wide.T, "b1": 0.3 * rng.standard_normal(hidden), "W2": lipschitz / 0.7 * wide @ steep, "b2": rng.standard_normal(D)}
    return {f"{prefix}g.{k}": v for k, v in w.items()}


def branch(inputs, x, prefix=""):
    W1, b1, W2, b2 = (inputs[f"{prefix}g.{k}"] for k in BRANCH)
    return np.tanh(x @ W1 + b1) @ W2 + b2


def inverse_inputs(rng):
    inputs = {"many": np.array(INVERSE_MANY), "few": np.array(INVERSE_FEW), "counts": np.array(INVERSE_COUNTS), "rotated z": 2 * rng.standard_normal((B, 2))}
    for prefix in SIZES:
        D = int(prefix[2])
        z = 1.5 * rng.standard_normal((B, D))
        inputs |= branch_inputs(rng, D, INVERSE_L, prefix) | {f"{prefix}x": z, f"{prefix}z": z}
    turn = rng.uniform(0.5, 2.5)
    return inputs | {"A": INVERSE_RATE * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])}


def inverse_shape(inputs, outputs, reference):
    for prefix in SIZES:
        same_shape(f"{prefix}inverse.x", f"{prefix}z", "z")(inputs, outputs, reference)
        left_alone(inputs, outputs, f"{prefix}inverse.z after", f"{prefix}z")
    if outputs["one row.x"].shape != (1, 2):
        raise Fail(f"For a single row the result has shape {outputs['one row.x'].shape}; it should be (1, D) = (1, 2).")


def inverse_solves(prefix):
    def judge(inputs, outputs, reference):
        z, x = inputs[prefix + "z"], outputs[prefix + "inverse.x"].astype(float)
        if x.shape != z.shape:
            raise Fail(f"The result has shape {x.shape} for `z` of shape {z.shape}; it should have the same.")
        back = x + branch(inputs, x, prefix)
        wrong = ~laws.close(back, z, laws.tolerance(outputs[prefix + "inverse.x"])).all(1)
        if wrong.any():
            i = laws.first_bad(z, wrong)
            raise Fail(f"After {INVERSE_MANY} steps x + g(x) is not z.", f"z = {laws.point(z[i])}: x + g(x) = {laws.point(back[i])}")

    return judge


def inverse_errors(inputs, outputs):
    """|x_n - x| for each row and each n of the counts, x the exact solution of x + x A = z."""
    z, A = inputs["rotated z"], inputs["A"]
    exact = np.linalg.solve((np.eye(2) + A).T, z.T).T
    for n in INVERSE_COUNTS:
        x = outputs[f"{n} steps.x"]
        if x.shape != z.shape:
            raise Fail(f"The result has shape {x.shape} for `z` of shape {z.shape}; it should have the same.")
        yield n, np.linalg.norm(x - exact, axis=1), np.maximum(np.linalg.norm(z - exact, axis=1), np.linalg.norm(exact, axis=1))


def inverse_rate(inputs, outputs, reference):
    """From x = z: a rotation that shrinks by L takes exactly a factor L off the error, at each step."""
    found = {}
    for n, error, start in inverse_errors(inputs, outputs):
        if (error > INVERSE_RATE**n * start * (1 + 1e-3) + 1e-5).any():
            raise Fail(f"After {n} step{'s' * (n > 1)} the error is {(error / start).max():.3g} of what it was at the start; with Lip(g) = {INVERSE_RATE} it should be at most {INVERSE_RATE**n:.3g}.")
        found[n] = error.mean()
    if found[4] < 1e-4:
        raise Fail("`n_iter` has no effect: after 4 steps the error is gone altogether, where a contraction only shrinks it.")
    if abs(found[8] / found[4] / INVERSE_RATE**4 - 1) > 0.02:
        raise Fail(f"From 4 steps to 8 the error shrinks by {found[8] / found[4]:.3g}; with Lip(g) = {INVERSE_RATE} a step takes off that factor, four of them {INVERSE_RATE**4:.3g}.")


def inverse_asked(inputs, outputs, reference):
    outputs["a few steps.x"]
    asked = int(outputs["a few steps.asked"])
    if asked not in (INVERSE_FEW, INVERSE_FEW + 1):
        raise Fail(f"For n_iter = {INVERSE_FEW} the function g is asked {asked} times; each step asks it once.")
    x = z = inputs["D=2 z"]
    for n in (1, 2):
        x = z - branch(inputs, x, "D=2 ")
        laws.expect("x", z, outputs[f"n_iter = {n}.x"], x, why=f" after n_iter = {n} step{'s' * (n > 1)} from x = z")


def inverse_by(start=lambda z: z, step=lambda x, z, gx: z - gx, at=lambda x, z: x, times=lambda n: n, ask=lambda g, x: g(x), end=lambda x, z, g: x):
    """`residual_inverse` in its plainest form, in which a mistake changes one part."""

    def residual_inverse(g, z, n_iter):
        x = start(z)
        for _ in range(times(n_iter)):
            x = step(x, z, ask(g, at(x, z)))
        return end(x, z, g)

    return residual_inverse


def inverse_in_place(g, z, n_iter):
    x = z
    for _ in range(n_iter):
        x -= g(x)
    return x


def inverse_picture(inputs, outputs, reference):
    """The error against the number of steps."""
    figure = plotting.Picture(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    for which, label, style in ((reference, "reference", {"color": plotting.PALETTE["black"], "linewidth": 4, "alpha": 0.4}),
                                (outputs, "yours", {"color": plotting.PALETTE["red"], "linestyle": "--", "linewidth": 2, "marker": "o"})):
        try:
            steps, errors = zip(*((n, error.mean()) for n, error, _ in inverse_errors(inputs, which if which is reference else Outputs(outputs.arrays))))
            ax.semilogy(steps, np.maximum(errors, 1e-17), label=label, **style)
        except Fail:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.set_title(f"a rotation that shrinks by {INVERSE_RATE}", fontsize=plotting.FONT), ax.set_xlabel("n_iter", fontsize=plotting.FONT)
    ax.set_ylabel("distance from the solution", fontsize=plotting.FONT - 2), ax.legend(fontsize=plotting.FONT - 2, frameon=False)
    return figure


INVERSE_COMPARED = ("D=2 inverse.x", "D=6 inverse.x", "one row.x", "a few steps.asked", "D=2 inverse.z after", "n_iter = 1.x", "n_iter = 2.x")
wrong = mistakes(inverse_by)
RESIDUAL_INVERSE = Exercise(
    id="residual_inverse", title="The inverse of a residual block", minutes=10, difficulty=2,
    hints=(
        "z = x + g(x) cannot be solved for x in closed form, but it can be written as x = z - g(x). What happens to the distance from the solution when the right-hand side is evaluated at a guess?",
        "Start at x = z and replace x by z - g(x), n_iter times. z stays the same in every step; only x changes, and not in place.",
    ),
    inputs=inverse_inputs, reference=flowkit_class("residual", "residual_inverse"),
    cases=(
        Case("x has the shape of z, and z is left as it was", 0.5, inverse_shape),
        Case("x + g(x) = z, D = 2", 1, inverse_solves("D=2 ")),
        Case("x + g(x) = z, D = 6", 1, inverse_solves("D=6 ")),
        Case("the error shrinks by Lip(g) with each step", 1, inverse_rate),
        Case("n_iter steps, one evaluation of g in each", 0.5, inverse_asked),
    ),
    misconceptions=(
        wrong("plus", "sign", "value", "Each step computes z + g(x): that solves x - g(x) = z, the inverse of another map.", step=lambda x, z, gx: z + gx),
        wrong("forward", "direction", "value", "This is z + g(z), the forward map, not its inverse.", step=lambda x, z, gx: z + gx, times=lambda n: 1),
        wrong("one_step", "missing function", "value", "There is a single step, z - g(z): `return` stands inside the loop, or the loop is missing.", times=lambda n: 1),
        wrong("no_step", "missing function", "value", "The result is z itself, and g is never asked.", times=lambda n: 0),
        wrong("always_at_z", "wrong function", "value", "g is evaluated at z in every step; it is needed at the last x, so the steps lead nowhere.", at=lambda x, z: z),
        wrong("always_at_z_plus", "sign", "value", "Every step computes z + g(z): the sign is wrong, and g is needed at the last x.", at=lambda x, z: z, step=lambda x, z, gx: z + gx),
        wrong("z_forgotten", "exchanged", "value", "Each step computes x - g(x) instead of z - g(x): it forgets z and walks away from it.", step=lambda x, z, gx: x - gx),
        wrong("x_plus", "exchanged", "value", "Each step computes x + g(x), the forward map again and again.", step=lambda x, z, gx: x + gx),
        wrong("g_alone", "missing term", "value", "Each step computes g(x) alone; x = z - g(x) holds z as well.", step=lambda x, z, gx: gx),
        wrong("minus_g", "missing term", "value", "Each step computes -g(x); z is missing in z - g(x).", step=lambda x, z, gx: -gx),
        wrong("only_z", "missing term", "value", "g(x) has no effect on the result: it is z, or z once more in every step.", step=lambda x, z, gx: z),
        wrong("turned", "sign", "value", "The difference is the wrong way round: g(x) - z.", step=lambda x, z, gx: gx - z),
        wrong("corrected_twice", "extra term", "value", "Each step adds z - g(x) to x; it should take its place.", step=lambda x, z, gx: x + z - gx),
        wrong("residual_added", "sign", "value", "The residual x + g(x) - z is added to x instead of subtracted: the steps run away from the solution.", step=lambda x, z, gx: x + (x + gx - z)),
        wrong("product", "wrong function", "value", "z is multiplied by g(x); g(x) is subtracted from it.", step=lambda x, z, gx: z * gx),
        wrong("one_too_few", "off by one", "value", "There is one step less than `n_iter`.", times=lambda n: n - 1),
        wrong("from_zero", "constant", "value", "The iteration starts at x = 0; the start is x = z.", start=torch.zeros_like),
        wrong("from_zero_one_more", "off by one", "value", "The iteration starts at x = 0 and takes n_iter + 1 steps; it takes n_iter from x = z.", start=torch.zeros_like, times=lambda n: n + 1),
        wrong("one_too_many", "off by one", "value", "There is one step more than `n_iter`.", times=lambda n: n + 1),
        wrong("always_many", "missing term", "value", "`n_iter` has no effect: the number of steps is fixed, or there is a test that ends the loop.", times=lambda n: 100),
        wrong("asked_twice", "extra term", "value", "g is evaluated twice in every step; once is enough.", ask=lambda g, x: (g(x) + g(x)) / 2),
        wrong("rows_averaged", "reduction", "value", "g(x) is averaged over the batch; every row has its own fixed point.", ask=lambda g, x: g(x).mean(0, keepdim=True)),
        wrong("returns_z_again", "direction", "value", "The last x is sent through the forward map once more: x + g(x), which is z.", end=lambda x, z, g: x + g(x)),
        wrong("returns_g", "wrong function", "value", "g(x) is returned at the end; x itself is asked for.", end=lambda x, z, g: g(x)),
        wrong("returns_residual", "wrong function", "value", "What is returned is the residual x + g(x) - z, which says how good x is; x itself is asked for.", end=lambda x, z, g: x + g(x) - z),
        mistakes(lambda: inverse_in_place)("in_place", "in place", "input", "x is changed in place, and x is z itself: the caller's z is overwritten, and every step loses it."),
    ),
    features=lambda i, o: raised_alike(INVERSE_COMPARED, o), compare=INVERSE_COMPARED, picture=inverse_picture,
)


# --- roulette_sum ----------------------------------------------------------------------------------------------------

ROULETTE_LAST = 12


def roulette_inputs(rng):
    size = 0.7 ** np.arange(ROULETTE_LAST)
    return {"delta": size * rng.uniform(0.5, 1.5, ROULETTE_LAST) * rng.choice([-1, 1], ROULETTE_LAST), "p": np.array(rng.uniform(0.2, 0.4)),
            "shares": 0.05 + 0.75 * rng.dirichlet(np.ones(5)), "counts": np.arange(1, ROULETTE_LAST + 1), "rows": rng.standard_normal((4, B))}


def survivals(inputs):
    """Name -> (P(N >= 1), ..., P(N >= K)) of the two distributions of N."""
    return {"a table": np.cumsum(inputs["shares"][::-1])[::-1], "geometric": (1 - inputs["p"]) ** np.arange(ROULETTE_LAST)}


def roulette_formula(names, counts):
    def judge(inputs, outputs, reference):
        for name in names:
            tail = survivals(inputs)[name]
            for n in counts(len(tail)):
                want, got = float((inputs["delta"][:n] / tail[:n]).sum()), float(outputs[f"{name}, n = {n}.sum"])
                if abs(got - want) > 1e-5 * (1 + abs(want)):
                    raise Fail(f"With n = {n} the sum is not delta_1 / P(N >= 1) + ... + delta_n / P(N >= n).",
                               f"delta = {laws.point(inputs['delta'][:n])}, P(N >= k) = {laws.point(tail[:n])}: {laws.expected(want, got)}")

    return judge


def roulette_mean(inputs, outputs, reference):
    """Over all n with P(N = n): a table of five, and a geometric N of which all above 12 count as 12, which leaves P(N >= k) as it is."""
    for name, tail in survivals(inputs).items():
        shares = tail - np.append(tail[1:], 0)
        mean = sum(share * float(outputs[f"{name}, n = {n}.sum"]) for n, share in enumerate(shares, 1))
        want = float(inputs["delta"][:len(tail)].sum())
        if abs(mean - want) > 1e-5 * (1 + abs(want)):
            raise Fail(f"The estimate is biased: its mean over n, with the weights P(N = n), is {mean:.4g}, and all terms together are {want:.4g}.")


def roulette_rows(inputs, outputs, reference):
    rows, got = inputs["rows"], outputs["terms of shape (B,).sum"]
    want = (rows / survivals(inputs)["geometric"][:len(rows), None]).sum(0)
    if got.shape != want.shape:
        raise Fail(f"Of terms of shape {want.shape} the sum has shape {got.shape}; it should have the same.")
    laws.expect("the sum", rows.T, got, want, why=" for terms that are tensors")
    got = outputs["terms of shape (B,).terms after"]
    if got.shape != rows.shape or not np.array_equal(got, rows):
        raise Fail(FIRST_OVERWRITTEN)


FIRST_OVERWRITTEN = "The caller's first term is overwritten: the sum starts as delta_1 itself, and `+=` (or `/=`) then changes that tensor in place."


def roulette_by(terms=lambda n: range(1, n + 1), weigh=lambda d, k, n, P: d / P(k), take=lambda delta, k: delta(k), end=lambda total, n: total):
    """`roulette_sum` in its plainest form, in which a mistake changes one part."""

    def roulette_sum(delta, n, survival):
        return end(sum(weigh(take(delta, k), k, n, survival) for k in terms(n)), n)

    return roulette_sum


def roulette_in_place(delta, n, survival):
    total = delta(1)
    for k in range(2, n + 1):
        total += delta(k) / survival(k)
    return total


def survived_all(P, k):
    return math.prod(P(j) for j in range(1, k + 1))


def roulette_picture(inputs, outputs, reference):
    """What the sum gives for each n, how likely that n is, and the mean."""
    figure = plotting.Picture(figsize=(7, 3.8), layout="constrained")
    ax = figure.subplots()
    tail = survivals(inputs)["geometric"]
    shares, at = tail - np.append(tail[1:], 0), np.arange(1, ROULETTE_LAST + 1)

    def sums(which):
        return [float(which.arrays.get(f"geometric, n = {n}.sum", math.nan)) for n in at]

    ax.bar(at, shares * 2, color="#dddddd", label="P(N = n), doubled")
    ax.plot(at, sums(reference), "-", color=plotting.PALETTE["black"], linewidth=4, alpha=0.4, label="reference")
    mine = np.array(sums(outputs))
    if np.isfinite(mine).all():
        ax.plot(at, mine, "o--", color=plotting.PALETTE["red"], label="yours")
        ax.axhline((shares * mine).sum(), color=plotting.PALETTE["red"], linestyle=":", label="the mean of yours")
    else:
        ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.axhline(inputs["delta"].sum(), color=plotting.PALETTE["blue"], linewidth=1, label="all terms")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.5 * (high - low))  # room for the legend
    ax.set_xlabel("n", fontsize=plotting.FONT), ax.set_title("one estimate for each n", fontsize=plotting.FONT)
    ax.legend(fontsize=plotting.FONT - 4, frameon=False, ncols=2, loc="upper center")
    return figure


ROULETTE_COMPARED = (*(f"a table, n = {n}.sum" for n in range(1, 6)), *(f"geometric, n = {n}.sum" for n in range(1, ROULETTE_LAST + 1)), "terms of shape (B,).sum",
                     "terms of shape (B,).terms after")
wrong = mistakes(roulette_by)
ROULETTE_SUM = Exercise(
    id="roulette_sum", title="An infinite sum by a finite one", minutes=10, difficulty=2,
    hints=(
        "Term k is computed only if n is at least k, which happens with probability P(N >= k). By what must it be multiplied when it is, so that it counts fully in the mean?",
        "Add up delta_k / P(N >= k) for k = 1, ..., n: `range(1, n + 1)`. Each term has its own probability, `survival(k)`, and the first one is always computed.",
    ),
    inputs=roulette_inputs, reference=flowkit_class("residual", "roulette_sum"),
    cases=(
        Case("n = 1: the first term", 0.5, roulette_formula(("a table", "geometric"), lambda K: (1,))),
        Case("any n: delta_k / P(N >= k), summed from 1 to n", 1.5, roulette_formula(("a table", "geometric"), lambda K: range(1, K + 1))),
        Case("its mean over n is the whole sum", 1.5, roulette_mean),
        Case("terms may be tensors", 0.5, roulette_rows),
    ),
    misconceptions=(
        wrong("no_weights", "missing term", "value", "The terms are not divided by P(N >= k): late terms are rarely computed and count too little, so the estimate is biased.", weigh=lambda d, k, n, P: d),
        wrong("multiplied", "sign", "value", "The terms are multiplied by P(N >= k); what is rarely computed must count more, not less.", weigh=lambda d, k, n, P: d * P(k)),
        wrong("density", "wrong function", "value", "The terms are divided by P(N = k), the probability to stop at k; term k is computed whenever N >= k.", weigh=lambda d, k, n, P: d / (P(k) - P(k + 1)) if P(k) - P(k + 1) > 1e-12 else d),
        wrong("strictly_above", "off by one", "value", "The terms are divided by P(N > k) = P(N >= k + 1): one further than term k.", weigh=lambda d, k, n, P: d / P(k + 1)),
        wrong("one_before", "off by one", "value", "The terms are divided by P(N >= k - 1), the probability of the term before, as happens where k counts from 0 in one place and from 1 in the other.", weigh=lambda d, k, n, P: d / P(k - 1)),
        wrong("weight_of_n", "wrong function", "value", "All terms are divided by P(N >= n), the probability of the last one; each has its own, P(N >= k).", weigh=lambda d, k, n, P: d / P(n)),
        wrong("probability_added", "wrong function", "value", "P(N >= k) is added to the term; the term is divided by it.", weigh=lambda d, k, n, P: d + P(k)),
        wrong("probability_subtracted", "wrong function", "value", "The terms are divided by 1 - P(N >= k), the probability that they are not computed.", weigh=lambda d, k, n, P: d / (1 - P(k)) if k > 1 else d),
        wrong("turned", "exchanged", "value", "P(N >= k) is divided by the term; it is the other way round.", weigh=lambda d, k, n, P: P(k) / d),
        wrong("products", "extra term", "value", "The probabilities are multiplied up over k; P(N >= k) already is the probability to get as far as k.", weigh=lambda d, k, n, P: d / survived_all(P, k)),
        wrong("root", "wrong function", "value", "The terms are divided by the root of P(N >= k).", weigh=lambda d, k, n, P: d / P(k) ** 0.5),
        wrong("last_left_out", "missing term", "value", "The last term is missing: `range(1, n)` ends at n - 1.", terms=lambda n: range(1, n)),
        wrong("one_too_many", "off by one", "value", "The sum goes on to n + 1, whose probability is that of a longer run.", terms=lambda n: range(1, n + 2)),
        wrong("term_zero", "off by one", "value", "The sum starts at k = 0; the first term is delta_1.", terms=lambda n: range(n + 1)),
        wrong("first_skipped", "off by one", "value", "The sum starts at k = 2, though the first term is always computed.", terms=lambda n: range(2, n + 1)),
        wrong("single_term", "missing term", "value", "Only the last term is left, delta_n / P(N >= n): the earlier ones are not added to it.", terms=lambda n: range(n, n + 1)),
        wrong("single_term_density", "wrong function", "value", "Only the last term is used, delta_n / P(N = n): unbiased as well, but another estimator, with a larger variance.", terms=lambda n: range(n, n + 1), weigh=lambda d, k, n, P: d / (P(k) - P(k + 1))),
        wrong("averaged", "reduction", "value", "The sum is divided by n: a mean of the terms where their sum is asked for.", end=lambda total, n: total / n),
        wrong("next_term", "off by one", "value", "Term k + 1 stands where term k belongs: as a function delta counts from 1, as a list from 0.", take=lambda delta, k: list.__getitem__(delta, min(k, len(delta) - 1))),
        wrong("next_entry", "off by one", "value", "`delta[k]` is term k + 1: as a list delta counts from 0, so term k is `delta[k - 1]`, or `delta(k)`.", take=lambda delta, k: delta[k]),
        mistakes(lambda: roulette_in_place)("in_place", "in place", "input", FIRST_OVERWRITTEN),
        wrong("negative", "sign", "value", "The sum has the wrong sign.", end=lambda total, n: -total),
        wrong("only_first", "missing term", "value", "Only the first term is returned, as if `return` stood inside the loop.", terms=lambda n: range(1, 2)),
    ),
    features=lambda i, o: raised_alike(ROULETTE_COMPARED, o), compare=ROULETTE_COMPARED, picture=roulette_picture,
)


# --- the log-determinants: power_series_logdet, russian_roulette_logdet, neumann_gradient --------------------------------

LOGDET_D = 3


def logdet_inputs(rng, lipschitz):
    v = rng.standard_normal((B, LOGDET_D))
    inputs = branch_inputs(rng, LOGDET_D, lipschitz) | {"x": 0.5 * rng.standard_normal((B, LOGDET_D)), "v": v, "r": rng.standard_normal(B)}
    return inputs | {f"direction.{k}": 0.3 * rng.standard_normal(inputs[k if k == "x" else f"g.{k}"].shape) for k in (*BRANCH, "x")}


def branch_jacobian(inputs):
    """dg/dx (B, D, D), [b, out, in], at each row of x."""
    W1, b1, W2 = (inputs[f"g.{k}"] for k in BRANCH[:3])
    return np.einsum("ih,bh,ho->boi", W1, 1 - np.tanh(inputs["x"] @ W1 + b1) ** 2, W2)


def rows_through(J, v, n):
    """v^T J^k (B, D) for k = 0, ..., n."""
    found = [v]
    for _ in range(n):
        found.append(np.einsum("bo,boi->bi", found[-1], J))
    return found


def series_truth(inputs, n, survival=lambda k: 1.0):
    """sum_{k=1..n} (-1)^(k+1) / k v^T J^k v / P(N >= k), for each row."""
    powers = rows_through(branch_jacobian(inputs), inputs["v"], n)
    return sum((-1) ** (k + 1) / k / survival(k) * (powers[k] * inputs["v"]).sum(1) for k in range(1, n + 1))


def exact_logdet(inputs):
    return np.linalg.slogdet(np.eye(LOGDET_D) + branch_jacobian(inputs))[1]


def survival_of(inputs):
    return lambda k: (1 - float(inputs["p"])) ** max(k - 1, 0)


def slope_along(value, inputs, names):
    """The derivative of value(inputs) when the inputs of these names move along their directions, by differences."""
    moved = [inputs | {(k if k == "x" else f"g.{k}"): inputs[k if k == "x" else f"g.{k}"] + t * inputs[f"direction.{k}"] for k in names} for t in laws.STEP * laws.OFFSETS]
    return laws.directional([value(m) for m in moved])


WAYS = (("parameters", BRANCH, "g's parameters"), ("x", ("x",), "x"))


def slopes_agree(outputs, step, value, inputs, ways=WAYS, tol=1e-3, why=""):
    """The student's derivatives along the directions against those of `value(inputs)`."""
    for name, moved, words in ways:
        got, want = outputs[f"{step}.{name}"], slope_along(value, inputs, moved)
        if got.size != 1:
            raise Fail("The result cannot be differentiated.")
        if not got.any():
            raise Fail(f"No gradient reaches {words}" + (", which comes from an earlier layer: that one would not be trained." if name == "x" else ", so they would not be trained."))
        if abs(float(got) - want) > tol * (1 + abs(want)):
            raise Fail(f"The gradient with respect to {words} is not right{why}: along a random direction it should be {want:.4g}, yours is {float(got):.4g}.")


def logdet_shape(counts):
    def judge(inputs, outputs, reference):
        for key, want in (*((f"n = {n}.logdet", B) for n in counts), ("one row.logdet", 1)):
            if outputs[key].shape != (want,):
                raise Fail(f"The result has shape {outputs[key].shape} for {want} row{'s' * (want > 1)}; it should be (B,) = ({want},).")
        for name in ("x", "v"):
            left_alone(inputs, outputs, f"n = {counts[-1]}.{name} after", name)

    return judge


def logdet_values(counts, survival, formula):
    def judge(inputs, outputs, reference):
        for n in counts:
            laws.expect("log det", inputs["x"], outputs[f"n = {n}.logdet"], series_truth(inputs, n, survival(inputs)), why=f" for n = {n}: {formula}")

    return judge


def mean_over_basis(outputs, n):
    got = outputs[f"basis vectors, n = {n}.logdet"]
    if got.shape != (B * LOGDET_D,):
        raise Fail(f"The result has shape {got.shape} for {B * LOGDET_D} rows; it should be (B,).")
    return got.astype(float).reshape(B, LOGDET_D).mean(1)


def series_bound(lipschitz, n):
    """Behrmann et al. 2019, theorem 3."""
    return LOGDET_D * lipschitz ** (n + 1) / ((n + 1) * (1 - lipschitz))


def linked(x):
    return x if x.requires_grad else x.detach().requires_grad_()


def pulled(y, x, w):
    return torch.autograd.grad(y, x, w, create_graph=True)[0]


def alternating(k):
    return (-1) ** (k + 1)


def series_core(g, x, v, n, P, link=linked, ask=lambda g, x: g(x), noise=lambda v: v, step=lambda y, x, w, v, k: pulled(y, x, w), sign=alternating,
                scale=lambda k: 1 / k, weigh=lambda P, k, n: 1 / P(k), terms=lambda n: range(1, n + 1), dot=lambda w, v: (w * v).sum(-1),
                add=lambda total, t: total + t, start=lambda v: 0 * v[:, 0], end=lambda total: total):
    """The series in its plainest form, in which a mistake changes one part."""
    x, v = link(x), noise(v)
    y, w, total = ask(g, x), v, start(v)
    for k in terms(n):
        w = step(y, x, w, v, k)
        total = add(total, sign(k) * scale(k) * weigh(P, k, n) * dot(w, v))
    return end(total)


def series_by(**changes):
    def power_series_logdet(g, x, n_terms, v):
        return series_core(g, x, v, n_terms, lambda k: 1.0, **changes)

    return power_series_logdet


def series_roulette_by(**changes):
    def russian_roulette_logdet(g, x, v, n, survival):
        return series_core(g, x, v, n, survival, **changes)

    return russian_roulette_logdet


def in_order(x):
    """A leaf of its own: what x was computed from is forgotten."""
    return x.detach().requires_grad_()


def series_mistakes(wrong):
    """What can go wrong in the series, whether it is cut off or played at roulette."""
    return (
        wrong("all_plus", "missing term", "value", "The signs do not alternate: with all terms added this is -log det(I - J).", sign=lambda k: 1),
        wrong("sign_turned", "sign", "value", "Every sign is the wrong way round: the first term is +v^T J v, as in log(1 + t) = t - t^2 / 2 + ...", sign=lambda k: (-1) ** k),
        wrong("precedence", "missing term", "value", "All terms are negative, the signs do not alternate: in Python `-1 ** k` is -(1 ** k). Or J has the wrong sign.", sign=lambda k: -1),
        wrong("no_k", "missing term", "value", "The division by k is missing: this is the series of 1 / (1 + t), not of log(1 + t).", scale=lambda k: 1),
        wrong("times_k", "sign", "value", "The terms are multiplied by k; they are divided by it.", scale=lambda k: k),
        wrong("factorial", "wrong function", "value", "The terms are divided by k!, as in the series of exp; the logarithm's are divided by k.", scale=lambda k: 1 / math.factorial(k)),
        wrong("next_k", "off by one", "value", "The terms are divided by k + 1; the first one is not divided at all.", scale=lambda k: 1 / (k + 1)),
        wrong("k_added", "wrong function", "value", "1 / k, or the sign, is added where it should multiply.", add=lambda total, t: total + t, sign=lambda k: 1, scale=lambda k: 1, dot=lambda w, v: (w * v).sum(-1) + 1),
        wrong("same_power", "missing function", "value", "Every term is v^T J v: the product with J starts from v each time, instead of from the last one.", step=lambda y, x, w, v, k: pulled(y, x, v)),
        wrong("entries_to_the_k", "wrong function", "value", "v^T J is raised to the power k entry by entry; it is J that is multiplied again.", step=lambda y, x, w, v, k: pulled(y, x, v) ** k),
        wrong("number_to_the_k", "wrong function", "value", "The number v^T J v is raised to the power k; v^T J^k v is something else.", step=lambda y, x, w, v, k: pulled(y, x, v), dot=None),
        wrong("gram", "wrong function", "value", "v^T J^k is multiplied by itself; the other factor is v.", dot=lambda w, v: (w * w).sum(-1)),
        wrong("no_v", "missing term", "value", "The entries of v^T J^k are added up; they are multiplied by v first.", dot=lambda w, v: w.sum(-1)),
        wrong("v_added", "wrong function", "value", "v is added to v^T J^k; the two are multiplied.", dot=lambda w, v: (w + v).sum(-1)),
        wrong("mean_of_entries", "reduction", "value", "v^T J^k v is a sum over the dimensions; this is their mean.", dot=lambda w, v: (w * v).mean(-1)),
        wrong("norm", "wrong function", "value", "The length of v^T J^k is used; it is its inner product with v that estimates the trace.", dot=lambda w, v: w.norm(dim=-1)),
        wrong("last_left_out", "missing term", "value", "The last term is missing: the sum stops before n.", terms=lambda n: range(1, n)),
        wrong("last_two_left_out", "sign", "value", "The last two terms are missing: `range` ends before its second number, which is n + 1, not n - 1.", terms=lambda n: range(1, n - 1)),
        wrong("no_terms", "missing term", "value", "No term is ever added: does the loop run over nothing? `range` takes the start first and the end second.", end=lambda total: 0.0),
        wrong("no_terms_zeros", "missing term", "value", "The result is zero, no term is ever added: does the loop run over nothing? `range` takes the start first and the end second.", end=lambda total: torch.zeros(len(total))),
        wrong("one_too_many", "off by one", "value", "There is one term too many: the sum goes on after n.", terms=lambda n: range(1, n + 2)),
        wrong("term_zero", "extra term", "value", "v^T v is added, a term k = 0; the series starts with v^T J v.", start=lambda v: (v * v).sum(-1)),
        wrong("powers_late", "off by one", "value", "Each term has one factor J too few: v^T v is what the first one uses.", step=lambda y, x, w, v, k: v if k == 1 else pulled(y, x, w)),
        wrong("powers_early", "off by one", "value", "Each term has one factor J too many: the first one uses J^2.", step=lambda y, x, w, v, k: pulled(y, x, pulled(y, x, w) if k == 1 else w)),
        wrong("only_last", "missing term", "value", "Only the last term is left: the earlier ones are not added to it.", add=lambda total, t: t),
        wrong("whole_map", "extra term", "value", "The products are with the Jacobian of x + g(x), which is I + J; the series takes J, the Jacobian of g.", ask=lambda g, x: x + g(x)),
        wrong("noise_redrawn", "state", "value", "The noise v that was given is not used: another one is drawn.", noise=torch.randn_like),
        wrong("rows_added", "reduction", "value", "The whole batch is added up; every row needs its own number, shape (B,).", end=lambda total: total.sum()),
        wrong("rows_averaged", "reduction", "value", "The whole batch is averaged; every row needs its own number, shape (B,).", end=lambda total: total.mean()),
        wrong("over_the_batch", "wrong axis", "value", "The products with v are summed over the batch instead of over the dimensions.", dot=lambda w, v: (w * v).sum(0), start=lambda v: 0.0),
        wrong("not_summed", "shape", "value", "The products with v are not summed over the dimensions: one number for each entry, not for each row.", dot=lambda w, v: w * v, start=lambda v: 0 * v),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", dot=lambda w, v: (w * v).sum(-1, keepdim=True), start=lambda v: 0 * v[:, :1]),
        wrong("detached", "detached", "gradient", "The result carries no graph (`create_graph=True` missing, detach or no_grad), so no gradient comes through it.", end=lambda total: total.detach()),
        wrong("powers_detached", "detached", "gradient", "v^T J^k is cut off from the graph after each product, so the gradient sees one factor J of each term only.", step=lambda y, x, w, v, k: pulled(y, x, w.detach())),
        wrong("x_detached", "detached", "gradient", "x is detached though it came with a graph: in a stack of layers no gradient would reach the earlier ones.", link=in_order),
        wrong("not_asked", "missing function", "gradient", NOT_ASKED, link=lambda x: x),
        wrong("not_asked_detached", "missing function", "gradient", NOT_ASKED, link=lambda x: x.detach()),
    )


def number_to_the_k(dot_of_series):
    """The mistake of that name needs the count of the terms, which `dot` does not see."""

    def make(**changes):
        def core(g, x, v, n, P):
            x = linked(x)
            t = (pulled(g(x), x, v) * v).sum(-1)
            return sum(alternating(k) / k / P(k) * t**k for k in range(1, n + 1))

        return dot_of_series(core)

    return make


# Not the results for few terms: where a loop ends too early those may be a number or a tensor.
LOGDET_COMPARED = ("n = 5.logdet", "n = 5.profile", "one row.logdet", "gradient.parameters", "gradient.x")


def without_enumeration(inputs):
    return {k: v for k, v in inputs.items() if k != "enumerated"}


# --- power_series_logdet ---------------------------------------------------------------------------------------------

SERIES_COUNTS, SERIES_ENUMERATED, SERIES_L = (1, 2, 5), tuple(range(1, 9)), 0.75


def series_inputs(rng):
    return logdet_inputs(rng, SERIES_L) | {"counts": np.array(SERIES_COUNTS), "enumerated": np.array(SERIES_ENUMERATED), "trained": np.array(4)}


def series_error(inputs, outputs, reference):
    """Over v = sqrt(D) e_i the mean is the trace itself, with no noise left: what remains is the bias of cutting off."""
    exact = exact_logdet(inputs)
    for n in SERIES_ENUMERATED:
        error, bound = np.abs(mean_over_basis(outputs, n) - exact), series_bound(SERIES_L, n)
        if (error > bound + 1e-5).any():
            raise Fail(f"Averaged over v = sqrt(D) e_i the estimate with {n} term{'s' * (n > 1)} is {error.max():.3g} off log det(I + J); "
                       f"with Lip(g) = {SERIES_L} it should be within {bound:.3g}.")


def series_trained(ways, survival=lambda i: lambda k: 1.0):
    return lambda inputs, outputs, reference: slopes_agree(
        outputs, "gradient", lambda i: (i["r"] * series_truth(i, int(i["trained"]), survival(i))).sum(), inputs, ways)


def series_picture(inputs, outputs, reference):
    """The mean over basis vectors against the number of terms, beside log det(I + J) and the bound."""
    figure = plotting.Picture(figsize=(7, 3.8), layout="constrained")
    ax, n = figure.subplots(), np.array(SERIES_ENUMERATED)
    exact = exact_logdet(inputs)
    row = np.abs(exact).argmax()
    bound = np.array([series_bound(SERIES_L, k) for k in n])
    ax.fill_between(n, exact[row] - bound, exact[row] + bound, color="#dddddd", label="within the bound")
    ax.axhline(exact[row], color=plotting.PALETTE["blue"], linewidth=1, label="log det(I + J)")
    for which, label, style in ((reference, "reference", {"color": plotting.PALETTE["black"], "linewidth": 4, "alpha": 0.4}),
                                (Outputs(outputs.arrays), "yours", {"color": plotting.PALETTE["red"], "linestyle": "--", "marker": "o"})):
        try:
            ax.plot(n, [mean_over_basis(which, k)[row] for k in n], label=label, **style)
        except Fail:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
    ax.set_ylim(exact[row] - 1.5 * bound[2], exact[row] + 2.5 * bound[2])  # room for the legend
    ax.set_xlabel("terms", fontsize=plotting.FONT), ax.set_title("mean over v = sqrt(D) e_i, one row", fontsize=plotting.FONT)
    ax.legend(fontsize=plotting.FONT - 3, frameon=False, ncols=2, loc="upper right")
    return figure


wrong = mistakes(series_by)
POWER_SERIES = Exercise(
    id="power_series_logdet", title="The log-determinant as a power series", minutes=20, difficulty=4,
    hints=(
        "log(1 + t) = t - t^2 / 2 + t^3 / 3 - ..., and with matrices the trace of each power: v^T J^k v. No power of J is ever formed: w <- w^T J, starting from w = v, is one vector-Jacobian product.",
        "Evaluate y = g(x) once, x with a graph. Then `torch.autograd.grad(y, x, w, create_graph=True)[0]` is w^T J for every row; sum its product with v over the dimensions, and add it with the sign (-1)^(k+1) and 1 / k.",
    ),
    inputs=series_inputs, reference=flowkit_class("residual", "power_series_logdet"),
    cases=(
        Case("one number for each row, x and v left as they were", 1, logdet_shape(SERIES_COUNTS)),
        Case("one term: v^T J v", 1, logdet_values((1,), lambda i: lambda k: 1.0, "v^T J v")),
        Case("more terms: powers, signs and 1 / k", 2, logdet_values((2, 5), lambda i: lambda k: 1.0, "the sum of (-1)^(k+1) / k v^T J^k v")),
        Case("averaged over basis vectors: log det(I + J), within the bound", 2, series_error),
        Case("its gradient in g's parameters", 1, series_trained(WAYS[:1])),
        Case("its gradient in x, for the layers before", 1, series_trained(WAYS[1:])),
    ),
    misconceptions=(
        *(mistakes(number_to_the_k(lambda core: lambda g, x, n_terms, v: core(g, x, v, n_terms, lambda k: 1.0)))(m.id, m.kind, m.place, m.sentence)
          if m.id == "number_to_the_k" else m for m in series_mistakes(wrong)),
        wrong("averaged", "reduction", "value", "The sum is divided by the number of terms; it is no mean.", weigh=lambda P, k, n: 1 / n),
    ),
    features=lambda i, o: raised_alike(LOGDET_COMPARED, o), compare=LOGDET_COMPARED, light=without_enumeration,
    picture=series_picture,
)


# --- russian_roulette_logdet -----------------------------------------------------------------------------------------

RUSSIAN_COUNTS, RUSSIAN_LAST, RUSSIAN_L = (1, 2, 5), 12, 0.6


def russian_inputs(rng):
    return logdet_inputs(rng, RUSSIAN_L) | {"counts": np.array(RUSSIAN_COUNTS), "enumerated": np.arange(1, RUSSIAN_LAST + 1), "trained": np.array(4), "p": np.array(rng.uniform(0.2, 0.35))}


def russian_shares(inputs):
    """P(N = n) for n = 1, ..., of which the last stands for all that are larger: P(N >= k) is the same, and the sum is cut off there."""
    tail = np.array([survival_of(inputs)(n) for n in range(1, RUSSIAN_LAST + 1)])
    return tail - np.append(tail[1:], 0)


def russian_mean(inputs, outputs, reference):
    """Over all n and all basis vectors, with no noise left: log det(I + J), but for the terms after the last."""
    mean = sum(share * mean_over_basis(outputs, n) for n, share in enumerate(russian_shares(inputs), 1))
    error, bound = np.abs(mean - exact_logdet(inputs)), series_bound(RUSSIAN_L, RUSSIAN_LAST) + 1e-5
    if (error > bound).any():
        i = error.argmax()
        raise Fail(f"The estimate is biased: its mean over n and v is {mean[i]:.4g}, where log det(I + J) is {exact_logdet(inputs)[i]:.4g}.", f"x = {laws.point(inputs['x'][i])}")


def russian_picture(inputs, outputs, reference):
    """The estimate for each n, averaged over basis vectors, and its mean over n."""
    figure = plotting.Picture(figsize=(7, 3.8), layout="constrained")
    ax, n = figure.subplots(), np.arange(1, RUSSIAN_LAST + 1)
    exact, shares = exact_logdet(inputs), russian_shares(inputs)
    row = np.abs(exact).argmax()
    ax.axhline(exact[row], color=plotting.PALETTE["blue"], label="log det(I + J)")
    for which, label, style in ((reference, "reference", {"color": plotting.PALETTE["black"], "linewidth": 4, "alpha": 0.4}),
                                (Outputs(outputs.arrays), "yours", {"color": plotting.PALETTE["red"], "linestyle": "--", "marker": "o"})):
        try:
            values = np.array([mean_over_basis(which, k)[row] for k in n])
            ax.plot(n, values, label=label, **style)
        except Fail:
            ax.plot([], [], " ", label="yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw")
            continue
        if which is not reference:
            ax.axhline((shares * values).sum(), color=style["color"], linestyle=":", label="the mean of yours over n")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.5 * (high - low))  # room for the legend
    ax.set_xlabel("n", fontsize=plotting.FONT), ax.set_title("mean over v = sqrt(D) e_i, one row", fontsize=plotting.FONT)
    ax.legend(fontsize=plotting.FONT - 3, frameon=False, ncols=2, loc="upper right")
    return figure


wrong = mistakes(series_roulette_by)
RUSSIAN_ROULETTE = Exercise(
    id="russian_roulette_logdet", title="The log-determinant without bias", minutes=15, difficulty=3,
    hints=(
        "It is the power series of the last exercise, cut off after n terms, with one more factor in each term. Which one made the roulette's sum unbiased?",
        "Term k is (-1)^(k+1) / k v^T J^k v, divided by `survival(k)`. n is given, and so is v: nothing is drawn here.",
    ),
    inputs=russian_inputs, reference=flowkit_class("residual", "russian_roulette_logdet"),
    cases=(
        Case("one number for each row, x and v left as they were", 1, logdet_shape(RUSSIAN_COUNTS)),
        Case("n = 1: v^T J v", 0.5, logdet_values((1,), survival_of, "v^T J v / P(N >= 1)")),
        Case("any n: each term divided by its P(N >= k)", 2, logdet_values((2, 5), survival_of, "the sum of (-1)^(k+1) / k v^T J^k v / P(N >= k)")),
        Case("its mean over n and v is log det(I + J)", 2, russian_mean),
        Case("its gradient in g's parameters", 1, series_trained(WAYS[:1], survival_of)),
        Case("its gradient in x, for the layers before", 0.5, series_trained(WAYS[1:], survival_of)),
    ),
    misconceptions=(
        wrong("no_weights", "missing term", "value", "The terms are not divided by P(N >= k): late terms are rarely computed and count too little, so the estimate is biased.", weigh=lambda P, k, n: 1),
        wrong("multiplied", "sign", "value", "The terms are multiplied by P(N >= k); what is rarely computed must count more, not less.", weigh=lambda P, k, n: P(k)),
        wrong("density", "wrong function", "value", "The terms are divided by P(N = k), the probability to stop at k; term k is computed whenever N >= k.", weigh=lambda P, k, n: 1 / (P(k) - P(k + 1))),
        wrong("strictly_above", "off by one", "value", "The terms are divided by P(N > k) = P(N >= k + 1): one further than term k.", weigh=lambda P, k, n: 1 / P(k + 1)),
        wrong("one_before", "off by one", "value", "The terms are divided by P(N >= k - 1): the probability is one behind the term.", weigh=lambda P, k, n: 1 / P(k - 1)),
        wrong("weight_of_n", "wrong function", "value", "All terms are divided by P(N >= n), the probability of the last one; each has its own, P(N >= k).", weigh=lambda P, k, n: 1 / P(n)),
        wrong("products", "extra term", "value", "The probabilities are multiplied up over k; P(N >= k) already is the probability to get as far as k.", weigh=lambda P, k, n: 1 / survived_all(P, k)),
        wrong("probability_subtracted", "wrong function", "value", "1 - P(N >= k) stands where P(N >= k) belongs.", weigh=lambda P, k, n: 1 / (1 - P(k)) if k > 1 else 1),
        *(mistakes(number_to_the_k(lambda core: core))(m.id, m.kind, m.place, m.sentence) if m.id == "number_to_the_k" else m for m in series_mistakes(wrong)),
    ),
    features=lambda i, o: raised_alike(LOGDET_COMPARED, o), compare=LOGDET_COMPARED, light=without_enumeration,
    picture=russian_picture,
)


# --- neumann_gradient ------------------------------------------------------------------------------------------------

NEUMANN_COUNTS, NEUMANN_LAST, NEUMANN_L, NEUMANN_LONG = (1, 4), 14, 0.5, (3, 24)
NEUMANN_STEPS = tuple(f"gradient with {step}" for step in (*(f"n = {n}" for n in NEUMANN_COUNTS), "equal weights", "one sample"))


def neumann_inputs(rng):
    return logdet_inputs(rng, NEUMANN_L) | {"counts": np.array(NEUMANN_COUNTS), "last": np.array(NEUMANN_LAST), "p": np.array(rng.uniform(0.2, 0.35)),
                                            "short and long": np.array(NEUMANN_LONG)}


def neumann_truth(inputs, n, weights):
    """i -> the weighted sum of left J(i) v, where the left vector stays what it is at `inputs`."""
    P = survival_of(inputs)
    left = sum((-1) ** k / P(k) * w for k, w in enumerate(rows_through(branch_jacobian(inputs), inputs["v"], n)))
    return lambda i: (weights * np.einsum("bo,boi,bi->b", left, branch_jacobian(i), inputs["v"])).sum()


def neumann_shape(inputs, outputs, reference):
    for key, want in (("neumann_gradient.surrogate", B), ("one row.surrogate", 1)):
        if outputs[key].shape != (want,):
            raise Fail(f"The surrogate has shape {outputs[key].shape} for {want} row{'s' * (want > 1)}; each row has its own number, shape (B,) = ({want},).")
    for name in ("x", "v"):
        left_alone(inputs, outputs, f"neumann_gradient.{name} after", name)


def neumann_slopes(ways):
    def judge(inputs, outputs, reference):
        for n in NEUMANN_COUNTS:
            slopes_agree(outputs, f"gradient with n = {n}", neumann_truth(inputs, n, inputs["r"]), inputs, ways, why=f" for n = {n}")

    return judge


def neumann_weights(inputs, outputs, reference):
    """Equal weights alone would not show that samples are mixed up, nor would one set of weights show that they are left out."""
    for name, weights in (("equal weights", np.ones(B)), ("one sample", np.eye(B)[0])):
        slopes_agree(outputs, f"gradient with {name}", neumann_truth(inputs, 3, weights), inputs,
                     why={"equal weights": " when all samples count alike", "one sample": " when the first sample alone counts: the samples are mixed up"}[name])


def neumann_mean(inputs, outputs, reference):
    """Over all n and all basis vectors: the gradient of log det(I + J), but for the terms after the last.

    Of the series of (I + J)^-1 dJ what is cut off is at most L^(last + 1) / (1 - L) = 6e-5 of dJ's size, in each of D dimensions of B rows.
    """
    slopes_agree(outputs, "expected gradient", lambda i: (i["r"] * exact_logdet(i)).sum(), inputs, tol=2e-3,
                 why=": its mean over n and v is not that of log det(I + J)")


def grows(outputs):
    """Whether a long sum holds on to more than a short one: tensors saved for the backward pass at one time, nodes of the graph at the end."""
    short, long = (outputs[f"memory with n = {n}.saved"] for n in NEUMANN_LONG)
    return (long > short + 3).any()  # n = 24 against n = 3: a graph through the sum has at least a node and a tensor more for each term


def neumann_memory(inputs, outputs, reference):
    for name, _, words in WAYS:
        if not outputs[f"gradient with n = 4.{name}"].any():
            raise Fail(f"No gradient reaches {words}, so there is no memory to judge.")
    if grows(outputs):
        short, long = (outputs[f"memory with n = {n}.saved"] for n in NEUMANN_LONG)
        saved, what = (int(short[0]), int(long[0])), "tensors saved for the backward pass"
        if not saved[1] > saved[0] + 3:
            saved, what = (int(short[1]), int(long[1])), "nodes in the graph"
        raise Fail(f"Memory grows with the number of terms: {saved[0]} {what} for n = {NEUMANN_LONG[0]}, {saved[1]} for n = {NEUMANN_LONG[1]}.")


def plain_vjp(y, x, w):
    return torch.autograd.grad(y, x, w, retain_graph=True)[0]


def neumann_by(link=linked, ask=lambda g, x: g(x), noise=lambda v: v, step=lambda y, x, w, v: plain_vjp(y, x, w), first=lambda v, P: v / P(0),
               sign=lambda k: (-1) ** k, scale=lambda k: 1, weigh=lambda P, k, n: 1 / P(k), terms=lambda n: range(1, n + 1), add=lambda left, t: left + t,
               cut=lambda left: left.detach(), ends=lambda left, v: (left, v), last=pulled, dot=lambda w, v: (w * v).sum(-1), end=lambda value: value):
    """`neumann_gradient` in its plainest form, in which a mistake changes one part."""

    def neumann_gradient(g, x, v, n, survival):
        x, v = link(x), noise(v)
        y, w, left = ask(g, x), v, first(v, survival)
        for k in terms(n):
            w = step(y, x, w, v)
            left = add(left, sign(k) * scale(k) * weigh(survival, k, n) * w)
        left, v = ends(cut(left), v)
        return end(dot(last(y, x, left), v))

    return neumann_gradient


def attached(y, x, w, v):
    return pulled(y, x, w)


def neumann_features(inputs, outputs):
    found = raised_alike(NEUMANN_COMPARED, outputs)
    try:
        return found | {"memory grows": np.asarray(grows(outputs))}
    except Fail:
        return found


def neumann_picture(inputs, outputs, reference):
    """Gradients along the random directions against what they should be, and memory against n."""
    figure = plotting.Picture(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys = [k for k in NEUMANN_COMPARED if k.startswith("gradient") and not k.endswith("ratio")]
    want = np.array([float(reference.arrays[k]) for k in keys])
    mine = np.array([float(outputs.arrays[k]) if k in outputs and outputs.arrays[k].size == 1 else math.nan for k in keys])
    unsolved = "yours: not solved yet" if pictures.unsolved(outputs) else "yours: nothing to draw"
    if np.isfinite(mine).any():
        left.plot([want.min(), want.max()], [want.min(), want.max()], ":", color="black")
        left.scatter(want, mine, color=plotting.PALETTE["blue"])
    else:
        pictures.empty(left, unsolved)
    left.set_title("gradients along random directions", fontsize=plotting.FONT)
    left.set_xlabel("reference", fontsize=plotting.FONT), left.set_ylabel("yours", fontsize=plotting.FONT)
    for which, label, place, colour in ((reference, "reference", -0.2, "black"), (outputs, "yours", 0.2, "blue")):
        found = [which.arrays.get(f"memory with n = {n}.saved") for n in NEUMANN_LONG]
        if all(f is not None and f.shape == (2,) for f in found):
            right.bar(np.arange(2) + place, [f[0] for f in found], 0.4, color=plotting.PALETTE[colour], label=label)
        else:
            right.plot([], [], " ", label=unsolved)
    right.set_xlim(-0.6, 1.6), right.set_xticks(range(2), [f"n = {n}" for n in NEUMANN_LONG], fontsize=plotting.FONT)
    right.set_title("tensors saved for the backward pass", fontsize=plotting.FONT)
    right.set_ylim(0, 1.5 * right.get_ylim()[1]), right.legend(fontsize=plotting.FONT - 3, frameon=False)
    return figure


NEUMANN_COMPARED = (*(f"{step}.{name}" for step in NEUMANN_STEPS for name in ("parameters", "x")), "gradient with n = 4.ratio", "neumann_gradient.shape")
wrong = mistakes(neumann_by)
NEUMANN = Exercise(
    id="neumann_gradient", title="A gradient whose memory does not grow", minutes=20, difficulty=5,
    hints=(
        "The gradient of log det(I + J) is tr((I + J)^-1 dJ), and (I + J)^-1 is a geometric series. So the sum only makes a row vector, left of dJ: while it is added up no graph is needed.",
        "left = v, and for k = 1, ..., n: w <- w^T J with `retain_graph=True` (not `create_graph`), left <- left + (-1)^k w / survival(k). Then one product of the detached left with J, this time with `create_graph=True`, times v, summed for each row.",
    ),
    inputs=neumann_inputs, reference=flowkit_class("residual", "neumann_gradient"),
    cases=(
        Case("one number for each row, x and v left as they were", 1, neumann_shape),
        Case("the gradient in g's parameters", 2, neumann_slopes(WAYS[:1])),
        Case("the gradient in x, for the layers before", 1.5, neumann_slopes(WAYS[1:])),
        Case("right for any weights of the samples", 1, neumann_weights),
        Case("its mean over n and v is the gradient of log det(I + J)", 1.5, neumann_mean),
        Case("memory does not grow with n", 1, neumann_memory),
    ),
    misconceptions=(
        wrong("left_attached", "missing function", "gradient", "The left vector keeps its graph: the gradient goes through the sum as well, and memory grows with n. It is held constant.", step=attached, cut=lambda left: left),
        wrong("graph_until_the_end", "extra term", "gradient", "The sum is added up with a graph (`create_graph=True`) and detached only afterwards: the gradient is right, but memory still grows with n.", step=attached),
        wrong("all_plus", "missing term", "value", "The signs do not alternate: with all terms added this is the series of (I - J)^-1.", sign=lambda k: 1),
        wrong("sign_turned", "sign", "value", "In the sum (-1)^(k+1) stands where (-1)^k belongs: the term k = 0 is +v, the next one is subtracted.", sign=alternating),
        wrong("precedence", "missing term", "value", "All terms after the first are negative, the signs do not alternate: in Python `-1 ** k` is -(1 ** k).", sign=lambda k: -1),
        wrong("logarithm", "extra term", "value", "The terms are divided by k, as in the series of the logarithm; its derivative has no 1 / k.", scale=lambda k: 1 / k),
        wrong("logarithm_and_sign", "extra term", "value", "The terms have the coefficients (-1)^(k+1) / k of the logarithm; its derivative has (-1)^k.", scale=lambda k: 1 / k, sign=alternating),
        wrong("no_zero", "missing term", "value", "The term k = 0 is missing: the left vector starts with v itself.", first=lambda v, P: 0 * v),
        wrong("starts_with_ones", "wrong function", "value", "The left vector starts with ones; the term k = 0 is v.", first=lambda v, P: torch.ones_like(v)),
        wrong("no_weights", "missing term", "value", "The terms are not divided by P(N >= k), so the estimate is biased.", weigh=lambda P, k, n: 1),
        wrong("multiplied", "sign", "value", "The terms are multiplied by P(N >= k); what is rarely computed must count more, not less.", weigh=lambda P, k, n: P(k)),
        wrong("density", "wrong function", "value", "The terms are divided by P(N = k), the probability to stop at k; term k is computed whenever N >= k.", weigh=lambda P, k, n: 1 / (P(k) - P(k + 1))),
        wrong("strictly_above", "off by one", "value", "The terms are divided by P(N > k) = P(N >= k + 1): one further than term k.", weigh=lambda P, k, n: 1 / P(k + 1)),
        wrong("one_before", "off by one", "value", "The terms are divided by P(N >= k - 1): the probability is one behind the term.", weigh=lambda P, k, n: 1 / P(k - 1)),
        wrong("weight_of_n", "wrong function", "value", "All terms are divided by P(N >= n); each has its own, P(N >= k).", weigh=lambda P, k, n: 1 / P(n)),
        wrong("products", "extra term", "value", "The probabilities are multiplied up over k (is w itself divided in each step?); P(N >= k) already is the probability to get as far as k.", weigh=lambda P, k, n: 1 / survived_all(P, k)),
        wrong("same_power", "missing function", "value", "Every term is v^T J: the product with J starts from v each time, instead of from the last one.", step=lambda y, x, w, v: plain_vjp(y, x, v)),
        wrong("last_left_out", "missing term", "value", "The last term is missing: the sum stops before n, while it should run over k = 0, ..., n.", terms=lambda n: range(1, n)),
        wrong("last_two_left_out", "sign", "value", "The last two terms are missing: `range` ends before its second number, which is n + 1.", terms=lambda n: range(1, n - 1)),
        wrong("one_too_many", "off by one", "value", "There is one term too many: the sum goes on after n.", terms=lambda n: range(1, n + 2)),
        wrong("only_zero", "missing term", "value", "No term is added to the first: the left vector is v, whatever n is.", terms=lambda n: range(0)),
        wrong("only_last", "missing term", "value", "Only the last term is left: the earlier ones are not added to it.", add=lambda left, t: t),
        wrong("left_subtracted", "sign", "value", "The terms are subtracted from the left vector: their signs are turned twice, or once too often.", add=lambda left, t: t - left),
        wrong("last_product_constant", "detached", "gradient", "The result carries no graph: there must be one more product with J after the sum, with `create_graph=True` and no detach.", last=plain_vjp),
        wrong("no_v", "missing term", "value", "left^T J is not multiplied by v: its entries are added up, or v is added to it.", dot=lambda w, v: w.sum(-1)),
        wrong("mean_of_entries", "reduction", "value", "The product with v is averaged over the dimensions; it is their sum.", dot=lambda w, v: (w * v).mean(-1)),
        wrong("squared", "wrong function", "value", "left^T J is multiplied by itself; the other factor is v.", dot=lambda w, v: (w * w).sum(-1)),
        wrong("negative", "sign", "value", "The gradient has the wrong sign: this is that of -log det(I + J).", end=lambda value: -value),
        wrong("whole_map", "extra term", "value", "The products are with the Jacobian of x + g(x), which is I + J; the series takes J, the Jacobian of g.", ask=lambda g, x: x + g(x)),
        mistakes(series_roulette_by)("theorem_one", "wrong function", "gradient", "This differentiates the roulette's estimate of log det through its sum: unbiased too, but its memory grows with n; the left vector of theorem 2 is a constant."),
        wrong("rows_added", "reduction", "value", "The whole batch is added up; every row needs its own number, shape (B,), or weights of the samples are lost.", end=lambda value: value.sum()),
        wrong("rows_averaged", "reduction", "value", "The whole batch is averaged; every row needs its own number, shape (B,), or weights of the samples are lost.", end=lambda value: value.mean()),
        wrong("over_the_batch", "wrong axis", "value", "The product with v is summed over the batch instead of over the dimensions.", dot=lambda w, v: (w * v).sum(0)),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", dot=lambda w, v: (w * v).sum(-1, keepdim=True)),
        wrong("not_summed", "shape", "value", "The product with v is not summed over the dimensions: one number for each entry, not for each row.", dot=lambda w, v: w * v),
        wrong("x_detached", "detached", "gradient", "x is detached though it came with a graph: in a stack of layers no gradient would reach the earlier ones.", link=in_order),
        wrong("ends_exchanged", "exchanged", "value", "The left vector and v have changed places in the last product: left^T J v, so the sum goes into `grad` and v is multiplied afterwards.", ends=lambda left, v: (v, left)),
        wrong("powers_early", "off by one", "value", "There is one factor J too many: the left vector's term k is v^T J^k, so it starts with v, and the last product brings the one J that is left.", last=lambda y, x, left: pulled(y, x, plain_vjp(y, x, left))),
        wrong("batch_averaged", "wrong axis", "value", "The product with v is averaged over the batch; it is summed over the dimensions, for each row by itself.", dot=lambda w, v: (w * v).mean(0)),
        wrong("not_asked", "missing function", "gradient", NOT_ASKED, link=lambda x: x),
        wrong("not_asked_detached", "missing function", "gradient", NOT_ASKED, link=lambda x: x.detach()),
        wrong("noise_redrawn", "state", "value", "The noise v that was given is not used: another one is drawn.", noise=torch.randn_like),
    ),
    features=neumann_features, compare=NEUMANN_COMPARED, light=lambda inputs: {k: v for k, v in inputs.items() if k != "last"},
    picture=neumann_picture,
)


EXERCISES = (LIP_SWISH, SPECTRAL_NORMALIZE, RESIDUAL_INVERSE, POWER_SERIES, ROULETTE_SUM, RUSSIAN_ROULETTE, NEUMANN)


EXERCISES = (RK4_STEP, EXACT_TRACE, HUTCHINSON_TRACE, CNF_LOG_PROB, PROBABILITY_FLOW, RESIDUAL_INVERSE, SPECTRAL_NORMALIZE, LIP_SWISH, POWER_SERIES,
             ROULETTE_SUM, RUSSIAN_ROULETTE, NEUMANN)
