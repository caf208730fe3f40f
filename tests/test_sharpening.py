"""What polish and finish may be told: which adversarial loss, a downloaded perceptual one, a patch of their own."""

from __future__ import annotations

import csv
from urllib.error import URLError

import monai.losses
import pytest
import torch
from torch import Tensor, nn

from ctvae import __main__
from ctvae.config import load_config, load_recipe
from ctvae.errors import ConfigError
from ctvae.model import open_model
from ctvae.models import build
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.training import autoencoder, polish
from ctvae.training.finish import FinishedPair, FinishObjective
from ctvae.training.perceptual import PerceptualTerm, perceptual_term
from ctvae.training.polish import DecoderObjective, DiscriminatorObjective
from ctvae.training.train import train

SMALL = ("model.widths=[4,8]", "model.blocks=[1,1]", "model.latent_channels=2", "model.strides=[[2,2,2],[2,2,2]]")
SHAPE = (16, 16, 16)


class AbsoluteError(nn.Module):
    """In place of MONAI's loss; keeps how it was asked for and what it was shown."""

    made: list[tuple] = []  # noqa: RUF012

    def __init__(self, *arguments, **named):
        super().__init__()
        self.made.append((*arguments, named))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        self.shown = (y, x)
        return (y - x).abs().mean()


SOFT = (-0.2, 0.2)


def volume(seed: int) -> Tensor:
    return 2 * torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed)) - 1


def objectives(*settings: str, perceptual: PerceptualTerm | None = None) -> dict[str, tuple[dict, Tensor, PatchDiscriminator]]:
    """By stage: the terms, the decoded volume and the discriminator, with the same networks each time."""
    found = {}
    for stage in ("polish", "finish"):
        torch.manual_seed(0)
        cfg = load_recipe("wavelet3d", [*SMALL, *(f"{stage}.{setting}" for setting in settings)])
        network, x, random = build(cfg.model, SHAPE), volume(0), torch.Generator().manual_seed(1)
        if stage == "polish":
            discriminator = PatchDiscriminator(4, SOFT)
            _, y, terms = DecoderObjective(network, discriminator, cfg, perceptual=perceptual)(x, random)
        else:
            pair = FinishedPair(network.decoder, PatchDiscriminator(4, SOFT), SOFT)
            discriminator = pair.discriminator
            drawn = torch.randn(1, *network.latent_shape, generator=torch.Generator().manual_seed(2))
            _, y, terms = FinishObjective(network, pair, cfg, perceptual=perceptual)(x, drawn, random)
        found[stage] = terms, y, discriminator
    return found


# --- what losses see of a patch


def test_losses_leave_the_sides_of_a_patch_out():
    """Whatever a scan or a decoded patch is there; a patch that is all of a group along an axis has its sides in it."""
    plain = ["data.patch=[16,8,16]", "finish.patch=[16,8,16]", "data.shape=[16,16,32]", "polish.margin=1"]
    cfg = load_recipe("wavelet3d", [*SMALL, *plain])
    assert [cfg.margin_of(stage) for stage in ("polish", "finish")] == [(0, 0, 4), (0, 0, 4)]
    assert load_recipe("wavelet3d", [*SMALL, *plain, "data.patch=[4,16,16]"]).margin_of("polish") == (0, 0, 4)
    assert load_recipe("wavelet3d", [*SMALL, *plain, "polish.patch=whole"]).margin_of("polish") == (0, 0, 0)
    assert load_recipe("wavelet3d", ["data.shape=[64,256,256]"]).margin_of("finish") == (0, 8, 8)
    assert load_recipe("wavelet3d", ["data.shape=[64,256,256]"]).margin_of("polish") == (8, 8, 8)
    torch.manual_seed(0)
    network, discriminator = build(cfg.model, (16, 8, 16)), PatchDiscriminator(4, SOFT)
    x = 2 * torch.rand(1, 1, 16, 8, 16) - 1
    other = x.clone()
    other[..., :4], other[..., -4:] = 0.5, -0.5
    network.encode = lambda _: 2 * (torch.zeros(1, 2, 4, 2, 4),)
    drawn = torch.randn(1, 2, 4, 2, 4)
    for seen in ("polish", "finish"):
        found = []
        for patch in (x, other):
            random = torch.Generator().manual_seed(1)
            if seen == "polish":
                found.append(DecoderObjective(network, discriminator, cfg)(patch, random))
            else:
                pair = FinishedPair(network.decoder, discriminator, SOFT)
                found.append(FinishObjective(network, pair, cfg)(patch, drawn, random))
        (inner, y, terms), (_, _, others) = found
        assert torch.equal(inner, x[..., 4:-4])
        assert y.shape[2:] == (16, 8, 8)
        assert terms == others
    assert terms["anchor"] < 1e-6, "the decoder as it was is seen without its sides as well"


