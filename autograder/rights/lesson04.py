"""Differently written right answers of lesson 04: none of them may lose a point."""
import math

import torch
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

# =====================================================================================================================
# Continuous flows: rk4_step, exact_trace, hutchinson_trace, cnf_log_prob, probability_flow
# =====================================================================================================================

# --- rk4_step --------------------------------------------------------------------------------------------------------


def rk4_plain(f, t, y, h):
    """Plainly."""
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def rk4_increments(f, t, y, h):
    """The slopes times h, as older books have it."""
    k1 = h * f(t, y)
    k2 = h * f(t + 0.5 * h, y + 0.5 * k1)
    k3 = h * f(t + 0.5 * h, y + 0.5 * k2)
    k4 = h * f(t + h, y + k3)
    return y + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def rk4_slope(f, t, y, h):
    """The mean slope by a name, the middle of the step as well."""
    middle = t + 0.5 * h
    k1 = f(t, y)
    k2 = f(middle, y + 0.5 * h * k1)
    k3 = f(middle, y + 0.5 * h * k2)
    k4 = f(t + h, y + h * k3)
    slope = (k1 + 2 * k2 + 2 * k3 + k4) / 6
    return y + h * slope


def rk4_weights(f, t, y, h):
    """The weights as fractions, the time of the middle by a name."""
    middle = t + h / 2
    k1 = f(t, y)
    k2 = f(middle, y + k1 * h / 2)
    k3 = f(middle, y + k2 * h / 2)
    k4 = f(t + h, y + k3 * h)
    return y + h * k1 / 6 + h * k2 / 3 + h * k3 / 3 + h * k4 / 6


def rk4_half(f, t, y, h):
    """Half of h by a name."""
    half = h / 2
    a = f(t, y)
    b = f(t + half, y + half * a)
    c = f(t + half, y + half * b)
    d = f(t + h, y + h * c)
    return y + (a + d + 2 * (b + c)) * h / 6


def rk4_running_sum(f, t, y, h):
    """The sum grows as the slopes come."""
    k, total = f(t, y), 0
    total = total + k
    for share, weight in ((0.5, 2), (0.5, 2), (1.0, 1)):
        k = f(t + share * h, y + share * h * k)
        total = total + weight * k
    return y + h * total / 6


def rk4_tableau(f, t, y, h):
    """By a Butcher tableau, with a list of slopes."""
    a = [[], [1 / 2], [0, 1 / 2], [0, 0, 1]]
    b, c = [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0, 1 / 2, 1 / 2, 1]
    k = []
    for row, time in zip(a, c):
        k.append(f(t + time * h, y + h * sum(share * slope for share, slope in zip(row, k))))
    return y + h * sum(weight * slope for weight, slope in zip(b, k))


def rk4_stacked(f, t, y, h):
    """The slopes in one tensor, which meets the weights at once; h and t made tensors."""
    t, h, k = torch.as_tensor(t), torch.as_tensor(h), [torch.zeros_like(y)]
    for share in (0.0, 0.5, 0.5, 1.0):
        k.append(f(t + share * h, y + share * h * k[-1]))
    return y + h * torch.einsum("k,k...->...", torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=y.dtype) / 6, torch.stack(k[1:]))


def rk4_three_eighths(f, t, y, h):
    """Kutta's other method of order 4, with the slopes at thirds of the step; torchdiffeq takes this one."""
    k1 = f(t, y)
    k2 = f(t + h / 3, y + h * k1 / 3)
    k3 = f(t + 2 * h / 3, y + h * (k2 - k1 / 3))
    k4 = f(t + h, y + h * (k1 - k2 + k3))
    return y + h * (k1 + 3 * (k2 + k3) + k4) / 8


# --- exact_trace -----------------------------------------------------------------------------------------------------


@torch.enable_grad()
def trace_loop(f, x):
    """Plainly: one gradient for each column of f(x)."""
    x = x.clone().requires_grad_()
    y = f(x)
    trace = torch.zeros(len(x))
    for i in range(x.shape[1]):
        grad = torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0]
        trace = trace + grad[:, i]
    return trace


@torch.enable_grad()
def trace_sum(f, x):
    """A sum of a generator; x is the caller's where it has a graph already."""
    x = x if x.requires_grad else x.detach().requires_grad_(True)
    y = f(x)
    return sum(torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[-1]))


