"""View 5, `autoregressive`: which inputs of a masked net reach which output, and how many passes that costs in each direction.

    parameters of coordinate i = net(x)_i, a function of the coordinates before i

An open path from an input to an output of the same coordinate or an earlier one breaks the triangle of the Jacobian: it is drawn red and
dashed. When the net's input is known (density of a MAF, samples of an IAF) one pass gives all coordinates; when it must be found (samples of a MAF,
density of an IAF) each pass gives one more, D in all. (Germain et al. 2015; Papamakarios et al. 2017, section 3.)
"""
import numpy as np

from ..nets import made_degrees, made_masks
from . import scene
from .view import View, dropdown

MOST = 40                           # units in a layer that can be told apart
MERGED = 12                         # above so many, units with the same connections are drawn as one
FLOWS = ("MAF", "IAF")


def autoregressive(net=None, dim=4, order=None):
    """Step through the outputs of a masked net by arrow keys or the pointer: the paths that reach each, and the passes so far.

    net: None for a MADE of `dim` coordinates; or a list of masks of yours, each (out, in), the last one's row p * dim + i being parameter p
    of coordinate i; or a net that holds such masks as buffers with "mask" in their names, as flowkit's MADE does. order: the
    coordinates' order, a permutation of 0 .. dim - 1 (default: the net's own, or as they stand). Raises ValueError if the masks do not fit.
    """
    start = {}
    if net is None:
        if not 2 <= dim <= 9:
            raise ValueError(f"dim must lie between 2 and 9, got {dim}")
        start = {"presets": _presets(dim, order)}
    else:
        masks = masks_of(net)
        order = _order(net.order if order is None and hasattr(net, "order") else order, masks[0].shape[1])
        start = {"state": {"masks": masks, "order": order}}

    def compute(state, coarse):
        reach = Reach(state["masks"], state["order"])
        return [_picture(reach, k, state["flow"]) for k in range(reach.dim + 1)]

    return View("Autoregressive: who sees whom, and what it costs", compute, _caption, {"flow": dropdown("flow", FLOWS)}, rate=1.5, stride=1, **start)


def _presets(dim, order):
    """MADEs right and wrong of `dim` coordinates, two parameters each."""
    wide, order = (2 * dim - 2,) * 2, _order(order, dim)
    degrees = made_degrees(dim, wide, order)
    right = made_masks(dim, wide, 2, order)
    loose = [*right[:-1], degrees[-1][None, :] <= degrees[0].repeat(2)[:, None]]
    same = [*right[:-1], degrees[-1][None, :] < degrees[0].repeat_interleave(2)[:, None]]
    return {name: {"masks": [scene.array(m) != 0 for m in masks], "order": turned} for name, masks, turned in (
        ("MADE", right, order), ("order turned round", made_masks(dim, wide, 2, order[::-1]), order[::-1]),
        ("wrong: ≤ at the end", loose, order), ("wrong: columns mixed", same, order),
        ("one hidden unit", made_masks(dim, (1,), 2, order), order))}


def masks_of(net):
    """The masks (out, in) of a net, or of a list, as boolean arrays from input to output. Raises ValueError, in one sentence, if they do not fit."""
    if hasattr(net, "named_buffers"):
        found = [b for name, b in net.named_buffers() if "mask" in name.rpartition(".")[2]]
        if not found:
            raise ValueError(f"{type(net).__name__} has no buffer with \"mask\" in its name: give the list of its masks")
    else:
        found = list(net)
    masks = [scene.array(m) != 0 for m in found]
    shapes = [m.shape for m in masks]
    if not masks or any(len(s) != 2 for s in shapes):
        raise ValueError(f"the masks must be a list of matrices (out, in), got shapes {shapes}")
    if any(below[0] != above[1] for below, above in zip(shapes, shapes[1:])):
        raise ValueError(f"each mask (out, in) must take in what the one before puts out, got shapes {shapes}")
    if shapes[-1][0] % shapes[0][1]:
        raise ValueError(f"the last mask must have P rows for each of {shapes[0][1]} coordinates, got {shapes[-1][0]}")
    masks = _merged(masks)
    widest = max(max(m.shape) for m in masks)
    if widest > MOST:
        raise ValueError(f"{widest} units in a layer, all connected in their own ways, cannot be told apart in a picture: give a smaller net")
    return masks


def _merged(masks):
    """The same net, with those hidden units of a wide layer made one that see the same units and are seen by the same."""
    masks = list(masks)
    for _ in masks:
        for layer in range(len(masks) - 1):
            into, out = masks[layer], masks[layer + 1]
            if len(into) > MERGED:
                _, first = np.unique(np.concatenate([into, out.T], 1), axis=0, return_index=True)
                masks[layer], masks[layer + 1] = into[np.sort(first)], out[:, np.sort(first)]
    return masks


