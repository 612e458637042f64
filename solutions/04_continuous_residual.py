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
# # Lesson 04 · Continuous and residual flows
#
# **What if the Jacobian may be any matrix at all? Who computes its determinant then?**
#
# So far a flow was cheap because its Jacobian had holes: half of it zero in a coupling layer, a triangle in an autoregressive one. This lesson fills
# the holes. Either take *many tiny steps*, so tiny that a trace does the work of the determinant: a continuous flow. Or take *one big step that is
# tame*, $\mathbf z = \mathbf x + g(\mathbf x)$ with a contraction $g$, and write the log-determinant as an infinite series of traces: a residual
# flow. Both need traces of matrices that nobody can afford to write down. So both estimate them, and you will learn to ask of every estimate:
# *is it right on average? of what?*
#
# | | |
# |---|---|
# | **You need** | PyTorch tensors and `torch.autograd.grad`; the change of variables formula (lesson 01, repeated below) |
# | **You write** | `rk4_step`, `exact_trace`, `hutchinson_trace`, `cnf_log_prob`, `probability_flow`; then `residual_inverse`, `spectral_normalize`, `lip_swish`, `power_series_logdet`, `roulette_sum`, `russian_roulette_logdet`, `neumann_gradient` |
# | **Time** | two sittings: two hours for sections 1 to 5 (many tiny steps), two hours and a half for sections 6 to 14 (one tame step) |
# | **Sources** | the lectures "Normalizing Flows" (Nielsen) and "NF 3" (Banerjee), called "the lecture" below; papers are cited where they come in |
#
# Every exercise has a check. It says what is right, what is not, and where to look. `hint("rk4_step")` gives a hint, `progress()` shows how far you
# are. Run All works from the start: what is not solved yet is drawn as an empty frame (that is what `@show` above an experiment is for). Before an
# experiment you are asked to predict; the answer folds out, or the experiment shows it.

# %% tags=["setup"]
import json
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import check, hint, progress, show
from flowkit import datasets, live, plotting, settings, toys, widgets
from flowkit.core import StandardNormal

settings.seed(0)

# %% [markdown]
# Here is the idea as a picture. Time runs to the right. At $t = 0$ stands the density of the data, three humps on a line; at $t = 1$ a standard
# normal. In between the density flows, brighter where it is higher, and the lines are the paths of single points. Between two neighbouring lines
# there is always the same share of the probability. No line ever crosses another, so one can also walk back.

# %% tags=["show"]
def kernel(t):
    """Scale and spread at time t of the diffusion of section 5: x(t) = scale * x(0) + spread * noise."""
    log_scale = -0.05 * t - 19.9 / 4 * t**2
    return math.exp(log_scale), math.sqrt(-math.expm1(2 * log_scale))


humps = {"weights": torch.tensor([0.3, 0.4, 0.3]), "means": torch.tensor([-2.0, 0.2, 2.0]), "stds": torch.tensor([0.25, 0.4, 0.25])}


def humps_at(t):
    """The density of the three humps after the time t: a mixture of three normals still."""
    scale, spread = kernel(t)
    parts = torch.distributions.Normal(scale * humps["means"], (scale**2 * humps["stds"]**2 + spread**2).sqrt())
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(probs=humps["weights"]), parts)


@show
def _():
    times, x = np.linspace(0, 1, 160), torch.linspace(-3.3, 3.3, 400)
    columns = np.stack([humps_at(t).log_prob(x).exp().numpy() for t in times], 1)
    cdfs = np.stack([humps_at(t).cdf(x).numpy() for t in times], 1)
    figure = plotting.Picture(figsize=(12, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 5, 1], sharey=True)
    middle.imshow(columns / columns.max(0), extent=(0, 1, -3.3, 3.3), origin="lower", aspect="auto", cmap="cividis")
    for share in np.linspace(0.03, 0.97, 24):
        middle.plot(times, [np.interp(share, c, x) for c in cdfs.T], color="white", linewidth=1)
    left.plot(-columns[:, 0], x, color="black", linewidth=2.5), right.plot(columns[:, -1], x, color="black", linewidth=2.5)
    left.set_xticks([]), right.set_xticks([])
    left.set_title("data, t = 0", fontsize=14), right.set_title("latent, t = 1", fontsize=14), left.set_ylabel("x", fontsize=14)
    middle.set_xlabel("time t", fontsize=14)
    return figure

# %% [markdown]
# # First sitting: many tiny steps
#
# ## 1 · From a stack of layers to a flow of time
#
# Take a stack of $n$ layers, each near the identity: $\mathbf x_{k+1} = \mathbf x_k + h\, f(t_k, \mathbf x_k)$ with $h = 1/n$ and $t_k = k h$. Here
# $\mathbf x_k \in \mathbb R^D$, and the *field* $f$ gives for each time and place a velocity in $\mathbb R^D$, mostly by a neural network. Now let
# $n \to \infty$. What remains is an ordinary differential equation, the *neural ODE* (Chen et al. 2018):
#
# $$\frac{d\mathbf x(t)}{dt} = f(t, \mathbf x(t)), \qquad \mathbf x(0) = \text{data}, \qquad \mathbf z = \mathbf x(1).$$
#
# **Why is this a bijection?** If $f$ is Lipschitz in $\mathbf x$, a unique solution goes through each point (Picard and Lindelöf). So paths cannot
# cross or merge, and the inverse is the same equation solved from $t = 1$ back to $t = 0$. There is no condition on the architecture: any
# network is a flow. (The lecture writes $f_\theta(\mathbf z(t), t)$, with $\partial$ for the derivative along a path. We write $f(t, \mathbf x)$, as
# solvers do. Where papers let time run from noise to data, here $t = 0$ is the data, since `forward` goes from data to latent in all of this course.)
#
# The stack we came from is *Euler's method*. Below a whirl, slower outside than inside, of which the exact solution is known: every point goes round
# the origin at a fixed distance $r$, by the angle $2\pi e^{-r^2/2}$ in all. Squares are carried along from $t = 0$ to 1 and back again to 0.
# **Predict:** does Euler's method come back? If not, which way does it err?
#
# (The cell is part of the setup: you may use `solve` in your answers.)

# %% tags=["setup"]
def euler_step(f, t, y, h):
    """One step of Euler's method for dy/dt = f(t, y), from time t to t + h."""
    return y + h * f(t, y)


def solve(step, f, y, n, start=0.0, end=1.0):
    """y at the time `end` from y at `start`, by n equal steps of the method `step`."""
    h = (end - start) / n
    for k in range(n):
        y = step(f, start + k * h, y, h)
    return y


def whirl(t, x):
    """A field on the plane, x (B, 2) -> (B, 2): round the origin, faster in the middle, faster at the start than later."""
    speed = 2 * math.pi * torch.exp(-x.square().sum(-1, keepdim=True) / 2) * (1 + math.cos(math.pi * t))
    return speed * torch.stack([-x[:, 1], x[:, 0]], -1)


def whirl_exactly(x):
    """Where the whirl has taken x (B, 2) at t = 1."""
    angle = 2 * math.pi * torch.exp(-x.square().sum(-1) / 2)
    return torch.stack([angle.cos() * x[:, 0] - angle.sin() * x[:, 1], angle.sin() * x[:, 0] + angle.cos() * x[:, 1]], -1)

# %% tags=["show"]
def square_grid(lines=13, points=120, reach=1.5):
    """A square grid as polylines (2 * lines, points, 2)."""
    across, along = torch.linspace(-reach, reach, lines), torch.linspace(-reach, reach, points)
    one = torch.stack(torch.meshgrid(across, along, indexing="ij"), -1)
    return torch.cat([one, one.flip(-1)])


def draw_round_trip(step, n):
    grid, limits = square_grid(), (-2.4, 2.4, -2.4, 2.4)
    there = solve(step, whirl, grid.reshape(-1, 2), n)
    back = solve(step, whirl, there, n, 1.0, 0.0)
    figure, axes = plotting.side_by_side(4, ["t = 0", "t = 1, exact", f"t = 1, {n} steps", "and back to t = 0"], size=3.4)
    for ax, lines, colour in zip(axes, (grid, whirl_exactly(grid.reshape(-1, 2)), there, back), ("black", "black", "blue", "red")):
        plotting.warped_grid(ax, lines.reshape(grid.shape), limits, plotting.PALETTE[colour])
    print(f"mean error at t = 1: {float((there - whirl_exactly(grid.reshape(-1, 2))).norm(dim=-1).mean()):.3f},",
          f"after the way back: {float((back - grid.reshape(-1, 2)).norm(dim=-1).mean()):.3f}")
    return figure


