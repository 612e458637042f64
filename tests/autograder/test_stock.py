"""Stock nbgrader with our settings: as safe as a class run, and still nbgrader for whatever is not ours."""
import logging
from types import SimpleNamespace

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import Execute
from traitlets.config import Config

from autograder import build, stock

LESSON = "02_coupling"
RESOURCES = {"nbgrader": {"assignment": LESSON, "notebook": LESSON, "student": "ann"}}


@pytest.fixture
def folder(tmp_path):
    """An empty course, and a preprocessor of it."""
    directory = CourseDirectory(root=str(tmp_path))
    return tmp_path, SimpleNamespace(parent=SimpleNamespace(parent=SimpleNamespace(coursedir=directory)))


def put(path, nb):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def lesson(name=LESSON):
    return nbformat.read(build.ROOT / "lessons" / f"{name}.ipynb", as_version=4)


def test_all_else_is_nbgraders_own():
    """Its lists of steps with ours put in: if a later nbgrader has others, this says so."""
    settings = build.config().Autograde
    names = {k: [v if isinstance(v, str) else f"{v.__module__.split('.')[0]}.preprocessors.{v.__name__}" for v in getattr(Autograde(), k)]
             for k in ("sanitize_preprocessors", "autograde_preprocessors")}
    assert settings.sanitize_preprocessors == ["autograder.stock.Rebuild", *names["sanitize_preprocessors"]]
    assert settings.autograde_preprocessors == ["autograder.stock.Judged", *names["autograde_preprocessors"][1:]]
    assert names["autograde_preprocessors"][0].endswith(".Execute") and issubclass(stock.Judged, Execute)


def test_a_release_is_found_and_no_solution_is_taken_for_one(folder):
    place, preprocessor = folder
    assert stock.released(preprocessor, RESOURCES) is None
    source = place / "source" / LESSON / f"{LESSON}.ipynb"
    put(source, build.solved(build.ROOT / "solutions" / f"{LESSON}.py"))
    assert stock.released(preprocessor, RESOURCES) is None, "a cell that is missing would be solved"
    source.unlink()
    put(source, lesson())   # the folder of a class run
    assert stock.released(preprocessor, RESOURCES).name == LESSON
    put(place / "release" / "essay" / "essay.ipynb", nbformat.v4.new_notebook())
    assert stock.released(preprocessor, {"nbgrader": {"assignment": "essay", "notebook": "essay"}}) is None


def test_the_seed_of_a_folder(folder, monkeypatch):
    place, preprocessor = folder
    monkeypatch.delenv("AUTOGRADER_SEED", raising=False)
    drawn = stock.seed_of(stock.coursedir(preprocessor))
    assert drawn == stock.seed_of(stock.coursedir(preprocessor)) == int((place / ".grading" / "seed").read_text())
    monkeypatch.setenv("AUTOGRADER_SEED", "7")
    assert stock.seed_of(stock.coursedir(preprocessor)) == 7


def test_where_nothing_can_be_confined_it_says_so_and_does_as_nbgrader_does(folder, monkeypatch, caplog):
    place, preprocessor = folder
    put(place / "release" / LESSON / f"{LESSON}.ipynb", lesson())
    monkeypatch.setattr(stock, "unconfined", lambda: "landlock: this kernel has no Landlock")
    monkeypatch.setattr(Execute, "preprocess", lambda self, nb, resources, km=None: ("executed", resources))
    judged = stock.Judged(log=logging.getLogger("nbgrader"))
    monkeypatch.setattr(stock, "coursedir", lambda _: preprocessor.parent.parent.coursedir)
    with caplog.at_level(logging.WARNING):
        assert judged.preprocess(lesson(), RESOURCES)[0] == "executed"
    assert "cannot be confined here (landlock: this kernel has no Landlock)" in caplog.text and "unprotected" in caplog.text


# What a student could try in the cell of one exercise; another one is solved honestly.
ATTACKS = {
    "writes": "import pathlib\npathlib.Path({gradebook!r}).write_bytes(b'')\nCoupling = 1",
    "ends": "import os\nos._exit(0)",
    "patches": "import autograder.check, sys\nsys.modules['autograder.check'].outside = lambda *a: 10.0\nCoupling = 1",
}


@pytest.mark.slow
def test_formgraders_button(tmp_path, monkeypatch):
    """By the call behind the button: nobody writes the gradebook or a verdict, and an instructor's own assignment is graded as ever."""
    monkeypatch.setenv("AUTOGRADER_SEED", "3")
    monkeypatch.setenv("PYTHONPATH", str(build.ROOT))
    build.course(tmp_path, build.sources([LESSON]))
    own = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "assert 1 + 1 == 2", metadata={"nbgrader": {"schema_version": 3, "grade": True, "solution": False, "locked": True, "task": False,
                                                    "grade_id": "sum", "points": 4}})],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    put(tmp_path / "source" / "sums" / "sums.ipynb", own)
    settings = Config(build.config())
    api = NbGraderAPI(CourseDirectory(root=str(tmp_path), config=settings), config=settings)
    assert api.generate_assignment("sums")["success"]
    put(tmp_path / "submitted" / "writes" / "sums" / "sums.ipynb", nbformat.read(tmp_path / "release" / "sums" / "sums.ipynb", as_version=4))
    ada = nbformat.read(build.ROOT / "data" / "sample_class" / "ada" / LESSON / f"{LESSON}.ipynb", as_version=4)
    permute = next(c.source for c in ada.cells if c.id == "permute")
    for student, attack in ATTACKS.items():
        nb = nbformat.read(tmp_path / "release" / LESSON / f"{LESSON}.ipynb", as_version=4)
        cells = {c.id: c for c in nb.cells}
        cells["permute"].source = permute
        cells["coupling"].source = attack.format(gradebook=str(tmp_path / "gradebook.db"))
        cells["coupling_check"].source = "10.0"
        nb.cells.append(nbformat.from_dict({**cells["coupling"], "id": "again"}))    # a second cell of one grade_id stops plain nbgrader
        put(tmp_path / "submitted" / student / LESSON / f"{LESSON}.ipynb", nb)
        result = api.autograde(LESSON, student)
        assert result["success"], result
    assert "the first one counts" in result["log"]
    assert api.autograde("sums", "writes")["success"]
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        scores = {s: {g.name: g.auto_score for g in book.find_submission(LESSON, s).notebooks[0].grades} for s in ATTACKS}
        assert book.find_submission("sums", "writes").score == 4
    assert {s: (v["coupling_check"], v["permute_check"]) for s, v in scores.items()} == {"writes": (0, 5), "ends": (0, 0), "patches": (0, 5)}
