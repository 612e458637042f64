"""Runs the grader and kills it, over and over, in one process that has loaded everything: a start of Python and torch would take seconds each.

`python killing.py STATE KILLS SEED [real]` prints one JSON object: how often it killed whom in which phase, how many runs were finished,
and what differed from an undisturbed one. The Log, the files, the gradebook, the report and the workers are the real ones; the grading of
one submission is so only with `real`, and else a quick stand-in that gives the same every time. With `real` the victim is drawn among the
grader, its worker, the warm parent and students' own processes, and the moment is soon after there is one.
"""
import gc
import json
import mmap
import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import psutil

from autograder import build, files, gradebook, grade, judge, report
from nbgrader import api

LESSON = "02_coupling"
PHASES = ("start", "working", "notebook", "feedback", "log", "source", "gradebook", "table", "report", "other file")
STUDENTS, REAL = 12, 4
LIMIT = 3   # seconds for a cell: enough for an honest one where other tests run beside, and what ENDLESS costs each time
ENDLESS = "import time\nwhile True:\n    try:\n        time.sleep(1)\n    except BaseException:\n        pass"
EARLY, LATE = PHASES[:PHASES.index("source")], PHASES[PHASES.index("source"):]     # the late ones come also when all is graded
phase = mmap.mmap(-1, 2)    # shared with the runs: the one they are in, and the one that is waited for


def stand_in(order):
    """A graded submission, quick, and the same every time; a written answer of everybody waits for a person."""
    time.sleep(0.004)
    share = (int(order.student[1:]) % 5) / 4
    verdicts = []
    for task in order.release.tasks:
        verdict = order.release.blank(task, "manual" if isinstance(task, str) else "ok" if share == 1 else "wrong")
        verdict.score = 0.0 if isinstance(task, str) else round(share * verdict.points, 2)
        verdicts.append(verdict)
    result = grade.Result(order.student, order.assignment, order.key, order.timeout, verdicts)
    return grade.Graded(result, nbformat.writes(order.release.notebook) + "\n", f"<p>{order.student}</p>" * 2000)


# --- the class, and the phases ---------------------------------------------------------------------------------------

def hand_in(place, real):
    (source,) = build.sources([LESSON])
    solved = build.solved(source)
    answers = {c.id: c.source for c in solved.cells}
    for i in range(REAL if real else STUDENTS):
        nb = build.release(solved)
        for cell in nb.cells:
            if cell.id == "permute":
                cell.source = ENDLESS if real and i == 0 else f"{answers[cell.id]}\n# {i}"
        files.write(place / f"s{i:02}" / LESSON / f"{LESSON}.ipynb", nbformat.writes(nb))


def during(name, function):
    def wrapped(*args, **more):
        before = phase[0]
        phase[0] = PHASES.index(name(*args) if callable(name) else name)
        if phase[0] == phase[1]:
            time.sleep(0.004)   # some take less than it takes to see them
        try:
            return function(*args, **more)
        finally:
            phase[0] = before
    return wrapped


def kind(path, *_):
    path = Path(path)
    for word, name in (("autograded", "notebook"), ("feedback", "feedback"), ("source", "source")):
        if word in path.parts:
            return name
    return {"grades.csv": "table", "report.html": "report"}.get(path.name, "other file")


def watch():
    files.write = during(kind, files.write)
    grade.Log.append = during("log", grade.Log.append)
    gradebook.write = during("gradebook", gradebook.write)
    report.report = during("report", report.report)
    grade.grade_all = during("working", grade.grade_all)
    # What only reads, and would be most of a run's time: nothing is lost by a kill there.
    version, missing, releases = api.get_alembic_version(), grade.sandbox.missing(), grade.releases(build.ROOT / "lessons")
    api.get_alembic_version = lambda: version   # a process of its own each time, 1.5 s
    grade.sandbox.missing = lambda: missing
    grade.releases = lambda folder: releases


# --- a run, and what it leaves ---------------------------------------------------------------------------------------

def start(place, out, jobs):
    phase[0] = phase[1] = 0
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            with open(out.parent / "said.txt", "a") as said:
                os.dup2(said.fileno(), 2)
                grade.grade(place, out, build.ROOT / "lessons", timeout=LIMIT, seed=1, jobs=jobs)
            code = 0
        except BaseException:
            with open(out.parent / "faults.txt", "a") as file:
                import traceback
                traceback.print_exc(file=file)
        finally:
            os._exit(code)
    return child


def lines(out):
    log = out / ".grading" / "results.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def describe(out):
    """What a run left, for comparison: files by name, what the gradebook holds, who was graded how."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("gradebook.db", "lock", "results.jsonl", "booked.json"):
            found[str(path.relative_to(out))] = path.read_bytes()
    book = sqlite3.connect(out / "gradebook.db")
    found["version"] = book.execute("SELECT COUNT(*) FROM alembic_version").fetchall()
    book.close()
    with api.Gradebook(f"sqlite:///{out / 'gradebook.db'}") as book:
        found["students"] = sorted(s.id for s in book.students)
        for s in book.assignment_submissions(LESSON):
            found["book", s.student.id] = sorted(
                [(g.name, g.auto_score, g.manual_score, g.extra_credit, g.needs_manual_grade, g.max_score) for n in s.notebooks for g in n.grades]
                + [(c.name, c.auto_comment or "", c.manual_comment or "") for n in s.notebooks for c in n.comments], key=repr)
    found["lines"] = lines(out)
    for line in (out / ".grading" / "results.jsonl").read_text("utf-8").splitlines():
        result = json.loads(line)
        found["graded", result["student"]] = {**result, "seconds": 0}
    return found


ROLES = ("grader", "worker", "warm parent", "child")


def family(run):
    """Role -> the processes of a run; a student's own are all below a warm parent."""
    main, found = psutil.Process(run), {role: [] for role in ROLES}
    found["grader"].append(main)
    for process in main.children(recursive=True):
        try:
            above = process.parents()
            depth = [p.pid for p in above].index(run)
            warm = "autograder.warm" in process.cmdline()
        except (psutil.NoSuchProcess, ValueError):
            continue
        found["worker" if depth == 0 else "warm parent" if warm and depth == 1 else "child"].append(process)
    return found


