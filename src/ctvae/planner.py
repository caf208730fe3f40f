"""The verb `plan`: what a run needs, before it runs, and settings with which it fits the memory there is.

    plan = planner.plan("wavelet3d", (64, 512, 512), memory_gb=24)
    plan.train_peak_gb, plan.note, plan.overrides

Nothing is computed: networks, losses and optimisers run on tensors without memory (`planning/`). Where what was asked
does not fit, settings are changed in this order until it does: smaller batch, bf16, checkpointing, patches (half in
plane, then half in depth). Settings that the caller has set are left alone. docs/planner.md says how far to trust the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml

from ctvae import intensity
from ctvae.config import Config, load_recipe, with_overrides
from ctvae.dataset import Dataset
from ctvae.device import computes_bf16
from ctvae.errors import ConfigError, DoesNotFit, InputError
from ctvae.model import SMALLEST_TILE
from ctvae.networks import Size3, Wavelet3D
from ctvae.planning import dry, stages
from ctvae.planning.dry import TrainingCost
from ctvae.planning.remedies import Option, keys, options, prior_options
from ctvae.planning.remembered import remembered
from ctvae.planning.report import Plan
from ctvae.planning.sizes import parse_size, smaller, strides_for, written
from ctvae.planning.workspace import Kernels
from ctvae.runlog import MEMORY_SETTINGS
from ctvae.training.pace import SHARPENING, TRAINED, shares, steps_for, wants, without_sharpening

MEMORY_KEYS = frozenset(f"{section}.{key}" for section, keys in MEMORY_SETTINGS.items() for key in keys)
KEPT_FREE = 0.1  # share of the memory that a plan leaves: the prediction's own error, and what else runs
GB = 1e9
NO_BF16 = "fp32, as this machine does not compute in bf16"


@dataclass(frozen=True)
class Source:
    """What is known of the data: size of a training group, spacing x y z, number of training groups (0: not known)."""

    size: Size3
    spacing_mm: tuple[float, float, float] | None = None
    groups: int = 0

    @classmethod
    def asked(cls, dataset: Path | str | None, size: str | None) -> Source:
        """As the command line asks: a dataset's own, a size such as 64x512x512, or that size with the dataset's spacing.

        Raises ConfigError where there is neither, InputError where `dataset` is none.
        """
        if dataset is not None:
            measured = cls.of(Dataset.open(dataset))
            return replace(measured, size=parse_size(size)) if size else measured
        if size is None:
            raise ConfigError("plan: name a DATASET or a size, e.g. --size 64x512x512")
        return cls(parse_size(size))

    @classmethod
    def of(cls, dataset: Dataset) -> Source:
        """The largest training group, median spacing, number of groups. Raises InputError where there are none."""
        groups = dataset.groups("train")
        if not groups:
            raise InputError(f"{dataset.folder}: no training groups; prepare more scans")
        d, h, w = (max(sides) for sides in zip(*(group.shape for group in groups), strict=True))
        x, y, z = (sorted(steps)[len(groups) // 2] for steps in zip(*(group.spacing_mm for group in groups), strict=True))
        return cls((d, h, w), (x, y, z), len(groups))


def plan(
    method: str,
    size: Size3,
    memory_gb: float | None = None,
    overrides: Sequence[str] = (),
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    groups: int = 0,
) -> Plan:
    """The first settings that fit `memory_gb` (none: of this machine), as asked if possible.

    `spacing_mm` (x y z) chooses wavelet3d's strides; without it they are the recipe's. Raises DoesNotFit, in one line
    with the need and the nearest thing that fits, and ConfigError for an unknown method or setting.
    """
    found = weigh(method, Source(size, spacing_mm, groups), memory_gb, overrides)
    if not found.fits:
        raise DoesNotFit(found.note)
    return found


def weigh(
    method: str, source: Source, memory_gb: float | None = None, overrides: Sequence[str] = (), *, elsewhere: bool = False
) -> Plan:
    """As `plan`, but where nothing fits the plan of what was asked, with `fits` false and the refusal as its note.

    `elsewhere`: for another machine, which is taken to compute in bf16 if the recipe says so, whatever this one does.
    """
    return _Search(method, source, memory_gb or machine_memory_gb(), tuple(overrides), elsewhere).best()


def with_hours(found: Plan, hours: float) -> Plan:
    """`found` with steps that take `hours` on this machine, measured: it trains a few steps for real, of both stages.

    Polish and finish get their shares in minutes, or are left out where there are too few.
    """
    cfg = load_recipe(found.method, found.overrides)
    short = without_sharpening(cfg, 60 * hours, pinned={text.partition("=")[0] for text in found.overrides})
    cfg = with_overrides(cfg, short)
    lengths = [*short, *steps_for(cfg, hours)]
    timed = {name: share for name, share in shares(cfg, "both").items() if name in SHARPENING}
    lengths += [f"{name}.minutes={60 * hours * share:.4g}" for name, share in timed.items()]
    told = {key.replace(".", "_"): yaml.safe_load(text) for key, _, text in (setting.partition("=") for setting in lengths)}
    kept = [text for text in found.overrides if text.partition("=")[0] not in {text.partition("=")[0] for text in lengths}]
    return replace(found, overrides=(*kept, *lengths), plan={**found.plan, **told})


def machine_memory_gb() -> float:
    """The CUDA card's memory, or what is available of the machine's."""
    if torch.cuda.is_available():
        return round(torch.cuda.get_device_properties(0).total_memory / GB, 1)
    return round(psutil.virtual_memory().available / GB, 1)


def this_device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- the search ----------------------------------------------------------------------------------------------------------


def patches_on_grid(cfg: Config) -> tuple[str, ...]:
    """The patches that were asked for, up to the next size that the network takes. Raises ConfigError where there are none."""
    asked = {section: getattr(cfg, section).patch for section in ("data", "polish", "finish")}
    sizes = {section: patch for section, patch in asked.items() if isinstance(patch, tuple)}
    if sizes and not isinstance(cfg.model, Wavelet3D):
        raise ConfigError(f"{min(sizes)}.patch: {cfg.method} trains on whole groups; patches are for wavelet3d")
    return tuple(f"{name}.patch={list(intensity.multiple_above(size, cfg.model.grid))}" for name, size in sizes.items())


def precision_overrides(cfg: Config, pinned: Collection[str] = ()) -> tuple[str, ...]:
    """float32, as settings, where the recipe says bf16, nobody has asked for it and this device does not compute in it."""
    if computes_bf16():
        return ()
    halves = [name for name in TRAINED if wants(cfg, name) and getattr(cfg, name).precision == "bf16"]
    return tuple(f"{name}.precision=fp32" for name in halves if f"{name}.precision" not in pinned)


def strides_override(cfg: Config, source: Source, pinned: Collection[str] = ()) -> str | None:
    """wavelet3d's strides for the data's spacing and slices, as a setting; None where they are `cfg`'s or `pinned`."""
    if not isinstance(cfg.model, Wavelet3D) or source.spacing_mm is None or "model.strides" in pinned:
        return None
    strides = strides_for(source.spacing_mm, source.size, len(cfg.model.strides))
    return None if strides == cfg.model.strides else f"model.strides={[list(step) for step in strides]}"


