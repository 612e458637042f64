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
# # Lesson 05 · Discrete and surjective flows
#
# **What is a flow where there is no volume? And what is left of it when the map cannot be undone?**
#
# So far data were points of $\mathbb R^D$, and every layer was a bijection. Pixels are integers, text is letters, and much of what one would like
# to do to data cannot be undone: take the absolute value, sort, take the maximum, round. In the first half of this lesson there is no volume, and
# the log-determinant vanishes. In the second half the bijection goes, and one formula is left that covers everything: bijections, variational
# autoencoders, dequantization, and layers that forget. At the end a flow writes a fairy tale, letter by letter.
#
# | | |
# |---|---|
# | **You need** | PyTorch tensors and modules; the change of variables formula (lesson 01), coupling layers (lesson 02) |
# | **You write** | `modular_shift`, `one_hot_argmax_st`, `round_st`, `IDFCoupling`; then `VAELayer`, `uniform_dequantize`, `variational_bound`, `Slice`, `Split`, `Abs`, `Max`, `Sort`, `Argmax` |
# | **Time** | three sittings: an hour for sections 1 to 4 (discrete flows), an hour and a half for 5 to 8 (one formula, dequantization, one dimension more or less), an hour and a half for 9 to 12 (symmetries, categories, text) |
# | **Sources** | the lectures "Normalizing Flows" (Nielsen) and "NF 3" (Banerjee), called "the lecture" below; papers are cited where they come in |
#
# Every exercise has a check. It says what is right, what is not, and where to look. `hint("abs_layer")` gives a hint, `progress()` shows how far you
# are. Run All works from the start: what is not solved yet is drawn as an empty frame (that is what `@show` above an experiment is for). Before an
# experiment you are asked to predict; the answer folds out, or the experiment shows it.

# %% tags=["setup"]
import itertools
import math

import numpy as np
import torch
from torch import distributions as dist
from torch import nn
from torch.nn import functional as F

from autograder import check, hint, progress, show
from flowkit import datasets, live, plotting, settings, toys, widgets
from flowkit.core import Compose, Flow, StandardNormal

settings.seed(0)

# %% [markdown]
# Three kinds of data on which a bijection of $\mathbb R^D$ has no hold, or a poor one. Left: two moons whose coordinates were rounded to one of 16
# levels; what was a density is a table of 256 probabilities. In the middle: a density that is the same in all four quarters, so a flow learns
# everything four times. Right: letters, which have not even an order.

# %% tags=["show"]
moons = toys.get("two_moons")
gaussians = toys.get("eight_gaussians")
TURN = torch.tensor([[math.cos(math.pi / 8), -math.sin(math.pi / 8)], [math.sin(math.pi / 8), math.cos(math.pi / 8)]])


def quantized(K, fine=16, toy=moons):
    """The toy's probabilities on K x K levels, P[x1, x2] (K, K) float64: each cell's mass, from fine x fine points in it."""
    left, right, bottom, top = toy.limits
    points = torch.from_numpy(plotting.grid_points((left, right, bottom, top), K * fine))
    p = toy.log_prob(points).double().exp().reshape(K, fine, K, fine).sum((1, 3)).T
    return p / p.sum()


def draw_table(ax, P, top=None):
    """A table of probabilities P[x1, x2] as an image, x1 to the right and x2 upwards."""
    ax.imshow(P.T, origin="lower", cmap="cividis", vmin=0, vmax=top)
    ax.set_xticks([]), ax.set_yticks([]), ax.set_xlabel("x1", fontsize=14), ax.set_ylabel("x2", fontsize=14)


def eight(n, seed=None):
    """Eight Gaussians on a circle, turned so that none sits on an axis: (n, 2)."""
    return gaussians.sample(n, seed=seed) @ TURN


@show
def _():
    figure, axes = plotting.side_by_side(3, ["integers", "a symmetry", "letters"])
    draw_table(axes[0], quantized(16))
    plotting.density(axes[1], lambda x: gaussians.log_prob(x @ TURN.T), gaussians.limits)
    text = datasets.text("mill")
    for row in range(12):
        axes[2].text(0.5, 1 - (row + 0.5) / 12, text[24 * row:24 * row + 24], family="monospace", ha="center", va="center", fontsize=13)
    axes[2].axis("off")
    return figure

# %% [markdown]
# ## 1 · No volume
#
# Let $\mathbf x$ be a random element of a finite or countable set $\mathcal X$, for instance $\{0, \dots, K-1\}^D$ or $\mathbb Z^D$, with
# probabilities $P(\mathbf x)$. Let $f : \mathcal X \to \mathcal X$ be a bijection and $\mathbf z = f(\mathbf x)$. Exactly one $\mathbf x$ goes to each
# $\mathbf z$, and takes its probability along:
#
# $$P_X(\mathbf x) = P_Z(f(\mathbf x)), \qquad \log p(\mathbf x) = \log p(\mathbf z).$$
#
# That is all. In $\mathbb R^D$ the determinant said how much volume a small box around the point gains; a single point of a set has no volume to
# gain. The contribution to $\log p$ is **zero**, for every bijection, however wild.
#
# It is also a limit. $f$ renames the states; the *list* of probabilities, without the names, stays as it is, and with it the entropy $H$. What then
# can such a flow do? Take a base whose coordinates are independent, $Q(\mathbf z) = \prod_d Q_d(z_d)$. The best that it can do on $\mathbf z$ is to
# match its marginals, which leaves
#
# $$\min_Q \mathrm{KL}(P_Z \,\|\, Q) = \sum_{d=1}^{D} H(z_d) - H(\mathbf z), \tag{1}$$
#
# in two dimensions the *mutual information* of $z_1$ and $z_2$. $H(\mathbf z) = H(\mathbf x)$ never changes. **A discrete flow makes the marginals
# narrow**, by moving probable states under one another, until the coordinates tell nothing of each other.
#
# ### Modular flows
#
# Classes $0, \dots, K-1$ with $K$ as the size of an alphabet. The *discrete flow* of Tran, Vafa, Agrawal, Dinh & Poole (2019) moves them in a circle:
#
# $$z_d = (\mu_d + \sigma_d\, x_d) \bmod K, \qquad \mu_d, \sigma_d \in \{0, \dots, K-1\},$$
#
# where $\mu_d$ and $\sigma_d$ may be functions of other coordinates, as in a coupling or an autoregressive layer. The slide does not say it, but
# not every $\sigma$ will do. **Predict:** which $\sigma$ make a bijection for $K = 6$? For $K = 7$?
#
# <details><summary>Answer</summary>
#
# Those that have no factor in common with $K$, $\gcd(\sigma, K) = 1$. Then there is a number $\sigma^{-1}$ with
# $\sigma\,\sigma^{-1} \equiv 1 \pmod K$. For $K = 6$ these are 1 and 5 only; for the prime 7 all but 0. With $\sigma = 2$ and $K = 6$, $x = 0$ and
# $x = 3$ both go to $\mu$.
#
# </details>
#
# ### Exercise `modular_shift` · 12 minutes · difficulty 2 of 5 · 5 points
#
# Write both directions, elementwise. `x` and `z` are integer tensors with values in $0, \dots, K-1$; `mu` is an int or an integer tensor that
# broadcasts against `x`; `sigma` and `K` are ints. `modular_shift` returns $z = (\mu + \sigma x) \bmod K$, `modular_unshift` returns
# $x = \sigma^{-1}(z - \mu) \bmod K$. **Both raise an error** (a `ValueError`, say) if $\gcd(\sigma, K) \ne 1$. Useful: `math.gcd`; `%`
# of tensors is never negative; Python's `pow(s, -1, K)` is the inverse of a number.

# %% tags=["solution"] nbgrader={"grade_id": "modular_shift"}
def modular_shift(x, mu, sigma, K):
    """z = (mu + sigma x) mod K, elementwise on integers 0 .. K-1; an error unless gcd(sigma, K) = 1."""
    ### BEGIN SOLUTION
    if math.gcd(sigma, K) != 1:
        raise ValueError("sigma must have no factor in common with K")
    return (mu + sigma * x) % K
    ### END SOLUTION
    raise NotImplementedError("exercise modular_shift")


def modular_unshift(z, mu, sigma, K):
    """x = sigma^-1 (z - mu) mod K, which undoes modular_shift; the same error."""
    ### BEGIN SOLUTION
    if math.gcd(sigma, K) != 1:
        raise ValueError("sigma must have no factor in common with K")
    return pow(sigma, -1, K) * (z - mu) % K
    ### END SOLUTION
    raise NotImplementedError("exercise modular_shift: modular_unshift")

# %% tags=["check"] nbgrader={"grade_id": "modular_shift_check"}
check("modular_shift", modular_shift, modular_unshift)

# %% [markdown]
# Your map as arrows, $x$ on the left and $z$ on the right; then what it does to a distribution on six states. **Predict** the last column of
# numbers: the entropies before and after.

# %% tags=["show"]
def entropy(P):
    """-sum P log P in nats over all entries of a table."""
    return float(-torch.special.xlogy(P, P).sum())


@show
def _():
    K, P = 6, torch.tensor([0.35, 0.05, 0.25, 0.02, 0.3, 0.03], dtype=torch.float64)
    figure, axes = plotting.side_by_side(4, ["mu = 1, sigma = 1", "mu = 1, sigma = 5", "P(x)", "P(z) by mu = 1, sigma = 5"], size=3.4)
    x = torch.arange(K)
    for ax, sigma in zip(axes, (1, 5)):
        for a, b in zip(x.tolist(), modular_shift(x, 1, sigma, K).tolist()):
            arrow = {"arrowstyle": "->", "color": plotting.PALETTE["blue"], "linewidth": 2, "shrinkA": 12, "shrinkB": 12}
            ax.annotate("", (1, b), (0, a), arrowprops=arrow)
            ax.text(0, a, a, ha="center", va="center", fontsize=15), ax.text(1, a, a, ha="center", va="center", fontsize=15)
        ax.set_xlim(-0.2, 1.2), ax.set_ylim(-0.6, K - 0.4), ax.axis("off")
    z = modular_shift(x, 1, 5, K)
    moved = torch.zeros_like(P).index_add(0, z, P)
    colours = [plotting.PALETTE[c] for c in ("blue", "orange", "green", "red", "purple", "sky")]
    axes[2].bar(x, P, color=colours), axes[3].bar(z, P, color=colours)
    for ax, table in zip(axes[2:], (P, moved)):
        ax.set_xticks(range(K)), ax.set_ylim(0, 0.45), ax.set_yticks([])
        ax.text(0.5, 0.92, f"H = {entropy(table):.4f} nats", transform=ax.transAxes, ha="center", fontsize=13)
    return figure

# %% [markdown]
# The same bars, with other names; the entropy agrees to the last digit. **See it live:** left and right change $\mu$, up and down $\sigma$, and the
# menu has cases where two $x$ land on one $z$. (It is drawn by your function once you have written it.)

# %% tags=["show"]
def yours(f, *arguments):
    """f if it is solved, else None: for a view that has something to show without it."""
    try:
        f(*arguments)
    except NotImplementedError:
        return None
    return f


@show
def _():
    return widgets.modulo(yours(modular_shift, torch.arange(3), 1, 1, 3))

# %% [markdown]
# Now (1) at work, in two dimensions and without any training. One coupling layer on the quantized moons: $z_1 = x_1$ and
# $z_2 = (x_2 + \mu(x_1)) \bmod K$, where $\mu(x_1)$ moves the most probable $x_2$ of each column to the middle. Everything is computed by
# enumerating all $256$ states. **Predict:** which of these change: $H(\mathbf z)$, $H(z_1)$, $H(z_2)$?

# %% tags=["show"]
def mutual_information(P):
    """H(z1) + H(z2) - H(z) of a table P[z1, z2], in nats: what the best independent base leaves over, equation (1)."""
    return entropy(P.sum(1)) + entropy(P.sum(0)) - entropy(P)


def shift_columns(P, mu):
    """The table of z1 = x1, z2 = (x2 + mu[x1]) mod K, by your modular_shift."""
    K = len(P)
    x1, x2 = torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij")
    z = torch.zeros_like(P)
    z[x1, modular_shift(x2, mu[:, None], 1, K)] = P
    return z


@show
def _():
    P = quantized(16)
    Z = shift_columns(P, (8 - P.argmax(1)) % 16)
    figure, axes = plotting.side_by_side(4, ["P(x)", "P(z)", "marginals of x2 and z2", "all 256, sorted"], size=3.4)
    draw_table(axes[0], P), draw_table(axes[1], Z)
    axes[1].set_xlabel("z1", fontsize=14), axes[1].set_ylabel("z2", fontsize=14)
    for table, colour, style, name in ((P, "blue", "-", "x"), (Z, "red", "--", "z")):
        axes[2].plot(table.sum(0), style, color=plotting.PALETTE[colour], linewidth=2.5, label=f"{name}2")
        axes[3].semilogy(table.flatten().sort(descending=True).values.clamp_min(1e-12), style, color=plotting.PALETTE[colour], linewidth=2.5, label=name)
        print(f"{name}: H = {entropy(table):.4f}   H({name}1) = {entropy(table.sum(1)):.4f}   H({name}2) = {entropy(table.sum(0)):.4f}   "
              f"left over by the best independent base: {mutual_information(table):.4f} nats")
    axes[2].set_yticks([]), axes[2].legend(fontsize=13, frameon=False), axes[3].legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# Only $H(z_2)$, and it falls. So far we chose $\mu$ by hand. How does a *network* choose it, when $\mu$ is an integer and has no gradient?
