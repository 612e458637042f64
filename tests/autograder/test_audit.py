"""The audit's command and its figures, on the quickest exercise."""
import csv
import subprocess
import sys

import numpy as np
import pytest

from autograder import audit, build, exercise, fuzz, rights


@pytest.fixture(scope="module")
def permute(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "autograder", "audit", "permute", "--fast", "--out", folder],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_figures_are_written_and_shown(permute):
    shown, folder = permute
    (row,) = csv.DictReader((folder / "audit.csv").open())
    assert tuple(row) == audit.FIELDS and row["exercise"] == "permute"
    figures = {k: int(v) for k, v in row.items() if k != "exercise"}
    assert figures["killed"] == figures["mutants"] > 5 and figures["named"] <= figures["killed"]
    assert figures["rights"] >= 5 and figures["false_rejects"] == 0 and figures["inputs"] == 100
    assert f"{figures['killed']} of" in shown
    page = (folder / "audit.html").read_text()
    assert "<svg" in page and "permute" in page


def test_every_exercise_has_five_right_answers():
    assert {e: len(rights.table()[e]) >= 5 for e in exercise.registry()} == dict.fromkeys(exercise.registry(), True)


def test_a_check_that_passes_everything_is_found_out(monkeypatch):
    """Without its cases an exercise kills nothing: each mutant is a survivor."""
    from autograder.exercise import Case

    e = exercise.get("permute")
    monkeypatch.setitem(e.__dict__, "cases", (Case("anything goes", 1, lambda *_: None),))
    found = audit.Audit("permute")
    audit.mutants(audit.Lesson(build.sources(["02_coupling"])[0]), e, found, 0)
    assert found.killed == 0 and len(found.survivors) > 5


def figures(name="coupling", **changes):
    whole = {"killed": 100, "named": 90, "rights": 5, "inputs": 100} | changes
    return audit.Audit(name, **whole)


@pytest.mark.parametrize("changes, sentence", [
    ({}, ""), ({"survivors": ["a"]}, ""), ({"survivors": ["a"] * 2}, "over all, 98.0% of the wrong programs lose points, 99% are asked for"),
    ({"survivors": ["a"] * 6}, "coupling: 94.3% of the wrong programs lose points, 95% are asked for"),
    ({"named": 80}, "over all, 80.0% of these are named, 85% are asked for"), ({"rejects": [("r", 0, "")]}, "coupling: 1 right programs lose points"),
    ({"crashes": [("c", "")]}, "coupling: 1 random answers get out of the checker"), ({"stale": ["old"]}, "coupling: the confirmed mutant 'old' does not occur any more"),
])
def test_a_goal_that_is_missed_is_told(changes, sentence):
    missed = audit.misses([figures(**changes)])
    assert sentence in missed if sentence else missed == []


def test_a_bonus_has_no_goal_but_must_reject_nothing_right():
    assert audit.misses([figures(), figures("bonus_study", survivors=["a"] * 50)]) == []
    assert audit.misses([figures("bonus_study", rejects=[("r", 0, "")])]) == ["bonus_study: 1 right programs lose points"]


def test_a_mutant_confirmed_as_right_is_no_survivor(monkeypatch):
    lesson, e = audit.Lesson(build.sources(["02_coupling"])[0]), exercise.get("act_norm")
    found = audit.Audit("act_norm")
    audit.mutants(lesson, e, found, 0)
    assert [name for name, _ in found.confirmed] == list(rights.confirmed()["act_norm"]) and not found.survivors and not found.stale
    monkeypatch.setattr(rights, "confirmed", lambda: {"act_norm": {"no such mutant": "because"}})
    found = audit.Audit("act_norm")
    audit.mutants(lesson, e, found, 0)
    assert len(found.survivors) == 1 and found.stale == ["no such mutant"]


def test_a_program_that_never_ends_is_ended():
    class Endless:
        def __init__(self, order):
            self.order = order

        def forward(self, x):
            while True:
                x = x + 1

        inverse = forward

    e = exercise.get("permute")
    assert audit.outputs(e, lambda: (Endless,), 0, most=1000) is None
    assert audit.outputs(e, e.reference, 0) is not None


def test_an_unknown_exercise_is_told_in_one_sentence():
    done = subprocess.run([sys.executable, "-m", "autograder", "audit", "permutation"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: there is no exercise 'permutation'; there are: monotone_direction")


class Broken:
    def __init__(self, order):
        print("made")

    def forward(self, x):
        raise RuntimeError("broken")

    def inverse(self, z):
        return None


@pytest.mark.parametrize("way", [fuzz.by_parts, fuzz.by_check])
def test_the_fuzz_finds_nothing_wrong_with_honest_answers(way):
    e = exercise.get("permute")
    for make in (e.reference, lambda: (Broken,)):
        way(e, fuzz.Handed("honest", make), 0)


def test_the_fuzz_sees_a_world_left_changed_and_mends_it():
    with pytest.raises(fuzz.Leak, match="left changed: numpy errors"), fuzz.fenced([]):
        np.seterr(all="ignore")
    assert np.geterr()["divide"] == "warn"
