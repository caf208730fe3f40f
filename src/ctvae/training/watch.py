"""While the flow trains: are its samples getting nearer to held-out scans, and are any copies of training scans?

The flow's loss says neither: it goes on falling while a small training set is learned by heart. So at a few moments some
latents are drawn, always from the same noise and told what held-out groups were told, and compared with

    held-out groups    unbiased kernel distance (Binkowski et al. 2018) of the coordinates along the fitted principal directions
    training groups    share of samples nearer to one than the closest 1 % of held-out groups come (after Carlini et al. 2023)

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
from ctvae.device import generator
from ctvae.evaluation.distances import kernel_distance
from ctvae.latents import LatentCode, LatentSet, most_fitted
from ctvae.wiener import WienerVelocity

SAMPLES = 48
MOST_HELD_NUMBERS = 2**26  # of the training groups' latents, in memory: 256 MiB
SPLITS = 20  # of the held-out groups into halves, whose distances show what is noise
MOST_COPIES = 0.02  # share of samples; more is worth a warning
TIMES = flow.times(16)  # the same error at every moment, so it does not decide between them
CLOSEST_SHARE = 0.01
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
        self.nearest = self.known.nearest(self.held_out)  # [M]
        self.spread = self._spread(generator(seed, 1, stream=17))
        chosen = torch.arange(SAMPLES) % len(told)
        self.told = told[chosen]  # [S K]
        self.noise = torch.randn((SAMPLES, *self.shape), generator=random)

    @torch.no_grad()
    def look(self, network: nn.Module, precision: str, batch: int = 8) -> Seen:
        device = next(network.parameters()).device
        drawn = []
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
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
        threshold = torch.quantile(self.nearest, CLOSEST_SHARE)
        return Seen(distance, (self.known.nearest(samples) < threshold).float().mean().item())


def coordinates(rows: Tensor, wiener: WienerVelocity) -> Tensor:
    """Along each fitted direction, in its standard deviations: [n P] -> [n R]."""
    return (rows - wiener.mean) @ wiener.factors.T / wiener.factors.square().sum(1)


class Known:
    """The training groups' latents as the flow sees them: in memory, or where they are many, read again for each look."""

    def __init__(self, code: LatentCode, latents: LatentSet):
        self.code, self.latents = code, latents
        many = len(latents) * math.prod(latents.shape) > MOST_HELD_NUMBERS
        self._held = None if many else torch.cat(list(self._read()))  # [N P]

    def nearest(self, rows: Tensor) -> Tensor:
        """Distance of each row [n P] from the nearest training group: [n]."""
        parts = self._read() if self._held is None else [self._held]
        least = torch.full((len(rows),), math.inf)
        for part in parts:
            torch.minimum(least, torch.cdist(rows, part).amin(1), out=least)
        return least

    def _read(self) -> Iterator[Tensor]:
        """[b P] each."""
        return (self.code.encode(self.latents.means[rows].float()).flatten(1) for rows in self.latents.blocks())