@show
def _():
    return draw_round_trip(euler_step, 24)

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. A step along the tangent leaves the circle to its outside, so points drift outwards on the way there, and (stepping along the tangent the other
# way) outwards once more on the way back. Finer steps help, but only in proportion: twice the steps, half the error.
#
# </details>
#
# **Better steps.** Along the exact path $\mathbf y(t + h) = \mathbf y(t) + h f + \tfrac{h^2}{2} \tfrac{d f}{dt} + \dots$; Euler keeps the first two
# terms, so one step errs by $O(h^2)$, and the $1/h$ steps of an interval by $O(h)$. A step of the classical method of Runge and Kutta asks the field
# four times and combines the answers so that all terms up to $h^4$ agree:
#
# $$\mathbf k_1 = f(t, \mathbf y),\quad \mathbf k_2 = f\big(t + \tfrac h2,\ \mathbf y + \tfrac h2 \mathbf k_1\big),\quad \mathbf k_3 = f\big(t + \tfrac h2,\ \mathbf y + \tfrac h2 \mathbf k_2\big),\quad \mathbf k_4 = f(t + h,\ \mathbf y + h\, \mathbf k_3),$$
#
# $$\mathbf y(t + h) \approx \mathbf y + \tfrac h6 \left(\mathbf k_1 + 2 \mathbf k_2 + 2 \mathbf k_3 + \mathbf k_4\right).$$
#
# ### Exercise `rk4_step` · 10 minutes · difficulty 2 of 5 · 5 points
#
# Write the step. `f(t, y)` gives a tensor of `y`'s shape; `t` and `h` are numbers or scalar tensors (`h` may be negative: that is backwards in time);
# `y` is a tensor of any shape and dtype. Ask `f` four times and not more: later it will be a network. Return $\mathbf y(t + h)$, differentiable.

# %% tags=["solution"] nbgrader={"grade_id": "rk4_step"}
def rk4_step(f, t, y, h):
    """One step of the classical Runge-Kutta method for dy/dt = f(t, y), from time t to t + h; returns a tensor of y's shape."""
    ### BEGIN SOLUTION
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    ### END SOLUTION
    raise NotImplementedError("exercise rk4_step")

# %% tags=["check"] nbgrader={"grade_id": "rk4_step_check"}
check("rk4_step", rk4_step)

# %% tags=["show"]
@show
def _():
    return draw_round_trip(rk4_step, 24)

# %% [markdown]
# **Measure the order.** A method has order $p$ if its error over an interval falls like $h^p$; then one single step errs by $O(h^{p+1})$, one power
# more. In a picture with two logarithmic axes both are straight lines. **Predict** the four slopes (Euler and RK4, one step and an interval). And
# which method is better at the same number of *evaluations of $f$*, which is what a network costs?

# %% tags=["show", "compare"]
def whirl_errors(step, n):
    """Errors in float64, the mean over 50 points: after one step of length 1/n, and at t = 1 after n steps."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = solve(rk4_step, whirl, x, 2000 // n, 0.0, 1 / n)  # one interval of 1/n, much finer
    return float((step(whirl, 0.0, x, 1 / n) - exact).norm(dim=-1).mean()), float((solve(step, whirl, x, n) - whirl_exactly(x)).norm(dim=-1).mean())


@show
def _():
    lines = ["slopes     one step   interval"]
    for name, step, pair in (("Euler", euler_step, (200, 400)), ("RK4", rk4_step, (100, 200))):
        coarse, fine = (whirl_errors(step, n) for n in pair)
        lines.append(f"{name:10s} {math.log2(coarse[0] / fine[0]):7.1f} {math.log2(coarse[1] / fine[1]):10.1f}")
    print("\n".join(lines))

# %% tags=["show"]
@show
def _():
    figure, axes = plotting.side_by_side(3, ["one step", "from t = 0 to 1", "at the same cost"], size=4.2)
    for name, step, colour, calls in (("Euler", euler_step, "red", 1), ("RK4", rk4_step, "blue", 4)):
        sizes = [8, 16, 32, 64, 128, 256][:settings.steps(6, 3)]
        one, whole = zip(*(whirl_errors(step, n) for n in sizes))
        for ax, at, errors in ((axes[0], [1 / n for n in sizes], one), (axes[1], [1 / n for n in sizes], whole), (axes[2], [calls * n for n in sizes], whole)):
            ax.loglog(at, errors, "o-", color=plotting.PALETTE[colour], linewidth=2, label=name)
    axes[0].set_xlabel("h", fontsize=14), axes[1].set_xlabel("h", fontsize=14), axes[2].set_xlabel("evaluations of f", fontsize=14)
    axes[0].set_ylabel("error", fontsize=14), axes[0].legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# 2 and 1 for Euler, 5 and 4 for RK4. At equal cost RK4 is ahead as soon as it is of any use, and by a factor that grows without end.
#
# </details>
#
# **See it live:** the field carries the points; drag the time, change the number of steps and look when the method starts to betray the field.

# %% tags=["show"]
@show
def _():
    return widgets.flow_in_time(whirl, steps=24)

# %% [markdown]
# ## 2 · The instantaneous change of variables
#
# Lesson 01's formula is $\log p(\mathbf x) = \log p(\mathbf z) + \log\left|\det \frac{\partial \mathbf z}{\partial \mathbf x}\right|$. What
# becomes of
# it in one tiny step $\mathbf x' = \mathbf x + h f(t, \mathbf x)$? Let $J = \frac{\partial f}{\partial \mathbf x} \in \mathbb R^{D \times D}$ with
# eigenvalues $\lambda_1, \dots, \lambda_D$. The step has the Jacobian $I + hJ$, and
#
# $$\log \det (I + hJ) = \sum_{i=1}^D \log(1 + h \lambda_i) = h \sum_{i=1}^D \lambda_i + O(h^2) = h \operatorname{Tr} J + O(h^2).$$
#
# (For small $h$ the determinant is positive: no absolute value needed.) Of the determinant only the *trace* is left. Since
# $\log p(\mathbf x) = \log p(\mathbf x') + h \operatorname{Tr} J + O(h^2)$, dividing by $h$ and letting $h \to 0$ gives, along a path,
#
# $$\boxed{\;\frac{d \log p_t(\mathbf x(t))}{dt} = -\operatorname{Tr}\left(\frac{\partial f}{\partial \mathbf x}(t, \mathbf x(t))\right)\;}
# \qquad\Longrightarrow\qquad
# \log p_0(\mathbf x(0)) = \log p_1(\mathbf x(1)) + \int_0^1 \operatorname{Tr}\left(\frac{\partial f}{\partial \mathbf x}\right) dt .$$
#
# This is theorem 1 of Chen et al. (2018). Mind the sign: the *derivative* has a minus, the *integral*, which is the `ldj` of the flow, a plus.
# Where the field spreads points out (positive trace), the density falls along the way, so it was higher at the start.
#
# **In closed form.** For a linear field $f(t, \mathbf x) = A \mathbf x$ the flow is $\mathbf x(1) = e^A \mathbf x(0)$ with the matrix exponential.
# **Predict:** what is $\log\det e^A$? And what does a stack of $n$ Euler steps give, whose log-determinant is $n \log \det(I + A/n)$?

# %% tags=["show", "compare"]
@show
def _():
    A = torch.tensor([[0.5, -2.0], [1.0, 0.4]], dtype=torch.float64)
    for n in (1, 10, 100, 1000, 10000):
        print(f"{n:6d} Euler steps: {n * float(torch.logdet(torch.eye(2) + A / n)):8.5f}")
    print(f"log det exp(A)    : {float(torch.logdet(torch.matrix_exp(A))):8.5f}")
    print(f"Tr A              : {float(A.trace()):8.5f}")

# %% [markdown]
# All three agree in the limit: $\log\det e^A = \operatorname{Tr} A$, whatever the entries beside the diagonal are. They bend the paths, but to first
# order they change no volume.
#
# **What a trace costs.** Automatic differentiation has no "trace". It has the *vector-Jacobian product* (vjp) $\mathbf v^\top J$, one backward pass
# through the network whatever $\mathbf v$ is. With $\mathbf v = \mathbf e_i$ it gives row $i$ of $J$, of which the trace needs the $i$-th entry.
# So an exact trace
# takes $D$ backward passes, and throws most of what they computed away.
#
# ### Exercise `exact_trace` · 15 minutes · difficulty 3 of 5 · 5 points
#
# `f` maps `(B, D)` to `(B, D)`, each row by itself; `x` is `(B, D)`. Return $\operatorname{Tr}\frac{\partial f}{\partial \mathbf x}$ at each row,
# `(B,)`,
# by at most $D$ backward passes in all, not $D$ for each row. `x` need not have `requires_grad`, and should be left as it is; under
# `torch.no_grad()` it is to work too (`with torch.enable_grad():` inside). The result must be
# differentiable itself, in `x` and in the weights of `f`: later a training goes through it. Useful: `torch.autograd.grad(..., create_graph=True)`;
# and
# since rows do not mix, the gradient of a *sum over rows* holds every row's own derivative.

# %% tags=["solution"] nbgrader={"grade_id": "exact_trace"}
def exact_trace(f, x):
    """Tr(df/dx) for each row of x (B, D), with f: (B, D) -> (B, D) row by row; returns (B,), differentiable."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y, total = f(x), 0
        for i in range(x.shape[1]):
            row = torch.autograd.grad(y[:, i].sum(), x, create_graph=True, materialize_grads=True)[0] if y.requires_grad else torch.zeros_like(x)
            total = total + row[:, i]
    return total
    ### END SOLUTION
    raise NotImplementedError("exercise exact_trace")

# %% tags=["check"] nbgrader={"grade_id": "exact_trace_check"}
check("exact_trace", exact_trace)

# %% [markdown]
# Your trace as a map: red where the field spreads points out and the density falls along the paths, blue where it draws them together. **Predict**
# it for the four fields.

# %% tags=["show"]
FIELDS = {
    "whirl: (-y, x)": lambda x: torch.stack([-x[:, 1], x[:, 0]], -1),
    "source: (x, y)": lambda x: x + 0,
    "saddle: (x, -y)": lambda x: x * torch.tensor([1.0, -1.0]),
    "waves: (sin 2x, cos 2y)": lambda x: torch.stack([torch.sin(2 * x[:, 0]), torch.cos(2 * x[:, 1])], -1),
}


@show
def _():
    limits = (-2, 2, -2, 2)
    figure, axes = plotting.side_by_side(4, list(FIELDS), size=3.4)
    grid, arrows = torch.from_numpy(plotting.grid_points(limits, 60)), torch.from_numpy(plotting.grid_points(limits, 11))
    for ax, f in zip(axes, FIELDS.values()):
        traces = exact_trace(f, grid).detach().reshape(60, 60)
        picture = ax.imshow(traces, extent=limits, origin="lower", cmap="RdBu_r", vmin=-4, vmax=4, interpolation="bilinear")
        velocity = f(arrows)
        ax.quiver(arrows[:, 0], arrows[:, 1], velocity[:, 0], velocity[:, 1], color="black", scale=24, width=0.006)
        ax.set_xticks([]), ax.set_yticks([])
    figure.colorbar(picture, ax=axes, shrink=0.8, label="trace")
    return figure

# %% [markdown]
# ## 3 · A trace for the price of one vector: Hutchinson
#
# $D$ passes are fine for the plane, and hopeless for an image. FFJORD (Grathwohl et al. 2019) takes an old trick (Hutchinson 1990). Let
# $\boldsymbol\epsilon \in \mathbb R^D$ be random with mean $\mathbf 0$ and covariance $I$, that is $\mathbb E[\epsilon_i \epsilon_j] = 1$ if $i = j$,
# else 0. Then
#
# $$\mathbb E\left[\boldsymbol\epsilon^\top J \boldsymbol\epsilon\right] = \sum_{i,j} J_{ij}\, \mathbb E[\epsilon_i \epsilon_j] = \sum_i J_{ii} = \operatorname{Tr} J .$$
#
# One vjp gives $\boldsymbol\epsilon^\top J$, and a dot product with $\boldsymbol\epsilon$ the estimate. No row of $J$ is ever written down. (The
# lecture: the Jacobian costs $O(D^2)$, a vjp $O(D)$.)
#
# ### Exercise `hutchinson_trace` · 10 minutes · difficulty 2 of 5 · 6 points
#
# `f` and `x` as before, `eps` is the noise, `(B, D)`, a vector for each row. Return $\boldsymbol\epsilon^\top J \boldsymbol\epsilon$, `(B,)`, by
# *one* backward pass, without building $J$; differentiable, with `x` left as it is, and under `torch.no_grad()` too, as before. Useful: `torch.autograd.grad(y, x, eps, create_graph=True)` is
# $\boldsymbol\epsilon^\top J$.

# %% tags=["solution"] nbgrader={"grade_id": "hutchinson_trace"}
def hutchinson_trace(f, x, eps):
    """eps^T (df/dx) eps for each row, by one vector-Jacobian product; x and eps (B, D), returns (B,), differentiable."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        left = torch.autograd.grad(f(x), x, eps, create_graph=True)[0]
    return (left * eps).sum(-1)
    ### END SOLUTION
    raise NotImplementedError("exercise hutchinson_trace")

# %% tags=["check"] nbgrader={"grade_id": "hutchinson_trace_check"}
check("hutchinson_trace", hutchinson_trace)

# %% [markdown]
# **Unbiased? Test it.** Random signs, $\epsilon_i = \pm 1$ with probability one half each (*Rademacher* noise), have mean 0 and covariance $I$. In
# $D = 4$ there are only $2^4 = 16$ of them, so the expectation is an average that one can compute, with no luck in it. **Predict:** how do the single
# estimates look, and how far is their mean from the trace?

# %% tags=["show", "compare"]
@show
def _():
    generator = torch.Generator().manual_seed(1)
    W, V = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator)
    f = lambda x: torch.tanh(x @ W.T) @ V.T
    x = torch.randn(1, 4, dtype=torch.float64, generator=generator).expand(16, 4)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    estimates = hutchinson_trace(f, x, signs).detach()
    print("the 16 estimates:", ", ".join(f"{e:.2f}" for e in estimates[:8].tolist()), "and each twice, for eps and for -eps")
    print(f"their mean     {float(estimates.mean()):.8f}")
    print(f"Tr J           {float(exact_trace(f, x)[0].detach()):.8f}")

# %% [markdown]
# **How noisy?** Only the symmetric part $S = \frac12 (J + J^\top)$ matters, as $\boldsymbol\epsilon^\top J \boldsymbol\epsilon =
# \boldsymbol\epsilon^\top S \boldsymbol\epsilon$. For the two kinds of noise in use,
#
# $$\text{Gaussian:}\quad \operatorname{Var} = 2 \sum_{i,j} S_{ij}^2, \qquad\qquad \text{Rademacher:}\quad \operatorname{Var} = 2 \sum_{i \ne j} S_{ij}^2 .$$
#
# Why: for Gaussian noise turn the axes so that $S$ is diagonal with entries $s_i$; then the estimate is $\sum_i s_i \epsilon_i^2$ with independent
# terms, and $\operatorname{Var}[\epsilon_i^2] = 2$. For signs, $\epsilon_i^2 = 1$ always, so the diagonal makes no noise at all; what is left is
# $2 \sum_{i<j} S_{ij} \epsilon_i \epsilon_j$, whose terms are uncorrelated with variance 1 each, so $\operatorname{Var} = 4 \sum_{i<j} S_{ij}^2$.
# Signs are never worse.
#
# **Predict** for $D = 16$: the histograms of 20,000 estimates for a matrix with a strong diagonal, and for an antisymmetric one.

# %% tags=["show"]
def signs_like(x):
    """Rademacher noise of the shape of x."""
    return 2.0 * torch.randint_like(x, 2) - 1


@show
def _():
    settings.seed(0)
    R = torch.randn(16, 16) / 5
    matrices = {"anything": R, "strong diagonal": R + torch.eye(16), "antisymmetric": R - R.T}
    figure, axes = plotting.side_by_side(3, list(matrices), size=4)
    x = torch.randn(20_000, 16)
    for ax, (name, J) in zip(axes, matrices.items()):
        S, trace = (J + J.T) / 2, float(J.trace())
        expected = {"Gaussian": 2 * S.square().sum(), "Rademacher": 2 * (S.square().sum() - S.diagonal().square().sum())}
        for kind, noise, colour in (("Gaussian", torch.randn_like(x), "red"), ("Rademacher", signs_like(x), "blue")):
            values = hutchinson_trace(lambda x: x @ J.T, x, noise).detach()
            print(f"{name:16s} {kind:11s} variance {float(values.var()):6.2f}, by the formula {float(expected[kind]):6.2f}")
            ax.hist(values.numpy(), np.linspace(trace - 20, trace + 24, 89), histtype="step", linewidth=2, color=plotting.PALETTE[colour], label=kind)
        ax.axvline(trace, color="black", linestyle=":"), ax.set_yticks([]), ax.set_xlabel("estimate", fontsize=14), ax.set_ylim(0, 2400)
    axes[0].legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# The diagonal widens the Gaussian's histogram and leaves the signs' alone. An antisymmetric matrix has $S = 0$: each single estimate is exactly 0 for
# either noise. (Dotted: the trace. The bar at the right is cut off.)
#
# </details>
#
# And the price? A batch of 64, a network with one hidden layer of 256, in growing dimension. **Predict** both curves.

# %% tags=["show"]
def milliseconds(call):
    """The quickest of some calls: whatever else the machine does only adds."""
    times = []
    for _ in range(settings.steps(6, 2)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


@show
def _():
    sizes = [2, 4, 8, 16, 32, 64]
    curves = {"exact": [], "Hutchinson": []}
    for D in live.bar(sizes, "dimensions"):
        settings.seed(0)
        net, x = nn.Sequential(nn.Linear(D, 256), nn.Tanh(), nn.Linear(256, D)), torch.randn(64, D)
        noise = signs_like(x)
        curves["exact"].append(milliseconds(lambda: exact_trace(net, x)))
        curves["Hutchinson"].append(milliseconds(lambda: hutchinson_trace(net, x, noise)))
    figure = plotting.Picture(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for (name, times), colour, mark in zip(curves.items(), ("red", "blue"), "os"):
        ax.loglog(sizes, times, mark + "-", color=plotting.PALETTE[colour], linewidth=2, label=name)
    ax.set_xticks(sizes, sizes), ax.minorticks_off(), ax.set_xlabel("dimensions D", fontsize=14)
    ax.set_ylabel("ms", fontsize=14), ax.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# ## 4 · A continuous flow: the density along the way
#
# Now both equations together. Let $\ell(t)$ be the log-determinant so far; the pair $(\mathbf x, \ell) \in \mathbb R^{D+1}$ obeys one ODE,
#
# $$\frac{d}{dt} \begin{pmatrix} \mathbf x \\ \ell \end{pmatrix} = \begin{pmatrix} f(t, \mathbf x) \\ \operatorname{Tr} \frac{\partial f}{\partial \mathbf x}(t, \mathbf x) \end{pmatrix}, \qquad \begin{pmatrix} \mathbf x \\ \ell \end{pmatrix}(0) = \begin{pmatrix} \text{data} \\ 0 \end{pmatrix}, \qquad
# \log p(\mathbf x(0)) = \log p_{\text{base}}(\mathbf x(1)) + \ell(1) .$$
#
# ### Exercise `cnf_log_prob` · 20 minutes · difficulty 3 of 5 · 10 points
#
# Write it: `x` is the data, `(B, D)`, at $t = 0$; `f(t, x)` the field, `(B, D)`; `base` has `log_prob`, from `(B, D)` to `(B,)`; `steps` is the
# number of equal RK4 steps from $t = 0$ to $t = 1$, by which both the path and the integral are to go. The trace is to be exact. Return $\log p(\mathbf x)$, `(B,)`, differentiable in `x` and in the weights of
# `f`; it is to work under `torch.no_grad()` too. You may call your `rk4_step` and `exact_trace` (get them right first) and `solve`; one tensor for the pair keeps it short.

# %% tags=["solution"] nbgrader={"grade_id": "cnf_log_prob"}
def cnf_log_prob(x, f, base, steps):
    """log p(x), (B,), of the flow dx/dt = f(t, x) from data x (B, D) at t = 0 to `base` at t = 1, by `steps` RK4 steps."""
    ### BEGIN SOLUTION
    def pair(t, state):
        place = state[:, :-1]
        return torch.cat([f(t, place), exact_trace(lambda y: f(t, y), place)[:, None]], -1)

    state = solve(rk4_step, pair, torch.cat([x, torch.zeros_like(x[:, :1])], -1), steps)
    return base.log_prob(state[:, :-1]) + state[:, -1]
    ### END SOLUTION
    raise NotImplementedError("exercise cnf_log_prob")

# %% tags=["check"] nbgrader={"grade_id": "cnf_log_prob_check"}
check("cnf_log_prob", cnf_log_prob)

# %% [markdown]
# A field of which all is known: $f(t, \mathbf x) = -(1 + t)\,\mathbf x$ in the plane. Its solution is $\mathbf x(1) = e^{a}\,\mathbf x(0)$ with
# $a = -\int_0^1 (1 + t)\, dt = -\frac32$, so with a standard normal base the data are normal with standard deviation $e^{3/2}$. **Predict:** does the
# solver's error show in $\mathbf x(1)$, in $\ell(1)$, or in both?

# %% tags=["show", "compare"]
@show
def _():
    x = torch.tensor([[1.0, -2.0], [0.3, 3.0]], dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, math.exp(1.5)).log_prob(x).sum(-1)
    for steps in (1, 2, 4, 8):
        found = cnf_log_prob(x, lambda t, y: -(1 + t) * y, StandardNormal(2), steps)
        print(f"{steps} steps: largest error {float((found - exact).abs().max()):.1e} nats")

# %% [markdown]
# <details><summary>Answer</summary>
#
# In $\mathbf x(1)$ only: here the trace is $-2 (1 + t)$ wherever the point is, a polynomial in $t$, which RK4 integrates exactly. Each doubling of
# the
# steps brings the error down to about a sixteenth: order 4.
#
# </details>
#
# **FFJORD.** A field that is a small network (two hidden layers of 64), Hutchinson's trace, and an *adaptive* solver, which chooses its steps so that
# the estimated error stays below a tolerance. The target is the pinwheel. Such a solver shows what fixed steps hide: the more intricate the field
# becomes, the more often it must be asked. So the *number of function evaluations* (NFE) grows while the flow learns, and with it the time for each
# batch: the cost of a continuous flow is not in your hands. The noise $\boldsymbol\epsilon$ is drawn once for each solve and kept: with fresh noise
# at each evaluation the right-hand side would jump, and an adaptive solver would find no step small enough.
#
# Here the reference's FFJORD trains. Your `cnf_log_prob` with 40 steps and exact traces then judges what it has learnt. **Predict:** how many times
# more evaluations at the end than at the start?

# %% tags=["show"]
from flowkit.continuous import CNF, VectorField


def train(parameters, loss_of, batches, lr=1e-2, every=None):
    """Adam on loss_of(batch) with a falling learning rate; every(step), if given, is called after each step. Returns the losses."""
    batches, parameters = list(batches), list(parameters)
    optimiser, losses = torch.optim.Adam(parameters, lr=lr), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
    with live.interruptible():
        for step, x in enumerate(live.bar(batches, "training")):
            loss = loss_of(x)
            optimiser.zero_grad(), loss.backward(), nn.utils.clip_grad_norm_(parameters, 10.0), optimiser.step(), schedule.step()
            losses.append(loss.item())
            if every:
                every(step)
    return losses


def drawn(target, steps, size=256):
    """The batches of a training, the same for everybody."""
    return [target.sample(size, seed=1000 + k) for k in range(steps)]


pinwheel = toys.get("pinwheel")


@show
def _():
    settings.seed(0)
    base, field = StandardNormal(2), VectorField(2, (64, 64))
    flow = CNF(field, trace="hutchinson", solver="dopri5", rtol=1e-3, atol=1e-3)
    evaluations, x, steps = [], pinwheel.sample(settings.steps(4000, 200), seed=2), settings.steps(40, 8)

    def gap():
        """By your cnf_log_prob: the mean of log p - log q on the same points."""
        with torch.no_grad():
            return float((pinwheel.log_prob(x) - cnf_log_prob(x, field, base, steps)).mean())

    print(f"gap before the training: {gap():.3f} nats")

    def loss_of(x):
        z, ldj = flow.forward(x)
        evaluations.append(flow.nfe)
        return -(base.log_prob(z) + ldj).mean()

    losses = train(field.parameters(), loss_of, drawn(pinwheel, settings.steps(250, 4)))
    figure, axes = plotting.side_by_side(4, ["loss", "evaluations a solve", "the pinwheel", "your cnf_log_prob of it"], size=3.5)
    plotting.learning_curve(axes[0], losses, floor=pinwheel.entropy, window=20)
    axes[1].plot(evaluations, color=plotting.PALETTE["blue"], linewidth=2), axes[1].set_ylim(0), axes[1].set_xlabel("step", fontsize=14)
    top = float(pinwheel.log_prob(pinwheel.sample(2000, seed=1)).exp().max())
    plotting.density(axes[2], pinwheel.log_prob, pinwheel.limits, n=100, top=top)
    plotting.density(axes[3], lambda x: cnf_log_prob(x, field, base, steps), pinwheel.limits, n=settings.steps(80, 30), top=top)
    print(f"evaluations a solve: {evaluations[0]} at the start, {evaluations[-1]} at the end; gap {gap():.3f} nats")
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# About three times as many: 14 at first, between 40 and 50 at the end, in jumps of six, as one more step of this solver costs six. Each training
# batch at the end takes three times as long as at the start.
#
# </details>
#
# **Learning the solver's mistakes.** With fixed steps the cost stays put. But then the flow is trained on what the *solver* says, and the solver may
# be wrong. Below your `cnf_log_prob` trains a field on eight humps with only 2 RK4 steps, exact trace. On a thousand points its claim is
# compared with what 24 steps say of the same field. **Predict:** can the loss fall *below the entropy*, which no density can?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    target, base, field, fine = toys.get("eight_gaussians"), StandardNormal(2), VectorField(2, (64, 64)), settings.steps(24, 8)
    x = target.sample(settings.steps(1000, 100), seed=3)
    marks, claims, truths = [], [], []

    def gap(steps):
        """The mean of log p - log q on the same points."""
        with torch.no_grad():
            return float((target.log_prob(x) - cnf_log_prob(x, field, base, steps)).mean())

    def look(step):
        if step % 25 == 24:
            marks.append(step + 1), claims.append(gap(2)), truths.append(gap(fine))

    train(field.parameters(), lambda x: -cnf_log_prob(x, field, base, 2).mean(), drawn(target, settings.steps(250, 25), 128), every=look)
    figure, axes = plotting.side_by_side(3, ["gap to the truth (nats)", "density by 2 steps", f"density by {fine} steps"], size=4)
    for values, colour, label in ((claims, "red", "claimed: 2 steps"), (truths, "blue", f"true: {fine} steps")):
        axes[0].plot(marks, values, "o-", color=plotting.PALETTE[colour], linewidth=2, label=label)
    axes[0].axhline(0, color="black", linestyle=":"), axes[0].set_xlabel("step", fontsize=14), axes[0].legend(fontsize=12, frameon=False)
    for ax, steps in zip(axes[1:], (2, fine)):
        plotting.density(ax, lambda x: cnf_log_prob(x, field, base, steps), target.limits, n=settings.steps(80, 20), top=0.3)
    print(f"claimed gap {claims[-1]:.3f} nats, true gap {truths[-1]:.3f} nats")
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# It can. The network finds fields on which two steps add up more trace than there is, and training rewards that: the claim gets better than
# any density could be, and the truth does not. Every number here is computed
# without a mistake in the code, and is no likelihood. **Always evaluate a continuous flow again with a finer solver**, and never report what the
# training's own solver says.
#
# </details>
#
# ## 5 · A field that needs no training loop: the probability flow
#
# A diffusion model destroys data with noise: in the *variance-preserving* process each point moves at random,
#
# $$d\mathbf x = -\tfrac12 \beta(t)\,\mathbf x\, dt + \sqrt{\beta(t)}\; d\mathbf w, \qquad \beta(t) = 0.1 + 19.9\,t,$$
#
# with data at $t = 0$, and at $t = 1$ hardly anything but $\mathcal N(\mathbf 0, I)$. Let $p_t$ be the density at time $t$. It obeys the
# Fokker–Planck
# equation, in which $\nabla \cdot$ is the divergence:
#
# $$\frac{\partial p_t}{\partial t} = -\nabla \cdot \left(-\tfrac{\beta}{2}\,\mathbf x\, p_t\right) + \tfrac{\beta}{2} \nabla \cdot \nabla p_t
# = -\nabla \cdot \Big( \underbrace{-\tfrac{\beta}{2} \big(\mathbf x + \nabla \log p_t(\mathbf x)\big)}_{f(t, \mathbf x)}\; p_t \Big),$$
#
# where the second step uses $\nabla p_t = p_t \nabla \log p_t$. And this is the continuity equation of points that move *without any noise* along the
# field $f$: the same densities at all times, by quite different paths. It is called the *probability flow ODE* (Song et al. 2021). The vector
# $\nabla_{\mathbf x} \log p_t(\mathbf x) \in \mathbb R^D$ is the *score*. A diffusion model is a network that has learnt the score; put it into $f$,
# and it **is a continuous flow**, with exact likelihoods and without a solver in its training. (Song et al. report 2.99 bits/dim on CIFAR-10 in this
# way, with a close relative of this process, their sub-VP; better than all flows in the lecture's table in section 14.) The picture at the start of this lesson was made with this process.
#
# ### Exercise `probability_flow` · 5 minutes · difficulty 1 of 5 · 4 points
#
# Write the field: `score(t, x)` gives `(B, D)`; `t` is a number or a scalar tensor, `x` is `(B, D)`. Return
# $f(t, \mathbf x) = -\frac{\beta(t)}{2} \left(\mathbf x + \mathrm{score}(t, \mathbf x)\right)$, `(B, D)`, with the $\beta$ above and data at $t = 0$.

# %% tags=["solution"] nbgrader={"grade_id": "probability_flow"}
def probability_flow(score, t, x):
    """The field -beta(t)/2 (x + score(t, x)) with beta(t) = 0.1 + 19.9 t; x and the result (B, D), data at t = 0."""
    ### BEGIN SOLUTION
    beta = 0.1 + 19.9 * t
    return -beta / 2 * (x + score(t, x))
    ### END SOLUTION
    raise NotImplementedError("exercise probability_flow")

# %% tags=["check"] nbgrader={"grade_id": "probability_flow_check"}
check("probability_flow", probability_flow)

# %% [markdown]
# **The same densities, other paths.** For the three humps of the opening picture the score is known in closed form. At the left the diffusion itself,
# at the right your field; both start at the same points. **Predict:** how will single paths differ, and how the histograms?

# %% tags=["show"]
def humps_score(t, x):
    """The score of the three humps at time t, x (B, 1) -> (B, 1): the derivative of log p_t."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(humps_at(float(t)).log_prob(x).sum(), x)[0]


@show
def _():
    settings.seed(0)
    parts = torch.multinomial(humps["weights"], 4000, replacement=True)
    start = (humps["means"][parts] + humps["stds"][parts] * torch.randn(4000))[:, None]
    n, random, flow = settings.steps(200, 50), [start], [start]
    for k in live.bar(range(n), "time"):
        t, x = k / n, random[-1]
        beta = 0.1 + 19.9 * t
        random.append(x - beta / 2 * x / n + math.sqrt(beta / n) * torch.randn_like(x))
        flow.append(solve(rk4_step, lambda t, y: probability_flow(humps_score, t, y), flow[-1], 1, t, t + 1 / n))
    figure = plotting.Picture(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[2.2, 2.2, 1.2, 1.2])
    times, x = np.linspace(0, 1, n + 1), torch.linspace(-4, 4, 300)
    for ax, paths, title, colour in ((axes[0], random, "diffusion", "red"), (axes[1], flow, "your field", "blue")):
        ax.plot(times, torch.cat(paths, 1)[:30].T, color=plotting.PALETTE[colour], linewidth=0.8), ax.set_title(title, fontsize=14)
        ax.set_ylim(-4, 4), ax.set_xlabel("time t", fontsize=14)
    for ax, t in ((axes[2], 0.2), (axes[3], 1.0)):
        for paths, colour in ((random, "red"), (flow, "blue")):
            ax.hist(paths[round(t * n)][:, 0].numpy(), np.linspace(-4, 4, 41), density=True, histtype="step", linewidth=2, color=plotting.PALETTE[colour])
        ax.plot(x, humps_at(t).log_prob(x).exp(), color="black"), ax.set_title(f"t = {t}", fontsize=14), ax.set_yticks([])
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# The random paths jitter and cross; those of the field are smooth and never do. The histograms agree with each other, and with $p_t$ (black).
#
# </details>
#
# **Exact likelihoods.** Now in the plane: a mixture of three normals. As the base take its exact density $p_1$, so that nothing but the solver's
#   error
# is left. **Predict:** how does the error fall with the steps? And what changes with the base $\mathcal N(\mathbf 0, I)$?

# %% tags=["show"]
corners = torch.tensor([[-1.5, -1.0], [1.5, -0.6], [0.0, 1.6]])


def corners_at(t):
    """The density at time t of the mixture of three normals, spread 0.3, under the diffusion."""
    scale, spread = kernel(t)
    means = (scale * corners).double()
    parts = torch.distributions.Normal(means, torch.full_like(means, math.hypot(0.3 * scale, spread)))
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(probs=torch.ones(3, dtype=torch.float64)), torch.distributions.Independent(parts, 1))


