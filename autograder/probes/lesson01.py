"""How to run the answers of lesson 01 (change of variables)."""
import contextlib
import itertools

import torch
from torch import nn

from autograder.probes.common import COSTLY, Calls, mixture_map
from autograder.probes.record import Complaint, Record, Stop, bijection, describe, part, quiet_world, tensor, to_array, to_float, unpack

SIZES = ("D=2 ", "D=3 ")
MOST = 64  # parameters that a layer may have
ASIDE = 0.2  # how far weights that point against each other are off that line


# --- what the answers are given: functions, distributions and layers that hold the judge's numbers ---------------------

def slopes(inputs):
    """Name -> (function, grid): what `monotone_direction` is asked about."""
    a, b, c, x = (tensor(inputs[k]) for k in ("a", "b", "c", "x"))
    first, last = 0.4 * x[0] + 0.6 * x[1], 0.4 * x[-1] + 0.6 * x[-2]
    return {
        "a line": (lambda x: a * x + b, x),
        "a cube": (lambda x: a * x**3 + b, x),  # its slope is 0 at x = 0, and yet it rises
        "a slow climb": (lambda x: b + 1e-6 * a * x, x),
        "a climb with a jump": (lambda x: a * x + torch.sign(x - c), x),
        "the right arm of a parabola": (lambda x: a * (x - c) ** 2, c + 0.1 + x[x > 0]),
        "a falling line": (lambda x: b - a * x, x),
        "a falling exponential": (lambda x: torch.exp(-a * x), x),
        "a slow fall": (lambda x: b - 1e-6 * a * x**3, x),
        "a fall between two points": (lambda x: b - a * x, x[:2]),
        "a parabola": (lambda x: a * (x - c) ** 2, x),
        "a wave that climbs": (lambda x: x + 2 * a * torch.sin(2 * x), x),
        "a wave that falls": (lambda x: 2 * a * torch.sin(2 * x) - x, x),
        "a climb that turns before the last point": (lambda x: -(x - last).abs(), x),
        "a climb that turns after the first point": (lambda x: (x - first).abs(), x),
        "a constant": (lambda x: b + 0 * x, x),
        "a climb with a flat stretch": (lambda x: a * (x - x.clamp(-1, 1)), x),
        "a fall with a flat end": (lambda x: -a * x.clamp(max=1.5), x),
        "a staircase": (lambda x: torch.floor(a * x), x),
    }


def bends(inputs):
    """Name -> (f, base): strictly monotone maps onto the support of a base distribution, for `log_prob_1d`."""
    a, b, m, s = (tensor(inputs[k]) for k in ("a", "b", "m", "s"))
    D = torch.distributions
    return {
        "a line": (lambda x: a * x + b, D.Normal(m, s)),
        "a bend": (lambda x: a * x + 0.7 * torch.tanh(x - b), D.Normal(m, s)),
        "a CDF": (lambda x: torch.sigmoid((x - m) / s), D.Uniform(tensor(0.0), tensor(1.0))),
        "a falling line": (lambda x: b - a * x, D.Laplace(m, s)),
        "a falling exponential": (lambda x: torch.exp(-x / s), D.Exponential(a)),
        "a falling bend": (lambda x: b - a * x - 0.7 * torch.tanh(2 * x), D.Normal(m, s)),
    }


def cdfs(inputs):
    """Name -> CDF, elementwise, for `inverse_cdf_sample`."""
    m, s, w = (tensor(inputs[k]) for k in ("m", "s", "w"))
    return {
        "logistic": lambda x: torch.sigmoid((x - m[0]) / s[0]),
        "exponential": lambda x: -torch.expm1(-x.clamp_min(0) / s[0]),
        "two humps": lambda x: w * torch.sigmoid((x - m[0]) / s[0]) + (1 - w) * torch.sigmoid((x - m[1]) / s[1]),
    }


def fields(inputs):
    """Name -> f: (B, D) -> (B, D), for `log_abs_det_jacobian`; each works on a single row (D,) as well."""
    A, R, u, w = (tensor(inputs[k]) for k in ("A", "R", "u", "w"))
    return {
        "a linear map": lambda x: x @ A.T + u,
        "a reflection": lambda x: x @ R.T,
        "a spiral": lambda x: torch.stack([x[..., 0].exp() * x[..., 1].cos(), x[..., 0].exp() * x[..., 1].sin()], -1),
        "a bend": lambda x: x + u * torch.tanh(x @ w)[..., None],
        "one dimension": lambda x: -torch.sinh(x),
        "a shrinking map": lambda x: 1e-12 * x * x.new_ones(1),
    }


