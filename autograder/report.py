"""Pages for people: one for each submission, and one about the class for the instructor.

Each is a single file that works offline. Whatever came from a student is escaped; the only HTML inside is our own
(autograder.render) and the only pictures are PNGs, and the page's content policy forbids everything else.
"""
import base64
import binascii
import re
from collections import Counter
from functools import cache, lru_cache
from math import ceil
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from autograder import likeness
from autograder.intake import EXTRA, solution_cells
from autograder.render import HEADLINES, marked, number, visible

# Background and type for each status: colours that remain apart for colour-blind readers; the word stands there as well.
COLOURS = {
    "ok": ("#bfe5d8", "#00382a"), "wrong": ("#ffe3b0", "#4d3300"), "unsolved": ("#ececec", "#333333"), "manual": ("#cfe6f7", "#00304d"),
    "error": ("#f7cdb5", "#5c2500"), "timeout": ("#f7cdb5", "#5c2500"), "memory": ("#f7cdb5", "#5c2500"), "killed": ("#f7cdb5", "#5c2500"),
    "invalid": ("#e6cfe0", "#4a1f3d"), "missing": ("#e6cfe0", "#4a1f3d"),
}
PERSON = ("error", "timeout", "memory", "killed", "invalid", "missing")
BARS = 10
HIGHEST = 32  # pixels of a bar
LONGEST = 5000  # characters of an output that a feedback page shows
LARGEST_CELL = 50_000  # characters of a cell
MOST_OUTPUTS = 50  # outputs of a cell
LARGEST_PICTURE = 3_000_000  # characters of a picture, in base64
PAIRS = 40  # that the report shows side by side
COMMONEST = 15  # misconceptions that stand there at once; the others are folded


@cache
def templates():
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autograder"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"points": number, "marked": lambda text: Markup(marked(text)), "visible": visible}
    return environment


def shortened(text, most):
    return text if len(text) <= most else f"{text[:most]}\n... ({len(text) - most:,} more characters)"


# --- one submission --------------------------------------------------------------------------------------------------

def feedback(result, release, nb, pages):
    """The feedback page of a submission: its answers, what each check found, its own cells."""
    by_exercise = {v.exercise: v for v in result.verdicts}
    answers = solution_cells(nb)
    sections = []
    for task in release.tasks:
        name = task if isinstance(task, str) else task.id
        title = ("A written answer" if isinstance(task, str) else task.title)
        cells = [shown(c) for c in nb.cells if answers.get(c.id) == name]
        verdict = by_exercise[name]
        headline = "" if verdict.status in ("ok", "manual") else HEADLINES[verdict.status]
        sections.append({"title": title, "verdict": verdict, "headline": headline, "cells": cells, "page": pages[name]})
    counted = [(v, 0.0 if not isinstance(t, str) and t.bonus else v.points) for t, v in zip(release.tasks, result.verdicts)]
    return templates().get_template("feedback.html.j2").render(
        title=f"{result.assignment}: {result.student}", width="860px", lesson=release.lesson, result=result, sections=sections,
        score=sum(v.score for v, most in counted if most), most=sum(most for _, most in counted),
        bonus=sum(v.score for v, most in counted if not most), waiting=any(v.status == "manual" for v in result.verdicts),
        unread=result.verdicts[0].note if all(v.status == "invalid" for v in result.verdicts) else "",
        others=[shown(c) for c in nb.cells if EXTRA in c.metadata.get("tags", []) and c.source.strip()],
    )


def shown(cell):
    """A cell as a page shows it: code in colours, texts as they were written, outputs without ANSI codes."""
    source = visible(shortened(cell.source, LARGEST_CELL))
    if cell.cell_type != "code":
        return {"kind": "text", "text": source, "outputs": [], "pictures": []}
    texts, pictures = [], []
    for output in cell.outputs[:MOST_OUTPUTS]:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append("\n".join(output.traceback) or f"{output.ename}: {output.evalue}")
        elif "image/png" in output.data:
            pictures += png(output.data["image/png"])
        else:
            texts.append(output.data.get("text/plain", ""))
    if len(cell.outputs) > MOST_OUTPUTS:
        texts.append(f"... ({len(cell.outputs) - MOST_OUTPUTS:,} more outputs)")
    # Cut first: nobody's output, however long, is searched through as a whole. Then colours go, and what a progress bar wrote over.
    texts = [re.sub(r"\x1b\[[0-9;:?]*[ -/]*[@-~]", "", shortened(t, LONGEST)) for t in texts]
    texts = [visible(re.sub(r"[^\n]*\r(?=[^\n])", "", t)).strip("\r\n") for t in texts]
    return {"kind": "code", "html": coloured(source), "outputs": [t for t in texts if t.strip()], "pictures": pictures}


@lru_cache(maxsize=500)
def coloured(source):
    """Code as HTML; a class has many answers in common."""
    return highlight(source, *_colours())


@cache
def _colours():
    return PythonLexer(stripnl=False), HtmlFormatter(nowrap=True, noclasses=True)


def png(text):
    """[the picture in base64] if that is what it is, else []."""
    if len(text) > LARGEST_PICTURE:
        return []
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return []
    return [base64.b64encode(data).decode()] if data.startswith(b"\x89PNG\r\n") else []


