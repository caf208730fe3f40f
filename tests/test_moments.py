"""Statistics of texture against numpy, and the pull between two sides' means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctvae.training.moments import BINS, LAGS, SIZES, Moments, statistics

SOFT = (-0.2, 0.3)


def patches(seed: int, scale: float = 1.0, shape=(2, 1, 8, 12, 16)) -> torch.Tensor:
    return 0.05 + scale * 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kinds(x: torch.Tensor) -> dict[str, np.ndarray]:
    shares, steps, bands = statistics(x, SOFT).split(SIZES)
    return {"near": shares[:1].numpy(), "shares": shares[1:].numpy(), "steps": steps.numpy(), "bands": bands.numpy()}


def test_shares_are_a_histogram_of_body_and_what_surrounds_it():
    centres = torch.linspace(-1, 1, BINS)
    body = centres[torch.randint(BINS // 2, BINS, (1, 1, 12, 12, 12), generator=torch.Generator().manual_seed(0))]
    found = kinds(body)
    exact = np.histogram(body.numpy(), bins=BINS, range=(-1 - 1 / (BINS - 1), 1 + 1 / (BINS - 1)))[0] / body.numel()
    np.testing.assert_allclose(found["shares"].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(found["shares"], exact, atol=0.01)  # but for edges, about which there is less
    between = kinds(torch.full((1, 1, 8, 8, 8), (centres[50] * 0.25 + centres[51] * 0.75).item()))["shares"]
    np.testing.assert_allclose(between[50:52], [0.25, 0.75], atol=1e-4)
    hole = torch.full((1, 1, 24, 24, 24), 0.0)
    hole[..., :12] = -1.0  # air beside the body; a plane next to it has 2 of 5 planes of body about it, the next has 1
    np.testing.assert_allclose(kinds(hole)["shares"][0], (2 + 1) / (2 + 1 + 3 + 4 + 8 * 5 + 4 + 3), rtol=0.01)


def test_steps_are_mean_differences_where_both_voxels_are_body():
    x = patches(1)
    low, high = SOFT
    array = x[:, 0].numpy()
    sizes, squares = [], []
    for axis in (1, 2, 3):
        for lag in LAGS:
            ahead, behind = np.moveaxis(array, axis, 0)[lag:], np.moveaxis(array, axis, 0)[:-lag]
            both = (ahead > low) & (behind > low)
            step = ((np.clip(ahead, low, high) - np.clip(behind, low, high)) / (high - low))[both]
            sizes.append(np.abs(step).mean())
            squares.append(np.square(step).mean())
    np.testing.assert_allclose(kinds(x)["steps"], sizes + squares, rtol=1e-4)


def test_bands_of_a_checkerboard_lie_in_one_band():
    signs = torch.tensor([1.0, -1.0])
    board = signs.view(2, 1, 1) * signs.view(1, 2, 1) * signs.view(1, 1, 2)
    x = 0.5 * board.repeat(4, 4, 4)[None, None]
    bands = kinds(x)["bands"].tolist()
    assert bands[:14] == pytest.approx([0] * 6 + [0.5] + [0] * 7)  # the finest level's last: high along all three axes
    assert bands[14:] == pytest.approx([0] * 6 + [0.5] + [0] * 7)  # from one end of the window to the other


def test_nothing_pulls_where_means_agree():
    moments, noise = Moments(SOFT), patches(0)
    for size in (1.0, 0.5) * 15:  # so that there is a spread
        moments(noise * size, noise * size)
    moments.fake.copy_(moments.real)
    assert moments(patches(1), patches(2)) == 0
    assert moments(patches(3), patches(4)) != 0  # these were others


def test_contrast_is_brought_to_what_real_patches_have():
    """All that differs is the size of the noise, and no patch is paired with another."""
    scale = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.005)
    moments = Moments(SOFT)
    for step in range(400):
        fake = 0.05 + scale * (patches(1000 + step) - 0.05)
        optimizer.zero_grad()
        loss = moments(fake, patches(step))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    assert scale.item() == pytest.approx(1, abs=0.1)


def test_averages_over_processes_are_what_is_observed():
    moments = Moments(SOFT, average=lambda values: values + 1)
    moments(patches(0), patches(1))
    torch.testing.assert_close(moments.real, statistics(patches(1), SOFT) + 1)
