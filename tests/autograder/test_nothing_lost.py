"""Whatever ends a run, and whenever: no result is lost, the next run goes on, and no process stays."""
import contextlib
import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from autograder import build, grade, gradebook, runner, workers
from autograder.bar import Progress, rounded

from stand_in import unsolved

HERE = Path(__file__).parent
LESSON = "02_coupling"
CLASS = build.ROOT / "data" / "sample_class"
KILLS, OF_REAL_RUNS = 200, 12


def killing(state, *arguments):
    state.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(state)}
    run = subprocess.run([sys.executable, HERE / "killing.py", state, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    return json.loads(run.stdout), [p.cmdline() for p in psutil.process_iter() if place_of(p) == str(state)]


def place_of(process):
    try:
        return process.environ().get("TMPDIR")
    except psutil.Error:
        return None


@pytest.mark.slow
def test_killed_at_200_random_moments(tmp_path):
    """Most of them in runs in which only the grading of one submission is replaced, by something quick."""
    said, left = killing(tmp_path / "quick", KILLS - OF_REAL_RUNS, 20240501)
    assert said["faults"] == [] and said["crashed"] == "" and left == []
    hit = [said["killed"].get(phase, 0) for phase in ("working", "notebook", "feedback", "log", "gradebook", "table", "report")]
    assert min(hit) >= 2 and said["killed"]["grader"] >= 100 and said["killed"]["worker"] >= 5
    real, left = killing(tmp_path / "real", OF_REAL_RUNS, 7, "real")
    assert real["faults"] == [] and real["crashed"] == "" and left == []
    assert all(real["killed"][role] >= 2 for role in ("grader", "worker", "warm parent", "child"))
    counted = sum(run["killed"].get(role, 0) for run in (said, real) for role in ("grader", "worker", "warm parent", "child"))
    assert counted == said["kills"] + real["kills"] >= KILLS


def test_a_process_that_dies_in_an_exercise_that_was_not_answered_changes_nothing(monkeypatch):
    (source,) = build.sources([LESSON])
    release = grade.releases(build.ROOT / "lessons")[LESSON]
    handed_in = nbformat.from_dict(release.notebook)
    (answer,) = (c.source for c in build.solved(source).cells if c.id == "permute")
    next(c for c in handed_in.cells if c.id == "permute").source = answer + "\n"
    order = grade.Order("ann", LESSON, f"{LESSON}.ipynb", nbformat.writes(handed_in).encode(), release, "key", 1, 60)
    one = runner.Session.one
    with contextlib.closing(workers.parent(())) as parent:
        undisturbed = grade.grade_one(order)

        def dying(session, cell):
            if cell.id == "train_flow_check":
                for process in psutil.Process(parent.process.pid).children(recursive=True):
                    process.kill()
            return one(session, cell)

        monkeypatch.setattr(runner.Session, "one", dying)
        got = grade.grade_one(order)
    assert got.result.verdicts == undisturbed.result.verdicts and [v.exercise for v in got.result.verdicts if v.score] == ["permute"]
    assert (got.notebook, got.feedback) == (undisturbed.notebook, undisturbed.feedback)


# --- interrupts ------------------------------------------------------------------------------------------------------

ENDLESS = "while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass"


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_while_students_cells_run(tmp_path, name):

    release = nbformat.read(build.ROOT / "lessons" / f"{LESSON}.ipynb", as_version=4)
    next(c for c in release.cells if c.id == "permute").source = ENDLESS
    for student in ("ann", "bob", "cid"):
        (tmp_path / "class" / student / LESSON).mkdir(parents=True)
        nbformat.write(release, tmp_path / "class" / student / LESSON / f"{LESSON}.ipynb")
    environment = {**os.environ, "PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-m", "autograder", "grade", tmp_path / "class", "--out", tmp_path / "out", "--release",
                            build.ROOT / "lessons", "--workers", "2"], env=environment, stderr=subprocess.PIPE, text=True)
    busy, end = [], time.monotonic() + 60
    while len(busy) < 2 and time.monotonic() < end:
        time.sleep(0.2)
        assert run.poll() is None
        with contextlib.suppress(psutil.NoSuchProcess):
            forks = [p for p in psutil.Process(run.pid).children(recursive=True) if "autograder.warm" in p.cmdline()]
            busy = [p for p in forks if p.ppid() in {q.pid for q in forks} and p.cpu_times().user > 0.5]     # below a warm parent: an endless cell
    assert len(busy) == 2
    below = psutil.Process(run.pid).children(recursive=True)
    begin = time.monotonic()
    run.send_signal(name)
    assert psutil.wait_procs(below, timeout=5)[1] == [], "the students' cells end at once"
    _, said = run.communicate(timeout=60)
    print(f"{time.monotonic() - begin:.1f} s")     # gradebook and report included
    assert run.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    assert (tmp_path / "out" / "grades.csv").exists()


def test_a_second_interrupt_ends_it_at_once(tmp_path, monkeypatch):
    def slow(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    append = grade.Log.append

    def interrupted(log, result):
        append(log, result)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(grade, "grade_one", unsolved)
    monkeypatch.setattr(grade.Log, "append", interrupted)
    monkeypatch.setattr(gradebook, "write", slow)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            grade.grade(CLASS, tmp_path / "out", build.ROOT / "lessons", jobs=1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130 and time.monotonic() - begin < 20
    monkeypatch.undo()
    monkeypatch.setattr(grade, "grade_one", unsolved)
    first = (tmp_path / "out" / ".grading" / "results.jsonl").read_text("utf-8").splitlines()
    grade.grade(CLASS, tmp_path / "out", build.ROOT / "lessons", jobs=1)
    assert len(first) == 1 and (tmp_path / "out" / ".grading" / "results.jsonl").read_text("utf-8").splitlines()[:1] == first


# --- disks and files -------------------------------------------------------------------------------------------------

def main(out, capsys, *more):
    from autograder.__main__ import main
    code = main(["grade", str(CLASS), "--out", str(out), "--release", str(build.ROOT / "lessons"), "--workers", "1", *more])
    return code, capsys.readouterr().err


def test_a_full_disk_gets_a_sentence_and_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "grade_one", unsolved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limits[1]))    # bytes of a file: the log is cut off in the middle of a line
    try:
        code, said = main(tmp_path / "out", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "What was graded is kept" in said and "Traceback" not in said
    log = tmp_path / "out" / ".grading" / "results.jsonl"
    before = log.read_bytes()
    whole = before[:before.rfind(b"\n") + 1]
    assert 0 < len(whole) < len(before), "the line that did not fit is there in part"
    assert main(tmp_path / "out", capsys)[0] == 0
    assert log.read_bytes().startswith(whole)
    assert [json.loads(line)["student"] for line in log.read_text("utf-8").splitlines()].count(json.loads(whole.splitlines()[0])["student"]) == 1


def test_a_folder_that_cannot_be_written_gets_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    code, said = main(tmp_path / "file" / "out", capsys)
    assert code == 1 and os.strerror(errno.ENOTDIR) in said and "Traceback" not in said


def test_a_damaged_line_of_the_log_is_graded_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "grade_one", unsolved)
    assert main(tmp_path / "out", capsys)[0] == 0
    table = (tmp_path / "out" / "grades.csv").read_bytes()
    log = tmp_path / "out" / ".grading" / "results.jsonl"
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([b"\0" * len(lines[0]), lines[1], b'{"student": "x"}', *lines[3:]]) + b"\n")
    code, said = main(tmp_path / "out", capsys)
    assert code == 0 and "2 lines of" in said and (tmp_path / "out" / "grades.csv").read_bytes() == table


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    with grade.alone(tmp_path / "out"):
        program = f"import sys; from autograder.__main__ import main; sys.exit(main(['grade', {str(CLASS)!r}, '--out', {str(tmp_path / 'out')!r}, '--release', {str(build.ROOT / 'lessons')!r}]))"
        run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(build.ROOT)}, capture_output=True, text=True)
    assert run.returncode == 1 and "another run is grading into" in run.stderr


