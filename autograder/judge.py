"""Outputs in, verdict and diagnosis out: the trusted half of a check.

A verdict is decided by the cases alone. When points were lost, the outputs are compared with those of every
misconception on the same inputs: one alone, then two of them in different outputs, then two in one program; after
that come the generic faults of the exercise, and with no match the broken law speaks for itself.
"""
import itertools
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from autograder.exercise import Fail, Outputs, end

STATUSES = ("ok", "wrong", "unsolved", "manual", "error", "timeout", "memory", "killed", "invalid", "missing")


@dataclass
class CaseResult:
    name: str
    points: float
    earned: float
    sentence: str = ""
    example: str = ""


@dataclass
class Verdict:
    """What a check found: `status` is one of STATUSES, `diagnosis` the ids of the faults that were recognised."""

    exercise: str
    status: str
    score: float
    points: float
    cases: list = field(default_factory=list)
    diagnosis: tuple = ()
    sentences: tuple = ()
    note: str = ""

    @property
    def solved(self):
        return self.status == "ok"


class Bank:
    """The outputs of the reference and of every misconception on one set of inputs, each computed once, on demand."""

    def __init__(self, exercise, inputs):
        self.exercise, self.inputs, self.cache = exercise, inputs, {}

    def _features(self, key, make, inputs):
        if key not in self.cache:
            out = Outputs(self.exercise.probe(make(), inputs))
            self.cache[key] = (out, features(self.exercise, inputs, out))
        return self.cache[key]

    @property
    def reference(self):
        return self._features("reference", self.exercise.reference, self.inputs)

    def wrong(self, misconception, variant=None):
        inputs = self.exercise.variants[variant](self.inputs) if variant is not None else self.inputs
        return self._features((misconception.id, variant), misconception.make, inputs)[1]

    def right(self, variant=None):
        if variant is None:
            return self.reference[1]
        return self._features(("reference", variant), self.exercise.reference, self.exercise.variants[variant](self.inputs))[1]

    def both(self, a, b, variant=None):
        """Two misconceptions in one program, if they change different methods of one class; else None."""
        (x, *more), (y, *others) = a.make(), b.make()
        if more or others or not (isinstance(x, type) and isinstance(y, type)):
            return None
        mine, theirs = own_methods(x), own_methods(y)
        if not mine or not theirs or mine & theirs or root(x) is not root(y):
            return None
        inputs = self.exercise.variants[variant](self.inputs) if variant is not None else self.inputs
        return self._features((a.id, b.id, variant), lambda: (type("Both", (x, y), {}),), inputs)[1]


def root(cls):
    return cls.__mro__[1]


def own_methods(cls):
    return {n for n, v in vars(cls).items() if callable(v)}


@lru_cache(maxsize=64)
def bank(exercise, seed):
    """The bank of an exercise for a seed (inputs are the same for a whole grading run)."""
    return Bank(exercise, exercise.draw(seed))


def features(exercise, inputs, outputs):
    """What a diagnosis compares: name -> array, or the complaint of the step as text."""
    if exercise.features is not None:
        try:
            return {k: np.asarray(v) for k, v in exercise.features(inputs, outputs).items()}
        except Fail as e:
            return {"outputs": np.asarray(e.sentence)}
    found = {}
    for key in exercise.compare:
        if key in outputs:
            found[key] = outputs.arrays[key]
        else:
            kind, sentence = outputs.complaint(key.rsplit(".", 1)[0]) or ("", "did not run")
            found[key] = np.asarray(f"{kind}: {sentence}")
    return found


def same(a, b):
    if a.shape != b.shape or (a.dtype.kind in "US") != (b.dtype.kind in "US"):
        return False
    if a.dtype.kind in "US":
        return bool((a == b).all())
    tol = 1e-4 if np.float32 in (a.dtype, b.dtype) else 1e-7
    return bool(np.allclose(a.astype(float), b.astype(float), rtol=tol, atol=tol, equal_nan=True))


def judge(exercise, seed, arrays):
    """The verdict on the outputs `arrays` of a student's object, for the inputs of that seed."""
    answers = bank(exercise, seed)
    outputs = Outputs(arrays)
    results = []
    for case in exercise.cases:
        try:
            case.judge(answers.inputs, outputs, answers.reference[0])
            results.append(CaseResult(case.name, case.points, case.points))
        except Fail as e:
            results.append(CaseResult(case.name, case.points, 0.0, e.sentence, e.example))
    score = float(sum(r.earned for r in results))
    verdict = Verdict(exercise.id, "ok", score, exercise.points, results)
    if score == exercise.points:
        return verdict
    complaints = outputs.complaints()
    kinds = {k for k, _ in complaints.values()}
    if "unsolved" in kinds and score == 0:
        verdict.status = "unsolved"
        return verdict
    raised = kinds & {"raised", "blocked"}
    verdict.status = "error" if raised and score == 0 else "wrong"
    found = diagnose(exercise, answers, outputs)
    verdict.diagnosis = tuple(f[0] for f in found)
    verdict.sentences = tuple(f[1] for f in found)
    if not found:
        verdict.sentences = (fallback(results, complaints),)
    return verdict


def fallback(results, complaints):
    """With no diagnosis: what the code itself complained of, else the first law that broke."""
    for kind, sentence in complaints.values():
        return end(sentence)
    lost = next(r for r in results if r.earned < r.points)
    return f"{lost.sentence} {end(lost.example) if lost.example else ''}".strip()


def diagnose(exercise, answers, outputs):
    """[(id, sentence), ...]: the misconceptions or generic faults that explain the outputs, or []."""
    got = features(exercise, answers.inputs, outputs)
    settings = [None, *range(len(exercise.variants))]
    for variant in settings:
        right = answers.right(variant)
        match = {m: {k: same(got[k], w[k]) if k in got and k in w else k not in got and k not in w for k in {*got, *w}}
                 for m in exercise.misconceptions for w in [answers.wrong(m, variant)]}
        for m, keys in match.items():
            if all(keys.values()):
                return [(m.id, m.sentence)]
        off = [k for k in got if k not in right or not same(got[k], right[k])]
        fits = [m for m in match if consistent(m, match[m], answers.wrong(m, variant), right, off)]
        for a, b in itertools.combinations(fits, 2):
            if all(match[a].get(k) or match[b].get(k) for k in off):
                return [(a.id, a.sentence), (b.id, b.sentence)]
    if exercise.faults is not None:
        try:
            found = exercise.faults(answers.inputs, outputs)
        except Fail:
            found = []  # the outputs that the generic faults read are not there; the law that broke will speak
        if found:
            return [(name, sentence) for name, _, _, sentence in found]
    for variant in settings:
        for a, b in itertools.combinations(exercise.misconceptions, 2):
            both = answers.both(a, b, variant)
            if both is not None and both.keys() == got.keys() and all(same(got[k], both[k]) for k in got):
                return [(a.id, a.sentence), (b.id, b.sentence)]
    return []


def consistent(misconception, keys, wrong, right, off):
    """A misconception may be half of a pair if all outputs that it changes are as it changes them."""
    changed = [k for k in wrong if k not in right or not same(wrong[k], right[k])]
    return bool(changed) and all(keys.get(k) for k in changed) and any(k in off for k in changed)
