"""Measure slice-to-slice change where slabs begin or end, against elsewhere, in volumes longer than one group.

    python benchmarks/seams.py MODEL --slices 160 --count 4 --steps 8 --out FOLDER

Change from one slice to the next is the mean absolute HU over the body (above -300 HU in either slice). Every join is divided by
the mean of the nearest places before and after it that are no joins; as the decoder has a grid along z of its own, those are
boundaries between latent slices as well, where there are such without a join. 1 means that nothing can be seen. As a check that
the measure would see a seam, two volumes are put together at places that are no joins.

Prints the geometric mean of the ratios with a 95 % interval (bootstrap over joins). Scans already in FOLDER are kept.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np

from ctvae import nifti, slabs
from ctvae.generate import generate, load

BODY_HU = -300


def change(lower: np.ndarray, upper: np.ndarray) -> float:
    """Mean absolute HU between two slices [H W], over the body."""
    body = np.maximum(lower, upper) > BODY_HU
    return float(np.abs(lower.astype(np.float32) - upper)[body].mean()) if body.any() else math.nan


def changes(hu: np.ndarray) -> np.ndarray:
    """[D] -> number z is the change from slice z - 1 to z; the first is NaN."""
    return np.array([math.nan, *(change(a, b) for a, b in itertools.pairwise(hu))])


def places(slices: int, depth: int, cell: int) -> tuple[list[int], list[int]]:
    """Slices at which slabs of `depth` latent slices begin or end inside the volume, and where to compare."""
    total = max(depth, math.ceil(slices / cell))
    starts = slabs.covering(total, depth)
    joins = {start for start in starts} | {start + depth for start in starts}
    cut = (total * cell - slices) // 2
    boundaries = {boundary * cell - cut: boundary in joins for boundary in range(1, total)}
    inside = {z: join for z, join in boundaries.items() if 0 < z < slices}
    elsewhere = [z for z, join in inside.items() if not join] or [z for z in range(1, slices) if z not in inside]
    return [z for z, join in inside.items() if join], elsewhere


def ratio(found: np.ndarray, join: int, elsewhere: list[int], at: float | None = None) -> float:
    """Change at a join over the mean of the nearest places on either side; `at` instead of what is found there."""
    around = [max((z for z in elsewhere if z < join), default=None), min((z for z in elsewhere if z > join), default=None)]
    beside = [found[z] for z in around if z is not None]
    return (found[join] if at is None else at) / float(np.mean(beside))


def told(name: str, ratios: list[float]) -> str:
    logs = np.log([ratio for ratio in ratios if math.isfinite(ratio) and ratio > 0])
    rng = np.random.default_rng(0)
    means = np.exp([rng.choice(logs, len(logs)).mean() for _ in range(2000)])
    low, high = np.percentile(means, (2.5, 97.5))
    return f"| {name} | {len(logs)} | {np.exp(logs.mean()):.3f} | {low:.3f} to {high:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--slices", type=int, default=160)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = load(asked.model)
    paths = generate(
        asked.model, asked.out, count=asked.count, seed=asked.seed, steps=asked.steps, solver=asked.solver, slices=asked.slices
    )
    volumes = [nifti.read(path)[0] for path in paths]
    depth = model.network.latent_shape[1]
    joins, elsewhere = places(asked.slices, depth, model.shape[0] // depth)
    found = [changes(volume.hu) for volume in volumes]
    print("| where | n | change over that beside it | 95 % |\n|---|---|---|---|")
    print(told("joins", [ratio(one, join, elsewhere) for one in found for join in joins]))
    both = [z for z in elsewhere if z - 1 > min(elsewhere) and z < max(elsewhere)]
    others = {z: [other for other in elsewhere if other != z] for z in both}
    print(told("places that are none", [ratio(one, z, others[z]) for one in found for z in both]))
    put_together = [
        ratio(found[i], z, others[z], change(a.hu[z - 1], b.hu[z]))
        for (i, a), (_, b) in itertools.permutations(enumerate(volumes), 2)
        for z in both
    ]
    if put_together:
        print(told("two volumes put together", put_together))


if __name__ == "__main__":
    main()
