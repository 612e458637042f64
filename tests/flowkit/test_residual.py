"""Residual flows against closed forms (linear g), enumeration (the roulette), torch's SVD (spectral norms) and normflows."""
import copy
import io
import math

import pytest
import torch
from layer_laws import density_integrates_to_one, gradients, inverse_jacobian_is_autograds, ldj_is_autograds
from torch import nn
from torch.autograd.functional import jacobian

from flowkit import Flow, StandardNormal
from flowkit.residual import (ACTIVATIONS, Geometric, LipSwish, Residual, ShiftedPoisson, SpectralConv2d, SpectralLinear,
                              _top_singular_vector, lip_swish, lipschitz_convnet, lipschitz_mlp, neumann_gradient,
                              power_series_logdet, residual_inverse, roulette_sum, russian_roulette_logdet, spectral_normalize)

F64 = torch.float64
TERMS = [Geometric(0.5, 1), Geometric(0.3, 2), Geometric(0.5, 5),
         ShiftedPoisson(2, 1), ShiftedPoisson(1.5, 2), ShiftedPoisson(3, 5)]


def name_of(terms):
    return f"{type(terms).__name__}{terms.exact_terms}"


def matrix(dim, norm, seed=0):
    """A matrix without symmetry, of this spectral norm."""
    a = torch.randn(dim, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return a * norm / torch.linalg.matrix_norm(a, 2)


def order_one(module, seed=1):
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p[0].numel() if p.ndim > 1 else 1))
    return module


def mlp(dim, lipschitz=0.8, hidden=(12,)):
    return order_one(lipschitz_mlp(dim, hidden, lipschitz))


def convnet(channels=2, lipschitz=0.8):
    return order_one(lipschitz_convnet(channels, (3, 3), (3, 1, 3), lipschitz))


def basis(x):
    """sqrt(D) e_i for all i, each for the whole batch: their mean outer product is the identity, so they replace the noise."""
    dim = x[0].numel()
    return [(math.sqrt(dim) * e).reshape(x.shape[1:]).expand_as(x) for e in torch.eye(dim, dtype=x.dtype)]


def exact_logdet(g, x):
    rows = [jacobian(lambda r: g(r[None])[0], row, create_graph=True).reshape(row.numel(), -1) for row in x]
    return torch.stack([torch.linalg.slogdet(torch.eye(len(j), dtype=x.dtype) + j)[1] for j in rows])


def saved_tensors(run):
    count = 0

    def pack(t):
        nonlocal count
        count += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    assert out is not None
    return count


# --- linear g: everything in closed form

@pytest.mark.parametrize("norm", [0.1, 0.9, 0.99])
def test_a_linear_g_is_the_closed_form(norm):
    a, x = matrix(4, norm), torch.randn(2, 3, 4, dtype=F64)
    layer = Residual(lambda x: x @ a.T)
    full = torch.eye(4, dtype=F64) + a
    z, ldj = layer(x)
    torch.testing.assert_close(z, x @ full.T)
    torch.testing.assert_close(ldj, torch.linalg.slogdet(full)[1].expand(2, 3))
    torch.testing.assert_close(layer.inverse(x), torch.linalg.solve(full, x[..., None])[..., 0], rtol=1e-11, atol=1e-11)
    back, ldj_back = layer.inverse_and_ldj(z)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ldj_back, ldj)


def test_residual_inverse_converges_at_the_rate_of_the_lipschitz_constant():
    a, z = torch.eye(3, dtype=F64) * 0.7, torch.randn(5, 3, dtype=F64)
    errors = [(residual_inverse(lambda x: x @ a.T, z, n) - z / 1.7).norm() for n in (0, 1, 10, 11, 80)]
    torch.testing.assert_close(errors[1] / errors[0], torch.tensor(0.7, dtype=F64))
    torch.testing.assert_close(errors[3] / errors[2], torch.tensor(0.7, dtype=F64))
    assert errors[4] < 1e-11


@pytest.mark.parametrize("make", [lambda: (lambda x, a=matrix(3, 0.8): x @ a.T), lambda: mlp(3)], ids=["linear", "mlp"])
def test_the_truncated_series_keeps_its_error_bound(make):
    g, x, L = make(), torch.randn(4, 3, dtype=F64), 0.8
    want = exact_logdet(g, x)
    for n in (1, 2, 3, 5, 8, 13, 40):
        got = torch.stack([power_series_logdet(g, x, n, v) for v in basis(x)]).mean(0)
        bound = 3 * L ** (n + 1) / ((n + 1) * (1 - L))
        assert ((got - want).abs() <= bound + 1e-12).all()
    assert ((2 * got - want).abs() > bound).all()  # a doubled one would not


