"""One source, two notebooks and a release: solutions/NN_topic.py is written, everything else is built from it.

The source is a jupytext percent script. Each code cell has one role as a tag: `setup`, `solution`, `check` or `show`;
solution and check cells name themselves by `nbgrader={"grade_id": ...}`, a written answer is a markdown cell with the
role `solution`. The rest of nbgrader's metadata follows from the role and the exercise's record, so it is never
written by hand and never out of step with the points.

    python -m autograder.build [NN_topic ...]            write lessons/ and solutions/
    python -m autograder.build --check [NN_topic ...]    exit 1 if what lies there is not what the sources build
    python -m autograder.build --release DIR             make an nbgrader course for an instructor
"""
import argparse
import ast
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions, ComputeChecksums, LockCells
from tqdm import tqdm
from traitlets.config import PyFileConfigLoader

from autograder import exercise, files
from autograder.intake import GIVEN

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).with_name("nbgrader_config.py")
ROLES = ("setup", "solution", "check", "show")
COMPARE = "compare"  # a `show` cell whose outputs are the same on every machine: nbval compares them
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS_A_CELL = 3600  # a lesson's own training in normal mode, on a slow machine


class SourceError(ValueError):
    """A fault in a lesson's source, in one sentence."""


# --- the source ------------------------------------------------------------------------------------------------------

def sources(names=(), root=ROOT):
    """The paths of the lessons' sources, all of them or those named; an unknown name raises SourceError."""
    found = {p.stem: p for p in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))}
    unknown = [n for n in names if n not in found]
    if unknown:
        raise SourceError(f"there is no lesson {unknown[0]!r} in solutions/; there are: {', '.join(found) or 'none'}")
    return [found[n] for n in names] if names else list(found.values())


def solved(source):
    """The notebook of a source: solved, not executed, with complete metadata and fixed cell ids. SourceError if it is faulty."""
    source = Path(source)
    lesson = exercise.assignment(source.stem)
    nb = jupytext.reads(source.read_text("utf-8"), fmt="py:percent")
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    for number, cell in enumerate(nb.cells, 1):
        try:
            complete(cell, lesson)
        except SourceError as e:
            first = next(iter(cell.source.splitlines()), "")
            raise SourceError(f"{source.name}, cell {number} ({first[:50]!r}): {e}") from None
    try:
        agree(nb, lesson)
    except SourceError as e:
        raise SourceError(f"{source.name}: {e}") from None
    name_cells(nb)
    nbformat.validate(nb)
    return nb


def complete(cell, lesson):
    """Check one cell and complete its nbgrader metadata from its role."""
    cell.metadata.pop("lines_to_next_cell", None)  # jupytext's own note on the source's blank lines
    unknown = set(cell.metadata) - {"tags", "nbgrader"}
    if unknown:
        raise SourceError(f"its header holds {sorted(unknown)[0]!r}; a cell has tags and nbgrader, nothing else")
    tags = list(cell.metadata.get("tags", []))
    if tags == [COMPARE]:
        tags = cell.metadata["tags"] = ["show", COMPARE]  # what is compared is something shown
    strange = [t for t in tags if t not in (*ROLES, COMPARE)]
    if strange:
        raise SourceError(f"unknown role {strange[0]!r}; the roles are {', '.join(ROLES)}, and {COMPARE!r} may be added")
    roles = [t for t in tags if t in ROLES]
    given = dict(cell.metadata.get("nbgrader", {}))
    grade_id = given.pop("grade_id", None)
    if given:
        raise SourceError(f"nbgrader's {sorted(given)[0]!r} follows from the role; only grade_id is written by hand")
    if len(roles) > 1 or (cell.cell_type == "code" and not roles):
        raise SourceError(f"a code cell has one role of {', '.join(ROLES)}; this one has {' and '.join(roles) or 'none'}")
    role = roles[0] if roles else None
    if cell.cell_type != "code" and role not in (None, "solution"):
        raise SourceError(f"a {cell.cell_type} cell cannot have the role {role!r}")
    if (grade_id is not None) != (role in ("solution", "check")):
        raise SourceError(f"a grade_id is missing: {role} cells have one" if grade_id is None else "only solution and check cells have a grade_id")
    if role == "solution":
        solution = code_solution if cell.cell_type == "code" else written_solution
        cell.metadata["nbgrader"] = solution(cell, grade_id, lesson)
    elif role == "check":
        cell.metadata["nbgrader"] = check_cell(cell, grade_id, lesson)


