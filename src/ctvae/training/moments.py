"""Texture as numbers whose means two sets of patches should share, and a loss that brings them together.

A blur, or texture that was made up, shows in simple statistics long before it shows in anatomy: how often each HU occurs, how
much neighbours differ in soft tissue, how strong each wavelet band is. Two patches of different places differ in them by nature;
only their means over many patches can be compared. So running means are kept of both sides, and each patch is pulled by how far
the means are apart:

    loss = sum_k  (e_k + m_k) T_k(y) / (K s_k),   e_k = (mean T_k(fake) - mean T_k(real)) / s_k,   s_k: T_k(real)'s spread

The first part is the gradient of the squared distance of the means, without the bias that a distance within small batches has.
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
from ctvae.calibration import highest, levels, softness

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
FEWEST = 100  # batches before anything is compared: means of a few are chance, which pulls one wrong way for dozens of steps


class Moments(nn.Module):
    """Running means of the statistics of real and of decoded patches, and the pull between them."""

    seen: Tensor
    real: Tensor
    fake: Tensor
    square: Tensor
    multiplier: Tensor

    def __init__(self, soft: tuple[float, float], average: Callable[[Tensor], Tensor] = lambda values: values):
        """`soft`: the soft tissue window in -1..1. `average` is over processes that train together."""
        super().__init__()
        self.soft, self.average = (soft if soft[0] < soft[1] else (-1.0, 1.0)), average
        bands = (2 * LEVELS + 2) * (haar.bands((2, 2, 2)) - 1)
        steps = 3 * (2 * len(LAGS) + len(SMALL) + CELL + len(TISSUES) - 1)
        size = BINS - AIR_BINS + SOFT_BINS - 1 + bands + steps + 2 * CELL**3
        self.real, self.fake, self.square, self.multiplier = (nn.Buffer(torch.zeros(size)) for _ in range(4))
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:  # [B 1 D H W] each
        """The loss. Means are those before these patches, so that nothing is pulled by itself alone."""
        return self.towards(statistics(real, self.soft), fake)

    def towards(self, real: Tensor, fake: Tensor) -> Tensor:
        """The same where the real patches' statistics [K] are known."""
        values = statistics(fake, self.soft)
        off = torch.where(self.seen >= FEWEST, self.off(), 0.0).clamp(-MOST_OFF, MOST_OFF)
        loss = ((off + self.multiplier) * values / self._spread()).mean()
        self._observe(values.detach(), real.detach())
        self.multiplier.add_(RATE * off).clamp_(-MOST_DUE, MOST_DUE)
        return loss

    def off(self) -> Tensor:
        """How far the decoded side's means are from the real side's, in spreads: [K]."""
        return (self.fake - self.real) / self._spread()

    def _spread(self) -> Tensor:
        return (self.square - self.real.square()).clamp_min(0).sqrt().clamp_min(1e-4)

    def _observe(self, fake: Tensor, real: Tensor) -> None:
        weight = (1 / (1 + self.seen)).clamp_min(1 - DECAY)
        for mean, value in ((self.fake, fake), (self.real, real), (self.square, real.square())):
            mean.lerp_(self.average(value), weight)
        self.seen += 1


