"""What the autoencoder minimises, and what it is judged by while it trains. Pure functions of tensors.

Shapes:  x, y volumes [B 1 D H W] in -1..1   mean, logvar posterior moments [B ...]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ctvae import haar

SOFT_TISSUE_HU = (-160.0, 240.0)
SLAB = 16  # slices


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) in nats per latent number, [B ...] (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def gradient_l1(x: Tensor, y: Tensor, axes: tuple[int, ...] = (2, 3, 4)) -> Tensor:
    """Mean absolute difference of the finite differences of x and y, averaged over `axes` (Mathieu et al. 2016).

    An axis one voxel long has none, which counts as zero.
    """
    difference = x - y
    along = (difference.diff(dim=axis).abs().mean() for axis in axes if difference.shape[axis] > 1)
    return sum(along, start=difference.new_zeros(())) / len(axes)


def window_l1(x: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """Mean absolute difference after clipping to low..high and stretching that to a width of 2."""
    return (x.clamp(low, high) - y.clamp(low, high)).abs().mean() * (2.0 / (high - low))


def detail_gap_db(x: Tensor, y: Tensor, levels: int = 2) -> float:
    """How far y's fine detail is from x's in strength: 0 when as sharp, whether or not each edge lies where it should.

    Mean over the detail bands of each Haar level of |energy of y over energy of x| in dB: high for a blur, and for texture that
    was made up. Voxels beyond a multiple of 2^levels are left out; an axis of fewer is not stepped along.
    """
    whole = 2**levels
    d, h, w = (size // whole * whole or size for size in x.shape[2:])
    before, after = (_detail(volume[:, :, :d, :h, :w], levels) for volume in (x, y))
    return (10 * torch.log10((after + 1e-8) / (before + 1e-8))).abs().mean().item()


def _detail(x: Tensor, levels: int) -> Tensor:
    """Mean squares of the detail bands of every level, by slabs of slices, which is the same and takes little memory."""
    sd, sh, sw = (2 if size >= 2**levels else 1 for size in x.shape[2:])
    slabs = x.float().split(SLAB, dim=2)
    total = torch.zeros(levels, haar.bands((sd, sh, sw)) - 1)
    for slab in slabs:
        share = slab.shape[2] / x.shape[2]
        for level in range(levels):
            slab = haar.forward(slab, (sd, sh, sw))  # [B 8 d/2 h/2 w/2], the means first
            total[level] += share * slab[:, 1:].square().mean((0, 2, 3, 4)).cpu()
            slab = slab[:, :1]
    return total.flatten()


def judging(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What a discriminator minimises, of its logits. hinge: real ones above 1, decoded ones below -1 (Lim and Ye 2017).

    lsgan: real ones at 1, decoded ones at 0, in squares (Mao et al. 2017, equation 9). relativistic: each real one above a
    decoded one that it is paired with (Jolicoeur-Martineau 2018); decoded ones [n B ...] are n to each of the real ones [B ...].
    """
    if kind == "relativistic":
        return F.softplus(fake - _beside(fake, real)).mean()
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return (1 - real).relu().mean() + (1 + fake).relu().mean()


def deceiving(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What a decoder minimises, of the logits of what it decoded: the other side of `judging`."""
    if kind == "relativistic":
        return F.softplus(_beside(fake, real) - fake).mean()
    return 0.5 * (fake - 1).square().mean() if kind == "lsgan" else -fake.mean()


def _beside(fake: Tensor, real: Tensor) -> Tensor:
    """Real logits [B ...] once for each of the decoded ones [n B ...]."""
    return real.repeat(len(fake) // len(real), *[1] * (real.ndim - 1))


def feature_matching(real: list[Tensor], fake: list[Tensor], average: Callable[[Tensor], Tensor] = lambda size: size) -> Tensor:
    """Mean absolute difference of a discriminator's features, each layer relative to the real ones' size (Wang et al. 2018).

    `average` makes the size of this batch that of a larger one, of which it is a part.
    """
    sizes = [average(a.detach().abs().mean()).clamp_min(1e-6) for a in real]
    terms = [(a.detach() - b).abs().mean() / size for a, b, size in zip(real, fake, sizes, strict=True)]
    return sum(terms, start=terms[0].new_zeros(())) / len(terms)
