"""The report's page: one HTML file that opens offline, with every picture inside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from ctvae.evaluation import charts
from ctvae.evaluation.verdict import floor_text, number, unit

SECTIONS = (
    ("Intensities", ("hu_histogram", "tissue_")),
    ("Grain and continuity", ("slice_continuity", "power_spectrum", "noise")),
    ("Texture: what the voxels are like", ("_texture",)),
    ("Layout: where they are", ("_layout",)),
    ("Diversity", ("diversity",)),
)
WINDOW_NAMES = {"full": "-1000 to 1000 HU", "soft": "-160 to 240 HU"}
FIGURES = {
    "psnr_db": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "ms_ssim": ("MS-SSIM", ""),
    "mae_body_hu": ("Error in the body", "HU"),
    "mae_hu": ("Error, all voxels", "HU"),
    "mae_air_hu": ("Error in air", "HU"),
    "mae_lung_hu": ("Error in lung", "HU"),
    "mae_fat_hu": ("Error in fat", "HU"),
    "mae_soft_hu": ("Error in soft tissue", "HU"),
    "mae_bone_hu": ("Error in bone", "HU"),
}


@dataclass(frozen=True)
class Pictures:
    """data: URIs of the page's pictures, with captions."""

    beside: list[tuple[str, str]] = field(default_factory=list)
    reconstructions: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    quiz: list[tuple[str, bool]] = field(default_factory=list)  # picture, whether it is synthetic


def render(report: dict[str, Any], curves: dict[str, Any], pictures: Pictures) -> str:
    """The whole page from report.json's content, the curves to plot and the pictures."""
    verdict = report["verdict"]
    template = Template(resources.files("ctvae.evaluation").joinpath("page.html").read_text(encoding="utf-8"))
    real, synthetic = report["real"], report["synthetic"]
    return template.substitute(
        title=escape(synthetic["name"]),
        kicker=escape(
            f"{synthetic['scans']} synthetic scans ({synthetic['name']}) against {real['patients']} real patients "
            f"({real['name']}), {report['created'][:10]}"
        ),
        headline=escape(verdict["headline"]),
        sentences="\n".join(f"<li>{escape(sentence)}</li>" for sentence in verdict["sentences"]),
        pictures=_figures(pictures.beside),
        rows="\n".join(_rows(report["measures"])),
        charts=_charts(curves),
        reconstruction=_reconstruction(report["reconstruction"], pictures.reconstructions),
        memorization=_memorization(report["memorization"], pictures.pairs),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in report["notes"]),
        quiz=_quiz(pictures.quiz),
    )


def _figures(pictures: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for uri, caption in pictures
    )


