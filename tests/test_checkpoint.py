"""Weights at rest: round trips, damage, the moving average against its formula."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ctvae.checkpoint import EMA, Checkpoints, file_hash, load, save
from ctvae.errors import InputError, ModelError
from ctvae.training.optimizer import Muon


def network(seed: int) -> nn.Module:
    """Convolution, norm with running statistics and a counter, linear."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(2, 2))


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, steps: range) -> None:
    """Train on noise that depends on the step alone."""
    for step in steps:
        x = torch.randn(4, 1, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
        ema.update(module, step)


def state(optimizer_kind: type, seed: int) -> tuple[nn.Module, EMA, torch.optim.Optimizer]:
    module = network(seed)
    return module, EMA(module, 0.9), optimizer_kind(module.parameters() if optimizer_kind is not Muon else module, lr=0.01)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_tensors_and_description_come_back(tmp_path):
    tensors = {
        "half": torch.tensor([1.5, -2.0]).half(),
        "bf16": torch.tensor([[3.0]]).bfloat16(),
        "count": torch.tensor(7),
        "strided": torch.arange(24.0).reshape(1, 2, 3, 4, 1).to(memory_format=torch.channels_last_3d),
        "empty": torch.zeros(0, 3),
    }
    meta = {"step": 3, "shape": [64, 80, 128], "name": "Lunge, Übersicht", "nested": {"lr": 1e-3}}
    save(tmp_path / "new" / "weights.safetensors", tensors, meta)
    again, told = load(tmp_path / "new" / "weights.safetensors")
    assert_equal(again, tensors)
    assert {name: value.dtype for name, value in again.items()} == {name: value.dtype for name, value in tensors.items()}
    assert told == meta
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights.safetensors"]  # nothing left beside it


def test_the_file_is_plain_safetensors(tmp_path):
    save(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {"step": 1})
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert file.get_tensor("a").tolist() == [1.0, 1.0]
        assert json.loads(file.metadata()["ctvae"]) == {"step": 1}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_can_be_read_by_whom_other_files_can(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, {"a": torch.zeros(2)}, {"not": object()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as caught:
        save(tmp_path / "file" / "w.safetensors", {"a": torch.ones(1)}, {})
    assert "\n" not in str(caught.value)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    path.write_text("<html>404</html>")


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, path)


@pytest.mark.parametrize("damage", [truncated, emptied, overwritten, foreign, Path.unlink])
def test_damage_is_one_line(tmp_path, damage):
    path = tmp_path / "w.safetensors"
    save(path, {"a": torch.ones(100)}, {})
    damage(path)
    with pytest.raises(ModelError, match="not a ctvae weights file or damaged") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_average_follows_its_formula(decay):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 5.0)
    ema, expected = EMA(module, decay), 5.0
    for step in range(40):
        nn.init.constant_(module.weight, float(step**2))
        ema.update(module, step)
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * step**2
        assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_the_average_does_not_follow_the_module_by_reference():
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    before = ema.weights["weight"].clone()
    nn.init.zeros_(module.weight)
    assert torch.equal(ema.weights["weight"], before)


def test_counters_are_copied_and_running_statistics_averaged():
    module, ema, optimizer = state(torch.optim.Adam, 0)
    stepped(module, optimizer, ema, range(3))
    assert ema.weights["1.num_batches_tracked"].item() == 3
    assert not torch.equal(ema.weights["1.running_var"], module.state_dict()["1.running_var"])


def test_the_average_is_applied_inside_the_block_only():
    module, ema, optimizer = state(torch.optim.Adam, 0)
    stepped(module, optimizer, ema, range(3))
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with ema.applied_to(module):
        assert not module.training
        assert_equal(dict(module.state_dict()), ema.weights)
    assert module.training
    assert_equal(dict(module.state_dict()), own)


def test_the_modules_own_weights_come_back_after_an_error():
    module, ema, optimizer = state(torch.optim.Adam, 0)
    stepped(module, optimizer, ema, range(2))
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), ema.applied_to(module):
        raise KeyboardInterrupt
    assert_equal(dict(module.state_dict()), own)


@pytest.mark.parametrize("kind", [torch.optim.Adam, Muon])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path, kind):
    module, ema, optimizer = state(kind, 0)
    stepped(module, optimizer, ema, range(3))
    Checkpoints(tmp_path, "net").save(3, module, ema, optimizer, {"seconds": 1.5})
    stepped(module, optimizer, ema, range(3, 6))

    other, other_ema, other_optimizer = state(kind, 1)
    meta = Checkpoints(tmp_path, "net").resume(other, other_ema, other_optimizer)
    assert meta == {"step": 3, "seconds": 1.5}
    stepped(other, other_optimizer, other_ema, range(3, 6))
    assert_equal(dict(other.state_dict()), dict(module.state_dict()))
    assert_equal(other_ema.weights, ema.weights)


def test_the_last_two_are_kept_and_others_names_left_alone(tmp_path):
    module, ema, optimizer = state(torch.optim.Adam, 0)
    Checkpoints(tmp_path, "net-detail").save(1, module, ema, optimizer, {})
    checkpoints = Checkpoints(tmp_path, "net")
    for step in (8, 9, 10, 1000):
        checkpoints.save(step, module, ema, optimizer, {})
    assert [path.name for path in checkpoints.paths()] == ["net-00000010.safetensors", "net-00001000.safetensors"]
    checkpoints.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["net-detail-00000001.safetensors"]


@pytest.mark.parametrize("damage", [truncated, emptied, overwritten])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    module, ema, optimizer = state(torch.optim.Adam, 0)
    checkpoints = Checkpoints(tmp_path, "net")
    stepped(module, optimizer, ema, range(2))
    checkpoints.save(2, module, ema, optimizer, {})
    at_two = {name: value.clone() for name, value in module.state_dict().items()}
    stepped(module, optimizer, ema, range(2, 4))
    checkpoints.save(4, module, ema, optimizer, {})
    damage(checkpoints.paths()[-1])
    other, other_ema, other_optimizer = state(torch.optim.Adam, 1)
    assert checkpoints.resume(other, other_ema, other_optimizer)["step"] == 2
    assert_equal(dict(other.state_dict()), at_two)


def test_a_state_of_another_network_is_one_line(tmp_path):
    """As in a run folder from anywhere."""
    module, ema, optimizer = state(torch.optim.Adam, 0)
    checkpoints = Checkpoints(tmp_path, "net")
    checkpoints.save(2, module, ema, optimizer, {})
    (path,) = checkpoints.paths()
    tensors, meta = load(path)
    (name, *_) = (key for key in tensors if key.startswith("ema."))
    without = {key: value for key, value in tensors.items() if key != name}
    other = {**tensors, name: torch.zeros(3, 3)}
    for content, facts in ((without, meta), (other, meta), (tensors, {}), (tensors, {"step": "2"})):
        save(path, content, facts)
        with pytest.raises(ModelError, match=r"net-00000002\.safetensors: is of another network"):
            checkpoints.resume(module, ema, optimizer)


def test_nothing_to_resume_changes_nothing(tmp_path):
    module, ema, optimizer = state(torch.optim.Adam, 0)
    assert Checkpoints(tmp_path / "none", "net").resume(module, ema, optimizer) == {"step": 0}
    assert_equal(dict(module.state_dict()), dict(network(0).state_dict()))