@dataclass(frozen=True)
class _Search:
    method: str
    source: Source
    memory_gb: float
    asked: tuple[str, ...]
    elsewhere: bool = False

    def best(self) -> Plan:
        base = self._base()
        asked = load_recipe(self.method, base)
        tried = [(Option("the settings as they are", ()), remembered(dry.training, asked, self._kernels))]
        chosen = tried[0] if self._fits(tried[0][1].peak) else None
        standing = {asked.autoencoder.precision: tried[0][1].standing}
        for option in options(asked, self._pinned) if chosen is None else ():
            cfg = load_recipe(self.method, (*base, *option.changes))
            between = standing.get(cfg.autoencoder.precision, 0)  # steps, where nothing but the precision helps
            if not (self._fits(between) and self._promising(cfg, asked, tried[0][1])):
                continue
            tried.append((option, remembered(dry.training, cfg, self._kernels)))
            standing.setdefault(cfg.autoencoder.precision, tried[-1][1].standing)
            if self._fits(tried[-1][1].peak):
                chosen = chosen or (tried[-1] if self._free(option) else None)
                if any(cfg.patch_of(name) != asked.patch_of(name) for name in TRAINED):
                    break  # what is smaller still is of no interest
        return self._plan(base, tried, chosen)

    @property
    def _kernels(self) -> Kernels:
        return Kernels(this_device(), torch.get_num_threads())

    def _base(self) -> tuple[str, ...]:
        """What was asked, made definite: strides from the spacing, sizes on the grid."""
        settings = self.asked
        cfg = load_recipe(self.method, settings)
        strides = strides_override(cfg, self.source, self._pinned)
        if strides is not None:
            settings = (*settings, strides)
            cfg = load_recipe(self.method, settings)
        shape = intensity.multiple_above(cfg.data.shape or self.source.size, cfg.model.grid)
        precision = () if self.elsewhere else precision_overrides(cfg, self._pinned)
        return (*settings, *precision, f"data.shape={list(shape)}", *patches_on_grid(cfg))

    @property
    def _pinned(self) -> set[str]:
        return {text.partition("=")[0] for text in self.asked}

    def _free(self, option: Option) -> bool:
        """Whether an option changes nothing that the caller has set."""
        return not self._pinned & keys(option)

    def _promising(self, cfg: Config, asked: Config, cost: TrainingCost) -> bool:
        """Whether smaller volumes may fit, were all but weights and the like in proportion to them; spares most dry runs."""
        share = _voxels(cfg) / _voxels(asked)
        scaled = (cost.activations + cost.workspace) * share
        return share == 1 or self._fits((cost.phases["step"] - cost.activations - cost.workspace + scaled) / 1.2)

    def _fits(self, peak: float) -> bool:
        return peak / GB <= self.memory_gb * (1 - KEPT_FREE)

    # --- the plan from what was found ------------------------------------------------------------------------------------

    def _plan(self, base: tuple[str, ...], tried: list, chosen: tuple[Option, TrainingCost] | None) -> Plan:
        option, cost = chosen or tried[0]
        cfg = load_recipe(self.method, (*base, *option.changes))
        use = self._use(cfg)
        changed, prior = self._prior(cfg)
        if use.tile != cfg.data.tile and isinstance(cfg.model, Wavelet3D):
            changed = (*changed, f"data.tile={list(use.tile)}")
        settled = load_recipe(self.method, (*base, *option.changes, *changed))
        fits = chosen is not None and self._fits(max(use.encoding, use.decoding, *prior.values()))
        return Plan(
            method=self.method,
            size=self.source.size,
            padded=dry.whole(cfg),
            memory_gb=self.memory_gb,
            device=this_device(),
            fits=fits,
            as_asked=fits and not option.changes and not changed,
            note=(self._note(tried, chosen, max(prior.values())) if fits or chosen is None else self._note_on_use(use, prior))
            + _besides(settled, asked=load_recipe(self.method, self.asked)),
            train_peak_gb=_gb(cost.peak),
            prior_peak_gb=_gb(max(prior.values())),
            encode_peak_gb=_gb(use.encoding),
            decode_peak_gb=_gb(use.decoding),
            parameters=cost.parameters,
            gflop_per_step=round(cost.flops / 1e9, 1),
            plan=_chosen(settled),
            overrides=_definite((*base, *option.changes, *changed), settled),
            step_gb=_parts(cost),
            train_phases_gb={name: _gb(peak) for name, peak in cost.phases.items()},
            prior_phases_gb={name: _gb(peak) for name, peak in prior.items()},
            stages=tuple(stages.stages(cfg, dry.step_shape(cfg))),
        )

    def _use(self, cfg: Config) -> Use:
        """Encoding and decoding by the largest tile that fits, or the smallest there is."""
        tiles = [cfg.data.tile]
        if isinstance(cfg.model, Wavelet3D) and "data.tile" not in self._pinned:
            tiles += smaller(cfg.data.tile, cfg.model.grid, SMALLEST_TILE)
        for tile in tiles:
            size = dry.whole(cfg)
            use = Use(tile, *(remembered(peak, cfg, size, tile, self._kernels) for peak in (dry.encoding, dry.decoding)))
            if self._fits(max(use.encoding, use.decoding)):
                break
        return use

    def _prior(self, cfg: Config) -> tuple[tuple[str, ...], dict[str, int]]:
        """The first settings with which the prior fits, its batch divided and made up for, and its peaks by phase."""
        standing = least = 0.0  # of any batch, and of a batch of one beyond that
        *larger, last = ((), *(option.changes for option in prior_options(cfg, self._pinned)))
        for changes in (*larger, last):
            tried = with_overrides(cfg, changes)
            if changes != last and not self._fits(standing + least * tried.prior.batch):
                continue
            cost = remembered(dry.prior, tried, self.source.groups, self._kernels)
            if self._fits(max(cost.phases.values())):
                break
            standing, least = cost.standing, (cost.phases["flow"] - cost.standing) / tried.prior.batch
        return changes, cost.phases

    # --- in words --------------------------------------------------------------------------------------------------------

    def _note(self, tried: list[tuple[Option, TrainingCost]], chosen: tuple[Option, TrainingCost] | None, prior: int) -> str:
        asked = tried[0][1].peak
        if chosen is tried[0]:
            more = f", that of the prior {_amount(prior)}," if prior > asked else ""
            return f"fits: training needs {_amount(asked)}{more} of {self.memory_gb:g}"
        need = self._need(asked)
        fitting = [f"{option.label} ({_amount(cost.peak)})" for option, cost in tried[1:] if self._fits(cost.peak)]
        if not fitting:
            phase = max(tried[0][1].phases, key=lambda name: tried[0][1].phases[name])
            where = "" if phase in ("step", "polish") else f" for {phase}"
            return f"{self.method} on {written(self.source.size)} {need}{where}; {self._nearest_size(tried)}"
        note = f"{need}; fits with {' or '.join(fitting)}"
        if chosen is None:
            return f"{self.method} on {written(self.source.size)} {note}; leave out the --set that forbids it"
        return f"{note}; planned with {chosen[0].label}"

    def _need(self, peak: int) -> str:
        said_gb = round(peak / GB, 2)
        free = f", {KEPT_FREE:.0%} of which stay free" if said_gb <= self.memory_gb else ""  # or the two numbers say nothing
        return f"needs {_amount(peak)} of {self.memory_gb:g}{free}"

    def _nearest_size(self, tried: list[tuple[Option, TrainingCost]]) -> str:
        """The largest smaller group that fits with the settings as asked, or the least that was seen."""
        asked = load_recipe(self.method, self._base())
        for size in smaller(dry.whole(asked), asked.model.grid, asked.model.grid):
            try:
                smaller_group = load_recipe(self.method, (*self._base(), f"data.shape={list(size)}"))
                cost = remembered(dry.training, smaller_group, self._kernels)
                if self._fits(cost.peak):
                    return f"fits on {written(size)} ({_amount(cost.peak)})"
            except ConfigError:  # too small for the method
                break
        option, cost = min(tried, key=lambda pair: pair[1].peak)
        return f"the least is {_amount(cost.peak)}, with {option.label}"

    def _note_on_use(self, use: Use, prior: dict[str, int]) -> str:
        needs = {"encoding": use.encoding, "decoding": use.decoding, "training the prior": max(prior.values())}
        name, peak = max(needs.items(), key=lambda pair: pair[1])
        fitting = max(prior, key=lambda phase: prior[phase]) == "fitting"
        remedy = "fewer groups or prior.encodings=1" if fitting else "a smaller size"
        where = f"{self.method} on {written(self.source.size)}"
        return f"{where}: {name} {self._need(peak)}; try {remedy}"


