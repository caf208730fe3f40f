"""Training in one go against training that was stopped and resumed, bit for bit; what is refused."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from ctvae import runlog
from ctvae.checkpoint import Checkpoints, load
from ctvae.config import load_config, load_recipe
from ctvae.device import deterministic, generator
from ctvae.errors import ConfigError, ModelError, TrainingDiverged
from ctvae.latents import LatentCode, LatentSet
from ctvae.model import open_model
from ctvae.models import build
from ctvae.training import autoencoder, polish, prior
from ctvae.training.groups import TrainingGroups
from ctvae.training.train import train

SHAPE = (64, 32, 32)


class Stopped(Exception):
    """The machine went away."""


def stop_at(monkeypatch, at: int) -> list[int]:
    """Raise at step `at` of the autoencoder; returns the list of the steps whose batch was asked for."""
    asked: list[int] = []
    plain = TrainingGroups.batch

    def stopping(self, batch, seed, step):
        if seed == 0:  # the polish draws from the next seed
            asked.append(step)
            if step == at:
                raise Stopped
        return plain(self, batch, seed, step)

    monkeypatch.setattr(TrainingGroups, "batch", stopping)
    return asked


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished run."""
    files = sorted([*run.glob("*.safetensors"), *run.glob("latents*/*.safetensors")])
    assert len(files) >= 6  # autoencoder, latents of two splits, four priors, less what is not there
    return {f"{path.relative_to(run)}/{name}": value for path in files for name, value in load(path)[0].items()}


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert different == []


