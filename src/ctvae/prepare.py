"""Scans in, dataset out: read, check, crop, resample, cut into groups of slices, split by patient.

Every scan leaves a record in `scans/` once all its groups are on disk, so that an interrupted run goes on where it
stopped and a second run does nothing. `dataset.json` is put together from the records and written last, an entry at a time:
of very many scans little more than their names is in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import files
from ctvae.catalogue import Catalogue
from ctvae.dataset import FORMAT, Dataset, save
from ctvae.errors import InputError, ScanRejected
from ctvae.intake import (
    Job,
    Record,
    Settings,
    fingerprint,
    is_current,
    mark_duplicate,
    prepare_scan,
    read_record,
)
from ctvae.patients import Patients, known_patients, told_apart_by
from ctvae.preprocess import RESTS
from ctvae.scan import PREPARED_MARK, Found, FoundScans, find_scans, label_folders, without_suffix

Progress = Callable[[int, int, str], None]  # done, total, what was just finished
EARLIER_SALT = "ctvae patient"  # of datasets that were begun before each had its own
SALT = re.compile(r"[\w ]{1,64}", re.ASCII)
REJECTS_SHOWN = 20
AHEAD = 8  # jobs per worker that wait in its queue


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
    _prepare_all(jobs := _Jobs(found, out, settings, label_dirs, salt), workers, progress)
    with Catalogue(out, settings) as catalogue:
        _gather(catalogue, jobs, Patients(found, patient_pattern, known))
        if not len(catalogue):
            first = catalogue.rejected[0]
            raise InputError(f"all {len(jobs)} scans were rejected, the first, {first['source']}: {first['reason']}")
        unsearched = [folder for folder in label_folders(sources) if folder not in label_dirs]
        save(out, catalogue.content([f"not searched: {folder.parent.resolve().name}/{folder.name}" for folder in unsearched]))
    _sweep(out)  # of an earlier run's workers that were still dying when this one began
    del found, jobs, catalogue  # of many scans, not to be held beside what is opened
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


class _Jobs:
    """A job for each scan, made when it is asked for. Their ids are unique."""

    def __init__(self, found: FoundScans, out: Path, settings: Settings, label_dirs: list[Path], salt: str):
        self.found, self.out, self.settings, self.label_dirs, self.salt = found, out, settings, label_dirs, salt
        self.other_ids: dict[int, str] = {}  # of scans with the same name in two sources, or as .nii and .nii.gz
        taken = set()
        for place, scan in enumerate(found):
            name = _id(scan)
            if name.lower() in taken:
                name += "-" + hashlib.sha256(os.fsencode(scan.path.resolve()) + str(scan.series).encode()).hexdigest()[:8]
                self.other_ids[place] = name
            taken.add(name.lower())

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Job]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, place: int) -> Job:
        """To be done: the scan's files are looked at."""
        job = self.done(place)
        label_path = _label_path(job.found, self.label_dirs)
        return replace(job, label_path=label_path, fingerprint=fingerprint(job.found, self.settings, label_path))

    def done(self, place: int) -> Job:
        """One that is only asked for its record."""
        scan = self.found[place]
        return Job(scan, self.other_ids.get(place) or _id(scan), self.out, self.settings, None, "", self.salt)


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


def _prepare_all(jobs: _Jobs, workers: int | None, progress: Progress | None) -> None:
    """Every scan has its record, from an earlier run where that is still current; duplicates are marked."""
    digests = np.zeros(len(jobs), "S64")  # of the voxels, in hexadecimal; empty where there are no groups
    current = np.zeros(len(jobs), bool)
    originals: dict[int, str] = {}  # of duplicates
    for place, job in enumerate(jobs):
        record = read_record(job)
        if record and is_current(job, record):
            current[place], digests[place] = True, _digest(record)
            if record["duplicate_of"] is not None:
                originals[place] = record["duplicate_of"]
    wanted = set(originals.values())
    there = {id for place in np.flatnonzero(current) if wanted and (id := jobs.done(int(place)).id) in wanted}
    for place, original in originals.items():
        current[place] = original in there  # or it is gone or has changed
    todo = np.flatnonzero(~current)
    done = len(jobs) - len(todo)
    if progress and done:
        progress(done, len(jobs), f"{done} prepared before")
    for place, record in _worked(jobs, todo, workers):
        digests[place] = _digest(record)
        done += 1
        if progress:
            progress(done, len(jobs), jobs.found[place].name)
    _mark_duplicates(jobs, digests)


def _digest(record: Record) -> str:
    return record["sha256"] if record["groups"] else ""


def _worked(jobs: _Jobs, todo: Iterable[int], workers: int | None) -> Iterator[tuple[int, Record]]:
    """The places `todo`, each with its record as it is done, by `workers` processes (default: one per core)."""
    places = [int(place) for place in todo]
    count = min(workers or _cores(), len(places))
    if count <= 1:
        yield from ((place, prepare_scan(jobs[place])) for place in places)
        return
    waiting = iter(places)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        pending: dict[Future[Record], int] = {}
        try:
            while True:
                for place in islice(waiting, AHEAD * count - len(pending)):  # no more, so that memory stays flat
                    pending[pool.submit(prepare_scan, jobs[place])] = place
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark_duplicates(jobs: _Jobs, digests: np.ndarray) -> None:
    """Of scans with the same voxels the first by order of path keeps its groups."""
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    again = (first[which] != np.arange(len(digests))) & (digests != b"")
    for place in np.flatnonzero(again):
        job, original = jobs.done(int(place)), jobs.done(int(first[which[place]]))
        mark_duplicate(job, _record(job), original)


def _gather(catalogue: Catalogue, jobs: _Jobs, whose: Patients) -> None:
    """What `dataset.json` says of the scans, from their records on disk."""
    for place in range(len(jobs)):
        job = jobs.done(place)
        record = _record(job)
        try:
            if record["reason"]:
                raise ScanRejected(record["reason"])
            catalogue.add(whose.of(job.found, record["patient"]), record)
        except ScanRejected as error:
            catalogue.rejected.append({"source": record["source"], "reason": str(error)})


def _record(job: Job) -> Record:
    """Of a scan that was prepared. Raises InputError where somebody else has deleted it since."""
    record = read_record(job)
    if record is None:
        raise InputError(f"{job.record_path}: missing or damaged; run again to go on where it stopped")
    return record


def _several(paths: Path | str | Sequence[Path | str] | None) -> list[Path | str]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def told(summary: dict[str, Any]) -> list[str]:
    """A dataset's `summary` in a few lines for people; dataset.json has all of it."""
    groups, patients, rejected = summary["groups"], summary["patients"], summary["rejected"]
    splits = (f"{split} {groups[split]} ({patients[split]} patients)" for split in groups)
    shapes = (f"{shape} ({count})" for shape, count in summary["group_shapes"].items())
    lines = [f"{sum(groups.values())} groups from {summary['scans']} scans: {', '.join(splits)}"]
    lines.append(f"slices x rows x columns: {', '.join(list(shapes)[:REJECTS_SHOWN])}")
    if rejected:
        lines.append(f"rejected {len(rejected)}:")
        lines += [f"  {reject['source']}: {reject['reason']}" for reject in rejected[:REJECTS_SHOWN]]
        lines += [f"  and {len(rejected) - REJECTS_SHOWN} more in dataset.json"] * (len(rejected) > REJECTS_SHOWN)
    return lines + [f"note: {note}" for note in summary["notes"]]
