"""A ledger of tensor memory and arithmetic: what PyTorch would hold at every moment of a program run on fake tensors.

Every operation that PyTorch dispatches, forward and backward, passes through `Ledger`. A storage counts from the
operation that makes it until nothing refers to it any more, as the allocator would see it; views count once. So saved
activations, gradients, recomputation, casts of autocast and the optimiser's temporaries are followed, not estimated.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ctvae.planning.workspace import Kernels

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
ANY_NUMBER = 1.0  # what reading a number out of a fake tensor gives: sizes never depend on it


class Ledger(TorchDispatchMode):
    """Bytes held now (`live_bytes`), the most so far (`peak_bytes`), and floating point operations (`flops`).

    `kernels` adds what an operation holds only while it runs, which no tensor shows.
    """

    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is DEVICE:  # asked of every fake tensor, many times
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return ANY_NUMBER
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self._enter(made.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + self.kernels.bytes_inside(func, args, out))
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def leave(_: weakref.ref) -> None:
            self.live_bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, leave)
        self.live_bytes += size

    def since(self) -> int:
        """The peak since the last call, in bytes; a new one begins from what is held now."""
        peak, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak


@contextmanager
def dry_run(kernels: Kernels) -> Iterator[Ledger]:
    """Tensors made in this block have shape, type and strides, and no memory; the ledger says what they would have taken.

    What is held goes by references alone meanwhile: looking for cycles is a tenth of the time, and comes at any moment.
    """
    ledger, collecting = Ledger(kernels), gc.isenabled()
    gc.disable()
    try:
        with FakeTensorMode(), ledger:
            yield ledger
    finally:
        if collecting:
            gc.enable()


def to_channels_last(network: nn.Module) -> nn.Module:
    """`network.to(memory_format=torch.channels_last_3d)` for fake weights, which `Module.to` refuses to replace."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 5:
                laid_out = weight.detach().contiguous(memory_format=torch.channels_last_3d)
                setattr(module, name, nn.Parameter(laid_out, requires_grad=weight.requires_grad))
    return network


def tensor_bytes(tensors: Any) -> int:
    """Bytes of all tensors in a tree of containers."""
    return sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
