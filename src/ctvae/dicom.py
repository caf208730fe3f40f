"""DICOM CT series in. The only importer of pydicom.

A series is the files of one folder that share a SeriesInstanceUID. Slices are put in order by their position along the
normal of the image plane; the slice distance is measured from those positions, never taken from SliceThickness.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from ctvae.errors import CtvaeError, InputError, ScanRejected, ScanTooLarge
from ctvae.nifti import MAX_SHEAR_DEGREES, MAX_VOXELS, affine_problem, gathered
from ctvae.volume import Orientation, Volume, canonical

SPACING_TOLERANCE = 0.01  # of the slice distance
ROUNDING_MM = 0.02  # positions are often written with two decimals
PATIENT_ROUNDS = 50_000
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GEOMETRY = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}  # how many
MODALITY = re.compile(r"[A-Z]{2,10}|none")
UNREADABLE = "unreadable"  # stands for the series of files that say none


@dataclass(frozen=True)
class Series:
    """The files of one series in one folder."""

    folder: Path
    uid: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Meta:
    """What the headers say that the voxels do not."""

    patient: str | None  # salted hash of the PatientID
    modality: str
    slices: int
    localizers: int  # scout images within the series, left out


def series_in(folder: Path) -> list[Series]:
    """The DICOM series directly in `folder`, sorted by UID; none where it holds no DICOM. Raises InputError.

    A damaged file may belong to any of them, so all are given it and refused for it when they are read.
    """
    files: dict[str, list[Path]] = {}
    damaged = []
    for path in _dicom_files(folder):
        try:
            with _parsing(path):
                header = _parsed(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
                uid = str(header.get("SeriesInstanceUID") or "")
                directory = header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
        except ScanRejected:
            uid, directory = "", False
        if uid:
            files.setdefault(uid, []).append(path)
        elif not directory:
            damaged.append(path)
    if damaged and not files:
        files[UNREADABLE] = []
    return [Series(folder, uid, (*paths, *damaged)) for uid, paths in sorted(files.items())]


def read_folder(folder: Path, salt: str = "") -> list[tuple[Volume, Orientation, Meta]]:
    """Every series directly in `folder`. Raises ScanRejected as `read_series`, and where there is none."""
    found = series_in(folder)
    if not found:
        raise ScanRejected(f"{folder}: holds no DICOM series")
    return [read_series(series, salt) for series in found]


def read_series(series: Series, salt: str = "") -> tuple[Volume, Orientation, Meta]:
    """One CT series in canonical axes, the way back to its stored rows and columns, and what its headers say.

    The patient is known by a hash with `salt`, and not at all without. Raises ScanRejected: not CT, only localizers,
    multi-frame, fewer than two slices, slices of several patients, no position or rescale in the header, slices of different
    size or direction, gantry tilt, duplicate, missing or unevenly spaced slices, compressed pixels that cannot be decoded,
    NaN, damaged files, more voxels than memory holds.
    """
    with _parsing(series.folder):
        return _read(series, salt)


def _read(series: Series, salt: str) -> tuple[Volume, Orientation, Meta]:
    name = series.folder
    headers = [_header(path) for path in series.files]
    images = [header for header in headers if "LOCALIZER" not in (header.get("ImageType") or [])]
    _check_modality(name, headers, images)
    _check_uniform(name, images)
    images, positions_mm = _sorted(images)
    affine = _affine(name, images[0], positions_mm)
    depth, height, width = len(images), int(images[0].Rows), int(images[0].Columns)
    slices = (_values(name, image, (height, width)) for image in images)
    values = gathered(name, slices, depth * height * width).reshape(depth, height, width)  # [K J I]
    volume, orientation = canonical(values.transpose(2, 1, 0), affine)
    patient = hashed_patient(_patient_id(images[0]), salt)
    return volume, orientation, Meta(patient, str(images[0].Modality), len(images), len(headers) - len(images))


def hashed_patient(patient_id: str, salt: str) -> str | None:
    """A pseudonym: the same for the same PatientID and salt, slow to guess back; none where either is empty."""
    if not patient_id.strip() or not salt:
        return None
    return hashlib.pbkdf2_hmac("sha256", patient_id.strip().encode(), salt.encode(), PATIENT_ROUNDS).hex()[:16]


def _patient_id(image: FileDataset) -> str:
    return str(image.get("PatientID") or "")


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """What pydicom makes of damaged bytes becomes one line, and its warnings are not the reader's concern."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # what becomes infinite is refused
        warnings.simplefilter("ignore")
        try:
            yield
        except MemoryError as error:
            raise ScanTooLarge(f"{path}: needs more memory than there is") from error
        except CtvaeError:
            raise
        except Exception as error:  # of any kind, some of its own; and the message may quote what is a patient's name
            raise ScanRejected(f"{path}: damaged DICOM ({type(error).__name__})") from error