def corners_score(t, x):
    """Its score, x (B, 2) -> (B, 2): each part draws x to its mean, by its share in the density at x."""
    scale, spread = kernel(float(t))
    variance, away = (0.3 * scale)**2 + spread**2, scale * corners.to(x) - x[:, None]
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), -1)
    return (share[..., None] * away).sum(1) / variance


def corners_field(t, x):
    return probability_flow(corners_score, t, x)

# %% tags=["show", "compare"]
@show
def _():
    settings.seed(0)
    x = corners_at(0.0).sample((50,))
    exact = corners_at(0.0).log_prob(x)
    for steps in (20, 40, 80):
        worst = float((cnf_log_prob(x, corners_field, corners_at(1.0), steps) - exact).abs().max().detach())
        print(f"{steps:3d} steps, base p_1:     largest error {worst:.0e} nats")
    print(f" 80 steps, base N(0, I): largest error {float((cnf_log_prob(x, corners_field, StandardNormal(2), 80) - exact).abs().max().detach()):.0e} nats")

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    x, limits, times = corners_at(0.0).sample((900,)), (-3, 3, -3, 3), [0.0, 0.15, 0.3, 0.5, 1.0]
    figure, axes = plotting.side_by_side(6, [*(f"t = {t}" for t in times), "and back from noise"], size=2.7)
    whose = (x[:, None] - corners).square().sum(-1).argmin(1)
    for k, (ax, t) in enumerate(zip(axes, times)):
        x = solve(rk4_step, corners_field, x, 20, times[k - 1], t) if k else x
        for part, colour in enumerate(("blue", "red", "green")):
            plotting.samples(ax, x[whose == part], limits, plotting.PALETTE[colour])
    back = solve(rk4_step, corners_field, torch.randn(900, 2, dtype=torch.float64), 60, 1.0, 0.0)
    plotting.samples(axes[-1], back, limits, plotting.PALETTE["black"])
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Twice the steps leave a sixteenth or less, once there are enough of them. The base hardly matters: at $t = 1$ the data's means have shrunk to
# 0.7% of what they were, and $p_1$ is the standard normal to less than $10^{-4}$ nats at these points. In the pictures, each hump of the data has a region
# of the latent plane to itself, with borders between
# them that no path crosses.
#
# </details>
#
# **See it live:** the view of section 1 with your field of the three corners.

