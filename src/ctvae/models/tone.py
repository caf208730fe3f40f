"""A curve that decoded values pass, voxel by voxel, fitted so that each HU is as frequent as in scans.

A decoder that cannot know where exactly an edge lies puts values between both sides, and between fat and muscle: partial volumes
that few scans have. No convolution on Haar bands can undo that cheaply, as each of a cell's eight voxels would need its own
threshold; a curve that is steep between the tissues can. Its shape has a closed form, the monotone map that takes one
distribution to the other (histogram matching; Gonzalez and Woods 2018, section 3.3).

Shapes:  B batch   D H W voxels in -1..1   K knots
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

KNOTS = 201  # 10 HU apart in a window of 2000
STRENGTH = 0.8  # of the way to the map: where scans have one value only, gradients still pass
STEEPEST = 2.0  # of the map: more would blow up what little a decoder is off by, between air and lung above all
RANGE = 2001  # bins of the distributions
PIECE, MOST_PIECES = 2**17, 8  # numbers in a piece, or more where there would be more pieces


class Tone(nn.Module):
    """y + offset(y), between knots by straight lines; begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, y: Tensor) -> Tensor:
        """[...] -> [...]; beyond -1..1 the offset is that of the end."""
        return _Curve.apply(y, self.offset.to(y.dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, decoded: Tensor, real: Tensor) -> None:
        """To the distributions of both, counts in RANGE bins from -1 to 1: [RANGE] each. Both ends stay where they are.

        Where the map is steeper than STEEPEST, as at a jump, there is a ramp about the jump's middle instead.
        """
        knots, target = torch.linspace(-1, 1, KNOTS, dtype=torch.float64), matched(decoded, real)
        target[0], target[-1] = -1.0, 1.0
        rise = STEEPEST * (knots + 1)
        target = gentle(target, STEEPEST * 2 / (KNOTS - 1)).minimum(rise - 1).maximum(1 - rise.flip(0))
        self.offset.copy_(STRENGTH * (target - knots))


def matched(decoded: Tensor, real: Tensor) -> Tensor:
    """The monotone map that takes one distribution to the other, counts in RANGE bins each: its values at the knots, [K]."""
    reached, wanted = (side.double().cumsum(0) / side.sum().clamp_min(1) for side in (decoded, real))
    place = torch.linspace(0, RANGE - 1, KNOTS).round().long()
    there = torch.searchsorted(wanted, reached[place].clamp(max=1 - 1e-9)).clamp(max=RANGE - 1)
    return there.double() / (RANGE - 1) * 2 - 1


def gentle(values: Tensor, most: float) -> Tensor:
    """A curve [K] that nowhere climbs or falls by more than `most` between neighbours, and keeps to rising if `values` do.

    The mean of the least and the greatest such curve that touch `values` from below and from above (McShane 1934).
    """
    place = torch.arange(len(values), dtype=values.dtype, device=values.device)
    reach = most * (place[:, None] - place).abs()
    return ((values + reach).amin(1) + (values - reach).amax(1)) / 2


class _Curve(torch.autograd.Function):
    """A piece of the volume at a time, forward and backward; nothing but y is kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, offset)
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for piece, into in zip(_pieces(y.reshape(-1)), _pieces(out.view(-1)), strict=True):
            below, share = about(piece)
            into.copy_(piece + torch.lerp(offset[below], offset[below + 1], share))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, offset = ctx.saved_tensors
        of_y, of_offset = torch.empty_like(y, memory_format=torch.contiguous_format), torch.zeros_like(offset)
        pieces = (_pieces(tensor) for tensor in (y.reshape(-1), grad.reshape(-1), of_y.view(-1)))
        for piece, of_piece, into in zip(*pieces, strict=True):
            below, share = about(piece)
            slope = (offset[below + 1] - offset[below]) * ((KNOTS - 1) / 2)
            into.copy_(of_piece * (1 + slope * (piece.abs() < 1)))
            of_offset.index_add_(0, below, of_piece * (1 - share)).index_add_(0, below + 1, of_piece * share)
        return of_y, of_offset


def _pieces(flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split(max(PIECE, math.ceil(len(flat) / MOST_PIECES)))


def about(y: Tensor) -> tuple[Tensor, Tensor]:
    """The knot below each value and how far it is on the way to the next; NaN's share is NaN."""
    place = (y.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
    below = place.nan_to_num(0.0).long().clamp_(0, KNOTS - 2)
    return below, place - below


def curve(x: Tensor, values: Tensor) -> Tensor:
    """`values` [K] at knots from -1 to 1, between them by straight lines; beyond, those of the ends: like x."""
    (below, share), values = about(x), values.to(x)
    return torch.lerp(values[below], values[below + 1], share)


def counts(x: Tensor) -> Tensor:
    """How often values in each of RANGE bins about -1 to 1 occur in x [n]: [RANGE]."""
    place = ((x.float().clamp(-1, 1) + 1) * ((RANGE - 1) / 2)).round().long()
    return torch.bincount(place.flatten(), minlength=RANGE)
