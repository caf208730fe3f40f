"""Pictures of CT volumes: three planes through the body's middle, true aspect, on black.

A contact sheet has one column per scan and one row per plane (axial, coronal, sagittal). All scans of a sheet are
drawn at one scale, cropped to the largest body among them. Axial pictures are drawn as a radiologist reads them: the
patient's right on the left, anterior on top; in the others the head is up.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ctvae.config import WINDOW_PRESETS_HU
from ctvae.errors import InputError
from ctvae.files import atomic
from ctvae.volume import Volume

Window = str | tuple[float, float]
Titled = Sequence[tuple[str, Volume]]
PLANES = ("axial", "coronal", "sagittal")
BODY_HU = -500.0
DPI = 100
_TEXT, _FAINT = "#e8e8e8", "#8a8a8a"


@dataclass(frozen=True)
class Box:
    """Voxel position of a body's middle (D H W) and the body's extent in mm (x y z)."""

    middle: tuple[float, float, float]
    extent_mm: tuple[float, float, float]


@dataclass(frozen=True)
class _Column:
    title: str
    volume: Volume
    window_hu: tuple[float, float]


def contact_sheet(scans: Titled, path: Path, window_hu: Window = "full", *, per_band: int = 6) -> None:
    """Write one PNG of `scans` (title, volume): a column each, wrapped after `per_band`, three planes below each
    other."""
    if not scans:
        raise InputError(f"{path}: no volumes to draw")
    bands = math.ceil(len(scans) / per_band)
    per_band = math.ceil(len(scans) / bands)
    columns = _columns(scans, window_hu)
    _save(_sheet([("", columns[i : i + per_band]) for i in range(0, len(columns), per_band)], beside=False), path)


def real_beside_synthetic(real: Titled, synthetic: Titled, path: Path, window_hu: Window = "full") -> None:
    """Write one PNG with real scans on the left and synthetic ones on the right, all at one scale."""
    side_by_side([("REAL", real), ("SYNTHETIC", synthetic)], path, window_hu)


def side_by_side(groups: Sequence[tuple[str, Titled]], path: Path, window_hu: Window = "full") -> None:
    """Write one PNG of named groups of (title, volume) next to each other, all at one scale."""
    filled = [(name, _columns(scans, window_hu)) for name, scans in groups if scans]
    if not filled:
        raise InputError(f"{path}: no volumes to draw")
    _save(_sheet(filled, beside=True), path)


def bands(groups: Sequence[tuple[str, Titled]], path: Path, window_hu: Window = "full") -> None:
    """Write one PNG of named groups of (title, volume), each group in a band of its own below the one before."""
    filled = [(name, _columns(scans, window_hu)) for name, scans in groups if scans]
    if not filled:
        raise InputError(f"{path}: no volumes to draw")
    _save(_sheet(filled, beside=False), path)


def reconstructions(pairs: Sequence[tuple[str, Volume, Volume]], path: Path, window_hu: Window = "full") -> None:
    """Write one PNG with, for each (title, scan, reconstruction), both and their difference at +-200 HU."""
    if not pairs:
        raise InputError(f"{path}: no reconstructions to draw")
    groups = []
    for title, scan, again in pairs:
        difference = Volume(again.hu.astype(np.float32) - scan.hu, scan.affine)
        columns = _columns([("scan", scan), ("reconstruction", again)], window_hu)
        groups.append((title, [*columns, _Column("difference, ±200 HU", difference, (-200.0, 200.0))]))
    _save(
        _sheet(groups, beside=len(groups) <= 2, boxes=[body_box(scan) for _, scan, _ in pairs for _ in range(3)]), path
    )


def preview(rows: Titled, path: Path, window_hu: Window) -> None:
    """A small contact sheet for a training log: (title, volume) pairs in one band."""
    if not rows:
        raise InputError(f"{path}: no volumes to draw")
    _save(_sheet([("", _columns(rows, window_hu))], beside=False, width_px=max(320, min(1100, 240 * len(rows)))), path)


def strip_png(volume: Volume, window_hu: Window, box_mm: tuple[float, float, float], height_px: int = 220) -> bytes:
    """The three planes side by side without any text, a `box_mm` (x y z) around the body's middle: a PNG as bytes."""
    x, y, z = box_mm
    widths = (x, x, y)
    tall = max(y, z)
    figure = Figure(figsize=(sum(widths) / tall * height_px / DPI, height_px / DPI), dpi=DPI, facecolor="black")
    left = 0.0
    for plane, width in zip(PLANES, widths, strict=True):
        axes = figure.add_axes((left / sum(widths), 0, width / sum(widths), 1))
        _draw(axes, volume, plane, body_box(volume).middle, (width, tall), window(window_hu))
        left += width
    return _png(figure)


def data_uri(png: Path | bytes) -> str:
    """A PNG file or its bytes as a data: URI, for a page that must open offline."""
    content = png if isinstance(png, bytes) else png.read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def window(name: Window) -> tuple[float, float]:
    """Lower and upper HU of a window given by name ('full', 'abdomen', 'soft') or as the two numbers."""
    if not isinstance(name, str):
        return float(name[0]), float(name[1])
    if name not in WINDOW_PRESETS_HU:
        raise InputError(f"window {name!r} is not one of {', '.join(WINDOW_PRESETS_HU)}; or give two HU values")
    return WINDOW_PRESETS_HU[name]


