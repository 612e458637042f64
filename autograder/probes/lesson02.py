"""How to run the answers of lesson 02 (coupling flows)."""
import contextlib
import os

import numpy as np
import torch
from torch import nn

from autograder.probes.common import COSTLY, Calls, mixture_map, sizes, tanh_net
from autograder.probes.record import (
    Complaint, Record, Stop, bijection, describe, is_module, parameters, part, quiet_world, readable, saved, tensor, to_float,
    unpack, words,
)


# --- networks handed to the answers ----------------------------------------------------------------------------------


def weights(inputs, dtype=torch.float64):
    return {k: tensor(v, dtype) for k, v in part(inputs, "net.").items()}


def net_forms(w):
    """The forms of a conditioner with two outputs that an answer may expect: [(name, net), ...].

    One output to chunk; a net that returns a tuple; a pair of nets, as a tuple and as an nn.ModuleList. All compute the
    same alpha and mu.
    """
    half = w["W2"].shape[1] // 2
    alpha = tanh_net({**w, "W2": w["W2"][:, :half], "b2": w["b2"][:half]})
    mu = tanh_net({**w, "W2": w["W2"][:, half:], "b2": w["b2"][half:]})
    pair = Wrapped(alpha), Wrapped(mu)
    return [("one output", Wrapped(tanh_net(w))), ("tuple", Wrapped(lambda x: (alpha(x), mu(x)))), ("pair", pair), ("ModuleList", nn.ModuleList(pair))]


class Wrapped(nn.Module):
    """A function as a module, as real nets are: nothing to iterate over, and a layer must be able to keep it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def build(record, step, make, forms, x):
    """The layer made from the first form of net whose construction and forward run; its index in `forms`.

    When none runs, the complaint is that of the first form.
    """
    first = None
    for i, (_, net) in enumerate(forms):
        trial = Record()
        try:
            layer = trial.run(step + "construction", lambda net=net: make(net))
            trial.run(step + "forward", lambda layer=layer: layer.forward(x.clone()))
            return layer, i
        except Stop:
            first = first or trial
    record.update(first)
    raise Stop


def nudged(inputs, t):
    """The net's weights moved by t along the judge's direction."""
    w, v = weights(inputs), {k: tensor(a) for k, a in part(inputs, "direction.").items()}
    return {k: w[k] + t * v[k] for k in w}


def scalar_loss(z, ldj, inputs):
    """A per-sample weighted sum of z and ldj; an ldj of a wrong size is left out (its own case says so)."""
    loss = (tensor(inputs["c"]) * z).sum()
    return loss + (tensor(inputs["r"]) * ldj.reshape(-1)).sum() if ldj.numel() == len(z) else loss


def gradients(record, step, make_layer, inputs):
    """The gradient of `scalar_loss` in the net's weights, by autograd, and the loss at nudged weights."""

    def loss(w):
        (z, _), (ldj, _) = unpack(words(step + "forward"), make_layer(w).forward(tensor(inputs["x"])), "z", "ldj")
        return scalar_loss(z, ldj, inputs)

    def along():
        w = {k: v.requires_grad_() for k, v in weights(inputs).items()}
        value = loss(w)
        if not value.requires_grad:
            return torch.zeros(())
        grads = torch.autograd.grad(value, list(w.values()), allow_unused=True)
        v = part(inputs, "direction.")
        return sum((g * tensor(v[k])).sum() for k, g in zip(w, grads) if g is not None) + torch.zeros(())

    with contextlib.suppress(Stop):
        if "nudges" not in inputs:
            return
        record.one(step + "gradient", along, "along")
        record.one(step + "gradient", lambda: torch.stack([loss(nudged(inputs, t)).detach() for t in inputs["nudges"]]), "nudged")


# --- probes ----------------------------------------------------------------------------------------------------------

def coupling(objects, inputs, forms=net_forms):
    (Coupling,) = objects
    record = Record()
    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            with contextlib.suppress(Stop):
                layer, form = build(record, size, Coupling, forms(weights(mine)), tensor(mine["x"]))
                bijection(record, size, layer, mine)
                gradients(record, size, lambda w, form=form: Coupling(forms(w)[form][1]), mine)
    return record


def additive_coupling(objects, inputs):
    return coupling(objects, inputs, forms=lambda w: [("one output", Wrapped(tanh_net(w)))])


def paired(net):
    return type(net) in (tuple, list, nn.ModuleList)


