"""Nets that give layers their parameters. They may be any function: a flow never inverts its nets.

An autoregressive net is one whose output at a coordinate sees the coordinates before it and nothing else; here that is
reached by masks (MADE, PixelCNN), by padding on one side (WaveNet) or by masked attention (transformer). Its output has P
parameters for each coordinate, in blocks: column p * D + i of a vector (or channel p * C + c) is parameter p of
coordinate i (channel c). `event_dims` says what a point is: 1 a vector (..., D), 2 a sequence (B, C, L), 3 an image (B,
C, H, W). `passes(shape)` lists, in the order in which sampling fills them, the groups of flattened coordinates that one
evaluation of the net makes known.

MADE: Germain et al. 2015. WaveNet: van den Oord et al. 2016, "WaveNet", section 2. PixelCNN: van den Oord et al. 2016,
"Pixel Recurrent Neural Networks", section 3.4. Transformer: Vaswani et al. 2017, section 3.2. Gated blocks: Ho et al.
2019, "Flow++", section 3.3. The classifier at the end parametrises nothing: it judges samples.
"""
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from .core import check_input


class MLP(nn.Sequential):
    """A fully connected net (..., d_in) -> (..., d_out) with `activation` after each hidden layer.

    The default is bounded, so far from the data the parameters level off instead of growing without end.
    `zero_last` starts the last layer at zero, so that a coupling starts as the identity (Glow, section 3.3).
    `spread` = (slope, reach) starts the units of the first layer as steps activation(slope (v.x - c)), where v is a random
    direction and the places c are spread evenly over [-reach, reach]: the data see steep steps everywhere from the start, where
    torch's usual start has flat ones near 0 and sharp edges take long to learn. For bounded activations: steep ReLUs grow without end.
    """

    def __init__(self, d_in, d_out, hidden=(64, 64), activation=nn.Tanh, zero_last=False, spread=None):
        layers = []
        for a, b in pairwise((d_in, *hidden)):
            layers += [nn.Linear(a, b), activation()]
        last = nn.Linear((d_in, *hidden)[-1], d_out)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        if spread is not None and hidden:
            slope, reach = spread
            with torch.no_grad():
                way = F.normalize(torch.randn_like(self[0].weight), dim=1)
                place = torch.linspace(-reach, reach, hidden[0])[torch.randperm(hidden[0])]
                self[0].weight.copy_(slope * way)
                self[0].bias.copy_(-slope * place)


