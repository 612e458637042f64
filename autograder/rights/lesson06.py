"""Differently written right answers of lesson 06: none of them may lose a point."""
import math

import numpy as np
import torch
from torch import distributions, nn
from torch.nn import functional as F

# --- bits_per_dim ----------------------------------------------------------------------------------------------------


def bits_plain(log_prob, shape, levels):
    D = math.prod(shape)
    return -log_prob / (D * math.log(2)) + math.log2(levels)


def bits_numpy(log_prob, shape, levels):
    D = np.prod(shape)
    nats = -log_prob / D
    return nats / np.log(2) + np.log(levels) / np.log(2)


def bits_unpacked(log_prob, shape, levels):
    """The sizes one by one; 1 / log 2 is log2(e)."""
    C, H, W = shape
    return math.log2(levels) - log_prob * math.log2(math.e) / (C * H * W)


def bits_of_the_whole(log_prob, shape, levels):
    """All nats of the image first, those of the levels among them."""
    D = torch.tensor(shape).prod()
    nats = D * math.log(levels) - log_prob
    return nats / math.log(2) / D


def bits_tensors(log_prob, shape, levels):
    log2 = torch.log(torch.tensor(2.0, dtype=log_prob.dtype))
    return -(log_prob / log2) / torch.Size(shape).numel() + torch.log2(torch.tensor(levels, dtype=log_prob.dtype))


def bits_loop(log_prob, shape, levels):
    """One image after the other, with another way to count."""
    D = len(torch.zeros(shape).flatten())
    return torch.stack([-one / (D * np.log(2.0)) + math.log(levels, 2) for one in log_prob])


def bits_mapped(log_prob, shape, levels):
    D = 1
    for n in shape:
        D *= n
    per = torch.vmap(lambda one: one.neg().div(D).div(math.log(2)))(log_prob)
    return per.add(math.log2(levels))


# --- squeeze ---------------------------------------------------------------------------------------------------------


def squeeze_plain(x):
    B, C, H, W = x.shape
    blocks = x.reshape(B, C, H // 2, 2, W // 2, 2)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * C, H // 2, W // 2)


def unsqueeze_plain(z):
    B, C, H, W = z.shape
    blocks = z.reshape(B, C // 4, 2, 2, H, W)
    return blocks.permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * H, 2 * W)


def squeeze_torch(x):
    """What torch has for it."""
    return F.pixel_unshuffle(x, 2)


def unsqueeze_torch(z):
    return F.pixel_shuffle(z, 2)


def squeeze_slices(x):
    """The four corners by slices, corners before channels."""
    return torch.cat([x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]], dim=1)


def unsqueeze_slices(z):
    a, b, c, d = z.chunk(4, dim=1)
    x = z.new_empty(z.shape[0], z.shape[1] // 4, 2 * z.shape[2], 2 * z.shape[3])
    x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2] = a, b, c, d
    return x


