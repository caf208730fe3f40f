"""The flow in use: volumes of any number of slices, and prior files from before conditions had names."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from ctvae import __main__, checkpoint, flow, nifti, slabs
from ctvae.device import generator
from ctvae.errors import ConfigError, CtvaeError, InputError
from ctvae.export import export
from ctvae.generate import generate, load, sidecar
from ctvae.models.velocity import Velocity
from ctvae.sampling import Sampling, refuse
from ctvae.training.train import train

SHAPE = (64, 32, 32)  # of the tiny run's groups; a latent slice is four of an image


def refused(error: type[Exception], call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def model(tiny_run):
    return load(tiny_run)


@pytest.fixture
def told(monkeypatch) -> list[torch.Tensor]:
    """Every set of conditions that the network is told, and the shape that it is shown."""
    seen = []
    coarse = Velocity.coarse

    def watched(self, x, t, c, linear=None):
        assert x.shape[2:] == (16, 8, 8), "the network sees slabs of the size that it was trained on"
        seen.extend(c.split(1))  # with and without conditions is one batch
        return coarse(self, x, t, c, linear)

    monkeypatch.setattr(Velocity, "coarse", watched)
    return seen


def test_as_many_slices_as_a_group_is_the_group(model):
    plain = model.generate(seed=4, index=2).volume
    same = model.generate(seed=4, index=2, slices=64).volume
    np.testing.assert_array_equal(same.hu, plain.hu)
    fewer = model.generate(seed=4, index=2, slices=21)
    np.testing.assert_array_equal(fewer.volume.hu, plain.hu[21:42])
    assert fewer.provenance["slices"] == 21
    middle = fewer.volume.affine @ [15.5, 15.5, 10, 1]
    np.testing.assert_allclose(middle[:3], 0, atol=1e-3)


def test_a_longer_volume_is_one(model, tiny_run, tmp_path, told):
    """107 slices: 27 latent ones, of which a slice in the image is cut off, in slabs of 16 every 4."""
    path = generate(tiny_run, tmp_path, count=1, seed=3, slices=107)[0]
    volume, facts = nifti.read(path)[0], json.loads(sidecar(path).read_text())
    assert volume.shape == (107, 32, 32)
    starts = slabs.covering(27, 16)
    assert (facts["slices"], len(facts["positions"])) == (107, len(starts))
    assert len(told) == len(starts) * flow.evaluations("ab2", 2) * 2  # with and without the conditions, for guidance
    assert model.generate(seed=3, slices=107).provenance == facts
    generate(tiny_run, tmp_path, count=1, seed=3, slices=107)
    assert "--slices" in refused(InputError, generate, tiny_run, tmp_path, count=1, seed=3, slices=108)


def test_slabs_differ_in_position_alone_and_share_one_noise(model, told):
    draw = model.draw("flow", 3, 0, asked=Sampling(slices=107, guidance=1.0))
    assert draw.latent.shape == (1, 2, 27, 8, 8)
    again = model.draw("flow", 3, 0, asked=Sampling(slices=107, guidance=1.0)).latent
    assert torch.equal(again, draw.latent)
    first = torch.cat(told[: len(draw.positions)])  # [slabs K]
    assert (first[:, 1:] == first[:1, 1:]).all()
    mean, std = (checkpoint.load(model.folder / "prior-flow.safetensors")[0][f"conditions.{name}"][0] for name in ("mean", "std"))
    torch.testing.assert_close(first[:, 0], (torch.tensor(draw.positions) - mean) / std)


def test_positions_follow_the_scans_length_in_mm(model):
    """A group of 64 slices at 0.5 of a scan of 200 mm with slices of 1 mm, twelve latent slices longer than the group."""
    prior = model._flow
    rows = prior.known.rows.clone()
    rows[:, 0] = torch.linspace(0.16, 0.84, len(rows))
    wide = type(prior.known)(prior.known.names, rows, prior.known.scan_mm)
    prior = type(prior)(prior.code, prior.network, prior.conditioning, wide, prior.cfg, prior.shape)
    one = wide.pick(torch.Generator().manual_seed(0), {}).having("slice_mm", 1.0).having("position", 0.5)
    one = type(one)(one.names, one.values, 200.0)
    starts = slabs.covering(28, 16)
    assert prior.positions(one, starts, 16, 28) == pytest.approx([0.5 + (start - 6) * 4 / 200 for start in starts])
    low = prior.positions(one.having("position", 0.2), starts, 16, 28)
    assert low[0] == pytest.approx(0.16), "a slab's middle is 32 mm or more from the scan's end"
    assert np.diff(low) == pytest.approx([0.08] * 3)
    whole = prior.positions(one, slabs.covering(60, 16), 16, 60)  # 240 mm: longer than the scan, so all of one
    assert (whole[0], whole[-1]) == pytest.approx((0.16, 0.84))
    assert np.diff(whole) == pytest.approx([0.68 / 11] * 11)


def test_solver_guidance_and_steps_are_what_is_asked(tiny_run, model, tmp_path, told):
    asked = {"steps": 3, "solver": "heun", "schedule": "equal", "guidance": 1.0}
    path = generate(tiny_run, tmp_path, count=1, **asked)[0]
    assert len(told) == 6
    facts = json.loads(sidecar(path).read_text())
    assert {**facts, **asked, "autoguidance": 1.0, "asked": {}} == facts
    for other in ("solver", "schedule", "guidance"):
        rest = {name: value for name, value in asked.items() if name != other}
        assert f"--{other}" in refused(InputError, generate, tiny_run, tmp_path, count=1, **rest)
    assert "--autoguidance" in refused(InputError, generate, tiny_run, tmp_path, count=1, **asked, autoguidance=1.1)


def test_a_folder_of_an_earlier_version_is_gone_on_with_by_its_solver_alone(tiny_run, tmp_path):
    """Sidecars did not say the schedule, and before that neither solver nor guidance: it was Heun's method with equal steps."""
    asked = {"solver": "heun", "schedule": "equal", "rescale": 0.0}
    path = generate(tiny_run, tmp_path, count=1, **asked)[0]
    facts = json.loads(sidecar(path).read_text())
    for unsaid in (("kept_noise",), ("rescale",), ("schedule", "autoguidance"), ("solver", "guidance", "asked", "slices")):
        for name in unsaid:
            del facts[name]
        sidecar(path).write_text(json.dumps(facts))
        generate(tiny_run, tmp_path, count=1, **asked)
        assert "--schedule" in refused(InputError, generate, tiny_run, tmp_path, count=1)


