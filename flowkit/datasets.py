"""What lies in data/: small real tables, numbers that papers report, and a tale. Nothing is downloaded.

data/README.md says where each file comes from and under which licence.
"""
import csv
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parent.parent / "data"


def _file(folder, name, kind="csv"):
    names = sorted(p.stem for p in (DATA / folder).glob(f"*.{kind}"))
    if not names:
        raise FileNotFoundError(f"{DATA / folder} holds no {kind.upper()} files; the data lie in the course's folder, beside flowkit/")
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
    return DATA / folder / f"{name}.{kind}"


def table(name):
    """The columns' names and the values (N, D) float64 of a real table: 'breast_cancer', 'iris' or 'wine'; units as in data/README.md.

    Raises ValueError for an unknown name.
    """
    with open(_file("tables", name), encoding="utf-8", newline="") as f:
        header, *rows = csv.reader(f)
    return header, torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64, device="cpu")


def published(name):
    """The rows of a table that a paper reports, a list of dicts; what is a number there is a float, what is empty is None.

    'density_estimation': mean log-likelihoods in nats of Huang et al. 2018, table 2. Raises ValueError for an unknown name.
    """
    with open(_file("published", name), encoding="utf-8", newline="") as f:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(f)]


def text(name):
    """An English text as a str in 27 characters, the letters a to z and single spaces (as in the benchmark text8): 'mill'.

    Raises ValueError for an unknown name.
    """
    letters = _file("text", name, "txt").read_text(encoding="utf-8").lower()
    return " ".join("".join(c if "a" <= c <= "z" else " " for c in letters).split())


def _number(text):
    try:
        return float(text) if text else None
    except ValueError:  # a word
        return text
