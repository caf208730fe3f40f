"""What several processes do, against what one does: the same batches, the same noise, one writer, one mind.

That they train alike and outlive a killed worker: benchmarks/many_processes.py, run by tests/test_survival.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from ctvae import __main__, checkpoint, ranks
from ctvae.config import Data, Training, load_recipe
from ctvae.dataset import Dataset
from ctvae.device import batch_indices, generator, make_fabric
from ctvae.errors import ConfigError
from ctvae.latents import LatentCode, LatentSet
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks, here
from ctvae.runlog import Clock
from ctvae.training import pace, settings
from ctvae.training.groups import TrainingGroups
from ctvae.training.prior import Conditioning, FlowObjective, flow_batches

SHAPE = (64, 32, 32)
ROOT = Path(__file__).parents[1]


def of(world: int) -> list[Ranks]:
    return [Ranks(rank, world, rank, world) for rank in range(world)]


@pytest.fixture
def second_of_two(monkeypatch) -> None:
    """This process is one that torchrun started."""
    said = {"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"noise_hu": 7.0}, {"patch": (8, 16, 16)}, {"patch": (8, 16, 16), "noise_hu": 7.0}])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_processes_rows_are_the_batch_of_one(tiny_dataset, options, world):
    dataset = Dataset.open(tiny_dataset)
    groups = dataset.groups("train")
    data = Data(max_shift_voxels=(1, 4, 4), **options)
    whole = TrainingGroups(dataset, groups, data, SHAPE).batch(6, seed=0, step=3)
    parts = [TrainingGroups(dataset, groups, data, SHAPE, rank).batch(6, seed=0, step=3) for rank in of(world)]
    assert {len(part) for part in parts} == {6 // world}
    assert torch.equal(torch.cat(parts), whole)


def test_no_process_reads_the_others_groups(tiny_dataset, monkeypatch):
    dataset = Dataset.open(tiny_dataset)
    groups, read = dataset.groups("train"), []
    plain = Dataset.hu
    monkeypatch.setattr(Dataset, "hu", lambda self, group: read.append(group.id) or plain(self, group))
    TrainingGroups(dataset, groups, Data(), SHAPE, Ranks(1, 3)).batch(3, seed=0, step=0)
    assert read == [groups[batch_indices(len(groups), 3, 0, 0)[1]].id]


def test_noise_is_that_of_one_process():
    whole = torch.randn(6, 2, 5, generator=generator(0, 4))
    parts = [rank.normal((2, 2, 5), generator(0, 4)) for rank in of(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ALONE.normal((6, 2, 5), generator(0, 4)), whole)


def test_the_flows_batches_and_losses_are_those_of_one_process():
    cfg = load_recipe("wavelet3d", ["prior.batch=4", "prior.null_probability=0.5"])
    random = generator(0, 0)
    moments = torch.randn(5, 2, 2, 3, 3, generator=random)
    latents = LatentSet(moments.half(), (moments - 3).half(), torch.rand(5, 3, generator=random), list("abcde"))
    code, conditioning = LatentCode.fit(latents), Conditioning.fit(latents.conditions)

    class Velocity(torch.nn.Module):
        def forward(self, x, t, told):
            return x * t.view(-1, 1, 1, 1, 1) + told.nan_to_num(0.3).sum(1).view(-1, 1, 1, 1, 1)

    def of_rank(rank: Ranks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = flow_batches(cfg, code, conditioning, rank)(latents, 9)
        return batch.mean, batch.conditions, FlowObjective(Velocity(), cfg.prior, rank)(batch, generator(0, 9))

    whole = of_rank(ALONE)
    for world in (2, 4):
        for name, one, parts in zip(("x1", "conditions", "loss"), whole, zip(*map(of_rank, of(world)), strict=True), strict=True):
            torch.testing.assert_close(torch.cat(parts), one, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    assert whole[1].isnan().any()
    assert not whole[1].isnan().all()


@pytest.mark.parametrize(("count", "batch"), [(5, 2), (7, 7), (3, 8)])
def test_an_epoch_visits_every_item_once_in_an_order_of_its_own(count, batch):
    """The data order is a function of (seed, position): however the positions are cut into batches."""
    seen = [index for step in range(count) for index in batch_indices(count, batch, 1, step)]
    epochs = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert seen == [batch_indices(count, 1, 1, position)[0] for position in range(len(seen))]
    assert seen != [index for step in range(count) for index in batch_indices(count, batch, 2, step)]


@pytest.mark.parametrize(
    ("processes", "stage", "line"),
    [
        (2, "both", "autoencoder.batch 3 does not divide among 2 processes; add --set autoencoder.batch=4"),
        (3, "autoencoder", "polish.batch 4 does not divide among 3 processes; add --set polish.batch=6"),
        (3, "prior", "prior.batch 8 does not divide among 3 processes; add --set prior.batch=9"),
        (4, "prior", None),
        (1, "both", None),
    ],
)
def test_batches_that_do_not_divide_are_refused(processes, stage, line):
    cfg = load_recipe("wavelet3d", ["autoencoder.batch=3", "polish.enabled=true", "polish.batch=4", "prior.batch=8"])
    if line is None:
        settings.refuse_uneven(cfg, stage, processes)
        return
    with pytest.raises(ConfigError) as caught:
        settings.refuse_uneven(cfg, stage, processes)
    assert str(caught.value) == line


def test_a_method_whose_layers_look_across_the_batch_is_refused():
    with pytest.raises(ConfigError, match="conv3d: its BatchNorm"):
        settings.refuse_uneven(load_recipe("conv3d"), "both", 2)
    settings.refuse_uneven(load_recipe("conv3d"), "prior", 2)


def test_hours_are_measured_on_one_processs_share(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    """Of a batch of 8 among 4: two groups of 1 s each."""
    monkeypatch.setattr(pace, "prior_step_seconds", lambda cfg: float(cfg.prior.batch))
    free = (*(text for text in tiny_settings if not text.startswith("prior.batch")), "prior.batch=8")
    settled = settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", settings.Asked(free, processes=4))
    assert settings.with_hours(settled, 0.1, "prior", processes=4).cfg.prior.steps == 180
    with pytest.raises(ConfigError, match="--memory plans for one process"):
        settings.settle(Dataset.open(tiny_dataset), tmp_path / "run", settings.Asked(free, memory_gb=4, processes=4))


# --- one writer -------------------------------------------------------------------------------------------------------


def test_torchruns_word_is_taken(second_of_two):
    assert here() == Ranks(1, 2, 1, 2)


def test_alone_is_the_first_of_one(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # somebody else's
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert here() == ALONE
    assert ALONE.first


def test_the_others_write_and_say_nothing(second_of_two, tmp_path, capsys):
    checkpoint.save(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    with Progress("work", total=2) as bar:
        bar.update(1, loss=0.5)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_is_not_shared_out_is_refused(second_of_two, tmp_path, capsys):
    assert __main__.run(["prepare", str(tmp_path), "--out", str(tmp_path / "data")]) == 2
    assert "prepare is not shared out; start it without torchrun" in capsys.readouterr().err


def test_the_first_processs_clock_counts():
    class Second(Ranks):
        def told(self, _):
            return 0.75

    assert Clock(Training(), 100, minutes=1.0, ranks=Second(1, 2)).progress(10) == 0.75
    assert Clock(Training(), 100, minutes=None, ranks=Second(1, 2)).progress(10) == 0.1


# --- agreement, among real processes ----------------------------------------------------------------------------------

TALK = """
import torch
from ctvae.errors import InputError
from ctvae.ranks import joined
def refuse():
    raise InputError("no such folder")