def test_autoguidance_leads_away_from_the_gaussian(model, told):
    """Weights of 0 leave the velocity without conditions and the Gaussian; halves of both are their mean."""

    def drawn(**weights: float) -> torch.Tensor:
        return model.draw("flow", 3, 0, asked=Sampling(steps=1, solver="euler", rescale=0.0, **weights)).latent

    plain, gaussian = drawn(guidance=1.0), drawn(guidance=1.0, autoguidance=0.0)
    with torch.no_grad():
        prior, x0 = model._flow, noise_of(model, 3)
        linear = prior.network.linear(x0, torch.zeros(1))
    torch.testing.assert_close(gaussian, prior.code.decode(x0 + linear))
    torch.testing.assert_close(drawn(guidance=1.0, autoguidance=1.5), plain + 0.5 * (plain - gaussian))
    unconditional = drawn(guidance=0.0)
    both = drawn(guidance=1.5, autoguidance=1.5)
    torch.testing.assert_close(both, plain + 0.5 * (plain - unconditional) + 0.5 * (plain - gaussian))
    evaluations = len(told)
    drawn(guidance=1.0, autoguidance=2.0)
    assert len(told) == evaluations + 1, "the network itself is asked no more often"


def test_what_is_guided_gets_the_spread_of_what_is_not(model):
    """One step of Euler ends at the first guess of x_1: its channels have the guided one's means and the plain one's spread."""

    def drawn(**options: float) -> torch.Tensor:
        x1 = model.draw("flow", 3, 0, asked=Sampling(steps=1, solver="euler", **options)).latent
        return model._flow.code.encode(x1)[0].flatten(1)  # [Z dhw]

    plain, guided = drawn(guidance=1.0, autoguidance=1.0), drawn(guidance=1.0, autoguidance=200.0, rescale=0.0)
    assert ((guided.std(1) / plain.std(1) - 1).abs() > 0.001).all()
    rescaled, half = (drawn(guidance=1.0, autoguidance=200.0, rescale=share) for share in (1.0, 0.5))
    torch.testing.assert_close(rescaled.std(1), plain.std(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rescaled.mean(1), guided.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half, (rescaled + guided) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn(guidance=1.0, autoguidance=1.0, rescale=0.5), plain)


def test_noise_that_is_kept_is_noise_that_was_found(model):
    """Eight steps of Euler by hand; none kept is as nothing asked."""

    def drawn(**options: float) -> torch.Tensor:
        return model.draw("flow", 3, 0, asked=Sampling(steps=8, schedule="equal", solver="euler", guidance=1.0, **options)).latent

    x, prior = noise_of(model, 3), model._flow
    for step in range(8):
        t = torch.tensor([step / 8])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=prior.cfg.precision == "bf16"):
            v = prior.network(x, t, told_nothing_new(model, 3))
        found = x - t * v
        x = x + (v + (0.2 * found / t if 0.1 < t < 0.5 else 0)) / 8
    torch.testing.assert_close(drawn(kept_noise=0.2), prior.code.decode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn(kept_noise=0.0), drawn())
    assert (drawn(kept_noise=0.2) - drawn()).abs().mean() > 0.01


