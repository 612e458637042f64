"""The live lecture: views of flows that one can move, in a notebook, in the hall, or as a page on its own.

`layers(flow)` and the other views each return a View; show it as the last line of a cell. `explore(anything)` picks one.
Every view is a file of its own here: its mathematics, and a few lines for View (view.py), which brings keys, dragging, reset,
the saved picture and the page without a kernel (`view.save_html(path)`). Needs anywidget and ipywidgets, the `lab` extra.
"""
from importlib import import_module

VIEWS = ("bend", "layers", "training")
_HOME = {**{name: name for name in VIEWS}, "explore": "explore", "View": "view"}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"flowkit.widgets has no {name!r}")
    value = getattr(import_module(f"flowkit.widgets.{_HOME[name]}"), name)
    globals()[name] = value         # the function, and not the module of the same name that the import has put here
    return value


def __dir__():
    return sorted(__all__)
