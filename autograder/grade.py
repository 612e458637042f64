"""A whole class: every submission is rebuilt from the release, run in a kernel of its own, and judged from outside it.

The student's kernel only runs probes and leaves arrays; this process draws the inputs, reads the arrays and decides.
What was decided is appended to DIR/.grading/results.jsonl and flushed to disk, one line a submission, before it
counts; gradebook, table, feedback and report are made from these lines. So a run can be cut off at any moment, and the
same command goes on where it stopped.
"""
import dataclasses
import hashlib
import json
import os
import secrets
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
from tqdm import tqdm

from autograder import exercise as records
from autograder import files, gradebook, intake, judge, render, report, runner
from autograder.judge import Verdict

SCORE, PAGE = "text/plain", "text/html"


class GradingError(ValueError):
    """What is wrong with the arguments of a run, in one sentence."""


@dataclass
class Result:
    """What one submission got: a verdict for each exercise and written answer, in the release's order.

    `key` says what was graded against what; it is empty where nothing was graded.
    """

    student: str
    assignment: str
    key: str
    timeout: int
    verdicts: list
    notes: list = field(default_factory=list)
    seconds: float = 0.0

    @property
    def timed_out(self):
        return any(v.status == "timeout" for v in self.verdicts)


# --- what is graded against what -------------------------------------------------------------------------------------

@dataclass
class Release:
    """The released notebook of an assignment, with the lesson's records."""

    name: str
    notebook: nbformat.NotebookNode
    hash: str

    @property
    def lesson(self):
        return records.assignment(self.name)

    @property
    def tasks(self):
        """The exercises (records) and written answers (ids) in the notebook's order."""
        known = {e.id: e for e in self.lesson.EXERCISES}
        return [known.get(i, i) for i in intake.solution_cells(self.notebook).values()]

    def blank(self, task, status, note=""):
        """A verdict without points."""
        if isinstance(task, str):
            return Verdict(task, status, 0.0, float(self.lesson.TEXTS[task]), note=note)
        return Verdict(task.id, status, 0.0, task.points, note=note)


def releases(folder):
    """The releases in a folder: NN_topic.ipynb (lessons/), or release/NN_topic/NN_topic.ipynb of an nbgrader course."""
    folder = Path(folder)
    found = {}
    for path in sorted([*folder.glob("*.ipynb"), *folder.glob("release/*/*.ipynb")]):
        if path.stem in {m.ASSIGNMENT for m in records.lessons().values()}:
            found[path.stem] = Release(path.stem, nbformat.read(path, as_version=4), intake.digest(path))
    if not found:
        raise GradingError(f"--release {folder}: no released notebook NN_topic.ipynb is there")
    return found


@cache
def version():
    """A hash of everything that decides: the checks, the references, and how they are run."""
    here = Path(__file__).resolve().parent
    sources = [p for folder in (here, here.parent / "flowkit") for p in sorted(folder.rglob("*")) if p.suffix in (".py", ".j2")]
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in sources)).hexdigest()[:16]


def chosen_seed(out, seed):
    """The seed of the inputs: the one given, else that of the run which is being continued, else a fresh one."""
    file = out / ".grading" / "seed"
    if seed is None:
        seed = int(file.read_text("utf-8")) if file.exists() else secrets.randbelow(2**31)
    files.write(file, f"{seed}\n")
    return seed


# --- one submission --------------------------------------------------------------------------------------------------

