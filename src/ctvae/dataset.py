"""A prepared dataset: a folder of slice groups in HU, and `dataset.json` that says where each came from.

    DATASET/
    ├── dataset.json   format version, settings, what was measured, every scan and group, what was rejected and why
    ├── prepare.json   the settings, from the first moment on
    ├── groups/        <id>.nii       int16 HU [D H W] in canonical axes, uncompressed so that it can be memory-mapped
    ├── labels/        <id>.nii.gz    int16 labels on the same grid, where a scan has them
    └── scans/         <id>.json      what `prepare` did with each scan, so that it can go on where it stopped
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import files, nifti
from ctvae.entries import Packed, members
from ctvae.errors import InputError
from ctvae.volume import Volume

FORMAT = 1
FILE = "dataset.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """One block of consecutive axial slices of one scan."""

    id: str
    patient: str
    split: str  # train, validation or test
    path: str  # relative to the dataset's folder
    label_path: str | None
    shape: tuple[int, int, int]  # D H W
    spacing_mm: tuple[float, float, float]  # x y z
    affine: np.ndarray  # [4 4] voxel (x y z) to RAS mm
    position: float  # centre of the group along the scan's slices: 0 lowest, 1 highest
    first_slice: int  # of the scan, counted from the lowest
    source: str  # the scan, relative to the source it was found in
    sha256: str  # of the voxels


class Dataset:
    """A prepared dataset, opened with `Dataset.open(folder)`.

    Its entries are kept compressed; groups become objects when they are first asked for.
    """

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder = folder
        self.settings: dict[str, Any] = _of_type(content, "settings", dict)
        self.measured: dict[str, Any] = _of_type(content, "measured", dict)
        self._scans: Packed = _of_type(content, "scans", Packed)
        self.rejected: list[dict[str, str]] = list(_of_type(content, "rejected", Packed))
        self.notes: list[str] = list(_of_type(content, "notes", Packed))
        self._entries: Packed = _of_type(content, "groups", Packed)

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Raises InputError when `path` is missing, no dataset, damaged or of another format version."""
        folder = Path(path)
        file = folder / FILE
        if not folder.exists():
            raise InputError(f"{folder}: no such dataset; make one with `ctvae prepare SOURCE --out {folder}`")
        if not file.is_file():
            raise InputError(f"{folder}: not a finished dataset ({FILE} is missing); run `ctvae prepare` on it (again)")
        try:
            return cls(folder, _read(file))
        except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{file}: damaged ({_short(error)}); run `ctvae prepare` again") from error

    @property
    def scans(self) -> list[dict[str, Any]]:
        """What was found of each scan."""
        return list(self._scans)

    @cached_property
    def _groups(self) -> list[Group]:
        known: dict[Any, Any] = {}  # texts and tuples that many groups share
        return sorted((_group(entry, known) for entry in self._entries), key=lambda group: group.id)

    def groups(self, split: str | None = None) -> list[Group]:
        """The groups of one split, or all, sorted by id. Raises InputError for an unknown split."""
        if split is not None and split not in SPLITS:
            raise InputError(f"split '{split}' is not one of {', '.join(SPLITS)}")
        return [group for group in self._groups if split in (None, group.split)]

    def splits(self) -> dict[str, str]:
        """Which split each patient is in."""
        return {entry["patient"]: entry["split"] for entry in self._entries}

    def hu(self, group: Group) -> np.ndarray:
        """int16 HU [D H W], memory-mapped copy-on-write. Raises InputError when the file is missing or damaged."""
        path = self.folder / group.path
        hu = nifti.mapped(path)
        if hu.shape != group.shape:
            raise InputError(f"{path}: shape {hu.shape} is not {group.shape} as in {FILE}; prepare the scans again")
        return hu

    def labels(self, group: Group) -> np.ndarray | None:
        """int16 labels [D H W] on the grid of `hu`, or None for a scan without. Raises InputError as `hu`."""
        if group.label_path is None:
            return None
        path = self.folder / group.label_path
        labels = nifti.read_labels(path)[0].hu
        if labels.shape != group.shape:
            raise InputError(f"{path}: shape {labels.shape} is not {group.shape} as in {FILE}; prepare the scans again")
        return labels

    def volume(self, group: Group) -> Volume:
        """The group's HU with its place in the patient."""
        return Volume(self.hu(group), group.affine)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every group's id, split and voxel hash: equal fingerprints mean equal training data."""
        lines = [f"{group.id} {group.split} {group.sha256}\n" for group in self._groups]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def summary(self) -> dict[str, Any]:
        """What was measured, how many groups and patients each split has, rejects by reason, and notes."""
        groups = Counter(entry["split"] for entry in self._entries)
        patients = Counter(split for _, split in {(entry["patient"], entry["split"]) for entry in self._entries})
        return {
            "groups": {split: groups[split] for split in SPLITS},
            "patients": {split: patients[split] for split in SPLITS},
            "rejected": self.rejected,
            "notes": self.notes,
            **self.measured,
        }


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `dataset.json`, one line per group, scan and reject; left alone when it says the same already.

    Lists may be any iterables that can be gone through twice. Raises InputError when it cannot be written.
    """
    file = folder / FILE
    if not _says(file, _text(content)):
        files.write_pieces(file, _text(content))


def _says(file: Path, text: Iterable[str]) -> bool:
    """Whether that is what the file holds."""
    if not file.is_file():
        return False
    try:
        with file.open(encoding="utf-8", newline="") as held:
            return all(held.read(len(piece)) == piece for piece in text) and not held.read(1)
    except ValueError:
        return False


def _text(content: Mapping[str, Any]) -> Iterator[str]:
    """The file, in pieces."""
    before = "{\n"
    for key, value in {"format": FORMAT, **content}.items():
        yield f"{before} {json.dumps(key)}: "
        yield from _laid_out(value)
        before = ",\n"
    yield "\n}\n"


def _laid_out(value: Any) -> Iterator[str]:
    """A list or mapping with one entry per line, each entry on one line."""
    if isinstance(value, dict):
        yield from _lines((f"{json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}" for key, entry in value.items()), "{}")
    elif isinstance(value, Iterable) and not isinstance(value, str):
        yield from _lines((json.dumps(entry, ensure_ascii=False) for entry in value), "[]")
    else:
        yield json.dumps(value, ensure_ascii=False)


def _lines(rows: Iterable[str], brackets: str) -> Iterator[str]:
    before, end = f"{brackets[0]}\n  ", brackets
    for row in rows:
        yield before + row
        before, end = ",\n  ", f"\n {brackets[1]}"
    yield end


def _read(file: Path) -> dict[str, Any]:
    """What `dataset.json` says, its lists packed, its groups checked. Raises as `members` and `_group`, and InputError."""
    content: dict[str, Any] = {}
    for key, value in members(file):
        if isinstance(value, Iterator):
            content[key] = Packed(_checked(value) if key == "groups" else value)
            continue
        content[key] = value
        if key == "format" and value != FORMAT:
            break
    version = content.get("format")
    if version != FORMAT:
        raise InputError(f"{file}: format version {version!r}, this ctvae reads {FORMAT}; prepare the scans again")
    return content


def _checked(entries: Iterable[Any]) -> Iterator[Any]:
    for entry in entries:
        _group(entry, {})
        yield entry


def _of_type(content: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(content[key], kind):
        raise ValueError(f"'{key}' is no {'list' if kind is Packed else kind.__name__}")
    return content[key]


def _group(entry: dict[str, Any], known: dict[Any, Any]) -> Group:
    """An entry as an object; what it has in common with those in `known` is kept once."""

    def shared(key: str, value: Any) -> Any:
        return known.setdefault((key, value), value)

    group = Group(
        **{
            **entry,
            "patient": shared("patient", entry["patient"]),
            "split": shared("split", entry["split"]),
            "shape": shared("shape", tuple(int(n) for n in entry["shape"])),
            "spacing_mm": shared("spacing_mm", tuple(float(step) for step in entry["spacing_mm"])),
            "affine": np.array(entry["affine"], dtype=np.float64),
            "position": float(entry["position"]),
        }
    )
    if len(group.shape) != 3 or len(group.spacing_mm) != 3 or group.affine.shape != (4, 4):
        raise ValueError(f"group {group.id}: shape, spacing_mm or affine is not 3D")
    if min(group.shape) < 1 or math.prod(group.shape) > nifti.MAX_VOXELS:
        raise ValueError(f"group {group.id}: a shape of {group.shape} is empty or beyond {nifti.MAX_VOXELS} voxels")
    numbers = [*group.affine.ravel(), *group.spacing_mm, group.position]
    if not all(map(math.isfinite, numbers)) or min(group.spacing_mm) <= 0:
        raise ValueError(f"group {group.id}: spacing_mm, affine or position is not finite, or not positive")
    if group.split not in SPLITS:
        raise ValueError(f"group {group.id}: unknown split '{group.split}'")
    if not all(isinstance(text, str) for text in (group.id, group.patient, group.source, group.sha256)):
        raise ValueError("a group's id, patient, source or sha256 is no text")
    files.inside(group.id)
    for path, end in ((group.path, ".nii"), (group.label_path or "x.nii.gz", (".nii", ".nii.gz"))):
        if not files.inside(path).endswith(end):
            raise ValueError(f"group {group.id}: '{path}' is not called {end}")
    return group


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
