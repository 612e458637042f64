"""How to run the answers of lesson 04 (continuous and residual flows)."""
import contextlib

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autograder.probes.common import sizes, tanh_net
from autograder.probes.lesson02 import nudged, weights
from autograder.probes.record import Complaint, Record, Stop, part, quiet_world, readable, tensor, to_float, unpack

# =====================================================================================================================
# Continuous flows: rk4_step, exact_trace, hutchinson_trace, cnf_log_prob, probability_flow
# =====================================================================================================================

# --- fields whose paths are known ------------------------------------------------------------------------------------


def bent_field(w):
    """dx/dt = c'(t) + R^T (alpha(t) sin(y)) with y = R (x - c(t)), c(t) = c0 + c1 sin(2t), alpha(t) = a0 + a1 sin(3t)."""

    def f(t, x):
        t = torch.as_tensor(t)
        y = (x - w["c0"] - w["c1"] * torch.sin(2 * t)) @ w["R"].T
        return 2 * w["c1"] * torch.cos(2 * t) + ((w["a0"] + w["a1"] * torch.sin(3 * t)) * torch.sin(y)) @ w["R"]

    return f


def affine_field(w):
    """dx/dt = c'(t) + alpha(t) A (x - c(t)), with c and alpha as in `bent_field`."""

    def f(t, x):
        t = torch.as_tensor(t)
        y = (x - w["c0"] - w["c1"] * torch.sin(2 * t)) @ w["A"].T
        return 2 * w["c1"] * torch.cos(2 * t) + (w["a0"] + w["a1"] * torch.sin(3 * t)) * y

    return f


def time_field(w):
    """dx/dt = c'(t) for every x: to solve it is to integrate c'."""
    return lambda t, x: 2 * w["c1"] * torch.cos(2 * torch.as_tensor(t)) + 0 * x


def still_field(w):
    """The bent field without its dependence on t."""
    return bent_field(w | {"c1": 0 * w["c1"], "a1": 0 * w["a1"]})


class Asked:
    """A field that counts how often it is asked, and says so if it is asked in the wrong order."""

    def __init__(self, f, batched=False):
        self.f, self.batched, self.times = f, batched, 0

    def __call__(self, t, x):
        self.times += 1
        if self.batched and not (isinstance(x, torch.Tensor) and x.ndim):
            raise Complaint("f is called with a number or scalar where x belongs; it is f(t, x), the time first")
        return self.f(t, x)


# --- rk4_step --------------------------------------------------------------------------------------------------------

STEP_FIELDS = {"f(x)": still_field, "f(t)": time_field, "f(t, x)": bent_field}
STEP_SIZES = ("step 1", "step 2", "step 3", "step 4")     # h, h / 2, h / 4, h / 8
STEP_NUMBERS = (4, 8, 16)      # of steps from t = 0 to t = 1


def rk4_step(objects, inputs):
    (step,) = objects
    record = Record()
    def loss(y, size):
        """Of a step along the bent field times `size`."""
        field = bent_field(w)
        ((new, _),) = unpack("rk4_step", step(lambda t, y: size * field(t, y), start, 1 * y, h), "y")
        return (tensor(inputs["c"]) * new).sum() if new.shape == y.shape else new.sum()

    def along():
        y, size = tensor(inputs["y"]).requires_grad_(), torch.ones(()).requires_grad_()
        value = loss(y, size)
        if not value.requires_grad:
            return torch.zeros(())
        grads = torch.autograd.grad(value, [y, size], allow_unused=True)
        return sum((g * d).sum() for g, d in zip(grads, (tensor(inputs["y direction"]), 1.0)) if g is not None) + torch.zeros(())

    def moved(t):
        return loss(tensor(inputs["y"] + t * inputs["y direction"]), torch.tensor(1 + float(t))).detach()

    with quiet_world():
        w = {k: tensor(v) for k, v in part(inputs, "field.").items()}
        start, h = float(inputs["start"]), float(inputs["h"])
        asked_for = [(k, size) for k, size in enumerate(STEP_SIZES) if size in inputs]
        for name, field in STEP_FIELDS.items():
            with contextlib.suppress(Stop):
                for k, size in asked_for:
                    record.one(f"{name} {size}", lambda: step(field(w), start, tensor(inputs["y"]), h / 2**k), "y")
        with contextlib.suppress(Stop):
            for k, size in asked_for if "backwards" in inputs else ():
                at = torch.tensor(start)
                record.one(f"backwards {size}", lambda: step(bent_field(w), at, tensor(inputs["y"]), -h / 2**k), "y")
        with contextlib.suppress(Stop):
            y, f = tensor(inputs["y"]), Asked(bent_field(w))
            record.one("one step", lambda: step(f, start, y, h), "y")
            record.keep("y after", lambda: y)
            record["evaluations of f.too many"] = np.array(f.times > 4)
        with contextlib.suppress(Stop):
            record.one("float32", lambda: step(lambda t, y: -t * y, start, tensor(inputs["y"], torch.float32), h), "y")
        with contextlib.suppress(Stop):
            record.one("one number", lambda: step(lambda t, y: -t * y, start, tensor(inputs["y"])[0, 0], h), "y")

        def interval(n):
            y = tensor(inputs["y"])
            for k in range(n):
                ((y, _),) = unpack("rk4_step", step(bent_field(w), k / n, y, 1 / n), "y")
            return y

        with contextlib.suppress(Stop):
            for n in (n for n in STEP_NUMBERS if f"{n} steps" in inputs):
                record.one(f"{n} steps", lambda: interval(n), "y")
        with contextlib.suppress(Stop):
            if "nudges" in inputs:
                record.one("gradient", along, "along")
                record.one("gradient", lambda: torch.stack([moved(t) for t in inputs["nudges"]]), "nudged")
    return record