@torch.enable_grad()
def trace_stack(f, x):
    """The diagonal collected in a list, then stacked and summed."""
    x = x + torch.zeros_like(x, requires_grad=True)
    out = f(x)
    entries = []
    for i in range(out.shape[1]):
        (g,) = torch.autograd.grad(out[:, i].sum(), x, create_graph=True)
        entries.append(g[:, i])
    return torch.stack(entries, dim=-1).sum(dim=-1)


def trace_jacrev(f, x):
    """torch.func, row by row."""
    J = vmap(jacrev(f))(x)
    return J.diagonal(dim1=1, dim2=2).sum(-1)


def trace_jacfwd(f, x):
    """Forwards, and torch.trace of each row."""
    return vmap(lambda row: torch.trace(jacfwd(f)(row)))(x)


def trace_summed_jacobian(f, x):
    """The Jacobian of the sum over the batch, (D, B, D), has each row's own derivatives."""
    J = torch.autograd.functional.jacobian(lambda v: f(v).sum(0), x, create_graph=True)
    return torch.einsum("ibi->b", J)


def trace_rows(f, x):
    """A Jacobian for each row, one after the other."""
    return torch.stack([torch.autograd.functional.jacobian(f, row, create_graph=True).trace() for row in x])


@torch.enable_grad()
def trace_batched(f, x):
    """All unit vectors at once."""
    x = x * 1 if x.requires_grad else x.clone().requires_grad_()
    y = f(x)
    basis = torch.eye(x.shape[1])[:, None, :].expand(-1, *x.shape)
    rows = torch.autograd.grad(y, x, basis, create_graph=True, is_grads_batched=True)[0]
    return (rows * basis).sum((0, 2))


def trace_vjps(f, x):
    """f is asked anew for each unit vector."""
    total = 0
    for i in range(x.shape[1]):
        unit = torch.zeros_like(x)
        unit[:, i] = 1
        total = total + (vjp(f, x)[1](unit)[0] * unit).sum(1)
    return total


def trace_jvps(f, x):
    """Along each unit vector, forwards."""
    units = torch.eye(x.shape[-1])
    return sum(jvp(f, (x,), (u.expand_as(x),))[1] @ u for u in units)


# --- hutchinson_trace ------------------------------------------------------------------------------------------------


@torch.enable_grad()
def hutchinson_plain(f, x, eps):
    """Plainly: grad_outputs takes eps."""
    x = x.clone().requires_grad_()
    y = f(x)
    v = torch.autograd.grad(y, x, grad_outputs=eps, create_graph=True)[0]
    return (v * eps).sum(-1)


@torch.enable_grad()
def hutchinson_scalar(f, x, eps):
    """The gradient of the number eps . f(x)."""
    x = x if x.requires_grad else x.detach().requires_grad_(True)
    total = (f(x) * eps).sum()
    grad = torch.autograd.grad(total, x, create_graph=True)[0]
    return (grad * eps).sum(dim=1)


def hutchinson_func(f, x, eps):
    """torch.func, and an einsum."""
    _, pull = vjp(f, x)
    (v,) = pull(eps)
    return torch.einsum("bi,bi->b", v, eps)


def hutchinson_jvp(f, x, eps):
    """Forwards: eps . ((df/dx) eps)."""
    return torch.linalg.vecdot(eps, jvp(f, (x,), (eps,))[1])


def hutchinson_rows(f, x, eps):
    """Each row by itself."""
    return torch.stack([torch.dot(vjp(f, row)[1](e)[0], e) for row, e in zip(x, eps)])


def hutchinson_vmap(f, x, eps):
    """A function of one row, over all rows."""
    return vmap(lambda row, e: vjp(f, row)[1](e)[0] @ e)(x, eps)


def hutchinson_functional(f, x, eps):
    """torch.autograd.functional, and a matrix product of batches."""
    _, v = torch.autograd.functional.vjp(f, x, eps, create_graph=True)
    return torch.bmm(v[:, None, :], eps[:, :, None]).reshape(-1)


@torch.enable_grad()
def hutchinson_sum_of_columns(f, x, eps):
    """A sum over the dimensions by hand, of f and of the gradient."""
    x = x.view_as(x) if x.requires_grad else x.clone().requires_grad_()
    value = f(x)
    weighted = sum(eps[:, i] * value[:, i] for i in range(x.shape[1]))
    grad = torch.autograd.grad(weighted, x, torch.ones_like(weighted), create_graph=True)[0]
    return sum(grad[:, i] * eps[:, i] for i in range(x.shape[1]))


# --- cnf_log_prob ----------------------------------------------------------------------------------------------------


