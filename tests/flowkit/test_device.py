"""Does a training step stay on the device that the model and the data are on? Asked without a GPU.

A second device is played by the CPU: tensors that say they are on "meta", hold real numbers, and may meet a CPU tensor
where CUDA's may: never, but for one number without dimensions, and indices. A factory that is not told its device makes
a CPU tensor, as it would beside a GPU, and the operation where the two meet raises. (torch's FakeTensorMode has neither
numbers to branch on, which every check for finite values does, nor, where torch is built without CUDA, a backward pass
for fake "cuda" tensors.)
"""
import importlib
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import flowkit
from flowkit import settings

AWAY = torch.device("meta")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MOVES = {"aten::_to_copy", "aten::copy_"}
# The tensors are indices here from this argument on, and CUDA takes them from the CPU too.
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Away(torch.Tensor):
    """A tensor on the second device; `held` are its numbers."""

    @staticmethod
    def __new__(cls, held):
        away = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=AWAY)
        away.held = held
        return away

    def __repr__(self):
        return f"Away({self.held})"

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_two_devices(func, args, kwargs or {})


def on_two_devices(func, args, kwargs):
    name = func._schema.name
    tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    away = [v for v in tensors if isinstance(v, Away)]
    target = kwargs.get("device")
    if any(v.device == AWAY for v in tensors if not isinstance(v, Away)):
        raise RuntimeError(f"{name} got a tensor on {AWAY} that holds no numbers: it was made past this test's devices")
    if not away and (target is None or torch.device(target) != AWAY):
        return func(*args, **kwargs)
    checked = [args[0]] if name in INDEXED else tensors
    strangers = [v for v in checked if not isinstance(v, Away) and (v.ndim or name in INDEXED)]
    if away and strangers and name not in MOVES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got a CPU tensor of shape "
                           f"{tuple(strangers[0].shape)} beside one on {AWAY}")
    known = {id(v.held): v for v in away}
    if target is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*tree_map(lambda v: v.held if isinstance(v, Away) else v, args),
               **tree_map(lambda v: v.held if isinstance(v, Away) else v, kwargs))
    if name == "aten::copy_":
        return args[0]
    if target is not None and torch.device(target) != AWAY:
        return out
    return tree_map(lambda v: known.get(id(v)) if id(v) in known else Away(v) if isinstance(v, torch.Tensor) else v, out)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_two_devices(func, args, kwargs or {})


