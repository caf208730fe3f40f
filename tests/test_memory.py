"""Training that runs out of memory against training that did not; plans that `train` makes, takes and resumes with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctvae import __main__, planner
from ctvae.checkpoint import Checkpoints, load
from ctvae.config import load_config, load_recipe
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError, DoesNotFit
from ctvae.model import open_model
from ctvae.training import autoencoder, memory, pace, polish, prior, settings
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import MemoryRanOut, is_allocation_failure, kept_when_memory_runs_out
from ctvae.training.train import train

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def weights(run: Path, name: str = "autoencoder") -> dict[str, torch.Tensor]:
    return load(run / f"{name}.safetensors")[0]


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0)


def steps_asked(monkeypatch) -> list[int]:
    asked: list[int] = []
    plain = TrainingGroups.batch

    def noting(self, batch, seed, step):
        if seed == 0:  # the polish has seed + 1
            asked.append(step)
        return plain(self, batch, seed, step)

    monkeypatch.setattr(TrainingGroups, "batch", noting)
    return asked


def failing_forward(monkeypatch, fails) -> None:
    """The objective's forward pass fails as PyTorch's CPU allocator does where `fails(settings, step)`."""
    plain = autoencoder.Objective.forward

    def forward(self, x, random):
        terms = plain(self, x, random)
        if fails(self, random.initial_seed() // 31):
            raise RuntimeError(CPU_MESSAGE)
        return terms

    monkeypatch.setattr(autoencoder.Objective, "forward", forward)


# --- a failed allocation


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError(CPU_MESSAGE), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_an_allocation_failure(error, is_one):
    assert is_allocation_failure(error) is is_one


def test_a_real_one_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_allocation_failure(caught.value)


def test_the_step_is_repeated_with_the_next_smaller_plan_and_nothing_is_lost(
    tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch, capsys
):
    """Fails at step 3 until it is checkpointed, which changes no number: the weights are those of a run that did not fail."""
    with monkeypatch.context() as patch:
        asked = steps_asked(patch)
        failing_forward(patch, lambda objective, step: step == 3 and not objective.network.cfg.checkpointing)
        run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=tiny_settings)
    assert asked == [0, 1, 2, 3, 3, 4, 5]
    assert_close(weights(run), weights(tiny_run), 1e-6)
    assert "memory ran out at step 3 of the autoencoder: going on from there with checkpointing" in capsys.readouterr().err
    assert load_config(run / "config.yaml").model.checkpointing
    with monkeypatch.context() as patch:
        assert steps_asked(patch) == []
        train(tiny_dataset, run, stage="autoencoder", overrides=tiny_settings)  # the same command resumes with the smaller plan
    assert open_model(run).cfg.model.checkpointing


def test_a_batch_is_halved_and_made_up_for(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    """Fails on three volumes at a time: 1 x 3 from step 2 on visits the same groups; without augmentation, the same numbers."""
    free = [text for text in tiny_settings if not text.startswith("autoencoder.batch")]
    still = [*free, "data.max_shift_voxels=[0,0,0]", "autoencoder.kl_weight=0", "polish.enabled=false"]
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.zeros(*shape))  # the posterior's noise differs by batch
    plain = train(tiny_dataset, tmp_path / "plain", stage="autoencoder", overrides=[*still, "autoencoder.batch=3"])
    failing_forward(monkeypatch, lambda objective, step: step == 2 and objective.cfg.batch == 3)
    asked = steps_asked(monkeypatch)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=still)
    assert asked == [0, 1, 2, *range(6, 18)]
    saved = load_config(run / "config.yaml").autoencoder
    assert (saved.batch, saved.accumulate) == (1, 3)
    assert_close(weights(run), weights(plain), 1e-4)


def test_the_polish_goes_on_with_less(tiny_dataset, tiny_settings, tmp_path, monkeypatch, capsys):
    """The recipe's batch of three fails at step 1, and a first one of 1 x 3 at step 2, which is then checkpointed."""
    seen: list[tuple[int, bool]] = []
    plain = polish.DecoderObjective.forward

    def forward(self, x, random):
        seen.append((len(x), self.network.cfg.checkpointing))
        if len(seen) in (2, 6):
            raise MemoryError
        return plain(self, x, random)

    monkeypatch.setattr(polish.DecoderObjective, "forward", forward)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=tiny_settings)
    assert seen == [(3, False)] * 2 + [(1, False)] * 4 + [(1, True)] * 6
    told = [line for line in capsys.readouterr().err.splitlines() if "memory ran out" in line]
    assert [line.removeprefix("memory ran out at ") for line in told] == [
        "step 1 of the polish: going on from there with a batch of 1",
        "step 2 of the polish: going on from there with checkpointing",
    ]
    saved = load_config(run / "config.yaml")
    assert (saved.polish.batch, saved.polish.accumulate, saved.model.checkpointing) == (1, 3, True)
    assert load(run / "autoencoder.safetensors")[1]["polish_steps"] == 4
    train(tiny_dataset, run, stage="autoencoder", overrides=tiny_settings)  # the same command finds it done
    assert len(seen) == 12


