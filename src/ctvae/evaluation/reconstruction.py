"""How much of a real scan survives being encoded and decoded: PSNR, SSIM, MS-SSIM and HU error, in two windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctvae.evaluation.features import TISSUE_HU
from ctvae.evaluation.grid import body_mask
from ctvae.evaluation.similarity import RADIUS, levels, ms_ssim, psnr, ssim

WINDOWS_HU = {"full": (-1000.0, 1000.0), "soft": (-160.0, 240.0)}
BOOTSTRAPS = 1000
Array = NDArray[np.floating]


def compare(scan: Array, again: Array) -> dict[str, Any]:
    """Figures of one reconstruction `again` against its scan, both HU [D H W], by window.

    Both are clipped to the window first, and the data range of PSNR and SSIM is its width. `mae_hu` is the mean
    |error| over all voxels, `mae_body_hu` over the body, `mae_hu_by_tissue` over the body's voxels whose true HU is
    that tissue's. None where a figure has no voxels or the volume is too small for it.
    """
    body = body_mask(scan)
    figures = {}
    for name, (low, high) in WINDOWS_HU.items():
        a, b = np.clip(scan, low, high).astype(np.float32), np.clip(again, low, high).astype(np.float32)
        error = np.abs(a - b)
        fits = min(a.shape) > 2 * RADIUS
        figures[name] = {
            "psnr_db": min(psnr(b, a, high - low), 100.0),  # equal volumes: 100 dB, so that means stay finite
            "ssim": ssim(b, a, high - low) if fits else None,
            "ms_ssim": ms_ssim(b, a, high - low) if fits else None,
            "mae_hu": float(error.mean()),
            "mae_body_hu": float(error[body].mean()),
            "mae_hu_by_tissue": _by_tissue(scan, error, body),
        }
    return figures


def summarise(figures: Sequence[dict[str, Any]], patients: Sequence[str], shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Means over scans with bootstrap intervals over patients, by window and figure."""
    rng = np.random.default_rng([seed, 5])
    windows: dict[str, Any] = {}
    for window in WINDOWS_HU:
        flat = [_flat(figure[window]) for figure in figures]
        windows[window] = {key: _mean([row[key] for row in flat], patients, rng) for key in flat[0]}
    return {"status": "ok", "scans": len(figures), "ms_ssim_scales": levels(shape), "windows": windows}


def _by_tissue(scan: Array, error: Array, body: NDArray[np.bool_]) -> dict[str, float | None]:
    named: dict[str, float | None] = {}
    for tissue, (low, high) in TISSUE_HU.items():
        here = body & (scan >= low) & (scan < high)
        named[tissue] = float(error[here].mean()) if here.any() else None
    return named


def _flat(figure: dict[str, Any]) -> dict[str, float | None]:
    tissues = {f"mae_{tissue}_hu": value for tissue, value in figure["mae_hu_by_tissue"].items()}
    return {**{key: value for key, value in figure.items() if key != "mae_hu_by_tissue"}, **tissues}


def _mean(values: list[float | None], patients: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    by_patient: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        if value is not None:
            by_patient.setdefault(patient, []).append(value)
    if not by_patient:
        return {"status": "not enough", "need": 1}
    means = np.array([np.mean(v) for v in by_patient.values()])
    draws = means[rng.integers(len(means), size=(BOOTSTRAPS, len(means)))].mean(axis=1)
    interval = [float(q) for q in np.quantile(draws, (0.025, 0.975))] if len(means) >= 3 else None
    return {"status": "ok", "mean": float(means.mean()), "interval": interval, "patients": len(means)}
