"""What check, hint, progress and show do around a verdict: the score, captured output, the saved progress, placeholders."""
import json
import math
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch

import autograder
from autograder import exercise, memory, warm, wire
from autograder.check import Score, captured, check, hint, progress
from autograder.exercises.lesson02 import PlainCoupling, PlainPermute


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course folder of one's own, outside of any grading run."""
    (tmp_path / "lessons").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("FLOWKIT_FAST", "AUTOGRADER_CHANNEL", "NBGRADER_EXECUTION", "AUTOGRADER_SEED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_names_are_functions():
    assert callable(autograder.check) and callable(autograder.hint) and callable(autograder.progress) and callable(autograder.show)


@pytest.mark.parametrize("value, expected", [(3.5, 3.5), (-1, 0.0), (99, 10.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_score_is_a_finite_float_within_its_points(value, expected):
    score = Score(value, 10.0)
    assert isinstance(score, float) and score == expected and repr(score) == repr(float(expected))
    assert float(repr(score)) == expected  # nbgrader reads the text


def test_the_value_of_a_check_is_its_score(course, capsys):
    assert check("permute", PlainPermute) == 5.0
    out = capsys.readouterr().out
    assert "permute: solved · 5 of 5 points" in out and "✓ z = x[:, order]" in out
    wrong = type("Wrong", (PlainPermute,), {"inverse": lambda self, z: z[:, self.order]})
    assert check("permute", wrong) == 3.0
    assert "applies the same order once more" in capsys.readouterr().out


def test_an_unknown_exercise_raises_with_the_nearest_name(course):
    with pytest.raises(ValueError, match="there is no exercise 'copling'; did you mean 'coupling'"):
        check("copling", PlainCoupling)
    with pytest.raises(TypeError, match="needs your answer"):
        check("coupling")


def test_a_fault_of_the_checker_itself_raises(course, monkeypatch):
    broken = exercise.Case("broken", 1, lambda i, o, r: 1 / 0)
    monkeypatch.setitem(exercise.registry(), "permute", exercise.Exercise(**{**vars(exercise.get("permute")), "cases": (broken,)}))
    with pytest.raises(ZeroDivisionError):
        check("permute", PlainPermute)


class Loud(PlainPermute):
    def forward(self, x):
        print("from print")
        print("from stderr", file=sys.stderr)
        os.write(1, b"from fd 1\n"), os.write(2, b"from fd 2\n")
        warnings.warn("a warning")
        return super().forward(x)


def test_what_an_answer_prints_is_captured_and_shown(course, capfd):
    assert check("permute", Loud) == 5.0
    out, err = capfd.readouterr()
    assert err == ""
    for text in ("from print", "from stderr", "from fd 1", "from fd 2", "your code printed"):
        assert text in out


def test_output_is_restored_after_an_exception(capfd):
    with pytest.raises(KeyError):
        with captured() as printed:
            os.write(2, b"inside")
            raise KeyError
    os.write(2, b"outside")
    assert printed == ["inside"] and capfd.readouterr().err == "outside"


def test_a_flood_is_cut():
    with captured() as printed:
        print("x" * 1_000_000)
    assert len(printed[0]) < 5100 and "in all" in printed[0]


def test_hints_come_one_after_the_other(course):
    first, both = str(hint("coupling").text), str(hint("coupling").text)
    assert first.startswith("Hint 1 of 2") and "Hint 2" not in first and "Hint 2 of 2" in both
    assert hint("coupling").text == both
    assert "<code>x.chunk(2, dim=-1)</code>" in hint("coupling")._repr_html_()


def test_progress_is_kept_in_the_lessons_folder(course, capsys):
    check("permute", PlainPermute)
    saved = json.loads((course / "lessons" / ".progress.json").read_text())
    assert saved["permute"] == {"points": 5.0, "score": 5.0}
    check("permute", type("Wrong", (PlainPermute,), {"inverse": lambda self, z: z}))
    assert json.loads((course / "lessons" / ".progress.json").read_text())["permute"]["score"] == 5.0, "the best score is kept"
    text = progress().text
    assert "02_coupling: 5 of 69 points" in text and "✓ permute  5/5" in text and "· coupling  0/10" in text
    assert not list((course / "lessons").glob(".progress.json?*")), "no half-written file is left"


def test_progress_is_not_written_while_grading(course, monkeypatch):
    for name, value in (("NBGRADER_EXECUTION", "autograde"), ("FLOWKIT_FAST", "1")):
        monkeypatch.setenv(name, value)
        check("permute", PlainPermute)
        assert not (course / "lessons" / ".progress.json").exists()
        monkeypatch.delenv(name)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', "\x00\xff"])
def test_a_damaged_progress_file_is_put_aside(course, capsys, content):
    file = course / "lessons" / ".progress.json"
    file.write_bytes(content.encode("latin-1"))
    assert memory.load() == {} and "put aside" in capsys.readouterr().out
    assert (course / "lessons" / ".progress.json.damaged").exists() and not file.exists()


def test_a_folder_that_cannot_be_written_is_said_and_costs_nothing(course, capsys, monkeypatch):
    def refuse(*a, **k):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(memory.files, "write", refuse)
    assert check("permute", PlainPermute) == 5.0
    assert "could not be saved" in capsys.readouterr().out


def test_in_a_class_run_outputs_are_sent_and_nothing_is_decided(course, monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(sys.modules["autograder.check"], "outside", warm.Outside(theirs, "permute", exercise.get("permute").draw(5)))
        assert check("permute", PlainPermute) == 0.0
        head, arrays = wire.receive(ours)
        assert head == {"outputs": "permute"} and "forward.z" in arrays
        assert check("permute", PlainPermute) == check("coupling", PlainCoupling) == 0.0
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):    # once, and for the exercise whose cell it is
            ours.recv(1)


def test_the_probes_need_neither_the_judge_nor_a_reference():
    """A grading kernel can run every probe without importing flowkit, the exercises or the judge."""
    code = ("import sys, autograder; from autograder import probes; probes.table();"
            "bad = [m for m in sys.modules if m.startswith(('flowkit', 'autograder.exercises', 'autograder.judge', 'autograder.laws', 'matplotlib'))]; assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lesson_modules_load_no_reference():
    """What a lesson's setup cell imports pulls in no layer that holds an answer."""
    from autograder.exercises.lesson02 import REFERENCES

    code = ("import sys; from autograder import check, hint, progress, show; from flowkit import live, plotting, settings, toys; "
            f"from flowkit.core import Compose, Flow, StandardNormal; bad = [m for m in {REFERENCES!r} if m in sys.modules]; assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_show_puts_a_frame_where_an_exercise_is_missing(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)

    def missing():
        raise NotImplementedError("exercise coupling: forward")

    def overflow():
        raise FloatingPointError("step 3 (Coupling): z has 2 non-finite values")

    def of_torch():
        torch.nn.functional.unfold(torch.zeros(1, 1, 4, 4, dtype=torch.long), 2)

    for draw, words in ((missing, "not solved yet"), (overflow, "ran away"), (of_torch, "not implemented for 'Long'")):
        assert autograder.show(draw) is None
        texts = [t.get_text() for ax in shown[-1].axes for t in ax.texts]
        assert any(words in t for t in texts)
    autograder.show(lambda: 3)
    assert shown[-1] == 3
    with pytest.raises(ZeroDivisionError):
        autograder.show(lambda: 1 / 0)