def losses(run: Path, name: str) -> list[tuple[str, str]]:
    with (run / "logs" / f"{name}.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_resumed_autoencoder_is_bit_equal(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            train(tiny_dataset, tmp_path, overrides=tiny_settings)
    assert [path.stem for path in Checkpoints(tmp_path / "checkpoints", "autoencoder").paths()] == [
        "autoencoder-00000002", "autoencoder-00000004",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        asked = stop_at(patch, -1)
        train(tiny_dataset, tmp_path, overrides=tiny_settings)
    assert asked == [4, 5]  # what was done is not done again
    assert_same_weights(tmp_path, tiny_run)
    assert losses(tmp_path, "autoencoder") == losses(tiny_run, "autoencoder")


def test_a_resumed_flow_is_bit_equal(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    begun(tiny_run, run)
    with monkeypatch.context() as patch:
        stop_in_flow(patch, 7)
        with pytest.raises(Stopped):
            train(tiny_dataset, run, overrides=tiny_settings)
    with monkeypatch.context() as patch:
        asked = stop_in_flow(patch, -1)
        train(tiny_dataset, run, overrides=tiny_settings)
    assert asked == [6, 7, 8]
    assert_same_weights(run, tiny_run)
    assert losses(run, "flow") == losses(tiny_run, "flow")


def test_a_resumed_polish_is_bit_equal_and_leaves_the_encoder(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_polish(patch, 3)
        with pytest.raises(Stopped):
            train(tiny_dataset, run, overrides=tiny_settings)
    before = load(run / "autoencoder.safetensors")[0]
    assert [path.stem for path in Checkpoints(run / "checkpoints", "polish").paths()] == ["polish-00000002"]
    train(tiny_dataset, run, overrides=tiny_settings)
    assert_same_weights(run, tiny_run)
    assert losses(run, "polish") == losses(tiny_run, "polish")
    after = load(run / "autoencoder.safetensors")[0]
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def stop_in_polish(monkeypatch, at: int) -> None:
    plain = polish.DecoderObjective.forward

    def stopping(self, x, random):
        if random.initial_seed() == generator(1, at).initial_seed():
            raise Stopped
        return plain(self, x, random)

    monkeypatch.setattr(polish.DecoderObjective, "forward", stopping)


def begun(finished: Path, run: Path) -> None:
    """A copy of a finished run as it was before its prior."""
    shutil.copytree(finished, run)
    for path in [*run.glob("prior-*"), *run.glob("latents*/*"), *run.glob("logs/*")]:
        path.unlink()
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"prior"', '"was prior"'))


def stop_in_flow(monkeypatch, at: int) -> list[int]:
    """Raise at step `at` of the flow; returns the list of the steps of its training batches."""
    asked: list[int] = []
    plain = prior.flow_batches

    def wrapped(*arguments):
        make = plain(*arguments)

        def stopping(latents, step):
            if len(set(latents.groups)) < len(latents):  # the held-out ones have one encoding each
                asked.append(step)
                if step == at:
                    raise Stopped
            return make(latents, step)

        return stopping

    monkeypatch.setattr(prior, "flow_batches", wrapped)
    return asked


def test_a_finished_run_is_left_alone(tiny_dataset, tiny_run, tiny_settings, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(TrainingGroups, "batch", never)
    monkeypatch.setattr(LatentSet, "batch", never)
    before = stamps(tiny_run)
    assert train(tiny_dataset, tiny_run, overrides=tiny_settings) == tiny_run
    assert train(tiny_dataset, tiny_run, overrides=tiny_settings, minutes=1.0) == tiny_run
    assert stamps(tiny_run) == before


def test_a_finished_run_holds_what_the_formats_page_says(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert {"config.yaml", "run.json", "autoencoder.safetensors", "latents", "logs", "previews"} <= names
    assert {f"prior-{name}.safetensors" for name in ("flow", "normal", "gaussian", "mixture")} <= names
    assert list((tiny_run / "checkpoints").iterdir()) == []
    _, meta = load(tiny_run / "autoencoder.safetensors")
    assert (tuple(meta["shape"]), meta["steps"]) == (SHAPE, 6)
    assert meta["config"] == load_config(tiny_run / "config.yaml").model_dump(mode="json")


def test_the_stored_code_standardises_the_stored_latents(tiny_run):
    tensors, _ = load(tiny_run / "prior-flow.safetensors")
    fitted = LatentCode.fit(LatentSet.load(tiny_run / "latents"))
    for name in ("shift", "scale"):
        assert torch.equal(tensors[f"code.{name}"], fitted.tensors[name])


def test_the_stored_flow_starts_from_the_moments_of_posterior_samples(tiny_run):
    """Mean and variance of every number, against those of many samples."""
    tensors, meta = load(tiny_run / "prior-flow.safetensors")
    latents = LatentSet.load(tiny_run / "latents")
    random = torch.Generator().manual_seed(0)
    code = LatentCode.fit(latents)
    draws = torch.cat([code.encode(latents.posterior_sample(list(range(len(latents))), random)) for _ in range(200)]).flatten(1)
    variance = tensors["flow.factors"].square().sum(0) + tensors["flow.rest"]
    torch.testing.assert_close(tensors["flow.mean"], draws.mean(0), rtol=0, atol=0.15)
    bessel = len(latents) / (len(latents) - 1)
    assert (variance.sum() / draws.var(0).sum()).item() == pytest.approx(bessel, rel=0.1)
    assert {name.partition(".")[0] for name in tensors} == {"flow", "code", "conditions"}
    model = open_model(tiny_run)
    drawn = [model.draw("flow", seed=0, index=index).latent for index in (0, 0, 1)]
    assert drawn[0].shape == (1, *meta["latent_shape"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_stages_apart_are_the_stages_together(tiny_dataset, tiny_run, tiny_settings, tmp_path):
    train(tiny_dataset, tmp_path, stage="autoencoder", overrides=tiny_settings)
    assert not list(tmp_path.glob("prior-*"))
    train(tiny_dataset, tmp_path, stage="prior", overrides=tiny_settings)
    assert_same_weights(tmp_path, tiny_run)


def test_another_seed_is_another_network(tiny_dataset, tiny_run, tiny_settings, tmp_path):
    train(tiny_dataset, tmp_path, stage="autoencoder", overrides=[*tiny_settings, "seed=1", "autoencoder.steps=1"])
    name = "encoder.entries.0.weight"
    first, second = (load(run / "autoencoder.safetensors")[0][name] for run in (tmp_path, tiny_run))
    assert not torch.equal(first, second)


def test_minutes_end_a_run_before_its_steps(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(runlog.Clock, "seconds", property(lambda clock: 0.1 * next(ticks)))
    long = [*tiny_settings, "autoencoder.steps=100000"]
    run = train(tiny_dataset, tmp_path, stage="autoencoder", overrides=long, minutes=0.01)  # six ticks
    assert 2 <= load(run / "autoencoder.safetensors")[1]["steps"] <= 6


def refused(error: type[Exception], *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_settings_are_refused_by_name(tiny_dataset, tiny_run, tiny_settings):
    line = refused(ConfigError, tiny_dataset, tiny_run, overrides=[*tiny_settings, "autoencoder.lr=0.5"])
    assert "autoencoder.lr: 0.0006 there, 0.5 now" in line


def test_wrong_arguments_are_named(tiny_dataset, tmp_path):
    out = tmp_path / "run"
    assert "unknown stage 'piror'" in refused(ConfigError, tiny_dataset, out, stage="piror")
    assert "minutes -1" in refused(ConfigError, tiny_dataset, out, minutes=-1)
    assert "minutes 0" in refused(ConfigError, tiny_dataset, out, minutes=0)
    assert "did you mean 'wavelet3d'?" in refused(ConfigError, tiny_dataset, out, method="wavelet")
    assert not out.exists()


def test_a_prior_needs_its_autoencoder(tiny_dataset, tiny_settings, tmp_path):
    line = refused(ModelError, tiny_dataset, tmp_path, stage="prior", overrides=tiny_settings)
    assert "no trained autoencoder yet" in line


def test_divergence_is_told_and_never_saved(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    plain = autoencoder.Objective.forward

    def poisoned(self, x, random):
        terms = plain(self, x, random)
        return {**terms, "kl": terms["kl"] * (float("nan") if random.initial_seed() >= 3 * 31 else 1.0)}

    monkeypatch.setattr(autoencoder.Objective, "forward", poisoned)  # from step 3 on
    line = refused(TrainingDiverged, tiny_dataset, tmp_path, overrides=[*tiny_settings, "autoencoder.max_skipped=2"])
    assert "not finite in 2 steps in a row, by step 5" in line
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'autoencoder-00000002.safetensors'};" in line
    assert "--set autoencoder.lr=0.0002" in line
    saved = Checkpoints(tmp_path / "checkpoints", "autoencoder").paths()
    assert [path.stem for path in saved] == ["autoencoder-00000002"]
    assert all(value.isfinite().all() for value in load(saved[0])[0].values())


def test_deterministic_training(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    """All stages run on algorithms that PyTorch calls deterministic; on a CPU these are the usual ones."""
    seen: list[bool] = []
    for kind in (autoencoder.Objective, polish.DecoderObjective, prior.FlowObjective):
        monkeypatch.setattr(kind, "forward", noting(kind.forward, seen))
    run = train(tiny_dataset, tmp_path, overrides=[*tiny_settings, "deterministic=true"])
    assert len(seen) >= 6 + 4 + 9
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_weights(run, tiny_run)
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))  # an algorithm that is not


def noting(forward, seen: list[bool]):
    def noted(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(*arguments)

    return noted


def test_the_kl_warms_up():
    cfg = load_recipe("wavelet3d", ["model.widths=[4,4]", "model.latent_channels=2", "autoencoder.kl_warmup=0.5"])
    objective = autoencoder.Objective(build(cfg.model, (8, 8, 8)), cfg.autoencoder, cfg.data.window_hu)
    x, weights = torch.zeros(1, 1, 8, 8, 8), []
    for progress in (0.0, 0.25, 0.5, 1.0):
        objective.warm(progress)
        weights.append(objective(x, generator(0, 0))["kl"].item())
    whole = weights[-1]
    assert whole > 0
    assert weights == pytest.approx([0, whole / 2, whole, whole])
