"""Slabs that are denoised together, against joint solutions that are known.

For Gaussian data the flow is linear: a basis of noises sent through the solver gives the matrix from noise to sample, and so
the samples' exact covariance, without drawing any.
"""

from __future__ import annotations

import pytest
import torch

from ctvae import flow, slabs
from ctvae.wiener import WienerVelocity

S = 0.3
CORRELATION = 0.8  # of neighbouring slices of the stationary process


def fields(batch: torch.Tensor) -> torch.Tensor:
    """[B n] -> [B 1 n 1 1]"""
    return batch[:, None, :, None, None]


@pytest.mark.parametrize(("total", "depth"), [(8, 8), (9, 8), (20, 8), (33, 8), (5, 2), (7, 1), (64, 16)])
def test_slabs_cover_every_slice_and_nothing_else(total, depth):
    starts = slabs.covering(total, depth)
    seen = torch.zeros(total)
    for start in starts:
        seen[start : start + depth] += 1
    assert starts == sorted(set(starts))
    assert (starts[0], starts[-1]) == (0, total - depth)
    assert seen.min() >= 1
    assert seen.sum() == len(starts) * depth, "none reaches beyond the end"


def test_weights_add_up_to_a_constant_inside():
    """sin^4 is 3/8 on average, and what it has beside are two harmonics that cancel among four shifted by a quarter."""
    total = torch.zeros(64)
    for start in slabs.covering(64, 16):
        total[start : start + 16] += slabs.weights(16)
    torch.testing.assert_close(total[12:-12], torch.full((40,), 4 * 3 / 8))
    assert slabs.weights(16).min() > 0


def test_slabs_that_agree_leave_their_velocity_alone():
    x = torch.randn(2, 3, 20, 4, 5, generator=torch.Generator().manual_seed(0))

    def own(part: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return part.sin() * t.view(-1, 1, 1, 1, 1)

    starts, t = slabs.covering(20, 8), torch.tensor([0.3, 0.9])
    torch.testing.assert_close(slabs.joint([own] * len(starts), starts, 8)(x, t), own(x, t))


def ramp(position: float) -> flow.Velocity:
    """Of slices that are independent, their means those of a slope along the scan: a slab knows its own position alone."""
    mean = (position + torch.arange(-3.5, 4) / 100)[:, None, None]

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = t.view(-1, 1, 1, 1, 1)
        return mean + (time * S**2 - (1 - time)) / ((1 - time) ** 2 + (time * S) ** 2) * (x - time * mean)

    return velocity


def test_positions_advance_as_the_slabs_do():
    """A scan of 100 slices, of which 30 about the middle are made: the joint solution is mean + S * noise, slice by slice."""
    starts = slabs.covering(30, 8)
    places = slabs.positions(0.5, [(start - 11) / 100 for start in starts], 0.0, 1.0)
    x0 = fields(torch.randn(3, 30, generator=torch.Generator().manual_seed(1)))
    expected = fields((0.5 + torch.arange(-14.5, 15) / 100)[None])

    def made(where: list[float]) -> torch.Tensor:
        return flow.sample(slabs.joint([ramp(place) for place in where], starts, 8), x0, flow.times(250))

    torch.testing.assert_close(made(places), expected + S * x0, rtol=0, atol=2e-4)
    assert (made([0.5] * len(starts)) - expected - S * x0).abs().max() > 0.05, "told one position, the slope is lost"


def change(starts: list[int], depth: int, total: int) -> torch.Tensor:
    """E (x_(i+1) - x_i)^2 of joint samples of a stationary process, in units of the process's own: [total - 1].

    Exact up to the solver's steps.
    """
    places = torch.arange(depth)
    covariance = CORRELATION ** (places[:, None] - places).abs()
    factors = torch.linalg.cholesky(covariance - 1e-4 * torch.eye(depth)).T.contiguous()
    own = WienerVelocity(torch.zeros(depth), factors, torch.full((depth,), 1e-4))
    velocity = slabs.joint([own] * len(starts), starts, depth)
    matrix = flow.sample(velocity, fields(torch.eye(total)), flow.times(32, "equal"), "heun")[:, 0, :, 0, 0]
    found = matrix.T @ matrix
    squares = found.diag()[1:] + found.diag()[:-1] - 2 * found.diag(1)
    return squares / (2 * (1 - CORRELATION))


def seam(found: torch.Tensor, starts: list[int], depth: int) -> float:
    """Mean change at the slabs' ends over the mean elsewhere, away from the volume's own ends."""
    joins = {start - 1 for start in starts} | {start + depth - 1 for start in starts}
    inside = range(depth, len(found) - depth)
    at = torch.stack([found[i] for i in inside if i in joins])
    elsewhere = torch.stack([found[i] for i in inside if i not in joins])
    return (at.mean() / elsewhere.mean()).item()


def test_a_stationary_process_has_hardly_a_seam():
    starts = slabs.covering(32, 8)
    found = change(starts, 8, 32)
    assert seam(found, starts, 8) == pytest.approx(1.0, abs=0.02)
    assert found.max() < 1.05, "and is hardly rougher than it should be"


def test_the_measure_sees_seams_where_there_are_some(monkeypatch):
    """Slabs side by side are independent, so the change across them is 1 / (1 - CORRELATION); less overlap leaves more."""
    side_by_side = [0, 8, 16, 24]
    found = change(side_by_side, 8, 32)
    assert found[7] == pytest.approx(1 / (1 - CORRELATION), rel=0.01)
    assert seam(found, side_by_side, 8) == pytest.approx(1 / (1 - CORRELATION), rel=0.02)
    halves = slabs.covering(32, 8, overlap=2)
    monkeypatch.setattr(slabs, "weights", lambda depth: torch.sin(torch.pi * (torch.arange(depth) + 0.5) / depth) ** 2)
    assert seam(change(halves, 8, 32), halves, 8) > 1.08


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (0.5, [0.3, 0.5, 0.7]),  # fits
        (0.2, [0.1, 0.3, 0.5]),  # moved up
        (0.85, [0.5, 0.7, 0.9]),  # moved down
    ],
)
def test_a_volume_is_moved_until_it_fits(middle, expected):
    assert slabs.positions(middle, [-0.2, 0.0, 0.2], 0.1, 0.9) == pytest.approx(expected)


def test_a_volume_that_is_too_long_is_spread_over_what_is_known():
    assert slabs.positions(0.9, [-0.6, -0.2, 0.6], 0.1, 0.9) == pytest.approx([0.1, 0.1 + 0.8 / 3, 0.9])
