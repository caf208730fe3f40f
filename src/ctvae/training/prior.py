"""Stage 2: the priors over the trained autoencoder's latents. The flow's loop stands here; the others are fitted in closed form.

Shapes:  B batch   Z latent channels   d h w latent voxels   K conditions
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctvae import flow, priors
from ctvae.checkpoint import EMA, Best, save
from ctvae.config import Config, Prior
from ctvae.device import autocast, generator, make_fabric, place
from ctvae.latents import LatentCode, LatentSet
from ctvae.models.velocity import Detail, UNet, VectorNet, Velocity
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.runlog import Clock, Curve, Run
from ctvae.sharding import gathered, whole
from ctvae.training import averages
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer
from ctvae.training.start import load_flow
from ctvae.training.tally import Tally
from ctvae.training.watch import FEWEST_HELD_OUT, MOST_COPIES, Seen, Watch
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

    mean: Tensor  # [B C ...] of the posteriors
    std: Tensor  # like mean
    conditions: Tensor  # [B K] standardised, NaN where withheld


class FlowObjective(nn.Module):
    def __init__(self, network: nn.Module, cfg: Prior, ranks: Ranks = ALONE):
        super().__init__()
        self.network, self.ranks = network, ranks
        self.times = partial(flow.logit_normal_times, shift=cfg.time_shift, spread=cfg.time_spread)

    def forward(self, batch: Batch, random: torch.Generator) -> Tensor:
        """Flow matching loss per sample [B]."""
        mean, std, whole = batch.mean, batch.std, len(batch.mean) * self.ranks.world
        x0, e = (self.ranks.normal(mean.shape, random).to(mean.device) for _ in range(2))
        t = self.times(whole, random)[self.ranks.rows(whole)].to(mean.device)
        return flow.matching_loss(lambda x, t: self.network(x, t, batch.conditions), x0, mean + std * e, t, mean, std)


def build_velocity(cfg: Prior, latent_shape: tuple[int, ...], known: int, wiener: WienerVelocity) -> Velocity:
    """The flow's network for latents of `latent_shape`, [Z d h w] or [N Z], told `known` conditions."""
    if len(latent_shape) == 4:
        detail = Detail(latent_shape[0], known, cfg.detail_width, cfg.detail_blocks) if cfg.detail_width else None
        return Velocity(UNet(latent_shape[0], known, cfg.widths, cfg.blocks, cfg.fold), wiener, detail)
    return Velocity(VectorNet(math.prod(latent_shape), known, cfg.mlp_width, blocks=4), wiener)


def fit_wiener(cfg: Prior, code: LatentCode, latents: LatentSet) -> WienerVelocity:
    """The Wiener velocity of the training latents, posterior variance included; of very many, of some of them."""
    few = latents.for_fitting()
    rows = code.encode(few.means[:].float()).flatten(1)  # [n P]
    scale = code.scaled(torch.ones(1, *few.shape)).flatten()
    noise = few.logvars[:].float().exp().mean(0).flatten() * scale.square()
    return WienerVelocity.fit(rows, noise, cfg.rank)


def fit_code(latents: LatentSet, ranks: Ranks) -> LatentCode:
    """Over all rows, which one process reads for all."""
    told = ranks.told(lambda: {name: tensor.tolist() for name, tensor in LatentCode.fit(latents).tensors.items()})
    return LatentCode({name: torch.tensor(numbers) for name, numbers in told.items()})


