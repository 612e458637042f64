"""The live views without a browser: each is made, every control moved, every key pressed; the mathematics behind them is right."""
import ast
import asyncio
import itertools
import json
import math
import re
import subprocess
import sys
import threading

import ipywidgets
import numpy as np
import pytest
import torch
from test_package import code_lines, public
from torch import nn

import flowkit
from flowkit import widgets
from flowkit.core import Compose, Flow, StandardNormal
from flowkit.widgets import (
    divergences,
    fixed_point,
    linear_map,
    live_training,
    many_to_one,
    masked_net,
    modular_shift,
    noise_in_bins,
    paths,
    planar_fold,
    reduced_entropy,
    scene,
    sigmoids,
    vector_field,
)
from flowkit.widgets.change_of_variables import BASES, FAR, PRESETS, cubic, way
from flowkit.widgets.layer_by_layer import PRESETS as FLOWS
from flowkit.widgets.layer_by_layer import Journey
from flowkit.widgets.view import HERE, slider

# Every view there is, made small.
VIEWS = {
    "autoregressive": lambda: widgets.autoregressive(),
    "bend": lambda: widgets.bend(),
    "contraction": lambda: widgets.contraction(),
    "dequantize": lambda: widgets.dequantize(),
    "flow_in_time": lambda: widgets.flow_in_time(steps=4),
    "layers": lambda: widgets.layers(frames=12, points=100),
    "matrix": lambda: widgets.matrix(),
    "modulo": lambda: widgets.modulo(),
    "planar": lambda: widgets.planar(),
    "sigmoidal": lambda: widgets.sigmoidal(),
    "surjection": lambda: widgets.surjection(),
    "temperature": lambda: widgets.temperature(),
    "training": lambda: widgets.training(steps=3, size=16),
    "two_kl": lambda: widgets.two_kl(),
}


@pytest.fixture(params=sorted(VIEWS))
def view(request):
    made = VIEWS[request.param]()
    yield made
    if hasattr(made, "flow"):
        made.reset()            # or its thread would go on


def picture(view):
    return scene.pack([view.frames[view.at]])


def test_no_view_is_forgotten():
    assert set(VIEWS) == set(widgets.VIEWS)


def test_every_control_moves_the_picture(view):
    """A control that does nothing would be as bad as one that raises: each, moved alone, must change what is drawn."""
    for name, control in view.controls.items():
        view.reset()
        before = [scene.pack(view.frames), view.canvas.caption]
        if isinstance(control, ipywidgets.Dropdown):
            control.value = list(control.options)[-1]
        elif isinstance(control.value, bool):
            control.value = not control.value
        else:
            way = 3 * getattr(control, "step", 1)
            control.value = min(control.max, control.value + way) if control.value < control.max else control.value - way
        assert view.canvas.problem == ""
        if (type(view).__name__, name) != ("Training", "seed"):          # which tells only once it trains
            assert [scene.pack(view.frames), view.canvas.caption] != before, name
    view.reset()


def test_every_message_of_the_browser_is_understood(view):
    first = picture(view)
    for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "Home", "End", "1", "2", "9", " ", "r"):
        view.message({"type": "key", "key": key, "ask": 1})
    assert view.canvas.problem == "" and picture(view) == first, "r is a reset"
    for mark in (m for row in view.frames[0]["rows"] for p in row for m in p["marks"] if m["kind"] == "handles"):
        for index in range(len(mark["xy"])):
            before = picture(view)
            view.message({"type": "drag", "name": mark["name"], "index": index, "x": 1.23, "y": 0.77, "ask": 2})
            assert picture(view) != before, (mark["name"], index)
    view.message({"type": "settle", "ask": 3})
    view.message({"type": "settled", "frame": 0}, [b"png"])
    with pytest.raises(ValueError, match="type must be"):
        view.message({"type": "nonsense"})


def test_the_picture_is_drawn_without_a_browser_and_its_numbers_are_finite(view):
    assert view.png(40)[:8] == b"\x89PNG\r\n\x1a\n"
    for frame in view.frames:
        assert frame["label"]
        for panel in (p for row in frame["rows"] for p in row):
            for mark in panel["marks"]:
                assert all(np.isfinite(v).all() for v in mark.values() if isinstance(v, np.ndarray))
    assert len(view.canvas.caption) > 40 and view.canvas.caption[-1] == "."
    json.dumps(view.canvas.picture["frames"])


def test_the_page_by_itself_names_no_address(view, tmp_path):
    view.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(https?|wss?):|//[a-z]+\.[a-z]|import\s*\(|import .* from|fetch\(|XMLHttp", page.replace("http://www.w3.org", ""))
    assert page.count("<script") == page.count("</script>") == 1, "nothing in the data ends the script"
    for size in re.findall(r"font-size: (\d+)px", (HERE / "canvas.css").read_text()):
        assert int(size) >= 18


def test_a_fault_is_shown_and_raised(view):
    good = view.compute
    view.compute = lambda state, coarse: 1 / 0
    with pytest.raises(ZeroDivisionError):
        view.draw()
    assert view.canvas.problem == "ZeroDivisionError: division by zero"
    view.compute = good
    view.draw()
    assert view.canvas.problem == ""


def test_while_it_moves_it_is_coarse_and_at_rest_in_full():
    asked = []

    def compute(state, coarse):
        asked.append((state["a"], coarse))
        return [scene.frame([[scene.panel([], (0, 1, 0, 1))]], "here")]

    from flowkit.widgets.view import View, slider
    made = View("test", compute, "look", {"a": slider("a", 0.0, 0, 1, 0.1)}, steps=("a",))

    async def move():
        for _ in range(3):
            made.message({"type": "key", "key": "ArrowRight", "ask": 1})
        await asyncio.sleep(0.6)
    asyncio.run(move())
    assert [coarse for _, coarse in asked] == [False, True, True, True, False]
    assert asked[-1][0] == pytest.approx(0.3)
    asked.clear()
    made.message({"type": "key", "key": "ArrowRight", "times": 4, "ask": 2})         # steps that came meanwhile, in one
    assert asked == [(pytest.approx(0.7), False)]


def test_scenes_of_a_lecture_come_by_keys_and_each_begins_afresh():
    made = widgets.bend().hall("decreasing", {"steeper": {"preset": "squeezed together", "forget": True}}, "uniform base")
    assert made.canvas.hall and made.state["preset"] == "decreasing" and made.canvas.title.endswith("· 1 of 3: decreasing")
    first = picture(made)
    made.message({"type": "key", "key": "n", "ask": 1})
    assert made.state["forget"] and made.state["preset"] == "squeezed together" and made.canvas.title.endswith("· 2 of 3: steeper")
    second = picture(made)
    made.message({"type": "key", "key": "ArrowRight", "times": 3, "ask": 2})
    assert picture(made) != second
    made.message({"type": "key", "key": "r", "ask": 3})
    assert picture(made) == second, "R leads back to the scene's beginning"
    made.message({"type": "key", "key": "n", "times": 2, "ask": 4})
    assert picture(made) == first and not made.state["forget"], "after the last comes the first, with nothing left of the others"
    made.message({"type": "key", "key": "b", "ask": 5})
    assert made.state["base"] == "uniform" and made.canvas.title.endswith("· 3 of 3: uniform base")
    with pytest.raises(ValueError, match="there is no preset 'unform base'; there are one hump to two"):
        widgets.bend().hall("unform base")
    assert not widgets.bend().canvas.hall
    cells = widgets.layers(flowkit.Reverse(), frames=4, points=20).hall()       # no presets: no scenes
    cells.message({"type": "key", "key": "n", "ask": 1})
    assert cells.canvas.title == "Layers: from the data to the latents" and cells.canvas.problem == ""


def test_an_array_that_comes_again_is_sent_once():
    shared = np.zeros((5, 2), np.float32)
    frames = [scene.frame([[scene.panel([scene.points(shared)], (0, 1, 0, 1))]]) for _ in range(3)]
    spec, arrays = scene.pack(frames)
    assert len(arrays) == 1 and spec[2]["rows"][0][0]["marks"][0]["xy"] == {"at": 0, "type": "f4", "shape": [5, 2]}
    with pytest.raises(ValueError, match="box must be"):
        scene.panel([], (1, 0, 0, 1))


