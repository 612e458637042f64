"""How near a flow comes to the truth in a lecture's time: KL(p || q) on six toys after 10, 30 and 120 CPU-seconds.

    python benchmarks/fit.py [--jobs 2] [--toy NAME ...] [--model NAME ...] [--budget 10 30 120] [--check] [--quick]
    python benchmarks/fit.py --search [--jobs 2]

A toy's density is known, so the mean of log p(x) - log q(x) over fresh points is the distance from perfection in nats. Every
density layer of flowkit and the best flow of each other library have the same CPU time on one thread, drawing included, and
the same means: the gradient's norm cut at 10, fresh points at each step, a cosine that falls to zero as the time runs out, and
numbers below 1e-38 taken as zero; and Adam (fused), but for the mixture couplings, which train with flowkit.SOAP and a rate that
rises first. What of their lead is the optimiser's is seen where it is lent to the others' best: these rows end in "SOAP", and
are compared in a column of their own. The seeds are 0, 1, 2. All are judged on the same 200,000 points, which no
training and no choice has seen. A continuous flow is judged with a finer solver than it was trained with, since it may have
learnt the solver's error. 120 seconds have only the two that lead after 30: the best of ours and the best of the others.

Each finished run adds a row to data/miniature/fit.csv, and rows that are there are not made again: what was cut off goes on
where it stopped. Then come the table (mean and standard deviation over the seeds, beside the goal) and data/pictures/fit.png.

`--search` chooses the settings of all but the mixture couplings, ours and the others' alike: each flow is trained for 10 s on two toys with
four settings (half of the 8 of two rates, two batch sizes and two sizes of the net, so that each value of one meets both of the others; with
SOAP the smaller net, at three rates and two batch sizes), judged on 20,000 other points, and gets the one with the lowest geometric mean;
rows go to data/miniature/fit_search.csv. The mixture couplings' settings were found by hand, with other points again.

`--check`: exit 1 if on some toy our best gap after 30 s is over half of the best peer's, or rows are missing. `--quick`: half a second for each flow on
one toy, nothing written; with `--check` only that each gap is finite and no less than zero.
"""
import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import normflows
import torch
import zuko
from _peers import NF, NFT, Contestant, _WithContext, of_freia, of_nflows, of_normflows
from _tables import append, by_seed, cell, mean, rows, select, show
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import nn

import flowkit
from flowkit import MLP, datasets, toys
from flowkit.training import adam

TOYS = ("two_spirals", "eight_gaussians", "checkerboard", "two_moons", "rings", "grid_of_gaussians")
GOALS = dict(zip(TOYS, (0.03, 0.0015, 0.01, 0.002, 0.005, 0.01)))      # nats, after 30 s
BUDGETS, SEEDS = (10, 30, 120), (0, 1, 2)
SEARCHED_ON, SEARCH_SEED = ("checkerboard", "two_spirals"), 100
TEST_SEED, VALIDATION_SEED = 2_000_000, 1_000_000


@dataclass(frozen=True)
class Setting:
    """What the search chooses: the rate, points a step, and the smaller or the larger of two sizes; with Adam or SOAP."""
    lr: float
    batch: int
    large: bool
    soap: bool = False

    def __str__(self):
        return f"{self.lr:g}/{self.batch}/{'large' if self.large else 'small'}{'/SOAP' if self.soap else ''}"


HALF = (Setting(2e-3, 256, False), Setting(2e-3, 1024, True), Setting(5e-3, 256, True), Setting(5e-3, 1024, False))
WITH_SOAP = (Setting(5e-3, 1024, False, True), Setting(1e-2, 1024, False, True), Setting(2e-2, 1024, False, True), Setting(1e-2, 1536, False, True))
WARM_UP = 0.05              # of the time, with SOAP


# --- flowkit's

def of_flowkit(*transforms, **how):
    flow = flowkit.Flow(flowkit.StandardNormal(2), flowkit.Compose(transforms))
    return Contestant("flowkit", flow, flow.log_prob, **how)


def turned(layers):
    """The layers, with the coordinates' order turned round after each."""
    return [part for layer in layers for part in (layer, flowkit.Reverse())]


def affine_coupling(large):
    width = 128 if large else 64
    return of_flowkit(*turned(flowkit.Coupling(MLP(1, 2, (width, width), spread=(2.0, 4.0)), flowkit.Affine(bound=3.0)) for _ in range(8)))


