"""Rectified flow: straight paths from noise to data (Liu et al. 2023, Lipman et al. 2023).

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   x_1 ~ data,   velocity(x_t, t) = E[x_1 - x_0 | x_t]

Sampling solves dx/dt = velocity(x, t) from t = 0 to t = 1. Shapes: x [B ...], t [B].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

SOLVERS = ("ab2", "heun", "euler")  # the default first
SCHEDULES = ("logit", "equal")
STRETCH, SHIFT = 1.5, 0.5  # of the schedule `logit`, by measurement (benchmarks/results.md)
KEPT_FROM, KEPT_TO = 0.1, 0.5  # times between which noise is kept: before, layout is decided; after, little makes detail of it
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B ...], t [B]) -> velocity [B ...]


def logit_normal_times(count: int, generator: torch.Generator, shift: float = 0.0, spread: float = 1.0) -> Tensor:
    """Times whose logit is N(shift, spread^2) (Esser et al. 2024), one from each of `count` equally likely ranges, ascending.

    The lower `shift`, the more of the noisy end is seen, where the layout is decided: of latents whose coarse structure has a
    hundred times the noise's variance that is before t = 0.2.
    """
    device = generator.device
    share = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    return torch.sigmoid(shift + spread * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)))


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


def times(steps: int, schedule: str = SCHEDULES[0]) -> list[float]:
    """The ends of `steps` steps from t = 0 to t = 1, by one of SCHEDULES, from s = 0, 1 / steps, ..., 1.

    logit   logit t = STRETCH logit s + log SHIFT: short where the path bends, near both ends and more so near the noise
    equal   t = s
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    even = [step / steps for step in range(steps + 1)]
    if schedule == "equal":
        return even
    return [SHIFT * s**STRETCH / (SHIFT * s**STRETCH + (1 - s) ** STRETCH) for s in even]


def sample(velocity: Velocity, x0: Tensor, times: Sequence[float], solver: str = SOLVERS[0]) -> Tensor:
    """x0 [B ...] at the first of `times`, noise at 0, -> x at the last, data at 1, by one of SOLVERS.

    euler   x + h v_n                                       order 1, one evaluation a step
    ab2     x + h v_n + h^2 / (2 h') (v_n - v_(n-1))        order 2, one (Adams and Bashforth); h' the step before
    heun    x + h (v_n + v'_(n+1)) / 2                      order 2, two (Karras et al. 2022); v' at Euler's guess

    The first step of ab2 is Euler's.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is not one of {', '.join(SOLVERS)}")
    x, before, h_before = x0, None, 0.0
    for start, end in pairwise(times):
        h, t = end - start, x.new_full((len(x),), start)
        slope = now = velocity(x, t)
        if solver == "ab2" and before is not None:
            slope = now + h / (2 * h_before) * (now - before)
        elif solver == "heun":
            slope = (now + velocity(x + h * now, x.new_full((len(x),), end))) / 2
        x, before, h_before = x + h * slope, now, h
    return x


def evaluations(solver: str, steps: int) -> int:
    """How often `sample` asks the velocity."""
    return 2 * steps if solver == "heun" else steps


def rescaled(led: Tensor, velocity: Tensor, x: Tensor, t: Tensor, share: float) -> Tensor:
    """The guided velocity `led` at x_t [B C d h w], its guess of x_1 as wide in each channel as that of `velocity`: [B C d h w].

    Guidance exaggerates: samples get more contrast than data have. So each channel of the guess that it makes is drawn together
    about its mean, by `share` of the way (Lin et al. 2024, there for images).
    """
    left = (1 - t).view(-1, *[1] * (x.ndim - 1))
    axes = tuple(range(2, x.ndim))
    guess, plain = x + left * led, x + left * velocity
    narrower = plain.std(axes, correction=0, keepdim=True) / guess.std(axes, correction=0, keepdim=True).clamp_min(1e-6)
    return led + share * (narrower - 1) * (guess - guess.mean(axes, keepdim=True)) / left.clamp_min(1e-3)


def keeping_noise(velocity: Velocity, share: float) -> Velocity:
    """`velocity` that from KEPT_FROM to KEPT_TO counts `share` of the noise that it finds as data.

        x_0 found = x_t - t v,   kept: v + share (x_t - t v) / t

    What a network is unsure of it averages, so that it takes too much for noise, a little at each step, and samples are smoother
    than data. With 1 / (1 - share) for their scale this is epsilon scaling (Ning et al. 2024), there at all times.
    """
    if not share:
        return velocity

    def kept(x: Tensor, t: Tensor) -> Tensor:
        v, tb = velocity(x, t), t.view(-1, *[1] * (x.ndim - 1))
        inside = (tb > KEPT_FROM) & (tb < KEPT_TO)
        return torch.where(inside, v + share * (x - tb * v) / tb.clamp_min(KEPT_FROM), v)

    return kept


def guided(velocity: Tensor, away: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """v led from each weaker velocity u_k to its stronger v_k by its weight w_k: v + sum_k (w_k - 1) (v_k - u_k); 1 is none.

    Away from the velocity without conditions it leans on the conditions (classifier-free guidance, Ho and Salimans 2022), away
    from a worse model of the same data on what that one has not learned (autoguidance, Karras et al. 2024). With both each
    weight keeps its meaning, as no difference is multiplied by the other's.
    """
    for strong, weak, weight in away:
        velocity = velocity + (weight - 1) * (strong - weak)
    return velocity
