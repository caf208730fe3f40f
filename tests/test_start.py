"""Training that starts from another model's weights: what is taken over, what goes on learning, what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from ctvae.checkpoint import load, save
from ctvae.config import load_config
from ctvae.errors import ConfigError, ModelError
from ctvae.generate import generate
from ctvae.model import open_model
from ctvae.training import start
from ctvae.training.train import train

QUICK = [  # of the settings that do not decide the weights' sizes
    f"{stage}.{name}" for stage in ("autoencoder", "polish", "prior")
    for name in ("steps=2", "log_every=2", "save_every=2", "precision=fp32", "batch=1")
]  # fmt: skip
QUICK += ["data.patch=null", "prior.rank=2", "prior.sampling_steps=2", "finish.enabled=false"]


def tensors(run, name: str = "autoencoder.safetensors") -> dict[str, torch.Tensor]:
    return load(run / name)[0]


def same(a, b) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_prior_alone_takes_the_autoencoder_as_it_is(tiny_dataset, tiny_run, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", stage="prior", overrides=QUICK, start=tiny_run)
    assert same(tensors(run), tensors(tiny_run))
    flows = [tensors(folder, "prior-flow.safetensors") for folder in (run, tiny_run)]
    name = "flow.correction.down.0.blocks.0.conv1.weight"
    off, size = (flows[0][name] - flows[1][name]).abs().mean(), flows[1][name].abs().mean()
    assert 0 < off < 0.1 * size  # two steps from there, not from random numbers
    assert len(generate(run, tmp_path / "out", count=1)) == 1


def test_everything_goes_on_from_there(tiny_dataset, tiny_run, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", overrides=QUICK, start=tiny_run)
    ours, theirs = tensors(run), tensors(tiny_run)
    assert not same(ours, theirs)
    name = "encoder.entries.0.weight"
    assert (ours[name] - theirs[name]).abs().mean() < 0.1 * theirs[name].abs().mean()
    assert load_config(run / "config.yaml").model == load_config(tiny_run / "config.yaml").model


def test_the_run_resumes_without_the_model_it_began_from(tiny_dataset, tiny_run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_run, source)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=QUICK, start=source)
    shutil.rmtree(source)
    train(tiny_dataset, run, overrides=QUICK)
    assert (run / "prior-flow.safetensors").is_file()


def test_a_run_of_its_own_does_not_begin_again(tiny_dataset, tiny_run, tiny_settings, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=tiny_settings)
    with pytest.raises(ConfigError, match="has been trained already"):
        train(tiny_dataset, run, stage="autoencoder", overrides=tiny_settings, start=tiny_run)


def test_a_deeper_decoder_begins_as_the_one_it_began_from(tiny_dataset, tiny_run, tmp_path):
    deeper = "model.decoder_blocks=[3,2]"
    run = train(tiny_dataset, tmp_path / "run", stage="prior", overrides=[*QUICK, deeper], start=tiny_run)
    again = train(tiny_dataset, tmp_path / "again", stage="prior", overrides=[*QUICK, deeper], start=tiny_run)
    assert same(tensors(run), tensors(again))
    assert len(tensors(run)) > len(tensors(tiny_run))
    ours, theirs = open_model(run), open_model(tiny_run)
    assert ours.cfg.model.decoder_blocks == (3, 2)
    latent = ours.draw("normal", 0, 0).latent
    np.testing.assert_array_equal(ours.decode(latent), theirs.decode(latent))
    sharper = train(tiny_dataset, tmp_path / "on", stage="autoencoder", overrides=[*QUICK, deeper], start=tiny_run)
    assert len(tensors(sharper)) == len(tensors(run))


def test_a_curve_can_be_added_and_not_taken_away(tiny_dataset, tiny_settings, tmp_path):
    plain = train(tiny_dataset, tmp_path / "plain", overrides=[*tiny_settings, "model.tone=false"])
    run = train(tiny_dataset, tmp_path / "run", stage="prior", overrides=[*QUICK, "model.tone=true"], start=plain)
    assert set(tensors(run)) - set(tensors(plain)) == {"decoder.tone.offset"}
    ours, theirs = open_model(run), open_model(plain)
    latent = ours.draw("normal", 0, 0).latent
    np.testing.assert_array_equal(ours.decode(latent), theirs.decode(latent))
    with pytest.raises(ConfigError, match=r"model.tone=false: the weights to start from have True"):
        train(tiny_dataset, tmp_path / "less", stage="prior", overrides=[*QUICK, "model.tone=false"], start=run)


def test_a_local_network_can_be_added_to_a_flow(tiny_dataset, tiny_run, tmp_path):
    detail = ["prior.detail_width=8", "prior.detail_blocks=1"]
    run = train(tiny_dataset, tmp_path / "run", stage="prior", overrides=[*QUICK, *detail, "prior.lr=1e-12"], start=tiny_run)
    ours, theirs = (tensors(folder, "prior-flow.safetensors") for folder in (run, tiny_run))
    new = set(ours) - set(theirs)
    assert new
    assert all(name.startswith("flow.detail.") for name in new)
    drawn, before = (open_model(folder).draw("flow", 0, 0).latent for folder in (run, tiny_run))
    torch.testing.assert_close(drawn, before, rtol=1e-3, atol=1e-3)  # it begins without effect
    again = train(tiny_dataset, tmp_path / "again", stage="prior", overrides=[*QUICK, "prior.lr=1e-12"], start=run)
    kept = tensors(again, "prior-flow.safetensors")
    assert set(kept) == set(ours)
    name = "flow.detail.blocks.0.conv1.weight"
    torch.testing.assert_close(kept[name], ours[name])
    for other in ("prior.detail_width=16", "prior.detail_width=0", "prior.detail_blocks=2"):
        with pytest.raises(ConfigError, match=rf"{other}: the weights to start from have"):
            train(tiny_dataset, tmp_path / "other", stage="prior", overrides=[*QUICK, other], start=run)


@pytest.mark.parametrize("blocks", ["[0,0]", "[3]", "[3,0]", "deep"])
def test_a_decoder_is_not_shallower_than_its_weights(tiny_dataset, tiny_run, tmp_path, blocks):
    with pytest.raises(ConfigError, match=r"model.decoder_blocks=.*: the weights to start from have \[1, 1\]; as many or more"):
        train(tiny_dataset, tmp_path / "less", overrides=[*QUICK, f"model.decoder_blocks={blocks}"], start=tiny_run)
    assert not (tmp_path / "less").exists()


def test_weights_that_are_missing_are_not_made_up(tiny_dataset, tiny_run, tmp_path):
    """A damaged model to begin from: of a deeper decoder the blocks besides are new, and no others."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run, broken)
    held, meta = load(broken / "autoencoder.safetensors")
    save(broken / "autoencoder.safetensors", {k: v for k, v in held.items() if not k.startswith("decoder.levels.0.0.")}, meta)
    with pytest.raises(ModelError, match=r"weights do not fit config.yaml \(decoder.levels.0.0"):
        train(tiny_dataset, tmp_path / "run", stage="prior", overrides=[*QUICK, "model.decoder_blocks=[3,2]"], start=broken)


def test_sizes_are_the_weights(tiny_dataset, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=r"model.latent_channels=8: the weights to start from have 2"):
        train(tiny_dataset, tmp_path / "a", overrides=[*QUICK, "model.latent_channels=8"], start=tiny_run)
    with pytest.raises(ConfigError, match="that model is wavelet3d, not conv3d"):
        train(tiny_dataset, tmp_path / "b", method="conv3d", start=tiny_run)
    with pytest.raises(ModelError, match="headnek: no such run folder or packaged model, did you mean 'headneck'"):
        train(tiny_dataset, tmp_path / "c", start="headnek")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_conditions_are_taken_over_by_name():
    weight = torch.arange(8.0).view(1, 8)  # values of a b c d, then whether each is given
    told = start._told(weight, ["a", "b", "c", "d"], ["d", "new", "a"])
    assert told.tolist() == [[3.0, 0.0, 0.0, 7.0, 0.0, 4.0]]
    with pytest.raises(ModelError):
        start._told(weight, ["a", "b"], ["a"])
