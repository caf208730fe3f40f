"""The decoder on drawn latents: what moves and what does not, resuming, what it is trained on, what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from ctvae.calibration import Calibration, Places
from ctvae.checkpoint import Checkpoints, load
from ctvae.config import load_config, load_recipe, with_overrides
from ctvae.device import generator
from ctvae.errors import ConfigError, ModelError
from ctvae.generate import load as load_model
from ctvae.grain import Grain
from ctvae.models import build
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.models.tone import KNOTS, Tone
from ctvae.models.wavelet3d import Decoder
from ctvae.ranks import ALONE, Ranks
from ctvae.runlog import Clock
from ctvae.training import finish
from ctvae.training.autoencoder import HeldOut
from ctvae.training.drawn import SEED, DrawnLatents
from ctvae.training.train import train

SOFT = (-0.16, 0.24)


class Stopped(Exception):
    pass


def weights(run) -> dict[str, torch.Tensor]:
    return load(run / "autoencoder.safetensors")[0]


FINISH = (
    "finish.enabled=true", "finish.steps=4", "finish.log_every=2", "finish.save_every=2", "finish.precision=fp32",
    "finish.drawn=2", "finish.discriminator_width=4", "data.patch=null", "prior.rank=2", "prior.sampling_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_dataset, tiny_run, tmp_path_factory):
    """The tiny run's decoder after four steps on its own flow's samples."""
    return train(tiny_dataset, tmp_path_factory.mktemp("finished") / "run", stage="finish", overrides=FINISH, start=tiny_run)


def test_it_moves_the_decoder_alone(finished, tiny_run):
    before, after = weights(tiny_run), weights(finished)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)
    flows = [load(run / "prior-flow.safetensors")[0] for run in (tiny_run, finished)]
    assert all(torch.equal(value, flows[0][name]) for name, value in flows[1].items())
    assert load(finished / "autoencoder.safetensors")[1]["finish_steps"] == 4
    assert not (finished / "drawn").exists()  # it is of no more use


def test_a_curve_is_fitted_before_the_first_step(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    """Once: a finish of what is finished begins with the curve as it is."""
    plain = train(tiny_dataset, tmp_path / "plain", overrides=[*tiny_settings, "model.tone=false"])
    fitted = []
    monkeypatch.setattr(Tone, "fit", lambda self, decoded, real: fitted.append((decoded, real)) or self.offset.data.fill_(0.1))
    first = train(tiny_dataset, tmp_path / "a", stage="finish", overrides=[*FINISH, "model.tone=true"], start=plain)
    decoded, real = fitted[0]
    assert len(fitted) == 1
    assert decoded.sum() == real.sum() > 1000  # of the same voxels
    assert weights(first)["decoder.tone.offset"] == pytest.approx(0.1, abs=1e-2)
    train(tiny_dataset, tmp_path / "b", stage="finish", overrides=FINISH, start=first)
    assert len(fitted) == 1


def test_a_resumed_finish_is_bit_equal(finished, tiny_dataset, tiny_run, tmp_path, monkeypatch):
    calls = 0
    plain = finish.FinishObjective.forward

    def stopping(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stopped
        return plain(self, *arguments)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(finish.FinishObjective, "forward", stopping)
        with pytest.raises(Stopped):
            train(tiny_dataset, run, stage="finish", overrides=FINISH, start=tiny_run)
    assert [path.stem for path in Checkpoints(run / "checkpoints", "finish").paths()] == ["finish-00000002"]
    train(tiny_dataset, run, stage="finish", overrides=FINISH)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(run).items())


def test_what_is_kept_lies_between_both(finished, tiny_dataset, tiny_run, tmp_path, monkeypatch):
    """A quarter of the way from the end back to the beginning, weight by weight, interrupted; its figures are of that."""
    plain, calls = finish.validate, []

    def stopping(*arguments):
        calls.append({name: value.clone() for name, value in arguments[0].decoder.state_dict().items()})
        if len(calls) == 3:  # before the first step, after two, after four
            raise Stopped
        return plain(*arguments)

    monkeypatch.setattr(finish, "validate", stopping)
    kept = [*FINISH, "finish.kept=0.25"]
    with pytest.raises(Stopped):
        train(tiny_dataset, tmp_path / "run", stage="finish", overrides=kept, start=tiny_run)
    run = train(tiny_dataset, tmp_path / "run", stage="finish", overrides=kept)
    before, after, mixed = weights(tiny_run), weights(finished), weights(run)
    assert any(not torch.equal(value, after[name]) for name, value in mixed.items())
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * after[name], atol=1e-6, rtol=1e-5)
    assert all(torch.equal(value, mixed[f"decoder.{name}"]) for name, value in calls[-1].items())


@pytest.mark.parametrize(("lost_db", "astray"), [(3.9, False), (4.1, True)])
def test_a_finish_that_takes_reconstructions_apart_is_undone(
    finished, tiny_dataset, tiny_run, tmp_path, monkeypatch, capsys, lost_db, astray
):
    """Seen after two of four steps, the decoder is again what it was, and a line says why; less is the price of sharpness."""
    psnr_db = iter((30.0, 30.0 - lost_db, 30.0 - lost_db, 30.0))
    monkeypatch.setattr(finish, "validate", lambda *_: HeldOut(next(psnr_db), 1.0))
    run = train(tiny_dataset, tmp_path / "run", stage="finish", overrides=FINISH, start=tiny_run)
    like = tiny_run if astray else finished
    assert all(torch.equal(value, weights(like)[name]) for name, value in weights(run).items())
    noted = json.loads((run / "run.json").read_text())["stages"]["finish"]
    assert (noted["steps"], noted["astray"]) == ((2, True) if astray else (4, False))
    assert ("held-out PSNR 30.0 dB before, 25.9 dB after 2 steps" in capsys.readouterr().err) == astray
    assert not list((run / "checkpoints").glob("finish-*"))


def test_what_it_began_with_is_known_after_a_kill(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    """The fall is from before the first step, though a checkpoint of the second was gone on from."""
    seen = iter((30.0, 27.0))
    monkeypatch.setattr(finish, "validate", lambda *_: HeldOut(next(seen), 1.0))  # StopIteration at the end of the fourth step
    with pytest.raises(StopIteration):
        train(tiny_dataset, tmp_path / "run", stage="finish", overrides=FINISH, start=tiny_run)
    seen = iter((25.0, 30.0))
    run = train(tiny_dataset, tmp_path / "run", stage="finish", overrides=FINISH)
    assert json.loads((run / "run.json").read_text())["stages"]["finish"]["astray"]


@pytest.mark.parametrize(("drawing", "left"), [(0.0, 10.0), (60.0, 9.0), (600.0, 7.0)])
def test_drawing_takes_of_the_minutes_and_not_of_the_warm_up(drawing, left):
    clock = Clock(load_recipe("wavelet3d").finish, 2000, finish._minutes_left(10.0, drawing))
    assert clock.minutes == left
    assert clock.lr(0, clock.progress(0)) < 0.01 * clock.cfg.lr
    assert finish._minutes_left(None, drawing) is None


def test_it_has_the_same_bits_on_algorithms_that_are_deterministic(finished, tiny_dataset, tiny_run, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", stage="finish", overrides=[*FINISH, "deterministic=true"], start=tiny_run)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(run).items())


def test_all_stages_in_one_go_end_with_it(tiny_dataset, tiny_settings, tmp_path):
    run = train(tiny_dataset, tmp_path / "run", overrides=[*tiny_settings, *FINISH[:7]])
    assert load(run / "autoencoder.safetensors")[1]["finish_steps"] == 4


def test_crops_are_of_the_flows_samples_and_a_function_of_the_step(tiny_run, tmp_path):
    model = load_model(tiny_run)
    cfg = with_overrides(load_config(tiny_run / "config.yaml"), ["finish.drawn=2"])
    samples = DrawnLatents(tmp_path / "drawn", cfg, cfg.model.grid)
    samples.draw(model)
    crops = samples.batch(3, (16, 8, 12), seed=0, step=5)
    assert crops.shape == (3, 2, 4, 2, 3)
    assert torch.equal(crops, samples.batch(3, (16, 8, 12), seed=0, step=5))
    assert not torch.equal(crops, samples.batch(3, (16, 8, 12), seed=0, step=6))
    whole = samples.batch(2, (64, 32, 32), seed=0, step=0)
    drawn = [model.draw("flow", SEED, index).latent[0].half().float() for index in range(2)]
    assert all(any(torch.equal(row, one) for one in drawn) for row in whole)


def test_crops_lie_where_the_body_is(tiny_run, tmp_path):
    """As those of real scans do: each voxel of a body is as often in the middle."""
    cfg = with_overrides(load_config(tiny_run / "config.yaml"), ["finish.drawn=1"])
    samples = DrawnLatents(tmp_path, cfg, (1, 1, 1))
    share = torch.zeros(1, 4, 4)
    share[0, 0, 0], share[0, 3, 3] = 0.75, 0.25
    places = torch.arange(16.0).view(1, 1, 4, 4)
    save_file({"latent": places.half(), "body": share.half()}, samples._path(0))
    samples.count = 1
    found = torch.cat([samples.batch(1, (1, 1, 1), seed=0, step=step).flatten() for step in range(2000)])
    often = torch.bincount(found.long(), minlength=16) / len(found)
    assert often[0].item() == pytest.approx(0.9 * 0.75 + 0.1 / 16, abs=0.03)
    assert often[15].item() == pytest.approx(0.9 * 0.25 + 0.1 / 16, abs=0.03)


def test_coarse_differences_do_not_see_texture_but_speckle_in_air():
    random = torch.Generator().manual_seed(0)
    soft = 0.04 + 0.03 * torch.randn(1, 1, 16, 16, 16, generator=random)
    other = 0.04 + 0.03 * torch.randn(1, 1, 16, 16, 16, generator=random)
    assert finish.coarse_difference(soft, other) < 0.2 * (soft - other).abs().mean()
    air, speckle = torch.full_like(soft, -1.0), -1 + 0.3 * torch.randn(soft.shape, generator=random)
    exact = (speckle.clamp(-1, 1) + 1).mean()  # half of the speckle lies below what air can be
    torch.testing.assert_close(finish.coarse_difference(speckle, air), exact)
    shallow = finish.coarse_difference(soft[..., :2, :, :], soft[..., :2, :, :] + 0.1)
    torch.testing.assert_close(shallow, torch.tensor(0.1))


def objective_of(tiny_run, calibration=None):
    cfg = load_config(tiny_run / "config.yaml")
    torch.manual_seed(0)
    network = build(cfg.model, cfg.data.shape)
    pair = finish.FinishedPair(network.decoder, PatchDiscriminator(4, SOFT), SOFT)
    return finish.FinishObjective(network, pair, cfg, calibration=calibration)


def test_both_sides_are_held_to_what_the_decoder_made_of_them(tiny_run):
    """The decoder as it was when the objective was made, whatever the one that learns has become."""
    objective = objective_of(tiny_run)
    network, shape = objective.network, load_config(tiny_run / "config.yaml").data.shape
    x, drawn = torch.zeros(1, 1, *shape), torch.randn(1, *network.latent_shape)
    *_, terms = objective(x, drawn, torch.Generator().manual_seed(1))
    assert terms["anchor"] < 1e-6
    z = torch.cat((finish.noisy_latents(network, x, objective.cfg.latent_noise, torch.Generator().manual_seed(1), ALONE), drawn))
    before = network.decoder(z).detach()
    with torch.no_grad():
        for parameter in network.decoder.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    *_, terms = objective(x, drawn, torch.Generator().manual_seed(1))
    torch.testing.assert_close(terms["anchor"], finish.coarse_difference(network.decoder(z), before))
    assert not any(p.requires_grad for p in objective.before.parameters())


def test_losses_see_what_comes_out_in_the_end_and_move_soft_tissue_alone(tiny_run, monkeypatch):
    """Gradients are those of the decoder's own curve, and none where the calibration has one."""
    nothing = Calibration.nothing(SOFT)
    calibration = dataclasses.replace(nothing, rim=torch.full((KNOTS,), -0.4), sigma=0.5, gain=0.7)
    objective = objective_of(tiny_run, calibration)
    grain = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((48, 32, 32)), (3, 2, 2))
    raw = torch.from_numpy(0.5 * grain / grain.std() - 0.7).float().clamp(-1, 0.3)[None, None].requires_grad_()
    tone = objective.network.decoder.tone
    monkeypatch.setattr(type(objective.network.decoder), "raw", lambda self, z: raw)
    _, made, grained, held = objective._decoded(torch.zeros(1, *objective.network.latent_shape), generator(0, 0))
    torch.testing.assert_close(made, calibration(raw, tone(raw)))
    assert grained is made
    where, bone = Places.of(tone(raw).detach(), SOFT), tone(raw) > SOFT[1]
    soft = ~(where.empty | where.rim | where.lung | where.cavity | bone)
    assert all(place.any() for place in (where.empty, where.rim, where.lung, where.cavity, bone, soft))
    assert torch.equal(held, ~soft)
    (found,) = torch.autograd.grad(made.square().sum(), raw)
    (exact,) = torch.autograd.grad((tone(raw) * 2 * made.detach() * soft).sum(), raw)
    torch.testing.assert_close(found, exact)
    assert found[soft].abs().min() > 0


