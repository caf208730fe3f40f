"""What the flow's samples are judged by while it trains, on latents whose distribution is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctvae import latents as latents_module
from ctvae.checkpoint import Best
from ctvae.config import load_recipe
from ctvae.evaluation.memorization import closeness
from ctvae.latents import LatentCode, LatentSet
from ctvae.runlog import Run
from ctvae.training import watch as module
from ctvae.training.prior import Conditioning, Data, build_velocity, fit_wiener, flow_batches, train_flow
from ctvae.training.watch import SAMPLES, Known, Seen, Watch, coordinates
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
    return watching(latents(60, 1), latents(40, 2))


def watching(training: LatentSet, held_out: LatentSet) -> Watch:
    code = LatentCode.fit(training)
    rows = code.encode(training.means.float()).flatten(1)
    wiener = WienerVelocity.fit(rows, torch.zeros(64), rank=6)
    return Watch(code, wiener, training, held_out, held_out.conditions, seed=0)


def rough(count: int, seed: int) -> Tensor:
    """[count *SHAPE] of N(0, I): as far from each other as from anything else."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def overlapping(patients: int, seed: int, noise: float = 0.1) -> LatentSet:
    """Two scans of each patient, four groups of each scan: all eight nearly the same."""
    means = rough(patients, seed).repeat_interleave(8, 0) + noise * rough(8 * patients, seed + 100)
    groups = [f"s{i // 4}_{i % 4:04d}" for i in range(len(means))]
    owners = [f"p{i // 8}" for i in range(len(means))]
    return LatentSet(means, torch.full_like(means, -4), torch.zeros(len(means), 3), groups, patients=owners)


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
    seen = watch.look(Still(watch, watch.known.code.encode(raw)), "fp32")
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


def test_copies_are_found_beside_other_groups_of_their_patient():
    training = overlapping(30, 1)
    copies = training.means[::20] + 0.3 * rough(12, 5)
    samples = torch.cat((copies, rough(SAMPLES - 12, 3)))
    _, share = seen_of(watching(training, overlapping(12, 2)), samples)
    assert share == pytest.approx(12 / SAMPLES, abs=1 / SAMPLES)


def test_smooth_samples_are_no_copies():
    """Half as large, they are nearer to training groups than held-out groups are, but to no one in particular."""
    watch = watching(overlapping(30, 1), overlapping(40, 2))
    smooth = 0.5 * rough(SAMPLES, 3)
    distance, _ = watch.known.closeness(watch.known.code.encode(smooth).flatten(1)).T
    assert (distance < watch.limits[0]).float().mean() > 0.9
    assert seen_of(watch, smooth)[1] < 2 / SAMPLES


@pytest.mark.parametrize("patients", [3, 30])
def test_closeness_is_the_reports(patients, monkeypatch):
    """`evaluation/memorization.py` sorts all distances at once; here there are blocks and parts that cut patients up."""
    monkeypatch.setattr(latents_module, "BLOCK_NUMBERS", 7 * 64)
    monkeypatch.setattr(module, "MOST_DISTANCES", 40 * 5)
    training, rows = overlapping(patients, 1, noise=0.8), rough(40, 2).flatten(1)
    training = training.chosen(torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist())
    known = Known(LatentCode({"shift": torch.zeros(2), "scale": torch.ones(2)}), training)
    expected = closeness(rows.numpy(), training.means.flatten(1).numpy(), training.whose)
    distance, ratio = known.closeness(rows).T
    torch.testing.assert_close(distance.double(), torch.from_numpy(expected.distance).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ratio.double(), torch.from_numpy(expected.ratio).double(), rtol=1e-4, atol=1e-4)


def test_one_patient_is_near_to_nobody_in_particular():
    known = Known(LatentCode({"shift": torch.zeros(2), "scale": torch.ones(2)}), overlapping(1, 1))
    assert known.closeness(rough(3, 2).flatten(1))[:, 1].tolist() == [1.0] * 3


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
