"""A session leads and believes little: whatever a child says or does, the others' cells and the judge's time are their own."""
import contextlib
import json
import os
import signal
import socket
import struct
import sysconfig
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from autograder import exercise, runner, wire


def notebook(**cells):
    """Cells by id; those that end with _check are checks."""
    nb = nbformat.v4.new_notebook()
    for name, source in cells.items():
        metadata = {"tags": ["check"], "nbgrader": {"grade_id": name}} if name.endswith("_check") else {}
        nb.cells.append(nbformat.v4.new_code_cell(source, id=name, metadata=metadata))
    return nb


def done(cell, **more):
    return {"done": cell, "late": False, "outputs": [], "error": None, **more}


@contextlib.contextmanager
def session(nb, answer, timeout=2, inputs=None):
    """A finished session with a child that calls answer(channel, order) for each order; yields its Run."""
    ours, theirs = socket.socketpair()

    def child():
        with theirs, contextlib.suppress(wire.Broken, OSError):
            while True:
                answer(theirs, wire.receive(theirs)[0])

    thread = threading.Thread(target=child)
    thread.start()
    result = runner.Run()
    with ours:
        runner.Session(nb, inputs or {}, timeout, ours, result).run()
    thread.join()
    yield result


def kinds(result):
    return {cell: event.kind for cell, event in result.events.items()}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.3)


def test_outputs_count_from_their_own_cell_once():
    nb = notebook(coupling="1", coupling_check="2", permute_check="3")

    def answer(channel, order):
        for value in (1.0, 2.0):
            for name in ("coupling", "permute", "act_norm", None, ["coupling"]):
                wire.send(channel, {"outputs": name}, {"a": np.array(value)})
        wire.send(channel, done("another cell"))
        wire.send(channel, {"ready": 1})
        wire.send(channel, done(order["cell"]))

    with session(nb, answer) as result:
        assert {e: a["a"].item() for e, a in result.arrays.items()} == {"coupling": 1.0, "permute": 1.0}
        assert set(kinds(result).values()) == {"ok"}


def test_outputs_sent_in_an_earlier_cell_do_not_count():
    def answer(channel, order):
        if order["cell"] == "coupling":
            wire.send(channel, {"outputs": "coupling"}, {"a": np.array(1.0)})
        wire.send(channel, done(order["cell"]))

    with session(notebook(coupling="1", coupling_check="2"), answer) as result:
        assert result.arrays == {} and set(kinds(result).values()) == {"ok"}


def test_inputs_go_to_their_check_only():
    seen = {}

    def answer(channel, order):
        seen[order["cell"]] = order["check"], set(inputs)
        wire.send(channel, done(order["cell"]))

    ours, theirs = socket.socketpair()
    inputs = {}
    real = wire.receive

    def child():
        with theirs, contextlib.suppress(wire.Broken, OSError):
            while True:
                order, arrays = real(theirs)
                inputs.clear(), inputs.update(arrays)
                answer(theirs, order)

    thread = threading.Thread(target=child)
    thread.start()
    with ours:
        runner.Session(notebook(coupling="1", coupling_check="2"), {"coupling": {"x": np.zeros(2)}}, 2, ours, runner.Run()).run()
    thread.join()
    assert seen == {"coupling": (None, set()), "coupling_check": ("coupling", {"x"})}


@pytest.mark.parametrize("say, kind, later", (
    (lambda channel: channel.close(), "killed", "killed"),
    (lambda channel: channel.sendall(b"\xff" * 100), "killed", "killed"),
    (lambda channel: [wire.send(channel, {"again": i}) for i in range(runner.FRAMES + 1)], "killed", "killed"),
    (lambda channel: channel.sendall(struct.pack("!II", 1000, 0)), "timeout", "killed"),
    (lambda channel: None, "timeout", "killed"),
    (lambda channel: wire.send(channel, done("a", outputs=[{"output_type": "x"}])), "error", "ok"),
    (lambda channel: wire.send(channel, {"done": "a"}), "error", "ok"),
    (lambda channel: wire.send(channel, done("a", outputs=5)), "error", "ok"),
    (lambda channel: wire.send(channel, done("a", error=5)), "error", "ok"),
    (lambda channel: wire.send(channel, done("a", late=True)), "timeout", "ok"),
    (lambda channel: wire.send(channel, done("a", error=["RuntimeError", "DefaultCPUAllocator: can't allocate memory"])), "error", "ok"),
))
def test_what_a_child_may_do_in_a_cell(say, kind, later):
    def answer(channel, order):
        say(channel) if order["cell"] == "a" else wire.send(channel, done(order["cell"]))

    with session(notebook(a="1", b="2"), answer, timeout=0.3) as result:
        assert kinds(result) == {"a": kind, "b": later}


def test_torchs_words_for_too_little_memory():
    def answer(channel, order):
        wire.send(channel, done("a", error=["RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"]))

    with session(notebook(a="1"), answer) as result:
        assert result.events["a"].text.startswith("MemoryError: ")


def test_outputs_that_cannot_be_read_are_said():
    def answer(channel, order):
        channel.sendall(b"\xff" * 8)

    with session(notebook(coupling_check="1"), answer) as result:
        assert "could not be read" in result.unusable["coupling"]


