"""The training groups' latents, on disk and read by rows, and the one place where latents are shifted and scaled.

    run/latents/    000000000.safetensors, 000000512.safetensors, ...: shards, each called by its first row

Runs of earlier versions have all of them in one file, run/latents.safetensors, which is read in the same way.

Shapes:  N groups x encodings   B batch   Z latent channels   d h w latent voxels   K conditions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctvae import files
from ctvae.checkpoint import save
from ctvae.conditions import BEFORE_NAMES, Columns
from ctvae.device import batch_indices, generator
from ctvae.errors import ModelError
from ctvae.shards import Rows, blocks, opened

MOST_SHARD_BYTES = 2**24  # a writer holds three times as much
BLOCK_NUMBERS = 2**20  # that are looked at at a time
MOST_FITTED = 1000  # rows that a closed form is fitted to
MOST_FITTED_NUMBERS = 2**29  # in all of them: 2 GiB in float32, 512 groups of 64 x 512 x 512
LARGE = ("means", "logvars")


@dataclass(frozen=True)
class LatentSet:
    """Posterior moments of every training group, several augmented encodings each, and what the prior may be told.

    Means and log variances are tensors, or rows on disk, of which what is asked for is read.
    """

    means: Tensor | Rows  # [N Z d h w] or [N n Z], float16
    logvars: Tensor | Rows  # like means
    conditions: Tensor  # [N K] in their own units
    groups: list[str]  # N group ids
    names: tuple[str, ...] = BEFORE_NAMES  # of the K conditions
    scan_mm: Tensor | None = None  # [N] length of the scan that each group comes from
    patients: list[str] | None = None  # N

    def __len__(self) -> int:
        return len(self.means)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return tuple(self.means.shape[1:])

    @property
    def whose(self) -> list[str]:
        """The patient of each encoding; where an earlier version did not write it, the scan: the group's id up to its slice."""
        return self.patients or [group.rpartition("_")[0] or group for group in self.groups]

    def chosen(self, indices: Sequence[int]) -> LatentSet:
        """The encodings `indices`; of rows on disk none is read."""
        rows = list(indices)
        lengths = None if self.scan_mm is None else self.scan_mm[rows]
        means, logvars = (large.chosen(rows) if isinstance(large, Rows) else large[rows] for large in (self.means, self.logvars))
        groups, patients = [self.groups[i] for i in rows], self.patients and [self.patients[i] for i in rows]
        return LatentSet(means, logvars, self.conditions[rows], groups, self.names, lengths, patients)

    def plain(self) -> LatentSet:
        """The first encoding of every group, which is not augmented."""
        first: dict[str, int] = {}
        for row, group in enumerate(self.groups):
            first.setdefault(group, row)
        return self.chosen(list(first.values()))

    def for_fitting(self) -> LatentSet:
        """What a closed form is fitted to: all, or `most_fitted` of them drawn at random, always the same."""
        most = most_fitted(len(self), self.shape)
        if most == len(self):
            return self
        order = torch.randperm(len(self), generator=generator(0, len(self), stream=19))
        return self.chosen(order[:most].sort().values.tolist())

    def blocks(self) -> Iterator[slice]:
        """All rows, some at a time."""
        return blocks(len(self), max(1, BLOCK_NUMBERS // math.prod(self.shape)))

    def posterior_sample(self, indices: list[int], random: torch.Generator) -> Tensor:
        """Fresh samples of the encodings `indices`, float32."""
        mean, logvar = self.means[indices].float(), self.logvars[indices].float()
        return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=random)

    def batch(self, batch: int, seed: int, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior means and standard deviations [b ...] of the `rows` of step `step`, and the conditions [B K] of all of it."""
        indices = batch_indices(len(self), batch, seed, step)
        means, logvars = self.means[indices[rows]].float(), self.logvars[indices[rows]].float()
        return means, (0.5 * logvars).exp(), self.conditions[indices]

    def save(self, path: Path, **meta: Any) -> None:
        """In one file, with `meta` in its description."""
        tensors = {"means": self.means[:], "logvars": self.logvars[:], "conditions": self.conditions}
        tensors |= {"scan_mm": self.scan_mm} if self.scan_mm is not None else {}
        whose = {"patients": self.patients} if self.patients else {}
        save(path, tensors, {"groups": self.groups, "conditions": self.names, **whose, **meta})

    @classmethod
    def load(cls, path: Path) -> LatentSet:
        """A file, or a folder of shards. Raises ModelError where they are missing, damaged or not all there."""
        shards = [_opened(file) for file in (written(path) if path.is_dir() else [path])]
        count = shards[0][2].get("count", len(shards[0][0])) if shards else 1
        if sum(len(shard) for shard, _, _ in shards) != count:
            raise ModelError(f"{path}: not all latents are there; delete it, and training encodes the groups again")
        sets = [shard for shard, _, _ in shards]
        means, logvars = (Rows([stretches[name] for _, stretches, _ in shards]) for name in LARGE)
        lengths = [shard.scan_mm for shard in sets if shard.scan_mm is not None]
        groups = [group for shard in sets for group in shard.groups]
        patients = [patient for shard in sets for patient in shard.patients or ()]
        return cls(
            means, logvars, torch.cat([shard.conditions for shard in sets]), groups, sets[0].names,
            torch.cat(lengths) if len(lengths) == len(sets) else None, patients if len(patients) == len(groups) else None,
        )  # fmt: skip

    def with_columns(self, columns: Columns) -> LatentSet:
        """Told a user's columns as well."""
        told = torch.cat((self.conditions, columns.of(self.groups)), dim=1)
        return replace(self, conditions=told, names=(*self.names, *columns.names))

    def known(self) -> dict[str, Tensor]:
        """What a prior file keeps of the conditions: `Known.from_file` reads it."""
        lengths = {} if self.scan_mm is None else {"conditions.scan_mm": self.scan_mm}
        return {"conditions.known": self.conditions, **lengths}


def most_fitted(count: int, shape: Sequence[int]) -> int:
    """How many of `count` latents of `shape` a closed form is fitted to."""
    return min(count, MOST_FITTED, max(2, MOST_FITTED_NUMBERS // math.prod(shape)))


# --- shards -----------------------------------------------------------------------------------------------------------------


def written(folder: Path) -> list[Path]:
    """The shards from the first row on, up to the first that is missing."""
    found, rows = [], 0
    while (path := _shard(folder, rows)).is_file():
        found.append(path)
        rows += len(_opened(path)[0])
    return found


def is_complete(path: Path) -> bool:
    """Whether all latents are in the file or folder `path`."""
    if path.is_file():
        return True
    shards = written(path)
    metas = [_opened(shard) for shard in shards]
    return bool(shards) and sum(len(shard) for shard, _, _ in metas) == metas[0][2]["count"]


def _shard(folder: Path, row: int) -> Path:
    return folder / f"{row:09d}.safetensors"


def _opened(path: Path) -> tuple[LatentSet, dict[str, Any], dict[str, Any]]:
    """One file's latents, where their rows lie, and its description."""
    stretches, small, meta = opened(path, LARGE)
    means, logvars = stretches["means"], stretches["logvars"]
    names, groups = tuple(meta.get("conditions", BEFORE_NAMES)), meta.get("groups", ())
    conditions = small.get("conditions", torch.empty(0, 0))
    if means.shape != logvars.shape or {len(groups), len(conditions)} != {means.shape[0]}:
        raise ModelError(f"{path}: its rows do not match; delete it, and training encodes the groups again")
    scan_mm, patients = small.get("scan_mm"), meta.get("patients")
    latents = LatentSet(Rows([means]), Rows([logvars]), conditions, list(groups), names, scan_mm, patients)
    return latents, stretches, meta


class Writer:
    """Latents on their way into the shards of `folder`, in order of their rows. A writer that was killed goes on.

    All rows' groups, patients and lengths are known beforehand. `of` says what they are encoded by.
    """

    def __init__(
        self, folder: Path, groups: list[str], scan_mm: Tensor, names: tuple[str, ...], of: str, patients: list[str] | None = None
    ):
        self.folder, self.groups, self.scan_mm, self.names, self.of = folder, groups, scan_mm, names, of
        self.patients = patients
        self.done = 0  # rows on disk
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def begun(self) -> int:
        """How many rows are on disk; shards of something else are deleted."""
        for path in written(self.folder):
            latents, _, meta = _opened(path)
            end = self.done + len(latents)
            found = meta.get("of"), meta.get("count"), latents.groups, latents.names
            if found != (self.of, len(self.groups), self.groups[self.done : end], self.names):
                break
            self.done = end
        for path in self.folder.glob("[0-9]*.safetensors"):
            if int(path.stem) >= self.done:
                path.unlink()
        files.sweep(self.folder)
        return self.done

    def add(self, means: Tensor, logvars: Tensor, conditions: Tensor) -> None:
        """The next rows; those beyond the last are dropped."""
        room = len(self.groups) - self.done - len(self._waiting)
        self._waiting += list(zip(means[:room], logvars[:room], conditions[:room], strict=True))
        waiting_bytes = 2 * len(self._waiting) * means[0].numel() * means.element_size()
        if self._waiting and (waiting_bytes >= MOST_SHARD_BYTES or self.done + len(self._waiting) == len(self.groups)):
            self._write()

    def _write(self) -> None:
        rows = slice(self.done, self.done + len(self._waiting))
        means, logvars, conditions = (torch.stack(column) for column in zip(*self._waiting, strict=True))
        patients = self.patients and self.patients[rows]
        shard = LatentSet(means, logvars, conditions, self.groups[rows], self.names, self.scan_mm[rows], patients)
        shard.save(_shard(self.folder, self.done), count=len(self.groups), of=self.of)
        self.done, self._waiting = rows.stop, []


# --- to unit variance and back ------------------------------------------------------------------------------------------------


class LatentCode:
    """Latents to what the flow sees, and back: unit variance. The one place where latents are shifted and scaled.

    Statistics are over the whole training set, per channel (per number for vectors), posterior variance included.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def fit(cls, latents: LatentSet) -> LatentCode:
        """In one pass over the rows, in float64."""
        axes = (0, 2, 3, 4) if latents.means.ndim == 5 else (0,)
        sums = [torch.zeros(()), torch.zeros(()), torch.zeros(())]
        for rows in latents.blocks():
            means, variances = latents.means[rows].double(), latents.logvars[rows].double().exp()
            sums = [total + part.sum(axes) for total, part in zip(sums, (means, means.square(), variances), strict=True)]
        count = len(latents) * math.prod(latents.shape) // sums[0].numel()
        shift, square, variance = (total / count for total in sums)
        scale = ((square - shift.square()).clamp_min(0) + variance).sqrt().clamp_min(1e-6)
        return cls({"shift": shift.float(), "scale": scale.float()})

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