def train_prior(run: Run, cfg: Config, latents: LatentSet, held_out: LatentSet | None, ranks: Ranks = ALONE) -> None:
    """Fit every prior to `latents`; resumes from `run`. Writes run/prior-flow.safetensors and the fitted ones.

    Raises TrainingDiverged when loss or gradient stay other than finite.
    """
    if ranks.first:
        fit_closed_form(run, latents.plain())
    code = fit_code(latents, ranks)
    conditioning = Conditioning.fit(latents.conditions)
    shape = latents.shape
    torch.manual_seed(cfg.seed)
    wiener = fit_wiener(cfg.prior, code, latents)
    network = build_velocity(cfg.prior, shape, len(latents.names), wiener)
    load_flow(run, network, latents.names)
    watch = None
    if held_out is not None and len(held_out) >= FEWEST_HELD_OUT and cfg.prior.looks:
        watch = Watch(code, wiener, latents, held_out, conditioning.standard(held_out.conditions), cfg.seed)
    data = Data(latents, held_out, flow_batches(cfg, code, conditioning, ranks), watch)
    figures = train_flow(run, cfg, network, data, ranks)
    tensors = {f"flow.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"code.{key}": value for key, value in code.tensors.items()}
    tensors |= {"conditions.mean": conditioning.mean, "conditions.std": conditioning.std, **latents.plain().known()}
    save(run.folder / "prior-flow.safetensors", tensors, {"latent_shape": shape, "conditions": latents.names, **figures})
    run.finish_stage("prior", **figures)
    run.checkpoints("flow").clear()


def fit_closed_form(run: Run, latents: LatentSet) -> None:
    """The priors that need no training loop: normal, gaussian, mixture. `latents` holds one encoding per group."""
    paths = {name: run.folder / f"prior-{name}.safetensors" for name in priors.CLOSED_FORM}
    if all(path.exists() for path in paths.values()):
        return
    few = latents.for_fitting()
    means, variances = few.means[:].float().numpy(), few.logvars[:].float().exp().numpy()
    for name, kind in priors.CLOSED_FORM.items():
        path = paths[name]
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
    watch: Watch | None = None


def flow_batches(cfg: Config, code: LatentCode, conditioning: Conditioning, ranks: Ranks = ALONE) -> BatchMaker:
    """How the flow's batches are made: (latents, step) -> Batch, of which each process gets its rows."""
    rows = ranks.rows(cfg.prior.batch)

    def make(latents: LatentSet, step: int) -> Batch:
        random = generator(cfg.seed, step, stream=3)
        mean, std, known = latents.batch(cfg.prior.batch, cfg.seed, step, rows)
        told = conditioning.standard(known)
        hidden = torch.rand(len(told), 1, generator=random) < cfg.prior.null_probability
        return Batch(code.encode(mean), code.scaled(std), told.masked_fill(hidden, math.nan)[rows])

    return make


def train_flow(run: Run, cfg: Config, network: nn.Module, data: Data, ranks: Ranks = ALONE) -> dict[str, float]:
    """Fit the velocity network, leaving its averaged weights in it; returns its figures.

    At `looks` moments samples are judged (`watch.py`). Training ends before its time when they have got clearly worse
    `patience` times in a row, and the weights that are left are the last ones that were not.

    With `shard` the network is cut up over the processes (`sharding.py`) and stays so: all of them take part in what it does.
    """
    settings = cfg.prior
    fabric = make_fabric(settings.precision, ranks, settings.shard)
    place(network, fabric.device, channels_last=not settings.shard)  # FSDP takes weights in plain order alone
    objective = fabric.setup_module(FlowObjective(network, settings, ranks))
    ema = EMA(network, settings.ema_decay)
    optimizer = build_optimizer(network, settings)
    checkpoints = run.checkpoints("flow")
    meta = checkpoints.resume(network, ema, optimizer)
    start = ranks.agreed(int(meta["step"]))
    clock = Clock(settings, settings.steps, settings.minutes, meta.get("seconds", 0.0), ranks)
    curve = Curve(run, "flow", start)
    fabric_optimizer: Any = fabric.setup_optimizers(optimizer)
    tally = Tally(settings, ranks, meta)
    step, logged, held_out = start, start, math.nan
    best = Best(run.folder / "checkpoints" / "flow-best.safetensors", data.watch.spread if data.watch else 0.0)
    looked, seen = math.floor(clock.progress(start) * settings.looks), Seen()
    worse = ranks.told(partial(worse_for, best, looked))  # of a run that was killed right after its last look, too

    moments = averages.Moments(run.folder / "averages", settings.save_every)
    choosing = settings.choose_average and data.held_out is not None and not settings.shard

    def keep() -> None:
        if choosing:
            moments.keep(step, ema.weights)
        checkpoints.save(step, network, ema, optimizer, {"seconds": clock.seconds, "skipped_steps": tally.skipped})

    saved_alone = None if settings.shard else keep
    with Progress("prior: flow", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, saved_alone):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0 or worse >= settings.patience

            # Report and save before the update, so that a resumed run repeats nothing.
            tally.check(step, run.folder, checkpoints, f"prior.lr={settings.lr / 3:.2g}")
            if step > logged and (last or step % settings.log_every == 0):
                mean = tally.means()["loss"]
                facts = {"held_out": held_out, "held_out_distance": seen.distance, "copies": seen.copies}
                rest = {"lr": optimizer.param_groups[0]["lr"], "skipped_steps": tally.skipped}
                curve.log(step, {"loss": mean, **facts, **rest})
                bar.update(step, loss=mean, seconds_left=clock.seconds_left(step, start))
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                if data.watch and math.floor(progress * settings.looks) > looked:
                    looked = math.floor(progress * settings.looks)
                    seen = look(data.watch, network, ema, settings, ranks)
                    best.offer(-seen.distance, gathered(ema.weights), {"look": looked, "step": step, **seen._asdict()})
                    worse = ranks.told(partial(worse_for, best, looked))
                    last |= worse >= settings.patience
                if not tally.in_a_row:  # or these weights may be why
                    keep()
                held_out = held_out_loss(network, ema, data, settings, ranks)
            if last:
                break

            # One optimisation step of `accumulate` batches. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            fabric_optimizer.zero_grad(set_to_none=True)
            loss_of_step = torch.zeros((), device=fabric.device)
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                batch = to_device(data.batches(data.training, part), fabric.device)
                loss = objective(batch, generator(cfg.seed, part)).mean() / settings.accumulate
                fabric.backward(loss)
                loss_of_step += loss.detach()
            norm = whole(nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm))
            if tally.take({"loss": loss_of_step}, norm):
                fabric_optimizer.step()
                ema.update(network, step)
            step += 1

    curve.close()
    chosen: dict[str, float] = {}
    if choosing and ranks.told(lambda: best.meta().get("step", step)) == step:  # no earlier weights were better
        optimizer.zero_grad(set_to_none=True)
        chosen = choose_average(moments, step, network, ema, data, settings, ranks)
    if chosen.get("average"):
        kept = best.meta() if ranks.first else {}
        network.load_state_dict(ema.weights)
    else:
        kept = best.load_into(network, otherwise=ema.weights) if ranks.first or settings.shard else {}
    if settings.shard:
        ranks.agreed(int(kept.get("step", step)))  # the same weights, and all have read them
    best.clear()
    moments.clear()
    figures = {"flow_steps": step, "flow_seconds": round(clock.seconds), "flow_loss": round(mean_or_nan(held_out), 4)}
    figures |= chosen
    if kept:
        figures |= {"best_step": kept["step"], **{name: round(kept[name], 4) for name in Seen._fields}}
    return {**figures, "skipped_steps": tally.skipped}