def told_nothing_new(model, seed: int) -> torch.Tensor:
    """The conditions that `draw` picks: [1 K]."""
    told = model._flow.known.pick(generator(seed, 0, stream=11), model._flow.known.given({}))
    return model._flow.conditioning.standard(torch.tensor([told.values]))


def noise_of(model, seed: int) -> torch.Tensor:
    """What `draw` starts from."""
    random = generator(seed, 0, stream=11)
    model._flow.known.pick(random, {})
    return torch.randn((1, *model.network.latent_shape), generator=random)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"solver": "hein"}, ConfigError, "solver 'hein': no such, did you mean 'heun'? (known: ab2, heun, euler)"),
        ({"guidance": -1.0}, ConfigError, "guidance -1.0"),
        ({"guidance": math.nan}, ConfigError, "guidance nan"),
        ({"autoguidance": -0.1}, ConfigError, "autoguidance -0.1: 0 or more; 1 is none"),
        ({"autoguidance": math.inf}, ConfigError, "autoguidance inf"),
        ({"autoguidance": math.nan}, ConfigError, "autoguidance nan"),
        ({"rescale": 1.5}, ConfigError, "rescale 1.5: from 0, none, to 1"),
        ({"rescale": math.nan}, ConfigError, "rescale nan"),
        ({"rescale": 0.5, "prior": "normal"}, InputError, "prior 'normal' knows no --rescale"),
        ({"kept_noise": 0.6}, ConfigError, "kept noise 0.6: from 0, none, to 0.5"),
        ({"kept_noise": math.nan}, ConfigError, "kept noise nan"),
        ({"kept_noise": 0.1, "prior": "normal"}, InputError, "prior 'normal' knows no --kept-noise"),
        ({"grain": -1.0}, ConfigError, "grain -1.0: 0, none, or more"),
        ({"grain": math.nan}, ConfigError, "grain nan"),
        ({"grain": 1.0}, InputError, "has no measured noise for --grain"),
        ({"schedule": "even"}, ConfigError, "schedule 'even': no such"),
        ({"autoguidance": 1.5, "prior": "normal"}, InputError, "prior 'normal' knows no --autoguidance"),
        ({"steps": 0}, ConfigError, "steps 0: at least 1"),
        ({"slices": 1}, InputError, "slices 1: a volume has at least 2"),
        ({"slices": 65, "prior": "normal"}, InputError, "up to 64, as the prior 'normal' draws single groups"),
        ({"slices": 10**9}, InputError, "more than 2147483648 voxels"),
        ({"conditions": {"position": 0.5}, "prior": "gaussian"}, InputError, "prior 'gaussian' knows no --condition"),
        ({"conditions": {"pixel": 0.5}}, InputError, "did you mean 'pixel_mm'?"),
    ],
)
def test_what_cannot_be_is_one_line(model, asked, error, said):
    assert said in refused(error, model.generate, **asked)


def test_vector_latents_are_one_group_long():
    refuse(Sampling(slices=64), "flow", SHAPE, spatial=False)
    assert "its latents are vectors" in refused(InputError, refuse, Sampling(slices=65), "flow", SHAPE, spatial=False)


