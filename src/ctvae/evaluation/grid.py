"""Both sides on one grid, and where the body is.

Resampling is box integration: each cell of the new grid takes the mean of what it covers, so that making a grid coarser
cannot alias and the mean is kept. What lies outside the scan is air.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ctvae.preprocess import BODY_MARGIN_VOXELS, Box

AIR_HU = -1000.0
BODY_HU = -500.0
Triple = tuple[float, float, float]
Array = NDArray[np.floating]


@dataclass(frozen=True)
class Grid:
    """The box of space that every scan is compared in, and the cells it is cut into."""

    spacing_mm: Triple  # x y z: what texture is measured at when the two sides' spacings disagree
    box_mm: Triple  # x y z: extent around the scan's middle
    resample_texture: bool  # the two sides' spacings disagree

    @classmethod
    def over(cls, real: list[tuple[tuple[int, ...], Triple]], synthetic: list[tuple[tuple[int, ...], Triple]]) -> Grid:
        """The grid for two sides given as (shape D H W, spacing x y z).

        In plane the box is the real scans' median; along the body their 10th percentile, so that few of them are
        padded.
        """
        extents = np.array([[size * step for size, step in zip(shape[::-1], mm, strict=True)] for shape, mm in real])
        ours = np.median([mm for _, mm in real], axis=0)
        theirs = np.median([mm for _, mm in synthetic], axis=0)
        disagree = bool(np.any(np.maximum(ours / theirs, theirs / ours) > 1.2))
        spacing = np.maximum(ours, theirs) if disagree else ours
        box = (*np.median(extents[:, :2], axis=0), np.quantile(extents[:, 2], 0.1))
        return cls(_triple(spacing), _triple(box), disagree)

    def cells(self, hu: Array, spacing_mm: Triple, middle: Triple, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """The box around voxel position `middle` (D H W) cut into `shape` (D H W) cells, in HU."""
        x = hu.astype(np.float32)
        for axis in range(3):
            step = spacing_mm[2 - axis]
            start = (middle[axis] + 0.5) * step - self.box_mm[2 - axis] / 2
            edges = start + self.box_mm[2 - axis] / shape[axis] * np.arange(shape[axis] + 1)
            x = _integrate(x, axis, edges / step)
        return x

    def at_common_spacing(self, hu: Array, spacing_mm: Triple) -> NDArray[np.float32]:
        """The whole scan at `self.spacing_mm`, its last partial cell dropped."""
        return resampled(hu, spacing_mm, self.spacing_mm)


def resampled(hu: Array, spacing_mm: Triple, to_mm: Triple) -> NDArray[np.float32]:
    """The whole scan [D H W] at another spacing (x y z), its last partial cell dropped."""
    x = hu.astype(np.float32)
    for axis in range(3):
        ratio = to_mm[2 - axis] / spacing_mm[2 - axis]
        x = _integrate(x, axis, ratio * np.arange(max(int(x.shape[axis] / ratio), 1) + 1))
    return x


def body_mask(hu: Array) -> NDArray[np.bool_]:
    """Voxels of the largest connected thing above -500 HU, with the air inside each slice. [D H W] -> bool [D H W]

    Thin things (tables, sheets) are cut off by an in-plane opening. All true where nothing is found.
    """
    dense = ndimage.binary_opening(hu > BODY_HU, np.ones((1, 3, 3)))
    labels, count = ndimage.label(dense)
    if count == 0:
        return np.ones(hu.shape, dtype=bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()
    return np.stack([ndimage.binary_fill_holes(piece) for piece in largest])


def about_body(body: NDArray[np.bool_]) -> Box:
    """The box that a scan is measured in: in plane its body and BODY_MARGIN_VOXELS about it, also where the scan ends before.

    So it makes no difference how wide a scan was cut or padded. Without it, scans cut to the body and the same ones padded to
    one width were told apart: in the wider, a mean over slices has less power, and borders of convolutions lie elsewhere.
    """
    rows, columns = (np.flatnonzero(body.any(axis=others)) for others in ((0, 2), (0, 1)))
    top, left = (int(places[0]) - BODY_MARGIN_VOXELS for places in (rows, columns))
    height, width = (int(places[-1] - places[0]) + 1 + 2 * BODY_MARGIN_VOXELS for places in (rows, columns))
    return Box((0, top, left), (len(body), height, width))


def middle_of(mask: NDArray[np.bool_]) -> Triple:
    """The mask's centroid in plane and the scan's middle along the body, as a voxel position (D H W)."""
    area = mask.sum(axis=0)
    rows, columns = area.sum(axis=1), area.sum(axis=0)
    h = float(rows @ np.arange(len(rows)) / rows.sum())
    w = float(columns @ np.arange(len(columns)) / columns.sum())
    return (mask.shape[0] - 1) / 2, h, w


def _integrate(x: NDArray[np.float32], axis: int, edges: NDArray[np.floating]) -> NDArray[np.float32]:
    """Means of x between neighbouring `edges` along `axis`; edges in voxels, voxel i covering i to i + 1."""
    size = x.shape[axis]
    lower = np.maximum(edges[:-1, None], np.arange(size))
    upper = np.minimum(edges[1:, None], np.arange(1, size + 1))
    share = (np.maximum(upper - lower, 0) / np.diff(edges)[:, None]).astype(np.float32)  # [cells size]
    missing = 1 - share.sum(axis=1)
    result = np.moveaxis(np.tensordot(share, x, axes=(1, axis)), 0, axis)
    return result + (AIR_HU * missing.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])


def _triple(values: object) -> Triple:
    x, y, z = (float(v) for v in values)  # type: ignore[attr-defined]
    return x, y, z
