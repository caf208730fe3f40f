"""The verdict in words, from the measures against their floors. It says no more than they do."""

from __future__ import annotations

from typing import Any

MOST_NAMED = 3
TOLD_APART_AUC = 0.9
FEW = 30  # scans on a side, below which the floors are wide


def verdict(measures: list[dict[str, Any]], memorization: dict[str, Any], reconstruction: dict[str, Any]) -> dict[str, Any]:
    """headline, sentences and the counts they rest on."""
    judged = [entry for entry in measures if entry["status"] == "ok"]
    outside = sorted((e for e in judged if not e["within_floor"]), key=lambda e: -e["floor_widths"])
    sentences = [
        _counts(judged, outside, len(measures)),
        _classifier(judged),
        _furthest(outside),
        _copies(memorization),
    ]
    sentences.append(_reconstruction(reconstruction))
    return {
        "headline": _headline(judged, outside, memorization),
        "sentences": [sentence for sentence in sentences if sentence],
        "measures_judged": len(judged),
        "measures_within_floor": len(judged) - len(outside),
        "measures_without_enough_scans": len(measures) - len(judged),
    }


def _headline(judged: list[dict[str, Any]], outside: list[dict[str, Any]], memorization: dict[str, Any]) -> str:
    if memorization.get("verdict") == "copies":
        return "The synthetic scans contain copies of training scans."
    if not judged:
        return "Too few scans to say anything."
    share = len(outside) / len(judged)
    if share > 0.4 or any(e["id"].startswith("classifier_") and e["value"] >= TOLD_APART_AUC for e in outside):
        return "The synthetic scans can be told from real ones."
    if share <= 0.1:
        return "As far as these measures see, the synthetic scans look like real ones."
    return "The synthetic scans are close to real ones, with differences that can be measured."


def _counts(judged: list[dict[str, Any]], outside: list[dict[str, Any]], total: int) -> str:
    text = f"{len(judged) - len(outside)} of {len(judged)} measures lie where real scans of other patients lie"
    text += "; one in twenty would fall outside by chance." if judged else "."
    if skipped := total - len(judged):
        text += f" {skipped} more had too few scans."
    sizes = [min(entry["scans"].values()) for entry in judged]
    if sizes and min(sizes) < FEW:
        text += f" With {min(sizes)} scans on the smaller side only large differences show."
    return text


def _classifier(judged: list[dict[str, Any]]) -> str:
    entries = [entry for entry in judged if entry["id"].startswith("classifier_")]
    if not entries:
        return ""
    worst = max(entries, key=lambda entry: entry["value"])
    floor = worst["floor"]
    return (
        f"A simple classifier tells synthetic from real scans with an AUC of {worst['value']:.2f} "
        f"(real against real: {floor['low']:.2f} to {floor['high']:.2f}; 0.5 is guessing)."
    )


def _furthest(outside: list[dict[str, Any]]) -> str:
    if not outside:
        return ""
    named = "; ".join(f"{e['title']} {number(e['value'])}{unit(e)} (real {floor_text(e)})" for e in outside[:MOST_NAMED])
    return f"Furthest off: {named}."


def _copies(memorization: dict[str, Any]) -> str:
    if memorization.get("status") != "ok":
        return "Too few scans to look for copies of training scans."
    count, total = len(memorization["copies"]), memorization["scans"]["synthetic"]
    if count:
        words = "is a copy of a training scan" if count == 1 else "are copies of training scans"
        return f"{count} of {total} synthetic scans {words}."
    if memorization["verdict"] == "nearer than chance":
        close = len(memorization["close"])
        return f"{close} of {total} synthetic scans are nearer to a training scan than held-out scans come."
    return f"No copy of a training scan was found among {total}."


def _reconstruction(reconstruction: dict[str, Any]) -> str:
    if reconstruction.get("status") != "ok":
        return ""
    full = reconstruction["windows"]["full"]
    return (
        f"Real scans reconstructed by the model keep {full['psnr_db']['mean']:.1f} dB PSNR "
        f"and differ by {full['mae_body_hu']['mean']:.0f} HU within the body."
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    text = f"{value:.3g}"
    return (f"{value:.0f}" if "e" in text and abs(value) >= 1 else text).replace("-", "\N{MINUS SIGN}")


def unit(entry: dict[str, Any]) -> str:
    """The unit with its space, or nothing where the title already says it."""
    return f" {entry['unit']}" if entry["unit"] not in ("", "AUC", "MS-SSIM") else ""


def floor_text(entry: dict[str, Any]) -> str:
    return f"{number(entry['floor']['low'])} to {number(entry['floor']['high'])}"
