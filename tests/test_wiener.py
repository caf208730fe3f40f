"""The Wiener velocity against dense linear algebra, a Monte Carlo mean, and the known flow of a Gaussian."""

import pytest
import torch

from ctvae import flow
from ctvae.wiener import WienerVelocity


def gaussian(size: int = 6, rank: int = 2) -> WienerVelocity:
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(size, generator=random)
    factors = torch.randn(rank, size, generator=random)
    return WienerVelocity(mean, factors, 0.1 + torch.rand(size, generator=random))


def covariance(velocity: WienerVelocity) -> torch.Tensor:
    return (velocity.factors.T @ velocity.factors + torch.diag(velocity.rest)).double()


@pytest.mark.parametrize("time", [0.0, 0.3, 0.9, 1.0])
def test_woodbury_equals_the_dense_conditional_mean(time):
    velocity = gaussian()
    c, m, eye = covariance(velocity), velocity.mean.double(), torch.eye(6, dtype=torch.float64)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    s = time**2 * c + (1 - time) ** 2 * eye
    expected = m + torch.linalg.solve(s, (x - time * m).T).T @ (time * c - (1 - time) * eye).T
    assert torch.allclose(velocity(x, torch.full((4,), time)).double(), expected, atol=1e-4)


def test_times_differ_within_a_batch_and_axes_stay():
    velocity = gaussian()
    x, t = torch.randn(3, 1, 2, 3), torch.tensor([0.1, 0.5, 0.8])
    together = velocity(x, t)
    assert together.shape == x.shape
    for i in range(3):
        assert torch.allclose(together[i], velocity(x[i : i + 1], t[i : i + 1])[0], atol=1e-5)


def test_its_flow_is_the_gaussians():
    """For one dimension the exact map is mean + std * x0; the solver must come close."""
    velocity = WienerVelocity(torch.tensor([0.7]), torch.tensor([[0.4]]), torch.tensor([0.09]))
    x0 = torch.linspace(-2, 2, 9).view(-1, 1)
    assert torch.allclose(flow.sample(velocity, x0, flow.times(200)), 0.7 + 0.5 * x0, atol=1e-3)


def test_nothing_else_minimises_the_matching_loss_on_gaussian_data():
    velocity = gaussian()
    random = torch.Generator().manual_seed(2)
    root = torch.linalg.cholesky(covariance(velocity)).float()
    x1 = velocity.mean + torch.randn(20000, 6, generator=random) @ root.T
    x0 = torch.randn(x1.shape, generator=random)
    t = torch.rand(len(x1), generator=random)
    still = torch.zeros_like(x1)
    best = flow.matching_loss(velocity, x0, x1, t, x1, still).mean()
    for tilt in (0.9, 1.1):
        other = flow.matching_loss(lambda x, s, tilt=tilt: tilt * velocity(x, s), x0, x1, t, x1, still).mean()
        assert other > best + 0.001


def test_fit_finds_mean_covariance_and_noise():
    truth = gaussian()
    random = torch.Generator().manual_seed(3)
    rows = truth.mean + torch.randn(40000, 6, generator=random) @ torch.linalg.cholesky(covariance(truth)).float().T
    rows = rows[:3000]
    fitted = WienerVelocity.fit(rows, torch.full((6,), 0.5), rank=5)
    expected = torch.cov(rows.T.double()) + 0.5 * torch.eye(6)
    assert torch.allclose(covariance(fitted).diagonal(), expected.diagonal(), rtol=1e-3)
    leading = torch.linalg.eigvalsh(covariance(fitted))[-1]
    assert leading == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=0.02)


def test_fit_of_few_or_equal_samples():
    same = WienerVelocity.fit(torch.ones(3, 4), torch.zeros(4), rank=8)
    assert torch.isfinite(same(torch.randn(2, 4), torch.tensor([0.0, 1.0]))).all()
    one = WienerVelocity.fit(torch.ones(1, 4), torch.zeros(4), rank=8)
    assert one.factors.shape == (0, 4)
    assert torch.isfinite(one(torch.randn(1, 4), torch.tensor([0.5]))).all()
