"""Losses against torch.distributions and against volumes whose loss is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ctvae import haar, losses


def ramp(d: float, h: float, w: float, shape: tuple[int, int, int] = (5, 6, 7)) -> torch.Tensor:
    """Rises by d, h, w per voxel along the axes: [1 1 D H W]."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return (d * z + h * y + w * x)[None, None]


def test_kl_is_that_of_torch_distributions():
    random = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(2, 4, 3, 3, 3, generator=random, dtype=torch.float64)
    logvar = 2 * torch.randn(mean.shape, generator=random, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(losses.kl_to_standard_normal(mean, logvar), expected)


def test_kl_is_zero_for_the_standard_normal_alone():
    zero = torch.zeros(3)
    assert losses.kl_to_standard_normal(zero, zero).tolist() == [0.0] * 3
    assert (losses.kl_to_standard_normal(zero, torch.tensor([0.1, -0.1, 1.0])) > 0).all()


def test_gradient_l1_of_a_ramp_is_its_mean_slope():
    slope = losses.gradient_l1(ramp(0.3, -0.6, 0.9), torch.zeros(1, 1, 5, 6, 7, dtype=torch.float64))
    assert slope.item() == pytest.approx((0.3 + 0.6 + 0.9) / 3)


def test_gradient_l1_does_not_see_an_offset():
    x = ramp(1, 2, 3)
    assert losses.gradient_l1(x + 5.0, x).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-1.0, 1.0, 2.0),  # both ends of what the window shows: its whole width
        (-0.9, -0.3, 0.0),  # both below
        (0.5, 0.9, 0.0),  # both above
        (-0.1, 0.1, 1.0),  # half of the window
        (0.1, 0.9, 0.5),  # from 0.1 to the window's end
    ],
)
def test_window_l1_of_two_greys(x, y, expected):
    shape = (1, 1, 2, 3, 4)
    assert losses.window_l1(torch.full(shape, x), torch.full(shape, y), -0.2, 0.2).item() == pytest.approx(expected)


def test_window_l1_is_a_mean_over_voxels():
    x, y = torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2)
    y[..., 0, 0] = 0.1
    assert losses.window_l1(x, y, -0.2, 0.2).item() == pytest.approx(0.5 / 4)


def test_a_window_beyond_which_nothing_is_learned():
    x = torch.tensor([-0.9, 0.0, 0.9]).view(1, 1, 1, 1, 3).requires_grad_()
    losses.window_l1(x, torch.full_like(x, 0.1), -0.2, 0.2).backward()
    assert x.grad is not None
    assert (x.grad.flatten() != 0).tolist() == [False, True, False]


def test_the_detail_gap_is_what_the_detail_was_scaled_by():
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    bands = haar.forward(x)
    weaker = haar.inverse(torch.cat((bands[:, :1], 0.5 * bands[:, 1:]), dim=1))
    assert losses.detail_gap_db(x, x) == 0
    assert losses.detail_gap_db(x, weaker, levels=1) == pytest.approx(20 * math.log10(2), abs=1e-3)
    assert losses.detail_gap_db(weaker, x, levels=1) == pytest.approx(20 * math.log10(2), abs=1e-3)  # made up counts as lost
    assert losses.detail_gap_db(x, weaker) == pytest.approx(10 * math.log10(2), abs=1e-3)  # the second level is whole


def test_the_detail_gap_does_not_ask_where_an_edge_lies():
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert losses.detail_gap_db(x, x.roll((4, 4, 4), (2, 3, 4))) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 18, 21), (6, 7, 9)])
def test_the_detail_gap_takes_any_size(shape):
    x = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    assert 4 < losses.detail_gap_db(x, 0.5 * x) < 20 * math.log10(2) + 1e-3


REAL, FAKE = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])


@pytest.mark.parametrize(
    ("kind", "judging", "deceiving"),
    [
        ("hinge", (0 + 0.5) / 2 + (0 + 1.5) / 2, (2.0 - 0.5) / 2),
        ("lsgan", 0.5 * (1 + 0.25) / 2 + 0.5 * (4 + 0.25) / 2, 0.5 * (9 + 0.25) / 2),
        ("relativistic", (math.log1p(math.exp(-4)) + math.log(2)) / 2, (math.log1p(math.exp(4)) + math.log(2)) / 2),
    ],
)
def test_adversarial_losses_of_logits_that_are_known(kind, judging, deceiving):
    assert losses.judging(REAL, FAKE, kind).item() == pytest.approx(judging)
    assert losses.deceiving(REAL, FAKE, kind).item() == pytest.approx(deceiving)


def test_the_least_squares_judge_tells_the_share_of_real_ones():
    """Where real and decoded ones cannot be told apart, its best logit is a half (Mao et al. 2017); hinge has no opinion."""
    logit = torch.tensor(0.5, requires_grad=True)
    for kind in ("lsgan", "hinge"):
        (slope,) = torch.autograd.grad(losses.judging(logit, logit, kind), logit)
        assert slope.item() == pytest.approx(0)
    (slope,) = torch.autograd.grad(losses.judging(logit + 0.1, logit + 0.1, "lsgan"), logit)
    assert slope.item() == pytest.approx(2 * 0.1)


def test_several_decoded_patches_are_compared_with_the_same_real_ones():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    gaps = [0 - 1, 1 - 3, 2 - 1, 3 - 3]
    assert losses.judging(real, fake, "relativistic").item() == pytest.approx(sum(math.log1p(math.exp(g)) for g in gaps) / 4)


@pytest.mark.parametrize("kind", ["hinge", "lsgan", "relativistic"])
def test_what_deceives_is_what_the_judge_takes_for_real(kind):
    logit = torch.tensor([-0.5, 0.2], requires_grad=True)
    (slope,) = torch.autograd.grad(losses.deceiving(REAL, logit, kind), logit)
    assert (slope < 0).all()
