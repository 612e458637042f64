"""Differently written right answers, one module a lesson: no check may take a point from any of them."""
import importlib
import pkgutil
from functools import cache


@cache
def table():
    """Exercise id -> [(objects), ...], over all lessons."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").RIGHT
    return found
