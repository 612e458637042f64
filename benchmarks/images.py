"""The published tables of lesson 06 in miniature: the same models, small, on the 8x8 digits, with three seeds each.

    python benchmarks/images.py [TABLE ...] [--seeds N] [--quick] [--check] [--validate]

    flow_plus_plus   Flow++ without its learnt noise, mixtures or attention, of about equal sizes (Ho et al. 2019, table 2)
    residual         i-ResNet and residual flows, ELU and LipSwish (Chen et al. 2019, table 3): what training's own estimate claims
                     for the test images beside the exact log-determinant
    hybrid           classifiers on a flow's latent, weight lam of log p(x) (Chen et al. 2019, table 4)
    quality          bits, Fréchet distance and sampling time (Chen et al. 2019, table 2)

A finished row is appended to data/miniature/TABLE.csv at once, and a row that is there is not made again, so a run may be cut
off and continued; to repeat one, delete its row. Without a TABLE all four. Then each table is printed, mean +- standard deviation
over seeds, beside the published figures, with a verdict for each published ordering (flowkit.datasets.verdict, paired by seed).

Bits are bits per dimension on the 360 test images, of the bound where a model has only that. Seconds are CPU time of the
process (on a GPU: wall time). Sizes and steps were chosen by `--validate`, which trains one seed on the first 1,200 training
images, measures on the other 237 and writes nothing.

`--quick`: a few steps of each model, nothing read or written. `--check`: exit 1 and name each figure that misses its goal.
"""
import argparse
import copy
import csv
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flowkit
from flowkit import datasets, settings
from flowkit.residual import ACTIVATIONS, Geometric, Residual, lipschitz_mlp

LEVELS, SHAPE, DIM = 17, (1, 8, 8), 64
TRAIN, VALIDATION = 1437, 237
DRAWS = 16          # of the noise in each cell, for every bound that is reported
# Steps and learning rate, the same for all models of an ablation.
TRAINING = {"Flow++": (450, 1e-2), "Residual Flow": (400, 1e-2), "hybrid": (300, 5e-3), "PixelCNN": (500, 3e-3),
            "classifier": (400, 3e-3)}


# --- training and measuring, the same for all models

class Data:
    """The images and labels to train and to measure on, on the device; with `validate` a part of the training images takes the
    place of the test images, with `quick` there are a hundred of each."""

    def __init__(self, device, validate=False, quick=False):
        images, labels = (t.to(device) for t in datasets.digits())
        start, stop = (TRAIN - VALIDATION, TRAIN) if validate else (TRAIN, len(images))
        few = slice(100 if quick else None)
        self.device, self.images, self.labels = device, images[:start][few], labels[:start][few]
        self.test, self.test_labels = images[start:stop][few], labels[start:stop][few]


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def train(model, loss, data, kind, short=0, batch=64, decay=1e-2):
    """Minimise loss(images, labels) by AdamW as TRAINING[kind] says, or for `short` steps; returns the seconds.

    The learning rate rises for a tenth of the steps and then falls to zero along a cosine; gradients are cut at norm 1.
    """
    start = clock(data.device)
    steps, lr = TRAINING[kind]
    steps = short or steps
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        some = torch.randint(len(data.images), (batch,), device=data.device)
        value = loss(data.images[some], data.labels[some])
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss became {value.item()}")
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    return clock(data.device) - start


@torch.no_grad()
def bits(flow, images, draws=DRAWS):
    """Bits per dimension, the mean over the images and over `draws` of the noise, which starts alike for all models."""
    values = []
    for i in range(draws):
        settings.seed(1000 + i)
        values += [log_prob(flow, part) for part in images.split(256)]
    return flowkit.bits_per_dim(torch.cat(values), SHAPE, 1).mean().item()


def log_prob(flow, x):
    """In nats, or a bound where the model has only that."""
    return flow.log_prob(x) if getattr(flow, "exact", True) else flow.log_prob(x, bound=True)


def draws(short):
    return 1 if short else DRAWS


def size(model):
    return sum(p.numel() for p in model.parameters())


def nll(flow):
    """The loss per dimension, so that the same cut of the gradient's norm serves all."""
    return lambda x, labels: -log_prob(flow, x).mean() / DIM


# --- the models

FLOWPP = {      # widths that make the sizes equal to 4%, as the paper does
    "uniform dequantization": dict(uniform=True, width=20),
    "affine coupling": dict(affine=True, width=20),
    "no self-attention": dict(heads=0, width=14),
    "Flow++": dict(width=16),
}


