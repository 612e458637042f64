"""Two tables of variational inference in miniature: planar flows fitted to four energies, and flows in a VAE of the 8x8 digits.

    python benchmarks/inference.py [energies] [posterior] [--quick] [--check]

Each model is trained with the seeds 0, 1, 2, and each finished run adds a row to data/miniature/energies.csv or
posterior.csv; rows that are there are not made again, so a run that was cut off goes on where it stopped. Then the table,
mean and standard deviation over the seeds beside the published one, and for each published ordering whether it is
reproduced (see _tables.py).

energies: reverse KL of 2 to 32 planar layers to the four densities of Rezende & Mohamed 2015, table 1, as in their figure
3. Nats, the true KL: the energies' normalisers by quadrature.

posterior: a VAE with 8 latent coordinates of digits binarised at level 8, trained on 1,437 images; ELBO and
importance-weighted log p(x) of the other 360, nats an image. "planar" (Rezende & Mohamed 2015, section 4), "IAF-affine"
and "IAF-DSF" (Huang et al. 2018, section 6.1) bend the posterior, with parameters that depend on x; "flow prior" bends the
prior instead, by the layers of IAF-affine. Encoder, decoder, steps and learning rate are the same for all, chosen on the
last 237 training images, with training on the 1,200 before them (`--validation` repeats that for the choice made, and
writes nothing). There dropout of 0.2 was worse than none, and 128 units at rate 2e-3 worse than 256 at 4e-3. `seconds` is
CPU time.

`--quick`: one short run of each table, nothing written. `--check`: exit 1 if a row is missing (unless quick), a figure is
not finite, a KL lies below zero or an ELBO above log p(x).
"""
import argparse
import math
import sys
import time

import torch
from _tables import append, by_seed, cell, rows, select, show, show_orderings
from torch import nn
from torch.nn import functional as F

import flowkit
from flowkit import datasets, settings
from flowkit.core import check_input
from flowkit.planar import _above_minus_one

SEEDS = (0, 1, 2)
TABLES = ("energies", "posterior")


# --- energies: four unnormalised densities of the plane

def _wave(x):
    return torch.sin(math.pi / 2 * x[..., 0])


def _bump(x):
    return 3 * torch.exp(-0.5 * ((x[..., 0] - 1) / 0.6) ** 2)


def _step(x):
    return 3 * torch.sigmoid((x[..., 0] - 1) / 0.3)


def _two(a, b):
    """-log(exp(-a^2 / 2) + exp(-b^2 / 2))."""
    return -torch.logaddexp(-0.5 * a ** 2, -0.5 * b ** 2)


def _u1(x):
    ring = 0.5 * ((torch.linalg.vector_norm(x, dim=-1) - 2) / 0.4) ** 2
    return ring + _two((x[..., 0] - 2) / 0.6, (x[..., 0] + 2) / 0.6)


def _u2(x):
    return 0.5 * ((x[..., 1] - _wave(x)) / 0.4) ** 2


def _u3(x):
    away = x[..., 1] - _wave(x)
    return _two(away / 0.35, (away + _bump(x)) / 0.35)


def _u4(x):
    away = x[..., 1] - _wave(x)
    return _two(away / 0.4, (away + _step(x)) / 0.35)


ENERGIES = {"U1": _u1, "U2": _u2, "U3": _u3, "U4": _u4}
LAYERS = (2, 4, 8, 16, 32)


def log_target(energy, x):
    """-U(x) inside the square |x_i| <= 4 that the paper draws, with soft walls (half a Gaussian of width 0.4) round it.

    Without walls U2, U3 and U4 cannot be normalised: they are periodic in the first coordinate.
    """
    wall = 0.5 * ((x.abs() - 4).clamp_min(0) / 0.4).square().sum(-1)
    return -ENERGIES[energy](x) - wall


def log_normaliser(energy, step=0.02, reach=7.0):
    """log of the integral of exp(log_target), by the trapezium rule."""
    n = round(2 * reach / step) + 1
    line = torch.linspace(-reach, reach, n, dtype=torch.float64, device="cpu")
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return (torch.logsumexp(log_target(energy, grid).flatten(), 0) + 2 * math.log(step)).item()


def planar(x, w, u, b):
    """flowkit.Planar, z = x + u tanh(w.x + b) and its ldj, with parameters of any batch: x, w, u (..., D), b (..., 1)."""
    return bend(x, w, *constrained(w, u), b)


def constrained(w, u):
    """u moved along w so that w.u > -1, and w.u (..., 1)."""
    free, square = (w * u).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    wu = _above_minus_one(free)
    return u + (wu - free) * w / square.clamp_min(torch.finfo(square.dtype).tiny), wu