def nbgrader(grade_id, **flags):
    return {"schema_version": 3, "grade_id": grade_id, "grade": False, "solution": False, "locked": False, "task": False} | flags


def record(grade_id, lesson):
    found = {e.id: e for e in lesson.EXERCISES}
    if grade_id not in found:
        raise SourceError(f"{lesson.ASSIGNMENT} has no exercise {grade_id!r}; it has {', '.join(found)}")
    return found[grade_id]


def code_solution(cell, grade_id, lesson):
    record(grade_id, lesson)
    markers = [line.strip() for line in cell.source.splitlines() if line.strip() in (BEGIN, END)]
    if not markers:
        raise SourceError(f"the solution of {grade_id!r} is not marked by {BEGIN!r} and {END!r}")
    if markers != [BEGIN, END] * (len(markers) // 2):
        raise SourceError(f"{BEGIN!r} and {END!r} do not alternate; each region has one of both")
    after = cell.source.split(END, 1)[1].splitlines()
    if not any(line.strip().startswith("raise NotImplementedError(") and grade_id in line for line in after):
        raise SourceError(f"after {END!r} there must be a `raise NotImplementedError(...)` that names {grade_id!r}")
    for text, what in ((cell.source, "the solution"), (stub(cell.source), "the stub that students see")):
        try:
            ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", text))
        except SyntaxError as e:
            raise SourceError(f"{what} of {grade_id!r} is not Python: {e.msg} (line {e.lineno} of the cell)") from None
    return nbgrader(grade_id, solution=True)


def written_solution(cell, grade_id, lesson):
    if grade_id not in lesson.TEXTS:
        raise SourceError(f"{lesson.ASSIGNMENT} has no written answer {grade_id!r}; its TEXTS are {', '.join(lesson.TEXTS) or 'empty'}")
    return nbgrader(grade_id, grade=True, solution=True, points=float(lesson.TEXTS[grade_id]))


def check_cell(cell, grade_id, lesson):
    """A check is one expression, check("id", ...): its value is the score, which a semicolon would hide from nbgrader."""
    name = grade_id.removesuffix("_check")
    if name == grade_id:
        raise SourceError(f"the grade_id of a check cell is <exercise>_check; this one is {grade_id!r}")
    if checked(cell.source) != name:
        raise SourceError(f"a check cell holds check({name!r}, ...) and nothing else, without a semicolon")
    bonus = record(name, lesson).bonus  # outside the maximum, so for nbgrader not a graded cell at all
    return nbgrader(grade_id, locked=True) if bonus else nbgrader(grade_id, grade=True, locked=True, points=record(name, lesson).max_score)


def checked(text):
    """The exercise that a cell `check("id", ...)` checks; None if it is anything else."""
    try:
        (statement,) = ast.parse(text).body
        call = statement.value
        good = call.func.id == "check" and len(call.args) > 1 and not text.rstrip().endswith(";")
        return call.args[0].value if good else None
    except (SyntaxError, ValueError, AttributeError):  # not one statement, or not a call of that form
        return None


def agree(nb, lesson):
    """Every exercise and every text of the lesson has its cells, once, in the order solution, check."""
    ids = [c.metadata.nbgrader.grade_id for c in nb.cells if "nbgrader" in c.metadata]
    twice = {i for i in ids if ids.count(i) > 1}
    if twice:
        raise SourceError(f"the grade_id {sorted(twice)[0]!r} is used twice")
    for e in lesson.EXERCISES:
        for wanted, what in ((e.id, "solution"), (f"{e.id}_check", "check")):
            if wanted not in ids:
                raise SourceError(f"the exercise {e.id!r} has no {what} cell")
        if ids.index(f"{e.id}_check") < ids.index(e.id):
            raise SourceError(f"the check of {e.id!r} stands before its solution")
    missing = [t for t in lesson.TEXTS if t not in ids]
    if missing:
        raise SourceError(f"the written answer {missing[0]!r} has no cell")


def name_cells(nb):
    """Cell ids that stay the same from build to build: the grade_id, else a hash of the text and of how often it came before."""
    seen = {}
    for cell in nb.cells:
        if "nbgrader" in cell.metadata:
            cell.id = cell.metadata.nbgrader.grade_id
            continue
        n = seen[cell.source] = seen.get(cell.source, 0) + 1
        cell.id = GIVEN + hashlib.sha256(f"{cell.cell_type}\n{n}\n{cell.source}".encode()).hexdigest()[:12]


def stub(text):
    """A solution's text with its regions cut out."""
    return re.sub(rf"(?ms)^(\s*){BEGIN}$.*?^\s*{END}$", r"\1# your code here", text)


# --- what is built from it -------------------------------------------------------------------------------------------

def config():
    """nbgrader's settings for this course, shared with stock nbgrader."""
    return PyFileConfigLoader(CONFIG.name, path=str(CONFIG.parent)).load_config()


def release(nb):
    """The students' notebook, made by nbgrader's own preprocessors: locked cells, solutions cleared, checksums."""
    nb, settings = nbformat.from_dict(nb), config()
    for step in (LockCells, ClearSolutions, ClearOutput, CheckCellMetadata, ComputeChecksums):
        nb, _ = step(config=settings).preprocess(nb, {})
    return nb


def for_reading(nb):
    """The solved notebook as it is committed, outputs aside: nbval finds the cells to compare by its own tag."""
    nb = nbformat.from_dict(nb)
    for cell in nb.cells:
        if COMPARE in cell.metadata.get("tags", []):
            cell.metadata.tags.append("nbval-check-output")
    return nb


def executed(nb, fast=False, name="notebook"):
    """The solved notebook with its outputs. SourceError names the cell that raised."""
    nb = for_reading(nb)
    code = sum(c.cell_type == "code" for c in nb.cells)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=code, desc=name, unit="cell", leave=False) as bar:
        client = NotebookClient(
            nb, timeout=SECONDS_A_CELL, kernel_name="python3", record_timing=False, coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # or it remarks on its own connection, on the terminal
            resources={"metadata": {"path": scratch}}, on_cell_executed=lambda **_: bar.update(),
        )
        try:
            client.execute(env=kernel_environment(FLOWKIT_FAST="1" if fast else "0"))
        except CellExecutionError as e:
            raise SourceError(f"{name}: the solved notebook stops with {e.ename}: {e.evalue}, in the cell\n{at_fault(nb)}") from None
        places = {scratch, str(ROOT), sys.prefix, str(Path.home()) + os.sep}
    nb.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(reproducible, cell.outputs) if o is not None]
            if any(p in nbformat.v4.writes_json(nbformat.v4.new_notebook(cells=[cell])) for p in places):
                raise SourceError(f"{name}, cell {number}: its output holds a path of this machine")
    return nb


