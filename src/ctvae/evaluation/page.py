"""The report's page: one HTML file that opens offline, with every picture inside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from ctvae.evaluation import charts
from ctvae.evaluation.gallery import Gallery
from ctvae.evaluation.verdict import floor_text, number, unit

FAMILIES = {
    "intensities": "Intensities",
    "grain": "Grain and continuity",
    "texture": "Texture: what the voxels are like",
    "layout": "Layout: where they are",
    "learned": "Learned: a network trained on real CT",
    "medicalnet": "MedicalNet: another network",
    "handedness": "Left and right",
    "diversity": "Diversity",
}
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


def render(report: dict[str, Any], gallery: Gallery, shown: str) -> str:
    """The whole page from report.json's content and what is shown; `shown` names the set of pictures, viewer and quiz."""
    verdict, real, sets = report["verdict"], report["real"], report["sets"]
    scans = sum(one["scans"] for one in sets)
    names = sets[0]["name"] if len(sets) == 1 else f"{len(sets)} folders"
    several = len(sets) > 1
    return Template(_file("page.html")).substitute(
        title=escape(names),
        kicker=escape(
            f"{scans} synthetic scans ({names}) against {real['patients']} real patients ({real['name']}), "
            f"{report['created'][:10]}"
        ),
        headline=escape(verdict["headline"]),
        sentences="\n".join(f"<li>{escape(sentence)}</li>" for sentence in verdict["sentences"]),
        ranking=_ranking(report) if several else "",
        shown=f"<p>Pictures, viewer and quiz show {escape(shown)}.</p>" if several else "",
        pictures=_figures(gallery.beside),
        sets="\n".join(_set(one, gallery, several) for one in sets),
        anchors=_anchors(report["anchors"]),
        reconstruction=_reconstructions(report["reconstructions"], gallery.reconstructions),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in report["notes"]),
        quiz=_quiz(gallery.quiz),
        niivue=_file("niivue.umd.js").replace("</script", "<\\/script"),
        volumes=json.dumps([{"name": v.name, "synthetic": v.synthetic, "content": v.content} for v in gallery.viewed]),
    )


def _file(name: str) -> str:
    return resources.files("ctvae.evaluation").joinpath(name).read_text(encoding="utf-8")


def _set(one: dict[str, Any], gallery: Gallery, several: bool) -> str:
    """Measures, curves, odd scans and copies of one synthetic set."""
    body = (
        '<div class="scroll"><table><thead><tr><th>Measure</th><th class="number">Synthetic</th>'
        '<th class="number">Real against real</th><th></th><th></th></tr></thead><tbody>'
        f"{' '.join(_rows(one['measures']))}</tbody></table></div>"
        f'<div class="charts">{_charts(one["curves"])}</div>'
        f"{_outliers(one['outliers'])}{_memorization(one['memorization'], gallery.pairs.get(one['name'], []))}"
    )
    if not several:
        return body
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in one["verdict"]["sentences"])
    return (
        f"<details><summary>{escape(one['name'])}: {escape(one['verdict']['headline'])}</summary><ul>{said}</ul>{body}</details>"
    )


def _ranking(report: dict[str, Any]) -> str:
    """The folders, nearest to real first, and every measure of each beside the floor."""
    rows = []
    for row in report["ranking"]:
        low, high = row["interval"] or (0.0, 0.0)
        score = f"{number(row['score'])}<small>{number(low)} to {number(high)}</small>" if row["interval"] else "too few scans"
        rows.append(
            f'<tr><td>{row["rank"] or ""}</td><td>{escape(row["name"])}</td><td class="number">{score}</td>'
            f"<td>{escape(', '.join(row['not_told_from'])) or 'none'}</td><td>{row.get('copies') or 'none found'}</td></tr>"
        )
    return (
        "<h2>Ranking</h2><p>The score says how far a folder is from real scans, in half-widths of the floors, averaged over "
        "the families of measures (10 at most for each measure; 1 is the floor's edge), with its 95 % interval. Folders whose "
        "difference may be chance are not told apart. A folder with copies comes last.</p>"
        '<div class="scroll"><table><thead><tr><th>Rank</th><th>Folder</th><th class="number">Score</th><th>Not told from</th>'
        f"<th>Copies</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>{_side_by_side(report)}"
    )


