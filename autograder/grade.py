"""A whole class: every submission is rebuilt from the release, run in a kernel of its own, and judged from outside it.

The student's kernel only runs probes and leaves arrays; this process draws the inputs, reads the arrays and decides.
What was decided is appended to DIR/.grading/results.jsonl and flushed to disk, one line a submission, before it
counts; gradebook, table and report are made from these lines. So a run can be cut off at any moment, and the same
command goes on where it stopped.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import traceback
import warnings
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
from tqdm import tqdm

from autograder import exercise as records
from autograder import files, gradebook, intake, judge, platforms, render, report, runner, sandbox, workers
from autograder.judge import Verdict
from autograder.bar import Progress

JUDGES_SIDE = ("autograder.exercises", "autograder.judge", "autograder.rights")  # what a student's code may not import
KEPT = 500      # verdicts and pictures that a worker remembers
MANY = 20       # submissions from which on the outputs of all misconceptions are computed before the workers start
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
    """The releases in a folder, of lessons with exercises: NN_topic.ipynb (lessons/), or release/NN_topic/NN_topic.ipynb of an nbgrader course."""
    folder = Path(folder)
    found = {}
    for path in sorted([*folder.glob("*.ipynb"), *folder.glob("release/*/*.ipynb")]):
        if path.stem in {m.ASSIGNMENT for m in records.lessons().values() if m.EXERCISES}:
            found[path.stem] = Release(path.stem, nbformat.read(path, as_version=4), intake.digest(path.read_bytes()))
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

@dataclass(frozen=True)
class Order:
    """What a worker needs for one submission, wherever it is: nothing here names a file of the grader's machine."""

    student: str
    assignment: str
    name: str
    data: bytes
    release: Release
    key: str
    seed: int
    timeout: int
    without: tuple = ()
    refused: str = ""


@dataclass(frozen=True)
class Graded:
    """What comes back: the result, the notebook with its scores and the feedback page."""

    result: Result
    notebook: str
    feedback: str


def grade_one(order):
    """Grade one submission; runs in a worker."""
    release, arrays = order.release, {}
    try:
        if order.refused:
            raise intake.Unreadable(order.refused)
        rebuilt = intake.rebuild(release.notebook, *intake.parse(order.data))
    except intake.Unreadable as e:
        rebuilt = intake.Rebuilt(nbformat.from_dict(release.notebook))
        verdicts = [release.blank(t, "invalid", f"{order.name}: {e}") for t in release.tasks]
        result = Result(order.student, order.assignment, order.key, order.timeout, verdicts)
    else:
        run, verdicts = judged(release, rebuilt, release.tasks, order.seed, order.timeout, workers.parent(order.without))
        result = Result(order.student, order.assignment, order.key, order.timeout, verdicts, rebuilt.notes + trouble(rebuilt, run), run.seconds)
        arrays = run.arrays
    pages = {v.exercise: page(release, v, arrays.get(v.exercise), order.seed, result.notes) for v in verdicts}
    record_scores(rebuilt.notebook, verdicts, pages)
    return Graded(result, nbformat.writes(rebuilt.notebook) + "\n", report.feedback(result, release, rebuilt.notebook, pages))


def judged(release, rebuilt, tasks, seed, timeout, parent):
    """(Run, [Verdict, ...]): the rebuilt notebook is run in a child of `parent`, and each of the tasks is judged here."""
    inputs = {t.id: judge.bank(t, seed).inputs for t in tasks if not isinstance(t, str)}
    run = runner.run(rebuilt.notebook, inputs, seed, release.lesson.REFERENCES + JUDGES_SIDE, timeout, parent)
    return run, [verdict_on(t, release, rebuilt, run, seed) for t in tasks]


