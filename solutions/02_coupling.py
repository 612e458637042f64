# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lesson 02 · Coupling flows
#
# **How can a neural network bend space freely, and still be undone exactly?**
#
# A flow carries data to noise and noise back to data. A network alone cannot do that: nobody can run it backwards.
# The *coupling layer* finds a way round. It lets a network decide *how much* to stretch and shift, and leaves the
# stretching and shifting to a map that anyone can undo. You will write that layer, stack it, and train it until it
# draws two spirals.
#
# | | |
# |---|---|
# | **You need** | PyTorch tensors and modules; the change of variables formula (lesson 01, repeated below) |
# | **You write** | `Coupling`, `make_net`, `Permute`, `train_flow`; then NICE, ActNorm, an LU-factored linear layer, Flow++ |
# | **Time** | about 45 minutes to the trained spirals, twice that for the whole lesson |
#
# Every exercise has a check. It says what is right, what is not, and where to look. `hint("coupling")` gives a hint,
# `progress()` shows how far you are. Run All works from the start: what is not solved yet is drawn as an empty frame.

# %% tags=["setup"]
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import check, hint, progress, show
from flowkit import live, plotting, settings, toys
from flowkit.core import Compose, Flow, StandardNormal

settings.seed(0)
spirals = toys.get("two_spirals")

# %% [markdown]
# Here is the target: points on two spirals, and the density that they come from. It is made by a recipe, so its
# entropy is known, and with it the best loss that any flow can reach.

# %% tags=["show"]
@show
def _():
    figure, (left, right) = plotting.side_by_side(2, ["20,000 samples", "their density"])
    plotting.samples(left, spirals.sample(20_000), spirals.limits)
    plotting.density(right, spirals.log_prob, spirals.limits)
    return figure

# %% [markdown]
# ## 1 · What a layer must do
#
# Let $\mathbf x \in \mathbb R^D$ be a data point and $\mathbf z \in \mathbb R^D$ its *latent* point, with a known
# *base* density $p(\mathbf z)$, here a standard normal. A flow is an invertible map between the two. The change of
# variables formula gives the density of the data,
#
# $$\log p(\mathbf x) = \log p(\mathbf z) + \underbrace{\log\left|\det \frac{\partial \mathbf z}{\partial \mathbf x}\right|}_{\texttt{ldj}},
# \qquad \frac{\partial \mathbf z}{\partial \mathbf x} = \left[\frac{\partial z_i}{\partial x_j}\right]_{ij} \in \mathbb R^{D\times D}.$$
#
# A layer that is to be part of a flow has three duties. It must be
#
# 1. **expressive**: able to bend a simple density into a complicated one;
# 2. **invertible**: forwards to compute the density, backwards to sample;
# 3. **cheap in its determinant**: a general $D \times D$ determinant costs $O(D^3)$, for each point, in each step.
#
# **Which way is forward?** All code in this course says
#
# * `forward(x) -> (z, ldj)`, from data to latent, with `x` and `z` of shape `(B, D)` and `ldj` of shape `(B,)`:
#   one number $\log|\det \partial\mathbf z/\partial\mathbf x|$ for each of the `B` points of a batch;
# * `inverse(z) -> x`, from latent to data. This is how one samples.
#
# The lecture's prose turns the words round (there, sampling is "forward"); its coding task uses them as we do.
#
# **Predict before you run:** how much longer does the determinant of a full Jacobian take at $D = 256$ than at
# $D = 16$? And that of a triangular one, whose determinant is the product of its diagonal?

