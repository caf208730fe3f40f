"""Latents drawn from a run's own flow, once, so that the decoder can be trained on what it will be given.

    run/drawn/of.json                  by which weights
    run/drawn/00000017.safetensors     sample 17: its latent [Z d h w] in float16, and which latent voxels hold body [d h w]

Shapes:  B batch   Z latent channels   d h w latent voxels
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ctvae import files
from ctvae.checkpoint import load, save
from ctvae.config import Config, Size3
from ctvae.device import batch_indices, generator
from ctvae.model import Model
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.training.groups import ANYWHERE, BODY_HU

SEED = 2**31 - 1  # nobody's: no sample that a user draws is among them


class DrawnLatents:
    def __init__(self, folder: Path, cfg: Config, grid: Size3, ranks: Ranks = ALONE):
        self.folder, self.cfg, self.grid, self.ranks = folder, cfg, grid, ranks

    def draw(self, model: Model) -> None:
        """`finish.drawn` samples of the flow; each process draws its share. What is there already is kept."""
        of = [model.hash, model.prior_hash("flow")]
        if self.ranks.first and self._of() != of:
            shutil.rmtree(self.folder, ignore_errors=True)
            files.write_json(self.folder / "of.json", of)
        self.ranks.barrier()
        mine = range(self.ranks.rank, self.cfg.finish.drawn, self.ranks.world)
        with Progress("drawing", total=len(mine)) as bar:
            for done, index in enumerate(mine, start=1):
                if not self._path(index).exists():
                    latent = model.draw("flow", SEED, index).latent  # [1 Z d h w]
                    body = torch.from_numpy(model.decode(latent) > BODY_HU)[None, None]
                    cells = F.max_pool3d(body.float(), self.grid)[0, 0] > 0  # [d h w]
                    # A file of its own for each process, so it writes here what else the first one would.
                    save(self._path(index), {"latent": latent[0].half(), "body": cells}, {})
                bar.update(done)
        self.ranks.barrier()

    def batch(self, batch: int, patch: Size3, seed: int, step: int) -> Tensor:
        """This process's rows of step `step`: crops of samples, `patch` voxels large, nine in ten about a body: [B Z d h w]."""
        random = generator(seed, step, stream=41)
        seeds = [int(torch.randint(2**31, (), generator=random)) for _ in range(batch)]
        indices = batch_indices(self.cfg.finish.drawn, batch, seed, step)
        mine = range(batch)[self.ranks.rows(batch)]
        return torch.stack([self._crop(indices[row], patch, generator(seeds[row], 0)) for row in mine])

    def clear(self) -> None:
        if self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _crop(self, index: int, patch: Size3, random: torch.Generator) -> Tensor:
        tensors, _ = load(self._path(index))
        latent, places = tensors["latent"].float(), tensors["body"].nonzero()  # [n 3]
        if not len(places) or torch.rand((), generator=random) < ANYWHERE:
            places = torch.tensor([[int(torch.randint(size, (), generator=random)) for size in latent.shape[1:]]])
        centre = places[int(torch.randint(len(places), (), generator=random))].tolist()
        for axis, (voxels, step, place) in enumerate(zip(patch, self.grid, centre, strict=True), start=1):
            size = min(latent.shape[axis], math.ceil(voxels / step))
            start = place - int(torch.randint(size, (), generator=random))
            latent = latent.narrow(axis, min(max(0, start), latent.shape[axis] - size), size)
        return latent

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def _of(self) -> list[str] | None:
        try:
            return files.read_json(self.folder / "of.json")
        except (OSError, ValueError):
            return None
