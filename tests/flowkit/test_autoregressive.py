"""Autoregressive flows and their nets: who sees whom, how often the net runs, any order, vectors, sequences and images."""
import math

import pytest
import torch
from layer_laws import of_order_one
from torch.distributions import Categorical, MixtureSameFamily, Normal

from flowkit import (DDSF, DSF, IAF, MADE, MAF, MLP, NAF, Affine, Autoregressive, CategoricalPixels, CausalConv1d, Flow, GatedAffine, Inverse,
                     MaskedConv2d, MaskedTransformer, MixGaussianCDF, PixelCNN, StandardNormal, WaveNet, causal_attention, made_masks,
                     pixelcnn_mask)


def order_one(net, seed=0):
    torch.manual_seed(seed)
    return of_order_one(net.double())


class Counted(torch.nn.Module):
    """A net that counts its evaluations, with all that an autoregressive net may say of itself but `unroll`."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls, self.event_dims = net, 0, net.event_dims
        if hasattr(net, "passes"):
            self.passes = net.passes

    def forward(self, x, *context):
        self.calls += 1
        return self.net(x, *context)


def dependence(net, shape):
    """The 0/1 matrix of which flattened input (column) reaches which flattened coordinate's parameters (row), any of the P."""
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda v: net(v.reshape(1, *shape)).flatten(), x.flatten())
    return (jacobian.unflatten(0, (-1, x.numel())) != 0).any(0)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("hidden", [(8,), (12, 9)])
def test_masks_open_each_path_to_the_past_and_no_other(dim, hidden):
    masks = made_masks(dim, hidden, 3)
    assert [tuple(m.shape) for m in masks] == [(b, a) for a, b in zip((dim, *hidden), (*hidden, 3 * dim))]
    paths = masks[0]
    for mask in masks[1:]:
        paths = mask @ paths
    for block in paths.chunk(3):
        assert torch.equal(block > 0, torch.ones(dim, dim).tril(-1) > 0)


@pytest.mark.parametrize("order", [None, [3, 0, 4, 1, 2]])
def test_made_sees_what_comes_before_in_its_order(order):
    seen = dependence(order_one(MADE(5, 2, (11, 7), order)), (5,))
    place = torch.tensor(order or range(5)).argsort()
    assert torch.equal(seen, place[None, :] < place[:, None])


def test_narrow_layers_never_look_ahead():
    assert not dependence(order_one(MADE(6, 2, (3, 2))), (6,)).triu().any()


def test_context_reaches_every_coordinate():
    net = order_one(MADE(4, 2, (9, 9), context=3))
    x, context = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    by_context = torch.autograd.functional.jacobian(lambda c: net(x, c)[0], context)[:, 0]
    assert (by_context.abs() > 0).all()
    assert not dependence(lambda v: net(v, context), (4,)).triu().any()
    layer = MAF(net)
    x, context = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x, context)[0], context), x)
    # One context for many points, and more than one leading dimension.
    torch.testing.assert_close(layer.inverse(x.reshape(2, 3, 4), context[0])[1, 2], layer.inverse(x[5], context[0]))
    flow = Flow(StandardNormal(4).double(), Inverse(layer))
    points, log_prob = flow.sample_and_log_prob(6, context)
    torch.testing.assert_close(log_prob, flow.log_prob(points, context))
    with pytest.raises(ValueError, match="context must be given to this MADE, got none"):
        net(x)
    with pytest.raises(ValueError, match="context must not be given to this MADE, got one"):
        MADE(4, 2)(x.float(), context.float())


NETS = {
    "transformer": (MaskedTransformer, {"width": 8, "heads": 2}),
    "wavenet": (WaveNet, {"width": 6, "blocks": 3}),
    "pixelcnn": (PixelCNN, {"width": 4, "blocks": 3}),
}
SHAPES = {"vector": (1, (7,)), "sequence": (2, (2, 5)), "image": (2, (2, 3, 4))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NETS)
def test_each_net_conditions_vectors_sequences_and_images(name, shape):
    """Only the past is seen; the flow inverts in the passes that theory says, has the right ldj, and no more passes than that."""
    build, options = NETS[name]
    channels, event = SHAPES[shape]
    net = order_one(build(channels, 2, event_dims=len(event), **options))
    passes = net.passes(event)
    size, places = math.prod(event), math.prod(event) // channels
    assert sorted(i for group in passes for i in group) == list(range(size))
    assert len(passes) == (size if name == "pixelcnn" else places)

    turn = torch.empty(size, dtype=torch.long)
    for k, group in enumerate(passes):
        turn[group] = k
    before = turn[None, :] < turn[:, None]
    seen = dependence(net, event)
    assert not (seen & ~before).any(), "the net looks ahead"
    if name == "transformer":
        assert torch.equal(seen, before)
    elif name == "wavenet":
        back = turn[:, None] - turn[None, :]
        assert torch.equal(seen, before & (back <= net.receptive_field))
    else:
        assert seen[:, 0][1:].any() and (seen & before).sum() > before.sum() * 0.6

    counted = Counted(net)
    layer = Autoregressive(counted, Affine(bound=1))
    x = torch.randn(3, *event, dtype=torch.float64)
    z, ldj = layer(x)
    assert counted.calls == 1 and z.shape == x.shape and ldj.shape == (3,)
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v.reshape(1, *event))[0].flatten(), x[0].flatten())
    torch.testing.assert_close(ldj[0], torch.linalg.slogdet(jacobian)[1])
    counted.calls = 0
    back, ldj_back = layer.inverse_and_ldj(z)
    assert counted.calls == len(passes)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(ldj_back, ldj)