def cnf_plain(x, f, base, steps):
    """Plainly: points and integral in one state."""
    def rates(t, state):
        x = state[:, :-1]
        return torch.cat([f(t, x), trace_loop(lambda x: f(t, x), x)[:, None]], 1)

    h = 1 / steps
    state = torch.cat([x, torch.zeros(len(x), 1)], 1)
    for k in range(steps):
        state = rk4_plain(rates, torch.tensor(k * h), state, h)
    return base.log_prob(state[:, :-1]) + state[:, -1]


def cnf_by_hand(x, f, base, steps):
    """The four slopes written out, for the points and for the integral."""
    h, total = 1.0 / steps, torch.zeros(x.shape[0])
    for i in range(steps):
        t = i * h
        k1, a1 = f(t, x), trace_loop(lambda v: f(t, v), x)
        x2 = x + 0.5 * h * k1
        k2, a2 = f(t + 0.5 * h, x2), trace_loop(lambda v: f(t + 0.5 * h, v), x2)
        x3 = x + 0.5 * h * k2
        k3, a3 = f(t + 0.5 * h, x3), trace_loop(lambda v: f(t + 0.5 * h, v), x3)
        x4 = x + h * k3
        k4, a4 = f(t + h, x4), trace_loop(lambda v: f(t + h, v), x4)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
    return base.log_prob(x) + total


def cnf_running_time(x, f, base, steps):
    """The time runs along; the state is split by its width."""
    dim, dt = x.shape[-1], 1 / steps

    def both(t, s):
        z, _ = s.split([dim, 1], dim=-1)
        return torch.cat((f(t, z), trace_sum(lambda z: f(t, z), z).unsqueeze(-1)), dim=-1)

    s, t = torch.cat((x, x.new_zeros(len(x), 1)), dim=-1), 0.0
    for _ in range(steps):
        s = rk4_half(both, t, s, dt)
        t = t + dt
    z, integral = s.split([dim, 1], dim=-1)
    return base.log_prob(z) + integral.squeeze(-1)


def cnf_linspace(x, f, base, steps):
    """Times from linspace, by pairs; the minus of the formula kept, and taken away at the end."""
    state = torch.nn.functional.pad(x, (0, 1))
    times = torch.linspace(0, 1, steps + 1)

    def rates(t, state):
        z = state[:, :-1]
        return torch.hstack([f(t, z), -trace_jacrev(lambda z: f(t, z), z)[:, None]])

    for a, b in zip(times[:-1], times[1:]):
        state = rk4_increments(rates, a, state, b - a)
    z, fallen = state[:, :-1], state[:, -1]
    return base.log_prob(z) - fallen


def cnf_scaled_time(x, f, base, steps):
    """A time that counts steps: the field is divided by their number."""
    def rates(s, state):
        z = state[..., :-1]
        g = lambda z: f(torch.as_tensor(s / steps), z) / steps
        return torch.cat([g(z), trace_jvps(g, z)[..., None]], -1)

    state = torch.cat([x, torch.zeros_like(x[:, :1])], -1)
    for k in range(steps):
        state = rk4_tableau(rates, float(k), state, 1.0)
    return base.log_prob(state[..., :-1]).add(state[..., -1])


def cnf_three_eighths(x, f, base, steps):
    """flowkit's layer, whose solver is torchdiffeq's."""
    from flowkit.continuous import CNF

    z, ldj = CNF(f, solver="rk4", steps=steps)(x)
    return base.log_prob(z) + ldj


def cnf_factorised(x, f, base, steps):
    """Copes with a base that has one number a coordinate as well, as in the first lesson."""
    def rates(t, state):
        x = state[:, :-1]
        return torch.cat([f(t, x), trace_stack(lambda x: f(t, x), x)[:, None]], 1)

    state = torch.cat([x, torch.zeros(len(x), 1)], 1)
    for k in range(steps):
        state = rk4_weights(rates, k / steps, state, 1 / steps)
    p = base.log_prob(state[:, :-1])
    return (p.sum(-1) if p.dim() > 1 else p) + state[:, -1]


# --- probability_flow ------------------------------------------------------------------------------------------------


def diffusion_plain(score, t, x):
    """Plainly."""
    beta = 0.1 + 19.9 * t
    return -0.5 * beta * (x + score(t, x))


def diffusion_halved(score, t, x):
    """beta halved first, the sum by a name."""
    half = (0.1 + 19.9 * t) / 2
    both = score(t, x) + x
    return -half * both