def test_adversary_and_statistics_see_grain_and_reconstructions_have_none(tiny_run, monkeypatch):
    """Grain as the calibration gives it to what is generated, of noise from the step's randomness; gradients pass it by."""
    taps = torch.zeros(7, 7, 7)
    taps[3, 3, 3] = 0.02
    plain = objective_of(tiny_run, Calibration.nothing(SOFT))
    objective = objective_of(tiny_run, dataclasses.replace(Calibration.nothing(SOFT), grain=Grain(taps, 0 * taps, torch.ones(2))))
    raw = (0.04 + 0.02 * torch.randn(2, 1, 48, 32, 32, generator=generator(0, 1))).requires_grad_()
    monkeypatch.setattr(type(objective.network.decoder), "raw", lambda self, z: raw)
    z = torch.zeros(2, *objective.network.latent_shape)
    _, made, grained, _ = objective._decoded(z, generator(0, 0))
    torch.testing.assert_close(made, plain._decoded(z, generator(0, 0))[1])
    random = generator(0, 0)
    noise = torch.cat([objective.calibration.grain.white(raw[:1].shape, random) for _ in range(2)])
    objective.ranks = Ranks(1, 2)  # the second of two processes has what is drawn second, of each side
    random = generator(0, 0)
    theirs = [objective.calibration.grain.white(torch.Size((2, *raw.shape[1:])), random)[1:] for _ in range(2)]
    torch.testing.assert_close(objective._noise(objective.calibration.grain, raw.shape, generator(0, 0)), torch.cat(theirs))
    objective.ranks = ALONE
    torch.testing.assert_close(grained, made + 0.02 * noise)
    (found,), (exact,) = (torch.autograd.grad(y.sum(), raw) for y in (grained, plain._decoded(z, generator(0, 0))[1]))
    torch.testing.assert_close(found, exact)

    monkeypatch.undo()
    x = torch.full((1, 1, *load_config(tiny_run / "config.yaml").data.shape), 0.04)
    drawn = torch.randn(1, *objective.network.latent_shape, generator=generator(0, 2))
    monkeypatch.setattr(Decoder, "raw", lambda self, z: torch.full((len(z), 1, *x.shape[2:]), 0.04, requires_grad=True))
    (_, without, before), (_, seen, terms) = (each(x, drawn, generator(0, 3)) for each in (plain, objective))
    assert seen.std().item() == pytest.approx(0.02, rel=0.05)
    assert without.std() < 1e-6
    torch.testing.assert_close(terms["reconstruction"], before["reconstruction"])
    assert not torch.equal(terms["adversarial"], before["adversarial"])


