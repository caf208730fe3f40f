"""Stage 2: the priors over the trained autoencoder's latents. The flow's loop stands here; the others are fitted in closed form.

Shapes:  B batch   Z latent channels   d h w latent voxels   K conditions
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctvae import flow, priors
from ctvae.checkpoint import EMA, save
from ctvae.conditions import BUILT_IN, of_group, scan_mm
from ctvae.config import Config, Prior
from ctvae.device import generator, make_fabric, place
from ctvae.errors import TrainingDiverged
from ctvae.latents import LatentCode, LatentSet
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.velocity import UNet, VectorNet, Velocity
from ctvae.progress import Progress
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer
from ctvae.wiener import WienerVelocity

HELD_OUT_BATCHES = 4
LEAST_SPREAD = 0.01  # of a condition that (nearly) all scans share: no other value may come out huge


@dataclass(frozen=True)
class Conditioning:
    """Conditions standardised over the training set; withheld ones are NaN."""

    mean: Tensor  # [K]
    std: Tensor  # [K]

    @classmethod
    def fit(cls, values: Tensor) -> Conditioning:
        """Over what is known; a condition that no group has is left as it is."""
        mean = values.nanmean(0)
        std = (values - mean).square().nanmean(0).sqrt().clamp_min(LEAST_SPREAD)
        return cls(mean.nan_to_num(0.0), std.nan_to_num(1.0))

    def standard(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class Batch(NamedTuple):
    """What one flow step needs."""

    x1: Tensor  # [B C ...] data
    conditions: Tensor  # [B K] standardised, NaN where withheld


class FlowObjective(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, random: torch.Generator) -> Tensor:
        """Flow matching loss per sample [B]."""
        x1 = batch.x1
        x0 = torch.randn(x1.shape, generator=random).to(x1.device)
        t = flow.logit_normal_times(len(x1), random).to(x1.device)
        return flow.matching_loss(lambda x, t: self.network(x, t, batch.conditions), x0, x1, t)


def build_velocity(cfg: Prior, latent_shape: tuple[int, ...], known: int, wiener: WienerVelocity) -> Velocity:
    """The flow's network for latents of `latent_shape`, [Z d h w] or [N Z], told `known` conditions."""
    if len(latent_shape) == 4:
        return Velocity(UNet(latent_shape[0], known, cfg.widths, cfg.blocks), wiener)
    return Velocity(VectorNet(math.prod(latent_shape), known, cfg.mlp_width, blocks=4), wiener)


def fit_wiener(cfg: Prior, code: LatentCode, latents: LatentSet) -> WienerVelocity:
    """The Wiener velocity of the training latents, posterior variance included."""
    rows = code.encode(latents.means.float()).flatten(1)  # [N P]
    scale = (code.encode(torch.ones_like(latents.means[:1]).float()) - code.encode(torch.zeros_like(latents.means[:1]).float()))
    noise = latents.logvars.float().exp().mean(0).flatten() * scale.flatten().square()
    return WienerVelocity.fit(rows, noise, cfg.rank)


def train_prior(run: Run, cfg: Config, latents: LatentSet, held_out: LatentSet | None) -> None:
    """Fit every prior to `latents`; resumes from `run`. Writes run/prior-flow.safetensors and the fitted ones.

    Raises TrainingDiverged when a loss is not finite.
    """
    fit_closed_form(run, latents)
    code = LatentCode.fit(latents)
    conditioning = Conditioning.fit(latents.conditions)
    shape = tuple(latents.means.shape[1:])
    torch.manual_seed(cfg.seed)
    network = build_velocity(cfg.prior, shape, len(latents.names), fit_wiener(cfg.prior, code, latents))
    figures = train_flow(run, cfg, network, Data(latents, held_out, flow_batches(cfg, code, conditioning)))
    tensors = {f"flow.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"code.{key}": value for key, value in code.tensors.items()}
    tensors |= {"conditions.mean": conditioning.mean, "conditions.std": conditioning.std, **latents.known()}
    save(run.folder / "prior-flow.safetensors", tensors, {"latent_shape": shape, "conditions": latents.names, **figures})
    run.finish_stage("prior", **figures)
    run.checkpoints("flow").clear()


def fit_closed_form(run: Run, latents: LatentSet) -> None:
    """The priors that need no training loop: normal, gaussian, mixture."""
    first = [latents.groups.index(group) for group in dict.fromkeys(latents.groups)]  # one encoding per group
    means = latents.means[first].float().numpy()
    variances = latents.logvars[first].float().exp().numpy()
    for name, kind in priors.CLOSED_FORM.items():
        path = run.folder / f"prior-{name}.safetensors"
        if not path.exists():
            fitted = kind.fit(means, variances)
            tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in fitted.tensors().items()}
            save(path, {**tensors, **latents.known()}, {"latent_shape": means.shape[1:], "conditions": latents.names})