def mixture_coupling(large, layers=2, components=32):
    """Of one size. The last net is small: were the layers before it perfect, all that is left would be one coordinate's own density."""
    hidden = [(32,) * 5] * (layers - 1) + [(16, 16)]
    return of_flowkit(*turned(flowkit.MixCoupling.spread(2, components, widths) for widths in hidden))


def mixture_coupling_3(large):
    """With fewer logistics in each layer: sharp edges come out sharper, round shapes less round."""
    return mixture_coupling(large, 3, 24)


def maf(large):
    return of_flowkit(*turned(flowkit.MAF(flowkit.MADE(2, 2, (128, 128) if large else (64, 64))) for _ in range(5)))


def naf(large):
    k, width = (32, 128) if large else (16, 64)
    return of_flowkit(*turned(flowkit.NAF(flowkit.MADE(2, flowkit.DSF(k).num_params, (width, width)), k) for _ in range(2)))


def ffjord(large):
    """RK4 in 8 steps while it learns, 32 when it is judged."""
    layer = flowkit.FFJORD(flowkit.VectorField(2, (128, 128) if large else (64, 64)), trace="exact", solver="rk4", steps=8)

    def finer():
        layer.steps = 32

    return of_flowkit(layer), finer


def residual(large):
    width = 128 if large else 64
    return of_flowkit(*(flowkit.Residual(flowkit.lipschitz_mlp(2, (width, width))) for _ in range(8)))


# --- the others', as their documentation makes them

BINS, REACH = 16, 5.0       # of the splines; all toys lie within


def _hidden(large):
    return (128, 128) if large else (64, 64)


def of_zuko(flow):
    return Contestant("zuko", flow, lambda x: flow().log_prob(x))


def zuko_spline(large):
    return of_zuko(zuko.flows.NSF(2, bins=BINS, transforms=3, hidden_features=_hidden(large)))


def zuko_maf(large):
    return of_zuko(zuko.flows.MAF(2, transforms=5, hidden_features=_hidden(large)))


def zuko_naf(large):
    return of_zuko(zuko.flows.NAF(2, transforms=2, hidden_features=_hidden(large)))


def zuko_cnf(large):
    """dopri5 to rtol 1e-5 while it learns, a tenth of that when it is judged."""
    flow = zuko.flows.CNF(2, hidden_features=_hidden(large))

    def finer():
        flow.transform.rtol, flow.transform.atol = 1e-6, 1e-7

    return of_zuko(flow), finer


def nflows_spline_coupling(large):
    return of_nflows(2, [t for _ in range(4) for t in (
        NFT.PiecewiseRationalQuadraticCouplingTransform([0, 1], lambda a, b: _WithContext(MLP(a, b, _hidden(large), nn.ReLU)), BINS, "linear", REACH),
        NFT.ReversePermutation(2))])


def nflows_spline_autoregressive(large):
    return of_nflows(2, [t for _ in range(3) for t in (
        NFT.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(2, _hidden(large)[0], num_bins=BINS, tails="linear", tail_bound=REACH),
        NFT.ReversePermutation(2))])


def normflows_spline_coupling(large):
    return of_normflows(2, [f for _ in range(4) for f in (
        NF.CoupledRationalQuadraticSpline(2, 2, _hidden(large)[0], num_bins=BINS, tail_bound=REACH), NF.LULinearPermute(2))])


def normflows_spline_autoregressive(large):
    return of_normflows(2, [f for _ in range(3) for f in (
        NF.AutoregressiveRationalQuadraticSpline(2, 2, _hidden(large)[0], num_bins=BINS, tail_bound=REACH), NF.LULinearPermute(2))])


def normflows_affine(large):
    width = _hidden(large)[0]
    return of_normflows(2, [f for _ in range(8) for f in (
        NF.AffineCouplingBlock(normflows.nets.MLP([1, width, width, 2], init_zeros=True)), NF.Permute(2, mode="swap"))])


def normflows_residual(large):
    """The log-determinant in closed form, which at D = 2 is exact, and five power iterations after each step."""
    width = _hidden(large)[0]
    made = of_normflows(2, [NF.Residual(normflows.nets.LipschitzMLP([2, width, width, 2], lipschitz_const=0.97), brute_force=True)
                            for _ in range(8)])
    made.after_step = lambda: normflows.utils.update_lipschitz(made.module, 5)
    return made


