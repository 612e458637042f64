"""`make lab`: on this machine only, without pop-ups, and everything in it works."""
import os
import subprocess
import sys

import nbformat
import psutil
import pytest
from labkit import REPOSITORY

pytestmark = pytest.mark.browser


def write(path, *sources):
    """A notebook of code cells, each named by the nbgrader grade_id before it."""
    cells = []
    for name, source in zip(sources[::2], sources[1::2], strict=True):
        cell = nbformat.v4.new_code_cell(source, id=name)
        cell.metadata["nbgrader"] = {"grade_id": name, "grade": False, "locked": False, "solution": False,
                                     "schema_version": 3, "task": False}
        cells.append(cell)
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def test_make_lab_runs_the_launcher():
    """What the tests start is what `make lab ARGS=...` runs."""
    outside_make = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(["make", "-n", "lab", "ARGS=--no-browser"], cwd=REPOSITORY, env=outside_make,
                           capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == ".venv/bin/python bin/lab --no-browser"


def test_serves_this_machine_only(lab, tmp_path):
    server = lab(tmp_path)
    listening = {(c.laddr.ip, c.laddr.port) for c in psutil.Process(server.process.pid).net_connections("inet")
                 if c.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", server.port) in listening
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert f"http://127.0.0.1:{server.port}/lab?token=" in server.log.read_text()


def test_opens_on_the_lessons(lab):
    shown = {entry["name"] for entry in lab(None).api("/api/contents")["content"]}
    assert shown >= {path.name for path in (REPOSITORY / "lessons").glob("*.ipynb")} > set()


def test_no_pop_ups(lab, tab, tmp_path):
    """For someone who never set anything: nothing is asked, and nothing looked for."""
    write(tmp_path / "quiet.ipynb", "one", "1 + 1")
    notebook = tab.open(lab(tmp_path, settings=None), "quiet.ipynb")
    notebook.run_all()
    tab.page.wait_for_timeout(3000)       # JupyterLab asks once it has been restored
    assert tab.pop_ups() == []
    assert tab.page.get_by_role("menuitem", name="Run", exact=True).count() == 1
    assert tab.page.get_by_role("menuitem", name="Nbgrader", exact=True).count() == 0
    assert not [url for url in tab.requests if "/lab/api/news" in url or "/lab/api/update" in url]


def test_the_users_own_settings_hold(lab, tab, tmp_path):
    write(tmp_path / "dark.ipynb", "one", "1 + 1")
    dark = {"@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Dark"}}
    tab.open(lab(tmp_path, settings=dark), "dark.ipynb")
    assert tab.page.locator("body").get_attribute("data-jp-theme-name") == "JupyterLab Dark"


def test_a_notebook_in_use(lab, tab, tmp_path):
    """Run all, edit a cell, run it alone, widgets, pictures, HTML: what the lessons rest on."""
    write(tmp_path / "use.ipynb",
          "solution", "raise NotImplementedError('not yet')",
          "check", "from IPython.display import HTML\nHTML(f'<b>{answer}</b>')",
          "picture", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
          "widget", "import ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider",
          "where", "import sys, os; print(sys.executable, os.environ['HOME'])")
    server = lab(tmp_path)
    notebook = tab.open(server, "use.ipynb")
    assert notebook.cells() == ["solution", "check", "picture", "widget", "where"]

    assert notebook.run_all() is False
    assert notebook.errors() == ["solution: NotImplementedError: not yet"]

    indented = "def answer_of(x):\n    if x:\n        return 'forty-two'\n\nanswer = answer_of(1)"
    notebook.set_source("solution", indented)
    assert notebook.source("solution") == indented
    assert notebook.run("solution") is True
    assert notebook.run("check") is True
    assert notebook.html("check") == "<b>forty-two</b>"

    assert notebook.run_all() is True and notebook.errors() == []
    assert notebook.pictures("picture") == 1
    # The kernel is of this environment, in a home of its own.
    assert notebook.text("where").split() == [sys.executable, str(server.home)]

    slider = notebook.cell("widget").get_by_role("slider")
    slider.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.wait_for_function("e => e.getAttribute('aria-valuenow') === '4.0'", arg=slider.element_handle())
    notebook.set_source("where", "print(slider.value)")
    notebook.run("where")
    assert notebook.text("where").strip() == "4"

    assert notebook.screenshot("picture", tmp_path / "picture.png").stat().st_size > 1000
    notebook.save()
    assert "forty-two" in (tmp_path / "use.ipynb").read_text()
