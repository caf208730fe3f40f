"""Single voxels that stand out of all that is around them: what is sharpened has many, scans have few.

How far a voxel lies above the brightest of the 26 about it, or below the darkest, is taken down to what it is in scans; nothing
else is touched. With a limit of nothing at all this is conservative smoothing (Hall 1979).

Shapes:  B batch   D H W voxels in -1..1   K knots
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctvae.models.tone import curve


def dotless(x: Tensor, where: Tensor, bright: Tensor, dark: Tensor) -> Tensor:
    """x [B 1 D H W] with less of its dots in a place [B 1 D H W].

    `bright`, `dark`: how far each of them is to stand out, at knots of how far it does (`standing_out`), [K].
    """
    for sign, values in ((1, bright), (-1, dark)):
        found = standing_out(sign * x)
        more = (found - curve(found, values)).clamp_min(0)
        x = torch.where(where & (found > -1), x - sign * more, x)
    return x


@torch.no_grad()
def standing_out(x: Tensor) -> Tensor:
    """How far each voxel of x [B 1 D H W] is above the brightest around it: -1 where not at all, 1 from 2 on."""
    return (x - _around(x)).clamp(0, 2) - 1


def _around(x: Tensor) -> Tensor:
    """The brightest of the 26 voxels around each, of fewer at the ends of a volume."""
    most, full = torch.full_like(x, -math.inf), x
    for axis in (4, 3, 2):  # of its row, then of the rows beside that, then of the slices beside those
        rest, beside = x.shape[axis] - 1, torch.full_like(x, -math.inf)
        for to, of in ((0, 1), (1, 0)):
            into = beside.narrow(axis, to, rest)
            torch.maximum(into, full.narrow(axis, of, rest), out=into)
        most, full = torch.maximum(most, beside), torch.maximum(full, beside)
    return most
