"""Results into an nbgrader course that formgrader opens as it is, and into one plain table.

Only this process writes the gradebook. Each assignment is one transaction that reads what is there and writes what changed, so a
run that is killed leaves the gradebook as it was before or as it is after. A score, an extra credit or a comment that a person gave in
formgrader is never written: it is what the table shows, and when the student hands in something else, it is marked for a second look.
"""
import csv
import io
import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbgrader import api
from nbgrader.preprocessors import SaveCells
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import DatabaseError, SAWarning

from autograder import files

COLUMNS = ("student", "assignment", "exercise", "score", "max_score", "status", "diagnosis")
CONFIG = Path(__file__).with_name("nbgrader_config.py")
PATIENCE = 60  # seconds to wait while another program writes; nbgrader itself gives up after 5, so we write for less than that
UNANSWERED = "No response."

# Beside nbgrader's own tables, which leave these alone. Which version of each submission the gradebook holds, so that a manual score is known
# to be of an older one: here, because it must change together with the scores. And indices, without which nbgrader
# and formgrader look through all grades of all students for each of their sums.
OWN = (
    "CREATE TABLE IF NOT EXISTS autograder_booked (student TEXT, assignment TEXT, version TEXT, PRIMARY KEY (student, assignment))",
    "CREATE INDEX IF NOT EXISTS autograder_grades ON grade (notebook_id)",
    "CREATE INDEX IF NOT EXISTS autograder_comments ON comment (notebook_id)",
    "CREATE INDEX IF NOT EXISTS autograder_notebooks ON submitted_notebook (assignment_id)",
    "CREATE INDEX IF NOT EXISTS autograder_submissions ON submitted_notebook (notebook_id)",
)


class GradebookError(ValueError):
    """The gradebook cannot be written, in one sentence."""


def write(out, releases, results, patience=PATIENCE):
    """Write gradebook.db, source/ and nbgrader_config.py; returns {(student, assignment, exercise): score that a person had a hand in}.

    Raises GradebookError when another program keeps the gradebook for more than `patience` seconds, or it cannot be written at all.
    """
    out, results = Path(out).resolve(), list(results)
    files.tools_on_path()
    files.write(out / CONFIG.name, CONFIG.read_bytes())
    path, marks = out / "gradebook.db", {}
    with explained(path, patience), warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # nbgrader's own use of autoflush
        if not path.exists():
            create(path)
        url = f"sqlite:///{path}?timeout={patience}"
        with api.Gradebook(url) as book, book.db.begin():
            for statement in OWN:
                book.db.execute(text(statement))
        for release in releases.values():
            add_assignment(url, release, out)
        with api.Gradebook(url) as book:
            transactions_begin_with_a_lock(book.engine)
            for name in releases:
                marks |= add_submissions(book, name, [r for r in results if r.assignment == name])
    return marks


@contextmanager
def explained(path, patience):
    try:
        yield
    except DatabaseError as e:
        busy = "locked" in str(e.orig)
        reason = (f"another program (formgrader?) has kept it for more than {patience} seconds; stop that" if busy
                  else f"it cannot be written ({e.orig}); mend that, or move it away")
        raise GradebookError(f"{path.name}: {reason}, and run the same command again. The results are kept, and nothing is graded twice") from None


