"""Scans in, dataset out: read, check, crop, resample, cut into groups of slices, split by patient.

Every scan leaves a record in `scans/` once all its groups are on disk, so that an interrupted run goes on where it
stopped and a second run does nothing. `dataset.json` is put together from the records and written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import __version__, files
from ctvae.dataset import FORMAT, Dataset, save
from ctvae.errors import InputError, ScanRejected
from ctvae.intake import (
    HISTOGRAM_HU,
    Job,
    Record,
    Settings,
    fingerprint,
    is_current,
    mark_duplicate,
    prepare_scan,
    read_record,
)
from ctvae.patients import Patients, assign, known_patients, told_apart_by
from ctvae.preprocess import BODY_HU, RESTS
from ctvae.scan import PREPARED_MARK, Found, find_scans, label_folders, without_suffix

Progress = Callable[[int, int, str], None]  # done, total, what was just finished
EARLIER_SALT = "ctvae patient"  # of datasets that were begun before each had its own
SALT = re.compile(r"[\w ]{1,64}", re.ASCII)
AHEAD = 8  # jobs per worker that wait in its queue
PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


def prepare(
    sources: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    slices: int = 64,
    size: int | str = "native",
    rest: str = "overlap",
    stride: int | None = None,
    labels: Path | str | Sequence[Path | str] | None = None,
    crop_body: bool = False,
    patient_pattern: str | None = None,
    patient_csv: Path | str | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    workers: int | None = None,
    seed: int = 0,
    patients_of: Path | str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Turn NIfTI files and DICOM series into a dataset of groups of axial slices in `out`.

    `sources` are files and folders, searched to the bottom except for folders called `labels`. A group has `slices`
    slices and begins every `stride` (default: `slices`); `rest` says what becomes of the slices left over at the top:
    "overlap" (a last group that ends at the last slice), "drop", or "pad" (with air; keeps short scans too). `size` is
    "native" or the pixels across after anti-aliased resampling. `crop_body` crops in plane to the body and 4 voxels
    around. `labels` are folders of label maps with the scans' file names. A patient is known by `patient_pattern` (a
    regular expression with one group, searched in the file name), by `patient_csv` (columns scan, patient), or else by
    the hashed DICOM PatientID or the file name. Each dataset has a salt of its own for that hash, so that nobody is
    recognised across datasets; `patients_of` names one whose salt this one is to share. Patients go to
    train, validation and test by `fractions` and `seed`, each drawn by itself, so that none moves when scans are added.

    Run again, it goes on where it stopped and takes in what is new. Scans that cannot be used are in `rejected` with
    their reason. Raises InputError for a bad argument, when a source is missing, when `out` was prepared with other
    settings or holds something else, when every scan is rejected, and when the disk is full.
    """
    sources = _several(sources)
    label_dirs = [Path(folder) for folder in _several(labels)]
    settings = Settings(
        slices, _pixels(size), rest, slices if stride is None else stride, bool(label_dirs), crop_body,
        told_apart_by(patient_pattern, patient_csv), _three(fractions), seed,
    )  # fmt: skip
    _check(settings)
    known = known_patients(patient_csv)
    for folder in label_dirs:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of labels")
    found = find_scans(sources, skip=[*label_dirs, Path(out)])
    out = Path(out)
    salt = _claimed(out, settings, patients_of)
    _sweep(out)
    jobs = _jobs(found, out, settings, label_dirs, salt)
    records = _without_duplicates(jobs, _records(jobs, workers, progress))
    content = _content(jobs, records, Patients(found, patient_pattern, known))
    if not content["groups"]:
        first = content["rejected"][0]
        raise InputError(f"all {len(jobs)} scans were rejected, the first, {first['source']}: {first['reason']}")
    unsearched = [folder for folder in label_folders(sources) if folder not in label_dirs]
    content["notes"] += [f"not searched: {folder.parent.resolve().name}/{folder.name}" for folder in unsearched]
    save(out, content)
    _sweep(out)  # of an earlier run's workers that were still dying when this one began
    del found, jobs, records, content  # of many scans, not to be held beside what is opened
    return Dataset.open(out)


def _sweep(out: Path) -> None:
    for folder in (out, *(out / name for name in ("groups", "labels", "scans"))):
        files.sweep(folder)


def _check(settings: Settings) -> None:
    """Raises InputError for a value out of range."""
    if settings.slices < 2:
        raise InputError(f"slices: {settings.slices} is too few, a group has at least 2")
    if settings.rest not in RESTS:
        raise InputError(f"rest: '{settings.rest}' is not one of {', '.join(RESTS)}")
    if not 1 <= settings.stride <= settings.slices:
        raise InputError(f"stride: {settings.stride} is not within 1..{settings.slices}, the number of slices")
    shares = settings.fractions
    if min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"fractions: {shares} do not sum to 1 with a share for train, e.g. (0.8, 0.1, 0.1)")


