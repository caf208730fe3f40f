"""Models and datasets from anywhere: nothing in them is run, nothing they claim is allocated, no path in them leads out."""

from __future__ import annotations

import ast
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ctvae import checkpoint, files, nifti
from ctvae.checkpoint import load, save
from ctvae.config import dump_config, load_recipe, with_overrides
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError, InputError, ModelError, ScanRejected
from ctvae.model import open_model
from ctvae.models import build
from ctvae.planning.planfile import plan_overrides
from ctvae.prepare import prepare
from ctvae.runlog import Run
from ctvae.training.prior import build_velocity
from ctvae.volume import Volume, plain_affine
from ctvae.wiener import WienerVelocity

PACKAGE = Path(__file__).parents[1] / "src" / "ctvae"
RUNS_CODE = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
CALLS = {"torch.load", "np.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "__import__", "np.fromfile"}
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def offences(source: str) -> list[str]:
    """What in a source file could run what a data file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [name for name in names if name.partition(".")[0] in RUNS_CODE]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name] * (name in CALLS)
            found += [f"{name}(allow_pickle=...)" for word in node.keywords if word.arg == "allow_pickle"]
            if name == "yaml.load" and "Plain" not in [dotted(argument) for argument in node.args]:
                found.append(name)
    return found


def test_the_search_for_offences_finds_them():
    assert offences("torch.load(x, weights_only=True)") == ["torch.load"]  # a restricted pickle is one still
    source = "import pickle\nfrom joblib import load\ntorch.load(x)\nnp.load(x, allow_pickle=True)\nyaml.load(x, Loader)\neval(x)"
    assert len(offences(source)) == 7


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_can_run(path):
    assert offences(path.read_text(encoding="utf-8")) == []


# --- weights -------------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_does_not_run(tmp_path, kind):
    path, mark = tmp_path / "autoencoder.safetensors", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save({"weight": Payload(mark)}, path)
    with pytest.raises(ModelError, match="not a ctvae weights file"):
        checkpoint.load(path)
    assert not mark.exists()


def raw_safetensors(path: Path, header: str | bytes, body: bytes = b"\0" * 8, length: int | None = None) -> Path:
    content = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + body)
    return path


def tensor_header(shape: list[int], stop: int, meta: str = "{}") -> str:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}
    return json.dumps({"__metadata__": {"ctvae": meta}, "weight": tensor})


HOSTILE = {
    "claims terabytes": lambda path: raw_safetensors(path, tensor_header([2**40], 2**42)),
    "shape beyond its bytes": lambda path: raw_safetensors(path, tensor_header([2**40], 8)),
    "overflowing shape": lambda path: raw_safetensors(path, tensor_header([2**62, 2**62], 8)),
    "negative shape": lambda path: raw_safetensors(path, tensor_header([-1], 8)),
    "a header of exabytes": lambda path: raw_safetensors(path, "{}", length=2**63),
    "a header longer than the file": lambda path: raw_safetensors(path, "{}", length=2**30),
    "a deep header": lambda path: raw_safetensors(path, "[" * 10**6),
    "deep metadata": lambda path: raw_safetensors(path, tensor_header([2], 8, "[" * 10**5)),
    "metadata that is a list": lambda path: raw_safetensors(path, tensor_header([2], 8, "[1]")),
    "a shape of words": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"shape": ["a", 2, 3]}')),
    "a shape of truth": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"shape": [true, 2, 3]}')),
    "an empty shape": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"shape": []}')),
    "a negative volume": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"shape": [64, -2, -2]}')),
    "an enormous volume": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"shape": [60000, 60000, 60000]}')),
    "enormous latents": lambda path: raw_safetensors(path, tensor_header([2], 8, '{"latent_shape": [8, 100000, 100000]}')),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_weights_file_is_refused_in_one_line(tmp_path, what):
    path = HOSTILE[what](tmp_path / "weights.safetensors")
    with pytest.raises(ModelError) as refusal:
        checkpoint.load(path)
    said = str(refusal.value)
    assert said.startswith(f"{path}: not a ctvae weights file or damaged (")
    assert "\n" not in said
    assert len(said) < 600


@QUICK
@given(flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_bytes_are_weights_or_refused(tmp_path, flips):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, path, metadata={"ctvae": '{"shape": [64, 80, 128]}'})
    raw = bytearray(path.read_bytes())
    for place, value in flips:
        raw[place % len(raw)] = value
    path.write_bytes(raw)
    try:
        tensors, _ = checkpoint.load(path)
    except ModelError:
        return
    assert sum(value.nbytes for value in tensors.values()) <= len(raw)


def test_weights_are_put_into_the_network_that_the_config_describes():
    cfg = load_recipe("conv3d", ["model.widths=[2,4]", "model.latent_size=3"])
    shape = (16, 16, 16)
    weights = {name: value.half() for name, value in build(cfg.model, shape).state_dict().items()}
    network = checkpoint.built(lambda: build(cfg.model, shape), weights, Path("run"))
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


@pytest.mark.parametrize("width", [5, 10**6])
def test_a_config_that_claims_other_widths_than_the_weights_have_is_refused_before_memory_is_taken(width):
    weights = nn.Linear(4, 4).state_dict()
    devices = []

    def make() -> nn.Module:
        network = nn.Linear(width, width)
        devices.append(network.weight.device.type)
        return network

    with pytest.raises(ModelError, match=rf"run: weights do not fit .* \(bias: 4 there, {width} by the config; 2 differ"):
        checkpoint.built(make, weights, Path("run"))
    assert devices == ["meta"]  # 10**6 squared are four terabytes


# --- runs and datasets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["[" * 10**5, "[]", "{}", '{"stages": [], "dataset": "x"}', '{"stages": {}, "dataset": 3}', "\0"], ids=range(6)
)
def test_a_hostile_run_json_is_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ModelError, match=r"run\.json is missing or damaged"):
        _ = Run(tmp_path).state


GROUP = {
    "id": "a_0000", "patient": "a", "split": "train", "path": "groups/a_0000.nii", "label_path": None, "shape": [8, 8, 8],
    "spacing_mm": [1.0, 1.0, 2.0], "affine": np.diag([-1.0, -1, 2, 1]).tolist(), "position": 0.5, "first_slice": 0,
    "source": "a.nii", "sha256": "0" * 64,
}  # fmt: skip
DATASET = {"format": 1, "settings": {}, "measured": {}, "notes": [], "rejected": [], "scans": [], "groups": [GROUP]}


def open_dataset(folder: Path, content: object) -> Dataset:
    (folder / "dataset.json").write_text(json.dumps(content) if not isinstance(content, str) else content)
    return Dataset.open(folder)


HOSTILE_GROUPS = [
    {"path": "../../etc/passwd.nii"}, {"path": "/etc/passwd.nii"}, {"path": "groups/../../x.nii"}, {"path": "C:/x.nii"},
    {"path": "groups\\..\\x.nii"}, {"path": "x\0.nii"}, {"path": "groups/x.nii.gz"}, {"path": "groups/x.mgz"}, {"path": 3},
    {"label_path": "../x.nii.gz"}, {"label_path": "labels/x.npz"}, {"id": "../x"}, {"id": "/x"}, {"id": 3}, {"patient": ["a"]},
    {"shape": [60000, 60000, 60000]}, {"shape": [8, 8, -8]}, {"shape": [8, 8, 0]}, {"shape": [1e999, 8, 8]},
    {"spacing_mm": [0, 1, 1]}, {"spacing_mm": [-1, 1, 1]}, {"spacing_mm": [float("nan"), 1, 1]},
    {"affine": [[float("inf")] * 4] * 4},
    {"affine": "none"}, {"position": float("nan")}, {"position": None}, {"split": "dev"}, {"__class__": "os.system"},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE_GROUPS, ids=str)
def test_a_hostile_group_is_refused_when_the_dataset_is_opened(tmp_path, change):
    assert open_dataset(tmp_path, DATASET).groups()[0].id == "a_0000"
    with pytest.raises(InputError) as refusal:
        open_dataset(tmp_path, {**DATASET, "groups": [{**GROUP, **change}]})
    assert str(refusal.value).startswith(f"{tmp_path / 'dataset.json'}: damaged (")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    ["[" * 10**5, '{"format": 1, "groups": ' + "[" * 10**5, {**DATASET, "groups": "abc"}, {**DATASET, "settings": []},
     {**DATASET, "measured": 3}, {**DATASET, "scans": {}}, {**DATASET, "groups": [3]}],
    ids=range(7),
)  # fmt: skip
def test_a_hostile_dataset_json_is_one_line(tmp_path, content):
    with pytest.raises(InputError) as refusal:
        open_dataset(tmp_path, content)
    assert "\n" not in str(refusal.value)


def test_a_group_file_that_is_something_else_is_not_mapped(tmp_path):
    hu = np.zeros((4, 5, 6), np.int16)
    path = tmp_path / "group.nii"
    nifti.write(path, Volume(hu, plain_affine((1, 1, 2), hu.shape)))
    np.testing.assert_array_equal(nifti.mapped(path), hu)
    raw = path.read_bytes()
    shapes = [(40, "<8h", (3, 6, 5, 400, 1, 1, 1, 1)), (40, "<8h", (4, 6, 5, 2, 2, 1, 1, 1)), (40, "<2h", (3, -6))]
    types = [(70, "<h", (16,)), (70, "<h", (999,))]
    places = [(108, "<f", (float("nan"),)), (108, "<f", (-400.0,))]
    for start, form, values in [*shapes, *types, *places]:
        changed = bytearray(raw)
        struct.pack_into(form, changed, start, *values)
        path.write_bytes(changed)
        with pytest.raises(ScanRejected, match="prepare the dataset again"):
            nifti.mapped(path)


@pytest.mark.parametrize("place", ["../../kept.nii", "/tmp/kept.nii", "groups/../../../kept.nii"])
def test_a_scans_record_cannot_have_a_file_elsewhere_deleted(tmp_path, place):
    """`prepare` deletes the groups that it made of a scan before; a folder from anywhere may say that they lie outside."""
    hu = hostile_files.body(0, (8, 24, 24))
    nifti.write(tmp_path / "in" / "a.nii", Volume(hu, plain_affine((1.5, 1.5, 3), hu.shape)))
    prepare(tmp_path / "in", tmp_path / "made" / "ds", slices=8, workers=1)
    kept, path = tmp_path / "kept.nii", tmp_path / "made" / "ds" / "scans" / "a.json"
    kept.write_text("somebody's")
    record = json.loads(path.read_text())
    record["fingerprint"] = "changed"
    record["groups"][0]["path"] = str(kept) if place.startswith("/") else place
    path.write_text(json.dumps(record))
    prepare(tmp_path / "in", tmp_path / "made" / "ds", slices=8, workers=1)
    assert kept.exists()
    assert json.loads(path.read_text())["groups"][0]["path"] == "groups/a_0000.nii"


@pytest.mark.parametrize("content", ["[", "3", '{"groups": 3}', '{"groups": [3]}', '{"groups": [{}]}', "[" * 10**5], ids=range(6))
def test_a_scans_record_that_is_damaged_is_made_again(tmp_path, content):
    hu = hostile_files.body(0, (8, 24, 24))
    nifti.write(tmp_path / "in" / "a.nii", Volume(hu, plain_affine((1.5, 1.5, 3), hu.shape)))
    before = prepare(tmp_path / "in", tmp_path / "ds", slices=8, workers=1).fingerprint
    (tmp_path / "ds" / "scans" / "a.json").write_text(content)
    assert prepare(tmp_path / "in", tmp_path / "ds", slices=8, workers=1).fingerprint == before


# --- JSON and YAML -------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(LAUGHS, "aliases"), ("[" * 10_000, "deep"), ("a: !!python/object/apply:os.system ['true']", "YAML"), ("a: [1", "YAML"),
     ("a: b\n" * 100_000, "larger")],
    ids=["laughs", "deep", "code", "damaged", "large"],
)  # fmt: skip
def test_hostile_yaml_is_refused(tmp_path, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        files.read_yaml(tmp_path / "config.yaml")


def test_hostile_plans_are_refused(tmp_path):
    code = ("method: !!python/name:os.system", "method: ../../etc/passwd", "method: wavelet3d\ncode: os")
    for text in (LAUGHS, "[" * 10_000, *code):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.yaml: ") as refusal:
            plan_overrides(tmp_path / "plan.yaml")
        assert "\n" not in str(refusal.value)


def test_a_config_is_read_as_by_yaml_itself(tmp_path):
    import yaml

    from ctvae.config import dump_config

    text = dump_config(load_recipe("wavelet3d"))
    (tmp_path / "config.yaml").write_text(text)
    assert files.read_yaml(tmp_path / "config.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../../b", "a\\b", "C:/a", "a\0"])
def test_a_path_that_leaves_its_folder_is_refused(path):
    with pytest.raises(ValueError, match="leaves its folder"):
        files.inside(path)
    assert files.inside("groups/a.nii") == "groups/a.nii"


def test_json_that_is_too_large_or_deep_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" + "1," * 1000 + "1]")
    assert len(files.read_json(tmp_path / "a.json")) == 1001
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        files.read_json(tmp_path / "a.json", 100)
    (tmp_path / "a.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="deep"):
        files.read_json(tmp_path / "a.json")


# --- a whole model folder --------------------------------------------------------------------------------------------


def small_model(folder: Path, **model: Any) -> Path:
    """A model folder with a flow, as training writes it; `model` replaces what config.yaml says after the weights are made."""
    sizes = ["model.widths=[4,4]", "model.latent_channels=2", "prior.widths=[32,32]", "prior.detail_width=8"]
    cfg = with_overrides(load_recipe("wavelet3d"), sizes)
    network = build(cfg.model, (4, 4, 8))
    save(folder / "autoencoder.safetensors", network.state_dict(), {"shape": (4, 4, 8)})
    wiener = WienerVelocity(torch.zeros(4), torch.ones(1, 4), torch.ones(4))
    flow = {f"flow.{k}": v for k, v in build_velocity(cfg.prior, (2, 1, 1, 2), 3, wiener).state_dict().items()}
    code = {"code.shift": torch.zeros(2), "code.scale": torch.ones(2)}
    told = {"conditions.mean": torch.zeros(3), "conditions.std": torch.ones(3), "conditions.known": torch.ones(2, 3)}
    meta = {"latent_shape": (2, 1, 1, 2), "conditions": ["position", "pixel_mm", "slice_mm"]}
    save(folder / "prior-flow.safetensors", {**flow, **code, **told}, meta)
    claimed = cfg.model_copy(update={"model": cfg.model.model_copy(update=model)})
    (folder / "config.yaml").write_text(dump_config(claimed))
    return folder


def test_a_model_folder_as_training_writes_it_opens_and_draws(tmp_path):
    assert open_model(small_model(tmp_path)).draw("flow", 0, 0, steps=1).latent.shape == (1, 2, 1, 1, 2)


def test_a_model_whose_config_claims_enormous_widths_takes_no_memory(tmp_path):
    folder = small_model(tmp_path, widths=(8192, 8192))  # some 90 GB of weights
    with pytest.raises(ModelError, match=r"weights do not fit config\.yaml"):
        open_model(folder)


@pytest.mark.parametrize("setting", ["widths=[1000000,4]", "latent_channels=100000000", "blocks=[1,100000]"])
def test_sizes_beyond_any_network_are_refused_by_the_config(setting):
    with pytest.raises(ConfigError, match="less than or equal"):
        with_overrides(load_recipe("wavelet3d"), [f"model.{setting}"])


def test_a_config_of_aliases_is_refused(tmp_path):
    folder = small_model(tmp_path)
    (folder / "config.yaml").write_text("a: &a [1, 1]\nb: [*a, *a]\n")
    with pytest.raises(ConfigError, match="aliases"):
        open_model(folder)


@pytest.mark.parametrize("lost", ["flow.mean", "conditions.std", "conditions.known", "flow.correction.entry.weight"])
def test_a_flow_without_one_of_its_tensors_is_refused_in_one_line(tmp_path, lost):
    path = small_model(tmp_path) / "prior-flow.safetensors"
    tensors, meta = load(path)
    del tensors[lost]
    save(path, tensors, meta)
    with pytest.raises(ModelError) as refusal:
        open_model(tmp_path).draw("flow", 0, 0, steps=1)
    assert "\n" not in str(refusal.value)
    assert lost.removeprefix("flow.") in str(refusal.value)


@pytest.mark.parametrize("name", ["autoencoder", "prior-flow"])
def test_weights_that_do_not_say_their_shape_are_refused(tmp_path, name):
    path = small_model(tmp_path) / f"{name}.safetensors"
    save(path, load(path)[0], {})
    with pytest.raises(ModelError, match=r"names no (latent_)?shape"):
        open_model(tmp_path).draw("flow", 0, 0, steps=1)
