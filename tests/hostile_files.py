"""NIfTI files damaged on purpose, each a function of (seed, index) alone; `hostile_dicom.py` has DICOM folders.

`nifti_case` and `dicom_case` write one small scan that the readers would take, with one to three things wrong with it, and
say what. `benchmarks/fuzz_files.py` reads ten thousand of them; `test_hostile_files.py` a few.
"""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (12, 20, 24)  # D H W
AFFINE = np.diag([-1.5, -1.5, 3.0, 1.0])
INTEGERS = (0, 1, 2, -1, -32768, 32767, 60000, 2**31 - 1, -(2**31), 2**62, 3, 7, 8, 9, 255, 256, 348, 540)
FLOATS = (0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 1e-30, 1e30, 3.4e38, -3.4e38, 1e-3, 0.5, 352.0, 2.0**31)
BOMB_VOXELS = (512, 512, 256)  # 128 MiB of int16 zeros in 130 KB


def body(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """HU [D H W] that pass for CT: a disc of tissue in air."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[1:]), indexing="ij")
    hu = np.where((y / 0.6) ** 2 + (x / 0.8) ** 2 < 1, 60, -1000) + rng.integers(-20, 20, shape)
    return hu.astype(np.int16)


# --- NIfTI ---------------------------------------------------------------------------------------------------------------


def nifti_case(folder: Path, seed: int, index: int) -> tuple[Path, str]:
    """Writes `folder`/n<index>.nii or .nii.gz; returns it and what was done to it."""
    rng = random.Random(f"nifti {seed} {index}")
    raw, described = _plain_nifti(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate = rng.choice(NIFTI_MUTATIONS)
        described += f", {mutate.__name__.strip('_')}"
        try:
            raw = mutate(rng, raw)
        except struct.error:  # too short by now
            described += " (refused)"
    packed = rng.random() < 0.4
    if packed:
        mutate = rng.choice(GZIP_MUTATIONS)
        raw = mutate(rng, raw)
        described += f", {mutate.__name__.strip('_')}"
    path = folder / f"n{index}.nii{'.gz' if packed else ''}"
    path.write_bytes(raw)
    return path, described


def _plain_nifti(rng: random.Random) -> tuple[bytearray, str]:
    dtype = rng.choice(("<i2", ">i2", "<i2", "<i4", "<f4", ">f4", "<f8", "<i8", "|i1"))
    kind = rng.choice((nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image))
    data = body(rng.randrange(2**30)).transpose(2, 1, 0)
    data = np.clip(data, -128, 127) if dtype == "|i1" else data
    header = kind.header_class(endianness=">" if dtype[0] == ">" else "<")
    image = kind(data.astype(dtype), None, header, dtype=np.dtype(dtype).newbyteorder("="))
    image.set_sform(AFFINE, code="scanner")
    image.set_qform(AFFINE, code="scanner")
    image.header.set_xyzt_units("mm")
    return bytearray(image.to_bytes()), f"{kind.__name__} {dtype}"


def _set_field(rng: random.Random, raw: bytearray) -> bytearray:
    """One header field becomes something that somebody wrote there once."""
    fields = nib.Nifti1Header.template_dtype.fields
    name = rng.choice(list(fields))
    dtype, start = fields[name][:2]
    item = dtype.base
    count = dtype.itemsize // item.itemsize
    order = "<" if raw[0:1] == b"\x5c" else ">"
    for n in rng.sample(range(count), rng.randint(1, count)):
        at = start + n * item.itemsize
        if item.kind == "S":
            raw[at : at + item.itemsize] = rng.randbytes(item.itemsize)
        else:
            values = FLOATS if item.kind == "f" else INTEGERS
            bits = np.array(rng.choice(values)).astype(item.newbyteorder(order), casting="unsafe").tobytes()
            raw[at : at + item.itemsize] = bits
    return raw


def _claim_shape(rng: random.Random, raw: bytearray) -> bytearray:
    """Any number of axes, of any length: 60,000 cubed, 4D, one slice, none."""
    ndim = rng.choice((3, 3, 3, 0, 1, 2, 4, 5, 7, 8, -1))
    sizes = [rng.choice((1, 2, 12, 20, 24, 24, 0, -1, 512, 30000, 32767)) for _ in range(7)]
    order = "<" if raw[0:1] == b"\x5c" else ">"
    struct.pack_into(f"{order}8h", raw, 40, ndim, *sizes)
    return raw


def _type_code(rng: random.Random, raw: bytearray) -> bytearray:
    """Complex, RGB, RGBA, 8-bit, 128-bit, bits, nothing."""
    order = "<" if raw[0:1] == b"\x5c" else ">"
    code = rng.choice((0, 1, 2, 4, 8, 16, 32, 64, 128, 255, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1))
    struct.pack_into(f"{order}h", raw, 70, code)
    return raw


def _scale(rng: random.Random, raw: bytearray) -> bytearray:
    order = "<" if raw[0:1] == b"\x5c" else ">"
    struct.pack_into(f"{order}2f", raw, 112, rng.choice(FLOATS), rng.choice(FLOATS))
    return raw


def _flip_header(rng: random.Random, raw: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 20)):
        raw[rng.randrange(min(352, len(raw)))] ^= 1 << rng.randrange(8)
    return raw


def flip_anywhere(rng: random.Random, raw: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 50)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return raw


def _random_voxels(rng: random.Random, raw: bytearray) -> bytearray:
    """Floats become NaN, infinite and denormal."""
    start = min(544, len(raw))
    return raw[:start] + rng.randbytes(len(raw) - start)


def blank(rng: random.Random, raw: bytearray) -> bytearray:
    start = rng.randrange(len(raw))
    stop = rng.randrange(start, len(raw)) + 1
    raw[start:stop] = bytes([rng.choice((0, 255))]) * (stop - start)
    return raw


def truncate(rng: random.Random, raw: bytearray) -> bytearray:
    return raw[: max(1, rng.choice((rng.randrange(len(raw)), rng.randrange(600), len(raw) - 1)))]


def extend(rng: random.Random, raw: bytearray) -> bytearray:
    return raw + rng.randbytes(rng.randint(1, 2000))


def insert(rng: random.Random, raw: bytearray) -> bytearray:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.randint(1, 500)) + raw[at:]


def _tilt(rng: random.Random, raw: bytearray) -> bytearray:
    """Rows of the sform: sheared, singular, huge, NaN."""
    order = "<" if raw[0:1] == b"\x5c" else ">"
    if len(raw) >= 328:
        struct.pack_into(f"{order}4f", raw, rng.choice((280, 296, 312)), *(rng.choice((*FLOATS, 0.3, 3.0)) for _ in range(4)))
    return raw


def _packed(rng: random.Random, raw: bytearray) -> bytes:
    return gzip.compress(bytes(raw), 1)


def _packed_and_flipped(rng: random.Random, raw: bytearray) -> bytes:
    return bytes(flip_anywhere(rng, bytearray(gzip.compress(bytes(raw), 1))))


def _packed_and_cut(rng: random.Random, raw: bytearray) -> bytes:
    return bytes(truncate(rng, bytearray(gzip.compress(bytes(raw), 1))))


def _packed_in_members(rng: random.Random, raw: bytearray) -> bytes:
    at = rng.randrange(len(raw))
    return gzip.compress(bytes(raw[:at]), 1) + gzip.compress(bytes(raw[at:]), 1) + rng.randbytes(rng.choice((0, 9)))


def _bomb(rng: random.Random, raw: bytearray) -> bytes:
    """A little file that becomes 128 MiB of zeros, or claims sixty times that."""
    order = "<" if raw[0:1] == b"\x5c" else ">"
    if len(raw) >= 56:
        shape = rng.choice((BOMB_VOXELS, (1290, 1290, 1200), (32767, 32767, 2)))
        struct.pack_into(f"{order}8h", raw, 40, 3, *shape, 1, 1, 1, 1)
    return gzip.compress(bytes(raw[:544]), 1) + _zeros_packed()


def _zeros_packed(cache: dict[str, bytes] = {}) -> bytes:  # noqa: B006 (kept on purpose)
    if not cache:
        cache["zeros"] = gzip.compress(bytes(2 * BOMB_VOXELS[0] * BOMB_VOXELS[1] * BOMB_VOXELS[2]), 6)
    return cache["zeros"]


NIFTI_MUTATIONS: tuple[Callable[[random.Random, bytearray], bytearray], ...] = (
    _set_field, _set_field, _set_field, _claim_shape, _type_code, _scale, _flip_header, flip_anywhere, _random_voxels,
    blank, truncate, extend, insert, _tilt,
)  # fmt: skip
GZIP_MUTATIONS = (_packed,) * 8 + (_packed_and_flipped,) * 4 + (_packed_and_cut,) * 4 + (_packed_in_members,) * 3 + (_bomb,)
