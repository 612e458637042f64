"""Layers on images: the laws of vectors on flattened images, the packing by hand, and Flow++ as a whole."""
import math

import pytest
import scipy.linalg
import torch
from layer_laws import (both_directions_agree, gradients, input_is_untouched, inverse_jacobian_is_autograds, jacobian, ldj_is_autograds,
                        of_order_one, round_trip, rows_do_not_mix)
from torch.distributions import Independent, Normal

from flowkit import (DSF, ActNorm2d, ChannelWise, Compose, Conv1x1, ConvClassifier, FactorOut, FlowPPNet, GatedAttention, GatedConv,
                     ImageCoupling, Inverse, MixLogitCDF, MultiScale, Permute, Squeeze, Transform, bits_per_dim, fit, flow_plus_plus,
                     frechet_distance)

SHAPE = (2, 2, 4)       # channels, height, width: not square, and no two alike but the first
SIZE = math.prod(SHAPE)


def conv(c_in, c_out):
    return torch.nn.Sequential(torch.nn.Conv2d(c_in, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, c_out, 3, padding=1))


LAYERS = {
    "squeeze": Squeeze,
    "unsqueeze": lambda: Compose([Squeeze(), Inverse(Squeeze())]),
    "conv1x1": lambda: Conv1x1(2),
    "act_norm": lambda: ActNorm2d(2),
    "permute": lambda: ChannelWise(Permute([1, 0])),
    "channel": lambda: ImageCoupling(conv(1, 2)),
    "channel_swapped": lambda: ImageCoupling(conv(1, 9), DSF(3), swap=True),
    "checkerboard": lambda: ImageCoupling(conv(2, 4), split="checkerboard"),
    "checkerboard_swapped": lambda: ImageCoupling(conv(2, 22), MixLogitCDF(3), "checkerboard", swap=True),
    "flow_plus_plus_step": lambda: Compose([ActNorm2d(2), Conv1x1(2), ImageCoupling(FlowPPNet(1, 11, 4, 1), MixLogitCDF(3))]),
    "multi_scale": lambda: MultiScale([ImageCoupling(conv(4, 8))]),
    "multi_scale_2": lambda: Compose([Inverse(Squeeze()), MultiScale([ImageCoupling(conv(2, 4)), Conv1x1(8)], (1, 4, 8))]),
}
SHAPES = {"multi_scale_2": (4, 2, 4)}