@dataclass(frozen=True)
class Use:
    """Peaks of encoding and decoding by tiles of `tile` voxels."""

    tile: Size3
    encoding: int
    decoding: int


def _amount(count: int) -> str:
    """Bytes as people compare them: 41.2 GB, 0.58 GB."""
    gb = count / GB
    return f"{gb:.1f} GB" if gb >= 10 else f"{gb:.2f} GB"


def _voxels(cfg: Config) -> int:
    return cfg.autoencoder.batch * math.prod(dry.step_shape(cfg))


def _chosen(cfg: Config) -> dict[str, Any]:
    own = {f"{name}_patch": getattr(cfg, name).patch for name in ("polish", "finish") if wants(cfg, name)}
    return {
        "whole_volume": dry.step_shape(cfg) == dry.whole(cfg),
        "patch": cfg.data.patch,
        **{name: patch for name, patch in own.items() if patch is not None},
        "batch": cfg.autoencoder.batch,
        "accumulate": cfg.autoencoder.accumulate,
        "checkpointing": isinstance(cfg.model, Wavelet3D) and cfg.model.checkpointing,
        "precision": cfg.autoencoder.precision,
        "strides": cfg.model.strides if isinstance(cfg.model, Wavelet3D) else None,
        "prior_batch": cfg.prior.batch,
        "decode_tile": cfg.data.tile if isinstance(cfg.model, Wavelet3D) else dry.whole(cfg),
    }