def test_flowkit_alone_does_not_load_the_widgets():
    code = "import sys, flowkit, flowkit.plotting, flowkit.core; assert not [m for m in sys.modules if m in ('anywidget', 'flowkit.widgets')]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])


def test_the_widgets_are_small():
    """An evening for the layers, half an hour for the frame, and a coffee for each view."""
    own = {path.stem: code_lines(path.read_text()) for path in HERE.glob("*.py")}
    views = {name: own.pop(name) for name in widgets.VIEWS.values()}
    assert sum(own.values()) < 640 and max(views.values()) < 240
    assert len((HERE / "canvas.mjs").read_text().splitlines()) < 600


def test_everything_public_says_what_it_does():
    trees = {path.name: ast.parse(path.read_text()) for path in HERE.glob("*.py")}
    assert [f"{name}: {node.name}" for name, tree in trees.items() for node in public(tree) if not ast.get_docstring(node)] == []
    assert all(map(ast.get_docstring, trees.values()))


# Colours

def seen(colours, matrix):
    """CIELAB of sRGB colours under a simulated deficiency (Machado et al. 2009, severity 1, in linear RGB)."""
    rgb = np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(matrix).T, 0, 1)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_colours_differ_for_everyone(name):
    """The smallest CIELAB distance of the sequence's pairs; matplotlib's default ten come to less than 3 for protanopes."""
    from flowkit.plotting import PALETTE
    lab = seen([PALETTE[c] for c in scene.SEQUENCE], DEFICIENCIES[name])
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 10, f"{apart.min():.1f}"


def test_the_canvas_has_the_same_colours():
    from flowkit.plotting import PALETTE
    text = (HERE / "canvas.mjs").read_text()
    for name in scene.SEQUENCE:
        assert f'{name}: "{PALETTE[name]}"' in text


# Paths within a layer

