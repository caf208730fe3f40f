"""Everything that is compared, read and measured: the real side, one or more synthetic sets, and the anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ctvae.errors import InputError
from ctvae.evaluation import cohort, realism
from ctvae.evaluation.anchors import Anchor
from ctvae.evaluation.cohort import Cohort, Scan
from ctvae.evaluation.grid import Grid
from ctvae.evaluation.medicalnet import MedicalNet
from ctvae.evaluation.summary import Summary, summarise

Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True, eq=False)
class SyntheticSet:
    """One folder of synthetic scans."""

    name: str
    path: Path
    scans: list[Scan]


@dataclass(frozen=True, eq=False)
class Measured:
    """Both sides. `summaries` is keyed by scan name; names are told apart over all sides."""

    sets: list[SyntheticSet]
    real: Cohort
    anchors: list[Anchor]
    grid: Grid
    summaries: dict[str, Summary]

    def of(self, scans: Sequence[Scan]) -> list[Summary]:
        return [self.summaries[scan.name] for scan in scans]

    @property
    def order(self) -> list[Scan]:
        """Every scan that is compared; real ones first, so that their numbers do not depend on who else is there."""
        sides = [self.real.reference, self.real.others, *(s.scans for s in self.sets), *(a.scans for a in self.anchors)]
        return [scan for side in sides for scan in side]

    def indices(self, scans: Sequence[Scan]) -> realism.Sides:
        """Where `scans`, as the synthetic side, and the real side stand in `order`."""
        place = {scan.name: i for i, scan in enumerate(self.order)}
        reference = len(self.real.reference)
        return realism.Sides(
            np.array([place[scan.name] for scan in scans]), np.arange(reference), np.arange(reference + len(self.real.others))
        )


def synthetic_sets(paths: Sequence[Path], real: Sequence[Scan]) -> tuple[list[SyntheticSet], list[str]]:
    """The folders `paths`, and notes. Raises InputError for one that is named twice or made from a real patient's scan."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in resolved if resolved.count(path) > 1)
        raise InputError(f"{twice}: named twice; give every synthetic folder once")
    plain = [path.name for path in resolved]
    names = [path.name if plain.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in resolved]
    sets, notes = [], []
    for name, path in zip(names, paths, strict=True):
        cohort.refuse_made_from(path, real)
        scans, said = cohort.synthetic_scans(path)
        if len(paths) > 1:
            scans = [replace(scan, name=f"{name}/{scan.name}", patient=f"{scan.patient} of {name}") for scan in scans]
            said = [f"{name}: {text}" for text in said]
        elif {scan.name for scan in scans} & {scan.name for scan in real}:  # files called alike: names have to tell them apart
            scans = [replace(scan, name=f"synthetic {scan.name}") for scan in scans]
        sets.append(SyntheticSet(name, path, scans))
        notes += said
    return sets, notes


def measure(
    sets: list[SyntheticSet], real: Cohort, anchors: list[Anchor], cache: Path, medicalnet: MedicalNet | None, tell: Progress
) -> Measured:
    """Read and measure every scan once; what `cache` holds already is taken from there."""
    synthetic = [scan for one in sets for scan in one.scans]
    everyone = [*real.reference, *real.others, *real.training, *real.held_out, *synthetic]
    everyone += [scan for anchor in anchors for scan in anchor.scans]
    todo = {scan.name: scan for scan in everyone}
    grid = Grid.over(
        [(scan.shape, scan.spacing_mm) for scan in [*real.reference, *real.others]],
        [(scan.shape, scan.spacing_mm) for scan in synthetic],
    )
    summaries = {}
    for done, (name, scan) in enumerate(todo.items()):
        tell(done, len(todo), "measuring scans")
        summaries[name] = summarise(scan.load(), grid, cache, medicalnet)
    tell(len(todo), len(todo), "measuring scans")
    known = [scan for scan in [*real.others, *real.held_out] if scan.split not in ("train", None)]
    known += real.reference  # copies of training scans are not refused but reported
    cohort.refuse_same_scans(synthetic, {summaries[scan.name].digest: scan.name for scan in known})
    return Measured(sets, real, anchors, grid, summaries)
