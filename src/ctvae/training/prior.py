"""Stage 2: the priors over the trained autoencoder's latents. The flow's loop stands here; the others are fitted in closed form.

Shapes:  B batch   Z latent channels   d h w coarse latent voxels   K conditions
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
from ctvae.config import Config, Prior
from ctvae.device import generator, make_fabric, place
from ctvae.errors import TrainingDiverged
from ctvae.latents import LatentCode, LatentSet
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.velocity import DetailNet, UNet, VectorNet
from ctvae.progress import Progress
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.groups import CONDITIONS, TrainingGroups, conditions
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer

HELD_OUT_BATCHES = 4
LEAST_SPREAD = 0.01  # of a condition that (nearly) all scans share: no other value may come out huge
COARSE_NOISE = 0.1  # standard deviations added to the coarse latents that the detail flow is given, so that it forgives


@dataclass(frozen=True)
class Conditioning:
    """Conditions standardised over the training set; withheld ones are NaN."""

    mean: Tensor  # [K]
    std: Tensor  # [K]

    @classmethod
    def fit(cls, values: Tensor) -> Conditioning:
        return cls(values.mean(0), values.std(0, correction=0).clamp_min(LEAST_SPREAD))

    def standard(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class Batch(NamedTuple):
    """What one flow step needs."""

    x1: Tensor  # [B C ...] data
    conditions: Tensor  # [B K] standardised, NaN where withheld
    given: tuple[Tensor, ...] = ()  # further inputs of the network


class FlowObjective(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, random: torch.Generator) -> Tensor:
        """Flow matching loss per sample [B]."""
        x1 = batch.x1
        x0 = torch.randn(x1.shape, generator=random).to(x1.device)
        t = flow.logit_normal_times(len(x1), random).to(x1.device)
        return flow.matching_loss(lambda x, t: self.network(x, t, batch.conditions, *batch.given).float(), x0, x1, t)


def build_velocities(cfg: Prior, code: LatentCode, latent_shape: tuple[int, ...], known: int) -> dict[str, nn.Module]:
    """The flow's networks by name, in the order in which they are trained and sampled."""
    if code.steps is None:
        return {"vector": VectorNet(math.prod(latent_shape), known, cfg.mlp_width, blocks=4)}
    channels = latent_shape[0]
    if code.joint:
        return {"joint": UNet(channels * math.prod(code.steps), known, cfg.widths, cfg.blocks)}
    detail = channels * (math.prod(code.steps) - 1)
    return {
        "coarse": UNet(channels, known, cfg.widths, cfg.blocks),
        "detail": DetailNet(detail, channels, known, cfg.detail_width, cfg.detail_blocks),
    }


