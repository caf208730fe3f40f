"""One scan in, its groups and a record on disk: the work that `prepare` hands to its worker processes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import files, nifti
from ctvae.errors import ScanRejected, ScanTooLarge
from ctvae.preprocess import BODY_HU, BODY_MARGIN_VOXELS, Box, Steps, body_box, cut, group_starts
from ctvae.scan import Found, read_found
from ctvae.volume import Volume, position_mm

Record = dict[str, Any]
MOST_RECORD_BYTES = 2**24
BLANK_SLICE = 0.002  # share of a slice's voxels above BODY_HU, below which it shows no body
TRY_AGAIN = "too large for the memory at the time"  # no scan's fingerprint
NARROWEST = 16  # times longer than wide may a plane be that is made square
MOST_BLANK = 0.1  # of a group's slices; a group with more would teach a model to draw blanks
BIN_HU = 10
HISTOGRAM_HU = np.arange(-1025, 3090, BIN_HU)  # edges


@dataclass(frozen=True)
class Settings:
    """What decides the content of a dataset besides the scans. Saved in `prepare.json`; fixed from then on."""

    slices: int = 64
    size: int | None = None  # pixels across; none: native
    rest: str = "overlap"
    stride: int = 64
    labels: bool = False
    crop_body: bool = False
    patients: str = "header or file name"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One scan to prepare."""

    found: Found
    id: str  # unique in the dataset; begins the ids of its groups
    out: Path
    settings: Settings
    label_path: Path | None
    fingerprint: str  # of the scan's files, its label file and the settings
    salt: str = ""  # of the patients' pseudonyms

    @property
    def record_path(self) -> Path:
        return self.out / "scans" / f"{self.id}.json"


def prepare_scan(job: Job) -> Record:
    """Write the groups of one scan and then its record. A scan that cannot be used gets a record with the reason."""
    stale = read_record(job) or {}
    fingerprint = job.fingerprint
    try:
        record = {**_prepared(job), "reason": None}
    except ScanTooLarge as error:
        record, fingerprint = _rejected(job, str(error)), TRY_AGAIN
    except MemoryError:
        record, fingerprint = _rejected(job, "needs more memory than there is; use fewer --workers"), TRY_AGAIN
    except ScanRejected as error:
        record = _rejected(job, str(error))
    record = {"fingerprint": fingerprint, "source": job.found.name, "duplicate_of": None, **record}
    delete_groups(job.out, stale, keep=record)
    files.write_json(job.record_path, record)
    return record


def _rejected(job: Job, reason: str) -> Record:
    """Says what was wrong without saying where the scans lie."""
    reason = reason.removeprefix(f"{job.found.path}: ")
    return {"reason": reason.replace(str(job.found.path), job.found.name), "groups": []}


def read_record(job: Job) -> Record | None:
    """What an earlier run did with the scan; none if it did not get that far, or if the record names files elsewhere."""
    try:
        record = files.read_json(job.record_path, MOST_RECORD_BYTES)
        for group in record["groups"]:
            files.inside(group["path"])
            files.inside(group["label_path"] or "none")
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return record if {"fingerprint", "duplicate_of"} <= set(record) else None


def is_current(job: Job, record: Record | None) -> bool:
    """Whether neither the scan nor the settings changed since `record`, and its groups are still there."""
    if record is None or record["fingerprint"] != job.fingerprint:
        return False
    paths = [group[key] for group in record["groups"] for key in ("path", "label_path") if group[key]]
    return all((job.out / path).is_file() for path in paths)


def mark_duplicate(job: Job, record: Record, original: Job) -> Record:
    """Delete the scan's groups and say in its record whose voxels they were."""
    reason = f"duplicate content: the same voxels as {original.found.name}"
    marked = {**record, "groups": [], "duplicate_of": original.id, "reason": reason}
    delete_groups(job.out, record, keep=marked)
    files.write_json(job.record_path, marked)
    return marked


def delete_groups(out: Path, record: Record, keep: Record) -> None:
    """Delete the group and label files of `record` that `keep` does not have."""
    kept = {group[key] for group in keep["groups"] for key in ("path", "label_path")}
    for group in record.get("groups", []):
        for key in ("path", "label_path"):
            if group[key] and group[key] not in kept:
                (out / group[key]).unlink(missing_ok=True)


def fingerprint(scan: Found, settings: Settings, label_path: Path | None) -> str:
    """Changes when a file's size or date changes, and with the settings."""
    stats = [(path.name, *_size_and_date(path)) for path in [*scan.files, label_path] if path]
    return hashlib.sha256(repr((scan.name, scan.series, stats, settings)).encode()).hexdigest()


