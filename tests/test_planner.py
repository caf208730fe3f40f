"""The planner against counting by hand, autograd's own saved tensors, and the resident memory of a real training."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from ctvae import __main__, planner
from ctvae.config import RECIPES, load_recipe
from ctvae.errors import ConfigError, DoesNotFit, InputError
from ctvae.models.wavelet3d import tile_bytes
from ctvae.planning import dry, stages
from ctvae.planning.ledger import dry_run
from ctvae.planning.workspace import Kernels
from ctvae.prepare import prepare

pytestmark = pytest.mark.usefixtures("bf16_machine")
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "planner_accuracy.py"
NO_KERNELS = SimpleNamespace(bytes_inside=lambda *_: 0)
SIZE = (64, 128, 128)
UNSHARPENED = ("polish.enabled=false", "finish.enabled=false")  # following those takes the longest
WHOLE = ("data.patch=null", "autoencoder.batch=1", *UNSHARPENED)  # of wavelet3d, where the recipe takes patches


def config(method: str, size: tuple[int, int, int], *overrides: str):
    return load_recipe(method, (*overrides, f"data.shape={list(size)}"))


@pytest.fixture(scope="module")
def whole3d(tmp_path_factory) -> Iterator[str]:
    """A recipe that asks for WHOLE, so that these are not the user's own settings, which no plan changes."""
    folder = tmp_path_factory.mktemp("recipes")
    recipe = yaml.safe_load((RECIPES / "wavelet3d.yaml").read_text())
    recipe |= {"data": {"patch": None}, "autoencoder": {"batch": 1}, "polish": {"enabled": False}, "finish": {"enabled": False}}
    recipe["prior"] |= {"detail_width": 0}  # the autoencoder is what has to be made to fit
    (folder / "whole3d.yaml").write_text(yaml.safe_dump(recipe))
    for path in RECIPES.glob("*.yaml"):
        shutil.copy(path, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctvae.config.RECIPES", folder)
        yield "whole3d"


# --- the ledger


def test_the_ledger_counts_storages_from_first_to_last_use():
    """Floats of 1000 numbers: x, its exponential, which lets x go, a view, which costs nothing, and a sum in place."""
    with dry_run(NO_KERNELS) as ledger:
        x = torch.ones(1000)
        assert ledger.live_bytes == 4000
        x = x.exp()
        assert (ledger.live_bytes, ledger.peak_bytes) == (4000, 8000)
        view = x.view(10, 100)
        view += 1
        assert ledger.live_bytes == 4000
        del x
        assert ledger.live_bytes == 4000, "the view keeps it"
        del view
        assert ledger.live_bytes == 0
        assert ledger.since() == 8000
        assert ledger.since() == 0


def test_the_ledger_sees_the_backward_pass_and_its_arithmetic():
    """y = W x for W [30 20], x [20 10]: 2 * 30 * 20 * 10 operations forward, as many again for W's gradient."""
    with dry_run(NO_KERNELS) as ledger:
        layer, x = nn.Linear(20, 30, bias=False), torch.ones(10, 20)
        layer(x).sum().backward()
        assert ledger.flops == 2 * (2 * 30 * 20 * 10)
        assert ledger.live_bytes == 4 * (2 * 30 * 20 + 10 * 20)  # weight, its gradient, x


@pytest.mark.parametrize(("method", "overrides"), [("wavelet3d", UNSHARPENED), ("slice2d", ()), ("conv3d", ())])
def test_activations_are_what_autograd_saves(method, overrides):
    """Counted by saved_tensors_hooks: every storage once, weights left out. The input and the loss's tensors are in it."""
    cfg = config(method, (64, 64, 64), *overrides)
    ours = dry.training(cfg, Kernels()).activations
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[id(storage)] = storage
        return tensor

    with dry_run(NO_KERNELS):
        network = dry._network(cfg, dry.whole(cfg))
        own = {id(p.untyped_storage()) for p in [*network.parameters(), *network.buffers()]}
        objective = dry.Objective(network, cfg.autoencoder, cfg.data.window_hu)
        x = torch.empty(cfg.autoencoder.batch, 1, *dry.step_shape(cfg))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), dry.autocast(cfg):
            terms = objective(x, torch.Generator())
        assert terms
        counted = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    assert ours == pytest.approx(counted, rel=0.05)


