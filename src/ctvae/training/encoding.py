"""Between the stages: every group through the trained encoder, onto disk, shared out over the processes.

Shapes:  Z latent channels   d h w latent voxels
"""

from __future__ import annotations

from pathlib import Path

import torch

from ctvae.conditions import OF_GROUP, Change, of_group, scan_mm
from ctvae.config import Prior
from ctvae.device import autocast, generator
from ctvae.latents import Writer
from ctvae.models.autoencoder import Autoencoder
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.training.groups import TrainingGroups


@torch.no_grad()
def encode_groups(
    network: Autoencoder, groups: TrainingGroups, cfg: Prior, seed: int, out: Path, precision: str = "bf16", of: str = "",
    ranks: Ranks = ALONE,
) -> None:  # fmt: skip
    """Posterior moments of every group into the folder `out`, `cfg.encodings` times each: first as it is, then augmented.

    With each goes what was done to it, and a zoomed group's spacing is the one that makes its patient as large as before: the
    prior is told of augmentation, so that samples show none.
    Each process encodes one of every `world` and gets the others' from them. What an earlier call wrote of the same (`of`: which
    network) is kept. Raises InputError when the disk is full.
    """
    device = next(network.parameters()).device
    encoded = [group for group in groups.groups for _ in range(cfg.encodings)]
    lengths, patients = torch.tensor([scan_mm(group) for group in encoded]), [group.patient for group in encoded]
    writer = Writer(out, [group.id for group in encoded], lengths, OF_GROUP, of, patients)
    count = len(encoded)
    with Progress("encoding", total=count) as bar:
        for start in range(ranks.told(writer.begun), count, ranks.world):
            place = min(start + ranks.rank, count - 1)  # past the end the last again, which is dropped
            index, number = divmod(place, cfg.encodings)
            x, change = groups.plain(index), Change()
            if number:
                random = generator(seed, place, stream=5)
                x, change = groups.turned(index, random, cfg.max_rotation_degrees, cfg.max_zoom, cfg.mirror)
            with autocast(precision, device):
                mean, logvar = network.encode(x[None].to(device))
            told = torch.tensor([of_group(groups.groups[index], change)], device=device)
            rows = [ranks.gathered(part).cpu() for part in (mean.half(), logvar.half(), told)]  # [world ...] each
            if ranks.first:
                writer.add(*rows)
            bar.update(min(start + ranks.world, count))
