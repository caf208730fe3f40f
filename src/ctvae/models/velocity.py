"""The velocity of the flow prior: the Wiener filter's, corrected by a U-Net for spatial latents or an MLP for vectors.

Shapes:  B batch   C latent channels   d h w latent voxels   E embedding   K conditions

The networks are told the time t [B] and the conditions c [B K] (standardised; NaN marks one that is withheld), the U-Net
through a scale, a shift and a gate on each block (Peebles and Xie 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar
from ctvae.models.blocks import ChannelNorm, Conv
from ctvae.wiener import WienerVelocity

EMBEDDING = 256
FOLD = (2, 2, 2)


class Embedding(nn.Module):
    """Time and conditions -> [B E]."""

    def __init__(self, conditions: int):
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(torch.linspace(0, math.log(1000.0), 64)), persistent=False)
        self.time = nn.Sequential(nn.Linear(128, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.condition = nn.Sequential(nn.Linear(2 * conditions, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))

    def forward(self, t: Tensor, c: Tensor) -> Tensor:  # [B], [B K]
        phase = t[:, None] * self.frequencies  # [B 64]
        given = (~c.isnan()).to(c.dtype)
        values = torch.cat((c.nan_to_num(0.0), given), dim=1)  # [B 2K]
        return self.time(torch.cat((phase.cos(), phase.sin()), dim=1)) + self.condition(values)


class Block(nn.Module):
    """norm, scale and shift, conv, act, conv, gate, added to the input; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = Conv(channels, channels, kernel_size=3, padding=1)
        self.conv2 = Conv(channels, channels, kernel_size=3, padding=1)
        self.modulation = nn.Linear(EMBEDDING, 3 * channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # [B C d h w], [B E]
        scale, shift, gate = self.modulation(F.silu(e))[..., None, None, None].chunk(3, dim=1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.conv2(F.silu(self.conv1(y)))


class Attention(nn.Module):
    """Self-attention among all voxels of a coarse grid, added to the input; starts as the identity."""

    def __init__(self, channels: int, head: int = 32):
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B C d h w]
        tokens = self.norm(x).flatten(2).mT  # [B N C]
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B heads N c]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B N C]
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Blocks at one resolution, with attention after them where the grid is small."""

    def __init__(self, channels: int, blocks: int, attend: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels) for _ in range(blocks))
        self.attention = Attention(channels) if attend else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, e)
        return x if self.attention is None else self.attention(x)


class Velocity(nn.Module):
    """velocity(x_t, t, c) = Wiener(x_t, t) + correction(x_t, Wiener's guess of x_1, t, c) + detail(x_t, their guess, t, c).

    Both start at zero, so an untrained network is the fitted Gaussian prior. No preconditioning is needed: given x_t the
    velocity's variance lies between the data's and 1 along every direction (`wiener.py`).
    """

    def __init__(self, correction: nn.Module, wiener: WienerVelocity, detail: nn.Module | None = None):
        super().__init__()
        self.correction, self.detail = correction, detail
        self.mean, self.factors, self.rest = (nn.Buffer(tensor.clone()) for tensor in wiener.tensors().values())

    def linear(self, x: Tensor, t: Tensor) -> Tensor:  # [B C ...], [B]
        """The filter's velocity alone."""
        with torch.autocast(x.device.type, enabled=False):
            return WienerVelocity(self.mean, self.factors, self.rest)(x.float(), t)

    def coarse(self, x: Tensor, t: Tensor, c: Tensor, linear: Tensor | None = None) -> Tensor:  # [B C ...], [B], [B K]
        """Without the detail. `linear`: the filter's velocity, where it is known."""
        return corrected(self.linear(x, t) if linear is None else linear, self.correction, x, t, c)

    def detailed(self, coarse: Tensor, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """With the detail that goes with it."""
        return coarse if self.detail is None else corrected(coarse, self.detail, x, t, c)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:  # [B C ...], [B], [B K]
        return self.detailed(self.coarse(x, t, c), x, t, c)


def corrected(velocity: Tensor, correction: nn.Module, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """`velocity` at x_t plus what `correction` says of it, given x_t and the guess of x_1 that it makes."""
    guess = x + (1 - t.view(-1, *[1] * (x.ndim - 1))) * velocity
    return velocity + correction(torch.cat((x, guess), dim=1), t, c).float()


class UNet(nn.Module):
    """Sees where each voxel lies and, below the finest grid, all voxels at once.

    With `fold` its finest grid is half as fine as the latents', whose 2x2x2 neighbours are then channels of one voxel.
    """

    def __init__(self, channels: int, conditions: int, widths: tuple[int, ...], blocks: int, fold: bool = False):
        super().__init__()
        self.fold = fold
        channels *= haar.bands(FOLD) if fold else 1
        self.embedding = Embedding(conditions)
        self.entry = Conv(2 * channels + 3, widths[0], kernel_size=3, padding=1)
        pairs = list(pairwise(widths))
        attends = [level > 0 for level in range(len(widths))]
        self.down = nn.ModuleList(Level(w, blocks, a) for w, a in zip(widths, attends, strict=True))
        self.widen = nn.ModuleList(nn.Conv3d(fine, coarse, kernel_size=1) for fine, coarse in pairs)
        self.merge = nn.ModuleList(nn.Conv3d(fine + coarse, fine, kernel_size=1) for fine, coarse in pairs)
        self.up = nn.ModuleList(Level(w, blocks, a) for w, a in zip(widths[:-1], attends[:-1], strict=True))
        self.norm = ChannelNorm(widths[0])
        self.out = Conv(widths[0], channels, kernel_size=3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:  # [B 2C d h w], [B], [B K]
        return unfolded(self.at_its_grid(folded(x), t, c), x.shape[2:]) if self.fold else self.at_its_grid(x, t, c)

    def at_its_grid(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:  # [B 2C d h w], [B], [B K]
        e = self.embedding(t, c)
        x = self.down[0](self.entry(torch.cat((x, coordinates(x)), dim=1)), e)
        skips = []
        for widen, level in zip(self.widen, self.down[1:], strict=True):
            skips.append(x)
            x = level(widen(halved(x)), e)
        for merge, level in zip(reversed(self.merge), reversed(self.up), strict=True):
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = level(merge(torch.cat((skip, x), dim=1)), e)
        return self.out(F.silu(self.norm(x)))  # [B C d h w]


class Detail(nn.Module):
    """Convolutions on the latents' own grid, for what a U-Net that folds it leaves: how close neighbours go together.

    Each voxel sees 2 blocks + 2 voxels to every side and not where it lies, so all places of all scans teach the same weights.
    """

    def __init__(self, channels: int, conditions: int, width: int, blocks: int):
        super().__init__()
        self.embedding = Embedding(conditions)
        self.entry = Conv(2 * channels, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = ChannelNorm(width)
        self.out = Conv(width, channels, kernel_size=3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:  # [B 2C d h w], [B], [B K]
        e = self.embedding(t, c)
        x = self.entry(x)
        for block in self.blocks:
            x = block(x, e)
        return self.out(F.silu(self.norm(x)))  # [B C d h w]


class VectorNet(nn.Module):
    """A residual MLP, for vector latents."""

    def __init__(self, size: int, conditions: int, width: int, blocks: int):
        super().__init__()
        self.embedding = Embedding(conditions)
        self.entry = nn.Linear(2 * size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(ChannelNorm(2 * width), nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.told = nn.Linear(EMBEDDING, width)
        self.out = nn.Linear(width, size)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:  # [B 2C], [B], [B K]
        e = self.told(F.silu(self.embedding(t, c)))
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(torch.cat((x, e), dim=1))
        return self.out(x)


def folded(x: Tensor) -> Tensor:
    """Orthonormal Haar bands of 2x2x2 neighbours: [B C d h w] -> [B 8C ceil(d/2) ceil(h/2) ceil(w/2)], edges repeated."""
    d, h, w = (size % 2 for size in x.shape[2:])
    return haar.forward(F.pad(x, (0, w, 0, h, 0, d), mode="replicate"), FOLD) * math.sqrt(haar.bands(FOLD))


def unfolded(y: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `folded`, to d h w = `size`."""
    d, h, w = size
    return haar.inverse(y / math.sqrt(haar.bands(FOLD)), FOLD)[:, :, :d, :h, :w]


def halved(x: Tensor) -> Tensor:
    """Means of 2x2x2 blocks; an axis of one voxel stays."""
    steps = [min(2, size) for size in x.shape[2:]]
    return F.avg_pool3d(x, steps, ceil_mode=True, count_include_pad=False)


def coordinates(x: Tensor) -> Tensor:
    """Position of each voxel along d, h, w from -1 to 1: [B 3 d h w]."""
    axes = [torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, -1, -1, -1)
