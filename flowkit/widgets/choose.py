"""`explore`: whatever it is given, the view that shows it best, or one sentence that says why none can."""
import html

import numpy as np
import torch

from .paths import steps_of


class Sentence(str):
    """A sentence that shows itself in a notebook without quotation marks."""

    def __repr__(self):
        return str(self)

    def _repr_html_(self):
        return f"<p style='font-size: 18px'>{html.escape(self)}</p>"


def explore(flow, **options):
    """The view for a layer or a flow: `bend` on the line, `layers` on the plane; else a Sentence that says why there is none.

    flow: anything with forward(x) -> (z, ldj), or a list of such layers; options go to the view. A class is asked to be made
    first, and an object that works in another number of dimensions, or on integers, is named as such. Besides: a matrix (2, 2) goes to
    `matrix`, a planar layer to `planar`, a list of masks, a masked net or a flow of one in any dimension to `autoregressive`, and a tuple
    (a, b, w) of a deep sigmoidal flow to `sigmoidal`.
    """
    from .change_of_variables import bend
    from .layer_by_layer import layers
    from .linear_map import matrix
    from .masked_net import autoregressive
    from .planar_fold import planar
    from .sigmoids import sigmoidal
    if _is_array(flow):
        return _shown(lambda: matrix(flow, **options))
    if isinstance(flow, (list, tuple)) and flow and all(map(_is_array, flow)):
        dsf = isinstance(flow, tuple) and [v.ndim for v in flow] == [1, 1, 1]
        return _shown(lambda: sigmoidal(*flow, **options) if dsf else autoregressive(flow, **options))
    name = type(flow).__name__
    if isinstance(flow, type):
        return Sentence(f"{flow.__name__} is a class: make a layer of it first, such as {flow.__name__}(net).")
    steps = steps_of(flow)
    bare = [type(s).__name__ for s in steps if not hasattr(s, "forward")]
    if bare:
        return Sentence(f"{bare[0]} has no forward(x) -> (z, ldj), so there is nothing to show.")
    odd = [type(s).__name__ for s in steps if getattr(s, "stochastic", False) or not getattr(s, "bijective", True)]
    if odd:
        return Sentence(f"{odd[0]} is no bijection: points on their way through it do not fill a plane that can be drawn.")
    fits, why = [], {}
    for dim in (2, 1):
        # Any exception: the question is put to a stranger's layer, and its answer is a reason to be told.
        try:
            with torch.no_grad():
                z, ldj = _asked(steps, dim)
            if z.shape != (7, dim) or ldj.shape != (7,):
                raise ValueError(f"forward gives z of shape {tuple(z.shape)} and ldj of shape {tuple(ldj.shape)} for 7 points")
            fits.append(dim)
        except Exception as e:
            why[dim] = f"{type(e).__name__}: {e}".splitlines()[0]
    shape = tuple(getattr(getattr(flow, "base", None), "event_shape", ()))
    if not fits or shape not in ((), (1,), (2,)):
        # A masked net gives parameters and no z, and its flow may live in any dimension: who sees whom can be shown all the same.
        for net in (steps[0], getattr(steps[0], "net", None)) if len(steps) == 1 else ():
            if any("mask" in key.rpartition(".")[2] for key, _ in getattr(net, "named_buffers", list)()):
                return _shown(lambda: autoregressive(net, **options))
    if shape and shape not in ((1,), (2,)):
        return Sentence(f"{name} lives in {' x '.join(map(str, shape))} dimensions, and the views draw the line and the plane.")
    wanted = shape[0] if shape else (2 if 2 in fits else 1)
    if wanted not in fits:
        return Sentence(f"{name} cannot be asked about points of the plane or the line ({why[wanted]}).")
    if wanted == 2 and steps == [flow] and all(hasattr(flow, part) for part in "wub"):
        shown = _shown(lambda: planar(flow, **options))
        if not isinstance(shown, Sentence):
            return shown
    return layers(flow, **options) if wanted == 2 else bend(_Whole(steps), **options)


def _is_array(thing):
    return isinstance(thing, (np.ndarray, torch.Tensor))


def _shown(make):
    try:
        return make()
    except ValueError as e:
        return Sentence(f"It cannot be shown: {e}.")


def _asked(steps, dim):
    import copy
    z = torch.linspace(-1, 1, 7 * dim).reshape(7, dim)
    total = torch.zeros(7)
    for step in steps:
        z, ldj = copy.deepcopy(step).forward(z)
        total = total + ldj
    return z, total


class _Whole:
    """Several layers as one."""

    def __init__(self, steps):
        import copy
        self.steps = copy.deepcopy(steps)

    def forward(self, x):
        total = x.new_zeros(len(x))
        for step in self.steps:
            x, ldj = step.forward(x)
            total = total + ldj
        return x, total