def test_the_command_line_says_so_in_one_line(tiny_run, tmp_path, capsys):
    wrong_numbers = (["--slices", "1"], ["--guidance", "-1"], ["--autoguidance", "inf"], ["--condition", "position=7"])
    for wrong in (*wrong_numbers, ["--solver", "rk4"], ["--schedule", "even"]):
        assert __main__.run(["generate", str(tiny_run), "--out", str(tmp_path), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_exported_model_draws_as_it_was_told(tiny_run, model, tmp_path, capsys):
    settings = ["--set", "prior.autoguidance=1.3", "--set", "prior.sampling_steps=3"]
    assert __main__.run(["export", str(tiny_run), "--out", str(tmp_path / "model"), *settings]) == 0
    exported = load(tmp_path / "model")
    told = exported.generate(seed=1).provenance
    assert (told["autoguidance"], told["steps"], told["guidance"]) == (1.3, 3, model.cfg.prior.guidance)
    assert (tmp_path / "model" / "config.yaml").read_text() != (tiny_run / "config.yaml").read_text()
    assert exported.cfg.model == model.cfg.model
    plain = export(tiny_run, tmp_path / "plain")
    assert (plain / "config.yaml").read_bytes() == (tiny_run / "config.yaml").read_bytes()
    capsys.readouterr()
    for wrong in ("prior.steps=3", "prior.autoguidance=-1", "prior.autoguidance=.inf", "autoguidance=2", "prior.guidance"):
        assert __main__.run(["export", str(tiny_run), "--out", str(tmp_path / "none"), "--set", wrong]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        names_those = "prior.sampling_steps, prior.guidance, prior.autoguidance" in said
        assert names_those == (wrong in ("prior.steps=3", "autoguidance=2"))
    assert not (tmp_path / "none").exists()


def test_a_prior_from_before_conditions_had_names_draws_the_same(tiny_run, tmp_path):
    """Without the weights of the width, it is the network of today that is not told the width."""
    new, old = (shutil.copytree(tiny_run, tmp_path / name) for name in ("new", "old"))
    for folder, count in ((new, 4), (old, 3)):
        path = folder / "prior-flow.safetensors"
        tensors, meta = checkpoint.load(path)
        tensors["conditions.known"][:, 3] = math.nan
        if count == 3:
            first = "flow.correction.embedding.condition.0.weight"  # [E 2K]: values, then which are given
            tensors[first] = torch.cat((tensors[first][:, :3], tensors[first][:, 4:7]), dim=1)
            tensors |= {f"conditions.{name}": tensors[f"conditions.{name}"][..., :3] for name in ("known", "mean", "std")}
            del tensors["conditions.scan_mm"], meta["conditions"]
        checkpoint.save(path, tensors, meta)
    a, b = (load(folder).draw("flow", 5, 1) for folder in (new, old))
    torch.testing.assert_close(a.latent, b.latent)
    assert a.conditions == b.conditions
    assert list(b.conditions) == ["position", "pixel_mm", "slice_mm"]
    assert load(old).generate(seed=5, slices=90).volume.shape == (90, 32, 32)
    assert "knows: pixel_mm, position, slice_mm)" in refused(CtvaeError, load(old).generate, conditions={"width_mm": 300})


def test_guidance_is_seen_without_the_detail(tiny_dataset, tiny_run, tiny_settings, tmp_path):
    """Conditions lead by filter and U-Net; the local network is asked once an evaluation, under the conditions."""
    plain = [setting for setting in tiny_settings if not setting.startswith("prior.detail_width")]
    detail = ["prior.detail_width=8", "prior.detail_blocks=1", "prior.lr=0.1"]
    model = load(train(tiny_dataset, tmp_path / "run", stage="prior", overrides=[*plain, *detail], start=tiny_run))
    prior, x0 = model._flow, noise_of(model, 3)
    asked = Sampling(steps=1, solver="euler", guidance=1.5, autoguidance=1.25, rescale=0.0)
    draw, t = model.draw("flow", 3, 0, asked=asked), torch.zeros(1)
    c = prior.conditioning.standard(torch.tensor([draw.told.values]))
    with torch.no_grad():
        full, coarse, linear = prior.network(x0, t, c), prior.network.coarse(x0, t, c), prior.network.linear(x0, t)
        unknown = prior.network.coarse(x0, t, torch.full_like(c, math.nan))
    assert not torch.allclose(full, coarse)
    expected = full + 0.5 * (coarse - unknown) + 0.25 * (full - linear)
    torch.testing.assert_close(draw.latent, prior.code.decode(x0 + expected))