def train_prior(run: Run, cfg: Config, latents: LatentSet, held_out: LatentSet | None) -> None:
    """Fit every prior to `latents`; resumes from `run`. Writes run/prior-flow.safetensors and the fitted ones.

    Raises TrainingDiverged when a loss is not finite.
    """
    fit_closed_form(run, latents)
    code = LatentCode.fit(latents, joint=cfg.prior.design == "joint")
    conditioning = Conditioning.fit(latents.conditions)
    shape = tuple(latents.means.shape[1:])
    torch.manual_seed(cfg.seed)
    networks = build_velocities(cfg.prior, code, shape, len(CONDITIONS))
    shares = {"vector": 1.0, "joint": 1.0, "coarse": 1 - cfg.prior.detail_share, "detail": cfg.prior.detail_share}
    figures: dict[str, float] = {}
    for name, network in networks.items():
        batches = flow_batches(name, cfg, code, conditioning)
        figures |= train_flow(run, cfg, name, network, Data(latents, held_out, batches), shares[name])
    tensors = {f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    tensors |= {f"code.{key}": value for key, value in code.tensors.items()}
    tensors |= {"conditions.mean": conditioning.mean, "conditions.std": conditioning.std, "conditions.known": latents.conditions}
    save(run.folder / "prior-flow.safetensors", tensors, {"latent_shape": shape, "conditions": CONDITIONS, **figures})
    run.finish_stage("prior", **figures)
    for name in networks:
        run.checkpoints(name).clear()


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
            tensors["conditions.known"] = latents.conditions
            save(path, tensors, {"latent_shape": means.shape[1:]})


BatchMaker = Callable[[LatentSet, int], Batch]


@dataclass(frozen=True)
class Data:
    training: LatentSet
    held_out: LatentSet | None
    batches: BatchMaker


def flow_batches(name: str, cfg: Config, code: LatentCode, conditioning: Conditioning) -> BatchMaker:
    """How batches are made for one of the flow's networks: (latents, step) -> Batch."""

    def make(latents: LatentSet, step: int) -> Batch:
        random = generator(cfg.seed, step, stream=3)
        z, known = latents.batch(cfg.prior.batch, cfg.seed, step)
        coarse, detail = code.encode(z)
        told = conditioning.standard(known)
        hidden = torch.rand(len(told), 1, generator=random) < cfg.prior.null_probability
        told = told.masked_fill(hidden, math.nan)
        if name != "detail":
            return Batch(coarse, told)
        assert detail is not None
        given = coarse + COARSE_NOISE * torch.randn(coarse.shape, generator=random)
        return Batch(detail, told, (given,))

    return make


def train_flow(run: Run, cfg: Config, name: str, network: nn.Module, data: Data, share: float) -> dict[str, float]:
    """Fit one velocity network, leaving its averaged weights in it; returns its figures."""
    settings = cfg.prior
    fabric = make_fabric(settings.precision)
    place(network, fabric.device)
    ema = EMA(network, settings.ema_decay)
    optimizer = build_optimizer(network, settings)
    checkpoints = run.checkpoints(name)
    meta = checkpoints.resume(network, ema, optimizer)
    start = int(meta["step"])
    steps = max(1, round(settings.steps * share))
    clock = Clock(settings, steps, settings.minutes and settings.minutes * share, meta.get("seconds", 0.0))
    curve = Curve(run, name, start)
    objective, fabric_optimizer = fabric.setup(FlowObjective(network), optimizer)
    window = torch.zeros((), device=fabric.device)
    step, logged, held_out = start, start, math.nan

    def keep() -> None:
        checkpoints.save(step, network, ema, optimizer, {"seconds": clock.seconds})

    with Progress(f"prior: {name}", total=steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            if step > logged and (last or step % settings.log_every == 0):
                mean = (window / (step - logged)).item()
                if not math.isfinite(mean):
                    raise TrainingDiverged(
                        f"{run.folder}: {name} loss is {mean} by step {step}; train again with another --out and "
                        f"--set prior.lr={settings.lr / 3:.2g}"
                    )
                curve.log(step, {"loss": mean, "held_out": held_out, "lr": optimizer.param_groups[0]["lr"]})
                bar.update(step, loss=mean, seconds_left=clock.seconds_left(step, start))
                window.zero_()
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                keep()
                held_out = held_out_loss(network, ema, data)
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
    return {f"{name}_steps": step, f"{name}_seconds": round(clock.seconds), f"{name}_loss": round(mean_or_nan(held_out), 4)}


def mean_or_nan(value: float) -> float:
    return value if math.isfinite(value) else -1.0


@torch.no_grad()
def held_out_loss(network: nn.Module, ema: EMA, data: Data) -> float:
    """Loss of the averaged weights on held-out groups, always with the same noise and times; NaN without any."""
    if data.held_out is None:
        return math.nan
    device = next(network.parameters()).device
    total = 0.0
    with ema.applied_to(network), torch.autocast(device.type, torch.bfloat16):
        for step in range(HELD_OUT_BATCHES):
            batch = to_device(data.batches(data.held_out, step), device)
            total += FlowObjective(network)(batch, generator(1, step)).mean().item()
    return total / HELD_OUT_BATCHES


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.x1.to(device), batch.conditions.to(device), tuple(given.to(device) for given in batch.given))


@torch.no_grad()
def encode_groups(
    network: Autoencoder, groups: TrainingGroups, encodings: int, seed: int, precision: str = "bf16"
) -> LatentSet:
    """Posterior moments of every group, `encodings` times each under the training augmentation (the first without)."""
    means, logvars, told, ids = [], [], [], []
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
                told.append(conditions(group))
                ids.append(group.id)
                bar.update(len(ids))
    return LatentSet(torch.stack(means), torch.stack(logvars), torch.tensor(told, dtype=torch.float32), ids)