EIGHTH = (  # latents at an eighth of the resolution: a level more
    *("model.strides=[[2,2,2],[2,2,2],[2,2,2]]", "model.widths=[32,128,160]", "model.blocks=[1,2,2]"),
    *("model.latent_channels=32", "model.strided=false"),
)


@pytest.mark.parametrize(("network", "activations", "step"), [(EIGHTH, 0.6, 0.85), ((), 0.7, 0.9)])
def test_checkpointing_trades_activations_for_arithmetic(network, activations, step):
    """The recipe's two levels have fewer blocks in whose place only their inputs are kept than three have."""
    size = (64, 256, 256)  # of which the activations, and not the weights, take the memory
    plain = dry.training(config("wavelet3d", size, *WHOLE, *network), Kernels())
    checkpointed = dry.training(config("wavelet3d", size, *WHOLE, *network, "model.checkpointing=true"), Kernels())
    assert checkpointed.activations < activations * plain.activations
    assert checkpointed.phases["step"] < step * plain.phases["step"]
    assert 1.1 < checkpointed.flops / plain.flops < 1.35  # a forward pass is a third of a step


def test_static_parts_by_hand():
    """Muon keeps one number per weight, Adam two, and a gradient and an average one each."""
    muon = dry.training(config("wavelet3d", (64, 64, 64), *UNSHARPENED), Kernels())
    assert muon.weights == muon.gradients == muon.average == 4 * muon.parameters
    assert muon.weights <= muon.optimizer < 1.01 * muon.weights  # biases and norms, which are Adam's, are few
    adam = dry.training(config("wavelet3d", (64, 64, 64), *UNSHARPENED, "autoencoder.optimizer=adam"), Kernels())
    assert adam.optimizer == pytest.approx(2 * adam.weights, rel=1e-4)


def test_stages_by_hand():
    """The first convolution sees 8 bands at half size: 3^3 kernels from 8 to 32 channels, two operations a product."""
    table = stages.stages(config("wavelet3d", (64, 256, 256)), (64, 256, 256))
    first = table[0]
    assert (first.name, first.shape, first.parameters) == ("encoder.entries.0", (1, 32, 32, 128, 128), 27 * 8 * 32 + 32)
    assert first.gflop == pytest.approx(2 * 27 * 8 * 32 * 32 * 128 * 128 / 1e9, abs=1e-3)
    cfg = config("wavelet3d", (64, 256, 256), *UNSHARPENED)
    assert sum(stage.parameters for stage in table) == dry.training(cfg, Kernels()).parameters
    assert {stage.shape[1] for stage in table if stage.name == "encoder.to_moments"} == {2 * cfg.model.latent_channels}


@pytest.mark.parametrize(
    "setting", ["train stack2d-large 64x256x256", pytest.param("train wavelet3d 64x128x128", marks=pytest.mark.slow)]
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from Linux's /proc")
def test_predictions_against_resident_memory(setting):
    """The whole loop on random groups in a fresh process, saving and validation included."""
    done = subprocess.run([sys.executable, BENCHMARK, "--only", setting], capture_output=True, text=True, check=True)
    ratios = [float(line.split("|")[-2]) for line in done.stdout.splitlines() if line.startswith("| train")]
    assert ratios
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios), done.stdout


# --- the search


@pytest.fixture(scope="module")
def whole(whole3d) -> planner.Plan:
    return planner.plan(whole3d, SIZE, 24)


def test_what_fits_is_left_as_asked(whole):
    assert whole.fits
    assert whole.as_asked
    assert whole.note.startswith("fits: training needs ")
    assert whole.plan["whole_volume"]
    assert not whole.plan["checkpointing"]
    assert whole.train_peak_gb == max(whole.train_phases_gb.values()) == whole.train_phases_gb["step"]
    assert sum(whole.step_gb.values()) == pytest.approx(whole.train_peak_gb, abs=0.01)