def _order(order, dim):
    order = list(range(dim)) if order is None else [int(i) for i in order]
    if sorted(order) != list(range(dim)):
        raise ValueError(f"order must be a permutation of 0 .. {dim - 1}, got {order}")
    return order


class Reach:
    """Which units lie on open paths: `sees` (dim, dim) is True at [i, j] if input j reaches an output of coordinate i."""

    def __init__(self, masks, order):
        self.masks, self.order, self.dim = masks, list(order), masks[0].shape[1]
        self.rank = np.argsort(order)
        self.params = len(masks[-1]) // self.dim
        whole = np.eye(self.dim, dtype=bool)
        for mask in masks:
            whole = mask @ whole
        self.sees = whole.reshape(self.params, self.dim, self.dim).any(0)
        self.allowed = self.rank[None, :] < self.rank[:, None]

    @property
    def forbidden(self):
        """(dim, dim): input j reaches coordinate i, though it does not come before it."""
        return self.sees & ~self.allowed

    @property
    def missing(self):
        """(dim, dim): input j might reach coordinate i, and does not."""
        return ~self.sees & self.allowed

    def edges(self, inputs, outputs):
        """For each mask the connections (out, in) that lie on an open path from one of the inputs to one of the outputs' coordinates."""
        ahead = [np.isin(np.arange(self.dim), inputs)]
        for mask in self.masks:
            ahead.append(mask @ ahead[-1])
        back = np.tile(np.isin(np.arange(self.dim), outputs), self.params)
        found = []
        for mask, before in zip(self.masks[::-1], ahead[-2::-1]):
            found.append(mask & back[:, None] & before[None, :])
            back = back @ mask
        return found[::-1]


def _pairs(table):
    return [(int(i), int(j)) for i, j in np.argwhere(table)]


def _caption(state):
    reach = Reach(state["masks"], state["order"])
    wrong, missing = _pairs(reach.forbidden), _pairs(reach.missing)
    if wrong:
        i, j = wrong[0]
        which = f"input {j + 1} reaches its own output" if i == j else f"input {j + 1} reaches output {i + 1}, which comes before it"
        return f"The dashed red path is forbidden: {which}, so the Jacobian is no triangle, and its diagonal does not give the determinant."
    if missing:
        i, j = missing[0]
        return f"No path is forbidden, but some are missing (rings): output {i + 1} might see input {j + 1} and does not, which costs expressiveness."
    if state["flow"] == "MAF":
        return ("Each output sees the inputs before it only: known x give all z in one pass, but to sample, each x needs those before it, "
                "one pass each.")
    return ("The net reads z instead of x: known z give all x in one pass, but for the density of given data each z needs those before it, "
            "one pass each.")


def _places(reach):
    """The units' places, one array (n, 2) a layer: inputs above, outputs below; the outputs of one coordinate lie side by side."""
    sizes = [reach.dim, *(len(m) for m in reach.masks)]
    places = []
    for layer, n in enumerate(sizes):
        across = (np.arange(n) + 0.5) / n
        if layer == len(sizes) - 1:
            p, i = np.divmod(np.arange(n), reach.dim)
            across = (i + 0.5 + 0.5 * ((p + 0.5) / reach.params - 0.5)) / reach.dim
        places.append(np.stack([across, np.full(n, 1 - layer / (len(sizes) - 1))], 1))
    return places


def _segments(places, tables):
    found = [np.stack([below[j], above[i]]) for below, above, table in zip(places, places[1:], tables) for i, j in np.argwhere(table)]
    return np.array(found).reshape(-1, 2, 2)


