"""Training patches per second from a prepared dataset: our reader, MONAI's PersistentDataset and TorchIO's queue, in one run.

    python benchmarks/patch_reading.py DATASET --patch 32 64 64 --count 200

Each is given the same scans and cuts one random patch at a time out of a random one, scaled from HU to -1..1, in this process
(no workers). The peers read NIfTI files that this script writes from the dataset's groups, as their users have them; MONAI
keeps them decoded on the disk from the first pass on, TorchIO draws `--per-volume` patches from each volume that it has read.
The first pass over the data is timed apart: it fills MONAI's cache. TorchIO is optional (`pip install torchio`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ctvae.config import load_recipe
from ctvae.dataset import Dataset
from ctvae.training.groups import TrainingGroups, training_shape

LOW, HIGH = -1000.0, 1000.0


def ours(dataset: Dataset, patch: tuple[int, ...], groups: int) -> Iterator[torch.Tensor]:
    cfg = load_recipe("wavelet3d", [f"data.patch={list(patch)}"])
    chosen = dataset.groups("train")[:groups]
    reader = TrainingGroups(dataset, chosen, cfg.data, training_shape(dataset, cfg))
    for step in range(10**9):
        yield reader.batch(1, 0, step)[0]


def monai(files: list[Path], patch: tuple[int, ...], cache: Path) -> Iterator[torch.Tensor]:
    from monai.data import PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, RandSpatialCrop, ScaleIntensityRange

    steps = [LoadImage(image_only=True), EnsureChannelFirst(), ScaleIntensityRange(LOW, HIGH, -1, 1, clip=True)]
    data = PersistentDataset(files, Compose([*steps, RandSpatialCrop(patch, random_size=False)]), cache_dir=cache)
    random = np.random.default_rng(0)
    while True:
        for index in random.permutation(len(files)):
            yield data[int(index)]


def torchio(files: list[Path], patch: tuple[int, ...], per_volume: int) -> Iterator[torch.Tensor]:
    import torchio as tio

    scale = tio.Compose([tio.Clamp(LOW, HIGH), tio.RescaleIntensity((-1, 1), in_min_max=(LOW, HIGH))])
    subjects = tio.SubjectsDataset([tio.Subject(ct=tio.ScalarImage(path)) for path in files], transform=scale)
    queue = tio.Queue(
        subjects, max_length=4 * per_volume, samples_per_volume=per_volume, sampler=tio.UniformSampler(patch), num_workers=0
    )
    while True:
        for number in range(len(queue)):
            yield queue[number]["ct"]["data"]


def written(dataset: Dataset, groups: int, folder: Path) -> list[Path]:
    """The first groups as NIfTI, x y z, with their affines."""
    files = []
    for number, group in enumerate(dataset.groups("train")[:groups]):
        files.append(folder / f"{number}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(dataset.hu(group)).transpose(2, 1, 0), group.affine), files[-1])
    return files


def rates(patches: Iterator[torch.Tensor], first_pass: int, count: int, size: int) -> tuple[float, float]:
    """Patches per second while every scan is read for the first time, and after."""
    return _rate(patches, first_pass, size), _rate(patches, count, size)


def _rate(patches: Iterator[torch.Tensor], count: int, size: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        patch = next(patches)
        assert patch.numel() == size
        assert -1.001 <= float(patch.min()) <= float(patch.max()) <= 1.001
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--groups", type=int, default=16, help="how many of the training groups")
    parser.add_argument("--count", type=int, default=200, help="patches after the first pass")
    parser.add_argument("--per-volume", type=int, default=8, help="TorchIO's patches from each volume read")
    arguments = parser.parse_args()
    dataset, patch = Dataset.open(arguments.dataset), tuple(arguments.patch)
    flipped = patch[::-1]  # the peers hold x y z
    with tempfile.TemporaryDirectory() as folder:
        files = written(dataset, arguments.groups, Path(folder))
        readers: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "ctvae": lambda: ours(dataset, patch, arguments.groups),
            "MONAI PersistentDataset": lambda: monai(files, flipped, Path(folder) / "cache"),
            "TorchIO queue": lambda: torchio(files, flipped, arguments.per_volume),
        }
        print(f"{len(files)} groups, patches of {'x'.join(map(str, patch))}, {torch.get_num_threads()} thread(s)")
        print("| reader | patches per second, first pass | after |\n|---|---|---|")
        for name, reader in readers.items():
            try:
                first, then = rates(reader(), len(files), arguments.count, int(np.prod(patch)))
            except ImportError as error:
                print(f"| {name} | not installed ({error.name}) | |", flush=True)
                continue
            print(f"| {name} | {first:.1f} | {then:.1f} |", flush=True)


if __name__ == "__main__":
    main()
