"""The verb `train`: the autoencoder, then the priors over its latents, in one resumable run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ctvae.calibration import FILE as CALIBRATION
from ctvae.checkpoint import file_hash, load
from ctvae.conditions import Columns, Known, read_columns
from ctvae.config import Config, validated
from ctvae.dataset import Dataset, Group
from ctvae.device import deterministic
from ctvae.errors import ConfigError, DoesNotFit, InputError, ModelError
from ctvae.files import occupied
from ctvae.latents import LatentSet, is_complete
from ctvae.model import model_folder
from ctvae.models import build
from ctvae.ranks import Ranks, joined
from ctvae.runlog import Run, refuse_foreign
from ctvae.training.autoencoder import train_autoencoder
from ctvae.training.calibration import calibrate
from ctvae.training.encoding import encode_groups
from ctvae.training.finish import finish_decoder
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import repeated_smaller
from ctvae.training.pace import STAGES, shares, wants
from ctvae.training.perceptual import perceptual_term
from ctvae.training.polish import polish_decoder
from ctvae.training.prior import train_prior
from ctvae.training.settings import (
    HOURS_KEYS,
    Asked,
    Settled,
    chosen,
    for_minutes,
    refuse_uneven,
    refuse_unwanted,
    settle,
    smaller,
    with_hours,
)
from ctvae.training.start import begin, started, take_autoencoder

CONDITIONS_FILE = "conditions.json"  # in the run folder: a user's columns by group


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
    start: Path | str | None = None,
) -> Path:
    """Train `method`'s autoencoder and then its priors on a prepared dataset; the same call again resumes.

    `minutes` is shared between the stages and ends them early; without it each runs its recipe's steps. `hours` ends them
    too, and sets the steps to fill that time, from what one takes here. `method` none: what the run folder says, else
    wavelet3d. `plan` is a plan.yaml; `memory_gb` plans for that much. By default the machine's memory is looked at, and
    what was asked is changed only where it does not fit. `conditions` is a CSV with a row per scan or patient (columns `scan` or
    `patient`) whose other columns the flow is told, all or those of `prior.columns`; `generate` can ask for their values.
    `start` is a run folder or packaged model whose weights the training begins with (`training/start.py`).
    Processes that torchrun started train together (docs/scaling.md).
    Returns the run folder.

    Raises InputError, ConfigError, ModelError, DoesNotFit or TrainingDiverged.
    """
    _refuse_nonsense(stage, minutes, hours)
    folder = Path(out)
    with joined() as ranks, ExitStack() as held:
        ranks.told(lambda: held.enter_context(occupied(folder, "ctvae train")))
        data = Dataset.open(Path(dataset))
        ranks.told(lambda: refuse_foreign(folder))  # before a plan is made for it
        source = model_folder(start) if start is not None else None
        asked = Asked(tuple(overrides), method, Path(plan) if plan is not None else None, memory_gb, ranks.world, source)
        settled = _as_the_first(ranks, lambda: _settled(data, folder, asked, stage, minutes, hours))
        if ranks.first:
            _download(folder, settled.cfg, stage)
            replanned = plan is not None or memory_gb is not None
            run = Run.create_or_resume(folder, settled.cfg, data.fingerprint, settled.planned, replanned)
            _columns(run, data, settled.cfg, conditions)  # into the run folder
            if source is not None:
                begin(run, source)
        ranks.barrier()
        columns = _columns(Run(folder), data, settled.cfg, None)
        with deterministic(settled.cfg.deterministic):
            _Stages(Run(folder), data, asked, settled, columns, ranks).train(stage)
    return folder


def _settled(
    data: Dataset, folder: Path, asked: Asked, stage: str, minutes: float | None, hours: float | None
) -> Settled:
    """The run's settings; says what was planned."""
    if hours is not None and asked.pinned & HOURS_KEYS:
        raise ConfigError(f"hours {hours:g} set the steps; leave out --set {min(asked.pinned & HOURS_KEYS)}")
    begun = (folder / "config.yaml").exists()
    settled = settle(data, folder, asked)
    refuse_unwanted(settled.cfg, stage)
    refuse_uneven(settled.cfg, stage, asked.processes)
    if settled.note:
        say(f"plan: {settled.note} ({chosen(settled.cfg)})")
    minutes = minutes if hours is None else 60 * hours
    if minutes is not None and not begun and (short := for_minutes(settled, minutes, stage, asked)) is not settled:
        say(f"plan: {short.note}")
        settled = short
    if hours is not None:
        settled = with_hours(settled, hours, stage, asked.processes)
    return replace(settled, cfg=_timed(settled.cfg, stage, minutes))


def _as_the_first(ranks: Ranks, settle: Callable[[], Settled]) -> Settled:
    """The first process looks at the memory and measures the time; the others do as it says."""
    if ranks.world == 1:
        return settle()

    def say() -> tuple[dict, tuple[str, ...]]:
        settled = settle()
        return settled.cfg.model_dump(mode="json"), settled.planned

    cfg, planned = ranks.told(say)
    return Settled(validated(cfg, source="settings"), tuple(planned))