class Warp(nn.Module):
    """z_1 = x_1 exp(a_1) + b_1, and z_i = x_i exp(a_i tanh(x_1)) + b_i x_1^2 for the others: a layer for `Flow`."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def bend(self, x1):
        """The log-scales and shifts of all coordinates, (B, D) each."""
        scale = torch.cat([self.a[:1].expand(len(x1), 1), self.a[1:] * torch.tanh(x1)], -1)
        return scale, torch.cat([self.b[:1].expand(len(x1), 1), self.b[1:] * x1**2], -1)

    def forward(self, x):
        scale, shift = self.bend(x[:, :1])
        return x * scale.exp() + shift, scale.sum(-1)

    def inverse(self, z):
        scale, shift = self.bend((z[:, :1] - self.b[0]) * torch.exp(-self.a[0]))
        return (z - shift) * (-scale).exp()


class Linear(nn.Module):
    """z = A x + b."""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = nn.Parameter(A), nn.Parameter(b)

    def forward(self, x):
        return x @ self.A.T + self.b, torch.linalg.slogdet(self.A)[1].expand(len(x))

    def inverse(self, z):
        return torch.linalg.solve(self.A, (z - self.b).T).T


class Bend(nn.Module):
    """z = asinh(k x) entry by entry."""

    def __init__(self, k):
        super().__init__()
        self.k = nn.Parameter(k)

    def forward(self, x):
        return torch.asinh(self.k * x), (self.k.log() - 0.5 * torch.log1p((self.k * x) ** 2)).sum(-1)

    def inverse(self, z):
        return torch.sinh(z) / self.k


def steps(inputs):
    """The three layers that `Compose` is given; no two of them commute."""
    p = {k: tensor(v) for k, v in inputs.items() if k in ("A", "shift", "k", "a", "b")}
    return [Warp(p["a"], p["b"]), Bend(p["k"]), Linear(p["A"], p["shift"])]


def left(record, step, x):
    """Write down what a step left of its input, as "step.x after"."""
    with contextlib.suppress(Stop):
        record[f"{step}.x after"] = record.run(f"{step}.x after", lambda: to_array(step, "its input afterwards", x))


# --- functions -------------------------------------------------------------------------------------------------------

def monotone_direction(objects, inputs):
    (direction,) = objects
    record = Record()
    with quiet_world():
        for name, (f, x) in slopes(inputs).items():
            with contextlib.suppress(Stop):
                record[f"{name}.answer"] = record.run(name, lambda f=f, x=x: to_float(f"monotone_direction of {name}", "the answer", direction(f, x.clone()), "an int, 1, -1 or 0"))
    return record


def log_prob_1d(objects, inputs):
    (log_prob,) = objects
    record = Record()
    with quiet_world():
        for name, (f, base) in bends(inputs).items():
            with contextlib.suppress(Stop):
                x = tensor(inputs["x"])
                record.one(name, lambda f=f, base=base, x=x: log_prob(x, f, base), "log_prob")
                left(record, name, x)
        for name in ("a bend", "a falling bend"):
            f, base = bends(inputs)[name]
            with contextlib.suppress(Stop):
                record.one(f"{name} on a grid", lambda f=f, base=base: log_prob(tensor(inputs["line"]), f, base), "log_prob")
        with contextlib.suppress(Stop):
            f, base = bends(inputs)["a bend"]
            record.one("a bend at one point", lambda: log_prob(tensor(inputs["x"][:1]), f, base), "log_prob")
    return record


def inverse_cdf_sample(objects, inputs):
    (sample,) = objects
    record = Record()
    with quiet_world():
        for step, name, u, lo, hi, more in (
            ("logistic", "logistic", "u", "lo", "hi", {}), ("exponential", "exponential", "u", "zero", "hi", {}),
            ("two humps", "two humps", "even", "lo", "hi", {}), ("tails", "logistic", "far", "lo", "hi", {"steps": 80}),
            ("few steps", "logistic", "u", "lo", "hi", {"steps": int(inputs["few"])}),
        ):
            asked = []

            def cdf(x, f=cdfs(inputs)[name], asked=asked):
                x = torch.as_tensor(x)
                asked.append(x.numel())
                return f(x)

            with contextlib.suppress(Stop):
                given = tensor(inputs[u])
                record.one(step, lambda: sample(given, cdf, float(inputs[lo]), float(inputs[hi]), **more), "x")
                left(record, step, given)
                record[f"{step}.evaluations"] = torch.tensor(sum(asked)).numpy()
    return record


def mixture_cdf(objects, inputs):
    (f,) = objects
    return mixture_map("mixture_cdf", "z", f, inputs, line="line")


def log_abs_det_jacobian(objects, inputs):
    (log_det,) = objects
    record = Record()
    with quiet_world():
        for name, f in fields(inputs).items():
            with contextlib.suppress(Stop):
                x = tensor(inputs[f"{name} x"])
                record.one(name, lambda f=f, x=x: log_det(f, x), "ldj")
                left(record, name, x)
        with contextlib.suppress(Stop):
            record.one("one row", lambda: log_det(fields(inputs)["a bend"], tensor(inputs["a bend x"][:1])), "ldj")
    return record


# --- classes that are given transforms -------------------------------------------------------------------------------

def flow(objects, inputs):
    (Flow,) = objects
    record = Record()
    with quiet_world():
        for size in SIZES:
            with contextlib.suppress(Stop):
                one_flow(record, size, Flow, part(inputs, size))
    return record


def one_flow(record, size, Flow, inputs):
    """Density, samples and gradient of a flow on D independent normal variables, through a Warp."""
    a, b, direction = (tensor(inputs[k]) for k in ("a", "b", "direction"))

    def made(layer):
        return Flow(torch.distributions.Normal(tensor(inputs["loc"]), tensor(inputs["scale"])), layer)

    def attempt(step, name, call):
        with contextlib.suppress(Stop):
            record.one(size + step, call, name)

    theirs = record.run(size + "construction", lambda: made(Warp(a, b)))
    x = tensor(inputs["x"])
    attempt("log_prob", "log_prob", lambda: theirs.log_prob(x))
    left(record, size + "log_prob", x)
    attempt("log_prob of one row", "log_prob", lambda: theirs.log_prob(tensor(inputs["x"][:1])))
    torch.manual_seed(int(inputs["noise"]))
    attempt("sample", "x", lambda: theirs.sample(int(inputs["n"])))
    attempt("sample of three", "x", lambda: theirs.sample(3))
    if "grid" in inputs:
        attempt("log_prob on a grid", "log_prob", lambda: theirs.log_prob(tensor(inputs["grid"])))

    def loss(layer):
        ((value, _),) = unpack("log_prob", made(layer).log_prob(tensor(inputs["x"])), "log_prob")
        return (tensor(inputs["r"]) * value.reshape(len(inputs["x"]), -1).sum(-1)).sum()

    def along():
        layer = Warp(a, b)
        value = loss(layer)
        return (torch.autograd.grad(value, layer.a)[0] * direction).sum() if value.requires_grad else torch.zeros(())

    attempt("gradient", "along", along)
    attempt("gradient", "nudged", lambda: torch.stack([loss(Warp(a + t * direction, b)).detach() for t in inputs["nudges"]]))


def compose(objects, inputs):
    (Compose,) = objects
    record = Record()

    def loss(k):
        warp, _, linear = steps(inputs)
        bend = Bend(k)
        (z, _), (ldj, _) = unpack("forward", Compose([warp, bend, linear]).forward(tensor(inputs["x"])), "z", "ldj")
        return bend, (tensor(inputs["c"]) * z).sum() + (tensor(inputs["r"]) * ldj).sum()

    def along():
        bend, value = loss(tensor(inputs["k"]))
        return (torch.autograd.grad(value, bend.k)[0] * tensor(inputs["direction"])).sum() if value.requires_grad else torch.zeros(())

    with quiet_world():
        with contextlib.suppress(Stop):
            layers = steps(inputs)
            theirs = record.run("construction", lambda: Compose(list(layers)))
            bijection(record, "", theirs, inputs)
            with contextlib.suppress(Stop):
                record["parameters.found"] = record.run("parameters", lambda: torch.tensor(registered(theirs, layers)).numpy())
        with contextlib.suppress(Stop):
            (_, bend, _) = steps(inputs)
            alone = record.run("construction with one transform", lambda: Compose([bend]))
            record.many("forward with one transform", lambda: alone.forward(tensor(inputs["x"])), "z", "ldj")
            record.one("inverse with one transform", lambda: alone.inverse(tensor(inputs["z"])), "x")
        with contextlib.suppress(Stop):
            record.one("gradient", along, "along")
            nudged = [tensor(inputs["k"]) + t * tensor(inputs["direction"]) for t in inputs["nudges"]]
            record.one("gradient", lambda: torch.stack([loss(k)[1].detach() for k in nudged]), "nudged")
    return record


def registered(theirs, layers):
    """How many of the layers' parameters `theirs.parameters()` gives, and how many there are."""
    if not issubclass(type(theirs), nn.Module):
        raise Complaint(f"Compose should be an nn.Module, so that a flow's optimiser finds the weights of its layers; it is {describe(theirs)}")
    wanted = {id(p) for layer in layers for p in layer.parameters()}
    return [len(wanted & {id(p) for p in itertools.islice(theirs.parameters(), MOST)}), len(wanted)]


