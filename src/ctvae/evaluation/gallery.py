"""What the page shows: pictures, curves, the quiz's cases and the volumes of the viewer."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ctvae import nifti, pictures
from ctvae.evaluation.cohort import Scan
from ctvae.evaluation.grid import resampled
from ctvae.evaluation.sides import Measured, SyntheticSet
from ctvae.evaluation.summary import HISTOGRAM_EDGES_HU, SPECTRUM_BINS
from ctvae.volume import Volume, plain_affine

MOST_SHOWN = 3
MOST_PAIRS = 3
MOST_QUIZ = 10  # of each side
MOST_VIEWED = 2  # of each side
VIEWED_SIDE = 128  # voxels along an axis of a volume in the viewer
VIEWED_HU = (-1024, 2000)
Captioned = tuple[str, str]  # data: URI, caption


@dataclass(frozen=True)
class Viewed:
    """One volume of the viewer: a compressed NIfTI in base64."""

    name: str
    synthetic: bool
    content: str


@dataclass(frozen=True)
class Gallery:
    beside: list[Captioned] = field(default_factory=list)
    reconstructions: list[Captioned] = field(default_factory=list)
    pairs: dict[str, list[Captioned]] = field(default_factory=dict)  # by set
    quiz: list[tuple[str, bool]] = field(default_factory=list)  # picture, whether it is synthetic
    viewed: list[Viewed] = field(default_factory=list)


def fill(
    measured: Measured,
    first: SyntheticSet,
    copies: dict[str, dict[str, Any]],
    again: dict[str, list[tuple[Scan, Volume, Volume]]],
    out: Path,
) -> Gallery:
    """Draw everything. `first` is the set that the large pictures, the quiz and the viewer show; `copies` is by set."""
    gallery = Gallery()
    real = [(scan.name, scan.load()) for scan in measured.real.reference[:MOST_SHOWN]]
    made = [(scan.name, scan.load()) for scan in first.scans[:MOST_SHOWN]]
    for window, words in (("soft", "-160 to 240 HU"), ("full", "-1000 to 1000 HU")):
        path = out / f"real_beside_synthetic_{window}.png"
        pictures.real_beside_synthetic(real, made, path, window)
        caption = f"Three planes through the middle of the body, {words}, all at one scale."
        gallery.beside.append((pictures.data_uri(path), caption))
    for number, (name, pairs) in enumerate(again.items()):
        path = out / ("reconstructions.png" if len(again) == 1 else f"reconstructions_{number + 1}.png")
        pictures.reconstructions([(scan.name, volume, decoded) for scan, volume, decoded in pairs[:2]], path)
        gallery.reconstructions.append((pictures.data_uri(path), f"Real scans, what {name} makes of them, and the difference."))
    for number, one in enumerate(measured.sets):
        path = out / ("memorization.png" if len(measured.sets) == 1 else f"memorization_{number + 1}.png")
        gallery.pairs[one.name] = _pairs(measured, one, copies[one.name], path)
    gallery.quiz.extend(_quiz(measured.real.reference, first.scans))
    sides = [(scan, False) for scan in measured.real.reference[:MOST_VIEWED]] + [
        (scan, True) for scan in first.scans[:MOST_VIEWED]
    ]
    gallery.viewed.extend(Viewed(scan.name, synthetic, packed(scan.load())) for scan, synthetic in sides)
    return gallery


def packed(volume: Volume) -> str:
    """A volume as base64 of a .nii.gz: int16 HU, at most VIEWED_SIDE voxels along an axis, its place in space left out."""
    steps = [max(size / VIEWED_SIDE, 1.0) for size in volume.hu.shape[::-1]]  # x y z
    x, y, z = (mm * step for mm, step in zip(volume.spacing_mm, steps, strict=True))
    hu = volume.hu if max(steps) == 1.0 else resampled(volume.hu, volume.spacing_mm, (x, y, z))
    small = np.rint(hu).clip(*VIEWED_HU).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        nifti.write(path, Volume(small, plain_affine((x, y, z), small.shape)))
        return base64.b64encode(path.read_bytes()).decode("ascii")


def curves(measured: Measured, one: SyntheticSet) -> dict[str, Any]:
    """Mean curves of both sides with the band that 80 % of scans lie in."""
    centres = (HISTOGRAM_EDGES_HU[:-1] + HISTOGRAM_EDGES_HU[1:]) / 2
    frequency = (np.arange(SPECTRUM_BINS) + 0.5) / (2 * SPECTRUM_BINS)
    told = {
        "histogram": (centres, "HU", "share of the body per 10 HU", "HU in the body: means, and the band of 80 % of scans."),
        "spectrum": (
            frequency, "cycles per voxel", "power, HU²", "Power spectrum of axial slices: the right end is the finest detail.",
        ),
    }  # fmt: skip
    drawn: dict[str, Any] = {}
    sides = (("real", [*measured.real.reference, *measured.real.others]), ("synthetic", one.scans))
    for name, (x, x_label, y_label, caption) in told.items():
        drawn[name] = {"x": x.tolist(), "x_label": x_label, "y_label": y_label, "caption": caption}
        for kind, scans in sides:
            values = np.stack([np.nan_to_num(getattr(summary, name)) for summary in measured.of(scans)])
            low, high = np.quantile(values, (0.1, 0.9), axis=0)
            drawn[name][kind] = {"mean": values.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}
    return drawn


def _pairs(measured: Measured, one: SyntheticSet, copies: dict[str, Any], path: Path) -> list[Captioned]:
    by_name = {scan.name: scan for scan in [*measured.real.training, *one.scans]}
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
    if not groups:
        return []
    pictures.side_by_side(groups, path, "soft")
    caption = (
        "The synthetic scans nearest to a training scan, each beside it. The ratio compares that distance "
        "with the next five patients'."
    )
    return [(pictures.data_uri(path), caption)]


def _quiz(real: Sequence[Scan], synthetic: Sequence[Scan]) -> list[tuple[str, bool]]:
    """Strips of as many scans of either side, all with one box, so that only the scans themselves differ."""
    count = min(MOST_QUIZ, len(real), len(synthetic))
    chosen = [(scan, False) for scan in real[:count]] + [(scan, True) for scan in synthetic[-count:]]
    extents = np.array([pictures.body_box(scan.load()).extent_mm for scan, _ in chosen])
    x, y, z = (float(v) for v in np.median(extents, axis=0) * 1.05)
    return [(pictures.data_uri(pictures.strip_png(scan.load(), "soft", (x, y, z))), synthetic) for scan, synthetic in chosen]
