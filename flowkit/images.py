"""Flows on images (B, C, H, W): the same couplings and linear layers, with channels and pixels in the place of coordinates.

An image has neighbours, so nets are convolutions; `Squeeze` trades resolution for channels, a 1x1 convolution mixes the
channels, and half of them may leave at each scale. `flow_plus_plus` puts all of it together. Densities are compared in bits
per dimension, samples by the Frechet distance.

Squeeze, both splits, multi-scale: Dinh et al. 2017, "Density estimation using Real NVP", sections 3.4 to 3.6. ActNorm and
1x1 convolution over channels: Kingma & Dhariwal 2018, "Glow", section 3. The whole: Ho et al. 2019, "Flow++", section 3.
"""
import math

import torch

from .core import Compose, Flow, Inverse, StandardNormal, Transform, check_input, given
from .dequantization import FlowProposal, UniformDequantizer, VariationalDequantizer
from .elementwise import Affine, Logit, MixLogitCDF
from .linear import ActNorm, InvertibleLinear
from .nets import FlowPPNet
from .surjective import _joint, draw


def check_image(x, name="x", even=()):
    """Raise one sentence unless `x` is a floating-point tensor (B, C, H, W); `even`: those of "H", "W" and "C" that must
    be even.
    """
    check_input(x, name)
    if x.ndim != 4 or any(x.shape["BCHW".index(letter)] % 2 for letter in even):
        wanted = f" with {' and '.join(even)} even" if even else ""
        raise ValueError(f"{name} must have shape (B, C, H, W){wanted}, got {tuple(x.shape)}")


def bits_per_dim(log_prob, shape, levels):
    """-log_prob / (D log 2) + log2(levels): the code length of an image, in bits for each of its D = C H W numbers.

    `log_prob` (B,) in nats, of a density on [0, 1]^D whose images had integer `levels` (256 for 8 bits); levels = 1 if the
    -D log(levels) of dequantization is in log_prob already. `shape`: (C, H, W). Dinh et al. 2017, section 4.1.
    """
    return -log_prob / (math.prod(shape) * math.log(2)) + math.log2(levels)


@torch.no_grad()
def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the means m and covariances S (n - 1 in the divisor) of two sets.

    a (N, F) and b (M, F): rows of features, at least two each; a scalar >= 0, computed in float64 and without gradients,
    of a's dtype and device. It is the squared 2-Wasserstein distance of the two fitted normals: 0 for sets of one mean
    and covariance, however else they differ. On Inception features it is the FID: Heusel et al. 2017, "GANs Trained
    by a Two Time-Scale Update Rule"; the closed form: Dowson & Landau 1982, "The Frechet Distance between
    Multivariate Normal Distributions".
    """
    for name, rows in (("a", a), ("b", b)):
        check_input(rows, name, None if rows is a else a.shape[-1])
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"{name} must hold at least 2 rows of features, shape (N, F), got {tuple(rows.shape)}")

    # S = R^T R, so the eigenvalues of S_a S_b are the squared singular values of R_a R_b^T. With those no root is taken of an
    # eigenvalue that should be 0 and is 1e-16 or below 0: sets of fewer rows than features are as exact as others.
    def factor(rows):
        rows = rows.double()
        return torch.linalg.qr((rows - rows.mean(0)) / math.sqrt(len(rows) - 1), mode="r").R

    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    r_a, r_b = factor(a), factor(b)
    shapes = r_a.square().sum() + r_b.square().sum() - 2 * torch.linalg.svdvals(r_a @ r_b.T).sum()
    return (apart + shapes.clamp_min(0)).to(a.dtype)


class Squeeze(Transform):
    """(B, C, H, W) to (B, 4 C, H / 2, W / 2): each 2x2 block becomes four channels, c * 4 + 2 * row + column; ldj = 0. H
    and W must be even.
    """

    def forward(self, x, context=None):
        check_image(x, even=("H", "W"))
        blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        check_image(z, "z")
        if z.shape[1] % 4:
            raise ValueError(f"z must have shape (B, C, H, W) with C a multiple of 4, got {tuple(z.shape)}")
        return z.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class ChannelWise(Transform):
    """Apply a layer for vectors (..., C) to the channels of each pixel; ldj = sum of its ldj over H and W."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, x, context=None):
        check_image(x)
        z, ldj = self.transform(x.movedim(1, -1))
        return z.movedim(-1, 1), ldj.sum((1, 2))

    def inverse_and_ldj(self, z, context=None):
        check_image(z, "z")
        x, ldj = self.transform.inverse_and_ldj(z.movedim(1, -1))
        return x.movedim(-1, 1), ldj.sum((1, 2))


