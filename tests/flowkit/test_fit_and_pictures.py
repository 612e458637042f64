"""The training loop, the pictures, the settings, and the promise that the light modules load no layer."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import flowkit
from flowkit import MLP, ActNorm, Compose, Flow, MixCoupling, Reverse, StandardNormal, Transform, fit, kl_gap, plotting, settings, toys


def small_flow():
    torch.manual_seed(0)
    return Flow(StandardNormal(2), Compose([ActNorm(2), MixCoupling(MLP(1, 11, (16,)), 3), Reverse(), MixCoupling(MLP(1, 11, (16,)), 3)]))


@pytest.fixture(params=["sampler", "tensor"])
def data(request):
    toy = toys.get("two_gaussians")
    return toy.sample if request.param == "sampler" else toy.sample(2000, seed=0)


def test_fit_lowers_the_loss(data):
    flow, seen = small_flow(), []
    history = fit(flow, data, steps=300, batch_size=64, lr=1e-2, progress=False, on_step=lambda step, h: seen.append((step, len(h.losses))))
    assert len(history.losses) == 300 and seen[-1] == (299, 300) and history.seconds > 0
    assert np.mean(history.losses[-30:]) < np.mean(history.losses[:5]) - 0.3
    assert repr(history).startswith("History(300 steps, loss ")
    gap, error = kl_gap(flow, toys.get("two_gaussians"), n=4000, seed=1)
    assert -4 * error < gap < 0.2 and 0 < error < 0.05


def test_kl_gap_is_zero_for_the_target_itself():
    toy = toys.get("two_gaussians")

    class Same(torch.nn.Module):
        log_prob = staticmethod(lambda x: toy.log_prob(x) - 0.25)

    gap, error = kl_gap(Same(), toy, n=100)
    assert abs(gap - 0.25) < 1e-6 and error < 1e-6


def test_interrupting_keeps_what_there_is():
    flow = small_flow()

    def stop(step, history):
        if step == 4:
            raise KeyboardInterrupt

    history = fit(flow, toys.get("rings").sample, steps=100, progress=False, on_step=stop)
    assert len(history.losses) == 5 and history.interrupted and "interrupted" in repr(history)
    assert torch.isfinite(flow.log_prob(torch.zeros(1, 2))).all()


def test_every_part_gets_its_mode_back():
    flow = small_flow().train()
    flow.transform[1].eval()
    modes = []
    flow.transform[1].register_forward_hook(lambda *_: modes.append(flow.transform[1].training))
    fit(flow, toys.get("rings").sample, steps=2, progress=False)
    kl_gap(flow, toys.get("rings"), n=10)
    assert modes == [True, True, False] and flow.training and not flow.transform[1].training


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    flow = small_flow()
    flow.log_prob = lambda x: Flow.log_prob(flow, x) * (math.nan if len(seen) == 3 else 1)
    seen = []
    with pytest.raises(FloatingPointError, match="the loss became nan at step 3; lower lr"):
        fit(flow, toys.get("rings").sample, steps=9, progress=False, on_step=lambda step, h: seen.append(step))
    assert all(torch.isfinite(p).all() for p in flow.parameters())


def test_a_flow_with_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="flow must have parameters to fit"):
        fit(Flow(StandardNormal(2), Reverse()), toys.get("rings").sample, steps=1)


def test_an_inexact_flow_is_fitted_on_its_bound():
    class Rough(Transform):
        exact = False

        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(2))

        def forward(self, x, context=None):
            return x + self.shift, x.new_zeros(len(x))

    assert len(fit(Flow(StandardNormal(2), Rough()), torch.zeros(5, 2), steps=3, progress=False).losses) == 3


def test_a_parameter_with_gaps_in_memory_is_fitted_as_any_other():
    class Moved(Transform):
        def __init__(self, shift):
            super().__init__()
            self.shift = torch.nn.Parameter(shift)

        def forward(self, x, context=None):
            return x + self.shift, x.new_zeros(len(x))

    found = []
    for shift in (torch.zeros(3, 2), torch.zeros(3, 4).chunk(2, 1)[1]):
        flow = Flow(StandardNormal(3, 2), Moved(shift))
        fit(flow, -torch.arange(6.0).reshape(1, 3, 2), steps=60, lr=0.3, progress=False)
        found.append(flow.transform.shift.detach())
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], torch.arange(6.0).reshape(3, 2), atol=0.6)


@pytest.mark.parametrize("before", [False, True])
def test_tiny_numbers_are_zero_while_it_fits_and_only_then(before):
    """Where the CPU can do it: set_flush_denormal says whether."""
    def tiny():
        return (torch.tensor(1e-40) * 1).item() != 0

    can, seen = torch.set_flush_denormal(before), []
    try:
        fit(small_flow(), toys.get("rings").sample, steps=2, batch_size=4, progress=False, on_step=lambda *_: seen.append(tiny()))
        assert seen == [not can] * 2 and tiny() == (not (before and can))
        with pytest.raises(FloatingPointError):
            fit(small_flow(), torch.full((3, 2), math.nan), steps=1, progress=False)
        assert tiny() == (not (before and can))
    finally:
        torch.set_flush_denormal(False)


def test_another_optimiser_and_a_rate_that_rises_first():
    rates = []

    class Watched(flowkit.SOAP):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    flow = small_flow()
    history = fit(flow, toys.get("two_gaussians").sample, steps=100, batch_size=256, lr=1e-2, progress=False, optimiser=Watched, warm_up=0.2)
    done = np.arange(100) / 100
    assert np.allclose(rates, 1e-2 * (1 + np.cos(np.pi * done)) / 2 * np.minimum(1, (np.arange(100) + 1) / 21), atol=1e-12)
    assert np.mean(history.losses[-10:]) < np.mean(history.losses[:5]) - 0.3
    for warm_up in (-0.1, 1):
        with pytest.raises(ValueError, match="warm_up must be a share of the steps"):
            fit(flow, toys.get("rings").sample, steps=1, warm_up=warm_up)


def test_progress_bar_shows_the_loss(capsys):
    fit(small_flow(), toys.get("rings").sample, steps=3, batch_size=8)
    assert "3/3" in capsys.readouterr().err


# --- pictures

def test_every_picture_is_drawn_without_pyplot():
    figure, axes = plotting.side_by_side(5, ["target", "values", "samples", "grid", "loss"])
    toy, limits = toys.get("rings"), (-4, 4, -4, 4)
    plotting.density(axes[0], toy.log_prob, limits, n=20)
    plotting.density(axes[1], toy.log_prob(torch.from_numpy(plotting.grid_points(limits, 20))).reshape(20, 20).numpy(), limits)
    plotting.samples(axes[2], toy.sample(50, seed=0).requires_grad_(), limits)
    plotting.warped_grid(axes[3], torch.randn(4, 10, 2))
    plotting.learning_curve(axes[4], [5.0, 4.0, 3.5], floor=3.0)
    assert isinstance(figure, Figure) and figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [ax.get_title() for ax in axes] == ["target", "values", "samples", "grid", "loss"]
    assert axes[0].title.get_fontsize() >= 14
    np.testing.assert_allclose(axes[0].images[0].get_array(), axes[1].images[0].get_array(), rtol=1e-5)


def test_grid_points_go_row_by_row_from_the_bottom_left():
    np.testing.assert_allclose(plotting.grid_points((0, 2, 10, 14), 2), [[0.5, 11], [1.5, 11], [0.5, 13], [1.5, 13]])


def test_density_stands_the_right_way_up():
    _, (ax,) = plotting.side_by_side(1)
    plotting.density(ax, lambda x: -(x - torch.tensor([1.0, -2.0])).square().sum(-1), (-3, 3, -3, 3), n=60)
    row, column = np.unravel_index(ax.images[0].get_array().argmax(), (60, 60))
    assert (column + 0.5) / 10 - 3 == pytest.approx(1, abs=0.06) and (row + 0.5) / 10 - 3 == pytest.approx(-2, abs=0.06)


# --- settings and the package

def test_settings(monkeypatch):
    monkeypatch.setenv("FLOWKIT_FAST", "1")
    assert settings.fast() and settings.steps(1000, 10) == 10
    monkeypatch.setenv("FLOWKIT_FAST", "0")
    assert not settings.fast() and settings.steps(1000, 10) == 1000
    monkeypatch.delenv("FLOWKIT_DEVICE", raising=False)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert settings.device() == torch.device("cuda" if gpu else "cpu")
        monkeypatch.setenv("FLOWKIT_FAST", "1")
        assert settings.device() == torch.device("cpu")
        monkeypatch.setenv("FLOWKIT_FAST", "0")
    monkeypatch.setenv("FLOWKIT_DEVICE", "meta")
    assert settings.device() == torch.device("meta")
    settings.seed(4)
    a = torch.rand(1).item(), np.random.rand()
    settings.seed(4)
    assert a == (torch.rand(1).item(), np.random.rand())


def test_every_public_name_resolves():
    assert all(getattr(flowkit, name) is not None for name in dir(flowkit))
    with pytest.raises(AttributeError, match="flowkit has no 'Couplings'"):
        flowkit.Couplings


@pytest.mark.parametrize("light", ["", ".settings", ".toys", ".plotting"])
def test_light_modules_load_no_layer(light):
    code = (f"import sys, flowkit{light}; loaded = [m for m in sys.modules if m.startswith('flowkit.') and m != 'flowkit{light}'];"
            f"heavy = [m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules]; print(loaded, heavy)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=flowkit.__path__[0] + "/..").stdout.strip()
    assert out == ("[] ['torch']" if light == ".toys" else "[] []")