def statistics(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of patches x [B 1 D H W]: [K].

    How often values above each of BINS from -1 to 1 occur where cells are not empty, soft tissue of every patch at one level;
    size of the detail bands of LEVELS Haar levels, of all that is not below the soft tissue window and of that window; how
    often values above each of SOFT_BINS of it occur, at that level; mean |difference| of neighbours along D, H, W, both in it,
    in its widths, at LAGS, and of next neighbours with those above each of SMALL counted as that; size of the detail bands of
    two levels in faint cells; mean |difference| of neighbours by where in a cell they lie, and within cells of each of
    TISSUES; the mean faint cell and the mean cell of tissue, less their own means: nothing in scans, and in what is decoded
    the lattice that a decoder leaves; mean |difference| at LAGS in even tissue.
    Empty air counts for nothing: how much of a patch is air is a matter of where it lies, and nothing is to be gained by ripples
    in it, or by holes in outlines, which would make up for sharp bones in bands of the whole range. Air in cells that are not
    empty does count, or lungs could leave the count by getting darker.
    """
    d, h, w = (size // CELL * CELL for size in x.shape[2:])
    x = x[..., :d, :h, :w].float().clamp(-1, 1)
    low, high = soft
    inside = (x.detach() > AIR).float()
    window = x.clamp(low, high) * (2 / (high - low))
    scaled = _in_window(x, soft)
    levelled = _levelled(x, soft)
    most, least = F.max_pool3d(x.detach(), CELL), -F.max_pool3d(-x.detach(), CELL)
    filled = _voxels((most > EMPTY).float())
    shares = _above(levelled, BINS, filled)[AIR_BINS:] / _size(filled)
    fine = _above(_in_window(levelled, soft), SOFT_BINS, inside)[1:] / _size(inside)
    faint, tissue = ((most > FAINT[0]) & (most < FAINT[1])).float(), (least > low).float()  # [B 1 d h w] cells
    mean = F.avg_pool3d(x.detach(), CELL)
    return torch.cat([
        shares, _bands(x.clamp_min(low), inside), _bands(window, inside), fine, _steps(x, low, high),
        _bands(x, _voxels(faint), 2), _steps_by_place(scaled / 2, (x.detach() > low).float()),
        _steps_by_tissue(scaled / 2, mean), _mean_cell(x, faint), _mean_cell(window, tissue), _steps_in_even(x, scaled / 2, soft),
    ])  # fmt: skip


def _in_window(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """-1 at the window's lower end and below it, 1 at the upper one and above."""
    low, high = soft
    return x.clamp(low, high) * (2 / (high - low)) - (low + high) / (high - low)


def _levelled(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """Patches x whose own level of soft tissue is taken to the middle of the window, soft tissue with it: [B 1 D H W]"""
    off = ((soft[0] + soft[1]) / 2 - levels(x.detach(), soft)).nan_to_num(0.0)  # [B]
    return x + off.view(-1, 1, 1, 1, 1) * softness(x.detach(), soft)


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
            length = x.shape[axis] - lag
            both = inside.narrow(axis, 0, length) & inside.narrow(axis, lag, length)
            step = (clipped.narrow(axis, lag, length) - clipped.narrow(axis, 0, length)).abs()
            most = (1.0, *SMALL) if lag == 1 else (1.0,)
            found += [(step.clamp(max=value) * both).sum() / both.sum().clamp_min(1) for value in most]
    return torch.stack(found)


def _steps_by_place(window: Tensor, inside: Tensor) -> Tensor:
    """As `_steps`, by the place of the first of both voxels in its cell: scans have no lattice, and those within a cell and from
    one to the next are alike."""
    found = []
    for axis in (2, 3, 4):
        length = window.shape[axis] - 1
        both = (inside.narrow(axis, 0, length) * inside.narrow(axis, 1, length)).movedim(axis, 0)
        step = window.diff(dim=axis).abs().movedim(axis, 0)
        found += [(step[n::CELL] * both[n::CELL]).sum() / both[n::CELL].sum().clamp_min(1) for n in range(CELL)]
    return torch.stack(found)


def _steps_by_tissue(window: Tensor, mean: Tensor) -> Tensor:
    """Of a soft tissue window [B 1 D H W], one unit wide, between neighbours within a cell whose `mean` [B 1 d h w] is one of
    TISSUES."""
    d, h, w = mean.shape[2:]
    cells = window.reshape(-1, d, CELL, h, CELL, w, CELL)
    chosen = [((mean >= least) & (mean < most)).float()[:, 0] for least, most in pairwise(TISSUES)]
    found = []
    for axis in (2, 4, 6):
        step = cells.diff(dim=axis).abs().mean((2, 4, 6))  # [B d h w]
        found += [(step * tissue).sum() / _size(tissue) for tissue in chosen]
    return torch.stack(found)


def _steps_in_even(x: Tensor, window: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of a soft tissue window, one unit wide, between voxels LAGS apart along D, H, W that have soft tissue alone next to them:
    all tissue together hides what is missing between fat and muscle behind what is too much along outlines."""
    fixed = x.detach()
    even = (highest(fixed, 1) < soft[1]) & (-highest(-fixed, 1) > soft[0])
    found = []
    for axis in (2, 3, 4):
        for lag in LAGS:
            length = x.shape[axis] - lag
            both = (even.narrow(axis, 0, length) & even.narrow(axis, lag, length)).float()
            step = (window.narrow(axis, lag, length) - window.narrow(axis, 0, length)).abs()
            found.append((step * both).sum() / _size(both))
    return torch.stack(found)


def _voxels(chosen: Tensor) -> Tensor:
    """Of cells [B 1 d h w]: [B 1 D H W]."""
    return F.interpolate(chosen, scale_factor=CELL, mode="nearest")


def _bands(x: Tensor, inside: Tensor, levels: int = LEVELS) -> Tensor:
    """Where a cell holds anything `inside`. Of a level that a patch is too small for, zeros."""
    found = []
    for _ in range(levels):
        d, h, w = (size // 2 * 2 for size in x.shape[2:])
        if not d * h * w:
            found.append(x.new_zeros(haar.bands((2, 2, 2)) - 1))
            continue
        x, inside = x[..., :d, :h, :w], inside[..., :d, :h, :w]
        bands, inside = haar.forward(x), F.max_pool3d(inside, 2)  # [B 8 d h w], [B 1 d h w]
        found.append((bands[:, 1:].abs() * inside).sum((0, 2, 3, 4)) / _size(inside))
        x = bands[:, :1]
    return torch.cat(found)


def _mean_cell(x: Tensor, chosen: Tensor) -> Tensor:
    """Of x [B 1 D H W] over the `chosen` cells [B 1 d h w], less its own mean: [CELL^3]."""
    d, h, w = chosen.shape[2:]
    cells = (x * _voxels(chosen)).reshape(-1, d, CELL, h, CELL, w, CELL)
    total = cells.sum((0, 1, 3, 5)).flatten() / _size(chosen)
    return total - total.mean()


def _size(inside: Tensor) -> Tensor:
    return inside.sum().clamp_min(LEAST_SHARE * inside.numel())