#
# ## 2 · A gradient through a choice
#
# The network says $K$ numbers $\boldsymbol\theta \in \mathbb R^K$, and $\mu$ is the place of the largest, written as a one-hot vector
# $\mathbf h \in \{0, 1\}^K$. Move $\boldsymbol\theta$ a little and $\mathbf h$ stays; move it more and $\mathbf h$ jumps. The derivative is zero
# wherever it exists. The *straight-through estimator* (Bengio, Léonard & Courville 2013) uses one function forward and the derivative of another
# backward:
#
# $$\text{forward:}\quad \mathbf h = \text{one-hot}(\arg\max_k \theta_k), \qquad\qquad \text{backward, as if:}\quad \mathbf h = \mathbf s = \operatorname{softmax}(\boldsymbol\theta / \tau), \quad \tau > 0.$$
#
# In PyTorch that takes one trick: `detach()` hides a value from the backward pass.
#
# ### Exercise `one_hot_argmax_st` · 10 minutes · difficulty 2 of 5 · 5 points
#
# `logits` has shape `(..., K)`; return the same shape: exactly one-hot on the forward pass, with the gradient of `softmax(logits / tau)` on the
# backward pass. Useful: `F.one_hot`, which gives integers.

# %% tags=["solution"] nbgrader={"grade_id": "one_hot_argmax_st"}
def one_hot_argmax_st(logits, tau):
    """logits (..., K) -> one-hot of the argmax (..., K), with the gradient of softmax(logits / tau)."""
    ### BEGIN SOLUTION
    soft = torch.softmax(logits / tau, -1)
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())
    ### END SOLUTION
    raise NotImplementedError("exercise one_hot_argmax_st")

# %% tags=["check"] nbgrader={"grade_id": "one_hot_argmax_st_check"}
check("one_hot_argmax_st", one_hot_argmax_st)

# %% [markdown]
# **Is that gradient any good?** Sometimes it is exact, for something. Let the loss be *linear* in the choice, $L = \mathbf l \cdot \mathbf h$ with
# a table $\mathbf l \in \mathbb R^K$ of losses, one for each class. Backward, $\partial L/\partial \mathbf h = \mathbf l$, and so the estimator is
#
# $$\nabla_{\boldsymbol\theta}\, \big(\mathbf l \cdot \operatorname{softmax}(\boldsymbol\theta/\tau)\big) = \nabla_{\boldsymbol\theta}\; \mathbb E_{k \sim \operatorname{softmax}(\boldsymbol\theta/\tau)}[\,l_k\,],$$
#
# the exact gradient of a sensible relaxation: the expected loss if the class were drawn. Now let several choices matter together, as in a flow of
# several layers: a table $A$ with one axis for each of $n$ choices, $L = \sum_{ij\cdots} A_{ij\cdots}\, h_i\, g_j \cdots$. To $\mathbf h$ the
# estimator says how $L$ changes with all *other* choices at their current corners; the expected loss over independent draws has their softmaxes
# there, a mean over all corners. By enumeration we know both. **Predict:** how does the agreement of the two gradients change with the number of
# choices?

# %% tags=["show", "compare"]
@show
def _():
    settings.seed(0)
    trials, K, tau = 1000, 4, 1.0
    for n in (1, 2, 3, 4, 5):
        A, theta = torch.randn(trials, *[K] * n), torch.randn(trials, n, K, requires_grad=True)

        def loss(h):
            """The table contracted with all n choices h (trials, n, K): linear in each of them, so of softmaxes it is the exact expectation."""
            L = A.flatten(1)
            for choice in h.unbind(1):
                L = (choice[:, :, None] * L.reshape(trials, K, -1)).sum(1)
            return L.sum()

        straight = torch.autograd.grad(loss(one_hot_argmax_st(theta, tau)), theta)[0].flatten(1)
        exact = torch.autograd.grad(loss(torch.softmax(theta / tau, -1)), theta)[0].flatten(1)
        cosine = torch.cosine_similarity(straight, exact)
        opposed = 100 * float((cosine < 0).double().mean())
        print(f"choices: {n}   mean cosine of the two gradients {float(cosine.mean()):.2f}, pointing the other way in {opposed:.0f}% of the tables")

# %% [markdown]
# With one choice it is exact (for the relaxation). With each further one it is worse: **biased**, and no average over many runs would
# cure that. It still points the right way more often than not, which is why training works at all.
#
# **Predict:** the temperature $\tau$ never changes what comes out forward. What does a small one do backward?

# %% tags=["show"]
@show
def _():
    t = torch.linspace(-3, 3, 601)
    figure, axes = plotting.side_by_side(2, ["forward: the first entry of h", "backward: its slope"], size=4.2)
    for tau, colour in ((1.0, "blue"), (0.5, "green"), (0.15, "red")):
        logits = torch.stack([t, torch.zeros_like(t)], -1).requires_grad_()
        h = one_hot_argmax_st(logits, tau)[:, 0]
        slope = torch.autograd.grad(h.sum(), logits)[0][:, 0]
        axes[0].plot(t, torch.softmax(logits.detach() / tau, -1)[:, 0], ":", color=plotting.PALETTE[colour], linewidth=2, label="softmax" if tau == 1 else None)
        axes[1].plot(t, slope, color=plotting.PALETTE[colour], linewidth=2.5, label=f"τ = {tau}")
    axes[0].plot(t, h.detach(), color="black", linewidth=2.5, label="yours")
    for ax in axes:
        ax.set_xlabel("logits (t, 0)", fontsize=14), ax.legend(fontsize=12, frameon=False, loc="upper left")
    return figure

# %% [markdown]
# A small $\tau$ follows the jump more closely, and pays with a slope that is huge near it and nothing elsewhere: logits that are far from the
# decision get no signal at all.
#
# ## 3 · A modular flow, trained, and measured by enumeration
#
# Now the whole thing. Data as one-hot vectors $\mathbf X \in \{0,1\}^{D \times K}$, here $D = 2$ and $K = 16$. Layers take turns: $x_2$ is shifted by
# $\mu(x_1)$, then $x_1$ by $\mu(x_2)$. With everything one-hot, the shift is a sum over all possible $\mu$, of which $\mathbf h$ picks one, so it is
# differentiable in both: $Z_j = \sum_m h_m\, X_{(j - m) \bmod K}$. The base is independent, with a free table for each coordinate; it starts at
# random, since under a *uniform* base all shifts are equally good and no gradient comes back. The loss is the exact cross-entropy
# $-\sum_{\mathbf x} P(\mathbf x) \log Q(\mathbf x)$ over all 256 states, so there is no sampling noise: what goes wrong is the estimator's fault.
#
# For comparison, a search without gradients, layer by layer: go through the sixteen columns twice and try all sixteen shifts of each, keeping what
# lowers (1); then turn the table and do the same for the next layer. **Predict:** who gets further with one, two and four layers, the gradient or
# the search?

# %% tags=["show"]
def cyclic(x, h):
    """The cyclic shift of one-hot x (N, K) by one-hot h (N, K): z_j = sum_m h_m x_(j - m)."""
    k = torch.arange(x.shape[-1])
    lands = F.one_hot((k[:, None] + k) % len(k)).to(x).flatten(0, 1)  # row (m, i): where i goes when m is added
    return (h[:, :, None] * x[:, None, :]).flatten(1) @ lands


class ModularFlow(nn.Module):
    """Modular couplings that take turns, on one-hot x (N, 2, K), with an independent base; log_prob is exact, with no contribution from any layer."""

    def __init__(self, K, layers, tau=1.0):
        super().__init__()
        self.tau, self.base = tau, nn.Parameter(torch.randn(2, K))
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(K, 64), nn.Tanh(), nn.Linear(64, K)) for _ in range(layers))

    def forward(self, x):
        first, second = x.unbind(-2)
        for net in self.nets:
            first, second = cyclic(second, one_hot_argmax_st(net(first), self.tau)), first  # and they change places
        return torch.stack([first, second], -2)

    def log_prob(self, x):
        return (self.forward(x) * self.base.log_softmax(-1)).sum((-2, -1))


def states(K):
    """All K^2 points, one-hot, (K^2, 2, K), in the order of a flattened table."""
    return F.one_hot(torch.cartesian_prod(torch.arange(K), torch.arange(K)), K).float()


