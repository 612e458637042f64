"""How fast are flowkit's layers? CPU time on one thread, against a hand-written minimum and the peer libraries.

    python benchmarks/layers.py [--quick] [--check] [--only NAME ...]

Three measures: a training step (batch of 512, forward, backward, a step of fused Adam at 1e-3), log_prob of 10,000 points
and 10,000 samples (both without gradients). Each figure is the CPU time of flowkit divided by the contestant's: below 1
flowkit is the faster one. Contestants take turns, one call each a round and in random order, and a figure is the median over
the rounds of the ratio within a round, so that a machine with other work slows all of them alike.

The minimum is plain torch for this one network, without checks or choices. Nets are 64-64 with tanh everywhere, data are in two
humps. Before anything is timed: the minimum, given flowkit's weights, must give flowkit's densities; at D = 2
every density must integrate to one, and samples must have the entropy that the density says; sizes must agree.

"closed": planar, radial and Sylvester layers are closed in one direction, which is compared with the peers' closed one:
as density for the training step and log_prob, and for the samples by the flow turned round.

`--check` exits 1 and names each figure that misses its goal: couplings take at most 1.1 of the minimum; flowkit takes no
longer than the fastest peer, 5% allowed for noise; sampling of MAF at D = 16 takes at most 1 / 1.5 of the fastest peer's.
"""
import argparse
import ctypes
import gc
import math
import random
import statistics
import sys
import time
import warnings

import _peers as peers
import torch
from _peers import HIDDEN, Contestant
from torch import nn
from torch.nn.functional import linear, logsigmoid, softplus

import flowkit

MEASURES = ("step", "log_prob", "sample")
POINTS, BATCH = 10_000, 512
NOISE = 1.05


# --- the hand-written minimum of each network: z, ldj = forward(x) and, where it is closed or simple, x = inverse(z)

class Minimum(nn.Module):
    def log_prob(self, x):
        z, ldj = self(x)
        return ldj - 0.5 * (z * z).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def mlp(d_in, d_out):
    return nn.Sequential(nn.Linear(d_in, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, d_out))


