"""Somebody's own function in a view: its answer is looked at before it is drawn, and what is wrong with it is said in one sentence.

The view stays: it shows what it can without the function, and the sentence stands under the picture.
"""
import numpy as np
import torch

from . import scene


def answer(name, value, shape):
    """`value` as a float64 array. Raises ValueError, in one sentence, unless it is a finite tensor of this shape."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of shape {tuple(shape)}, got {got}")
    wrong = int((~torch.isfinite(value)).sum())
    if wrong:
        raise ValueError(f"{name} must be finite, and {wrong} of its {value.numel()} values are not")
    return scene.array(value, np.float64)


def or_else(own, plain):
    """own() and no words; or, where that raises, plain() and a sentence that says why."""
    # Any exception: the function may be a student's, half finished.
    try:
        return own(), ""
    except Exception as e:
        lines = str(e).splitlines() or ["no words"]
        return plain(), f"Careful: {lines[0] if isinstance(e, ValueError) else f'{type(e).__name__}: {lines[0]}'}."


def like(thing):
    """A scalar tensor of the dtype and device of a module's weights, or of torch's default where it has none."""
    return next(iter(thing.parameters()), torch.zeros(())).detach() if hasattr(thing, "parameters") else torch.zeros(())