def test_the_series_is_the_power_series_of_log_one_plus_a():
    """In one dimension v^2 = 1 makes it log(1 + a) cut off, term by term."""
    x = torch.randn(3, 1, dtype=F64)
    got = [power_series_logdet(lambda x: 0.5 * x, x, n, torch.ones_like(x))[0].item() for n in (1, 2, 3)]
    assert got == pytest.approx([0.5, 0.5 - 0.125, 0.5 - 0.125 + 1 / 24])


# --- the number of terms

@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_survival_is_that_of_the_samples(terms):
    """z-test of each P(N >= k) on 20,000 draws, |z| < 5.5: at most 20 tests, so it errs in fewer than 1 of 10^6 seeds."""
    n = torch.tensor([terms.sample() for _ in range(20000)])
    assert n.min() == terms.exact_terms and isinstance(terms.sample(), int)
    for k in range(1, terms.exact_terms + 12):
        p = terms.survival(k)
        if 20000 * p * (1 - p) > 20:
            z = ((n >= k).double().mean() - p) / math.sqrt(p * (1 - p) / 20000)
            assert abs(z) < 5.5, (k, z)
        elif k <= terms.exact_terms:
            assert p == 1 and (n >= k).all()


def test_survival_in_closed_form():
    assert [Geometric(0.25, 3).survival(k) for k in (1, 3, 4, 6)] == [1, 1, 0.75, 0.75 ** 3]
    pmf = [math.exp(-1.5) * 1.5 ** i / math.factorial(i) for i in range(100)]
    for k in (1, 2, 3, 6, 30, 60):
        assert ShiftedPoisson(1.5, 2).survival(k) == pytest.approx(sum(pmf[max(k - 2, 0):]), rel=1e-10)


def test_torchs_seed_governs_the_number_of_terms():
    for terms in TERMS:
        torch.manual_seed(3)
        first = [terms.sample() for _ in range(20)]
        torch.manual_seed(3)
        assert [terms.sample() for _ in range(20)] == first and len(set(first)) > 1


# --- the roulette

def probabilities(terms, n_max):
    """(n, P(min(N, n_max) = n)): the far tail counts as its first n, where the series has long converged."""
    return [(n, terms.survival(n) - (terms.survival(n + 1) if n < n_max else 0)) for n in range(1, n_max + 1)]


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_the_roulettes_expectation_by_enumeration_is_the_whole_sum(terms):
    want = math.log(1.6)
    deltas = [(-1) ** (k + 1) / k * 0.6 ** k for k in range(1, 121)]
    for delta in (deltas, lambda k: deltas[k - 1], torch.tensor(deltas, dtype=F64)):
        got = sum(p * roulette_sum(delta, n, terms.survival) for n, p in probabilities(terms, 60))
        assert float(got) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_the_roulette_logdets_expectation_by_enumeration(terms):
    g, x = mlp(2, 0.5), torch.randn(3, 2, dtype=F64)
    got = sum(p * russian_roulette_logdet(g, x, v, n, terms.survival) / 2 for n, p in probabilities(terms, 30) for v in basis(x))
    torch.testing.assert_close(got, exact_logdet(g, x), rtol=0, atol=1e-9)
    with pytest.raises(AssertionError):  # without 1 / P(N >= k) the sum is biased, on purpose of this test
        naive = sum(p * power_series_logdet(g, x, n, v) / 2 for n, p in probabilities(terms, 30) for v in basis(x))
        torch.testing.assert_close(naive, exact_logdet(g, x), rtol=0, atol=1e-9)


def test_the_exact_first_terms_do_not_depend_on_the_draw():
    g, x = mlp(3), torch.randn(4, 3, dtype=F64)
    v, terms = torch.randn_like(x), Geometric(0.5, 5)
    torch.testing.assert_close(russian_roulette_logdet(g, x, v, 5, terms.survival), power_series_logdet(g, x, 5, v))


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_layers_estimate_is_unbiased(noise):
    """z-test over 700 calls where the variance is finite (L^2 = 0.25 < 1 - p = 0.7); |z| < 5.5 at 4 points errs once in 10^7."""
    g, x = mlp(3, 0.5), torch.randn(4, 3, dtype=F64)
    layer = Residual(g, "roulette", noise=noise, terms=Geometric(0.3))
    with torch.no_grad():
        draws = torch.stack([layer(x)[1] for _ in range(700)])
    z = (draws.mean(0) - exact_logdet(g, x)) / (draws.std(0) / math.sqrt(len(draws)))
    assert (z.abs() < 5.5).all() and (draws.std(0) > 0).all()


# --- the Neumann gradient

