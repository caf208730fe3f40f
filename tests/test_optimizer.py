"""Muon against the polar factor of an SVD, and its Adam branch against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ctvae.config import Training
from ctvae.training.optimizer import Muon, build_optimizer, orthogonalised

SHAPES = [(32, 32), (64, 20), (20, 64), (16, 270)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(rows: int, columns: int) -> torch.Tensor:
    """Singular values from 1 down to 0.05."""
    u, _, vh = torch.linalg.svd(noise(rows, columns), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 0.05, min(rows, columns))) @ vh


class One(nn.Module):
    """A network of one parameter."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.p = nn.Parameter(value.clone())


def stepped(network: One, gradients: list[torch.Tensor], **settings: float) -> torch.Tensor:
    optimizer = Muon(network, **settings)
    for gradient in gradients:
        network.p.grad = gradient.clone()
        optimizer.step()
    return network.p.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalised(spread(*shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_points_along_the_polar_factor(shape):
    matrix = spread(*shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found, polar = orthogonalised(matrix), u @ vh
    assert nn.functional.cosine_similarity(found.flatten(), polar.flatten(), dim=0) > 0.98
    rotated = u.T @ found @ vh.T  # diagonal where the singular vectors are kept
    assert (rotated - rotated.diag().diag()).abs().max() < 0.05


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_gradients_size_does_not_matter(scale):
    matrix = spread(24, 40)
    torch.testing.assert_close(orthogonalised(scale * matrix), orthogonalised(matrix), rtol=0, atol=0.05)


def test_no_gradient_moves_nothing():
    assert (orthogonalised(torch.zeros(4, 6)) == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_is_as_large_as_adams(shape):
    """0.2 sqrt(max(rows, columns)) on an orthogonal matrix is a root mean square of 0.2 times the rate."""
    moved = stepped(One(torch.zeros(shape)), [spread(*shape)], lr=0.01)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


def test_the_update_goes_downhill():
    gradient = spread(12, 20)
    assert (stepped(One(torch.zeros(12, 20)), [gradient], lr=0.01) * gradient).sum() < 0


def test_a_convolution_is_the_matrix_of_its_outputs():
    gradients = [noise(6, 4, 3, 3, 3, seed=step) for step in range(3)]
    kernel = stepped(One(torch.zeros(6, 4, 3, 3, 3)), gradients, lr=0.01)
    matrix = stepped(One(torch.zeros(6, 108)), [g.flatten(1) for g in gradients], lr=0.01)
    assert torch.equal(kernel.flatten(1), matrix)


def test_momentum_follows_its_formula():
    """Nesterov: g + 0.95 (m - g) with m the running mean of weight 0.05."""
    gradients = [noise(8, 8, seed=step) for step in range(4)]
    expected, momentum = torch.zeros(8, 8), torch.zeros(8, 8)
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        expected -= 0.01 * 0.2 * 8**0.5 * orthogonalised(0.05 * g + 0.95 * momentum)
    found = stepped(One(torch.zeros(8, 8)), gradients, lr=0.01)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-5)


def test_weight_decay_is_decoupled_and_spares_vectors():
    matrix = stepped(One(torch.ones(4, 4)), [torch.zeros(4, 4)] * 3, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(matrix, torch.full((4, 4), 0.95**3))
    vector = stepped(One(torch.ones(4)), [torch.zeros(4)] * 3, lr=0.1, weight_decay=0.5)
    assert (vector == 1).all()


@pytest.mark.parametrize("shape", [(7,), ()], ids=str)
def test_vectors_follow_torchs_adam(shape):
    start, gradients = noise(*shape), [noise(*shape, seed=step) * 10.0 ** (step % 3 - 1) for step in range(30)]
    ours, theirs = One(start), One(start)
    muon, adam = Muon(ours, lr=0.01), torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for gradient in gradients:
        ours.p.grad, theirs.p.grad = gradient.clone(), gradient.clone()
        muon.step()
        adam.step()
        torch.testing.assert_close(ours.p.detach(), theirs.p.detach(), rtol=1e-5, atol=1e-7)


def test_a_parameter_without_gradient_stays():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = network[1].weight.detach().clone()
    optimizer = Muon(network, lr=0.1)
    network[0](noise(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(network[1].weight, before)


def test_least_squares_is_solved():
    """Y = X W^T + b, badly scaled; the known solution is found while the rate falls to zero."""
    x = noise(200, 12) * torch.logspace(0, -1.5, 12)
    target, offset = noise(5, 12, seed=1), noise(5, seed=2)
    network = nn.Linear(12, 5)
    nn.init.zeros_(network.weight)
    optimizer, steps, losses = Muon(network, lr=0.1), 400, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        loss = (network(x) - (x @ target.T + offset)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-4 * losses[0]
    torch.testing.assert_close(network.weight.detach(), target, rtol=0, atol=0.1)


def test_the_recipe_names_the_optimizer():
    network = nn.Linear(2, 2)
    muon = build_optimizer(network, Training(optimizer="muon", lr=0.3, weight_decay=0.1))
    assert isinstance(muon, Muon)
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["weight_decay"]) == (0.3, 0.1)
    adam = build_optimizer(network, Training(optimizer="adam", lr=0.3))
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 0.3


def test_a_beginning_is_the_state_of_a_step_that_changes_nothing():
    """Zero gradients: the planner makes the state without following a step's arithmetic."""
    torch.manual_seed(0)
    states = []
    for begin in (True, False):
        layer = torch.nn.Linear(4, 3)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = Muon(layer, lr=0.1)
        optimizer.begin() if begin else optimizer.step()
        states.append([{k: v.shape for k, v in optimizer.state[p].items()} for p in layer.parameters()])
    assert states[0] == states[1]
    assert [sorted(state) for state in states[0]] == [["momentum"], ["mean", "square", "step"]]
