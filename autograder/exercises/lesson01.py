"""Lesson 01, change of variables: references, inputs, cases, misconceptions, hints and pictures of its exercises."""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import laws, pictures
from autograder.exercise import Case, Exercise, Fail, Misconception
from autograder.exercises.common import (
    deviating, every_size, flowkit_class, function, gradient_arrives, layer_inputs, ldj_mistakes, mixture, once,
)
from autograder.probes.common import COSTLY
from autograder.probes.lesson01 import ASIDE, SIZES, slopes

ASSIGNMENT = "01_change_of_variables"
TITLE = "Change of variables"
# What a class run must not let a submission import: these modules hold the references of this lesson.
REFERENCES = ("flowkit.core", "flowkit.elementwise", "flowkit.planar")
TEXTS = {}


def mistakes(make):
    """mistake(id, kind, place, sentence, name=function, ...): a Misconception whose object is `make(name=function, ...)`."""

    def mistake(id, kind, place, sentence, **changes):
        return Misconception(id, kind, place, sentence, lambda: (make(**changes),))

    return mistake


def arrays(**inputs):
    return {k: np.asarray(v) for k, v in inputs.items()}


def shape_is(outputs, key, want, letters):
    got = outputs[key].shape
    if got != want:
        raise Fail(f"The result for {key.rsplit('.', 1)[0]} has shape {got}; it should be {letters} = {want}.")


def left_alone(inputs, outputs, key, given):
    """The caller's tensor is as it was: "x after" of a step against the input `given`."""
    got = outputs[key]
    if got.shape != inputs[given].shape or not np.array_equal(got, inputs[given]):
        raise Fail(f"The input `{given.rsplit(' ', 1)[-1]}` was changed in place: the caller's tensor was overwritten.")


def not_nan(outputs, key, sentence):
    """Fail with `sentence` where a result holds NaN: it knows better where that comes from."""
    if key in outputs and np.isnan(outputs.arrays[key]).any():
        raise Fail(sentence)


# --- monotone_direction ----------------------------------------------------------------------------------------------

RISING = ("a line", "a cube", "a slow climb", "a climb with a jump", "the right arm of a parabola")
FALLING = ("a falling line", "a falling exponential", "a slow fall", "a fall between two points")
TURNING = ("a parabola", "a wave that climbs", "a wave that falls", "a climb that turns before the last point", "a climb that turns after the first point")
FLAT = ("a constant", "a climb with a flat stretch", "a fall with a flat end", "a staircase")
NAMES = {1: "strictly increasing: +1", -1: "strictly decreasing: -1", 0: "not invertible: 0"}


def monotone_inputs(rng):
    x = np.concatenate([np.sort(rng.uniform(-3, -0.05, 20)), [0.0], np.sort(rng.uniform(0.05, 3, 20))])
    return arrays(a=rng.uniform(0.8, 1.6), b=rng.uniform(-1, 1), c=rng.uniform(-0.5, 0.5), x=x)


def directions(names, want):
    def judge(inputs, outputs, reference):
        found = {float(outputs.arrays[k]) for k in outputs.arrays if k.endswith(".answer")}
        if len(found) == 1:
            raise Fail(f"Every function gets the same answer, {found.pop():g}.")
        for name in names:
            got = float(outputs[f"{name}.answer"])
            if got != want:
                said = NAMES.get(got, f"{got:g}, which is none of +1, -1 and 0")
                raise Fail(f"On its grid {name} is {NAMES[want]}; your answer is {said if got in NAMES else f'{said}'}.")

    return judge


def direction_by(rises=lambda f, x: bool((torch.diff(f(x)) > 0).all()), falls=lambda f, x: bool((torch.diff(f(x)) < 0).all()), answers=(1, -1, 0)):
    def monotone_direction(f, x):
        return answers[0] if rises(f, x) else answers[1] if falls(f, x) else answers[2]

    return monotone_direction


def derivative(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)


def both(holds):
    """rises and falls by one rule on steps: `holds(steps)` for an increasing function, and for its mirror image."""
    return {"rises": lambda f, x: bool(holds(torch.diff(f(x)))), "falls": lambda f, x: bool(holds(-torch.diff(f(x))))}


def distinct(f, x):
    return len(torch.unique(f(x))) == len(x)


wrong = mistakes(direction_by)
MONOTONE = Exercise(
    id="monotone_direction", title="When can a function be undone?", minutes=8, difficulty=1,
    hints=(
        "Look at the steps from each grid point to the next, `torch.diff(f(x))`. What must hold for them if f rises strictly? And if it falls?",
        "`(steps > 0).all()` asks whether every single step goes up. One step of size 0 is enough to spoil it: two points then have the same image.",
    ),
    inputs=monotone_inputs, reference=lambda: (direction_by(),),
    cases=(
        Case("+1 where f is strictly increasing", 1, directions(RISING, 1)),
        Case("-1 where f is strictly decreasing", 1, directions(FALLING, -1)),
        Case("0 where f turns round", 1, directions(TURNING, 0)),
        Case("0 where f is flat, if only in places", 1, directions(FLAT, 0)),
    ),
    misconceptions=(
        wrong("not_strict", "wrong function", "value", "Steps of size zero count as rising or falling: where f is flat, two points have the same image, and no inverse can tell them apart.", **both(lambda d: (d >= 0).all())),
        wrong("only_the_ends", "missing term", "value", "Only the first and the last point are compared; what f does between them is not looked at.",
              rises=lambda f, x: bool(f(x)[-1] > f(x)[0]), falls=lambda f, x: bool(f(x)[-1] < f(x)[0])),
        wrong("only_the_first_step", "missing term", "value", "Only the first step decides; f may turn round later.", **both(lambda d: d[0] > 0)),
        wrong("only_the_last_step", "missing term", "value", "Only the last step decides; what f does before is not looked at.", **both(lambda d: d[-1] > 0)),
        wrong("first_step_left_out", "off by one", "value", "The first step is never looked at.", **both(lambda d: (d[1:] > 0).all())),
        wrong("last_step_left_out", "off by one", "value", "The last step is never looked at.", **both(lambda d: (d[:-1] > 0).all())),
        wrong("any_for_all", "wrong function", "value", "One rising step is enough for the answer +1, and one falling step for -1; all steps must agree.", **both(lambda d: (d > 0).any())),
        wrong("most_steps", "wrong function", "value", "The majority of the steps decides; all of them must agree.", **both(lambda d: (d > 0).double().mean() > 0.5)),
        wrong("tolerance", "constant", "value", "Small steps are taken for flat ones: a slow function is invertible all the same.", **both(lambda d: (d > 1e-4).all())),
        wrong("slope_positive", "wrong function", "value", "The slope decides, and it must not be zero at any point; a cube is flat at one point and still strictly increasing.",
              rises=lambda f, x: bool((derivative(f, x) > 0).all()), falls=lambda f, x: bool((derivative(f, x) < 0).all())),
        wrong("signs_exchanged", "sign", "value", "+1 and -1 have changed places.", answers=(-1, 1, 0)),
        wrong("falling_forgotten", "direction", "value", "A strictly decreasing function gets 0, though it is just as invertible as an increasing one.", answers=(1, 0, 0)),
        wrong("rising_turned", "exchanged", "value", "A rising function gets 0 and a falling one +1: a comparison is the wrong way round.", rises=lambda f, x: bool((torch.diff(f(x)) < 0).all())),
        wrong("no_direction", "missing function", "value", "The answer says that f is invertible, but not in which direction: a decreasing function should give -1.", answers=(1, 1, 0)),
        wrong("no_zero", "missing term", "value", "There is no answer 0: what does not rise is taken to fall.", answers=(1, -1, -1)),
        wrong("turning_is_falling", "wrong function", "value", "A single falling step is enough for the answer -1; all steps must fall.", falls=lambda f, x: bool((torch.diff(f(x)) < 0).any())),
        wrong("values_for_steps", "missing function", "value", "The signs of the values of f decide; it is the differences between neighbours that tell whether f rises.",
              rises=lambda f, x: bool((f(x) > 0).all()), falls=lambda f, x: bool((f(x) < 0).all())),
        wrong("above_the_line", "wrong function", "value", "f(x) is compared with x; it should be compared with its own value at the neighbouring point.",
              rises=lambda f, x: bool((f(x) >= x).all()), falls=lambda f, x: bool((f(x) < x).all())),
        wrong("distinct_values", "wrong function", "value", "That no value occurs twice on the grid is not enough: a continuous function that turns round between two grid points takes values twice.",
              rises=lambda f, x: distinct(f, x) and bool(f(x)[-1] > f(x)[0]), falls=lambda f, x: distinct(f, x) and bool(f(x)[-1] < f(x)[0])),
    ),
    compare=tuple(f"{name}.answer" for name in RISING + FALLING + TURNING + FLAT), picture=pictures.directions(slopes, RISING[:2] + FALLING[1:2] + TURNING[:2] + FLAT[1:2]),
)


# --- log_prob_1d -----------------------------------------------------------------------------------------------------

def bend_inputs(rng):
    return arrays(a=rng.uniform(0.6, 1.6), b=rng.uniform(-1, 1), m=rng.uniform(-0.5, 0.5), s=rng.uniform(0.5, 0.9),
                  x=rng.permutation(np.linspace(-2.2, 2.4, 12) + rng.uniform(-0.1, 0.1, 12)), line=np.linspace(-15, 15, 401))


def normal(z, m, s):
    return -0.5 * ((z - m) / s) ** 2 - np.log(s) - 0.5 * math.log(2 * math.pi)


def log_density(name, i, x):
    """log p(x) in closed form, for each of autograder.probes.lesson01.bends."""
    a, b, m, s = (float(i[k]) for k in ("a", "b", "m", "s"))
    if name == "a line":
        return normal(a * x + b, m, s) + np.log(a)
    if name == "a bend":
        t = np.tanh(x - b)
        return normal(a * x + 0.7 * t, m, s) + np.log(a + 0.7 * (1 - t**2))
    if name == "a CDF":
        u = (x - m) / s
        return -np.logaddexp(0, u) - np.logaddexp(0, -u) - np.log(s)
    if name == "a falling line":
        return -np.abs(b - a * x - m) / s - np.log(2 * s) + np.log(a)
    if name == "a falling exponential":
        return np.log(a) - a * np.exp(-x / s) - x / s - np.log(s)
    t = np.tanh(2 * x)
    return normal(b - a * x - 0.7 * t, m, s) + np.log(a + 1.4 * (1 - t**2))


UP, DOWN = ("a line", "a bend", "a CDF"), ("a falling line", "a falling exponential", "a falling bend")


def closed_forms(names):
    def judge(inputs, outputs, reference):
        x = inputs["x"]
        for name in names:
            not_nan(outputs, f"{name}.log_prob", f"For {name} the result holds NaN values: the logarithm of a negative number.")
            laws.expect("log p(x)", x, outputs[f"{name}.log_prob"], log_density(name, inputs, x), 1e-5, why=f" where f is {name}")

    return judge


def one_number_each(inputs, outputs, reference):
    shape_is(outputs, "a bend.log_prob", inputs["x"].shape, "(N,)")
    shape_is(outputs, "a bend at one point.log_prob", (1,), "(N,)")
    for name in UP + DOWN:
        left_alone(inputs, outputs, f"{name}.x after", "x")


def integrates(inputs, outputs, reference):
    x = inputs["line"]
    for name in ("a bend", "a falling bend"):
        not_nan(outputs, f"{name} on a grid.log_prob", f"For {name} the density is NaN: the logarithm of a negative number.")
        got = outputs[f"{name} on a grid.log_prob"]
        if got.shape != x.shape:
            raise Fail(f"The result for {name} has shape {got.shape}; it should be (N,) = {x.shape}.")
        area = np.exp(np.minimum(got, 50.0)).sum() * (x[1] - x[0])
        if abs(area - 1) > 1e-3:
            raise Fail(f"For {name} exp(log p(x)) integrates to {area:.3g} over the line; a density integrates to 1.")


def log_prob_by(slope=derivative, term=lambda d, z: d.abs().log(), at=lambda x, z: z, value=lambda base, z: base.log_prob(z), join=lambda p, t: p + t, end=lambda p: p):
    def log_prob_1d(x, f, base):
        z = f(x)
        return end(join(value(base, at(x, z)), term(slope(f, x), z)))

    return log_prob_1d


def neighbours(f, x):
    z = f(x)
    return torch.gradient(z)[0] if len(x) > 1 else torch.ones_like(x)


wrong = mistakes(log_prob_by)
LOG_PROB_1D = Exercise(
    id="log_prob_1d", title="Density of a bent variable", minutes=15, difficulty=2,
    hints=(
        "Two numbers are added for each point: the base's log-density at z = f(x), and the logarithm of how much f stretches there. The stretch is the slope of f, whatever its sign.",
        "For the slope, make a copy of x that asks for gradients (`x.clone().requires_grad_()`) and let `torch.autograd.grad` differentiate the sum of f(x): f works entry by entry, so entry i of the gradient is the slope at x_i.",
    ),
    inputs=bend_inputs, reference=lambda: (log_prob_by(),),
    cases=(
        Case("one number for each point, x left as it was", 1, one_number_each),
        Case("increasing f: log p(x) in closed form", 3, closed_forms(UP)),
        Case("decreasing f: log p(x) in closed form", 3, closed_forms(DOWN)),
        Case("the density integrates to 1", 1, integrates),
    ),
    misconceptions=(
        wrong("slope_sign", "sign", "value", "log|dz/dx| is subtracted: that is the density of the way back. Where f stretches, the crowd of x is denser, so it is added.", join=lambda p, t: p - t),
        wrong("no_abs", "missing function", "value", "The absolute value is missing: for a decreasing f the slope is negative and has no logarithm.", term=lambda d, z: d.log()),
        wrong("no_log", "missing function", "value", "|dz/dx| itself is added; among log-densities belongs its logarithm.", term=lambda d, z: d.abs()),
        wrong("no_log_no_abs", "missing function", "value", "dz/dx itself is added: both the absolute value and the logarithm are missing.", term=lambda d, z: d),
        wrong("no_slope", "missing term", "value", "The slope of f is missing: this is the base's log-density at z, which ignores how f stretches the line.", term=lambda d, z: 0 * z),
        wrong("only_slope", "missing term", "value", "The base's log-density is missing: this is the logarithm of the slope alone.", join=lambda p, t: t),
        wrong("no_log_of_abs", "missing function", "value", "The logarithm of a negative slope is NaN, and is replaced by 0; it is the size of the slope that counts.", term=lambda d, z: d.log().nan_to_num(0.0)),
        wrong("base_at_x", "wrong function", "value", "The base's density is asked at x; it is a density of z = f(x).", at=lambda x, z: x),
        wrong("density", "missing function", "value", "The density itself is returned; its logarithm is asked for.", end=lambda p: p.exp()),
        wrong("base_density", "missing function", "value", "The base's density is used without its logarithm.", value=lambda base, z: base.log_prob(z).exp()),
        wrong("times_slope", "wrong function", "value", "The log-density is multiplied by the slope; a product of densities is a sum of logarithms.", term=lambda d, z: d.abs(), join=lambda p, t: p * t),
        wrong("log_of_value", "missing function", "value", "The logarithm of |f(x)| is added; it is the slope of f that rescales the density.", term=lambda d, z: z.abs().log()),
        wrong("clamped", "wrong function", "value", "Negative slopes are clamped to a tiny positive number; a decreasing f stretches just as an increasing one does.", term=lambda d, z: d.clamp_min(1e-12).log()),
        wrong("sign_of_slope", "sign", "value", "For a decreasing f the term has the wrong sign; only the size of the slope matters.", term=lambda d, z: d.sign() * d.abs().log()),
        wrong("abs_outside", "order", "value", "The absolute value is taken of the logarithm instead of the slope.", term=lambda d, z: d.log().abs()),
        wrong("abs_of_log", "extra term", "value", "The logarithm of the slope is made positive: where f shrinks the line it should stay negative.", term=lambda d, z: d.abs().log().abs()),
        wrong("squared", "extra term", "value", "The slope is squared, so its logarithm counts twice.", term=lambda d, z: (d**2).log()),
        wrong("log10", "wrong function", "value", "The logarithm of the slope is to base 10; log-densities are in nats, to base e.", term=lambda d, z: d.abs().log10()),
        wrong("log1p", "extra term", "value", "1 is added to the slope before its logarithm is taken.", term=lambda d, z: d.abs().log1p()),
        wrong("slope_at_z", "wrong function", "value", "The slope of f is taken at z; it is needed at x.", slope=lambda f, x: derivative(f, f(x))),
        wrong("slope_of_mean", "reduction", "value", "The mean of f(x) is differentiated, so every slope is divided by the number of points.", slope=lambda f, x: derivative(f, x) / len(x)),
        wrong("one_slope", "reduction", "value", "One slope is used for all points; every point has its own.", slope=lambda f, x: derivative(f, x).mean().expand(len(x))),
        wrong("between_neighbours", "wrong function", "value", "The slope is taken as a difference between neighbouring entries of x, which lie anywhere; each point needs the derivative at its own place.", slope=neighbours),
        wrong("summed", "reduction", "value", "The points are summed; every point keeps its own number, shape (N,).", end=lambda p: p.sum()),
        wrong("averaged", "reduction", "value", "The points are averaged; every point keeps its own number, shape (N,).", end=lambda p: p.mean()),
        wrong("column", "shape", "value", "The result has shape (N, 1); it should be (N,).", end=lambda p: p[:, None]),
        wrong("negative", "sign", "value", "The result has the opposite sign: this is a loss, not a log-density.", end=lambda p: -p),
        wrong("standard_normal", "constant", "value", "The base is taken to be a standard normal, whatever was handed in.", value=lambda base, z: -0.5 * z**2 - 0.5 * math.log(2 * math.pi)),
    ),
    compare=tuple(f"{name}.log_prob" for name in UP + DOWN) + ("a bend at one point.log_prob", "a bend.x after"),
    picture=pictures.against_reference(("a bend on a grid.log_prob", "a falling bend on a grid.log_prob"), "line", ("log p(x), increasing f", "log p(x), decreasing f"), (-3, 3)),
)


