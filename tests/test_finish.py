"""The decoder on drawn latents: what moves and what does not, resuming, what it is trained on, what is refused."""

from __future__ import annotations

import pytest
import torch

from ctvae.checkpoint import Checkpoints, load
from ctvae.config import load_config, load_recipe
from ctvae.errors import ConfigError, ModelError
from ctvae.generate import load as load_model
from ctvae.training import finish
from ctvae.training.drawn import SEED, DrawnLatents
from ctvae.training.train import train


class Stopped(Exception):
    pass


def weights(run) -> dict[str, torch.Tensor]:
    return load(run / "autoencoder.safetensors")[0]


@pytest.fixture(scope="module")
def stopped_run(tiny_dataset, tiny_settings, tmp_path_factory):
    """Stopped at step 3 of the finish."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    calls = 0
    plain = finish.FinishObjective.forward

    def stopping(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stopped
        return plain(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish.FinishObjective, "forward", stopping)
        with pytest.raises(Stopped):
            train(tiny_dataset, run, overrides=tiny_settings)
    return run


def test_a_resumed_finish_is_bit_equal_and_leaves_encoder_and_prior(stopped_run, tiny_dataset, tiny_run, tiny_settings):
    assert [path.stem for path in Checkpoints(stopped_run / "checkpoints", "finish").paths()] == ["finish-00000002"]
    before = weights(stopped_run)
    flow = load(stopped_run / "prior-flow.safetensors")[0]
    train(tiny_dataset, stopped_run, overrides=tiny_settings)
    after = weights(stopped_run)
    assert all(torch.equal(value, weights(tiny_run)[name]) for name, value in after.items())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)
    assert all(torch.equal(value, flow[name]) for name, value in load(stopped_run / "prior-flow.safetensors")[0].items())
    assert not (stopped_run / "drawn").exists()  # it is of no more use


def test_crops_are_of_the_flows_samples_and_a_function_of_the_step(tiny_run, tmp_path):
    model, cfg = load_model(tiny_run), load_config(tiny_run / "config.yaml")
    samples = DrawnLatents(tmp_path / "drawn", cfg, cfg.model.grid)
    samples.draw(model)
    crops = samples.batch(3, (16, 8, 12), seed=0, step=5)
    assert crops.shape == (3, 2, 4, 2, 3)
    assert torch.equal(crops, samples.batch(3, (16, 8, 12), seed=0, step=5))
    assert not torch.equal(crops, samples.batch(3, (16, 8, 12), seed=0, step=6))
    whole = samples.batch(2, (64, 32, 32), seed=0, step=0)
    drawn = [model.draw("flow", SEED, index).latent[0].half().float() for index in range(2)]
    assert all(any(torch.equal(row, one) for one in drawn) for row in whole)


def test_it_needs_a_prior(tiny_dataset, tiny_settings, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=tiny_settings)
    with pytest.raises(ModelError, match="has no trained prior yet"):
        train(tiny_dataset, run, stage="finish", overrides=tiny_settings)


def test_another_models_decoder_is_finished_with_its_own_prior(tiny_dataset, tiny_run, tmp_path):
    few = ["finish.enabled=true", "finish.steps=2", "finish.log_every=2", "finish.save_every=2", "finish.precision=fp32"]
    few += ["finish.drawn=1", "finish.discriminator_width=4", "data.patch=null", "prior.rank=2", "prior.sampling_steps=2"]
    run = train(tiny_dataset, tmp_path / "run", stage="finish", overrides=few, start=tiny_run)
    assert not all(torch.equal(value, weights(tiny_run)[name]) for name, value in weights(run).items())
    assert load(run / "autoencoder.safetensors")[1]["finish_steps"] == 2


def test_vector_latents_have_no_finish():
    with pytest.raises(ConfigError, match=r"finish\.enabled: conv3d has no spatial latents"):
        load_recipe("conv3d", ["finish.enabled=true"])
