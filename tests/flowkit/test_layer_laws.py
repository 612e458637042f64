"""Every law on every layer, in float64 and with weights of order one; see layer_laws.py."""
import copy

import pytest
import torch
from layer_laws import LAWS, LAYERS, WITH_WEIGHTS, build, density_integrates_to_one, ldj_is_autograds, points

from flowkit import Compose, Transform


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_law(name, law, dim):
    law(build(name, dim), points(dim))


@pytest.mark.parametrize("name", LAYERS)
def test_density_integrates_to_one(name):
    density_integrates_to_one(build(name, 2), points(2))


@pytest.mark.parametrize("name", LAYERS)
def test_float32_in_float32_out(name):
    layer, x = build(name, 4, torch.float32), points(4, torch.float32)
    z, ldj = layer(x)
    back, ldj_back = layer.inverse_and_ldj(z)
    assert {t.dtype for t in (z, ldj, back, ldj_back)} == {torch.float32}
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_restores_the_layer(name):
    """A layer built anew from another seed does the same after load_state_dict, and its data-dependent part stays."""
    layer, x = build(name, 4), points(4)
    state = copy.deepcopy(layer.state_dict())
    torch.manual_seed(7)
    other = LAYERS[name](4).double()
    other.load_state_dict(state)
    for got, want in zip((*other(x), other.inverse(x)), (*layer(x), layer.inverse(x))):
        assert torch.equal(got, want)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_all_weights_get_a_gradient(name):
    layer = build(name, 4)
    z, ldj = layer(points(4))
    (z.square().sum() + ldj.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


# All but those whose constructor is given a tensor of its own, and those whose forward looks at a number.
@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"permute", "maf_any_order", "act_norm", "iaf", "inverse", "compose", "cnf", "residual"}))
def test_the_default_device_is_respected(name):
    """Shapes alone, on the device that holds no data: nothing is made on a device of its own choosing."""
    with torch.device("meta"):
        layer = LAYERS[name](4)
    z, ldj = layer(torch.empty(3, 4, device="meta"))
    assert (z.device.type, ldj.device.type, ldj.shape) == ("meta", "meta", (3,))


class Doubled(Transform):
    """The fault that most libraries' tests let pass: ldj twice too large, or 1 where it should be 0."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @staticmethod
    def spoil(ldj):
        return torch.where(ldj == 0, ldj + 1, 2 * ldj)

    def forward(self, x, context=None):
        z, ldj = self.layer(x, context)
        return z, self.spoil(ldj)

    def inverse(self, z, context=None):
        return self.layer.inverse(z, context)

    def inverse_and_ldj(self, z, context=None):
        x, ldj = self.layer.inverse_and_ldj(z, context)
        return x, self.spoil(ldj)


@pytest.mark.parametrize("name", LAYERS)
def test_a_doubled_ldj_turns_the_suite_red(name):
    wrong = Doubled(build(name, 4))
    with pytest.raises(AssertionError):
        ldj_is_autograds(wrong, points(4))
    with pytest.raises(AssertionError):
        ldj_is_autograds(Compose([wrong]), points(4))
    with pytest.raises(AssertionError):
        density_integrates_to_one(Doubled(build(name, 2)), points(2))