def diffusion_parts(score, t, x):
    """Drift of the diffusion, less half of the squared noise times the score."""
    beta_min, beta_max = 0.1, 20.0
    beta = beta_min + (beta_max - beta_min) * t
    drift = -0.5 * beta * x
    return drift - 0.5 * beta * score(t, x)


def diffusion_over_two(score, t, x):
    """Divided by -2 at the end."""
    s = score(t, x)
    beta = 0.1 * (1 - t) + 20.0 * t
    return beta * (s + x) / -2


def diffusion_lerp(score, t, x):
    """beta by torch.lerp, sums by torch functions."""
    beta = torch.lerp(torch.tensor(0.1), torch.tensor(20.0), torch.as_tensor(t, dtype=x.dtype))
    return torch.mul(torch.add(x, score(t, x)), beta).mul(-0.5)


def diffusion_noise(score, t, x):
    """From f and g of the SDE."""
    g = (0.1 + 19.9 * t) ** 0.5
    return -g**2 / 2 * x - g**2 / 2 * score(t, x)


def diffusion_rows(score, t, x):
    """Each row by itself; t made a float first."""
    beta = 0.1 + 19.9 * float(t)
    return torch.cat([-(row + score(t, row)) * beta / 2 for row in x.split(1)])


def diffusion_derivative(score, t, x):
    """Half the derivative of log variance of what is kept."""
    rate = math.prod((0.5, 2 * 9.95)) * t + 0.05
    return x.neg().sub(score(t, x)) * rate


# =====================================================================================================================
# The second sitting: lip_swish, spectral_normalize, residual_inverse, power_series_logdet, roulette_sum,
# russian_roulette_logdet, neumann_gradient
# =====================================================================================================================

# --- lip_swish -------------------------------------------------------------------------------------------------------


def lip_plain(z, beta):
    """Plainly."""
    y = z * torch.sigmoid(beta * z)
    return y / 1.1


def lip_one_line(z, beta):
    """The constant as a factor in front; sigmoid as a method."""
    return (1 / 1.1) * (beta * z).sigmoid() * z


def lip_silu(z, beta):
    """By torch's Swish, whose own argument is beta z."""
    return F.silu(beta * z) / (1.1 * beta)


def lip_tanh(z, beta):
    """The sigmoid by a tanh."""
    gate = (1 + torch.tanh(0.5 * beta * z)) / 2
    return torch.div(torch.mul(z, gate), 1.1)


def lip_expit(z, beta):
    """From torch.special; z broadcast against beta by hand."""
    return torch.special.expit(z * torch.as_tensor(beta, dtype=z.dtype)).mul(z).div(1.1)


def lip_logs(z, beta):
    """The gate from its logarithm."""
    return z * F.logsigmoid(beta * z).exp() / 1.1


def lip_softmax(z, beta):
    """The gate as a softmax of two numbers."""
    pair = torch.stack([beta * z, torch.zeros_like(z)])
    return pair.softmax(0)[0] * z / 1.1


# --- spectral_normalize ----------------------------------------------------------------------------------------------


def spectral_plain(weight, c, n_iter):
    """Plainly."""
    w = weight.detach()
    v = torch.randn(w.shape[1], dtype=w.dtype)
    for _ in range(n_iter):
        v = w.T @ (w @ v)
        v = v / v.norm()
    s = (weight @ v).norm()
    return weight / torch.clamp(s / c, min=1)


def spectral_two_vectors(weight, c, n_iter):
    """u and v in turn, each made a unit vector."""
    v = F.normalize(torch.rand_like(weight[0]), dim=0)
    with torch.no_grad():
        for _ in range(n_iter):
            u = weight @ v
            u = u / u.norm()
            v = weight.T @ u
            v = v / v.norm()
    s = torch.norm(weight @ v)
    return weight / torch.clamp(s / c, min=1)


def spectral_bilinear(weight, c, n_iter):
    """F.normalize; the norm as u^T W v."""
    v = F.normalize(torch.randn(weight.shape[1], dtype=weight.dtype), dim=0)
    with torch.no_grad():
        for _ in range(n_iter):
            u = F.normalize(weight @ v, dim=0)
            v = F.normalize(weight.T @ u, dim=0)
        u = F.normalize(weight @ v, dim=0)
    s = u @ weight @ v
    return weight / (s / c).clamp(min=1)


def spectral_branch(weight, c, n_iter):
    """A random start; an `if` for the weight that is small enough."""
    v = torch.randn_like(weight[0])
    with torch.no_grad():
        for _ in range(n_iter):
            u = weight @ v
            v = weight.T @ (u / u.norm())
            v = v / v.norm()
    s = (weight @ v).norm()
    if s <= c:
        return weight
    return weight * c / s


