"""Latents on disk: the numbers they have in memory, memory that stays flat, and encoding that goes on where it was killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ctvae import latents as module
from ctvae.checkpoint import load
from ctvae.conditions import Change
from ctvae.config import load_recipe
from ctvae.errors import ModelError
from ctvae.latents import LatentCode, LatentSet, Writer, is_complete, most_fitted
from ctvae.priors import GaussianPrior
from ctvae.ranks import Ranks
from ctvae.runlog import Run
from ctvae.training.encoding import encode_groups
from ctvae.training.prior import Conditioning, fit_closed_form, fit_wiener, flow_batches
from ctvae.training.watch import Known

SHAPE = (2, 3, 4, 5)
COUNT = 23
EACH = 2 * 2 * math.prod(SHAPE)  # bytes of a row's means and log variances


def numbers(count: int = COUNT, shape: tuple[int, ...] = SHAPE) -> LatentSet:
    random = torch.Generator().manual_seed(count)
    means = torch.randn(count, *shape, generator=random) * 3 + 1
    logvars = torch.randn(count, *shape, generator=random) - 2
    told, scan_mm = torch.rand(count, 4, generator=random), torch.rand(count, generator=random)
    groups = [f"g{i // 2}" for i in range(count)]
    patients = [f"p{i // 4}" for i in range(count)]
    return LatentSet(means.half(), logvars.half(), told, groups, ("a", "b", "c", "d"), scan_mm, patients)


def on_disk(latents: LatentSet, folder: Path, rows: int, monkeypatch) -> LatentSet:
    """In shards of `rows` rows, written three at a time, as three processes would."""
    monkeypatch.setattr(module, "MOST_SHARD_BYTES", rows * 2 * 2 * math.prod(latents.shape))
    writer = Writer(folder, latents.groups, latents.scan_mm, latents.names, "it", latents.patients)
    assert writer.begun() == 0
    for start in range(0, len(latents), 3):
        part = slice(start, start + 3)
        writer.add(latents.means[part], latents.logvars[part], latents.conditions[part])
    return LatentSet.load(folder)


@pytest.fixture
def stored(tmp_path, monkeypatch) -> LatentSet:
    return on_disk(numbers(), tmp_path / "latents", 6, monkeypatch)


def test_rows_on_disk_are_those_in_memory(stored, tmp_path):
    latents = numbers()
    assert [path.stem for path in sorted((tmp_path / "latents").iterdir())] == [f"{n:09d}" for n in (0, 6, 12, 18)]
    assert is_complete(tmp_path / "latents")
    assert (len(stored), stored.shape, stored.names, stored.groups) == (COUNT, SHAPE, latents.names, latents.groups)
    assert torch.equal(stored.conditions, latents.conditions)
    assert torch.equal(stored.scan_mm, latents.scan_mm)
    assert stored.whose == latents.patients
    for name in ("means", "logvars"):
        ours, theirs = getattr(stored, name), getattr(latents, name)
        for rows in ([22, 0, 7, 7, -1], slice(4, 15), slice(None), [], slice(20, 99)):
            assert torch.equal(ours[rows], theirs[rows])
    for one, other in zip(stored.plain().batch(5, 1, 2), latents.plain().batch(5, 1, 2), strict=True):
        assert torch.equal(one, other)
    chosen = stored.chosen([3, 20, 5]).chosen([2, 0])
    assert torch.equal(chosen.means[:], latents.means[[5, 3]])
    assert (chosen.groups, chosen.whose) == (["g2", "g1"], ["p1", "p0"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_every_kind_of_number_and_the_one_file_of_earlier_versions_are_read(tmp_path, kind):
    latents = numbers(shape=(2, 5))
    tensors = {"means": latents.means.to(kind), "logvars": latents.logvars.to(kind), "conditions": latents.conditions}
    save_file(tensors, tmp_path / "latents.safetensors", {"ctvae": json.dumps({"groups": latents.groups})})
    again = LatentSet.load(tmp_path / "latents.safetensors")
    assert torch.equal(again.means[[3, 1]], tensors["means"][[3, 1]])
    assert torch.equal(again.logvars[2:9], tensors["logvars"][2:9])
    assert (again.names, again.scan_mm) == (("position", "pixel_mm", "slice_mm"), None)


def test_statistics_in_one_pass_are_those_of_all_numbers(stored, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 3 * math.prod(SHAPE))
    latents = numbers()
    means, variances = latents.means.double(), latents.logvars.double().exp()
    code = LatentCode.fit(stored)
    scale = (means.var((0, 2, 3, 4), correction=0) + variances.mean((0, 2, 3, 4))).sqrt()
    torch.testing.assert_close(code.tensors["shift"], means.mean((0, 2, 3, 4)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(code.tensors["scale"], scale.float(), rtol=1e-6, atol=0)


def test_closed_forms_of_few_rows_are_those_of_all(stored, tmp_path):
    """The filter and the Gaussian against the covariance of all rows."""
    latents, cfg = numbers(), load_recipe("wavelet3d", ["prior.rank=64"])
    code = LatentCode.fit(latents)
    wiener = fit_wiener(cfg.prior, code, stored)
    rows = code.encode(latents.means.float()).flatten(1).double()
    noise = code.scaled((0.5 * latents.logvars.float()).exp()).square().mean(0).flatten()
    torch.testing.assert_close(wiener.mean, rows.mean(0).float(), rtol=1e-4, atol=1e-5)
    dense = wiener.factors.T @ wiener.factors + torch.diag(wiener.rest)
    torch.testing.assert_close(dense, torch.cov(rows.T).float() + torch.diag(noise), rtol=1e-3, atol=1e-4)

    run = Run(tmp_path)
    fit_closed_form(run, stored)
    fitted = GaussianPrior.fit(latents.means.float().numpy(), latents.logvars.float().exp().numpy())
    tensors, _ = load(tmp_path / "prior-gaussian.safetensors")
    np.testing.assert_allclose(tensors["rest"].numpy(), fitted.rest, rtol=1e-5)
    np.testing.assert_allclose(tensors["factors"].numpy(), fitted.factors, rtol=1e-4, atol=1e-5)
    assert torch.equal(tensors["conditions.known"], latents.conditions)


def test_closed_forms_of_many_rows_are_of_some_of_them(stored, monkeypatch):
    """The same ones each time, from all shards; and never more numbers than fit."""
    monkeypatch.setattr(module, "MOST_FITTED", 12)
    few = stored.for_fitting()
    assert len(few) == 12
    same = (few.means[:][:, None] == numbers().means).flatten(2).all(2)  # [12 N]
    order = same.int().argmax(1).tolist()
    assert order == sorted(set(order))
    assert {row // 6 for row in order} == {0, 1, 2, 3}
    assert torch.equal(stored.for_fitting().means[:], few.means[:])
    cfg = load_recipe("wavelet3d", [])
    code = LatentCode.fit(stored)
    assert torch.equal(fit_wiener(cfg.prior, code, stored).mean, fit_wiener(cfg.prior, code, few).mean)
    assert (most_fitted(50_000, (16, 16, 64, 64)), most_fitted(11, (4,)), most_fitted(50_000, (2**30,))) == (12, 11, 2)


def test_a_process_reads_its_rows_of_a_batch_only(stored, monkeypatch):
    cfg = load_recipe("wavelet3d", ["prior.batch=4"])
    code, told = LatentCode.fit(stored), Conditioning.fit(stored.conditions)
    read: list[int] = []
    plain = type(stored.means).__getitem__
    monkeypatch.setattr(type(stored.means), "__getitem__", lambda rows, which: read.extend(which) or plain(rows, which))
    parts = [flow_batches(cfg, code, told, Ranks(rank, 2))(stored, 3) for rank in range(2)]
    assert len(read) == 2 * 4
    whole = flow_batches(cfg, code, told)(numbers(), 3)
    torch.testing.assert_close(torch.cat([part.mean for part in parts]), whole.mean)
    torch.testing.assert_close(torch.cat([part.std for part in parts]), whole.std)


def test_the_nearest_group_is_the_nearest_of_all(stored, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 4 * math.prod(SHAPE))
    code = LatentCode.fit(stored)
    known = code.encode(numbers().means.float()).flatten(1)
    rows = known[[3, 17]] + 0.01 * torch.randn(2, known.shape[1], generator=torch.Generator().manual_seed(1))
    near = Known(code, stored)
    expected = (rows[:, None] - known).square().sum(2).sqrt().amin(1)
    torch.testing.assert_close(near.closeness(rows)[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_shards_that_are_not_all_there_are_named(stored, tmp_path):
    folder = tmp_path / "latents"
    (folder / "000000012.safetensors").unlink()
    assert not is_complete(folder)
    with pytest.raises(ModelError, match="latents: not all latents are there; delete it, and training encodes the groups again"):
        LatentSet.load(folder)
    with pytest.raises(ModelError, match="not all latents"):
        LatentSet.load(tmp_path)
    (folder / "000000000.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(ModelError, match=r"000000000\.safetensors: not a ctvae weights file or damaged"):
        LatentSet.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="cannot be read"):
        stored.means[[0]]


# --- encoding ---------------------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Means are what it is shown, coarsely; it stops after some groups."""

    def __init__(self, until: int = 999):
        super().__init__()
        self.weight, self.until = torch.nn.Parameter(torch.zeros(())), until

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.until -= 1
        if self.until < 0:
            raise KeyboardInterrupt
        coarse = torch.nn.functional.avg_pool3d(x, 2)
        return coarse, coarse.abs() - 3