def _besides(cfg: Config, asked: Config) -> str:
    """What else there is to say: that the numbers leave something out, or why the precision is another."""
    parts = [f"the network of {name}.perceptual is not counted" for name in ("polish", "finish")
             if wants(cfg, name) and getattr(cfg, name).perceptual != "none"]  # fmt: skip
    if (cfg.autoencoder.precision, asked.autoencoder.precision) == ("fp32", "bf16"):
        parts.append(NO_BF16)
    return "".join(f"; {part}" for part in parts)


def _definite(settings: tuple[str, ...], cfg: Config) -> tuple[str, ...]:
    """`settings`, and the ones a person may want to edit spelled out; the last of equal keys wins."""
    spelled = {
        "data.patch": "null" if cfg.data.patch is None else str(list(cfg.data.patch)),
        "autoencoder.batch": str(cfg.autoencoder.batch),
        "autoencoder.accumulate": str(cfg.autoencoder.accumulate),
        "autoencoder.precision": cfg.autoencoder.precision,
    }
    if isinstance(cfg.model, Wavelet3D):
        spelled["model.checkpointing"] = str(cfg.model.checkpointing).lower()
        spelled["data.tile"] = str(list(cfg.data.tile))
    given = {key: text for key, _, text in (setting.partition("=") for setting in settings)}
    return tuple(f"{key}={text}" for key, text in {**spelled, **given}.items())


def _parts(cost: TrainingCost) -> dict[str, float]:
    """What adds up to the step's peak. While all activations are held, few gradients are there."""
    names = ("weights", "gradients", "optimizer", "average", "activations", "workspace")
    parts = {name: getattr(cost, name) for name in names}
    parts["gradients"] -= max(0, sum(parts.values()) - cost.phases["step"])
    return {name: _gb(count) for name, count in parts.items()}


def _gb(count: int) -> float:
    return round(count / GB, 3)