class Coupling(nn.Module):
    """As a student writes it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def halves(self, x1):
        answer = self.net(x1)
        return answer if isinstance(answer, tuple) else answer.chunk(2, -1)

    def forward(self, x):
        x1, x2 = x.chunk(2, -1)
        alpha, mu = self.halves(x1)
        return torch.cat([x1, x2 * alpha.exp() + mu], -1), alpha.sum(-1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, -1)
        alpha, mu = self.halves(z1)
        return torch.cat([z1, (z2 - mu) * (-alpha).exp()], -1)


class TwoNets(Coupling):
    def halves(self, x1):
        return 2 * torch.tanh(self.net[0](x1)), self.net[1].forward(x1)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)

    def inverse(self, z):
        return self.layer.inverse(z)


class Shear(nn.Module):
    """Its net is no attribute: there is nothing to scale."""

    def forward(self, x):
        return torch.stack([x[:, 0], x[:, 1] + torch.sin(2 * x[:, 0])], -1), x.new_zeros(len(x))

    def inverse(self, z):
        return torch.stack([z[:, 0], z[:, 1] - torch.sin(2 * z[:, 0])], -1)


def net(out=2):
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, out))


def linear(matrix):
    layer = flowkit.InvertibleLinear(2)
    layer.forward = lambda x: (x @ torch.tensor(matrix).T, torch.linalg.slogdet(torch.tensor(matrix))[1].expand(len(x)))
    return layer


LAYERS = {
    "a student's": (lambda: Coupling(net()), paths.SCALED),
    "with a function": (lambda: Coupling(lambda x1: torch.cat([0.8 * x1, x1 ** 2], -1)), paths.SCALED),
    "with a pair": (lambda: Coupling(lambda x1: (0.8 * x1, x1 ** 2)), paths.SCALED),
    "with two nets": (lambda: TwoNets(nn.ModuleList([net(1), net(1)])), paths.SCALED),
    "within another": (lambda: Wrapped(Coupling(net())), paths.SCALED),
    "flowkit's": (lambda: flowkit.Coupling(net()), paths.SCALED),
    "NICE": (lambda: flowkit.AdditiveCoupling(net(1)), paths.SCALED),
    "Flow++": (lambda: flowkit.MixCoupling(net(14), 4), paths.SCALED),
    "residual": (lambda: flowkit.Residual(flowkit.lipschitz_mlp(2, (16,))), None),
    "rotation and stretch": (lambda: linear([[0.0, -2.0], [0.5, 0.3]]), paths.TURNED),
    "reversal": (lambda: flowkit.Reverse(), paths.FLIPPED),
    "sheared by hand": (lambda: Shear(), paths.STRAIGHT),
    "planar": (lambda: flowkit.Planar(2), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_path_begins_with_nothing_and_ends_with_the_layer(name):
    torch.manual_seed(0)
    make, kind = LAYERS[name]
    layer = make()
    x = torch.randn(64, 2)
    path = paths.Path(layer, x)
    assert kind is None or path.kind == kind
    (start, none), (end, ldj) = path(x, 0.0), path(x, 1.0)
    with torch.no_grad():
        z, whole = layer.forward(x)
    assert torch.allclose(start, x, atol=1e-4) and torch.allclose(none, torch.zeros(64), atol=1e-4)
    assert torch.allclose(end, z, atol=1e-4) and torch.allclose(ldj, whole, atol=1e-4)
    if path.kind in (paths.SCALED, paths.TURNED):
        # Every frame is a map: its ldj is that of its own Jacobian.
        for tau in (0.3, 0.7):
            J = torch.stack([torch.autograd.functional.jacobian(lambda p: grad_path(path, p, tau), p) for p in x[:5]])
            assert torch.allclose(torch.linalg.slogdet(J)[1], path(x[:5], tau)[1], atol=1e-3)


def grad_path(path, point, tau):
    # Path.__call__ works without gradients; finite differences would do, the wrapped layer is at hand.
    if path.kind == paths.SCALED:
        path.tau = tau
        return path.layer.forward(point[None])[0][0]
    matrix, shift, angle, values, vectors = path.matrix
    return (paths._rotation(tau * angle) @ vectors @ torch.diag(values ** tau) @ vectors.T) @ point + tau * shift


def test_the_students_layer_is_left_as_it_was():
    torch.manual_seed(0)
    layer = Coupling(net())
    before, keys = layer.forward(torch.ones(3, 2))[0], set(vars(layer.net))
    widgets.layers(layer, frames=6, points=50)
    assert layer.training and set(vars(layer.net)) == keys
    assert torch.equal(layer.forward(torch.ones(3, 2))[0], before)


# layers

@pytest.mark.parametrize("name", FLOWS)
def test_the_density_that_travels_is_the_flows_own(name):
    """At the data, and at the latents; and at every stop the mesh carries the probability that it had."""
    flow = FLOWS[name](0)
    trip = Journey(flow, None, 200, 24, 0)
    n = trip.sizes[0]
    x, z = trip.stops[0][2][:n], trip.stops[-1][2][:n]
    with torch.no_grad():
        assert torch.allclose(trip.log_p, flow.log_prob(x), atol=1e-3)
        assert torch.allclose(trip.log_p - trip.stops[-1][3][:n], flow.base.log_prob(z), atol=1e-3)
    shares = trip.stops[-1][4]
    assert len(shares) == len(trip.paths)
    some = slice(n, n + trip.sizes[1])
    assert sum(shares) == pytest.approx(float(trip.stops[-1][3][some].mean()), abs=1e-4)


def test_a_wrong_inverse_is_named_and_a_missing_one_too():
    class Wrong(Coupling):
        def inverse(self, z):
            z1, z2 = z.chunk(2, -1)
            alpha, mu = self.halves(z1)
            return torch.cat([z1, (z2 - mu) * alpha.exp()], -1)

    class Missing(Coupling):
        def inverse(self, z):
            raise NotImplementedError("exercise coupling: inverse")

    torch.manual_seed(0)
    assert "inverse does not undo forward" in widgets.layers(Wrong(net()), frames=6, points=50).canvas.caption
    caption = widgets.layers(Missing(net()), frames=6, points=50).canvas.caption
    assert "inverse of Missing does not run (NotImplementedError" in caption
    right = widgets.layers(Coupling(net()), frames=6, points=50).canvas.caption
    assert "Careful" not in right and "straight" not in right
    assert "go straight" in widgets.layers(Shear(), frames=6, points=50).canvas.caption


# bend

@pytest.mark.parametrize("name", PRESETS)
def test_the_bent_line_goes_through_its_knots_and_its_slope_is_right(name):
    knots = PRESETS[name]["knots"]
    x = np.linspace(-6, 6, 20_001)
    z, log_slope = cubic(knots, x)
    kind = {"decreasing": "down", "turning: no inverse": "turning", "flat: no inverse": "flat"}.get(name, "up")
    assert way(lambda x: cubic(knots, x)) == kind
    if kind in ("up", "down"):
        assert (np.diff(z) > 0).all() or (np.diff(z) < 0).all()
    assert np.allclose(np.interp(knots[:, 0], x, z), knots[:, 1], atol=1e-3)
    assert np.allclose(np.abs(np.gradient(z, x))[5:-5], np.exp(log_slope)[5:-5], atol=5e-3)


def meter(view):
    """The three numbers under the bars: area in x, area in z, and the whole."""
    words = [m["words"] for m in view.frames[0]["rows"][1][1]["marks"] if m["kind"] == "text"]
    return [float(w) for w in words[::2]]


def test_equal_areas_and_what_forgetting_the_jacobian_does():
    made = widgets.bend()
    wide = np.linspace(-FAR, FAR, 400_001)
    for preset, values in PRESETS.items():
        made.set(preset=preset, forget=False)
        x, z, whole = meter(made)
        mapped, p_z = cubic(values["knots"], wide)[0], BASES[values["base"]][0]
        if preset.startswith("turning"):
            # Every z is counted once for each x that it has: the integral of p(z) times their number, counted here by crossings.
            levels = np.linspace(-6, 6, 1201)
            many = [np.count_nonzero((mapped[1:] > v) != (mapped[:-1] > v)) for v in levels]
            assert max(many) == 3 and whole == pytest.approx(np.trapezoid(p_z(levels) * many, levels), abs=0.02) and whole > 1.2
        else:
            assert x == pytest.approx(z, abs=0.011) and whole == pytest.approx(1, abs=0.011)
        made.set(forget=True)
        assert meter(made)[2] == pytest.approx(np.trapezoid(p_z(mapped), wide), abs=0.011)


def test_knots_stay_in_order_unless_the_map_may_turn():
    made = widgets.bend()
    made.message({"type": "drag", "name": "knot", "index": 1, "x": 99, "y": -99, "ask": 1})
    assert (np.diff(made.state["knots"], axis=0) > 0).all() and made.state["selected"] == 1
    made.set(preset="decreasing")
    for y in (99, -99):
        made.message({"type": "drag", "name": "knot", "index": 2, "x": -99, "y": y, "ask": 1})
        assert (np.diff(made.state["knots"], axis=0) * [1, -1] > 0).all()
    made.set(preset="turning: no inverse")
    made.message({"type": "drag", "name": "knot", "index": 2, "x": 0.1, "y": 3.5, "ask": 1})
    assert made.state["knots"][2].tolist() == pytest.approx([0.1, 3.5])


def test_a_falling_map_says_so_and_a_turning_one_is_no_density():
    made = widgets.bend()
    made.set(preset="decreasing")
    assert " down to " in made.frames[0]["label"] and "limits of the integral turn round" in made.canvas.caption
    made.set(preset="turning: no inverse", probe=-0.25)
    assert made.frames[0]["label"].endswith("3 x with one z") and "no density" in made.canvas.caption
    assert "no density" in made.frames[0]["rows"][1][0]["title"]


# matrix

def marks_of(frame, column, kind, row=0):
    return [m for m in frame["rows"][row][column]["marks"] if m["kind"] == kind]


def test_the_picture_of_a_matrix_has_its_area_and_its_orientation():
    """The drawn parallelogram is measured by the shoelace formula, and the drawn letter by the turn that it takes."""
    made = widgets.matrix()
    for preset, values in linear_map.PRESETS.items():
        for part in (1.0, 0.3):
            made.set(preset=preset, part=part)
            det = np.linalg.det((1 - part) * np.eye(2) + part * values["columns"].T)
            (image,) = marks_of(made.frames[0], 1, "area")
            x, y = image["xy"][0].T
            assert 0.5 * (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() == pytest.approx(det, abs=1e-5)
            stem, top = marks_of(made.frames[0], 1, "lines")[2]["xy"][:2]
            (a, b), (c, d) = stem[1] - stem[0], top[1] - top[0]
            assert b * c - a * d == pytest.approx(0.7 * 0.48 * det, abs=1e-5)
            assert float(re.search(r"det A = (\S+),", made.frames[0]["label"].replace("−", "-"))[1]) == pytest.approx(det, abs=0.006)
            outline = marks_of(made.frames[0], 1, "lines")[1]
            assert (outline["dash"] == "dashed") == ("turned over" in made.frames[0]["label"]) == (det < -1e-3)
    made.set(preset="singular", part=1.0)
    assert "no inverse" in made.frames[0]["label"]
    assert "product of the two" in (made.set(preset="triangular", part=1.0), made.canvas.caption)[1]


def test_a_matrix_of_ones_own():
    made = widgets.matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    assert "det A = −2.00" in made.frames[0]["label"] and made.state["columns"].tolist() == [[0, 1], [2, 0]]
    made.key("2")
    made.key("ArrowLeft", 4)
    assert made.state["columns"][1].tolist() == pytest.approx([1.8, 0])
    for wrong in (np.eye(3), [[np.nan, 0], [0, 1]]):
        with pytest.raises(ValueError, match="finite matrix of shape"):
            widgets.matrix(wrong)


# planar

def planar_map(state):
    w, u = (torch.from_numpy(v) for v in planar_fold.vectors(state))
    return lambda x: x + u * torch.tanh(x @ w + state["b"])[..., None]


@pytest.mark.parametrize("wu", [-3.0, -2.2, -1.1, -1.0, -0.7, 0.0, 1.5])
def test_the_fold_is_where_the_determinant_is_negative(wu):
    """Against the Jacobian by automatic differentiation."""
    made = widgets.planar()
    made.set(wu=wu, b=0.4)
    x = torch.from_numpy(np.random.default_rng(0).uniform(-3, 3, (2000, 2)))
    det = torch.linalg.det(torch.func.vmap(torch.func.jacrev(planar_map(made.state)))(x)).numpy()
    w, u = planar_fold.vectors(made.state)
    assert w @ u == pytest.approx(wu)
    edge = planar_fold.turn(wu)
    assert (edge is None) == (wu >= -1) == ("Folded" not in made.canvas.caption)
    if edge is None:
        assert det.min() >= 0
    else:
        band = np.abs(x.numpy() @ w + 0.4) < edge
        assert ((det < 0) == band).all() and 0.01 < band.mean() < 0.9
        assert [m["colour"] for m in marks_of(made.frames[0], 0, "area")] == ["orange"]
    low, high = re.search(r"from (\S+) to (\S+),", made.frames[0]["label"].replace("−", "-")).groups()
    assert float(low) - 0.01 <= det.min() and det.max() <= float(high) + 0.01


@pytest.mark.parametrize("wu", [-3.0, -1.2, -1.0, 0.8])
def test_all_points_that_share_a_z_are_shown(wu):
    """Against the sign changes along the line on which they must lie, z - t u."""
    made = widgets.planar()
    for point in np.random.default_rng(1).uniform(-1.5, 1.5, (20, 2)):
        made.set(wu=wu, point=point)
        found = planar_fold.preimages(made.state)
        assert np.allclose(planar_map(made.state)(torch.from_numpy(found)).numpy(), point, atol=1e-9)
        w, u = planar_fold.vectors(made.state)
        t = np.linspace(-1.01, 1.01, 40_001)
        rest = np.tanh((point - t[:, None] * u) @ w) - t
        assert len(found) == np.count_nonzero((rest[1:] > 0) != (rest[:-1] > 0))
        assert f"{len(found)} x for this z" in made.frames[0]["label"]
        (drawn,) = marks_of(made.frames[0], 0, "points")
        assert np.allclose(drawn["xy"], found, atol=1e-5)


def test_a_planar_layer_of_ones_own():
    torch.manual_seed(0)
    layer = flowkit.Planar(2)
    made = widgets.planar(layer)
    with torch.no_grad():
        x = torch.randn(50, 2)
        assert torch.allclose(planar_map(made.state)(x.double()).float(), layer.forward(x)[0], atol=1e-4)
        assert made.state["wu"] == pytest.approx(float(layer.constrained_u()[1]), abs=1e-4)
    layer.forward = lambda x: (x ** 3, x[:, 0])
    with pytest.raises(ValueError, match=r"is not x \+ u tanh"):
        widgets.planar(layer)
    with pytest.raises(ValueError, match="w of shape"):
        widgets.planar(flowkit.Reverse())


# autoregressive

def depends(masks, dim):
    """Which input each coordinate's parameters depend on, by the gradient of a net with these masks and positive weights."""
    def run(x):
        for mask in masks:
            x = torch.nn.functional.softplus(torch.as_tensor(mask, dtype=torch.float64) @ x)
        return x
    jacobian = torch.func.jacrev(run)(torch.zeros(dim, dtype=torch.float64))
    return (jacobian.reshape(-1, dim, dim) > 0).any(0).numpy()


