"""What happens to a scan on its way into a dataset, every step with its inverse.

Two steps do it all, and their parameters are what has to be remembered to go back:

    Box       which block of the scan, in array indices; a block may reach beyond the scan, where it is air.
              Cropping to the body, padding to a grid and cutting groups of slices are all boxes.
    resample  in plane, over the same extent, anti-aliased; exact only when the size stays.

Arrays are [D H W] in canonical axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from ctvae.errors import ScanRejected
from ctvae.intensity import AIR_HU, multiple_above, offset_of_fit
from ctvae.volume import Volume, block_affine, resampled_affine

LOWEST_HU = -1024  # below lies only padding, such as -2048, -3024 or -32768 outside the field of view
HIGHEST_HU = 32767
AIR_OR_LUNG_HU = -150  # a CT has voxels below
SOFT_TISSUE_HU = 50  # and above
LEAST_AIR = 1e-4  # of all voxels
BODY_HU = -300
BODY_PIXEL_MM = 3.0  # the body is looked for at about this resolution
BODY_MARGIN_VOXELS = 4  # about a body in plane, where scans are cut to it
TABLE_MM = 6.0  # half the thickness of what is not body: table tops, wires, sheets
RESTS = ("overlap", "drop", "pad")
Size3 = tuple[int, int, int]
Plane = tuple[int, int]  # H W


@dataclass(frozen=True)
class Box:
    """A block of a volume: first array index (d h w), which may be negative, and shape."""

    start: Size3
    shape: Size3

    @classmethod
    def whole(cls, shape: Size3) -> Box:
        return cls((0, 0, 0), shape)

    def inverse(self, shape: Size3) -> Box:
        """The box that, cut from the block, gives back the grid of the volume of `shape` that it was cut from."""
        d, h, w = self.start
        return Box((-d, -h, -w), shape)

    def grown(self, margin: int, shape: Size3) -> Box:
        """With `margin` voxels more on each side in plane, as far as a volume of `shape` goes."""
        (d, *corner), (depth, *sides) = self.start, self.shape
        first = [max(0, start - margin) for start in corner]
        stop = [min(n, start + side + margin) for n, start, side in zip(shape[1:], corner, sides, strict=True)]
        return Box((d, first[0], first[1]), (depth, stop[0] - first[0], stop[1] - first[1]))

    def squared(self) -> Box:
        """As high as wide, about the same centre."""
        (d, h, w), (depth, height, width) = self.start, self.shape
        side = max(height, width)
        return Box((d, h + (height - side) // 2, w + (width - side) // 2), (depth, side, side))


@dataclass(frozen=True)
class Steps:
    """What was done to a whole scan before it was cut into groups."""

    box: Box  # cut first
    plane: Plane  # then resampled to this H W

    def apply(self, volume: Volume, *, labels: bool = False) -> Volume:
        """`labels`: nearest neighbour, and 0 rather than air outside the scan."""
        return resample(cut(volume, self.box, fill=0 if labels else AIR_HU), self.plane, labels=labels)

    def undo(self, volume: Volume, onto: Volume, *, labels: bool = False) -> Volume:
        """Back onto the grid of the scan `onto`, whose voxels stay where the box does not reach."""
        return paste(resample(volume, self.box.shape[1:], labels=labels), self.box, onto)


def as_hu(values: np.ndarray, path: Path | str) -> np.ndarray:
    """int16 HU, rounded; padding below -1024 becomes -1024, nothing else is clipped.

    Raises ScanRejected, naming `path`, when the values cannot be HU.
    """
    reason = _not_hu(values)
    if reason:
        raise ScanRejected(f"{path}: not CT in HU: {reason}")
    return np.maximum(np.rint(values) if values.dtype.kind == "f" else values, LOWEST_HU).astype(np.int16, copy=False)


def _not_hu(values: np.ndarray) -> str:
    """Why `values` cannot be HU, or nothing."""
    low, high = float(values.min()), float(values.max())
    found = f"values are {low:g}..{high:g}"
    if low == high:
        return f"blank, every voxel is {low:g}"
    if low >= -1.01 and high <= 1.01:
        return f"{found}, normalised; use the scan as it was before normalisation"
    if low >= 0 and high <= 255:
        return f"{found}, an 8-bit picture or a label map; use the original scan"
    if low >= 0 and high <= 4095:
        return f"{found}, an MR, or a CT stored without its offset; if CT, subtract 1024 (or 1000) or set scl_inter"
    if low >= 0:
        return f"{found}, none negative, as in MR or PET"
    if high > HIGHEST_HU:
        return f"{found}, beyond {HIGHEST_HU}"
    if np.count_nonzero(values < AIR_OR_LUNG_HU) < LEAST_AIR * values.size:
        return f"{found} with next to nothing below {AIR_OR_LUNG_HU}: clipped, z-scored or not CT; use unclipped HU"
    if high <= SOFT_TISSUE_HU:
        return f"{found} with nothing above {SOFT_TISSUE_HU}: no tissue in it, or clipped; use unclipped HU"
    return ""


def cut(volume: Volume, box: Box, fill: int = AIR_HU) -> Volume:
    """The block of `volume`; `fill` where it reaches beyond."""
    affine = block_affine(volume.affine, box.start)
    take, put = _overlap(volume.shape, box)
    if tuple(s.stop - s.start for s in take) == box.shape:
        return Volume(volume.hu[take], affine)
    block = np.full(box.shape, fill, dtype=volume.hu.dtype)
    block[put] = volume.hu[take]
    return Volume(block, affine)


def paste(block: Volume, box: Box, onto: Volume) -> Volume:
    """`onto` with the block put back where `cut` took it; what reached beyond is dropped."""
    take, put = _overlap(onto.shape, box)
    hu = onto.hu.astype(np.result_type(onto.hu, block.hu))
    hu[take] = block.hu[put]
    return Volume(hu, onto.affine)


def _overlap(shape: Size3, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where volume and box overlap, in the indices of each."""
    take, put = [], []
    for size, start, length in zip(shape, box.start, box.shape, strict=True):
        first = min(max(0, start), size)
        stop = max(first, min(size, start + length))
        take.append(slice(first, stop))
        put.append(slice(first - start, stop - start) if stop > first else slice(0, 0))
    return tuple(take), tuple(put)


