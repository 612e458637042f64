"""SOAP against an independent implementation, against Adam where the two are one, and what makes it more than Adam."""
import copy

import pytest
import torch
from pytorch_optimizer import SOAP as Theirs
from torch import nn

from flowkit import SOAP


def net(sizes=(3, 6, 6, 6, 2), dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def trained(model, optimiser, steps):
    """The weights after so many steps on batches that are the same for all."""
    like = next(model.parameters())
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(64, model[0].in_features, generator=random).to(like)
        optimiser.zero_grad()
        (model(x) - torch.stack([x.prod(-1), x.norm(dim=-1)], -1)).square().mean().backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("every", [1, 4, 100])
def test_it_is_what_pytorch_optimizer_makes_of_the_paper(every, monkeypatch):
    """Weight by weight there, stacked by shape here. Its QR decomposition is one of float32 numbers, which tells in directions of no gradient."""
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x: torch.return_types.linalg_qr([part.to(x) for part in qr(x.float())]))
    one, other = net(dtype=torch.float64), net(dtype=torch.float64)
    ours = trained(one, SOAP(one.parameters(), lr=3e-3, betas=(0.9, 0.97), every=every), 40)
    theirs = trained(other, Theirs(other.parameters(), lr=3e-3, betas=(0.9, 0.97), weight_decay=0.0, precondition_frequency=every), 40)
    start = [p.detach() for p in net(dtype=torch.float64).parameters()]
    for a, b, before in zip(ours, theirs, start):
        assert (a - before).norm() > 0.01
        assert (a - b).norm() < 1e-3 * (a - before).norm()


def test_vectors_and_sides_too_wide_get_adams_step():
    """The first gradient only sets the directions up, so Adam begins with the second."""
    gradients = torch.randn(20, 5, 7, generator=torch.Generator().manual_seed(0))

    def after(make, gradients):
        weights = [nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.tensor(0.0))]
        optimiser = make(weights)
        for g in gradients:
            for p, part in zip(weights, (g, g[0], g[0, 0])):
                p.grad = part.clone()
            optimiser.step()
        return torch.cat([p.detach().reshape(-1) for p in weights])

    ours = after(lambda w: SOAP(w, lr=0.01, betas=(0.8, 0.9), widest=1), gradients)
    adam = after(lambda w: torch.optim.Adam(w, lr=0.01, betas=(0.8, 0.9)), gradients[1:])
    assert torch.allclose(ours, adam, atol=1e-6) and ours.abs().min() > 1e-3


def turned_problem(optimiser, left, right, steps=30):
    """Least squares over W (4, 5), written in other coordinates: W = leftᵀ W' right; the loss after the training."""
    random = torch.Generator().manual_seed(3)
    a, target = torch.randn(9, 4, generator=random, dtype=torch.float64), torch.randn(9, 5, generator=random, dtype=torch.float64)
    scale = torch.logspace(0, 1, 5, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    made = optimiser([weight])
    for _ in range(steps):
        made.zero_grad()
        loss = ((a @ (left.mT @ weight @ right) - target) * scale).square().mean()
        loss.backward()
        made.step()
    return loss.item()


def test_coordinates_do_not_matter():
    """Turn rows and columns of a weight matrix: SOAP goes the same way, Adam another."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (4, 5))
    def straight(make): return turned_problem(make, torch.eye(4, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    def soap(weights): return SOAP(weights, lr=0.02)
    def adam(weights): return torch.optim.Adam(weights, lr=0.02, betas=(0.95, 0.95))
    assert turned_problem(soap, left, right) == pytest.approx(straight(soap), rel=1e-6)
    assert abs(turned_problem(adam, left, right) / straight(adam) - 1) > 0.01


def test_weights_with_more_axes_none_and_no_gradient():
    weights = [nn.Parameter(torch.ones(4, 3, 2, 2)), nn.Parameter(torch.ones(4, 3, 2, 2)), nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3, 0))]
    optimiser = SOAP(weights, lr=0.1)
    for seed in range(12):
        weights[0].grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        weights[2].grad = torch.tensor(1.0)
        optimiser.step()
    assert (weights[0] != 1).all() and torch.isfinite(weights[0]).all() and weights[2].item() == pytest.approx(1 - 0.1 * 11, abs=1e-5)
    assert torch.equal(weights[1], torch.ones(4, 3, 2, 2)), "a gradient of zero moves nothing"


def test_a_training_goes_on_from_its_saved_state():
    one = net()
    optimiser = SOAP(one.parameters(), lr=3e-3, every=3)
    trained(one, optimiser, 8)
    other = net()
    other.load_state_dict(one.state_dict())
    again = SOAP(other.parameters(), lr=1.0)
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(trained(one, optimiser, 8), trained(other, again, 8)))


def test_closure_and_parameter_groups():
    weight, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimiser = SOAP([{"params": [weight]}, {"params": [still], "lr": 0.0}], lr=0.1)

    def closure():
        optimiser.zero_grad()
        loss = (weight.square() + still.square()).sum()
        loss.backward()
        return loss

    losses = [optimiser.step(closure).item() for _ in range(5)]
    assert losses[0] == 8 and losses[-1] < losses[0] - 0.5 and torch.equal(still, torch.ones(2, 2))


@pytest.mark.parametrize("wrong, said", [({"lr": -1.0}, "lr must not be negative, got -1.0"), ({"betas": (0.9, 1.0)}, "betas must be in"),
                                         ({"every": 0}, "every must be at least 1, got 0")])
def test_settings_out_of_range(wrong, said):
    with pytest.raises(ValueError, match=said):
        SOAP([nn.Parameter(torch.ones(2))], **wrong)