# --- layers with parameters of their own -----------------------------------------------------------------------------

def trainable(layer, name):
    """The parameters of a student's layer that can be trained, in their order; a Complaint if it has none."""
    if not issubclass(type(layer), nn.Module):
        raise Complaint(f"{name} should be an nn.Module, so that its weights can be trained; it is {describe(layer)}")
    found = list(itertools.islice(layer.parameters(), MOST))
    for p in found:
        to_array(name, "a parameter", p)
    found = [p for p in found if p.requires_grad and p.is_floating_point()]
    if not found:
        raise Complaint(f"{name} has no parameters: PyTorch finds weights that are an nn.Parameter of the module")
    return found


def values(params, inputs, draw):
    """One value for each parameter: the judge's numbers, in the order of the parameters.

    In the last draws, one for each row (f, g) of "factors", parameters of one size are made of nearly the same numbers, times f,
    -g, f, -g, ...: two vectors then point against each other, which is where an unconstrained layer folds space.
    """
    numbers, factors = tensor(inputs["draws"])[draw], inputs["factors"]
    row, seen, found, start = draw - (len(inputs["draws"]) - len(factors)), {}, [], 0
    for p in params:
        flat = numbers[torch.arange(start, start + p.numel()) % len(numbers)]
        start += p.numel()
        if row >= 0:
            first, times = seen.get(p.numel(), (flat, 0))
            flat = (first + (ASIDE * flat if times else 0)) * factors[row, times % 2] * (-1) ** times
            seen[p.numel()] = first, times + 1
        found.append(flat.reshape(p.shape))
    return found


