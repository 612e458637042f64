"""Flow, Compose, Inverse, the single layers' own promises, and what bad input is told."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, Uniform

from flowkit import (MLP, ActNorm, AdditiveCoupling, Compose, Coupling, Flow, Inverse, InvertibleLinear, MixCoupling, Permute, Reverse,
                     StandardNormal, Transform, mix_logit_cdf)


class Scale(Transform):
    """z = factor * x, to put values and errors where a test wants them."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x, context=None):
        return self.factor * x, self.factor.abs().log() * x.shape[-1] + x.new_zeros(x.shape[:-1])

    def inverse(self, z, context=None):
        return z / self.factor


class Estimate(Scale):
    exact = False


class ByContext(nn.Module):
    """A net that needs its context."""

    def forward(self, x, context):
        return torch.cat([context, context], -1) + 0 * x


def test_flow_is_the_closed_form_gaussian():
    flow = Flow(StandardNormal(3), Scale(0.5))
    x = torch.randn(5, 3)
    torch.testing.assert_close(flow.log_prob(x), Normal(0, 2.0).log_prob(x).sum(-1))
    points, log_prob = flow.sample_and_log_prob(7)
    assert points.shape == (7, 3) and log_prob.shape == (7,)
    torch.testing.assert_close(log_prob, flow.log_prob(points))
    log_prob.sum().backward()
    assert flow.transform.factor.grad is not None
    assert flow.sample(4).shape == (4, 3) and not flow.sample(4).requires_grad


@pytest.mark.parametrize("base", [Independent(Normal(torch.zeros(2), torch.ones(2)), 1), StandardNormal(2),
                                  torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))])
def test_any_base_with_a_vector_event(base):
    flow, x = Flow(base, Scale(2.0)), torch.randn(5, 2)
    torch.testing.assert_close(flow.log_prob(x), Normal(0, 0.5).log_prob(x).sum(-1))
    assert flow.sample(3).shape == (3, 2)


def test_a_parametrised_base_gets_gradients():
    mean = torch.zeros(2, requires_grad=True)
    points, _ = Flow(Independent(Normal(mean, 1.0), 1), Scale(2.0)).sample_and_log_prob(3)
    points.sum().backward()
    assert mean.grad.tolist() == [1.5, 1.5]


def test_base_without_a_joint_event_is_refused():
    with pytest.raises(ValueError, match=r"base must have a whole point as its event .* got event_shape \(\) and batch_shape \(2,\)"):
        Flow(Normal(torch.zeros(2), torch.ones(2)), Reverse())


def test_standard_normal_moves_with_its_flow():
    flow = Flow(StandardNormal(2), Reverse()).double()
    assert flow.sample(3).dtype == torch.float64 and list(flow.state_dict()) == []
    assert flow.to("meta").base.sample((3,)).device.type == "meta"
    image = StandardNormal(1, 4, 4)
    assert image.log_prob(image.sample((5,))).shape == (5,)


def test_compose_runs_in_list_order_and_adds_ldjs():
    shift = AdditiveCoupling(lambda x1: torch.ones_like(x1))
    x = torch.tensor([[1.0, 5.0]])
    z, ldj = Compose([shift, Reverse(), Scale(2.0)])(x)
    assert z.tolist() == [[12.0, 2.0]]
    torch.testing.assert_close(ldj, torch.tensor([2 * math.log(2)]))
    assert Compose([Reverse(), shift])(x)[0].tolist() == [[5.0, 2.0]]


def test_compose_is_a_sequence():
    steps = [Reverse(), Scale(2.0), Reverse()]
    flow = Compose(steps)
    assert len(flow) == 3 and list(flow) == steps and flow[1] is steps[1] and list(flow[1:]) == steps[1:]
    with pytest.raises(ValueError, match="transforms must hold at least one transform"):
        Compose([])


def test_compose_takes_modules_that_know_no_context():
    class Plain(nn.Module):
        def forward(self, x):
            return x + 1, x.new_zeros(len(x))

        def inverse(self, z):
            return z - 1

    flow = Flow(StandardNormal(2), Compose([Plain(), Plain()]))
    torch.testing.assert_close(flow.log_prob(torch.full((3, 2), -2.0)), torch.full((3,), -math.log(2 * math.pi)))
    assert flow.exact and flow.sample(3).shape == (3, 2)


