"""What a report may say at most."""

from __future__ import annotations

import pytest

from ctvae.evaluation.verdict import verdict


@pytest.mark.parametrize(
    ("judged", "outside", "headline"),
    [
        (6, 0, "Too few scans for most measures; the others see no more than real scans differ by."),
        (6, 2, "Too few scans for most measures; the others see differences that can be measured."),
        (6, 3, "The synthetic scans can be told from real ones."),
        (12, 1, "As far as these measures see, the synthetic scans look like real ones."),
        (12, 4, "The synthetic scans are close to real ones, with differences that can be measured."),
        (12, 5, "The synthetic scans can be told from real ones."),
    ],
)
def test_the_headline_says_no_more_than_was_judged(judged, outside, headline):
    """Of 13 measures, of which real scans have at most one outside their floor, and that by two half-widths at most."""
    assert headline_of(judged, outside, 2.0) == headline
    if outside == 1:
        assert headline_of(judged, outside, 2.1).endswith("differences that can be measured.")


def headline_of(judged: int, outside: int, half_widths: float) -> str:
    def entry(number: int) -> dict:
        scans, floor = {"synthetic": 8, "real": 8}, {"low": 0.0, "high": 1.0}
        words = {"id": f"m{number}", "title": "M", "unit": "", "value": 2.0, "floor": floor, "scans": scans}
        inside, known = number >= outside, "ok" if number < judged else "not enough"
        return {**words, "status": known, "within_floor": inside, "floor_widths": half_widths}

    chance = {"mean": 0.5, "most": 1, "splits": 100, "furthest": 2.0}
    return verdict([entry(n) for n in range(13)], chance, {"status": "not enough"}, {}, None)["headline"]
