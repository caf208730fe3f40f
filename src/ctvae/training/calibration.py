"""The last stage: what the decoder does to outlines, lungs and fine detail, measured on training groups (`calibration.py`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ctvae import intensity, preprocess
from ctvae.calibration import FILE as CALIBRATION
from ctvae.calibration import NUMBERS, Example, Window, fit
from ctvae.dataset import Dataset
from ctvae.device import generator
from ctvae.model import Model
from ctvae.progress import Progress
from ctvae.runlog import Run
from ctvae.training.autoencoder import Reconstruction

MOST_GROUPS, FEWEST_GROUPS = 64, 4
MOST_VOXELS = 2**25  # of all groups: each takes 20 bytes while the calibration is fitted


def calibrate(run: Run, data: Dataset) -> None:
    """Reconstruct some training groups and fit run/calibration.safetensors to them; all else stays as it is."""
    model = Model(run.folder)
    soft = Reconstruction(model.cfg.autoencoder, model.cfg.data.window_hu).soft
    soft = soft if soft[0] < soft[1] else (-1.0, 1.0)
    examples = list(_examples(model, data, soft))
    calibration = fit(examples, soft)
    calibration.save(run.folder / CALIBRATION)
    numbers = {name: round(getattr(calibration, name), 4) for name in NUMBERS}
    if calibration.grain is not None:
        low, high = model.cfg.data.window_hu
        for name in ("soft", "lung"):
            taps = getattr(calibration.grain, name)
            numbers[f"grain_{name}_hu"] = round(float(taps.square().sum().sqrt()) * (high - low) / 2, 2)  # standard deviation
    run.finish_stage("calibration", groups=len(examples), **numbers)


def _examples(model: Model, data: Dataset, soft: Window) -> Iterator[Example]:
    model.calibration = None
    groups = data.groups("train")
    order = torch.randperm(len(groups), generator=generator(model.cfg.seed, 0, stream=53)).tolist()[:MOST_GROUPS]
    voxels = 0
    with Progress("calibration", total=len(order)) as bar:
        for number, index in enumerate(order):
            volume = data.volume(groups[index])
            posterior = model.encode(volume)
            hu = preprocess.cut(volume, posterior.box).hu
            voxels += hu.size
            if number >= FEWEST_GROUPS and voxels > MOST_VOXELS:
                return
            raw = model.raw(posterior.mean)
            real = torch.from_numpy(intensity.from_hu(hu, model.cfg.data.window_hu))[None, None]
            yield Example(raw, model.toned(raw), real, soft)
            bar.update(number + 1)