# --- inverse_cdf_sample ----------------------------------------------------------------------------------------------

TINY = 1e-9


def quantile_inputs(rng):
    even = (np.arange(100) + rng.uniform(0.05, 0.95, 100)) / 100  # stratified: any right answer has the right distribution
    return arrays(m=np.array([-1.5, 1.2]) + rng.uniform(-0.3, 0.3, 2), s=rng.uniform(0.3, 0.7, 2), w=rng.uniform(0.3, 0.7), u=rng.permutation(rng.uniform(0.02, 0.98, 16)), even=even,
                  far=np.array([TINY, 1 - 1e-6, 1e-5, 0.5, 1 - TINY]), lo=-rng.uniform(30, 40), hi=rng.uniform(40, 50), zero=0.0, few=rng.integers(7, 10))


def quantile(name, inputs, u):
    m, s = inputs["m"][0], inputs["s"][0]
    return m + s * (np.log(u) - np.log1p(-u)) if name == "logistic" else -s * np.log1p(-u)


def humps_cdf(inputs, x):
    m, s, w = inputs["m"], inputs["s"], inputs["w"]
    return w * 0.5 * (1 + np.tanh((x - m[0]) / s[0] / 2)) + (1 - w) * 0.5 * (1 + np.tanh((x - m[1]) / s[1] / 2))


def solves(outputs, key, u, want, tol, where):
    """x against the closed form, told by the u nearest to 1/2 that shows a difference."""
    got = outputs[key]
    if got.shape != want.shape:
        raise Fail(f"`x` has shape {got.shape} for u of shape {want.shape}.")
    wrong = ~laws.close(got, want, tol)
    if wrong.any():
        i = laws.first_bad(u - 0.5, wrong)
        raise Fail(f"x does not solve cdf(x) = u{where}.", f"u = {u[i]:.10g}: {laws.expected(want[i], got[i])}")


def quantiles(inputs, outputs, reference):
    for name in ("logistic", "exponential"):
        solves(outputs, f"{name}.x", inputs["u"], quantile(name, inputs, inputs["u"]), 1e-6, f" for the {name} CDF")


def samples_follow(inputs, outputs, reference):
    """The largest distance between the samples' empirical CDF and the true one: below 1 / n for evenly spread u."""
    got, n = outputs["two humps.x"], len(inputs["even"])
    if got.shape != (n,):
        raise Fail(f"`x` has shape {got.shape} for u of shape {(n,)}.")
    F_ = humps_cdf(inputs, np.sort(got.astype(float)))
    distance = np.abs(F_ - (np.arange(n) + 0.5) / n).max()
    if distance > 2 / n:
        raise Fail(f"Fed with {n} evenly spread u, the samples do not follow a density with two humps: their CDF is off by {distance:.2g}.")
    if np.abs(humps_cdf(inputs, got) - inputs["even"]).max() > 1e-6:
        raise Fail("The samples follow the density, but x_i does not belong to u_i: the order of u is lost.")


def quantile_shape(inputs, outputs, reference):
    shape_is(outputs, "logistic.x", inputs["u"].shape, "(N,)")
    for name, given in (("logistic", "u"), ("two humps", "even")):
        left_alone(inputs, outputs, f"{name}.x after", given)
    got = outputs["logistic.x"][np.argsort(inputs["u"])]
    if not (np.diff(got) > 0).all():
        raise Fail("x does not increase with u: a larger share of the probability lies left of a larger x.")


def tails(inputs, outputs, reference):
    solves(outputs, "tails.x", inputs["far"], quantile("logistic", inputs, inputs["far"]), 1e-5, " in the tails of the logistic CDF")


def few_halvings(inputs, outputs, reference):
    k, width = int(inputs["few"]), inputs["hi"] - inputs["lo"]
    got, want = outputs["few steps.x"], quantile("logistic", inputs, inputs["u"])
    if got.shape != want.shape:
        raise Fail(f"`x` has shape {got.shape}; it should be (N,) = {want.shape}.")
    off, most = np.abs(got - want).max(), width / 2**k
    if off > most * (1 + 1e-6):
        raise Fail(f"After steps = {k} halvings of an interval of width {width:.1f}, the error of `x` should be at most {most:.2g}; it is {off:.2g}.")
    each = int(outputs["few steps.evaluations"]) / len(want)
    if each > k + 2:
        raise Fail(f"With steps = {k} the CDF is evaluated {each:g} times for each u; each step needs one evaluation.")
    if each < 1:
        raise Fail("The CDF is never asked.")


def bisect(start=lambda u, lo, hi: (torch.full_like(u, lo), torch.full_like(u, hi)), middle=lambda a, b: (a + b) / 2, above=lambda F, u: F > u,
           low=lambda up, a, m: torch.where(up, a, m), high=lambda up, b, m: torch.where(up, m, b), end=lambda x, u, cdf: x, before=lambda u: u, count=lambda n: n,
           finish=None, swap=False):
    def inverse_cdf_sample(u, cdf, lo, hi, steps=60):
        u = before(u)
        a, b = start(u, lo, hi)
        for _ in range(count(steps)):
            m = middle(a, b)
            up = above(cdf(m), u)
            a, b = low(up, a, m), high(up, b, m)
            a, b = (b, a) if swap else (a, b)
        return end((finish or middle)(a, b), u, cdf)

    return inverse_cdf_sample


def looked_up(u, cdf, lo, hi, steps=60):
    """The nearest of `steps` grid points."""
    grid = torch.linspace(lo, hi, steps)
    return grid[torch.searchsorted(cdf(grid), u).clamp_max(steps - 1)]


def newton(u, cdf, lo, hi, steps=60):
    """Newton's rule from the middle, with no bracket to stay in."""
    x = torch.full_like(u, (lo + hi) / 2)
    for _ in range(steps):
        x = x - (cdf(x) - u) / derivative(cdf, x)
    return x


wrong = mistakes(bisect)
INVERSE_CDF = Exercise(
    id="inverse_cdf_sample", title="Sampling by inverting a CDF", minutes=15, difficulty=2,
    hints=(
        "Keep two tensors of shape (N,), a lower and an upper end for each u. Every CDF increases: if cdf(middle) lies above u, the solution is left of the middle.",
        "`torch.where(cdf(middle) > u, a, b)` chooses entry by entry. In each step one of the two ends moves to the middle, for each u on its own.",
    ),
    inputs=quantile_inputs, reference=lambda: (bisect(),),
    cases=(
        Case("one x for each u, increasing in u, u left as it was", 1, quantile_shape),
        Case("cdf(x) = u", 3, quantiles),
        Case("samples of a density with two humps", 1, samples_follow),
        Case("the tails: u close to 0 and to 1", 1, tails),
        Case("`steps` halvings, one evaluation of the CDF each", 2, few_halvings),
    ),
    misconceptions=(
        wrong("turned_round", "exchanged", "value", "The wrong half is kept: where cdf(middle) lies above u, the solution is to the left of the middle.", above=lambda F, u: F < u),
        wrong("bracket_unit", "constant", "value", "The search starts between 0 and 1, the range of u; x lies between lo and hi.", start=lambda u, lo, hi: (torch.zeros_like(u), torch.ones_like(u))),
        wrong("half_bracket", "missing term", "value", "lo is not used: the search starts at 0.", start=lambda u, lo, hi: (torch.zeros_like(u), torch.full_like(u, hi))),
        wrong("few_steps", "constant", "value", "There are always 10 halvings, whatever `steps` says: x stays coarse.", count=lambda n: 10),
        wrong("steps_ignored", "constant", "value", "There are always 60 halvings, whatever `steps` says.", count=lambda n: 60),
        wrong("cdf_of_u", "direction", "value", "This is cdf(u), the wrong way through the CDF: the x with cdf(x) = u is asked for.", end=lambda x, u, cdf: cdf(u)),
        wrong("cdf_of_x", "extra term", "value", "cdf(x) is returned, which is u again; x itself is asked for.", end=lambda x, u, cdf: cdf(x)),
        wrong("returns_u", "missing function", "value", "u is returned as it came.", end=lambda x, u, cdf: u),
        wrong("one_for_all", "reduction", "value", "All points move together, by one decision for the whole batch; each u needs its own interval.", above=lambda F, u: (F.mean() > u.mean()).expand(len(u))),
        wrong("any_for_all", "reduction", "value", "One point above its u moves the interval of all; each u needs its own interval.", above=lambda F, u: (F > u).any().expand(len(u))),
        wrong("low_stays", "missing term", "value", "The lower end never moves.", low=lambda up, a, m: a),
        wrong("high_stays", "missing term", "value", "The upper end never moves.", high=lambda up, b, m: b),
        wrong("both_move", "exchanged", "value", "An end moves to the middle just when it should stay, so the two meet after one step and the search is over.", low=lambda up, a, m: m, high=lambda up, b, m: m),
        wrong("half_width", "sign", "value", "The middle of an interval is half the sum of its ends, not half their difference.", middle=lambda a, b: (b - a) / 2),
        wrong("minus_half_width", "sign", "value", "The middle of an interval is half the sum of its ends, not half their difference.", middle=lambda a, b: (a - b) / 2, finish=lambda a, b: (a + b) / 2),
        wrong("no_half", "missing term", "value", "The sum of the ends is not divided by 2, so it is not the middle.", middle=lambda a, b: a + b),
        wrong("no_half_in_loop", "missing term", "value", "In the loop the sum of the ends is not divided by 2, so it is not the middle.", middle=lambda a, b: a + b, finish=lambda a, b: (a + b) / 2),
        wrong("twice_in_loop", "wrong function", "value", "In the loop the sum of the ends is multiplied by 2; half of it is the middle.", middle=lambda a, b: (a + b) * 2, finish=lambda a, b: (a + b) / 2),
        wrong("half_of_low", "missing term", "value", "In the loop half of the lower end is taken for the middle; the upper end is missing.", middle=lambda a, b: a / 2, finish=lambda a, b: (a + b) / 2),
        wrong("half_of_high", "missing term", "value", "In the loop half of the upper end is taken for the middle; the lower end is missing.", middle=lambda a, b: b / 2, finish=lambda a, b: (a + b) / 2),
        wrong("result_not_halved", "missing term", "value", "The search is right, but the result is the sum of the two ends: twice the solution.", finish=lambda a, b: a + b),
        wrong("result_doubled", "wrong function", "value", "The search is right, but the result is four times the solution: the sum of the ends is multiplied where it should be divided.", finish=lambda a, b: (a + b) * 2),
        wrong("result_half", "missing term", "value", "The search is right, but the result is half of the lower end: the upper end is missing in the mean.", finish=lambda a, b: a / 2),
        wrong("result_half_high", "missing term", "value", "The search is right, but the result is half of the upper end: the lower end is missing in the mean.", finish=lambda a, b: b / 2),
        wrong("result_difference", "sign", "value", "The search is right, but the result is half the difference of the ends, which is nearly 0.", finish=lambda a, b: (a - b) / 2),
        wrong("ends_swap", "exchanged", "value", "In each step the two ends are handed over in the wrong order: the lower one becomes the upper one.", swap=True),
        wrong("upper_share", "wrong function", "value", "cdf(x) = 1 - u is solved: the samples have the right distribution, but x does not belong to its u.", before=lambda u: 1 - u),
        wrong("sorted", "order", "value", "u is sorted first: x_i does not belong to u_i any more.", before=lambda u: u.sort()[0]),
        wrong("fresh", "wrong function", "value", "New random numbers are drawn in the place of u.", before=lambda u: torch.rand(u.shape)),
        wrong("float32", "type", "value", "u is rounded to float32: close to 1 nothing is left of it, and the upper tail is lost.", before=lambda u: u.float()),
        wrong("column", "shape", "value", "The result has shape (N, 1); it should be (N,).", end=lambda x, u, cdf: x[:, None]),
        wrong("mean", "reduction", "value", "The solutions are averaged to one number; each u has its own x.", end=lambda x, u, cdf: x.mean()),
        wrong("u_changed", "in place", "value", "The tensor u is overwritten with the result.", end=lambda x, u, cdf: u.copy_(x)),
        Misconception("looked_up", "wrong function", "value", "x is looked up among `steps` fixed points, which is far too coarse; halving an interval 60 times gives 18 digits.", function(looked_up)),
        Misconception("newton", "wrong function", "value", "Newton's rule runs away where the CDF is flat; an interval that holds the solution and is halved cannot.", function(newton)),
    ),
    compare=("logistic.x", "exponential.x", "two humps.x", "tails.x", "few steps.x", "few steps.evaluations", "logistic.x after"),
    picture=pictures.against_reference(("two humps.x",), "even", ("x, the solution of cdf(x) = u",), (0, 1), axis="u"),
)


# --- mixture_cdf -----------------------------------------------------------------------------------------------------

def mixture_inputs(rng):
    x = rng.uniform(-5, 5, 12)
    many = {f"many.{k}": v for k, v in mixture(rng, 5, 2, 3).items()} | {"many.x": 2 * rng.standard_normal((5, 2))}
    return {"x": x, "near": (x[:, None] + laws.STEP * laws.OFFSETS).ravel(), "far": np.linspace(-300, 300, 41), "line": np.linspace(-6, 6, 241)} | mixture(rng, 4) | many | {
        "c": rng.standard_normal(12), "r": rng.standard_normal(12), "direction": rng.standard_normal(4), "nudges": laws.STEP * laws.OFFSETS}


def log_sigmoid(u):
    return -np.logaddexp(0, -u)


def mixture_truth(inputs, at, prefix=""):
    """z and ldj of the mixture CDF, in numpy and in logarithms."""
    w, m, s = (inputs[prefix + k] for k in ("weights", "means", "log_scales"))
    u = (inputs[at][..., None] - m) * np.exp(-s)
    return np.exp(np.logaddexp.reduce(np.log(w) + log_sigmoid(u), -1)), np.logaddexp.reduce(np.log(w) + log_sigmoid(u) + log_sigmoid(-u) - s, -1)


def mixture_values(inputs, outputs, reference):
    if outputs["mixture_cdf.z"].dtype != np.float64:
        raise Fail("`z` is float32 for an x in float64: digits are lost on the way out.")
    laws.expect("z", inputs["x"], outputs["mixture_cdf.z"], mixture_truth(inputs, "x")[0], 1e-8)
    laws.expect("z", inputs["many.x"], outputs["mixture_cdf on a batch.z"], mixture_truth(inputs, "many.x", "many.")[0], 1e-8,
                why=" for x of shape (B, d) with parameters (B, d, K)")


def mixture_slopes(inputs, outputs, reference):
    """ldj = log dz/dx by differences of the student's own z, entry by entry, and against the closed form for a batch."""
    z, ldj = outputs["mixture_cdf nearby.z"], outputs["mixture_cdf.ldj"]
    if z.shape != inputs["near"].shape:
        raise Fail(f"`z` has shape {z.shape} for x of shape {inputs['near'].shape}.")
    slope = z.reshape(-1, 4) @ laws.WEIGHTS / laws.STEP
    if (slope <= 0).any():
        raise Fail("`z` does not increase with x everywhere.")
    laws.expect("ldj", inputs["x"], ldj, np.log(slope), 1e-4, why=": it should be the logarithm of the slope dz/dx of your own z, for each entry of x")
    laws.expect("ldj", inputs["x"], ldj, mixture_truth(inputs, "x")[1], 1e-6)
    laws.expect("ldj", inputs["many.x"], outputs["mixture_cdf on a batch.ldj"], mixture_truth(inputs, "many.x", "many.")[1], 1e-6,
                why=" for x of shape (B, d) with parameters (B, d, K)")


