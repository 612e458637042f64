"""Lesson 07, inference: runs reverse and forward KL, the ELBO, the importance-weighted bound and the IAF posterior.

Nothing is left to chance but the noise that an IAF posterior draws itself: flows, encoders and proposals draw the judge's numbers.
"""
import contextlib
import math

import numpy as np
import torch
from torch import distributions, nn

from autograder.probes.common import tanh_net
from autograder.probes.lesson05 import SurvaeNoise, survae_conditional, survae_net
from autograder.probes.record import Complaint, Record, Stop, is_module, parameters, part, plain, quiet_world, tensor, unpack


def inference_weights(inputs, t=0.0):
    """The entries of `inputs` named net.* as parameters, without that prefix, moved by t along the judge's directions."""
    return {k: nn.Parameter(tensor(v + t * inputs[f"direction.{k}"])) for k, v in part(inputs, "net.").items()}


def inference_gradient(record, inputs, value):
    """The derivative of `value(weights)`, a number made of an answer, along the judge's direction by autograd, and the value at nudged weights."""

    def along():
        w = inference_weights(inputs)
        total = value(w)
        if not total.requires_grad:
            return torch.zeros(())
        slopes = torch.autograd.grad(total, list(w.values()), allow_unused=True)
        return sum(((g * tensor(inputs[f"direction.{k}"])).sum() for k, g in zip(w, slopes) if g is not None), torch.zeros(()))

    with contextlib.suppress(Stop):
        record.one("gradient", along, "along")
        record.one("gradient", lambda: torch.stack([value(inference_weights(inputs, t)).detach() for t in inputs["nudges"]]), "nudged")


SEED = 20_071
"""What the generator is seeded with around an answer: after the answer it must still be this."""


def seeded_inside():
    return np.array(int(torch.default_generator.initial_seed() != SEED))


def demand(what, x, *shape):
    """A Complaint unless `x` ends in `shape`, with a batch before it where the shape is an image's."""
    if tuple(x.shape[-len(shape):]) != shape or x.ndim <= len(shape) > 1:
        raise Complaint(f"{what} is given a tensor of shape {tuple(x.shape)}; each row should have shape {shape}")


# --- what reverse_kl and forward_kl are given: a flow --------------------------------------------------------------------

class KLNoise(nn.Module):
    """A normal base whose draws are the judge's rows in turn, over and over: n at once and one n times are the same rows."""

    batch_shape, has_rsample = torch.Size(), True

    def __init__(self, rows, width=1.0):
        super().__init__()
        self.register_buffer("rows", width * rows)
        self.width = width
        self.drawn, self.event_shape = 0, rows.shape[1:]

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape)
        which = (self.drawn + torch.arange(shape.numel())) % len(self.rows)
        self.drawn += shape.numel()
        return self.rows[which].reshape(*shape, *self.event_shape)

    rsample = sample

    def log_prob(self, z):
        return (-0.5 * (z / self.width) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(self.width)).sum(-1)


class KLMap(nn.Module):
    """z = forward(x): the first coordinate moved and scaled, the others too, by it. With u = 0 it is linear. Any number of batch dimensions."""

    def __init__(self, w):
        super().__init__()
        self.m, self.s, self.u, self.v = (w[k] for k in "msuv")

    def conditioned(self, x1):
        """Shift (..., D) and log-scale (..., D) of the way from z to x."""
        start = torch.zeros_like(x1)
        return self.m + torch.cat([start, x1 * self.v], -1), self.s + torch.cat([start, torch.tanh(x1) * self.u], -1)

    def forward(self, x):
        shift, log_scale = self.conditioned(x[..., :1])
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(-1)

    def inverse_and_ldj(self, z):
        shift, log_scale = self.conditioned(self.m[:1] + z[..., :1] * torch.exp(self.s[:1]))
        return shift + z * torch.exp(log_scale), -log_scale.sum(-1)

    def inverse(self, z):
        return self.inverse_and_ldj(z)[0]


class KLFlow(nn.Module):
    """A flow with all ways to draw: sample, sample_and_log_prob, and base with transform. Each keeps the gradient."""

    exact = True

    def __init__(self, w, rows, width=1.0):
        super().__init__()
        self.base, self.transform = KLNoise(tensor(rows), width), KLMap(w)

    def log_prob(self, x):
        demand("flow.log_prob", x, *self.base.event_shape)
        z, ldj = self.transform(x)
        return self.base.log_prob(z) + ldj

    def sample(self, n):
        return self.transform.inverse(self.base.sample((n,)))

    def sample_and_log_prob(self, n):
        z = self.base.sample((n,))
        x, ldj = self.transform.inverse_and_ldj(z)
        return x, self.base.log_prob(z) + ldj

    def forward(self, x):
        return self.transform(x)


