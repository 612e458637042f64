"""Two uses of a flow q: fitted to data (forward KL, mode-covering) or to a density that can only be evaluated (reverse
KL, mode-seeking).

    KL(p || q) = -entropy(p) - E_p[log q(x)]           KL(q || p) = E_q[log q(x) - log p(x)]

The second is variational inference: q stands for the posterior, and log p(x) = ELBO + KL(q(z | x) || p(z | x)). All in nats.

Flow posteriors: Rezende & Mohammed 2015, "Variational Inference with Normalizing Flows", section 4.2; IAF posterior:
Kingma et al. 2016, section 4. Importance-weighted bound: Burda et al. 2016, "Importance Weighted Autoencoders", section
3. Temperature: Kingma & Dhariwal 2018, "Glow", section 6; Chen et al. 2019, "Residual Flows", section 5.1; hybrid loss:
Chen et al. 2019, section 5.3; Nalisnick et al. 2019.
"""
import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .core import check_finite, given


def reverse_kl(flow, log_target, n):
    """KL(q || p) by `n` samples of the flow q, a scalar in nats: mean of log q(x) - log p(x), differentiable through the
    samples.

    `log_target(x) -> (n,)`: log p, or log p + c if it is not normalised; then the result is KL - c.
    """
    x, log_q = flow.sample_and_log_prob(n)
    log_p = log_target(x)
    _check_batch("log_target(x)", log_p, log_q.shape)
    return (log_q - log_p).mean()


def forward_kl(flow, x):
    """KL(p || q) up to the entropy of the data, a scalar in nats: the mean of -log q(x) over points x ~ p."""
    return -flow.log_prob(x).mean()


def _check_batch(name, value, batch):
    if value.shape != batch:
        raise ValueError(f"{name} must be one number for each point, shape {tuple(batch)}, got {tuple(value.shape)}; "
                         "torch.distributions.Independent(p, 1) sums over the last dimension")


def elbo(x, encoder, flow, decoder, prior):
    """One-sample estimate of the evidence lower bound, (B,), in nats: log p(x | z) + log p(z) - log q(z | x).

    `encoder(x)`: the distribution of z0, with rsample; z, ldj = flow.forward(z0), so that log q(z | x) = log q(z0 | x) -
    ldj; `decoder(z)`: the distribution of x; `prior`: that of z. All torch.distributions objects whose event is a whole
    point. Rezende & Mohammed 2015, equation 15.
    """
    q = encoder(x)
    z0 = q.rsample()
    z, ldj = flow.forward(z0)
    terms = {"decoder": decoder(z).log_prob(x), "prior": prior.log_prob(z), "encoder": q.log_prob(z0)}
    for name, term in terms.items():
        _check_batch(f"the {name}'s log_prob", term, ldj.shape)
    return terms["decoder"] + terms["prior"] - terms["encoder"] + ldj


def iwae_log_prob(x, log_joint, q, k):
    """Importance-weighted bound log (1/k) sum_i p(x, z_i) / q(z_i | x), z_i ~ q, (B,), in nats.

    `z, log_q = q(x)`; `log_joint(x, z) -> (B,)`. It rises with k in the mean, to log p(x); k = 1 is the ELBO. All k draws
    are made at once, from x repeated k times. The mean over the draws is taken in logs.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    many = x.repeat(k, *(1,) * (x.ndim - 1))
    z, log_q = q(many)
    log_p = log_joint(many, z)
    _check_batch("q's log_q", log_q, many.shape[:1])
    _check_batch("log_joint(x, z)", log_p, many.shape[:1])
    return torch.logsumexp((log_p - log_q).reshape(k, -1), 0) - math.log(k)


class FlowPosterior(nn.Module):
    """q(z | x) as a Gaussian seen through a flow: z0 = mu + sigma eps, z, ldj = flow.forward(z0, context), log q = log
    N(z0) - ldj.

    `encoder(x) -> (mu, log_sigma, context)`, the first two (B, D); a context of None is not handed on. `flow`: a
    Transform whose forward is cheap and, contrary to data flows, goes from noise to z: MAF(net) is then the IAF
    posterior, one pass a draw. Kingma et al. 2016, algorithm 1.
    """

    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def sample(self, x):
        """One z (B, D) for each x and its log q(z | x) (B,), in nats; both differentiable."""
        mu, log_sigma, context = self.encoder(x)
        noise = torch.randn_like(mu)
        z, ldj = self.flow.forward(mu + torch.exp(log_sigma) * noise, *given(context))
        log_q0 = -(0.5 * noise ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)).sum(-1)
        check_finite("FlowPosterior", x, z=z, ldj=ldj)
        return z, log_q0 - ldj

    def forward(self, x):
        return self.sample(x)


@torch.no_grad()
def sample_at_temperature(flow, n, T):
    """`n` samples from latents z = T * base sample: the latents' entropy falls by D log(1/T), the data's need not fall with it.

    T > 0; 1 samples the flow itself. For a base that is centred at zero.
    """
    if not T > 0:
        raise ValueError(f"T must be positive, got {T}")
    return flow.transform.inverse(T * flow.base.sample((n,)))


def hybrid_loss(log_prob, logits, labels, lam):
    """Cross-entropy of the labels given x minus lam * log p(x), both means over the batch, a scalar in nats.

    log_prob (B,), logits (B, classes), labels (B,) of integers. lam = 0 is a classifier, lam = 1 the joint model; lam =
    1/D weighs the D dimensions of x as one label.
    """
    if log_prob.shape != labels.shape:
        raise ValueError(f"log_prob must have the shape of labels, {tuple(labels.shape)}, got {tuple(log_prob.shape)}")
    return cross_entropy(logits, labels) - lam * log_prob.mean()
