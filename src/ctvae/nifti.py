"""NIfTI files in and out. The only importer of nibabel.

The header is read unrepaired (nibabel would mend some faults silently) and checked before any voxel is allocated.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from ctvae.errors import ScanRejected
from ctvae.files import atomic
from ctvae.volume import Orientation, Volume, canonical, spacing_of

MAX_VOXELS = 2**31
MAX_SHEAR_DEGREES = 1.0
SPACING_RANGE_MM = (0.01, 100.0)
INT16 = np.iinfo(np.int16)
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
DEFLATE_LIMIT = 1032  # deflate cannot expand further than this
Stream = gzip.GzipFile | io.BufferedReader
NOT_MM = {1: "metres", 3: "micrometres"}  # codes of xyzt_units
TRUNCATED = "ends before its last voxel (truncated file); copy it again"


def is_nifti(path: Path) -> bool:
    """Whether the name ends in `.nii` or `.nii.gz`."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read(path: Path, max_voxels: int = MAX_VOXELS) -> tuple[Volume, Orientation]:
    """A 3D scan in canonical axes and the way back.

    Voxels are scaled as the header says: int16 where that is exact, else float32.

    Raises ScanRejected: missing or not NIfTI, truncated, not 3D, empty, more than `max_voxels`, complex or colour
    voxels, NaN or infinite voxels, no usable affine.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            header = _header(path, file)
            shape = _shape(path, header, max_voxels)
            affine = _affine(path, header)
            values = _values(path, header, file, math.prod(shape))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanRejected(f"{path}: damaged or truncated gzip; copy it again") from error
    except (HeaderDataError, KeyError) as error:  # KeyError: an unknown code, of the voxel type for instance
        raise ScanRejected(f"{path}: damaged NIfTI header ({error})") from error
    except OSError as error:
        raise ScanRejected(f"{path}: cannot be read ({error.strerror or error})") from error
    return canonical(values.reshape(shape, order="F"), affine)


def read_labels(path: Path) -> tuple[Volume, Orientation]:
    """A label map in canonical axes: its `hu` holds int16 labels.

    Raises ScanRejected as `read`, and for values that are not whole numbers.
    """
    volume, orientation = read(path)
    if volume.hu.dtype != np.int16:
        raise ScanRejected(f"{path}: not a label map (its values are not whole numbers in {INT16.min}..{INT16.max})")
    return volume, orientation


def write(path: Path, volume: Volume, orientation: Orientation | None = None, description: str = "") -> None:
    """Write `volume` as int16 HU, in the stored axes of `orientation` if given; whole or not at all.

    HU are rounded and clipped to int16. Both affines are stored as scanner coordinates in mm; NIfTI-1 keeps them as
    float32. `description` goes to `descrip` (79 ASCII characters); the header holds no other text. `.gz` compresses.
    Raises InputError when the file cannot be written.
    """
    data_ijk, affine = orientation.restore(volume) if orientation else (volume.hu.transpose(2, 1, 0), volume.affine)
    image = nib.Nifti1Image(_as_int16(data_ijk), None)
    image.header.set_slope_inter(1.0, 0.0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with atomic(Path(path)) as temporary:
        nib.save(image, temporary)


def mapped(path: Path) -> np.ndarray:
    """The int16 voxels [D H W] of an uncompressed file that `write` made in canonical axes, read as they are touched.

    Copy-on-write: changes stay in memory. Raises ScanRejected when the file is missing, damaged or not such a file.
    """
    try:
        image = nib.load(path)
        voxels = image.dataobj.get_unscaled()  # type: ignore[attr-defined]
    except (OSError, ValueError, nib.filebasedimages.ImageFileError, HeaderDataError) as error:
        raise ScanRejected(f"{path}: missing or damaged; prepare the dataset again") from error
    if voxels.ndim != 3 or voxels.dtype != np.int16:
        raise ScanRejected(f"{path}: not a group of int16 slices; prepare the dataset again")
    return voxels.transpose(2, 1, 0)


def _opened(path: Path) -> Stream:
    if not path.is_file():
        raise ScanRejected(f"{path}: no such file")
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _header(path: Path, file: Stream) -> Any:
    """The header as it is in the file, in either byte order."""
    raw = file.read(540)
    for size, header in HEADERS.items():
        if len(raw) >= size and size in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")):
            return header(raw[:size], check=False)
    raise ScanRejected(f"{path}: not a NIfTI file" if raw else f"{path}: empty file")


def _shape(path: Path, header: Any, max_voxels: int) -> tuple[int, int, int]:
    """I J K; trailing axes of length one are dropped."""
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7:
        raise ScanRejected(f"{path}: damaged NIfTI header (it claims {ndim} axes)")
    shape = [int(n) for n in header["dim"][1 : ndim + 1]]
    if min(shape) < 1:
        raise ScanRejected(f"{path}: empty (its shape is {'x'.join(map(str, shape))})")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    claimed = "x".join(map(str, shape))
    if len(shape) != 3 or min(shape) == 1:
        raise ScanRejected(f"{path}: not 3D (its shape is {claimed})")
    if math.prod(shape) > max_voxels:
        raise ScanRejected(f"{path}: the header claims {claimed} voxels, more than the limit of {max_voxels}")
    i, j, k = shape
    return i, j, k


def _affine(path: Path, header: Any) -> np.ndarray:
    """[4 4] from the sform, else the qform."""
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        raise ScanRejected(f"{path}: no usable affine (sform_code and qform_code are 0: its place in space is unknown)")
    pixdim_mm = header["pixdim"][1:4].astype(np.float64)
    if not np.isfinite(pixdim_mm).all() or (pixdim_mm <= 0).any():
        raise ScanRejected(f"{path}: no usable affine (voxel spacing {_numbers(pixdim_mm)} is not positive)")
    units = int(header["xyzt_units"]) % 8
    if units in NOT_MM:
        raise ScanRejected(f"{path}: no usable affine (in {NOT_MM[units]}; convert it to millimetres)")
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    reason = affine_problem(affine)
    if reason:
        raise ScanRejected(f"{path}: no usable affine ({reason})")
    return affine


def affine_problem(affine: np.ndarray) -> str:
    """Why `affine` [4 4] cannot be a scan's, or nothing."""
    if not np.isfinite(affine).all():
        return "it holds NaN or infinity"
    spacing_mm = np.array(spacing_of(affine))
    if not all(SPACING_RANGE_MM[0] <= step <= SPACING_RANGE_MM[1] for step in spacing_mm):
        return f"a spacing of {_numbers(spacing_mm)} mm is not within {SPACING_RANGE_MM[0]:g}..{SPACING_RANGE_MM[1]:g}"
    axes = affine[:3, :3] / spacing_mm
    if abs(np.linalg.det(axes)) < 0.1:
        return "it is singular"
    shear = math.degrees(math.asin(min(1.0, np.abs(axes.T @ axes - np.eye(3)).max())))
    if shear > MAX_SHEAR_DEGREES:
        return f"its axes are {shear:.1f} degrees from square, as after a gantry tilt; resample it to a straight grid"
    return ""