def kl_target(means, log_scale, offset, weights=None):
    """log of a mixture of normals with those means (K, D), plus `offset`: (..., D) -> (...)."""
    means, log_scale = means if torch.is_tensor(means) else tensor(means), log_scale if torch.is_tensor(log_scale) else tensor(log_scale)

    def log_target(x):
        demand("log_target", x, means.shape[-1])
        t = (x[..., None, :] - means.to(x.dtype)) * torch.exp(-log_scale).to(x.dtype)
        each = (-0.5 * t**2 - log_scale.to(x.dtype) - 0.5 * math.log(2 * math.pi)).sum(-1)
        return torch.logsumexp(each, -1) - math.log(len(means)) + offset

    return log_target


class LineFlow(KLFlow):
    """The smallest flow that can be trained: a normal distribution on the line, with mean m and scale exp(s)."""

    def __init__(self, m, s, rows):
        empty = nn.Parameter(torch.zeros(0))
        super().__init__({"m": nn.Parameter(tensor([m])), "s": nn.Parameter(tensor([s])), "u": empty, "v": empty}, rows)


def kl_trained(name, inputs, loss):
    """Mean and log-scale (2,) of a LineFlow after some steps of Adam down `loss(flow)`, where an answer runs."""
    flow = LineFlow(*inputs["train.start"], inputs["train.noise grid"])
    optimiser = torch.optim.Adam([flow.transform.m, flow.transform.s], lr=float(inputs["train.rate"]))
    for _ in range(int(inputs["train.steps"])):
        optimiser.zero_grad()
        ((value, _),) = unpack(name, loss(flow), "loss")
        if not value.requires_grad or value.numel() != 1:
            raise Complaint(f"{name} cannot be trained by: it should be one number that hangs on the flow's parameters")
        value.sum().backward()
        optimiser.step()
    return torch.cat([flow.transform.m.detach(), flow.transform.s.detach()])


# --- reverse_kl ------------------------------------------------------------------------------------------------------

def reverse_kl(objects, inputs):
    (f,) = objects
    record = Record()

    def value(step, mine, n, offset=0.0, single=False, width=1.0):
        flow = KLFlow(inference_weights(mine), mine["noise"], width)
        target = kl_target(mine["target.means"], mine["target.log_scale"], offset)
        with contextlib.suppress(Stop):
            record.one(step, lambda: f(flow.float() if single else flow, target, n), "kl")
        record.setdefault("backward", np.array(int(any(p.grad is not None for p in flow.parameters()))))

    def weighed(w):
        mine = part(inputs, "curved.")
        flow, target = KLFlow(w, mine["noise"]), kl_target(w["means"], tensor(mine["target.log_scale"]), 0.0)
        ((kl, _),) = unpack("reverse_kl", f(flow, target, int(mine["n"])), "kl")
        return kl.sum()

    with quiet_world(SEED):
        curved, gaussian = part(inputs, "curved."), part(inputs, "gaussian.")
        many = int(curved["n"])
        value("two Gaussians", gaussian, int(gaussian["n"]))
        value("samples", curved, many)
        value("one sample", curved, 1)
        value("target far below", curved, many, -2000.0)
        value("target above", curved, many, 50.0)
        value("one coordinate", part(inputs, "line."), many)
        value("another base", curved, many, width=float(inputs["width"]))
        with torch.no_grad():
            value("under no_grad", curved, many)
        inference_gradient(record, curved | {"nudges": inputs["nudges"]}, weighed)
        if "train.noise grid" in inputs:
            humps = kl_target(inputs["train.humps"], inputs["train.log_scale"], 0.0)
            n = len(inputs["train.noise grid"])
            with contextlib.suppress(Stop):
                record.one("training", lambda: kl_trained("reverse_kl", inputs, lambda flow: f(flow, humps, n)), "mean and log scale")
        torch.set_default_dtype(torch.float32)
        value("in float32", curved, many, single=True)
        record["seeded"] = seeded_inside()
    return record


# --- forward_kl ------------------------------------------------------------------------------------------------------