def test_where_the_calibration_has_the_say_no_voxel_moves(tiny_run, monkeypatch):
    """Elsewhere means of 4x4x4 voxels are held alone: texture may change there, and would grow in what is smoothed after."""
    objective = objective_of(tiny_run, Calibration.nothing(SOFT))
    shape = (16, 16, 16)
    texture = 0.1 * (torch.arange(16) % 2 * 2.0 - 1).expand(1, 1, *shape)
    for value, moved in ((0.1, 0.0), (-0.8, 0.1)):  # soft tissue; all of it dark: a cavity
        before = torch.full((1, 1, *shape), value)
        monkeypatch.setattr(type(objective.network.decoder), "raw", lambda *_, of=before: of + texture)
        raw, _, _, held = objective._decoded(torch.zeros(1, *objective.network.latent_shape), generator(0, 0))
        assert held.all() == (moved > 0)
        torch.testing.assert_close(objective.anchor(raw, before, held), torch.tensor(moved))


def test_it_needs_a_prior(tiny_dataset, tiny_settings, tmp_path):
    settings = [*tiny_settings, *FINISH[:7]]
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=settings)
    with pytest.raises(ModelError, match="has no trained prior yet"):
        train(tiny_dataset, run, stage="finish", overrides=settings)


def test_vector_latents_have_no_finish():
    with pytest.raises(ConfigError, match=r"finish\.enabled: conv3d has no spatial latents"):
        load_recipe("conv3d", ["finish.enabled=true"])