def _rows(measures: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for title, keys in SECTIONS:
        entries = [entry for entry in measures if any(_belongs(entry["id"], key) for key in keys)]
        if entries:
            rows.append(f'<tr class="section"><td colspan="5">{escape(title)}</td></tr>')
        rows += [_row(entry) for entry in entries]
    return rows


def _belongs(name: str, key: str) -> bool:
    return name.endswith(key) if key.startswith("_") else name.startswith(key)


def _row(entry: dict[str, Any]) -> str:
    head = f"<td>{escape(entry['title'])}<small>{escape(entry['meaning'])}</small></td>"
    if entry["status"] != "ok":
        have = min(entry["have"].values())
        return (
            f'<tr>{head}<td class="soft" colspan="4">Not enough scans: needs {entry["need"]} on every side, has {have}.</td></tr>'
        )
    interval = entry["interval"]
    between = (
        f"<small>{number(interval[0])} to {number(interval[1])}</small>"
        if interval
        else "<small>interval needs more scans</small>"
    )
    within = entry["within_floor"]
    mark = "as real" if within else f"outside, {_times(entry['floor_widths'])}"
    return (
        f'<tr>{head}<td class="number">{number(entry["value"])}{escape(unit(entry))}{between}</td>'
        f'<td class="number">{floor_text(entry)}{escape(unit(entry))}</td><td>{charts.strip(entry)}</td>'
        f'<td class="mark {"within" if within else "outside"}">{mark}</td></tr>'
    )


def _times(widths: float) -> str:
    text = f"{widths:.1f}" if widths < 10 else f"{widths:.0f}" if widths < 1000 else "over 1000"
    return text + "\N{MULTIPLICATION SIGN}"


def _charts(curves: dict[str, Any]) -> str:
    figures = []
    for curve in curves.values():
        series = [
            charts.Series(kind, kind, *(np.array(curve[kind][part]) for part in ("mean", "low", "high")))
            for kind in ("real", "synthetic")
        ]
        drawn = charts.curves(np.array(curve["x"]), series, curve["x_label"], curve["y_label"])
        figures.append(f"<figure>{drawn}<figcaption>{escape(curve['caption'])}</figcaption></figure>")
    return "\n".join(figures)


def _reconstruction(section: dict[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    if section["status"] != "ok":
        return ""
    rows = []
    for key, (title, of) in FIGURES.items():
        cells = "".join(f'<td class="number">{_figure(section["windows"][window].get(key), of)}</td>' for window in WINDOW_NAMES)
        rows.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in WINDOW_NAMES.values())
    return (
        f"<h2>Reconstruction</h2><p>{section['scans']} real scans of the {escape(section['split'])} split, "
        "encoded and decoded by the model. "
        "Both sides are clipped to the window; the data range of PSNR and SSIM is its width. Intervals are "
        "over patients. "
        f"MS-SSIM uses {section['ms_ssim_scales']} scales, as many as fit.</p>"
        f'<div class="scroll"><table><thead><tr><th>Figure</th>{heads}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>" + _figures(pictures)
    )


def _figure(entry: dict[str, Any] | None, of: str) -> str:
    if not entry or entry["status"] != "ok":
        return '<span class="soft">none</span>'
    interval = entry["interval"]
    between = f"<small>{number(interval[0])} to {number(interval[1])}</small>" if interval else ""
    return f"{number(entry['mean'])}{' ' + of if of else ''}{between}"


def _memorization(section: dict[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    head = "<h2>Copies of training scans</h2>"
    if section["status"] != "ok":
        need = section["need"]
        return f"{head}<p>Not enough scans to look for copies: needs {need['training']} training patients.</p>"
    words = {
        "copies": (
            f"Copies among the synthetic scans: {len(section['copies'])}. A copy is far nearer to one training "
            "patient than to all others."
        ),
        "nearer than chance": (
            "No outright copy, but more synthetic scans than chance allows lie nearer to a training patient "
            "than held-out ones do."
        ),
        "none found": (
            "No copy was found: the synthetic scans lie no nearer to training patients than real scans of other patients do."
        ),
    }
    rows = "".join(_space_row(name, space) for name, space in section["spaces"].items())
    return (
        f"{head}<p>{escape(words[section['verdict']])} Compared with {section['scans']['training']} "
        "training scans, mirrored ones included; "
        f"what is near by chance is taken from {escape(section['calibration'])}.</p>"
        '<div class="scroll"><table><thead><tr><th>Space</th><th class="number">Median distance to nearest</th>'
        '<th class="number">Nearer than the closest 1 % of real</th><th class="number">Smallest ratio to '
        "the next five</th>"
        f'<th class="number">Copies</th></tr></thead><tbody>{rows}</tbody></table></div>' + _figures(pictures)
    )


def _space_row(name: str, space: dict[str, Any]) -> str:
    of = " HU" if name == "voxels" else ""
    low, high = space["share_nearer_interval"]
    return (
        f'<tr><td>{escape(name)}</td><td class="number">{number(space["median_distance"])}{of}'
        f"<small>real {number(space['median_distance_held_out'])}{of}</small></td>"
        f'<td class="number">{100 * space["share_nearer"]:.0f} %<small>{100 * low:.0f} to {100 * high:.0f} '
        "%</small></td>"
        f'<td class="number">{number(space["smallest_ratio"])}<small>real '
        f"{number(space['smallest_ratio_held_out'])}</small></td>"
        f'<td class="number">{space["copies"]}</td></tr>'
    )


def _quiz(pictures: Sequence[tuple[str, bool]]) -> str:
    """The quiz's cases; the answer is a number's remainder, so that a glance at the source gives nothing away."""
    cases = [{"i": uri, "k": 7 * (13 + 5 * index) + (3 if synthetic else 5)} for index, (uri, synthetic) in enumerate(pictures)]
    return json.dumps(cases)
