"""Differently written right answers: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flowkit import settings, toys
from flowkit.core import Compose, Flow, StandardNormal


class Split(nn.Module):
    """torch.split, alpha and mu taken in the other order."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        d = x.shape[1] // 2
        x1, x2 = torch.split(x, [d, x.shape[1] - d], dim=1)
        mu, alpha = torch.split(self.net(x1), d, dim=1)
        return torch.cat((x1, x2 * torch.exp(alpha) + mu), 1), torch.sum(alpha, 1)

    def inverse(self, z):
        d = z.shape[1] // 2
        z1, z2 = torch.split(z, [d, z.shape[1] - d], dim=1)
        mu, alpha = torch.split(self.net(z1), d, dim=1)
        return torch.cat((z1, (z2 - mu) / torch.exp(alpha)), 1)


class Pair:
    """Not a module; a pair of nets, a scale bounded by tanh, inverse under no_grad."""

    def __init__(self, nets):
        self.s, self.t = nets

    def forward(self, x):
        a, b = x.chunk(2, 1)
        s = torch.tanh(self.s(a))
        return torch.cat([a, b * s.exp() + self.t(a)], 1), s.sum(1)

    @torch.no_grad()
    def inverse(self, z):
        a, b = z.chunk(2, 1)
        return torch.cat([a, (b - self.t(a)) * (-torch.tanh(self.s(a))).exp()], 1)


class PairedModule(nn.Module):
    """The same as a module that keeps its pair in a plain list."""

    keep = list

    def __init__(self, nets):
        super().__init__()
        self.nets = self.keep(nets)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        s, t = (n(a) for n in self.nets)
        return torch.cat([a, s.exp() * b + t], 1), s.sum(1)

    def inverse(self, z):
        a, b = z.chunk(2, 1)
        s, t = (n(a) for n in self.nets)
        return torch.cat([a, (b - t) / s.exp()], 1)


class Listed(PairedModule):
    """A pair of nets kept in an nn.ModuleList."""

    keep = nn.ModuleList


class Tuple(nn.Module):
    """The net returns a tuple; a sigmoid scale as in Glow."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def both(self, x1):
        alpha, mu = self.net(x1)
        return torch.sigmoid(alpha + 2), mu

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        scale, mu = self.both(x1)
        return torch.cat([x1, x2 * scale + mu], -1), scale.log().sum(-1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        scale, mu = self.both(z1)
        return torch.cat([z1, (z2 - mu) / scale], -1)


class Masks(nn.Module):
    """Boolean masks, a result that is filled in, an empty list as extra attribute."""

    def __init__(self, network):
        super().__init__()
        self.network, self.history = network, []

    def mask(self, x):
        return torch.arange(x.shape[1]) < x.shape[1] // 2

    def forward(self, inputs):
        keep = self.mask(inputs)
        alpha, mu = self.network(inputs[:, keep]).chunk(2, 1)
        out = torch.empty_like(inputs)
        out[:, keep] = inputs[:, keep]
        out[:, ~keep] = inputs[:, ~keep] * alpha.exp() + mu
        return out, torch.einsum("bd->b", alpha)

    def inverse(self, outputs):
        keep = self.mask(outputs)
        alpha, mu = self.network(outputs[:, keep]).chunk(2, 1)
        return torch.zeros(outputs.shape, dtype=outputs.dtype).masked_scatter(keep, outputs[:, keep]).masked_scatter(~keep, (outputs[:, ~keep] - mu) * torch.exp(-alpha))


class Loop(nn.Module):
    """Row by row and entry by entry; a list for the result, not a tuple."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        rows, ldjs = [], []
        for row in x:
            d = len(row) // 2
            out = self.net(row[None, :d])[0]
            second = [row[d + i] * out[i].exp() + out[d + i] for i in range(d)]
            rows.append(torch.stack([*row[:d], *second]))
            ldjs.append(sum(out[i] for i in range(d)))
        return [torch.stack(rows), torch.stack(ldjs)]

    def inverse(self, z):
        d = z.shape[1] // 2
        out = self.net(z[:, :d])
        return torch.cat([z[:, :d], (z[:, d:] - out[:, d:]) / out[:, :d].exp()], dim=1)


class Single(nn.Module):
    """Computes in float32 throughout."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        alpha, mu = self.net(x1).float().chunk(2, -1)
        return torch.cat([x1.float(), x2.float() * alpha.exp() + mu], -1), alpha.sum(-1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        alpha, mu = self.net(z1.double()).float().chunk(2, -1)
        return torch.cat([z1.float(), (z2.float() - mu) * (-alpha).exp()], -1)


class OtherHalf(Split):
    """Right but for its partition: the second half is passed on."""

    def forward(self, x):
        z, ldj = super().forward(torch.cat(x.chunk(2, 1)[::-1], 1))
        return torch.cat(z.chunk(2, 1)[::-1], 1), ldj

    def inverse(self, z):
        return torch.cat(super().inverse(torch.cat(z.chunk(2, 1)[::-1], 1)).chunk(2, 1)[::-1], 1)


class EvenOdd(nn.Module):
    """Right but for its partition: even columns are passed on."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z = x.clone()
        alpha, mu = self.net(x[:, ::2]).chunk(2, 1)
        z[:, 1::2] = x[:, 1::2] * alpha.exp() + mu
        return z, alpha.sum(1)

    def inverse(self, z):
        x = z.clone()
        alpha, mu = self.net(z[:, ::2]).chunk(2, 1)
        x[:, 1::2] = (z[:, 1::2] - mu) * (-alpha).exp()
        return x


