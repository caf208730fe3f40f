"""Stage 1c: what the decoder leaves out is learned as a distribution (`models/detail.py`). Encoder and decoder stay as they are.

Two networks learn side by side: one guesses mean and spread of what is missing at each place, from what the decoder drew; the
flow learns what is left once these are taken off, so nothing of its gradient reaches the guess. What the decoder draws is
computed once, for whole groups (`training/decoded.py`).

Shapes:  B batch   D H W voxels   b d h w Haar bands at half the resolution
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctvae import flow, haar, losses, pictures
from ctvae.checkpoint import EMA, file_hash, save
from ctvae.config import Config
from ctvae.detail import DetailDrawer
from ctvae.device import generator, make_fabric, place
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.detail import DetailNetwork, told
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks, is_first
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.autoencoder import VALIDATION_GROUPS, load_autoencoder
from ctvae.training.decoded import DecodedGroups
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer
from ctvae.training.start import DETAIL, load_network
from ctvae.training.tally import Tally

BETA = 0.5


class HeldOutDetail(NamedTuple):
    """Reconstructions of held-out groups: decoded, with the guessed mean, with drawn detail; NaN without any groups."""

    decoded_psnr_db: float = math.nan
    mean_psnr_db: float = math.nan
    drawn_psnr_db: float = math.nan
    decoded_gap_db: float = math.nan
    drawn_gap_db: float = math.nan


class DetailObjective(nn.Module):
    """Both networks' losses in one forward call."""

    def __init__(self, network: DetailNetwork, ranks: Ranks = ALONE):
        super().__init__()
        self.network, self.ranks = network, ranks

    def forward(self, x: Tensor, y: Tensor, random: torch.Generator) -> dict[str, Tensor]:  # [B 1 D H W] each
        x, y = even(x), even(y)
        bands, mean, log_std = self.network.condition(y)
        missing = haar.forward(x) - bands
        nll = gaussian_nll(missing, mean, log_std)
        mean, log_std = mean.detach(), log_std.detach()
        u1 = (missing - mean) * torch.exp(-log_std)  # [B b d h w]
        u0 = self.ranks.normal(u1.shape, random).to(u1.device)
        count = len(u1) * self.ranks.world
        t = flow.logit_normal_times(count, random)[self.ranks.rows(count)].to(u1.device)
        context = told(bands, mean, log_std)
        matching = flow.matching_loss(
            lambda u, t: self.network.velocity(u, t, context), u0, u1, t, mean=u1, std=torch.zeros_like(u1)
        )
        return {"nll": nll, "flow": matching.mean()}


