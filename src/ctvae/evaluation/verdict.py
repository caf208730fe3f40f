"""The verdict in words, from the measures against their floors. It says no more than they do."""

from __future__ import annotations

from typing import Any

MOST_NAMED = 3
TOLD_APART_AUC = 0.9
MOSTLY = 0.5  # of the measures, below which little can be said
FEW = 30  # scans on a side, below which the floors are wide


def verdict(
    measures: list[dict[str, Any]],
    chance: dict[str, Any] | None,
    memorization: dict[str, Any],
    outliers: dict[str, Any],
    reconstruction: dict[str, Any] | None,
) -> dict[str, Any]:
    """headline, sentences and the counts they rest on, of one synthetic set."""
    judged = [entry for entry in measures if entry["status"] == "ok"]
    outside = sorted((e for e in judged if not e["within_floor"]), key=lambda e: -e["floor_widths"])
    sentences = [
        _counts(judged, outside, len(measures), chance),
        _classifier(judged),
        _furthest(outside),
        _copies(memorization),
        _odd(outliers),
        _reconstruction(reconstruction),
    ]
    return {
        "headline": _headline(judged, outside, len(measures), chance, memorization),
        "sentences": [sentence for sentence in sentences if sentence],
        "measures_judged": len(judged),
        "measures_within_floor": len(judged) - len(outside),
        "measures_without_enough_scans": len(measures) - len(judged),
    }


def overall(sets: list[dict[str, Any]], ranked: list[dict[str, Any]]) -> dict[str, Any]:
    """The page's verdict: that of the only set, or who is nearest to real scans."""
    if not ranked:
        return sets[0]["verdict"]
    by_name = {entry["name"]: entry for entry in sets}
    sentences = [f"{row['name']}: {by_name[row['name']]['verdict']['headline']}" for row in ranked]
    best = ranked[0]
    if best["score"] is None:
        return {"headline": f"Too few scans to rank these {len(ranked)} folders.", "sentences": sentences}
    if best["not_told_from"]:
        names = " and ".join(best["not_told_from"])
        headline = f"Of {len(ranked)} folders {best['name']} comes nearest to real scans, but is not told from {names}."
    else:
        headline = f"Of {len(ranked)} folders {best['name']} is nearest to real scans."
    return {"headline": headline, "sentences": sentences}


def _headline(
    judged: list[dict[str, Any]],
    outside: list[dict[str, Any]],
    total: int,
    chance: dict[str, Any] | None,
    memorization: dict[str, Any],
) -> str:
    if memorization.get("verdict") == "copies":
        return "The synthetic scans contain copies of training scans."
    if not judged or chance is None:
        return "Too few scans to say anything."
    told = any(e["id"].startswith("classifier_") and e["value"] >= TOLD_APART_AUC for e in outside)
    if told or len(outside) > 0.4 * len(judged):
        return "The synthetic scans can be told from real ones."
    by_chance = len(outside) <= chance["most"] and all(e["floor_widths"] <= chance["furthest"] for e in outside)
    if len(judged) < MOSTLY * total:
        seen = "no more than real scans differ by" if by_chance else "differences that can be measured"
        return f"Too few scans for most measures; the others see {seen}."
    if by_chance:
        return "As far as these measures see, the synthetic scans look like real ones."
    return "The synthetic scans are close to real ones, with differences that can be measured."


def _counts(judged: list[dict[str, Any]], outside: list[dict[str, Any]], total: int, chance: dict[str, Any] | None) -> str:
    text = f"{len(judged) - len(outside)} of {len(judged)} measures lie where real scans of other patients lie"
    if chance:
        text += (
            f". Measures of the same scans move together: when real scans were compared with real ones, {chance['mean']:.1f} "
            f"lay outside on average, and in 95 % of {chance['splits']} comparisons at most {chance['most']}, none further off "
            f"than {chance['furthest']:.1f} half-widths of its range"
        )
    text += "."
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


def _odd(outliers: dict[str, Any]) -> str:
    odd = outliers.get("scans", [])
    traits = outliers.get("traits", [])
    text = f"Most of the folder is unlike any real scan in this: {'; '.join(traits)}. " if traits else ""
    if odd:
        named = "; ".join(f"{entry['name']} has {' and '.join(entry['why'])}" for entry in odd[:MOST_NAMED])
        text += f"{len(odd)} of the scans stand{'s' * (len(odd) == 1)} out: {named}{'; ...' * (len(odd) > MOST_NAMED)}."
    return text.strip()


def _reconstruction(reconstruction: dict[str, Any] | None) -> str:
    if not reconstruction:
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