def some_masks():
    yield "right", flowkit.made_masks(4, (6, 6), 2), None
    yield "another order", flowkit.made_masks(3, (4,), 3, order=[2, 0, 1]), [2, 0, 1]
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        yield f"random {i}", [(torch.rand(a, b, generator=generator) < 0.3).float() for b, a in ((3, 4), (4, 5), (5, 6))], None


@pytest.mark.parametrize("name, masks, order", list(some_masks()), ids=[name for name, *_ in some_masks()])
def test_reach_is_what_gradients_say_and_red_paths_are_all_the_forbidden_ones(name, masks, order):
    dim = masks[0].shape[1]
    made = widgets.autoregressive(masks, order=order)
    reach = masked_net.Reach(made.state["masks"], made.state["order"])
    sees = depends(masks, dim)
    assert (reach.sees == sees).all()
    rank = np.argsort(order or range(dim))
    tables = [np.asarray(m) != 0 for m in masks]
    assert len(made.frames) == dim + 1
    for k, i in enumerate(reach.order, start=1):
        drawn = {(m["colour"], m["dash"]): len(m["xy"]) for m in marks_of(made.frames[k], 0, "lines") if m["colour"] != "faint"}
        for wanted, key in ((False, ("red", "dashed")), (True, ("blue", "solid"))):
            edges = set()
            # Every way through the net, one unit a layer.
            for units in itertools.product(*(range(t.shape[1]) for t in tables), range(len(tables[-1]))):
                if units[-1] % dim == i and all(t[b, a] for t, a, b in zip(tables, units, units[1:])) and (rank[units[0]] < rank[i]) == wanted:
                    edges |= set(enumerate(zip(units, units[1:])))
            assert drawn.get(key, 0) == len(edges), (i, key)
    wrong = (sees & (rank[None] >= rank[:, None])).any()
    assert ("forbidden: " in made.canvas.caption) == wrong
    if name in ("right", "another order"):
        assert not wrong and not reach.missing.any()


def test_units_of_a_wide_net_that_are_alike_are_drawn_as_one():
    made = widgets.autoregressive(flowkit.MADE(5, 2, order=[4, 2, 0, 1, 3]))
    assert [m.shape for m in made.state["masks"]] == [(4, 5), (4, 4), (10, 4)] and made.state["order"] == [4, 2, 0, 1, 3]
    wide = [(torch.rand(a, b, generator=torch.Generator().manual_seed(a)) < 0.1).float() for b, a in ((3, 39), (39, 30), (30, 6))]
    merged = widgets.autoregressive(wide).state["masks"]
    assert len(merged[0]) < 39 and (masked_net.Reach(merged, range(3)).sees == depends(wide, 3)).all()


def test_the_presets_are_right_and_wrong_as_they_say():
    made = widgets.autoregressive()
    for preset in made.presets:
        made.set(preset=preset)
        reach = masked_net.Reach(made.state["masks"], made.state["order"])
        assert reach.forbidden.any() == preset.startswith("wrong"), preset
        assert (reach.missing.any() and not reach.forbidden.any()) == (preset == "one hidden unit"), preset


def test_passes_are_those_that_flowkit_makes():
    """MAF's net is asked once for the density and D times to sample (without MADE's shortcut); IAF's the other way round."""
    torch.manual_seed(0)
    asked = []
    made, z = flowkit.MADE(4, 2), torch.randn(3, 4)

    def net(x):
        asked.append(1)
        return made(x)

    def counted(f):
        asked.clear()
        f(z)
        return len(asked)

    maf, iaf = flowkit.MAF(net), flowkit.IAF(net)
    counts = {"MAF": {"density": counted(maf.forward), "sampling": counted(maf.inverse)},
              "IAF": {"density": counted(iaf.forward), "sampling": counted(iaf.inverse)}}
    view = widgets.autoregressive(made)
    for flow in ("MAF", "IAF"):
        view.set(flow=flow)
        for k, frame in enumerate(view.frames):
            words = [m["words"] for m in marks_of(frame, 2, "text")]
            for name, count in counts[flow].items():
                at = next(i for i, w in enumerate(words) if w.startswith(name))
                assert words[at + 1] == f"pass {min(k, count)} of {count}"


def test_masks_that_do_not_fit_are_named():
    good = flowkit.made_masks(3, (4,), 2)
    for masks, words in (([good[0].T, good[1]], "each mask"), ([good[0]], "P rows for each"), ([], "list of matrices"),
                         ([torch.eye(99)[:, :50], torch.eye(99)[:50]], "cannot be told apart"), (nn.Linear(2, 2), "no buffer with")):
        with pytest.raises(ValueError, match=words):
            widgets.autoregressive(masks)
    with pytest.raises(ValueError, match="permutation"):
        widgets.autoregressive(order=[0, 0, 1, 2])


# sigmoidal

@pytest.mark.parametrize("name", sigmoids.PRESETS)
def test_the_transformer_is_flowkits_and_its_inflections_are_where_autograd_says(name):
    made = widgets.sigmoidal()
    made.set(preset=name)
    a, b, w = (torch.from_numpy(v) for v in sigmoids.parameters(made.state))
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64, requires_grad=True)
    y, log_slope = flowkit.dsf(x, a, b, w)
    ours = sigmoids.transformer(x.detach().numpy(), *(v.numpy() for v in (a, b, w)))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    for mine, theirs in zip(ours, (y, log_slope.exp(), second)):
        assert np.allclose(mine, theirs.detach().numpy(), atol=1e-8)
    turns = sigmoids.inflections(*(v.numpy() for v in (a, b, w)))
    sign = (second > 0).numpy()[np.abs(second.numpy()) > 1e-7]
    at = x.detach().numpy()[np.abs(second.numpy()) > 1e-7]
    changes = at[:-1][sign[1:] != sign[:-1]]
    assert len(turns) == len(changes) and np.allclose(turns, changes, atol=0.003)
    assert made.frames[0]["label"].startswith(f"{len(turns)} inflection")


def test_the_humps_are_counted_and_the_curves_are_densities():
    made = widgets.sigmoidal()
    for preset, words in (("two humps of x", "2 humps of p(x)"), ("three humps of x", "3 humps of p(x)"), ("affine-like", "1 hump of p(x)"),
                          ("two humps of y", "2 humps of p(y)")):
        made.set(preset=preset)
        assert words in made.frames[0]["label"]
        for column, axis in ((0, 0), (3, 1)):
            curve = marks_of(made.frames[0], column, "lines")[0]["xy"][0]
            assert abs(np.trapezoid(curve[:, 1 - axis], curve[:, axis])) == pytest.approx(1, abs=0.01), (preset, column)


