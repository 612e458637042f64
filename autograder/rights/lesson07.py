"""Differently written right answers of lesson 07: none of them may lose a point."""
import math

import torch
from torch import distributions, nn
from torch.nn import functional as F

# --- reverse_kl ------------------------------------------------------------------------------------------------------


def reverse_plain(flow, log_target, n):
    x = flow.sample(n)
    log_q = flow.log_prob(x)
    log_p = log_target(x)
    return (log_q - log_p).mean()


def reverse_in_one_pass(flow, log_target, n):
    x, log_q = flow.sample_and_log_prob(n)
    return log_q.mean() - log_target(x).mean()


def reverse_by_base(flow, log_target, n):
    """From base to data, and log q from the latents."""
    z = flow.base.sample((n,))
    x = flow.transform.inverse(z)
    ldj = flow.transform.forward(x)[1]
    log_q = flow.base.log_prob(z) + ldj
    return torch.sum(log_q - log_target(x)) / n


def reverse_both_at_once(flow, log_target, n):
    """The transform's own pass back, whose ldj is still from data to latent."""
    z = flow.base.rsample(torch.Size([n]))
    x, ldj = flow.transform.inverse_and_ldj(z)
    return torch.mean(flow.base.log_prob(z) + ldj - log_target(x))


def reverse_one_by_one(flow, log_target, n):
    total = 0.0
    for _ in range(n):
        x = flow.sample(1)
        total = total + (flow.log_prob(x) - log_target(x))[0]
    return total / n


def reverse_negative(flow, log_target, n):
    """Minus a bound."""
    x, log_q = flow.sample_and_log_prob(n)
    bound = log_target(x) - log_q
    return -bound.mean(0)


def reverse_stacked(flow, log_target, n):
    x = flow.sample(n)
    return torch.stack([flow.log_prob(x), -log_target(x)]).sum(0).mean()


def reverse_double(flow, log_target, n):
    """Differences in float64, returned in the flow's precision."""
    x, log_q = flow.sample_and_log_prob(n)
    return (log_q.double() - log_target(x).double()).mean().to(x.dtype)


def reverse_row_by_row(flow, log_target, n):
    """log_target is asked about one point at a time."""
    x = flow.sample(n)
    log_p = torch.cat([log_target(row[None]) for row in x])
    return torch.dot(flow.log_prob(x) - log_p, torch.full_like(log_p, 1 / n))


# --- forward_kl ------------------------------------------------------------------------------------------------------


def forward_plain(flow, x):
    log_q = flow.log_prob(x)
    loss = -log_q.mean()
    return loss


def forward_function(flow, x):
    return torch.mean(-flow.log_prob(x), dim=0)


def forward_divided(flow, x):
    return -torch.sum(flow.log_prob(x)) / x.shape[0]


def forward_by_base(flow, x):
    z, ldj = flow.transform.forward(x)
    return -(flow.base.log_prob(z) + ldj).mean()


def forward_row_by_row(flow, x):
    losses = [-flow.log_prob(x[i:i + 1]) for i in range(len(x))]
    return torch.cat(losses).mean()


def forward_double(flow, x):
    return flow.log_prob(x).neg().double().mean().to(x.dtype)


# --- elbo ------------------------------------------------------------------------------------------------------------


def elbo_plain(x, encoder, flow, decoder, prior):
    q = encoder(x)
    z0 = q.rsample()
    z, ldj = flow.forward(z0)
    log_joint = decoder(z).log_prob(x) + prior.log_prob(z)
    log_q = q.log_prob(z0) - ldj
    return log_joint - log_q


def elbo_in_terms(x, encoder, flow, decoder, prior):
    q0 = encoder(x)
    z0 = q0.rsample()
    z, ldj = flow(z0)
    reconstruction = decoder(z).log_prob(x)
    regulariser = q0.log_prob(z0) - prior.log_prob(z) - ldj
    return reconstruction - regulariser


def elbo_summed(x, encoder, flow, decoder, prior):
    q = encoder(x)
    z0 = q.rsample()
    z, ldj = flow.forward(z0)
    return torch.stack([decoder(z).log_prob(x), prior.log_prob(z), -q.log_prob(z0), ldj]).sum(0)


def elbo_one_sample(x, encoder, flow, decoder, prior):
    """One draw along a dimension of its own, and the mean over it."""
    q = encoder(x)
    z0 = q.rsample((1,))
    z, ldj = flow.forward(z0)
    bound = decoder(z).log_prob(x) + prior.log_prob(z) - q.log_prob(z0) + ldj
    return bound.mean(0)