# %% tags=["show"]
@show
def _():
    try:
        corners_field(0.5, torch.zeros(1, 2))
    except NotImplementedError:
        return widgets.flow_in_time()  # a field of its own, until yours is there
    return widgets.flow_in_time(corners_field, steps=40)

# %% [markdown]
# **What a continuous flow costs, in sum.** Any network for the field; density and sampling are one solve each, tens of evaluations; likelihoods are
# exact up to the solver's tolerance if the trace is, and unbiased with Hutchinson's estimate (of the *log*-density: mark that for section 9). What it
# cannot do is tear: paths of an ODE cannot cross, so $f$ must be steep where the humps of the data come apart.
#
# # Second sitting: one tame step
#
# ## 6 · Residual flows: invertible, whatever is inside
#
# Go back to a single step, but a big one: $\mathbf z = \mathbf x + g(\mathbf x)$, where $g: \mathbb R^D \to \mathbb R^D$ is a network, called the
# *residual branch*. In general that is no bijection. It is one as soon as $g$ is a **contraction**, that is if its Lipschitz constant is below 1:
#
# $$\lVert g(\mathbf a) - g(\mathbf b) \rVert \le L\, \lVert \mathbf a - \mathbf b \rVert \quad \text{for all } \mathbf a, \mathbf b \in \mathbb R^D, \qquad L < 1 .$$
#
# (Behrmann et al. 2019, *i-ResNet*; the lecture NF calls the branch $h$.) **Proof.** To invert means to solve $\mathbf x = \mathbf z - g(\mathbf x)$
# for $\mathbf x$. The right-hand side is a contraction in $\mathbf x$, so Banach's fixed-point theorem says that there is exactly one solution,
# and that iterating
#
# $$\mathbf x_0 = \mathbf z, \qquad \mathbf x_{k+1} = \mathbf z - g(\mathbf x_k), \qquad \lVert \mathbf x_k - \mathbf x \rVert \le L^k\, \lVert \mathbf x_0 - \mathbf x \rVert$$
#
# finds it, with an error that shrinks by the factor $L$ at least each time: the difference of two consecutive errors is that of two values of $g$.
# $\square$
#
# A contraction stretches nowhere by more than $1 + L < 2$ and shrinks by no more than $1 - L > 0$, so one layer can do little, and one stacks many.
#
# ### Exercise `residual_inverse` · 10 minutes · difficulty 2 of 5 · 4 points
#
# Write the iteration: start from $\mathbf x_0 = \mathbf z$, do `n_iter` steps, return the last $\mathbf x$. `z` is `(B, D)`, and `g` maps `(B, D)`
# to `(B, D)`; ask it once a step. No gradient is needed here.

# %% tags=["solution"] nbgrader={"grade_id": "residual_inverse"}
def residual_inverse(g, z, n_iter):
    """The x with x + g(x) = z, by n_iter steps of the fixed-point iteration from x = z; x and z (B, D)."""
    ### BEGIN SOLUTION
    x = z
    for _ in range(n_iter):
        x = z - g(x)
    return x
    ### END SOLUTION
    raise NotImplementedError("exercise residual_inverse")

# %% tags=["check"] nbgrader={"grade_id": "residual_inverse_check"}
check("residual_inverse", residual_inverse)

# %% [markdown]
# A branch with an exactly known constant: a turn by 70 degrees, shrunk by $L$. **Predict** the error against the number of iterations for
# $L = 0.3, 0.6, 0.9$, and what happens for $L = 1.05$, where $\mathbf x + g(\mathbf x)$ happens to be invertible all the same.

# %% tags=["show"]
def turn(L, degrees=70):
    """g(x) = L R x with a rotation R."""
    a = math.radians(degrees)
    R = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
    return lambda x: L * x @ R.T.to(x)


@show
def _():
    x, n = torch.tensor([[1.0, 0.5]], dtype=torch.float64), 40
    figure, axes = plotting.side_by_side(3, ["L = 0.9: the iterates", "L = 1.05: the iterates", "error"], size=4.2)
    for L, colour in ((0.3, "green"), (0.6, "sky"), (0.9, "blue"), (1.05, "red")):
        g = turn(L)
        path = torch.cat([residual_inverse(g, x + g(x), k) for k in range(n)])
        axes[2].semilogy((path - x).norm(dim=1).clamp_min(1e-17), "o", markersize=4, color=plotting.PALETTE[colour], label=f"L = {L}")
        axes[2].semilogy([float(g(x).norm()) * L**k for k in range(n)], color=plotting.PALETTE[colour], linewidth=1)
        if L > 0.8:
            ax = axes[0 if L < 1 else 1]
            ax.plot(*path.T, "o-", color=plotting.PALETTE[colour], linewidth=1, markersize=4), ax.plot(*x.T, "*", color="black", markersize=16)
            ax.set_aspect("equal", adjustable="datalim"), ax.locator_params(nbins=5)
    axes[2].set_ylim(1e-17, 1e2), axes[2].set_xlabel("iteration", fontsize=14), axes[2].legend(fontsize=12, frameon=False, loc="lower left")
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Straight lines of slope $\log L$ (thin: $L^k$ times the first error), down to the rounding of float64. For $L = 1.05$ the iterates spiral outwards
# though there is an inverse: being a contraction is *sufficient* for both, existence and iteration.
#
# </details>
#
# **See it live:** on the line, with the staircase of the iteration. Raise the branch's slope past 1 and see what breaks.

# %% tags=["show"]
@show
def _():
    return widgets.contraction()

# %% [markdown]
# ## 7 · Making a network contract
#
# A network is a chain of linear maps and activations, and Lipschitz constants of a chain multiply:
#
# $$g = W_3 \circ \phi \circ W_2 \circ \phi \circ W_1 \qquad\Longrightarrow\qquad \operatorname{Lip}(g) \le \lVert W_3 \rVert_2\, \operatorname{Lip}(\phi)\, \lVert W_2 \rVert_2\, \operatorname{Lip}(\phi)\, \lVert W_1 \rVert_2 .$$
#
# (Biases are shifts and change nothing.) So keep $\operatorname{Lip}(\phi) \le 1$, and give each matrix a *spectral norm* $\lVert W \rVert_2$, its
# largest singular value $\sigma_1$, of at most $c < 1$. Then $\operatorname{Lip}(g) \le c^3$.
#
# **Power iteration** finds $\sigma_1$: apply $W^\top W$ to a vector again and again. Written in the right singular vectors, whose
# eigenvalues are $\sigma_i^2$, the part along the first one grows fastest, and after $k$ rounds the others have fallen behind by
# $(\sigma_i / \sigma_1)^{2k}$. With the unit vector $\mathbf v$ that is left, $\hat\sigma = \lVert W \mathbf v \rVert \le \sigma_1$. Always from below!
#
# ### Exercise `spectral_normalize` · 15 minutes · difficulty 3 of 5 · 7 points
#
# `weight` is a matrix, `(out, in)`, square or not. Find $\hat\sigma$ by `n_iter` rounds of power iteration, and return
# $W / \max(1, \hat\sigma / c)$: scaled down to the spectral norm $c$ if it is above, and exactly as it was if it is not (the slide's "enforce using
# SpectralNorm"; PyTorch's own `spectral_norm` always divides by $\sigma_1$, which is something else). Start from a vector without preferences
# (random, for instance), and normalise in each round. `weight` may have any floating dtype, and a large norm. The
# result is to be differentiable in `weight`; the vectors may be taken as constants.

