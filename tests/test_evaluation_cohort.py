"""Who stands on which side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctvae.evaluation import cohort
from ctvae.volume import Volume

SHAPE, SPACING = (20, 40, 40), (6.0, 6.0, 5.0)


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
