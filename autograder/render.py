"""A verdict as text for a terminal and as HTML for a notebook or a feedback page.

Everything that came from a student's code (complaints, printed text) is escaped. The HTML uses inline styles only and
inherits colours, so it reads in light and dark themes and survives sanitising.
"""
import base64
import html
import re
from dataclasses import replace

from autograder.exercise import Outputs

MARKS = {True: "✓", False: "✗"}
COLOURS = {True: "#009E73", False: "#D55E00"}
HEADLINES = {
    "ok": "solved", "wrong": "not right yet", "unsolved": "not solved yet", "error": "your code stopped with an error",
    "timeout": "stopped: took too long", "memory": "stopped: used too much memory", "killed": "the notebook's kernel died",
    "invalid": "could not be read", "missing": "not handed in", "manual": "marked by hand",
}


# Characters that a page would obey and not show: control characters, and those that turn the direction of a line round.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text):
    """The text with what a page would obey and not show as a mark: a line that reads otherwise than it runs is no feedback."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def marked(text):
    """Escaped text with `code` in code type."""
    parts = html.escape(visible(text)).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def number(points):
    return f"{points:g}"


def once(cases):
    """The cases, with a sentence that several of them share said by the first one only; the others say that it is the same."""
    seen, shown = set(), []
    for case in cases:
        shown.append(replace(case, sentence="For the same reason.", example="") if case.sentence and (case.sentence, case.example) in seen else case)
        seen.add((case.sentence, case.example))
    return shown


def headline(verdict):
    return f"{verdict.exercise}: {HEADLINES[verdict.status]} · {number(verdict.score)} of {number(verdict.points)} points"


def text(verdict, printed=""):
    """The verdict for a terminal."""
    lines = [headline(verdict)]
    if verdict.note:
        lines.append("  " + verdict.note)
    if verdict.status != "unsolved":
        for case in once(verdict.cases):
            lines.append(f"  {MARKS[case.earned == case.points]} {case.name}  ({number(case.earned)}/{number(case.points)})")
            if case.sentence:
                lines.append(f"      {case.sentence}" + (f" {case.example}." if case.example else ""))
    if verdict.sentences:
        lines += ["  → " + s for s in verdict.sentences]
    if printed:
        lines += ["  your code printed:"] + ["    " + line for line in printed.splitlines()]
    return "\n".join(lines)


def page(verdict, picture=None, printed=""):
    """The verdict as an HTML fragment; `picture` is PNG bytes."""
    good = verdict.status == "ok"
    colour = COLOURS[good] if verdict.status != "unsolved" else "#0072B2"
    out = [f'<div style="border-left:5px solid {colour};padding:4px 14px;margin:4px 0">',
           f'<div style="font-size:115%"><b>{html.escape(headline(verdict))}</b></div>']
    if verdict.note:
        out.append(f"<p>{marked(verdict.note)}</p>")
    if verdict.status != "unsolved" and verdict.cases:
        out.append('<table style="margin:6px 0;border-collapse:collapse;text-align:left">')
        for case in once(verdict.cases):
            right = case.earned == case.points
            detail = ""
            if case.sentence:
                example = f"<br><code>{html.escape(visible(case.example))}</code>" if case.example else ""
                detail = f"<br><span>{marked(case.sentence)}{example}</span>"
            out.append(f'<tr><td style="vertical-align:top;color:{COLOURS[right]};font-weight:bold;padding:2px 8px">{MARKS[right]}</td>'
                       f'<td style="text-align:left;padding:2px 8px">{html.escape(case.name)}{detail}</td>'
                       f'<td style="vertical-align:top;padding:2px 8px;white-space:nowrap">{number(case.earned)} / {number(case.points)}</td></tr>')
        out.append("</table>")
    for sentence in verdict.sentences:
        out.append(f'<p style="font-size:108%;margin:6px 0"><b>→</b> {marked(sentence)}</p>')
    if picture:
        out.append(f'<img alt="{html.escape(verdict.exercise)}: yours and the reference" style="max-width:820px;width:100%;background:white" '
                   f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    if printed:
        out.append(f"<details><summary>what your code printed</summary><pre>{html.escape(visible(printed))}</pre></details>")
    out.append("</div>")
    return "".join(out)


def picture(exercise, answers, arrays):
    """PNG bytes of the exercise's picture, or None where it has none."""
    if exercise.picture is None:
        return None
    from flowkit import plotting

    figure = exercise.picture(answers.inputs, Outputs(arrays), answers.reference[0])
    return None if figure is None else plotting.png(figure, dpi=80)
