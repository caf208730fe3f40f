"""Phantoms against what CT looks like: tissue values, resolution, noise, and real scans where they are at hand."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ctvae import nifti
from ctvae.canvas import Canvas, scanned, spline_basis, tree
from ctvae.phantoms import LABELS, default_spacing_mm, phantom, write_phantoms

SHAPE = (64, 96, 96)
SEEDS = range(6)


@pytest.fixture(scope="module")
def patients() -> list[tuple[np.ndarray, np.ndarray]]:
    return [phantom(seed, SHAPE) for seed in SEEDS]


def inside(labels: np.ndarray, name: str) -> np.ndarray:
    """Voxels of a tissue that do not touch another one."""
    return ndimage.binary_erosion(labels == LABELS[name], iterations=1)


# Unenhanced to enhanced, HU; usual textbook ranges.
TISSUES_HU = {
    "lung": (-900, -700),
    "liver": (35, 140),
    "spleen": (35, 150),
    "muscle": (25, 75),
    "heart": (25, 330),
    "aorta": (30, 330),
}


@pytest.mark.parametrize(("tissue", "range_hu"), TISSUES_HU.items(), ids=TISSUES_HU)
def test_tissues_have_their_hounsfield_units(patients, tissue, range_hu):
    for hu, labels in patients:
        values = hu[inside(labels, tissue)]
        assert len(values) > 30
        assert range_hu[0] < np.median(values) < range_hu[1]


def test_bone_reaches_cortical_values_and_holds_marrow(patients):
    for hu, labels in patients:
        bone = hu[labels == LABELS["bone"]]
        assert 300 < np.percentile(bone, 95) < 1200
        assert 60 < np.percentile(bone, 10) < 250


def test_air_surrounds_the_body(patients):
    for hu, _ in patients:
        frame = np.concatenate([hu[:, :4].ravel(), hu[:, :, :3].ravel()])
        assert np.median(frame) == pytest.approx(-1000, abs=2)
        assert np.percentile(np.abs(frame + 1000), 99) < 60


def test_fat_lies_under_the_skin(patients):
    for hu, _ in patients:
        middle = hu[SHAPE[0] // 2]
        soft = ndimage.binary_fill_holes(ndimage.binary_opening(middle > -500))
        ring = soft & ~ndimage.binary_erosion(soft, iterations=3)
        assert ((middle > -140) & (middle < -40))[ring].mean() > 0.25


def test_the_same_seed_is_the_same_patient():
    first, second = phantom(3, (16, 32, 32)), phantom(3, (16, 32, 32))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert first[0].dtype == np.int16
    assert first[1].dtype == np.uint8


def test_patients_differ(patients):
    """Two patients are further apart than one patient and his own reflection in noise."""
    for index, (hu, _) in enumerate(patients):
        for other, _ in patients[index + 1 :]:
            assert np.abs(hu.astype(float) - other).mean() > 30


def test_a_patient_is_the_same_at_half_the_resolution():
    fine, _ = phantom(5, (64, 128, 128), (3.0, 3.0, 3.0))
    coarse, _ = phantom(5, (32, 64, 64), (6.0, 6.0, 6.0))
    averaged = fine.reshape(32, 2, 64, 2, 64, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(averaged.ravel(), coarse.ravel())[0, 1] > 0.98


def test_neighbouring_slices_agree(patients):
    for hu, _ in patients:
        flat = hu.reshape(len(hu), -1).astype(float)
        neighbours = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(flat)]
        assert min(neighbours) > 0.93
        assert np.corrcoef(flat[0], flat[-1])[0, 1] < min(neighbours)


def test_labels_are_the_documented_ones(patients):
    for _, labels in patients:
        assert set(np.unique(labels)) <= {0, *LABELS.values()}
        expected = {LABELS[name] for name in ("lung", "bone", "heart", "aorta", "liver", "kidney")}
        assert expected <= set(np.unique(labels))


def test_sides_are_the_patients(patients):
    """Canonical axes: the liver is on the patient's right, at low columns; the spine at the back, at high rows."""
    for _, labels in patients:
        columns = {name: np.nonzero(labels == LABELS[name])[2].mean() for name in ("liver", "spleen")}
        assert columns["liver"] < SHAPE[2] / 2 < columns["spleen"]
        high, low = (np.nonzero(labels == LABELS[name])[0].mean() for name in ("lung", "kidney"))
        assert low < high


