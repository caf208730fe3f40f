"""Layers that more than one network uses.

Shapes:  B batch   C channels   D H W voxels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_SLICES_BF16 = 4  # on a CPU


class Conv(nn.Conv3d):
    """A convolution, in float32 where a grid on a CPU is two slices deep.

    There oneDNN's bf16 gradient of a 3x3x3 kernel is wrong, up to infinite (torch 2.13, docs/log.md).
    """

    def forward(self, x: Tensor) -> Tensor:  # [B C D H W]
        if x.device.type == "cpu" and x.shape[2] < FEWEST_SLICES_BF16 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each voxel (Zhang and Sennrich 2019).

    No voxel sees another's statistics, so a tile is normalised just as it is inside the whole volume.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B C ...]
        return F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight.to(x.dtype), eps=1e-5).movedim(-1, 1)


class ResBlock(nn.Module):
    """norm-conv-act-conv added to its input; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = Conv(channels, channels, kernel_size=3, padding=1)
        self.conv2 = Conv(channels, channels, kernel_size=3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # [B C D H W]
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))
