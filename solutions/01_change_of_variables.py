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
# # Lesson 01 · Change of variables
#
# **If you bend the line on which a random number lives, what becomes of its density?**
#
# That is all a normalizing flow needs to know. Take noise whose density is known, bend the space it lives in, and you have made
# a new density: one that you can evaluate, sample from, and train. In this lesson you find the one formula behind it, first on a line, then in
# $D$ dimensions, and write everything that a flow consists of.
#
# | | |
# |---|---|
# | **You need** | densities, expectations, derivatives; tensors of PyTorch |
# | **You write** | `monotone_direction`, `log_prob_1d`, `inverse_cdf_sample`, `mixture_cdf`, `log_abs_det_jacobian`, `Flow`, `Compose`, `Planar`; as a bonus `Radial` and `Sylvester` |
# | **Time** | an hour and a quarter for one dimension (sections 1 to 6), as much again for $D$ dimensions; the bonus layers take most of another hour |
# | **Sources** | the lectures "Normalizing Flows" (Nielsen) and "NF 3" (Banerjee), called "the lecture" below; papers are cited where they come in |
#
# Every exercise has a check. It says what is right, what is not, and where to look. `hint("log_prob_1d")` gives a hint,
# `progress()` shows how far you are. Run All works from the start: what is not solved yet is drawn as an empty frame
# (that is what `@show` above an experiment is for). Before an experiment you are asked to predict;
# the answer folds out, or the experiment shows it.

# %% tags=["setup"]
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autograder import check, hint, progress, show
from flowkit import live, plotting, settings, toys, widgets

settings.seed(0)

# %% [markdown]
# Here is the answer as a picture. Forty points stand evenly on the vertical axis. The curve carries each of them over to the
# horizontal axis. Look where they crowd.

# %% tags=["show"]
def two_steps(x):
    """An increasing function with two steep places, and its slope."""
    def sigmoid(u):
        return 1 / (1 + np.exp(-u))

    a, b = (x + 1.5) / 0.35, (x - 1.2) / 0.5
    z = 0.4 * sigmoid(a) + 0.6 * sigmoid(b)
    return z, 0.4 / 0.35 * sigmoid(a) * sigmoid(-a) + 0.6 / 0.5 * sigmoid(b) * sigmoid(-b)


