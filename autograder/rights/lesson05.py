"""Differently written right answers of lesson 05: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import distributions, nn
from torch.nn import functional as F

# --- modular_shift ---------------------------------------------------------------------------------------------------


def shift_plain(x, mu, sigma, K):
    if math.gcd(sigma, K) != 1:
        raise ValueError("sigma has no inverse modulo K")
    return (mu + sigma * x) % K


def unshift_plain(z, mu, sigma, K):
    inverse = pow(sigma, -1, K)
    return (inverse * (z - mu)) % K


def shift_stepwise(x, mu, sigma, K):
    """Assertions, and one step after the other."""
    assert math.gcd(sigma, K) == 1, "sigma and K have a divisor in common"
    scaled = x * sigma
    moved = scaled + mu
    return torch.remainder(moved, K)


def unshift_stepwise(z, mu, sigma, K):
    assert math.gcd(sigma, K) == 1, "sigma and K have a divisor in common"
    inverse = [t for t in range(K) if t * sigma % K == 1][0]
    moved = z - mu
    return torch.remainder(moved * inverse, K)


def shift_tensors(x, mu, sigma, K):
    """mu and sigma as tensors of x's shape; the inverse by Euler's theorem."""
    if (torch.gcd(sigma, torch.full_like(sigma, K)) > 1).any():
        raise ValueError("no bijection")
    return (sigma * x + mu).remainder(K)


def unshift_tensors(z, mu, sigma, K):
    if (torch.gcd(sigma, torch.full_like(sigma, K)) > 1).any():
        raise ValueError("no bijection")
    totient = sum(math.gcd(t, K) == 1 for t in range(1, K + 1))
    return ((z - mu) * sigma ** (totient - 1)).remainder(K)


def table_of(sigma, K):
    table = torch.tensor([[(mu + sigma * k) % K for k in range(K)] for mu in range(K)])
    if len(table[0].unique()) < K:
        raise ValueError(f"sigma = {sigma} sends two states to one")
    return table


def shift_table(x, mu, sigma, K):
    """The permutation of each mu written down and looked up."""
    return table_of(sigma, K)[mu, x]


def unshift_table(z, mu, sigma, K):
    return torch.argsort(table_of(sigma, K), -1)[mu, z]


def shift_scalars(x, mu, sigma, K):
    """sigma as a tensor with one number."""
    s = sigma.item()
    if math.gcd(s, K) != 1:
        raise ArithmeticError("gcd")
    return torch.fmod(mu + s * x, K)


def unshift_scalars(z, mu, sigma, K):
    s = sigma.item()
    if math.gcd(s, K) != 1:
        raise ArithmeticError("gcd")
    return torch.fmod(pow(s, -1, K) * (z + (K - mu)), K)


def permutation_matrix(mu, sigma, K):
    """One for each mu: (..., K, K), in floats."""
    k = torch.arange(K)
    matrix = ((torch.as_tensor(mu)[..., None, None] + sigma * k) % K == k[:, None]).double()
    if (matrix.sum(-1) != 1).any():
        raise RuntimeError("not a permutation")
    return matrix


def shift_one_hot(x, mu, sigma, K):
    """As permutation matrices on one-hot vectors."""
    return (permutation_matrix(mu, sigma, K) @ F.one_hot(x, K).double()[..., None])[..., 0].argmax(-1)


def unshift_one_hot(z, mu, sigma, K):
    return (permutation_matrix(mu, sigma, K).mT @ F.one_hot(z, K).double()[..., None])[..., 0].argmax(-1)


def shift_floats(x, mu, sigma, K):
    """Remainders by hand, in floats."""
    if sigma == 0 or any(sigma % d == 0 and K % d == 0 for d in range(2, K + 1)):
        raise Exception("a common divisor")
    t = (mu + sigma * x).double()
    return (t - K * torch.floor(t / K)).long()


def unshift_floats(z, mu, sigma, K):
    if sigma == 0 or any(sigma % d == 0 and K % d == 0 for d in range(2, K + 1)):
        raise Exception("a common divisor")
    x = (z - mu).clone()
    for _ in range(K):
        x = torch.where(x % sigma != 0, x + K, x)
    return (x.double() / sigma).remainder(K).long()


# --- one_hot_argmax_st -----------------------------------------------------------------------------------------------


def one_hot_plain(logits, tau):
    soft = torch.softmax(logits / tau, dim=-1)
    hard = F.one_hot(logits.argmax(dim=-1), logits.shape[-1])
    return soft + (hard - soft).detach()


def one_hot_scattered(logits, tau):
    soft = F.softmax(logits / tau, dim=-1)
    index = logits.argmax(-1, keepdim=True)
    hard = torch.zeros_like(logits).scatter(-1, index, 1.0)
    return hard - soft.detach() + soft


def one_hot_identity(logits, tau):
    """Rows of the identity matrix; an exact zero."""
    soft = (logits / tau).softmax(-1)
    hard = torch.eye(logits.size(-1))[logits.argmax(-1)]
    return hard + (soft - soft.detach())


def one_hot_compared(logits, tau):
    """The entries that are as large as the largest, and the softmax by logsumexp."""
    scaled = logits / tau
    soft = torch.exp(scaled - torch.logsumexp(scaled, -1, keepdim=True))
    with torch.no_grad():
        rest = (logits == logits.amax(-1, keepdim=True)).double() - soft
    return soft + rest


class OneHotFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tau):
        ctx.save_for_backward(torch.softmax(logits / tau, -1))
        ctx.tau = tau
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return p * (g - (p * g).sum(-1, keepdim=True)) / ctx.tau, None


def one_hot_function(logits, tau):
    """Both directions by hand."""
    return OneHotFunction.apply(logits, tau)


def one_hot_loop(logits, tau):
    """Row after row, in single precision."""
    rows = logits.reshape(-1, logits.shape[-1]).float()
    found = []
    for row in rows:
        e = torch.exp((row - row.max()) / tau)
        soft = e / e.sum()
        hard = torch.zeros(len(row), dtype=torch.float32)
        hard[row.argmax()] = 1
        found.append(hard + (soft - soft.detach()))
    return torch.stack(found).reshape(logits.shape)


def one_hot_replaced(logits, tau):
    """A soft tensor whose numbers are exchanged."""
    soft = torch.softmax(logits * (1 / tau), -1)
    index = soft.detach().max(-1).indices
    return soft * 1 + (F.one_hot(index, soft.shape[-1]).to(soft.dtype) - soft).data


# --- round_st --------------------------------------------------------------------------------------------------------


def round_plain(x):
    return x + (x.round() - x).detach()


def round_exact_zero(x):
    hard = torch.round(x).detach()
    return hard + (x - x.detach())


def round_stepwise(x):
    rounded = torch.round(x)
    correction = rounded - x
    return x + correction.detach()


def round_half_up(x):
    with torch.no_grad():
        rest = torch.floor(x + 0.5) - x
    return x + rest


class RoundFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g


def round_function(x):
    return RoundFunction.apply(x)


def round_hook(x):
    """A copy whose numbers are exchanged."""
    y = x.clone()
    y.data = y.data.round()
    return y


def round_numpy(x):
    return x - x.detach() + torch.from_numpy(np.rint(x.detach().numpy()))


def round_single(x):
    x = x.float()
    return (x.long() + (2 * (x - x.long())).long()).detach() + (x - x.detach())


# --- idf_coupling ----------------------------------------------------------------------------------------------------


class IntegerShift:
    def __init__(self, net):
        self.net = net

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        t = self.net(x1)
        z2 = x2 + t.detach().round() + (t - t.detach())
        return torch.cat([x1, z2], dim=1), torch.zeros(len(x))

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        t = self.net(z1)
        x2 = z2 - t.round()
        return torch.cat([z1, x2], dim=1)


class IntegerSlices(nn.Module):
    """Slices for the halves, the rounding in between."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        d = x.shape[1] // 2
        mu = self.net(x[:, :d])
        mu = mu + (torch.round(mu) - mu).detach()
        z = torch.cat((x[:, :d], x[:, d:] + mu), dim=1)
        return z, x.new_zeros(x.shape[0])

    def inverse(self, z):
        d = z.shape[1] // 2
        mu = self.net(z[:, :d])
        mu = torch.round(mu)
        return torch.cat((z[:, :d], z[:, d:] - mu), dim=1)


