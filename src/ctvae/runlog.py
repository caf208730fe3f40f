"""The run folder: what is being trained, how far it is, and its measured curve.

    run/config.yaml             every setting
    run/run.json                the data it was trained on, the stages finished
    run/autoencoder.safetensors the averaged weights, once that stage is done
    run/prior-*.safetensors     the priors, once that stage is done
    run/latents/                the training groups' posterior moments
    run/checkpoints/            training state, the last two of each network
    run/logs/                   metrics as CSV and TensorBoard events
    run/previews/               pictures made while training
    run/.lock                   held by the process that trains
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctvae import files
from ctvae.checkpoint import Checkpoints
from ctvae.config import Config, Training, dump_config, load_config
from ctvae.errors import ConfigError, InputError, ModelError
from ctvae.ranks import ALONE, Ranks, is_first
from ctvae.version import __version__

MOST_STATE_BYTES = 2**24
WARM_SHARE = 0.1  # of the minutes, for warming up
MEMORY_SETTINGS = {  # a plan for less or more memory changes these; the network's weights stay what they are
    "model": ("checkpointing",),
    "data": ("patch", "tile"),
    "autoencoder": ("batch", "accumulate", "precision"),
    "polish": ("batch", "accumulate", "precision", "patch"),
    "finish": ("batch", "accumulate", "precision", "patch"),
    "prior": ("batch", "accumulate", "precision"),
}


def refuse_foreign(folder: Path) -> None:
    """Raises InputError where a run cannot begin or go on in `folder`."""
    if (folder / "config.yaml").exists() or not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    left = {"run.json", files.LOCK}  # run.json: stopped before there were settings
    if any(path.name not in left and not files.is_partial(path) for path in folder.iterdir()):
        raise InputError(f"{folder}: is neither empty nor a ctvae run; choose another folder for --out")


class Run:
    """A run folder. Opening one that exists checks that it belongs to the same settings and data."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create_or_resume(
        cls, folder: Path, cfg: Config, dataset_fingerprint: str, planned: Sequence[str] = (), replanned: bool = False
    ) -> Run:
        """`planned`: those of the settings that nobody asked for, to resume with. `replanned`: they may be others than before.

        Raises ConfigError where the folder holds a run with other settings or data.
        """
        run = cls(folder)
        for written in (folder, folder / "checkpoints", folder / "logs", folder / "previews"):
            files.sweep(written)
        if run.config_path.exists():
            run._check(cfg, dataset_fingerprint, replanned)
            if list(planned) != run.state.get("planned", []):
                run.replan(cfg, planned)
            return run
        refuse_foreign(folder)
        state = {"ctvae": __version__, "dataset": dataset_fingerprint, "stages": {}, "planned": list(planned)}
        files.write_json(run.folder / "run.json", state)
        files.write_text(run.config_path, dump_config(cfg))
        return run

    def replan(self, cfg: Config, planned: Sequence[str]) -> None:
        """From here on with these settings, which differ in what a plan decides only."""
        if is_first():
            files.write_text(self.config_path, dump_config(cfg))
            self.note(planned=list(planned))

    def _check(self, cfg: Config, dataset_fingerprint: str, replanned: bool) -> None:
        old = load_config(self.config_path)
        if _comparable(old, replanned) != _comparable(cfg, replanned):
            raise ConfigError(
                f"{self.folder}: was begun with other settings ({_differences(old, cfg)}); "
                "repeat the first command or choose another --out"
            )
        if self.state["dataset"] != dataset_fingerprint:
            raise ConfigError(f"{self.folder}: was begun on another dataset; choose another --out")

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def state(self) -> dict[str, Any]:
        try:
            state = files.read_json(self.folder / "run.json", MOST_STATE_BYTES)
            if not isinstance(state.get("stages"), dict) or not isinstance(state.get("dataset"), str):
                raise ValueError("'stages' or 'dataset' is missing")
            return state
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.folder}: run.json is missing or damaged ({error})") from error

    def note(self, **entries: Any) -> None:
        """Add entries to run.json. Of several processes the first does."""
        if is_first():
            files.write_json(self.folder / "run.json", {**self.state, **entries})

    def stage_done(self, stage: str) -> bool:
        return stage in self.state["stages"]

    def finish_stage(self, stage: str, **figures: Any) -> None:
        self.note(stages={**self.state["stages"], stage: figures})

    def forget_stage(self, stage: str) -> None:
        """As if it had not been done."""
        self.note(stages={name: figures for name, figures in self.state["stages"].items() if name != stage})

    def checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", name)


