"""Texture as numbers whose means two sets of patches should share, and a loss that brings them together.

A blur, or texture that was made up, shows in simple statistics long before it shows in anatomy: how often each HU occurs, how
much neighbours differ in soft tissue, how strong each wavelet band is. Two patches of different places differ in them by nature;
only their means over many patches can be compared. So running means are kept of both sides, and each patch is pulled by how far
the means are apart:

    loss = sum_k  w_k e_k T_k(y) / s_k,   e_k = (mean T_k(fake) - mean T_k(real)) / s_k
    s_k    the spread of T_k(real) over batches
    w_k    each kind of statistics alike

which is the gradient of the squared distance of the means, without the bias that a distance within small batches has.
(Portilla and Simoncelli 2000 for such statistics of texture; Heitz et al. 2021 for matching distributions without an adversary.)

Shapes:  B batch   D H W voxels in -1..1   K statistics
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar

BINS = 81
LAGS = (1, 2, 4)
NEAR = 5  # voxels of the box about each voxel in which body is looked for
SIZES = (1 + BINS, 6 * len(LAGS), 28)  # of the kinds of statistics
MOST_OFF = 2.0  # spreads, beyond which nothing pulls harder
KEPT_REAL = 0.99  # of a running mean from batch to batch
KEPT_FAKE = 0.9  # little: a pull that comes late drives the decoder back and forth, and in the end away
FEWEST = 10  # batches before anything is compared


class Moments(nn.Module):
    """Running means of the statistics of real and of decoded patches, and the pull between them."""

    seen: Tensor
    real: Tensor
    fake: Tensor
    square: Tensor
    weights: Tensor

    def __init__(self, soft: tuple[float, float], average: Callable[[Tensor], Tensor] = lambda values: values):
        """`soft`: the soft tissue window in -1..1. `average` is over processes that train together."""
        super().__init__()
        self.soft, self.average = soft, average
        self.real, self.fake, self.square = (nn.Buffer(torch.zeros(sum(SIZES))) for _ in range(3))
        self.weights = nn.Buffer(torch.cat([torch.full((size,), 1 / (len(SIZES) * size)) for size in SIZES]), persistent=False)
        self.seen = nn.Buffer(torch.zeros(()))

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:  # [B 1 D H W] each
        """The loss. Means are those before these patches, so that nothing is pulled by itself alone."""
        values = statistics(fake, self.soft)
        off = torch.where(self.seen >= FEWEST, self.off(), 0.0)
        loss = (self.weights * off.clamp(-MOST_OFF, MOST_OFF) * values / self._spread()).sum()
        self._observe(values.detach(), statistics(real, self.soft).detach())
        return loss

    def off(self) -> Tensor:
        """How far the decoded side's means are from the real side's, in spreads: [K]."""
        return (self.fake - self.real) / self._spread()

    def _spread(self) -> Tensor:
        return (self.square - self.real.square()).clamp_min(0).sqrt().clamp_min(1e-4)

    def _observe(self, fake: Tensor, real: Tensor) -> None:
        means = ((self.fake, fake, KEPT_FAKE), (self.real, real, KEPT_REAL), (self.square, real.square(), KEPT_REAL))
        for mean, value, kept in means:
            mean.lerp_(self.average(value), (1 / (1 + self.seen)).clamp_min(1 - kept))
        self.seen += 1


def statistics(x: Tensor, soft: tuple[float, float]) -> Tensor:
    """Of patches x [B 1 D H W], the body's lower end in HU being that of the soft tissue window: [K] in kinds of SIZES.

    How much of the patches is body and what surrounds it; shares of BINS values from -1 to 1 there; mean |difference| and mean
    squared difference of neighbours at LAGS along D, H, W where both are body, clipped to the window, in its widths; mean size of
    the detail bands of two Haar levels, of the patches as they are and clipped to the window.
    """
    d, h, w = (size // 4 * 4 for size in x.shape[2:])
    x = x[..., :d, :h, :w].float().clamp(-1, 1)
    low, high = soft
    near = F.avg_pool3d((x > low).float(), NEAR, stride=1, padding=NEAR // 2).detach()  # share of body about each voxel
    clipped = (x.clamp(low, high) - low) / (high - low)
    parts = [near.mean()[None], _shares(x, near), _steps(clipped, x > low), _bands(x), _bands(clipped)]
    return torch.cat(parts)


def _shares(x: Tensor, weight: Tensor) -> Tensor:
    """A weighted histogram that gradients pass: each value is shared by its two nearest bins in proportion."""
    place = (x.flatten() + 1) * (BINS - 1) / 2
    below = place.detach().floor().clamp(0, BINS - 2)
    above, weight = place - below, weight.flatten()
    counts = x.new_zeros(BINS).index_add(0, below.long(), weight * (1 - above)).index_add(0, below.long() + 1, weight * above)
    return counts / weight.sum().clamp_min(1)


def _steps(x: Tensor, body: Tensor) -> Tensor:
    sizes, squares = [], []
    for axis in (2, 3, 4):
        for lag in LAGS:
            length = x.shape[axis] - lag
            both = body.narrow(axis, 0, length) & body.narrow(axis, lag, length)
            step = (x.narrow(axis, lag, length) - x.narrow(axis, 0, length)) * both
            pairs = both.sum().clamp_min(1)
            sizes.append(step.abs().sum() / pairs)
            squares.append(step.square().sum() / pairs)
    return torch.stack(sizes + squares)


def _bands(x: Tensor) -> Tensor:
    fine = haar.forward(x)
    return torch.cat([bands[:, 1:].abs().mean((0, 2, 3, 4)) for bands in (fine, haar.forward(fine[:, :1]))])
