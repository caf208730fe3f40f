"""A curve that decoded values pass, voxel by voxel, fitted so that each HU is as frequent as in scans.

A decoder that cannot know where exactly an edge lies puts values between both sides, and between fat and muscle: partial volumes
that few scans have. No convolution on Haar bands can undo that cheaply, as each of a cell's eight voxels would need its own
threshold; a curve that is steep between the tissues can. Its shape has a closed form, the monotone map that takes one
distribution to the other (histogram matching; Gonzalez and Woods 2018, section 3.3).

Shapes:  B batch   D H W voxels in -1..1   K knots
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KNOTS = 201  # 10 HU apart in a window of 2000
STRENGTH = 0.8  # of the way to the map: where scans have one value only, gradients still pass
RANGE = 2001  # bins of the distributions


class Tone(nn.Module):
    """y + offset(y), between knots by straight lines; begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, y: Tensor) -> Tensor:
        """[...] -> [...] in float32; beyond -1..1 the offset is that of the end."""
        place = (y.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
        below = place.detach().nan_to_num(0.0).floor().clamp(0, KNOTS - 2)
        pair = self.offset.float().unfold(0, 2, 1)[below.int()]  # [... 2]
        return y + torch.lerp(pair[..., 0], pair[..., 1], place - below)

    @torch.no_grad()
    def fit(self, decoded: Tensor, real: Tensor) -> None:
        """To the distributions of both, counts in RANGE bins from -1 to 1: [RANGE] each. Both ends stay where they are."""
        reached, wanted = (counts.double().cumsum(0) / counts.sum().clamp_min(1) for counts in (decoded, real))
        knots = torch.linspace(-1, 1, KNOTS, dtype=torch.float64)
        place = torch.linspace(0, RANGE - 1, KNOTS).round().long()
        there = torch.searchsorted(wanted, reached[place].clamp(max=1 - 1e-9)).clamp(max=RANGE - 1)  # [K]
        target = there.double() / (RANGE - 1) * 2 - 1
        target[0], target[-1] = -1.0, 1.0
        self.offset.copy_(STRENGTH * (target - knots))


def counts(x: Tensor) -> Tensor:
    """How often values in each of RANGE bins about -1 to 1 occur in x [n]: [RANGE]."""
    place = ((x.float().clamp(-1, 1) + 1) * ((RANGE - 1) / 2)).round().long()
    return torch.bincount(place.flatten(), minlength=RANGE)
