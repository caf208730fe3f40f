"""Train the feature network that `ctvae evaluate` ships, on real CT and without labels.

    python benchmarks/train_feature_network.py shared/data dataset/dataset.json --out src/ctvae/evaluation/features.safetensors

DATA holds the folders of index.csv; of `headneck` only the training patients of the dataset are used, so that its
validation and test patients stay unseen, and of the torso folders only scans whose licence lets derived weights be
handed on (CC BY). Slabs of 120 mm with the whole cross-section are drawn, and three questions are asked of each:

* was it flipped: left-right, front-back, head-foot (three yes-or-no questions, chance 1/2)?
* where along the scan was it taken, from 0 (lowest) to 1?
* which other slab of the batch is of the same patient, within 25 mm (InfoNCE, van den Oord et al. 2018)?

Blur and noise are not among the random changes, so the features keep feeling them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ctvae import nifti
from ctvae.evaluation.network import FEATURES, SPACING_MM, FeatureNetwork, prepared

SLAB = (24, 56, 96)  # voxels of 5 mm
NEAR_SLICES = 5
BATCH = 24  # patients; two slabs of each
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Scan:
    """A whole scan at 5 mm, x and body mask [d h w]."""

    name: str
    x: Tensor
    body: Tensor


class Heads(nn.Module):
    """The three questions, each asked of the features; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.flips = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 3))
        self.place = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 1))
        self.same = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 32))


