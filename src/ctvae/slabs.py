"""Longer than one group: overlapping slabs along D that are denoised together (Bar-Tal et al. 2023, "MultiDiffusion").

A velocity that is known for `depth` latent slices becomes one for `total`: it is asked of every slab at the same time t,
and where slabs overlap their answers are averaged,

    v(x, t)_i = sum_k w_(i - s_k) v_k(x[s_k : s_k + depth], t)_(i - s_k) / sum_k w_(i - s_k),   w_j = sin^4(pi (j + 1/2) / depth)

so that each slab counts most where it sees as much on either side, and hardly where it ends. All slabs share one x, so there
is nothing to join afterwards. For slabs that begin every depth / OVERLAP the weights add up to a constant. What is left of a
seam is known in closed form where the data are Gaussian (`tests/test_slabs.py`): with 8 latent slices that correlate by 0.8,
slice-to-slice change is 1.7 % larger at joins than between them, where sin^2 and slabs every depth / 2 leave 10 %.

Shapes:  B batch   C channels   n latent slices of the volume   d of a slab   h w
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ctvae.flow import Velocity

OVERLAP = 4  # slabs that see each slice


def covering(total: int, depth: int, overlap: int = OVERLAP) -> list[int]:
    """First slices of the slabs of `depth` that cover `total` >= `depth` slices, `overlap` on each, the last at the end."""
    assert 1 <= depth <= total, (total, depth)
    last, stride = total - depth, max(1, depth // overlap)
    return [*range(0, last, stride), last]


def weights(depth: int) -> Tensor:
    """How much a slab counts along its slices [d]: sin^4, positive everywhere."""
    return torch.sin(math.pi * (torch.arange(depth) + 0.5) / depth) ** 4


def joint(velocities: Sequence[Velocity], starts: Sequence[int], depth: int) -> Velocity:
    """The velocity of a whole [B C n h w] from the slabs' own, each for [B C d h w] from its first slice on.

    Slabs are asked one after the other: memory is that of one.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        window = weights(depth).to(x)[:, None, None]  # [d 1 1]
        total, weight = torch.zeros_like(x), torch.zeros_like(x[0, 0, :, :1, :1])
        for own, start in zip(velocities, starts, strict=True):
            inside = slice(start, start + depth)
            total[:, :, inside] += window * own(x[:, :, inside], t)
            weight[inside] += window
        return total / weight

    return velocity


def positions(middle: float, steps: Sequence[float], least: float, most: float) -> list[float]:
    """Positions of slabs that lie `steps` from the volume's middle (ascending), which is to lie at `middle`.

    Consecutive ones differ by what they are apart. Where the whole would leave `least`..`most` it is moved until it fits;
    where it is too long for that, it covers them from end to end and its steps shrink in proportion.
    """
    span = steps[-1] - steps[0]
    if span > most - least:
        return [least + (most - least) * (step - steps[0]) / span for step in steps]
    shift = max(0.0, least - (middle + steps[0])) - max(0.0, middle + steps[-1] - most)
    return [middle + step + shift for step in steps]