# %% tags=["solution"] nbgrader={"grade_id": "spectral_normalize"}
def spectral_normalize(weight, c, n_iter):
    """weight (out, in) scaled so that its spectral norm, found by n_iter power iterations, is at most c; untouched if it is."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        v = torch.randn(weight.shape[1], dtype=weight.dtype, device=weight.device)
        for _ in range(n_iter):
            u = F.normalize(weight @ v, dim=0)
            v = F.normalize(weight.T @ u, dim=0)
    sigma = (weight @ v).norm() / v.norm()
    return weight / (sigma / c).clamp(min=1)
    ### END SOLUTION
    raise NotImplementedError("exercise spectral_normalize")

# %% tags=["check"] nbgrader={"grade_id": "spectral_normalize_check"}
check("spectral_normalize", spectral_normalize)

# %% [markdown]
# What is left of the norm after $n$ rounds? For a random $64 \times 64$ matrix, whose first singular values stand close together, and for one with a
# clear first. **Predict:** is the true norm after the scaling above or below $c = 0.9$?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    noise = torch.randn(64, 64, dtype=torch.float64) / 8
    one = noise + 3 * torch.outer(*F.normalize(torch.randn(2, 64, dtype=torch.float64)))
    rounds = [1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120]
    figure = plotting.Picture(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, W), colour in zip({"random matrix": noise, "with a clear first": one}.items(), ("red", "blue")):
        left.plot(torch.linalg.svdvals(W), ".-", color=plotting.PALETTE[colour], label=name)
        norms = []
        for n in rounds:
            settings.seed(1)  # the same start for all
            norms.append(float(torch.linalg.matrix_norm(spectral_normalize(W, 0.9, n), 2)))
        right.plot(rounds, norms, "o-", color=plotting.PALETTE[colour], linewidth=2)
    right.axhline(0.9, color="black", linestyle=":"), right.axhline(1, color="black", linewidth=0.8)
    left.set_title("singular values", fontsize=14), left.legend(fontsize=12, frameon=False), left.set_xlabel("number", fontsize=14)
    right.set_title("true norm after scaling to 0.9", fontsize=14), right.set_xlabel("rounds of power iteration", fontsize=14), right.set_xscale("log")
    return figure

# %% [markdown]
# Above, always: an estimate from below scales too little. With one round the "contraction" may have a norm above 1 (the upper line), and
# nothing in the training would tell. Practice keeps the vector $\mathbf v$ from one training step to the next, so that a few rounds each time add up,
# or iterates to a tolerance.
#
# **The activation** must have slopes of size at most 1. But there is a second wish. Training looks at the log-determinant, made of first
#   derivatives of
# $g$; so *its* gradient is made of *second* derivatives of $\phi$. Where $\phi'' = 0$, nothing is learnt about the determinant. ELU,
# $\phi(z) = z$ for $z > 0$, has its largest slope on a whole half-line, and $\phi'' = 0$ right there: where the layer does most, it learns least. Chen
# et al. (2019) propose
#
# $$\operatorname{LipSwish}(z) = \frac{z\, \sigma(\beta z)}{1.1}, \qquad \sigma(u) = \frac{1}{1 + e^{-u}}, \qquad \beta > 0 \text{ learnt}.$$
#
# Why 1.1, for any $\beta$? With $u = \beta z$ the function is $\frac{1}{1.1\,\beta}\, u\, \sigma(u)$, so its slope at $z$ is
# $\frac{1}{1.1} \frac{d}{du}[u\,\sigma(u)]$ at $u$,
# whatever $\beta$ is, and the largest value of that derivative is $1.0998$.
#
# ### Exercise `lip_swish` · 5 minutes · difficulty 1 of 5 · 3 points
#
# Write it: `z` of any shape, `beta` a positive number or a tensor that broadcasts. It is to give the right number, and the right
# slope, for `z` of size 800 too (in float32), and gradients are to reach `z` and `beta`.

# %% tags=["solution"] nbgrader={"grade_id": "lip_swish"}
def lip_swish(z, beta):
    """z * sigmoid(beta z) / 1.1, elementwise."""
    ### BEGIN SOLUTION
    return z * torch.sigmoid(beta * z) / 1.1
    ### END SOLUTION
    raise NotImplementedError("exercise lip_swish")

# %% tags=["check"] nbgrader={"grade_id": "lip_swish_check"}
check("lip_swish", lip_swish)

# %% [markdown]
# The lecture's figure on activation functions: slope and second derivative. Shaded is where the slope's size is above 0.95, where a layer uses what
# its Lipschitz constant allows. **Predict:** which of the four has curvature in its shaded region?

# %% tags=["show"]
@show
def _():
    activations = {"LipSwish, β = 1": lambda z: lip_swish(z, 1.0), "ELU": F.elu, "softplus": F.softplus, "tanh": torch.tanh}
    figure = plotting.Picture(figsize=(14, 5.4), layout="constrained")
    rows = figure.subplots(2, 4, sharex=True, sharey="row")
    z = torch.linspace(-6, 6, 1201, dtype=torch.float64, requires_grad=True)
    for (name, phi), (top, bottom) in zip(activations.items(), rows.T):
        slope = torch.autograd.grad(phi(z).sum(), z, create_graph=True)[0]
        second = torch.autograd.grad(slope.sum(), z)[0]
        slope, at = slope.detach(), z.detach()
        for ax, curve, colour in ((top, slope, "blue"), (bottom, second, "red")):
            ax.set_ylim(-0.9, 1.2), ax.axhline(0, color="black", linewidth=0.8)
            ax.fill_between(at, -0.9, 1.2, where=slope.abs() > 0.95, color=plotting.PALETTE["yellow"], alpha=0.3, linewidth=0)
            ax.plot(at, curve, color=plotting.PALETTE[colour], linewidth=2.5)
        top.axhline(1, color="black", linestyle=":"), top.set_title(name, fontsize=14), bottom.set_xlabel("z", fontsize=14)
        steep = slope.abs() > 0.95
        print(f"{name:16s} largest slope {float(slope.max()):.4f}; where it is above 0.95: mean |second derivative| {float(second[steep].abs().mean()):.3f}")
    rows[0, 0].set_ylabel("slope", fontsize=14), rows[1, 0].set_ylabel("second derivative", fontsize=14)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# LipSwish has curvature nearly everywhere there. Nearly: *at* its steepest point $\phi''$ must be zero, as for any smooth function whose slope has a
# maximum. (The slide's wish "the second derivative should not be zero when $|\phi'|$ is close to 1" can be met near that point, not at it; ELU
# fails on a half-line, and softplus nearly so: its curvature falls like $e^{-z}$ there.) Tanh has the strongest curvature where it is steep, but it is steep in a short stretch only, and saturates on both
# sides: slope *and* curvature go to zero. LipSwish stays steep to the right, and saturates only to the left.
#
# </details>
#
# **Your branch.** From here on `Branch(dim, width, c)` is a network of your parts: two linear layers, each with its weights through your
# `spectral_normalize`, and your `lip_swish` between them, $\beta = \operatorname{softplus}$ of a learnt number. (`prepare` does it once after each
# change
# of the weights, so that $g$ may be called often in between.) Below one
# is trained for a moment to imitate $g(\mathbf x) = (-2\tanh x_2, 2\tanh x_1)$, whose slopes reach 2. **Predict:** what will its largest slope be?

# %% tags=["show"]
class Branch(nn.Module):
    """g: (B, dim) -> (B, dim), two linear layers of spectral norm at most c with your lip_swish between them."""

    def __init__(self, dim, width, c=0.97):
        super().__init__()
        self.layers, self.raw_beta, self.c = nn.ModuleList([nn.Linear(dim, width), nn.Linear(width, dim)]), nn.Parameter(torch.tensor(0.5)), c
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.mul_(0.4)  # well under the bound: a branch that does little at first
        self.prepare()

    def prepare(self):
        """Put the weights through your spectral_normalize; to be called whenever they have changed."""
        with torch.random.fork_rng(devices=[]):  # what it draws changes nothing else that is random
            self.bounded = [spectral_normalize(layer.weight, self.c, 40) for layer in self.layers]
        return self

    def forward(self, x):
        hidden = F.linear(x, self.bounded[0], self.layers[0].bias)
        return F.linear(lip_swish(hidden, F.softplus(self.raw_beta)), self.bounded[1], self.layers[1].bias)


def jacobians(g, x, differentiable=False):
    """dg/dx for each row, (B, D, D), of g: (B, D) -> (B, D) row by row."""
    return torch.autograd.functional.jacobian(lambda x: g(x).sum(0), x, create_graph=differentiable).movedim(1, 0)


def bend(g, R, steps):
    """Train g towards 2 tanh(R x) with an orthogonal matrix R (dim, dim), which has slopes up to 2."""
    optimiser = torch.optim.Adam(g.parameters(), lr=2e-2)
    for _ in range(steps):
        g.prepare()
        x = torch.randn(128, len(R))
        loss = (g(x) - 2 * torch.tanh(x @ R.T)).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return g.prepare()


@show
def _():
    settings.seed(0)
    g, limits = Branch(2, 32), (-3, 3, -3, 3)

    def norms():
        return torch.linalg.matrix_norm(jacobians(g, torch.from_numpy(plotting.grid_points(limits, 60))), 2).detach()

    fresh, grid = norms().max(), 2 * square_grid()
    bend(g, torch.tensor([[0.0, -1.0], [1.0, 0.0]]), settings.steps(200, 5))
    with torch.no_grad():
        z = grid.reshape(-1, 2) + g(grid.reshape(-1, 2))
        back = residual_inverse(g, z, 200)
    figure, axes = plotting.side_by_side(4, ["x", "z = x + g(x)", "your inverse", "norm of dg/dx"], size=3.5)
    for ax, lines, colour in zip(axes, (grid, z.reshape(grid.shape), back.reshape(grid.shape)), ("black", "blue", "red")):
        plotting.warped_grid(ax, lines, None, plotting.PALETTE[colour])
    figure.colorbar(axes[3].imshow(norms().reshape(60, 60), extent=limits, origin="lower", cmap="cividis", vmin=0, vmax=1), ax=axes[3], shrink=0.8)
    axes[3].set_xticks([]), axes[3].set_yticks([])
    print(f"bound {0.97**2:.3f}; largest norm found: {float(fresh):.3f} in the fresh branch, {float(norms().max()):.3f} after its training")
    return figure

# %% [markdown]
# To reach the bound $c^2$ the two matrices must hand their strongest directions on to one another, and the activations must be at their steepest: a
# fresh branch is far below. A training that wants more gets near it, and not over it: 0.94 where 2 was asked for. (Provided the
# power iteration starts from a fresh random vector each time. With one fixed start vector the same training may end above the bound (0.98 for one that we tried): it pushes just where the
# estimate does not look.) The live view again, with your own parts as a branch on the line:

# %% tags=["show"]
@show
def _():
    settings.seed(3)
    try:
        g = bend(Branch(1, 16), -torch.ones(1, 1), settings.steps(100, 5))
    except NotImplementedError:
        return widgets.contraction()
    return widgets.contraction(g)

# %% [markdown]
# ## 8 · The log-determinant as a series
#
# Let $J = \frac{\partial g}{\partial \mathbf x}$, with eigenvalues $\lambda_i$ (complex ones in pairs), all of size at most $L < 1$. Then
#
# $$\texttt{ldj} = \log \left|\det (I + J)\right| = \sum_{i=1}^D \log (1 + \lambda_i) = \sum_{i=1}^D \sum_{k=1}^\infty \frac{(-1)^{k+1}}{k} \lambda_i^k
# = \sum_{k=1}^\infty \frac{(-1)^{k+1}}{k} \operatorname{Tr}\left(J^k\right),$$
#
# and $\det(I + J) > 0$, as $\det(I + sJ)$ is not zero for any $s$ from 0 (where it is 1) to 1. (The slide writes "$\log J_f = \operatorname{Tr}(\dots)$"; it
# means
# $\log|\det J_f|$.) Each trace by Hutchinson, with one vector $\mathbf v$ for all of them: $\mathbf v^\top J^k$ comes from
# $\mathbf v^\top J^{k-1}$ by one more vjp.
#
# The i-ResNet **cuts the series off** after $n$ terms. What is left out is at most
#
# $$\Big| \sum_{k > n} \frac{(-1)^{k+1}}{k} \operatorname{Tr} (J^k) \Big| \le \sum_{k > n} \frac{D L^k}{k} \le \frac{D\, L^{n+1}}{(n+1)(1 - L)} :$$
#
# a *bias*, which no averaging over $\mathbf v$ removes. It grows with the dimension and, much faster, with $L$.
#
# ### Exercise `power_series_logdet` · 20 minutes · difficulty 4 of 5 · 8 points
#
# Return $\sum_{k=1}^{n} \frac{(-1)^{k+1}}{k}\, \mathbf v^\top J^k \mathbf v$ for each row, `(B,)`: `g` maps `(B, D)` to `(B, D)` row by row, `x`
# and `v` are
# `(B, D)`, `n_terms` is $n \ge 1$. One evaluation of `g` and $n$ vjps are enough, and $J$ itself is not to be built. Differentiable in `x` and in
# the weights of `g`.
# `x` need not have `requires_grad`.

# %% tags=["solution"] nbgrader={"grade_id": "power_series_logdet"}
def power_series_logdet(g, x, n_terms, v):
    """The first n_terms terms of the series of log det(I + dg/dx), with v^T J^k v for the traces; x and v (B, D), returns (B,)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y, power, total = g(x), v, 0
        for k in range(1, n_terms + 1):
            power = torch.autograd.grad(y, x, power, create_graph=True)[0]
            total = total + (-1) ** (k + 1) / k * (power * v).sum(-1)
    return total
    ### END SOLUTION
    raise NotImplementedError("exercise power_series_logdet")