def squeeze_views(x):
    """Corners before channels, by views."""
    b, c, h, w = x.size()
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous().view(b, c * 4, h // 2, w // 2)


def unsqueeze_views(z):
    b, c, h, w = z.size()
    return z.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).contiguous().view(b, c // 4, h * 2, w * 2)


def squeeze_unfold(x):
    """Patches of 2 x 2 by unfold and fold, which take no integers."""
    B, C, H, W = x.shape
    return F.unfold(x.double(), 2, stride=2).view(B, 4 * C, H // 2, W // 2).to(x)


def unsqueeze_unfold(z):
    B, C, H, W = z.shape
    return F.fold(z.reshape(B, C, H * W).double(), (2 * H, 2 * W), 2, stride=2).to(z)


def squeeze_strided(x):
    """A convolution with a kernel of zeros and a one, the corners in an order of its own."""
    C = x.shape[1]
    kernel = torch.zeros(4 * C, C, 2, 2, dtype=x.dtype)
    for k, (i, j) in enumerate(((1, 1), (1, 0), (0, 1), (0, 0))):
        for c in range(C):
            kernel[k * C + c, c, i, j] = 1
    return F.conv2d(x, kernel, stride=2)


def unsqueeze_strided(z):
    C = z.shape[1] // 4
    kernel = torch.zeros(4 * C, C, 2, 2, dtype=z.dtype)
    for k, (i, j) in enumerate(((1, 1), (1, 0), (0, 1), (0, 0))):
        for c in range(C):
            kernel[k * C + c, c, i, j] = 1
    return F.conv_transpose2d(z, kernel, stride=2)


def squeeze_loop(x):
    """Channel after channel, and stacks."""
    found = []
    for c in range(x.shape[1]):
        for j in (0, 1):
            for i in (0, 1):
                found.append(x[:, c, i::2, j::2])
    return torch.stack(found, 1)


def unsqueeze_loop(z):
    columns = []
    for c in range(z.shape[1] // 4):
        left, right = (torch.stack([z[:, 4 * c + 2 * j], z[:, 4 * c + 2 * j + 1]], 2).flatten(1, 2) for j in (0, 1))
        columns.append(torch.stack([left, right], -1).flatten(-2))
    return torch.stack(columns, 1)


# --- conv1x1 ---------------------------------------------------------------------------------------------------------


class ConvPlain(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x):
        B, C, H, W = x.shape
        z = torch.einsum("ij,bjhw->bihw", self.W, x)
        ldj = H * W * torch.linalg.slogdet(self.W)[1]
        return z, ldj.expand(B)

    def inverse(self, z):
        return torch.einsum("ij,bjhw->bihw", torch.linalg.inv(self.W), z)


class ConvFunctional(nn.Module):
    """Glow's own form: conv2d with a matrix of shape (C, C, 1, 1)."""

    def __init__(self, channels):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        self.weight = nn.Parameter(rotation[:, :, None, None])

    def forward(self, x):
        logdet = self.weight.squeeze(-1).squeeze(-1).det().abs().log()
        return F.conv2d(x, self.weight), x.size(2) * x.size(3) * logdet * torch.ones(x.size(0), dtype=x.dtype)

    def inverse(self, z):
        return F.conv2d(z, self.weight[:, :, 0, 0].inverse()[:, :, None, None])


class ConvModule(nn.Module):
    """An nn.Conv2d without bias; the inverse solves."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.orthogonal_(self.conv.weight)

    def forward(self, x):
        pixels = x[0, 0].numel()
        _, logdet = torch.slogdet(self.conv.weight[..., 0, 0])
        return self.conv(x), (pixels * logdet).repeat(len(x))

    def inverse(self, z):
        flat = z.flatten(2)
        return torch.linalg.solve(self.conv.weight[..., 0, 0], flat).view_as(z)


class ConvLU(nn.Module):
    """The LU form, the fixed parts as buffers."""

    def __init__(self, channels):
        super().__init__()
        P, L, U = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.register_buffer("P", P)
        self.register_buffer("sign", U.diagonal().sign())
        self.L, self.U, self.log_s = nn.Parameter(L.tril(-1)), nn.Parameter(U.triu(1)), nn.Parameter(U.diagonal().abs().log())

    def matrix(self):
        eye = torch.eye(len(self.log_s), dtype=self.L.dtype)
        return self.P @ (self.L.tril(-1) + eye) @ (self.U.triu(1) + torch.diag(self.sign * self.log_s.exp()))

    def forward(self, x):
        z = (x.movedim(1, -1) @ self.matrix().T).movedim(-1, 1)
        return z, x.new_ones(len(x)) * self.log_s.sum() * x.shape[-1] * x.shape[-2]

    def inverse(self, z):
        return (z.movedim(1, -1) @ torch.linalg.inv(self.matrix()).T).movedim(-1, 1)


class ConvPixels(nn.Module):
    """A list of pixels as rows, multiplied from the right; the determinants of the pixels are summed."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels) + 0.1 * torch.randn(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, C)
        each = torch.linalg.slogdet(self.weight).logabsdet.expand(B, H, W)
        return (rows @ self.weight).reshape(B, H, W, C).permute(0, 3, 1, 2), each.sum(dim=(1, 2))

    def inverse(self, z):
        B, C, H, W = z.shape
        rows = z.permute(0, 2, 3, 1).reshape(-1, C)
        return (rows @ torch.linalg.pinv(self.weight)).reshape(B, H, W, C).permute(0, 3, 1, 2)


class ConvExponential(nn.Module):
    """W as a matrix exponential, whose determinant is the exponential of the trace."""

    def __init__(self, channels):
        super().__init__()
        self.A = nn.Parameter(0.3 * torch.randn(channels, channels))

    def forward(self, x):
        z = torch.tensordot(x, torch.linalg.matrix_exp(self.A), dims=([1], [1])).permute(0, 3, 1, 2)
        return z, torch.trace(self.A) * torch.full((x.shape[0],), float(x.shape[2] * x.shape[3]))

    @torch.no_grad()
    def inverse(self, z):
        return torch.tensordot(z, torch.linalg.matrix_exp(-self.A), dims=([1], [1])).permute(0, 3, 1, 2)


class ConvBiased(nn.Module):
    """A bias that inverse takes off again, and a loop over the output channels."""

    def __init__(self, channels):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0]), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        z = torch.stack([(row[:, None, None] * x).sum(1) + b for row, b in zip(self.W, self.b)], 1)
        return z, torch.stack([torch.linalg.svdvals(self.W).log().sum() * image[0].numel() for image in x])

    def inverse(self, z):
        return torch.einsum("ij,bj...->bi...", torch.linalg.inv(self.W), z - self.b[:, None, None])


# --- image_coupling --------------------------------------------------------------------------------------------------


class ImagePlain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        alpha, mu = self.net(x1).chunk(2, dim=1)
        z2 = x2 * torch.exp(alpha) + mu
        return torch.cat([x1, z2], dim=1), alpha.sum(dim=(1, 2, 3))

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=1)
        alpha, mu = self.net(z1).chunk(2, dim=1)
        x2 = (z2 - mu) * torch.exp(-alpha)
        return torch.cat([z1, x2], dim=1)