def made_degrees(dim, hidden, order=None, context=False):
    """The degrees of a MADE's layers: a unit of degree m may see the first m coordinates of the `order`.

    Inputs have the degrees 1 .. dim, hidden units 1 .. dim - 1 evenly and rising (from 0 if there is a context, which
    units of degree 0 carry to the first coordinate). Returns one LongTensor for the inputs and one for each hidden layer.
    """
    # On the CPU whatever the default device, since these numbers are read by Python.
    order = torch.arange(dim, device="cpu") if order is None else torch.as_tensor(order).cpu()
    if sorted(order.tolist()) != list(range(dim)):
        raise ValueError(f"order must be a permutation of 0 .. {dim - 1}, got {order.tolist()}")
    low = 0 if context else 1
    span = max(1, dim - low)
    return [order.argsort() + 1] + [low + torch.arange(width, device="cpu") * span // width for width in hidden]


def made_masks(dim, hidden, out_per_dim, order=None, context=False):
    """The masks of a MADE, each (out, in) of zeros and ones: hidden units see degrees <= their own, outputs degrees <
    their own.

    dim: number D of coordinates; hidden: the widths; out_per_dim: P outputs for each coordinate, column p * D + i of
    coordinate i. The product of all masks is strictly lower triangular in each block; if all widths are >= D - 1, each
    path that may be open is.
    """
    degrees = made_degrees(dim, hidden, order, context)
    masks = [below[None, :] <= above[:, None] for below, above in pairwise(degrees)]
    masks.append(degrees[-1][None, :] < degrees[0].repeat(out_per_dim)[:, None])
    return [mask.to(torch.get_default_device(), torch.get_default_dtype()) for mask in masks]


class MADE(nn.Module):
    """Masked autoencoder: (..., D) -> (..., P D), the P parameters of coordinate i seeing only the coordinates before i
    in `order`.

    `params`: P, a scalar map's num_params. `order`: a permutation of 0 .. D-1, order[0] being the first coordinate
    (default: as they stand). With `context` = d_c, a context (..., d_c) enters the first hidden layer and reaches every
    coordinate.
    """
    event_dims = 1

    def __init__(self, dim, params, hidden=(64, 64), order=None, activation=nn.Tanh, context=None):
        super().__init__()
        if len(hidden) == 0:
            raise ValueError("hidden must hold at least one width, got ()")
        self.dim, self.params, self.activation = dim, params, activation()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((dim, *hidden, params * dim)))
        for i, mask in enumerate(made_masks(dim, hidden, params, order, context is not None)):
            self.register_buffer(f"mask_{i}", mask)
        self.context = None if context is None else nn.Linear(context, hidden[0], bias=False)
        degrees = made_degrees(dim, hidden, order, context is not None)
        self.register_buffer("order", degrees[0].argsort().to(torch.get_default_device()))
        # _known[l][k]: how many units of hidden layer l are known once the first k coordinates are
        self._known = [[int((layer <= k).sum()) for k in range(dim)] for layer in degrees[1:]]

    def _masked(self, i):
        return self.layers[i].weight * getattr(self, f"mask_{i}")

    def _context(self, context):
        if (context is None) != (self.context is None):
            raise ValueError(f"context must {'not be given to' if self.context is None else 'be given to'} this MADE, got "
                             f"{'one' if self.context is None else 'none'}")
        return None if context is None else self.context(context)

    def forward(self, x, context=None):
        check_input(x, dim=self.dim)
        h, shift = F.linear(x, self._masked(0), self.layers[0].bias), self._context(context)
        if shift is not None:
            h = h + shift
        for i in range(1, len(self.layers)):
            h = F.linear(self.activation(h), self._masked(i), self.layers[i].bias)
        return h

    def unroll(self, like, context=None):
        """A generator that yields (i, params of coordinate i) in order, and is sent x_i, for the points `like` (N, D).

        Sampling takes D turns, yet each hidden unit is computed once only, when the coordinates that it may see are known;
        so all turns together cost about one evaluation. params is (N, P), x_i (N, 1).
        """
        order, rest = self.order.tolist(), self.layers[1:]
        weights = [self._masked(i) for i in range(len(self.layers))]
        # Units are kept in rows, since new rows are appended faster than new columns.
        shift = self._context(context)
        x, hidden = like.new_zeros(0, len(like)), [like.new_zeros(0, len(like)) for _ in rest]
        for k, i in enumerate(order):
            below, columns = x, order[:k]
            for layer, known in enumerate(self._known):
                new = slice(len(hidden[layer]), known[k])
                if new.stop > new.start:
                    weight = weights[layer][new][:, columns] if layer == 0 else weights[layer][new, :len(below)]
                    h = torch.addmm(self.layers[layer].bias[new, None], weight, below)
                    if layer == 0 and shift is not None:
                        h = h + shift[:, new].T
                    hidden[layer] = torch.cat([hidden[layer], self.activation(h)])
                below = hidden[layer]
            rows = slice(i, None, self.dim)
            params = torch.addmm(self.layers[-1].bias[rows, None], weights[-1][rows, :len(below)], below)
            x_i = yield i, params.T
            x = torch.cat([x, x_i.T])


class CausalConv1d(nn.Conv1d):
    """1D convolution that sees t, t - dilation, t - 2 dilation, ... and nothing later: (B, c_in, L) -> (B, c_out, L).

    With `exclusive` it sees t - 1, t - 1 - dilation, ...: one such layer below makes a whole stack blind to the present.
    """

    def __init__(self, c_in, c_out, kernel_size, dilation=1, exclusive=False):
        super().__init__(c_in, c_out, kernel_size, dilation=dilation)
        self.exclusive = exclusive

    def forward(self, x):
        reach = (self.kernel_size[0] - 1) * self.dilation[0]
        return super().forward(F.pad(x, (reach + 1, -1) if self.exclusive else (reach, 0)))


def pixelcnn_mask(kind, channels, kernel_size):
    """The mask (channels, channels, k, k), [out, in], of a PixelCNN convolution: rows above and pixels to the left are open.

    At the centre, kind "A" lets an output channel see the input channels before it (in < out), "B" also its own (in <= out).
    """
    return _pixel_mask(kind, torch.arange(channels), torch.arange(channels), kernel_size)


