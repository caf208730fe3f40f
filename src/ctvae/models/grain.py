"""Noise beside the latents: what latents do not tell, a decoder otherwise has to make up from them.

At sixteen voxels a number, latents hold anatomy, not the noise of a scan. A decoder that is held to scans' texture all the same
draws it from what it is given, and patterns repeat: a lattice, stipples along outlines. So before each residual block a number
per voxel that is nobody's is added to its features, as much as the features say (Karras et al. 2019, section 3.2, there with one
strength for all places).

The numbers are a hash of the latents that lie there: the same latents give the same volume on any machine, a tile gets what the
whole gets, and whoever wants other noise changes latents by as little as they can hold.

Shapes:  B batch   C channels   D H W voxels of a level   Z latent channels   d h w latent voxels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctvae.config import Size3
from ctvae.models.blocks import ChannelNorm

BITS = 32
MASK = 2**BITS - 1
ODD = 0x45D9F3B  # below 2^27: products of it and 32 bits stay below 2^63


class Grain(nn.Module):
    """x + white * amount(x); begins as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.amount = nn.Conv3d(channels, channels, kernel_size=1)
        for parameter in self.amount.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, white: Tensor) -> Tensor:  # [B C D H W], [B 1 D H W]
        return x + white.to(x.dtype) * self.amount(self.norm(x))


def white(z: Tensor, number: int, step: Size3) -> Tensor:
    """Field `number` of latents z [B Z d h w], `step` voxels to each of them: [B 1 D H W], uniform with mean 0 and variance 1.

    Each voxel's number is its own where latents are: the same latents have the same ones.
    """
    key = torch.zeros_like(z[:, 0], dtype=torch.int64)  # [B d h w]
    for channel in z.detach().float().add(0.0).view(torch.int32).long().unbind(1):  # -0 is 0
        key = _mixed(key ^ (channel & MASK))
    sd, sh, sw = step
    place = torch.arange(math.prod(step), device=z.device).view(sd, 1, sh, 1, sw) + number * math.prod(step) + 1
    mixed = _mixed(key[:, :, None, :, None, :, None] ^ _mixed(place))  # [B d sd h sh w sw]
    b, d, h, w = key.shape
    return ((mixed.float() / MASK - 0.5) * math.sqrt(12)).reshape(b, 1, d * sd, h * sh, w * sw)


def _mixed(x: Tensor) -> Tensor:
    """Each of the 32 bits of the result hangs on all of x's: int64 that hold 32 bits."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * ODD) & MASK
    return x ^ (x >> 16)
