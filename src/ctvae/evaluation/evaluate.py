"""`ctvae evaluate`: a folder of real scans and one of synthetic scans in, report.json and one page out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import pictures
from ctvae.errors import InputError
from ctvae.evaluation import cohort, memorization, page, realism, reconstruction
from ctvae.evaluation.cohort import Cohort, Scan
from ctvae.evaluation.grid import Grid
from ctvae.evaluation.summary import HISTOGRAM_EDGES_HU, SPECTRUM_BINS, Summary, summarise
from ctvae.evaluation.verdict import verdict
from ctvae.files import write_json, write_text
from ctvae.version import __version__
from ctvae.volume import Volume

SCHEMA_VERSION = 1
MOST_RECONSTRUCTED = 8
MOST_SHOWN = 3
MOST_PAIRS = 3
MOST_QUIZ = 10  # of each side
Progress = Callable[[int, int, str], None]  # (done, total, what)
Reconstruct = Callable[[Volume], Volume]


@dataclass(frozen=True, eq=False)
class _Sides:
    """Both sides, measured. `summaries` is keyed by scan name."""

    synthetic: list[Scan]
    real: Cohort
    grid: Grid
    summaries: dict[str, Summary]


def evaluate(
    real: Path | str,
    synthetic: Path | str,
    out: Path | str,
    *,
    split: str = "test",
    reconstruct: Reconstruct | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge the NIfTI files of `synthetic` against the real scans of `real`; returns what it writes to out/report.json.

    `real` is a prepared dataset, or any folder of NIfTI (then nothing is known of splits). `split` is the real side
    of the comparison; the other splits give the floors. `reconstruct` encodes and decodes a volume: with it, held-out
    scans are reconstructed and compared. Writes report.json, index.html (self-contained) and PNGs into `out`.
    Stopped, it goes on where it was; `cache` is a folder for what was measured of each scan, which several reports on the
    same real scans may share (otherwise it is kept in `out` until the report is done). Raises InputError for a missing
    or empty folder, a file that is no scan, or a patient on both sides.
    """
    real, synthetic, out = Path(real), Path(synthetic), Path(out)
    tell = progress or (lambda done, total, what: None)
    scans = cohort.real_scans(real)
    cohort.refuse_made_from(synthetic, scans)
    generated, notes = cohort.synthetic_scans(synthetic)
    sides = _measured(generated, cohort.deal(scans, split, seed), cache or out / ".partial", tell)
    measures = _measures(sides, seed, tell)
    copies = _memorization(sides)
    again = _reconstructed(sides.real, reconstruct, tell) if reconstruct else []
    report: dict[str, Any] = {
        "schema": "ctvae.report",
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ctvae_version": __version__,
        "seed": seed,
        "real": _about_real(real, sides.real),
        "synthetic": {"name": synthetic.resolve().name, "path": str(synthetic), "scans": len(generated)},
        "measures": measures,
        "memorization": copies,
        "reconstruction": _reconstruction(again, sides.real.split, seed),
        "curves": _curves(sides),
        "notes": [*sides.real.notes, *notes, *_standing_notes(sides)],
    }
    report["verdict"] = verdict(measures, copies, report["reconstruction"])
    drawn = _draw(sides, copies, again, out, tell)
    report["pictures"] = sorted(path.name for path in out.glob("*.png"))
    write_json(out / "report.json", report)
    write_text(out / "index.html", page.render(report, report["curves"], drawn))
    shutil.rmtree(out / ".partial", ignore_errors=True)
    return report


def _measured(synthetic: list[Scan], real: Cohort, cache: Path, tell: Progress) -> _Sides:
    everyone = {scan.name: scan for scan in [*real.reference, *real.others, *real.training, *real.held_out]}
    if {scan.name for scan in synthetic} & set(everyone):  # files called alike: names have to tell them apart
        synthetic = [_renamed(scan) for scan in synthetic]
    everyone.update({scan.name: scan for scan in synthetic})
    grid = Grid.over(
        [(scan.shape, scan.spacing_mm) for scan in [*real.reference, *real.others]],
        [(scan.shape, scan.spacing_mm) for scan in synthetic],
    )
    summaries = {}
    for done, (name, scan) in enumerate(everyone.items()):
        tell(done, len(everyone), "measuring scans")
        summaries[name] = summarise(scan.load(), grid, cache)
    tell(len(everyone), len(everyone), "measuring scans")
    cohort.refuse_same_scans(synthetic, {summaries[scan.name].digest: scan.name for scan in real.reference})
    return _Sides(synthetic, real, grid, summaries)