def verdict_on(task, release, rebuilt, run, seed):
    """The verdict on one exercise or written answer."""
    if isinstance(task, str):
        return release.blank(task, "manual" if task in rebuilt.answered else "unsolved")
    if task.id in run.arrays:
        try:
            with quiet():
                verdict = once("verdict", task, seed, run.arrays[task.id], lambda: judge.judge(task, seed, run.arrays[task.id]))
        except Exception as e:  # outputs that no probe would leave, or a fault of the judge: a person must look, the class goes on
            return release.blank(task, "error", f"the judge could not read the outputs of this exercise ({type(e).__name__}: {e})")
        return dataclasses.replace(verdict, score=min(max(verdict.score, 0.0), verdict.points))
    return release.blank(task, *without_outputs(task.id, rebuilt, run))


@contextlib.contextmanager
def quiet():
    """Misconceptions are wrong on purpose, torch remarks on it, and what they print is nobody's business."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_known = OrderedDict()


def once(what, exercise, seed, arrays, make):
    """make(), or what it gave for the same outputs before in this worker: the same mistake is diagnosed and drawn once."""
    key = what, exercise.id, seed, judge.digest(arrays)
    if key not in _known:
        _known[key] = make()
    _known.move_to_end(key)
    while len(_known) > KEPT:
        _known.popitem(last=False)
    return _known[key]


def forget():
    """Know no outputs again: for a clock."""
    _known.clear()


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
            picture = once("picture", record, seed, arrays, lambda: render.picture(record, judge.bank(record, seed), arrays))
        except Exception as e:  # a picture of a strange answer is not worth a grade, but it is said that it failed
            notes.append(f"the picture of {verdict.exercise} could not be drawn ({type(e).__name__}: {e})")
    return render.page(verdict, picture)


def record_scores(nb, verdicts, pages):
    """Put each score into its check cell as the result that nbgrader reads, whatever the cell did itself."""
    scores = {v.exercise: v.score for v in verdicts}
    for cell_id, name in runner.checks(nb).items():
        if name not in scores:  # a check that an instructor added to the release: its own outputs stand
            continue
        cell = next(c for c in nb.cells if c.id == cell_id)
        cell.execution_count = cell.execution_count or 1
        data = {SCORE: repr(float(scores[name])), PAGE: pages[name]}
        cell.outputs = [nbformat.v4.new_output("execute_result", data, execution_count=cell.execution_count)]


# --- the class -------------------------------------------------------------------------------------------------------

class Log:
    """The results so far: one JSON line a submission, on disk before it counts. `unread`: lines that are none of ours; they do not count."""

    def __init__(self, path):
        self.path, self.results, self.unread = path, {}, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]  # a line that was cut off in the middle does not count
        for line in whole.splitlines():
            try:
                self.remember(parse(line))
            except (ValueError, TypeError, KeyError):   # damaged on disk, or of an older form: that submission is graded again
                self.unread += 1
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


@contextlib.contextmanager
def alone(out):
    """One run at a time for a folder; the lock goes with the process that holds it, however that ends."""
    place = out / ".grading" / "lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise GradingError(f"another run is grading into {out}; wait for it, or stop it") from None
        yield


def sweep(out):
    """Remove what files.write had not yet moved to its place when a run was killed."""
    for folder in (out, out / ".grading", *out.glob("autograded/*/*"), *out.glob("feedback/*/*"), *out.glob("source/*"), *out.glob("submitted/*/*")):
        for path in folder.glob(".*.????????"):
            path.unlink()
    for folder in out.glob(".gradebook-*"):     # gradebook.create's
        shutil.rmtree(folder)


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


def grade(submitted, out, release="lessons", timeout=60, seed=None, only=None, jobs=None, cluster=None, unconfined=False):
    """Grade the class in `submitted`, a folder or a learning platform's ZIP file, into the folder `out`; returns the rows of grades.csv.
    Continues what is there.

    `timeout`: seconds for one cell; `jobs`: processes on this machine (default: one a core); `cluster`: the address of a Dask scheduler
    instead; `unconfined`: go on where a machine cannot confine students' code. An interrupt leaves what is there so far, and a second
    one ends the process at once: the next run goes on either way.
    """
    submitted, out = Path(submitted), Path(out)
    if not submitted.exists():
        raise GradingError(f"{submitted} is neither a folder with submissions <student>/<assignment>/<assignment>.ipynb nor a ZIP file")
    available = releases(release)
    notes = {}
    if platforms.needs_sorting(submitted, available):
        try:
            with alone(out):
                notes, remarks = remembered(out, platforms.sort(submitted, out / "submitted", available))
        except intake.Unreadable as e:
            raise GradingError(str(e)) from None
        for remark in remarks:
            tqdm.write(remark, file=sys.stderr)
        submitted = out / "submitted"
    submissions = intake.find(submitted, available)
    if not submissions:
        raise GradingError(f"{submitted}: no student's folder holds one of the assignments {', '.join(available)}")
    if only is not None and only not in {s.student for s in submissions}:
        raise GradingError(f"--only {only}: there is no such folder in {submitted}")
    without = () if cluster else unprotected(unconfined)
    with alone(out):
        return grade_all(out, submissions, notes, available, chosen_seed(out, seed), timeout, only,
                         lambda: workers.Cluster(cluster, version(), unconfined) if cluster else workers.Here(jobs or os.cpu_count() or 1), without)


def grade_all(out, submissions, notes, available, seed, timeout, only, pool, without):
    """The rest of `grade`, with all that was asked in order. `notes`: (student, assignment) -> sentences about how it was handed in."""
    sweep(out)
    log, failed = Log(out / ".grading" / "results.jsonl"), {}
    if log.unread:
        tqdm.write(f"{log.unread} lines of {log.path} could not be read; those submissions are graded again", file=sys.stderr)
    asked = [s for s in submissions if s.path is not None and only in (None, s.student)]
    progress = Progress(len(asked), "grading", "submissions")

    def orders(forked):
        done_once = forked == 0   # workers elsewhere compute what they need themselves
        for submission in asked:
            chosen, data, refused = available[submission.assignment], b"", ""
            try:
                data = intake.load(submission.path)
            except (OSError, intake.Unreadable) as e:
                refused = str(e)
            key = f"{intake.digest(data + refused.encode())[:32]}-{chosen.hash[:16]}-{version()}-{seed}"
            if done(log.results.get((submission.student, submission.assignment)), key, timeout, out):
                progress.skip()
            else:
                if not done_once:
                    prepare({s.assignment: available[s.assignment] for s in asked}, seed, len(asked) - progress.bar.n >= MANY, forked)
                    done_once = True
                yield Order(submission.student, submission.assignment, submission.path.name, data, chosen, key, seed, timeout, without, refused)

    def booked():
        return finish(out, submissions, available, {**log.results, **failed}, notes)

    try:
        with pool() as workers_:
            for order, graded in workers_.run(grade_one, orders(workers_.forked), progress.tick):
                if isinstance(graded, Exception):   # a fault of the grader must not cost the others their grades; the next run tries again
                    words = "".join(traceback.format_exception(graded))
                    tqdm.write(f"{order.student}, {order.assignment}: the grader itself failed\n{words}", file=sys.stderr)
                    graded = given_up(order, f"the grader itself failed ({type(graded).__name__}: {graded}); run it again, or grade this one by hand")
                    keep(out, graded)
                    failed[order.student, order.assignment] = graded.result
                else:
                    keep(out, graded)
                    log.append(graded.result)
                progress.done()
    except (KeyboardInterrupt, workers.Unusable) as e:
        progress.close()
        with second_interrupt_ends() if isinstance(e, KeyboardInterrupt) else contextlib.nullcontext():
            booked()
        raise
    finally:
        progress.close()
    return booked()


@contextlib.contextmanager
def second_interrupt_ends():
    """An interrupt inside ends the process as if it were killed, which costs nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    tqdm.write("\nStopped; writing the gradebook and the report of what is there (Ctrl-C leaves that to the next run).", file=sys.stderr)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def keep(out, graded):
    name = f"{graded.result.student}/{graded.result.assignment}/{graded.result.assignment}"
    files.write(out / "autograded" / f"{name}.ipynb", graded.notebook)
    files.write(out / "feedback" / f"{name}.html", graded.feedback)