def test_a_cell_too_long_for_the_channel_costs_only_itself():
    with session(notebook(a="#" * (wire.HEAD + 1), b="2"), lambda channel, order: wire.send(channel, done(order["cell"]))) as result:
        assert kinds(result) == {"a": "error", "b": "ok"}


def test_when_the_time_is_over_it_is_over():
    """And not a little more for each of a hundred thousand cells."""
    def answer(channel, order):
        time.sleep(0.3)
        wire.send(channel, done(order["cell"], late=True))

    nb = notebook(**{f"c{i}": "while True: pass" for i in range(1000)})
    start = time.monotonic()
    with session(nb, answer, timeout=0.3) as result:
        assert time.monotonic() - start < 10 and set(kinds(result).values()) == {"timeout"} and len(result.events) == 1000
    assert "left no time" in result.events["c999"].text


def test_outputs_of_a_notebook_are_bounded(monkeypatch):
    monkeypatch.setattr(runner, "KEPT", 5000)
    flood = [{"output_type": "stream", "name": "stdout", "text": "x" * 1000}] * 1000

    nb = notebook(a="1", b="2")
    with session(nb, lambda channel, order: wire.send(channel, done(order["cell"], outputs=flood[:3] if order["cell"] == "a" else flood))) as result:
        assert set(kinds(result).values()) == {"ok"}
    assert len(nb.cells[0].outputs) == 3 and len(nb.cells[1].outputs) == 1 and "no more outputs" in nb.cells[1].outputs[0].text


