"""DICOM series written by pydicom and read back: voxels where the headers say they are, or the reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from ctvae import dicom, nifti
from ctvae.errors import ScanRejected
from ctvae.scan import find_scans, read_found, read_scan
from ctvae.volume import position_mm

ROW_MM, COLUMN_MM = 0.9, 0.7  # between rows, between columns
HU = np.random.default_rng(2).integers(-1000, 1500, (6, 5, 8), dtype=np.int16)  # [slice row column]


def image(hu: np.ndarray, position_mm: tuple[float, float, float], uid: str, number: int) -> FileDataset:
    """One axial CT slice; stored values are HU + 1024."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.SeriesInstanceUID, file.InstanceNumber = "CT", "MRN-0042", uid, number
    file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.ImagePositionPatient, file.ImageOrientationPatient = list(position_mm), [1, 0, 0, 0, 1, 0]
    file.PixelSpacing, file.SliceThickness = [ROW_MM, COLUMN_MM], 5.0  # the thickness is not the distance
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *hu.shape, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.PixelData = (hu.astype(np.int32) + 1024).astype("<u2").tobytes()
    return file


def series(hu: np.ndarray = HU, step_mm=(0.0, 0.0, 2.5), uid: str = "1.2.3") -> list[FileDataset]:
    first = np.array([-100.0, -50.0, 700.0])
    return [image(plane, tuple(first + n * np.array(step_mm)), uid, n + 1) for n, plane in enumerate(hu)]


