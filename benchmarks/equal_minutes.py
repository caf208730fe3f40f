"""Held-out PSNR after equal minutes of training, and after equal steps: `wavelet3d` against MONAI's AutoencoderKL.

    python benchmarks/equal_minutes.py DATASET --minutes 30 --out FOLDER
    python benchmarks/equal_minutes.py DATASET --minutes 30 --out FOLDER --only AutoencoderKL

Both train on the same patches of the same groups, in the same order, with the same losses, optimiser, precision and batch; the
cosine of the learning rate runs over each one's own minutes, of which reading, validation and start are no part. `equal steps` is
`wavelet3d` trained from the beginning for as many steps as the peer came to. Judged are the averaged weights on the test groups,
on the middle 64 x 128 x 128 voxels of each (`--crop`), -1000..1000 HU, ours also on whole groups, once more with latents refined
for each if `--refine` says so (`ctvae/refine.py`), and on those it was trained on. What is in FOLDER is not measured again.
The peer (`step_speed.Peer`) has MAISI's sizes and as many latent numbers per voxel. Its optimiser is the better of ours and of
Adam at MAISI's 1e-4 in a pilot of `--pilot` steps. With `--start` our network alone goes on from earlier weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from step_speed import Peer
from torch import Tensor, nn

from ctvae.checkpoint import EMA, load, save
from ctvae.config import Config, load_recipe, with_overrides
from ctvae.dataset import Dataset
from ctvae.device import generator, place
from ctvae.evaluation import similarity
from ctvae.models import build
from ctvae.models.autoencoder import Autoencoder
from ctvae.networks import Size3
from ctvae.refine import refined
from ctvae.runlog import Clock
from ctvae.training.autoencoder import Objective
from ctvae.training.groups import TrainingGroups, training_shape
from ctvae.training.optimizer import build_optimizer

REPORT_SECONDS = 120
ADAM = ("autoencoder.optimizer=adam", "autoencoder.lr=1e-4")


def train(
    network: Autoencoder, cfg: Config, groups: TrainingGroups, progress_of: Callable[[int, float], float]
) -> tuple[int, float]:
    """Fit `network` until `progress_of(step, seconds)` is 1, and leave the averaged weights in it: steps and seconds taken."""
    settings = cfg.autoencoder
    place(network, torch.device("cpu"))
    ema, optimizer = EMA(network, settings.ema_decay), build_optimizer(network, settings)
    objective = Objective(network, settings, cfg.data.window_hu)
    clock = Clock(settings, settings.steps, None)  # for its schedule: time is counted here, of the steps alone
    step, seconds, told = 0, 0.0, 0.0
    while (progress := progress_of(step, seconds)) < 1:
        x = groups.batch(settings.batch, cfg.seed, step)
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = clock.lr(step, progress)
        objective.warm(progress)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            terms = objective(x, generator(cfg.seed, step))
        loss = sum(terms.values())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        ema.update(network, step)
        seconds += time.perf_counter() - start
        step += 1
        if seconds - told > REPORT_SECONDS:
            told = seconds
            print(f"  step {step}, {seconds:.0f} s, loss {loss.item():.4f}", flush=True)
    network.load_state_dict(ema.weights)
    return step, seconds


@torch.no_grad()
def judged(network: Autoencoder, groups: TrainingGroups, crop: Size3 | None, refine: int = 0) -> dict[str, list[float]]:
    """PSNR in dB and SSIM of each group, or of its middle, over -1..1, after `refine` steps of descent on its latents."""

    def decode(z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network.decode(z).float()

    network.requires_grad_(False)
    psnrs, ssims = [], []
    for index in range(len(groups)):
        x = groups.plain(index)[None]
        if crop is not None:
            x = middle(x, crop)
        with torch.autocast("cpu", torch.bfloat16):
            z = network.encode(x)[0].float()
        y = decode(refined(decode, z, x, refine) if refine else z).clamp(-1, 1)
        before, after = x[0, 0].numpy(), y[0, 0].numpy()
        psnrs.append(similarity.psnr(before, after, 2.0))
        ssims.append(similarity.ssim(before, after, 2.0))
    return {"psnr_db": psnrs, "ssim": ssims}


def middle(x: Tensor, size: Size3) -> Tensor:
    for axis, side in enumerate(size, start=2):
        side = min(side, x.shape[axis])
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.out = arguments, Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        patch, batch = f"data.patch={list(arguments.patch)}", f"autoencoder.batch={arguments.batch}"
        self.cfg = load_recipe("wavelet3d", [patch, batch, *arguments.settings])
        data = Dataset.open(Path(arguments.dataset))
        shape = training_shape(data, self.cfg)
        self.training, self.test = (TrainingGroups(data, data.groups(split), self.cfg.data, shape) for split in ("train", "test"))

    def measured(self, name: str, measure: Callable[[], dict]) -> dict:
        """What `measure` gives, from the folder if it was measured before."""
        path = self.out / f"{name}.json"
        if not path.exists():
            print(name, flush=True)
            path.write_text(json.dumps({"name": name, **measure()}))
        found: dict = json.loads(path.read_text())
        return found

    def network(self, name: str) -> Autoencoder:
        torch.manual_seed(self.cfg.seed)
        patch = self.cfg.data.patch
        assert patch is not None
        if name == "AutoencoderKL":
            return Peer(patch)
        return build(self.cfg.model, patch)

    def run(self, name: str, progress_of: Callable[[int, float], float], cfg: Config, label: str) -> dict:
        network = self.network(name)
        if self.arguments.start:
            network.load_state_dict(load(Path(self.arguments.start))[0])
        start = time.perf_counter()
        steps, seconds = train(network, cfg, self.training, progress_of)
        waited = time.perf_counter() - start - seconds
        save(self.out / f"{label}.safetensors", network.state_dict(), {"config": cfg.model_dump(mode="json")})
        return {
            "steps": steps,
            "seconds": seconds,
            "reading_seconds": waited,
            **judged(network, self.test, self.arguments.crop),
        }

    def judge(self, label: str, groups: TrainingGroups, crop: Size3 | None, refine: int = 0) -> dict:
        """A network that was trained before."""
        network = self.network("wavelet3d")
        network.load_state_dict(load(self.out / f"{label}.safetensors")[0])
        return judged(network, groups, crop, refine)

    def pilot(self, cfg: Config, label: str) -> dict:
        return self.run("AutoencoderKL", lambda step, _: step / self.arguments.pilot, cfg, label)

    def peer_config(self) -> Config:
        """Ours, or with Adam at MAISI's learning rate, whichever reconstructs better after the pilot."""
        if not self.arguments.pilot:
            return self.cfg
        tried = {"ours": self.cfg, "adam": with_overrides(self.cfg, ADAM)}
        results = {
            label: self.measured(f"pilot-{label}", partial(self.pilot, cfg, f"pilot-{label}")) for label, cfg in tried.items()
        }
        return tried[max(results, key=lambda label: fmean(results[label]["psnr_db"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--crop", type=int, nargs=3, default=(64, 128, 128), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pilot", type=int, default=0, help="steps of the peer's pilot; 0: none, our optimiser")
    parser.add_argument("--start", metavar="FILE", help="weights of an earlier wavelet3d of the same sizes to go on from")
    parser.add_argument("--refine", type=int, default=0, help="steps of descent on the latents of whole groups, judged besides")
    parser.add_argument("--only", choices=("wavelet3d", "AutoencoderKL"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as for ctvae train")
    arguments = parser.parse_args()
    if arguments.start and arguments.only != "wavelet3d":
        parser.error("--start is for --only wavelet3d: nothing is equal with a start of one alone")
    bench = Bench(arguments)
    budget, only = 60 * bench.arguments.minutes, bench.arguments.only
    rows = []
    if only != "AutoencoderKL":
        rows.append(bench.measured("wavelet3d", lambda: bench.run("wavelet3d", lambda _, s: s / budget, bench.cfg, "wavelet3d")))
    if only != "wavelet3d":
        cfg = bench.peer_config()
        rows.append(
            bench.measured("AutoencoderKL", lambda: bench.run("AutoencoderKL", lambda _, s: s / budget, cfg, "AutoencoderKL"))
        )
    if only is None:
        steps, label = rows[1]["steps"], "wavelet3d, equal steps"
        rows.append(bench.measured(label, lambda: bench.run("wavelet3d", lambda step, _: step / steps, bench.cfg, "equal-steps")))
    patch = "x".join(map(str, bench.cfg.data.patch or ()))
    batch = bench.cfg.autoencoder.batch
    print(f"patches of {patch}, batch {batch}, {torch.get_num_threads()} threads, {len(bench.test)} test groups")
    print("| network | steps | minutes | PSNR dB, mean | of each group |\n|---|---|---|---|---|")
    for row in rows:
        each = ", ".join(f"{value:.1f}" for value in row["psnr_db"])
        print(f"| {row['name']} | {row['steps']} | {row['seconds'] / 60:.1f} | {fmean(row['psnr_db']):.2f} | {each} |")

    if only != "AutoencoderKL":
        whole = bench.measured("wavelet3d, whole groups", lambda: bench.judge("wavelet3d", bench.test, None))
        crop = bench.arguments.crop
        seen = bench.measured("wavelet3d, training groups", lambda: bench.judge("wavelet3d", bench.training, crop))
        print(f"wavelet3d on the groups it was trained on: {fmean(seen['psnr_db']):.2f} dB")
        print(f"\nwavelet3d on whole groups: {fmean(whole['psnr_db']):.2f} dB, SSIM {fmean(whole['ssim']):.3f}")
        if steps := bench.arguments.refine:
            label = f"wavelet3d, whole groups, refined {steps}"
            found = bench.measured(label, lambda: bench.judge("wavelet3d", bench.test, None, steps))
            print(f"after {steps} steps of descent: {fmean(found['psnr_db']):.2f} dB, SSIM {fmean(found['ssim']):.3f}")


if __name__ == "__main__":
    main()
