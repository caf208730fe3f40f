"""While the flow trains: are its samples getting nearer to held-out scans, and are any copies of training scans?

The flow's loss says neither: it goes on falling while a small training set is learned by heart. So at a few moments some
latents are drawn, always from the same noise and told what held-out groups were told, and compared with

    held-out groups    unbiased kernel distance (Binkowski et al. 2018) of the coordinates along the fitted principal directions
    training groups    share of copies among the samples (after Carlini et al. 2023, as in `evaluation/memorization.py`)

A copy is nearer to a training patient than the closest 1 % of held-out groups come, and so is its ratio of that distance to the
mean distance of the next five patients. The distance alone is small for whatever is smooth, which is near to everyone.

Shapes:  N training groups   M held-out groups   S samples   P numbers per latent   R principal directions   K conditions
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctvae import flow
from ctvae.device import autocast, generator
from ctvae.evaluation.distances import kernel_distance
from ctvae.latents import LatentCode, LatentSet, most_fitted
from ctvae.wiener import WienerVelocity

SAMPLES = 48
MOST_DISTANCES = 2**24  # in memory at a time
SPLITS = 20  # of the held-out groups into halves, whose distances show what is noise
MOST_COPIES = 0.05  # share of samples; more is worth a warning: by chance one or two of 48 are as near
TIMES = flow.times(16)  # the same error at every moment, so it does not decide between them
CLOSEST_SHARE = 0.01
NEXT = 5  # patients after the nearest one, whose distance is what is usual
FEWEST_HELD_OUT = 8  # groups, for either figure to mean anything


class Seen(NamedTuple):
    """What one look found."""

    distance: float = math.nan  # kernel distance of samples from held-out groups, 0 for one source
    copies: float = math.nan  # share of samples that come too near to a training group


class Watch:
    """Draws a few samples of the network it is shown, always the same ones, and judges them."""

    def __init__(
        self, code: LatentCode, wiener: WienerVelocity, training: LatentSet, held_out: LatentSet, told: Tensor, seed: int
    ):
        """`told` [M K]: the held-out groups' conditions as the network is told them."""
        self.wiener = wiener
        random = generator(seed, 0, stream=17)
        self.known = Known(code, training.plain())
        if (most := most_fitted(len(held_out), held_out.shape)) < len(held_out):
            few = torch.randperm(len(held_out), generator=generator(seed, 2, stream=17))[:most].tolist()
            held_out, told = held_out.chosen(few), told[few]
        # Held-out groups as noisy as samples are: else noise alone would keep a copy away from what it was copied from.
        fresh = code.encode(held_out.posterior_sample(list(range(len(held_out))), random))
        self.held_out, self.shape = fresh.flatten(1), fresh.shape[1:]  # [M P]
        self.limits = torch.quantile(self.known.closeness(self.held_out), CLOSEST_SHARE, dim=0)  # [2]
        self.spread = self._spread(generator(seed, 1, stream=17))
        chosen = torch.arange(SAMPLES) % len(told)
        self.told = told[chosen]  # [S K]
        self.noise = torch.randn((SAMPLES, *self.shape), generator=random)

    @torch.no_grad()
    def look(self, network: nn.Module, precision: str, batch: int = 8) -> Seen:
        device = next(network.parameters()).device
        drawn = []
        with autocast(precision, device):
            for noise, told in zip(self.noise.split(batch), self.told.to(device).split(batch), strict=True):
                drawn.append(flow.sample(partial(network, c=told), noise.to(device), TIMES).float().cpu())
        return self._judged(torch.cat(drawn).flatten(1))

    def _spread(self, random: torch.Generator) -> float:
        """Standard deviation of the distance between halves of the held-out groups."""
        rows = coordinates(self.held_out, self.wiener).double()
        if not rows.shape[1]:
            return math.nan
        orders = [torch.randperm(len(rows), generator=random) for _ in range(SPLITS)]
        halves = [rows[order].tensor_split(2) for order in orders]
        return torch.tensor([kernel_distance(a.numpy(), b.numpy()) for a, b in halves]).std().item()

    def _judged(self, samples: Tensor) -> Seen:  # [S P]
        ours, real = (coordinates(rows, self.wiener).double().numpy() for rows in (samples, self.held_out))
        distance = kernel_distance(ours, real) if ours.shape[1] else math.nan
        copied = (self.known.closeness(samples) < self.limits).all(1)
        return Seen(distance, copied.float().mean().item())


def coordinates(rows: Tensor, wiener: WienerVelocity) -> Tensor:
    """Along each fitted direction, in its standard deviations: [n P] -> [n R]."""
    return (rows - wiener.mean) @ wiener.factors.T / wiener.factors.square().sum(1)


class Known:
    """The training groups' latents as the flow sees them, read anew for each look: it does not matter how many there are."""

    def __init__(self, code: LatentCode, latents: LatentSet):
        self.code, self.latents = code, latents
        number: dict[str, int] = {}
        self.patients = torch.tensor([number.setdefault(patient, len(number)) for patient in latents.whose])  # [N]

    def closeness(self, rows: Tensor) -> Tensor:
        """How far each row [n P] is from the nearest patient, and that over the mean of the next ones: [n 2].

        The ratio is 1 where there is one patient alone.
        """
        distance = self._nearest(rows)
        usual = distance[:, 1:].masked_fill(distance[:, 1:].isinf(), math.nan).nanmean(1)  # where patients are few: of those
        return torch.stack((distance[:, 0], (distance[:, 0] / usual).nan_to_num(1.0)), dim=1)

    def _nearest(self, rows: Tensor) -> Tensor:
        """Distances of each row [n P] from the nearest patients, ascending and infinite beyond the last: [n 1+NEXT]."""
        best = torch.full((len(rows), 1 + NEXT), math.inf)
        whose = torch.full(best.shape, -1)
        most = max(1, MOST_DISTANCES // len(rows))
        for read, owners in self._read():
            for part, patients in zip(read.split(most), owners.split(most), strict=True):
                distance = torch.cat((best, torch.cdist(rows, part)), dim=1)
                best, whose = of_patients(distance, torch.cat((whose, patients.expand(len(rows), -1)), dim=1))
        return best

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """[b P] each, and whose they are [b]."""
        for rows in self.latents.blocks():
            yield self.code.encode(self.latents.means[rows].float()).flatten(1), self.patients[rows]


def of_patients(distance: Tensor, whose: Tensor) -> tuple[Tensor, Tensor]:
    """The 1 + NEXT smallest distances of each row of `distance` [n m], one for each patient, and their patients."""
    found = []
    for _ in range(1 + NEXT):
        least, at = distance.min(1)
        patient = whose.gather(1, at[:, None])  # [n 1]
        distance = distance.masked_fill(whose == patient, math.inf)
        found.append((least, patient[:, 0]))
    nearest, patients = zip(*found, strict=True)
    return torch.stack(nearest, dim=1), torch.stack(patients, dim=1)
