"""Texture as numbers whose means two sets of patches should share, and a loss that brings them together.

A blur, or texture that was made up, shows in simple statistics long before it shows in anatomy: how often each HU occurs, how
much neighbours differ in soft tissue, how strong each wavelet band is. Two patches of different places differ in them by nature;
only their means over many patches can be compared. So running means are kept of both sides, and each patch is pulled by how far
the means are apart:

    loss = sum_k  (e_k + m_k) T_k(y) / (K w_k s_k),   e_k = (R_k(fake) - R_k(real)) / s_k,   R_k = mean T_k / mean W_k

T_k is a sum over a patch and W_k the number of voxels that it is over (w_k its mean), so that R_k is the mean over all voxels of
all patches that count, and not one of the patches', in which those at the rim of the body would weigh as much as full ones. s_k
is how much R_k(real) varies from patch to patch.

The first part is the gradient of the squared distance of the means, without the bias that a distance within small batches has.
Where another loss pulls the other way it ends in a compromise: so the means' equality is a constraint whose multiplier m_k grows
by RATE e_k a step, until nothing is left (Platt and Barr 1988).
(Portilla and Simoncelli 2000 for such statistics of texture; Heitz et al. 2021 for matching distributions without an adversary.)

Shapes:  B batch   D H W voxels in -1..1   K statistics
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar

BINS = 40
SOFT_BINS = 41  # 10 HU each from -160 to 240 HU: fat and muscle are narrow peaks
AIR_BINS = 2  # the lowest
AIR = -0.9
LEVELS = 3  # of Haar bands: up to 8 voxels
CELL = 4  # voxels along each axis, of two Haar levels: a decoder's own lattice
LAGS = (1, 2, 4)
SMALL = (0.025, 0.0625, 0.15)  # of the soft tissue window: 10, 25 and 60 HU. Larger differences count as one of these
FAINT = (-0.95, -0.3)  # the highest value of a cell in lungs, or in air that is not empty
MOST_OFF = 3.0  # spreads, beyond which nothing pulls harder
LEAST = 0.01  # of the patches that sums are over: of what is rarer than that there is little to see
RATE = 0.01  # of the multipliers, a step
MOST_DUE = 20.0  # of a multiplier
DECAY = 0.97
FEWEST = 5  # batches before anything is compared


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
        size = BINS - AIR_BINS + SOFT_BINS - 1 + bands + 3 * (len(LAGS) + len(SMALL)) + 2 * CELL**3
        self.real, self.fake = (nn.Buffer(torch.zeros(2, size)) for _ in range(2))  # sums, and what they are over
        self.square, self.multiplier = (nn.Buffer(torch.zeros(size)) for _ in range(2))
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:  # [B 1 D H W] each
        """The loss. Means are those before these patches, so that nothing is pulled by itself alone."""
        values = statistics(fake, self.soft)
        off = torch.where(self.seen >= FEWEST, self.off(), 0.0).clamp(-MOST_OFF, MOST_OFF)
        loss = ((off + self.multiplier) * values[0] / (self._spread() * self.fake[1].clamp_min(LEAST))).mean()
        self._observe(values.detach(), statistics(real, self.soft).detach())
        self.multiplier.add_(RATE * off).clamp_(-MOST_DUE, MOST_DUE)
        return loss

    def off(self) -> Tensor:
        """How far the decoded side's means are from the real side's, in spreads: [K]."""
        return (ratio(self.fake) - ratio(self.real)) / self._spread()

    def _spread(self) -> Tensor:
        return self.square.sqrt().clamp_min(1e-4)

    def _observe(self, fake: Tensor, real: Tensor) -> None:
        weight = (1 / (1 + self.seen)).clamp_min(1 - DECAY)
        for mean, value in ((self.fake, fake), (self.real, real)):
            mean.lerp_(self.average(value), weight)
        beside = (real[0] - ratio(self.real) * real[1]) / self.real[1].clamp_min(LEAST)
        self.square.lerp_(self.average(beside.square()), weight)
        self.seen += 1


def ratio(sums: Tensor) -> Tensor:
    """Means, of sums and what they are over [2 K]: [K]."""
    return sums[0] / sums[1].clamp_min(LEAST)


def statistics(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of patches x [B 1 D H W]: sums, and what they are over, both as shares of the patches: [2 K].

    How often values below each of BINS from -1 to 1 occur, air aside; size of the detail bands of LEVELS Haar levels, of the
    whole range and of the soft tissue window; how often values below each of SOFT_BINS of it occur; mean |difference| of
    neighbours along D, H, W, both in it, in its widths, at LAGS, and of next neighbours with those above each of SMALL counted
    as that; size of the detail bands of two levels in faint cells; the mean faint cell and the mean cell of tissue, less their
    own means: nothing in scans, and in what is decoded the lattice that a decoder leaves.
    Air counts for nothing: how much of a patch is air is a matter of where it lies, and nothing is to be gained by ripples in it.
    """
    d, h, w = (size // CELL * CELL for size in x.shape[2:])
    x = x[..., :d, :h, :w].float().clamp(-1, 1)
    low, high = soft
    inside = (x.detach() > AIR).float()
    window = x.clamp(low, high) * (2 / (high - low))
    scaled = window - (low + high) / (high - low)  # -1..1
    most, least = F.max_pool3d(x.detach(), CELL), -F.max_pool3d(-x.detach(), CELL)
    faint, tissue = ((most > FAINT[0]) & (most < FAINT[1])).float(), (least > low).float()  # [B 1 d h w] cells
    blocks = [
        _over(_cumulative(x, BINS, torch.ones_like(inside), AIR_BINS), inside),
        *_bands(x, inside),
        *_bands(window, inside),
        _over(_cumulative(scaled, SOFT_BINS, inside)[:-1], inside),
        *_steps(x, low, high),
        *_bands(x, F.interpolate(faint, scale_factor=CELL, mode="nearest"), 2),
        _mean_cell(x, faint),
        _mean_cell(window, tissue),
    ]
    return torch.cat(blocks, dim=1)


def _over(sums: Tensor, inside: Tensor) -> Tensor:
    """Sums [k] over what is `inside`, with how much that is: [2 k]."""
    return torch.stack((sums, inside.sum().expand_as(sums))) / inside.numel()


def _cumulative(x: Tensor, bins: int, weight: Tensor, first: int = 0) -> Tensor:
    """Of x in -1..1 a cumulative histogram from bin `first` on that gradients pass: each value is shared by its two nearest bins.

    Cumulative, as values that are too frequent over a wide range then know which way to go, and not at its ends alone.
    """
    place, weight = (x.flatten() + 1) * (bins - 1) / 2, weight.flatten()
    below = place.detach().nan_to_num(0.0).floor().clamp(0, bins - 2)  # NaN has no bin, and stays NaN in its share
    above = place - below  # share of the upper bin
    counts = x.new_zeros(bins).index_add(0, below.long(), weight * (1 - above)).index_add(0, below.long() + 1, weight * above)
    return counts[first:].cumsum(0)


def _steps(x: Tensor, low: float, high: float) -> Iterator[Tensor]:
    inside, clipped = (x > low).detach(), (x.clamp(low, high) - low) / (high - low)
    for axis in (2, 3, 4):
        for lag in LAGS:
            length = x.shape[axis] - lag
            both = (inside.narrow(axis, 0, length) & inside.narrow(axis, lag, length)).float()
            step = (clipped.narrow(axis, lag, length) - clipped.narrow(axis, 0, length)).abs()
            most = (1.0, *SMALL) if lag == 1 else (1.0,)
            yield _over(torch.stack([(step.clamp(max=value) * both).sum() for value in most]), both)


def _bands(x: Tensor, inside: Tensor, levels: int = LEVELS) -> Iterator[Tensor]:
    """Where a cell holds anything `inside`. Of a level that a patch is too small for, nothing."""
    for _ in range(levels):
        d, h, w = (size // 2 * 2 for size in x.shape[2:])
        if not d * h * w:
            yield x.new_zeros(2, haar.bands((2, 2, 2)) - 1)
            continue
        x, inside = x[..., :d, :h, :w], inside[..., :d, :h, :w]
        bands, inside = haar.forward(x), F.max_pool3d(inside, 2)  # [B 8 d h w], [B 1 d h w]
        yield _over((bands[:, 1:].abs() * inside).sum((0, 2, 3, 4)), inside)
        x = bands[:, :1]


def _mean_cell(x: Tensor, chosen: Tensor) -> Tensor:
    """Of x [B 1 D H W] over the `chosen` cells [B 1 d h w], less its own mean: [2 CELL^3]."""
    d, h, w = chosen.shape[2:]
    cells = (x * F.interpolate(chosen, scale_factor=CELL, mode="nearest")).reshape(-1, d, CELL, h, CELL, w, CELL)
    total = cells.sum((0, 1, 3, 5)).flatten()
    return _over(total - total.mean(), chosen)