def groups_of(count: int) -> SimpleNamespace:
    """What `encode_groups` asks of training groups."""

    def turned(_: int, random: torch.Generator, *augmentation: float) -> tuple[torch.Tensor, Change]:
        return torch.randn(1, 4, 6, 8, generator=random), Change(zoom=1.05)

    place = {"position": 0.5, "spacing_mm": (1.0, 1.0, 2.0), "shape": (4, 6, 8)}
    groups = [SimpleNamespace(id=f"g{n}", patient=f"p{n // 2}", first_slice=n, **place) for n in range(count)]
    shown = lambda index: torch.full((1, 4, 6, 8), float(index)) + torch.arange(8.0)  # noqa: E731
    return SimpleNamespace(groups=groups, plain=shown, turned=turned, __len__=lambda: count)


def test_encoding_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_SHARD_BYTES", 5 * 2 * 2 * 2 * 3 * 4)
    cfg, groups = load_recipe("wavelet3d", ["prior.encodings=3"]).prior, groups_of(8)
    encode_groups(Encoder(), groups, cfg, 0, tmp_path / "through", "fp32", "net")
    for until in (3, 7, 2):  # of which 0, 5 and 0 more are on disk afterwards
        with pytest.raises(KeyboardInterrupt):
            encode_groups(Encoder(until), groups, cfg, 0, tmp_path / "killed", "fp32", "net")
    assert [path.stem for path in (tmp_path / "killed").iterdir()] == ["000000000"]
    counted = Encoder()
    encode_groups(counted, groups, cfg, 0, tmp_path / "killed", "fp32", "net")
    assert counted.until == 999 - (24 - 5)
    files = sorted((tmp_path / "through").iterdir())
    assert len(files) == 5
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in sorted((tmp_path / "killed").iterdir())]
    assert LatentSet.load(tmp_path / "killed").plain().whose == [f"p{n // 2}" for n in range(8)]
    assert LatentSet.load(tmp_path / "killed").means[[0, 3, 6]][:, 0, 0, 0, 0].tolist() == [0.5, 1.5, 2.5]


