"""How alike two volumes of one shape are: PSNR, SSIM, MS-SSIM. Pure functions of arrays.

SSIM (Wang, Bovik, Sheikh, Simoncelli 2004) with the Gaussian window of the paper (sigma 1.5 voxels, 11 taps, population
variances), over the positions where the window lies inside the volume. For local means m, variances v and covariance c,

    contrast-structure  cs = (2 c_xy + C2) / (v_x + v_y + C2),   SSIM = cs (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1)

with C1 = (0.01 R)^2, C2 = (0.03 R)^2 and R the data range. MS-SSIM (Wang, Simoncelli, Bovik 2003) is the weighted
product of cs over halved resolutions, with SSIM at the coarsest. Five levels need 161 voxels along every axis; smaller
volumes take the levels that fit, with the paper's weights for those scaled to sum to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

RADIUS = 5
SIGMA_VOXELS = 1.5
LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
Array = NDArray[np.floating]


def psnr(a: Array, b: Array, data_range: float) -> float:
    """Peak signal-to-noise ratio 10 log10(R^2 / MSE) in dB; infinite for equal volumes."""
    mse = float(np.mean(np.square(a.astype(np.float64) - b)))
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def ssim(a: Array, b: Array, data_range: float) -> float:
    """Mean structural similarity of two volumes [D H W], each side at least 11 voxels."""
    return _ssim_and_contrast(a, b, data_range)[0]


def ms_ssim(a: Array, b: Array, data_range: float) -> float:
    """Multi-scale structural similarity of two volumes [D H W], on `levels(shape)` scales."""
    count = levels(a.shape)
    weights = np.array(LEVEL_WEIGHTS[:count]) / sum(LEVEL_WEIGHTS[:count])
    product = 1.0
    for level, weight in enumerate(weights):
        value, contrast = _ssim_and_contrast(a, b, data_range)
        last = level == count - 1
        product *= max(value if last else contrast, 0.0) ** weight
        if not last:
            a, b = halve(a), halve(b)
    return float(product)


def levels(shape: tuple[int, ...]) -> int:
    """How many of MS-SSIM's five scales fit: the window must fit into the coarsest."""
    window = 2 * RADIUS + 1
    return sum(min(shape) // 2**level >= window for level in range(len(LEVEL_WEIGHTS)))


def halve(x: Array) -> Array:
    """Means of 2x2x2 voxels; an odd last plane is dropped. [D H W] -> [D/2 H/2 W/2]"""
    d, h, w = (size // 2 for size in x.shape)
    return x[: 2 * d, : 2 * h, : 2 * w].reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))


def _ssim_and_contrast(a: Array, b: Array, data_range: float) -> tuple[float, float]:
    assert a.shape == b.shape, f"two shapes: {a.shape}, {b.shape}"
    assert min(a.shape) > 2 * RADIUS, f"too small for SSIM's window: {a.shape}"
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    a, b = a.astype(np.float32), b.astype(np.float32)
    shift = np.float32(a.mean())  # variances do not feel it, float32 does
    a0, b0 = a - shift, b - shift
    mean_a, mean_b = _window_mean(a0), _window_mean(b0)
    spread = _window_mean(a0 * a0 + b0 * b0) - mean_a**2 - mean_b**2
    contrast = (2 * (_window_mean(a0 * b0) - mean_a * mean_b) + c2) / (spread + c2)
    mean_a, mean_b = mean_a + shift, mean_b + shift
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * contrast).mean(dtype=np.float64)), float(contrast.mean(dtype=np.float64))


def _window_mean(x: Array) -> Array:
    """Gaussian mean around each voxel whose window lies inside. [D H W] -> [D-10 H-10 W-10]"""
    taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA_VOXELS) ** 2)
    taps /= taps.sum()
    for axis in range(3):
        inside = tuple(slice(RADIUS, -RADIUS) if a == axis else slice(None) for a in range(3))
        x = correlate1d(x, taps, axis=axis)[inside]
    return x
