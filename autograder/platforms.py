"""What a learning platform hands over, sorted into nbgrader's layout <student>/<assignment>/<assignment>.ipynb.

Understood are nbgrader's own layout in a ZIP file, Moodle's ("Ann Lee_12345_assignsubmission_file_/anything.ipynb", also without folders),
Canvas' ("leeann_LATE_12345_67890_02_coupling-1.ipynb"), <student>/02_coupling.ipynb, 02_coupling files named after the student, and
ZIP files within any of these, which are one student's. Names are read, never followed: where a file goes is made of a cleaned name of
the student and the name of a released assignment, so no name leads anywhere else. What cannot be used is said, and costs nobody else.
"""
import hashlib
import io
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from autograder import files
from autograder.intake import LARGEST, Unreadable, digest, find, load, solution_cells

ENTRIES = 200_000                       # of a class's ZIP file
DIRECTORY, OF_ONE = 100_000_000, 1_000_000  # bytes of the table of contents of a class's ZIP file, and of one within it
NAMES = 5                               # file names in one sentence
LONGEST = 80                            # characters of a student's name
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others may ask for gigabytes of memory before they give a byte
BROKEN = (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, zlib.error, struct.error, ValueError)

MOODLE = re.compile(r"(?P<name>.+)_(?P<number>\d+)_assignsubmission_file_?(?P<rest>.*)", re.S)
CANVAS = re.compile(r"(?P<name>[^_]+)_(?P<late>LATE_)?(?P<user>\d+)_(?P<file>\d+)_(?P<rest>.+)", re.S)
ATTEMPT = re.compile(r"-(\d+)$")
GRADE_ID = re.compile(rb'"grade_id"\s*:\s*"([\w-]{1,64})"')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I | re.S)
INDIFFERENT = {"__MACOSX", ".ipynb_checkpoints", "__pycache__"}


@dataclass
class Arrival:
    """A file as it came: `parts` of its path, `read()` gives its bytes or raises Unreadable."""

    parts: tuple
    read: object

    @property
    def name(self):
        return self.parts[-1]


@dataclass
class Candidate:
    """A student's notebook for an assignment; `attempt`: the platform's own count of attempts, None if it has none."""

    file: str
    data: bytes
    attempt: tuple | None


@dataclass
class Found:
    candidates: dict = field(default_factory=dict)  # (student, assignment) -> [Candidate]
    others: dict = field(default_factory=dict)      # student -> names of files that are no notebook of an assignment
    remarks: list = field(default_factory=list)     # sentences for a person
    late: set = field(default_factory=set)          # (student, assignment)


def needs_sorting(place, assignments):
    """Whether `place` is a ZIP file, or a folder in another layout than nbgrader's."""
    if not place.is_dir():
        return True
    top = [p for p in place.iterdir() if not p.name.startswith(".")]
    return (any(p.suffix.lower() in (".ipynb", ".zip") or MOODLE.fullmatch(p.name) for p in top)
            or any(not p.is_symlink() for p in top) and not find(place, assignments) and any(p.suffix.lower() in (".ipynb", ".zip") for p in place.glob("*/*")))


def sort(place, folder, releases):
    """Write the notebooks in `place` to `folder`/<student>/<assignment>/<assignment>.ipynb, beside those of earlier ZIP files. Returns
    {(student, assignment): sentences about how it came, "": sentences about the whole}. Unreadable if `place` is no ZIP file.
    """
    found = Found()
    solutions = {name: set(solution_cells(r.notebook).values()) for name, r in releases.items()}
    if place.is_dir():
        arrivals = walk(place)
        sort_all(arrivals, solutions, found)
    else:
        with opened(place, place.name, ENTRIES, DIRECTORY) as zipped:
            sort_all(entries(zipped, place.name, found.remarks), solutions, found)
    notes = {"": found.remarks}
    names = safe_names({s for s, _ in found.candidates} | set(found.others), found.remarks)
    for (student, assignment), candidates in found.candidates.items():
        said = notes.setdefault((names[student], assignment), [])
        chosen = choose(candidates, said)
        if (student, assignment) in found.late:
            said.append("the platform marks it as late")
        files.write(folder / names[student] / assignment / f"{assignment}.ipynb", chosen.data)
    for student, others in found.others.items():
        (folder / names[student]).mkdir(parents=True, exist_ok=True)
        there = ", ".join(repr(o[-LONGEST:]) for o in others[:NAMES]) + (f" and {len(others) - NAMES} more" if len(others) > NAMES else "")
        mine = [key for key in notes if key and key[0] == names[student]]
        for key in mine or [(names[student], a) for a in releases]:
            notes.setdefault(key, []).append(f"beside a notebook of the lesson there came {there}" if mine else f"no notebook of a lesson came, but {there}")
    return notes


# --- the files, wherever they are ------------------------------------------------------------------------------------