def mixture_tails(inputs, outputs, reference):
    z, ldj = mixture_truth(inputs, "far")
    for step, words, tol in (("mixture_cdf far out", "float64", 1e-8), ("mixture_cdf in float32", "float32", 1e-4)):
        got = outputs.arrays.get(f"{step}.ldj")
        if got is not None and got.shape == ldj.shape and not np.isfinite(got).all():
            i = laws.first_bad(inputs["far"], ~np.isfinite(got))
            raise Fail(f"Far out, in {words}, `ldj` is not finite: the slope has become 0 before its logarithm is taken.", f"x = {inputs['far'][i]:.3g}: expected {ldj[i]:.4g}, got {got[i]}")
        for name, want in (("z", z), ("ldj", ldj)):
            laws.expect(name, inputs["far"], outputs[f"{step}.{name}"], want, tol, why=f" far out, in {words}")


def mixed(scaled=lambda x, m, s: (x - m) * torch.exp(-s), weights=lambda w: w, share=lambda w, u: w * torch.sigmoid(u), collect=lambda t: t.sum(-1), log=torch.log,
          term=lambda w, b, a, s: w + b + a - s, gather=lambda t: torch.logsumexp(t, -1), z=lambda z: z, ldj=lambda ldj, z: ldj, end=lambda z, ldj: (z, ldj)):
    """z and ldj of the mixture, piece by piece, for the misconceptions to deviate from."""

    def mixture_cdf(x, w, m, s):
        u, w = scaled(x[..., None], m, s), weights(w)
        cdf = collect(share(w, u))
        return end(z(cdf), ldj(gather(term(log(w), F.logsigmoid(u), F.logsigmoid(-u), s)), cdf))

    return mixture_cdf


def before_the_sigmoid(x, w, m, s):
    u = (w * (x[..., None] - m) * torch.exp(-s)).sum(-1)
    return torch.sigmoid(u), F.logsigmoid(u) + F.logsigmoid(-u) + (w * torch.exp(-s)).sum(-1).log()


def averaged_logs(x, w, m, s):
    u = (x[..., None] - m) * torch.exp(-s)
    return (w * torch.sigmoid(u)).sum(-1), (w * (F.logsigmoid(u) + F.logsigmoid(-u) - s)).sum(-1)


def plainly(rest):
    """The formula as it stands in the book, with 1 - sigmoid(u) by `rest`: the slope underflows before its logarithm."""

    def mixture_cdf(x, w, m, s):
        u = (x[..., None] - m) * torch.exp(-s)
        return (w * torch.sigmoid(u)).sum(-1), (w * torch.sigmoid(u) * rest(u) * torch.exp(-s)).sum(-1).log()

    return mixture_cdf


wrong = mistakes(mixed)
UNDERFLOW = "The slope is formed first and its logarithm taken afterwards: far out it rounds to 0, and ldj becomes -inf."
MIXTURE = Exercise(
    id="mixture_cdf", title="The CDF of a mixture as a flow", minutes=20, difficulty=3,
    hints=(
        "z is a weighted sum of sigmoids over the last dimension. The slope of sigmoid(u) is sigmoid(u) sigmoid(-u), times the slope of u in x.",
        "For ldj stay in logarithms: the logarithm of a sum of terms is `torch.logsumexp` of their logarithms, and `F.logsigmoid` is the logarithm of a sigmoid that never underflows. Each term of the slope is a product of four factors: its logarithm has four summands.",
    ),
    inputs=mixture_inputs, reference=flowkit_class("elementwise", "mixture_cdf"),
    cases=(
        Case("z is the mixture's CDF", 2, mixture_values),
        Case("ldj = log dz/dx, for each entry", 3, mixture_slopes),
        Case("finite and right in the tails, out to 300", 2, mixture_tails),
        Case("gradients reach the parameters", 1, lambda i, o, r: gradient_arrives(o, "", "z and ldj", "the means")),
    ),
    misconceptions=(
        wrong("ldj_no_scale", "missing term", "ldj", "In `ldj` the slope of the inner map (x - mean) exp(-log_scale) is missing.", term=lambda w, b, a, s: w + b + a),
        wrong("ldj_scale_sign", "sign", "ldj", "In `ldj` the log-scale has the wrong sign: a wide component has a gentle slope.", term=lambda w, b, a, s: w + b + a + s),
        wrong("ldj_one_sigmoid", "missing term", "ldj", "In `ldj` one factor of the sigmoid's slope is missing: it is sigmoid(u) sigmoid(-u).", term=lambda w, b, a, s: w + b - s),
        wrong("ldj_other_sigmoid", "missing term", "ldj", "In `ldj` one factor of the sigmoid's slope, sigmoid(u), is missing.", term=lambda w, b, a, s: w + a - s),
        wrong("ldj_no_sigmoids", "missing term", "ldj", "In `ldj` the slope of the sigmoid is missing: only weights and scales are left.", term=lambda w, b, a, s: w - s + 0 * a),
        wrong("ldj_no_weights", "missing term", "ldj", "In `ldj` the weights are missing.", term=lambda w, b, a, s: b + a - s),
        wrong("ldj_only_above", "missing term", "ldj", "In `ldj` only one factor of each term's slope is left.", term=lambda w, b, a, s: a - s),
        wrong("ldj_sigmoid_divided", "sign", "ldj", "In `ldj` one of the two sigmoids is divided by; the slope is their product.", term=lambda w, b, a, s: w + b - a - s),
        wrong("ldj_other_divided", "sign", "ldj", "In `ldj` the sigmoid itself is divided by; the slope is a product.", term=lambda w, b, a, s: w - b + a - s),
        wrong("ldj_turned", "sign", "ldj", "In `ldj` the logarithms of all factors have the opposite sign: their reciprocals are added up.", term=lambda w, b, a, s: s - (w + b + a)),
        wrong("ldj_sigmoid_squared", "sign", "ldj", "In `ldj` the slope of the sigmoid is taken to be its square; it is sigmoid(u) sigmoid(-u).", term=lambda w, b, a, s: w + 2 * b - s),
        wrong("ldj_tanh", "wrong function", "ldj", "In `ldj` a tanh stands where the logarithm of a sigmoid belongs.", term=lambda w, b, a, s: w + b - torch.tanh(b - a) - s),
        wrong("ldj_other_tanh", "wrong function", "ldj", "In `ldj` a tanh stands where the logarithm of sigmoid(u) belongs.", term=lambda w, b, a, s: w + torch.tanh(b - a) + a - s),
        wrong("ldj_weights_not_logged", "missing function", "ldj", "The weights enter the sum of logarithms as they are; among logarithms belongs their logarithm.", log=lambda w: w),
        wrong("ldj_wrong_axis", "wrong axis", "ldj", "In `ldj` the terms are added up over the points instead of over the components.", gather=lambda t: torch.logsumexp(t, 0)),
        wrong("ldj_log_of_z", "wrong function", "ldj", "`ldj` is the logarithm of z; the logarithm of the slope of z is asked for.", ldj=lambda ldj, z: z.log()),
        wrong("ldj_of_logit", "extra term", "ldj", "`ldj` holds the slope of a logit as well; here z stays the CDF.", ldj=lambda ldj, z: ldj - z.log() - torch.log1p(-z)),
        wrong("logit", "extra term", "value", "A logit is applied to the CDF, in `z` and in `ldj`; here z is the CDF itself, between 0 and 1.", z=torch.logit, ldj=lambda ldj, z: ldj - z.log() - torch.log1p(-z)),
        wrong("z_logit", "extra term", "value", "A logit is applied to the CDF; here z is the CDF itself, between 0 and 1.", z=torch.logit),
        wrong("z_log", "extra term", "value", "`z` is the logarithm of the CDF.", z=torch.log),
        wrong("upper_tail", "sign", "value", "`z` is 1 - CDF, the probability to the right of x; it should grow with x.", z=lambda z: 1 - z),
        wrong("z_no_sigmoid", "missing function", "value", "The sigmoid is missing: `z` is a straight line in x.", share=lambda w, u: w * u),
        wrong("z_tanh", "wrong function", "value", "tanh stands in the place of the sigmoid; it runs from -1 to 1, a CDF from 0 to 1.", share=lambda w, u: w * torch.tanh(u)),
        wrong("z_no_weights", "missing term", "value", "In `z` the sigmoids are added up without their weights.", share=lambda w, u: torch.sigmoid(u) + 0 * w),
        wrong("z_only_weights", "missing term", "value", "`z` adds up the weights alone: the sigmoids are missing.", share=lambda w, u: w),
        wrong("z_divided", "sign", "value", "In `z` the weights are divided by the sigmoids.", share=lambda w, u: w / torch.sigmoid(u)),
        wrong("z_added", "wrong function", "value", "In `z` weights and sigmoids are added; each sigmoid should be multiplied by its weight.", share=lambda w, u: w + torch.sigmoid(u)),
        wrong("z_no_sum", "shape", "value", "`z` still has one number for each component: the sum over the last dimension is missing.", collect=lambda t: t),
        wrong("z_sum_over_all", "reduction", "value", "`z` adds up everything to one number; only the components are added up.", collect=lambda t: t.sum()),
        wrong("z_mean", "reduction", "value", "`z` is a mean over the components; the weights already see to it that the sum is right.", collect=lambda t: t.mean(-1)),
        wrong("z_keepdim", "shape", "value", "`z` has a dimension of size 1 too many, left over from the sum.", collect=lambda t: t.sum(-1, keepdim=True)),
        wrong("z_wrong_axis", "wrong axis", "value", "In `z` the sum runs over the points instead of over the components.", collect=lambda t: t.sum(0)),
        wrong("scale_sign", "sign", "value", "x - mean is multiplied by exp(log_scale), in `z` and in `ldj`; a large scale should make the step wide, not steep.", scaled=lambda x, m, s: (x - m) * torch.exp(s), term=lambda w, b, a, s: w + b + a + s),
        wrong("z_scale_sign", "sign", "value", "x - mean is multiplied by exp(log_scale); a large scale should make the step wide, not steep.", scaled=lambda x, m, s: (x - m) * torch.exp(s)),
        wrong("scale_not_exp", "missing function", "value", "x - mean is divided by log_scale itself; it is the logarithm of the scale.", scaled=lambda x, m, s: (x - m) / s),
        wrong("scale_times_log", "missing function", "value", "x - mean is multiplied by -log_scale; it is exp(-log_scale) that is meant.", scaled=lambda x, m, s: (x - m) * -s),
        wrong("scale_added", "wrong function", "value", "exp(-log_scale) is added to x - mean; it should multiply it.", scaled=lambda x, m, s: x - m + torch.exp(-s)),
        wrong("scale_log", "wrong function", "value", "A logarithm is taken of -log_scale, which is a logarithm already: exp is what undoes it.", scaled=lambda x, m, s: (x - m) * (-s).log()),
        wrong("scale_forgotten", "missing term", "value", "The scales are not used: all components are equally wide.", scaled=lambda x, m, s: x - m, term=lambda w, b, a, s: w + b + a),
        wrong("z_scale_forgotten", "missing term", "value", "x - mean is not divided by the scale.", scaled=lambda x, m, s: x - m),
        wrong("x_forgotten", "missing term", "value", "x does not enter at all: only the means are scaled.", scaled=lambda x, m, s: -m * torch.exp(-s)),
        wrong("mean_sign", "sign", "value", "The means are added to x instead of being subtracted.", scaled=lambda x, m, s: (x + m) * torch.exp(-s)),
        wrong("mean_after_scale", "order", "value", "x is scaled before the mean is subtracted.", scaled=lambda x, m, s: x * torch.exp(-s) - m),
        wrong("mean_forgotten", "missing term", "value", "The means are not used: all components stand at 0.", scaled=lambda x, m, s: x * torch.exp(-s)),
        wrong("weights_softmaxed", "extra term", "value", "The weights are put through a softmax, though they are normalised already.", weights=lambda w: w.softmax(-1)),
        wrong("weights_mean", "missing term", "value", "The weights are not used: all components count alike.", weights=lambda w: torch.ones_like(w) / w.shape[-1]),
        wrong("weights_left_out", "missing term", "value", "The components are added up without their weights, so z rises beyond 1.", weights=torch.ones_like),
        wrong("ldj_sign", "sign", "ldj", "`ldj` has the wrong sign: it is the log-slope of the inverse map.", ldj=lambda ldj, z: -ldj),
        wrong("ldj_slope", "missing function", "ldj", "`ldj` is the slope dz/dx itself; its logarithm is asked for.", ldj=lambda ldj, z: ldj.exp()),
        wrong("ldj_summed", "reduction", "ldj", "`ldj` is summed over the entries of x; here every entry keeps its own.", ldj=lambda ldj, z: ldj.sum(-1)),
        wrong("ldj_zero", "missing term", "ldj", "`ldj` is zero everywhere, though the CDF is no straight line of slope 1.", ldj=lambda ldj, z: 0 * ldj),
        wrong("exchanged", "exchanged", "value", "z and ldj are returned in the wrong order.", end=lambda z, ldj: (ldj, z)),
        wrong("detached", "detached", "gradient", "The result is cut off from the computation graph (detach, no_grad or numpy), so nothing could be trained through it.", end=lambda z, ldj: (z.detach(), ldj.detach())),
        wrong("ldj_detached", "detached", "gradient", "`ldj` is cut off from the computation graph, so training would not feel it.", end=lambda z, ldj: (z, ldj.detach())),
        Misconception("ldj_jensen", "order", "ldj", "In `ldj` the logarithms of the components are averaged; the slopes must be added first, and then the logarithm taken.", function(averaged_logs)),
        Misconception("mixed_before", "order", "value", "The components are mixed before the sigmoid; it is the sigmoids that are mixed.", function(before_the_sigmoid)),
        Misconception("underflow", "order", "ldj", UNDERFLOW, function(plainly(lambda u: torch.sigmoid(-u)))),
        Misconception("underflow_rest", "order", "ldj", UNDERFLOW, function(plainly(lambda u: 1 - torch.sigmoid(u)))),
    ),
    compare=tuple(f"{step}.{name}" for step in ("mixture_cdf", "mixture_cdf on a batch", "mixture_cdf far out", "mixture_cdf in float32") for name in ("z", "ldj")) + ("gradient.along",),
    picture=pictures.against_reference(("mixture_cdf on the line.z", "mixture_cdf on the line.ldj"), "line", ("z", "ldj"), (-6, 6)),
)


# --- log_abs_det_jacobian --------------------------------------------------------------------------------------------

LINEAR, BENT = ("a linear map", "a reflection"), ("a spiral", "a bend", "one dimension")
SMALL = "a shrinking map"


def field_inputs(rng):
    D = 3
    A, R = (np.eye(D) + 0.6 * rng.standard_normal((D, D)) for _ in range(2))
    A[0] *= np.sign(np.linalg.det(A))
    R[0] *= -np.sign(np.linalg.det(R))
    w = rng.standard_normal(D)
    u = rng.standard_normal(D)
    u += (1.5 - w @ u) * w / (w @ w)  # w.u = 1.5: the bend stretches along w, and never folds
    x = {f"{name} x": 0.8 * rng.standard_normal((6, d)) for name, d in (("a linear map", D), ("a reflection", D), ("a spiral", 2), ("a bend", D), ("one dimension", 1))}
    return x | {f"{SMALL} x": rng.standard_normal((3, 40)), "A": A, "R": R, "u": u, "w": w}


def field_truth(name, i):
    x = i[f"{name} x"]
    if name in LINEAR:
        return np.full(len(x), np.linalg.slogdet(i["A" if name == LINEAR[0] else "R"])[1])
    if name == "a spiral":
        return 2 * x[:, 0]
    if name == "a bend":
        return np.log1p((1 - np.tanh(x @ i["w"]) ** 2) * (i["w"] @ i["u"]))
    if name == "one dimension":
        return np.log(np.cosh(x[:, 0]))
    return np.full(len(x), x.shape[1] * np.log(1e-12))