# --- exact_trace and hutchinson_trace --------------------------------------------------------------------------------

TRACE_FIELDS = ("a linear field", "a curved field", "one dimension")


class Passes(TorchDispatchMode):
    """Counts the derivatives that are taken of `rolled`, by whatever means, below all transformations of torch.func.

    Forwards a roll by 1 is computed, backwards one by -1, so their shapes tell the rows that came along. `number` is that of
    passes of the whole batch: backwards, or forwards if the derivatives were taken that way; 0 if none was taken.
    """

    def __init__(self, rows):
        super().__init__()
        self.rows, self.asked, self.rolls, self.there, self.back = rows, 0, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.roll:
            rows = args[0].numel() / args[0].shape[-1]
            if list(args[1]) == [1]:
                self.rolls, self.there = self.rolls + 1, self.there + rows
            else:
                self.back += rows
        return func(*args, **(kwargs or {}))

    def rolled(self, f):
        """x -> f(roll(x)), counted."""

        def rolled(x):
            self.asked += 1
            return f(torch.roll(x, 1, -1))

        return rolled

    @property
    def number(self):
        forwards = self.there / 2 if self.rolls > self.asked else 0    # each goes along with a value
        return max(self.back, forwards) / self.rows


def trace_fields(inputs):
    """Name -> f: (..., D) -> (..., D)."""
    A, u, a = (tensor(inputs[k]) for k in ("A", "u", "a"))
    return {"a linear field": lambda x: x @ A.T + u, "a curved field": tanh_net(weights(inputs)),
            "one dimension": lambda x: torch.sin(a * x)}


def trace_probe(call, inputs):
    """Runs `call(f, x, name)` on the fields, counts its passes, and asks for gradients of what it returns."""
    record = Record()

    def counted():
        passes = Passes(len(inputs["wide x"]))
        f = passes.rolled(tanh_net(weights(part(inputs, "wide "))))
        with passes:
            value = call(f, tensor(inputs["wide x"]), "wide")
        return value, passes.number

    def loss(w, x):
        ((value, _),) = unpack("the answer", call(tanh_net(w), x, "a curved field"), "trace")
        return (tensor(inputs["r"]) * value.reshape(-1)).sum() if value.numel() == len(x) else value.sum()

    def along(w, x, directions):
        value = loss(w, 1 * x)      # not a leaf, as within a solver
        if not value.requires_grad:
            return torch.zeros(())
        at = [x] if x.requires_grad else list(w.values())
        grads = torch.autograd.grad(value, at, allow_unused=True)
        return sum((g * d).sum() for g, d in zip(grads, directions) if g is not None) + torch.zeros(())

    with quiet_world():
        for name, f in trace_fields(inputs).items():
            with contextlib.suppress(Stop):
                x = tensor(inputs[f"{name} x"])
                record.one(name, lambda: call(f, x, name), "trace")
                record.keep(f"{name}.x after", lambda: x)
                record[f"{name}.x asked"] = np.array(x.requires_grad)
        with contextlib.suppress(Stop), torch.no_grad():
            f = trace_fields(inputs)["a curved field"]
            record.one("under no_grad", lambda: call(f, tensor(inputs["a curved field x"]), "a curved field"), "trace")
        with contextlib.suppress(Stop):
            f, first = trace_fields(inputs)["a curved field"], tensor(inputs["a curved field x"][:1])
            record.one("one row", lambda: call(f, first, "row"), "trace")
        with contextlib.suppress(Stop):
            value, number = record.run("wide", counted)
            record.one("wide", lambda: value, "trace")
            record["wide.passes"] = np.array(number)
        x = inputs["a curved field x"]
        with contextlib.suppress(Stop):
            w = {k: v.requires_grad_() for k, v in weights(inputs).items()}
            record.one("weights gradient", lambda: along(w, tensor(x), [tensor(inputs[f"direction.{k}"]) for k in w]), "along")
            steps = inputs["nudges"]
            record.one("weights gradient", lambda: torch.stack([loss(nudged(inputs, t), tensor(x)).detach() for t in steps]), "nudged")
        with contextlib.suppress(Stop):
            to = tensor(inputs["x direction"])
            record.one("x gradient", lambda: along(weights(inputs), tensor(x).requires_grad_(), [to]), "along")
            moved = [tensor(x) + t * to for t in inputs["nudges"]]
            record.one("x gradient", lambda: torch.stack([loss(weights(inputs), m).detach() for m in moved]), "nudged")
    return record