def flow_pp(name="Flow++"):
    return flowkit.flow_plus_plus(SHAPE, LEVELS, **{"scales": 1, "couplings": 2, "components": 4, "heads": 2, **FLOWPP[name]})


class Flattened(flowkit.Transform):
    """(B, C, H, W) to (B, C H W)."""

    def forward(self, x, context=None):
        return x.flatten(1), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z.reshape(-1, *SHAPE)


def residual_flow(name="Residual Flow + LipSwish", blocks=6, hidden=(128,), lipschitz=0.9):
    estimator, activation = name.split(" + ")
    if estimator == "i-ResNet":
        how = dict(logdet="series", n_terms=5)
    else:
        how = dict(logdet="roulette", terms=Geometric(0.1, exact_terms=3))
    layers = []
    for _ in range(blocks):
        g = lipschitz_mlp(DIM, hidden, lipschitz, ACTIVATIONS[activation])
        layers += [flowkit.ActNorm(DIM), Residual(g, lipschitz=lipschitz, noise="rademacher", **how)]
    transform = [flowkit.UniformDequantizer(LEVELS), flowkit.Logit(event_dims=3), Flattened(), *layers, flowkit.ActNorm(DIM)]
    return flowkit.Flow(flowkit.StandardNormal(DIM), flowkit.Compose(transform))


def made_exact(flow):
    """A copy whose residual blocks find their log-determinants exactly."""
    flow = copy.deepcopy(flow)
    for part in flow.modules():
        if isinstance(part, Residual):
            part.logdet = "exact"
    return flow


