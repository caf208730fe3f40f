"""Single scans that stand out from a folder: a wrong spacing, a body of impossible size, an empty scan.

Measures of sets cannot see one scan among a hundred. Here each scan's voxel sizes and body are held against the whole
range of the real scans, widened by a quarter. What most scans of a folder have in common is no outlier but a trait of
the folder, and is told once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctvae.evaluation.features import TEXTURE_NAMES
from ctvae.evaluation.grid import Triple
from ctvae.evaluation.summary import Summary

WIDENED = 1.25
QUANTITIES = {
    "voxel_x_mm": "voxels {value:.2f} mm wide",
    "voxel_y_mm": "voxels {value:.2f} mm high",
    "voxel_z_mm": "slices {value:.2f} mm apart",
    "body_width_mm": "a body {value:.0f} mm wide",
    "body_height_mm": "a body {value:.0f} mm deep",
    "body_area_cm2": "a body of {value:.0f} cm² across",
    "hu_std": "HU that spread by {value:.0f}",
}
NEED = 8  # real scans to know a range from
Array = NDArray[np.floating]


def stand_out(synthetic: Sequence[tuple[str, Triple, Summary]], real: Sequence[tuple[str, Triple, Summary]]) -> dict[str, Any]:
    """Scans (name, spacing x y z, summary) of `synthetic` outside the range of `real`: status, scans, traits."""
    if len(real) < NEED:
        return {"status": "not enough", "need": NEED, "have": len(real)}
    theirs, ours = _quantities(real), _quantities(synthetic)  # [n Q]
    low, high = theirs.min(axis=0), theirs.max(axis=0)
    outside = (ours < low / WIDENED) | (ours > high * WIDENED)  # [n Q]
    common = outside.mean(axis=0) > 0.5
    odd = [
        {"name": synthetic[i][0], "why": [_told(q, ours[i, q], low[q], high[q]) for q in np.flatnonzero(outside[i] & ~common)]}
        for i in np.flatnonzero((outside & ~common).any(axis=1)).tolist()
    ]
    traits = [_told(q, float(np.median(ours[:, q])), low[q], high[q]) for q in np.flatnonzero(common)]
    return {"status": "ok", "scans": odd, "traits": traits}


def _quantities(scans: Sequence[tuple[str, Triple, Summary]]) -> Array:
    return np.array([[*spacing_mm, *_body(summary)] for _, spacing_mm, summary in scans])


def _body(summary: Summary) -> list[float]:
    named = dict(zip(TEXTURE_NAMES, summary.texture, strict=True))
    area = np.mean([named[f"area_{third}"] for third in ("low", "mid", "high")])
    return [named["body_width_mm"], named["body_height_mm"], float(area), named["hu_std"]]


def _told(quantity: np.integer, value: float, low: float, high: float) -> str:
    words = list(QUANTITIES.values())[int(quantity)].format(value=value)
    return f"{words} (real {low:.3g} to {high:.3g})"