def _pixel_mask(kind, out_group, in_group, k):
    """The mask for units that belong to the data channels `out_group` and `in_group`."""
    if kind not in ("A", "B") or k % 2 == 0:
        raise ValueError(f"kind must be 'A' or 'B' and kernel_size odd, got {kind!r} and {k}")
    past = (torch.arange(k * k) < k * k // 2).reshape(k, k).to(torch.get_default_dtype())
    mask = past.repeat(len(out_group), len(in_group), 1, 1)
    seen = in_group[None, :] < out_group[:, None] if kind == "A" else in_group[None, :] <= out_group[:, None]
    mask[:, :, k // 2, k // 2] = seen.to(mask.dtype)
    return mask


class MaskedConv2d(nn.Conv2d):
    """A PixelCNN convolution (B, c_in, H, W) -> (B, c_out, H, W) of kind "A" or "B" that keeps H and W.

    `in_group`, `out_group`: to which data channel each unit belongs, LongTensors of c_in and c_out entries.
    """

    def __init__(self, kind, in_group, out_group, kernel_size):
        super().__init__(len(in_group), len(out_group), kernel_size, padding=kernel_size // 2)
        self.register_buffer("mask", _pixel_mask(kind, out_group, in_group, kernel_size))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class _Raster(nn.Module):
    """Shows a net the points of any kind as sequences (N, C, L) or images (N, C, 1, L), and its answer as parameters."""

    def __init__(self, channels, event_dims):
        super().__init__()
        if event_dims not in (1, 2, 3) or (event_dims == 1 and channels != 1):
            raise ValueError("event_dims must be 1 (vectors, with channels = 1), 2 (sequences) or 3 (images), got "
                             f"event_dims = {event_dims} and channels = {channels}")
        self.channels, self.event_dims = channels, event_dims

    def _points(self, x):
        check_input(x)
        if self.event_dims > 1 and (x.ndim != self.event_dims + 1 or x.shape[1] != self.channels):
            wanted = {2: "(B, C, L)", 3: "(B, C, H, W)"}[self.event_dims]
            raise ValueError(f"x must have shape {wanted} with C = {self.channels}, got {tuple(x.shape)}")
        return x.reshape(-1, 1, x.shape[-1]) if self.event_dims == 1 else x

    def _params(self, out, x):
        if self.event_dims == 1:
            return out.reshape(*x.shape[:-1], out.shape[1] * x.shape[-1])
        return out.reshape(len(x), out.shape[1], *x.shape[2:])

    def passes(self, shape):
        """All channels of a place at once, place after place."""
        places = math.prod(shape) // self.channels
        return [[c * places + t for c in range(self.channels)] for t in range(places)]


class WaveNet(_Raster):
    """Dilated causal convolutions as a conditioner: gated residual blocks with dilations 1, 2, 4, ..., blind to the present.

    The P parameters of each of the C channels at time t see all channels at times before t, as far back as
    `receptive_field`; channels at one time do not see each other, so sampling takes L passes. `event_dims`: 2 for (B, C,
    L); 1 for vectors, 3 for images in raster order.
    """

    def __init__(self, channels, params, width=32, blocks=4, kernel_size=2, event_dims=2):
        super().__init__(channels, event_dims)
        self.receptive_field = kernel_size + (kernel_size - 1) * (2 ** blocks - 1)
        self.first = CausalConv1d(channels, width, kernel_size, exclusive=True)
        self.gates = nn.ModuleList(CausalConv1d(width, 2 * width, kernel_size, dilation=2 ** i) for i in range(blocks))
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(blocks))
        self.last = nn.Conv1d(width, params * channels, 1)

    def forward(self, x):
        h = self.first(self._points(x).flatten(2))
        total = h
        for gate, mix in zip(self.gates, self.mixes):
            filtered, opening = gate(h).chunk(2, 1)
            step = mix(torch.tanh(filtered) * torch.sigmoid(opening))
            h, total = h + step, total + step
        return self._params(self.last(torch.tanh(total)), x)


class PixelCNN(_Raster):
    """Masked convolutions as a conditioner for images (B, C, H, W), in raster order and channel after channel at each pixel.

    A first convolution of kind A and `blocks` residual ones of kind B. Sampling takes C H W passes. Of the past, the
    pixels far to the right in the rows above stay unseen (the blind spot). `event_dims`: 3 for images; 2 for sequences, 1
    for vectors, as images of height 1.
    """

    def __init__(self, channels, params, width=8, blocks=3, kernel_size=3, event_dims=3):
        super().__init__(channels, event_dims)
        data = torch.arange(channels)
        hidden = data.repeat_interleave(width)
        self.first = MaskedConv2d("A", data, hidden, 2 * kernel_size + 1)
        self.middle = nn.ModuleList(MaskedConv2d("B", hidden, hidden, kernel_size) for _ in range(blocks))
        self.last = MaskedConv2d("B", hidden, data.repeat(params), 1)

    def forward(self, x):
        points = self._points(x)
        h = self.first(points if self.event_dims == 3 else points[:, :, None])
        for conv in self.middle:
            h = h + conv(torch.tanh(h))
        return self._params(self.last(torch.tanh(h)), x)

    def passes(self, shape):
        """One channel of one pixel a pass."""
        return [[i] for place in super().passes(shape) for i in place]


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v where position t attends to the positions <= t; q, k, v (..., L, d), result (..., L, d)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MaskedTransformer(_Raster):
    """A transformer with masked attention as a conditioner: what stands at t sees all places before t, however far.

    The input is shifted by one place, so that attending to places <= t looks at data before t. Positions are told by
    sinusoids, so any length will do. `event_dims`: 1 for vectors (..., D), 2 for (B, C, L), 3 for images in raster order;
    sampling takes as many passes as there are places.
    """

    def __init__(self, channels, params, width=32, heads=4, blocks=2, event_dims=1):
        super().__init__(channels, event_dims)
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of 2 heads, got {width} and {heads} heads")
        self.heads, self.embed = heads, nn.Linear(channels, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "mix": nn.Linear(width, width),
            "mlp": nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        }) for _ in range(blocks))
        self.last = nn.Linear(width, params * channels)

    def forward(self, x):
        tokens = F.pad(self._points(x).flatten(2), (1, -1)).transpose(1, 2)
        h = self.embed(tokens)
        h = h + _sinusoids(h)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](h)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
            h = h + block["mix"](causal_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + block["mlp"](h)
        return self._params(self.last(h).transpose(1, 2), x)


def _sinusoids(h):
    """Sines and cosines (L, width) of the positions, at wavelengths from 2 pi to 20,000 pi; Vaswani et al. 2017, section
    3.5.
    """
    length, width = h.shape[-2:]
    rate = torch.exp(torch.arange(0, width, 2, dtype=h.dtype, device=h.device) * (-math.log(10_000) / width))
    angle = torch.arange(length, dtype=h.dtype, device=h.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


class GatedConv(nn.Module):
    """Flow++'s convolutional block, (B, C, H, W) to the same: x + u * sigmoid(g) with (u, g) from a 3x3 and a gating 1x1
    convolution, between them a `dropout` of that probability.
    """

    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 1)
        self.dropout = dropout

    def forward(self, x):
        h = F.dropout(F.elu(self.conv(F.elu(x))), self.dropout, self.training)
        u, g = self.gate(h).chunk(2, 1)
        return x + u * torch.sigmoid(g)


class GatedAttention(nn.Module):
    """Flow++'s attention block, (B, C, H, W) to the same: x + u * sigmoid(g) with (u, g) from self-attention among all pixels.

    `heads` must divide C. It knows no positions; the net around it may append them to its input.
    """

    def __init__(self, channels, heads=4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        self.heads = heads
        self.qkv, self.gate = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3 * self.heads, -1)).transpose(-1, -2).chunk(3, 1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[2:])
        u, g = self.gate(mixed).chunk(2, 1)
        return x + u * torch.sigmoid(g)


