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
        """What to send back from y, like y. Losses are graphs from y on; the first has weight 1, one that is not there none."""
        gradients = {
            number: torch.autograd.grad(losses[name], y, retain_graph=True)[0]
            for number, name in enumerate(self.names)
            if name in losses
        }
        sizes = torch.zeros_like(self.sizes)
        for number, gradient in gradients.items():
            sizes[number] = gradient.norm()
        self._observe(self.average(sizes))
        pull = gradients.pop(0)
        for number, gradient in gradients.items():
            pull = pull + gradient * (weights[self.names[number]] * self.sizes[0] / self.sizes[number].clamp_min(1e-12))
        return pull

    def _observe(self, sizes: Tensor) -> None:
        """A loss that does not pull yet is not counted."""
        pulls = (sizes > 0).to(sizes)
        weight = (1 / (1 + self.seen)).clamp_min(1 - DECAY) * pulls
        self.sizes += weight * (sizes - self.sizes)
        self.seen += pulls
