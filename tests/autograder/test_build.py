"""What is committed is what the sources build, nothing of a solution is left for students, and both notebooks run."""
import ast
import re
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient

from autograder import audit, build, exercise, grade, progress

SOURCES = build.sources()
GRADED = [source for source in SOURCES if exercise.assignment(source.stem).EXERCISES]
lessons = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
graded = pytest.mark.parametrize("source", GRADED, ids=lambda p: p.stem)


def regions(text):
    """The lines between the solution's markers."""
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line in (build.BEGIN, build.END):
            inside = line == build.BEGIN
        elif inside:
            yield line


def run(nb):
    """The notebook with its outputs, in fast mode; no cell may raise."""
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(nbformat.from_dict(nb), timeout=600, resources={"metadata": {"path": scratch}},
                                extra_arguments=["--IPKernelApp.log_level=ERROR"])
        return client.execute(env=build.kernel_environment(FLOWKIT_FAST="1"))


def scores(nb):
    """Exercise -> (score, page) as the check cells show them."""
    cells = [c for c in nb.cells if "check" in c.metadata.get("tags", [])]
    results = {c.id.removesuffix("_check"): [o for o in c.outputs if o.output_type == "execute_result"] for c in cells}
    for name, outputs in results.items():
        assert len(outputs) == 1, f"check {name!r} has no value of its own"
    return {name: (float(o.data["text/plain"]), o.data["text/html"]) for name, (o,) in results.items()}


def test_there_are_lessons():
    assert GRADED


def test_a_lesson_without_exercises(tmp_path):
    """The page for the hall: students get the very notebook that is there to read, and nobody is graded, nor owes a point, for it."""
    (page,) = set(SOURCES) - set(GRADED)
    assert page.stem == "00_lecture" and build.release(build.solved(page)) == build.solved(page)
    released = nbformat.read(build.ROOT / "lessons" / f"{page.stem}.ipynb", as_version=4)
    assert not any("nbgrader" in cell.metadata for cell in released.cells)
    assert page.stem not in grade.releases(build.ROOT / "lessons").keys() == {source.stem for source in GRADED}
    assert build.course(tmp_path, [page]) == [] and not (tmp_path / "source").exists()
    assert page.stem not in progress().text and GRADED[0].stem in progress().text


@lessons
def test_committed_is_what_is_built(source):
    assert build.differences(source) == []


@lessons
def test_building_twice_gives_the_same(source):
    assert build.release(build.solved(source)) == build.release(build.solved(source))


@graded
def test_nothing_of_a_solution_is_left(source):
    released = (build.ROOT / "lessons" / f"{source.stem}.ipynb").read_text("utf-8")
    plain = "\n".join(c.source for c in nbformat.reads(released, as_version=4).cells)
    solved = build.solved(source)
    given = "\n".join(build.stub(c.source) if c.cell_type == "code" else c.source for c in solved.cells
                      if c.metadata.get("nbgrader", {}).get("grade_id") not in exercise.assignment(source.stem).TEXTS)
    secret = [line for c in solved.cells for line in regions(c.source) if len(line) > 12 and line not in given]
    secret += [line for c in solved.cells if c.id in exercise.assignment(source.stem).TEXTS for line in c.source.splitlines() if len(line) > 12]
    assert len(secret) > 10
    assert [line for line in secret if line in plain or line in released] == []
    assert build.BEGIN not in plain and build.END not in plain


@graded
def test_stub_notebook_runs_and_scores_nothing(source):
    nb = run(nbformat.read(build.ROOT / "lessons" / f"{source.stem}.ipynb", as_version=4))
    found = scores(nb)
    assert set(found) == {e.id for e in exercise.assignment(source.stem).EXERCISES}
    assert {name for name, (score, page) in found.items() if score != 0 or "not solved yet" not in page} == set()


