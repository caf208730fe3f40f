"""The report as Markdown, for a paper's appendix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ctvae.evaluation.verdict import floor_text, number, unit


def markdown(report: dict[str, Any]) -> str:
    """Verdict, ranking, measures with floors and intervals, anchors, copies, reconstruction and notes, as Markdown."""
    return (
        "\n".join([*_head(report), *_ranking(report), *_sets(report), *_anchors(report), *_rebuilt(report), *_notes(report)])
        + "\n"
    )


def ranking_table(report: dict[str, Any]) -> list[str]:
    """One row for each folder, nearest to real first."""
    rows = []
    for row in report["ranking"]:
        low, high = row["interval"] or (0.0, 0.0)
        score = f"{number(row['score'])} ({number(low)} to {number(high)})" if row["interval"] else "too few scans"
        rows.append(
            [str(row["rank"] or ""), row["name"], score, ", ".join(row["not_told_from"]) or "none", str(row.get("copies", ""))]
        )
    return _table(["Rank", "Folder", "Score (95 % interval)", "Not told from", "Copies"], rows)


def _head(report: dict[str, Any]) -> Iterator[str]:
    real = report["real"]
    yield f"# {report['verdict']['headline']}\n"
    yield from (f"* {sentence}" for sentence in report["verdict"]["sentences"])
    names = ", ".join(f"{one['name']} ({one['scans']} scans)" for one in report["sets"])
    yield f"\n{names} against {real['patients']} real patients of {real['name']}."
    yield f"Written by ctvae {report['ctvae_version']}, seed {report['seed']}.\n"


def _ranking(report: dict[str, Any]) -> Iterator[str]:
    if report["ranking"]:
        yield "## Ranking\n"
        yield from ranking_table(report)
        yield ""


def _sets(report: dict[str, Any]) -> Iterator[str]:
    for one in report["sets"]:
        yield f"## Measures: {one['name']}\n"
        yield from _table(
            ["Measure", "Value", "95 % interval", "Real against real", "Within"], [_row(e) for e in one["measures"]]
        )
        yield f"\nCopies of training scans: {one['memorization'].get('verdict', 'too few scans')}.\n"
        yield from (f"Stands out: {odd['name']} has {'; '.join(odd['why'])}.\n" for odd in one["outliers"].get("scans", []))


def _row(entry: dict[str, Any]) -> list[str]:
    if entry["status"] != "ok":
        return [entry["title"], f"not enough, need {entry['need']}", "", "", ""]
    low, high = entry["interval"] or (None, None)
    between = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    within = "yes" if entry["within_floor"] else f"no, {entry['floor_widths']:.1f} half-widths"
    return [entry["title"], f"{number(entry['value'])}{unit(entry)}", between, floor_text(entry), within]


def _anchors(report: dict[str, Any]) -> Iterator[str]:
    anchors = report["anchors"]
    known = {name: None for anchor in anchors for name in anchor["measures"]}
    if not known:
        return
    yield "## Anchors: real scans spoilt in known ways (* is outside the floor)\n"
    rows = [[name, *(_cell(anchor["measures"].get(name)) for anchor in anchors)] for name in known]
    yield from _table(["Measure", *(anchor["name"] for anchor in anchors)], rows)
    yield ""


def _cell(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{number(entry['value'])}{'' if entry['within_floor'] else ' *'}"


def _rebuilt(report: dict[str, Any]) -> Iterator[str]:
    for name, section in report["reconstructions"].items():
        yield f"## Reconstruction by {name} ({section['scans']} scans)\n"
        rows = []
        for figure in section["windows"]["full"]:
            cells = [section["windows"][window][figure] for window in ("full", "soft")]
            rows.append([figure, *(number(c["mean"]) if c["status"] == "ok" else "" for c in cells)])
        yield from _table(["Figure", "-1000 to 1000 HU", "-160 to 240 HU"], rows)
        yield ""


def _notes(report: dict[str, Any]) -> Iterator[str]:
    yield "## How this was measured\n"
    yield from (f"* {note}" for note in report["notes"])


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
