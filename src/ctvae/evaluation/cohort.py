"""Who is on which side: real scans (a prepared dataset, or any folder of NIfTI) and synthetic ones (a folder of NIfTI).

A real patient stands either in the reference, which synthetic scans are compared with, or among the others, which
stand in for synthetic scans when a floor is measured. Training scans are what copies are looked for in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import files, nifti
from ctvae.dataset import FILE, SPLITS, Dataset, Group
from ctvae.errors import InputError
from ctvae.evaluation.grid import Triple
from ctvae.evaluation.summary import digest
from ctvae.volume import Volume

CAP = 200
MOST_TRAINING = 2000  # groups that copies are looked for in: one that is left out is a copy that is not found
WANTED = 12  # patients in the reference: what the neediest measure needs
SMALLEST_SIDE = 11  # voxels: SSIM's window
PATIENT_KEYS = {"patient", "patients", "patient_id", "source_patient", "source_patients"}
SOURCE_KEYS = {"source_sha256", "sources_sha256"}  # of the file, its first digits (`ctvae vary`, `reconstruct`)


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan of one side, read when it is needed."""

    name: str
    patient: str
    split: str | None  # None: from a folder that says nothing of splits, or synthetic
    shape: tuple[int, int, int]  # D H W
    spacing_mm: Triple
    load: Callable[[], Volume]
    path: Path
    digest: str | None = None


@dataclass(frozen=True, eq=False)
class Cohort:
    """The real side, dealt out."""

    reference: list[Scan]  # one per patient
    others: list[Scan]  # one per patient, none of them in the reference
    training: list[Scan]  # all groups of training patients, up to the cap
    held_out: list[Scan]  # all groups of patients that no model was trained on; empty where nobody knows
    split: str
    notes: list[str] = field(default_factory=list)


def real_scans(path: Path) -> list[Scan]:
    """Every group of a prepared dataset, or every NIfTI file of a folder (then one patient each, by file name)."""
    if (path / FILE).is_file():
        dataset = Dataset.open(path)
        scans = [_from_group(dataset, group) for group in dataset.groups()]
    else:
        scans = list(_from_folder(path, "real"))
    if not scans:
        raise InputError(f"{path}: holds no scans; prepare a dataset with `ctvae prepare` or name a folder of .nii.gz files")
    return scans


def synthetic_scans(path: Path) -> tuple[list[Scan], list[str]]:
    """Every NIfTI file of a folder, up to the cap, and notes."""
    scans = list(_from_folder(path, "synthetic", CAP))
    total = len(_nifti_files(path))
    return scans, [f"The first {CAP} of {total} synthetic scans were used."] if total > CAP else []


def refuse_made_from(path: Path, real: Sequence[Scan]) -> None:
    """Raise InputError when a provenance sidecar in `path` names a real patient or a real scan's file as its source."""
    patients = {scan.patient for scan in real}
    hashes: dict[str, str] = {}
    for sidecar in sorted(path.glob("*.json")):
        try:
            content = files.read_json(sidecar)
        except (OSError, ValueError) as error:
            raise InputError(f"{sidecar}: not a readable provenance sidecar; remove it or generate again") from error
        known = [f"patient {name}" for name in _values_of(content, PATIENT_KEYS) if name in patients]
        if sources := set(_values_of(content, SOURCE_KEYS)):
            hashes = hashes or {_file_hash(scan.path): scan.name for scan in real}
            known += [f"scan {name}" for digest, name in hashes.items() if any(digest.startswith(s) for s in sources)]
        if known:
            raise InputError(f"{sidecar}: made from real {known[0]}, who is on the real side too; leave it out")


def refuse_same_scans(synthetic: Sequence[Scan], digests: dict[str, str]) -> None:
    """Raise InputError when a synthetic scan is voxel for voxel a real one; `digests` gives the real one's name."""
    for scan in synthetic:
        if scan.digest in digests:
            raise InputError(
                f"{scan.name}: voxel for voxel the real scan {digests[scan.digest]}; leave it out of the synthetic side"
            )


