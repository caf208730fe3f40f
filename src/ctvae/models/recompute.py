"""Memory policy around the layers, which stay textbook: what is kept for the backward pass, and how much is made at once.

Shapes:  B batch   C channels   D H W voxels

* `by_slabs`: operations on each voxel alone run a few slices at a time, forward and backward. RMS norm of a bf16 volume
  makes several float32 copies of it; here they are as large as a slab, and only the bf16 input is kept.
* `recomputed`: a part keeps its input only and runs again in the backward pass (Chen et al. 2016). Parts may be nested.

Both give what the plain network gives: the same forward pass bit for bit, gradients to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctvae.models.blocks import ChannelNorm, ResBlock

SLAB_NUMBERS = 2**21  # 8 MiB in float32, or more where there would be more than MOST_SLABS
MOST_SLABS = 16


def save_memory(network: nn.Module, checkpointing: bool) -> None:
    """Norms by slabs; with `checkpointing` every residual block is recomputed."""
    for module in list(network.modules()):
        if isinstance(module, ChannelNorm):
            _wrap(module, by_slabs)
        elif isinstance(module, ResBlock) and checkpointing:
            _wrap(module, recomputed)


Forward = Callable[[Tensor], Any]


def _wrap(module: nn.Module, policy: Callable[[nn.Module, Forward, Tensor], Any]) -> None:
    """Run `policy` around the module's forward. By a class of its own, not by a closure over it, so that copies are copies."""
    plain = type(module)

    class Wrapped(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return policy(self, super().forward, x)

    Wrapped.__name__ = Wrapped.__qualname__ = plain.__name__
    module.__class__ = Wrapped


def recomputed(_: nn.Module, forward: Forward, x: Tensor) -> Any:
    """Keep the input only; `forward` runs again when the gradient is asked for."""
    return checkpoint(forward, x, use_reentrant=False) if torch.is_grad_enabled() else forward(x)


def by_slabs(module: nn.Module, forward: Forward, x: Tensor) -> Tensor:
    """Of a module that treats every voxel alone, [B C D H W] -> [B C D H W]: a slab of slices at a time."""
    if x.ndim != 5 or x.numel() <= SLAB_NUMBERS:
        return forward(x)  # type: ignore[no-any-return]
    return _BySlabs.apply(forward, x, *module.parameters())  # type: ignore[no-any-return]


class _BySlabs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.inner, ctx.autocast = forward, _autocast_state(x.device.type)
        ctx.save_for_backward(x, *parameters)
        out: Tensor | None = None
        for slab in slabs(x.shape):
            y = forward(x[:, :, slab])
            if out is None:
                out = torch.empty(x.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
            out[:, :, slab] = y
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        of_x = torch.empty_like(x)
        of_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for slab in slabs(x.shape):
            part = x[:, :, slab].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                y = ctx.inner(part)
            first, *others = torch.autograd.grad(y, (part, *parameters), grad[:, :, slab])
            of_x[:, :, slab] = first
            for total, other in zip(of_parameters, others, strict=True):
                total += other
        return None, of_x, *of_parameters


def slabs(shape: torch.Size) -> Iterator[slice]:
    """A few slices along D at a time: SLAB_NUMBERS numbers or a MOST_SLABS-th of all, whichever is more, one slice at least."""
    fewest = -(-shape[2] // MOST_SLABS)
    slices = max(1, fewest, SLAB_NUMBERS * shape[2] // max(1, shape.numel()))
    starts = range(0, shape[2], slices)
    yield from (slice(a, b) for a, b in itertools.pairwise((*starts, shape[2])))


def _autocast_state(device: str) -> dict[str, Any]:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
