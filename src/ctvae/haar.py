"""The Haar wavelet transform of 3D volumes, one step, per axis, exactly invertible.

Shapes:  B batch   C channels   D H W voxels   s = sd * sh * sw bands, with steps (sd, sh, sw) of 1 or 2

A pair (a, b) of neighbours becomes their mean (a + b) / 2 and half-difference (a - b) / 2 (Haar 1910; Mallat 1989), so
that a volume in -1..1 has bands in -1..1 at every level. A step of 1 leaves an axis alone. Bands are the slow part of
the channel axis: the first C channels of the result are the low band, the volume's local mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

Step3 = tuple[int, int, int]


def forward(x: Tensor, steps: Step3 = (2, 2, 2)) -> Tensor:
    """[B C D H W] -> [B s*C D/sd H/sh W/sw]. Raises ValueError where a size is not a multiple of its step."""
    for axis, step in zip((2, 3, 4), steps, strict=True):
        if x.shape[axis] % step:
            raise ValueError(f"size {x.shape[axis]} of axis {axis} is not a multiple of {step}")
        if step == 2:
            a, b = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.cat(((a + b) / 2, (a - b) / 2), dim=1)
    return x


def inverse(y: Tensor, steps: Step3 = (2, 2, 2)) -> Tensor:
    """[B s*C d h w] -> [B C d*sd h*sh w*sw], the inverse of `forward`."""
    for axis, step in zip((4, 3, 2), reversed(steps), strict=True):
        if step == 2:
            mean, half = y.chunk(2, dim=1)
            y = torch.stack((mean + half, mean - half), dim=axis + 1).flatten(axis, axis + 1)
    return y


def bands(steps: Step3) -> int:
    """Channels that one channel becomes."""
    return steps[0] * steps[1] * steps[2]
