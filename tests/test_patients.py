"""Which scans are one patient, and which split a patient is in."""

from __future__ import annotations

from collections import Counter

import pytest

from ctvae.dataset import Dataset
from ctvae.errors import InputError
from ctvae.patients import split_of
from ctvae.prepare import prepare


def small(sources, out, **arguments) -> Dataset:
    return prepare(sources, out, **{"slices": 8, "workers": 1, **arguments})


def splits(dataset: Dataset) -> dict[str, str]:
    return {group.patient: group.split for group in dataset.groups()}


def test_nobody_moves_when_scans_are_added(tmp_path, scan_hu, write_nifti):
    for n in range(30):
        write_nifti(tmp_path / "a" / f"case_{n}.nii", scan_hu(n, (8, 16, 16)))
    shares = {"fractions": (0.5, 0.25, 0.25)}
    before = splits(small(tmp_path / "a", tmp_path / "before", **shares))
    for n in range(30, 40):
        write_nifti(tmp_path / "a" / f"added_{n}.nii", scan_hu(n, (8, 16, 16)))
    fresh = splits(small(tmp_path / "a", tmp_path / "fresh", **shares))
    grown = splits(small(tmp_path / "a", tmp_path / "before", **shares))
    assert len(fresh) == 40
    assert fresh == grown
    assert {patient: fresh[patient] for patient in before} == before
    assert set(before.values()) == {"train", "validation", "test"}


def test_splits_have_their_shares():
    counts = Counter(split_of(f"patient {n}", 0, (0.8, 0.15, 0.05)) for n in range(20_000))
    for split, share in (("train", 0.8), ("validation", 0.15), ("test", 0.05)):
        assert counts[split] / 20_000 == pytest.approx(share, abs=0.01)
    assert all(split_of(f"{n}", 1, (1.0, 0.0, 0.0)) == "train" for n in range(1000))
    assert any(split_of(f"{n}", 0, (0.5, 0.25, 0.25)) != split_of(f"{n}", 1, (0.5, 0.25, 0.25)) for n in range(20))


def test_there_is_always_a_patient_to_train_on(tmp_path, scans):
    dataset = small(scans, tmp_path / "ds", fractions=(1e-9, 0.5, 0.5 - 1e-9))
    assert Counter(splits(dataset).values())["train"] == 1
    assert any("was put there" in note for note in dataset.notes)


def test_a_pattern_keeps_the_scans_of_a_patient_together(tmp_path, scan_hu, write_nifti):
    for patient in "ABCDEF":
        for visit in (1, 2):
            hu = scan_hu(ord(patient) + 99 * visit, (8, 16, 16))
            write_nifti(tmp_path / "in" / f"{patient}_visit{visit}.nii", hu)
    write_nifti(tmp_path / "in" / "unnamed.nii", scan_hu(1, (8, 16, 16)))
    dataset = small(tmp_path / "in", tmp_path / "ds", patient_pattern="^([A-Z])_", fractions=(0.4, 0.3, 0.3))
    assert {(g.patient, g.source[0]) for g in dataset.groups()} == {(patient, patient) for patient in "ABCDEF"}
    assert all(len({g.split for g in dataset.groups() if g.patient == patient}) == 1 for patient in "ABCDEF")
    assert "does not match" in {entry["source"]: entry["reason"] for entry in dataset.rejected}["unnamed.nii"]


def test_a_csv_names_the_patients(tmp_path, scans):
    (tmp_path / "patients.csv").write_text("scan,patient\ncase_0.nii.gz,P1\ncase_1,P1\ncase_2.nii.gz,P2\n")
    dataset = small(scans, tmp_path / "ds", patient_csv=tmp_path / "patients.csv")
    assert {group.source: group.patient for group in dataset.groups()} == {
        "case_0.nii.gz": "P1", "case_1.nii.gz": "P1", "case_2.nii.gz": "P2"
    }  # fmt: skip
    assert "not in the patient CSV" in {entry["source"]: entry["reason"] for entry in dataset.rejected}["case_3.nii.gz"]
    (tmp_path / "patients.csv").write_text("file,who\na,b\n")
    with pytest.raises(InputError, match="columns scan and patient"):
        small(scans, tmp_path / "other", patient_csv=tmp_path / "patients.csv")