@pytest.mark.parametrize("layer, one, many", [(MAF, "forward", "inverse"), (IAF, "inverse", "forward")])
def test_one_direction_takes_one_pass_and_the_other_d(layer, one, many):
    net = Counted(order_one(MADE(5, 2)))
    flow, x = layer(net), torch.randn(3, 5, dtype=torch.float64)
    getattr(flow, one)(x)
    assert net.calls == 1
    net.calls = 0
    getattr(flow, many)(x)
    assert net.calls == 5
    net.calls = 0
    flow.inverse_and_ldj(x)
    assert net.calls == (1 if layer is IAF else 5)


@pytest.mark.parametrize("order", [None, [3, 0, 4, 1, 2]])
@pytest.mark.parametrize("hidden", [(11,), (16, 3, 9)])
def test_the_unrolled_made_gives_what_d_passes_give(hidden, order):
    net = order_one(MADE(5, 6, hidden, order))
    z = torch.randn(4, 5, dtype=torch.float64)
    net_in_passes = Counted(net)
    net_in_passes.passes = lambda shape: [[i] for i in (order or range(5))]
    for got, want in zip(NAF(net, 2).inverse_and_ldj(z), NAF(net_in_passes, 2).inverse_and_ldj(z)):
        torch.testing.assert_close(got, want)


def test_unrolling_computes_each_unit_once():
    """D turns cost what one evaluation costs, give or take the masked half: the multiplications are counted."""
    net, z = MADE(16, 2, (64, 64)), torch.randn(10, 16)
    from torch.utils.flop_counter import FlopCounterMode
    counts = []
    for run in (net, MAF(net).inverse):
        with FlopCounterMode(display=False) as counter:
            run(z)
        counts.append(counter.get_total_flops())
    assert counts[1] < 1.1 * counts[0]


def test_maf_is_the_product_of_its_gaussian_conditionals():
    net = order_one(MADE(4, 2, order=[2, 0, 3, 1]))
    x = torch.randn(6, 4, dtype=torch.float64)
    alpha, mu = net(x).chunk(2, -1)
    # z = x exp(alpha) + mu is standard normal, so x is normal about -mu exp(-alpha) with deviation exp(-alpha).
    conditionals = Normal(-mu * torch.exp(-alpha), torch.exp(-alpha)).log_prob(x).sum(-1)
    torch.testing.assert_close(Flow(StandardNormal(4).double(), MAF(net)).log_prob(x), conditionals)


def test_made_mog_is_the_product_of_its_mixture_conditionals():
    net = order_one(MADE(3, 12))
    x = torch.cat([torch.randn(6, 3, dtype=torch.float64), torch.full((1, 3), 30.0, dtype=torch.float64)])
    logits, means, log_scales = net(x).unflatten(-1, (3, 4, 3)).transpose(-1, -2).unbind(-3)
    mixture = MixtureSameFamily(Categorical(logits=logits), Normal(means, log_scales.exp()))
    flow = Flow(StandardNormal(3).double(), Autoregressive(net, MixGaussianCDF(4)))
    torch.testing.assert_close(flow.log_prob(x), mixture.log_prob(x).sum(-1), rtol=1e-9, atol=1e-9)


def test_dense_and_deep_naf_of_any_depth():
    for widths in [(1,), (3,), (4, 2), (3, 3, 3)]:
        bend = DDSF(widths)
        layer = Autoregressive(order_one(MADE(3, bend.num_params)), bend)
        x = torch.randn(5, 3, dtype=torch.float64)
        z, ldj = layer(x)
        torch.testing.assert_close(layer.inverse(z), x, rtol=1e-7, atol=1e-7)
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[0])
        torch.testing.assert_close(ldj[0], jacobian.diagonal().log().sum())
        assert torch.equal(jacobian, jacobian.tril())


def test_causal_conv_sees_now_or_stops_before_now():
    for exclusive in (False, True):
        conv = order_one(CausalConv1d(1, 1, 3, dilation=2, exclusive=exclusive))
        seen = dependence(conv, (1, 9))
        lag = torch.arange(9)[:, None] - torch.arange(9)[None, :]
        wanted = [1, 3, 5] if exclusive else [0, 2, 4]
        assert torch.equal(seen, torch.isin(lag, torch.tensor(wanted)))


