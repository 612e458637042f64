"""The picture of a check: yours, the reference, the difference, drawn from arrays alone.

Each function here makes a picture function `(inputs, outputs, reference) -> Figure or None`; `outputs` may hold
nothing (an unsolved exercise), and then the reference alone is drawn, with "not solved yet" in its place.
"""
import numpy as np

from autograder.laws import jacobian, normal_log_prob
from flowkit import plotting

LIMIT = 3.0  # the grid of the picture covers the square from -LIMIT to LIMIT
LINES, CELLS = 13, 48  # grid lines each way, with CELLS points on each; CELLS x CELLS points of density


def grid(prefix=""):
    """The inputs "grid" (N, 2) that a 2D layer is drawn from, the grid lines first, then the cells of the density; and "grid lines"."""
    t, lines = np.linspace(-LIMIT, LIMIT, CELLS), np.linspace(-LIMIT, LIMIT, LINES)
    across = np.stack(np.broadcast_arrays(t[None, :], lines[:, None]), -1)
    lines = np.concatenate([across.reshape(-1, 2), across[..., ::-1].reshape(-1, 2)])
    return {f"{prefix}grid": np.concatenate([lines, cells()]), f"{prefix}grid lines": np.array(len(lines))}


def cells():
    return plotting.grid_points((-LIMIT, LIMIT) * 2, CELLS).astype(float)


def usable(outputs, prefix):
    """What a layer did to the grid: its image z, its way there and back x (2 * LINES, CELLS, 2), the density; None where unusable."""
    lines, n = (2 * LINES, CELLS, 2), 2 * LINES * CELLS
    z, ldj, back = (outputs.arrays.get(prefix + k) for k in ("picture.z", "picture.ldj", "picture back.x"))
    if z is not None and (z.shape != (n + CELLS**2, 2) or not np.isfinite(z).all()):
        z = None
    if back is not None and (back.shape != (n, 2) or not np.isfinite(back).all()):
        back = None
    density = None
    if z is not None and ldj is not None and ldj.size == len(z):
        logs = np.minimum(normal_log_prob(z[n:]) + ldj.reshape(-1)[n:], 20)
        density = np.exp(np.where(np.isfinite(logs), logs, -np.inf)).reshape(CELLS, CELLS)
    return None if z is None else z[:n].reshape(lines), None if back is None else back.reshape(lines), density


def empty(ax, text):
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, fontsize=plotting.FONT)
    ax.set_xticks([]), ax.set_yticks([])
    for side in ax.spines.values():
        side.set_linestyle("--")


def warp_and_density(prefix=""):
    """For a 2D layer: the square grid carried to latent space, there and back again (if it has an inverse), and the density of the data."""

    def draw(inputs, outputs, reference):
        theirs, mine = usable(reference, prefix), usable(outputs, prefix)
        names = ("grid in latent space", "there and back", "density of the data")
        names = names if theirs[1] is not None else names[::2]
        figure = plotting.Picture(figsize=(9, 2.8 * len(names)))  # laid out by hand: the automatic layout costs more than the drawing
        space = 0.15 / len(names)
        axes = figure.subplots(len(names), 3, gridspec_kw={"left": 0.05, "right": 0.99, "top": 1 - space, "bottom": space, "wspace": 0.04, "hspace": 0.16})
        for ax, title in zip(axes[0], ("yours", "reference", "difference")):
            ax.set_title(title, fontsize=plotting.FONT + 2)
        for ax, name in zip(axes[:, 0], names):
            ax.set_ylabel(name, fontsize=plotting.FONT)
        reason = "not solved yet" if unsolved(outputs) else "nothing to draw"
        for row in range(len(names) - 1):
            # A few points are carried very far; the frame is for the others.
            low, high = np.quantile(theirs[row].reshape(-1, 2), [0.02, 0.98], axis=0)
            margin = 0.15 * (high - low)
            box = np.stack([low - margin, high + margin], 1).ravel()
            grid_lines(axes[row, 1], theirs[row], box, "black")
            if mine[row] is None:
                empty(axes[row, 0], reason), empty(axes[row, 2], "")
                continue
            grid_lines(axes[row, 0], mine[row], box, "blue")
            between = np.stack([theirs[row], mine[row]], 2)[:, ::6].reshape(-1, 2, 2)  # reference point -> your point
            grid_lines(axes[row, 2], theirs[row], box, "#bbbbbb")
            grid_lines(axes[row, 2], between, box, "red")
            axes[row, 2].set_xlabel(f"largest {np.abs(mine[row] - theirs[row]).max():.2g}", fontsize=plotting.FONT)
        top = theirs[2].max()
        view = {"extent": (-LIMIT, LIMIT) * 2, "origin": "lower", "aspect": "auto"}
        axes[-1, 1].imshow(theirs[2], cmap="cividis", vmin=0, vmax=top, **view)
        if mine[2] is None:
            empty(axes[-1, 0], reason), empty(axes[-1, 2], "")
        else:
            axes[-1, 0].imshow(mine[2], cmap="cividis", vmin=0, vmax=top, **view)
            axes[-1, 2].imshow(mine[2] - theirs[2], cmap="PuOr", vmin=-top, vmax=top, **view)
            axes[-1, 2].set_xlabel(f"largest {np.abs(mine[2] - theirs[2]).max():.2g}", fontsize=plotting.FONT)
        for ax in axes.flat:
            ax.set_xticks([]), ax.set_yticks([])
        return figure

    return draw


