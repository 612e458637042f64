"""Outputs in, verdict and diagnosis out: the trusted half of a check.

A verdict is decided by the cases alone. When points were lost, the outputs are compared with those of every
misconception on the same inputs: one alone, then two of them in different outputs, then two in one program; after
that come the generic faults of the exercise, and with no match the broken law speaks for itself.
"""
import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from autograder.exercise import Fail, Outputs, end

COMPOSED = 24  # programs with two mistakes that are tried, at some 20 ms each, for one diagnosis
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
    faults: tuple = ()      # (kind, place) of each entry of the diagnosis
    note: str = ""

    @property
    def solved(self):
        return self.status == "ok"


class Bank:
    """The outputs of the reference and of every misconception on one set of inputs, each computed once, on demand."""

    def __init__(self, exercise, inputs):
        self.exercise, self.inputs, self.cache = exercise, inputs, {}

    def _features(self, key, make, variant):
        if key not in self.cache:
            inputs = self.inputs if variant is None else self.exercise.variants[variant](self.inputs)
            if key != "reference":  # only the reference's picture is ever drawn
                inputs = {k: v for k, v in inputs.items() if not k.endswith(("grid", "grid lines"))}
            out = Outputs(self.exercise.probe(make(), inputs))
            self.cache[key] = (out, features(self.exercise, inputs, out))
        return self.cache[key]

    @property
    def reference(self):
        return self._features("reference", self.exercise.reference, None)

    def wrong(self, misconception, variant=None):
        return self._features((misconception.id, variant), misconception.make, variant)[1]

    def right(self, variant=None):
        return self.reference[1] if variant is None else self._features(("reference", variant), self.exercise.reference, variant)[1]

    def both(self, a, b, variant=None):
        """Two misconceptions in one program, if they change different methods of one class; else None."""
        (x, *more), (y, *others) = a.make(), b.make()
        if more or others or not (isinstance(x, type) and isinstance(y, type)):
            return None
        mine, theirs = own_methods(x), own_methods(y)
        if not mine or not theirs or mine & theirs or root(x) is not root(y):
            return None
        return self._features((a.id, b.id, variant), lambda: (type("Both", (x, y), {}),), variant)[1]


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
            kind, sentence = outputs.complaint(key) or outputs.complaint(key.rsplit(".", 1)[0]) or ("", "did not run")
            found[key] = np.asarray(f"{kind}: {sentence}")
    return found


def same(a, b):
    if a.shape != b.shape or (a.dtype.kind in "US") != (b.dtype.kind in "US"):
        return False
    if a.dtype.kind in "US":
        return bool((a == b).all())
    tol = 1e-4 if np.float32 in (a.dtype, b.dtype) else 1e-7
    return bool(np.allclose(a.astype(float), b.astype(float), rtol=tol, atol=tol, equal_nan=True))


def run_cases(exercise, answers, outputs):
    """[CaseResult, ...] of the outputs of a student's object, one for each case of the exercise."""
    results = []
    for case in exercise.cases:
        try:
            case.judge(answers.inputs, outputs, answers.reference[0])
            results.append(CaseResult(case.name, case.points, case.points))
        except Fail as e:
            results.append(CaseResult(case.name, case.points, 0.0, e.sentence, e.example))
    return results


def judge(exercise, seed, arrays):
    """The verdict on the outputs `arrays` of a student's object, for the inputs of that seed."""
    answers = bank(exercise, seed)
    outputs = Outputs(arrays)
    results = run_cases(exercise, answers, outputs)
    score = float(sum(r.earned for r in results))
    verdict = Verdict(exercise.id, "ok", score, exercise.points, results)
    if score == exercise.points:
        return verdict
    complaints = outputs.complaints()
    kinds = {k for k, _ in complaints.values()}
    if "unsolved" in kinds and score == 0:
        verdict.status = "unsolved"
        return verdict
    raised = {end(sentence) for kind, sentence in complaints.values() if kind in ("raised", "blocked")}
    verdict.status = "error" if score == 0 and results[0].sentence in raised else "wrong"
    found = diagnose(exercise, answers, outputs) or exception(outputs, results)
    verdict.diagnosis = tuple(f[0] for f in found)
    verdict.faults = tuple(f[1:3] for f in found)
    # What Python or the broken law has to say comes first, unless a fault was recognised that says it better.
    vague = not found or verdict.diagnosis[0].startswith("raised_")
    verdict.sentences = (*((fallback(results),) if vague else ()), *(f[3] for f in found))
    return verdict


