"""Every step against what it should do to a known picture, and its inverse."""

from __future__ import annotations

import numpy as np
import pytest

from ctvae.errors import ScanRejected
from ctvae.preprocess import Box, Steps, as_hu, body_box, cut, grid_box, group_starts, paste, resample
from ctvae.scan import read_scan
from ctvae.volume import Volume, plain_affine, position_mm


def volume_of(hu: np.ndarray, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> Volume:
    return Volume(hu, plain_affine(spacing_mm, hu.shape))


@pytest.fixture
def noise() -> Volume:
    return volume_of(np.random.default_rng(0).integers(-1000, 1000, (5, 11, 14), dtype=np.int16))


# Values that are HU, and others


def test_padding_becomes_minus_1024_and_nothing_else_changes(scan_hu):
    hu = scan_hu()
    hu[0, 0, :4] = -2048, -3024, -32768, -1024
    hu[1, 12, 16] = 3071
    clean = as_hu(hu.astype(np.float32), "x.nii")
    assert clean.dtype == np.int16
    np.testing.assert_array_equal(clean, np.where(hu < -1024, -1024, hu))
    assert clean.max() == 3071


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hu: (hu + 1000) / 2200, "normalised"),
        (lambda hu: (hu - hu.mean()) / (hu.max() - hu.min()), "normalised"),
        (lambda hu: np.clip((hu + 1000) / 8, 0, 255), "8-bit picture or a label map"),
        (lambda hu: (hu > 0).astype(np.int16) * 3, "label map"),
        (lambda hu: hu - hu.min(), r"without its offset; if CT, subtract 1024 \(or 1000\) or set scl_inter"),
        (lambda hu: (hu - hu.min()) * 20.0, "as in MR or PET"),
        (lambda hu: hu * 1000.0, "beyond 32767"),
        (lambda hu: np.clip(hu, -50, 200), "next to nothing below -150"),
        (lambda hu: (hu - hu.mean()) / hu.std() * 2, "z-scored"),
        (lambda hu: np.minimum(hu, -200), "nothing above 50"),
        (lambda hu: np.full_like(hu, -1000), "blank"),
    ],
)
def test_values_that_cannot_be_hu_are_rejected(scan_hu, change, reason):
    with pytest.raises(ScanRejected, match=rf"^x\.nii: not CT in HU: .*{reason}"):
        as_hu(np.asarray(change(scan_hu())), "x.nii")


def test_one_ringing_voxel_does_not_make_an_mr_a_ct():
    mr = np.random.default_rng(0).integers(0, 2000, (32, 32, 32), dtype=np.int16)
    mr[3, 3, 3] = -400
    with pytest.raises(ScanRejected, match="next to nothing below"):
        as_hu(mr, "mr.nii")


# Boxes


@pytest.mark.parametrize(
    "box",
    [Box((1, 2, 3), (3, 4, 5)), Box((-1, -2, 4), (4, 20, 5)), Box((3, 8, 10), (4, 6, 7)), Box((9, 0, 0), (2, 3, 3))],
    ids=["inside", "beyond", "corner", "outside"],
)
def test_cut_keeps_every_voxel_at_its_place_and_paste_puts_it_back(noise, box):
    block = cut(noise, box)
    assert block.shape == box.shape
    for index in np.ndindex(box.shape):
        whole = tuple(i + s for i, s in zip(index, box.start, strict=True))
        inside = all(0 <= i < n for i, n in zip(whole, noise.shape, strict=True))
        assert block.hu[index] == (noise.hu[whole] if inside else -1000)
        np.testing.assert_allclose(position_mm(block.affine, index), position_mm(noise.affine, whole), atol=1e-9)
    air = Volume(np.full_like(noise.hu, -1000), noise.affine)
    uncovered = paste(Volume(np.full_like(block.hu, 7), block.affine), box, air).hu != 7
    np.testing.assert_array_equal(paste(block, box, air).hu, np.where(uncovered, -1000, noise.hu))
    np.testing.assert_array_equal(cut(block, box.inverse(noise.shape)).hu, np.where(uncovered, -1000, noise.hu))