# %% tags=["check"] nbgrader={"grade_id": "power_series_logdet_check"}
check("power_series_logdet", power_series_logdet)

# %% [markdown]
# **Averaging without luck.** The $D$ vectors $\sqrt D\, \mathbf e_i$ have the second moments of the noise,
#   $\frac1D \sum_i (\sqrt D\, \mathbf e_i)(\sqrt D\, \mathbf e_i)^\top = I$, so
# the mean over them is the exact expectation over $\mathbf v$. What then remains is the bias. **Predict:** by which factor does it shrink with
# each term more?

# %% tags=["show", "compare"]
def over_noise(estimate, x):
    """The mean of estimate(v), (B,), over v with covariance I: over sqrt(D) e_i, i = 1..D, which needs no luck."""
    D = x.shape[1]
    return sum(estimate((math.sqrt(D) * torch.eye(D)[i]).to(x).expand_as(x)) for i in range(D)) / D


@show
def _():
    J = torch.diag(torch.tensor([-0.8, 0.5, 0.3], dtype=torch.float64))
    g, x, L = (lambda x: x @ J.T), torch.zeros(1, 3, dtype=torch.float64), 0.8
    exact = float(torch.logdet(torch.eye(3) + J))
    lines = [f"exact log det(I + J)  {exact:8.4f}", "terms   estimate      bias     bound"]
    for n in (1, 2, 3, 5, 10, 20):
        value = float(over_noise(lambda v: power_series_logdet(g, x, n, v), x).detach())
        lines.append(f"{n:5d} {value:10.4f} {value - exact:9.4f} {3 * L**(n + 1) / ((n + 1) * (1 - L)):9.4f}")
    print("\n".join(lines))

# %% [markdown]
# By a factor a little below $L = 0.8$, since the terms also have $\frac1k$. Mark the sign: for a *negative* eigenvalue all terms of the
# series are negative, so any truncation claims
# **too much**. For a positive one the sign alternates. Below the whole figure: the bias for $D = 16$ against the number of terms, and against $L$,
# for eigenvalues that are all $+L$ or all $-L$ (the worst case there is). **Predict:** with 10 terms, up to which $L$ is the error below 0.1 nats?

# %% tags=["show"]
@show
def _():
    D, x = 16, torch.zeros(1, 16, dtype=torch.float64)

    def bias(eigenvalue, n):
        v = torch.ones_like(x)  # for a multiple of the identity every v of length sqrt(D) gives the exact traces
        return float(power_series_logdet(lambda x: eigenvalue * x, x, n, v).detach()) - D * math.log1p(eigenvalue)

    figure, axes = plotting.side_by_side(2, ["bias against terms", "bias against L"], size=4.6)
    terms = range(1, 31)
    for L, colour in ((0.5, "green"), (0.8, "blue"), (0.95, "red")):
        axes[0].semilogy(terms, [abs(bias(-L, n)) for n in terms], "-", color=plotting.PALETTE[colour], linewidth=2.5, label=f"L = {L}")
        axes[0].semilogy(terms, [D * L**(n + 1) / ((n + 1) * (1 - L)) for n in terms], ":", color=plotting.PALETTE[colour], linewidth=2)
    axes[0].set_ylim(1e-6, 1e3), axes[0].set_xlabel("terms n (dotted: the bound)", fontsize=14), axes[0].set_ylabel("|bias| (nats), all λ = −L", fontsize=14)
    sizes = np.linspace(0.05, 0.98, 40)
    for n, colour in ((5, "orange"), (10, "purple")):
        axes[1].plot(sizes, [bias(-L, n) for L in sizes], "-", color=plotting.PALETTE[colour], linewidth=2.5, label=f"n = {n}, all λ = −L")
        axes[1].plot(sizes, [bias(L, n) for L in sizes], "--", color=plotting.PALETTE[colour], linewidth=2, label=f"n = {n}, all λ = +L")
    axes[1].set_ylim(-2, 10), axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set_xlabel("L", fontsize=14), axes[1].set_ylabel("bias (nats)", fontsize=14)
    for ax in axes:
        ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# Up to $L \approx 0.7$. At 0.9 it is three nats already, and a useful flow wants $L$ near 1. Training on the truncated series makes it worse,
# since it may *choose* Jacobians
# on which the truncation claims too much. Section 12 shows it doing so.
#
# </details>
#
# ## 9 · Russian roulette: infinitely many terms in finite time
#
# Can one compute a sum of infinitely many terms $\Delta_k$ without a bias? Throw a coin (the lecture's first step): compute $\Delta_1$; then with
# probability $q$ stop, and with probability $1 - q$ go on, but divide the rest by $1 - q$. The mean is right, as
# $(1 - q) \cdot \frac{\text{rest}}{1 - q} + q \cdot 0 = \text{rest}$. Throw the coin again before each term: that is to draw the number of terms $N \ge 1$ at
# random, and to divide each term by the probability of ever getting there:
#
# $$S_N = \sum_{k=1}^{N} \frac{\Delta_k}{P(N \ge k)}, \qquad
# \mathbb E[S_N] = \sum_{k=1}^\infty \frac{\Delta_k}{P(N \ge k)}\, \underbrace{\mathbb E\big[\mathbf 1_{N \ge k}\big]}_{P(N \ge k)} = \sum_{k=1}^\infty \Delta_k .$$
#
# (The exchange of sum and expectation is fine if $\sum_k |\Delta_k| < \infty$.) Every $k$ must have a chance: $P(N \ge k) > 0$ for all $k$.
#
# The function $k \mapsto P(N \ge k)$ is called the *survival function*. For coins that stop with probability $p$, $N$ is geometric,
# $P(N = n) = p\,(1-p)^{n-1}$ and $P(N \ge k) = (1-p)^{k-1}$, counted **from 1**. Beware: `torch.distributions.Geometric` counts from 0,
# `Tensor.geometric_` from 1.
#
# ### Exercise `roulette_sum` · 10 minutes · difficulty 2 of 5 · 4 points
#
# Return $\sum_{k=1}^{n} \Delta_k / P(N \ge k)$ for a given `n` (an int that somebody else has drawn). `delta` gives the terms in both ways,
# whichever you like:
# `delta(1)`, `delta(2)`, ... as a function, `delta[0]`, `delta[1]`, ... as a list. The terms are numbers or tensors `(B,)`, to be left as they are. `survival(k)` is $P(N \ge k)$.

# %% tags=["solution"] nbgrader={"grade_id": "roulette_sum"}
def roulette_sum(delta, n, survival):
    """sum over k = 1..n of delta_k / P(N >= k), with delta(k) = delta[k - 1] = delta_k and survival(k) = P(N >= k)."""
    ### BEGIN SOLUTION
    return sum(delta(k) / survival(k) for k in range(1, n + 1))
    ### END SOLUTION
    raise NotImplementedError("exercise roulette_sum")

# %% tags=["check"] nbgrader={"grade_id": "roulette_sum_check"}
check("roulette_sum", roulette_sum)

# %% [markdown]
# **Unbiased? Test it**, by summing over all $n$ instead of drawing. The series of $\log(1 + \lambda)$ for $\lambda = 0.7$, geometric $N$ with
# $p = 0.4$. **Predict:** what is the mean of the sum *without* the division by $P(N \ge k)$?

# %% tags=["show", "compare"]
class Series(list):
    """Numbers delta_1, delta_2, ..., as a list and as a function of k = 1, 2, ..."""

    def __call__(self, k):
        return self[k - 1]


def log_series(eigenvalue, terms=400):
    """The terms of log(1 + eigenvalue)."""
    return Series((-1) ** (k + 1) * eigenvalue**k / k for k in range(1, terms + 1))


class Lengths:
    """A law of N: `exact` terms for sure, then coins that stop with probability p."""

    def __init__(self, p, exact=1):
        self.p, self.exact = p, exact

    def survival(self, k):
        return (1 - self.p) ** max(0, int(k) - self.exact)

    def share(self, n):
        """P(N = n)."""
        return self.survival(n) - self.survival(n + 1)

    def mean(self):
        return self.exact + (1 - self.p) / self.p

    def draw(self):
        return self.exact - 1 + int(torch.empty(()).geometric_(self.p))


@show
def _():
    law, terms = Lengths(0.4), log_series(0.7)
    weighted = sum(law.share(n) * roulette_sum(terms, n, law.survival) for n in range(1, 200))
    careless = sum(law.share(n) * roulette_sum(terms, n, lambda k: 1.0) for n in range(1, 200))
    short = lambda k: (law.survival(k) - law.survival(4)) / (1 - law.survival(4))  # the survival of an N that is never more than 3
    three = sum((short(n) - short(n + 1)) * roulette_sum(terms, n, short) for n in range(1, 4))
    print(f"log 1.7                          {math.log(1.7):.6f}")
    print(f"mean of the roulette             {weighted:.6f}")
    print(f"mean without the division        {careless:.6f}")
    print(f"mean if N is never more than 3   {three:.6f}")
    print(f"the series cut off after 3       {sum(terms[:3]):.6f}")

# %% [markdown]
# Without the division each term counts only as often as it is reached:
# $\sum_k \Delta_k (1-p)^{k-1} = \frac{\log(1 + 0.6 \cdot 0.7)}{0.6} = 0.584$. And an $N$
# that stops at three is just an expensive truncation.
#
# **What unbiasedness costs.** The mean is right; single values may be wild, since late terms are divided by small probabilities. With
# $|\Delta_k| \approx L^k / k$ and geometric $N$, $S_n$ grows like $\big(\frac{L}{1-p}\big)^n$ if $L > 1 - p$, so
#
# $$\mathbb E\left[S_N^2\right] = \sum_n P(N = n)\, S_n^2 \approx \sum_n (1-p)^n \Big(\frac{L}{1-p}\Big)^{2n} = \sum_n \Big(\frac{L^2}{1-p}\Big)^n,$$
#
# finite only if $L^2 < 1 - p$ (factors like $1/n^2$ aside, which matter only in the case of equality). For a Poisson $N$, whose tail falls faster
# than any $L^k$, it is *never* finite.
# The cure of Chen et al. (2019) is to compute some terms for sure: with `exact` $= m$, $P(N \ge k) = 1$ for $k \le m$, and only small terms are
# left to
# chance. (On when the variance is finite this has no influence. On how large it is, a lot.)
#
# **Predict** before you look: (left) the lengths for three laws; (middle) variance against mean cost $\mathbb E[N]$, when $p$ falls to 0.02:
# how far to the left can each curve go? (right) the running mean of 3,000 draws for $L = 0.9$ with $p = 0.1$ and with $p = 0.5$.