def make_net(objects, inputs):
    (make,) = objects
    record = Record()
    with quiet_world(), contextlib.suppress(Stop):
        net = record.run("construction", make)
        other = record.run("second construction", make)
        x = tensor(inputs["x"])

        def run(net, x):
            """alpha and mu as one tensor (B, 2), from any of the three forms."""
            x = x.to(dtype)
            if paired(net):
                if len(net) != 2:
                    raise Complaint(f"make_net should return one net or a pair of nets; it returned {describe(net)}")
                out = (net[0](x), net[1](x))
            elif not callable(net):
                raise Complaint(f"make_net should return a net, something to call on x1; it returned {describe(net)}")
            else:
                out = net(x)
            if type(out) in (tuple, list) and len(out) == 2:
                out, arrays = zip(*unpack("the net", out, "alpha", "mu"))
                for a in arrays:
                    if a.shape != (len(x), 1):
                        raise Complaint(f"alpha and mu should each have shape (B, 1) = ({len(x)}, 1); one has shape {a.shape}")
                return torch.cat(out, -1)
            return readable("the net", "output", out)[0]

        def weights_of(net):
            return parameters("make_net", *(net if paired(net) else [net]))

        # A net that was made once, outside, has the precision of the day it was made.
        dtype = record.run("parameters", lambda: next((p.dtype for p in weights_of(net)), torch.float64))
        record.one("net", lambda: run(net, x), "output")
        params, others = record.run("parameters", lambda: (weights_of(net), weights_of(other)))
        frozen = [p for p in params if not p.requires_grad]
        params = [p for p in params if p.requires_grad]
        record.keep("parameters", lambda: np.array([p.numel() for p in params], int))
        record["frozen"] = np.array(len(frozen))
        record.keep("module", lambda: all(is_module(n) for n in (net if paired(net) else [net])))
        record["shared"] = np.array(bool({id(p) for p in others} & {id(p) for p in params}))
        noise = torch.Generator().manual_seed(int(inputs["noise"]))

        def shake(size=1.0):  # to weights of that order: a last layer of zeros is a good start, and right
            with torch.no_grad():
                for p in params:
                    p.copy_(size * torch.randn(p.shape, generator=noise, dtype=p.dtype) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1.5))

        step, low, high = "net with other weights", [], []
        for _ in range(8):
            record.run(step, shake)
            record.one(step, lambda: run(net, tensor(inputs["line"])), "output")
            output = record[step + ".output"]
            if output.ndim == 2 and len(output):
                low.append(output.min(0)), high.append(output.max(0))
        same = len({len(row) for row in low}) == 1
        record["shakes.low"], record["shakes.high"] = (np.array(rows) if same else np.zeros(0) for rows in (low, high))
        record.run("net with large weights", lambda: shake(30.0))
        record.one("net with large weights", lambda: run(net, tensor(inputs["line"])), "output")
        record.run(step, shake)
        record.one(step, lambda: run(net, tensor(inputs["line"])), "output")
        record.one(step + " again", lambda: run(net, tensor(inputs["line"])), "output")
        record.one(step + " on one row", lambda: run(net, tensor(inputs["line"][:1])), "output")

        def trained():
            out = run(net, x)
            if not (params and out.requires_grad):
                return torch.zeros(len(params))
            grads = torch.autograd.grad((out * tensor(inputs["c"])).sum(), params, allow_unused=True)
            return torch.stack([g.abs().sum() if g is not None else torch.zeros(()) for g in grads])

        record.one("gradient", trained, "sizes")
    return record


def permute(objects, inputs):
    (Permute,) = objects
    record = Record()
    with quiet_world(), contextlib.suppress(Stop):
        order = [int(i) for i in inputs["order"]]

        layer = record.run("construction", lambda: Permute(order))
        bijection(record, "", layer, inputs)
    return record


