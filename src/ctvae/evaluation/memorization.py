"""Are there copies of training scans among the synthetic ones?

Each synthetic scan is compared with every training patient, and so is each held-out scan, which cannot be a copy:
what the held-out ones show is what closeness means by chance. Two spaces: voxels (12 x 24 x 24 cells around the
body's middle, root mean square HU, mirrored scans included) and texture (standardised features). Two numbers per
scan: the distance d1 to its nearest training patient, and the ratio of d1 to the mean distance of the next five
(after Carlini et al. 2023), which a blurred scan, near to everyone, cannot make small but a copy does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import binom

from ctvae.evaluation.distances import standardise
from ctvae.evaluation.features import FULL_HU
from ctvae.evaluation.similarity import halve
from ctvae.evaluation.summary import Summary

NEXT = 5
CLOSEST_SHARE = 0.01
COPY_RATIO = 0.5  # a copy's ratio is below half of the smallest that any held-out scan has
SIGNIFICANT = 0.01
NEED_PATIENTS = NEXT + 2  # of training
NEED_HELD_OUT = 5  # scans; with fewer, training patients calibrate each other
MOST_PAIRS = 6  # per space
MOST_DISTANCES = 2**24  # in memory at a time
Array = NDArray[np.floating]


@dataclass(frozen=True)
class Closeness:
    """For each of n scans: its nearest training scan, how far that is, and that over the mean of the next five
    patients."""

    nearest: NDArray[np.integer]  # [n]
    distance: Array  # [n]
    ratio: Array  # [n]


def judge_scans(
    synthetic: Sequence[Summary], held_out: Sequence[Summary], training: Sequence[Summary], patients: Sequence[str]
) -> dict[str, Any]:
    """The verdict from summaries; `patients` names the patient of each training scan. Indices are the arguments'."""
    have = {"synthetic": len(synthetic), "training": len(set(patients)), "held_out": len(held_out)}
    if not synthetic or have["training"] < NEED_PATIENTS:
        return {"status": "not enough", "need": {"training": NEED_PATIENTS}, "have": have}
    held_out = held_out if len(held_out) >= NEED_HELD_OUT else []
    known = np.stack([scan.texture for scan in training])
    sides = [_embedded(side, known) for side in (synthetic, held_out, training)]
    sides[2] = {  # each training scan as it is and mirrored
        "voxels": np.concatenate([sides[2]["voxels"], _voxels_of(training, mirrored=True)]),
        "texture": np.concatenate([sides[2]["texture"]] * 2),
    }
    found = judge(sides[0], sides[1], sides[2], [*patients, *patients])
    for pair in found["pairs"]:
        pair["training"] %= len(training)
    return {**found, "scans": {"synthetic": len(synthetic), "training": len(training), "held_out": len(held_out)}}


def judge(
    synthetic: dict[str, Array], held_out: dict[str, Array], training: dict[str, Array], patients: Sequence[str]
) -> dict[str, Any]:
    """The verdict from embeddings by space name, each [scans F]; `patients` names the patient of each training scan.

    With an empty `held_out` each training scan is compared with the other patients instead.
    """
    spaces: dict[str, Any] = {}
    pairs: list[dict[str, Any]] = []
    count = len(next(iter(synthetic.values())))
    others = len(next(iter(held_out.values())))
    copies, close = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for name in synthetic:
        ours = closeness(synthetic[name], training[name], patients)
        if others:
            chance = closeness(held_out[name], training[name], patients)
        else:
            chance = closeness(training[name], training[name], patients, own=patients)
        limit = float(np.quantile(chance.distance, CLOSEST_SHARE, method="lower"))
        smallest = float(chance.ratio.min())
        is_copy, nearer = ours.ratio < COPY_RATIO * smallest, ours.distance < limit
        copies, close = copies | is_copy, close | (nearer & (ours.ratio < smallest))
        spaces[name] = _space(ours, chance, limit, smallest, nearer, is_copy)
        pairs += _pairs(name, ours, smallest, is_copy)
    expected = min(1.0, len(synthetic) * max(CLOSEST_SHARE, 1 / (1 + (others or len(set(patients))))))
    p_value = float(binom.sf(close.sum() - 1, count, expected))
    return {
        "status": "ok",
        "verdict": "copies" if copies.any() else "nearer than chance" if p_value < SIGNIFICANT else "none found",
        "copies": np.flatnonzero(copies).tolist(),
        "close": np.flatnonzero(close).tolist(),
        "p_value": p_value,
        "calibration": "held-out patients" if others else "training patients against each other",
        "spaces": spaces,
        "pairs": sorted(pairs, key=lambda pair: pair["ratio_to_real"]),
    }