def freia_affine(large):
    """The library's release has no spline."""
    width = _hidden(large)[0]
    inn = SequenceINN(2)
    for _ in range(8):
        inn.append(AllInOneBlock, subnet_constructor=lambda a, b: MLP(a, b, (width, width), nn.ReLU))
    return of_freia(2, inn)


OURS = {"mixture coupling": mixture_coupling, "mixture coupling, 3 layers": mixture_coupling_3, "affine coupling": affine_coupling,
        "MAF": maf, "NAF": naf, "FFJORD": ffjord, "residual": residual}
PEERS = {"zuko spline": zuko_spline, "zuko MAF": zuko_maf, "zuko NAF": zuko_naf, "zuko CNF": zuko_cnf,
         "nflows spline coupling": nflows_spline_coupling, "nflows spline autoregressive": nflows_spline_autoregressive,
         "normflows spline coupling": normflows_spline_coupling, "normflows spline autoregressive": normflows_spline_autoregressive,
         "normflows affine": normflows_affine, "normflows residual": normflows_residual, "FrEIA affine": freia_affine}
LENT = {f"{model}, SOAP": PEERS[model] for model in ("nflows spline coupling", "normflows spline autoregressive")}
MODELS = OURS | PEERS | LENT
BY_HAND = {"mixture coupling": Setting(1e-2, 2048, False, True), "mixture coupling, 3 layers": Setting(1e-2, 1536, False, True)}


def make(model, large):
    """A Contestant and what makes its evaluation finer."""
    made = MODELS[model](large)
    return made if isinstance(made, tuple) else (made, lambda: None)


# --- one run

def train(made, toy, seconds, setting):
    """Steps taken in that CPU time of this process. The schedule runs by the clock, so that it ends with the time."""
    parameters = [p for p in made.module.parameters() if p.requires_grad]
    optimiser = (flowkit.SOAP if setting.soap else adam)(parameters, lr=setting.lr)
    steps, start = 0, time.process_time()
    while (spent := (time.process_time() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = setting.lr * (1 + math.cos(math.pi * spent)) / 2 * (min(1, spent / WARM_UP) if setting.soap else 1)
        loss = -made.log_prob(toy.sample(setting.batch)).mean()
        optimiser.zero_grad()
        loss.backward()
        # A step that a rare point would spoil is left out; if all are, the gap says so.
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, 10.0)):
            optimiser.step()
            made.after_step()
        steps += 1
    return steps


@cache
def warm_up():
    """The first step of an optimiser loads a second's worth of modules, which is no flow's fault."""
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([weight], fused=True)
    weight.square().sum().backward()
    nn.utils.clip_grad_norm_([weight], 10.0)
    optimiser.step()


@cache
def points(name, n, seed):
    x = toys.get(name).sample(n, seed=seed)
    return x, toys.get(name).log_prob(x)


def judge(made, x, log_p):
    """The gap in nats and its standard error."""
    gap = torch.cat([(lp - made.log_prob(part).detach()).double() for part, lp in zip(x.split(5000), log_p.split(5000))])
    return gap.mean().item(), (gap.std() / len(gap) ** 0.5).item()


def run(model, toy, seconds, seed, setting, n=200_000, points_seed=TEST_SEED):
    """One training, judged: a dict of the gap, its standard error, the steps, and the number of parameters."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warm_up()
    x, log_p = points(toy, n, points_seed)
    torch.manual_seed(seed)
    made, finer = make(model, setting.large)
    steps = train(made, toys.get(toy), seconds, setting)
    finer()
    made.module.eval()
    # normflows' residual block differentiates its net even where no gradient is asked for.
    with torch.set_grad_enabled(model == "normflows residual"):
        gap, error = judge(made, x, log_p)
    return {"gap": gap, "error": error, "steps": steps, "parameters": sum(p.numel() for p in made.module.parameters())}


def all_runs(jobs, todo):
    """(key, result) of each (key, arguments of `run`) as they are finished, in `jobs` processes of one thread."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run, *arguments): key for key, arguments in todo}
        for future in as_completed(running):
            yield running[future], future.result()


# --- the search

def searched(model):
    """The settings among which the search chooses."""
    return WITH_SOAP if model in LENT else HALF