def gradient_by_enumeration(estimate, terms, g, x, weight, n_max=26):
    """Expectation, over N and the basis vectors, of the gradient of sum_b weight_b estimate_b, in x and in g's parameters."""
    total = [torch.zeros_like(t) for t in (x, *g.parameters())]
    for n, p in probabilities(terms, n_max):
        for v in basis(x):
            loss = (weight * estimate(g, x, v, n, terms.survival)).sum()
            for t, grad in zip(total, torch.autograd.grad(loss, (x, *g.parameters()), materialize_grads=True)):
                t += p * grad / x[0].numel()
    return total


@pytest.mark.parametrize("estimate", [neumann_gradient, russian_roulette_logdet])
@pytest.mark.parametrize("terms", [Geometric(0.5, 1), Geometric(0.4, 2), ShiftedPoisson(2, 5)], ids=name_of)
def test_the_gradients_expectation_is_that_of_the_logdet(estimate, terms):
    g, x = mlp(2, 0.5, (5,)), torch.randn(3, 2, dtype=F64, requires_grad=True)
    weight = torch.tensor([2.0, -0.5, 1.0], dtype=F64)
    want = torch.autograd.grad((weight * exact_logdet(g, x)).sum(), (x, *g.parameters()), materialize_grads=True)
    for a, b in zip(gradient_by_enumeration(estimate, terms, g, x, weight), want):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert max(b.abs().max() for b in want) > 0.1


def test_a_gradient_that_sums_the_batch_first_would_be_seen():
    def batch_first(g, x, v, n, survival):
        s = neumann_gradient(g, x, v, n, survival)
        return (s.sum() / len(s)).expand_as(s)

    g, x = mlp(2, 0.5, (5,)), torch.randn(3, 2, dtype=F64, requires_grad=True)
    weight = torch.tensor([2.0, -0.5, 1.0], dtype=F64)
    right, wrong = (torch.cat([t.flatten() for t in gradient_by_enumeration(f, Geometric(0.5, 2), g, x, weight, 12)])
                    for f in (neumann_gradient, batch_first))
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_neumanns_memory_is_flat_in_n():
    g, x = mlp(3), torch.randn(4, 3, dtype=F64, requires_grad=True)
    v, survival = torch.randn_like(x), Geometric(0.2).survival
    flat = [saved_tensors(lambda: neumann_gradient(g, x, v, n, survival)) for n in (2, 30)]
    grows = [saved_tensors(lambda: russian_roulette_logdet(g, x, v, n, survival)) for n in (2, 30)]
    assert flat[0] == flat[1] and grows[1] > 5 * grows[0]


class Fixed(Geometric):
    """Always n terms, with the survival function of Geometric(0.3)."""

    def __init__(self, n):
        super().__init__(0.3)
        self.n = n

    def sample(self):
        return self.n


def test_the_layers_memory_is_flat_in_n():
    g, x = mlp(3), torch.randn(4, 3, dtype=F64)
    counts = {kind: [saved_tensors(lambda: Residual(g, "roulette", kind, terms=Fixed(n))(x)) for n in (2, 30)]
              for kind in ("neumann", "autograd")}
    assert counts["neumann"][0] == counts["neumann"][1] and counts["autograd"][1] > 5 * counts["autograd"][0]


@pytest.mark.parametrize("kind, estimate", [("neumann", neumann_gradient), ("autograd", russian_roulette_logdet)])
def test_the_layers_value_and_gradient_are_the_functions(kind, estimate):
    g, x = mlp(3), torch.randn(4, 3, dtype=F64, requires_grad=True)
    layer, weight = Residual(g, "roulette", kind, terms=Fixed(6)), torch.randn(4, dtype=F64)
    torch.manual_seed(5)
    z, ldj = layer(x)
    torch.manual_seed(5)
    v = torch.randn_like(x)
    torch.testing.assert_close(z, x + g(x))
    torch.testing.assert_close(ldj, russian_roulette_logdet(g, x, v, 6, layer.terms.survival))
    leaves = (x, *g.parameters())
    for a, b in zip(*(torch.autograd.grad((weight * out).sum(), leaves, allow_unused=True)
                      for out in (ldj, estimate(g, x, v, 6, layer.terms.survival)))):
        assert a is b is None or torch.allclose(a, b, rtol=1e-10)


def test_a_series_layer_and_its_gradient():
    g, x = mlp(3), torch.randn(4, 3, dtype=F64)
    layer = Residual(g, "series", noise="rademacher", n_terms=4)
    torch.manual_seed(5)
    _, ldj = layer(x)
    torch.manual_seed(5)
    v = torch.empty_like(x).bernoulli_() * 2 - 1
    assert set(v.flatten().tolist()) == {-1, 1}
    want = power_series_logdet(g, x, 4, v)
    torch.testing.assert_close(ldj, want)
    for a, b in zip(*(torch.autograd.grad(out.sum(), list(g.parameters()), allow_unused=True) for out in (ldj, want))):
        assert a is b is None or torch.allclose(a, b)