def field_values(names):
    def judge(inputs, outputs, reference):
        for name in names:
            not_nan(outputs, f"{name}.ldj", f"For {name} the result holds NaN values: the logarithm of a negative determinant.")
            laws.expect("log|det J|", inputs[f"{name} x"], outputs[f"{name}.ldj"], field_truth(name, inputs), 1e-6, why=f" for {name}")

    return judge


def field_shapes(inputs, outputs, reference):
    shape_is(outputs, "a bend.ldj", (len(inputs["a bend x"]),), "(B,)")
    shape_is(outputs, "one row.ldj", (1,), "(B,)")
    for name in LINEAR + BENT:
        got = outputs[f"{name}.x after"]
        if got.shape != inputs[f"{name} x"].shape or not np.array_equal(got, inputs[f"{name} x"]):
            raise Fail("The input `x` was changed in place: the caller's tensor was overwritten.")


def small_determinants(inputs, outputs, reference):
    got = outputs.arrays.get(f"{SMALL}.ldj")
    if got is not None and np.isinf(got).any():
        raise Fail("In 40 dimensions a map that shrinks by 1e-12 has a determinant of 1e-480: computed as a number it is 0, and its logarithm infinite.")
    field_values((SMALL,))(inputs, outputs, reference)


def each_jacobian(f, x):
    """dz/dx (B, D, D), [b, out, in]."""
    return torch.func.vmap(torch.func.jacrev(f))(x)


def slog(J):
    return torch.linalg.slogdet(J)[1]


def log_det_by(jacobian=each_jacobian, log=slog, end=lambda ldj: ldj):
    def log_abs_det_jacobian(f, x):
        return end(log(jacobian(f, x)))

    return log_abs_det_jacobian


def diagonal(J):
    return J.diagonal(dim1=-2, dim2=-1)


wrong = mistakes(log_det_by)
LOG_DET = Exercise(
    id="log_abs_det_jacobian", title="The Jacobian of any function", minutes=15, difficulty=3,
    hints=(
        "`torch.func.jacrev(f)` is a function that gives the Jacobian of f at one point; `torch.func.vmap` applies it to every row. A loop over the outputs with `torch.autograd.grad` does the same.",
        "Of a batch of matrices (B, D, D), `torch.linalg.slogdet` gives the sign and the logarithm of the size of each determinant, without ever forming the determinant itself.",
    ),
    inputs=field_inputs, reference=lambda: (log_det_by(),),
    cases=(
        Case("one number for each row, x left as it was", 1, field_shapes),
        Case("linear maps: log|det A|, whatever the sign of det A", 2, field_values(LINEAR)),
        Case("maps that bend: each row has its own", 3, field_values(BENT)),
        Case("determinants too small for a number", 2, small_determinants),
    ),
    misconceptions=(
        wrong("no_log", "missing function", "value", "The determinant is returned without its logarithm.", log=lambda J: torch.linalg.det(J).abs()),
        wrong("no_log_no_abs", "missing function", "value", "The determinant itself is returned: absolute value and logarithm are missing.", log=torch.linalg.det),
        wrong("no_abs", "missing function", "value", "The absolute value is missing: a map that reflects has a negative determinant, which has no logarithm.", log=torch.logdet),
        wrong("underflow", "order", "value", "The determinant is formed first and its logarithm taken afterwards; in many dimensions it under- or overflows, and nothing is left for the logarithm.", log=lambda J: torch.linalg.det(J).abs().log()),
        wrong("underflow_no_abs", "missing function", "value", "The absolute value is missing (and the determinant is formed before its logarithm, so it may underflow).", log=lambda J: torch.linalg.det(J).log()),
        wrong("only_sign", "exchanged", "value", "The sign of the determinant is returned; slogdet gives two things, and the second is the logarithm.", log=lambda J: torch.linalg.slogdet(J)[0]),
        wrong("diagonal_only", "missing term", "value", "Only the diagonal of the Jacobian is used; that is enough for triangular matrices only.", log=lambda J: diagonal(J).abs().log().sum(-1)),
        wrong("columns_added", "reduction", "value", "The outputs are added up before they are differentiated: this gives the sums of the Jacobian's columns, not the Jacobian.", log=lambda J: J.sum(-2).abs().log().sum(-1)),
        wrong("rows_added", "reduction", "value", "The Jacobian is summed over its inputs, and the logarithms of these sums are added; a determinant is something else.", log=lambda J: J.sum(-1).abs().log().sum(-1)),
        wrong("trace", "wrong function", "value", "This is the trace of the Jacobian; its log-determinant is asked for.", log=lambda J: diagonal(J).sum(-1)),
        wrong("log_trace", "wrong function", "value", "This is the logarithm of the trace; the determinant is asked for.", log=lambda J: diagonal(J).sum(-1).abs().log()),
        wrong("norm", "wrong function", "value", "The size of the Jacobian is measured by its norm; it is the determinant that measures how volumes grow.", log=lambda J: torch.linalg.matrix_norm(J).log()),
        wrong("all_entries", "wrong function", "value", "The logarithms of all entries of the Jacobian are added; that is not its determinant.", log=lambda J: J.abs().log().sum((-1, -2))),
        wrong("negative", "sign", "value", "The sign is wrong: this is the log-determinant of the inverse map.", end=lambda ldj: -ldj),
        wrong("squared", "extra term", "value", "The determinant of J^T J is the square of the one that is asked for: the result is twice too large.", end=lambda ldj: 2 * ldj),
        wrong("mean_log", "reduction", "value", "The log-determinant is divided by the number of dimensions.", log=lambda J: slog(J) / J.shape[-1]),
        wrong("log2", "wrong function", "value", "The logarithm is to base 2; log-densities are in nats, to base e.", end=lambda ldj: ldj / math.log(2)),
        wrong("summed", "reduction", "value", "The whole batch is summed, or treated as one long vector with one determinant; every row needs its own number, shape (B,).", end=lambda ldj: ldj.sum()),
        wrong("averaged", "reduction", "value", "The batch is averaged; every row needs its own number, shape (B,).", end=lambda ldj: ldj.mean()),
        wrong("column", "shape", "value", "The result has shape (B, 1); it should be (B,).", end=lambda ldj: ldj[:, None]),
        wrong("first_row", "reduction", "value", "The Jacobian of the first row is used for all rows; a map that bends has another one at each point.", jacobian=lambda f, x: each_jacobian(f, x)[:1].expand(len(x), -1, -1)),
        wrong("whole_batch", "wrong axis", "value", "The Jacobian is that of the whole batch, of shape (B, D, B, D); each row's own matrix (D, D) is wanted, such as `torch.func.vmap` gives.", jacobian=lambda f, x: torch.func.jacrev(f)(x)),
        wrong("mean_jacobian", "reduction", "value", "The Jacobians of all rows are averaged; each row has its own.", jacobian=lambda f, x: each_jacobian(f, x).mean(0).expand(len(x), -1, -1)),
        wrong("at_zero", "constant", "value", "The Jacobian is taken at the origin; each row needs it at its own point.", jacobian=lambda f, x: each_jacobian(f, 0 * x)),
        wrong("at_z", "wrong function", "value", "The Jacobian is taken at f(x); it is needed at x.", jacobian=lambda f, x: each_jacobian(f, f(x))),
    ),
    compare=tuple(f"{name}.ldj" for name in (*LINEAR, *BENT, SMALL)) + ("one row.ldj",),
    picture=pictures.agreement(tuple(f"{name}.ldj" for name in (*LINEAR, *BENT)), "log|det J|, all rows"),
)


# --- flow ------------------------------------------------------------------------------------------------------------

SAMPLES = 3000
BOX, CELLS = 10.0, 50  # the square over which the density is integrated
# Of Kolmogorov's distance times sqrt(n): passed by chance in 2 exp(-2 * 2.8^2) = 3e-7 of the draws; of a correlation: 6 standard errors.
DISTANCE, CORRELATION = 2.8, 6.0


def flow_inputs(rng):
    found = {}
    for size in SIZES:
        D = int(size[2])
        found |= {f"{size}{k}": v for k, v in {
            "a": rng.uniform(0.15, 0.5, D) * rng.choice([-1, 1], D), "b": rng.uniform(0.1, 0.3, D) * rng.choice([-1, 1], D),
            "loc": rng.uniform(-0.8, 0.8, D), "scale": rng.uniform(0.5, 0.75, D) ** rng.choice([-0.8, 1], D), "x": rng.standard_normal((8, D)), "r": rng.standard_normal(8),
            "direction": rng.standard_normal(D), "nudges": laws.STEP * laws.OFFSETS, "noise": rng.integers(2**31), "n": np.array(SAMPLES)}.items()}
    from flowkit import plotting

    return found | {"D=2 grid": plotting.grid_points((-BOX, BOX) * 2, CELLS).astype(float)}


def warped(i, size, x):
    """z and ldj of autograder.probes.lesson01.Warp, in numpy."""
    a, b, x1 = i[size + "a"], i[size + "b"], x[:, :1]
    scale = np.concatenate([np.broadcast_to(a[:1], x1.shape), a[1:] * np.tanh(x1)], 1)
    shift = np.concatenate([np.broadcast_to(b[:1], x1.shape), b[1:] * x1**2], 1)
    return x * np.exp(scale) + shift, scale.sum(1)


def flow_truth(i, size, x):
    z, ldj = warped(i, size, x)
    return normal(z, i[size + "loc"], i[size + "scale"]).sum(1) + ldj


each_size = every_size(SIZES)


def flow_shapes(i, o, size):
    B, D = i[size + "x"].shape
    for key, want, letters in (("log_prob.log_prob", (B,), "(B,)"), ("log_prob of one row.log_prob", (1,), "(B,)"), ("sample.x", (SAMPLES, D), "(n, D)"), ("sample of three.x", (3, D), "(n, D)")):
        got = o[size + key].shape
        if got != want:
            raise Fail(f"With D = {D} {key.split(' ')[0].split('.')[0]} returns shape {got}; it should be {letters} = {want}.")
    left_alone(i, o, f"{size}log_prob.x after", f"{size}x")


def flow_density(i, o, size):
    x, got = i[size + "x"], o[size + "log_prob.log_prob"]
    if got.shape != (len(x),):
        raise Fail(f"`log_prob` has shape {got.shape} for {len(x)} points; it should be (B,) = {(len(x),)}.")
    laws.expect("log p(x)", x, got, flow_truth(i, size, x), 1e-5)


def flow_integral(inputs, outputs, reference):
    got, cell = outputs["D=2 log_prob on a grid.log_prob"], (2 * BOX / CELLS) ** 2
    if got.shape != (CELLS**2,):
        raise Fail(f"`log_prob` has shape {got.shape} for {CELLS**2} points.")
    volume = np.exp(np.minimum(got, 50.0)).sum() * cell
    if abs(volume - 1) > 1e-2:
        raise Fail(f"exp(log_prob) integrates to {volume:.3g} over the plane; a density integrates to 1.")


def flow_samples(i, o, size):
    """The latent points of the samples are independent and follow the base."""
    x = o[size + "sample.x"].astype(float)
    D = i[size + "x"].shape[1]
    if x.shape != (SAMPLES, D):
        raise Fail(f"sample({SAMPLES}) has shape {x.shape}; it should be (n, D) = {(SAMPLES, D)}.")
    if len(np.unique(x.round(9), axis=0)) < SAMPLES / 2:
        raise Fail("The samples repeat themselves: each of the n points needs noise of its own.")
    u = (warped(i, size, x)[0] - i[size + "loc"]) / i[size + "scale"]
    for d in range(D):
        values = np.sort(u[:, d])
        F_ = 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))
        distance = np.abs(F_ - (np.arange(SAMPLES) + 0.5) / SAMPLES).max() * math.sqrt(SAMPLES)
        if distance > DISTANCE:
            raise Fail("The samples do not follow the flow's density.", f"carried to latent space, coordinate {d + 1} of D = {D} has mean {values.mean() * i[size + 'scale'][d] + i[size + 'loc'][d]:.3g} and "
                       f"standard deviation {values.std() * i[size + 'scale'][d]:.3g}, the base has {i[size + 'loc'][d]:.3g} and {i[size + 'scale'][d]:.3g}")
    joint = np.concatenate([u[1:], u[:-1]], 1)  # each coordinate beside the others, and beside those of the row before
    off = np.abs(np.corrcoef(joint.T) - np.eye(2 * D)).max() * math.sqrt(SAMPLES)
    if off > CORRELATION:
        raise Fail("The samples' coordinates or rows depend on each other; the base's are independent.")


class PlainFlow(nn.Module):
    """A flow in its plainest form, one method a step, for the misconceptions to deviate from."""

    def __init__(self, base, transform):
        super().__init__()
        self.base, self.transform = base, transform

    def towards(self, x):
        return self.transform.forward(x)

    def base_log_prob(self, z):
        return self.base.log_prob(z).sum(-1)

    def log_prob(self, x):
        z, ldj = self.towards(x)
        return self.join(self.base_log_prob(z), ldj)

    def join(self, log_p, ldj):
        return log_p + ldj

    def noise(self, n):
        return self.base.sample((n,))

    def back(self, z):
        return self.transform.inverse(z)

    def sample(self, n):
        return self.back(self.noise(n))


def no_grad(self, x):
    with torch.no_grad():
        z, ldj = self.transform.forward(x)
        return self.join(self.base_log_prob(z), ldj)


def towards_by_inverse(self, x):
    z = self.transform.inverse(x)
    return z, -self.transform.forward(z)[1]


