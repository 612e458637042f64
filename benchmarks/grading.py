"""How fast is a class graded? Stock nbgrader, stock nbgrader with our settings, and the class run, on the same submissions of lesson 02.

    python benchmarks/grading.py [--quick] [--check] [--stock N] [--class N]

Each way grades the same made-up class (benchmarks/_class.py) on the same seed, one after the other, and all must give the same scores.
"whole" is the wall time of the command divided by the submissions; "without start-up" is the time from the first finished submissions to the
command's end, gradebook and report included, divided by those that remained. `--stock N` takes the first N only for plain nbgrader, which is
slow; its start-up is then counted once for all. Then the processor time that grading adds to one submission's own cells: all that
the worker, the warm parent and its children spend, less the same cells run bare in a forked process; pictures apart. `--check` exits
1 and names each figure that misses its goal: without start-up the class run is 20 times as fast as plain nbgrader, with it 8 times, nbgrader
with our settings 5 times; at most 0.15 CPU-seconds are added. `--class N` grades N submissions end to end instead.
"""
import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import psutil
from nbgrader.api import Gradebook

import _class
from _class import LESSON, ROOT
from autograder import build, files, grade, intake, judge, render, warm, workers

SEED, TIMEOUT = 20240501, 60
PLAIN = "\nfor name in ('sanitize_preprocessors', 'autograde_preprocessors'):\n    c.Autograde.pop(name, None)\n"
GOALS = {"class run": (20, 8), "nbgrader with our settings": (5, None)}
ADDED = 0.15


@dataclass
class Timed:
    """Seconds of wall time of a command on `number` submissions, `rest` of them after the first ones were done; MiB at its peak."""

    number: int
    wall: float
    each: float     # for one submission, without start-up
    peak: float
    scores: dict

    @property
    def start(self):
        return max(0.0, self.wall - self.number * self.each)

    def whole(self, number):
        """Seconds for one of `number` submissions, start-up included."""
        return self.start / number + self.each


def timed(command, folder, pattern, students, abreast=1):
    """Run a command in a folder and time it by the files that it leaves, one a submission."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AUTOGRADER_SEED": str(SEED), "OMP_NUM_THREADS": "1"}
    began, clock = time.time(), time.monotonic()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment, stdout=log, stderr=log)
        with Memory(process.pid) as memory:
            process.wait()
    wall = time.monotonic() - clock
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    ends = sorted(p.stat().st_mtime for p in folder.glob(pattern))
    if len(ends) != len(students):
        sys.exit(f"{' '.join(command)} graded {len(ends)} of {len(students)} submissions")
    first = ends[min(abreast, len(ends) - 1) - 1]
    each = (began + wall - first) / max(1, len(ends) - min(abreast, len(ends) - 1))
    return Timed(len(ends), wall, each, memory.peak, scores(folder, students))


def scores(folder, students):
    """(student, cell) -> score, from a course's gradebook."""
    with Gradebook(f"sqlite:///{next(folder.rglob('gradebook.db'))}") as book:
        return {(s, g.name): g.auto_score for s in students for g in book.find_submission(LESSON, s).notebooks[0].grades}


class Memory:
    """The largest memory of a process and all that descend from it, in MiB; what they share is counted once."""

    def __init__(self, pid):
        self.pid, self.peak, self.over = pid, 0.0, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def watch(self):
        while not self.over.wait(0.5):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(self.pid)
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        total += share(process)
            self.peak = max(self.peak, total / 2**20)


def share(process):
    """The bytes of a process, shared ones divided among those that share them; of a child that may not be looked into, its own ones."""
    try:
        return process.memory_full_info().pss
    except psutil.AccessDenied:
        info = process.memory_info()
        return info.rss - info.shared


# --- the ways to grade -----------------------------------------------------------------------------------------------