def _parsed(path: Path, **options: Any) -> FileDataset:
    """The file's data set. Deflated ones are refused: they unpack to any size before anything of them can be read."""
    with path.open("rb") as file:
        read_preamble(file, force=False)
        if _read_file_meta_info(file).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise ScanRejected(f"{path}: deflated DICOM; convert it, with dcm2niix for instance")
        file.seek(0)
        return pydicom.dcmread(file, **options)


def _dicom_files(folder: Path) -> list[Path]:
    """Files with the DICOM mark at byte 128, whatever their name."""
    found = []
    try:
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if not name.startswith(".") and path.is_file():
                with path.open("rb") as file:
                    if file.read(132)[128:] == b"DICM":
                        found.append(path)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return found


def _header(path: Path) -> FileDataset:
    """Everything but the pixels, which are read slice by slice when all headers are found good."""
    with _parsing(path):
        header = _parsed(path, stop_before_pixels=True)
        if not header.get("SeriesInstanceUID"):
            raise ScanRejected(f"{path}: damaged DICOM (it names no series)")
        return header


def _check_modality(name: Path, headers: list[FileDataset], images: list[FileDataset]) -> None:
    modalities = sorted({str(header.get("Modality") or "none") for header in headers})
    if modalities != ["CT"]:
        named = [modality if MODALITY.fullmatch(modality) else "unknown" for modality in modalities]
        raise ScanRejected(f"{name}: not CT (modality {' and '.join(named[:3])})")
    if not images:
        raise ScanRejected(f"{name}: a localizer, not a scan")
    if any(int(image.get("NumberOfFrames", None) or 1) > 1 for image in images):
        raise ScanRejected(f"{name}: multi-frame DICOM; convert it to NIfTI, with dcm2niix for instance")
    if len(images) < 2:
        raise ScanRejected(f"{name}: too few slices: {len(images)}, a series needs 2")
    if len({_patient_id(image) for image in images}) > 1:
        raise ScanRejected(f"{name}: its slices are of several patients (PatientID differs)")
    if len({str(image.get("SeriesInstanceUID")) for image in images}) > 1:
        raise ScanRejected(f"{name}: its slices are of several series; some may be damaged")


def _check_uniform(name: Path, images: list[FileDataset]) -> None:
    """Every slice has a position, and all have the same size, pixel and direction."""
    for key, length in GEOMETRY.items():
        if any(image.get(key) is None for image in images):
            raise ScanRejected(f"{name}: no usable affine ({key} is missing)")
        rows = [np.atleast_1d(image.get(key)).astype(np.float64) for image in images]
        if any(len(row) != length or not np.isfinite(row).all() for row in rows):
            raise ScanRejected(f"{name}: no usable affine ({key} is not {length} finite numbers)")
        if key != "ImagePositionPatient" and max(float(np.abs(row - rows[0]).max()) for row in rows) > 1e-3:
            raise ScanRejected(f"{name}: its slices differ in {key}; put each acquisition into its own folder")
    first = images[0]
    directions = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    if np.abs(np.linalg.norm(directions, axis=1) - 1).max() > 1e-3 or min(map(float, first.PixelSpacing)) <= 0:
        raise ScanRejected(f"{name}: no usable affine (directions not of length one, or a pixel spacing that is not positive)")
    if not 0 < int(first.Rows) * int(first.Columns) * len(images) <= MAX_VOXELS:
        claimed = f"{len(images)}x{first.Rows}x{first.Columns}"
        raise ScanRejected(f"{name}: {claimed} voxels are none or more than the limit of {MAX_VOXELS}")


