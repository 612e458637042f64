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
# | **You need** | PyTorch tensors and modules; the change of variables formula (repeated below) |
# | **You write** | `Coupling`, `make_net`, `Permute`, `train_flow`; then NICE, ActNorm, an LU-factored linear layer, Flow++ |
# | **Time** | about an hour and a quarter to the trained spirals (sections 1 to 5), three hours for the whole lesson |
# | **Sources** | the lectures "Normalizing Flows" (Nielsen) and "NF 3" (Banerjee), called "the lecture" below; papers are cited where they come in |
#
# Every exercise has a check. It says what is right, what is not, and where to look. `hint("coupling")` gives a hint,
# `progress()` shows how far you are. Run All works from the start: what is not solved yet is drawn as an empty frame
# (that is what `@show` above an experiment is for). Before an experiment you are asked to predict;
# the answer folds out, or the experiment shows it.

# %% tags=["setup"]
import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import check, hint, progress, show
from flowkit import live, plotting, settings, toys, widgets
from flowkit.core import Compose, Flow, StandardNormal

settings.seed(0)
spirals = toys.get("two_spirals")

# %% [markdown]
# Here is the target: points on two spirals, and the density that they come from. It is made by a recipe, so its
# entropy is known, and with it the best loss that any flow can reach.

# %% tags=["show"]
spiral_grid = torch.from_numpy(plotting.grid_points(spirals.limits, 100))  # (10000, 2): the cells of the pictures below
spiral_log_density = spirals.log_prob(spiral_grid).reshape(100, 100)


@show
def _():
    figure, (left, right) = plotting.side_by_side(2, ["20,000 samples", "their density"])
    plotting.samples(left, spirals.sample(20_000), spirals.limits)
    plotting.density(right, spiral_log_density, spirals.limits)
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
    ax.set_xticks(sizes, sizes), ax.minorticks_off()
    ax.set_xlabel("dimensions D", fontsize=14), ax.set_ylabel(f"ms for {batch} points", fontsize=14)
    ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Sixteen times the dimensions: by the exponents 4096 times for the full determinant, 16 times for the diagonal. Measured it is less, some
# hundred times and a few times, since small sizes are dominated by the overhead of the call.
#
# </details>
#
# ## 2 · The coupling layer
#
# Cut $\mathbf x$ in two halves, $\mathbf x_1 = \mathbf x_{1:d}$ and $\mathbf x_2 = \mathbf x_{d+1:D}$ with $d = D/2$ ($D$ even).
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
# **Cheap determinant.** The first half depends on itself alone, and each entry of $\mathbf z_2$ on its own entry of $\mathbf x_2$ and on $\mathbf x_1$:
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
# $\boldsymbol\mu$. Useful: `torch.chunk`, `torch.cat`. If you prefer, `net` may be one that returns the pair
# $(\boldsymbol\alpha, \boldsymbol\mu)$, or an `nn.ModuleList` of two nets, and $\boldsymbol\alpha$ may be softly bounded: that is fine as
# well, as long as your `make_net` below makes what your `Coupling` takes. (With a bounded $\boldsymbol\alpha$ the numbers of the next two
# experiments differ a little.)

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
# In the picture under the check, the first row shows a square grid of data points carried to latent space by a layer with a random net:
# vertical lines stay vertical and in their places, since $x_1$ is passed on; along each of them $x_2$ is stretched and
# shifted (on the left, so much squeezed that the lines fall together). The second row carries the grid there and back, which must give the square grid again.
# The third is the density that the layer gives the data when the latent points are normal.
#
# **Predict before you run.** For one point, what are the four numbers of your layer's Jacobian if the net answers
# $\alpha = x_1$ and $\mu = x_1^2$, at $\mathbf x = (0.5, 2)$? Which of them enters `ldj`?

