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
# # The lectures, live
#
# A page for the hall: the views of `flowkit.widgets` in the order of the two lectures, "Normalizing Flows" (Nielsen) and "NF 3: Improved, Neural,
# Residual Flows" (Banerjee), each under the title of its slide. There is nothing to solve here.
#
# | key | in the notebook | in a view |
# |---|---|---|
# | **Shift+Enter** | runs the cell: the question, then the view, which takes the keys | leaves the view, on to the next question |
# | **N**, **B** | | next scene, the one before |
# | **← →**, **↑ ↓**, **1** to **9** | | move what the text beside the view names |
# | **space**, **R**, **F** | | play or pause, back to how the scene began, full screen |
# | **Escape** | | back to the notebook (from full screen: back to the page) |
#
# Before the lecture: *Run > Run All Cells* once (under a minute), so that all is loaded; then click here, and go on by Shift+Enter. Each question is on
# the screen before its view is: let the hall guess first. What to say stands below the view. To project it: *View > Simple Interface*, **Ctrl+B** hides
# the side bar, **F11** the browser's own bars.

# %% tags=["setup"]
import torch

from flowkit import Compose, Coupling, Flow, Reverse, StandardNormal, toys, widgets

# %% [markdown]
# # Normalizing Flows
# ## Flows: Invertibility
#
# **Guess:** which of four maps z(x) can be undone? Which of them still give a density of x?
#
# **Keys:** N for the next map; ← → move the probe, 1 to 5 and ↑ ↓ bend the map.

# %% tags=["show"]
widgets.bend().hall("one hump to two", "decreasing", "turning: no inverse", "flat: no inverse")

# %% [markdown]
# **Say:** rising or falling, both are fine. Where the map turns, several x claim the same z; where it is flat, z does not tell which x it was.
#
# ---
# ## Change-of-Variables in 1D
#
# **Guess:** the map is steep in the middle. Is the density of x high there, or low?
#
# **Keys:** hold → to take the probe across.

# %% tags=["show"]
widgets.bend().hall("leaning", "decreasing", {"the Jacobian forgotten": {"preset": "leaning", "forget": True}})

# %% [markdown]
# **Say:** the two shaded areas are one probability. N: a falling map, where the limits of the integral turn round. N again: who forgets |dz/dx| draws a
# curve that does not integrate to one.
#
# ---
# ## Flows: 1D Example
#
# **Guess:** z is uniform, and p(x) shall have two humps. What does the map look like?
#
# **Keys:** ← → move the probe; 2, 4 and ↑ ↓ bend the map.

# %% tags=["show"]
widgets.bend().hall("uniform base")

# %% [markdown]
# **Say:** the map is the cumulative distribution function, so p(x) is its slope: inverse transform sampling.
#
# ---
# ## Change-of-Variables
#
# **Guess:** a matrix maps the unit square. What does its determinant measure, and what does its sign say?
#
# **Keys:** N for the next matrix, space; 1, 2 and arrows move a column.

# %% tags=["show"]
widgets.matrix().hall("stretch and shear", "triangular", "rotation", "mirror", "singular")

# %% [markdown]
# **Say:** volume, and orientation. A triangle's determinant is its diagonal's product: keep this in mind for couplings. Space leads from the identity
# to the matrix; for the mirror it must pass through zero.
#
# ---
# ## The Flow Framework
#
# **Guess:** six small steps, one after the other. What becomes of their log-determinants?
#
# **Keys:** space plays, ← → step, ↑ ↓ go a layer at a time, N shows six random layers.

# %% tags=["show"]
widgets.layers(frames=60, points=600).hall({"two layers": {"flow": "a parabola and a wave"}}, {"six random layers": {"flow": "six random layers"}})

# %% [markdown]
# **Say:** maps compose, log-determinants add up (the bar on the right). To the right is inference, to the left is sampling.
#
# ---
# ## How to Build Efficient Flows?
#
# Determinant identities: a planar layer, $z = x + u\tanh(w^\top x + b)$, whose determinant is $1 + w^\top u\,(1 - \tanh^2)$.
#
# **Guess:** how strong may the push be before the plane folds?
#
# **Keys:** hold ← and watch w.u go through −1; N for the cases; 4 and arrows move the point z.

# %% tags=["show"]
widgets.planar().hall("squeeze", "stretch", "edge: w.u = −1", "fold")

# %% [markdown]
# **Say:** the bound is $w^\top u = -1$. Below it the determinant is negative between two lines, and three x share a z.
#
# ---
# ## Coupling Flows
#
# $z_1 = x_1$ and $z_2 = x_2\,e^{\alpha(x_1)} + \mu(x_1)$. First $\alpha = 0$ (NICE), then both (Real NVP).
#
# **Guess:** α and μ may be any functions, however wild. Why can the layer be undone all the same, and what is its determinant?
#
# **Keys:** space, ← →; then Shift+Enter, which shows the second.