def _sorted(images: list[FileDataset]) -> tuple[list[FileDataset], np.ndarray]:
    """Slices along the normal of the image plane, and their positions [K 3] in LPS mm."""
    positions_mm = np.array([image.ImagePositionPatient for image in images], dtype=np.float64)
    order = np.argsort(positions_mm @ _normal(images[0]), kind="stable")
    return [images[n] for n in order], positions_mm[order]


def _normal(image: FileDataset) -> np.ndarray:
    along_row, along_column = np.array(image.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    return np.cross(along_row, along_column)


def _affine(name: Path, image: FileDataset, positions_mm: np.ndarray) -> np.ndarray:
    """[4 4] from (column, row, slice) to RAS mm, after DICOM PS3.3 C.7.6.2.1.1."""
    _check_spacing(name, positions_mm @ _normal(image))
    step_mm = (positions_mm[-1] - positions_mm[0]) / (len(positions_mm) - 1)
    _check_straight(name, image, positions_mm, step_mm)
    along_row, along_column = np.array(image.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    row_mm, column_mm = (float(value) for value in image.PixelSpacing)  # between rows, between columns
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_mm
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = step_mm
    affine[:3, 3] = positions_mm[0]
    reason = affine_problem(affine)
    if reason:
        raise ScanRejected(f"{name}: no usable affine ({reason})")
    return LPS_TO_RAS @ affine


def _check_spacing(name: Path, heights_mm: np.ndarray) -> None:
    gaps_mm = np.diff(heights_mm)
    usual_mm = float(np.median(gaps_mm))
    tolerance_mm = max(SPACING_TOLERANCE * usual_mm, ROUNDING_MM)
    duplicates = int((gaps_mm < tolerance_mm).sum())
    if duplicates:
        raise ScanRejected(f"{name}: {duplicates} duplicate slices (the same position twice); keep one of each")
    uneven = np.flatnonzero(np.abs(gaps_mm - usual_mm) > tolerance_mm)
    if len(uneven):
        raise ScanRejected(
            f"{name}: missing or uneven slices: {gaps_mm.min():.2f} to {gaps_mm.max():.2f} mm apart, usually "
            f"{usual_mm:.2f}, {len(uneven)} of {len(gaps_mm)} gaps off by more than {tolerance_mm:.2f}, the first "
            f"after slice {uneven[0] + 1}"
        )


def _check_straight(name: Path, image: FileDataset, positions_mm: np.ndarray, step_mm: np.ndarray) -> None:
    """Slices lie on a straight line, square to the image plane."""
    cosine = abs(float(step_mm @ _normal(image))) / max(float(np.linalg.norm(step_mm)), 1e-9)
    tilt = math.degrees(math.acos(min(1.0, cosine)))
    if tilt > MAX_SHEAR_DEGREES:
        raise ScanRejected(f"{name}: gantry tilt of {tilt:.1f} degrees; convert it with dcm2niix, which straightens it")
    straight_mm = positions_mm[0] + np.arange(len(positions_mm))[:, None] * step_mm
    off_mm = float(np.abs(positions_mm - straight_mm).max())
    allowed_mm = max(min(float(value) for value in image.PixelSpacing), ROUNDING_MM)
    if off_mm > allowed_mm:
        raise ScanRejected(f"{name}: its slices are shifted against each other by up to {off_mm:.1f} mm")


def _values(name: Path, image: FileDataset, shape: tuple[int, int]) -> np.ndarray:
    """One slice [J I], rescaled."""
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        raise ScanRejected(f"{name}: RescaleSlope or RescaleIntercept is missing, so its values are not HU")
    try:
        stored = _parsed(Path(str(image.filename))).pixel_array
    except (MemoryError, CtvaeError):
        raise
    except Exception as error:  # of a decoder, whichever is installed
        syntax = image.file_meta.get("TransferSyntaxUID", "unknown")
        kind = getattr(syntax, "name", syntax)
        raise ScanRejected(f"{name}: pixels cannot be decoded ({kind}); damaged, or decompress them first") from error
    if stored.shape != shape:
        raise ScanRejected(f"{name}: colour pixels, not HU")
    return (stored * float(image.RescaleSlope) + float(image.RescaleIntercept)).astype(np.float32)