def _side_by_side(report: dict[str, Any]) -> str:
    order = [row["name"] for row in report["ranking"]]
    by_set = {one["name"]: {entry["id"]: entry for entry in one["measures"]} for one in report["sets"]}
    rows = []
    for name, first in by_set[order[0]].items():
        cells = "".join(_cell(by_set[one][name]) for one in order)
        floor = floor_text(first) if first["status"] == "ok" else ""
        rows.append(f'<tr><td>{escape(first["title"])}</td>{cells}<td class="number">{floor}</td></tr>')
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in order)
    return (
        f'<div class="scroll"><table class="compact"><thead><tr><th>Measure</th>{heads}<th class="number">Real against real</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry.get("status", "ok") != "ok":
        return '<td class="number soft">too few</td>'
    return f'<td class="number {"within" if entry["within_floor"] else "outside"}">{number(entry["value"])}</td>'


def _anchors(anchors: Sequence[dict[str, Any]]) -> str:
    """Real scans spoilt in known ways: does each measure move?"""
    known = {name: None for anchor in anchors for name in anchor["measures"]}
    if not known:
        return ""
    said = []
    for anchor in anchors:
        words = [f"{name.replace('_', ' ')} {'does' if yes else 'does NOT'}" for name, yes in anchor["must_move"].items()]
        must = f" Must leave its floor: {', '.join(words)}." if words else ""
        said.append(
            f"<li><strong>{escape(anchor['name'])}</strong>, {anchor['scans']} scans: {escape(anchor['meaning'])}.{must}</li>"
        )
    heads = "".join(f'<th class="number">{escape(anchor["name"])}</th>' for anchor in anchors)
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>{''.join(_cell(anchor['measures'].get(name)) for anchor in anchors)}</tr>"
        for name in known
    )
    return (
        "<h2>Anchors: can the measures be believed?</h2><p>Real scans of patients outside the reference, judged as if they were "
        "synthetic: untouched, and spoilt in known ways. Red is outside the floor of real scans. A measure that stays within "
        "its floor for a spoilt set cannot see that fault at this number of scans.</p>"
        f'<ul>{"".join(said)}</ul><div class="scroll"><table class="compact"><thead><tr><th>Measure</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _outliers(section: dict[str, Any]) -> str:
    if section["status"] != "ok":
        return ""
    traits = "".join(f"<p>Most of the folder: {escape(trait)}.</p>" for trait in section["traits"])
    rows = "".join(f"<li>{escape(odd['name'])}: {escape('; '.join(odd['why']))}</li>" for odd in section["scans"])
    found = f"<ul>{rows}</ul>" if rows else "<p>No single scan has a voxel size or a body that no real scan comes near.</p>"
    return f"<h2>Scans that stand out</h2>{traits}{found}"


def _figures(pictures: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for uri, caption in pictures
    )


def _rows(measures: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for family, title in FAMILIES.items():
        entries = [entry for entry in measures if entry["family"] == family]
        if entries:
            rows.append(f'<tr class="section"><td colspan="5">{escape(title)}</td></tr>')
        rows += [_row(entry) for entry in entries]
    return rows


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


def _reconstructions(sections: dict[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    if not sections:
        return ""
    return "<h2>Reconstruction</h2>" + "".join(_reconstruction(*item) for item in sections.items()) + _figures(pictures)


def _reconstruction(name: str, section: dict[str, Any]) -> str:
    rows = []
    for key, (title, of) in FIGURES.items():
        cells = "".join(f'<td class="number">{_figure(section["windows"][window].get(key), of)}</td>' for window in WINDOW_NAMES)
        rows.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    heads = "".join(f'<th class="number">{escape(window)}</th>' for window in WINDOW_NAMES.values())
    return (
        f"<p>{section['scans']} real scans of the {escape(section['split'])} split, encoded and decoded by {escape(name)}. "
        "Both sides are clipped to the window; the data range of PSNR and SSIM is its width. Intervals are over patients. "
        f"MS-SSIM uses {section['ms_ssim_scales']} scales, as many as fit.</p>"
        f'<div class="scroll"><table><thead><tr><th>Figure</th>{heads}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
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
