"""NIfTI files and DICOM folders damaged on purpose, each a function of (seed, index) alone.

`nifti_case` and `dicom_case` write one small scan that the readers would take, with one to three things wrong with it, and
say what. `benchmarks/fuzz_files.py` reads ten thousand of them; `test_hostile_files.py` a few.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

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


def _flip_anywhere(rng: random.Random, raw: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 50)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return raw


def _random_voxels(rng: random.Random, raw: bytearray) -> bytearray:
    """Floats become NaN, infinite and denormal."""
    start = min(544, len(raw))
    return raw[:start] + rng.randbytes(len(raw) - start)


def _blank(rng: random.Random, raw: bytearray) -> bytearray:
    start = rng.randrange(len(raw))
    stop = rng.randrange(start, len(raw)) + 1
    raw[start:stop] = bytes([rng.choice((0, 255))]) * (stop - start)
    return raw


def _truncate(rng: random.Random, raw: bytearray) -> bytearray:
    return raw[: max(1, rng.choice((rng.randrange(len(raw)), rng.randrange(600), len(raw) - 1)))]


def _extend(rng: random.Random, raw: bytearray) -> bytearray:
    return raw + rng.randbytes(rng.randint(1, 2000))


def _insert(rng: random.Random, raw: bytearray) -> bytearray:
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
    return bytes(_flip_anywhere(rng, bytearray(gzip.compress(bytes(raw), 1))))


def _packed_and_cut(rng: random.Random, raw: bytearray) -> bytes:
    return bytes(_truncate(rng, bytearray(gzip.compress(bytes(raw), 1))))


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
    _set_field, _set_field, _set_field, _claim_shape, _type_code, _scale, _flip_header, _flip_anywhere, _random_voxels,
    _blank, _truncate, _extend, _insert, _tilt,
)  # fmt: skip
GZIP_MUTATIONS = (_packed,) * 8 + (_packed_and_flipped,) * 4 + (_packed_and_cut,) * 4 + (_packed_in_members,) * 3 + (_bomb,)


# --- DICOM ---------------------------------------------------------------------------------------------------------------


def dicom_case(folder: Path, seed: int, index: int) -> tuple[Path, str]:
    """Writes a series, or something like one, into `folder`/d<index>; returns it and what was done to it."""
    rng = random.Random(f"dicom {seed} {index}")
    images = series(body(rng.randrange(2**30), (6, 16, 18)))
    described = "DICOM"
    target = folder / f"d{index}"
    target.mkdir()
    rounds = rng.choice((1, 1, 1, 2, 3))
    for _ in range(rounds):
        mutate = rng.choice(SERIES_MUTATIONS)
        described += f", {mutate.__name__.strip('_')}"
        try:
            mutate(rng, images)
        except Exception:  # pydicom refuses to make it so after what was done to it before
            described += " (refused)"
    files = [_encoded(image) for image in images]
    if rng.random() < 0.5:
        mutate_bytes = rng.choice(DICOM_BYTES)
        which = range(len(files)) if rng.random() < 0.2 else [rng.randrange(len(files))]
        for n in which:
            files[n] = bytes(mutate_bytes(rng, bytearray(files[n])))
        described += f", {mutate_bytes.__name__.strip('_')} in {len(list(which))}"
    for n, content in enumerate(files):
        (target / f"IM{n:03d}").write_bytes(content)
    return target, described


def series(hu: np.ndarray, uid: str = "1.2.3", modality: str = "CT") -> list[FileDataset]:
    """One axial series, 2.5 mm apart; stored values are HU + 1024."""
    images = []
    for n, plane in enumerate(hu):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = UID(f"{uid}.{n}")
        file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        file.Modality, file.PatientID, file.SeriesInstanceUID, file.InstanceNumber = modality, "MRN-0042", uid, n + 1
        file.PatientName, file.StudyDate, file.ImageType = "DOE^JANE", "20200102", ["ORIGINAL", "PRIMARY", "AXIAL"]
        file.ImagePositionPatient, file.ImageOrientationPatient = [-100, -50, 700 + 2.5 * n], [1, 0, 0, 0, 1, 0]
        file.PixelSpacing, file.SliceThickness = [0.9, 0.7], 5.0
        file.Rows, file.Columns = plane.shape
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
        file.RescaleSlope, file.RescaleIntercept = 1, -1024
        file.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
        images.append(file)
    return images


def _encoded(image: FileDataset) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image.save_as(buffer, enforce_file_format=True)
        except Exception:  # pydicom will not write this one; a plain one, cut short, stands for it
            plain = series(body(0, (2, 16, 18)))[0]
            buffer = io.BytesIO()
            plain.save_as(buffer, enforce_file_format=True)
            return buffer.getvalue()[:-100]
    return buffer.getvalue()


NUMBERS: tuple[Any, ...] = (0, -1, 1, 1e-30, 1e30, "nan", "inf", "-inf", "abc", "", "1\\2", 3, 0.7)
TAGS: dict[str, tuple[Any, ...]] = {
    "Modality": ("MR", "PT", "", "CT\\MR", "OT"),
    "PixelSpacing": ([0, 0], [-1, 1], ["nan", "nan"], [1e30, 1], [1], [1, 1, 1], ["inf", 1], "", [0.9, 0.7]),
    "ImageOrientationPatient": ([0] * 6, [1, 0, 0, 1, 0, 0], ["nan"] * 6, [1, 0, 0], [2, 0, 0, 0, 2, 0], ""),
    "ImagePositionPatient": ([0, 0, 0], ["nan", 0, 0], [0, 0], ["inf", 0, 700], [1e30, 0, 0], "", [0, 0, 700, 1]),
    "Rows": (0, 1, 15, 17, 60000, 65535),
    "Columns": (0, 1, 15, 17, 60000, 65535),
    "BitsAllocated": (0, 1, 8, 12, 32, 64, 65535),
    "BitsStored": (0, 1, 8, 12, 17, 65535),
    "HighBit": (0, 7, 11, 65535),
    "PixelRepresentation": (1, 2, 65535),
    "SamplesPerPixel": (0, 3, 4, 65535),
    "PhotometricInterpretation": ("RGB", "YBR_FULL_422", "PALETTE COLOR", "MONOCHROME1", "", "YBR_FULL"),
    "PlanarConfiguration": (0, 1, 7),
    "NumberOfFrames": ("0", "1", "2", "-1", "1000000", "abc", ""),
    "RescaleSlope": NUMBERS,
    "RescaleIntercept": NUMBERS,
    "SeriesInstanceUID": ("", "9.9", "not a uid", "1" * 200),
    "ImageType": ("", ["LOCALIZER"], ["ORIGINAL", "PRIMARY", "LOCALIZER"], "X" * 5000),
    "PatientID": ("", "\x00", "å" * 50, "MRN\\OTHER"),
    "SpecificCharacterSet": ("ISO_IR 192", "nonsense", ["", "ISO 2022 IR 87"], "ISO_IR 13"),
    "PixelData": (b"", b"\0", b"\0" * 7, b"\xff" * 100000),
}


def _set_tag(rng: random.Random, images: list[FileDataset]) -> None:
    """One tag becomes something else, in one slice or in all."""
    key = rng.choice(list(TAGS))
    value = rng.choice(TAGS[key])
    for image in images if rng.random() < 0.5 else [rng.choice(images)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                setattr(image, key, value)
            except Exception:  # pydicom refuses the value at once; the tag goes missing then
                if key in image:
                    delattr(image, key)


def _drop_tag(rng: random.Random, images: list[FileDataset]) -> None:
    key = rng.choice(list(TAGS))
    for image in images if rng.random() < 0.5 else [rng.choice(images)]:
        if key in image:
            delattr(image, key)


def _lose_slices(rng: random.Random, images: list[FileDataset]) -> None:
    for _ in range(rng.randint(1, 3)):
        if len(images) > 1:
            images.pop(rng.randrange(len(images)))


def _repeat_slices(rng: random.Random, images: list[FileDataset]) -> None:
    images += rng.sample(images, rng.randint(1, len(images)))


def _mixed_series(rng: random.Random, images: list[FileDataset]) -> None:
    images += series(body(1, (rng.randint(1, 4), 16, 18)), rng.choice(("1.2.3", "4.5.6")), rng.choice(("CT", "MR")))


def _gantry_tilt(rng: random.Random, images: list[FileDataset]) -> None:
    angle = rng.choice((0.02, 0.1, 0.3, 1.2))
    for n, image in enumerate(images):
        image.ImagePositionPatient = [-100, round(-50 + 2.5 * n * np.tan(angle), 4), 700 + 2.5 * n]


def _syntax(rng: random.Random, images: list[FileDataset]) -> None:
    """Another transfer syntax, with pixels that are not in it."""
    syntax = rng.choice((JPEG2000Lossless, JPEGLSLossless, JPEGBaseline8Bit, RLELossless, UID("1.2.3.4"), UID("")))
    for image in images:
        image.file_meta.TransferSyntaxUID = syntax
        if syntax in (JPEG2000Lossless, JPEGLSLossless, JPEGBaseline8Bit, RLELossless):
            frame = rng.choice((b"\xff\x4f\xff\x51", struct.pack("<16I", 2, *[rng.randrange(2**32) for _ in range(15)]), b""))
            image.PixelData = pydicom.encaps.encapsulate([frame + rng.randbytes(rng.choice((2, 64)))])
            image["PixelData"].VR = "OB"


def _syntax_that_works(rng: random.Random, images: list[FileDataset]) -> None:
    """The same pixels in another plain syntax."""
    syntax = rng.choice((ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless))
    for image in images:
        if syntax == RLELossless:
            image.compress(RLELossless, generate_instance_uid=False)
        else:
            image.file_meta.TransferSyntaxUID = syntax
            image["PixelData"].VR = "OW"


def _nested(rng: random.Random, images: list[FileDataset]) -> None:
    """Sequences in sequences."""
    inner = Dataset()
    for _ in range(rng.choice((5, 50, 200))):
        outer = Dataset()
        outer.ReferencedSeriesSequence = Sequence([inner])
        inner = outer
    rng.choice(images).ReferencedSeriesSequence = Sequence([inner])


def _deflate_bomb(rng: random.Random, raw: bytearray) -> bytes:
    """A deflated data set that becomes 256 MiB."""
    buffer = io.BytesIO()
    image = series(body(0, (2, 16, 18)))[0]
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    image.save_as(buffer, enforce_file_format=True)
    plain = buffer.getvalue()
    start = 132 + 12 + int.from_bytes(plain[140:144], "little")
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    data = b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
    return plain[:start] + data


def _claim_length(rng: random.Random, raw: bytearray) -> bytearray:
    """Some element claims gigabytes, or an undefined length."""
    at = rng.randrange(132, max(133, len(raw) - 8))
    struct.pack_into("<I", raw, at, rng.choice((0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x10000000, 0)))
    return raw


def _flip_tags(rng: random.Random, raw: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 30)):
        raw[rng.randrange(128, min(len(raw), 900))] ^= 1 << rng.randrange(8)
    return raw


SERIES_MUTATIONS: tuple[Callable[[random.Random, list[FileDataset]], None], ...] = (
    _set_tag, _set_tag, _set_tag, _set_tag, _drop_tag, _lose_slices, _repeat_slices, _mixed_series, _gantry_tilt, _syntax,
    _syntax_that_works, _nested,
)  # fmt: skip
DICOM_BYTES: tuple[Callable[[random.Random, bytearray], bytes | bytearray], ...] = (
    *(_flip_tags, _claim_length, _flip_anywhere, _truncate, _extend, _insert, _blank) * 4,
    _deflate_bomb,
)  # fmt: skip
