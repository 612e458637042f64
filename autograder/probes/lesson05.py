"""How to run the answers of lesson 05 (discrete and surjective flows)."""
import contextlib
import math

import numpy as np
import torch
from torch import distributions, nn

from autograder.probes.common import sizes, tanh_net
from autograder.probes.record import Complaint, Record, Stop, part, plain, quiet_world, tensor, unpack, words

# --- modular_shift ---------------------------------------------------------------------------------------------------

MODULAR_SIZES = (4, 6, 7)
MODULAR_FORMS = {  # how mu and sigma may be wanted: the first form with which both functions run is used
    "numbers": lambda n, like: int(n),
    "tensors": lambda n, like: torch.full_like(like, int(n)),
    "scalars": lambda n, like: torch.tensor(int(n)),
}


def modular_units(K):
    return [s for s in range(K) if math.gcd(s, K) == 1]


def modular_others(K):
    return [s for s in range(K) if math.gcd(s, K) != 1]


def modular_shift(objects, inputs):
    record = Record()

    def call(f, x, mu, sigma, K, form):
        given = MODULAR_FORMS[form]
        return f(x, mu if isinstance(mu, torch.Tensor) else given(mu, x), given(sigma, x), K)

    def runs(form):
        try:
            for f in objects:
                call(f, torch.arange(7), 2, 3, 7, form)
        except Exception:
            return False
        return True

    def all_of(step, f, K, form):
        """The images of 0 .. K - 1 for each sigma that has an inverse and each mu: (units, K, K)."""
        def rows():
            calls = [(mu, sigma) for sigma in modular_units(K) for mu in range(K)]
            found = [unpack(step, call(f, torch.arange(K), mu, sigma, K, form), "result")[0][1] for mu, sigma in calls]
            for row in found:
                if row.shape != (K,):
                    raise Complaint(f"{step} returns shape {row.shape} for {K} integers; it should be ({K},)")
            return torch.from_numpy(np.stack(found).reshape(-1, K, K))

        record.one(step, rows, "result")

    def refused(f, K, form):
        """For each sigma that has no inverse, whether the call raises."""
        found = []
        for sigma in modular_others(K):
            try:
                call(f, torch.arange(K), 1, sigma, K, form)
            except NotImplementedError:
                raise
            except Exception:
                found.append(True)
            else:
                found.append(False)
        return np.array(found)

    with quiet_world():
        with contextlib.suppress(Stop):
            form = record.run("modular_shift", lambda: next((form for form in MODULAR_FORMS if runs(form)), "numbers"))
            for name, f in zip(("modular_shift", "modular_unshift"), objects):
                for K in MODULAR_SIZES:
                    with contextlib.suppress(Stop):
                        all_of(f"{name}, K = {K}", f, K, form)
                    with contextlib.suppress(Stop):
                        step = f"{name}, K = {K}, sigma without an inverse"
                        record.keep(step, lambda f=f, K=K: refused(f, K, form))
                with contextlib.suppress(Stop):
                    x, mu = tensor(inputs["x"]), tensor(inputs["mu"])
                    record.one(f"{name} of a batch", lambda f=f, x=x, mu=mu: call(f, x, mu, 3, 7, form), "result")
                    record.keep(f"{name} of a batch.after", lambda x=x: x)
                    record.keep(f"{name} of a batch.mu after", lambda mu=mu: mu)
    return record


modular_shift.takes = 2


# --- one_hot_argmax_st -----------------------------------------------------------------------------------------------

# Positions, rows, rows in which the last class never wins, and so many that a rounding error in one of a hundred shows.
ONE_HOT_SHAPES = ((5, 3, 4), (6, 5), (4, 3), (400, 6))
ONE_HOT_BATCHES = tuple(f"one_hot_argmax_st (logits of shape {shape})" for shape in ONE_HOT_SHAPES)