# %% tags=["show"]
@show
def _():
    import time

    def milliseconds(call):
        call()
        start = time.perf_counter()
        for _ in range(5):
            call()
        return (time.perf_counter() - start) / 5 * 1000

    sizes, batch = [16, 32, 64, 128, 256], settings.steps(64, 4)
    full = [milliseconds(lambda J=torch.randn(batch, D, D): torch.linalg.slogdet(J)) for D in sizes]
    diagonal = [milliseconds(lambda J=torch.randn(batch, D, D): J.diagonal(dim1=1, dim2=2).abs().log().sum(-1)) for D in sizes]
    figure = plotting.Picture(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    ax.loglog(sizes, full, "o-", color=plotting.PALETTE["red"], label="full Jacobian: slogdet")
    ax.loglog(sizes, diagonal, "s--", color=plotting.PALETTE["blue"], label="triangular: sum of the logs of the diagonal")
    ax.set_xlabel("dimensions D", fontsize=14), ax.set_ylabel(f"ms for {batch} points", fontsize=14)
    ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# ## 2 · The coupling layer
#
# Cut $\mathbf x$ in two halves, $\mathbf x_1 = \mathbf x_{1:d}$ and $\mathbf x_2 = \mathbf x_{d+1:D}$ with $d = D/2$.
# Pass the first half on. Let a network look at it, and let its answer scale and shift the second half:
#
# $$\begin{aligned}
# \mathbf z_1 &= \mathbf x_1, \\
# \mathbf z_2 &= \mathbf x_2 \odot e^{\boldsymbol\alpha} + \boldsymbol\mu,
# \end{aligned}
# \qquad (\boldsymbol\alpha, \boldsymbol\mu) = \mathrm{net}(\mathbf x_1),\quad \boldsymbol\alpha, \boldsymbol\mu \in \mathbb R^{d},$$
#
# where $\odot$ is the elementwise product. How does this do its three duties?
#
# **Invertible.** Since $\mathbf z_1 = \mathbf x_1$, whoever holds $\mathbf z$ can ask the network the same question and
# gets the same $\boldsymbol\alpha, \boldsymbol\mu$. Undoing one scale and one shift is school algebra,
# $\mathbf x_2 = (\mathbf z_2 - \boldsymbol\mu) \odot e^{-\boldsymbol\alpha}$. The network itself is never inverted, so it may be anything.
#
# **Cheap determinant.** The first half depends on itself alone, and each $z_2$ entry on its own $x_2$ entry and on $\mathbf x_1$:
#
# $$\frac{\partial \mathbf z}{\partial \mathbf x} =
# \begin{bmatrix} \mathbf I & \mathbf 0 \\ \dfrac{\partial \mathbf z_2}{\partial \mathbf x_1} & \operatorname{diag}(e^{\boldsymbol\alpha})\end{bmatrix}
# \quad\Longrightarrow\quad
# \log\left|\det\frac{\partial \mathbf z}{\partial \mathbf x}\right| = \log \prod_{i=1}^{d} e^{\alpha_i} = \sum_{i=1}^{d} \alpha_i .$$
#
# The block at the lower left, all the derivatives of the network, does not matter: the matrix is triangular.
# The scale is written $e^{\alpha}$ so that it is positive whatever the network says.
#
# **Expressive**: we shall see. (Real NVP: Dinh, Sohl-Dickstein & Bengio 2017, section 3.)
#
# ### Exercise `coupling` · 20 minutes · difficulty 2 of 5 · 10 points
#
# Write the layer. `net` maps `(B, d)` to `(B, 2 d)`: the first `d` columns are $\boldsymbol\alpha$, the last `d` are
# $\boldsymbol\mu$. Useful: `torch.chunk`, `torch.cat`. (If you prefer a net that returns a pair, or a pair of nets, or
# a softly bounded $\boldsymbol\alpha$: that is fine as well, as long as your `make_net` below fits.)

# %% tags=["solution"] nbgrader={"grade_id": "coupling"}
class Coupling(nn.Module):
    """z1 = x1,  z2 = x2 * exp(alpha) + mu,  with alpha, mu = net(x1)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """x (B, D) -> z (B, D), ldj (B,) = log|det dz/dx|"""
        ### BEGIN SOLUTION
        x1, x2 = x.chunk(2, dim=-1)
        alpha, mu = self.net(x1).chunk(2, dim=-1)
        z2 = x2 * alpha.exp() + mu
        return torch.cat([x1, z2], dim=-1), alpha.sum(dim=-1)
        ### END SOLUTION
        raise NotImplementedError("exercise coupling: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D), so that inverse(forward(x)[0]) is x"""
        ### BEGIN SOLUTION
        z1, z2 = z.chunk(2, dim=-1)
        alpha, mu = self.net(z1).chunk(2, dim=-1)
        return torch.cat([z1, (z2 - mu) * (-alpha).exp()], dim=-1)
        ### END SOLUTION
        raise NotImplementedError("exercise coupling: inverse")

# %% tags=["check"] nbgrader={"grade_id": "coupling_check"}
check("coupling", Coupling)

# %% [markdown]
# In the picture, the upper row shows a square grid of data points carried to latent space: vertical lines stay vertical,
# since $x_1$ is passed on; along each of them $x_2$ is stretched and shifted. The lower row is the density that the layer
# gives the data when the latent points are normal.
#
# **Predict before you run.** For one point, what are the four numbers of your layer's Jacobian if the net answers
# $\alpha = x_1$ and $\mu = x_1^2$, at $\mathbf x = (0.5, 2)$? Which of them enters `ldj`?

# %% tags=["compare"]
@show
def _():
    layer = Coupling(lambda x1: torch.cat([x1, x1**2], -1))
    x = torch.tensor([[0.5, 2.0]])
    z, ldj = layer.forward(x)
    J = torch.func.jacrev(lambda x: layer.forward(x)[0])(x)[0, :, 0]
    print("z   =", [round(v, 3) for v in z[0].tolist()])
    print("J   =", [[round(v, 3) for v in row] for row in J.tolist()])
    print("ldj =", [round(v, 3) for v in ldj.tolist()], " log|det J| =", round(float(torch.linalg.slogdet(J)[1]), 3))

# %% [markdown]
# **What a wrong sign does.** The log-determinant is easily returned with the sign of the *inverse* map. Nothing crashes then:
# the loss even falls. But the "density" is not one any more. Below, the same layer with the right `ldj` and with its sign
# turned; the integral over the plane tells them apart. **Predict:** which of the two integrals is 1, and can you say
# whether the other is larger or smaller than 1?

# %% tags=["show"]
@show
def _():
    layer = Coupling(lambda x1: torch.cat([0.8 + 0.5 * x1, torch.sin(2 * x1)], -1))
    limits, n = (-5, 5, -5, 5), 300
    x = torch.from_numpy(plotting.grid_points(limits, n))
    z, ldj = layer.forward(x)
    cell = (10 / n) ** 2
    figure, axes = plotting.side_by_side(2)
    for ax, sign, name in zip(axes, (1, -1), ("with ldj", "with -ldj")):
        log_p = StandardNormal(2).log_prob(z) + sign * ldj
        plotting.density(ax, log_p.reshape(n, n), limits)
        ax.set_title(f"{name}: integral {float(log_p.exp().sum()) * cell:.2f}")
    return figure

# %% [markdown]
# ## 3 · A network for it
#
# The network inside may be anything that turns `(B, d)` into `(B, 2 d)`. Two things are worth a thought. Its *last* layer
# should be free: $\boldsymbol\alpha$ and $\boldsymbol\mu$ may be negative. And there must be a *non-linearity* in between.
#
# **Predict:** if the net were linear, $\alpha = a x_1 + b$ and $\mu = c x_1 + e$ with numbers $a, b, c, e$, what could the
# vertical lines of the grid do, and what could they not?
#
# ### Exercise `make_net` · 10 minutes · difficulty 1 of 5 · 5 points
#
# Return a new, trainable net each time, fit for `Coupling(make_net())` with $D = 2$ (so $d = 1$). Useful: `nn.Sequential`.
# One or two hidden layers of 32 to 128 units are a good size here.

# %% tags=["solution"] nbgrader={"grade_id": "make_net"}
def make_net():
    """A new network (B, 1) -> (B, 2), or what your Coupling takes in its place."""
    ### BEGIN SOLUTION
    return nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    ### END SOLUTION
    raise NotImplementedError("exercise make_net")

# %% tags=["check"] nbgrader={"grade_id": "make_net_check"}
check("make_net", make_net)

# %% [markdown]
# ## 4 · No mixing
#
# One coupling layer leaves $x_1$ as it is. What do ten of them do?
#
# **Predict:** the picture shows samples of a stack of ten random coupling layers, without anything between them. What will
# the histogram of $x_1$ look like?

# %% tags=["show"]
def samples_and_histogram(layers):
    """Samples of a flow with untrained random layers, and the histogram of each coordinate."""
    with torch.no_grad():
        x = Flow(StandardNormal(2), Compose(layers)).sample(5000)
    figure, (left, right) = plotting.side_by_side(2, ["samples", "histograms of x1 and x2"])
    span = 1.05 * float(x.abs().quantile(0.995))
    plotting.samples(left, x, (-span, span, -span, span))
    bins, t = np.linspace(-4, 4, 60), np.linspace(-4, 4, 200)
    for column, (name, colour) in enumerate((("x1", "blue"), ("x2", "red"))):
        right.hist(x[:, column].numpy(), bins, density=True, histtype="step", linewidth=2, color=plotting.PALETTE[colour], label=name)
    right.plot(t, np.exp(-t**2 / 2) / math.sqrt(2 * math.pi), ":", color="black", label="N(0, 1)")
    right.legend(fontsize=12, frameon=False)
    return figure


def random_coupling():
    """A coupling layer of yours with weights three times as large as usual, so that it does something visible."""
    layer = Coupling(make_net())
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2.0)
    return layer