def test_no_grad_gives_values_only():
    g, x = mlp(3), torch.randn(4, 3, dtype=F64)
    with torch.no_grad():
        for kind in ("exact", "series", "roulette"):
            z, ldj = Residual(g, kind)(x)
            assert not z.requires_grad and not ldj.requires_grad
        for out in (neumann_gradient(g, x, x, 3, Geometric(0.5).survival), power_series_logdet(g, x, 3, x),
                    Residual(g).inverse(x), Residual(g).inverse_and_ldj(x)[1]):
            assert not out.requires_grad


def test_an_estimate_is_not_passed_off_as_a_likelihood():
    g, x = mlp(2), torch.randn(4, 2, dtype=F64)
    assert Residual(g).exact
    for kind in ("series", "roulette"):
        flow = Flow(StandardNormal(2).double(), Residual(g, kind))
        assert not flow.exact and flow.log_prob(x, bound=True).shape == (4,)
        with pytest.raises(ValueError, match="pass bound=True"):
            flow.log_prob(x)


# --- spectral norms

def dense(layer, shape):
    """The matrix of the bounded layer without its bias."""
    weight = layer.bounded_weight(shape)
    return layer._operator(weight, torch.eye(math.prod(shape), dtype=weight.dtype).reshape(-1, *shape)).flatten(1).T


def unbounded(layer, shape):
    return layer._operator(layer.weight, torch.eye(math.prod(shape), dtype=F64).reshape(-1, *shape)).flatten(1).T


@pytest.fixture(params=["decomposed", "iterated"])
def spectral(request, monkeypatch):
    """Small matrices are decomposed; here they go the way of the large ones, too."""
    if request.param == "iterated":
        monkeypatch.setattr("flowkit.residual.SMALL", 0)


@pytest.fixture
def iterated(monkeypatch):
    monkeypatch.setattr("flowkit.residual.SMALL", 0)


SPECTRAL = [(lambda: SpectralLinear(3, 5), (3,)), (lambda: SpectralLinear(5, 3), (5,)), (lambda: SpectralLinear(30, 30), (30,)),
            (lambda: SpectralConv2d(2, 3, 3), (2, 5, 4)), (lambda: SpectralConv2d(3, 2, 5, coeff=0.5), (3, 4, 7)),
            (lambda: SpectralConv2d(3, 4, 1), (3, 4, 3)), (lambda: SpectralConv2d(1, 1, 3), (1, 1, 2))]
SPECTRAL_IDS = ["linear35", "linear53", "linear30", "conv3", "conv5", "conv1", "tiny_image"]


@pytest.mark.parametrize("make, shape", SPECTRAL, ids=SPECTRAL_IDS)
def test_the_spectral_norm_is_torchs(spectral, make, shape):
    layer = order_one(make())
    for factor in (3.0, 1.0, 2.0):
        with torch.no_grad():
            layer.weight.mul_(factor).add_(0.3 * torch.randn_like(layer.weight))
        norm, before = (torch.linalg.matrix_norm(m(layer, shape), 2) for m in (dense, unbounded))
        torch.testing.assert_close(norm, before.clamp_max(layer.coeff), rtol=1e-9, atol=0)
        assert layer.slack == 1
    with torch.no_grad():
        layer.weight.mul_(0.5 * layer.coeff / torch.linalg.matrix_norm(unbounded(layer, shape), 2))
    assert torch.equal(layer.bounded_weight(shape), layer.weight)  # untouched when below


@pytest.mark.parametrize("make, shape", SPECTRAL, ids=SPECTRAL_IDS)
def test_the_spectral_norms_gradient_is_that_of_the_svd(spectral, make, shape):
    layer = order_one(make())
    direction = torch.randn_like(layer.weight)
    got, = torch.autograd.grad((layer.bounded_weight(shape) * direction).sum(), layer.weight)
    sigma = torch.linalg.matrix_norm(unbounded(layer, shape), 2)
    want, = torch.autograd.grad((layer.weight / (sigma / layer.coeff).clamp_min(1) * direction).sum(), layer.weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make, shape", SPECTRAL, ids=SPECTRAL_IDS)
def test_calls_with_the_same_weights_agree_to_the_last_bit(spectral, make, shape):
    layer, x = order_one(make()), torch.randn(3, *shape, dtype=F64)
    first, direction = layer(x), layer.direction
    assert torch.equal(layer(x), first) and torch.equal(layer.eval()(x), first) and layer.direction is direction
    # A layer built anew, whose buffer has no shape yet, takes over state and results.
    other = order_one(make(), seed=9)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), first) and torch.equal(other.direction, direction)
    used = order_one(make(), seed=8)
    used(x)
    used.load_state_dict(layer.state_dict())
    assert torch.equal(used(x), first)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), first)


