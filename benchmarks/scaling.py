"""Time and memory of `ctvae prepare` against the number of scans, on synthetic scans of 64 x 16 x 16 voxels.

    python benchmarks/scaling.py --counts 100 1000 10000 --workers 2 --out /tmp/scaling

Each count is prepared in a fresh process, and then once more, when there is nothing to do. What is measured: processor seconds
(of all processes), wall seconds, the greatest memory of the process that leads and of one that works, and the size of
dataset.json. A straight line through the processor seconds, and its share of the variance, say whether the time is linear.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

SHAPE = (64, 16, 16)  # D H W
PER_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for scans and datasets; deleted again")
    arguments = parser.parse_args()
    rows = []
    for count in arguments.counts:
        folder = arguments.out / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        write_scans(folder / "scans", count)
        row = {"scans": count, **_in_new_process(folder, arguments.workers)}
        again = _in_new_process(folder, arguments.workers)
        row |= {"again_cpu_seconds": again["cpu_seconds"], "again_leader_mb": again["leader_mb"]}
        row["dataset_json_mb"] = round((folder / "dataset" / "dataset.json").stat().st_size / 1e6, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder)
    if len(rows) > 1:
        for key in ("cpu_seconds", "again_cpu_seconds", "leader_mb", "worker_mb"):
            print(_line(key, [row["scans"] for row in rows], [row[key] for row in rows]))


def write_scans(folder: Path, count: int) -> None:
    """`count` NIfTI files, a thousand per folder, all different."""
    from ctvae import nifti
    from ctvae.volume import Volume, plain_affine

    rng = np.random.default_rng(0)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE[1:]), indexing="ij")
    body = np.where((y / 0.7) ** 2 + (x / 0.8) ** 2 < 1, 60, -1000)
    nifti.write(folder / "first.nii", Volume(np.zeros(SHAPE, np.int16), plain_affine((20.0, 20.0, 3.0), SHAPE)))
    header = (folder / "first.nii").read_bytes()[:352]
    (folder / "first.nii").unlink()
    for n in range(count):
        path = folder / f"{n // PER_FOLDER:03d}" / f"scan_{n:06d}.nii"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(header + (body + rng.integers(-20, 20, SHAPE)).astype("<i2").tobytes())


def _in_new_process(folder: Path, workers: int) -> dict[str, float]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_prepare, args=(theirs, folder, workers))
    process.start()
    figures = ours.recv()
    process.join()
    return figures


def _prepare(pipe: Connection, folder: Path, workers: int) -> None:
    from ctvae.prepare import prepare

    start = time.monotonic()
    prepare(folder / "scans", folder / "dataset", workers=workers)
    wall = time.monotonic() - start
    for worker in active_children():  # only of those that have ended and were waited for is anything known
        worker.join()
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    pipe.send(
        {
            "cpu_seconds": round(mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime, 2),
            "wall_seconds": round(wall, 1),
            "leader_mb": round(mine.ru_maxrss / 1024, 1),
            "worker_mb": round(theirs.ru_maxrss / 1024, 1),
        }
    )


def _line(key: str, counts: list[int], values: list[float]) -> str:
    slope, start = np.polyfit(counts, values, 1)
    rest = np.array(values) - np.polyval([slope, start], counts)
    explained = 1 - float(np.square(rest).sum() / max(1e-9, np.square(np.array(values) - np.mean(values)).sum()))
    return f"{key}: {1000 * slope:.3g} per 1000 scans + {start:.3g} (R^2 {explained:.4f}); at 50000: {50_000 * slope + start:.0f}"


if __name__ == "__main__":
    sys.exit(main())
