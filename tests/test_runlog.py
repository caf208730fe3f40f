"""The run folder refuses what does not belong to it; the clock's learning rate against its formula."""

from __future__ import annotations

import csv
import math

import pytest

from ctvae import runlog
from ctvae.config import Config, Training, load_config, load_recipe
from ctvae.errors import ConfigError, CtvaeError, InputError, ModelError
from ctvae.files import occupied
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.train import train


@pytest.fixture
def cfg() -> Config:
    return load_recipe("wavelet3d", ["model.widths=[8,16]"])


def line(error: pytest.ExceptionInfo[CtvaeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(cfg: Config, section: str, **values) -> Config:
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


def test_a_new_run_writes_its_settings(tmp_path, cfg):
    run = Run.create_or_resume(tmp_path / "a" / "run", cfg, "f00d")
    assert load_config(run.config_path) == cfg
    assert run.state["dataset"] == "f00d"
    assert not run.stage_done("autoencoder")


def test_the_same_settings_resume(tmp_path, cfg):
    Run.create_or_resume(tmp_path, cfg, "f00d").finish_stage("autoencoder", steps=7)
    again = Run.create_or_resume(tmp_path, cfg, "f00d")
    assert again.stage_done("autoencoder")
    assert not again.stage_done("prior")
    again.finish_stage("prior", loss=0.5)
    assert again.state["stages"] == {"autoencoder": {"steps": 7}, "prior": {"loss": 0.5}}


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("autoencoder", {"lr": 0.1}, "autoencoder.lr: 0.0006 there, 0.1 now"),
        ("model", {"latent_channels": 5}, "model.latent_channels: 4 there, 5 now"),
        ("data", {"window_hu": (-50.0, 200.0)}, "data.window_hu: [-1000.0, 1000.0] there, [-50.0, 200.0] now"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, cfg, section, values, told):
    Run.create_or_resume(tmp_path, cfg, "f00d")
    with pytest.raises(ConfigError) as error:
        Run.create_or_resume(tmp_path, changed(cfg, section, **values), "f00d")
    assert told in line(error)
    assert load_config(tmp_path / "config.yaml") == cfg


def test_another_method_is_refused(tmp_path, cfg):
    Run.create_or_resume(tmp_path, cfg, "f00d")
    with pytest.raises(ConfigError) as error:
        Run.create_or_resume(tmp_path, load_recipe("slice2d"), "f00d")
    assert "more)" in line(error)  # many keys differ: three are shown


def test_other_minutes_are_the_same_run(tmp_path, cfg):
    Run.create_or_resume(tmp_path, changed(cfg, "autoencoder", minutes=2.0), "f00d")
    Run.create_or_resume(tmp_path, changed(cfg, "prior", minutes=3.0), "f00d").finish_stage("autoencoder")
    assert Run(tmp_path).stage_done("autoencoder")


def test_another_dataset_is_refused(tmp_path, cfg):
    Run.create_or_resume(tmp_path, cfg, "f00d")
    with pytest.raises(ConfigError, match="was begun on another dataset; choose another --out"):
        Run.create_or_resume(tmp_path, cfg, "beef")


def test_a_folder_of_something_else_is_refused(tmp_path, cfg):
    (tmp_path / "thesis.docx").write_text("")
    with pytest.raises(InputError, match="neither empty nor a ctvae run"):
        Run.create_or_resume(tmp_path, cfg, "f00d")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_file_is_refused(tmp_path, cfg):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file; --out names a folder"):
        Run.create_or_resume(tmp_path / "run", cfg, "f00d")


def test_a_run_stopped_between_its_first_two_files_is_made_again(tmp_path, cfg):
    Run.create_or_resume(tmp_path, cfg, "f00d").config_path.unlink()
    assert load_config(Run.create_or_resume(tmp_path, cfg, "f00d").config_path) == cfg


def test_a_damaged_run_json_is_one_line(tmp_path, cfg):
    run = Run.create_or_resume(tmp_path, cfg, "f00d")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ModelError, match=r"run\.json is missing or damaged") as error:
        run.stage_done("prior")
    assert line(error)


def test_warm_up_then_half_a_cosine():
    clock = Clock(Training(lr=0.1, warmup=4), steps=100, minutes=None)
    rates = [clock.lr(step, clock.progress(step)) for step in range(101)]
    warm = [(step + 1) / 4 for step in range(4)]
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.1 * (warm[step] if step < 4 else 1.0) * cosine[step])
    assert rates[50] == pytest.approx(0.1 * 0.505)
    assert rates[100] == pytest.approx(0.1 * 0.01)


