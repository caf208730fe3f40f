"""Single voxels that stand out of all that is around them: what is sharpened has many, scans have few.

How far a voxel lies above the brightest of the 26 about it, or below the darkest, is taken down to what it is in scans; nothing
else is touched. Where nothing may stand out at all this is conservative smoothing (Hall 2007).

There are four kinds: bright ones with nothing brighter than soft tissue around them, and beside bone; dark ones with nothing
darker than soft tissue around them, and beside air. Within bone some stand out far in scans, within fat none.

Shapes:  B batch   D H W voxels in -1..1   K knots
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ctvae.models.tone import curve

KINDS = 4


def dotless(x: Tensor, where: Tensor, soft: tuple[float, float], curves: Tensor) -> Tensor:
    """x [B 1 D H W] with less of its dots in a place [B 1 D H W].

    `soft`: the soft tissue window. `curves`: of each kind how far it is to stand out, at knots of how far it does, [4 K].
    """
    out = x
    for (sign, far, kind), values in zip(dots(x, soft), curves, strict=True):
        out = torch.where(where & kind, out - sign * (far - curve(far, values)).clamp_min(0), out)
    return out


@torch.no_grad()
def dots(x: Tensor, soft: tuple[float, float]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each kind in x [B 1 D H W]: 1 for bright ones and -1 for dark ones, how far voxels stand out, and which can be of it.

    How far: -1 is not at all, 1 is 2 and more. Like x each.
    """
    for sign, end in ((1, soft[1]), (-1, soft[0])):
        around = _around(sign * x)
        far, among = (sign * x - around).clamp(0, 2) - 1, around <= sign * end
        yield sign, far, among
        yield sign, far, ~among


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
