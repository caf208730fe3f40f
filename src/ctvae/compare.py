"""The verb `compare`: every named method, trained for the same time on the same patients, side by side.

    OUT/runs/<method>/                 the run folder
    OUT/synthetic/<method>-<prior>/    its samples
    OUT/report/                        one report on all of them, ranked
    OUT/measured/                      what was measured of each scan
    OUT/compare.json, table.md, compare.png, index.html
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctvae import files, nifti, pictures
from ctvae.config import WINDOW_PRESETS_HU, load_recipe
from ctvae.dataset import Dataset
from ctvae.errors import ConfigError
from ctvae.evaluation.evaluate import evaluate
from ctvae.generate import Model, generate, load
from ctvae.progress import Progress
from ctvae.training.train import train
from ctvae.volume import Volume

PRIORS = ("normal", "flow")  # what the group sampled, and ours
SHOWN = 2  # samples of each prior in the picture
COLUMNS = {  # of the table: heading, measure, decimals
    "Classifier AUC": ("classifier_layout", 2),
    "Frechet": ("frechet_layout", 0),
    "HU histogram": ("hu_histogram", 0),
    "Slice change": ("slice_continuity", 2),
}
HEADS = ["Method", "Parameters", "PSNR dB", "SSIM", "Body error HU", *COLUMNS, "Score", "Rank"]


def compare(
    dataset: Path | str,
    methods: Sequence[str],
    minutes: float,
    out: Path | str,
    *,
    overrides: Sequence[str] = (),
    count: int = 8,
    seed: int = 0,
) -> Path:
    """Train each of `methods` for `minutes` (both stages together), sample two priors, judge and rank all in one report.

    Returns the page OUT/index.html. Called again it goes on where it stopped; finished runs are kept. Raises ConfigError
    for an unknown method before anything is trained.
    """
    names = list(dict.fromkeys(methods))
    if not names:
        raise ConfigError("no methods to compare; name some, e.g. --methods slice2d,wavelet3d (`ctvae methods` lists them)")
    for name in names:
        load_recipe(name, overrides)
    data, folder = Dataset.open(Path(dataset)), Path(out)
    for name in names:
        train(dataset, folder / "runs" / name, method=name, overrides=overrides, minutes=minutes)
        for prior in PRIORS:
            generate(folder / "runs" / name, _samples(folder, name, prior), count=count, seed=seed, prior=prior)
    models = {name: load(folder / "runs" / name) for name in names}
    report = _judged(models, data, folder, seed)
    rows = [_row(name, models[name], folder, report) for name in names]
    _write(rows, [(name, _columns(name, models[name], data, folder, seed)) for name in names], data, folder, minutes)
    return folder / "index.html"


def _samples(folder: Path, method: str, prior: str) -> Path:
    return folder / "synthetic" / f"{method}-{prior}"


def _judged(models: dict[str, Model], data: Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """One report on all methods and priors."""
    with Progress("judge") as bar:
        return evaluate(
            data.folder, [_samples(folder, name, prior) for name in models for prior in PRIORS], folder / "report",
            reconstruct={name: model.reconstruct_volume for name, model in models.items()}, seed=seed, format="md",
            cache=folder / "measured", progress=bar.report,
        )  # fmt: skip


def _columns(name: str, model: Model, data: Dataset, folder: Path, seed: int) -> list[tuple[str, Volume]]:
    """A held-out scan, its reconstruction, and samples of each prior."""
    held_out = data.groups("test") or data.groups("validation") or data.groups("train")
    scan = data.volume(held_out[len(held_out) // 2])
    columns = [("held-out scan", scan), ("reconstructed", model.reconstruct_volume(scan))]
    for prior in PRIORS:
        for index in range(SHOWN):
            path = folder / "synthetic" / f"{name}-{prior}" / f"synthetic-{seed}-{index:04d}.nii.gz"
            if path.exists():
                columns.append((f"generated, {prior}", nifti.read(path)[0]))
    return columns


def _write(
    rows: list[dict[str, Any]], columns: list[tuple[str, list[tuple[str, Volume]]]], data: Dataset, folder: Path, minutes: float
) -> None:
    files.write_json(folder / "compare.json", {"minutes": minutes, "dataset": data.fingerprint, "methods": rows})
    files.write_text(folder / "table.md", markdown(rows))
    picture = folder / "compare.png"
    pictures.bands(columns, picture, WINDOW_PRESETS_HU["full"])
    files.write_text(folder / "index.html", _page(rows, picture, minutes))


def _row(name: str, model: Model, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    stage = json.loads((folder / "runs" / name / "run.json").read_text())["stages"]["autoencoder"]
    full = report["reconstructions"][name]["windows"]["full"]
    sets = {entry["name"]: entry for entry in report["sets"]}
    places = {entry["name"]: entry for entry in report["ranking"]}
    return {
        "method": name,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "autoencoder_steps": stage["steps"],
        "autoencoder_seconds": stage["seconds"],
        "psnr_db": full["psnr_db"]["mean"],
        "ssim": full["ssim"].get("mean"),
        "mae_body_hu": full["mae_body_hu"]["mean"],
        "generated": {p: {key: _figure(sets[f"{name}-{p}"], key) for key, _ in COLUMNS.values()} for p in PRIORS},
        "ranked": {p: places[f"{name}-{p}"] for p in PRIORS},
        "headlines": {p: sets[f"{name}-{p}"]["verdict"]["headline"] for p in PRIORS},
    }


def _figure(judged: dict[str, Any], measure: str) -> dict[str, Any] | None:
    entry = next((m for m in judged["measures"] if m["id"] == measure and m["status"] == "ok"), None)
    return entry and {"value": entry["value"], "floor": [entry["floor"]["low"], entry["floor"]["high"]]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: reconstruction of held-out scans, then each measure of generated scans as `normal / flow`."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in rows:
        ssim = "" if row["ssim"] is None else f"{row['ssim']:.3f}"
        cells = [row["method"], f"{row['parameters'] / 1e6:.1f} M", f"{row['psnr_db']:.1f}", ssim, f"{row['mae_body_hu']:.0f}"]
        cells += [_both(row["generated"], key, decimals) for key, decimals in COLUMNS.values()]
        cells += [" / ".join(_score(row["ranked"][prior]) for prior in PRIORS)]
        cells += [" / ".join(str(row["ranked"][prior]["rank"] or "too few") for prior in PRIORS)]
        lines.append(f"| {' | '.join(cells)} |")
    floors = [_floor(rows, key, decimals) for key, decimals in COLUMNS.values()]
    lines.append(f"| {' | '.join(['real against real', '', '', '', '', *floors, '', ''])} |")
    return "\n".join(lines) + "\n"


def _score(ranked: dict[str, Any]) -> str:
    if ranked["score"] is None:
        return "too few"
    low, high = ranked["interval"]
    return f"{ranked['score']:.1f} ({low:.1f} to {high:.1f})"


def _both(generated: dict[str, Any], key: str, decimals: int) -> str:
    values = [generated[prior][key] for prior in PRIORS]
    return " / ".join("too few" if value is None else f"{value['value']:.{decimals}f}" for value in values)


def _floor(rows: Sequence[dict[str, Any]], key: str, decimals: int) -> str:
    floors = [row["generated"]["flow"][key]["floor"] for row in rows if row["generated"]["flow"][key]]
    return f"{floors[0][0]:.{decimals}f} to {floors[0][1]:.{decimals}f}" if floors else ""


def _page(rows: Sequence[dict[str, Any]], picture: Path, minutes: float) -> str:
    """A self-contained page: the table, the picture, and links to each report."""
    _, _, *body = markdown(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in cells)
    said = "".join(
        f"<li>{html.escape(row['method'])}, {prior}: {html.escape(text)}</li>\n"
        for row in rows
        for prior, text in row["headlines"].items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ctvae: methods compared</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .4rem .8rem; text-align: left; }}
img {{ width: 100%; background: #000; border-radius: 6px; }}
</style></head><body>
<h1>{len(rows)} methods, {minutes:g} minutes of training each</h1>
<p>Reconstruction (PSNR, SSIM, error) is of held-out scans, -1000 to 1000 HU. Generated scans are judged against held-out
patients; each cell gives latents drawn from N(0, I) / from the learned flow. The last row is what real scans of other
patients get. The score is how far samples are from real scans in half-widths of the floors, with its 95 % interval; ranks are
over all methods and priors.</p>
<table><tr>{"".join(f"<th>{html.escape(head)}</th>" for head in HEADS)}</tr>
{table}</table>
<img src="{pictures.data_uri(picture)}" alt="A held-out scan, its reconstruction and generated scans, a band for each method">
<h2>In words</h2><ul>{said}</ul>
<p>Every measure with its floor, interval and pictures is in <a href="report/index.html">the report</a>.</p>
</body></html>
"""