def grid_lines(ax, lines, box, colour):
    plotting.warped_grid(ax, lines, box, plotting.PALETTE.get(colour, colour))
    ax.set_aspect("auto")


def unsolved(outputs):
    return not outputs.arrays or any(kind == "unsolved" for kind, _ in outputs.complaints().values())


def curves(key, at, names, title):
    """For functions of one number: each output column of `key` against the input `at`, if there is something to draw."""

    def draw(inputs, outputs, reference):
        if key not in outputs or outputs.arrays[key].shape != (len(inputs[at]), len(names)):
            return None
        figure = plotting.Picture(figsize=(7, 3.4), layout="constrained")
        ax = figure.subplots()
        for column, (name, colour, style) in enumerate(zip(names, ("blue", "red", "green"), ("-", "--", ":"))):
            ax.plot(inputs[at][:, 0], outputs.arrays[key][:, column], style, color=plotting.PALETTE[colour], label=name, linewidth=2)
        ax.set_title(title, fontsize=plotting.FONT), ax.set_xlabel("x1", fontsize=plotting.FONT), ax.legend(fontsize=plotting.FONT, frameon=False)
        return figure

    return draw


def against_reference(keys, at, names, view, axis="x"):
    """For a scalar map: yours and the reference's values over the inputs `at` (N,), one panel for each key, within `view`."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(5.5 * max(len(keys), 1.3), 3.6), layout="constrained")
        inside = (inputs[at] >= view[0]) & (inputs[at] <= view[1])
        x = inputs[at][inside]
        for ax, key, name in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, names):
            ax.plot(x, reference.arrays[key][inside], "-", color=plotting.PALETTE["black"], label="reference", linewidth=4, alpha=0.4)
            mine = outputs.arrays.get(key)
            if mine is not None and mine.shape == inside.shape:
                ax.plot(x, mine[inside], "--", color=plotting.PALETTE["red"], label="yours", linewidth=2)
            else:
                ax.plot([], [], " ", label="yours: not solved yet" if unsolved(outputs) else "yours: nothing to draw")
            ax.set_xlabel(axis, fontsize=plotting.FONT), ax.set_title(name, fontsize=plotting.FONT)
            ax.legend(fontsize=plotting.FONT - 2, frameon=False)
        return figure

    return draw


def square(ax, matrix, title, limit=None):
    """A matrix as a coloured square with its numbers."""
    limit = limit or max(1.0, np.abs(matrix).max())
    ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.2g}" if abs(value) > 5e-4 else "0", ha="center", va="center", fontsize=11,
                    color="white" if abs(value) > 0.6 * limit else "black")
    ax.set_title(title, fontsize=plotting.FONT), ax.set_xticks([]), ax.set_yticks([])


def matrices(compare=True):
    """For a linear layer: its Jacobian dz/dx beside the reference's, or beside the product with what inverse does."""

    def linear_map(inputs, outputs, key, at):
        values = outputs.arrays.get(key)
        if values is None or values.shape != (inputs[at].size * 4, inputs[at].shape[1]) or not np.isfinite(values).all():
            return None
        return jacobian(values, inputs[at].shape)[0]

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(11, 3.8), layout="constrained")
        axes = figure.subplots(1, 3)
        mine = linear_map(inputs, outputs, "forward near.z", "x")
        back = outputs.arrays.get("inverse of forward.x")
        if compare:
            theirs = linear_map(inputs, reference, "forward near.z", "x")
            square(axes[1], theirs, "reference")
        if mine is None:
            for ax in axes[:1] if compare else axes:
                empty(ax, "yours: not solved yet" if unsolved(outputs) else "yours: nothing to draw")
            if compare:
                empty(axes[2], "")
            return figure
        square(axes[0], mine, "yours: dz/dx" if compare else "your W, with other weights")
        if compare:
            square(axes[2], mine - theirs, "difference", 1.0)
            return figure
        square(axes[1], np.linalg.pinv(mine), "what inverse must do")
        if back is not None and back.shape == inputs["x"].shape:
            axes[2].scatter(inputs["x"].ravel(), back.ravel(), color=plotting.PALETTE["red"], s=20)
            axes[2].plot([-4, 4], [-4, 4], ":", color="black")
            axes[2].set_title("inverse(forward(x)) against x", fontsize=plotting.FONT)
        else:
            empty(axes[2], "inverse: nothing to draw")
        return figure

    return draw


