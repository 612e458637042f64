"""Slips of the pen: what a diagnosis tries when no misconception fits.

A misconception is a mistake that somebody thought of. A slip is made automatically: one change to the syntax tree
(autograder.mutate) of a right answer that is written in another way than the lesson's own solution (autograder.rights).
A student's program whose outputs are those of a slip has a fault of that kind at that place, or one that nobody could
tell from it by looking at results. A slip's sentence says no more than that: how the student wrote it is not known.
"""
import ast
import inspect
from dataclasses import dataclass
from functools import cache

import torch

from autograder import mutate, rights

SOURCES = 3     # right answers of an exercise that slips are made in
# Counted in calls of torch, some 8 microseconds each, so that a diagnosis is the same on every machine.
LONGEST = 9_000         # for one run of a right answer: with more it trains, and its slips would take too long
FEW = 40        # slips that a right answer surely has: a first guess, since to make them takes time
OPERATIONS = 400_000    # for all slips of an exercise, which are run when the first answer needs them
TOGETHER = 60_000       # for programs with two slips, for one diagnosis
PATIENCE = 5            # times what the right answer takes: then a slip is one that never ends

PLACE = {"forward": "In forward", "inverse": "In inverse", "ldj": "In `ldj`", "value": "In what is returned", "loss": "In the loss or its step",
         "parameters": "Where the parameters are made", "net": "Around the net", "gradient": "On the way of the gradient", "state": "In what is remembered"}
KIND = {
    "sign": "a sign is the wrong way round", "missing term": "a term or a factor is missing",
    "missing function": "a function or a step is missing", "wrong function": "an operation stands where another one belongs",
    "exchanged": "two things have changed places", "order": "two things stand in the wrong order",
    "wrong axis": "something is done along the wrong dimension",
    "reduction": "a sum or a mean is not the one that is wanted, or goes over the wrong entries",
    "shape": "a sum over a dimension is missing, or a dimension is kept that should go", "off by one": "a whole number is off by one",
    "constant": "a constant is far from what it should be", "detached": "something is cut off from the computation graph",
    "state": "a step that sets what is remembered is missing or turned round", "direction": "an operation goes in the opposite direction",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A right answer as text: the names of its objects, and those that it needs."""
    names: tuple
    code: str
    home: dict

    def made(self, code):
        space = dict(self.home)
        exec(code, space)
        return tuple(space[n] for n in self.names)

    def make(self):
        return self.made(self.code)


@dataclass(frozen=True, eq=False)
class Slip:
    """A wrong program made from `source` by `edits`; stands where a misconception may stand."""
    source: Source
    code: str
    edits: tuple

    @property
    def id(self):
        return "+".join(f"slip_{e.place}_{e.kinds[0].replace(' ', '_')}" for e in self.edits)

    def make(self):
        return self.source.made(self.code)

    def together(self, other):
        """Both in one program, or None if they are not of one source or do not go together."""
        if other.source is not self.source:
            return None
        code = mutate.edited(self.source.code, *self.edits, *other.edits)
        return None if code is None else Slip(self.source, code, self.edits + other.edits)


@cache
def sources(exercise_id):
    """The right answers of an exercise that have a text of their own, in their order."""
    found = []
    for objects in rights.table().get(exercise_id, ()):
        if all((inspect.isclass(o) or inspect.isfunction(o)) and o.__name__ != "<lambda>" for o in objects):
            code = ast.unparse(ast.parse("\n".join(inspect.getsource(o) for o in objects)))
            found.append(Source(tuple(o.__name__ for o in objects), code, vars(inspect.getmodule(objects[0]))))
    return tuple(found)


@cache
def slips(source):
    """All programs with one fault made from a source."""
    return tuple(Slip(source, m.code, m.edits) for m in mutate.mutants(source.code))


def told(found):
    """[(id, kind, place, sentence)] of slips that all have the outputs of the student's program: one fault, or the two that it may be; else []."""
    common = [k for k in found[0].edits[0].kinds if all(k in s.edits[0].kinds for s in found)]
    places = frozenset.intersection(*(s.edits[0].places for s in found))
    if common and places:
        first = found[0].edits[0]
        place = first.place if first.place in places else min(places)
        return [_said(common[0], place)]
    faults = list(dict.fromkeys((s.edits[0].kinds[0], s.edits[0].place) for s in found))
    if len(faults) > 2:
        return []
    (_, _, _, a), (id, kind, place, b) = (_said(*f) for f in faults)
    return [(f"slip_{faults[0][1]}_{faults[0][0].replace(' ', '_')}", *faults[0], a), (id, kind, place, "Or else: " + b[0].lower() + b[1:])]


def _said(kind, place):
    return f"slip_{place}_{kind.replace(' ', '_')}", kind, place, f"{PLACE[place]}, {KIND[kind]}."


class Unmakeable(Exception):
    """A slip that is no program."""


class Endless(RuntimeError):
    """A program took too long."""


class Budget(torch.overrides.TorchFunctionMode):
    """Counts the calls of torch; beyond `most` of them it raises, so that a program that never ends does."""

    def __init__(self, most=float("inf")):
        super().__init__()
        self.most, self.used = most, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.used += 1
        if self.used > self.most:
            raise Endless("too many operations")
        return func(*args, **(kwargs or {}))
