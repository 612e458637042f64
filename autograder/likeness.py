"""Which submissions are suspiciously alike, and which are like the course's own sources: what a person should look at. No grade depends on it.

An answer becomes the set of its fingerprints: every run of RUN tokens, with comments, docstrings and layout dropped and the student's own
names replaced by one letter, so that renaming, commenting and moving lines or methods change little. The release's own fingerprints do not count.
Right answers to a small exercise are honestly alike, so a fingerprint weighs what it is surprising to share: log2(answers / answers that have it)
bits, over the class and the differently written right answers of autograder/rights, which tell a small class what is common. Two answers
are reported when they share most of what is rare in one of them, and enough of it for chance to be ruled out. Winnowing, which keeps a few of the fingerprints to
save room, is not needed for texts of this size; with all of them a class is one product of matrices. (copydetect, a library that winnows, compares
each pair in Python, weighs nothing by rarity, and picks its fingerprints by a hash that differs from process to process.)

It is a hint and no more. Measured in classes made of the right answers in autograder/rights (505 answers to 72 exercises, 3 and more to each), which are all by one
team and more alike than students are, a copy being disguised by new names, another order and a comment on each line:
- honest pairs of answers: 1 of 1,550 was reported; honest pairs of students over a whole lesson: 0 of 672;
- one copied exercise in disguise: 133 of 216 found (most of those missed are a few lines long); a whole lesson copied in disguise: 42 of 42;
- the lesson's solution to one exercise: 60 of 72 as it is and 45 in disguise; flowkit's source in disguise: 31 of 53; 3 of the 505 honest answers
  were taken for the lesson's solution.
A copy that was written anew line by line is not found.
"""
import ast
import builtins
import html
import inspect
import json
import keyword
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path

import numpy as np

from autograder import exercise as records
from autograder import rights
from autograder.intake import EXTRA, solution_cells

RUN = 6             # tokens (or words) of a fingerprint
LIKE = 0.75         # of what is rare in the poorer of two answers: that much is shared
BITS = 16           # for one answer: and that much surprise, counted once for each token
LIKE_WHOLE, BITS_WHOLE = 0.6, 60    # over a whole submission: a lower share of much more
LIKE_SOURCE, BITS_SOURCE = 0.75, 9   # against the course's own sources
LONGEST = 40_000    # characters of an answer that are looked at
FEW, FEW_SOURCE = 1 / 50, 1 / 10    # of the class, and three more: what a larger part has written is no evidence, some forms are just natural
OWN = "cells of their own"
SOLUTIONS = Path(__file__).resolve().parent.parent / "solutions"


class Answer:
    """A text with its fingerprints, each at the places (first, last character) where it stands."""

    def __init__(self, source, code=True):
        self.source, self.code = source[:LONGEST], code

    @cached_property
    def places(self):
        tokens = code_tokens(self.source) if self.code else words(self.source)
        found = {}
        for i in range(len(tokens) - RUN + 1):
            found.setdefault(tuple(t for t, _, _ in tokens[i:i + RUN]), []).append((tokens[i][1], tokens[i + RUN - 1][2]))
        return found

    def marked(self, fingerprints):
        """The text as HTML, with what the given fingerprints cover marked."""
        covered = np.zeros(len(self.source) + 1, dtype=np.int8)
        for fingerprint in fingerprints:
            for start, end in self.places.get(fingerprint, ()):
                covered[start:end] = 1
        edges = [0, *(np.flatnonzero(np.diff(covered)) + 1).tolist(), len(self.source)]
        pieces = [(html.escape(self.source[a:b]), covered[a]) for a, b in zip(edges, edges[1:])]
        return "".join(f"<mark>{text}</mark>" if mark else text for text, mark in pieces)


# One expression, not a parser: answers may be broken anywhere, and a class has thousands. Three quotes are taken for a docstring.
TOKEN = re.compile(r"""(?P<skip>\#[^\n]*|[rRbBuUfF]{0,2}(?:\"{3}.*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)))|(?P<string>[rRbBuUfF]{0,2}(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
    |(?P<name>[^\W\d]\w*)|(?P<number>\d[\w.]*)|(?P<sign>[^\w\s]{1})""", re.VERBOSE | re.DOTALL)
KEPT = frozenset(keyword.kwlist) | frozenset(dir(builtins))


