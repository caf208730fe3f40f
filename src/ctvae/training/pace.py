"""How long a training step takes on this machine, and so how many of them fill the hours there are.

A few steps of each loop's own pieces on random numbers, the first left out: it also warms up. Reading the groups is not in
it, so `--hours` is an aim; the run's own minutes end it where reading was slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from ctvae.conditions import OF_GROUP
from ctvae.config import Config, Training
from ctvae.device import generator, make_fabric, place
from ctvae.latents import LatentCode, LatentSet
from ctvae.models import build
from ctvae.training.autoencoder import Objective
from ctvae.training.optimizer import build_optimizer
from ctvae.training.prior import Conditioning, FlowObjective, build_velocity, fit_wiener, flow_batches, to_device

SHARES = {"autoencoder": 0.8, "prior": 0.2}  # of the time for all stages; vector priors are quick
SPATIAL_SHARES = {"autoencoder": 0.5, "prior": 0.5}
SHARPENED_SHARES = {"autoencoder": 0.3, "polish": 0.12, "prior": 0.58, "finish": 0.15}
SHARPENING = ("polish", "finish")
FEWEST_STEPS = 1000  # of an autoencoder that is worth sharpening: before, all time is better spent on it and on the prior
STAGES = {"autoencoder": ("autoencoder", "polish"), "prior": ("prior",), "finish": ("finish",)}
TRAINED = ("autoencoder", "polish", "prior", "finish")
STAGES |= {"calibration": ("calibration",), "both": (*TRAINED, "calibration")}
MEASURED_STEPS = 3
FEW_LATENTS = 4


def shares(cfg: Config, stage: str) -> dict[str, float]:
    """Of the training time of `stage`, one of STAGES, by section of the settings."""
    known = SHARPENED_SHARES if _sharpened(cfg) else SPATIAL_SHARES if cfg.model.kind == "wavelet3d" else SHARES
    wanted = [name for name in STAGES[stage] if name in known and wants(cfg, name)]
    total = sum(known[name] for name in wanted)
    return {name: known[name] / total for name in wanted}


def wants(cfg: Config, stage: str) -> bool:
    """Whether the settings have this stage at all."""
    return getattr(getattr(cfg, stage), "enabled", True)


def _sharpened(cfg: Config) -> bool:
    return any(wants(cfg, name) for name in SHARPENING)


def without_sharpening(cfg: Config, minutes: float, stage: str = "both", pinned: Collection[str] = ()) -> list[str]:
    """As settings: no polish and no finish, where `minutes` of `stage` are too few for an autoencoder that either would help.

    None where they are enough, where it does not train an autoencoder, and of those that are `pinned`. Measures a step.
    """
    ours = [name for name in SHARPENING if name in STAGES[stage] and wants(cfg, name) and f"{name}.enabled" not in pinned]
    if "autoencoder" not in STAGES[stage] or not ours:
        return []
    steps = 60 * minutes * shares(cfg, stage)["autoencoder"] / autoencoder_step_seconds(cfg)
    return [f"{name}.enabled=false" for name in ours] if steps < FEWEST_STEPS else []


def steps_for(cfg: Config, hours: float, stage: str = "both") -> list[str]:
    """The stages' steps that take `hours` together, as settings; those without a measure here end by their minutes."""
    measure = {"autoencoder": autoencoder_step_seconds, "prior": prior_step_seconds}
    return [
        f"{name}.steps={_steps(3600 * hours * share, measure[name](cfg))}"
        for name, share in shares(cfg, stage).items()
        if name in measure
    ]


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
    """Of one step of the flow."""
    assert cfg.data.shape is not None
    shape = tuple(build(cfg.model, cfg.data.shape).latent_shape)
    means, logvars = torch.randn(FEW_LATENTS, *shape), torch.full((FEW_LATENTS, *shape), -6.0)
    groups = [str(number) for number in range(FEW_LATENTS)]
    latents = LatentSet(means.half(), logvars.half(), torch.rand(FEW_LATENTS, len(OF_GROUP)), groups)
    code = LatentCode.fit(latents)
    batch = flow_batches(cfg, code, Conditioning.fit(latents.conditions))(latents, 0)
    network = build_velocity(cfg.prior, shape, len(OF_GROUP), fit_wiener(cfg.prior, code, latents))
    return _seconds(network, FlowObjective(network, cfg.prior), cfg.prior, _flow_loss(batch))


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
