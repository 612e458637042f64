"""A view: controls, a function from their values to frames, and the canvas that shows them.

`compute(state, coarse) -> list of frames`. One frame: the kernel computes each picture, coarsely while something moves and
in full when it rests. Several frames: they play in the browser, and the kernel is asked only when a control moves. That is all that a new view
has to bring; keys, dragging, presets, reset, the saved picture and the page without a kernel come from here.

Built on anywidget (https://anywidget.dev) and ipywidgets.
"""
import asyncio
import bisect
import contextlib
import html
from pathlib import Path

import anywidget
import ipywidgets
import traitlets

from . import scene
from .still import png

HERE = Path(__file__).parent
REST = 0.25         # seconds without a change after which the full picture is computed

# Where there is a live view, its still picture is hidden; where there is none (a notebook that was saved and opened
# again), JupyterLab's complaint about the missing model is hidden, and the still picture stays.
_STYLE = """<style class="flowkit-mark">
.jp-OutputArea-child:has(+ .jp-OutputArea-child + .jp-OutputArea-child .flowkit-view) { display: none !important; }
.jp-OutputArea-child:has(.flowkit-mark) { display: none !important; }
.jp-OutputArea-child:has(.flowkit-mark) + .jp-OutputArea-child > .jp-OutputArea-output.jupyter-widgets { display: none; }
</style>"""


class Canvas(anywidget.AnyWidget):
    """The picture in the browser. `picture` holds packed frames and their arrays; messages from the browser go to `on_msg`."""
    _esm = (HERE / "canvas.mjs").read_text()
    _css = (HERE / "canvas.css").read_text()
    title = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    picture = traitlets.Dict().tag(sync=True)
    hall = traitlets.Bool().tag(sync=True)      # takes the keys as it appears