def write(folder: Path, images: list[FileDataset], prefix: str = "IM") -> Path:
    """File names say nothing about the order."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in np.random.default_rng(3).permutation(len(images)):
        images[n].save_as(folder / f"{prefix}{(n * 7) % 31:03d}", enforce_file_format=True)
    return folder


def read_one(folder: Path):
    (found,) = dicom.read_folder(folder)
    return found


def test_voxels_lie_where_the_headers_say(tmp_path):
    volume, orientation, meta = read_one(write(tmp_path / "ct", series()))
    assert volume.spacing_mm == pytest.approx((COLUMN_MM, ROW_MM, 2.5))
    np.testing.assert_array_equal(volume.hu, HU)  # rows go to posterior and columns to the left already
    for d, h, w in ((0, 0, 0), (5, 4, 7), (2, 3, 1)):
        lps_mm = np.array([-100 + w * COLUMN_MM, -50 + h * ROW_MM, 700 + d * 2.5])
        np.testing.assert_allclose(position_mm(volume.affine, (d, h, w)), lps_mm * [-1, -1, 1])
    assert meta.slices == 6
    stored, _ = orientation.restore(volume)
    np.testing.assert_array_equal(stored, HU.transpose(2, 1, 0))


def test_feet_first_sagittal_series_becomes_canonical(tmp_path):
    images = series(step_mm=(3.0, 0, 0))
    for file in images:
        file.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # columns to posterior, rows down
    volume, _, _ = read_one(write(tmp_path / "ct", images))
    index = (5 - 1, 8 - 3, 2)  # stored row 0 is the top: slice 2, row 0, column 5
    assert volume.hu[index] == HU[2, 0, 5]
    np.testing.assert_allclose(position_mm(volume.affine, index), [100 - 6, 50 - 5 * COLUMN_MM, 700])
    assert volume.spacing_mm == pytest.approx((3.0, COLUMN_MM, ROW_MM))


def test_slices_are_ordered_by_position_whatever_their_numbers(tmp_path):
    images = series(step_mm=(0, 0, -2.5))  # the first image is the highest
    volume, _, _ = read_one(write(tmp_path / "ct", images))
    np.testing.assert_array_equal(volume.hu, HU[::-1])
    np.testing.assert_allclose(position_mm(volume.affine, (0, 0, 0)), [100, 50, 700 - 5 * 2.5])


def test_each_slice_is_rescaled_by_its_own_header(tmp_path):
    images = series()
    images[3].RescaleSlope, images[3].RescaleIntercept = 0.5, -100
    volume, _, _ = read_one(write(tmp_path / "ct", images))
    np.testing.assert_allclose(volume.hu[3], (HU[3].astype(np.float32) + 1024) * 0.5 - 100)
    np.testing.assert_allclose(volume.hu[2], HU[2])


def test_series_in_one_folder_are_kept_apart_and_found(tmp_path):
    write(tmp_path / "study", series(uid="1.2.3"), "A")
    write(tmp_path / "study", series(HU[::-1], uid="1.2.4"), "B")
    (tmp_path / "study" / "README.txt").write_text("no scan")
    first, second = dicom.read_folder(tmp_path / "study")
    np.testing.assert_array_equal(first[0].hu, second[0].hu[::-1])
    assert [scan.series for scan in find_scans([tmp_path])] == ["1.2.3", "1.2.4"]
    np.testing.assert_array_equal(read_scan(tmp_path / "study", "1.2.4").volume.hu, HU[::-1])
    with pytest.raises(ScanRejected, match="holds 2 DICOM series"):
        read_scan(tmp_path / "study")


def test_dicom_and_nifti_of_one_scan_are_the_same_volume(tmp_path):
    volume, orientation, _ = read_one(write(tmp_path / "ct", series()))
    nifti.write(tmp_path / "ct.nii", volume, orientation)
    again, _ = nifti.read(tmp_path / "ct.nii")
    np.testing.assert_array_equal(again.hu, volume.hu)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)


def patient_in(folder: Path, salt: str = "salt") -> str:
    (found,) = find_scans([folder])
    return read_found(found, salt).patient


def test_patient_id_is_hashed_and_stays_the_same(tmp_path):
    first = patient_in(write(tmp_path / "a", series()))
    second = patient_in(write(tmp_path / "b", series(uid="9.9")))
    other = series()
    for file in other:
        file.PatientID = "MRN-0043"
    assert first == second != patient_in(write(tmp_path / "c", other))
    assert first is not None
    assert "MRN" not in first
    assert dicom.hashed_patient("  ", "salt") is None


def test_a_patient_has_another_name_under_another_salt_and_none_without(tmp_path):
    folder = write(tmp_path / "a", series())
    assert patient_in(folder, "one") != patient_in(folder, "two")
    assert read_scan(folder).patient is None
    slow = hashlib.pbkdf2_hmac("sha256", b"MRN-0042", b"one", 50_000).hex()
    assert slow.startswith(patient_in(folder, "one"))


def test_scouts_within_a_series_are_left_out(tmp_path):
    scout = image(HU[0], (0, 0, 0), "1.2.3", 99)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    volume, _, meta = read_one(write(tmp_path / "ct", [*series(), scout]))
    assert (volume.shape[0], meta.localizers) == (6, 1)


def changed(change: Callable[[list[FileDataset]], object], **arguments) -> list[FileDataset]:
    images = series(**arguments)
    change(images)
    return images


def set_all(images: list[FileDataset], key: str, value: object) -> None:
    for file in images:
        setattr(file, key, value)


def compress(images: list[FileDataset]) -> None:
    for file in images:
        file.file_meta.TransferSyntaxUID = JPEG2000Lossless
        file.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f not a codestream"])
        file["PixelData"].VR = "OB"


REJECTED = {
    r"not CT \(modality MR\)": lambda: changed(lambda images: set_all(images, "Modality", "MR")),
    "a localizer": lambda: changed(lambda images: set_all(images, "ImageType", ["DERIVED", "PRIMARY", "LOCALIZER"])),
    "too few slices: 1, a series needs 2": lambda: series(HU[:1]),
    "multi-frame": lambda: changed(lambda images: set_all(images, "NumberOfFrames", 2)),
    r"missing or uneven slices: 2\.50 to 5\.00 mm apart, usually 2\.50, 1 of 4 gaps .* after slice 3": lambda: changed(
        lambda images: images.pop(3)
    ),
    "uneven slices: 2.45 to 2.55": lambda: changed(
        lambda images: setattr(images[3], "ImagePositionPatient", [-100, -50, 707.55])
    ),
    "2 duplicate slices": lambda: [*series(), *series()[:2]],
    r"gantry tilt of 15\.0 degrees": lambda: series(step_mm=(0, 2.5 * np.tan(np.radians(15)), 2.5)),
    r"shifted against each other by up to 4\.0 mm": lambda: changed(
        lambda images: setattr(images[2], "ImagePositionPatient", [-96, -50, 705])
    ),
    "no usable affine .ImagePositionPatient is missing": lambda: changed(
        lambda images: delattr(images[1], "ImagePositionPatient")
    ),
    "differ in PixelSpacing": lambda: changed(lambda images: setattr(images[1], "PixelSpacing", [0.8, 0.8])),
    "differ in ImageOrientationPatient": lambda: changed(
        lambda images: setattr(images[1], "ImageOrientationPatient", [0, 1, 0, 0, 0, -1])
    ),
    "differ in Rows": lambda: [*series()[:-1], image(HU[5][:4], (-100, -50, 712.5), "1.2.3", 6)],
    "RescaleIntercept is missing": lambda: changed(lambda images: delattr(images[2], "RescaleIntercept")),
    "cannot be decoded .JPEG 2000": lambda: changed(compress),
    "cannot be decoded": lambda: changed(lambda images: setattr(images[2], "PixelData", images[2].PixelData[:-20])),
}


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data")
@pytest.mark.parametrize("reason", REJECTED)
def test_unusable_series_are_rejected_with_their_reason(tmp_path, reason):
    images = REJECTED[reason]()
    for n, file in enumerate(images):
        file.save_as(tmp_path / f"{n:03d}.dcm", enforce_file_format=True)
    with pytest.raises(ScanRejected, match=reason) as rejection:
        dicom.read_folder(tmp_path)
    assert str(rejection.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(rejection.value)


def test_positions_rounded_to_two_decimals_are_even(tmp_path):
    images = series()
    for n, file in enumerate(images):
        file.ImagePositionPatient = [-100, -50, round(n * 2 / 3, 2)]
    volume, _, _ = read_one(write(tmp_path / "ct", images))
    assert volume.spacing_mm[2] == pytest.approx(2 / 3, abs=0.002)


def test_a_folder_without_dicom_is_rejected(tmp_path):
    (tmp_path / "notes.dcm").write_text("no scan")
    with pytest.raises(ScanRejected, match="holds no DICOM series"):
        dicom.read_folder(tmp_path)