def deal(scans: Sequence[Scan], split: str, seed: int) -> Cohort:
    """Deal the real patients out, one scan each, by `split` ('train', 'validation', 'test').

    An empty split falls back to the next; a reference that is too small is topped up, and one that leaves too few
    others gives some of its patients away, both down to half of all patients. Every such step leaves a note.
    """
    rng = np.random.default_rng([seed, 1])
    notes: list[str] = []
    by_patient: dict[str, list[Scan]] = {}
    for scan in scans:
        by_patient.setdefault(scan.patient, []).append(scan)
    chosen = [group[rng.integers(len(group))] for _, group in sorted(by_patient.items())]
    if len(scans) > len(chosen):
        notes.append(f"One of the groups of each real patient was used, chosen at random ({len(chosen)} of {len(scans)}).")
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    name = _first_filled(chosen, split, notes)
    reference = [scan for scan in chosen if scan.split == name or name == "all"]
    others = [scan for scan in chosen if scan.split != name and name != "all"]
    reference, others = _balanced(reference, others, name, notes)
    if max(len(reference), len(others)) > CAP:
        reference, others = reference[:CAP], others[:CAP]
        notes.append(f"At most {CAP} real patients were used on either side of a comparison.")
    training, held_out = _training(scans, rng, notes)
    return Cohort(reference, others, training, held_out, name, notes)


def _first_filled(scans: Sequence[Scan], split: str, notes: list[str]) -> str:
    if all(scan.split is None for scan in scans):
        return "all"
    if split not in SPLITS:
        raise InputError(f"split '{split}' is not one of {', '.join(SPLITS)}")
    order = [split, *(s for s in ("test", "validation", "train") if s != split)]
    name = next(s for s in order if any(scan.split == s for scan in scans))
    if name != split:
        notes.append(f"The {split} split is empty, so the {name} split stands for real scans.")
    return name


def _balanced(reference: list[Scan], others: list[Scan], name: str, notes: list[str]) -> tuple[list[Scan], list[Scan]]:
    wanted = min(WANTED, (len(reference) + len(others)) // 2)
    if len(reference) < wanted:
        moved = sorted(others, key=lambda scan: scan.split == "train")[: wanted - len(reference)]
        before = len(reference)
        notes.append(
            f"The {name} split has {before} patient{'s' * (before != 1)}; {len(moved)} of the other splits were added to it."
        )
        reference, others = [*reference, *moved], [scan for scan in others if scan not in moved]
    if len(others) < wanted:
        keep = max(len(reference) - (wanted - len(others)), wanted) if name != "all" else (len(reference) + 1) // 2
        notes.append(
            f"{len(reference) - keep} of the {len(reference)} reference patients stand in for synthetic scans "
            "when floors are measured."
        )
        reference, others = reference[:keep], [*others, *reference[keep:]]
    return reference, others


def _training(scans: Sequence[Scan], rng: np.random.Generator, notes: list[str]) -> tuple[list[Scan], list[Scan]]:
    if all(scan.split is None for scan in scans):
        notes.append("Nothing says which real scans a model was trained on: copies are looked for in all of them.")
        training, held_out = list(scans), []
    else:
        training = [scan for scan in scans if scan.split == "train"]
        held_out = [scan for scan in scans if scan.split != "train"]
    if len(training) > MOST_TRAINING:
        notes.append(f"Copies were looked for in {MOST_TRAINING} of {len(training)} training groups, chosen at random.")
        training = [training[i] for i in sorted(rng.choice(len(training), MOST_TRAINING, replace=False))]
    return training, held_out[:CAP]


def _from_group(dataset: Dataset, group: Group) -> Scan:
    return Scan(
        name=group.id,
        patient=group.patient,
        split=group.split,
        shape=group.shape,
        spacing_mm=group.spacing_mm,
        load=partial(dataset.volume, group),
        path=dataset.folder / group.path,
    )


def _from_folder(path: Path, side: str, most: int | None = None) -> Iterator[Scan]:
    for file in _nifti_files(path)[:most]:
        volume = _read(file)
        if min(volume.shape) < SMALLEST_SIDE:
            size = " x ".join(map(str, volume.shape))
            raise InputError(f"{file}: only {size} voxels; at least {SMALLEST_SIDE} along every axis are needed")
        name = file.name.removesuffix(".gz").removesuffix(".nii")
        yield Scan(
            name=name,
            patient=name if side == "real" else f"synthetic {name}",
            split=None,
            shape=volume.shape,
            spacing_mm=volume.spacing_mm,
            load=partial(_read, file),
            path=file,
            digest=digest(volume),
        )


def _read(file: Path) -> Volume:
    return nifti.read(file)[0]


def _nifti_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name a folder of .nii.gz files")
    files = sorted(file for file in path.iterdir() if file.is_file() and nifti.is_nifti(file) and not file.name.startswith("."))
    if not files:
        raise InputError(f"{path}: holds no .nii or .nii.gz files; generate some with `ctvae generate`")
    return files


def _values_of(content: Any, keys: set[str]) -> Iterator[str]:
    """Texts under any of `keys`, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in keys:
                yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
            yield from _values_of(value, keys)
    elif isinstance(content, list):
        for item in content:
            yield from _values_of(item, keys)


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
