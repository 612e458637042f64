"""View 12, `training`: watch a flow learn, stop it, go one step, and play the whole film afterwards.

The negative log-likelihood of points that are never trained on falls towards the entropy of the target, which it cannot beat:
E[-log q(x)] = H(p) + KL(p || q) (nats). The loop that trains runs in a thread of its own and passes a gate at each batch: so a click is heard while
a cell trains, and the loop may be anybody's, a student's as well.
"""
import asyncio
import copy
import threading
import time

import ipywidgets
import numpy as np
import torch

from ..plotting import grid_points
from ..settings import steps as in_fast_mode
from ..toys import get
from ..training import _like, _mode, _nll
from . import scene
from .layer_by_layer import _inverse
from .paths import steps_of
from .view import View, seed

FILM = 90                # frames at most; of a longer training every second one is dropped, and again
SIDE = 96                # pixels each way of the density's picture
SHARE = 0.25             # of the time may be spent on drawing
READY, RUNNING, PAUSED, DONE = "ready", "training", "paused", "done"


def training(flow=None, target=None, fit=None, steps=None, size=256, start=None):
    """Train a flow on a toy before everybody's eyes: `await training(flow, target).run()` in a cell, or press Train.

    flow: anything on the plane with log_prob(x), sample(n) and parameters(); a small mixture flow if none is given. target: a toy, two moons
    if none is given. fit(flow, batches) -> losses: the loop, which must go through `batches`, of (size, 2); Adam with a cosine if
    none is given. steps: how many batches (in fast mode 20 unless it is said). start: the seed of the batches; without
    one they go on from torch's own generator as it is when this is called.
    The Training that comes back has run(), train(), losses, and save_html(path), which writes its film as a page.
    """
    target = target or get("two_moons")
    return Training(flow or _small_flow(start or 0), target, fit or adam, steps or in_fast_mode(600, 20), size, start)


def adam(flow, batches, lr=3e-3, steps=600):
    """Maximum likelihood by Adam; the rate falls to zero along a cosine over `steps`."""
    optimiser = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for x in batches:
        loss = _nll(flow, x)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimiser.step()
        if len(losses) < steps:
            schedule.step()
        losses.append(loss.item())
    return losses


def _small_flow(start):
    from .. import MLP, Compose, Flow, MixCoupling, Reverse, StandardNormal
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        steps = [step for _ in range(4) for step in (MixCoupling(MLP(1, 4 * 3 + 2, hidden=(32, 32)), 4), Reverse())]
    return Flow(StandardNormal(2), Compose(steps))