def exact_trace(objects, inputs):
    (trace,) = objects
    return trace_probe(lambda f, x, name: trace(f, x), inputs)


def hutchinson_trace(objects, inputs):
    (trace,) = objects
    given = {name: tensor(inputs[f"{name} eps"]) for name in (*TRACE_FIELDS, "wide")}
    given["row"] = given["a curved field"][:1]
    record = trace_probe(lambda f, x, name: trace(f, x, given[name].clone()), inputs)

    def all_signs():
        """At one point, for each vector of signs."""
        signs = tensor(inputs["signs"])
        return trace(trace_fields(inputs)["a curved field"], tensor(inputs["a curved field x"][:1]).repeat(len(signs), 1), signs)

    with quiet_world():
        with contextlib.suppress(Stop):
            record.one("all signs", all_signs, "trace")
        with contextlib.suppress(Stop):
            eps = tensor(inputs["a linear field eps"])
            f, x = trace_fields(inputs)["a linear field"], tensor(inputs["a linear field x"])
            record.one("once more", lambda: trace(f, x, eps), "trace")
            record.keep("eps after", lambda: eps)
    return record


# --- cnf_log_prob ----------------------------------------------------------------------------------------------------

FLOW_RUNS = {"an affine field in 8 steps": (affine_field, 8), "a curved field in 4 steps": (bent_field, 4),
             "a curved field in 8 steps": (bent_field, 8)}