def test_what_another_network_encoded_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_SHARD_BYTES", 2 * 2 * 2 * 2 * 3 * 4)
    cfg, groups = load_recipe("wavelet3d", ["prior.encodings=1"]).prior, groups_of(8)
    with pytest.raises(KeyboardInterrupt):
        encode_groups(Encoder(5), groups, cfg, 0, tmp_path, "fp32", "one")
    (tmp_path / "999999999.safetensors").write_bytes(b"")
    counted = Encoder()
    encode_groups(counted, groups, cfg, 0, tmp_path, "fp32", "other")
    assert counted.until == 999 - 8
    assert len(list(tmp_path.iterdir())) == 4
    assert is_complete(tmp_path)


PROMPT_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PEAK = """
import resource, sys
from pathlib import Path
import torch
from ctvae import latents
from ctvae.config import load_recipe
from ctvae.latents import LatentCode, LatentSet, Writer
from ctvae.training.prior import Conditioning, fit_wiener, flow_batches
from ctvae.training.watch import Watch
latents.MOST_FITTED, latents.MOST_SHARD_BYTES = 100, 2**22
latents.BLOCK_NUMBERS = 2**18
folder, count = Path(sys.argv[1]), int(sys.argv[2])
writer = Writer(folder, [str(n) for n in range(count)], torch.ones(count), ("a",), "it")
random = torch.Generator().manual_seed(0)
for _ in range(count):
    row = torch.randn(1, 4, 8, 16, 32, generator=random).half()
    writer.add(row, row - 3, torch.zeros(1, 1))
stored = LatentSet.load(folder)
cfg = load_recipe("wavelet3d", ["prior.batch=8"])
code = LatentCode.fit(stored)
wiener = fit_wiener(cfg.prior, code, stored)
held_out = stored.chosen(range(count - 100, count))
watch = Watch(code, wiener, stored, held_out, held_out.conditions, 0)
batches = flow_batches(cfg, code, Conditioning.fit(stored.conditions))
for step in range(50):
    batches(stored, step)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_latents(tmp_path):
    """Written, fitted to, looked at and drawn from: 200 and 2,000 latents of 16,384 numbers; 118 MB lie between them."""
    peaks = []
    for count in (200, 2000):
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, env={**os.environ, **PROMPT_MALLOC}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 40, peaks
