"""Hounsfield units to the network's -1..1 and back, and volumes to the network's shape and back.

Arrays are [... D H W]. AIR_HU fills what lies outside a scan.
"""

from __future__ import annotations

import numpy as np

AIR_HU = -1000
Size3 = tuple[int, int, int]
Window = tuple[float, float]


def from_hu(hu: np.ndarray, window_hu: Window) -> np.ndarray:
    """HU -> float32 in -1..1; values beyond the window are clipped to its ends."""
    low, high = window_hu
    x = (hu.astype(np.float32) - low) * np.float32(2.0 / (high - low)) - 1.0
    return np.clip(x, -1.0, 1.0, out=x)


def to_hu(x: np.ndarray, window_hu: Window) -> np.ndarray:
    """-1..1 -> int16 HU, rounded; values beyond are clipped to the window."""
    low, high = window_hu
    return np.rint((np.clip(x, -1.0, 1.0) + 1.0) * ((high - low) / 2.0) + low).astype(np.int16)


def fit_to_shape(hu: np.ndarray, shape: Size3, shift: Size3 = (0, 0, 0)) -> np.ndarray:
    """Crop or pad with air about the centre, moved by `shift` voxels, to exactly `shape`: [D H W] -> [*shape]."""
    out = np.full(shape, AIR_HU, dtype=hu.dtype)
    source, target = _overlap(hu.shape, shape, shift)
    out[target] = hu[source]
    return out


def undo_fit(fitted: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of an unshifted `fit_to_shape`: back to `shape`, air where it had been cropped away."""
    out = np.full(shape, AIR_HU, dtype=fitted.dtype)
    source, target = _overlap(shape, fitted.shape, (0, 0, 0))
    out[source] = fitted[target]
    return out


def offset_of_fit(source: tuple[int, ...], shape: Size3) -> Size3:
    """Voxel of the source array that becomes voxel (0, 0, 0) of the unshifted fit; negative where it was padded."""
    d, h, w = ((have - want) // 2 for have, want in zip(source, shape, strict=True))
    return d, h, w


def multiple_above(shape: tuple[int, ...], grid: tuple[int, ...]) -> Size3:
    """The smallest shape on `grid` that holds `shape`."""
    d, h, w = (-(-size // step) * step for size, step in zip(shape, grid, strict=True))
    return d, h, w


def _overlap(source: tuple[int, ...], target: tuple[int, ...], shift: Size3) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where two centred boxes overlap, in the indices of each."""
    take, put = [], []
    for have, want, move in zip(source, target, shift, strict=True):
        offset = (have - want) // 2 + move
        start, stop = max(0, offset), min(have, offset + want)
        take.append(slice(start, max(start, stop)))
        put.append(slice(start - offset, max(start, stop) - offset))
    return tuple(take), tuple(put)