def straight_through(record, step, f, given, c):
    """The value of `f` at `given`, whether it can be trained through, and the gradient of (c * value).sum()."""

    def forward():
        leaf = tensor(given).requires_grad_()
        sent = leaf * 1     # no leaf, as in a net: so that to write into it is possible, and seen
        (y, _), = unpack(step, f(sent), "value")
        return leaf, sent, y

    with contextlib.suppress(Stop):
        leaf, sent, y = record.run(step, forward)
        record.one(step, lambda: y, "value")
        record.keep(f"{step}.after", lambda: sent)
        record[f"{step}.in the graph"] = np.array(bool(y.requires_grad and y.is_floating_point()))

        def gradient():
            if not record[f"{step}.in the graph"] or y.shape != c.shape:
                return torch.zeros_like(leaf)
            (g,) = torch.autograd.grad((tensor(c) * y).sum(), leaf, allow_unused=True)
            return torch.zeros_like(leaf) if g is None else g

        record.one(f"gradient for {step}", gradient, "gradient")


def one_hot_argmax_st(objects, inputs):
    (f,) = objects
    record = Record()
    with quiet_world():
        for name in ONE_HOT_BATCHES:
            mine = part(inputs, f"{name}.")
            straight_through(record, name, lambda logits, tau=float(mine["tau"]): f(logits, tau), mine["logits"], mine["c"])
        with contextlib.suppress(Stop):
            if "line" in inputs:
                line = tensor(inputs["line"]).requires_grad_()
                logits = torch.stack([line, 0 * line], -1)

                def curve():
                    (y, _), = unpack("one_hot_argmax_st", f(logits, float(inputs["line tau"])), "value")
                    (slope,) = torch.autograd.grad(y[..., 0].sum(), line, allow_unused=True) if y.requires_grad else (None,)
                    return y[..., 0].detach(), torch.zeros_like(line) if slope is None else slope

                record.many("picture", curve, "value", "slope")
    return record


# --- round_st --------------------------------------------------------------------------------------------------------

def round_st(objects, inputs):
    (f,) = objects
    record = Record()
    with quiet_world():
        straight_through(record, "round_st", f, inputs["x"], inputs["c"])
        straight_through(record, "round_st of a row", f, inputs["row"], inputs["row c"])
        with contextlib.suppress(Stop):
            if "line" in inputs:
                record.one("picture", lambda: f(tensor(inputs["line"])), "value")
    return record


# --- idf_coupling ----------------------------------------------------------------------------------------------------

class IntegerNet(nn.Module):
    """A net (B, d) -> (B, D - d) of the judge's weights; it takes any precision and any kind of number, as x holds integers."""

    def __init__(self, w):
        super().__init__()
        self.function = tanh_net(w)

    def forward(self, x):
        return self.function(x.double())


def integer_weights(mine, nudge=0.0):
    return {k: tensor(v + nudge * mine[f"direction.{k}"]) for k, v in part(mine, "net.").items()}


def idf_coupling(objects, inputs):
    (IDFCoupling,) = objects
    record = Record()

    def one_size(size, mine):
        layer = record.run(size + "construction", lambda: IDFCoupling(IntegerNet(integer_weights(mine))))
        with contextlib.suppress(Stop):
            x = tensor(mine["x"])
            z, _ = record.many(size + "forward", lambda: layer.forward(x), "z", "ldj")
            record.keep(size + "x after", lambda: x)
            record.one(size + "inverse of forward", lambda: layer.inverse(z.detach().double()), "x")
        with contextlib.suppress(Stop):
            z = tensor(mine["z"])
            x = record.one(size + "inverse", lambda: layer.inverse(z), "x")
            record.keep(size + "z after", lambda: z)
            record.many(size + "forward of inverse", lambda: layer.forward(x.detach().double()), "z", "ldj")
        with contextlib.suppress(Stop):
            record.many(size + "forward of one row", lambda: layer.forward(tensor(mine["x"][:1])), "z", "ldj")

        def gradient():
            """The slopes of (c * z).sum() along the direction in the net's weights, and along c in x."""
            w = {k: v.requires_grad_() for k, v in integer_weights(mine).items()}
            x = tensor(mine["x"]).requires_grad_()
            (z, _), _ = unpack("forward", IDFCoupling(IntegerNet(w)).forward(x), "z", "ldj")
            if not z.requires_grad or z.shape != x.shape:
                return torch.zeros(2)
            *by_w, by_x = torch.autograd.grad((tensor(mine["c"]) * z).sum(), [*w.values(), x], allow_unused=True)
            along = sum((g * tensor(mine[f"direction.{k}"])).sum() for k, g in zip(w, by_w) if g is not None)
            return torch.stack([torch.as_tensor(along), torch.zeros(()) if by_x is None else (by_x * tensor(mine["c"])).sum()])

        with contextlib.suppress(Stop):
            record.one(size + "gradient", gradient, "along")

    with quiet_world():
        for size in sizes(inputs):
            with contextlib.suppress(Stop):
                one_size(size, part(inputs, size))
        with contextlib.suppress(Stop):
            if "grid" in inputs:
                mine = part(inputs, "D=2 ")
                layer = record.run("construction", lambda: IDFCoupling(IntegerNet(integer_weights(mine))))
                record.many("picture", lambda: layer.forward(tensor(inputs["grid"])), "z", "ldj")
    return record


