"""What learning platforms hand over ends in nbgrader's layout; no name leads outside, and nobody's file costs another's."""
import io
import stat
import time
import zipfile

import nbformat
import pytest

from autograder import build, grade, intake, platforms

from stand_in import unsolved

TWO, THREE = "02_coupling", "03_autoregressive"
OUTSIDE = ("../../{}", "/{}", "C:\\{}", "a/../../{}", "c:{}")


@pytest.fixture(scope="module")
def releases():
    return {name: r for name, r in grade.releases(build.ROOT / "lessons").items() if name in (TWO, THREE)}


@pytest.fixture(scope="module")
def notebook(releases):
    def make(assignment=TWO, mark=""):
        nb = nbformat.from_dict(releases[assignment].notebook)
        nb.cells.append(nbformat.v4.new_markdown_cell(mark, id="mark"))
        return nbformat.writes(nb).encode()
    return make


def archive(contents, path=None):
    """A ZIP file of {name or ZipInfo: bytes}, or of a list of such pairs; its bytes, or written to `path`."""
    target = path or io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in contents.items() if isinstance(contents, dict) else contents:
            zipped.writestr(name, data)
    return path or target.getvalue()


@pytest.fixture
def sorted_in(tmp_path, releases):
    """contents -> ({(student, assignment): bytes}, notes)"""
    def do(contents):
        place = archive(contents, tmp_path / "class.zip")
        assert platforms.needs_sorting(place, releases)
        notes = platforms.sort(place, tmp_path / "out" / "submitted", releases)
        return {p.parts[-3:-1]: p.read_bytes() for p in (tmp_path / "out" / "submitted").glob("*/*/*.ipynb")}, notes
    return do


@pytest.mark.parametrize("name, student", [
    ("ann/02_coupling/02_coupling.ipynb", "ann"), ("submitted/ann/02_coupling/02_coupling.ipynb", "ann"),
    ("Ann Lee_12345_assignsubmission_file_/whatever.ipynb", "Ann Lee"), ("Ann Lee_12345_assignsubmission_file/02_coupling.ipynb", "Ann Lee"),
    ("Ann Lee_12345_assignsubmission_file_my solution.ipynb", "Ann Lee"), ("Course/Ann Lee_12345_assignsubmission_file_/sub/x.ipynb", "Ann Lee"),
    ("leeann_12345_67890_02_coupling-1.ipynb", "leeann_12345"), ("leeann_LATE_12345_67890_other.ipynb", "leeann_12345"),
    ("ann/02_coupling.ipynb", "ann"), ("ann/02 coupling (1).ipynb", "ann"), ("ann/deep/down/Untitled.ipynb", "ann"), ("ann_02_coupling.ipynb", "ann"),
])
def test_layouts(sorted_in, notebook, name, student):
    got, notes = sorted_in({name: notebook()})
    assert got == {(student, TWO): notebook()}
    assert notes.pop("") == [] and sum(notes.values(), []) == (["the platform marks it as late"] if "LATE" in name else [])


def test_a_zip_file_within_is_one_students(sorted_in, notebook):
    inner = archive({"bob_1_2/x.ipynb": notebook(), "../bob/03_autoregressive.ipynb": b"", "notes/03_autoregressive.ipynb": notebook(THREE)})
    got, notes = sorted_in({"Ann Lee_1_assignsubmission_file_/all.zip": inner, "bob_2_assignsubmission_file_/b.ipynb": notebook()})
    assert got.keys() == {("Ann Lee", TWO), ("Ann Lee", THREE), ("bob", TWO)}
    assert any("lead outside" in n for n in notes[""])
    got, notes = sorted_in({"ann/all.zip": archive({"bob_9_assignsubmission_file_/02_coupling.ipynb": notebook()})})
    assert "ann" not in {s for s, _ in got} and any("whole class" in n for n in notes["ann", TWO])


def test_the_assignment_is_told_by_the_cells(sorted_in, notebook):
    got, notes = sorted_in({"ann/a.ipynb": notebook(THREE), "ann/b.ipynb": notebook(TWO), "bob/c.ipynb": b"{}", "cid/report.pdf": b"x"})
    assert got == {("ann", THREE): notebook(THREE), ("ann", TWO): notebook(TWO)}
    assert "no notebook of a lesson came, but 'c.ipynb'" in notes["bob", TWO] and "no notebook of a lesson came, but 'report.pdf'" in notes["cid", TWO]


