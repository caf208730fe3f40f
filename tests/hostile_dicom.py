"""DICOM folders damaged on purpose, each a function of (seed, index) alone; as `hostile_files.py`, which mutates plain bytes."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from hostile_files import blank, body, extend, flip_anywhere, insert, truncate
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
    *(_flip_tags, _claim_length, flip_anywhere, truncate, extend, insert, blank) * 4,
    _deflate_bomb,
)  # fmt: skip
