"""Ways to need less memory, and what polish and finish take of it, against the plans that come of them."""

from __future__ import annotations

import json

import pytest
import torch

from ctvae import __main__, planner
from ctvae.config import load_recipe
from ctvae.errors import DoesNotFit
from ctvae.planning import dry, remedies
from ctvae.planning.remedies import Option, next_smaller, options
from ctvae.planning.workspace import Kernels

pytestmark = pytest.mark.usefixtures("bf16_machine")
SIZE = (64, 128, 128)


def test_the_polish_is_part_of_it():
    """Of whole groups its step is the larger one where its batch is; a plan makes both batches smaller, and makes up for it."""
    asked = ("data.patch=null", "autoencoder.steps=10", "autoencoder.batch=1", "prior.batch=1", "finish.enabled=false")
    full = planner.weigh("wavelet3d", planner.Source(SIZE), 24, asked)
    assert full.train_phases_gb["polish"] > 1.2 * full.train_phases_gb["step"]
    tight = planner.plan("wavelet3d", SIZE, full.train_peak_gb, asked)
    assert "planned with a batch of 1" in tight.note
    assert {"polish.batch=1", "polish.accumulate=3"} < set(tight.overrides)
    both = options(load_recipe("wavelet3d", ["autoencoder.batch=4", "data.shape=[32,64,64]"]))
    sharpened = ("polish.batch=1", "polish.accumulate=3")
    assert [(option.label, option.changes) for option in both][:2] == [
        ("a batch of 2", ("autoencoder.batch=2", "autoencoder.accumulate=2", *sharpened)),
        ("a batch of 1", ("autoencoder.batch=1", "autoencoder.accumulate=4", *sharpened)),
    ]


def test_a_patch_of_the_polish_is_counted_and_made_smaller_by_itself():
    small = ("data.patch=[16,64,64]", "finish.enabled=false", "prior.batch=1", "polish.batch=1", "autoencoder.batch=1")
    taken = [planner.weigh("wavelet3d", planner.Source(SIZE), 24, (*small, f"polish.patch={own}")) for own in ("null", "whole")]
    assert taken[1].train_phases_gb["polish"] > 1.5 * taken[0].train_phases_gb["polish"]
    assert taken[1].train_phases_gb["step"] == taken[0].train_phases_gb["step"]
    assert (taken[1].plan["patch"], taken[1].plan["polish_patch"]) == ((16, 64, 64), "whole")
    cfg = load_recipe("wavelet3d", [*small, "polish.patch=whole", f"data.shape={list(SIZE)}"])
    crops = [option.changes for option in options(cfg) if option.label.startswith("patches")]
    assert crops == [
        ("polish.patch=[64, 64, 64]",),
        ("polish.patch=[32, 64, 64]",),
        ("polish.patch=[16, 64, 64]",),
        ("model.checkpointing=true", "polish.patch=[16, 64, 64]"),
    ]
    pinned = options(cfg, {"polish.patch"})
    assert not any("polish.patch" in text for option in pinned for text in option.changes), "what the user set is left alone"
    assert next_smaller(cfg, "polish", {"model.checkpointing"}).changes == ("polish.patch=[64, 64, 64]",)
    assert next_smaller(cfg, "autoencoder", {"model.checkpointing"}) is None


def test_bf16_is_what_a_recipe_in_float32_is_offered():
    """stack2d-4x32 on 64x256x256 takes 0.86 GB in float32 and 0.82 in bf16; a tenth stays free."""
    found = planner.plan("stack2d-4x32", (64, 256, 256), 0.94)
    assert found.fits
    assert (found.plan["precision"], "planned with bf16" in found.note) == ("bf16", True)
    assert load_recipe("stack2d-4x32", found.overrides).autoencoder.precision == "bf16"
    with pytest.raises(DoesNotFit, match=r"needs 0\.86 GB of 0\.94"):
        planner.plan("stack2d-4x32", (64, 256, 256), 0.94, ("autoencoder.precision=fp32",))
    cfg = load_recipe("stack2d-4x32", ["data.shape=[64,64,64]", "autoencoder.batch=1", "prior.batch=1", "prior.precision=fp32"])
    for stage in ("autoencoder", "prior"):
        assert next_smaller(cfg, stage) == Option("bf16", (f"{stage}.precision=bf16",))
        assert next_smaller(cfg, stage, {f"{stage}.precision"}) is None


def test_a_machine_without_bf16_is_planned_for_in_float32(monkeypatch):
    asked = ("data.patch=[16,64,64]", "prior.batch=1", "autoencoder.batch=1", "polish.batch=1", "finish.enabled=false")
    half = planner.weigh("wavelet3d", planner.Source(SIZE), 24, asked)
    for module in (planner, remedies):
        monkeypatch.setattr(module, "computes_bf16", lambda: False)
    found = planner.weigh("wavelet3d", planner.Source(SIZE), 24, (*asked, "polish.precision=bf16"))
    cfg = load_recipe("wavelet3d", found.overrides)
    assert (cfg.autoencoder.precision, cfg.polish.precision, cfg.prior.precision) == ("fp32", "bf16", "fp32")
    assert found.note.endswith("; fp32, as this machine does not compute in bf16")
    assert found.train_phases_gb["step"] > half.train_phases_gb["step"]
    assert "bf16" not in [option.label for option in options(cfg)]
    assert planner.precision_overrides(load_recipe("stack2d-small")) == ("prior.precision=fp32",)


def test_a_plan_for_another_machine_is_in_the_precision_of_the_recipe(monkeypatch, capsys):
    """`--memory` alone is for elsewhere; hours are measured on this machine, which computes in float32."""
    for module in (planner, remedies):
        monkeypatch.setattr(module, "computes_bf16", lambda: False)
    command = ["plan", "--method", "slice2d", "--size", "16x32x32", "--json"]
    for more, expected in ((["--memory", "4GB"], "bf16"), ([], "fp32"), (["--memory", "4GB", "--hours", "0.01"], "fp32")):
        assert __main__.run([*command, *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["plan"]["precision"], "fp32" in told["note"]) == (expected, expected == "fp32")


def test_a_network_that_is_downloaded_is_told_to_be_left_out():
    asked = ("data.patch=[16,64,64]", "prior.batch=1", "finish.enabled=false", "polish.perceptual=squeeze")
    note = planner.weigh("wavelet3d", planner.Source((32, 64, 64)), 24, asked).note
    assert note.endswith("; the network of polish.perceptual is not counted")
    assert "\n" not in note


def test_the_finish_is_counted_for_itself():
    """Two patches for each of its batch, and the decoder as it was beside the one that learns."""
    small = ("data.patch=null", "model.widths=[8,16]", "data.shape=[32,64,64]", "polish.batch=3", "finish.batch=1")
    cfg, kernels = load_recipe("wavelet3d", small), Kernels("cpu", torch.get_num_threads())
    phases = dry.training(cfg, kernels).phases
    assert phases["finish"] == dry.finish(cfg, kernels)
    more = load_recipe("wavelet3d", [*small[:-1], "finish.batch=3"])
    assert phases["finish"] < phases["polish"] < dry.finish(more, kernels)
