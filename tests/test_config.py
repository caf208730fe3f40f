"""Settings are refused by name and with a remedy; what is written can be read back."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from ctvae.config import RECIPES, WINDOW_PRESETS_HU, Config, dump_config, load_config, load_recipe, recipe_names
from ctvae.errors import ConfigError
from ctvae.networks import Conv3D, Slice2D, Stack2D, Wavelet3D

METHODS = ["wavelet3d", "conv3d", "slice2d", "stack2d-large", "stack2d-small"]


def test_the_five_methods_are_there_and_the_default_comes_first():
    assert recipe_names()[0] == "wavelet3d"
    assert set(METHODS) <= set(recipe_names())


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_survives_a_round_trip_through_yaml(method, tmp_path):
    cfg = load_recipe(method, ["seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(cfg))
    assert load_config(path) == cfg
    assert cfg.method == method
    assert cfg.seed == 7


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_says_in_its_first_line_what_it_is(method):
    first = (RECIPES / f"{method}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert 20 < len(first) < 140


def test_methods_are_the_nets_they_are_named_after():
    kinds = {method: type(load_recipe(method).model) for method in METHODS}
    assert kinds == {
        "wavelet3d": Wavelet3D,
        "conv3d": Conv3D,
        "slice2d": Slice2D,
        "stack2d-large": Stack2D,
        "stack2d-small": Stack2D,
    }


def test_the_research_groups_stacks():
    """2 to 16 features for the small one, 16 to 512 for the large one (issue 2)."""
    small, large = (load_recipe(f"stack2d-{size}").model for size in ("small", "large"))
    assert isinstance(small, Stack2D)
    assert isinstance(large, Stack2D)
    assert (small.widths[0], small.widths[-1]) == (2, 16)
    assert (large.widths[0], large.widths[-1]) == (16, 512)


WRONG_OVERRIDES = {
    "model.latent_chanels=16": "unknown key 'model.latent_chanels', did you mean 'latent_channels'?",
    "autoencoder.lrr=0.1": "unknown key 'autoencoder.lrr', did you mean 'lr'?",
    "model.patch=[64,64,64]": "unknown key 'model.patch', did you mean 'data.patch'?",
    "datta.noise_hu=1": "unknown key 'datta', did you mean 'data'?",
    "autoencoder.lr=-1": "autoencoder.lr: Input should be greater than 0",
    "autoencoder.lr": "write it as key=value",
    "method.x=1": "'method' is a value, not a section",
    "autoencoder.save_every=30": "save_every 30 is not a multiple of log_every 20",
    "data.window_hu=lung": "window_hu: 'lung' is not one of full, abdomen, soft",
    "data.window_hu=[200, -50]": "window_hu: 200 is not below -50",
    "polish.adversarial=wgan": "polish.adversarial: Input should be 'hinge', 'lsgan' or 'relativistic'",
    "polish.patch=hole": "polish.patch: 'hole' is neither a size, e.g. [32, 96, 96], nor whole",
    "finish.patch=[0, 96, 96]": "finish.patch.0: Input should be greater than or equal to 1",
    "autoencoder.lr={": "cannot read the value '{'",
}


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown method 'conv3dd', did you mean 'conv3d'") as caught:
        load_recipe("conv3dd")
    assert "\n" not in str(caught.value)
    assert all(method in str(caught.value) for method in METHODS)


@pytest.mark.parametrize(("override", "answer"), WRONG_OVERRIDES.items(), ids=WRONG_OVERRIDES)
def test_a_wrong_setting_is_answered_in_one_line(override, answer):
    with pytest.raises(ConfigError) as caught:
        load_recipe("wavelet3d", [override])
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_read_as_people_write_numbers():
    cfg = load_recipe("wavelet3d", ["autoencoder.lr=1e-3", "prior.minutes=null", "data.max_shift_voxels=[0, 1, 2]"])
    assert cfg.autoencoder.lr == 1e-3
    assert cfg.prior.minutes is None
    assert cfg.data.max_shift_voxels == (0, 1, 2)


def test_a_later_override_wins():
    assert load_recipe("wavelet3d", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(("name", "window_hu"), WINDOW_PRESETS_HU.items())
def test_windows_have_names(name, window_hu):
    assert load_recipe("wavelet3d", [f"data.window_hu={name}"]).data.window_hu == window_hu


def test_the_groups_window_is_a_preset():
    assert WINDOW_PRESETS_HU["abdomen"] == (-50.0, 200.0)  # issue 2


def test_each_stage_has_its_own_patch_or_that_of_the_data():
    cfg = load_recipe("wavelet3d", ["data.patch=[32,48,64]", "polish.patch=whole", "finish.patch=[32,96,96]"])
    assert [cfg.patch_of(stage) for stage in ("autoencoder", "polish", "finish")] == [(32, 48, 64), None, (32, 96, 96)]
    assert load_recipe("wavelet3d").patch_of("polish") == load_recipe("wavelet3d").data.patch


def test_settings_cannot_be_changed_after_they_are_checked():
    with pytest.raises(ValidationError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


def test_the_grid_multiplies_the_strides():
    model = Wavelet3D(strides=((1, 2, 2), (2, 2, 2)), widths=(8, 16), blocks=(1, 1))
    assert model.grid == (2, 4, 4)
    assert Conv3D(widths=(4, 8, 16)).grid == (8, 8, 8)
    assert Stack2D(stages=4, slices_per_stack=4).grid == (4, 16, 16)


@pytest.mark.parametrize("text", ["{", "- a\n- b", "method: [", ""], ids=["brace", "list", "bracket", "empty"])
def test_a_damaged_config_file_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: ") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml")


def test_what_is_saved_is_plain_yaml():
    tree = yaml.safe_load(dump_config(Config()))
    assert tree["data"]["window_hu"] == [-1000.0, 1000.0]
    assert tree["model"]["kind"] == "wavelet3d"