def test_weights_sum_to_one_and_a_choice_moves_nothing():
    made = widgets.sigmoidal([1.0, 20.0, 3.0], [0.0, 90.0, -1.0], [0.2, 0.3, 0.5])
    before = sigmoids.parameters(made.state)
    for digit in "3219":
        made.key(digit)
        assert np.allclose(sigmoids.parameters(made.state), before)
    for weight in (1.0, 0.25, 0.0, 0.6):
        made.set(weight=weight)
        assert sigmoids.parameters(made.state)[2].sum() == pytest.approx(1)
        assert sigmoids.parameters(made.state)[2][2] == weight
    made.key("1")
    made.set(weight=1.0)
    made.key("2")
    made.set(weight=0.4)
    assert sigmoids.parameters(made.state)[2].sum() == pytest.approx(1)
    for wrong in (([1.0], None, [1.0]), ([1.0, 2.0], [0.0], [1.0]), ([-1.0], [0.0], [1.0]), ([1.0], [0.0], [0.7])):
        with pytest.raises(ValueError):
            widgets.sigmoidal(*wrong)


# flow_in_time

def number(label, pattern):
    return float(re.search(pattern, label.replace("−", "-"))[1])


def test_eulers_steps_are_torchdiffeqs_and_rk4_comes_close_to_the_exact_flow():
    torch.manual_seed(0)
    field, x = vector_field.FIELDS["a swirl that turns"], torch.randn(50, 2)
    for solver, settings, close in (("Euler", {"solver": "euler", "steps": 7}, 1e-5), ("RK4", {"solver": "dopri5"}, 1e-3)):
        cnf = flowkit.CNF(field, **settings)
        y = vector_field._solve(field, x, "t = 0", solver, 7)
        z, ldj = cnf.forward(x)
        assert torch.allclose(y[-1, :, :2], z, atol=close) and torch.allclose(y[-1, :, 2], ldj, atol=close)
        y = vector_field._solve(field, x, "t = 1", solver, 7)
        back, ldj = cnf.inverse_and_ldj(x)
        assert torch.allclose(y[-1, :, :2], back, atol=close) and torch.allclose(y[-1, :, 2], -ldj, atol=close)


def test_the_density_of_three_clumps_comes_out_of_the_normal():
    field = vector_field.FIELDS["three clumps by diffusion"]
    trip = vector_field._all(field, "t = 1", "RK4", 40)
    n = vector_field.MESH ** 2
    x, log_p = trip[-1, :n, :2], vector_field._log_p(trip[-1, :n], trip[0, :n])
    away = (x[:, None] - vector_field._CLUMPS).square().sum(-1) / (2 * vector_field._WIDTH ** 2)
    exact = torch.logsumexp(-away, -1) - np.log(3 * 2 * np.pi * vector_field._WIDTH ** 2)
    inside = exact > -5
    assert inside.sum() > 500 and (log_p - exact)[inside].abs().max() < 0.15


def test_what_the_claimed_density_integrates_to():
    """Euler turns and stretches by 1 + (4 h)^2 a step where the trace says 1; RK4 and a field without error give one."""
    made = widgets.flow_in_time()
    for changes, whole in (({"preset": "rotation", "steps": 10}, (1 + 0.4 ** 2) ** 10), ({"preset": "rotation", "solver": "RK4"}, 1),
                           ({"preset": "source", "solver": "RK4"}, 1), ({"preset": "source", "solver": "Euler", "steps": 2}, 1.4 ** 4 / np.exp(1.6))):
        made.set(t=1.0, **changes)
        assert number(made.frames[0]["label"], r"integrates to (\S+)") == pytest.approx(whole, rel=0.01)
    made.set(preset="source", solver="RK4", steps=20, t=0.5)
    exact = -np.log(2 * np.pi) - 0.5 * (0.9 ** 2 + 0.6 ** 2) - 0.8
    assert number(made.frames[0]["label"], r"log p = (\S+) on") == pytest.approx(exact, abs=0.006)
    assert number(made.frames[0]["label"], r"exactly (\S+);") == pytest.approx(exact, abs=0.006)


def test_between_two_steps_there_is_a_shorter_one():
    field, state = vector_field.FIELDS["source"], {"normal": "t = 1", "t": 0.7}
    y = vector_field._solve(field, np.array([[1.0, 0.5]]), "t = 1", "Euler", 2)
    now = vector_field._at(field, y, state, "Euler", 2)
    assert torch.allclose(now[0], torch.tensor([1.0 * 0.76, 0.5 * 0.76, -0.3 * 1.6]), atol=1e-6)


@pytest.mark.parametrize("field, words", [
    (lambda t, x: x[:, :1], "f(t, x) must be a tensor of shape (3, 2), got (3, 1)"),
    (lambda t, x: x / (x - x), "f(t, x) must be finite"), (lambda t, x: x.detach() * 2, "gives no gradient"),
    (lambda t, x: torch.where(t > 0.5, x / 0, x), "must be finite"), (lambda x: x, "Careful: TypeError"),
])
def test_a_field_that_cannot_be_shown_is_named(field, words):
    made = widgets.flow_in_time(field)
    assert made.canvas.caption.startswith("Careful: ") and words in made.canvas.caption and made.canvas.problem == ""
    assert widgets.flow_in_time(vector_field.FIELDS["saddle"]).canvas.caption.startswith("Follow")


def test_a_field_of_ones_own_may_be_a_net():
    torch.manual_seed(0)
    field = flowkit.VectorField(2, (8,))
    made = widgets.flow_in_time(field, steps=3)
    assert made.state["normal"] == "t = 1" and made.state["steps"] == 3 and "Careful" not in made.canvas.caption
    assert all(p.grad is None and p.requires_grad for p in field.parameters())


# contraction

@pytest.mark.parametrize("name", fixed_point.PRESETS)
def test_the_error_falls_as_the_lipschitz_constant_says(name):
    made = widgets.contraction()
    made.set(preset=name)
    state = made.state
    it = fixed_point.Iteration(lambda x: state["scale"] * fixed_point.BRANCHES[state["branch"]](x), state["z"],
                               state["z"] if state["start"] is None else state["start"])
    assert it.lipschitz == pytest.approx(state["scale"], rel=1e-3)
    assert np.allclose(it.roots + it.g(it.roots), state["z"], atol=1e-9)
    n = np.arange(len(it.x))
    if state["scale"] < 1:
        assert len(it.roots) == 1 and it.fate == "there"
        assert (it.error <= it.error[0] * state["scale"] ** n + 1e-12).all()
        late = (it.error[1:] / it.error[:-1])[(it.error[1:] > 1e-7) & (it.error[1:] < 1e-2)]
        assert not len(late) or late[-1] == pytest.approx(abs(it.slope), abs=0.02)
        assert "< 1: one x for each z" in made.canvas.caption
    else:
        assert "nothing is promised" in made.canvas.caption
        fate, words, roots = {"three x": ("there", "3 x share this z", 3), "a cycle": ("cycle", "to and fro for ever", 1),
                              "runs away": ("away", "runs away", 1)}[name.partition(": ")[2]]
        assert it.fate == fate and words in made.canvas.caption and len(it.roots) == roots
    cobweb = marks_of(made.frames[0], 1, "lines")[-1]["xy"][0]
    assert np.allclose(cobweb[1:-1:2, 1], np.clip(it.x[1:state["n"] + 1], -50, 50), atol=1e-5)


def test_the_iteration_finds_what_flowkits_inverse_finds():
    torch.manual_seed(0)
    g = flowkit.lipschitz_mlp(1, (16,))
    made = widgets.contraction(g)
    made.set(n=30, z=1.3)
    with torch.no_grad():
        x = float(flowkit.Residual(g).inverse(torch.tensor([[1.3]])))
    assert number(made.frames[0]["label"], r"x_30 = (\S+),") == pytest.approx(x, abs=1e-4)
    made.message({"type": "drag", "name": "start", "index": 0, "x": -2.0, "y": 0.0, "ask": 1})
    assert made.state["start"] == -2 and number(made.frames[0]["label"], r"x_30 = (\S+),") == pytest.approx(x, abs=1e-4)
    made.message({"type": "drag", "name": "z", "index": 0, "x": 9.0, "y": -1.0, "ask": 1})
    assert made.state["z"] == -1


@pytest.mark.parametrize("g, words", [
    (lambda x: x[:, 0], "g(x) must be a tensor of shape"), (lambda x: x.log(), "g(x) must be finite"), (lambda x: 3, "got int"),
    (lambda x: {}["g"], "Careful: KeyError"),
])
def test_a_branch_that_cannot_be_shown_is_named(g, words):
    made = widgets.contraction(g)
    assert made.canvas.caption.startswith("Careful: ") and words in made.canvas.caption