wrong = deviating(PlainFlow)
NOT_ADDED = "The base's log-densities of the coordinates are not added up: the sum over the dimensions is missing, so log_prob is not (B,)."
FLOW = Exercise(
    id="flow", title="A flow", minutes=15, difficulty=2,
    hints=(
        "Density: carry x to z, ask the base, add ldj. Samples: draw from the base, carry z back to x.",
        "`base.log_prob(z)` has one number for each coordinate, shape (B, D). Independent coordinates have a product of densities: the logarithms are summed over the last dimension. `base.sample((n,))` draws n points of shape (D,).",
    ),
    inputs=flow_inputs, reference=lambda: (PlainFlow,),
    cases=(
        Case("shapes: log_prob (B,), sample (n, D); x left as it was", 1, each_size(flow_shapes)),
        Case("log_prob in closed form", 3, each_size(flow_density)),
        Case("the density integrates to 1", 1, flow_integral),
        Case("samples agree with the density", 4, each_size(flow_samples)),
        Case("gradients reach the transform", 1, each_size(lambda i, o, size: gradient_arrives(o, size, "log_prob", "the weights of the transform"))),
    ),
    misconceptions=(
        wrong("ldj_sign", "sign", "value", "The transform's ldj is subtracted; from data to latent it is added.", join=lambda self, p, ldj: p - ldj),
        wrong("no_ldj", "missing term", "value", "The transform's ldj is not used: log_prob is the base's density at z, and forgets how the space was stretched.", join=lambda self, p, ldj: p),
        wrong("only_ldj", "missing term", "value", "log_prob holds only the transform's ldj; the base's density is missing.", join=lambda self, p, ldj: ldj),
        wrong("ldj_det", "extra term", "value", "ldj is exponentiated before it is added; it is the logarithm already.", join=lambda self, p, ldj: p + ldj.exp()),
        wrong("ldj_log", "extra term", "value", "A logarithm is taken of ldj, which is the logarithm already.", join=lambda self, p, ldj: p + ldj.abs().log()),
        wrong("ldj_mean", "reduction", "value", "ldj is averaged over the batch; every row has its own.", join=lambda self, p, ldj: p + ldj.mean()),
        wrong("ldj_batch_sum", "reduction", "value", "ldj is summed over the batch; every row has its own.", join=lambda self, p, ldj: p + ldj.sum()),
        wrong("no_sum", "shape", "value", NOT_ADDED, base_log_prob=lambda self, z: self.base.log_prob(z)),
        wrong("no_sum_but_fitted", "shape", "value", "The sum over the dimensions is missing, and ldj was given a dimension to make it fit: log_prob has one number for each coordinate, not for each row.", base_log_prob=lambda self, z: self.base.log_prob(z), join=lambda self, p, ldj: p + ldj[:, None]),
        wrong("unpacked_exchanged", "exchanged", "value", "z and ldj are unpacked in the wrong order: forward returns z first.", towards=lambda self, x: self.transform.forward(x)[::-1]),
        wrong("base_detached", "detached", "gradient", "The base's term is cut off from the computation graph, so training would feel ldj only.", base_log_prob=lambda self, z: self.base.log_prob(z).sum(-1).detach()),
        wrong("mean_for_sum", "reduction", "value", "The base's log-densities are averaged over the dimensions; independent coordinates multiply their densities, so the logarithms are summed.", base_log_prob=lambda self, z: self.base.log_prob(z).mean(-1)),
        wrong("sum_over_all", "reduction", "value", "The base's log-densities are summed over the batch as well; every row has its own.", base_log_prob=lambda self, z: self.base.log_prob(z).sum()),
        wrong("sum_over_batch", "wrong axis", "value", "The base's log-densities are summed over the batch instead of over the dimensions.", base_log_prob=lambda self, z: self.base.log_prob(z).sum(0)),
        wrong("keepdim", "shape", "value", "The dimension that was summed over is still there, so adding ldj makes a table of (B, B).", base_log_prob=lambda self, z: self.base.log_prob(z).sum(-1, keepdim=True)),
        wrong("first_coordinate", "missing term", "value", "Only the first coordinate's density is used.", base_log_prob=lambda self, z: self.base.log_prob(z)[:, 0]),
        wrong("base_at_x", "wrong function", "value", "The base's density is asked at x; it is a density of z.", log_prob=lambda self, x: self.join(self.base_log_prob(x), self.towards(x)[1])),
        wrong("no_transform", "missing function", "value", "log_prob does not use the transform at all.", log_prob=lambda self, x: self.base_log_prob(x)),
        wrong("by_inverse", "direction", "forward", "log_prob carries x through the inverse; forward is the way from data to latent.", towards=towards_by_inverse),
        wrong("inverse_with_ldj", "direction", "forward", "log_prob asks the base at inverse(x); forward is the way from data to latent.", towards=lambda self, x: (self.transform.inverse(x), self.transform.forward(x)[1])),
        wrong("density", "missing function", "value", "log_prob returns the density itself; its logarithm is asked for.", log_prob=lambda self, x: PlainFlow.log_prob(self, x).exp()),
        wrong("base_density", "missing function", "value", "The base's density is used without its logarithm.", base_log_prob=lambda self, z: self.base.log_prob(z).sum(-1).exp()),
        wrong("negative", "sign", "value", "log_prob has the opposite sign: this is a loss.", log_prob=lambda self, x: -PlainFlow.log_prob(self, x)),
        wrong("no_grad", "detached", "gradient", "log_prob is cut off from the computation graph (no_grad or detach), so a flow could not be trained.", log_prob=no_grad),
        wrong("standard_normal", "constant", "value", "log_prob takes the base to be a standard normal, whatever was handed in.", base_log_prob=lambda self, z: laws.normal_log_prob(z)),
        wrong("sample_forward", "direction", "inverse", "sample carries noise through forward; inverse is the way from latent to data.", back=lambda self, z: self.transform.forward(z)[0]),
        wrong("sample_is_noise", "missing function", "inverse", "sample returns the base's noise; it has not been carried to data space.", back=lambda self, z: z),
        wrong("sample_standard_normal", "constant", "inverse", "sample draws standard normal noise, whatever the base is.", noise=lambda self, n: torch.randn(n, len(self.base.mean))),
        wrong("sample_uniform", "wrong function", "inverse", "sample draws uniform noise; it should come from the base.", noise=lambda self, n: torch.rand(n, len(self.base.mean))),
        wrong("sample_the_mean", "missing function", "inverse", "sample carries the base's mean to data space, n times the same point.", noise=lambda self, n: self.base.mean.expand(n, -1)),
        wrong("sample_once", "reduction", "inverse", "One point is drawn and repeated n times; every sample needs noise of its own.", noise=lambda self, n: self.base.sample().expand(n, -1)),
        wrong("sample_one_number", "wrong axis", "inverse", "All coordinates of a sample share one number of noise; they should be independent.", noise=lambda self, n: self.base.mean + self.base.stddev * torch.randn(n, 1)),
        wrong("sample_one", "shape", "inverse", "sample draws one point; n are asked for.", noise=lambda self, n: self.base.sample((1,))),
        wrong("sample_a_pair", "type", "inverse", "sample returns a pair; it should return the points alone, (n, D).", sample=lambda self, n: self.transform.forward(self.noise(n))),
        wrong("sample_transposed", "wrong axis", "inverse", "sample returns (D, n); the points are the rows, (n, D).", sample=lambda self, n: PlainFlow.sample(self, n).T),
    ),
    compare=tuple(f"{size}{key}" for size in SIZES for key in ("log_prob.log_prob", "log_prob of one row.log_prob", "sample.x", "sample of three.x", "gradient.along")),
    picture=pictures.densities("D=2 log_prob on a grid.log_prob", BOX, CELLS, 4.0),
)


# --- compose ---------------------------------------------------------------------------------------------------------

def compose_inputs(rng):
    D = 2
    A = np.array([[1.0, rng.uniform(0.4, 0.8)], [-rng.uniform(0.4, 0.8), 1.0]]) * rng.uniform(0.7, 1.4)
    return layer_inputs(rng, D) | {"A": A, "shift": rng.standard_normal(D), "k": rng.uniform(0.6, 1.8, D), "a": rng.uniform(0.3, 0.6, D), "b": rng.uniform(0.3, 0.6, D)} | {
        "direction": rng.standard_normal(D), "c": rng.standard_normal((8, D)), "r": rng.standard_normal(8), "nudges": laws.STEP * laws.OFFSETS} | pictures.grid()


def in_order(inputs, outputs, reference):
    laws.moves(inputs, outputs)
    laws.expect("z", inputs["x"], outputs["forward.z"], reference["forward.z"], 1e-6, why=": the transforms run in the order of the list, each on the result of the one before")


def running_sum(inputs, outputs, reference):
    in_order(inputs, outputs, reference)
    laws.shapes(inputs, outputs)
    laws.ldj_is_log_det(inputs, outputs)


def one_alone(inputs, outputs, reference):
    laws.expect("z", inputs["x"], outputs["forward with one transform.z"], reference["forward with one transform.z"], 1e-6, why=" for a list of one transform")
    laws.expect("ldj", inputs["x"], outputs["forward with one transform.ldj"], reference["forward with one transform.ldj"], 1e-6, why=" for a list of one transform")
    laws.expect("x", inputs["z"], outputs["inverse with one transform.x"], reference["inverse with one transform.x"], 1e-6, why=" for a list of one transform")


def all_registered(inputs, outputs, reference):
    laws.moves(inputs, outputs)
    found, there = outputs["parameters.found"]
    if found < there:
        raise Fail(f"parameters() of your Compose gives {found} of the {there} weights of its layers: kept in a plain list, layers are not found by PyTorch.")
    gradient_arrives(outputs, "", "z and ldj", "the weights of the layers")


class PlainCompose(nn.Module):
    """Compose in its plainest form, for the misconceptions to deviate from."""

    def __init__(self, transforms):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def order(self):
        return list(self.transforms)

    def back(self):
        return list(self.transforms)[::-1]

    def start(self, x):
        return torch.zeros(len(x))

    def add(self, total, ldj):
        return total + ldj

    def end(self, total, n):
        return total

    def forward(self, x):
        z, total = x, self.start(x)
        for t in self.order():
            z, ldj = t.forward(z)
            total = self.add(total, ldj)
        return z, self.ldj(self.end(total, len(self.transforms)))

    def ldj(self, total):
        return total

    def inverse(self, z):
        x = z
        for t in self.back():
            x = t.inverse(x)
        return x


class ListCompose(PlainCompose):
    def __init__(self, transforms):
        super().__init__([])
        self.kept = tuple(transforms)

    def order(self):
        return self.kept

    def back(self):
        return self.kept[::-1]


def each_on_x(self, x):
    z, total = x, self.start(x)
    for t in self.order():
        z, ldj = t.forward(x)
        total = total + ldj
    return z, total


def ldj_at_x(self, x):
    z, total = x, self.start(x)
    for t in self.order():
        total = total + t.forward(x)[1]
        z = t.forward(z)[0]
    return z, total


def ldj_after(self, x):
    z, total = x, self.start(x)
    for t in self.order():
        z = t.forward(z)[0]
        total = total + t.forward(z)[1]
    return z, total


def unpacked_exchanged(self, x):
    z, total = x, self.start(x)
    for t in self.order():
        ldj, z = t.forward(z)
        total = total + ldj
    return z, total


def start_exchanged(self, x):
    z, total = self.start(x), x
    for t in self.order():
        z, ldj = t.forward(z)
        total = total + ldj
    return z, total


def turned_in_place(self, z):
    self.kept = self.kept[::-1]
    for t in self.kept:
        z = t.inverse(z)
    return z


def inverse_of_z(self, z):
    x = z
    for t in self.back():
        x = t.inverse(z)
    return x


def forward_backwards(self, z):
    for t in self.back():
        z = t.forward(z)[0]
    return z


def forward_again(self, z):
    for t in self.order():
        z = t.forward(z)[0]
    return z


wrong = deviating(PlainCompose)
COMPOSE = Exercise(
    id="compose", title="One transform after the other", minutes=12, difficulty=2,
    hints=(
        "Keep the running point and a running sum. Each transform acts on what the one before has left, and its ldj belongs to that place.",
        "To take off shoes and socks, begin with what was put on last: inverse runs through `reversed(self.transforms)`. `nn.ModuleList` is a list in which PyTorch finds the weights.",
    ),
    inputs=compose_inputs, reference=flowkit_class("core", "Compose"),
    cases=(
        Case("shapes: z (B, D), ldj (B,), x (B, D)", 1, once(laws.shapes)),
        Case("forward: in the order of the list", 2, in_order),
        Case("ldj = log|det dz/dx| of the whole", 3, running_sum),
        Case("inverse undoes forward, and forward inverse", 2, once(laws.round_trip)),
        Case("a list of one transform", 1, one_alone),
        Case("the weights of all layers are found, and gradients reach them", 1, all_registered),
    ),
    misconceptions=(
        wrong("inverse_in_list_order", "order", "inverse", "inverse goes through the list from the front, like forward; the transform that came last must be undone first.", back=lambda self: self.order()),
        wrong("forward_backwards", "order", "forward", "forward goes through the list from the back; the first transform of the list acts first.", order=lambda self: list(self.transforms)[::-1]),
        wrong("both_backwards", "order", "forward", "Both directions run the wrong way round: forward starts with the last transform of the list, and inverse undoes the first one first.",
              order=lambda self: list(self.transforms)[::-1], back=lambda self: list(self.transforms)),
        wrong("ldj_last", "missing term", "ldj", "`ldj` is that of the last transform only; those of all transforms add up.", add=lambda self, total, ldj: ldj),
        wrong("ldj_first", "missing term", "ldj", "`ldj` is that of the first transform only; those of all transforms add up.", add=lambda self, total, ldj: torch.where(total == 0, ldj, total)),
        wrong("ldj_product", "wrong function", "ldj", "The transforms' ldj are multiplied; determinants multiply, so their logarithms add up.", start=lambda self, x: torch.ones(len(x)), add=lambda self, total, ldj: total * ldj),
        wrong("ldj_mean_of_steps", "reduction", "ldj", "`ldj` is the mean of the transforms' ldj; it should be their sum.", end=lambda self, total, n: total / n),
        wrong("ldj_starts_at_one", "constant", "ldj", "The sum of the ldj starts at 1; a map that does nothing has determinant 1 and log-determinant 0.", start=lambda self, x: torch.ones(len(x))),
        wrong("ldj_subtracted", "sign", "ldj", "The transforms' ldj are subtracted from the sum.", add=lambda self, total, ldj: total - ldj),
        wrong("ldj_at_x", "wrong function", "ldj", "Every transform's ldj is taken at x; it belongs to the point that the transform acts on, which the earlier ones have moved.", forward=ldj_at_x),
        wrong("ldj_after", "off by one", "ldj", "Every transform's ldj is taken at the point after it has acted; it belongs to the point before.", forward=ldj_after),
        wrong("returned_exchanged", "exchanged", "forward", "forward returns ldj first; it should be z, ldj.", forward=lambda self, x: PlainCompose.forward(self, x)[::-1]),
        wrong("unpacked_exchanged", "exchanged", "forward", "In forward the result of a transform is unpacked in the wrong order: z comes first, then ldj.", forward=unpacked_exchanged),
        wrong("start_exchanged", "exchanged", "forward", "forward begins with zeros for the point and with x for the sum: the two are exchanged.", forward=start_exchanged),
        wrong("each_on_x", "wrong function", "forward", "Every transform acts on x itself, so only the last one shows; each should act on the result of the one before.", forward=each_on_x),
        wrong("inverse_each_on_z", "wrong function", "inverse", "In inverse every transform acts on z itself; each should act on the result of the one before.", inverse=inverse_of_z),
        wrong("inverse_is_forward", "direction", "inverse", "inverse runs the transforms forward once more.", inverse=forward_again),
        wrong("inverse_forward_backwards", "direction", "inverse", "inverse goes through the list in the right order, but runs each transform forward instead of undoing it.", inverse=forward_backwards),
        wrong("inverse_nothing", "missing function", "inverse", "inverse returns z as it came: nothing is undone.", inverse=lambda self, z: z),
        wrong("last_left_out", "off by one", "forward", "The last transform of the list is left out.", order=lambda self: list(self.transforms)[:-1]),
        wrong("first_left_out", "off by one", "forward", "The first transform of the list is left out.", order=lambda self: list(self.transforms)[1:]),
        wrong("only_first", "missing term", "forward", "Only the first transform of the list acts.", order=lambda self: list(self.transforms)[:1], back=lambda self: list(self.transforms)[:1]),
        wrong("inverse_leaves_out_first", "off by one", "inverse", "inverse never undoes the first transform of the list.", back=lambda self: list(self.transforms)[:0:-1]),
        wrong("inverse_leaves_out_last", "off by one", "inverse", "inverse never undoes the last transform of the list.", back=lambda self: list(self.transforms)[-2::-1]),
        wrong("ldj_detached", "detached", "gradient", "`ldj` is cut off from the computation graph, so training would not feel the log-determinants.", add=lambda self, total, ldj: total + ldj.detach()),
        *ldj_mistakes(PlainCompose, "ldj_zero", "ldj_det", "ldj_keepdim", "ldj_batch_sum", "ldj_one_number"),
        Misconception("plain_list", "state", "parameters", "The layers are kept in a plain list or tuple, where PyTorch does not find their weights: an optimiser would train nothing.", function(ListCompose)),
        Misconception("turned_in_place", "in place", "state", "inverse turns the stored list round and leaves it so: the next call of forward runs backwards.", function(type("Turned", (ListCompose,), {"inverse": turned_in_place}))),
    ),
    compare=("forward.z", "forward.ldj", "inverse.x", "forward near.z", "x after", "forward with one transform.z", "forward with one transform.ldj", "inverse with one transform.x", "parameters.found", "gradient.along"),
    faults=lambda i, o: laws.ldj_faults(i, o), picture=pictures.warp_and_density(),
)



# --- planar, radial, sylvester: layers with weights of their own -------------------------------------------------------

RANDOM, AGAINST = 8, 6  # draws of the weights, the first two of positive numbers; and of weights that point against each other (autograder.probes.lesson01.values)
FINE = 5e-4  # step of the difference quotients: where a determinant is nearly 0 its logarithm needs more digits


def bent_inputs(rng, D, points, weights):
    x = 1.5 * rng.standard_normal((points, D))
    ways = rng.standard_normal((2, 1, D))
    line = (np.linspace(-6, 6, 121)[:, None] * ways / np.linalg.norm(ways, axis=-1, keepdims=True)).reshape(-1, D)
    against = rng.uniform(0.8, 1.4, (AGAINST, weights)) * rng.choice([-1, 1], weights) * (-1.0) ** np.arange(AGAINST)[:, None]
    free = rng.standard_normal((RANDOM, weights))
    free[1:3] = 0.8 + 0.4 * np.abs(free[1:3])
    return {"x": x, "near": laws.near(x, FINE), "step": np.array(FINE), "line": line, "draws": np.concatenate([free, against]),
            "factors": np.repeat([[0.4, 2.5], [2.5, 0.4], [1, 1]], 2, axis=0), "noise": rng.integers(2**31), "c": rng.standard_normal((points, D)), "shown": np.array(RANDOM)} | pictures.grid()


def draws(inputs):
    """The prefixes of the steps, one for each draw of the weights."""
    return ["", *(f"other weights {k}: " for k in range(1, len(inputs["draws"])))]


def for_all_weights(law):
    """A case's judge that asks `law(inputs, outputs, prefix)` for each draw of the weights."""

    def judge(inputs, outputs, reference):
        each_draw(law, inputs, outputs)

    return judge


def each_draw(law, inputs, outputs):
    """[law(inputs, outputs, prefix), ...] for each draw of the weights."""
    return [law(inputs | {prefix + "x": inputs["x"]}, outputs, prefix) for prefix in draws(inputs)]


