"""Pictures in one style: one palette that colour-blind readers can tell apart, large type, and no pyplot.

Every function draws on Axes that it is given; arrays may be numpy's or torch's. `limits` are (left, right, bottom, top).
"""
import io

import numpy as np
from matplotlib import rc_context
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

# Okabe & Ito 2008, "Color Universal Design".
PALETTE = {"blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00",
           "sky": "#56B4E9", "purple": "#CC79A7", "yellow": "#F0E442", "black": "#000000"}
FONT = 14


class Picture(Figure):
    """A Figure that shows itself in a notebook as a cell's last expression, so pyplot's global state is not needed."""

    def _repr_png_(self):
        return png(self)


def _array(a):
    return np.asarray(a.detach().cpu() if hasattr(a, "detach") else a)


def grid_points(limits, n=200):
    """Centres of n x n equal cells of the box, (n * n, 2) float32, row by row from the bottom left."""
    left, right, bottom, top = limits
    middle = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(left + (right - left) * middle, bottom + (top - bottom) * middle)
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


def density(ax, log_prob, limits, n=200, top=None):
    """Show exp(log_prob) over the box; `log_prob` is a function (N, 2) -> (N,) of tensors, or its values (n, n) on grid_points.

    `top` is the density that gets the brightest colour, so that pictures side by side can share one scale.
    """
    if callable(log_prob):
        import torch
        with torch.no_grad():
            log_prob = _array(log_prob(torch.from_numpy(grid_points(limits, n)))).reshape(n, n)
    ax.imshow(np.exp(_array(log_prob)), extent=limits, origin="lower", cmap="cividis", vmin=0, vmax=top, interpolation="bilinear")
    return _frame(ax, limits)


def samples(ax, x, limits, colour=PALETTE["blue"]):
    """Show points (N, 2) as small dots."""
    x = _array(x)
    ax.scatter(x[:, 0], x[:, 1], s=3, color=colour, alpha=0.5, linewidths=0)
    return _frame(ax, limits)


def warped_grid(ax, lines, limits=None, colour=PALETTE["blue"]):
    """Show polylines (L, M, 2), such as the image of a square grid under a flow."""
    ax.add_collection(LineCollection(_array(lines), colors=colour, linewidths=0.8))
    ax.autoscale_view()
    return _frame(ax, limits)


def learning_curve(ax, losses, floor=None, window=50):
    """Show losses (nats) faintly with their running mean on top, and the entropy that they cannot beat as `floor`."""
    losses = _array(losses)
    window = max(1, min(window, len(losses)))
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    ax.plot(losses, color=PALETTE["sky"], linewidth=0.5, alpha=0.6)
    ax.plot(np.arange(window - 1, window - 1 + len(mean)), mean, color=PALETTE["blue"], label="loss")
    low = mean.min()
    if floor is not None:
        ax.axhline(floor, color=PALETTE["red"], linestyle="--", label="entropy")
        low = min(low, floor)
    # The first losses can be huge; the picture is for what comes after them.
    high = np.quantile(losses, 0.98)
    ax.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
    ax.set_xlabel("step", fontsize=FONT)
    ax.set_ylabel("nats", fontsize=FONT)
    ax.legend(fontsize=FONT, frameon=False)
    return ax


def side_by_side(n, titles=(), size=4):
    """A figure with `n` square pictures in a row: (figure, list of n Axes)."""
    with rc_context({"font.size": FONT, "axes.titlesize": FONT}):
        figure = Picture(figsize=(size * n, size), layout="constrained")
        axes = list(figure.subplots(1, n, squeeze=False)[0])
        for ax, title in zip(axes, titles):
            ax.set_title(title)
    return figure, axes


def png(figure, dpi=90):
    """The figure as PNG bytes, drawn by Agg without a display, in 256 colours of its own: a third of the size."""
    from PIL import Image
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _frame(ax, limits):
    if limits is not None:
        ax.set_xlim(limits[0], limits[1])
        ax.set_ylim(limits[2], limits[3])
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
