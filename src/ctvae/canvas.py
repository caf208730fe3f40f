"""A volume painted by formula: soft-edged bodies in bent millimetre coordinates, branching vessels, a scanner's noise.

Coordinates are millimetres: x to the patient's left, y to the back, z upwards. Distances are signed, in mm, negative
inside. Every body is laid over the ones before it, with an edge as soft as a voxel is wide (the partial-volume effect).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import fft

Field = np.ndarray  # [D H W], or a box of it
Box = tuple[slice, slice, slice]
Point = Sequence[float]  # x y z in mm
EVERYWHERE: Box = (slice(None), slice(None), slice(None))
BENDING_MM = 20.0  # no voxel is displaced further than this


class Canvas:
    """HU and labels being painted, [D H W], and where each voxel lies.

    `extent_mm` is D H W; `bottom_mm` is the height of the lowest slice. The bending is drawn from `rng` per millimetre,
    so that it does not depend on the resolution.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        extent_mm: Point,
        bottom_mm: float,
        labels: dict[str, int],
    ):
        self.rng, self.shape, self.extent_mm, self.numbers = rng, shape, extent_mm, labels
        self.edge_mm = float(np.mean([extent / n for extent, n in zip(extent_mm, shape, strict=True)]))
        starts = (bottom_mm, -extent_mm[1] / 2, -extent_mm[2] / 2)
        self.axes = [  # z, y, x of the voxel centres
            (start + (np.arange(n) + 0.5) * extent / n).astype(np.float32)
            for start, extent, n in zip(starts, extent_mm, shape, strict=True)
        ]
        z, y, x = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        self.x = x + np.clip(6 * self.noise(70), -BENDING_MM, BENDING_MM)  # [D H W] each
        self.y = y + np.clip(5 * self.noise(70), -BENDING_MM, BENDING_MM)
        self.z = z + np.clip(7 * self.noise(80), -BENDING_MM, BENDING_MM)
        self.ripple = self.noise(16)  # [D H W] what makes every edge and tissue a little irregular
        self.hu = np.full(shape, -1000.0, np.float32)
        self.labels = np.zeros(shape, np.uint8)

    def noise(self, knot_mm: float) -> Field:
        """Smooth random field [D H W] of about unit variance that changes over `knot_mm`."""
        knots = [max(4, round(extent / knot_mm) + 3) for extent in self.extent_mm]
        field = self.rng.standard_normal(knots).astype(np.float32) * 2.2  # the spline takes variance away
        for axis, (n, m) in enumerate(zip(self.shape, knots, strict=True)):
            field = np.moveaxis(np.tensordot(spline_basis(n, m), field, axes=(1, axis)), 0, axis)
        return np.ascontiguousarray(field)

    def box(self, centre: Point, reach_mm: float) -> Box:
        """The part of the grid that can hold what lies within `reach_mm` of a point."""
        reach_mm += BENDING_MM
        low, high = [], []
        for axis, at in zip(self.axes, reversed(centre), strict=True):
            first, last = np.searchsorted(axis, (at - reach_mm, at + reach_mm))
            low.append(int(first))
            high.append(int(last))
        return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])

    def ellipsoid(
        self, centre: Point, radii: Point, box: Box = EVERYWHERE, turn: float = 0.0, ripple_mm: float = 1.5
    ) -> Field:
        """Distance to an ellipsoid, to first order; `turn` rotates it in the axial plane, in radians."""
        x, y, z = self.x[box] - centre[0], self.y[box] - centre[1], self.z[box] - centre[2]
        if turn:
            x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        x, y, z = x / radii[0], y / radii[1], z / radii[2]
        scaled = np.sqrt(x * x + y * y + z * z)
        slope = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
        return scaled * (scaled - 1) / np.maximum(slope, 1e-4) + ripple_mm * self.ripple[box]

    def cover(self, distance: Field) -> Field:
        """Share of each voxel that lies inside, 0..1."""
        return np.clip(0.5 - distance / self.edge_mm, 0, 1)

    def paint(self, distance: Field, hu: float | Field, label: str = "", box: Box = EVERYWHERE) -> Field:
        """Lay a tissue over the picture where `distance` is negative; returns its share of each voxel."""
        share = self.cover(distance)
        target = self.hu[box]
        target += share * (hu - target)
        self.labels[box][share > 0.5] = self.numbers.get(label, 0)
        return share

    def organ(
        self, centre: Point, radii: Point, hu: float | Field, label: str = "", turn: float = 0.0, ripple_mm: float = 1.5
    ) -> None:
        """Paint an ellipsoid."""
        box = self.box(centre, max(radii) + 3 * ripple_mm)
        self.paint(self.ellipsoid(centre, radii, box, turn, ripple_mm), hu, label, box)

    def tube(self, path: Sequence[Point], radius: float, hu: float, label: str = "", flat: float = 1.0) -> None:
        """Paint a vessel along a polyline that rises in z, round in the axial plane (`flat` times wider than deep)."""
        points = np.array(path)
        middle = points.mean(axis=0)
        reach = np.abs(points - middle).max(axis=0) + 2 * radius * max(flat, 1) + 3
        boxes = [self.box(middle, float(along)) for along in reach]  # one per axis, x y z
        box = (boxes[2][0], boxes[1][1], boxes[0][2])
        z = self.z[box]
        x = self.x[box] - np.interp(z, points[:, 2], points[:, 0]).astype(np.float32)
        y = self.y[box] - np.interp(z, points[:, 2], points[:, 1]).astype(np.float32)
        beyond = np.maximum(points[0, 2] - z, z - points[-1, 2])
        around = np.sqrt((x / flat) ** 2 + y * y) - radius + 0.6 * self.ripple[box]
        self.paint(np.maximum(around, beyond), hu, label, box)

    def vessels(self, points: np.ndarray) -> Field:
        """Spread the points [N 4] of `tree` over their eight nearest voxels: the share of each voxel that is vessel."""
        voxel_mm3 = float(np.prod(self.extent_mm) / np.prod(self.shape))
        step_mm = np.array(self.extent_mm) / self.shape
        at = (points[:, 2::-1] - [line[0] for line in self.axes]) / step_mm  # [N 3] in voxels, D H W
        base = np.floor(at).astype(np.int64)
        share = np.zeros(int(np.prod(self.shape)))
        for corner in np.ndindex(2, 2, 2):
            index = base + corner
            inside = np.all((index >= 0) & (index < self.shape), axis=1)
            weight = np.prod(np.where(corner, at - base, 1 - at + base), axis=1) * points[:, 3] / voxel_mm3
            flat = np.ravel_multi_index(tuple(index[inside].T), self.shape)
            share += np.bincount(flat, weight[inside], minlength=share.size)
        return np.minimum(share, 1).reshape(self.shape).astype(np.float32)