def test_pixelcnn_masks_by_hand():
    past = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert torch.equal(pixelcnn_mask("A", 1, 3), past[None, None])
    assert pixelcnn_mask("B", 1, 3)[0, 0, 1, 1] == 1
    centre = pixelcnn_mask("A", 3, 5)[:, :, 2, 2]
    assert torch.equal(centre, torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0]]))
    assert torch.equal(pixelcnn_mask("B", 3, 5)[:, :, 2, 2], torch.ones(3, 3).tril())
    a, b = pixelcnn_mask("A", 2, 1), pixelcnn_mask("B", 2, 1)
    assert a.flatten().tolist() == [0, 0, 1, 0] and b.flatten().tolist() == [1, 0, 1, 1]


def test_causal_attention_against_its_formula():
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    scores = q @ k.transpose(-1, -2) / 2 + torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
    torch.testing.assert_close(causal_attention(q, k, v), scores.softmax(-1) @ v)


def test_the_gate_never_expands():
    net = order_one(MADE(4, 2))
    jacobian = torch.autograd.functional.jacobian(lambda v: Autoregressive(net, GatedAffine())(v[None])[0][0], torch.randn(4, dtype=torch.float64))
    assert (jacobian.diagonal() < 1).all() and (jacobian.diagonal() > 0).all()


@pytest.mark.parametrize("make, message", [
    (lambda: MAF(MLP(4, 5))(torch.zeros(2, 4)), r"^net must return a tensor of shape \(2, 8\) for x of shape \(2, 4\), got \(2, 5\)$"),
    (lambda: MAF(MADE(4, 2))(torch.zeros(2, 3)), r"^x must have shape \(\.\.\., D\) with D = 4, got \(2, 3\)$"),
    (lambda: MADE(3, 2, order=[0, 1, 1]), r"^order must be a permutation of 0 \.\. 2, got \[0, 1, 1\]$"),
    (lambda: MADE(3, 2, hidden=()), r"^hidden must hold at least one width, got \(\)$"),
    (lambda: WaveNet(2, 2)(torch.zeros(2, 3, 4)), r"^x must have shape \(B, C, L\) with C = 2, got \(2, 3, 4\)$"),
    (lambda: PixelCNN(2, 2)(torch.zeros(2, 2, 4)), r"^x must have shape \(B, C, H, W\) with C = 2, got \(2, 2, 4\)$"),
    (lambda: WaveNet(2, 2, event_dims=1), "^event_dims must be 1"),
    (lambda: MaskedTransformer(1, 2, width=6, heads=4), "^width must be a multiple of 2 heads, got 6 and 4 heads$"),
    (lambda: pixelcnn_mask("C", 1, 3), "^kind must be 'A' or 'B' and kernel_size odd, got 'C' and 3$"),
    (lambda: MaskedConv2d("A", torch.arange(1), torch.arange(1), 4), "kernel_size odd, got 'A' and 4$"),
    (lambda: DDSF(()), r"^widths must be at least one positive number, got \(\)$"),
    (lambda: DSF(0), "^components must be at least 1, got 0$"),
])
def test_bad_input_is_told_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
        MAF(MADE(4, 2))(torch.zeros(2, 4, dtype=torch.long))


def test_an_empty_image_batch_and_another_length():
    net = PixelCNN(1, 2)
    assert MAF(net).inverse(torch.zeros(0, 1, 3, 3)).shape == (0, 1, 3, 3)
    for length in (1, 4, 9):
        assert MAF(WaveNet(2, 2)).inverse(torch.zeros(2, 2, length)).shape == (2, 2, length)
        assert MAF(MaskedTransformer(2, 2, event_dims=2))(torch.zeros(2, 2, length))[1].shape == (2,)


def tiny_pixels():
    torch.manual_seed(0)
    return CategoricalPixels(of_order_one(PixelCNN(2, 3, width=4, blocks=1)), (2, 1, 2), 3)


def test_categorical_pixels_are_a_distribution():
    """All 3^4 images of 2 channels and 1x2 pixels: probabilities add up to 1, and are the samples' frequencies."""
    model = tiny_pixels()
    images = torch.cartesian_prod(*[torch.arange(3)] * 4).reshape(-1, 2, 1, 2)
    with torch.no_grad():
        p = model.log_prob(images).double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 * p.min()
    n = 20_000
    samples = model.sample(n)
    assert samples.shape == (n, 2, 1, 2) and samples.dtype == torch.long
    counts = torch.bincount((samples.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    chi = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi < 160        # 80 degrees of freedom: 1 in 2 million


def test_categorical_pixels_refuse_what_is_no_level():
    with pytest.raises(ValueError, match="3"):
        tiny_pixels().log_prob(torch.full((1, 2, 1, 2), 3))
    with pytest.raises(TypeError):
        tiny_pixels().log_prob(torch.zeros(1, 2, 1, 2))
