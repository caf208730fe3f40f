"""What the autoencoder minimises. Pure functions of tensors.

Shapes:  x, y volumes [B 1 D H W] in -1..1   mean, logvar posterior moments [B ...]
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

SOFT_TISSUE_HU = (-160.0, 240.0)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) in nats per latent number, [B ...] (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def gradient_l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences of x and y, averaged over D, H and W (Mathieu et al. 2016)."""
    difference = x - y
    return sum((difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4)), start=difference.new_zeros(())) / 3


def window_l1(x: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """Mean absolute difference after clipping to low..high and stretching that to a width of 2."""
    return (x.clamp(low, high) - y.clamp(low, high)).abs().mean() * (2.0 / (high - low))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss on logits: real ones above 1, decoded ones below -1 (Lim and Ye 2017)."""
    return (1 - real).relu().mean() + (1 + fake).relu().mean()


def feature_matching(real: list[Tensor], fake: list[Tensor], average: Callable[[Tensor], Tensor] = lambda size: size) -> Tensor:
    """Mean absolute difference of a discriminator's features, each layer relative to the real ones' size (Wang et al. 2018).

    `average` makes the size of this batch that of a larger one, of which it is a part.
    """
    sizes = [average(a.detach().abs().mean()).clamp_min(1e-6) for a in real]
    terms = [(a.detach() - b).abs().mean() / size for a, b, size in zip(real, fake, sizes, strict=True)]
    return sum(terms, start=terms[0].new_zeros(())) / len(terms)
