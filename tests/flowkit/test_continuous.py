"""Continuous flows: traces, closed-form solutions, zuko's CNF, the diffusion of a mixture, gradients, failed solves.

The laws of layer_laws.py run on a fixed-step CNF in test_layer_laws.py, and on the other settings here.
"""
import itertools
import math
import subprocess
import sys
import weakref

import pytest
import torch
import zuko
from layer_laws import (both_directions_agree, build, density_integrates_to_one, gradients, input_is_untouched,
                        ldj_is_autograds, points, round_trip, shape_and_dtype)
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from flowkit import Compose, Flow, Inverse, Reverse, StandardNormal
from flowkit.continuous import ADAPTIVE, CNF, FFJORD, FIXED, ProbabilityFlow, VectorField, exact_trace, hutchinson_trace

TIGHT = dict(rtol=1e-10, atol=1e-11)


def field(dim, hidden=(16,), seed=1, **more):
    """A field with weights of order one."""
    torch.manual_seed(seed)
    net = VectorField(dim, hidden, **more).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1] if p.ndim > 1 else 1))
    return net


def at(net, t=0.3):
    return lambda x: net(t, x)


def true_trace(f, x):
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([torch.autograd.functional.jacobian(f, row).trace() for row in rows]).reshape(x.shape[:-1])


def signs(dim):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), dtype=torch.float64)


class Counted(torch.autograd.Function):
    """The identity, which counts its backward passes (a batched one as one)."""
    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


# --- traces

