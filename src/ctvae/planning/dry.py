"""Dry runs: what training, encoding, decoding and the prior hold at their worst moment, phase by phase.

Each repeats on fake tensors what the loop of that name does for real (`training/autoencoder.py`, `training/polish.py`,
`training/prior.py`, `model.py`), through the same networks, losses and optimisers.

Shapes: D H W voxels; sizes in bytes unless named otherwise.

On a CPU the arrays around the network share its memory and are added in bytes per voxel; on CUDA they lie elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ctvae.calibration import Calibration
from ctvae.checkpoint import EMA
from ctvae.conditions import OF_GROUP
from ctvae.config import Config, Prior, Sharpening, Training
from ctvae.device import generator
from ctvae.latents import LatentCode, LatentSet, most_fitted
from ctvae.models import build
from ctvae.models.autoencoder import Autoencoder
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.models.wavelet3d import Wavelet3DVAE, halo
from ctvae.networks import Model, Size3, Wavelet3D
from ctvae.planning.ledger import Ledger, dry_run, tensor_bytes, to_channels_last
from ctvae.planning.remembered import remembered
from ctvae.planning.workspace import Kernels
from ctvae.training.autoencoder import VALIDATION_GROUPS, Objective, Reconstruction
from ctvae.training.finish import FinishedPair, FinishObjective
from ctvae.training.optimizer import Muon, build_optimizer
from ctvae.training.polish import DecoderObjective, DiscriminatorObjective, Pair, build_judge, build_player
from ctvae.training.prior import Conditioning, FlowObjective, build_velocity, fit_wiener, flow_batches

Builder = Callable[[Model, Size3], Autoencoder]
FLOAT32 = 4
INT16 = 2
LOADING = 2 * FLOAT32 + 2 * INT16  # per voxel of a group: in HU, fitted, and as float32 before and after augmentation
TO_HU = 2 * FLOAT32 + INT16  # per voxel: two float32 copies, or the last of them and the result
SVD_COPIES = 5  # of [groups x numbers] in float32: means, variances, centred rows, LAPACK's order of them, directions


@dataclass(frozen=True)
class TrainingCost:
    """Of the autoencoder's training, polish and finish. `phases` are peaks; the rest says what the step's peak is made of."""

    phases: dict[str, int]
    parameters: int  # how many
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int  # held between forward and backward pass, input included
    flops: int  # of one step, optimiser included

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def standing(self) -> int:
        """The peak of what no smaller step changes: whole groups that are looked at between steps, and saving.

        In bf16 it may be less.
        """
        return max(self.phases["validation"], self.phases.get("saving", 0))

    @property
    def workspace(self) -> int:
        """What the step's peak holds beside the named: gradients of activations, temporaries, kernels' workspace."""
        return max(0, self.phases["step"] - self.weights - self.gradients - self.optimizer - self.average - self.activations)


def training(cfg: Config, kernels: Kernels, make: Builder = build) -> TrainingCost:
    """A step of `train_autoencoder` as it is after the first, what happens between steps, and then polish and finish.

    `make` builds another network than `cfg` describes (benchmarks/ablations.py). Raises DoesNotFit, ConfigError.
    """
    settings, shape = cfg.autoencoder.model_copy(update={"compile": False}), whole(cfg)  # fake tensors are for eager code
    validating = remembered(_validating, cfg, kernels, make)
    with dry_run(kernels) as ledger:
        network = _network(cfg, shape, make)
        ema = EMA(network, settings.ema_decay)
        optimizer = _after_a_step(network, settings)
        standing = ledger.live_bytes
        objective = Objective(network, settings, cfg.data.window_hu)
        if settings.accumulate == 1:  # else the batches before have left theirs
            optimizer.zero_grad(set_to_none=True)
            standing = ledger.live_bytes

        ledger.since()
        flops_before = ledger.flops
        x = torch.empty(settings.batch, 1, *step_shape(cfg))  # [B 1 D H W]
        with autocast(cfg):
            terms = objective(x, generator(0, 0))
        activations = ledger.live_bytes - standing
        _descend(sum(terms.values()), network, optimizer, ema, settings)
        step, flops = ledger.since(), ledger.flops - flops_before

        between = ledger.live_bytes
        with ema.applied_to(network):
            validation = ledger.live_bytes + validating
        phases = {"step": step, "validation": validation}
        if kernels.device == "cpu":
            voxels = math.prod(shape)
            phases["loading"] = between + voxels * (settings.batch * FLOAT32 + LOADING)
            phases["validation"] = max(validation, between + voxels * (2 * FLOAT32 + TO_HU + 2 * VALIDATION_GROUPS * INT16))
            phases["saving"] = between + _copied_to_save(network, ema, optimizer)
        cost = TrainingCost(
            phases=phases,
            parameters=sum(p.numel() for p in network.parameters()),
            weights=tensor_bytes(list(network.parameters()) + list(network.buffers())),
            gradients=tensor_bytes([p.grad for p in network.parameters()]),
            optimizer=tensor_bytes(optimizer.state_dict()["state"]),
            average=tensor_bytes(ema.weights),
            activations=activations,
            flops=flops,
        )
    if cfg.polish.enabled:
        phases["polish"] = polish(cfg, kernels)
    if cfg.finish.enabled:
        phases["finish"] = finish(cfg, kernels)
    return replace(cost, phases=phases)


def polish(cfg: Config, kernels: Kernels) -> int:
    """Peak of `polish_decoder`: a step as it is after the first, validation and saving. A downloaded network is not in it."""

    def draw(network: Wavelet3DVAE, pair: Pair, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return DecoderObjective(network, pair.discriminator, cfg)(x, generator(0, 0))

    return _decoder_against_a_judge(cfg, "polish", Pair, draw, kernels)


def finish(cfg: Config, kernels: Kernels) -> int:
    """Peak of `finish_decoder`, of which half of each batch has been drawn: a step, validation and saving."""
    soft = Reconstruction(cfg.autoencoder, cfg.data.window_hu).soft

    def draw(network: Wavelet3DVAE, pair: Pair, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(pair, FinishedPair)
        sizes = (size // step for size, step in zip(x.shape[2:], network.cfg.grid, strict=True))
        drawn = torch.empty(len(x), network.cfg.latent_channels, *sizes)  # [B Z d h w]
        calibration = Calibration.nothing(soft) if cfg.calibration.enabled else None
        return FinishObjective(network, pair, cfg, calibration=calibration)(x, drawn, generator(0, 0))

    return _decoder_against_a_judge(cfg, "finish", partial(FinishedPair, soft=soft), draw, kernels)


def _decoder_against_a_judge(
    cfg: Config, stage: str, make_pair: Callable[..., Pair],
    draw: Callable[[Wavelet3DVAE, Pair, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]], kernels: Kernels,
) -> int:  # fmt: skip
    settings: Sharpening = getattr(cfg, stage)
    validating = remembered(_validating, cfg, kernels, build)
    with dry_run(kernels) as ledger:
        network = _network(cfg, whole(cfg))
        assert isinstance(network, Wavelet3DVAE)
        network.encoder.requires_grad_(False)
        soft = Reconstruction(cfg.autoencoder, cfg.data.window_hu).soft
        pair = make_pair(network.decoder, PatchDiscriminator(settings.discriminator_width, soft))
        to_channels_last(pair)
        ema = EMA(pair, settings.ema_decay)
        optimizers = [build_player(pair.decoder, settings), build_judge(pair.discriminator, settings)]
        for part, optimizer in zip((pair.decoder, pair.discriminator), optimizers, strict=True):
            _step_on_zeros(part, optimizer)
            if settings.accumulate == 1:
                optimizer.zero_grad(set_to_none=True)
        ledger.since()
        x = torch.empty(settings.batch, 1, *step_shape(cfg, stage))  # [B 1 D H W]
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            pair.discriminator.requires_grad_(False)
            x, y, terms = draw(network, pair, x)
            torch.stack(list(terms.values())).sum().backward()
            pair.discriminator.requires_grad_(True)
            DiscriminatorObjective(pair.discriminator, settings)(x, y.detach(), torch.Generator()).backward()
        nn.utils.clip_grad_norm_(pair.decoder.parameters(), settings.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(pair, 0)
        peak, between = ledger.since(), ledger.live_bytes
        with ema.applied_to(pair):
            peak = max(peak, ledger.live_bytes + validating)
        return max(peak, between + _copied_to_save(pair, ema, *optimizers)) if kernels.device == "cpu" else peak


def encoding(cfg: Config, size: Size3, tile: Size3, kernels: Kernels) -> int:
    """Peak of `Model.encode` on a scan of `size`, by tiles of `tile` voxels where the method has them."""
    with dry_run(kernels) as ledger, torch.no_grad():
        network = frozen(cfg)
        read = _tile_read(cfg, size, tile)
        ledger.since()
        with autocast(cfg):
            mean, logvar = network.encode(torch.empty(1, 1, *read))
        moments = torch.cat((mean, logvar), dim=1).float()
        numbers = moments.numel() * math.prod(size) // math.prod(read)  # halos count twice: a little too many
        peak = ledger.since()
    around = math.prod(size) * (FLOAT32 + 2 * INT16) - math.prod(read) * FLOAT32 + 2 * numbers * FLOAT32
    return peak + (max(0, around) if kernels.device == "cpu" else 0)


def decoding(cfg: Config, size: Size3, tile: Size3, kernels: Kernels) -> int:
    """Peak of `Model.decode` to a scan of `size`, then of turning it into HU."""
    with dry_run(kernels) as ledger, torch.no_grad():
        network = frozen(cfg)
        standing = ledger.live_bytes
        read = _tile_read(cfg, size, tile)
        z = torch.empty(1, *_latent_shape(cfg, network, read))
        ledger.since()
        with autocast(cfg):
            network.decode(z).float()
        peak = ledger.since()
    if kernels.device == "cuda":
        return peak
    whole_volume = math.prod(size) * FLOAT32
    beside = whole_volume if math.prod(read) < math.prod(size) else 0  # what the tiles before have been put into
    return max(peak + beside, standing + whole_volume + math.prod(size) * TO_HU)


@dataclass(frozen=True)
class PriorCost:
    """Peaks of `train_prior` by phase, and what of the flow's a batch of any size has: weights, average, momentum."""

    phases: dict[str, int]
    standing: int