def search(jobs, models):
    done = {(row["model"], row["setting"], row["toy"]) for row in rows("fit_search")}
    todo = [((model, str(setting), toy), (model, toy, 10, SEARCH_SEED, setting, 20_000, VALIDATION_SEED))
            for model in models if model not in BY_HAND for setting in searched(model) for toy in SEARCHED_ON]
    for (model, setting, toy), got in all_runs(jobs, [item for item in todo if item[0] not in done]):
        append("fit_search", {"model": model, "setting": setting, "toy": toy, "gap": got["gap"], "steps": got["steps"]})
        print(f"{model}  {setting}  {toy}: {got['gap']:.4f} nats, {got['steps']} steps", flush=True)


def found():
    """For each searched model its best setting and the geometric mean of its gaps; a gap below zero or not finite counts as inf."""
    best = {}
    for model in MODELS:
        for setting in searched(model):
            gaps = [row["gap"] for row in select(rows("fit_search"), model=model, setting=str(setting))]
            if len(gaps) == len(SEARCHED_ON):
                score = math.exp(mean([math.log(gap) for gap in gaps])) if all(0 < gap < math.inf for gap in gaps) else math.inf
                if score < best.get(model, (None, math.inf))[1]:
                    best[model] = setting, score
    return best


def entrants():
    """The models of the table with their settings: all of ours, of each other library the flow that the search found best, and those with SOAP."""
    best, setting = found(), {}
    for model in OURS:
        if model in BY_HAND or model in best:
            setting[model] = BY_HAND[model] if model in BY_HAND else best[model][0]
    for library in ("zuko", "nflows", "normflows", "FrEIA"):
        if here := [model for model in PEERS if model.startswith(library + " ") and model in best]:
            first = min(here, key=lambda m: best[m][1])
            setting[first] = best[first][0]
    return setting | {model: best[model][0] for model in LENT if model in best}


# --- the table

def gaps(table, model, toy, budget):
    return by_seed(table, "gap", model=model, toy=toy, budget=float(budget))


def leaders(table, models, toy):
    """The model of ours and the one of the others with the lowest mean gap after 30 s, of those whose seeds are all there."""
    known = {m: mean(gaps(table, m, toy, 30).values()) for m in models if len(gaps(table, m, toy, 30)) == len(SEEDS)}
    sides = ([m for m in known if m in side] for side in (OURS, PEERS))
    return [min(side, key=known.get) for side in sides if side]


def of_budget(table, models, toy, budget):
    """The models that a toy's table has after that time: of the longest, the leaders."""
    return [m for m in leaders(table, entrants(), toy) if m in models] if budget == max(BUDGETS) else models


def wanted(models, names, budget):
    """Keys (toy, model, budget, seed), seed after seed, so that an early end leaves whole columns."""
    table = rows("fit")
    return [(toy, model, budget, seed) for seed in SEEDS for toy in names for model in of_budget(table, models, toy, budget)]


def measure(jobs, keys, settings):
    done = {(row["toy"], row["model"], row["budget"], row["seed"]) for row in rows("fit")}
    todo = [(key, (key[1], key[0], key[2], key[3], settings[key[1]])) for key in keys if key not in done]
    for (toy, model, budget, seed), got in all_runs(jobs, todo):
        append("fit", {"toy": toy, "model": model, "setting": str(settings[model]), "budget": budget, "seed": seed, **got})
        print(f"{toy}  {model}  {budget} s  seed {seed}: {got['gap']:.4f} +- {got['error']:.4f} nats, {got['steps']} steps", flush=True)


def shares(table, models):
    """For each toy: our best model and gap after 30 s, the best peer and its gap (means over the seeds)."""
    pairs = {toy: leaders(table, models, toy) for toy in TOYS}
    return {toy: [(m, mean(gaps(table, m, toy, 30).values())) for m in pair] for toy, pair in pairs.items() if len(pair) == 2}


def show_tables(table, models):
    for budget in BUDGETS:
        lines = [(m, *(cell(gaps(table, m, toy, budget), 4) for toy in TOYS)) for m in models
                 if any(gaps(table, m, toy, budget) for toy in TOYS)]
        show(f"KL(p || q) in nats after {budget} CPU-seconds, mean +- standard deviation over the seeds", ("", *TOYS), lines)
    show("After 30 s, beside the goals", ("", "ours, nats", "goal", "best peer, nats", "peer / ours", "goal", "with SOAP, nats", "/ ours"), [
        (toy, f"{ours:.4f} ({m})", f"{GOALS[toy]:g}", f"{theirs:.4f} ({p})", f"{theirs / ours:.1f}", "5.0", *lent(table, toy, ours))
        for toy, ((m, ours), (p, theirs)) in shares(table, models).items()])