def test_the_latest_attempt_counts(sorted_in, notebook):
    got, notes = sorted_in([(f"leeann_1_{n}_02_coupling{a}.ipynb", notebook(mark=a)) for n, a in ((900, ""), (12, "-2"), (13, "-10"), (14, "-9"))])
    assert got == {("leeann_1", TWO): notebook(mark="-10")} and notes["leeann_1", TWO] == []


def test_two_of_which_none_is_later_are_named(sorted_in, notebook):
    got, notes = sorted_in([("ann/02_coupling.ipynb", notebook(mark="1")), ("ann/02_coupling (1).ipynb", notebook(mark="2")), ("bob/02_coupling.ipynb", notebook()),
                            ("bob/02_coupling (1).ipynb", notebook())])
    assert got["ann", TWO] == notebook(mark="2") and notes["bob", TWO] == [], "two equal ones are one"
    (said,) = notes["ann", TWO]
    assert "2 different notebooks" in said and "ann/02_coupling (1).ipynb' was graded" in said and "'ann/02_coupling.ipynb'" in said


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice(sorted_in, notebook):
    got, notes = sorted_in([("ann/02_coupling.ipynb", notebook(mark="1")), ("ann/02_coupling.ipynb", notebook(mark="2"))])
    assert len(got) == 1 and "2 different notebooks" in notes["ann", TWO][0]


def test_students_of_one_name(sorted_in, notebook):
    got, notes = sorted_in({"Ann Lee_1_assignsubmission_file_/x.ipynb": notebook(), "Ann Lee_2_assignsubmission_file_/x.ipynb": notebook(),
                            "Ann/02_coupling.ipynb": notebook(), "ann/02_coupling.ipynb": notebook()})
    assert len(got) == 4 and len({s.casefold() for s, _ in got}) == 4
    assert any("2 students are called 'Ann Lee'" in n for n in notes[""]) and any("large and small letters" in n for n in notes[""])


@pytest.mark.parametrize("pattern", OUTSIDE)
def test_nothing_is_written_outside(sorted_in, tmp_path, notebook, pattern):
    before = set(tmp_path.rglob("*"))
    got, notes = sorted_in({pattern.format("evil/02_coupling.ipynb"): notebook(), "ann/02_coupling.ipynb": notebook(mark="ann")})
    assert got == {("ann", TWO): notebook(mark="ann")} and "evil" in notes[""][0]
    assert all(p.relative_to(tmp_path).parts[0] in ("out", "class.zip") for p in set(tmp_path.rglob("*")) - before)


def test_links_and_other_kinds_are_left_out(sorted_in, notebook):
    entries = []
    for name, kind in (("eve/02_coupling.ipynb", stat.S_IFLNK), ("eve/03_autoregressive.ipynb", stat.S_IFIFO)):
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (kind | 0o777) << 16
        entries.append((entry, b"/etc/passwd"))
    got, notes = sorted_in([*entries, ("ann/02_coupling.ipynb", notebook())])
    assert got.keys() == {("ann", TWO)} and "links" in notes[""][0]


@pytest.mark.parametrize("student", ["..", "CON", "con.txt", "a\x00b", "a\nb", "‮nna", "x" * 300, "a:b", " ann ", ".hidden", "nul", "é" * 200, "~", "."])
def test_a_students_name_stays_inside(tmp_path, releases, notebook, student):
    names = platforms.safe_names({student, "other"}, remarks := [])
    folder = names[student]
    assert (tmp_path / folder).resolve().parent == tmp_path and folder not in ("", ".", "..") and not folder.startswith(".")
    assert folder.isprintable() and not platforms.RESERVED.fullmatch(folder) and len(folder.encode()) < 255 and folder == folder.strip(" .")
    assert (folder == student) == (remarks == [])
    (tmp_path / folder).mkdir()


def test_different_names_get_different_folders():
    students = {"a/b", "a\\b", "a:b", "a_b", "A_b", "a_b ", "a_b."} | {f"{'x' * 100}{i}" for i in range(50)}
    assert len({f.casefold() for f in platforms.safe_names(students, []).values()}) == len(students)


