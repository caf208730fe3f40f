"""Several losses of one decoded volume, of which each pulls as hard as its weight says, whatever its own scale.

An adversary's gradient is a hundredth of the reconstruction's while it knows nothing and a hundred times as large once it knows
everything; no fixed factor is right for both. So gradients are taken with regard to the decoded volume y, brought to one size
there, weighted, and only their sum goes on into the decoder (Defossez et al. 2022, "High fidelity neural audio compression",
section 3.4):

    pull = g_0 + sum_i w_i g_i |g_0| / |g_i|,   g_i = d loss_i / d y,   |g|: running mean of its norm

Shapes:  y any
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

DECAY = 0.98


class Balance(nn.Module):
    """For losses called `names`, the first of which the others are measured by."""

    sizes: Tensor
    seen: Tensor

    def __init__(self, names: Sequence[str], average: Callable[[Tensor], Tensor] = lambda values: values):
        """`average` is over processes that train together."""
        super().__init__()
        self.names, self.average = tuple(names), average
        self.sizes, self.seen = nn.Buffer(torch.zeros(len(self.names))), nn.Buffer(torch.zeros(len(self.names)))

    def forward(self, y: Tensor, losses: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
        """What to send back from y, like y. Losses are graphs from y on; those without any weight of their own have 1."""
        gradients = [torch.autograd.grad(losses[name], y, retain_graph=True)[0] for name in self.names]
        self._observe(self.average(torch.stack([gradient.norm() for gradient in gradients]).float()))
        pull = gradients[0] * weights.get(self.names[0], 1.0)
        for name, gradient, size in zip(self.names[1:], gradients[1:], self.sizes[1:], strict=True):
            pull = pull + gradient * (weights.get(name, 1.0) * self.sizes[0] / size.clamp_min(1e-12))
        return pull

    def _observe(self, sizes: Tensor) -> None:
        """A loss that does not pull yet is not counted."""
        pulls = (sizes > 0).to(sizes)
        weight = (1 / (1 + self.seen)).clamp_min(1 - DECAY) * pulls
        self.sizes += weight * (sizes - self.sizes)
        self.seen += pulls