def create(path):
    """An empty gradebook, which appears in one step: nbgrader makes the tables and their version number in several."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gradebook-") as folder:
        fresh = Path(folder) / path.name
        with api.Gradebook(f"sqlite:///{fresh}"):
            pass
        os.replace(fresh, path)


def transactions_begin_with_a_lock(engine):
    """What a transaction read stays true until it has written: SQLite is asked to lock at the beginning, not at the first change."""
    @event.listens_for(engine, "connect")
    def leave_begin_to_us(connection, _):
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before


def add_assignment(url, release, out):
    """The assignment's cells, by nbgrader's SaveCells; it begins anew what an earlier run left half done."""
    with api.Gradebook(url) as book:
        book.update_or_create_assignment(release.name)
    files.write(out / "source" / release.name / f"{release.name}.ipynb", nbformat.writes(release.notebook) + "\n")
    resources = {"nbgrader": {"notebook": release.name, "assignment": release.name, "db_url": url}}
    try:
        SaveCells().preprocess(nbformat.from_dict(release.notebook), resources)
    except RuntimeError:  # what nbgrader says when cells come or go after the first submission
        raise ValueError(f"{release.name} has other exercises now than when this folder was first graded; grade into a new folder") from None


def add_submissions(book, name, results):
    """Scores of the submissions of one assignment, in one transaction; returns the scores that a person had a hand in.

    nbgrader's add_submission and its relations ask the database dozens of times for one submission; the same rows are read and written
    here for all of them at once, 1,000 submissions of 12 exercises in about a second.
    """
    db, marks = book.db, {}
    by_student = {r.student: r for r in results}
    verdicts = {(r.student, place): v for r in results for v in r.verdicts for place in (v.exercise, f"{v.exercise}_check")}
    with db.begin():
        booked = dict(db.execute(text("SELECT student, version FROM autograder_booked WHERE assignment = :a"), {"a": name}).all())
        add_rows(db, name, by_student)
        versions = {r.student: r.key.split("-")[0] for r in results if r.key}
        changes = []
        most = dict(db.execute(select(api.GradeCell.id, api.GradeCell.max_score)).all())
        for student, cell, row in handed_in(db, name, api.Grade, api.Grade.auto_score, api.Grade.manual_score, api.Grade.extra_credit,
                                            api.Grade.needs_manual_grade):
            if student not in by_student:
                continue
            verdict = verdicts[student, cell]
            score = None if verdict.status == "manual" else min(verdict.score, most[row.cell_id])
            by_hand = row.manual_score is not None or row.extra_credit is not None
            given = score if row.manual_score is None else row.manual_score
            if given is None and most[row.cell_id] == 0.0:  # a bonus outside the maximum: formgrader takes its points as extra credit alone
                given = 0.0
            if by_hand and given is not None:
                marks[student, name, verdict.exercise] = given + (row.extra_credit or 0.0)
            if student not in versions:  # nothing was handed in now, yet something was graded once: that stays
                continue
            needs = score is None and row.manual_score is None
            if by_hand:
                other = booked.get(student, versions[student]) != versions[student]
                needs = needs or row.needs_manual_grade or other or (score is not None and score != row.auto_score)
            if (score, needs) != (row.auto_score, row.needs_manual_grade):
                changes.append({"id": row.id, "auto_score": score, "needs_manual_grade": needs})
        remarks = []
        for student, cell, row in handed_in(db, name, api.Comment, api.Comment.auto_comment):
            if student in versions:
                remark = UNANSWERED if verdicts[student, cell].status == "unsolved" else None
                if remark != row.auto_comment:
                    remarks.append({"id": row.id, "auto_comment": remark})
        for table_, rows in ((api.Grade, changes), (api.Comment, remarks)):
            if rows:
                db.execute(update(table_), rows)
        new = [{"s": s, "a": name, "v": v} for s, v in versions.items() if booked.get(s) != v]
        if new:
            db.execute(text("INSERT OR REPLACE INTO autograder_booked VALUES (:s, :a, :v)"), new)
    return marks


def handed_in(db, name, kind, *columns):
    """(student, cell's name, row) for all submissions of an assignment; `kind` is Grade or Comment, a row has its id and the columns.

    Joined here, not by SQLite, which has no index for it and would take a minute for a class.
    """
    owners = dict(db.execute(
        select(api.SubmittedNotebook.id, api.SubmittedAssignment.student_id).join_from(
            api.SubmittedNotebook, api.SubmittedAssignment, api.SubmittedNotebook.assignment_id == api.SubmittedAssignment.id)
        .join(api.Assignment, api.SubmittedAssignment.assignment_id == api.Assignment.id).where(api.Assignment.name == name)).all())
    cells = dict(db.execute(select(api.BaseCell.id, api.BaseCell.name)).all())
    rows = db.execute(select(kind.id, kind.notebook_id, kind.cell_id, *columns)).all()
    return [(owners[row.notebook_id], cells[row.cell_id], row) for row in rows if row.notebook_id in owners]


def add_rows(db, name, by_student):
    """What nbgrader's add_student and add_submission make, for those who are not there yet: a grade and a comment for each cell."""
    known = set(db.scalars(select(api.Student.id)))
    assignment = db.scalar(select(api.Assignment.id).where(api.Assignment.name == name))
    booked = set(db.scalars(select(api.SubmittedAssignment.student_id).where(api.SubmittedAssignment.assignment_id == assignment)))
    notebooks = db.scalars(select(api.Notebook.id).where(api.Notebook.assignment_id == assignment)).all()
    cells = {kind: db.execute(select(cell.id, cell.notebook_id).where(cell.notebook_id.in_(notebooks))).all()
             for kind, cell in ((api.Grade, api.GradeCell), (api.Comment, api.SolutionCell))}
    rows = {api.Student: [{"id": s} for s in by_student if s not in known], api.SubmittedAssignment: [], api.SubmittedNotebook: [],
            api.Grade: [], api.Comment: []}
    for student, result in by_student.items():
        if not result.key or student in booked:
            continue
        submission = {"id": api.new_uuid(), "assignment_id": assignment, "student_id": student}
        rows[api.SubmittedAssignment].append(submission)
        for notebook in notebooks:
            own = {"id": api.new_uuid(), "assignment_id": submission["id"], "notebook_id": notebook}
            rows[api.SubmittedNotebook].append(own)
            for kind in (api.Grade, api.Comment):
                rows[kind] += [{"id": api.new_uuid(), "cell_id": c.id, "notebook_id": own["id"]} for c in cells[kind] if c.notebook_id == notebook]
    for kind, added in rows.items():
        if added:
            db.execute(insert(kind), added)


def table(releases, results, marks):
    """The rows of grades.csv: what a person gave, else what was computed; empty where a person has yet to mark."""
    rows = []
    for result in sorted(results, key=lambda r: (r.student, r.assignment)):
        release = releases[result.assignment]
        for task, verdict in zip(release.tasks, result.verdicts):
            most = verdict.points if isinstance(task, str) else task.max_score
            computed = "" if verdict.status == "manual" else verdict.score
            rows.append({
                "student": result.student, "assignment": result.assignment, "exercise": verdict.exercise,
                "score": marks.get((result.student, result.assignment, verdict.exercise), computed), "max_score": most,
                "status": verdict.status, "diagnosis": "+".join(verdict.diagnosis),
            })
    return rows


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    files.write(path, text.getvalue())
