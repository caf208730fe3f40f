"""Any scan, NIfTI file or DICOM series, as one volume in HU; and where scans are found."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctvae import dicom, nifti
from ctvae.errors import InputError, ScanRejected
from ctvae.preprocess import as_hu
from ctvae.volume import Orientation, Volume

LABELS_FOLDER = "labels"
PREPARED_MARK = "prepare.json"  # a folder that holds it is a dataset of ours, not a source


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan in int16 HU and canonical axes."""

    volume: Volume
    orientation: Orientation
    path: Path
    patient: str | None = None  # salted hash of the DICOM PatientID; none for NIfTI, and where no salt was given


@dataclass(frozen=True)
class Found:
    """Where a scan lies: a NIfTI file, or one DICOM series of a folder."""

    path: Path
    root: Path  # the source it was found in
    files: tuple[Path, ...]  # that it is read from
    series: str | None = None  # SeriesInstanceUID

    @property
    def name(self) -> str:
        """Relative to the source, e.g. `case_1.nii.gz`; a source that is the scan itself goes by its own name."""
        relative = self.path.relative_to(self.root)
        return _as_text(relative.as_posix() if relative.parts else self.path.resolve().name)

    @property
    def stem(self) -> str:
        """The file's or folder's name without `.nii` or `.nii.gz`."""
        return _as_text(without_suffix(self.path.resolve().name if self.series else self.path.name))


class FoundScans:
    """Very many of them, in little memory: of each its path as text, of a series its files' names, compressed."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._roots: list[Path] = []
        self._series: dict[int, tuple[str, bytes]] = {}  # by place: UID, names

    def append(self, scan: Found) -> None:
        if scan.series is not None:
            names = "\0".join(path.name for path in scan.files)
            self._series[len(self)] = scan.series, zlib.compress(os.fsencode(names))
        self._paths.append(os.fspath(scan.path))
        self._roots.append(self._roots[-1] if self._roots and self._roots[-1] == scan.root else scan.root)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Found]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Found:
        path, root = Path(self._paths[number]), self._roots[number]
        if number not in self._series:
            return Found(path, root, (path,))
        uid, names = self._series[number]
        return Found(path, root, tuple(path / name for name in os.fsdecode(zlib.decompress(names)).split("\0")), uid)


def _as_text(name: str) -> str:
    """A file's name as text that can be written: bytes of it that are no UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def without_suffix(name: str) -> str:
    """A file name without `.nii` or `.nii.gz`."""
    lower = name.lower()
    return next((name[: -len(suffix)] for suffix in (".nii.gz", ".nii") if lower.endswith(suffix)), name)


def read_scan(path: Path | str, series: str | None = None) -> Scan:
    """A `.nii` or `.nii.gz` file, or a folder that holds one DICOM series (or the one called `series`).

    Padding below -1024 becomes -1024; HU are otherwise as stored. Raises ScanRejected as `nifti.read`,
    `dicom.read_series` and `preprocess.as_hu`; InputError when nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path, series)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not nifti.is_nifti(path):
        raise ScanRejected(f"{path}: not a scan; give a .nii or .nii.gz file, or a folder of DICOM files")
    return _read_nifti(path)


def read_found(found: Found, salt: str = "") -> Scan:
    """A scan of `find_scans`, without looking through its folder again; its patient hashed with `salt`.

    Raises ScanRejected as `read_scan`.
    """
    if found.series is None:
        return _read_nifti(found.path)
    return _read_series(dicom.Series(found.path, found.series, found.files), salt)


def _read_nifti(path: Path) -> Scan:
    volume, orientation = nifti.read(path)
    return Scan(Volume(as_hu(volume.hu, path), volume.affine), orientation, path)


def _read_series(series: dicom.Series, salt: str = "") -> Scan:
    volume, orientation, meta = dicom.read_series(series, salt)
    return Scan(Volume(as_hu(volume.hu, series.folder), volume.affine), orientation, series.folder, meta.patient)


def _read_dicom(folder: Path, uid: str | None) -> Scan:
    found = [series for series in dicom.series_in(folder) if uid in (None, series.uid)]
    if not found:
        raise ScanRejected(f"{folder}: holds no DICOM series" + (f" {uid}" if uid else ""))
    if len(found) > 1:
        raise ScanRejected(f"{folder}: holds {len(found)} DICOM series; put the one you mean into its own folder")
    return _read_series(found[0])


def find_scans(sources: Sequence[Path | str], skip: Iterable[Path] = ()) -> FoundScans:
    """Every scan in `sources` (files and folders, folders searched to the bottom), each once, in order of path.

    Left out: hidden files, folders called `labels`, prepared datasets, and the folders in `skip`.
    Raises InputError when a source is missing or nothing is found.
    """
    skipped = {folder.resolve() for folder in skip}
    found, seen = FoundScans(), set()
    for source in map(Path, sources):
        for scan in _find_in(source, skipped):
            place = hashlib.sha256(os.fsencode(scan.path.resolve()) + b"\0" + (scan.series or "").encode()).digest()[:16]
            if place not in seen:
                seen.add(place)
                found.append(scan)
    if not found:
        names = ", ".join(map(str, sources)) or "no source"
        raise InputError(f"{names}: no scans found; give .nii or .nii.gz files, or folders with such or DICOM files")
    return found


def label_folders(sources: Sequence[Path | str]) -> list[Path]:
    """The folders called `labels` that `find_scans` leaves out."""
    return [
        Path(folder) / LABELS_FOLDER
        for source in sources
        for folder, below, _ in os.walk(source)
        if LABELS_FOLDER in below
    ]


def _find_in(source: Path, skipped: set[Path]) -> Iterator[Found]:
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.is_file():
        if not nifti.is_nifti(source):
            raise InputError(f"{source}: not a scan; give a .nii or .nii.gz file, or a folder (of DICOM files, too)")
        yield Found(source, source.parent, (source,))
        return
    for folder in _folders(source, skipped):
        for name in sorted(os.listdir(folder)):  # of very many files in one folder, names take least
            path = folder / name
            if not name.startswith(".") and nifti.is_nifti(path) and path.is_file():
                yield Found(path, source, (path,))
        for series in dicom.series_in(folder):
            yield Found(folder, source, series.files, series.uid)


def _folders(source: Path, skipped: set[Path]) -> Iterator[Path]:
    """`source` and what is below, without what holds no scans."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for folder, below, files in os.walk(source, onerror=unreadable):
        below[:] = sorted(
            name for name in below
            if name != LABELS_FOLDER and not name.startswith(".") and (Path(folder) / name).resolve() not in skipped
        )  # fmt: skip
        if PREPARED_MARK in files:
            below.clear()
        else:
            yield Path(folder)
