"""Where to compute: Lightning Fabric chooses the device, or one for each process; a seed for every (seed, step)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor, nn

from ctvae.ranks import ALONE, Ranks
from ctvae.sharding import shard

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # of x86


def make_fabric(precision: Literal["bf16", "fp32"] = "bf16", ranks: Ranks = ALONE, sharded: bool = False) -> Fabric:
    """A device for each process: CUDA or Apple's if there is one, else the CPU. Of several, gradients are averaged.

    Each holds the whole network (DDP) or, if `sharded`, a share of it (FSDP): of an objective that is set up, its `network`.
    Precision is autocast around the network's calls.
    """
    from lightning_fabric import Fabric  # takes a second, and planning and generating need none of it
    from lightning_fabric.strategies import ModelParallelStrategy

    autocast: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if precision == "bf16" else "32-true"
    if ranks.world == 1:
        return Fabric(accelerator="auto", devices=1, precision=autocast)
    fabric = Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=ranks.local_world,
        num_nodes=ranks.world // ranks.local_world,
        strategy=ModelParallelStrategy(_shard_network, ranks.world, tensor_parallel_size=1) if sharded else _whole_networks(),
        precision=autocast,
    )
    fabric.launch()  # torchrun has started the processes
    return fabric


def _whole_networks() -> Strategy:
    from lightning_fabric.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1x1 kernels: the order is the same
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # PyTorch renamed it
    buffers_stay: dict[str, Any] = {name: False}  # the Wiener filter is large and never changes
    return DDPStrategy(**buffers_stay)


def _shard_network(objective: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Its network alone, so that this can be called without the objective."""
    assert isinstance(objective.network, nn.Module)
    shard(objective.network, mesh["data_parallel"])
    return objective


def computes_bf16() -> bool:
    """Whether there is arithmetic for bf16 here. Without it that of float32 stands in, and takes two to many times as long."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bf16_instructions()


def _has_bf16_instructions() -> bool:
    """oneDNN takes bf16 wherever there is AVX-512, and computes in float32 on most of these processors (docs/log.md)."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of PyTorch
    return known.get("architecture") not in ("x86", "x86_64") or any(known.get(name) for name in BF16_INSTRUCTIONS)


def in_bf16(precision: str) -> bool:
    """Whether a trained network is used in bf16: where its settings say so and this device computes in it, else in float32."""
    return precision == "bf16" and computes_bf16()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Around the calls of a trained network (`in_bf16`)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision))


def free_bytes() -> int:
    """Of the CUDA card's memory, or of the machine's."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block only algorithms that give the same bits each time, if `wanted`; others raise RuntimeError."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def place(network: nn.Module, device: torch.device, channels_last: bool = True) -> None:
    """Move `network` to `device`, its 3D convolutions' weights channels-last, the order in which they run fastest."""
    network.to(device)
    if channels_last and any(weight.ndim == 5 for weight in network.parameters()):
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone, so that a resumed run draws what the first would have."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 31 + stream) % 2**63)


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The items of step `step` when `count` items are shuffled anew each epoch: a function of (seed, step) alone."""
    indices: list[int] = []
    orders: dict[int, Tensor] = {}
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=generator(seed, epoch, stream=7))
        indices.append(int(orders[epoch][place]))
    return indices