def lent(table, toy, ours):
    """The best gap that another library's flow reaches with SOAP, as a cell, and how many times ours it is."""
    known = [mean(found.values()) for found in (gaps(table, m, toy, 30) for m in LENT) if len(found) == len(SEEDS)]
    return (f"{min(known):.4f}", f"{min(known) / ours:.1f}") if known else ("-", "-")


def draw(table, models, path):
    import matplotlib.pyplot as plt
    from flowkit import plotting
    colours, marks = dict(zip(models, plt.colormaps["tab20"].colors)), "osD^vPX*<>hdp8H"
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), sharex=True, constrained_layout=True)
    for axis, toy in zip(axes.flat, TOYS):
        for model, mark in zip(models, marks):
            seen = {b: list(gaps(table, model, toy, b).values()) for b in BUDGETS}
            x = [b for b in BUDGETS if seen[b]]
            y = [mean(seen[b]) for b in x]
            axis.plot(x, y, mark + ("-" if model in OURS else "-." if model in LENT else "--"), color=colours[model], label=model)
            for b in x:
                axis.plot([b, b], [min(seen[b]), max(seen[b])], color=colours[model], lw=1)
        axis.axhline(GOALS[toy], color="grey", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", title=toy.replace("_", " "), xticks=BUDGETS, xticklabels=BUDGETS)
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("CPU-seconds, one thread")
    for axis in axes[:, 0]:
        axis.set_ylabel("KL(p || q), nats")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def quick(jobs, models):
    """Half a second for each flow, with the first setting of its search: (model, gap, its standard error) each."""
    todo = [(m, (m, "eight_gaussians", 0.5, 0, BY_HAND.get(m, searched(m)[0]), 2000)) for m in models]
    result = []
    for model, got in all_runs(jobs, todo):
        print(f"{model}: {got['gap']:.3f} nats after {got['steps']} steps", flush=True)
        result.append((model, got["gap"], got["error"]))
    return result


def faults(table, models):
    """What `--check` complains of."""
    result = [f"{toy}, {budget} s: {model} lacks a seed" for budget in BUDGETS for toy in TOYS
              for model in of_budget(table, models, toy, budget) if len(gaps(table, model, toy, budget)) < len(SEEDS)]
    result += [f"{row['toy']}, {row['budget']:g} s, {row['model']}, seed {row['seed']:g}: a gap of {row['gap']:g} nats" for row in table
               if not -4 * row["error"] < row["gap"] < math.inf]
    return result + [f"{toy}: {m} is at {ours:.4f} nats, over half of {p}'s {theirs:.4f}"
                     for toy, ((m, ours), (p, theirs)) in shares(table, models).items() if ours > theirs / 2]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--toy", nargs="+", choices=TOYS, default=TOYS)
    parser.add_argument("--model", nargs="+", choices=MODELS, help="these only (default: the table's)")
    parser.add_argument("--budget", nargs="+", type=int, choices=BUDGETS, default=[], help="make the rows that lack, in this order")
    for name in ("search", "quick", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    if options.quick:
        complaints = [f"{model}: a gap of {gap:g} nats" for model, gap, error in quick(options.jobs, options.model or MODELS)
                      if not -4 * error < gap < math.inf]
    else:
        if options.search:
            search(options.jobs, options.model or MODELS)
        if found():
            show("The search: geometric mean of the gaps after 10 s, nats", ("", "rate/batch/size", "nats"),
                 [(m, str(s), f"{score:.4f}") for m, (s, score) in sorted(found().items(), key=lambda item: item[1][1])])
        if options.search:
            return
        settings = entrants()
        for budget in options.budget:
            measure(options.jobs, wanted([m for m in settings if m in (options.model or settings)], options.toy, budget), settings)
        table = rows("fit")
        show_tables(table, settings)
        if options.budget:
            draw(table, list(settings), datasets.DATA / "pictures" / "fit.png")
        complaints = faults(table, settings)
    if options.check:
        fine = "every gap is finite and none below zero" if options.quick else "no row lacks, and each gap is at most half of the best peer's"
        print("\n" + ("\n".join(complaints) or fine))
        sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
