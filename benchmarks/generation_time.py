"""Time to draw and decode a volume, with the solver's defaults, for a model of the recipe at any size.

    python benchmarks/generation_time.py --size 64 256 256 --out FOLDER

Time does not depend on what the weights are: the model is trained for a step on phantoms of that size. Drawing and decoding are
timed apart, the first volume, which warms up, is left out; then the whole command is timed once, start of Python included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from ctvae.generate import load
from ctvae.phantoms import write_phantoms
from ctvae.prepare import prepare
from ctvae.training.train import train

SCANS = 8
ONE_STEP = [
    "autoencoder.steps=1",
    "polish.enabled=false",
    "finish.enabled=false",
    "prior.steps=1",
    "prior.encodings=1",
    "prior.looks=0",
]


def model_of(size: tuple[int, int, int], out: Path) -> Path:
    """A run folder under `out`; one that is there already is taken."""
    name = "x".join(map(str, size))
    scans, dataset, run = (out / f"{what}-{name}" for what in ("scans", "dataset", "run"))
    if not (dataset / "dataset.json").exists():
        write_phantoms(scans, SCANS, shape=size)
        prepare([scans], dataset, slices=size[0])
    train(dataset, run, overrides=ONE_STEP)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), metavar=("D", "H", "W"))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    run = model_of(tuple(asked.size), asked.out)
    model, drawing, decoding = load(run), [], []
    for index in range(asked.count + 1):
        start = time.perf_counter()
        latent = model.draw("flow", 0, index).latent
        between = time.perf_counter()
        model.decode(latent)
        drawing.append(between - start)
        decoding.append(time.perf_counter() - between)
    start = time.perf_counter()
    command = [sys.executable, "-m", "ctvae", "generate", str(run), "--out", str(asked.out / "one"), "-n", "1", "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    print(f"{model.shape}, {model.cfg.prior.sampling_steps} steps, {torch.get_num_threads()} thread(s)")
    print(f"drawing {median(drawing[1:]):.1f} s, decoding {median(decoding[1:]):.1f} s, the command {whole:.1f} s")


if __name__ == "__main__":
    main()
