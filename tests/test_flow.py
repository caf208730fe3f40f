"""The flow against an exact solution.

For data N(MU, S^2) the marginal velocity of the straight path is known, and so is its flow: noise x0 ends at MU + S x0.
A solver of order p must approach that at rate h^p, and no velocity has a smaller matching loss.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import scipy.integrate
import torch

from ctvae import flow

MU, S = 0.7, 0.3
SAMPLES = 400_000


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 + (t * S) ** 2
    return MU + (t * S**2 - (1 - t)) / variance * (x - t * MU)


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and data, [SAMPLES 1] each."""
    random = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, SAMPLES, 1, generator=random, dtype=torch.float64)
    return x0, MU + S * x1


@pytest.mark.parametrize("schedule", flow.SCHEDULES)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_sampler_converges_at_its_order(solver, order, schedule):
    """As steps double, a first-order error halves and a second-order one quarters."""
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    exact = MU + S * x0

    def error(steps: int) -> float:
        return (flow.sample(gaussian_velocity, x0, flow.times(steps, schedule), solver) - exact).abs().max().item()

    rate = math.log2(error(64) / error(128))
    assert rate == pytest.approx(order, abs=0.15)
    assert error(128) < 0.02


@pytest.mark.parametrize(("solver", "evaluations", "latest"), [("euler", 5, 0.8), ("heun", 10, 1.0), ("ab2", 5, 0.8)])
def test_sampler_asks_for_times_from_0_to_1(solver, evaluations, latest):
    times = []

    def velocity(x, t):
        times.append(t.tolist())
        return torch.ones_like(x)

    x = flow.sample(velocity, torch.zeros(2, 3), flow.times(5, "equal"), solver)
    torch.testing.assert_close(x, torch.ones(2, 3))
    assert len(times) == evaluations == flow.evaluations(solver, 5)
    assert times[0] == [0.0, 0.0]
    assert max(max(t) for t in times) == pytest.approx(latest)


def test_two_old_slopes_are_worth_more_than_one():
    """On x' = 3 t^2 the multistep method is exact to h^2 with half of Heun's evaluations."""

    def error(solver: str, steps: int) -> float:
        times = flow.times(steps, "equal")
        return abs(flow.sample(lambda x, t: 3 * t[:, None] ** 2, torch.zeros(1, 1), times, solver).item() - 1)

    assert error("ab2", 20) < 0.25 * error("euler", 20)
    assert error("ab2", 40) == pytest.approx(error("ab2", 20) / 4, rel=0.2)


def test_old_slopes_are_extrapolated_over_steps_of_any_length():
    """A slope linear in t is integrated exactly from the second step on: what is left is the first step's h^2 / 2."""
    times = [0.0, 0.1, 0.15, 0.6, 0.61, 1.0]
    x = flow.sample(lambda x, t: t[:, None], torch.zeros(1, 1, dtype=torch.float64), times, "ab2")
    assert x.item() == pytest.approx(0.5 - 0.1**2 / 2, abs=1e-12)