@show
def _():
    x = np.linspace(-4, 4, 800)
    z, slope = two_steps(x)
    figure = plotting.Picture(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for height in (np.arange(40) + 0.5) / 40:
        place = np.interp(height, z, x)
        top.plot([-4, place, place], [height, height, 0], color=plotting.PALETTE["sky"], linewidth=0.7)
        bottom.plot([place, place], [0, 0.06], color=plotting.PALETTE["blue"], linewidth=1)
    top.plot(x, z, color=plotting.PALETTE["black"], linewidth=2.5)
    top.set_ylabel("z, evenly spread", fontsize=14), top.set_xlim(-4, 4), top.set_ylim(0, 1)
    bottom.plot(x, slope, color=plotting.PALETTE["red"], linewidth=2.5, label="slope of the curve")
    bottom.set_xlabel("x", fontsize=14), bottom.set_ylabel("crowding", fontsize=14), bottom.set_ylim(0, None)
    bottom.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# They crowd where the curve is steep, and the crowd is exactly as dense as the slope is large. Everything below makes this exact.
#
# ## 1 · A density is probability per length
#
# A random number $x \in \mathbb R$ has the *density* $p(x) \ge 0$ if for all $a < b$
#
# $$P(a < x < b) = \int_a^b p(x)\,dx, \qquad\text{so that}\qquad \int_{-\infty}^{\infty} p(x)\,dx = 1 .$$
#
# Probabilities are areas. A density itself is no probability: it is probability *per length*, it has a unit (one over that of $x$), and it may
# well exceed 1. We nearly always use its logarithm, $\log p(x)$, with the natural logarithm; its unit is called *nat*. In code, letters name variables:
# $p(x)$ is the density of $x$ and $p(z)$ that of $z$, two different functions.
#
# **Predict before you run:** $z$ is a standard normal number, $z \sim \mathcal N(0, 1)$; its density is highest at 0, with $p(0) = 0.399$. Now $x = z / 10$. How high
# is the density of $x$ at 0?

# %% tags=["show", "compare"]
normal = torch.distributions.Normal(torch.tensor(0.0), torch.tensor(1.0))
settings.seed(0)
x = normal.sample((1_000_000,)) / 10
share = float(((-0.005 < x) & (x < 0.005)).float().mean())
print(f"share of a million x between -0.005 and 0.005: {share:.3f}")
print(f"that share per length, an estimate of p(x) at 0: {share / 0.01:.1f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Ten times as high, 3.99: the same probability sits on a tenth of the length. The estimate above counts points in a short interval.
#
# </details>
#
# ## 2 · Bending squeezes and stretches
#
# Let us name the two ends. $x$ is the **data** variable, the one whose density we want; $z = f(x)$ is the **latent** variable, whose density
# $p(z)$, the **base**, is known. The function $f$ goes from data to latent. In the example $z = f(x) = 10x$: its slope is
# $\frac{dz}{dx} = 10$, and the density of $x$ is 10 times that of $z$. A bent $f$ has another slope at each place, and looked at
# closely enough it is straight there. So we expect, for an increasing $f$,
#
# $$p(x) = p(z)\,\frac{dz}{dx}, \qquad z = f(x).$$
#
# **Predict:** below $z \sim \mathcal N(0, 1)$ and $z = f(x) = \sinh x$. Samples of $x$ are drawn by undoing $f$. One curve is $p(z)$ at $z = f(x)$, the other
# $p(z)\frac{dz}{dx}$. Which one follows the histogram at $x = 0$, where the slope is 1? And to the sides?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    samples = torch.asinh(normal.sample((50_000,)))
    x = torch.linspace(-3.5, 3.5, 400)
    plain = normal.log_prob(torch.sinh(x)).exp()
    right = plain * torch.cosh(x)
    figure = plotting.Picture(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    ax.hist(samples.numpy(), 80, density=True, color="#cccccc", label="samples of x")
    for curve, name, colour, style in ((plain, "p(z)", "red", "--"), (right, "p(z) dz/dx", "blue", "-")):
        area = float(torch.trapezoid(curve, x))
        ax.plot(x, curve, style, color=plotting.PALETTE[colour], linewidth=2.5, label=f"{name}, area {area:.2f}")
    ax.set_xlabel("x", fontsize=14), ax.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# At 0 both do. To the sides $\sinh$ is steep: there the interval of $x$ that belongs to a given interval of $z$ is short, and the same probability stands
# denser. The bare $p(z)$ misses that, and its area is not even 1.
#
# ## 3 · When can a function be undone?
#
# To sample, we must go back: from $z$ to *the* $x$ with $f(x) = z$. There must be one, and only one. For a continuous function on the line that means:
# **strictly increasing or strictly decreasing**. A turn or a flat stretch, and some $z$ has several $x$.
#
# **Predict:** which of these four can be undone? Move a horizontal line up and down in your mind: how often does it meet the curve?

# %% tags=["show"]
sketches = {
    "A": lambda x: x + 0.3 * torch.sin(2 * x),
    "B": lambda x: 2 * torch.exp(-x) / (1 + torch.exp(-x)) - 1,
    "C": lambda x: x**2 / 3 - 1,
    "D": lambda x: x + 1.5 * torch.sin(2 * x),
}


@show
def _():
    x = torch.linspace(-3, 3, 601)
    figure, axes = plotting.side_by_side(4, list(sketches), size=2.9)
    for ax, f, height in zip(axes, sketches.values(), (1.2, 0.4, 0.6, 1.4)):
        y = f(x)
        ax.plot(x, y, color=plotting.PALETTE["blue"], linewidth=2.5)
        ax.axhline(height, color=plotting.PALETTE["black"], linestyle=":")
        met = torch.nonzero((y[:-1] - height) * (y[1:] - height) < 0)[:, 0]
        ax.plot(x[met], [height] * len(met), "o", color=plotting.PALETTE["red"], markersize=9)
        ax.set_xlabel("x", fontsize=14), ax.set_xticks([]), ax.set_yticks([])
    axes[0].set_ylabel("z", fontsize=14)
    return figure

# %% [markdown]
# A (increasing) and B (decreasing) can be undone: every horizontal line meets them at most once. C turns round, D turns again and again.
# The slope need not be positive everywhere for that: $x^3$ is flat at 0, at one single point, and strictly increasing all the same.
#
# ### Exercise `monotone_direction` · 8 minutes · difficulty 1 of 5 · 4 points
#
# Judge a function by its values on a grid $x_1 < x_2 < \dots < x_N$: `+1` if they rise strictly from each grid point to the next, `-1` if they fall strictly,
# `0` otherwise. (A grid sees only what happens on it. That is enough here.) Useful: `torch.diff`.

# %% tags=["solution"] nbgrader={"grade_id": "monotone_direction"}
def monotone_direction(f, x):
    """+1, -1 or 0 for f on the sorted grid x (N,); f works elementwise on tensors. Returns an int."""
    ### BEGIN SOLUTION
    steps = torch.diff(f(x))
    if (steps > 0).all():
        return 1
    if (steps < 0).all():
        return -1
    return 0
    ### END SOLUTION
    raise NotImplementedError("exercise monotone_direction")

# %% tags=["check"] nbgrader={"grade_id": "monotone_direction_check"}
check("monotone_direction", monotone_direction)

# %% [markdown]
# The four sketches, judged by your function, on the whole line and on its right half. **Predict** the two columns first.

# %% tags=["show", "compare"]
@show
def _():
    whole, half = torch.linspace(-3, 3, 61), torch.linspace(0, 3, 31)
    for name, f in sketches.items():
        print(f"{name}: from -3 to 3 {int(monotone_direction(f, whole)):+d}, from 0 to 3 {int(monotone_direction(f, half)):+d}")

# %% [markdown]
# C can be undone if it is known that $x \ge 0$. Whether a function is invertible depends on where it is asked to be.
#
# ## 4 · The change of variables, twice
#
# Let $f$ be differentiable with a slope that is nowhere 0 (single flat points, such as that of $x^3$, change no integral), $z = f(x)$, and $x_1 < x_2$ two points with images $z_1 = f(x_1)$, $z_2 = f(x_2)$. What lies between
# $x_1$ and $x_2$ lies between $z_1$ and $z_2$ after bending: the two probabilities are one and the same.
#
# **Increasing**, $\frac{dz}{dx} > 0$. Then $z_1 < z_2$, and substituting $dz = \frac{dz}{dx} dx$ (when $z$ runs from $z_1$ to $z_2$, $x$ runs from $x_1$ to $x_2$),
#
# $$\int_{x_1}^{x_2} p(x)\,dx = \int_{z_1}^{z_2} p(z)\,dz = \int_{x_1}^{x_2} p(z)\,\frac{dz}{dx}\,dx .$$
#
# **Decreasing**, $\frac{dz}{dx} < 0$. Now $z_2 < z_1$: the interval of $z$ runs from $z_2$ to $z_1$. When $z$ runs that way, $x$ runs from $x_2$ back to $x_1$. Turning the limits round
# costs a sign:
#
# $$\int_{x_1}^{x_2} p(x)\,dx = \int_{z_2}^{z_1} p(z)\,dz = \int_{x_2}^{x_1} p(z)\,\frac{dz}{dx}\,dx = \int_{x_1}^{x_2} p(z)\left[-\frac{dz}{dx}\right]dx .$$
#
# In both cases the factor that multiplies $p(z)$ is $\left|\frac{dz}{dx}\right|$. The integrals agree for **all** $x_1 < x_2$, so the integrands do, wherever they are continuous:
#
# $$p(x) = p(z)\left|\frac{dz}{dx}\right|, \qquad \boxed{\;\log p(x) = \log p(z) + \log\left|\frac{dz}{dx}\right|, \quad z = f(x)\;}$$
#
# The second term is called the *log-determinant* already (for reasons that come in section 7), in code `ldj`.

# %% tags=["show"]
@show
def _():
    x, (x1, x2) = np.linspace(-2.2, 2.2, 300), (0.2, 1.1)
    figure, axes = plotting.side_by_side(2, ["increasing: the order is kept", "decreasing: the limits turn round"], size=4.6)
    for ax, sign in zip(axes, (1, -1)):
        def f(x, sign=sign):
            return sign * (x + 0.5 * np.tanh(2 * x)) * 0.8

        ax.plot(x, f(x), color=plotting.PALETTE["black"], linewidth=2.5)
        edge = -2.2
        for point, colour, name in ((x1, "blue", "1"), (x2, "red", "2")):
            ax.plot([point, point, edge], [edge, f(point), f(point)], ":", color=plotting.PALETTE[colour], linewidth=2)
            ax.text(point, edge - 0.32, f"x{name}", color=plotting.PALETTE[colour], fontsize=15, ha="center")
            ax.text(edge - 0.38, f(point) - 0.07, f"z{name}", color=plotting.PALETTE[colour], fontsize=15)
        ax.annotate("", (x2, edge + 0.04), (x1, edge + 0.04), arrowprops={"arrowstyle": "-|>", "linewidth": 3, "color": plotting.PALETTE["green"]})
        ax.annotate("", (edge + 0.04, f(x2)), (edge + 0.04, f(x1)), arrowprops={"arrowstyle": "-|>", "linewidth": 3, "color": plotting.PALETTE["green"]})
        ax.set_xlim(edge, 2.2), ax.set_ylim(edge, 2.2), ax.set_xticks([]), ax.set_yticks([])
    return figure

# %% [markdown]
# The green arrows go from point 1 to point 2. On the left both point upwards; on the right the one of $z$ points down, against the direction in which an integral runs.
#
# **Bend it yourself.** Below, $z(x)$ is a curve through five knots: drag them, or click on the picture and use the keys (a digit chooses a knot, up and down move it, left and right move the
# red probe, R resets). The two shaded areas are $\int p(x)\,dx$ over the probe and $\int p(z)\,dz$ over its image. **Predict before you move:** $p(z)$ has one hump, in the middle, and $p(x)$ two: which parts of the curve make them, and how would you make one? What do the
# two areas do if you tick "forget the Jacobian"? And the presets "decreasing", "turning" and "flat": for which of them will the area over all $x$ not be 1?
#
# <details><summary>Answer</summary>
#
# The two steep parts: the slope is a factor of the density, and it is small in the middle, just where $p(z)$ is highest. A straight line makes one hump. Without the slope the areas over the probe differ, and the whole is no longer 1. Only the turning map fails with the Jacobian in place: there up to three $x$ share one $z$, each of them claims its
# whole probability, and the area is larger than 1. The decreasing map is as good as an increasing one, thanks to the absolute value. The flat one has area 1, but no inverse: on the whole flat stretch $\log p(x)$ is $-\infty$.
#
# </details>

# %% tags=["show"]
@show
def _():
    return widgets.bend()

# %% [markdown]
# ### Exercise `log_prob_1d` · 15 minutes · difficulty 2 of 5 · 8 points
#
# Write the boxed formula for any `f` and any base. `x` has shape `(N,)`; `f` works elementwise on tensors and is differentiable; `base` is an object of `torch.distributions`, so
# `base.log_prob(z)` gives $\log p(z)$ for each $z$. The slope comes from automatic differentiation. Useful: `torch.autograd.grad` (each $z_i$ depends on its own $x_i$ only, so the gradient of the *sum* of all $z_i$
# holds all slopes), or `torch.func.vmap` and `torch.func.grad`.

# %% tags=["solution"] nbgrader={"grade_id": "log_prob_1d"}
def log_prob_1d(x, f, base):
    """log p(x) (N,) in nats, when z = f(x) has the density of `base`; f strictly increasing or strictly decreasing."""
    ### BEGIN SOLUTION
    x = x.clone().requires_grad_(True)
    z = f(x)
    slope = torch.autograd.grad(z.sum(), x)[0]
    return base.log_prob(z) + slope.abs().log()
    ### END SOLUTION
    raise NotImplementedError("exercise log_prob_1d")

# %% tags=["check"] nbgrader={"grade_id": "log_prob_1d_check"}
check("log_prob_1d", log_prob_1d)

# %% [markdown]
# **What can go wrong, told by areas.** A density has area 1. Take $z = f(x) = -2x$ and $z \sim \mathcal N(0, 1)$. Of the three formulas below one is yours. **Predict** the three areas.

# %% tags=["show", "compare"]
@show
def _():
    x = torch.linspace(-12, 12, 4801)
    right = log_prob_1d(x, lambda x: -2 * x, normal)
    ldj = math.log(2)
    for name, log_p in (("log p(z) + log|dz/dx|", right), ("log p(z)              ", right - ldj), ("log p(z) - log|dz/dx|", right - 2 * ldj)):
        print(f"{name}  area {float(torch.trapezoid(log_p.detach().exp(), x)):.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# 1, then 1/2 without the term, then 1/4 with its sign turned. Nothing crashes when it is wrong, and the sign cannot be seen from a loss that falls. The area tells. (Without the
# absolute value, the slope $-2$ would have no logarithm at all.)
#
# </details>
#
# ## 5 · The first flow: inverse transform sampling
#
# Let us turn the question round. Which $f$ carries data to the simplest base there is, uniform noise on $(0, 1)$, whose density is 1? The formula says
#
# $$p(x) = 1 \cdot \left|\frac{df}{dx}\right| ,$$
#
# so $f$ must be an increasing function whose slope is the density: the *cumulative distribution function* (CDF) of $x$,
#
# $$z = F(x) = P(X \le x) = \int_{-\infty}^{x} p(t)\,dt, \qquad \frac{dz}{dx} = p(x).$$
#
# That gives a way to sample *anything* on a line whose CDF is known: draw $u$ uniformly, and return the $x$ with $F(x) = u$. This is *inverse transform sampling*, older than
# any neural network, and it is a flow: a base (uniform), a map ($F$), a way to sample ($F^{-1}$) and a density ($dF/dx$).
#
# Few CDFs can be inverted by a formula. But they all increase, so *bisection* finds the solution: keep an interval $[a, b]$ with $F(a) \le u \le F(b)$, look at its middle, and keep the half that
# holds the solution. Each step gives one binary digit.
#
# **Predict:** the interval is 100 long. How many steps until $x$ is known to $10^{-6}$?
#
# <details><summary>Answer</summary>
#
# $100 / 2^n \le 10^{-6}$ means $n \ge \log_2 10^8 = 26.6$, so 27 steps. Sixty reach the limit of float64.
#
# </details>
#
# ### Exercise `inverse_cdf_sample` · 15 minutes · difficulty 2 of 5 · 8 points
#
# Solve $F(x) = u$ for many $u$ at once. `u` has shape `(N,)`, `lo` and `hi` are floats that enclose all solutions, and `cdf` works elementwise on tensors. Make `steps` halvings; each may evaluate the CDF
# once for each $u$ (a CDF may be dear). A Python loop over $u$ would pass the check, and take minutes in the experiment below. Useful: `torch.full_like`, `torch.where`.

# %% tags=["solution"] nbgrader={"grade_id": "inverse_cdf_sample"}
def inverse_cdf_sample(u, cdf, lo, hi, steps=60):
    """The x (N,) with cdf(x) = u, by bisection between lo and hi; u (N,) in (0, 1)."""
    ### BEGIN SOLUTION
    low, high = torch.full_like(u, lo), torch.full_like(u, hi)
    for _ in range(steps):
        middle = (low + high) / 2
        above = cdf(middle) > u
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2
    ### END SOLUTION
    raise NotImplementedError("exercise inverse_cdf_sample")

# %% tags=["check"] nbgrader={"grade_id": "inverse_cdf_sample_check"}
check("inverse_cdf_sample", inverse_cdf_sample)

# %% [markdown]
# Uniform numbers become waiting times: $F(x) = 1 - e^{-x}$, the exponential distribution. **Predict:** where do the nine tenths of the $u$ below 0.9 go, and where the last tenth?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    u = torch.rand(20_000, dtype=torch.float64)
    x = inverse_cdf_sample(u, lambda x: -torch.expm1(-x), 0.0, 60.0)
    t = np.linspace(0, 8, 200)
    figure, (left, right) = plotting.side_by_side(2, ["uniform numbers u", "the x with F(x) = u"], size=4)
    for ax, values, bins, curve in ((left, u, np.linspace(0, 1, 41), np.ones_like(t)), (right, x, np.linspace(0, 8, 61), np.exp(-t))):
        last = values[u > 0.9].numpy()
        ax.hist([values[u <= 0.9].numpy(), last], bins, weights=[np.full(n, 1 / len(u) / (bins[1] - bins[0])) for n in (len(u) - len(last), len(last))],
                stacked=True, color=[plotting.PALETTE["sky"], plotting.PALETTE["orange"]], label=["u below 0.9", "u above 0.9"])
        ax.plot(t if ax is right else t / 8, curve, color=plotting.PALETTE["black"], linewidth=2, label="density")
    right.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# Nine tenths lie below $-\log 0.1 = 2.3$; the last tenth makes the whole tail.
#
# ## 6 · A flow that learns
#
# A fixed CDF is a fixed density. Give it parameters, and it can be trained. Which increasing functions from the line to $(0, 1)$ are easy to write down? A sigmoid $\sigma(u) = 1/(1+e^{-u})$ is one, and a weighted average of
# sigmoids is another. With $K$ weights $\pi_k > 0$, $\sum_k \pi_k = 1$, means $m_k$ and log-scales $s_k$ ($k = 1, \dots, K$),
#
# $$z = F(x) = \sum_{k=1}^{K} \pi_k\, \sigma(u_k), \qquad u_k = (x - m_k)\, e^{-s_k},$$
#
# the CDF of a *mixture of logistic distributions* (Flow++, Ho et al. 2019, section 3.2, bends its variables with it; the opening picture is such a curve with $K = 2$). Each component adds one step of height $\pi_k$ at $m_k$, and so
# one hump of the density. Since $\sigma'(u) = \sigma(u)\,(1 - \sigma(u)) = \sigma(u)\,\sigma(-u)$,
#
# $$\frac{dz}{dx} = \sum_{k=1}^K \pi_k\, \sigma(u_k)\,\sigma(-u_k)\,e^{-s_k} .$$
#
# Its logarithm is what we need, and there is a trap. Far from all means every term is tiny. **Predict:** in float32, from which $u$ on is $\sigma(u)\,\sigma(-u)$ exactly 0, if $\sigma(-u)$ is computed as $1 - \sigma(u)$? And if it is computed as it stands?

# %% tags=["show", "compare"]
u = torch.tensor([10.0, 16.0, 18.0, 20.0, 80.0, 100.0, 106.0, 120.0])
for name, slope in (("sigmoid(u) (1 - sigmoid(u))", torch.sigmoid(u) * (1 - torch.sigmoid(u))), ("sigmoid(u) sigmoid(-u)     ", torch.sigmoid(u) * torch.sigmoid(-u))):
    print(name, [f"{v:.2e}" for v in slope.tolist()])
print("its log, by logsigmoid     ", [f"{v:.2f}" for v in (F.logsigmoid(u) + F.logsigmoid(-u)).tolist()])

# %% [markdown]
# Once it is 0 its logarithm is $-\infty$, and a training that meets one such point is lost. So stay in logarithms from the start: the logarithm of a product is a sum, and the logarithm of a sum is `torch.logsumexp` of the logarithms, $\operatorname{logsumexp}_k a_k = \log \sum_k e^{a_k}$, computed
# without ever leaving the range of numbers.
#
# ### Exercise `mixture_cdf` · 20 minutes · difficulty 3 of 5 · 8 points
#
# Write the map. `ldj` is $\log \frac{dz}{dx}$, one number for each entry of `x`, finite and right even where the slope itself would be 0. The weights come normalised. Useful: `torch.sigmoid`, `F.logsigmoid`, `torch.logsumexp`, and `x[..., None]`, which adds a last dimension
# for the components.

# %% tags=["solution"] nbgrader={"grade_id": "mixture_cdf"}
def mixture_cdf(x, weights, means, log_scales):
    """z = CDF of a mixture of logistics, and ldj = log dz/dx, entry by entry.

    x has any shape (...); weights (normalised), means and log_scales have shape (K,) or (..., K) and broadcast
    against x[..., None]. z and ldj have the shape of x.
    """
    ### BEGIN SOLUTION
    u = (x[..., None] - means) * torch.exp(-log_scales)
    z = (weights * torch.sigmoid(u)).sum(-1)
    ldj = torch.logsumexp(weights.log() + F.logsigmoid(u) + F.logsigmoid(-u) - log_scales, -1)
    return z, ldj
    ### END SOLUTION
    raise NotImplementedError("exercise mixture_cdf")

# %% tags=["check"] nbgrader={"grade_id": "mixture_cdf_check"}
check("mixture_cdf", mixture_cdf)

# %% [markdown]
# Now let it learn. The data: two humps, 35% of the points around $-2$, the others around 1.5, both normal. The principle is *maximum likelihood*: make the data as probable as possible, that is, minimise the mean of
# $-\log p(x)$. With a uniform base $\log p(z) = 0$, so the loss is just the mean of $-$`ldj`. Its expectation cannot fall below the *entropy* of the data, $-\mathbb E[\log p_{\text{data}}(x)]$, and what is missing is a
# distance between the two densities (Kullback and Leibler's; lesson 02 says more). Four components, starting all over the place.
#
# **Predict:** the data have two humps, the flow has four components. What will the two others do? And look at the map $z = F(x)$: what will it look like where there are no data?

# %% tags=["show"]
def two_humps(n):
    """n points of the data, (n,)."""
    left = torch.rand(n) < 0.35
    return torch.where(left, -2 + 0.6 * torch.randn(n), 1.5 + 0.9 * torch.randn(n))


def humps_log_density(x):
    parts = [math.log(w) + torch.distributions.Normal(m, s).log_prob(x) for w, m, s in ((0.35, -2.0, 0.6), (0.65, 1.5, 0.9))]
    return torch.logsumexp(torch.stack(parts), 0)


@show
def _():
    global humps_map
    settings.seed(1)
    logits, means, log_scales = (nn.Parameter(t) for t in (torch.zeros(4), torch.tensor([-4.0, -1.0, 1.0, 4.0]), torch.zeros(4)))
    optimiser = torch.optim.Adam([logits, means, log_scales], lr=0.03)

    def f(x):
        return mixture_cdf(x, logits.softmax(-1), means, log_scales)

    losses = []
    with live.interruptible():
        for x in live.batches(two_humps, settings.steps(1500, 30), 512, label="fitting"):
            loss = -f(x)[1].mean()
            optimiser.zero_grad(), loss.backward(), optimiser.step()
            losses.append(loss.item())
    humps_map = f
    t = torch.linspace(-6, 6, 2401)
    entropy = float(-torch.trapezoid(humps_log_density(t).exp() * humps_log_density(t), t))
    with torch.no_grad():
        z, ldj = f(t)
        gap = float(torch.trapezoid(humps_log_density(t).exp() * (humps_log_density(t) - ldj), t))
    print(f"entropy of the data {entropy:.3f} nats, loss at the start {losses[0]:.3f}, gap at the end {gap:.4f} nats")
    print("weights", [round(w, 2) for w in logits.softmax(-1).tolist()], " means", [round(m, 2) for m in means.tolist()])
    figure, (left, right) = plotting.side_by_side(2, ["the learnt map z = F(x)", "its slope is the density"], size=4.4)
    left.plot(t, z, color=plotting.PALETTE["blue"], linewidth=2.5), left.set_xlabel("x", fontsize=14)
    right.plot(t, humps_log_density(t).exp(), color="#bbbbbb", linewidth=6, label="data")
    right.plot(t, ldj.exp(), color=plotting.PALETTE["blue"], linewidth=2, label="flow")
    right.set_xlabel("x", fontsize=14), right.legend(fontsize=13, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# All four are used: a logistic hump has heavier tails than a normal one, and two of them together imitate it better than one. Where there are no data the map is flat: a long interval of $x$ is squeezed onto next to nothing.
#
# </details>
#
# And back: your bisection draws samples from what your mixture has learnt. **Predict:** how many of 20,000 will fall into the gap between the humps, from $-0.8$ to $-0.3$, compared with the data?

# %% tags=["show"]
@show
def _():
    if "humps_map" not in globals():
        raise NotImplementedError("the training above needs mixture_cdf")
    settings.seed(2)
    data = two_humps(20_000)
    with torch.no_grad():
        x = inverse_cdf_sample(torch.rand(20_000), lambda x: humps_map(x)[0], -60.0, 60.0)
    figure = plotting.Picture(figsize=(9, 3.8), layout="constrained")
    ax = figure.subplots()
    bins = np.linspace(-5, 5, 101)
    ax.hist(data.numpy(), bins, color="#cccccc", label="data")
    ax.hist(x.numpy(), bins, histtype="step", linewidth=2, color=plotting.PALETTE["blue"], label="samples of your flow")
    ax.set_xlabel("x", fontsize=14), ax.legend(fontsize=13, frameon=False)
    between = [int(((v > -0.8) & (v < -0.3)).sum()) for v in (data, x)]
    print(f"between -0.8 and -0.3: {between[0]} data points, {between[1]} samples")
    return figure

# %% [markdown]
# That was a complete flow. Everything else in this course is about doing the same with many variables at once.
#
# ## 7 · In $D$ dimensions: slopes become areas
#
# Now $\mathbf x, \mathbf z \in \mathbb R^D$ and $\mathbf z = f(\mathbf x)$. In the place of one slope there is a matrix of them, the **Jacobian**
#
# $$\mathbf J = \frac{\partial \mathbf z}{\partial \mathbf x} =
# \begin{bmatrix} \frac{\partial z_1}{\partial x_1} & \cdots & \frac{\partial z_1}{\partial x_D} \\ \vdots & & \vdots \\ \frac{\partial z_D}{\partial x_1} & \cdots & \frac{\partial z_D}{\partial x_D} \end{bmatrix}
# \in \mathbb R^{D \times D}.$$
#
# A density is now probability per area (per volume). Take $D = 2$ and a small square at $\mathbf x$ with sides $\epsilon\,\mathbf e_1$ and $\epsilon\,\mathbf e_2$ (the unit vectors, made small). Up to terms that vanish faster than $\epsilon$, a step $\epsilon\,\mathbf e_i$ of $\mathbf x$ moves $\mathbf z$ by
# $\epsilon\,\mathbf J \mathbf e_i$, the $i$-th column. So the square becomes a parallelogram spanned by the two columns of $\epsilon \mathbf J$, and the area of a parallelogram is the size of a determinant:
#
# $$\text{area of the image} = \epsilon^2\, |\det \mathbf J| .$$
#
# The probability inside stays the same. Per area, $p(\mathbf x)\,\epsilon^2 = p(\mathbf z)\,\epsilon^2\,|\det \mathbf J|$, so
#
# $$\boxed{\;\log p(\mathbf x) = \log p(\mathbf z) + \underbrace{\log\left|\det\frac{\partial\mathbf z}{\partial\mathbf x}\right|}_{\texttt{ldj}}, \quad \mathbf z = f(\mathbf x)\;}$$
#
# In $D$ dimensions the box has $D$ sides and the determinant measures its volume; in one dimension it is the slope. The absolute value is there for the same reason as before: a map that mirrors has a negative determinant.
#
# **Predict before you move:** below, a linear map $\mathbf z = \mathbf A\mathbf x$, whose Jacobian is $\mathbf A$ everywhere. Drag the tips of its two columns (or press 1 or 2, then the arrows). Where must the second tip go so that the determinant is 0? What happens to the letter
# beyond that? And which of the four entries can you change in the preset "triangular" without changing the area?
#
# <details><summary>Answer</summary>
#
# Onto the line through the first column: the square is pressed flat, all its area is lost, and with it the inverse. Beyond that line the plane is turned over: the letter is mirrored and the determinant negative, while the area is its size. In the triangular matrix the entry below the diagonal is
# free: it shears, and a sheared parallelogram keeps its area. Lessons 02 and 03 live on that.
#
# </details>

# %% tags=["show"]
@show
def _():
    return widgets.matrix()

# %% [markdown]
# **Measured, not believed.** A square grid, and its image under a map that bends. Each image cell is coloured by its area, measured from its four corners, over the area of the square it came from. The map is $z_1 = x_1 + 0.6 \sin x_2$, $z_2 = 0.9\,x_2 + 0.4\,x_1 \tanh x_2$. **Predict:** on which side do the cells come out larger than they were, and on which smaller?

# %% tags=["show"]
def bent_plane(x):
    """A map of the plane, (..., 2) -> (..., 2)."""
    x1, x2 = x[..., 0], x[..., 1]
    return torch.stack([x1 + 0.6 * torch.sin(x2), 0.9 * x2 + 0.4 * x1 * torch.tanh(x2)], -1)


def cells(n, side=4.0):
    """Corners (n + 1, n + 1, 2) of an n x n grid over a square, and the middles of its cells (n * n, 2)."""
    t = torch.linspace(-side / 2, side / 2, n + 1, dtype=torch.float64)
    corners = torch.stack(torch.meshgrid(t, t, indexing="xy"), -1)
    return corners, ((corners[1:, 1:] + corners[:-1, :-1]) / 2).reshape(-1, 2)


def areas(corners):
    """The area of each cell with these corners (n + 1, n + 1, 2), by the shoelace formula: (n * n,)."""
    a, b, c, d = corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]
    p, q = c - a, d - b
    return (0.5 * (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0])).abs().reshape(-1)


@show
def _():
    n = 14
    corners, _ = cells(n)
    image = bent_plane(corners)
    growth = (areas(image) / areas(corners)).numpy()
    figure, axes = plotting.side_by_side(2, ["the grid in data space", "its image in latent space"], size=4.6)
    from matplotlib.collections import PolyCollection

    for ax, points, values in ((axes[0], corners, np.ones(n * n)), (axes[1], image, growth)):
        quads = torch.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], 2).reshape(-1, 4, 2)
        drawn = ax.add_collection(PolyCollection(quads.numpy(), array=np.log2(values), cmap="PuOr", edgecolors="#888888", linewidths=0.5))
        drawn.set_clim(-1.6, 1.6)
        ax.set_xlim(-2.8, 2.8), ax.set_ylim(-2.8, 2.8), ax.set_aspect("equal"), ax.set_xticks([]), ax.set_yticks([])
    bar = figure.colorbar(drawn, ax=axes, ticks=[-1, 0, 1])
    bar.set_ticklabels(["half the area", "the same", "twice the area"], fontsize=12)
    return figure

# %% [markdown]
# ### Exercise `log_abs_det_jacobian` · 15 minutes · difficulty 3 of 5 · 8 points
#
# $\log|\det\mathbf J|$ for *any* function, by brute force: `f` takes `(B, D)` and returns `(B, D)`, each row of the result depends on the same row of the input only, and you may call it with a single row `(D,)` as well. Let automatic differentiation build the $B$ Jacobians. Useful: `torch.func.jacrev`,
# `torch.func.vmap`, `torch.linalg.slogdet` (which never forms the determinant itself; in many dimensions that would leave the range of numbers).

# %% tags=["solution"] nbgrader={"grade_id": "log_abs_det_jacobian"}
def log_abs_det_jacobian(f, x):
    """log|det df/dx| (B,) at each row of x (B, D)."""
    ### BEGIN SOLUTION
    J = torch.func.vmap(torch.func.jacrev(f))(x)
    return torch.linalg.slogdet(J)[1]
    ### END SOLUTION
    raise NotImplementedError("exercise log_abs_det_jacobian")

# %% tags=["check"] nbgrader={"grade_id": "log_abs_det_jacobian_check"}
check("log_abs_det_jacobian", log_abs_det_jacobian)

# %% [markdown]
# Measured areas against your determinants at the middles of the cells, for finer and finer grids. **Predict:** when the cells' side is halved, by what factor does the largest difference shrink?

# %% tags=["show", "compare"]
@show
def _():
    for n in (5, 10, 20, 40, 80):
        corners, middles = cells(n)
        measured = (areas(bent_plane(corners)) / areas(corners)).log()
        worst = float((measured - log_abs_det_jacobian(bent_plane, middles)).abs().max())
        print(f"{n * n:5d} cells of side {4 / n:.2f}: largest difference of the logarithms {worst:.5f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Towards four as the cells get small (large cells are not there yet): at the middle of a cell the linear errors on opposite sides cancel, and quadratic ones are left.
#
# </details>
#
# ## 8 · Base and map together
#
# Two things make a flow, and two things can be done with it. The base $p(\mathbf z)$ is easy to evaluate and to sample from; here it is a `torch.distributions.Normal` with $D$ means and $D$ scales, that is $D$ *independent* normal variables. Independent means that densities multiply:
#
# $$\log p(\mathbf z) = \sum_{i=1}^{D} \log p(z_i) .$$
#
# The map is a *transform*: an object with
#
# * `forward(x) -> (z, ldj)`, from data to latent: `x` and `z` have shape `(B, D)`, and `ldj`, one number for each of the `B` rows, has shape `(B,)`;
# * `inverse(z) -> x`, from latent to data.
#
# **Density:** run forward, and add the two terms of the box. **Samples:** draw from the base, and run inverse. (The lecture's prose calls the way from latent to data, the one that samples, "forward"; its coding task uses the words as we do. So does the rest of this course.)
#
# ### Exercise `flow` · 15 minutes · difficulty 2 of 5 · 10 points
#
# `base.log_prob(z)` has shape `(B, D)` and `base.sample((n,))` shape `(n, D)`.

# %% tags=["solution"] nbgrader={"grade_id": "flow"}
class Flow(nn.Module):
    """A density made of a base (D independent variables, a torch.distributions object) and a transform."""

    def __init__(self, base, transform):
        super().__init__()
        self.base = base
        self.transform = transform

    def log_prob(self, x):
        """log p(x) (B,) in nats for points x (B, D)"""
        ### BEGIN SOLUTION
        z, ldj = self.transform.forward(x)
        return self.base.log_prob(z).sum(-1) + ldj
        ### END SOLUTION
        raise NotImplementedError("exercise flow: log_prob")

    def sample(self, n):
        """n points x (n, D)"""
        ### BEGIN SOLUTION
        z = self.base.sample((n,))
        return self.transform.inverse(z)
        ### END SOLUTION
        raise NotImplementedError("exercise flow: sample")

# %% tags=["check"] nbgrader={"grade_id": "flow_check"}
check("flow", Flow)

# %% [markdown]
# A transform to try it on. `Swoosh` pushes $x_2$ along a parabola and stretches it by an amount that depends on $x_1$; both can be undone, since $x_1$ is passed on:
#
# $$z_1 = x_1, \qquad z_2 = (x_2 - a\,x_1^2)\,e^{b x_1}, \qquad \mathbf J = \begin{bmatrix} 1 & 0 \\ \ast & e^{b x_1} \end{bmatrix}, \qquad \log|\det \mathbf J| = b\,x_1 .$$
#
# **Predict:** $a = 0.6$ and $b = 0.5$, a standard normal base. On which side are the data denser: where `ldj` is large, or where it is small?

# %% tags=["show"]
class Swoosh(nn.Module):
    """z1 = x1, z2 = (x2 - a x1^2) exp(b x1)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        x1, x2 = x[:, :1], x[:, 1:]
        return torch.cat([x1, (x2 - self.a * x1**2) * torch.exp(self.b * x1)], -1), self.b * x[:, 0]

    def inverse(self, z):
        z1, z2 = z[:, :1], z[:, 1:]
        return torch.cat([z1, z2 * torch.exp(-self.b * z1) + self.a * z1**2], -1)


def plane_normal():
    return torch.distributions.Normal(torch.zeros(2), torch.ones(2))


@show
def _():
    settings.seed(0)
    flow, limits = Flow(plane_normal(), Swoosh(0.6, 0.5)), (-4, 4, -3, 5)
    figure, axes = plotting.side_by_side(2, ["samples", "density"], size=4.2)
    plotting.samples(axes[0], flow.sample(5000), limits)
    plotting.density(axes[1], flow.log_prob, limits)
    x = torch.from_numpy(plotting.grid_points((-8, 8, -30, 30), 600))
    print(f"the density integrates to {float(flow.log_prob(x).exp().sum()) * (16 / 600) * (60 / 600):.3f}")
    return figure

# %% [markdown]
# On the right, where $x_1 > 0$: there the map stretches on its way to latent space, so the data are squeezed, and dense.
#
# ## 9 · Composition
#
# One simple map makes one simple density. But a chain of invertible maps is invertible, and the chain rule says that Jacobians multiply: with $\mathbf z_0 = \mathbf x$, $\mathbf z_t = f_t(\mathbf z_{t-1})$ and $\mathbf z = \mathbf z_T$,
#
# $$\frac{\partial \mathbf z}{\partial \mathbf x} = \frac{\partial \mathbf z_T}{\partial \mathbf z_{T-1}} \cdots \frac{\partial \mathbf z_1}{\partial \mathbf z_0}
# \quad\Longrightarrow\quad \log\left|\det \frac{\partial \mathbf z}{\partial \mathbf x}\right| = \sum_{t=1}^T \log\left|\det \frac{\partial \mathbf z_t}{\partial \mathbf z_{t-1}}\right| ,$$
#
# because the determinant of a product is the product of the determinants. Each term is taken at the point $\mathbf z_{t-1}$ where its map finds the data. (The lecture counts from the other end: its $f_1$ acts first on the noise, and $\mathbf z_T = \mathbf x$. The sum is the same.)
#
# The inverse undoes the last map first, $\mathbf x = f_1^{-1}(\dots f_T^{-1}(\mathbf z))$, as shoes come off before socks.
#
# ### Exercise `compose` · 12 minutes · difficulty 2 of 5 · 10 points
#
# Make one transform of a list of them, given in the order from data to latent. Keep them in an `nn.ModuleList`: PyTorch looks for weights in it, and not in a plain list.

# %% tags=["solution"] nbgrader={"grade_id": "compose"}
class Compose(nn.Module):
    """transforms[0] first, then transforms[1], ..., from data to latent."""

    def __init__(self, transforms):
        super().__init__()
        ### BEGIN SOLUTION
        self.transforms = nn.ModuleList(transforms)
        ### END SOLUTION

    def forward(self, x):
        """x (B, D) -> z (B, D), ldj (B,) of the whole chain"""
        ### BEGIN SOLUTION
        z, total = x, torch.zeros(len(x))
        for transform in self.transforms:
            z, ldj = transform.forward(z)
            total = total + ldj
        return z, total
        ### END SOLUTION
        raise NotImplementedError("exercise compose: forward")

    def inverse(self, z):
        """z (B, D) -> x (B, D)"""
        ### BEGIN SOLUTION
        x = z
        for transform in reversed(self.transforms):
            x = transform.inverse(x)
        return x
        ### END SOLUTION
        raise NotImplementedError("exercise compose: inverse")

# %% tags=["check"] nbgrader={"grade_id": "compose_check"}
check("compose", Compose)

# %% [markdown]
# What a chain can do: a wave, a quarter turn, a wave, a quarter turn, ... A wave moves and stretches points up and down, $z_1 = x_1$, $z_2 = (x_2 + a \sin 2x_1)\,e^{b\cos x_1}$. Below, the density after one, two, four and eight
# pairs. **Predict:** how many pairs does it take until both coordinates are bent? (The quarter turn is $(x_1, x_2) \mapsto (x_2, -x_1)$. What is its `ldj`?)

# %% tags=["show"]
class Wave(nn.Module):
    """z1 = x1, z2 = (x2 + a sin 2 x1) exp(b cos x1)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        x1, x2 = x[:, 0], x[:, 1]
        ldj = self.b * torch.cos(x1)
        return torch.stack([x1, (x2 + self.a * torch.sin(2 * x1)) * ldj.exp()], -1), ldj

    def inverse(self, z):
        z1, z2 = z[:, 0], z[:, 1]
        return torch.stack([z1, z2 * torch.exp(-self.b * torch.cos(z1)) - self.a * torch.sin(2 * z1)], -1)


class QuarterTurn(nn.Module):
    def forward(self, x):
        return torch.stack([x[:, 1], -x[:, 0]], -1), torch.zeros(len(x))

    def inverse(self, z):
        return torch.stack([-z[:, 1], z[:, 0]], -1)


@show
def _():
    layers = [layer for a, b in [(0.6, 0.3), (0.7, -0.4), (-0.5, 0.3), (0.4, 0.4)] * 2 for layer in (Wave(a, b), QuarterTurn())]
    numbers, limits = (1, 2, 4, 8), (-3.5, 3.5, -3.5, 3.5)
    figure, axes = plotting.side_by_side(len(numbers), [f"{n} pair{'s' * (n > 1)}" for n in numbers], size=3.2)
    for ax, n in zip(axes, numbers):
        plotting.density(ax, Flow(plane_normal(), Compose(layers[:2 * n])).log_prob, limits)
    return figure

# %% [markdown]
# Two pairs, because a turn brings the other coordinate into place. A rotation changes no area: its determinant is 1, and its `ldj` 0.
#
# Expressiveness comes from depth, and depth costs only a sum. But every single map must pay for its determinant, and in general that is $O(D^3)$ for each point, in each step of training. So the art of flows is to find maps that are
#
# 1. **expressive**,
# 2. **invertible**,
# 3. **cheap in their determinant**.
#
# ## 10 · The first cheap determinants
#
# One way to a cheap determinant is a Jacobian that is almost the identity. Let $\mathbf u, \mathbf v \in \mathbb R^D$ be columns. The **matrix determinant lemma** says
#
# $$\det(\mathbf I + \mathbf u \mathbf v^\top) = 1 + \mathbf v^\top \mathbf u .$$
#
# *Proof.* Every vector orthogonal to $\mathbf v$ is left as it is by $\mathbf I + \mathbf u\mathbf v^\top$: that makes $D - 1$ eigenvalues 1. And $\mathbf u$ itself goes to $(1 + \mathbf v^\top \mathbf u)\,\mathbf u$, one eigenvalue $1 + \mathbf v^\top \mathbf u$. The determinant is the product of the
# eigenvalues. (If $\mathbf v^\top\mathbf u = 0$, all eigenvalues are 1; both sides are continuous.) $\square$
#
# A **planar layer** (Rezende & Mohammed 2015, section 4.1) moves every point along one vector $\mathbf u$, by an amount that depends on the point's position along one other vector $\mathbf w$. With $\mathbf w, \mathbf u \in \mathbb R^D$ and $b \in \mathbb R$,
#
# $$\mathbf z = \mathbf x + \mathbf u\, h, \qquad h = \tanh(a), \quad a = \mathbf w^\top \mathbf x + b .$$
#
# With $h' = 1 - \tanh^2(a)$, the slope of $\tanh$, the chain rule gives $\frac{\partial h}{\partial\mathbf x} = h'\,\mathbf w^\top$, and the lemma the rest:
#
# $$\frac{\partial\mathbf z}{\partial\mathbf x} = \mathbf I + \mathbf u\,(h'\,\mathbf w)^\top, \qquad \log\left|\det\frac{\partial \mathbf z}{\partial \mathbf x}\right| = \log\left|1 + h'\,\mathbf w^\top\mathbf u\right| .$$
#
# One scalar product for each point, instead of a determinant.
#
# **Is it invertible?** Along $\mathbf w$, the map is $\mathbf w^\top\mathbf x \mapsto \mathbf w^\top\mathbf x + (\mathbf w^\top\mathbf u)\tanh(\mathbf w^\top\mathbf x + b)$, with slope $1 + (\mathbf w^\top\mathbf u)\, h'$. Since $h'$ takes all values in $(0, 1]$ (1 at $a = 0$), the slope is positive everywhere exactly if
# $\mathbf w^\top\mathbf u > -1$. Training must not leave that region, so we do not use $\mathbf u$ as it is, but push it along $\mathbf w$ just so far that the constraint holds (Rezende & Mohammed, appendix A.1):
#
# $$\mathbf u' = \mathbf u + \big(m(\mathbf w^\top\mathbf u) - \mathbf w^\top\mathbf u\big)\,\frac{\mathbf w}{\lVert\mathbf w\rVert^2}, \qquad m(t) = -1 + \log(1 + e^t),
# \qquad\text{so that}\quad \mathbf w^\top\mathbf u' = m(\mathbf w^\top\mathbf u) > -1 .$$
#
# $\mathbf u'$ then takes the place of $\mathbf u$ everywhere. **Predict:** without the constraint, $\mathbf w = (1, 0)$, $\mathbf u = (-2, 0)$, $b = 0$: what does the layer do to the points $(0.5, 0)$ and $(1, 0)$?
#
# <details><summary>Answer</summary>
#
# $0.5 - 2\tanh 0.5 = -0.42$ and $1 - 2\tanh 1 = -0.52$: their order is turned round. Further out it is kept. So space is folded, and several points land on one.
#
# (And with the constraint? Then $\mathbf w^\top\mathbf z$ has one $\mathbf w^\top\mathbf x$, that gives $h$, and $\mathbf x = \mathbf z - \mathbf u\,h$: the layer is invertible, though not by a formula.)
#
# </details>
#
# The same, to be moved: left and right change $\mathbf w^\top\mathbf u$ (the slider does too), and $\mathbf w$, $\mathbf u$ and the point $\mathbf z$ can be dragged. **Predict before you move:** take $\mathbf w^\top\mathbf u$ slowly from $-0.7$ through $-1$. Where in the left picture does the
# determinant turn negative first? And how many diamonds, points $\mathbf x$ that land on the given $\mathbf z$, will there be beyond $-1$?
#
# <details><summary>Answer</summary>
#
# On the line $\mathbf w^\top\mathbf x + b = 0$, where $h' = 1$; from there the band grows to both sides. Inside the image of the band there are three, one of them where the determinant is negative; outside there is one. At three, no inverse can tell which $\mathbf x$ was meant.
#
# </details>

# %% tags=["show"]
@show
def _():
    return widgets.planar()

# %% [markdown]
# ### Exercise `planar` · 20 minutes · difficulty 3 of 5 · 10 points
#
# Write the layer with parameters $\mathbf w$, $\mathbf u$, $b$ that start at random. The constraint must hold for any values of the parameters, so it belongs in `forward`; any function $m$ whose values fill an interval from $-1$ (not reached) to some positive number, or to infinity, will do. Only `forward` is asked for: an inverse exists, but not as a formula. Useful: `F.softplus(t)`, which is $\log(1+e^t)$ and never overflows.

# %% tags=["solution"] nbgrader={"grade_id": "planar"}
class Planar(nn.Module):
    """z = x + u' tanh(w.x + b), with w.u' > -1."""

    def __init__(self, dim):
        super().__init__()
        ### BEGIN SOLUTION
        self.w = nn.Parameter(torch.randn(dim))
        self.u = nn.Parameter(torch.randn(dim))
        self.b = nn.Parameter(torch.zeros(()))
        ### END SOLUTION

    def forward(self, x):
        """x (B, dim) -> z (B, dim), ldj (B,)"""
        ### BEGIN SOLUTION
        wu = self.w @ self.u
        m = -1 + F.softplus(wu)
        u = self.u + (m - wu) * self.w / (self.w @ self.w)
        h = torch.tanh(x @ self.w + self.b)
        z = x + h[:, None] * u
        ldj = torch.log((1 + (1 - h**2) * (self.w @ u)).abs())
        return z, ldj
        ### END SOLUTION
        raise NotImplementedError("exercise planar: forward")

# %% tags=["check"] nbgrader={"grade_id": "planar_check"}
check("planar", Planar)

# %% [markdown]
# **A flow of planar layers.** Sixteen of yours, composed by your `Compose`, on the two moons (one to two minutes). There is no inverse, so we look at the density only; maximum likelihood needs no more. **Predict:** each layer can press space together or pull it apart along one plane. What will be hard for it?

# %% tags=["show"]
@show
def _():
    settings.seed(0)
    moons = toys.get("two_moons")
    flow = Flow(plane_normal(), Compose([Planar(2) for _ in range(16)]))
    flow.log_prob(moons.sample(2))  # all four exercises are needed
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    steps = settings.steps(2500, 20)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def draw(step):
        figure, (left, right) = plotting.side_by_side(2, ["the flow's density", "data"], size=3.8)
        plotting.density(left, flow.log_prob, moons.limits, n=120)
        plotting.samples(right, moons.sample(3000, seed=2), moons.limits)
        return figure

    losses = []
    with live.interruptible():
        for x in live.batches(moons.sample, steps, 256, label="planar layers"):
            loss = -flow.log_prob(x).mean()
            optimiser.zero_grad(), loss.backward(), optimiser.step(), schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        gap = float(-flow.log_prob(moons.sample(20_000, seed=1)).mean()) - moons.entropy
    print(f"loss at the start {losses[0]:.2f} nats, gap to the entropy at the end {gap:.2f} nats")
    return draw(steps)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Curved things. A planar layer is made of one ridge, so a curve must be pieced together of many; and it is a bottleneck, since all that it knows of a point is one number. Lesson 02 does better with twelve layers of another kind.
#
# </details>
#
# ### Bonus: a ball instead of a plane
#
# A **radial layer** (same paper) pulls points towards a centre $\mathbf x_0 \in \mathbb R^D$, or pushes them away. With $r = \lVert\mathbf x - \mathbf x_0\rVert$, $\alpha > 0$ and $\beta > -\alpha$,
#
# $$\mathbf z = \mathbf x + \beta\, h\,(\mathbf x - \mathbf x_0), \qquad h = \frac{1}{\alpha + r} .$$
#
# Orthogonal to the ray from the centre all $D - 1$ directions are stretched by $1 + \beta h$. Along the ray the distance goes from $r$ to $r + \beta h r$, whose slope is $1 + \beta h + \beta h' r$ with $h' = \frac{dh}{dr} = -\frac{1}{(\alpha+r)^2}$. So
#
# $$\log\left|\det\frac{\partial\mathbf z}{\partial\mathbf x}\right| = (D - 1)\log(1 + \beta h) + \log(1 + \beta h + \beta h' r) .$$
#
# The second factor is $1 + \alpha\beta / (\alpha + r)^2$, positive for all $r \ge 0$ exactly if $\beta > -\alpha$; then so is the first.
#
# ### Exercise `radial` · 20 minutes · difficulty 4 of 5 · 4 bonus points
#
# Parameters: the centre, and one free number each for $\alpha$ and $\beta$, turned into values that obey the constraints. Beware of the norm: each row has its own $r$.

# %% tags=["solution"] nbgrader={"grade_id": "radial"}
class Radial(nn.Module):
    """z = x + beta (x - x0) / (alpha + |x - x0|), with alpha > 0 and beta > -alpha."""

    def __init__(self, dim):
        super().__init__()
        ### BEGIN SOLUTION
        self.x0 = nn.Parameter(torch.randn(dim))
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.raw_beta = nn.Parameter(torch.zeros(()))
        ### END SOLUTION

    def forward(self, x):
        """x (B, dim) -> z (B, dim), ldj (B,)"""
        ### BEGIN SOLUTION
        alpha = self.log_alpha.exp()
        beta = F.softplus(self.raw_beta) - alpha
        away = x - self.x0
        r = away.norm(dim=-1)
        h = 1 / (alpha + r)
        z = x + beta * h[:, None] * away
        across = torch.log((1 + beta * h).abs())
        along = torch.log((1 + beta * h - beta * r * h**2).abs())
        return z, (x.shape[1] - 1) * across + along
        ### END SOLUTION
        raise NotImplementedError("exercise radial: forward")

# %% tags=["check"] nbgrader={"grade_id": "radial_check"}
check("radial", Radial)

# %% [markdown]
# What the two layers do to a grid, and to the density of the data, with weights chosen to show it. **Predict** the two densities: a standard normal base, and a layer that pushes points away from a plane (or a centre) on the way to latent space.

# %% tags=["show"]
def layer_with(layer, values):
    """The layer with these numbers for its parameters, in their order."""
    values, parameters = [torch.as_tensor(v) for v in values], list(layer.parameters())
    if [p.numel() for p in parameters] != [v.numel() for v in values]:
        raise NotImplementedError("this picture sets the numbers of your layers: it needs the parameters w, u, b (and x0, alpha's, beta's) in this order")
    with torch.no_grad():
        for p, v in zip(parameters, values):
            p.copy_(v.reshape(p.shape))
    return layer


def pictures_of(layers):
    """For each (name, layer): the image of a square grid, and the density of the data for a standard normal base."""
    figure = plotting.Picture(figsize=(4 * len(layers), 7.6), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    t, lines = torch.linspace(-3, 3, 120), torch.linspace(-3, 3, 19)
    across = torch.stack(torch.broadcast_tensors(t[None, :], lines[:, None]), -1)
    grid = torch.cat([across, across.flip(-1)])
    for (top, bottom), (name, layer) in zip(axes.T, layers):
        with torch.no_grad():
            z, _ = layer.forward(grid.reshape(-1, 2))
        plotting.warped_grid(top, z.reshape(grid.shape), (-4.2, 4.2) * 2)
        top.set_title(f"{name}: the grid in latent space", fontsize=13)
        plotting.density(bottom, Flow(plane_normal(), layer).log_prob, (-3, 3) * 2)
        bottom.set_title("density of the data", fontsize=13)
    return figure


@show
def _():
    settings.seed(0)
    Planar(2).forward(torch.zeros(1, 2)), Radial(2).forward(torch.zeros(1, 2))
    return pictures_of([("planar", layer_with(Planar(2), ([2.0, 1.0], [1.2, 0.6], 0.0))), ("radial", layer_with(Radial(2), ([0.5, 0.0], -0.5, 1.5)))])

# %% [markdown]
# Where a layer pulls space apart on its way to latent space, the data are dense: a ridge along the plane, a peak at the centre. (If your parameters stand in another order than the solution's, the pictures differ.)
#
# ### Bonus: several planes at once
#
# A planar layer passes all it knows of a point through one number. **Sylvester's identity** is the lemma for matrices: for $\mathbf A \in \mathbb R^{D\times m}$ and $\mathbf B \in \mathbb R^{m\times D}$,
#
# $$\det(\mathbf I_D + \mathbf A\mathbf B) = \det(\mathbf I_m + \mathbf B\mathbf A) ,$$
#
# a $D \times D$ determinant for an $m \times m$ one. The **Sylvester layer** (van den Berg et al. 2018, section 3) arranges things so that the small matrix is triangular. Let $\mathbf Q \in \mathbb R^{D\times m}$ have orthonormal columns, $\mathbf Q^\top\mathbf Q = \mathbf I_m$, let $\mathbf R, \tilde{\mathbf R} \in \mathbb R^{m\times m}$ be upper triangular
# and $\mathbf b \in \mathbb R^m$:
#
# $$\mathbf z = \mathbf x + \mathbf Q\mathbf R\,\mathbf h, \qquad \mathbf h = \tanh(\mathbf a), \quad \mathbf a = \tilde{\mathbf R}\mathbf Q^\top\mathbf x + \mathbf b .$$
#
# With $\mathbf A = \mathbf Q\mathbf R$ and $\mathbf B = \operatorname{diag}(\mathbf h')\,\tilde{\mathbf R}\mathbf Q^\top$ the identity leaves $\mathbf I_m + \operatorname{diag}(\mathbf h')\,\tilde{\mathbf R}\,\mathbf Q^\top\mathbf Q\,\mathbf R = \mathbf I_m + \operatorname{diag}(\mathbf h')\,\tilde{\mathbf R}\mathbf R$, which is triangular, so
#
# $$\log\left|\det\frac{\partial\mathbf z}{\partial\mathbf x}\right| = \sum_{i=1}^m \log\left|1 + h'_i\, r_{ii}\,\tilde r_{ii}\right| .$$
#
# It is invertible if $r_{ii}\,\tilde r_{ii} > -1 / \sup h'$ for all $i$; here $\sup h' = 1$, as for the planar layer.
#
# ### Exercise `sylvester` · 30 minutes · difficulty 5 of 5 · 6 bonus points
#
# All constraints must hold for any values of the parameters: orthonormal columns, upper triangles, $r_{ii}\tilde r_{ii} > -1$ (in any way that lets the products come close to $-1$ and also be positive). ($\mathbf Q$ may be trained, or drawn once and kept.) Beware: your points are rows, the formulas have columns. Useful: `torch.linalg.qr`, `triu`, `torch.diag`.

# %% tags=["solution"] nbgrader={"grade_id": "sylvester"}
class Sylvester(nn.Module):
    """z = x + Q R tanh(Rt Q^T x + b), with orthonormal Q (dim, m), upper triangular R, Rt (m, m) and r_ii rt_ii > -1."""

    def __init__(self, dim, m):
        super().__init__()
        ### BEGIN SOLUTION
        self.frame = nn.Parameter(torch.randn(dim, m))
        self.r = nn.Parameter(torch.randn(m, m))
        self.rt = nn.Parameter(torch.randn(m, m))
        self.b = nn.Parameter(torch.zeros(m))
        ### END SOLUTION

    def forward(self, x):
        """x (B, dim) -> z (B, dim), ldj (B,)"""
        ### BEGIN SOLUTION
        Q = torch.linalg.qr(self.frame)[0]
        below = self.rt.diagonal().exp()
        product = -1 + F.softplus(self.r.diagonal())
        R = self.r.triu(1) + torch.diag(product / below)
        Rt = self.rt.triu(1) + torch.diag(below)
        h = torch.tanh(x @ Q @ Rt.T + self.b)
        z = x + h @ R.T @ Q.T
        ldj = torch.log((1 + (1 - h**2) * R.diagonal() * Rt.diagonal()).abs()).sum(-1)
        return z, ldj
        ### END SOLUTION
        raise NotImplementedError("exercise sylvester: forward")

# %% tags=["check"] nbgrader={"grade_id": "sylvester_check"}
check("sylvester", Sylvester)

# %% [markdown]
# Four planar layers against four Sylvester layers with $m = 2$, on the two moons, three times each (about a minute): runs that differ only in the random numbers they start from. **Predict:** which kind comes closer to the entropy, and how far do runs of one kind differ?

# %% tags=["show"]
@show
def _():
    moons = toys.get("two_moons")
    stacks = {"planar": lambda: [Planar(2) for _ in range(4)], "Sylvester, m = 2": lambda: [Sylvester(2, 2) for _ in range(4)]}
    figure = plotting.Picture(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for (name, layers), colour, style in zip(stacks.items(), ("red", "blue"), (":", "-")):
        for seed in range(3):
            settings.seed(seed)
            flow = Flow(plane_normal(), Compose(layers()))
            flow.log_prob(moons.sample(2))
            optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
            losses = []
            with live.interruptible():
                for x in live.batches(moons.sample, settings.steps(600, 10), 256, label=f"{name}, {seed}"):
                    loss = -flow.log_prob(x).mean()
                    optimiser.zero_grad(), loss.backward(), optimiser.step()
                    losses.append(loss.item() - moons.entropy)
            width = min(50, len(losses))
            label = f"4 {name}: {sum(p.numel() for p in flow.parameters())} numbers" if seed == 0 else None
            ax.plot(np.convolve(losses, np.ones(width) / width, "valid"), style, color=plotting.PALETTE[colour], linewidth=2, label=label)
    ax.set_yscale("log"), ax.set_xlabel("batch", fontsize=14), ax.set_ylabel("gap to the entropy (nats)", fontsize=14)
    ax.legend(fontsize=12, frameon=False)
    return figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# With layers that start as the solution's do, neither kind won in our runs, though a Sylvester layer has more than twice as many numbers: of each kind one run came down to about 0.1 nats, while another was still near 0.5 after 600 batches. Yours may come out otherwise: how a layer starts matters as much as its kind. One run proves little; a comparison of layers needs several, and their spread.
#
# </details>
#
# ## 11 · The framework on one page
#
# | | |
# |---|---|
# | **Base** | $p(\mathbf z)$, easy to sample and to evaluate: uniform, normal |
# | **Map** | $\mathbf z = f(\mathbf x)$, invertible, a chain $f = f_T \circ \dots \circ f_1$ of simple layers |
# | **Sample** | $\mathbf z \sim p(\mathbf z)$, then $\mathbf x = f^{-1}(\mathbf z) = f_1^{-1}(\dots f_T^{-1}(\mathbf z))$ |
# | **Density** | $\log p(\mathbf x) = \log p(\mathbf z) + \sum_t \log\lvert\det \partial\mathbf z_t / \partial\mathbf z_{t-1}\rvert$ |
# | **Train** | minimise the mean of $-\log p(\mathbf x)$ over the data |
# | **A good layer** | expressive, invertible, cheap in its determinant |
#
# The lecture names four ways to a cheap determinant: *identities* (planar, radial, Sylvester: this lesson), *coupling* (lesson 02) and *autoregression* (lesson 03), whose Jacobians are triangular, and *unbiased estimates* for free-form maps (lesson 04).
#
# Where do flows stand among the models that generate data? The lecture's table:
#
# | | flow | autoregressive model | VAE | GAN | energy-based model |
# |---|---|---|---|---|---|
# | **density** | exact, fast | exact, fast | approximate, fast | not available | unnormalised |
# | **sampling** | fast | slow | fast | fast | slow and approximate |
#
# * **Flow, density**: one pass through the layers gives $\log p(\mathbf x)$ to the last digit, by the formula of this lesson. **Sampling**: one pass the other way, where the layers' inverses are cheap (not so for your planar layer).
# * **Autoregressive model** (a product of $p(x_i \mid x_1, \dots, x_{i-1})$), **density**: when $\mathbf x$ is known all $D$ conditionals are evaluated at once. **Sampling**: each entry needs the ones before it, $D$ passes one after the other.
# * **VAE** (a decoder $p(\mathbf x \mid \mathbf z)$ with random $\mathbf z$), **density**: it is an integral over all $\mathbf z$, of which only a lower bound is computed, the ELBO. **Sampling**: draw $\mathbf z$, run the decoder once.
# * **GAN** (a generator trained against a critic), **density**: its map from noise to data is not invertible, and nothing tells how probable a point is. **Sampling**: one run of the generator.
# * **Energy-based model** ($p(\mathbf x) \propto e^{-E(\mathbf x)}$), **density**: the energy is computed at once, but the constant that makes it integrate to 1 is unknown. **Sampling**: a Markov chain that must run for long, and is exact only in the limit.
#
# "Fast" is a statement about the usual members of a family: lesson 03 has flows that are fast in one direction only, and lesson 05 flows that give a bound like a VAE.

# %% tags=["show"]
progress()