# --- uniform_dequantize ----------------------------------------------------------------------------------------------

DEQUANTIZED = tuple(f"uniform_dequantize ({what})" for what in ("two numbers a point", "three numbers a point", "one row", "one cell"))


def uniform_dequantize(objects, inputs):
    (f,) = objects
    record = Record()
    with quiet_world():
        for name in DEQUANTIZED:
            with contextlib.suppress(Stop):
                x, K = inputs[f"{name}.x"], int(inputs[f"{name}.K"])
                sent = tensor(x)
                record.many(name, lambda sent=sent, K=K: f(sent, K), "y", "contribution")
                record.keep(f"{name}.after", lambda sent=sent: sent)
        with contextlib.suppress(Stop):
            name = DEQUANTIZED[0]
            record.many("uniform_dequantize (a second call)", lambda: f(tensor(inputs[f"{name}.x"]), int(inputs[f"{name}.K"])), "y", "contribution")
    return record


# --- variational_bound -----------------------------------------------------------------------------------------------

class CellProposal:
    """A proposal of the judge's numbers, and how often it was asked.

    Asked again it gives the numbers of the next rows, as one that draws would give others.
    """

    def __init__(self, u, log_q):
        self.u, self.log_q, self.asked = u, log_q, 0

    def __call__(self, x):
        turn, self.asked = self.asked, self.asked + 1
        return self.u.roll(turn, 0), self.log_q.roll(turn, 0)


def cell_density(w):
    """log p on [0, K]^D, (B, D) -> (B,): a mixture of normals in each coordinate, not cut off outside."""
    weights, means, scales = (tensor(w[k]) for k in ("weights", "means", "scales"))

    def log_prob(y):
        t = (y.double()[..., None] - means) / scales
        return torch.logsumexp(weights.log() - scales.log() - 0.5 * t**2 - 0.5 * math.log(2 * math.pi), -1).sum(-1)

    return log_prob