def _measures(sides: _Sides, seed: int, tell: Progress) -> list[dict[str, Any]]:
    order = [*sides.synthetic, *sides.real.reference, *sides.real.others]
    counts = np.cumsum([len(sides.synthetic), len(sides.real.reference), len(sides.real.others)])
    indices = realism.Sides(np.arange(counts[0]), np.arange(counts[0], counts[1]), np.arange(counts[0], counts[2]))
    summaries = [sides.summaries[scan.name] for scan in order]
    todo = list(realism.measures(summaries, indices, [scan.patient for scan in order], seed))
    judged = []
    for done, measure in enumerate(todo):
        tell(done, len(todo), measure.title)
        judged.append(realism.judge(measure, indices, seed))
    return judged


def _memorization(sides: _Sides) -> dict[str, Any]:
    training = [sides.summaries[scan.name] for scan in sides.real.training]
    held_out = [sides.summaries[scan.name] for scan in sides.real.held_out]
    synthetic = [sides.summaries[scan.name] for scan in sides.synthetic]
    found = memorization.judge_scans(synthetic, held_out, training, [scan.patient for scan in sides.real.training])
    for pair in found.get("pairs", []):
        pair["synthetic"] = sides.synthetic[pair["synthetic"]].name
        pair["training"] = sides.real.training[pair["training"]].name
    for key in ("copies", "close"):
        if key in found:
            found[key] = [sides.synthetic[i].name for i in found[key]]
    return found


def _reconstructed(real: Cohort, reconstruct: Reconstruct, tell: Progress) -> list[tuple[Scan, Volume, Volume]]:
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


def _reconstruction(again: Sequence[tuple[Scan, Volume, Volume]], split: str, seed: int) -> dict[str, Any]:
    if not again:
        return {"status": "not measured"}
    figures = [reconstruction.compare(volume.hu, decoded.hu) for _, volume, decoded in again]
    smallest = tuple(min(sizes) for sizes in zip(*(volume.hu.shape for _, volume, _ in again), strict=True))
    section = reconstruction.summarise(figures, [scan.patient for scan, _, _ in again], smallest, seed)
    return {
        **section,
        "split": split,
        "by_scan": {scan.name: f for (scan, _, _), f in zip(again, figures, strict=True)},
    }


def _curves(sides: _Sides) -> dict[str, Any]:
    """Mean curves of both sides with the band that 80 % of scans lie in."""
    centres = (HISTOGRAM_EDGES_HU[:-1] + HISTOGRAM_EDGES_HU[1:]) / 2
    frequency = (np.arange(SPECTRUM_BINS) + 0.5) / (2 * SPECTRUM_BINS)
    real = [sides.summaries[scan.name] for scan in [*sides.real.reference, *sides.real.others]]
    synthetic = [sides.summaries[scan.name] for scan in sides.synthetic]
    described = {
        "histogram": (
            centres,
            "HU",
            "share of the body per 10 HU",
            "HU in the body: means, and the band that 80 % of scans lie in.",
        ),
        "spectrum": (
            frequency,
            "cycles per voxel",
            "power, HU²",
            "Power spectrum of axial slices: the right end is the finest detail.",
        ),
    }
    curves = {}
    for name, (x, x_label, y_label, caption) in described.items():
        curves[name] = {"x": x.tolist(), "x_label": x_label, "y_label": y_label, "caption": caption}
        for kind, side in (("real", real), ("synthetic", synthetic)):
            values = np.stack([np.nan_to_num(getattr(summary, name)) for summary in side])
            low, high = np.quantile(values, (0.1, 0.9), axis=0)
            curves[name][kind] = {"mean": values.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}
    return curves