def bend(x, w, u, wu, b):
    h = torch.tanh((w * x).sum(-1, keepdim=True) + b)
    return x + u * h, torch.log1p(wu * (1 - h ** 2))[..., 0]


def energy_runs(cases, n_layers, steps=2000, batch=256, rate=1e-2, points=200_000):
    """The true KL(q || p) in nats after training, and its standard error, for each case (energy, seed).

    The flows are trained side by side, for speed, each with noise, weights and steps of its own: one is the same whatever
    others there are. The target grows out of a flat one during the first half, as in the paper, or a short flow finds one
    of two halves only.
    """
    device, base = settings.device(), flowkit.StandardNormal(2).to(settings.device())
    starts, noises = [], []
    for _, seed in cases:
        settings.seed(seed)
        starts.append([flowkit.Planar(2) for _ in range(n_layers)])
        noises.append(torch.Generator("cpu").manual_seed(seed))     # the same noise on every device
    # (layers, flows, 1, D), so that x may be (flows, points, D)
    weights = [torch.stack([torch.stack([getattr(layer, name).detach().reshape(1, -1) for layer in layers])
                            for layers in starts], 1).to(device).requires_grad_() for name in ("w", "u", "b")]

    def losses(n, beta):
        """log q - beta log target (flows, n) of fresh points."""
        x = torch.stack([torch.randn(n, 2, generator=noise, device="cpu") for noise in noises]).to(device)
        log_q, (w, u, b) = base.log_prob(x), weights
        for layer in zip(w.unbind(), *(v.unbind() for v in constrained(w, u)), b.unbind()):
            x, ldj = bend(x, *layer)
            log_q = log_q - ldj
        return log_q - beta * torch.stack([log_target(energy, some) for (energy, _), some in zip(cases, x)])

    optimiser = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        loss = losses(batch, min(1.0, 0.01 + 2 * step / steps)).mean(-1)
        optimiser.zero_grad()
        loss.sum().backward()
        # Each flow's gradient is cut at norm 10, so that one rare point does not stay in Adam's memory.
        norm = torch.stack([w.grad.square().sum((0, 2, 3)) for w in weights]).sum(0).sqrt()
        for w in weights:
            w.grad.mul_((10 / norm).clamp_max(1)[:, None, None])
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        at_once = min(points, 5000)
        gap = torch.cat([losses(at_once, 1.0).double() for _ in range(points // at_once)], -1).cpu()
    means, errors = gap.mean(-1), gap.std(-1) / gap.shape[-1] ** 0.5
    return [(m + log_normaliser(energy), e) for (energy, _), m, e in zip(cases, means.tolist(), errors.tolist())]


# --- posterior: a VAE of binarised digits

LATENTS, HIDDEN, CONTEXT = 8, 256, 32
BATCH, STEPS, RATE = 128, 4000, 4e-3
QUICK = {"steps": 10, "k": 50}
PLANAR = (2, 4, 8, 16)
POSTERIORS = [("VAE", 0)] + [("planar", k) for k in PLANAR] + [("IAF-affine", 2), ("IAF-DSF", 2), ("flow prior", 2)]


class Identity(flowkit.core.Transform):
    """No flow: the posterior stays a Gaussian with a diagonal covariance."""

    def forward(self, x, context=None):
        return x, x.new_zeros(x.shape[:-1])

    def inverse(self, z, context=None):
        return z


class ContextPlanar(flowkit.core.Transform):
    """z = x + u tanh(w.x + b) with w, u and b from the context, so that each image has a planar layer of its own.

    The posterior never needs its inverse.
    """

    def __init__(self, dim, context):
        super().__init__()
        self.dim, self.net = dim, nn.Linear(context, 2 * dim + 1)

    def forward(self, x, context=None):
        check_input(x, dim=self.dim)
        return planar(x, *self.net(context).split([self.dim, self.dim, 1], -1))


def autoregressive(layers, make, params, context):
    """MADEs with one hidden layer, the coordinates in turned order from one to the next."""
    parts = []
    for _ in range(layers):
        parts += [make(flowkit.MADE(LATENTS, params, hidden=(64,), context=context)), flowkit.Reverse()]
    return flowkit.Compose(parts)


def posterior_flow(model, layers):
    if model == "planar":
        return flowkit.Compose([ContextPlanar(LATENTS, CONTEXT) for _ in range(layers)])
    if model == "IAF-affine":
        return autoregressive(layers, flowkit.MAF, 2, CONTEXT)
    if model == "IAF-DSF":
        return autoregressive(layers, lambda net: flowkit.NAF(net, 8), 3 * 8, CONTEXT)
    return Identity()


class Encoder(nn.Module):
    """mu, log sigma and, for a flow that wants it, a context, from images (B, 64)."""

    def __init__(self, context):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, HIDDEN), nn.ELU())
        self.head = nn.Linear(HIDDEN, 2 * LATENTS + (CONTEXT if context else 0))

    def forward(self, x):
        mu, log_sigma, context = self.head(self.body(x)).split([LATENTS, LATENTS, self.head.out_features - 2 * LATENTS], -1)
        return mu, log_sigma, context if context.shape[-1] else None


class VAE(nn.Module):
    """p(z) p(x | z) and q(z | x); log_prob is a one-sample estimate of the ELBO, (B,), nats an image."""
    exact = False

    def __init__(self, model, layers):
        super().__init__()
        self.posterior = flowkit.FlowPosterior(Encoder(model not in ("VAE", "flow prior")), posterior_flow(model, layers))
        self.prior = flowkit.StandardNormal(LATENTS)
        if model == "flow prior":
            self.prior = flowkit.Flow(self.prior, autoregressive(layers, flowkit.MAF, 2, None))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, 64))

    def log_joint(self, x, z):
        return self.prior.log_prob(z) - F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)

    def log_prob(self, x, bound=True):
        return flowkit.iwae_log_prob(x, self.log_joint, self.posterior, 1)


