"""NIfTI against nibabel's own reading, and every reason to turn a file away."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctvae import nifti
from ctvae.errors import InputError, ScanRejected
from ctvae.volume import Volume, plain_affine

AFFINE = np.array([[-0.7, 0.05, 0, 90], [-0.05, -0.7, 0, 80], [0, 0, 2.5, -1000], [0, 0, 0, 1]])
OFFSETS = {"sizeof_hdr": 0, "dim": 40, "datatype": 70, "pixdim": 76, "vox_offset": 108, "scl_slope": 112, "srow_x": 280}


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, codes=(1, 1), slope=None) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    if slope:
        image.header.set_slope_inter(*slope)
    nib.save(image, path)
    return path


def patched(path: Path, field: str, form: str, *values: float) -> Path:
    """Overwrite a header field of an uncompressed file, which no library would write like that."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, OFFSETS[field], *values)
    path.write_bytes(content)
    return path


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(1).integers(-1024, 3071, (5, 6, 7), dtype=np.int16)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "i4", "u2", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_values_are_those_nibabel_reads(tmp_path, voxels, dtype, suffix):
    path = save(tmp_path / f"scan{suffix}", (voxels % 200).astype(dtype))
    volume, orientation = nifti.read(path)
    data, affine = orientation.restore(volume)
    np.testing.assert_array_equal(data, nib.load(path).get_fdata())
    np.testing.assert_array_equal(affine, nib.load(path).affine)
    assert volume.hu.dtype == np.int16


def test_slope_and_intercept_are_applied_as_nibabel_does(tmp_path, voxels):
    path = save(tmp_path / "scan.nii", voxels, slope=(0.5, -7.25))
    volume, orientation = nifti.read(path)
    assert volume.hu.dtype == np.float32
    np.testing.assert_allclose(orientation.restore(volume)[0], nib.load(path).get_fdata(), rtol=1e-6)


def test_nifti2_and_a_trailing_axis_are_read(tmp_path, voxels):
    image = nib.Nifti2Image(voxels[..., None], AFFINE)
    nib.save(image, tmp_path / "scan.nii")
    volume, orientation = nifti.read(tmp_path / "scan.nii")
    np.testing.assert_array_equal(orientation.restore(volume)[0], voxels)