def spectral_from_outputs(weight, c, n_iter):
    """Starts among the outputs; torch.max; einsum."""
    w = weight.detach()
    u = torch.randn(len(w), generator=torch.Generator().manual_seed(1), dtype=w.dtype)
    for _ in range(n_iter):
        u = torch.einsum("oi,pi,p->o", w, w, u)
        u = u / torch.linalg.vector_norm(u)
    s = torch.linalg.vector_norm(weight.T @ u)
    return weight / torch.max(torch.ones_like(s), s / c)


def spectral_through_the_loop(weight, c, n_iter):
    """Nothing detached: at the fixed point the vectors' own gradients do not count."""
    v = F.normalize(weight.new_empty(weight.shape[1]).normal_(), dim=0)
    for _ in range(n_iter):
        v = F.normalize(weight.t().mv(weight.mv(v)), dim=0)
    return weight * torch.minimum(torch.ones(()), c / weight.mv(v).norm())


def spectral_gram(weight, c, n_iter):
    """The Gram matrix once; a column as vector; the root of the Rayleigh quotient."""
    gram = weight.T @ weight
    v = torch.randn(weight.shape[1], 1).to(weight)
    for _ in range(n_iter):
        v = gram.detach() @ v
        v /= v.norm()
    s = (v.T @ gram @ v).squeeze().sqrt()
    return weight / max(1, s / c)


def spectral_relu(weight, c, n_iter):
    """max(1, .) as a relu; a batch of two vectors, of which the better one counts."""
    w, v = weight.detach(), torch.randn(2, weight.shape[1], dtype=weight.dtype)
    for _ in range(n_iter):
        v = F.normalize(v @ w.T @ w, dim=1)
    s = (v @ weight.T).norm(dim=1).max()
    return weight / (1 + torch.relu(s / c - 1))


# --- residual_inverse ------------------------------------------------------------------------------------------------


def inverse_plain(g, z, n_iter):
    """Plainly."""
    x = z
    for _ in range(n_iter):
        x = z - g(x)
    return x


def inverse_cloned(g, z, n_iter):
    """A copy to start from; no gradients; counts down."""
    x = z.clone()
    with torch.no_grad():
        while n_iter > 0:
            gx = g(x)
            x = z - gx
            n_iter -= 1
    return x


def inverse_by_residual(g, z, n_iter):
    """The residual is subtracted; detached at each step."""
    x = z.detach()
    for step in range(n_iter):
        residual = x + g(x) - z
        x = (x - residual).detach()
    return x


def inverse_recursive(g, z, n_iter):
    """By recursion."""
    return z if n_iter == 0 else z - g(inverse_recursive(g, z, n_iter - 1))


def inverse_of_correction(g, z, n_iter):
    """The correction d = g(x) is what is iterated."""
    d = 0 * z
    for _ in range(n_iter):
        d = g(z - d)
    return z - d


def inverse_checked(g, z, n_iter):
    """g once more at the end, to see how good x is."""
    x = z
    for _ in range(n_iter):
        x = z - g(x)
    worst = (x + g(x) - z).abs().max()
    return x if worst < math.inf else torch.full_like(x, math.nan)


# --- roulette_sum ----------------------------------------------------------------------------------------------------


def roulette_plain(delta, n, survival):
    """Plainly."""
    total = 0.0
    for k in range(1, n + 1):
        total = total + delta(k) / survival(k)
    return total


def roulette_generator(delta, n, survival):
    """By sum() over a generator."""
    return sum(delta(k) / survival(k) for k in range(1, n + 1))


def roulette_indexed(delta, n, survival):
    """Terms from the list, counted from 0."""
    total = 0.0
    for i in range(n):
        weight = 1.0 / survival(i + 1)
        total = total + delta[i] * weight
    return total


def roulette_stacked(delta, n, survival):
    """Stacked tensors and one sum."""
    terms = torch.stack([torch.as_tensor(delta(k)) for k in range(1, n + 1)])
    chance = torch.tensor([survival(k) for k in range(1, n + 1)], dtype=terms.dtype)
    return (terms.movedim(0, -1) / chance).sum(-1)


def roulette_while(delta, n, survival):
    """The first term apart, then the others one after another."""
    total, k = delta(1), 2
    while k <= n:
        total = total + delta(k) / survival(k)
        k += 1
    return total


