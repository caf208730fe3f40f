"""Rectified flow: straight paths from noise to data (Liu et al. 2023, Lipman et al. 2023).

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   x_1 ~ data,   velocity(x_t, t) = E[x_1 - x_0 | x_t]

Sampling solves dx/dt = velocity(x, t) from t = 0 to t = 1. Shapes: x [B ...], t [B].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SOLVERS = ("heun", "euler", "ab2")
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B ...], t [B]) -> velocity [B ...]


def logit_normal_times(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    """Times whose logit is N(shift, 1): the middle of the path, where it is hardest, is seen most (Esser et al. 2024)."""
    return torch.sigmoid(shift + torch.randn(count, generator=generator, device=generator.device))


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path, t [B] broadcast over the rest."""
    tb = t.view(-1, *[1] * (x1.ndim - 1))
    return (1 - tb) * x0 + tb * x1


def expected_velocity(xt: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t, mean] where x_1 = mean + std e with e ~ N(0, I): [B ...].

    Regressed on x_t it gives what x_1 - x_0 gives, for which it stands with the noise of e and x_0 averaged out (Rao and
    Blackwell): nothing is left to regress but what is not known of the mean.
    """
    tb, variance = t.view(-1, *[1] * (mean.ndim - 1)), std.square()
    slope = (tb * variance - (1 - tb)) / ((1 - tb).square() + tb.square() * variance).clamp_min(1e-12)
    return mean + slope * (xt - tb * mean)


def matching_loss(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean squared error between the predicted and the expected velocity where x_1 was drawn from N(mean, std^2), per sample [B].

    With std = 0 and mean = x_1 the latter is that of the straight path, x_1 - x_0.
    """
    xt = interpolate(x0, x1, t)
    error = velocity(xt, t) - expected_velocity(xt, t, mean, std)
    return error.square().flatten(1).mean(1)


def sample(velocity: Velocity, x0: Tensor, steps: int, solver: str = "heun") -> Tensor:
    """Noise x0 [B ...] at t = 0 -> data at t = 1, in `steps` equal steps of one of SOLVERS.

    euler   x + h v_n                               order 1, one evaluation a step
    heun    x + h (v_n + v'_(n+1)) / 2              order 2, two (Karras et al. 2022); v' at Euler's guess
    ab2     x + h (3 v_n - v_(n-1)) / 2             order 2, one (Adams and Bashforth), and one more as it starts with Heun's
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    h = 1.0 / steps
    x, before = x0, None
    for step in range(steps):
        t = x.new_full((len(x),), step * h)
        slope = now = velocity(x, t)
        if solver == "ab2" and before is not None:
            slope = (3 * now - before) / 2
        elif solver != "euler":
            slope = (now + velocity(x + h * slope, t + h)) / 2
        x, before = x + h * slope, now
    return x


def evaluations(solver: str, steps: int) -> int:
    """How often `sample` asks the velocity."""
    return {"euler": steps, "heun": 2 * steps, "ab2": steps + 1}[solver]


def guided(conditional: Velocity, unconditional: Velocity, weight: float) -> Velocity:
    """Classifier-free guidance: 1 is plain conditioning, above 1 leans on the condition (Ho and Salimans 2022)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        base = unconditional(x, t)
        return base + weight * (conditional(x, t) - base)

    return velocity
