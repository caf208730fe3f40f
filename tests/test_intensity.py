"""HU to -1..1 and back, and volumes to a fixed shape and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctvae.config import WINDOW_PRESETS_HU
from ctvae.intensity import AIR_HU, fit_to_shape, from_hu, multiple_above, offset_of_fit, to_hu, undo_fit

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
SHIFTS = st.tuples(*[st.integers(-4, 4)] * 3)


def numbered(shape: tuple[int, int, int]) -> np.ndarray:
    """Every voxel its own HU, none of them air."""
    return np.arange(1, 1 + np.prod(shape), dtype=np.int16).reshape(shape)


@pytest.mark.parametrize("window_hu", [*WINDOW_PRESETS_HU.values(), (-1024.0, 3071.0), (-1000.0, 400.0)], ids=str)
def test_every_hu_of_the_window_comes_back(window_hu):
    hu = np.arange(window_hu[0], window_hu[1] + 1).astype(np.int16)
    x = from_hu(hu, window_hu)
    assert (x.dtype, x.min(), x.max()) == (np.float32, -1.0, 1.0)
    again = to_hu(x, window_hu)
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again, hu)


def test_what_lies_beyond_the_window_is_clipped():
    hu = np.array([-32768, -1024, -51, -50, 75, 200, 201, 3071, 32767], np.int16)
    x = from_hu(hu, (-50.0, 200.0))
    assert x.tolist() == [-1, -1, -1, -1, 0, 1, 1, 1, 1]
    assert to_hu(x, (-50.0, 200.0)).tolist() == [-50, -50, -50, -50, 75, 200, 200, 200, 200]
    assert to_hu(np.array([-7.0, 7.0], np.float32), (-50.0, 200.0)).tolist() == [-50, 200]


def test_hu_are_rounded_to_the_nearest():
    x = np.array([0.0004, 0.0006, -0.0004, -0.0006], np.float32)  # 0.4, 0.6, -0.4 and -0.6 HU
    assert to_hu(x, (-1000.0, 1000.0)).tolist() == [0, 1, 0, -1]


def test_from_hu_leaves_its_input_alone():
    hu = np.array([-2000.0, 2000.0], np.float32)
    from_hu(hu, (-1000.0, 1000.0))
    assert hu.tolist() == [-2000.0, 2000.0]


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES)
def test_undo_fit_brings_back_what_was_not_cropped(shape, target):
    hu = numbered(shape)
    fitted = fit_to_shape(hu, target)
    again = undo_fit(fitted, shape)
    assert fitted.shape == target
    assert again.shape == shape
    kept = again != AIR_HU
    np.testing.assert_array_equal(again[kept], hu[kept])
    assert kept.sum() == np.prod(np.minimum(shape, target))


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES)
def test_the_fit_is_centred(shape, target):
    """What is added or cropped on the two sides of an axis differs by at most one voxel."""
    filled = fit_to_shape(numbered(shape), target) != AIR_HU
    for axis in range(3):
        profile = np.flatnonzero(filled.any(axis=tuple({0, 1, 2} - {axis})))
        before, after = profile[0], target[axis] - 1 - profile[-1]
        assert abs(before - after) <= 1


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, SHIFTS)
def test_every_voxel_goes_where_offset_and_shift_say(shape, target, shift):
    """Voxel p of the source becomes voxel p - offset - shift of the fit, or leaves it; all else is air."""
    hu, expected = numbered(shape), np.full(target, AIR_HU, np.int16)
    offset = offset_of_fit(shape, target)
    for p in np.ndindex(shape):
        q = tuple(a - b - c for a, b, c in zip(p, offset, shift, strict=True))
        if all(0 <= a < n for a, n in zip(q, target, strict=True)):
            expected[q] = hu[p]
    np.testing.assert_array_equal(fit_to_shape(hu, target, shift), expected)


def test_a_shift_out_of_the_volume_leaves_air():
    assert (fit_to_shape(numbered((3, 3, 3)), (3, 3, 3), (0, 5, 0)) == AIR_HU).all()


@given(SIZES, SIZES)
def test_multiple_above_is_the_smallest(shape, grid):
    for size, step, found in zip(shape, grid, multiple_above(shape, grid), strict=True):
        assert found % step == 0
        assert size <= found < size + step