def allowed(data: Path, dataset: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on, and the held-out headneck files that training is checked on."""
    split = {scan["source"]: scan["split"] for scan in json.loads(dataset.read_text())["scans"]}
    rows = list(csv.DictReader((data / "index.csv").open()))
    files = {row["case"]: data / row["group"] / f"{row['case']}.nii.gz" for row in rows}
    headneck = [row["case"] for row in rows if row["group"] == "headneck"]
    train = [case for case in headneck if split.get(f"{case}.nii.gz") == "train"]
    free = re.compile(r"CC BY(?!-)")
    train += [row["case"] for row in rows if row["group"].startswith("torso") and free.search(row["data_licence"])]
    held_out = [case for case in headneck if split.get(f"{case}.nii.gz") in ("validation", "test")]
    return [files[case] for case in train], [files[case] for case in held_out]


def read(path: Path) -> Scan:
    volume = nifti.read(path)[0]
    return Scan(path.name.removesuffix(".nii.gz"), *prepared(volume.hu, volume.spacing_mm))


def slab(scan: Scan, start: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """SLAB voxels from slice `start`, in plane around the body's middle, moved by up to 2 voxels and 10 HU; air outside."""
    body = scan.body[start : start + SLAB[0]]
    rows, columns = (np.flatnonzero(body.amax(dim=axes).numpy()) for axes in ((0, 2), (0, 1)))
    x, mask = torch.full(SLAB, -1.0), torch.zeros(SLAB)
    take, put = [slice(start, start + len(body))], [slice(0, len(body))]
    for inside, size, wanted in ((rows, body.shape[1], SLAB[1]), (columns, body.shape[2], SLAB[2])):
        middle = (inside[0] + inside[-1]) // 2 if len(inside) else size // 2
        low = int(middle) - wanted // 2 + int(rng.integers(-2, 3))
        take.append(slice(max(low, 0), min(low + wanted, size)))
        put.append(slice(max(-low, 0), max(-low, 0) + take[-1].stop - take[-1].start))
    x[tuple(put)] = (scan.x[tuple(take)] + float(rng.normal(0, 0.01))).clamp(-1, 1)
    mask[tuple(put)] = scan.body[tuple(take)]
    return x, mask


def batch(scans: list[Scan], rng: np.random.Generator) -> dict[str, Tensor]:
    """Two slabs of each of BATCH patients: x, body [2B 1 D H W], flips [2B 3], place [2B]."""
    chosen = rng.choice(len(scans), min(BATCH, len(scans)), replace=False)
    xs, bodies, flips, places = [], [], [], []
    starts = {int(i): int(rng.integers(max(len(scans[i].x) - SLAB[0], 0) + 1)) for i in chosen}
    for view in range(2):
        for i in starts:
            last = max(len(scans[i].x) - SLAB[0], 0)
            start = starts[i] if view == 0 else int(np.clip(starts[i] + rng.integers(-NEAR_SLICES, NEAR_SLICES + 1), 0, last))
            flip = rng.random(3) < 0.5
            x, body = slab(scans[i], start, rng)
            axes = [axis for axis, yes in zip((2, 1, 0), flip, strict=True) if yes]
            xs.append(x.flip(axes))
            bodies.append(body.flip(axes))
            flips.append(flip)
            places.append((start + SLAB[0] / 2) / max(len(scans[i].x), SLAB[0]))
    return {
        "x": torch.stack(xs)[:, None],
        "body": torch.stack(bodies)[:, None],
        "flips": torch.from_numpy(np.array(flips, dtype=np.float32)),
        "place": torch.tensor(places, dtype=torch.float32),
    }


def answers(network: FeatureNetwork, heads: Heads, drawn: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss, and for each question how well it was answered."""
    features = network(drawn["x"], drawn["body"])  # [2B F]
    flips, place = heads.flips(features), heads.place(features)[:, 0]  # [2B 3], [2B]
    key = F.normalize(heads.same(features), dim=1)
    likeness = key @ key.T / TEMPERATURE
    likeness.fill_diagonal_(-torch.inf)
    half = len(key) // 2
    partner = torch.arange(2 * half).roll(half)
    losses = (
        F.binary_cross_entropy_with_logits(flips, drawn["flips"]),
        F.mse_loss(place, drawn["place"]) * 10,
        F.cross_entropy(likeness, partner) * 0.3,
    )
    right = ((flips > 0) == (drawn["flips"] > 0.5)).float().mean(dim=0)
    told = {"left_right": right[0].item(), "front_back": right[1].item(), "head_foot": right[2].item()}
    told["place_error"] = (place - drawn["place"]).abs().mean().item()
    told["same_patient"] = (likeness.argmax(dim=1) == partner).float().mean().item()
    return sum(losses, torch.zeros(())), told


def check(network: FeatureNetwork, heads: Heads, scans: list[Scan], batches: int = 10) -> dict[str, float]:
    """The same questions about patients that were not trained on."""
    network.eval(), heads.eval()
    with torch.inference_mode():
        told = [answers(network, heads, batch(scans, np.random.default_rng([7, i])))[1] for i in range(batches)]
    network.train(), heads.train()
    return {key: round(float(np.mean([t[key] for t in told])), 3) for key in told[0]}


def train(scans: list[Scan], held_out: list[Scan], steps: int, minutes: float, seed: int) -> tuple[FeatureNetwork, dict]:
    torch.manual_seed(seed)
    network, heads = FeatureNetwork(), Heads()
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.02)
    begun = time.process_time()
    for step in range(steps):
        share = max(step / steps, (time.process_time() - begun) / 60 / minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * share))
        loss, told = answers(network, heads, batch(scans, np.random.default_rng([seed, step])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            said = " ".join(f"{key} {value:.2f}" for key, value in told.items())
            print(f"{step} {time.process_time() - begun:.0f} s loss {loss.item():.3f} {said}", flush=True)
        if step % 250 == 249:
            print("   held out", check(network, heads, held_out), flush=True)
    told = {"steps": step + 1, "cpu_minutes": round((time.process_time() - begun) / 60, 1), **check(network, heads, held_out)}
    return network.eval(), told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("dataset", type=Path, help="dataset.json of `ctvae prepare headneck`, for its split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=15, help="of processor time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    files, unseen = allowed(asked.data, asked.dataset)
    print(f"{len(files)} scans to train on, {len(unseen)} held out, {SPACING_MM[0]:g} mm", flush=True)
    network, told = train([read(f) for f in files], [read(f) for f in unseen], asked.steps, asked.minutes, asked.seed)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, asked.out, metadata={"scans": str(len(files)), "seed": str(asked.seed)})
    print(json.dumps({"files": [f.name for f in files if "headneck" not in f.name], "scans": len(files), **told}, indent=1))


if __name__ == "__main__":
    main()
