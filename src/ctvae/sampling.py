"""The trained flow in use: what may be asked of a draw, and how one is drawn.

Shapes:  [1 Z d h w] latents of a group, [1 Z n h w] of a volume of more slices, [1 N Z] vectors   K conditions
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ctvae import flow, slabs
from ctvae.conditions import Known, Told
from ctvae.config import MOST_KEPT, Prior, nearest
from ctvae.device import autocast
from ctvae.errors import ConfigError, InputError
from ctvae.latents import LatentCode
from ctvae.models.velocity import Velocity
from ctvae.networks import Size3
from ctvae.training.prior import Conditioning

MOST_VOXELS = 2**31  # of a volume, as NIfTI files here have at most


@dataclass(frozen=True)
class Sampling:
    """How to draw; None is the model's own. Raises ConfigError or InputError for what makes no sense."""

    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    conditions: Mapping[str, float | str] = field(default_factory=dict)
    slices: int | None = None
    schedule: str | None = None
    autoguidance: float | None = None
    rescale: float | None = None
    kept_noise: float | None = None
    grain: float | None = None  # the decoder's, not the flow's

    def __post_init__(self) -> None:
        for what, name, known in (("solver", self.solver, flow.SOLVERS), ("schedule", self.schedule, flow.SCHEDULES)):
            if name is not None and name not in known:
                raise ConfigError(f"{what} '{name}': no such{nearest(name, known)} (known: {', '.join(known)})")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps {self.steps}: at least 1")
        for what, weight in (("guidance", self.guidance), ("autoguidance", self.autoguidance)):
            if weight is not None and not 0 <= weight < math.inf:
                raise ConfigError(f"{what} {weight}: 0 or more; 1 is none")
        if self.rescale is not None and not 0 <= self.rescale <= 1:
            raise ConfigError(f"rescale {self.rescale}: from 0, none, to 1")
        if self.kept_noise is not None and not 0 <= self.kept_noise <= MOST_KEPT:
            raise ConfigError(f"kept noise {self.kept_noise}: from 0, none, to {MOST_KEPT:g}")
        if self.grain is not None and not 0 <= self.grain < math.inf:
            raise ConfigError(f"grain {self.grain}: 0, none, or more; 1 is as in scans")
        if self.slices is not None and self.slices < 2:
            raise InputError(f"slices {self.slices}: a volume has at least 2")

    def facts(self, cfg: Prior, shape: Size3) -> dict[str, Any]:
        """What holds for a model trained on groups of `shape`, defaults filled in."""
        return {
            "steps": self.steps or cfg.sampling_steps,
            "solver": self.solver or flow.SOLVERS[0],
            "schedule": self.schedule or flow.SCHEDULES[0],
            "guidance": cfg.guidance if self.guidance is None else self.guidance,
            "autoguidance": cfg.autoguidance if self.autoguidance is None else self.autoguidance,
            "rescale": cfg.rescale if self.rescale is None else self.rescale,
            "kept_noise": cfg.kept_noise if self.kept_noise is None else self.kept_noise,
            "asked": {**cfg.told, **self.conditions},
            "slices": self.slices or shape[0],
        }

    def for_the_flow_alone(self) -> list[str]:
        """Options that were given and that other priors do not know."""
        given = {
            "--solver": self.solver,
            "--schedule": self.schedule,
            "--guidance": self.guidance,
            "--autoguidance": self.autoguidance,
            "--rescale": self.rescale,
            "--kept-noise": self.kept_noise,
            "--condition": self.conditions or None,
        }
        return [name for name, value in given.items() if value is not None]


@dataclass(frozen=True)
class Draw:
    """One sample of a prior: the latent, and the conditions that it was drawn under."""

    latent: Tensor  # [1 ...]
    told: Told
    positions: tuple[float, ...] = ()  # of the slabs, where there are several

    @property
    def conditions(self) -> dict[str, float | str]:
        """For people: by name, without what was withheld."""
        return self.told.described()