def prior(cfg: Config, groups: int, kernels: Kernels) -> PriorCost:
    """Peaks of `train_prior` by phase: encoding the training groups, fitting to their latents, then a step of each network.

    `groups` in training; 0 where that is not known, and the latents are then not counted.
    """
    latent_shape = _latent_shape(cfg, _shapes_only(cfg), whole(cfg))
    any_batch = cfg.prior.model_copy(update={"batch": 1})  # of which encoding knows nothing
    phases = {"encoding": remembered(_encoding_groups, cfg.model_copy(update={"prior": any_batch}), kernels)}
    svd_bytes = most_fitted(groups, latent_shape) * math.prod(latent_shape) * SVD_COPIES * FLOAT32
    with dry_run(kernels) as ledger:
        latents = _latents(most_fitted(max(2, groups * cfg.prior.encodings), latent_shape), latent_shape)
        ledger.since()
        code = LatentCode.fit(latents)
        wiener = fit_wiener(cfg.prior, code, latents)
        phases["fitting"] = max(ledger.since(), svd_bytes)
        latents = _latents(2, latent_shape)  # the others stay on disk
        batches = flow_batches(cfg, code, Conditioning.fit(latents.conditions))
        network = build_velocity(cfg.prior, latent_shape, len(OF_GROUP), wiener)
        phases["flow"], standing = _flow_step(network, lambda: batches(latents, 0), cfg.prior, ledger)
    return PriorCost(phases, standing)


