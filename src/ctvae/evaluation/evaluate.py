"""`ctvae evaluate`: a folder of real scans and one or more of synthetic scans in, report.json and one page out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ctvae.errors import InputError
from ctvae.evaluation import appendix, cohort, gallery, memorization, page, ranking, realism, reconstruction
from ctvae.evaluation.anchors import Anchor, anchors
from ctvae.evaluation.cohort import Cohort, Scan
from ctvae.evaluation.medicalnet import load
from ctvae.evaluation.outliers import stand_out
from ctvae.evaluation.realism import Floors, Judged
from ctvae.evaluation.sides import Measured, Progress, SyntheticSet, measure, synthetic_sets
from ctvae.evaluation.verdict import overall, verdict
from ctvae.files import sweep, write_json, write_text
from ctvae.version import __version__
from ctvae.volume import Volume

SCHEMA_VERSION = 2
MOST_RECONSTRUCTED = 8
Reconstruct = Callable[[Volume], Volume]
Again = list[tuple[Scan, Volume, Volume]]  # a scan, its volume, its reconstruction


def evaluate(
    real: Path | str,
    synthetic: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    split: str = "test",
    reconstruct: Reconstruct | Mapping[str, Reconstruct] | None = None,
    seed: int = 0,
    format: Literal["html", "md"] = "html",
    medicalnet: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge the NIfTI files of `synthetic` against the real scans of `real`; returns what it writes to out/report.json.

    `real` is a prepared dataset, or any folder of NIfTI (then nothing is known of splits). `synthetic` is a folder or
    several, which are then ranked. `split` is the real side of the comparison; the other splits give the floors.
    `reconstruct` encodes and decodes a volume: with it, held-out scans are reconstructed and compared; several are given by
    name. `medicalnet`, a file of MedicalNet's weights, adds its feature space. Writes report.json, index.html
    (self-contained) and PNGs into `out`; with `format` "md" report.md as well.
    Stopped, it goes on where it was; `cache` is a folder for what was measured of each scan, which several reports on the
    same real scans may share (otherwise it is kept in `out` until the report is done). Raises InputError for a missing
    or empty folder, a file that is no scan, or a patient on both sides.
    """
    real, out, tell = Path(real), Path(out), progress or (lambda done, total, what: None)
    other = load(medicalnet) if medicalnet else None
    paths = [Path(synthetic)] if isinstance(synthetic, str | Path) else [Path(path) for path in synthetic]
    models = dict(reconstruct) if isinstance(reconstruct, Mapping) else {"the model": reconstruct} if reconstruct else {}
    if not paths:
        raise InputError("no synthetic folder named; give at least one with --synthetic")
    sweep(out)
    scans = cohort.real_scans(real)
    sets, notes = synthetic_sets(paths, scans)
    dealt = cohort.deal(scans, split, seed)
    spoilt = list(anchors(dealt, len(sets[0].scans), next(iter(models.values())) if len(models) == 1 else None))
    measured = measure(sets, dealt, spoilt, cache or out / ".partial", other, tell)
    judged = _judged(measured, seed, tell)
    again = {name: _reconstructed(dealt, model, tell) for name, model in models.items()}
    rebuilt = {name: _reconstruction(pairs, dealt.split, seed) for name, pairs in again.items()}
    report = _report(measured, judged, rebuilt, seed)
    report["real"] = _about_real(real, dealt)
    report["notes"] = [*dealt.notes, *notes, *_standing_notes(measured)]
    tell(0, 1, "drawing")
    first = next(one for one in sets if one.name == report["ranking"][0]["name"]) if report["ranking"] else sets[0]
    copies = {entry["name"]: entry["memorization"] for entry in report["sets"]}
    shown = gallery.fill(measured, first, copies, again, out)
    report["pictures"] = sorted(path.name for path in out.glob("*.png"))
    write_json(out / "report.json", report)
    write_text(out / "index.html", page.render(report, shown, first.name))
    if format == "md":
        write_text(out / "report.md", appendix.markdown(report))
    shutil.rmtree(out / ".partial", ignore_errors=True)
    tell(1, 1, "drawing")
    return report


def _judged(measured: Measured, seed: int, tell: Progress) -> dict[str, list[Judged]]:
    """Every measure of every set and anchor, by its name."""
    order = measured.order
    sides = {one.name: measured.indices(one.scans) for one in measured.sets}
    sides |= {anchor.name: measured.indices(anchor.scans) for anchor in measured.anchors if anchor.scans}
    real = next(iter(sides.values())).real
    sets = [side.synthetic for side in sides.values()]
    todo = list(realism.measures(measured.of(order), real, sets, [scan.patient for scan in order], seed))
    judged: dict[str, list[Judged]] = {name: [] for name in sides}
    floors: Floors = {}
    asked = {one.name for one in measured.sets}
    for done, one in enumerate(todo):
        for name, side in sides.items():
            tell(done, len(todo), one.title)
            judged[name].append(realism.judge(one, side, seed, floors, interval=name in asked))
    return judged


