"""Variational inference against a linear-Gaussian model, whose evidence and posterior are closed forms."""
import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from flowkit import (MADE, MAF, Affine, Autoregressive, Compose, Flow, FlowPosterior, Inverse, InvertibleLinear, Planar, Reverse, StandardNormal,
                     elbo, forward_kl, hybrid_loss, iwae_log_prob, reverse_kl, sample_at_temperature)

D = 2
W = torch.tensor([[1.0, -0.4], [0.3, 0.8], [0.0, 1.2]], dtype=torch.float64)     # x = W z + 0.5 noise, x in 3 dimensions
NOISE = 0.5
PRIOR = MultivariateNormal(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))
EVIDENCE = MultivariateNormal(torch.zeros(3, dtype=torch.float64), W @ W.T + NOISE ** 2 * torch.eye(3, dtype=torch.float64))


def decoder(z):
    return Independent(Normal(z @ W.T, NOISE), 1)


def posterior(x):
    precision = torch.eye(D, dtype=torch.float64) + W.T @ W / NOISE ** 2
    covariance = torch.linalg.inv(precision)
    return MultivariateNormal(x @ W @ covariance / NOISE ** 2, covariance)


def log_joint(x, z):
    return PRIOR.log_prob(z) + decoder(z).log_prob(x)


def data(n):
    torch.manual_seed(4)
    return EVIDENCE.sample((n,))


class Identity(Reverse):
    def forward(self, x, context=None):
        return x, x.new_zeros(x.shape[:-1])

    def inverse(self, z, context=None):
        return z


def some_flow():
    torch.manual_seed(1)
    flow = Compose([Planar(D), InvertibleLinear(D), Autoregressive(MADE(D, 2), Affine(bound=1))])
    return flow.double()


def test_the_exact_posterior_makes_every_bound_tight():
    x = data(5)
    torch.testing.assert_close(elbo(x, posterior, Identity(), decoder, PRIOR), EVIDENCE.log_prob(x))

    def q(x):
        z = posterior(x).rsample()
        return z, posterior(x).log_prob(z)

    for k in (1, 7):
        torch.testing.assert_close(iwae_log_prob(x, log_joint, q, k), EVIDENCE.log_prob(x))


def test_elbo_falls_short_by_the_kl_of_the_posterior():
    """With a Gaussian encoder and a linear flow, q(z | x) is Gaussian; the gap is KL(q || posterior). 5 standard errors: wrong once in a million seeds."""
    x = data(1).expand(20_000, -1)
    encoder = lambda x: Independent(Normal(0.3 * x[:, :D], 0.6), 1)  # noqa: E731
    torch.manual_seed(0)
    linear = InvertibleLinear(D).double()
    with torch.no_grad():
        linear.log_s.copy_(torch.tensor([-0.8, -0.4]))
    estimates = elbo(x, encoder, linear, decoder, PRIOR).detach()
    weight = linear.weight().detach()
    q = MultivariateNormal(0.3 * x[0, :D] @ weight.T, 0.36 * weight @ weight.T)
    want = EVIDENCE.log_prob(x[0]) - kl_divergence(q, posterior(x[0]))
    assert abs(estimates.mean() - want) < 5 * estimates.std() / math.sqrt(len(x))
    # exp of a one-sample ELBO is an unbiased estimate of the evidence itself.
    ratio = torch.exp(estimates - EVIDENCE.log_prob(x[0]))
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(x))


def q_wide(x):
    q = Independent(Normal(0.3 * x[:, :D], 1.0), 1)
    z = q.rsample()
    return z, q.log_prob(z)


def test_iwae_rises_with_k_to_the_evidence():
    """Means over 20,000 draws, against their standard errors: each comparison wrong once in a million seeds (5 errors)."""
    x, means, errors = torch.tensor([[0.5, -0.3, 0.4]], dtype=torch.float64).expand(20_000, -1), [], []
    torch.manual_seed(0)
    for k in (1, 8, 64):
        bound = iwae_log_prob(x, log_joint, q_wide, k)
        means.append(bound.mean().item())
        errors.append(bound.std().item() / math.sqrt(len(x)))
    assert means[0] + 5 * errors[0] < means[1] < means[2] - 5 * errors[2] and means[2] < EVIDENCE.log_prob(x[0]) + 5 * errors[2]
    assert EVIDENCE.log_prob(x[0]) - means[2] < 0.1


def test_iwae_is_the_log_of_the_mean_weight_and_stays_in_logs():
    x = data(3)
    torch.manual_seed(9)
    got = iwae_log_prob(x, log_joint, q_wide, 5)
    torch.manual_seed(9)
    z, log_q = q_wide(x.repeat(5, 1))
    weights = torch.exp(log_joint(x.repeat(5, 1), z) - log_q).reshape(5, 3)
    torch.testing.assert_close(got, weights.mean(0).log())
    far = iwae_log_prob(x, lambda x, z: log_joint(x, z) - 5000, q_wide, 5)
    assert torch.isfinite(far).all()


