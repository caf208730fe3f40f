"""DICOM CT series in. The only importer of pydicom.

A series is the files of one folder that share a SeriesInstanceUID. Slices are put in order by their position along the
normal of the image plane; the slice distance is measured from those positions, never taken from SliceThickness.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError

from ctvae.errors import InputError, ScanRejected
from ctvae.nifti import MAX_SHEAR_DEGREES, MAX_VOXELS, affine_problem, narrowed
from ctvae.volume import Orientation, Volume, canonical

SPACING_TOLERANCE = 0.01  # of the slice distance
ROUNDING_MM = 0.02  # positions are often written with two decimals
PATIENT_SALT = b"ctvae patient"
PATIENT_ROUNDS = 50_000
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")


@dataclass(frozen=True)
class Series:
    """The files of one series in one folder."""

    folder: Path
    uid: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Meta:
    """What the headers say that the voxels do not."""

    patient: str | None  # hashed PatientID
    modality: str
    slices: int
    localizers: int  # scout images within the series, left out


def series_in(folder: Path) -> list[Series]:
    """The DICOM series directly in `folder`, sorted by UID; none where it holds no DICOM. Raises InputError."""
    files: dict[str, list[Path]] = {}
    for path in _dicom_files(folder):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        except (InvalidDicomError, EOFError, OSError):
            continue  # neither an image nor anybody's scan
        if "SeriesInstanceUID" in header:
            files.setdefault(str(header.SeriesInstanceUID), []).append(path)
    return [Series(folder, uid, tuple(paths)) for uid, paths in sorted(files.items())]


def read_folder(folder: Path) -> list[tuple[Volume, Orientation, Meta]]:
    """Every series directly in `folder`. Raises ScanRejected as `read_series`, and where there is none."""
    found = series_in(folder)
    if not found:
        raise ScanRejected(f"{folder}: holds no DICOM series")
    return [read_series(series) for series in found]


def read_series(series: Series) -> tuple[Volume, Orientation, Meta]:
    """One CT series in canonical axes, the way back to its stored rows and columns, and what its headers say.

    Raises ScanRejected: not CT, only localizers, multi-frame, fewer than two slices, no position or rescale in the
    header, slices of different size or direction, gantry tilt, duplicate, missing or unevenly spaced slices, compressed
    pixels that cannot be decoded.
    """
    name = series.folder
    headers = [_header(path) for path in series.files]
    images = [header for header in headers if "LOCALIZER" not in header.get("ImageType", [])]
    _check_modality(name, headers, images)
    _check_uniform(name, images)
    images, positions_mm = _sorted(images)
    affine = _affine(name, images[0], positions_mm)
    values = np.stack([_values(name, image) for image in images])  # [K J I]
    volume, orientation = canonical(narrowed(values).transpose(2, 1, 0), affine)
    first = images[0]
    patient = hashed_patient(str(first.get("PatientID", "")))
    return volume, orientation, Meta(patient, str(first.Modality), len(images), len(headers) - len(images))


def hashed_patient(patient_id: str) -> str | None:
    """A pseudonym: the same for the same PatientID on every machine, slow to guess back; none for an empty one."""
    if not patient_id.strip():
        return None
    return hashlib.pbkdf2_hmac("sha256", patient_id.strip().encode(), PATIENT_SALT, PATIENT_ROUNDS).hex()[:16]


def _dicom_files(folder: Path) -> list[Path]:
    """Files with the DICOM mark at byte 128, whatever their name."""
    found = []
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                with path.open("rb") as file:
                    if file.read(132)[128:] == b"DICM":
                        found.append(path)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return found


def _header(path: Path) -> FileDataset:
    """Headers with their pixels left on disk until they are asked for."""
    try:
        return pydicom.dcmread(path, defer_size="16 KB")
    except (InvalidDicomError, EOFError, OSError, ValueError) as error:
        raise ScanRejected(f"{path}: damaged DICOM file ({str(error).splitlines()[0]})") from error


def _check_modality(name: Path, headers: list[FileDataset], images: list[FileDataset]) -> None:
    modality = str(headers[0].get("Modality", "none"))
    if modality != "CT":
        raise ScanRejected(f"{name}: not CT (modality {modality})")
    if not images:
        raise ScanRejected(f"{name}: a localizer, not a scan")
    if any(int(image.get("NumberOfFrames", None) or 1) > 1 for image in images):
        raise ScanRejected(f"{name}: multi-frame DICOM; convert it to NIfTI, with dcm2niix for instance")
    if len(images) < 2:
        raise ScanRejected(f"{name}: too few slices: {len(images)}, a series needs 2")


def _check_uniform(name: Path, images: list[FileDataset]) -> None:
    """Every slice has a position, and all have the same size, pixel and direction."""
    for key in GEOMETRY:
        if any(image.get(key) is None for image in images):
            raise ScanRejected(f"{name}: no usable affine ({key} is missing)")
        values = np.array([np.atleast_1d(image.get(key)) for image in images], dtype=np.float64)
        if key != "ImagePositionPatient" and np.abs(values - values[0]).max() > 1e-3:
            raise ScanRejected(f"{name}: its slices differ in {key}; put each acquisition into its own folder")
    first = images[0]
    if first.Rows * first.Columns * len(images) > MAX_VOXELS:
        claimed = f"{len(images)}x{first.Rows}x{first.Columns}"
        raise ScanRejected(f"{name}: {claimed} voxels are more than the limit of {MAX_VOXELS}")


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


def _values(name: Path, image: FileDataset) -> np.ndarray:
    """One slice [J I], rescaled."""
    if image.get("RescaleSlope") is None or image.get("RescaleIntercept") is None:
        raise ScanRejected(f"{name}: RescaleSlope or RescaleIntercept is missing, so its values are not HU")
    try:
        stored = image.pixel_array
    except (AttributeError, RuntimeError, NotImplementedError, ValueError, OSError) as error:
        syntax = image.file_meta.get("TransferSyntaxUID", "unknown")
        kind = getattr(syntax, "name", syntax)
        raise ScanRejected(f"{name}: pixels cannot be decoded ({kind}); damaged, or decompress them first") from error
    if stored.ndim != 2:
        raise ScanRejected(f"{name}: colour pixels, not HU")
    return (stored * float(image.RescaleSlope) + float(image.RescaleIntercept)).astype(np.float32)
