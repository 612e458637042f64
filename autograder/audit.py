"""How good are our checks? Four figures for each exercise, which anyone can measure.

    python -m autograder audit [exercise ...] [--out DIR] [--fast]

- kill rate: of the wrong programs made from the solution (autograder.mutate: one fault each, and pairs), how many lose points;
- named rate: of these, how many are told a kind and a place of fault that the mutant really has;
- false rejects: of the right programs in autograder/rights, how many lose points;
- crashes: of random return values and exceptions (autograder.fuzz), how many get out of the checker as anything but a sentence.

A mutant whose outputs are the solution's on several draws of the inputs is no wrong program; it is set aside and listed by name, for a
person to confirm. Leaves audit.csv and audit.html in DIR.
"""
import ast
import contextlib
import csv
import html
import io
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

FIELDS = ("exercise", "mutants", "killed", "named", "rights", "false_rejects", "inputs", "crashes")
SECONDS = 30        # for one program: a mutant may loop for long
DRAWS = 5           # of the inputs, before a survivor counts as equivalent
FULL = {"pairs": 20, "inputs": 2000, "seeds": (0, 1, 2)}
FAST = {"pairs": 3, "inputs": 100, "seeds": (0,)}
TRAINS = {"train_flow", "bonus_study", "make_net"}     # a tenth of the inputs, since each takes seconds


@dataclass
class Audit:
    """What was found for one exercise; the lists hold what a person should look at."""
    exercise: str
    killed: int = 0
    named: int = 0
    survivors: list = field(default_factory=list)       # names of mutants that keep all points
    equivalent: list = field(default_factory=list)      # those whose outputs are the solution's
    unnamed: list = field(default_factory=list)         # (mutant, diagnosis, sentences)
    rights: int = 0
    rejects: list = field(default_factory=list)         # (right program, seed, what it was told)
    inputs: int = 0
    crashes: list = field(default_factory=list)         # (description, traceback)

    @property
    def mutants(self):
        return self.killed + len(self.survivors)

    @property
    def row(self):
        return dict(zip(FIELDS, (self.exercise, self.mutants, self.killed, self.named, self.rights, len(self.rejects), self.inputs, len(self.crashes))))


class Lesson:
    """The solved lesson as a namespace, with the source of each solution and what its check is given."""

    def __init__(self, source):
        from autograder import build

        self.space, self.solutions, self.arguments = {"__name__": "lesson"}, {}, {}
        for cell in build.solved(source).cells:
            tags, name = cell.metadata.get("tags", []), cell.metadata.get("nbgrader", {}).get("grade_id", "")
            if cell.cell_type != "code":
                continue
            if tags[0] in ("setup", "solution"):
                exec(cell.source, self.space)
            if tags[0] == "solution":
                self.solutions[name] = cell.source
            elif tags[0] == "check":
                call = ast.parse(cell.source.strip()).body[-1].value
                self.arguments[call.args[0].value] = ast.unparse(ast.Tuple(call.args[1:], ast.Load()))

    def objects(self, exercise, code):
        """What a student with this code hands to the check."""
        space = dict(self.space)
        exec(code, space)
        return eval(self.arguments[exercise], space)


@contextlib.contextmanager
def limited(seconds=SECONDS):
    """Ends what takes too long by an exception in the program, as a person's stop button would."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outputs(exercise, objects, seed):
    """The probe's arrays, or None if not even the objects could be made."""
    from autograder import judge

    with limited():
        try:
            answer = objects()
        except Exception:      # a mutant that cannot be defined is as dead as can be
            return None
        return exercise.probe(answer, judge.bank(exercise, seed).inputs)


def same_outputs(exercise, a, b):
    from autograder import judge

    return a is not None and b is not None and a.keys() == b.keys() and all(judge.same(a[k], b[k]) for k in a)


def mutants(lesson, exercise, found, pairs):
    from autograder import judge, mutate

    code, draws = lesson.solutions[exercise.id], range(1 if exercise.id in TRAINS else DRAWS)
    right = {seed: outputs(exercise, lambda: lesson.objects(exercise.id, code), seed) for seed in draws}
    for mutant in mutate.mutants(code, pairs, random.Random(exercise.id)):
        arrays = outputs(exercise, lambda: lesson.objects(exercise.id, mutant.code), 0)
        if arrays is None:
            found.killed, found.named = found.killed + 1, found.named + 1      # Python itself names the line
            continue
        verdict = judge.judge(exercise, 0, arrays)
        if verdict.score == exercise.points:
            equal = all(same_outputs(exercise, outputs(exercise, lambda: lesson.objects(exercise.id, mutant.code), seed), right[seed])
                        for seed in draws)
            (found.equivalent if equal else found.survivors).append(mutant.name)
            continue
        found.killed += 1
        if any(kind in edit.kinds and place in edit.places for kind, place in verdict.faults for edit in mutant.edits):
            found.named += 1
        else:
            found.unnamed.append((mutant.name, verdict.diagnosis, verdict.sentences))


def right_answers(exercise, found, seeds):
    from autograder import judge, rights

    answers = rights.table().get(exercise.id, ())
    found.rights = len(answers)
    for objects in answers:
        for seed in seeds:
            verdict = judge.judge(exercise, seed, outputs(exercise, lambda: objects, seed))
            if verdict.score < exercise.points:
                found.rejects.append((getattr(objects[0], "__name__", str(objects[0])), seed, " ".join(verdict.sentences)))
                break