class FlowPPNet(nn.Module):
    """Flow++'s conditioner (B, c_in, H, W) -> (B, c_out, H, W): `blocks` of gated convolution and gated attention,
    normalised after each.

    The places of the pixels are appended to the input as two channels in [-1, 1], and so is a context (B, c_context, H,
    W), if there is one. The last convolution starts at a tenth of the usual weights. `heads` = 0 puts a second gated
    convolution in the place of each attention; `dropout` is that of the convolutions.
    """

    def __init__(self, c_in, c_out, width=32, blocks=2, heads=4, context=0, dropout=0.0):
        super().__init__()
        self.first = nn.Conv2d(c_in + context + 2, width, 3, padding=1)
        self.blocks = nn.Sequential(*(layer for _ in range(blocks) for layer in (
            GatedConv(width, dropout), nn.GroupNorm(1, width),
            GatedAttention(width, heads) if heads else GatedConv(width, dropout), nn.GroupNorm(1, width))))
        self.last = nn.Conv2d(width, c_out, 3, padding=1)
        # Near the identity, but not at zero: there all components of a mixture would get the same gradient for ever.
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(self, x, context=None):
        row, column = (torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:])
        places = torch.stack(torch.meshgrid(row, column, indexing="ij")).expand(len(x), -1, -1, -1)
        return self.last(self.blocks(self.first(torch.cat([x, places] if context is None else [x, places, context], 1))))


class ConvClassifier(nn.Module):
    """A small classifier of images, (B, channels, H, W) to logits (B, classes), whose `features` serve a Fréchet distance.

    Three 3x3 convolutions, the second with stride 2; the features (B, 2 width) are the last one's averages over the pixels, and
    the logits are linear in them, as in the Inception net of the FID: Heusel et al. 2017, "GANs Trained by a Two Time-Scale
    Update Rule", section 2.
    """

    def __init__(self, channels, classes, width=32, dropout=0.2):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Dropout2d(dropout), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.last = nn.Linear(2 * width, classes)

    def features(self, x):
        """What the logits are linear in, (B, 2 width)."""
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.last(self.features(x))
