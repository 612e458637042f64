"""What was handed in, and the notebook that is graded: the release, with the student's answers put into it.

Of a submission only two things are taken: the text of its solution cells, found by grade_id, and cells that the
student added, in their places. Everything else (checks, set-up, prose, metadata, outputs) is the release's own, so
an edited check or a deleted cell changes nothing.
"""
import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

LARGEST = 50_000_000  # bytes of a submitted notebook: pictures of a whole lesson are a tenth of that
GIVEN = "given-"  # so begin the ids of a lesson's own cells, whatever version of it they come from
EXTRA = "extra"  # the tag of a student's own cell in the rebuilt notebook


class Unreadable(Exception):
    """A submitted file that is no notebook, in one sentence."""


@dataclass
class Submission:
    """A student's notebook for an assignment; `path` is None where the student's folder lacks it, `note` says what lies there."""

    student: str
    assignment: str
    path: Path | None
    note: str = ""


@dataclass
class Rebuilt:
    """The notebook to run, what a person should know about it, and which solution cells hold something else than the stub."""

    notebook: nbformat.NotebookNode
    notes: list = field(default_factory=list)
    answered: set = field(default_factory=set)


def find(folder, assignments):
    """All submissions below `folder`, in nbgrader's layout <student>/<assignment>/<assignment>.ipynb, by student.

    An assignment that nobody handed in is not asked of anybody.
    """
    students = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    asked = [a for a in assignments if any((s / a).is_dir() for s in students)]
    return [look(student, a) for student in students for a in asked]


def look(student, assignment):
    place = student / assignment
    path = place / f"{assignment}.ipynb"
    if path.is_file():
        return Submission(student.name, assignment, path)
    if not place.is_dir():
        there = sorted(p.name for p in student.iterdir())
        note = f"no folder {assignment}; there is {', '.join(there[:5])}" if there else "the student's folder is empty"
    else:
        there = sorted(p.name for p in place.iterdir())
        note = f"no {path.name} in the folder; there is {', '.join(there[:5])}" if there else f"the folder {assignment} is empty"
    return Submission(student.name, assignment, None, note)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(path):
    """A submitted notebook, upgraded to the present format; Unreadable says in one sentence what is wrong with it."""
    data = Path(path).read_bytes()
    if len(data) > LARGEST:
        raise Unreadable(f"the file has {len(data) / 1e6:.0f} MB; {LARGEST / 1e6:.0f} are allowed")
    if not data.strip():
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old notebooks lack cell ids; that is no fault
            nb = nbformat.reads(data.decode("utf-8"), as_version=4)
        nb.cells[:]
        for cell in nb.cells:
            if not isinstance(cell.source, str) or cell.cell_type not in ("code", "markdown", "raw"):
                raise ValueError("a cell without text")
    except UnicodeDecodeError:
        raise Unreadable("the file is not UTF-8 text, as notebooks are") from None
    except Exception as e:  # nbformat raises all sorts of things for damaged files; each means the same here
        raise Unreadable(f"the file is not a notebook ({type(e).__name__})") from None
    return nb


def rebuild(release, submitted):
    """The release with the submission's answers and extra cells."""
    known, solutions = {c.id: c for c in release.cells}, solution_cells(release)
    by_text = {(c.cell_type, c.source): c.id for c in release.cells}
    taken, extras, notes, anchor, older = {}, {}, [], None, False
    for cell in submitted.cells:
        name = origin(cell, known, by_text)
        if name in taken and name in solutions:
            notes.append(f"the cell {name!r} is there more than once; the first one counts")
        elif name is None and str(cell.get("id", "")).startswith(GIVEN):
            older = True
        elif name is None or name in taken:
            extras.setdefault(anchor, []).append(cell)
        else:
            taken[name], anchor = cell.source, name
    if older:
        notes.append("it was made from another version of the lesson; the cells of that version were left out")
    notes += [f"the cell {n!r} is missing" for n in solutions if n not in taken]
    notes += [f"a set-up cell was changed ({known[n].source.splitlines()[0][:40]!r}); the release's own was used"
              for n, text in taken.items() if "setup" in known[n].metadata.get("tags", []) and text.strip() != known[n].source.strip()]

    nb = nbformat.from_dict({**release, "cells": []})
    answered = set()
    number = 0
    for cell in [None, *release.cells]:
        if cell is not None:
            cell = nbformat.from_dict(cell)
            name = cell.id
            if name in solutions and taken.get(name, cell.source).strip() != cell.source.strip():
                cell.source = taken[name]
                answered.add(solutions[name])
            nb.cells.append(cell)
        for extra in extras.get(cell.id if cell is not None else None, []):
            number += 1
            nb.cells.append(own_cell(extra, f"extra-{number}"))
    return Rebuilt(nb, notes, answered)


def origin(cell, known, by_text):
    """The id of the release's cell that a submitted cell comes from, or None for a cell of the student's own."""
    grade_id = cell.metadata.get("nbgrader", {}).get("grade_id") if isinstance(cell.metadata.get("nbgrader"), dict) else None
    for name in (grade_id, cell.get("id")):
        if isinstance(name, str) and name in known:
            return name
    return by_text.get((cell.cell_type, cell.source))


def own_cell(cell, name):
    new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell, "raw": nbformat.v4.new_raw_cell}
    return new[cell.cell_type](cell.source, id=name, metadata={"tags": [EXTRA]})


def solution_cells(nb):
    """Cell id -> grade_id of the solution cells of a release, code and text, in order."""
    return {c.id: c.metadata.nbgrader.grade_id for c in nb.cells if c.metadata.get("nbgrader", {}).get("solution")}