def grid_box(shape: Size3, grid: Size3) -> Box:
    """The smallest box about a volume of `shape` with sides on `grid`; undone by cutting `box.inverse(shape)`."""
    padded = multiple_above(shape, grid)
    return Box(offset_of_fit(shape, padded), padded)


def resample(volume: Volume, plane: Plane, *, labels: bool = False) -> Volume:
    """In-plane resampling to `plane` (H W) over the same extent, slice by slice.

    HU: a Gaussian of standard deviation (factor - 1) / 2 pixels where the factor old / new is above 1, against
    aliasing, then linear; rounded for integer input. Labels: nearest neighbour.
    """
    depth, height, width = volume.shape
    if (height, width) == plane:
        return volume
    factors = height / plane[0], width / plane[1]
    sigmas = [0.0 if labels else max(0.0, (factor - 1) / 2) for factor in factors]
    out = np.empty((depth, *plane), dtype=volume.hu.dtype)
    for d, image in enumerate(volume.hu):
        out[d] = _resampled_slice(image, plane, sigmas, labels)
    return Volume(out, resampled_affine(volume.affine, volume.shape, (depth, *plane)))


def _resampled_slice(image: np.ndarray, plane: Plane, sigmas: list[float], labels: bool) -> np.ndarray:
    """One slice [H W] to `plane`."""
    zoom = plane[0] / image.shape[0], plane[1] / image.shape[1]
    if labels:
        return ndimage.zoom(image, zoom, order=0, mode="nearest", grid_mode=True)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), sigmas, mode="nearest")
    fine = ndimage.zoom(smooth, zoom, order=1, mode="nearest", grid_mode=True)
    return fine if image.dtype.kind == "f" else np.rint(fine)


def body_box(volume: Volume) -> Box:
    """All slices of the scan, in plane the body.

    The body is the largest connected part above -300 HU once everything thinner than 12 mm (table tops, wires) is
    opened away. The whole plane where no body is found.
    """
    depth, height, width = volume.shape
    x_mm, y_mm, _ = volume.spacing_mm
    steps = [max(1, round(BODY_PIXEL_MM / step_mm)) for step_mm in (y_mm, x_mm)]
    mask = _body(_block_means(volume.hu, steps) > BODY_HU, x_mm * steps[1])
    if not mask.any():
        return Box.whole(volume.shape)
    start, shape = [0], [depth]
    for axis, step, size in ((1, steps[0], height), (2, steps[1], width)):
        held = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        rim = step - 1  # of a block that is mostly air
        start.append(max(0, int(held[0]) * step - rim))
        shape.append(min(size, (int(held[-1]) + 1) * step + rim) - start[-1])
    return Box((start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))


def _block_means(hu: np.ndarray, steps: list[int]) -> np.ndarray:
    """Means over in-plane blocks [D ceil(H/step) ceil(W/step)]; air where a block reaches beyond."""
    if steps == [1, 1]:
        return hu
    sums = hu.astype(np.float32)
    for axis, step in zip((1, 2), steps, strict=True):
        sums = np.add.reduceat(sums, np.arange(0, sums.shape[axis], step), axis=axis)
    return sums / (steps[0] * steps[1])


def _body(dense: np.ndarray, pixel_mm: float) -> np.ndarray:
    """The body in the mask `dense` [D H W] of everything that is not air or lung."""
    disc = ndimage.generate_binary_structure(2, 1)[None]
    rounds = max(1, round(TABLE_MM / pixel_mm))
    opened = ndimage.binary_erosion(dense, disc, iterations=rounds)
    opened = ndimage.binary_dilation(opened, disc, iterations=rounds, mask=dense)
    parts, count = ndimage.label(opened)
    if count == 0:
        return opened
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    # What the opening rounded off comes back, as far as it is dense.
    return ndimage.binary_dilation(largest, disc, iterations=rounds, mask=dense)


def group_starts(depth: int, slices: int, stride: int, rest: str) -> list[int]:
    """First slices of the groups of `slices` slices, every `stride`, in a scan of `depth`.

    The rest, what the last whole stride leaves over at the top, is covered by a group that ends at the last slice
    ("overlap"), left out ("drop"), or padded with air to a whole group ("pad", which also keeps short scans).
    Raises ScanRejected when the scan has too few slices.
    """
    if depth < slices and rest != "pad":
        raise ScanRejected(f"too few slices: {depth}, need {slices}; use --rest pad")
    starts = list(range(0, depth - slices + 1, stride)) or [0]
    if starts[-1] + slices < depth and rest == "overlap":
        starts.append(depth - slices)
    if starts[-1] + slices < depth and rest == "pad":
        starts.append(starts[-1] + stride)
    return starts
