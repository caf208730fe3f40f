"""Two feature spaces that need no download: texture (what the voxels are like) and layout (where they are).

Texture is radiomics-like, 65 numbers per scan, named by TEXTURE_NAMES after the first call: first-order statistics of
HU in the body (Zwanenburg et al. 2020, section 3.3), tissue fractions in the lower, middle and upper third,
differences and correlations between neighbours at several scales, the shape of the body. Layout is the 56 lowest 3D
cosine coefficients of the scan around the body's middle. Neither is learned, so neither can have been fitted to one
side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.fft import dctn

from ctvae.evaluation.grid import AIR_HU, Triple

TISSUE_HU = {"air": (-np.inf, -900.0), "lung": (-900.0, -300.0), "fat": (-300.0, -30.0), "soft": (-30.0, 150.0)}
TISSUE_HU["bone"] = (150.0, np.inf)
SOFT_HU = (-160.0, 240.0)
FULL_HU = (-1000.0, 1000.0)
LAYOUT_ORDER = 5
AXES = "dhw"
Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


def texture(hu: Array, body: Mask, spacing_mm: Triple) -> dict[str, float]:
    """The named texture features of a scan [D H W] with its body mask; every value is finite."""
    x, m = _around_body(np.clip(hu, *FULL_HU).astype(np.float32), body)
    offset = _offset_mm(body, spacing_mm)
    named = {
        **_first_order(x[m]),
        **_tissue_by_third(x, m),
        **_neighbours(np.clip(x, *SOFT_HU), m),
        **_shape(m, spacing_mm),
    }
    return {name: float(value) if np.isfinite(value) else 0.0 for name, value in {**named, **offset}.items()}


def layout(cells: Array) -> Array:
    """The lowest cosine coefficients of a scan on the common cells [d h w], in HU: [56]."""
    coefficients = dctn(np.clip(cells, *FULL_HU).astype(np.float32) - AIR_HU, norm="ortho") / np.sqrt(cells.size)
    order = np.add.outer(np.add.outer(np.arange(cells.shape[0]), np.arange(cells.shape[1])), np.arange(cells.shape[2]))
    return coefficients[order <= LAYOUT_ORDER]


def tissue_fractions(values: Array) -> Array:
    """Shares of HU `values` that are air, lung, fat, soft tissue, bone: [5]."""
    if values.size == 0:
        return np.zeros(len(TISSUE_HU))
    return np.array([np.mean((values >= low) & (values < high)) for low, high in TISSUE_HU.values()])


def _around_body(x: Array, body: Mask) -> tuple[Array, Mask]:
    box = ndimage.find_objects(body.astype(np.uint8))[0]
    box = (slice(0, x.shape[0]), *box[1:])  # thirds are of the scan, not of the body
    return x[box], body[box]


def _first_order(values: Array) -> dict[str, float]:
    values = values.astype(np.float64)
    mean, std = values.mean(), values.std()
    standard = (values - mean) / max(std, 1e-6)
    soft = values[(values > SOFT_HU[0]) & (values < SOFT_HU[1])]
    soft = soft if soft.size else np.zeros(1)
    shares = np.histogram(values, bins=80, range=FULL_HU)[0] / values.size
    percentiles = {f"hu_p{p}": q for p, q in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}
    return {
        "hu_mean": mean,
        "hu_std": std,
        "hu_skewness": (standard**3).mean(),
        "hu_kurtosis": (standard**4).mean(),
        "hu_entropy": -(shares[shares > 0] * np.log2(shares[shares > 0])).sum(),
        "hu_uniformity": (shares**2).sum(),
        "soft_mean": soft.mean(),
        "soft_std": soft.std(),
        "soft_median": np.median(soft),
        **percentiles,
    }


_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def _tissue_by_third(x: Array, m: Mask) -> dict[str, float]:
    named = {}
    for third, (piece, inside) in zip(("low", "mid", "high"), zip(_thirds(x), _thirds(m), strict=True), strict=True):
        for tissue, share in zip(TISSUE_HU, tissue_fractions(piece[inside]), strict=True):
            named[f"{tissue}_{third}"] = share
    return named


def _neighbours(x: Array, m: Mask) -> dict[str, float]:
    """Mean |difference| of neighbours at scales 1, 2, 4 voxels, band energies, correlations at lags 1, 2, 4."""
    named = {}
    mean, variance = x[m].mean(), max(float(x[m].var()), 1e-6)
    for axis in range(3):
        for lag in (1, 2, 4):
            ahead, behind = _shifted(x, axis, lag), _shifted(x, axis, -lag)
            both = _shifted(m, axis, lag) & _shifted(m, axis, -lag)
            if not both.any():
                continue
            a, b = ahead[both] - mean, behind[both] - mean
            named[f"step_{AXES[axis]}{lag}"] = np.abs(a - b).mean()
            named[f"correlation_{AXES[axis]}{lag}"] = (a * b).mean() / variance
    smooth = [x, *(ndimage.gaussian_filter(x, sigma, truncate=3) for sigma in (1, 2, 4))]
    for (name, fine), coarse in zip(zip(("fine", "middle", "broad"), smooth[:-1], strict=True), smooth[1:], strict=True):
        named[f"band_{name}"] = (fine - coarse)[m].std()
    return {name: named.get(name, 0.0) for name in _NEIGHBOUR_NAMES}


_NEIGHBOUR_NAMES = [f"{kind}_{axis}{lag}" for axis in AXES for lag in (1, 2, 4) for kind in ("step", "correlation")]
_NEIGHBOUR_NAMES += ["band_fine", "band_middle", "band_broad"]


def _shape(m: Mask, spacing_mm: Triple) -> dict[str, float]:
    x_mm, y_mm, z_mm = spacing_mm
    area = m.sum(axis=(1, 2)) * x_mm * y_mm / 100  # cm^2 per slice
    width, height = m.any(axis=(0, 1)).sum() * x_mm, m.any(axis=(0, 2)).sum() * y_mm
    faces = np.abs(np.diff(m.astype(np.int8), axis=1)).sum() * x_mm + np.abs(np.diff(m.astype(np.int8), axis=2)).sum() * y_mm
    litres = area.sum() * z_mm / 1e4
    named = {
        "body_litres": litres,
        "body_width_mm": width,
        "body_height_mm": height,
        "scan_length_mm": len(area) * z_mm,
    }
    named["outline_per_area"] = faces / 10 / max(area.sum(), 1e-6)
    named["area_step"] = np.abs(np.diff(area)).sum() / max(area.sum(), 1e-6)
    return {
        **named,
        **{f"area_{third}": a.mean() for third, a in zip(("low", "mid", "high"), _thirds(area), strict=True)},
    }


def _offset_mm(body: Mask, spacing_mm: Triple) -> dict[str, float]:
    _, h, w = ndimage.center_of_mass(body)
    return {
        "body_offset_x_mm": (w - (body.shape[2] - 1) / 2) * spacing_mm[0],
        "body_offset_y_mm": (h - (body.shape[1] - 1) / 2) * spacing_mm[1],
    }


def _thirds(x: NDArray) -> list[NDArray]:
    return np.array_split(x, 3)


def _shifted(x: NDArray, axis: int, lag: int) -> NDArray:
    """x without its first (lag > 0) or last (lag < 0) planes."""
    part = slice(lag, None) if lag > 0 else slice(None, lag)
    return x[tuple(part if a == axis else slice(None) for a in range(3))]


TEXTURE_NAMES = tuple(texture(np.zeros((6, 6, 6)), np.ones((6, 6, 6), dtype=bool), (1.0, 1.0, 1.0)))
