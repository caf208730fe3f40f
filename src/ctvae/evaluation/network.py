"""The third feature space: a small 3D network trained on real CT, without labels, that ships with the package.

Shapes:  B batch   D H W voxels of 5 mm   C channels   F = 64 features

`features.safetensors` holds its weights; `features.md` beside it says on which scans and how it was trained
(benchmarks/train_feature_network.py). It sees a scan at 5 mm, so it reads anatomy: fine texture is for the texture space.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ctvae.evaluation.grid import AIR_HU, Triple, body_mask, resampled

SPACING_MM: Triple = (5.0, 5.0, 5.0)
WIDTHS = (16, 32, 64, 64)
FEATURES = WIDTHS[-1]
SMALLEST = 16  # voxels of 5 mm along an axis, which the network needs; air is put behind a smaller scan
LARGEST = 160  # voxels of 5 mm along an axis; more is cut off around the middle
WEIGHTS = "features.safetensors"


class Stage(nn.Module):
    """Two convolutions, the first halving D, H and W, added to the projected input."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.down = nn.Conv3d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(c_out)
        self.conv = nn.Conv3d(c_out, c_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(c_out)
        self.skip = nn.Conv3d(c_in, c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.down(x)))
        y = self.norm2(self.conv(y))
        half = F.avg_pool3d(x, 2, ceil_mode=True, count_include_pad=False)
        return F.relu(self.skip(half) + y)


class FeatureNetwork(nn.Module):
    """A convolutional trunk, then the mean over the body: one vector per scan, however large the scan is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, WIDTHS[0], kernel_size=3, stride=2, padding=1)
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in pairwise(WIDTHS)))

    def forward(self, x: Tensor, body: Tensor) -> Tensor:
        """x [B 1 D H W] in -1..1 and the body's mask [B 1 D H W] -> [B F]"""
        trunk = self.stages(F.relu(self.stem(x)))                       # [B F D/16 H/16 W/16]
        weight = F.adaptive_avg_pool3d(body, trunk.shape[2:]) + 1e-4    # a scan without a body: the mean over all
        return (trunk * weight).sum(dim=(2, 3, 4)) / weight.sum(dim=(2, 3, 4))


def learned(hu: NDArray[np.floating], spacing_mm: Triple) -> NDArray[np.float64]:
    """The network's features of one scan [D H W] in HU and of its mirror image, left and right exchanged: [2 F]."""
    x, body = prepared(hu, spacing_mm)
    pair = torch.stack([x, x.flip(-1)])[:, None]
    with torch.inference_mode():
        return network()(pair, torch.stack([body, body.flip(-1)])[:, None]).double().numpy()


def prepared(hu: NDArray[np.floating], spacing_mm: Triple) -> tuple[Tensor, Tensor]:
    """A scan [D H W] at 5 mm, -1000..1000 HU as -1..1, and its body mask as 0 or 1, both [d h w]."""
    coarse = resampled(hu, spacing_mm, SPACING_MM)
    coarse = coarse[tuple(slice(max(0, (n - LARGEST) // 2), max(0, (n - LARGEST) // 2) + LARGEST) for n in coarse.shape)]
    body = body_mask(coarse).astype(np.float32)
    behind = [(0, max(0, SMALLEST - n)) for n in coarse.shape]
    coarse, body = np.pad(coarse, behind, constant_values=AIR_HU), np.pad(body, behind)
    return torch.from_numpy(np.clip(coarse, -1000, 1000) / 1000), torch.from_numpy(body)


@cache
def weights_digest() -> str:
    """The first digits of the weights' SHA-256: what was measured with others is measured again."""
    return hashlib.sha256(resources.files("ctvae.evaluation").joinpath(WEIGHTS).read_bytes()).hexdigest()[:16]


@cache
def network() -> FeatureNetwork:
    """The trained network that ships with the package."""
    from safetensors.torch import load

    model = FeatureNetwork()
    model.load_state_dict(load(resources.files("ctvae.evaluation").joinpath(WEIGHTS).read_bytes()))
    return model.eval()
