"""The live lecture: views of flows that one can move, in a notebook, in the hall, or as a page on its own.

`layers(flow)` and the other views each return a View; show it as the last line of a cell. `explore(anything)` picks one.
Every view is a file of its own here: its mathematics, and a few lines for View (view.py), which brings keys, dragging, reset,
the saved picture and the page without a kernel (`view.save_html(path)`). Needs anywidget and ipywidgets, the `lab` extra.
"""
from importlib import import_module

# A view's function and its file: never of one name, or importing the file would put the module in the function's place.
VIEWS = {"bend": "change_of_variables", "matrix": "linear_map", "layers": "layer_by_layer", "planar": "planar_fold",
         "autoregressive": "masked_net", "sigmoidal": "sigmoids", "training": "live_training",
         "flow_in_time": "vector_field", "contraction": "fixed_point", "modulo": "modular_shift",
         "dequantize": "noise_in_bins", "surjection": "many_to_one", "two_kl": "divergences",
         "temperature": "reduced_entropy"}
_HOME = {**VIEWS, "explore": "choose", "View": "view"}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"flowkit.widgets has no {name!r}")
    return getattr(import_module(f"flowkit.widgets.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
