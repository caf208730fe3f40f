"""The detail networks in use (`models/detail.py`): on whole volumes, by tiles, from seeded noise.

Noise is drawn once for the whole volume and every velocity is computed by tiles whose halo is as wide as the network reaches, so
there are no seams and memory hardly grows with the volume.

Shapes:  B batch   D H W voxels   b d h w Haar bands at half the resolution
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from ctvae import flow, haar
from ctvae.config import Detail
from ctvae.models.detail import BANDS, DetailNetwork, told
from ctvae.tiling import tiled

TILE_VOXELS = (96, 192, 192)  # D H W, halo not counted


class DetailDrawer:
    """Adds to what a decoder drew [1 1 D H W], on the CPU, what the network knows to be missing."""

    def __init__(self, network: DetailNetwork, cfg: Detail, autocast: Callable[[], AbstractContextManager]):
        self.network, self.cfg, self.autocast = network, cfg, autocast
        self.device = next(network.parameters()).device
        self.cell = 2 ** max(len(cfg.widths), len(cfg.guess_widths))  # voxels: a Haar step, then those of the U-Nets

    def mean(self, y: Tensor) -> Tensor:
        """With the mean of what is missing: the least squared error."""
        bands, mean, _ = self._condition(padded(y, self.cell))
        return cropped(haar.inverse(bands + mean), y)

    def drawn(self, y: Tensor, random: torch.Generator, steps: int | None = None) -> Tensor:
        """With a sample of what is missing."""
        whole = padded(y, self.cell)
        noise = torch.randn((1, BANDS, *(size // 2 for size in whole.shape[2:])), generator=random)
        bands, mean, log_std = self._condition(whole)
        context = told(bands, mean, log_std).to(torch.bfloat16 if self.cfg.precision == "bf16" else torch.float32)
        u = flow.sample(lambda u, t: self._velocity(u, t, context), noise, max(1, (steps or self.cfg.sampling_steps) - 1), "ab2")
        return cropped(haar.inverse(u.mul_(log_std.exp_()).add_(mean).add_(bands)), y)

    def _condition(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def apply(tile: Tensor) -> Tensor:
            with self.autocast():
                return torch.cat(self.network.condition(tile.to(self.device)), dim=1).float().cpu()

        bands, mean, log_std = self._tiled(apply, y, 1, 2, len(self.cfg.guess_widths)).chunk(3, dim=1)
        return bands, mean, log_std

    def _velocity(self, u: Tensor, t: Tensor, context: Tensor) -> Tensor:
        def apply(tile: Tensor) -> Tensor:
            here = tile.to(self.device)
            with self.autocast():
                return self.network.velocity(here[:, :BANDS].float(), t.to(self.device), here[:, BANDS:]).cpu()

        return self._tiled(apply, torch.cat((u.to(context.dtype), context), dim=1), 2, 2, len(self.cfg.widths))

    def _tiled(self, apply: Callable[[Tensor], Tensor], x: Tensor, finer_in: int, finer_out: int, levels: int) -> Tensor:
        """`finer_in`, `finer_out`: 1 for voxels, 2 for bands."""
        cells = [max(1, voxels // self.cell) for voxels in TILE_VOXELS]
        halo = math.ceil(2 * reach(levels) / self.cell)
        sides = [(self.cell // finer,) * 3 for finer in (finer_in, finer_out)]
        return tiled(
            apply, x, factor_in=sides[0], factor_out=sides[1], tile=(cells[0], cells[1], cells[2]), halo=(halo,) * 3
        )


def reach(levels: int) -> int:
    """How far a Trunk of so many resolutions sees along an axis, in voxels of its finest grid."""
    convolutions = 6 + sum(4 * 2**level for level in range(1, levels))  # two blocks of two each; entry and exit at the finest
    return convolutions + 2 ** (levels - 1) - 1  # and to the end of a coarsest voxel


def padded(y: Tensor, multiple: int) -> Tensor:
    """[1 1 D H W] with its last planes repeated up to multiples."""
    short = [-size % multiple for size in y.shape[2:]]
    return F.pad(y, (0, short[2], 0, short[1], 0, short[0]), mode="replicate") if any(short) else y


def cropped(x: Tensor, like: Tensor) -> Tensor:
    d, h, w = like.shape[2:]
    return x[..., :d, :h, :w]