def body_box(volume: Volume) -> Box:
    """Where the body is: the span of voxels above -500 HU in plane (its outermost 0.2 % left out), all slices along
    it."""
    dense = volume.hu > BODY_HU
    x_mm, y_mm, z_mm = volume.spacing_mm
    depth = volume.hu.shape[0]
    h, height = _span(dense.sum(axis=(0, 2)))
    w, width = _span(dense.sum(axis=(0, 1)))
    return Box(((depth - 1) / 2, h, w), (width * x_mm, height * y_mm, depth * z_mm))


def _span(profile: NDArray[np.integer]) -> tuple[float, float]:
    """Middle and width, in voxels, of where a profile is."""
    if profile.sum() == 0:
        return (len(profile) - 1) / 2, float(len(profile))
    share = np.cumsum(profile) / profile.sum()
    first, last = int(np.searchsorted(share, 0.002)), int(np.searchsorted(share, 0.998))
    return (first + last) / 2, float(last - first + 1)


def _columns(scans: Titled, window_hu: Window) -> list[_Column]:
    return [_Column(title, volume, window(window_hu)) for title, volume in scans]


def _sheet(
    groups: list[tuple[str, list[_Column]]], *, beside: bool, width_px: int = 1400, boxes: list[Box] | None = None
) -> Figure:
    """Groups of columns beside or below each other. Lengths are in mm of patient until the figure's size is known."""
    boxes = boxes or [body_box(column.volume) for _, columns in groups for column in columns]
    x, y, z = (max(box.extent_mm[axis] for box in boxes) * margin for axis, margin in enumerate((1.06, 1.06, 1.0)))
    tile, heights = max(x, y), (y, z, z)
    counts = [len(columns) for _, columns in groups]
    across = sum(counts) if beside else max(counts)
    width_px = min(width_px, 330 * across + 60)
    mm = (width_px - 26 - (16 * (len(groups) - 1) if beside else 0)) / (across * tile)  # pixels per mm
    heading = 24 if any(name for name, _ in groups) else 0
    band_px = heading + 20 + sum(heights) * mm + 4 * len(heights)
    total_px = band_px * (1 if beside else len(groups)) + 4
    figure = Figure(figsize=(width_px / DPI, total_px / DPI), dpi=DPI, facecolor="black")

    left, top, box = 22.0, 0.0, iter(boxes)
    for name, columns in groups:
        if name:
            middle = left + len(columns) * tile * mm / 2
            _write(figure, middle / width_px, 1 - (top + 15) / total_px, name, _TEXT, 11, weight="bold")
        for index, column in enumerate(columns):
            place = left + index * tile * mm
            characters = int(tile * mm / 6.2)
            title = column.title if len(column.title) <= characters else column.title[: characters - 1] + "…"
            _write(figure, (place + tile * mm / 2) / width_px, 1 - (top + heading + 11) / total_px, title, _TEXT, 8.5)
            middle_dhw, y_px = next(box).middle, top + heading + 20
            for plane, height in zip(PLANES, heights, strict=True):
                y_px += height * mm + 4
                frame = (place / width_px, 1 - y_px / total_px, (tile * mm - 4) / width_px, height * mm / total_px)
                axes = figure.add_axes(frame)
                _draw(axes, column.volume, plane, middle_dhw, (tile - 4 / mm, height), column.window_hu)
                if index == 0 and left == 22.0:
                    centre = 1 - (y_px - height * mm / 2) / total_px
                    _write(figure, 11 / width_px, centre, plane, _FAINT, 8.5, rotation=90)
        if beside:
            left += len(columns) * tile * mm + 16
        else:
            top += band_px
    return figure


def _draw(
    axes: Axes,
    volume: Volume,
    plane: str,
    middle: tuple[float, float, float],
    size_mm: tuple[float, float],
    window_hu: tuple[float, float],
) -> None:
    """One plane through voxel position `middle` (D H W), `size_mm` (across, up) around it."""
    d, h, w = (round(position) for position in middle)
    x_mm, y_mm, z_mm = volume.spacing_mm
    if plane == "axial":
        picture, across, up = volume.hu[d], (middle[2], x_mm), (middle[1], y_mm)
    elif plane == "coronal":
        picture, across, up = volume.hu[:, h], (middle[2], x_mm), (middle[0], z_mm)
    else:
        picture, across, up = volume.hu[:, :, w], (middle[1], y_mm), (middle[0], z_mm)
    rows, columns = picture.shape
    axes.imshow(
        picture,
        cmap="gray",
        vmin=window_hu[0],
        vmax=window_hu[1],
        extent=(0, columns * across[1], rows * up[1], 0),
        interpolation="bicubic",
        aspect="auto",  # the frame has the extent's own proportions
    )
    centre_x, centre_y = (across[0] + 0.5) * across[1], (up[0] + 0.5) * up[1]
    axes.set_xlim(centre_x - size_mm[0] / 2, centre_x + size_mm[0] / 2)
    low, high = centre_y - size_mm[1] / 2, centre_y + size_mm[1] / 2
    axes.set_ylim((high, low) if plane == "axial" else (low, high))  # row 0 is anterior; slice 0 is the lowest
    axes.set_facecolor("black")
    axes.set_axis_off()


def _write(figure: Figure, x: float, y: float, text: str, colour: str, size: float, **style: object) -> None:
    figure.text(x, y, text, color=colour, fontsize=size, ha="center", va="center", **style)  # type: ignore[arg-type]


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="black")
    return content.getvalue()


def _save(figure: Figure, path: Path) -> None:
    content = _png(figure)
    with atomic(path) as temporary:
        temporary.write_bytes(content)
