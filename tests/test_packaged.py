"""The model in the box: offline, small, and it draws what its card says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ctvae
from ctvae.evaluation.summary import body_mask
from ctvae.generate import packaged_models
from ctvae.model import PACKAGED

ROOT = Path(__file__).parents[1]
MOST_MB = 60


def test_what_ships_is_under_the_limit():
    weights = sum(path.stat().st_size for path in (ROOT / "src").rglob("*.safetensors"))
    assert weights < MOST_MB * 1e6


def test_the_card_is_the_one_in_the_docs():
    assert (PACKAGED / "headneck" / "README.md").read_text() == (ROOT / "docs" / "models" / "headneck.md").read_text()


def test_no_patient_is_named_in_the_weights():
    for path in (PACKAGED / "headneck").iterdir():
        assert not re.search(rb"headneck_\d", path.read_bytes()), f"{path} names cases of the training data"


def test_a_sample_is_a_body_in_air_with_a_patients_spacing():
    assert "headneck" in packaged_models()
    made = ctvae.load("headneck").generate(seed=0, index=1, steps=4)
    hu = made.volume.hu
    assert hu.shape == (64, 80, 128)
    assert hu.dtype == np.int16
    body = body_mask(hu.astype(np.float32))
    assert 0.05 < body.mean() < 0.6
    assert np.median(hu[body]) == pytest.approx(20, abs=80)  # soft tissue
    assert np.median(hu[~body]) < -950
    x, y, z = made.volume.spacing_mm
    assert x == y
    assert 3 < x < 6
    assert 1.5 < z < 3.5
    assert made.provenance["synthetic"] is True


@pytest.mark.slow
def test_four_samples_from_the_command_line(tmp_path):
    paths = ctvae.generate("headneck", tmp_path, count=4)
    assert len(paths) == 4
    assert len({json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["index"] for path in paths}) == 4