@dataclass(frozen=True)
class FlowPrior:
    """The trained flow, told what a group of the training set was told."""

    code: LatentCode
    network: Velocity
    conditioning: Conditioning
    known: Known
    cfg: Prior
    shape: Size3  # D H W of a group

    def draw(self, latent_shape: tuple[int, ...], random: torch.Generator, asked: Sampling) -> Draw:
        """One group, or with more slices than that one volume of slabs that are denoised together (`slabs.py`).

        Noise is drawn once for the whole. Each slab is told its own position: the volume is as much of a scan as its length in mm
        is of the training scan's whose conditions were drawn, its middle at the position that was asked for or drawn, moved so
        that it lies within that scan and within the positions known to the model. A volume longer than the scan is taken for a
        whole one; where its slabs reach further than the known positions, they are spread evenly over these.
        """
        facts = asked.facts(self.cfg, self.shape)
        told = self.known.pick(random, self.known.given(facts["asked"]))
        size = self._size(latent_shape, facts["slices"])
        x0 = torch.randn((1, *size), generator=random).to(self.network.mean.device)
        starts = slabs.covering(size[1], latent_shape[1]) if len(size) == 4 else [0]
        positions = self.positions(told, starts, latent_shape[1], size[1]) if len(starts) > 1 else ()
        each = [told.having("position", position) for position in positions] or [told]
        velocities = [self._guided(one, facts["guidance"], facts["autoguidance"], facts["rescale"]) for one in each]
        velocity = slabs.joint(velocities, starts, latent_shape[1]) if positions else velocities[0]
        velocity = flow.keeping_noise(velocity, facts["kept_noise"])
        x1 = flow.sample(velocity, x0, flow.times(facts["steps"], facts["schedule"]), facts["solver"])
        if positions:
            told = told.having("position", (positions[0] + positions[-1]) / 2)
        return Draw(self.code.decode(x1.cpu()), told, positions)

    def positions(self, told: Told, starts: list[int], depth: int, total: int) -> tuple[float, ...]:
        """Of slabs of `depth` latent slices from `starts` on, in a volume of `total`."""
        slice_mm, cell = told["slice_mm"], self.shape[0] / depth  # cell: image slices of a latent slice
        scan_mm = max(told.scan_mm, total * cell * slice_mm)
        steps = [(start + (depth - total) / 2) * cell * slice_mm / scan_mm for start in starts]
        half = self.shape[0] * slice_mm / (2 * scan_mm)  # of a slab: its middle is no nearer to the scan's ends
        least, most = self.known.range("position")
        if max(least, half) <= min(most, 1 - half):
            least, most = max(least, half), min(most, 1 - half)
        return tuple(slabs.positions(told["position"], steps, least, most))

    def _size(self, latent_shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
        """Of the noise: a group's, or the multiple of latent slices that holds `slices`."""
        if len(latent_shape) != 4:
            return (math.prod(latent_shape),)
        channels, depth, height, width = latent_shape
        return channels, max(depth, math.ceil(slices * depth / self.shape[0])), height, width

    def _guided(self, told: Told, guidance: float, autoguidance: float, rescale: float) -> flow.Velocity:
        """What conditions do is seen without the detail, which is asked once: it is the same with them (docs/log.md).

        With and without them is one batch, which is quicker than one after the other.
        """
        network = self.network
        c = self.conditioning.standard(torch.tensor([told.values])).to(network.mean.device)  # [1 K]
        asked = torch.cat((c, torch.full_like(c, math.nan))) if guidance != 1 else c

        def at(x: Tensor, t: Tensor) -> Tensor:  # [1 C ...], [1]
            with autocast(self.cfg.precision, x.device):
                linear = network.linear(x, t)
                xs, ts, linears = (part.expand(len(asked), *part.shape[1:]) for part in (x, t, linear))
                coarse, *without = network.coarse(xs, ts, asked, linears).split(1)
                velocity = network.detailed(coarse, x, t, c)
                away = [(coarse, unaware, guidance) for unaware in without]
                if autoguidance != 1:
                    away.append((velocity, linear, autoguidance))
            led = flow.guided(velocity, away)
            return flow.rescaled(led, velocity, x, t, rescale) if away and rescale and x.ndim > 2 else led

        return at


def refuse(asked: Sampling, prior: str, shape: Size3, spatial: bool) -> None:
    """Raises InputError for what a prior, or a model of groups of `shape`, cannot do."""
    options = asked.for_the_flow_alone()
    if prior != "flow" and options:
        raise InputError(f"prior '{prior}' knows no {options[0]}; leave it out or use --prior flow")
    slices = asked.slices or shape[0]
    if slices > shape[0] and (prior != "flow" or not spatial):
        alone = f"the prior '{prior}' draws single groups; use --prior flow"
        reason = alone if spatial else "its latents are vectors; use a wavelet3d model"
        raise InputError(f"slices {slices}: this model makes up to {shape[0]}, as {reason}")
    if slices * shape[1] * shape[2] > MOST_VOXELS:
        raise InputError(f"slices {slices}: more than {MOST_VOXELS} voxels; ask for fewer")