class WatchedDensity:
    """log_prob as it is, and what it was first asked: the point, and whether a gradient could pass through the call to it."""

    def __init__(self, log_prob):
        self.log_prob, self.point, self.call = log_prob, None, "not asked"

    def __call__(self, y):
        mapped = issubclass(type(y), torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(y)   # no numbers to keep inside vmap
        if self.point is None and not mapped:
            self.point = plain("the point that log_prob is asked about", y).detach().double().clone()
            self.call = "under no_grad" if not torch.is_grad_enabled() else "alive" if y.requires_grad else "at a point that is cut off"
        return self.log_prob(y)


class SquashedProposal(nn.Module):
    """The smallest q that can be trained: u = sigmoid(a_x + b_x eps) with a and b for each integer, eps the judge's normal points."""

    def __init__(self, eps, K):
        super().__init__()
        self.eps, self.a, self.log_b = eps, nn.Parameter(torch.zeros(K)), nn.Parameter(torch.full((K,), 0.4))

    def forward(self, x):
        a, log_b = self.a[x.long()], self.log_b[x.long()]
        v = a + log_b.exp() * self.eps
        log_slope = nn.functional.logsigmoid(v) + nn.functional.logsigmoid(-v)
        log_q = -0.5 * self.eps**2 - 0.5 * math.log(2 * math.pi) - log_b - log_slope
        return torch.sigmoid(v), log_q.sum(-1)


def variational_bound(objects, inputs):
    (f,) = objects
    record = Record()
    density = cell_density(part(inputs, "density."))

    def bound(step, name):
        mine = part(inputs, f"{name}.")
        q, watched = CellProposal(tensor(mine["u"]), tensor(mine["log_q"])), WatchedDensity(density)
        record.one(step, lambda: f(tensor(mine["x"]), q, watched), "bound")
        record[f"{step}.asked"] = np.array(q.asked)
        if watched.point is not None:
            record[f"{step}.point"] = watched.point.numpy()

    def gradient():
        """The gradients of the weighted bound in what q gave."""
        mine = part(inputs, "points.")
        u, log_q = tensor(mine["u"]).requires_grad_(), tensor(mine["log_q"]).requires_grad_()
        watched = WatchedDensity(density)
        ((value, _),) = unpack("variational_bound", f(tensor(mine["x"]), CellProposal(u, log_q), watched), "bound")
        record["gradient.log_prob"] = np.array(watched.call)
        if not value.requires_grad or value.shape != log_q.shape:
            return torch.zeros_like(u), torch.zeros_like(log_q)
        by_u, by_log_q = torch.autograd.grad((tensor(mine["c"]) * value).sum(), (u, log_q), allow_unused=True)
        return torch.zeros_like(u) if by_u is None else by_u, torch.zeros_like(log_q) if by_log_q is None else by_log_q

    def train():
        x, K = tensor(inputs["train.x grid"]), int(inputs["train.K"])
        q = SquashedProposal(tensor(inputs["train.eps grid"]), K)
        optimiser = torch.optim.Adam(q.parameters(), lr=float(inputs["train.rate"]))
        for _ in range(int(inputs["train.steps"])):
            optimiser.zero_grad()
            ((value, _),) = unpack("variational_bound", f(x, q, density), "bound")
            if not value.requires_grad:
                raise Complaint("variational_bound is cut off from the computation graph: q cannot be trained through it")
            (-value.mean()).backward()
            optimiser.step()
        return torch.stack([q.a.detach(), q.log_b.detach()])

    with quiet_world():
        for name in ("points", "cells", "ideal"):
            with contextlib.suppress(Stop):
                bound(name, name)
        with contextlib.suppress(Stop):
            record.many("gradient", gradient, "u", "log_q")
        with contextlib.suppress(Stop):
            if "train.x grid" in inputs:
                record.one("training", train, "weights of q")
    return record


# =====================================================================================================================
# Layers that draw one way: slice_layer, split_layer, abs_layer, max_layer, sort_layer, argmax_layer, stochastic_layer
# =====================================================================================================================

SURVAE_DRAWS = 10_000  # of a layer that draws by itself, for shares


class SurvaeNoise:
    """Rows of the judge's noise. Each draw begins one row further on: two draws differ, and either can be recognised."""

    def __init__(self, rows):
        self.rows, self.drawn = tensor(rows), 0

    def take(self, n):
        self.drawn += 1
        return self.rows.roll(1 - self.drawn, 0)[:n]


class SurvaeNormal(distributions.Normal):
    """A normal distribution whose draws are made of the judge's noise."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale, validate_args=False)
        self.noise = noise

    def rsample(self, sample_shape=()):
        drawn = self.loc + self.scale * self.noise.take(len(self.loc))
        return drawn.expand(*sample_shape, *drawn.shape)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)


def survae_conditional(parameters, noise):
    """What gives a distribution with the event in its last dimension: `parameters(x) -> (loc, scale)`."""
    return lambda x: distributions.Independent(SurvaeNormal(*parameters(x), noise), 1)


def survae_net(w):
    """x -> (loc, scale) by the judge's weights."""
    net = tanh_net(w)

    def parameters(x):
        loc, s = net(x).chunk(2, -1)
        return loc, torch.exp(0.5 * s)

    return parameters


def survae_line(abs_):
    """x -> (a x + b, s) on the line."""
    a, b, s = (float(v) for v in abs_)
    return lambda x: (a * x + b, torch.full_like(x, s))


def survae_proposal(conditional):
    def q(x):
        distribution = conditional(x)
        sample = distribution.rsample()
        return sample, distribution.log_prob(sample)

    return q


def survae_weights(inputs, names="net.", t=0.0, graph=False):
    """The entries whose names hold `names` as tensors, moved by t along the judge's directions."""
    found = {k: tensor(v + t * inputs[k.replace(names, "direction.")]) for k, v in inputs.items() if names in k}
    return {k: v.requires_grad_(graph) for k, v in found.items()}


def survae_run(record, step, layer, inputs, noises=()):
    """Forward and inverse on the judge's points, and one after the other; every step's noise starts anew."""

    def fresh(call):
        for noise in noises:
            noise.drawn = 0
        return call()

    def forward():
        x = tensor(inputs["x"])
        z, _ = record.many(step + "forward", lambda: fresh(lambda: layer.forward(x)), "z", "contribution")
        record.keep(step + "x after", lambda: x)
        z = survae_double(z)
        record.one(step + "inverse of forward", lambda: fresh(lambda: layer.inverse(z)), "x")

    def inverse():
        z = tensor(inputs["z"])
        x = record.one(step + "inverse", lambda: fresh(lambda: layer.inverse(z)), "x")
        record.keep(step + "z after", lambda: z)
        x = survae_double(x)
        record.many(step + "forward of inverse", lambda: fresh(lambda: layer.forward(x)), "z", "contribution")

    def row():
        x = tensor(inputs["x"][:1])
        record.many(step + "forward of one row", lambda: fresh(lambda: layer.forward(x)), "z", "contribution")
        record.one(step + "inverse of one row", lambda: fresh(lambda: layer.inverse(tensor(inputs["z"][:1]))), "x")

    for call in (forward, inverse, row):
        with contextlib.suppress(Stop):
            call()


def survae_double(t):
    """What an answer returned, to be handed to its other direction: classes stay whole numbers."""
    return t.detach().double() if t.is_floating_point() else t


def survae_forward(record, step, layer, x):
    """One more run of forward, in a step of its own."""
    with contextlib.suppress(Stop):
        record.many(step, lambda: layer.forward(x.clone() if torch.is_tensor(x) else tensor(x)), "z", "contribution")


def survae_gradient(record, step, make, inputs, names="net."):
    """The gradient of a weighted sum of z and contribution along a direction, by autograd, and its value at nudged weights.

    `make(w)` gives a layer and its x for the weights w. A contribution of a wrong size is left out (its own case says so).
    """

    def loss(w):
        layer, x = make(w)
        (z, _), (paid, _) = unpack(words(step + "forward"), layer.forward(x), "z", "contribution")
        total = (tensor(inputs["c"]) * z).sum()
        return total + (tensor(inputs["r"]) * paid.reshape(-1)).sum() if paid.numel() == len(z) else total

    def along():
        w = survae_weights(inputs, names, graph=True)
        value = loss(w)
        if not value.requires_grad:
            return torch.zeros(())
        grads = torch.autograd.grad(value, list(w.values()), allow_unused=True)
        found = [(g * tensor(inputs[k.replace(names, "direction.")])).sum() for k, g in zip(w, grads) if g is not None]
        return sum(found) + torch.zeros(())

    def moved(t):
        return loss(survae_weights(inputs, names, t)).detach()

    with contextlib.suppress(Stop):
        record.one(step + "gradient", along, "along")
        record.one(step + "gradient", lambda: torch.stack([moved(t) for t in inputs["nudges"]]), "nudged")


def survae_shares(holds, parts):
    """How often each column holds, to the nearest of `parts` parts: the same for every generator of random numbers."""
    return np.round(np.asarray(holds, float).mean(0) * parts) / parts


# --- slice_layer -----------------------------------------------------------------------------------------------------

def slice_layer(objects, inputs):
    (Slice,) = objects
    record = Record()
    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            keep = mine["x"].shape[1]
            noise = SurvaeNoise(mine["noise"])

            def make(w, noise=noise, keep=keep):
                return Slice(survae_proposal(survae_conditional(survae_net(part(w, "net.")), noise)), keep)

            def at(w, make=make, noise=noise):
                noise.drawn = 0
                return make(w), w["net.x"]

            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda make=make, mine=mine: make(survae_weights(mine)))
                survae_run(record, size, layer, mine, (noise,))
                survae_gradient(record, size, at, mine)
        for name in ("ideal", "rough") if "line x" in inputs else ():
            def on_line(name=name):
                conditional = survae_conditional(survae_line(inputs[f"{name} q"]), SurvaeNoise(inputs["line noise"]))
                return Slice(survae_proposal(conditional), 1)

            with contextlib.suppress(Stop):
                step = f"forward with the {name} proposal"
                survae_forward(record, step, record.run(step, on_line), inputs["line x"])
    return record


