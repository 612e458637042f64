"""Pages for people: one for each submission, and one about the class for the instructor.

Each is a single file that works offline. Whatever came from a student is escaped; the only HTML inside is our own
(autograder.render) and the only pictures are PNGs, and the page's content policy forbids everything else.
"""
import base64
import binascii
import re
from collections import Counter
from functools import cache
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from autograder.intake import EXTRA, solution_cells
from autograder.render import marked, number

# Background and type for each status: colours that remain apart for colour-blind readers; the word stands there as well.
COLOURS = {
    "ok": ("#bfe5d8", "#00382a"), "wrong": ("#ffe3b0", "#4d3300"), "unsolved": ("#ececec", "#333333"), "manual": ("#cfe6f7", "#00304d"),
    "error": ("#f7cdb5", "#5c2500"), "timeout": ("#f7cdb5", "#5c2500"), "memory": ("#f7cdb5", "#5c2500"), "killed": ("#f7cdb5", "#5c2500"),
    "invalid": ("#e6cfe0", "#4a1f3d"), "missing": ("#e6cfe0", "#4a1f3d"),
}
PERSON = ("error", "timeout", "memory", "killed", "invalid", "missing")
BARS = 10
LONGEST = 5000  # characters of an output that a feedback page shows


@cache
def templates():
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("autograder"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"points": number, "marked": lambda text: Markup(marked(text))}
    return environment


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
        sections.append({"title": title, "verdict": by_exercise[name], "cells": cells, "page": pages[name]})
    counted = [(v, 0.0 if not isinstance(t, str) and t.bonus else v.points) for t, v in zip(release.tasks, result.verdicts)]
    return templates().get_template("feedback.html.j2").render(
        title=f"{result.assignment}: {result.student}", width="860px", lesson=release.lesson, result=result, sections=sections,
        score=sum(v.score for v, most in counted if most), most=sum(most for _, most in counted),
        bonus=sum(v.score for v, most in counted if not most), waiting=any(v.status == "manual" for v in result.verdicts),
        others=[shown(c) for c in nb.cells if EXTRA in c.metadata.get("tags", []) and c.source.strip()],
    )


def shown(cell):
    """A cell as a page shows it: code in colours, texts as they were written, outputs without ANSI codes."""
    if cell.cell_type != "code":
        return {"kind": "text", "text": cell.source, "outputs": [], "pictures": []}
    texts, pictures = [], []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append("\n".join(output.traceback) or f"{output.ename}: {output.evalue}")
        elif "image/png" in output.data:
            pictures += png(output.data["image/png"])
        else:
            texts.append(output.data.get("text/plain", ""))
    texts = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", t).strip("\n") for t in texts]
    texts = [t if len(t) <= LONGEST else t[:LONGEST] + "\n..." for t in texts if t.strip()]
    return {"kind": "code", "html": highlight(cell.source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True, noclasses=True)), "outputs": texts, "pictures": pictures}


def png(text):
    """[the picture in base64] if that is what it is, else []."""
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


def report(releases, results, rows, waiting=0):
    """The instructor's page."""
    results = sorted(results, key=lambda r: (r.student, r.assignment))
    scores = {(r["student"], r["assignment"], r["exercise"]): r["score"] for r in rows}
    return templates().get_template("report.html.j2").render(
        title="Class report", width="1200px", colours=COLOURS, waiting=waiting,
        students=len({r.student for r in results}), submissions=sum(bool(r.key) for r in results),
        assignments=[assignment(release, [r for r in results if r.assignment == name], scores) for name, release in releases.items()],
        misconceptions=misconceptions(results), people=people(results),
        to_mark=sum(v.status == "manual" and scores[r.student, r.assignment, v.exercise] == "" for r in results for v in r.verdicts),
    )


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
    bars = [{"x": 30 * i, "height": round(18 * counts[i] / top), "count": counts[i], "label": number(task.points * i / steps),
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