def bent_shapes(inputs, outputs, reference):
    B, D = inputs["x"].shape
    for key, want, letters in (("forward.z", (B, D), "(B, D)"), ("forward.ldj", (B,), "(B,)"), ("forward of one row.z", (1, D), "(B, D)"), ("forward of one row.ldj", (1,), "(B,)")):
        got = outputs[key].shape
        if got != want:
            raise Fail(f"`{key.rsplit('.', 1)[1]}` from forward has shape {got}; it should be {letters} = {want}.")
    laws.moves(inputs, outputs)
    laws.rows_apart(inputs, outputs)
    left_alone(inputs, outputs, "forward.x after", "x")


def displacements(inputs, outputs, prefix):
    """z - x at the points x and on the lines; Fail if forward does nothing."""
    laws.moves(inputs, outputs, prefix)
    found = []
    for at, key in (("x", "forward.z"), ("line", "forward on lines.z")):
        z = outputs[prefix + key]
        if z.shape != inputs[at].shape:
            raise Fail(f"`z` from forward has shape {z.shape} for an x of shape {inputs[at].shape}.")
        found.append(z - inputs[at])
    return found


def bent_ldj(inputs, outputs, prefix):
    displacements(inputs, outputs, prefix)
    ldj = outputs.arrays.get(prefix + "forward.ldj")
    if ldj is not None and not np.isfinite(ldj).all():
        raise Fail("`ldj` is not finite everywhere: with some weights the determinant becomes zero or negative before its logarithm is taken.")
    laws.ldj_is_log_det(inputs, outputs, prefix)


def not_too_tight(dets):
    """Over all weights the determinants dets lie on both sides of 1, and above 0: what is constrained can still move."""
    if dets.max() < 1 + 1e-6 or dets.min() > 1 - 1e-6:
        raise Fail("The constraint is too tight: whatever the weights, the layer only " + ("squeezes" if dets.max() < 1 + 1e-6 else "stretches") + ", it never does the opposite.")


def determinants(inputs, outputs, prefix):
    """det dz/dx (B,) of the student's own forward."""
    return np.linalg.det(laws.own_jacobian(inputs, outputs, prefix)[0])


def positive_everywhere(inputs, outputs, prefix):
    """The determinant has one sign, so the map does not fold."""
    det = determinants(inputs, outputs, prefix)
    if (det <= 0).any():
        i = laws.first_bad(inputs["x"], det <= 0)
        raise Fail("With some weights forward folds space: its determinant is negative somewhere, so two points land on one. The constraint must hold for any values of the parameters.",
                   f"x = {laws.point(inputs['x'][i])}: det dz/dx = {det[i]:.3g}")


def every_weight(count, names):
    """A case's judge: the trainable numbers are at least `count(D)`, and all get a gradient."""

    def judge(inputs, outputs, reference):
        laws.moves(inputs, outputs)
        fresh = np.concatenate([np.ravel(outputs[f"forward of a fresh layer.{name}"]) for name in ("z", "ldj")])
        if not np.isfinite(fresh).all():
            raise Fail("With the values that its parameters start from, the layer gives numbers that are not finite, so a training could not begin.")
        sizes, reached = outputs["parameters.sizes"], outputs["gradient.sizes"] > 0
        wanted = count(inputs["x"].shape[1])
        if not reached.all():
            raise Fail(f"{(~reached).sum()} of the {len(reached)} parameters get no gradient from z and ldj.")
        if sizes.sum() < wanted:
            raise Fail(f"The layer has {sizes.sum()} trainable numbers; {names} together have {wanted}.")

    return judge


def no_determinant(inputs, outputs, reference):
    laws.moves(inputs, outputs)
    try:
        laws.ldj_is_log_det(inputs, outputs)
    except Fail:
        raise Fail("How `ldj` is computed is looked at when it is right.") from None
    called = [n for n, c in zip(COSTLY, outputs["forward calls"]) if c]
    if called:
        raise Fail(f"forward calls {' and '.join(called)}: the matrix determinant lemma gives ldj for one scalar product a row.")


# The outputs that a diagnosis compares: of some draws of each kind, since a fault shows in all of them or in those that go to extremes.
BENT_KEYS = tuple(f"{p}forward.{name}" for p in ("", *(f"other weights {k}: " for k in (1, 3, RANDOM, RANDOM + 2, RANDOM + 5))) for name in ("z", "ldj"))


def bent_faults(inputs, outputs):
    return laws.ldj_faults(inputs, outputs)


# --- planar ----------------------------------------------------------------------------------------------------------

def ridge(inputs, outputs, prefix):
    """The unit vectors u and w of z = x + u g(w.x), and g and its slope at the points x; Fail where z - x is no such thing."""
    x = inputs["x"]
    at_x, on_lines = displacements(inputs, outputs, prefix)
    both = np.concatenate([at_x, on_lines])
    loose = 1e-3 if outputs[prefix + "forward.z"].dtype == np.float32 else 1e-6
    _, size, ways = np.linalg.svd(both, full_matrices=False)
    if size[1] > loose * size[0]:
        raise Fail("z - x does not point along one vector u at all points.")
    u = ways[0]
    J, _ = laws.own_jacobian(inputs, outputs, prefix)
    slopes_ = np.einsum("i,bij->bj", u, J - np.eye(x.shape[1]))  # the gradient of g(w.x), a multiple of w at each point
    _, size, ways = np.linalg.svd(slopes_, full_matrices=False)
    if size[0] < 1e-6:
        raise Fail("z - x is the same at all points: forward only shifts.")
    if size[1] > 1e-4 * size[0]:
        raise Fail("z - x does not depend on w.x alone: along every other direction it should stay the same.")
    return u, ways[0], at_x @ u, slopes_ @ ways[0]


def tanh_ridge(inputs, outputs, prefix):
    """g = c tanh(k t + b) is the function whose slope is a parabola of its value: g' = c k - (k / c) g^2, with opposite signs."""
    _, _, g, slope = ridge(inputs, outputs, prefix)
    (p, q), *_ = np.linalg.lstsq(np.stack([np.ones_like(g), g**2], 1), slope, rcond=None)
    off = np.abs(p + q * g**2 - slope).max()
    if off > 1e-3 * np.abs(slope).max() or p * q > 0:
        raise Fail("Along w the displacement z - x is not u times tanh(w.x + b).")


def invertible_planar(inputs, outputs, reference):
    each_draw(unfolded, inputs, outputs)
    not_too_tight(np.concatenate(each_draw(determinants, inputs, outputs)))


def unfolded(inputs, outputs, prefix):
    """Along w the image only goes forward: w.z increases with w.x."""
    _, w, _, _ = ridge(inputs, outputs, prefix)
    before, after = inputs["line"] @ w, (inputs["line"] + displacements(inputs, outputs, prefix)[1]) @ w
    order = np.argsort(before)
    back = np.diff(after[order]) < -1e-6
    if back.any():
        i = int(np.flatnonzero(back)[np.abs(before[order][:-1][back]).argmin()])
        raise Fail("With some weights forward folds space: along w the image goes back, so two points land on one. The constraint w.u > -1 must hold for any values of the parameters.",
                   f"w.x from {before[order][i]:.3g} to {before[order][i + 1]:.3g}: w.z falls by {after[order][i] - after[order][i + 1]:.3g} (w of length 1)")


def planar_trained(inputs, outputs, reference):
    every_weight(lambda D: 2 * D + 1, "w, u and b")(inputs, outputs, reference)
    if all(abs(u @ w) > 1 - 1e-6 for u, w, _, _ in each_draw(ridge, inputs, outputs)):
        raise Fail("Whatever the weights, u points along w; it should be free to point anywhere.")


class PlainPlanar(nn.Module):
    """z = x + u' tanh(w.x + b), u' = u + (m(w.u) - w.u) w / |w|^2 with m(a) = -1 + log(1 + e^a), so that w.u' > -1."""

    def __init__(self, dim):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.b = nn.Parameter(torch.zeros(()))

    def above(self, wu):
        return -1 + F.softplus(wu)

    def pushed(self):
        wu = self.w @ self.u
        return self.u + (self.above(wu) - wu) * self.w / (self.w @ self.w)

    def height(self, x):
        return torch.tanh(x @ self.w + self.b)

    def move(self, x, u, h):
        return x + u * h[:, None]

    def slope(self, h):
        return 1 - h**2

    def det(self, u, slope, h):
        return 1 + (self.w @ u) * slope

    def log(self, det):
        return det.abs().log()

    def ldj(self, right):
        return right

    def forward(self, x):
        u, h = self.pushed(), self.height(x)
        return self.move(x, u, h), self.ldj(self.log(self.det(u, self.slope(h), h)))


def first_and_second(sizes):
    """inputs -> inputs in which the first two parameters, of `sizes` numbers each, have changed places."""

    def variant(inputs):
        d = inputs["draws"].copy()
        n = sizes(inputs["x"].shape[1])
        d[:RANDOM, :n], d[:RANDOM, n:2 * n] = inputs["draws"][:RANDOM, n:2 * n], inputs["draws"][:RANDOM, :n]
        d[RANDOM:, :n] = -(d[RANDOM:, :n] + ASIDE * d[RANDOM:, n:2 * n])
        return inputs | {"draws": d, "factors": inputs["factors"][:, ::-1]}

    return variant


wrong = deviating(PlainPlanar)
PLANAR = Exercise(
    id="planar", title="The planar layer", minutes=20, difficulty=3,
    hints=(
        "Compute u' once for the whole batch, then h = tanh(x @ w + b), shape (B,). `h[:, None] * u` spreads it over the dimensions.",
        "The Jacobian is the identity plus the column u' times the row h' w. The lemma turns its determinant into 1 plus a scalar product; h' = 1 - h^2 is the slope of tanh, and w.u' is the same for all rows.",
    ),
    inputs=lambda rng: bent_inputs(rng, 3, 16, 16), reference=lambda: (PlainPlanar,),
    cases=(
        Case("shapes: z (B, D), ldj (B,); x left as it was", 1, bent_shapes),
        Case("z = x + u tanh(w.x + b)", 2, for_all_weights(tanh_ridge)),
        Case("ldj = log|det dz/dx|, with any weights", 3, for_all_weights(bent_ldj)),
        Case("invertible with any weights: w.u > -1", 2, invertible_planar),
        Case("no determinant is computed", 1, no_determinant),
        Case("w, u and b can be trained", 1, planar_trained),
    ),
    misconceptions=(
        wrong("h_for_slope", "missing function", "ldj", "In `ldj` stands h = tanh(a) where its slope h' belongs.", slope=lambda self, h: h),
        wrong("slope_no_square", "missing function", "ldj", "The slope of tanh is taken to be 1 - h; the square of h is missing.", slope=lambda self, h: 1 - h),
        wrong("slope_plus", "sign", "ldj", "The slope of tanh is taken to be 1 + h^2; it is greatest where h = 0.", slope=lambda self, h: 1 + h**2),
        wrong("slope_of_sigmoid", "wrong function", "ldj", "h (1 - h) is the slope of a sigmoid; this is a tanh.", slope=lambda self, h: h * (1 - h)),
        wrong("slope_one", "missing term", "ldj", "In `ldj` the slope h' is missing: the determinant differs from point to point.", det=lambda self, u, s, h: 1 + self.w @ u),
        wrong("slope_square_only", "missing term", "ldj", "The slope of tanh is taken to be -h^2; the 1 is missing.", slope=lambda self, h: -h**2),
        wrong("no_wu", "missing term", "ldj", "In the determinant w.u is missing.", det=lambda self, u, s, h: 1 + s),
        wrong("slope_plus_wu", "wrong function", "ldj", "In the determinant h' and w.u are added; they should be multiplied.", det=lambda self, u, s, h: 1 + s + self.w @ u),
        wrong("slope_over_wu", "sign", "ldj", "In the determinant h' is divided by w.u.", det=lambda self, u, s, h: 1 + s / (self.w @ u)),
        wrong("no_one", "missing term", "ldj", "The 1 of the identity is missing in the determinant.", det=lambda self, u, s, h: (self.w @ u) * s),
        wrong("minus", "sign", "ldj", "In the determinant the low-rank term has the wrong sign.", det=lambda self, u, s, h: 1 - (self.w @ u) * s),
        wrong("trace", "missing function", "ldj", "`ldj` is w.u h', the trace of the low-rank term; for small weights only is log(1 + t) nearly t.", log=lambda self, det: det - 1),
        wrong("raw_u", "missing term", "ldj", "`ldj` uses the free u; z is made with the constrained one.", det=lambda self, u, s, h: 1 + (self.w @ self.u) * s),
        wrong("each_dimension", "wrong function", "ldj", "`ldj` multiplies 1 + w_i u_i h' over the dimensions, as if the Jacobian were diagonal.", det=lambda self, u, s, h: 1 + s[:, None] * self.w * u, log=lambda self, det: det.abs().log().sum(-1)),
        wrong("w_squared", "wrong function", "ldj", "In the determinant stands w.w where w.u belongs.", det=lambda self, u, s, h: 1 + (self.w @ self.w) * s),
        wrong("u_squared", "wrong function", "ldj", "In the determinant stands u.u where w.u belongs.", det=lambda self, u, s, h: 1 + (u @ u) * s),
        wrong("u_summed", "missing term", "ldj", "In the determinant the entries of u are added up without w.", det=lambda self, u, s, h: 1 + u.sum() * s),
        wrong("no_log", "missing function", "ldj", "`ldj` is the determinant itself; its logarithm is asked for.", log=lambda self, det: det.abs()),
        wrong("returned_exchanged", "exchanged", "forward", "forward returns ldj first; it should be z, ldj.", forward=lambda self, x: PlainPlanar.forward(self, x)[::-1]),
        wrong("ldj_sign", "sign", "ldj", "`ldj` has the wrong sign: it is the log-determinant of the inverse map.", ldj=lambda self, right: -right),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1); it should be (B,).", ldj=lambda self, right: right[:, None]),
        wrong("ldj_batch_sum", "reduction", "ldj", "`ldj` adds up the whole batch; every row needs its own number, shape (B,).", ldj=lambda self, right: right.sum()),
        wrong("ldj_one_number", "reduction", "ldj", "`ldj` is averaged over the batch; every row needs its own number, shape (B,).", ldj=lambda self, right: right.mean()),
        wrong("ldj_zero", "missing term", "ldj", "`ldj` is zero everywhere, though the layer does stretch space.", ldj=lambda self, right: 0 * right),
        wrong("ldj_times_dim", "extra term", "ldj", "`ldj` is multiplied by the number of dimensions; it belongs to the whole determinant already.", ldj=lambda self, right: len(self.w) * right),
        wrong("no_constraint", "missing term", "forward", "Nothing keeps w.u above -1: with some weights the layer folds space, and has no inverse.", pushed=lambda self: self.u),
        wrong("constraint_no_minus_one", "sign", "forward", "The constraint has the wrong sign: w.u is pushed below -1 instead of above.", above=lambda self, wu: -1 - F.softplus(wu)),
        wrong("constraint_softplus_lost", "missing function", "forward", "The softplus is missing in the constraint: w.u is only shifted by -1, and may still be anything.", above=lambda self, wu: -1 + wu),
        wrong("constraint_no_difference", "missing term", "forward", "The constraint adds m(w.u) along w; w.u itself must be taken away first, so that m(w.u) is what remains.", pushed=lambda self: self.u + self.above(self.w @ self.u) * self.w / (self.w @ self.w)),
        wrong("constraint_length", "missing function", "forward", "The push along w is divided by |w|; it takes |w|^2 to change w.u by the right amount.", pushed=lambda self: self.u + (self.above(self.w @ self.u) - self.w @ self.u) * self.w / self.w.norm()),
        wrong("constraint_not_divided", "missing term", "forward", "The push along w is not divided by |w|^2.", pushed=lambda self: self.u + (self.above(self.w @ self.u) - self.w @ self.u) * self.w),
        wrong("constraint_sum", "sign", "forward", "In the constraint w.u is added to m(w.u); it must be taken away.", pushed=lambda self: self.u + (self.above(self.w @ self.u) + self.w @ self.u) * self.w / (self.w @ self.w)),
        wrong("constraint_turned", "sign", "forward", "The push along w has the wrong sign: it drives w.u away from m(w.u).", pushed=lambda self: self.u - (self.above(self.w @ self.u) - self.w @ self.u) * self.w / (self.w @ self.w)),
        wrong("constraint_only_away", "missing term", "forward", "The part of u along w is taken away, but m(w.u) is not put in its place: w.u is always 0.", pushed=lambda self: self.u - (self.w @ self.u) * self.w / (self.w @ self.w)),
        wrong("constraint_u_lost", "missing term", "forward", "Only the push along w is left of u; it should be added to u.", pushed=lambda self: (self.above(self.w @ self.u) - self.w @ self.u) * self.w / (self.w @ self.w)),
        wrong("constraint_no_direction", "missing term", "forward", "The push is one number, added to all entries of u alike; it should go along w.", pushed=lambda self: self.u + (self.above(self.w @ self.u) - self.w @ self.u) / (self.w @ self.w)),
        wrong("constraint_only_w", "missing term", "forward", "u is pushed by w / |w|^2, whatever w.u is; the push should be as long as w.u is off.", pushed=lambda self: self.u + self.w / (self.w @ self.w)),
        wrong("constraint_multiplied", "sign", "forward", "The push along w is multiplied by |w|^2 where it should be divided.", pushed=lambda self: self.u + (self.above(self.w @ self.u) - self.w @ self.u) * self.w * (self.w @ self.w)),
        wrong("constraint_at_minus_one", "missing term", "forward", "w.u is always exactly -1: the determinant vanishes where w.x + b = 0, and u cannot learn.", above=lambda self, wu: -1 + 0 * wu),
        wrong("constraint_positive", "missing term", "forward", "w.u is always positive: the layer can stretch space but never squeeze it.", above=lambda self, wu: F.softplus(wu)),
        wrong("constraint_along_u", "exchanged", "forward", "The push goes along u; only along w does it change w.u without anything else.", pushed=lambda self: self.u + (self.above(self.w @ self.u) - self.w @ self.u) * self.u / (self.w @ self.w)),
        wrong("forward_no_x", "missing term", "forward", "z is the displacement alone; it should be added to x.", move=lambda self, x, u, h: u * h[:, None] + 0 * x),
        wrong("forward_minus", "sign", "forward", "The displacement is subtracted from x.", move=lambda self, x, u, h: x - u * h[:, None]),
        wrong("forward_raw_u", "missing function", "forward", "z is made with the free u; the constrained one belongs there.", move=lambda self, x, u, h: x + self.u * h[:, None]),
        wrong("forward_nothing", "missing term", "forward", "forward returns x: the displacement is missing.", move=lambda self, x, u, h: x),
        wrong("forward_no_u", "missing term", "forward", "All coordinates are moved by h alone; the points should move along u.", move=lambda self, x, u, h: x + h[:, None]),
        wrong("forward_no_h", "missing term", "forward", "All points are moved by u alone: the bend h is missing.", move=lambda self, x, u, h: x + u),
        wrong("forward_h_plus_u", "wrong function", "forward", "h and u are added; u should be multiplied by h.", move=lambda self, x, u, h: x + (h[:, None] + u)),
        wrong("forward_h_over_u", "sign", "forward", "h is divided by u; u should be multiplied by h.", move=lambda self, x, u, h: x + h[:, None] / u),
        wrong("forward_along_w", "exchanged", "forward", "The points are moved along w; they should move along u.", move=lambda self, x, u, h: x + self.w * h[:, None]),
        wrong("forward_times_x", "extra term", "forward", "The displacement is multiplied by x.", move=lambda self, x, u, h: x + x * u * h[:, None]),
        wrong("sigmoid", "wrong function", "forward", "The bend is a sigmoid; here it is a tanh.", height=lambda self, x: torch.sigmoid(x @ self.w + self.b)),
        wrong("no_tanh", "missing function", "forward", "The tanh is missing: the layer is linear.", height=lambda self, x: x @ self.w + self.b),
        wrong("tanh_before", "order", "forward", "tanh is applied to each coordinate before the scalar product with w; it belongs around w.x + b.", height=lambda self, x: torch.tanh(x) @ self.w + self.b),
        wrong("no_bias", "missing term", "forward", "b is not used: all bends happen at the origin.", height=lambda self, x: torch.tanh(x @ self.w + 0 * self.b)),
    ),
    compare=BENT_KEYS, variants=(first_and_second(lambda D: D),), faults=bent_faults, picture=pictures.warp_and_density(),
)


