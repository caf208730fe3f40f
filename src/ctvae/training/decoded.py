"""Training groups beside what the decoder makes of their latents, computed once and kept in the run folder while it is needed.

    run/decoded/of.json          by which weights
    run/decoded/00000017.npy     group 17 decoded from a sample of its posterior, [D H W] in about -1..1, float16

Patches of both begin on the latent grid, as the whole decoder's output does where a model is used.

Shapes:  B batch   D H W voxels
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctvae import files
from ctvae.config import Config
from ctvae.device import batch_indices, generator
from ctvae.models.autoencoder import Autoencoder
from ctvae.progress import Progress
from ctvae.training.groups import TrainingGroups


class DecodedGroups:
    def __init__(self, groups: TrainingGroups, folder: Path, cfg: Config):
        self.groups, self.folder, self.cfg = groups, folder, cfg

    @torch.no_grad()
    def decode(self, network: Autoencoder, of: str) -> None:
        """Every group through the autoencoder with weights `of`; each process does its share. What is there already is kept."""
        ranks = self.groups.ranks
        if ranks.first and self._of() != of:
            shutil.rmtree(self.folder, ignore_errors=True)
            files.write_json(self.folder / "of.json", of)
        ranks.barrier()
        device = next(network.parameters()).device
        mine = range(ranks.rank, len(self.groups), ranks.world)
        with Progress("decoding", total=len(mine)) as bar:
            for done, index in enumerate(mine, start=1):
                if not self._path(index).exists():
                    random = generator(self.cfg.seed, index, stream=31)
                    x = self._original(index)[None].to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=self.cfg.detail.precision == "bf16"):
                        y = network.decode(noisy_sample(*network.encode(x), self.cfg.detail.latent_noise, random))
                    with files.atomic(self._path(index)) as temporary, temporary.open("wb") as file:
                        np.save(file, y[0, 0].half().cpu().numpy())
                bar.update(done)
        ranks.barrier()

    def batch(self, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of step `step`: patches of originals and of what was decoded, [B 1 D H W] each."""
        random = generator(seed, step, stream=1)
        mine = range(batch)[self.groups.ranks.rows(batch)]
        seeds = [generator(int(torch.randint(2**31, (), generator=random)), row) for row in range(batch)]
        indices = batch_indices(len(self.groups), batch, seed, step)
        pairs = torch.stack([self._patches(indices[row], seeds[row]) for row in mine])  # [B 2 D H W]
        return pairs[:, :1], pairs[:, 1:]

    def clear(self) -> None:
        if self.groups.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _patches(self, index: int, random: torch.Generator) -> Tensor:  # [2 D H W]
        decoded = torch.from_numpy(np.load(self._path(index))).float()[None]
        both = torch.cat((self._original(index), decoded))
        return self.groups.patch(both, random, self.cfg.model.grid)

    def _original(self, index: int) -> Tensor:
        """Group `index`, always shifted alike: [1 D H W]."""
        return self.groups.augmented(index, generator(self.cfg.seed, index, stream=29))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.npy"

    def _of(self) -> str | None:
        try:
            return files.read_json(self.folder / "of.json")
        except (OSError, ValueError):
            return None


def noisy_sample(mean: Tensor, logvar: Tensor, noise: float, random: torch.Generator) -> Tensor:
    """A posterior sample [B Z d h w] with further noise, `noise` times each channel's spread."""
    spread = mean.std((0, 2, 3, 4), correction=0, keepdim=True)
    sigma = (logvar.exp() + (noise * spread).square()).sqrt()
    return mean + sigma * torch.randn(mean.shape, generator=random).to(mean.device)
