"""A hostile class is graded: the attacker gets no more than its honest score, no neighbour changes, no process stays, row and status are right."""
import contextlib
import csv
import html
import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hostile import ATTACKS, LESSON, WRONG  # noqa: E402

from autograder import build, exercise, sandbox  # noqa: E402

# Names of folders, as a learning platform or a mischievous student makes them; what is not UTF-8 is written out.
ODD = {'é <b>&"o\'dd"': None, "..x": None, "=1+1": None, "two\nlines": None, "\u202egpj": None, "x" * 200: None, "%2e%2e": None,
       b"\xff\xfe": "\\xff\\xfe", "-rf": None, "{{7*7}}": None}
ODD = {name: said or name for name, said in ODD.items()}
SECONDS = 2

pytestmark = pytest.mark.slow


def answers(release, solved, attack=None, out="", place=""):
    """The notebook of a student: `permute` of the lesson, a wrong `coupling`, and the attack."""
    nb = nbformat.from_dict(release)
    cells = {c.id: c for c in nb.cells}
    cells["permute"].source = next(c.source for c in solved.cells if c.id == "permute")
    parts = [WRONG] if attack is None else [attack.before, WRONG, attack.after]
    cells["coupling"].source = "\n".join(p for p in parts if p).replace("@OUT@", out).replace("@CLASS@", place)
    if attack is not None and attack.own:
        nb.cells.insert(3, nbformat.v4.new_code_cell(attack.own))
    if attack is not None and attack.change is not None:
        attack.change(nb)
    return nb


def hand_in(folder, student, data):
    place = folder / os.fsdecode(student) / LESSON
    place.mkdir(parents=True)
    (place / f"{LESSON}.ipynb").write_bytes(data)