def cnf_log_prob(objects, inputs):
    (log_prob,) = objects
    record = Record()

    def base(prefix=""):
        """A Gaussian whose log_prob is (B,)."""
        normal = torch.distributions.Normal(tensor(inputs[f"{prefix}loc"]), tensor(inputs[f"{prefix}scale"]))
        return torch.distributions.Independent(normal, 1)

    def run(step, x, f, n, prefix=""):
        record.one(step, lambda: log_prob(x, Asked(f, True), base(prefix), n), "log_prob")

    def loss(w, x):
        net = tanh_net(w)
        value = log_prob(x, Asked(lambda t, x: 0.4 * (1 + torch.as_tensor(t)) * net(x), True), base(), 2)
        ((value, _),) = unpack("cnf_log_prob", value, "log_prob")
        return (tensor(inputs["r"]) * value.reshape(-1)).sum() if value.numel() == len(inputs["x"]) else value.sum()

    def along():
        w, x = {k: v.requires_grad_() for k, v in weights(inputs).items()}, tensor(inputs["x"]).requires_grad_()
        value = loss(w, 1 * x)
        if not value.requires_grad:
            return torch.zeros(())
        grads = torch.autograd.grad(value, [x, *w.values()], allow_unused=True)
        directions = [tensor(inputs[k]) for k in ("x direction", *(f"direction.{k}" for k in w))]
        return sum((g * d).sum() for g, d in zip(grads, directions) if g is not None) + torch.zeros(())

    def moved(t):
        return loss(nudged(inputs, t), tensor(inputs["x"] + t * inputs["x direction"])).detach()

    with quiet_world():
        w = {k: tensor(v) for k, v in part(inputs, "field.").items()}
        asked = {}
        for step in (step for step in FLOW_RUNS if step in inputs):
            with contextlib.suppress(Stop):
                x, (field, n) = tensor(inputs["x"]), FLOW_RUNS[step]
                f = Asked(field(w), True)
                record.one(step, lambda: log_prob(x, f, base(), n), "log_prob")
                record.keep(f"{step}.x after", lambda: x)
                asked[step] = f.times
        few, many = (asked.get(f"a curved field in {n} steps") for n in (4, 8))
        if few is not None and many is not None:
            record["8 steps against 4.more"] = np.array(many > few)
        for step in ("one row", "once more"):
            with contextlib.suppress(Stop):
                run(step, tensor(inputs["x"][:1]), bent_field(w), 2)
        if "wide x" in inputs:
            with contextlib.suppress(Stop), torch.no_grad():
                run("under no_grad", tensor(inputs["x"]), affine_field(w), 8)
            with contextlib.suppress(Stop):
                wide = {k: tensor(v) for k, v in part(inputs, "wide field.").items()}
                run("three dimensions", tensor(inputs["wide x"]), affine_field(wide), 4, "wide ")
        with contextlib.suppress(Stop):
            if "nudges" in inputs:
                record.one("gradient", along, "along")
                record.one("gradient", lambda: torch.stack([moved(t) for t in inputs["nudges"]]), "nudged")
        if "grid" in inputs:
            with contextlib.suppress(Stop):
                run("picture", tensor(inputs["grid"]), bent_field(w), 4)
    return record


# --- probability_flow ------------------------------------------------------------------------------------------------

DIFFUSION_TIMES = {"t = 0": 0.0, "t = 0.35": 0.35, "t = 1": 1.0}
DIFFUSION_STEPS = 24
PATH_STEPS = 40


def diffused_score(w):
    """The gradient of log p_t for the mixture of the Gaussians N(m_k, s_k^2 I), diffused until t: (t, x) -> (..., D)."""

    def score(t, x):
        keep = torch.exp(-torch.as_tensor(0.1 * t + 9.95 * t**2))      # of the variance: exp of minus the integral of beta
        off = x[..., None, :] - keep.sqrt() * w["means"]
        spread = keep * w["stds"] ** 2 + 1 - keep
        dim = x.shape[-1]
        logs = w["weights"].log() - 0.5 * (off**2).sum(-1) / spread - 0.5 * dim * spread.log()
        return -(torch.softmax(logs, -1) / spread)[..., None, :].matmul(off)[..., 0, :]

    return score


def any_score(w):
    """Some function of t and x that is no score at all."""
    return lambda t, x: torch.sin(x @ w["mix"].T + 2 * torch.as_tensor(t)) - w["shift"] * torch.as_tensor(t)


def probability_flow(objects, inputs):
    (flow,) = objects
    record = Record()

    def times(n):
        """Even in sqrt(t), since the field changes most where t is small."""
        return (torch.linspace(0, 1, n + 1) ** 2).tolist()

    def path(x, field, n, keep):
        """Kutta's third-order steps from t = 0 to t = 1; all states, or the last."""
        states = [x]
        for a, b in zip(times(n), times(n)[1:]):
            h, x = b - a, states[-1]
            k1 = field(a, x)
            k2 = field((a + b) / 2, x + h / 2 * k1)
            k3 = field(b, x + h * (2 * k2 - k1))
            x = x + h / 6 * (k1 + 4 * k2 + k3)
            states = [*states, x] if keep else [x]
        return torch.stack(states) if keep else x

    def field(score):
        def f(t, x):
            ((value, _),) = unpack("probability_flow", flow(score, torch.tensor(t), x), "field")
            return value

        return f

    def drift(w, x):
        f = field(diffused_score(w))

        def with_trace(t, state):
            x = state[..., :-1].detach().requires_grad_()
            value = f(t, x)
            grads = [torch.autograd.grad(value[..., i].sum(), x, retain_graph=True)[0][..., i] for i in range(x.shape[-1])]
            return torch.cat([value.detach(), sum(grads)[..., None]], -1)

        return path(torch.cat([x, torch.zeros(len(x), 1)], -1), with_trace, DIFFUSION_STEPS, keep=False)

    with quiet_world():
        w = {k: tensor(v) for k, v in part(inputs, "mixture.").items()}
        for name, t in DIFFUSION_TIMES.items():
            with contextlib.suppress(Stop):
                x, at = tensor(inputs["x"]), t if name == "t = 0.35" else torch.tensor(t)
                record.one(name, lambda: flow(any_score({k: tensor(inputs[k]) for k in ("mix", "shift")}), at, x), "field")
                record.keep(f"{name}.x after", lambda: x)
        with contextlib.suppress(Stop):
            if "starts" in inputs:
                record.one("one row", lambda: flow(diffused_score(w), torch.tensor(0.5), tensor(inputs["starts"][:1])), "field")
        with contextlib.suppress(Stop):
            if "starts" in inputs:
                record.one("from data to latents", lambda: drift(w, tensor(inputs["starts"])), "state")
        if "grid" in inputs:
            with contextlib.suppress(Stop), torch.no_grad():
                line = {"means": tensor([[-2.0], [1.5]]), "stds": tensor([0.3, 0.5]), "weights": tensor([0.4, 0.6])}
                x, f = tensor(inputs["grid"])[:, None], field(diffused_score(line))
                record.one("picture", lambda: path(x, f, PATH_STEPS, keep=True)[..., 0], "paths")
    return record