def test_context_reaches_the_net():
    flow = Flow(StandardNormal(2), Compose([Coupling(ByContext()), Reverse(), Inverse(Coupling(ByContext()))]))
    context, x = torch.tensor([[0.3], [-0.7]]), torch.randn(2, 2)
    z, ldj = flow.transform(x, context)
    torch.testing.assert_close(flow.transform.inverse(z, context), x)
    torch.testing.assert_close(ldj, torch.zeros(2))
    assert flow.log_prob(x, context).shape == (2,) and flow.sample(2, context).shape == (2, 2)


def test_a_bound_is_never_passed_off_as_a_likelihood():
    flow = Flow(StandardNormal(2), Compose([Reverse(), Estimate(2.0)]))
    assert not flow.exact and not flow.transform.exact and not Inverse(flow.transform).exact
    with pytest.raises(ValueError, match="pass bound=True"):
        flow.log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="pass bound=True"):
        flow.sample_and_log_prob(1)
    assert flow.log_prob(torch.zeros(1, 2), bound=True).shape == (1,)


def test_only_a_bijection_is_turned_round():
    layer = Reverse()
    layer.bijective = False
    with pytest.raises(ValueError, match="transform must be bijective to be turned round, got Reverse"):
        Inverse(layer)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_value_names_the_layer(bad):
    compose = Compose([Reverse(), Scale(bad), Reverse()])
    with pytest.raises(FloatingPointError, match=r"step 1 \(Scale\): z has 2 non-finite values out of 2"):
        compose(torch.ones(1, 2))
    with pytest.raises(FloatingPointError, match=r"^Scale: z has"):
        Flow(StandardNormal(2), Scale(bad)).log_prob(torch.ones(1, 2))
    broken = Compose([Reverse(), Scale(0.0)])
    with pytest.raises(FloatingPointError, match=r"step 1 \(Scale\): x has"):
        Flow(StandardNormal(2), broken).sample(3)
    with pytest.raises(FloatingPointError, match="its input was not finite already"):
        Compose([Reverse()])(torch.full((1, 2), bad))


# --- single layers

def test_permute_is_the_lectures_shuffle():
    """x = P z of the slide, an order that is not its own inverse."""
    p = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]).float()
    layer, z = Permute(p.T.argmax(1)), torch.randn(5, 4)
    torch.testing.assert_close(layer.inverse(z), z @ p.T)
    torch.testing.assert_close(layer(z @ p.T)[0], z)


def test_coupling_halves():
    seen = []

    def net(x1):
        seen.append(x1.shape)
        return x1.new_zeros(*x1.shape[:-1], 2 * 3)

    Coupling(net)(torch.zeros(4, 5))
    assert seen == [(4, 2)]


def test_additive_coupling_has_exactly_no_ldj():
    z, ldj = AdditiveCoupling(MLP(2, 2))(torch.randn(3, 4))
    assert ldj.tolist() == [0, 0, 0]


def test_act_norm_standardises_once():
    layer, x = ActNorm(3), 5 + 3 * torch.randn(400, 3)
    z, ldj = layer(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(3))
    torch.testing.assert_close(ldj, -x.var(0, correction=0).log().sum().expand(400) / 2)
    torch.testing.assert_close(layer(x + 1)[0] - z, (1 / x.std(0, correction=0)).expand(400, 3))
    loaded = ActNorm(3)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x + 1)[0], layer(x + 1)[0])


def test_act_norm_survives_poor_first_batches():
    for x in (torch.randn(1, 3), torch.ones(50, 3) * 1e4, torch.stack([torch.zeros(50), torch.randn(50), torch.randn(50)], 1)):
        layer = ActNorm(3)
        z, ldj = layer(x)
        assert torch.isfinite(z).all() and torch.isfinite(ldj).all() and layer.log_scale[0] == 0
        torch.testing.assert_close(layer.inverse(z), x)
    for x, error, sentence in ((torch.full((4, 3), math.nan), FloatingPointError, "^ActNorm, first batch: mean has 3"),
                               (torch.zeros(0, 3), ValueError, "^x must hold a point when it is ActNorm's first batch")):
        layer = ActNorm(3)
        with pytest.raises(error, match=sentence):
            layer(x)
        assert not layer.initialised and torch.isfinite(layer.shift).all()


def test_act_norm_is_the_identity_before_its_first_batch():
    layer, z = ActNorm(2), torch.randn(3, 2)
    assert torch.equal(layer.inverse(z), z) and not layer.initialised


