"""Miniature tables: a row for each model and seed, kept in data/miniature/, set beside what a paper reports.

A published ordering says that one model is better than another. Here both were trained with the same seeds, so that the
difference is taken seed by seed; its mean is weighed against its own standard error (flowkit.datasets.verdict).
"""
import csv
import io
import math
import os
from dataclasses import dataclass

from flowkit import datasets


def path(name):
    return datasets.DATA / "miniature" / f"{name}.csv"


def rows(name):
    """The rows of data/miniature/<name>.csv as `datasets.miniature` gives them; none if there is no such file yet."""
    return datasets.miniature(name) if path(name).exists() else []


def append(name, row):
    """Add one row, a dict in the order of the columns; a float is written with 6 significant digits, None as an empty cell.

    One single write, so that a run that is cut off leaves whole rows. ValueError if the file's columns are others.
    """
    file = path(name)
    file.parent.mkdir(exist_ok=True)
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    if file.exists() and file.stat().st_size:
        header = file.read_text(encoding="utf-8").splitlines()[0].split(",")
        if header != list(row):
            raise ValueError(f"{file.name} has the columns {', '.join(header)}, the row {', '.join(row)}")
    else:
        write(row)
    write([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()])
    with open(file, "ab", buffering=0) as f:
        f.write(text.getvalue().encode())
        os.fsync(f.fileno())


def select(table, **key):
    """The rows whose columns are those of the key: select(table, model="VAE", seed=0)."""
    return [row for row in table if all(row[k] == v for k, v in key.items())]


def by_seed(table, value, **key):
    """{seed: value} of the rows with that key; an empty cell is left out."""
    return {int(row["seed"]): row[value] for row in select(table, **key) if row[value] is not None}


def mean(values):
    return math.fsum(values) / len(values)


def spread(values):
    """Standard deviation over the seeds, n - 1 below; nan for a single one."""
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def cell(values, digits=2):
    """'mean +- spread' of a {seed: value}, with the number of seeds if that is not three; '-' if there are none."""
    values = list(values.values())
    if not values:
        return "-"
    about = f" +- {spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{about}" + ("" if len(values) == 3 else f" ({len(values)})")


@dataclass
class Verdict:
    """By how much the model that is better in print was better here (mean over the seeds), its standard error, and the word."""
    by: float
    error: float
    seeds: int
    word: str


def verdict(better, worse, higher=False):
    """Whether `better` is better than `worse`, both {seed: value}, compared seed by seed.

    `higher`: whether a higher value is the better one. Fewer than two common seeds have no standard error: "too close to tell".
    """
    seeds = sorted(better.keys() & worse.keys())
    sign = -1 if higher else 1
    here, there = ([sign * values[s] for s in seeds] for values in (better, worse))
    gains = [b - a for a, b in zip(here, there)]
    if len(seeds) < 2:
        return Verdict(gains[0] if gains else math.nan, math.nan, len(seeds), "too close to tell")
    return Verdict(mean(gains), spread(gains) / math.sqrt(len(gains)), len(seeds), datasets.verdict(here, there))


def show(title, columns, lines):
    """Print a table of strings, the first column to the left."""
    width = [max(len(str(line[i])) for line in [columns, *lines]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *lines]:
        print("  " + "  ".join(str(v).ljust(w) if i == 0 else str(v).rjust(w) for i, (v, w) in enumerate(zip(line, width))))


def show_orderings(orderings, unit, digits=2):
    """Print, and return, the verdict of each (text, better, worse, higher), as `verdict` takes them."""
    found = [(text, verdict(better, worse, higher)) for text, better, worse, higher in orderings]
    show("Published orderings, compared seed by seed", ("", f"better by, {unit}", "standard error", "seeds", ""),
         [(text, f"{v.by:.{digits}f}", f"{v.error:.{digits}f}", v.seeds, v.word) for text, v in found])
    return found