# =====================================================================================================================
# The second sitting: lip_swish, spectral_normalize, residual_inverse, power_series_logdet, roulette_sum,
# russian_roulette_logdet, neumann_gradient
# =====================================================================================================================

BRANCH = ("W1", "b1", "W2", "b2")


class Branch(nn.Module):
    """A residual branch g(x) = tanh(x W1 + b1) W2 + b2 of the judge's weights, which counts how often it is asked."""

    def __init__(self, w):
        super().__init__()
        for k in BRANCH:
            self.register_parameter(k, nn.Parameter(tensor(w[f"g.{k}"])))
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return torch.tanh(x @ self.W1 + self.b1) @ self.W2 + self.b2


def geometric_survival(p):
    """P(N >= k) = (1 - p)^(k - 1) of a geometric N from 1, and 1 for k = 0; for whole numbers, and for tensors of them."""

    def survival(k):
        return (1 - p) ** (torch.clamp(k - 1, min=0) if isinstance(k, torch.Tensor) else max(k - 1, 0))

    return survival


def kept_as_sent(record, step, **sent):
    """Write down what a step left of the tensors that it was given, as "step.x after"."""
    for name, value in sent.items():
        with contextlib.suppress(Stop):
            record.keep(f"{step}.{name} after", lambda value=value: value.detach())


def profile(record, step, value):
    """A result divided by its first entry, the same whatever its sign and scale are: it tells one fault from two."""
    with contextlib.suppress(Stop):
        flat = readable(step, "the result", value)[0].detach().double().reshape(-1)
        record.keep(f"{step}.profile", lambda: flat / flat[:1])


# --- lip_swish -------------------------------------------------------------------------------------------------------

def lip_swish(objects, inputs):
    (f,) = objects
    record = Record()

    def slope(z, beta, name):
        """The derivative of the sum along z or beta, zeros where there is none."""
        value = readable("lip_swish", "the result", f(z, beta))[0]
        at = z if name == "z" else beta
        if not value.requires_grad:
            return torch.zeros_like(at)
        found = torch.autograd.grad(value.sum(), at, allow_unused=True)[0]
        return torch.zeros_like(at) if found is None else found

    def leaf(array, dtype=torch.float64):
        return tensor(array, dtype).requires_grad_()

    with quiet_world():
        for name in ("z", "table"):
            with contextlib.suppress(Stop):
                z = tensor(inputs[name])
                step = "lip_swish" if name == "z" else "a table of numbers"
                value = record.one(step, lambda z=z: f(z, tensor(inputs["beta"])), "value")
                kept_as_sent(record, step, z=z)
                profile(record, step, value)
        for i, beta in enumerate(inputs["betas"]):
            with contextlib.suppress(Stop):
                record.one(f"beta {i}", lambda beta=beta: f(tensor(inputs["line"]), tensor(beta)), "value")
        with contextlib.suppress(Stop):
            record.one("gradient", lambda: slope(leaf(inputs["z"]), leaf(inputs["beta"]), "z"), "z")
        with contextlib.suppress(Stop):
            record.one("gradient of beta", lambda: slope(leaf(inputs["z"]), leaf(inputs["beta"]), "beta"), "beta")
        if "picture" in inputs:
            with contextlib.suppress(Stop):
                record.one("picture", lambda: f(tensor(inputs["picture"]), tensor(1.0)), "value")
                record.one("picture of the slope", lambda: slope(leaf(inputs["picture"]), tensor(1.0), "z"), "slope")
        with contextlib.suppress(Stop):
            torch.set_default_dtype(torch.float32)
            beta = tensor(inputs["beta"], torch.float32)
            record.one("far out in float32", lambda: f(tensor(inputs["far"], torch.float32), beta), "value")
            record.one("slope far out in float32", lambda: slope(leaf(inputs["far"], torch.float32), beta, "z"), "slope")
    return record