class ImageOtherOrder(nn.Module):
    """mu first, slices, and a flattened sum."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        half = x.shape[1] // 2
        x1, x2 = x[:, :half], x[:, half:]
        out = self.net(x1)
        mu, alpha = out[:, :half], out[:, half:]
        return torch.cat((x1, mu + alpha.exp() * x2), 1), alpha.flatten(1).sum(-1)

    def inverse(self, z):
        half = z.shape[1] // 2
        z1, z2 = z[:, :half], z[:, half:]
        out = self.net(z1)
        mu, alpha = out[:, :half], out[:, half:]
        return torch.cat((z1, (z2 - mu) / alpha.exp()), 1)


class ImageFlattened(nn.Module):
    """Images as vectors: the first half of the numbers are the first half of the channels."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def params(self, half, shape):
        B, C, H, W = shape
        return self.net(half.view(B, C // 2, H, W)).flatten(1).chunk(2, 1)

    def forward(self, x):
        a, b = x.flatten(1).chunk(2, -1)
        alpha, mu = self.params(a, x.shape)
        return torch.cat([a, b * alpha.exp() + mu], -1).view(x.shape), alpha.sum(-1)

    def inverse(self, z):
        a, b = z.flatten(1).chunk(2, -1)
        alpha, mu = self.params(a, z.shape)
        return torch.cat([a, (b - mu) * (-alpha).exp()], -1).view(z.shape)


class ImagePair(nn.Module):
    """A pair of nets, the scale bounded by tanh; inverse under no_grad."""

    def __init__(self, nets):
        super().__init__()
        self.s, self.t = nets

    def forward(self, x):
        a, b = torch.tensor_split(x, 2, dim=1)
        s = 2 * torch.tanh(self.s(a) / 2)
        return torch.cat([a, torch.addcmul(self.t(a), b, s.exp())], 1), torch.einsum("bchw->b", s)

    @torch.no_grad()
    def inverse(self, z):
        a, b = torch.tensor_split(z, 2, dim=1)
        s = 2 * torch.tanh(self.s(a) / 2)
        return torch.cat([a, (b - self.t(a)) / s.exp()], 1)


class ImageTuple:
    """Not a module, and a net that returns a tuple; a scale by sigmoid, as in Glow."""

    def __init__(self, net):
        self.net = net

    def forward(self, x):
        a, b = torch.split(x, x.size(1) // 2, 1)
        raw, shift = self.net(a)
        scale = torch.sigmoid(raw + 2)
        return torch.cat([a, scale * b + shift], 1), F.logsigmoid(raw + 2).sum(3).sum(2).sum(1)

    def inverse(self, z):
        a, b = torch.split(z, z.size(1) // 2, 1)
        raw, shift = self.net(a)
        return torch.cat([a, (b - shift) / torch.sigmoid(raw + 2)], 1)


class ImageFilled(nn.Module):
    """An empty tensor that is filled, and a loop over the images for ldj."""

    def __init__(self, net):
        super().__init__()
        self.network = net

    def forward(self, x):
        C = x.shape[1] // 2
        params = self.network(x[:, :C])
        log_scale, shift = params.unflatten(1, (2, C)).unbind(1)
        z = x.clone()
        z[:, C:] = x[:, C:] * log_scale.exp() + shift
        return z, torch.stack([image.sum() for image in log_scale])

    def inverse(self, z):
        C = z.shape[1] // 2
        log_scale, shift = self.network(z[:, :C]).unflatten(1, (2, C)).unbind(1)
        x = z.clone()
        x[:, C:] = (z[:, C:] - shift).div(log_scale.exp())
        return x


class ImageMasked(nn.Module):
    """A mask of ones and zeros over the channels, as in RealNVP's code."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def parts(self, x):
        C = x.shape[1]
        mask = (torch.arange(C) < C // 2).to(x.dtype).view(1, C, 1, 1)
        alpha, mu = self.net((x * mask)[:, :C // 2]).chunk(2, 1)
        pad = (0, 0, 0, 0, C // 2, 0)
        return F.pad(alpha, pad), F.pad(mu, pad)

    def forward(self, x):
        alpha, mu = self.parts(x)
        return x * alpha.exp() + mu, alpha.sum((-3, -2, -1))

    def inverse(self, z):
        alpha, mu = self.parts(z)
        return (z - mu) * (-alpha).exp()


# --- gated_conv ------------------------------------------------------------------------------------------------------


class GatedPlain(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        h = F.elu(self.conv(F.elu(x)))
        u, g = self.gate(h).chunk(2, dim=1)
        return x + u * torch.sigmoid(g)


class GatedConcatenated(nn.Module):
    """Flow++'s own: concatenated ELU, dropout, weight normalisation, and a small start."""

    def __init__(self, channels):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv, self.drop = norm(nn.Conv2d(2 * channels, channels, 3, padding=1)), nn.Dropout(0.2)
        self.last = norm(nn.Conv2d(2 * channels, 2 * channels, 1))

    def both(self, x):
        return F.elu(torch.cat([x, -x], 1))

    def forward(self, x):
        u, g = self.last(self.drop(self.both(self.conv(self.both(x))))).chunk(2, 1)
        return x + u * g.sigmoid()


class GatedGLU(nn.Module):
    """F.glu, ReLU, a wide middle and two 3x3 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, 16, 3, padding="same"), nn.ReLU(), nn.Conv2d(16, 2 * channels, 3, padding="same"))

    def forward(self, x):
        return F.glu(self.net(x), dim=1).add(x)


class GatedTwoConvs(nn.Module):
    """u and g from two convolutions without bias, the gate's first; layer normalisation over the channels inside; GELU."""

    def __init__(self, channels):
        super().__init__()
        self.g, self.u = nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, channels, 1, bias=False)
        self.norm, self.conv = nn.LayerNorm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        h = F.gelu(self.conv(F.gelu(h)))
        return x + self.u(h) / (1 + torch.exp(-self.g(h)))


class GatedZeroStart(nn.Module):
    """The last convolution starts at zero; the gate's half stands first; SiLU; group normalisation."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1), nn.SiLU())
        self.out = nn.Conv2d(channels, 2 * channels, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)
        self.channels = channels

    def forward(self, x):
        out = self.out(self.body(x))
        return x + torch.sigmoid(out[:, :self.channels]) * out[:, self.channels:]


class GatedUnfolded(nn.Module):
    """Matrices of its own: patches by unfold, einsum, tanh."""

    def __init__(self, channels):
        super().__init__()
        self.A, self.a = nn.Parameter(torch.randn(9 * channels, 5) / channels), nn.Parameter(torch.zeros(5))
        self.B, self.b = nn.Parameter(torch.randn(5, 2 * channels) / 5), nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x):
        patches = F.unfold(x, 3, padding=1)
        h = torch.tanh(torch.einsum("bpl,ph->blh", patches, self.A) + self.a)
        u, g = (h @ self.B + self.b).movedim(-1, 1).unflatten(-1, x.shape[2:]).split(x.shape[1], dim=1)
        return torch.addcmul(x, u, torch.special.expit(g))


class GatedShort(nn.Module):
    """Batch normalisation, which in evaluation mode leaves images apart, and a gate by the odd channels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        out = self.last(F.leaky_relu(self.conv(F.leaky_relu(self.norm(x)))))
        return x + out[:, ::2] * (1 + torch.tanh(out[:, 1::2] / 2)) / 2


# --- gated_attention -------------------------------------------------------------------------------------------------


class AttentionPlain(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(dim=1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(C // self.heads), dim=-1)
        out = (weights @ v).transpose(-1, -2).reshape(B, C, H, W)
        u, g = self.gate(out).chunk(2, dim=1)
        return x + u * torch.sigmoid(g)


class AttentionTorch(nn.Module):
    """torch's own nn.MultiheadAttention, and a gate that starts at zero."""

    def __init__(self, channels, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)
        nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        out, _ = self.attention(rows, rows, rows, need_weights=False)
        return x + F.glu(self.gate(out.transpose(1, 2).reshape(x.shape)), 1)


class AttentionPlaces(nn.Module):
    """Flow++'s own: places are added before q, k and v, here as sines; dropout, no bias in q, k and v."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout(0.1)
        self.proj = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, 2 * channels, 1)

    def places(self, x):
        C, H, W = x.shape[1:]
        h, w = torch.arange(H, dtype=x.dtype)[:, None], torch.arange(W, dtype=x.dtype)
        return torch.stack([torch.sin((c + 1) * h + (0.5 + c) * w) for c in range(C)])

    def forward(self, x):
        q, k, v = self.proj(x + self.places(x)).flatten(2).unflatten(1, (3 * self.heads, -1)).transpose(2, 3).chunk(3, 1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        a, b = self.out(self.drop(out)).chunk(2, 1)
        return x + a * torch.sigmoid(b)


class AttentionNormed(nn.Module):
    """Group normalisation first, three linear layers on the pixels, the gate's half first."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.d = heads, channels // heads
        self.norm = nn.GroupNorm(1, channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.last = nn.Linear(channels, 2 * channels)

    def forward(self, x):
        B, C, H, W = x.shape
        rows = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = (layer(rows).view(B, H * W, self.heads, self.d) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / self.d ** 0.5
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).reshape(B, H * W, C)
        g, u = self.last(out).split(C, dim=-1)
        return x + (u * g.sigmoid()).transpose(1, 2).reshape(B, C, H, W)


class AttentionHead(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(channels, width, 1) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.exp(torch.log_softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), -1))
        return (v @ weights.transpose(1, 2)).view(len(x), -1, *x.shape[2:])


class AttentionListOfHeads(nn.Module):
    """A module for each head, and two convolutions for the end."""

    def __init__(self, channels, heads):
        super().__init__()
        self.all = nn.ModuleList(AttentionHead(channels, channels // heads) for _ in range(heads))
        self.u, self.g = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        out = torch.cat([head(x) for head in self.all], 1)
        return x + self.u(out) * torch.sigmoid(self.g(out))


class AttentionInterleaved(nn.Module):
    """Heads take every so-many-th channel, and the scale is left to the weights."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.convs = nn.ModuleDict({name: nn.Conv2d(channels, channels, 1) for name in "qkv"})
        self.gate = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def forward(self, x):
        q, k, v = (self.convs[name](x).flatten(2).unflatten(1, (-1, self.heads)) for name in "qkv")
        scores = torch.einsum("bdhn,bdhm->bhnm", q, k)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.einsum("bhnm,bdhm->bdhn", weights, v).flatten(1, 2).view_as(x)
        u, g = torch.tensor_split(self.gate(out), 2, 1)
        return torch.addcmul(x, u, g.sigmoid())


class AttentionLoop(nn.Module):
    """Matrices of its own, image after image and head after head; layer normalisation over the channels first."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(channels)
        self.A = nn.Parameter(torch.randn(3, channels, channels) / channels)
        self.out = nn.Parameter(torch.randn(channels, 2 * channels) / channels)
        self.bias = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x):
        found = []
        for image in x:
            rows = image.flatten(1).T
            q, k, v = self.norm(rows) @ self.A
            parts = []
            for a, b, c in zip(*(t.chunk(self.heads, -1) for t in (q, k, v))):
                parts.append((a @ b.T / a.shape[-1] ** 0.5).softmax(1) @ c)
            u, g = (torch.cat(parts, -1) @ self.out + self.bias).chunk(2, -1)
            found.append((rows + u * torch.sigmoid(g)).T.reshape(image.shape))
        return torch.stack(found)



# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason.
_GATED = {
    "forward: two exchanged, (u, g) -> (g, u)": "which half of the channels is the gate is free",
    "forward: a sign turned, x + u * torch.sigmoid(g) -> x - u * torch.sigmoid(g)": "u is the end of a layer of weights, which can have either sign",
}


# --- variational_dequantization --------------------------------------------------------------------------------------


class DequantizerPlain(nn.Module):
    """Plainly."""

    def __init__(self, q, levels):
        super().__init__()
        self.q, self.levels = q, levels

    def forward(self, x):
        v, log_q = self.q(x)
        u = torch.sigmoid(v)
        log_slope = F.logsigmoid(v) + F.logsigmoid(-v)
        log_q_u = log_q - log_slope.sum(dim=(1, 2, 3))
        D = x[0].numel()
        contribution = -log_q_u - D * math.log(self.levels)
        return (x + u) / self.levels, contribution

    def inverse(self, y):
        return torch.floor(y * self.levels).long()


class DequantizerSoftplus(nn.Module):
    """The slope by softplus, flattened first."""

    def __init__(self, q, levels):
        super().__init__()
        self.q = q
        self.levels = levels

    def forward(self, x):
        v, log_q = self.q(x)
        B, C, H, W = x.shape
        y = (x + torch.sigmoid(v)) / self.levels
        squeezed = (F.softplus(v) + F.softplus(-v)).flatten(1).sum(1)
        return y, -log_q - squeezed - C * H * W * math.log(self.levels)

    def inverse(self, y):
        return (y * self.levels).floor().int()


class DequantizerJoined(nn.Module):
    """log-slope and log levels together, number by number; the noise divided apart."""

    def __init__(self, q, levels):
        super().__init__()
        self.q, self.levels = q, levels

    def forward(self, x):
        v, log_q = self.q(x)
        y = x / self.levels + torch.sigmoid(v) / self.levels
        per_number = F.logsigmoid(v) - F.softplus(v) - math.log(self.levels)
        contribution = per_number.sum((1, 2, 3)) - log_q
        return y, contribution

    def inverse(self, y):
        return torch.div(y, 1 / self.levels, rounding_mode="floor")


class DequantizerTransform(nn.Module):
    """By torch's own transform, whose log-determinant is added up by hand."""

    def __init__(self, q, levels):
        super().__init__()
        self.q = q
        self.register_buffer("K", torch.tensor(float(levels)))
        self.squash = distributions.transforms.SigmoidTransform()

    def forward(self, x):
        v, log_q = self.q(x)
        u = self.squash(v)
        log_q = log_q - self.squash.log_abs_det_jacobian(v, u).reshape(len(x), -1).sum(-1)
        size = math.prod(x.shape[1:])
        return (x + u) / self.K, -(log_q + size * self.K.log())

    def inverse(self, y):
        return torch.trunc(y * self.K)


class DequantizerLoop(nn.Module):
    """Image by image."""

    def __init__(self, q, levels):
        super().__init__()
        self.q, self.levels = q, levels

    def forward(self, x):
        v, log_q = self.q(x)
        contributions = []
        for i in range(len(x)):
            slope = sum(F.logsigmoid(t) + F.logsigmoid(-t) for t in v[i].reshape(-1))
            contributions.append(slope - log_q[i] - v[i].numel() * np.log(self.levels))
        return (x.double() + 1 / (1 + torch.exp(-v))) / self.levels, torch.stack(contributions)

    def inverse(self, y):
        counts = torch.zeros(y.shape, dtype=torch.long)
        for k in range(1, self.levels):
            counts = counts + (y >= k / self.levels)
        return counts


class DequantizerTanh:
    """No module; sigmoid by tanh, and its slope by the logistic distribution, whose density it is."""

    def __init__(self, q, levels):
        self.q, self.levels = q, levels

    def forward(self, x):
        v, log_q = self.q(x)
        a = v.abs()
        log_density = -a - 2 * torch.log1p(torch.exp(-a))
        y = (x + 0.5 + 0.5 * torch.tanh(v / 2)) / self.levels
        return y, log_density.sum((-3, -2, -1)) - log_q - math.log(self.levels) * x.shape[1] * x.shape[2] * x.shape[3]

    def inverse(self, y):
        return (self.levels * y).long().clamp(0, self.levels - 1)


class DequantizerSingle(nn.Module):
    """In float32, whatever it gets."""

    def __init__(self, q, levels):
        super().__init__()
        self.q, self.levels = q, levels

    def forward(self, x):
        v, log_q = (t.float() for t in self.q(x))
        slope = (F.logsigmoid(v) + F.logsigmoid(-v)).sum((1, 2, 3))
        return (x.float() + v.sigmoid()) / self.levels, slope - log_q - math.log(self.levels) * x[0].numel()

    def inverse(self, y):
        return torch.floor(y.float() * self.levels)


# --- factor_out ------------------------------------------------------------------------------------------------------


class FactorPlain(nn.Module):
    """Plainly."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        z, rest = x.chunk(2, dim=1)
        return z, self.prior(z).log_prob(rest)

    def inverse(self, z):
        rest = self.prior(z).sample()
        return torch.cat([z, rest], dim=1)


class FactorSlices(nn.Module):
    """Cut by index."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        half = x.shape[1] // 2
        z, gone = x[:, :half], x[:, half:]
        p = self.prior(z)
        contribution = p.log_prob(gone)
        return z, contribution

    def inverse(self, z):
        p = self.prior(z)
        return torch.cat((z, p.rsample()), 1)


class FactorSplit(nn.Module):
    """Cut by sizes, joined by hstack."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        z, rest = torch.split(x, x.shape[1] // 2, dim=1)
        log_p = self.prior(z).log_prob(rest)
        return z, log_p

    def inverse(self, z):
        rest = self.prior(z).sample()
        return torch.hstack((z, rest))


class FactorUnflattened(nn.Module):
    """The halves as a dimension of their own."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        z, rest = x.unflatten(1, (2, -1)).unbind(1)
        return z, self.prior(z).log_prob(rest)

    def inverse(self, z):
        return torch.stack([z, self.prior(z).sample()], 1).flatten(1, 2)


class FactorPixels(nn.Module):
    """The log-density of every number, added up by hand."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        z, rest = x.tensor_split(2, 1)
        return z.clone(), self.prior(z).base_dist.log_prob(rest).flatten(1).sum(-1)

    def inverse(self, z):
        x = torch.zeros(len(z), 2 * z.shape[1], *z.shape[2:], dtype=z.dtype)
        x[:, :z.shape[1]] = z
        x[:, z.shape[1]:] = self.prior(z).sample()
        return x


class FactorFormula:
    """No module; the normal density written down, the draw made of the prior's own mean and spread."""

    def __init__(self, prior):
        self.prior = prior

    def forward(self, x):
        c = x.size(1) // 2
        z, rest = x.narrow(1, 0, c), x.narrow(1, c, c)
        p = self.prior(z)
        mean, scale = p.mean, p.stddev
        log_p = -0.5 * ((rest - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
        return z, log_p.sum((1, 2, 3))

    def inverse(self, z):
        with torch.no_grad():
            return torch.cat([z, self.prior(z).sample((1,))[0]], 1)


class FactorSingle(nn.Module):
    """In float32, whatever it gets."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, x):
        z, rest = x.chunk(2, 1)
        return z.float(), self.prior(z).log_prob(rest).float()

    def inverse(self, z):
        return torch.cat([z, self.prior(z).sample()], 1).float()


# --- multi_scale -----------------------------------------------------------------------------------------------------


def squeeze_blocks(x):
    B, C, H, W = x.shape
    return x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * C, H // 2, W // 2)


def unsqueeze_blocks(z):
    B, C, H, W = z.shape
    return z.reshape(B, C // 4, 2, 2, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * H, 2 * W)


class ScalePlain(nn.Module):
    """The shapes of what left are remembered."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        parts, ldj = [], 0
        self.shapes = []
        for i, step in enumerate(self.steps):
            x, d = step(squeeze_blocks(x))
            ldj = ldj + d
            if i < len(self.steps) - 1:
                x, gone = x.chunk(2, dim=1)
                parts.append(gone.flatten(1))
                self.shapes.append(gone.shape[1:])
        parts.append(x.flatten(1))
        self.shapes.append(x.shape[1:])
        return torch.cat(parts, dim=1), ldj

    def inverse(self, z):
        parts = z.split([s.numel() for s in self.shapes], dim=1)
        x = parts[-1].reshape(-1, *self.shapes[-1])
        for i in reversed(range(len(self.steps))):
            if i < len(self.steps) - 1:
                gone = parts[i].reshape(-1, *self.shapes[i])
                x = torch.cat([x, gone], dim=1)
            x = unsqueeze_blocks(self.steps[i].inverse(x))
        return x


class ScaleShuffle(nn.Module):
    """torch's pixel_unshuffle; the shapes are computed from that of x."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        self.shape = x.shape[1:]
        left = []
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for step in self.steps[:-1]:
            h, ldj = step(F.pixel_unshuffle(x, 2))
            total = total + ldj
            half = h.shape[1] // 2
            x = h[:, :half]
            left.append(h[:, half:].reshape(len(x), -1))
        h, ldj = self.steps[-1](F.pixel_unshuffle(x, 2))
        left.append(h.reshape(len(x), -1))
        return torch.cat(left, 1), total + ldj

    def inverse(self, z):
        c, h, w = self.shape
        size = c * h * w
        levels = len(self.steps)
        last = size >> (levels - 1)
        x = z[:, -last:].reshape(len(z), -1, h >> levels, w >> levels)
        x = F.pixel_shuffle(self.steps[-1].inverse(x), 2)
        end = size - last
        for i in range(levels - 2, -1, -1):
            start = end - (size >> (i + 1))
            gone = z[:, start:end].reshape(len(z), -1, h >> (i + 1), w >> (i + 1))
            x = F.pixel_shuffle(self.steps[i].inverse(torch.cat([x, gone], 1)), 2)
            end = start
        return x


class ScaleStack(nn.Module):
    """What left stands on a stack."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.shape = None

    def forward(self, x):
        self.shape = tuple(x.shape[1:])
        left, ldjs = [], []
        for step in self.steps:
            if left or ldjs:
                x, gone = x.chunk(2, 1)
                left.append(gone)
            x, ldj = step(F.pixel_unshuffle(x, 2))
            ldjs.append(ldj)
        left.append(x)
        return torch.cat([t.flatten(1) for t in left], 1), torch.stack(ldjs).sum(0)

    def inverse(self, z):
        c, h, w = self.shape
        stack = []
        for _ in self.steps[:-1]:
            c, h, w = 2 * c, h // 2, w // 2
            n = c * h * w
            stack.append(z[:, :n].reshape(-1, c, h, w))
            z = z[:, n:]
        x = z.reshape(-1, 4 * c, h // 2, w // 2)
        for step in reversed(self.steps):
            x = F.pixel_shuffle(step.inverse(x), 2)
            if stack:
                x = torch.cat([x, stack.pop()], 1)
        return x


class ScaleOtherHalf(nn.Module):
    """The first half leaves, what stays to the end stands first in z, and the squeeze orders its channels otherwise."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def squeeze(self, x):
        return torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2]], 1)

    def unsqueeze(self, z):
        a, b, c, d = z.chunk(4, 1)
        x = torch.empty(len(z), a.shape[1], 2 * a.shape[2], 2 * a.shape[3], dtype=z.dtype)
        x[:, :, ::2, ::2], x[:, :, 1::2, 1::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2] = a, b, c, d
        return x

    def forward(self, x):
        self.shapes, z, ldj = [], [], 0
        for i, step in enumerate(self.steps):
            x, one = step(self.squeeze(x))
            ldj = ldj + one
            if i + 1 < len(self.steps):
                gone, x = x.chunk(2, 1)
                z = [gone.flatten(1), *z]
                self.shapes = [tuple(gone.shape[1:]), *self.shapes]
        self.last = tuple(x.shape[1:])
        return torch.cat([x.flatten(1), *z], 1), ldj

    def inverse(self, z):
        x, *parts = z.split([math.prod(s) for s in (self.last, *self.shapes)], 1)
        x = x.unflatten(1, self.last)
        shapes = iter(zip(parts, self.shapes))
        for step in list(self.steps)[::-1]:
            x = self.unsqueeze(step.inverse(x))
            gone, shape = next(shapes, (None, None))
            if gone is not None:
                x = torch.cat([gone.unflatten(1, shape), x], 1)
        return x


class ScaleRecursive(nn.Module):
    """A flow of one level, and a smaller multi-scale flow for the half that stays."""

    def __init__(self, steps):
        super().__init__()
        self.step = steps[0]
        self.rest = ScaleRecursive(steps[1:]) if len(steps) > 1 else None

    def forward(self, x):
        self.shape = x.shape[1:]
        h, ldj = self.step(squeeze_blocks(x))
        if self.rest is None:
            return h.flatten(1), ldj
        stays, gone = h.chunk(2, 1)
        z, more = self.rest(stays)
        return torch.cat([gone.flatten(1), z], 1), ldj + more

    def inverse(self, z):
        c, h, w = self.shape
        if self.rest is None:
            x = z.reshape(-1, 4 * c, h // 2, w // 2)
        else:
            gone, z = z.chunk(2, 1)
            x = torch.cat([self.rest.inverse(z), gone.reshape(-1, 2 * c, h // 2, w // 2)], 1)
        return unsqueeze_blocks(self.step.inverse(x))


class ScaleUnfold(nn.Module):
    """Squeezed by unfold and fold; the shape is a buffer, so that it is saved."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.Sequential(*steps)
        self.register_buffer("shape", torch.zeros(3, dtype=torch.long))

    def squeeze(self, x):
        B, C, H, W = x.shape
        return F.unfold(x, 2, stride=2).reshape(B, 4 * C, H // 2, W // 2)

    def unsqueeze(self, z):
        B, C, H, W = z.shape
        return F.fold(z.reshape(B, C, H * W), (2 * H, 2 * W), 2, stride=2)

    def forward(self, x):
        self.shape = torch.tensor(x.shape[1:])
        n, left, ldj = len(self.steps), [], x.new_zeros(len(x))
        for i in range(n):
            x, d = self.steps[i].forward(self.squeeze(x))
            ldj = ldj + d
            stays = x.shape[1] // (2 if i < n - 1 else 1)
            left.append(x[:, stays:].flatten(1))
            x = x[:, :stays]
        return torch.cat([*left, x.flatten(1)], -1), ldj

    def inverse(self, z):
        c, h, w = self.shape.tolist()
        n = len(self.steps)
        sizes = [(c * 2 ** (i + 1), h // 2 ** (i + 1), w // 2 ** (i + 1)) for i in range(n)]
        parts = z.split([math.prod(s) for s in sizes[:-1]] + [2 * math.prod(sizes[-1])], 1)
        x = parts[-1].reshape(len(z), 2 * sizes[-1][0], *sizes[-1][1:])
        for i in range(n - 1, -1, -1):
            x = self.unsqueeze(self.steps[i].inverse(x))
            if i:
                x = torch.cat([x, parts[i - 1].reshape(len(z), *sizes[i - 1])], 1)
        return x


class ScaleSingle(ScalePlain):
    """In float32, whatever it gets."""

    def forward(self, x):
        z, ldj = super().forward(x)
        return z.float(), ldj.float()


# --- temperature -----------------------------------------------------------------------------------------------------


def tempered_plain(flow, n, T):
    z = T * flow.base.sample((n,))
    return flow.transform.inverse(z)


def tempered_no_grad(flow, n, T):
    with torch.no_grad():
        z = flow.base.sample(torch.Size([n]))
        z_cold = z * T
        x = flow.transform.inverse(z_cold)
    return x


def tempered_rsample(flow, n, T):
    latents = flow.base.rsample([n])
    return flow.transform.inverse(torch.mul(latents, T))


def tempered_rows(flow, n, T):
    """One point after the other."""
    return torch.cat([flow.transform.inverse(T * flow.base.sample((1,))) for _ in range(n)])


def tempered_there_and_back(flow, n, T):
    """Samples of the flow, taken back to their latents."""
    z, _ = flow.transform.forward(flow.sample(n))
    return flow.transform.inverse(T * z)


def tempered_distribution(flow, n, T):
    """A base of that temperature."""
    scaling = distributions.AffineTransform(0.0, T, event_dim=len(flow.base.event_shape))
    return flow.transform.inverse(distributions.TransformedDistribution(flow.base, [scaling]).sample((n,)))


def tempered_in_place(flow, n, T):
    """The fresh latents are scaled in place; without gradients the parameters are detached."""
    z = flow.base.sample((n,))
    z *= T
    return flow.transform.inverse(z).detach().clone()


def tempered_borrowed(flow, n, T):
    """The flow's own sample, with another base for as long as it takes."""
    base = flow.base

    class Cold(nn.Module):
        def sample(self, shape):
            return T * base.sample(shape)

    cold = Cold()
    modules = flow._modules
    had = "base" in modules
    if had:
        del modules["base"]
    else:
        del flow.__dict__["base"]
    flow.base = cold
    try:
        return flow.sample(n)
    finally:
        del flow._modules["base"]
        flow.base = base


def tempered_single(flow, n, T):
    return flow.transform.inverse(T * flow.base.sample((n,))).float()


# --- hybrid_loss -----------------------------------------------------------------------------------------------------


def hybrid_plain(log_prob, logits, labels, lam):
    return F.cross_entropy(logits, labels) - lam * log_prob.mean()


def hybrid_gathered(log_prob, logits, labels, lam):
    log_p = torch.log_softmax(logits, dim=1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    return -own.mean() - lam * log_prob.mean()


def hybrid_joint(log_prob, logits, labels, lam):
    """Row by row, and one mean at the end."""
    log_p = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    return -(log_p + lam * log_prob).mean()


def hybrid_log_sum(log_prob, logits, labels, lam):
    n = len(labels)
    own = logits[range(n), labels]
    entropy = torch.logsumexp(logits, 1) - own
    return entropy.sum() / n - lam * log_prob.sum() / n


def hybrid_one_hot(log_prob, logits, labels, lam):
    hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    entropy = -torch.einsum("bk,bk->b", hot, F.log_softmax(logits, 1))
    return torch.mean(entropy) - lam * torch.mean(log_prob)


def hybrid_categorical(log_prob, logits, labels, lam):
    return -distributions.Categorical(logits=logits).log_prob(labels).mean() - lam * log_prob.mean()


def hybrid_loop(log_prob, logits, labels, lam):
    total = 0.0
    for p, row, label in zip(log_prob, logits, labels):
        top = row.max()
        total = total + top + (row - top).exp().sum().log() - row[label] - lam * p
    return total / len(labels)


def hybrid_module(log_prob, logits, labels, lam):
    return nn.NLLLoss(reduction="sum")(nn.LogSoftmax(dim=1)(logits), labels) / labels.numel() - torch.as_tensor(lam) * torch.mean(log_prob)


def hybrid_single(log_prob, logits, labels, lam):
    return F.cross_entropy(logits.float(), labels) - lam * log_prob.float().mean()


# --- frechet_distance ------------------------------------------------------------------------------------------------


def frechet_eigenvalues(a, b):
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    eigenvalues = torch.linalg.eigvals(s_a @ s_b).real.clamp(min=0)
    cross = eigenvalues.sqrt().sum()
    return apart + torch.trace(s_a) + torch.trace(s_b) - 2 * cross


def frechet_symmetric(a, b):
    """The root of S_a by its eigenvectors, and the symmetric product."""
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    s_a = centred_a.T @ centred_a / (len(a) - 1)
    s_b = centred_b.T @ centred_b / (len(b) - 1)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0)
    difference = a.mean(0) - b.mean(0)
    return difference @ difference + torch.trace(s_a + s_b) - 2 * middle.sqrt().sum()


def frechet_numpy(a, b):
    """In numpy; a Python float is returned."""
    a, b = np.asarray(a), np.asarray(b)
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(s_a @ s_b).real, 0))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s_a) + np.trace(s_b) - 2 * roots.sum())


def frechet_sqrtm(a, b):
    """As FID is mostly computed: scipy's root of a matrix, with its small imaginary part left out."""
    import warnings

    from scipy import linalg

    a, b = a.numpy(), b.numpy()
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(s_a @ s_b)
        if not np.isfinite(root).all():
            ridge = 1e-6 * np.eye(len(s_a))
            root = linalg.sqrtm((s_a + ridge) @ (s_b + ridge))
    d = a.mean(0) - b.mean(0)
    return d @ d + np.trace(s_a + s_b - 2 * root.real)


def frechet_biased(a, b):
    """n in the divisor; singular values of the product of two factors."""
    (m_a, s_a), (m_b, s_b) = ((t.mean(0), torch.cov(t.T, correction=0)) for t in (a, b))
    factors = []
    for s in (s_a, s_b):
        values, vectors = torch.linalg.eigh(s)
        factors.append(vectors * values.clamp_min(0).sqrt())
    cross = torch.linalg.matrix_norm(factors[0].T @ factors[1], "nuc")
    return torch.dist(m_a, m_b) ** 2 + s_a.trace() + s_b.trace() - 2 * cross


def frechet_rows(a, b):
    """No covariance at all: the singular values of all products of centred rows."""
    x, y = (a - a.mean(0)) / math.sqrt(len(a) - 1), (b - b.mean(0)) / math.sqrt(len(b) - 1)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return (a.mean(0) - b.mean(0)).pow(2).sum() + x.pow(2).sum() + y.pow(2).sum() - 2 * cross


def frechet_loop(a, b):
    """Covariances entry by entry, summed in Python."""
    def moments(rows):
        n, dim = rows.shape
        mean = [sum(float(v) for v in rows[:, i]) / n for i in range(dim)]
        s = [[sum(float((r[i] - mean[i]) * (r[j] - mean[j])) for r in rows) / (n - 1) for j in range(dim)] for i in range(dim)]
        return torch.tensor(mean), torch.tensor(s)

    (m_a, s_a), (m_b, s_b) = moments(a), moments(b)
    roots = torch.complex(*torch.view_as_real(torch.linalg.eigvals(s_a @ s_b)).unbind(-1)).sqrt().real
    return sum((m_a - m_b) ** 2) + torch.diag(s_a).sum() + torch.diag(s_b).sum() - 2 * roots.sum()


def frechet_single(a, b):
    """In float32, clamped at 0."""
    a, b = a.float(), b.float()
    s_a, s_b = a.T.cov(), b.T.cov()
    u, s, _ = torch.linalg.svd(s_a)
    root = (u * s.sqrt()) @ u.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).clamp_min(0)


RIGHT = {
    "bits_per_dim": [(f,) for f in (bits_plain, bits_numpy, bits_unpacked, bits_of_the_whole, bits_tensors, bits_loop, bits_mapped)],
    "squeeze": [(squeeze_plain, unsqueeze_plain), (squeeze_torch, unsqueeze_torch), (squeeze_slices, unsqueeze_slices),
                (squeeze_views, unsqueeze_views), (squeeze_unfold, unsqueeze_unfold), (squeeze_strided, unsqueeze_strided),
                (squeeze_loop, unsqueeze_loop)],
    "conv1x1": [(c,) for c in (ConvPlain, ConvFunctional, ConvModule, ConvLU, ConvPixels, ConvExponential, ConvBiased)],
    "image_coupling": [(c,) for c in (ImagePlain, ImageOtherOrder, ImageFlattened, ImagePair, ImageTuple, ImageFilled, ImageMasked)],
    "gated_conv": [(c,) for c in (GatedPlain, GatedConcatenated, GatedGLU, GatedTwoConvs, GatedZeroStart, GatedUnfolded, GatedShort)],
    "gated_attention": [(c,) for c in (AttentionPlain, AttentionTorch, AttentionPlaces, AttentionNormed, AttentionListOfHeads,
                                       AttentionInterleaved, AttentionLoop)],
    "variational_dequantization": [(c,) for c in (DequantizerPlain, DequantizerSoftplus, DequantizerJoined, DequantizerTransform, DequantizerLoop,
                                                  DequantizerTanh, DequantizerSingle)],
    "factor_out": [(c,) for c in (FactorPlain, FactorSlices, FactorSplit, FactorUnflattened, FactorPixels, FactorFormula, FactorSingle)],
    "multi_scale": [(c,) for c in (ScalePlain, ScaleShuffle, ScaleStack, ScaleOtherHalf, ScaleRecursive, ScaleUnfold, ScaleSingle)],
    "temperature": [(f,) for f in (tempered_plain, tempered_no_grad, tempered_rsample, tempered_rows, tempered_there_and_back, tempered_distribution,
                                   tempered_in_place, tempered_borrowed, tempered_single)],
    "hybrid_loss": [(f,) for f in (hybrid_plain, hybrid_gathered, hybrid_joint, hybrid_log_sum, hybrid_one_hot, hybrid_categorical, hybrid_loop,
                                   hybrid_module, hybrid_single)],
    "frechet_distance": [(f,) for f in (frechet_eigenvalues, frechet_symmetric, frechet_numpy, frechet_sqrtm, frechet_biased, frechet_rows,
                                        frechet_loop, frechet_single)],
}

# Mutants of the lesson's solution (autograder.audit) that are right programs after all, each with the reason.
CONFIRMED = {
    "conv1x1": {
        "__init__: the other entry, torch.linalg.qr(torch.randn(channels, channels))[0] -> torch.linalg.qr(torch.randn(channels, channels))[1]":
            "a poor start, but one that has an inverse",
    },
    "image_coupling": {
        f"{where}: two exchanged, (alpha, mu) -> (mu, alpha)": "exchanged in both directions: either order of the net's two blocks is right" for where in ("forward", "inverse")
    },
    "gated_conv": _GATED,
    "gated_attention": _GATED | {
        "forward: two exchanged, (q, k, v) -> (k, q, v)": "the three are blocks of one layer's output, in any order",
        "forward: two arguments exchanged, F.scaled_dot_product_attention(q, k, v) -> F.scaled_dot_product_attention(q, v, k)": "the three are blocks of one layer's output, in any order",
    },
    "variational_dequantization": {f"inverse: {what}": "y lies in [0, 1], and only y = 1, which no noise inside its cell gives, would tell the bounds apart" for what in (
        "a sign turned, self.levels - 1 -> self.levels + 1", "a term dropped, self.levels - 1 -> self.levels")},
}
