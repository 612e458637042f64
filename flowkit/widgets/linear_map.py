"""View 2, `matrix`: a linear map of the plane by its columns, and what its determinant measures.

    z = A x,   A = (a1 a2):   the unit square goes to the parallelogram of the columns, whose signed area is det A

The letter in the square tells the sign: where det A < 0 it is mirrored, and the outline is dashed. On the way from the identity to
such a matrix the determinant passes through 0, where the plane is pressed flat and nothing can be undone.
"""
import math

import numpy as np

from . import scene
from .view import View, slider

BOX = (-2.4, 2.4, -2.4, 2.4)
REACH = 2.0                         # of a column's entries
FLAT = 5e-4                         # a determinant below this is called 0: two digits are shown
SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], float)
LETTER = np.array([[[0.3, 0.15], [0.3, 0.85]], [[0.3, 0.85], [0.78, 0.85]], [[0.3, 0.52], [0.65, 0.52]]])
GRID = scene.grid((-5, 5, -5, 5), 21, 2)

PRESETS = {name: {"columns": np.array(columns, float), "selected": 0, "part": 1.0} for name, columns in {
    "stretch and shear": [[1.5, 0.3], [0.4, 1.2]],
    "triangular": [[1.5, -0.9], [0.0, 0.8]],
    "rotation": [[math.cos(0.6), math.sin(0.6)], [-math.sin(0.6), math.cos(0.6)]],
    "mirror": [[0.5, 1.3], [1.2, 0.4]],
    "singular": [[1.2, 0.6], [-0.8, -0.4]],
}.items()}


def matrix(A=None):
    """Drag the columns of a 2 x 2 matrix A; the image of the unit square has the signed area det A.

    Digits choose a column, arrows move its tip, space goes from the identity to A in a straight line. A: a matrix of yours, (2, 2),
    whose columns are A[:, 0] and A[:, 1]. Raises ValueError for another shape, or entries that are not finite.
    """
    start = {"presets": PRESETS}
    if A is not None:
        A = scene.array(A, np.float64)
        if A.shape != (2, 2) or not np.isfinite(A).all():
            raise ValueError(f"A must be a finite matrix of shape (2, 2), got {f'shape {A.shape}' if A.shape != (2, 2) else A.tolist()}")
        start = {"state": {"columns": A.T.copy(), "selected": 0}}

    def put(state, index, tip):
        columns = np.array(state["columns"])
        columns[index] = np.clip(tip, -REACH, REACH)
        return {"columns": columns, "selected": index, "part": 1.0}

    def nudge(axis):
        return lambda state, by: put(state, state["selected"], state["columns"][state["selected"]] + 0.05 * by * np.eye(2)[axis])

    return View("Matrix: the determinant is an area with a sign", lambda state, coarse: [_picture(state)], _caption,
                {"part": slider("part of A", 1.0, 0.0, 1.0, 0.02)}, steps=(nudge(0), nudge(1)), walk="part",
                drag=lambda state, name, index, x, z: put(state, index, (x, z)), press=lambda state, digit: {"selected": min(digit, 2) - 1},
                rate=20, **start)


def shown(state):
    """The matrix that is drawn, (2, 2): A, or that part of the straight way from the identity to A; and its determinant."""
    A = (1 - state["part"]) * np.eye(2) + state["part"] * np.asarray(state["columns"]).T
    return A, float(A[0, 0] * A[1, 1] - A[0, 1] * A[1, 0])


def _caption(state):
    A, det = shown(state)
    if abs(det) < FLAT:
        return "The columns lie on one line: the square has lost its area, many x have the same z, and nothing can undo that."
    if abs(A[0, 1]) < FLAT:
        return "Triangular, nothing above the diagonal: the determinant is the product of the two entries on it, and the shear is free."
    if det < 0:
        return "The letter is mirrored: the determinant is negative, its size is still the area, and the density needs the size only."
    return "The square's image has the area |det A|: a density over it is thinner by that factor, so log p(x) = log p(z) + log|det A|."


def _picture(state):
    A, det = shown(state)
    flat, mirrored = abs(det) < FLAT, det <= -FLAT
    colour, dash = ("red", "dashed") if mirrored else ("green", "solid")

    def plane(M, title, colour, dash, *more):
        at = lambda xy: xy @ M.T  # noqa: E731
        return scene.panel([
            scene.lines(at(GRID), "quiet", 1, alpha=0.35), scene.area(at(SQUARE), colour, 0.3), scene.lines(at(SQUARE), colour, 3, dash),
            scene.lines(at(LETTER), "ink", 5), scene.arrows(np.stack([[0, 0], M[:, 0]]), "blue", 4.5),
            scene.arrows(np.stack([[0, 0], M[:, 1]]), "orange", 4.5), *more], BOX, title, xticks=[-2, 0, 2], yticks=[-2, 0, 2], equal=True)

    tips = scene.handles(A.T, "column", ["blue", "orange"], ["disc", "square"], state["selected"])
    names = [scene.text(f"a{i + 1}", *_beyond(A[:, i]), weight="600") for i in (0, 1)]
    left = plane(np.eye(2), "x: the unit square", "green", "solid")
    right = plane(A, "z = A x", colour, dash, *names, tips)
    high = max(1.5, 1.25 * abs(det))
    value = f"{0.0 if flat else det:.2f}"
    meter = scene.panel([
        scene.lines([(0, 0), (1, 0)], "ink", 2), scene.lines([(0, 1), (1, 1)], "ink", 2, "dotted"),
        scene.bars([(0.25, 0.75, min(0, det), max(0, det))], [colour]),
        scene.text(_minus(value), 0.5, det + (0.03 if det >= 0 else -0.03) * high, base="bottom" if det >= 0 else "top", weight="600"),
    ], (0, 1, -high, high), "det A", yticks=[-1, 0, 1], width=0.35, framed=False)
    size = "log|det A| = −∞, no inverse" if flat else f"log|det A| = {math.log(abs(det)):.2f}" + (", turned over" if mirrored else "")
    label = f"A = [{A[0, 0]:.2f}, {A[0, 1]:.2f}; {A[1, 0]:.2f}, {A[1, 1]:.2f}], det A = {value}, {size}"
    return scene.frame([[left, right, meter]], _minus(label))


def _beyond(tip):
    """A place for a vector's name, a little further out."""
    length = float(np.hypot(*tip))
    return tip + (0.42 / length * tip if length > 0.05 else np.array([0.42, 0.0]))


def _minus(words):
    return words.replace("-", "−")