def clouds(before, after):
    """For a normalising layer: the first two columns of a batch before and after, with the unit circle."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(11, 3.8), layout="constrained")
        axes = figure.subplots(1, 3)
        t = np.linspace(0, 2 * np.pi, 100)
        mine = outputs.arrays.get(after)
        for ax, points, title, colour in ((axes[0], inputs[before], "the batch", "sky"), (axes[1], mine, "yours", "blue"),
                                          (axes[2], reference.arrays[after], "reference", "black")):
            ax.set_title(title, fontsize=plotting.FONT)
            if points is None or points.shape != inputs[before].shape or not np.isfinite(points).all():
                empty(ax, "not solved yet" if unsolved(outputs) else "nothing to draw")
                continue
            ax.plot(np.cos(t), np.sin(t), "--", color=plotting.PALETTE["red"])
            ax.scatter(points[:, 0], points[:, 1], s=10, color=plotting.PALETTE[colour])
            ax.set_aspect("equal", "datalim")
        return figure

    return draw


def density_on_a_line(x, target, mine):
    """For a trained flow on the line: the target's density and the flow's, `mine(outputs)` or None."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(7, 3.4), layout="constrained")
        ax = figure.subplots()
        ax.fill_between(x, target, color="#cccccc", label="target")
        density = mine(outputs)
        if density is None:
            ax.plot([], [], " ", label="yours: not solved yet" if unsolved(outputs) else "yours: nothing to draw")
        else:
            ax.plot(x, density, color=plotting.PALETTE["blue"], linewidth=2, label="the flow that you trained")
        ax.set_ylim(0, 1.6 * target.max())  # room for the legend above the curves
        ax.legend(fontsize=plotting.FONT, frameon=False, loc="upper center", ncols=2), ax.set_xlabel("x", fontsize=plotting.FONT)
        return figure

    return draw