def test_reverse_kl_of_gaussians_and_its_gradient():
    """KL(N(m, s^2) || N(0, 1)) = (s^2 + m^2 - 1) / 2 - log s a dimension, and its gradient in m is m: through the samples."""
    linear = InvertibleLinear(1).double()
    with torch.no_grad():
        linear.log_s.fill_(-math.log(0.7))
    mean = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    flow = Flow(Independent(Normal(mean, torch.ones(1, dtype=torch.float64)), 1), linear)
    torch.manual_seed(0)
    value = reverse_kl(flow, lambda x: Normal(0, 1).log_prob(x).sum(-1), 100_000)
    m, s = 0.7 * 0.4, 0.7
    want = (s ** 2 + m ** 2 - 1) / 2 - math.log(s)
    assert abs(value - want) < 5e-3        # the standard error is 1e-3, so wrong once in a million seeds
    gradient, = torch.autograd.grad(value, mean)
    assert abs(gradient - 0.7 * m) < 0.012  # standard error 2.3e-3


def test_forward_kl_is_the_mean_negative_log_likelihood():
    flow, x = Flow(StandardNormal(2).double(), some_flow()), torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(forward_kl(flow, x), -flow.log_prob(x).mean())


def test_flow_posterior_against_the_density_of_its_samples():
    """log_q is the density of z by the change of variables the other way, through the inverse and autograd's Jacobian."""
    torch.manual_seed(0)
    flow = Compose([MAF(MADE(D, 2, context=3)), Reverse(), Autoregressive(MADE(D, 2, context=3), Affine(bound=1))]).double()
    net = torch.nn.Linear(3, 2 * D).double()
    encoder = lambda x: (*net(x).chunk(2, -1), x)  # noqa: E731
    x = data(4)
    z, log_q = FlowPosterior(encoder, flow).sample(x)
    mu, log_sigma, context = encoder(x)
    z0 = flow.inverse(z, context)
    base = Normal(mu, log_sigma.exp()).log_prob(z0).sum(-1)
    for i in range(4):
        inverse_jacobian = torch.autograd.functional.jacobian(lambda r: flow.inverse(r[None], context[i:i + 1])[0], z[i].detach())
        torch.testing.assert_close(log_q[i], base[i] + torch.linalg.slogdet(inverse_jacobian)[1], rtol=1e-7, atol=1e-7)
    (log_q.sum() + z.sum()).backward()
    assert all(p.grad is not None for p in [*flow.parameters(), *net.parameters()])


def test_flow_posterior_integrates_to_one():
    flow = some_flow()
    encoder = lambda x: (torch.zeros(len(x), D, dtype=torch.float64), torch.full((len(x), D), -0.3, dtype=torch.float64), None)  # noqa: E731
    torch.manual_seed(0)
    z, log_q = FlowPosterior(encoder, flow).sample(torch.zeros(5, 1))
    # The density at any z by the same flow turned round, on a grid.
    q = Flow(Independent(Normal(torch.zeros(D, dtype=torch.float64), math.exp(-0.3)), 1), Inverse(flow))
    torch.testing.assert_close(q.log_prob(z), log_q)
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    with torch.no_grad():
        total = q.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 1e-3


def test_one_pass_a_draw():
    net, calls = MADE(D, 2), []
    net.register_forward_hook(lambda *_: calls.append(1))
    FlowPosterior(lambda x: (torch.zeros(5, D), torch.zeros(5, D), None), MAF(net)).sample(torch.zeros(5, 1))
    assert len(calls) == 1


def test_temperature_scales_the_latents():
    flow = Flow(StandardNormal(2), InvertibleLinear(2))
    torch.manual_seed(0)
    x = flow.sample(5)
    torch.manual_seed(0)
    torch.testing.assert_close(sample_at_temperature(flow, 5, 0.5), 0.5 * x)
    with pytest.raises(ValueError, match="^T must be positive, got 0$"):
        sample_at_temperature(flow, 5, 0)


def test_hybrid_loss_and_its_limits():
    log_prob, logits, labels = torch.tensor([-3.0, -5.0]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    classifier = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    for lam in (0, 0.1, 1):
        torch.testing.assert_close(hybrid_loss(log_prob, logits, labels, lam), torch.tensor(classifier + 4 * lam))


@pytest.mark.parametrize("make, message", [
    (lambda: elbo(data(3), lambda x: Normal(x[:, :D], 1.0), Identity(), decoder, PRIOR), r"^the encoder's log_prob must be one number for each point, shape \(3,\), got \(3, 2\)"),
    (lambda: elbo(data(3), posterior, Identity(), lambda z: Normal(z @ W.T, 1.0), PRIOR), "^the decoder's log_prob must be one number"),
    (lambda: iwae_log_prob(data(3), log_joint, q_wide, 0), "^k must be at least 1, got 0$"),
    (lambda: iwae_log_prob(data(3), lambda x, z: z, q_wide, 2), r"^log_joint\(x, z\) must be one number for each point"),
    (lambda: reverse_kl(Flow(StandardNormal(2), Reverse()), lambda x: x, 3), r"^log_target\(x\) must be one number for each point, shape \(3,\), got \(3, 2\)"),
    (lambda: hybrid_loss(torch.zeros(3, 1), torch.zeros(3, 2), torch.zeros(3).long(), 1.0), r"^log_prob must have the shape of labels, \(3,\), got \(3, 1\)$"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