def test_a_sample_can_go_on_from_any_time():
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    half = flow.sample(gaussian_velocity, x0, [n / 800 for n in range(401)], "heun")
    torch.testing.assert_close(half, 0.5 * MU + math.sqrt(0.25 + 0.25 * S**2) * x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_times_rise_from_0_to_1(steps):
    for schedule in flow.SCHEDULES:
        times = flow.times(steps, schedule)
        assert (times[0], times[-1], len(times)) == (0.0, 1.0, steps + 1)
        assert all(before < after for before, after in pairwise(times))
    assert flow.times(4, "equal") == [0, 0.25, 0.5, 0.75, 1]


def test_logit_times_are_a_steeper_logit():
    s, t = torch.tensor(flow.times(20, "equal"))[1:-1], torch.tensor(flow.times(20, "logit"))[1:-1]
    torch.testing.assert_close(torch.logit(t), flow.STRETCH * torch.logit(s) + math.log(flow.SHIFT), rtol=1e-4, atol=1e-4)


def test_wide_data_want_short_steps_near_the_noise():
    """Of a spread of 20, as the leading directions of latents have, the path bends at t = 1 / 20."""

    def wide(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1)
        return (t * 20**2 - (1 - t)) / ((1 - t) ** 2 + (t * 20) ** 2) * x

    def error(schedule: str) -> float:
        return abs(flow.sample(wide, torch.ones(1, 1, dtype=torch.float64), flow.times(20, schedule)).item() / 20 - 1)

    assert error("logit") < 0.4 * error("equal")


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver 'rk4' is not one of ab2, heun, euler"):
        flow.sample(gaussian_velocity, torch.zeros(1, 1), [0.0, 1.0], solver="rk4")
    with pytest.raises(ValueError, match="schedule 'even' is not one of logit, equal"):
        flow.times(4, "even")


def straight_loss(velocity, x0, x1, t):
    """With nothing averaged out."""
    return flow.matching_loss(velocity, x0, x1, t, x1, torch.zeros_like(x1))


@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 0.95])
def test_the_true_velocity_leaves_the_conditional_variance(pairs, time):
    """E |v - (x1 - x0)|^2 = Var(x1 - x0) - Cov(x1 - x0, x_t)^2 / Var(x_t) for jointly Gaussian variables."""
    t = torch.full((SAMPLES,), time, dtype=torch.float64)
    loss = straight_loss(gaussian_velocity, *pairs, t).mean().item()
    covariance, variance = time * S**2 - (1 - time), (1 - time) ** 2 + (time * S) ** 2
    assert loss == pytest.approx(1 + S**2 - covariance**2 / variance, rel=0.01, abs=1e-12)


@pytest.mark.parametrize("bias", [-0.5, 0.1, 0.3])
def test_a_biased_velocity_costs_the_square_of_its_bias(pairs, bias):
    t = flow.logit_normal_times(SAMPLES, torch.Generator().manual_seed(1)).double()
    least = straight_loss(gaussian_velocity, *pairs, t).mean()
    biased = straight_loss(lambda x, t: gaussian_velocity(x, t) + bias, *pairs, t).mean()
    assert (biased - least).item() == pytest.approx(bias**2, abs=5 * 2 * abs(bias) / math.sqrt(SAMPLES))


def test_the_loss_is_per_sample():
    x0, x1 = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6)
    x1[1] = 2.0
    assert straight_loss(lambda x, t: torch.zeros_like(x), x0, x1, torch.rand(2)).tolist() == [0.0, 4.0]


def test_the_path_is_straight_between_its_ends():
    x0, x1 = torch.randn(2, 3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    x = flow.interpolate(x0, x1, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], x1[2])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * x1[1])


@pytest.mark.parametrize("shift", [0.0, -1.0])
@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_times_are_logit_normal(shift, spread):
    times = torch.cat([flow.logit_normal_times(8, torch.Generator().manual_seed(n), shift, spread) for n in range(5000)])
    logits = torch.logit(times.double())
    assert logits.mean().item() == pytest.approx(shift, abs=5 * spread / math.sqrt(40_000))
    assert logits.std().item() == pytest.approx(spread, rel=0.02)
    assert (logits < shift + spread).double().mean().item() == pytest.approx(0.8413, abs=0.01)  # a standard normal below 1


def test_a_batch_sees_all_of_the_path():
    """One time from each eighth: no batch of eight is all noise or all data."""
    for seed in range(20):
        t = flow.logit_normal_times(8, torch.Generator().manual_seed(seed))
        quantiles = torch.special.ndtr(torch.logit(t.double())) * 8
        assert quantiles.floor().tolist() == list(range(8))


@pytest.mark.parametrize(("std", "share"), [(1.0, 0.1), (0.3, 0.05), (5.0, 0.2)])
def test_kept_noise_widens_gaussian_samples_by_its_integral(std, share):
    """For x_1 ~ N(0, s^2) v = a(t) x, so x grows by exp of the integral of a, s, and of that of share (1 - t a) / t."""

    def slope(t):
        return (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)

    x0 = torch.ones(1, 1, dtype=torch.float64)
    x1 = flow.sample(flow.keeping_noise(lambda x, t: slope(t)[:, None] * x, share), x0, flow.times(4000, "equal"), "heun")
    more = scipy.integrate.quad(lambda t: share * (1 - t * slope(t)) / t, flow.KEPT_FROM, flow.KEPT_TO)[0]
    assert x1.item() == pytest.approx(std * math.exp(more), rel=1e-3)
    plain = flow.sample(flow.keeping_noise(lambda x, t: slope(t)[:, None] * x, 0.0), x0, flow.times(4000, "equal"), "heun")
    assert plain.item() == pytest.approx(std, rel=1e-3)


