"""Gradients brought to one size, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctvae.training.balance import DECAY, Balance


def pulled(balance: Balance, y: np.ndarray, scale: float, **weights: float) -> np.ndarray:
    """Two losses: y . a, and another one, which is `scale` times as steep as its weight should show."""
    tensor = torch.tensor(y, requires_grad=True)
    losses = {"first": (tensor * A).sum(), "second": scale * (tensor.square()).sum()}
    return balance(tensor, losses, weights).numpy()


A = torch.tensor([3.0, 4.0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_each_pulls_as_its_weight_says_whatever_its_scale(scale):
    """At first the running means are the sizes themselves: |g_0| is 5, and g_1 goes along y."""
    y = np.array([0.6, -0.8], dtype=np.float32)
    found = pulled(Balance(("first", "second")), y, scale, second=0.5)
    np.testing.assert_allclose(found, np.array([3, 4]) + 0.5 * 5 * y, rtol=1e-5)


def test_sizes_are_running_means():
    balance = Balance(("first", "second"))
    scales = np.linspace(1.0, 3.0, 200)
    for scale in scales:
        pulled(balance, np.array([0.6, -0.8], dtype=np.float32), scale, second=1.0)
    mean = 2 * scales[0]
    for n, scale in enumerate(scales[1:], start=1):
        mean += max(1 / (1 + n), 1 - DECAY) * (2 * scale - mean)
    assert balance.sizes.tolist() == pytest.approx([5.0, mean], rel=1e-4)


def test_a_loss_that_does_not_pull_yet_is_not_counted():
    balance = Balance(("first", "second"))
    for _ in range(50):
        pulled(balance, np.zeros(2, dtype=np.float32), 1.0, second=0.5)
    y = np.array([0.6, -0.8], dtype=np.float32)
    np.testing.assert_allclose(pulled(balance, y, 1.0, second=0.5), np.array([3, 4]) + 0.5 * 5 * y, rtol=1e-5)


def test_sizes_are_those_of_all_processes():
    balance = Balance(("first", "second"), average=lambda sizes: sizes + 1)
    pulled(balance, np.array([0.6, -0.8], dtype=np.float32), 1.0, second=1.0)
    assert balance.sizes.tolist() == pytest.approx([6.0, 3.0])


def test_a_loss_that_is_not_there_pulls_nothing():
    y = torch.tensor([0.6, -0.8], requires_grad=True)
    balance = Balance(("first", "second"))
    np.testing.assert_allclose(balance(y, {"first": (y * A).sum()}, {"second": 1.0}).numpy(), [3, 4])
    assert balance.seen.tolist() == [1, 0]