@show
def _():
    settings.seed(3)
    return samples_and_histogram([random_coupling() for _ in range(10)])

# %% [markdown]
# $x_1$ is still exactly normal: no number of coupling layers changes a coordinate that all of them pass on. Between two
# layers, the coordinates must change places. A *permutation* does that, and costs nothing: it is invertible, and the
# determinant of a permutation matrix is $\pm 1$, so `ldj` is zero for every point.
#
# Written with index lists: `z = x[:, order]`, that is $z_j = x_{\mathrm{order}[j]}$, where `order` holds each of
# $0, \dots, D-1$ once. The lecture's *reverse* is `order = [3, 2, 1, 0]`. Its *shuffle*
#
# $$\mathbf x = \mathbf P \mathbf z = \begin{bmatrix}0&0&1&0\\1&0&0&0\\0&1&0&0\\0&0&0&1\end{bmatrix}\mathbf z$$
#
# says $x_0 = z_2,\ x_1 = z_0,\ x_2 = z_1,\ x_3 = z_3$ (counting from 0 as Python does): read the other way round,
# $z_0 = x_1,\ z_1 = x_2,\ z_2 = x_0$, so here `order = [1, 2, 0, 3]`.
#
# **Predict:** which of the two is its own inverse?
#
# ### Exercise `permute` · 8 minutes · difficulty 1 of 5 · 5 points
#
# Write the layer for any `order`. `Reverse` is then nothing new: it is `Permute([D-1, ..., 1, 0])`.

