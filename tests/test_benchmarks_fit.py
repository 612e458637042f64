"""benchmarks/fit.py: every flow learns and is judged, the judge is right, a run goes on where it stopped, and --check can fail."""
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from flowkit import datasets, toys

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """The module, with an empty data folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fit
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(datasets, "DATA", tmp_path)
    return fit


@pytest.mark.slow
def test_every_flow_learns_and_is_judged(fit, capsys):
    with pytest.raises(SystemExit) as stop:
        fit.main(["--quick", "--check", "--jobs", "2"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.endswith("every gap is finite and none below zero\n")
    assert all(f"{model}: " in out for model in fit.MODELS)
    assert not (datasets.DATA / "miniature").exists()


class Wrong(nn.Module):
    """The truth, but for a learnable constant: a gap that is known."""

    def __init__(self, toy, by):
        super().__init__()
        self.toy, self.by = toy, nn.Parameter(torch.tensor(by))

    def log_prob(self, x):
        return self.toy.log_prob(x) - self.by


def test_the_judge_finds_a_known_gap(fit):
    toy = toys.get("rings")
    flow = Wrong(toy, 0.25)
    x, log_p = fit.points("rings", 12_000, fit.TEST_SEED)
    gap, error = fit.judge(fit.Contestant("own", flow, flow.log_prob), x, log_p)
    assert abs(gap - 0.25) < 1e-6 and error < 1e-6
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    noisy = fit.Contestant("own", flow, lambda part: flow.log_prob(part) + noise[:len(part)])
    assert fit.judge(noisy, x, log_p)[1] == pytest.approx(1 / 12_000 ** 0.5, rel=0.1)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)            # waiting threads spend CPU time
    yield
    torch.set_num_threads(before)


def test_training_ends_with_its_cpu_time(fit, one_thread):
    fit.warm_up()
    made, _ = fit.make("mixture coupling", False)
    before, start = [p.detach().clone() for p in made.module.parameters()], time.process_time()
    steps = fit.train(made, toys.get("rings"), 0.5, fit.BY_HAND["mixture coupling"])
    assert 0.5 <= time.process_time() - start < 1.5 and steps > 1
    assert any(not torch.equal(a, b) for a, b in zip(before, made.module.parameters()))


def test_a_step_that_is_not_finite_is_left_out(fit):
    flow = Wrong(toys.get("rings"), 0.5)
    made = fit.Contestant("own", flow, lambda x: flow.log_prob(x) * (math.nan if torch.rand(()) < 0.5 else 1))
    torch.manual_seed(0)
    fit.train(made, toys.get("rings"), 0.3, fit.HALF[0])
    assert torch.isfinite(flow.by) and flow.by < 0.5


def test_no_points_are_used_twice(fit):
    """What is judged on, chosen on and trained on differ."""
    drawn = [fit.points("rings", 100, seed)[0] for seed in (fit.TEST_SEED, fit.VALIDATION_SEED)]
    for seed in (*fit.SEEDS, fit.SEARCH_SEED):
        torch.manual_seed(seed)
        drawn.append(toys.get("rings").sample(100))
    rows = torch.cat(drawn)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.fixture
def made_up(fit, monkeypatch):
    """Runs whose gaps are made up; a list of what was run."""
    ran = []

    def run(model, toy, seconds, seed, setting, n=200_000, points_seed=None):
        ran.append((model, toy, seconds, seed, str(setting)))
        return {"gap": (0.01 if model in fit.BY_HAND else 0.1 if model in fit.OURS else 0.15 if model in fit.LENT else 0.2 + 0.01 * list(fit.PEERS).index(model))
                       + 0.001 * seed + (0.05 if 3e-3 < setting.lr < 2e-2 else 0), "error": 0.001, "steps": 7, "parameters": 9}

    monkeypatch.setattr(fit, "all_runs", lambda jobs, todo: ((key, run(*arguments)) for key, arguments in todo))
    return ran


def test_the_search_chooses_and_the_table_goes_on_where_it_stopped(fit, made_up, capsys):
    fit.main(["--search"])
    assert len(made_up) == (len(fit.MODELS) - len(fit.BY_HAND)) * len(fit.HALF) * len(fit.SEARCHED_ON)
    fit.main(["--search"])
    assert len(made_up) == (len(fit.MODELS) - len(fit.BY_HAND)) * len(fit.HALF) * len(fit.SEARCHED_ON), "nothing is searched twice"
    chosen = fit.entrants()
    assert [m for m in chosen if m in fit.LENT] == list(fit.LENT) and all(chosen[m].soap for m in fit.LENT)
    assert [m for m in chosen if m in fit.PEERS] == ["zuko spline", "nflows spline coupling", "normflows spline coupling", "FrEIA affine"]
    assert all(setting.lr == (2e-2 if model in fit.LENT else 2e-3) for model, setting in chosen.items() if model not in fit.BY_HAND)

    made_up.clear()
    fit.main(["--budget", "30", "--toy", "rings", "two_moons"])
    assert len(made_up) == 2 * len(chosen) * 3
    path = datasets.DATA / "miniature" / "fit.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4] + lines[5:]) + "\n")
    made_up.clear()
    fit.main(["--budget", "30", "120", "--toy", "rings", "two_moons"])
    again, *long = made_up
    assert again[2] == 30 and lines[4].startswith(f"{again[1]},{again[0]},") and {run[2] for run in long} == {120}
    assert len(long) == 2 * 2 * 3 and {run[0] for run in long} == {"mixture coupling", "zuko spline"}, "the best of ours and of the others"
    assert (datasets.DATA / "pictures" / "fit.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = next(line for line in reversed(capsys.readouterr().out.splitlines()) if line.split()[:1] == ["rings"])
    assert shown.split("  ")[-1] == " 2.5" and "0.0610 (mixture coupling)" in shown and "0.2010 (zuko spline)" in shown and "0.1510" in shown


def test_check_fails_where_the_floor_is_lost(fit, made_up, capsys):
    fit.main(["--search"])
    fit.main(["--budget", "10", "30"])
    with pytest.raises(SystemExit) as stop:
        fit.main(["--check"])
    assert stop.value.code == 1 and "rings, 120 s: mixture coupling lacks" in capsys.readouterr().out
    fit.main(["--budget", "120"])
    with pytest.raises(SystemExit) as stop:
        fit.main(["--check"])
    assert stop.value.code == 0
    path = datasets.DATA / "miniature" / "fit.csv"
    good = path.read_text()
    for old, new, said in (("rings,zuko spline,0.002/256/small,30,0,0.2,", "rings,zuko spline,0.002/256/small,30,0,-0.3,", "a gap of -0.3 nats"),
                           ("two_moons,mixture coupling,0.01/2048/small/SOAP,30,", "two_moons,another,0.01/2048/small/SOAP,30,", "two_moons, 30 s: mixture coupling lacks"),
                           (",30,0,0.06,", ",30,0,0.9,", "over half of zuko spline's")):
        assert old in good
        path.write_text(good.replace(old, new))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            fit.main(["--check"])
        assert stop.value.code == 1 and said in capsys.readouterr().out
