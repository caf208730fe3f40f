"""A run's settings, from what was asked: recipe, plan file, the run's own record, the dataset's geometry, the memory.

Later ones win:  recipe  <  weights to start from  <  decided here (strides; a plan where memory is short)  <  plan.yaml  <  --set

What was decided is written to run.json as `planned`, so that the same command resumes with it, whatever is free by then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctvae import planner
from ctvae.config import Config, load_config, load_recipe, with_overrides
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError, DoesNotFit
from ctvae.networks import Wavelet3D
from ctvae.planning import planfile
from ctvae.planning.remedies import next_smaller
from ctvae.planning.sizes import written
from ctvae.training import start
from ctvae.training.groups import training_shape
from ctvae.training.pace import STAGES, TRAINED, steps_for, wants, without_sharpening

SURELY_BYTES = 16_384  # per voxel of a batch: thirty times what any recipe takes. With less than that there is a plan to make
SURELY_GB = 1.0  # and this for weights and the prior

HOURS_KEYS = {"autoencoder.steps", "prior.steps"}


@dataclass(frozen=True)
class Asked:
    """What a person said of a run. `plan`: a plan.yaml; `memory_gb`: plan for that much, even where it all fits.

    `processes` train it together; what each of them needs is not planned here.
    """

    overrides: tuple[str, ...] = ()
    method: str | None = None
    plan: Path | None = None
    memory_gb: float | None = None
    processes: int = 1
    start: Path | None = None  # folder of the model whose weights are to start from

    @property
    def pinned(self) -> set[str]:
        """Keys that are left alone."""
        return {text.partition("=")[0] for text in self.overrides}


@dataclass(frozen=True)
class Settled:
    """A run's settings; `planned` are those of them that were decided here, and `note` says why, in one line or none."""

    cfg: Config
    planned: tuple[str, ...] = ()
    note: str = ""


def settle(dataset: Dataset, folder: Path, asked: Asked) -> Settled:
    """Raises ConfigError, InputError or DoesNotFit."""
    if asked.plan is not None and asked.memory_gb is not None:
        raise ConfigError(f"{asked.plan} says what to train with; leave out --memory, or --plan to plan anew")
    if asked.processes > 1 and asked.memory_gb is not None:
        raise ConfigError("--memory plans for one process; `ctvae plan` with the batch of one of them says what it needs")
    method = _method(folder, asked)
    begun = (folder / "config.yaml").exists()
    planned = _recorded(folder) if begun else _of_the_start(method, asked)
    if asked.plan is not None:
        planned = _merged(planned, planfile.plan_overrides(asked.plan))
        slow = [] if begun else planner.precision_overrides(load_recipe(method, _merged(planned, asked.overrides)), asked.pinned)
        quicker = "".join(f" --set {text}" for text in slow)
        hint = f"; bf16, which this machine does not compute in: quicker, in more memory, with{quicker}" if slow else ""
        return _settled(dataset, method, planned, asked, f"settings from {asked.plan}{hint}")
    if begun and asked.memory_gb is None:
        return _settled(dataset, method, planned, asked, "")
    strides = [] if asked.start else _strides(dataset, method, asked)
    precision = planner.precision_overrides(load_recipe(method, _merged(planned, asked.overrides)), asked.pinned)
    planned = _merged([text for text in planned if _key(text) not in planner.MEMORY_KEYS], (*strides, *precision))
    settled = _settled(dataset, method, planned, asked, planner.NO_BF16 if precision else "")
    if asked.memory_gb is None and (asked.processes > 1 or _surely_fits(settled.cfg)):
        return settled
    source = planner.Source.of(dataset)
    known = [text for text in planned if text not in precision]  # which is a plan's to decide
    found = planner.weigh(method, source, asked.memory_gb, (*known, *asked.overrides))
    if not found.fits:
        raise DoesNotFit(found.note)
    if found.as_asked:
        return replace(settled, note=found.note if asked.memory_gb else settled.note)
    changed = [text for text in found.overrides if _key(text) in planner.MEMORY_KEYS - asked.pinned]
    return _settled(dataset, method, _merged(planned, changed), asked, found.note)


def smaller(settled: Settled, asked: Asked, stage: str) -> Settled | None:
    """The next smaller plan for `stage` of the recipe, after its memory ran out; None where there is none."""
    option = next_smaller(settled.cfg, stage, asked.pinned)
    if option is None:
        return None
    planned = _merged(settled.planned, option.changes)
    return Settled(with_overrides(settled.cfg, option.changes), planned, option.label)


def for_minutes(settled: Settled, minutes: float, stage: str, asked: Asked) -> Settled:
    """Without the sharpening that `minutes` are too few for, unless somebody set it or the weights are a trained model's."""
    changes = [] if asked.start else without_sharpening(_share(settled.cfg, asked.processes), minutes, stage, asked.pinned)
    if not changes:
        return settled
    note = f"{minutes:.3g} minutes are too few to sharpen the decoder as well ({', '.join(changes)})"
    return Settled(with_overrides(settled.cfg, changes), _merged(settled.planned, changes), note)


