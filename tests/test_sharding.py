"""A network cut up over two processes against the whole one: the same curve, the same files, half of the memory.

Kills, restarts and other numbers of processes: benchmarks/many_processes.py, run by tests/test_survival.py.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctvae.checkpoint import Checkpoints, load
from ctvae.config import load_recipe
from ctvae.device import generator
from ctvae.errors import ConfigError
from ctvae.latents import LatentCode, LatentSet
from ctvae.ranks import ALONE, Ranks, joined, leave
from ctvae.runlog import Run
from ctvae.sharding import gathered, load_into, own_part, whole
from ctvae.training import settings
from ctvae.training.prior import Conditioning, Data, build_velocity, fit_wiener, flow_batches, train_flow
from ctvae.training.watch import Watch

ROOT = Path(__file__).parents[1]
SHAPE = (2, 4, 4, 4)
NEAR = 1e-5  # found: 1e-6
SETTINGS = (
    "prior.widths=[7,32]", "prior.detail_width=5",
    "prior.blocks=1", "prior.rank=3", "prior.batch=4", "prior.steps=12", "prior.log_every=2",
    "prior.save_every=4", "prior.looks=3", "prior.precision=fp32", "prior.warmup=1", "prior.weight_decay=0.1",
)  # fmt: skip


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_has_nothing_to_cut_up():
    cfg = load_recipe("wavelet3d", ["prior.shard=true"])
    with pytest.raises(ConfigError, match=r"prior\.shard: there is one process to hold the network; leave it out, or"):
        settings.refuse_uneven(cfg, "both", 1)
    settings.refuse_uneven(cfg, "autoencoder", 1)
    settings.refuse_uneven(cfg, "prior", 2)
    assert not load_recipe("wavelet3d").prior.shard


def test_a_run_goes_on_sharded_or_not(tmp_path):
    Run.create_or_resume(tmp_path / "run", load_recipe("wavelet3d"), "data")
    Run.create_or_resume(tmp_path / "run", load_recipe("wavelet3d", ["prior.shard=true"]), "data")
    with pytest.raises(ConfigError, match=r"prior\.batch"):
        Run.create_or_resume(tmp_path / "run", load_recipe("wavelet3d", ["prior.shard=true", "prior.batch=2"]), "data")


def test_tensors_that_are_not_cut_up_stay_as_they_are():
    module, tensor = torch.nn.Linear(2, 2), torch.ones(3)
    assert whole(tensor) is tensor
    assert own_part(tensor, tensor) is tensor
    assert own_part(tensor, None) is tensor
    assert gathered({"a": tensor})["a"].tolist() == [1, 1, 1]
    load_into(module, {"weight": torch.eye(2), "bias": torch.zeros(2)})
    assert module(torch.tensor([[3.0, 4.0]])).tolist() == [[3, 4]]


# --- two processes ----------------------------------------------------------------------------------------------------


def latents(count: int, seed: int) -> LatentSet:
    random = generator(seed, 0)
    means = torch.randn(count, *SHAPE, generator=random)
    groups = [f"{seed}-{index}" for index in range(count)]
    return LatentSet(means, torch.full_like(means, -4), torch.rand(count, 3, generator=random), groups)


def trained(folder: Path, ranks: Ranks, *overrides: str) -> None:
    """A flow over random latents, looks and held-out groups and all; its averaged weights and figures are saved."""
    from ctvae.checkpoint import save

    cfg = load_recipe("wavelet3d", [*SETTINGS, *overrides])
    if ranks.first:
        Run.create_or_resume(folder, cfg, "none")
    ranks.barrier()
    training, held_out = latents(20, 1), latents(12, 2)
    code, conditioning = LatentCode.fit(training), Conditioning.fit(training.conditions)
    torch.manual_seed(0)
    wiener = fit_wiener(cfg.prior, code, training)
    network = build_velocity(cfg.prior, SHAPE, 3, wiener)
    watch = Watch(code, wiener, training, held_out, conditioning.standard(held_out.conditions), cfg.seed)
    data = Data(training, held_out, flow_batches(cfg, code, conditioning, ranks), watch)
    figures = train_flow(Run(folder), cfg, network, data, ranks)
    save(folder / "flow.safetensors", network.state_dict(), figures)


def under_torchrun(processes: int, *arguments: str) -> None:
    """This file, as a program."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    said = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    command = [sys.executable, *launcher, __file__, *arguments]
    done = subprocess.run(command, env=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def curve(folder: Path) -> dict[str, list[float]]:
    with (folder / "logs" / "flow.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load(Checkpoints(folder / "checkpoints", "flow").paths()[-1])[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_a_sharded_flow_is_that_of_one_process(tmp_path, optimizer):
    """Curve with held-out losses and looks, checkpoint, the weights that are left; 7 channels do not divide among two."""
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    trained(alone, ALONE, f"prior.optimizer={optimizer}")
    under_torchrun(2, "train", str(sharded), f"prior.optimizer={optimizer}", "prior.shard=true")
    expected, found = curve(alone), curve(sharded)
    assert len(expected["step"]) == 6
    for name in ("step", "loss", "held_out", "held_out_distance", "copies", "lr", "skipped_steps"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name
    assert any(value == value for value in found["held_out_distance"])
    assert_near(state_of(sharded), state_of(alone))
    assert_near(load(sharded / "flow.safetensors")[0], load(alone / "flow.safetensors")[0])


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, shapes and, to rounding that training has amplified, numbers of what is trained."""
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in expected.items()}
    trained = [name for name in found if "correction." in name or (name.startswith("optimizer.") and found[name].ndim)]
    one, other = (torch.cat([part[name].double().flatten() for name in trained]) for part in (found, expected))
    assert (one - other).norm() < NEAR * other.norm()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_checkpoint_goes_from_one_process_to_two_and_back(tmp_path):
    """Read sharded and written again without a step between, every bit is what it was."""
    trained(tmp_path, ALONE)
    before = {path.name: path.read_bytes() for path in Checkpoints(tmp_path / "checkpoints", "flow").paths()}
    under_torchrun(2, "rewrite", str(tmp_path))
    after = {path.name: path.read_bytes() for path in Checkpoints(tmp_path / "checkpoints", "flow").paths()}
    assert max(before) in after
    assert after == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_that_is_not_finite_on_one_process_changes_nothing():
    under_torchrun(2, "poison")


def rewrite(folder: Path, ranks: Ranks) -> None:
    """Read the newest state into a sharded network, write it under the same name, from tensors that were all cut up."""
    from ctvae.checkpoint import EMA
    from ctvae.device import make_fabric
    from ctvae.training.optimizer import build_optimizer
    from ctvae.training.prior import FlowObjective

    cfg = load_recipe("wavelet3d", [*SETTINGS, "prior.shard=true"])
    training = latents(20, 1)
    wiener = fit_wiener(cfg.prior, LatentCode.fit(training), training)
    network = build_velocity(cfg.prior, SHAPE, 3, wiener)
    make_fabric("fp32", ranks, sharded=True).setup_module(FlowObjective(network, cfg.prior, ranks))
    ema, optimizer = EMA(network, 0.9), build_optimizer(network, cfg.prior)
    checkpoints = Checkpoints(folder / "checkpoints", "flow")
    meta = checkpoints.resume(network, ema, optimizer)
    step = meta.pop("step")
    assert step == 12
    held = [parameter.to_local().numel() for parameter in network.parameters()]
    state = [value.to_local().numel() for values in optimizer.state.values() for value in values.values() if value.ndim]
    every = sum(parameter.numel() for parameter in network.parameters())
    assert 0.4 * every < sum(held) < 0.6 * every
    assert sum(state) > 0.4 * every
    checkpoints.save(step, network, ema, optimizer, meta)


def poison(ranks: Ranks) -> None:
    """NaN on the second process alone: both leave the step out."""
    from ctvae.config import Prior
    from ctvae.device import make_fabric
    from ctvae.training.tally import Tally

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x).square().mean()

    fabric, tally = make_fabric("fp32", ranks, sharded=True), Tally(Prior(), ranks, {})
    network = (objective := fabric.setup_module(Objective())).network
    for poisoned in (True, False):
        network.zero_grad(set_to_none=True)
        loss = objective(torch.full((2, 3), float("nan") if poisoned and ranks.rank == 1 else 1.0))
        fabric.backward(loss)
        norm = whole(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        assert tally.take({"loss": torch.tensor(1.0)}, norm) is not poisoned
        assert norm.isfinite().item() is not poisoned


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    with joined() as here:
        if task == "train":
            trained(Path(rest[0]), here, *rest[1:])
        elif task == "rewrite":
            rewrite(Path(rest[0]), here)
        else:
            poison(here)
    leave(0)
