"""Who stands on which side, and what a report may say at most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctvae.evaluation import cohort
from ctvae.evaluation.verdict import verdict
from ctvae.volume import Volume

SHAPE, SPACING = (20, 40, 40), (6.0, 6.0, 5.0)


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


def deal(splits: dict[str, int], split: str) -> cohort.Cohort:
    scans = [
        cohort.Scan(f"{name}{i}.{g}", f"{name}{i}", name, SHAPE, SPACING, lambda: Volume(np.zeros(SHAPE), np.eye(4)), Path("x"))
        for name, count in splits.items()
        for i in range(count)
        for g in range(2)
    ]
    return cohort.deal(scans, split, seed=0)


@pytest.mark.parametrize(
    ("splits", "reference", "others", "note"),
    [
        ({"train": 60, "validation": 10, "test": 20}, 20, 70, None),
        ({"train": 60, "validation": 15}, 15, 60, "The test split is empty, so the validation split stands"),
        ({"train": 30}, 18, 12, "The test split is empty, so the train split stands"),
        ({"train": 20, "validation": 2, "test": 3}, 12, 13, "The test split has 3 patients; 9 of the other splits"),
        ({"train": 4, "test": 1}, 2, 3, "The test split has 1 patient; 1 of the other splits"),
    ],
)
def test_real_patients_are_dealt_out_once(splits, reference, others, note):
    dealt = deal(splits, "test")
    patients = [scan.patient for scan in [*dealt.reference, *dealt.others]]
    assert (len(dealt.reference), len(dealt.others)) == (reference, others)
    assert len(set(patients)) == len(patients) == sum(splits.values())
    assert {scan.split for scan in dealt.training} == {"train"}
    if note:
        assert any(text.startswith(note) for text in dealt.notes)
    else:
        assert all(scan.split == "test" for scan in dealt.reference)
