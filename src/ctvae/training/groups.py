"""Training groups as network input: fitted to one shape, shifted a little, in -1..1. A function of (seed, step) alone.

Shapes:  B batch   D H W voxels
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ctvae import intensity
from ctvae.conditions import Change
from ctvae.config import Config, Data
from ctvae.dataset import Dataset, Group
from ctvae.device import batch_indices, generator
from ctvae.errors import InputError
from ctvae.networks import Size3
from ctvae.ranks import ALONE, Ranks
from ctvae.volume import Volume, block_affine

BODY_HU = -300.0
ANYWHERE = 0.1  # share of patches that lie anywhere in the volume
BODY_STEP = 4  # voxels between the places where a patch may be centred


def training_shape(dataset: Dataset, cfg: Config) -> Size3:
    """D H W of the network's groups: what the settings say, else the dataset's largest group on the model's grid.

    Raises ConfigError-like InputError where the dataset has no training groups.
    """
    groups = dataset.groups("train")
    if not groups:
        raise InputError(f"{dataset.folder}: no training groups; prepare more scans")
    largest = cfg.data.shape or tuple(max(sizes) for sizes in zip(*(g.shape for g in groups), strict=True))
    return intensity.multiple_above(largest, cfg.model.grid)


class TrainingGroups:
    """Batches [B 1 D H W] of a split, by step; of several processes each gets its rows of them."""

    def __init__(self, dataset: Dataset, groups: list[Group], data: Data, shape: Size3, ranks: Ranks = ALONE):
        self.dataset, self.groups, self.data, self.shape, self.ranks = dataset, groups, data, shape, ranks
        low, high = data.window_hu
        self.body = 2 * (BODY_HU - low) / (high - low) - 1  # BODY_HU in -1..1

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, batch: int, seed: int, step: int) -> Tensor:
        """This process's rows. For the others' no group is read, but all is drawn that would be."""
        random = generator(seed, step, stream=1)
        mine = range(batch)[self.ranks.rows(batch)]
        indices = batch_indices(len(self), batch, seed, step)
        volumes = [self.augmented(index, random, row in mine) for row, index in enumerate(indices)]
        patches = [self._patch(volume, random) for volume in volumes]
        return torch.stack([patches[row] for row in mine])

    def augmented(self, index: int, random: torch.Generator, wanted: bool = True) -> Tensor:
        """Group `index`, shifted at random and with the settings' noise: [1 D H W]. One voxel if it is not `wanted`."""
        return self._changed(index, self._any_shift(random), random, wanted)

    def _any_shift(self, random: torch.Generator) -> Size3:
        d, h, w = (int(torch.randint(-most, most + 1, (), generator=random)) for most in self.data.max_shift_voxels)
        return d, h, w

    def _changed(self, index: int, shift: Size3, random: torch.Generator, wanted: bool = True) -> Tensor:
        noise = torch.randn((1, *self.shape), generator=random) if self.data.noise_hu else None
        if not wanted:
            return torch.ones(1, 1, 1, 1)
        x = self._load(index, shift)
        if noise is not None:
            low, high = self.data.window_hu
            x = x + noise * (2 * self.data.noise_hu / (high - low))
        return x.clamp(-1, 1)

    def turned(
        self, index: int, random: torch.Generator, max_degrees: float, max_zoom: float, mirror: float = 0.0
    ) -> tuple[Tensor, Change]:
        """Group `index` shifted at random, then turned and zoomed in plane, `mirror` of them left for right: [1 D H W], and what
        was done.

        Patients lie like that, and a zoomed one is a smaller or larger one: no slice is mixed with another, none is missing.
        """
        degrees = max_degrees * (2 * torch.rand((), generator=random).item() - 1)
        zoom = (1 + max_zoom) ** (2 * torch.rand((), generator=random).item() - 1)
        d, h, w = self._any_shift(random)  # of the frame: the body moves the other way
        x = in_plane(self._changed(index, (d, h, w), random), degrees, zoom)
        mirrored = bool(mirror) and torch.rand((), generator=random).item() < mirror
        return x.flip(3) if mirrored else x, Change(degrees, zoom, -d, -h, -w, mirrored)

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
        """A crop of `data.patch`, nine times in ten about a voxel of the body: air is quickly learned, but not for good."""
        if self.data.patch is None:
            return volume
        body = (volume[0, ::BODY_STEP, ::BODY_STEP, ::BODY_STEP] > self.body).nonzero() * BODY_STEP  # [n 3]
        if not len(body) or torch.rand((), generator=random) < ANYWHERE:
            body = torch.tensor([[int(torch.randint(size, (), generator=random)) for size in volume.shape[1:]]])
        centre = body[int(torch.randint(len(body), (), generator=random))].tolist()
        for axis, (size, place) in enumerate(zip(self.data.patch, centre, strict=True), start=1):
            start = place - int(torch.randint(size, (), generator=random))  # the voxel lies anywhere in the patch
            room = max(0, volume.shape[axis] - size)
            volume = volume.narrow(axis, min(max(0, start), room), min(size, volume.shape[axis]))
        return volume


def in_plane(x: Tensor, degrees: float, zoom: float) -> Tensor:
    """Every slice of x [1 D H W] in -1..1 turned about its centre (from W towards H) and magnified; air comes in at the edges.

    By cubic splines (Unser 1999), which keep the power of detail. Straight lines between neighbours blur, and a prior that is
    told of each turn still takes what is blurred near no turn for what scans look like without one (docs/decisions/0013).
    """
    from scipy import ndimage

    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    source = np.array([[cos, -sin], [sin, cos]])  # of a voxel's row and column, from the middle
    middle = (np.array(x.shape[2:]) - 1) / 2
    offset = middle - source @ middle
    slices = [ndimage.affine_transform(part, source, offset, order=3, mode="grid-constant", cval=-1.0) for part in x[0].numpy()]
    return torch.from_numpy(np.stack(slices))[None].clamp(-1, 1)