def _pixels(size: int | str) -> int | None:
    if size == "native":
        return None
    if not str(size).isdecimal() or int(size) < 8:
        raise InputError(f"size: '{size}' is neither 'native' nor a number of pixels from 8 up")
    return int(size)


def _three(fractions: Sequence[float]) -> tuple[float, float, float]:
    if len(fractions) != 3:
        raise InputError(f"fractions: {fractions} are not three shares, of train, validation and test")
    train, validation, test = map(float, fractions)
    return train, validation, test


def _claimed(out: Path, settings: Settings, patients_of: Path | str | None) -> str:
    """Makes `out` a dataset folder with these settings, if it was not begun before; returns its salt."""
    mark = out / PREPARED_MARK
    wanted = json.loads(json.dumps(asdict(settings)))
    shared = None if patients_of is None else _begun(Path(patients_of) / PREPARED_MARK)["salt"]
    if mark.is_file():
        was = _begun(mark)
        for key, value in {"format": FORMAT, **wanted}.items():
            if was.get(key) != value:
                raise InputError(f"{out}: was prepared with {key} {was.get(key)}, not {value}; choose another folder")
        if shared not in (None, was["salt"]):
            raise InputError(f"{out}: was prepared with another salt than {patients_of}; choose another folder")
        return was["salt"]
    if out.exists() and (not out.is_dir() or not all(map(files.is_partial, out.iterdir()))):
        raise InputError(f"{out}: is there already and not a dataset; choose another folder")
    salt = shared or secrets.token_hex(16)
    files.write_json(mark, {"format": FORMAT, "settings": wanted, "salt": salt})
    return salt


def _begun(mark: Path) -> dict[str, Any]:
    """Format, settings and salt of a dataset. Raises InputError where `mark` is missing or damaged."""
    try:
        content = files.read_json(mark)
        begun = {"format": content["format"], **content["settings"], "salt": content.get("salt", EARLIER_SALT)}
        if not SALT.fullmatch(begun["salt"]):
            raise ValueError("its salt is no text of letters and digits")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{mark}: missing or damaged; delete {mark.parent} and prepare it again") from error
    return begun


def _jobs(found: list[Found], out: Path, settings: Settings, label_dirs: list[Path], salt: str) -> list[Job]:
    jobs, taken = [], set()
    for scan in found:
        name = _id(scan)
        if name.lower() in taken:  # the same name in two sources, or as .nii and .nii.gz
            name += "-" + hashlib.sha256(os.fsencode(scan.path.resolve()) + str(scan.series).encode()).hexdigest()[:8]
        taken.add(name.lower())
        label_path = _label_path(scan, label_dirs)
        jobs.append(Job(scan, name, out, settings, label_path, fingerprint(scan, settings, label_path), salt))
    return jobs


def _id(scan: Found) -> str:
    """The scan's name as part of a file name."""
    name = without_suffix(scan.name).replace("/", "__")
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).lstrip(".")[:120] or "scan"


def _label_path(scan: Found, label_dirs: list[Path]) -> Path | None:
    """The label map with the scan's name, from the folder beside the scan if there are several."""
    beside_first = sorted(label_dirs, key=lambda folder: folder.parent.resolve() != scan.path.parent.resolve())
    names = [without_suffix(scan.name), scan.stem]
    candidates = (folder / f"{name}{end}" for folder in beside_first for name in names for end in (".nii.gz", ".nii"))
    return next((path for path in candidates if path.is_file()), None)


def _records(jobs: list[Job], workers: int | None, progress: Progress | None) -> list[Record]:
    """One record per job, from an earlier run where it is still current; without their histograms, to be small."""
    records = {job.id: _light(record) for job in jobs if is_current(job, record := read_record(job)) and record}
    todo = [job for job in jobs if job.id not in records or _lost_its_original(records[job.id], records)]
    done = len(jobs) - len(todo)
    if progress and done:
        progress(done, len(jobs), f"{done} prepared before")
    for job, record in _worked(todo, workers):
        records[job.id] = _light(record)
        done += 1
        if progress:
            progress(done, len(jobs), job.found.name)
    return [records[job.id] for job in jobs]


def _lost_its_original(record: Record, current: dict[str, Record]) -> bool:
    """Whether a scan was left out as a duplicate of one that is gone or has changed."""
    return record["duplicate_of"] is not None and record["duplicate_of"] not in current


