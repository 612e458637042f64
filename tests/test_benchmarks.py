"""The benchmarks that write data: each table runs in its quick form, a run can be continued, and the verdicts are right."""
import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from flowkit import datasets

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images():
    spec = importlib.util.spec_from_file_location("benchmark_images", ROOT / "benchmarks" / "images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("better, worse, said", [
    ((1.00, 1.01, 1.02), (1.10, 1.12, 1.11), "reproduced"),
    ((1.10, 1.12, 1.11), (1.00, 1.01, 1.02), "not"),
    ((1.00, 1.10, 1.20), (1.10, 1.05, 1.24), "too close to tell"),
    ((1.0, 5.0, 9.0), (1.1, 5.1, 9.11), "reproduced"),          # paired: what the seeds have in common does not count
    ((0.0, 0.0, 0.0), (1.0, 2.0, 3.2), "reproduced"),           # mean 2.07, standard error 0.64: 3.2 of it
    ((0.0, 0.0, 0.0), (1.0, 2.0, 4.0), "too close to tell"),    # mean 2.33, standard error 0.88: 2.6 of it
    ((1.0, 1.0), (1.0, 1.0), "too close to tell"),
    ((0.0,) * 60, (1.0, -0.5) * 30, "reproduced"),
])
def test_a_verdict_weighs_the_difference_against_the_seeds(better, worse, said):
    assert datasets.verdict(better, worse) == said


def test_a_verdict_needs_pairs():
    with pytest.raises(ValueError, match="^better and worse must have one number a seed and at least 2 seeds, got 3 and 2$"):
        datasets.verdict([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="got 1 and 1$"):
        datasets.verdict([1], [2])


@pytest.mark.parametrize("table", ["flow_plus_plus", "residual", "hybrid", "quality"])
def test_quick(images, table, capsys):
    """Every model of the table takes two steps and is measured; nothing is written."""
    before = {path: path.read_bytes() for path in (datasets.DATA / "miniature").glob("*")}
    images.main([table, "--quick", "--check"])
    out = capsys.readouterr().out
    assert "every figure meets its goal" in out
    for key in images.TABLES[table].names:
        assert f"{table} {', lam '.join(key)} 0 " in out
    assert before == {path: path.read_bytes() for path in (datasets.DATA / "miniature").glob("*")}


@pytest.fixture
def empty(images, tmp_path, monkeypatch):
    """A data folder without miniature tables; a residual table whose figures are made up of the seed's and the model's number."""
    for folder in ("images", "published"):
        (tmp_path / folder).symlink_to(datasets.DATA / folder)
    monkeypatch.setattr(datasets, "DATA", tmp_path)
    made = []

    def rows(names, data, seed, short):
        for name in names:
            made.append((name, seed))
            number = 1 + images.TABLES["residual"].names.index(name) / 10 + seed / 100
            yield name, {"claimed_bits": number, "bits": number, "parameters": 7, "seconds": 0.12}

    monkeypatch.setitem(images.TABLES, "residual", images.TABLES["residual"]._replace(rows=rows))
    return tmp_path / "miniature" / "residual.csv", made


def test_a_run_goes_on_where_it_stopped(images, empty):
    path, made = empty
    images.main(["residual", "--seeds", "2"])
    lines = path.read_text().splitlines()
    assert lines[:2] == ["model,seed,claimed_bits,bits,parameters,seconds", "i-ResNet + ELU,0,1.0000,1.0000,7,0.1"]
    assert len(lines) == 9 and len(made) == 8
    path.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    images.main(["residual", "--seeds", "3"])
    assert made[8:] == [(("Residual Flow + ELU",), 0), *((name, 2) for name in images.TABLES["residual"].names)]
    assert len(datasets.miniature("residual")) == 12


def test_the_orders_are_the_published_ones(images, empty, capsys):
    images.main(["residual"])
    out = capsys.readouterr().out
    # The made up figures rise in the order of the names, where the published ones fall.
    assert "bits: Residual Flow + LipSwish < i-ResNet + ELU: published 0.97 < 1.05; difference here -0.3000 +- 0.0000: not" in out
    assert out.count(": not\n") == 3 and out.count("too close to tell") == 2


def test_check_names_what_misses_its_goal(images, empty, capsys):
    path, _ = empty
    images.main(["residual", "--check"])
    assert capsys.readouterr().out.endswith("every figure meets its goal\n")
    rows = list(csv.reader(path.open()))
    rows[3][3] = "1.9"
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    with pytest.raises(SystemExit) as stop:
        images.main(["residual", "--check"])
    assert stop.value.code == 1
    assert "Residual Flow + ELU, seed 0: unbiased, but claims 1.200 bits where the exact figure is 1.900" in capsys.readouterr().out


def test_every_table_has_orders_about_its_own_models(images):
    for name, table in images.TABLES.items():
        found = list(table.orders())
        assert found
        for order in found:
            assert order.better in table.names and order.worse in table.names and order.better != order.worse, (name, order)


def test_the_models_of_the_ablation_are_of_one_size(images):
    sizes = [images.size(images.flow_pp(name)) for name in images.FLOWPP]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_gaussian_is_the_density_of_images_with_noise(images):
    torch.manual_seed(0)
    model = images.Gaussian(torch.randint(0, 17, (4000, 1, 8, 8)))
    x = torch.randint(0, 17, (2000, 1, 8, 8))
    # Uniform levels: a Gaussian of variance 17^2 / 12 a pixel has an entropy of log2(17) + log2(2 pi e / 12) / 2 bits.
    assert images.bits(model, x, 1) == pytest.approx(4.0875 + 0.2546, abs=0.03)
    assert model.sample(10).shape == (10, 1, 8, 8) and model.sample(10).dtype == torch.long