class TwoNets(nn.Module):
    """A module with two outputs, tanh on the scale: what a make_net may return."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 16), nn.ELU())
        self.alpha, self.mu = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x):
        h = self.body(x)
        return torch.tanh(self.alpha(h)), self.mu(h)


def net_zero():
    net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    return net


def net_pair():
    return tuple(nn.Sequential(nn.Linear(1, 24), nn.LeakyReLU(), nn.Linear(24, 1)) for _ in range(2))


def net_layer_norm():
    return nn.Sequential(nn.Linear(1, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 2))


class PermuteScatter(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.register_buffer("order", torch.as_tensor(order))

    def forward(self, x):
        return x.index_select(1, self.order), torch.zeros(x.shape[0])

    def inverse(self, z):
        x = torch.empty_like(z)
        x[:, self.order] = z
        return x


class PermuteMatrix:
    def __init__(self, order):
        self.P = torch.eye(len(order))[list(order)]

    def forward(self, x):
        return x @ self.P.T, torch.linalg.slogdet(self.P)[1].expand(len(x))

    def inverse(self, z):
        return z @ self.P


class PermuteLists:
    def __init__(self, order):
        self.order = order
        self.back = [order.index(i) for i in range(len(order))]

    def forward(self, x):
        return torch.stack([x[:, i] for i in self.order], 1), 0 * x.sum(1)

    def inverse(self, z):
        return z[:, self.back]


class PermuteNumpy:
    def __init__(self, order):
        self.order, self.back = np.array(order), np.argsort(order)

    def forward(self, x):
        return x[..., self.order], torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z):
        return z[..., self.back]


class PermuteGather(nn.Module):
    """gather there and scatter back, with an index for every entry."""

    def __init__(self, order):
        super().__init__()
        self.columns = nn.Parameter(torch.tensor(order), requires_grad=False)

    def forward(self, x):
        return x.gather(1, self.columns.expand(len(x), -1)), torch.full((x.size(0),), 0.0)

    def inverse(self, z):
        return torch.zeros_like(z).scatter(1, self.columns.expand(len(z), -1), z)


class PermuteSwaps(nn.Module):
    """A list of swaps of two columns, made in turn on a copy; the inverse makes them last to first."""

    def __init__(self, order):
        super().__init__()
        now, self.swaps = list(range(len(order))), []
        for place, wanted in enumerate(order):
            at = now.index(wanted)
            if at != place:
                now[place], now[at] = now[at], now[place]
                self.swaps.append([place, at])

    @staticmethod
    def swapped(x, swaps):
        x = x.clone()
        for pair in swaps:
            x[:, pair] = x[:, pair[::-1]]
        return x

    def forward(self, x):
        return self.swapped(x, self.swaps), torch.log(torch.ones(x.shape[:1]))

    def inverse(self, z):
        return self.swapped(z, reversed(self.swaps))


def train_sgd(flow, batches, lr):
    optimiser = torch.optim.SGD(flow.parameters(), lr)
    losses = []
    for batch in batches:
        optimiser.zero_grad(set_to_none=True)
        loss = flow.log_prob(batch).mean().neg()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    return losses


def train_by_hand(flow, batches, lr):
    losses = []
    parameters = list(flow.parameters())
    for batch in batches:
        loss = -flow.log_prob(batch).mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p -= lr * g
        losses.append(loss.detach())
    return losses


def train_clear_after(flow, batches, lr):
    optimiser, losses = torch.optim.AdamW(flow.parameters(), lr, weight_decay=0), torch.zeros(0)
    flow.train()
    for batch in batches:
        loss = -flow.log_prob(batch).sum() / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses = torch.cat([losses, loss.detach()[None]])
    return losses


def train_scheduled(flow, batches, lr):
    optimiser = torch.optim.RMSprop(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.999)
    out = []
    for batch in batches:
        optimiser.zero_grad()
        loss = torch.mean(-flow.log_prob(batch))
        loss.backward()
        optimiser.step()
        schedule.step()
        out += [loss.cpu().detach().numpy().item()]
    return tuple(out)


def train_prints(flow, batches, lr):
    import warnings

    optimiser, losses = torch.optim.Adam(params=flow.parameters(), lr=lr, fused=False), list()
    for i, batch in enumerate(batches):
        warnings.warn("a warning on stderr must not cost points")
        loss = -flow.log_prob(batch).mean()
        for p in flow.parameters():
            p.grad = None
        loss.backward()
        optimiser.step()
        print(i, loss.item())
        losses.append(loss.item())
    return losses


class AdditiveEinsum:
    def __init__(self, net):
        self.net = net

    def forward(self, x):
        d = x.shape[1] // 2
        z = x.clone()
        z[:, d:] += self.net(x[:, :d])
        return z, torch.zeros(len(x))

    def inverse(self, z):
        d = z.shape[1] // 2
        x = z.clone()
        x[:, d:] -= self.net(z[:, :d])
        return x


class AdditiveHstack(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        a, b = torch.tensor_split(x, 2, dim=1)
        return torch.hstack([a, b + self.m(a)]), (0.0 * x).sum(1)

    @torch.no_grad()
    def inverse(self, z):
        a, b = torch.tensor_split(z, 2, dim=1)
        return torch.hstack([a, b - self.m(a)])


class AdditivePad(nn.Module):
    """The shift is padded with zeros on the left, so nothing is cut from x but the net's argument; one helper, two signs."""

    def __init__(self, shift_net):
        super().__init__()
        self.shift_net = shift_net

    def shift(self, v):
        half = v.size(-1) // 2
        return F.pad(self.shift_net(v[..., :half]), (half, 0))

    def forward(self, x):
        return x + self.shift(x), torch.zeros(x.size(0), dtype=x.dtype, device=x.device)

    def inverse(self, z):
        return z - self.shift(z)


