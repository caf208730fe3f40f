"""Latents drawn from a run's own flow, once, so that the decoder can be trained on what it will be given.

    run/drawn/of.json                  by which weights, and how many there are once all are drawn
    run/drawn/00000017.safetensors     sample 17: its latent [Z d h w], and the body's share of each latent voxel [d h w]; float16

Shapes:  B batch   Z latent channels   d h w latent voxels
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ctvae import files
from ctvae.checkpoint import write
from ctvae.config import Config
from ctvae.device import batch_indices, generator
from ctvae.model import Model
from ctvae.networks import Size3
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.training.groups import ANYWHERE, BODY_HU

FEWEST = 8  # samples, however little time there is
SEED = 2**31 - 1  # nobody's: no sample that a user draws is among them


class DrawnLatents:
    def __init__(self, folder: Path, cfg: Config, grid: Size3, ranks: Ranks = ALONE):
        self.folder, self.cfg, self.grid, self.ranks = folder, cfg, grid, ranks
        self.count = 0

    def draw(self, model: Model, most_seconds: float = math.inf) -> None:
        """`finish.drawn` samples of the flow, or as many as there is time for. What is there already is kept."""
        of = [model.hash, model.prior_hash("flow")]
        if self.ranks.told(lambda: self._told().get("of") != of):
            if self.ranks.first:
                shutil.rmtree(self.folder, ignore_errors=True)
                files.write_json(self.folder / "of.json", {"of": of})
            self.ranks.barrier()
        self.count = self.ranks.told(lambda: self._told().get("count", 0))
        if not self.count:
            self._draw_each(model, time.monotonic() + most_seconds)
            if self.ranks.first:
                files.write_json(self.folder / "of.json", {"of": of, "count": self.count})

    def _draw_each(self, model: Model, end: float) -> None:
        """One after the other on the first process's word; of several processes each draws one of every `world`."""
        most, world = self.cfg.finish.drawn, self.ranks.world
        with Progress("drawing", total=most) as bar:
            while self.count < most and self.ranks.told(lambda: self.count < FEWEST or time.monotonic() < end):
                index = self.count + self.ranks.rank
                if index < most and not self._path(index).exists():
                    self._draw_one(model, index)
                self.ranks.barrier()
                self.count = min(most, self.count + world)
                bar.update(self.count)

    def _draw_one(self, model: Model, index: int) -> None:
        latent = model.draw("flow", SEED, index).latent  # [1 Z d h w]
        body = torch.from_numpy(model.decode(latent) > BODY_HU)[None, None]
        share = F.avg_pool3d(body.float(), self.grid)[0, 0].half()  # [d h w]
        write(self._path(index), {"latent": latent[0].half().contiguous(), "body": share.contiguous()})  # each process its own

    def batch(self, batch: int, patch: Size3, seed: int, step: int) -> Tensor:
        """This process's rows of step `step`: crops of samples, `patch` voxels large, nine in ten about a voxel of a body, like
        `TrainingGroups._patch`: [B Z d h w]."""
        random = generator(seed, step, stream=41)
        seeds = [int(torch.randint(2**31, (), generator=random)) for _ in range(batch)]
        indices = batch_indices(self.count, batch, seed, step)
        mine = range(batch)[self.ranks.rows(batch)]
        return torch.stack([self._crop(indices[row], patch, generator(seeds[row], 0)) for row in mine])

    def clear(self) -> None:
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _crop(self, index: int, patch: Size3, random: torch.Generator) -> Tensor:
        tensors = load_file(self._path(index))
        latent, share = tensors["latent"].float(), tensors["body"].float()
        if not share.any() or torch.rand((), generator=random) < ANYWHERE:
            share = torch.ones_like(share)
        cell = int(torch.multinomial(share.flatten(), 1, generator=random))
        centre = [int(place) for place in torch.unravel_index(torch.tensor(cell), share.shape)]
        for axis, (voxels, step, place) in enumerate(zip(patch, self.grid, centre, strict=True), start=1):
            size = min(latent.shape[axis], math.ceil(voxels / step))
            start = place - int(torch.randint(size, (), generator=random))
            latent = latent.narrow(axis, min(max(0, start), latent.shape[axis] - size), size)
        return latent

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def _told(self) -> dict[str, Any]:
        try:
            told = files.read_json(self.folder / "of.json")
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}