def test_bombs_and_damage_cost_one_student(sorted_in, notebook, monkeypatch):
    monkeypatch.setattr(platforms, "LARGEST", 1_000_000)
    bomb = archive({"02_coupling.ipynb": b" " * 50_000_000})
    many = archive({f"{i}.txt": b"" for i in range(20_000)})
    liar = bytearray(archive({"02_coupling.ipynb": b" " * 3_000_000}))
    at = liar.rfind(b"PK\x01\x02")
    liar[at + 24:at + 28] = (10).to_bytes(4, "little")      # claims to be of 10 bytes
    odd = io.BytesIO()
    with zipfile.ZipFile(odd, "w", zipfile.ZIP_LZMA) as zipped:
        zipped.writestr("02_coupling.ipynb", notebook())
    bad = {"bomb": bomb, "many": many, "liar": bytes(liar), "cut": archive({"02_coupling.ipynb": notebook()})[:-30], "none": b"no zip", "odd": odd.getvalue(),
           "nested": archive({"deeper.zip": bomb})}
    start = time.monotonic()
    got, notes = sorted_in({**{f"{s}/work.zip": data for s, data in bad.items()}, "large/02_coupling.ipynb": b" " * 2_000_000,
                            "ann/02_coupling.ipynb": notebook()})
    assert got == {("ann", TWO): notebook()} and time.monotonic() - start < 10
    assert all(len(notes[s, TWO]) == 1 and "no notebook of a lesson came" in notes[s, TWO][0] for s in [*bad, "large"])


def test_a_hundred_thousand_entries(sorted_in, notebook):
    contents = {f"s{i}/{n}": b"" for i in range(10) for n in range(10_000)}
    contents["ann/02_coupling.ipynb"] = notebook()
    start = time.monotonic()
    got, notes = sorted_in(contents)
    assert got.keys() == {("ann", TWO)} and "and 9995 more" in notes["s0", TWO][0] and time.monotonic() - start < 30


def test_what_is_no_zip_file_gets_a_sentence(tmp_path, capsys):
    from autograder.__main__ import main
    (tmp_path / "class.zip").write_bytes(b"PK no")
    assert main(["grade", str(tmp_path / "class.zip"), "--out", str(tmp_path / "out"), "--release", str(build.ROOT / "lessons")]) == 1
    assert "class.zip is no ZIP file" in capsys.readouterr().err


def test_a_zip_file_is_graded_and_a_second_one_adds_to_it(tmp_path, monkeypatch, capsys, notebook):
    monkeypatch.setattr(grade, "grade_one", unsolved)
    first = archive([("ann/02_coupling.ipynb", notebook(mark="1")), ("ann/02_coupling (1).ipynb", notebook(mark="2")), ("bob/essay.pdf", b""),
                     ("../02_coupling.ipynb", b"")], tmp_path / "first.zip")
    second = archive({"CON/02_coupling.ipynb": notebook()}, tmp_path / "second.zip")
    rows = grade.grade(first, tmp_path / "out", build.ROOT / "lessons", jobs=1)
    assert {(r["student"], r["status"]) for r in rows} == {("ann", "unsolved"), ("bob", "missing")}
    assert "lead outside" in capsys.readouterr().err
    people = (tmp_path / "out" / "report.html").read_text("utf-8").split("Submissions that need a person")[1]
    assert "2 different notebooks came" in people and "essay.pdf" in people
    rows = grade.grade(second, tmp_path / "out", build.ROOT / "lessons", jobs=1)
    assert {r["student"][:4] for r in rows} == {"ann", "bob", "_CON"}
    people = (tmp_path / "out" / "report.html").read_text("utf-8").split("Submissions that need a person")[1]
    assert "2 different notebooks came" in people and "essay.pdf" in people, "what is known of the first one is not forgotten"


def test_flat_files_in_a_folder(tmp_path, releases, notebook):
    place = tmp_path / "class"
    place.mkdir()
    (place / "leeann_1_2_02_coupling.ipynb").write_bytes(notebook())
    (place / "bob.zip").write_bytes(archive({"x/y.ipynb": notebook()}))
    (place / "eve_3_4_02_coupling.ipynb").symlink_to("/etc/passwd")
    assert platforms.needs_sorting(place, releases)
    notes = platforms.sort(place, tmp_path / "out", releases)
    assert {p.parts[-3:-1] for p in (tmp_path / "out").glob("*/*/*")} == {("leeann_1", TWO), ("bob", TWO)} and notes[""] == []


def test_nbgraders_layout_is_left_as_it_is(releases):
    assert not platforms.needs_sorting(build.ROOT / "data" / "sample_class", releases)
    assert [s.student for s in intake.find(build.ROOT / "data" / "sample_class", releases)]