class AdditiveRows(nn.Module):
    """Entry by entry in Python loops; the logarithms of the ones on the diagonal are really added up."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        B, D = x.shape
        d = D // 2
        shift = self.net(x[:, :d])
        rows = [torch.stack([x[b, i] if i < d else x[b, i] + shift[b, i - d] for i in range(D)]) for b in range(B)]
        diagonal = torch.ones(B, D)
        return torch.stack(rows), diagonal.log().sum(dim=1)

    def inverse(self, z):
        d = z.shape[1] // 2
        shift = self.net(z[:, :d])
        columns = [z[:, i] for i in range(d)] + [z[:, d + i] - shift[:, i] for i in range(d)]
        return torch.stack(columns, dim=1)


class AdditiveAffine(Split):
    """The affine layer of the first exercise by inheritance, with a net that always answers alpha = 0."""

    def __init__(self, net):
        super().__init__(self.unscaled)
        self.shift = net

    def unscaled(self, x1):
        mu = self.shift(x1)
        return torch.cat((mu, torch.zeros_like(mu)), 1)


class AdditiveIndexAdd:
    """index_add at the indices of the second half; not a module, the net is kept in a closure."""

    def __init__(self, net):
        def moved(v, sign):
            first, second = torch.arange(v.shape[1]).tensor_split(2)
            return v.index_add(1, second, net(v.index_select(1, first)), alpha=sign)

        self.moved = moved

    def forward(self, x):
        return self.moved(x, 1), x.new_tensor([0.0] * len(x))

    def inverse(self, z):
        return self.moved(z, -1)


class ActNormPlain(nn.Module):
    """As most would write it: the unbiased deviation, a buffer as flag."""

    def __init__(self, dim):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x):
        if self.ready == 0:
            with torch.no_grad():
                m = x.mean(dim=0)
                s = x.std(dim=0)
                self.logs.copy_(-torch.log(s))
                self.bias.copy_(-m / s)
                self.ready.fill_(1)
        z = torch.exp(self.logs) * x + self.bias
        ldj = self.logs.sum().repeat(x.shape[0])
        return z, ldj

    def inverse(self, z):
        return (z - self.bias) * torch.exp(-self.logs)


class ActNormDirect(nn.Module):
    """Divides and subtracts (scale not in logs), flag as a uint8 buffer, biased variance."""

    def __init__(self, dim):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.ones(dim))
        self.register_buffer("flag", torch.zeros((), dtype=torch.uint8))

    def forward(self, x):
        if self.flag.item() == 0:
            self.mean.data = x.mean(dim=0).detach()
            self.std.data = x.std(dim=0, unbiased=False).detach() + 1e-6
            self.flag += 1
        return (x - self.mean) / self.std, -self.std.abs().log().sum() * x.new_ones(x.shape[0])

    def inverse(self, z):
        return z * self.std + self.mean


class ActNormParameterFlag(nn.Module):
    """The flag is a frozen parameter; statistics by hand; repeat for ldj."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.seen = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def forward(self, x):
        if float(self.seen) < 0.5:
            with torch.no_grad():
                m = x.sum(0, keepdim=True) / len(x)
                v = ((x - m) ** 2).sum(0, keepdim=True) / len(x)
                self.weight.copy_(1 / v.sqrt())
                self.bias.copy_(-m / v.sqrt())
                self.seen.fill_(1.0)
        return x * self.weight + self.bias, self.weight.abs().log().sum(1).repeat(len(x))

    def inverse(self, z):
        return (z - self.bias) / self.weight


class ActNormCounter(nn.Module):
    """Counts its batches in an int64 buffer; torch.var_mean and addcmul; Glow's form (x + b) * exp(s)."""

    def __init__(self, dim):
        super().__init__()
        self.log_scale = nn.Parameter(torch.empty(dim).fill_(0.0))
        self.loc = nn.Parameter(torch.zeros_like(self.log_scale))
        self.register_buffer("batches", torch.tensor(0, dtype=torch.int64))

    @torch.no_grad()
    def initialise(self, x):
        var, mean = torch.var_mean(x, dim=0)
        self.log_scale.copy_(-0.5 * torch.log(var))
        self.loc.copy_(mean.neg())

    def forward(self, x):
        if self.batches == 0:
            self.initialise(x)
        self.batches += 1
        scale = self.log_scale.exp()
        return torch.addcmul(self.loc * scale, x, scale), torch.ones(x.shape[0]) * torch.sum(self.log_scale)

    def inverse(self, z):
        return torch.exp(-self.log_scale) * z - self.loc


class ActNormNumpy(nn.Module):
    """Statistics in numpy, in double precision; parameters in a ParameterDict, filled slice by slice in place."""

    def __init__(self, dim):
        super().__init__()
        self.p = nn.ParameterDict({"s": torch.zeros(dim), "t": torch.zeros(dim)})
        self.register_buffer("ready", torch.zeros(1, dtype=torch.bool))

    def forward(self, x):
        s, t = self.p["s"], self.p["t"]
        if not self.ready.all():
            a = x.detach().numpy().astype(np.float64)
            for i in range(a.shape[1]):
                column = a[:, i]
                s.data[i] = -math.log(np.sqrt(np.mean(column * column) - np.mean(column) ** 2))
                t.data[i] = -float(np.mean(column)) * math.exp(s.data[i])
            self.ready[:] = True
        z = torch.einsum("bi,i->bi", x, s.exp()) + t
        return z, torch.einsum("bi,i->b", torch.ones_like(x), s)

    def inverse(self, z):
        return torch.stack([(z[:, i] - self.p["t"][i]) / self.p["s"][i].exp() for i in range(z.shape[1])], 1)


class ActNormTwoSteps(nn.Module):
    """Measured rather than computed: centres the first batch, maps it, then corrects the scale; parameters in float32."""

    def __init__(self, dim):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.t = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("fresh", torch.tensor(1.0))

    def map(self, x):
        return x * self.s.exp() + self.t

    def forward(self, x):
        if self.fresh:
            with torch.no_grad():
                self.t.sub_(self.map(x).mean(0))
                factor = self.map(x).square().mean(0).rsqrt()
                self.s.add_(factor.log()), self.t.mul_(factor)
                self.fresh.zero_()
        return self.map(x), self.s.sum().expand(x.shape[0])

    def inverse(self, z):
        return (z - self.t) / self.s.exp()


class ActNormWhere(nn.Module):
    """No `if`: torch.where chooses between the batch's numbers and the parameters' own, which are set to themselves later on."""

    def __init__(self, dim):
        super().__init__()
        self.shift, self.logs = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("seen", torch.zeros(dim, dtype=torch.bool))

    def forward(self, x):
        with torch.no_grad():
            std, mean = torch.std_mean(x, 0, correction=0)
            self.logs.copy_(torch.where(self.seen, self.logs, -std.clamp_min(1e-12).log()))
            self.shift.copy_(torch.where(self.seen, self.shift, -mean / std.clamp_min(1e-12)))
            self.seen |= True
        return torch.exp(self.logs) * x + self.shift, sum(self.logs.unbind()).repeat(len(x))

    def inverse(self, z):
        return (z - self.shift).div(self.logs.exp())


