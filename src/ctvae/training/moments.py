"""Texture as numbers whose means two sets of patches should share, and a loss that brings them together.

A blur, or texture that was made up, shows in simple statistics long before it shows in anatomy: how often each HU occurs, how
much neighbours differ in soft tissue, how strong each wavelet band is. Two patches of different places differ in them by nature;
only their means over many patches can be compared. So running means are kept of both sides, and each patch is pulled by how far
the means are apart:

    loss = sum_k  e_k T_k(y) / (K s_k),   e_k = (mean T_k(fake) - mean T_k(real)) / s_k,   s_k: T_k(real)'s spread over batches

which is the gradient of the squared distance of the means, without the bias that a distance within small batches has.
(Portilla and Simoncelli 2000 for such statistics of texture; Heitz et al. 2021 for matching distributions without an adversary.)

Shapes:  B batch   D H W voxels in -1..1   K statistics
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctvae import haar

BINS = 40
LAGS = (1, 2, 4)
MOST_OFF = 3.0  # spreads, beyond which nothing pulls harder
DECAY = 0.97
FEWEST = 5  # batches before anything is compared


class Moments(nn.Module):
    """Running means of the statistics of real and of decoded patches, and the pull between them."""

    seen: Tensor
    real: Tensor
    fake: Tensor
    square: Tensor

    def __init__(self, soft: tuple[float, float], average: Callable[[Tensor], Tensor] = lambda values: values):
        """`soft`: the soft tissue window in -1..1. `average` is over processes that train together."""
        super().__init__()
        self.soft, self.average = soft, average
        size = BINS + 3 * len(LAGS) + 2 * (haar.bands((2, 2, 2)) - 1)
        self.real, self.fake, self.square = (nn.Buffer(torch.zeros(size)) for _ in range(3))
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:  # [B 1 D H W] each
        """The loss. Means are those before these patches, so that nothing is pulled by itself alone."""
        values = statistics(fake, self.soft)
        off = torch.where(self.seen >= FEWEST, self.off(), 0.0)
        loss = (off.clamp(-MOST_OFF, MOST_OFF) * values / self._spread()).mean()
        self._observe(values.detach(), statistics(real, self.soft).detach())
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

    Shares of BINS values from -1 to 1; mean |difference| of neighbours at LAGS along D, H, W where both lie in the soft tissue
    window, in its widths; mean size of the detail bands of two Haar levels.
    """
    d, h, w = (size // 4 * 4 for size in x.shape[2:])
    x = x[..., :d, :h, :w].float().clamp(-1, 1)
    return torch.cat([_shares(x), _steps(x, *soft), _bands(x)])


def _shares(x: Tensor) -> Tensor:
    """A histogram that gradients pass: each value is shared by its two nearest bins in proportion."""
    place = (x.flatten() + 1) * (BINS - 1) / 2
    below = place.detach().nan_to_num(0.0).floor().clamp(0, BINS - 2)  # NaN has no bin, and stays NaN in its share
    above = place - below  # share of the upper bin
    counts = x.new_zeros(BINS).index_add(0, below.long(), 1 - above).index_add(0, below.long() + 1, above)
    return counts / place.numel()


def _steps(x: Tensor, low: float, high: float) -> Tensor:
    inside, clipped = (x > low).detach(), (x.clamp(low, high) - low) / (high - low)
    found = []
    for axis in (2, 3, 4):
        for lag in LAGS:
            length = x.shape[axis] - lag
            both = inside.narrow(axis, 0, length) & inside.narrow(axis, lag, length)
            step = (clipped.narrow(axis, lag, length) - clipped.narrow(axis, 0, length)).abs()
            found.append((step * both).sum() / both.sum().clamp_min(1))
    return torch.stack(found)


def _bands(x: Tensor) -> Tensor:
    fine = haar.forward(x)
    return torch.cat([bands[:, 1:].abs().mean((0, 2, 3, 4)) for bands in (fine, haar.forward(fine[:, :1]))])
