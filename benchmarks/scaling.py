"""Time and memory against the number of scans: of `ctvae prepare`, or of what `ctvae train` does with latents.

    python benchmarks/scaling.py --counts 100 1000 10000 --workers 2 --out /tmp/scaling
    python benchmarks/scaling.py --counts 100 1000 10000 --what prior --out /tmp/scaling

prepare: synthetic scans of 64 x 16 x 16 voxels. Each count is prepared in a fresh process, and then once more, when there is
nothing to do. What is measured: processor seconds (of all processes), wall seconds, the greatest memory of the process that
leads and of one that works, and the size of dataset.json.

prior: synthetic latents of 4 x 8 x 8 x 16 numbers, as many as scans, in a fresh process: processor seconds of writing them in
shards, of the one pass over all of them, of the closed forms (from 1,000 of them at most), of a search for copies among all of
them, and of 20 steps of a small flow; the greatest resident memory in each of these, and before (Linux).

A straight line through each, its share of the variance, and the slope between logarithms (1: linear, 0: flat) say whether time is
linear and memory flat.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

SHAPE = (64, 16, 16)  # D H W
PER_FOLDER = 1000
LATENT = (4, 8, 8, 16)  # Z d h w
FLOW_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--what", choices=("prepare", "prior"), default="prepare")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for scans and datasets; deleted again")
    arguments = parser.parse_args()
    measure = {"prepare": measure_prepare, "prior": measure_prior}[arguments.what]
    rows = []
    for count in arguments.counts:
        folder = arguments.out / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        rows.append({"scans": count, **measure(folder, count, arguments.workers)})
        print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(folder)
    if len(rows) > 1:
        for key in list(rows[0])[1:]:
            print(_line(key, [row["scans"] for row in rows], [row[key] for row in rows]))


def measure_prepare(folder: Path, count: int, workers: int) -> dict[str, float]:
    write_scans(folder / "scans", count)
    first, again = (_in_new_process(_prepare, folder, workers) for _ in range(2))
    again = {f"again_{key}": again[key] for key in ("cpu_seconds", "leader_mb")}
    return {**first, **again, "dataset_json_mb": round((folder / "dataset" / "dataset.json").stat().st_size / 1e6, 2)}


def measure_prior(folder: Path, count: int, _: int) -> dict[str, float]:
    return _in_new_process(_prior, folder, count)


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


def _in_new_process(work: Callable[[Path, int], dict[str, float]], folder: Path, number: int) -> dict[str, float]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, work, folder, number))
    process.start()
    theirs.close()  # or nobody would notice that it died
    figures = ours.recv()
    process.join()
    return figures


def _send(pipe: Connection, work: Callable[[Path, int], dict[str, float]], folder: Path, number: int) -> None:
    pipe.send(work(folder, number))


def _prepare(folder: Path, workers: int) -> dict[str, float]:
    from ctvae.prepare import prepare

    start = time.monotonic()
    prepare(folder / "scans", folder / "dataset", workers=workers)
    wall = time.monotonic() - start
    for worker in active_children():  # only of those that have ended and were waited for is anything known
        worker.join()
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "cpu_seconds": round(mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime, 2),
        "wall_seconds": round(wall, 1),
        "leader_mb": round(mine.ru_maxrss / 1024, 1),
        "worker_mb": round(theirs.ru_maxrss / 1024, 1),
    }


def _prior(folder: Path, count: int) -> dict[str, float]:
    from ctvae.config import load_recipe
    from ctvae.latents import LatentCode, LatentSet
    from ctvae.runlog import Run
    from ctvae.training.prior import Conditioning, Data, build_velocity, fit_closed_form, fit_wiener, flow_batches, train_flow
    from ctvae.training.watch import Watch

    steps = [f"prior.{key}={FLOW_STEPS}" for key in ("steps", "save_every", "log_every")]
    sizes = ["prior.batch=8", "prior.widths=[16,32]", "prior.detail_width=0", "prior.blocks=1"]
    cfg = load_recipe("wavelet3d", [*steps, *sizes, "prior.looks=0"])
    run = Run.create_or_resume(folder / "run", cfg, "none")
    figures = {"before_mb": _peak_mb()}
    with _timed(figures, "write"):
        write_latents(folder / "latents", count)
    latents = LatentSet.load(folder / "latents")
    with _timed(figures, "pass"):
        code = LatentCode.fit(latents)
    with _timed(figures, "closed_forms"):
        fit_closed_form(run, latents.plain())
        wiener = fit_wiener(cfg.prior, code, latents)
    held_out = latents.chosen(range(min(100, count)))
    watch = Watch(code, wiener, latents, held_out, held_out.conditions, 0)
    with _timed(figures, "copies"):
        watch.known.closeness(watch.held_out)
    conditioning = Conditioning.fit(latents.conditions)
    network = build_velocity(cfg.prior, latents.shape, len(latents.names), wiener)
    with _timed(figures, "flow"):
        train_flow(run, cfg, network, Data(latents, None, flow_batches(cfg, code, conditioning)))
    figures["mb"] = max(peak for name, peak in figures.items() if name.endswith("_mb"))
    return {**figures, "latents_mb": round(count * 4 * math.prod(LATENT) / 1e6, 1)}


def write_latents(folder: Path, count: int) -> None:
    """As `encode_groups` does, of random numbers along ten directions and a little noise."""
    import torch

    from ctvae.conditions import OF_GROUP
    from ctvae.latents import Writer

    told, logvars = torch.zeros(1, len(OF_GROUP)), torch.full((1, *LATENT), -4.0).half()
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(10, math.prod(LATENT), generator=random)
    writer = Writer(folder, [f"scan_{n:06d}" for n in range(count)], torch.full((count,), 300.0), OF_GROUP, "random")
    for _ in range(writer.begun(), count):
        row = torch.randn(10, generator=random) @ directions + 0.3 * torch.randn(math.prod(LATENT), generator=random)
        writer.add(row.view(1, *LATENT).half(), logvars, told)


@contextmanager
def _timed(figures: dict[str, float], what: str) -> Iterator[None]:
    """Processor seconds and peak memory of the block."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    start = time.process_time()
    yield
    figures[f"{what}_cpu_seconds"] = round(time.process_time() - start, 2)
    figures[f"{what}_mb"] = _peak_mb()


def _peak_mb() -> float:
    """Since the start, or since it was forgotten."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1)


def _line(key: str, counts: list[int], values: list[float]) -> str:
    slope, start = np.polyfit(counts, values, 1)
    rest = np.array(values) - np.polyval([slope, start], counts)
    explained = 1 - float(np.square(rest).sum() / max(1e-9, np.square(np.array(values) - np.mean(values)).sum()))
    power = np.polyfit(np.log(counts), np.log(values), 1)[0] if min(values) > 0 else math.nan
    return (f"{key}: {1000 * slope:.3g} per 1000 scans + {start:.3g} (R^2 {explained:.4f}; log-log slope {power:.2f}); "
            f"at 50000: {50_000 * slope + start:.0f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