# %% tags=["show"]
@show
def _():
    def variance(L, law, most=160):
        """By enumeration over n up to `most`; whoever goes further has about the same sum."""
        terms = log_series(-L, most)
        sums = np.array([roulette_sum(terms, n, law.survival) for n in range(1, most + 1)])
        shares = np.array([law.share(n) for n in range(1, most)] + [law.survival(most)])
        return float(shares @ sums**2 - (shares @ sums)**2)

    figure, axes = plotting.side_by_side(3, ["lengths", "variance against cost", "running mean, L = 0.9"], size=4.4)
    n = np.arange(1, 16)
    for k, (name, law, colour) in enumerate((("p = 0.5", Lengths(0.5), "red"), ("p = 0.1", Lengths(0.1), "blue"), ("10 exact, p = 0.5", Lengths(0.5, 10), "green"))):
        axes[0].bar(n + 0.28 * (k - 1), [law.share(int(i)) for i in n], 0.28, color=plotting.PALETTE[colour], label=f"{name}: mean {law.mean():.0f}")
    axes[0].set_ylim(0, 0.85), axes[0].set_xlabel("n", fontsize=14), axes[0].set_ylabel("P(N = n)", fontsize=14), axes[0].legend(fontsize=12, frameon=False)
    for L, colour in ((0.5, "green"), (0.7, "sky"), (0.9, "blue")):
        for exact, line in ((1, "-"), (5, "--")):
            laws = [Lengths(p, exact) for p in np.geomspace(0.95 * (1 - L * L), 0.02, settings.steps(14, 4))]
            axes[1].loglog([law.mean() for law in laws], [variance(L, law) for law in laws], line, color=plotting.PALETTE[colour], linewidth=2,
                           label=f"L = {L}" if exact == 1 else None)
    axes[1].set_xticks([2, 5, 10, 20, 50], [2, 5, 10, 20, 50]), axes[1].minorticks_off(), axes[1].set_ylim(1e-7, 1e3)
    axes[1].set_xlabel("mean number of terms (dashed: 5 exact)", fontsize=13), axes[1].legend(fontsize=12, frameon=False, loc="upper right")
    axes[0].set_xticks(range(1, 16, 2))
    settings.seed(2)
    terms, draws = log_series(-0.9, 2000), settings.steps(3000, 300)
    for p, colour in ((0.1, "blue"), (0.5, "red")):
        law = Lengths(p)
        values = [roulette_sum(terms, law.draw(), law.survival) for _ in range(draws)]
        axes[2].plot(np.cumsum(values) / np.arange(1, draws + 1), color=plotting.PALETTE[colour], linewidth=2, label=f"p = {p}")
    axes[2].axhline(math.log(0.1), color="black", linestyle=":"), axes[2].set_ylim(-3, -1.5)
    axes[2].set_xlabel("draws", fontsize=14), axes[2].legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# To where $L^2 = 1 - p$: there the variance becomes infinite: for $L = 0.9$ at $p = 0.19$, five terms on average. (The
# curve with five exact terms lies below, at the same cost or less.) At the right $p = 0.1$ settles quickly; with $p = 0.5$ the mean is as unbiased,
# and comes in jumps: it drifts upwards for hundreds of draws, then one huge negative value pulls it down. After a few hundred one might believe in
# a bias.
#
# </details>
#
# ## 10 · An unbiased log-density
#
# Roulette over $k$, Hutchinson over $\mathbf v$, both together (Chen et al. 2019, theorem 1):
#
# $$\log p(\mathbf x) = \log p(\mathbf x + g(\mathbf x)) + \mathbb E_{N, \mathbf v}\left[\, \sum_{k=1}^{N} \frac{(-1)^{k+1}}{k}\, \frac{\mathbf v^\top J^k \mathbf v}{P(N \ge k)} \right].$$
#
# ### Exercise `russian_roulette_logdet` · 15 minutes · difficulty 3 of 5 · 7 points
#
# Return the sum in the brackets for given `v` and `n`, `(B,)`; arguments as before, differentiable as before.

# %% tags=["solution"] nbgrader={"grade_id": "russian_roulette_logdet"}
def russian_roulette_logdet(g, x, v, n, survival):
    """The roulette's estimate of log det(I + dg/dx) from n terms; x and v (B, D), survival(k) = P(N >= k); returns (B,)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y, power, total = g(x), v, 0
        for k in range(1, n + 1):
            power = torch.autograd.grad(y, x, power, create_graph=True)[0]
            total = total + (-1) ** (k + 1) / (k * survival(k)) * (power * v).sum(-1)
    return total
    ### END SOLUTION
    raise NotImplementedError("exercise russian_roulette_logdet")

# %% tags=["check"] nbgrader={"grade_id": "russian_roulette_logdet_check"}
check("russian_roulette_logdet", russian_roulette_logdet)

# %% [markdown]
# **Unbiased for what?** A small nonlinear branch in three dimensions, everything enumerated: all $n$ up to 30 with their probabilities, all
# $\sqrt 3\, \mathbf e_i$ for $\mathbf v$. The mean of the estimates is compared with $\log\det(I + J)$, and the mean of their *exponentials* with
# $\det(I + J)$. **Predict:** is the second unbiased too? If not, too large or too small?

# %% tags=["show", "compare"]
def small_branch(size=0.5):
    """A fixed nonlinear g on three dimensions with Lip(g) = size, and a point (1, 3), in float64."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    W = nn.Parameter(size * W / torch.linalg.matrix_norm(W, 2))
    return W, (lambda x: torch.tanh(x @ W.T)), 0.3 * torch.randn(1, 3, dtype=torch.float64, generator=generator)