class Flattened(Transform):
    """An image layer as a layer of vectors, so that the vectors' laws can be asked of it."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.shape, self.latent = layer, shape, None

    def forward(self, x, context=None):
        z, ldj = self.layer(x.reshape(-1, *self.shape))
        self.latent = z.shape[1:]
        return z.reshape(x.shape), ldj.reshape(x.shape[:-1])

    def _unflatten(self, z):
        return z.reshape(-1, *self.latent)

    def inverse(self, z, context=None):
        return self.layer.inverse(self._unflatten(z)).reshape(z.shape)

    def inverse_and_ldj(self, z, context=None):
        x, ldj = self.layer.inverse_and_ldj(self._unflatten(z))
        return x.reshape(z.shape), ldj.reshape(z.shape[:-1])


def build(name, seed=1):
    torch.manual_seed(seed)
    shape = SHAPES.get(name, SHAPE)
    layer = Flattened(LAYERS[name](), shape).double()
    x = torch.randn(4, math.prod(shape), dtype=torch.float64)
    layer(x)
    return of_order_one(layer), x


@pytest.mark.parametrize("law", [round_trip, ldj_is_autograds, inverse_jacobian_is_autograds, both_directions_agree, rows_do_not_mix,
                                 input_is_untouched, gradients], ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_law(name, law):
    law(*build(name))


@pytest.mark.parametrize("name", LAYERS)
def test_a_doubled_ldj_turns_the_suite_red(name):
    layer, x = build(name)

    class Doubled(Flattened):
        def forward(self, x, context=None):
            z, ldj = super().forward(x)
            return z, torch.where(ldj == 0, ldj + 1, 2 * ldj)

    with pytest.raises(AssertionError):
        ldj_is_autograds(Doubled(layer.layer, layer.shape), x)


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_dtypes_and_state(name):
    layer, x = build(name)
    image = x.reshape(-1, *layer.shape)
    for batch in (image, image[:1], image[:0]):
        z, ldj = layer.layer(batch)
        assert ldj.shape == (len(batch),) and z.dtype == ldj.dtype == torch.float64 and z.numel() == batch.numel()
        assert layer.layer.inverse(z).shape == batch.shape
    other = LAYERS[name]().double()
    other.load_state_dict(layer.layer.state_dict())
    for got, want in zip(other(image), layer.layer(image)):
        assert torch.equal(got, want)
    z, ldj = layer.float().layer(image.float())
    assert z.dtype == ldj.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"permute", "act_norm", "flow_plus_plus_step", "multi_scale", "multi_scale_2", "unsqueeze"}))
def test_the_default_device_is_respected(name):
    with torch.device("meta"):
        layer = LAYERS[name]()
    z, ldj = layer(torch.empty(3, *SHAPE, device="meta"))
    assert (z.device.type, ldj.device.type, ldj.shape) == ("meta", "meta", (3,))


def test_squeeze_keeps_neighbours_together():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    z, _ = Squeeze()(image)
    assert z[0, :, 0, 0].tolist() == [0, 1, 4, 5] and z[0, :, 1, 1].tolist() == [10, 11, 14, 15]


def test_the_checkerboard_colours():
    """Pixels with h + w even pass unchanged, or those with h + w odd if swapped; and all others are bent."""
    even = (torch.arange(3)[:, None] + torch.arange(4)) % 2 == 0
    for swap in (False, True):
        layer, x = ImageCoupling(conv(2, 4), split="checkerboard", swap=swap), torch.randn(2, 2, 3, 4)
        unchanged = (layer(x)[0] == x).all(0).all(0)
        assert torch.equal(unchanged, ~even if swap else even)


def test_an_odd_number_of_channels():
    layer, x = ImageCoupling(conv(1, 4)), torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x)[0][:, :1], x[:, :1])
    torch.testing.assert_close(layer.inverse(layer(x)[0]), x)


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
def test_context_reaches_the_net_at_its_own_pixels(split):
    """A net without reach over pixels: what the context says at a pixel must bend that pixel (or its partner in the pair)."""
    board = split == "checkerboard"
    net = torch.nn.Conv2d(2 + (4 if board else 2), 4 if board else 4, 1).double()
    channels = 2 if board else 4
    layer = ImageCoupling(lambda x, c: net(torch.cat([x, c], 1)), split=split)
    x, context = torch.randn(1, channels, 2, 4, dtype=torch.float64), torch.randn(1, 2, 2, 4, dtype=torch.float64)
    by_context = torch.autograd.functional.jacobian(lambda c: layer(x, c)[0], context)[0, :, :, :, 0].abs().sum((0, 3))
    reach = by_context.flatten(0, 1) @ torch.zeros(0) if False else by_context
    for h in range(2):
        for w in range(4):
            touched = {(int(i), int(j)) for i, j in (reach[h, w] > 0).nonzero()}
            assert touched <= {(h, w // 2 * 2), (h, w // 2 * 2 + 1)} if board else touched == {(h, w)}
    torch.testing.assert_close(layer.inverse(layer(x, context)[0], context), x)


def test_act_norm_over_channels():
    x = torch.randn(5, 3, 4, 6) * torch.tensor([1.0, 5, 0.1])[:, None, None] + 2
    z, ldj = ActNorm2d(3)(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3))


def test_multi_scale_drops_nothing_and_knows_its_shape():
    layer = MultiScale([Conv1x1(4), Conv1x1(8), Conv1x1(16)], (1, 8, 16))
    x = torch.randn(3, 1, 8, 16)
    z, ldj = layer(x)
    assert z.shape == (3, 128)
    torch.testing.assert_close(layer.inverse(z), x)
    assert layer.inverse(torch.randn(2, 128)).shape == (2, 1, 8, 16)
    with pytest.raises(ValueError, match=r"\(C, H, W\) = \(1, 8, 16\), got \(3, 1, 16, 8\)$"):
        layer(torch.randn(3, 1, 16, 8))
    with pytest.raises(ValueError, match="^shape must be known to sample"):
        MultiScale([Conv1x1(4)]).inverse(z)


def test_factor_out_is_the_chain_rule_and_draws_the_rest():
    prior = lambda z: Independent(Normal(0.5 * z, 0.3), 3)  # noqa: E731
    layer, x = FactorOut(prior), torch.randn(4, 4, 2, 3, dtype=torch.float64)
    z, contribution = layer(x)
    assert torch.equal(z, x[:, :2]) and layer.exact and layer.surjective and not layer.bijective
    torch.testing.assert_close(contribution, Normal(0.5 * x[:, :2], 0.3).log_prob(x[:, 2:]).sum((1, 2, 3)))
    torch.manual_seed(0)
    many = torch.ones(4000, 2, 1, 1)
    drawn = layer.inverse(many)
    assert torch.equal(layer(drawn)[0], many)
    # 5 standard errors: wrong once in a million seeds.
    assert abs(drawn[:, 2:].mean() - 0.5) < 5 * 0.3 / math.sqrt(8000)


def test_bits_per_dim():
    assert bits_per_dim(torch.zeros(3), (3, 4, 4), 256).tolist() == [8, 8, 8]
    uniform = torch.full((1,), -48 * math.log(256))
    torch.testing.assert_close(bits_per_dim(uniform, (3, 4, 4), 1), torch.tensor([8.0]))


def test_gated_blocks():
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, requires_grad=True)
    for block, mixes in [(GatedConv(8), False), (GatedAttention(8, 2), True)]:
        block = block.double()
        y = block(x)
        assert y.shape == x.shape
        reach = jacobian(lambda r: block(r)[:, :, 0, 0].sum(0), x[0].detach()).abs().sum((0, 1))
        assert (reach > 0).all() if mixes else (reach[2:] == 0).all()
        # A shut gate leaves the input alone: the block is a residual.
        with torch.no_grad():
            block.gate.weight.zero_()
            block.gate.bias[8:] = -1000
        torch.testing.assert_close(block(x), x)


def test_the_net_of_flow_plus_plus_knows_its_places_and_its_context():
    net = FlowPPNet(1, 3, 8, 1, context=2)
    flat, context = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)
    assert net(flat, context).std((2, 3)).min() > 1e-4
    assert not torch.equal(net(flat, context), net(flat, context + 1))


def test_flow_plus_plus_learns_discrete_images():
    """Two patterns of 4x4 with noise: the bound must beat independent pixels, which is the best that a flow without a net could do."""
    torch.manual_seed(0)
    stripes = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]])
    data = torch.stack([stripes, 1 - stripes])[torch.randint(2, (2000,))][:, None] * 2 + torch.randint(2, (2000, 1, 4, 4))
    # Each pixel alone is uniform on 0 .. 3: 2 bits. Knowing the pattern, one bit is left, and 1/16 bit names the pattern.
    flow = flow_plus_plus((1, 4, 4), levels=4, scales=1, couplings=2, components=2, width=8)
    assert not flow.exact
    with pytest.raises(ValueError, match="pass bound=True"):
        flow.log_prob(data[:2])
    fit(flow, lambda n: data[torch.randint(2000, (n,))], steps=120, batch_size=64, lr=1e-2, progress=False)
    with torch.no_grad():
        bits = bits_per_dim(flow.log_prob(data, bound=True), (1, 4, 4), 1).mean()
    assert 1.0 < bits < 1.6
    samples = flow.sample(200)
    assert samples.shape == (200, 1, 4, 4) and samples.dtype == torch.long and samples.min() >= 0 and samples.max() <= 3


@pytest.mark.parametrize("without, gone, left", [
    ({}, [], ["GatedAttention", "VariationalDequantizer", "MixLogitCDF"]),
    ({"heads": 0}, ["GatedAttention"], ["VariationalDequantizer", "MixLogitCDF"]),
    ({"uniform": True}, ["VariationalDequantizer"], ["GatedAttention", "UniformDequantizer", "MixLogitCDF"]),
    ({"affine": True}, ["MixLogitCDF"], ["GatedAttention", "VariationalDequantizer", "Affine"]),
])
def test_flow_plus_plus_without_one_of_its_parts(without, gone, left):
    flow = flow_plus_plus((1, 4, 4), levels=4, scales=1, width=8, **without)
    parts = {type(part).__name__ for part in flow.modules()} | {type(part.map).__name__ for part in flow.modules() if hasattr(part, "map")}
    assert parts.isdisjoint(gone) and parts.issuperset(left)
    x = torch.randint(0, 4, (5, 1, 4, 4))
    assert flow.log_prob(x, bound=True).shape == (5,) and flow.sample(3).shape == (3, 1, 4, 4)


def test_dropout_of_the_net_of_flow_plus_plus_is_for_training_alone():
    net, x = FlowPPNet(1, 3, 8, 1, dropout=0.5), torch.randn(2, 1, 4, 4)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    without = FlowPPNet(1, 3, 8, 1)
    without.load_state_dict(net.state_dict())
    assert torch.equal(net(x), without(x))


def test_a_classifier_is_linear_in_its_features_and_learns():
    """Bright left halves against bright right halves; the features are of any image size."""
    torch.manual_seed(0)
    net, labels = ConvClassifier(2, 2, width=4), torch.randint(2, (200,))
    x = torch.rand(200, 2, 8, 6)
    x[..., :3] += labels[:, None, None, None]
    x[..., 3:] += 1 - labels[:, None, None, None]
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimiser.step()
    net.eval()
    assert (net(x).argmax(-1) == labels).double().mean() > 0.95
    features = net.features(x)
    assert features.shape == (200, 8) and net.features(x[:, :, :5, :5]).shape == (200, 8)
    torch.testing.assert_close(net(x), features @ net.last.weight.T + net.last.bias)


@pytest.mark.parametrize("make, message", [
    (lambda: Squeeze()(torch.zeros(1, 2, 3, 4)), r"^x must have shape \(B, C, H, W\) with H and W even, got \(1, 2, 3, 4\)$"),
    (lambda: Squeeze()(torch.zeros(2, 4, 4)), r"^x must have shape \(B, C, H, W\) with H and W even, got \(2, 4, 4\)$"),
    (lambda: Squeeze().inverse(torch.zeros(1, 3, 2, 2)), r"with C a multiple of 4, got \(1, 3, 2, 2\)$"),
    (lambda: Conv1x1(3)(torch.zeros(1, 2, 2, 2)), r"with D = 3, got \(1, 2, 2, 2\)$"),
    (lambda: ImageCoupling(conv(1, 2))(torch.zeros(1, 1, 2, 2)), r"^x must have at least 2 channels .*, got shape \(1, 1, 2, 2\)$"),
    (lambda: ImageCoupling(conv(1, 2), split="checkerboard")(torch.zeros(1, 1, 2, 3)), r"with W even, got \(1, 1, 2, 3\)$"),
    (lambda: ImageCoupling(conv(1, 3))(torch.zeros(1, 2, 2, 2)), r"^net must return shape \(1, 2, 2, 2\) .*, got \(1, 3, 2, 2\)$"),
    (lambda: ImageCoupling(conv(1, 3), split="rows"), "^split must be 'channel' or 'checkerboard', got 'rows'$"),
    (lambda: FactorOut(lambda z: Normal(z, 1.0))(torch.zeros(1, 2, 2, 2)), "^prior must return a distribution of"),
    (lambda: FactorOut(lambda z: Normal(z, 1.0))(torch.zeros(1, 3, 2, 2)), r"with C even, got \(1, 3, 2, 2\)$"),
    (lambda: MultiScale([]), "^steps must hold at least one transform, got none$"),
    (lambda: flow_plus_plus((1, 6, 6)), r"multiples of 2 \*\* scales = 4, got \(1, 6, 6\)$"),
    (lambda: GatedAttention(6, 4), "^channels must be a multiple of heads, got 6 and 4$"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused():
    with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
        Conv1x1(1)(torch.zeros(1, 1, 2, 2, dtype=torch.long))


# --- the distance of Frechet ------------------------------------------------------------------------------------------

def features(n, dim, rank=None, scale=1.0, shift=0.0, seed=0):
    """n rows of that many features, of full rank or less."""
    g = torch.Generator().manual_seed(seed)
    rank = rank or dim
    rows = torch.randn(n, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, dim, generator=g, dtype=torch.float64)
    return scale * rows + shift


def in_words(a, b):
    """The formula as it stands, with scipy's root of a matrix."""
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    root = scipy.linalg.sqrtm((s_a @ s_b).numpy())
    return (a.mean(0) - b.mean(0)).square().sum() + torch.trace(s_a + s_b) - 2 * root.trace().real