class LinearPlain(nn.Module):
    """As most would write it: W is formed, the inverse undoes both triangles."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.L = nn.Parameter(0.1 * torch.randn(dim, dim))
        self.U = nn.Parameter(0.1 * torch.randn(dim, dim))
        self.logs = nn.Parameter(torch.zeros(dim))

    def lower(self):
        return torch.eye(self.dim) + self.L.tril(-1)

    def upper(self):
        return torch.diag(torch.exp(self.logs)) + self.U.triu(1)

    def forward(self, x):
        W = self.lower() @ self.upper()
        z = x @ W.T
        ldj = torch.ones(len(x)) * self.logs.sum()
        return z, ldj

    def inverse(self, z):
        y = torch.linalg.solve_triangular(self.lower(), z.T, upper=False)
        x = torch.linalg.solve_triangular(self.upper(), y, upper=True)
        return x.T


class LinearUnit(nn.Module):
    """Both triangles from one method; inverse knows that L has ones on its diagonal."""

    def __init__(self, dim):
        super().__init__()
        self.lower, self.upper = nn.Parameter(torch.randn(dim, dim) / 10), nn.Parameter(torch.randn(dim, dim) / 10)
        self.log_d = nn.Parameter(torch.zeros(dim))

    def triangles(self):
        n = len(self.log_d)
        return self.lower.tril(-1) + torch.eye(n), self.upper.triu(1) + torch.diag(self.log_d.exp())

    def forward(self, x):
        L, U = self.triangles()
        return x @ U.T @ L.T, self.log_d.sum().expand(x.shape[0])

    def inverse(self, z):
        L, U = self.triangles()
        half = torch.linalg.solve_triangular(L, z.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, half, upper=True).mT


class LinearSigned(nn.Module):
    """Glow's form with permutation and signs; the inverse by inverting W."""

    def __init__(self, dim):
        super().__init__()
        q = torch.linalg.qr(torch.randn(dim, dim))[0]
        P, L, U = torch.linalg.lu(q)
        self.register_buffer("P", P), self.register_buffer("sign", U.diag().sign())
        self.l, self.u, self.logs = nn.Parameter(L.tril(-1)), nn.Parameter(U.triu(1)), nn.Parameter(U.diag().abs().log())

    def W(self):
        n = len(self.logs)
        return self.P @ (self.l.tril(-1) + torch.eye(n)) @ (self.u.triu(1) + torch.diag(self.sign * self.logs.exp()))

    def forward(self, x):
        return F.linear(x, self.W()), self.logs.sum() + torch.zeros(len(x))

    def inverse(self, z):
        return torch.linalg.solve(self.W(), z.T).T


class LinearDirect(nn.Module):
    """s itself instead of its logarithm; masks by multiplication; x @ W."""

    def __init__(self, dim):
        super().__init__()
        self.A, self.B = nn.Parameter(0.3 * torch.randn(dim, dim)), nn.Parameter(0.3 * torch.randn(dim, dim))
        self.s = nn.Parameter(torch.rand(dim) + 1.5)

    def W(self):
        n = len(self.s)
        low = torch.ones(n, n).tril(-1)
        return (self.A * low + torch.eye(n)) @ (self.B * low.T + torch.diag(self.s))

    def forward(self, x):
        return x @ self.W(), torch.log(torch.abs(self.s)).sum().repeat(x.shape[0])

    def inverse(self, z):
        return z @ self.W().inverse()


class LinearPacked(nn.Module):
    """All D * D numbers in one matrix: L below, U above, s on the diagonal; two products, W is never formed."""

    def __init__(self, dim):
        super().__init__()
        self.packed = nn.Parameter(torch.randn(dim, dim).mul(0.1).fill_diagonal_(0))

    def forward(self, x):
        s = torch.diagonal(self.packed)
        y = x @ self.packed.triu(1).mT + x * s.exp()
        return y + y @ self.packed.tril(-1).mT, s.sum().expand(len(x))

    def inverse(self, z):
        y = torch.linalg.solve_triangular(self.packed.tril(-1).mT, z, upper=True, left=False, unitriangular=True)
        upper = self.packed.triu(1) + self.packed.diagonal().exp().diag()
        return torch.linalg.solve_triangular(upper.mT, y, upper=False, left=False)


class Masked(nn.Module):
    """A parametrisation for the next answer: keeps the entries under a mask and adds a constant."""

    def __init__(self, mask, constant):
        super().__init__()
        self.register_buffer("mask", mask), self.register_buffer("constant", constant)

    def forward(self, raw):
        return raw * self.mask + self.constant


class LinearParametrized(nn.Module):
    """The triangles by torch.nn.utils.parametrize; starts as the identity; multi_dot; the inverse inverts L and U apart."""

    def __init__(self, dim):
        super().__init__()
        ones, eye = torch.ones(dim, dim), torch.eye(dim)
        self.L, self.U, self.s = nn.Parameter(eye.clone()), nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim))
        parametrize.register_parametrization(self, "L", Masked(ones.tril(-1), eye), unsafe=True)
        parametrize.register_parametrization(self, "U", Masked(ones.triu(1), 0 * eye), unsafe=True)

    def forward(self, x):
        W = torch.linalg.multi_dot([self.L, self.U + torch.diag(torch.exp(self.s))])
        return torch.einsum("ij,bj->bi", W, x), x.new_ones(len(x)) * self.s.sum()

    def inverse(self, z):
        U = self.U + torch.diag_embed(self.s.exp())
        return z @ (torch.linalg.inv(U) @ torch.linalg.inv(self.L)).T


class LinearVectors(nn.Module):
    """The triangles as flat vectors put in their places by index; the inverse substitutes entry by entry in loops."""

    def __init__(self, dim):
        super().__init__()
        n = dim * (dim - 1) // 2
        self.dim = dim
        self.below, self.above = (nn.Parameter(0.05 * torch.randn(n)) for _ in range(2))
        self.s = nn.Parameter(torch.zeros(dim))

    def triangles(self):
        L, U = torch.eye(self.dim), torch.diag(self.s.exp())
        i, j = torch.tril_indices(self.dim, self.dim, -1)
        k, l = torch.triu_indices(self.dim, self.dim, 1)  # noqa: E741
        return L.index_put((i, j), self.below), U.index_put((k, l), self.above)

    def forward(self, x):
        L, U = self.triangles()
        return (L @ (U @ x.T)).T, torch.stack([self.s.sum() for _ in x])

    def inverse(self, z):
        L, U = self.triangles()
        y = []
        for i in range(self.dim):
            y.append(z[:, i] - sum(L[i, j] * y[j] for j in range(i)))
        x = [None] * self.dim
        for i in reversed(range(self.dim)):
            x[i] = (y[i] - sum(U[i, j] * x[j] for j in range(i + 1, self.dim))) / U[i, i]
        return torch.stack(x, 1)