def test_the_priors_batch_is_halved(tiny_dataset, tiny_run, tiny_settings, tmp_path, monkeypatch, capsys):
    free = [text for text in tiny_settings if not text.startswith("prior.batch")]
    plain = prior.FlowObjective.forward

    def forward(self, batch, random):
        if len(batch.mean) > 2:
            raise MemoryError
        return plain(self, batch, random)

    monkeypatch.setattr(prior.FlowObjective, "forward", forward)
    run = train(tiny_dataset, tmp_path / "run", overrides=free)
    saved = load_config(run / "config.yaml").prior
    assert (saved.batch, saved.accumulate) == (2, 4)
    told = [line for line in capsys.readouterr().err.splitlines() if "memory ran out" in line]
    assert [line.rpartition("with ")[2] for line in told] == ["a batch of 4", "a batch of 2"]
    assert open_model(run).draw("flow", seed=0, index=0).latent.isfinite().all()


def test_where_nothing_is_smaller_it_says_so_and_keeps_the_state(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    failing_forward(monkeypatch, lambda objective, step: step == 1)
    pinned = [*tiny_settings, "model.checkpointing=false", "data.patch=null"]
    with pytest.raises(DoesNotFit, match="memory ran out at step 1, and no plan is smaller; the state is saved"):
        train(tiny_dataset, tmp_path, stage="autoencoder", overrides=pinned)
    saved = Checkpoints(tmp_path / "checkpoints", "autoencoder").paths()
    assert [path.stem for path in saved] == ["autoencoder-00000001"]


def test_an_update_that_fails_half_way_is_not_kept():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer, kept = torch.optim.SGD([parameter], lr=1.0), []

    def fail_in_the_update(*_: object) -> None:
        raise MemoryError

    with kept_when_memory_runs_out(optimizer, lambda: 7, lambda: kept.append(7)):
        optimizer.step()

    def failing_step() -> None:
        with kept_when_memory_runs_out(optimizer, lambda: 7, lambda: kept.append(7)):
            optimizer.register_step_pre_hook(fail_in_the_update)
            optimizer.step()

    with pytest.raises(MemoryRanOut) as caught:
        failing_step()
    assert caught.value.keep is None
    with pytest.raises(MemoryRanOut) as caught, kept_when_memory_runs_out(optimizer, lambda: 8, lambda: kept.append(8)):
        raise MemoryError
    assert caught.value.keep is not None
    with pytest.raises(ValueError, match="something else"), kept_when_memory_runs_out(optimizer, lambda: 9, list):
        raise ValueError("something else")
    assert kept == []


def test_the_failed_steps_tensors_are_let_go_before_the_next_attempt():
    """What the loop held is gone when `smaller` is asked, or there would be no memory for another attempt."""
    import weakref

    held: list[weakref.ref] = []

    def stage(cfg: int) -> None:
        big = torch.zeros(1000)
        held.append(weakref.ref(big.untyped_storage()))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        with kept_when_memory_runs_out(optimizer, lambda: 0, lambda: None):
            if cfg > 1:
                (big + 1).exp()
                raise MemoryError

    alive: list[bool] = []

    def smaller(cfg: int, _: int) -> int:
        alive.append(held[-1]() is not None)
        return cfg - 1

    memory.repeated_smaller(stage, 3, smaller)  # type: ignore[arg-type]
    assert alive == [False, False]


IN_LITTLE_MEMORY = """
import resource, sys, torch
from pathlib import Path
from ctvae.training.train import train
dataset, out, limit_mb = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = ["autoencoder.steps=3", "autoencoder.log_every=1", "autoencoder.save_every=1", "data.shape=[64,128,128]",
            "polish.enabled=false"]
train(dataset, out + "/warm", stage="autoencoder", overrides=[*settings, "data.patch=[16,64,64]"])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + limit_mb * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train(dataset, out + "/run", stage="autoencoder", overrides=settings)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is enforced on Linux")
def test_a_real_allocation_failure(tiny_dataset, tmp_path):
    """A process that may take 250 MB more: whole groups of 64x128x128 do not fit, and it trains all the same."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(tiny_dataset), str(tmp_path), "250"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "memory ran out at step 0 of the autoencoder: going on from there with checkpointing" in done.stderr
    assert load(tmp_path / "run" / "autoencoder.safetensors")[1]["steps"] == 3


# --- plans


def larger(tiny_settings) -> list[str]:
    """Groups and features of which the activations, and not the weights, take the memory; the prior's batch is free."""
    kept = [text for text in tiny_settings if not text.startswith(("model.widths", "prior.batch"))]
    few = ("autoencoder.steps=2", "prior.steps=2")
    return [*kept, "model.widths=[16,16]", "data.shape=[64,64,64]", "polish.enabled=false", *few]


def test_memory_makes_a_plan_and_the_run_resumes_with_it(tiny_dataset, tiny_settings, tmp_path, capsys):
    free = larger(tiny_settings)
    short = planner.weigh("wavelet3d", planner.Source((64, 64, 64)), 24, free).train_peak_gb
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=free, memory_gb=short)
    err = capsys.readouterr().err
    assert err.count("plan: needs ") == 1
    assert "planned with checkpointing (whole groups of 64x64x64, batch 1, prior batch" in err
    assert load_config(run / "config.yaml").model.checkpointing
    train(tiny_dataset, run, overrides=free)  # no --memory: as it was begun
    assert (run / "prior-flow.safetensors").exists()
    with pytest.raises(DoesNotFit, match="needs"):
        train(tiny_dataset, tmp_path / "other", overrides=free, memory_gb=0.001)
    assert not (tmp_path / "other").exists()