def bars(keys, ylabel):
    """One bar for each output of `keys(inputs)`."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(7, 2.8), layout="constrained")
        ax = figure.subplots()
        found = {k: float(outputs.arrays[k]) for k in keys(inputs) if k in outputs and np.isfinite(outputs.arrays[k]).all()}
        if not found:
            empty(ax, "yours: not solved yet" if unsolved(outputs) else "yours: nothing to draw")
            return figure
        ax.bar([k.rsplit(".", 1)[0] for k in found], list(found.values()), color=plotting.PALETTE["blue"], width=0.4)
        ax.set_ylabel(ylabel, fontsize=plotting.FONT)
        return figure

    return draw


def directions(functions, names):
    """For judgements of functions of one variable: `functions(inputs)` of these names on their grids, each with your answer and the right one."""
    words = {1: "+1", -1: "-1", 0: "0"}

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(11, 5.6), layout="constrained")
        for ax, name in zip(figure.subplots(2, (len(names) + 1) // 2).flat, names):
            f, x = functions(inputs)[name]
            ax.plot(x, f(x), ".-", color=plotting.PALETTE["blue"])
            mine, right = outputs.arrays.get(f"{name}.answer"), float(reference.arrays[f"{name}.answer"])
            good = mine is not None and float(mine) == right
            said = ("not solved yet" if unsolved(outputs) else "no answer") if mine is None else words.get(float(mine), f"{float(mine):.3g}")
            ax.set_title(f"{name}: {words[right]}", fontsize=plotting.FONT - 1)
            ax.set_xlabel(f"yours: {said}", fontsize=plotting.FONT - 1, color=plotting.PALETTE["green" if good else "red"])
            ax.set_xticks([]), ax.set_yticks([])
        return figure

    return draw


def agreement(keys, title):
    """For numbers without an order: yours against the reference's, all on the diagonal if they agree."""

    def draw(inputs, outputs, reference):
        figure = plotting.Picture(figsize=(5.6, 5), layout="constrained")
        ax = figure.subplots()
        drawn = False
        for key, colour, mark in zip(keys, ("blue", "red", "green", "orange", "purple"), "osv^D"):
            want, mine = reference.arrays[key], outputs.arrays.get(key)
            ax.plot(want, want, "-", color="#cccccc", zorder=0)
            if mine is not None and mine.shape == want.shape and np.isfinite(mine).all():
                ax.scatter(want, mine, color=plotting.PALETTE[colour], marker=mark, label=key.rsplit(".", 1)[0], alpha=0.8)
                drawn = True
        if not drawn:
            ax.plot([], [], " ", label="yours: not solved yet" if unsolved(outputs) else "yours: nothing to draw")
        ends = np.concatenate([reference.arrays[k].ravel() for k in keys])
        ax.plot([ends.min(), ends.max()], [ends.min(), ends.max()], ":", color="black", zorder=0)
        ax.set_title(title, fontsize=plotting.FONT), ax.set_xlabel("reference", fontsize=plotting.FONT), ax.set_ylabel("yours", fontsize=plotting.FONT)
        ax.legend(fontsize=plotting.FONT - 3, frameon=False)
        return figure

    return draw


def densities(key, box, n, view):
    """For log-densities on the n x n cells of the square from -box to box: yours, the reference's, the difference, within -view to view."""

    def draw(inputs, outputs, reference):
        figure, axes = plotting.side_by_side(3, ["yours", "reference", "difference"], size=3.4)
        theirs = np.exp(reference.arrays[key].reshape(n, n))
        mine = outputs.arrays.get(key)
        place = {"extent": (-box, box) * 2, "origin": "lower"}
        axes[1].imshow(theirs, cmap="cividis", vmin=0, vmax=theirs.max(), **place)
        if mine is None or mine.shape != (n * n,) or not np.isfinite(mine).all():
            empty(axes[0], "not solved yet" if unsolved(outputs) else "nothing to draw"), empty(axes[2], "")
        else:
            mine = np.exp(np.minimum(mine.astype(float), 20)).reshape(n, n)
            axes[0].imshow(mine, cmap="cividis", vmin=0, vmax=theirs.max(), **place)
            axes[2].imshow(mine - theirs, cmap="PuOr", vmin=-theirs.max(), vmax=theirs.max(), **place)
            axes[2].set_xlabel(f"largest {np.abs(mine - theirs).max():.2g}", fontsize=plotting.FONT)
        for ax in axes:
            if ax.images:
                ax.set_xlim(-view, view), ax.set_ylim(-view, view)
            ax.set_xticks([]), ax.set_yticks([])
        return figure

    return draw