class Clock:
    """Training time of one stage, counted over all its sessions, and the learning rate's place in it.

    With `minutes` the stage ends when steps or minutes are used up, whichever is first, and the decay follows the larger
    share. Without, everything depends on the step alone and a resumed run is bit-equal to one that ran through. Of several
    processes the first one's clock counts, or they would stop at different steps.
    """

    def __init__(
        self, cfg: Training, steps: int, minutes: float | None, seconds_before: float = 0.0, ranks: Ranks = ALONE
    ):  # fmt: skip
        self.cfg, self.steps, self.minutes, self.ranks = cfg, steps, minutes, ranks
        self._before, self._start = seconds_before, time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end. Of several processes all ask for it, once a step."""
        share, minutes = step / self.steps, self.minutes
        if minutes is None:
            return min(1.0, share)
        return min(1.0, self.ranks.told(lambda: max(share, self.seconds / (60 * minutes))))

    def seconds_left(self, step: int, first_step: int) -> float:
        if step <= first_step:
            return math.nan
        per_step = (time.monotonic() - self._start) / (step - first_step)
        left = (self.steps - step) * per_step
        return left if self.minutes is None else max(0.0, min(left, 60 * self.minutes - self.seconds))

    def lr(self, step: int, progress: float) -> float:
        """Linear warm-up, over a tenth of the minutes at most, then a cosine to 1 % of the peak (Loshchilov and Hutter 2017)."""
        shortly = 0.0 if self.minutes is None else progress / WARM_SHARE
        warm = min(1.0, max((step + 1) / self.cfg.warmup, shortly))
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)) if self.cfg.decay == "cosine" else 1.0
        return self.cfg.lr * warm * cosine


class Curve:
    """One stage's metrics: a row per report in a CSV file, and the same in TensorBoard's format. The first process writes."""

    def __init__(self, run: Run, name: str, resumed_at: int):
        self.path = run.folder / "logs" / f"{name}.csv"
        self._name, self._events = name, run.folder / "logs"
        self._writer: Any = None
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._rows_until(resumed_at)
        if rows:
            files.write_text(self.path, "".join(rows))
        else:
            self.path.unlink(missing_ok=True)

    def _rows_until(self, step: int) -> list[str]:
        """The heading and the rows up to `step`, without a line that a full disk cut short."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return whole[:1] + [row for row in whole[1:] if int(row.split(",")[0]) <= step]

    def log(self, step: int, values: dict[str, float]) -> None:
        if not is_first():
            return
        columns = self._columns()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if not columns:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{values[name]:.6g}" for name in columns[1:] or values)])
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._events, purge_step=step)
        for key, value in values.items():
            self._writer.add_scalar(f"{self._name}/{key}", value, step)

    def _columns(self) -> list[str]:
        """Those of the file as it stands; a run that an earlier version began keeps its own."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return next(csv.reader(file), [])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _comparable(cfg: Config, replanned: bool) -> dict[str, Any]:
    """What makes a run that run: not its minutes (it ends sooner or later), nor what memory decides where it is planned anew.

    Nor how many processes hold the prior while it trains.
    """
    tree = cfg.model_dump(mode="json")
    tree["prior"].pop("shard")
    for name, section in tree.items():
        for key in ("minutes", *(MEMORY_SETTINGS.get(name, ()) if replanned else ())):
            if isinstance(section, dict):
                section.pop(key, None)
    return tree


def _differences(old: Config, new: Config) -> str:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    shown = [f"{key}: {before.get(key)} there, {after.get(key)} now" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