def forward_kl(objects, inputs):
    (f,) = objects
    record = Record()

    def value(step, mine, x, dtype=torch.float64, width=1.0):
        x, flow = tensor(x, dtype), KLFlow(inference_weights(mine), mine["noise"], width)
        with contextlib.suppress(Stop):
            record.one(step, lambda: f(flow.to(dtype), x), "kl")
            record.keep(f"{step}.x after", lambda: x)
        record.setdefault("backward", np.array(int(any(p.grad is not None for p in flow.parameters()))))

    def weighed(w):
        ((kl, _),) = unpack("forward_kl", f(KLFlow(w, inputs["D=2 noise"]), w["x"]), "kl")
        return kl.sum()

    with quiet_world(SEED):
        for size in ("D=2 ", "D=6 "):
            value(f"{size}points", part(inputs, size), inputs[f"{size}net.x"])
        mine = part(inputs, "D=2 ")
        value("one point", mine, mine["net.x"][:1])
        value("points far out", mine, 1e3 * mine["net.x"])
        value("narrow density", part(inputs, "narrow "), inputs["narrow x"])
        value("one coordinate", part(inputs, "line "), inputs["line x"])
        value("another base", mine, mine["net.x"], width=float(inputs["width"]))
        with torch.no_grad():
            value("under no_grad", mine, mine["net.x"])
        inference_gradient(record, mine | {"nudges": inputs["nudges"]}, weighed)
        if "train.noise grid" in inputs:
            x = tensor(inputs["train.x grid"])
            with contextlib.suppress(Stop):
                record.one("training", lambda: kl_trained("forward_kl", inputs, lambda flow: f(flow, x)), "mean and log scale")
        torch.set_default_dtype(torch.float32)
        value("in float32", mine, mine["net.x"], torch.float32)
        record["seeded"] = seeded_inside()
    return record


# --- elbo ------------------------------------------------------------------------------------------------------------

def elbo_prior(w):
    return distributions.Independent(distributions.Normal(w["prior m"], torch.exp(w["prior s"]), validate_args=False), 1)


def elbo_affine(ab):
    """A linear model by the numbers of its rows a, b (each (D,)): x -> (a x + b, exp(log s))."""
    a, b, log_s = (tensor(v) for v in ab)
    return lambda x: (x * a + b, torch.exp(log_s).expand_as(x))


def elbo(objects, inputs):
    (f,) = objects
    record = Record()

    def model(w, noise):
        """encoder, flow, decoder, prior of the judge's weights."""
        nets = (survae_net(part(w, f"{name} ")) for name in ("encoder", "decoder"))
        drawn = [SurvaeNoise(noise[k]) for k in ("z noise", "x noise")]
        for rows in drawn:
            rows.rows = rows.rows.to(w["x"].dtype)
        encoder, decoder = map(survae_conditional, nets, drawn)

        def decoded(z):
            if z.ndim < 2:
                raise Complaint(f"the decoder is given z of shape {tuple(z.shape)}; it should be (B, Z)")
            return decoder(z)

        return encoder, KLMap(part(w, "flow ")), decoded, elbo_prior(w)

    def image_model(w, noise, shape):
        """The same for x whose rows have that shape."""
        encoder, flow, decoder, prior = model(w, noise)

        def encoded(x):
            demand("the encoder", x, *shape)
            return encoder(x.flatten(-3))

        def decoded(z):
            of = decoder(z).base_dist
            return distributions.Independent(distributions.Normal(*(t.unflatten(-1, shape) for t in (of.loc, of.scale)), validate_args=False), 3)

        return encoded, flow, decoded, prior

    def value(step, x, *parts):
        with contextlib.suppress(Stop):
            record.one(step, lambda: f(x, *parts), "elbo")

    def weighed(w):
        ((bound, _),) = unpack("elbo", f(w["x"], *model(w, inputs)), "elbo")
        r = tensor(inputs["r"])
        return (r * bound).sum() if bound.shape == r.shape else bound.sum()

    with quiet_world(SEED):
        x, w = tensor(inputs["net.x"]), inference_weights(inputs)
        value("elbo", x, *model(w, inputs))
        record.keep("x after", lambda: x)
        again = inputs | {k: -inputs[k] for k in ("z noise", "x noise")}
        value("elbo again", tensor(inputs["net.x"]), *model(w, again))
        shape = (1, 1, inputs["net.x"].shape[1])
        value("images", tensor(inputs["net.x"]).unflatten(-1, shape), *image_model(w, inputs, shape))
        value("one row", tensor(inputs["net.x"][:1]), *model(w, inputs))
        with torch.no_grad():
            value("under no_grad", tensor(inputs["net.x"]), *model(w, inputs))
        inference_gradient(record, inputs, weighed)
        if "ideal.x" in inputs:
            mine = part(inputs, "ideal.")
            encoder, decoder = (survae_conditional(elbo_affine(mine[k]), SurvaeNoise(mine["noise"])) for k in ("encoder", "decoder"))
            value("ideal encoder", tensor(mine["x"]), encoder, KLMap(inference_weights(mine)), decoder,
                  elbo_prior({k: tensor(mine[k]) for k in ("prior m", "prior s")}))
        torch.set_default_dtype(torch.float32)
        value("in float64", tensor(inputs["net.x"]), *model(w, inputs))
        single = {k: nn.Parameter(v.detach().float()) for k, v in w.items()}
        value("in float32", x.float(), *model(single, inputs))
        record["seeded"] = seeded_inside()
    return record


