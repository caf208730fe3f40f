"""Nothing of a patient leaves a scan's header: every byte that is written is searched for what was planted there."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from pathlib import Path

import hostile_dicom
import hostile_files
import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension

from ctvae import nifti
from ctvae.dataset import Dataset
from ctvae.errors import InputError
from ctvae.prepare import prepare
from ctvae.volume import Volume, plain_affine

PLANTED = ("Zzyzx", "Quorra", "MRN-0042", "MRN0042", "19470203", "Mercywell", "ACC-77", "/home/drsmith", "1.2.826.0.99")
SHAPE = (16, 24, 24)


def leaks(folder: Path) -> list[str]:
    """`file: word` for each planted word in the bytes of a file, unpacked if they are packed, or in its name."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            content = raw + (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else b"") + path.name.encode()
            content += content.replace(b"\0", b"")  # UTF-16, too
            found += [f"{path.name}: {word}" for word in PLANTED if word.lower().encode() in content.lower()]
    return found


def write_nifti_with_a_name(path: Path, hu: np.ndarray) -> None:
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), plain_affine((1.5, 1.5, 3.0), hu.shape))
    image.header["descrip"] = b"Zzyzx^Quorra 19470203"
    image.header["aux_file"] = b"/home/drsmith/MRN0042"
    image.header["intent_name"] = b"Mercywell ACC-77"
    image.header["db_name"] = b"Quorra Zzyzx"
    image.header.extensions.append(Nifti1Extension("comment", b"Zzyzx^Quorra MRN-0042"))
    image.set_sform(image.affine, code="scanner")
    nib.save(image, path)


def write_dicom_with_a_name(folder: Path, hu: np.ndarray, patient: str = "MRN-0042") -> None:
    folder.mkdir(parents=True)
    for n, image in enumerate(hostile_dicom.series(hu, uid="1.2.826.0.99")):
        image.PatientName, image.PatientID, image.PatientBirthDate = "Zzyzx^Quorra", patient, "19470203"
        image.InstitutionName, image.AccessionNumber = "Mercywell", "ACC-77"
        image.save_as(folder / f"{n:03d}", enforce_file_format=True)