def by_nbgrader(folder, submitted, students, plain):
    build.course(folder, build.sources([LESSON]))
    if plain:
        with open(folder / "nbgrader_config.py", "a") as file:
            file.write(PLAIN)
    for student in students:
        name = f"{student}/{LESSON}/{LESSON}.ipynb"
        files.write(folder / "submitted" / name, (submitted / name).read_bytes())
    return timed(["nbgrader", "autograde", LESSON], folder, f"autograded/*/{LESSON}/*.ipynb", students)


def by_class_run(folder, submitted, students, number):
    folder.mkdir()
    return timed(["autograder", "grade", str(submitted), "--out", "out", "--release", str(ROOT / "lessons"), "--seed", str(SEED),
                  "--timeout", str(TIMEOUT), "--workers", str(number)], folder, f"out/autograded/*/{LESSON}/*.ipynb", students, number)


# --- processor time --------------------------------------------------------------------------------------------------

@dataclass
class Spent:
    """CPU-seconds of one submission: bare cells, confined cells (warm parent and child), the worker without pictures, the pictures."""

    bare: float
    confined: float
    worker: float
    pictures: float

    @property
    def added(self):
        return self.confined + self.worker - self.bare


def spent(submitted, students):
    """([Spent, ...], CPU-seconds spent once a class): graded here, by the function that a worker runs.

    First without a clock, so that the pairs of mistakes that were made are there, which a class needs once, too.
    """
    release = grade.releases(ROOT / "lessons")[LESSON]
    began = sum(os.times()[:4])
    grade.prepare({LESSON: release}, SEED, many=True, jobs=os.cpu_count())
    once = sum(os.times()[:4]) - began
    warm.preload()      # so that the bare process, forked from this one, begins with what the warm parent's children begin with
    parent, draw, drawing = workers.parent(()), render.picture, Clock()
    render.picture = drawing.around(draw)
    parent.start()
    try:
        for student in students:
            one(release, submitted, student, parent, drawing)
        grade.forget()
        return [one(release, submitted, student, parent, drawing) for student in students], once
    finally:
        render.picture = draw
        parent.close()


class Clock:
    """Adds up the CPU-seconds of the calls of a function."""

    seconds = 0.0

    def around(self, function):
        def clocked(*arguments):
            began = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.process_time() - began
        return clocked


def one(release, submitted, student, parent, drawing):
    """Spent of one submission."""
    data, drawing.seconds = (submitted / student / LESSON / f"{LESSON}.ipynb").read_bytes(), 0.0
    warm, began = of_process(parent.process.pid), time.process_time()
    grade.grade_one(grade.Order(student, LESSON, "", data, release, "", SEED, TIMEOUT))
    worker, warm = time.process_time() - began - drawing.seconds, of_process(parent.process.pid) - warm
    return Spent(bare(release, data), warm, worker, drawing.seconds)


def of_process(pid):
    """CPU-seconds of a process and of those that it has waited for."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def bare(release, data):
    """CPU-seconds of a submission's cells, probes included, in a forked process with nothing around them."""
    from IPython.core.inputtransformer2 import TransformerManager

    module = sys.modules["autograder.check"]    # autograder.check itself is the function
    nb = intake.rebuild(release.notebook, *intake.parse(data)).notebook
    inputs = {t.id: judge.bank(t, SEED).inputs for t in release.tasks if not isinstance(t, str)}
    plain = TransformerManager().transform_cell
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            space = {"__name__": "__main__"}
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            module.outside = lambda exercise, probe, objects: probe(objects, inputs[exercise])
            for cell in nb.cells:
                if cell.cell_type == "code" and "show" not in cell.metadata.get("tags", []):
                    with contextlib.suppress(Exception):    # what an answer raises is part of what it costs
                        exec(compile(plain(cell.source), cell.id, "exec"), space)
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise RuntimeError("the bare process died")
    return used.ru_utime + used.ru_stime


# --- tables ----------------------------------------------------------------------------------------------------------