class Conv1x1(ChannelWise):
    """Invertible 1x1 convolution: z[:, :, h, w] = W x[:, :, h, w], ldj = H W log|det W|, with W in its LU form (linear.py)."""

    def __init__(self, channels):
        super().__init__(InvertibleLinear(channels))


class ActNorm2d(ChannelWise):
    """ActNorm with one scale and shift a channel: after the first batch each channel has mean 0 and variance 1 over B, H
    and W.
    """

    def __init__(self, channels):
        super().__init__(ActNorm(channels))


def _checkerboard(x):
    """The pixels with h + w even, and those with h + w odd, each as (B, C, H, W / 2)."""
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    odd_row = (torch.arange(x.shape[2], device=x.device) % 2 == 1)[:, None]
    return torch.where(odd_row, right, left), torch.where(odd_row, left, right)


def _uncheckerboard(even, odd):
    odd_row = (torch.arange(even.shape[2], device=even.device) % 2 == 1)[:, None]
    return torch.stack([torch.where(odd_row, odd, even), torch.where(odd_row, even, odd)], -1).flatten(-2)


class ImageCoupling(Transform):
    """Coupling along the channels, or between the two colours of a checkerboard: z1 = x1, z2 = map(x2; net(x1)).

    ldj = sum of the map's log-slopes over C, H and W. split "channel": x1 is the first C // 2 channels; "checkerboard":
    the pixels with h + w even, packed as (B, C, H, W / 2), W even. `swap` exchanges x1 and x2. `net` maps x1 to P
    parameters for each number of x2, the channels of x2 in blocks: (B, C1, H', W') -> (B, P C2, H', W'), called net(x1,
    context) if there is a context (B, C', H, W), whose pixels are packed as those of x (both colours, so 2 C' channels).
    """

    def __init__(self, net, map=Affine(), split="channel", swap=False):
        super().__init__()
        if split not in ("channel", "checkerboard"):
            raise ValueError(f"split must be 'channel' or 'checkerboard', got {split!r}")
        self.net, self.map, self.split, self.swap = net, map, split, swap

    def _halves(self, x, name, context):
        board = self.split == "checkerboard"
        check_image(x, name, even="W" if board else ())
        if not board and x.shape[1] < 2:
            raise ValueError(f"{name} must have at least 2 channels to be split along them, got shape {tuple(x.shape)}")
        halves = _checkerboard(x) if board else x.tensor_split([x.shape[1] // 2], 1)
        first, second = reversed(halves) if self.swap else halves
        if board and context is not None:
            context = torch.cat(_checkerboard(context), 1)
        params = self.net(first, *given(context))
        wanted = (len(x), self.map.num_params * second.shape[1], *second.shape[2:])
        if params.shape != wanted:
            raise ValueError(f"net must return shape {wanted} for {name} of shape {tuple(x.shape)}, got {tuple(params.shape)}")
        return first, second, params.flatten(1)

    def _join(self, first, second):
        halves = (second, first) if self.swap else (first, second)
        return _uncheckerboard(*halves) if self.split == "checkerboard" else torch.cat(halves, 1)

    def forward(self, x, context=None):
        x1, x2, params = self._halves(x, "x", context)
        z2, log_slope = self.map.forward(x2.flatten(1), params)
        return self._join(x1, z2.reshape(x2.shape)), log_slope.sum(-1)

    def inverse_and_ldj(self, z, context=None):
        z1, z2, params = self._halves(z, "z", context)
        x2, log_slope = self.map.inverse(z2.flatten(1), params)
        return self._join(z1, x2.reshape(z2.shape)), log_slope.sum(-1)


class MultiScale(Transform):
    """At each level squeeze, transform, and let half of the channels leave (none at the last): z (B, C H W) is all that
    left, flattened.

    `steps`: one transform a level, the one of level l for images of C 2^(l+1) channels and H / 2^l, W / 2^l, l = 1, 2,
    ...; ldj is their sum. `shape` (C, H, W) is what the inverse gives; without it the layer takes the shape of the first
    batch that forward sees.
    """

    def __init__(self, steps, shape=None):
        super().__init__()
        if len(steps) == 0:
            raise ValueError("steps must hold at least one transform, got none")
        self.steps, self.squeeze = torch.nn.ModuleList(steps), Squeeze()
        self.register_buffer("shape", torch.tensor([0, 0, 0] if shape is None else list(shape)))

    def forward(self, x, context=None):
        check_image(x)
        if not self.shape.any():
            self.shape.copy_(torch.tensor(x.shape[1:]))
        shape = tuple(self.shape.tolist())
        if x.shape[1:] != shape:
            raise ValueError(f"x must have shape (B, C, H, W) with (C, H, W) = {shape}, got {tuple(x.shape)}")
        left, total = [], 0
        for i, step in enumerate(self.steps):
            x, ldj = step(self.squeeze(x)[0], *given(context))
            total = total + ldj
            if i < len(self.steps) - 1:
                x, gone = x.chunk(2, 1)
                left.append(gone.flatten(1))
        return torch.cat([*left, x.flatten(1)], -1), total

    def inverse_and_ldj(self, z, context=None):
        c, h, w = self.shape.tolist()
        if c == 0:
            raise ValueError("shape must be known to sample: give MultiScale its shape (C, H, W), or run forward first")
        check_input(z, "z", c * h * w)
        shapes = [(c * 2 ** (i + 2), h >> (i + 1), w >> (i + 1)) for i in range(len(self.steps))]
        *left, x = z.split([*(math.prod(shape) // 2 for shape in shapes[:-1]), math.prod(shapes[-1])], -1)
        x, total = x.unflatten(-1, shapes[-1]), 0
        for i, step in reversed(list(enumerate(self.steps))):
            if i < len(left):
                x = torch.cat([x, left[i].reshape(x.shape)], 1)
            x, ldj = step.inverse_and_ldj(x, *given(context))
            x, total = self.squeeze.inverse(x), total + ldj
        return x, total


class FactorOut(Transform):
    """Keep the first half of the channels; the inverse draws the rest from `prior(z)`. Contribution: +log prior(rest
    given z), exact.

    x (B, C, H, W), C even, to z (B, C / 2, H, W). `prior(z)`: a torch.distributions object whose event is one
    image (C / 2, H, W). An inference surjection, `Split` along the channels; Dinh et al. 2017, section 3.6.
    """
    bijective, surjective, stochastic = False, True, False

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x, context=None):
        check_image(x, even="C")
        z, rest = x.chunk(2, 1)
        return z, _joint(self.prior(z), "prior", z.shape[:1], rest.shape[1:]).log_prob(rest)

    def inverse(self, z, context=None):
        check_image(z, "z")
        return torch.cat([z, draw(_joint(self.prior(z), "prior", z.shape[:1], z.shape[1:]))[0]], 1)


def flow_plus_plus(shape, levels=256, scales=2, couplings=2, components=4, width=32, blocks=1, heads=4, dropout=0.0,
                   affine=False, uniform=False):
    """Flow++ for integer images (B, C, H, W) of `levels` values: a Flow whose log_prob(x, bound=True) bounds log P(x) in nats.

    Variational dequantization by a conditional flow, logit, `couplings` mixture couplings on the checkerboard, then at
    each of `scales` scales as many along the channels; the nets are gated convolutions and attention. `shape`: (C, H, W),
    H and W multiples of 2 ** scales. Smaller than the paper's, and each checkerboard stands before the first squeeze; Ho
    et al. 2019, section 3 and appendix A. What the paper takes away one at a time (section 4.2): `heads` = 0 the attention,
    `affine` the mixtures (of the noise's couplings too), `uniform` the learnt noise.
    """
    channels, height, width_ = shape
    if min(shape) < 1 or height % 2 ** scales or width_ % 2 ** scales or scales < 1:
        raise ValueError(f"shape must be (C, H, W) with H and W multiples of 2 ** scales = {2 ** scales}, got {tuple(shape)}")
    map = Affine() if affine else MixLogitCDF(components)

    def coupling(channels, split, swap, context=0):
        first, second = (channels // 2, channels - channels // 2) if split == "channel" else (channels, channels)
        if swap:
            first, second = second, first
        net = FlowPPNet(first, map.num_params * second, width, blocks, heads, context, dropout)
        return ImageCoupling(net, map, split, swap)

    def steps(channels, split):
        return [layer for i in range(couplings) for layer in (
            ActNorm2d(channels), Conv1x1(channels), coupling(channels, split, i % 2 == 1))]

    if uniform:
        dequantizer = UniformDequantizer(levels)
    else:
        # The noise's layers are turned round, so that drawing it is the direction without bisection.
        noise = [Inverse(coupling(channels, "checkerboard", swap, 2 * channels)) for swap in (False, True)]
        proposal = FlowProposal(Flow(StandardNormal(*shape), Compose(noise)), embed=lambda x: x / ((levels - 1) / 2) - 1)
        dequantizer = VariationalDequantizer(proposal, levels)
    coarse = [Compose(steps(channels * 2 ** (s + 2), "channel")) for s in range(scales)]
    transform = [dequantizer, Logit(event_dims=3), *steps(channels, "checkerboard"), MultiScale(coarse, shape)]
    return Flow(StandardNormal(math.prod(shape)), Compose(transform))