def roulette_backwards(delta, n, survival):
    """Horner's way: from the last term to the first, with the chance to go on from one to the next."""
    total = 0
    for k in range(n, 0, -1):
        total = delta(k) + (total * survival(k) / survival(k + 1) if k < n else 0)
    return total


def roulette_dot(delta, n, survival):
    """A dot product of the sequence with the weights."""
    weights = [1 / survival(k) for k in range(1, n + 1)]
    return sum(w * d for w, d in zip(weights, delta))


# --- power_series_logdet ---------------------------------------------------------------------------------------------


def series_plain(g, x, n_terms, v):
    """Plainly."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = g(x)
    w = v
    total = torch.zeros(len(x))
    for k in range(1, n_terms + 1):
        w = torch.autograd.grad(y, x, w, create_graph=True)[0]
        total = total + (-1) ** (k + 1) / k * (w * v).sum(-1)
    return total


def series_sign_flipped(g, x, n_terms, v):
    """A sign that is turned each time; counted from 0; einsum."""
    x = x if x.requires_grad else x.clone().requires_grad_(True)
    y = g(x)
    w, sign, total = v, 1.0, 0.0
    for i in range(n_terms):
        (w,) = torch.autograd.grad(outputs=y, inputs=x, grad_outputs=w, create_graph=True)
        total = total + sign * torch.einsum("bd,bd->b", w, v) / (i + 1)
        sign = -sign
    return total


def series_branching(g, x, n_terms, v):
    """Odd terms are added, even ones subtracted; the product's sum by a matrix of one column."""
    x = x + torch.zeros_like(x).requires_grad_()
    y, w = g(x), v
    logdet = torch.zeros(x.shape[0])
    for k in range(1, n_terms + 1):
        w = torch.autograd.grad(y, x, w, create_graph=True)[0]
        term = (w * v).sum(dim=1) / k
        if k % 2 == 1:
            logdet = logdet + term
        else:
            logdet = logdet - term
    return logdet


def series_pull(g, x, n_terms, v):
    """torch.func.vjp."""
    _, pull = torch.func.vjp(g, x)
    w, terms = v, []
    for k in range(1, n_terms + 1):
        (w,) = pull(w)
        terms.append(-((-1.0) ** k) * (w * v).sum(-1) / k)
    return torch.stack(terms).sum(0)


def series_push(g, x, n_terms, v):
    """Forward mode: v^T (J^k v), with J applied to the right."""
    w, total = v, 0
    for k in range(1, n_terms + 1):
        _, w = torch.func.jvp(g, (x,), (w,))
        total = total - (-1) ** k * (v * w).sum(-1) / k
    return total


def series_of_matrices(g, x, n_terms, v):
    """The whole Jacobian of each row, and its powers."""
    J = torch.func.vmap(torch.func.jacrev(lambda row: g(row[None])[0]))(x)
    power, total = torch.eye(x.shape[1]).expand_as(J), 0
    for k in range(1, n_terms + 1):
        power = power @ J
        total = total + (v[:, None] @ power @ v[:, :, None])[:, 0, 0] * (-1) ** (k + 1) / k
    return total


def series_horner(g, x, n_terms, v):
    """Horner's way: v^T J (1 - J (1/2 - J (1/3 - ...))) v from the inside, in grad mode whatever the caller's."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        y = g(at)
        w = v / n_terms
        for k in range(n_terms - 1, 0, -1):
            w = v / k - torch.autograd.grad(y, at, w, create_graph=True)[0]
        return (torch.autograd.grad(y, at, w, create_graph=True)[0] * v).sum(1)


# --- russian_roulette_logdet -----------------------------------------------------------------------------------------


def russian_plain(g, x, v, n, survival):
    """Plainly."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = g(x)
    w = v
    total = torch.zeros(len(x))
    for k in range(1, n + 1):
        w = torch.autograd.grad(y, x, w, create_graph=True)[0]
        total = total + (-1) ** (k + 1) / k * (w * v).sum(-1) / survival(k)
    return total


def russian_coefficient(g, x, v, n, survival):
    """The coefficient of a term first."""
    x = x if x.requires_grad else x.clone().requires_grad_(True)
    y = g(x)
    w, total = v, 0.0
    for k in range(1, n + 1):
        (w,) = torch.autograd.grad(y, x, grad_outputs=w, create_graph=True)
        coefficient = (-1) ** (k + 1) / (k * survival(k))
        total = total + coefficient * torch.einsum("bd,bd->b", w, v)
    return total


