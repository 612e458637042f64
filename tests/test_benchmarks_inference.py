"""The miniature tables of variational inference: the quick form of each runs, and the verdict on an ordering is the right one."""
import math
from pathlib import Path

import pytest
import torch

from flowkit import Planar, datasets

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """benchmarks/_tables.py and inference.py, with an empty data/miniature of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _tables
    import inference
    (tmp_path / "published").symlink_to(datasets.DATA / "published")
    (tmp_path / "images").symlink_to(datasets.DATA / "images")
    monkeypatch.setattr(datasets, "DATA", tmp_path)
    return _tables, inference


def of(*values):
    return dict(enumerate(values))


def test_an_ordering_is_judged_seed_by_seed(modules):
    tables, _ = modules
    # The seeds differ by far more than the models, and still every seed says the same.
    worse, better = of(1.0, 5.0, 9.0), of(0.9, 4.91, 8.89)
    found = tables.verdict(better, worse)
    assert found.word == "reproduced" and found.seeds == 3
    assert found.by == pytest.approx(0.1) and found.error == pytest.approx(0.01 / math.sqrt(3))
    assert tables.verdict(worse, better).word == "not"
    assert tables.verdict(better, worse, higher=True).word == "not"
    assert tables.verdict(worse, better, higher=True).word == "reproduced"


@pytest.mark.parametrize("gains, word", [
    ((1.0, 1.0, 1.0), "reproduced"), ((-1.0, -1.0, -1.0), "not"), ((0.0, 0.0, 0.0), "too close to tell"),
    # mean / standard error 2.91 and 2.93; Student's t with 2 degrees of freedom exceeds 2.92 in 5 of 100 cases
    ((2.91 / math.sqrt(3) - 1, 2.91 / math.sqrt(3), 2.91 / math.sqrt(3) + 1), "too close to tell"),
    ((2.93 / math.sqrt(3) - 1, 2.93 / math.sqrt(3), 2.93 / math.sqrt(3) + 1), "reproduced"),
    ((1.0,), "too close to tell"), ((), "too close to tell"),
])
def test_the_three_words(modules, gains, word):
    tables, _ = modules
    assert tables.verdict(of(*gains), of(*[0.0] * len(gains)), higher=True).word == word


def test_only_seeds_that_both_have_are_compared(modules):
    tables, _ = modules
    found = tables.verdict({0: 1.0, 1: 2.0, 7: -50.0}, {1: 3.0, 0: 2.0, 5: 90.0})
    assert (found.seeds, found.by, found.word) == (2, 1.0, "reproduced")


def test_rows_are_appended_and_read_back(modules):
    tables, _ = modules
    assert tables.rows("some") == []
    tables.append("some", {"model": "a", "seed": 0, "value": 1 / 3})
    tables.append("some", {"model": "a", "seed": 1, "value": None})
    assert tables.path("some").read_text() == "model,seed,value\na,0,0.333333\na,1,\n"
    assert tables.rows("some") == [{"model": "a", "seed": 0.0, "value": 0.333333}, {"model": "a", "seed": 1.0, "value": None}]
    assert tables.by_seed(tables.rows("some"), "value", model="a") == {0: 0.333333}
    with pytest.raises(ValueError, match="columns"):
        tables.append("some", {"model": "a", "value": 1.0})
    assert tables.cell(of(1.0, 2.0, 3.0)) == "2.00 +- 1.00" and tables.cell({}) == "-" and tables.cell(of(1.0)) == "1.00 (1)"


def test_the_quick_form_of_each_table_runs_and_writes_nothing(modules, capsys, tmp_path):
    _, inference = modules
    inference.main(["--quick", "--check"])
    said = capsys.readouterr().out
    assert "U4, 2 layers, seed 0" in said and "IAF-DSF, 2 layers" in said and "too close to tell" in said
    assert not (tmp_path / "miniature").exists()


def test_a_run_that_was_cut_off_goes_on(modules, monkeypatch):
    _, inference = modules
    seen = []

    def run(model, layers, seed, train, test, **settings):
        seen.append((model, layers, seed))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return -2.0, -1.0, 7

    monkeypatch.setattr(inference, "posterior_run", run)
    with pytest.raises(KeyboardInterrupt):
        inference.main(["posterior", "--check"])
    inference.main(["posterior", "--check"])
    assert seen[2] == seen[3] and len(seen) == len(set(seen)) + 1 == 3 * len(inference.POSTERIORS) + 1
    inference.main(["posterior", "--check"])
    assert len(seen) == 3 * len(inference.POSTERIORS) + 1


def test_check_names_what_is_wrong(modules, monkeypatch, capsys):
    _, inference = modules
    monkeypatch.setattr(inference, "posterior_run", lambda *a, **k: (-1.0, -2.0, 7))
    with pytest.raises(SystemExit):
        inference.main(["posterior", "--check"])
    assert "VAE, 0 layers, seed 0: ELBO -1.00 above log p(x) -2.00" in capsys.readouterr().out


def test_normalisers_of_the_energies(modules):
    """By other means: Monte Carlo over the square [-6, 6]^2; 10^6 points, standard error at most 0.004, of which five."""
    _, inference = modules
    torch.manual_seed(0)
    x = 12 * torch.rand(1_000_000, 2, dtype=torch.float64) - 6
    for energy in inference.ENERGIES:
        share = torch.exp(inference.log_target(energy, x))
        assert math.log(144 * share.mean()) == pytest.approx(inference.log_normaliser(energy), abs=0.02)


def test_planar_layers_of_any_batch_are_flowkits(modules):
    _, inference = modules
    torch.manual_seed(0)
    layers, x = [Planar(3) for _ in range(4)], torch.randn(4, 5, 3)
    w, u, b = (torch.stack([getattr(layer, name).reshape(1, -1) for layer in layers]) for name in ("w", "u", "b"))
    z, ldj = inference.planar(x, w, u, b)
    for i, layer in enumerate(layers):
        torch.testing.assert_close((z[i], ldj[i]), layer(x[i]))


def test_a_flow_fitted_to_an_energy_is_the_same_in_any_company(modules):
    _, inference = modules
    few = {"steps": 5, "points": 1000}
    (alone, _), = inference.energy_runs([("U3", 1)], 2, **few)
    assert alone == pytest.approx(inference.energy_runs([("U1", 0), ("U3", 1)], 2, **few)[1][0], abs=1e-3)