def fit_table(model, x, P, steps, label, lr=1e-2):
    """Minimise -sum P log Q over all states x; returns KL(P || Q) in nats and Q, of the best step."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    weights, best = P.flatten().float(), (math.inf, None)
    with live.interruptible():
        for _ in live.bar(range(steps), label):
            log_Q = model.log_prob(x)
            loss = -(weights * log_Q).sum()
            if loss.item() < best[0]:
                best = loss.item(), log_Q.detach()
            optimiser.zero_grad(), loss.backward(), optimiser.step(), schedule.step()
    return best[0] - entropy(P), best[1].exp().reshape(P.shape)


def search(P, layers):
    """Modular couplings without a gradient: shift column after column to where (1) is least, then turn the table; (1) after each layer."""
    K, found = len(P), []
    for _ in live.bar(range(layers), "search"):
        for column in list(range(K)) * settings.steps(2, 1):
            shifts = [torch.zeros(K, dtype=torch.long).index_fill(0, torch.tensor([column]), m) for m in range(K)]
            P = min((shift_columns(P, mu) for mu in shifts), key=mutual_information)
        found.append(mutual_information(P))
        P = P.T
    return found


@show
def _():
    K, P, sizes = 16, quantized(16), (1, 2, 4)
    gaps, kept = {}, {}
    for layers in sizes:
        gaps[layers] = []
        for start in range(settings.steps(3, 1)):
            settings.seed(start)
            gap, Q = fit_table(ModularFlow(K, layers), states(K), P, settings.steps(200, 3), f"{layers} layers, start {start}", lr=2e-2)
            if not gaps[layers] or gap < min(gaps[layers]):
                kept[layers] = Q
            gaps[layers].append(gap)
    by_search = search(P, max(sizes))
    found = [by_search[layers - 1] for layers in sizes]
    figure, axes = plotting.side_by_side(4, ["P", "Q, one layer", "Q, four layers", "gap KL(P || Q)"], size=3.4)
    for ax, table in zip(axes, (P, kept[1], kept[4])):
        draw_table(ax, table, top=float(P.max()))
    for place, values in enumerate(gaps.values()):
        axes[3].scatter([place] * len(values), values, s=50, color=plotting.PALETTE["blue"], label="trained" if place == 0 else None)
    axes[3].axhline(mutual_information(P), color="black", linestyle=":", label="no layer")
    axes[3].plot(range(3), found, "D", color=plotting.PALETTE["red"], label="search")
    axes[3].set_xticks(range(3), sizes), axes[3].set_xlabel("layers", fontsize=14), axes[3].set_ylabel("nats", fontsize=14), axes[3].set_xlim(-0.4, 2.4)
    axes[3].set_ylim(0, 1.6 * mutual_information(P)), axes[3].legend(fontsize=11, frameon=False, loc="upper right")
    print(f"the 256 probabilities of Q sum to {float(kept[4].sum()):.6f}; without a layer the gap is {mutual_information(P):.3f} nats")
    for n, value in zip(sizes, found):
        print(f"{n} layers: trained {', '.join(f'{g:.3f}' for g in sorted(gaps[n]))}; by search {value:.3f} nats")
    return figure

# %% [markdown]
# The layers *could* do it: already one, found by trying, takes away two fifths of the gap. (And a probability was computed for every state, and
# they sum to 1.) With one layer the gradient gets part of the way, from a lucky start. **More layers do not help it**: two are no better than the
# best single one, and four are worse, although they contain every single one. Each step is taken in the belief that all other choices stay, and in
# a stack, none does. (Tran et al. report good results on harder data with larger nets, so it can be done; but if a discrete flow will not learn,
# think of this picture first.)
#
# ## 4 · Integers: no circle, only order
#
# Sound samples and pixels are integers with an order, and a step from 255 to 0 is not a small one. The *integer discrete flow* (Hoogeboom, Peters,
# van den Berg & Welling 2019) shifts without a circle, on all of $\mathbb Z^D$:
#
# $$\mathbf z_1 = \mathbf x_1, \qquad \mathbf z_2 = \mathbf x_2 + \operatorname{round}\big(\mathrm{net}(\mathbf x_1)\big), \qquad \log p(\mathbf x) = \log p(\mathbf z),$$
#
# and rounds straight through: forward the nearest integer, backward as if there were nothing, with slope 1. (The lecture's slide prints a floor,
# $\lfloor\theta_d\rfloor$; the paper rounds.) **Predict:** a network wants to say $\theta$ and is heard as an integer. By how much is it misheard
# on average, by the floor and by rounding?
#
# ### Exercise `round_st` · 5 minutes · difficulty 1 of 5 · 3.5 points
#
# Any shape in, the same out: the value of `torch.round(x)`, exactly, and the gradient of `x`.

# %% tags=["solution"] nbgrader={"grade_id": "round_st"}
def round_st(x):
    """The nearest integer, with the gradient of x."""
    ### BEGIN SOLUTION
    return x.detach().round() + (x - x.detach())
    ### END SOLUTION
    raise NotImplementedError("exercise round_st")

# %% tags=["check"] nbgrader={"grade_id": "round_st_check"}
check("round_st", round_st)

# %% tags=["show", "compare"]
@show
def _():
    settings.seed(0)
    theta = 10 * torch.randn(100_000)
    print(f"mean of floor(theta) - theta     {float((theta.floor() - theta).mean()):+.2f}")
    print(f"mean of round_st(theta) - theta  {float((round_st(theta) - theta).mean()):+.2f}")

# %% [markdown]
# The floor drags every shift down by half a step, rounding by nothing. Now for **where the gradient is wrong**. Two losses of an integer
# $m = \operatorname{round}(\theta)$, both minimised by gradient descent on $\theta$ through your `round_st`:
#
# * left, $L(m) = (m - 0.4)^2$. The best integer is 0;
# * right, $L(m) = m^2/10 - \frac15 \sin 2\pi m$. On the integers the sine vanishes: $L = m^2/10$, and the best integer is 0 again.
#
# **Predict** the two paths from $\theta = 2$ and $\theta = 1$. (Green: the best integer. Red square: where the descent ends.)

# %% tags=["show"]
@show
def _():
    losses = {"(m - 0.4)²": (lambda m: (m - 0.4) ** 2, 2.0, 0.05, (-1, 3)),
              "m²/10 - sin(2πm)/5": (lambda m: m ** 2 / 10 - torch.sin(2 * math.pi * m) / 5, 1.0, 0.1, (-2, 9))}
    figure = plotting.Picture(figsize=(15, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    for (name, (loss, start, lr, (low, high))), (left, right) in zip(losses.items(), (axes[:2], axes[2:])):
        theta, path = torch.tensor(start, requires_grad=True), []
        for _ in range(120):
            path.append(theta.item())
            theta = (theta - lr * torch.autograd.grad(loss(round_st(theta)), theta)[0]).detach().requires_grad_()
        smooth, whole, path = torch.linspace(low, high, 1000), torch.arange(low, high + 1.0), torch.tensor(path)
        left.plot(smooth, loss(smooth), color=plotting.PALETTE["sky"], label="what the gradient sees")
        left.plot(whole, loss(whole), "o", color="black", markersize=5, label="what there is")
        left.plot([0], loss(torch.zeros(1)), "o", color=plotting.PALETTE["green"], markersize=11)
        left.plot(path[-1].round(), loss(path[-1].round()), "s", color=plotting.PALETTE["red"], markersize=10)
        left.set_title(name, fontsize=14), left.set_xlabel("m", fontsize=14), left.set_ylabel("L", fontsize=14), left.legend(fontsize=11, frameon=False)
        right.plot(path, color=plotting.PALETTE["red"], linewidth=2), right.axhline(0, color=plotting.PALETTE["green"], linestyle=":", linewidth=2)
        right.plot(path.round(), color="black", linewidth=1, alpha=0.7)
        right.set_title("θ (red), round θ (black)", fontsize=14), right.set_xlabel("step", fontsize=14)
    return figure

# %% [markdown]
# Left: at $m = 0$ the slope says "up", at $m = 1$ it says "down", and $\theta$ trembles around $\frac12$ for ever, two steps of five at the worse
# integer. That is the usual noise of such trainings, and a falling learning rate does not cure it: it only chooses where the trembling stops.
# Right: the slope *at* the integers is $m/5 - 2\pi/5$, negative up to $m = 6$, while the loss *over* the integers rises. Descent climbs from
# $m = 1$, where the loss is 0.1, to $m = 6$, where it is 3.6 (and would tremble there between 6 and 7). Nothing in the estimator knows about differences between neighbours; it trusts that
# the loss is nearly straight over one step. So loss functions, and nets between the layers, should be smooth on the scale of one integer.
#
# ### Exercise `idf_coupling` · 12 minutes · difficulty 2 of 5 · 7 points
#
# Write the layer. `x` is `(B, D)` with an even $D$, floats that hold integers; `x1` is the first half of the columns. `net` maps `(B, D / 2)` to the
# same shape.
# `forward` returns `z` of shape `(B, D)` and a contribution of shape `(B,)`; `inverse` undoes it exactly, and gradients reach `net` straight
# through. (The check uses this class alone: if you call your `round_st`, get that right first.)

# %% tags=["solution"] nbgrader={"grade_id": "idf_coupling"}
class IDFCoupling(nn.Module):
    """z1 = x1, z2 = x2 + round(net(x1)), on integers, with log p(x) = log p(z)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """x (B, D) integers in floats -> z (B, D) integers in floats, contribution (B,)"""
        ### BEGIN SOLUTION
        x1, x2 = x.tensor_split([x.shape[1] // 2], dim=1)
        return torch.cat([x1, x2 + round_st(self.net(x1))], 1), x.new_zeros(len(x))
        ### END SOLUTION
        raise NotImplementedError("exercise idf_coupling: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D)"""
        ### BEGIN SOLUTION
        z1, z2 = z.tensor_split([z.shape[1] // 2], dim=1)
        return torch.cat([z1, z2 - round_st(self.net(z1))], 1)
        ### END SOLUTION
        raise NotImplementedError("exercise idf_coupling: inverse")

# %% tags=["check"] nbgrader={"grade_id": "idf_coupling_check"}
check("idf_coupling", IDFCoupling)

# %% [markdown]
# The moons once more, now as integers: the nearest integer to about four times the coordinates, on $33 \times 33$ cells, whose probabilities we know.
# The base is independent: each coordinate is a mixture of three *discretised logistics*,
# $P(z) = \sigma\big(\frac{z + 1/2 - m}{s}\big) - \sigma\big(\frac{z - 1/2 - m}{s}\big)$ with the sigmoid $\sigma$, a mean $m$ and a scale $s$. Its
# mass over all of $\mathbb Z$ is 1, so the flow's is too. **Predict:** could such a flow reach a gap of zero, with nets and a base as
# flexible as one likes?

# %% tags=["show"]
class IntegerBase(nn.Module):
    """Independent mixtures of three discretised logistics, on integers z (N, 2): log_prob (N,) in nats."""

    event_shape, batch_shape = torch.Size([2]), torch.Size()

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([-6.0, 0.0, 6.0]).repeat(2, 1))
        self.log_scales, self.logits = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(2, 3))

    def log_prob(self, z):
        centred, scale = z[..., None] - self.means, self.log_scales.exp()
        up, down = (centred + 0.5) / scale, (centred - 0.5) / scale
        # sigmoid(u) - sigmoid(d) = sigmoid(u) sigmoid(-d) (1 - exp(d - u)): no tail is lost
        log_mass = F.logsigmoid(up) + F.logsigmoid(-down) + torch.log(-torch.expm1(down - up))
        return torch.logsumexp(log_mass + self.logits.log_softmax(-1), -1).sum(-1)


class Turn(nn.Module):
    """Change the places of two coordinates."""

    def forward(self, x):
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, z):
        return z.flip(1)


class Scale(nn.Module):
    """Multiply by a fixed factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def integer_net():
    """A net on one integer of size about ten, (B, 1) -> (B, 1), that starts near zero shifts."""
    return nn.Sequential(Scale(0.2), nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1), Scale(4.0))


@show
def _():
    side = 33
    P = quantized(side, fine=8)  # a cell is 8 / 33, about a quarter, wide
    x = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float() - side // 2
    gaps, tables = {}, {}
    for layers in (0, 1, 2, 4):
        settings.seed(0)
        steps = [step for _ in range(layers) for step in (IDFCoupling(integer_net()), Turn())]
        flow = Flow(IntegerBase(), Compose(steps or [Turn()]))
        gaps[layers], tables[layers] = fit_table(flow, x, P, settings.steps(500, 3), f"{layers} layers", lr=5e-3)
        if layers == 4:
            z, contribution = flow.transform(x)
            latent = torch.zeros(side, side)
            inside = ((z + side // 2 >= 0) & (z + side // 2 < side)).all(1)
            index = (z[inside] + side // 2).long()
            latent[index[:, 0], index[:, 1]] = P.flatten().float()[inside]
            print(f"contributions all zero: {bool((contribution == 0).all())}, round trip exact: {bool((flow.transform.inverse(z) == x).all())}, "
                  f"mass of Q on the box: {float(tables[4].sum()):.4f}")
    figure, axes = plotting.side_by_side(4, ["P(x)", "P(z), four layers", "Q, no layer", "Q, four layers"], size=3.4)
    for ax, table in zip(axes, (P, latent, tables[0], tables[4])):
        draw_table(ax, table, top=float(P.max()))
    axes[1].set_xlabel("z1", fontsize=14), axes[1].set_ylabel("z2", fontsize=14)
    print("gap in nats: " + ", ".join(f"{n} layers {gap:.3f}" for n, gap in gaps.items()))
    return figure

# %% [markdown]
# A gap of 0.83 nats falls to about a quarter of that, with losses that are exact and an inverse that is exact to the last bit. (Such a flow can
# therefore *compress*: an arithmetic coder spends $-\log_2 Q(\mathbf x)$ bits on $\mathbf x$ and gets every bit back; that is what it was made
# for.)
#
# <details><summary>Could the gap be zero?</summary>
#
# On a *finite* set usually not, whatever the nets: the four probabilities 0.1, 0.2, 0.3, 0.4 on two bits are no table of products in any order, and
# a bijection can only reorder them. On $\mathbb Z^2$ there is room: lay all states out along the first coordinate, $(0,0), (1,0), (2,0), \dots$;
# then $z_2$ is constant, and two coordinates of which one is constant are independent. Such maps can be built from shifts (van den Berg et al.
# 2021, "IDF++"); whether smooth nets and a biased gradient find anything like it is another matter.
#
# </details>
#
# ## 5 · One formula for everything
#
# Now the bijection goes. All that we keep is a *way from $\mathbf z$ to $\mathbf x$*, which may be random: draw $\mathbf z \sim p(\mathbf z)$, then
# $\mathbf x \sim p(\mathbf x \mid \mathbf z)$. The likelihood is an integral over all $\mathbf z$ that may have been behind it,
#
# $$p(\mathbf x) = \int p(\mathbf z)\, p(\mathbf x \mid \mathbf z)\, d\mathbf z .$$
#
# To get at it without the integral, choose a *way back*, $q(\mathbf z \mid \mathbf x)$, and write the same as a mean over draws from it:
#
# $$p(\mathbf x) = \mathbb E_{\mathbf z \sim q(\mathbf z \mid \mathbf x)}\left[ p(\mathbf z)\, \frac{p(\mathbf x \mid \mathbf z)}{q(\mathbf z \mid \mathbf x)}\right]. \tag{2}$$
#
# (It needs $q > 0$ wherever $p(\mathbf z)\,p(\mathbf x \mid \mathbf z) > 0$.) The logarithm is concave, so by Jensen's inequality the log of a mean
# is at least the mean of the logs:
#
# $$\boxed{\;\log p(\mathbf x) \;\ge\; \mathbb E_{\mathbf z \sim q(\mathbf z \mid \mathbf x)}\Big[\log p(\mathbf z) + \mathcal V(\mathbf x, \mathbf z)\Big], \qquad \mathcal V(\mathbf x, \mathbf z) = \log \frac{p(\mathbf x \mid \mathbf z)}{q(\mathbf z \mid \mathbf x)}\;} \tag{3}$$
#
# $\mathcal V$, one number for each $\mathbf x$, is the **likelihood contribution** of the layer (Nielsen, Jaini, Hoogeboom, Winther & Welling 2020, *SurVAE
# Flows*). The difference of the two sides is $\mathrm{KL}\big(q(\mathbf z \mid \mathbf x)\,\|\,p(\mathbf z \mid \mathbf x)\big)$: since
# $p(\mathbf z)\,p(\mathbf x \mid \mathbf z) = p(\mathbf x)\, p(\mathbf z \mid \mathbf x)$, the bracket is
# $\log p(\mathbf x) - \log \frac{q(\mathbf z \mid \mathbf x)}{p(\mathbf z \mid \mathbf x)}$. So the bound is tight exactly for
# $q(\mathbf z \mid \mathbf x) = p(\mathbf z \mid \mathbf x)$, and then every single draw gives $\log p(\mathbf x)$.
#
# (On the slide, the inequality stands without the expectation, with $\mathbf z \sim q$ beside it. A single draw may well lie *above*
# $\log p(\mathbf x)$; it is the mean that does not.)
#
# From here on `forward(x) -> (z, contribution)` is random where the way back is, and `log p(x) = log p(z) + contribution` holds exactly, or as a
# bound in the mean, which the class says by `exact = False`.
#
# Nothing was assumed of the two ways, so the formula is a layer already: with an *encoder* for $q(\mathbf z \mid \mathbf x)$ and a *decoder* for
# $p(\mathbf x \mid \mathbf z)$ it is a variational autoencoder (Kingma & Welling 2014), and (3) is its ELBO.
#
# ### Exercise `stochastic_layer` · 12 minutes · difficulty 3 of 5 · 7.5 points
#
# Write it. `encoder(x)` and `decoder(z)` give `torch.distributions` objects whose event is the last dimension (as `Independent(Normal(...), 1)`
# does), so that `log_prob` has shape `(B,)`. `forward` draws $\mathbf z$ so that gradients can pass through it (`rsample`), and returns $\mathbf z$
# and $\mathcal V$ of shape `(B,)`. `inverse` draws $\mathbf x$.

# %% tags=["solution"] nbgrader={"grade_id": "stochastic_layer"}
class VAELayer(nn.Module):
    """z ~ encoder(x) and x ~ decoder(z), with contribution log p(x | z) - log q(z | x)."""
    exact = False  # a bound, in the mean

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x):
        """x (B, D) -> a draw z (B, d), contribution (B,)"""
        ### BEGIN SOLUTION
        q = self.encoder(x)
        z = q.rsample()
        return z, self.decoder(z).log_prob(x) - q.log_prob(z)
        ### END SOLUTION
        raise NotImplementedError("exercise stochastic_layer: forward")

    def inverse(self, z):
        """z (B, d) -> a draw x (B, D)"""
        ### BEGIN SOLUTION
        return self.decoder(z).rsample()
        ### END SOLUTION
        raise NotImplementedError("exercise stochastic_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "stochastic_layer_check"}
check("stochastic_layer", VAELayer)

# %% [markdown]
# A model in which everything is known: $z \sim \mathcal N(0, 1)$, $x \mid z \sim \mathcal N(z, \frac12)$. Then $x \sim \mathcal N(0, \frac32)$ and
# the ideal way back is $z \mid x \sim \mathcal N(\frac23 x, \frac13)$. At $x = 2$ your layer draws 200,000 times, with three encoders: the ideal
# one, one that is too wide, and one in the wrong place. The table compares two means with the exact values: the mean of the estimates with
# $\log p(x)$ (a bound), and the mean of their *exponentials* with $p(x)$ (equation 2: equal). **Predict:** which encoder's histogram is a single
# line?

# %% tags=["show", "compare"]
def normal(mean, std):
    """A normal with its event in the last dimension."""
    return dist.Independent(dist.Normal(mean, std), 1)


encoders = {
    "ideal": lambda x: normal(2 * x / 3, torch.full_like(x, (1 / 3) ** 0.5)),
    "too wide": lambda x: normal(2 * x / 3, torch.ones_like(x)),
    "misplaced": lambda x: normal(x / 3, torch.full_like(x, 0.7)),
}


def linear_estimates(encoder, n=200_000):
    """n draws of log p(z) + contribution at x = 2, (n,)."""
    layer = VAELayer(encoder, lambda z: normal(z, torch.full_like(z, 0.5 ** 0.5)))
    z, contribution = layer.forward(torch.full((n, 1), 2.0))
    return StandardNormal(1).log_prob(z) + contribution


@show
def _():
    settings.seed(0)
    exact = dist.Normal(0.0, 1.5 ** 0.5).log_prob(torch.tensor(2.0))
    print(f"log p(2) = {float(exact):.3f}, p(2) = {float(exact.exp()):.4f}")
    for name, encoder in encoders.items():
        estimates = linear_estimates(encoder)
        print(f"{name:10s} mean of the estimates {float(estimates.mean()):.3f}   mean of their exp {float(estimates.exp().mean()):.4f}")

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    exact = float(dist.Normal(0.0, 1.5 ** 0.5).log_prob(torch.tensor(2.0)))
    figure, axes = plotting.side_by_side(3, encoders, size=3.6)
    for ax, encoder in zip(axes, encoders.values()):
        estimates = linear_estimates(encoder, 20_000)
        ax.hist(estimates.numpy(), np.linspace(-6, 0, 121), density=True, color=plotting.PALETTE["sky"])
        ax.axvline(float(estimates.mean()), color=plotting.PALETTE["blue"], linewidth=2.5, label="mean")
        ax.axvline(exact, color=plotting.PALETTE["red"], linestyle="--", linewidth=2.5, label="log p(x)")
        ax.set_yscale("log"), ax.set_yticks([]), ax.set_xlabel("estimate (nats)", fontsize=14), ax.minorticks_off()
    axes[1].legend(fontsize=12, frameon=False, loc="upper left")
    return figure

# %% [markdown]
# Many draws lie above the dashed line, their mean does not.
#
# ## 6 · The table, row by row
#
# Everything else in this lesson is a limit of your `VAELayer` in which one or both ways lose their noise. The table of the lecture:
#
# | | from $\mathbf z$ to $\mathbf x$ | from $\mathbf x$ to $\mathbf z$ | $\mathcal V(\mathbf x, \mathbf z)$ | $\log p(\mathbf x)$ |
# |---|---|---|---|---|
# | **bijective** | $\mathbf x = f(\mathbf z)$ | $\mathbf z = f^{-1}(\mathbf x)$ | $\log \lvert\det \partial \mathbf z/\partial \mathbf x\rvert$ | exact |
# | **stochastic** | $\mathbf x \sim p(\mathbf x \mid \mathbf z)$ | $\mathbf z \sim q(\mathbf z \mid \mathbf x)$ | $\log p(\mathbf x \mid \mathbf z) - \log q(\mathbf z \mid \mathbf x)$ | bound |
# | **surjective, generative** | $\mathbf x = f(\mathbf z)$, many to one | $\mathbf z \sim q(\mathbf z \mid \mathbf x)$ on those with $f(\mathbf z) = \mathbf x$ | as $p(\mathbf x \mid \mathbf z) \to \delta(\mathbf x - f(\mathbf z))$ | bound |
# | **surjective, inference** | $\mathbf x \sim p(\mathbf x \mid \mathbf z)$ on those with $g(\mathbf x) = \mathbf z$ | $\mathbf z = g(\mathbf x)$, many to one | as $q(\mathbf z \mid \mathbf x) \to \delta(\mathbf z - g(\mathbf x))$ | exact |
#
# (The slide's first row has $\log\det$ without the absolute value, and its last one writes $f^{-1}$ for $g$, which no function's inverse need be.)
# $\delta$ is the limit of ever narrower densities. The limits, with noise of width $\varepsilon$:
#
# **Bijective.** $p(\mathbf x \mid \mathbf z) = \mathcal N(\mathbf x; f(\mathbf z), \varepsilon^2 I)$. A $\mathbf z$ near $f^{-1}(\mathbf x)$ misses
# by $f(\mathbf z) - \mathbf x \approx J\,(\mathbf z - f^{-1}(\mathbf x))$ with $J = \partial \mathbf x/\partial \mathbf z$, so the ideal $q$ is
# normal around $f^{-1}(\mathbf x)$ with covariance $\varepsilon^2 (J^\top J)^{-1}$. In the ratio of the two normals all powers of $\varepsilon$ and
# the exponents cancel, and the ratio of the norming constants is
# $\sqrt{\det (J^\top J)^{-1}} = \lvert\det J\rvert^{-1} = \lvert\det \partial \mathbf z/\partial \mathbf x\rvert$.
#
# **Generative surjection**, slicing: $\mathbf x = \mathbf z_1$ and the rest $\mathbf z_2$ is dropped. The $\mathbf z_1$-part of $p$ and $q$ is a
# bijection with $J = I$ and cancels. What is left is $\mathcal V = -\log q(\mathbf z_2 \mid \mathbf x)$.
#
# **Inference surjection**, absolute value: $z = \lvert x \rvert$, and $p(x \mid z)$ has half of its mass near $z$, half near $-z$. At $x$, only the
# half on its own side counts: $\mathcal V = \log\frac12$. No draw is left in (2), so it holds without a mean: **exact**.
#
# Below, three rows made from your `VAELayer` with noise of width $\varepsilon$, 200 draws for each $\varepsilon$, and the difference of the
# contribution from the limit in the table. The bijection is $f(z) = \sinh z$. **Predict:** which row agrees at *every* $\varepsilon$?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    n = 200

    def at(value):
        return torch.full((n, 1), value, dtype=torch.float64)

    def folded(z, eps):
        """Half of the mass around z, half around -z, of width eps."""
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(z), 2)), normal(torch.stack([z, -z], 1), torch.tensor(eps)))

    def near(mean, eps):
        return normal(mean, torch.full_like(mean, eps))

    rows = {  # x, encoder(x, eps), decoder(z, eps), the limit of the contribution for x and z
        "bijective: x = sinh z": (
            at(2.0), lambda x, eps: normal(x.asinh(), eps / (1 + x ** 2).sqrt()), lambda z, eps: near(z.sinh(), eps),
            lambda x, z: -0.5 * torch.log1p(x ** 2)[:, 0]),
        "generative: x = z[:1]": (
            at(0.5), lambda x, eps: normal(torch.cat([x, 2 * x], 1), torch.tensor([eps, 0.8]).double()), lambda z, eps: near(z[:, :1], eps),
            lambda x, z: -dist.Normal(2 * x, 0.8).log_prob(z[:, 1:])[:, 0]),
        "inference: z = |x|": (
            at(-0.5), lambda x, eps: near(x.abs(), eps), folded,
            lambda x, z: x[:, 0] * 0 - math.log(2)),
    }
    figure, axes = plotting.side_by_side(3, rows, size=4)
    for ax, (x, encoder, decoder, limit) in zip(axes, rows.values()):
        for eps in torch.logspace(0, -3, 25).tolist():
            z, contribution = VAELayer(lambda x: encoder(x, eps), lambda z: decoder(z, eps)).forward(x)
            ax.plot([eps] * n, contribution - limit(x, z), ".", color=plotting.PALETTE["blue"], markersize=3)
        ax.set_xscale("log"), ax.set_xlim(1.3, 7e-4), ax.set_ylim(-2, 2), ax.axhline(0, color=plotting.PALETTE["red"], linewidth=1)
        ax.set_xlabel("width of the noise ε", fontsize=14)
    axes[0].set_ylabel("contribution minus limit", fontsize=14)
    return figure

# %% [markdown]
# Slicing does, since its two noises are the same normal. The bijection needs $f$ to be straight over a width of $\varepsilon$, the absolute value
# needs $\varepsilon$ well below $\lvert x \rvert$. In the limit, the formula does not say goodbye to anything we had: a flow is a variational
# autoencoder whose encoder and decoder are exact inverses and have no noise.
#
# ## 7 · Dequantization is a surjection
#
# Integers are often modelled by a *continuous* flow. The way from latent to data ends with rounding down: $\mathbf x = \lfloor K \mathbf y \rfloor$
# for a $\mathbf y \in [0, 1)^D$, many $\mathbf y$ to one $\mathbf x \in \{0, \dots, K-1\}^D$. A **generative surjection**. So the contribution is
# $-\log q(\mathbf y \mid \mathbf x)$, for any $q$ that lives on the cell $\big[\frac{\mathbf x}{K}, \frac{\mathbf x + 1}{K}\big)$. The model's
# probability is the mass of the cell, $P(\mathbf x) = \int_{\text{cell}} p(\mathbf y)\, d\mathbf y$.
#
# The simplest $q$ is *uniform* (Uria, Murray & Larochelle 2013): $\mathbf y = (\mathbf x + \mathbf u)/K$ with $\mathbf u$ uniform on $[0,1)^D$. Its
# density on a cell of volume $K^{-D}$ is $K^D$, so the contribution is $-D \log K$. Then (3) reads
# $\log P(\mathbf x) \ge \mathbb E_{\mathbf u}[\log p(\mathbf y)] - D \log K$, the first line of the lecture's dequantization.
#
# Why not feed the integers to the flow as they are? Because the likelihood would have no bound: a density can put a spike on each integer, as high
# as one likes.
#
# ### Exercise `uniform_dequantize` · 8 minutes · difficulty 1 of 5 · 5 points
#
# `x` holds integers in $0, \dots, K-1$, shape `(B, D)`. Return `y` of the same shape, floats in $[0, 1]$ (rounding may reach 1), and the contribution of shape `(B,)`.

# %% tags=["solution"] nbgrader={"grade_id": "uniform_dequantize"}
def uniform_dequantize(x, K):
    """x (B, D) integers 0 .. K-1 -> y = (x + u) / K (B, D) with u uniform, and the contribution -D log K (B,)."""
    ### BEGIN SOLUTION
    y = (x + torch.rand(x.shape)) / K
    return y, torch.full((len(x),), -x.shape[1] * math.log(K))
    ### END SOLUTION
    raise NotImplementedError("exercise uniform_dequantize")

# %% tags=["check"] nbgrader={"grade_id": "uniform_dequantize_check"}
check("uniform_dequantize", uniform_dequantize)

# %% [markdown]
# A model on $[0, 1]$ whose cells have a known mass: Kumaraswamy's density $p(y) = a b\, y^{a-1}(1 - y^a)^{b-1}$, with the CDF
# $F(y) = 1 - (1 - y^a)^b$; here $a = 3$, $b = 9$ and $K = 8$ levels. So $P(x) = F(\frac{x+1}{K}) - F(\frac xK)$. Your layer draws 200,000 times at
# each level. **Predict:** at which levels is the uniform bound nearly tight?

# %% tags=["show", "compare"]
A, B, LEVELS = 3.0, 9.0, 8


def log_kumaraswamy(y):
    """log p(y) in nats for y (B, 1) in (0, 1) -> (B,)"""
    return (math.log(A * B) + (A - 1) * y.log() + (B - 1) * torch.log1p(-y ** A))[:, 0]


edges = torch.arange(LEVELS + 1, dtype=torch.float64) / LEVELS
exact_levels = torch.diff(1 - (1 - edges ** A) ** B).log()  # log P(x) of each level


@show
def _():
    settings.seed(0)
    print("level   log P(x)   mean of the estimates      P(x)   mean of their exp")
    for level in range(LEVELS):
        y, contribution = uniform_dequantize(torch.full((200_000, 1), level), LEVELS)
        estimates = log_kumaraswamy(y.double()) + contribution
        print(f"{level:5d} {exact_levels[level]:10.2f} {estimates.mean():23.2f} {exact_levels[level].exp():9.1e} {estimates.exp().mean():19.1e}")

# %% [markdown]
# The mean of the exponentials is the probability (equation 2), the mean of the estimates stays below its log (equation 3), and comes close where
# the density is flat across the cell: uniform is then nearly the ideal $q$. At the two ends, where the density changes by orders of magnitude
# within one cell, the bound is 0.9 and 5.3 nats too low.
#
# **Variational dequantization** (Ho, Chen, Srinivas, Duan & Abbeel 2019, *Flow++*) learns the noise: $\mathbf u \sim q(\mathbf u \mid \mathbf x)$
# on $[0, 1)^D$. The ideal one is the model's own density within the cell, $q(\mathbf u \mid \mathbf x) = p(\mathbf x + \mathbf u)/P(\mathbf x)$.
# The lecture writes the model's density on $[0, K]^D$, with cells of volume 1, so that no $\log K$ is needed:
#
# $$\log P(\mathbf x) \;\ge\; \mathbb E_{\mathbf u \sim q(\mathbf u \mid \mathbf x)}\big[\log p(\mathbf x + \mathbf u) - \log q(\mathbf u \mid \mathbf x)\big].$$
#
# ### Exercise `variational_bound` · 10 minutes · difficulty 3 of 5 · 6 points
#
# Return the bracket for one draw, shape `(B,)`. `x` is `(B, D)`, integers. `q(x)` returns `u` of shape `(B, D)` and `log_q` of shape `(B,)`.
# `log_prob` is the log-density on $[0, K]^D$, `(B, D)` to `(B,)`. Gradients must reach both.

# %% tags=["solution"] nbgrader={"grade_id": "variational_bound"}
def variational_bound(x, q, log_prob):
    """One-sample estimate log p(x + u) - log q(u | x) of the bound, (B,), with u, log_q = q(x)."""
    ### BEGIN SOLUTION
    u, log_q = q(x)
    return log_prob(x + u) - log_q
    ### END SOLUTION
    raise NotImplementedError("exercise variational_bound")

# %% tags=["check"] nbgrader={"grade_id": "variational_bound_check"}
check("variational_bound", variational_bound)

# %% [markdown]
# First with the model of above held fixed, so that only $q$ learns: $u = \operatorname{sigmoid}(m_x + s_x \epsilon)$,
# $\epsilon \sim \mathcal N(0, 1)$, with two numbers $m_x$ and $s_x$ for each level. By the change of variables
# $\log q(u \mid x) = \log \mathcal N(\epsilon) - \log s_x - \log u (1 - u)$. **Predict** the shape of $q$ in the first cell and in the last.

# %% tags=["show"]
class CellNoise(nn.Module):
    """q(u | x) = sigmoid of a normal, with a mean and a scale for each level: x (B, 1) -> u (B, 1), log_q (B,)."""

    def __init__(self, levels):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.zeros(levels)), nn.Parameter(torch.full((levels,), 0.5))

    def forward(self, x):
        mean, log_scale, eps = self.mean[x], self.log_scale[x], torch.randn(x.shape)
        v = mean + log_scale.exp() * eps
        log_q = dist.Normal(0.0, 1.0).log_prob(eps) - log_scale - F.logsigmoid(v) - F.logsigmoid(-v)
        return torch.sigmoid(v), log_q.sum(-1)

    def density(self, level, u):
        """q(u | level) for u (N,), for drawing."""
        v = torch.logit(u)
        return (dist.Normal(self.mean[level], self.log_scale[level].exp()).log_prob(v) - F.logsigmoid(v) - F.logsigmoid(-v)).exp()


def on_levels(y):
    """The same model on [0, K]: log p(y / K) - log K."""
    inside = (y / LEVELS).clamp(1e-6, 1 - 1e-6)  # the sigmoid may round to 0 or 1
    return log_kumaraswamy(inside) - math.log(LEVELS)


def uniform_noise(x):
    """Uniform u as a q: log_q = 0."""
    return torch.rand(x.shape), torch.zeros(len(x))


@show
def _():
    settings.seed(0)
    every = torch.arange(LEVELS)[:, None]
    noise = CellNoise(LEVELS)
    variational_bound(every, noise, on_levels)  # is it solved?
    optimiser = torch.optim.Adam(noise.parameters(), lr=0.03)
    for _ in live.bar(range(settings.steps(600, 5)), "noise"):
        loss = -variational_bound(every.repeat(64, 1), noise, on_levels).mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    globals()["trained_noise"] = noise
    figure = plotting.Picture(figsize=(14, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    y, u = torch.linspace(0.001, LEVELS - 0.001, 2000), torch.linspace(0.002, 0.998, 200)
    left.plot(y, on_levels(y[:, None]).exp(), color="black", linewidth=2, label="p(x + u)")
    with torch.no_grad():
        for level, log_P in enumerate(exact_levels):
            names = ("P(x) q(u | x), trained", "P(x), uniform") if level == 0 else (None, None)
            left.plot(level + u, log_P.exp() * noise.density(level, u), color=plotting.PALETTE["red"], linewidth=2, label=names[0])
            left.plot([level, level + 1], [log_P.exp()] * 2, ":", color=plotting.PALETTE["blue"], linewidth=2, label=names[1])
            left.axvline(level, color="#cccccc", linewidth=0.8, zorder=0)
        many = every.repeat(1, 20_000).reshape(-1, 1)
        for place, (name, q, colour) in enumerate((("uniform", uniform_noise, "blue"), ("trained", noise, "red"))):
            gap = exact_levels - variational_bound(many, q, on_levels).double().reshape(LEVELS, -1).mean(1)
            right.bar(every[:, 0] - 0.2 + 0.4 * place, gap, 0.38, color=plotting.PALETTE[colour], label=name)
            weighted = float((exact_levels.exp() * gap).sum())
            print(f"{name:8s} log P(x) minus bound, nats: " + "  ".join(f"{g:.3f}" for g in gap) + f"   weighted by P: {weighted:.4f}")
    left.set_xlabel("x + u", fontsize=14), left.set_yticks([]), left.legend(fontsize=12, frameon=False)
    right.set_xlabel("level x", fontsize=14), right.set_xticks(range(LEVELS))
    right.set_ylabel("nats below log P(x)", fontsize=13), right.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# All gaps are positive, as they must be. Where the density is steep the trained noise gains most of a nat and more; in the two flattest cells it *loses*
# up to a hundredth, because a sigmoid of a normal goes to zero at both ends of a cell and cannot be uniform. Over all levels, weighted by $P$, the
# gap falls to a third. What is left is $\mathrm{KL}\big(q \,\|\, p(\mathbf x + \cdot)/P(\mathbf x)\big)$: the family of $q$ matters. **See it live:**
# the noise in one cell, and what the bound pays for it.

# %% tags=["show"]
@show
def _():
    return widgets.dequantize(globals().get("trained_noise"), levels=LEVELS, log_prob=lambda y: log_kumaraswamy(y.clamp(1e-6, 1 - 1e-6)))

# %% [markdown]
# Now as it is meant: **flow and noise learn together.** The moons on $8 \times 8$ levels; two flows of the same kind (four of Flow++'s mixture
# couplings of lesson 02), one trained with uniform noise, one with $q(\mathbf u \mid \mathbf x)$ from a small net. The exact $P(\mathbf x)$ of each
# is computed afterwards, by quadrature over each of the 64 cells. **Predict:** what will the density learnt under *uniform* noise look like inside
# a cell?

# %% tags=["show"]
class NetNoise(nn.Module):
    """q(u | x) = sigmoid of a normal whose means, scales and slant a net says: x (B, 2) -> u (B, 2), log_q (B,)."""

    def __init__(self, levels):
        super().__init__()
        self.levels, self.net = levels, nn.Sequential(nn.Linear(2 * levels, 64), nn.Tanh(), nn.Linear(64, 5))

    def forward(self, x):
        mean, log_scale, slant = self.net(F.one_hot(x, self.levels).float().flatten(1)).split([2, 2, 1], -1)
        eps = torch.randn(x.shape)
        v = mean + log_scale.exp() * eps + F.pad(slant * eps[:, :1], (1, 0))  # a triangle: the slant adds nothing to the determinant
        return torch.sigmoid(v), (dist.Normal(0.0, 1.0).log_prob(eps) - log_scale - F.logsigmoid(v) - F.logsigmoid(-v)).sum(-1)


class Standardise(nn.Module):
    """z = (x - middle) / scale, elementwise on (B, D)."""

    def __init__(self, middle, scale):
        super().__init__()
        self.middle, self.scale = middle, scale

    def forward(self, x):
        return (x - self.middle) / self.scale, x.new_full((len(x),), -x.shape[1] * math.log(self.scale))

    def inverse(self, z):
        return self.middle + self.scale * z


def cell_masses(log_prob, K, fine=24):
    """log P(x) of all K x K cells of [0, K]^2, by the midpoint rule on fine x fine points each."""
    points = torch.from_numpy(plotting.grid_points((0, K, 0, K), K * fine))
    with torch.no_grad():
        p = torch.cat([log_prob(chunk) for chunk in points.split(20_000)]).double().exp()
    return (p.reshape(K, fine, K, fine).mean((1, 3)).T + 1e-30).log()


@show
def _():
    from flowkit.coupling import MixCoupling
    from flowkit.linear import Reverse
    from flowkit.nets import MLP

    K, P = 8, quantized(8, fine=32)
    variational_bound(torch.zeros(2, 2, dtype=torch.long), uniform_noise, lambda y: y.sum(1))  # is it solved?
    figure, axes = plotting.side_by_side(3, ["P, the data", "p(x + u), uniform noise", "p(x + u), learnt noise"], size=4.2)
    axes[0].imshow(P.T, origin="lower", cmap="cividis", extent=(0, K, 0, K))
    print(f"entropy of the data {entropy(P):.3f} nats")
    for ax, name in zip(axes[1:], ("uniform", "learnt")):
        settings.seed(0)
        couplings = [t for _ in range(4) for t in (MixCoupling(MLP(1, 14, (48,)), 4), Reverse())]
        flow = Flow(StandardNormal(2), Compose([Standardise(K / 2, K / 4), *couplings]))
        noise = NetNoise(K) if name == "learnt" else uniform_noise
        parameters = [*flow.parameters(), *(noise.parameters() if name == "learnt" else [])]
        optimiser, steps = torch.optim.Adam(parameters, lr=5e-3), settings.steps(600, 3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

        def draw(n):
            index = torch.multinomial(P.flatten(), n, replacement=True)
            return torch.stack([index // K, index % K], 1)

        with live.interruptible():
            for x in live.batches(draw, steps, 256, label=f"{name} noise"):
                loss = -variational_bound(x, noise, flow.log_prob).mean()
                optimiser.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(parameters, 10.0), optimiser.step(), schedule.step()
        with torch.no_grad():
            x = draw(20_000)
            exact = cell_masses(flow.log_prob, K)
            estimates = variational_bound(x, noise, flow.log_prob)
            of_x = exact[x[:, 0], x[:, 1]]
            plotting.density(ax, flow.log_prob, (0, K, 0, K), n=200)
        ax.set_xticks(range(K + 1), []), ax.set_yticks(range(K + 1), []), ax.grid(color="white", alpha=0.25)
        kl = float((P * (P.clamp_min(1e-30).log() - exact)).sum())
        print(f"{name:8s} bound {float(estimates.mean()):.3f}   exact {float(of_x.mean()):.3f}   "
              f"difference {float((of_x - estimates).mean()):.3f}   KL(P || Q) {kl:.3f} nats")
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Uniform noise asks for a density that is *flat in each cell and jumps at its edges*: that is what the noisy data look like. A smooth flow cannot
# do it and pays twice, with a blurred picture and a loose bound. Learnt noise may put the points of each cell where a smooth density wants them:
# the moons' arcs come back, though no model ever saw more than 64 cells.
#
# </details>
#
# Three numbers moved: the bound is higher, the exact log-likelihood is higher, and the difference between the two is smaller. Reported bits per
# dimension of image models are bounds of this kind, and are never better than the exact values.
#
# ## 8 · One dimension more, or less
#
# A bijection of $\mathbb R^D$ keeps the number of dimensions, and more: a coupling layer needs two halves, so it cannot do anything to a single
# number. **Slicing** is the surjection that drops coordinates, $\mathbf x = \mathbf z_{1:n}$ (the lecture's $x = z[:n]$). Many $\mathbf z$ go to
# one $\mathbf x$; it is a *generative* surjection, and the contribution is that of section 6:
#
# $$\mathbf z = (\mathbf x, \mathbf z_2), \quad \mathbf z_2 \sim q(\mathbf z_2 \mid \mathbf x), \qquad \mathcal V = -\log q(\mathbf z_2 \mid \mathbf x), \qquad \text{a bound.}$$
#
# As the first layer on the side of the data it gives an *augmented flow* (Huang, Dinh & Courville 2020; Chen et al. 2020, *VFlow*): data get
# company, the flow acts in the larger space, and samples lose the company again.
#
# ### Exercise `slice_layer` · 10 minutes · difficulty 2 of 5 · 7 points
#
# `x` is `(B, keep)`; `q(x)` returns `z2` of shape `(B, D - keep)` and `log_q` of shape `(B,)`. `forward` appends `z2` to `x` and returns `z` of
# shape `(B, D)` and the contribution; `inverse` keeps the first `keep` columns.

# %% tags=["solution"] nbgrader={"grade_id": "slice_layer"}
class Slice(nn.Module):
    """x = z[:, :keep]; forward appends z2 ~ q(. | x), with contribution -log q(z2 | x)."""
    exact = False  # a bound, in the mean

    def __init__(self, q, keep):
        super().__init__()
        self.q, self.keep = q, keep

    def forward(self, x):
        """x (B, keep) -> z (B, D), contribution (B,)"""
        ### BEGIN SOLUTION
        z2, log_q = self.q(x)
        return torch.cat([x, z2], 1), -log_q
        ### END SOLUTION
        raise NotImplementedError("exercise slice_layer: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, keep)"""
        ### BEGIN SOLUTION
        return z[:, :self.keep]
        ### END SOLUTION
        raise NotImplementedError("exercise slice_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "slice_layer_check"}
check("slice_layer", Slice)

# %% [markdown]
# Data on a *line* with three uneven humps. An affine bijection of the line moves and stretches one normal hump; that is all that affine layers
# could do. Now append one coordinate, $z_2 \sim \mathcal N(m(x), s(x)^2)$ with a small net for $m$ and $s$, and let six *affine* couplings act in
# the plane. The extra dimension can be drawn, and the exact density is an integral over it, $p(x) = \int p(x, z_2)\, dz_2$, which we do on a grid. **Predict:**
# how can maps that are affine in each coordinate make three humps out of one?

# %% tags=["show"]
humps = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.5, 0.2, 0.3])), dist.Normal(torch.tensor([-2.0, 0.3, 2.2]), torch.tensor([0.4, 0.25, 0.5])))