def given_up(order, note):
    """What a submission gets that the grader could not grade: a row, a page and a place in the gradebook, for a person to fill."""
    notebook = nbformat.from_dict(order.release.notebook)
    verdicts = [order.release.blank(t, "error", note) for t in order.release.tasks]
    result = Result(order.student, order.assignment, order.key, order.timeout, verdicts)
    pages = {v.exercise: render.page(v, None) for v in verdicts}
    record_scores(notebook, verdicts, pages)
    return Graded(result, nbformat.writes(notebook) + "\n", report.feedback(result, order.release, notebook, pages))


def remembered(out, notes):
    """(how everything came that lies in `out`/submitted, also with earlier ZIP files; the remarks about this one as a whole)"""
    place, remarks = out / ".grading" / "arrived.json", notes.pop("")
    known = json.loads(place.read_text("utf-8")) if place.exists() else {}
    known |= {f"{student}/{assignment}": said for (student, assignment), said in notes.items()}
    files.write(place, json.dumps(known, ensure_ascii=False, indent=0, sort_keys=True))
    return {tuple(name.rsplit("/", 1)): said for name, said in known.items()}, remarks


def prepare(chosen, seed, many, jobs=1):
    """Compute what all workers need, before they are forked: the outputs of the references and, for `many`, of the misconceptions and the
    slips, in `jobs` processes.
    """
    import torch

    torch.set_num_threads(1)    # small nets are fastest so, and threads would not survive the fork
    tasks = [t for release in chosen.values() for t in release.tasks if not isinstance(t, str)]
    if not many:
        for task in tasks:
            with quiet():
                judge.prepare(task, seed, wrong=False)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), workers.begin, (os.getpid(),)) as pool:
        for task, found in zip(tasks, pool.map(prepared, [t.id for t in tasks], [seed] * len(tasks))):
            judge.bank(task, seed).cache |= found


