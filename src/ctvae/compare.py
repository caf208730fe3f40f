"""The verb `compare`: every named method, trained for the same time on the same patients, side by side.

    OUT/runs/<method>/                 the run folder
    OUT/synthetic/<method>-<prior>/    its samples
    OUT/reports/<method>-<prior>/      their report
    OUT/measured/                      what was measured of each scan, shared by the reports
    OUT/compare.json, table.md, compare.png, index.html
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Result:
    """One method's figures and pictures."""

    method: str
    parameters: int
    steps: int
    seconds: int
    reconstruction: dict[str, Any]
    reports: dict[str, dict[str, Any]]  # by prior
    columns: list[tuple[str, Volume]]


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
    """Train each of `methods` for `minutes` (both stages together), sample two priors, judge all on held-out patients.

    Returns the page OUT/index.html. Called again it goes on where it stopped; finished runs are kept. Raises ConfigError
    for an unknown method before anything is trained.
    """
    names = list(dict.fromkeys(methods))
    if not names:
        raise ConfigError("no methods to compare; name some, e.g. --methods slice2d,wavelet3d (`ctvae methods` lists them)")
    for name in names:
        load_recipe(name, overrides)
    data, folder = Dataset.open(Path(dataset)), Path(out)
    results = []
    for name in names:
        train(dataset, folder / "runs" / name, method=name, overrides=overrides, minutes=minutes)
        results.append(_judge(name, data, folder, count, seed))
    _write(results, data, folder, minutes)
    return folder / "index.html"


def _judge(name: str, data: Dataset, folder: Path, count: int, seed: int) -> Result:
    run = folder / "runs" / name
    model = load(run)
    reports = {prior: _report(run, model, data, prior, (folder, count, seed)) for prior in PRIORS}
    state = json.loads((run / "run.json").read_text())["stages"]
    return Result(
        method=name,
        parameters=sum(p.numel() for p in model.network.parameters()),
        steps=state["autoencoder"]["steps"],
        seconds=state["autoencoder"]["seconds"],
        reconstruction=reports["flow"]["reconstruction"],
        reports=reports,
        columns=_columns(name, model, data, folder, seed),
    )


def _report(run: Path, model: Model, data: Dataset, prior: str, where: tuple[Path, int, int]) -> dict[str, Any]:
    """The samples of one prior, generated and judged; a report that is there already is read instead."""
    folder, count, seed = where
    name = f"{run.name}-{prior}"
    report = folder / "reports" / name / "report.json"
    if not report.exists():
        generate(run, folder / "synthetic" / name, count=count, seed=seed, prior=prior)
        with Progress(f"judge {name}") as bar:
            evaluate(
                data.folder, folder / "synthetic" / name, report.parent,
                reconstruct=model.reconstruct_volume if prior == "flow" else None, seed=seed,
                cache=folder / "measured", progress=bar.report,
            )  # fmt: skip
    return json.loads(report.read_text())


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


def _write(results: list[Result], data: Dataset, folder: Path, minutes: float) -> None:
    rows = [_row(result) for result in results]
    files.write_json(folder / "compare.json", {"minutes": minutes, "dataset": data.fingerprint, "methods": rows})
    table = markdown(rows)
    files.write_text(folder / "table.md", table)
    picture = folder / "compare.png"
    pictures.bands([(result.method, result.columns) for result in results], picture, WINDOW_PRESETS_HU["full"])
    files.write_text(folder / "index.html", _page(rows, picture, minutes))


def _row(result: Result) -> dict[str, Any]:
    full = result.reconstruction["windows"]["full"]
    generated = {prior: {key: _figure(report, key) for key, _ in COLUMNS.values()} for prior, report in result.reports.items()}
    return {
        "method": result.method,
        "parameters": result.parameters,
        "autoencoder_steps": result.steps,
        "autoencoder_seconds": result.seconds,
        "psnr_db": full["psnr_db"]["mean"],
        "ssim": full["ssim"].get("mean"),
        "mae_body_hu": full["mae_body_hu"]["mean"],
        "generated": generated,
        "headlines": {prior: report["verdict"]["headline"] for prior, report in result.reports.items()},
    }


def _figure(report: dict[str, Any], measure: str) -> dict[str, Any] | None:
    entry = next((m for m in report["measures"] if m["id"] == measure and m["status"] == "ok"), None)
    return entry and {"value": entry["value"], "floor": [entry["floor"]["low"], entry["floor"]["high"]]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: reconstruction of held-out scans, then each measure of generated scans as `normal / flow`."""
    heads = ["Method", "Parameters", "PSNR dB", "SSIM", "Body error HU", *COLUMNS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        ssim = "" if row["ssim"] is None else f"{row['ssim']:.3f}"
        cells = [row["method"], f"{row['parameters'] / 1e6:.1f} M", f"{row['psnr_db']:.1f}", ssim, f"{row['mae_body_hu']:.0f}"]
        cells += [_both(row["generated"], key, decimals) for key, decimals in COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    floors = [_floor(rows, key, decimals) for key, decimals in COLUMNS.values()]
    lines.append(f"| {' | '.join(['real against real', '', '', '', '', *floors])} |")
    return "\n".join(lines) + "\n"


def _both(generated: dict[str, Any], key: str, decimals: int) -> str:
    values = [generated[prior][key] for prior in PRIORS]
    return " / ".join("too few" if value is None else f"{value['value']:.{decimals}f}" for value in values)


def _floor(rows: Sequence[dict[str, Any]], key: str, decimals: int) -> str:
    floors = [row["generated"]["flow"][key]["floor"] for row in rows if row["generated"]["flow"][key]]
    return f"{floors[0][0]:.{decimals}f} to {floors[0][1]:.{decimals}f}" if floors else ""


def _page(rows: Sequence[dict[str, Any]], picture: Path, minutes: float) -> str:
    """A self-contained page: the table, the picture, and links to each report."""
    _, _, *body = markdown(rows).splitlines()
    heads = ["Method", "Parameters", "PSNR dB", "SSIM", "Body error HU", *COLUMNS]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in cells)
    links = "".join(
        f'<li><a href="reports/{row["method"]}-{prior}/index.html">{row["method"]}, {prior}</a>: {html.escape(text)}</li>\n'
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
patients get.</p>
<table><tr>{"".join(f"<th>{html.escape(head)}</th>" for head in heads)}</tr>
{table}</table>
<img src="{pictures.data_uri(picture)}" alt="A held-out scan, its reconstruction and generated scans, a band for each method">
<h2>Reports</h2><ul>{links}</ul>
</body></html>
"""
