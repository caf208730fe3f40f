"""The verb `mix`: the decoders of several finishes as one, the mean of their weights.

What a finish gains lies in the same direction whatever its seed, what it invents against its judge does not: in the mean of
weights that began as the same ones the former stays and the latter cancels (Wortsman et al. 2022, model soups;
docs/decisions/0006).

    OUT/config.yaml, prior-*.safetensors of the first, autoencoder.safetensors
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ctvae import checkpoint, files
from ctvae.errors import InputError, ModelError
from ctvae.model import Model, open_model
from ctvae.priors import CLOSED_FORM

CONFIG, AUTOENCODER = "config.yaml", "autoencoder.safetensors"
PRIORS = tuple(f"prior-{name}.safetensors" for name in ("flow", *CLOSED_FORM))
DECODER = "decoder."  # of the weights' names; all others must be the same


def mix(models: Sequence[Path | str], out: Path | str) -> Path:
    """Write the mean of the decoders of `models`, finished from the same weights, to `out`: a model without a calibration.

    Raises InputError for fewer than two models and where `out` holds something else, ModelError where their encoders or flows
    are not the same or their decoders have other sizes. A mix that was interrupted is begun anew: the autoencoder comes last.
    """
    if len(models) < 2:
        raise InputError("mix takes two models or more")
    parts, folder = [open_model(model) for model in models], Path(out)
    first = parts[0]
    for other in parts[1:]:
        _check_flow(first, other)
    mean, meta = _mean(parts)
    files.sweep(folder)
    if folder.exists() and not _unfinished({path.name for path in folder.iterdir()}):
        raise InputError(f"{folder}: is not empty; choose another folder")
    files.write_text(folder / CONFIG, (first.folder / CONFIG).read_text())
    for name in PRIORS:
        if (first.folder / name).is_file():
            with files.atomic(folder / name) as temporary:
                shutil.copyfile(first.folder / name, temporary)
    checkpoint.save(folder / AUTOENCODER, mean, meta)
    return folder


def _check_flow(first: Model, other: Model) -> None:
    if "flow" in first.priors() and ("flow" not in other.priors() or first.prior_hash("flow") != other.prior_hash("flow")):
        raise ModelError(f"{other.folder}: its flow is not that of {first.folder}; mix finishes of one and the same run")


def _mean(parts: Sequence[Model]) -> tuple[dict[str, Tensor], dict]:
    """Of all parts' weights, decoders averaged in double precision."""
    first, meta = checkpoint.load(parts[0].folder / AUTOENCODER)
    total = {name: value.double() for name, value in first.items() if name.startswith(DECODER)}
    for part in parts[1:]:
        tensors, _ = checkpoint.load(part.folder / AUTOENCODER)
        _check_encoder(parts[0], first, part, tensors)
        for name in total:
            total[name] += tensors[name].double()
    return {**first, **{name: (value / len(parts)).to(first[name].dtype) for name, value in total.items()}}, meta


def _check_encoder(first: Model, ours: dict[str, Tensor], other: Model, theirs: dict[str, Tensor]) -> None:
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        raise ModelError(f"{other.folder}: its autoencoder has other sizes than that of {first.folder}")
    if not all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.startswith(DECODER)):
        raise ModelError(f"{other.folder}: its encoder is not that of {first.folder}; mix finishes of one and the same run")


def _unfinished(names: set[str]) -> bool:
    """Whether a folder with these files is empty, or what a mix that was interrupted leaves."""
    return not names or (CONFIG in names and names <= {CONFIG, *PRIORS})
