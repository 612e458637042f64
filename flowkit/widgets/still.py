"""A frame as a picture without a browser: for the notebook as it is saved, for documents, for tests.

The same marks as canvas.mjs, drawn by matplotlib; the two agree in what they show, not to the pixel.
"""
import matplotlib
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import Rectangle

from ..plotting import PALETTE, Picture
from ..plotting import png as to_png

COLOURS = PALETTE | {"ink": "#16181d", "faint": "#d5d9e0", "quiet": "#5a6270", "paper": "#ffffff", "panel": "#f7f8fa"}
MARKERS = {"disc": "o", "square": "s", "triangle": "^", "diamond": "D", "ring": "o", "cross": "x"}
WIDTH = 10.0        # inches


def figure(frame, caption=""):
    """A matplotlib figure of one frame, with the caption below."""
    rows = frame["rows"]
    units = max(sum(p["width"] for p in row) for row in rows)
    heights = [max(p["height"] for p in row) for row in rows]
    unit = (WIDTH - 0.8 * max(map(len, rows))) / units
    high = unit * sum(heights) + 0.9 * len(rows) + 0.8
    if high > 7.5:
        unit, high = unit * (7.5 - 0.9 * len(rows) - 0.8) / (high - 0.9 * len(rows) - 0.8), 7.5
    drawn = Picture(figsize=(WIDTH, high))
    y = high - 0.45
    for row, tall in zip(rows, heights):
        gap = (WIDTH - unit * sum(p["width"] for p in row)) / (len(row) + 1)
        x = gap
        for p in row:
            w, h = unit * p["width"], unit * p["height"]
            _panel(drawn.add_axes((x / WIDTH, (y - h) / high, w / WIDTH, h / high)), p)
            x += w + gap
        y -= unit * tall + 0.9
    words = " · ".join(filter(None, [frame["label"], caption]))
    drawn.text(0.5, 0.25 / high, words, ha="center", va="center", fontsize=11, color=COLOURS["quiet"], wrap=True)
    return drawn


def png(frame, caption="", dpi=90):
    """One frame as PNG bytes."""
    return to_png(figure(frame, caption), dpi)


def _panel(ax, p):
    left, right, bottom, top = p["box"]
    ax.set_xlim(left, right), ax.set_ylim(bottom, top)
    ax.set_xticks(p["xticks"]), ax.set_yticks(p["yticks"])
    ax.tick_params(length=0, labelsize=12, labelcolor=COLOURS["quiet"])
    ax.set_title(p["title"], fontsize=14), ax.set_xlabel(p["xlabel"], fontsize=13), ax.set_ylabel(p["ylabel"], fontsize=13)
    ax.set_facecolor(COLOURS["panel"] if p["frame"] else "none")
    for spine in ax.spines.values():
        spine.set(visible=p["frame"], color=COLOURS["faint"])
    for mark in p["marks"]:
        DRAW[mark["kind"]](ax, mark)
    ax.set_xlim(left, right), ax.set_ylim(bottom, top)
    ax.set_aspect("equal" if p["equal"] else "auto")


def _colour(name):
    return COLOURS.get(name, name)


def _heat(ax, m):
    ax.imshow(m["values"], extent=m["extent"], origin="lower", vmin=0, vmax=255, aspect="auto",
              cmap=matplotlib.colors.ListedColormap(m["palette"] / 255), interpolation="bilinear" if m["smooth"] else "nearest")


def _whole(xy):
    return [line[np.isfinite(line).all(1)] for line in xy]


def _lines(ax, m):
    ax.add_collection(LineCollection(_whole(m["xy"]), colors=_colour(m["colour"]), linewidths=m["width"] * 0.8, alpha=m["alpha"], linestyles=m["dash"]))


def _arrows(ax, m):
    for start, end in m["xy"]:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "linewidth": m["width"] * 0.8, "color": _colour(m["colour"]), "shrinkA": 0,
                                                "shrinkB": 0, "mutation_scale": 16, "linestyle": m["dash"]}, annotation_clip=False)


def _area(ax, m):
    ax.add_collection(PolyCollection(_whole(m["xy"]), facecolors=_colour(m["colour"]), alpha=m["alpha"]))


def _points(ax, m):
    colour = _colour(m["colour"])
    face = {"facecolors": "none", "edgecolors": colour} if m["marker"] == "ring" else {"c": colour}
    ax.scatter(*m["xy"].T, s=3 * m["size"] ** 2, marker=MARKERS[m["marker"]], alpha=m["alpha"], linewidths=1 if m["marker"] in ("ring", "cross") else 0, **face)


def _bars(ax, m):
    for (left, right, bottom, top), colour in zip(m["boxes"], m["colours"]):
        ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, facecolor=_colour(colour), edgecolor="white"))


def _text(ax, m):
    base = {"middle": "center"}.get(m["base"], m["base"])
    ax.text(m["x"], m["y"], m["words"], ha=m["align"], va=base, color=_colour(m["colour"]), fontsize=14 if m["weight"] else 12)


def _handles(ax, m):
    for i, (x, y) in enumerate(m["xy"]):
        ax.scatter([x], [y], s=110, marker=MARKERS[m["markers"][i]], color=_colour(m["colours"][i]), zorder=5,
                   edgecolors=COLOURS["ink"] if m["selected"] == i else "white", linewidths=2)


DRAW = {"heat": _heat, "lines": _lines, "arrows": _arrows, "area": _area, "points": _points, "bars": _bars, "text": _text, "handles": _handles,
        "spots": lambda ax, m: None}
