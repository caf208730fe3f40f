"""Texture as numbers whose means two sets of patches should share, and a loss that brings them together.

A blur, or texture that was made up, shows in simple statistics long before it shows in anatomy: how often each HU occurs, how
much neighbours differ in soft tissue, how strong each wavelet band is. Two patches of different places differ in them by nature;
only their means over many patches can be compared. So running means are kept of both sides, and each patch is pulled by how far
the means are apart:

    loss = sum_k  (e_k + m_k) T_k(y) / (K s_k),   e_k = (mean T_k(fake) - mean T_k(real)) / s_k,   s_k: T_k(real)'s spread

The first part is the gradient of the squared distance of the means, without the bias that a distance within small batches has.
Most patches hold no lung, and some no bone. So a mean is over the patches that have enough of what a statistic is of, as is its
spread; over all of them, lungs would count for as little as they are seldom.
Where another loss pulls the other way it ends in a compromise: so the means' equality is a constraint whose multiplier m_k grows
by RATE e_k a step, until nothing is left or it has come to MOST_DUE (Platt and Barr 1988).
(Portilla and Simoncelli 2000 for such statistics of texture; Heitz et al. 2021 for matching distributions without an adversary.)

Shapes:  B batch   D H W voxels in -1..1   K statistics
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar
from ctvae.calibration import Places, detail

BINS = 40
SOFT_BINS = 41  # 10 HU each from -160 to 240 HU: fat and muscle are narrow peaks
AIR_BINS = 2  # the lowest
EMPTY = -0.95  # the highest value of a cell of air, noise of air included
AIR = -0.9
LEAST_SHARE = 0.05  # of a patch: in less that is not air there is little to see
LEVELS = 3  # of Haar bands: up to 8 voxels
CELL = 4  # voxels along each axis, of two Haar levels: a decoder's own lattice
LAGS = (1, 2, 4)
SMALL = (0.025, 0.0625, 0.15)  # of the soft tissue window: 10, 25 and 60 HU. Larger differences count as one of these
FAINT = (EMPTY, -0.3)  # the highest value of a cell in lungs, or in air that is not empty
TISSUES = (-0.95, -0.3, -0.15, -0.05, 0.0, 0.08, 1.0)  # the mean of a cell: airways and lungs, rims, fat, both, muscle, bone
MOST_OFF = 3.0  # spreads, beyond which nothing pulls harder
RATE = 0.01  # of the multipliers, a step
MOST_DUE = 3.0  # of a multiplier: with 20, 3,000 steps made outlines dissolve
DECAY = 0.97
FEWEST = 5  # batches that have what is compared, before it is
NEAR_LAGS = (1, 2)


class Moments(nn.Module):
    """Running means of the statistics of real and of decoded patches, and the pull between them."""

    seen: Tensor  # [2 K] batches that had what the statistic is of, decoded and real
    real: Tensor
    fake: Tensor
    square: Tensor
    multiplier: Tensor

    def __init__(self, soft: tuple[float, float], average: Callable[[Tensor], Tensor] = lambda values: values):
        """`soft`: the soft tissue window in -1..1. `average` is over processes that train together."""
        super().__init__()
        self.soft, self.average = (soft if soft[0] < soft[1] else (-1.0, 1.0)), average
        size = measured(torch.zeros(1, 1, *3 * (2**LEVELS,)), self.soft).shape[1]
        self.real, self.fake, self.square, self.multiplier = (nn.Buffer(torch.zeros(size)) for _ in range(4))
        self.seen = nn.Buffer(torch.zeros(2, size))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:  # [B 1 D H W] each
        """The loss. Means are those before these patches, so that nothing is pulled by itself alone."""
        values, weight = measured(fake, self.soft)
        off = torch.where(self.seen.amin(0) >= FEWEST, self.off(), 0.0).clamp(-MOST_OFF, MOST_OFF)
        loss = ((off + self.multiplier) * values / self._spread()).mean()
        self._observe(self.average(torch.stack((values, weight)).detach()), self.average(measured(real, self.soft).detach()))
        self.multiplier.add_(RATE * off * weight.detach()).clamp_(-MOST_DUE, MOST_DUE)
        return loss

    def off(self) -> Tensor:
        """How far the decoded side's means are from the real side's, in spreads: [K]."""
        return (self.fake - self.real) / self._spread()

    def _spread(self) -> Tensor:
        return (self.square - self.real.square()).clamp_min(0).sqrt().clamp_min(1e-4)

    def _observe(self, fake: Tensor, real: Tensor) -> None:
        """Each is [2 K]: values and weights."""
        for side, (values, weight) in enumerate((fake, real)):
            share = torch.maximum(weight / (weight + self.seen[side]).clamp_min(1e-6), weight * (1 - DECAY))
            each = values / weight.clamp_min(1e-6)
            for mean, value in ((self.real, each), (self.square, each.square())) if side else ((self.fake, each),):
                mean.lerp_(value, share)
            self.seen[side] += weight


def measured(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of patches x [B 1 D H W]: [2 K], statistics, and of each how much there is of what it is of, where 1 is enough.
    What there is too little of counts by how much there is: a statistic over its weight is the mean.

    How often values above each of BINS from -1 to 1 occur where cells are not empty; size of the detail bands of LEVELS Haar
    levels, of all that is not below the soft tissue window and of that window; how often values above each of SOFT_BINS of it
    occur; mean |difference| of neighbours along D, H, W, both in it, in its widths, at LAGS, and of next neighbours with those
    above each of SMALL counted as that; size of the detail bands of two levels in faint cells; mean |difference| of neighbours
    by where in a cell they lie, and within cells of each of TISSUES; the mean faint cell and the mean cell of tissue, less their
    own means: nothing in scans, and in what is decoded the lattice that a decoder leaves; and what `_within` says.
    Empty air counts for nothing: how much of a patch is air is a matter of where it lies, and nothing is to be gained by ripples
    in it, or by holes in outlines, which would make up for sharp bones in bands of the whole range. Air in cells that are not
    empty does count, or lungs could leave the count by getting darker.
    """
    d, h, w = (size // CELL * CELL for size in x.shape[2:])
    x = x[..., :d, :h, :w].float().clamp(-1, 1)
    low, high = soft
    inside = (x.detach() > AIR).float()
    window = x.clamp(low, high) * (2 / (high - low))
    scaled = window - (low + high) / (high - low)  # -1..1
    most, least = F.max_pool3d(x.detach(), CELL), -F.max_pool3d(-x.detach(), CELL)
    filled = _voxels((most > EMPTY).float())
    faint, tissue = ((most > FAINT[0]) & (most < FAINT[1])).float(), (least > low).float()  # [B 1 d h w] cells
    mean = F.avg_pool3d(x.detach(), CELL)
    return torch.cat([
        _over(_above(x, BINS, filled)[AIR_BINS:], filled), _bands(x.clamp_min(low), inside), _bands(window, inside),
        _over(_above(scaled, SOFT_BINS, inside)[1:], inside), _steps(x, low, high), _bands(x, _voxels(faint), 2),
        _steps_by_cell(scaled / 2, (x.detach() > low).float()), _steps_by_tissue(scaled / 2, mean), _mean_cell(x, faint),
        _mean_cell(window, tissue), _within(x, scaled / 2, soft),
    ], dim=1)  # fmt: skip


def _over(total: Tensor, chosen: Tensor) -> Tensor:
    """Sums [k] over what is chosen (0 or 1), as means, and how much is chosen: [2 k]."""
    total = total.reshape(-1)
    enough = LEAST_SHARE * chosen.numel()
    size = chosen.sum()
    return torch.stack((total / size.clamp_min(enough), (size / enough).clamp(max=1).expand_as(total)))


def _above(x: Tensor, bins: int, weight: Tensor) -> Tensor:
    """Of x in -1..1 how much weight lies in each of `bins` or above it; each value is shared by its two nearest bins, so that
    gradients pass: [bins].

    Cumulative, as values that are too frequent over a wide range then know which way to go, and not at its ends alone. A value's
    gradient is that of the next bin above it alone.
    """
    place, weight = (x.flatten() + 1) * (bins - 1) / 2, weight.flatten()
    below = place.detach().nan_to_num(0.0).floor().clamp(0, bins - 2)  # NaN has no bin, and stays NaN in its share
    above = place - below  # share of the upper bin
    counts = x.new_zeros(bins).index_add(0, below.long(), weight * (1 - above)).index_add(0, below.long() + 1, weight * above)
    return counts.flip(0).cumsum(0).flip(0)


def _steps(x: Tensor, low: float, high: float) -> Tensor:
    inside, clipped = (x > low).detach(), (x.clamp(low, high) - low) / (high - low)
    found = []
    for axis in (2, 3, 4):
        for lag in LAGS:
            step, both = _differences(clipped, inside, axis, lag)
            most = (1.0, *SMALL) if lag == 1 else (1.0,)
            found.append(_over(torch.stack([(step.clamp(max=value) * both).sum() for value in most]), both))
    return torch.cat(found, dim=1)


def _within(x: Tensor, window: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of all that is neither empty air nor outline (`calibration.py`): mean |difference| of neighbours along D, H, W at NEAR_LAGS
    in the whole range, and the power of fine detail in the `window`, one unit wide."""
    places = Places.of(x.detach(), soft)
    within = ~(places.empty | places.rim)
    found = [_difference(x, within, axis, lag) for axis in (2, 3, 4) for lag in NEAR_LAGS]
    fine = detail(window, (-0.5, 0.5)).square()
    return torch.cat([*found, _over((fine * within).sum(), within.float())], dim=1)


def _difference(x: Tensor, inside: Tensor, axis: int, lag: int) -> Tensor:
    step, both = _differences(x, inside, axis, lag)
    return _over((step * both).sum(), both)


def _differences(x: Tensor, inside: Tensor, axis: int, lag: int) -> tuple[Tensor, Tensor]:
    """|Difference| of voxels `lag` apart, and whether both are inside (bool in, 0 or 1 out)."""
    length = x.shape[axis] - lag
    both = inside.narrow(axis, 0, length) & inside.narrow(axis, lag, length)
    return (x.narrow(axis, lag, length) - x.narrow(axis, 0, length)).abs(), both.float()


def _steps_by_cell(window: Tensor, inside: Tensor) -> Tensor:
    """As `_steps`, by the place of the first of both voxels in its cell: scans have no lattice, and those within a cell and from
    one to the next are alike."""
    found = []
    for axis in (2, 3, 4):
        length = window.shape[axis] - 1
        both = (inside.narrow(axis, 0, length) * inside.narrow(axis, 1, length)).movedim(axis, 0)
        step = window.diff(dim=axis).abs().movedim(axis, 0)
        found += [_over((step[n::CELL] * both[n::CELL]).sum(), both[n::CELL]) for n in range(CELL)]
    return torch.cat(found, dim=1)


def _steps_by_tissue(window: Tensor, mean: Tensor) -> Tensor:
    """Of a soft tissue window [B 1 D H W], one unit wide, between neighbours within a cell whose `mean` [B 1 d h w] is one of
    TISSUES."""
    d, h, w = mean.shape[2:]
    cells = window.reshape(-1, d, CELL, h, CELL, w, CELL)
    chosen = [((mean >= least) & (mean < most)).float()[:, 0] for least, most in pairwise(TISSUES)]
    found = []
    for axis in (2, 4, 6):
        step = cells.diff(dim=axis).abs().mean((2, 4, 6))  # [B d h w]
        found += [_over((step * tissue).sum(), tissue) for tissue in chosen]
    return torch.cat(found, dim=1)


def _voxels(chosen: Tensor) -> Tensor:
    """Of cells [B 1 d h w]: [B 1 D H W]."""
    return F.interpolate(chosen, scale_factor=CELL, mode="nearest")


def _bands(x: Tensor, inside: Tensor, levels: int = LEVELS) -> Tensor:
    """Where a cell holds anything `inside`. Of a level that a patch is too small for, zeros."""
    found = []
    for _ in range(levels):
        d, h, w = (size // 2 * 2 for size in x.shape[2:])
        if not d * h * w:
            found.append(x.new_zeros(2, haar.bands((2, 2, 2)) - 1))
            continue
        x, inside = x[..., :d, :h, :w], inside[..., :d, :h, :w]
        bands, inside = haar.forward(x), F.max_pool3d(inside, 2)  # [B 8 d h w], [B 1 d h w]
        found.append(_over((bands[:, 1:].abs() * inside).sum((0, 2, 3, 4)), inside))
        x = bands[:, :1]
    return torch.cat(found, dim=1)


def _mean_cell(x: Tensor, chosen: Tensor) -> Tensor:
    """Of x [B 1 D H W] over the `chosen` cells [B 1 d h w], less its own mean: [2 CELL^3]."""
    d, h, w = chosen.shape[2:]
    cells = (x * _voxels(chosen)).reshape(-1, d, CELL, h, CELL, w, CELL)
    total = cells.sum((0, 1, 3, 5)).flatten()
    return _over(total - total.mean(), chosen)