class NormalProposal(nn.Module):
    """q(z2 | x) = N(m(x), s(x)^2), with m and s from a net: x (B, d) -> z2 (B, 1), log_q (B,)."""

    def __init__(self, d=1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, 48), nn.Tanh(), nn.Linear(48, 2))

    def forward(self, x):
        mean, log_scale = self.net(x).chunk(2, -1)
        q = normal(mean, log_scale.exp())
        z2 = q.rsample()
        return z2, q.log_prob(z2)


def train(log_prob, parameters, sample, steps, lr=5e-3, size=256, label="training"):
    """Minimise the mean of -log_prob over fresh batches by Adam, with a learning rate that falls to zero."""
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with live.interruptible():
        for x in live.batches(sample, steps, size, label=label):
            loss = -log_prob(x).mean()
            optimiser.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(parameters, 10.0), optimiser.step(), schedule.step()


def affine_couplings(D, layers, width=48):
    """RealNVP: affine couplings with turns between them, whose log-scales are bounded."""
    from flowkit.coupling import Coupling
    from flowkit.elementwise import Affine
    from flowkit.linear import Reverse
    from flowkit.nets import MLP
    nets = (MLP(D // 2, 2 * (D - D // 2), (width, width)) for _ in range(layers))
    return [t for net in nets for t in (Coupling(net, Affine(2.0)), Reverse())]


@show
def _():
    settings.seed(0)
    augmented = Slice(NormalProposal(), 1)
    plane = Flow(StandardNormal(2), Compose(affine_couplings(2, 6)))

    def bound(x):
        z, contribution = augmented.forward(x)
        return plane.log_prob(z) + contribution

    train(bound, [*augmented.parameters(), *plane.parameters()], lambda n: humps.sample((n, 1)), settings.steps(800, 3), label="augmented flow")
    limits, n = (-5, 5, -5, 5), settings.steps(240, 60)
    with torch.no_grad():
        joint = plane.log_prob(torch.from_numpy(plotting.grid_points(limits, n))).exp().reshape(n, n)  # [z2, x]
        x = torch.linspace(*limits[:2], n + 1)[:-1] + 5 / n
        fine = torch.linspace(-9, 9, 721)
        exact = torch.stack([plane.log_prob(torch.stack([torch.full_like(fine, v), fine], 1)).double().exp().sum() * 0.025
                             for v in live.bar(x, "summing over z2")]).log()
        lower = bound(x.repeat_interleave(400)[:, None]).reshape(n, 400).mean(1)
        samples = augmented.inverse(plane.sample(20_000))[:, 0]
    truth = humps.log_prob(x)
    figure, axes = plotting.side_by_side(3, ["p(x, z2)", "p(x): the plane, summed", "log p(x) and its bound"], size=4.2)
    plotting.density(axes[0], joint.log(), limits)
    axes[0].set_xlabel("x", fontsize=14), axes[0].set_ylabel("z2", fontsize=14)
    axes[1].hist(samples.numpy(), 100, range=(-5, 5), density=True, color=plotting.PALETTE["sky"], alpha=0.6, label="samples")
    affine = dist.Normal(humps.mean, humps.stddev).log_prob(x)
    red, blue, green = (plotting.PALETTE[c] for c in ("red", "blue", "green"))
    axes[1].plot(x, truth.exp(), color="black", linewidth=2.5, label="data"), axes[1].plot(x, exact.exp(), color=red, linewidth=2, label="flow")
    axes[1].plot(x, affine.exp(), ":", color=green, linewidth=2, label="affine, on the line")
    axes[2].plot(x, exact, color=red, linewidth=2.5, label="exact"), axes[2].plot(x, lower, "--", color=blue, linewidth=2, label="bound (mean of 400)")
    axes[2].set_ylim(-9, 0), axes[1].legend(fontsize=11, frameon=False), axes[2].legend(fontsize=12, frameon=False)
    for ax in axes[1:]:
        ax.set_xlabel("x", fontsize=14)
    p = truth.double().exp() * 10 / n
    print(f"KL to the data, nats: affine on the line {float((p * (truth - affine)).sum()):.3f}, augmented {float((p * (truth - exact)).sum()):.3f}; "
          f"the bound is {float((p * (exact - lower)).sum()):.3f} below the exact value")
    return figure

# %% [markdown]
# The plane has room: a band winds through it, and what we see on the line is its shadow. The same layers, one dimension more, and a bound for the
# price.
#
# **The other way round** one may drop coordinates on the way *to* the latent: $\mathbf z = \mathbf x_{1:n}$, and sampling draws the rest from
# $p(\text{rest} \mid \mathbf z)$. That is the *inference* surjection, so it is exact: $\mathcal V = +\log p(\text{rest} \mid \mathbf z)$. Flows on
# images do it at every scale, where half of the channels "leave" (lesson 06).
#
# ### Exercise `split_layer` · 10 minutes · difficulty 2 of 5 · 7 points
#
# `x` is `(B, D)`; `forward` returns `z`, its first `keep` columns, and the contribution `(B,)`. `p(z)` gives a `torch.distributions` object whose
# event is the rest, `(D - keep,)`. `inverse` draws the rest and appends it.

# %% tags=["solution"] nbgrader={"grade_id": "split_layer"}
class Split(nn.Module):
    """z = x[:, :keep]; inverse draws the rest ~ p(. | z), with contribution log p(rest | z)."""

    def __init__(self, p, keep):
        super().__init__()
        self.p, self.keep = p, keep

    def forward(self, x):
        """x (B, D) -> z (B, keep), contribution (B,)"""
        ### BEGIN SOLUTION
        z, rest = x[:, :self.keep], x[:, self.keep:]
        return z, self.p(z).log_prob(rest)
        ### END SOLUTION
        raise NotImplementedError("exercise split_layer: forward")

    def inverse(self, z):
        """z (B, keep) -> x (B, D)"""
        ### BEGIN SOLUTION
        return torch.cat([z, self.p(z).rsample()], 1)
        ### END SOLUTION
        raise NotImplementedError("exercise split_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "split_layer_check"}
check("split_layer", Split)

# %% [markdown]
# Exact: a correlated normal in the plane, built from $z = x_1 \sim \mathcal N(0, 1)$ and $x_2 \mid z \sim \mathcal N(0.8\,z,\ 1 - 0.8^2)$, against
# the closed form. And the two layers belong together: append with $q$, then split the same coordinate off again with $p = q$. **Predict** the sum
# of the two contributions.

# %% tags=["show", "compare"]
@show
def _():
    settings.seed(0)
    given = lambda z: normal(0.8 * z, torch.full_like(z, 0.6))  # noqa: E731

    def q(x):
        rest = given(x).rsample()
        return rest, given(x).log_prob(rest)

    split, x = Split(given, 1), torch.tensor([[0.5, -1.0], [1.0, 2.0]])
    z, contribution = split.forward(x)
    closed = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]])).log_prob(x)
    print("Split       ", *(f"{v:.6f}" for v in StandardNormal(1).log_prob(z) + contribution))
    print("closed form ", *(f"{v:.6f}" for v in closed))
    z, up = Slice(q, 1).forward(x[:, :1])
    print("Slice, then Split: the contributions add up to", *(f"{v:.6f}" for v in (up + split.forward(z)[1]).abs()))