# --- spectral_normalize ----------------------------------------------------------------------------------------------

SPECTRAL = ("square", "wide", "tall", "small", "just below", "c is 1", "between c and 1", "blind")


def spectral_normalize(objects, inputs):
    (normalise,) = objects
    record = Record()
    steps = int(inputs["steps"])

    def loss(weight):
        ((value, _),) = unpack("spectral_normalize", normalise(weight, float(inputs["wide.c"]), steps), "the result")
        if value.shape != weight.shape:
            shapes = tuple(value.shape), tuple(weight.shape)
            raise Complaint("spectral_normalize: the result has shape {} for a weight of shape {}".format(*shapes))
        return (tensor(inputs["direction"]) * value).sum()

    def gradient():
        weight = tensor(inputs["wide.W"]).requires_grad_()
        value = loss(weight)
        found = torch.autograd.grad(value, weight, allow_unused=True)[0] if value.requires_grad else None
        return torch.zeros_like(weight) if found is None else found

    with quiet_world():
        for name in SPECTRAL:
            with contextlib.suppress(Stop):
                weight = tensor(inputs[f"{name}.W"])
                c = float(inputs[f"{name}.c"])
                record.one(name, lambda weight=weight, c=c: normalise(weight, c, steps), "weight")
                kept_as_sent(record, name, W=weight)
        with contextlib.suppress(Stop):
            record.one("one iteration", lambda: normalise(tensor(inputs["slow.W"]), float(inputs["slow.c"]), 1), "weight")
        with contextlib.suppress(Stop):
            record.one("gradient", gradient, "W")
        # A lesson computes in either precision, with a default that may be the other one.
        for name, default, dtype in (("float32", torch.float64, torch.float32), ("float64", torch.float32, torch.float64)):
            torch.set_default_dtype(default)
            with contextlib.suppress(Stop):
                large = tensor(inputs["large.W"], dtype)
                weight = record.one(f"a {name} weight", lambda large=large: normalise(large, float(inputs["large.c"]), steps), "weight")
                record.keep(f"a {name} weight.dtype", lambda weight=weight: str(weight.dtype))
    return record


# --- residual_inverse ------------------------------------------------------------------------------------------------

def rotation(inputs):
    """The linear branch g(x) = x A, A a rotation that shrinks by L: each step of the iteration shrinks the error by L."""
    A = tensor(inputs["A"])
    return lambda x: x @ A


def residual_inverse(objects, inputs):
    (invert,) = objects
    record = Record()
    many, few = int(inputs["many"]), int(inputs["few"])
    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            z = tensor(mine["z"])
            with contextlib.suppress(Stop):
                record.one(f"{size}inverse", lambda mine=mine, z=z: invert(Branch(mine), z, many), "x")
                kept_as_sent(record, f"{size}inverse", z=z)
        mine = part(inputs, "D=2 ")
        with contextlib.suppress(Stop):
            record.one("one row", lambda: invert(Branch(mine), tensor(mine["z"][:1]), many), "x")
        with contextlib.suppress(Stop):
            g = Branch(mine)
            record.one("a few steps", lambda: invert(g, tensor(mine["z"]), few), "x")
            record.keep("a few steps.asked", lambda: int(g.asked))
        for n in (1, 2):
            with contextlib.suppress(Stop):
                record.one(f"n_iter = {n}", lambda n=n: invert(Branch(mine), tensor(mine["z"]), n), "x")
        for n in inputs["counts"]:
            with contextlib.suppress(Stop):
                record.one(f"{n} steps", lambda n=n: invert(rotation(inputs), tensor(inputs["rotated z"]), int(n)), "x")
    return record


# --- the log-determinants --------------------------------------------------------------------------------------------

