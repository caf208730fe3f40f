"""A CT volume: HU values with the geometry that says where they are in the patient.

The only place where axis order is converted. Arrays are D H W (z y x): `hu[0]` is the lowest axial slice. Affines are
NIfTI's: they take voxel indices (i j k) = (x y z) to RAS millimetres, so array index [d, h, w] is voxel (w, h, d).

Canonical axes are L P S: d runs up, h to posterior, w to the patient's left, so that `hu[d]` is drawn as a radiologist
sees it. In RAS millimetres the x and y columns of such an affine are negative. An oblique scan is only flipped and
transposed to the nearest such order, never resampled.

Pixel-centre convention: integer index n is the centre of a voxel, whose faces are at n - 1/2 and n + 1/2. When N voxels
are resampled to M over the same extent, new index m lies at old index (m + 1/2) * N / M - 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

CANONICAL_SIGNS = (-1.0, -1.0, 1.0)  # of RAS x y z along the voxel axes i j k


@dataclass(frozen=True, eq=False)
class Volume:
    """HU on a grid of canonical axes."""

    hu: np.ndarray  # [D H W]
    affine: np.ndarray  # [4 4] float64: voxel (x y z) to RAS mm

    @property
    def shape(self) -> tuple[int, int, int]:
        """D H W."""
        depth, height, width = self.hu.shape
        return depth, height, width

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along x y z."""
        return spacing_of(self.affine)


@dataclass(frozen=True, eq=False)
class Orientation:
    """How a scan was stored: the exact way back from canonical axes.

    `axes[a]` is the stored axis that became canonical axis a of (x y z); `flips[a]` says whether it was reversed.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, int, int]  # canonical D H W of the scan as it was read
    affine: np.ndarray  # [4 4] as stored
    canonical_affine: np.ndarray  # [4 4] of the scan as it was read

    def restore(self, volume: Volume) -> tuple[np.ndarray, np.ndarray]:
        """The voxels (i j k) and affine of `volume` in the stored axes.

        A volume on the grid that was read gets the stored affine bit for bit; on another grid (a crop, say) the
        affine is computed from the volume's own.
        """
        data_xyz = np.flip(volume.hu.transpose(2, 1, 0), tuple(a for a in range(3) if self.flips[a]))
        data_ijk = data_xyz.transpose(np.argsort(self.axes))
        if volume.shape == self.shape and np.array_equal(volume.affine, self.canonical_affine):
            return data_ijk, self.affine.copy()
        to_canonical = _reordering(self.axes, self.flips, volume.shape[::-1])
        return data_ijk, volume.affine @ np.linalg.inv(to_canonical)


def canonical(data_ijk: np.ndarray, affine: np.ndarray) -> tuple[Volume, Orientation]:
    """The scan `data_ijk` [I J K] in canonical axes, and the way back.

    `affine` [4 4] takes (i j k) to RAS mm and has to be invertible. Voxels are moved, never changed: the dtype stays.
    """
    stored = np.array(affine, dtype=np.float64)
    axes, flips = _nearest_order(stored)
    data_xyz = np.flip(data_ijk.transpose(axes), tuple(a for a in range(3) if flips[a]))
    hu = np.ascontiguousarray(data_xyz.transpose(2, 1, 0))  # [D H W]
    moved = stored @ _reordering(axes, flips, data_xyz.shape)
    volume = Volume(hu, moved)
    return volume, Orientation(axes, flips, volume.shape, stored, moved)


def plain_affine(spacing_mm: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """The unrotated canonical affine of a volume `shape` (D H W) whose middle is the origin of patient space."""
    scale = np.array(CANONICAL_SIGNS) * spacing_mm
    middle_xyz = (np.array(shape[::-1], dtype=np.float64) - 1) / 2
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = -scale * middle_xyz
    return affine


def block_affine(affine: np.ndarray, offset: tuple[int, int, int]) -> np.ndarray:
    """The affine of a block that starts at array index `offset` (d h w) of the volume; negative offsets are padding."""
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] = position_mm(affine, offset)
    return moved


def resampled_affine(affine: np.ndarray, shape: tuple[int, int, int], new_shape: tuple[int, int, int]) -> np.ndarray:
    """The affine after resampling `shape` to `new_shape` (both D H W) over the same extent."""
    ratio = np.array(shape[::-1], dtype=np.float64) / new_shape[::-1]  # x y z
    to_old = np.diag([*ratio, 1.0])
    to_old[:3, 3] = ratio / 2 - 0.5
    return np.asarray(affine, dtype=np.float64) @ to_old


def position_mm(affine: np.ndarray, index: tuple[float, float, float]) -> np.ndarray:
    """Where array index (d h w) lies in the patient: RAS mm (x y z)."""
    return (np.asarray(affine, dtype=np.float64) @ [*index[::-1], 1.0])[:3]


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Distance between voxel centres along x y z."""
    x, y, z = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0).tolist()
    return x, y, z


def _nearest_order(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which stored axis runs most nearly along x, y and z, and whether it runs against the canonical direction."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)  # [xyz ijk]
    i, j, k = max(permutations(range(3)), key=lambda axes: sum(abs(cosines[a, axes[a]]) for a in range(3)))
    axes = (i, j, k)
    x, y, z = (bool(cosines[a, axes[a]] * CANONICAL_SIGNS[a] < 0) for a in range(3))
    return axes, (x, y, z)


def _reordering(
    axes: tuple[int, int, int], flips: tuple[bool, bool, bool], shape_xyz: tuple[int, ...]
) -> np.ndarray:
    """The [4 4] matrix that takes canonical voxel indices (x y z) to stored ones (i j k)."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1.0
    for a in range(3):
        matrix[axes[a], a] = -1.0 if flips[a] else 1.0
        matrix[axes[a], 3] = shape_xyz[a] - 1 if flips[a] else 0.0
    return matrix
