"""The Haar step against its definition: signed means of blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctvae import haar

STEPS = list(itertools.product((1, 2), repeat=3))


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def by_definition(x: torch.Tensor, steps: haar.Step3) -> torch.Tensor:
    """Band (p, q, r) of a block is the mean of (-1)^(ip + jq + kr) x[i j k]; p runs fastest, then q, r."""
    found = []
    for r, q, p in itertools.product(*(range(step) for step in reversed(steps))):
        band = torch.zeros_like(x[:, :, :: steps[0], :: steps[1], :: steps[2]])
        for i, j, k in itertools.product(*(range(step) for step in steps)):
            band += (-1) ** (i * p + j * q + k * r) * x[:, :, i :: steps[0], j :: steps[1], k :: steps[2]]
        found.append(band / haar.bands(steps))
    return torch.cat(found, dim=1)


def test_a_pair_becomes_its_mean_and_half_difference():
    x = torch.tensor([3.0, 1.0, -4.0, 6.0]).view(1, 1, 1, 1, 4)
    low, high = haar.forward(x, (1, 1, 2))[0].flatten(1)
    assert low.tolist() == [2.0, 1.0]
    assert high.tolist() == [1.0, -5.0]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_bands_are_signed_block_means(steps):
    x = noise(2, 3, 4, 6, 8)
    torch.testing.assert_close(haar.forward(x, steps), by_definition(x, steps), rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_a_constant_volume_is_all_in_the_low_band(steps):
    y = haar.forward(torch.full((1, 2, 4, 4, 4), 0.75), steps)
    assert (y[:, :2] == 0.75).all()
    assert (y[:, 2:] == 0).all()


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_energy_is_the_volumes_divided_by_the_number_of_bands(steps):
    x = noise(1, 1, 6, 4, 8)
    energy = haar.forward(x, steps).square().sum() * haar.bands(steps)
    assert energy.item() == pytest.approx(x.square().sum().item(), rel=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(STEPS), st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 3), st.integers(0, 2**32))
def test_the_inverse_is_exact_for_hounsfield_units(steps, blocks, channels, seed):
    shape = [n * step for n, step in zip(blocks, steps, strict=True)]
    hu = torch.randint(-1024, 3072, (2, channels, *shape), generator=torch.Generator().manual_seed(seed)).float()
    y = haar.forward(hu, steps)
    assert y.shape == (2, channels * haar.bands(steps), *blocks)
    assert torch.equal(haar.inverse(y, steps), hu)


def test_bands_stay_within_the_volumes_range():
    x = noise(1, 1, 8, 8, 8).sign()
    twice = haar.forward(haar.forward(x)[:, :1])
    assert haar.forward(x).abs().max() <= 1
    assert twice.abs().max() <= 1


def test_gradients_pass_through_both_ways():
    x = noise(1, 1, 4, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: haar.inverse(haar.forward(v, (2, 1, 2)) ** 2, (2, 1, 2)), (x,))


def test_an_odd_axis_is_refused():
    with pytest.raises(ValueError, match="size 5 of axis 3 is not a multiple of 2"):
        haar.forward(torch.zeros(1, 1, 4, 5, 4), (1, 2, 1))