def over_basis(inputs):
    """x (B D, D), each row D times, and v = sqrt(D) e_i in turn: the mean of v^T M v over the D rows is the trace of M."""
    B, D = inputs["x"].shape
    return tensor(inputs["x"]).repeat_interleave(D, 0), (D**0.5 * torch.eye(D)).repeat(B, 1)


def weighted(step, value, weights):
    """The sum of a result (B,) with a weight for each sample; of a result of another shape, the plain sum."""
    ((value, _),) = unpack(step, value, "the result")
    return (weights * value.reshape(-1)).sum() if value.numel() == len(weights) else value.sum()


def branch_gradients(record, step, loss, x, inputs):
    """The derivative of `loss(g, x)` along a direction of g's parameters, and of x, as "step.parameters" and "step.x".

    x comes from an earlier layer, so it is no leaf of the graph.
    """

    def along():
        g, start = Branch(inputs), x.clone().requires_grad_()
        value = loss(g, 1.0 * start)
        at = [*(getattr(g, k) for k in BRANCH), start]
        found = torch.autograd.grad(value, at, allow_unused=True) if value.requires_grad else [None] * len(at)
        ways = [tensor(inputs[f"direction.{k}"]) for k in BRANCH]
        ways.append(tensor(inputs["direction.x"]).repeat_interleave(len(x) // len(inputs["x"]), 0))
        slopes = [torch.zeros(()) if f is None else (f * way).sum() for f, way in zip(found, ways)]
        return sum(slopes[:-1]), slopes[-1]

    with contextlib.suppress(Stop):
        record.many(step, along, "parameters", "x")


def logdet_steps(record, inputs, step, call):
    """Runs `call(g, x, v, n)` for some n on given noise, on one row, on basis vectors for all n `enumerated`; its gradient."""
    g, counts = Branch(inputs), inputs["counts"]
    for n in counts:
        x, v = tensor(inputs["x"]), tensor(inputs["v"])
        with contextlib.suppress(Stop):
            value = record.one(f"n = {n}", lambda x=x, v=v, n=n: call(g, x, v, int(n)), "logdet")
            profile(record, f"n = {n}", value)
            kept_as_sent(record, f"n = {n}", x=x, v=v)
    with contextlib.suppress(Stop):
        record.one("one row", lambda: call(g, tensor(inputs["x"][:1]), tensor(inputs["v"][:1]), int(counts[-1])), "logdet")
    for n in inputs.get("enumerated", ()):
        with contextlib.suppress(Stop):
            record.one(f"basis vectors, n = {n}", lambda n=n: call(g, *over_basis(inputs), int(n)), "logdet")
    r = tensor(inputs["r"])
    trained = int(inputs["trained"])
    branch_gradients(record, "gradient", lambda g, x: weighted(step, call(g, x, tensor(inputs["v"]), trained), r),
                     tensor(inputs["x"]), inputs)


def power_series_logdet(objects, inputs):
    (f,) = objects
    record = Record()
    with quiet_world():
        logdet_steps(record, inputs, "power_series_logdet", lambda g, x, v, n: f(g, x, n, v))
    return record


def russian_roulette_logdet(objects, inputs):
    (f,) = objects
    record = Record()
    survival = geometric_survival(float(inputs["p"]))
    with quiet_world():
        logdet_steps(record, inputs, "russian_roulette_logdet", lambda g, x, v, n: f(g, x, v, n, survival))
    return record


# --- roulette_sum ----------------------------------------------------------------------------------------------------

class Terms(list):
    """delta_1, delta_2, ... as a sequence, and as a function of k = 1, 2, ...: an answer takes it as it likes."""

    def __call__(self, k):
        if not 1 <= k <= len(self):
            raise IndexError(f"delta({k}) was asked for; the terms are counted from k = 1")
        return self[k - 1]


def table_survival(shares):
    """P(N >= k) of an N with P(N = k) = shares[k - 1]; zero beyond the last."""
    tail = torch.cat([tensor(shares).flip(0).cumsum(0).flip(0), torch.zeros(1)])
    whole = torch.cat([torch.ones(1), tail])

    def survival(k):
        return whole[k.clamp(0, len(tail))] if isinstance(k, torch.Tensor) else float(whole[min(max(k, 0), len(tail))])

    return survival


def roulette_sum(objects, inputs):
    (f,) = objects
    record = Record()
    table, geometric = table_survival(inputs["shares"]), geometric_survival(float(inputs["p"]))
    with quiet_world():
        def number(step, n, survival):
            with contextlib.suppress(Stop):
                terms = Terms(tensor(inputs["delta"]))
                record.keep(f"{step}{n}.sum", lambda: to_float("roulette_sum", "the sum", f(terms, int(n), survival)))

        for n in range(1, len(inputs["shares"]) + 1):
            number("a table, n = ", n, table)
        for n in inputs["counts"]:
            number("geometric, n = ", n, geometric)
        with contextlib.suppress(Stop):
            rows = tensor(inputs["rows"])
            record.one("terms of shape (B,)", lambda: f(Terms(rows), len(rows), geometric), "sum")
            kept_as_sent(record, "terms of shape (B,)", terms=rows)
    return record


# --- neumann_gradient ------------------------------------------------------------------------------------------------

class Saved:
    """A tensor that a graph saves for its backward pass; `alive` are there now, `most` were there at one time."""
    alive = most = 0

    def __init__(self, value):
        self.value = value
        Saved.alive += 1
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self):
        Saved.alive -= 1


def nodes(value):
    """The number of nodes in the graph that a tensor holds on to."""
    found, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [n for n, _ in node.next_functions]
    return len(found)


def memory(call):
    """The most tensors that were saved for backward passes at one time during `call()`, and the nodes of the graph that is left.

    torch.func refuses to work where saved tensors are watched; then what is left alone is counted.
    """
    before = Saved.alive
    Saved.most = before
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
            value = call()
    except RuntimeError as e:
        if "saved tensor hooks" not in str(e):
            raise
        Saved.most, value = before, call()
    ((value, _),) = unpack("neumann_gradient", value, "the result")
    return torch.tensor([Saved.most - before, nodes(value)])


def neumann_gradient(objects, inputs):
    (f,) = objects
    record = Record()
    survival = geometric_survival(float(inputs["p"]))
    r, x, v = (tensor(inputs[k]) for k in ("r", "x", "v"))

    def surrogate(n, weights, v):
        return lambda g, x: weighted("neumann_gradient", f(g, x, v, int(n), survival), weights)

    def expected(g, x):
        """The mean over all basis vectors and over N, cut off at the last n, which takes the place of all larger ones."""
        last, D = int(inputs["last"]), x.shape[-1]
        shares = [survival(n) - (survival(n + 1) if n < last else 0) for n in range(1, last + 1)]
        _, basis = over_basis(inputs)
        return sum(share * surrogate(n, r.repeat_interleave(D) / D, basis)(g, x) for n, share in enumerate(shares, 1))

    with quiet_world():
        with contextlib.suppress(Stop):
            sent = x.clone(), v.clone()
            value = record.one("neumann_gradient", lambda: f(Branch(inputs), *sent, 3, survival), "surrogate")
            record["neumann_gradient.shape"] = np.array(value.shape)
            kept_as_sent(record, "neumann_gradient", x=sent[0], v=sent[1])
        with contextlib.suppress(Stop):
            record.one("one row", lambda: f(Branch(inputs), x[:1].clone(), v[:1].clone(), 3, survival), "surrogate")
        for n in inputs["counts"]:
            branch_gradients(record, f"gradient with n = {n}", surrogate(n, r, v), x, inputs)
        with contextlib.suppress(KeyError):  # the same whatever the sign and scale of the result: it tells one fault from two
            with np.errstate(all="ignore"):
                by_x, by_parameters = (record[f"gradient with n = 4.{k}"] for k in ("x", "parameters"))
                record["gradient with n = 4.ratio"] = np.asarray(by_x / by_parameters)
        for name, factors in (("equal weights", torch.ones_like(r)), ("one sample", (torch.arange(len(r)) == 0).double())):
            branch_gradients(record, f"gradient with {name}", surrogate(3, factors, v), x, inputs)
        if "last" in inputs:
            branch_gradients(record, "expected gradient", expected, over_basis(inputs)[0], inputs)
        for n in inputs["short and long"]:
            with contextlib.suppress(Stop):
                sent = x.clone(), v.clone()
                call = lambda n=int(n), sent=sent: f(Branch(inputs), *sent, n, survival)
                record.one(f"memory with n = {n}", lambda call=call: memory(call), "saved")
    return record


PROBES = {p.__name__: p for p in (
    rk4_step, exact_trace, hutchinson_trace, cnf_log_prob, probability_flow, lip_swish, spectral_normalize,
    residual_inverse, power_series_logdet, roulette_sum, russian_roulette_logdet, neumann_gradient,
)}