def test_what_a_killed_run_had_not_moved_is_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "grade_one", unsolved)
    assert main(tmp_path / "out", capsys)[0] == 0
    before = {p for p in (tmp_path / "out").rglob("*")}
    for place in ("feedback/ada/02_coupling/.02_coupling.html.abcd1234", ".report.html.abcd_234"):
        (tmp_path / "out" / place).write_text("half")
    assert main(tmp_path / "out", capsys)[0] == 0
    assert {p for p in (tmp_path / "out").rglob("*")} == before


# --- workers, and the time left --------------------------------------------------------------------------------------

def dies(order):
    os._exit(1)


def sent_in_part(order):
    """Ends while it sends its result, the first time; the lock of the pipe goes with it."""
    if not order.exists():
        order.touch()
        queue = multiprocessing.process.current_process()._args[1]
        queue._wlock.acquire()
        os.write(queue._writer.fileno(), b"\0\0\1\0half")
        os.kill(os.getpid(), signal.SIGKILL)
    return "whole"


def test_a_worker_that_is_killed_while_it_sends_its_result(tmp_path):
    with workers.Here(2) as pool:
        assert [value for _, value in pool.run(sent_in_part, [tmp_path / "a"])] == ["whole"]


def square(order):
    return order ** 2


def test_a_worker_that_ends_between_two_orders_is_replaced():
    def orders():
        yield 1
        for process in list(pool.pool._processes.values()):
            process.kill()
        time.sleep(0.3)
        yield from (2, 3)

    with workers.Here(2) as pool:
        assert {order: value for order, value in pool.run(square, orders())} == {1: 1, 2: 4, 3: 9}
    with workers.Here(2) as pool:
        assert [type(e) for _, e in pool.run(dies, [1])] == [workers.Lost]


def test_the_time_left():
    now, said = [0.0], []
    progress = Progress(101, "x", "y", clock=lambda: now[0], file=io.StringIO())
    for i in range(100):
        now[0] = 20.0 + i   # 20 seconds of start-up do not count
        progress.done()
        said.append(progress.left())
    progress.close()
    assert said[:4] == [None] * 4 and said[4:] == pytest.approx([101 - i for i in range(5, 101)])
    assert [rounded(s) for s in (1, 12, 44, 70, 1800, 7800)] == ["5 s", "10 s", "45 s", "1 min", "30 min", "2 h 10 min"]