def russian_branching(g, x, v, n, survival):
    """Odd terms are added, even ones subtracted; counted from 0."""
    x = x + torch.zeros_like(x).requires_grad_()
    y, w = g(x), v
    logdet = torch.zeros(x.shape[0])
    for i in range(n):
        w = torch.autograd.grad(y, x, w, create_graph=True)[0]
        term = (w * v).sum(dim=1) / (i + 1) / survival(i + 1)
        logdet = logdet + term if i % 2 == 0 else logdet - term
    return logdet


def russian_by_sum(g, x, v, n, survival):
    """All terms first, then the sum of the roulette."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y, w, delta = g(x), v, []
    for k in range(1, n + 1):
        w = torch.autograd.grad(y, x, w, create_graph=True)[0]
        delta.append((-1) ** (k + 1) * (w * v).sum(1) / k)
    return roulette_indexed(delta, n, survival)


def russian_pull(g, x, v, n, survival):
    """torch.func.vjp; the chance to go on from one term to the next is divided out step by step."""
    _, pull = torch.func.vjp(g, x)
    (w,) = pull(v)
    total, w = (w * v).sum(-1) / survival(1), w / survival(1)
    for k in range(2, n + 1):
        w = -pull(w)[0] * survival(k - 1) / survival(k)
        total = total + (w * v).sum(-1) / k
    return total


def russian_push(g, x, v, n, survival):
    """Forward mode; a dot product with a vector of coefficients."""
    w, numbers = v, []
    for _ in range(n):
        w = torch.func.jvp(g, (x,), (w,))[1]
        numbers.append(torch.linalg.vecdot(v, w))
    k = torch.arange(1, n + 1)
    chance = torch.tensor([survival(int(i)) for i in k])
    return torch.stack(numbers, 1) @ (torch.where(k % 2 == 1, 1.0, -1.0) / k / chance)


def russian_of_matrices(g, x, v, n, survival):
    """The whole Jacobian of each row, and its powers."""
    J = torch.func.vmap(torch.func.jacfwd(lambda row: g(row[None])[0]))(x)
    terms = [torch.einsum("bi,bij,bj->b", v, torch.linalg.matrix_power(J, k), v) for k in range(1, n + 1)]
    return sum((-1) ** (k + 1) / k / survival(k) * term for k, term in enumerate(terms, 1))


# --- neumann_gradient ------------------------------------------------------------------------------------------------


def neumann_plain(g, x, v, n, survival):
    """Plainly."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = g(x)
    w = v
    left = v
    for k in range(1, n + 1):
        w = torch.autograd.grad(y, x, w, retain_graph=True)[0]
        left = left + (-1) ** k / survival(k) * w
    row = torch.autograd.grad(y, x, left, create_graph=True)[0]
    return (row * v).sum(-1)


def neumann_with_zero(g, x, v, n, survival):
    """The term k = 0 within the loop; a sign that is turned each time; detached in the end; einsum."""
    x = x if x.requires_grad else x.clone().requires_grad_(True)
    y = g(x)
    w, sign, left = v, 1.0, torch.zeros_like(v)
    for k in range(n + 1):
        left = left + sign / survival(k) * w
        (w,) = torch.autograd.grad(y, x, w, retain_graph=True)
        sign = -sign
    (row,) = torch.autograd.grad(y, x, left.detach(), create_graph=True)
    return torch.einsum("bd,bd->b", row, v)


def neumann_branching(g, x, v, n, survival):
    """Odd terms are subtracted, even ones added, in no_grad mode; counted from 0."""
    x = x + torch.zeros_like(x).requires_grad_()
    y, w, left = g(x), v, v.clone()
    with torch.no_grad():
        for i in range(n):
            w = torch.autograd.grad(y, x, w, retain_graph=True)[0]
            term = w / survival(i + 1)
            if i % 2 == 0:
                left = left - term
            else:
                left = left + term
    row = torch.autograd.grad(y, x, left, create_graph=True)[0]
    return torch.linalg.vecdot(row, v)


def neumann_pull(g, x, v, n, survival):
    """torch.func.vjp; detached at each step."""
    _, pull = torch.func.vjp(g, x)
    w, left = v, v / survival(0)
    for k in range(1, n + 1):
        w = pull(w)[0].detach()
        left = left + (-1.0) ** k / survival(k) * w
    return (pull(left)[0] * v).sum(1)


