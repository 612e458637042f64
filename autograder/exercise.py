"""An exercise is data: a reference, inputs, cases, misconceptions, hints and a picture, tied together by its id.

Nothing here touches a student's object. The probe of the same id (autograder/probes) runs any implementation on the
inputs and returns arrays; cases compare arrays, misconceptions are wrong implementations whose arrays are recognised.
Adding an exercise means adding one record to autograder/exercises/lessonNN.py and one probe to
autograder/probes/lessonNN.py.
"""
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from autograder import probes

# The closed vocabulary of what can be wrong, and where.
KINDS = frozenset({
    "sign", "missing term", "extra term", "missing function", "wrong function", "exchanged", "wrong axis", "reduction",
    "shape", "detached", "off by one", "direction", "order", "in place", "constant", "state", "type",
})
PLACES = frozenset({"forward", "ldj", "inverse", "net", "gradient", "parameters", "input", "loss", "state", "value"})


class Fail(Exception):
    """A law is broken: one sentence for the student. `example` is the smallest input that shows it, if there is one."""

    def __init__(self, sentence, example=""):
        super().__init__(sentence)
        self.sentence, self.example = sentence, example


class Outputs:
    """What a probe returned: arrays under "step.name", complaints under "step!"."""

    def __init__(self, arrays):
        self.arrays = dict(arrays)

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        """The array of that name; if its step failed or gave something unusable, Fail with the sentence that says so."""
        if key in self.arrays:
            value = self.arrays[key]
            if value.dtype.kind in "fiub" and not np.isfinite(value).all():
                bad = "NaN" if np.isnan(value).any() else "infinite"
                raise Fail(f"{say(key)} holds {bad} values.")
            return value
        step = key.rsplit(".", 1)[0]
        kind, sentence = self.complaint(key) or self.complaint(step) or self.first_complaint() or ("type", f"{say(step)} did not run")
        raise Fail(end(sentence))

    def complaint(self, step):
        value = self.arrays.get(step + "!")
        return None if value is None else (str(value[0]), str(value[1]))

    def complaints(self):
        return {k[:-1]: (str(v[0]), str(v[1])) for k, v in self.arrays.items() if k.endswith("!")}

    def first_complaint(self):
        return next(iter(self.complaints().values()), None)


def say(key):
    """A key of the outputs in words: "D=2 forward.ldj" -> "`ldj` from forward (D = 2)"."""
    step, _, name = key.rpartition(".")
    where = ""
    if step.startswith("D="):
        where, _, step = step.partition(" ")
        where = f" (D = {where[2:]})"
    return f"`{name}` from {step}{where}" if step else f"`{name}`"


def end(sentence):
    return sentence if sentence.endswith((".", "!", "?", ":")) else sentence + "."


@dataclass(frozen=True)
class Case:
    """One named comparison: `judge(inputs, outputs, reference)` returns None or raises Fail."""

    name: str
    points: float
    judge: Callable


@dataclass(frozen=True)
class Misconception:
    """A wrong implementation and the sentence that tells a student who wrote it what went wrong, and where.

    `make()` gives the tuple of objects that a student would have handed to `check`.
    """

    id: str
    kind: str
    place: str
    sentence: str
    make: Callable

    def __post_init__(self):
        if self.kind not in KINDS or self.place not in PLACES:
            raise ValueError(f"misconception {self.id!r}: kind {self.kind!r} and place {self.place!r} must be in KINDS and PLACES")


@dataclass(frozen=True)
class Exercise:
    """The record of one exercise.

    `inputs(rng)` draws a dict of arrays; `reference()` gives the right objects. `features(inputs, outputs)` reduces
    outputs to what a diagnosis compares (by default all that the probe lists in `compare`). `variants` are functions
    inputs -> inputs under which the misconceptions are run as well, for answers that are right in another
    parametrisation (say, the two chunks of a net's output exchanged). `light(inputs)` is what slips are run on, where all of
    the inputs would take too long; what they leave out of `compare` is then not compared.
    """

    id: str
    title: str
    minutes: int
    difficulty: int
    hints: tuple
    inputs: Callable
    reference: Callable
    cases: tuple
    misconceptions: tuple
    compare: tuple = ()
    features: Callable | None = None
    variants: tuple = ()
    light: Callable = dict
    faults: Callable | None = None
    picture: Callable | None = None
    bonus: bool = False
    lesson: str = field(default="", compare=False)

    def __post_init__(self):
        if not 1 <= self.difficulty <= 5 or len(self.hints) != 2:
            raise ValueError(f"exercise {self.id!r}: difficulty is 1 to 5 and there are two hints")
        if len({m.id for m in self.misconceptions}) != len(self.misconceptions):
            raise ValueError(f"exercise {self.id!r} has two misconceptions of one id")

    @property
    def points(self):
        return float(sum(c.points for c in self.cases))

    @property
    def max_score(self):
        """What the exercise adds to an assignment's maximum: nothing for a bonus."""
        return 0.0 if self.bonus else self.points

    @property
    def probe(self):
        return probes.find(self.id)

    def draw(self, seed):
        """The inputs of this exercise for a seed: the same arrays for every student of one grading run."""
        return self.inputs(np.random.default_rng([int(seed), *self.id.encode()]))


@cache
def lessons():
    """Lesson module name -> its module in autograder/exercises, in order."""
    from autograder import exercises

    names = sorted(m.name for m in pkgutil.iter_modules(exercises.__path__) if m.name.startswith("lesson"))
    return {n: importlib.import_module(f"autograder.exercises.{n}") for n in names}


@cache
def registry():
    """Exercise id -> Exercise, over all lessons in their order."""
    return {e.id: e for module in lessons().values() for e in module.EXERCISES}


def get(name):
    """The record of an exercise; an unknown id raises ValueError with the nearest known ones."""
    probes.find(name)
    return registry()[name]


def assignment(name):
    """The module of autograder/exercises for an assignment such as "02_coupling"."""
    module = f"lesson{str(name)[:2]}"
    if module not in lessons() or lessons()[module].ASSIGNMENT != name:
        known = [m.ASSIGNMENT for m in lessons().values()]
        raise ValueError(f"there is no assignment {name!r}; there are {', '.join(known)}")
    return lessons()[module]
