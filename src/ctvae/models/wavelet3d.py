"""`wavelet3d`: a residual 3D KL autoencoder that works on Haar bands, never on raw voxels.

Shapes:  B batch   D H W image voxels   d h w latent voxels   Z latent channels
with D = d * grid[0], H = h * grid[1], W = w * grid[2] and grid = cfg.grid.

A first convolution at full resolution is where a 3D network's memory goes (one feature of 64x512x512 in bf16 is 32 MiB).
Here the first convolution sees eight Haar bands at half the resolution, so the same features cost an eighth. All layers are
convolutions and per-voxel operations: the network takes any size on its grid, and a tile with its halo equals the whole.
KL autoencoder: Kingma and Welling 2014, Rombach et al. 2022; Haar stem: as in HA-GAN's and WDM-3D's spirit, but learned around.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ctvae import haar
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.blocks import Conv, ResBlock
from ctvae.models.recompute import save_memory
from ctvae.models.tone import Tone
from ctvae.networks import Size3, Wavelet3D

INITIAL_LOGVAR = -6.0  # posteriors begin narrow: with sigma near 1 the first steps would learn from noise


class Encoder(nn.Module):
    """Haar step, convolution, residual blocks, per level from fine to coarse.

    With `strided` every level but the first has a strided convolution in place of both. It can become what they are, and learns
    faster (benchmarks/results.md).
    """

    def __init__(self, cfg: Wavelet3D):
        super().__init__()
        self.strides = haar_steps(cfg)
        entries: list[nn.Module] = []
        levels: list[nn.Module] = []
        c_in = 1
        for stride, step, width, blocks in zip(cfg.strides, self.strides, cfg.widths, cfg.blocks, strict=True):
            size = 3 if not levels else 1
            if step == stride:
                entries.append(Conv(c_in * haar.bands(stride), width, size, padding=size // 2))
            else:
                entries.append(Conv(c_in, width, stride, stride))
            levels.append(nn.ModuleList(ResBlock(width) for _ in range(blocks)))
            c_in = width
        self.entries = nn.ModuleList(entries)
        self.levels = nn.ModuleList(levels)
        self.to_moments = nn.Conv3d(c_in, 2 * cfg.latent_channels, kernel_size=1)
        assert self.to_moments.bias is not None
        nn.init.constant_(self.to_moments.bias.data[cfg.latent_channels :], INITIAL_LOGVAR)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B 1 D H W]
        for stride, entry, blocks in zip(self.strides, self.entries, self.levels, strict=True):
            x = entry(haar.forward(x, stride))  # halves the axes whose step is 2
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
        mean, logvar = self.to_moments(x).float().chunk(2, dim=1)  # 2 x [B Z d h w]
        return mean, logvar.clamp(-30.0, 20.0)


class Decoder(nn.Module):
    """The encoder's mirror: residual blocks, convolution, inverse Haar step, per level from coarse to fine.

    It may have more blocks than the encoder, which take no part in what latents are.
    """

    def __init__(self, cfg: Wavelet3D):
        super().__init__()
        self.strides = haar_steps(cfg)[::-1]
        widths, blocks = cfg.widths[::-1], cfg.decoding_blocks[::-1]
        self.entry = Conv(cfg.latent_channels, widths[0], kernel_size=3, padding=1)
        self.levels = nn.ModuleList(nn.ModuleList(ResBlock(w) for _ in range(n)) for w, n in zip(widths, blocks, strict=True))
        exits: list[nn.Module] = []
        for width, finer, stride, step in zip(widths, (*widths[1:], 1), cfg.strides[::-1], self.strides, strict=True):
            last = finer == 1 and len(exits) == len(widths) - 1
            if step == stride:
                exits.append(Conv(width, finer * haar.bands(stride), 3 if last else 1, padding=1 if last else 0))
            else:
                exits.append(nn.ConvTranspose3d(width, finer, stride, stride))
        self.exits = nn.ModuleList(exits)
        self.tone = Tone() if cfg.tone else None

    def forward(self, z: Tensor) -> Tensor:  # [B Z d h w]
        x = self.raw(z)
        return x if self.tone is None else self.tone(x)  # [B 1 D H W]

    def raw(self, z: Tensor) -> Tensor:
        """What the curve is given: [B Z d h w] -> [B 1 D H W] in float32."""
        x = self.entry(z)
        for stride, blocks, leave in zip(self.strides, self.levels, self.exits, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            x = haar.inverse(leave(x), stride)  # doubles the axes whose step is 2
        return x.float()


def haar_steps(cfg: Wavelet3D) -> tuple[Size3, ...]:
    """Of each level, fine to coarse; 1 1 1 where a strided convolution does the halving."""
    return (cfg.strides[0], *[(1, 1, 1) for _ in cfg.strides[1:]]) if cfg.strided else cfg.strides


class Wavelet3DVAE(Autoencoder):
    spatial = True

    def __init__(self, cfg: Wavelet3D, shape: Size3):
        super().__init__()
        self.cfg = cfg
        d, h, w = (size // step for size, step in zip(shape, cfg.grid, strict=True))
        self.latent_shape = (cfg.latent_channels, d, h, w)
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        save_memory(self, cfg.checkpointing)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B 1 D H W] in -1..1 -> mean and log variance, [B Z d h w] each."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """[B Z d h w] -> [B 1 D H W] in about -1..1."""
        return self.decoder(z)

    @property
    def halo(self) -> Size3:
        """Latent voxels beyond a tile that its decoding or encoding can see, along D H W."""
        return halo(self.cfg)


def halo(cfg: Wavelet3D) -> Size3:
    """Latent voxels around a tile that reach into it: every 3x3x3 convolution of a level adds one voxel of that level."""
    reach = []
    for axis in range(3):
        scale = math.prod(stride[axis] for stride in cfg.strides)  # image voxels per latent voxel
        voxels, step = 0, 1
        for level, stride in enumerate(cfg.strides):
            step *= stride[axis]
            blocks = max(cfg.blocks[level], cfg.decoding_blocks[level])
            convolutions = 2 * blocks + (level in (0, len(cfg.strides) - 1)) + (len(cfg.strides) == 1)
            voxels += step * convolutions
        reach.append(math.ceil(voxels / scale) + 1)
    return reach[0], reach[1], reach[2]


def tile_bytes(cfg: Wavelet3D, size: Size3, tile: Size3, number: int) -> int:
    """What encoding or decoding a tile takes at most, halo included, of a volume of `size`, in numbers of `number` bytes.

    A residual block holds four volumes of its level, a Haar step's bands are as much as one more; the tile itself is in float32.
    """
    volumes = 4 if cfg.strided else 5
    cells, most = 1, 0.0  # numbers per voxel of the level that has most
    for stride, width in zip(cfg.strides, cfg.widths, strict=True):
        cells *= math.prod(stride)
        most = max(most, width / cells)
    sides = zip(size, tile, halo(cfg), cfg.grid, strict=True)
    voxels = math.prod(min(whole, kept + 2 * reach * step) for whole, kept, reach, step in sides)
    return round(voxels * (volumes * most * number + 2 * 4))