class _Stages:
    """The stages of a run, each done again with a smaller plan where its memory runs out."""

    def __init__(self, run: Run, data: Dataset, asked: Asked, settled: Settled, columns: Columns, ranks: Ranks):
        self.run, self.data, self.asked, self.settled, self.columns, self.ranks = run, data, asked, settled, columns, ranks

    def train(self, stage: str) -> None:
        weights = self.run.folder / "autoencoder.safetensors"
        if "autoencoder" not in STAGES[stage] and self.ranks.told(lambda: started(self.run) and not weights.exists()):
            take_autoencoder(self.run, self.settled.cfg, stage)
            self.ranks.barrier()
        train = {
            "autoencoder": self._autoencoder, "polish": self._polish, "prior": self._prior, "finish": self._finish,
            "calibration": self._calibration,
        }  # fmt: skip
        for name in STAGES[stage]:
            if wants(self.settled.cfg, name):
                self._once(name, train[name])

    def _once(self, stage: str, train: Callable[[Config], None]) -> None:
        if not self.ranks.told(lambda: self.run.stage_done(stage)):
            repeated_smaller(train, self.settled.cfg, partial(self._smaller, stage))
        self.ranks.barrier()

    def _autoencoder(self, cfg: Config) -> None:
        train_autoencoder(self.run, cfg, *self._split("autoencoder"), self.ranks)

    def _polish(self, cfg: Config) -> None:
        polish_decoder(self.run, cfg, *self._split("polish"), self.ranks)

    def _finish(self, cfg: Config) -> None:
        if not self.ranks.told(lambda: self.run.stage_done("prior")):
            raise ModelError(f"{self.run.folder}: has no trained prior yet, whose samples `finish` needs; run --stage prior")
        if cfg.calibration.enabled and self.ranks.first and not (self.run.folder / CALIBRATION).exists():
            calibrate(self.run, self.data)  # as the decoder is now: the finish sees what comes out in the end
        self.ranks.barrier()
        finish_decoder(self.run, cfg, *self._split("finish"), self.ranks)

    def _calibration(self, _: Config) -> None:
        if not self.ranks.told(lambda: self.run.stage_done("autoencoder")):
            raise ModelError(f"{self.run.folder}: has no trained autoencoder yet; run with --stage autoencoder or both first")
        if self.ranks.first:
            calibrate(self.run, self.data)

    def _split(self, stage: str) -> tuple[TrainingGroups, TrainingGroups]:
        cfg = self.settled.cfg
        cropped = cfg.model_copy(update={"data": cfg.data.model_copy(update={"patch": cfg.patch_of(stage)})})
        training, validation = (_groups(self.data, cropped, split, self.ranks) for split in ("train", "validation"))
        return training, validation

    def _prior(self, cfg: Config) -> None:
        _refuse_untold(cfg, self.data.groups("train"), self.columns)
        training, validation = _latents(self.run, self.data, cfg, self.ranks)
        held_out = validation and validation.with_columns(self.columns)
        train_prior(self.run, cfg, training.with_columns(self.columns), held_out, self.ranks)

    def _smaller(self, stage: str, _: Config, step: int) -> Config | None:
        """Settings for less memory, written to the run folder."""
        if self.ranks.world > 1:
            raise DoesNotFit(
                f"memory ran out at step {step} of the {stage}, and several processes do not plan anew; begin another run with a "
                f"smaller {stage}.batch and more {stage}.accumulate, or with --set model.checkpointing=true"
            )
        less = smaller(self.settled, self.asked, stage)
        if less is None:
            return None
        say(f"memory ran out at step {step} of the {stage}: going on from there with {less.note}")
        self.settled = less
        self.run.replan(less.cfg, less.planned)
        return less.cfg


def _download(folder: Path, cfg: Config, stage: str) -> None:
    """What a later part of `stage` needs, or the complaint about it, rather than hours into the training. Raises ConfigError."""
    begun = (folder / "config.yaml").exists()
    for name in STAGES[stage]:
        if wants(cfg, name) and not (begun and Run(folder).stage_done(name)):
            perceptual_term(getattr(getattr(cfg, name), "perceptual", "none"))


def _refuse_untold(cfg: Config, groups: Sequence[Group], columns: Columns) -> None:
    """Raises ConfigError where `prior.told` has what the prior will not know: before its training, not when it first draws."""
    try:
        Known.of_groups(groups, columns).given(cfg.prior.told)
    except InputError as error:
        raise ConfigError(f"prior.told: {error}") from error


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


def _groups(data: Dataset, cfg: Config, split: str, ranks: Ranks) -> TrainingGroups:
    assert cfg.data.shape is not None
    return TrainingGroups(data, data.groups(split), cfg.data, cfg.data.shape, ranks)


def _latents(run: Run, data: Dataset, cfg: Config, ranks: Ranks) -> tuple[LatentSet, LatentSet | None]:
    """The training groups' latents, encoded once and kept in the run folder, and the validation groups' if there are any."""
    weights = run.folder / "autoencoder.safetensors"
    if not weights.exists():
        raise ModelError(f"{run.folder}: has no trained autoencoder yet; run with --stage autoencoder or both first")
    encodings = {"train": cfg.prior, "validation": cfg.prior.model_copy(update={"encodings": 1})}
    splits = [split for split in encodings if data.groups(split)]
    missing = ranks.told(lambda: [split for split in splits if not is_complete(_kept(run, split))])
    if missing:
        network = build(cfg.model, cfg.data.shape or (0, 0, 0))
        network.load_state_dict(load(weights)[0])
        network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        precision, of = cfg.autoencoder.precision, ranks.told(lambda: file_hash(weights))
        for split in missing:
            groups = _groups(data, cfg, split, ranks)
            encode_groups(network, groups, encodings[split], cfg.seed, _kept(run, split), precision, of, ranks)
    ranks.barrier()
    training, *validation = [LatentSet.load(_kept(run, split)) for split in splits]
    return training, validation[0] if validation else None


def _kept(run: Run, split: str) -> Path:
    """Where a split's latents lie: a folder of shards, or the one file of an earlier version."""
    name = "latents" if split == "train" else f"latents-{split}"
    file = run.folder / f"{name}.safetensors"
    return file if file.is_file() else run.folder / name


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
