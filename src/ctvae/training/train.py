"""The verb `train`: the autoencoder, then the priors over its latents, in one resumable run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ctvae.checkpoint import load
from ctvae.conditions import Columns, read_columns
from ctvae.config import Config
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError, ModelError
from ctvae.latents import LatentSet
from ctvae.models import build
from ctvae.runlog import Run
from ctvae.training.autoencoder import train_autoencoder
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import repeated_smaller
from ctvae.training.pace import shares
from ctvae.training.polish import polish_decoder
from ctvae.training.prior import encode_groups, train_prior
from ctvae.training.settings import HOURS_KEYS, Asked, Settled, chosen, settle, smaller, with_hours

CONDITIONS_FILE = "conditions.json"  # in the run folder: a user's columns by group
STAGES = ("autoencoder", "prior", "both")


def train(
    dataset: Path | str,
    out: Path | str,
    *,
    method: str | None = None,
    stage: str = "both",
    overrides: Sequence[str] = (),
    minutes: float | None = None,
    plan: Path | str | None = None,
    memory_gb: float | None = None,
    hours: float | None = None,
    conditions: Path | str | None = None,
) -> Path:
    """Train `method`'s autoencoder and then its priors on a prepared dataset; the same call again resumes.

    `minutes` is shared between the stages and ends them early; without it each runs its recipe's steps. `hours` ends them
    too, and sets the steps to fill that time, from what one takes here. `method` none: what the run folder says, else
    wavelet3d. `plan` is a plan.yaml; `memory_gb` plans for that much. By default the machine's memory is looked at, and
    what was asked is changed only where it does not fit. `conditions` is a CSV with a row per scan or patient (columns `scan` or
    `patient`) whose other columns the flow is told, all or those of `prior.columns`; `generate` can ask for their values.
    Returns the run folder.

    Raises InputError, ConfigError, ModelError, DoesNotFit or TrainingDiverged.
    """
    _refuse_nonsense(stage, minutes, hours)
    data, folder = Dataset.open(Path(dataset)), Path(out)
    asked = Asked(tuple(overrides), method, Path(plan) if plan is not None else None, memory_gb)
    if hours is not None and asked.pinned & HOURS_KEYS:
        raise ConfigError(f"hours {hours:g} set the steps; leave out --set {min(asked.pinned & HOURS_KEYS)}")
    settled = settle(data, folder, asked)
    if settled.note:
        say(f"plan: {settled.note} ({chosen(settled.cfg)})")
    if hours is not None:
        settled, minutes = with_hours(settled, hours, stage), 60 * hours
    settled = replace(settled, cfg=_timed(settled.cfg, stage, minutes))
    replanned = plan is not None or memory_gb is not None
    run = Run.create_or_resume(folder, settled.cfg, data.fingerprint, settled.planned, replanned)
    columns = _columns(run, data, settled.cfg, conditions)
    _Stages(run, data, asked, settled, columns).train(stage)
    return folder


class _Stages:
    """The stages of a run, each done again with a smaller plan where its memory runs out."""

    def __init__(self, run: Run, data: Dataset, asked: Asked, settled: Settled, columns: Columns):
        self.run, self.data, self.asked, self.settled, self.columns = run, data, asked, settled, columns

    def train(self, stage: str) -> None:
        if stage != "prior" and not self.run.stage_done("autoencoder"):
            repeated_smaller(self._autoencoder, self.settled.cfg, partial(self._smaller, "autoencoder"))
        if stage != "prior" and self.settled.cfg.polish.enabled and not self.run.stage_done("polish"):
            repeated_smaller(self._polish, self.settled.cfg, partial(self._smaller, "polish"))
        if stage != "autoencoder" and not self.run.stage_done("prior"):
            repeated_smaller(self._prior, self.settled.cfg, partial(self._smaller, "prior"))

    def _autoencoder(self, cfg: Config) -> None:
        train_autoencoder(self.run, cfg, *self._split())

    def _polish(self, cfg: Config) -> None:
        polish_decoder(self.run, cfg, *self._split())

    def _split(self) -> tuple[TrainingGroups, TrainingGroups]:
        training, validation = (_groups(self.data, self.settled.cfg, split) for split in ("train", "validation"))
        return training, validation

    def _prior(self, cfg: Config) -> None:
        training, validation = _latents(self.run, self.data, cfg)
        train_prior(self.run, cfg, training.with_columns(self.columns), validation and validation.with_columns(self.columns))

    def _smaller(self, stage: str, _: Config, step: int) -> Config | None:
        """Settings for less memory, written to the run folder."""
        less = smaller(self.settled, self.asked, stage)
        if less is None:
            return None
        say(f"memory ran out at step {step} of the {stage}: going on from there with {less.note}")
        self.settled = less
        self.run.replan(less.cfg, less.planned)
        return less.cfg


def _columns(run: Run, data: Dataset, cfg: Config, table: Path | str | None) -> Columns:
    """The user's columns, from `table` or from the run folder, where they are kept. Raises InputError or ConfigError."""
    path = run.folder / CONDITIONS_FILE
    if table is None:
        if cfg.prior.columns and not path.exists():
            raise ConfigError("prior.columns: names columns of a table; give it with --conditions")
        return Columns.load(path) if path.exists() else Columns()
    columns, notes = read_columns(table, [*data.groups("train"), *data.groups("validation")], cfg.prior.columns)
    begun = run.stage_done("prior") or bool(run.checkpoints("flow").paths())
    if begun and not (path.exists() and columns.same_as(Columns.load(path))):
        raise ConfigError(f"{run.folder}: its prior was begun with other conditions than {table}; choose another --out")
    for note in notes:
        say(note)
    columns.save(path)
    return columns