# %% [markdown]
# ## 9 · Symmetries: abs, max, sort
#
# Data often look the same after some transformation: a reflection, an exchange of coordinates. A bijection must learn every copy. An inference
# surjection *folds* the copies onto one, a flow learns that one, and the fold is undone by a draw. The likelihood stays exact, since
# $q(\mathbf z \mid \mathbf x)$ has nothing to draw.
#
# ### The absolute value
#
# $\mathbf z = \lvert \mathbf x \rvert$, elementwise; sampling draws a sign for each coordinate. Let $\ell_i(\mathbf z)$ be the log-odds of a
# positive sign, $P(x_i > 0 \mid \mathbf z) = \sigma(\ell_i)$ with the sigmoid $\sigma$; then $P(x_i < 0 \mid \mathbf z) = \sigma(-\ell_i)$ and
#
# $$\mathcal V(\mathbf x, \mathbf z) = \sum_{i=1}^D \log \sigma\big(\operatorname{sign}(x_i)\,\ell_i(\mathbf z)\big), \qquad\text{which is } -D \log 2 \text{ for even odds, } \ell = 0.$$
#
# ### Exercise `abs_layer` · 15 minutes · difficulty 3 of 5 · 9 points
#
# `log_odds` maps `(B, D)` to `(B, D)`, or is `None` for even odds. `forward` returns `z = |x|` of shape `(B, D)` and the contribution `(B,)`;
# `inverse` draws the signs. `log_odds` is asked at $\mathbf z$, and the contribution is to stay exact for log-odds of $\pm 100$ too, where the
# probabilities of float32 are 0 and 1. Useful: `F.logsigmoid`, `torch.bernoulli`.