def _picture(reach, k, flow):
    given, made = ("x", "z") if flow == "MAF" else ("z", "x")
    places, dim = _places(reach), reach.dim
    here = reach.order[k - 1] if k else None
    outputs = [here] if k else list(range(dim))
    bad = {j for i, j in _pairs(reach.forbidden) if i in outputs}
    net = [scene.lines(_segments(places, reach.masks), "faint", 1.5)]
    if k:
        good = [j for j in range(dim) if reach.allowed[here, j] and reach.sees[here, j]]
        net.append(scene.lines(_segments(places, reach.edges(good, outputs)), "blue", 3.5))
    for i in outputs:
        wrong = [j for j in bad if reach.forbidden[i, j]]
        net.append(scene.lines(_segments(places, reach.edges(wrong, [i])), "red", 3.5, "dashed"))
    lit = [np.zeros(len(p), bool) for p in places]
    for layer, table in enumerate(reach.edges([j for j in range(dim) if k and reach.sees[here, j]], outputs)):
        lit[layer] |= table.any(0)
        lit[layer + 1] |= table.any(1)
    if k:
        lit[-1] |= np.arange(len(lit[-1])) % dim == here
    for layer, (at, on) in enumerate(zip(places, lit)):
        size = min(9.0, 150 / len(at))
        marker = "square" if layer in (0, len(places) - 1) else "disc"
        net += [scene.points(at[~on], "quiet", "ring", size, 1), scene.points(at[on], "blue", marker, size, 1)]
    for j in range(dim):
        colour, weight = "red" if j in bad else "ink", "600" if k and reach.sees[here, j] else ""
        net.append(scene.text(f"{given}{j + 1}", places[0][j][0], 1.12, colour, weight=weight))
    net += [scene.text(f"{i + 1}", (i + 0.5) / dim, -0.17, weight="600" if i == here else "") for i in range(dim)]
    net.append(scene.spots(np.concatenate([places[-1], [[(i + 0.5) / dim, -0.1] for i in range(dim)]]),
                           [int(reach.rank[i]) + 1 for i in [*np.arange(len(places[-1])) % dim, *range(dim)]]))
    panels = [scene.panel(net, (0, 1, -0.24, 1.2), f"the net: {given} above, parameters below", width=1.4, framed=False),
              _triangle(reach, here), _passes(reach, k, given, made)]
    return scene.frame([panels], _label(reach, k, flow, given))


def _label(reach, k, flow, given):
    if not k:
        return f"{flow}: all paths"
    here = reach.order[k - 1]
    seen = ", ".join(f"{given}{j + 1}" for j in range(reach.dim) if reach.sees[here, j])
    return f"pass {k} of {reach.dim}: output {here + 1} from {seen or 'no input'}"


def _triangle(reach, here):
    """Who sees whom, as the Jacobian's zeros: a row for each output, a column for each input."""
    dim, marks = reach.dim, []
    at = lambda table: np.array([(j + 0.5, reach.dim - i - 0.5) for i, j in _pairs(table)]).reshape(-1, 2)  # noqa: E731
    if here is not None:
        marks.append(scene.area([(0, dim - here), (dim, dim - here), (dim, dim - here - 1), (0, dim - here - 1)], "sky", 0.35))
    marks += [scene.lines([[(i, 0), (i, dim)] for i in range(dim + 1)] + [[(0, i), (dim, i)] for i in range(dim + 1)], "faint", 1)]
    size = 40 / dim
    own = np.eye(dim, dtype=bool) & ~reach.sees
    marks += [scene.points(at(reach.sees & reach.allowed), "blue", "square", size, 1), scene.points(at(own), "ink", "disc", 0.5 * size, 1),
              scene.points(at(reach.forbidden), "red", "cross", size, 1), scene.points(at(reach.missing), "quiet", "ring", 0.7 * size, 1)]
    marks.append(scene.spots([(dim / 2, dim - i - 0.5) for i in range(dim)], reach.rank + 1))
    for i in range(dim):
        marks += [scene.text(f"{i + 1}", -0.35, dim - i - 0.5, "quiet"), scene.text(f"{i + 1}", i + 0.5, -0.4, "quiet")]
    return scene.panel(marks, (-0.7, dim, -0.8, dim), "who sees whom", equal=True, framed=False)


def _passes(reach, k, given, made):
    """The two directions: a row of coordinates each, filled by the passes so far."""
    dim, marks = reach.dim, []
    directions = ((f"{made} from {given}", 1, range(dim) if k else ()), (f"{given} from {made}", dim, reach.order[:k]))
    names = ("density", "sampling") if given == "x" else ("sampling", "density")
    for row, (name, (words, total, done)) in enumerate(zip(names, directions)):
        y = 1.62 - row
        colour, weight = ("green", "600") if k >= total else ("quiet", "")
        marks += [scene.text(f"{name}, {words}", 0, y + 0.2, align="left", weight="600"),
                  scene.text(f"pass {min(k, total)} of {total}", 0, y - 0.52, colour, "left", weight=weight)]
        for i in range(dim):
            left, right, low, high = i / dim + 0.01, (i + 1) / dim - 0.01, y - 0.36, y + 0.04
            outline = np.array([(left, low), (right, low), (right, high), (left, high), (left, low)])
            new = i in done and k and (row == 0 and k == 1 or row == 1 and i == reach.order[k - 1])
            if i in done:
                marks.append(scene.area(outline, "orange" if new else "sky", 0.8))
            marks += [scene.lines(outline, "ink", 3 if new else 1.2),
                      scene.text(f"{made if row == 0 else given}{i + 1}", (left + right) / 2, y - 0.16)]
    return scene.panel(marks, (0, 1, 0, 2), "passes of the net", width=0.95, framed=False)
