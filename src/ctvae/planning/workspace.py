"""What a kernel holds beside its inputs and outputs while it runs, which no tensor of the program shows.

Shapes:  x input [B C_in ...]   w weight   y output [B C_out ...]; blocked means channels padded to 16, oneDNN's own layout

Known from how PyTorch calls oneDNN 3 on a CPU, and checked layer by layer against resident memory (docs/planner.md):

* An operand that is not in the kernel's layout is copied first.
* Channels-last convolutions compute in place. In bf16 the gradient of a kernel wider than one voxel first transposes
  input and output gradient, one volume per thread, and sums in float32. In float32, input channels that are no multiple
  of 16 are unfolded into columns (im2col), one volume at a time.
* Convolutions in PyTorch's plain layout are computed on blocked copies of input and output; the output of a transposed
  convolution, and the input's gradient of a plain one, exist three times for a moment.
* Elementwise arithmetic between two precisions first casts the lower one.

On CUDA only the first and the last are counted: cuDNN chooses its workspace itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

BLOCK = 16
FEW_CHANNELS = 3  # inputs of so few are read in the plain layout
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
aten = torch.ops.aten
ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True)
class Kernels:
    """The kernels of one device. `threads` share one volume each in oneDNN's weight gradients."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1

    def bytes_inside(self, func: Any, args: tuple, out: Any) -> int:
        """The most that `func` holds beside its inputs and outputs."""
        if func in ELEMENTWISE:
            return sum(a.numel() * out.element_size() for a in args[:2] if isinstance(a, Tensor) and _needs_cast(a, out))
        if func is aten.convolution.default:
            x, weight, *_, transposed, _, _ = args
            return self._forward(x, weight, out, transposed)
        if func is aten.convolution_backward.default:
            grad, x, weight, *_, transposed, _, _, _ = args
            return self._backward(grad, x, weight, transposed, out)
        return 0

    def _forward(self, x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> int:
        if not _channels_last(x, weight):
            return _copy(x, plain=True) + (self._blocked_forward(x, y, transposed) if self.device == "cpu" else 0)
        return _copy(x, plain=False) + (size(weight) + _columns(x, weight, y, transposed) if self.device == "cpu" else 0)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, transposed: bool, out: Any) -> int:
        plain = not _channels_last(x, weight)
        copies = _copy(x, plain) + _copy(grad, plain)
        if self.device == "cuda":
            return copies
        if not plain:
            return copies + self._transposed(x, grad, weight) + _columns(x, weight, grad, transposed)
        of_input = 0 if out[0] is None else self._blocked_forward(grad, out[0], not transposed)
        of_weight = _blocked_input(x) + _blocked_input(grad) + self._transposed(x, grad, weight)
        return copies + max(of_input, of_weight)

    def _blocked_forward(self, x: Tensor, y: Tensor, transposed: bool) -> int:
        """Blocked copies of what goes in and comes out, less the output, which is made last."""
        blocked_y = _blocked_output(y)
        computing = _blocked_input(x) + blocked_y - size(y)
        return max(computing, 2 * blocked_y if transposed else blocked_y)

    def _transposed(self, x: Tensor, grad: Tensor, weight: Tensor) -> int:
        """The bf16 weight gradient's transposed operands, and its sums in float32."""
        sums = weight.numel() * 4
        if x.element_size() > 2 or math.prod(weight.shape[2:]) == 1:
            return sums
        volumes = min(len(x), self.threads)
        return sums + (size(x) + _blocked_output(grad)) * volumes // len(x)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _needs_cast(operand: Tensor, out: Tensor) -> bool:
    return operand.ndim > 0 and operand.is_floating_point() and operand.dtype != out.dtype


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    last = CHANNELS_LAST[x.ndim]
    return any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))


def _copy(tensor: Tensor, plain: bool) -> int:
    wanted = torch.contiguous_format if plain else CHANNELS_LAST[tensor.ndim]
    return 0 if tensor.is_contiguous(memory_format=wanted) else size(tensor)


def _blocked_output(tensor: Tensor) -> int:
    channels = tensor.shape[1]
    return size(tensor) if channels == 1 else size(tensor) // channels * (-(-channels // BLOCK) * BLOCK)


def _blocked_input(tensor: Tensor) -> int:
    return 0 if tensor.shape[1] <= FEW_CHANNELS else _blocked_output(tensor)


def _columns(x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> int:
    """im2col of one volume: every output voxel's whole neighbourhood."""
    channels, kernel = x.shape[1], math.prod(weight.shape[2:])
    if x.element_size() < 4 or transposed or kernel == 1 or channels <= FEW_CHANNELS or channels % BLOCK == 0:
        return 0
    return channels * kernel * math.prod(y.shape[2:]) * x.element_size()