@graded
def test_solved_notebook_gets_full_points(source):
    nb = build.solved(source)   # nbval runs the whole of it; no check may need a `show` cell
    nb.cells = [c for c in nb.cells if "show" not in c.metadata.get("tags", [])]
    found = scores(run(nb))
    wanted = {e.id: e.points for e in exercise.assignment(source.stem).EXERCISES}
    assert {name: score for name, (score, _) in found.items()} == wanted


@pytest.mark.slow
@graded
def test_the_checks_pass_their_audit(source):
    """The short form of `make audit`: an exercise whose checks miss a goal is not done."""
    results = audit.audit([e.id for e in exercise.assignment(source.stem).EXERCISES], fast=True)
    assert not audit.misses(results), audit.table(results) + "\n" + "\n".join(audit.misses(results))


@lessons
def test_committed_outputs(source):
    """Executed, without errors, progress bars, paths of a machine."""
    path = build.ROOT / "solutions" / f"{source.stem}.ipynb"
    text, nb = path.read_text("utf-8"), nbformat.read(path, as_version=4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"/home/|/Users/|/tmp/|site-packages|ipykernel_", text)
    assert {score for score, _ in scores(nb).values()} != {0.0}


@lessons
def test_metadata_follows_from_the_records(source):
    lesson = exercise.assignment(source.stem)
    cells = {c.id: c for c in build.release(build.solved(source)).cells}
    for e in lesson.EXERCISES:
        check, solution = cells[f"{e.id}_check"].metadata.nbgrader, cells[e.id].metadata.nbgrader
        assert check.locked and not check.solution and check.grade != e.bonus
        assert e.bonus or check.points == e.points
        assert solution.solution and not solution.grade and not solution.locked
        assert re.search(rf"raise NotImplementedError\(.*{e.id}", cells[e.id].source)
        ast.parse(cells[e.id].source)
    for name, points in lesson.TEXTS.items():
        assert cells[name].metadata.nbgrader.points == points and cells[name].source == "Your answer here."
    assert len(cells) == len({*cells}) and all("jupytext" not in c.metadata for c in cells.values())


def test_nbgrader_releases_the_same_notebook(tmp_path):
    """The course for an instructor, made by nbgrader itself from the solved notebooks, hands out what lies in lessons/."""
    assert build.course(tmp_path / "course", SOURCES) == [source.stem for source in GRADED]
    for source in GRADED:
        ours = nbformat.read(build.ROOT / "lessons" / f"{source.stem}.ipynb", as_version=4)
        theirs = nbformat.read(tmp_path / "course" / "release" / source.stem / f"{source.stem}.ipynb", as_version=4)
        assert theirs.cells == ours.cells
    assert {p.name for p in (tmp_path / "course").iterdir()} == {"source", "release", "gradebook.db", "nbgrader_config.py"}


# --- faults of a source are named ------------------------------------------------------------------------------------

FAULTS = (
    ('tags=["setup"]', 'tags=["setpu"]', "unknown role 'setpu'; the roles are setup, solution, check, show"),
    ('# %% tags=["setup"]', "# %%", "a code cell has one role .* this one has none"),
    ('tags=["setup"]', 'tags=["setup", "show"]', "a code cell has one role .* setup and show"),
    ('"grade_id": "coupling"}', '"grade_id": "couplign"}', "has no exercise 'couplign'; it has coupling"),
    ('nbgrader={"grade_id": "coupling_check"}', "", "a grade_id is missing: check cells have one"),
    ('"grade_id": "coupling_check"', '"grade_id": "coupling_check", "points": 3', "'points' follows from the role"),
    ('check("coupling", Coupling)', 'check("coupling", Coupling);', r"holds check\('coupling', ...\) and nothing else, without a semicolon"),
    ('check("coupling", Coupling)', 'check("make_net", Coupling)', r"holds check\('coupling', ...\)"),
    ('check("coupling", Coupling)', 'print(1)\ncheck("coupling", Coupling)', r"holds check\('coupling', ...\)"),
    ('"grade_id": "make_net_check"', '"grade_id": "coupling_check"', r"holds check\('coupling', ...\)"),
    ('raise NotImplementedError("exercise make_net")', "", "must be a `raise NotImplementedError"),
    ("        ### BEGIN SOLUTION\n", "", "do not alternate|is not marked"),
    ("        ### END SOLUTION\n", "", "do not alternate"),
    ("class Coupling(nn.Module):", "class Coupling(nn.Module:", "the solution of 'coupling' is not Python"),
    ("# %% [markdown]\n", '# %% [markdown] tags=["show"]\n', "a markdown cell cannot have the role 'show'"),
    ("# %% [markdown]\n", '# %% [markdown] slideshow={"slide_type": "slide"}\n', "its header holds 'slideshow'"),
)


