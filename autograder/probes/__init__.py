"""The student's side: how to run an answer. One file a lesson; they import torch and numpy only.

A probe is a function `probe(objects, inputs) -> outputs`: `objects` is what the student handed to `check`, `inputs` a
dict of arrays that the judge drew, `outputs` a dict of arrays (autograder.probes.record.Record). It is the only code
that touches a student's object, and holds no reference, no tolerance and no verdict.
"""
import importlib
import pkgutil
from functools import cache, wraps

from autograder.probes.record import Record


@cache
def table():
    """Exercise id -> (lesson module name, probe), over all probes/lessonNN.py."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("lesson"):
            for name, probe in importlib.import_module(f"{__name__}.{module.name}").PROBES.items():
                if name in found:
                    raise ValueError(f"exercise id {name!r} has two probes, in {found[name][0]} and {module.name}")
                found[name] = (module.name, taking(probe, getattr(probe, "takes", 1)))
    return found


def taking(probe, number):
    """The probe, which is told of a student who hands in more or fewer objects than it takes."""

    @wraps(probe)
    def run(objects, inputs):
        if len(objects) == number:
            return probe(objects, inputs)
        record = Record()
        record.complain("answer", "type", f"This exercise takes {number} object{'s' * (number > 1)} after its id; {len(objects)} were handed in")
        return record

    return run


def find(exercise):
    """The probe of an exercise; an unknown id raises ValueError with the nearest known ones."""
    if exercise not in table():
        import difflib

        near = difflib.get_close_matches(str(exercise), table(), 3, 0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"there is no exercise {exercise!r}{hint}")
    return table()[exercise][1]
