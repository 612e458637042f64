"""Lesson 02 as a student meets it: open, run all unsolved, solve, check, read the diagnosis."""
import ast

import pytest
from labkit import COUPLING

pytestmark = pytest.mark.browser

MAKE_NET = '''
def make_net():
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
'''
WRONG = COUPLING.replace("(z2 - mu) * (-alpha).exp()", "(z2 - mu) * alpha.exp()")


@pytest.fixture
def notebook(lab, tab, lessons):
    return tab.open(lab(lessons), "02_coupling.ipynb")


def checks(notebook):
    return [name for name in notebook.cells() if name.endswith("_check")]


def test_run_all_unsolved_then_solve(notebook, lessons, tmp_path):
    assert notebook.run_all() and notebook.errors() == []
    assert len(checks(notebook)) == 10
    for name in checks(notebook):
        assert "not solved yet" in notebook.html(name), name
    assert notebook.pictures("coupling_check") == 1  # the target is shown before anything is solved
    notebook.screenshot("coupling_check", tmp_path / "unsolved.png")

    notebook.set_source("coupling", WRONG)
    assert notebook.run("coupling") and notebook.run("coupling_check")
    page = notebook.html("coupling_check")
    assert "8 of 10 points" in page and "In inverse, alpha has the same sign as in forward" in page
    notebook.screenshot("coupling_check", tmp_path / "wrong.png")

    for name, source in (("coupling", COUPLING), ("make_net", MAKE_NET)):
        notebook.set_source(name, source)
        assert notebook.run(name) and notebook.run(f"{name}_check")
        page = notebook.html(f"{name}_check")
        assert f"{name}: solved" in page and "✗" not in page
        assert notebook.pictures(f"{name}_check") == 1
        notebook.screenshot(f"{name}_check", tmp_path / f"{name}.png")
    assert float(ast.literal_eval(notebook.text("coupling_check"))) == 10.0
    assert notebook.errors() == []


def test_hints_fold_out_in_the_notebook(notebook):
    assert notebook.run_all()
    notebook.set_source("coupling", 'hint("coupling")')  # the check cell itself is locked
    assert notebook.run("coupling") and "Hint 1 of 2" in notebook.html("coupling")