# --- split_layer -----------------------------------------------------------------------------------------------------

def split_layer(objects, inputs):
    (Split,) = objects
    record = Record()
    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            keep = mine["z"].shape[1]
            noise = SurvaeNoise(mine["noise"])

            def make(w, noise=noise, keep=keep):
                return Split(survae_conditional(survae_net(part(w, "net.")), noise), keep)

            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda make=make, mine=mine: make(survae_weights(mine)))
                survae_run(record, size, layer, mine, (noise,))
                survae_gradient(record, size, lambda w, make=make: (make(w), w["net.x"]), mine)
                for name in ("line", "grid"):
                    if name in mine:
                        survae_forward(record, f"{size}forward on the {name}", layer, mine[name])
    return record


# --- abs_layer -------------------------------------------------------------------------------------------------------

def abs_layer(objects, inputs):
    (Abs,) = objects
    record = Record()

    def constant(log_odds):
        """The same log-odds, row by row, whatever z is."""
        return lambda z: tensor(log_odds)[:len(z)]

    def draws(step, make, z):
        x = record.one(step, lambda: make().inverse(tensor(z)), "x").detach()
        if x.shape == z.shape:
            positive = record.run(step, lambda: (x > 0).numpy())
            patterns = np.stack([(positive == p).all(1) for p in ((1, 1), (1, 0), (0, 1), (0, 0))], 1)
            record[step + ".patterns"] = survae_shares(patterns, 16)
            record[step + ".sizes"] = survae_shares(np.abs(np.abs(record[step + ".x"]) - z) < 1e-6, 16)

    def one_by_one(z):
        """How many patterns of signs come up when each row is a call of its own: 64 fair draws miss one with probability 4e-8."""
        layer, found = Abs(), set()
        for row in z:
            found.add(tuple((plain("inverse", layer.inverse(tensor(row[None]))) > 0).reshape(-1).tolist()))
        return torch.tensor(len(found))

    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)

            def make(w):
                net = tanh_net(part(w, "net."))
                return Abs(lambda z: 2 * net(z))

            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda make=make, mine=mine: make(survae_weights(mine)))
                survae_forward(record, size + "forward", layer, mine["x"])
                with contextlib.suppress(Stop):  # at once after forward, for an inverse that lives by what forward stored
                    record.one(size + "inverse of forward", lambda layer=layer, mine=mine: layer.inverse(tensor(np.abs(mine["x"]))), "x")
                survae_forward(record, size + "forward of one row", layer, mine["x"][:1])
                survae_gradient(record, size, lambda w, make=make: (make(w), w["net.x"]), mine)
                single = record.run(size + "construction", lambda mine=mine: Abs(lambda z: tensor(mine["far"])[:len(z)].float()))
                survae_forward(record, size + "forward in float32", single, tensor(mine["x"]).float())
            with contextlib.suppress(Stop):
                uniform = record.run(size + "construction without log_odds", Abs)
                survae_forward(record, size + "forward without log_odds", uniform, mine["x"])
            with contextlib.suppress(Stop):
                certain = record.run(size + "construction", lambda mine=mine: Abs(constant(mine["certain"])))
                x, z = tensor(mine["x"]), tensor(mine["z"])
                with contextlib.suppress(Stop):
                    step = size + "forward where signs are nearly certain"
                    record.many(step, lambda x=x, certain=certain: certain.forward(x), "z", "contribution")
                    record.keep(size + "x after", lambda x=x: x)
                back = record.one(size + "inverse", lambda z=z, certain=certain: certain.inverse(z), "x")
                record.keep(size + "z after", lambda z=z: z)
                with contextlib.suppress(Stop):
                    record.one(size + "inverse of one row", lambda z=z, certain=certain: certain.inverse(z[:1]), "x")
                survae_forward(record, size + "forward of inverse", certain, survae_double(back))
        with contextlib.suppress(Stop):
            draws("inverse draws", lambda: Abs(constant(np.broadcast_to(inputs["odds"], inputs["many"].shape))), inputs["many"])
        with contextlib.suppress(Stop):
            draws("inverse draws without log_odds", Abs, inputs["many"])
        with contextlib.suppress(Stop):
            record.one("inverse one by one", lambda: one_by_one(inputs["many"][:64]), "patterns")
        if "grid" in inputs:
            with contextlib.suppress(Stop):
                layer = record.run("picture", lambda: Abs(lambda z: 1.5 * z.flip(-1)))
                survae_forward(record, "picture", layer, inputs["grid"])
    return record