@pytest.mark.parametrize("shape", [(6, 2), (5,), (2, 3, 5), (4000, 5), (0, 5)])
@pytest.mark.parametrize("grad", [True, False])
def test_exact_trace_is_the_jacobians(shape, grad):
    net, x = field(shape[-1]), torch.randn(shape, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        got = exact_trace(at(net), x)
    assert got.requires_grad == grad and got.shape == shape[:-1]
    if len(x) < 10:
        want = true_trace(at(net), x) if x.numel() else got
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    else:
        with torch.no_grad():   # the large batch goes column by column, ten rows of it go all at once
            torch.testing.assert_close(got[:10], exact_trace(at(net), x[:10]), rtol=1e-12, atol=1e-12)


def test_the_traces_of_a_linear_map_and_of_a_constant():
    a, x, eps = torch.randn(4, 4), torch.randn(3, 4), torch.randn(3, 4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(exact_trace(lambda x: x @ a.T, x), a.trace().expand(3))
            torch.testing.assert_close(hutchinson_trace(lambda x: x @ a.T, x, eps), ((eps @ a) * eps).sum(-1))
            for constant in (torch.ones(4), torch.ones(4, requires_grad=True)):
                assert exact_trace(lambda x: constant.expand_as(x), x).tolist() == [0, 0, 0]
                assert hutchinson_trace(lambda x: constant.expand_as(x), x, eps).tolist() == [0, 0, 0]
            # A coordinate that does not depend on x, among others that do.
            half = lambda x: torch.stack([torch.ones(3), x[:, 1] ** 2, x[:, 0], x[:, 3]], -1)
            torch.testing.assert_close(exact_trace(half, x), 2 * x[:, 1] + 1)


def test_the_trace_is_differentiable_in_the_point_and_in_the_weights():
    net, x = field(3), points(3).requires_grad_()
    eps = torch.randn(6, 3, dtype=torch.float64)
    for trace in (lambda x: exact_trace(at(net), x), lambda x: hutchinson_trace(at(net), x, eps)):
        assert torch.autograd.gradcheck(trace, x)
        weight = net.net[0].weight
        direction, step = torch.randn_like(weight), 1e-6
        got = (torch.autograd.grad(trace(x).prod(), weight)[0] * direction).sum()
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                weight += sign * step * direction
                values.append(trace(x).prod())
        torch.testing.assert_close(got, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_nothing_keeps_a_graph_where_gradients_are_off():
    net, x, eps = field(2), points(2).requires_grad_(), points(2, seed=5).requires_grad_()
    with torch.no_grad():
        results = exact_trace(at(net), x), hutchinson_trace(at(net), x, eps), *CNF(net)(x), CNF(net).inverse(x)
    assert not any(r.requires_grad for r in results)


def test_only_the_argument_is_differentiated():
    x = torch.randn(3, 2, requires_grad=True)
    torch.testing.assert_close(exact_trace(lambda y: y * x, x), x.sum(-1))
    torch.testing.assert_close(exact_trace(lambda y: y * x, 2 * x), x.sum(-1))


@pytest.mark.parametrize("dim", [2, 7])
def test_hutchinson_is_one_pass_and_the_exact_trace_dim_passes(dim):
    x = torch.randn(3, dim)
    for trace, passes in ((lambda f: hutchinson_trace(f, x, torch.randn(3, dim)), 1), (lambda f: exact_trace(f, x), dim)):
        Counted.passes = evaluations = 0

        def f(x):
            nonlocal evaluations
            evaluations += 1
            return Counted.apply(x.sin())

        trace(f)
        assert (Counted.passes, evaluations) == (passes, 1)


def test_hutchinson_is_unbiased_by_enumeration():
    net, x = field(4), points(4)[:1].expand(16, 4)
    estimates = hutchinson_trace(at(net), x, signs(4))
    torch.testing.assert_close(estimates.mean(), exact_trace(at(net), x[:1])[0], rtol=1e-12, atol=1e-12)
    assert estimates.std() > 0.1


def test_hutchinson_with_gaussian_noise_is_unbiased():
    """A z-test on 100,000 draws; it fails for a right estimator and a fresh seed once in 15,800 runs (|z| > 4)."""
    net, x = field(4), points(4)[:1].expand(100_000, 4)
    with torch.no_grad():
        estimates = hutchinson_trace(at(net), x, torch.randn(x.shape, dtype=x.dtype))
        error = estimates.mean() - exact_trace(at(net), x[:1])[0]
    assert error.abs() < 4 * estimates.std() / math.sqrt(len(x)) and estimates.std() < 10


# --- closed forms

def test_a_linear_field_is_the_matrix_exponential():
    a = torch.randn(3, 3, dtype=torch.float64)
    layer, x = CNF(lambda t, x: x @ a.T, t0=-0.5, t1=0.8, **TIGHT), points(3)
    z, ldj = layer(x)
    torch.testing.assert_close(z, x @ torch.linalg.matrix_exp(1.3 * a).T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ldj, (1.3 * a.trace()).expand(6), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.inverse(z), x, rtol=1e-8, atol=1e-8)


def moving(t, x):
    """Points are drawn apart at rate a(t) about a centre that moves at constant speed."""
    speed, k = x.new_tensor([1.0, -2.0]), x.new_tensor([1.0, 3.0])
    return torch.cos(k * t) * (x - speed * t) + speed


def moving_solution(x, t0, t1):
    speed, k = x.new_tensor([1.0, -2.0]), x.new_tensor([1.0, 3.0])
    log_scale = (torch.sin(k * t1) - torch.sin(k * t0)) / k
    return speed * t1 + (x - speed * t0) * torch.exp(log_scale), log_scale.sum().expand(len(x))


@pytest.mark.parametrize("solver", ADAPTIVE + FIXED)
def test_a_time_dependent_affine_field_with_every_solver(solver):
    order = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}.get(solver)
    rough = solver in ("adaptive_heun", "fehlberg2", "bosh3")
    more = dict(rtol=1e-5, atol=1e-5) if rough else TIGHT
    layer = CNF(moving, 0.2, 1.5, solver=solver, steps=order and 100, max_steps=5000, **more)
    x = points(2)
    tolerance = {1: 0.1, 2: 1e-3, 3: 1e-5, 4: 1e-7}.get(order, 5e-3 if rough else 1e-8)
    for got, want in zip(layer(x), moving_solution(x, 0.2, 1.5)):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    for got, want in zip(layer.inverse_and_ldj(x), (moving_solution(x, 1.5, 0.2)[0], moving_solution(x, 0.2, 1.5)[1])):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_time_may_run_backwards():
    """From t0 = 1 to t1 = 0, the flow is the inverse of the one from 0 to 1."""
    net, x = field(2), points(2)
    there, back = CNF(net, **TIGHT), Inverse(CNF(net, t0=1.0, t1=0.0, **TIGHT))
    for a, b in zip(there(x), back(x)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def zuko_log_prob(net, x, exact=True):
    transform = zuko.transforms.FreeFormJacobianTransform(net, 0.0, 1.0, net.parameters(), atol=1e-10, rtol=1e-9, exact=exact)
    z, ldj = transform.call_and_ladj(x)
    return StandardNormal(x.shape[-1]).double().log_prob(z) + ldj


@pytest.mark.parametrize("dim", [2, 5])
def test_zukos_free_form_flow_gives_the_same_density_and_gradient(dim):
    net, x = field(dim), points(dim).requires_grad_()
    flow = Flow(StandardNormal(dim).double(), CNF(net, **TIGHT))
    got, want = flow.log_prob(x), zuko_log_prob(net, x)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    sample_weight = torch.arange(1.0, 7).double()
    for a, b in zip(*(torch.autograd.grad((sample_weight * v).sum(), [x, *net.parameters()]) for v in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- the probability flow

class Diffused:
    """A mixture of two Gaussians under the VP SDE: at every t a mixture again, so density and score are closed forms."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[1.5, -0.5], [-1.0, 0.7]], dtype=torch.float64)
    stds = torch.tensor([[0.4, 0.6], [0.5, 0.3]], dtype=torch.float64)

    def at(self, t):
        t = torch.as_tensor(t, dtype=torch.float64)
        kept = torch.exp(-(0.1 * t + 19.9 * t ** 2 / 2))   # exp(-integral of beta), the variance that is left of the data's
        std = (kept * self.stds ** 2 + 1 - kept).sqrt()
        return MixtureSameFamily(Categorical(self.weights), Independent(Normal(kept.sqrt() * self.means, std), 1))

    def score(self, t, x):
        mixture = self.at(t)
        parts = mixture.component_distribution
        share = torch.softmax(mixture.mixture_distribution.logits + parts.log_prob(x[..., None, :]), -1)
        pull = (parts.base_dist.loc - x[..., None, :]) / parts.base_dist.scale ** 2
        return (share[..., None] * pull).sum(-2)


def test_the_probability_flow_recovers_the_data_density():
    """With the exact score, and the exact marginal at t = 1 as base, the flow's density at t = 0 is the mixture's."""
    truth = Diffused()
    layer = CNF(ProbabilityFlow(truth.score), rtol=1e-8, atol=1e-9)
    x = truth.at(0.0).sample((20,))
    with torch.no_grad():
        got = Flow(truth.at(1.0), layer).log_prob(x)
        z, ldj = layer(x)
        torch.testing.assert_close(got, truth.at(0.0).log_prob(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-5)
        # The check is not blind: neither to the contribution, nor to the sign or factor of the field.
        assert (got + ldj - truth.at(0.0).log_prob(x)).abs().max() > 1
        for wrong in (lambda t, x: -truth.score(t, x), lambda t, x: 2 * truth.score(t, x)):
            wrong = Flow(truth.at(1.0), CNF(ProbabilityFlow(wrong), rtol=1e-4, atol=1e-4)).log_prob(x)
            assert (wrong - truth.at(0.0).log_prob(x)).abs().max() > 0.1


def test_the_probability_flow_at_one_point():
    t, x = torch.tensor(0.25), torch.randn(3, 2)
    got = ProbabilityFlow(lambda t, x: t * x)(t, x)
    torch.testing.assert_close(got, -(0.1 + 19.9 * 0.25) / 2 * 1.25 * x)
    # The score of N(0, I), which the SDE leaves as it is, moves nothing.
    assert ProbabilityFlow(lambda t, x: -x)(t, x).abs().max() == 0


def test_the_perturbation_kernel_solves_the_sde():
    """d scale/dt = -beta/2 scale and d std^2/dt = beta (1 - std^2), from 1 and 0."""
    flow, t = ProbabilityFlow(lambda t, x: x), torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    scale, std = flow.perturbation_kernel(t)
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(torch.autograd.grad(scale, t, retain_graph=True)[0], -beta / 2 * scale)
    torch.testing.assert_close(torch.autograd.grad(std ** 2, t)[0], beta * (1 - std ** 2))
    assert [float(v) for v in flow.perturbation_kernel(0.0)] == [1, 0]


# --- laws

SETTINGS = {
    "dopri8": lambda dim: CNF(VectorField(dim, (8,)), t1=0.5, solver="dopri8", **TIGHT),
    "adjoint": lambda dim: CNF(VectorField(dim, (8,)), t1=0.5, solver="rk4", steps=20, adjoint=True),
}


@pytest.mark.parametrize("law", [round_trip, ldj_is_autograds, both_directions_agree, shape_and_dtype, input_is_untouched,
                                 gradients], ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", SETTINGS)
def test_law(name, law, monkeypatch):
    monkeypatch.setitem(build.__globals__["LAYERS"], name, SETTINGS[name])
    law(build(name, 2), points(2))


def test_density_integrates_to_one(monkeypatch):
    monkeypatch.setitem(build.__globals__["LAYERS"], "cnf_default", lambda dim: CNF(VectorField(dim, (8,))))
    density_integrates_to_one(build("cnf_default", 2), points(2))


@pytest.mark.parametrize("layer", [FFJORD(field(3), solver="dopri8"),
                                   CNF(field(3), trace="hutchinson", solver="rk4", steps=40)], ids=["ffjord", "rk4"])
def test_laws_of_an_estimate(layer):
    """What the laws ask of z, of shapes and of inputs holds with Hutchinson's trace too."""
    layer.rtol, layer.atol = 1e-10, 1e-11
    for law in (round_trip, shape_and_dtype, input_is_untouched):
        law(layer, points(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ffjord_keeps_the_dtype(dtype):
    layer, x = FFJORD(field(3)).to(dtype), points(3, dtype)
    z, ldj = layer(x)
    assert z.dtype == ldj.dtype == layer.inverse(z).dtype == dtype
    torch.testing.assert_close(layer.inverse(z), x, rtol=1e-3, atol=1e-3)


# --- solvers

def test_rk4_is_of_fourth_order_in_point_and_density():
    x = points(2)
    errors = []
    for steps in (8, 16, 32):
        layer = CNF(moving, 0.2, 1.5, solver="rk4", steps=steps)
        errors.append([(a - b).abs().max().item() for a, b in zip(layer(x), moving_solution(x, 0.2, 1.5))])
    for (z, ldj), (finer_z, finer_ldj) in itertools.pairwise(errors):
        assert 3.7 < math.log2(z / finer_z) < 4.3 and 3.7 < math.log2(ldj / finer_ldj) < 4.3


def test_nfe_is_counted():
    net, x = field(2), points(2)
    calls = 0

    def watched(t, x):
        nonlocal calls
        calls += 1
        return net(t, x)

    for steps in (1, 7, 10, 100):
        layer = CNF(watched, t1=0.7, solver="rk4", steps=steps)
        for solve in (layer, layer.inverse, layer.inverse_and_ldj):
            calls = 0
            solve(x)
            assert type(layer.nfe) is int and layer.nfe == calls == 4 * steps
    layer = CNF(watched)
    layer(x)
    easy = layer.nfe
    layer.rtol = layer.atol = 1e-9
    layer(x)
    assert 7 < easy < layer.nfe < 1000 and list(layer.state_dict()) == []
    layer(x[:0])
    assert layer.nfe == 0


def test_fixed_and_adaptive_steps_agree_and_settings_can_be_changed():
    layer, x = CNF(field(4), solver="rk4", steps=4), points(4)
    rough = layer(x)
    layer.steps = 200
    fine = layer(x)
    layer.solver, layer.rtol, layer.atol = "dopri5", 1e-10, 1e-11
    for a, b, c in zip(rough, fine, layer(x)):
        torch.testing.assert_close(b, c, rtol=1e-8, atol=1e-8)
        assert (a - c).abs().max() > 1e-6


def test_the_field_is_never_asked_outside_its_times():
    seen = []

    def f(t, x):
        seen.append(float(t))
        return torch.sin(8 * t) * x

    for solver, steps in (("dopri5", None), ("dopri8", None), ("rk4", 5)):
        layer = CNF(f, 0.2, 0.9, solver=solver, steps=steps)
        layer.inverse(layer(points(2))[0])
    assert min(seen) >= 0.2 - 1e-12 and max(seen) <= 0.9 + 1e-12


def test_a_hard_row_is_not_lost_in_a_large_batch():
    """Among thousands of points at rest, a point gets the steps that it gets alone."""
    hard = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    batch = torch.cat([hard, torch.zeros(5000, 2, dtype=torch.float64)])
    layer = CNF(lambda t, x: torch.sin(5 * x.flip(-1)) + torch.sin(x) ** 2)
    with torch.no_grad():
        alone, nfe = layer(hard), layer.nfe
        for a, b in zip(alone, layer(batch)):
            torch.testing.assert_close(b[:1], a, rtol=1e-10, atol=1e-10)
    assert layer.nfe == nfe > 20


def test_steps_are_small_enough_for_the_density_too():
    """A point at rest needs no steps at all, the trace about it does."""
    _, ldj = CNF(lambda t, x: torch.cos(40 * t) * x)(torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(ldj.item(), math.sin(40) / 20, rtol=0, atol=1e-5)


def test_a_point_at_rest_has_finite_gradients():
    """The solver's norm has no derivative there, and none of it may reach the result."""
    layer, x = CNF(lambda t, x: -x ** 3), torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    z, ldj = layer(x)
    grad = torch.autograd.grad(z.sum() + ldj.sum(), x)[0]
    assert torch.equal(grad[0], torch.ones(2)) and torch.isfinite(grad).all()


# --- Hutchinson's trace within a solve

@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_noise_is_drawn_once_and_kept(noise, monkeypatch):
    """Given the seed, finer steps converge to one value; fresh noise in each step would give another with each number."""
    layer, x = CNF(field(4), trace="hutchinson", noise=noise, solver="rk4", steps=10), points(4)

    def ldj(seed):
        torch.manual_seed(seed)
        return layer(x)[1]

    drawn = []
    draw = layer._noise
    monkeypatch.setattr(layer, "_noise", lambda x: drawn.append(draw(x)) or drawn[-1])
    coarse, other = ldj(5), ldj(6)
    assert len(drawn) == 2 and drawn[0].shape == x.shape and (coarse - other).abs().min() > 1e-3
    assert torch.equal(drawn[0].abs() == 1, torch.full_like(x, noise == "rademacher", dtype=bool))
    layer.steps = 100
    torch.testing.assert_close(ldj(5), coarse, rtol=0, atol=1e-4)
    layer.solver, layer.rtol, layer.atol = "dopri5", 1e-9, 1e-9
    torch.testing.assert_close(ldj(5), coarse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "inverse_and_ldj"])
def test_the_estimated_density_is_unbiased_by_enumeration(direction, monkeypatch):
    layer, x = CNF(field(4), trace="hutchinson", solver="rk4", steps=10), points(4)[:1].expand(16, 4)
    monkeypatch.setattr(layer, "_noise", lambda x: signs(4))
    z, estimates = getattr(layer, direction)(x)
    exact_layer = CNF(layer.field, solver="rk4", steps=10)
    exact_z, exact = getattr(exact_layer, direction)(x[:1])
    torch.testing.assert_close(z, exact_z.expand(16, 4), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimates.mean(), exact[0], rtol=1e-12, atol=1e-12)
    assert estimates.std() > 0.05 and abs(2 * estimates.mean() - exact[0]) > 0.05


def test_random_signs_are_fair():
    """20,000 signs; a fair coin fails this once in 15,800 runs with fresh seeds (|z| > 4)."""
    eps = CNF(field(2), trace="hutchinson")._noise(torch.zeros(10_000, 2))
    assert set(eps.unique().tolist()) == {-1.0, 1.0} and abs(eps.mean()) < 4 / math.sqrt(20_000)


def test_an_estimate_is_said_to_be_one():
    layer = CNF(field(2), trace="hutchinson")
    flow = Flow(StandardNormal(2).double(), Compose([layer, Reverse()]))
    assert not flow.exact and not Inverse(layer).exact and not FFJORD(field(2)).exact and CNF(field(2)).exact
    with pytest.raises(ValueError, match="pass bound=True"):
        flow.log_prob(points(2))
    assert flow.log_prob(points(2), bound=True).shape == (6,)
    layer.trace = "exact"   # trained with the estimate, evaluated without
    assert flow.exact and flow.log_prob(points(2)).shape == (6,)


def test_ffjord_is_a_cnf_with_the_papers_settings():
    layer = FFJORD(field(2), atol=1e-7)
    assert (layer.trace, layer.noise, layer.solver, layer.rtol, layer.atol, layer.adjoint) == (
        "hutchinson", "gaussian", "dopri5", 1e-5, 1e-7, True)
    layer(points(2))[1].sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in layer.parameters())


def test_inverse_alone_integrates_no_trace(monkeypatch):
    layer, x = CNF(field(2)), points(2)
    monkeypatch.setattr("flowkit.continuous._value_and_trace", None)
    assert layer.inverse(x).shape == x.shape and not layer.inverse(x.requires_grad_()).isnan().any()
    with pytest.raises(TypeError):
        layer(x)


# --- the adjoint

def all_gradients(layer, x, context, call):
    """Gradients under weights that differ from sample to sample, in x, context and weights."""
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    torch.manual_seed(9)
    result = getattr(layer, call)(x, context)
    out, ldj = result if isinstance(result, tuple) else (result, torch.zeros(len(x), dtype=x.dtype))
    loss = (torch.randn(len(x), dtype=x.dtype) * (ldj + (out * torch.randn_like(out)).sum(-1))).sum()
    return torch.autograd.grad(loss, [x, context, *layer.parameters()])


@pytest.mark.parametrize("call", ["forward", "inverse", "inverse_and_ldj"])
@pytest.mark.parametrize("settings", [dict(trace="exact", rtol=1e-8, atol=1e-9),
                                      dict(trace="hutchinson", solver="rk4", steps=50)], ids=["exact_dopri5", "hutchinson_rk4"])
def test_the_adjoints_gradients_are_the_direct_ones(settings, call):
    net, x, context = field(3, context_dim=2), points(3), points(2, seed=4)
    direct, adjoint = (all_gradients(CNF(net, adjoint=a, **settings), x, context, call) for a in (False, True))
    assert max(g.abs().max() for g in direct) > 0.1
    for a, b in zip(direct, adjoint):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_adjoints_memory_does_not_grow_with_the_steps():
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()   # or a saved output would keep itself alive through its graph
            alive.add(self)

    def kept(adjoint, steps):
        alive.clear()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            z, ldj = CNF(field(2), solver="rk4", steps=steps, adjoint=adjoint)(points(2))
        assert z.requires_grad and ldj.requires_grad
        return sum(saved.tensor.numel() for saved in alive)

    alive = weakref.WeakSet()

    assert kept(True, 20) == kept(True, 5) and kept(False, 20) > 3 * kept(False, 5)


def test_nfe_leaves_out_the_adjoints_backward_solve():
    layer = CNF(field(2), solver="rk4", steps=5, adjoint=True)
    layer(points(2))[1].sum().backward()
    assert layer.nfe == 20


def test_frozen_weights_get_no_gradient_and_harm_none():
    net = field(2)
    net.net[0].weight.requires_grad_(False)
    for adjoint in (False, True):
        net.zero_grad()
        CNF(net, adjoint=adjoint)(points(2))[1].sum().backward()
        assert net.net[0].weight.grad is None and net.net[2].weight.grad.abs().max() > 0


# --- context, and what the package costs to import

def test_context_reaches_the_field():
    layer, x, context = CNF(field(2, context_dim=1), **TIGHT), points(2), points(1)
    z, ldj = layer(x, context)
    for i in range(2):
        row_z, row_ldj = CNF(lambda t, x: layer.field(t, x, context[i]), **TIGHT)(x[i])
        torch.testing.assert_close((z[i], ldj[i]), (row_z, row_ldj), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(layer.inverse(z, context), x, rtol=1e-8, atol=1e-8)
    assert Flow(StandardNormal(2).double(), layer).sample(6, context).shape == (6, 2)


def test_torchdiffeq_is_not_loaded_before_it_is_used():
    code = "import sys, flowkit.continuous; sys.exit('torchdiffeq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- failures and bad input

def explode(t, x):
    return x ** 2


@pytest.mark.parametrize("layer, sentence", [
    (CNF(explode), r"^CNF: dopri5 stopped at t = 0\.\d+ in solving explode: its step fell to .*; is the field too steep, or "),
    (CNF(lambda t, x: torch.cos(500 * t) * 500 * x, max_steps=20),
     r"^CNF: dopri5 stopped at t = 0\.\d+ in solving <lambda>: it needs more than max_steps = 20 steps; is "),
    (CNF(lambda t, x: x / 0), r"^CNF: dopri5 stopped at t = 0 in solving <lambda>: its step fell to 0; "),
    (CNF(field(2), rtol=1e-30, atol=1e-30, max_steps=50), r"^CNF: dopri5 stopped .* or are .* too small for torch.float64\?$"),
    (CNF(explode, t1=3.0, solver="rk4", steps=60), r"^CNF: rk4 stopped at t = .* its state has \d+ non-finite values out of 6$"),
], ids=["explodes", "max_steps", "infinite", "tolerance", "rk4"])
def test_a_failed_solve_says_where_and_why(layer, sentence):
    x = torch.full((2, 2), 2.0, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=sentence):
        layer(x)
    assert layer.nfe == 0


def test_a_bad_input_is_not_blamed_on_the_field():
    x = points(2)
    x[1, 0] = math.nan
    sentence = r"stopped at t = 0 in solving VectorField: its state has 1 non-finite values out of 18$"
    for more in ({}, dict(solver="rk4", steps=3)):
        with pytest.raises(FloatingPointError, match=sentence):
            CNF(field(2), **more)(x)


class Brittle(nn.Module):
    """A field whose value is fine and whose derivative is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t, x):
        return self.weight * (x - x.detach()).abs().sqrt()


def test_a_failed_backward_solve_says_so_too():
    layer, x = CNF(Brittle(), adjoint=True), points(2).requires_grad_()
    z = layer.inverse(x)
    with pytest.raises(FloatingPointError, match=r"^CNF: dopri5 stopped .* in solving the adjoint of Brittle: its state has \d"):
        z.sum().backward()
    layer = CNF(field(2), adjoint=True)
    z, _ = layer(x)
    layer.max_steps = 1
    with pytest.raises(FloatingPointError, match="the adjoint of VectorField: it needs more than max_steps = 1 steps; is"):
        z.sum().backward()


@pytest.mark.parametrize("settings, error, sentence", [
    (dict(trace="exat"), ValueError, "^trace must be one of exact, hutchinson, got 'exat'$"),
    (dict(noise="uniform"), ValueError, "^noise must be one of rademacher, gaussian, got 'uniform'$"),
    (dict(solver="rk5"), ValueError, "^solver must be one of dopri5, .*, rk4, got 'rk5'$"),
    (dict(solver="rk4"), ValueError, "^steps must be a positive integer for a fixed-step solver .*, got None for rk4$"),
    (dict(solver="rk4", steps=0), ValueError, "^steps must be .*, got 0 for rk4$"),
    (dict(steps=8), ValueError, "^steps must be .* None for an adaptive one, got 8 for dopri5$"),
    (dict(t1=0.0), ValueError, "^t1 must differ from t0, got 0.0 for both$"),
    (dict(adjoint=True), TypeError, "^field must be an nn.Module for adjoint=True, .*, got function$"),
])
def test_bad_settings(settings, error, sentence):
    with pytest.raises(error, match=sentence):
        CNF(moving, **settings)


def test_bad_input_is_told_in_one_sentence():
    layer = CNF(field(2))
    with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
        layer(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="^z must be a floating-point tensor, got list$"):
        layer.inverse([[0.0, 0.0]])
    with pytest.raises(ValueError, match=r"^x must have shape \(\.\.\., D\) with D >= 1, got \(\)$"):
        exact_trace(torch.sin, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^eps must be a tensor of x's shape \(3, 2\), got \(2,\)$"):
        hutchinson_trace(torch.sin, torch.zeros(3, 2), torch.zeros(2))
    for solve in (CNF(lambda t, x: x[:, :1]), CNF(lambda t, x: x[:, :1]).inverse):
        with pytest.raises(ValueError, match=r"^the field's value must be a tensor of x's shape \(6, 2\), got \(6, 1\)$"):
            solve(points(2))
    with pytest.raises(ValueError, match=r"^the field's value must be a tensor of x's shape \(6, 2\), got tuple$"):
        CNF(lambda t, x: (x, x))(points(2))
    with pytest.raises(ValueError, match=r"^score's value must be a tensor of x's shape \(6, 2\), got \(6, 1\)$"):
        CNF(ProbabilityFlow(lambda t, x: x[:, :1]))(points(2))
