"""A patch discriminator of volumes: is the neighbourhood of each place real or decoded?

Shapes:  B batch   D H W voxels   C channels

It sees a volume twice, as it is and in the soft tissue window, in which organs differ by a twentieth of the whole range. Like the
autoencoder it looks at Haar bands, where texture and edges are channels of their own, at an eighth of the cost of voxels. Its features serve as the perceptual loss, so nothing has to be downloaded (Larsen et al. 2016).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar
from ctvae.models.blocks import Conv


class PatchDiscriminator(nn.Module):
    """Logits [B 1 d h w] at a quarter of the resolution, each seeing about 30 voxels along an axis."""

    def __init__(self, width: int, soft: tuple[float, float]):
        """`soft`: the soft tissue window in -1..1, where there is any of it."""
        super().__init__()
        self.soft = soft if soft[0] < soft[1] else (-1.0, 1.0)
        self.layers = nn.ModuleList(
            [
                Conv(16, width, kernel_size=3, padding=1),
                Conv(8 * width, 2 * width, kernel_size=1),  # after a second Haar step
                Conv(2 * width, 2 * width, kernel_size=3, padding=1),
                Conv(2 * width, 2 * width, kernel_size=3, padding=1),
            ]
        )
        self.out = nn.Conv3d(2 * width, 1, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # [B 1 D H W]
        """Logits (high: real) and the features of every layer, fine to coarse."""
        low, high = self.soft
        x, features = torch.cat((x, 2 * (x.clamp(low, high) - low) / (high - low) - 1), dim=1), []
        short = [-size % 4 for size in x.shape[2:]]  # of a size that two Haar steps take
        if any(short):
            x = F.pad(x, (0, short[2], 0, short[1], 0, short[0]), mode="replicate")
        for number, layer in enumerate(self.layers):
            if number < 2:
                x = haar.forward(x)  # halves D, H, W
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.out(x), features
