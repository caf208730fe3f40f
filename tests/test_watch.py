"""What the flow's samples are judged by while it trains, on latents whose distribution is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctvae.checkpoint import Best
from ctvae.config import load_recipe
from ctvae.latents import LatentCode, LatentSet
from ctvae.runlog import Run
from ctvae.training.prior import Conditioning, Data, build_velocity, fit_wiener, flow_batches, train_flow
from ctvae.training.watch import SAMPLES, Seen, Watch, coordinates
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


# --- in training ------------------------------------------------------------------------------------------------------


class Scripted:
    """Sees the given distances, one after the other."""

    spread = 0.1

    def __init__(self, distances: list[float], copies: float = 0.0):
        self.distances, self.copies = iter(distances), copies

    def look(self, network, precision):
        return Seen(next(self.distances), self.copies)


def trained(folder: Path, watch: Scripted) -> tuple[dict[str, float], torch.Tensor, list[int]]:
    """A flow over vectors of 6 numbers, ten steps, a look at each: its figures, one of its weights, the steps taken."""
    settings = ["prior.steps=10", "prior.save_every=1", "prior.log_every=1", "prior.looks=10"]
    cfg = load_recipe("slice2d", [*settings, "prior.batch=2", "prior.mlp_width=8", "prior.ema_decay=0"])
    run = Run.create_or_resume(folder, cfg, "none", ())
    random = torch.Generator().manual_seed(0)
    means = torch.randn(12, 2, 3, generator=random)
    latents = LatentSet(means, torch.full_like(means, -4), torch.rand(12, 3, generator=random), [f"g{i}" for i in range(12)])
    code, conditioning = LatentCode.fit(latents), Conditioning.fit(latents.conditions)
    torch.manual_seed(0)
    network = build_velocity(cfg.prior, (2, 3), 3, fit_wiener(cfg.prior, code, latents))
    data = Data(latents, None, flow_batches(cfg, code, conditioning), watch)  # type: ignore[arg-type]
    figures = train_flow(run, cfg, network, data)
    steps = [int(line.split(",")[0]) for line in (folder / "logs" / "flow.csv").read_text().splitlines()[1:]]
    return figures, network.state_dict()["correction.out.weight"].clone(), steps


def test_training_stops_when_samples_get_worse_and_keeps_what_was_before(tmp_path):
    worse = [1.0, 0.5, 0.8, 0.9, 0.1]  # the fifth is never looked at
    figures, weight, steps = trained(tmp_path / "a", Scripted(worse))
    assert (figures["best_step"], figures["distance"], figures["flow_steps"]) == (2, 0.5, 4)
    assert steps[-1] == 4
    _, whole, steps = trained(tmp_path / "b", Scripted([1.0] * 10))
    assert steps[-1] == 10
    assert not torch.equal(weight, whole)


def test_a_run_killed_after_the_look_that_ends_it_ends_all_the_same(tmp_path, monkeypatch):
    """As if it had been killed after that step's checkpoint, before the stage was noted as done."""
    distances = [1.0, 0.5, 0.8, 0.9, 0.1]
    monkeypatch.setattr(Best, "load_into", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Scripted(distances))
    monkeypatch.undo()
    figures, _, steps = trained(tmp_path, Scripted(distances[4:]))
    assert (figures["best_step"], figures["distance"], figures["flow_steps"]) == (2, 0.5, 4)
    assert steps[-1] == 4


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_difference_that_is_noise_stops_nothing_but_a_slow_decline_does(tmp_path):
    figures, *_ = trained(tmp_path / "a", Scripted([0.5, 0.55, 0.45, 0.52, 0.5, 0.54, 0.5, 0.47, 0.5, 0.53]))
    assert (figures["best_step"], figures["flow_steps"]) == (10, 10)
    figures, *_ = trained(tmp_path / "b", Scripted([0.5, 0.55, 0.59, 0.63, 0.67, 0.7, 0.8, 0.9, 1.0, 1.1]))
    assert (figures["best_step"], figures["flow_steps"]) == (3, 5)  # measured from the lowest, not from the last kept


def test_copies_are_warned_of_while_training(tmp_path, capsys):
    trained(tmp_path / "a", Scripted([0.5] * 10, copies=0.125))
    assert "warning: 12% of the samples come nearer to a training scan" in capsys.readouterr().err
    trained(tmp_path / "b", Scripted([0.5] * 10))
    assert "warning" not in capsys.readouterr().err
