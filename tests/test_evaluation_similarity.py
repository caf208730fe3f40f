"""PSNR, SSIM and MS-SSIM against scikit-image and MONAI; reconstruction figures against known errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ctvae.evaluation import reconstruction, similarity

RANGE = 2000.0


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    scan = gaussian_filter(rng.normal(size=(48, 50, 52)), 3) * 8000 - 200
    return scan.astype(np.float32), (gaussian_filter(scan, 1) + rng.normal(0, 40, scan.shape)).astype(np.float32)


def test_psnr_equals_scikit_image(pair):
    a, b = pair
    assert similarity.psnr(a, b, RANGE) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=RANGE), abs=1e-4)
    assert similarity.psnr(a, a + 20, RANGE) == pytest.approx(20 * np.log10(RANGE / 20), abs=1e-3)
    assert similarity.psnr(a, a, RANGE) == float("inf")


def test_ssim_equals_scikit_image(pair):
    a, b = pair
    ours = similarity.ssim(a, b, RANGE)
    theirs = structural_similarity(a, b, data_range=RANGE, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert 0.1 < theirs < 0.95
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert similarity.ssim(a, a, RANGE) == pytest.approx(1.0, abs=1e-6)


def test_ms_ssim_equals_monai(pair):
    a, b = pair
    assert similarity.levels(a.shape) == 3
    weights = np.array(similarity.LEVEL_WEIGHTS[:3]) / sum(similarity.LEVEL_WEIGHTS[:3])
    tensors = (torch.from_numpy(x)[None, None] for x in (a, b))
    theirs = compute_ms_ssim(*tensors, spatial_dims=3, data_range=RANGE, weights=weights.tolist()).item()
    assert similarity.ms_ssim(a, b, RANGE) == pytest.approx(theirs, abs=1e-4)


def test_five_levels_need_161_voxels():
    assert [similarity.levels((n, 500, 500)) for n in (10, 11, 22, 175, 176)] == [0, 1, 2, 4, 5]


def scan_with_known_tissues() -> np.ndarray:
    scan = np.full((16, 24, 24), -1000, dtype=np.int16)
    for row, hu in zip(range(4, 20, 4), (-100, 40, 60, 600), strict=True):
        scan[:, row : row + 4, 4:20] = hu
    return scan


def test_a_shift_of_30_hu_is_an_error_of_30_hu():
    scan = scan_with_known_tissues()
    figures = reconstruction.compare(scan, scan + 30)
    full, soft = figures["full"], figures["soft"]
    assert full["mae_hu"] == pytest.approx(30)
    assert full["mae_hu_by_tissue"] == {"air": None, "lung": None, "fat": 30.0, "soft": 30.0, "bone": 30.0}
    assert soft["mae_hu_by_tissue"]["bone"] == 0.0  # 600 and 630 are both beyond the window
    assert soft["mae_hu_by_tissue"]["soft"] == pytest.approx(30)
    assert full["psnr_db"] == pytest.approx(20 * np.log10(2000 / 30), abs=1e-3)


def test_a_perfect_reconstruction_has_finite_figures():
    scan = scan_with_known_tissues()
    section = reconstruction.summarise([reconstruction.compare(scan, scan)] * 3, ["a", "b", "c"], scan.shape, seed=0)
    assert section["windows"]["full"]["psnr_db"] == {
        "status": "ok",
        "mean": 100.0,
        "interval": [100.0, 100.0],
        "patients": 3,
    }
    assert section["windows"]["full"]["mae_air_hu"] == {"status": "not enough", "need": 1}
    assert section["ms_ssim_scales"] == 1


def test_the_interval_is_over_patients_not_scans():
    scan = scan_with_known_tissues()
    figures = [reconstruction.compare(scan, scan + error) for error in (10, 10, 10, 10, 20, 30)]
    section = reconstruction.summarise(figures, ["a", "a", "a", "a", "b", "c"], scan.shape, seed=0)
    entry = section["windows"]["full"]["mae_hu"]
    assert entry["mean"] == pytest.approx(20)
    assert entry["patients"] == 3
    assert entry["interval"] == pytest.approx([10, 30], abs=4)