def fallback(results):
    """With no diagnosis the first law that broke speaks, with the smallest input that shows it."""
    lost = next(r for r in results if r.earned < r.points)
    return f"{lost.sentence} {end(lost.example) if lost.example else ''}".strip()


RAISED = (
    # id, kind, what Python or torch says, what it means
    ("raised_unpacking", "off by one", r"values to unpack|unpack sequence", "A result is taken apart into another number of pieces than it has."),
    ("raised_shapes", "wrong axis", r"shapes? .*cannot be multiplied|size of tensor a|Sizes of tensors must match|shape '.*' is invalid|"
     r"[Dd]imension out of range|out of bounds|expanded size|must match the existing size|split_with_sizes|inconsistent tensor size",
     "The shapes do not fit together: look along which dimension things are cut, joined or summed."),
)
PLACES = {"forward": "forward", "first": "forward", "inverse": "inverse", "construction": "parameters"}     # by the first word of a step


def exception(outputs, results):
    """[(id, kind, place, sentence)] of an exception that tells what is wrong, if it is what cost the first points."""
    lost = next(r for r in results if r.earned < r.points)
    for step, (kind, sentence) in outputs.complaints().items():
        for name, fault, pattern, meaning in RAISED:
            if kind == "raised" and end(sentence) == lost.sentence and re.search(pattern, sentence):
                word = re.sub(r"^D=\d+ ", "", step).split(" ")[0]
                return [(name, fault, PLACES.get(word, "value"), meaning)]
    return []


def told(misconception):
    return misconception.id, misconception.kind, misconception.place, misconception.sentence


def diagnose(exercise, answers, outputs):
    """[(id, kind, place, sentence), ...]: the misconceptions or generic faults that explain the outputs, or []."""
    got = features(exercise, answers.inputs, outputs)
    composed = []
    for variant in (None, *range(len(exercise.variants))):
        right = answers.right(variant)
        off = {k for k in got if k not in right or not same(got[k], right[k])}
        wrongs = {m: answers.wrong(m, variant) for m in exercise.misconceptions}
        match = {m: {k for k in got if k in w and same(got[k], w[k])} for m, w in wrongs.items()}
        for m, keys in match.items():
            if keys == got.keys() == wrongs[m].keys():
                return [told(m)]
        changed = {m: {k for k in w if k not in right or not same(w[k], right[k])} for m, w in wrongs.items()}
        fits = [m for m in match if changed[m] & off and changed[m] <= match[m]]
        for a, b in itertools.combinations(fits, 2):
            if off <= match[a] | match[b]:
                return [told(a), told(b)]
        # Two mistakes that meet in one output can only be recognised by making both at once. Worth a try are those
        # that change nothing which is right, one of which shows somewhere.
        suspects = [m for m in match if changed[m] and changed[m] <= off]
        composed += [(len(off & (match[a] | match[b])), variant, a, b) for a, b in itertools.combinations(suspects, 2)
                     if off & (match[a] | match[b]) and off <= changed[a] | changed[b]]
    if exercise.faults is not None:
        try:
            found = exercise.faults(answers.inputs, outputs)
        except Fail:
            found = []  # the outputs that the generic faults read are not there; the law that broke will speak
        if found:
            return found
    tried = 0
    for _, variant, a, b in sorted(composed, key=lambda c: -c[0]):
        both = answers.both(a, b, variant)
        if both is not None:
            if both.keys() == got.keys() and all(same(got[k], both[k]) for k in got):
                return [told(a), told(b)]
            tried += 1
            if tried == COMPOSED:
                break
    return []
