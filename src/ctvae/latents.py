"""The training groups' latents, and the one place where latents are shifted and scaled.

Shapes:  N groups x encodings   B batch   Z latent channels   d h w latent voxels   K conditions
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ctvae.checkpoint import load, save
from ctvae.conditions import BEFORE_NAMES, Columns
from ctvae.device import batch_indices


@dataclass(frozen=True)
class LatentSet:
    """Posterior moments of every training group, several augmented encodings each, and what the prior may be told."""

    means: Tensor  # [N Z d h w] or [N n Z], float16
    logvars: Tensor  # like means
    conditions: Tensor  # [N K] in their own units
    groups: list[str]  # N group ids
    names: tuple[str, ...] = BEFORE_NAMES  # of the K conditions
    scan_mm: Tensor | None = None  # [N] length of the scan that each group comes from

    def __len__(self) -> int:
        return len(self.means)

    def plain(self) -> LatentSet:
        """The first encoding of every group, which is not augmented."""
        first = [self.groups.index(group) for group in dict.fromkeys(self.groups)]
        lengths = None if self.scan_mm is None else self.scan_mm[first]
        ids = [self.groups[i] for i in first]
        return LatentSet(self.means[first], self.logvars[first], self.conditions[first], ids, self.names, lengths)

    def posterior_sample(self, indices: list[int], random: torch.Generator) -> Tensor:
        """Fresh samples of the encodings `indices`, float32."""
        mean, logvar = self.means[indices].float(), self.logvars[indices].float()
        return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=random)

    def batch(self, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior means and standard deviations [B ...] and conditions [B K] of step `step`."""
        indices = batch_indices(len(self), batch, seed, step)
        return self.means[indices].float(), (0.5 * self.logvars[indices].float()).exp(), self.conditions[indices]

    def save(self, path: Path) -> None:
        tensors = {"means": self.means, "logvars": self.logvars, "conditions": self.conditions}
        tensors |= {"scan_mm": self.scan_mm} if self.scan_mm is not None else {}
        save(path, tensors, {"groups": self.groups, "conditions": self.names})

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        tensors, meta = load(path)
        names, scan_mm = tuple(meta.get("conditions", BEFORE_NAMES)), tensors.get("scan_mm")
        return cls(tensors["means"], tensors["logvars"], tensors["conditions"], meta["groups"], names, scan_mm)

    def with_columns(self, columns: Columns) -> LatentSet:
        """Told a user's columns as well."""
        told = torch.cat((self.conditions, columns.of(self.groups)), dim=1)
        return replace(self, conditions=told, names=(*self.names, *columns.names))

    def known(self) -> dict[str, Tensor]:
        """What a prior file keeps of the conditions: `Known.from_file` reads it."""
        lengths = {} if self.scan_mm is None else {"conditions.scan_mm": self.scan_mm}
        return {"conditions.known": self.conditions, **lengths}


class LatentCode:
    """Latents to what the flow sees, and back: unit variance. The one place where latents are shifted and scaled.

    Statistics are over the whole training set, per channel (per number for vectors), posterior variance included.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def fit(cls, latents: LatentSet) -> LatentCode:
        means, variances = latents.means.float(), latents.logvars.float().exp()
        axes = (0, 2, 3, 4) if means.ndim == 5 else (0,)
        scale = (means.var(axes, correction=0) + variances.mean(axes)).sqrt().clamp_min(1e-6)
        return cls({"shift": means.mean(axes), "scale": scale})

    def encode(self, z: Tensor) -> Tensor:
        """Latents [B Z d h w] or [B N Z] -> [B Z d h w] or, for vectors, [B N*Z]."""
        shift, scale = self._wide()
        x = (z - shift) / scale
        return x if z.ndim == 5 else x.flatten(1)

    def scaled(self, std: Tensor) -> Tensor:
        """Standard deviations of latents -> those of what `encode` makes of them, shaped alike."""
        x = std / self._wide()[1]
        return x if std.ndim == 5 else x.flatten(1)

    def decode(self, x: Tensor) -> Tensor:
        """The inverse of `encode`."""
        shift, scale = self._wide()
        return (x if x.ndim == 5 else x.unflatten(1, shift.shape)) * scale + shift

    def _wide(self) -> tuple[Tensor, Tensor]:
        shift, scale = self.tensors["shift"], self.tensors["scale"]
        return (shift.view(-1, 1, 1, 1), scale.view(-1, 1, 1, 1)) if shift.ndim == 1 else (shift, scale)
