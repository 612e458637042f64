"""Determinant identities: the identity plus a term of low rank, whose determinant is a small one.

    det(I + U V^T) = det(I + V^T U),   U and V (D, M)   (Sylvester; M = 1 is the matrix determinant lemma)

Each layer's parameters are held in a form that keeps it invertible, and its inverse needs roots in one dimension only.

Planar and radial: Rezende & Mohammed 2015, "Variational Inference with Normalizing Flows", section 4.1 and appendix A.
Sylvester: van den Berg et al. 2018, "Sylvester Normalizing Flows", sections 3.1 to 3.3.
"""
import math

import torch
from torch import nn
from torch.nn.functional import softplus

from .core import Transform, check_input
from .elementwise import invert_increasing


def _above_minus_one(raw):
    """-1 + softplus(raw + log(e - 1)): any number above -1, and 0 for 0."""
    return softplus(raw + math.log(math.e - 1)) - 1


class Planar(Transform):
    """z = x + u tanh(w.x + b), ldj = log|1 + (1 - tanh^2) w.u|; x (..., dim).

    The free vector u is moved along w so that w.u = -1 + softplus(w.u + log(e - 1)) > -1, without which the slope along w
    would change sign. The inverse solves a = w.x from w.z = a + w.u tanh(a + b), which rises in a.
    """

    def __init__(self, dim):
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.randn(dim) / dim ** 0.5) for _ in range(2))
        self.b = nn.Parameter(torch.zeros(()))

    def constrained_u(self):
        """The u that is used, and w.u > -1."""
        free, square = self.w @ self.u, self.w @ self.w
        wu = _above_minus_one(free)
        return self.u + (wu - free) * self.w / square.clamp_min(torch.finfo(square.dtype).tiny), wu

    def _value(self, a, wu):
        """h = tanh(a + b) and log(1 + w.u h'), h' = 1 - h^2."""
        h = torch.tanh(a + self.b)
        return h, torch.log1p(wu * (1 - h ** 2))

    def forward(self, x, context=None):
        check_input(x, dim=len(self.w))
        u, wu = self.constrained_u()
        h, ldj = self._value(x @ self.w, wu)
        return x + u * h[..., None], ldj

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z", len(self.w))
        u, wu = self.constrained_u()

        def along(a):
            h, ldj = self._value(a, wu)
            return a + wu * h, ldj

        h, ldj = self._value(invert_increasing(along, z @ self.w), wu)
        return z - u * h[..., None], ldj


class Radial(Transform):
    """z = x + beta (x - x0) / (alpha + r), r = |x - x0|; ldj = (D - 1) log(1 + beta h) + log(1 + alpha beta h^2), h = 1 /
    (alpha + r).

    alpha > 0, and beta > -alpha keeps |z - x0| rising in r. x (..., dim). The inverse is the positive root of a quadratic in r.
    """

    def __init__(self, dim):
        super().__init__()
        self.center, self.raw_beta = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.zeros(()))
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def alpha_beta(self):
        """alpha > 0 and beta > -alpha."""
        alpha = torch.exp(self.log_alpha)
        return alpha, alpha * _above_minus_one(self.raw_beta)

    def _ldj(self, h, alpha, beta):
        bh = beta * h
        return (len(self.center) - 1) * torch.log1p(bh) + torch.log1p(alpha * bh * h)

    def forward(self, x, context=None):
        check_input(x, dim=len(self.center))
        alpha, beta = self.alpha_beta()
        away = x - self.center
        h = 1 / (alpha + torch.linalg.vector_norm(away, dim=-1))
        return x + away * (beta * h)[..., None], self._ldj(h, alpha, beta)

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z", len(self.center))
        alpha, beta = self.alpha_beta()
        away = z - self.center
        rz = torch.linalg.vector_norm(away, dim=-1)
        # |z - x0| = r (1 + beta / (alpha + r)) is r^2 + p r - alpha |z - x0| = 0; of its two forms the root without cancellation.
        p = alpha + beta - rz
        root = torch.sqrt(p ** 2 + 4 * alpha * rz)
        r = torch.where(p > 0, 2 * alpha * rz / (root + p.abs()), (root + p.abs()) / 2)
        return z - away * (beta / (alpha + beta + r))[..., None], self._ldj(1 / (alpha + r), alpha, beta)


class Sylvester(Transform):
    """z = x + Q R tanh(S Q^T x + b), ldj = sum_i log(1 + tanh'_i r_ii s_ii); x (..., dim).

    Q (dim, m) has orthonormal columns (from a QR decomposition), R and S (m, m) are upper triangular, b (m,). It is
    invertible if r_ii s_ii > -1 / sup tanh' = -1: here s_ii > 0 is free and r_ii = (-1 + softplus) / s_ii. The inverse
    goes up the rows of the triangle, with one root in one dimension for each.
    """

    def __init__(self, dim, m):
        super().__init__()
        if not 1 <= m <= dim:
            raise ValueError(f"m must lie between 1 and dim = {dim}, got {m}")
        self.frame = nn.Parameter(torch.randn(dim, m))
        self.upper_r, self.upper_s = (nn.Parameter(torch.randn(m, m) / m) for _ in range(2))
        self.raw_product, self.log_s, self.b = (nn.Parameter(torch.zeros(m)) for _ in range(3))

    def factors(self):
        """Q (dim, m), R and S (m, m), and the products r_ii s_ii > -1."""
        q, product, s = torch.linalg.qr(self.frame)[0], _above_minus_one(self.raw_product), torch.exp(self.log_s)
        return q, self.upper_r.triu(1) + torch.diag(product / s), self.upper_s.triu(1) + torch.diag(s), product

    def forward(self, x, context=None):
        check_input(x, dim=len(self.frame))
        q, r, s, product = self.factors()
        h = torch.tanh(x @ (q @ s.T) + self.b)
        return x + h @ (q @ r).T, torch.log1p(product * (1 - h ** 2)).sum(-1)

    def inverse_and_ldj(self, z, context=None):
        check_input(z, "z", len(self.frame))
        q, r, s, product = self.factors()
        target, h, y, ldj = z @ q, {}, {}, 0
        for i in reversed(range(len(self.b))):
            later = range(i + 1, len(self.b))
            shift = self.b[i] + sum(s[i, j] * y[j] for j in later)
            goal = target[..., i] - sum(r[i, j] * h[j] for j in later)

            def along(t):
                bent = torch.tanh(s[i, i] * t + shift)
                return t + r[i, i] * bent, torch.log1p(product[i] * (1 - bent ** 2))

            y[i] = invert_increasing(along, goal)
            h[i], ldj = torch.tanh(s[i, i] * y[i] + shift), ldj + along(y[i])[1]
        bent = torch.stack([h[i] for i in range(len(self.b))], -1)
        return z - bent @ (q @ r).T, ldj
