"""Layers that more than one network uses.

Shapes:  B batch   C channels   D H W voxels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each voxel (Zhang and Sennrich 2019).

    No voxel sees another's statistics, so a tile is normalised just as it is inside the whole volume.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # [B C D H W]
        return F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight.to(x.dtype), eps=1e-5).movedim(-1, 1)


class ResBlock(nn.Module):
    """norm-conv-act-conv added to its input; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B C D H W]
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))