with joined() as ranks:
    r = ranks.rank
    assert ranks.world == 2
    assert ranks.told(lambda: {"x": [0.1, r]}) == {"x": [0.1, 0]}
    assert ranks.told(lambda: r + 0.5) == 0.5
    assert ranks.mean(torch.tensor([1.0 + r, -3.0])).tolist() == [1.5, -3.0]
    assert ranks.mean(torch.tensor(1.0 + r, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ranks.gathered(torch.full((2, 3), float(r)).half().T.contiguous().T).tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert ranks.any(torch.tensor(r == 1)) and not ranks.any(torch.tensor(False))
    assert ranks.agreed(7) == 7
    try:
        ranks.agreed(7 + r)
    except InputError as error:
        assert "[7, 8]" in str(error)
    else:
        raise AssertionError("not noticed")
    ranks.barrier()
    try:
        ranks.told(refuse)
    except InputError as error:
        assert r == 0 and str(error) == "no such folder"
    except SystemExit as end:
        assert r == 1 and end.code == 2
    else:
        raise AssertionError("not refused")
print("agreed")
"""


def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        said = {"TORCHELASTIC_RUN_ID": "test", "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        told = {**os.environ, **said, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-W", "error", "-c", TALK]
        processes.append(subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=250) for process in processes]
    assert [out for out, _ in answers] == ["agreed\n"] * 2, answers


def test_the_address_of_a_dead_process_is_not_believed(monkeypatch):
    """torchrun's store still names a port where nobody listens; the second process waits for the first one's."""
    board = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as dead:
        dead.bind(("localhost", 0))
        board.set("ctvae", str(dead.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(board.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(ranks, "CONNECTING", timedelta(seconds=1))
    with ThreadPoolExecutor() as pool:
        second = pool.submit(ranks._fresh_store, Ranks(1, 2, 1, 2))
        time.sleep(1.5)
        assert not second.done()
        first = ranks._fresh_store(Ranks(0, 2, 0, 2))
        first.set("said", "hello")
        assert second.result(60).get("said") == b"hello"


def test_one_of_several_may_train_alone(second_of_two):
    """As the first does to measure a step: torchrun's environment is there, and nobody else takes part."""
    fabric, network = make_fabric("fp32"), torch.nn.Linear(2, 1)
    run, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=1.0))
    fabric.backward(run(torch.ones(1, 2, device=fabric.device)).sum())
    before = network.bias.item()
    optimizer.step()
    assert network.bias.item() == pytest.approx(before - 1.0)
    assert not torch.distributed.is_initialized()


def test_more_processes_than_cards_are_refused(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes on a machine with 1 cards; say --nproc-per-node 1"), ranks.joined():
        raise AssertionError


LEAVES = """
import atexit, os
from ctvae.ranks import leave
atexit.register(os._exit, 9)  # stands for what goes wrong while Python is taken apart
print("said")
leave(3)
"""


@pytest.mark.parametrize(("world", "code", "heard"), [("2", 3, "said\n"), ("1", 9, "")])
def test_one_of_several_leaves_before_python_is_taken_apart(world, code, heard):
    """With all that it has said, which Python keeps back for a pipe unless told otherwise."""
    rank = {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "WORLD_SIZE": world, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": world}
    env = os.environ | rank | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", LEAVES], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, heard)