@pytest.fixture
def sources(tmp_path) -> Path:
    """Two NIfTI files, two series of one patient, one of another, one that is refused and one that is damaged."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed in (1, 2):
        write_nifti_with_a_name(scans / f"case_{seed}.nii.gz", hostile_files.body(seed, SHAPE))
    for seed, patient in ((3, "MRN-0042"), (4, "MRN-0042"), (5, "MRN-0043")):
        write_dicom_with_a_name(scans / f"study_{seed}", hostile_files.body(seed, SHAPE), patient)
    write_dicom_with_a_name(scans / "blank", np.full(SHAPE, 5, np.int16))
    write_dicom_with_a_name(scans / "damaged", hostile_files.body(6, SHAPE))
    rng = random.Random(4)
    for path in (scans / "damaged").iterdir():
        path.write_bytes(hostile_dicom._flip_tags(rng, bytearray(path.read_bytes())))
    return scans


def test_the_search_finds_what_is_planted(sources):
    """Or the tests below could not fail."""
    words = {line.rpartition(": ")[2] for line in leaks(sources)}
    assert words == set(PLANTED)


def test_a_dataset_holds_no_word_of_a_header_and_no_path(sources, tmp_path):
    dataset = prepare(sources, tmp_path / "dataset", slices=8, size=16, crop_body=True, workers=1)
    assert len(dataset.scans) == 5
    assert {"blank", "damaged"} == {reject["source"] for reject in dataset.rejected}
    assert leaks(dataset.folder) == []
    for path in dataset.folder.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def test_pseudonyms_are_salted_by_a_secret_of_the_dataset(sources, tmp_path):
    one, two, third = (tmp_path / name for name in ("one", "two", "third"))
    patients = []
    for out, other in ((one, None), (two, None), (third, one)):
        dataset = prepare(sources, out, slices=8, workers=1, patients_of=other)
        patients.append({scan["source"]: scan["patient"] for scan in dataset.scans})
    assert patients[0]["study_3"] == patients[0]["study_4"] != patients[0]["study_5"]
    assert patients[0]["study_3"] != patients[1]["study_3"]
    assert patients[0] == patients[2]
    salts = [json.loads((out / "prepare.json").read_text())["salt"] for out in (one, two, third)]
    assert salts[0] == salts[2] != salts[1]
    assert all(re.fullmatch("[0-9a-f]{32}", salt) for salt in salts)
    again = prepare(sources, one, slices=8, workers=1)  # the same folder keeps its salt
    assert {scan["source"]: scan["patient"] for scan in again.scans} == patients[0]
    with pytest.raises(InputError, match="was prepared with another salt"):
        prepare(sources, one, slices=8, workers=1, patients_of=two)


def test_a_dataset_begun_before_salts_keeps_its_pseudonyms(sources, tmp_path):
    out = tmp_path / "old"
    prepare(sources, out, slices=8, workers=1)
    mark = json.loads((out / "prepare.json").read_text())
    del mark["salt"]
    (out / "prepare.json").write_text(json.dumps(mark))
    before = Dataset.open(out).fingerprint
    assert prepare(sources, out, slices=8, workers=1).fingerprint == before


def test_what_is_written_carries_only_the_given_description(tmp_path):
    write_nifti_with_a_name(tmp_path / "in.nii.gz", hostile_files.body(1, SHAPE))
    volume, orientation = nifti.read(tmp_path / "in.nii.gz")
    (tmp_path / "out").mkdir()
    for name in ("again.nii", "again.nii.gz"):
        nifti.write(tmp_path / "out" / name, volume, orientation, "SYNTHETIC")
        header = nib.load(tmp_path / "out" / name).header
        assert header["descrip"].item().rstrip(b"\0") == b"SYNTHETIC"
        assert not any(header[key].item().strip(b"\0") for key in ("aux_file", "intent_name", "db_name", "data_type"))
        assert len(header.extensions) == 0
    assert leaks(tmp_path / "out") == []


def test_what_is_made_of_a_scan_carries_no_word_of_its_header_and_no_path(tiny_run, tmp_path):
    from ctvae.generate import interpolate, reconstruct, vary

    source, study, out = tmp_path / "case.nii.gz", tmp_path / "study", tmp_path / "out"
    write_nifti_with_a_name(source, hostile_files.body(1, (64, 24, 24)))
    write_dicom_with_a_name(study, hostile_files.body(2, (64, 24, 24)))
    for scan in (source, study):
        reconstruct(tiny_run, scan, out / f"{scan.stem}-again.nii.gz")
        vary(tiny_run, scan, out / f"{scan.stem}-vary", count=1)
    interpolate(tiny_run, source, study, out / "between", count=2)
    assert len(list(out.rglob("*.nii.gz"))) == 6
    assert len(list(out.rglob("*.json"))) == 6
    assert leaks(out) == []
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_packed_file_says_neither_its_name_nor_when_it_was_made(tmp_path):
    nifti.write(tmp_path / "Quorra.nii.gz", Volume(hostile_files.body(), plain_affine((1.5, 1.5, 3.0), hostile_files.SHAPE)))
    raw = (tmp_path / "Quorra.nii.gz").read_bytes()
    assert raw[3] & 0b11100 == 0, "no extra field, name or comment"
    assert raw[4:8] == b"\0\0\0\0", "no date"
    assert zlib.decompressobj(31).decompress(raw)[:4] == b"\x5c\x01\0\0"


def test_a_run_and_an_exported_model_name_no_patient_and_no_path(tmp_path, tiny_settings):
    from ctvae.export import export
    from ctvae.phantoms import phantom
    from ctvae.training.train import train

    scans, shape = tmp_path / "scans" / "home" / "drsmith", (64, 32, 32)
    for seed in range(3):
        hu, _ = phantom(seed, shape, (12.5, 12.5, 4.5))
        nifti.write(scans / f"Quorra_{seed}.nii.gz", Volume(hu, plain_affine((12.5, 12.5, 4.5), shape)))
    dataset = prepare(scans, tmp_path / "dataset", slices=64, fractions=(1, 0, 0), workers=1)
    run = train(dataset.folder, tmp_path / "run", overrides=[*tiny_settings, "autoencoder.steps=2", "prior.steps=2"])
    exported = export(run, tmp_path / "model")
    assert leaks(exported) == []
    paths = [path for folder in (run, exported) for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in paths if str(tmp_path).encode() in path.read_bytes()] == []
    # File names are the user's own; they are in the latents, which stay in the run folder, and nowhere else.
    assert {line.partition(":")[0] for line in leaks(run)} <= {"000000000.safetensors"}  # shards of latents
