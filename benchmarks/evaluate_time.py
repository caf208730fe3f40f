"""How long `ctvae evaluate` takes and how much memory, for 100 real and 100 synthetic groups of 64x128x128.

    python benchmarks/evaluate_time.py shared/data/headneck --out timing

The real side is the lowest 64 slices of scans in the folder; the synthetic side is the highest 64 slices with noise: what
they hold does not matter here. The command is stopped once with Ctrl-C after a third of the scans, and called again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ctvae import nifti
from ctvae.volume import Volume, plain_affine

SHAPE = (64, 128, 128)


def write_sides(source: Path, count: int, out: Path) -> None:
    files = sorted(source.glob("*.nii.gz"))
    for index in range(count):
        low, high = (out / side / f"{side}_{index:03d}.nii.gz" for side in ("real", "synthetic"))
        if low.exists() and high.exists():
            continue
        volume = nifti.read(files[index])[0]
        affine = plain_affine(volume.spacing_mm, SHAPE)
        noise = np.random.default_rng(index).normal(0, 5, SHAPE)
        nifti.write(low, Volume(fitted(volume.hu[: SHAPE[0]]), affine))
        nifti.write(high, Volume(fitted(volume.hu[-SHAPE[0] :] + noise[: len(volume.hu)]), affine))


def fitted(hu: np.ndarray) -> np.ndarray:
    """int16 [64 128 128], missing slices as air."""
    whole = np.full(SHAPE, -1000, dtype=np.int16)
    whole[: len(hu)] = np.rint(hu[:, : SHAPE[1], : SHAPE[2]]).clip(-1024, 3071)
    return whole


def run(command: list[str], stop_after: int | None, kept: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak GB of a command, which is stopped once `kept` holds `stop_after` files."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(0.2)
        if stop_after and kept.is_dir() and len(list(kept.glob("*.safetensors"))) >= stop_after:
            process.send_signal(signal.SIGINT)
            process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = {"exit": process.returncode, "seconds": time.monotonic() - begun, "processor_seconds": cpu}
    return {**told, "peak_gb": after.ru_maxrss / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    write_sides(asked.source, asked.count, asked.out)
    report = asked.out / "report"
    sides = ["--real", asked.out / "real", "--synthetic", asked.out / "synthetic"]
    command = [sys.executable, "-m", "ctvae", "evaluate", *map(str, sides), "--out", str(report)]
    (report / "report.json").unlink(missing_ok=True)
    first = run(command, 2 * asked.count // 3, report / ".partial")
    kept = len(list((report / ".partial").glob("*.safetensors")))
    second = run(command, None, report / ".partial")
    told = {"stopped": first, "scans_kept": kept, "again": second, "load_average": os.getloadavg(), "cores": os.cpu_count()}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
