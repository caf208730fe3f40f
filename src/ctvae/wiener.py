"""The flow's velocity if the data were Gaussian: the Wiener filter, in closed form.

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   x_1 ~ N(m, C),   C = U U^T + diag(D)
    E[x_1 - x_0 | x_t] = m + (t C - (1 - t) I) S^-1 (x_t - t m),   S = t^2 C + (1 - t)^2 I

S^-1 by Woodbury's identity: only R x R systems are solved. A network that adds to this velocity starts as the fitted
Gaussian prior and has what is not Gaussian left to learn; what all scans share, which body part, how large, where in the
field of view, is there from the first step. (Wang and Vastola 2024 found that trained diffusion models follow this filter
through most of the path; here they need not find it first.)

Shapes:  B batch   P numbers per sample   R rank
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_VARIANCE = 1e-4  # of numbers that no sample varies in, such as the air's


@dataclass(frozen=True)
class WienerVelocity:
    """The velocity from N(0, I) to N(mean, factors^T factors + diag(rest))."""

    mean: Tensor  # [P]
    factors: Tensor  # [R P], principal directions times their standard deviations
    rest: Tensor  # [P], variance beyond the factors

    @classmethod
    def fit(cls, rows: Tensor, noise: Tensor, rank: int) -> WienerVelocity:
        """To samples `rows` [N P], each with further independent variance `noise` [P], which may be zero.

        `rank` principal directions keep their covariance; what lies beyond them counts as independent between numbers.
        """
        mean = rows.mean(0)
        centred = rows - mean
        values, vectors = torch.linalg.eigh(centred @ centred.T)  # of the N x N Gram matrix, ascending
        kept = min(rank, len(rows) - 1)
        values, vectors = values[len(values) - kept :].flip(0), vectors[:, len(vectors) - kept :].flip(1)  # [R], [N R]
        kept = int((values > values.amax() * 1e-6).sum()) if kept else 0  # no direction twice where samples repeat
        factors = vectors[:, :kept].T @ centred / (len(rows) - 1) ** 0.5  # [R P]
        total = centred.square().sum(0) / max(1, len(rows) - 1)
        rest = (total - factors.square().sum(0)).clamp_min(0) + noise
        return cls(mean, factors, rest.clamp_min(LEAST_VARIANCE))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:  # [B P ...], [B]
        time = t.view(-1, 1).float()
        off = x.flatten(1).float() - time * self.mean  # [B P]
        inverse = 1 / (time.square() * self.rest + (1 - time).square()).clamp_min(1e-12)  # of S without the factors, [B P]
        solved = inverse * off
        weighted = self.factors * inverse[:, None]  # [B R P]
        inner = time[..., None].square() * (weighted @ self.factors.T)  # [B R R]
        inner = inner + torch.eye(len(self.factors), device=x.device)
        along = torch.linalg.solve(inner, (solved @ self.factors.T)[..., None])[..., 0]  # [B R]
        solved = solved - time.square() * torch.einsum("brp,br->bp", weighted, along)  # S^-1 (x_t - t m)
        spread = (solved @ self.factors.T) @ self.factors + self.rest * solved  # C S^-1 (x_t - t m)
        return (self.mean + time * spread - (1 - time) * solved).view_as(x)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "factors": self.factors, "rest": self.rest}

    def to(self, device: torch.device) -> WienerVelocity:
        return WienerVelocity(*(tensor.to(device) for tensor in self.tensors().values()))