class Makers(TorchFunctionMode):
    """torch.tensor, and indexing by a list, put a tensor on "meta" without an operation that could be seen; here with one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == AWAY:
            return func(*args, **{**kwargs, "device": "cpu"}).to(AWAY)
        if func is torch.Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            args = x, tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
        return func(*args, **kwargs)


@contextmanager
def two_devices():
    with Makers(), Operations():
        yield


def digits(n=3):
    return flowkit.datasets.digits()[0][:n]


def plane(n=5):
    return torch.randn(n, 2)


def planar():
    layers = [flowkit.Planar(2), flowkit.Radial(2), flowkit.Sylvester(2, 2)]
    return flowkit.Flow(flowkit.StandardNormal(2), flowkit.Compose(layers))


def flow_plus_plus():
    return flowkit.flow_plus_plus((1, 8, 8), levels=17, scales=2, couplings=1, components=2, width=8, blocks=1)


def affine_image():
    """Uniform noise, affine couplings without attention, and half of the channels to a prior."""
    def net(a, b):
        return nn.Sequential(nn.Conv2d(a, 4, 3, padding=1), flowkit.GatedConv(4), nn.Conv2d(4, b, 1))

    class Prior(nn.Module):
        def forward(self, z):
            return torch.distributions.Independent(torch.distributions.Normal(z, 1), 3)

    step = flowkit.Compose([flowkit.ActNorm2d(4), flowkit.Conv1x1(4), flowkit.ImageCoupling(net(2, 4)),
                            flowkit.FactorOut(Prior())])
    steps = [flowkit.UniformDequantizer(17), flowkit.Logit(event_dims=3), flowkit.Squeeze(), step]
    return flowkit.Flow(flowkit.StandardNormal(2, 4, 4), flowkit.Compose(steps))


def pixelcnn():
    return flowkit.Flow(flowkit.StandardNormal(1, 8, 8), flowkit.Compose([
        flowkit.UniformDequantizer(17), flowkit.Logit(event_dims=3),
        flowkit.Autoregressive(flowkit.PixelCNN(1, 2, width=4, blocks=1))]))


def transformer():
    net = flowkit.MaskedTransformer(1, 2, width=8, heads=2, blocks=1)
    return flowkit.Flow(flowkit.StandardNormal(2), flowkit.Autoregressive(net))


def residual(**settings):
    return flowkit.Flow(flowkit.StandardNormal(2), flowkit.Residual(flowkit.lipschitz_mlp(2, (8,)), **settings))


def residual_images(**settings):
    blocks = [flowkit.Residual(flowkit.lipschitz_convnet(1, (4,), (3, 3)), "roulette", event_dims=3, **settings)]
    return flowkit.Flow(flowkit.StandardNormal(1, 8, 8), flowkit.Compose([flowkit.UniformDequantizer(17), *blocks]))


def cnf(**settings):
    field = flowkit.VectorField(2, (8,))
    return flowkit.Flow(flowkit.StandardNormal(2), flowkit.CNF(field, rtol=1e-2, atol=1e-2, **settings))


class VAE(nn.Module):
    """A VAE with an autoregressive posterior that has a context, and a flow as its prior."""
    exact = False

    def __init__(self, make, params):
        super().__init__()

        class Encoder(nn.Linear):
            def forward(self, x):
                return super().forward(x).split([2, 2, 3], -1)

        flow = flowkit.Compose([make(flowkit.MADE(2, params, hidden=(8,), context=3)), flowkit.Reverse()])
        self.posterior = flowkit.FlowPosterior(Encoder(2, 7), flow)
        self.prior, self.decoder = planar(), nn.Linear(2, 2)

    def log_joint(self, x, z):
        pixels = torch.distributions.Independent(torch.distributions.Normal(self.decoder(z), 1), 1)
        return self.prior.log_prob(z) + pixels.log_prob(x)

    def log_prob(self, x, bound):
        return flowkit.iwae_log_prob(x, self.log_joint, self.posterior, 3)


class ReverseKL(nn.Module):
    exact = True

    def __init__(self):
        super().__init__()
        self.flow = flowkit.Flow(flowkit.StandardNormal(2), flowkit.Inverse(flowkit.Planar(2)))

    def log_prob(self, x):
        return -flowkit.reverse_kl(self.flow, lambda x: -x.square().sum(-1), 8)


CASES = {
    "planar": (planar, plane),
    "planar, reverse KL": (ReverseKL, plane),
    "Flow++": (flow_plus_plus, digits),
    "affine couplings on images": (affine_image, digits),
    "PixelCNN": (pixelcnn, digits),
    "transformer": (transformer, plane),
    "residual, exact": (residual, plane),
    "residual, series": (lambda: residual(logdet="series", noise="rademacher"), plane),
    "residual, roulette and Neumann": (lambda: residual(logdet="roulette"), plane),
    "residual, roulette through the sum": (lambda: residual(logdet="roulette", gradient="autograd"), plane),
    "residual, Poisson": (lambda: residual(logdet="roulette", terms=flowkit.ShiftedPoisson(1.0)), plane),
    "residual on images": (residual_images, digits),
    "CNF, exact trace": (cnf, plane),
    "CNF, estimated trace": (lambda: cnf(trace="hutchinson"), plane),
    "VAE, affine posterior": (lambda: VAE(flowkit.MAF, 2), plane),
    "VAE, DSF posterior": (lambda: VAE(lambda net: flowkit.NAF(net, 2), 6), plane),
}


@pytest.fixture
def second_device(monkeypatch):
    monkeypatch.setenv("FLOWKIT_DEVICE", "meta")
    with two_devices():
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_stays_on_the_device(name, second_device):
    make, data = CASES[name]
    flow, points = make().to(settings.device()), data()
    before = [p.held.clone() for p in flow.parameters()]
    # Data left on the CPU are moved by fit, as the docstring promises of any data.
    history = flowkit.fit(flow, points, steps=2, batch_size=3, progress=False)
    assert len(history.losses) == 2 and all(map(math.isfinite, history.losses))
    assert all(p.device == AWAY and torch.isfinite(p.held).all() for p in flow.parameters())
    assert any((p.held != b).any() for p, b in zip(flow.parameters(), before))


SAMPLED = [name for name in CASES if not name.startswith("VAE") and name not in ("planar, reverse KL", "PixelCNN")]


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_made_on_the_device(name, second_device):
    make, data = CASES[name]
    flow = make().to(settings.device())
    flow.eval()
    assert flow.sample(2).device == AWAY


@pytest.mark.parametrize("script", ["inference"])
def test_benchmarks_stay_on_the_device(script, second_device, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    importlib.import_module(script).main(["--quick", "--check"])
    assert f"on {AWAY}" in capsys.readouterr().out


class OnTheCPU(nn.Module):
    """Adds noise, or a constant, that was made without a word on where."""

    def __init__(self, make):
        super().__init__()
        self.scale, self.make = nn.Parameter(torch.ones(2)), make

    def log_prob(self, x):
        return -(self.scale * x + self.make(x)).square().sum(-1)


@pytest.mark.parametrize("make", [lambda x: torch.randn(x.shape), lambda x: torch.zeros(2), lambda x: torch.tensor([1.0, 2.0])],
                         ids=["randn", "zeros", "tensor"])
def test_a_tensor_made_on_the_cpu_is_found(make, second_device):
    """The second device is one: what CUDA would refuse is refused."""
    with pytest.raises(RuntimeError, match="same device"):
        flowkit.fit(OnTheCPU(make).to(AWAY), plane(), steps=1, progress=False)


def test_numbers_on_the_second_device_are_real(second_device):
    x = torch.arange(6.0).reshape(2, 3)
    away = x.to(AWAY)
    assert away.device == AWAY and (away @ away.T).sum().item() == (x @ x.T).sum().item()
    assert torch.equal(away.to("cpu"), x) and (2 * away + torch.tensor(1.0)).device == AWAY
    assert torch.randn(3, device=AWAY).device == AWAY and away[torch.tensor([0])].device == AWAY
    assert away[..., [2, 0]].tolist() == x[..., [2, 0]].tolist()
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.tensor([0]).to(AWAY)]
