"""How good are our checks? Four figures for each exercise, which anyone can measure.

    python -m autograder audit [exercise ...] [--out DIR] [--fast]

- kill rate: of the wrong programs made from the solution (autograder.mutate: one fault each, and pairs), how many lose points;
- named rate: of these, how many are told a kind and a place of fault that the mutant really has;
- false rejects: of the right programs in autograder/rights, how many lose points;
- crashes: of random return values and exceptions (autograder.fuzz), how many get out of the checker as anything but a sentence.

A mutant whose outputs are the solution's on several draws of the inputs is no wrong program; it is set aside and listed by name, for a
person to confirm. One that differs but is right as well stands in CONFIRMED of autograder/rights, with the reason. Leaves audit.csv and
audit.html in DIR, and exits with 1 if a goal is missed. An exercise whose points count for nothing (a bonus, which a person reads) has no goal
but the last two.
"""
import ast
import contextlib
import csv
import html
import io
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from autograder import slips
from autograder.check import captured
from autograder.exercise import Outputs

FIELDS = ("exercise", "mutants", "killed", "named", "rights", "false_rejects", "inputs", "crashes")
SECONDS = 60        # of processor time for one program: a mutant may loop for long
ENDLESS = 30        # times the operations of the solution: then a program is one that never ends
DRAWS = 5           # of the inputs, before a survivor counts as equivalent
FULL = {"pairs": 20, "inputs": 2000, "seeds": (0, 1, 2), "repeats": 200}
FAST = {"pairs": 3, "inputs": 100, "seeds": (0,), "repeats": 5}
TRAINS = {"train_flow", "bonus_study", "make_net"}     # a tenth of the inputs, since each takes seconds


@dataclass
class Audit:
    """What was found for one exercise; the lists hold what a person should look at."""
    exercise: str
    killed: int = 0
    named: int = 0
    by_slips: int = 0       # of the named: by a slip (autograder.slips), not by a misconception that somebody wrote down
    repeats: int = 0        # draws of the inputs on which the lesson's own solution was judged
    survivors: list = field(default_factory=list)       # names of mutants that keep all points
    equivalent: list = field(default_factory=list)      # those whose outputs are the solution's
    confirmed: list = field(default_factory=list)       # (mutant, why it is right after all)
    stale: list = field(default_factory=list)           # confirmed names that no mutant has
    unnamed: list = field(default_factory=list)         # (mutant, diagnosis, sentences)
    rights: int = 0
    rejects: list = field(default_factory=list)         # (right program, seed, what it was told)
    inputs: int = 0
    crashes: list = field(default_factory=list)         # (description, traceback)
    seconds: list = field(default_factory=list)         # (job, processor seconds)

    def add(self, part):
        """Take over the figures of another job for the same exercise."""
        for f in fields(self):
            if f.name != "exercise":
                setattr(self, f.name, getattr(self, f.name) + getattr(part, f.name))

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
    """Ends what takes too much processor time by an exception in the program, as a person's stop button would; nothing is printed."""

    def stop(*_):
        raise slips.Endless(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)      # again and again, for a probe goes on with its next step
    try:
        with captured():
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outputs(exercise, objects, seed, most=math.inf):
    """The probe's arrays, or None if not even the objects could be made, or if it does not end; `most` calls of torch are allowed."""
    from autograder import judge

    with limited():
        try:
            answer = objects()
        except Exception:      # a mutant that cannot be defined is as dead as can be
            return None
        try:
            with slips.Budget(most) as budget:
                arrays = exercise.probe(answer, judge.bank(exercise, seed).inputs)
        except slips.Endless:
            return None
    return None if budget.used > most else arrays


def same_outputs(exercise, a, b):
    from autograder import judge

    return a is not None and b is not None and a.keys() == b.keys() and all(judge.same(a[k], b[k]) for k in a)


