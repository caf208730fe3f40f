"""How much the classifiers' AUC of one report depends on which samples were drawn: many small sets out of one large one.

    ctvae generate headneck --out many -n 96 --seed 5000
    python benchmarks/many_draws.py hn many --size 16 --draws 30

Each draw takes `size` of the samples, and one group at random of each real patient but `size`, as the report's classifiers do
(all: training patients too), or of each patient that no model was trained on (held out). Mean and standard deviation over draws.
Then slice-to-slice change, noise in soft tissue and its spectrum, of all samples, in shares of what all real patients have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ctvae.evaluation.cohort import Scan, real_scans, synthetic_scans
from ctvae.evaluation.distances import classifier_auc, standardise
from ctvae.evaluation.grid import Grid
from ctvae.evaluation.realism import percent_at_worst
from ctvae.evaluation.summary import Summary, summarise
from ctvae.progress import Progress

SPACES = ("texture", "layout", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--draws", type=int, default=30)
    asked = parser.parse_args()
    real, made = real_scans(asked.dataset), synthetic_scans(asked.samples)[0]
    grid = Grid.over(*([(scan.shape, scan.spacing_mm) for scan in side] for side in (real, made)))
    seen = [_measured(side, grid, name) for side, name in ((real, "real"), (made, "samples"))]
    patients = len({scan.patient for scan in real})
    print(f"{len(made)} samples, {asked.size} at a time, {asked.draws} draws, real scans of {patients} patients")
    for space in SPACES:
        x, y = (np.stack([np.atleast_2d(getattr(summary, space))[0] for summary in side]) for side in seen[::-1])
        found = {whom: _draws(x, y, _patients(real, whom), asked.size, asked.draws) for whom in ("all", "held out")}
        print(f"{space:8s}", *(f"{whom} {np.mean(aucs):.3f} +-{np.std(aucs):.3f}" for whom, aucs in found.items()), sep="   ")
    everyone = _patients(real, "all").values()
    for name, measure in (("slice-to-slice change", "step_hu"), ("noise in soft tissue", "noise_hu")):
        theirs, ours = (np.array([getattr(summary, measure) for summary in side]) for side in seen)
        each = [theirs[places][np.isfinite(theirs[places])] for places in everyone]  # some have no even soft tissue
        print(f"{name} {np.nanmean(ours) / np.mean([values.mean() for values in each if len(values)]):.3f} of real")
    theirs, ours = (np.stack([summary.noise for summary in side]) for side in seen)
    each = [theirs[places][np.isfinite(theirs[places]).all(1)] for places in everyone]
    real_noise = np.stack([spectra.mean(axis=0) for spectra in each if len(spectra)])
    ours = ours[np.isfinite(ours).all(1)]
    shares = ", ".join(f"{share:.2f}" for share in ours.mean(axis=0) / real_noise.mean(axis=0))
    print(f"noise spectrum by frequency {shares} of real, {percent_at_worst(ours, real_noise):.0f} % off at the worst")


def _measured(scans: list[Scan], grid: Grid, name: str) -> list[Summary]:
    with Progress(name, total=len(scans)) as bar:
        return [(summarise(scan.load(), grid), bar.update(number + 1))[0] for number, scan in enumerate(scans)]


def _patients(real: list[Scan], whom: str) -> dict[str, list[int]]:
    """Of each patient the places of all groups."""
    of: dict[str, list[int]] = {}
    for place, scan in enumerate(real):
        if whom == "all" or scan.split != "train":
            of.setdefault(scan.patient, []).append(place)
    return dict(sorted(of.items()))


def _draws(x: np.ndarray, y: np.ndarray, patients: dict[str, list[int]], size: int, draws: int) -> list[float]:
    """AUCs of samples x [n F] against real groups y [m F]."""
    found = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        names = list(patients)
        groups = np.array([rng.choice(patients[name]) for name in names])
        order, chosen = rng.permutation(len(names)), rng.permutation(len(x))[:size]
        kept = order[: len(order) - size] if len(order) > 3 * size else order
        z = standardise(np.concatenate([x[chosen], y[groups[kept]]]), y[groups])
        whose = np.array([*(f"sample {number}" for number in chosen), *(names[place] for place in kept)])
        found.append(classifier_auc(z[:size], z[size:], whose))
    return found


if __name__ == "__main__":
    main()