class Hybrid(nn.Module):
    """A flow and a classifier of its latent: x to log p(x) and logits, from one pass. All kinds of blocks are of about one size."""

    def __init__(self, blocks, depth=6, width=68):
        super().__init__()
        c, h, w = 4, 4, 4
        if blocks == "Residual":
            self.flow = residual_flow(blocks=depth, hidden=(64,))
        else:
            layers = [flowkit.UniformDequantizer(LEVELS), flowkit.Logit(event_dims=3), flowkit.Squeeze()]
            for i in range(depth):
                net = nn.Sequential(nn.Conv2d(c // 2, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, width, 1), nn.ELU(),
                                    nn.Conv2d(width, c, 3, padding=1))
                mix = [flowkit.Conv1x1(c)] if blocks == "Coupling + 1x1 Conv" else []
                layers += [flowkit.ActNorm2d(c), *mix, flowkit.ImageCoupling(net, flowkit.Affine(bound=2.0), swap=i % 2 == 1)]
            self.flow = flowkit.Flow(flowkit.StandardNormal(c, h, w), flowkit.Compose(layers))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(DIM, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x):
        z, contribution = self.flow.transform(x)
        return self.flow.base.log_prob(z) + contribution, self.head(z)


def pixel_cnn(width=48, blocks=3):
    return flowkit.CategoricalPixels(flowkit.PixelCNN(1, LEVELS, width, blocks), SHAPE, LEVELS)


class Gaussian(nn.Module):
    """One Gaussian with a full covariance on the images with uniform noise, rounded down to levels when it samples."""
    exact = False

    def __init__(self, images):
        super().__init__()
        x = images.flatten(1).double()
        # The noise is independent of the image: mean 1/2, variance 1/12.
        cov = x.T.cov() + torch.eye(DIM, dtype=x.dtype, device=x.device) / 12
        self.normal = torch.distributions.MultivariateNormal(x.mean(0) + 0.5, cov)

    def log_prob(self, x, bound):
        return self.normal.log_prob(x.flatten(1) + torch.rand(len(x), DIM, dtype=torch.float64, device=x.device))

    def sample(self, n):
        return self.normal.sample((n,)).floor().clamp(0, LEVELS - 1).long().reshape(n, *SHAPE)


# --- one row of each table: run(name, data, short) -> {column: number}, what is trained being seeded before

def flow_plus_plus_row(model, data, short):
    flow = flow_pp(model).to(data.device)
    seconds = train(flow, nll(flow), data, "Flow++", short)
    return {"bits": bits(flow, data.test, draws(short)), "train_bits": bits(flow, data.images, draws(short) // 4 or 1),
            "parameters": size(flow), "seconds": seconds}


def residual_row(model, data, short):
    flow = residual_flow(model).to(data.device)
    seconds = train(flow, nll(flow), data, "Residual Flow", short)
    return {"claimed_bits": bits(flow, data.test, draws(short)), "bits": bits(made_exact(flow), data.test, draws(short) // 2 or 1),
            "parameters": size(flow), "seconds": seconds}


def hybrid_row(blocks, lam, data, short):
    model = Hybrid(blocks).to(data.device)
    weight = {"0": 0.0, "1/D": 1 / DIM, "1": 1.0}[lam]

    def loss(x, labels):
        log_p, logits = model(x)
        return flowkit.hybrid_loss(log_p, logits, labels, weight) / max(1, weight * DIM)

    seconds = train(model, loss, data, "hybrid", short)
    with torch.no_grad():
        settings.seed(1000)
        logits = sum(torch.softmax(model(data.test)[1], -1) for _ in range(draws(short)))
    row = {"accuracy": 100 * (logits.argmax(-1) == data.test_labels).double().mean().item(), "seconds": seconds}
    # A flow that was trained to classify alone has a density too, but nobody asked for it.
    return row | ({} if lam == "0" else {"bits": bits(made_exact(model.flow), data.test, draws(short) // 2 or 1)})


def one_by_one(run):
    """The rows of a table whose models have nothing to do with each other, from the function of one row."""
    def rows(names, data, seed, short):
        for name in names:
            settings.seed(seed)
            yield name, run(*name, data, short)
    return rows


def quality_rows(names, data, seed, short):
    """One classifier judges all models of a seed, and is trained with that seed too; a flow at two temperatures is trained once."""
    def trained(kind, make, loss):
        settings.seed(seed)
        model = make().to(data.device)
        train(model, loss(model), data, kind, short)
        return model

    @torch.no_grad()
    def features(images):
        return classifier.features(images / (LEVELS - 1)).double()

    def sampled(sample, **figures):
        settings.seed(2000 + seed)
        start = clock(data.device)
        sample(100)
        figures["sample_seconds"] = clock(data.device) - start
        return figures | {"frechet": distance(sample(len(data.test)))}

    def distance(images):
        return float(flowkit.images.frechet_distance(features(images), features(data.images)))

    def cross(model):
        return lambda x, labels: cross_entropy(model(x / (LEVELS - 1)), labels)

    classifier = trained("classifier", lambda: flowkit.ConvClassifier(1, 10), cross)
    if ("held-out digits",) in names:
        yield ("held-out digits",), {"frechet": distance(data.test)}
    makes = {"Gaussian": None, "PixelCNN": pixel_cnn, "Flow++": flow_pp, "Residual Flow": residual_flow}
    for model, make in makes.items():
        wanted = [name for name in names if name[0].partition(", T = ")[0] == model]
        if wanted:
            flow = trained(model, make, nll) if make else Gaussian(data.images)
            for name in wanted:
                temperature = name[0].partition(", T = ")[2]
                if temperature:
                    yield name, sampled(lambda n: flowkit.sample_at_temperature(flow, n, float(temperature)))
                else:
                    yield name, sampled(flow.sample, bits=bits(made_exact(flow), data.test, draws(short) // 2 or 1))


# --- the tables, and what is published about the order of their figures

class Order(NamedTuple):
    """That in `column` the figure of `better` is below that of `worse`, and the published figures that say so, as a text."""
    column: str
    better: tuple
    worse: tuple
    published: str


def orders(column, published, pairs=None):
    """An Order for each pair of names, by default all, in the dict of published figures, the lower one as the better."""
    for pair in pairs or itertools.combinations(published, 2):
        better, worse = sorted(pair, key=published.get)
        if published[better] < published[worse]:
            yield Order(column, better, worse, f"{published[better]:g} < {published[worse]:g}")


def flow_plus_plus_orders():
    return orders("bits", {(row["model"],): row["bits"] for row in datasets.published("flow_plus_plus_ablation")})


def residual_orders():
    rows = {(row["model"],): row["bits"] for row in datasets.published("residual_flow_ablation") if row["dataset"] == "MNIST"}
    yield from orders("bits", rows)
    for activation in ACTIVE:
        yield Order("error_of_claim", (f"Residual Flow + {activation}",), (f"i-ResNet + {activation}",), "unbiased against biased")


def hybrid_orders():
    rows = [row for row in datasets.published("residual_flow_hybrid") if row["dataset"] == "MNIST" and row["blocks"] in BLOCKS]
    name = lambda row: (row["blocks"], row["lam"] if row["lam"] == "1/D" else f"{row['lam']:g}")  # noqa: E731
    error = {name(row): round(100 - row["accuracy"], 2) for row in rows}
    coded = {name(row): row["bits"] for row in rows if row["bits"] is not None}
    lost = {key: round(error[key] - error[key[0], "0"], 2) for key in error if key[1] != "0"}
    for column, published in (("bits", coded), ("error", error), ("error_added", lost)):
        # Blocks are compared at the same lam; two lams one above the other with the same blocks.
        yield from orders(column, published, [(a, b) for a, b in itertools.combinations(published, 2) if a[1] == b[1] or (
            column != "error_added" and a[0] == b[0] and abs(LAMS.index(a[1]) - LAMS.index(b[1])) == 1)])


def quality_orders():
    fid = {row["model"]: row["fid"] for row in datasets.published("residual_flow_fid")}
    yield from orders("frechet", {(name,): fid[name] for name in ("PixelCNN", "Residual Flow")})
    # The paper of residual flows quotes Flow++ a little differently: its own paper's figure comes last and stays.
    cifar = {row["model"]: row["bits"] for table in ("residual_flow_bits", "flow_plus_plus_bits")
             for row in datasets.published(table) if row["dataset"] in ("CIFAR10", "CIFAR-10")}
    yield from orders("bits", {(name,): cifar[name] for name in ("PixelCNN", "Flow++", "Residual Flow")})


# The names of the models, as published.
ACTIVE, BLOCKS, LAMS = ("ELU", "LipSwish"), ("Coupling", "Coupling + 1x1 Conv", "Residual"), ("0", "1/D", "1")


class Table(NamedTuple):
    key: tuple              # the columns that name a model
    columns: tuple          # the others, in the file's order after the seed
    names: list
    rows: Callable
    orders: Callable


TABLES = {
    "flow_plus_plus": Table(("model",), ("bits", "train_bits", "parameters", "seconds"), [(name,) for name in FLOWPP],
                            one_by_one(flow_plus_plus_row), flow_plus_plus_orders),
    "residual": Table(("model",), ("claimed_bits", "bits", "parameters", "seconds"),
                      [(f"{kind} + {activation}",) for kind in ("i-ResNet", "Residual Flow") for activation in ACTIVE],
                      one_by_one(residual_row), residual_orders),
    "hybrid": Table(("blocks", "lam"), ("accuracy", "bits", "seconds"), list(itertools.product(BLOCKS, LAMS)),
                    one_by_one(hybrid_row), hybrid_orders),
    "quality": Table(("model",), ("bits", "frechet", "sample_seconds"),
                     [(name,) for name in ("held-out digits", "Gaussian", "PixelCNN", "Flow++", "Residual Flow", "Flow++, T = 0.7")],
                     quality_rows, quality_orders),
}


# --- files, what is printed, what is checked

def read(name):
    """{(model's name, seed): {column: number or None}} of the rows that are there."""
    path = datasets.DATA / "miniature" / f"{name}.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as f:
        table = TABLES[name]
        return {(tuple(row[key] for key in table.key), int(row["seed"])):
                {column: float(row[column]) if row[column] else None for column in table.columns} for row in csv.DictReader(f)}


def append(name, key, seed, figures):
    table, path = TABLES[name], datasets.DATA / "miniature" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        if new:
            writer.writerow([*table.key, "seed", *table.columns])
        writer.writerow([*key, seed, *(written(column, figures.get(column)) for column in table.columns)])


PLACES = {"parameters": 0, "seconds": 1, "accuracy": 2, "sample_seconds": 3}


def written(column, value):
    if value is None:
        return ""
    return f"{value:.{PLACES.get(column, 4)}f}"


def derived(name, rows):
    """The rows with the columns that only orders look at: error in %, what lam adds to it, a claim's distance from the truth."""
    rows = {key: dict(row) for key, row in rows.items()}
    for (model, seed), row in rows.items():
        if name == "residual":
            row["error_of_claim"] = abs(row["claimed_bits"] - row["bits"])
        if name == "hybrid":
            row["error"] = 100 - row["accuracy"]
            base = rows.get(((model[0], "0"), seed))
            row["error_added"] = base and base["accuracy"] - row["accuracy"]
    return rows


def judged(name, rows):
    """For each published order that the rows can decide: the Order, mean and standard error of the difference, the verdict."""
    rows = derived(name, rows)
    for order in TABLES[name].orders():
        seeds = [seed for model, seed in rows if model == order.better and (order.worse, seed) in rows]
        pairs = [[rows[model, seed][order.column] for seed in seeds] for model in (order.better, order.worse)]
        if len(seeds) >= 2:
            d = [worse - better for better, worse in zip(*pairs)]
            yield order, statistics.mean(d), statistics.stdev(d) / len(d) ** 0.5, datasets.verdict(*pairs)


def show(name, rows):
    table = TABLES[name]
    print(f"\n{name}: mean +- standard deviation over seeds")
    print(f"  {', '.join(table.key):26s} seeds" + "".join(f"{c:>20s}" for c in table.columns))
    for key in table.names:
        mine = [row for (model, _), row in rows.items() if model == key]
        cells = []
        for column in table.columns:
            values = [row[column] for row in mine if row[column] is not None]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            mean = f"{statistics.mean(values):.3f}{spread}" if values else "-"
            cells.append(f"{values[0]:,.0f}" if values and column == "parameters" else mean)
        print(f"  {', lam '.join(key):28s} {len(mine):3d}" + "".join(f"{cell:>20s}" for cell in cells))
    for order, mean, error, verdict in judged(name, rows):
        print(f"  {order.column}: {', lam '.join(order.better)} < {', lam '.join(order.worse)}: published {order.published}; "
              f"difference here {mean:.4f} +- {error:.4f}: {verdict}")
    sys.stdout.flush()


def broken(name, rows):
    """A sentence for each model without a row of finite figures, all that can be asked of models that are hardly trained."""
    for key in TABLES[name].names:
        row = rows.get((key, 0))
        if row is None or not all(math.isfinite(value) for value in row.values() if value is not None):
            yield f"{name}, {', lam '.join(key)}: a figure is missing or not finite, {row}"


def missed(name, rows, seeds):
    """A sentence for each figure that misses its goal."""
    # Code length of the test images by each pixel's own histogram in the training images. A Gaussian may do worse, and so may a
    # hybrid model that hardly weighs log p(x).
    pixel_by_pixel, table = 2.42, TABLES[name]
    for key, seed in itertools.product(table.names, range(seeds)):
        row, who = rows.get((key, seed)), f"{name}, {', lam '.join(key)}, seed {seed}"
        if row is None:
            yield f"{who}: no row"
            continue
        if row.get("bits") is not None and key != ("Gaussian",) and "1/D" not in key and not 0 < row["bits"] < pixel_by_pixel:
            yield f"{who}: {row['bits']:.3f} bits, no better than pixel by pixel, {pixel_by_pixel}"
        if name == "residual" and key[0].startswith("Residual Flow") and abs(row["claimed_bits"] - row["bits"]) > 0.03:
            yield f"{who}: unbiased, but claims {row['claimed_bits']:.3f} bits where the exact figure is {row['bits']:.3f}"
        if name == "hybrid" and key[1] == "0" and row["accuracy"] < 90:
            yield f"{who}: accuracy {row['accuracy']:.1f}%, under 90%"
        floor = rows.get((("held-out digits",), seed))
        if name == "quality" and floor and key != ("held-out digits",) and row["frechet"] <= floor["frechet"]:
            yield f"{who}: Fréchet distance {row['frechet']:.2f}, below that of held-out digits"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="*", help="some of " + ", ".join(TABLES))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, 3 by default")
    parser.add_argument("--quick", action="store_true", help="a few steps of each model; nothing is read or written")
    parser.add_argument("--check", action="store_true", help="exit 1 and name each figure that misses its goal")
    parser.add_argument("--validate", action="store_true",
                        help="one seed, measured on a part of the training images; nothing is read or written")
    options = parser.parse_args(arguments)
    if set(options.table) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(set(options.table) - set(TABLES)))}")
    torch.set_num_threads(1)
    data, stored = Data(settings.device(), options.validate, options.quick), not (options.quick or options.validate)
    seeds, misses = options.seeds if stored else 1, []
    for name in options.table or TABLES:
        table, rows = TABLES[name], read(name) if stored else {}
        for seed in range(seeds):
            absent = [key for key in table.names if (key, seed) not in rows]
            if not absent:
                continue
            for key, figures in table.rows(absent, data, seed, 2 if options.quick else 0):
                rows[key, seed] = {column: figures.get(column) for column in table.columns}
                if stored:
                    append(name, key, seed, figures)
                print(name, ", lam ".join(key), seed, figures, flush=True)
        show(name, rows)
        misses += broken(name, rows) if options.quick else missed(name, rows, seeds)
    print("\n" + ("\n".join(misses) if misses else "every figure meets its goal"))
    if options.check and misses:
        sys.exit(1)


if __name__ == "__main__":
    main()
