"""The same class on Dask workers, of which one is killed in the middle: the same grades. Workers that cannot or may not grade are refused."""
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import nbformat
import psutil
import pytest

distributed = pytest.importorskip("distributed")

from autograder import build, files, grade, workers  # noqa: E402

LESSON = "02_coupling"
CLASS = build.ROOT / "data" / "sample_class"
MANY, REAL = int(os.environ.get("MANY", 1000)), 30

cloudpickle.register_pickle_by_value(sys.modules[__name__])     # the workers have no tests
pytestmark = pytest.mark.slow


def stand_in(order):
    """Quick, and the same everywhere: points from the submission's own bytes."""
    share = sum(order.data[-200:]) % 5 / 4
    verdicts = []
    for task in order.release.tasks:
        verdict = order.release.blank(task, "manual" if isinstance(task, str) else "ok" if share == 1 else "wrong")
        verdict.score = 0.0 if isinstance(task, str) else share * verdict.points
        verdicts.append(verdict)
    assert order.without == ()
    time.sleep(0.01)
    return grade.Graded(grade.Result(order.student, order.assignment, order.key, order.timeout, verdicts), nbformat.writes(nbformat.v4.new_notebook()), "<p>nothing</p>")


def rows(out):
    with open(out / "grades.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Dask:
    """A scheduler and workers on this machine, as on a cluster: processes of their own, which a nanny starts again."""

    def __init__(self, folder, number=3):
        self.environment = {**os.environ, "PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "0"}
        self.folder, self.log = folder, open(folder / "dask.log", "w")
        contact = folder / "scheduler.json"
        self.processes = [self.start("dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(contact))]
        self.contact = contact
        for _ in range(number):
            self.add()
        end = time.monotonic() + 60
        while not contact.exists() and time.monotonic() < end:
            time.sleep(0.1)
        import json
        self.address = json.loads(contact.read_text())["address"]
        with distributed.Client(self.address, set_as_default=False) as client:
            if number:
                client.wait_for_workers(number, timeout=120)

    def start(self, *command):
        return subprocess.Popen([sys.executable, "-m", *command], env=self.environment, cwd=self.folder, stdout=self.log, stderr=self.log)

    def add(self, root=None):
        worker = ("dask", "worker", "--scheduler-file", str(self.contact), "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder))
        before, self.environment["PYTHONPATH"] = self.environment["PYTHONPATH"], str(root or self.environment["PYTHONPATH"])
        self.processes.append(self.start(*worker))
        self.environment["PYTHONPATH"] = before

    def a_worker(self):
        """The process below a nanny."""
        return next(c for p in self.processes[1:] for c in psutil.Process(p.pid).children() if "spawn_main" in " ".join(c.cmdline()))

    def close(self):
        below = [c for p in self.processes for c in psutil.Process(p.pid).children(recursive=True)]
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(20)
        assert psutil.wait_procs(below, timeout=20)[1] == [], "no process stays"
        self.log.close()


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    cluster = Dask(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.close()


def hand_in(place, number):
    """`number` submissions of three kinds: `permute` solved in the lesson's way, wrongly, and not at all."""
    (source,) = build.sources([LESSON])
    solved = build.solved(source)
    release = build.release(solved)
    right = next(c.source for c in solved.cells if c.id == "permute")
    cell = next(c for c in release.cells if c.id == "permute")
    stub = cell.source
    for i in range(number):
        cell.source = (right, "permute = lambda *a: None", stub)[i % 3] + f"\n# {i}"
        files.write(place / f"s{i:04}" / LESSON / f"{LESSON}.ipynb", nbformat.writes(release))
    return place


def kill_in_the_middle(monkeypatch, dask, count):
    """Kill a worker when `count` results are there; what is below it must go too."""
    append, seen = grade.Log.append, []

    def counted(log, result):
        append(log, result)
        seen.append(result.student)
        if len(seen) == count:
            worker = dask.a_worker()
            below = worker.children(recursive=True)
            worker.kill()
            assert psutil.wait_procs(below, timeout=10)[1] == []
            seen.append(len(below))

    monkeypatch.setattr(grade.Log, "append", counted)
    return seen


def test_a_thousand_submissions_and_a_worker_killed(tmp_path, monkeypatch, dask):
    place = hand_in(tmp_path / "class", MANY)
    monkeypatch.setattr(grade, "grade_one", stand_in)
    grade.grade(place, tmp_path / "here", build.ROOT / "lessons", seed=3, jobs=2)
    seen = kill_in_the_middle(monkeypatch, dask, MANY // 2)
    grade.grade(place, tmp_path / "there", build.ROOT / "lessons", seed=3, cluster=dask.address)
    assert rows(tmp_path / "there") == rows(tmp_path / "here") and len({r["student"] for r in rows(tmp_path / "there")}) == MANY
    assert len([s for s in seen if isinstance(s, str)]) == MANY, "each was graded, and counted once"


def test_students_code_is_graded_the_same(tmp_path, monkeypatch, dask):
    place = hand_in(tmp_path / "class", REAL)
    grade.grade(place, tmp_path / "here", build.ROOT / "lessons", seed=3, jobs=2)
    seen = kill_in_the_middle(monkeypatch, dask, REAL // 2)
    grade.grade(place, tmp_path / "there", build.ROOT / "lessons", seed=3, cluster=dask.address)
    assert rows(tmp_path / "there") == rows(tmp_path / "here")
    assert {r["status"] for r in rows(tmp_path / "there")} == {"ok", "error", "unsolved"}
    assert next(n for n in seen if isinstance(n, int)) >= 1, "the worker had a warm parent, and students' code ran below that"


def test_a_worker_with_other_files_is_refused(tmp_path, dask):
    """Also when it comes late, in the middle of a run."""
    with pytest.raises(workers.Unusable, match="has another version of the course"), workers.Cluster(dask.address, "0123") as pool:
        list(pool.run(stand_in, []))
    release = grade.releases(build.ROOT / "lessons")[LESSON]
    with workers.Cluster(dask.address, "0123") as pool:
        pool._ask_workers = lambda: None
        with pytest.raises(workers.Unusable, match="a worker has another version of the course"):
            list(pool.run(stand_in, [grade.Order("ann", LESSON, "x", b"", release, "key", 1, 5)]))


def test_no_scheduler_and_no_workers_get_a_sentence(tmp_path, monkeypatch, capsys):
    from autograder.__main__ import main
    monkeypatch.setattr(workers, "PATIENCE", 2)
    arguments = ["grade", str(CLASS), "--out", str(tmp_path / "out"), "--release", str(build.ROOT / "lessons"), "--cluster"]
    assert main([*arguments, "tcp://127.0.0.1:9"]) == 1
    assert "no scheduler answers there" in capsys.readouterr().err
    place = tmp_path / "empty"
    place.mkdir()
    empty = Dask(place, 0)
    try:
        assert main([*arguments, empty.address]) == 1
        assert "no workers yet" in capsys.readouterr().err
    finally:
        empty.close()


def test_what_a_machine_lacks_is_asked_there(monkeypatch):
    monkeypatch.setattr(workers, "lacking", lambda: {"landlock": "this kernel has no Landlock"})
    assert "cannot confine students' code (landlock: this kernel has no Landlock)" in workers.fault(grade.version(), False)
    assert workers.fault(grade.version(), True) == ""


def test_a_scheduler_that_goes_away_loses_nothing(tmp_path, monkeypatch):
    place = tmp_path / "dask"
    place.mkdir()
    cluster, append = Dask(place, 1), grade.Log.append

    def counted(log, result):
        append(log, result)
        if len(log.results) == 2:
            cluster.processes[0].kill()

    monkeypatch.setattr(grade, "grade_one", stand_in)
    monkeypatch.setattr(grade.Log, "append", counted)
    try:
        with pytest.raises(workers.Unusable, match="the scheduler is gone"):
            grade.grade(CLASS, tmp_path / "out", build.ROOT / "lessons", cluster=cluster.address)
    finally:
        cluster.close()
    graded = (tmp_path / "out" / ".grading" / "results.jsonl").read_bytes()
    assert graded.count(b"\n") >= 2
    monkeypatch.setattr(grade.Log, "append", append)
    grade.grade(CLASS, tmp_path / "out", build.ROOT / "lessons", jobs=1)
    assert (tmp_path / "out" / ".grading" / "results.jsonl").read_bytes().startswith(graded)