# --- max_layer -------------------------------------------------------------------------------------------------------

MAX_PARTS = 4  # of the shares of excesses below their median: with the judge's scales no mistake has one within 0.02 of where rounding turns


def max_forms(Max, law, scales):
    """The layer for an excess, as an answer may expect it: one law for each coordinate, the first one for all, and that with D beside it."""
    return (lambda: Max(law(scales))), (lambda: Max(law(scales[0]))), (lambda: Max(law(scales[0]), len(scales)))


def max_gamma(scales):
    return distributions.Gamma(1.5 + scales, 1 / scales)


def max_layer(objects, inputs):
    (Max,) = objects
    record = Record()
    x, z, scales = inputs["x"], inputs["z"], tensor(inputs["scales"])

    def chosen():
        """The first of `max_forms` with which x goes there, and z comes back in its shape; else the first."""
        for i, make in enumerate(max_forms(Max, distributions.HalfNormal, scales)):
            trial = Record()
            with contextlib.suppress(Stop):
                layer = trial.run("construction", make)
                trial.many("forward", lambda layer=layer: layer.forward(tensor(x)), "z", "contribution")
                if trial.one("inverse", lambda layer=layer: layer.inverse(tensor(z)), "x").shape == x.shape:
                    return i
        return 0

    def draws(layer):
        many = inputs["many"]
        x_ = record.one("inverse draws", lambda: layer.inverse(tensor(many)), "x").detach()
        if x_.shape != (len(many), x.shape[1]):
            return
        x_ = record.run("inverse draws", lambda: x_.double().numpy())
        top = x_.argmax(1)
        excess = x_.max(1, keepdims=True) - x_
        # A place drawn once for the whole batch is told from a fixed one by several calls, whichever it happens to be.
        calls = record.run("inverse draws", lambda: [int(layer.inverse(tensor(many[:2])).detach().argmax(1)[0]) for _ in range(16)])
        place = survae_shares(top[:, None] == np.arange(x.shape[1]), 8)
        record["inverse draws.place"] = np.sort(place) if place.max() == 1 and len(set(calls)) > 1 else place
        record["inverse draws.moves"] = np.array(len(set(calls)) > 1)
        others = np.sort(excess, 1)[:, 1:]
        levels = inputs["levels"][:, None] * (scales.numpy() if form == 0 else scales[0].item())
        below = top[:, None] != np.arange(x.shape[1])
        record["inverse draws.excess"] = np.stack([survae_shares(e[b, None] < v, MAX_PARTS) if b.any() else v * 0 for e, b, v in zip(excess.T, below.T, levels.T)])
        record["inverse draws.distinct"] = survae_shares((np.diff(others, axis=1) > 1e-9).all(1)[:, None], 8)
        record["inverse draws.kept"] = survae_shares(np.abs(x_.max(1, keepdims=True) - many) < 1e-5, 8)

    with quiet_world():
        form = chosen()
        record["form"] = np.array(form)

        def make(scales, law=distributions.HalfNormal):
            return max_forms(Max, law, scales)[form]()

        with contextlib.suppress(Stop):
            layer = record.run("construction", lambda: make(scales))
            survae_run(record, "", layer, inputs)
            back = record.get("inverse.x")
            if back is not None and back.shape == x.shape:
                record["inverse.kept"] = np.minimum((np.abs(back - z) < 1e-5).sum(1), 2)
            with contextlib.suppress(Stop):
                draws(layer)
            with contextlib.suppress(Stop):
                far = np.repeat([[50.0], [-50.0]], 4, 0)
                record.one("inverse far out", lambda: torch.sign(plain("inverse", layer.inverse(tensor(far)))), "signs")
            survae_gradient(record, "", lambda w: (make(w["net.scales"]), w["net.x"]), inputs)
        with contextlib.suppress(Stop):
            survae_forward(record, "forward with a Gamma excess", record.run("construction", lambda: make(scales, max_gamma)), x)
            survae_gradient(record, "with a Gamma excess ", lambda w: (make(w["net.scales"], max_gamma), w["net.x"]), inputs)
        with contextlib.suppress(Stop):
            plane = record.run("construction", lambda: make(scales[:1].expand(2)))
            for name in ("plane", "grid"):
                if name in inputs:
                    survae_forward(record, f"forward on the {name}", plane, inputs[name])
    return record


