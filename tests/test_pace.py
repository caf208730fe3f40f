"""What a training has time for: a decoder is sharpened where its autoencoder has had steps enough, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctvae import planner
from ctvae.config import Config, load_config, load_recipe
from ctvae.errors import ConfigError
from ctvae.training import pace, settings
from ctvae.training.train import train

OFF = ["polish.enabled=false", "finish.enabled=false"]


@pytest.fixture
def one_second(monkeypatch) -> None:
    """A step of the autoencoder takes as long, so 1000 steps of it take a quarter of an hour and 100 s."""
    monkeypatch.setattr(pace, "autoencoder_step_seconds", lambda _: 1.0)


def recipe(*overrides: str) -> Config:
    return load_recipe("wavelet3d", ["data.shape=[64,64,64]", *overrides])


@pytest.mark.parametrize(
    ("stage", "minutes", "found"),
    [
        ("both", 6, OFF),
        ("both", 63, OFF),  # 0.3 of 1.15 of them: 986 steps
        ("both", 64.5, []),  # 1010
        ("autoencoder", 23, OFF[:1]),  # 0.3 of 0.42: 986
        ("autoencoder", 24, []),  # 1029
        ("prior", 1, []),
        ("finish", 1, []),
    ],
)
@pytest.mark.usefixtures("one_second")
def test_a_decoder_of_few_steps_is_not_sharpened(stage, minutes, found):
    assert pace.without_sharpening(recipe(), minutes, stage) == found


@pytest.mark.usefixtures("one_second")
def test_what_is_not_wanted_is_not_left_out():
    assert pace.without_sharpening(recipe(OFF[1]), 1) == OFF[:1]
    assert pace.without_sharpening(recipe(*OFF), 1) == []
    assert pace.without_sharpening(load_recipe("slice2d", ["data.shape=[64,64,64]"]), 1) == []


def test_all_of_the_time_is_shared():
    """Spatial latents leave most to learn to the prior, a decoder that is not sharpened leaves it half."""
    for cfg in (recipe(), recipe(*OFF), load_recipe("slice2d")):
        assert sum(pace.shares(cfg, "both").values()) == pytest.approx(1)
    assert pace.shares(recipe(*OFF), "both") == {"autoencoder": 0.5, "prior": 0.5}
    assert pace.shares(load_recipe("slice2d"), "both") == {"autoencoder": 0.8, "prior": 0.2}


@pytest.fixture
def free(tiny_settings) -> tuple[str, ...]:
    """What a tiny training needs, the recipe's sharpening left as it is."""
    return tuple(text for text in tiny_settings if text.partition("=")[0] not in ("polish.enabled", "finish.enabled"))


def planned(run: Path) -> list[str]:
    return json.loads((run / "run.json").read_text())["planned"]


@pytest.mark.usefixtures("one_second")
def test_a_short_training_says_so_and_stays_as_it_was_begun(tiny_dataset, free, tmp_path, capsys):
    run = train(tiny_dataset, tmp_path / "run", overrides=free, minutes=20)
    assert "plan: 20 minutes are too few to sharpen the decoder" in capsys.readouterr().err
    assert [text for text in planned(run) if "enabled" in text] == OFF
    cfg = load_config(run / "config.yaml")
    assert not cfg.polish.enabled
    assert not cfg.finish.enabled
    assert "polish" not in json.loads((run / "run.json").read_text())["stages"]
    train(tiny_dataset, run, overrides=free, minutes=500)  # begun without: that is how it ends
    assert load_config(run / "config.yaml") == cfg
    assert "too few" not in capsys.readouterr().err


@pytest.mark.usefixtures("one_second")
def test_what_somebody_set_or_began_is_left_alone(tiny_dataset, tiny_run, tiny_settings, tmp_path, capsys):
    asked = train(tiny_dataset, tmp_path / "asked", stage="autoencoder", overrides=tiny_settings, minutes=5)
    assert load_config(asked / "config.yaml").polish.enabled
    train(tiny_dataset, tiny_run, overrides=tiny_settings, minutes=5)
    assert load_config(tiny_run / "config.yaml").polish.enabled
    assert "too few" not in capsys.readouterr().err
    of_a_model = settings.Asked(start=tiny_run)
    settled = settings.Settled(recipe())
    assert settings.for_minutes(settled, 5, "both", of_a_model) is settled


@pytest.mark.usefixtures("one_second")
def test_a_plan_for_few_hours_leaves_it_out_too(monkeypatch):
    monkeypatch.setattr(pace, "prior_step_seconds", lambda _: 2.0)
    found = planner.weigh("wavelet3d", planner.Source((64, 64, 64)), 24)
    short = planner.with_hours(found, 0.5)
    assert {"polish.enabled=false", "finish.enabled=false", "autoencoder.steps=900", "prior.steps=450"} <= set(short.overrides)
    long = load_recipe("wavelet3d", planner.with_hours(found, 10).overrides)
    assert long.polish.enabled
    assert long.finish.minutes == pytest.approx(600 * 0.15 / 1.15, rel=1e-3)


@pytest.mark.parametrize("stage", ["finish", "calibration"])
def test_a_stage_that_the_settings_leave_out_is_refused(stage, tiny_dataset, tiny_run, tiny_settings):
    before = (tiny_run / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"^{stage}: these settings have none \({stage}\.enabled=false\); begin another run"):
        train(tiny_dataset, tiny_run, stage=stage, overrides=tiny_settings)
    assert (tiny_run / "run.json").read_bytes() == before
