"""Stage 1b: the decoder learns to be sharp. The encoder, and with it every latent, stays as it is.

A decoder trained on absolute error draws the median of what a latent may stand for: a blur. Here a patch discriminator
tells its patches from real ones, the decoder is trained against that and on the discriminator's features besides its first
losses (Larsen et al. 2016, Esser et al. 2021), and its latents get a little noise, so that it forgives a prior's errors.

An adversary goes on inventing texture for as long as it is let. What is kept are the averaged weights with the best score on
held-out groups: PSNR in dB, less the gap in the strength of fine detail in dB (`losses.detail_gap_db`). A blur has the first
and not the second; made-up texture loses the first, and in the end both (the two trade: Blau and Michaeli 2018).

Shapes:  B batch   D H W voxels   Z latent channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctvae import losses
from ctvae.checkpoint import EMA, Best
from ctvae.config import Config, Sharpening
from ctvae.device import generator, make_fabric, place
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.models.wavelet3d import Wavelet3DVAE
from ctvae.networks import Size3
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.autoencoder import HeldOut, Reconstruction, load_autoencoder, noisy_latents, save_autoencoder, validate
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.optimizer import build_optimizer
from ctvae.training.perceptual import PerceptualTerm, perceptual_term
from ctvae.training.tally import Tally
from ctvae.training.tone import fit_tone

SQUARES = 0.99  # decay of Adam's second moments


class Pair(nn.Module):
    """What is saved and resumed together."""

    discriminator: PatchDiscriminator

    def __init__(self, decoder: nn.Module, discriminator: PatchDiscriminator):
        super().__init__()
        self.decoder, self.discriminator = decoder, discriminator


class DecoderObjective(nn.Module):
    """The decoder's losses in one forward call, so that Fabric can wrap precision and devices around it."""

    def __init__(
        self, network: Autoencoder, discriminator: PatchDiscriminator, cfg: Config, ranks: Ranks = ALONE,
        perceptual: PerceptualTerm | None = None,
    ):  # fmt: skip
        super().__init__()
        self.network, self.discriminator, self.cfg, self.ranks = network, discriminator, cfg.polish, ranks
        self.perceptual, self.margin = perceptual, cfg.margin_of("polish")
        self.reconstruction = Reconstruction(cfg.autoencoder, cfg.data.window_hu)

    def forward(self, x: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Patches x [B 1 D H W] -> these and the decoded ones, both without their margins, and the loss terms."""
        y = self.network.decode(noisy_latents(self.network, x, self.cfg.latent_noise, random, self.ranks)).float()
        x, y = within(x, self.margin), within(y, self.margin)
        logits, fake = self.discriminator(y)
        with torch.no_grad():
            judged, real = self.discriminator(x)
        terms = {
            "adversarial": self.cfg.adversarial_weight * losses.deceiving(judged.float(), logits.float(), self.cfg.adversarial),
            "features": self.cfg.feature_weight * losses.feature_matching(real, fake, self.ranks.mean).float(),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.cfg.perceptual_weight * self.perceptual(y, x, random)
        return x, y, {**self.reconstruction(y, x), **terms}


def within(x: Tensor, margin: Size3) -> Tensor:
    """x [B 1 D H W] without what lies nearer to its sides.

    There a decoder lacks the latents beyond and draws less detail, which no volume has but at its own sides. In patches of
    32x48x64 three quarters of the voxels are like that, and a decoder that is held to scans there makes up for it elsewhere.
    """
    d, h, w = margin
    return x[..., d : x.shape[2] - d, h : x.shape[3] - h, w : x.shape[4] - w]


class DiscriminatorObjective(nn.Module):
    """The discriminator's loss, with a penalty on its slopes at real and at decoded patches (Huang et al. 2024)."""

    def __init__(self, discriminator: PatchDiscriminator, cfg: Sharpening, ranks: Ranks = ALONE):
        super().__init__()
        self.discriminator, self.cfg, self.ranks = discriminator, cfg, ranks

    def forward(self, real: Tensor, fake: Tensor, random: torch.Generator) -> Tensor:  # [B 1 D H W] and [n B 1 D H W]
        judge = self.discriminator
        judge.observe(real, self.ranks.mean)
        if not self.cfg.slope_penalty:
            return losses.judging(judge(real)[0].float(), judge(fake)[0].float(), self.cfg.adversarial)
        (a, slope), (b, other) = (judge.steepness(x, lambda shape: self.ranks.normal(shape, random)) for x in (real, fake))
        return losses.judging(a, b, self.cfg.adversarial) + self.cfg.slope_penalty / 2 * (slope + other)


def gradient_norm(network: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def build_judge(discriminator: nn.Module, settings: Sharpening) -> torch.optim.Adam:
    return torch.optim.Adam(discriminator.parameters(), lr=settings.discriminator_lr, betas=(settings.momentum, SQUARES))


def build_player(decoder: nn.Module, settings: Sharpening) -> torch.optim.Optimizer:
    """The decoder's. Momentum makes a game of two go round in circles (Gidel et al. 2019)."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(decoder.parameters(), lr=settings.lr, betas=(settings.momentum, SQUARES))
    return build_optimizer(decoder, settings)


def polish_decoder(
    run: Run, cfg: Config, training: TrainingGroups, validation: TrainingGroups, ranks: Ranks = ALONE
) -> None:
    """Sharpen the trained autoencoder's decoder; resumes from `run`. Replaces run/autoencoder.safetensors at the end.

    Raises TrainingDiverged when losses or gradients stay other than finite, ConfigError without the perceptual network.
    """
    settings = cfg.polish
    fabric = make_fabric(settings.precision, ranks)
    torch.manual_seed(cfg.seed + 1)
    network, noted = load_autoencoder(run, cfg)
    assert isinstance(network, Wavelet3DVAE)
    network.encoder.requires_grad_(False)
    goal = Reconstruction(cfg.autoencoder, cfg.data.window_hu)
    pair = Pair(network.decoder, PatchDiscriminator(settings.discriminator_width, goal.soft))
    for module in (network, pair.discriminator):
        place(module, fabric.device)
    fit_tone(network, training, settings.latent_noise, cfg.seed, ranks)
    ema = EMA(pair, settings.ema_decay)
    optimizer = build_player(network.decoder, settings)
    judge = build_judge(pair.discriminator, settings)
    checkpoints = run.checkpoints("polish")
    meta = checkpoints.resume(pair, ema, optimizer, judge)
    start = ranks.agreed(int(meta["step"]))
    clock = Clock(settings, settings.steps, settings.minutes, meta.get("seconds", 0.0), ranks)
    curve = Curve(run, "polish", start)
    pair.discriminator.requires_grad_(False)  # processes exchange the gradients of what learns in each
    perceptual = perceptual_term(settings.perceptual)
    draw, fabric_optimizer = fabric.setup(DecoderObjective(network, pair.discriminator, cfg, ranks, perceptual), optimizer)
    pair.discriminator.requires_grad_(True)
    tell, fabric_judge = fabric.setup(DiscriminatorObjective(pair.discriminator, settings, ranks), judge)
    best = Best(run.folder / "checkpoints" / "polish-best.safetensors")
    tally = Tally(settings, ranks, meta)
    step, logged, held_out = start, start, HeldOut()

    def keep() -> None:
        checkpoints.save(step, pair, ema, optimizer, {"seconds": clock.seconds, "skipped_steps": tally.skipped}, judge)

    with Progress("polish", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            tally.check(step, run.folder, checkpoints, f"polish.lr={settings.lr / 3:.2g}")
            if step > logged and (last or step % settings.log_every == 0):
                means = tally.means()
                total = sum(means.values())
                held = {f"held_out_{name}": value for name, value in held_out._asdict().items()}
                facts = {"lr": optimizer.param_groups[0]["lr"], **held, "skipped_steps": tally.skipped}
                curve.log(step, {"loss": total, **means, **facts})
                bar.update(step, loss=total, seconds_left=clock.seconds_left(step, start))
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                with ema.applied_to(pair):
                    held_out = validate(network, validation, run, cfg, "polish")
                score = held_out.psnr_db - held_out.detail_gap_db
                best.offer(score, ema.weights, {"step": step, **held_out._asdict()})  # a kill before `keep` only does it again
                if not tally.in_a_row:  # or these weights may be why
                    keep()
            if last:
                break

            # One step of both on `accumulate` batches: gradients of all of them first, so that what runs out of memory has
            # changed nothing. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            # The adversary slows down with the decoder, or it wins in the end.
            judge.param_groups[0]["lr"] = settings.discriminator_lr * clock.lr(step, progress) / settings.lr
            fabric_optimizer.zero_grad(set_to_none=True)
            fabric_judge.zero_grad(set_to_none=True)
            losses_of_step: dict[str, Tensor] = {}
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                x = fabric.to_device(training.batch(settings.batch, cfg.seed + 1, part))  # [B 1 D H W]
                pair.discriminator.requires_grad_(False)
                x, y, terms = draw(x, generator(cfg.seed + 1, part))
                fabric.backward(sum(terms.values()) / settings.accumulate)
                pair.discriminator.requires_grad_(True)
                terms["discriminator"] = tell(x, y.detach(), generator(cfg.seed + 1, part, stream=43))
                fabric.backward(terms["discriminator"] / settings.accumulate)
                for name, value in terms.items():
                    losses_of_step[name] = losses_of_step.get(name, 0.0) + value.detach().float() / settings.accumulate
            norm = nn.utils.clip_grad_norm_(network.decoder.parameters(), settings.max_grad_norm)
            if tally.take(losses_of_step, norm, gradient_norm(pair.discriminator)):
                fabric_optimizer.step()
                fabric_judge.step()
                ema.update(pair, step)
            step += 1

    curve.close()
    if not ranks.first:
        return
    kept = best.load_into(pair, otherwise=ema.weights)
    figures = {f"validation_{name}": round(kept[name], 3) for name in HeldOut._fields if kept}
    figures |= {"best_step": kept["step"]} if kept else {}
    save_autoencoder(run, cfg, network, training.shape, {**noted, "polish_steps": step, **figures})
    run.finish_stage("polish", steps=step, seconds=round(clock.seconds), skipped_steps=tally.skipped, **figures)
    checkpoints.clear()
    best.clear()
