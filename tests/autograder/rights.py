"""Differently written right answers: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


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


def study_width(setting):
    torch.manual_seed(0)
    return 1 / math.sqrt(setting)


def study_tensor(setting):
    return torch.tensor(0.1 * setting)


RIGHT = {
    "coupling": [(Split,), (Pair,), (PairedModule,), (Listed,), (Tuple,), (Masks,), (Loop,), (Single,)],
    "make_net": [(TwoNets,), (net_zero,), (net_pair,), (net_layer_norm,), (lambda: nn.ModuleList(net_pair()),), (lambda: [TwoNets().alpha and nn.Sequential(nn.Linear(1, 8), nn.Sigmoid(), nn.Linear(8, 1)) for _ in range(2)],)],
    "permute": [(PermuteScatter,), (PermuteMatrix,), (PermuteLists,), (PermuteNumpy,)],
    "train_flow": [(train_sgd,), (train_by_hand,), (train_clear_after,), (train_scheduled,), (train_prints,)],
    "additive_coupling": [(AdditiveEinsum,), (AdditiveHstack,)],
    "act_norm": [(ActNormDirect,), (ActNormParameterFlag,)],
    "invertible_linear": [(LinearSigned,), (LinearDirect,)],
    "mix_logit_cdf": [(mix_loop,), (mix_double,)],
    "mix_coupling": [(Mix,), (MixOther,)],
    "bonus_study": [(study_width,), (study_tensor,)],
}