# --- sort_layer ------------------------------------------------------------------------------------------------------

def sort_layer(objects, inputs):
    (Sort,) = objects
    record = Record()

    def draws(layer):
        many = inputs["many"]  # each row ascending
        x = record.one("inverse draws", lambda: layer.inverse(tensor(many)), "x").detach()
        if x.shape == many.shape:
            x = record.run("inverse draws", lambda: x.double().numpy())
            orders = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
            record["inverse draws.orders"] = survae_shares(np.stack([(x.argsort(1) == o).all(1) for o in orders], 1), 6)
            record["inverse draws.own"] = survae_shares((np.abs(np.sort(x, 1) - many) < 1e-5).all(1)[:, None], 6)

    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", Sort)
                survae_run(record, size, layer, mine)
                survae_gradient(record, size, lambda w: (Sort(), w["net.x"]), mine)
        with contextlib.suppress(Stop):
            layer = record.run("construction", Sort)
            with contextlib.suppress(Stop):
                draws(layer)
            survae_forward(record, "D=30 forward", layer, inputs["D=30 x"])
            if "grid" in inputs:
                survae_forward(record, "forward on the grid", layer, inputs["grid"])
    return record


# --- argmax_layer ----------------------------------------------------------------------------------------------------

def argmax_layer(objects, inputs):
    (Argmax,) = objects
    record = Record()
    noise = SurvaeNoise(inputs["noise"])

    def make(w):
        """v around a row of a table for each class."""
        table, scale = w["net.table"], w["net.log_scale"].exp()

        def moments(x):
            return table[x], scale[x, None].expand(len(x), table.shape[1])

        return Argmax(survae_proposal(survae_conditional(moments, noise)))

    def at(w):
        noise.drawn = 0
        return make(w), tensor(inputs["x"])

    with quiet_world():
        with contextlib.suppress(Stop):
            layer = record.run("construction", lambda: make(survae_weights(inputs)))
            survae_run(record, "", layer, inputs, (noise,))
            noise.drawn = 0
            survae_forward(record, "forward without the last class", layer, inputs["x"][inputs["x"] < inputs["z"].shape[1] - 1])
            survae_gradient(record, "", at, inputs)
        if "plane v" in inputs:
            with contextlib.suppress(Stop):
                drawn = [inputs[k] for k in ("plane v", "plane log_q")]
                layer = record.run("construction", lambda: Argmax(lambda x: tuple(map(tensor, drawn))))
                survae_forward(record, "forward on the plane", layer, np.zeros(len(inputs["plane v"]), np.int64))
        if "grid" in inputs:
            with contextlib.suppress(Stop):
                layer = record.run("picture", lambda: Argmax(lambda x: (tensor(inputs["grid"]), torch.zeros(len(x)))))
                survae_forward(record, "picture", layer, np.arange(len(inputs["grid"])) % 2)
    return record