def test_what_is_saved_belongs_to_the_saved_weight(spectral):
    layer, x = order_one(SpectralLinear(6, 6)), torch.randn(2, 6, dtype=F64)
    layer(x)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    state = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer(x), layer(x)) and all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def test_an_old_singular_vector_does_not_hide_a_new_top_one(spectral):
    """The trap of a stored vector: it is a singular vector of the new weight as well, only no longer the top one."""
    for dtype in (F64, torch.float32):
        layer = SpectralLinear(3, 3).to(dtype)
        for diagonal in ([3, 0.1, 0.1], [3, 30, 0.1], [0.1, 0.1, 7], [1.5, 1, 1], [1.5, 1, 1.6]):
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(diagonal).diag())
            norm = torch.linalg.matrix_norm(layer.bounded_weight((3,)), 2)
            assert norm.item() == pytest.approx(0.9, rel=1e-6 if dtype == F64 else 1e-3)


def test_an_image_of_another_size_has_another_norm():
    layer = order_one(SpectralConv2d(2, 2, 3))
    for shape in ((2, 3, 3), (2, 6, 5), (2, 3, 3), (2, 1, 1)):
        norm, before = (torch.linalg.matrix_norm(m(layer, shape), 2) for m in (dense, unbounded))
        torch.testing.assert_close(norm, before.clamp_max(0.9), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_without_convergence_the_norm_errs_to_the_safe_side(iterated, gap):
    torch.manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(40, 40, dtype=F64)).Q for _ in range(2))
    weight = u @ torch.cat([torch.tensor([2.0, 2 - gap], dtype=F64), 2 * torch.rand(38, dtype=F64)]).diag() @ v.T
    layer = SpectralLinear(40, 40, max_iter=30).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    norm = torch.linalg.matrix_norm(layer.bounded_weight((40,)), 2).item()
    assert layer.slack > 1 and 0.7 < norm <= 0.9
    x = torch.randn(3, 40, dtype=F64)
    assert torch.equal(layer(x), layer(x))
    layer.max_iter = 100
    with torch.no_grad():
        layer.weight.mul_(1.5)
    norm = torch.linalg.matrix_norm(layer.bounded_weight((40,)), 2).item()
    assert 0.9 * 0.995 < norm <= 0.9 * (1 + 1e-7)


def test_the_upper_bound_holds_for_what_the_start_contained(iterated):
    """sigma <= s cosh(asinh(1 / a) / (2 k - 1)) after k steps from a start with a of the top singular vector, however small a."""
    for seed in range(40):
        torch.manual_seed(seed)
        singular = torch.cat([torch.tensor([1.05], dtype=F64), torch.linspace(1, 0, 29, dtype=F64) ** (seed % 4 + 1)])
        start = torch.randn(30, dtype=F64)
        start[0] = 10.0 ** -(seed % 7)
        start /= start.norm()
        for k in (1, 2, 3, 6, 12):
            v, _ = _top_singular_vector(lambda v: singular ** 2 * v, start, 0, k)
            s = (singular * v).norm()
            assert s <= 1.05 + 1e-12 and s * math.cosh(math.asinh(1 / start[0]) / (2 * k - 1)) >= 1.05


def test_training_keeps_the_norm_under_its_bound_in_float32(spectral):
    """The vector follows weights that move by small steps, through crossings of singular values too."""
    torch.manual_seed(0)
    layer, a, b = SpectralLinear(24, 24), torch.randn(24, 24), torch.randn(24, 24)
    for i in range(200):
        with torch.no_grad():
            # Two blocks that never mix: their largest singular values cross again and again.
            blocks = torch.block_diag(a[:12, :12] * (1 + 0.5 * math.sin(i / 7)), b[:12, :12])
            layer.weight.copy_(blocks)
        norm = torch.linalg.matrix_norm(layer.bounded_weight((24,)), 2).item()
        assert norm <= 0.9 * 1.001


