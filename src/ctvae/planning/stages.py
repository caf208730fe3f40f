"""The autoencoder's layers and blocks as a table: what each puts out, and how much it computes.

Shapes:  D H W voxels   B batch   C channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctvae.config import Config
from ctvae.networks import Size3
from ctvae.planning.dry import autocast, frozen
from ctvae.planning.ledger import Ledger, dry_run
from ctvae.planning.workspace import Kernels


@dataclass(frozen=True)
class Stage:
    """One layer or residual block of the autoencoder in use, on one group."""

    name: str
    shape: tuple[int, ...]  # of its output, [B C ...]
    parameters: int
    gflop: float


def stages(cfg: Config, size: Size3) -> list[Stage]:
    """The autoencoder's layers and blocks in the order in which encoding and decoding one group of `size` runs them."""
    table: list[Stage] = []
    with dry_run(Kernels()) as ledger, torch.no_grad():
        network = frozen(cfg)
        for name, module in _layers_and_blocks(network):
            _tabulate(name, module, ledger, table)
        with autocast(cfg):
            mean, _ = network.encode(torch.empty(1, 1, *size))
            network.decode(mean)
    return table


def _layers_and_blocks(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """Modules with parameters: blocks made of layers alone, and layers that are in no block."""
    found: list[tuple[str, nn.Module]] = []
    for key, child in module.named_children():
        path = f"{name}.{key}".lstrip(".")
        grandchildren = list(child.children())
        block = not isinstance(child, nn.ModuleList | nn.Sequential) and not any(any(g.children()) for g in grandchildren)
        if not grandchildren or (block and name):
            found += [(path, child)] if any(True for _ in child.parameters()) else []
        else:
            found += _layers_and_blocks(child, path)
    return found


def _tabulate(name: str, module: nn.Module, ledger: Ledger, table: list[Stage]) -> None:
    begun: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: begun.append(ledger.flops))

    def note(_: nn.Module, inputs: tuple, out: Tensor) -> None:
        gflop = (ledger.flops - begun.pop()) / 1e9
        table.append(Stage(name, tuple(out.shape), sum(p.numel() for p in module.parameters()), round(gflop, 3)))

    module.register_forward_hook(note)