# --- radial ----------------------------------------------------------------------------------------------------------

def centre_and_pull(inputs, outputs, prefix):
    """alpha and beta of z = x + beta (x - x0) / (alpha + |x - x0|); Fail where z - x is no such thing."""
    x = np.concatenate([inputs["x"], inputs["line"]])
    away = np.concatenate(displacements(inputs, outputs, prefix))
    length = np.linalg.norm(away, axis=1)
    keep = length > 1e-3 * length.max()
    x, away, length = x[keep], away[keep], length[keep]
    # x0 lies on every line x + t away: least squares of what is across.
    across = np.eye(x.shape[1]) - np.einsum("bi,bj->bij", away, away) / (length**2)[:, None, None]
    x0 = np.linalg.lstsq(across.sum(0), np.einsum("bij,bj->i", across, x), rcond=None)[0]
    radius = np.linalg.norm(x - x0, axis=1)
    if (np.linalg.norm(np.einsum("bij,bj->bi", across, x - x0), axis=1) > 1e-4 * (1 + radius)).any():
        raise Fail("z - x does not point straight towards or away from one centre x0 at all points.")
    pull = (away * (x - x0)).sum(1) / radius**2  # beta / (alpha + r): its inverse is a line in r
    (slope, start), *_ = np.linalg.lstsq(np.stack([radius, np.ones_like(radius)], 1) * pull[:, None], np.ones_like(pull), rcond=None)
    if (np.abs(pull * (slope * radius + start) - 1) > 1e-3).any():
        raise Fail("The displacement is not beta (x - x0) / (alpha + r), with r the distance of each row from x0.")
    return start / slope, 1 / slope


def radial_form(inputs, outputs, prefix):
    centre_and_pull(inputs, outputs, prefix)


def radial_constraint(inputs, outputs, prefix):
    alpha, beta = centre_and_pull(inputs, outputs, prefix)
    if alpha <= 0:
        raise Fail("alpha is not positive with some weights: at r = -alpha the layer divides by zero.", f"alpha = {alpha:.3g}")
    if beta < -alpha * (1 + 1e-6):
        raise Fail("beta falls below -alpha with some weights: points near the centre are carried past it, and the layer folds space.", f"alpha = {alpha:.3g}, beta = {beta:.3g}")


def invertible_radial(inputs, outputs, reference):
    each_draw(radial_constraint, inputs, outputs)
    not_too_tight(1 + np.array([beta / alpha for alpha, beta in each_draw(centre_and_pull, inputs, outputs)]))


def log_size(det):
    return det.abs().log()


class PlainRadial(nn.Module):
    """z = x + beta (x - x0) h(r), h = 1 / (alpha + r), with alpha = exp(a) and beta = -alpha + log(1 + e^b)."""

    def __init__(self, dim):
        super().__init__()
        self.x0, self.a, self.b = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def alpha(self):
        return self.a.exp()

    def beta(self, alpha):
        return -alpha + F.softplus(self.b)

    def radius(self, away):
        return away.norm(dim=-1)

    def h(self, alpha, r):
        return 1 / (alpha + r)

    def move(self, x, away, beta, h):
        return x + beta * h[:, None] * away

    def across(self, beta, h, dim):
        return (dim - 1) * log_size(1 + beta * h)

    def along(self, beta, h, r):
        return log_size(1 + beta * h - beta * r * h**2)

    def ldj(self, right):
        return right

    def forward(self, x):
        alpha = self.alpha()
        beta, away = self.beta(alpha), x - self.x0
        r = self.radius(away)
        h = self.h(alpha, r)
        return self.move(x, away, beta, h), self.ldj(self.across(beta, h, x.shape[1]) + self.along(beta, h, r))


wrong = deviating(PlainRadial)
RADIAL = Exercise(
    id="radial", title="The radial layer", minutes=20, difficulty=4, bonus=True,
    hints=(
        "`(x - x0).norm(dim=-1)` is the distance of each row, shape (B,). Positive numbers come from `exp` or `softplus` of a free parameter; beta > -alpha is a positive number minus alpha.",
        "Across the ray all D - 1 directions are stretched alike, by 1 + beta h. Along the ray the stretch is the slope of r + beta r h(r) in r. The determinant is the product of these D stretches.",
    ),
    inputs=lambda rng: bent_inputs(rng, 3, 16, 16), reference=lambda: (PlainRadial,),
    cases=(
        Case("shapes: z (B, D), ldj (B,); x left as it was", 0.5, bent_shapes),
        Case("z = x + beta (x - x0) / (alpha + r)", 1, for_all_weights(radial_form)),
        Case("ldj = log|det dz/dx|, with any weights", 1.5, for_all_weights(bent_ldj)),
        Case("invertible with any weights: alpha > 0, beta > -alpha", 0.5, invertible_radial),
        Case("x0, alpha and beta can be trained", 0.5, every_weight(lambda D: D + 2, "x0, alpha and beta")),
    ),
    misconceptions=(
        wrong("across_dim", "off by one", "ldj", "All D directions are counted as lying across the ray; one of them lies along it.", across=lambda self, b, h, D: D * log_size(1 + b * h)),
        wrong("across_more", "sign", "ldj", "D + 1 directions are counted as lying across the ray; there are D - 1.", across=lambda self, b, h, D: (D + 1) * log_size(1 + b * h)),
        wrong("across_once", "missing term", "ldj", "Only one of the D - 1 directions across the ray is counted.", across=lambda self, b, h, D: log_size(1 + b * h)),
        wrong("across_missing", "missing term", "ldj", "The D - 1 directions across the ray are not counted.", across=lambda self, b, h, D: 0 * h),
        wrong("across_divided", "sign", "ldj", "The part across the ray is divided by the number of directions, or divides it; each of the D - 1 directions adds its own.", across=lambda self, b, h, D: (D - 1) / log_size(1 + b * h)),
        wrong("across_rows", "exchanged", "ldj", "The number of rows of the batch is taken for the number of dimensions.", across=lambda self, b, h, D: (len(h) - 1) * log_size(1 + b * h)),
        wrong("across_no_log", "missing function", "ldj", "The stretch across the ray enters without its logarithm.", across=lambda self, b, h, D: (D - 1) * (1 + b * h).abs()),
        wrong("across_sign", "sign", "ldj", "In the stretch across the ray beta has the wrong sign.", across=lambda self, b, h, D: (D - 1) * log_size(1 - b * h)),
        wrong("across_no_one", "missing term", "ldj", "In the stretch across the ray the 1 is missing.", across=lambda self, b, h, D: (D - 1) * log_size(b * h)),
        wrong("across_no_beta", "missing term", "ldj", "In the stretch across the ray beta is missing.", across=lambda self, b, h, D: (D - 1) * log_size(1 + h)),
        wrong("across_no_h", "missing term", "ldj", "In the stretch across the ray h is missing.", across=lambda self, b, h, D: (D - 1) * log_size(1 + b)),
        wrong("along_subtracted", "sign", "ldj", "The part along the ray is subtracted; stretches multiply, so their logarithms add up.", along=lambda self, b, h, r: -log_size(1 + b * h - b * r * h**2)),
        wrong("along_missing", "missing term", "ldj", "The direction along the ray is not counted.", along=lambda self, b, h, r: 0 * h),
        wrong("along_no_log", "missing function", "ldj", "The stretch along the ray enters without its logarithm.", along=lambda self, b, h, r: (1 + b * h - b * r * h**2).abs()),
        wrong("along_like_across", "missing term", "ldj", "Along the ray the stretch is taken to be the same as across it; there h changes with r as well.", along=lambda self, b, h, r: log_size(1 + b * h)),
        wrong("along_only_slope", "missing term", "ldj", "Along the ray only the change of h is counted, not h itself.", along=lambda self, b, h, r: log_size(1 - b * r * h**2)),
        wrong("along_no_one", "missing term", "ldj", "In the stretch along the ray the 1 is missing.", along=lambda self, b, h, r: log_size(b * h - b * r * h**2)),
        wrong("along_sign", "sign", "ldj", "In the stretch along the ray beta h has the wrong sign.", along=lambda self, b, h, r: log_size(1 - b * h - b * r * h**2)),
        wrong("slope_sign", "sign", "ldj", "The slope of h has the wrong sign: h falls with r.", along=lambda self, b, h, r: log_size(1 + b * h + b * r * h**2)),
        wrong("slope_no_square", "missing function", "ldj", "The slope of 1 / (alpha + r) has a square in it.", along=lambda self, b, h, r: log_size(1 + b * h - b * r * h)),
        wrong("slope_no_h", "missing term", "ldj", "The slope of h is taken to be -1; it falls with the square of alpha + r.", along=lambda self, b, h, r: log_size(1 + b * h - b * r)),
        wrong("slope_no_r", "missing term", "ldj", "In the stretch along the ray the factor r of the slope of h is missing.", along=lambda self, b, h, r: log_size(1 + b * h - b * h**2)),
        wrong("slope_no_beta", "missing term", "ldj", "In the stretch along the ray the factor beta of the slope of h is missing.", along=lambda self, b, h, r: log_size(1 + b * h - r * h**2)),
        wrong("returned_exchanged", "exchanged", "forward", "forward returns ldj first; it should be z, ldj.", forward=lambda self, x: PlainRadial.forward(self, x)[::-1]),
        wrong("ldj_no_log", "missing function", "ldj", "`ldj` is the determinant itself; its logarithm is asked for.", ldj=lambda self, right: right.exp()),
        wrong("ldj_sign", "sign", "ldj", "`ldj` has the wrong sign: it is the log-determinant of the inverse map.", ldj=lambda self, right: -right),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1); it should be (B,).", ldj=lambda self, right: right[:, None]),
        wrong("ldj_batch_sum", "reduction", "ldj", "`ldj` adds up the whole batch; every row needs its own number, shape (B,).", ldj=lambda self, right: right.sum()),
        wrong("ldj_one_number", "reduction", "ldj", "`ldj` is averaged over the batch; every row needs its own number, shape (B,).", ldj=lambda self, right: right.mean()),
        wrong("radius_of_batch", "wrong axis", "forward", "The distance is that of the whole batch taken as one long vector; each row has its own.", radius=lambda self, away: away.norm().expand(len(away))),
        wrong("h_no_alpha", "missing term", "forward", "alpha is missing in h: at the centre the layer divides by zero.", h=lambda self, alpha, r: 1 / r),
        wrong("h_no_radius", "missing term", "forward", "h is 1 / alpha at every distance: the pull does not fade.", h=lambda self, alpha, r: 1 / alpha + 0 * r),
        wrong("h_difference", "sign", "forward", "In h the distance is subtracted from alpha; it should be added.", h=lambda self, alpha, r: 1 / (alpha - r)),
        wrong("h_not_inverted", "sign", "forward", "h is alpha + r itself; it should be its reciprocal, so that the pull fades.", h=lambda self, alpha, r: alpha + r),
        wrong("radius_squared", "extra term", "forward", "The distance is not taken, but its square.", radius=lambda self, away: (away**2).sum(-1)),
        wrong("radius_sum", "wrong function", "forward", "The distance is taken as the sum of the coordinates' sizes; here it is the Euclidean one.", radius=lambda self, away: away.abs().sum(-1)),
        wrong("forward_no_x", "missing term", "forward", "z is the displacement alone; it should be added to x.", move=lambda self, x, away, b, h: b * h[:, None] * away),
        wrong("forward_minus", "sign", "forward", "The displacement is subtracted from x.", move=lambda self, x, away, b, h: x - b * h[:, None] * away),
        wrong("forward_nothing", "missing term", "forward", "forward returns x: the displacement is missing.", move=lambda self, x, away, b, h: x),
        wrong("forward_no_beta", "missing term", "forward", "In the displacement beta is missing.", move=lambda self, x, away, b, h: x + h[:, None] * away),
        wrong("forward_no_h", "missing term", "forward", "In the displacement h is missing: the pull does not fade with the distance.", move=lambda self, x, away, b, h: x + b * away),
        wrong("forward_no_away", "missing term", "forward", "The displacement is one number for all coordinates; it should point away from x0.", move=lambda self, x, away, b, h: x + b * h[:, None]),
        wrong("forward_b_over_h", "sign", "forward", "beta is divided by h; it should be multiplied.", move=lambda self, x, away, b, h: x + b / h[:, None] * away),
        wrong("forward_from_origin", "missing term", "forward", "The displacement points away from the origin; it should point away from x0.", move=lambda self, x, away, b, h: x + b * h[:, None] * x),
        wrong("added_to_x0", "exchanged", "forward", "The displacement is added to x0 instead of x.", move=lambda self, x, away, b, h: self.x0 + b * h[:, None] * away),
        wrong("beta_free", "missing function", "forward", "Nothing keeps beta above -alpha: with some weights the layer folds space.", beta=lambda self, alpha: self.b + 0 * alpha),
        wrong("beta_no_softplus", "missing function", "forward", "The softplus is missing: beta is only shifted by -alpha, and may still be anything.", beta=lambda self, alpha: -alpha + self.b),
        wrong("beta_positive", "missing term", "forward", "beta is always positive: the layer can push points away in latent space, but never pull them in.", beta=lambda self, alpha: F.softplus(self.b)),
        wrong("beta_above_alpha", "sign", "forward", "beta is kept above alpha; it may lie anywhere above -alpha.", beta=lambda self, alpha: F.softplus(self.b) + alpha),
        wrong("beta_only_alpha", "missing term", "forward", "beta is -alpha, always: it cannot learn.", beta=lambda self, alpha: -alpha),
        wrong("beta_minus", "sign", "forward", "beta is pushed below -alpha instead of above.", beta=lambda self, alpha: -alpha - F.softplus(self.b)),
        wrong("alpha_free", "missing function", "forward", "Nothing keeps alpha positive.", alpha=lambda self: self.a),
    ),
    compare=BENT_KEYS, faults=bent_faults, picture=pictures.warp_and_density(),
)


