"""Copies are found however they are dressed, and honest answers are left in peace."""
import ast
import random
import re

import pytest

from autograder import build, exercise, grade, likeness

LESSON = "02_coupling"
EXERCISES = ("coupling", "act_norm", "invertible_linear", "mix_coupling")  # long enough to tell


@pytest.fixture(scope="module")
def release():
    return grade.releases(build.ROOT / "lessons")[LESSON]


HONEST = {e: [a.source for a in likeness.honest(e)] for e in EXERCISES}


@pytest.fixture(autouse=True)
def no_background(monkeypatch):
    """The class below is made of the right answers that the background holds: they shall not count twice."""
    monkeypatch.setattr(likeness, "honest", lambda name: [])


def notebooks(release, answers):
    """{student: {exercise: text}} -> what likeness.look takes."""
    ids = {c.metadata.nbgrader.grade_id: c.id for c in release.notebook.cells if c.metadata.get("nbgrader", {}).get("solution")}
    return {student: {"cells": [{"id": ids[e], "cell_type": "code", "source": text, "metadata": {}} for e, text in texts.items()]}
            for student, texts in answers.items()}


def honest_class():
    """Each student has a differently written right answer to each exercise."""
    return {f"h{i}": {e: HONEST[e][i] for e in EXERCISES} for i in range(6)}


def disguised(code):
    """Renamed, commented, the methods in another order, the layout lost."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body.reverse()
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in n.args} - {"self"}
    code = re.sub(rf"(?<![\w.])({'|'.join(sorted(names))})\b", lambda m: f"my_{m[1]}", ast.unparse(tree))
    return "\n".join(f"{line}  # my idea {i}" for i, line in enumerate(code.splitlines()))


def test_right_answers_are_not_suspected(release):
    pairs, copies = likeness.look(release, notebooks(release, honest_class()))
    assert [(p.student, p.of, p.where) for p in pairs] == [] and [(c.student, c.of, c.where) for c in copies] == []


@pytest.mark.parametrize("name", EXERCISES)
def test_a_disguised_copy_is_found(release, name):
    students = honest_class()
    victim = max(students, key=lambda s: len(students[s][name]))   # in a class of seven, ten lines are too few to tell
    students["thief"] = {name: disguised(students[victim][name])}
    pairs, _ = likeness.look(release, notebooks(release, students))
    assert [(p.student, p.of, p.where) for p in pairs] == [(victim, "thief", name)]
    assert "<mark>" in pairs[0].left and "my_" in pairs[0].right


@pytest.mark.parametrize("dress", [str, disguised])
def test_the_lessons_solution_is_known_again(release, dress):
    students = honest_class()
    students["thief"] = {"mix_coupling": dress(likeness.sources(LESSON, "mix_coupling")["the lesson's solution"].source)}
    _, copies = likeness.look(release, notebooks(release, students))
    assert [(c.student, c.of) for c in copies] == [("thief", "the lesson's solution")]


def test_flowkits_source_is_known_again(release):
    students = honest_class()
    students["thief"] = {"coupling": disguised(likeness.sources(LESSON, "coupling")["flowkit.coupling.Coupling"].source)}
    _, copies = likeness.look(release, notebooks(release, students))
    assert [(c.student, c.of) for c in copies] == [("thief", "flowkit.coupling.Coupling")]


def test_what_many_wrote_is_no_reason(release):
    text = honest_class()["h3"]["coupling"]
    pairs, _ = likeness.look(release, notebooks(release, {f"s{i}": {"coupling": text} for i in range(30)}))
    assert pairs == []


def test_the_release_itself_counts_for_nothing(release):
    given = max((c.source for c in release.notebook.cells if c.cell_type == "code"), key=len)
    assert likeness.look(release, notebooks(release, {s: {"coupling": given} for s in "ab"})) == ([], [])


def test_broken_and_hostile_texts(release):
    random.seed(1)
    texts = ["def f(:\n  '''", "", "\x00\x1b[31m", "x" * 100_000, "".join(map(chr, random.sample(range(0x2FFF), 2000))), "<script>alert(1)</script>\n" * 50]
    pairs, _ = likeness.look(release, notebooks(release, {f"{s}{i}": {"coupling": t} for i, t in enumerate(texts) for s in "ab"}))
    assert not any("<script" in p.left + p.right for p in pairs)


def test_every_exercise_has_a_source_to_compare_with():
    for lesson in exercise.lessons().values():
        for e in lesson.EXERCISES:
            assert likeness.sources(lesson.ASSIGNMENT, e.id), e.id