# %% tags=["solution"] nbgrader={"grade_id": "abs_layer"}
class Abs(nn.Module):
    """z = |x|; inverse draws the signs, + with log-odds log_odds(z) (even if None); contribution log p(signs | z)."""

    def __init__(self, log_odds=None):
        super().__init__()
        self.log_odds = log_odds

    def forward(self, x):
        """x (B, D) -> z (B, D), contribution (B,)"""
        ### BEGIN SOLUTION
        z = x.abs()
        odds = torch.zeros_like(z) if self.log_odds is None else self.log_odds(z)
        return z, F.logsigmoid(torch.where(x >= 0, odds, -odds)).sum(-1)
        ### END SOLUTION
        raise NotImplementedError("exercise abs_layer: forward")

    def inverse(self, z):
        """z (B, D), not negative -> x (B, D)"""
        ### BEGIN SOLUTION
        odds = torch.zeros_like(z) if self.log_odds is None else self.log_odds(z)
        return z * (2 * torch.bernoulli(torch.sigmoid(odds)) - 1)
        ### END SOLUTION
        raise NotImplementedError("exercise abs_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "abs_layer_check"}
check("abs_layer", Abs)

# %% [markdown]
# **See it live:** left and right move a point; you see where your layer folds it, and the points that its inverse may draw.
# (`widgets.surjection()`, without a layer of yours, has seven others to choose from.)

# %% tags=["show"]
@show
def _():
    return widgets.surjection(yours(Abs(), torch.ones(1, 1)))

# %% [markdown]
# Now the eight humps of the first picture, with the same stack of four affine couplings and the same number of steps: once as it is, once behind
# your `Abs`. What comes out of `Abs` is positive, so a logarithm follows it and takes it to all of $\mathbb R^2$. The entropy of the data is known. **Predict:**
# how many humps does the second flow have to learn?

# %% tags=["show"]
class Log(nn.Module):
    """z = log x, elementwise on positive (B, D); ldj = -sum log x."""

    def forward(self, x):
        z = (x + 1e-6).log()
        return z, -z.sum(-1)

    def inverse(self, z):
        return z.exp()


def gap(flow, sample, entropy, n=20_000):
    """KL(p || q) in nats: mean of -log q over n fresh points, minus the entropy of the data."""
    with torch.no_grad():
        return float(-flow.log_prob(sample(n)).mean()) - entropy


def race(stacks, sample, entropy, D, steps, lr=5e-3):
    """Train flows of the given stacks on the same data; returns them, and prints their gaps."""
    flows = {}
    for name, stack in stacks.items():
        settings.seed(0)
        flows[name] = Flow(StandardNormal(D), Compose(stack()))
        train(flows[name].log_prob, flows[name].parameters(), sample, steps, lr, label=name)
        print(f"{name:16s} gap {gap(flows[name], sample, entropy):.3f} nats")
    return flows


@show
def _():
    stacks = {"plain": lambda: affine_couplings(2, 4), "behind your Abs": lambda: [Abs(), Log(), *affine_couplings(2, 4)]}
    yours_first = Abs().forward(eight(3000, seed=0))[0]
    flows = race(stacks, eight, gaussians.entropy, 2, settings.steps(500, 3))
    figure, axes = plotting.side_by_side(4, ["data", "folded: |x|", *stacks], size=3.5)
    plotting.samples(axes[0], eight(3000, seed=0), gaussians.limits), plotting.samples(axes[1], yours_first, gaussians.limits)
    for ax, flow in zip(axes[2:], flows.values()):
        plotting.density(ax, flow.log_prob, gaussians.limits, n=160, top=0.16)
    return figure

# %% [markdown]
# Two instead of eight. And if the symmetry is only nearly there? Then the odds are not even, and `log_odds` says so. On a line, two humps at
# $\pm 2$ with weights 0.8 and 0.2, folded onto one. **Predict:** what does a flow lose that assumes even odds?

# %% tags=["show", "compare"]
@show
def _():
    settings.seed(0)
    lopsided = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.8, 0.2])), dist.Normal(torch.tensor([2.0, -2.0]), 0.3))
    folded, x = dist.Normal(2.0, 0.3), lopsided.sample((100_000, 1))
    for name, log_odds in (("even odds", None), ("log-odds log(0.8 / 0.2)", lambda z: torch.full_like(z, math.log(4)))):
        layer = Abs(log_odds)
        z, contribution = layer.forward(x)
        share = float((layer.inverse(z) > 0).double().mean())
        missed = (lopsided.log_prob(x[:, 0]) - folded.log_prob(z[:, 0]) - contribution).mean()
        print(f"{name:24s} gap {abs(float(missed)):.3f} nats, share of positive samples {share:.2f}")
    print(f"log 2 - H(0.8, 0.2) = {math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2):.3f} nats")

# %% [markdown]
# ### The maximum
#
# Keep only the largest coordinate, $z = \max_i x_i$: from $D$ dimensions to one. Sampling draws which coordinate $k$ it is, all alike, and puts the
# others below it, $x_i = z - e_i$ with an *excess* $e_i > 0$ from some distribution. At $\mathbf x$, only one $k$ can have been drawn, so
#
# $$\mathcal V(\mathbf x, z) = -\log D + \sum_{i \ne k} \log p_{e,i}(z - x_i), \qquad\text{exact.}$$
#
# ### Exercise `max_layer` · 20 minutes · difficulty 4 of 5 · 9 points
#
# `excess` is a `torch.distributions` object on positive numbers with batch shape `(D,)`, one distribution for each coordinate; from it `inverse`
# knows $D$. Coordinate $i$ has its own excess $e_i$, wherever the place $k$ falls. (If `forward` also runs with a single one, of batch shape `()`, so much the better.) `forward` takes `x` of shape `(B, D)` to `z` of
# shape `(B, 1)` and the contribution `(B,)`; `inverse` goes back by draws. Take care: the largest coordinate itself has an excess of 0, where the
# density may be 0, infinite, or an error. Useful: `torch.where` with a harmless number *before* `log_prob`.