def test_invertible_linear_starts_as_a_rotation_and_keeps_its_determinant():
    layer = InvertibleLinear(6).double()
    w = layer.weight().detach()
    torch.testing.assert_close(w @ w.T, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    w = layer.weight().detach().numpy()
    np.testing.assert_allclose(layer(torch.zeros(2, 6).double())[1].detach().numpy(), np.linalg.slogdet(w)[1], rtol=1e-9)
    x = np.random.default_rng(0).normal(size=(4, 6))
    np.testing.assert_allclose(layer(torch.from_numpy(x))[0].detach().numpy(), x @ w.T, rtol=1e-9)
    np.testing.assert_allclose(layer.inverse(torch.from_numpy(x)).detach().numpy(), np.linalg.solve(w, x.T).T, rtol=1e-7)


def test_zero_last_makes_a_coupling_the_identity():
    x = torch.randn(3, 2)
    z, ldj = Coupling(MLP(1, 2, zero_last=True))(x)
    assert torch.equal(z, x) and ldj.tolist() == [0, 0, 0]


@pytest.mark.parametrize("d_in", [1, 3])
def test_spread_puts_steep_steps_everywhere(d_in):
    torch.manual_seed(0)
    first = MLP(d_in, 5, (40, 8), spread=(6.0, 3.0))[0]
    slope = first.weight.norm(dim=1)
    assert torch.allclose(slope, torch.full_like(slope, 6.0))
    # Along its own direction v a unit switches at c = -bias / slope; the 40 places are those of an even grid, in some order.
    places = -first.bias / slope
    assert torch.allclose(places.sort().values, torch.linspace(-3, 3, 40), atol=1e-6)
    assert not torch.equal(places, places.sort().values) and not torch.equal(places.flip(0), places.sort().values)
    assert len(MLP(d_in, 5, (), spread=(6.0, 3.0))) == 1, "without a hidden layer there is nothing to spread"


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_a_spread_mixture_coupling_starts_with_even_logistics(dim):
    torch.manual_seed(0)
    layer, reach = MixCoupling.spread(dim, components=30, hidden=(8, 8), reach=4.0), 4.0
    x = torch.randn(50, dim, dtype=torch.float64)
    z, ldj = layer.double()(x)
    # All points get the same map: the logit of the mean of 30 logistics with even means and scales 0.6 of their distance.
    second = x[:, dim // 2:]
    means, log_scale = torch.linspace(-reach, reach, 30, dtype=torch.float64), torch.tensor(0.6 * 8 / 29, dtype=torch.float64).log()
    y, log_slope = mix_logit_cdf(second, torch.full((30,), 1 / 30, dtype=torch.float64), means, log_scale.expand(30))
    assert torch.allclose(z, torch.cat([x[:, :dim // 2], y], 1), atol=1e-6) and torch.allclose(ldj, log_slope.sum(1), atol=1e-6)


# --- bad input

LAYERS = [Coupling(MLP(1, 2)), Permute([1, 0]), Reverse(), ActNorm(2), InvertibleLinear(2)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: type(m).__name__)
def test_bad_input_is_told_in_one_sentence(layer):
    with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
        layer(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="^z must be a floating-point tensor, got ndarray$"):
        layer.inverse(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"^x must have shape \(\.\.\., D\) with D .*, got \(\)$"):
        layer(torch.tensor(1.0))


@pytest.mark.parametrize("layer", [Permute([1, 0]), ActNorm(2), InvertibleLinear(2)], ids=lambda m: type(m).__name__)
def test_wrong_dimension(layer):
    with pytest.raises(ValueError, match=r"^x must have shape \(\.\.\., D\) with D = 2, got \(3, 4\)$"):
        layer(torch.zeros(3, 4))


def test_bad_nets_and_orders():
    with pytest.raises(ValueError, match=r"^net must return a tensor of shape \(5, 2\) for x of shape \(5, 2\), got \(5, 3\)$"):
        Coupling(MLP(1, 3))(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="got tuple$"):
        Coupling(lambda x: (x, x))(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"with D >= 2, got \(5, 1\)$"):
        Coupling(MLP(1, 2))(torch.zeros(5, 1))
    with pytest.raises(ValueError, match=r"^order must be a permutation of 0 \.\. D-1, got \[0, 2\]$"):
        Permute([0, 2])


def test_a_bounded_base_keeps_its_own_error():
    base = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    with pytest.raises(ValueError, match="support"):
        Flow(base, Scale(1.0)).log_prob(torch.full((1, 2), 3.0))