def code_tokens(source):
    """[(token, start, end)]: words of Python, of builtins and of libraries (after a dot) as they are, all other names as one."""
    tokens, before, last = [], "", ""
    for match in TOKEN.finditer(source):
        kind, text = match.lastgroup, match.group()
        if kind == "skip":
            continue
        of_a_library = last == "." and before != "self"
        token = "S" if kind == "string" else "V" if kind == "name" and text not in KEPT and not of_a_library else text
        tokens.append((token, match.start(), match.end()))
        before, last = last, text
    return tokens


def words(source):
    return [(m.group().lower(), m.start(), m.end()) for m in re.finditer(r"\w+", source)]


# --- one exercise ----------------------------------------------------------------------------------------------------

class Weights:
    """How surprising it is to share each fingerprint, in bits a token, over the answers of a class and other honest ones."""

    def __init__(self, answers, background=(), few=FEW):
        self.counts = Counter(f for a in (*answers, *background) for f in a)
        self.all = max(len(answers) + len(background), 2)
        self.most = 3 + few * self.all

    def __getitem__(self, fingerprint):
        # Two that are compared count as one: that they share it is what is to be judged.
        count = self.counts[fingerprint]
        return max(0.0, math.log2(self.all / max(count - 1, 1))) / RUN if count <= self.most else 0.0

    def sum(self, fingerprints):
        return sum(self[f] for f in fingerprints)


def shared(answers, weights):
    """(shared[i, j], total[i]) in bits, for a list of sets of fingerprints."""
    columns = {f: i for i, f in enumerate(f for f, n in weights.counts.items() if n > 1)}
    table = np.zeros((len(answers), max(len(columns), 1)), dtype=np.float32)
    for row, answer in zip(table, answers):
        row[[columns[f] for f in answer if f in columns]] = 1
    scale = np.array([weights[f] for f in columns] or [0.0], dtype=np.float32)
    return (table * scale) @ table.T, np.array([weights.sum(a) for a in answers])


@dataclass
class Exercise:
    """The answers of a class to one exercise: their fingerprints without the given ones, and what they share."""

    name: str
    answers: dict
    prints: dict
    weights: Weights
    against_sources: Weights
    bits: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, name, answers, given, background=()):
        prints = {s: a.places.keys() - given for s, a in answers.items()}
        prints = {s: p for s, p in prints.items() if p}
        others = [b.places.keys() - given for b in background]
        weights, against_sources = (Weights(list(prints.values()), others, few) for few in (FEW, FEW_SOURCE))
        bits, total = shared(list(prints.values()), weights)
        return cls(name, {s: answers[s] for s in prints}, prints, weights, against_sources, bits, total)

    def rare(self, fingerprints):
        return {f for f in fingerprints if self.weights[f] * RUN >= 1}


@dataclass
class Finding:
    """`left` and `right` are HTML, both texts with what they share marked; `where` names the exercise, `of` whom the right one is."""

    student: str
    of: str
    where: str
    share: float
    bits: float
    left: str
    right: str


# --- a class ---------------------------------------------------------------------------------------------------------

def handed_in(out, results):
    """{assignment: {student: notebook as a dict}} of what is stored in `out`/autograded."""
    found = {}
    for r in results:
        path = Path(out) / "autograded" / r.student / r.assignment / f"{r.assignment}.ipynb"
        if r.key and path.exists():
            found.setdefault(r.assignment, {})[r.student] = json.loads(path.read_text("utf-8"))
    return found


def look(release, notebooks):
    """(pairs, copies): Findings among the students of one assignment and against the course's own sources, the most telling first."""
    given = frozenset(f for c in release.notebook.cells for f in Answer(c.source, c.cell_type == "code").places)
    exercises = [Exercise.of(name, answers, given, honest(name)) for name, answers in collected(release, notebooks).items()]
    pairs, copies = [], []
    for e in exercises:
        pairs += alike(e)
        copies += like_sources(release, e)
    return whole(exercises, pairs), sorted(copies, key=lambda f: -f.bits)


