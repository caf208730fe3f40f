"""What the flow's samples are judged by while it trains, on latents whose distribution is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctvae.latents import LatentCode, LatentSet
from ctvae.training.watch import SAMPLES, Watch, coordinates
from ctvae.wiener import WienerVelocity

SHAPE = (2, 2, 4, 4)
DIRECTIONS = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(5)))[0].T  # [6 64]
SPREAD = torch.tensor([4.0, 3.0, 2.0, 2.0, 1.5, 1.0])


def drawn(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """[count *SHAPE] of N(shift, .) with six directions and a little noise."""
    random = torch.Generator().manual_seed(seed)
    rows = (torch.randn(count, 6, generator=random) + shift) * SPREAD @ DIRECTIONS
    return (rows + 0.1 * torch.randn(rows.shape, generator=random)).unflatten(1, SHAPE)


def latents(count: int, seed: int) -> LatentSet:
    means = drawn(count, seed)
    return LatentSet(means.half(), torch.full_like(means, -4).half(), torch.zeros(count, 3), [f"g{i}" for i in range(count)])


@pytest.fixture
def watch() -> Watch:
    training, held_out = latents(60, 1), latents(40, 2)
    code = LatentCode.fit(training)
    rows = code.encode(training.means.float()).flatten(1)
    wiener = WienerVelocity.fit(rows, torch.zeros(64), rank=6)
    return Watch(code, wiener, training, held_out, held_out.conditions, seed=0)


class Still(torch.nn.Module):
    """A velocity that carries the watch's noise to `target`, whatever it is told: x_1 = x_0 + (target - x_0)."""

    def __init__(self, watch: Watch, target: Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.path = dict(zip(map(key, watch.noise), target - watch.noise, strict=True))
        self.now: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        if t[0] == 0:
            self.now = [self.path[key(one)] for one in x]
        return torch.stack(self.now)


def key(x: Tensor) -> float:
    return x.flatten()[0].item()


def seen_of(watch: Watch, raw: Tensor) -> tuple[float, float]:
    """`raw` [S *SHAPE] in the latents' own units, as if a network had drawn it."""
    training = latents(60, 1)
    seen = watch.look(Still(watch, LatentCode.fit(training).encode(raw)), "fp32")
    return seen.distance, seen.copies


def test_samples_of_the_same_source_are_near_and_others_are_not(watch):
    same, copies = seen_of(watch, drawn(SAMPLES, seed=3))
    shifted, _ = seen_of(watch, drawn(SAMPLES, seed=3, shift=1.0))
    collapsed, _ = seen_of(watch, drawn(1, seed=3).expand(SAMPLES, *SHAPE))
    assert abs(same) < 0.3
    assert shifted > 1
    assert collapsed > 1
    assert copies <= 0.05


def test_copies_of_training_groups_are_counted(watch):
    training = latents(60, 1)
    copies = training.posterior_sample(list(range(12)), torch.Generator().manual_seed(0))
    _, share = seen_of(watch, torch.cat((copies, drawn(SAMPLES - 12, seed=3))))
    assert share == pytest.approx(12 / SAMPLES, abs=2 / SAMPLES)


def test_the_same_network_looks_the_same_twice(watch):
    assert seen_of(watch, drawn(SAMPLES, seed=3)) == seen_of(watch, drawn(SAMPLES, seed=3))


def test_coordinates_have_unit_variance_along_fitted_directions():
    rows = drawn(4000, seed=4).flatten(1)
    along = coordinates(rows, WienerVelocity(torch.zeros(64), SPREAD[:, None] * DIRECTIONS, torch.ones(64)))
    torch.testing.assert_close(along.var(0), 1 + (0.1 / SPREAD).square(), rtol=0.08, atol=0)