def mutants(lesson, exercise, found, pairs):
    from autograder import judge, mutate, rights

    reasons = rights.confirmed().get(exercise.id, {})
    code, draws = lesson.solutions[exercise.id], range(1 if exercise.id in TRAINS else DRAWS)
    with slips.Budget() as budget:
        right = {seed: outputs(exercise, lambda: lesson.objects(exercise.id, code), seed) for seed in draws}
    most = ENDLESS * budget.used
    made = mutate.mutants(code, pairs, random.Random(exercise.id))
    found.stale = sorted(reasons.keys() - {m.name for m in made})
    for mutant in made:
        arrays = outputs(exercise, lambda: lesson.objects(exercise.id, mutant.code), 0, most)
        if arrays is None:      # Python itself names the line, or a person's patience ends before any check does
            found.killed, found.named = found.killed + 1, found.named + 1
            continue
        with captured():
            verdict = judge.judge(exercise, 0, arrays)
        if verdict.score == exercise.points and all(e.what in reasons for e in mutant.edits):
            found.confirmed.append((mutant.name, "; ".join(reasons[e.what] for e in mutant.edits)))
        elif verdict.score == exercise.points:
            equal = all(same_outputs(exercise, outputs(exercise, lambda: lesson.objects(exercise.id, mutant.code), seed), right[seed])
                        for seed in draws)
            (found.equivalent if equal else found.survivors).append(mutant.name)
        else:
            count(found, mutant, verdict)


def count(found, mutant, verdict):
    found.killed += 1
    if any(kind in edit.kinds and place in edit.places for kind, place in verdict.faults for edit in mutant.edits):
        found.named += 1
        found.by_slips += verdict.diagnosis[0].startswith("slip_")
    else:
        found.unnamed.append((mutant.name, verdict.diagnosis, verdict.sentences))


def repeats(lesson, exercise, found, times):
    """The lesson's own solution on `times` draws of the inputs: a check that leaves something to chance would reject it now and then."""
    from autograder import judge

    for seed in range(times):
        objects = lesson.objects(exercise.id, lesson.solutions[exercise.id])
        with captured():
            arrays = exercise.probe(objects, exercise.draw(seed))
            results = judge.run_cases(exercise, judge.Bank(exercise, exercise.draw(seed)), Outputs(arrays))
        lost = [r for r in results if r.earned < r.points]
        if lost:
            found.rejects.append(("the lesson's solution", seed, lost[0].sentence))
    found.repeats = times


def right_answers(exercise, found, seeds):
    from autograder import judge, rights

    answers = rights.table().get(exercise.id, ())
    found.rights = len(answers)
    for objects in answers:
        for seed in seeds:
            results = judge.run_cases(exercise, judge.bank(exercise, seed), Outputs(outputs(exercise, lambda: objects, seed)))
            lost = [r for r in results if r.earned < r.points]
            if lost:
                found.rejects.append((getattr(objects[0], "__name__", str(objects[0])), seed, lost[0].sentence))
                break


KILLED, EACH_KILLED, NAMED = 0.99, 0.95, 0.85      # the goals: over all exercises, for each one, and of those that are killed


def misses(results):
    """The goals that are missed, a sentence each."""
    from autograder import exercise

    graded = [a for a in results if not exercise.get(a.exercise).bonus]
    killed, whole, named = (sum(getattr(a, k) for a in graded) for k in ("killed", "mutants", "named"))
    said = [f"{a.exercise}: {percent(a.killed, a.mutants).strip()} of the wrong programs lose points, {EACH_KILLED:.0%} are asked for"
            for a in graded if a.killed < EACH_KILLED * a.mutants]
    if killed < KILLED * whole:
        said.append(f"over all, {percent(killed, whole).strip()} of the wrong programs lose points, {KILLED:.0%} are asked for")
    if named < NAMED * killed:
        said.append(f"over all, {percent(named, killed).strip()} of these are named, {NAMED:.0%} are asked for")
    said += [f"{a.exercise}: {len(a.rejects)} right programs lose points" for a in results if a.rejects]
    said += [f"{a.exercise}: {len(a.crashes)} random answers get out of the checker" for a in results if a.crashes]
    said += [f"{a.exercise}: the confirmed mutant {name!r} does not occur any more" for a in results for name in a.stale]
    return said


JOBS = ("mutants", "rights", "repeats", "fuzz")


def job(kinds, root, assignment, exercise_id, size):
    """Some of the JOBS for one exercise, in a process of their own: an Audit with their part of the figures."""
    from autograder import build, exercise, fuzz

    os.environ["FLOWKIT_FAST"] = "1"
    torch.set_num_threads(1)
    e, found = exercise.get(exercise_id), Audit(exercise_id)
    lesson = Lesson(next(s for s in build.sources(root=root) if s.stem == assignment))
    for kind in kinds:
        start = time.process_time()
        if kind == "mutants":
            mutants(lesson, e, found, size["pairs"])
        elif kind == "rights":
            right_answers(e, found, size["seeds"])
        elif kind == "repeats":
            repeats(lesson, e, found, size["repeats"])
        else:
            found.inputs = size["inputs"] // (10 if exercise_id in TRAINS else 1)
            found.crashes = fuzz.crashes(exercise_id, found.inputs)
        found.seconds.append((kind, time.process_time() - start))
    return found


