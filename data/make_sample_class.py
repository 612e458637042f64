"""Writes data/sample_class/: synthetic submissions of lesson 02, and what their author meant them to get.

    python data/make_sample_class.py            write the class
    python data/make_sample_class.py --check    exit 1 if what lies there is not what this script writes

No student stands behind these notebooks. Each is the released notebook with answers put in: the lesson's own where
nothing is said, others where the submission is meant to show something. `expected.csv` is written from the intentions
stated here, never from a run of the grader; a test compares the two.
"""
import argparse
import csv
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from autograder import build, files  # noqa: E402

LESSON = "02_coupling"
PLACE = ROOT / "data" / "sample_class"

COUPLING_HEAD = '''class Coupling(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
'''

# --- right, in ways of their own ---

PAIR = '''class Coupling(nn.Module):
    """My net is a pair of nets; alpha is kept between -2 and 2, so that training cannot run away."""

    def __init__(self, net):
        super().__init__()
        self.s, self.t = net

    def halves(self, v):
        d = v.shape[1] // 2
        return torch.split(v, [d, v.shape[1] - d], dim=1)

    def forward(self, x):
        a, b = self.halves(x)
        s = 2 * torch.tanh(self.s(a) / 2)
        return torch.hstack((a, b * torch.exp(s) + self.t(a))), torch.sum(s, 1)

    def inverse(self, z):
        with torch.no_grad():
            a, b = self.halves(z)
            s = 2 * torch.tanh(self.s(a) / 2)
            return torch.hstack((a, (b - self.t(a)) / torch.exp(s)))
'''
PAIR_NETS = '''def make_net():
    def one():
        net = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 1))
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
        return net
    return one(), one()
'''
MASKS = '''class Coupling(nn.Module):
    """With masks; my net says mu first and alpha second."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def ask(self, v):
        first = torch.arange(v.shape[1]) < v.shape[1] // 2
        mu, alpha = self.net(v[:, first]).chunk(2, 1)
        wide = torch.zeros_like(v)
        shift, log_scale = wide.clone(), wide.clone()
        shift[:, ~first], log_scale[:, ~first] = mu, alpha
        return shift, log_scale

    def forward(self, x):
        shift, log_scale = self.ask(x)
        return x * log_scale.exp() + shift, log_scale.sum(1)

    def inverse(self, z):
        shift, log_scale = self.ask(z)
        return (z - shift) * torch.exp(-log_scale)
'''
ARGSORT_BY_HAND = '''class Permute(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = [int(i) for i in order]
        self.back = [self.order.index(j) for j in range(len(self.order))]

    def forward(self, x):
        return torch.stack([x[:, j] for j in self.order], 1), torch.zeros(x.shape[0])

    def inverse(self, z):
        return torch.stack([z[:, j] for j in self.back], 1)
'''

# --- wrong ---

INVERSE_SIGN = COUPLING_HEAD + '''
    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        alpha, mu = self.net(x1).chunk(2, dim=1)
        return torch.cat([x1, x2 * torch.exp(alpha) + mu], 1), alpha.sum(1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        alpha, mu = self.net(z1).chunk(2, dim=1)
        return torch.cat([z1, (z2 - mu) * torch.exp(alpha)], 1)
'''
KEPT_DIMENSION = COUPLING_HEAD + '''
    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        alpha, mu = self.net(x1).chunk(2, dim=1)
        return torch.cat([x1, x2 * alpha.exp() + mu], 1), alpha.sum(1, keepdim=True)

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        alpha, mu = self.net(z1).chunk(2, dim=1)
        return torch.cat([z1, (z2 - mu) / alpha.exp()], 1)
'''
TWO_AT_ONCE = COUPLING_HEAD + '''
    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        alpha, mu = self.net(x1).chunk(2, dim=1)
        z2 = x2 * alpha.exp() + mu
        return torch.cat([x1, z2], 1), -alpha.sum(1)      # log det of the layer

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        alpha, mu = self.net(z1).chunk(2, dim=1)
        return torch.cat([z1, z2 / alpha.exp()], 1)
'''
SELF_INVERSE = '''class Permute(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x[:, self.order], torch.zeros(len(x))

    def inverse(self, z):
        return self.forward(z)[0]
'''
UPHILL = '''def train_flow(flow, batches, lr):
    opt = torch.optim.Adam(flow.parameters(), lr)
    losses = []
    for batch in batches:
        opt.zero_grad()
        loss = flow.log_prob(batch).mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses
'''
ENDLESS = '''def train_flow(flow, batches, lr):
    opt = torch.optim.Adam(flow.parameters(), lr)
    losses = []
    batch = next(iter(batches))
    while True:          # until the loss is zero
        loss = -flow.log_prob(batch).mean()
        if loss == 0:
            return losses
'''
CRASH = '''import os

class Permute(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

os._exit(1)
'''
REFERENCE = '''from flowkit.coupling import Coupling
'''
NO_BONUS = {"bonus_study": None, "bonus_study_text": None}
OWN_CODE = ("code", "x = torch.linspace(-1, 1, 5)\nprint(x)\nplt.plot(x)   # why does this not work?")
OWN_TEXT = ("markdown", "**Question for the exercise class:** must the two halves be equally large?")


@dataclass
class Student:
    """One synthetic submission: what is answered, and what it should get.

    `answers`: exercise -> text, None for an unsolved one; all others are answered as in the lesson's own solution.
    `expected`: exercise -> (status, score, diagnosis); all others get full points, or what `everything` says. Only the
    bonus study uses other answers, so only it can suffer from them.
    """

    name: str
    answers: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    everything: str = "ok"
    solved: bool = True
    extra: tuple = ()  # (id of the cell that it follows, kind, text)
    damage: object = None  # text of the notebook -> text of the file


