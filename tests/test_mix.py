"""Several finishes as one decoder: the mean of their weights, and what may not be mixed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ctvae
from ctvae import __main__
from ctvae.checkpoint import load, save
from ctvae.errors import InputError, ModelError
from ctvae.mix import AUTOENCODER
from ctvae.model import Model


def moved(run: Path, out: Path, part: str, by: float, name: str = AUTOENCODER) -> Path:
    """A copy of the run, without a calibration, with the weights of one part of its networks moved."""
    shutil.copytree(run, out)
    (out / "calibration.safetensors").unlink(missing_ok=True)
    tensors, meta = load(out / name)
    moved = {key: value + by if key.startswith(part) and value.is_floating_point() else value for key, value in tensors.items()}
    save(out / name, moved, meta)
    return out


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("finished")
    return [moved(tiny_run, folder / f"{number}", "decoder.", by) for number, by in enumerate((0.0, 0.03, -0.006))]


def test_decoders_are_averaged_and_the_rest_stays(finished, tiny_run, tmp_path):
    before, mixed = (load(folder / AUTOENCODER)[0] for folder in (tiny_run, ctvae.mix(finished, tmp_path / "mixed")))
    assert before.keys() == mixed.keys()
    for name, value in mixed.items():
        expected = before[name] + 0.008 if name.startswith("decoder.") else before[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
        assert value.dtype == before[name].dtype
    assert any(name.startswith("decoder.") for name in mixed)


def test_what_comes_out_is_a_model_with_the_priors_of_the_first(finished, tmp_path):
    model, first = Model(ctvae.mix(finished[:2], tmp_path / "mixed")), Model(finished[0])
    assert model.priors() == first.priors()
    assert model.calibration is None
    latents = [one.draw("flow", 0, 0).latent for one in (model, first)]
    assert torch.equal(*latents)
    assert model.decode(latents[0]).shape == first.decode(latents[1]).shape


def test_one_decoder_twice_is_that_decoder(finished, tmp_path):
    same = load(ctvae.mix([finished[1], finished[1]], tmp_path / "mixed") / AUTOENCODER)[0]
    assert all(torch.equal(value, same[name]) for name, value in load(finished[1] / AUTOENCODER)[0].items())


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [("encoder.", AUTOENCODER, "its encoder is not that of"), ("flow.", "prior-flow.safetensors", "its flow is not that of")],
)
def test_models_of_other_latents_are_not_mixed(finished, tmp_path, part, name, message):
    other = moved(finished[0], tmp_path / "other", part, 0.01, name)
    with pytest.raises(ModelError, match=message):
        ctvae.mix([finished[0], other], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_mistakes_are_one_line(finished, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="two models or more"):
        ctvae.mix(finished[:1], tmp_path / "out")
    for arguments, message in (
        ([str(finished[0]), "--out", str(tmp_path / "out")], "two models or more"),
        ([*map(str, finished), "--out", str(tmp_path / "full")], "full: is not empty"),
        ([str(finished[0]), str(tmp_path / "none"), "--out", str(tmp_path / "out")], "none: no such run folder"),
    ):
        assert __main__.run(["mix", *arguments]) == 2
        told = capsys.readouterr().err.strip()
        assert message in told
        assert "\n" not in told
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert __main__.run(["mix", *map(str, finished), "--out", str(tmp_path / "out")]) == 0
    assert "--stage calibration --from" in capsys.readouterr().err


def test_a_mix_that_was_interrupted_is_begun_anew(finished, tmp_path):
    out = ctvae.mix(finished, tmp_path / "out")
    whole = (out / AUTOENCODER).read_bytes()
    with pytest.raises(InputError, match="is not empty"):
        ctvae.mix(finished, out)
    (out / AUTOENCODER).unlink()
    assert (ctvae.mix(finished, out) / AUTOENCODER).read_bytes() == whole