def collected(release, notebooks):
    """{exercise: {student: Answer}} of the solution cells, and of the students' own code cells together."""
    names, found = solution_cells(release.notebook), {}
    stubs = {names[c.id]: c.source for c in release.notebook.cells if c.id in names}
    for student, nb in notebooks.items():
        extra = []
        for cell in nb["cells"]:
            text = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            name = names.get(cell.get("id"))
            if name is not None and text.strip() != stubs[name].strip():
                found.setdefault(name, {})[student] = Answer(text, cell["cell_type"] == "code")
            elif EXTRA in cell["metadata"].get("tags", []) and cell["cell_type"] == "code":
                extra.append(text)
        if extra:
            found.setdefault(OWN, {})[student] = Answer("\n".join(extra))
    return found


@cache
def honest(name):
    """The differently written right answers of an exercise that have a text."""
    found = []
    for objects in rights.table().get(name, ()):
        texts = [text_of(o) for o in objects]
        if all(texts):
            found.append(Answer("\n".join(texts)))
    return found


def text_of(thing):
    """Source of a class or function, else an empty text: what is built at run time has none."""
    try:
        return inspect.getsource(thing) if inspect.isclass(thing) or inspect.isfunction(thing) else ""
    except OSError:
        return ""


def alike(e):
    """The suspicious pairs of one exercise."""
    students, found = list(e.answers), []
    poorer = np.minimum.outer(e.total, e.total)
    share = np.divide(e.bits, poorer, out=np.zeros_like(poorer), where=poorer > 0)
    for i, j in np.argwhere(np.triu((share >= LIKE) & (e.bits >= BITS), 1)):
        found.append(finding(e, students[i], students[j], float(share[i, j]), float(e.bits[i, j])))
    return found


def finding(e, a, b, share, bits):
    common = e.rare(e.prints[a] & e.prints[b])
    return Finding(a, b, e.name, share, bits, e.answers[a].marked(common), e.answers[b].marked(common))


def whole(exercises, pairs):
    """Pairs over the whole submission: many answers that each share something rare. A pair that has one such answer is told of by its exercises."""
    students = sorted({s for e in exercises for s in e.answers})
    at = {s: i for i, s in enumerate(students)}
    bits, total = np.zeros((len(students),) * 2), np.zeros(len(students))
    for e in exercises:
        places = [at[s] for s in e.answers]
        bits[np.ix_(places, places)] += e.bits
        total[places] += e.total
    poorer = np.minimum.outer(total, total)
    share = np.divide(bits, poorer, out=np.zeros_like(poorer), where=poorer > 0)
    told = {(p.student, p.of) for p in pairs}
    for i, j in np.argwhere(np.triu((share >= LIKE_WHOLE) & (bits >= BITS_WHOLE), 1)):
        a, b = students[i], students[j]
        if (a, b) not in told and (b, a) not in told:
            best = max((e for e in exercises if a in e.answers and b in e.answers), key=lambda e: e.weights.sum(e.prints[a] & e.prints[b]))
            pairs.append(finding(best, a, b, float(share[i, j]), float(bits[i, j])))
            pairs[-1].where = f"the whole submission; most of it in {best.name}"
    return sorted(pairs, key=lambda p: -p.bits)


# --- the course's own sources ----------------------------------------------------------------------------------------

def like_sources(release, e):
    found = []
    texts = sources(release.name, e.name)
    for student, prints in e.prints.items():
        total = e.against_sources.sum(prints)
        if not total or not texts:
            continue
        best, where = max(((e.against_sources.sum(prints & t.places.keys()), where) for where, t in texts.items()), key=lambda x: x[0])
        if best >= BITS_SOURCE and best / total >= LIKE_SOURCE:
            common = prints & texts[where].places.keys()
            found.append(Finding(student, where, e.name, best / total, best, e.answers[student].marked(common), texts[where].marked(common)))
    return found


@cache
def sources(assignment, name):
    """{where: Answer}: what an answer to this exercise could have been copied from, the lesson's solution and flowkit's classes and functions."""
    found = {}
    path = SOLUTIONS / f"{assignment}.ipynb"
    if path.exists():
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if cell["metadata"].get("nbgrader", {}).get("grade_id") == name and cell["cell_type"] == "code":
                found["the lesson's solution"] = Answer("".join(cell["source"]))
    if name in records.registry():
        for module in records.assignment(assignment).REFERENCES:
            found |= parts(module)
    return found


@cache
def parts(module):
    """{where: Answer} for the classes and functions of a module."""
    text = inspect.getsource(import_module(module))
    lines = text.splitlines()
    return {f"{module}.{node.name}": Answer("\n".join(lines[node.lineno - 1:node.end_lineno]))
            for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