def _values(path: Path, header: Any, file: Stream, count: int) -> np.ndarray:
    """`count` voxels as one line, scaled and checked."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ScanRejected(f"{path}: complex or colour voxels ({dtype}), not HU")
    values = _raw(path, header, file, count, dtype)
    slope, intercept = header.get_slope_inter()
    if (slope, intercept) not in ((None, None), (1.0, 0.0)):
        values = values * np.float64(slope) + np.float64(intercept)
    values = narrowed(values)
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise ScanRejected(f"{path}: holds NaN or infinite voxels")
    return values


def _raw(path: Path, header: Any, file: Stream, count: int, dtype: np.dtype) -> np.ndarray:
    start = max(float(header["vox_offset"]), header.sizeof_hdr + 4)
    end = start + count * dtype.itemsize
    expansion = DEFLATE_LIMIT if isinstance(file, gzip.GzipFile) else 1
    if not end <= path.stat().st_size * expansion:  # also where the offset is NaN
        raise ScanRejected(f"{path}: {TRUNCATED}")
    buffer = bytearray(count * dtype.itemsize)
    file.seek(int(start))
    filled, view = 0, memoryview(buffer)
    while filled < len(buffer):
        step = file.readinto(view[filled:])
        if not step:
            raise ScanRejected(f"{path}: {TRUNCATED}")
        filled += step
    file.read(1)  # the end of a gzip holds its checksum
    return np.frombuffer(buffer, dtype=dtype)


def narrowed(values: np.ndarray) -> np.ndarray:
    """int16 where that changes nothing, else float32."""
    if values.dtype == np.int16:
        return values.astype(np.int16, copy=False)
    fits = values.min() >= INT16.min and values.max() <= INT16.max
    if fits and (values.dtype.kind != "f" or np.array_equal(values, np.rint(values))):
        return values.astype(np.int16)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which `read` rejects
        return values.astype(np.float32)


def _as_int16(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int16:
        return values
    return np.clip(np.rint(values), INT16.min, INT16.max).astype(np.int16)


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