def test_spectral_layers_in_odd_cases(spectral):
    layer = SpectralLinear(3, 3)
    with torch.no_grad():
        layer.weight.zero_()
    out = layer(torch.randn(2, 3))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(layer.weight.grad).all()
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="^SpectralLinear: weight has 1 non-finite values out of 9$"):
        layer(torch.randn(2, 3))
    assert torch.isfinite(layer.direction).all() and layer.state_dict()
    tight = order_one(SpectralLinear(3, 3, tol=0))  # stops when there are no more dimensions
    assert torch.linalg.matrix_norm(tight.bounded_weight((3,)), 2).item() == pytest.approx(0.9, rel=1e-2)
    layer = SpectralConv2d(2, 2, 3)
    with torch.inference_mode():
        layer(torch.randn(1, 2, 4, 4))
    layer(torch.randn(0, 2, 4, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_spectral_normalize_the_function():
    weight = torch.randn(5, 3, dtype=F64)
    norm = torch.linalg.matrix_norm(weight, 2).item()
    assert torch.linalg.matrix_norm(spectral_normalize(weight, 0.7, 300), 2).item() == pytest.approx(0.7, rel=1e-9)
    assert torch.equal(spectral_normalize(weight, norm * 1.01, 300), weight)
    # One iteration finds the norm from below, so it scales too little.
    assert torch.linalg.matrix_norm(spectral_normalize(weight, 0.7, 1), 2).item() > 0.7 * (1 + 1e-6)
    assert torch.autograd.gradcheck(lambda w: spectral_normalize(w, 0.7, 1000), weight.requires_grad_())


# --- activations and contractive nets

def test_lip_swish_is_one_lipschitz():
    z = torch.linspace(-40, 40, 80001, dtype=F64, requires_grad=True)
    for beta in (0.05, 0.5, 1.0, 3.0, 20.0):
        slope, = torch.autograd.grad(lip_swish(z, beta).sum(), z)
        assert slope.abs().max() <= 1 and (beta < 0.1 or slope.max() > 0.999)
    torch.testing.assert_close(lip_swish(z, 2.0), z / (1 + torch.exp(-2 * z)) / 1.1)
    module = LipSwish()
    torch.testing.assert_close(module(z).float(), lip_swish(z, 0.5).float())
    module(z).sum().backward()
    assert module.raw_beta.grad != 0


def test_lip_swish_bends_where_it_is_steep():
    """All have slope at most 1; where it is within 5% of its largest, ELU and softplus are straight, mostly."""
    z = torch.linspace(-12, 12, 24001, dtype=F64, requires_grad=True)
    bends = {}
    for name, make in ACTIVATIONS.items():
        slope, = torch.autograd.grad(make().double()(z).sum(), z, create_graph=True)
        curvature, = torch.autograd.grad(slope.sum(), z)
        assert slope.abs().max() <= 1 + 1e-12
        bends[name] = curvature[slope > 0.95 * slope.max()].abs().median().item()
    assert bends["LipSwish"] > 10 * max(bends["ELU"], bends["Softplus"])


@pytest.mark.parametrize("lipschitz", [0.3, 0.9])
def test_the_nets_contract_as_promised(lipschitz):
    for g, x in ((mlp(4, lipschitz, (20, 20)), 3 * torch.randn(30, 4, dtype=F64)),
                 (convnet(2, lipschitz), 3 * torch.randn(6, 2, 4, 3, dtype=F64))):
        norms = [torch.linalg.matrix_norm(jacobian(lambda r: g(r[None])[0], row).reshape(row.numel(), -1), 2) for row in x]
        assert max(norms) <= lipschitz
    linear = order_one(lipschitz_mlp(1, (1, 1), lipschitz, nn.Identity))
    slope = jacobian(lambda r: linear(r), torch.zeros(1, dtype=F64)).abs().item()
    assert slope <= lipschitz * (1 + 1e-9)


# --- the layer

def test_normflows_gives_the_same_density():
    from normflows.flows.residual import iResBlock
    g, x = mlp(2), torch.randn(6, 2, dtype=F64)
    z, log_p = iResBlock(g, brute_force=True)(x.clone(), torch.zeros(6, 1, dtype=F64))
    layer = Residual(g)
    torch.testing.assert_close(layer(x)[0], z)
    torch.testing.assert_close(layer(x)[1], -log_p[:, 0], rtol=1e-6, atol=1e-6)
    theirs = iResBlock(g, brute_force=True).inverse(z.detach())
    torch.testing.assert_close(layer.inverse(z.detach()), theirs, rtol=1e-2, atol=1e-2)


def test_the_density_integrates_to_one_and_a_doubled_ldj_does_not():
    layer = Residual(mlp(2, 0.95))
    density_integrates_to_one(layer, torch.zeros(1, 2, dtype=F64))
    forward = layer.forward
    layer.forward = lambda x, context=None: (forward(x)[0], 2 * forward(x)[1])
    with pytest.raises(AssertionError):
        density_integrates_to_one(layer, torch.zeros(1, 2, dtype=F64))
    with pytest.raises(AssertionError):
        ldj_is_autograds(layer, torch.randn(3, 2, dtype=F64))


@pytest.mark.parametrize("channels, size", [(2, (3, 4)), (1, (1, 1))])
def test_images(channels, size):
    layer = Residual(convnet(channels), event_dims=3)
    x = torch.randn(3, channels, *size, dtype=F64)
    z, ldj = layer(x)
    torch.testing.assert_close(ldj, exact_logdet(layer.g, x))
    torch.testing.assert_close(layer.inverse(z), x, rtol=1e-10, atol=1e-10)
    assert layer(x[:0])[1].shape == (0,) and layer.inverse(x[:0]).shape == x[:0].shape
    flat = Residual(lambda r: layer.g(r.unflatten(-1, x.shape[1:])).flatten(1))
    inverse_jacobian_is_autograds(flat, x[:2].flatten(1))
    estimate = Residual(layer.g, "roulette", event_dims=3)(x)[1]
    assert estimate.shape == (3,) and estimate.requires_grad
    got = torch.stack([power_series_logdet(layer.g, x, 60, v) for v in basis(x)]).mean(0)
    torch.testing.assert_close(got, ldj, rtol=0, atol=1e-6)


def test_gradients_of_an_image_flow():
    """In x and in the weights, forward and through the inverse, under per-sample weights, against central differences."""
    class Flat(Residual):
        def _g(self, x, context):
            return self.g(x.unflatten(-1, (1, 2, 2))).flatten(1)

    gradients(Flat(convnet(1)), torch.randn(3, 4, dtype=F64))


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("given_lipschitz", [True, False])
def test_the_tolerance_bounds_the_error_and_not_the_step(tol, given_lipschitz):
    """At L = 0.99 a step of tol is still 99 tol away from the fixed point."""
    z = 10 * torch.randn(50, 3, dtype=F64)
    layer = Residual(lambda x: -0.99 * x, tol=tol, lipschitz=0.99 if given_lipschitz else None, max_iter=4000)
    want = z / 0.01
    error = (layer.inverse(z) - want).norm(dim=-1)
    assert (error <= 1.05 * tol * (1 + want.norm(dim=-1))).all()


def test_one_short_step_does_not_end_the_inverse():
    """This g shortens every other step by 0.2 and the ones between by 0.99: the slowest rate seen counts."""
    a, z = torch.tensor([[0, -0.99], [0.2, 0]], dtype=F64), torch.zeros(60, 2, dtype=F64)
    z[:, 0] = torch.logspace(0, 3, 60)
    want = torch.linalg.solve(torch.eye(2, dtype=F64) + a, z.T).T
    error = (Residual(lambda x: x @ a.T, tol=1e-4).inverse(z) - want).norm(dim=-1)
    assert (error <= 1e-4 * (1 + want.norm(dim=-1))).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3, 1e6])
