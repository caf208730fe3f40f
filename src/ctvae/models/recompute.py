"""Memory policy around the layers, which stay textbook: what is kept for the backward pass, and how much is made at once.

Shapes:  B batch   C channels   D H W voxels

* `by_slabs`: operations on each voxel alone run a few slices at a time, forward and backward. RMS norm of a bf16 volume
  makes several float32 copies of it; here they are as large as a slab, and only the bf16 input is kept.
* `summed_by_slabs`: losses of whole volumes, likewise.
* `lean`: a block's convolutions keep not their input but what it was made from, norm's and SiLU's input, which are kept anyway.
  Two volumes stay where there were four, and only operations on each voxel alone run twice.
* `recomputed`: a part keeps its input only and runs again in the backward pass (Chen et al. 2016). Parts may be nested.

A compiler fuses and recomputes such operations by itself; under torch.compile only `recomputed` is used.
All give what the plain network gives: the same forward pass bit for bit, losses and gradients to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ctvae.models.blocks import ChannelNorm, ResBlock

SLAB_NUMBERS = 2**21  # 8 MiB in float32, or more where there would be more than MOST_SLABS
MOST_SLABS = 16


def save_memory(network: nn.Module, checkpointing: bool) -> None:
    """Norms by slabs, blocks lean; with `checkpointing` every residual block is recomputed."""
    for module in list(network.modules()):
        if isinstance(module, ChannelNorm):
            _wrap(module, by_slabs)
        elif isinstance(module, ResBlock):
            _wrap(module, recomputed if checkpointing else lean)


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


def lean(block: nn.Module, forward: Forward, x: Tensor) -> Any:
    """A ResBlock that keeps its input and its first convolution's output; small ones, [B C D H W], are left as they are."""
    if x.numel() <= SLAB_NUMBERS or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(x)
    return x + made_again(F.silu, block.conv2, made_again(block.norm, block.conv1, x))  # type: ignore[arg-type]


def made_again(make: Forward, use: Forward, x: Tensor) -> Tensor:
    """`use(make(x))`; what `use` would keep of `make(x)` for its gradient is made from x again."""
    y, autocast = make(x), _autocast_state(x.device.type)
    made, x = y.untyped_storage()._cdata, x.detach()

    def pack(kept: Tensor) -> Tensor | None:
        return None if kept.untyped_storage()._cdata == made else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad(), torch.autocast(x.device.type, **autocast):
            return make(x)

    with saved_tensors_hooks(pack, unpack):
        return use(y)  # type: ignore[no-any-return]


def by_slabs(module: nn.Module, forward: Forward, x: Tensor) -> Tensor:
    """Of a module that treats every voxel alone, [B C D H W] -> [B C D H W]: a slab of slices at a time."""
    if x.ndim != 5 or x.numel() <= SLAB_NUMBERS or torch.compiler.is_compiling():
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
        asked = [bool(needed) for needed in ctx.needs_input_grad[2:]]  # a frozen network's are not
        of_x = torch.empty_like(x)
        of_parameters = [torch.zeros_like(p) if needed else None for p, needed in zip(parameters, asked, strict=True)]
        learning = [p for p, needed in zip(parameters, asked, strict=True) if needed]
        for slab in slabs(x.shape):
            part = x[:, :, slab].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                y = ctx.inner(part)
            first, *others = torch.autograd.grad(y, (part, *learning), grad[:, :, slab])
            of_x[:, :, slab] = first
            for total, other in zip([total for total in of_parameters if total is not None], others, strict=True):
                total += other
        return None, of_x, *of_parameters


Terms = Callable[[Tensor, Tensor, int], dict[str, Tensor]]


def summed_by_slabs(terms: Terms, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The sums over slabs of `terms(y, x, own)`, losses that hold y to x, [B C D H W] both; nothing but these two is kept.

    Slabs show one slice more than their `own`, the next one, where there is one. x gets no gradient.
    """
    if y.numel() <= SLAB_NUMBERS:
        return terms(y, x, y.shape[2])
    names: list[str] = []

    def values(y: Tensor, x: Tensor, own: int) -> Tensor:  # [T]
        found = terms(y, x, own)
        names[:] = found
        return torch.stack([*found.values()])

    totals = _SummedBySlabs.apply(values, y, x)
    return dict(zip(names, totals.unbind(), strict=True))


class _SummedBySlabs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Callable[[Tensor, Tensor, int], Tensor], y: Tensor, x: Tensor) -> Tensor:
        ctx.values, ctx.autocast = values, _autocast_state(y.device.type)
        ctx.save_for_backward(y, x)
        return torch.stack([values(y[:, :, seen], x[:, :, seen], own) for seen, own in _overlapping(y.shape)]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x = ctx.saved_tensors
        of_y = torch.zeros_like(y)
        for seen, own in _overlapping(y.shape):
            part = y[:, :, seen].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(y.device.type, **ctx.autocast):
                value = ctx.values(part, x[:, :, seen], own)
            of_y[:, :, seen] += torch.autograd.grad(value, part, grad)[0]
        return None, of_y, None


def _overlapping(shape: torch.Size) -> Iterator[tuple[slice, int]]:
    """Slabs with the slice after them, if there is one, and how many slices are their own."""
    yield from ((slice(slab.start, min(slab.stop + 1, shape[2])), slab.stop - slab.start) for slab in slabs(shape))


def slabs(shape: torch.Size) -> Iterator[slice]:
    """A few slices along D at a time: SLAB_NUMBERS numbers or a MOST_SLABS-th of all, whichever is more, one slice at least."""
    fewest = -(-shape[2] // MOST_SLABS)
    slices = max(1, fewest, SLAB_NUMBERS * shape[2] // max(1, shape.numel()))
    starts = range(0, shape[2], slices)
    yield from (slice(a, b) for a, b in itertools.pairwise((*starts, shape[2])))


def _autocast_state(device: str) -> dict[str, Any]:
    return {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