def with_hours(settled: Settled, hours: float, stage: str, processes: int = 1) -> Settled:
    """Steps to fill `hours`, measured here on one process's share of a batch, unless the run was begun with some."""
    known = {_key(text) for text in settled.planned}
    wanted = {"autoencoder.steps"} if stage == "autoencoder" else {"prior.steps"} if stage == "prior" else HOURS_KEYS
    if wanted <= known:
        return settled
    steps = [text for text in steps_for(_share(settled.cfg, processes), hours, stage) if _key(text) not in known]
    return Settled(with_overrides(settled.cfg, steps), _merged(settled.planned, steps), settled.note)


def refuse_unwanted(cfg: Config, stage: str) -> None:
    """Raises ConfigError where `stage` is one that these settings leave out: nothing would be done, without a word."""
    if not any(wants(cfg, name) for name in STAGES[stage]):
        raise ConfigError(
            f"{stage}: these settings have none ({stage}.enabled=false); begin another run from this one, "
            f"with --from and --set {stage}.enabled=true"
        )


def refuse_uneven(cfg: Config, stage: str, processes: int) -> None:
    """Raises ConfigError where `stage` (autoencoder, prior or both), or its batches, do not divide among the processes."""
    if processes > 1 and stage != "prior" and cfg.model.kind == "conv3d":
        raise ConfigError("conv3d: its BatchNorm would see one process's share only; train its autoencoder without torchrun")
    if processes == 1 and cfg.prior.shard and "prior" in STAGES[stage]:
        raise ConfigError("prior.shard: there is one process to hold the network; leave it out, or start several by torchrun")
    for name in (name for name in STAGES[stage] if name in TRAINED):
        batch = getattr(cfg, name).batch
        if batch % processes and wants(cfg, name):
            above = -(-batch // processes) * processes
            raise ConfigError(f"{name}.batch {batch} does not divide among {processes} processes; add --set {name}.batch={above}")


def _share(cfg: Config, processes: int) -> Config:
    """With the batches of one process."""
    sections = {name: getattr(cfg, name) for name in TRAINED}
    shared = {name: section.model_copy(update={"batch": section.batch // processes}) for name, section in sections.items()}
    return cfg.model_copy(update=shared) if processes > 1 else cfg


def _settled(dataset: Dataset, method: str, planned: Sequence[str], asked: Asked, note: str) -> Settled:
    cfg = load_recipe(method, _merged(planned, asked.overrides))
    shape = f"data.shape={list(training_shape(dataset, cfg))}"
    cfg = with_overrides(cfg, [shape, *planner.patches_on_grid(cfg)])
    return Settled(cfg, tuple(text for text in planned if _key(text) not in asked.pinned), note)


def _of_the_start(method: str, asked: Asked) -> tuple[str, ...]:
    """What the weights to start from decide. Raises ConfigError where something else was asked."""
    if asked.start is None:
        return ()
    own, overrides = start.settings_of(asked.start, asked.overrides)
    if own != method:
        raise ConfigError(f"--from: that model is {own}, not {method}; leave out --method")
    return tuple(overrides)


def _method(folder: Path, asked: Asked) -> str:
    if asked.plan is not None:
        planned = planfile.plan_method(asked.plan)
        if asked.method not in (None, planned):
            raise ConfigError(f"{asked.plan}: is a plan for {planned}, not for {asked.method}; leave out --method")
        return planned
    for saved in [folder / "config.yaml"] + ([asked.start / "config.yaml"] if asked.start else []):
        if asked.method is None and saved.exists():
            return load_config(saved).method
    return asked.method or "wavelet3d"


def _recorded(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(json.loads((folder / "run.json").read_text()).get("planned", ()))
    except (OSError, ValueError):
        return ()  # Run says what is wrong with it


def _strides(dataset: Dataset, method: str, asked: Asked) -> list[str]:
    """wavelet3d's strides from spacing and slice count, where they are not the recipe's and nobody has set them."""
    cfg = load_recipe(method, asked.overrides)
    if not isinstance(cfg.model, Wavelet3D):
        return []
    override = planner.strides_override(cfg, planner.Source.of(dataset), asked.pinned)
    return [override] if override else []


def _surely_fits(cfg: Config) -> bool:
    assert cfg.data.shape is not None
    voxels = math.prod(cfg.data.shape) * cfg.autoencoder.batch
    return voxels * SURELY_BYTES / planner.GB + SURELY_GB < planner.machine_memory_gb() * (1 - planner.KEPT_FREE)


def _merged(first: Sequence[str], then: Sequence[str]) -> tuple[str, ...]:
    """Settings of both; where a key is in both, the later value."""
    return tuple({_key(text): text for text in (*first, *then)}.values())


def _key(override: str) -> str:
    return override.partition("=")[0]


def chosen(cfg: Config) -> str:
    """What memory decides, in words."""
    assert cfg.data.shape is not None
    size = f"patches of {written(cfg.data.patch)}" if cfg.data.patch else f"whole groups of {written(cfg.data.shape)}"
    parts = [size, f"batch {_batch(cfg.autoencoder)}", f"prior batch {_batch(cfg.prior)}"]
    return ", ".join(parts + ["checkpointing"] * (isinstance(cfg.model, Wavelet3D) and cfg.model.checkpointing))


def _batch(training: object) -> str:
    batch, accumulate = training.batch, training.accumulate  # type: ignore[attr-defined]
    return f"{batch} x {accumulate}" if accumulate > 1 else str(batch)