def mean_or_nan(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def look(watch: Watch, network: nn.Module, ema: EMA, settings: Prior, ranks: Ranks) -> Seen:
    """At samples of the averaged weights; of several processes the first one does, or all at a sharded network's."""

    def seen_here() -> Seen:
        with ema.applied_to(network):
            return watch.look(network, settings.precision)

    together = seen_here() if settings.shard else None

    def first() -> list[float]:
        seen = together or seen_here()
        if seen.copies > MOST_COPIES:
            print(
                f"warning: {seen.copies:.0%} of the samples come nearer to a training scan than held-out scans do: the "
                "flow begins to learn scans by heart. More scans, more prior.encodings or a shorter training help",
                file=sys.stderr,
            )
        return list(seen)

    return Seen(*ranks.told(first))


def choose_average(
    moments: averages.Moments, step: int, network: nn.Module, ema: EMA, data: Data, cfg: Prior, ranks: Ranks
) -> dict[str, float]:
    """Gives `ema` the average over the whole training that has the least held-out loss, if any is better; returns its length."""
    ranks.barrier()  # the first process has written all
    losses = {0.0: held_out_loss(network, ema, data, cfg, ranks)}
    if not moments.kept(step - 1):
        return {}
    own = {name: value.clone() for name, value in ema.weights.items()}
    for length in averages.LENGTHS:
        ema.take(moments.average(step, own, length))
        losses[length] = held_out_loss(network, ema, data, cfg, ranks)
    length = min(losses, key=lambda length: losses[length])
    ema.take(moments.average(step, own, length) if length else own)
    return {"average": length, "average_loss": round(losses[length], 4), "unaveraged_loss": round(losses[0.0], 4)}


def worse_for(best: Best, looked: int) -> int:
    """Looks in a row, up to number `looked`, that were clearly worse than the best."""
    return looked - int(best.meta().get("look", looked))


@torch.no_grad()
def held_out_loss(network: nn.Module, ema: EMA, data: Data, cfg: Prior, ranks: Ranks = ALONE) -> float:
    """Loss of the averaged weights on held-out groups, always with the same noise and times; NaN without any."""
    if data.held_out is None:
        return math.nan
    device = next(network.parameters()).device
    total = 0.0
    with ema.applied_to(network), autocast(cfg.precision, device):
        for step in range(HELD_OUT_BATCHES):
            batch = to_device(data.batches(data.held_out, step), device)
            total += ranks.mean(FlowObjective(network, cfg, ranks)(batch, generator(1, step)).mean()).item()
    return total / HELD_OUT_BATCHES


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