def whole(cfg: Config) -> Size3:
    """D H W of a training group; the planner has filled it in."""
    assert cfg.data.shape is not None
    return cfg.data.shape


def step_shape(cfg: Config, stage: str = "autoencoder") -> Size3:
    """D H W of what one training step of autoencoder, polish or finish sees: the patch, or the whole group."""
    d, h, w = (min(pair) for pair in zip(cfg.patch_of(stage) or whole(cfg), whole(cfg), strict=True))
    return d, h, w


# --- the networks --------------------------------------------------------------------------------------------------------


def _network(cfg: Config, shape: Size3, make: Builder = build) -> Autoencoder:
    network = make(cfg.model, shape)
    if cfg.model.kind in ("wavelet3d", "conv3d"):
        to_channels_last(network)
    return network


def frozen(cfg: Config) -> Autoencoder:
    return _network(cfg, whole(cfg)).eval().requires_grad_(False)


def _shapes_only(cfg: Config) -> nn.Module:
    with dry_run(Kernels()):
        return build(cfg.model, whole(cfg))


def _latent_shape(cfg: Config, network: nn.Module, size: Size3) -> tuple[int, ...]:
    if not isinstance(cfg.model, Wavelet3D):
        return network.latent_shape  # type: ignore[return-value]
    return cfg.model.latent_channels, *(side // step for side, step in zip(size, cfg.model.grid, strict=True))


def autocast(cfg: Config) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=cfg.autoencoder.precision == "bf16")


