"""Steps that are not finite: left out as if they had not been, counted, and the end of training when there are too many."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from pathlib import Path

import pytest
import torch

from ctvae.checkpoint import Checkpoints, load
from ctvae.config import Training
from ctvae.errors import TrainingDiverged
from ctvae.ranks import ALONE
from ctvae.runlog import Curve, Run
from ctvae.training import autoencoder, finish, polish, prior
from ctvae.training.groups import TrainingGroups
from ctvae.training.tally import Tally
from ctvae.training.train import train

STEPWISE = (
    "autoencoder.steps=4", "autoencoder.log_every=1", "autoencoder.save_every=1", "polish.steps=3", "polish.log_every=1",
    "polish.save_every=1", "polish.batch=1", "prior.steps=3", "prior.log_every=1", "prior.save_every=1", "finish.steps=3",
    "finish.log_every=1", "finish.save_every=1", "finish.batch=1", "finish.drawn=2", "finish.discriminator_width=4",
    "finish.precision=fp32",
)  # fmt: skip


class Stopped(Exception):
    """The machine went away."""


def tally(most: int = 3, **meta) -> Tally:
    return Tally(Training(max_skipped=most), ALONE, meta)


def told(value: float) -> torch.Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [(1.0, 2.0, True), (math.nan, 2.0, False), (1.0, math.nan, False), (math.inf, 2.0, False), (1.0, -math.inf, False)],
)
def test_a_step_is_taken_if_all_of_it_is_finite(loss, norm, taken):
    assert tally().take({"a": told(0.5), "b": told(loss)}, told(norm), told(1.0)) is taken


def test_means_are_of_the_steps_taken():
    one = tally()
    for value in (1.0, math.nan, 4.0):
        one.take({"loss": told(value)}, told(1.0))
    assert one.means() == {"loss": 2.5}
    one.take({"loss": told(math.inf)}, told(1.0))
    assert math.isnan(one.means()["loss"])
    assert (one.skipped, one.in_a_row) == (2, 1)


def test_a_resumed_count_goes_on():
    one = tally(skipped_steps=5)
    one.take({"loss": told(math.nan)})
    assert one.skipped == 6


def test_too_many_in_a_row_end_it_and_the_good_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, "autoencoder")
    for step in (10, 20, 30):
        (tmp_path / f"autoencoder-{step:08d}.safetensors").touch()
    one = tally()
    for step, loss in enumerate((math.nan, math.nan, 1.0, math.nan, math.nan), start=28):
        one.take({"loss": told(loss)})
        one.check(step, tmp_path, checkpoints, "x.lr=1")
    one.take({"loss": told(math.nan)})  # begun at steps 30, 31 and 32: the weights saved at 30 may be why
    with pytest.raises(TrainingDiverged) as caught:
        one.check(33, tmp_path, checkpoints, "x.lr=1")
    line = str(caught.value)
    assert "not finite in 3 steps in a row, by step 33" in line
    assert f"the last good checkpoint is {tmp_path / 'autoencoder-00000020.safetensors'};" in line
    assert "--set x.lr=1" in line
    with pytest.raises(TrainingDiverged, match="there is no good checkpoint yet"):
        one.check(13, tmp_path, checkpoints, "x.lr=1")


# --- in the loops -----------------------------------------------------------------------------------------------------


def poison(monkeypatch, kind: type, steps: set[int], what: str = "loss") -> None:
    """The steps' loss is NaN; or `gradient`: the loss is as it was, and its gradient is not finite."""
    plain, count = kind.forward, [0]

    def spoilt(value: torch.Tensor) -> torch.Tensor:
        return value * math.nan if what == "loss" else value + (value - value.detach()).sqrt()

    def forward(self, *arguments):
        out = plain(self, *arguments)
        if not torch.is_grad_enabled():  # held out
            return out
        count[0] += 1
        if count[0] - 1 not in steps:
            return out
        if isinstance(out, tuple):  # the decoder's, with its patches
            *decoded, terms = out
            return *decoded, {**terms, "features": spoilt(terms["features"])}
        return {**out, "reconstruction": spoilt(out["reconstruction"])} if isinstance(out, dict) else spoilt(out)

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_left_out_changes_nothing(tiny_dataset, tiny_settings, tmp_path, monkeypatch, what):
    """The last of four steps is spoilt: what is written are the averaged weights after three."""
    quick = [*tiny_settings, *STEPWISE, "polish.enabled=false"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train(tiny_dataset, tmp_path / "three", stage="autoencoder", overrides=quick)
    after_three, _ = load(tmp_path / "three" / "checkpoints" / "autoencoder-00000003.safetensors")
    poison(monkeypatch, autoencoder.Objective, {3}, what)
    run = train(tiny_dataset, tmp_path / "spoilt", stage="autoencoder", overrides=quick)
    written, meta = load(run / "autoencoder.safetensors")
    assert meta["steps"] == 4
    assert all(torch.equal(value, after_three[f"ema.{name}"]) for name, value in written.items())
    assert json.loads((run / "run.json").read_text())["stages"]["autoencoder"]["skipped_steps"] == 1
    assert [row["skipped_steps"] for row in rows(run, "autoencoder")] == ["0", "0", "0", "1"]


def test_a_run_that_left_a_step_out_resumes_bit_equal(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    quick = [*tiny_settings, *STEPWISE, "polish.enabled=false"]
    with monkeypatch.context() as patch:
        poison(patch, autoencoder.Objective, {1})
        whole = train(tiny_dataset, tmp_path / "whole", stage="autoencoder", overrides=quick)
    with monkeypatch.context() as patch:
        poison(patch, autoencoder.Objective, {1})
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=quick)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=quick)
    one, other = (load(folder / "autoencoder.safetensors")[0] for folder in (whole, run))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("step", "loss", "skipped_steps"):
        assert [row[name] for row in rows(run, "autoencoder")] == [row[name] for row in rows(whole, "autoencoder")]
    assert json.loads((run / "run.json").read_text())["stages"]["autoencoder"]["skipped_steps"] == 1


