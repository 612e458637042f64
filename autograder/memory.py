"""What a student has solved, kept across sessions in lessons/.progress.json.

The file is a memory aid, never a grade: it is not written while grading, and a damaged one is put aside, not trusted.
"""
import json
import os
from pathlib import Path

from autograder import files

NAME = ".progress.json"


def grading():
    """Whether this process belongs to a grading run, ours or stock nbgrader's."""
    return bool(os.environ.get("AUTOGRADER_CHANNEL") or os.environ.get("NBGRADER_EXECUTION") or os.environ.get("FLOWKIT_FAST") == "1")


def path():
    """lessons/.progress.json seen from the course's root, else .progress.json beside the notebook."""
    here = Path.cwd()
    return (here / "lessons" if (here / "lessons").is_dir() else here) / NAME


def load():
    """{exercise: {"score", "points", "hints"}}; an unreadable file is renamed and said so."""
    file = path()
    try:
        data = json.loads(file.read_text("utf-8"))
        if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
            raise ValueError("not a table")
        return data
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as e:
        aside = file.with_name(NAME + ".damaged")
        file.replace(aside)
        print(f"{file.name} could not be read ({e}); it was put aside as {aside.name} and a new one begun.")
        return {}


def update(exercise, **values):
    """Write the values of one exercise, unless grading; the file is replaced atomically. Its best score is kept."""
    if grading():
        return
    data = load()
    entry = data.setdefault(exercise, {})
    if "score" in values:
        values["score"] = max(values["score"], entry.get("score", 0.0))
    entry.update(values)
    file = path()
    try:
        files.write(file, json.dumps(data, indent=1, sort_keys=True))
    except OSError as e:
        print(f"Your progress could not be saved in {file.name}: {e.strerror}.")
