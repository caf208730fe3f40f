"""The tables of docs/results-headneck.md and of a model card, from a report of `ctvae evaluate`.

    python benchmarks/results_page.py REPORT            every measure of every folder, and the reconstructions
    python benchmarks/results_page.py REPORT --card     the ones that a model card shows, of the first folder
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CARD = (
    *(f"{kind}_{space}" for kind in ("classifier", "frechet", "coverage") for space in ("layout", "texture", "learned")),
    *("hu_histogram", "noise_spectrum", "noise_spectrum_worst", "slice_continuity"),
)


def number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def shown(measure: dict[str, Any], interval: bool) -> str:
    if measure["status"] != "ok":
        return "not enough"
    text = f"{number(measure['value'])} {measure['unit']}".strip()
    if interval and measure.get("interval"):
        low, high = measure["interval"]
        text += f" ({number(low)} to {number(high)})"
    return text


def floor(measure: dict[str, Any]) -> str:
    return f"{number(measure['floor']['low'])} to {number(measure['floor']['high'])}" if measure["status"] == "ok" else ""


def within(measure: dict[str, Any]) -> str:
    if measure["status"] != "ok":
        return ""
    return "yes" if measure["within_floor"] else f"no, {measure['floor_widths']:.1f} half-widths"


def whole(report: dict[str, Any]) -> list[str]:
    sets = report["sets"]
    names = [one["name"] for one in sets]
    titles = ["measure", f"{names[0]} (95 % interval)", *names[1:], "real against real", f"{names[0]} within"]
    lines = [f"| {' | '.join(titles)} |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in zip(*(one["measures"] for one in sets), strict=True):
        values = [shown(measure, interval=index == 0) for index, measure in enumerate(row)]
        lines.append(f"| {row[0]['title']} | {' | '.join(values)} | {floor(row[0])} | {within(row[0])} |")
    rebuilt = next(iter(report["reconstructions"].values()), None)
    if rebuilt:
        windows = rebuilt["windows"]
        lines += ["", f"| reconstruction | {' | '.join(windows)} |", "|---" * (len(windows) + 1) + "|"]
        for figure in next(iter(windows.values())):
            means = [window[figure].get("mean") for window in windows.values() if isinstance(window[figure], dict)]
            if means and None not in means:
                lines.append(f"| {figure} | {' | '.join(number(mean) for mean in means)} |")
    return lines


def card(report: dict[str, Any]) -> list[str]:
    known = {measure["id"]: measure for measure in report["sets"][0]["measures"]}
    return [f"| {known[i]['title']} | {shown(known[i], interval=True)} | {floor(known[i])} |" for i in CARD]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--card", action="store_true")
    arguments = parser.parse_args()
    content = json.loads((arguments.report / "report.json").read_text())
    print("\n".join((card if arguments.card else whole)(content)))