def _size_and_date(path: Path) -> tuple[int, int]:
    """In bytes and nanoseconds; of a file that has vanished since it was found, what no file has."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _prepared(job: Job) -> Record:
    """Write the groups; what is to be remembered of the scan. Raises ScanRejected."""
    settings = job.settings
    scan = read_found(job.found, job.salt)
    body = body_box(scan.volume)
    starts = _filled(scan.volume.hu, body, settings)
    steps = _steps(body.grown(BODY_MARGIN_VOXELS, scan.volume.shape), scan.volume.shape, settings)
    labels, label_note = _labels(job, scan.volume)
    volume = steps.apply(scan.volume)
    labels = steps.apply(labels, labels=True) if labels else None
    x_mm, y_mm, _ = scan.volume.spacing_mm
    return {
        "patient": scan.patient,
        "shape": scan.volume.shape,
        "spacing_mm": scan.volume.spacing_mm,
        "body_mm": (body.shape[2] * x_mm, body.shape[1] * y_mm),
        "box": asdict(steps.box),
        "plane": steps.plane,
        "sha256": _sha256(scan.volume.hu),
        "labels": label_note,
        "hu_range": (int(volume.hu.min()), int(volume.hu.max())),
        "histogram": _histogram(volume.hu),
        "groups": [_write_group(job, volume, labels, start, scan.volume.shape[0]) for start in starts],
    }


def _filled(hu: np.ndarray, body: Box, settings: Settings) -> list[int]:
    """First slices of the groups, without those whose slices are mostly blank. Raises ScanRejected when none is left.

    What lies beside the body, such as a table that goes on where the patient ends, fills no slice.
    """
    starts = group_starts(len(hu), settings.slices, settings.stride, settings.rest)
    rows, columns = (slice(first, first + size) for first, size in zip(body.start[1:], body.shape[1:], strict=True))
    blank = (hu[:, rows, columns] > BODY_HU).sum(axis=(1, 2)) < BLANK_SLICE * hu[0].size  # [D]
    filled = [start for start in starts if blank[start : start + settings.slices].mean() <= MOST_BLANK]
    if not filled:
        raise ScanRejected(f"every group of {settings.slices} slices has more than {MOST_BLANK:.0%} blank slices")
    return filled


def _steps(body: Box, shape: tuple[int, int, int], settings: Settings) -> Steps:
    box = body if settings.crop_body else Box.whole(shape)
    if settings.size is None:
        return Steps(box, box.shape[1:])
    if max(box.shape[1:]) > NARROWEST * min(box.shape[1:]):
        raise ScanRejected(f"its plane of {box.shape[1]}x{box.shape[2]} is too narrow to be made square")
    return Steps(box.squared(), (settings.size, settings.size))


def _labels(job: Job, scan: Volume) -> tuple[Volume | None, str]:
    """The label map on the scan's grid, if it has a usable one, and what became of it."""
    if job.label_path is None:
        return None, "none"
    try:
        labels, _ = nifti.read_labels(job.label_path)
        if labels.shape != scan.shape:
            raise ScanRejected(f"shape {labels.shape} is not the scan's {scan.shape}")
        apart_mm = max(_apart_mm(labels, scan, corner) for corner in ((0, 0, 0), scan.shape))
        if apart_mm > min(scan.spacing_mm) / 2:
            raise ScanRejected(f"lies {apart_mm:.1f} mm away from the scan")
    except ScanRejected as error:
        return None, "rejected: " + str(error).removeprefix(f"{job.label_path}: ")
    return labels, "carried"


def _apart_mm(one: Volume, other: Volume, index: tuple[int, int, int]) -> float:
    """How far apart two volumes have the same array index."""
    return float(np.linalg.norm(position_mm(one.affine, index) - position_mm(other.affine, index)))


def _write_group(job: Job, volume: Volume, labels: Volume | None, start: int, depth: int) -> Record:
    """One group on disk; its entry in the dataset without patient and split."""
    slices = job.settings.slices
    box = Box((start, 0, 0), (slices, *volume.shape[1:]))
    group = cut(volume, box)
    name = f"{job.id}_{start:04d}"
    nifti.write(job.out / f"groups/{name}.nii", group, description=f"{slices} slices from {start}")
    if labels is not None:
        nifti.write(job.out / f"labels/{name}.nii.gz", cut(labels, box, fill=0), description="labels")
    return {
        "id": name,
        "path": f"groups/{name}.nii",
        "label_path": f"labels/{name}.nii.gz" if labels is not None else None,
        "shape": group.shape,
        "spacing_mm": group.spacing_mm,
        "affine": group.affine.tolist(),
        "position": round(min(1.0, (start + slices / 2) / depth), 6),
        "first_slice": start,
        "source": job.found.name,
        "sha256": _sha256(group.hu),
    }


def _sha256(hu: np.ndarray) -> str:
    voxels = np.ascontiguousarray(hu, dtype="<i2")
    return hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()


def _histogram(hu: np.ndarray) -> list[int]:
    clipped = np.clip(hu, HISTOGRAM_HU[0], HISTOGRAM_HU[-1] - 1)
    return np.bincount((clipped.ravel() - HISTOGRAM_HU[0]) // BIN_HU, minlength=len(HISTOGRAM_HU) - 1).tolist()
