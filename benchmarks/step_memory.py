"""Peak memory and time of one training step of every method, each in a fresh process.

    python benchmarks/step_memory.py                                      # all at 64 x 256 x 256, a Markdown table
    python benchmarks/step_memory.py --method conv3d --size 64 128 128    # one recipe, JSON

A step is encode, sample, decode, loss, backward and Adam, in the recipe's precision (or `--precision`). On the CPU the
peak is the largest resident memory so far over what Python and torch hold before the network is built; on CUDA it is
what torch's allocator counts. `--steps 2` times the second step, when Adam's moments exist.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import psutil
import torch

from ctvae.config import Config, load_recipe, recipe_names
from ctvae.models import build


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far (VmHWM), Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def training_step(network: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, bf16: bool) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        mean, logvar = network.encode(x)
        y = network.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    ((y.float() - x).abs().mean() + kl).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(cfg: Config, size: tuple[int, int, int], precision: str, batch: int, steps: int) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = psutil.Process().memory_info().rss
    network = build(cfg.model, size).to(device)
    if cfg.model.kind in ("wavelet3d", "conv3d"):
        network = network.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(network.parameters())
    x = torch.rand(batch, 1, *size, device=device) * 2 - 1
    for _ in range(steps):
        start = time.perf_counter()
        training_step(network, optimizer, x, bf16=precision == "bf16")
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes() - before
    return {
        "method": cfg.method,
        "size": size,
        "batch": batch,
        "precision": precision,
        "device": device.type,
        "parameters": sum(p.numel() for p in network.parameters()),
        "peak_rss_gb": round(peak / 1e9, 3),
        "seconds": round(seconds, 2),
    }


def in_fresh_process(method: str, arguments: argparse.Namespace) -> dict:
    size = [str(side) for side in arguments.size]
    command = [sys.executable, __file__, "--method", method, "--batch", str(arguments.batch), "--size", *size]
    command += ["--steps", str(arguments.steps)]
    if arguments.precision:
        command += ["--precision", arguments.precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"method": method, "failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout)


def table_row(row: dict) -> str:
    if "failed" in row:
        return f"| {row['method']} | | | | {row['failed']} |"
    return (
        f"| {row['method']} | {row['precision']} | {row['parameters'] / 1e6:.1f} M "
        f"| {row['peak_rss_gb']:.2f} GB | {row['seconds']:.2f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=recipe_names(), help="one recipe, in this process; none: all of them")
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="none: the recipe's")
    parser.add_argument("--steps", type=int, default=1, help="training steps; the last is timed")
    arguments = parser.parse_args()
    if arguments.method:
        cfg = load_recipe(arguments.method)
        precision = arguments.precision or cfg.autoencoder.precision
        depth, height, width = arguments.size
        print(json.dumps(measure(cfg, (depth, height, width), precision, arguments.batch, arguments.steps)))
        return
    print("| method | precision | parameters | peak over baseline | one step |\n|---|---|---|---|---|")
    for method in recipe_names():
        print(table_row(in_fresh_process(method, arguments)), flush=True)


if __name__ == "__main__":
    main()
