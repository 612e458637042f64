"""What people read: nothing of a student's runs in the reader's browser, and nothing is hidden from the reader."""
import re
import sqlite3
import threading
import time

import nbformat
import pytest
from nbgrader.api import Gradebook

from autograder import build, grade, gradebook, render, report

LESSON = "02_coupling"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>"


@pytest.fixture(scope="module")
def release():
    return grade.releases(build.ROOT / "lessons")[LESSON]


def result(release, student="ann", key="aaaa-b-c-1", status="ok", note=""):
    verdicts = [release.blank(t, "manual" if isinstance(t, str) else status, note) for t in release.tasks]
    for v in verdicts:
        v.score = v.points if v.status == "ok" else 0.0
    return grade.Result(student, LESSON, key, 60, verdicts)


def page_of(release, source="x = 1", outputs=(), kind="code", **options):
    nb = nbformat.from_dict(release.notebook)
    cell = next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "coupling")
    cell.source, cell.outputs = source, list(outputs)
    extra = nbformat.v4.new_markdown_cell(HOSTILE, metadata={"tags": ["extra"]}, attachments={"a.svg": {"image/svg+xml": HOSTILE}})
    nb.cells.append(extra)
    r = result(release, **options)
    return report.feedback(r, release, nb, {v.exercise: render.page(v) for v in r.verdicts})


def stream(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def display(**data):
    return nbformat.v4.new_output("display_data", {k.replace("_", "/").replace("svg", "svg+xml"): v for k, v in data.items()})


def test_nothing_of_a_student_runs(release):
    page = page_of(release, f"'''{HOSTILE}'''", [
        stream(HOSTILE), display(text_html=HOSTILE), display(image_svg=HOSTILE), display(text_plain=HOSTILE), display(application_javascript="alert(3)"),
        display(image_png=f'"><script>{HOSTILE}'), nbformat.v4.new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE])],
        student=HOSTILE, status="wrong", note=HOSTILE)
    assert not re.search(r"<(script|img src=x|svg|iframe)", page) and page.count("<style>") == 1 and "alert(3)" not in page
    assert "default-src 'none'" in page and "&lt;script&gt;" in page


def test_what_would_not_be_seen_is_marked(release):
    hidden = "a\u202eb\u2066c\x00d\x07e\ud800f"
    page = page_of(release, hidden, [stream(hidden)], note=hidden, status="wrong", student="a\u202eb")
    page.encode("utf-8")
    assert not set("\u202e\u2066\x00\x07") & set(page) and "a\ufffdb" in page


def test_colours_and_progress_bars_are_tidied_away(release):
    page = page_of(release, outputs=[stream("\x1b[1;31mred\x1b[0m\x1b[?25l\n 10%\r 50%\r100%\nlast\r\n")])
    assert ">red\n100%\nlast<" in page


def test_huge_outputs_are_cut(release):
    page = page_of(release, "y = 2\n" * 100_000, [stream("z" * 10**7)] + [stream("w")] * 5000)
    assert len(page) < 3_000_000 and "more characters)" in page and "more outputs)" in page


def test_a_file_that_could_not_be_read_is_said_once(release):
    r = grade.Result("ann", LESSON, "aaaa-b-c-1", 60, [release.blank(t, "invalid", "no notebook") for t in release.tasks])
    page = report.feedback(r, release, nbformat.from_dict(release.notebook), {v.exercise: render.page(v) for v in r.verdicts})
    assert page.count("no notebook") == 1 and "your code here" not in page, "the release's stubs are not the student's answers"


def test_the_report_of_a_large_class_is_foldable_and_leads_to_everyone(release):
    results = [result(release, f"s{i:03}", f"{i:04}-b-c-1", ("ok", "wrong", "killed")[i % 3]) for i in range(100)]
    page = report.report({LESSON: release}, results, gradebook.table({LESSON: release}, results, {}))
    assert "<script" not in page and "<details><summary>All 100 students" in page
    assert all(f'href="#{name}"' in page and f'id="{name}"' in page for name in ("person", "misconceptions", "alike", LESSON))
    assert all(f"feedback/s{i:03}/" in page for i in range(100))


