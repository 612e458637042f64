"""Formgrader, in a browser, on a folder that `autograder grade` left: marks given there stay, whatever is graded later."""
import subprocess
import sys

import nbformat
import pytest
from labkit import COUPLING, REPOSITORY
from nbgrader.api import Gradebook

pytestmark = pytest.mark.browser

LESSON, EXERCISE, TEXT = "02_coupling", "coupling", "bonus_study_text"
# `make lab` leaves nbgrader out; an instructor starts a server of the environment as it is, in the course's folder.
SERVER = """
import sys
from jupyter_server.serverapp import main
main([a for a in sys.argv[1:] if not a.startswith("--LabApp")] + ["--ServerApp.ip=127.0.0.1", "--allow-root"])
"""
STUDENT, OTHER = "dora", "lea"
WRONG = COUPLING.replace("(-alpha)", "alpha")


def grade_id(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def short_release(folder):
    """Lesson 02 with one exercise and the written answer, which takes a moment to grade."""
    nb = nbformat.read(REPOSITORY / "lessons" / f"{LESSON}.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not grade_id(c) or grade_id(c) in (EXERCISE, f"{EXERCISE}_check", TEXT) or "setup" in c.metadata.get("tags", [])]
    folder.mkdir()
    nbformat.write(nb, folder / f"{LESSON}.ipynb")


def hand_in(tmp_path, student, **answers):
    nb = nbformat.read(tmp_path / "release" / f"{LESSON}.ipynb", as_version=4)
    for cell in nb.cells:
        cell.source = answers.get(grade_id(cell), cell.source)
    path = tmp_path / "submitted" / student / LESSON / f"{LESSON}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def graded(tmp_path):
    """Grade as an instructor does; the text of grades.csv."""
    out = tmp_path / "graded"
    subprocess.run([sys.executable, "-m", "autograder", "grade", tmp_path / "submitted", "--out", out, "--release", tmp_path / "release",
                    "--seed", "1", "--timeout", "20"], cwd=REPOSITORY, check=True, timeout=120)
    return (out / "grades.csv").read_text("utf-8")


def grades(out, student):
    """{cell: (what the grader gave, what the person gave, extra credit, whether a person must look)} and the person's comment on the text."""
    with Gradebook(f"sqlite:///{out / 'gradebook.db'}") as book:
        notebook = book.find_submission_notebook(LESSON, LESSON, student)
        comment = book.find_comment(TEXT, LESSON, LESSON, student).manual_comment
        return {g.name: (g.auto_score, g.manual_score, g.extra_credit, g.needs_manual_grade) for g in notebook.grades}, comment


def test_a_mark_given_in_formgrader_stays(lab, tab, tmp_path, monkeypatch):
    out = tmp_path / "graded"
    short_release(tmp_path / "release")
    for student, code in ((STUDENT, WRONG), (OTHER, COUPLING)):
        hand_in(tmp_path, student, **{EXERCISE: code, TEXT: "Two seeds."})
    table = graded(tmp_path)
    assert f"{STUDENT},{LESSON},coupling,8,10,wrong,inverse_alpha_sign" in table and f"{STUDENT},{LESSON},{TEXT},,0,manual" in table
    with Gradebook(f"sqlite:///{out / 'gradebook.db'}") as book:
        submission = book.find_submission_notebook(LESSON, LESSON, STUDENT).id
    neighbour = grades(out, OTHER)

    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr("labkit.LAUNCHER", tmp_path / "server.py")
    monkeypatch.chdir(out)  # nbgrader's course is where the server was started
    server, page = lab(out), tab.page
    page.goto(f"{server.url}/formgrader?token={server.token}")
    page.get_by_role("link", name=LESSON, exact=True).first.wait_for()
    page.goto(f"{server.url}/formgrader/gradebook/{LESSON}/{LESSON}")
    page.get_by_role("link", name="Submission #2").wait_for()
    page.locator(f"a[href*='{submission}']").first.click()
    # The boxes are there before the script that saves them has got their values.
    page.wait_for_function("window.formgrader?.grades?.loaded && formgrader.comments?.loaded")
    assert "not right yet" in page.locator("body").inner_text(), "the verdict stands in the notebook"

    def give(box, value):
        with page.expect_response(lambda r: "/api/" in r.url and r.request.method == "PUT") as answer:
            page.locator(f"[id='{box}']").fill(value)
            page.locator(f"[id='{box}']").blur()
        assert answer.value.ok

    give("coupling_check", "9.5")
    give(f"{TEXT}_extra_credit", "1.5")     # the bonus is outside the maximum, and formgrader allows no score above that
    give(f"{TEXT}-comment", "Try three seeds.")
    # nbconvert's templates, which formgrader uses, fetch the typesetter of formulas; all else is there without it.
    assert all("/mathjax/" in url for url in tab.refused)
    tab.refused.clear()

    given, comment = grades(out, STUDENT)
    assert given == {TEXT: (None, None, 1.5, True), "coupling_check": (8.0, 9.5, None, False)} and comment == "Try three seeds."
    hand_in(tmp_path, STUDENT, **{EXERCISE: WRONG, TEXT: "Three seeds, then."})  # another text is handed in
    table = graded(tmp_path)
    assert f"{STUDENT},{LESSON},{TEXT},1.5," in table and f"{STUDENT},{LESSON},coupling,9.5," in table
    again, comment = grades(out, STUDENT)
    assert again == {TEXT: (None, None, 1.5, True), "coupling_check": (8.0, 9.5, None, True)}, "the marks stay, and somebody looks again"
    assert comment == "Try three seeds." and grades(out, OTHER) == neighbour