class LinearRotation(nn.Module):
    """Starts as a rotation made of Givens turns, factored by hand; a fixed permutation kept as an index; batched matrix times vector."""

    def __init__(self, dim):
        super().__init__()
        A = torch.eye(dim)
        for i in range(dim - 1):
            c, s = math.cos(0.4 + i), math.sin(0.4 + i)
            A[[i, i + 1]] = torch.stack([c * A[i] - s * A[i + 1], s * A[i] + c * A[i + 1]])
        order, L = list(range(dim)), torch.zeros(dim, dim)
        for k in range(dim):
            pivot = max(range(k, dim), key=lambda r: abs(float(A[r, k])))
            for rows in (A, L):
                rows[[k, pivot]] = rows[[pivot, k]]
            order[k], order[pivot] = order[pivot], order[k]
            for r in range(k + 1, dim):
                L[r, k] = A[r, k] / A[k, k]
                A[r] = A[r] - L[r, k] * A[k]
        self.register_buffer("order", torch.tensor(order)), self.register_buffer("sign", A.diagonal().sign())
        self.lower, self.upper, self.s = nn.Parameter(L), nn.Parameter(A.triu(1)), nn.Parameter(A.diagonal().abs().log())

    def factors(self):
        return self.lower.tril(-1) + torch.eye(len(self.s)), self.upper.triu(1) + (self.sign * self.s.exp()).diag()

    def forward(self, x):
        L, U = self.factors()
        z = torch.empty_like(x)
        z[:, self.order] = (L @ U).expand(len(x), -1, -1).bmm(x[:, :, None])[:, :, 0]
        return z, self.s.sum().repeat(len(x))

    def inverse(self, z):
        L, U = self.factors()
        return torch.linalg.lu_solve(L.tril(-1) + U, torch.arange(1, len(L) + 1, dtype=torch.int32), z[:, self.order].T).T


def mix_plain(x, weights, means, log_scales):
    """As most would write it, name by name."""
    x = x.unsqueeze(-1)
    scaled = (x - means) / torch.exp(log_scales)
    log_weights = torch.log(weights)
    log_sigma, log_one_minus = F.logsigmoid(scaled), F.logsigmoid(-scaled)
    log_cdf = torch.logsumexp(log_weights + log_sigma, dim=-1)
    log_sf = torch.logsumexp(log_weights + log_one_minus, dim=-1)
    log_density = torch.logsumexp(log_weights + log_sigma + log_one_minus - log_scales, dim=-1)
    y = log_cdf - log_sf
    ldj = log_density - log_cdf - log_sf
    return y, ldj


def mix_loop(x, weights, means, log_scales):
    """Component by component with logaddexp."""
    K = weights.shape[-1]
    cdf = rest = pdf = None
    for k in range(K):
        w, m, s = weights[..., k], means[..., k], log_scales[..., k]
        u = (x - m) / torch.exp(s)
        below, above = -F.softplus(-u), -F.softplus(u)
        a, b, c = torch.log(w) + below, torch.log(w) + above, torch.log(w) + below + above - s
        cdf, rest, pdf = (a, b, c) if cdf is None else (torch.logaddexp(cdf, a), torch.logaddexp(rest, b), torch.logaddexp(pdf, c))
    return cdf - rest, pdf - cdf - rest


def mix_double(x, weights, means, log_scales):
    """Float64 inside, whatever came; sums of exponentials over the largest."""
    dtype = x.dtype
    x, w, m, s = x.double().unsqueeze(-1), weights.double(), means.double(), log_scales.double()
    u = (x - m) * torch.exp(-s)
    lse = lambda t: t.amax(-1) + (t - t.amax(-1, keepdim=True)).exp().sum(-1).log()  # noqa: E731
    lf, lr = lse(w.log() + F.logsigmoid(u)), lse(w.log() - F.softplus(u))
    lp = lse(w.log() + F.logsigmoid(u) - F.softplus(u) - s)
    return (lf - lr).to(dtype), (lp - lf - lr).to(dtype)


