"""Sizes and amounts of memory as people write them, and the sizes that follow from a scan's geometry. Pure functions.

Sizes are D H W voxels; millimetres are x y z; a GB is 1e9 bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ctvae.errors import ConfigError
from ctvae.networks import Size3

LARGEST_SIDE = 4096
FEWEST_LATENTS = 4  # along D: fewer, and a latent's surroundings are mostly padding
UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
SMALLEST_PATCH = (16, 64, 64)


def parse_size(text: str) -> Size3:
    """`64x512x512` -> D H W. Raises ConfigError."""
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isascii() and side.isdecimal() for side in sides):
        raise ConfigError(f"size '{text}': write slices x rows x columns, e.g. 64x512x512")
    d, h, w = (int(side) for side in sides)
    if not all(1 <= side <= LARGEST_SIDE for side in (d, h, w)):
        raise ConfigError(f"size '{text}': every side is from 1 to {LARGEST_SIDE} voxels")
    return d, h, w


def parse_memory(text: str) -> float:
    """`24GB`, `12gb`, `500MB`, `24GiB` -> GB. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|mb|mib)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"memory '{text}': write an amount with its unit, e.g. 24GB or 500MB")
    return float(match[1]) * UNITS[match[2]] / 1e9


def written(size: Size3) -> str:
    """D H W -> `64x512x512`."""
    return "x".join(str(side) for side in size)


def strides_for(spacing_mm: tuple[float, float, float], size: Size3, levels: int) -> tuple[Size3, ...]:
    """Haar steps D H W per level, fine to coarse, for voxels of `spacing_mm` (x y z) in groups of `size`.

    Pixels are halved at every level. Slices are halved where they are less than twice as far apart as the pixels then
    are (nnU-Net's rule, Isensee et al. 2021), so that voxels grow towards cubes, and while at least FEWEST_LATENTS stay.
    """
    pixel_mm, slice_mm = math.sqrt(spacing_mm[0] * spacing_mm[1]), spacing_mm[2]
    slices, steps = size[0], []
    for _ in range(levels):
        halve = slice_mm < 2 * pixel_mm and slices >= 2 * FEWEST_LATENTS
        step = 2 if halve else 1
        steps.append((step, 2, 2))
        pixel_mm, slice_mm, slices = 2 * pixel_mm, step * slice_mm, slices // step
    return tuple(steps)


def smaller(size: Size3, grid: Size3, least: Size3 = SMALLEST_PATCH) -> Iterator[Size3]:
    """Ever smaller sizes on `grid`: half in plane down to `least`, then half in depth."""
    d, h, w = size
    while (h, w) != (halved := (_half(h, grid[1], least[1]), _half(w, grid[2], least[2]))):
        h, w = halved
        yield d, h, w
    while d != (half := _half(d, grid[0], least[0])):
        d = half
        yield d, h, w


def _half(side: int, step: int, least: int) -> int:
    half = math.ceil(side / 2 / step) * step
    return half if half >= least else side
