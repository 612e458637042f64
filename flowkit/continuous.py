"""Continuous-time flows: the data drift along a field into the latents, and the density follows by a trace.

    dx/dt = f(t, x),    d log p(x(t))/dt = -Tr(df/dx),    so    log p(x(t0)) = log p(x(t1)) + integral_t0^t1 Tr(df/dx) dt

with data at t0 and latents at t1. The field needs no structure at all, since solving backwards in time is the inverse.
Neural ODE and the instantaneous change of variables: Chen et al. 2018, "Neural Ordinary Differential Equations", theorem 1;
Hutchinson's estimate of the trace: Grathwohl et al. 2019, "FFJORD", section 3.1; the field of a diffusion model: Song et
al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", section 4.3.
"""
import torch
from torch import nn
from torch.func import functional_call

from .core import Transform, check_input, given
from .nets import MLP

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")


def _like(name, value, x):
    """`value`, which must have x's shape."""
    if getattr(value, "shape", None) != x.shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of x's shape {tuple(x.shape)}, got {got}")
    return value


def _value_and_trace(f, x, eps=None):
    """f(x) and the trace of df/dx, or eps^T (df/dx) eps, from one evaluation of f; detached where grad mode is off."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        # A tensor of its own, so that nothing else that f may know of x is taken for its argument.
        x = x.view_as(x) if keep and x.requires_grad else x.detach().requires_grad_()
        value = _like("the field's value", f(x), x)

        def vjp(output, v=None, batched=False):
            return torch.autograd.grad(output, x, v, create_graph=keep, retain_graph=True, is_grads_batched=batched,
                                       materialize_grads=True)[0]

        dim = x.shape[-1]
        if not value.requires_grad:
            trace = x.new_zeros(x.shape[:-1])   # f is a constant
        elif eps is not None:
            trace = (vjp(value, eps) * eps).sum(-1)
        elif keep or dim < 4 or x.numel() > 2 ** 14:
            # Rows are independent, so the gradient of a column's sum holds every row's own derivative.
            trace = sum(vjp(value[..., i].sum())[..., i] for i in range(dim))
        else:
            # All passes at once: 1.5 to 10 times faster on small batches, slower on large ones and in training.
            basis = torch.eye(dim, dtype=x.dtype, device=x.device).expand(*x.shape, dim).movedim(-1, 0)
            # Expanded, since of a value that does not depend on x the zeros come for one pass only.
            trace = vjp(value, basis, batched=True).expand_as(basis).diagonal(dim1=0, dim2=-1).sum(-1)
    return (value, trace) if keep else (value.detach(), trace.detach())


def exact_trace(f, x):
    """Tr(df/dx), shape (...,), of f: (..., D) -> (..., D) whose rows are independent, by D vector-Jacobian products.

    Differentiable in x and in what f holds while grad mode is on, detached where it is off. Chen et al. 2018, section 4.
    """
    check_input(x)
    return _value_and_trace(f, x)[1]


def hutchinson_trace(f, x, eps):
    """eps^T (df/dx) eps, shape (...,), by one vector-Jacobian product: an unbiased estimate of Tr(df/dx).

    f: (..., D) -> (..., D) with independent rows; eps like x, noise of mean 0 and covariance I, for instance random signs.
    Differentiable as `exact_trace` is. Hutchinson 1990; Grathwohl et al. 2019, section 3.1.
    """
    check_input(x)
    return _value_and_trace(f, x, _like("eps", eps, x))[1]


class _Dynamics:
    """What the solver sees, d(x, ldj)/dt or dx/dt alone, and what counts and stops it (torchdiffeq's callbacks)."""

    def __init__(self, cnf, field, dim, context, eps):
        self.cnf, self.field, self.dim, self.context, self.eps = cnf, field, dim, context, eps
        self.nfe = self.steps = self.backward_steps = 0

    def __call__(self, t, state):
        self.nfe += 1
        x, field = state[..., :self.dim], lambda x: self.field(t, x, *given(self.context))
        if state.shape[-1] == self.dim:
            return _like("the field's value", field(x), x)
        value, trace = _value_and_trace(field, x, self.eps)
        return torch.cat([value, trace[..., None]], -1)

    @torch.no_grad()
    def norm(self, error):
        """The worst row's error, so that a hard row is not lost in a large batch nor the ldj among many coordinates."""
        x, ldj = error[..., :self.dim], error[..., self.dim:]
        return torch.cat([x.square().mean(-1, keepdim=True).sqrt(), ldj.abs()], -1).max()

    def callback_step(self, t, state, dt):
        self.steps += 1
        self._watch(t, state, dt, self.steps, "")

    def callback_step_adjoint(self, t, state, dt):
        self.backward_steps += 1
        self._watch(t, torch.cat([s.flatten() for s in state]), dt, self.backward_steps, "the adjoint of ")

    def _watch(self, t, state, dt, steps, what):
        """Raise before torchdiffeq's own assertions do, in words that say what to change."""
        cnf, t, dt = self.cnf, float(t), float(dt)
        hint = f"is the field too steep, or are rtol and atol too small for {state.dtype}?"
        if not torch.isfinite(state).all():
            why = f"its state has {int((~torch.isfinite(state)).sum())} non-finite values out of {state.numel()}"
        elif dt <= 1e-14 * abs(t):
            why = f"its step fell to {dt:.1g}; {hint}"
        elif cnf.solver in ADAPTIVE and steps > cnf.max_steps:
            why = f"it needs more than max_steps = {cnf.max_steps} steps; {hint}"
        else:
            return
        name = getattr(cnf.field, "__name__", type(cnf.field).__name__)
        raise FloatingPointError(f"{type(cnf).__name__}: {cnf.solver} stopped at t = {t:.4g} in solving {what}{name}: {why}")


class CNF(Transform):
    """Continuous normalising flow: z = x(t1), where dx/dt = field(t, x) and x(t0) is the data.

    ldj = integral of Tr(d field/dx) from t0 to t1, in nats; x (..., D). `inverse` solves from t1 to t0 and integrates no trace.
    `field`: (t, x) -> (..., D) with t a scalar tensor, called field(t, x, context) if there is a context; rows must not mix.
    `trace`: "exact" costs D vector-Jacobian products an evaluation and "hutchinson" one, but then the layer is not `exact`:
    its ldj has the right mean (to the solver's tolerance), so a flow's log_prob is an unbiased estimate of log p(x). The
    `noise`, "rademacher" (random signs) or "gaussian", is drawn once for each solve and stays fixed within it.
    `solver`: one of ADAPTIVE, to rtol and atol in the worst row, or of FIXED, with `steps` equal steps. A trained flow may
    have learnt its solver's error: set `solver`, `steps` or `trace` to better ones and evaluate again.
    `adjoint`: gradients from a second solve backwards in time instead of through the solver's steps, in memory that does not
    grow with them; once differentiable, in x, in a context that is a tensor, and in the weights of the field, an nn.Module.
    `nfe` is the number of evaluations of the field in the last solve, without those of the adjoint's backward solve.
    Raises FloatingPointError for a state that is not finite, a step too small, or over `max_steps` steps, tried ones included.
    Chen et al. 2018, sections 2 and 4; Grathwohl et al. 2019, section 3.
    """

    def __init__(self, field, t0=0.0, t1=1.0, trace="exact", noise="rademacher", solver="dopri5", rtol=1e-5, atol=1e-6,
                 steps=None, adjoint=False, max_steps=1000):
        super().__init__()
        for name, value, allowed in (("trace", trace, ("exact", "hutchinson")), ("noise", noise, ("rademacher", "gaussian")),
                                     ("solver", solver, ADAPTIVE + FIXED)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if t0 == t1:
            raise ValueError(f"t1 must differ from t0, got {t0} for both")
        if (solver in FIXED) != (isinstance(steps, int) and steps > 0):
            raise ValueError("steps must be a positive integer for a fixed-step solver and None for an adaptive one, "
                             f"got {steps!r} for {solver}")
        if adjoint and not isinstance(field, nn.Module):
            raise TypeError("field must be an nn.Module for adjoint=True, or its weights would get no gradient, "
                            f"got {type(field).__name__}")
        self.field, self.t0, self.t1, self.trace, self.noise, self.solver = field, t0, t1, trace, noise, solver
        self.rtol, self.atol, self.steps, self.adjoint, self.max_steps, self.nfe = rtol, atol, steps, adjoint, max_steps, 0

    @property
    def exact(self):
        return self.trace == "exact"

    def _noise(self, x):
        if self.exact:
            return None
        return torch.randn_like(x) if self.noise == "gaussian" else 2 * torch.randint_like(x, 2) - 1

    def _solve(self, x, name, t0, t1, context, with_ldj=True):
        """x at t1 from x at t0, with the integral of the trace as one more coordinate if `with_ldj`."""
        from torchdiffeq import odeint, odeint_adjoint
        check_input(x, name)
        state = torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1) if with_ldj else x
        if x.numel() == 0:   # an empty batch has no error to control
            self.nfe = 0
            return state.clone()
        field, solve, more = self.field, odeint, {}
        if self.adjoint:
            # Held here, since the backward solve may come when functional_call has put other weights into the module.
            weights = dict(self.field.named_parameters())
            sources = [*weights.values(), *(c for c in given(context) if isinstance(c, torch.Tensor))]
            field = lambda *args: functional_call(self.field, weights, args)
            solve, more = odeint_adjoint, {"adjoint_params": tuple(s for s in sources if s.requires_grad)}
        dynamics = _Dynamics(self, field, x.shape[-1], context, self._noise(x) if with_ldj else None)
        times = torch.tensor([t0, t1], dtype=x.dtype, device=x.device)
        options = {"norm": dynamics.norm}
        if self.solver in ADAPTIVE:
            # Else the last step would go beyond the end, where a field may not exist, and be interpolated.
            options["step_t"] = times
        else:
            # Left alone, torchdiffeq takes one single step; and its step_size may round to one step too many.
            steps = torch.linspace(0, 1, self.steps + 1, dtype=x.dtype, device=x.device)
            options["grid_constructor"] = lambda f, y, t: torch.lerp(t[0], t[-1], steps)
        state = solve(dynamics, state, times, rtol=self.rtol, atol=self.atol, method=self.solver, options=options, **more)[-1]
        self.nfe = dynamics.nfe
        return state

    def forward(self, x, context=None):
        state = self._solve(x, "x", self.t0, self.t1, context)
        return state[..., :-1], state[..., -1]

    def inverse_and_ldj(self, z, context=None):
        state = self._solve(z, "z", self.t1, self.t0, context)
        return state[..., :-1], -state[..., -1]

    def inverse(self, z, context=None):
        return self._solve(z, "z", self.t1, self.t0, context, with_ldj=False)


class FFJORD(CNF):
    """A CNF with the settings of Grathwohl et al. 2019: Hutchinson's trace with Gaussian noise, dopri5 at 1e-5, the adjoint."""

    def __init__(self, field, **settings):
        paper = dict(trace="hutchinson", noise="gaussian", solver="dopri5", rtol=1e-5, atol=1e-5, adjoint=True)
        super().__init__(field, **{**paper, **settings})


class VectorField(nn.Module):
    """dx/dt = MLP([x, t]) or MLP([x, t, context]), smooth, as the solver's error estimate and the trace's gradient need.

    t a number, x (..., dim), context (..., context_dim); returns (..., dim).
    """

    def __init__(self, dim, hidden=(64, 64), activation=nn.Tanh, context_dim=0):
        super().__init__()
        self.net = MLP(dim + 1 + context_dim, dim, hidden, activation)

    def forward(self, t, x, *context):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], 1)
        return self.net(torch.cat([x, t, *context], -1))


class ProbabilityFlow(nn.Module):
    """The field whose flow carries the same densities as a diffusion does: f(t, x) = -beta(t) / 2 * (x + score(t, x)).

    The diffusion is the variance-preserving SDE dx = -beta(t) / 2 x dt + sqrt(beta(t)) dw, with beta(t) = beta_min +
    (beta_max - beta_min) t, data at t = 0 and nearly N(0, I) at t = 1. `score(t, x)`, (..., D), is the gradient of log p_t(x) or
    a net that has learnt it. Used as CNF(ProbabilityFlow(score)). Song et al. 2021, equations 11 and 13, appendix C.
    """

    def __init__(self, score, beta_min=0.1, beta_max=20.0):
        super().__init__()
        self.score, self.beta_min, self.beta_max = score, beta_min, beta_max

    def perturbation_kernel(self, t):
        """`scale` and `std` in x(t) = scale * x(0) + std * eps, eps ~ N(0, I). Song et al. 2021, equation 29."""
        t = torch.as_tensor(t)
        log_scale = -0.25 * t ** 2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return torch.exp(log_scale), torch.sqrt(-torch.expm1(2 * log_scale))

    def forward(self, t, x, *context):
        score = _like("score's value", self.score(t, x, *context), x)
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * (x + score)