class CouplingMinimum(Minimum):
    def __init__(self, dim, layers):
        super().__init__()
        self.half = dim // 2
        self.nets = nn.ModuleList(mlp(dim // 2, 2 * (dim - dim // 2)) for _ in range(layers))

    def forward(self, x):
        ldj = 0
        for net in self.nets:
            x1, x2 = x[:, :self.half], x[:, self.half:]
            alpha, mu = net(x1).chunk(2, -1)
            x = torch.cat([x1, x2 * torch.exp(alpha) + mu], -1).flip(-1)
            ldj = ldj + alpha.sum(-1)
        return x, ldj

    def inverse(self, z):
        for net in reversed(self.nets):
            z = z.flip(-1)
            z1, z2 = z[:, :self.half], z[:, self.half:]
            alpha, mu = net(z1).chunk(2, -1)
            z = torch.cat([z1, (z2 - mu) * torch.exp(-alpha)], -1)
        return z


class Masked(nn.Linear):
    def __init__(self, below, above, strict=False):
        super().__init__(len(below), len(above))
        self.register_buffer("mask", (below < above[:, None] if strict else below <= above[:, None]).float())

    def forward(self, x):
        return linear(x, self.weight * self.mask, self.bias)


def made(dim, params):
    inputs, hidden = torch.arange(dim) + 1, torch.arange(64) * max(1, dim - 1) // 64 + 1
    last = Masked(hidden, inputs.repeat(params), strict=True)
    return nn.Sequential(Masked(inputs, hidden), nn.Tanh(), Masked(hidden, hidden), nn.Tanh(), last)


class MAFMinimum(Minimum):
    def __init__(self, dim, layers):
        super().__init__()
        self.nets = nn.ModuleList(made(dim, 2) for _ in range(layers))

    def forward(self, x):
        ldj = 0
        for net in self.nets:
            alpha, mu = net(x).chunk(2, -1)
            x, ldj = (x * torch.exp(alpha) + mu).flip(-1), ldj + alpha.sum(-1)
        return x, ldj

    def inverse(self, z):
        for net in reversed(self.nets):
            z, x = z.flip(-1), torch.zeros_like(z)
            for i in range(z.shape[1]):
                alpha, mu = net(x).chunk(2, -1)
                x[:, i] = (z[:, i] - mu[:, i]) * torch.exp(-alpha[:, i])
            z = x
        return z


def logit_of_mixture(u, log_slope, log_weights):
    below = logsigmoid(u)
    above = below - u
    log_cdf, log_rest = torch.logsumexp(log_weights + below, -1), torch.logsumexp(log_weights + above, -1)
    return log_cdf - log_rest, torch.logsumexp(log_weights + below + above + log_slope, -1) - log_cdf - log_rest


def bisect(f, z, bound=64.0, steps=30):
    low, high = torch.full_like(z, -bound), torch.full_like(z, bound)
    for _ in range(steps):
        x = (low + high) / 2
        rises = f(x) < z
        low, high = torch.where(rises, x, low), torch.where(rises, high, x)
    return (low + high) / 2


class MixtureMinimum(Minimum):
    """D = 2. The bisection needs the value alone, so half of the logarithms."""

    def __init__(self, layers, components):
        super().__init__()
        self.k = components
        self.nets = nn.ModuleList(mlp(1, 3 * components + 2) for _ in range(layers))

    def parts(self, net, x1):
        logits, means, log_scales, a, b = net(x1).split([self.k, self.k, self.k, 1, 1], -1)
        return torch.log_softmax(logits, -1), means, log_scales, a, b

    def forward(self, x):
        ldj = 0
        for net in self.nets:
            x1, x2 = x[:, :1], x[:, 1:]
            log_weights, means, log_scales, a, b = self.parts(net, x1)
            y, log_slope = logit_of_mixture((x2 - means) * torch.exp(-log_scales), -log_scales, log_weights)
            x, ldj = torch.cat([y[:, None] * torch.exp(a) + b, x1], -1), ldj + log_slope + a[:, 0]
        return x, ldj

    def inverse(self, z):
        for net in reversed(self.nets):
            z2, z1 = z[:, :1], z[:, 1:]
            log_weights, means, log_scales, a, b = self.parts(net, z1)
            slopes = torch.exp(-log_scales)

            def value(x):
                u = (x[:, None] - means) * slopes
                below = logsigmoid(u)
                return torch.logsumexp(log_weights + below, -1) - torch.logsumexp(log_weights + below - u, -1)

            z = torch.stack([z1[:, 0], bisect(value, ((z2 - b) * torch.exp(-a))[:, 0])], -1)
        return z


class NAFMinimum(Minimum):
    """D = 2."""

    def __init__(self, layers, components):
        super().__init__()
        self.k = components
        self.nets = nn.ModuleList(made(2, 3 * components) for _ in range(layers))

    def parts(self, net, x):
        raw, shift, logits = net(x).view(-1, 3, self.k, 2).transpose(-1, -2).unbind(1)
        return softplus(raw), shift, torch.log_softmax(logits, -1)

    def forward(self, x):
        ldj = 0
        for net in self.nets:
            slope, shift, log_weights = self.parts(net, x)
            y, log_slope = logit_of_mixture(slope * x[..., None] + shift, slope.log(), log_weights)
            x, ldj = y.flip(-1), ldj + log_slope.sum(-1)
        return x, ldj

    def inverse(self, z):
        for net in reversed(self.nets):
            z, x = z.flip(-1), torch.zeros_like(z)
            for i in range(2):
                slope, shift, log_weights = (part[:, i] for part in self.parts(net, x))

                def value(x):
                    u = slope * x[:, None] + shift
                    below = logsigmoid(u)
                    return torch.logsumexp(log_weights + below, -1) - torch.logsumexp(log_weights + below - u, -1)

                x[:, i] = bisect(value, z[:, i])
            z = x
        return z


def above_minus_one(raw):
    return softplus(raw + math.log(math.e - 1)) - 1


class ClosedMinimum(Minimum):
    """Of planar, radial or Sylvester layers: f(x, *parameters) -> (z, ldj) for each, shapes as flowkit's layers have them."""

    def __init__(self, f, like):
        super().__init__()
        self.f = f
        self.layers = nn.ModuleList(nn.ParameterList(torch.empty_like(p) for p in layer.parameters()) for layer in like)

    def forward(self, x):
        ldj = 0
        for parameters in self.layers:
            x, log_det = self.f(x, *parameters)
            ldj = ldj + log_det
        return x, ldj


def planar(x, w, u, b):
    wu = w @ u
    bounded = above_minus_one(wu)
    h = torch.tanh(x @ w + b)
    return x + (u + (bounded - wu) / (w @ w) * w) * h[:, None], torch.log1p(bounded * (1 - h * h))


def radial(x, center, raw_beta, log_alpha):
    alpha = torch.exp(log_alpha)
    beta = alpha * above_minus_one(raw_beta)
    away = x - center
    h = 1 / (alpha + torch.linalg.vector_norm(away, dim=-1))
    return x + away * (beta * h)[:, None], (len(center) - 1) * torch.log1p(beta * h) + torch.log1p(alpha * beta * h * h)


def sylvester(x, frame, upper_r, upper_s, raw_product, log_s, b):
    q, product, s = torch.linalg.qr(frame)[0], above_minus_one(raw_product), torch.exp(log_s)
    h = torch.tanh(x @ (q @ (upper_s.triu(1) + s.diag()).T) + b)
    return x + h @ (q @ (upper_r.triu(1) + (product / s).diag())).T, torch.log1p(product * (1 - h * h)).sum(-1)


class LinearMinimum(Minimum):
    def __init__(self, dim, like):
        super().__init__()
        shapes = [(dim,), (dim,), (dim, dim), (dim, dim), (dim,)]
        self.layers = nn.ModuleList(nn.ParameterList(torch.empty(shape) for shape in shapes) for _ in like)
        self.fixed = [(layer.permutation, layer.sign) for layer in like]
        self.eye = torch.eye(dim)

    def factors(self, lower, upper, log_s, sign):
        return lower.tril(-1) + self.eye, upper.triu(1) + (sign * torch.exp(log_s)).diag()

    def forward(self, x):
        ldj = 0
        for (log_scale, shift, lower, upper, log_s), (permutation, sign) in zip(self.layers, self.fixed):
            lower, upper = self.factors(lower, upper, log_s, sign)
            x, ldj = (x * torch.exp(log_scale) + shift) @ (permutation @ lower @ upper).T, ldj + log_scale.sum() + log_s.sum()
        return x, ldj

    def inverse(self, z):
        for (log_scale, shift, lower, upper, log_s), (permutation, sign) in zip(reversed(self.layers), reversed(self.fixed)):
            lower, upper = self.factors(lower, upper, log_s, sign)
            x = torch.linalg.solve_triangular(lower, permutation.T @ z.T, upper=False, unitriangular=True)
            z = (torch.linalg.solve_triangular(upper, x, upper=True).T - shift) * torch.exp(-log_scale)
        return z


class RK4Minimum(Minimum):
    """D = 2, `steps` steps of RK4 from 0 to 1, the trace by autograd."""

    def __init__(self, steps):
        super().__init__()
        self.net, self.steps = mlp(3, 2), steps

    def field(self, t, x):
        return self.net(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

    def field_and_trace(self, t, x):
        train = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            value = self.field(t, x)
            first, second = (torch.autograd.grad(value[:, i].sum(), x, create_graph=train, retain_graph=train or i == 0)[0][:, i]
                             for i in range(2))
        return value if train else value.detach(), first + second

    def forward(self, x):
        h, ldj = 1 / self.steps, 0
        for i in range(self.steps):
            t = i * h
            k1, l1 = self.field_and_trace(t, x)
            k2, l2 = self.field_and_trace(t + h / 2, x + h / 2 * k1)
            k3, l3 = self.field_and_trace(t + h / 2, x + h / 2 * k2)
            k4, l4 = self.field_and_trace(t + h, x + h * k3)
            x, ldj = x + h / 6 * (k1 + 2 * (k2 + k3) + k4), ldj + h / 6 * (l1 + 2 * (l2 + l3) + l4)
        return x, ldj

    def inverse(self, z):
        h = 1 / self.steps
        for i in range(self.steps):
            t = 1 - i * h
            k1 = self.field(t, z)
            k2 = self.field(t - h / 2, z - h / 2 * k1)
            k3 = self.field(t - h / 2, z - h / 2 * k2)
            k4 = self.field(t - h, z - h * k3)
            z = z - h / 6 * (k1 + 2 * (k2 + k3) + k4)
        return z


# --- the rows: flowkit first, the minimum second where there is one, then the peers

def ours(dim, transforms, bound=False, turned=None, **how):
    """flowkit's flow; `turned` are the layers of another one, which samples through their forward."""
    flow = flowkit.Flow(flowkit.StandardNormal(dim), flowkit.Compose(transforms))
    sample = flow.sample
    if turned is not None:
        sample = flowkit.Flow(flowkit.StandardNormal(dim), flowkit.Inverse(flowkit.Compose(turned))).sample
    return Contestant("flowkit", flow, lambda x: flow.log_prob(x, bound=bound), sample, **how)


def minimum(dim, module, like, sample=None):
    """The minimum, with the weights of flowkit's flow."""
    with torch.no_grad():
        for mine, theirs in zip(module.parameters(), like.module.parameters(), strict=True):
            mine.copy_(theirs)
    if hasattr(module, "inverse"):
        sample = lambda n: module.inverse(torch.randn(n, dim))
    return Contestant("minimum", module, module.log_prob, sample)


def with_reverse(layers, make):
    return [t for _ in range(layers) for t in (make(), flowkit.Reverse())]


def coupling(dim):
    flow = ours(dim, with_reverse(8, lambda: flowkit.Coupling(flowkit.MLP(dim // 2, 2 * (dim - dim // 2), HIDDEN))))
    return [flow, minimum(dim, CouplingMinimum(dim, 8), flow), *peers.coupling(dim)]


def maf(dim):
    flow = ours(dim, with_reverse(5, lambda: flowkit.MAF(flowkit.MADE(dim, 2, HIDDEN))))
    return [flow, minimum(dim, MAFMinimum(dim, 5), flow), *peers.maf(dim)]


def mixture(dim):
    flow = ours(dim, with_reverse(4, lambda: flowkit.MixCoupling(flowkit.MLP(1, 26, HIDDEN), 8)))
    return [flow, minimum(dim, MixtureMinimum(4, 8), flow)]


def naf(dim):
    flow = ours(dim, with_reverse(2, lambda: flowkit.NAF(flowkit.MADE(dim, 48, HIDDEN), 16)))
    return [flow, minimum(dim, NAFMinimum(2, 16), flow), *peers.naf()]


def one_way(make, f, theirs):
    def row(dim):
        flow = ours(dim, [make(dim) for _ in range(8)], turned=[make(dim) for _ in range(8)])
        plain = ClosedMinimum(f, flow.module.transform)
        return [flow, minimum(dim, plain, flow, lambda n: plain(torch.randn(n, dim))[0]), *theirs(dim)]

    return row


def linear_layers(dim):
    matrices = [flowkit.InvertibleLinear(dim) for _ in range(8)]
    flow = ours(dim, [t for matrix in matrices for t in (flowkit.ActNorm(dim), matrix)])
    flow.log_prob(data(1000, dim))   # ActNorm's first batch, before the weights are copied
    return [flow, minimum(dim, LinearMinimum(dim, matrices), flow), *peers.linear(dim)]


def field(dim):
    """A field that is far from the zero it would start with, as a trained one is."""
    far = flowkit.VectorField(dim, HIDDEN)
    with torch.no_grad():
        far.net[-1].weight.mul_(5)
    return far


def cnf_rk4(dim):
    flow = ours(dim, [flowkit.CNF(field(dim), solver="rk4", steps=8)])
    return [flow, minimum(dim, RK4Minimum(8), flow)]


def cnf_dopri5(dim):
    flow = ours(dim, [flowkit.CNF(field(dim), solver="dopri5", rtol=1e-5, atol=1e-6)])
    theirs = field(dim)
    theirs.load_state_dict(flow.module.transform[0].field.state_dict())
    return [flow, *peers.cnf(theirs, dim, rtol=1e-5, atol=1e-6)]


def residual(exact):
    def row(dim):
        how = dict(logdet="exact") if exact else dict(logdet="roulette", terms=flowkit.residual.Geometric(0.5, exact_terms=3))
        nets = [flowkit.residual.lipschitz_mlp(dim, HIDDEN, 0.9) for _ in range(8)]
        flow = ours(dim, [flowkit.residual.Residual(net, **how) for net in nets], bound=not exact)
        return [flow, *peers.residual(exact)]

    return row


ROWS = {
    "coupling-2": (2, "affine coupling x8", coupling),
    "coupling-16": (16, "affine coupling x8", coupling),
    "maf-2": (2, "MAF x5", maf),
    "maf-16": (16, "MAF x5", maf),
    "mixture": (2, "mixture-of-logistics coupling x4, K = 8", mixture),
    "naf": (2, "NAF (DSF, K = 16) x2", naf),
    "planar": (2, "planar x8, closed", one_way(lambda dim: flowkit.Planar(dim), planar, peers.planar)),
    "radial": (2, "radial x8, closed", one_way(lambda dim: flowkit.Radial(dim), radial, peers.radial)),
    "sylvester": (2, "Sylvester of rank D, x8, closed",
                  one_way(lambda dim: flowkit.Sylvester(dim, dim), sylvester, peers.sylvester)),
    "linear": (16, "ActNorm and LU matrix x8", linear_layers),
    "cnf-rk4": (2, "CNF, exact trace, RK4 with 8 steps", cnf_rk4),
    "cnf-dopri5": (2, "CNF, exact trace, dopri5 at rtol 1e-5, atol 1e-6", cnf_dopri5),
    "residual-exact": (2, "residual x8, exact determinant", residual(True)),
    "residual-roulette": (2, "residual x8, roulette", residual(False)),
}


# --- what is checked, how it is timed, what is printed

def data(n, dim):
    """Two humps at +1 and -1, standard deviation 0.6."""
    return 0.6 * torch.randn(n, dim) + torch.randint(0, 2, (n, 1)) * 2 - 1


def size(contestant):
    return sum(p.numel() for p in contestant.module.parameters() if p.requires_grad)


def same(row, contestants, dim):
    """Raise AssertionError unless the contestants are what they are taken for."""
    flow, *others = contestants
    for other in others:
        if other.name == "minimum":
            x = data(200, dim)
            gap = (flow.log_prob(x) - other.log_prob(x)).abs().max().item()
            assert gap < 2e-4, f"{row}: the minimum's densities differ from flowkit's by {gap:.2g} nats"
        assert not (other.same_size and flow.same_size) or size(other) == size(flow), \
            f"{row}: {other.name} has {size(other)} parameters, flowkit {size(flow)}"
    if dim == 2:
        u = torch.linspace(-5, 5, 161)   # x = sinh(u): close in the middle, and wide, since some densities start so
        grid = torch.cartesian_prod(u, u).sinh()
        area = (torch.cartesian_prod(u, u).cosh().prod(-1) * (u[1] - u[0]) ** 2).double()
        for c in contestants:
            with torch.no_grad():
                log_p = c.log_prob(grid).double()
                mass = (log_p.exp() * area).sum().item()
            assert abs(mass - 1) < 0.02, f"{row}: {c.name}'s density integrates to {mass:.3f}"
            if c.sample is None or "closed" in ROWS[row][1]:
                continue
            with torch.no_grad():
                got = c.log_prob(c.sample(4000)).double()
            wanted = (log_p.exp() * area * log_p).sum().item() / mass
            assert abs(got.mean() - wanted) < 5 * got.std() / 4000 ** 0.5 + 0.01, \
                f"{row}: {c.name}'s samples have mean log p {got.mean():.3f}, its density says {wanted:.3f}"


def calls(contestant, dim):
    """The three measures as functions without arguments, None where there is no such direction."""
    x, batch = data(POINTS, dim), data(BATCH, dim)
    optimiser = torch.optim.Adam(contestant.module.parameters(), lr=1e-3, fused=True)

    def step():
        optimiser.zero_grad()
        (-contestant.log_prob(batch).mean()).backward()
        optimiser.step()
        contestant.after_step()

    @torch.no_grad()
    def log_prob():
        return contestant.log_prob(x)

    @torch.no_grad()
    def sample():
        return contestant.sample(POINTS)

    return {"step": step, "log_prob": log_prob, "sample": sample if contestant.sample else None}


def keep_memory():
    """Tell glibc to keep freed memory: else a call's page faults, up to a tenth of log_prob, depend on who was called before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2 ** 30)
        mallopt(trim_threshold, 2 ** 30)


def cpu_seconds(call):
    start = time.process_time_ns()
    call()
    return (time.process_time_ns() - start) * 1e-9


def rounds(functions, budget, order):
    """CPU seconds of each function in each round: lists of equal length, as many as `budget` seconds allow, 5 to 400."""
    for f in functions:
        for _ in range(2):
            f()
    n = int(min(400, max(5, budget / sum(cpu_seconds(f) for f in functions))))
    times = [[] for _ in functions]
    for _ in range(n):
        gc.collect()   # or one contestant would clear up after another
        for i in order.sample(range(len(functions)), len(functions)):
            times[i].append(cpu_seconds(functions[i]))
    return times


def ratio(ours, theirs):
    return statistics.median(a / b for a, b in zip(ours, theirs))


def figures(contestants, dim, budget):
    """{measure: {name: ratio}} of flowkit's time to the time of each other contestant that has it."""
    ready = [calls(c, dim) for c in contestants]
    for _ in range(20):   # ActNorm's first batch, Adam's state, and weights that have left their start
        for functions in ready:
            functions["step"]()
    table, order = {}, random.Random(0)
    gc.collect()
    gc.disable()
    for measure in MEASURES:
        those = [i for i, functions in enumerate(ready) if functions[measure]]
        first, *others = rounds([ready[i][measure] for i in those], budget, order)
        table[measure] = {contestants[i].name: ratio(first, times) for i, times in zip(those[1:], others)}
        table[measure]["ms"] = 1e3 * statistics.median(first)
    gc.enable()
    return table


def missed(row, contestants, table):
    """A sentence for each figure that misses its goal."""
    counted = [c.name for c in contestants[1:] if c.counts and c.name != "minimum"]
    for measure in MEASURES:
        got = table[measure]
        if row.startswith("coupling") and got["minimum"] > 1.1:
            yield f"{row}, {measure}: {got['minimum']:.2f} of the minimum, over 1.1"
        peer = max((name for name in counted if name in got), key=got.get, default=None)
        goal = 1 / 1.5 if (row, measure) == ("maf-16", "sample") else NOISE
        if peer and got[peer] > goal:
            yield f"{row}, {measure}: {got[peer]:.2f} of {peer}, the fastest peer, over {goal:.2f}"


def show(row, contestants, table):
    dim, title, _ = ROWS[row]
    print(f"\n{row}: {title}, D = {dim}")
    print(f"  {'flowkit':12s} {size(contestants[0]):9,d}" + "".join(f"{table[m]['ms']:9.1f}ms" for m in MEASURES))
    for c in contestants[1:]:
        cells = "".join(f"{table[m][c.name]:11.2f}" if c.name in table[m] else f"{'-':>11s}" for m in MEASURES)
        note = c.note + ("" if c.counts else ", not compared")
        print(f"  {c.name:12s} {size(c):9,d}{cells}   {note}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--check", action="store_true", help="exit 1 and name each figure that misses its goal")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help="some of " + ", ".join(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    warnings.filterwarnings("ignore")   # the peers' deprecations
    misses = []
    print("CPU time of flowkit divided by the contestant's: below 1 flowkit is faster (first line: flowkit's own time)")
    print(f"  {'':12s} {'parameters':>9s}" + "".join(f"{m:>11s}" for m in MEASURES))
    gc.freeze()
    for row in options.only or ROWS:
        dim, _, make = ROWS[row]
        torch.manual_seed(0)
        contestants = make(dim)
        same(row, contestants, dim)
        table = figures(contestants, dim, 1.5 if options.quick else 6)
        show(row, contestants, table)
        misses += missed(row, contestants, table)
    print("\n" + ("\n".join(misses) if misses else "every figure meets its goal"))
    if options.check and misses:
        sys.exit(1)


if __name__ == "__main__":
    main()
