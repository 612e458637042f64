"""What a view draws: frames made of rows of panels, panels made of marks. Descriptions only; canvas.mjs and still.py draw them.

A view's mathematics ends in `frame([[panel([heat(...), lines(...)], box)]], label)`. Colours are names (Okabe & Ito 2008, and
`ink`, `quiet`, `faint`, which follow the light or dark theme), so that a picture reads the same to colour-blind eyes; what a colour says is
said by a marker or a dash as well.
"""
import functools

import numpy as np

from ..plotting import PALETTE

# For things beside each other, in this order. tests/flowkit/test_widgets.py measures how different they look to the colour-blind.
SEQUENCE = tuple(name for name in ("blue", "orange", "green", "red", "sky", "purple", "yellow") if name in PALETTE)
MARKERS = ("disc", "square", "triangle", "diamond", "ring", "cross")


def array(a, dtype=np.float32):
    """Any tensor or array as a contiguous numpy array."""
    return np.ascontiguousarray(a.detach().cpu() if hasattr(a, "detach") else a, dtype=dtype)


@functools.cache
def palette(name="cividis"):
    """A named colour map of matplotlib's as (256, 3) bytes; the default one is made for colour-blind eyes (Nuñez et al. 2018)."""
    from matplotlib import colormaps
    return np.ascontiguousarray(np.round(255 * colormaps[name](np.arange(256))[:, :3]), dtype=np.uint8)


def levels(values, top):
    """Values from 0 to `top` as the bytes 0 to 255, what lies outside cut off."""
    return np.clip(np.nan_to_num(array(values, np.float64), nan=0.0) * (255 / top), 0, 255).astype(np.uint8)


def heat(values, extent, top=None, colours="cividis", smooth=True):
    """Values (n, m), rows from the bottom, over extent (left, right, bottom, top); bytes as they are, others from 0 to `top`."""
    values = values if getattr(values, "dtype", None) == np.uint8 else levels(values, top or max(float(np.nanmax(array(values))), 1e-12))
    return {"kind": "heat", "values": values, "extent": list(extent), "palette": palette(colours), "smooth": smooth}


def lines(xy, colour="blue", width=2.0, dash="solid", alpha=1.0):
    """Polylines (L, M, 2), or one (M, 2); dash is solid, dashed or dotted. A NaN lifts the pen."""
    return {"kind": "lines", "xy": _stacked(xy), "colour": colour, "width": width, "dash": dash, "alpha": alpha}


def arrows(xy, colour="ink", width=3.0, dash="solid"):
    """Arrows (N, 2, 2), or one (2, 2), each from its first point to its second."""
    return {"kind": "arrows", "xy": _stacked(xy), "colour": colour, "width": width, "dash": dash}


def area(xy, colour="sky", alpha=0.5):
    """Filled polygons (L, M, 2), or one (M, 2)."""
    return {"kind": "area", "xy": _stacked(xy), "colour": colour, "alpha": alpha}


def points(xy, colour="blue", marker="disc", size=2.0, alpha=0.8):
    """Points (N, 2), with one of MARKERS."""
    return {"kind": "points", "xy": array(xy), "colour": colour, "marker": marker, "size": size, "alpha": alpha}


def bars(boxes, colours):
    """Rectangles (N, 4), each left, right, bottom, top, with a colour each."""
    return {"kind": "bars", "boxes": array(boxes).reshape(-1, 4), "colours": list(colours)}


def text(words, x, y, colour="ink", align="center", base="middle", weight=""):
    """Words at a place of the panel; align is left, center or right, base is top, middle or bottom."""
    return {"kind": "text", "words": words, "x": float(x), "y": float(y), "colour": colour, "align": align, "base": base, "weight": weight}


def handles(xy, name, colours=None, markers=None, selected=None):
    """Points (N, 2) that can be dragged: the view's `drag` hears `name`, which of them, and where to."""
    xy = array(xy).reshape(-1, 2)
    return {"kind": "handles", "xy": xy, "name": name, "colours": list(colours or ["red"] * len(xy)),
            "markers": list(markers or ["disc"] * len(xy)), "selected": selected}


def spots(xy, to):
    """Places (N, 2) without a mark of their own: a pointer that comes near shows the frames `to`, one for each."""
    return {"kind": "spots", "xy": array(xy).reshape(-1, 2), "to": [int(n) for n in to]}


def panel(marks, box, title="", xlabel="", ylabel="", xticks=(), yticks=(), width=1.0, height=1.0, equal=False, framed=True):
    """Marks in data limits box = (left, right, bottom, top). `width` and `height` are shares of the picture; with `equal`, one
    unit is as long to the right as upwards and the width follows from the box."""
    left, right, bottom, top = map(float, box)
    if not (left < right and bottom < top):
        raise ValueError(f"box must be (left, right, bottom, top) with left < right and bottom < top, got {box}")
    if equal:
        width = height * (right - left) / (top - bottom)
    return {"marks": list(marks), "box": [left, right, bottom, top], "title": title, "xlabel": xlabel, "ylabel": ylabel,
            "xticks": list(map(float, xticks)), "yticks": list(map(float, yticks)), "width": width, "height": height, "equal": equal,
            "frame": framed}


def frame(rows, label=""):
    """One picture: rows of panels, and a few words that say where one is ("layer 2 of 8")."""
    return {"rows": [list(row) for row in rows], "label": label}


def axis(low, high, count=5):
    """About `count` round numbers from low to high, for ticks."""
    from matplotlib.ticker import MaxNLocator
    return [float(v) for v in MaxNLocator(count).tick_values(low, high) if low <= v <= high]


def pack(frames):
    """Frames with every array replaced by {at, type, shape}, and the arrays' bytes; an array that comes again is kept once."""
    numbers, kept, buffers = {}, [], []

    def packed(node):
        if isinstance(node, np.ndarray):
            if id(node) not in numbers:
                numbers[id(node)] = len(buffers)
                kept.append(node)                       # or its id might come again for another
                buffers.append(node.tobytes())
            return {"at": numbers[id(node)], "type": {"uint8": "u1", "float32": "f4"}[node.dtype.name], "shape": list(node.shape)}
        if isinstance(node, dict):
            return {key: packed(value) for key, value in node.items()}
        return [packed(value) for value in node] if isinstance(node, (list, tuple)) else node

    return packed(frames), buffers


def grid(box, lines_each_way=15, points_each_line=61):
    """A square grid over a box as polylines (2 n, m, 2): first the upright lines, from left to right, then the level ones."""
    left, right, bottom, top = box
    across, along = np.linspace(0, 1, lines_each_way), np.linspace(0, 1, points_each_line)
    upright = np.stack(np.broadcast_arrays(across[:, None], along[None]), -1)
    return array(np.concatenate([upright, upright[..., ::-1]]) * [right - left, top - bottom] + [left, bottom])


def _stacked(xy):
    xy = array(xy)
    return xy[None] if xy.ndim == 2 else xy