def voxels(cells: NDArray[np.int16]) -> Array:
    """Cells [n d h w] of HU as vectors whose Euclidean distance is the root mean square difference in HU."""
    halved = np.stack([halve(np.clip(c, *FULL_HU).astype(np.float32)) for c in cells])
    return halved.reshape(len(cells), -1) / np.sqrt(halved[0].size)


def closeness(x: Array, training: Array, patients: Sequence[str], own: Sequence[str] | None = None) -> Closeness:
    """How close scans x [n F] are to training scans [m F]; each x is not compared with its `own` patient, if given."""
    names, of = np.unique(np.asarray(patients), return_inverse=True)
    order = np.argsort(of, kind="stable")  # columns patient by patient, beginning at `starts`
    starts = np.searchsorted(of[order], np.arange(len(names)))
    at_a_time = max(1, MOST_DISTANCES // len(training))
    parts = []
    for first in range(0, len(x), at_a_time):
        distance = cdist(x[first : first + at_a_time], training)  # [b m]
        if own is not None:
            distance[np.equal.outer(np.asarray(own[first : first + at_a_time]), np.asarray(patients))] = np.inf
        ranked = np.sort(np.minimum.reduceat(distance[:, order], starts, axis=1), axis=1)  # [b patients]
        following = np.maximum(ranked[:, 1 : 1 + NEXT].mean(axis=1), 1e-12)
        parts.append((distance.argmin(axis=1), ranked[:, 0], ranked[:, 0] / following))
    nearest, closest, ratio = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Closeness(nearest, closest, ratio)


def wilson(hits: int, count: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    share, weight = hits / count, z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt(share * (1 - share) / count + weight / (4 * count))
    return [float(max(middle - half, 0.0)), float(min(middle + half, 1.0))]


def _embedded(side: Sequence[Summary], known: Array) -> dict[str, Array]:
    """Both spaces' vectors of `side`; texture in standard deviations of the training scans, per feature."""
    if not side:
        return {"voxels": np.empty((0, 0)), "texture": np.empty((0, 0))}
    texture = standardise(np.stack([scan.texture for scan in side]), known) / np.sqrt(known.shape[1])
    return {"voxels": _voxels_of(side), "texture": texture}


def _voxels_of(side: Sequence[Summary], mirrored: bool = False) -> Array:
    cells = np.stack([scan.cells for scan in side])
    return voxels(cells[..., ::-1] if mirrored else cells)


def _pairs(space: str, ours: Closeness, smallest: float, copy: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The scans that stand out most, each with its nearest training scan."""
    return [
        {
            "synthetic": int(i),
            "training": int(ours.nearest[i]),
            "space": space,
            "distance": float(ours.distance[i]),
            "ratio": float(ours.ratio[i]),
            "ratio_to_real": float(ours.ratio[i] / smallest),
            "copy": bool(copy[i]),
        }
        for i in np.argsort(ours.ratio)[:MOST_PAIRS]
    ]


def _space(
    ours: Closeness,
    chance: Closeness,
    limit: float,
    smallest: float,
    nearer: NDArray[np.bool_],
    copy: NDArray[np.bool_],
) -> dict[str, Any]:
    return {
        "median_distance": float(np.median(ours.distance)),
        "median_distance_held_out": float(np.median(chance.distance)),
        "closest_percent_of_held_out": limit,
        "share_nearer": float(nearer.mean()),
        "share_nearer_interval": wilson(int(nearer.sum()), len(nearer)),
        "smallest_ratio": float(ours.ratio.min()),
        "smallest_ratio_held_out": smallest,
        "copies": int(copy.sum()),
    }
