"""Averages of chosen length against numeric integration, averages kept all along, and a resumed run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctvae.checkpoint import load
from ctvae.training import averages, prior
from ctvae.training.averages import LENGTHS, MOST, Moments, exponent, shares
from ctvae.training.train import train


@pytest.mark.parametrize("length", LENGTHS)
def test_the_profile_has_the_standard_deviation_that_was_asked_for(length):
    t = (np.arange(200_000) + 0.5) / 200_000
    density = t ** exponent(length)
    density /= density.sum()
    mean = (density * t).sum()
    assert np.sqrt((density * (t - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", LENGTHS)
def test_shares_are_the_profiles_integrals(length):
    t = (np.arange(100_000) + 0.5) / 100_000
    density = t ** exponent(length)
    parts = np.histogram(t * 1000, bins=[0, 300, 650, 1000], weights=density)[0]
    np.testing.assert_allclose(shares([300, 650, 1000], length), parts / parts.sum(), rtol=1e-3)


def test_few_moments_give_nearly_what_an_average_kept_all_along_gives(tmp_path):
    """Of weights that wander: the moving average by its own recursion, w <- w + (1 - (1 - 1/t)^(g+1)) (w_t - w)."""
    rng, last, length = np.random.default_rng(0), 1200, 0.2
    path = np.cumsum(rng.normal(size=last + 1)) / np.sqrt(last) + np.linspace(0, 3, last + 1)
    along = path[1]
    for t in range(1, last + 1):
        along += (1 - (1 - 1 / t) ** (exponent(length) + 1)) * (path[t] - along)
    moments = Moments(tmp_path, every=100)
    smooth = np.convolve(path, np.ones(100) / 100)[: last + 1]  # what is kept is a short average itself
    for step in range(100, last + 1, 100):
        moments.keep(step, {"w": torch.tensor([smooth[step]])})
    found = moments.average(last, {"w": torch.tensor([smooth[last]])}, length)["w"].item()
    assert abs(found - along) < 0.1 * abs(path[last] - along)


def test_moments_get_sparser_and_are_the_same_whenever_a_run_was_killed(tmp_path):
    whole, killed = Moments(tmp_path / "whole", 10), Moments(tmp_path / "killed", 10)
    at = {step: {"w": torch.tensor([float(step)])} for step in range(10, 1000, 10)}
    for step in at:
        whole.keep(step, at[step])
    for step in [*range(10, 500, 10), *range(330, 1000, 10)]:
        killed.keep(step, at[step])
    assert whole.kept(990) == killed.kept(990)
    assert len(whole.kept(990)) <= MOST
    assert whole.kept(990)[0] == whole.kept(990)[1] - whole.kept(990)[0]
    found, again = (one.average(990, at[990], 0.1)["w"] for one in (whole, killed))
    assert torch.equal(found, again)


FLOW = ("prior.steps=8", "prior.log_every=1", "prior.save_every=2", "prior.looks=0", "prior.precision=fp32")


def losses_of(monkeypatch, order: dict[int, float]) -> None:
    """Held-out losses by how many have been asked for since the training ended."""
    asked = [-1]
    plain = averages.Moments.kept

    def counting(self, last):
        asked[0] = max(asked[0], 0)
        return plain(self, last)

    monkeypatch.setattr(averages.Moments, "kept", counting)
    held_out = prior.held_out_loss

    def loss(*arguments):
        if asked[0] < 0:
            return held_out(*arguments)
        asked[0] += 1
        return order.get(asked[0], 9.0)

    monkeypatch.setattr(prior, "held_out_loss", loss)


def test_the_least_held_out_loss_is_chosen(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    shown = []
    plain = Moments.average

    def average(self, last, weights, length):
        shown.append((length, plain(self, last, weights, length)))
        return shown[-1][1]

    monkeypatch.setattr(Moments, "average", average)
    losses_of(monkeypatch, {3: 1e-6})  # the first is that of no further average, asked for before
    run = train(tiny_dataset, tmp_path / "run", stage="prior", overrides=FLOW, start=tiny_run)
    tensors, meta = load(run / "prior-flow.safetensors")
    assert (meta["average"], meta["average_loss"]) == (LENGTHS[2], 0.0)
    length, weights = shown[-1]
    assert length == LENGTHS[2]
    for name, value in weights.items():
        torch.testing.assert_close(tensors[f"flow.{name}"].float(), value, atol=2e-3, rtol=2e-3)
    assert not (run / "averages").exists()


def test_a_choice_after_a_kill_is_bit_equal(tiny_dataset, tiny_run, tmp_path, monkeypatch):
    whole = train(tiny_dataset, tmp_path / "whole", stage="prior", overrides=FLOW, start=tiny_run)
    forward, calls = prior.FlowObjective.forward, [0]

    def stopping(self, *arguments):
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] == 6:
                raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prior.FlowObjective, "forward", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_dataset, tmp_path / "killed", stage="prior", overrides=FLOW, start=tiny_run)
    killed = train(tiny_dataset, tmp_path / "killed", stage="prior", overrides=FLOW, start=tiny_run)
    (first, meta), (again, other) = (load(run / "prior-flow.safetensors") for run in (whole, killed))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert meta["average_loss"] == other["average_loss"]


def test_it_can_be_left_out(tiny_dataset, tiny_run, tmp_path):
    run = train(tiny_dataset, tmp_path, stage="prior", overrides=[*FLOW, "prior.choose_average=false"], start=tiny_run)
    assert "average" not in load(run / "prior-flow.safetensors")[1]