def test_less_memory_means_checkpointing_then_patches(whole):
    checkpointed = planner.plan("whole3d", SIZE, whole.train_peak_gb, ("prior.batch=1",))
    assert checkpointed.plan["checkpointing"]
    assert checkpointed.plan["whole_volume"]
    assert not checkpointed.as_asked
    unchecked = ("model.checkpointing=false", "prior.batch=1")  # a checkpointed step needs less than saving its state
    patched = planner.plan("whole3d", SIZE, whole.train_peak_gb, unchecked)
    assert patched.plan["patch"] == (64, 64, 64)
    for found in (checkpointed, patched):
        assert found.fits
        assert found.note.startswith(f"needs {whole.train_peak_gb:.2f} GB of ")
        assert ", 10% of which stay free; fits with " in found.note, "the two numbers alone would say that it fits"
        assert max(found.train_peak_gb, found.prior_peak_gb, found.encode_peak_gb, found.decode_peak_gb) <= found.memory_gb


def test_a_batch_is_made_smaller_first(whole):
    found = planner.plan("whole3d", SIZE, 1.2 * whole.train_peak_gb, ("prior.batch=1",))
    asked_for_four = dry.training(config("whole3d", SIZE, "autoencoder.batch=4"), Kernels())
    assert found.as_asked
    assert asked_for_four.peak / 1e9 > 1.2 * whole.train_peak_gb
    pinned = planner.plan("whole3d", SIZE, 1.2 * whole.train_peak_gb, ("prior.batch=1", "autoencoder.batch=4"))
    assert pinned.plan["batch"] == 4, "what the user set is left alone"
    assert not pinned.as_asked


def test_what_the_user_set_is_refused_rather_than_changed(whole):
    pinned = ("model.checkpointing=false", "data.patch=null", "prior.batch=1")
    with pytest.raises(DoesNotFit) as refused:
        planner.plan("whole3d", SIZE, whole.train_peak_gb, pinned)
    line = str(refused.value)
    memory = f"{whole.train_peak_gb:.2f} GB of {whole.train_peak_gb:g}"
    assert f"needs {memory}, 10% of which stay free; fits with checkpointing (" in line
    assert "or patches of 64x64x64 (" in line
    assert "\n" not in line


def test_a_method_without_patches_names_the_size_that_fits():
    line = r"^slice2d on 64x256x256 needs 0\.97 GB of 0\.5 for validation; fits on 64x128x128 \(0\.\d+ GB\)$"
    with pytest.raises(DoesNotFit, match=line):
        planner.plan("slice2d", (64, 256, 256), 0.5)


def test_the_cited_net_at_stride_1_is_refused_with_the_reason():
    with pytest.raises(DoesNotFit, match=r"linear layers of .* weights each need .* GB to train; set model\.stride=2"):
        planner.plan("conv3d", (64, 256, 256), 24, ("model.stride=1",))


def test_the_prior_is_part_of_it():
    full = planner.plan("wavelet3d", SIZE, 24, UNSHARPENED)
    tight = planner.plan("wavelet3d", SIZE, 0.9 * full.prior_peak_gb, UNSHARPENED)
    assert tight.fits
    assert tight.plan["prior_batch"] < full.plan["prior_batch"]
    assert tight.prior_peak_gb <= 0.9 * tight.memory_gb
    exact = dry.prior(load_recipe("wavelet3d", tight.overrides), 0, Kernels("cpu", torch.get_num_threads())).phases
    assert tight.prior_peak_gb == pytest.approx(max(exact.values()) / 1e9, abs=0.001)


@pytest.mark.parametrize("gb", [0.5, 2.0, 4.0, 6.0, 40.0])
def test_batches_of_the_prior_that_cannot_fit_are_not_run_dry(gb, monkeypatch):
    """The batch is the largest that fits, found without trying those of which a larger one tells that they do not."""
    tried = []

    def dry_prior(cfg, groups, kernels):
        tried.append(cfg.prior.batch)
        return dry.PriorCost({"encoding": 0, "flow": int((0.4 + 1.6 * cfg.prior.batch) * planner.GB)}, int(0.3 * planner.GB))

    monkeypatch.setattr(planner.dry, "prior", dry_prior)
    changes, _ = planner._Search("wavelet3d", planner.Source((64, 64, 64)), gb, ())._prior(load_recipe("wavelet3d"))
    batch = load_recipe("wavelet3d", changes).prior.batch
    fit = [batch for batch in (8, 4, 2, 1) if 0.4 + 1.6 * batch <= gb * (1 - planner.KEPT_FREE)]
    assert tried[-1] == (fit[0] if fit else 1) == batch
    assert len(tried) <= 2


