"""Whatever arrives is understood or refused in a sentence, and nothing leads out of its folder."""
import json
import os

import nbformat
import pytest

from autograder import intake


def notebook(**more):
    cell = {"cell_type": "code", "id": "coupling", "source": ["Coupling ", "= 1"], "metadata": {"nbgrader": {"grade_id": "coupling"}}, "outputs": [], "execution_count": None}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell], **more}


def released():
    return nbformat.reads(json.dumps(notebook()), as_version=4)


def data(value):
    return json.dumps(value).encode()


@pytest.mark.parametrize("content, note", (
    (data(notebook()), None), (b"\xef\xbb\xbf" + data(notebook()), None), (json.dumps(notebook()).encode("utf-16"), "UTF-16"),
    (data(notebook(nbformat=5)), "format that is not known"), (data(notebook(nbformat="4")), "does not say its notebook format"),
    (data(notebook(nbformat=True)), None), (data(notebook(metadata=[1])), None), (data(notebook(metadata={"kernelspec": "R"})), None),
    (data(notebook(metadata={"kernelspec": {"language": ["R"]}})), "language ['R']"), (data(notebook(cells=[5, *notebook()["cells"], None])), "2 of its cells are damaged"),
))
def test_what_can_be_understood_is(content, note):
    nb, notes = intake.parse(content)
    assert [(c.id, c.source) for c in nb.cells] == [("coupling", "Coupling = 1")]
    assert not note or any(note in n for n in notes)


def test_nul_characters_are_left_out():
    """But not the characters with which Python writes one."""
    nb, notes = intake.parse(data(notebook(cells=[{"cell_type": "code", "source": "x = 1\0\\u0000 \\0", "id": "a"}])))
    assert nb.cells[0].source == "x = 1\\u0000 \\0" and "NUL" in notes[0]


@pytest.mark.parametrize("content", (b"", b" \n", b"{", b"[1, 2]", b"5", b'"x"', b"null", b"\x00" * 100, b"[" * 10**6, data(notebook(cells=5)), data({"nbformat": 3}),
                                     b'{"cells": [], "nbformat": 3, "worksheets": 5}', data(notebook())[:-9], b'{"cells": ' + b"9" * 10_000 + b"}"))
def test_what_cannot_is_refused_in_a_sentence(content):
    with pytest.raises(intake.Unreadable, match="the file is"):
        intake.parse(content)


@pytest.mark.parametrize("cell", (
    {}, {"cell_type": 5, "source": 7, "metadata": None, "id": {}}, {"cell_type": "code", "source": ["a", 5, None], "id": ["x"]},
    {"cell_type": "code", "source": "a", "metadata": {"nbgrader": {"grade_id": 5}}}, {"cell_type": "code", "source": "\ud800", "id": "\udfff", "metadata": {"nbgrader": {"grade_id": "\ud800"}}},
))
def test_what_it_takes_can_be_written(cell):
    release = released()
    nb, notes = intake.parse(data(notebook(cells=[cell, *notebook()["cells"]])))
    text = nbformat.writes(intake.rebuild(release, nb, notes).notebook)
    assert text.encode("utf-8")


def solved(source, *own):
    release = released()
    release.cells[0].metadata.nbgrader.solution = True
    release.cells[0].source = "raise NotImplementedError"
    release.cells += [nbformat.v4.new_code_cell("check(1)", id="coupling_check", metadata={"tags": ["check"]})]
    handed_in = nbformat.from_dict({**release, "cells": [{**release.cells[0], "source": source}, *map(nbformat.v4.new_code_cell, own), release.cells[1]]})
    return intake.rebuild(release, handed_in)


def test_a_cell_too_long_is_not_run():
    rebuilt = solved("#" * (intake.LONGEST + 1), "x" * (intake.LONGEST + 1), "y = 1")
    assert [c.source for c in rebuilt.notebook.cells][1:] == ["y = 1", "check(1)"]
    assert rebuilt.answered == {"coupling"} and any("1 of the student's own 2 cells" in n for n in rebuilt.notes)
    with pytest.raises(ValueError, match="200001 characters; 200000 are allowed"):
        exec(rebuilt.notebook.cells[0].source)


def test_too_many_cells_are_left_out():
    rebuilt = solved("x = 1", *(["pass"] * (intake.OWN + 7)))
    assert len(rebuilt.notebook.cells) == intake.OWN + 2 and any("7 of the student's own" in n for n in rebuilt.notes)


def test_a_changed_check_is_said():
    release, changed = released(), released()
    release.cells[0].metadata.tags = ["check"]
    changed.cells[0].source = "10.0"
    rebuilt = intake.rebuild(release, changed)
    assert rebuilt.notebook.cells == release.cells and "the check 'coupling' was changed" in rebuilt.notes[0]


# --- folders and archives --------------------------------------------------------------------------------------------

def test_names_that_are_no_text(tmp_path):
    for name in (b"\xff\xfe", b"caf\xe9"):
        (tmp_path / os.fsdecode(name) / "02").mkdir(parents=True)
        (tmp_path / os.fsdecode(name) / "02" / "02.ipynb").write_text("{}")
    (tmp_path / "ann" / "02" / os.fsdecode(b"\xff.txt")).mkdir(parents=True)
    found = {s.student: s for s in intake.find(tmp_path, ["02"])}
    assert set(found) == {"\\xff\\xfe", "caf\\xe9", "ann"} and found["caf\\xe9"].path.read_text() == "{}"
    assert "\\xff.txt" in found["ann"].note and found["ann"].note.encode()


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "class" / "ann" / "02").mkdir(parents=True)
    (tmp_path / "class" / "ann" / "02" / "02.ipynb").symlink_to(tmp_path / "secret")
    (submission,) = intake.find(tmp_path / "class", ["02"])
    assert submission.path is None and "is a link" in submission.note
    with pytest.raises(OSError):
        intake.load(tmp_path / "class" / "ann" / "02" / "02.ipynb")     # were it made between the look and the reading