def test_by_default_the_machines_memory_is_looked_at(tiny_dataset, tiny_settings, tmp_path, capsys, monkeypatch):
    free = larger(tiny_settings)
    short = planner.weigh("wavelet3d", planner.Source((64, 64, 64)), 24, free).train_peak_gb
    monkeypatch.setattr(planner, "machine_memory_gb", lambda: short)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=free)
    assert load_config(run / "config.yaml").model.checkpointing
    assert "plan: needs " in capsys.readouterr().err
    monkeypatch.setattr(planner, "machine_memory_gb", lambda: 20 * short)
    run = train(tiny_dataset, tmp_path / "enough", stage="autoencoder", overrides=free)
    assert not load_config(run / "config.yaml").model.checkpointing
    assert "plan:" not in capsys.readouterr().err


def test_training_from_a_plan_file(tiny_dataset, tiny_settings, tmp_path, capsys):
    file, run = tmp_path / "plan.yaml", tmp_path / "run"
    settled = [argument for text in tiny_settings for argument in ("--set", text)]
    assert __main__.run(["plan", str(tiny_dataset), "--memory", "4GB", "--out", str(file), *settled]) == 0
    text = file.read_text()
    text = text.replace("data.patch: null", "data.patch: [16, 32, 32]")
    file.write_text(text.replace("checkpointing: false", "checkpointing: true"))
    begin = ["train", str(tiny_dataset), "--out", str(run), "--stage", "autoencoder"]
    assert __main__.run([*begin, "--plan", str(file)]) == 0
    cfg = load_config(run / "config.yaml")
    assert (cfg.data.patch, cfg.model.checkpointing, cfg.autoencoder.steps) == ((16, 32, 32), True, 6)
    assert __main__.run(begin) == 0, "resumes without the file"
    assert load_config(run / "config.yaml") == cfg
    with pytest.raises(ConfigError, match="is a plan for wavelet3d, not for slice2d"):
        train(tiny_dataset, tmp_path / "other", method="slice2d", plan=file)
    with pytest.raises(ConfigError, match="leave out --memory"):
        train(tiny_dataset, tmp_path / "other", plan=file, memory_gb=4)