# --- the class -------------------------------------------------------------------------------------------------------

def link(result, exercise=""):
    """From report.html to a feedback page, which exists unless nothing was handed in."""
    if not result.key:
        return ""
    return quote(f"feedback/{result.student}/{result.assignment}/{result.assignment}.html") + (f"#{exercise}" if exercise else "")


def report(releases, results, rows, waiting=0, out=None):
    """The instructor's page; `out`: the folder with the autograded notebooks, which are compared with one another."""
    results = sorted(results, key=lambda r: (r.student, r.assignment))
    notebooks = {} if out is None else likeness.handed_in(out, results)
    scores = {(r["student"], r["assignment"], r["exercise"]): r["score"] for r in rows}
    return templates().get_template("report.html.j2").render(
        title="Class report", width="1200px", colours=COLOURS, waiting=waiting,
        students=len({r.student for r in results}), submissions=sum(bool(r.key) for r in results),
        assignments=[assignment(release, [r for r in results if r.assignment == name], scores) for name, release in releases.items()],
        misconceptions=misconceptions(results), commonest=COMMONEST, people=people(results),
        likenesses=[alike(release, notebooks[name]) for name, release in releases.items() if name in notebooks],
        to_mark=sum(v.status == "manual" and scores[r.student, r.assignment, v.exercise] == "" for r in results for v in r.verdicts),
    )


def alike(release, notebooks):
    """What is suspiciously alike in one assignment: pairs of students, and students with the course's own sources."""
    found = {}
    for kind, findings in zip(("pairs", "copies"), likeness.look(release, notebooks)):
        entries = [{"student": f.student, "of": f.of, "where": f.where, "share": f"{min(f.share, 1):.0%}", "bits": round(f.bits),
                    "left": Markup(visible(f.left)), "right": Markup(visible(f.right))} for f in findings[:PAIRS]]
        found[kind] = {"shown": entries, "more": max(0, len(findings) - PAIRS)}
    return {"name": release.name} | found


def assignment(release, results, scores):
    """One assignment's table of the class and its distributions."""
    table, exercises = [], []
    most = {}
    for task in release.tasks:
        text = isinstance(task, str)
        name, points = (task, float(release.lesson.TEXTS[task])) if text else (task.id, task.points)
        most[name] = points if text else task.max_score
        label = "by hand" if text else f"{number(points)}, bonus" if task.bonus else number(points)
        exercises.append({"id": name, "label": label, "points": points} | ({"bars": []} if text else distribution(task, results, scores)))
    for r in results:
        got = {v.exercise: scores[r.student, r.assignment, v.exercise] for v in r.verdicts}
        cells = [{"status": v.status, "text": "–" if got[v.exercise] == "" else number(got[v.exercise]), "link": link(r, v.exercise)} for v in r.verdicts]
        table.append({"student": r.student, "cells": cells, "total": sum(s for n, s in got.items() if s != "" and most[n])})
    seen = {v.status for r in results for v in r.verdicts}
    return {"name": release.name, "title": release.lesson.TITLE, "exercises": exercises, "rows": table, "most": sum(most.values()),
            "statuses": [s for s in COLOURS if s in seen]}


def distribution(task, results, scores):
    """How many students reached how many points of an exercise, as bars from none to all; those who handed in nothing are left out."""
    got = [scores[r.student, r.assignment, task.id] for r in results if r.key]
    steps = min(BARS, max(1, round(task.points)))
    counts = Counter(round(s / task.points * steps) for s in got)
    top = max(counts.values(), default=1)
    bars = [{"x": 30 * i, "height": ceil(HIGHEST * counts[i] / top), "count": counts[i], "label": number(task.points * i / steps),
             "colour": "#009E73" if i == steps else "#0072B2"} for i in range(steps + 1)]
    words = ", ".join(f"{b['count']} with {b['label']} points" for b in bars if b["count"]) or "nobody"
    return {"bars": bars, "words": words, "mean": f"{sum(got) / len(got):.1f}" if got else "–", "solved": f"{sum(s >= task.points for s in got)} of {len(got)}"}


def misconceptions(results):
    """What was recognised, the commonest first, with the sentence and the students."""
    found = {}
    for r in results:
        for v in r.verdicts:
            for name, sentence in zip(v.diagnosis, v.sentences):
                entry = found.setdefault((v.exercise, name), {"exercise": v.exercise, "id": name, "sentence": sentence, "links": []})
                entry["links"].append((r.student, link(r, v.exercise)))
    return sorted(found.values(), key=lambda m: (-len(m["links"]), m["exercise"], m["id"]))


def people(results):
    """The submissions that somebody should look at, and why (beside the written answers, which are always read)."""
    found = []
    for r in results:
        reasons = {}
        for v in r.verdicts:
            if v.status in PERSON:
                reasons.setdefault((v.status, v.note), []).append(v.exercise)
        lines = [f"{status}: {', '.join(names) if len(names) < len(r.verdicts) else 'all exercises'}" + (f" ({note})" if note else "")
                 for (status, note), names in reasons.items()]
        lines += r.notes
        if lines:
            found.append({"student": r.student, "assignment": r.assignment, "link": link(r), "reasons": lines})
    return found
