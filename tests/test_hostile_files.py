"""Files from anywhere: whatever the bytes, a reader takes them or says in one line what is wrong, and stays small.

`benchmarks/fuzz_files.py` does the same with ten thousand cases under limits on time and memory.
"""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import hostile_dicom
import hostile_files
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from ctvae import nifti
from ctvae.errors import InputError, ScanRejected, ScanTooLarge
from ctvae.intake import Job, Settings, prepare_scan
from ctvae.scan import Found, find_scans, read_found, read_scan
from ctvae.volume import Volume, plain_affine

HU = hostile_files.body()
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    """A NIfTI file that is read without complaint."""
    path = tmp_path_factory.mktemp("plain") / "scan.nii"
    nifti.write(path, Volume(HU, plain_affine((1.5, 1.5, 3.0), HU.shape)))
    return path.read_bytes()


def outcome(path: Path) -> str:
    """What `read_scan` says of a file, after the checks that hold for whatever it holds."""
    try:
        scan = read_scan(path)
    except InputError as error:
        said = str(error)
        assert said.startswith(f"{path}: ")
        assert "\n" not in said
        return said
    assert scan.volume.hu.dtype == np.int16
    assert np.isfinite(scan.volume.affine).all()
    assert all(0.01 <= step <= 100 for step in scan.volume.spacing_mm)
    return ""


@QUICK
@given(flips=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=12))
@example(flips=[(70, 1)])
def test_any_bytes_in_a_nifti_header_are_read_or_refused_in_one_line(tmp_path, plain, flips):
    raw = bytearray(plain)
    for place, value in flips:
        raw[place] = value
    path = tmp_path / "scan.nii"
    path.write_bytes(raw)
    outcome(path)


@QUICK
@given(
    shape=st.lists(st.integers(-2, 32767), min_size=7, max_size=7),
    ndim=st.integers(-1, 9),
    code=st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304]),
    scale=st.tuples(st.floats(width=32), st.floats(width=32)),
    packed=st.booleans(),
)
def test_a_header_that_lies_about_shape_type_and_scale_is_never_believed(tmp_path, plain, shape, ndim, code, scale, packed):
    raw = bytearray(plain)
    struct.pack_into("<8h", raw, 40, ndim, *shape)
    struct.pack_into("<h", raw, 70, code)
    struct.pack_into("<2f", raw, 112, *scale)
    path = tmp_path / ("scan.nii.gz" if packed else "scan.nii")
    path.write_bytes(gzip.compress(bytes(raw), 1) if packed else raw)
    outcome(path)


@QUICK
@given(
    affine=st.lists(st.floats(width=32), min_size=12, max_size=12),
    pixdim=st.lists(st.floats(width=32), min_size=4, max_size=4),
)
def test_no_affine_makes_a_scan_without_a_place(tmp_path, plain, affine, pixdim):
    raw = bytearray(plain)
    struct.pack_into("<4f", raw, 76, *pixdim)
    struct.pack_into("<12f", raw, 280, *affine)
    path = tmp_path / "scan.nii"
    path.write_bytes(raw)
    outcome(path)


def refusals(folder: Path) -> list[str]:
    """Why each scan of a folder is refused, or nothing."""
    said = []
    try:
        for found in find_scans([folder]):
            said.append("")
            read_found(found, "salt")
    except InputError as error:  # also of `find_scans`, where no file is DICOM any more
        said.append(str(error))
    return said


@pytest.mark.parametrize("index", range(60))
def test_damaged_folders_are_read_or_refused_with_their_name(tmp_path, index):
    path, _ = hostile_dicom.dicom_case(tmp_path, 11, index)
    for said in refusals(path):
        assert path.name in said or not said
        assert "\n" not in said


def patch(raw: bytes, form: str, at: int, *values: float) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(form, changed, at, *values)
    return bytes(changed)


HOSTILE_NIFTI = {
    "not 3D": lambda raw: patch(raw, "<8h", 40, 4, 24, 20, 6, 2, 1, 1, 1),
    "claims 32767x32767x32767": lambda raw: patch(raw, "<8h", 40, 3, 32767, 32767, 32767, 1, 1, 1, 1),
    "truncated file": lambda raw: patch(raw, "<8h", 40, 3, 1290, 1290, 1290, 1, 1, 1, 1),
    "complex": lambda raw: patch(raw, "<h", 70, 32),
    "colour": lambda raw: patch(raw, "<h", 70, 128),
    "holds NaN": lambda raw: patch(raw, "<12f", 280, *[np.nan] * 12),
    "scl_slope is infinite": lambda raw: patch(raw, "<f", 112, np.inf),
    "-1.5 x 1.5 x 3 is not positive": lambda raw: patch(raw, "<f", 80, -1.5),
    "first voxel is 1e+38 mm from the origin": lambda raw: patch(raw, "<f", 292, 1e38),
    "0 x 1.5 x 3 is not positive": lambda raw: patch(raw, "<f", 80, 0),
    "voxels inside": lambda raw: raw[:344] + b"ni1\0" + raw[348:],
    "8-bit picture": lambda raw: patch(raw, "<h", 70, 2),
}


