"""Memory of one training step of a large flow, its network whole in each process (DDP) or cut up over them (FSDP).

    MALLOC_MMAP_THRESHOLD_=131072 torchrun --standalone --nproc-per-node 2 benchmarks/sharded_step.py [--shard]
        [--widths 192 256 384] [--blocks 2]

Each process prints one line of JSON: bytes of weights, gradients, momentum and averages after the step, counted, and the most
memory that was resident during it, beyond what the process had before there was a network. Linux, on the CPU; without the
variable glibc keeps what is freed, and that counts as resident.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ctvae.checkpoint import EMA
from ctvae.config import load_recipe
from ctvae.device import generator, make_fabric, place
from ctvae.ranks import Ranks, joined, leave
from ctvae.sharding import whole
from ctvae.training.optimizer import build_optimizer
from ctvae.training.prior import Batch, FlowObjective, build_velocity
from ctvae.wiener import WienerVelocity

SHAPE = (8, 2, 8, 8)  # small: the memory of activations is not what is asked
SIZE = 8 * 2 * 8 * 8
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 256, 384])
    parser.add_argument("--blocks", type=int, default=2)
    arguments = parser.parse_args()
    sizes = [f"prior.widths={arguments.widths}", f"prior.blocks={arguments.blocks}"]
    with joined() as ranks:
        cfg = load_recipe("wavelet3d", [*sizes, f"prior.shard={arguments.shard}", "prior.precision=fp32"])
        print(json.dumps(measured(cfg.prior, ranks)), flush=True)


def measured(settings, ranks: Ranks) -> dict[str, float]:
    """As `train_flow` does it: two steps to warm up, and the third one measured."""
    before = memory("VmRSS")
    wiener = WienerVelocity(torch.zeros(SIZE), torch.zeros(2, SIZE), torch.ones(SIZE))
    network = build_velocity(settings, SHAPE, 3, wiener)
    weights = sum(parameter.numel() for parameter in network.parameters())
    fabric = make_fabric(settings.precision, ranks, settings.shard)
    place(network, fabric.device, channels_last=not settings.shard)
    objective = fabric.setup_module(FlowObjective(network, settings, ranks))
    ema, optimizer = EMA(network, settings.ema_decay), build_optimizer(network, settings)
    batch = Batch(torch.randn(1, *SHAPE), torch.full((1, *SHAPE), 0.1), torch.zeros(1, 3))
    for step in range(3):
        reset_peak()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(objective(batch, generator(0, step)).mean())
        whole(torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm))
        optimizer.step()
        ema.update(network, step)
    seconds = time.perf_counter() - start
    parameters = list(network.parameters())
    state = [*parameters, *(p.grad for p in parameters), *ema.weights.values()]
    state += [value for values in optimizer.state.values() for value in values.values()]
    return {
        "weights": weights, "state_mb": sum(map(held_bytes, state)) / MB, "peak_mb": (memory("VmHWM") - before) / MB,
        "seconds": seconds,
    }  # fmt: skip


def held_bytes(tensor: torch.Tensor) -> int:
    """In this process."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def memory(name: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> None:
    """VmHWM counts from here on."""
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
    leave(0)
