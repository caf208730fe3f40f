"""Ways to need less memory in training: smaller batches, bf16, checkpointing, patches, in this order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ctvae.config import Config, Training
from ctvae.device import computes_bf16
from ctvae.networks import Size3, Wavelet3D
from ctvae.planning import dry
from ctvae.planning.sizes import smaller, written


@dataclass(frozen=True)
class Option:
    """A way to need less: in words, and as settings."""

    label: str
    changes: tuple[str, ...]


def options(cfg: Config, pinned: Collection[str] = (), stage: str | None = None) -> Iterator[Option]:
    """Ways to need less in training the autoencoder, its polish and its finish, or `stage` of them, down to the least there is.

    A smaller batch is made up for by accumulation. What is in `pinned` of batches, precision and the stages' own patches is left
    alone; of the rest it is told.
    """
    less: tuple[str, ...] = ()
    for batch, less in _smaller_batches(cfg, pinned, stage):
        yield Option(f"a batch of {batch}", less)
    half = _half_precision(_sections(cfg, stage), pinned)
    if half:
        less = (*less, *half)
        yield Option("bf16", less)
    if not isinstance(cfg.model, Wavelet3D):
        return
    if not cfg.model.checkpointing:
        yield Option("checkpointing", (*less, "model.checkpointing=true"))
    patches = list(_smaller_patches(cfg, pinned, stage))
    for patch, crops in patches:
        yield Option(f"patches of {written(patch)}", (*less, *crops))
    if patches and not cfg.model.checkpointing:
        patch, crops = patches[-1]
        yield Option(f"patches of {written(patch)} and checkpointing", (*less, "model.checkpointing=true", *crops))


def next_smaller(cfg: Config, stage: str, pinned: Collection[str] = ()) -> Option | None:
    """The first way for `stage` (autoencoder, polish, finish or prior) to need less than `cfg` that changes nothing `pinned`."""
    if stage != "prior":
        found: Iterator[Option] = (option for option in options(cfg, pinned, stage) if not keys(option) & set(pinned))
    else:
        found = prior_options(cfg, pinned)
    return next(found, None)


def prior_options(cfg: Config, pinned: Collection[str]) -> Iterator[Option]:
    """The same for the prior."""
    less: tuple[str, ...] = ()
    for batch in () if {"prior.batch", "prior.accumulate"} & set(pinned) else _divisors(cfg.prior.batch):
        less = _split("prior", cfg.prior, batch)
        yield Option(f"a batch of {batch}", less)
    half = _half_precision({"prior": cfg.prior}, pinned)
    if half:
        yield Option("bf16", (*less, *half))


def _smaller_batches(cfg: Config, pinned: Collection[str], stage: str | None) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The largest batch that is left, and the settings for it, from large to small; what is in `pinned` stays."""
    free = {
        name: section
        for name, section in _sections(cfg, stage).items()
        if not {f"{name}.batch", f"{name}.accumulate"} & set(pinned)
    }
    least = 2 if cfg.model.kind == "conv3d" else 1  # its BatchNorm needs more than one volume
    for most in sorted({batch for section in free.values() for batch in _divisors(section.batch, least)}, reverse=True):
        less: tuple[str, ...] = ()
        for name, section in free.items():
            if section.batch > most:
                less += _split(name, section, next(n for n in _divisors(section.batch, least) if n <= most))
        yield most, less


def _sections(cfg: Config, stage: str | None) -> dict[str, Training]:
    """Of the training before the prior and after it, or of `stage` alone."""
    known: dict[str, Training] = {"autoencoder": cfg.autoencoder}
    known |= {name: getattr(cfg, name) for name in ("polish", "finish") if getattr(cfg, name).enabled}
    return {name: section for name, section in known.items() if stage in (None, name)}


def _half_precision(sections: dict[str, Training], pinned: Collection[str]) -> tuple[str, ...]:
    """bf16 for those that are in float32, where this device computes in it."""
    keys = [f"{name}.precision" for name, section in sections.items() if section.precision == "fp32"]
    return tuple(f"{key}=bf16" for key in keys if key not in pinned) if computes_bf16() else ()


def _smaller_patches(cfg: Config, pinned: Collection[str], stage: str | None) -> Iterator[tuple[Size3, tuple[str, ...]]]:
    """Ever smaller patches, and the settings by which no step sees more than that."""
    crops: dict[str, Size3] = {}
    for name in _sections(cfg, stage):
        own = getattr(getattr(cfg, name), "patch", None) is not None
        if not own or f"{name}.patch" not in pinned:
            crops[f"{name if own else 'data'}.patch"] = dry.step_shape(cfg, name)
    d, h, w = (max(sides) for sides in zip(*crops.values(), strict=True)) if crops else (1, 1, 1)
    for size in smaller((d, h, w), cfg.model.grid):
        less = {key: [min(sides) for sides in zip(crop, size, strict=True)] for key, crop in crops.items()}
        yield size, tuple(f"{key}={crop}" for key, crop in less.items() if crop != list(crops[key]))


def _divisors(number: int, least: int = 1) -> list[int]:
    """Of `number`, below it, the largest first."""
    return [n for n in range(number - 1, least - 1, -1) if number % n == 0]


def _split(section: str, training: Training, batch: int) -> tuple[str, str]:
    """As many volumes per step as before, `batch` at a time."""
    together = training.batch * training.accumulate
    return f"{section}.batch={batch}", f"{section}.accumulate={together // batch}"


def keys(option: Option) -> set[str]:
    """Which settings it changes."""
    return {change.partition("=")[0] for change in option.changes}