def elbo_negative(x, encoder, flow, decoder, prior):
    """As a free energy, with its sign turned at the end."""
    q = encoder(x)
    z0 = q.rsample()
    z, ldj = flow.forward(z0)
    energy = q.log_prob(z0) - ldj
    energy = energy - prior.log_prob(z)
    energy = energy - decoder(z).log_prob(x)
    return -energy


def elbo_asked_again(x, encoder, flow, decoder, prior):
    """The encoder is asked again for log q, with the same answer."""
    z0 = encoder(x).rsample()
    z, ldj = flow.forward(z0)
    log_p = prior.log_prob(z) + decoder(z).log_prob(x)
    return torch.add(log_p - encoder(x).log_prob(z0), ldj)


def elbo_row_by_row(x, encoder, flow, decoder, prior):
    """The flow and the densities for one row at a time."""
    q = encoder(x)
    z0 = q.rsample()
    out = []
    log_q = q.log_prob(z0)
    for i in range(len(x)):
        z, ldj = flow.forward(z0[i:i + 1])
        out.append(decoder(z).log_prob(x[i:i + 1]) + prior.log_prob(z) - log_q[i] + ldj)
    return torch.cat(out)


# --- iwae_log_prob ---------------------------------------------------------------------------------------------------


def iwae_loop(x, log_joint, q, k):
    """k calls of q."""
    log_w = []
    for _ in range(k):
        z, log_q = q(x)
        log_w.append(log_joint(x, z) - log_q)
    return torch.logsumexp(torch.stack(log_w), 0) - math.log(k)


def iwae_interleaved(x, log_joint, q, k):
    """Each row of x k times, one after the other."""
    many = x.repeat_interleave(k, 0)
    z, log_q = q(many)
    log_w = (log_joint(many, z) - log_q).reshape(len(x), k)
    return log_w.logsumexp(1) - math.log(k)


def iwae_repeated(x, log_joint, q, k):
    """The whole batch k times."""
    many = x.repeat(k, *(1,) * (x.dim() - 1))
    z, log_q = q(many)
    log_p = log_joint(many, z)
    log_w = (log_p - log_q).view(k, -1)
    return torch.logsumexp(log_w, dim=0) - torch.log(torch.tensor(float(k)))


def iwae_expanded(x, log_joint, q, k):
    many = x.unsqueeze(0).expand(k, *x.shape).flatten(0, 1)
    z, log_q = q(many)
    log_w = (log_joint(many, z) - log_q).reshape(k, len(x))
    highest = log_w.max(0).values
    return highest + (log_w - highest).exp().mean(0).log()


def iwae_three_dimensions(x, log_joint, q, k):
    """q and log_joint on (k, B, D)."""
    many = x.expand(k, *x.shape)
    z, log_q = q(many)
    return torch.logsumexp(log_joint(many, z) - log_q - math.log(k), 0)


def iwae_columns(x, log_joint, q, k):
    """A draw for each column of the weights' matrix (B, k)."""
    log_w = torch.cat([(lambda z, log_q: (log_joint(x, z) - log_q)[:, None])(*q(x)) for _ in range(k)], 1)
    return torch.logsumexp(log_w, -1) - math.log(k)


def iwae_running(x, log_joint, q, k):
    """The sum built up with logaddexp."""
    z, log_q = q(x)
    total = log_joint(x, z) - log_q
    for _ in range(k - 1):
        z, log_q = q(x)
        total = torch.logaddexp(total, log_joint(x, z) - log_q)
    return total - math.log(k)


def iwae_in_parts(x, log_joint, q, k):
    """A row of x at a time."""
    out = []
    for row in x:
        many = row.expand(k, *row.shape)
        z, log_q = q(many)
        out.append(torch.logsumexp(log_joint(many, z) - log_q, 0) - math.log(k))
    return torch.stack(out)


def iwae_chunks(x, log_joint, q, k):
    many = torch.cat([x] * k)
    z, log_q = q(many)
    log_w = torch.stack((log_joint(many, z) - log_q).chunk(k))
    return log_w.logsumexp(0) - math.log(k)


# --- iaf_posterior ---------------------------------------------------------------------------------------------------


class PosteriorPlain(nn.Module):
    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder = encoder
        self.flow = flow

    def sample(self, x):
        mu, log_sigma, context = self.encoder(x)
        eps = torch.randn_like(mu)
        z0 = mu + torch.exp(log_sigma) * eps
        log_q0 = (-0.5 * eps**2 - log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)
        z, ldj = self.flow.forward(z0, context)
        return z, log_q0 - ldj