# %% tags=["solution"] nbgrader={"grade_id": "permute"}
class Permute(nn.Module):
    """z = x[:, order]; `order` is a list of the integers 0 ... D-1 in any order."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        """x (B, D) -> z (B, D), ldj (B,)"""
        ### BEGIN SOLUTION
        return x[:, self.order], x.new_zeros(len(x))
        ### END SOLUTION
        raise NotImplementedError("exercise permute: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D)"""
        ### BEGIN SOLUTION
        return z[:, torch.as_tensor(self.order).argsort()]
        ### END SOLUTION
        raise NotImplementedError("exercise permute: inverse")

# %% tags=["check"] nbgrader={"grade_id": "permute_check"}
check("permute", Permute)

# %% [markdown]
# The same ten random layers, with a reversal after each. **Predict** the histograms first.

# %% tags=["show"]
@show
def _():
    settings.seed(3)
    return samples_and_histogram([layer for _ in range(10) for layer in (random_coupling(), Permute([1, 0]))])

# %% [markdown]
# ## 5 · Training by maximum likelihood
#
# Let $q_\theta$ be the density of a flow with parameters $\theta$, and $p$ that of the data. The loss is the mean negative
# log-likelihood, in nats, and it splits into something that no flow can change and something that it can:
#
# $$\mathcal L(\theta) = \mathbb E_{p}\left[-\log q_\theta(\mathbf x)\right]
# = \underbrace{\mathbb E_{p}\left[-\log p(\mathbf x)\right]}_{\text{entropy } H(p)}
# + \underbrace{\mathbb E_{p}\left[\log \frac{p(\mathbf x)}{q_\theta(\mathbf x)}\right]}_{\mathrm{KL}(p\,\|\,q_\theta)\ \ge\ 0}.$$
#
# For the two spirals $H(p) = 2.646$ nats. So a loss alone says little, but the **gap** `loss - entropy` is the distance
# from perfection, KL$(p\|q_\theta)$. The lecture's own solution ends at a loss of 2.937, a gap of 0.29 nats.
#
# ### Exercise `train_flow` · 15 minutes · difficulty 2 of 5 · 10 points
#
# Write the loop: for every batch compute the loss, move the parameters with `torch.optim.Adam`, and keep the loss as a
# plain `float`. A flow has `parameters()`, `log_prob(x) -> (B,)` and `sample(n) -> (n, D)`. `batches` is anything to
# iterate over; it has no length.

# %% tags=["solution"] nbgrader={"grade_id": "train_flow"}
def train_flow(flow, batches, lr):
    """Fit `flow` to the tensors (B, D) of `batches`; returns the list of losses, one float for each batch."""
    ### BEGIN SOLUTION
    optimiser = torch.optim.Adam(flow.parameters(), lr=lr)
    losses = []
    for x in batches:
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
    ### END SOLUTION
    raise NotImplementedError("exercise train_flow")

# %% tags=["check"] nbgrader={"grade_id": "train_flow_check"}
check("train_flow", train_flow)

