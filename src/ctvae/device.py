"""Where to compute: Lightning Fabric chooses the device; a seed for every (seed, step)."""

from __future__ import annotations

from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import nn


def make_fabric(precision: Literal["bf16", "fp32"] = "bf16") -> Fabric:
    """One device: CUDA or Apple's if there is one, else the CPU. Precision is autocast around the network's calls."""
    fabric = Fabric(accelerator="auto", devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true")
    return fabric


def place(network: nn.Module, device: torch.device) -> None:
    """Move `network` to `device`, its 3D convolutions' weights channels-last, the order in which they run fastest."""
    network.to(device)
    if any(weight.ndim == 5 for weight in network.parameters()):
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone, so that a resumed run draws what the first would have."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 31 + stream) % 2**63)


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The items of step `step` when `count` items are shuffled anew each epoch: a function of (seed, step) alone."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=generator(seed, epoch, stream=7))
        indices.append(int(order[place]))
    return indices