class AffineFlow(nn.Module):
    """The smallest flow that can be trained: z = x * exp(a) + b on a standard normal. Keeps a diary of its training."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(tensor(a)), nn.Parameter(tensor(b))
        self.diary = []

    def log_prob(self, x):
        self.diary.append([p.detach().clone() for p in (self.a, self.b)])
        z = x * self.a.exp() + self.b
        return -0.5 * (z**2).sum(-1) - 0.5 * z.shape[-1] * torch.log(torch.tensor(2 * torch.pi)) + self.a.sum()

    def sample(self, n):
        with torch.no_grad():
            return (torch.randn(n, len(self.a)) - self.b) * (-self.a).exp()


class HumpFlow(nn.Module):
    """A flow on the line that can make two humps: z = a x + b + sum_k w_k tanh(s (x - m_k)), all slopes positive."""

    def __init__(self, theta=None):
        super().__init__()
        start = torch.tensor([0.0, 0.0, -1.0, -1.0, -1.0, 0.0, -1.5, 0.0, 1.5])
        self.theta = nn.Parameter(start if theta is None else tensor(theta))

    def log_prob(self, x):
        a, b, w, s, m = self.theta[0].exp(), self.theta[1], self.theta[2:5].exp(), self.theta[5].exp(), self.theta[6:]
        bend = torch.tanh(s * (x - m))  # (B, 3)
        z = a * x[:, 0] + b + (w * bend).sum(-1)
        slope = a + (w * s * (1 - bend**2)).sum(-1)
        return -0.5 * z**2 - 0.5 * torch.log(torch.tensor(2 * torch.pi)) + slope.log()

    def sample(self, n):
        raise RuntimeError("this flow is for training only; train_flow does not need to sample from it")


def train_flow(objects, inputs):
    (train,) = objects
    record = Record()

    def losses(value):
        if type(value) in (tuple, list):
            found = [float(to_float("train_flow", "a loss", v)) for v in value]
            tensors = [readable("train_flow", "a loss", v)[0] for v in value if issubclass(type(v), torch.Tensor)]
            return found, any(t.requires_grad for t in tensors)
        if hasattr(type(value), "__array_interface__") and type(value).__module__ == "numpy" and value.ndim == 1:
            return [float(v) for v in value], False
        if issubclass(type(value), torch.Tensor):
            ((found, array),) = unpack("train_flow", value, "the list of losses")
            if array.ndim == 1:
                return array, found.requires_grad
        raise Complaint(f"train_flow should return the list of losses, one float for each batch; it returned {describe(value)}")

    def run(step, flow, batches, lr):
        return record.run(step, lambda: train(flow, batches, lr))

    def kept(*ts):
        """Tensors of the flow as one, each of which must still have the shape of its parameters a and b."""
        if any(t.shape != (len(inputs["a"]),) for t in ts):
            raise Complaint("train_flow gave the flow's parameters another shape")
        return torch.cat(ts)

    with quiet_world():
        x = tensor(inputs["x"])
        with contextlib.suppress(Stop):
            flow = AffineFlow(inputs["a"], inputs["b"])
            backwards, diary, (a, b) = [], flow.diary, flow.parameters()  # the answer may put others in their place
            for p in (a, b):
                p.register_hook(lambda g: backwards.append(1))
            value = run("training", flow, (x.clone() for _ in range(3)), 0.05)
            record["training.backwards"] = np.array(len(backwards))
            with contextlib.suppress(Stop):  # a missing list costs its own points, not those of the training
                values, graph = record.run("training.losses", lambda: losses(value))
                record["training.losses"], record["training.graph"] = np.array(values, float), np.array(graph)
            record.keep("training.diary", lambda: torch.stack([kept(*d) for d in diary]) if diary else torch.zeros(0, 4))
            record.keep("training.end", lambda: kept(a, b))
            record.keep("training.grad", lambda: kept(*(p.grad if p.grad is not None else torch.zeros_like(p) for p in (a, b))))
            still = AffineFlow(inputs["a"], inputs["b"])
            a, b = still.parameters()
            run("training with lr = 0", still, (x.clone() for _ in range(2)), 0.0)
            record.keep("training with lr = 0.end", lambda: kept(a, b))
        with contextlib.suppress(Stop):
            flow = HumpFlow()
            theta, batches = flow.theta, tensor(inputs["humps"])
            run("training on two humps", flow, iter(batches), 0.05)
            record.keep("training on two humps.theta", lambda: theta.double())
    return record


def act_norm(objects, inputs):
    (ActNorm,) = objects
    record = Record()
    with quiet_world(), contextlib.suppress(Stop):
        dim = inputs["first"].shape[1]
        layer = record.run("construction", lambda: ActNorm(dim))
        before = record.run("parameters", lambda: parameters("ActNorm", layer))
        record.many("first batch", lambda: layer.forward(tensor(inputs["first"])), "z", "ldj")
        record.many("second batch", lambda: layer.forward(tensor(inputs["second"])), "z", "ldj")
        bijection(record, "", layer, inputs)

        after = record.run("parameters", lambda: parameters("ActNorm", layer))
        record["replaced"] = np.array(not {id(p) for p in after} <= {id(p) for p in before})

        def reloaded():
            if not is_module(layer):
                raise Complaint("ActNorm should be an nn.Module, so that its numbers are saved with the flow")
            fresh = ActNorm(dim)
            fresh.load_state_dict(saved("ActNorm", layer))
            return fresh.forward(tensor(inputs["second"]))

        with contextlib.suppress(Stop):
            record.many("after load_state_dict", reloaded, "z", "ldj")

        def trained():
            params = [p for p in parameters("ActNorm", layer) if p.requires_grad]
            (z, _), (ldj, _) = unpack("forward", layer.forward(tensor(inputs["x"])), "z", "ldj")
            loss = (tensor(inputs["c"]) * z).sum() + ldj.sum()
            if not (params and loss.requires_grad):
                return torch.zeros(0)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            return torch.cat([g.abs().reshape(-1) if g is not None else torch.zeros(p.numel()) for p, g in zip(params, grads)])

        with contextlib.suppress(Stop):
            record.one("gradient", trained, "sizes")
    return record


def invertible_linear(objects, inputs):
    (InvertibleLinear,) = objects
    record = Record()
    with quiet_world(int(inputs["noise"])), contextlib.suppress(Stop):
        dim = inputs["x"].shape[1]
        layer = record.run("construction", lambda: InvertibleLinear(dim))

        def start():
            result = layer.forward(tensor(inputs["x"]))
            if not is_module(layer):
                raise Complaint(f"InvertibleLinear should be an nn.Module, so that its weights can be trained; it is {describe(layer)}")
            return result

        record.many("start", start, "z", "ldj")
        noise = torch.Generator().manual_seed(int(inputs["noise"]))
        params = record.run("parameters", lambda: [p for p in parameters("InvertibleLinear", layer) if p.requires_grad])
        record.keep("parameters", lambda: np.array([p.numel() for p in params], int))

        def shake():
            with torch.no_grad():
                for p in params:
                    p.add_(0.3 * torch.randn(p.shape, generator=noise, dtype=p.dtype))

        record.run("parameters", shake)
        with Calls() as calls:
            record.run("forward", lambda: layer.forward(tensor(inputs["x"])))

        def trained():
            (z, _), (ldj, _) = unpack("forward", layer.forward(tensor(inputs["x"])), "z", "ldj")
            loss = (tensor(inputs["c"]) * z).sum() + ldj.sum()
            grads = torch.autograd.grad(loss, params, allow_unused=True) if params and loss.requires_grad else ()
            return torch.cat([torch.zeros(0), *(g.abs().reshape(-1) for g in grads if g is not None)])

        with contextlib.suppress(Stop):
            record.one("gradient", trained, "sizes")
        record["forward calls"] = np.array([n in calls.names for n in COSTLY])
        bijection(record, "", layer, inputs)

        def same_for_all():
            with torch.no_grad():
                for shape, values in (((dim, dim), inputs["squares"]), ((dim,), inputs["vectors"])):
                    for p, value in zip([p for p in params if p.shape == shape], values):
                        p.copy_(tensor(value))

        # The numbers that most layers of this kind have, set to the judge's: so a slip can be recognised, whatever they start from.
        with contextlib.suppress(Stop):
            record.run("same numbers", same_for_all)
            bijection(record, "same numbers ", layer, inputs)
    return record


def mix_logit_cdf(objects, inputs):
    (f,) = objects
    return mixture_map("mix_logit_cdf", "y", f, inputs)


def mix_coupling(objects, inputs):
    (MixCoupling,) = objects
    record = Record()
    K = int(inputs["components"])
    with quiet_world():
        for size in sizes(inputs):
            mine = part(inputs, size)
            with contextlib.suppress(Stop):
                layer = record.run(size + "construction", lambda mine=mine: MixCoupling(Wrapped(tanh_net(weights(mine))), K))
                bijection(record, size, layer, mine)
                gradients(record, size, lambda w: MixCoupling(Wrapped(tanh_net(w)), K), mine)
        torch.set_default_dtype(torch.float32)
        mine = part(inputs, "D=2 ")
        with contextlib.suppress(Stop):
            if "wide" not in inputs:
                raise Stop("float32")
            layer = record.run("float32 construction", lambda: MixCoupling(Wrapped(tanh_net(weights(mine, torch.float32))), K))
            wide = tensor(inputs["wide"], torch.float32)
            z, _ = record.many("float32 forward", lambda: layer.forward(wide.clone()), "z", "ldj")
            record.one("float32 inverse", lambda: layer.inverse(z.detach()), "x")
    return record


def bonus_study(objects, inputs):
    (study,) = objects
    record = Record()
    before = os.environ.get("FLOWKIT_FAST")
    os.environ["FLOWKIT_FAST"] = "1"  # a study trains; the check runs its short form, in a notebook as well
    try:
        with quiet_world():
            torch.set_default_dtype(torch.float32)
            for setting in inputs["settings"]:
                step = f"study({int(setting)})"
                with contextlib.suppress(Stop):
                    record[step + ".result"] = record.run(step, lambda s=int(setting), n=step: to_float(n, "the result", study(s)))
    finally:
        if before is None:
            del os.environ["FLOWKIT_FAST"]
        else:
            os.environ["FLOWKIT_FAST"] = before
    return record


PROBES = {p.__name__: p for p in (
    coupling, make_net, permute, train_flow, bonus_study, additive_coupling, act_norm, invertible_linear, mix_logit_cdf, mix_coupling,
)}