def at_fault(nb):
    """The text of the cell that raised."""
    return next(c.source for c in nb.cells if c.cell_type == "code" and any(o.output_type == "error" for o in c.outputs))


def kernel_environment(**more):
    """The environment of a kernel that finds this course from any folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "PYDEVD_DISABLE_FILE_VALIDATION": "1", **more}


def reproducible(output):
    """An output without what differs from run to run: progress bars, live widgets, addresses in memory; None if nothing is left."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    data = output.get("data", {})
    if data.pop("application/vnd.jupyter.widget-view+json", None) is not None:
        data.pop("text/plain", None)
    if isinstance(data.get("text/plain"), str):
        data["text/plain"] = re.sub(r"0x[0-9a-f]{6,}", "0x...", data["text/plain"])
    return output if data else None


def without_outputs(nb):
    nb = nbformat.from_dict(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def save(nb, path):
    files.write(path, nbformat.writes(nb) + "\n")


def build(source, root=ROOT, fast=False):
    """Write lessons/NN_topic.ipynb and the executed solutions/NN_topic.ipynb of one source."""
    nb = solved(source)
    done = executed(nb, fast, source.stem)
    save(release(nb), root / "lessons" / f"{source.stem}.ipynb")
    save(done, root / "solutions" / f"{source.stem}.ipynb")


def differences(source, root=ROOT):
    """Sentences that say where the committed notebooks of a source are not what it builds (outputs aside)."""
    nb, found = solved(source), []
    for folder, want in (("lessons", release(nb)), ("solutions", for_reading(nb))):
        path = root / folder / f"{source.stem}.ipynb"
        label = f"{folder}/{path.name}"
        if not path.exists():
            found.append(f"{label} does not exist")
            continue
        have = nbformat.read(path, as_version=4)
        if folder == "solutions" and any(c.cell_type == "code" and c.execution_count is None for c in have.cells):
            found.append(f"{label} has cells that were not executed")
        elif folder == "lessons" and have != without_outputs(have):
            found.append(f"{label} holds outputs")
        have = without_outputs(have)
        if have == want:
            continue
        pairs = list(zip(have.cells, want.cells))
        number = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), None)
        where = (f"cell {number} differs" if number else
                 f"it has {len(have.cells)} cells, not {len(want.cells)}" if len(have.cells) != len(want.cells) else "its metadata differ")
        found.append(f"{label} is not what solutions/{source.name} builds: {where}")
    return found


