"""Layers that more than one network uses.

Shapes:  B batch   C channels   D H W voxels
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_SLICES_BF16 = 4  # on a CPU
MOST_PASSED_OVER = 20480  # numbers, of which W is left out


class Conv(nn.Conv3d):
    """A convolution that steers clear of what PyTorch does on a CPU with few voxels.

    In bf16, on a grid two slices deep, oneDNN's gradient of a 3x3x3 kernel is wrong, up to infinite (torch 2.13, docs/log.md), so
    there it is in float32. In float32 one small volume alone is not given to oneDNN, which takes a sixth of the time.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B C D H W]
        if x.device.type != "cpu":
            return super().forward(x)
        if x.shape[2] < FEWEST_SLICES_BF16 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.float())
        if _passed_over(x):
            assert not isinstance(self.padding, str)  # same, valid
            return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return super().forward(x)


def _passed_over(x: Tensor) -> bool:
    """Whether PyTorch would take its own loop for x [B C D H W]: it counts C D H, as if there were no W (torch 2.13).

    oneDNN's own call knows no gradients, and no tensors without numbers, such as plans are made with.
    """
    plain = type(x) is Tensor and x.dtype == torch.float32 and not (torch.is_autocast_enabled("cpu") or torch.is_grad_enabled())
    small = len(x) == 1 and math.prod(x.shape[1:4]) <= MOST_PASSED_OVER
    return plain and small and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


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
