"""The detail that a decoder leaves out, drawn as it is distributed given what the decoder drew.

A latent number stands for many voxels, so many volumes share a latent, and a decoder draws something between them all: a blur.
What it leaves out is taken for random here, and its distribution is learned in two steps, both on Haar bands:

    x      the volume,  y = decode(z)  what the decoder makes of its latent
    r      = haar(x) - haar(y)
    m, s   guessed from y, per band and place: r's mean and standard deviation     (Nix and Weigend 1994)
    u      = (r - m) / s, which has unit variance everywhere, in bone as in soft tissue and in air
    u      ~ a rectified flow given y, from N(0, I)                                (flow.py)

The flow's velocity is that between two standard Gaussians, in closed form, plus a correction that starts at zero: untrained, the
flow draws independent u, whose strength is right at every place; what is left to learn is how they hang together. All layers
are convolutions and per-voxel operations, so a tile with its halo gives what the whole would.

Shapes:  B batch   D H W voxels   d h w = D/2 H/2 W/2   b = 8 bands   C channels   E embedding
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar
from ctvae.config import Detail
from ctvae.models.blocks import ChannelNorm, Conv
from ctvae.models.velocity import EMBEDDING, halved

BANDS = 8
FIRST_LOG_STD = math.log(0.05)
LOG_STD = (-7.0, 0.5)  # from 1 to 1,600 HU in a window of 2,000


class DetailNetwork(nn.Module):
    def __init__(self, cfg: Detail):
        super().__init__()
        self.guess = Trunk(BANDS, 2 * BANDS, cfg.guess_widths, timed=False)
        self.correction = Trunk(4 * BANDS, BANDS, cfg.widths, timed=True)

    def condition(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder drew [B 1 D H W] -> its bands; mean and log spread of what is missing: [B b d h w] each."""
        bands = haar.forward(y)
        mean, log_std = self.guess(bands).float().chunk(2, dim=1)
        return bands, mean * math.exp(FIRST_LOG_STD), (log_std + FIRST_LOG_STD).clamp(*LOG_STD)

    def velocity(self, u: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """Of the flow at u [B b d h w] and t [B], given `told` [B 3b d h w], which `told` makes."""
        tb = t.view(-1, 1, 1, 1, 1)
        linear = (2 * tb - 1) / ((1 - tb).square() + tb.square()) * u
        return linear + self.correction(torch.cat((u, told), dim=1), t).float()


def told(bands: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """What the flow is told of a place, in numbers of about one: [B 3b d h w]."""
    return torch.cat((2 * bands, mean * torch.exp(-log_std), (log_std - FIRST_LOG_STD) / 2), dim=1)


class Trunk(nn.Module):
    """A U-Net over Haar bands; told the time t [B] if it is `timed`. Its output starts at zero."""

    def __init__(self, c_in: int, c_out: int, widths: tuple[int, ...], timed: bool):
        super().__init__()
        pairs = list(pairwise(widths))
        self.time = Time() if timed else None
        self.entry = Conv(c_in, widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList(Block(width, timed) for width in widths)
        self.deep = Block(widths[-1], timed)
        self.widen = nn.ModuleList(nn.Conv3d(fine, coarse, kernel_size=1) for fine, coarse in pairs)
        self.merge = nn.ModuleList(nn.Conv3d(fine + coarse, fine, kernel_size=1) for fine, coarse in pairs)
        self.up = nn.ModuleList(Block(width, timed) for width in widths[:-1])
        self.norm = ChannelNorm(widths[0])
        self.out = Conv(widths[0], c_out, kernel_size=3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:  # [B c_in d h w]
        e = None if self.time is None or t is None else self.time(t)  # [B E]
        x = self.down[0](self.entry(x), e)
        skips = []
        for widen, block in zip(self.widen, self.down[1:], strict=True):
            skips.append(x)
            x = block(widen(halved(x)), e)
        x = self.deep(x, e)
        for merge, block in zip(reversed(self.merge), reversed(self.up), strict=True):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = block(merge(torch.cat((skip, x), dim=1)), e)
        return self.out(F.silu(self.norm(x)))  # [B c_out d h w]


class Block(nn.Module):
    """norm, conv, shift by the time, act, conv, added to the input; starts as the identity."""

    def __init__(self, channels: int, timed: bool):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = Conv(channels, channels, kernel_size=3, padding=1)
        self.conv2 = Conv(channels, channels, kernel_size=3, padding=1)
        self.shift = nn.Linear(EMBEDDING, channels) if timed else None
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, e: Tensor | None) -> Tensor:  # [B C d h w], [B E]
        y = self.conv1(self.norm(x))
        if self.shift is not None and e is not None:
            y = y + self.shift(e)[..., None, None, None]
        return x + self.conv2(F.silu(y))


class Time(nn.Module):
    """t [B] -> [B E]"""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(torch.linspace(0, math.log(300.0), EMBEDDING // 4)), persistent=False)
        self.layers = nn.Sequential(nn.Linear(EMBEDDING // 2, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies
        return self.layers(torch.cat((phase.cos(), phase.sin()), dim=1))
