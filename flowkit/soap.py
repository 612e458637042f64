"""SOAP: Adam, in the directions in which the gradient varies.

Adam scales each weight's step by the size of that weight's own gradients. In a net the weights of a layer move
together: the gradient G (m, n) of a weight matrix is large along some mixtures of its rows and columns and small along
others, and no single weight tells. SOAP keeps running means L of G Gᵀ (m, m) and R of Gᵀ G (n, n), writes G in their
eigenvectors, G' = Q_Lᵀ G Q_R, takes Adam's step there, and turns it back.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024 (arXiv:2409.11321), Algorithm 3.
"""
import torch


class SOAP(torch.optim.Optimizer):
    """In the place of torch.optim.Adam, for nets whose weight matrices have some ten to a few hundred rows.

    lr: the rate; it should rise from zero over the first steps, since the first gradients say little about the directions
    (`fit(warm_up=0.05)`). betas: how much of the mean of G, and of the means of G'², G Gᵀ and Gᵀ G, a step keeps. eps: added to the root
    of the mean of G'². every: steps after which Q_L and Q_R follow, by one power iteration and a QR decomposition. widest: a side
    longer than this is not turned. Vectors and scalars are not turned either, so that they get Adam's step. A weight with more than
    two axes counts as (first, all others). A weight without a gradient counts as one whose gradient is zero. The first step moves
    nothing: it finds the directions. Raises ValueError for a setting out of its range.
    """

    def __init__(self, params, lr=1e-2, betas=(0.95, 0.97), eps=1e-8, every=5, widest=1024):
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, every=every, widest=widest))

    @torch.no_grad()
    def step(self, closure=None):
        """Move all weights once. closure: as in torch.optim, computes the loss anew and is what comes back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Weights of one shape go through the small products together: what they cost is the calls, not the numbers.
            alike = {}
            for p in group["params"]:
                alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for weights in alike.values():
                self._move(weights, group)
        return loss

    def _move(self, weights, group):
        g = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
        if g.ndim > 3:
            g = g.flatten(2)
        rate, (beta1, beta2), state = group["lr"], group["betas"], self.state[weights[0]]
        if not state:
            sides = enumerate(g.shape[1:] if g.ndim == 3 else ())
            spread = [_spread(g, side) * (1 - beta2) if 1 < n <= group["widest"] else None for side, n in sides]
            state |= {"steps": 0, "mean": torch.zeros_like(g), "square": torch.zeros_like(g), "spread": spread,
                      "basis": [None if s is None else torch.linalg.eigh(s).eigenvectors.flip(-1) for s in spread]}
            return
        state["steps"] += 1
        t, mean, square, basis = state["steps"], state["mean"], state["square"], state["basis"]
        mean.lerp_(g, 1 - beta1)
        square.lerp_(_turned(g, basis).square_(), 1 - beta2)
        root = (square / (1 - beta2 ** t)).sqrt_().add_(group["eps"])
        move = _turned(_turned(mean, basis) / root, basis, back=True)
        for p, part in zip(weights, move):
            p.add_(part.view_as(p), alpha=-rate / (1 - beta1 ** t))
        for side, spread in enumerate(state["spread"]):
            if spread is not None:
                spread.lerp_(_spread(g, side), 1 - beta2)
                if t % group["every"] == 0:
                    self._follow(state, side)

    @staticmethod
    def _follow(state, side):
        """One power iteration and a QR decomposition, the directions of most variance first."""
        q = state["basis"][side]
        power = state["spread"][side] @ q
        order = (q * power).sum(-2, keepdim=True).argsort(-1, descending=True)
        state["basis"][side] = torch.linalg.qr(power.take_along_dim(order, -1)).Q
        state["square"] = state["square"].take_along_dim(order.mT if side == 0 else order, side - 2)


def _spread(g, side):
    """G Gᵀ, or Gᵀ G."""
    return g @ g.mT if side == 0 else g.mT @ g


def _turned(x, basis, back=False):
    """Q_Lᵀ x Q_R, or back: Q_L x Q_Rᵀ. None stands for the identity."""
    for side, q in enumerate(basis):
        if q is not None:
            x = (q if back else q.mT) @ x if side == 0 else x @ (q.mT if back else q)
    return x