# --- which adversarial loss


@pytest.mark.parametrize("kind", ["hinge", "lsgan"])
def test_the_decoder_and_the_judge_play_the_same_game(kind):
    cfg = load_recipe("wavelet3d", [f"polish.adversarial={kind}", "polish.slope_penalty=0"]).polish
    for terms, y, discriminator in objectives(f"adversarial={kind}", "adversarial_weight=0.5").values():
        logits = discriminator(y)[0]
        expected = 0.5 * (logits - 1).square().mean() if kind == "lsgan" else -logits.mean()
        torch.testing.assert_close(terms["adversarial"], 0.5 * expected)
        torch.manual_seed(3)
        judge = PatchDiscriminator(4, SOFT)
        found = DiscriminatorObjective(judge, cfg)(volume(0), y.detach()[:1], torch.Generator())
        real, fake = (judge(v)[0] for v in (volume(0), y.detach()[:1]))
        parts = (1 - real).square() / 2, fake.square() / 2
        expected = sum(p.mean() for p in parts) if kind == "lsgan" else (1 - real).relu().mean() + (1 + fake).relu().mean()
        torch.testing.assert_close(found, expected)


def test_decoded_patches_are_compared_with_real_ones():
    """Of the relativistic loss: each decoded patch, reconstructed or drawn, with the real one of its row."""
    for terms, y, judge in objectives("adversarial=relativistic", "adversarial_weight=0.5").values():
        gap = judge(volume(0))[0] - judge(y)[0]
        torch.testing.assert_close(terms["adversarial"], 0.5 * nn.functional.softplus(gap).mean())


def test_slopes_are_penalised_on_both_sides():
    cfg = load_recipe("wavelet3d", ["polish.slope_penalty=0", "polish.adversarial=hinge"]).polish
    steep = cfg.model_copy(update={"slope_penalty": 4.0})
    torch.manual_seed(3)
    judge = PatchDiscriminator(4, SOFT)
    judge.observe(volume(0))
    plain, found = (
        DiscriminatorObjective(judge, settings)(volume(0), volume(1), torch.Generator().manual_seed(5))
        for settings in (cfg, steep)
    )
    random = torch.Generator().manual_seed(5)
    slopes = sum(judge.steepness(volume(seed), lambda shape: torch.randn(shape, generator=random))[1] for seed in (0, 1))
    torch.testing.assert_close(found - plain, 2.0 * slopes, rtol=0.02, atol=1e-4)


# --- a downloaded perceptual loss


def test_the_perceptual_term_compares_what_was_reconstructed_with_its_original():
    """On top of all the others, which stay what they are."""
    plain = objectives()
    asked = objectives("perceptual_weight=0.25", perceptual=PerceptualTerm("squeeze", AbsoluteError()))
    for stage, (terms, y, _) in asked.items():
        assert terms.keys() - plain[stage][0].keys() == {"perceptual"}
        torch.testing.assert_close(terms["perceptual"], 0.25 * (y[:1] - volume(0)).abs().mean())
        for name, value in plain[stage][0].items():
            torch.testing.assert_close(terms[name], value)


def test_slices_are_chosen_by_the_step_and_nothing_else_is_disturbed():
    class Chosen(nn.Module):
        def forward(self, y, x):
            return torch.randperm(1000)[0].float()

    term, state = PerceptualTerm("vgg", Chosen()), torch.get_rng_state()
    first, again, other = (term(volume(0), volume(1), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "least"), [("resnet50", 0), ("radimagenet_resnet50", 0), ("squeeze", -1)])