@pytest.mark.parametrize("shape", [(1, 32, 32), (7, 33, 47), (20, 64, 40)])
def test_any_shape_will_do(shape):
    hu, labels = phantom(0, shape)
    assert hu.shape == labels.shape == shape


def test_a_small_field_of_view_gets_a_small_patient():
    hu, _ = phantom(0, (16, 64, 64), (2.0, 2.0, 2.0))
    assert np.median(hu[:, :, :2]) == pytest.approx(-1000, abs=5)
    assert (hu > -200).mean() > 0.1


def test_it_is_quick():
    phantom(0, (4, 16, 16))
    start = time.process_time()
    phantom(0, SHAPE)
    assert time.process_time() - start < 2.0  # 0.3 s by itself; slack for a busy machine


def test_written_phantoms_come_back(tmp_path):
    paths = write_phantoms(tmp_path, 2, seed=4, shape=(8, 24, 20), spacing_mm=(12.0, 14.0, 5.0))
    assert [path.name for path in paths] == ["phantom_000.nii.gz", "phantom_001.nii.gz"]
    volume, _ = nifti.read(paths[1])
    assert np.array_equal(volume.hu, phantom(5, (8, 24, 20), (12.0, 14.0, 5.0))[0])
    assert volume.spacing_mm == pytest.approx((12.0, 14.0, 5.0))
    labels, _ = nifti.read_labels(tmp_path / "labels" / paths[1].name)
    assert np.array_equal(labels.hu, phantom(5, (8, 24, 20), (12.0, 14.0, 5.0))[1])


def test_writing_again_writes_nothing_twice(tmp_path):
    first = write_phantoms(tmp_path, 1, shape=(4, 16, 16))
    before = first[0].stat().st_mtime_ns
    write_phantoms(tmp_path, 2, shape=(4, 16, 16))
    assert first[0].stat().st_mtime_ns == before
    assert (tmp_path / "phantom_001.nii.gz").exists()


def test_the_default_spacing_shows_a_whole_torso():
    assert default_spacing_mm((64, 200, 100)) == (4.0, 2.0, 3.0)


# --- what they are painted with


def canvas(
    shape: tuple[int, int, int] = (40, 60, 60), extent_mm: tuple[float, float, float] = (120.0, 180.0, 180.0)
) -> Canvas:
    return Canvas(np.random.default_rng(0), shape, extent_mm, bottom_mm=-60.0, labels={"thing": 1})


def straight(scene: Canvas) -> Canvas:
    """The same canvas without bending or ripple, for closed forms."""
    z, y, x = np.meshgrid(*scene.axes, indexing="ij")
    scene.x, scene.y, scene.z, scene.ripple = x, y, z, np.zeros_like(x)
    return scene


def test_an_ellipsoid_has_its_volume():
    """4/3 pi a b c, partial voxels counted."""
    scene = straight(canvas())
    share = scene.paint(scene.ellipsoid((5.0, -3.0, 2.0), (40.0, 25.0, 30.0), turn=0.4), 100.0, "thing")
    voxel_mm3 = 3.0**3
    assert share.sum() * voxel_mm3 == pytest.approx(4 / 3 * np.pi * 40 * 25 * 30, rel=0.01)
    assert (scene.labels == 1).sum() * voxel_mm3 == pytest.approx(4 / 3 * np.pi * 40 * 25 * 30, rel=0.02)


def test_an_organ_in_its_box_is_the_organ_everywhere():
    boxed, whole = canvas(), canvas()
    boxed.organ((10.0, 0.0, 5.0), (20.0, 15.0, 25.0), 60.0, "thing", turn=0.3)
    whole.paint(whole.ellipsoid((10.0, 0.0, 5.0), (20.0, 15.0, 25.0), turn=0.3), 60.0, "thing")
    assert np.allclose(boxed.hu, whole.hu, atol=1e-3)


def test_a_tube_has_its_volume():
    scene = straight(canvas())
    scene.tube([(0.0, 0.0, -30.0), (0.0, 0.0, 30.0)], 12.0, 0.0)
    assert (scene.hu + 1000).sum() / 1000 * 27 == pytest.approx(np.pi * 12**2 * 60, rel=0.02)


