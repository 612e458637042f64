"""Results into an nbgrader course that formgrader opens as it is, and into one plain table.

Only this process writes the gradebook, through nbgrader's own API. A score that a person gave in formgrader stays: it
is what the table shows, and when the student hands in something else, it is marked for a second look.
"""
import csv
import io
import json
import warnings
from pathlib import Path

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.preprocessors import SaveCells
from sqlalchemy.exc import SAWarning

from autograder import files

COLUMNS = ("student", "assignment", "exercise", "score", "max_score", "status", "diagnosis")
CONFIG = Path(__file__).with_name("nbgrader_config.py")


def write(out, releases, results):
    """Write gradebook.db, source/ and nbgrader_config.py; returns {(student, assignment, exercise): score given by a person}."""
    out = Path(out).resolve()
    files.tools_on_path()
    files.write(out / CONFIG.name, CONFIG.read_bytes())
    url = f"sqlite:///{out / 'gradebook.db'}"
    booked = Booked(out / ".grading" / "booked.json")
    marks = {}
    with warnings.catch_warnings(), Gradebook(url) as book:
        warnings.simplefilter("ignore", SAWarning)  # nbgrader's own use of autoflush
        for release in releases.values():
            add_assignment(book, url, release, out)
        for result in results:
            book.update_or_create_student(result.student)
            if result.key:  # something was handed in
                marks |= add_submission(book, result, booked)
    booked.save()
    return marks


class Booked:
    """Which version of each submission the gradebook holds, so that a manual score is known to be of an older one."""

    def __init__(self, path):
        self.path = path
        self.keys = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def changed(self, result):
        """Whether the student's file is another one than when it was last booked."""
        name, version = f"{result.student}/{result.assignment}", result.key.split("-")[0]
        old, self.keys[name] = self.keys.get(name), version
        return old is not None and old != version

    def save(self):
        files.write(self.path, json.dumps(self.keys, indent=0, sort_keys=True))


def add_assignment(book, url, release, out):
    """The assignment's cells, by nbgrader's SaveCells, unless they are there already."""
    book.update_or_create_assignment(release.name)
    files.write(out / "source" / release.name / f"{release.name}.ipynb", nbformat.writes(release.notebook) + "\n")
    resources = {"nbgrader": {"notebook": release.name, "assignment": release.name, "db_url": url}}
    try:
        SaveCells().preprocess(nbformat.from_dict(release.notebook), resources)
    except RuntimeError:  # what nbgrader says when cells come or go after the first submission
        raise ValueError(f"{release.name} has other exercises now than when this folder was first graded; grade into a new folder") from None


def add_submission(book, result, booked):
    """Scores of one submission; returns the scores that a person gave."""
    name, verdicts = result.assignment, {}
    for verdict in result.verdicts:
        verdicts[f"{verdict.exercise}_check"] = verdicts[verdict.exercise] = verdict
    try:
        submission = book.find_submission(name, result.student)
    except MissingEntry:
        with book.db.no_autoflush:
            submission = book.add_submission(name, result.student)
    fresh, marks = booked.changed(result), {}
    for notebook in submission.notebooks:
        for grade in notebook.grades:
            verdict = verdicts[grade.name]
            score = None if verdict.status == "manual" else min(verdict.score, grade.max_score)
            if grade.manual_score is not None:
                marks[result.student, name, verdict.exercise] = grade.manual_score + (grade.extra_credit or 0.0)
                grade.needs_manual_grade = grade.needs_manual_grade or fresh or (score is not None and score != grade.auto_score)
            else:
                grade.needs_manual_grade = score is None
            grade.auto_score = score
        for comment in notebook.comments:
            unanswered = verdicts[comment.name].status == "unsolved"
            comment.auto_comment = "No response." if unanswered else None
    book.db.commit()
    return marks


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