def test_networks_see_the_range_that_they_know(name, least):
    term = PerceptualTerm(name, AbsoluteError())
    term(volume(0), volume(1), torch.Generator())
    assert all(least <= v.min() < least + 0.01 and 0.99 < v.max() <= 1 for v in term.loss.shown)


def test_monai_is_asked_for_the_loss_that_was_named(monkeypatch):
    monkeypatch.setattr(monai.losses, "PerceptualLoss", AbsoluteError)
    monkeypatch.setattr(AbsoluteError, "made", [])
    for name in ("medicalnet_resnet10_23datasets", "squeeze"):
        assert not any(p.requires_grad for p in perceptual_term(name).parameters())
    (scans, pictures) = AbsoluteError.made
    assert scans[:2] == (3, "medicalnet_resnet10_23datasets")
    assert not scans[2]["is_fake_3d"]
    assert pictures[:2] == (3, "squeeze")
    assert pictures[2]["is_fake_3d"]
    assert perceptual_term("none") is None


@pytest.mark.parametrize(
    ("name", "network"),
    [("medicalnet_resnet10_23datasets", nn.Conv3d(1, 4, 3)), ("radimagenet_resnet50", nn.Conv2d(3, 4, 3))],
)
def test_monais_own_losses_take_our_patches(monkeypatch, name, network):
    """With a network of one layer where the downloaded one would be."""
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: network)
    term, y = perceptual_term(name), volume(0).requires_grad_()
    assert term(y, volume(0), torch.Generator()).item() == pytest.approx(0, abs=1e-6)
    apart = term(y, volume(1), torch.Generator())
    apart.backward()
    assert apart.shape == ()
    assert apart > 0.01
    assert y.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_polish_with_it(tiny_dataset, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(monai.losses, "PerceptualLoss", AbsoluteError)
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=[*tiny_settings, "polish.perceptual=squeeze"])
    with (run / "logs" / "polish.csv").open() as file:
        assert all(float(row["perceptual"]) > 0 for row in csv.DictReader(file))


def test_offline_it_is_refused_in_one_line_before_anything_is_trained(
    tiny_dataset, tiny_settings, tmp_path, monkeypatch, capsys
):
    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(monai.losses, "PerceptualLoss", offline)
    settled = [argument for text in (*tiny_settings, "polish.perceptual=squeeze") for argument in ("--set", text)]
    code = __main__.run(["train", str(tiny_dataset), "--out", str(tmp_path / "run"), *settled])
    err = capsys.readouterr().err
    assert (code, len(err.splitlines())) == (2, 1)
    known = "error: perceptual squeeze: its network cannot be loaded here (<urlopen error Name or service not known>)"
    assert err.startswith(known)
    assert not (tmp_path / "run").exists(), "so that the same --out can be asked for without it"
    with pytest.raises(ConfigError, match="perceptual vgg"):
        perceptual_term("vgg")


# --- a patch of their own


@pytest.mark.parametrize(
    ("data", "own", "seen"),
    [("null", "[15,16,16]", (16, 16, 16)), ("[16,16,16]", "whole", (64, 32, 32)), ("[16,16,16]", "null", (16, 16, 16))],
)
def test_the_polish_sees_its_own_patch(tiny_dataset, tiny_settings, tmp_path, monkeypatch, data, own, seen):
    shapes: dict[type, set] = {}
    for kind in (autoencoder.Objective, polish.DecoderObjective):

        def forward(self, x, *rest, plain=kind.forward, kind=kind):
            shapes.setdefault(kind, set()).add(tuple(x.shape[2:]))
            return plain(self, x, *rest)

        monkeypatch.setattr(kind, "forward", forward)
    sizes = [f"data.patch={data}", f"polish.patch={own}", "autoencoder.steps=2", "polish.steps=2"]
    run = train(tiny_dataset, tmp_path / "run", stage="autoencoder", overrides=[*tiny_settings, *sizes])
    first = (64, 32, 32) if data == "null" else (16, 16, 16)
    assert shapes == {autoencoder.Objective: {first}, polish.DecoderObjective: {seen}}
    assert load_config(run / "config.yaml").polish.patch == (seen if own.startswith("[") else None if own == "null" else own)
    assert open_model(run).shape == (64, 32, 32)