def _tile_read(cfg: Config, size: Size3, tile: Size3) -> Size3:
    """Voxels of the largest tile with its halo; the other methods take a group at a time."""
    if not isinstance(cfg.model, Wavelet3D):
        return whole(cfg)
    axes = zip(size, tile, cfg.model.grid, halo(cfg.model), strict=True)
    d, h, w = (min(side // step, max(1, kept // step) + 2 * reach) * step for side, kept, step, reach in axes)
    return d, h, w


# --- training ------------------------------------------------------------------------------------------------------------


def _after_a_step(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimiser with its state, and gradients, as the step before leaves them."""
    optimizer = build_optimizer(network, settings)
    _step_on_zeros(network, optimizer)
    return optimizer


def _step_on_zeros(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if isinstance(optimizer, Muon):
        optimizer.begin()  # a step's arithmetic takes long to follow
    else:
        optimizer.step()


def _descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, settings: Training) -> None:
    """From the loss to the averaged weights, in the loops' order."""
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
    optimizer.step()
    ema.update(network, 0)


def _validating(cfg: Config, kernels: Kernels, make: Builder) -> int:
    """`validate` encodes and decodes whole groups at once: what that holds beside everything that training holds."""
    with dry_run(kernels) as ledger, torch.no_grad():
        network = _network(cfg, whole(cfg), make).eval()
        held = ledger.live_bytes
        ledger.since()
        x = torch.empty(1, 1, *whole(cfg))
        with autocast(cfg):
            y = network.decode(network.encode(x)[0]).float().clamp(-1, 1)
        (y - x).square().mean()
        return ledger.since() - held


def _copied_to_save(network: nn.Module, ema: EMA, *optimizers: torch.optim.Optimizer) -> int:
    """Tensors that are laid out channels-last are copied to be written."""
    saved = [*network.parameters(), *ema.weights.values()]
    saved += [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return tensor_bytes([tensor for tensor in saved if not tensor.is_contiguous()])


# --- the prior -----------------------------------------------------------------------------------------------------------


def _encoding_groups(cfg: Config, kernels: Kernels) -> int:
    """`encode_groups`: whole groups, in PyTorch's plain layout."""
    with dry_run(kernels) as ledger, torch.no_grad():
        network = build(cfg.model, whole(cfg)).eval()
        with autocast(cfg):
            network.encode(torch.empty(1, 1, *whole(cfg)))
        return ledger.since()


def _latents(count: int, latent_shape: tuple[int, ...]) -> LatentSet:
    means, logvars = (torch.empty(count, *latent_shape, dtype=torch.float16) for _ in range(2))
    return LatentSet(means, logvars, torch.empty(count, len(OF_GROUP)), [""] * count, OF_GROUP)


def _flow_step(network: nn.Module, batch: Callable, settings: Prior, ledger: Ledger) -> tuple[int, int]:
    """One step of `train_flow` after the first: its peak, and what there is before it. Networks before it stay in memory."""
    to_channels_last(network)
    ema = EMA(network, settings.ema_decay)
    optimizer = _after_a_step(network, settings)
    if isinstance(optimizer, Muon):
        optimizer.iterations = 2  # the others hold what the second does
    if settings.accumulate == 1:
        optimizer.zero_grad(set_to_none=True)
    ledger.since()
    standing = ledger.live_bytes
    data = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        loss = FlowObjective(network, settings)(data, generator(0, 0)).mean()
    _descend(loss, network, optimizer, ema, settings)
    optimizer.zero_grad(set_to_none=True)
    return ledger.since(), standing
