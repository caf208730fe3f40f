"""Stage 3: the decoder learns to make what the prior draws look like scans. Encoder and prior stay as they are.

Until here the decoder has seen latents of real scans alone. A prior's samples are a little off, and what comes of them is
softer, or has texture that no scan has. Here half of each batch is patches of real scans, reconstructed, and half is patches of
latents that the flow drew, of which no original exists. The former are held to their originals (`polish.py`'s losses). Both are
held to real patches by a patch discriminator and by the means of simple statistics (`moments.py`), with the noise that is drawn
for what is generated (`grain.py`), or the decoder would be asked for it as well. What is coarser than texture is held to what
the decoder made before the stage, or it would learn to put tissue into air. Where a calibration sees to it, in empty air, rims,
lungs, cavities and bone, each voxel is, and no other loss has a say: what learns there is soft tissue alone.

Where the game gets out of hand, as with a decoder that is too young for it, reconstructions fall apart within a few dozen steps.
So the stage ends, and leaves the decoder as it was, once those of held-out groups have lost MOST_LOST_DB.

In the end `finish.kept` of the weights before the stage may be mixed in (Wortsman et al. 2022, robust fine-tuning by weights
between both): what is gained is along the way, what a long game against statistics leaves behind lies at its end.

Shapes:  B batch   D H W voxels   Z latent channels   d h w latent voxels
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctvae import losses
from ctvae.calibration import FILE as CALIBRATION
from ctvae.calibration import Calibration, Places
from ctvae.checkpoint import EMA
from ctvae.config import Config
from ctvae.device import generator, make_fabric, place
from ctvae.grain import Grain
from ctvae.model import Model
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.models.wavelet3d import Decoder, Wavelet3DVAE
from ctvae.networks import Size3
from ctvae.progress import Progress
from ctvae.ranks import ALONE, Ranks
from ctvae.runlog import Clock, Curve, Run
from ctvae.training.autoencoder import HeldOut, Reconstruction, load_autoencoder, noisy_latents, save_autoencoder, validate
from ctvae.training.drawn import DrawnLatents
from ctvae.training.groups import TrainingGroups
from ctvae.training.memory import kept_when_memory_runs_out
from ctvae.training.moments import Moments, statistics
from ctvae.training.perceptual import PerceptualTerm, perceptual_term
from ctvae.training.polish import DiscriminatorObjective, Pair, build_judge, build_player, gradient_norm, within
from ctvae.training.tally import Tally
from ctvae.training.tone import fit_tone

COARSE = 4  # voxels
DRAWING = 0.3  # of the stage's minutes at most
MOST_LOST_DB = 4.0  # of held-out PSNR: finishes that went well lost 1.5, those that ran away 6 to 14 (docs/log.md)
ASTRAY = (
    "warning: the finish took reconstructions apart (held-out PSNR {before:.1f} dB before, {after:.1f} dB after {step} steps), "
    "so the decoder stays as it was; train the autoencoder for longer before it, or try --set finish.lr=2e-5"
)


class FinishedPair(Pair):
    """With the running means of both sides' texture: reconstructed and drawn patches have their own."""

    def __init__(self, decoder: nn.Module, discriminator: PatchDiscriminator, soft: tuple[float, float], ranks: Ranks = ALONE):
        super().__init__(decoder, discriminator)
        self.reconstructed, self.drawn = Moments(soft, ranks.mean), Moments(soft, ranks.mean)

    def moments(self, again: Tensor, made: Tensor, x: Tensor) -> Tensor:
        """The loss of both sides, reconstructed and drawn, against the same real patches: [B 1 D H W] each."""
        real = statistics(x, self.drawn.soft)
        return (self.reconstructed.towards(real, again) + self.drawn.towards(real, made)) / 2