def mix_autograd(x, pi, mu, log_s):
    """The slope by autograd of y itself, kept in the graph; components on the first axis."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        pi, mu, log_s = (torch.broadcast_to(p, (*x.shape, p.shape[-1])).movedim(-1, 0) for p in (pi, mu, log_s))
        u = (x - mu) / log_s.exp()
        y = torch.logsumexp(pi.log() + F.logsigmoid(u), 0) - torch.logsumexp(pi.log() + F.logsigmoid(-u), 0)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        ldj = slope.log()
    return (y, ldj) if keep else (y.detach(), ldj.detach())


def mix_one_sigmoid(x, weights, means, log_scales):
    """log(1 - sigmoid) as log sigmoid minus u, with a log sigmoid of its own; 1/F + 1/(1-F) by logaddexp; logcumsumexp for the sum."""

    def total(terms):
        return torch.logcumsumexp(terms, dim=-1)[..., -1]

    u = torch.exp(-log_scales) * (x.unsqueeze(-1) - means)
    below = u.clamp(max=0) - torch.log1p(torch.exp(-u.abs()))
    above = below - u
    logs = torch.log(weights)
    F_, R_ = total(logs + below), total(logs + above)
    return F_ - R_, total(logs + below + above - log_scales) + torch.logaddexp(-F_, -R_)


def mix_odds(x, weights, means, log_scales):
    """Slope as two averages, (log F)' and (log 1-F)', over softmax weights of the components; no log-density is formed."""
    u = (x[..., None] - means) / log_scales.exp()
    p, q = weights.log() - F.softplus(-u), weights.log() - F.softplus(u)
    y = p.logsumexp(-1) - q.logsumexp(-1)
    rate = torch.exp(-log_scales)
    up, down = (p.softmax(-1) * torch.sigmoid(-u) * rate).sum(-1), (q.softmax(-1) * torch.sigmoid(u) * rate).sum(-1)
    return y, torch.log(up + down)


def mix_cosh(x, weights, means, log_scales):
    """The logistic density as 1 / (4 cosh(u / 2)^2), in logs; one logsumexp over a stack of all three sums."""
    s = log_scales
    h = (x.reshape(*x.shape, 1) - means) * torch.exp(-s) / 2
    log_2cosh = torch.logaddexp(h, -h)
    terms = torch.stack(torch.broadcast_tensors(h - log_2cosh, -h - log_2cosh, -2 * log_2cosh - s)) + weights.log()
    log_cdf, log_rest, log_pdf = torch.logsumexp(terms, dim=-1)
    return log_cdf.sub(log_rest), log_pdf.sub(log_cdf).sub(log_rest)


class MixPlain(nn.Module):
    """As most would write it, in the order of the statement; the blocks are read as (d, K)."""

    def __init__(self, net, components):
        super().__init__()
        self.net, self.components = net, components

    def parameters_of(self, x1):
        B, d = x1.shape
        K = self.components
        out = self.net(x1)
        logits, means, log_scales, a, b = torch.split(out, [K * d, K * d, K * d, d, d], dim=1)
        weights = torch.softmax(logits.view(B, d, K), dim=-1)
        return weights, means.view(B, d, K), log_scales.view(B, d, K), a, b

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        weights, means, log_scales, a, b = self.parameters_of(x1)
        y, log_slope = mix_plain(x2, weights, means, log_scales)
        z2 = y * torch.exp(a) + b
        ldj = (log_slope + a).sum(dim=1)
        return torch.cat([x1, z2], dim=1), ldj

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        weights, means, log_scales, a, b = self.parameters_of(z1)
        y = (z2 - b) * torch.exp(-a)
        lo, hi = torch.full_like(y, -1000.0), torch.full_like(y, 1000.0)
        for _ in range(60):
            mid = (lo + hi) / 2
            too_big = mix_plain(mid, weights, means, log_scales)[0] > y
            hi = torch.where(too_big, mid, hi)
            lo = torch.where(too_big, lo, mid)
        return torch.cat([z1, (lo + hi) / 2], dim=1)


class Mix(nn.Module):
    """(d, K) inside the blocks, bracket widened as needed, own scalar map."""

    scalar = staticmethod(mix_loop)

    def __init__(self, net, components):
        super().__init__()
        self.net, self.k = net, components

    def read(self, h):
        d, k = h.shape[1], self.k
        out = self.net(h)
        logits, means, scales = (out[:, i * d * k:(i + 1) * d * k].view(len(h), d, k) for i in range(3))
        a, b = out[:, 3 * d * k:3 * d * k + d], out[:, 3 * d * k + d:]
        return (torch.softmax(logits, 2), means, scales), a, b

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        p, a, b = self.read(x1)
        y, slope = self.scalar(x2, *p)
        return torch.cat([x1, torch.exp(a) * y + b], 1), (a + slope).sum(1)

    @torch.no_grad()
    def inverse(self, z):
        z1, z2 = z.chunk(2, 1)
        p, a, b = self.read(z1)
        target = (z2 - b) / a.exp()
        lo, hi = torch.full_like(z2, -1.0), torch.full_like(z2, 1.0)
        while (self.scalar(lo, *p)[0] > target).any():
            lo = lo * 2
        while (self.scalar(hi, *p)[0] < target).any():
            hi = hi * 2
        for _ in range(100):
            mid = 0.5 * (lo + hi)
            low = self.scalar(mid, *p)[0] < target
            lo, hi = torch.where(low, mid, lo), torch.where(low, hi, mid)
        return torch.cat([z1, 0.5 * (lo + hi)], 1)


class MixOther(Mix):
    """(K, d) inside the blocks, float64 map."""

    scalar = staticmethod(mix_double)

    def read(self, h):
        d, k = h.shape[1], self.k
        out = self.net(h)
        logits, means, scales = (out[:, i * d * k:(i + 1) * d * k].view(len(h), k, d).movedim(1, 2) for i in range(3))
        a, b = out[:, 3 * d * k:].chunk(2, 1)
        return (logits.softmax(-1), means, scales), a, b


class MixBracket(nn.Module):
    """Starts from the exact bracket, the least and the greatest of the components' own quantiles; log-weights by log_softmax."""

    def __init__(self, net, components):
        super().__init__()
        self.net, self.components = net, components

    def split(self, v):
        first, second = torch.tensor_split(v, 2, dim=1)
        B, d = first.shape
        out = self.net(first)
        mixture = out[:, :-2 * d].reshape(B, 3, d, self.components)
        logits, means, log_scales = mixture.unbind(1)
        return first, second, (logits.log_softmax(-1), means, log_scales), out[:, -2 * d:-d], out[:, -d:]

    def logit_cdf(self, x, log_w, means, log_scales):
        u = (x[..., None] - means) * (-log_scales).exp()
        return (log_w + F.logsigmoid(u)).logsumexp(-1), (log_w + F.logsigmoid(-u)).logsumexp(-1), u

    def forward(self, x):
        x1, x2, mixture, a, b = self.split(x)
        low, high, u = self.logit_cdf(x2, *mixture)
        log_pdf = torch.logsumexp(mixture[0] - mixture[2] - F.softplus(u) - F.softplus(-u), -1)
        return torch.hstack((x1, (low - high) * a.exp() + b)), torch.sum(log_pdf - low - high, 1) + torch.sum(a, 1)

    def inverse(self, z):
        z1, z2, mixture, a, b = self.split(z)
        y = (z2 - b) * torch.exp(-a)
        ends = mixture[1] + mixture[2].exp() * y[..., None]
        left, right = ends.amin(-1), ends.amax(-1)
        for _ in range(64):
            x = torch.lerp(left, right, 0.5)
            low, high, _ = self.logit_cdf(x, *mixture)
            small = low - high < y
            left, right = x.where(small, left), right.where(small, x)
        return torch.hstack((z1, x))


