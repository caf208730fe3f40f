"""Noise that scans have and decoders leave out, measured and put back: grain.

Latents have no room for a scan's noise, so a decoder gives muscle and lungs without it, or, once an adversary asks for it, the
same noise in all places. But noise can be drawn. What is missing is a covariance: that of scans less that of what is decoded, in
even tissue, where there is little else. White noise under the filter with that power spectrum has it. So films are coded without
their grain, which is measured, and made anew when they are shown (Norkin and Birkbeck 2018).

Scans differ in noise, by dose and by size of the body: each volume has a strength, one of those that scans were found to have.

Shapes:  D H W voxels in -1..1   k lags or taps, 2 REACH + 1   Q quantiles
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctvae.blur import blurred_within

REACH = 3  # voxels: noise further apart than that has nothing in common
SIGHT = 2.0  # voxels of a Gaussian: what varies more slowly is anatomy
SEEN = 6  # voxels that it reaches
QUANTILES = 11
FEWEST = 2000  # voxels of a scan that tell how strong its noise is
FEWEST_SCANS = 4


@dataclass(frozen=True)
class Grain:
    """What is missing in soft tissue and in lungs, and how much more or less of it scans have."""

    soft: Tensor  # [k k k] filters of white noise
    lung: Tensor  # [k k k]
    strengths: Tensor  # [Q], mean square 1

    def __call__(self, noise: Tensor, softness: Tensor, lung: Tensor) -> Tensor:
        """What white noise gives each voxel: [B 1 D H W] each. `softness` is 1 in soft tissue and 0 elsewhere, `lung` bool."""
        return softness * filtered(noise, self.soft) + lung * filtered(noise, self.lung)

    def white(self, size: torch.Size, random: torch.Generator) -> Tensor:
        """Noise for volumes [B 1 D H W] of some strength each."""
        place = torch.rand(size[0], generator=random) * (len(self.strengths) - 1)
        below = place.long().clamp(max=len(self.strengths) - 2)
        strength = torch.lerp(self.strengths[below], self.strengths[below + 1], place - below)
        return strength.view(-1, 1, 1, 1, 1) * torch.randn(size, generator=random)

    @property
    def sound(self) -> bool:
        taps = (2 * REACH + 1,) * 3
        shapes = self.soft.shape == taps and self.lung.shape == taps and self.strengths.ndim == 1 and len(self.strengths) > 1
        return shapes and all(bool(values.isfinite().all()) for values in (self.soft, self.lung, self.strengths))


def filtered(noise: Tensor, taps: Tensor) -> Tensor:
    """[B 1 D H W]; outside of a volume there is none."""
    return F.conv3d(noise, taps[None, None].to(noise), padding=REACH)


@dataclass
class Covariance:
    """Of fine detail within some voxels, by lag, summed over scans: [k k k]."""

    sums: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, x: Tensor, where: Tensor) -> Covariance:
        """Of a volume's values `where` [1 1 D H W], each less the mean of those about it."""
        weight = where.to(x.dtype)
        around = blurred_within(x, where, SIGHT, SEEN)
        return cls(*(_products(values[0, 0]) for values in ((x - around) * weight, weight)))

    @classmethod
    def total(cls, each: Sequence[Covariance]) -> Covariance:
        return cls(torch.stack([one.sums for one in each]).sum(0), torch.stack([one.pairs for one in each]).sum(0))

    @property
    def voxels(self) -> float:
        return float(self.pairs[REACH, REACH, REACH])

    @property
    def variance(self) -> float:
        return float(self.mean[REACH, REACH, REACH])

    @property
    def mean(self) -> Tensor:
        return self.sums / self.pairs.clamp_min(1)


def missing(real: Covariance, made: Covariance) -> Tensor:
    """The filter of white noise that what is decoded lacks to have the scans' covariance, nothing where it lacks no variance:
    [k k k].

    What it lacks is tapered to nothing beyond REACH; where its power spectrum is negative, and nothing can be added, it is none.
    """
    lacking = real.mean - made.mean
    variance = float(lacking[REACH, REACH, REACH])
    if variance <= 0 or min(real.voxels, made.voxels) < FEWEST:
        return torch.zeros_like(lacking, dtype=torch.float32)
    taper = 1 - torch.arange(-REACH, REACH + 1, dtype=lacking.dtype).abs() / (REACH + 1)
    lacking = lacking * taper[:, None, None] * taper[:, None] * taper
    power = torch.fft.fftn(torch.fft.ifftshift(lacking)).real.clamp_min(0)
    taps = torch.fft.fftshift(torch.fft.ifftn(power.sqrt()).real)
    return (taps * (variance / taps.square().sum()).sqrt()).float()


def strengths(real: Iterable[Covariance], made: Iterable[Covariance]) -> Tensor:
    """By how much scans lack noise in soft tissue, in pairs of both sides, in shares of the mean square: its quantiles [Q]."""
    pairs = [(a, b) for a, b in zip(real, made, strict=True) if min(a.voxels, b.voxels) >= FEWEST]
    lacking = torch.tensor([max(0.0, a.variance - b.variance) for a, b in pairs], dtype=torch.float64)
    if len(lacking) < FEWEST_SCANS or not lacking.any():
        return torch.ones(QUANTILES)
    found = lacking.sqrt().quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))
    between = torch.lerp(found[:-1, None], found[1:, None], torch.linspace(0, 1, 33, dtype=torch.float64))  # as they are drawn
    return (found / between.square().mean().sqrt()).float()


def _products(x: Tensor) -> Tensor:
    """Sums over [D H W] of each value times that at each lag: [k k k]."""
    sizes = [size + REACH for size in x.shape]
    spectrum = torch.fft.rfftn(x.double(), s=sizes)
    sums = torch.fft.irfftn(spectrum.abs().square(), s=sizes)
    for axis, size in enumerate(sizes):
        sums = sums.index_select(axis, torch.arange(-REACH, REACH + 1, device=x.device) % size)
    return sums
