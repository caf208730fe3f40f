"""Voxels that stand out: against scipy, and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from ctvae.calibration import Calibration
from ctvae.dots import dots
from ctvae.training.calibration import Example, _dotless

SOFT = (-0.16, 0.24)
SHAPE = (24, 32, 40)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [SHAPE, (1, 32, 40), (3, 1, 1), (1, 1, 1)])
def test_what_stands_out_is_told_by_scipys_filter(shape):
    x = 0.3 * noise(5, shape)
    others = np.ones((3, 3, 3))
    others[1, 1, 1] = 0
    kinds = list(dots(x, SOFT))
    for sign, end, two in ((1, SOFT[1], kinds[:2]), (-1, -SOFT[0], kinds[2:])):
        values = sign * x[0, 0].numpy()
        around = ndimage.maximum_filter(values, footprint=others, mode="constant", cval=-np.inf)
        for (told, far, kind), wanted in zip(two, (around <= end, around > end), strict=True):
            assert told == sign
            np.testing.assert_allclose(far[0, 0], np.clip(values - around, 0, 2) - 1, atol=1e-6)
            np.testing.assert_array_equal(kind[0, 0], wanted)


def spotted(seed: int, height: float) -> Tensor:
    """Soft tissue with noise, one voxel in 500 brighter, one in 500 darker by up to `height`."""
    chance = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    heights = height * torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    return 0.05 + 0.01 * noise(seed + 2) + heights * ((chance > 0.998).float() - (chance < 0.002).float())


def furthest(volumes: list[Tensor], sign: int) -> np.ndarray:
    """How far the 400 voxels stand out that do so most."""
    far = [next(far for told, far, _ in dots(x, SOFT) if told == sign) + 1 for x in volumes]
    return np.sort(torch.cat([each.flatten() for each in far]).numpy())[-400:]


def test_dots_stand_out_as_far_as_those_of_scans():
    examples = [Example(*2 * (spotted(seed, 0.6),), spotted(seed + 40, 0.1), SOFT) for seed in range(0, 12, 3)]
    calibration = _dotless([(e, e.raw) for e in examples], Calibration.nothing(SOFT))
    made = [calibration(e.raw, e.toned) for e in examples]
    for sign in (1, -1):
        before, now, wanted = (furthest(side, sign) for side in ([e.raw for e in examples], made, [e.real for e in examples]))
        assert np.abs(before - wanted).mean() > 0.1
        assert np.abs(now - wanted).mean() < 0.01  # knots are 0.01 apart
    alone = torch.stack([far for _, far, _ in dots(examples[0].raw, SOFT)]).amax(0) > -1
    changed = made[0] != examples[0].raw
    assert changed.any()
    assert not changed[~alone].any()  # nothing else is touched
    line = torch.full((1, 1, *SHAPE), 0.05)
    line[0, 0, 12, 16, 5:30] = 0.9  # no dots but a vessel: each voxel has a neighbour as bright
    torch.testing.assert_close(calibration(line, line), line)


def test_dots_beside_bone_are_not_taken_for_those_in_soft_tissue():
    """Both stand out by 0.3 where it is decoded; scans have those beside bone alone."""
    real = torch.full((1, 1, *SHAPE), 0.05)
    real[..., 2::4, 2::4, 2:20:4] = 0.4
    real[..., 2::4, 2::4, 3:20:4] = 0.7
    raw = real.clone()
    raw[..., 2::4, 2::4, 22::4] = 0.35
    made = _dotless([(Example(raw, raw, real, SOFT), raw)], Calibration.nothing(SOFT))(raw, raw)
    torch.testing.assert_close(made[..., :20], raw[..., :20], atol=0.002, rtol=0)
    torch.testing.assert_close(made[..., 20:], real[..., 20:], atol=0.002, rtol=0)


def test_dots_are_never_made():
    """Where scans have more of them than a decoder, none is added."""
    e = Example(*2 * (spotted(0, 0.1),), spotted(9, 0.6), SOFT)
    calibration = _dotless([(e, e.raw)], Calibration.nothing(SOFT))
    for (_, now, _), (_, before, _) in zip(dots(calibration(e.raw, e.toned), SOFT), dots(e.raw, SOFT), strict=True):
        assert bool((now <= before + 1e-6).all())
