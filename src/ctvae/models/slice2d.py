"""`slice2d`: a convolutional VAE on single axial slices; a volume is its slices one by one.

Shapes:  B batch   D H W voxels   S slices per image   N images per volume   M = B * N   C channels   Z latents
with D = N * S, and H, W halved by every stage. Here S = 1 and N = D; in `stack2d` S slices are one image's channels.

The textbook VAE (Kingma and Welling 2014): stride-2 convolutions with ReLU, flatten, two linear layers for mean and log
variance, and the mirror of it. Kernels are 4 wide because transposed kernels that are no multiple of their stride leave
a checkerboard (Odena et al. 2016). The output is linear: intensities -1..1 are learned, not enforced, from air.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from ctvae.models.autoencoder import Autoencoder
from ctvae.networks import Size3, Slice2D

KERNEL = 4
AIR = -1.0  # most of a scan: outputs start there rather than crawl to it


def pack(x: Tensor, slices: int) -> Tensor:
    """Volumes as images whose channels are `slices` neighbours: [B 1 D H W] -> [B*N S H W]. `unpack` undoes it."""
    _, _, depth, height, width = x.shape
    assert depth % slices == 0, f"{depth} slices are no multiple of {slices}"
    return x.reshape(-1, slices, height, width)


def unpack(images: Tensor, depth: int) -> Tensor:
    """Images as volumes of `depth` slices: [B*N S H W] -> [B 1 D H W]. `pack` undoes it."""
    _, _, height, width = images.shape
    return images.reshape(-1, 1, depth, height, width)


def start_from_air(last: nn.Module) -> None:
    """Set the output layer's bias to AIR."""
    assert isinstance(last, nn.ConvTranspose2d | nn.ConvTranspose3d)
    assert last.bias is not None
    nn.init.constant_(last.bias, AIR)


class ImageEncoder(nn.Module):
    """Images [M S H W] to the moments of their latents, 2 x [M Z]."""

    def __init__(self, channels: int, widths: tuple[int, ...], size: tuple[int, int], latent_size: int):
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise((channels, *widths)):
            layers += [nn.Conv2d(c_in, c_out, KERNEL, stride=2, padding=1), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers)
        features = widths[-1] * size[0] * size[1]
        self.to_mean = nn.Linear(features, latent_size)
        self.to_logvar = nn.Linear(features, latent_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images).flatten(1)  # [M S H W] -> [M C*h*w]
        return self.to_mean(features).float(), self.to_logvar(features).float().clamp(-30.0, 20.0)


class ImageDecoder(nn.Module):
    """Latents [M Z] to images [M S H W]: the encoder's mirror."""

    def __init__(self, channels: int, widths: tuple[int, ...], size: tuple[int, int], latent_size: int):
        super().__init__()
        self.feature_shape = (widths[-1], *size)
        self.from_latent = nn.Linear(latent_size, widths[-1] * size[0] * size[1])
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise((*widths[::-1], channels)):
            layers += [nn.ReLU(inplace=True), nn.ConvTranspose2d(c_in, c_out, KERNEL, stride=2, padding=1)]
        start_from_air(layers[-1])
        self.trunk = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.trunk(self.from_latent(z).unflatten(1, self.feature_shape))  # [M Z] -> [M C h w] -> [M S H W]


class ImageStackVAE(Autoencoder):
    """A VAE on images of `slices` neighbouring slices each. Every stack is encoded by itself."""

    spatial = False

    def __init__(self, slices: int, widths: tuple[int, ...], latent_size: int, shape: Size3):
        super().__init__()
        self.slices = slices
        step = 2 ** len(widths)
        off_grid = (shape[0] % slices, shape[1] % step, shape[2] % step)
        assert not any(off_grid), f"{shape} is off the model's grid {(slices, step, step)}"
        size = (shape[1] // step, shape[2] // step)
        self.latent_shape = (shape[0] // slices, latent_size)  # N Z
        self.encoder = ImageEncoder(slices, widths, size, latent_size)
        self.decoder = ImageDecoder(slices, widths, size, latent_size)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance of volumes in -1..1: [B 1 D H W] -> 2 x [B N Z]."""
        mean, logvar = self.encoder(pack(x, self.slices))  # 2 x [B*N Z]
        return mean.unflatten(0, (len(x), -1)), logvar.unflatten(0, (len(x), -1))

    def decode(self, z: Tensor) -> Tensor:
        """Volumes, in -1..1 up to the fit's error: [B N Z] -> [B 1 D H W]."""
        return unpack(self.decoder(z.flatten(0, 1)), z.shape[1] * self.slices)


class Slice2DVAE(ImageStackVAE):
    """One latent vector per slice; nothing ties neighbouring slices together. Works at any D."""

    def __init__(self, cfg: Slice2D, shape: Size3):
        super().__init__(1, cfg.widths, cfg.latent_size, shape)