def test_guidance_is_linear_in_its_weight():
    def along(weight: float) -> torch.Tensor:
        return flow.guided(torch.full((2, 1), 3.0), [(torch.full((2, 1), 3.0), torch.ones(2, 1), weight)])

    assert along(0.0).unique().item() == 1.0  # unconditional
    assert along(1.0).unique().item() == 3.0  # conditional
    assert along(2.0).unique().item() == 5.0  # beyond it


def test_two_guidances_add_up():
    v, one = torch.full((2, 1), 3.0), torch.ones(2, 1)
    assert flow.guided(v, [(v, one, 1.5), (2 * one, -one, 1.25)]).unique().item() == 3 + 0.5 * (3 - 1) + 0.25 * (2 + 1)


def test_guidance_away_from_a_narrower_gaussian_widens_samples():
    """Data N(MU, S^2), a model that has learned 0.9 S and a weak one of 0.5 S: a weight above 1 gives spread back."""

    def of(spread: float) -> flow.Velocity:
        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            t = t.view(-1, 1)
            return MU + (t * spread**2 - (1 - t)) / ((1 - t) ** 2 + (t * spread) ** 2) * (x - t * MU)

        return velocity

    def spread(weight: float) -> float:
        def led(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = of(0.9 * S)(x, t)
            return flow.guided(v, [(v, of(0.5 * S)(x, t), weight)])

        ends = flow.sample(led, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), flow.times(200))
        return (ends[1] - ends[0]).item() / 2

    assert spread(1.0) == pytest.approx(0.9 * S, abs=1e-3)
    assert spread(0.0) == pytest.approx(0.5 * S, abs=1e-3)
    assert 0.95 * S < spread(1.2) < spread(1.5)


@pytest.mark.parametrize("time", [0.02, 0.3, 0.5, 0.9])
def test_the_expected_velocity_is_the_regression_of_the_straight_one(time):
    """mean + slope (x_t - t mean), as least squares finds them on draws around one mean."""
    random = torch.Generator().manual_seed(3)
    mean, std = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    x0, e = torch.randn(2, SAMPLES, 1, generator=random, dtype=torch.float64)
    x1, t = mean + std * e, torch.full((SAMPLES,), time, dtype=torch.float64)
    xt = flow.interpolate(x0, x1, t)
    design = torch.cat((torch.ones_like(xt), xt), dim=1)
    intercept, slope = torch.linalg.lstsq(design, x1 - x0).solution.flatten().tolist()
    expected = flow.expected_velocity(torch.tensor([[0.0], [1.0]]).double(), t[:2], mean.expand(2, 1), std.expand(2, 1))
    assert expected[0].item() == pytest.approx(intercept, abs=0.03)
    assert (expected[1] - expected[0]).item() == pytest.approx(slope, abs=0.03)


def test_averaging_the_posteriors_noise_out_leaves_the_solution_and_takes_the_variance():
    """Data: x_1 = m + std e with m of unit variance; velocities a x_t are fitted to both targets at one time."""
    random = torch.Generator().manual_seed(4)
    m, x0, e = torch.randn(3, SAMPLES, 1, generator=random, dtype=torch.float64)
    std, t = torch.full_like(m, 1.2), torch.full((SAMPLES,), 0.6, dtype=torch.float64)
    x1 = m + std * e
    xt = flow.interpolate(x0, x1, t)
    targets = x1 - x0, flow.expected_velocity(xt, t, m, std)
    plain, averaged = ((xt * target).mean() / xt.square().mean() for target in targets)
    truth = (0.6 * (1 + 1.2**2) - 0.4) / (0.4**2 + 0.36 * (1 + 1.2**2))  # of a Gaussian with the whole variance
    assert plain.item() == pytest.approx(truth, abs=0.02)
    assert averaged.item() == pytest.approx(truth, abs=0.01)
    left = flow.matching_loss(lambda x, t: truth * x, x0, x1, t, m, std).mean()
    assert left < 0.5 * straight_loss(lambda x, t: truth * x, x0, x1, t).mean()