def neumann_push(g, x, v, n, survival):
    """The last product the other way round: left^T (J v) by forward mode."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        y = g(at)
    w, left = v, v
    for k in range(1, n + 1):
        w = -torch.autograd.grad(y, at, w, retain_graph=True)[0]
        left = left + w / survival(k)
    _, pushed = torch.func.jvp(g, (x,), (v,))
    return (left * pushed).sum(-1)


def neumann_two_backward(g, x, v, n, survival):
    """Two evaluations of g: one for the left vector, without parameters in its graph, one for the result."""
    at = x.detach().requires_grad_()
    out, w, left = g(at), v, v.clone()
    for k in range(1, n + 1):
        w = -torch.autograd.grad(out, at, w, retain_graph=True)[0]
        left += w / survival(k)
    x = x if x.requires_grad else at
    return (torch.autograd.grad(g(x), x, left, create_graph=True)[0] * v).sum(-1)


def neumann_of_matrices(g, x, v, n, survival):
    """The whole Jacobian of each row with a graph; the sum over its detached powers."""
    J = torch.func.vmap(torch.func.jacrev(lambda row: g(row[None])[0]))(x)
    fixed, left, w = J.detach(), v, v
    for k in range(1, n + 1):
        w = -(w[:, None] @ fixed)[:, 0]
        left = left + w / survival(k)
    return torch.einsum("bi,bij,bj->b", left, J, v)


def neumann_with_value(g, x, v, n, survival):
    """The value is that of the roulette's estimate, found on the way; the gradient is the surrogate's."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = g(x)
    w, left, value = v, v, 0.0
    for k in range(1, n + 1):
        (w,) = torch.autograd.grad(y, x, w, retain_graph=True)
        left = left + (-1) ** k * w / survival(k)
        value = value - (-1) ** k / k * (w * v).sum(-1).detach() / survival(k)
    surrogate = (torch.autograd.grad(y, x, left, create_graph=True)[0] * v).sum(-1)
    return value + surrogate - surrogate.detach()


RIGHT = {
    "rk4_step": [(f,) for f in (rk4_plain, rk4_slope, rk4_increments, rk4_weights, rk4_half, rk4_running_sum, rk4_tableau, rk4_stacked,
                                rk4_three_eighths)],
    "exact_trace": [(f,) for f in (trace_loop, trace_sum, trace_stack, trace_jacrev, trace_jacfwd, trace_summed_jacobian, trace_rows,
                                   trace_batched, trace_vjps, trace_jvps)],
    "hutchinson_trace": [(f,) for f in (hutchinson_plain, hutchinson_scalar, hutchinson_func, hutchinson_jvp, hutchinson_rows,
                                        hutchinson_vmap, hutchinson_functional, hutchinson_sum_of_columns)],
    "cnf_log_prob": [(f,) for f in (cnf_plain, cnf_by_hand, cnf_running_time, cnf_linspace, cnf_scaled_time, cnf_three_eighths,
                                    cnf_factorised)],
    "probability_flow": [(f,) for f in (diffusion_plain, diffusion_parts, diffusion_halved, diffusion_over_two, diffusion_lerp,
                                        diffusion_noise, diffusion_rows, diffusion_derivative)],
    "neumann_gradient": [(f,) for f in (neumann_plain, neumann_with_zero, neumann_branching, neumann_pull, neumann_push,
                                        neumann_two_backward, neumann_of_matrices, neumann_with_value)],
    "power_series_logdet": [(f,) for f in (series_plain, series_sign_flipped, series_branching, series_pull, series_push,
                                           series_of_matrices, series_horner)],
    "russian_roulette_logdet": [(f,) for f in (russian_plain, russian_coefficient, russian_branching, russian_by_sum,
                                               russian_pull, russian_push, russian_of_matrices)],
    "residual_inverse": [(f,) for f in (inverse_plain, inverse_cloned, inverse_by_residual, inverse_recursive,
                                         inverse_of_correction, inverse_checked)],
    "roulette_sum": [(f,) for f in (roulette_plain, roulette_indexed, roulette_while, roulette_generator, roulette_stacked,
                                    roulette_backwards, roulette_dot)],
    "lip_swish": [(f,) for f in (lip_plain, lip_one_line, lip_tanh, lip_silu, lip_expit, lip_logs, lip_softmax)],
    "spectral_normalize": [(f,) for f in (spectral_plain, spectral_two_vectors, spectral_bilinear, spectral_from_outputs,
                                          spectral_branch, spectral_through_the_loop, spectral_gram, spectral_relu)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason; a person has looked at them.
CONFIRMED = {}