class PosteriorDistribution(nn.Module):
    """A torch distribution for z0."""

    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def sample(self, x):
        mu, log_sigma, context = self.encoder(x)
        q0 = distributions.Normal(mu, log_sigma.exp())
        z0 = q0.rsample()
        z, ldj = self.flow(z0, context)
        return z, q0.log_prob(z0).sum(-1) - ldj


class PosteriorIndependent:
    """Not a module; the event in the last dimension."""

    def __init__(self, encoder, flow):
        self.parts = {"encoder": encoder, "flow": flow}

    def sample(self, x):
        mu, log_sigma, context = self.parts["encoder"](x)
        base = distributions.Independent(distributions.Normal(mu, torch.exp(log_sigma)), 1)
        z0 = base.rsample()
        z, ldj = self.parts["flow"].forward(z0, context=context)
        return z, base.log_prob(z0) - ldj


class PosteriorOfNoise(nn.Module):
    """The density of the noise, and all that stretches it since: the scale, and the flow."""

    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def sample(self, x):
        mu, log_sigma, context = self.encoder(x)
        eps = torch.randn(mu.shape, dtype=mu.dtype)
        z, ldj = self.flow.forward(eps * log_sigma.exp() + mu, context)
        log_noise = -0.5 * (eps.pow(2).sum(1) + eps.shape[1] * math.log(2 * math.pi))
        stretched = log_sigma.sum(1) + ldj
        return z, log_noise - stretched


class PosteriorMultivariate(nn.Module):
    """A normal distribution with a diagonal matrix; a list for the result."""

    def __init__(self, encoder, flow):
        super().__init__()
        self.nets = nn.ModuleDict({"encoder": encoder, "flow": flow})

    def sample(self, x):
        mu, log_sigma, context = self.nets["encoder"](x)
        base = distributions.MultivariateNormal(mu, scale_tril=torch.diag_embed(log_sigma.exp()))
        z0 = base.rsample((1,))[0]
        z, ldj = self.nets["flow"](z0, context)
        return [z, torch.sub(base.log_prob(z0), ldj)]


class PosteriorInMethods(nn.Module):
    """Noise that is subtracted, for it is symmetric; standardised again for the density; in methods of their own."""

    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def start(self, mu, log_sigma):
        return torch.addcmul(mu, log_sigma.exp(), torch.empty_like(mu).normal_(), value=-1)

    def log_normal(self, z0, mu, log_sigma):
        eps = (z0 - mu) / log_sigma.exp()
        return -F.gaussian_nll_loss(eps, torch.zeros_like(eps), torch.ones_like(eps), full=True, reduction="none").sum(-1) - log_sigma.sum(-1)

    def sample(self, x):
        mu, log_sigma, context = self.encoder(x)
        z0 = self.start(mu, log_sigma)
        z, ldj = self.flow.forward(z0, context)
        return z, self.log_normal(z0, mu, log_sigma) - ldj

    def forward(self, x):
        return self.sample(x)


RIGHT = {
    "reverse_kl": [(f,) for f in (reverse_plain, reverse_in_one_pass, reverse_by_base, reverse_both_at_once, reverse_one_by_one, reverse_negative,
                                  reverse_stacked, reverse_double, reverse_row_by_row)],
    "forward_kl": [(f,) for f in (forward_plain, forward_by_base, forward_function, forward_divided, forward_row_by_row, forward_double)],
    "elbo": [(f,) for f in (elbo_plain, elbo_in_terms, elbo_summed, elbo_one_sample, elbo_negative, elbo_asked_again, elbo_row_by_row)],
    "iwae_log_prob": [(f,) for f in (iwae_loop, iwae_interleaved, iwae_repeated, iwae_expanded, iwae_three_dimensions, iwae_columns, iwae_running,
                                     iwae_in_parts, iwae_chunks)],
    "iaf_posterior": [(c,) for c in (PosteriorPlain, PosteriorDistribution, PosteriorOfNoise, PosteriorIndependent, PosteriorMultivariate,
                                     PosteriorInMethods)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason.
CONFIRMED = {
    "iaf_posterior": {
        "sample: a sign turned, mu + log_sigma.exp() * eps -> mu - log_sigma.exp() * eps": "the noise is symmetric: -eps is as good a draw as eps, of the same density",
    },
}