def walk(folder):
    """The plain files of a folder, in order; links are not followed."""
    for place, below, names in os.walk(folder):
        below[:] = sorted(d for d in below if d not in INDIFFERENT and not (Path(place) / d).is_symlink())
        for name in sorted(names):
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                yield Arrival(path.relative_to(folder).parts, lambda path=path: load(path))


def opened(source, name, most, directory):
    """A ZIP file (a path or a file object), whose table of contents is looked at before it is read."""
    try:
        with (open(source, "rb") if isinstance(source, Path) else _again(source)) as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65_557))
            tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        size = int.from_bytes(tail[end + 12:end + 16], "little")
        if end < 0 or (size > directory and size != 0xFFFFFFFF) or (size == 0xFFFFFFFF and directory <= OF_ONE):
            raise Unreadable(f"{name} is no ZIP file" if end < 0 else f"{name} has a longer table of contents than is allowed")
        zipped = zipfile.ZipFile(source)
    except BROKEN as e:
        if isinstance(e, Unreadable):
            raise
        raise Unreadable(f"{name} is no ZIP file that can be read ({type(e).__name__}: {e})") from None
    if len(zipped.infolist()) > most:
        zipped.close()
        raise Unreadable(f"{name} holds more than {most} files")
    return zipped


class _again:
    """A file object that `with` does not close."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        self.file.seek(0)


def entries(zipped, name, remarks):
    """The plain files of a ZIP file. Those with a path that leads outside, and links, are left out with a remark."""
    odd = []
    for entry in zipped.infolist():
        path = entry.filename.replace("\\", "/")
        kind = entry.external_attr >> 16
        parts = tuple(p for p in path.split("/") if p not in ("", "."))
        if entry.is_dir() or not parts or INDIFFERENT & set(parts):
            continue
        if path.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", path) or (kind and stat.S_IFMT(kind) not in (0, stat.S_IFREG)):
            odd.append(repr(entry.filename[:LONGEST]))
            continue
        yield Arrival(parts, lambda entry=entry: content(zipped, entry))
    if odd:
        remarks.append(f"{name}: left out, for they are links or lead outside: {', '.join(odd[:NAMES])}" + (f" and {len(odd) - NAMES} more" if len(odd) > NAMES else ""))


def content(zipped, entry):
    """The bytes of an entry, whatever size it claims to have; at most LARGEST are unpacked."""
    if entry.compress_type not in METHODS:
        raise Unreadable("it is compressed in a way that is not allowed")
    try:
        with zipped.open(entry) as source:
            data = source.read(LARGEST + 1)
    except BROKEN as e:
        raise Unreadable(f"it cannot be unpacked ({type(e).__name__}: {e})") from None
    if len(data) > LARGEST:
        raise Unreadable(f"it unpacks to more than {LARGEST / 1e6:.0f} MB")
    return data


# --- whose file is it, and which assignment --------------------------------------------------------------------------

def sort_all(arrivals, solutions, found):
    arrivals = list(arrivals)
    while wrapped(arrivals, solutions):
        arrivals = [Arrival(a.parts[1:], a.read) for a in arrivals]
    named = Counter()   # Moodle's number is of a submission, so two numbers with one name in one file are two students
    for name, _ in {(m["name"], m["number"]) for a in arrivals if (m := MOODLE.fullmatch(a.parts[0]))}:
        named[name] += 1
    for a in arrivals:
        student, rest, attempt, late = owner(a, named, solutions)
        if student is None:
            if a.name.lower().endswith((".ipynb", ".zip")):
                found.remarks.append(f"nobody can tell whose {a.name[:LONGEST]!r} is")
        elif a.name.lower().endswith(".zip"):
            unzip(a, student, rest, attempt, late, solutions, found)
        else:
            take(a, student, rest, attempt, late, solutions, found)
    for name, count in named.items():
        if count > 1:
            found.remarks.append(f"{count} students are called {name!r}; the platform's number was added to their names")


def wrapped(arrivals, solutions):
    """Whether the first folder is one around everything, and not the only student's."""
    if len({a.parts[0] for a in arrivals}) != 1 or any(len(a.parts) < 2 or a.parts[1] in solutions or MOODLE.fullmatch(a.parts[0]) for a in arrivals):
        return False
    below = {a.parts[1] for a in arrivals}
    if any(MOODLE.fullmatch(name) or CANVAS.fullmatch(name) for name in below):
        return True
    return all(len(a.parts) > 2 for a in arrivals) and (len(below) > 1 or any(len(a.parts) > 3 and a.parts[2] in solutions for a in arrivals))