def compare(options):
    """Print the tables; returns the sentences of the figures that miss their goal."""
    ours, few = (20, options.stock or 4) if options.quick else (40, options.stock or 40)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place).resolve()
        students = _class.write(place / "submitted", ours)
        some = students[:min(few, ours)]
        ways = {"nbgrader": by_nbgrader(place / "plain", place / "submitted", some, plain=True),
                "nbgrader with our settings": by_nbgrader(place / "settings", place / "submitted", students, plain=False)}
        for number in (1, 2):
            ways[f"class run, {number} worker{'s' * (number > 1)}"] = by_class_run(place / f"run{number}", place / "submitted", students, number)
        costs, once = spent(place / "submitted", students)
    stock, misses = ways["nbgrader"], []
    print(f"{ours} submissions of {LESSON} in fast mode, {len(some)} of them by plain nbgrader; seconds for one, and how many times as fast\n")
    print(f"  {'':28s} {'without start-up':>22s} {'whole':>22s} {'start-up':>10s} {'peak':>10s}")
    for name, way in ways.items():
        steady, whole = stock.each / way.each, stock.whole(ours) / way.whole(ours)
        print(f"  {name:28s} {way.each:12.2f} s {steady:6.1f} x {way.whole(ours):12.2f} s {whole:6.1f} x {way.start:8.1f} s {way.peak:6.0f} MiB")
        other = sum(way.scores[k] != stock.scores[k] for k in stock.scores)
        if other:
            misses.append(f"{name}: {other} scores are not those of plain nbgrader")
        for goal, (least, least_whole) in GOALS.items():
            if name == goal or name == f"{goal}, 2 workers":
                misses += [f"{name}, without start-up: {steady:.1f} times as fast, under {least}"] * (steady < least)
                misses += [f"{name}, whole: {whole:.1f} times as fast, under {least_whole}"] * (least_whole is not None and whole < least_whole)
    parts = {k: fmean(getattr(c, k) for c in costs) for k in ("bare", "confined", "worker", "added", "pictures")}
    print(f"\nOnce a class: {once:.1f} CPU-seconds for references, misconceptions and slips.")
    print(f"CPU-seconds of a submission, mean of {len(costs)} (median of what is added: {median(c.added for c in costs):.3f})\n")
    print("  " + "".join(f"{k:>10s}" for k in parts) + "\n  " + "".join(f"{v:10.3f}" for v in parts.values()))
    return misses + [f"{parts['added']:.3f} CPU-seconds are added to a submission's own cells, over {ADDED}"] * (parts["added"] > ADDED)


def whole_class(number):
    """Grade a class end to end by the class run, with its own choice of workers, and print what it took."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place).resolve()
        students = _class.write(place / "submitted", number)
        (place / "run").mkdir()
        found = timed(["autograder", "grade", str(place / "submitted"), "--out", "out", "--release", str(ROOT / "lessons"), "--seed", str(SEED)],
                      place / "run", f"out/autograded/*/{LESSON}/*.ipynb", students, os.cpu_count())
    print(f"{number} submissions of {LESSON}: {found.wall:.0f} s, {found.number / found.wall:.2f} a second, {found.peak:.0f} MiB at the peak, "
          f"{os.cpu_count()} workers")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 submissions instead of 40, 4 of them by plain nbgrader")
    parser.add_argument("--check", action="store_true", help="exit 1 and name each figure that misses its goal")
    parser.add_argument("--stock", type=int, metavar="N", help="submissions that plain nbgrader grades")
    parser.add_argument("--class", type=int, metavar="N", dest="number", help="grade a class of that size end to end instead")
    options = parser.parse_args()
    files.tools_on_path()
    if options.number:
        return whole_class(options.number)
    misses = compare(options)
    print("\n" + ("\n".join(misses) if misses else "every figure meets its goal"))
    if options.check and misses:
        sys.exit(1)


if __name__ == "__main__":
    main()
