"""Gaussians of a few voxels, cut at their reach. Beyond a volume's ends the last voxel goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def blurred(x: Tensor, sigma: float, reach: int, axes: Sequence[int] = (0, 1, 2)) -> Tensor:
    """x [1 1 D H W] under a Gaussian of `sigma` voxels that ends `reach` voxels away, along some of D, H and W."""
    if sigma <= 0:
        return x
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    weight = weight / weight.sum()
    for axis in axes:
        size, margin = [1, 1, 1], [0] * 6
        size[axis] = len(weight)
        margin[4 - 2 * axis] = margin[5 - 2 * axis] = reach
        x = F.conv3d(F.pad(x, margin, mode="replicate"), weight.view(1, 1, *size))
    return x


def blurred_within(x: Tensor, where: Tensor, sigma: float, reach: int) -> Tensor:
    """The same of nothing but what lies `where` (normalised convolution; Knutsson and Westin 1993); means nothing outside."""
    weight = where.to(x.dtype)
    return blurred(x * weight, sigma, reach) / blurred(weight, sigma, reach).clamp_min(1e-6) if sigma > 0 else x