def test_statistics_of_a_step_left_out_are_left_out(tiny_dataset, tmp_path, monkeypatch):
    """BatchNorm's running means see the volumes before the loss does."""
    spoil_second(monkeypatch)
    small = ["model.widths=[2,4,4,8,8,8]", "model.latent_size=8", "autoencoder.steps=3", "autoencoder.log_every=1"]
    small += ["autoencoder.save_every=1", "autoencoder.precision=fp32"]
    run = train(tiny_dataset, tmp_path, method="conv3d", stage="autoencoder", overrides=small)
    written, _ = load(run / "autoencoder.safetensors")
    assert any("running_mean" in name for name in written)
    assert all(value.isfinite().all() for value in written.values())
    assert json.loads((run / "run.json").read_text())["stages"]["autoencoder"]["skipped_steps"] == 1


def test_means_of_texture_leave_a_step_out_as_well(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch):
    """The last stage keeps running means of what it decodes."""
    spoil_second(monkeypatch)
    quick = [*tiny_settings, *STEPWISE, "finish.enabled=true"]
    run = train(tiny_dataset, tmp_path, stage="finish", overrides=quick, start=tiny_run)
    assert [row["skipped_steps"] for row in rows(run, "finish")] == ["0", "1", "1"]
    assert all(math.isfinite(float(row[f"off_{side}"])) for row in rows(run, "finish") for side in ("reconstructed", "drawn"))


def spoil_second(monkeypatch) -> None:
    """The volumes of step 1 are not finite."""
    plain = TrainingGroups.batch

    def batch(self, batch, seed, step):
        return plain(self, batch, seed, step) * (math.nan if step == 1 else 1)

    monkeypatch.setattr(TrainingGroups, "batch", batch)


def test_every_loop_leaves_out_and_ends(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    quick = [*tiny_settings, *STEPWISE, "finish.enabled=true"]
    quick += [f"{stage}.max_skipped=2" for stage in ("autoencoder", "polish", "prior", "finish")]
    run = tmp_path / "run"
    for kind, stage, name in (
        (autoencoder.Objective, "autoencoder", "autoencoder"),
        (polish.DecoderObjective, "polish", "polish"),
        (prior.FlowObjective, "prior", "flow"),
        (finish.FinishObjective, "finish", "finish"),
    ):
        with monkeypatch.context() as patch:
            poison(patch, kind, {1, 2})
            with pytest.raises(TrainingDiverged) as caught:
                train(tiny_dataset, run, overrides=quick)
        good = run / "checkpoints" / f"{name}-00000001.safetensors"
        assert "in 2 steps in a row, by step 3; there is no good checkpoint yet" in str(caught.value)  # step 1 may be why
        assert f"--set {stage}.lr=" in str(caught.value)
        assert Checkpoints(run / "checkpoints", name).paths() == [good]
        assert all(value.isfinite().all() for value in load(good)[0].values())
        with monkeypatch.context() as patch:
            poison(patch, kind, {1})
            last = {"autoencoder": "autoencoder", "polish": "autoencoder", "prior": "prior", "finish": "both"}[stage]
            next_one = {"autoencoder": polish.DecoderObjective, "polish": prior.FlowObjective}.get(stage)
            if next_one is not None:
                stop_before(patch, next_one)
            with contextlib.suppress(Stopped):
                train(tiny_dataset, run, stage=last, overrides=quick)
        assert json.loads((run / "run.json").read_text())["stages"][stage]["skipped_steps"] == 1


def stop_at(monkeypatch, at: int) -> None:
    plain = TrainingGroups.batch

    def stopping(self, batch, seed, step):
        if step == at:
            raise Stopped
        return plain(self, batch, seed, step)

    monkeypatch.setattr(TrainingGroups, "batch", stopping)


def stop_before(monkeypatch, kind: type) -> None:
    def never(*_):
        raise Stopped

    monkeypatch.setattr(kind, "forward", never)


def rows(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "logs" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_curve_that_an_earlier_version_began_keeps_its_columns(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "flow.csv").write_text("step,loss,lr\n2,1.5,0.1\n4,1.4,0.1\n")
    curve = Curve(Run(tmp_path), "flow", resumed_at=2)
    curve.log(4, {"loss": 1.25, "lr": 0.1, "skipped_steps": 3})
    curve.close()
    assert (tmp_path / "logs" / "flow.csv").read_text().split() == ["step,loss,lr", "2,1.5,0.1", "4,1.25,0.1"]