@pytest.mark.parametrize("reason", HOSTILE_NIFTI)
def test_hostile_headers_are_refused_for_what_is_wrong(tmp_path, plain, reason):
    path = tmp_path / "scan.nii"
    path.write_bytes(HOSTILE_NIFTI[reason](plain))
    assert reason in outcome(path)


@pytest.mark.parametrize("packed", [False, True])
def test_sixty_thousand_cubed_is_refused_before_memory_is_taken(tmp_path, packed):
    import nibabel as nib

    image = nib.Nifti2Image(HU.transpose(2, 1, 0), hostile_files.AFFINE)
    raw = patch(image.to_bytes(), "<8q", 16, 3, 60_000, 60_000, 60_000, 1, 1, 1, 1)
    path = tmp_path / ("scan.nii.gz" if packed else "scan.nii")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    tracemalloc.start()
    said = outcome(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "the header claims 60000x60000x60000 voxels, more than the limit" in said
    assert peak < 2e6


def test_no_more_of_a_bomb_is_unpacked_than_its_header_claims(tmp_path, plain):
    """A quarter of a gigabyte of zeros behind a whole scan."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packer.compress(plain) + b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush())
    tracemalloc.start()
    assert outcome(path) == ""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_a_slope_of_zero_or_nan_says_that_nothing_is_scaled(tmp_path, plain, slope):
    path = tmp_path / "scan.nii"
    path.write_bytes(patch(plain, "<2f", 112, slope, 7.0))
    np.testing.assert_array_equal(read_scan(path).volume.hu, HU)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", ">f4", "<f8", "<i8"])
def test_the_other_byte_order_and_wider_types_hold_the_same_scan(tmp_path, dtype):
    import nibabel as nib

    header = nib.Nifti1Header(endianness=dtype[0])
    image = nib.Nifti1Image(HU.transpose(2, 1, 0).astype(dtype), hostile_files.AFFINE, header, dtype=np.dtype(dtype))
    nib.save(image, tmp_path / "scan.nii")
    volume = read_scan(tmp_path / "scan.nii").volume
    assert volume.hu.dtype == np.int16
    np.testing.assert_array_equal(volume.hu, HU)


def test_voxels_in_slabs_are_voxels_at_once(tmp_path, monkeypatch):
    half = HU.astype(np.float32)
    half[7, 3, 4] += 0.5  # whole numbers until here: what was int16 becomes float32
    nifti_path = tmp_path / "scan.nii"
    import nibabel as nib

    nib.save(nib.Nifti1Image(half.transpose(2, 1, 0), hostile_files.AFFINE), nifti_path)
    monkeypatch.setattr(nifti, "SLAB_VOXELS", 100)
    read, _ = nifti.read(nifti_path)
    assert read.hu.dtype == np.float32
    np.testing.assert_array_equal(read.hu, half)


def test_a_scan_that_memory_cannot_hold_is_refused_and_tried_again(tmp_path, plain, monkeypatch):
    class Full:
        available = 1000

    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "scan.nii"
    path.write_bytes(plain)
    job = Job(Found(path, path.parent, (path,)), "scan", tmp_path / "out", Settings(slices=4, stride=4), None, "fingerprint")
    monkeypatch.setattr(nifti.psutil, "virtual_memory", lambda: Full)
    with pytest.raises(ScanTooLarge, match=r"needs 0\.0 GB of memory, 0\.0 GB are free"):
        nifti.read(path)
    assert "memory" in prepare_scan(job)["reason"]
    monkeypatch.undo()
    from ctvae.intake import is_current, read_record

    assert not is_current(job, read_record(job))
    assert prepare_scan(job)["reason"] is None


def test_a_plane_too_narrow_to_be_squared_is_refused(tmp_path):
    thin = np.tile(HU[:, 9:11, :], (1, 1, 2))
    nifti.write(tmp_path / "thin.nii", Volume(thin, plain_affine((1.5, 1.5, 3.0), thin.shape)))
    found = Found(tmp_path / "thin.nii", tmp_path, (tmp_path / "thin.nii",))
    record = prepare_scan(Job(found, "thin", tmp_path / "out", Settings(slices=4, stride=4, size=16), None, ""))
    assert record["reason"] == "its plane of 2x48 is too narrow to be made square"


def test_a_file_name_that_is_no_text_is_prepared_as_any_other(tmp_path, plain):
    from ctvae.prepare import prepare

    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9 1.nii")
    try:
        (tmp_path / "in" / name).write_bytes(plain)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    dataset = prepare(tmp_path / "in", tmp_path / "out", slices=4, workers=1)
    assert dataset.scans[0]["source"] == "caf\\xe9 1.nii"
    assert dataset.groups()[0].id == "caf_xe9_1_0000"
    before = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    prepare(tmp_path / "in", tmp_path / "out", slices=4, workers=1)
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == before


# --- DICOM ---------------------------------------------------------------------------------------------------------------


def saved(folder: Path, images: list[pydicom.FileDataset]) -> Path:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, image in enumerate(images):
            image.save_as(folder / f"IM{n:03d}", enforce_file_format=True)
    return folder


def with_all(**tags) -> list[pydicom.FileDataset]:
    return changed(slice(None), **tags)


def with_one(which: int = 1, **tags) -> list[pydicom.FileDataset]:
    return changed(slice(which, which + 1), **tags)


def changed(which: slice, **tags) -> list[pydicom.FileDataset]:
    images = hostile_dicom.series(HU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of such values
        for image in images[which]:
            for key, value in tags.items():
                setattr(image, key, value)
    return images


def eight_bits() -> list[pydicom.FileDataset]:
    """A secondary capture: a picture of the slices, already windowed."""
    images = with_all(BitsAllocated=8, BitsStored=8, HighBit=7, RescaleIntercept=0)
    for image, plane in zip(images, HU, strict=True):
        image.PixelData = ((plane.clip(-160, 240) + 160) * 255 // 400).astype(np.uint8).tobytes()
    return images


def tilted() -> list[pydicom.FileDataset]:
    images = hostile_dicom.series(HU)
    for n, image in enumerate(images):
        image.ImagePositionPatient = [-100, -50 + round(2.5 * n * np.tan(np.radians(20)), 3), 700 + 2.5 * n]
    return images


HOSTILE_DICOM = {
    "not CT (modality MR)": lambda: with_all(Modality="MR"),
    "not CT (modality CT and MR)": lambda: with_one(5, Modality="MR"),
    "of several patients": lambda: with_one(PatientID="MRN-0043"),
    "PixelSpacing is not 2 finite numbers": lambda: with_all(PixelSpacing=["nan", "nan"]),
    "a pixel spacing that is not positive": lambda: with_all(PixelSpacing=[-0.7, 0.7]),
    "directions not of length one": lambda: with_all(ImageOrientationPatient=[2, 0, 0, 0, 2, 0]),
    "ImagePositionPatient is not 3 finite numbers": lambda: with_one(ImagePositionPatient=[0, 0]),
    "NaN or infinite": lambda: with_one(RescaleSlope="nan"),
    "more than the limit": lambda: with_all(Rows=65535, Columns=65535),
    "cannot be decoded": lambda: with_all(Rows=600, Columns=600),
    "colour": lambda: with_all(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, Rows=4),
    "gantry tilt of 20.0 degrees": tilted,
    "missing or uneven": lambda: [image for n, image in enumerate(hostile_dicom.series(HU)) if n != 4],
    "an 8-bit picture": eight_bits,
    "holds 2 DICOM series": lambda: hostile_dicom.series(HU) + hostile_dicom.series(HU, uid="1.2.4"),
    "2 duplicate slices": lambda: hostile_dicom.series(HU) + hostile_dicom.series(HU)[:2],
}


@pytest.mark.parametrize("reason", HOSTILE_DICOM)
def test_hostile_series_are_refused_for_what_is_wrong(tmp_path, reason):
    folder = saved(tmp_path / "study", HOSTILE_DICOM[reason]())
    said = outcome(folder)
    assert reason in said


def test_a_damaged_slice_is_named_rather_than_left_out(tmp_path):
    folder = saved(tmp_path / "study", hostile_dicom.series(HU))
    last = folder / "IM011"
    last.write_bytes(last.read_bytes()[:200])  # the topmost: without it the others would be an even series
    (found,) = find_scans([folder])
    with pytest.raises(ScanRejected, match="IM011: damaged DICOM"):
        read_found(found)


def test_a_folder_of_nothing_but_damage_is_listed(tmp_path):
    folder = saved(tmp_path / "study", hostile_dicom.series(HU)[:1])
    (folder / "IM000").write_bytes((folder / "IM000").read_bytes()[:150])
    (found,) = find_scans([folder])
    with pytest.raises(ScanRejected, match="IM000: damaged DICOM"):
        read_found(found)


def test_a_deflated_bomb_is_refused_before_it_is_unpacked(tmp_path):
    import random

    folder = saved(tmp_path / "study", hostile_dicom.series(HU))
    (folder / "IM003").write_bytes(hostile_dicom._deflate_bomb(random.Random(0), bytearray()))
    tracemalloc.start()
    (found,) = find_scans([folder])
    with pytest.raises(ScanRejected, match="IM003: deflated DICOM"):
        read_found(found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6, "256 MB were unpacked"


def test_slices_whose_pixels_are_read_late_are_the_same_scan(tmp_path):
    large = hostile_files.body(3, (3, 96, 100))  # 19 KB a slice: left on disk while headers are compared
    volume = read_scan(saved(tmp_path / "study", hostile_dicom.series(large))).volume
    np.testing.assert_array_equal(volume.hu, large)


def test_run_length_encoded_slices_are_the_same_scan(tmp_path):
    images = hostile_dicom.series(HU)
    for image in images:
        image.compress(RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(read_scan(saved(tmp_path / "study", images)).volume.hu, HU)
    assert images[0].file_meta.TransferSyntaxUID == RLELossless != DeflatedExplicitVRLittleEndian
