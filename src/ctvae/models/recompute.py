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
    """Norms by slabs; with `checkpointing` every residual block is recomputed, and the encoder as a whole as well.

    So the decoder's backward pass has nothing of the encoder beside it but the latents.
    """
    for module in network.modules():
        if isinstance(module, ChannelNorm):
            module.forward = by_slabs(module.forward, module)  # type: ignore[method-assign]
        elif isinstance(module, ResBlock) and checkpointing:
            module.forward = recomputed(module.forward)  # type: ignore[method-assign]
    if checkpointing and isinstance(getattr(network, "encoder", None), nn.Module):
        network.encoder.forward = recomputed(network.encoder.forward)  # type: ignore[union-attr, operator, method-assign]


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps its input only and runs again when the gradient is asked for."""

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(forward, x, use_reentrant=False) if torch.is_grad_enabled() else forward(x)

    return checkpointed


def by_slabs(forward: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[Tensor], Tensor]:
    """`forward` of a module that treats every voxel alone, [B C D H W] -> [B C D H W], a slab of slices at a time."""

    def in_slabs(x: Tensor) -> Tensor:
        if x.ndim != 5 or x.numel() <= SLAB_NUMBERS:
            return forward(x)
        return _BySlabs.apply(forward, x, *module.parameters())  # type: ignore[no-any-return]

    return in_slabs


class _BySlabs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
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