def test_vessels_keep_their_volume():
    points = tree(np.random.default_rng(1), [(0.0, 0.0, -50.0)], [(0.0, 0.0, 1.0)], 30, radius_mm=0.4, generations=4)
    scene = canvas()
    assert scene.vessels(points).sum() * 27 == pytest.approx(points[:, 3].sum(), rel=1e-5)


def test_a_forking_vessel_keeps_its_cross_section_as_murray_says():
    """The cubes of the daughters' radii add up to the mother's (Murray 1926): 2 * 0.79^3 = 1 to two per cent."""
    points = tree(
        np.random.default_rng(1), [(0.0, 0.0, 0.0)], [(0.0, 0.0, 1.0)], length_mm=28, radius_mm=2.0, generations=2
    )
    mother = np.sqrt(points[0, 3] / np.pi / 1.0)  # 28 steps of 1 mm
    assert mother == pytest.approx(2.0)
    daughters = points[28:].reshape(-1, 2, 4)  # [steps 2 4]
    steps_mm = np.linalg.norm(np.diff(daughters[:, 0, :3], axis=0), axis=1)
    radius = np.sqrt(daughters[0, 0, 3] / np.pi / steps_mm.mean())
    assert 2 * radius**3 == pytest.approx(mother**3, rel=0.1)


def test_splines_reproduce_straight_lines():
    """Cubic B-splines add up to one and reproduce linear functions (de Boor)."""
    basis = spline_basis(50, 9)
    assert np.allclose(basis.sum(axis=1), 1, atol=1e-6)
    line = basis @ np.arange(9)
    assert np.allclose(np.diff(line), (9 - 3) / 50, atol=1e-5)


def test_noise_has_the_wanted_size_and_the_spectrum_of_a_scanner():
    """Power proportional to f exp(-2 (f / 0.3)^2): a ramp rolled off by the kernel; white noise would be flat."""
    image = scanned(np.zeros((16, 128, 128), np.float32), np.random.default_rng(0), noise_hu=20.0).astype(float)
    assert image.mean() == pytest.approx(0, abs=0.1)
    assert image.std() == pytest.approx(20.0 * (0.25 + 1000 / 1100), rel=0.02)  # tissue of 0 HU all around
    power = (np.abs(np.fft.fft2(image)) ** 2).mean(axis=0)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])

    def measured(low: float, high: float) -> float:
        return power[(frequency > low) & (frequency < high)].mean()

    def expected(f: float) -> float:
        return f * np.exp(-2 * (f / 0.3) ** 2)

    assert measured(0.015, 0.025) / measured(0.095, 0.105) == pytest.approx(expected(0.02) / expected(0.1), rel=0.2)
    assert measured(0.295, 0.305) / measured(0.095, 0.105) == pytest.approx(expected(0.3) / expected(0.1), rel=0.1)


def test_the_scanner_keeps_slow_structure():
    ramp = np.tile(np.sin(2 * np.pi * np.arange(64) / 64) * 100, (2, 64, 1)).astype(np.float32)
    assert np.abs(scanned(ramp, np.random.default_rng(0), noise_hu=0.0) - ramp).max() <= 1.0


@pytest.mark.real
def test_phantoms_have_the_tissue_shares_of_real_torsos(patients):
    """Shares of lung, fat, soft tissue and bone in the body: the phantoms' median lies in the range of real scans."""
    folder = Path(os.environ.get("CTVAE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "torso_half"
    if not folder.is_dir():
        pytest.skip(f"no real scans in {folder}")

    def shares(hu: np.ndarray) -> list[float]:
        body = np.stack([ndimage.binary_fill_holes(ndimage.binary_opening(part > -300, iterations=2)) for part in hu])
        values = hu[body]
        ranges = ((-950, -600), (-140, -40), (0, 150), (250, 1500))
        return [((values > low) & (values < high)).mean() for low, high in ranges]

    real = np.array([shares(nifti.read(path)[0].hu[::4, ::2, ::2]) for path in sorted(folder.glob("*.nii.gz"))])
    drawn = np.median([shares(hu) for hu, _ in patients], axis=0)
    assert (drawn > 0.8 * real.min(axis=0)).all(), (drawn, real.round(2))
    assert (drawn < 1.2 * real.max(axis=0)).all(), (drawn, real.round(2))