# %% tags=["show"]
def coupling(alpha, mu):
    return Coupling(lambda x1: torch.cat([alpha(x1), mu(x1)], -1))


additive = coupling(lambda x1: 0 * x1, lambda x1: 0.5 * x1**2 - 1)
widgets.layers(additive, frames=16, points=600).hall({"additive": {}})

# %% tags=["show"]
affine = coupling(lambda x1: 0.8 * torch.sin(2 * x1), lambda x1: 0.5 * x1**2 - 1)
widgets.layers(affine, frames=16, points=600).hall({"affine": {}})

# %% [markdown]
# **Say:** $x_1$ stays, so α and μ are known on the way back as well. With α = 0 squares are sheared, and no area changes.
#
# ---
# ## Are Coupling Layers Enough?
#
# **Guess:** three couplings in a row. Can any nets, trained for ever, make the horizontal coordinate normal?
#
# **Keys:** space; then Shift+Enter, which shows the same three with permutations between them.

# %% tags=["show"]
waves = [coupling(lambda x1, k=k: 0.3 * torch.cos(k * x1), lambda x1, k=k: 0.7 * torch.sin(k * x1)) for k in (1, 2, 3)]
moons = toys.get("two_moons")
widgets.layers(Flow(StandardNormal(2), Compose(waves)), moons, 600, 24).hall({"no permutation": {"grid": "of the data"}})

# %% tags=["show"]
mixed = Compose([waves[0], Reverse(), waves[1], Reverse(), waves[2]])
widgets.layers(Flow(StandardNormal(2), mixed), moons, 600, 24).hall({"permutations between": {"grid": "of the data"}})

# %% [markdown]
# **Say:** no: nobody ever moves $x_1$; points go up and down only. With a permutation between them everything moves.
#
# ---
# ## Time to Code!
#
# **Guess:** the loss falls. Down to zero, or to what?
#
# **Keys:** space trains and pauses, → takes one batch, R starts again. When it is done, arrows step through the film.

# %% tags=["show"]
widgets.training(start=0).hall()

# %% [markdown]
# **Say:** to the entropy of the data (dashed) at best; what is left above it is KL(p‖q).
#
# ---
# ## Autoregressive Flows
#
# **Guess:** D coordinates. How many passes through the net for a density, and how many for a sample?
#
# **Keys:** → takes a pass, N changes MAF for IAF.

# %% tags=["show"]
widgets.autoregressive().hall({"MAF": {"flow": "MAF"}}, {"IAF": {"flow": "IAF"}})

# %% [markdown]
# **Say:** MAF: density in one pass, a sample in D. IAF: the other way round. A coupling layer needs one for both.
#
# ---
# ## Masked Autoregressive NNs
#
# **Guess:** two of the next masks are wrong. Which, and how does one see it?
#
# **Keys:** N for the next net, → for the next output.

# %% tags=["show"]
widgets.autoregressive().hall("MADE", "order turned round", "wrong: ≤ at the end", "wrong: columns mixed", "one hidden unit")

# %% [markdown]
# **Say:** an open path from an input to its own output, or to an earlier one, breaks the triangle of the Jacobian: it is red and dashed.
#
# ---
# ## Continuous-time Flows
#
# **Guess:** points go round in a circle, in eight of Euler's steps. Where do they end, and what does the claimed density integrate to?
#
# **Keys:** space carries the points, ↑ ↓ change the number of steps, N for the next scene.

# %% tags=["show"]
turn = {"preset": "rotation", "steps": 8}
widgets.flow_in_time().hall({"Euler, 8 steps": {**turn, "solver": "Euler"}}, {"RK4, 8 steps": {**turn, "solver": "RK4"}}, "source",
                            {"three clumps by diffusion": {"preset": "three clumps by diffusion", "solver": "RK4"}})

# %% [markdown]
# **Say:** outside. The exact flow keeps areas, Euler's steps do not; RK4 hardly leaves the circle. Then a source, whose trace lowers log p along the
# path, and a diffusion, run backwards by its score.
#
# ---
# ## Residual Flows
#
# $z = x + g(x)$ is undone by $x \leftarrow z - g(x)$.
#
# **Guess:** g has the Lipschitz constant 0.5, 0.9, 1.1. How many iterations for four digits?
#
# **Keys:** space or → iterate, ↑ ↓ change L, N for the next L.

# %% tags=["show"]
lipschitz = {f"L = {scale}": {"preset": "slow and sure", "scale": scale, "n": 0} for scale in (0.5, 0.9, 1.1)}
widgets.contraction().hall(lipschitz, "L > 1: three x")

# %% [markdown]
# **Say:** the error falls by the factor L at least (dashed). Above 1 nothing is promised: three x may share a z.
#
# ---
# ## Discrete Flows
#
# $z = (\mu + \sigma x) \bmod K$.
#
# **Guess:** classes have no volume. Which bars can such a map make equal, or make higher?
#
# **Keys:** ← → change μ, ↑ ↓ change σ, N for the next scene.