def grade_one(submission, release, out, key, seed, timeout):
    """Grade one submission, write its notebook and feedback page, and return its Result."""
    try:
        rebuilt = intake.rebuild(release.notebook, intake.read(submission.path))
    except intake.Unreadable as e:
        rebuilt = intake.Rebuilt(nbformat.from_dict(release.notebook))
        verdicts = [release.blank(t, "invalid", f"{submission.path.name}: {e}") for t in release.tasks]
        result = Result(submission.student, submission.assignment, key, timeout, verdicts)
        arrays = {}
    else:
        exercises = [t for t in release.tasks if not isinstance(t, str)]
        inputs = {e.id: judge.bank(e, seed).inputs for e in exercises}
        run = runner.run(rebuilt.notebook, inputs, seed, release.lesson.REFERENCES + ("autograder.exercises", "autograder.judge", "autograder.rights"), timeout)
        verdicts = [verdict_on(t, release, rebuilt, run, seed) for t in release.tasks]
        result = Result(submission.student, submission.assignment, key, timeout, verdicts, rebuilt.notes + trouble(rebuilt, run), run.seconds)
        arrays = run.arrays
    pages = {v.exercise: page(release, v, arrays.get(v.exercise), seed, result.notes) for v in verdicts}
    record_scores(rebuilt.notebook, verdicts, pages)
    name = f"{release.name}/{release.name}"
    files.write(out / "autograded" / submission.student / f"{name}.ipynb", nbformat.writes(rebuilt.notebook) + "\n")
    files.write(out / "feedback" / submission.student / f"{name}.html", report.feedback(result, release, rebuilt.notebook, pages))
    return result


def verdict_on(task, release, rebuilt, run, seed):
    """The verdict on one exercise or written answer."""
    if isinstance(task, str):
        return release.blank(task, "manual" if task in rebuilt.answered else "unsolved")
    if task.id in run.arrays:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # misconceptions are wrong on purpose, and torch remarks on it
                verdict = judge.judge(task, seed, run.arrays[task.id])
        except Exception as e:  # outputs that no probe would leave, or a fault of the judge: a person must look, the class goes on
            return release.blank(task, "error", f"the judge could not read the outputs of this exercise ({type(e).__name__}: {e})")
        verdict.score = min(max(verdict.score, 0.0), verdict.points)
        return verdict
    return release.blank(task, *without_outputs(task.id, rebuilt, run))


def without_outputs(name, rebuilt, run):
    """(status, note) of an exercise whose check left nothing: from what happened in its cells."""
    if name not in rebuilt.answered:
        return "unsolved", ""
    if name in run.unusable:
        return "error", run.unusable[name]
    for cell, what in ((name, "your solution cell"), (f"{name}_check", "the check")):
        event = run.events.get(cell, runner.Event("ok"))
        if event.kind in ("timeout", "killed"):
            return event.kind, f"{what}: {event.text}" if not event.text.startswith("an earlier") else event.text
        if event.kind == "error":
            memory = event.text.startswith("MemoryError")
            return "memory" if memory else "error", f"{what} stopped with {event.text}"
    return "error", "the check left no outputs"


def trouble(rebuilt, run):
    """What a person should know beside the verdicts: set-up cells that failed."""
    return [f"a set-up cell failed: {run.events[c.id].text}" for c in rebuilt.notebook.cells
            if "setup" in c.metadata.get("tags", []) and run.events.get(c.id, runner.Event("ok")).kind not in ("ok", "killed")]


def page(release, verdict, arrays, seed, notes):
    """A verdict as HTML, with its picture where points were lost."""
    picture = None
    if arrays is not None and verdict.status == "wrong":
        record = records.get(verdict.exercise)
        try:
            picture = render.picture(record, judge.bank(record, seed), arrays)
        except Exception as e:  # a picture of a strange answer is not worth a grade, but it is said that it failed
            notes.append(f"the picture of {verdict.exercise} could not be drawn ({type(e).__name__}: {e})")
    return render.page(verdict, picture)


def record_scores(nb, verdicts, pages):
    """Put each score into its check cell as the result that nbgrader reads, whatever the cell did itself."""
    scores = {v.exercise: v.score for v in verdicts}
    for cell_id, name in runner.checks(nb).items():
        cell = next(c for c in nb.cells if c.id == cell_id)
        cell.execution_count = cell.execution_count or 1
        data = {SCORE: repr(float(scores[name])), PAGE: pages[name]}
        cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=cell.execution_count)]


# --- the class -------------------------------------------------------------------------------------------------------