# modulo

def test_bars_only_change_places_unless_sigma_has_no_inverse():
    """The heights as they are drawn, for every sigma of some K."""
    made = widgets.modulo()
    for K in (2, 4, 6, 7, 12):
        for sigma in range(K):
            made.set(K=K, sigma=sigma, mu=K // 2)
            upper, lower = (m["boxes"] for m in marks_of(made.frames[0], 0, "bars"))
            p, z = upper[:, 3] - upper[:, 2], np.round((lower[:, 0] + lower[:, 1]) / 2).astype(int)
            assert (z == (sigma * np.arange(K) + K // 2) % K).all()
            assert np.allclose(lower[:, 3] - lower[:, 2], p, atol=1e-6), "the same height, whatever is below it"
            for k in set(z):
                pile = lower[z == k]
                assert pile[:, 3].max() - pile[:, 2].min() == pytest.approx(p[z == k].sum(), abs=1e-6), "one on top of the other"
            one_to_one = len(set(z)) == K
            assert one_to_one == (np.gcd(sigma, K) == 1) == ("no bijection" not in made.canvas.caption)
            if one_to_one:
                x = flowkit.discrete.modular_unshift(torch.arange(K), K // 2, sigma, K)
                assert (z[x.numpy()] == np.arange(K)).all()


@pytest.mark.parametrize("shift, words", [
    (flowkit.discrete.modular_shift, None), (lambda x, mu, sigma, K: (x * sigma + mu) % K, None),
    (lambda x, mu, sigma, K: x + 1, "integers from 0 to 6"), (lambda x, mu, sigma, K: ((x + mu) * sigma) % K, "at x = 0 your z is 6"),
    (lambda x, mu, sigma, K: (x * sigma + mu).float() % K, "integers from 0 to 6"), (lambda x, mu, sigma, K: x[:2], "shape (7,), got (2,)"),
    (lambda x, mu, sigma, K: x.nothing, "AttributeError"),
])
def test_a_shift_of_ones_own(shift, words):
    made = widgets.modulo(shift)
    made.set(preset="shift and scale")
    assert ("Careful" not in made.canvas.caption) if words is None else words in made.canvas.caption
    made.set(preset="σ = 2, K = 6: no inverse")
    if shift is flowkit.discrete.modular_shift:
        assert made.canvas.caption.startswith("Your shift refuses σ = 2 for K = 6, as it should") and "no bijection" in made.canvas.caption


def test_a_dragged_bar_takes_from_the_others():
    made = widgets.modulo()
    (handle,) = marks_of(made.frames[0], 0, "handles")
    before = modular_shift.probabilities(made.state)
    made.message({"type": "drag", "name": "bar", "index": 4, "x": 0.0, "y": float(handle["xy"][1, 1]), "ask": 1})
    after = modular_shift.probabilities(made.state)
    assert after.sum() == pytest.approx(1) and after[4] == pytest.approx(before[1], abs=1e-6) and (np.delete(after, 4) < np.delete(before, 4)).all()


# dequantize

@pytest.mark.parametrize("name", noise_in_bins.PRESETS)
def test_every_noise_gives_a_bound_and_the_best_one_is_exact(name):
    state = noise_in_bins.PRESETS[name]
    bins = noise_in_bins.Bins(4, lambda v: noise_in_bins._shape(state, 4, v))
    fine = (np.arange(4 * 5000) + 0.5) / 5000
    assert np.allclose(np.exp(bins.log_p(fine)).reshape(4, 5000).mean(1), np.exp(bins.log_P), atol=1e-5) and np.exp(bins.log_P).sum() == pytest.approx(1)
    bounds = np.stack([bins.bound(bins.tilted(towards)) for towards in np.linspace(0, 1, 6)])
    assert np.allclose(bounds[0], bins.uniform) and np.allclose(bounds[-1], bins.log_P)
    assert (np.diff(bounds, axis=0) >= -1e-12).all() and (bounds <= bins.log_P + 1e-12).all()
    gap = (bins.tilted(0.4) * np.log(bins.tilted(0.4) / bins.best)).mean(1)
    assert np.allclose(bins.log_P - bounds[2], gap), "the gap is the divergence from the best"
    assert (bins.log_P - bins.uniform > 0.01).any() == (name != "flat in each bin")


def beta(wrong=0.0):
    """A proposal whose shape differs from bin to bin."""
    def q(x):
        law = torch.distributions.Beta(1 + (x[:, 0] == 1) * 2.0, 1 + (x[:, 0] == 2) * 2.0)
        u = law.sample()
        return u[:, None], law.log_prob(u) - wrong
    return q


def test_a_proposal_of_ones_own():
    made = widgets.dequantize(beta())
    assert made.canvas.caption.startswith("Your q in purple")
    exact, uniform, ours = (number(made.frames[0]["label"], pattern) for pattern in (r"P\(x\) = ([^,]+),", r"noise ([^,]+),", r"q (\S+)$"))
    assert uniform < ours < exact
    # Against quadrature: Beta(3, 1) in bin 1 and its mirror image in bin 2; 0.02 is above five standard errors.
    bins = noise_in_bins.Bins(4, lambda v: noise_in_bins._shape(made.state, 4, v))
    q = np.stack([np.ones_like(bins.u), 3 * bins.u ** 2, 3 * (1 - bins.u) ** 2, np.ones_like(bins.u)])
    assert ours == pytest.approx(np.exp(bins.log_P) @ bins.bound(q), abs=0.05)
    heights = marks_of(made.frames[0], 0, "bars", row=1)[0]["boxes"][:, 3].reshape(4, -1)
    assert np.allclose(heights.mean(1), 1)
    made.set(seed=1)
    assert number(made.frames[0]["label"], r"q (\S+)$") != ours


@pytest.mark.parametrize("q, words", [
    (beta(wrong=1.0), "your bound is"), (lambda x: (torch.rand(x.shape), torch.zeros(x.shape)), "log_q must be a tensor of shape (8000,)"),
    (lambda x: (torch.rand(x.shape) + 0.5, torch.zeros(len(x))), "u must lie in [0, 1]"), (lambda x: torch.rand(x.shape), "must return u and log_q"),
    (lambda x: (torch.rand(x.shape), torch.rand(len(x)) / 0), "log_q must be finite"), (lambda x: 1 / 0, "ZeroDivisionError"),
])
def test_a_proposal_that_is_none_is_named(q, words):
    caption = widgets.dequantize(q).canvas.caption
    assert caption.startswith("Careful: ") and words in caption


def test_a_density_of_ones_own_in_the_bins():
    base = torch.distributions.Beta(2.0, 3.0)
    made = widgets.dequantize(levels=8, log_prob=lambda y: base.log_prob(y)[:, 0])
    y = np.linspace(0, 1, 9)
    exact = np.diff(6 * y ** 2 - 8 * y ** 3 + 3 * y ** 4)
    (words,) = ([float(m["words"]) for m in marks_of(made.frames[0], 0, "text")],)
    assert words == pytest.approx(exact, abs=0.006) and number(made.frames[0]["label"], r"P\(x\) = ([^,]+),") == pytest.approx(exact @ np.log(exact), abs=1e-3)
    assert "log_prob(y) must be" in widgets.dequantize(log_prob=lambda y: y).canvas.caption
    with pytest.raises(ValueError, match="levels must lie"):
        widgets.dequantize(levels=1)


# surjection

@pytest.mark.parametrize("dim, kind", [(1, "half"), (2, "half"), (1, "any"), (2, "any"), (2, "sorted"), (2, "tilted")])
def test_the_bases_draw_from_their_densities(dim, kind):
    """The integral is one; the samples' means are the density's, to five standard errors (seeded; two-sided error 6e-7 each)."""
    base, line = many_to_one.Base(dim, kind), np.linspace(-12, 12, 961)
    x = line[:, None] if dim == 1 else many_to_one._plane(line)
    p = np.exp(base.log_prob(x)) * (line[1] - line[0]) ** dim
    assert p.sum() == pytest.approx(1, abs=5e-3)
    drawn, f = base.sample(4000, 0), lambda x: np.concatenate([x, np.cos(2 * x), x[:, :1] * x[:, -1:]], 1)
    assert (np.abs(f(drawn).mean(0) - p @ f(x) / p.sum()) < 5 * f(drawn).std(0) / np.sqrt(4000) + 5e-3).all()


@pytest.mark.parametrize("name", many_to_one.LAYERS)
def test_the_one_point_and_all_that_share_its_z(name):
    made = widgets.surjection()
    made.set(preset=name, a=0.9)
    layer, label = many_to_one.LAYERS[name](), made.frames[0]["label"]
    one = many_to_one.Whole(layer, 0)
    assert one.integral == pytest.approx(1, abs=0.02 if not one.bound else 0.1) and "Careful" not in made.canvas.caption
    rings = [marks_of(made.frames[0], column, "points")[-1]["xy"] for column in (0, 1)]
    here = np.array([[0.9, -0.6]][:1])[:, :one.dim]
    z, contribution = one.forward(here)
    if one.bound:
        assert np.allclose(rings[1][:, 0], 0.9, atol=1e-5) and len(np.unique(rings[1][:, 1])) == many_to_one.MANY
        exact = np.interp(one.low[:, 0], np.linspace(-3.5, 3.5, many_to_one.LINE), one.p)
        assert (one.low[:, 1] < exact + 1e-6).all()
        assert np.allclose(one.low[:, 1], exact, atol=1e-5) == (name == "slice, the best q")
    else:
        x = rings[0] if one.dim == 2 else rings[0][:, :1]
        assert np.allclose(one.forward(x.astype(float))[0], z, atol=1e-5), "they share the z"
        assert f"{len(np.unique(x.round(3), axis=0))} different x" in label and len(np.unique(x.round(3), axis=0)) > 1
        total = number(label, r"= (\S+); ∫")
        assert total == pytest.approx(float(one.base.log_prob(z)[0] + contribution[0]), abs=0.006)


def changed(layer, forward=None, inverse=None):
    """A layer whose answers are altered: forward(z, contribution) -> the pair, inverse(x) -> x."""
    class Changed:
        def forward(self, x):
            return forward(*layer.forward(x)) if forward else layer.forward(x)

        def inverse(self, z):
            return inverse(layer.inverse(z)) if inverse else layer.inverse(z)
    return Changed()


@pytest.mark.parametrize("name, forward, inverse, words", [
    ("abs", lambda z, c: (z, 0 * c), None, "integrates to 2.00"), ("sort", lambda z, c: (z, -c), None, "integrates to 4.00"),
    ("max", lambda z, c: (z, c + 0.7), None, "integrates to 2.0"), ("slice", lambda z, c: (z, -c), None, "−log q of the draw"),
    ("slice", lambda z, c: (z, 0 * c), None, "−log q of the draw"), ("slice, the best q", lambda z, c: (z, c + 0.2), None, "above log p(x)"),
    ("abs", None, lambda x: 2 * x, "forward(inverse(z)) is not z"), ("slice", None, lambda x: x + 1, "inverse(forward(x)) is not x"),
    ("sort", lambda z, c: (z, c[:, None]), None, "the contribution must be a tensor of shape"), ("max", lambda z, c: (z / 0, c), None, "z must be finite"),
    ("abs", lambda z, c: z, None, "forward must give z"), ("abs", None, lambda x: 1 / 0, "ZeroDivisionError"),
])
def test_a_surjection_that_is_wrong_is_named(name, forward, inverse, words):
    caption = widgets.surjection(changed(many_to_one.LAYERS[name](), forward, inverse)).canvas.caption
    assert caption.startswith("Careful: ") and words in caption
    assert "Careful" not in widgets.surjection(changed(many_to_one.LAYERS[name]())).canvas.caption


# two_kl

def normals(q):
    q = torch.as_tensor(q)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(q[:, 2]), torch.distributions.Normal(q[:, 0], q[:, 1]))


@pytest.mark.parametrize("q", [[[0.6, 0.8, 1.0]], [[-2.0, 0.3, 0.3], [1.0, 1.5, 0.7]]], ids=["one", "two"])
def test_both_divergences_are_those_of_torch_and_their_gradients_autograds(q):
    log_p = divergences.target(widgets.two_kl().state)
    line, q = torch.from_numpy(divergences.LINE), torch.tensor(q, dtype=torch.float64)
    moved = [v.clone().requires_grad_() for v in (q[:, 0], q[:, 1].log(), q[:, 2].log())]
    log_q = normals(torch.stack([moved[0], moved[1].exp(), moved[2].softmax(0)], 1)).log_prob(line)
    p = torch.from_numpy(log_p)
    wanted = torch.stack([(p.exp() * (p - log_q)).sum(), (log_q.exp() * (log_q - p)).sum()]) * divergences.STEP
    assert np.allclose(divergences.both(log_p, q.numpy()), wanted.detach(), atol=1e-9)
    assert np.exp(log_p).sum() * divergences.STEP == pytest.approx(1, abs=1e-9)
    for loss, value in zip(divergences.LOSSES, wanted):
        gradient = torch.stack(torch.autograd.grad(value, moved, retain_graph=True), 1)
        assert np.allclose(divergences.gradient(q.numpy(), log_p, loss), gradient, atol=1e-7)


@pytest.mark.parametrize("name", divergences.PRESETS)
def test_every_step_goes_down_and_covers_or_seeks(name):
    made = widgets.two_kl()
    made.set(preset=name)
    state, log_p = made.state, divergences.target(made.state)
    path = [divergences.components(state)]
    for _ in range(divergences.MOST):
        path.append(divergences.descend(path[-1], log_p, state["loss"]))
    losses = np.array([divergences.both(log_p, q) for q in path])[:, divergences.LOSSES.index(state["loss"])]
    assert (np.diff(losses) <= 0).all() and losses[-1] < losses[0]
    made.set(n=divergences.MOST)
    end = path[-1]
    shown = [number(made.frames[0]["label"], rf"{re.escape(kl)} = (\S+?)[, ]") for kl in divergences.LOSSES]
    assert shown == pytest.approx(divergences.both(log_p, end), abs=0.006)
    middle = float((np.exp(log_p) * divergences.LINE).sum() * divergences.STEP)
    spread = math.sqrt(float((np.exp(log_p) * divergences.LINE ** 2).sum() * divergences.STEP) - middle ** 2)
    if "covers" in name:        # a normal's maximum likelihood has p's own mean and spread
        assert end[0, :2] == pytest.approx([middle, spread], abs=0.01)
    elif "left" in name or "seeks" in name:
        assert end[0, :2] == pytest.approx([-2.2 if "left" in name else 2.2, divergences.WIDTH], abs=0.03)
        assert losses[-1] == pytest.approx(-math.log(0.6 if "left" in name else 0.4), abs=0.02), "the other hump is all that is missed"
    elif len(end) == 2:
        assert losses[-1] < 1e-3
    if state["kind"] == divergences.KINDS[0]:
        land = divergences.basin(log_p, state["loss"])
        row, column = np.unravel_index(land.argmin(), land.shape)
        q = [[np.linspace(*divergences.X, land.shape[1])[column], np.linspace(divergences.NARROW, divergences.WIDE, land.shape[0])[row], 1.0]]
        assert land.min() == pytest.approx(divergences.both(log_p, np.array(q))[divergences.LOSSES.index(state["loss"])], abs=2e-3)
        assert land.min() <= losses[-1] + 0.05


def test_keys_step_down_either_divergence_from_where_q_is():
    made = widgets.two_kl()
    made.message({"type": "drag", "name": "basin", "index": 0, "x": 1.0, "y": 2.0, "ask": 1})
    assert made.state["start"].tolist() == [[1.0, 2.0, 1.0]] and "q = N(1.00, 2.00²)" in made.frames[0]["label"]
    for key, loss, n in (("1", 0, 1), ("1", 0, 2), ("2", 1, 1), ("2", 1, 2), ("9", 1, 2)):
        before = divergences.both(divergences.target(made.state), made.state["start"])
        made.message({"type": "key", "key": key, "ask": 2})
        assert (made.state["loss"], made.state["n"]) == (divergences.LOSSES[loss], n), (key, before)
    assert made.state["start"].tolist() != [[1.0, 2.0, 1.0]], "the second way down begins where the first had come to"
    made.message({"type": "drag", "name": "q", "index": 0, "x": -1.0, "y": 1 / math.sqrt(2 * math.pi), "ask": 3})
    assert made.state["n"] == 0 and np.allclose(made.state["start"], [[-1.0, 1.0, 1.0]])
    made.set(kind=divergences.KINDS[1])
    assert made.frames[0]["label"].endswith("nats") and len(divergences.components(made.state)) == 2
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        widgets.two_kl(share=1.0)


# temperature

@pytest.mark.parametrize("name", reduced_entropy.TARGETS)
def test_cold_latents_against_a_cold_density(name):
    one = reduced_entropy.Cooled(name)
    p = normals(reduced_entropy.TARGETS[name])
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    z = np.interp(x, reduced_entropy.LINE, one.z)
    assert np.allclose(torch.special.ndtr(torch.from_numpy(z)), p.cdf(x), atol=1e-4)
    for T in (0.3, 0.5, 1.0, 1.4):
        reduced, annealed = one.reduced(T), one.annealed(T)
        for log_density in (reduced, annealed):
            assert np.exp(log_density).sum() * reduced_entropy.STEP == pytest.approx(1, abs=2e-3)
        # What f makes of many evenly spread latents, against the density's own probability on one side of each x.
        draws = one.x_of(T * torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000).numpy())
        below = np.cumsum(np.exp(reduced)) * reduced_entropy.STEP
        assert np.allclose(np.interp(x, reduced_entropy.LINE, below), (draws[:, None] <= x.numpy()).mean(0), atol=0.02)
        same = np.abs(np.exp(reduced) - np.exp(annealed)).sum() * reduced_entropy.STEP
        assert same < 1e-6 if "affine" in name or T == 1 else same > 0.02
    assert float(p.cdf(torch.tensor(one.x_of(0.0)))) == pytest.approx(0.5, abs=1e-3), "f(0) is the median"
    made = widgets.temperature()
    made.set(preset=name, T=0.5)
    assert number(made.frames[0]["label"], r"entropy (\S+) nats") == pytest.approx(reduced_entropy.entropy(one.reduced(0.5)), abs=0.006)
    assert ("affine" in made.canvas.caption) == ("affine" in name)
    made.message({"type": "key", "key": "2", "ask": 1})
    assert made.state["T"] == 0.5 and made.state["target"] == list(reduced_entropy.TARGETS)[1], "another p at the same temperature"


# training

def test_it_trains_and_records_itself():
    torch.manual_seed(0)
    made = widgets.training(steps=25, size=64)
    losses = made.train()
    assert len(losses) == 25 and made.state_now == "done" and len(made.frames) >= 2
    assert made.frames[-1]["label"].startswith("batch 25 of 25")
    assert made._curve[-1][1] < made._curve[0][1] - 0.3
    assert not made.canvas.picture["live"] and len(made.canvas.picture["frames"]) == len(made.frames)


def test_pause_step_and_reset_while_a_cell_awaits_it():
    made = widgets.training(steps=10_000, size=16)
    begin = {k: v.clone() for k, v in made.flow.state_dict().items()}

    async def until(condition):
        for _ in range(1500):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise TimeoutError

    async def cell():
        running = asyncio.create_task(made.run())
        await until(lambda: made.step >= 3)
        made.key(" ")
        await asyncio.sleep(0.5)            # the batch that is on its way may end
        at = made.step
        await asyncio.sleep(0.5)
        assert made.state_now == "paused" and made.step == at and not running.done()
        made.key("ArrowRight")
        await until(lambda: made.frames[-1]["label"].startswith(f"batch {at + 1} "))
        await asyncio.sleep(0.2)
        assert made.state_now == "paused" and made.step == at + 1
        made.key("r")
        await running
    asyncio.run(cell())
    assert made.state_now == "ready" and made.step == 0 and len(made.frames) == 1
    assert all(torch.equal(v, begin[k]) for k, v in made.flow.state_dict().items())


def test_the_loop_may_be_a_students_and_its_error_comes_out():
    seen = []

    def fit(flow, batches):
        seen.extend(len(x) for x in batches)
        return [0.0] * len(seen)

    def broken(flow, batches):
        next(batches)
        raise NotImplementedError("exercise train_flow")

    assert widgets.training(fit=fit, steps=4, size=8).train() == [0.0] * 4 and seen == [8] * 4
    with pytest.raises(NotImplementedError, match="train_flow"):
        widgets.training(fit=broken, steps=4, size=8).train()


def test_the_film_stays_short(monkeypatch):
    monkeypatch.setattr(live_training, "FILM", 8)
    made = widgets.training(steps=40, size=8)
    monkeypatch.setattr(made, "_gate", lambda: made._record())
    made.train()
    assert len(made.frames) <= 8 and made.frames[0]["label"].startswith("batch 0 ") and made.frames[-1]["label"].startswith("batch 40 ")


def test_no_thread_is_left():
    made = widgets.training(steps=10_000, size=8)
    made.go_on()
    made.reset()
    assert not [t for t in threading.enumerate() if t.daemon and "_work" in t.name]


# explore

def normal(*layers, dim=2):
    return Flow(StandardNormal(dim), Compose(list(layers)))


def test_explore_picks_the_view():
    torch.manual_seed(0)
    assert "Layers" in widgets.explore(normal(flowkit.Coupling(net())), frames=4, points=20).canvas.title
    assert "Layers" in widgets.explore([Coupling(net()), flowkit.Reverse()], frames=4, points=20).canvas.title
    line = widgets.explore(normal(flowkit.ActNorm(1), dim=1))
    assert "Bend" in line.canvas.title
    assert meter(line)[2] == pytest.approx(1, abs=0.011)


@pytest.mark.parametrize("given, title", [
    (lambda: torch.eye(2), "Matrix"), (lambda: flowkit.made_masks(4, (5,), 2), "Autoregressive"), (lambda: flowkit.MADE(4, 2), "Autoregressive"),
    (lambda: flowkit.MADE(2, 2), "Autoregressive"), (lambda: normal(flowkit.MAF(flowkit.MADE(4, 2)), dim=4), "Autoregressive"),
    (lambda: flowkit.Planar(2), "Planar"), (lambda: (torch.ones(2), torch.zeros(2), torch.tensor([0.3, 0.7])), "Sigmoidal"),
])
def test_explore_shows_what_is_no_flow_of_the_plane(given, title):
    assert widgets.explore(given()).canvas.title.startswith(title)


@pytest.mark.parametrize("given, words", [
    (lambda: torch.eye(3), "It cannot be shown: A must be a finite matrix"),
    (lambda: [torch.ones(3, 2), torch.ones(2, 2)], "It cannot be shown: each mask"),
    (lambda: Coupling, "Coupling is a class: make a layer of it first"),
    (lambda: 3, "int has no forward"),
    (lambda: flowkit.Abs(), "Abs is no bijection"),
    (lambda: normal(flowkit.Coupling(nn.Linear(3, 6)), dim=6), "Flow lives in 6 dimensions"),
    (lambda: flowkit.Coupling(nn.Linear(3, 6)), "Coupling cannot be asked about points of the plane"),
    (lambda: Coupling(nn.Linear(1, 3)), "cannot be asked about points of the plane"),
])
def test_explore_says_why_not(given, words):
    said = widgets.explore(given())
    assert words in repr(said) and repr(said).count("\n") == 0 and said.endswith(".") and words[:9] in said._repr_html_()


def test_a_slider_counts_its_places():
    """The browser knows an index only, so that nothing comes back rounded; what a layer brings is shown as it is."""
    made = slider("w.u", -0.7312345, -3.0, 2.0, 0.05)
    assert made.value == -0.7312345 and len(set(made._options_labels)) == len(made.options)
    for value, nearest in ((-5.0, -3.0), (0.234, 0.23), (0.55, 0.55), (9.0, 2.0)):
        made.value = value
        assert made.value == nearest and made.options[made.index][1] == nearest
    for index in range(len(made.options)):              # as the browser says it
        made.index = index
        assert made.index == index and made.value == made.options[index][1]
