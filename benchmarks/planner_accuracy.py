"""The planner's predictions against resident memory on this CPU, each setting in a fresh process: a Markdown table.

    python benchmarks/planner_accuracy.py                    # all settings
    python benchmarks/planner_accuracy.py --only wavelet3d   # those whose name has this in it
    python benchmarks/planner_accuracy.py --default-malloc   # with the C library's own settings

What is measured is the real thing: `train_autoencoder` for two steps on four random groups, saving and validation included;
`polish_decoder` likewise; `train_prior` for a step of each network; `Model.encode` and `Model.decode`. The baseline is the
resident memory of the same process after the same work on a volume of the smallest size, so that Python, PyTorch and its
kernels' code are in it; the peak is Linux's own high-water mark (VmHWM), which is reset at the baseline.

Freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), as the model assumes.
With `--default-malloc` they may linger in the heap, and more is resident than PyTorch holds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ctvae.checkpoint import load
from ctvae.config import Config, load_recipe
from ctvae.dataset import Group
from ctvae.intensity import multiple_above
from ctvae.latents import LatentSet
from ctvae.model import open_model
from ctvae.models import build
from ctvae.networks import Size3
from ctvae.planning import dry
from ctvae.planning.sizes import parse_size, written
from ctvae.planning.workspace import Kernels
from ctvae.runlog import Run
from ctvae.training.autoencoder import VALIDATION_GROUPS, train_autoencoder
from ctvae.training.encoding import encode_groups
from ctvae.training.groups import TrainingGroups
from ctvae.training.polish import polish_decoder
from ctvae.training.prior import train_prior
from ctvae.volume import Volume

PROMPT_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_UP = (8, 8, 8)  # raised to the smallest size on the method's grid


@dataclass(frozen=True)
class Setting:
    method: str
    size: str
    what: str = "train"
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.what, self.method, self.size, *self.overrides])

    def config(self, size: Size3) -> Config:
        shape = multiple_above(size, load_recipe(self.method, self.overrides).model.grid)
        stages = (f"polish.enabled={self.what == 'polish'}", "finish.enabled=false")
        steps = ("autoencoder.steps=2", "polish.steps=2", "prior.steps=4", *stages, f"data.shape={list(shape)}")
        return load_recipe(self.method, (*self.overrides, *steps))


WHOLE = ("data.patch=null", "autoencoder.batch=1")
CHECKPOINTING = ("model.checkpointing=true",)
SETTINGS = [
    Setting("wavelet3d", "64x128x128"),
    Setting("wavelet3d", "64x128x128", overrides=WHOLE),
    Setting("wavelet3d", "64x128x128", overrides=(*WHOLE, *CHECKPOINTING)),
    Setting("wavelet3d", "64x256x256", overrides=WHOLE),
    Setting("wavelet3d", "64x256x256", overrides=(*WHOLE, *CHECKPOINTING)),
    Setting("wavelet3d", "64x256x256", overrides=("data.patch=[64,128,128]", "autoencoder.batch=1")),
    Setting("wavelet3d", "64x512x512", overrides=WHOLE),
    Setting("wavelet3d", "64x512x512", overrides=(*WHOLE, *CHECKPOINTING)),
    Setting("wavelet3d", "64x512x512", what="polish", overrides=(*WHOLE, "polish.batch=1")),
    Setting("wavelet3d", "64x256x256", what="polish", overrides=(*WHOLE, "polish.batch=1")),
    Setting("wavelet3d", "64x128x128", what="polish"),
    Setting("wavelet3d", "64x128x128", what="polish", overrides=("data.patch=null", "polish.batch=1")),
    Setting("wavelet3d", "64x128x128", what="polish", overrides=("polish.patch=whole", "polish.batch=1")),
    Setting("wavelet3d", "64x256x256", what="encode"),
    Setting("wavelet3d", "64x256x256", what="decode"),
    Setting("wavelet3d", "64x128x128", what="prior"),
    Setting("slice2d", "64x128x128"),
    Setting("slice2d", "64x256x256"),
    Setting("stack2d-small", "64x256x256"),
    Setting("stack2d-large", "64x256x256"),
    Setting("stack2d-4x32", "64x256x256"),
    Setting("conv3d", "64x128x128"),
    Setting("conv3d", "64x256x256"),
]


def predicted_bytes(setting: Setting) -> int:
    cfg = setting.config(parse_size(setting.size))
    kernels = Kernels("cpu", torch.get_num_threads())
    if setting.what == "train":
        return dry.training(cfg, kernels).peak
    if setting.what == "polish":
        return dry.polish(cfg, kernels)
    if setting.what == "prior":
        return max(dry.prior(cfg, VALIDATION_GROUPS, kernels).phases.values())
    use = {"encode": dry.encoding, "decode": dry.decoding}[setting.what]
    return use(cfg, dry.whole(cfg), cfg.data.tile, kernels)


# --- in the fresh process ------------------------------------------------------------------------------------------------


def measured_bytes(setting: Setting) -> int:
    peaks = {}
    for size in (WARM_UP, parse_size(setting.size)):
        with tempfile.TemporaryDirectory() as folder:
            peaks = work(setting, size, Path(folder) / "run")
    return peaks[setting.what]


def work(setting: Setting, size: Size3, folder: Path) -> dict[str, int]:
    """Train on random groups and use the model; the peak of each part over what was resident before it."""
    cfg = setting.config(size)
    hu = np.random.default_rng(0).integers(-1000, 1000, dry.whole(cfg), dtype=np.int16)
    groups, polished = (random_groups(cfg, hu, stage) for stage in ("autoencoder", "polish"))
    run = Run.create_or_resume(folder, cfg, "random")
    before = baseline()
    train_autoencoder(run, cfg, groups, groups)
    peaks = {"train": high_water() - before}
    if setting.what == "polish":
        before = baseline()
        polish_decoder(run, cfg, polished, polished)
        peaks["polish"] = high_water() - before
    elif setting.what == "prior":
        before = baseline()
        train_prior(run, cfg, encoded(folder, cfg, groups), None)
        peaks["prior"] = high_water() - before
    elif setting.what != "train":
        before = baseline()
        model = open_model(folder)
        mean = model.encode(Volume(hu.copy(), np.eye(4))).mean.clone()
        peaks["encode"] = high_water() - before
        del model
        before = baseline()
        open_model(folder).decode(mean)
        peaks["decode"] = high_water() - before
    return peaks


def encoded(folder: Path, cfg: Config, groups: TrainingGroups) -> LatentSet:
    network = build(cfg.model, groups.shape)
    network.load_state_dict(load(folder / "autoencoder.safetensors")[0])
    encode_groups(network.eval(), groups, cfg.prior, cfg.seed, folder / "latents", cfg.autoencoder.precision)
    return LatentSet.load(folder / "latents")


def random_groups(cfg: Config, hu: np.ndarray, stage: str) -> TrainingGroups:
    """As many groups as validation looks at, all the same array, by the patches of `stage`."""
    data = cfg.data.model_copy(update={"patch": cfg.patch_of(stage)})
    group = Group("random", "random", "train", "", None, hu.shape, (1.0, 1.0, 1.0), np.eye(4), 0.5, 0, "random", "")
    return TrainingGroups(SimpleNamespace(hu=lambda _: hu), [group] * VALIDATION_GROUPS, data, dry.whole(cfg))


def baseline() -> int:
    """Resident bytes, after giving back what can be given back; the high-water mark restarts here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def high_water() -> int:
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# --- the table -----------------------------------------------------------------------------------------------------------


def in_fresh_process(number: int, default_malloc: bool) -> int:
    environment = os.environ | ({} if default_malloc else PROMPT_MALLOC)
    command = [sys.executable, __file__, "--measure", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{SETTINGS[number].name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--default-malloc", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(measured_bytes(SETTINGS[arguments.measure]))
        return
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}", flush=True)
    print("| | method | size | settings | predicted GB | measured GB | predicted / measured |\n|---|---|---|---|---|---|---|")
    ratios = []
    for number, setting in enumerate(SETTINGS):
        if arguments.only in setting.name:
            predicted, measured = predicted_bytes(setting), in_fresh_process(number, arguments.default_malloc)
            ratios.append(predicted / measured)
            cells = [setting.what, setting.method, written(parse_size(setting.size)), " ".join(setting.overrides)]
            cells += [f"{predicted / 1e9:.3f}", f"{measured / 1e9:.3f}", f"{ratios[-1]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    print(f"\n{within} of {len(ratios)} within 10 %")


if __name__ == "__main__":
    main()