def _report(measured: Measured, judged: dict[str, list[Judged]], rebuilt: dict[str, Any], seed: int) -> dict[str, Any]:
    sets = [_about_set(measured, one, judged[one.name], rebuilt) for one in measured.sets]
    entrants = [ranking.Entrant(s["name"], judged[s["name"]], len(s["memorization"].get("copies", []))) for s in sets]
    ranked = ranking.rank(entrants) if len(sets) > 1 else []
    return {
        "schema": "ctvae.report",
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ctvae_version": __version__,
        "seed": seed,
        "real": {},
        "verdict": overall(sets, ranked),
        "ranking": ranked,
        "sets": sets,
        "reconstructions": rebuilt,
        "anchors": [_about_anchor(anchor, judged[anchor.name]) for anchor in measured.anchors if anchor.scans],
    }


def _about_set(measured: Measured, one: SyntheticSet, judged: list[Judged], rebuilt: dict[str, Any]) -> dict[str, Any]:
    copies, chance = _memorization(measured, one), realism.outside_by_chance(judged)
    real = [*measured.real.reference, *measured.real.others]
    odd = stand_out(
        *([(scan.name, scan.spacing_mm, measured.summaries[scan.name]) for scan in side] for side in (one.scans, real))
    )
    measures = [j.entry for j in judged]
    own = rebuilt.get(one.name) or (next(iter(rebuilt.values())) if len(rebuilt) == 1 else None)
    return {
        "name": one.name,
        "path": one.path.resolve().name,
        "scans": len(one.scans),
        "verdict": verdict(measures, chance, copies, odd, own),
        "measures": measures,
        "outside_by_chance": chance,
        "memorization": copies,
        "outliers": odd,
        "curves": gallery.curves(measured, one),
    }


def _about_anchor(anchor: Anchor, judged: list[Judged]) -> dict[str, Any]:
    known = {j.entry["id"]: j.entry for j in judged if j.entry["status"] == "ok"}
    kept = ("value", "within_floor", "floor_widths")
    moved = {name: not known[name]["within_floor"] for name in anchor.moves if name in known}
    return {
        "name": anchor.name,
        "meaning": anchor.meaning,
        "scans": len(anchor.scans),
        "must_move": moved,
        "measures": {name: {key: entry[key] for key in kept} for name, entry in known.items()},
    }


def _memorization(measured: Measured, one: SyntheticSet) -> dict[str, Any]:
    real = measured.real
    training, held_out = measured.of(real.training), measured.of(real.held_out)
    found = memorization.judge_scans(measured.of(one.scans), held_out, training, [scan.patient for scan in real.training])
    for pair in found.get("pairs", []):
        pair["synthetic"] = one.scans[pair["synthetic"]].name
        pair["training"] = real.training[pair["training"]].name
    for key in ("copies", "close"):
        if key in found:
            found[key] = [one.scans[i].name for i in found[key]]
    return found


def _reconstructed(real: Cohort, reconstruct: Reconstruct, tell: Progress) -> Again:
    chosen = sorted(real.reference, key=lambda scan: scan.split != real.split)[:MOST_RECONSTRUCTED]
    pairs = []
    for done, scan in enumerate(chosen):
        tell(done, len(chosen), "reconstructing")
        volume = scan.load()
        again = reconstruct(volume)
        if again.hu.shape != volume.hu.shape:
            raise InputError(f"{scan.name}: reconstructed to shape {again.hu.shape}, not {volume.hu.shape}; check the model")
        pairs.append((scan, volume, again))
    return pairs


def _reconstruction(again: Again, split: str, seed: int) -> dict[str, Any]:
    figures = [reconstruction.compare(volume.hu, decoded.hu) for _, volume, decoded in again]
    smallest = tuple(min(sizes) for sizes in zip(*(volume.hu.shape for _, volume, _ in again), strict=True))
    section = reconstruction.summarise(figures, [scan.patient for scan, _, _ in again], smallest, seed)
    by_scan = {scan.name: f for (scan, _, _), f in zip(again, figures, strict=True)}
    return {**section, "split": split, "by_scan": by_scan}


def _about_real(path: Path, real: Cohort) -> dict[str, Any]:
    return {
        "name": path.resolve().name,
        "path": path.resolve().name,
        "split": real.split,
        "patients": len(real.reference) + len(real.others),
        "reference": [scan.name for scan in real.reference],
        "others": len(real.others),
        "training_groups": len(real.training),
        "held_out_groups": len(real.held_out),
    }


def _standing_notes(measured: Measured) -> list[str]:
    grid = measured.grid
    x, y, z = grid.spacing_mm
    own = (
        f"The two sides' voxel sizes disagree, so both were brought to {x:.2f} x {y:.2f} x {z:.2f} mm "
        "before texture was measured."
    )
    same = (
        "Texture, noise and continuity were measured on each scan's own voxels: the two sides' median "
        "voxel sizes agree within 20 %."
    )
    box = " x ".join(f"{side:.0f}" for side in grid.box_mm)
    return [
        own if grid.resample_texture else same,
        f"Layout, diversity, copies and left-right were measured in a box of {box} mm (x y z) around each body's "
        "middle, cut into the same cells for all scans; learned features on 5 mm voxels.",
        "Floors: random splits of the real patients into two disjoint sets of the sizes compared. "
        "Intervals: random halves of both sets.",
        "The classifier and the diversity measure use all real patients; the others compare with the reference patients only.",
    ]
