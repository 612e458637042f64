"""Differently written right answers, one module a lesson: no check may take a point from any of them."""
import importlib
import pkgutil
from functools import cache


@cache
def table():
    """Exercise id -> [(objects), ...], over all lessons."""
    return _gathered("RIGHT")


@cache
def confirmed():
    """Exercise id -> {name of a mutant that a person found to be right: the reason}, over all lessons."""
    return _gathered("CONFIRMED")


def _gathered(name):
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), name)
    return found