def test_the_qform_is_used_where_there_is_no_sform(tmp_path, voxels):
    path = save(tmp_path / "scan.nii", voxels, codes=(0, 1))
    _, orientation = nifti.read(path)
    np.testing.assert_array_equal(orientation.affine, nib.load(path).affine)
    np.testing.assert_allclose(orientation.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_read_and_write_change_neither_voxels_nor_affine(tmp_path, voxels, suffix):
    turned = np.array([[0, 0.8, 0.12, 5], [0.9, 0, 0, 6], [0, -0.048, 2.0, 7], [0, 0, 0, 1.0]])
    source = save(tmp_path / "scan.nii.gz", voxels, turned)
    volume, orientation = nifti.read(source)
    nifti.write(tmp_path / f"again{suffix}", volume, orientation)
    again = nib.load(tmp_path / f"again{suffix}")
    np.testing.assert_array_equal(again.dataobj, voxels)
    np.testing.assert_array_equal(again.affine, nib.load(source).affine)


def test_written_header_is_plain_int16_hu_in_scanner_millimetres(tmp_path):
    volume = Volume(np.full((3, 4, 5), 40.6, np.float32), plain_affine((0.8, 0.9, 2.5), (3, 4, 5)))
    volume.hu[0, 0, 0], volume.hu[1, 0, 0] = 1e6, -1e6
    nifti.write(tmp_path / "x.nii.gz", volume, description="synthetic, " + "x" * 100)
    header = nib.load(tmp_path / "x.nii.gz").header
    assert header.get_data_dtype() == np.int16
    assert header.get_slope_inter() in ((None, None), (1.0, 0.0))
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-5)
    assert header.get_xyzt_units()[0] == "mm"
    assert header.get_zooms() == pytest.approx((0.8, 0.9, 2.5))
    assert header["descrip"].item() == b"synthetic, " + b"x" * 68
    assert [header[key].item() for key in ("aux_file", "intent_name", "db_name")] == [b"", b"", b""]
    assert sorted(np.unique(nib.load(tmp_path / "x.nii.gz").dataobj)) == [-32768, 41, 32767]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    volume = Volume(np.zeros((3, 4, 5), np.int16), plain_affine((1, 1, 1), (3, 4, 5)))
    nifti.write(tmp_path / "x.nii", volume)
    before = (tmp_path / "x.nii").read_bytes()

    def full_disk(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        nifti.write(tmp_path / "x.nii", volume)
    assert (tmp_path / "x.nii").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.nii"]


def test_mapped_voxels_are_the_written_ones_and_stay_so(tmp_path):
    hu = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nifti.write(tmp_path / "x.nii", Volume(hu, plain_affine((1, 1, 1), (3, 4, 5))))
    mapped = nifti.mapped(tmp_path / "x.nii")
    np.testing.assert_array_equal(mapped, hu)
    mapped[0, 0, 0] = 99
    np.testing.assert_array_equal(nifti.mapped(tmp_path / "x.nii"), hu)


def test_labels_have_to_be_whole_numbers(tmp_path, voxels):
    labels, _ = nifti.read_labels(save(tmp_path / "labels.nii", (voxels % 9).astype(np.float32)))
    assert labels.hu.dtype == np.int16
    with pytest.raises(ScanRejected, match="not a label map"):
        nifti.read_labels(save(tmp_path / "half.nii", voxels / 2.0))


def with_value(voxels: np.ndarray, value: float) -> np.ndarray:
    data = voxels.astype(np.float32)
    data[1, 2, 3] = value
    return data


REJECTED = {
    "no such file": lambda path, v: path,
    "empty file": lambda path, v: path.write_bytes(b""),
    "not a NIfTI file": lambda path, v: path.write_bytes(b"this is text" * 100),
    r"not 3D .*is 5x6\)": lambda path, v: save(path, v[..., 0]),
    "not 3D .*5x6x7x2": lambda path, v: save(path, np.stack([v, v], -1)),
    "not 3D .*5x6x1": lambda path, v: save(path, v[..., :1]),
    "empty .*5x0x7": lambda path, v: patched(save(path, v), "dim", "<8h", 3, 5, 0, 7, 1, 1, 1, 1),
    "empty .*-5x6x7": lambda path, v: patched(save(path, v), "dim", "<8h", 3, -5, 6, 7, 1, 1, 1, 1),
    "claims 2304 axes": lambda path, v: patched(save(path, v), "dim", "<8h", 9, 5, 6, 7, 1, 1, 1, 1),
    "more than the limit": lambda path, v: patched(save(path, v), "dim", "<8h", 3, *[32000] * 3, 1, 1, 1, 1),
    "NaN": lambda path, v: save(path, with_value(v, np.nan)),
    "infinite": lambda path, v: save(path, with_value(v, np.inf)),
    "truncated file": lambda path, v: save(path, v) and path.write_bytes(path.read_bytes()[:-9]),
    "complex": lambda path, v: save(path, v.astype(np.complex64)),
    "colour": lambda path, v: save(path, np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "damaged NIfTI header": lambda path, v: patched(save(path, v), "datatype", "<h", 999),
    "damaged NIfTI header .*inter": lambda path, v: patched(save(path, v), "scl_slope", "<2f", 1, np.nan),
    "truncated .*": lambda path, v: patched(save(path, v), "vox_offset", "<f", np.nan),
    "affine .*sform_code and qform_code are 0": lambda path, v: save(path, v, codes=(0, 0)),
    "affine .*is not positive": lambda path, v: patched(save(path, v), "pixdim", "<4f", 1, -0.7, 0.7, 2.5),
    "affine .*0 x 0.7.* is not positive": lambda path, v: patched(save(path, v), "pixdim", "<4f", 1, 0, 0.7, 2.5),
    "affine .*holds NaN": lambda path, v: patched(save(path, v), "srow_x", "<4f", np.nan, 0, 0, 0),
    "affine .*singular": lambda path, v: patched(save(path, v), "srow_x", "<8f", 1, 1, 0, 0, 1, 1, 0, 0),
    "affine .*not within": lambda path, v: save(path, v, AFFINE @ np.diag([1, 1, 1000, 1])),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_unusable_files_are_rejected_with_their_reason(tmp_path, voxels, reason):
    path = tmp_path / "scan.nii"
    REJECTED[reason](path, voxels)
    with pytest.raises(ScanRejected, match=reason) as rejection:
        nifti.read(path)
    assert str(rejection.value).startswith(f"{path}: ")
    assert "\n" not in str(rejection.value)


def test_metres_and_gantry_tilt_are_no_usable_affine(tmp_path, voxels):
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    with pytest.raises(ScanRejected, match="metres"):
        nifti.read(tmp_path / "metres.nii")
    tilted = AFFINE.copy()
    tilted[1, 2] = 2.5 * np.tan(np.radians(8))
    with pytest.raises(ScanRejected, match=r"8\.0 degrees from square"):
        nifti.read(save(tmp_path / "tilted.nii", voxels, tilted))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_gzip_is_rejected(tmp_path, voxels, kept):
    path = save(tmp_path / "scan.nii.gz", np.tile(voxels, (4, 4, 4)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ScanRejected, match="truncated gzip"):
        nifti.read(path)


def test_damage_inside_a_gzip_is_noticed(tmp_path, voxels):
    path = save(tmp_path / "scan.nii.gz", voxels)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    compressed = bytearray(gzip.compress(bytes(raw), compresslevel=0))  # a flipped voxel leaves a readable stream
    compressed[-20] ^= 0xFF
    path.write_bytes(compressed)
    with pytest.raises(ScanRejected, match="damaged or truncated gzip"):
        nifti.read(path)


def test_a_small_file_that_claims_gigabytes_is_rejected_before_they_are_allocated(tmp_path, voxels):
    path = patched(save(tmp_path / "bomb.nii", voxels), "dim", "<8h", 3, 1290, 1290, 1290, 1, 1, 1, 1)
    packed = tmp_path / "bomb.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for bomb in (path, packed):
        with pytest.raises(ScanRejected, match="truncated file"):
            nifti.read(bomb)


@pytest.mark.real
def test_real_scans_survive_a_round_trip(real_data, tmp_path):
    paths = sorted(real_data.glob("torso_half/*.nii.gz"))[::4] + sorted(real_data.glob("headneck*/*.nii.gz"))[::60]
    for path in paths:
        volume, orientation = nifti.read(path)
        nifti.write(tmp_path / "again.nii", volume, orientation)
        original, again = nib.load(path), nib.load(tmp_path / "again.nii")
        np.testing.assert_array_equal(again.dataobj, original.dataobj)
        np.testing.assert_array_equal(again.affine, original.affine)