class Log:
    """The results so far: one JSON line a submission, on disk before it counts."""

    def __init__(self, path):
        self.path = path
        self.results = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]  # a line that was cut off in the middle does not count
        for line in whole.splitlines():
            self.remember(parse(line))
        if whole != data:
            os.truncate(path, len(whole))

    def remember(self, result):
        self.results[result.student, result.assignment] = result

    def append(self, result):
        line = json.dumps(dataclasses.asdict(result), ensure_ascii=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.remember(result)


def parse(line):
    data = json.loads(line)
    verdicts = []
    for v in data.pop("verdicts"):
        v["cases"] = [judge.CaseResult(**c) for c in v["cases"]]
        verdicts.append(Verdict(**{**v, "diagnosis": tuple(v["diagnosis"]), "sentences": tuple(v["sentences"])}))
    return Result(verdicts=verdicts, **data)


def done(result, key, timeout, out):
    """Whether a result stands: for the same submission, release, grader and seed, and no longer time limit now."""
    if result is None or result.key != key or (result.timed_out and timeout > result.timeout):
        return False
    name = f"{result.student}/{result.assignment}/{result.assignment}"
    return (out / "autograded" / f"{name}.ipynb").exists() and (out / "feedback" / f"{name}.html").exists()


def grade(submitted, out, release="lessons", timeout=60, seed=None, only=None):
    """Grade the class in `submitted` into the folder `out`; returns the rows of grades.csv. Continues what is there."""
    submitted, out = Path(submitted), Path(out)
    if not submitted.is_dir():
        raise GradingError(f"{submitted} is not a folder with submissions <student>/<assignment>/<assignment>.ipynb")
    available = releases(release)
    submissions = intake.find(submitted, available)
    if not submissions:
        raise GradingError(f"{submitted}: no student's folder holds one of the assignments {', '.join(available)}")
    if only is not None and only not in {s.student for s in submissions}:
        raise GradingError(f"--only {only}: there is no such folder in {submitted}")
    seed = chosen_seed(out, seed)
    log = Log(out / ".grading" / "results.jsonl")
    asked = [s for s in submissions if s.path is not None and only in (None, s.student)]
    failed = {}
    try:
        for submission in tqdm(asked, desc="grading", unit="submission"):
            chosen = available[submission.assignment]
            key = f"{intake.digest(submission.path)[:32]}-{chosen.hash[:16]}-{version()}-{seed}"
            if done(log.results.get((submission.student, submission.assignment)), key, timeout, out):
                continue
            try:
                log.append(grade_one(submission, chosen, out, key, seed, timeout))
            except Exception as e:  # a fault of the grader must not cost the others their grades; the next run tries again
                tqdm.write(f"{submission.student}, {submission.assignment}: the grader itself failed\n{traceback.format_exc()}", file=sys.stderr)
                note = f"the grader itself failed ({type(e).__name__}: {e}); run it again, or grade this one by hand"
                blank = [chosen.blank(t, "error", note) for t in chosen.tasks]
                failed[submission.student, submission.assignment] = Result(submission.student, submission.assignment, "", timeout, blank)
    finally:
        rows = finish(out, submissions, available, {**log.results, **failed})
    return rows


def finish(out, submissions, available, known):
    """Gradebook, table and report from the results that are known for these submissions."""
    results = {}
    for s in submissions:
        result = known.get((s.student, s.assignment))
        if s.path is None:
            blank = [available[s.assignment].blank(t, "missing", s.note) for t in available[s.assignment].tasks]
            results[s.student, s.assignment] = Result(s.student, s.assignment, "", 0, blank)
        elif result is not None:
            results[s.student, s.assignment] = result
    used = {a: available[a] for a in sorted({a for _, a in results})}
    marks = gradebook.write(out, used, results.values())
    rows = gradebook.table(used, results.values(), marks)
    gradebook.write_csv(out / "grades.csv", rows)
    files.write(out / "report.html", report.report(used, results.values(), rows, waiting=len(submissions) - len(results)))
    return rows