def _worked(jobs: list[Job], workers: int | None) -> Iterator[tuple[Job, Record]]:
    """Each job with its record as it is done, by `workers` processes (default: one per core)."""
    count = min(workers or _cores(), len(jobs))
    if count <= 1:
        yield from ((job, prepare_scan(job)) for job in jobs)
        return
    waiting = iter(jobs)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        pending: dict[Future[Record], Job] = {}
        try:
            while True:
                for job in islice(waiting, AHEAD * count - len(pending)):  # no more, so that memory stays flat
                    pending[pool.submit(prepare_scan, job)] = job
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died: out of memory (use fewer workers), or called from a script without "
                '`if __name__ == "__main__":` (add it, or use workers=1); run again to go on where it stopped'
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _light(record: Record) -> Record:
    """Without the histogram: a thousand scans' are read again, one by one, when they are summed up."""
    return {key: value for key, value in record.items() if key != "histogram"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _without_duplicates(jobs: list[Job], records: list[Record]) -> list[Record]:
    """Of scans with the same voxels the first by order of path keeps its groups."""
    first: dict[str, Job] = {}
    kept = []
    for job, record in zip(jobs, records, strict=True):
        if record["groups"]:
            original = first.setdefault(record["sha256"], job)
            if original is not job:
                record = _light(mark_duplicate(job, read_record(job) or record, original))
        kept.append(record)
    return kept


def _content(jobs: list[Job], records: list[Record], whose: Patients) -> dict[str, Any]:
    """Everything in `dataset.json` but its version."""
    settings, out = jobs[0].settings, jobs[0].out
    used, rejected, patients = [], [], []
    histogram = np.zeros(len(HISTOGRAM_HU) - 1, np.int64)
    for job, record in zip(jobs, records, strict=True):
        try:
            if record["reason"]:
                raise ScanRejected(record["reason"])
            patients.append(whose.of(job.found, record["patient"]))
            used.append(record)
            histogram += _histogram(job)
        except ScanRejected as error:
            rejected.append({"source": record["source"], "reason": str(error)})
    splits, notes = assign(set(patients), settings.seed, settings.fractions, _earlier_splits(out))
    named = list(zip(patients, used, strict=True))
    return {
        "ctvae": __version__,
        "settings": asdict(settings),
        "measured": _measured(used, histogram) if used else {},
        "notes": notes + (_label_notes(used) if settings.labels else []),
        "rejected": rejected,
        "scans": [_scan_entry(patient, splits[patient], record) for patient, record in named],
        "groups": sorted(
            (
                {"id": group["id"], "patient": patient, "split": splits[patient], **group}
                for patient, record in named
                for group in record["groups"]
            ),
            key=lambda group: group["id"],
        ),
    }


def _scan_entry(patient: str, split: str, record: Record) -> Record:
    keys = ("source", "shape", "spacing_mm", "body_mm", "box", "plane", "labels", "sha256")
    return {"patient": patient, "split": split, "groups": len(record["groups"])} | {key: record[key] for key in keys}


def _earlier_splits(out: Path) -> dict[str, str]:
    """Who was in which split when the dataset was last finished."""
    try:
        return {group.patient: group.split for group in Dataset.open(out).groups()}
    except InputError:
        return {}


def _label_notes(records: list[Record]) -> list[str]:
    notes = [f"{record['source']}: labels {record['labels']}" for record in records if ": " in record["labels"]]
    missing = [record["source"] for record in records if record["labels"] == "none"]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        notes.append(f"no label file for {len(missing)} of {len(records)} scans: {', '.join(missing[:5])}{more}")
    return notes


def _histogram(job: Job) -> np.ndarray:
    """Of a scan, from its record on disk."""
    return np.array((read_record(job) or {}).get("histogram", 0), dtype=np.int64)


def _measured(records: list[Record], histogram: np.ndarray) -> dict[str, Any]:
    """What the scans are like; HU percentiles are read off the histogram of all, to 10 HU."""
    body = np.where(HISTOGRAM_HU[:-1] >= BODY_HU, histogram, 0)
    shapes = Counter("x".join(map(str, group["shape"])) for record in records for group in record["groups"])
    spacings = list(zip(*(record["spacing_mm"] for record in records), strict=True))
    bodies = list(zip(*(record["body_mm"] for record in records), strict=True))
    return {
        "scans": len(records),
        "scan_slices": _spread([record["shape"][0] for record in records]),
        **{f"spacing_{axis}_mm": _spread(values) for axis, values in zip("xyz", spacings, strict=True)},
        **{f"body_{axis}_mm": _spread(values) for axis, values in zip("xy", bodies, strict=True)},
        "hu_range": [min(r["hu_range"][0] for r in records), max(r["hu_range"][1] for r in records)],
        "hu_percentiles": _percentiles(histogram),
        "hu_percentiles_above_-300": _percentiles(body),
        "group_shapes": dict(sorted(shapes.items())),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = float(np.min(values)), float(np.median(values)), float(np.max(values))
    return {"min": round(low, 4), "median": round(middle, 4), "max": round(high, 4)}


def _percentiles(histogram: np.ndarray) -> dict[str, int]:
    share = np.cumsum(histogram) / max(1, histogram.sum())
    middles = (HISTOGRAM_HU[:-1] + HISTOGRAM_HU[1:]) // 2
    return {f"{p:g}": int(middles[np.searchsorted(share, p / 100)]) for p in PERCENTILES}


def _several(paths: Path | str | Sequence[Path | str] | None) -> list[Path | str]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, (str, Path)) else list(paths)