def test_marks_of_a_person_stay(release, tmp_path):
    def book():
        return Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}")

    used, r = {LESSON: release}, result(release, status="wrong")
    assert gradebook.write(tmp_path, used, [r]) == {}
    with book() as b:
        marked, extra = (b.find_grade(f"{e}_check", LESSON, LESSON, "ann") for e in ("coupling", "permute"))
        marked.manual_score, marked.extra_credit, marked.needs_manual_grade, extra.extra_credit = 7.0, 1.0, False, 0.5
        b.find_grade("bonus_study_text", LESSON, LESSON, "ann").extra_credit = 1.5  # its maximum is 0: there is no other way to give it points
        b.find_comment("coupling", LESSON, LESSON, "ann").manual_comment = "well tried"
        b.db.commit()
    kept = {("ann", LESSON, "coupling"): 8.0, ("ann", LESSON, "permute"): 0.5, ("ann", LESSON, "bonus_study_text"): 1.5}
    assert gradebook.write(tmp_path, used, [r]) == kept
    again = result(release, key="bbbb-b-c-1", status="ok")
    assert gradebook.write(tmp_path, used, [again])["ann", LESSON, "coupling"] == 8.0
    with book() as b:
        marked, other = (b.find_grade(f"{e}_check", LESSON, LESSON, "ann") for e in ("coupling", "make_net"))
        assert (marked.manual_score, marked.extra_credit, marked.needs_manual_grade, marked.auto_score) == (7.0, 1.0, True, marked.max_score)
        assert (other.auto_score, other.needs_manual_grade) == (other.max_score, False)
        assert b.find_comment("coupling", LESSON, LESSON, "ann").comment == "well tried"
    gone = result(release, key="", status="missing")
    assert gradebook.write(tmp_path, used, [gone])["ann", LESSON, "coupling"] == 8.0, "a mark survives a file that vanished"


def test_only_what_changed_is_written(release, tmp_path):
    used, results = {LESSON: release}, [result(release, s, f"{s}-b-c-1") for s in ("ann", "bob")]
    gradebook.write(tmp_path, used, results)
    with sqlite3.connect(tmp_path / "gradebook.db") as b:
        before = list(b.iterdump())
    gradebook.write(tmp_path, used, results)
    with sqlite3.connect(tmp_path / "gradebook.db") as b:
        assert list(b.iterdump()) == before


def test_a_write_that_is_broken_off_changes_nothing(release, tmp_path, monkeypatch):
    used = {LESSON: release}
    gradebook.write(tmp_path, used, [result(release)])
    real = gradebook.handed_in

    def broken(db, name, kind, *columns):
        if kind is gradebook.api.Comment:   # after the rows were made, before the grades are changed
            raise KeyboardInterrupt
        return real(db, name, kind, *columns)

    monkeypatch.setattr(gradebook, "handed_in", broken)
    with pytest.raises(KeyboardInterrupt):
        gradebook.write(tmp_path, used, [result(release, "bob"), result(release, key="bbbb-b-c-1", status="wrong")])
    with sqlite3.connect(tmp_path / "gradebook.db") as b:
        assert b.execute("SELECT student, version FROM autograder_booked").fetchall() == [("ann", "aaaa")]
        assert b.execute("SELECT count(*) FROM submitted_assignment").fetchone() == (1,)


def test_a_gradebook_in_use_is_waited_for(release, tmp_path):
    used, path = {LESSON: release}, tmp_path / "gradebook.db"
    gradebook.write(tmp_path, used, [])
    held = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    held.execute("BEGIN EXCLUSIVE")
    with pytest.raises(gradebook.GradebookError, match="another program .* for more than 0.2 seconds"):
        gradebook.write(tmp_path, used, [result(release)], patience=0.2)
    threading.Thread(target=lambda: (time.sleep(0.5), held.execute("ROLLBACK"))).start()
    gradebook.write(tmp_path, used, [result(release)])
    with Gradebook(f"sqlite:///{path}") as b:
        assert b.find_submission(LESSON, "ann").score > 0
    held.close()


def test_a_damaged_gradebook_gets_a_sentence(release, tmp_path):
    (tmp_path / "gradebook.db").write_text("no database at all" * 100)
    with pytest.raises(gradebook.GradebookError, match="cannot be written"):
        gradebook.write(tmp_path, {LESSON: release}, [])