class MixSteps:
    """Not a module; one dimension after the other; bisection as steps up and down of half the size each, in double precision."""

    def __init__(self, net, components):
        self.net, self.K = net, components

    def dimension(self, out, d, i):
        K = self.K
        blocks = [out[:, n * d * K + i * K:n * d * K + (i + 1) * K] for n in range(3)]
        return (F.softmax(blocks[0], dim=1), blocks[1], blocks[2]), out[:, 3 * d * K + i], out[:, 3 * d * K + d + i]

    def forward(self, x):
        d = x.shape[1] // 2
        out, z, ldj = self.net(x[:, :d]), x.clone(), torch.zeros(len(x), dtype=x.dtype)
        for i in range(d):
            mixture, a, b = self.dimension(out, d, i)
            y, slope = mix_one_sigmoid(x[:, d + i], *mixture)
            z[:, d + i] = y * a.exp() + b
            ldj = ldj + slope + a
        return z, ldj

    def inverse(self, z):
        d = z.shape[1] // 2
        with torch.no_grad():
            out, x = self.net(z[:, :d]).double(), z.clone()
            for i in range(d):
                mixture, a, b = self.dimension(out, d, i)
                y = (z[:, d + i].double() - b) / a.exp()
                guess, step = torch.zeros_like(y), 1024.0
                while step > 1e-12:
                    guess = guess + step * torch.sign(y - mix_one_sigmoid(guess, *mixture)[0])
                    step /= 2
                x[:, d + i] = guess.to(x.dtype)
        return x


class MixPolished(nn.Module):
    """(K, d) blocks, a softmax by hand, the map in a closure; bisection in place by boolean masks, then Newton steps that stay in the bracket."""

    def __init__(self, net, components):
        super().__init__()
        self.net = net
        self.register_buffer("k", torch.tensor(components))

    def conditioned(self, x1):
        B, d = x1.shape
        n = int(self.k) * d
        logits, m, s, a, b = torch.split(self.net(x1), (n, n, n, d, d), dim=1)
        logits, m, s = (t.unflatten(1, (int(self.k), d)).transpose(1, 2) for t in (logits, m, s))
        w = (logits - logits.amax(-1, keepdim=True)).exp()
        w = w / w.sum(-1, keepdim=True)
        return lambda v: mix_odds(v, w, m, s), a, b

    def forward(self, x):
        half = x.shape[1] // 2
        bend, a, b = self.conditioned(x[:, :half])
        y, log_slope = bend(x[:, half:])
        return torch.cat([x[:, :half], torch.addcmul(b, y, a.exp())], 1), torch.einsum("bd->b", log_slope + a)

    @torch.no_grad()
    def inverse(self, z):
        half = z.shape[1] // 2
        bend, a, b = self.conditioned(z[:, :half])
        y = (z[:, half:] - b) / a.exp()
        low, high = y.new_full(y.shape, -2000.0), y.new_full(y.shape, 2000.0)
        for _ in range(60):
            middle = (low + high) / 2
            value, _ = bend(middle)
            high[value > y] = middle[value > y]
            low[value <= y] = middle[value <= y]
        for _ in range(3):
            value, log_slope = bend(middle)
            newton = middle - (value - y) / log_slope.exp()
            middle = torch.where((newton >= low) & (newton <= high), newton, middle)
        return torch.cat([z[:, :half], middle], 1)


class MixUntilStill(nn.Module):
    """Components on the middle axis, (B, K, d); doubles the bracket where it is too small, halves it until no number lies between its ends."""

    def __init__(self, net, components):
        super().__init__()
        self.net, self.components = net, components
        self.halvings = 0

    def blocks(self, x1):
        B, d = x1.shape
        out = self.net(x1)
        three = out.narrow(1, 0, 3 * d * self.components).view(B, 3, self.components, d)
        log_w = three[:, 0] - three[:, 0].logsumexp(1, keepdim=True)
        return (log_w, three[:, 1], three[:, 2]), out.narrow(1, out.shape[1] - 2 * d, d), out.narrow(1, out.shape[1] - d, d)

    @staticmethod
    def sums(x2, log_w, means, log_scales):
        u = (x2.unsqueeze(1) - means) / log_scales.exp()
        below, above = log_w + F.logsigmoid(u), log_w + F.logsigmoid(-u)
        return below.logsumexp(1), above.logsumexp(1), torch.logsumexp(below + above - log_w - log_scales, 1)

    def forward(self, x):
        x1, x2 = x.tensor_split(2, 1)
        mixture, a, b = self.blocks(x1)
        log_cdf, log_rest, log_pdf = self.sums(x2, *mixture)
        z2 = b + a.exp() * (log_cdf - log_rest)
        return torch.concat((x1, z2), 1), (a + log_pdf - log_cdf - log_rest) @ x.new_ones(a.shape[1])

    def inverse(self, z):
        z1, z2 = z.tensor_split(2, 1)
        with torch.no_grad():
            mixture, a, b = self.blocks(z1)

            def too_high(x2):
                log_cdf, log_rest, _ = self.sums(x2, *mixture)
                return b + a.exp() * (log_cdf - log_rest) > z2

            radius = torch.ones_like(z2)
            for _ in range(20):
                radius = torch.where(too_high(-radius) | ~too_high(radius), 2 * radius, radius)
            low, high, self.halvings = -radius, radius, 0
            while self.halvings < 1200:
                middle = low + (high - low) / 2
                if ((middle == low) | (middle == high)).all():
                    break
                above = too_high(middle)
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
                self.halvings += 1
            return torch.concat((z1, middle), 1)


def study_width(setting):
    torch.manual_seed(0)
    return 1 / math.sqrt(setting)


def study_tensor(setting):
    return torch.tensor(0.1 * setting)


class StudyScale(nn.Module):
    """A layer for the next studies: scale and shift of each dimension, by numbers of its own."""

    def __init__(self):
        super().__init__()
        self.s, self.t = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x * self.s.exp() + self.t, self.s.sum().expand(len(x))

    def inverse(self, z):
        return (z - self.t) * (-self.s).exp()