@torch.no_grad()
def evaluate(vae, x, k=1000, rows_at_once=20_000):
    """Mean ELBO (k draws an image) and importance-weighted log p(x) of the images, nats an image."""
    vae.eval()
    elbo = log_prob = 0.0
    for some in x.split(max(1, rows_at_once // k)):
        elbo += vae.log_prob(some.repeat(k, 1)).double().sum().item() / k
        log_prob += flowkit.iwae_log_prob(some, vae.log_joint, vae.posterior, k).double().sum().item()
    return elbo / len(x), log_prob / len(x)


def binarised():
    """The digits as (1797, 64) of zeros and ones: a pixel is on from level 8 up."""
    return (datasets.digits()[0] >= 8).float().flatten(1)


def posterior_run(model, layers, seed, train, test, steps=STEPS, k=1000):
    """ELBO, log p(x) and the number of parameters of a model trained on the images `train`."""
    settings.seed(seed)
    train, test = train.to(settings.device()), test.to(settings.device())
    vae = VAE(model, layers).to(settings.device())
    flowkit.fit(vae, train, steps=steps, batch_size=BATCH, lr=RATE, progress=False)
    return (*evaluate(vae, test, k), sum(p.numel() for p in vae.parameters()))


# --- the tables

def faults(table, columns, label):
    """A sentence for each figure that cannot be right."""
    for row in table:
        for column in columns:
            if not math.isfinite(row[column]):
                yield f"{label(row)}: {column} is {row[column]}"


def energies(quick):
    cases = [(k, e, s) for k in LAYERS for s in SEEDS for e in ENERGIES] if not quick else [(2, e, 0) for e in ENERGIES]
    table = rows("energies") if not quick else []
    for layers in LAYERS:
        todo = [(e, s) for k, e, s in cases if k == layers and not select(table, energy=e, layers=k, seed=s)]
        found = energy_runs(todo, layers, **({"steps": 20, "points": 1000} if quick else {})) if todo else []
        for (energy, seed), (kl, error) in zip(todo, found):
            row = {"energy": energy, "layers": layers, "seed": seed, "kl": kl}
            print(f"  {energy}, {layers} layers, seed {seed}: KL {kl:.3f} nats, standard error {error:.3f}", flush=True)
            table.append(row)
            if not quick:
                append("energies", row)

    def kl(energy, layers):
        return by_seed(table, "kl", energy=energy, layers=layers)

    show("KL(q || p) in nats, lower is better (the paper draws curves, figure 3d, and prints no numbers)",
         ("", *(f"{k} layers" for k in LAYERS)), [(e, *(cell(kl(e, k), 3) for k in LAYERS)) for e in ENERGIES])
    show_orderings([(f"{e}: {b} layers before {a}", kl(e, b), kl(e, a), False)
                    for e in ENERGIES for a, b in zip(LAYERS, LAYERS[1:])], "nats", 3)
    missing = [f"energies: no row for {e}, {k} layers, seed {s}" for k, e, s in cases
               if not select(table, energy=e, layers=k, seed=s)]

    def label(row):
        return f"energies: {row['energy']}, {row['layers']:.0f} layers, seed {row['seed']:.0f}"

    return missing + list(faults(table, ["kl"], label)) + [
        f"{label(r)}: KL {r['kl']:.3f} below zero" for r in table if r["kl"] < -0.01]


def published_posterior(model, layers):
    """ELBO and log p(x) on binarised MNIST as two papers print them; of planar layers the paper had five times as many."""
    def pair(row, value):
        return f"{row[value]:.2f} +- {row[value + '_sd']:.2f}" if row else "-"

    naf = next((r for r in datasets.published("naf_variational") if r["model"] == model), None)
    bound = next((r for r in datasets.published("planar_bounds")
                  if model in ("VAE", "planar") and r["layers"] == 5 * layers), None)
    return pair(naf, "elbo"), pair(naf, "log_prob"), f"{-bound['bound']:.1f} ({bound['layers']:.0f} layers)" if bound else "-"


def posterior(quick):
    images = binarised()
    train, test = images[:1437], images[1437:]
    if quick:
        train, test = train[:256], test[:20]
    cases = [(m, k, s) for s in SEEDS for m, k in POSTERIORS] if not quick else [(m, k, 0) for m, k in POSTERIORS if k < 4]
    table = rows("posterior") if not quick else []
    for model, layers, seed in cases:
        if not select(table, model=model, layers=layers, seed=seed):
            start = time.process_time()
            elbo, log_prob, size = posterior_run(model, layers, seed, train, test, **QUICK if quick else {})
            seconds = time.process_time() - start
            row = {"model": model, "seed": seed, "elbo": elbo, "log_prob": log_prob, "layers": layers, "seconds": seconds}
            print(f"  {model}, {layers} layers, seed {seed}: ELBO {elbo:.2f}, log p(x) {log_prob:.2f}, {seconds:.0f} s",
                  flush=True)
            table.append(row)
            if not quick:
                append("posterior", row)
    lines = []
    for model, layers in POSTERIORS:
        def get(value):
            return by_seed(table, value, model=model, layers=layers)
        parameters = sum(p.numel() for p in VAE(model, layers).parameters())
        lines.append((f"{model}{f', {layers} layers' if layers else ''}", f"{parameters:,d}", cell(get("elbo")),
                      cell(get("log_prob")), *published_posterior(model, layers)))
    show("Held-out digits 8x8, binarised, nats an image, higher is better; and as published, on MNIST",
         ("", "parameters", "ELBO", "log p(x)", "ELBO (NAF)", "log p(x) (NAF)", "bound (planar)"), lines)

    def values(value, model, layers=2):
        return by_seed(table, value, model=model, layers=layers)

    orderings = [(f"{better} before {worse}, {name}", values(value, better),
                  values(value, worse, 0 if worse == "VAE" else 2), True)
                 for better, worse in (("IAF-affine", "VAE"), ("IAF-DSF", "VAE"), ("IAF-DSF", "IAF-affine"))
                 for value, name in (("elbo", "ELBO"), ("log_prob", "log p(x)"))]
    orderings += [("planar, 2 layers before VAE, ELBO", values("elbo", "planar"), values("elbo", "VAE", 0), True)]
    orderings += [(f"planar, {b} layers before {a}, ELBO", values("elbo", "planar", b), values("elbo", "planar", a), True)
                  for a, b in zip(PLANAR, PLANAR[1:])]
    show_orderings(orderings, "nats")
    missing = [f"posterior: no row for {m}, {k} layers, seed {s}" for m, k, s in cases
               if not select(table, model=m, layers=k, seed=s)]

    def label(row):
        return f"posterior: {row['model']}, {row['layers']:.0f} layers, seed {row['seed']:.0f}"

    return missing + list(faults(table, ["elbo", "log_prob"], label)) + [
        f"{label(r)}: ELBO {r['elbo']:.2f} above log p(x) {r['log_prob']:.2f}" for r in table if r["elbo"] > r["log_prob"]]


def validate(quick):
    """ELBO and log p(x) on the validation images, one seed a model: what the settings above were chosen by."""
    images = binarised()[:1437]
    for model, layers in POSTERIORS:
        elbo, log_prob, size = posterior_run(model, layers, 0, images[:1200], images[1200:], **QUICK if quick else {})
        print(f"  {model}, {layers} layers: ELBO {elbo:.2f}, log p(x) {log_prob:.2f}, {size:,d} parameters", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="energies, posterior (default: both)")
    parser.add_argument("--quick", action="store_true", help="one short run of each, nothing written")
    parser.add_argument("--check", action="store_true", help="exit 1 and name what is missing or cannot be right")
    parser.add_argument("--validation", action="store_true", help="posterior on the validation images, nothing written")
    options = parser.parse_args(arguments)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"TABLE must be one of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    if options.validation:
        return validate(options.quick)
    wrong = []
    for name in options.tables or TABLES:
        print(f"\n== {name}, on {settings.device()}")
        wrong += {"energies": energies, "posterior": posterior}[name](options.quick)
    print("\n" + ("\n".join(wrong) if wrong else "nothing is missing, every figure is possible"))
    if options.check and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