def spline_basis(n: int, knots: int) -> np.ndarray:
    """Uniform cubic B-spline values [n, knots] at n evenly spaced places (de Boor, A Practical Guide to Splines)."""
    at = (np.arange(n)[:, None] + 0.5) / n * (knots - 3) + 1 - np.arange(knots)
    t = np.abs(at)
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0)).astype(np.float32)


def tree(
    rng: np.random.Generator,
    roots: Sequence[Point] | np.ndarray,
    headings: Sequence[Point] | np.ndarray,
    length_mm: float,
    radius_mm: float,
    generations: int = 6,
) -> np.ndarray:
    """Vessels that fork at every generation: points [N 4], x y z in mm and the volume in mm^3 each stands for."""
    tips = np.array(roots, float)  # [T 3]
    way = np.array(headings, float)
    length = np.full(len(tips), length_mm)
    radius = radius_mm
    steps = 28
    points = []
    for _ in range(generations):
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        bend = np.cumsum(rng.normal(0, 0.05, (steps, len(tips), 3)), axis=0)
        step_mm = length / steps  # [T]
        path = tips + np.cumsum((way + bend) * step_mm[:, None], axis=0)  # [steps T 3]
        volume = np.pi * radius**2 * np.broadcast_to(step_mm, path.shape[:2])
        points.append(np.concatenate([path, volume[..., None]], axis=2).reshape(-1, 4))
        tips = np.repeat(path[-1], 2, axis=0)
        way = np.repeat(way + bend[-1], 2, axis=0) + rng.normal(0, 0.45, tips.shape)
        length = np.repeat(length, 2) * rng.uniform(0.65, 0.88, len(tips))
        radius *= 0.79  # Murray: the cubes of the radii add up
        steps = max(4, round(steps * 0.75))
    return np.concatenate(points)


def scanned(hu: Field, rng: np.random.Generator, noise_hu: float) -> np.ndarray:
    """What a scanner makes of `hu`: blurred in plane, with noise of about `noise_hu` in soft tissue; int16 [D H W].

    The noise has the power spectrum of filtered backprojection, a ramp rolled off by the kernel (Riederer et al. 1978,
    "The noise power spectrum in computed X-ray tomography"), and grows with the tissue around a voxel.
    """
    height, width = hu.shape[1:]
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width)[None]).astype(np.float32)  # cycles per voxel
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    white[1:] = 0.85 * white[1:] + 0.52 * white[:-1]  # neighbouring slices share some of it
    noise = _filtered(white, np.sqrt(frequency) * np.exp(-((frequency / 0.3) ** 2)))
    spectrum = fft.rfft2(hu)
    image = fft.irfft2(spectrum * np.exp(-((frequency / 0.42) ** 2)), s=(height, width))
    around = fft.irfft2(spectrum * np.exp(-((frequency * 18) ** 2)), s=(height, width))
    image += noise * (noise_hu / noise.std()) * np.clip(0.25 + (around + 1000) / 1100, 0.25, 1.3)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _filtered(images: Field, transfer: np.ndarray) -> Field:
    """Every slice of `images` times `transfer` [H W/2+1] in the Fourier plane."""
    return fft.irfft2(fft.rfft2(images) * transfer, s=images.shape[1:])
