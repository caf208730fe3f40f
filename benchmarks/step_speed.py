"""Time of a training step of `wavelet3d` against MONAI's AutoencoderKL as MAISI sizes it, turn by turn in one process.

With --maisi also AutoencoderKlMaisi, MONAI's memory-saving variant: the same layers, convolutions in two parts, checkpointing.

    python benchmarks/step_speed.py                          # 64 x 128 x 128, the recipe's precision
    python benchmarks/step_speed.py --size 32 64 64 --rounds 5

The peer: channels 64/128/256, 2 residual blocks per level, 4 latent channels, no attention (Guo et al. 2024, MAISI), which
halves every axis twice: 4 latent numbers per 64 voxels. Both have the same input, precision, losses and optimiser; ours has
the recipe's latent, whose numbers per voxel are printed beside it. The median step after one that warms up.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL
from torch import Tensor

from ctvae.config import load_recipe
from ctvae.device import generator, place
from ctvae.models import build
from ctvae.models.autoencoder import Autoencoder
from ctvae.training.autoencoder import Objective
from ctvae.training.optimizer import build_optimizer


class Peer(Autoencoder):
    spatial = True

    def __init__(self, size: tuple[int, ...], saving_memory: bool = False):
        super().__init__()
        self.latent_shape = (4, *(side // 4 for side in size))
        common = {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 4,
            "num_res_blocks": (2, 2, 2),
            "norm_num_groups": 32,
        }
        common |= {"attention_levels": (False,) * 3, "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
        self.network = (
            AutoencoderKlMaisi(num_channels=(64, 128, 256), num_splits=2, dim_split=1, use_checkpointing=True, **common)
            if saving_memory
            else AutoencoderKL(channels=(64, 128, 256), **common)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, sigma = self.network.encode(x)
        return mean, 2 * sigma.log()

    def decode(self, z: Tensor) -> Tensor:
        return self.network.decode(z)


class Step:
    """One network with its loss and optimiser."""

    def __init__(self, network: Autoencoder, cfg, x: Tensor):
        place(network, x.device)
        self.cfg, self.x, self.network = cfg, x, network
        self.objective = Objective(network, cfg.autoencoder, cfg.data.window_hu)
        self.optimizer = build_optimizer(network, cfg.autoencoder)

    def seconds(self, step: int) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.cfg.autoencoder.precision == "bf16"):
            terms = self.objective(self.x, generator(0, step))
        sum(terms.values()).backward()
        self.optimizer.step()
        if self.x.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    @property
    def voxels_per_number(self) -> float:
        return math.prod(self.x.shape[2:]) / math.prod(self.network.latent_shape)

    @property
    def parameters(self) -> float:
        return sum(p.numel() for p in self.network.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 128, 128), metavar=("D", "H", "W"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--maisi", action="store_true", help="MONAI's memory-saving variant, too")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for ctvae train")
    arguments = parser.parse_args()
    cfg, size = load_recipe("wavelet3d", arguments.settings), tuple(arguments.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.rand(1, 1, *size, device=device) * 2 - 1
    steps = {"wavelet3d": Step(build(cfg.model, size), cfg, x), "AutoencoderKL": Step(Peer(size), cfg, x)}
    if arguments.maisi:
        steps["AutoencoderKlMaisi"] = Step(Peer(size, saving_memory=True), cfg, x)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds[name].append(step.seconds(turn))
    where = "CUDA" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{'x'.join(map(str, size))}, {cfg.autoencoder.precision}, {where}, torch {torch.__version__}")
    print("| network | parameters | voxels per latent number | median seconds per step |\n|---|---|---|---|")
    medians = {name: statistics.median(measured[1:]) for name, measured in seconds.items()}
    for name, step in steps.items():
        print(f"| {name} | {step.parameters:.1f} M | {step.voxels_per_number:g} | {medians[name]:.2f} |")
    for name in list(steps)[1:]:
        print(f"\n{name}: {medians[name] / medians['wavelet3d']:.1f} times as long as wavelet3d")


if __name__ == "__main__":
    main()