def test_many_groups_need_memory_of_their_own_up_to_what_is_fitted_to():
    planned = (planner.plan("wavelet3d", SIZE, 24, UNSHARPENED, groups=groups) for groups in (6, 600, 1000, 100_000))
    few, some, many, most = planned
    assert some.prior_phases_gb["fitting"] > 20 * few.prior_phases_gb["fitting"]  # a hundred times as many, all fitted to
    assert most.prior_phases_gb["fitting"] < 2.1 * many.prior_phases_gb["fitting"]
    assert most.prior_phases_gb["flow"] == pytest.approx(few.prior_phases_gb["flow"], rel=0.1)


def test_odd_sizes_are_padded_to_the_grid():
    found = planner.plan("wavelet3d", (30, 61, 70), 24, UNSHARPENED)
    assert found.size == (30, 61, 70)
    assert found.padded == (32, 64, 72)
    assert load_recipe("wavelet3d", found.overrides).data.shape == found.padded


def test_decoding_by_tiles_does_not_grow_with_the_features():
    """Twice the slices: twice the volume around the tile, and no larger tile."""

    def peak(depth: int) -> int:
        size = (depth, 256, 256)
        return dry.decoding(config("wavelet3d", size), size, (32, 64, 64), Kernels())

    assert peak(512) - peak(256) <= 256 * 256 * 256 * 14  # the volume, two copies of it, int16


def test_tiles_are_planned_and_written_down():
    asked = ("data.patch=[16,64,64]", "autoencoder.batch=1", "polish.enabled=false", "finish.enabled=false")
    search = planner._Search("wavelet3d", planner.Source((256, 512, 512)), 1.1, asked)
    cfg = load_recipe("wavelet3d", search._base())
    use = search._use(cfg)
    assert use.tile < (96, 256, 256)
    assert max(use.encoding, use.decoding) <= 0.9 * 1.1e9
    assert planner._Search("wavelet3d", search.source, 24, asked)._use(cfg).tile == (96, 256, 256)
    pinned = planner._Search("wavelet3d", search.source, 1.1, (*asked, "data.tile=[96,256,256]"))
    assert pinned._use(cfg).tile == (96, 256, 256)
    whole = planner.weigh("wavelet3d", planner.Source((32, 64, 64)), 24, (*asked, "data.tile=[32,64,64]"))
    assert whole.plan["decode_tile"] == load_recipe("wavelet3d", whole.overrides).data.tile == (32, 64, 64)


@pytest.mark.parametrize("settings", [(), ("autoencoder.precision=fp32",), ("model.widths=[96,160]",)])
def test_a_model_knows_what_its_tiles_take_without_a_dry_run(settings):
    """A little more than the ledger says, weights left out."""
    size = (256, 256, 256)
    cfg = config("wavelet3d", size, *settings)
    weights = 4 * sum(p.numel() for p in dry._shapes_only(cfg).parameters())
    number = 2 if cfg.autoencoder.precision == "bf16" else 4
    for tile in ((96, 128, 128), (32, 64, 64)):
        exact = max(peak(cfg, (512, 512, 512), tile, Kernels("cuda")) for peak in (dry.encoding, dry.decoding)) - weights
        assert 1 <= tile_bytes(cfg.model, (512, 512, 512), tile, number) / exact < 1.5


def test_a_patch_is_put_on_the_grid_and_refused_where_there_are_none():
    found = planner.plan("wavelet3d", (32, 64, 64), 24, ("data.patch=[30,50,64]", *UNSHARPENED))
    assert found.plan["patch"] == (32, 52, 64)
    assert load_recipe("wavelet3d", found.overrides).data.patch == (32, 52, 64)
    with pytest.raises(ConfigError, match="slice2d trains on whole groups; patches are for wavelet3d"):
        planner.plan("slice2d", (32, 64, 64), 24, ("data.patch=[32,64,64]",))


