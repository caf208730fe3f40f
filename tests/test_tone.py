"""The curve on decoded values, against the closed form of two normal distributions, and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctvae.models import tone as tone_module
from ctvae.models.tone import KNOTS, RANGE, STEEPEST, STRENGTH, Tone, counts


def normal(mean: float, spread: float, seed: int, count: int = 400_000) -> torch.Tensor:
    return mean + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fitted() -> Tone:
    tone = Tone()
    tone.fit(counts(normal(0.1, 0.2, 0)), counts(normal(-0.1, 0.1, 1)))
    return tone


def test_it_begins_as_the_identity():
    y = torch.linspace(-1.5, 1.5, 1001)
    assert torch.equal(Tone()(y), y)


def test_a_normal_distribution_is_taken_to_another(fitted):
    """The monotone map from N(m, s) to N(n, t) is n + t / s (y - m), of which STRENGTH is gone."""
    y = torch.linspace(-0.3, 0.5, 81)
    exact = -0.1 + 0.5 * (y - 0.1)
    np.testing.assert_allclose(fitted(y).detach(), y + STRENGTH * (exact - y), atol=0.006)


def test_it_is_monotone_and_its_ends_stay(fitted):
    y = torch.linspace(-1, 1, 5001)
    assert (fitted(y).diff() > 0).all()
    assert fitted(torch.tensor([-1.0, 1.0])).tolist() == [-1.0, 1.0]


def test_two_narrow_peaks_come_nearer_than_they_were():
    """Fat and muscle, blurred into each other: the share of values between them falls towards what it should be."""
    real = torch.cat((normal(-0.1, 0.01, 2), normal(0.05, 0.01, 3)))
    decoded = torch.cat((normal(-0.09, 0.04, 4), normal(0.04, 0.04, 5)))
    tone = Tone()
    tone.fit(counts(decoded), counts(real))

    def between(x: torch.Tensor) -> float:
        return ((x > -0.06) & (x < 0.01)).float().mean().item()

    assert between(real) < 0.001
    assert between(decoded) > 0.2
    assert between(tone(decoded)) < 0.5 * between(decoded)


def test_counts_are_a_histogram():
    x = torch.tensor([-1.5, -1.0, 0.0, 0.0004, 1.0, 7.0])
    found = counts(x)
    assert found.sum() == 6
    assert (found[0], found[RANGE // 2], found[-1]) == (2, 2, 2)


def test_between_knots_it_is_numpys_interpolation():
    tone = Tone()
    tone.offset.data.normal_(generator=torch.Generator().manual_seed(0))
    y = torch.linspace(-1.2, 1.2, 997)
    exact = y.numpy() + np.interp(y.numpy(), np.linspace(-1, 1, KNOTS), tone.offset.detach().numpy())
    np.testing.assert_allclose(tone(y).detach(), exact, atol=1e-4)


def test_gradients_are_those_of_autograd(monkeypatch):
    """Of the same curve written plainly, in double precision; by pieces of which the last is shorter."""
    monkeypatch.setattr(tone_module, "PIECE", 1000)
    random = torch.Generator().manual_seed(0)
    offset = (0.1 * torch.randn(KNOTS, generator=random, dtype=torch.float64)).requires_grad_()
    y = (2.4 * torch.rand((2, 1, 9, 12, 13), generator=random, dtype=torch.float64) - 1.2).requires_grad_()
    cotangent = torch.randn(y.shape, generator=random, dtype=torch.float64)
    place = (y.clamp(-1, 1) + 1) * ((KNOTS - 1) / 2)
    below = place.detach().floor().clamp(0, KNOTS - 2).long()
    plain = y + torch.lerp(offset[below], offset[below + 1], place - below)
    wanted = torch.autograd.grad(plain, (y, offset), cotangent)
    found = tone_module._Curve.apply(y, offset)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, (y, offset), cotangent), wanted)


def test_what_is_not_a_number_stays_so():
    assert Tone()(torch.tensor([0.5, float("nan")])).isnan().tolist() == [False, True]


def test_a_jump_becomes_a_ramp_about_its_middle():
    """Decoded values anywhere between -0.9 and -0.7, real ones at either: what lies in between is not thrown to one side."""
    tone = Tone()
    random = np.random.default_rng(0)
    decoded = torch.from_numpy(np.concatenate((random.uniform(-0.9, -0.7, 50_000), random.uniform(0, 0.5, 50_000))))
    real = torch.from_numpy(np.concatenate((np.repeat((-0.95, -0.65), 25_000), random.uniform(0, 0.5, 50_000))))
    tone.fit(counts(decoded), counts(real))
    y = torch.linspace(-1, 1, 2001)
    slope = tone(y).detach().diff() / y.diff()
    assert slope.max() < 1 + STRENGTH * (STEEPEST - 1) + 0.01
    assert slope.max() > 1 + STRENGTH * (STEEPEST - 1) - 0.05
    middle = tone(torch.tensor([-0.8])).item()
    assert middle == pytest.approx(-0.8, abs=0.01)
