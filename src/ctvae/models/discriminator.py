"""A patch discriminator of volumes: is the neighbourhood of each place real or decoded?

Shapes:  B batch   D H W voxels   C channels

It sees a volume twice, as it is and in the soft tissue window, in which organs differ by a twentieth of the whole range, by a
network each: one that saw both would look at whichever is easier to tell, and the decoder would hear of nothing else. Like the
autoencoder they look at Haar bands, where texture and edges are channels of their own, at an eighth of the cost of voxels; each
band is standardised over the real patches seen so far, or those of fine texture, a hundredth of the others in size, would count
for nothing. The features serve as the perceptual loss, so nothing has to be downloaded (Larsen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import haar
from ctvae.models.blocks import Conv

VIEWS, BANDS = 2, 8
DECAY = 0.999
LEAST_SPREAD = 1e-3
STEP = 0.1  # spreads, of a finite difference


class View(nn.Module):
    """Of a volume's bands [B 8 2d 2h 2w]: logits [B 1 d h w], each seeing about 30 voxels along an axis, and all features."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Conv(BANDS, width, kernel_size=3, padding=1),
                Conv(8 * width, 2 * width, kernel_size=1),  # after a second Haar step
                Conv(2 * width, 2 * width, kernel_size=3, padding=1),
                Conv(2 * width, 2 * width, kernel_size=3, padding=1),
            ]
        )
        self.out = nn.Conv3d(2 * width, 1, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for number, layer in enumerate(self.layers):
            if number == 1:
                x = haar.forward(x)  # halves D, H, W
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.out(x), features


class PatchDiscriminator(nn.Module):
    """Logits [B 2 d h w] at a quarter of the resolution: of the whole range, and of soft tissue."""

    seen: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, width: int, soft: tuple[float, float]):
        """`soft`: the soft tissue window in -1..1, where there is any of it."""
        super().__init__()
        self.soft = soft if soft[0] < soft[1] else (-1.0, 1.0)
        self.seen = nn.Buffer(torch.zeros(()))
        both = VIEWS * BANDS
        self.mean, self.square = nn.Buffer(torch.zeros(both)), nn.Buffer(torch.ones(both))  # of the real bands
        self.views = nn.ModuleList(View(width) for _ in range(VIEWS))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:  # [B 1 D H W]
        """Logits (high: real) and the features of every layer of each view, fine to coarse."""
        return self._judged(self._standard(self._bands(x)))

    def steepness(self, x: Tensor, noise: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at x [B 1 D H W], and their mean squared slope along all bands, from a step of standard normal `noise`.

        A finite difference stands for the gradient's square (Lin et al. 2025), which needs no second backward pass.
        """
        bands = self._standard(self._bands(x))
        before, after = (self._judged(b)[0].float() for b in (bands, bands + STEP * noise(tuple(bands.shape)).to(bands)))
        return before, ((after - before) / STEP).square().mean()

    def _judged(self, bands: Tensor) -> tuple[Tensor, list[Tensor]]:
        judged = [view(bands[:, number::VIEWS]) for number, view in enumerate(self.views)]
        return torch.cat([logits for logits, _ in judged], dim=1), [one for _, features in judged for one in features]

    @torch.no_grad()
    def observe(self, real: Tensor, average: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Takes real patches [B 1 D H W] into the means that bands are standardised by. `average` is over processes."""
        bands = self._bands(real).float()
        weight = (1 / (1 + self.seen)).clamp_min(1 - DECAY)
        self.mean.lerp_(average(bands.mean((0, 2, 3, 4))), weight)
        self.square.lerp_(average(bands.square().mean((0, 2, 3, 4))), weight)
        self.seen += 1

    def _bands(self, x: Tensor) -> Tensor:
        """Both views' bands: [B 1 D H W] -> [B 16 D/2 H/2 W/2]."""
        low, high = self.soft
        x = x.clamp(-1, 1)  # as a file would hold it: no real scan has values beyond, and nothing else would be looked at
        x = torch.cat((x, 2 * (x.clamp(low, high) - low) / (high - low) - 1), dim=1)
        short = [-size % 4 for size in x.shape[2:]]  # of a size that two Haar steps take
        if any(short):
            x = F.pad(x, (0, short[2], 0, short[1], 0, short[0]), mode="replicate")
        return haar.forward(x)

    def _standard(self, bands: Tensor) -> Tensor:
        spread = (self.square - self.mean.square()).clamp_min(0).sqrt().clamp_min(LEAST_SPREAD)
        return (bands - self.mean.view(-1, 1, 1, 1)) / spread.view(-1, 1, 1, 1)
