"""Quality against number of evaluations: how far samples at few steps lie from the exact solution of the same seeds.

    python benchmarks/solver_curve.py MODEL -n 4 --try ab2:logit:20 ab2:equal:20 heun:equal:25

Prints a Markdown table: root mean square over the latents' numbers (in the flow's own units, in which data have unit variance)
of the distance from the solution of `--reference`, mean over seeds, with the least and the greatest, and the root mean square of
the samples themselves, which is 1 for training latents. Seconds are of this machine as it is.

    python benchmarks/solver_curve.py MODEL --try ab2:logit:20 --autoguidance 1 1.2 1.4

shows what autoguidance does to the samples: distances then are from the reference without it.
"""

from __future__ import annotations

import argparse
import time

import torch

from ctvae import flow
from ctvae.generate import Model, load
from ctvae.sampling import Sampling

TRIED = [f"{solver}:{schedule}:{10 if solver == 'heun' else 20}" for solver in flow.SOLVERS for schedule in flow.SCHEDULES]


def how(text: str, **weights: float) -> Sampling:
    """`ab2:logit:20`: solver, schedule, steps."""
    solver, schedule, steps = text.split(":")
    return Sampling(int(steps), solver, schedule=schedule, **weights)


def samples(model: Model, asked: Sampling, seed: int, count: int) -> torch.Tensor:
    """As the flow sees them: [count P]."""
    drawn = [model.draw("flow", seed, index, asked=asked).latent for index in range(count)]
    return model._flow.code.encode(torch.cat(drawn)).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", "--count", type=int, default=4)
    parser.add_argument("--try", dest="tried", nargs="+", default=TRIED, metavar="SOLVER:SCHEDULE:STEPS")
    parser.add_argument("--autoguidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--reference", default="heun:logit:64")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    model = load(asked.model)
    exact = samples(model, how(asked.reference, autoguidance=1.0), asked.seed, asked.count)
    print(f"reference {asked.reference}: root mean square {exact.square().mean().sqrt():.4f}\n")
    print("| solver | schedule | steps | evaluations | autoguidance | RMS distance | least to greatest | RMS | s a volume |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for sampling in (how(text, autoguidance=weight) for text in asked.tried for weight in asked.autoguidance):
        start = time.perf_counter()
        x = samples(model, sampling, asked.seed, asked.count)
        seconds = (time.perf_counter() - start) / asked.count
        off = (x - exact).square().mean(1).sqrt()
        cells = [sampling.solver, sampling.schedule, sampling.steps, flow.evaluations(sampling.solver, sampling.steps)]
        cells += [sampling.autoguidance, f"{off.mean():.4f}", f"{off.min():.4f} to {off.max():.4f}"]
        print("|", " | ".join(map(str, [*cells, f"{x.square().mean().sqrt():.4f}", f"{seconds:.1f}"])), "|", flush=True)


if __name__ == "__main__":
    main()
