"""What was handed in, and the notebook that is graded: the release, with the student's answers put into it.

Of a submission only two things are taken: the text of its solution cells, found by grade_id, and cells that the
student added, in their places. Everything else (checks, set-up, prose, metadata, outputs) is the release's own, so
an edited check or a deleted cell changes nothing.
"""
import hashlib
import json
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from autograder import wire

LARGEST = 50_000_000  # bytes of a submitted notebook: pictures of a whole lesson are a tenth of that
LONGEST = 200_000  # characters of one cell
OWN = 500  # cells of a student's own in one notebook
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

    An assignment that nobody handed in is not asked of anybody. Links are not followed: a link in a student's folder may lead anywhere.
    """
    students = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    asked = [a for a in assignments if any((s / a).is_dir() for s in students)]
    return [look(student, a) for student in students for a in asked]


def look(student, assignment):
    place = student / assignment
    path = place / f"{assignment}.ipynb"
    linked = next((p for p in (student, place, path) if p.is_symlink()), None)
    try:
        if linked is not None:
            note = f"{shown(linked)} is a link, and links are not followed"
        elif path.is_file():
            return Submission(shown(student), assignment, path)
        elif not place.is_dir():
            there = sorted(map(shown, student.iterdir()))
            note = f"no folder {assignment}; there is {', '.join(there[:5])}" if there else "the student's folder is empty"
        else:
            there = sorted(map(shown, place.iterdir()))
            note = f"no {path.name} in the folder; there is {', '.join(there[:5])}" if there else f"the folder {assignment} is empty"
    except OSError as e:
        note = f"the student's folder cannot be read ({e.strerror})"
    return Submission(shown(student), assignment, None, note)


def shown(path):
    """A file's name as tables and pages can hold it: bytes that are no UTF-8 are written as \\xff."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def load(path):
    """The bytes of a submitted file; Unreadable if it is none of a sensible size."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise Unreadable("it is no plain file")
        if info.st_size > LARGEST:
            raise Unreadable(f"the file has {info.st_size / 1e6:.0f} MB; {LARGEST / 1e6:.0f} are allowed")
        return file.read()


def parse(data):
    """(notebook in the present format, what was odd about the file); Unreadable says in one sentence why it is none.

    Nothing that can be understood is refused: other encodings, missing metadata, older formats, foreign kernels.
    """
    notes = []
    if not data.strip():
        raise Unreadable("the file is empty")
    text = decoded(data, notes)
    try:
        raw = wire.loads(text)
        made = raw.get("nbformat")
        if type(made) is int and made < 4:
            notes.append(f"it is in the old notebook format {raw['nbformat']}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                raw = nbformat.reads(json.dumps(raw), as_version=4)
        elif made != 4:
            notes.append("it is in a notebook format that is not known here" if type(made) is int else "it does not say its notebook format")
        language = table(table(raw.get("metadata")).get("kernelspec")).get("language", "python")
        if str(language).lower() != "python":
            notes.append(f"it asks for a kernel of the language {str(language)[:20]}")
        cells = [understood(cell) for cell in raw["cells"] if isinstance(cell, dict)]
        holed = [cell for cell in cells if "\0" in cell["source"]]
        for cell in holed:  # the one character that neither Python nor a page can hold
            cell["source"] = cell["source"].replace("\0", "")
        if holed:
            notes.append("it holds NUL characters, which were left out")
        if len(cells) < len(raw["cells"]):
            notes.append(f"{len(raw['cells']) - len(cells)} of its cells are damaged")
    except Exception as e:  # damaged files make json and nbformat raise all sorts of things; each means the same here
        raise Unreadable(f"the file is not a notebook ({type(e).__name__})") from None
    return nbformat.from_dict({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), notes


def decoded(data, notes):
    """Text from bytes: UTF-8, with a mark or without, UTF-16 by its mark, else Latin-1, which always gives something."""
    for encoding, mark in (("utf-8-sig", b""), ("utf-16", (b"\xff\xfe", b"\xfe\xff"))):
        if data.startswith(mark):
            try:
                text = data.decode(encoding)
            except UnicodeDecodeError:
                continue
            if encoding != "utf-8-sig":
                notes.append(f"the file is in {encoding.upper()}, not in UTF-8 as notebooks are")
            return text
    notes.append("the file is not in UTF-8, as notebooks are; it was read as Latin-1")
    return data.decode("latin-1")


def table(value):
    return value if isinstance(value, dict) else {}


def understood(cell):
    """A cell with what every cell has, and is asked for here: a kind, a text, an id, nbgrader's id."""
    source = cell.get("source", "")
    source = "".join(line for line in source if isinstance(line, str)) if isinstance(source, list) else source if isinstance(source, str) else ""
    kind = cell.get("cell_type") if cell.get("cell_type") in ("code", "markdown", "raw") else "raw"
    grade_id, name = table(table(cell.get("metadata")).get("nbgrader")).get("grade_id"), cell.get("id")
    metadata = {"nbgrader": {"grade_id": grade_id}} if isinstance(grade_id, str) else {}
    return {"cell_type": kind, "source": source, "metadata": metadata, "id": name[:64] if isinstance(name, str) else ""}


def rebuild(release, submitted, notes=()):
    """The release with the submission's answers and extra cells; `notes`: what is known already that a person should know."""
    known, solutions = {c.id: c for c in release.cells}, solution_cells(release)
    by_text = {(c.cell_type, c.source): c.id for c in release.cells}
    taken, extras, notes, anchor, older = {}, {}, list(notes), None, False
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
    for name in solutions:
        if len(taken.get(name, "")) > LONGEST:
            said = f"this cell has {len(taken[name])} characters; {LONGEST} are allowed"
            taken[name] = f"raise ValueError({said!r})" if known[name].cell_type == "code" else said
    own = [c for cells in extras.values() for c in cells]
    kept = {id(c) for c in [c for c in own if len(c.source) <= LONGEST][:OWN]}
    if len(kept) < len(own):
        notes.append(f"{len(own) - len(kept)} of the student's own {len(own)} cells were left out: {OWN} of {LONGEST} characters each are allowed")
        extras = {anchor: [c for c in cells if id(c) in kept] for anchor, cells in extras.items()}
    if older:
        notes.append("it was made from another version of the lesson; the cells of that version were left out")
    notes += [f"the cell {n!r} is missing" for n in solutions if n not in taken]
    notes += [f"the check {n.removesuffix('_check')!r} was changed; the release's own was used"
              for n, text in taken.items() if "check" in known[n].metadata.get("tags", []) and text.strip() != known[n].source.strip()]
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
