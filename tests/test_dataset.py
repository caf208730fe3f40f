"""Opening what `prepare` made, and saying what is wrong with anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctvae.dataset import Dataset
from ctvae.errors import InputError
from ctvae.prepare import prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory, scan_hu, write_nifti) -> Path:
    """Six scans of 20 slices in groups of 8, one with labels."""
    folder = tmp_path_factory.mktemp("made")
    for seed in range(6):
        write_nifti(folder / "scans" / f"case_{seed}.nii.gz", scan_hu(seed))
    write_nifti(folder / "labels" / "case_2.nii.gz", (scan_hu(2) > 0).astype(np.int16))
    prepare(folder / "scans", folder / "ds", slices=8, labels=folder / "labels", fractions=(0.5, 0.25, 0.25), workers=1)
    return folder / "ds"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "ds")
    return tmp_path / "ds"


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_groups_are_sorted_and_split(made):
    dataset = Dataset.open(made)
    groups = dataset.groups()
    assert [group.id for group in groups] == sorted(f"case_{n}_{start:04d}" for n in range(6) for start in (0, 8, 12))
    by_split = [group for split in ("train", "validation", "test") for group in dataset.groups(split)]
    assert sorted(group.id for group in by_split) == [group.id for group in groups]
    with pytest.raises(InputError, match="split 'dev' is not one of train, validation, test"):
        dataset.groups("dev")


def test_hu_are_the_scans_own_and_memory_mapped(made, scan_hu):
    dataset = Dataset.open(made)
    group = next(group for group in dataset.groups() if group.id == "case_3_0008")
    hu = dataset.hu(group)
    assert isinstance(hu, np.memmap)
    np.testing.assert_array_equal(hu, scan_hu(3)[8:16])
    volume = dataset.volume(group)
    assert volume.spacing_mm == pytest.approx((1.5, 1.5, 3.0))
    assert group.spacing_mm == pytest.approx((1.5, 1.5, 3.0))
    np.testing.assert_allclose(volume.affine[:3, 3], [0, 0, 8 * 3.0])
    assert (group.position, group.first_slice, group.source) == (pytest.approx(12 / 20), 8, "case_3.nii.gz")


def test_labels_are_there_for_the_scan_that_has_them(made, scan_hu):
    dataset = Dataset.open(made)
    labelled = {group.id: dataset.labels(group) for group in dataset.groups()}
    have = {name for name, labels in labelled.items() if labels is not None}
    assert have == {"case_2_0000", "case_2_0008", "case_2_0012"}
    np.testing.assert_array_equal(labelled["case_2_0012"], scan_hu(2)[12:] > 0)


def test_the_fingerprint_follows_content_and_split(copy):
    before = Dataset.open(copy).fingerprint
    assert Dataset.open(edited(copy, lambda content: content["groups"].reverse())).fingerprint == before
    changed = edited(copy, lambda content: content["groups"][0].update(sha256="0" * 64))
    assert Dataset.open(changed).fingerprint != before


def test_dataset_json_is_readable(made):
    lines = (made / "dataset.json").read_text().splitlines()
    assert max(map(len, lines)) < 1200
    assert sum('"case_4_0008"' in line for line in lines) == 1
    content = json.loads("\n".join(lines))
    assert content["measured"]["spacing_z_mm"] == {"min": 3.0, "median": 3.0, "max": 3.0}
    assert content["measured"]["hu_percentiles"]["5"] == pytest.approx(-1010, abs=15)  # air with noise of 10 HU


def test_no_path_of_this_machine_is_written(made):
    for path in [made / "dataset.json", made / "prepare.json", *(made / "scans").iterdir()]:
        assert str(made.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ds: shutil.rmtree(ds), "no such dataset; make one with `ctvae prepare"),
        (lambda ds: (ds / "dataset.json").unlink(), "not a finished dataset"),
        (lambda ds: (ds / "dataset.json").write_text('{"format": 1,'), "damaged"),
        (lambda ds: (ds / "dataset.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
        (lambda ds: (ds / "dataset.json").write_text("[1]"), "damaged"),
        (lambda ds: edited(ds, lambda content: content.update(format=99)), "format version 99, this ctvae reads 1"),
        (lambda ds: edited(ds, lambda content: content.pop("groups")), "damaged .KeyError: 'groups'"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].pop("shape")), "damaged"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].update(split="dev")), "unknown split 'dev'"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].update(shape=[8, 8])), "not 3D"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].update(path="../x.nii")), "leaves its folder"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].update(path="/etc/x.nii")), "leaves its folder"),
        (lambda ds: edited(ds, lambda content: content["groups"][0].update(label_path="a/../../x")), "leaves"),
    ],
)
def test_what_is_no_dataset_is_named_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        Dataset.open(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_changed_group_file_is_named(copy):
    dataset = Dataset.open(copy)
    first, second, third = dataset.groups()[:3]
    (copy / first.path).unlink()
    (copy / second.path).write_bytes((copy / second.path).read_bytes()[:500])
    shutil.copy(copy / dataset.groups()[5].path, copy / third.path)
    with pytest.raises(InputError, match=r"case_0_0000\.nii: missing or damaged"):
        dataset.hu(first)
    with pytest.raises(InputError, match=r"case_0_0008\.nii: missing or damaged"):
        dataset.hu(second)
    edited(copy, lambda content: content["groups"][2].update(shape=[9, 24, 32]))
    changed = next(group for group in Dataset.open(copy).groups() if group.id == third.id)
    with pytest.raises(InputError, match=r"is not \(9, 24, 32\)"):
        dataset.hu(changed)


def test_the_page_on_formats_names_every_key(made):
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    content = json.loads((made / "dataset.json").read_text())
    keys = {*content, *content["settings"], *content["scans"][0], *content["groups"][0]}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