# %% [markdown]
# Now everything is yours: the layer, its network, the permutation, the loop. The picture follows the training; it and the
# progress bar hang on the batches, so your loop needs to know nothing of them. Training goes in legs, each with a smaller
# step than the one before. The stop button ends it early and keeps what was learnt.
#
# **Predict:** which part of the spirals will be right first, which last?

# %% tags=["show"]
def coupling_flow(layers=8):
    """Your layers, with a reversal after each, on a standard normal."""
    return Flow(StandardNormal(2), Compose([t for _ in range(layers) for t in (Coupling(make_net()), Permute([1, 0]))]))


def gap(flow, target, n=20_000):
    """Mean negative log-likelihood on fresh points minus the entropy, in nats."""
    with torch.no_grad():
        return float(-flow.log_prob(target.sample(n, seed=1)).mean()) - target.entropy


def train_and_watch(flow, target, legs, size=512):
    """Train in legs [(lr, steps), ...] with a live picture; returns all losses."""
    losses = []

    def draw(step):
        figure, axes = plotting.side_by_side(2, ["the flow's density", "data"], size=3.6)
        plotting.density(axes[0], flow.log_prob, target.limits, n=100)
        plotting.samples(axes[1], target.sample(3000, seed=2), target.limits)
        return figure

    with live.interruptible():
        for i, (lr, steps) in enumerate(legs):
            losses += train_flow(flow, live.batches(target.sample, steps, size, draw if i == 0 else None, label=f"lr = {lr:g}"), lr)
    return losses


@show
def _():
    global spiral_flow
    settings.seed(1)
    spiral_flow = coupling_flow()
    legs = [(2e-3, settings.steps(1500, 20)), (5e-4, settings.steps(750, 10)), (1e-4, settings.steps(250, 5))]
    losses = train_and_watch(spiral_flow, spirals, legs)
    print(f"loss of the last 100 batches {np.mean(losses[-100:]):.3f} nats, entropy {spirals.entropy:.3f} nats")
    print(f"gap to the entropy: {gap(spiral_flow, spirals):.3f} nats (the lecture's solution: 0.29)")
    figure = plotting.Picture(figsize=(7, 3.6), layout="constrained")
    plotting.learning_curve(figure.subplots(), losses, floor=spirals.entropy)
    return figure

# %% [markdown]
# Samples and density beside the data. `sample` runs `inverse` from the last layer to the first, `log_prob` runs `forward`:
# one pass each, which is why coupling flows are fast in both directions.

# %% tags=["show"]
@show
def _():
    if "spiral_flow" not in globals():
        raise NotImplementedError("the training above needs coupling, make_net, permute and train_flow")
    figure, axes = plotting.side_by_side(4, ["data", "samples of your flow", "density of the data", "density of your flow"], size=3.4)
    plotting.samples(axes[0], spirals.sample(8000), spirals.limits)
    plotting.samples(axes[1], spiral_flow.sample(8000), spirals.limits)
    plotting.density(axes[2], spirals.log_prob, spirals.limits)
    plotting.density(axes[3], spiral_flow.log_prob, spirals.limits)
    p = spirals.log_prob(x := torch.from_numpy(plotting.grid_points(spirals.limits, 200))).exp()
    with torch.no_grad():
        q = spiral_flow.log_prob(x).exp()
    a, b, c, d = spirals.limits
    overlap = float(torch.minimum(p, q).sum()) * (b - a) * (d - c) / 200**2
    print(f"overlap of the two densities, the integral of min(p, q): {overlap:.2f} (1 would be perfect)")
    return figure

# %% [markdown]
# What does the flow do to space? Below, a grid of *data* is carried to latent space layer by layer. Look at the thin
# bridges: a continuous map cannot tear a normal cloud in two, so between the arms a thread of probability remains.

# %% tags=["show"]
@show
def _():
    if "spiral_flow" not in globals():
        raise NotImplementedError("the training above needs coupling, make_net, permute and train_flow")
    layers = list(spiral_flow.transform)
    stops = [0, len(layers) // 4, len(layers) // 2, len(layers)]
    figure, axes = plotting.side_by_side(len(stops), [f"after {s // 2} layers" for s in stops], size=3.4)
    x = spirals.sample(3000, seed=4)
    with torch.no_grad():
        for i in range(len(layers) + 1):
            if i in stops:
                span = 1.1 * float(x.abs().quantile(0.998))
                plotting.samples(axes[stops.index(i)], x, (-span, span, -span, span))
            if i < len(layers):
                x = layers[i].forward(x)[0]
    return figure
