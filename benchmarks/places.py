"""Where reconstructions differ from their scans from voxel to voxel: outlines, lungs, cavities, tissue, with and without
calibration.

    python benchmarks/places.py headneck hn --split validation --groups 24

One line per place: mean |difference| of neighbours in the soft tissue window in HU, of the scans, decoded, and calibrated, and
the ratios; power of fine detail in the body; for lungs and cavities the share of the body's voxels below -900 HU. The places are
each volume's own. Then the levels of soft tissue: how much they differ between groups, and from their own scan's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctvae import intensity, preprocess
from ctvae.calibration import BODY, Places, Window, body, detail, highest, level_of
from ctvae.dataset import Dataset
from ctvae.device import generator
from ctvae.model import open_model

STEPS: dict[str, Callable[[Tensor, Places, Window], Tensor]] = {
    "outline": lambda x, places, soft: places.rim & body(x),
    "even tissue": lambda x, places, soft: ~(places.empty | places.rim) & (highest(x, 1) < soft[1]) & (-highest(-x, 1) > soft[0]),
    "body": lambda x, places, soft: body(x),
}
DARK_HU = -900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--groups", type=int, default=24)
    asked = parser.parse_args()
    model, data = open_model(asked.model), Dataset.open(asked.dataset)
    if model.calibration is None:
        raise SystemExit(f"{asked.model}: has no calibration; train --stage calibration --from {asked.model} gives it one")
    soft, (low, high) = model.calibration.soft, model.cfg.data.window_hu
    groups = data.groups(asked.split)
    order = torch.randperm(len(groups), generator=generator(0, 0)).tolist()[: asked.groups]
    total = {side: {} for side in ("scans", "decoded", "calibrated")}  # type: dict[str, dict[str, list[float]]]
    levels = {side: [] for side in total}  # type: dict[str, list[float]]
    for index in order:
        volume = data.volume(groups[index])
        posterior = model.encode(volume)
        raw = model.raw(posterior.mean)
        toned = model.toned(raw)
        real = torch.from_numpy(intensity.from_hu(preprocess.cut(volume, posterior.box).hu, (low, high)))[None, None]
        whole = model.calibration(raw, toned, level_of(toned, soft))
        for side, x in (("scans", real), ("decoded", toned), ("calibrated", whole)):
            _add(total[side], x.clamp(-1, 1), soft, 2 * (DARK_HU - low) / (high - low) - 1)
            levels[side].append((high - low) / 2 * (level_of(x, soft) or 0.0))
    print(f"{len(order)} {asked.split} groups, {asked.model}")
    for name in total["scans"]:
        scans, decoded, calibrated = (total[side][name][0] / max(1.0, total[side][name][1]) for side in total)
        dark = name.startswith("below")
        unit = "% of the body" if dark else "HU^2" if name.startswith("power") else "HU"
        scale = {"% of the body": 100, "HU": (high - low) / 2, "HU^2": ((high - low) / 2) ** 2}[unit]
        numbers = f"{scale * scans:7.2f} {scale * decoded:7.2f} {scale * calibrated:7.2f} {unit}"
        print(f"{name:28s} {numbers:40s} ratios {decoded / scans:.2f} {calibrated / scans:.2f}")
    known = {side: np.array(values) for side, values in levels.items()}
    for name, of in (("spread between groups", np.std), ("off their scan's", lambda x: np.abs(x - known["scans"]).mean())):
        print(f"{'level, ' + name:28s} " + " ".join(f"{of(values):7.2f}" for values in known.values()) + " HU")


def _add(total: dict[str, list[float]], x: Tensor, soft: Window, dark: float) -> None:
    places, window = Places.of(x, soft), x.clamp(*soft)
    for name, where in STEPS.items():
        chosen = where(x, places, soft)
        for axis, letter in ((2, "D"), (3, "H"), (4, "W")):
            size = x.shape[axis] - 1
            both = chosen.narrow(axis, 0, size) & chosen.narrow(axis, 1, size)
            _sum(total, f"steps, {name}, {letter}", window.diff(dim=axis).abs()[both].sum(), both.sum())
    _sum(total, "power of fine detail", detail(x, soft)[body(x)].square().sum(), body(x).sum())
    for name, place in (("lungs", places.lung), ("cavities", places.cavity)):
        _sum(total, f"below {DARK_HU} HU, {name}", (place & (x < dark)).sum(), (x > BODY).sum())


def _sum(total: dict[str, list[float]], name: str, value: Tensor, count: Tensor) -> None:
    sums = total.setdefault(name, [0.0, 0.0])
    sums[0] += float(value)
    sums[1] += float(count)


if __name__ == "__main__":
    main()
