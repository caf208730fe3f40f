"""What was tried on `wavelet3d`: parameters, time and memory of a step, held-out PSNR after equal steps, a variant a line.

    python benchmarks/ablations.py DATASET --steps 600 --out FOLDER               # the table; what is in FOLDER is not done again
    python benchmarks/ablations.py DATASET --steps 600 --out FOLDER --only norm   # variants whose name has this in it

Every variant trains from the same seed on the same patches in the same order with the recipe's losses and optimiser, for as
many *steps*, over which its learning rate falls: how busy the machine is changes no quality. Time is processor time of all
threads, the median of a few steps on one batch, so neighbours disturb it little. Memory is the planner's prediction for a step on
one whole group of `--size`; it does not see what torch.compile makes. Judged are the averaged weights on the middle of each
validation group (`--crop`), PSNR over -1000..1000 HU.

A 2x2x2 Haar step and a 1x1x1 convolution are together a 2x2x2 convolution of stride 2 in other coordinates, so strided
variants span what those with Haar steps span (but for the stem's 3x3x3 kernel) and differ in how they start and learn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from equal_minutes import judged, train
from torch import Tensor, nn

from ctvae.config import Config, load_recipe, with_overrides
from ctvae.dataset import Dataset
from ctvae.device import generator, place
from ctvae.models.blocks import Conv, ResBlock
from ctvae.models.wavelet3d import Wavelet3DVAE
from ctvae.networks import Size3, Wavelet3D
from ctvae.planning import dry
from ctvae.planning.sizes import written
from ctvae.planning.workspace import Kernels
from ctvae.training.autoencoder import Objective
from ctvae.training.groups import TrainingGroups, training_shape
from ctvae.training.optimizer import build_optimizer

TIMED_STEPS = 3
GROUPS = 8  # of GroupNorm

# --- networks that no setting describes: changes to a built one ----------------------------------------------------------------


def unchanged(_: Wavelet3DVAE) -> None: ...


def norm(make: Callable[[int], nn.Module]) -> Callable[[Wavelet3DVAE], None]:
    """Another normalisation in every residual block."""

    def change(network: Wavelet3DVAE) -> None:
        for block in blocks(network):
            block.norm = make(block.conv1.out_channels)

    return change


def separable(network: Wavelet3DVAE) -> None:
    """(2+1)D: every 3x3x3 convolution of a block as 1x3x3, then 3x1x1 (Tran et al. 2018); blocks still start as the identity."""
    for block in blocks(network):
        for name in ("conv1", "conv2"):
            channels = getattr(block, name).out_channels
            plane = Conv(channels, channels, (1, 3, 3), padding=(0, 1, 1))
            setattr(block, name, nn.Sequential(plane, Conv(channels, channels, (3, 1, 1), padding=(1, 0, 0))))
        for parameter in block.conv2[1].parameters():
            nn.init.zeros_(parameter)


def strided_stem(network: Wavelet3DVAE) -> None:
    """A strided convolution, and a transposed one back, instead of the first Haar step; `model.strided` is for the others."""
    encoder, decoder, stride = network.encoder, network.decoder, network.cfg.strides[0]
    width = encoder.entries[0].out_channels
    encoder.entries[0] = nn.Conv3d(1, width, stride, stride)
    decoder.exits[-1] = nn.ConvTranspose3d(width, 1, stride, stride)
    encoder.strides = ((1, 1, 1), *encoder.strides[1:])  # the convolutions do the halving, and a Haar step of 1x1x1 is none
    decoder.strides = (*decoder.strides[:-1], (1, 1, 1))


class Shortcut(nn.Module):
    """A 1x1x1 convolution from or to Haar bands beside which the low ones pass as they are (DC-AE's idea, Chen et al. 2024)."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:  # [B C d h w]
        y = self.convolution(x)
        common = min(x.shape[1], y.shape[1])
        return torch.cat((y[:, :common] + x[:, :common], y[:, common:]), dim=1)


def shortcut(network: Wavelet3DVAE) -> None:
    for layers in (network.encoder.entries, network.decoder.exits):
        for number, layer in enumerate(layers):
            if layer.kernel_size == (1, 1, 1):
                layers[number] = Shortcut(layer)


def blocks(network: nn.Module) -> list[ResBlock]:
    return [module for module in network.modules() if isinstance(module, ResBlock)]


@dataclass(frozen=True)
class Variant:
    name: str
    settings: tuple[str, ...] = ()
    change: Callable[[Wavelet3DVAE], None] = unchanged

    def build(self, cfg: Wavelet3D, shape: Size3) -> Wavelet3DVAE:
        network = Wavelet3DVAE(cfg, shape)
        self.change(network)
        return network


EIGHTH = (  # the recipe until 2026-11-28, from which others of its kind differ in one thing
    *("model.strides=[[2,2,2],[2,2,2],[2,2,2]]", "model.widths=[32,128,160]", "model.blocks=[1,2,2]"),
    *("model.latent_channels=32", "model.strided=false"),
)
QUARTER = ("model.strides=[[2,2,2],[2,2,2]]", "model.widths=[32,128]", "model.blocks=[1,2]", "model.latent_channels=4")
HAAR = (*QUARTER, "model.strided=false")
VARIANTS = [
    Variant("latents 32 of 8x8x8", EIGHTH),
    Variant("stem: strided", EIGHTH, strided_stem),
    Variant("levels: strided", (*EIGHTH, "model.strided=true")),
    Variant("levels: Haar with shortcut", EIGHTH, shortcut),
    Variant("widths 24 96 128", (*EIGHTH, "model.widths=[24,96,128]")),
    Variant("widths 48 160 192", (*EIGHTH, "model.widths=[48,160,192]")),
    Variant("blocks 1 1 1", (*EIGHTH, "model.blocks=[1,1,1]")),
    Variant("blocks 1 3 3", (*EIGHTH, "model.blocks=[1,3,3]")),
    Variant("norm: groups", EIGHTH, norm(lambda channels: nn.GroupNorm(GROUPS, channels))),
    Variant("norm: none", EIGHTH, norm(lambda _: nn.Identity())),
    Variant("convolutions (2+1)D", EIGHTH, separable),
    Variant("torch.compile", (*EIGHTH, "autoencoder.compile=true")),
    Variant("latents 4 of 4x4x4", HAAR),
    Variant("latents 4 of 4x4x4, strided", (*QUARTER, "model.strided=true")),  # the recipe
    Variant("latents 4 of 4x4x4, wider", (*HAAR, "model.widths=[48,192]")),
    Variant("latents 4 of 4x4x4, deeper", (*HAAR, "model.blocks=[2,4]")),
]

# --- what is measured -----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.out = arguments, Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.cfg = load_recipe("wavelet3d", ["polish.enabled=false", *arguments.settings])
        data = Dataset.open(Path(arguments.dataset))
        shape = training_shape(data, self.cfg)
        moved = [group for group in data.groups("train") if group.patient in arguments.held_out]
        training = [group for group in data.groups("train") if group not in moved]
        splits = training, [*data.groups("validation"), *moved]
        self.training, self.held_out = (TrainingGroups(data, groups, self.cfg.data, shape) for groups in splits)

    def row(self, variant: Variant) -> dict:
        """A variant's figures, from the folder if it was measured before."""
        path = self.out / f"{variant.name.replace(' ', '-').replace(':', '').replace('(', '').replace(')', '')}.json"
        told = {"name": variant.name, "steps": self.arguments.steps}
        found = json.loads(path.read_text()) if path.exists() else {}
        if not told.items() <= found.items():
            print(variant.name, flush=True)
            found = told | self.measured(variant)
            path.write_text(json.dumps(found))
        return found

    def measured(self, variant: Variant) -> dict:
        cfg, steps = with_overrides(self.cfg, variant.settings), self.arguments.steps
        torch.manual_seed(cfg.seed)
        network = variant.build(cfg.model, self.training.shape)
        seconds = self.step_seconds(network, cfg)
        torch.manual_seed(cfg.seed)
        network = variant.build(cfg.model, self.training.shape)
        train(network, cfg, self.training, lambda step, _: step / steps)
        return {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "cpu_seconds_per_step": seconds,
            "peak_gb": None if cfg.autoencoder.compile else self.peak_bytes(variant, cfg) / 1e9,
            **judged(network, self.held_out, self.arguments.crop),
        }

    def step_seconds(self, network: Wavelet3DVAE, cfg: Config) -> float:
        """Processor seconds of a step, reading left out; the first, which warms up or compiles, is not counted."""
        place(network, torch.device("cpu"))
        objective, optimizer = Objective(network, cfg.autoencoder, cfg.data.window_hu), build_optimizer(network, cfg.autoencoder)
        x, seconds = self.training.batch(cfg.autoencoder.batch, cfg.seed, 0), []
        for step in range(TIMED_STEPS + 1):
            start = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.autoencoder.precision == "bf16"):
                terms = objective(x, generator(cfg.seed, step))
            sum(terms.values()).backward()
            optimizer.step()
            seconds.append(time.process_time() - start)
        return statistics.median(seconds[1:])

    def peak_bytes(self, variant: Variant, cfg: Config) -> int:
        whole = with_overrides(cfg, [f"data.shape={list(self.arguments.size)}", "data.patch=null", "autoencoder.batch=1"])
        return dry.training(whole, Kernels("cpu", torch.get_num_threads()), variant.build).phases["step"]


def table(rows: list[dict], size: Size3) -> Iterator[str]:
    yield f"| variant | parameters | CPU seconds a step | peak GB at {written(size)} | PSNR dB | SSIM |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        quality = f"{fmean(row['psnr_db']):.2f} | {fmean(row['ssim']):.3f}"
        yield f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['cpu_seconds_per_step']:.2f} | {peak} | {quality} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each variant")
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--size", type=int, nargs=3, default=(64, 256, 256), metavar=("D", "H", "W"), help="of the memory column")
    parser.add_argument("--crop", type=int, nargs=3, default=(64, 128, 128), metavar=("D", "H", "W"))
    parser.add_argument("--held-out", nargs="+", default=[], metavar="PATIENT", help="of the training split, to judge by instead")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of every variant")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    rows = [bench.row(variant) for variant in VARIANTS if arguments.only in variant.name]
    print(f"{arguments.steps} steps, {torch.get_num_threads()} thread(s), {len(bench.held_out)} validation groups")
    print("\n".join(table(rows, tuple(arguments.size))))


if __name__ == "__main__":
    main()