# %% tags=["show"]
widgets.modulo().hall("shift only", "shift and scale", "σ = 2, K = 6: no inverse", "σ = 0: all on one")

# %% [markdown]
# **Say:** none: bars change places, their heights stay. Where σ and K share a factor there is no inverse, and bars pile up.
#
# ---
# ## Surjective Flows
#
# **Guess:** z = |x| forgets the sign. What must log p(x) pay for it?
#
# **Keys:** N for the next layer, ← → and ↑ ↓ move the point.

# %% tags=["show"]
widgets.surjection().hall("abs", "abs, one sign likelier", "max", "sort", "slice", "slice, the best q")

# %% [markdown]
# **Say:** the log-probability of drawing the sign back: log ½, or what a net says. For max and sort it is the place, or the order. A slice draws what
# is missing: a bound, exact only with the best q.
#
# ---
# # NF 3: Improved, Neural, Residual Flows
# ## De-quantization
#
# **Guess:** uniform noise fills the bins. Is its bound on log P(x) ever exact?
#
# **Keys:** ↑ ↓ move the hump, N for the next density.

# %% tags=["show"]
widgets.dequantize().hall(*({name: {"preset": name, "towards": 0.0}} for name in ("a hump on an edge", "a broad hump", "spikes", "flat in each bin")))

# %% [markdown]
# **Say:** only where the density is flat in each bin (the last scene). It costs most where the density is steep or spiky.
#
# ---
# ## Variational Dequantization
#
# **Guess:** which noise q(u|x) closes the gap?
#
# **Keys:** hold → to lead q there.

# %% tags=["show"]
widgets.dequantize().hall(*({name: {"preset": name, "towards": 0.0}} for name in ("a hump on an edge", "spikes")))

# %% [markdown]
# **Say:** the one that has the density's own shape in the bin: the gap is KL(q‖p(u|x)). A flow can learn it.
#
# ---
# ## Coupling with Mixture of CDFs
#
# **Guess:** an affine map turns a normal into a normal. How many humps can one mixture of sigmoids make?
#
# **Keys:** 1, 2, 3 choose a sigmoid, ← → move it, ↑ ↓ weigh it; N for the next map.

# %% tags=["show"]
widgets.sigmoidal().hall("affine-like", "two humps of x", "three humps of x")

# %% [markdown]
# **Say:** one for each steep place; inflection points (diamonds) part them. The inverse is found by bisection.
#
# ---
# ## Minimise KL: maximum likelihood or variational inference
#
# p has two humps, q is one normal between them.
#
# **Guess:** where does q end if it goes down KL(p‖q)? And down KL(q‖p)?
#
# **Keys:** space goes down, arrows move q, 1 and 2 take one step down the one or the other; N for the next scene.

# %% tags=["show"]
widgets.two_kl().hall()

# %% [markdown]
# **Say:** the first covers both humps and the valley, the second seeks one hump, and which one depends on where it began. If q can be p, both end at
# zero.
#
# ---
# ## Example: Multi-modal Modeling
#
# **Guess:** x is one hump, and the map rises everywhere. Can y have two?
#
# **Keys:** 1, 2 choose a sigmoid, ← → and ↑ ↓ move it; N for an affine one.

# %% tags=["show"]
affine_like = {"preset": "affine-like", "known": "p(x)"}
widgets.sigmoidal().hall("two humps of y", {"affine: one hump": affine_like})

# %% [markdown]
# **Say:** yes: where the map is flat y piles up, where it is steep y is thin. That takes inflection points, which an affine transformer has not.
#
# ---
# ## Invertible Residual Networks (i-ResNets)
#
# **Guess:** L = 0.9 three times. Does the inverse take the same number of iterations each time?
#
# **Keys:** space or → iterate, N for the next branch.

# %% tags=["show"]
below = {name: {"preset": name, "scale": 0.9, "n": 0} for name in ("the worst case", "to and fro", "much quicker than L")}
above = {name: {"preset": name, "n": 0} for name in ("L > 1: a cycle", "L > 1: runs away")}
widgets.contraction().hall(below, above)

# %% [markdown]
# **Say:** L is the worst case. What counts is the slope near x*: the saturated tanh is there at once. Then L above 1: round in circles, or away.
#
# ---
# ## Results: Reduced Entropy Sampling
#
# **Guess:** latents are drawn with half their spread. Do the samples move towards the mode of p?
#
# **Keys:** hold ← to cool, N for the next p.

# %% tags=["show"]
widgets.temperature().hall("one hump: affine flow", "two humps", "one high, one broad")

# %% [markdown]
# **Say:** only if the flow is affine. T to 0 leads to f(0), which here lies in the valley; the density that is truly colder (dashed) goes to the mode.
#
# ---
# That was the last view. The lessons are the hall's own way through all this: `01_change_of_variables.ipynb` is next.
