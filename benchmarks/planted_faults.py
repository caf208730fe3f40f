"""Plant faults in real scans and see whether `ctvae evaluate` catches each of them with the measure that should.

    python benchmarks/planted_faults.py DATASET --out faults
    python benchmarks/planted_faults.py --phantoms 70 --out faults-phantoms

Some patients of DATASET (or of drawn phantoms) are taken off the real side and stand for a generator's samples: untouched as
a control, and once with each fault. All folders are judged in one report, OUT/report/index.html; the table is printed and
written to OUT/faults.md, and the exit code is 1 when a fault that can be seen was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from ctvae import nifti
from ctvae.dataset import Dataset, Group
from ctvae.evaluation.evaluate import evaluate
from ctvae.progress import Progress
from ctvae.volume import Volume, plain_affine

Side = list[Volume]
Rng = np.random.Generator
SPACING_ERROR = 1.15
CUT = 0.3  # of the body's width


@dataclass(frozen=True)
class Fault:
    """`plant(samples, training, rng)` spoils the samples; one of `caught_by` must see it (copies, outliers or measures)."""

    name: str
    plant: Callable[[Side, Side, Rng], Side]
    caught_by: tuple[str, ...]


def each(change: Callable[[np.ndarray, Rng], np.ndarray]) -> Callable[[Side, Side, Rng], Side]:
    """A fault of every sample: `change(hu [D H W] float, rng)`."""
    return lambda side, training, rng: [with_hu(v, change(v.hu.astype(np.float32), rng)) for v in side]


def with_hu(volume: Volume, hu: np.ndarray) -> Volume:
    return Volume(np.rint(hu).clip(-1024, 3071).astype(np.int16), volume.affine)


def copied(side: Side, training: Side, rng: Rng) -> Side:
    """5 % of the samples, one at least, are training scans with 10 HU of noise."""
    count = max(1, round(0.05 * len(side)))
    chosen = [training[i] for i in rng.choice(len(training), count, replace=False)]
    return [*side[: len(side) - count], *(with_hu(v, v.hu + rng.normal(0, 10, v.hu.shape)) for v in chosen)]


def collapsed(side: Side, training: Side, rng: Rng) -> Side:
    return [with_hu(side[i % 3], side[i % 3].hu + rng.normal(0, 3, side[i % 3].hu.shape)) for i in range(len(side))]


def truncated(hu: np.ndarray, rng: Rng) -> np.ndarray:
    """The patient's right side is cut off by CUT of the body's width, as by too small a field of view."""
    columns = np.flatnonzero((hu > -500).mean(axis=(0, 1)) > 0.02)
    hu[:, :, : columns[0] + int(CUT * (columns[-1] - columns[0]))] = -1000
    return hu


def respaced(volume: Volume, factors: tuple[float, float, float]) -> Volume:
    x, y, z = (mm * factor for mm, factor in zip(volume.spacing_mm, factors, strict=True))
    return Volume(volume.hu, plain_affine((x, y, z), volume.hu.shape))


def one_lost_spacing(side: Side, training: Side, rng: Rng) -> Side:
    """One sample has lost its spacing: 1 x 1 x 1 mm."""
    return [Volume(side[0].hu, plain_affine((1.0, 1.0, 1.0), side[0].hu.shape)), *side[1:]]


FAULTS = (
    Fault("none (control)", lambda side, training, rng: side, ()),
    Fault("5 % copied training scans", copied, ("copies",)),
    Fault("blur of 1 voxel", each(lambda hu, rng: gaussian_filter(hu, 1.0)), ("power_spectrum",)),
    Fault("+30 HU", each(lambda hu, rng: hu + 30), ("hu_histogram", "classifier_texture")),
    Fault("shuffled slices", each(lambda hu, rng: hu[rng.permutation(len(hu))]), ("slice_continuity",)),
    Fault("mirrored left and right", each(lambda hu, rng: hu[:, :, ::-1]), ("handedness",)),
    Fault("collapse to 3 scans", collapsed, ("diversity_nearest", "coverage_layout", "coverage_texture")),
    Fault("truncated field of view", each(truncated), ("frechet_layout", "kernel_layout", "classifier_layout")),
    Fault("one wrong spacing", one_lost_spacing, ("outliers",)),
    Fault(
        "spacing 15 % wrong in all",
        lambda side, training, rng: [respaced(v, (SPACING_ERROR, SPACING_ERROR, 1.0)) for v in side],
        ("coverage_layout", "kernel_layout", "frechet_layout", "classifier_layout", "classifier_texture"),
    ),
)


def folder_of(fault: Fault) -> str:
    return "".join(c if c.isalnum() else "-" for c in fault.name).strip("-").replace("--", "-")


def take_apart(dataset: Dataset, samples: int, out: Path, seed: int) -> tuple[list[Group], Path]:
    """Groups of `samples` patients to stand for synthetic scans, and a dataset without these patients."""
    rng = np.random.default_rng(seed)
    groups = dataset.groups()
    patients = sorted({group.patient for group in groups if group.split != "test"})
    validation = {group.patient for group in groups if group.split == "validation"}
    order = sorted((patients[int(i)] for i in rng.permutation(len(patients))), key=lambda p: p not in validation)
    pool = order[:samples]
    chosen = [(own := [group for group in groups if group.patient == patient])[int(rng.integers(len(own)))] for patient in pool]
    rest = out / "real"
    rest.mkdir(parents=True, exist_ok=True)
    link = rest / "groups"
    if not link.exists():
        link.symlink_to((dataset.folder / "groups").resolve())
    told = json.loads((dataset.folder / "dataset.json").read_text())
    kept = [{**entry, "label_path": None} for entry in told["groups"] if entry["patient"] not in set(pool)]
    content = {**told, "scans": [], "rejected": [], "notes": [], "groups": kept}
    (rest / "dataset.json").write_text(json.dumps(content))
    return chosen, rest


def phantoms(count: int, out: Path) -> Dataset:
    from ctvae.phantoms import write_phantoms
    from ctvae.prepare import prepare

    write_phantoms(out / "phantoms", count, shape=(32, 64, 64), spacing_mm=(6.25, 6.25, 6.0))
    return prepare([out / "phantoms"], out / "dataset", slices=32, workers=1)


def caught(entry: dict[str, Any], name: str) -> tuple[bool, str]:
    """Whether the measure, `copies` or `outliers` saw something, and what it said."""
    if name == "copies":
        found = entry["memorization"].get("copies", [])
        return bool(found), f"{len(found)} found"
    if name == "outliers":
        found = entry["outliers"].get("scans", [])
        return bool(found), f"{len(found)} found"
    measure = next(m for m in entry["measures"] if m["id"] == name)
    if measure["status"] != "ok":
        return False, f"needs {measure['need']} scans"
    floor = measure["floor"]
    return not measure["within_floor"], f"{measure['value']:.3g} (real {floor['low']:.3g} to {floor['high']:.3g})"


def rows(report: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The table, and the faults that were missed."""
    entries = {entry["name"]: entry for entry in report["sets"]}
    table, missed = [], []
    for fault in FAULTS:
        entry = entries[folder_of(fault)]
        found = {name: caught(entry, name) for name in (fault.caught_by or ("copies", "outliers"))}
        said = "; ".join(f"{name} {words}" for name, (_, words) in found.items())
        outside = entry["verdict"]["measures_judged"] - entry["verdict"]["measures_within_floor"]
        seen = any(yes for yes, _ in found.values())
        right = seen == bool(fault.caught_by)
        table.append([fault.name, said, str(outside), "yes" if seen else "no"])
        if not right:
            missed.append(fault.name)
    return table, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--phantoms", type=int, help="draw this many instead")
    parser.add_argument("--samples", type=int, default=24, help="patients that stand for a generator's samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    dataset = phantoms(asked.phantoms, asked.out) if asked.phantoms else Dataset.open(asked.dataset)
    chosen, rest = take_apart(dataset, asked.samples, asked.out, asked.seed)
    kept = Dataset.open(rest)
    samples, training = [dataset.volume(g) for g in chosen], [kept.volume(g) for g in kept.groups("train")]
    folders = [asked.out / folder_of(fault) for fault in FAULTS]
    for index, (fault, folder) in enumerate(zip(FAULTS, folders, strict=True)):
        rng = np.random.default_rng([asked.seed, index])
        for i, volume in enumerate(fault.plant(samples, training, rng)):
            nifti.write(folder / f"sample_{i:02d}.nii.gz", volume)
    with Progress("planted faults") as bar:
        report = evaluate(
            rest, folders, asked.out / "report", seed=asked.seed, cache=asked.out / "measured", progress=bar.report
        )
    table, missed = rows(report)
    heads = ["Fault", "The measure that should see it", "Measures outside", "Caught"]
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *table)]
    (asked.out / "faults.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nmissed or false: {', '.join(missed) or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