def left_over(mark):
    """Processes of a grading run: ours have its TMPDIR in their environment, what they forked too; what a student started sleeps so long."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if mark.encode() in (process / "environ").read_bytes() or b"61728" in command:
                found.append((process.name, command))
    return found


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    place, out = root / "class", root / "out"
    (source,) = build.sources([LESSON])
    solved = build.solved(source)
    release = build.release(solved)
    students = {}
    for i, (name, attack) in enumerate(ATTACKS.items()):
        if i % 8 == 0:
            students[f"honest-{i // 8}"] = answers(release, solved)
        students[name] = answers(release, solved, attack, str(out), str(place))
    students |= {name: answers(release, solved) for name in ODD}
    for student, nb in students.items():
        data = nbformat.writes(nb).encode()
        attack = ATTACKS.get(student)
        hand_in(place, student, attack.file(data) if attack is not None and attack.file else data)
    (root / "secret.txt").write_text("another's secret")
    for student, target in (("link to a file", root / "secret.txt"), ("link to a neighbour", place / "honest-0" / LESSON / f"{LESSON}.ipynb")):
        (place / student / LESSON).mkdir(parents=True)
        (place / student / LESSON / f"{LESSON}.ipynb").symlink_to(target)
    (place / "link to a folder").symlink_to(root)
    (place / "misnamed" / LESSON).mkdir(parents=True)
    (place / "misnamed" / LESSON / "Untitled (1).ipynb").write_bytes(nbformat.writes(students["honest-0"]).encode())
    (place / "nothing").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(build.ROOT), "OMP_NUM_THREADS": "1", "MY_SECRET_TOKEN": "x", "TMPDIR": str(root / uuid.uuid4().hex)}
    Path(environment["TMPDIR"]).mkdir()
    mounts, shared = Path("/proc/self/mountinfo").read_text(), sorted(os.listdir("/dev/shm"))
    run = subprocess.run([sys.executable, "-m", "autograder", "grade", str(place), "--out", str(out), "--release", str(build.ROOT / "lessons"),
                          "--timeout", str(SECONDS), "--seed", "11", "--workers", "2"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "the grader itself failed" not in run.stderr
    end = time.monotonic() + 5
    while (processes := left_over(environment["TMPDIR"])) and time.monotonic() < end:
        time.sleep(0.1)
    stays = {"processes": processes, "files": [n for n in os.listdir(environment["TMPDIR"]) if not n.startswith("torchinductor")],    # torch's own, of importing it
             "mounts": Path("/proc/self/mountinfo").read_text() != mounts, "shared memory": [n for n in os.listdir("/dev/shm") if n not in shared and "core_pattern" in n]}
    with open(out / "grades.csv", newline="", encoding="utf-8") as file:
        table = {(r["student"], r["exercise"]): r for r in csv.DictReader(file)}
    return place, out, table, stays


def test_this_machine_confines():
    assert sandbox.missing() == {}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attacker_gets_no_more_than_its_honest_score(graded, name):
    _, _, table, _ = graded
    for e in exercise.assignment(LESSON).EXERCISES:
        mine, honest = table[name, e.id], table["honest-0", e.id]
        assert float(mine["score"] or 0) <= float(honest["score"] or 0), (e.id, mine)
        assert mine["max_score"] == honest["max_score"]
    attack = ATTACKS[name]
    for e, status in (("coupling", attack.coupling), ("permute", attack.permute)):
        assert not status or table[name, e]["status"] == status, table[name, e]
    if attack.coupling == "wrong":
        assert table[name, "coupling"] == {**table["honest-0", "coupling"], "student": name}, "no more, and no less"


def test_no_neighbour_changes(graded):
    place, out, table, _ = graded
    honest = [s for s in sorted({s for s, _ in table}) if s.startswith("honest-") or s in ODD.values()]
    assert len(honest) > 8 + len(ODD)
    for student in honest:
        assert {e: {**r, "student": ""} for (s, e), r in table.items() if s == student} == {
            e: {**r, "student": ""} for (s, e), r in table.items() if s == "honest-0"}
        assert (out / "feedback" / student / LESSON / f"{LESSON}.html").exists()
    assert float(table["honest-0", "permute"]["score"]) == float(table["honest-0", "permute"]["max_score"])
    assert 0 < float(table["honest-0", "coupling"]["score"]) < float(table["honest-0", "coupling"]["max_score"])


def test_nothing_stays(graded):
    assert graded[3] == {"processes": [], "files": [], "mounts": False, "shared memory": []}


def test_links_and_names(graded):
    place, out, table, _ = graded
    for student, word in (("link to a file", "missing"), ("link to a neighbour", "missing"), ("link to a folder", "missing"), ("misnamed", "missing"), ("nothing", "missing")):
        assert table[student, "coupling"]["status"] == word and table[student, "coupling"]["score"] in ("0", "")
    assert "another's secret" not in "".join(p.read_text("utf-8") for p in out.rglob("*.html"))


def test_nothing_active_reaches_a_reader(graded):
    _, out, _, _ = graded
    for path in [out / "report.html", *out.glob("feedback/*/*/*.html")]:
        page = path.read_text("utf-8").lower()
        tags = set(re.findall(r"<[a-z!/?][^\s/>]*", page))
        assert not tags & {"<script", "<iframe", "<object", "<embed", "<form", "<link", "<base"}, path
        assert not re.search(r"<[^<>]*\s(on\w+\s*=|href\s*=\s*[\"']?\s*javascript:|src\s*=\s*[\"']?http)[^<>]*>", page), path
        assert not set(page) & {chr(n) for n in (0, 7, 0x1b, 0x9b)}, path
        assert str(build.ROOT).lower() not in page


def test_everything_is_recorded_and_listed(graded):
    _, out, table, _ = graded
    lines = [json.loads(line) for line in (out / ".grading" / "results.jsonl").read_text("utf-8").splitlines()]
    assert {r["student"] for r in lines} >= set(ATTACKS)
    report = (out / "report.html").read_text("utf-8")
    people = html.unescape(report.split("Submissions that need a person")[1])
    for student in {s for (s, _), r in table.items() if r["status"] not in ("ok", "wrong", "unsolved", "manual")}:
        assert student in people
