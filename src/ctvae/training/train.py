"""The verb `train`: the autoencoder, then the priors over its latents, in one resumable run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ctvae.checkpoint import load
from ctvae.config import Config, load_config, load_recipe
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError, ModelError
from ctvae.latents import LatentSet
from ctvae.models import build
from ctvae.runlog import Run
from ctvae.training.autoencoder import train_autoencoder
from ctvae.training.groups import TrainingGroups, training_shape
from ctvae.training.polish import polish_decoder
from ctvae.training.prior import encode_groups, train_prior

STAGES = ("autoencoder", "prior", "both")
SHARES = {"autoencoder": 0.8, "polish": 0.0, "prior": 0.2}  # of --minutes; vector priors are quick
POLISHED_SHARES = {"autoencoder": 0.3, "polish": 0.12, "prior": 0.58}


def train(
    dataset: Path | str,
    out: Path | str,
    *,
    method: str | None = None,
    stage: str = "both",
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train `method`'s autoencoder and then its priors on a prepared dataset; the same call again resumes.

    `minutes` is shared between the stages; without it each runs its recipe's steps. `method` none: what the run folder
    says, else wavelet3d. Returns the run folder. Raises InputError, ConfigError, ModelError or TrainingDiverged.
    """
    if stage not in STAGES:
        raise ConfigError(f"unknown stage '{stage}' (known: {', '.join(STAGES)})")
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"minutes {minutes:g}: training needs more than 0")
    data, folder = Dataset.open(Path(dataset)), Path(out)
    cfg = _settings(data, folder, method, overrides, stage, minutes)
    run = Run.create_or_resume(folder, cfg, data.fingerprint)
    if stage != "prior" and not run.stage_done("autoencoder"):
        train_autoencoder(run, cfg, _groups(data, cfg, "train"), _groups(data, cfg, "validation"))
    if stage != "prior" and cfg.polish.enabled and not run.stage_done("polish"):
        polish_decoder(run, cfg, _groups(data, cfg, "train"), _groups(data, cfg, "validation"))
    if stage != "autoencoder" and not run.stage_done("prior"):
        train_prior(run, cfg, *_latents(run, data, cfg))
    return folder


def _settings(
    data: Dataset, folder: Path, method: str | None, overrides: Sequence[str], stage: str, minutes: float | None
) -> Config:
    saved = folder / "config.yaml"
    if method is None and saved.exists():
        method = load_config(saved).method
    cfg = load_recipe(method or "wavelet3d", overrides)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"shape": training_shape(data, cfg)})})
    if minutes is None:
        return cfg
    shares = POLISHED_SHARES if cfg.polish.enabled else SHARES
    asked = {"autoencoder": ("autoencoder", "polish"), "prior": ("prior",), "both": tuple(shares)}[stage]
    total = sum(shares[name] for name in asked)
    sections = {
        name: getattr(cfg, name).model_copy(update={"minutes": minutes * shares[name] / total}) for name in asked if shares[name]
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
