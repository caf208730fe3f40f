"""Peak memory and time of one training step of every method, each in a fresh process.

    python benchmarks/step_memory.py                                      # all at 64 x 256 x 256, a Markdown table
    python benchmarks/step_memory.py --method conv3d --size 64 128 128    # one recipe, JSON
    python benchmarks/step_memory.py --method wavelet3d --set model.checkpointing=true

A step is the training loop's: the recipe's losses, precision (or `--precision`) and optimiser. On the CPU the peak is the
largest resident memory so far over what Python and torch hold before the network is built, with the C library told to give
freed blocks back (the variables of benchmarks/planner_accuracy.py); on CUDA it is what torch's allocator counts. The
planner's prediction of the same step stands beside it. `--steps 2` times the second step, when the momentum exists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import psutil
import torch

from ctvae.checkpoint import EMA
from ctvae.config import Config, load_recipe, recipe_names, with_overrides
from ctvae.device import generator, place
from ctvae.models import build
from ctvae.planning import dry
from ctvae.planning.workspace import Kernels
from ctvae.training.autoencoder import Objective
from ctvae.training.optimizer import build_optimizer

PROMPT_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far (VmHWM), Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure(cfg: Config, size: tuple[int, int, int], steps: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = psutil.Process().memory_info().rss
    network = build(cfg.model, size)
    place(network, device)
    ema, optimizer = EMA(network, cfg.autoencoder.ema_decay), build_optimizer(network, cfg.autoencoder)
    objective = Objective(network, cfg.autoencoder, cfg.data.window_hu)
    batch = cfg.autoencoder.batch
    x = torch.rand(batch, 1, *size, device=device) * 2 - 1
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.autoencoder.precision == "bf16"):
            terms = objective(x, generator(0, step))
        sum(terms.values()).backward()
        del terms
        optimizer.step()
        ema.update(network, step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes() - before
    whole = with_overrides(cfg, [f"data.shape={list(size)}", "data.patch=null"])
    predicted = dry.training(whole, Kernels(device.type, torch.get_num_threads()))
    return {
        "method": cfg.method,
        "size": size,
        "batch": batch,
        "precision": cfg.autoencoder.precision,
        "device": device.type,
        "parameters": sum(p.numel() for p in network.parameters()),
        "peak_gb": round(peak / 1e9, 3),
        "predicted_gb": round(predicted.phases["step"] / 1e9, 3),
        "seconds": round(seconds, 2),
    }


def in_fresh_process(method: str, arguments: argparse.Namespace) -> dict:
    size = [str(side) for side in arguments.size]
    command = [sys.executable, __file__, "--method", method, "--batch", str(arguments.batch), "--size", *size]
    command += ["--steps", str(arguments.steps)]
    command += [part for text in arguments.settings for part in ("--set", text)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | PROMPT_MALLOC)
    if done.returncode:
        return {"method": method, "failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout)


def table_row(row: dict) -> str:
    if "failed" in row:
        return f"| {row['method']} | | | | | {row['failed']} |"
    return (
        f"| {row['method']} | {row['precision']} | {row['parameters'] / 1e6:.1f} M "
        f"| {row['peak_gb']:.2f} GB | {row['predicted_gb']:.2f} GB | {row['seconds']:.2f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=recipe_names(), help="one recipe, in this process; none: all of them")
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="none: the recipe's")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for ctvae train")
    parser.add_argument("--steps", type=int, default=1, help="training steps; the last is timed")
    arguments = parser.parse_args()
    arguments.settings += [f"autoencoder.precision={arguments.precision}"] if arguments.precision else []
    if arguments.method and PROMPT_MALLOC.items() <= os.environ.items():
        depth, height, width = arguments.size
        cfg = load_recipe(arguments.method, [*arguments.settings, f"autoencoder.batch={arguments.batch}"])
        print(json.dumps(measure(cfg, (depth, height, width), arguments.steps)))
        return
    if arguments.method:  # the C library reads its variables when a process begins
        print(json.dumps(in_fresh_process(arguments.method, arguments)))
        return
    print("| method | precision | parameters | peak over baseline | predicted | one step |\n|---|---|---|---|---|---|")
    for method in recipe_names():
        print(table_row(in_fresh_process(method, arguments)), flush=True)


if __name__ == "__main__":
    main()