class View(ipywidgets.VBox):
    """Something to look at and to move.

    title, caption: a name and one sentence that says what to look at (`caption` may be a function of the state).
    compute: (state, coarse) -> list of frames. controls: {name: ipywidget with a value}; their values, and what `state` adds, are
    the state, a dict. presets: {name: values}; choosing one sets these. steps: what left and right, and then up and down, step: a control's
    name, or a function (state, by) -> changes. drag: (state, name, index, x, y) -> changes of the state, for what is dragged by its handles.
    press: (state, digit) -> changes, for the keys 1 to 9. rate: frames a second when it plays. stride: frames that up and down skip.
    walk: the control that moves when it plays by itself, by default the first of `steps`.
    """

    def __init__(self, title, compute, caption="", controls=None, state=None, presets=None, steps=(), drag=None, press=None,
                 rate=15, stride=10, walk=None):
        self.compute, self.caption, self.steps, self.drag, self.press = compute, caption, steps, drag, press
        self.rate, self.stride, self.walk = rate, stride, walk or next(iter(steps), None)
        self.title, self.presets, self.controls, self._extra = title, presets or {}, dict(controls or {}), dict(state or {})
        self.scenes, self._scene = [(name, {"preset": name}) for name in self.presets], 0
        if self.presets:
            self.controls = {"preset": dropdown("preset", list(self.presets)), **self.controls}
        self.canvas = Canvas(title=title)
        self.frames, self.at, self._between = [], 0, {}
        self._ask, self._quiet, self._resting, self._still, self._watched = None, False, None, None, False
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name, change["new"]), "value")
        self.canvas.on_msg(self._heard)
        row = ipywidgets.HBox(list(self.controls.values())).add_class("flowkit-controls")
        super().__init__([self.canvas, row] if self.controls else [self.canvas])
        self.add_class("flowkit-box")
        if self.presets:
            self._set(self.presets[next(iter(self.presets))])
        self._first = self._plain = self.state
        self.draw()

    @property
    def state(self):
        """The values of all controls, and what the view keeps besides."""
        return {**self._extra, **{name: control.value for name, control in self.controls.items()}, **self._between}

    def draw(self, coarse=False):
        """Compute the frames for the state as it is and show them. What goes wrong is said under the picture, and raised."""
        try:
            state = self.state
            self.frames = self.compute(state, coarse)
            caption = self.caption(state) if callable(self.caption) else self.caption
        except Exception as e:
            self.canvas.problem = f"{type(e).__name__}: {e}"
            raise
        self.at = min(self.at, len(self.frames) - 1)
        with self.canvas.hold_sync():
            self.canvas.caption, self.canvas.problem = caption, ""
            self._publish()

    def set(self, **changes):
        """Change controls, and what else is in the state, by name, and draw once."""
        self._set(changes)
        self.draw()

    def hall(self, *scenes):
        """For a lecture: the first of these scenes now, N and B go on and back. It takes the keys as it appears, and returns itself.

        A scene is a preset's name, or {words: values} for one with values of its own ("preset" among them); without any, the presets are the
        scenes. Raises ValueError for a preset that is not there.
        """
        self.scenes = [pair for s in scenes for pair in (s.items() if isinstance(s, dict) else [(s, {"preset": s})])] or self.scenes
        for _, values in self.scenes:
            if values.get("preset", next(iter(self.presets), None)) not in [*self.presets, None]:
                raise ValueError(f"there is no preset {values['preset']!r}; there are {', '.join(self.presets) or 'none'}")
        self.canvas.hall = True
        self._stage(0)
        self.draw()
        return self

    def _stage(self, number):
        """Put a scene up; a reset leads back to it."""
        if self.scenes:
            self._scene, self.at = number % len(self.scenes), 0
            self._set(self._plain)
            self._set(self.scenes[self._scene][1])
            self._first = self.state
            self.canvas.title = f"{self.title} · {self._scene + 1} of {len(self.scenes)}: {self.scenes[self._scene][0]}"

    def reset(self):
        """Everything as it was at the start, or at the start of the scene."""
        self._set(self._first)
        self.at = 0
        self.draw()

    def _step(self, name, by):
        """Move a control by so many of its steps, and not beyond its ends."""
        control, value = self.controls[name], self.state[name]
        if isinstance(control, ipywidgets.Dropdown):
            keys = list(control.options)
            value = keys[max(0, min(len(keys) - 1, keys.index(value) + by))]
        elif isinstance(value, bool):
            value = not value
        else:
            value = type(value)(max(control.min, min(control.max, value + by * control.step)))
        self._set({name: value})

    def recorded(self, count=90):
        """Frames to play without a kernel: those there are, or one control's walk from end to end."""
        if len(self.frames) > 1 or self.walk is None:
            return self.frames
        control, state = self.controls[self.walk], self.state
        ways = [control.min + (control.max - control.min) * i / (count - 1) for i in range(count)]
        return [self.compute({**state, self.walk: type(control.value)(way)}, False)[0] for way in ways]

    def save_html(self, path):
        """Write a page that plays this view by itself: one file, no server, no request."""
        from .player import page
        Path(path).write_text(page(self), encoding="utf-8")

    def png(self, dpi=90):
        """The picture as it is now, as PNG bytes, drawn without a browser."""
        return png(self.frames[self.at], f"{self.canvas.title}. {self.canvas.caption}", dpi)

    def freshen(self):
        """Draw the still picture of a notebook anew if there is one and no browser that does so."""
        if self._still is not None and not self._watched:
            self._still.update({"image/png": self.png(), "text/plain": self._words()}, raw=True)

    # What the browser says

    def message(self, content, buffers=()):
        """Do what a message from the browser asks: a key, a drag, a rest, or the picture as it stands on the screen."""
        kind = content["type"]
        if kind == "settled":
            self.at, self._watched = content["frame"], True
            if self._still is not None and buffers:
                self._still.update({"image/png": bytes(buffers[0]), "text/plain": self._words()}, raw=True)
            return
        self._ask = content.get("ask")
        with contextlib.ExitStack() as first:
            for control in self.controls.values():      # the picture goes out before the sliders follow it
                first.enter_context(control.hold_sync())
            self._answer(kind, content)

    def _answer(self, kind, content):
        if kind == "settle":
            self._rest()
        elif kind == "drag":
            self._set(self.drag(self.state, content["name"], content["index"], content["x"], content["y"]))
            self._changed()
        elif kind == "key":
            self.key(content["key"], content.get("times", 1), content.get("wrap", False))
        else:
            raise ValueError(f"type must be key, drag, settle or settled, got {kind!r}")

    def key(self, key, times=1, wrap=False):
        """A key that the kernel answers: arrows, Home and End move `steps`, digits go to `press`, n and b change scenes, r resets."""
        if key == "r":
            return self.reset()
        if key in ("n", "b"):
            self._stage(self._scene + (times if key == "n" else -times))
        elif key.isdigit():
            if self.press is not None:
                self._set(self.press(self.state, int(key)))
        elif key in _ARROWS:
            which, sign = _ARROWS[key]
            name = self.walk if wrap else self.steps[which] if which < len(self.steps) else None
            if callable(name):
                self._set(name(self.state, sign * times))
            elif name is not None:
                control = self.controls[name]
                if key in ("Home", "End"):
                    self._set({name: control.min if key == "Home" else control.max})
                elif wrap and self.state[name] >= control.max:
                    self._set({name: control.min})
                else:
                    self._step(name, sign * times)
        self._changed()

    def _heard(self, _, content, buffers):
        # A comm's message: what is raised here is written into the server's log only, so it is shown under the picture too.
        try:
            self.message(content, buffers)
        except Exception as e:
            self.canvas.problem = f"{type(e).__name__}: {e}"
            raise

    def _moved(self, name, value):
        if self._quiet:
            return
        self._set({name: value})
        self._changed()

    def _changed(self):
        """Coarse at once; in full when nothing has moved for a while (at once too, where there is no event loop)."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self.draw()
        self.draw(coarse=True)
        if self._resting is not None:
            self._resting.cancel()
        self._resting = loop.call_later(REST, self._rest)

    def _rest(self):
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        self.draw()

    def _set(self, changes):
        if changes.get("preset") in self.presets:
            changes = {**self.presets[changes["preset"]], **changes}
        with self._silence():
            for name, value in changes.items():
                if name in self.controls:
                    control = self.controls[name]
                    control.value = value
                    self._between.pop(name, None)
                    if isinstance(control, Slider) and control.value != value:      # a value that lies between two places
                        self._between[name] = max(control.min, min(control.max, float(value)))
                else:
                    self._extra[name] = value

    def _silence(self):
        return _Silence(self)

    def _publish(self, **more):
        spec, arrays = scene.pack(self.frames)
        self.canvas.picture = {"frames": spec, "arrays": arrays, "ask": self._ask, "rate": self.rate, "stride": self.stride, **more}

    # In a notebook

    def _words(self):
        return f"{self.canvas.title}: {self.canvas.caption}"

    def _ipython_display_(self):
        from IPython.display import display
        self._still = display({"image/png": self.png(), "text/plain": self._words()}, raw=True, display_id=True)
        display({"text/html": _STYLE, "text/plain": ""}, raw=True)
        display({**super()._repr_mimebundle_(), "text/plain": ""}, raw=True)

    def _repr_html_(self):
        return f"<p>{html.escape(self._words())}</p>"


_ARROWS = {"ArrowRight": (0, 1), "ArrowLeft": (0, -1), "ArrowUp": (1, 1), "ArrowDown": (1, -1), "Home": (0, 0), "End": (0, 0)}


class _Silence:
    """While it lasts, controls that are moved do not make the view draw."""

    def __init__(self, view):
        self.view = view

    def __enter__(self):
        self.before, self.view._quiet = self.view._quiet, True

    def __exit__(self, *_):
        self.view._quiet = self.before


# Controls, all in one form: a short description, a type that the hall can read.

class Slider(ipywidgets.SelectionSlider):
    """A slider of floats from low to high: keys move it by `step`, the mouse by a fifth of that. It stands at the nearest place.

    It counts its places. ipywidgets' FloatSlider rounds in the browser, and sends back what it has rounded, even after the kernel has moved on.
    """
    FINE = 5

    def __init__(self, description, value, low, high, step):
        self.min, self.max, self.step = float(low), float(high), float(step)
        # The value to begin with is a place, whatever it is: it may come from somebody's layer.
        places = sorted({float(value)} | {round(low + i * step / self.FINE, 10) for i in range(round((high - low) / step * self.FINE) + 1)})
        labels = {}                     # ipywidgets finds a place by its label, so no two may look alike
        for place in places:
            digits = next(n for n in range(2, 20) if f"{place:.{n}f}" not in labels)
            labels[f"{place:.{digits}f}"] = place
        super().__init__(options=[(label.replace("-", "−"), place) for label, place in labels.items()], value=value, description=description)

    @traitlets.validate("value")
    def _validate_value(self, proposal):
        return self._nearest(self._options_values, proposal.value)

    @staticmethod
    def _nearest(places, value):
        i = bisect.bisect_left(places, value)       # a slider is moved often: no look at all places
        return min(places[max(0, i - 1):i + 1], key=lambda place: abs(place - value))


def slider(description, value, low, high, step):
    """A slider of floats, or of whole numbers where the step is one."""
    if isinstance(step, int):
        return ipywidgets.IntSlider(value, min=low, max=high, step=step, description=description)
    return Slider(description, value, low, high, step)


def dropdown(description, options, value=None):
    """A choice from a list of words."""
    return ipywidgets.Dropdown(options=list(options), value=value or list(options)[0], description=description)


def switch(description, value=False):
    """Something that is on or off."""
    return ipywidgets.Checkbox(value, description=description, indent=False)


def seed(value=0):
    """The seed of what is random in a view, for all to see."""
    return ipywidgets.BoundedIntText(value, min=0, max=9999, description="seed", layout={"width": "150px"})