def _draw(
    sides: _Sides, copies: dict[str, Any], again: Sequence[tuple[Scan, Volume, Volume]], out: Path, tell: Progress
) -> page.Pictures:
    tell(0, 1, "drawing")
    drawn = page.Pictures()
    real = [(scan.name, scan.load()) for scan in sides.real.reference[:MOST_SHOWN]]
    made = [(scan.name, scan.load()) for scan in sides.synthetic[:MOST_SHOWN]]
    for window, words in (("soft", "-160 to 240 HU"), ("full", "-1000 to 1000 HU")):
        path = out / f"real_beside_synthetic_{window}.png"
        pictures.real_beside_synthetic(real, made, path, window)
        drawn.beside.append((pictures.data_uri(path), f"Three planes through the middle of the body, {words}, all at one scale."))
    if again:
        path = out / "reconstructions.png"
        pictures.reconstructions([(scan.name, volume, decoded) for scan, volume, decoded in again[:2]], path)
        drawn.reconstructions.append((pictures.data_uri(path), "Real scans, what the model makes of them, and the difference."))
    _draw_pairs(sides, copies, out, drawn)
    drawn.quiz.extend(_quiz(sides))
    tell(1, 1, "drawing")
    return drawn


def _draw_pairs(sides: _Sides, copies: dict[str, Any], out: Path, drawn: page.Pictures) -> None:
    by_name = {scan.name: scan for scan in [*sides.real.training, *sides.synthetic]}
    shown: dict[str, Any] = {}
    for pair in copies.get("pairs", []):
        shown.setdefault(pair["synthetic"], pair)
    groups = [
        (
            f"{'COPY' if pair['copy'] else 'nearest'}, ratio {pair['ratio']:.2f} ({pair['space']})",
            [(name, by_name[name].load()) for name in (pair["synthetic"], pair["training"])],
        )
        for pair in list(shown.values())[:MOST_PAIRS]
    ]
    if groups:
        path = out / "memorization.png"
        pictures.side_by_side(groups, path, "soft")
        caption = (
            "The synthetic scans nearest to a training scan, each beside it. The ratio compares that distance "
            "with the next five patients'."
        )
        drawn.pairs.append((pictures.data_uri(path), caption))


def _quiz(sides: _Sides) -> list[tuple[str, bool]]:
    """Strips of as many scans of either side, all with one box, so that only the scans themselves differ."""
    count = min(MOST_QUIZ, len(sides.real.reference), len(sides.synthetic))
    chosen = [(scan, False) for scan in sides.real.reference[:count]] + [(scan, True) for scan in sides.synthetic[-count:]]
    volumes = [(scan.load(), synthetic) for scan, synthetic in chosen]
    extents = np.array([pictures.body_box(volume).extent_mm for volume, _ in volumes])
    x, y, z = (float(v) for v in np.median(extents, axis=0) * 1.05)
    return [(pictures.data_uri(pictures.strip_png(volume, "soft", (x, y, z))), synthetic) for volume, synthetic in volumes]


def _about_real(path: Path, real: Cohort) -> dict[str, Any]:
    return {
        "name": path.resolve().name,
        "path": str(path),
        "split": real.split,
        "patients": len(real.reference) + len(real.others),
        "reference": [scan.name for scan in real.reference],
        "others": len(real.others),
        "training_groups": len(real.training),
        "held_out_groups": len(real.held_out),
    }


def _standing_notes(sides: _Sides) -> list[str]:
    grid = sides.grid
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
        f"Layout, diversity and copies were measured in a box of {box} mm (x y z) around each body's "
        "middle, cut into the same cells for all scans.",
        "Floors: random splits of the real patients into two disjoint sets of the sizes compared. "
        "Intervals: random halves of both sets.",
        "The classifier and the diversity measure use all real patients; the others compare with the reference patients only.",
    ]


def _renamed(scan: Scan) -> Scan:
    return replace(scan, name=f"synthetic {scan.name}")
