"""Quality against number of evaluations: how far samples at few steps lie from the exact solution of the same seeds.

    python benchmarks/solver_curve.py MODEL -n 4 --steps 4 8 16 32

Prints a Markdown table: root mean square over the latents' numbers (in the flow's own units, in which data have unit variance)
of the distance from Heun's solution at 100 steps, mean over seeds, with the least and the greatest. Seconds are of this machine
as it is.
"""

from __future__ import annotations

import argparse
import time

import torch

from ctvae import flow
from ctvae.generate import load
from ctvae.sampling import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", "--count", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--reference", type=int, default=100, help="Heun steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    asked = parser.parse_args()
    model = load(asked.model)
    encode = model._flow.code.encode

    def samples(solver: str, steps: int) -> torch.Tensor:
        how = Sampling(steps, solver, asked.guidance)
        return torch.cat([encode(model.draw("flow", asked.seed, index, asked=how).latent) for index in range(asked.count)])

    exact = samples("heun", asked.reference)
    print("| evaluations | solver | steps | RMS distance | least to greatest | s a volume |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    rows = sorted((flow.evaluations(solver, steps), solver, steps) for solver in flow.SOLVERS for steps in asked.steps)
    for count, solver, steps in rows:
        start = time.perf_counter()
        off = (samples(solver, steps) - exact).square().flatten(1).mean(1).sqrt()
        seconds = (time.perf_counter() - start) / asked.count
        spread = f"{off.min().item():.4f} to {off.max().item():.4f}"
        print(f"| {count} | {solver} | {steps} | {off.mean().item():.4f} | {spread} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