def kill(run, whom, role, killed):
    """Kill one of the processes of a run, and see that what is below it goes too; True if it was there."""
    try:
        below = whom.children(recursive=True)
        os.kill(whom.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    killed[role] += 1
    killed[PHASES[phase[0]]] += 1
    if role == "grader":
        os.waitpid(run, 0)
    gone(below)
    return True


def gone(processes, seconds=10):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    if alive:
        raise AssertionError(f"processes that outlived the one above them: {[(p.pid, p.cmdline()[:5]) for p in alive]}")


def ended(run):
    return os.waitpid(run, os.WNOHANG)[0] != 0


def finished(run, seconds=90):
    """Wait for the end of a run; one that hangs is ended, and is a fault."""
    end = time.monotonic() + seconds
    while not ended(run):
        if time.monotonic() > end:
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            raise AssertionError(f"a run did not end in {seconds} s")
        time.sleep(0.01)


def moment(run, out, draw, length):
    """Wait for a random moment of the run, or one in a random phase; (whom to kill, role), or None if the run ended before."""
    wanted = PHASES.index(draw.choice(LATE if lines(out) == STUDENTS or draw.random() < 0.1 else EARLY)) if draw.random() < 0.8 else 0
    phase[1] = wanted
    end = time.monotonic() + draw.uniform(0, length / 2)
    while phase[0] != wanted if wanted else time.monotonic() < end:
        if ended(run):
            return None
        time.sleep(0.001)
    time.sleep(draw.choice((0, draw.uniform(0, 0.006), draw.uniform(0, 0.03))))
    if ended(run):
        return None
    there = family(run)
    role = "worker" if there["worker"] and draw.random() < 0.4 else "grader"
    return draw.choice(there[role]), role


def moment_of(role, run, draw):
    """The same for a process of that role, as soon as there is one, and a little later."""
    while not ended(run):
        there = family(run)[role]
        if there:
            time.sleep(draw.uniform(0, 0.2))
            return None if ended(run) else (draw.choice(there), role)
        time.sleep(0.02)
    return None


def main():
    state, kills, seed, real = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "real" in sys.argv
    jobs = 1 if real else 2
    files.tools_on_path()
    watch()
    if not real:
        grade.grade_one = stand_in
    place = state / "class"
    hand_in(place, real)

    begin = time.monotonic()
    grade.grade(place, state / "undisturbed", build.ROOT / "lessons", timeout=LIMIT, seed=1, jobs=jobs)    # here, so that all is loaded before the forks
    meant = describe(state / "undisturbed")
    gc.collect(), gc.freeze()   # the runs would copy this process' memory to look through it
    before, faults = time.monotonic(), []
    if not real:
        finished(start(place, state / "again", jobs))
        again = describe(state / "again")
        faults = [f"without a kill: {difference(key, meant, again)}" for key in again if meant.get(key) != again[key]]
    length = time.monotonic() - before

    draw, killed, rounds, total = random.Random(seed), Counter(), 0, 0
    while total < kills:
        rounds += 1
        out, run, here, children = state / f"out{rounds}", None, 0, killed["child"]
        while total < kills and here < 16:
            run = run or start(place, out, jobs)
            chosen = moment_of(ROLES[total % len(ROLES)], run, draw) if real else moment(run, out, draw, length)
            if chosen is None:
                run = None
                break
            if kill(run, *chosen, killed):
                total, here = total + 1, here + 1
                if chosen[1] == "grader":
                    run = None
        if run is not None:
            finished(run)
        again = disturbed(out, meant, killed["child"] - children)
        finished(start(place, out, jobs))   # a last run, undisturbed, which finds little or nothing to do
        got = describe(out)
        got["lines"] -= again
        faults += [f"round {rounds}: {difference(key, meant, got)}" for key in meant.keys() | got.keys() if meant.get(key) != got.get(key)]
    crashed = (state / "faults.txt").read_text() if (state / "faults.txt").exists() else ""
    print(json.dumps({"kills": total, "rounds": rounds, "killed": killed, "faults": faults, "crashed": crashed, "undisturbed": length,
                      "seconds": time.monotonic() - begin, "submissions": meant["lines"]}))


def difference(key, meant, got):
    """The key, and of somebody's result what stands there in the place of what."""
    one, other = meant.get(key), got.get(key)
    if key[0] != "graded" or one is None or other is None:
        return key
    verdicts = [(v["exercise"], v["status"], w["status"], w["note"]) for v, w in zip(one["verdicts"], other["verdicts"]) if v != w]
    return key, verdicts, [name for name in one if name != "verdicts" and one[name] != other[name]]


def disturbed(out, meant, most):
    """Ask for a new grading, as a person does, of those whose own process was killed: from outside that looks like their own doing.

    Returns how many; at most `most` may be, and nobody else's result may differ.
    """
    log, found = out / ".grading" / "results.jsonl", 0
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        result = {**json.loads(line), "seconds": 0}
        if result != meant["graded", result["student"]] and any(v["status"] == "killed" for v in result["verdicts"]) and found < most:
            (out / "feedback" / result["student"] / LESSON / f"{LESSON}.html").unlink(missing_ok=True)
            found += 1
    return found


if __name__ == "__main__":
    main()
