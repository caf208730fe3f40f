"""Cutting a volume into tiles with halos, so that a network of convolutions sees in each tile all that reaches into it.

Sizes are in cells of the coarsest grid (latent voxels). With a halo at least as wide as the network's reach, and zero
padding at the volume's own borders only, the tiled result equals the whole one; memory then depends on the tile alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Along D H W, in cells: what to read, what of it to keep."""

    read: tuple[slice, slice, slice]
    keep: tuple[slice, slice, slice]  # of the whole

    def inside(self) -> tuple[slice, slice, slice]:
        """`keep` in the indices of what was read."""
        d, h, w = (slice(k.start - r.start, k.stop - r.start) for k, r in zip(self.keep, self.read, strict=True))
        return d, h, w


def tiles(size: Size3, tile: Size3, halo: Size3) -> Iterator[Tile]:
    """Tiles whose kept parts cover `size` exactly once."""
    axes = []
    for length, step, reach in zip(size, tile, halo, strict=True):
        starts = range(0, length, max(1, step))
        spans = [(start, min(length, start + step)) for start in starts]
        axes.append([(slice(max(0, a - reach), min(length, b + reach)), slice(a, b)) for a, b in spans])
    for (read_d, keep_d), (read_h, keep_h), (read_w, keep_w) in itertools.product(*axes):
        yield Tile((read_d, read_h, read_w), (keep_d, keep_h, keep_w))


def scaled(slices: tuple[slice, slice, slice], factor: Size3) -> tuple[slice, slice, slice]:
    """Slices in cells -> slices in voxels, `factor` voxels per cell."""
    d, h, w = (slice(s.start * f, s.stop * f) for s, f in zip(slices, factor, strict=True))
    return d, h, w


def tiled(
    apply: Callable[[Tensor], Tensor], x: Tensor, *, factor_in: Size3, factor_out: Size3, tile: Size3, halo: Size3
) -> Tensor:
    """`apply` by tiles: [B C D H W] -> [B C' D' H' W'], `factor_in` and `factor_out` voxels per cell of in- and output."""
    sizes = x.shape[2:]
    d, h, w = (length // factor for length, factor in zip(sizes, factor_in, strict=True))
    out: Tensor | None = None
    for part in tiles((d, h, w), tile, halo):
        y = apply(x[(..., *scaled(part.read, factor_in))])
        if out is None:
            whole = [cells * factor for cells, factor in zip((d, h, w), factor_out, strict=True)]
            out = torch.empty((*y.shape[:2], *whole), dtype=y.dtype, device=x.device)
        out[(..., *scaled(part.keep, factor_out))] = y[(..., *scaled(part.inside(), factor_out))].to(x.device)
        del y  # not beside the next one
    assert out is not None
    return out
