"""How much less a decoder draws near the sides of a patch than within, and in whole volumes than in patches.

    python benchmarks/patch_sides.py MODEL DATASET [--split train] [--patch 32 48 64] [--groups 24]

Groups of a split are reconstructed whole and in random patches, by the means of their posteriors. What is printed is
the mean |difference| of neighbours in soft tissue (-160 to 240 HU, both above the lower end), in HU, by the distance of the
nearer one to the patch's nearest side, in voxels: of the scans, of patches cut from what was reconstructed whole, and of patches
that were encoded and decoded by themselves. Because of this losses of polish and finish leave the sides out (`margin`).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ctvae import intensity
from ctvae.dataset import Dataset
from ctvae.generate import load

SOFT_HU = (-160.0, 240.0)
EVERY = 2  # voxels in a range of distances
PATCHES = 3  # of each group


def steps(hu: NDArray, sums: NDArray) -> None:
    """Adds to `sums` [ranges 2] the differences and how many there are, of a patch [D H W]."""
    sides = [np.minimum(np.arange(size), np.arange(size)[::-1]) for size in hu.shape]
    distance = np.minimum.reduce(np.meshgrid(*sides, indexing="ij"))
    for axis in range(3):
        x, d = np.moveaxis(hu, axis, 0), np.moveaxis(distance, axis, 0)
        both = (x[1:] > SOFT_HU[0]) & (x[:-1] > SOFT_HU[0])
        step = np.abs(np.diff(x.clip(*SOFT_HU), axis=0))[both]
        bins = np.minimum(np.minimum(d[1:], d[:-1])[both] // EVERY, len(sums) - 1)
        sums[:, 0] += np.bincount(bins, step, len(sums))
        sums[:, 1] += np.bincount(bins, minlength=len(sums))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 48, 64))
    parser.add_argument("--groups", type=int, default=24)
    options = parser.parse_args()
    model, data = load(options.model), Dataset.open(options.dataset)
    window, grid, patch = model.cfg.data.window_hu, model.cfg.model.grid, options.patch
    random, ranges = np.random.default_rng(0), min(patch) // 2 // EVERY
    found: dict[str, NDArray] = defaultdict(lambda: np.zeros((ranges, 2)))

    def again(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return model.network.decode(model.network.encode(x)[0]).float()

    groups = data.groups(options.split)
    for group in groups[:: max(1, len(groups) // options.groups)][: options.groups]:
        hu = data.hu(group).astype(np.float32).clip(*window)
        size = intensity.multiple_above(tuple(max(pair) for pair in zip(hu.shape, patch, strict=True)), grid)
        hu = intensity.fit_to_shape(hu, size, (0, 0, 0))
        x = torch.from_numpy(intensity.from_hu(hu, window))[None, None].to(model.device)
        whole = again(x)
        for _ in range(PATCHES):
            rooms = [(most - side) // step for most, side, step in zip(size, patch, grid, strict=True)]
            places = [step * int(random.integers(room + 1)) for room, step in zip(rooms, grid, strict=True)]
            cut = (0, 0, *(slice(place, place + side) for place, side in zip(places, patch, strict=True)))
            alone = again(x[cut][None, None].contiguous())[0, 0]
            for name, values in (("scans", x[cut]), ("whole", whole[cut]), ("patches", alone)):
                steps(intensity.to_hu(values.cpu().numpy(), window).astype(np.float32), found[name])
    print("| of | " + " | ".join(f"{EVERY * n} to {EVERY * n + 1}" for n in range(ranges)) + " | all |")
    print("|---" * (ranges + 2) + "|")
    for name, sums in found.items():
        each = [*(sums[:, 0] / sums[:, 1].clip(1)), sums[:, 0].sum() / sums[:, 1].sum().clip(1)]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in each) + " |")


if __name__ == "__main__":
    main()
