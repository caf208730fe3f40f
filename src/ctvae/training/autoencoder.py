"""Stage 1: the autoencoder. The whole loop stands here.

Shapes:  B batch   D H W voxels   latents [B ...] as the method makes them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctvae import losses
from ctvae.calibration import FILE as CALIBRATION
from ctvae.checkpoint import EMA, load, save
from ctvae.config import AutoencoderTraining, Config
from ctvae.device import autocast, generator, make_fabric, place
from ctvae.models import build
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.recompute import summed_by_slabs
from ctvae.networks import Size3
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks, is_first
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer
from ctvae.training.start import load_network
from ctvae.training.tally import Tally

VALIDATION_GROUPS = 4


class HeldOut(NamedTuple):
    """Reconstructions of held-out groups: nearness to them, and how far they are from being as sharp; NaN without any."""

    psnr_db: float = math.nan
    detail_gap_db: float = math.nan


class Reconstruction:
    """The terms that hold the decoded volume y to the original x, both [B 1 D H W] in -1..1."""

    def __init__(self, cfg: AutoencoderTraining, window_hu: tuple[float, float]):
        self.cfg = cfg
        low, high = window_hu
        soft = [2 * (hu - low) / (high - low) - 1 for hu in losses.SOFT_TISSUE_HU]
        self.soft = (max(-1.0, soft[0]), min(1.0, soft[1]))

    def __call__(self, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        return summed_by_slabs(partial(self._of_slab, depth=y.shape[2]), y, x)

    def _of_slab(self, y: Tensor, x: Tensor, own: int, depth: int) -> dict[str, Tensor]:
        """What a slab adds to the terms of a volume of `depth` slices: its first `own` slices, and every step along D in it."""
        cfg, share, steps = self.cfg, own / depth, (y.shape[2] - 1) / max(1, depth - 1)
        along_d = steps * losses.gradient_l1(y, x, (2,)) / 3 if cfg.gradient_weight else None
        y, x = y[:, :, :own], x[:, :, :own]
        error = y - x
        loss = error.square().flatten(1).sum(1).mean() if cfg.reconstruction == "mse_sum" else share * error.abs().mean()
        terms = {"reconstruction": cfg.reconstruction_weight * loss}
        if along_d is not None:
            terms["gradient"] = cfg.gradient_weight * (along_d + share * 2 * losses.gradient_l1(y, x, (3, 4)) / 3)
        if cfg.soft_tissue_weight and self.soft[0] < self.soft[1]:
            terms["soft_tissue"] = cfg.soft_tissue_weight * share * losses.window_l1(y, x, *self.soft)
        return terms


class Objective(nn.Module):
    """The network and its loss in one forward call, so that Fabric can wrap precision and devices around it."""

    def __init__(
        self, network: Autoencoder, cfg: AutoencoderTraining, window_hu: tuple[float, float], ranks: Ranks = ALONE
    ):  # fmt: skip
        super().__init__()
        self.network, self.cfg, self.ranks = network, cfg, ranks
        self.encode: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(network.encode) if cfg.compile else network.encode
        self.decode: Callable[[Tensor], Tensor] = torch.compile(network.decode) if cfg.compile else network.decode
        self.reconstruction = Reconstruction(cfg, window_hu)
        self.kl_weight = cfg.kl_weight

    def warm(self, progress: float) -> None:
        """The KL's weight at `progress` (0 to 1) through the training: all of it at once keeps a young decoder from seeing."""
        share = min(1.0, progress / self.cfg.kl_warmup) if self.cfg.kl_warmup else 1.0
        self.kl_weight = share * self.cfg.kl_weight

    def forward(self, x: Tensor, random: torch.Generator) -> dict[str, Tensor]:  # [B 1 D H W]
        mean, logvar = self.encode(x)
        noise = self.ranks.normal(mean.shape, random).to(mean.device)
        y = self.decode(mean + (0.5 * logvar).exp() * noise)  # [B 1 D H W]
        return {**self.reconstruction(y.float(), x), **self._kl(mean, logvar)}

    def _kl(self, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        kl = losses.kl_to_standard_normal(mean, logvar)
        summed = self.cfg.reconstruction == "mse_sum"
        return {"kl": self.kl_weight * (kl.flatten(1).sum(1).mean() if summed else kl.mean())}


def train_autoencoder(
    run: Run, cfg: Config, training: TrainingGroups, validation: TrainingGroups, ranks: Ranks = ALONE
) -> None:
    """Fit the autoencoder; resumes from `run`. Writes run/autoencoder.safetensors (averaged weights) at the end.

    Raises TrainingDiverged when loss or gradient stay other than finite.
    """
    settings = cfg.autoencoder
    fabric = make_fabric(settings.precision, ranks)
    torch.manual_seed(cfg.seed)
    network = build(cfg.model, training.shape)
    load_network(run, network)
    place(network, fabric.device)
    ema = EMA(network, settings.ema_decay)
    optimizer = build_optimizer(network, settings)
    checkpoints = run.checkpoints("autoencoder")
    meta = checkpoints.resume(network, ema, optimizer)
    start = ranks.agreed(int(meta["step"]))
    clock = Clock(settings, settings.steps, settings.minutes, meta.get("seconds", 0.0), ranks)
    curve = Curve(run, "autoencoder", start)
    goal = Objective(network, settings, cfg.data.window_hu, ranks)
    objective, fabric_optimizer = fabric.setup(goal, optimizer)
    tally = Tally(settings, ranks, meta)
    step, logged, held_out = start, start, HeldOut()
    if start:  # what was seen of held-out groups, which a kill may have come before
        with ema.applied_to(network):
            held_out = validate(network, validation, run, cfg)

    def keep() -> None:
        checkpoints.save(step, network, ema, optimizer, {"seconds": clock.seconds, "skipped_steps": tally.skipped})

    with Progress("autoencoder", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            tally.check(step, run.folder, checkpoints, f"autoencoder.lr={settings.lr / 3:.2g}")
            if step > logged and (last or step % settings.log_every == 0):
                means = tally.means()
                total = sum(means.values())
                held = {f"held_out_{name}": value for name, value in held_out._asdict().items()}
                facts = {"lr": optimizer.param_groups[0]["lr"], **held, "skipped_steps": tally.skipped}
                curve.log(step, {"loss": total, **means, **facts})
                bar.update(step, loss=total, seconds_left=clock.seconds_left(step, start))
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                if not tally.in_a_row:  # or these weights may be why
                    keep()
                with ema.applied_to(network):
                    held_out = validate(network, validation, run, cfg)
            if last:
                break

            # One optimisation step of `accumulate` batches. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            goal.warm(progress)
            fabric_optimizer.zero_grad(set_to_none=True)
            losses_of_step: dict[str, Tensor] = {}
            statistics = [buffer.clone() for buffer in network.buffers()]  # conv3d's BatchNorm keeps some, step by step
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                x = fabric.to_device(training.batch(settings.batch, cfg.seed, part))  # [B 1 D H W]
                terms = objective(x, generator(cfg.seed, part))
                fabric.backward(sum(terms.values()) / settings.accumulate)
                for name, value in terms.items():
                    losses_of_step[name] = losses_of_step.get(name, 0.0) + value.detach().float() / settings.accumulate
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
            if tally.take(losses_of_step, norm):
                fabric_optimizer.step()
                ema.update(network, step)
            else:
                for buffer, before in zip(network.buffers(), statistics, strict=True):
                    buffer.copy_(before)
            step += 1

    curve.close()
    network.load_state_dict(ema.weights)
    figures = {f"validation_{name}": round(value, 3) for name, value in held_out._asdict().items() if math.isfinite(value)}
    save_autoencoder(run, cfg, network, training.shape, {"steps": step, "seconds": clock.seconds, **figures})
    run.finish_stage("autoencoder", steps=step, seconds=round(clock.seconds), skipped_steps=tally.skipped, **figures)
    checkpoints.clear()


def save_autoencoder(run: Run, cfg: Config, network: nn.Module, shape: Size3, figures: dict) -> None:
    """The run's new weights; of its calibration, which is of the decoder before, nothing is left by then."""
    if is_first() and (run.folder / CALIBRATION).exists():
        run.forget_stage("calibration")
        (run.folder / CALIBRATION).unlink()
    meta = {"config": cfg.model_dump(mode="json"), "shape": shape, **figures}
    save(run.folder / "autoencoder.safetensors", network.state_dict(), meta)


def load_autoencoder(run: Run, cfg: Config) -> tuple[Autoencoder, dict]:
    """The averaged weights of the finished stage and what was noted with them. Raises ModelError."""
    assert cfg.data.shape is not None
    tensors, meta = load(run.folder / "autoencoder.safetensors")
    network = build(cfg.model, cfg.data.shape)
    network.load_state_dict(tensors)
    return network, meta


@torch.no_grad()
def validate(network: Autoencoder, groups: TrainingGroups, run: Run, cfg: Config, name: str = "autoencoder") -> HeldOut:
    """Means over a few held-out groups, which are pictured beside their reconstructions. PSNR is over -1..1.

    Of several processes the first does it.
    """
    if not is_first():
        return HeldOut()
    rows, psnrs, gaps = [], [], []
    device = next(network.parameters()).device
    for index in range(min(VALIDATION_GROUPS, len(groups))):
        x = groups.plain(index)[None]
        with autocast(cfg.autoencoder.precision, device):
            y = network.decode(network.encode(x.to(device))[0]).float().cpu().clamp(-1, 1)
        psnrs.append(10 * math.log10(4.0 / max(1e-12, (y - x).square().mean().item())))
        gaps.append(losses.detail_gap_db(x, y))
        rows += [("held out", groups.as_volume(index, x[0, 0])), ("reconstructed", groups.as_volume(index, y[0, 0]))]
    if not rows:
        return HeldOut()
    from ctvae import pictures  # Matplotlib, which plans need not load

    pictures.preview(rows, run.folder / "previews" / f"{name}.png", cfg.data.window_hu)
    return HeldOut(sum(psnrs) / len(psnrs), sum(gaps) / len(gaps))


def noisy_latents(network: Autoencoder, x: Tensor, noise: float, random: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """Posterior samples with further noise, `noise` times each channel's spread over the batch: [B Z d h w]."""
    with torch.no_grad():
        mean, logvar = network.encode(x)
        spread = ranks.gathered(mean).std((0, 2, 3, 4), correction=0, keepdim=True)
        sigma = (logvar.exp() + (noise * spread).square()).sqrt()
        return mean + sigma * ranks.normal(mean.shape, random).to(mean.device)