class FinishObjective(nn.Module):
    """The decoder's losses in one forward call."""

    def __init__(
        self, network: Autoencoder, pair: FinishedPair, cfg: Config, ranks: Ranks = ALONE,
        perceptual: PerceptualTerm | None = None, calibration: Calibration | None = None,
    ):  # fmt: skip
        super().__init__()
        self.network, self.pair, self.cfg, self.ranks = network, pair, cfg.finish, ranks
        self.calibration = calibration
        assert isinstance(network, Wavelet3DVAE)
        self.before = Decoder(network.cfg).requires_grad_(False)
        self.before.load_state_dict(network.decoder.state_dict())
        self.perceptual, self.margin = perceptual, cfg.margin_of("finish")
        self.reconstruction = Reconstruction(cfg.autoencoder, cfg.data.window_hu)

    def forward(self, x: Tensor, drawn: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Real patches x [B 1 D H W] and drawn latents [B Z d h w] -> x, decoded ones [2B 1 D H W], both without their margins,
        and the loss terms."""
        cfg, pair, network = self.cfg, self.pair, self.network
        encoded = noisy_latents(network, x, cfg.latent_noise, random, self.ranks)
        z = torch.cat((encoded, drawn.to(encoded.dtype)))
        plain, decoded, y, held = self._decoded(z, random)
        x, decoded, y = (within(volumes, self.margin) for volumes in (x, decoded, y))
        again, made = y.chunk(2)
        logits, fake = pair.discriminator(y)
        with torch.no_grad():
            judged, real = pair.discriminator(x)
        terms = {
            "adversarial": cfg.adversarial_weight * losses.deceiving(judged.float(), logits.float(), cfg.adversarial),
            "features": cfg.feature_weight * losses.feature_matching(real, [f[: len(x)] for f in fake], self.ranks.mean).float(),
            "moments": cfg.moments_weight * pair.moments(again, made, x),
        }
        if cfg.anchor_weight:
            with torch.no_grad():
                before = self.before(z) if self.calibration is None else self.before.raw(z)
            terms["anchor"] = cfg.anchor_weight * self.anchor(plain, before, held)
        plainly = decoded[: len(x)]
        if self.perceptual is not None:
            terms["perceptual"] = cfg.perceptual_weight * self.perceptual(plainly, x, random)
        return x, y, {**self.reconstruction(plainly, x), **terms}

    def anchor(self, now: Tensor, before: Tensor, held: Tensor) -> Tensor:
        """How far what is decoded has moved: means of COARSE voxels anywhere, and each voxel that is `held`. [B 1 D H W] each."""
        moved = within((now - before) * held, self.margin).abs().mean()
        return moved + coarse_difference(within(now, self.margin), within(before, self.margin))

    def _decoded(self, z: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a calibration is given, or all of it without one; as in use, without and with grain; and what the calibration sees
        to: [B 1 D H W] each.

        There no gradients pass: it smooths, sharpens and has curves that jump, so what losses ask for has no effect, or too much,
        and is asked for again. In soft tissue they pass as if it added what it adds (straight through; Bengio et al. 2013).
        """
        decoder: Any = self.network.decoder
        raw = decoder.raw(z)
        with torch.autocast(raw.device.type, enabled=False):
            toned = raw if decoder.tone is None else decoder.tone(raw)
            if self.calibration is None:
                return toned, toned, toned, torch.zeros_like(raw, dtype=torch.bool)
            fixed = toned.detach()
            places = Places.of(fixed, self.calibration.soft)
            held = self.calibration.sees_to(fixed, places)
            applied = self.calibration.applied(raw.detach(), fixed, places)
            decoded = torch.where(held, fixed, toned) + (applied - fixed)
            if self.calibration.grain is None:
                return raw, decoded, decoded, held
            noise = self._noise(self.calibration.grain, decoded.shape, random).to(decoded)
            grain = self.calibration.applied(raw.detach(), fixed, places, noise=noise) - applied
            return raw, decoded, decoded + grain, held

    def _noise(self, grain: Grain, shape: torch.Size, random: torch.Generator) -> Tensor:
        """For reconstructed and for drawn patches [2B 1 D H W]: what is drawn is for all processes, as one would."""
        rows = shape[0] // 2 * self.ranks.world
        sides = [grain.white(torch.Size((rows, *shape[1:])), random)[self.ranks.rows(rows)] for _ in range(2)]
        return torch.cat(sides)


def coarse_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean |difference| of the means of COARSE voxels along each axis, values clipped to -1..1: [B 1 D H W] each.

    Texture has none to speak of; speckle in air has, as there is nothing below -1 that would make up for it.
    """
    kernel = tuple(min(COARSE, size) for size in a.shape[2:])
    return (F.avg_pool3d(a.clamp(-1, 1), kernel) - F.avg_pool3d(b.clamp(-1, 1), kernel)).abs().mean()


@torch.no_grad()
def mix(network: nn.Module, other: dict[str, Tensor], share: float) -> None:
    """`share` of another state of the same network into this one, number by number."""
    for name, value in network.state_dict().items():
        value.lerp_(other[name].to(value), share)


def _drawn(samples: DrawnLatents, model: Model, minutes: float | None) -> float:
    """The seconds that drawing took: DRAWING of the stage's minutes, or what the fewest take."""
    start = time.monotonic()
    samples.draw(model, math.inf if minutes is None else 60 * minutes * DRAWING)
    return time.monotonic() - start


def _minutes_left(minutes: float | None, drawing: float) -> float | None:
    """For the steps, whose warm-up and decay are shares of them: drawing must not use up the warm-up."""
    return None if minutes is None else max(minutes - drawing / 60, minutes * (1 - DRAWING))


def finish_decoder(
    run: Run, cfg: Config, training: TrainingGroups, validation: TrainingGroups, ranks: Ranks = ALONE
) -> None:
    """Train the decoder of a run with a finished prior; resumes from `run`. Replaces run/autoencoder.safetensors at the end.

    Raises TrainingDiverged when losses or gradients stay other than finite, ConfigError without the perceptual network.
    """
    settings = cfg.finish
    fabric = make_fabric(settings.precision, ranks)
    torch.manual_seed(cfg.seed + 3)
    network, noted = load_autoencoder(run, cfg)
    assert isinstance(network, Wavelet3DVAE)
    samples = DrawnLatents(run.folder / "drawn", cfg, network.cfg.grid, ranks)
    network.encoder.requires_grad_(False)
    goal = Reconstruction(cfg.autoencoder, cfg.data.window_hu)
    pair = FinishedPair(network.decoder, PatchDiscriminator(settings.discriminator_width, goal.soft), goal.soft, ranks)
    for module in (network, pair):
        place(module, fabric.device)
    calibration = Calibration.load(run.folder / CALIBRATION) if cfg.calibration.enabled else None
    objective = FinishObjective(network, pair, cfg, ranks, perceptual_term(settings.perceptual), calibration)  # keeps the decoder
    place(objective.before, fabric.device)
    fit_tone(network, training, settings.latent_noise, cfg.seed, ranks)
    origin = {name: value.to("cpu", copy=True) for name, value in network.decoder.state_dict().items()}
    ema = EMA(pair, settings.ema_decay)
    optimizer = build_player(network.decoder, settings)
    judge = build_judge(pair.discriminator, settings)
    checkpoints = run.checkpoints("finish")
    meta = checkpoints.resume(pair, ema, optimizer, judge)
    start = ranks.agreed(int(meta["step"]))
    drawing = meta.get("drawing_seconds", 0.0) + _drawn(samples, Model(run.folder), settings.minutes)
    clock = Clock(settings, settings.steps, _minutes_left(settings.minutes, drawing), meta.get("seconds", 0.0), ranks)
    curve = Curve(run, "finish", start)
    pair.discriminator.requires_grad_(False)  # processes exchange the gradients of what learns in each
    draw, fabric_optimizer = fabric.setup(objective, optimizer)
    pair.discriminator.requires_grad_(True)
    tell, fabric_judge = fabric.setup(DiscriminatorObjective(pair.discriminator, settings, ranks), judge)
    tally = Tally(settings, ranks, meta)
    step, logged, held_out, astray = start, start, HeldOut(), False
    began_db = meta.get("began_db")
    if began_db is None:
        began_db = validate(network, validation, run, cfg, "finish").psnr_db

    def lost() -> bool:
        return held_out.psnr_db < began_db - MOST_LOST_DB

    def keep() -> None:
        facts = {"seconds": clock.seconds, "drawing_seconds": drawing, "skipped_steps": tally.skipped}
        if math.isfinite(began_db):
            facts["began_db"] = began_db
        checkpoints.save(step, pair, ema, optimizer, facts, judge)

    with Progress("finish", total=settings.steps) as bar, kept_when_memory_runs_out(optimizer, lambda: step, keep):
        while True:
            progress = clock.progress(step)
            last = progress >= 1.0

            # Report and save before the update, so that a resumed run repeats nothing.
            tally.check(step, run.folder, checkpoints, f"finish.lr={settings.lr / 3:.2g}")
            if step > logged and (last or step % settings.log_every == 0):
                means = tally.means()
                held = {f"held_out_{name}": value for name, value in held_out._asdict().items()}
                off = {f"off_{name}": getattr(pair, name).off().abs().mean().item() for name in ("reconstructed", "drawn")}
                facts = {"lr": optimizer.param_groups[0]["lr"], **off, **held, "skipped_steps": tally.skipped}
                curve.log(step, {"loss": sum(means.values()), **means, **facts})
                bar.update(step, loss=sum(means.values()), seconds_left=clock.seconds_left(step, start))
                logged = step
            if step > start and (last or step % settings.save_every == 0):
                with ema.applied_to(pair):
                    held_out = validate(network, validation, run, cfg, "finish")
                astray = ranks.told(lost)
                if not (astray or tally.in_a_row):  # or these weights may be why
                    keep()
            if last or astray:
                break

            # One step of both on `accumulate` batches: gradients of all of them first, so that what runs out of memory has
            # changed no weights. Randomness depends on (seed, step) alone.
            optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
            # The adversary slows down with the decoder, or it wins in the end.
            judge.param_groups[0]["lr"] = settings.discriminator_lr * clock.lr(step, progress) / settings.lr
            fabric_optimizer.zero_grad(set_to_none=True)
            fabric_judge.zero_grad(set_to_none=True)
            losses_of_step: dict[str, Tensor] = {}
            means_before = [buffer.clone() for buffer in pair.buffers()]  # of both sides' texture
            for part in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                x = fabric.to_device(training.batch(settings.batch, cfg.seed + 3, part))  # [B 1 D H W]
                size: Size3 = (x.shape[2], x.shape[3], x.shape[4])
                drawn = fabric.to_device(samples.batch(settings.batch, size, cfg.seed + 3, part))  # [B Z d h w]
                pair.discriminator.requires_grad_(False)
                x, y, terms = draw(x, drawn, generator(cfg.seed + 3, part))
                fabric.backward(sum(terms.values()) / settings.accumulate)
                pair.discriminator.requires_grad_(True)
                terms["discriminator"] = tell(x, y.detach(), generator(cfg.seed + 3, part, stream=43))
                fabric.backward(terms["discriminator"] / settings.accumulate)
                for name, value in terms.items():
                    losses_of_step[name] = losses_of_step.get(name, 0.0) + value.detach().float() / settings.accumulate
            norm = nn.utils.clip_grad_norm_(network.decoder.parameters(), settings.max_grad_norm)
            if tally.take(losses_of_step, norm, gradient_norm(pair.discriminator)):
                fabric_optimizer.step()
                fabric_judge.step()
                ema.update(pair, step)
            else:
                for buffer, before in zip(pair.buffers(), means_before, strict=True):
                    buffer.copy_(before)
            step += 1

    curve.close()
    if not ranks.first:
        return
    pair.load_state_dict(ema.weights)
    if astray:
        print(ASTRAY.format(step=step, before=began_db, after=held_out.psnr_db), file=sys.stderr, flush=True)
    if share := 1.0 if astray else settings.kept:
        mix(network.decoder, origin, share)
        held_out = validate(network, validation, run, cfg, "finish")
    figures = {f"finished_{name}": round(value, 3) for name, value in held_out._asdict().items()}
    save_autoencoder(run, cfg, network, training.shape, {**noted, "finish_steps": 0 if astray else step, **figures})
    seconds = round(drawing + clock.seconds)
    run.finish_stage("finish", steps=step, astray=astray, seconds=seconds, skipped_steps=tally.skipped, **figures)
    checkpoints.clear()
    samples.clear()
