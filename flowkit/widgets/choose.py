"""`explore`: whatever it is given, the view that shows it best, or one sentence that says why none can."""
import html

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
    first, and an object that works in another number of dimensions, or on integers, is named as such.
    """
    from .change_of_variables import bend
    from .layer_by_layer import layers
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
    if shape and shape not in ((1,), (2,)):
        return Sentence(f"{name} lives in {' x '.join(map(str, shape))} dimensions, and the views draw the line and the plane.")
    wanted = shape[0] if shape else (2 if 2 in fits else 1)
    if wanted not in fits:
        return Sentence(f"{name} cannot be asked about points of the plane or the line ({why[wanted]}).")
    return layers(flow, **options) if wanted == 2 else bend(_Whole(steps), **options)


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