def course(folder, chosen):
    """Make or renew an nbgrader course in `folder`: source/, release/ and gradebook.db by nbgrader's generate_assignment.

    A lesson without exercises is no assignment and is left out. Returns the names of those that are in.
    """
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files.tools_on_path()
    shutil.copyfile(CONFIG, folder / CONFIG.name)
    settings = config()
    chosen = [source for source in chosen if exercise.assignment(source.stem).EXERCISES]
    for source in tqdm(chosen, desc="release", unit="lesson", leave=False):
        save(solved(source), folder / "source" / source.stem / f"{source.stem}.ipynb")
        api = NbGraderAPI(CourseDirectory(root=str(folder), config=settings), config=settings)
        result = api.generate_assignment(source.stem)
        if not result["success"]:
            raise SourceError(f"nbgrader could not release {source.stem}:\n{result.get('log', '')}{result['error']}")
    return [source.stem for source in chosen]


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m autograder.build", description="Build the lessons' notebooks from solutions/NN_topic.py.")
    parser.add_argument("lessons", nargs="*", metavar="NN_topic", help="the lessons to build (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit 1 if what is committed is not what the sources build")
    what.add_argument("--release", metavar="DIR", help="make an nbgrader course in DIR: source/, release/, gradebook.db, nbgrader_config.py")
    parser.add_argument("--fast", action="store_true", help="execute with FLOWKIT_FAST=1, which shortens every training")
    options = parser.parse_args(args)
    try:
        chosen = sources(options.lessons)
        if not chosen:
            raise SourceError("there are no sources in solutions/")
        if options.check:
            found = [d for source in chosen for d in differences(source)]
            print("\n".join(found) or f"{len(chosen)} lesson{'s are' if len(chosen) > 1 else ' is'} what the sources build")
            return 1 if found else 0
        if options.release:
            print(f"{options.release}: {', '.join(course(options.release, chosen)) or 'no lesson with exercises'}")
            return 0
        for source in chosen:
            build(source, fast=options.fast)
            print(f"lessons/{source.stem}.ipynb, solutions/{source.stem}.ipynb")
        return 0
    except ValueError as e:  # SourceError, and the sentences of autograder.exercise
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
