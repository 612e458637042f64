"""View 3, `layers`: what each layer of a flow does to the plane, from the data to the latents, step by step.

Inside a layer alpha and mu grow from 0 to their full size (paths.py), so that every frame is an invertible map of its own
and not a blend of two pictures. Beside it the density that goes with the points, and each layer's share of

    log p(x) = log p(z) + sum over the layers of log|det dz_i / dz_(i-1)|.
"""
import functools
import math

import numpy as np
import torch

from ..core import Compose, Flow, StandardNormal
from ..coupling import Coupling
from ..linear import Reverse
from ..live import bar
from . import scene
from .paths import FLIPPED, STRAIGHT, Path, steps_of
from .view import View, dropdown, seed

MESH = 81            # nodes each way of the two nets on which the density is carried along
LINES, ALONG = 13, 121
SIZE = 120           # pixels each way of a density's picture
REACH = 3.7          # a normal base is shown to this many standard deviations


def layers(flow=None, target=None, points=1000, frames=96, start=0):
    """Step through a flow on the plane: grid, points, density, and a stacked bar of the layers' log-determinants (nats).

    flow: a Flow, a layer or a list of layers, of flowkit's or your own, anything with forward(x) -> (z, ldj) and inverse(z) -> x
    for x (N, 2); without a base of its own the latents are standard normal. None shows flows made up from the seed. It is
    copied, so nothing here changes it. target: a toy whose samples are shown; without one, the flow's own samples.
    points: how many. frames: about how many pictures in all. start: the seed.
    Raises ValueError, in one sentence, if the flow cannot be shown.
    """
    controls = {"grid": dropdown("grid", ["of the latents", "of the data"]), "seed": seed(start)}
    if flow is None:
        controls = {"flow": dropdown("flow", list(PRESETS)), **controls}
    journey = {}

    def compute(state, coarse):
        wanted = (state.get("flow"), state["seed"])
        if journey.get("of") != wanted:
            shown = flow if flow is not None else PRESETS[state["flow"]](state["seed"])
            journey.update(of=wanted, trip=Journey(shown, target, points, frames, state["seed"]))
        return journey["trip"].frames(state["grid"])

    def caption(state):
        return journey["trip"].caption()

    return View("Layers: from the data to the latents", compute, caption, controls, rate=20, stride=12)