def test_frechet_distance_is_the_formula_with_a_matrix_root():
    for n, m, dim in ((30, 50, 2), (200, 80, 7), (9, 400, 5)):
        a, b = features(n, dim, seed=n), features(m, dim, scale=0.6, shift=0.4, seed=m)
        torch.testing.assert_close(frechet_distance(a, b), in_words(a, b), rtol=1e-8, atol=1e-8)


def test_frechet_distance_of_normals_in_closed_form():
    """Covariances that commute: |m_a - m_b|^2 + sum of (s_a - s_b)^2, the s being standard deviations along the common axes."""
    cross = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(5 / 2)     # covariance I with n - 1 = 5
    axes = torch.linalg.qr(features(3, 3)).Q
    s_a, s_b, apart = torch.tensor([2.0, 1.0, 0.0]).double(), torch.tensor([0.5, 3.0, 1.5]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    got = frechet_distance(cross * s_a @ axes.T, cross * s_b @ axes.T + apart)
    torch.testing.assert_close(got, apart.square().sum() + (s_a - s_b).square().sum(), rtol=1e-12, atol=1e-12)


def test_frechet_distance_of_equal_sets_is_zero_and_of_moved_sets_the_way():
    a = features(40, 6, scale=30.0)
    assert 0 <= frechet_distance(a, a) < 1e-10
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-10
    torch.testing.assert_close(frechet_distance(a, a + 2.0), torch.tensor(24.0).double(), rtol=1e-10, atol=0)
    b = features(25, 6, seed=3)
    torch.testing.assert_close(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, m, dim, rank", [(4, 6, 20, None), (4, 300, 20, None), (50, 60, 8, 2), (2, 2, 3, 1)])
def test_frechet_distance_of_sets_of_less_than_full_rank(n, m, dim, rank):
    """Fewer rows than features, or features that depend on each other; the eigenvalues that should be 0 are cut off in the oracle."""
    a, b = features(n, dim, rank, seed=1), features(m, dim, rank, seed=2)
    got = frechet_distance(a, b)
    # The root of a positive semi-definite matrix by its eigenvectors; its rounding errors are roots of those of the eigenvalues.
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp_min(0).sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + torch.trace(torch.cov(a.T) + torch.cov(b.T)) - 2 * middle
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert 0 <= frechet_distance(a, a) < 1e-12 * (1 + a.square().sum())
    assert abs(frechet_distance(a.float(), b.float()) - got) < 1e-5 * (1 + got)
    turn = torch.linalg.qr(features(dim, dim, seed=5)).Q
    torch.testing.assert_close(frechet_distance(a @ turn, b @ turn), got, rtol=1e-10, atol=1e-10)


def test_frechet_distance_keeps_the_dtype_and_says_what_is_wrong():
    a = features(5, 3).float().requires_grad_()
    value = frechet_distance(a, a)
    assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
    for wrong in (torch.zeros(1, 3), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"^b must "):
            frechet_distance(a, wrong)
    with pytest.raises(ValueError, match=r"^b must have shape \(\.\.\., D\) with D = 3, got \(5, 2\)$"):
        frechet_distance(a, torch.zeros(5, 2))
    with pytest.raises(TypeError, match="^a must be a floating-point tensor"):
        frechet_distance(torch.zeros(5, 3).long(), a)