class Training(View):
    """The view of one training; `losses` is what the loop has returned, `state_now` one of ready, training, paused, done."""

    def __init__(self, flow, target, fit, steps, size, start):
        self.flow, self.target, self.fit, self.planned, self.size = flow, target, fit, steps, size
        self.losses, self.fault, self.state_now = [], None, READY
        self._begin = copy.deepcopy(flow.state_dict())
        self._go, self._lock = threading.Event(), threading.RLock()
        self._go.set()
        self._ending, self._single, self._worker = False, False, None
        if start is not None:
            torch.manual_seed(start)
        self._random, self._seed_shown = torch.get_rng_state(), torch.initial_seed() % 10_000
        like = next(flow.parameters())
        self._held_out = _like(target.sample(1000, seed=12345), like)
        self._places = _like(torch.from_numpy(grid_points(target.limits, SIDE)), like)
        self._dots = scene.array(target.sample(1000, seed=54321))
        self._lattice = torch.from_numpy(scene.grid((-2.6, 2.6, -2.6, 2.6), 13, 41)).to(like)
        # The target's own brightest colour, so that the flow's density is seen to reach it.
        self._top = float(target.log_prob(target.sample(2000, seed=7)).quantile(0.9).exp())
        self._forget()
        self._buttons = {name: ipywidgets.Button(description=name, tooltip=why, layout={"width": "120px"}) for name, why in (
            ("Train", "train, or pause (space)"), ("Step", "one batch (right arrow)"), ("Reset", "start again (R)"))}
        super().__init__("Training: the loss and what it buys", lambda state, coarse: list(self._film),
                         "Watch the curve fall to the entropy, which no flow can beat: what is left between the two is KL(p‖q), and it shows in the density.",
                         {"seed": seed(self._seed_shown)}, rate=12, stride=10)
        row = self.children[-1]
        row.children = [*self._buttons.values(), *row.children]
        for name, does in (("Train", self.toggle), ("Step", self.one), ("Reset", self.reset)):
            self._buttons[name].on_click(lambda _, does=does: does())

    # What can be done with it

    async def run(self):
        """Train to the end, and hear clicks meanwhile: `await view.run()` as a cell's line. Returns the losses."""
        self.go_on()
        try:
            while self._worker is not None and self._worker.is_alive():
                await asyncio.sleep(0.02)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._end()
            print("Stopped early; the flow keeps what it has learnt so far.")
        return self._result()

    def train(self):
        """Train to the end in a plain cell or script: only the stop button is heard. Returns the losses."""
        self.go_on()
        try:
            while self._worker is not None and self._worker.is_alive():
                self._worker.join(0.05)
        except KeyboardInterrupt:
            self._end()
            print("Stopped early; the flow keeps what it has learnt so far.")
        return self._result()

    def go_on(self, single=False):
        """Begin, or go on after a pause; for one batch only if `single`."""
        with self._lock:
            if self.state_now == DONE:
                return
            self._single, self.state_now = single, RUNNING
            if self._worker is None or not self._worker.is_alive():
                self._ending = False
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()
            self._go.set()
        self._tell()

    def pause(self):
        """Stop at the next batch."""
        if self.state_now == RUNNING:
            self._go.clear()
            self.state_now = PAUSED
            self._tell()

    def toggle(self):
        """Train if it stands, pause if it runs."""
        self.pause() if self.state_now == RUNNING else self.go_on()

    def one(self):
        """One batch, and then pause."""
        if self.state_now == RUNNING:
            self.pause()
        elif self.state_now != DONE:
            self.go_on(single=True)

    def reset(self):
        """The weights and the film as they were before the first batch."""
        self._end()
        self.flow.load_state_dict(self._begin)
        self.losses, self.fault = [], None
        self._forget()
        self.state_now = READY
        super().reset()

    def key(self, key, times=1, wrap=False):
        """Space trains or pauses, the right arrow goes one batch, r resets."""
        {" ": self.toggle, "ArrowRight": self.one, "r": self.reset}.get(key, lambda: None)()
        self._tell()

    # The worker's side

    def _work(self):
        try:
            now = self.state["seed"]
            torch.set_rng_state(self._random) if now == self._seed_shown else torch.manual_seed(now)
            with torch.enable_grad():
                self.losses = list(self.fit(self.flow, self._batches()) or [])
        except BaseException as e:          # a thread's error would be lost: run() raises it in the cell
            if not self._ending:            # (a loop that is not content with fewer batches may trip over the end)
                self.fault = e
                self.canvas.problem = f"{type(e).__name__}: {e}"
        if not self._ending:
            self._record()
            self.state_now = DONE
            self.draw()

    def _batches(self):
        like = next(self.flow.parameters())
        for step in range(self.step, self.planned):
            self._gate()
            if self._ending:                # the loop runs out of batches, and hands back what it has
                return
            self.step = step + 1
            yield _like(self.target.sample(self.size), like)

    def _gate(self):
        """Between two batches: draw if it is time, wait while it is paused."""
        now = time.perf_counter()
        if now - self._drawn > max(self._cost / SHARE, 0.1) or not self._go.is_set():
            self._record()
            self._cost, self._drawn = time.perf_counter() - now, time.perf_counter()
        while not self._go.wait(0.2) and not self._ending:
            pass
        with self._lock:
            if self._single:               # this batch may pass, and the gate closes behind it
                self._single, self.state_now = False, PAUSED
                self._go.clear()
                self._tell()

    def _end(self):
        self._ending = True
        self._go.set()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()
        self._worker = None
        if self.state_now != READY:
            self.state_now = PAUSED
            self.draw()

    def _result(self):
        self.freshen()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return self.losses

    # The film

    def _forget(self):
        self.step, self._curve, self._film = 0, [], []
        self._cost, self._drawn = 0.0, 0.0
        self._film.append(self._frame())

    def _record(self):
        if self._curve and self._curve[-1][0] == self.step:
            return
        made = self._frame()
        self._film.append(made)
        if len(self._film) > FILM:
            self._film = self._film[:1] + self._film[2::2]
            return self.draw()
        self._tail(made)

    @torch.no_grad()
    def _frame(self):
        """One picture: the curve, samples and grid, the density."""
        with _mode(self.flow, False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)            # the same latents in each frame, so that samples move and do not dance
            self._curve.append((self.step, float(_nll(self.flow, self._held_out))))
            samples = scene.array(self.flow.sample(1000))
            density = self.flow.log_prob(self._places).exp().reshape(SIDE, SIDE)
            lattice = _inverse(steps_of(self.flow), self._lattice.reshape(-1, 2), [])
        limits, marks = self.target.limits, []
        if lattice is not None:
            marks.append(scene.lines(lattice.reshape(*self._lattice.shape), "sky", 1.2, alpha=0.8))
        marks += [scene.points(self._dots, "orange", "triangle", 2.2, 0.35), scene.points(samples, "blue", size=2.2)]
        gap = self._curve[-1][1] - self.target.entropy
        plane = scene.panel(marks, limits, "samples (data: triangles)", equal=True)
        shade = scene.levels(np.sqrt(scene.array(density, np.float64) / self._top), 1.0)
        heat = scene.panel([scene.heat(shade, limits)], limits, "√ density", equal=True)
        return scene.frame([[self._chart(), plane, heat]], f"batch {self.step} of {self.planned}, gap {gap:.2f} nats".replace("-", "−"))

    def _chart(self):
        curve, floor = np.array(self._curve), self.target.entropy
        high = min(float(curve[:, 1].max()), floor + 3.0)
        low, high = floor - 0.2 * (high - floor + 0.2), high + 0.1 * (high - floor + 0.2)
        marks = [scene.lines([(0, floor), (self.planned, floor)], "red", 2.5, "dashed"), scene.lines(np.minimum(curve, [self.planned, high]), "blue", 3.5),
                 scene.points(curve[-1:], "blue", "disc", 6, 1.0), scene.text(f"entropy {floor:.2f}", self.planned * 0.97, floor - 0.02 * (high - low), "red", "right", "top")]
        return scene.panel(marks, (0, self.planned, low, high), "NLL of held-out points", xlabel="batch", xticks=[0, self.planned // 2, self.planned],
                           yticks=scene.axis(low, high, 5), width=1.05)

    # What the browser is told

    def _extra_now(self):
        return {"live": self.state_now != DONE, "running": self.state_now == RUNNING, "ask": self._ask}

    def _publish(self, **more):
        self._label()
        self._sent = len(self.frames)
        self.at = len(self.frames) - 1
        super()._publish(**self._extra_now())

    def _tail(self, *made):
        with self._lock:
            spec, arrays = scene.pack(list(made))
            self.frames = [*self.frames, *made]
            self.canvas.send({"type": "tail", "from": self._sent, "frames": spec, "set": self._extra_now()}, buffers=arrays)
            self._sent += len(made)
            self.at = self._sent - 1

    def _tell(self):
        self._label()
        self._tail()

    def _label(self):
        self._buttons["Train"].description = "Pause" if self.state_now == RUNNING else "Train"
        for name in ("Train", "Step"):
            self._buttons[name].disabled = self.state_now == DONE
