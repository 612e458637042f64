"""A made-up class of any size: honest submissions of a lesson, right, wrong and unsolved, the same for the same seed.

A submission is the released notebook with answers put in. A right answer is the lesson's own; a wrong one is that with one change to its
syntax tree (autograder.mutate). As in a class, the same mistakes are made by many: an exercise has `MISTAKES` of them, some
far more popular than others. Nothing here asks the grader what an answer is worth.
"""
import random
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from autograder import build, exercise, files, mutate  # noqa: E402
from make_sample_class import clean  # noqa: E402

LESSON = "02_coupling"
MISTAKES = 12
RIGHT, WRONG = 0.6, 0.25    # of the exercises; the others are left unsolved
BONUS = 0.1                 # of the students try one
# Kinds of slips that cannot turn a loop into one that never ends.
KINDS = {"sign", "missing term", "missing function", "wrong function", "exchanged", "wrong axis", "reduction", "detached", "shape"}


def submissions(number, seed=0, lesson=LESSON):
    """Yield (student, text of the notebook) of `number` students."""
    solved = build.solved(ROOT / "solutions" / f"{lesson}.py")
    release, rng = build.release(solved), random.Random(seed)
    tags = {c.id: c.metadata.get("tags", []) for c in solved.cells}
    right = {c.id: clean(c.source) for c in solved.cells if c.cell_type == "code" and "solution" in tags[c.id]}
    bonus = {e.id for e in exercise.assignment(lesson).EXERCISES if e.bonus}
    wrong = {name: mistakes(text, rng) for name, text in right.items() if name not in bonus}
    width = len(str(number - 1))
    for i in range(number):
        nb = nbformat.from_dict(release)
        for cell in nb.cells:
            if cell.id in right:
                answer = draw(cell.id, right, wrong, rng)
                cell.source = cell.source if answer is None else f"# student {i}\n{answer}"
        yield f"student{i:0{width}d}", nbformat.writes(nb) + "\n"


def mistakes(text, rng):
    """Some wrong programs made from a right one, in a random order."""
    found = [m.code for m in mutate.mutants(text) if KINDS & {k for e in m.edits for k in e.kinds}]
    return rng.sample(found, min(MISTAKES, len(found)))


def draw(name, right, wrong, rng):
    """One student's answer to an exercise, None where it stays unsolved; a mistake is half as common as the one before it."""
    luck = rng.random()
    if name not in wrong:
        return right[name] if luck < BONUS else None
    if luck < RIGHT or not wrong[name]:
        return right[name]
    if luck < RIGHT + WRONG:
        return rng.choices(wrong[name], [0.5 ** min(k, 5) for k in range(len(wrong[name]))])[0]
    return None


def write(folder, number, seed=0, lesson=LESSON):
    """Write the submissions in nbgrader's layout, folder/<student>/<lesson>/<lesson>.ipynb; returns the students."""
    students = []
    for student, text in submissions(number, seed, lesson):
        files.write(Path(folder) / student / lesson / f"{lesson}.ipynb", text)
        students.append(student)
    return students