# %% tags=["show", "compare"]
def coupling_with(alpha, mu):
    """Your Coupling with two functions of x1 in the place of a trained net, in the form that it takes."""

    class Function(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.forward = f

    forms = (lambda x1: torch.cat([alpha(x1), mu(x1)], -1)), (lambda x1: (alpha(x1), mu(x1))), nn.ModuleList([Function(alpha), Function(mu)])
    for net in forms:
        try:
            layer = Coupling(net)
            layer.forward(torch.zeros(5, 2))
            return layer
        except (TypeError, ValueError, AttributeError):
            continue  # your Coupling takes its net in another form
    return Coupling(forms[0])


@show
def _():
    layer = coupling_with(lambda x1: x1, lambda x1: x1**2)
    x = torch.tensor([[0.5, 2.0]])
    z, ldj = layer.forward(x)
    J = torch.func.jacrev(lambda x: layer.forward(x)[0])(x)[0, :, 0]
    print("z   =", [round(v, 3) for v in z[0].tolist()])
    print("J   =", [[round(v, 3) for v in row] for row in J.tolist()])
    print("ldj =", [round(v, 3) for v in ldj.tolist()], " log|det J| =", round(float(torch.linalg.slogdet(J)[1]), 3))

# %% [markdown]
# **Inside one layer.** Below, a layer of yours with $\alpha = 0.6\sin 2x_1$ and $\mu = x_1^2/2$. The slider (or the arrow keys, once you have
# clicked on the picture) multiplies $\alpha$ and $\mu$ by $\tau$, from 0 to 1: at $\tau = 0$ nothing has happened yet, at $\tau = 1$ it is your
# layer, and every frame between is a coupling layer too. **Predict:** the grid is square at which end? In which columns does the density grow?
#
# <details><summary>Answer</summary>
#
# At the end: the grid is one of the latents, so in the data's space it is bent, and the layer straightens it. Where $\alpha > 0$ a column is
# stretched on the way to the latents, so the density falls on that way; where $\alpha < 0$ it grows.
#
# </details>

# %% tags=["show"]
@show
def _():
    return widgets.layers(coupling_with(lambda x1: 0.6 * torch.sin(2 * x1), lambda x1: 0.5 * x1**2))

# %% [markdown]
# **What a wrong sign does.** The log-determinant is easily returned with the sign of the *inverse* map. Nothing crashes then:
# the loss even falls. But the "density" is not one any more. Below, a layer with $\alpha = 0.8 + 0.5\,x_1$ and $\mu = \sin 2x_1$, with the
# right `ldj` and with its sign turned; the integral over the plane tells them apart. **Predict:** which of the two integrals
# is 1, and is the other larger or smaller than 1?
#
# <details><summary>Answer</summary>
#
# With the right sign it is 1. With the wrong one, the density is multiplied by $e^{-2\alpha}$ at every point, so the integral is
# $\mathbb E[e^{-2\alpha}]$ over $x_1 \sim \mathcal N(0, 1)$, here $e^{-1.6}\,\mathbb E[e^{-x_1}] = e^{-1.6 + 0.5} = 0.33$. For another layer it may exceed 1: then the
# claimed likelihoods are better than any true density could make them.
#
# </details>

# %% tags=["show"]
@show
def _():
    layer = coupling_with(lambda x1: 0.8 + 0.5 * x1, lambda x1: torch.sin(2 * x1))
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
# should be linear, with no activation after it: $\boldsymbol\alpha$ and $\boldsymbol\mu$ may have any sign and size. And there must be a *non-linearity* in between.
#
# **Predict:** if the net were linear, $\alpha = a x_1 + b$ and $\mu = c x_1 + e$ with numbers $a, b, c, e$, what could the
# vertical lines of the grid do, and what could they not?
#
# <details><summary>Answer</summary>
#
# From left to right their height would grow (or shrink) exponentially, and their middles would lie on a straight line. They could
# not, for example, move up, down, and up again, as the sine above makes them do.
#
# </details>
#
# ### Exercise `make_net` · 10 minutes · difficulty 1 of 5 · 5 points
#
# Return a new, trainable net each time, fit for `Coupling(make_net())` with $D = 2$ (so $d = 1$). Useful: `nn.Sequential`.
# Two hidden layers of 64 units are a good size here. `nn.Tanh` is a good activation: far from the data its output stays
# bounded, and so does $\boldsymbol\alpha$, which stands in an exponent. (ReLU grows without end there, and now and then a
# training overflows.)

# %% tags=["solution"] nbgrader={"grade_id": "make_net"}
def make_net():
    """A new network (B, 1) -> (B, 2), or what your Coupling takes in its place."""
    ### BEGIN SOLUTION
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    ### END SOLUTION
    raise NotImplementedError("exercise make_net")

# %% tags=["check"] nbgrader={"grade_id": "make_net_check"}
check("make_net", make_net)

# %% [markdown]
# ## 4 · Mixing
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
    """A coupling layer of yours with weights half as large again as usual, so that it does something visible."""
    layer = Coupling(make_net())
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
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
# says $x_0 = z_2,\ x_1 = z_0,\ x_2 = z_1,\ x_3 = z_3$ (entries counted from 0, as Python does, so this $x_1$ is the second of four): read the other way round,
# $z_0 = x_1,\ z_1 = x_2,\ z_2 = x_0$, so here `order = [1, 2, 0, 3]`.
#
# **Predict:** which of the two is its own inverse?
#
# <details><summary>Answer</summary>
#
# The reverse. Shuffling twice with [1, 2, 0, 3] gives [2, 0, 1, 3]; only the third time everything is back in its place.
#
# </details>
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
# Let $q_\theta$ be the density of a flow with parameters $\theta$ (section 1 wrote $p(\mathbf x)$ for it), and from here on $p$ that of the data. The loss is the mean negative
# log-likelihood, in nats, and it splits into something that no flow can change and something that it can:
#
# $$\mathcal L(\theta) = \mathbb E_{p}\left[-\log q_\theta(\mathbf x)\right]
# = \underbrace{\mathbb E_{p}\left[-\log p(\mathbf x)\right]}_{\text{entropy } H(p)}
# + \underbrace{\mathbb E_{p}\left[\log \frac{p(\mathbf x)}{q_\theta(\mathbf x)}\right]}_{\mathrm{KL}(p\,\|\,q_\theta)\ \ge\ 0}.$$
#
# For the two spirals $H(p) = 2.645$ nats. So a loss alone says little, but the **gap** `loss - entropy` is the distance
# from perfection, KL$(p\|q_\theta)$. The lecture's own solution ends at a loss of 2.937, a gap of 0.29 nats.
#
# ### Exercise `train_flow` · 15 minutes · difficulty 2 of 5 · 10 points
#
# Write the loop: for every batch compute the loss, move the parameters with `torch.optim.Adam`, and keep the loss as a
# plain number (`loss.item()`). A flow has `parameters()`, `log_prob(x) -> (B,)` and `sample(n) -> (n, D)`. `batches` is something
# to run through with `for`; it has no length. (Real projects often clip the gradient's norm before the step, since an
# exponential now and then makes one enormous. You may; it is not needed here.)

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
# Now everything is yours: the layer, its network, the permutation, the loop. Twelve of your layers, with a
# reversal after each, make the flow. The picture hangs on the batches, so your loop needs to know nothing of it. Training goes in legs,
# each a call of your `train_flow` with a smaller learning rate than the one before: 5000 batches of 256, as many points in all as in the lecture's own solution. That takes
# one to two minutes. Meanwhile *Pause* (space) holds your loop between two batches and *Step* (right arrow) lets one through; the notebook's stop button ends
# it early and keeps what was learnt. Afterwards the slider plays the whole training again.
#
# One thing is added to your net: where it *begins*. A hidden unit $\tanh(w x_1 + b)$ is a step of slope $w$ at the place $c = -b/w$. PyTorch draws $w$ and $b$ between $-1$ and $1$: flat steps,
# half of them within $[-1, 1]$, and sharp bends elsewhere have to be found first. `spread` makes the 64 steps of your first layer steeper, $\tanh(2 (x_1 - c))$,
# with places $c$ evenly over $[-4, 4]$, where the data are. In a trial with 5000 batches from one seed the gap of our solution was 0.09 nats with it and 0.19 without. (It knows a net
# `nn.Sequential(nn.Linear(...), nn.Tanh(), ...)`. Any other is left as it is, and its gap will be the larger one; with ReLUs this steep the flow would overflow at once.)
#
# **Predict:** which part of the spirals will be right first, which last?
#
# <details><summary>Answer</summary>
#
# The outer arms come first: they bend gently. The windings are equally far apart everywhere, but near the centre they turn most
# sharply and the two arms meet; there the density stays a little blurred to the end.
#
# </details>

# %% tags=["show"]
def spread(net, slope=2.0, reach=4.0):
    """Start the first layer of Sequential(Linear(1, H), Tanh(), ...) as H steps of that slope, evenly over [-reach, reach]; returns the net."""
    if isinstance(net, nn.Sequential) and [type(part) for part in list(net)[:2]] == [nn.Linear, nn.Tanh] and net[0].bias is not None:
        with torch.no_grad():
            net[0].weight[:] = slope
            net[0].bias[:] = -slope * torch.linspace(-reach, reach, net[0].out_features)
    return net


def coupling_flow(layers=12):
    """Your layers, with a reversal after each, on a standard normal."""
    return Flow(StandardNormal(2), Compose([t for _ in range(layers) for t in (Coupling(spread(make_net())), Permute([1, 0]))]))


def gap(flow, target, n=20_000):
    """Mean negative log-likelihood on fresh points minus the entropy, in nats."""
    with torch.no_grad():
        return float(-flow.log_prob(target.sample(n, seed=1)).mean()) - target.entropy


def train_and_watch(flow, target, legs, size=256):
    """Train in legs [(lr, steps), ...] with a live picture; returns all losses."""
    losses = []

    def draw(step):
        figure, axes = plotting.side_by_side(2, ["the flow's density", "data"], size=3.6)
        plotting.density(axes[0], flow.log_prob, target.limits, n=100, top=float(spiral_log_density.max().exp()))
        plotting.samples(axes[1], target.sample(3000, seed=2), target.limits)
        return figure

    with live.interruptible():
        for i, (lr, steps) in enumerate(legs):
            losses += train_flow(flow, live.batches(target.sample, steps, size, draw if i == 0 else None, label=f"lr = {lr:g}"), lr)
    return losses


@show
def _():
    global spiral_flow, spiral_view
    train_flow(coupling_flow(1), [spirals.sample(8)], 1e-3)  # is it solved?
    settings.seed(1)
    spiral_flow = coupling_flow()
    legs = [(2e-3, settings.steps(3500, 20)), (5e-4, settings.steps(1000, 10)), (1e-4, settings.steps(500, 5))]

    def in_legs(flow, batches):
        return [loss for lr, steps in legs for loss in train_flow(flow, itertools.islice(batches, steps), lr)]

    spiral_view = widgets.training(spiral_flow, spirals, in_legs, steps=sum(steps for _, steps in legs))
    return spiral_view

# %% tags=["show"]
spiral_losses = await spiral_view.run() if "spiral_view" in globals() else []

# %% tags=["show"]
@show
def _():
    if not spiral_losses:
        raise NotImplementedError("the training above needs coupling, make_net, permute and train_flow")
    print(f"loss of the last 100 batches {np.mean(spiral_losses[-100:]):.3f} nats, entropy {spirals.entropy:.3f} nats")
    print(f"gap to the entropy: {gap(spiral_flow, spirals):.3f} nats (the lecture's solution: 0.29)")
    figure = plotting.Picture(figsize=(7, 3.6), layout="constrained")
    plotting.learning_curve(figure.subplots(), spiral_losses, floor=spirals.entropy)
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
    with torch.no_grad():
        log_q = spiral_flow.log_prob(spiral_grid).reshape(100, 100)
    plotting.density(axes[2], spiral_log_density, spirals.limits)
    plotting.density(axes[3], log_q, spirals.limits, top=float(spiral_log_density.max().exp()))
    left, right, bottom, top = spirals.limits
    overlap = float(torch.minimum(spiral_log_density, log_q).exp().mean()) * (right - left) * (top - bottom)
    print(f"overlap of the two densities, the integral of min(p, q): {overlap:.2f} (1 would be perfect)")
    return figure

# %% [markdown]
# Look for thin bridges between neighbouring windings: the map is smooth, and wherever it has not yet learnt a sharp enough
# bend a thread of probability remains. (For data in separate pieces such threads could never vanish: a continuous map cannot
# tear a normal cloud in two.) What does the flow do to space on its way? Below, the data are carried to latent space, a third of the
# layers at a time; the two arms keep their colours, and the shade tells how far from the centre of the spiral a point began.

# %% tags=["show"]
@show
def _():
    if "spiral_flow" not in globals():
        raise NotImplementedError("the training above needs coupling, make_net, permute and train_flow")
    layers = list(spiral_flow.transform)
    stops = [0, len(layers) // 3, 2 * len(layers) // 3, len(layers)]
    figure, axes = plotting.side_by_side(len(stops), [f"after {s // 2} layers" for s in stops], size=3.4)
    x = spirals.sample(6000, seed=4)
    # The arm of a point: on an arm, angle and radius turn together.
    radius = x.norm(dim=1)
    arm = torch.cos(torch.atan2(x[:, 1], -x[:, 0]) - 3 * radius)
    shade = (torch.where(arm > 0, 1.0, -1.0) * (0.25 + radius / 4)).numpy()
    with torch.no_grad():
        for i in range(len(layers) + 1):
            if i in stops:
                low, high = x.quantile(0.01, 0), x.quantile(0.99, 0)
                ax = axes[stops.index(i)]
                ax.scatter(*x.T.numpy(), c=shade, s=3, cmap="PuOr", vmin=-1.2, vmax=1.2, linewidths=0)
                ax.set_xlim(low[0] - 0.3, high[0] + 0.3), ax.set_ylim(low[1] - 0.3, high[1] + 0.3), ax.set_xticks([]), ax.set_yticks([])
            if i < len(layers):
                x = layers[i].forward(x)[0]
    return figure

# %% [markdown]
# Step through all of it yourself: every layer, and within each layer from $\tau = 0$ to 1. The bar at the right is the sum over the layers in
# $\log q_\theta(\mathbf x) = \log p(\mathbf z) + \sum_i \mathrm{ldj}_i$, averaged over the points shown: which layers stretch, which squeeze? A reversal
# has a determinant of $-1$: it turns the plane over, and no path of invertible maps leads there, so it is drawn as a flip.

# %% tags=["show"]
@show
def _():
    if "spiral_flow" not in globals():
        raise NotImplementedError("the training above needs coupling, make_net, permute and train_flow")
    return widgets.layers(spiral_flow, spirals)

# %% [markdown]
# ## 6 · NICE: the first of its kind
#
# The coupling layer began without a scale (NICE: Dinh, Krueger & Bengio 2015): $\mathbf z_2 = \mathbf x_2 + \mathrm{net}(\mathbf x_1)$.
# What is lost? The Jacobian has only ones on its diagonal, so $\log|\det| = 0$ everywhere: the layer moves volume about but
# never changes it. Then $\log q_\theta(\mathbf x) = \log p(\mathbf z)$, with $p(\mathbf z)$ the base: the set where the density exceeds a level keeps its area.
#
# **Predict:** the base density is at most $1/(2\pi) \approx 0.159$. How large can the density of a flow get that is made of such
# layers and permutations only? What does that mean for narrow shapes?
#
# <details><summary>Answer</summary>
#
# No larger than 0.159, the base's own maximum. A narrow shape needs a high density on a small area, and cannot get it.
#
# </details>
#
# ### Exercise `additive_coupling` · 8 minutes · difficulty 1 of 5 · 5 points
#
# Write the layer, both directions. `net` maps `(B, d)` to `(B, d)`; `ldj` is still a tensor of shape `(B,)`.

# %% tags=["solution"] nbgrader={"grade_id": "additive_coupling"}
class AdditiveCoupling(nn.Module):
    """z1 = x1,  z2 = x2 + net(x1)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """x (B, D) -> z (B, D), ldj (B,)"""
        ### BEGIN SOLUTION
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1, x2 + self.net(x1)], dim=-1), x.new_zeros(len(x))
        ### END SOLUTION
        raise NotImplementedError("exercise additive_coupling: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D)"""
        ### BEGIN SOLUTION
        z1, z2 = z.chunk(2, dim=-1)
        return torch.cat([z1, z2 - self.net(z1)], dim=-1)
        ### END SOLUTION
        raise NotImplementedError("exercise additive_coupling: inverse")

# %% tags=["check"] nbgrader={"grade_id": "additive_coupling_check"}
check("additive_coupling", AdditiveCoupling)

# %% [markdown]
# The experiment: a flow of eight additive layers, trained on a pinwheel with five narrow arms. Both pictures have the same
# scale of colours; the highest densities are printed.

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    target = toys.get("pinwheel")

    def net():
        return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    flow = Flow(StandardNormal(2), Compose([t for _ in range(8) for t in (AdditiveCoupling(net()), Permute([1, 0]))]))
    with live.interruptible():
        train_flow(flow, live.batches(target.sample, settings.steps(800, 10), 256), 2e-3)
    figure, axes = plotting.side_by_side(2, ["density of the data", "eight additive layers"])
    x = torch.from_numpy(plotting.grid_points(target.limits, 200))
    with torch.no_grad():
        log_p, log_q = target.log_prob(x).reshape(200, 200), flow.log_prob(x).reshape(200, 200)
    top = float(log_p.max().exp())
    plotting.density(axes[0], log_p, target.limits, top=top)
    plotting.density(axes[1], log_q, target.limits, top=top)
    print(f"highest density: data {top:.3f}, flow {float(log_q.max().exp()):.3f}, base {1 / (2 * math.pi):.3f}")
    print(f"gap to the entropy: {gap(flow, target):.3f} nats")
    return figure

# %% [markdown]
# NICE itself puts one diagonal scaling after its additive layers, to lift exactly this restriction.
#
# ## 7 · ActNorm: starting well
#
# Deep flows train badly when the numbers inside them are far from unit size. *ActNorm* (Glow: Kingma & Dhariwal 2018) scales and
# shifts every dimension $i$ with two learnt numbers, $z_i = x_i\, e^{s_i} + t_i$, with $\mathbf s, \mathbf t \in \mathbb R^{D}$. The trick
# is the start: they are chosen from the *first batch* that comes along, so that it leaves with mean zero and variance one
# (with either estimate of the variance).
# After that they are ordinary parameters. (Batch normalisation would use every batch's own numbers: then a point's latent
# value would depend on its neighbours in the batch, and density and sampling would not match.)
#
# The Jacobian is diagonal: $\log|\det| = \sum_i s_i$, the same for every row.
#
# **Predict:** somebody remembers with `self.seen = True` that the first batch has passed. What happens when the trained flow is
# saved and loaded into a fresh one with `load_state_dict`?
#
# <details><summary>Answer</summary>
#
# A plain attribute is not part of the `state_dict`: the fresh layer has not seen anything, and the first batch after loading
# overwrites the numbers that were learnt. A buffer is saved. (And the parameters should be *filled*, not replaced: an optimiser that
# was made before the first batch holds on to the old objects.)
#
# </details>
#
# ### Exercise `act_norm` · 15 minutes · difficulty 3 of 5 · 8 points
#
# Write the layer. Scale and shift are parameters of shape `(dim,)`; the first batch that `forward` sees sets them so that every
# column leaves with mean 0 and variance 1, and a buffer remembers that this has happened. Useful: `nn.Parameter`,
# `register_buffer`, `torch.no_grad()`, `copy_`.

# %% tags=["solution"] nbgrader={"grade_id": "act_norm"}
class ActNorm(nn.Module):
    """z = x * exp(s) + t; s and t (dim,) are set by the first batch that forward sees, and learnt from then on."""

    def __init__(self, dim):
        super().__init__()
        ### BEGIN SOLUTION
        self.s, self.t = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("started", torch.tensor(False))
        ### END SOLUTION

    def forward(self, x):
        """x (B, dim) -> z (B, dim), ldj (B,)"""
        ### BEGIN SOLUTION
        if not self.started:
            with torch.no_grad():
                mean, std = x.mean(0), x.std(0)
                self.s.copy_(-std.log())
                self.t.copy_(-mean / std)
                self.started.fill_(True)
        return x * self.s.exp() + self.t, self.s.sum().expand(len(x))
        ### END SOLUTION
        raise NotImplementedError("exercise act_norm: forward")

    def inverse(self, z):
        """z (B, dim) -> x (B, dim)"""
        ### BEGIN SOLUTION
        return (z - self.t) * (-self.s).exp()
        ### END SOLUTION
        raise NotImplementedError("exercise act_norm: inverse")

# %% tags=["check"] nbgrader={"grade_id": "act_norm_check"}
check("act_norm", ActNorm)

# %% [markdown]
# ## 8 · Learning to mix: the 1×1 convolution's matrix
#
# A permutation mixes coordinates in a fixed way. Why not learn how? On images this is the *1×1 convolution*: at every pixel
# the channels are multiplied by one matrix $\mathbf W \in \mathbb R^{D\times D}$, $\mathbf z = \mathbf W \mathbf x$, with
# $\log|\det \mathbf W|$ for each pixel. A general determinant costs $O(D^3)$ in every step. Glow writes the matrix in its *LU form*
#
# $$\mathbf W = \mathbf L\,\big(\mathbf U + \operatorname{diag}(e^{\mathbf s})\big),$$
#
# with $\mathbf L$ lower triangular with ones on its diagonal, $\mathbf U$ strictly upper triangular (zeros on the diagonal),
# and $\mathbf s \in \mathbb R^{D}$. Since determinants multiply, and that of a triangular matrix is the product of its diagonal,
#
# $$\log|\det \mathbf W| = \underbrace{\log 1}_{\mathbf L} + \sum_i s_i .$$
#
# (Glow also has a fixed permutation matrix in front, and signs on the diagonal, so that $\mathbf W$ can start as any rotation;
# both have $|\det| = 1$. You may add them or leave them out.)
#
# **Predict:** batches are rows, `x` is `(B, D)`. Is it `x @ W` or `x @ W.T` that multiplies each row's vector by $\mathbf W$? Does the
# determinant care?
#
# <details><summary>Answer</summary>
#
# `x @ W.T`: row b of it is $(\mathbf W \mathbf x_b)^\top$. A matrix and its transpose have the same determinant, so `ldj` does not care, and a flow
# with `x @ W` learns as well; but `inverse` must undo the one that `forward` does.
#
# </details>
#
# ### Exercise `invertible_linear` · 15 minutes · difficulty 3 of 5 · 8 points
#
# `forward` must not call a determinant or an inverse; `inverse` may. All of $\mathbf L$, $\mathbf U$ and $\mathbf s$ are trained; small random numbers are a
# good start for both triangles, zeros for $\mathbf s$. (The free line above `forward` is for a helper method, if you want one; the check takes
# `x @ W` as well.) Useful: `torch.tril`, `torch.triu`, `torch.diag`, `torch.linalg.solve_triangular`.

# %% tags=["solution"] nbgrader={"grade_id": "invertible_linear"}
class InvertibleLinear(nn.Module):
    """z = W x for every row x, with W = L (U + diag(exp(s)))."""

    def __init__(self, dim):
        super().__init__()
        ### BEGIN SOLUTION
        self.lower, self.upper = nn.Parameter(torch.randn(dim, dim) / dim), nn.Parameter(torch.randn(dim, dim) / dim)
        self.s = nn.Parameter(torch.zeros(dim))
        ### END SOLUTION

    ### BEGIN SOLUTION
    def factors(self):
        eye = torch.eye(len(self.s), dtype=self.s.dtype, device=self.s.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + torch.diag(self.s.exp())

    ### END SOLUTION
    def forward(self, x):
        """x (B, dim) -> z (B, dim), ldj (B,)"""
        ### BEGIN SOLUTION
        L, U = self.factors()
        return x @ U.T @ L.T, self.s.sum().expand(len(x))
        ### END SOLUTION
        raise NotImplementedError("exercise invertible_linear: forward")

    def inverse(self, z):
        """z (B, dim) -> x (B, dim)"""
        ### BEGIN SOLUTION
        L, U = self.factors()
        y = torch.linalg.solve_triangular(L, z.T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(U, y, upper=True).T
        ### END SOLUTION
        raise NotImplementedError("exercise invertible_linear: inverse")

# %% tags=["check"] nbgrader={"grade_id": "invertible_linear_check"}
check("invertible_linear", InvertibleLinear)

# %% [markdown]
# Do they help? Three small flows on two moons that have been blown up and moved far from the origin, as raw data often are: with
# reversals only, with your ActNorm in front of every coupling layer, and with your learnt mixing in the place of the reversals as well. The entropy of
# the moved data is that of the moons plus $2 \log 8$, so the gap is known here too. **Predict:** where, roughly, do the three curves begin?
#
# <details><summary>Answer</summary>
#
# Without ActNorm more than a hundred nats above the entropy: the points lie near 40 and the base expects them near 0. The other two begin
# within about one nat, close to each other, since the learnt mixing starts near the identity. What mixing is worth shows later, and
# in two dimensions a plain reversal is hard to beat; with many channels there is more to learn.
#
# </details>

# %% tags=["show"]
@show
def _():
    moons = toys.get("two_moons")
    floor = moons.entropy + 2 * math.log(8)

    def sample(n, seed=None):
        return 8 * moons.sample(n, seed=seed) + 40

    flows = {
        "reversals": lambda: [Coupling(make_net()), Permute([1, 0])],
        "ActNorm, reversals": lambda: [ActNorm(2), Coupling(make_net()), Permute([1, 0])],
        "ActNorm, learnt mixing": lambda: [ActNorm(2), Coupling(make_net()), InvertibleLinear(2)],
    }
    figure = plotting.Picture(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for (name, layers), colour, style in zip(flows.items(), ("red", "blue", "green"), (":", "--", "-")):
        settings.seed(0)
        flow = Flow(StandardNormal(2), Compose([layer for _ in range(4) for layer in layers()]))
        with live.interruptible():
            losses = np.array(train_flow(flow, live.batches(sample, settings.steps(500, 20), 256, label=name), 2e-3))
            width = min(20, len(losses))
            ax.plot(np.convolve(losses - floor, np.ones(width) / width, "valid"), style, color=plotting.PALETTE[colour], linewidth=2, label=name)
    ax.set_yscale("log"), ax.set_xlabel("batch", fontsize=14), ax.set_ylabel("gap to the entropy (nats)", fontsize=14)
    ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# ## 9 · Flow++: more than scale and shift
#
# Given $x_1$, an affine layer can only move and stretch the line of all $x_2$: on each such line one hump stays one hump. *Flow++* (Ho et al. 2019,
# section 3.2) bends that line with an increasing function made of $K$ sigmoid steps. Let $\sigma(u) = 1/(1+e^{-u})$, weights
# $\pi_k > 0$ with $\sum_k \pi_k = 1$, means $m_k$ and log-scales $s_k$. The CDF of a mixture of logistic distributions is
#
# $$F(x) = \mathrm{MixLogCDF}(x; \boldsymbol\pi, \mathbf m, \mathbf s) = \sum_{k=1}^{K} \pi_k\, \sigma\big((x - m_k)\, e^{-s_k}\big) \in (0, 1).$$
#
# A logit carries $(0, 1)$ back to the whole line, and a scale and shift finish the layer:
#
# $$\mathbf z_2 = \operatorname{logit} F(\mathbf x_2)\odot e^{\mathbf a} + \mathbf b, \qquad \operatorname{logit} F = \log F - \log(1 - F),$$
#
# where $F$ acts entry by entry: each of the $d$ entries of $\mathbf x_2$ has its own mixture, $\boldsymbol\pi, \mathbf m, \mathbf s \in \mathbb R^{d\times K}$ and
# $\mathbf a, \mathbf b \in \mathbb R^{d}$, and **all** of these come from the net's look at $\mathbf x_1$. As always, $\mathbf z_1 = \mathbf x_1$. (On the slide a misplaced
# bracket puts $\mathbf b$ into the exponent, and $\mathbf s_\theta(x)$ stands for a function of the whole $x$; both are slips: $\mathbf b$ is added last,
# and everything is a function of $\mathbf x_1$.)
#
# **The slope.** With $y = \operatorname{logit} F(x)$,
#
# $$\frac{dy}{dx} = \frac{F'}{F} + \frac{F'}{1-F} = \frac{F'}{F(1-F)},$$
# $$F'(x) = \sum_k \pi_k\, \sigma(u_k)\,\sigma(-u_k)\, e^{-s_k},\qquad u_k = (x-m_k)\,e^{-s_k}.$$
#
# The whole layer's log-determinant adds the affine part, $\log|\det| = \sum_{i=1}^{d}\big(\log \tfrac{dy_i}{dx_i} + a_i\big)$ over the second half.
#
# (In the code below, `F` is PyTorch's `torch.nn.functional`; the CDF $F$ never gets a name of its own.)
#
# **Predict:** in float32, what is $1 - F(x)$ when $x$ is 20 scales above every mean? And its logarithm?

# %% tags=["show", "compare"]
u = torch.tensor([5.0, 10.0, 15.0, 20.0])
print("1 - sigmoid(u)       ", [f"{v:.3e}" for v in (1 - torch.sigmoid(u)).tolist()])
print("sigmoid(-u)          ", [f"{v:.3e}" for v in torch.sigmoid(-u).tolist()])
print("log(1 - sigmoid(u))  ", [f"{v:.3f}" for v in torch.log(1 - torch.sigmoid(u)).tolist()])
print("logsigmoid(-u)       ", [f"{v:.3f}" for v in F.logsigmoid(-u).tolist()])

# %% [markdown]
# ### Exercise `mix_logit_cdf` · 20 minutes · difficulty 4 of 5 · 8 points
#
# Write the scalar map, with digits left in the tails: in float32 it must agree with float64 from $-30$ to $30$. Never form
# $F$ and $1-F$ themselves; add up in logarithms. Useful: `F.logsigmoid`, `torch.logsumexp`.

# %% tags=["solution"] nbgrader={"grade_id": "mix_logit_cdf"}
def mix_logit_cdf(x, weights, means, log_scales):
    """y = logit of MixLogCDF(x), and ldj = log dy/dx, entry by entry.

    x has any shape (...); weights (normalised), means and log_scales have shape (K,) or (..., K) and broadcast
    against x[..., None]. y and ldj have the shape of x.
    """
    ### BEGIN SOLUTION
    u = (x[..., None] - means) * torch.exp(-log_scales)
    log_w, below, above = weights.log(), F.logsigmoid(u), F.logsigmoid(-u)
    log_cdf = torch.logsumexp(log_w + below, -1)
    log_rest = torch.logsumexp(log_w + above, -1)
    log_pdf = torch.logsumexp(log_w + below + above - log_scales, -1)
    return log_cdf - log_rest, log_pdf - log_cdf - log_rest
    ### END SOLUTION
    raise NotImplementedError("exercise mix_logit_cdf")

# %% tags=["check"] nbgrader={"grade_id": "mix_logit_cdf_check"}
check("mix_logit_cdf", mix_logit_cdf)

# %% [markdown]
# There is no formula for the inverse of this map, but it increases, so *bisection* finds it. First undo $a$ and $b$; then keep
# an interval that holds the answer, look at its middle, throw half of it away. A wide interval will do to begin with, such as
# $-1000$ to $1000$: seventy halvings shrink it to $10^{-18}$ (in float32 the last digit is reached after about thirty-five). The net
# need not be asked again for that: its answer for $\mathbf z_1$ stays the same.
#
# ### Exercise `mix_coupling` · 25 minutes · difficulty 5 of 5 · 10 points
#
# Put the map into a coupling layer. `net` gives `(B, d (3K + 2))`, in five blocks of columns: logits of the weights ($dK$),
# means ($dK$), log-scales ($dK$), $\mathbf a$ ($d$), $\mathbf b$ ($d$). Within the first three you may read the $dK$ columns as
# `(K, d)` or as `(d, K)`. A softmax over the $K$ components makes weights of the logits. The check uses this class alone, so
# if you call your `mix_logit_cdf`, get that right first.

# %% tags=["solution"] nbgrader={"grade_id": "mix_coupling"}
class MixCoupling(nn.Module):
    """z1 = x1,  z2 = logit(MixLogCDF(x2)) * exp(a) + b,  with logits, means, log_scales, a, b = net(x1)."""

    def __init__(self, net, components):
        super().__init__()
        self.net, self.K = net, components

    ### BEGIN SOLUTION
    def parameters_at(self, x1):
        d, K = x1.shape[-1], self.K
        logits, means, log_scales, a, b = self.net(x1).split([d * K, d * K, d * K, d, d], dim=-1)
        logits, means, log_scales = (t.reshape(-1, d, K) for t in (logits, means, log_scales))
        return (logits.softmax(-1), means, log_scales), a, b

    ### END SOLUTION
    def forward(self, x):
        """x (B, D) -> z (B, D), ldj (B,)"""
        ### BEGIN SOLUTION
        x1, x2 = x.chunk(2, dim=-1)
        mixture, a, b = self.parameters_at(x1)
        y, slope = mix_logit_cdf(x2, *mixture)
        return torch.cat([x1, y * a.exp() + b], dim=-1), (slope + a).sum(dim=-1)
        ### END SOLUTION
        raise NotImplementedError("exercise mix_coupling: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D), by bisection"""
        ### BEGIN SOLUTION
        z1, z2 = z.chunk(2, dim=-1)
        mixture, a, b = self.parameters_at(z1)
        y = (z2 - b) * (-a).exp()
        low, high = torch.full_like(y, -1000.0), torch.full_like(y, 1000.0)
        for _ in range(70):
            middle = (low + high) / 2
            above = mix_logit_cdf(middle, *mixture)[0] > y
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return torch.cat([z1, (low + high) / 2], dim=-1)
        ### END SOLUTION
        raise NotImplementedError("exercise mix_coupling: inverse")

# %% tags=["check"] nbgrader={"grade_id": "mix_coupling_check"}
check("mix_coupling", MixCoupling)

# %% [markdown]
# **Two layers against twelve.** The same spirals, two of your mixture layers with $K = 16$, and 1500 batches of 512, some 60% of the points of section 5. Again the nets
# begin spread over the data (with slope 4), and now their last linear layer is set too: as PyTorch starts it, all 16 logistics have about the same parameters, and must part before
# they can be of use. `spread_mixture` lays their means evenly over $[-4, 4]$, with the scale $e^{-1}$ and equal weights, whatever $x_1$ is.
#
# **Predict:** will two such layers come as near as the twelve of section 5?

# %% tags=["show"]
def spread_mixture(net, K, reach=4.0):
    """Start a Sequential (B, 1) -> (B, 3 K + 2) that ends with a Linear so that it looks at all of [-reach, reach]; returns it."""
    last = spread(net, 4.0, reach)[-1]
    with torch.no_grad():
        last.weight[:], last.bias[:] = 0, 0                     # whatever x1 is, at first the logistics are the same ...
        last.bias[K:2 * K] = torch.linspace(-reach, reach, K)   # ... with these means
        last.bias[2 * K:3 * K] = -1                             # ... and these log-scales
    return net


@show
def _():
    global mix_flow
    settings.seed(0)
    K = 16

    def net():
        return spread_mixture(nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3 * K + 2)), K)

    mix_flow = Flow(StandardNormal(2), Compose([t for _ in range(2) for t in (MixCoupling(net(), K), Permute([1, 0]))]))
    legs = [(3e-3, settings.steps(1000, 10)), (5e-4, settings.steps(500, 5))]
    train_and_watch(mix_flow, spirals, legs, size=512)
    print(f"gap to the entropy: {gap(mix_flow, spirals):.3f} nats")
    figure, axes = plotting.side_by_side(2, ["samples of the mixture flow", "its density"])
    plotting.samples(axes[0], mix_flow.sample(8000), spirals.limits)
    plotting.density(axes[1], mix_flow.log_prob, spirals.limits, n=120, top=float(spiral_log_density.max().exp()))
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Nearer: about 0.02 nats, where the twelve affine layers had about 0.06, in a fifth of the time. One layer gives $x_2$ its distribution for each $x_1$, the other one gives
# $x_1$ its own, and 16 logistics can follow all the windings that a vertical line crosses. With $K = 32$, five narrow hidden layers, a learning rate that falls along a cosine and 30 seconds
# of one processor, two such layers end below 0.005 nats: `benchmarks/README.md` sets that beside other libraries.
#
# </details>
#
# Sampling now costs a bisection for each layer, one evaluation of the map for each halving: expressive layers are cheap in
# one direction at least. Autoregressive flows carry that trade further.
#
# ## 10 · Bonus: a study of your own
#
# What makes a coupling flow good? Layers, hidden units, depth, activation, the way of mixing, the learning rate? Pick
# **one** knob, turn it, and see. Runs differ by their seed, so a small effect may be luck.
#
# ### Exercise `bonus_study` · 20 minutes · difficulty 3 of 5 · 2 bonus points
#
# `study(setting)` trains a flow in which one thing depends on the integer `setting` (at least 1: say, the number of layers) and
# returns its gap to the entropy in nats, as a float. Write `settings.steps(600, 30)` for the number of batches: that is 600, or
# 30 in the *fast mode* in which the check runs `study(1)` and `study(4)`. For example:
# `train_flow(flow, live.batches(target.sample, settings.steps(600, 30), 256), 2e-3)`, then `gap(flow, target)`, with a flow of your own making
# and `target = toys.get("two_moons")`.

# %% tags=["solution"] nbgrader={"grade_id": "bonus_study"}
def study(setting):
    """Train a flow with `setting` (an int >= 1) for one knob of your choice; returns the gap in nats, a float."""
    ### BEGIN SOLUTION
    settings.seed(0)
    target = toys.get("two_moons")
    flow = Flow(StandardNormal(2), Compose([t for _ in range(setting) for t in (Coupling(make_net()), Permute([1, 0]))]))
    train_flow(flow, (target.sample(256) for _ in range(settings.steps(600, 30))), 3e-3)
    with torch.no_grad():
        return float(-flow.log_prob(target.sample(5000, seed=1)).mean()) - target.entropy
    ### END SOLUTION
    raise NotImplementedError("exercise bonus_study")

# %% tags=["check"] nbgrader={"grade_id": "bonus_study_check"}
check("bonus_study", study)

# %% tags=["show"]
@show
def _():
    knob = [1, 2, 4, 8]
    gaps = [study(k) for k in live.bar(knob, "settings")]
    figure = plotting.Picture(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.plot(knob, gaps, "o-", color=plotting.PALETTE["blue"], linewidth=2)
    ax.set_xscale("log", base=2), ax.set_xticks(knob, knob)
    ax.set_xlabel("setting", fontsize=14), ax.set_ylabel("gap (nats)", fontsize=14)
    return figure

# %% [markdown]
# What did you change, what happened, and why do you think it did? A few sentences, with numbers. (The check has given its
# two bonus points; this text is read by a person.)

# %% [markdown] tags=["solution"] nbgrader={"grade_id": "bonus_study_text"}
# ### BEGIN SOLUTION
# I varied the number of coupling layers on two moons: 1, 2, 4, 8, everything else fixed, one seed. With one layer only one
# coordinate is bent and the gap stays large; from two layers on both are, and the gap falls quickly, then more slowly: each further pair
# can only correct what the earlier ones left. Differences between 4 and 8 are small, and would need several seeds.
# ### END SOLUTION

# %% [markdown]
# ## What you have now
#
# | layer | what it bends | `ldj` | inverse |
# |---|---|---|---|
# | `Coupling` | half the coordinates: scale and shift | $\sum_i \alpha_i$ | closed form |
# | `AdditiveCoupling` | half the coordinates: shift | 0 | closed form |
# | `MixCoupling` | half the coordinates: a mixture of sigmoid steps | $\sum_i (\log \frac{dy_i}{dx_i} + a_i)$ | bisection |
# | `Permute` | nothing, it mixes | 0 | the other order |
# | `InvertibleLinear` | everything, linearly | $\sum_i s_i$ | two triangular solves |
# | `ActNorm` | scale and shift of each coordinate | $\sum_i s_i$ | closed form |
#
# On images the same layers work along the channels: split them, let a convolutional net look at one half, and mix them by
# 1×1 convolutions. What happens if every coordinate gets its own turn is the question of autoregressive flows, another lesson.

# %% tags=["show"]
progress()