BatchMaker = Callable[[LatentSet, int], Batch]


@dataclass(frozen=True)
class Data:
    training: LatentSet
    held_out: LatentSet | None
    batches: BatchMaker


def flow_batches(cfg: Config, code: LatentCode, conditioning: Conditioning) -> BatchMaker:
    """How the flow's batches are made: (latents, step) -> Batch."""

    def make(latents: LatentSet, step: int) -> Batch:
        random = generator(cfg.seed, step, stream=3)
        z, known = latents.batch(cfg.prior.batch, cfg.seed, step)
        told = conditioning.standard(known)
        hidden = torch.rand(len(told), 1, generator=random) < cfg.prior.null_probability
        return Batch(code.encode(z), told.masked_fill(hidden, math.nan))

    return make


def train_flow(run: Run, cfg: Config, network: nn.Module, data: Data) -> dict[str, float]:
    """Fit the velocity network, leaving its averaged weights in it; returns its figures."""
    settings = cfg.prior
    fabric = make_fabric(settings.precision)
    place(network, fabric.device)
    ema = EMA(network, settings.ema_decay)
    optimizer = build_optimizer(network, settings)
    checkpoints = run.checkpoints("flow")
    meta = checkpoints.resume(network, ema, optimizer)
    start = int(meta["step"])
    clock = Clock(settings, settings.steps, settings.minutes, meta.get("seconds", 0.0))
    curve = Curve(run, "flow", start)
    objective, fabric_optimizer = fabric.setup(FlowObjective(network), optimizer)
    window = torch.zeros((), device=fabric.device)
    step, logged, held_out = start, start, math.nan

    def keep() -> None:
        checkpoints.save(step, network, ema, optimizer, {"seconds": clock.seconds})

    with Progress("prior: flow", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            if step > logged and (last or step % settings.log_every == 0):
                mean = (window / (step - logged)).item()
                if not math.isfinite(mean):
                    raise TrainingDiverged(
                        f"{run.folder}: flow loss is {mean} by step {step}; train again with another --out and "
                        f"--set prior.lr={settings.lr / 3:.2g}"
                    )
                curve.log(step, {"loss": mean, "held_out": held_out, "lr": optimizer.param_groups[0]["lr"]})
                bar.update(step, loss=mean, seconds_left=clock.seconds_left(step, start))
                window.zero_()
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                keep()
                held_out = held_out_loss(network, ema, data, settings.precision)
            if last:
                break

            # One optimisation step of `accumulate` batches. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            fabric_optimizer.zero_grad(set_to_none=True)
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                batch = to_device(data.batches(data.training, part), fabric.device)
                loss = objective(batch, generator(cfg.seed, part)).mean() / settings.accumulate
                fabric.backward(loss)
                window += loss.detach()
            nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
            fabric_optimizer.step()
            ema.update(network, step)
            step += 1

    curve.close()
    network.load_state_dict(ema.weights)
    return {"flow_steps": step, "flow_seconds": round(clock.seconds), "flow_loss": round(mean_or_nan(held_out), 4)}


def mean_or_nan(value: float) -> float:
    return value if math.isfinite(value) else -1.0


@torch.no_grad()
def held_out_loss(network: nn.Module, ema: EMA, data: Data, precision: str) -> float:
    """Loss of the averaged weights on held-out groups, always with the same noise and times; NaN without any."""
    if data.held_out is None:
        return math.nan
    device = next(network.parameters()).device
    total = 0.0
    with ema.applied_to(network), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for step in range(HELD_OUT_BATCHES):
            batch = to_device(data.batches(data.held_out, step), device)
            total += FlowObjective(network)(batch, generator(1, step)).mean().item()
    return total / HELD_OUT_BATCHES


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.x1.to(device), batch.conditions.to(device))


@torch.no_grad()
def encode_groups(
    network: Autoencoder, groups: TrainingGroups, encodings: int, seed: int, precision: str = "bf16"
) -> LatentSet:
    """Posterior moments of every group, `encodings` times each under the training augmentation (the first without)."""
    means, logvars, told, lengths, ids = [], [], [], [], []
    device = next(network.parameters()).device
    with Progress("encoding", total=len(groups) * encodings) as bar:
        for index, group in enumerate(groups.groups):
            for number in range(encodings):
                random = generator(seed, index * encodings + number, stream=5)
                x = groups.augmented(index, random) if number else groups.plain(index)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    mean, logvar = network.encode(x[None].to(device))
                means.append(mean[0].half().cpu())
                logvars.append(logvar[0].half().cpu())
                told.append(of_group(group))
                lengths.append(scan_mm(group))
                ids.append(group.id)
                bar.update(len(ids))
    numbers, scans_mm = torch.tensor(told, dtype=torch.float32), torch.tensor(lengths, dtype=torch.float32)
    return LatentSet(torch.stack(means), torch.stack(logvars), numbers, ids, BUILT_IN, scans_mm)
