"""How long a training step takes on this machine, and so how many of them fill the hours there are.

A few steps of each loop's own pieces on random numbers, the first left out: it also warms up. Reading the groups is not in
it, so `--hours` is an aim; the run's own minutes end it where reading was slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctvae.config import Config, Training
from ctvae.device import generator, make_fabric, place
from ctvae.latents import LatentCode, LatentSet
from ctvae.models import build
from ctvae.training.autoencoder import Objective
from ctvae.training.groups import CONDITIONS
from ctvae.training.optimizer import build_optimizer
from ctvae.training.prior import Conditioning, FlowObjective, build_velocities, flow_batches, to_device

AUTOENCODER_SHARE = {"wavelet3d": 0.4}  # of the time for both stages; the other methods' vector priors are quick
OTHER_SHARE = 0.8
MEASURED_STEPS = 3
FEW_LATENTS = 4


def autoencoder_share(cfg: Config, stage: str) -> float:
    """Of the training time; the prior has the rest."""
    return AUTOENCODER_SHARE.get(cfg.model.kind, OTHER_SHARE) if stage == "both" else 1.0


def steps_for(cfg: Config, hours: float, stage: str = "both") -> list[str]:
    """The stages' steps that take `hours` together, as settings."""
    share, seconds, settings = autoencoder_share(cfg, stage), 3600 * hours, []
    if stage != "prior":
        settings.append(f"autoencoder.steps={_steps(share * seconds, autoencoder_step_seconds(cfg))}")
    if stage != "autoencoder":
        rest = 1 - share if stage == "both" else 1.0
        settings.append(f"prior.steps={_steps(rest * seconds, prior_step_seconds(cfg))}")
    return settings


def autoencoder_step_seconds(cfg: Config) -> float:
    """Of one step on a batch as `cfg` has it, accumulation included."""
    assert cfg.data.shape is not None
    settings = cfg.autoencoder
    sizes = [min(pair) for pair in zip(cfg.data.patch or cfg.data.shape, cfg.data.shape, strict=True)]
    x = torch.rand(settings.batch, 1, *sizes) * 2 - 1  # [B 1 D H W]
    network = build(cfg.model, cfg.data.shape)
    objective = Objective(network, settings, cfg.data.window_hu)
    return _seconds(network, objective, settings, lambda run, device, random: sum(run(x.to(device), random).values()))


def prior_step_seconds(cfg: Config) -> float:
    """Of one of `prior.steps`: the mean over the flow's networks, weighted by their shares of the steps."""
    assert cfg.data.shape is not None
    shape = tuple(build(cfg.model, cfg.data.shape).latent_shape)
    means, logvars = torch.randn(FEW_LATENTS, *shape), torch.full((FEW_LATENTS, *shape), -6.0)
    groups = [str(number) for number in range(FEW_LATENTS)]
    latents = LatentSet(means.half(), logvars.half(), torch.rand(FEW_LATENTS, len(CONDITIONS)), groups)
    code = LatentCode.fit(latents, joint=cfg.prior.design == "joint")
    conditioning = Conditioning.fit(latents.conditions)
    shares = {"coarse": 1 - cfg.prior.detail_share, "detail": cfg.prior.detail_share}
    total = 0.0
    for name, network in build_velocities(cfg.prior, code, shape, len(CONDITIONS)).items():
        batch = flow_batches(name, cfg, code, conditioning)(latents, 0)
        loss = _flow_loss(batch)
        total += shares.get(name, 1.0) * _seconds(network, FlowObjective(network), cfg.prior, loss)
    return total


def _flow_loss(batch: object) -> Callable[..., Tensor]:
    return lambda run, device, random: run(to_device(batch, device), random).mean()  # type: ignore[arg-type]


def _seconds(network: nn.Module, objective: nn.Module, settings: Training, loss: Callable[..., Tensor]) -> float:
    """The median of a few steps. `loss(objective, device, generator)`."""
    fabric = make_fabric(settings.precision)
    place(network, fabric.device)
    run, optimizer = fabric.setup(objective, build_optimizer(network, settings))
    seconds = []
    for step in range(MEASURED_STEPS + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for _ in range(settings.accumulate):
            fabric.backward(loss(run, fabric.device, generator(0, step)))
        optimizer.step()
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _steps(seconds: float, per_step: float) -> int:
    return max(1, round(seconds / per_step))