def _refuse_nonsense(stage: str, minutes: float | None, hours: float | None) -> None:
    if stage not in STAGES:
        raise ConfigError(f"unknown stage '{stage}' (known: {', '.join(STAGES)})")
    if minutes is not None and hours is not None:
        raise ConfigError("minutes and hours: say one of them")
    for name, value in (("minutes", minutes), ("hours", hours)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} {value:g}: training needs more than 0")


def _timed(cfg: Config, stage: str, minutes: float | None) -> Config:
    if minutes is None:
        return cfg
    sections = {
        name: getattr(cfg, name).model_copy(update={"minutes": minutes * share}) for name, share in shares(cfg, stage).items()
    }
    return cfg.model_copy(update=sections)


def _groups(data: Dataset, cfg: Config, split: str) -> TrainingGroups:
    assert cfg.data.shape is not None
    return TrainingGroups(data, data.groups(split), cfg.data, cfg.data.shape)


def _latents(run: Run, data: Dataset, cfg: Config) -> tuple[LatentSet, LatentSet | None]:
    """The training groups' latents, encoded once and kept in the run folder, and the validation groups' if there are any."""
    weights = run.folder / "autoencoder.safetensors"
    if not weights.exists():
        raise ModelError(f"{run.folder}: has no trained autoencoder yet; run with --stage autoencoder or both first")
    training, validation = (run.folder / f"latents{name}.safetensors" for name in ("", "-validation"))
    if not training.exists() or (not validation.exists() and data.groups("validation")):
        network = build(cfg.model, cfg.data.shape or (0, 0, 0))
        network.load_state_dict(load(weights)[0])
        network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        precision = cfg.autoencoder.precision
        encode_groups(network, _groups(data, cfg, "train"), cfg.prior.encodings, cfg.seed, precision).save(training)
        if data.groups("validation"):
            encode_groups(network, _groups(data, cfg, "validation"), 1, cfg.seed, precision).save(validation)
    return LatentSet.load(training), LatentSet.load(validation) if validation.exists() else None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
