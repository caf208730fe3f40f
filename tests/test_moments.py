"""Statistics of texture against numpy, and the pull between two sides' means."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from ctvae.calibration import level_of
from ctvae.training import moments as moments_module
from ctvae.training.moments import AIR, AIR_BINS, BINS, CELL, FEWEST, LAGS, LEVELS, SMALL, SOFT_BINS, Moments, statistics

SOFT = (-0.2, 0.3)
TISSUES = moments_module.TISSUES


def patches(seed: int, scale: float = 1.0, shape=(2, 1, 8, 12, 16)) -> torch.Tensor:
    return 0.05 + scale * 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHARES = slice(0, BINS - AIR_BINS)
BANDS = slice(SHARES.stop, SHARES.stop + 7 * LEVELS)  # of all above the soft tissue window's lower end, and as many of it
EVEN = slice(-3 * len(LAGS), None)  # steps in even tissue
CELLS = slice(EVEN.start - 2 * CELL**3, EVEN.start)  # the mean faint one, and that of tissue
BY_TISSUE = slice(CELLS.start - 3 * (len(TISSUES) - 1), CELLS.start)
BY_PLACE = slice(BY_TISSUE.start - 3 * CELL, BY_TISSUE.start)
FAINT_BANDS = slice(BY_PLACE.start - 14, BY_PLACE.start)
STEPS = slice(FAINT_BANDS.start - 3 * (len(LAGS) + len(SMALL)), FAINT_BANDS.start)


def test_shares_are_a_cumulative_histogram_of_cells_that_are_not_empty(monkeypatch):
    monkeypatch.setattr(moments_module, "_levelled", lambda x, soft: x)
    centres = torch.linspace(-1, 1, BINS)
    x = centres[torch.randint(BINS, (1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))]
    found = statistics(torch.cat((x, torch.full_like(x, -1.0)), dim=2), SOFT)[SHARES].numpy()
    exact = np.histogram(x.numpy(), bins=BINS, range=(-1 - 1 / (BINS - 1), 1 + 1 / (BINS - 1)))[0] / x.numel()
    np.testing.assert_allclose(found, exact[::-1].cumsum()[::-1][AIR_BINS:], atol=1e-4)
    between = statistics(torch.full((1, 1, 4, 4, 4), (centres[3] * 0.25 + centres[4] * 0.75).item()), SOFT)[SHARES]
    torch.testing.assert_close(between[3 - AIR_BINS : 6 - AIR_BINS], torch.tensor([1.0, 0.75, 0.0]), atol=1e-4, rtol=0)


def test_lungs_do_not_leave_the_count_by_getting_darker():
    """Nor are they darkened for partial volumes elsewhere: each value is pulled by what is off next to it alone."""
    moments, random = Moments(SOFT), torch.Generator().manual_seed(0)
    for _ in range(12):
        lung, darker = (level + 0.02 * torch.randn(1, 1, 8, 8, 8, generator=random) for level in (-0.82, -0.94))
        tissue, rims = patches(3, shape=(1, 1, 8, 8, 8)), -0.5 + 0.1 * torch.rand(1, 1, 8, 8, 8, generator=random)
        fake, real = torch.cat((darker, rims, tissue)), torch.cat((lung, tissue, tissue))
        moments(fake, real)
    fake.requires_grad_()
    (moments.off() * statistics(fake, SOFT))[SHARES].sum().backward()
    countable = fake.detach()[0] > -0.945
    assert (fake.grad[0][countable] < 0).float().mean() > 0.9  # downhill is brighter
    assert (fake.grad[1] < 0).float().mean() > 0.9  # and of rims where tissue should be


def test_what_is_too_frequent_over_a_wide_range_is_told_where_to_go():
    """Partial volumes spread evenly from fat to bone, where real ones are either: all are pulled, not those at the ends."""
    moments, random = Moments(SOFT), torch.Generator().manual_seed(0)
    for _ in range(12):
        fake = 1.2 * torch.rand(1, 1, 8, 8, 8, generator=random) - 0.4
        real = torch.where(torch.rand(1, 1, 8, 8, 8, generator=random) < 0.5, -0.4, 0.8)
        moments(fake, real + 0.02 * torch.randn(real.shape, generator=random))
    fake.requires_grad_()
    (moments.off() * statistics(fake, SOFT))[SHARES].sum().backward()
    middle = ((fake - 0.2).abs() > 0.1) & ((fake - 0.2).abs() < 0.5)
    away = fake.grad[middle].sign() == (0.2 - fake.detach()[middle]).sign()  # downhill is towards the nearer of the two
    assert away.float().mean() > 0.9


def test_soft_tissue_has_a_finer_histogram():
    x = patches(3)
    low, high = SOFT
    inside = x[x > AIR].clamp(low, high).numpy()
    found = statistics(x, SOFT)[BANDS.stop + 7 * LEVELS : BANDS.stop + 7 * LEVELS + SOFT_BINS - 1].numpy()
    half = (high - low) / (SOFT_BINS - 1) / 2
    exact = np.histogram(inside, bins=SOFT_BINS, range=(low - half, high + half))[0][::-1].cumsum()[::-1] / inside.size
    np.testing.assert_allclose(found, exact[1:], atol=0.02)  # shared by the nearest two, where numpy gives all to one


def test_histograms_do_not_see_the_level_of_a_patch():
    """Soft tissue is as wide as in a patch, not as in all of them together: a contrast agent moves it as a whole."""
    x, middle = patches(4, 0.05, (1, 1, 16, 16, 16)) - 0.01, sum(SOFT) / 2
    bone = torch.where(patches(5, 1.0, x.shape) > 0.35, 0.8, x)
    moved = torch.where(bone == 0.8, bone, x + 0.03)
    histograms = [slice(SHARES.start, SHARES.stop), slice(BANDS.stop + 7 * LEVELS, BANDS.stop + 7 * LEVELS + SOFT_BINS - 1)]
    for part in histograms:
        torch.testing.assert_close(statistics(moved, SOFT)[part], statistics(bone, SOFT)[part], atol=2e-3, rtol=0)
    levelled = moments_module._levelled(torch.cat((bone, moved)), SOFT)
    assert [level_of(patch, SOFT) for patch in levelled] == pytest.approx([middle, middle], abs=1e-6)
    assert torch.equal(levelled == 0.8, torch.cat((bone, bone)) == 0.8)
    air = torch.full_like(x, -1.0)
    assert torch.equal(moments_module._levelled(air, SOFT), air)


def test_it_does_not_matter_how_much_of_a_patch_is_air():
    """Or a decoder whose patches have more air than real ones would be pulled to put something there."""
    x, air = patches(1, 0.3, (1, 1, 16, 16, 16)), torch.full((1, 1, 16, 16, 16), -1.0)
    little, much = (torch.cat((x, air[:, :, :size]), dim=2) for size in (4, 16))
    torch.testing.assert_close(statistics(much, SOFT), statistics(little, SOFT), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(statistics(much, SOFT)[: EVEN.start], statistics(x, SOFT)[: EVEN.start], atol=1e-5, rtol=1e-4)


def test_steps_are_mean_differences_where_both_voxels_are_in_soft_tissue():
    x = patches(1)
    low, high = SOFT
    array = x[:, 0].numpy()
    exact = []
    for axis in (1, 2, 3):
        for lag in LAGS:
            ahead, behind = np.moveaxis(array, axis, 0)[lag:], np.moveaxis(array, axis, 0)[:-lag]
            both = (ahead > low) & (behind > low)
            step = np.abs(np.clip(ahead, low, high) - np.clip(behind, low, high))[both] / (high - low)
            exact += [np.minimum(step, most).mean() for most in ((1, *SMALL) if lag == 1 else (1,))]
    np.testing.assert_allclose(statistics(x, SOFT)[STEPS], exact, rtol=1e-5)


def test_steps_by_tissue_are_mean_differences_within_its_cells():
    middles = torch.tensor([-0.5, -0.2, -0.1, -0.02, 0.04, 0.3]).repeat(2).view(1, 1, 12, 1, 1)  # of TISSUES
    x = patches(1, 0.1, (1, 1, 48, 12, 16)) - 0.05 + middles.repeat_interleave(CELL, 2)
    low, high = SOFT
    cells = x[:, 0].numpy().reshape(1, 12, CELL, 3, CELL, 4, CELL)
    mean = cells.mean((2, 4, 6))
    exact = []
    for axis in (2, 4, 6):
        step = np.abs(np.diff(cells.clip(low, high), axis=axis)).mean((2, 4, 6)) / (high - low)
        exact += [step[(mean >= a) & (mean < b)].sum() for a, b in pairwise(TISSUES)]
    count = np.histogram(mean, TISSUES)[0]
    assert count.min() > 12
    np.testing.assert_allclose(statistics(x, SOFT)[BY_TISSUE], exact / np.tile(count.clip(0.05 * mean.size), 3), rtol=1e-4)


def test_steps_by_place_tell_a_lattice_from_texture():
    """Within pairs of voxels neighbours are alike, from one pair to the next they are not; all places together hide it."""
    x = patches(1, 0.2, (1, 1, 16, 16, 16))
    pairs = x[:, :, ::2].repeat_interleave(2, dim=2)
    found = statistics(pairs, SOFT)[BY_PLACE].view(3, CELL)
    assert found[0, ::2].abs().max() == 0
    low, high = SOFT
    step = np.abs(np.diff(pairs[0, 0].numpy().clip(low, high), axis=0)) / (high - low)
    both = (pairs[0, 0, 1:] > low).numpy() & (pairs[0, 0, :-1] > low).numpy()
    exact = [step[n::CELL][both[n::CELL]].mean() for n in range(CELL)]
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1:], found[1:].mean(1, keepdim=True).expand(2, CELL), rtol=0.1, atol=0)


def test_nothing_is_gained_by_holes_in_an_outline():
    """Bands see nothing that is darker than soft tissue: a hole of air is to them what one of fat is."""
    x = patches(1, shape=(1, 1, 16, 16, 16))
    holes = x.clone()
    holes[..., 8:] = -1.0
    holes[..., ::4, ::4, 6] = -1.0
    shallow = torch.where(holes == -1, SOFT[0], holes)
    found, expected = (statistics(patch, SOFT)[BANDS][:7] * share(patch) for patch in (holes, shallow))
    torch.testing.assert_close(found, expected)


def share(x: torch.Tensor) -> float:
    """Of pairs of voxels along each axis that hold anything but air."""
    return torch.nn.functional.max_pool3d((x > AIR).float(), 2).mean().item()


def test_steps_in_even_tissue_see_neither_outlines_nor_bone():
    """All that is near something else is left out, against numpy and scipy."""
    x = patches(1, 0.2, (1, 1, 16, 20, 24)).clamp(-0.19, 0.29)
    x[..., 10:] = -1.0
    x[:, :, 5:8, 14:] = 0.9
    low, high = SOFT
    window = x[0, 0].numpy().clip(low, high) / (high - low)
    around = {"size": 3, "mode": "nearest"}
    even = (ndimage.maximum_filter(x[0, 0].numpy(), **around) < high) & (ndimage.minimum_filter(x[0, 0].numpy(), **around) > low)
    exact = []
    for axis in range(3):
        for lag in LAGS:
            values, chosen = (np.moveaxis(each, axis, 0) for each in (window, even))
            both = chosen[lag:] & chosen[:-lag]
            exact.append(np.abs(values[lag:] - values[:-lag])[both].mean())
    found = statistics(x, SOFT)[EVEN]
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    x[..., 10] = -0.5  # what the outline is like does not matter
    torch.testing.assert_close(statistics(x, SOFT)[EVEN], found)


def test_a_lattice_is_the_mean_cell_of_where_it_lies():
    """In lungs, and none in tissue: the mean faint cell is the lattice, and that of tissue as good as nothing."""
    random = torch.Generator().manual_seed(0)
    lattice = 0.1 * torch.randn(CELL, CELL, CELL, generator=random).clamp(-1, 1)
    lung = -0.8 + 0.02 * torch.randn(1, 1, 32, 32, 32, generator=random)
    found = statistics(torch.cat((lung + lattice.repeat(8, 8, 8), patches(3, 0.1, (1, 1, 32, 32, 32)))), SOFT)
    faint, tissue = found[CELLS].chunk(2)
    torch.testing.assert_close(faint, (lattice - lattice.mean()).flatten(), atol=0.006, rtol=0)
    assert tissue.abs().max() < 0.02
    assert tissue.std() < faint.std() / 10
    bands = found[FAINT_BANDS]
    assert bands[:7].sum() > 3 * statistics(lung, SOFT)[FAINT_BANDS][:7].sum()


def test_a_patch_too_small_for_a_level_has_none_of_it():
    bands = statistics(patches(1, shape=(1, 1, 4, 8, 8)), SOFT)[BANDS].view(LEVELS, 7)
    assert (bands[:2] > 0).all()
    assert not bands[2].any()


def test_bands_of_a_checkerboard_lie_in_one_band():
    signs = torch.tensor([1.0, -1.0])
    board = signs.view(2, 1, 1) * signs.view(1, 2, 1) * signs.view(1, 1, 2)
    x = 0.5 * board.repeat(4, 4, 4)[None, None]
    bands = statistics(x, (-1.0, 1.0))[BANDS]
    high_along_all_axes = [0.0] * 6 + [0.5]
    assert bands.tolist() == pytest.approx(high_along_all_axes + [0.0] * 7 * (LEVELS - 1))


def test_nothing_pulls_where_means_agree():
    moments = Moments(SOFT)
    for seed in range(FEWEST + 12):
        loss = moments(patches(seed), patches(seed))
    assert loss == 0
    assert moments.off().abs().max() == 0


def test_contrast_is_brought_to_what_real_patches_have():
    """All that differs is the size of the noise, and no patch is paired with another."""
    scale = torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.005)
    moments = Moments(SOFT)
    for step in range(FEWEST + 250):
        fake = 0.05 + scale * (patches(1000 + step) - 0.05)
        optimizer.zero_grad()
        loss = moments(fake, patches(step))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    assert scale.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("pushed", [-20, 20])
def test_means_come_to_agree_against_a_loss_that_pulls_the_other_way(pushed, monkeypatch):
    """As an adversary does: without multipliers the two end in a compromise."""

    def ends_at(steps: int) -> float:
        scale = torch.tensor(1.0, requires_grad=True)
        optimizer, moments, late = torch.optim.SGD([scale], lr=0.005), Moments(SOFT), []
        for step in range(FEWEST + steps):
            loss = moments(0.05 + scale * (patches(5000 + step) - 0.05), patches(step))
            optimizer.zero_grad()
            (loss - pushed * scale * (step >= FEWEST)).backward()  # from when means are compared
            optimizer.step()
            late.append(scale.item())
        return float(np.mean(late[-100:]))

    assert ends_at(400) == pytest.approx(1, abs=0.02)
    monkeypatch.setattr(moments_module, "RATE", 0.0)
    assert (ends_at(200) - 1) * np.sign(pushed) > 0.04


def test_averages_over_processes_are_what_is_observed():
    moments = Moments(SOFT, average=lambda values: values + 1)
    moments(patches(0), patches(1))
    torch.testing.assert_close(moments.real, statistics(patches(1), SOFT) + 1)
