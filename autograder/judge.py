"""Outputs in, verdict and diagnosis out: the trusted half of a check.

A verdict is decided by the cases alone. When points were lost, the outputs are compared with those of every
misconception on the same inputs: one alone, then two of them in different outputs, then two in one program; after
that come the generic faults of the exercise, then slips of the pen (autograder.slips), then what an exception tells; and
with no match the broken law speaks for itself.
"""
import hashlib
import itertools
import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from autograder import slips
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
    """The outputs of the reference and of every misconception on one set of inputs, each computed once, on demand.

    `cache` holds arrays under plain names, so that another process may compute it.
    """

    def __init__(self, exercise, inputs):
        self.exercise, self.inputs, self.cache, self.compared = exercise, inputs, {}, {}

    def _features(self, key, make, variant, seen=None):
        if key not in self.cache:
            self.cache[key] = self._run(key, make, variant, seen)
        return self.cache[key]

    def _run(self, key, make, variant, seen=None):
        """(Outputs, what a diagnosis sees of them)"""
        inputs = self.varied(variant)
        if seen is not None:
            inputs = self.exercise.light(inputs)
        if key != "reference":  # only the reference's picture is ever drawn
            inputs = {k: v for k, v in inputs.items() if not k.endswith(("grid", "grid lines"))}
        out = Outputs(self.exercise.probe(make(), inputs))
        return (out if key == "reference" else None), (seen or features)(self.exercise, inputs, out)

    def varied(self, variant):
        return self.inputs if variant is None else self.exercise.variants[variant](self.inputs)

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

    def sources(self):
        """The first right answers of this exercise that give what the reference gives, each with the operations that it takes.

        Their slips together are as many as slips.OPERATIONS allow.
        """
        if "sources" not in self.cache:
            found, spent = [], 0
            view = everything if self.exercise.features is None else features
            right = self.right() if view is features else self._features(("reference", "source"), self.exercise.reference, None, view)[1]
            for number, source in enumerate(slips.sources(self.exercise.id)):
                if len(found) == slips.SOURCES:
                    break
                try:
                    with slips.Budget(slips.LONGEST) as budget:
                        out = self._features((source.code, "source"), source.make, None, view)[1]
                except slips.Endless:
                    continue
                cost = budget.used
                if spent + cost * slips.FEW >= slips.OPERATIONS or not alike(out, right):
                    continue
                cost *= len(slips.slips(source))
                if spent + cost < slips.OPERATIONS:
                    found.append((number, slips.PATIENCE * budget.used))
                    spent += cost
            self.cache["sources"] = found
        return [(slips.sources(self.exercise.id)[number], most) for number, most in self.cache["sources"]]

    def right_seen(self, variant):
        return self._features(("reference", "seen", variant), self.exercise.reference, variant, everything)[1]

    def right_source(self, source, variant):
        return self._features((source.code, variant, "seen"), source.make, variant, everything)[1]

    def all_slipped(self, source, most, variant):
        """What is seen of a source, of each of its slips that changes anything, and the names of what each changes."""
        key = (source, variant)
        if key not in self.compared:
            right, seen = self.right_source(source, variant), {}
            for s in slips.slips(source):
                out = self.slipped(s, most, variant)
                if out is not None and not alike(out, right):
                    seen[s] = out
            changed = {s: {k for k in out if k not in right or not same(out[k], right[k])} for s, out in seen.items()}
            self.compared[key] = right, seen, changed
        return self.compared[key]

    def slipped(self, slip, most, variant=None):
        """What is seen of a slip, or None if it cannot even be made or does not end."""
        key = (slip.source.code, slip.code, variant)
        if key not in self.cache:
            def make():
                try:
                    return slip.make()
                except Exception as e:
                    raise slips.Unmakeable from e

            try:
                with slips.Budget(most) as budget:
                    seen = self._run(key, make, variant, everything)[1]
            except (slips.Unmakeable, slips.Endless):
                seen = None
            self.cache[key] = None if budget.used > most else seen
        return self.cache[key]


def alike(a, b):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


def everything(exercise, inputs, outputs):
    """What is compared with slips: the arrays in `compare`, or all of them where a diagnosis goes by features."""
    if exercise.compare:
        return compared([k for k in exercise.compare if k in exercise.light(dict.fromkeys(exercise.compare))], outputs)
    return {k: v for k, v in outputs.arrays.items() if "picture" not in k}


def root(cls):
    return cls.__mro__[1]


def own_methods(cls):
    return {n for n, v in vars(cls).items() if callable(v)}


@lru_cache(maxsize=1024)   # a class may be graded on all lessons at once
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
    return compared(exercise.compare, outputs)


def compared(keys, outputs):
    found = {}
    for key in keys:
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
    a, b = a.astype(float), b.astype(float)
    # np.allclose says the same in three times the time; the bound keeps an infinite b from having an infinite tolerance
    with np.errstate(invalid="ignore"):
        return bool(((np.abs(a - b) <= tol + tol * np.minimum(np.abs(b), 1e300)) | (a == b) | ((a != a) & (b != b))).all())