def prepared(exercise, seed):
    """What is in the bank of an exercise when all of it was computed."""
    with quiet():
        return judge.prepare(records.get(exercise), seed).cache


def unprotected(allowed):
    """The layers of confinement that this machine lacks; GradingError names them, unless that is `allowed`."""
    missing = sandbox.missing()
    if missing and not allowed:
        lacks = "; ".join(f"{layer}: {reason}" for layer, reason in missing.items())
        raise GradingError(f"students' code cannot be confined here ({lacks}). Use --allow-unconfined for submissions that you trust, or grade "
                           "on a Linux machine or in a container that has them: autograder/README.md says how")
    return tuple(missing)


def finish(out, submissions, available, known, notes):
    """Gradebook, table and report from the results that are known for these submissions."""
    results = {}
    for s in submissions:
        result = known.get((s.student, s.assignment))
        if s.path is None:
            blank = [available[s.assignment].blank(t, "missing", s.note) for t in available[s.assignment].tasks]
            result = Result(s.student, s.assignment, "", 0, blank)
        if result is not None:
            said = notes.get((s.student, s.assignment), [])
            results[s.student, s.assignment] = dataclasses.replace(result, notes=said + result.notes)
    used = {a: available[a] for a in sorted({a for _, a in results})}
    marks = gradebook.write(out, used, results.values())
    rows = gradebook.table(used, results.values(), marks)
    gradebook.write_csv(out / "grades.csv", rows)
    files.write(out / "report.html", report.report(used, results.values(), rows, waiting=len(submissions) - len(results), out=out))
    return rows