def test_padding_to_a_grid_is_undone_exactly(noise):
    box = grid_box(noise.shape, (4, 8, 8))
    padded = cut(noise, box)
    assert padded.shape == (8, 16, 16)
    again = cut(padded, box.inverse(noise.shape))
    np.testing.assert_array_equal(again.hu, noise.hu)
    np.testing.assert_allclose(again.affine, noise.affine, atol=1e-9)


def test_square_box_has_the_same_centre():
    square = Box((0, 10, 4), (5, 20, 50)).squared()
    assert square.shape == (5, 50, 50)
    assert square.start[1] + 25 == 10 + 10
    assert square.start[2] == 4


def test_margins_stay_inside_the_scan():
    assert Box((0, 2, 10), (5, 20, 15)).grown(4, (5, 40, 28)) == Box((0, 0, 6), (5, 26, 22))


# Resampling


def grating(cycles: int, pixels: int = 256) -> Volume:
    """+-500 HU in `cycles` periods along W."""
    wave = 500 * np.cos(2 * np.pi * cycles * (np.arange(pixels) + 0.5) / pixels)
    return volume_of(np.broadcast_to(wave, (2, pixels, pixels)).round().astype(np.int16))


def amplitude(volume: Volume, cycles: int) -> float:
    """Of the wave with `cycles` periods along W."""
    row = volume.hu[1, volume.shape[1] // 2].astype(float)
    return 2 * abs(np.fft.rfft(row)[cycles]) / len(row)


@pytest.mark.parametrize("cycles", [4, 12, 20, 44, 60])
def test_waves_are_damped_as_the_filter_says_and_those_beyond_the_limit_vanish(cycles):
    small = 64  # a quarter: at most 32 cycles; 64 - 4 = 60 would turn up as 4
    sigma, frequency = (256 / small - 1) / 2, cycles / 256
    gaussian = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    between_pixels = np.cos(np.pi * frequency)  # a new centre lies halfway between two old ones
    seen_as = min(cycles, small - cycles)
    found = amplitude(resample(grating(cycles), (small, small)), seen_as)
    assert found == pytest.approx(500 * gaussian * between_pixels, abs=2)
    if cycles == 60:
        assert amplitude(volume_of(grating(60).hu[:, ::4, ::4]), 4) > 15 * found  # what picking pixels would give


def test_a_ramp_stays_where_it_is_in_the_patient():
    ramp = np.broadcast_to(np.arange(-600, 600, 10), (2, 60, 120)).astype(np.int16)
    before = volume_of(ramp, (0.8, 0.8, 2.0))
    after = resample(before, (30, 40))
    assert after.spacing_mm == pytest.approx((2.4, 1.6, 2.0))
    slope = 10 / 0.8  # HU per mm to the left
    for w in range(5, 35):  # the rim has nothing beyond to average
        expected = slope * (position_mm(before.affine, (0, 0, 0)) - position_mm(after.affine, (0, 0, w)))[0] - 600
        assert after.hu[1, 15, w] == pytest.approx(expected, abs=1)


def test_labels_are_taken_from_the_nearest_voxel():
    labels = volume_of(np.random.default_rng(1).integers(0, 9, (3, 30, 33), dtype=np.int16))
    small = resample(labels, (10, 11), labels=True)  # a third: new pixel m has its centre on old pixel 3 m + 1
    np.testing.assert_array_equal(small.hu, labels.hu[:, 1::3, 1::3])
    large = resample(labels, (60, 66), labels=True)
    np.testing.assert_array_equal(large.hu, labels.hu.repeat(2, axis=1).repeat(2, axis=2))


def test_native_size_changes_nothing(noise):
    assert resample(noise, (11, 14)) is noise


def test_steps_go_back_onto_the_scan(scan_hu):
    scan = volume_of(scan_hu(shape=(4, 40, 60)))
    exact = Steps(Box((0, 5, 6), (4, 30, 40)), (30, 40))
    np.testing.assert_array_equal(exact.undo(exact.apply(scan), scan).hu, scan.hu)
    halved = Steps(Box((0, -10, 0), (4, 60, 60)), (30, 30))
    again = halved.undo(halved.apply(scan), scan)
    assert again.shape == scan.shape
    smooth = resample(resample(scan, (20, 30)), (40, 60)).hu.astype(float)
    assert np.abs(again.hu - smooth).mean() < 5


# The body


def scene(pixel_mm: float, side_mm: float = 400) -> tuple[np.ndarray, np.ndarray]:
    """A body of 280 x 180 mm with lungs on a table with a foam core, a wire beside it: HU and the body's mask."""
    n = round(side_mm / pixel_mm)
    y, x = np.meshgrid(*[(np.arange(n) + 0.5) * pixel_mm - side_mm / 2] * 2, indexing="ij")
    body = (x / 140) ** 2 + (y / 90) ** 2 < 1
    lungs = ((np.abs(x) - 65) / 40) ** 2 + (y / 55) ** 2 < 1
    table = (np.abs(y - 102) < 12) & (np.abs(x) < 190)
    foam = (np.abs(y - 102) < 8) & (np.abs(x) < 186)
    wire = (np.abs(x - 170) < 2) & (np.abs(y) < 50)
    hu = np.full((n, n), -1000, np.int16)
    for mask, value in ((table, 100), (foam, -900), (wire, 2000), (body, 30), (lungs, -850)):
        hu[mask] = value
    return np.stack([hu] * 6), np.stack([body] * 6)


@pytest.mark.parametrize("pixel_mm", [0.8, 1.6, 4.0])
def test_body_box_holds_the_body_and_neither_table_nor_wire(pixel_mm):
    hu, body = scene(pixel_mm)
    box = body_box(volume_of(hu, (pixel_mm, pixel_mm, 3.0)))
    assert (box.start[0], box.shape[0]) == (0, 6)
    slack = round(10 / pixel_mm) + 1  # body_box looks at 3 mm pixels
    for axis in (1, 2):
        held = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        first, stop = box.start[axis], box.start[axis] + box.shape[axis]
        assert held[0] - slack <= first <= held[0]
        assert held[-1] + 1 <= stop <= held[-1] + 1 + slack


def test_without_a_body_the_box_is_the_plane():
    empty = volume_of(np.full((3, 20, 30), -1000, np.int16))
    assert body_box(empty) == Box((0, 0, 0), (3, 20, 30))


@pytest.mark.real
def test_body_boxes_of_real_scans_hold_their_dense_voxels(real_data):
    for path in [*sorted(real_data.glob("headneck/*.nii.gz"))[::50], real_data / "torso_half/acrinflt_013.nii.gz"]:
        volume = read_scan(path).volume
        box = body_box(volume)
        inside = cut(volume, box).hu
        bone_or_soft = np.count_nonzero(inside > -100) / np.count_nonzero(volume.hu > -100)
        assert bone_or_soft > 0.9
        assert np.prod(box.shape) < 0.6 * volume.hu.size


# Groups


@pytest.mark.parametrize(
    ("depth", "slices", "stride", "rest", "starts"),
    [
        (128, 64, 64, "overlap", [0, 64]),
        (99, 64, 64, "overlap", [0, 35]),
        (99, 64, 64, "drop", [0]),
        (99, 64, 64, "pad", [0, 64]),
        (64, 64, 64, "pad", [0]),
        (40, 64, 64, "pad", [0]),
        (99, 64, 16, "overlap", [0, 16, 32, 35]),
        (99, 64, 16, "drop", [0, 16, 32]),
        (99, 64, 16, "pad", [0, 16, 32, 48]),
        (96, 64, 16, "overlap", [0, 16, 32]),
    ],
)
def test_group_starts(depth, slices, stride, rest, starts):
    assert group_starts(depth, slices, stride, rest) == starts


@pytest.mark.parametrize("rest", ["overlap", "drop"])
def test_short_scans_are_rejected_unless_padded(rest):
    with pytest.raises(ScanRejected, match="too few slices: 40, need 64; use --rest pad"):
        group_starts(40, 64, 64, rest)
