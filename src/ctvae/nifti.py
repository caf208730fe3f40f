"""NIfTI files in and out. The only importer of nibabel.

The header is read unrepaired (nibabel would mend some faults silently) and checked before any voxel is allocated.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from nibabel.spatialimages import HeaderDataError

from ctvae.errors import ScanRejected, ScanTooLarge
from ctvae.files import atomic
from ctvae.volume import Orientation, Volume, canonical, spacing_of

MAX_VOXELS = 2**31
MAX_SHEAR_DEGREES = 1.0
SPACING_RANGE_MM = (0.01, 100.0)
FURTHEST_MM = 1e6  # a scan's first voxel from the scanner's origin
INT16 = np.iinfo(np.int16)
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
MAGIC = {b"n+1", b"n+2"}  # header and voxels in one file
SLAB_VOXELS = 2**22  # read and scaled at a time
BYTES_PER_VOXEL = 8  # float32, and again in canonical axes; int16 takes half
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

    Raises ScanRejected: missing or not NIfTI, truncated, not 3D, empty, more than `max_voxels` or than memory holds,
    complex or colour voxels, NaN or infinite voxels, no usable affine.
    """
    path = Path(path)
    try:
        with _opened(path) as file, np.errstate(all="ignore"):  # what becomes infinite is refused
            header = _header(path, file)
            shape = _shape(path, header, max_voxels)
            affine = _affine(path, header)
            values = _values(path, header, file, math.prod(shape))
        return canonical(values.reshape(shape, order="F"), affine)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanRejected(f"{path}: damaged or truncated gzip; copy it again") from error
    except (HeaderDataError, LookupError, ValueError, OverflowError) as error:  # of codes and numbers that mean nothing
        raise ScanRejected(f"{path}: damaged NIfTI header ({' '.join(str(error).split())[:200]})") from error
    except MemoryError as error:
        raise ScanTooLarge(f"{path}: needs more memory than there is") from error
    except OSError as error:
        raise ScanRejected(f"{path}: cannot be read ({error.strerror or error})") from error


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
        with path.open("rb") as file:
            header = _header(path, file)
        shape = tuple(int(n) for n in header["dim"][1:4])
        dtype = header.get_data_dtype()
        if int(header["dim"][0]) != 3 or dtype != np.dtype("<i2") or min(shape) < 1:
            raise ScanRejected(f"{path}: not a group of int16 slices; prepare the dataset again")
        voxels = np.memmap(path, dtype, "c", int(header["vox_offset"]), shape, order="F")
    except (OSError, ValueError, OverflowError, LookupError, HeaderDataError) as error:
        raise ScanRejected(f"{path}: missing or damaged; prepare the dataset again") from error
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
            found = header(raw[:size], check=False)
            if bytes(found["magic"])[:3] in MAGIC:
                return found
    raise ScanRejected(f"{path}: not a NIfTI file with its voxels inside" if raw else f"{path}: empty file")


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
    if (furthest_mm := np.abs(affine[:3, 3]).max()) > FURTHEST_MM:
        return f"its first voxel is {furthest_mm:g} mm from the origin"
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
    slope, intercept = header.get_slope_inter()
    if np.isinf(header["scl_slope"]):  # 0 and NaN say that nothing is to be scaled
        raise ScanRejected(f"{path}: damaged NIfTI header (scl_slope is infinite)")
    _seek_voxels(path, header, file, count * dtype.itemsize)
    slabs = _slabs(path, file, count, dtype)
    if (slope, intercept) not in ((None, None), (1.0, 0.0)):
        slabs = (slab * np.float64(slope) + np.float64(intercept) for slab in slabs)
    return gathered(path, slabs, count, plain=dtype.newbyteorder("=") == np.int16)


def _seek_voxels(path: Path, header: Any, file: Stream, size: int) -> None:
    """To the first of `size` bytes of voxels, which the file has to be long enough for."""
    start = max(float(header["vox_offset"]), header.sizeof_hdr + 4)
    expansion = DEFLATE_LIMIT if isinstance(file, gzip.GzipFile) else 1
    if not start + size <= path.stat().st_size * expansion:  # also where the offset is NaN
        raise ScanRejected(f"{path}: {TRUNCATED}")
    file.seek(int(start))


def _slabs(path: Path, file: Stream, count: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The stored voxels, some million at a time."""
    for first in range(0, count, SLAB_VOXELS):
        yield np.frombuffer(_filled(path, file, min(SLAB_VOXELS, count - first) * dtype.itemsize), dtype=dtype)
    file.read(1)  # the end of a gzip holds its checksum


def _filled(path: Path, file: Stream, size: int) -> bytearray:
    buffer = bytearray(size)
    filled, view = 0, memoryview(buffer)
    while filled < size:
        step = file.readinto(view[filled:])
        if not step:
            raise ScanRejected(f"{path}: {TRUNCATED}")
        filled += step
    return buffer


def gathered(path: Path, parts: Iterable[np.ndarray], count: int, plain: bool = False) -> np.ndarray:
    """The `parts` as one line of `count` values: int16 where that changes nothing, else float32.

    `plain`: they are int16. Raises ScanRejected, naming `path`, for NaN and infinite values, and where memory is short.
    """
    _check_memory(path, count * (BYTES_PER_VOXEL // 2 if plain else BYTES_PER_VOXEL))
    values = np.empty(count, np.int16)
    start = 0
    for part in parts:
        part = narrowed(part.ravel())
        if part.dtype == np.float32:
            if not np.isfinite(part).all():
                raise ScanRejected(f"{path}: holds NaN or infinite voxels")
            values = values.astype(np.float32, copy=False)  # whole numbers so far
        values[start : start + part.size] = part
        start += part.size
    return values


def _check_memory(path: Path, needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise ScanTooLarge(f"{path}: needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def narrowed(values: np.ndarray) -> np.ndarray:
    """int16 where that changes nothing, else float32."""
    if values.dtype == np.int16:
        return values.astype(np.int16, copy=False)
    fits = values.min() >= INT16.min and values.max() <= INT16.max
    if fits and (values.dtype.kind != "f" or np.array_equal(values, np.rint(values))):
        return values.astype(np.int16)
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused
        return values.astype(np.float32)


def _as_int16(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int16:
        return values
    return np.clip(np.rint(values), INT16.min, INT16.max).astype(np.int16)


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)