# --- stochastic_layer ------------------------------------------------------------------------------------------------

def stochastic_layer(objects, inputs):
    (VAELayer,) = objects
    record = Record()
    noises = SurvaeNoise(inputs["z noise"]), SurvaeNoise(inputs["x noise"])

    def make(w):
        nets = (survae_net(part(w, f"{name} net.")) for name in ("encoder", "decoder"))
        return VAELayer(*map(survae_conditional, nets, noises))

    def at(w):
        for noise in noises:
            noise.drawn = 0
        return make(w), w["net.x"]

    with quiet_world():
        with contextlib.suppress(Stop):
            layer = record.run("construction", lambda: make(survae_weights(inputs)))
            survae_run(record, "", layer, inputs, noises)
            survae_gradient(record, "", at, inputs)
        for name in ("ideal", "rough") if "line x" in inputs else ():
            def on_line(name=name):
                drawn = SurvaeNoise(inputs["line noise"])
                return VAELayer(*(survae_conditional(survae_line(inputs[k]), drawn) for k in (f"{name} q", "line p")))

            with contextlib.suppress(Stop):
                step = f"forward with the {name} encoder"
                survae_forward(record, step, record.run(step, on_line), inputs["line x"])
    return record


PROBES = {p.__name__: p for p in (
    modular_shift, one_hot_argmax_st, round_st, idf_coupling, uniform_dequantize, variational_bound, slice_layer,
    split_layer, abs_layer, max_layer, sort_layer, argmax_layer, stochastic_layer,
)}