def study_layers(setting):
    """A real training: the number of coupling layers, with the classes above; a numpy float."""
    settings.seed(0)
    target = toys.get("two_moons")
    layers = []
    for _ in range(setting):
        layers += [Split(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))), PermuteScatter([1, 0])]
    flow = Flow(StandardNormal(2), Compose(layers))
    train_sgd(flow, (target.sample(128) for _ in range(settings.steps(600, 30))), 1e-2)
    with torch.no_grad():
        return np.mean(-flow.log_prob(target.sample(4000, seed=1)).numpy()) - target.entropy


def study_rate(setting):
    """The learning rate, with a flow that only scales and shifts; float64 as default type inside; a tensor with one entry."""
    target, before = toys.get("pinwheel"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        flow = Flow(StandardNormal(2), Compose([StudyScale()]))
        points = torch.Generator().manual_seed(7)
        batches = (target.sample(64, generator=points).double() for _ in range(settings.steps(600, 30)))
        train_scheduled(flow, batches, 10.0 ** -setting)
        return -flow.log_prob(target.sample(2000, seed=3).double()).mean(0, keepdim=True) - target.entropy
    finally:
        torch.set_default_dtype(before)


def study_batch_size(setting):
    """The size of the batches; the loop written out by hand, the mean of three seeds."""
    target, gaps = toys.get("two_spirals"), []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = PairedModule([nn.Sequential(nn.Linear(1, 8), nn.ELU(), nn.Linear(8, 1)) for _ in range(2)])
        optimiser = torch.optim.Adam([p for n in layer.nets for p in n.parameters()], lr=1e-2)

        def loss(x, layer=layer):
            z, ldj = layer.forward(x)
            return (0.5 * z.square().sum(1) + math.log(2 * math.pi) - ldj).mean()

        for _ in range(settings.steps(200, 10)):
            optimiser.zero_grad()
            loss(target.sample(16 * setting)).backward()
            optimiser.step()
        gaps.append(loss(target.sample(1000, seed=1)).item() - target.entropy)
    return sum(gaps) / len(gaps)


def study_steps(setting):
    """The number of batches; no torch in the training, which is numpy with the gradient by hand."""
    target, rng = toys.get("two_moons"), np.random.default_rng(0)
    data = target.sample(2000, seed=0).numpy().astype(np.float64)
    s, t = np.zeros(2), np.zeros(2)
    for _ in range(setting * settings.steps(100, 5)):
        x = data[rng.integers(len(data), size=256)]
        z = x * np.exp(s) + t
        s, t = s - 0.05 * ((z * x * np.exp(s)).mean(0) - 1), t - 0.05 * z.mean(0)
    z = data * np.exp(s) + t
    return float((0.5 * (z**2).sum(1) + np.log(2 * np.pi) - s.sum()).mean() - target.entropy)


RIGHT = {
    "coupling": [(Split,), (Pair,), (PairedModule,), (Listed,), (Tuple,), (Masks,), (Loop,), (Single,)],
    "make_net": [(TwoNets,), (net_zero,), (net_pair,), (net_layer_norm,), (lambda: nn.ModuleList(net_pair()),), (lambda: [TwoNets().alpha and nn.Sequential(nn.Linear(1, 8), nn.Sigmoid(), nn.Linear(8, 1)) for _ in range(2)],)],
    "permute": [(PermuteScatter,), (PermuteMatrix,), (PermuteLists,), (PermuteNumpy,), (PermuteGather,), (PermuteSwaps,)],
    "train_flow": [(train_sgd,), (train_by_hand,), (train_clear_after,), (train_scheduled,), (train_prints,)],
    "additive_coupling": [(AdditiveEinsum,), (AdditiveHstack,), (AdditivePad,), (AdditiveRows,), (AdditiveAffine,), (AdditiveIndexAdd,)],
    "act_norm": [(ActNormPlain,), (ActNormDirect,), (ActNormParameterFlag,), (ActNormCounter,), (ActNormNumpy,), (ActNormTwoSteps,), (ActNormWhere,)],
    "invertible_linear": [(LinearPlain,), (LinearUnit,), (LinearSigned,), (LinearDirect,), (LinearPacked,), (LinearParametrized,), (LinearVectors,), (LinearRotation,)],
    "mix_logit_cdf": [(mix_plain,), (mix_loop,), (mix_double,), (mix_autograd,), (mix_one_sigmoid,), (mix_odds,), (mix_cosh,)],
    "mix_coupling": [(MixPlain,), (Mix,), (MixOther,), (MixBracket,), (MixSteps,), (MixPolished,), (MixUntilStill,)],
    "bonus_study": [(study_width,), (study_tensor,), (study_layers,), (study_rate,), (study_batch_size,), (study_steps,)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason; a person has looked at them.
CONFIRMED = {
    "bonus_study": {
        "study: another constant, 0.003 -> 3e-05": "a study with another learning rate",
        "study: two in the wrong order, (Coupling(make_net()), Permute([1, 0])) -> (Permute([1, 0]), Coupling(make_net()))": "a study of flows that begin with the permutation",
        "study: two in the wrong order, [1, 0] -> [0, 1]": "a study of flows without mixing; what it shows is for the written answer",
        "study: two arguments exchanged, settings.steps(600, 30) -> settings.steps(30, 600)": "a longer run in fast mode, a shorter one otherwise",
    },
    "act_norm": {
        "__init__: two exchanged, (self.s, self.t) -> (self.t, self.s)": "the two parameters start from the same zeros, so only their order in the module changes",
    },
    "invertible_linear": {
        "__init__: two exchanged, (self.lower, self.upper) -> (self.upper, self.lower)": "both start from random numbers of one kind, so only their order in the module changes",
        "__init__: a product turned into a quotient, or back, torch.randn(dim, dim) / dim -> torch.randn(dim, dim) * dim": "a poor start, but an invertible one; small numbers are advice in the statement",
        "__init__: a factor dropped, torch.randn(dim, dim) / dim -> torch.randn(dim, dim)": "another start",
        "factors: a sign turned, self.upper.triu(1) + torch.diag(self.s.exp()) -> self.upper.triu(1) - torch.diag(self.s.exp())": "a negative diagonal is as good as a positive one: log|det W| is the same, and inverse solves with the same factor",
    },
}