def bent(record, make, name, inputs):
    """A layer with a forward only, with each of the judge's draws of weights: "forward" for the first, "other weights 1: forward", ...

    `make(dim)` gives the student's layer. x (B, D), near (N, D) for difference quotients, "line" (M, D) points on lines across space.
    """
    with contextlib.suppress(Stop):
        layer = record.run("construction", lambda: make(inputs["x"].shape[1]))
        record.many("forward of a fresh layer", lambda: layer.forward(tensor(inputs["x"])), "z", "ldj")
        params = record.run("parameters", lambda: trainable(layer, name))
        record["parameters.sizes"] = torch.tensor([p.numel() for p in params]).numpy()
        for draw in range(len(inputs["draws"])):
            step = f"other weights {draw}: " if draw else ""
            record.run(step + "parameters", lambda draw=draw: fill(params, inputs, draw))
            x = tensor(inputs["x"])
            with Calls() as calls:
                record.many(step + "forward", lambda x=x: layer.forward(x), "z", "ldj")
            left(record, step + "forward", x)
            record[step + "forward calls"] = torch.tensor([n in calls.names for n in COSTLY]).numpy()
            record.many(step + "forward near", lambda: layer.forward(tensor(inputs["near"])), "z", "ldj")
            record.many(step + "forward on lines", lambda: layer.forward(tensor(inputs["line"])), "z", "ldj")
        record.run("parameters", lambda: fill(params, inputs, 0))
        record.many("forward of one row", lambda: layer.forward(tensor(inputs["x"][:1])), "z", "ldj")

        def trained():
            (z, _), (ldj, _) = unpack("forward", layer.forward(tensor(inputs["x"])), "z", "ldj")
            loss = (tensor(inputs["c"]) * z).sum() + ldj.sum()
            grads = torch.autograd.grad(loss, params, allow_unused=True) if loss.requires_grad else [None] * len(params)
            grads = [torch.zeros(1) if g is None else g for g in grads]
            return torch.stack([g.abs().sum() for g in grads]), torch.stack([(g != 0).sum() for g in grads])

        record.many("gradient", trained, "sizes", "entries")
    if "grid" in inputs:
        with contextlib.suppress(Stop):
            flat = record.run("construction in the plane", lambda: make(2))
            record.run("parameters in the plane", lambda: fill(trainable(flat, name), inputs, int(inputs["shown"])))
            record.many("picture", lambda: flat.forward(tensor(inputs["grid"])), "z", "ldj")


def fill(params, inputs, draw):
    with torch.no_grad():
        for p, v in zip(params, values(params, inputs, draw)):
            p.copy_(v)


def planar(objects, inputs):
    (Planar,) = objects
    record = Record()
    with quiet_world(int(inputs["noise"])):
        bent(record, Planar, "Planar", inputs)
    return record


def radial(objects, inputs):
    (Radial,) = objects
    record = Record()
    with quiet_world(int(inputs["noise"])):
        bent(record, Radial, "Radial", inputs)
    return record


def sylvester(objects, inputs):
    (Sylvester,) = objects
    record = Record()
    with quiet_world(int(inputs["noise"])):
        bent(record, lambda dim: Sylvester(dim, int(inputs["m"])), "Sylvester", inputs)
    return record


PROBES = {p.__name__: p for p in (
    monotone_direction, log_prob_1d, inverse_cdf_sample, mixture_cdf, log_abs_det_jacobian, flow, compose, planar, radial, sylvester,
)}
