"""The optimiser of both stages: Muon for weight matrices and convolutions, Adam for everything else.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction of a
layer learns at one pace. The update is scaled to Adam's usual size (Liu et al. 2025, 0.2 sqrt(max(rows, columns))),
so one learning rate serves both. A convolution is the matrix [out, in * kernel].

Of a sharded network every process gathers one matrix at a time, makes it orthogonal, and keeps its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctvae.config import Training
from ctvae.sharding import own_part, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iteration drives singular values towards 1
ITERATIONS = 5


def orthogonalised(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """About U V^T for matrix = U S V^T, by Newton-Schulz iterations: singular values end between 0.7 and 1.2.

    Each iteration is X -> P X with P = aI + bG + cG^2 and G = X X^T. All P are polynomials of the first G and commute, so
    they are multiplied up on the small side and meet X once: a fifth of the arithmetic on wide matrices.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # [r n], r <= n
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T  # [r r]
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    for _ in range(iterations):
        step = a * identity + b * gram + c * gram @ gram
        product = step @ product
        gram = step @ gram @ step
    x = product @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on parameters of two or more axes, Adam on the rest; decoupled weight decay on the former."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float = 0.0):
        parameters = [p for p in network.parameters() if p.requires_grad]
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.iterations = ITERATIONS

    def begin(self) -> None:
        """The state as the first step makes it, before it changes anything."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state and p.ndim >= 2:
            state["momentum"] = torch.zeros_like(p)
        elif not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim >= 2:
                    self._muon(p, p.grad, group["lr"], group["weight_decay"])
                else:
                    self._adam(p, p.grad, group["lr"])

    def _muon(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        state = self._state_of(p)
        state["momentum"].lerp_(grad, 1 - momentum)
        update = whole(grad.lerp(state["momentum"], momentum)).flatten(1)  # Nesterov's look-ahead
        size = 0.2 * max(update.shape) ** 0.5
        direction = orthogonalised(update, self.iterations).view(p.shape)
        p.mul_(1 - lr * weight_decay).add_(own_part(direction, like=p), alpha=-lr * size)

    def _adam(self, p: Tensor, grad: Tensor, lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
        state = self._state_of(p)
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        step = state["step"].item()
        scale = (state["square"] / (1 - beta2**step)).sqrt().add_(1e-8)
        p.addcdiv_(state["mean"], scale, value=-lr / (1 - beta1**step))


def build_optimizer(network: nn.Module, cfg: Training) -> torch.optim.Optimizer:
    """The optimiser that the recipe names."""
    if cfg.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=cfg.lr)
    return Muon(network, cfg.lr, cfg.weight_decay)