# %% tags=["solution"] nbgrader={"grade_id": "max_layer"}
class Max(nn.Module):
    """z = max_i x_i; inverse draws its place k uniformly and x_i = z - e_i elsewhere; contribution -log D + sum of log excess(z - x_i)."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def forward(self, x):
        """x (B, D) -> z (B, 1), contribution (B,)"""
        ### BEGIN SOLUTION
        z, k = x.max(-1, keepdim=True)
        largest = F.one_hot(k[:, 0], x.shape[1]).bool()
        log_p = self.excess.log_prob(torch.where(largest, torch.ones_like(x), z - x))
        return z, log_p.masked_fill(largest, 0).sum(-1) - math.log(x.shape[1])
        ### END SOLUTION
        raise NotImplementedError("exercise max_layer: forward")

    def inverse(self, z):
        """z (B, 1) -> x (B, D)"""
        ### BEGIN SOLUTION
        e = self.excess.rsample((len(z),))
        k = torch.randint(e.shape[1], (len(z),))
        return z - torch.where(F.one_hot(k, e.shape[1]).bool(), torch.zeros_like(e), e)
        ### END SOLUTION
        raise NotImplementedError("exercise max_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "max_layer_check"}
check("max_layer", Max)

# %% [markdown]
# Data with that structure: two runners in many races, of whom the better has a normal time on the clock and the other one loses by a
# Gamma-distributed gap. The flow has four numbers: the mean and width of $z$, and the two of the Gamma. **Predict** the shape of the density across
# the diagonal, and whether smooth affine couplings can follow it.

# %% tags=["show"]
def runners(n):
    """n races of two runners, (n, 2): the larger is N(1, 0.6^2), the other is behind by a Gamma(2, 1.5)."""
    z, e = 1 + 0.6 * torch.randn(n, 1), dist.Gamma(2.0, 1.5).sample((n, 1))
    pair = torch.cat([z, z - e], 1)
    return torch.where(torch.rand(n, 1) < 0.5, pair, pair.flip(1))


class MaxFlow(nn.Module):
    """A normal z and a Gamma excess, all four numbers to be learnt, behind your Max."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(4))

    def parts(self):
        mean, log_std, log_shape, log_rate = self.numbers
        return normal(mean[None], log_std.exp()[None]), Max(dist.Gamma(log_shape.exp().expand(2), log_rate.exp().expand(2)))

    def log_prob(self, x):
        base, layer = self.parts()
        z, contribution = layer.forward(x)
        return base.log_prob(z) + contribution

    def sample(self, n):
        base, layer = self.parts()
        with torch.no_grad():
            return layer.inverse(base.sample((n,)))


@show
def _():
    limits = (-4, 4, -4, 4)
    true = dist.Normal(1.0, 0.6).entropy() + dist.Gamma(torch.tensor(2.0), torch.tensor(1.5)).entropy() + math.log(2)
    model = MaxFlow()
    model.log_prob(runners(2))  # is it solved?
    settings.seed(0)
    train(model.log_prob, model.parameters(), runners, settings.steps(400, 3), 3e-2, label="max")
    print(f"behind your Max  gap {gap(model, runners, float(true)):.3f} nats")
    flows = race({"plain": lambda: affine_couplings(2, 4)}, runners, float(true), 2, settings.steps(500, 3))
    points = torch.from_numpy(plotting.grid_points((-14, 4, -14, 4), 900))
    with torch.no_grad():
        print(f"integral of the density over the plane: {float(model.log_prob(points).double().exp().sum() * (18 / 900) ** 2):.4f}")
    print("mean, std, shape, rate:", ", ".join(f"{v:.2f}" for v in (model.numbers[0], *model.numbers[1:].exp())), "(true: 1, 0.6, 2, 1.5)")
    figure, axes = plotting.side_by_side(4, ["data", "density, your Max", "its samples", "density, plain"], size=3.5)
    plotting.samples(axes[0], runners(3000), limits), plotting.samples(axes[2], model.sample(3000), limits, colour=plotting.PALETTE["red"])
    plotting.density(axes[1], model.log_prob, limits, n=160, top=0.25), plotting.density(axes[3], flows["plain"].log_prob, limits, n=160, top=0.25)
    return figure

# %% [markdown]
# The valley along the diagonal, where both would be equal, has a kink that smooth couplings can only approach, and that the order of the coordinates
# means nothing they must learn. The surjection has both by construction (the race is not quite fair: it *is* the family that made the data. A gap a
# little below zero is the noise of 20,000 points).
#
# ### Sorting
#
# A set has no order, but a vector has. If all orders of $\mathbf x$ are equally likely, sort: $\mathbf z = \operatorname{sort}(\mathbf x)$,
# ascending, and sampling draws one of the $D!$ permutations. So $\mathcal V = -\log D!$, exact. **Predict:** four particles near the places
# $-3, -1, 1, 3$, in any order. How many humps has the density of $\mathbf x \in \mathbb R^4$, and how many that of $\mathbf z$?
#
# ### Exercise `sort_layer` · 12 minutes · difficulty 2 of 5 · 7 points
#
# `x` and `z` are `(B, D)`, the contribution is `(B,)`. `inverse` draws a permutation for *each* row. Useful: `math.lgamma`, `argsort` of random
# numbers, `torch.gather`. It is to work for $D = 30$ too, where $D!$ fits no integer of torch's.

# %% tags=["solution"] nbgrader={"grade_id": "sort_layer"}
class Sort(nn.Module):
    """z = sort(x), ascending; inverse draws one of D! permutations for each row; contribution -log D!."""

    def forward(self, x):
        """x (B, D) -> z (B, D), contribution (B,)"""
        ### BEGIN SOLUTION
        return x.sort(-1).values, x.new_full((len(x),), -math.lgamma(x.shape[1] + 1))
        ### END SOLUTION
        raise NotImplementedError("exercise sort_layer: forward")

    def inverse(self, z):
        """z (B, D), ascending -> x (B, D)"""
        ### BEGIN SOLUTION
        return z.gather(1, torch.rand_like(z).argsort(-1))
        ### END SOLUTION
        raise NotImplementedError("exercise sort_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "sort_layer_check"}
check("sort_layer", Sort)

# %% [markdown]
# A sorted vector lives in a corner of $\mathbb R^4$, so behind `Sort` comes a bijection onto all of $\mathbb R^4$: the first entry, then the
# logarithms of the gaps. The entropy of the data is $\log 4! + 4 \log(0.3 \sqrt{2 \pi e})$ (the 24 humps are far apart). Both flows have the same
# eight couplings and as many steps. The pictures show two of the four coordinates.

# %% tags=["show"]
class Gaps(nn.Module):
    """z = (x1, log(x2 - x1), log(x3 - x2), ...) for ascending x (B, D); ldj = -sum of the logs."""

    def forward(self, x):
        logs = (x.diff(dim=-1) + 1e-6).log()
        return torch.cat([x[:, :1], logs], 1), -logs.sum(-1)

    def inverse(self, z):
        return torch.cat([z[:, :1], z[:, 1:].exp()], 1).cumsum(-1)


def particles(n):
    """Four particles near -3, -1, 1, 3, in any order: (n, 4)."""
    places = torch.tensor([-3.0, -1.0, 1.0, 3.0])[torch.rand(n, 4).argsort(-1)]
    return places + 0.3 * torch.randn(n, 4)


@show
def _():
    stacks = {"plain": lambda: [Standardise(0.0, 2.0), *affine_couplings(4, 8)], "behind your Sort": lambda: [Sort(), Gaps(), *affine_couplings(4, 8)]}
    Sort().forward(particles(2))  # is it solved?
    flows = race(stacks, particles, math.log(24) + 4 * math.log(0.3 * math.sqrt(2 * math.pi * math.e)), 4, settings.steps(400, 3))
    figure, axes = plotting.side_by_side(3, ["data", *stacks], size=3.8)
    for ax, x, colour in zip(axes, (particles(4000), *(flow.sample(4000) for flow in flows.values())), ("blue", "green", "red")):
        plotting.samples(ax, x[:, :2], (-5, 5, -5, 5), colour=plotting.PALETTE[colour])
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# $4! = 24$ humps, and one. The plain flow has eight layers for 24 humps, and draws bridges where nothing should be. Behind `Sort` a single hump is
# left to be learnt, and the draw of a permutation makes 24 of it again.
#
# </details>
#
# ## 10 · Categories: argmax
#
# Dequantization needs an order of the values; between letters there is none. The *argmax flow* (Hoogeboom, Nielsen, Jaini, Forré & Welling 2021)
# gives each of the $K$ categories a coordinate, $\mathbf z \in \mathbb R^K$, and takes the largest: $x = \arg\max_k z_k$. Rounding cuts space into
# cubes; the argmax cuts it into $K$ wedges that all touch each other. A generative surjection again, so
#
# $$\log P(x) \ge \mathbb E_{\mathbf z \sim q(\mathbf z \mid x)}\big[\log p(\mathbf z) - \log q(\mathbf z \mid x)\big], \qquad q \text{ must live on the wedge } \{\mathbf z : \arg\max \mathbf z = x\}.$$
#
# How does one draw from a wedge? Draw $\mathbf v \in \mathbb R^K$ without any constraint, with density $q(\mathbf v \mid x)$, and push all but the
# $x$-th coordinate below it, by a softplus:
#
# $$z_x = v_x, \qquad z_i = v_x - \operatorname{softplus}(v_x - v_i) \quad (i \ne x).$$
#
# $\operatorname{softplus}(u) = \log(1 + e^u) > 0$, so $z_i < z_x$. And it is a bijection from $\mathbb R^K$ onto the wedge, triangular if $v_x$
# comes first, with $\partial z_i/\partial v_i = \sigma(v_x - v_i)$. Its log-determinant is $\sum_{i \ne x} \log \sigma(v_x - v_i)$, and the
# contribution
#
# $$\mathcal V = -\log q(\mathbf z \mid x) = -\log q(\mathbf v \mid x) + \sum_{i \ne x} \log \sigma(v_x - v_i).$$
#
# ### Exercise `argmax_layer` · 20 minutes · difficulty 4 of 5 · 9 points
#
# `x` is `(B,)`, integers; `v, log_q = q(x)` with `v` of shape `(B, K)` and `log_q` of shape `(B,)`. `forward` returns `z` of shape `(B, K)` and the
# contribution `(B,)`; `inverse` takes `z` to `x`. (Written with last dimensions, `[..., ]`, it also takes sequences: `x` and `log_q` `(B, L)`, `v`
# `(B, L, K)`.) Useful: `gather`, `F.softplus`, `F.logsigmoid`, `F.one_hot`.

# %% tags=["solution"] nbgrader={"grade_id": "argmax_layer"}
class Argmax(nn.Module):
    """x = argmax z; forward draws v, log_q = q(x) and bends it under its x-th coordinate, z_i = v_x - softplus(v_x - v_i)."""
    exact = False  # a bound, in the mean

    def __init__(self, q):
        super().__init__()
        self.q = q

    def forward(self, x):
        """x (B,) integers -> z (B, K), contribution (B,)"""
        ### BEGIN SOLUTION
        v, log_q = self.q(x)
        top = v.gather(-1, x[..., None])
        chosen = F.one_hot(x, v.shape[-1]).bool()
        z = torch.where(chosen, v, top - F.softplus(top - v))
        return z, F.logsigmoid(top - v).masked_fill(chosen, 0).sum(-1) - log_q
        ### END SOLUTION
        raise NotImplementedError("exercise argmax_layer: forward")

    def inverse(self, z):
        """z (B, K) -> x (B,) integers"""
        ### BEGIN SOLUTION
        return z.argmax(-1)
        ### END SOLUTION
        raise NotImplementedError("exercise argmax_layer: inverse")

# %% tags=["check"] nbgrader={"grade_id": "argmax_layer_check"}
check("argmax_layer", Argmax)

# %% [markdown]
# Three categories; $\mathbf v$ standard normal in $\mathbb R^3$, whatever $x$ is. Looked at along the direction $(1, 1, 1)$, in which the argmax
# does not change, space is a plane with three wedges. **Predict** where the clouds lie after your layer.

# %% tags=["show"]
def free(x, K=3):
    """v standard normal whatever x (N,): v (N, K), log_q (N,)."""
    v = torch.randn(*x.shape, K)
    return v, dist.Normal(0.0, 1.0).log_prob(v).sum(-1)


@show
def _():
    settings.seed(0)
    x = torch.arange(3).repeat_interleave(1500)
    view = torch.tensor([[1.0, -0.5, -0.5], [0.0, 3 ** 0.5 / 2, -3 ** 0.5 / 2]]) * (2 / 3) ** 0.5
    z, _ = Argmax(free).forward(x)
    settings.seed(0)
    figure, axes = plotting.side_by_side(2, ["v ~ q(v | x)", "z, your layer"], size=4.2)
    for ax, points in zip(axes, (free(x)[0], z)):
        for k, colour in enumerate(("blue", "orange", "green")):
            plotting.samples(ax, points[x == k] @ view.T, (-4, 4, -4, 4), colour=plotting.PALETTE[colour])
            edge = -view[:, k] / view[:, k].norm() * 6
            ax.plot([0, edge[0]], [0, edge[1]], color="black", linewidth=1.5)
            ax.text(*(3.3 * view[:, k] / view[:, k].norm()), f"x = {k}", ha="center", va="center", fontsize=14)
    print(f"argmax of z is x in {100 * float((Argmax(free).inverse(z) == x).double().mean()):.1f}% of the draws")
    return figure

# %% [markdown]
# Is it a bound, and does (2) hold? Let $\mathbf z \sim \mathcal N(\boldsymbol\mu, I)$ with $\boldsymbol\mu = (0.5, 0, -0.7)$. The exact probability
# is an integral over the largest coordinate alone, $P(x) = \int \varphi(t - \mu_x) \prod_{i \ne x} \Phi(t - \mu_i)\, dt$, with the normal density
# $\varphi$ and CDF $\Phi$; a sum over a fine grid does it. Two proposals: $\mathbf v$ from fixed logistic distributions, and from logistic ones
# whose means and scales are *trained* on the bound. (Why logistic: as $\delta = z_x - z_i$ goes to 0, the density of a bent logistic of
# scale $s$ goes like $\delta^{1/s - 1}$: for the fixed one, $s = 1$, it stays away from zero and the weights in (2) are bounded; for a trained one
# their variance is finite as long as $s > \frac12$. A bent normal's goes to zero so fast that the variance of the weights is infinite.)

# %% tags=["show", "compare"]
MU = torch.tensor([0.5, 0.0, -0.7])


def argmax_probability(mu, x):
    """log P(argmax z = x) for z ~ N(mu, I): mu (N, K), x (N,) -> (N,), by a sum over the largest coordinate."""
    t = torch.linspace(-6, 9, 121, dtype=mu.dtype)
    top = mu.gather(-1, x[:, None])
    z = top + t  # (N, T); the largest is where its own mean puts it
    log_terms = dist.Normal(0.0, 1.0).log_prob(t) + torch.special.log_ndtr(z[:, :, None] - mu[:, None, :]).sum(-1) - torch.special.log_ndtr(t)
    return torch.logsumexp(log_terms, -1) + math.log(t[1] - t[0])


class Logistic(nn.Module):
    """v_i = m_xi + s_xi * logistic noise, with numbers of its own for each category: x (N,) -> v (N, K), log_q (N,)."""

    def __init__(self, K):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.zeros(K, K)), nn.Parameter(torch.zeros(K, K))

    def forward(self, x):
        u = torch.logit(torch.rand(*x.shape, self.mean.shape[1]), eps=1e-6)
        log_q = F.logsigmoid(u) + F.logsigmoid(-u) - self.log_scale[x]
        return self.mean[x] + self.log_scale[x].exp() * u, log_q.sum(-1)