class IntegerFunction(nn.Module):
    """Gradients by a function of one's own, inverse without gradients."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = torch.tensor_split(x, 2, -1)
        mu = RoundFunction.apply(self.net(x1))
        z = torch.hstack([x1, x2 + mu])
        ldj = 0 * mu.sum(-1)
        return z, ldj

    @torch.no_grad()
    def inverse(self, z):
        z1, z2 = torch.tensor_split(z, 2, -1)
        return torch.hstack([z1, z2 - RoundFunction.apply(self.net(z1))])


class IntegerModule(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def shift(self, half):
        mu = self.net(half)
        return torch.round(mu).detach() + (mu - mu.detach())

    def forward(self, x):
        d = x.shape[-1] // 2
        a, b = x[:, :d], x[:, d:]
        b = b + self.shift(a)
        return torch.cat((a, b), -1), x.new_zeros(x.shape[0])

    def inverse(self, z):
        d = z.shape[-1] // 2
        a, b = z[:, :d], z[:, d:]
        b = b - self.shift(a)
        return torch.cat((a, b), -1)


class IntegerSum(nn.Module):
    """The sum is rounded, which is the same for integers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.split(x.shape[1] // 2, 1)
        t = x2 + self.net(x1)
        return torch.cat([x1, t.detach().round() + (t - t.detach())], 1), torch.zeros_like(x[:, 0])

    def inverse(self, z):
        z1, z2 = z.split(z.shape[1] // 2, 1)
        return torch.cat([z1, (z2 - self.net(z1)).round()], 1)


class IntegerCopied:
    """A copy of x is changed."""

    def __init__(self, net):
        self.net = net

    def forward(self, x):
        z, d = x.clone(), x.shape[1] // 2
        t = self.net(x[:, :d])
        z[:, d:] += t + (torch.floor(t + 0.5) - t).detach()
        return z, torch.zeros(x.shape[:1])

    def inverse(self, z):
        x, d = z.clone(), z.shape[1] // 2
        x[:, d:] -= torch.floor(self.net(z[:, :d]) + 0.5).detach()
        return x


class IntegerSingle(nn.Module):
    """In single precision throughout; whole numbers come back from inverse."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.float().chunk(2, -1)
        mu = self.net(x1).float()
        z2 = x2 + (mu + (torch.round(mu) - mu).detach())
        return torch.cat([x1, z2], -1), torch.zeros(len(x), dtype=torch.float32)

    def inverse(self, z):
        z1, z2 = z.float().chunk(2, -1)
        return torch.cat([z1, z2 - self.net(z1).float().round()], -1).long()


# --- uniform_dequantize ----------------------------------------------------------------------------------------------


def uniform_plain(x, K):
    u = torch.rand(x.shape)
    y = (x + u) / K
    contribution = torch.full((x.shape[0],), -x.shape[1] * math.log(K))
    return y, contribution


def uniform_like(x, K):
    y = (x + torch.rand_like(x, dtype=torch.get_default_dtype())) / K
    return y, -x.shape[1] * math.log(K) * torch.ones(len(x))


def uniform_summed(x, K):
    """The contribution as a sum of one logarithm for each number."""
    y = (x.double() + torch.rand(x.shape)) / K
    each = torch.full(y.shape, math.log(1 / K))
    return y, each.sum(dim=1)


def uniform_distribution(x, K):
    noise = torch.distributions.Uniform(0.0, 1.0).sample(x.shape)
    y = x / K + noise / K
    log_q = torch.distributions.Uniform(0.0, 1.0 / K).log_prob(noise / K).sum(-1)
    return y, -log_q


def uniform_single(x, K):
    """In single precision; the shape by flattening."""
    x = x.float()
    y = x.add(torch.rand_like(x)).div(K)
    return y, y.new_zeros(len(x)) - math.log(K) * x.flatten(1).shape[1]


def uniform_numpy(x, K):
    u = np.random.uniform(size=tuple(x.shape))
    y = torch.from_numpy((x.numpy() + u) / K)
    return y, torch.tensor([-x[0].numel() * np.log(K)] * len(x))


def uniform_between(x, K):
    """A draw between the two ends of the cell."""
    low, high = x.double() / K, (x.double() + 1) / K
    y = torch.lerp(low, high, torch.empty(x.shape).uniform_())
    return y, (high - low).log().sum(-1)


# --- variational_bound -----------------------------------------------------------------------------------------------


def bound_plain(x, q, log_prob):
    u, log_q = q(x)
    return log_prob(x + u) - log_q


def bound_named(x, q, log_prob):
    u, log_q = q(x)
    y = x.double() + u
    log_p = log_prob(y)
    bound = log_p - log_q
    return bound


def bound_indexed(x, q, log_prob):
    drawn = q(x)
    point = torch.add(drawn[0], x)
    return -(drawn[1] - log_prob(point))


def bound_rows(x, q, log_prob):
    """The density is asked row by row."""
    u, log_q = q(x)
    return torch.stack([log_prob((x[i] + u[i])[None])[0] - log_q[i] for i in range(len(x))])


def bound_stacked(x, q, log_prob):
    u, log_q = q(x)
    return torch.stack([log_prob(x.to(u.dtype) + u), -log_q]).sum(0)


def bound_single(x, q, log_prob):
    u, log_q = q(x)
    return torch.sub(log_prob(x + u).float(), log_q.float())


def bound_mapped(x, q, log_prob):
    """The density of one point, mapped over the batch."""
    u, log_q = q(x)
    return torch.vmap(log_prob)(x + u) - log_q


def bound_ratio(x, q, log_prob):
    """By the ratio of densities, which is fine while nothing underflows."""
    u, log_q = q(x)
    return torch.log(log_prob(u + x).exp() / log_q.exp())


# =====================================================================================================================
# Layers that draw one way: slice_layer, split_layer, abs_layer, max_layer, sort_layer, argmax_layer, stochastic_layer
# =====================================================================================================================

# --- slice_layer -----------------------------------------------------------------------------------------------------


class SlicePlain(nn.Module):
    """Plainly."""

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x):
        z2, log_q = self.q(x)
        z = torch.cat([x, z2], dim=-1)
        return z, -log_q

    def inverse(self, z):
        return z[:, :self.keep]


class SliceHstack(nn.Module):
    """Stacked side by side; the contribution as a difference of two logarithms, the first of which is 0."""

    def __init__(self, q, keep):
        super().__init__()
        self.q = q
        self.keep = keep

    def forward(self, x):
        extra, log_q = self.q(x)
        log_p = torch.zeros_like(log_q)
        contribution = log_p - log_q
        return torch.hstack((x, extra)), contribution

    def inverse(self, z):
        x, extra = z.split([self.keep, z.shape[1] - self.keep], dim=1)
        return x


class SliceNarrow(nn.Module):
    """The coordinates are taken out by index."""

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x):
        drawn = self.q(x)
        return torch.cat((x, drawn[0]), 1), drawn[1].neg()

    def inverse(self, z):
        return z.narrow(1, 0, self.keep)


class SliceFilled:
    """Not a module; written into an empty tensor, a list for the result, an index for the columns."""

    def __init__(self, q, keep):
        self.proposal, self.columns = q, torch.arange(keep)

    def forward(self, x):
        z2, log_q = self.proposal(x)
        d = len(self.columns)
        z = x.new_zeros(len(x), d + z2.shape[1])
        z[:, :d], z[:, d:] = x, z2
        return [z, 0 - log_q]

    def inverse(self, z):
        return z.index_select(-1, self.columns)


class SliceAnyRank(nn.Module):
    """For any leading shape; inverse without gradients, as a copy."""

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x):
        z2, log_q = self.q(x)
        if log_q.shape != x.shape[:-1]:
            raise ValueError(f"log_q has shape {log_q.shape}")
        return torch.cat([x, z2], -1), torch.negative(log_q)

    @torch.no_grad()
    def inverse(self, z):
        return z[..., :self.keep].clone()


class SliceTransposed(nn.Module):
    """Columns as rows; padding for joining."""

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x):
        z2, log_q = self.q(x)
        z = F.pad(x, (0, z2.shape[1])) + F.pad(z2, (x.shape[1], 0))
        return z, (-1.0) * log_q

    def inverse(self, z):
        return z.T[:self.keep].T


class SliceSingle(SlicePlain):
    """float32 throughout."""

    def forward(self, x):
        z2, log_q = self.q(x)
        return torch.cat([x.float(), z2.float()], -1), -log_q.float()


# --- split_layer -----------------------------------------------------------------------------------------------------


class SplitPlain(nn.Module):
    """Plainly."""

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x):
        z, rest = x[:, :self.keep], x[:, self.keep:]
        contribution = self.p(z).log_prob(rest)
        return z, contribution

    def inverse(self, z):
        rest = self.p(z).sample()
        return torch.cat([z, rest], dim=-1)


class SplitBySizes(nn.Module):
    """torch.split; the draw reparameterised."""

    def __init__(self, p, keep):
        super().__init__()
        self.p = p
        self.keep = keep

    def forward(self, x):
        z, rest = torch.split(x, [self.keep, x.shape[1] - self.keep], dim=1)
        conditional = self.p(z)
        return z, conditional.log_prob(rest)

    def inverse(self, z):
        conditional = self.p(z)
        return torch.cat((z, conditional.rsample()), 1)


class SplitHstack(nn.Module):
    """tensor_split and hstack; names for everything."""

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x):
        z, dropped = x.tensor_split([self.keep], dim=-1)
        log_p = self.p(z).log_prob(dropped)
        return z, log_p

    def inverse(self, z):
        dropped = self.p(z).sample()
        x = torch.hstack([z, dropped])
        return x


class SplitByParts:
    """Not a module; the log-density of each coordinate from the parts of the distribution, summed by hand."""

    def __init__(self, p, keep):
        self.conditional, self.n = p, keep

    def forward(self, x):
        z, rest = x[:, :self.n], x[:, self.n:]
        p = self.conditional(z)
        u = (rest - p.mean) / p.stddev
        return [z.clone(), (-0.5 * u**2 - p.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(1)]

    @torch.no_grad()
    def inverse(self, z):
        return torch.cat([z, self.conditional(z).sample((1,))[0]], 1)


class SplitFilled(nn.Module):
    """Columns by index; x filled in from zeros."""

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x):
        kept, dropped = torch.arange(self.keep), torch.arange(self.keep, x.size(1))
        z = x.index_select(1, kept)
        return z, self.p(z).log_prob(x[:, dropped])

    def inverse(self, z):
        rest = self.p(z).rsample().detach()
        x = torch.zeros(z.size(0), self.keep + rest.size(1), dtype=z.dtype)
        x[:, :self.keep] = z
        x[:, self.keep:] = rest
        return x


class SplitAsked(nn.Module):
    """Asks whether the distribution can be reparameterised; works for any leading shape."""

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x):
        z = x[..., :self.keep]
        p = self.p(z)
        contribution = p.log_prob(x[..., self.keep:])
        assert contribution.shape == x.shape[:-1]
        return z, contribution

    def inverse(self, z):
        p = self.p(z)
        return torch.concat((z, p.rsample() if p.has_rsample else p.sample()), -1)


class SplitSingle(SplitPlain):
    """float32 throughout."""

    def forward(self, x):
        z, contribution = super().forward(x)
        return z.float(), contribution.float()

    def inverse(self, z):
        return super().inverse(z.double()).float()


# --- abs_layer -------------------------------------------------------------------------------------------------------


class AbsPlain(nn.Module):
    """Plainly: without log_odds they are zero."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds

    def odds(self, z):
        if self.log_odds is None:
            return torch.zeros_like(z)
        return self.log_odds(z)

    def forward(self, x):
        z = x.abs()
        sign = torch.where(x > 0, 1.0, -1.0)
        contribution = F.logsigmoid(sign * self.odds(z)).sum(dim=-1)
        return z, contribution

    def inverse(self, z):
        p = torch.sigmoid(self.odds(z))
        positive = torch.rand_like(z) < p
        return torch.where(positive, z, -z)


class AbsSigns(nn.Module):
    """torch.sign; the draw by comparing; two branches in forward."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds

    def forward(self, x):
        z = torch.abs(x)
        if self.log_odds is None:
            return z, -math.log(2) * torch.ones_like(x).sum(1)
        odds = self.log_odds(z)
        return z, F.logsigmoid(torch.sign(x) * odds).sum(1)

    def inverse(self, z):
        if self.log_odds is None:
            p = torch.full_like(z, 0.5)
        else:
            p = torch.sigmoid(self.log_odds(z))
        sign = 2 * torch.bernoulli(p) - 1
        return sign * z


class AbsBernoulli(nn.Module):
    """torch.distributions.Bernoulli for both."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds if log_odds is not None else torch.zeros_like

    def forward(self, x):
        z = x.abs()
        coin = distributions.Bernoulli(logits=self.log_odds(z))
        return z, coin.log_prob((x > 0).to(x.dtype)).sum(-1)

    def inverse(self, z):
        coin = distributions.Bernoulli(logits=self.log_odds(z))
        return z * (2 * coin.sample() - 1)


class AbsCrossEntropy(nn.Module):
    """The log-probability as minus a cross-entropy; fair signs by randint."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds

    def forward(self, x):
        z = torch.maximum(x, -x)
        if self.log_odds is None:
            return z, torch.full((x.shape[0],), -x.shape[1] * math.log(2.0))
        loss = F.binary_cross_entropy_with_logits(self.log_odds(z), (x >= 0).double(), reduction="none")
        return z, -loss.sum(1)

    def inverse(self, z):
        if self.log_odds is None:
            return z * (2 * torch.randint(0, 2, z.shape) - 1)
        noise = torch.logit(torch.rand_like(z))
        return torch.where(self.log_odds(z) > noise, z, -z)


class AbsLoop:
    """Not a module; coordinate by coordinate; softplus; a list for the result."""

    def __init__(self, log_odds=None):
        self.log_odds = log_odds

    def forward(self, x):
        z, total = x.abs(), torch.zeros(len(x))
        odds = torch.zeros_like(z) if self.log_odds is None else self.log_odds(z)
        for i in range(x.shape[1]):
            total = total - torch.where(x[:, i] < 0, F.softplus(odds[:, i]), F.softplus(-odds[:, i]))
        return [z, total]

    @torch.no_grad()
    def inverse(self, z):
        x = z.clone()
        odds = torch.zeros_like(z) if self.log_odds is None else self.log_odds(z)
        for i in range(z.shape[1]):
            negative = torch.rand(len(z)) > torch.sigmoid(odds[:, i])
            x[negative, i] = -x[negative, i]
        return x


class AbsSoftmax(nn.Module):
    """Both signs as two classes."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds or (lambda z: 0 * z)

    def logits(self, z):
        return torch.stack([torch.zeros_like(z), self.log_odds(z)], -1)

    def forward(self, x):
        z = (x**2).sqrt()
        log_p = self.logits(z).log_softmax(-1)
        return z, log_p.gather(-1, (x > 0).long()[..., None])[..., 0].sum(-1)

    def inverse(self, z):
        return z * (2 * distributions.Categorical(logits=self.logits(z)).sample() - 1)


class AbsSingle(AbsPlain):
    """float32 throughout."""

    def forward(self, x):
        z, contribution = super().forward(x)
        return z.float(), contribution.float()

    def inverse(self, z):
        return super().inverse(z.double()).float()


# --- max_layer -------------------------------------------------------------------------------------------------------


class MaxPlain(nn.Module):
    """Plainly, with a mask; D from the excess."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def forward(self, x):
        z, k = x.max(dim=-1, keepdim=True)
        is_max = torch.zeros_like(x).scatter(1, k, 1.0)
        log_e = self.excess.log_prob((z - x) * (1 - is_max) + is_max)
        contribution = (log_e * (1 - is_max)).sum(dim=-1) - math.log(x.shape[-1])
        return z, contribution

    def inverse(self, z):
        e = self.excess.sample((z.shape[0],))
        k = torch.randint(e.shape[1], (z.shape[0], 1))
        return z - e.scatter(1, k, 0.0)


class MaxOneHot(nn.Module):
    """One-hot masks, filled in both directions."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def forward(self, x):
        z, k = x.max(1, keepdim=True)
        mask = F.one_hot(k[:, 0], x.shape[1]).bool()
        e = torch.where(mask, torch.ones_like(x), z - x)
        log_p = self.excess.log_prob(e).masked_fill(mask, 0)
        return z, log_p.sum(1) - math.log(x.shape[1])

    def inverse(self, z):
        e = self.excess.rsample((len(z),))
        k = torch.randint(e.shape[1], (len(z),))
        mask = F.one_hot(k, e.shape[1]).bool()
        return z - e.masked_fill(mask, 0)


class MaxSubtracted(nn.Module):
    """The largest one's own term, at a stand-in for its excess, is taken away again; the place by rows and columns."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def forward(self, x):
        z = x.amax(dim=1, keepdim=True)
        k = x.argmax(dim=1, keepdim=True)
        log_e = self.excess.log_prob((z - x).scatter(1, k, 0.5))
        own = log_e.gather(1, k)
        return z, log_e.sum(1) - own.sum(1) - math.log(x.shape[1])

    def inverse(self, z):
        e = self.excess.sample((len(z),))
        x = z - e
        k = torch.randint(0, x.shape[1], (len(z),))
        x[torch.arange(len(z)), k] = z[:, 0]
        return x


class MaxWhere(nn.Module):
    """torch.where on a boolean mask, in both directions."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def forward(self, x):
        d = x.shape[1]
        z = x.max(dim=1, keepdim=True).values
        is_max = torch.arange(d) == x.argmax(dim=1, keepdim=True)
        log_e = self.excess.log_prob(torch.where(is_max, torch.ones_like(x), z - x))
        log_place = -math.log(d)
        return z, torch.where(is_max, 0.0, log_e).sum(dim=1) + log_place

    def inverse(self, z):
        e = self.excess.sample((len(z),))
        d = e.shape[1]
        is_max = torch.arange(d) == torch.randint(d, z.shape)
        return torch.where(is_max, z, z - e)


class MaxRemembered:
    """Not a module; takes the excess for one number, and D from the last x; the place comes from a shuffle."""

    def __init__(self, excess):
        self.excess, self.d = excess, None

    def forward(self, x):
        self.d = x.shape[1]
        order = x.argsort(dim=1, descending=True)
        z, others = x.gather(1, order).split([1, self.d - 1], 1)
        return [z, self.excess.log_prob(z - others).sum(1) - torch.log(torch.tensor(float(self.d)))]

    @torch.no_grad()
    def inverse(self, z):
        below = z - self.excess.sample((len(z), self.d - 1))
        x = torch.cat([z, below], 1)
        return x.gather(1, torch.rand_like(x).argsort(1))


class MaxLoop(nn.Module):
    """Row by row in forward; D from the batch shape; the place by multinomial."""

    def __init__(self, excess):
        super().__init__()
        self.excess, self.d = excess, excess.batch_shape[0]

    def forward(self, x):
        z, paid = [], []
        for row in x:
            k = int(row.argmax())
            z.append(row[k])
            log_e = self.excess.log_prob(torch.cat([row[k] - row[:k], torch.ones(1), row[k] - row[k + 1:]]))
            paid.append(torch.cat([log_e[:k], log_e[k + 1:]]).sum() + math.log(1 / self.d))
        return torch.stack(z)[:, None], torch.stack(paid)

    def inverse(self, z):
        k = torch.multinomial(torch.ones(len(z), self.d), 1)
        return z - self.excess.sample((len(z),)) * (1 - F.one_hot(k[:, 0], self.d))


class MaxTold(nn.Module):
    """With D as a second argument, and one excess for all."""

    def __init__(self, excess, dim):
        super().__init__()
        self.excess, self.dim = excess, dim

    def forward(self, x):
        top = x.topk(1, dim=1)
        keep = torch.ones(x.shape, dtype=torch.bool).scatter(1, top.indices, False)
        below = x[keep].view(len(x), -1)
        return top.values, self.excess.log_prob(top.values - below).sum(-1) - math.log(x.shape[1])

    def inverse(self, z):
        x = z - self.excess.rsample((len(z), self.dim - 1))
        k = torch.randint(self.dim, (len(z),)).tolist()
        return torch.stack([torch.cat([row[:i], top, row[i:]]) for row, top, i in zip(x, z, k)])


class MaxSingle(MaxPlain):
    """float32 throughout."""

    def forward(self, x):
        z, contribution = super().forward(x)
        return z.float(), contribution.float()

    def inverse(self, z):
        e = self.excess.sample((z.shape[0],)).float()
        return z.float() - e.scatter(1, torch.randint(e.shape[1], z.shape), 0.0)


# --- sort_layer ------------------------------------------------------------------------------------------------------


class SortPlain(nn.Module):
    """Plainly."""

    def forward(self, x):
        z = x.sort(dim=-1).values
        contribution = torch.full((x.shape[0],), -math.lgamma(x.shape[1] + 1))
        return z, contribution

    def inverse(self, z):
        order = torch.rand_like(z).argsort(dim=-1)
        return z.gather(1, order)


class SortLogs(nn.Module):
    """torch.sort; the logarithm of the factorial as a sum of logarithms."""

    def forward(self, x):
        z, order = torch.sort(x, dim=1)
        numbers = torch.arange(1, x.shape[1] + 1)
        contribution = -torch.log(numbers).sum() * torch.ones(len(x))
        return z, contribution

    def inverse(self, z):
        keys = torch.rand(z.shape)
        return torch.gather(z, 1, torch.argsort(keys, dim=1))


class SortPermutations(nn.Module):
    """A permutation for each row, by randperm; the factorial in whole numbers."""

    def forward(self, x):
        log_orders = math.log(math.factorial(x.shape[1]))
        return x.sort(1)[0], torch.zeros(len(x)) - log_orders

    def inverse(self, z):
        rows = [row[torch.randperm(len(row))] for row in z]
        return torch.stack(rows)


class SortMultinomial:
    """Not a module; torch.lgamma; permutations as draws without replacement; a list for the result."""

    def forward(self, x):
        d = torch.tensor(float(x.shape[1]))
        return [x.gather(1, x.argsort(1)), -torch.lgamma(d + 1).expand(len(x))]

    def inverse(self, z):
        order = torch.multinomial(torch.ones(z.shape), z.shape[1])
        return torch.take_along_dim(z, order, 1)


class SortByMatrices(nn.Module):
    """Permutation matrices, drawn by sorting normal keys."""

    def forward(self, x):
        matrix = F.one_hot(x.argsort(1), x.shape[1]).to(x.dtype)
        logs = sum(math.log(i) for i in range(2, x.shape[1] + 1))
        return torch.einsum("bij,bj->bi", matrix, x), x.new_full(x.shape[:1], -logs)

    def inverse(self, z):
        matrix = F.one_hot(torch.randn_like(z).argsort(1), z.shape[1]).to(z.dtype)
        return (matrix @ z[..., None])[..., 0]


class SortShuffle(nn.Module):
    """The shuffle of Fisher and Yates, one exchange after another; topk for sorting."""

    def forward(self, x):
        z = x.topk(x.shape[1], dim=1, largest=False).values
        return z, torch.full_like(x[:, 0], -math.lgamma(x.shape[1] + 1.0))

    def inverse(self, z):
        x, rows = z.clone(), torch.arange(len(z))
        for i in range(z.shape[1] - 1, 0, -1):
            j = torch.randint(i + 1, (len(z),))
            a, b = x[:, i].clone(), x[rows, j].clone()
            x[:, i], x[rows, j] = b, a
        return x


class SortNumpy(nn.Module):
    """numpy's generator shuffles; float32."""

    def forward(self, x):
        log_orders = float(np.log(np.arange(1, x.shape[1] + 1)).sum())
        return x.float().sort(-1).values, torch.full((len(x),), -log_orders)

    def inverse(self, z):
        return torch.from_numpy(np.random.default_rng(5).permuted(z.numpy(), axis=1))


# --- argmax_layer ----------------------------------------------------------------------------------------------------


class ArgmaxPlain(nn.Module):
    """Plainly, with a mask."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        top = v.gather(-1, x[:, None])
        is_x = F.one_hot(x, v.shape[-1]).bool()
        z = torch.where(is_x, top, top - F.softplus(top - v))
        log_slope = torch.where(is_x, 0.0, F.logsigmoid(top - v))
        return z, log_slope.sum(dim=-1) - log_q

    def inverse(self, z):
        return z.argmax(dim=-1)


class ArgmaxWeighted(nn.Module):
    """A mask of zeros and ones that multiplies."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        one_hot = torch.nn.functional.one_hot(x, v.shape[1])
        v_x = (v * one_hot).sum(dim=1, keepdim=True)
        z = one_hot * v + (1 - one_hot) * (v_x - F.softplus(v_x - v))
        slopes = F.logsigmoid(v_x - v)
        contribution = -log_q + (slopes * (1 - one_hot)).sum(dim=1)
        return z, contribution

    def inverse(self, z):
        return torch.argmax(z, dim=1)


class ArgmaxScattered(nn.Module):
    """All are bent, and the class is put back; the class's own log sigmoid(0) is taken away again."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        rows = torch.arange(len(x))
        top = v[rows, x].unsqueeze(1)
        gap = top - v
        z = (top - F.softplus(gap)).scatter(1, x[:, None], top)
        log_slope = F.logsigmoid(gap).sum(1) + math.log(2)
        return z, log_slope - log_q

    def inverse(self, z):
        return z.max(dim=1).indices


class ArgmaxLoop:
    """Not a module; class by class; a list for the result."""

    def __init__(self, q):
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        z, paid = [], []
        for row, spent, k in zip(v, log_q, x.tolist()):
            new = [row[k] if i == k else row[k] - torch.log1p(torch.exp(row[k] - row[i])) for i in range(len(row))]
            z.append(torch.stack(new))
            paid.append(sum(-torch.log1p(torch.exp(row[i] - row[k])) for i in range(len(row)) if i != k) - spent)
        return [torch.stack(z), torch.stack(paid)]

    def inverse(self, z):
        return torch.tensor([int(row.argmax()) for row in z])


class ArgmaxSoftplus(nn.Module):
    """The log-slope as minus a softplus; einsum; float classes from inverse's topk are made whole."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        other = torch.ones_like(v).scatter(1, x[:, None], 0.0)
        top = torch.einsum("bk,bk->b", v, 1 - other)[:, None]
        z = top - other * torch.logaddexp(torch.zeros_like(v), top - v)
        return z, -torch.einsum("bk,bk->b", other, F.softplus(v - top)) - log_q

    def inverse(self, z):
        return z.topk(1, dim=1).indices.squeeze(1)


class ArgmaxJacobian(nn.Module):
    """The slopes by autograd of the bend itself; equality with the maximum for the class in inverse."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        own = torch.arange(v.shape[1]) == x[:, None]
        gap = v - v.gather(1, x[:, None])
        leaf = gap if gap.requires_grad else gap.clone().requires_grad_()
        with torch.enable_grad():
            below = -F.softplus(-leaf)
            (slope,) = torch.autograd.grad(below.sum(), leaf, create_graph=True)
        z = torch.where(own, v, v - gap + below)
        return z if v.requires_grad else z.detach(), slope.log().masked_fill(own, 0).sum(-1) - log_q

    def inverse(self, z):
        return (z == z.max(-1, keepdim=True).values).long().argmax(-1)


class ArgmaxSequence(nn.Module):
    """For sequences too: sums over whatever is behind the batch of log_q."""

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        v, log_q = self.q(x)
        top = v.take_along_dim(x[..., None], -1)
        mask = torch.arange(v.shape[-1]) != x[..., None]
        z = torch.where(mask, top - F.softplus(top - v), v)
        return z, (F.logsigmoid(top - v) * mask).flatten(log_q.ndim).sum(-1) - log_q

    def inverse(self, z):
        return torch.argmax(z, -1)


# --- stochastic_layer ------------------------------------------------------------------------------------------------


class VAEPlain(nn.Module):
    """Plainly."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        q = self.encoder(x)
        z = q.rsample()
        contribution = self.decoder(z).log_prob(x) - q.log_prob(z)
        return z, contribution

    def inverse(self, z):
        return self.decoder(z).sample()


class VAEInWords(nn.Module):
    """A name for each term."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x):
        posterior = self.encoder(x)
        z = posterior.rsample()
        log_q = posterior.log_prob(z)
        likelihood = self.decoder(z)
        log_p = likelihood.log_prob(x)
        return z, log_p - log_q

    def inverse(self, z):
        likelihood = self.decoder(z)
        return likelihood.rsample()


class VAENegative(nn.Module):
    """Minus log q first."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        q = self.encoder(x)
        z = q.rsample()
        return z, -q.log_prob(z) + self.decoder(z).log_prob(x)

    def inverse(self, z):
        p = self.decoder(z)
        return p.sample()


class VAELists:
    """Not a module; a list for the result; sampling without gradients."""

    def __init__(self, encoder, decoder):
        self.ways = {"encode": encoder, "decode": decoder}

    def forward(self, x):
        q = self.ways["encode"](x)
        z = q.rsample((1,)).squeeze(0)
        return [z, torch.sub(self.ways["decode"](z).log_prob(x), q.log_prob(z))]

    @torch.no_grad()
    def inverse(self, z):
        return self.ways["decode"](z).sample((1,))[0]


class VAEByHand(nn.Module):
    """The log-densities of normal distributions, written out."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def log_normal(self, d, value):
        u = (value - d.mean) / d.stddev
        return (-0.5 * u * u - d.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def forward(self, x):
        q = self.encoder(x)
        z = q.rsample()
        return z, self.log_normal(self.decoder(z), x) - self.log_normal(q, z)

    def inverse(self, z):
        return self.decoder(z).sample()


class VAEAsked(nn.Module):
    """Asks whether the encoder can be reparameterised; the encoder is asked again for log q, with the same answer."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def draw(self, d):
        return d.rsample() if d.has_rsample else d.sample()

    def forward(self, x):
        z = self.draw(self.encoder(x))
        return z, torch.stack([self.decoder(z).log_prob(x), -self.encoder(x).log_prob(z)]).sum(0)

    def inverse(self, z):
        return self.draw(self.decoder(z))


class VAESingle(VAEPlain):
    """float32 throughout."""

    def forward(self, x):
        z, contribution = super().forward(x)
        return z.float(), contribution.float()

    def inverse(self, z):
        return super().inverse(z.double()).float()


RIGHT = {
    "modular_shift": [(shift_plain, unshift_plain), (shift_stepwise, unshift_stepwise), (shift_tensors, unshift_tensors),
                      (shift_table, unshift_table), (shift_scalars, unshift_scalars), (shift_one_hot, unshift_one_hot),
                      (shift_floats, unshift_floats)],
    "one_hot_argmax_st": [(f,) for f in (one_hot_plain, one_hot_scattered, one_hot_identity, one_hot_compared, one_hot_function,
                                         one_hot_loop, one_hot_replaced)],
    "round_st": [(f,) for f in (round_plain, round_exact_zero, round_stepwise, round_half_up, round_function, round_hook,
                                round_numpy, round_single)],
    "idf_coupling": [(c,) for c in (IntegerShift, IntegerSlices, IntegerFunction, IntegerModule, IntegerSum, IntegerCopied,
                                    IntegerSingle)],
    "uniform_dequantize": [(f,) for f in (uniform_plain, uniform_like, uniform_summed, uniform_distribution, uniform_single,
                                          uniform_numpy, uniform_between)],
    "variational_bound": [(f,) for f in (bound_plain, bound_named, bound_indexed, bound_rows, bound_stacked, bound_single, bound_mapped,
                                         bound_ratio)],
    "slice_layer": [(c,) for c in (SlicePlain, SliceHstack, SliceNarrow, SliceFilled, SliceAnyRank, SliceTransposed,
                                   SliceSingle)],
    "split_layer": [(c,) for c in (SplitPlain, SplitBySizes, SplitHstack, SplitByParts, SplitFilled, SplitAsked, SplitSingle)],
    "abs_layer": [(c,) for c in (AbsPlain, AbsSigns, AbsBernoulli, AbsCrossEntropy, AbsLoop, AbsSoftmax, AbsSingle)],
    "max_layer": [(c,) for c in (MaxPlain, MaxOneHot, MaxSubtracted, MaxWhere, MaxRemembered, MaxLoop, MaxTold, MaxSingle)],
    "sort_layer": [(c,) for c in (SortPlain, SortLogs, SortPermutations, SortMultinomial, SortByMatrices, SortShuffle,
                                  SortNumpy)],
    "argmax_layer": [(c,) for c in (ArgmaxPlain, ArgmaxWeighted, ArgmaxScattered, ArgmaxLoop, ArgmaxSoftplus,
                                    ArgmaxJacobian, ArgmaxSequence)],
    "stochastic_layer": [(c,) for c in (VAEPlain, VAEInWords, VAENegative, VAELists, VAEByHand, VAEAsked, VAESingle)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason.
CONFIRMED = {}