def test_only_texts_and_real_pictures_are_kept():
    bad, png = '"><script>', "iVBORw0KGgoAAAANSUhEUg=="
    nb = notebook(a="1")
    nb.cells[0].outputs = [nbformat.from_dict(o) for o in (
        {"output_type": "display_data", "metadata": {"x": bad}, "data": {"text/html": bad, "image/svg+xml": bad}},
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": bad, "image/png": bad, "text/plain": "\x1b[31mred\x1b[0m"}},
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": png}},
        {"output_type": "stream", "name": "stdout", "text": "\x1b]8;;http://x\x07link\x1b]8;;\x07\x00\x9b2J\tend\n"})]
    runner.clean(nb, None)
    assert [o.get("data", o.get("text")) for o in nb.cells[0].outputs] == [{"text/plain": "red"}, {"image/png": png}, "link2J\tend\n"]
    assert nb.cells[0].outputs[0].metadata == {}


# --- what may be read ------------------------------------------------------------------------------------------------

def readable_files(root, read):
    read = {Path(p) for p in read}
    return {p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and read & {p, *p.parents}}


@pytest.mark.parametrize("lesson", exercise.lessons())
def test_no_answer_is_among_what_may_be_read(lesson):
    """Of the course's folder: nothing of the judge's, of solutions, tests and other students, and none of the lesson's references."""
    references = exercise.lessons()[lesson].REFERENCES
    read, listed = runner.readable((*references, "autograder.judge"))
    assert str(runner.ROOT) in listed and str(runner.ROOT / "data" / "tables") in read and str(runner.ROOT / "flowkit" / "toys.py") in read
    assert not {str(p) for p in (runner.ROOT, *runner.ROOT.parents)} & set(read)
    found = {p.relative_to(runner.ROOT) for folder in ("autograder", "flowkit", "data", "solutions", "lessons", "tests") for p in readable_files(runner.ROOT / folder, read)}
    hidden = {Path(f"{name.replace('.', '/')}.py") for name in references}
    assert not hidden & found and {p.parts[:2] for p in found if p.parts[0] == "flowkit"}.isdisjoint({("flowkit", "__pycache__")})
    assert {p.parts[0] for p in found} == {"autograder", "flowkit", "data"}
    assert {p.parts[1] for p in found if p.parts[0] == "autograder"} <= set(runner.STUDENTS_SIDE)
    assert not [p for p in found if "sample_class" in str(p) or p.suffix == ".pyc" and "probes" not in p.parts and "widgets" not in p.parts]


def test_other_peoples_flows_are_hidden():
    packages = Path(sysconfig.get_paths()["purelib"]).resolve()
    there = [name for name in runner.RIVALS if (packages / name).exists()]
    assert there, "the tests' own environment has them"
    read, _ = runner.readable(())
    assert str(packages) not in read and not [name for name in there if str(packages / name) in read]
    assert str(packages / "numpy") in read


def test_around(tmp_path):
    for name in ("lib/a/x.py", "lib/flowkit/x.py", "lib/b.py", "bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "lib64").symlink_to("lib")
    (tmp_path / "lib" / "loop").symlink_to(tmp_path)
    read, listed = set(), set()
    runner.around(tmp_path, {tmp_path / "lib" / "flowkit", tmp_path.parent}, read, listed)
    assert {p.relative_to(tmp_path).as_posix() for p in read} == {"lib/a", "lib/b.py", "bin"}
    assert listed == {tmp_path, tmp_path / "lib"}


def test_a_mount_point_holds_nothing_that_is_needed(monkeypatch):
    for root in runner.PLACES[:2]:
        monkeypatch.setattr(runner, "ROOT", Path(root) / "course")
        assert runner.mount_point() not in (None, root)
    monkeypatch.setattr(runner, "PLACES", ("/",))
    assert runner.mount_point() is None


# --- with a warm parent ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parent():
    parent = runner.Parent()
    yield parent
    parent.close()


def test_nothing_of_a_run_stays(parent, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    nb = notebook(a="import os, subprocess\nopen('mine', 'w').write('x')\nsubprocess.Popen(['/bin/sleep', '71828'], start_new_session=True)\nprint(os.getcwd(), os.listdir())")
    nb.cells.append(nbformat.v4.new_code_cell("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", id="b"))
    before = mounts()
    result = runner.run(nb, {}, 0, timeout=30, parent=parent)
    assert kinds(result) == {"a": "ok", "b": "ok"}
    assert nb.cells[0].outputs[0].text.startswith(". ['mine'") or "'mine'" in nb.cells[0].outputs[0].text
    assert list(tmp_path.iterdir()) == [] and mounts() == before and not sleeping("71828")
    children = Path(f"/proc/{parent.process.pid}/task/{parent.process.pid}/children").read_text()
    assert children == "", "the warm parent has no child left"


def mounts():
    return Path("/proc/self/mountinfo").read_text()


def sleeping(seconds):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if seconds.encode() in path.read_bytes().split(b"\0") else []
    return found


@pytest.mark.parametrize("when", ("before", "between"))
def test_a_lost_parent_costs_nothing(parent, when, monkeypatch):
    """As when memory runs out: the order is begun again with a new one."""
    real, begun = runner.Session.one, []

    def one(self, cell):
        begun.append(cell.id)
        if when == "between" and begun == ["a", "b"]:
            os.kill(parent.process.pid, signal.SIGKILL)
        return real(self, cell)

    monkeypatch.setattr(runner.Session, "one", one)
    nb = notebook(a="x = 1", b="x + 1")
    if when == "before":
        assert kinds(runner.run(nb, {}, 0, timeout=30, parent=parent)) == {"a": "ok", "b": "ok"}
        os.kill(parent.process.pid, signal.SIGKILL)
    result = runner.run(nb, {}, 0, timeout=30, parent=parent)
    assert kinds(result) == {"a": "ok", "b": "ok"} and nb.cells[1].outputs[0].text.endswith(" 2\n")
    assert begun == ["a", "b"] * 2


def test_a_parent_that_is_lost_each_time_is_said(parent, monkeypatch):
    def run(self):
        os.kill(parent.process.pid, signal.SIGKILL)
    monkeypatch.setattr(runner.Session, "run", run)
    with pytest.raises(runner.RunnerError):
        runner.run(notebook(a="1"), {}, 0, timeout=30, parent=parent)


def test_what_fails_to_be_confined_does_not_run(parent, monkeypatch):
    """Without a scratch folder there is no mount, and without that no student's code."""
    monkeypatch.setattr(runner, "mount_point", lambda: "/nowhere")
    with pytest.raises(runner.RunnerError, match="could not be confined"):
        runner.run(notebook(a="1"), {}, 0, timeout=30, parent=parent)


@pytest.mark.parametrize("scrubbed", (True, False))
def test_places_of_this_machine_are_scrubbed(parent, scrubbed, monkeypatch):
    if not scrubbed:    # then they are there to be seen
        monkeypatch.setattr(runner, "scrub", lambda text, scratch=None: text)
    nb = notebook(a="import autograder\nprint(autograder.__file__)\nautograder.__path__", b="import autograder\nraise ValueError(autograder.__file__)")
    result = runner.run(nb, {}, 0, timeout=30, parent=parent)
    said = json.dumps([c.outputs for c in nb.cells]) + result.events["b"].text
    assert (str(runner.ROOT) in said) != scrubbed and (not scrubbed or "course/autograder" in said)


def test_modules_that_hold_answers_are_refused(parent):
    nb = notebook(a="import flowkit.coupling", b="from flowkit import Coupling", c="import sys\nsys.meta_path.pop(0)\nimport autograder.judge", d="import flowkit.toys")
    result = runner.run(nb, {}, 0, ("flowkit.coupling", "autograder.judge"), 30, parent)
    assert kinds(result) == {"a": "error", "b": "error", "c": "error", "d": "ok"}
    assert "cannot be used in a graded answer" in result.events["a"].text and "PermissionError" in result.events["c"].text


@pytest.mark.parametrize("without, cell", (
    (("landlock",), "import sys\nsys.meta_path.pop(0)\nimport autograder.judge"), ((), "import flowkit.linear"),
))
def test_the_reference_is_won_without_what_guards_it(without, cell):
    """Without Landlock by who removes the finder, and by anybody where the lesson does not name the module."""
    loose = runner.Parent(without)
    try:
        result = runner.run(notebook(a=cell), {}, 0, ("autograder.judge",), 30, loose)
    finally:
        loose.close()
    assert kinds(result) == {"a": "ok"}, json.dumps(result.events["a"].text)