def argmax_estimates(q, x):
    """One-sample estimates of log P(x) under z ~ N(MU, I)."""
    z, contribution = Argmax(q).forward(x)
    return dist.Normal(MU, 1.0).log_prob(z).sum(-1) + contribution


@show
def _():
    settings.seed(0)
    exact = argmax_probability(MU.double().repeat(3, 1), torch.arange(3))
    fixed, trained = Logistic(3), Logistic(3)
    x = torch.arange(3).repeat(200)
    argmax_estimates(fixed, x)  # is it solved?
    optimiser = torch.optim.Adam(trained.parameters(), lr=0.03)
    for _ in range(400):
        optimiser.zero_grad(), (-argmax_estimates(trained, x).mean()).backward(), optimiser.step()
    print(f"{'log P(x), exact':22s}", *(f"{v:8.3f}" for v in exact), f"   the three probabilities sum to {float(exact.exp().sum()):.4f}")
    with torch.no_grad():
        many = torch.arange(3).repeat_interleave(100_000)
        for name, q in (("fixed", fixed), ("trained", trained)):
            estimates = argmax_estimates(q, many).double().reshape(3, -1)
            print(f"{name + ': bound':22s}", *(f"{v:8.3f}" for v in estimates.mean(1)))
            print(f"{name + ': log of mean exp':22s}", *(f"{v:8.3f}" for v in estimates.exp().mean(1).log()))

# %% [markdown]
# Both bounds lie below, the trained one closer, and the mean of the exponentials is right for both.
#
# ## 11 · A flow that writes
#
# All of it together. The corpus is a short fairy tale that was written for this course (`data/text/mill.txt`), in 27 characters: the letters and
# the space. Text is a sequence $x_1, \dots, x_L$ of categories, $K = 27$, and each gets $\mathbf z_t \in \mathbb R^{27}$ with
# $x_t = \arg\max \mathbf z_t$. In latent space we put an *autoregressive* affine flow (lesson 03) whose conditioner looks back:
#
# $$\mathbf z_t = \boldsymbol\mu_t + \boldsymbol\epsilon_t, \qquad \boldsymbol\mu_t = \mathrm{net}\big(\arg\max \mathbf z_{t-1}, \dots, \arg\max \mathbf z_{t-12}\big) \in \mathbb R^{27}, \qquad \boldsymbol\epsilon_t \sim \mathcal N(0, I).$$
#
# (It may look at all of $\mathbf z_{<t}$; it looks at the last twelve letters that these stand for. That makes it a choice among the flows of that
# kind for which the exact likelihood can be computed as well, by the integral of section 10 for each letter: $P(x_t \mid x_{<t})$. In statistics
# this is a *probit* model of choice.)
#
# The way back $q$ draws $\mathbf v_t = \boldsymbol\mu_t + \mathbf m + \mathbf s \odot \boldsymbol\eta$ with $\boldsymbol\eta \sim \mathcal N(0, I)$
# and $\mathbf m, \mathbf s \in \mathbb R^{27}$ from a table, one row for each letter $x_t$, plus a small net on $\boldsymbol\mu_t$. It lifts the
# coordinate of the letter that stands there. All is trained on the bound. The last tenth of the tale is kept for testing. **Predict:** letters at
# random cost $\log_2 27 = 4.75$ bits each. Where will the model end, on the part that it reads, and on the part that it does not?

# %% tags=["show"]
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
tale = torch.tensor([ALPHABET.index(c) for c in datasets.text("mill")])
LOOK_BACK, PART = 12, len(tale) * 9 // 10


class Writer(nn.Module):
    """mu_t from the letters before it, and the way back q; your Argmax joins the two."""

    def __init__(self, K=27, width=160):
        super().__init__()
        self.embed = nn.Embedding(K, 16)
        self.net = nn.Sequential(nn.Linear(16 * LOOK_BACK, width), nn.ReLU(), nn.Linear(width, K))
        self.lift, self.log_scale = nn.Parameter(2 * torch.eye(K)), nn.Parameter(torch.zeros(K, K))
        self.back = nn.Sequential(nn.Linear(K, 64), nn.Tanh(), nn.Linear(64, 2 * K))

    def mu(self, before):
        """before (N, 12) letters -> mu (N, 27)"""
        return self.net(self.embed(before).flatten(1))

    def bound(self, before, x):
        """One-sample bound on log P(x | before), (N,)."""
        mu = self.mu(before)

        def q(x):
            m, s = self.back(mu).chunk(2, -1)
            eta, log_scale = torch.randn_like(mu), self.log_scale[x] + s
            v = mu + m + self.lift[x] + log_scale.exp() * eta
            return v, (dist.Normal(0.0, 1.0).log_prob(eta) - log_scale).sum(-1)

        z, contribution = Argmax(q).forward(x)
        return dist.Normal(mu, 1.0).log_prob(z).sum(-1) + contribution

    @torch.no_grad()
    def write(self, start, n):
        """n letters after the start, each drawn as z_t and read off by your Argmax."""
        letters = [ALPHABET.index(c) for c in start.rjust(LOOK_BACK)]
        for _ in range(n):
            mu = self.mu(torch.tensor([letters[-LOOK_BACK:]]))
            letters.append(int(Argmax(None).inverse(mu + torch.randn_like(mu))))
        return "".join(ALPHABET[k] for k in letters[LOOK_BACK:])


def places(first, last):
    """The letters from first to last with the twelve before each: before (N, 12), x (N,)."""
    index = torch.arange(max(first, LOOK_BACK), last)
    return tale[index[:, None] + torch.arange(-LOOK_BACK, 0)], tale[index]


@show
def _():
    settings.seed(0)
    writer, bits = Writer(), 1 / math.log(2)
    before, x = places(0, PART)
    steps = settings.steps(1500, 3)
    optimiser = torch.optim.Adam(writer.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    curve, pages = [], {}
    with live.interruptible():
        for step in live.bar(range(steps), "reading"):
            if step in (0, steps // 5):
                pages[step] = writer.write("there was ", 96)
            pick = torch.randint(len(x), (256,))
            loss = -writer.bound(before[pick], x[pick]).mean()
            optimiser.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(writer.parameters(), 10.0), optimiser.step(), schedule.step()
            curve.append(loss.item() * bits)
    pages[steps] = writer.write("there was ", 480)
    counts = torch.bincount(tale[:PART], minlength=27) + 1.0
    single = (counts / counts.sum()).log()
    print("bits per letter        bound   exact   single letters")
    with torch.no_grad():
        for name, (before, x) in (("read", places(0, PART)), ("kept for testing", places(PART, len(tale)))):
            parts = list(zip(writer.mu(before).split(500), x.split(500)))
            exact = torch.cat([argmax_probability(mu, k) for mu, k in live.bar(parts, "exact values")])
            lower = torch.stack([writer.bound(before, x) for _ in range(10)]).mean(0)
            print(f"{name:20s} {float(-lower.mean()) * bits:7.2f} {float(-exact.mean()) * bits:7.2f} {float(-single[x].mean()) * bits:11.2f}")
    for step, page in pages.items():
        print(f"\nafter {step} batches:")
        print("\n".join(page[i:i + 96] for i in range(0, len(page), 96)))
    figure, (ax,) = plotting.side_by_side(1, size=4.2)
    figure.set_size_inches(8, 3.2)
    width = min(30, len(curve))
    ax.plot(np.convolve(curve, np.ones(width) / width, "valid"), color=plotting.PALETTE["blue"], linewidth=2, label="bound, on what is read")
    ax.axhline(math.log2(27), color="black", linestyle=":", label="letters at random")
    ax.set_ylim(0, 7), ax.set_xlabel("batch", fontsize=14), ax.set_ylabel("bits per letter", fontsize=14), ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# It writes words, and whole sentences of the tale with wrong turns between them. What it has read it knows almost by heart: a sixth of a bit for
# each letter. What it has not read costs ten times as much, still far less than the frequencies of single letters would (3.85 bits): a tale that
# repeats itself is easily memorised, and a few thousand letters are no corpus. (Benchmarks use a hundred million.) And look at the two columns: the
# bound is below the exact value everywhere (more bits), by 0.2 on what was read and by **more than two bits** on what was not. $q$ was trained as
# well, on the letters it has seen, and has no idea where to put $\mathbf z$ when a letter comes as a surprise. Who compares models by their bounds
# compares their $q$'s too.
#
# ## 12 · What the slides say, and what you have now
#
# Said along the way, here together:
#
# * The **modular flow** needs $\gcd(\sigma_d, K) = 1$, which the slide leaves out.
# * The **integer flow** rounds on the forward pass; the slide prints a floor, $\lfloor\theta_d\rfloor$, which moves every shift by half a step on
#   average.
# * SurVAE's inequality is one between $\log p(\mathbf x)$ and an **expectation over $q$**; a single draw is no bound.
# * In the table, the bijection's row needs the **absolute value** of the determinant.
# * In both lectures $p(\mathbf x)$ of integers should be read as a probability $P$, and $p(\mathbf x + \mathbf u)$ as a density. The lecture's
#   ablation of Flow++ on CIFAR-10 (3.292 bits per dimension with uniform noise, 3.165 with variational dequantization; none of the rows was trained
#   to convergence) compares two *bounds*; how much of the difference is a better flow and how much a tighter bound cannot be seen from them. In
#   section 7, where the exact values are known, both moved.
#
# | page of the lecture | here |
# |---|---|
# | NF: Discrete Flows (Tran et al., Hoogeboom et al.) | sections 1 to 4 |
# | NF: Surjective Flows, with the table and the bound | sections 5 and 6; slicing in 8, argmax in 10 |
# | NF: the flow, the dequantized data, the data; the generated text | sections 7 and 11 |
# | NF3: dequantization, variational dequantization | section 7, and lesson 06 on images |
#
# | layer | $\mathbf z \leftarrow \mathbf x$ | $\mathbf x \leftarrow \mathbf z$ | contribution | |
# |---|---|---|---|---|
# | `modular_shift`, `IDFCoupling` | bijection | bijection | $0$ | exact |
# | `VAELayer` | draw | draw | $\log p(\mathbf x \mid \mathbf z) - \log q(\mathbf z \mid \mathbf x)$ | bound |
# | `uniform_dequantize` | draw in the cell | $\lfloor K \mathbf y \rfloor$ | $-D \log K$ | bound |
# | `Slice` | append a draw | drop | $-\log q(\mathbf z_2 \mid \mathbf x)$ | bound |
# | `Argmax` | draw in the wedge | $\arg\max$ | $-\log q(\mathbf v \mid x) + \sum_{i \ne x} \log \sigma(v_x - v_i)$ | bound |
# | `Split` | drop | append a draw | $+\log p(\text{rest} \mid \mathbf z)$ | exact |
# | `Abs` | $\lvert \mathbf x \rvert$ | draw signs | $\sum_i \log p(\operatorname{sign} x_i \mid \mathbf z)$ | exact |
# | `Max` | $\max_i x_i$ | draw the place and the rest | $-\log D + \sum_{i \ne k} \log p_{e,i}(z - x_i)$ | exact |
# | `Sort` | sort | draw an order | $-\log D!$ | exact |
#
# One rule to remember: **whoever draws on the way to the latent pays with a bound; whoever draws on the way to the data pays nothing but the probability of the draw.**
# Lesson 06 puts dequantization, splits and couplings together into a flow on images.

# %% tags=["show"]
progress()
