"""What pulls at the decoder in the finish: the gradient of each loss, and how much alike it is from batch to batch.

    python benchmarks/gradients.py headneck DATASET --steps 60 --set data.shape=[64,80,128]

A new discriminator learns for `--steps` steps against a decoder that stands still; then each loss, at weight 1, is measured on
the same `--batches`: the norm within a batch, the norm of the mean over batches (alike: every batch says the same), and the
share of the adversarial gradient's square, at the decoded volume, beyond the window, in air, soft tissue and bone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ctvae.config import load_config, with_overrides
from ctvae.dataset import Dataset
from ctvae.device import generator, place
from ctvae.generate import load
from ctvae.model import model_folder
from ctvae.models.discriminator import PatchDiscriminator
from ctvae.training.autoencoder import Reconstruction
from ctvae.training.drawn import DrawnLatents
from ctvae.training.finish import FinishedPair, FinishObjective
from ctvae.training.groups import TrainingGroups
from ctvae.training.polish import DiscriminatorObjective, build_judge

TISSUES = {
    "beyond the window": (-9, -1), "air": (-1, -0.95), "lung and fat": (-0.95, -0.16), "soft": (-0.16, 0.24), "bone": (0.24, 9),
}  # fmt: skip
FIRST = 5000  # the number of the first batch that measures; training has those from 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of the discriminator")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--drawn", type=int, default=16, help="samples of the flow")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    ones = [f"finish.{name}_weight=1" for name in ("adversarial", "feature", "moments", "anchor")]
    game = ["finish.slope_penalty=1", "finish.momentum=0", "finish.adversarial=relativistic"]
    saved = load_config(model_folder(options.model) / "config.yaml")
    cfg = with_overrides(saved, [*game, f"finish.drawn={options.drawn}", *options.settings, *ones])
    data, model = Dataset.open(options.dataset), load(options.model)
    assert cfg.data.shape is not None
    assert cfg.data.patch is not None
    groups = TrainingGroups(data, data.groups("train"), cfg.data, cfg.data.shape)
    network, soft = model.network.float(), Reconstruction(cfg.autoencoder, cfg.data.window_hu).soft
    network.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        samples = DrawnLatents(Path(folder), cfg, network.cfg.grid)
        samples.draw(model)
        torch.manual_seed(0)
        pair = FinishedPair(network.decoder, PatchDiscriminator(cfg.finish.discriminator_width, soft), soft)
        for module in (network, pair):
            place(module, torch.device("cpu"))
        objective, tell = FinishObjective(network, pair, cfg), DiscriminatorObjective(pair.discriminator, cfg.finish)
        judge = build_judge(pair.discriminator, cfg.finish)

        def decoded(step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            x, drawn = groups.batch(1, cfg.seed, step), samples.batch(1, cfg.data.patch, cfg.seed, step)
            with torch.autocast("cpu", torch.bfloat16):
                y, terms = objective(x, drawn, generator(cfg.seed, step))
            return x, y, terms

        for step in range(options.steps):
            x, y, _ = decoded(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = tell(x, y.detach(), generator(cfg.seed, step, stream=43))
            judge.zero_grad()
            loss.backward()
            judge.step()
        print(f"discriminator: {loss.item():.3f} after {options.steps} steps\n")

        network.decoder.requires_grad_(True)
        pair.discriminator.requires_grad_(False)
        parameters = list(network.decoder.parameters())
        found: dict[str, list[Tensor]] = {}
        shares: dict[str, list[float]] = {name: [] for name in TISSUES}
        for step in range(FIRST, FIRST + options.batches):
            _, y, terms = decoded(step)
            (slope,) = torch.autograd.grad(terms["adversarial"], y, retain_graph=True)
            for name, (low, high) in TISSUES.items():
                shares[name].append((slope[(y > low) & (y <= high)].square().sum() / slope.square().sum()).item())
            for name, value in terms.items():
                parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                found.setdefault(name, []).append(torch.cat([part.flatten() for part in parts if part is not None]))
    print("| loss, at weight 1 | norm within a batch | of the mean over batches |\n|---|---|---|")
    for name, gradients in found.items():
        together = torch.stack(gradients).mean(0).norm().item()
        print(f"| {name} | {fmean(one.norm().item() for one in gradients):.3f} | {together:.3f} |")
    print("\nadversarial, by where: " + ", ".join(f"{name} {fmean(values):.2f}" for name, values in shares.items()))


if __name__ == "__main__":
    main()