# --- iwae_log_prob ---------------------------------------------------------------------------------------------------

class CountedProposal:
    """q(x) -> (z, log_q), where the i-th draw for a row of the judge's x takes the i-th number of that row's noise, and begins anew after k.

    A row is known by its first coordinate. So k calls with x and one call with x repeated, in whatever order, draw the same numbers.
    """

    def __init__(self, net, x, noise):
        self.net, self.known, self.noise = net, tensor(x[:, 0]), tensor(noise)
        self.drawn = torch.zeros(len(x), dtype=torch.long)

    def __call__(self, x):
        loc, scale = self.net(x)
        first = plain("the x that q is asked about", x).detach()[..., 0].reshape(-1, 1).double()
        rows = (first - self.known).abs().argmin(1)
        turn = self.drawn[rows] + (rows[:, None] == rows).tril(-1).sum(1)
        self.drawn = self.drawn + torch.bincount(rows, minlength=len(self.known))
        eps = self.noise[rows, turn % self.noise.shape[1]].reshape(loc.shape).to(loc.dtype)
        return loc + scale * eps, (-0.5 * eps**2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)).sum(-1)


def iwae_joint(w, offset=0.0, steep=1.0):
    """log_joint(x, z): a standard normal z, and x a normal around a net of z; times `steep`, plus `offset`."""
    net = survae_net(part(w, "decoder "))

    def log_joint(x, z):
        loc, scale = net(z)
        t = (x - loc) / scale
        log_x = (-0.5 * t**2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)).sum(-1)
        return steep * (log_x - (0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum(-1)) + offset

    return log_joint


def iwae_linear(a, b, log_s):
    """log_joint of x = a z + b + s eps for each coordinate, z standard normal; the first coordinate of x is only a row's name."""

    def log_joint(x, z):
        t = (x[..., 1:] - a * z - b) * math.exp(-log_s)
        return (-0.5 * (t**2 + z**2) - log_s - math.log(2 * math.pi)).sum(-1)

    return log_joint


def iwae_log_prob(objects, inputs):
    (f,) = objects
    record = Record()

    def value(step, k, w, x, offset=0.0, steep=1.0):
        q = CountedProposal(survae_net(part(w, "encoder ")), inputs["net.x"], inputs["noise"][:, :k])
        with contextlib.suppress(Stop):
            record.one(step, lambda: f(x, iwae_joint(w, offset, steep), q, k), "log_prob")

    def weighed(w):
        k = 5
        q = CountedProposal(survae_net(part(w, "encoder ")), inputs["net.x"], inputs["noise"][:, :k])
        ((bound, _),) = unpack("iwae_log_prob", f(w["x"], iwae_joint(w), q, k), "log_prob")
        r = tensor(inputs["r"])
        return (r * bound).sum() if bound.shape == r.shape else bound.sum()

    def on_line(step, k, mine, x, noise):
        """q by the numbers a, b, log s for the coordinates after the first."""
        a, b, log_s = mine["q"]
        q = CountedProposal(lambda x: (a * x[..., 1:] + b, torch.full_like(x[..., 1:], math.exp(log_s))), x, noise)
        with contextlib.suppress(Stop):
            record.one(step, lambda: f(tensor(x), iwae_linear(*mine["p"]), q, k), "log_prob")

    with quiet_world(SEED):
        w, x = inference_weights(inputs), tensor(inputs["net.x"])
        for k in (1, 5, 7):
            value(f"k = {k}", k, w, x)
        record.keep("x after", lambda: x)
        shape = (1, 1, inputs["net.x"].shape[1])
        with contextlib.suppress(Stop):
            q, log_joint = CountedProposal(survae_net(part(w, "encoder ")), inputs["net.x"], inputs["noise"][:, :5]), iwae_joint(w)

            def of_images(x):
                demand("q", x, *shape)
                return q(x.flatten(-3))

            def joint_of_images(x, z):
                demand("log_joint", x, *shape)
                return log_joint(x.flatten(-3), z)

            record.one("images", lambda: f(tensor(inputs["net.x"]).unflatten(-1, shape), joint_of_images, of_images, 5), "log_prob")
        value("one row", 5, w, tensor(inputs["net.x"][:1]))
        value("weights far below", 5, w, tensor(inputs["net.x"]), -4000.0, 200.0)
        value("weights far above", 5, w, tensor(inputs["net.x"]), 9000.0, 200.0)
        with torch.no_grad():
            value("under no_grad", 5, w, tensor(inputs["net.x"]))
        inference_gradient(record, inputs, weighed)
        if "ideal.x" in inputs:
            ideal, rough = part(inputs, "ideal."), part(inputs, "rough.")
            on_line("ideal q", 4, ideal, ideal["x"], ideal["noise"])
            for k in (1, 2, 3):
                on_line(f"all draws, k = {k}", k, rough, rough[f"x {k}"], rough[f"noise {k}"])
        torch.set_default_dtype(torch.float32)
        value("in float64", 5, w, tensor(inputs["net.x"]))
        value("in float32", 5, {k: nn.Parameter(v.detach().float()) for k, v in w.items()}, tensor(inputs["net.x"], torch.float32))
        record["seeded"] = seeded_inside()
    return record


# --- iaf_posterior ---------------------------------------------------------------------------------------------------

class PosteriorEncoder(nn.Module):
    """x -> (mu, log_sigma, context)."""

    def __init__(self, w, sizes):
        super().__init__()
        for k, v in w.items():
            self.register_parameter(k, v)
        self.w, self.sizes = w, sizes
        self.shape, self.hides_context, self.given = None, False, ()

    def forward(self, x):
        if self.shape:
            demand("the encoder", x, *self.shape)
            x = x.flatten(-3)
        mu, log_sigma, context = tanh_net(self.w)(x).split(self.sizes, -1)
        found = [mu.clone(), 0.6 * torch.tanh(log_sigma), None if self.hides_context else context.clone()]
        self.given = [(t, t.detach().clone()) for t in found if t is not None]
        return tuple(found)

    def changed(self):
        """Whether what was given away last is another thing now."""
        return any(not torch.equal(t.detach(), before) for t, before in self.given)


class PosteriorPasses:
    """What a flow and all copies of it were asked for."""

    def __init__(self):
        self.passes, self.backs, self.z0 = 0, 0, None

    def __deepcopy__(self, memo):
        return self


class PosteriorFlow(nn.Module):
    """Two inverse autoregressive layers with a context, the coordinates in reversed order after the first; counts its passes.

    forward(z0, context) takes one pass a layer, inverse(z, context) one for each coordinate.
    """

    def __init__(self, w, dim):
        super().__init__()
        for k, v in w.items():
            self.register_parameter(k.replace(" ", "_"), v)
        self.w, self.mask = w, torch.triu(torch.ones(dim, dim), 1)     # [from, to]: coordinate i sees those before it
        self.seen = PosteriorPasses()

    def parameters_at(self, layer, z, context):
        seen = torch.zeros(()) if context is None else context
        found = []
        for name in ("scale", "shift"):
            A, U, b = (self.w[f"{layer} {name} {k}"] for k in "AUb")
            found.append(z @ (A * self.mask.to(A.dtype)) + (seen @ U if seen.ndim else 0) + b)
        return 0.5 * torch.tanh(found[0]), found[1]

    def forward(self, z0, context=None):
        self.seen.passes += 1
        if self.seen.passes == 1:
            self.seen.z0 = plain("the z0 that flow.forward is given", z0).detach().double().clone()
        z, ldj = z0, 0
        for layer in ("first", "second"):
            log_scale, shift = self.parameters_at(layer, z, context)
            z, ldj = (z * torch.exp(log_scale) + shift).flip(-1), ldj + log_scale.sum(-1)
        return z, ldj

    def inverse(self, z, context=None):
        self.seen.backs += 1
        for layer in ("second", "first"):
            out, z = z.flip(-1), torch.zeros_like(z)
            for _ in range(z.shape[-1]):
                log_scale, shift = self.parameters_at(layer, z, context)
                z = (out - shift) * torch.exp(-log_scale)
        return z


def iaf_posterior(objects, inputs):
    (IAFPosterior,) = objects
    record = Record()
    dim, seen = (int(v) for v in inputs["sizes"])

    def made(w, dim=dim):
        encoder, flow = PosteriorEncoder(part(w, "encoder "), (dim, dim, seen)), PosteriorFlow(part(w, "flow "), dim)
        return IAFPosterior(encoder, flow), encoder, flow

    def posterior(w, dim=dim):
        """The answer with nets of these weights, and the noise from its start."""
        answer, encoder, flow = record.run("construction", lambda: made(w, dim))
        torch.default_generator.manual_seed(0)
        return answer, encoder, flow

    def sampled(step, answer, flow, x, names=("z", "log_q")):
        flow.seen.__init__()
        with contextlib.suppress(Stop):
            record.many(step, lambda: answer.sample(x), *names)
        record[f"{step}.passes"], record[f"{step}.backs"] = np.array(flow.seen.passes), np.array(flow.seen.backs)
        if flow.seen.z0 is not None:
            record[f"{step}.z0"] = flow.seen.z0.numpy()

    def weighed(w):
        torch.default_generator.manual_seed(0)
        answer, _, _ = made({k: v for k, v in w.items() if k != "x"})
        (z, _), (log_q, _) = unpack("sample", answer.sample(w["x"]), "z", "log_q")
        total, r = (tensor(inputs["c"]) * z).sum(), tensor(inputs["r"])
        return total + (r * log_q).sum() if log_q.shape == r.shape else total

    with quiet_world():
        w = inference_weights(inputs)
        w.pop("x")
        with contextlib.suppress(Stop):
            answer, encoder, flow = posterior(w)
            x = tensor(inputs["net.x"])
            sampled("sample", answer, flow, x)
            record.keep("x after", lambda: x)
            record["changed"] = np.array(int(encoder.changed()))
            sampled("sample again", answer, flow, tensor(inputs["net.x"]))
            sampled("sample of one row", answer, flow, tensor(inputs["net.x"][:1]))
            if "many grid" in inputs:       # by its name only the answer itself draws so often
                sampled("many samples", answer, flow, tensor(inputs["many grid"]).repeat(int(inputs["rows"]), 1))
            shape = (1, 2, inputs["net.x"].shape[1] // 2)
            torch.default_generator.manual_seed(0)
            encoder.shape = shape
            sampled("sample of images", answer, flow, tensor(inputs["net.x"]).unflatten(-1, shape))
            encoder.shape, encoder.hides_context = None, True
            sampled("sample without a context", answer, flow, tensor(inputs["net.x"]))
            encoder.hides_context = False
            two = part(inputs, "two.")
            with contextlib.suppress(Stop):
                fewer = inference_weights(two)
                other, _, its = posterior({k: v for k, v in fewer.items() if k != "x"}, int(two["sizes"][0]))
                sampled("sample of two latents", other, its, tensor(two["net.x"]))
            with contextlib.suppress(Stop):
                if is_module(answer):
                    found = {id(p) for p in record.run("parameters", lambda: parameters("IAFPosterior", answer))}
                    record["unregistered"] = np.array(sum(id(p) not in found for p in w.values()))
            with torch.no_grad():
                torch.default_generator.manual_seed(0)
                sampled("under no_grad", answer, flow, tensor(inputs["net.x"]))
            inference_gradient(record, inputs, weighed)
            torch.set_default_dtype(torch.float32)
            sampled("in float64", answer, flow, tensor(inputs["net.x"]))
            single = {k: nn.Parameter(v.detach().float()) for k, v in w.items()}
            answer, _, flow = posterior(single)
            sampled("in float32", answer, flow, tensor(inputs["net.x"], torch.float32))
    return record


PROBES = {p.__name__: p for p in (reverse_kl, forward_kl, elbo, iwae_log_prob, iaf_posterior)}
