"""Training groups as network input: fitted to one shape, shifted a little, in -1..1. A function of (seed, step) alone.

Shapes:  B batch   D H W voxels
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctvae import intensity
from ctvae.config import Config, Data, Size3
from ctvae.dataset import Dataset, Group
from ctvae.device import batch_indices, generator
from ctvae.errors import InputError
from ctvae.volume import Volume, block_affine

CONDITIONS = ("position", "pixel_mm", "slice_mm")


def training_shape(dataset: Dataset, cfg: Config) -> Size3:
    """D H W of the network's groups: what the settings say, else the dataset's largest group on the model's grid.

    Raises ConfigError-like InputError where the dataset has no training groups.
    """
    groups = dataset.groups("train")
    if not groups:
        raise InputError(f"{dataset.folder}: no training groups; prepare more scans")
    largest = cfg.data.shape or tuple(max(sizes) for sizes in zip(*(g.shape for g in groups), strict=True))
    return intensity.multiple_above(largest, latent_grid(cfg))


def latent_grid(cfg: Config) -> Size3:
    """The model's grid, twice as coarse for spatial latents, whose prior splits them once more."""
    d, h, w = cfg.model.grid
    return (2 * d, 2 * h, 2 * w) if cfg.model.kind == "wavelet3d" else (d, h, w)


def conditions(group: Group) -> list[float]:
    """What the prior may be told about a group, in the order of CONDITIONS."""
    x_mm, _, z_mm = group.spacing_mm
    return [group.position, x_mm, z_mm]


class TrainingGroups:
    """Batches [B 1 D H W] of a split, by step."""

    def __init__(self, dataset: Dataset, groups: list[Group], data: Data, shape: Size3):
        self.dataset, self.groups, self.data, self.shape = dataset, groups, data, shape

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, batch: int, seed: int, step: int) -> Tensor:
        random = generator(seed, step, stream=1)
        volumes = [self.augmented(index, random) for index in batch_indices(len(self), batch, seed, step)]
        return torch.stack([self._patch(volume, random) for volume in volumes])

    def augmented(self, index: int, random: torch.Generator) -> Tensor:
        """Group `index`, shifted at random and with the settings' noise: [1 D H W]."""
        limits = self.data.max_shift_voxels
        shift = [int(torch.randint(-most, most + 1, (), generator=random)) for most in limits]
        x = self._load(index, (shift[0], shift[1], shift[2]))
        if self.data.noise_hu:
            low, high = self.data.window_hu
            x = x + torch.randn(x.shape, generator=random) * (2 * self.data.noise_hu / (high - low))
        return x.clamp(-1, 1)

    def plain(self, index: int) -> Tensor:
        """Group `index` as it is: [1 D H W]."""
        return self._load(index, (0, 0, 0))

    def as_volume(self, index: int, x: Tensor) -> Volume:
        """A network-sized array [D H W] in -1..1 as HU, with the place and spacing of group `index`."""
        group = self.groups[index]
        offset = intensity.offset_of_fit(group.shape, self.shape)
        hu = intensity.to_hu(x.float().cpu().numpy(), self.data.window_hu)
        return Volume(hu, block_affine(group.affine, offset))

    def _load(self, index: int, shift: Size3) -> Tensor:
        hu = np.asarray(self.dataset.hu(self.groups[index]))
        fitted = intensity.fit_to_shape(hu, self.shape, shift)
        return torch.from_numpy(intensity.from_hu(fitted, self.data.window_hu))[None]

    def _patch(self, volume: Tensor, random: torch.Generator) -> Tensor:
        if self.data.patch is None:
            return volume
        for axis, size in enumerate(self.data.patch, start=1):
            room = max(0, volume.shape[axis] - size)
            start = int(torch.randint(0, room + 1, (), generator=random))
            volume = volume.narrow(axis, start, min(size, volume.shape[axis]))
        return volume
