"""Layers that mix or rescale coordinates, so that what one coupling left alone the next one bends.

ActNorm and the LU form of the 1x1 convolution's matrix: Kingma & Dhariwal 2018, "Glow", sections 3.1 and 3.2.
"""
import torch
from torch import nn

from .core import Transform, check_finite, check_input


class Reverse(Transform):
    """Turn the order of the coordinates round: z_i = x_{D+1-i}, ldj = 0."""

    def forward(self, x, context=None):
        check_input(x)
        return x.flip(-1), x.new_zeros(x.shape[:-1])

    def inverse(self, z, context=None):
        check_input(z, "z")
        return z.flip(-1)


class Permute(Transform):
    """Reorder the coordinates: z_i = x_{order[i]}, ldj = 0 since a permutation has determinant +1 or -1.

    `order`: a permutation of 0 .. D-1, kept in the state_dict. Raises ValueError if it is none.
    """

    def __init__(self, order):
        super().__init__()
        order = torch.as_tensor(order).clone()
        if order.ndim != 1 or sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"order must be a permutation of 0 .. D-1, got {order.tolist()}")
        self.register_buffer("order", order.long())

    def forward(self, x, context=None):
        check_input(x, dim=len(self.order))
        return x[..., self.order], x.new_zeros(x.shape[:-1])

    def inverse(self, z, context=None):
        check_input(z, "z", len(self.order))
        return z[..., self.order.argsort()]


class ActNorm(Transform):
    """z = x exp(log_scale) + shift, chosen so that the first batch comes out with mean 0 and variance 1.

    ldj = sum(log_scale). x (..., dim). The first batch that forward sees sets the parameters, in train and in eval
    mode alike; afterwards they are learnt as usual. That it has happened is a buffer, so a loaded layer does not
    start again. Before the first batch the layer is the identity, so an untrained flow can sample. A feature
    that is constant in the first batch (all are, in a batch of one) is centred and keeps its scale.
    """

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.log_scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def _initialise(self, x):
        if x.numel() == 0:
            raise ValueError(f"x must hold a point when it is ActNorm's first batch, got shape {tuple(x.shape)}")
        x = x.reshape(-1, x.shape[-1])
        mean, std = x.mean(0), x.std(0, correction=0)
        # A batch that spoilt the parameters would spoil them for good, so it is refused.
        check_finite("ActNorm, first batch", x, mean=mean, std=std)
        std = torch.where(std > self.eps * (1 + mean.abs()), std, 1)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialised.fill_(True)

    def forward(self, x, context=None):
        check_input(x, dim=len(self.shift))
        if not self.initialised:
            self._initialise(x)
        return torch.addcmul(self.shift, x, torch.exp(self.log_scale)), self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z", len(self.shift))
        x = (z - self.shift) * torch.exp(-self.log_scale)
        return x, self.log_scale.sum().expand(z.shape[:-1])


class InvertibleLinear(Transform):
    """z = W x with W = P L (U + diag(sign * exp(log_s))), so that ldj = sum(log_s) costs O(D).

    P is a fixed permutation, L unit lower and U strictly upper triangular; W starts as a random rotation. The signs
    are fixed, so W never becomes singular. The inverse is found by two triangular solves. x (..., dim).
    """

    def __init__(self, dim):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(dim, dim))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(upper.diagonal().abs().log())

    def factors(self):
        """L without its diagonal of ones, and U with its diagonal."""
        return self.lower.tril(-1), self.upper.triu(1) + torch.diag(self.sign * torch.exp(self.log_s))

    def weight(self):
        """The matrix W."""
        lower, upper = self.factors()
        return self.permutation @ torch.addmm(upper, lower, upper)

    def forward(self, x, context=None):
        check_input(x, dim=len(self.log_s))
        return x @ self.weight().T, self.log_s.sum().expand(x.shape[:-1])

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z", len(self.log_s))
        lower, upper = self.factors()
        # Two triangular systems of D columns, and not of as many as there are points.
        inverse = torch.linalg.solve_triangular(lower, self.permutation.T, upper=False, unitriangular=True)
        inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
        return z @ inverse.T, self.log_s.sum().expand(z.shape[:-1])