def test_thick_slices_keep_their_resolution():
    found = planner.plan("wavelet3d", (32, 64, 64), 24, UNSHARPENED, spacing_mm=(0.8, 0.8, 2.5))
    assert found.plan["strides"] == ((1, 2, 2), (2, 2, 2))
    assert load_recipe("wavelet3d", found.overrides).model.strides == found.plan["strides"]
    strides = ("model.strides=[[2,2,2],[1,2,2]]", *UNSHARPENED)
    pinned = planner.plan("wavelet3d", (32, 64, 64), 24, strides, spacing_mm=(0.8, 0.8, 2.5))
    assert pinned.plan["strides"] == ((2, 2, 2), (1, 2, 2))


# --- the command


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = __main__.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_as_json(capsys):
    code, out, _ = call(capsys, "plan", "--method", "stack2d-small", "--size", "64x64x64", "--memory", "2GB", "--json")
    told = json.loads(out)
    assert code == 0
    asked = {"method", "size", "memory_gb", "fits", "train_peak_gb", "encode_peak_gb", "decode_peak_gb", "parameters"}
    assert asked | {"gflop_per_step", "plan"} <= told.keys()
    assert (told["method"], told["size"], told["memory_gb"], told["fits"]) == ("stack2d-small", [64, 64, 64], 2.0, True)
    assert told.keys() == {field.name for field in dataclasses.fields(planner.Plan)}


def test_the_command_for_people_and_its_file(capsys, tmp_path):
    file = tmp_path / "plan.yaml"
    code, out, _ = call(capsys, "plan", "--method", "wavelet3d", "--size", "64x62x62", "--memory", "2GB", "--out", file)
    assert code == 0
    assert "padded to 64x64x64" in out
    assert "encoder.levels.0.0" in out
    assert yaml.safe_load(file.read_text())["data.shape"] == [64, 64, 64]


def test_the_command_refuses_in_one_line(capsys):
    arguments = ("plan", "--method", "slice2d", "--size", "64x256x256", "--memory", "500MB")
    code, out, err = call(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: slice2d on 64x256x256 needs 0.97 GB of 0.5 for validation; fits on ")
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 2
    assert json.loads(out)["fits"] is False
    stride_1 = ("plan", "--method", "conv3d", "--set", "model.stride=1", "--size", "64x256x256", "--memory", "24GB", "--json")
    code, out, err = call(capsys, *stride_1)
    told = json.loads(out)
    assert (code, told["fits"], told["train_peak_gb"], f"error: {told['note']}\n") == (2, False, None, err)
    assert call(capsys, "plan", "--memory", "2GB")[2] == "error: plan: name a DATASET or a size, e.g. --size 64x512x512\n"


def test_a_dataset_tells_its_size_spacing_and_count(tmp_path, capsys, scan_hu, write_nifti):
    for seed in range(4):
        write_nifti(tmp_path / "scans" / f"case_{seed}.nii.gz", scan_hu(seed), (1.0, 1.0, 2.5))
    prepare(tmp_path / "scans", tmp_path / "ds", slices=8, fractions=(0.5, 0.25, 0.25), workers=1)
    settings = [word for text in UNSHARPENED for word in ("--set", text)]
    code, out, _ = call(capsys, "plan", tmp_path / "ds", "--memory", "4GB", "--json", *settings)
    told = json.loads(out)
    assert code == 0
    assert told["size"] == [8, 24, 32]
    assert told["plan"]["strides"] == [[1, 2, 2], [2, 2, 2]]
    assert planner.Source.asked(tmp_path / "ds", "16x32x32").groups == 6
    with pytest.raises(InputError, match="no such dataset"):
        planner.Source.asked(tmp_path / "none", None)


def test_it_is_quick():
    """The issue's own example, start of Python included: under 15 seconds of processor time.

    Where the machine is too slow for that, four times what a small 2D network takes.
    """

    def seconds(*command: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime, done.stdout

    plan = ("-m", "ctvae", "plan", "--memory", "4GB", "--method")
    took, said = seconds(*plan, "wavelet3d", "--size", "64x512x512")
    assert "fits: training needs" in said
    assert took < 15 or took < 4 * seconds(*plan, "slice2d", "--size", "64x64x64")[0]
