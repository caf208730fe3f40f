"""The calibration in a run: what has it, what is without it, in tiles and exported, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ctvae import model as model_module
from ctvae.calibration import FILE, level_of
from ctvae.checkpoint import load
from ctvae.config import load_recipe
from ctvae.errors import ConfigError, ModelError
from ctvae.export import export
from ctvae.generate import load as load_model
from ctvae.intensity import to_hu
from ctvae.runlog import Run
from ctvae.training import autoencoder
from ctvae.training.train import train

CALIBRATED = (
    "calibration.enabled=true", "data.patch=null", "prior.rank=2", "prior.sampling_steps=2", "prior.precision=fp32",
    "autoencoder.precision=fp32", "finish.enabled=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(tiny_dataset, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    return train(tiny_dataset, folder, stage="calibration", overrides=CALIBRATED, start=tiny_run)


def test_it_changes_what_is_decoded_and_no_weights(calibrated, tiny_run):
    before, after = (load(run / "autoencoder.safetensors")[0] for run in (tiny_run, calibrated))
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    plain, model = load_model(tiny_run), load_model(calibrated)
    latent = model.draw("flow", 3, 0).latent
    assert torch.equal(latent, plain.draw("flow", 3, 0).latent)
    assert (model.decode(latent) != plain.decode(latent)).any()
    assert model.hash != plain.hash  # so that sidecars tell them apart


def test_by_tiles_it_is_the_same(calibrated, monkeypatch):
    model = load_model(calibrated)
    latent = model.draw("flow", 3, 1).latent
    whole = model.decode(latent)
    monkeypatch.setattr(model_module, "CALIBRATED_TILE", (5, 9, 32))
    np.testing.assert_array_equal(model.decode(latent), whole)


def test_what_is_decoded_has_the_level_of_the_whole_volume(calibrated, monkeypatch):
    """By tiles too: each of them alone would have another."""
    model = load_model(calibrated)
    latent = model.draw("flow", 3, 1).latent
    raw, soft = model.raw(latent), model.calibration.soft
    toned = model.toned(raw)
    level = level_of(toned, soft)
    model.calibration = replace(model.calibration, level=level - 0.03, level_gain=1.0)
    monkeypatch.setattr(model_module, "CALIBRATED_TILE", (5, 9, 32))
    np.testing.assert_array_equal(model.decode(latent), to_hu(model.calibration(raw, toned, level)[0, 0].numpy(), (-1000, 1000)))
    assert (model.decode(latent) != to_hu(model.calibration(raw, toned)[0, 0].numpy(), (-1000, 1000))).any()


def test_an_exported_model_has_it(calibrated, tmp_path):
    exported = load_model(export(calibrated, tmp_path / "model"))
    assert exported.calibration.sigma == load_model(calibrated).calibration.sigma
    torch.testing.assert_close(exported.calibration.rim, load_model(calibrated).calibration.rim)


def test_a_prior_trained_on_it_keeps_it_and_a_finish_does_not(calibrated, tiny_dataset, tmp_path):
    quick = [*CALIBRATED, "prior.steps=2", "prior.log_every=2", "prior.save_every=2", "prior.batch=2"]
    prior = train(tiny_dataset, tmp_path / "prior", stage="prior", overrides=quick, start=calibrated)
    assert (prior / FILE).read_bytes() == (calibrated / FILE).read_bytes()
    quick = [*CALIBRATED, "finish.enabled=true", "finish.steps=2", "finish.log_every=2", "finish.save_every=2", "finish.drawn=2"]
    finished = train(tiny_dataset, tmp_path / "finish", stage="finish", overrides=quick, start=calibrated)
    assert not (finished / FILE).exists()
    train(tiny_dataset, tmp_path / "finish", stage="calibration", overrides=quick)  # of the new decoder
    assert (finished / FILE).exists()


def test_a_kill_leaves_none_beside_a_decoder_that_it_is_not_of(calibrated, tiny_dataset, tmp_path, monkeypatch):
    """The finish calibrates the decoder before it, and has forgotten that when the new weights are written."""
    quick = [*CALIBRATED, "finish.enabled=true", "finish.steps=2", "finish.log_every=2", "finish.save_every=2", "finish.drawn=2"]

    def killed(path, *_):
        raise KeyboardInterrupt(path.name)

    monkeypatch.setattr(autoencoder, "save", killed)
    with pytest.raises(KeyboardInterrupt, match=r"autoencoder\.safetensors"):
        train(tiny_dataset, tmp_path, stage="finish", overrides=quick, start=calibrated)
    monkeypatch.undo()
    assert not (tmp_path / FILE).exists()
    run = train(tiny_dataset, tmp_path, stage="finish", overrides=quick)
    assert not (run / FILE).exists()
    assert {"finish", "prior"} < {*Run(run).state["stages"]} == {"autoencoder", "prior", "finish"}


def test_it_needs_an_autoencoder_and_spatial_latents(tiny_dataset, tiny_settings, tmp_path):
    with pytest.raises(ModelError, match="no trained autoencoder"):
        train(tiny_dataset, tmp_path, stage="calibration", overrides=[*tiny_settings[:-1], "calibration.enabled=true"])
    with pytest.raises(ConfigError, match=r"calibration\.enabled: slice2d has no spatial latents"):
        load_recipe("slice2d", ["calibration.enabled=true"])
