"""plan.yaml: what was planned is what is trained; edited, damaged."""

from __future__ import annotations

import pytest

from ctvae import planner
from ctvae.config import load_recipe
from ctvae.errors import ConfigError
from ctvae.planning import planfile

SIZE = (64, 128, 128)


def test_a_plan_file_trains_what_was_planned(tmp_path):
    found = planner.plan("wavelet3d", SIZE, 24, ("autoencoder.lr=1e-3", "data.window_hu=abdomen", "model.checkpointing=true"))
    planfile.write_plan(found, tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert text.startswith("# wavelet3d on 64x128x128")
    assert planfile.plan_method(tmp_path / "plan.yaml") == "wavelet3d"
    again = load_recipe("wavelet3d", planfile.plan_overrides(tmp_path / "plan.yaml"))
    assert again == load_recipe("wavelet3d", found.overrides)
    assert (again.autoencoder.lr, again.data.window_hu, again.model.checkpointing) == (1e-3, (-50.0, 200.0), True)


def test_a_plan_file_can_be_edited_and_damaged(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("method: slice2d\nautoencoder.batch: 3\ndata.shape: [4, 64, 64]\n")
    assert load_recipe(planfile.plan_method(file), planfile.plan_overrides(file)).autoencoder.batch == 3
    file.write_text("method: wavelet3d\nautoencoder: {batch: 2}\npolish:\n  batch: 1\n")  # sections, as in a recipe
    edited = load_recipe("wavelet3d", planfile.plan_overrides(file))
    assert edited == load_recipe("wavelet3d", ["autoencoder.batch=2", "polish.batch=1"])
    file.write_text("method: wavelet3d\nautoencoder.bach: 2\n")
    with pytest.raises(ConfigError, match=rf"^{file}: unknown key 'autoencoder.bach', did you mean 'batch'\?"):
        planfile.plan_overrides(file)
    file.write_text("method: wavelet\n")
    with pytest.raises(ConfigError, match=rf"^{file}: unknown method 'wavelet', did you mean 'wavelet3d'\?"):
        planfile.plan_overrides(file)
    file.write_text("- 3\n")
    with pytest.raises(ConfigError, match="not a plan; it has a line `method: NAME`"):
        planfile.plan_overrides(file)
    with pytest.raises(ConfigError, match="cannot be read as a plan"):
        planfile.plan_overrides(tmp_path / "none.yaml")