def even(x: Tensor) -> Tensor:
    """[B 1 D H W] without an odd last plane, for a Haar step."""
    d, h, w = (size // 2 * 2 for size in x.shape[2:])
    return x[..., :d, :h, :w]


def gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Negative log likelihood under N(mean, std^2), each number weighted by std^(2 BETA), which is not learned from.

    Without weights, places where nearly nothing is missing would decide everything (Seitzer et al. 2022).
    """
    off = (x - mean) * torch.exp(-log_std)
    return ((0.5 * off.square() + log_std) * torch.exp(2 * BETA * log_std).detach()).mean()


def train_detail(
    run: Run, cfg: Config, training: TrainingGroups, validation: TrainingGroups, ranks: Ranks = ALONE
) -> None:
    """Fit the detail networks to the trained autoencoder; resumes from `run`. Writes run/detail.safetensors at the end.

    Raises TrainingDiverged when loss or gradient stay other than finite.
    """
    settings = cfg.detail
    fabric = make_fabric(settings.precision, ranks)
    torch.manual_seed(cfg.seed + 2)
    autoencoder, _ = load_autoencoder(run, cfg)
    place(autoencoder.eval().requires_grad_(False), fabric.device)
    pairs = DecodedGroups(training, run.folder / "decoded", cfg)
    pairs.decode(autoencoder, file_hash(run.folder / "autoencoder.safetensors"))
    network = DetailNetwork(settings)
    load_network(run, network, DETAIL)
    place(network, fabric.device)
    ema = EMA(network, settings.ema_decay)
    optimizer = build_optimizer(network, settings)
    checkpoints = run.checkpoints("detail")
    meta = checkpoints.resume(network, ema, optimizer)
    start = ranks.agreed(int(meta["step"]))
    clock = Clock(settings, settings.steps, settings.minutes, meta.get("seconds", 0.0), ranks)
    curve = Curve(run, "detail", start)
    objective, fabric_optimizer = fabric.setup(DetailObjective(network, ranks), optimizer)
    tally = Tally(settings, ranks, meta)
    step, logged, held_out = start, start, HeldOutDetail()

    def keep() -> None:
        checkpoints.save(step, network, ema, optimizer, {"seconds": clock.seconds, "skipped_steps": tally.skipped})

    with Progress("detail", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            tally.check(step, run.folder, checkpoints, f"detail.lr={settings.lr / 3:.2g}")
            if step > logged and (last or step % settings.log_every == 0):
                means = tally.means()
                held = {f"held_out_{name}": value for name, value in held_out._asdict().items()}
                facts = {"lr": optimizer.param_groups[0]["lr"], **held, "skipped_steps": tally.skipped}
                curve.log(step, {"loss": sum(means.values()), **means, **facts})
                bar.update(step, loss=means["flow"], seconds_left=clock.seconds_left(step, start))
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                if not tally.in_a_row:  # or these weights may be why
                    keep()
                with ema.applied_to(network):
                    held_out = validate_detail(autoencoder, network, validation, run, cfg)
            if last:
                break

            # One optimisation step of `accumulate` batches. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            fabric_optimizer.zero_grad(set_to_none=True)
            losses_of_step: dict[str, Tensor] = {}
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                x, y = (fabric.to_device(v) for v in pairs.batch(settings.batch, cfg.seed + 2, part))  # [B 1 D H W] each
                terms = objective(x, y, generator(cfg.seed + 2, part))
                fabric.backward(sum(terms.values()) / settings.accumulate)
                for name, value in terms.items():
                    losses_of_step[name] = losses_of_step.get(name, 0.0) + value.detach().float() / settings.accumulate
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
            if tally.take(losses_of_step, norm):
                fabric_optimizer.step()
                ema.update(network, step)
            step += 1

    curve.close()
    figures = {f"validation_{name}": round(value, 3) for name, value in held_out._asdict().items() if math.isfinite(value)}
    save(run.folder / DETAIL, ema.weights, {"steps": step, "seconds": round(clock.seconds), **figures})
    run.finish_stage("detail", steps=step, seconds=round(clock.seconds), skipped_steps=tally.skipped, **figures)
    checkpoints.clear()
    pairs.clear()


@torch.no_grad()
def validate_detail(
    autoencoder: Autoencoder, network: DetailNetwork, groups: TrainingGroups, run: Run, cfg: Config
) -> HeldOutDetail:
    """Means over a few held-out groups, which are pictured with their reconstructions. PSNR is over -1..1.

    Of several processes the first does it.
    """
    if not is_first():
        return HeldOutDetail()
    rows, figures = [], []
    device = next(network.parameters()).device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.detail.precision == "bf16")
    drawer = DetailDrawer(network, cfg.detail, autocast)
    for index in range(min(VALIDATION_GROUPS, len(groups))):
        x = groups.plain(index)[None]
        with autocast():
            y = autoencoder.decode(autoencoder.encode(x.to(device))[0]).float().cpu()
        with_mean, drawn = drawer.mean(y).clamp(-1, 1), drawer.drawn(y, generator(1, index, stream=23)).clamp(-1, 1)
        y = y.clamp(-1, 1)
        psnrs = [psnr_db(x, other) for other in (y, with_mean, drawn)]
        figures.append([*psnrs, *(losses.detail_gap_db(x, other) for other in (y, drawn))])
        for name, volume in (("held out", x), ("decoded", y), ("with detail", drawn)):
            rows.append((name, groups.as_volume(index, volume[0, 0])))
    if not rows:
        return HeldOutDetail()
    pictures.preview(rows, run.folder / "previews" / "detail.png", cfg.data.window_hu)
    return HeldOutDetail(*(sum(column) / len(column) for column in zip(*figures, strict=True)))


def psnr_db(x: Tensor, y: Tensor) -> float:
    """Of y against x, both in -1..1."""
    return 10 * math.log10(4.0 / max(1e-12, (y - x).square().mean().item()))