def prepare(exercise, seed, wrong=True):
    """Compute now what the verdicts on an exercise need, and return its bank: the reference's outputs and, if `wrong`, those of the
    misconceptions and the slips.
    """
    answers = bank(exercise, seed)
    for variant in (None, *range(len(exercise.variants))):
        if wrong or variant is None:
            answers.right(variant)
        for m in exercise.misconceptions if wrong else ():
            answers.wrong(m, variant)
    for source, most in answers.sources() if wrong else ():
        answers.all_slipped(source, most, None)
    return answers


def digest(arrays):
    """A hash of a probe's outputs, by which the same answer is known again."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        found.update(f"{len(name)} {name} {value.dtype.str} {value.shape} ".encode())
        found.update(value.data.cast("B") if value.dtype.kind != "U" and value.size else value.tobytes())
    return found.digest()


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
        return Verdict(exercise.id, "unsolved", score, exercise.points)     # as it is without outputs, when the process died before its check
    raised = {end(sentence) for kind, sentence in complaints.values() if kind in ("raised", "blocked")}
    verdict.status = "error" if score == 0 and results[0].sentence in raised else "wrong"
    said = exception(outputs, results)      # without numbers to hold against a slip, what Python says is the better guide
    found = (diagnose(exercise, answers, outputs) or (not said and slip(exercise, answers, outputs, one_slip)) or generic(exercise, answers, outputs)
             or said or slip(exercise, answers, outputs, two_slips))
    verdict.diagnosis = tuple(f[0] for f in found)
    verdict.faults = tuple(f[1:3] for f in found)
    # What Python or the broken law has to say comes first, unless a fault was recognised that says it better.
    vague = not found or verdict.diagnosis[0].startswith(("raised_", "slip_"))
    verdict.sentences = (*((fallback(results),) if vague else ()), *(f[3] for f in found))
    return verdict


def fallback(results):
    """With no diagnosis the first law that broke speaks, with the smallest input that shows it."""
    lost = next(r for r in results if r.earned < r.points)
    return f"{lost.sentence} {end(lost.example) if lost.example else ''}".strip()


RAISED = (
    # id, kind, what Python or torch says, what it means
    ("raised_unpacking", "off by one", r"values to unpack|unpack sequence", "A result is taken apart into another number of pieces than it has."),
    ("raised_shapes", "shape", r"shapes? .*cannot be multiplied|size of tensor a|Sizes of tensors must match|shape '.*' is invalid|"
     r"[Dd]imension out of range|out of bounds|expanded size|must match the existing size|split_with_sizes|inconsistent tensor size",
     "The shapes do not fit together: look at the sizes, and along which dimension things are cut, joined or summed."),
    ("raised_not_scalar", "reduction", r"grad can be implicitly created only for scalar outputs",
     "A gradient is asked of a tensor with many entries; it takes one number, such as their sum."),
    ("raised_arguments", "exchanged", r"positional arguments? but|bad operand type|unsupported operand|must be Tensor, not|object has no attribute",
     "Something is handed on where another thing is expected: look at the order of arguments, and of what is returned and unpacked."),
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
    """[(id, kind, place, sentence), ...]: the misconceptions that explain the outputs, one or two of them, or []."""
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


def generic(exercise, answers, outputs):
    """[(id, kind, place, sentence), ...] of the exercise's generic faults, which read the student's outputs by themselves."""
    if exercise.faults is None:
        return []
    try:
        return exercise.faults(answers.inputs, outputs)
    except Fail:
        return []  # the outputs that the generic faults read are not there; the law that broke will speak


def slip(exercise, answers, outputs, way):
    """[(id, kind, place, sentence), ...] of the slips that have the student's outputs, found in that way; or []."""
    got = everything(exercise, answers.inputs, outputs)

    def agreeing(variant):
        right = answers.right_seen(variant)
        return sum(k in right and same(got[k], right[k]) for k in got)

    variant = max((None, *range(len(exercise.variants))), key=agreeing)     # to run all slips under all of them takes too long
    for source, most in answers.sources():
        right, seen, changed = answers.all_slipped(source, most, variant)
        found = way(got, right, seen, changed, lambda s: answers.slipped(s, most, variant), slips.TOGETHER * slips.PATIENCE // most)
        if found:
            return found
    return []


def one_slip(got, right, seen, changed, run, tries):
    exact = [s for s, out in seen.items() if alike(got, out)]
    return slips.told(exact) if exact else []


def two_slips(got, right, seen, changed, run, tries):
    """Two in one program, one of which shows somewhere by itself, and neither of which changes what is right."""
    off = {k for k in got if k not in right or not same(got[k], right[k])}
    suspects = [s for s in seen if changed[s] <= off]
    match = {s: {k for k in off & changed[s] if k in seen[s] and same(got[k], seen[s][k])} for s in suspects}
    pairs = [(len(match[a] | match[b]), a, b) for a, b in itertools.combinations(suspects, 2)
             if (match[a] or match[b]) and off <= changed[a] | changed[b]]
    for _, a, b in sorted(pairs, key=lambda p: -p[0])[:tries]:
        both = a.together(b)
        out = both and run(both)
        if out and alike(got, out):
            return list(dict.fromkeys((*slips.told([a]), *slips.told([b]))))
    return []