def owner(arrival, named, solutions):
    """(student or None, the file's own name, the platform's attempt or None, whether it marks it as late)."""
    first, last = arrival.parts[0], arrival.name
    if m := MOODLE.fullmatch(first):
        student = m["name"] if named[m["name"]] == 1 else f"{m['name']} {m['number']}"
        return student, last if len(arrival.parts) > 1 else m["rest"], None, False
    if len(arrival.parts) == 1 and (m := CANVAS.fullmatch(last)):
        stem = m["rest"].rpartition(".")[0]
        count = ATTEMPT.search(stem)
        return f"{m['name']}_{m['user']}", m["rest"], (int(count[1]) if count else 0, int(m["file"])), bool(m["late"])
    if len(arrival.parts) > 1:
        return first, last, None, False
    stem = last.rpartition(".")[0]
    if last.lower().endswith(".zip"):
        return stem or None, last, None, False
    for assignment in solutions:
        before, word, _ = stem.partition(assignment)
        if word and before.strip(" _-"):
            return before.strip(" _-"), last[len(before):], None, False
    return None, last, None, False


def take(arrival, student, name, attempt, late, solutions, found):
    others = found.others.setdefault(student, [])
    if not name.lower().endswith(".ipynb"):
        others.append(name)
        return
    try:
        data = arrival.read()
    except (OSError, Unreadable) as e:
        others.append(f"{name} ({e})")
        return
    assignment = which(arrival.parts[:-1], name, data, solutions)
    if assignment is None:
        others.append(name)
        return
    if not others:
        found.others.pop(student)
    if late:
        found.late.add((student, assignment))
    found.candidates.setdefault((student, assignment), []).append(Candidate("/".join(arrival.parts), data, attempt))


def which(folders, name, data, solutions):
    """The assignment of a notebook: by its name, its folder's, or else the one of whose exercises it holds most."""
    for text in (name.rpartition(".")[0], *reversed(folders)):
        named = [a for a in solutions if text.casefold().replace(" ", "_").startswith(a.casefold())]
        if named:
            return max(named, key=len)
    ids = {i.decode() for i in GRADE_ID.findall(data)}
    counts = sorted(((len(ids & cells), a) for a, cells in solutions.items()), reverse=True)
    return counts[0][1] if counts and counts[0][0] > (counts[1][0] if len(counts) > 1 else 0) else None


def unzip(arrival, student, name, attempt, late, solutions, found):
    """A ZIP file within, all of which is that student's, whatever names it holds; it may not hold more than one file may."""
    try:
        with opened(io.BytesIO(arrival.read()), name, ENTRIES, OF_ONE) as zipped:
            rest = LARGEST
            for inner in entries(zipped, name, found.remarks):
                if MOODLE.fullmatch(inner.parts[0]) or CANVAS.fullmatch(inner.name):
                    raise Unreadable(f"{name} seems to hold a whole class; such a file is to be given to the command itself")
                if inner.name.lower().endswith(".ipynb"):
                    try:
                        data = inner.read()
                        rest -= len(data)
                        if rest < 0:
                            raise Unreadable(f"more than {LARGEST / 1e6:.0f} MB came")
                    except Unreadable as e:
                        found.others.setdefault(student, []).append(f"{inner.name} ({e})")
                        continue
                    inner = Arrival((*arrival.parts, *inner.parts), lambda data=data: data)
                take(inner, student, inner.name, attempt, late, solutions, found)
    except (OSError, Unreadable) as e:
        found.others.setdefault(student, []).append(f"{name} ({e})")


def choose(candidates, said):
    """The notebook that counts: the latest attempt as the platform counts. Where it does not say, the first by name, and that is said."""
    different = {digest(c.data): c for c in candidates}
    if len(different) == 1:
        return candidates[0]
    if all(c.attempt is not None for c in candidates) and len({c.attempt for c in candidates}) == len(candidates):
        return max(candidates, key=lambda c: c.attempt)
    candidates = sorted(candidates, key=lambda c: c.file)
    names = ", ".join(repr(c.file[-LONGEST:]) for c in candidates[:NAMES])
    said.append(f"{len(candidates)} different notebooks came and nothing says which is the latest ({names}); {candidates[0].file[-LONGEST:]!r} was graded")
    return candidates[0]


# --- names -----------------------------------------------------------------------------------------------------------

def safe(name):
    """A student's name as the name of a folder on any system; another name gives another folder."""
    clean = unicodedata.normalize("NFC", name)
    clean = "".join("_" if c in '<>:"/\\|?*' or unicodedata.category(c)[0] == "C" else c for c in clean)
    clean = clean[:LONGEST].strip(" .")
    if RESERVED.fullmatch(clean):
        clean = f"_{clean}"
    return clean if clean and clean == name else f"{clean or 'student'}~{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:6]}"


def safe_names(students, remarks):
    """{name: folder}, different also where large and small letters are the same; what had to be changed is said."""
    names, taken = {}, {}
    for student in sorted(students):
        folder = safe(student)
        if folder.casefold() in taken:
            remarks.append(f"{student!r} and {taken[folder.casefold()]!r} differ only in large and small letters; are they one student?")
            folder = f"{folder}~{hashlib.sha256(student.encode('utf-8', 'replace')).hexdigest()[:6]}"
        elif folder != student:
            remarks.append(f"the student {student!r} is called {folder!r} here")
        taken[folder.casefold()], names[student] = student, folder
    return names