CLASS = (
    Student("ada"),
    Student("bela", {"coupling": PAIR, "make_net": PAIR_NETS}, extra=(("make_net", *OWN_TEXT),)),
    Student("chen", {"coupling": MASKS, "permute": ARGSORT_BY_HAND}),
    # inverse multiplies by exp(alpha) again: it costs the two points of the round trip
    Student("dora", {"coupling": INVERSE_SIGN}, {"coupling": ("wrong", 8, "inverse_alpha_sign")}),
    # ldj is (B, 1): it costs the point for shapes, and nothing else, since the numbers are right
    Student("emil", {"coupling": KEPT_DIMENSION}, {"coupling": ("wrong", 9, "ldj_keepdim")}),
    # inverse forgets mu (two points) and ldj has the wrong sign (two points)
    Student("fay", {"coupling": TWO_AT_ONCE}, {"coupling": ("wrong", 6, "inverse_no_mu+ldj_sign")}),
    # goes uphill: no points for the losses (2), the direction (3), the fit (2); a permutation undone by itself (2)
    Student("gus", {"permute": SELF_INVERSE, "train_flow": UPHILL} | NO_BONUS,
            {"permute": ("wrong", 3, "inverse_same_order"), "train_flow": ("wrong", 3, "loss_sign")}),
    Student("hana", solved=False, everything="unsolved", extra=(("coupling", *OWN_CODE),)),
    # the kernel dies in the third exercise: the two before it keep their points, what is solved after it cannot be run
    Student("ivan", {"coupling": INVERSE_SIGN, "make_net": PAIR_NETS, "permute": CRASH, "train_flow": UPHILL},
            {"coupling": ("wrong", 8, "inverse_alpha_sign"), "make_net": ("ok", None, ""), "permute": ("killed", 0, ""), "train_flow": ("killed", 0, "")},
            solved=False, everything="unsolved"),
    # one exercise never ends; the others are not touched by it
    Student("jun", {"train_flow": ENDLESS} | NO_BONUS, {"train_flow": ("timeout", 0, "")}),
    # an import of the reference is refused
    Student("kim", {"coupling": REFERENCE} | NO_BONUS, {"coupling": ("error", 0, "")}),
    Student("lea", everything="invalid", damage=lambda text: text[:len(text) // 3]),
    Student("mo", everything="missing", damage=lambda text: None),
)


def submission(student, solved):
    """The notebook that a student hands in."""
    nb = build.release(solved)
    own = {c.id: clean(c.source) for c in solved.cells if "solution" in c.metadata.get("tags", [])}
    cells = []
    for cell in nb.cells:
        if cell.id in own:
            answer = student.answers.get(cell.id, own[cell.id] if student.solved else None)
            cell.source = cell.source if answer is None else answer.strip("\n")
        cells.append(cell)
        for n, (_, kind, text) in enumerate(e for e in student.extra if e[0] == cell.id):
            make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
            cells.append(make(text, id=f"{student.name}-{cell.id}-{n}"))
    nb.cells = cells
    return nbformat.writes(nb) + "\n"


def clean(text):
    """The lesson's own solution as a student would have written it: without markers and without the error at the end."""
    lines = [line for line in text.splitlines() if line.strip() not in (build.BEGIN, build.END) and "raise NotImplementedError(" not in line]
    return "\n".join(lines).strip("\n")


def expected(solved):
    """The rows of expected.csv."""
    lesson = build.exercise.assignment(LESSON)
    records = {e.id: e for e in lesson.EXERCISES}
    names = [c.id for c in solved.cells if "solution" in c.metadata.get("tags", [])]
    for student in CLASS:
        for name in names:
            usual = "unsolved" if student.answers.get(name, "") is None else student.everything
            status, score, diagnosis = student.expected.get(name, (usual, None, ""))
            if name in lesson.TEXTS:  # read by a person; the unsolved ones hold nothing to read
                most = lesson.TEXTS[name]
                status = "manual" if status == "ok" else status
                score = "" if status == "manual" else 0
            else:
                most = records[name].max_score
                score = (records[name].points if status == "ok" else 0) if score is None else score
            yield student.name, LESSON, name, score if score == "" else f"{score:g}", f"{most:g}", status, diagnosis


def write(place):
    """Write the whole class into the folder `place`, which is replaced."""
    solved = build.solved(ROOT / "solutions" / f"{LESSON}.py")
    if place.exists():
        shutil.rmtree(place)
    for student in CLASS:
        folder = place / student.name
        text = submission(student, solved)
        text = student.damage(text) if student.damage else text
        if text is None:
            files.write(folder / "sorry.txt", "I was ill this week.\n")
        else:
            files.write(folder / LESSON / f"{LESSON}.ipynb", text)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("student", "assignment", "exercise", "score", "max_score", "status", "diagnosis"))
    writer.writerows(expected(solved))
    files.write(place / "expected.csv", table.getvalue())


def contents(place):
    """Path inside `place` -> bytes, of every file."""
    return {p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def main():
    parser = argparse.ArgumentParser(description="Write data/sample_class/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the class is out of date")
    if not parser.parse_args().check:
        write(PLACE)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        write(Path(fresh) / "class")
        if contents(Path(fresh) / "class") != contents(PLACE):
            print("data/sample_class/ is out of date: run python data/make_sample_class.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