class Journey:
    """All that a flow's layers do to a mesh, a grid and points, on their way from data to latents."""

    def __init__(self, flow, target, count, frames, seed):
        steps = steps_of(flow)
        base = getattr(flow, "base", None) or StandardNormal(2)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            like = next((p for step in steps if hasattr(step, "parameters") for p in step.parameters()), torch.zeros(()))
            z = base.sample((4000,)).to(like.detach())
            if z.shape[-1:] != (2,) or z.ndim != 2:
                raise ValueError(f"layers draws the plane, and this flow's latents have the shape {tuple(z.shape[1:])}")
            reach = _square(z.quantile(0.0005, 0), z.quantile(0.9995, 0)) if not isinstance(base, StandardNormal) else (-REACH, REACH) * 2
            mesh = torch.from_numpy(_lattice(reach, MESH)).to(z)
            self.trouble = []
            x = target.sample(count, seed=seed).to(z) if target is not None else _inverse(steps, z[:count], self.trouble)
            mesh_x = _inverse(steps, mesh, self.trouble)
            if mesh_x is None or x is None:       # no way back: the data's own plane is all there is
                x = x if x is not None else z[:count]
                mesh_x = mesh
            self.data_box = _square(x.quantile(0.005, 0), x.quantile(0.995, 0), 0.15)
            # Two nets: one that is square among the data and one among the latents, each good where it is not torn wide.
            mesh_x = torch.cat([mesh_x, torch.from_numpy(_lattice(_shrunk(self.data_box, 1.3), MESH)).to(z)])
            grids = [torch.from_numpy(scene.grid(box, LINES, ALONG)).to(z).reshape(-1, 2) for box in (_shrunk(reach), self.data_box)]
            grids[0] = _inverse(steps, grids[0], []) if not self.trouble else grids[1]
            if not self.trouble:
                away = (_run(steps, x)[0] - z[:count]) if target is None else _inverse(steps, _run(steps, x)[0], []) - x
                if float(away.abs().quantile(0.95)) > 1e-2 * (1 + float(x.abs().max())):
                    self.trouble.append(f"here inverse does not undo forward: they differ by {float(away.abs().max()):.2g}")
            self._walk(steps, [mesh_x, x, *grids], base, frames)

    def _walk(self, steps, groups, base, frames):
        sizes = [len(g) for g in groups]
        h = torch.cat(groups)
        self.paths, near = [], groups[1][:64]
        for step in steps:
            self.paths.append(Path(step, near))
            near = self.paths[-1](near, 1.0)[0]
        whole = [p for p in self.paths if p.kind not in (FLIPPED,)]
        each = max(3, min(16, round((frames - 3 * (len(steps) - len(whole))) / max(1, len(whole)))))
        total = h.new_zeros(len(h))
        self.stops = [(0, 0.0, h, total, [])]                   # layer, tau, positions, log-determinant so far, shares
        shares = []
        for i, path in enumerate(bar(self.paths, "layers") if len(steps) > 8 else self.paths, 1):
            n = 3 if path.kind == FLIPPED else each
            for k in range(1, n + 1):
                moved, ldj = path(h, k / n)
                # Far out a net may run away, and nothing is drawn there; the points themselves must arrive.
                if moved.shape != h.shape or ldj.shape != total.shape or not torch.isfinite(moved[sizes[0]:sizes[0] + sizes[1]]).all():
                    raise ValueError(f"layer {i} ({path.name}) must give finite z of shape {tuple(h.shape)} and ldj of shape {tuple(total.shape)}")
                share = float(ldj[sizes[0]:sizes[0] + sizes[1]].mean())
                self.stops.append((i, k / n, moved, total + ldj, [*shares, share]))
            h, total = moved, total + ldj
            shares.append(share)
        self.sizes = sizes
        # The density goes along: log p at a point, less what the volume around it has grown.
        self.log_p = base.log_prob(h[:sizes[0]]) + total[:sizes[0]]
        self.boxes = _camera([stop[2][sizes[0]:sizes[0] + sizes[1]] for stop in self.stops], each)
        self.top = self._brightest()

    def _brightest(self):
        """The density of the brightest colour: a high one, not the highest, so that a single peak does not darken the rest."""
        likely = self.log_p > self.log_p.nan_to_num(-1e9).max() - 3
        ends = [float((self.log_p - total[:self.sizes[0]])[likely].quantile(0.9).exp()) for total in (self.stops[0][3], self.stops[-1][3])]
        return min(max(ends), 4 * min(ends))

    def caption(self):
        """What to look at, and what is not as it should be."""
        kinds = {path.kind for path in self.paths}
        words = "Follow a square of the grid: where it grows, the density falls; inside a layer α and μ grow from 0, so every frame can be undone."
        straight = sorted({p.name for p in self.paths if p.kind == STRAIGHT})
        if straight:
            words += f" {', '.join(straight)}: no such path, so the points go straight from input to output, and the frames between are no maps."
        if FLIPPED in kinds:
            flips = sorted({p.name for p in self.paths if p.kind == FLIPPED})
            words += f" {', '.join(flips)} turns the plane over, drawn as a flip."
        return " ".join([words, *(f"Careful: {t}." for t in self.trouble[:1])])

    def frames(self, which):
        """All pictures, with the grid "of the latents" or "of the data"."""
        x0 = self.stops[0][2][self.sizes[0]:self.sizes[0] + self.sizes[1]]
        half = x0[:, 0] > x0[:, 0].median()
        spread = self._spread()
        grid_at = sum(self.sizes[:2]) + (self.sizes[2] if which == "of the data" else 0)
        grid_size = self.sizes[3 if which == "of the data" else 2]
        made = []
        for (i, tau, h, _, shares), box, image in zip(self.stops, self.boxes, self._densities):
            ticks, upwards = scene.axis(box[0], box[1], 5), scene.axis(box[2], box[3], 5)
            points = h[self.sizes[0]:self.sizes[0] + self.sizes[1]]
            lines = scene.array(h[grid_at:grid_at + grid_size]).reshape(2 * LINES, ALONG, 2)
            plane = scene.panel([
                scene.lines(lines[:LINES], "sky", 1.4), scene.lines(lines[LINES:], "quiet", 1.4, alpha=0.7),
                scene.points(points[half], "blue", size=2.2), scene.points(points[~half], "orange", "triangle", size=2.6),
            ], box, "points and grid", xticks=ticks, yticks=upwards, equal=True)
            density = scene.panel([scene.heat(image, box)], box, "√ density", xticks=ticks, equal=True)
            made.append(scene.frame([[plane, density, _stack(shares, spread)]], self._label(i, tau)))
        return made

    @functools.cached_property
    def _densities(self):
        return [_shaded(h[:self.sizes[0]], self.log_p - total[:self.sizes[0]], box, self.top)
                for (_, _, h, total, _), box in zip(self.stops, self.boxes)]

    def _label(self, i, tau):
        if i == 0:
            return "the data x"
        words = f"layer {i} of {len(self.paths)}: {self.paths[i - 1].name}, τ = {tau:.2f}"
        return words if i < len(self.paths) or tau < 1 else f"the latents z, after {i} layer{'s' * (i > 1)}"

    def _spread(self):
        low = min(sum(min(s, 0) for s in shares) for *_, shares in self.stops)
        high = max(sum(max(s, 0) for s in shares) for *_, shares in self.stops)
        low, high = min(low, -0.2), max(high, 0.2)      # a layer that does next to nothing shall look like it
        pad = 0.12 * (high - low)
        return low - pad, high + pad


