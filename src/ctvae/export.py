"""The verb `export`: a finished run as a small folder to hand on, with half-precision weights and no scans or latents.

Not nothing of the training data: the flow holds the conditions of every training group (position, spacing, width, length of
the scan, columns of a user's table) to three digits, and the mean and leading directions of their latents, which come near
single scans where there are hardly more groups than directions.

    OUT/config.yaml, autoencoder.safetensors, calibration.safetensors, prior-flow.safetensors, prior-normal.safetensors,
        README.md (the model card)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ctvae import checkpoint, files
from ctvae.calibration import FILE as CALIBRATION
from ctvae.conditions import rounded
from ctvae.config import dump_config, with_overrides
from ctvae.errors import ConfigError, InputError
from ctvae.model import Model, open_model

PRIORS = ("flow", "normal")  # the fitted ones hold whole training latents
CONFIG, CARD = "config.yaml", "README.md"
NETWORKS = ("flow.",)
OF_GROUPS = ("conditions.known", "conditions.scan_mm")
DRAWING = ("sampling_steps", "guidance", "autoguidance", "rescale", "kept_noise", "told")
SETTABLE = tuple(f"prior.{name}" for name in DRAWING)  # the rest describes what was trained


def export(run: Path | str, out: Path | str, *, card: Path | str | None = None, overrides: Sequence[str] = ()) -> Path:
    """Write the run's averaged weights in float16 to `out`, which `ctvae generate` and the others take as MODEL.

    `card` is a Markdown file that is copied beside them as README.md. `overrides` are SETTABLE ones, such as
    `prior.autoguidance=1.3`, by which the exported model draws where nothing else is asked. Raises ModelError for an unfinished
    run, ConfigError for other overrides, InputError for conditions that the model does not know, and where `out` holds
    something else or the card is missing. An export that was interrupted is begun anew: the autoencoder comes last.
    """
    model, folder = open_model(run), Path(out)
    settings = _settings(model, overrides)
    files.sweep(folder)
    if folder.exists() and not _unfinished({path.name for path in folder.iterdir()}):
        raise InputError(f"{folder}: is not empty; choose another folder")
    if card is not None and not Path(card).is_file():
        raise InputError(f"{card}: no such file; --card names a Markdown file")
    files.write_text(folder / CONFIG, settings)
    for prior in PRIORS:
        path = model.folder / f"prior-{prior}.safetensors"
        if path.exists():
            tensors, meta = checkpoint.load(path)
            checkpoint.save(folder / path.name, {name: _smaller(name, value) for name, value in tensors.items()}, meta)
    if model.calibration is not None:
        model.calibration.save(folder / CALIBRATION)
    if card is not None:
        with files.atomic(folder / CARD) as temporary:
            shutil.copyfile(card, temporary)
    tensors, meta = checkpoint.load(model.folder / "autoencoder.safetensors")
    checkpoint.save(folder / "autoencoder.safetensors", {name: _half(value) for name, value in tensors.items()}, meta)
    return folder


def _unfinished(names: set[str]) -> bool:
    """Whether a folder with these files is empty, or what an export that was interrupted leaves."""
    known = {CONFIG, CARD, CALIBRATION, *(f"prior-{prior}.safetensors" for prior in PRIORS)}
    return not names or (CONFIG in names and names <= known)


def _settings(model: Model, overrides: Sequence[str]) -> str:
    """The model's config.yaml with `overrides`, as it is without any."""
    for key in (override.partition("=")[0] for override in overrides):
        if key not in SETTABLE:
            raise ConfigError(f"--set {key}: describes what was trained; an exported model can be given {', '.join(SETTABLE)}")
    if not overrides:
        return (model.folder / "config.yaml").read_text()
    cfg = with_overrides(model.cfg, overrides)
    for prior in {*PRIORS} & {*model.priors()}:
        model.conditions(prior).given(cfg.prior.told)  # raises InputError for what it does not know
    return dump_config(cfg)


def _smaller(name: str, value: Tensor) -> Tensor:
    """A prior's weights in half precision, and what it tells of single groups to three digits."""
    if name.startswith(NETWORKS):
        return _half(value)
    if name not in OF_GROUPS:
        return value
    return torch.tensor([rounded(number) for number in value.flatten().tolist()]).view(value.shape)


def _half(value: Tensor) -> Tensor:
    return value.to(torch.float16) if value.is_floating_point() else value