def audit(names=(), fast=False, root=None):
    """[Audit, ...] of the exercises of those names, or of all."""
    from tqdm import tqdm

    from autograder import build, exercise, fuzz

    os.environ["FLOWKIT_FAST"] = "1"
    size = FAST if fast else FULL
    unknown = sorted(set(names) - set(exercise.registry()))
    if unknown:
        raise ValueError(f"there is no exercise {unknown[0]!r}; there are: {', '.join(exercise.registry())}")
    results = []
    for source in build.sources(root=root or build.ROOT):
        lesson = Lesson(source)
        chosen = [e for e in exercise.assignment(source.stem).EXERCISES if not names or e.id in names]
        for e in tqdm(chosen, desc=source.stem, unit="exercise"):
            found = Audit(e.id)
            mutants(lesson, e, found, size["pairs"])
            right_answers(e, found, size["seeds"])
            found.inputs = size["inputs"] // (10 if e.id in TRAINS else 1)
            found.crashes = fuzz.crashes(e.id, found.inputs)
            results.append(found)
    return results


def percent(part, whole):
    return f"{100 * part / whole:5.1f}%" if whole else "     -"


def table(results):
    """The figures as text."""
    lines = [f"{'exercise':20s} {'killed':>14s} {'':6s} {'named':>11s} {'':6s} {'false rejects':>14s} {'crashes':>13s}"]
    for a in results:
        lines.append(f"{a.exercise:20s} {a.killed:6d} of {a.mutants:4d} {percent(a.killed, a.mutants)} {a.named:11d} {percent(a.named, a.killed)} "
                     f"{len(a.rejects):6d} of {a.rights:4d} {len(a.crashes):5d} of {a.inputs:4d}")
    killed, all_, named = (sum(getattr(a, k) for a in results) for k in ("killed", "mutants", "named"))
    lines.append(f"{'all':20s} {killed:6d} of {all_:4d} {percent(killed, all_)} {named:11d} {percent(named, killed)}")
    return "\n".join(lines)


def write(results, folder):
    """audit.csv and audit.html."""
    from autograder import files

    text = io.StringIO()
    rows = csv.DictWriter(text, FIELDS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(a.row for a in results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "audit.csv", text.getvalue())
    files.write(folder / "audit.html", page(results))


def bars(results):
    """Kill rate and named rate of each exercise, as a picture (SVG); the strokes are the goals."""
    height, left, width = 34, 170, 420
    parts = []
    for i, a in enumerate(results):
        y = 10 + i * height
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{html.escape(a.exercise)}</text>')
        for k, (value, whole, colour) in enumerate(((a.killed, a.mutants, "#3b6fb6"), (a.named, a.killed, "#e0a030"))):
            share = value / whole if whole else 0
            parts.append(f'<rect x="{left}" y="{y + 12 * k}" width="{width * share:.1f}" height="11" fill="{colour}"><title>{value} of {whole}</title></rect>')
            parts.append(f'<text x="{left + width + 8}" y="{y + 12 * k + 10}" font-size="11">{100 * share:.0f}%</text>')
    total = 20 + height * len(results)
    for goal in (0.99, 0.85):
        parts.append(f'<line x1="{left + width * goal}" x2="{left + width * goal}" y1="4" y2="{total - 8}" stroke="#444" stroke-dasharray="3 3"/>')
    return f'<svg width="{left + width + 60}" height="{total}" font-family="sans-serif" font-size="14" role="img" aria-label="kill and named rates">{"".join(parts)}</svg>'


def page(results):
    """The audit as one HTML page: the picture, the figures, and what a person should look at."""
    def items(title, entries):
        return f"<details><summary>{title} ({len(entries)})</summary><ul>" + "".join(f"<li>{html.escape(e)}</li>" for e in entries) + "</ul></details>" if entries else ""

    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Audit of the checks</title>",
             "<style>body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} pre{overflow:auto} li{overflow-wrap:anywhere}</style>",
             "<h1>Audit of the checks</h1><p>Blue: wrong programs that lose points (goal 99%). Yellow: of these, told a kind and a place of fault that is theirs "
             "(goal 85%).</p>", bars(results), f"<pre>{html.escape(table(results))}</pre>"]
    for a in results:
        parts.append(f"<h2>{html.escape(a.exercise)}</h2>")
        parts.append(items("Wrong programs that keep all points", a.survivors))
        parts.append(items("Equivalent to the solution, to be confirmed", a.equivalent))
        parts.append(items("Killed, but not named", [f"{name}: told {' '.join(said)} [{', '.join(ids) or 'no diagnosis'}]" for name, ids, said in a.unnamed]))
        parts.append(items("Right programs that lose points", [f"{name} (seed {seed}): {said}" for name, seed, said in a.rejects]))
        parts.append(items("Crashes", [f"{what}: {trace}" for what, trace in a.crashes]))
    return "\n".join(parts) + "</html>"


def main(names, out, fast):
    results = audit(names, fast)
    print(table(results))
    if out:
        write(results, out)
        print(f"{out}/audit.html", file=sys.stderr)
    return 0