@pytest.fixture
def broken(tmp_path):
    def write(change):
        place = tmp_path / "solutions" / "02_coupling.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text(change((build.ROOT / "solutions" / "02_coupling.py").read_text("utf-8")), "utf-8")
        return place

    return write


@pytest.mark.parametrize("old, new, sentence", FAULTS, ids=[f[2][:40] for f in FAULTS])
def test_a_fault_is_named(broken, old, new, sentence):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)

    with pytest.raises(build.SourceError, match=f"02_coupling.py.*({sentence})"):
        build.solved(broken(change))


def cut(text, start, end):
    """`text` without the cells from the header that holds `start` to that which holds `end`."""
    cells = re.split(r"(?m)^(?=# %%)", text)
    first, last = (next(i for i, c in enumerate(cells) if mark in c.splitlines()[0]) for mark in (start, end))
    return "".join(cells[:first] + cells[last + 1:])


@pytest.mark.parametrize("start, end, sentence", [
    ('"coupling"', '"coupling"', "the exercise 'coupling' has no solution cell"),
    ('"coupling_check"', '"coupling_check"', "the exercise 'coupling' has no check cell"),
    ('"bonus_study_text"', '"bonus_study_text"', "the written answer 'bonus_study_text' has no cell"),
])
def test_a_missing_cell_is_named(broken, start, end, sentence):
    with pytest.raises(build.SourceError, match=sentence):
        build.solved(broken(lambda text: cut(text, start, end)))


def test_a_cell_twice_or_in_the_wrong_order_is_named(broken):
    header = '\n# %% tags=["check"] nbgrader={"grade_id": "coupling_check"}\ncheck("coupling", Coupling)\n'
    with pytest.raises(build.SourceError, match="the grade_id 'coupling_check' is used twice"):
        build.solved(broken(lambda text: text + header))
    with pytest.raises(build.SourceError, match="the check of 'coupling' stands before its solution"):
        build.solved(broken(lambda text: header.lstrip() + cut(text, '"coupling_check"', '"coupling_check"')))


def test_check_flag_finds_every_difference(broken, tmp_path):
    source = broken(lambda text: text)
    nb = build.solved(source)
    assert build.differences(source, tmp_path) == ["lessons/02_coupling.ipynb does not exist", "solutions/02_coupling.ipynb does not exist"]
    build.save(build.release(nb), tmp_path / "lessons" / "02_coupling.ipynb")
    build.save(build.for_reading(nb), tmp_path / "solutions" / "02_coupling.ipynb")
    assert build.differences(source, tmp_path) == ["solutions/02_coupling.ipynb has cells that were not executed"]
    edited = build.release(nb)
    edited.cells[3].source += " "
    build.save(edited, tmp_path / "lessons" / "02_coupling.ipynb")
    assert build.differences(source, tmp_path)[0] == "lessons/02_coupling.ipynb is not what solutions/02_coupling.py builds: cell 4 differs"


def test_usage(capsys):
    assert build.main(["--check", "99_nothing"]) == 1
    assert "there is no lesson '99_nothing' in solutions/; there are: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        build.main(["--chekc"])
    assert stop.value.code == 2