def audit(names=(), fast=False, root=None, workers=None):
    """[Audit, ...] of the exercises of those names, or of all; `workers` processes at a time, by default as many as there are cores."""
    from tqdm import tqdm

    from autograder import build, exercise

    size = FAST if fast else FULL
    unknown = sorted(set(names) - set(exercise.registry()))
    if unknown:
        raise ValueError(f"there is no exercise {unknown[0]!r}; there are: {', '.join(exercise.registry())}")
    root = root or build.ROOT
    chosen = {e.id: source.stem for source in build.sources(root=root) for e in exercise.assignment(source.stem).EXERCISES if not names or e.id in names}
    results = {name: Audit(name) for name in chosen}
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        # Each process loads torch and runs all misconceptions once: in the short form that would be most of the work.
        parts = [JOBS] if fast else [(kind,) for kind in JOBS]
        futures = [pool.submit(job, kinds, root, stem, name, size) for kinds in parts for name, stem in chosen.items()]
        for future in tqdm(as_completed(futures), total=len(futures), desc="audit", unit="job"):
            part = future.result()
            results[part.exercise].add(part)
    return list(results.values())


def percent(part, whole):
    return f"{100 * part / whole:5.1f}%" if whole else "     -"


def table(results):
    """The figures as text."""
    lines = [f"{'exercise':20s} {'killed':>11s} {'':6s} {'named':>11s} {'':6s} {'by slips':>8s} {'false rejects':>14s} {'of draws':>8s} {'crashes':>13s}"]
    for a in results:
        lines.append(f"{a.exercise:20s} {a.killed:4d} of {a.mutants:4d} {percent(a.killed, a.mutants)} {a.named:4d} of {a.killed:4d} {percent(a.named, a.killed)} "
                     f"{a.by_slips:8d} {len(a.rejects):6d} of {a.rights:4d} {a.repeats:8d} {len(a.crashes):5d} of {a.inputs:4d}")
    killed, whole, named, slips = (sum(getattr(a, k) for a in results) for k in ("killed", "mutants", "named", "by_slips"))
    lines.append(f"{'all':20s} {killed:4d} of {whole:4d} {percent(killed, whole)} {named:4d} of {killed:4d} {percent(named, killed)} {slips:8d}")
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

    missed = misses(results)
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Audit of the checks</title>",
             "<style>body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} pre{overflow:auto} li{overflow-wrap:anywhere}</style>",
             "<h1>Audit of the checks</h1><p>Blue: wrong programs that lose points (goal 99%). Yellow: of these, told a kind and a place of fault that is theirs "
             "(goal 85%).</p>", bars(results), f"<pre>{html.escape(table(results))}</pre>", items("Goals that are missed", missed) or "<p>All goals are met.</p>"]
    for a in results:
        parts.append(f"<h2>{html.escape(a.exercise)}</h2>")
        parts.append(items("Wrong programs that keep all points", a.survivors))
        parts.append(items("Equivalent to the solution, to be confirmed", a.equivalent))
        parts.append(items("Right after all, as a person found", [f"{name}: {why}" for name, why in a.confirmed]))
        parts.append(items("Killed, but not named", [f"{name}: told {' '.join(said)} [{', '.join(ids) or 'no diagnosis'}]" for name, ids, said in a.unnamed]))
        parts.append(items("Right programs that lose points", [f"{name} (seed {seed}): {said}" for name, seed, said in a.rejects]))
        parts.append("<p>" + html.escape("; ".join(f"{job}: {s:.0f} s" for job, s in a.seconds)) + "</p>")
        parts.append(items("Crashes", [f"{what}: {trace}" for what, trace in a.crashes]))
    return "\n".join(parts) + "</html>"


def main(names, out, fast):
    results = audit(names, fast)
    print(table(results))
    missed = misses(results)
    for sentence in missed:
        print(f"missed: {sentence}")
    if out:
        write(results, out)
        print(f"{out}/audit.html", file=sys.stderr)
    return 1 if missed else 0