def _stack(shares, spread):
    """The layers' mean log-determinants on top of each other: what grows upwards from zero, what shrinks downwards."""
    up = down = 0.0
    boxes, colours = [], []
    for i, share in enumerate(shares):
        if share >= 0:
            boxes.append((0.28, 0.72, up, up + share))
            up += share
        else:
            boxes.append((0.28, 0.72, down + share, down))
            down += share
        colours.append((("blue", "sky") if share >= 0 else ("red", "orange"))[i // 2 % 2])
    low, high = spread
    total = up + down
    marks = [scene.lines([(0, 0), (1, 0)], "quiet", 1.5), scene.bars(boxes, colours), scene.lines([(0.1, total), (0.9, total)], "ink", 3, "dashed"),
             scene.text(f"{total:+.2f}".replace("-", "−"), 0.5, (up if total >= 0 else down) + math.copysign(0.02 * (high - low), total),
                        base="bottom" if total >= 0 else "top", weight="600")]
    return scene.panel(marks, (0, 1, low, high), "log |det|", "mean, nats", yticks=scene.axis(low, high, 6), width=0.36, framed=False)


def _shaded(nodes, log_p, box, top, triangles=None):
    """The density's square root on nets of MESH x MESH nodes (or of others, by their triangles), shaded linearly: bytes (SIZE, SIZE), rows
    from the bottom. The smallest triangles come last, on top: the less a net is stretched, the better it knows what lies between its nodes."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import IdentityTransform
    left, right, bottom, top_edge = box
    where = (scene.array(nodes, np.float64) - [left, bottom]) / [right - left, top_edge - bottom] * SIZE
    level = np.sqrt(np.clip(np.exp(scene.array(log_p, np.float64)) / top, 0, 1))
    triangles = _TRIANGLES if triangles is None else triangles
    a, b, c = (where[corner] for corner in triangles.T)
    least, most = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
    reach = np.maximum(*(most - least).T)
    bright = np.maximum.reduce([level[corner] for corner in triangles.T])
    # Wide ones that are dark take most of the time, and leave the picture as dark as it was.
    seen = (np.minimum(*most.T) > 0) & (np.maximum(*least.T) < SIZE) & ((reach < 12) | (bright > 0.02))
    chosen = triangles[seen][np.argsort(-reach[seen])]
    corners, shades = np.clip(where[chosen], -SIZE, 2 * SIZE), level[chosen]
    colours = np.repeat(shades[..., None], 4, -1)
    colours[..., 3] = 1
    renderer = RendererAgg(SIZE, SIZE, 72)
    context = renderer.new_gc()
    context.set_antialiased(False)
    if len(corners):
        renderer.draw_gouraud_triangles(context, corners, colours, IdentityTransform())
    drawn = np.asarray(renderer.buffer_rgba())[::-1]
    return np.where(drawn[..., 3] > 0, drawn[..., 0], 0).astype(np.uint8)


def net_of(n):
    """The corners (T, 3) of the triangles of a net of n x n nodes, whose rows follow one another."""
    node = np.arange(n * n).reshape(n, n)
    a, b, c, d = (part.ravel() for part in (node[:-1, :-1], node[:-1, 1:], node[1:, 1:], node[1:, :-1]))
    return np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


_TRIANGLES = np.concatenate([net_of(MESH), net_of(MESH) + MESH * MESH])


def _lattice(box, n):
    left, right, bottom, top = box
    x, y = np.meshgrid(np.linspace(left, right, n), np.linspace(bottom, top, n))
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


def _square(low, high, margin=0.05):
    """The square box around low and high (2,), somewhat larger, as floats."""
    middle, half = (low + high) / 2, float((high - low).max()) / 2 * (1 + margin) + 1e-6
    return tuple(float(v) for v in (middle[0] - half, middle[0] + half, middle[1] - half, middle[1] + half))


def _camera(clouds, calm):
    """A square box for each cloud of points: the same for all, or, where they differ much in size, one that follows them calmly."""
    ends = torch.stack([c[torch.isfinite(c).all(1)].quantile(torch.tensor([0.004, 0.996]).to(c), 0) for c in clouds]).cpu().double().numpy()
    middles, halves = ends.mean(1), np.ptp(ends, axis=1).max(1) / 2
    low, high = ends[:, 0].min(0), ends[:, 1].max(0)
    union = np.max(high - low) / 2
    if union < 1.8 * halves.min():
        middles[:], halves[:] = (low + high) / 2, union
    else:
        window = np.ones(2 * calm + 1) / (2 * calm + 1)
        smooth = [np.convolve(np.pad(v, calm, "edge"), window, "valid") for v in (*middles.T, np.log(halves))]
        # As large as what is in it at least, and a little more.
        middles = np.stack(smooth[:2], 1)
        halves = np.maximum(np.exp(smooth[2]), 0.85 * np.abs(ends - middles[:, None]).max((1, 2)))
    halves = 1.12 * halves
    return [(float(x - r), float(x + r), float(y - r), float(y + r)) for (x, y), r in zip(middles, halves)]


def _shrunk(box, share=0.85):
    """The box about the same middle with this share of its sides."""
    left, right, bottom, top = box
    dx, dy = (1 - share) / 2 * (right - left), (1 - share) / 2 * (top - bottom)
    return left + dx, right - dx, bottom + dy, top - dy


def _run(steps, x):
    total = x.new_zeros(len(x))
    for step in steps:
        x, ldj = step.forward(x)
        total = total + ldj
    return x, total


def _inverse(steps, z, trouble):
    """The x of z; None, with a sentence in `trouble`, if a layer has no inverse that runs."""
    for step in reversed(steps):
        # Any exception: the layer may be a student's, half finished, and its forward can be shown all the same.
        try:
            z = step.inverse(z)
        except Exception as e:
            trouble.append(f"inverse of {type(step).__name__} does not run ({type(e).__name__}: {e}), so the grid is one of the data")
            return None
    return z


# Flows to look at when none is given

class _Formula(torch.nn.Module):
    """alpha(x1) and mu(x1) by a formula."""

    def __init__(self, alpha, mu):
        super().__init__()
        self.alpha, self.mu = alpha, mu

    def forward(self, x1):
        return torch.cat([self.alpha(x1), self.mu(x1)], -1)


def _random(count):
    def make(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            steps = []
            for _ in range(count):
                net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
                torch.nn.init.normal_(net[0].weight, std=0.8), torch.nn.init.normal_(net[2].weight, std=0.12)
                steps += [Coupling(net), Reverse()]
        return Flow(StandardNormal(2), Compose(steps[:-1]))
    return make


def _waves(seed):
    """Two shears: a parabola bends one way, a wave the other."""
    bend = _Formula(lambda x: 0.3 * torch.cos(2 * x), lambda x: 0.5 * x ** 2 - 1)
    wave = _Formula(lambda x: 0.5 * torch.tanh(x), lambda x: torch.sin(2 * x))
    return Flow(StandardNormal(2), Compose([Coupling(wave), Reverse(), Coupling(bend)]))


PRESETS = {"a parabola and a wave": _waves, "one random layer": _random(1), "six random layers": _random(6)}