def test_few_minutes_are_not_spent_on_warming_up():
    clock = Clock(Training(lr=0.1, warmup=1000, decay="none"), steps=10_000, minutes=1.0)
    assert [clock.lr(7, progress) for progress in (0.0, 0.05, 0.1, 0.5)] == pytest.approx([0.0008, 0.05, 0.1, 0.1])


def test_without_decay_the_rate_stays():
    clock = Clock(Training(lr=0.1, warmup=2, decay="none"), steps=10, minutes=None)
    assert [clock.lr(step, clock.progress(step)) for step in range(10)] == pytest.approx([0.05] + [0.1] * 9)


@pytest.fixture
def at(monkeypatch):
    """`at(seconds)` sets the time."""

    def set_to(seconds: float) -> None:
        monkeypatch.setattr(runlog.time, "monotonic", lambda: seconds)

    set_to(1000.0)
    return set_to


def test_without_minutes_the_clock_does_not_count(at):
    clock = Clock(Training(), steps=10, minutes=None)
    at(9e9)
    assert [clock.progress(step) for step in (0, 5, 10, 11)] == [0.0, 0.5, 1.0, 1.0]


def test_minutes_end_the_work_first(at):
    clock = Clock(Training(), steps=1000, minutes=2.0)
    at(1030.0)
    assert clock.progress(10) == pytest.approx(0.25)
    assert clock.seconds_left(10, 0) == pytest.approx(90.0)  # at 3 s a step the steps would take 2970 s
    at(1121.0)
    assert clock.progress(40) == 1.0
    assert clock.seconds_left(40, 0) == 0.0


def test_steps_end_the_work_first(at):
    clock = Clock(Training(), steps=10, minutes=60.0)
    at(1005.0)
    assert clock.progress(5) == pytest.approx(0.5)
    assert clock.seconds_left(5, 0) == pytest.approx(5.0)


def test_seconds_go_on_over_sessions(at):
    clock = Clock(Training(), steps=1000, minutes=1.0, seconds_before=45.0)
    assert clock.progress(0) == pytest.approx(0.75)
    at(1012.0)
    assert clock.seconds == pytest.approx(57.0)


def rows(run: Run, name: str) -> list[dict[str, str]]:
    with (run.folder / "logs" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(run: Run, steps: range, resumed_at: int, loss: float) -> None:
    curve = Curve(run, "net", resumed_at)
    for step in steps:
        curve.log(step, {"loss": loss, "lr": 0.5})
    curve.close()


def test_a_resumed_curve_drops_what_is_done_again(tmp_path):
    run = Run(tmp_path)
    logged(run, range(2, 9, 2), 0, loss=1.0)
    logged(run, range(6, 11, 2), 4, loss=2.0)
    assert [(row["step"], row["loss"], row["lr"]) for row in rows(run, "net")] == [
        ("2", "1", "0.5"), ("4", "1", "0.5"), ("6", "2", "0.5"), ("8", "2", "0.5"), ("10", "2", "0.5"),
    ]  # fmt: skip


def test_a_curve_cut_off_before_its_first_line_begins_again(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "net.csv").write_text("")
    logged(run, range(2, 5, 2), 0, loss=1.0)
    assert [row["step"] for row in rows(run, "net")] == ["2", "4"]


@pytest.mark.parametrize("kept", range(1, 24))
def test_a_curve_cut_off_anywhere_goes_on_with_its_whole_lines(tmp_path, kept):
    """As by a full disk: `step,loss,lr`, then `2,1,0.5` and `14,1,0.5`; cut after its first digit the last would be step 1."""
    run = Run(tmp_path)
    logged(run, range(2, 15, 12), 0, loss=1.0)
    path = tmp_path / "logs" / "net.csv"
    path.write_bytes(path.read_bytes()[:kept])
    logged(run, range(14, 16, 2), 13, loss=2.0)
    found = [(row["step"], row["loss"], row["lr"]) for row in rows(run, "net")]
    assert found == [("2", "1", "0.5")] * (kept > 21) + [("14", "2", "0.5")]


def test_the_curve_is_in_tensorboards_format_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(Run(tmp_path), range(2, 7, 2), 0, loss=0.25)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("net/loss")] == [(2, 0.25), (4, 0.25), (6, 0.25)]


def test_a_run_that_another_process_trains_is_refused(tiny_dataset, tiny_run, tiny_settings):
    with occupied(tiny_run, "ctvae train"), pytest.raises(InputError, match="another `ctvae train` is at work in it"):
        train(tiny_dataset, tiny_run, overrides=tiny_settings)