# --- sylvester -------------------------------------------------------------------------------------------------------

RANK = 2


def low_rank(inputs, outputs, prefix):
    """z - x stays within an m-dimensional space and fills it; it is bent, not linear."""
    both = np.concatenate(displacements(inputs, outputs, prefix))
    size = np.linalg.svd(both, compute_uv=False)
    loose = 1e-3 if outputs[prefix + "forward.z"].dtype == np.float32 else 1e-6
    if size[RANK] > loose * size[0]:
        raise Fail(f"With m = {RANK} the displacements z - x fill more than {RANK} dimensions; they should be combinations of the m columns of Q.")
    if size[RANK - 1] < 1e-6 * size[0]:
        raise Fail(f"With m = {RANK} the displacements z - x lie along one direction only: all m columns of Q should take part.")
    J, _ = laws.own_jacobian(inputs, outputs, prefix)
    if np.abs(J - J.mean(0)).max() < 1e-6:
        raise Fail("forward is linear: the tanh is missing.")
    rows = np.concatenate(J - np.eye(J.shape[1]), 0)  # of (J - I) = Q R diag(h') Rt Q^T
    size = np.linalg.svd(rows, compute_uv=False)
    if size[RANK] > 1e-4 * size[0]:
        raise Fail(f"With m = {RANK} z - x should depend on x through m combinations of its coordinates only.")


def invertible_sylvester(inputs, outputs, reference):
    each_draw(displacements, inputs, outputs)
    each_draw(positive_everywhere, inputs, outputs)
    not_too_tight(np.concatenate(each_draw(determinants, inputs, outputs)))


def triangles_trained(inputs, outputs, reference):
    """Of the numbers that are not Q's (whose parameters come in columns of length D) enough have an effect."""
    every_weight(lambda D: RANK * (RANK + 1) + RANK, "two triangles and b")(inputs, outputs, reference)
    sizes, used, D = outputs["parameters.sizes"], outputs["gradient.entries"], inputs["x"].shape[1]
    others = sizes % D != 0
    moved, wanted = used[others].sum() if others.any() else used.sum(), RANK * (RANK + 1) + RANK
    if moved < wanted:
        raise Fail(f"Beside Q only {moved} numbers of the layer have an effect on z and ldj; two triangles with their diagonals, and b, hold {wanted} for m = {RANK}.")


class PlainSylvester(nn.Module):
    """z = x + Q R tanh(Rt Q^T x + b): Q (dim, m) with orthonormal columns, R and Rt (m, m) upper triangular, r_ii rt_ii > -1."""

    def __init__(self, dim, m):
        super().__init__()
        self.frame = nn.Parameter(torch.randn(dim, m))
        self.r, self.rt = nn.Parameter(torch.randn(m, m)), nn.Parameter(torch.randn(m, m))
        self.b = nn.Parameter(torch.zeros(m))

    def q(self):
        return torch.linalg.qr(self.frame)[0]

    def triangle(self, r):
        return r.triu(1)

    def products(self, raw):
        return -1 + F.softplus(raw)

    def factors(self):
        """R and Rt: rt_ii = exp(free), r_ii = (-1 + softplus(free)) / rt_ii."""
        below = self.rt.diagonal().exp()
        return self.triangle(self.r) + torch.diag(self.products(self.r.diagonal()) / below), self.triangle(self.rt) + torch.diag(below)

    def bend(self, x, q, rt):
        return torch.tanh(x @ q @ rt.T + self.b)

    def move(self, x, q, r, h):
        return x + h @ r.T @ q.T

    def slope(self, h):
        return 1 - h**2

    def terms(self, r, rt, slope):
        return 1 + slope * r.diagonal() * rt.diagonal()

    def ldj(self, terms):
        return terms.abs().log().sum(-1)

    def forward(self, x):
        q, (r, rt) = self.q(), self.factors()
        h = self.bend(x, q, rt)
        return self.move(x, q, r, h), self.ldj(self.terms(r, rt, self.slope(h)))


wrong = deviating(PlainSylvester)
SYLVESTER = Exercise(
    id="sylvester", title="The Sylvester layer", minutes=30, difficulty=5, bonus=True,
    hints=(
        "`torch.linalg.qr(frame)[0]` makes orthonormal columns of any (dim, m) matrix. With rows of points the formula reads h = tanh(x @ Q @ Rt.T + b) and z = x + h @ R.T @ Q.T.",
        "The identity makes a determinant of size m of the one of size D, and Q^T Q is the identity. What is left, I + diag(h') Rt R, is triangular. Write r_ii as a constrained product divided by a positive rt_ii.",
    ),
    inputs=lambda rng: bent_inputs(rng, 5, 24, 32) | {"m": np.array(RANK)}, reference=lambda: (PlainSylvester,),
    cases=(
        Case("shapes: z (B, D), ldj (B,); x left as it was", 0.5, bent_shapes),
        Case("z - x is bent, in m dimensions", 1.5, for_all_weights(low_rank)),
        Case("ldj = log|det dz/dx|, with any weights", 2, for_all_weights(bent_ldj)),
        Case("invertible with any weights", 1.5, invertible_sylvester),
        Case("R, Rt and b can be trained", 0.5, triangles_trained),
    ),
    misconceptions=(
        wrong("h_for_slope", "missing function", "ldj", "In `ldj` stands h = tanh(a) where its slope h' belongs.", slope=lambda self, h: h),
        wrong("slope_no_square", "missing function", "ldj", "The slope of tanh is taken to be 1 - h; the square of h is missing.", slope=lambda self, h: 1 - h),
        wrong("no_one", "missing term", "ldj", "The 1 of the identity is missing in the determinant.", terms=lambda self, r, rt, s: s * r.diagonal() * rt.diagonal()),
        wrong("no_rt", "missing term", "ldj", "In `ldj` the diagonal of Rt is missing.", terms=lambda self, r, rt, s: 1 + s * r.diagonal()),
        wrong("no_r", "missing term", "ldj", "In `ldj` the diagonal of R is missing.", terms=lambda self, r, rt, s: 1 + s * rt.diagonal()),
        wrong("no_slope", "missing term", "ldj", "In `ldj` the slope h' is missing.", terms=lambda self, r, rt, s: 1 + r.diagonal() * rt.diagonal()),
        wrong("minus", "sign", "ldj", "In the determinant the low-rank term has the wrong sign.", terms=lambda self, r, rt, s: 1 - s * r.diagonal() * rt.diagonal()),
        wrong("trace", "missing function", "ldj", "`ldj` is the sum of h'_i r_ii rt_ii, the trace of the low-rank term; the logarithm of the determinant is asked for.", ldj=lambda self, t: (t - 1).sum(-1)),
        wrong("slope_plus", "sign", "ldj", "The slope of tanh is taken to be 1 + h^2; it is greatest where h = 0.", slope=lambda self, h: 1 + h**2),
        wrong("slope_square_only", "missing term", "ldj", "The slope of tanh is taken to be -h^2; the 1 is missing.", slope=lambda self, h: -h**2),
        wrong("only_slope", "missing term", "ldj", "In `ldj` both diagonals are missing.", terms=lambda self, r, rt, s: 1 + s),
        wrong("sum_of_factors", "wrong function", "ldj", "In `ldj` the factors h' r_ii and rt_ii are added; they should be multiplied.", terms=lambda self, r, rt, s: 1 + (s * r.diagonal() + rt.diagonal())),
        wrong("slope_plus_r", "wrong function", "ldj", "In `ldj` h' and r_ii are added; they should be multiplied.", terms=lambda self, r, rt, s: 1 + (s + r.diagonal()) * rt.diagonal()),
        wrong("quotient_rt", "sign", "ldj", "In `ldj` the diagonal of Rt is divided by; it should be multiplied.", terms=lambda self, r, rt, s: 1 + s * r.diagonal() / rt.diagonal()),
        wrong("quotient_r", "sign", "ldj", "In `ldj` the diagonal of R is divided by; it should be multiplied.", terms=lambda self, r, rt, s: 1 + s / r.diagonal() * rt.diagonal()),
        wrong("wrong_axis", "wrong axis", "ldj", "`ldj` is summed over the batch instead of over the m directions.", ldj=lambda self, t: t.abs().log().sum(0)),
        wrong("ldj_not_logged", "missing function", "ldj", "`ldj` adds up the factors of the determinant; their logarithms should be added.", ldj=lambda self, t: t.abs().sum(-1)),
        wrong("returned_exchanged", "exchanged", "forward", "forward returns ldj first; it should be z, ldj.", forward=lambda self, x: PlainSylvester.forward(self, x)[::-1]),
        wrong("log_of_sum", "order", "ldj", "The logarithm of a sum is taken; the determinant is a product, so the logarithms are summed.", ldj=lambda self, t: t.sum(-1).abs().log()),
        wrong("no_log", "missing function", "ldj", "`ldj` is the determinant itself; its logarithm is asked for.", ldj=lambda self, t: t.prod(-1).abs()),
        wrong("ldj_mean", "reduction", "ldj", "`ldj` is a mean over the m directions; the logarithm of a product is a sum.", ldj=lambda self, t: t.abs().log().mean(-1)),
        wrong("ldj_no_sum", "shape", "ldj", "`ldj` still has one number for each of the m directions: the sum is missing, so its shape is not (B,).", ldj=lambda self, t: t.abs().log()),
        wrong("ldj_sign", "sign", "ldj", "`ldj` has the wrong sign: it is the log-determinant of the inverse map.", ldj=lambda self, t: -t.abs().log().sum(-1)),
        wrong("ldj_keepdim", "shape", "ldj", "`ldj` has shape (B, 1); it should be (B,).", ldj=lambda self, t: t.abs().log().sum(-1, keepdim=True)),
        wrong("ldj_batch_sum", "reduction", "ldj", "`ldj` adds up the whole batch; every row needs its own number, shape (B,).", ldj=lambda self, t: t.abs().log().sum()),
        wrong("not_orthonormal", "missing function", "forward", "The columns of Q are not orthonormal, so Q^T Q is not the identity and the determinant does not simplify.", q=lambda self: self.frame),
        wrong("only_normalised", "missing function", "forward", "The columns of Q have length 1 but are not orthogonal to each other, so Q^T Q is not the identity.", q=lambda self: self.frame / self.frame.norm(dim=0)),
        wrong("not_triangular", "missing function", "forward", "R and Rt are not triangular, so the determinant is not the product of the diagonal.", triangle=lambda self, r: r - torch.diag(r.diagonal())),
        wrong("no_constraint", "missing term", "forward", "Nothing keeps r_ii rt_ii above -1: with some weights the layer folds space.", factors=lambda self: (self.r.triu(), self.rt.triu())),
        wrong("constraint_sign", "sign", "forward", "The products r_ii rt_ii are pushed below -1 instead of above.", products=lambda self, raw: -1 - F.softplus(raw)),
        wrong("constraint_at_minus_one", "missing term", "forward", "The products r_ii rt_ii are always exactly -1, where the determinant vanishes, and the diagonal of R cannot learn.", products=lambda self, raw: -1 + 0 * raw),
        wrong("constraint_positive", "missing term", "forward", "The products r_ii rt_ii are always positive: the layer can stretch space but never squeeze it.", products=lambda self, raw: F.softplus(raw)),
        wrong("diagonal_r", "missing term", "forward", "R has nothing above its diagonal: a triangle is asked for.", factors=lambda self: (torch.diag(PlainSylvester.factors(self)[0].diagonal()), PlainSylvester.factors(self)[1])),
        wrong("diagonal_rt", "missing term", "forward", "Rt has nothing above its diagonal: a triangle is asked for.", factors=lambda self: (PlainSylvester.factors(self)[0], torch.diag(PlainSylvester.factors(self)[1].diagonal()))),
        wrong("no_diagonal_r", "missing term", "forward", "The diagonal of R is missing.", factors=lambda self: (self.r.triu(1), PlainSylvester.factors(self)[1])),
        wrong("no_diagonal_rt", "missing term", "forward", "The diagonal of Rt is missing.", factors=lambda self: (PlainSylvester.factors(self)[0], self.rt.triu(1))),
        wrong("diagonal_r_twice", "off by one", "forward", "The diagonal of R is there twice: the free one was not cut off before the constrained one is added.", factors=lambda self: (PlainSylvester.factors(self)[0] + torch.diag(self.r.diagonal()), PlainSylvester.factors(self)[1])),
        wrong("diagonal_rt_twice", "off by one", "forward", "The diagonal of Rt is there twice: the free one was not cut off before the positive one is added.", factors=lambda self: (PlainSylvester.factors(self)[0], PlainSylvester.factors(self)[1] + torch.diag(self.rt.diagonal()))),
        wrong("not_divided", "missing term", "forward", "r_ii is the constrained product itself; it must be divided by rt_ii, so that the product of the two is constrained.",
              factors=lambda self: (self.triangle(self.r) + torch.diag(self.products(self.r.diagonal())), PlainSylvester.factors(self)[1])),
        wrong("constraint_lost", "missing function", "forward", "The softplus is missing in the constraint: the products are only shifted by -1, and may still be anything.", products=lambda self, raw: -1 + raw),
        wrong("constraint_on_r", "missing term", "forward", "It is r_ii that is kept above -1; the constraint is on the product of r_ii and rt_ii.",
              factors=lambda self: (self.triangle(self.r) + torch.diag(self.products(self.r.diagonal())), self.rt.triu())),
        wrong("forward_no_x", "missing term", "forward", "z is the displacement alone; it should be added to x.", move=lambda self, x, q, r, h: h @ r.T @ q.T),
        wrong("forward_minus", "sign", "forward", "The displacement is subtracted from x.", move=lambda self, x, q, r, h: x - h @ r.T @ q.T),
        wrong("forward_r_transposed", "exchanged", "forward", "R acts as a lower triangle (it stands where its transpose belongs): Rt R is then full, and its determinant not the product of its diagonal.", move=lambda self, x, q, r, h: x + h @ r @ q.T),
        wrong("bend_rt_transposed", "exchanged", "forward", "Rt acts as a lower triangle (it stands where its transpose belongs): Rt R is then full, and its determinant not the product of its diagonal.", bend=lambda self, x, q, rt: torch.tanh(x @ q @ rt + self.b)),
        wrong("forward_nothing", "missing term", "forward", "forward returns x: the displacement is missing.", move=lambda self, x, q, r, h: x),
        wrong("bend_no_rt", "missing term", "forward", "In the argument of the tanh Rt is missing.", bend=lambda self, x, q, rt: torch.tanh(x @ q + self.b)),
        wrong("forward_no_r", "missing term", "forward", "In forward R is missing.", move=lambda self, x, q, r, h: x + h @ q.T),
        wrong("no_tanh", "missing function", "forward", "The tanh is missing: the layer is linear.", bend=lambda self, x, q, rt: x @ q @ rt.T + self.b),
        wrong("no_bias", "missing term", "forward", "b is not used.", bend=lambda self, x, q, rt: torch.tanh(x @ q @ rt.T + 0 * self.b)),
    ),
    compare=BENT_KEYS, faults=bent_faults, picture=pictures.warp_and_density(),
)


EXERCISES = (MONOTONE, LOG_PROB_1D, INVERSE_CDF, MIXTURE, LOG_DET, FLOW, COMPOSE, PLANAR, RADIAL, SYLVESTER)