@show
def _():
    _, g, x = small_branch()
    law = Lengths(0.5)
    truth = float(torch.linalg.slogdet(torch.eye(3) + jacobians(g, x)).logabsdet[0].detach())
    mean = mean_exp = 0.0
    for n in range(1, 31):
        mean += law.share(n) * float(over_noise(lambda v: russian_roulette_logdet(g, x, v, n, law.survival).detach(), x)[0])
        mean_exp += law.share(n) * float(over_noise(lambda v: russian_roulette_logdet(g, x, v, n, law.survival).detach().exp(), x)[0])
    print(f"log det(I + J)          {truth:.6f}     mean of the estimates       {mean:.6f}")
    print(f"det(I + J)              {math.exp(truth):.6f}     mean of their exponentials  {mean_exp:.6f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Too large: by Jensen's inequality $\mathbb E[e^S] \ge e^{\mathbb E[S]}$, with equality only if $S$ never varies. So the estimate is unbiased for
# $\log p(\mathbf x)$, and **not** for $p(\mathbf x)$. For training that is what we want: the loss is a mean of $\log p$. The same holds for FFJORD's
# estimate. (The lower value of a noisy one is no better model: report means over many points, and many draws.)
#
# </details>
#
# ## 11 · An unbiased gradient in little memory: the Neumann series
#
# To train, we need the *gradient* of the log-determinant in the weights $\theta$. Backpropagation through the sum works, and is unbiased as well.
# But it has to keep what
# all $n$ vjps have computed: memory grows with $n$, and one unlucky draw of $N$ fills the machine. (The slide calls it "naive backprop", and its
# formula has lost the $\frac{1}{P(N \ge k)}$; without it the gradient is also *biased*.) There is a better way. From
# $\log\det(I + J) = \operatorname{Tr} \log (I + J)$ follows
#
# $$\frac{\partial}{\partial \theta} \log\det(I + J) = \operatorname{Tr}\left( (I + J)^{-1} \frac{\partial J}{\partial \theta} \right)
# = \operatorname{Tr}\left( \sum_{k=0}^\infty (-1)^k J^k\; \frac{\partial J}{\partial \theta} \right),$$
#
# with the geometric series for the inverse, called *Neumann series* for matrices. Roulette and Hutchinson again (theorem 2 of Chen et al. 2019):
#
# $$\frac{\partial}{\partial \theta} \log\det(I + J) = \mathbb E_{N, \mathbf v}\left[ \Big( \sum_{k=0}^{N} \frac{(-1)^k}{P(N \ge k)}\, \mathbf v^\top J^k \Big) \frac{\partial J}{\partial \theta}\, \mathbf v \right] .$$
#
# Now $\theta$ is differentiated in *one* place only. The vector in brackets, $\mathbf u^\top$, is a constant: it needs no graph, and its vjps may be
# forgotten as soon as they are used. So make a **surrogate**: the number $\mathbf u^\top J\, \mathbf v$ with $\mathbf u$ detached, whose gradient is
# the estimate. Its value has no meaning.
#
# Watch the start: the sum begins at $k = 0$, with $P(N \ge 0) = 1$; $N$ still begins at 1. And the coefficient is $(-1)^k$, without the $\frac1k$.
#
# ### Exercise `neumann_gradient` · 20 minutes · difficulty 5 of 5 · 8 points
#
# Return the surrogate for each row, `(B,)`; arguments as before, $k$ from 0 to `n`. Differentiating it (in the weights of `g`, and in `x`) must give
# the estimate of the gradient, row by row, so that any weighting of the rows is right; memory must not grow with `n`.

# %% tags=["solution"] nbgrader={"grade_id": "neumann_gradient"}
def neumann_gradient(g, x, v, n, survival):
    """A surrogate (B,) whose gradient estimates that of log det(I + dg/dx); x and v (B, D), survival(k) = P(N >= k)."""
    ### BEGIN SOLUTION
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = g(x)
        power = left = v
        for k in range(1, n + 1):
            power = torch.autograd.grad(y, x, power, retain_graph=True)[0]
            left = left + (-1) ** k / survival(k) * power
        return (torch.autograd.grad(y, x, left.detach(), create_graph=True)[0] * v).sum(-1)
    ### END SOLUTION
    raise NotImplementedError("exercise neumann_gradient")

# %% tags=["check"] nbgrader={"grade_id": "neumann_gradient_check"}
check("neumann_gradient", neumann_gradient)

# %% [markdown]
# **Unbiased? Test it.** The branch from before, enumerated, with the gradient in its nine weights. Compared are your surrogate, backpropagation
#   through
# your roulette, the same without the division (the slide's formula), and the truncated series. **Predict** which of them are right.

# %% tags=["show", "compare"]
@show
def _():
    W, g, x = small_branch(0.6)
    law = Lengths(0.4)

    def gradient(value):
        return torch.autograd.grad(value.sum(), W)[0]

    def expected(estimate):
        """The mean gradient of estimate(v, n) over all v and n."""
        return sum(law.share(n) * gradient(over_noise(lambda v: estimate(v, n), x)) for n in range(1, 31))

    exact = gradient(torch.linalg.slogdet(torch.eye(3) + jacobians(g, x, differentiable=True)).logabsdet)
    found = {
        "Neumann surrogate": expected(lambda v, n: neumann_gradient(g, x, v, n, law.survival)),
        "through the roulette": expected(lambda v, n: russian_roulette_logdet(g, x, v, n, law.survival)),
        "without 1 / P(N >= k)": expected(lambda v, n: russian_roulette_logdet(g, x, v, n, lambda k: 1.0)),
        "cut off after 3": gradient(over_noise(lambda v: power_series_logdet(g, x, 3, v), x)),
    }
    for name, value in found.items():
        print(f"{name:22s} relative error of the mean gradient {float((value - exact).norm() / exact.norm()):.4f}")

# %% [markdown]
# **The memory figure.** What does automatic differentiation keep? PyTorch calls a hook for each tensor that it saves for a later backward pass; below
# those are counted, at their peak, for a branch on 64 dimensions and a batch of 64. **Predict** both curves.

# %% tags=["show"]
class Kept:
    """Counts the bytes of the tensors that autograd holds, and their peak: with Kept() as kept: ...; kept.peak."""

    def __enter__(self):
        self.now = self.peak = 0
        outer = self

        class Held:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.nbytes
                outer.now += self.size
                outer.peak = max(outer.peak, outer.now)

            def __del__(self):
                outer.now -= self.size

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@show
def _():
    settings.seed(0)
    g, x, v = Branch(64, 128), torch.randn(64, 64), torch.randn(64, 64)
    counts, law, curves = [1, 2, 4, 8, 12, 16, 20], Lengths(0.1), {"through the sum": [], "Neumann": []}
    for n in counts:
        for name, estimate in (("through the sum", russian_roulette_logdet), ("Neumann", neumann_gradient)):
            g.prepare()
            with Kept() as kept:
                estimate(g, x, v, n, law.survival).sum().backward()
            curves[name].append(kept.peak / 2**20)
    figure = plotting.Picture(figsize=(6.6, 4), layout="constrained")
    ax = figure.subplots()
    for (name, values), colour in zip(curves.items(), ("red", "blue")):
        ax.plot(counts, values, "o-", color=plotting.PALETTE[colour], linewidth=2, label=name)
    ax.set_ylim(0), ax.set_xticks(counts), ax.set_xlabel("terms n", fontsize=14)
    ax.set_ylabel("peak of saved tensors (MiB)", fontsize=13), ax.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# A line that rises, and one that does not. (The lecture's figure 3 shows the same on images for $n = 10$, in GB: there it decides whether a batch
# fits
# on the card at all.)
#
# </details>
#
# ## 12 · Trained both ways
#
# Now the whole thing. Six of your branches in a row, $\mathbf z = f_6 \circ \dots \circ f_1(\mathbf x)$ with
# $f_j(\mathbf x) = \mathbf x + g_j(\mathbf x)$ and $L \le 0.98^2 = 0.96$ each, on the eight humps. Twice from the same start on the same batches:
#
# * **truncated**: the loss uses your `power_series_logdet` with 3 terms;
# * **unbiased**: the loss uses your `neumann_gradient`, with two exact terms and coins that stop with $p = 0.07$, so that $L^2 = 0.92 < 1 - p$.
#
# In the plane the true log-determinant costs nothing ($2 \times 2$ matrices), so at any time we can compare what each flow *claims* with what is
# *true*. For the
# truncated flow the claim is its series averaged over $\mathbf v$, for the other the mean of 30 roulettes, drawn
# with bars of two standard errors. **Predict:** which claims more? Which is
# better?

# %% tags=["show"]
def residual_flow(blocks=6):
    settings.seed(0)
    return nn.ModuleList(Branch(2, 32, 0.98) for _ in range(blocks))


def through(flow, x, logdet):
    """z and the sum of logdet(g, x) over the blocks."""
    total = 0
    for g in flow:
        total, x = total + logdet(g, x), x + g(x)
    return x, total


def exact_logdet(g, x):
    return torch.linalg.slogdet(torch.eye(2) + jacobians(g, x)).logabsdet.detach()


@show
def _():
    target, base, law = toys.get("eight_gaussians"), StandardNormal(2), Lengths(0.07, 2)
    x, steps = target.sample(settings.steps(400, 50), seed=5), settings.steps(300, 10)

    def random(estimate):
        return lambda g, x: estimate(g, x, signs_like(x), law.draw(), law.survival)

    def mean_log_prob(flow, logdet):
        z, ldj = through(flow, x, logdet)
        return float((base.log_prob(z) + ldj).mean().detach())

    def mean_of_roulettes(flow):
        """And its standard error."""
        draws = [mean_log_prob(flow, random(russian_roulette_logdet)) for _ in range(settings.steps(30, 3))]
        return np.mean(draws), np.std(draws, ddof=1) / math.sqrt(len(draws))

    ways = {
        "truncated": (lambda g, x: power_series_logdet(g, x, 3, signs_like(x)),
                      lambda flow: (mean_log_prob(flow, lambda g, x: over_noise(lambda v: power_series_logdet(g, x, 3, v).detach(), x)), 0.0)),
        "unbiased": (random(neumann_gradient), mean_of_roulettes),
    }
    figure, axes = plotting.side_by_side(4, ["truncated", "unbiased", "truncated: density", "unbiased: density"], size=3.6)
    for k, (name, (estimate, claim)) in enumerate(ways.items()):
        flow, marks, claims, truths = residual_flow(), [], [], []

        def look(step):
            for g in flow:
                g.prepare()
            if step % 50 == 49 or step == steps - 1:
                marks.append(step + 1), claims.append(claim(flow)), truths.append(mean_log_prob(flow, exact_logdet))

        def loss_of(x):
            z, ldj = through(flow, x, estimate)
            return -(base.log_prob(z) + ldj).mean()

        settings.seed(1)
        train(flow.parameters(), loss_of, drawn(target, steps, 128), 0.03, every=look)
        values, errors = np.array(claims).T
        axes[k].errorbar(marks, values, 2 * errors, fmt="o--", color=plotting.PALETTE["red"], linewidth=2, capsize=4, label="claimed")
        axes[k].plot(marks, truths, "o-", color=plotting.PALETTE["blue"], linewidth=2, label="true")
        axes[k].axhline(-target.entropy, color="black", linestyle=":"), axes[k].set_xlabel("step", fontsize=14)
        density = lambda y: (lambda z, ldj: base.log_prob(z) + ldj)(*through(flow, y, exact_logdet))
        plotting.density(axes[k + 2], density, target.limits, n=settings.steps(90, 20), top=0.12)
        print(f"{name:10s} claimed {values[-1]:.3f} ± {2 * errors[-1]:.3f}, true {truths[-1]:.3f} nats; the target's own is {-target.entropy:.3f}")
    low, high = min(a.get_ylim()[0] for a in axes[:2]), max(a.get_ylim()[1] for a in axes[:2])
    axes[0].set_ylim(low, high), axes[1].set_ylim(low, high)
    axes[0].set_ylabel("mean log-likelihood (nats)", fontsize=13), axes[1].legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# The truncated flow claims much more than is true, and the more the longer it trains: in the end more than the target's own mean log-likelihood
# (dotted),
# which no density whatever can reach. Its negative eigenvalues have gone to where three terms of $\log(1 + \lambda)$ are most wrong, where a
# contraction costs less than it should. The unbiased flow has no such direction to go: its claim and the truth agree within the noise of the
# roulettes.
#
# What is *true* is the other way round: by the exact determinant the unbiased flow is better by almost half a nat. Who sees only claims would take
# the truncated one, and could not tell when it begins to fool itself.
#
# (This is the lecture's figure 2 in small. Its caption says that i-ResNets "suffer from substantial bias when using expressive networks";
# expressive means an $L$ near 1.)
#
# </details>
#
# ## 13 · Four ways to a Jacobian
#
# The lecture sorts all flows by the structure of their Jacobian (figure 1 of Chen et al. 2019). Now all four, and the continuous flow as a fifth,
# from *layers of yours*: the
# planar, the coupling and the autoregressive layer are looked up in your notebooks of lessons 01 to 03, if they lie in the same folder and are solved
# (saved, too); otherwise the reference's are taken, and the title says so. Each is drawn at one point in $D = 6$, with weights of order one: red
# above zero, blue below,
# white exactly zero. **Predict** the pictures, and for each how much the determinant costs.

# %% tags=["show"]
from flowkit.autoregressive import MAF
from flowkit.coupling import Coupling
from flowkit.nets import MADE, MLP
from flowkit.planar import Planar


def yours(lesson, exercise, name):
    """The class of that name from the solution cell of your notebook of another lesson."""
    for folder in (Path.cwd(), datasets.DATA.parent / "lessons"):
        path = folder / f"{lesson}.ipynb"
        for cell in json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []:
            if cell["metadata"].get("nbgrader", {}).get("grade_id") == exercise:
                world = dict(globals())
                exec("".join(cell["source"]), world)
                return world[name]
    raise LookupError(f"{lesson}.ipynb is not here")


def jacobian_of(f, seed):
    """d f(x)/dx, (6, 6), at a random point."""
    settings.seed(seed)
    return jacobians(f, torch.randn(1, 6))[0].detach()


def steep(layer, seed, scale=1.0):
    """The layer with weights of order one."""
    settings.seed(seed)
    for p in layer.parameters():
        p.data = scale * torch.randn_like(p)
    return lambda x: layer.forward(x)[0]


@show
def _():
    def old(lesson, exercise, reference, make):
        try:
            return "yours", jacobian_of(make(yours(lesson, exercise, reference.__name__)), 1)
        except Exception as why:  # whatever may be wrong in another notebook is no reason to stop this one
            print(f"{reference.__name__}: the reference's, since {type(why).__name__}: {why}")
            return "reference", jacobian_of(make(reference), 1)

    found = {
        "low rank: planar": old("01_change_of_variables", "planar", Planar, lambda c: steep(c(6), 3)),
        "triangular: MAF": old("03_autoregressive", "maf", MAF, lambda c: steep(c(MADE(6, 2, (16,))), 3, 0.5)),
        "sparse: coupling": old("02_coupling", "coupling", Coupling, lambda c: steep(c(MLP(3, 6, (16,))), 3, 0.5)),
    }
    settings.seed(5)
    g = bend(Branch(6, 32), torch.linalg.qr(torch.randn(6, 6))[0], settings.steps(60, 5))
    field = VectorField(6, (32,))
    found["free form: residual"] = ("yours", jacobian_of(lambda x: x + g(x), 1))
    found["free form: continuous"] = ("yours", jacobian_of(lambda x: solve(rk4_step, lambda t, y: 3 * field(t, y), x, 8), 1))
    figure, axes = plotting.side_by_side(5, [f"{name}\n({whose})" for name, (whose, _) in found.items()], size=2.9)
    for ax, (name, (_, J)) in zip(axes, found.items()):
        ax.imshow(J, cmap="RdBu_r", vmin=-2, vmax=2), ax.set_xticks([]), ax.set_yticks([])
        print(f"{name:22s} zeros in J: {int((J == 0).sum()):2d} of 36, rank of J - I: {int(torch.linalg.matrix_rank(J - torch.eye(6), atol=1e-4))}")
    return figure

# %% [markdown]
# | structure | example | log-determinant | inverse |
# |---|---|---|---|
# | $I$ + low rank | planar, radial, Sylvester (lesson 01) | exact, $O(D)$ for rank one | by a search along one line, if at all |
# | triangular | MAF, IAF, NAF (lesson 03) | exact, $O(D)$ | $D$ passes one way |
# | structured sparsity | coupling (lesson 02) | exact, $O(D)$ | one pass |
# | free form, $\lVert J_g \rVert < 1$ | residual flow | unbiased estimate, some vjps | a fixed-point iteration |
# | free form | continuous flow | unbiased estimate, a vjp for each evaluation of the field | the ODE backwards |
#
# ## 14 · What it brought on images, and what the slides say
#
# Bits per dimension (less is better), from table 1 of Chen et al. (2019), which the lecture shows:
#
# | | MNIST | CIFAR-10 | ImageNet 32 | ImageNet 64 |
# |---|---|---|---|---|
# | Real NVP | 1.06 | 3.49 | 4.28 | 3.98 |
# | Glow | 1.05 | 3.35 | 4.09 | 3.81 |
# | FFJORD | 0.99 | 3.40 | | |
# | i-ResNet | 1.05 | 3.45 | | |
# | Flow++, uniform (variational) dequantization | | 3.29 (3.09) | (3.86) | (3.69) |
# | Residual Flow | 0.970 | 3.280 | 4.010 | 3.757 |
#
# And from its table 3, what each part contributes (the last column without downsampling before the first block, so with larger inputs):
#
# | | MNIST | CIFAR-10, downsampled | CIFAR-10 |
# |---|---|---|---|
# | i-ResNet, ELU | 1.05 | 3.45 | 3.66 to 4.78 |
# | Residual Flow, ELU | 1.00 | 3.40 | 3.32 |
# | Residual Flow, LipSwish | 0.97 | 3.39 | 3.28 |
#
# **Predict, then read:** which of the two, the unbiased estimate or the activation, brings more?
#
# <details><summary>Answer</summary>
#
# The unbiased estimate: 0.05 of 0.08 bits on MNIST, and on CIFAR-10 without downsampling the biased model does not work at all (a range
# of values is given, since what it claims depends on how one estimates). LipSwish adds 0.03, 0.01 and 0.04.
#
# </details>
#
# **Said aloud, so that nobody stumbles:**
#
# * *"$\log J_f = \operatorname{Tr}(\dots)$"* (NF, residual flows) means $\log|\det J_f|$.
# * *"$\partial \log p(\mathbf z(t)) / \partial t$"* (NF, continuous flows) is the derivative **along a path**, $d/dt$. At a fixed place the
#   density changes
#   otherwise: by the Fokker–Planck or continuity equation of section 5.
# * The naive gradient of the series (NF 3, below theorem 1) has lost its $\frac{1}{P(N \ge k)}$. As it is printed, it is biased: section 11
#   measured by how much.
# * *"Second derivative should not be zero when $|\phi'(z)|$ is close to 1"* (NF 3): at the point where a smooth slope is largest it *is* zero. What
#   matters is that this is a point and not a half-line.
# * Flow++ stands with 3.08 on one slide of NF 3 (the Flow++ paper's own table) and with 3.09 on another (as the Residual Flow paper quotes it).
#   The 3.29 beside
#   it agrees with the ablation with uniform dequantization (3.292), made after 400 epochs and not converged. And i-ResNet's own paper reports 1.06
#   on MNIST, not 1.05.
# * *Unbiased* refers to $\log p$ and to its gradient. The likelihood $p$ itself, and bits of a single image, are not estimated without bias.
#
# ## What you have now
#
# | | computes | estimate of | right on average? |
# |---|---|---|---|
# | `exact_trace`, `cnf_log_prob` | trace by $D$ vjps, log-density by RK4 | | exact up to the solver |
# | `hutchinson_trace` | $\boldsymbol\epsilon^\top J \boldsymbol\epsilon$ | $\operatorname{Tr} J$ | yes |
# | `power_series_logdet` | $n$ terms | $\log\det(I + J)$ | **no**: wrong by up to $\frac{D L^{n+1}}{(n+1)(1-L)}$ |
# | `russian_roulette_logdet` | $N$ terms, divided by $P(N \ge k)$ | $\log\det(I + J)$ | yes; variance finite if $L^2 < 1 - p$ |
# | `neumann_gradient` | a surrogate | the gradient of it | yes, in memory that does not grow |
#
# and three contractive parts, `spectral_normalize`, `lip_swish`, `residual_inverse`. All flows so far live on continuous data and keep the
# dimension. Lesson 05
# gives up both.

# %% tags=["show"]
progress()