def test_a_patch_of_any_size_is_put_on_the_grid(tiny_dataset, tiny_settings, tmp_path):
    asked = settings.Asked((*tiny_settings, "data.patch=[15,30,32]"))
    assert settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", asked).cfg.data.patch == (16, 32, 32)
    flat = settings.Asked(("data.patch=[16,32,32]",), method="slice2d")
    with pytest.raises(ConfigError, match=r"data\.patch: slice2d trains on whole groups"):
        settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", flat)


def test_training_without_bf16_is_in_float32(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    """Even where no plan is made for lack of memory; what was set is left alone, and the same command resumes with it."""
    free = tuple(text for text in tiny_settings if not text.startswith("autoencoder.precision"))
    asked = settings.Asked((*free, "prior.precision=bf16"))
    monkeypatch.setattr(planner, "computes_bf16", lambda: False)
    found = settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", asked)
    assert (found.cfg.autoencoder.precision, found.cfg.prior.precision) == ("fp32", "bf16")
    assert found.planned == ("autoencoder.precision=fp32",)
    assert found.note == "fp32, as this machine does not compute in bf16"
    monkeypatch.setattr(planner, "computes_bf16", lambda: True)
    assert settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", asked).planned == ()


def test_a_plan_in_bf16_is_followed_and_said_to_be_slow(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    file = tmp_path / "plan.yaml"
    file.write_text("method: wavelet3d\nautoencoder.precision: bf16\nprior.precision: bf16\n")
    free = tuple(text for text in tiny_settings if "precision" not in text)
    quicker = " --set ".join(["with", *(f"{stage}.precision=fp32" for stage in ("autoencoder", "polish", "prior"))])
    for computes, hint in ((False, quicker), (True, "")):
        monkeypatch.setattr(planner, "computes_bf16", lambda computes=computes: computes)
        found = settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", settings.Asked(free, plan=file))
        assert (found.cfg.autoencoder.precision, found.cfg.prior.precision) == ("bf16", "bf16")
        assert found.note.startswith(f"settings from {file}")
        assert found.note.endswith(hint or str(file))


def test_a_run_may_be_planned_anew_but_stays_the_same_network(tiny_dataset, tiny_settings, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=tiny_settings)
    file = tmp_path / "plan.yaml"
    lines = [text.replace("=", ": ", 1) for text in tiny_settings]
    file.write_text("\n".join(["method: wavelet3d", *lines, "model.checkpointing: true", "prior.accumulate: 2"]))
    train(tiny_dataset, run, stage="autoencoder", plan=file)
    assert load_config(run / "config.yaml").prior.accumulate == 2
    file.write_text("\n".join(["method: wavelet3d", *lines, "model.latent_channels: 3"]))
    with pytest.raises(ConfigError, match="begun with other settings"):
        train(tiny_dataset, run, stage="autoencoder", plan=file)


def test_strides_follow_the_datasets_spacing(tmp_path, scan_hu, write_nifti, tiny_settings):
    """Slices 2.5 mm apart with pixels of 1 mm: halved at the second level only, once pixels are 2 mm."""
    from ctvae.prepare import prepare

    for seed in range(4):
        write_nifti(tmp_path / "scans" / f"case_{seed}.nii.gz", scan_hu(seed), (1.0, 1.0, 2.5))
    dataset = prepare(tmp_path / "scans", tmp_path / "ds", slices=8, fractions=(0.5, 0.25, 0.25), workers=1).folder
    free = [text for text in tiny_settings if not text.startswith("model.strides")]
    run = train(dataset, tmp_path / "run", stage="autoencoder", overrides=free)
    assert load_config(run / "config.yaml").model.strides == ((1, 2, 2), (2, 2, 2))
    train(dataset, run, stage="autoencoder", overrides=free)
    asked = train(dataset, tmp_path / "asked", stage="autoencoder", overrides=tiny_settings)
    assert load_config(asked / "config.yaml").model.strides == ((2, 2, 2), (2, 2, 2))


def test_hours_set_the_steps_from_a_measured_one(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    """A step of 3 s of the autoencoder and 2 s of the prior: 30 and 58 % of 0.1 h are 36 and 104 of them."""
    monkeypatch.setattr(pace, "autoencoder_step_seconds", lambda _: 3.0)
    monkeypatch.setattr(pace, "prior_step_seconds", lambda _: 2.0)
    dataset = Dataset.open(tiny_dataset)
    settled = settings.settle(dataset, tmp_path / "run", settings.Asked(tiny_settings))
    timed = settings.with_hours(settled, 0.1, "both")
    assert (timed.cfg.autoencoder.steps, timed.cfg.prior.steps) == (36, 104)
    found = planner.with_hours(planner.weigh("wavelet3d", planner.Source((64, 32, 32)), 24, tiny_settings), 0.1)
    assert load_recipe("wavelet3d", found.overrides).prior.steps == 104
    assert (found.plan["autoencoder_steps"], found.plan["prior_steps"], found.plan["polish_minutes"]) == (36, 104, 0.72)
    assert load_recipe("wavelet3d", found.overrides).polish.minutes == 0.72
    free = [text for text in tiny_settings if not text.startswith(("autoencoder.steps", "prior.steps"))]
    monkeypatch.setattr(pace, "autoencoder_step_seconds", lambda _: 36.0)  # without a prior 30 of 42 % of 0.1 h: seven steps
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=free, hours=0.1)
    assert load(run / "autoencoder.safetensors")[1]["steps"] == 7
    monkeypatch.setattr(pace, "autoencoder_step_seconds", lambda _: 1.0)
    train(tiny_dataset, run, stage="autoencoder", overrides=free, hours=0.1)  # resumes with the steps that it was begun with
    assert load_config(run / "config.yaml").autoencoder.steps == 7


def test_a_step_is_measured_with_its_accumulation(tiny_settings, monkeypatch):
    """By a clock that only an objective's forward pass moves: 1 s each."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    for kind in (autoencoder.Objective, prior.FlowObjective):
        monkeypatch.setattr(kind, "forward", _slow(kind.forward, now))
    cfg = load_recipe("wavelet3d", [*tiny_settings, "data.shape=[16,16,16]", "autoencoder.accumulate=3"])
    assert pace.autoencoder_step_seconds(cfg) == pytest.approx(3.0)
    assert pace.prior_step_seconds(cfg) == pytest.approx(1.0)


def _slow(forward, now):
    def slow(self, *arguments):
        now[0] += 1.0
        return forward(self, *arguments)

    return slow
