"""Maximum likelihood: minimise the mean of -log q(x) over data, whose floor is the entropy of the data (nats)."""
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm


@dataclass
class History:
    """What `fit` hands back: `losses` in nats, one a step, the `seconds` it took, and whether it was `interrupted`."""
    losses: list = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def recent(self):
        """Mean of the last 100 losses, nats."""
        last = self.losses[-100:]
        return sum(last) / len(last) if last else float("nan")

    def __repr__(self):
        end = ", interrupted" if self.interrupted else ""
        return f"History({len(self.losses)} steps, loss {self.recent:.3f} nats, {self.seconds:.1f} s{end})"


@contextmanager
def _mode(module, training):
    """Every part of the module in train or eval mode, and afterwards as each of them was."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, was in before:
            part.training = was


@contextmanager
def flushed():
    """Numbers below 1e-38 count as zero, and afterwards as they did.

    A logistic far from a point has a gradient that small, and a CPU takes a hundred times as long for such numbers: a step of a
    mixture coupling with 32 components is a fifth quicker without them. Where the CPU cannot do this, nothing happens.
    """
    before = (torch.tensor(1e-40, device="cpu", dtype=torch.float32) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _like(x, weights):
    """x with the weights' dtype and device; integers, which a flow of discrete data wants, keep their dtype."""
    return x.to(weights) if x.is_floating_point() else x.to(weights.device)


def _nll(flow, x):
    # A flow that is not exact is trained on its bound.
    log_prob = flow.log_prob(x) if getattr(flow, "exact", True) else flow.log_prob(x, bound=True)
    return -log_prob.mean()


def adam(parameters, lr):
    """torch's Adam, fused where that is right: it goes astray on a parameter with gaps in memory, such as one half of a chunked tensor."""
    whole = all(p.is_contiguous() for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=whole and parameters[0].device.type in ("cpu", "cuda"))


def fit(flow, data, steps=2000, batch_size=768, lr=5e-3, clip=10.0, progress=True, on_step=None, optimiser=adam, warm_up=0.0):
    """Fit `flow` by Adam on -mean log q(x), with a learning rate that falls to zero along a cosine.

    The gradient's norm is cut at `clip`: one rare point can have a gradient thousands of times the usual, and
    Adam would remember it for a thousand steps. `optimiser(parameters, lr=...)` makes a torch optimiser, and over
    the share `warm_up` of the steps, in [0, 1), the rate rises from zero. With `optimiser=flowkit.SOAP, lr=1e-2, batch_size=2048,
    warm_up=0.05` benchmarks/fit.py reaches its figures: half to three quarters of Adam's gap in the same time.

    `flow`: a module with log_prob. `data`: a function n -> batch (n, D), such as a toy's `sample`, or a tensor of
    points (N, D), of which each step draws `batch_size` at random. `on_step(step, history)` is called after each
    step. Interrupting (KeyboardInterrupt) stops early and returns the History so far, with the flow usable.
    Raises FloatingPointError if the loss is not finite, before the step that would spoil the weights.
    """
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("flow must have parameters to fit, got none that require a gradient")
    if isinstance(data, torch.Tensor):
        points = data
        data = lambda n: points[torch.randint(len(points), (n,), device=points.device)]  # noqa: E731
    if not 0 <= warm_up < 1:
        raise ValueError(f"warm_up must be a share of the steps in [0, 1), got {warm_up}")
    like = parameters[0]
    optimiser = optimiser(parameters, lr=lr)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))]
    if rising := round(warm_up * steps):
        schedules.append(torch.optim.lr_scheduler.LinearLR(optimiser, 1 / (rising + 1), total_iters=rising))
    history, start = History(), time.perf_counter()
    with _mode(flow, True), flushed(), tqdm(total=steps, disable=not progress, unit="step", mininterval=0.2) as bar:
        try:
            for step in range(steps):
                loss = _nll(flow, _like(data(batch_size), like))
                value = loss.item()
                if not abs(value) < float("inf"):
                    raise FloatingPointError(f"the loss became {value} at step {step}; lower lr, or bound the log-scales")
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimiser.step()
                for schedule in schedules:
                    schedule.step()
                history.losses.append(value)
                history.seconds = time.perf_counter() - start
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(nats=f"{history.recent:.3f}", refresh=False)
                if on_step is not None:
                    on_step(step, history)
        except KeyboardInterrupt:
            history.interrupted = True
    return history


@torch.no_grad()
def kl_gap(flow, toy, n=10_000, seed=None):
    """KL(p || q) of a toy p and a flow q in nats: the mean of log p(x) - log q(x) over `n` fresh points, and its standard
    error.
    """
    x = toy.sample(n, seed=seed)
    like = next(flow.parameters(), x)
    with _mode(flow, False):
        exact = {} if getattr(flow, "exact", True) else {"bound": True}
        gap = toy.log_prob(x) - flow.log_prob(x.to(like), **exact).to(x)
    return gap.mean().item(), (gap.std() / n ** 0.5).item()
