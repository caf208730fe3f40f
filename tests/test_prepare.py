"""From scans to a dataset: what is kept, what is turned away and why, and that nothing is done twice or lost."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctvae import files
from ctvae import intake as intake_module
from ctvae.dataset import Dataset
from ctvae.errors import InputError
from ctvae.intake import prepare_scan
from ctvae.nifti import read
from ctvae.prepare import prepare
from ctvae.volume import Volume, position_mm

MODULE = importlib.import_module("ctvae.prepare")  # on the package, the name is the function


def small(sources, out, **arguments) -> Dataset:
    return prepare(sources, out, **{"slices": 8, "workers": 1, **arguments})


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {entry["source"]: entry["reason"] for entry in dataset.rejected}


def splits(dataset: Dataset) -> dict[str, str]:
    return {group.patient: group.split for group in dataset.groups()}


# Groups and geometry


def test_voxels_of_a_group_lie_where_they_lay_in_the_scan(tmp_path, scan_hu):
    """A stored order with flips, a body crop, overlapping groups: each marked voxel keeps its millimetres."""
    hu = scan_hu(shape=(20, 40, 60))
    marks = {(4, 20, 30): 2001, (13, 15, 22): 2002, (19, 25, 40): 2003}
    affine = np.array([[0, 0, 2.5, 7.0], [-1.2, 0, 0, -30], [0, 1.3, 0, 400], [0, 0, 0, 1]])  # stored as P, S, L-to-R
    for index, value in marks.items():
        hu[index] = value
    stored = hu[:, :, ::-1].transpose(1, 0, 2)  # i to posterior, j up, k to the right
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "in" / "scan.nii")
    dataset = small(tmp_path / "in", tmp_path / "ds", crop_body=True, stride=5)
    assert {group.shape[1:] for group in dataset.groups()} != {(40, 60)}
    for value in marks.values():
        place = (affine @ [*np.argwhere(stored == value)[0], 1])[:3]
        holding = [group for group in dataset.groups() if (dataset.hu(group) == value).any()]
        assert holding
        for group in holding:
            index = tuple(np.argwhere(dataset.hu(group) == value)[0])
            np.testing.assert_allclose(position_mm(group.affine, index), place, atol=1e-4)
            np.testing.assert_allclose(nib.load(dataset.folder / group.path).affine, group.affine, atol=1e-4)


def test_resampled_groups_are_square_and_span_the_same_millimetres(tmp_path, scans):
    dataset = small(scans, tmp_path / "ds", size="16")
    for group in dataset.groups():
        assert group.shape == (8, 16, 16)
        assert group.spacing_mm == pytest.approx((3.0, 3.0, 3.0))  # 32 x 1.5 mm in 16 pixels
    first = dataset.groups()[0]
    low, high = (position_mm(first.affine, (0, h, h)) for h in (-0.5, 15.5))
    np.testing.assert_allclose(np.abs(high - low)[:2], 48)
    centre = position_mm(first.affine, (0, 7.5, 7.5))
    np.testing.assert_allclose(centre[:2], [-15.5 * 1.5, -11.5 * 1.5])


@pytest.mark.parametrize("size", ["native", 20])
def test_labels_stay_on_their_voxels_through_crop_and_resampling(tmp_path, scans, scan_hu, write_nifti, size):
    """Labels that follow the HU exactly do so in every group, but for the rim that resampling mixes."""
    hu = np.where(scan_hu(7, (20, 48, 64)) > -300, 40, -1000).astype(np.int16)
    hu[5:15, 20:28, 26:40] = 800
    write_nifti(tmp_path / "in" / "case.nii.gz", hu)
    write_nifti(tmp_path / "maps" / "case.nii.gz", np.digitize(hu, [-300, 400]).astype(np.uint8))
    dataset = small(tmp_path / "in", tmp_path / "ds", size=size, crop_body=True, labels=tmp_path / "maps")
    for group in dataset.groups():
        labels, expected = dataset.labels(group), np.digitize(dataset.hu(group), [-300, 400])
        assert labels is not None
        assert (labels == 2).any()
        agreement = (labels == expected).mean()
        assert agreement == 1.0 if size == "native" else agreement > 0.93
        if size != "native":  # the dense block has its centre at the same place in both
            centres = [np.argwhere(mask).mean(axis=0) for mask in (labels == 2, expected == 2)]
            np.testing.assert_allclose(centres[0], centres[1], atol=0.35)


def test_labels_that_do_not_fit_are_left_out_with_the_reason(tmp_path, scans, write_nifti):
    maps = tmp_path / "maps"
    write_nifti(maps / "case_0.nii.gz", np.ones((20, 24, 30), np.uint8))
    write_nifti(maps / "case_1.nii.gz", np.ones((20, 24, 32), np.uint8), spacing_mm=(1.5, 1.6, 3.0))
    write_nifti(maps / "case_2.nii", np.ones((20, 24, 32), np.uint8))
    dataset = small(scans, tmp_path / "ds", labels=maps)
    assert {group.source for group in dataset.groups() if group.label_path} == {"case_2.nii.gz"}
    notes = "\n".join(dataset.notes)
    assert "case_0.nii.gz: labels rejected: shape (20, 24, 30) is not the scan's (20, 24, 32)" in notes
    assert "case_1.nii.gz: labels rejected: lies 2.4 mm away" in notes
    assert "no label file for 1 of 4 scans: case_3.nii.gz" in notes


def test_padded_groups_are_air_above_the_scan(tmp_path, scans, scan_hu, write_nifti):
    write_nifti(scans / "short.nii.gz", scan_hu(9, (5, 24, 32)))
    dataset = small(scans, tmp_path / "ds", rest="pad")
    groups = {group.id: group for group in dataset.groups()}
    np.testing.assert_array_equal(dataset.hu(groups["short_0000"])[:5], scan_hu(9, (5, 24, 32)))
    assert (dataset.hu(groups["short_0000"])[5:] == -1000).all()
    assert (dataset.hu(groups["case_0_0016"])[4:] == -1000).all()
    assert 0 <= groups["case_0_0016"].position <= 1


def test_folders_of_labels_are_no_scans(tmp_path, scans, write_nifti):
    write_nifti(scans / "labels" / "case_0.nii.gz", np.ones((20, 24, 32), np.uint8))
    (scans / ".hidden.nii").write_bytes(b"")
    dataset = small(scans, tmp_path / "ds")
    assert dataset.rejected == []
    assert "not searched: scans/labels" in dataset.notes
    first = small(scans, tmp_path / "with", labels=scans / "labels").groups()[0]
    assert first.label_path == "labels/case_0_0000.nii.gz"


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("crop_body", [False, True])
def test_groups_without_a_body_are_left_out_table_or_not(tmp_path, scan_hu, write_nifti, table, crop_body):
    """As in headneck_038: the body ends, and a table beside it goes on."""
    hu = scan_hu(0, (20, 48, 32))
    hu[11:] = -1000
    if table:
        hu[:, -2:, 4:28] = -110
    write_nifti(tmp_path / "scans" / "a.nii.gz", hu)
    dataset = small(tmp_path / "scans", tmp_path / "out", stride=2, crop_body=crop_body)
    assert [group.first_slice for group in dataset.groups()] == [0, 2]  # the next has one slice of eight without a body


def test_the_same_name_twice_makes_two_sets_of_groups(tmp_path, scan_hu, write_nifti):
    write_nifti(tmp_path / "a" / "scan.nii.gz", scan_hu(1))
    write_nifti(tmp_path / "a" / "scan.nii", scan_hu(2))
    write_nifti(tmp_path / "b" / "scan.nii.gz", scan_hu(3))
    dataset = small([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "scan.nii"], tmp_path / "ds")
    assert len({group.id for group in dataset.groups()}) == len({group.sha256 for group in dataset.groups()}) == 9


def test_a_folder_per_patient_is_a_patient_each(tmp_path, scan_hu, write_nifti):
    for n in range(3):
        write_nifti(tmp_path / "in" / f"s{n:04d}" / "ct.nii.gz", scan_hu(n))
    dataset = small(tmp_path / "in", tmp_path / "ds")
    assert set(splits(dataset)) == {"s0000/ct", "s0001/ct", "s0002/ct"}


# Rejects


def test_every_unusable_scan_is_named_with_its_reason_and_the_rest_goes_on(tmp_path, scans, scan_hu, write_nifti):
    hu = scan_hu(5)
    write_nifti(scans / "flat.nii.gz", hu[:1])
    write_nifti(scans / "nan.nii.gz", np.where(hu > 60, np.nan, hu.astype(np.float32)))
    write_nifti(scans / "mr.nii.gz", (hu + 1100).clip(0).astype(np.int16))
    write_nifti(scans / "short.nii.gz", hu[:5])
    write_nifti(scans / "twin.nii.gz", scan_hu(1))
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None), scans / "nowhere.nii")
    (scans / "empty.nii").write_bytes(b"")
    whole = (scans / "case_0.nii.gz").read_bytes()
    (scans / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    dataset = small(scans, tmp_path / "ds")
    assert {group.source for group in dataset.groups()} == {f"case_{n}.nii.gz" for n in range(4)}
    expected = {
        "flat.nii.gz": "not 3D (its shape is 32x24x1)",
        "nan.nii.gz": "holds NaN or infinite voxels",
        "mr.nii.gz": "not CT in HU: values are",
        "short.nii.gz": "too few slices: 5, need 8; use --rest pad",
        "twin.nii.gz": "duplicate content: the same voxels as case_1.nii.gz",
        "nowhere.nii": "no usable affine (sform_code and qform_code are 0",
        "empty.nii": "empty file",
        "cut.nii.gz": "damaged or truncated gzip",
    }
    found = reasons(dataset)
    assert set(found) == set(expected)
    for source, reason in expected.items():
        assert found[source].startswith(reason)
    assert not list((tmp_path / "ds" / "groups").glob("twin*"))


def test_all_rejected_is_an_error_with_the_first_reason(tmp_path, scan_hu, write_nifti):
    for n in range(3):
        write_nifti(tmp_path / "in" / f"case_{n}.nii", scan_hu(n)[:5])
    with pytest.raises(InputError, match=r"all 3 scans were rejected, the first, case_0\.nii: too few slices: 5"):
        small(tmp_path / "in", tmp_path / "ds")
    assert not (tmp_path / "ds" / "dataset.json").exists()


def test_a_twin_takes_over_when_the_original_is_gone(tmp_path, scans, scan_hu, write_nifti):
    write_nifti(scans / "twin.nii.gz", scan_hu(1))
    small(scans, tmp_path / "ds")
    (scans / "case_1.nii.gz").unlink()
    dataset = small(scans, tmp_path / "ds")
    assert dataset.rejected == []
    twin = next(group for group in dataset.groups() if group.id == "twin_0008")
    np.testing.assert_array_equal(dataset.hu(twin), scan_hu(1)[8:16])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slices": 1}, "slices: 1 is too few"),
        ({"rest": "wrap"}, "rest: 'wrap' is not one of overlap, drop, pad"),
        ({"stride": 0}, r"stride: 0 is not within 1\.\.8"),
        ({"stride": 9}, r"stride: 9 is not within 1\.\.8"),
        ({"size": "big"}, "size: 'big' is neither 'native' nor"),
        ({"size": 4}, "size: '4' is neither"),
        ({"fractions": (0.5, 0.2, 0.2)}, "do not sum to 1"),
        ({"fractions": (0.0, 0.5, 0.5)}, "with a share for train"),
        ({"fractions": (1.0,)}, "are not three shares"),
        ({"labels": "nowhere"}, "nowhere: no such folder of labels"),
        ({"patient_pattern": "case_(.)_(.)"}, "needs one group"),
        ({"patient_pattern": "case_(."}, "not a regular expression"),
        ({"patient_csv": "nowhere.csv"}, r"nowhere\.csv: cannot be read as CSV"),
        ({"patient_csv": "x", "patient_pattern": "(.)"}, "not both"),
    ],
)
def test_bad_arguments_are_named(tmp_path, scans, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        small(scans, tmp_path / "ds", **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ds").exists()


def test_bad_sources_are_named(tmp_path, scans):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no scan")
    for source, message in (("nowhere", "no such file"), ("empty", "no scans found"), ("notes.txt", "not a scan")):
        with pytest.raises(InputError, match=message):
            small([scans, tmp_path / source] if source != "empty" else tmp_path / source, tmp_path / "ds")


def test_a_folder_with_something_else_in_it_is_not_taken(tmp_path, scans):
    with pytest.raises(InputError, match="is there already and not a dataset"):
        small(scans, scans)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is there already and not a dataset"):
        small(scans, tmp_path / "file")


# Twice, half and side by side


def test_a_second_run_does_nothing(tmp_path, scans, monkeypatch):
    (scans / "bad.nii").write_bytes(b"")
    first = small(scans, tmp_path / "ds")
    before = snapshot(tmp_path / "ds")
    monkeypatch.setattr(MODULE, "prepare_scan", lambda job: pytest.fail(f"{job.id} was prepared again"))
    again = small(scans, tmp_path / "ds")
    assert snapshot(tmp_path / "ds") == before
    assert again.fingerprint == first.fingerprint


def test_a_run_killed_in_the_middle_goes_on(tmp_path, scans, monkeypatch):
    """Killed after two scans, within the groups of the third: only what was not finished is done."""
    whole = small(scans, tmp_path / "whole")
    written = []

    def dies(path, *arguments, **named):
        written.append(path)
        if len(written) == 8:
            raise KeyboardInterrupt
        return write(path, *arguments, **named)

    write = intake_module.nifti.write
    monkeypatch.setattr(intake_module.nifti, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        small(scans, tmp_path / "ds")
    monkeypatch.setattr(intake_module.nifti, "write", write)
    with pytest.raises(InputError, match="not a finished dataset"):
        Dataset.open(tmp_path / "ds")
    finished = {path: time for path, time in snapshot(tmp_path / "ds").items() if "case_0" in path or "case_1" in path}
    prepared = []
    monkeypatch.setattr(MODULE, "prepare_scan", lambda job: prepared.append(job.id) or prepare_scan(job))
    resumed = small(scans, tmp_path / "ds")
    assert prepared == ["case_2", "case_3"]
    assert finished.items() <= snapshot(tmp_path / "ds").items()
    assert resumed.fingerprint == whole.fingerprint
    assert (tmp_path / "ds" / "dataset.json").read_text() == (tmp_path / "whole" / "dataset.json").read_text()


def test_only_a_changed_scan_or_a_lost_group_is_prepared_again(tmp_path, scans, scan_hu, write_nifti, monkeypatch):
    small(scans, tmp_path / "ds")
    write_nifti(scans / "case_1.nii.gz", scan_hu(50)[:12])
    os.utime(scans / "case_1.nii.gz", ns=(1, 1))
    (tmp_path / "ds" / "groups" / "case_3_0008.nii").unlink()
    prepared = []
    monkeypatch.setattr(MODULE, "prepare_scan", lambda job: prepared.append(job.id) or prepare_scan(job))
    dataset = small(scans, tmp_path / "ds")
    assert prepared == ["case_1", "case_3"]
    on_disk = {path.stem for path in (tmp_path / "ds" / "groups").iterdir()}
    assert on_disk == {group.id for group in dataset.groups()}
    assert {name for name in on_disk if "case_1" in name} == {"case_1_0000", "case_1_0004"}


@pytest.mark.parametrize("change", [{"size": 16}, {"seed": 1}, {"crop_body": True}, {"stride": 4}, {"rest": "drop"}])
def test_other_settings_need_another_folder(tmp_path, scans, change):
    small(scans, tmp_path / "ds")
    before = snapshot(tmp_path / "ds")
    with pytest.raises(InputError, match=r"was prepared with \w+ .*, not .*; choose another folder"):
        small(scans, tmp_path / "ds", **change)
    assert snapshot(tmp_path / "ds") == before


def test_two_processes_make_the_same_dataset_as_one(tmp_path, scans):
    heard = []
    one = small(scans, tmp_path / "one")
    two = small(scans, tmp_path / "two", workers=2, progress=lambda *event: heard.append(event))
    assert two.fingerprint == one.fingerprint
    assert [(done, total) for done, total, _ in heard] == [(n, 4) for n in range(1, 5)]
    assert {text for _, _, text in heard} == {f"case_{n}.nii.gz" for n in range(4)}


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, scans, monkeypatch):
    def full(path, content):
        if "case_2" in path.name:
            raise InputError(f"{path}: cannot be written (No space left on device); free space")
        files.write_text(path, json.dumps(content))

    monkeypatch.setattr(intake_module.files, "write_json", full)
    with pytest.raises(InputError, match="No space left"):
        small(scans, tmp_path / "ds")
    monkeypatch.undo()
    assert {path.stem for path in (tmp_path / "ds" / "scans").iterdir()} == {"case_0", "case_1"}
    assert len(small(scans, tmp_path / "ds").groups()) == 12


@pytest.mark.real
def test_real_scans_become_groups_on_their_own_grid(tmp_path, real_data):
    paths = [*sorted(real_data.glob("headneck/*.nii.gz"))[:3], real_data / "torso_half" / "totalseg_example.nii.gz"]
    labels = [real_data / "headneck" / "labels", real_data / "torso_half" / "labels"]
    dataset = prepare(paths, tmp_path / "ds", labels=labels, workers=1)
    assert dataset.rejected == []
    assert {group.source for group in dataset.groups() if group.label_path} == {path.name for path in paths}
    for group in dataset.groups():
        scan: Volume = read(next(path for path in paths if path.name == group.source))[0]
        block = scan.hu[group.first_slice : group.first_slice + 64]
        np.testing.assert_array_equal(dataset.hu(group), block)
        assert group.spacing_mm == pytest.approx(scan.spacing_mm)