def test_the_inverse_settles_in_float32_at_any_scale(scale):
    torch.manual_seed(1)
    layer = Residual(order_one(lipschitz_mlp(8, (32, 32), 0.97)).float())
    with torch.no_grad():
        layer.g[0].bias.mul_(10)
        x = scale * torch.randn(200, 8)
        z, _ = layer(x)
        error = (layer.inverse(z) - x).norm(dim=-1)
    assert (error <= 1e-4 * (1 + x.norm(dim=-1))).all()


def test_a_sample_does_not_depend_on_its_batch():
    layer, z = Residual(mlp(3, 0.95), tol=1e-3), 5 * torch.randn(20, 3, dtype=F64)
    together, alone = layer.inverse(z), torch.cat([layer.inverse(row[None]) for row in z])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_the_implicit_gradient_is_that_of_the_iterations_without_their_graph():
    g, z = mlp(3, 0.8), torch.randn(5, 3, dtype=F64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=F64)
    leaves = (z, *g.parameters())
    ways = Residual(g).inverse(z), residual_inverse(g, z, 150)
    for a, b in zip(*(torch.autograd.grad((weight * x).sum(), leaves) for x in ways)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    quick, slow = (saved_tensors(lambda: Residual(g, tol=tol).inverse(z)) for tol in (1e-1, 1e-14))
    assert quick == slow
    first, = torch.autograd.grad(Residual(g).inverse(z).pow(2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_tiny_gradients_are_solved_for_as_well():
    """A mean over many samples makes gradients far below the tolerance's scale."""
    a, z = matrix(3, 0.9), torch.randn(4, 3, dtype=F64, requires_grad=True)
    (1e-20 * Residual(lambda x: x @ a.T).inverse(z)[:2].sum()).backward()
    want = torch.linalg.solve((torch.eye(3, dtype=F64) + a).T, torch.full((3,), 1e-20, dtype=F64))
    torch.testing.assert_close(z.grad, torch.stack([want, want, 0 * want, 0 * want]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("slope", [1.0, 1.3, -1.0, 3.0])
def test_a_g_that_does_not_contract_is_named(slope):
    z = torch.randn(4, 2, dtype=F64)
    with pytest.raises(FloatingPointError, match="^Residual: g must be contractive .* at 4 of 4 points after 300 steps$"):
        Residual(lambda x: slope * x, max_iter=300).inverse(z)


def test_a_determinant_that_is_not_positive_is_named():
    steep = Residual(lambda x: x * torch.tensor([-3.0, 0.0]) * (x[..., :1] > 0))
    with pytest.raises(FloatingPointError, match=r"^Residual: g must be contractive .* but det\(I \+ J\) <= 0 at 1 of 2 points$"):
        steep(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))


def test_non_finite_values_are_named():
    layer = Residual(mlp(2))
    with pytest.raises(FloatingPointError, match="^Residual: z has 1 non-finite values out of 4"):
        layer.inverse(torch.tensor([[0.0, math.nan], [0, 0]], dtype=F64))
    with pytest.raises(FloatingPointError, match="^Residual: z has .*its input was not finite already"):
        Flow(StandardNormal(2).double(), layer).log_prob(torch.tensor([[0.0, math.inf]], dtype=F64))
    z = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    with pytest.raises(FloatingPointError, match="^Residual, backward through the inverse: gradient has 2 non-finite"):
        (layer.inverse(z) * math.nan).sum().backward()


def test_context_reaches_g():
    layer = Residual(lambda x, c: 0.5 * torch.tanh(x + c))
    x, c = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64, requires_grad=True)
    z, ldj = layer(x, c)
    torch.testing.assert_close(ldj, torch.log1p(0.5 * (1 - torch.tanh(x + c) ** 2)).sum(-1))
    back = layer.inverse(z.detach(), c)
    torch.testing.assert_close(back, x)
    assert torch.autograd.grad(back.sum(), c)[0].abs().min() > 0


def test_training_fits_by_the_unbiased_estimate():
    """Maximum likelihood with roulette and Neumann brings a skewed, narrow Gaussian's density up, judged by the exact one."""
    torch.manual_seed(0)
    x = torch.randn(256, 2) @ torch.tensor([[1.5, 0.0], [0.8, 0.7]])
    layer = Residual(lipschitz_mlp(2, (16,)), "roulette")
    flow, optimiser = Flow(StandardNormal(2), layer), torch.optim.Adam(layer.parameters(), 1e-2)

    def exact():
        with torch.no_grad():
            return Flow(StandardNormal(2), Residual(layer.g)).log_prob(x).mean().item()

    before = exact()
    for _ in range(60):
        optimiser.zero_grad()
        (-flow.log_prob(x, bound=True).mean()).backward()
        optimiser.step()
    assert exact() > before + 0.1


# --- bad input

@pytest.mark.parametrize("make, sentence", [
    (lambda: Residual(nn.Identity(), "rough"), r"^logdet must be one of \('exact', 'series', 'roulette'\), got 'rough'$"),
    (lambda: Residual(nn.Identity(), gradient="naive"), r"^gradient must be one of \('neumann', 'autograd'\), got 'naive'$"),
    (lambda: Residual(nn.Identity(), noise="uniform"), r"^noise must be one of \('gaussian', 'rademacher'\), got 'uniform'$"),
    (lambda: Residual(nn.Identity(), event_dims=2), r"^event_dims must be one of \(1, 3\), got 2$"),
    (lambda: Residual(nn.Identity(), lipschitz=1.0), r"^lipschitz must lie in \[0, 1\) or be None, got 1.0$"),
    (lambda: lipschitz_mlp(2, lipschitz=1.0), "^lipschitz must lie between 0 and 1 for a contraction, got 1.0$"),
    (lambda: lipschitz_convnet(2, (3,)), "^kernel_sizes must have one entry more than hidden, got 3 and 1$"),
    (lambda: SpectralLinear(2, 2, coeff=0), "^coeff must be positive, got 0$"),
    (lambda: SpectralConv2d(2, 2, 4), "^kernel_size must be odd, so that the image keeps its size, got 4$"),
    (lambda: Geometric(1.0), "^p must lie between 0 and 1, got 1.0$"),
    (lambda: Geometric(0.5, 0), "^exact_terms must be at least 1, got 0$"),
    (lambda: ShiftedPoisson(0), "^rate must be positive, got 0$"),
    (lambda: power_series_logdet(nn.Identity(), torch.zeros(1, 2), 0, torch.ones(1, 2)),
     "^the number of terms must be at least 1, got 0$"),
    (lambda: Residual(lambda x: x[..., :1])(torch.zeros(3, 2)),
     r"^g must return a tensor of its input's shape \(3, 2\), got \(3, 1\)$"),
    (lambda: Residual(lambda x: (x, x)).inverse(torch.zeros(3, 2)), r"^g must return .*, got tuple$"),
    (lambda: Residual(nn.Identity(), event_dims=3)(torch.zeros(3, 2)), r"^x must have shape \(B, C, H, W\), got \(3, 2\)$"),
    (lambda: Residual(nn.Identity()).inverse(torch.tensor(1.0)), r"^z must have shape \(\.\.\., D\)"),
])
def test_bad_input_is_told_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="^x must be a floating-point tensor, got dtype torch.int64$"):
        Residual(nn.Identity())(torch.zeros(3, 2, dtype=torch.int64))
