"""What a student calls: check("coupling", Coupling), hint("coupling"), progress().

In a notebook of one's own the probe, the judge and the picture all run here, in one process. When a class is graded,
`outside` is set: then only the probe runs here, on the judge's inputs, and its outputs go to the judge, who sits elsewhere.
"""
import contextlib
import gc
import html
import math
import os
import sys
import tempfile

from autograder import memory, probes


outside = None  # when a class is graded: outside(exercise, probe, objects) -> Score, set by autograder.warm


class Score(float):
    """The points of a check: a plain float for nbgrader, which reads the last expression's text; a page for people."""

    def __new__(cls, value, limit, page=""):
        value = float(value)
        self = super().__new__(cls, min(max(value, 0.0), limit) if math.isfinite(value) else 0.0)
        self._page = page
        return self

    def __repr__(self):
        return float.__repr__(self)

    def _repr_html_(self):
        return self._page or f"<pre>{float(self)}</pre>"


@contextlib.contextmanager
def captured(frozen=False):
    """Everything that is printed inside, on sys.stdout and sys.stderr or straight to file descriptors 1 and 2.

    nbgrader gives 0 to a cell that wrote to stderr, be it only a warning; and a student wants to see what was printed.
    Yields a list that holds the text (at most 5,000 characters) afterwards. `frozen`: gc.freeze() was called by whoever called this.
    """
    result = []
    if not frozen:
        gc.freeze()  # what is there already is left out of the collection below, which then takes a third of a millisecond
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile("w+b", buffering=0) as file:
        saved = [os.dup(1), os.dup(2)]
        text = open(os.dup(file.fileno()), "w", encoding="utf-8", errors="replace", buffering=1)
        try:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                try:
                    yield result
                finally:
                    gc.collect()  # a raising __del__ in a cycle of garbage would write to a later cell's stderr
        finally:
            if not frozen:
                gc.unfreeze()
            with contextlib.suppress(ValueError, OSError):  # the answer closed it
                text.close()
            for descriptor, number in zip(saved, (1, 2)):
                os.dup2(descriptor, number)
                os.close(descriptor)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            printed = file.read(5000).decode("utf-8", "replace")
            result.append(printed + (f"\n... ({size} bytes in all)" if size > 5000 else ""))


def in_notebook():
    return "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel")


def seed():
    """The seed of the inputs: fixed for a student, so that a number can be talked about; AUTOGRADER_SEED for grading."""
    return int(os.environ.get("AUTOGRADER_SEED", "0"))


def check(exercise, *objects):
    """Judge your answer to an exercise: check("coupling", Coupling).

    Shows a line for each case with its points, what went wrong and where, and a picture. Its value is the score, a
    float between 0 and the exercise's points. Whatever your object does (raise, print, return nonsense) becomes one
    sentence; only an unknown id, a call without an object, or a fault of the checker itself raises.
    """
    probe = probes.find(exercise)
    if not objects:
        raise TypeError(f"check needs your answer as well: check({exercise!r}, ...)")
    if outside is not None:
        return outside(exercise, probe, objects)

    from autograder import exercise as records, judge, render

    record_ = records.get(exercise)
    answers = judge.bank(record_, seed())
    with captured() as printed:
        arrays = probe(objects, answers.inputs)
    with captured():  # what the misconceptions have to say is nobody's business
        verdict = judge.judge(record_, seed(), arrays)
    memory.update(exercise, score=verdict.score, points=verdict.points)
    if not in_notebook():
        print(render.text(verdict, printed[0]))
        return Score(verdict.score, verdict.points)
    picture = render.picture(record_, answers, arrays)
    return Score(verdict.score, verdict.points, render.page(verdict, picture, printed[0]))


def hint(exercise):
    """Show the next hint for an exercise; there are two, of rising strength."""
    from autograder import exercise as records
    from autograder.render import marked

    record_ = records.get(exercise)
    shown = min(int(memory.load().get(exercise, {}).get("hints", 0)) + 1, len(record_.hints))
    memory.update(exercise, hints=shown)
    lines = [f"Hint {i + 1} of {len(record_.hints)}: {h}" for i, h in enumerate(record_.hints[:shown])]
    return Shown("\n".join(lines), "".join(f"<p>{marked(line)}</p>" for line in lines))


def progress():
    """Show which exercises are solved, lesson by lesson."""
    from autograder import exercise as records

    saved = memory.load()
    lines, rows = [], []
    for module in filter(lambda m: m.EXERCISES, records.lessons().values()):
        mine = [(e, saved.get(e.id, {}).get("score", 0.0)) for e in module.EXERCISES]
        got, most = sum(min(s, e.points) for e, s in mine if not e.bonus), sum(e.max_score for e, _ in mine)
        lines.append(f"{module.ASSIGNMENT}: {got:g} of {most:g} points")
        rows.append(f'<tr><th colspan="3" style="text-align:left">{html.escape(lines[-1])}</th></tr>')
        for e, s in mine:
            mark = "✓" if s >= e.points else "◐" if s > 0 else "·"
            extra = " (bonus)" if e.bonus else ""
            lines.append(f"  {mark} {e.id}  {s:g}/{e.points:g}{extra}  about {e.minutes} min, difficulty {e.difficulty} of 5")
            rows.append(f'<tr><td>{mark}</td><td style="text-align:left">{e.id}{extra}</td><td>{s:g} / {e.points:g}</td></tr>')
    note = "Nothing is recorded in fast mode, nor while grading." if memory.grading() else ""
    return Shown("\n".join([*lines, note]).strip(), f"<table>{''.join(rows)}</table>{note}")


class Shown:
    """A text that shows itself, as HTML in a notebook."""

    def __init__(self, text, page):
        self.text, self.page = text, page

    def __repr__(self):
        return self.text

    def _repr_html_(self):
        return self.page
