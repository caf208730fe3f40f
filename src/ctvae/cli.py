"""The command line. Every command parses, calls one documented function, prints.

Nothing heavy is imported up here, so that `ctvae --help` answers at once; each command imports what it calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ctvae import options
from ctvae.options import Count, DatasetArgument, ModelArgument, Out, ScanArgument, Seed, Settings, Window

app = typer.Typer(
    help="From a folder of CT scans to a model that generates synthetic 3D CT scans.\n\n"
    "scans --prepare--> dataset --train--> run --generate--> synthetic scans --evaluate--> report",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SHARED = ("train", "generate")  # what torchrun may start


@app.callback(invoke_without_command=True)
def ctvae(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from ctvae.version import __version__

        typer.echo(f"ctvae {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand not in SHARED:
        from ctvae.ranks import refuse_several

        refuse_several(context.invoked_subcommand)


@app.command()
def prepare(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="NIfTI files, folders of them, DICOM folders.")
    ],
    out: Out,
    slices: Annotated[int, typer.Option(min=1, help="Axial slices per group.")] = 64,
    size: Annotated[str, typer.Option(help="Rows and columns to resample to, e.g. 256, or native.")] = "native",
    rest: options.Rest = "overlap",
    stride: options.Stride = None,
    labels: options.Labels = None,
    crop_body: Annotated[bool, typer.Option("--crop-body", help="Cut the air around the body away.")] = False,
    patient_pattern: options.PatientPattern = None,
    patient_csv: Annotated[Path | None, typer.Option(help="CSV with the columns scan and patient.")] = None,
    patients_of: options.PatientsOf = None,
    fractions: Annotated[str, typer.Option(help="Shares of patients for training, validation, test.")] = "0.8,0.1,0.1",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per core]")] = None,
    seed: Seed = 0,
) -> None:
    """Turn scans into a dataset, split by patient.

    Scans that cannot be used are listed with the reason, and the rest goes on.

    Example: ctvae prepare scans --out dataset --slices 64 --crop-body
    """
    shares, side = options.fractions(fractions), options.size(size)
    from ctvae.prepare import prepare, told
    from ctvae.progress import Progress

    with Progress("prepare") as bar:
        dataset = prepare(
            sources, out, slices=slices, size=side, rest=rest, stride=stride, labels=labels, crop_body=crop_body,
            patient_pattern=patient_pattern, patient_csv=patient_csv, fractions=shares, workers=workers,
            seed=seed, patients_of=patients_of, progress=bar.report,
        )  # fmt: skip
    for line in told(dataset.summary):
        typer.echo(line)
    _next(f"ctvae train {out} --out RUN")


@app.command()
def train(
    dataset: DatasetArgument,
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(help="Which recipe; `ctvae methods` lists them. [default: the run's own, else wavelet3d]"),
    ] = None,
    stage: Annotated[
        Literal["autoencoder", "prior", "finish", "calibration", "both"], typer.Option(help="What to train; both: all of it.")
    ] = "both",
    settings: Settings = None,
    window: Window = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Training time of both stages together, at most. [default: the recipe's steps]"),
    ] = None,
    hours: options.TrainingHours = None,
    plan: Annotated[Path | None, typer.Option(help="Settings from a plan.yaml that `ctvae plan` wrote.")] = None,
    memory: options.TrainingMemory = None,
    conditions: options.Table = None,
    start: options.Start = None,
) -> None:
    """Train an autoencoder, then its priors.

    The same command again goes on where it stopped.

    Example: ctvae train dataset --out run --minutes 60
    """
    from ctvae.planning.sizes import parse_memory
    from ctvae.ranks import is_first
    from ctvae.training.train import train

    run = train(
        dataset, out, method=method, stage=stage, overrides=options.overrides(settings, window), minutes=minutes, hours=hours,
        plan=plan, memory_gb=parse_memory(memory) if memory else None, conditions=conditions, start=start,
    )  # fmt: skip
    if not is_first():
        return
    typer.echo(run)
    if stage in ("prior", "both"):
        _next(f"ctvae generate {run} --out DIR -n 4")


@app.command()
def plan(
    dataset: Annotated[Path | None, typer.Argument(metavar="[DATASET]", help="Take size and spacing from it.")] = None,
    method: Annotated[str, typer.Option(help="Which recipe; `ctvae methods` lists them.")] = "wavelet3d",
    size: Annotated[
        str | None, typer.Option(help="Slices x rows x columns, e.g. 64x512x512. [default: the dataset's largest group]")
    ] = None,
    memory: options.Memory = None,
    settings: Settings = None,
    window: Window = None,
    hours: options.Hours = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write the settings to, e.g. plan.yaml.")] = None,
) -> None:
    """Say what fits the memory, before training.

    Counts on tensors that have shapes and no memory: no GPU is needed, and without --hours nothing is trained. Where what
    was asked does not fit, it changes batch, checkpointing or patch until it does.

    Example: ctvae plan --method wavelet3d --size 64x512x512 --memory 24GB
    """
    import json

    from ctvae import planner
    from ctvae.errors import DoesNotFit
    from ctvae.planning import planfile, report
    from ctvae.planning.sizes import parse_memory

    available_gb = parse_memory(memory) if memory else planner.machine_memory_gb()
    source = planner.Source.asked(dataset, size)
    try:
        found = planner.weigh(
            method, source, available_gb, options.overrides(settings, window), elsewhere=bool(memory) and not hours
        )
    except DoesNotFit as refusal:
        if as_json:
            typer.echo(json.dumps(report.refusal_json(method, source.size, available_gb, str(refusal))))
        raise
    if hours and found.fits:
        found = planner.with_hours(found, hours)
    if as_json:
        typer.echo(json.dumps(report.as_json(found)))
    if not found.fits:
        raise DoesNotFit(found.note)
    if out:
        planfile.write_plan(found, out)
    if not as_json:
        typer.echo(report.as_text(found))


@app.command()
def methods() -> None:
    """List the methods that `--method` knows."""
    from ctvae.config import RECIPES, recipe_names

    for name in recipe_names():
        first_line = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<16}{first_line.lstrip('# ').removeprefix(f'{name}: ')}")


@app.command()
def generate(
    model: ModelArgument,
    out: Out,
    count: Count = 4,
    seed: Seed = 0,
    prior: Annotated[
        Literal["flow", "gaussian", "mixture", "normal"], typer.Option(help="Where the latents are drawn from.")
    ] = "flow",
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps of the flow. [default: the model's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    solver: options.Solver = None,
    schedule: options.Schedule = None,
    guidance: options.Guidance = None,
    autoguidance: options.Autoguidance = None,
    rescale: options.Rescale = None,
    kept_noise: options.KeptNoise = None,
    grain: options.Grain = None,
    condition: options.Conditions = None,
    slices: options.SlicesOfVolume = None,
) -> None:
    """Generate synthetic scans.

    Writes NIfTI in HU with true spacing, a JSON sidecar each saying where it came from, and a contact sheet. Conditions that are
    not given are drawn from the training scans.

    Example: ctvae generate run --out synthetic -n 16 --seed 100
    """
    from ctvae.generate import generate
    from ctvae.ranks import is_first

    paths = generate(
        model, out, count=count, seed=seed, prior=prior, steps=steps, overwrite=overwrite, solver=solver, guidance=guidance,
        conditions=options.conditions(condition or []), slices=slices, schedule=schedule, autoguidance=autoguidance,
        rescale=rescale, kept_noise=kept_noise, grain=grain,
    )  # fmt: skip
    for path in paths if is_first() else ():
        typer.echo(path)


@app.command()
def reconstruct(
    model: ModelArgument,
    scan: ScanArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="NIfTI file to write.")],
    refine: Annotated[
        int, typer.Option(min=0, max=1000, help="Steps that bring the encoder's latents nearer to this scan; wavelet3d.")
    ] = 0,
) -> None:
    """Encode and decode one scan.

    What comes out has the same shape and the same affine, in HU.

    Example: ctvae reconstruct run scan.nii.gz --out again.nii.gz --refine 20
    """
    from ctvae.generate import reconstruct

    typer.echo(reconstruct(model, scan, out, refine))


@app.command()
def vary(
    model: ModelArgument,
    scan: ScanArgument,
    out: Out,
    alpha: Annotated[float, typer.Option(min=0, help="Distance from the scan, in posterior standard deviations.")] = 0.5,
    count: Count = 4,
    seed: Seed = 0,
) -> None:
    """Make variations of a real scan.

    Decodes mu + alpha * sigma * noise and says how far each came from the scan.

    Example: ctvae vary run scan.nii.gz --alpha 0.5 -n 4 --out variations
    """
    from ctvae.generate import vary

    for path, distance in vary(model, scan, out, alpha=alpha, count=count, seed=seed):
        typer.echo("  ".join([str(path), *(f"{name} {value:.4g}" for name, value in distance.items())]))


@app.command()
def interpolate(
    model: ModelArgument,
    a: Annotated[Path, typer.Argument(metavar="A", help="Scan at one end.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Scan at the other end.")],
    out: Out,
    count: Count = 5,
) -> None:
    """Walk from one scan to another.

    The path is straight in the latent space and includes both ends.

    Example: ctvae interpolate run a.nii.gz b.nii.gz -n 5 --out between
    """
    from ctvae.generate import interpolate

    for path in interpolate(model, a, b, out, count=count):
        typer.echo(path)


@app.command()
def evaluate(
    real: Annotated[Path, typer.Option("--real", metavar="DATASET", help="Dataset to compare with.")],
    synthetic: Annotated[
        list[Path], typer.Option("--synthetic", metavar="DIR", help="Folder of synthetic scans; repeatable, then ranked.")
    ],
    out: Out,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which real patients.")] = "test",
    model: options.JudgedModel = None,
    format: Annotated[Literal["html", "md"], typer.Option(help="md writes report.md as well, for a paper's appendix.")] = "html",
    medicalnet: options.MedicalNet = None,
    cache: options.Cache = None,
    seed: Seed = 0,
) -> None:
    """Judge synthetic scans against real ones.

    Writes report.json and index.html, one self-contained page with pictures, a viewer and a quiz. Several folders of synthetic
    scans are judged in one report and ranked.

    Example: ctvae evaluate --real dataset --synthetic synthetic --model run --out report
    """
    from ctvae.evaluation.evaluate import evaluate
    from ctvae.progress import Progress

    rebuild = None
    if model:
        from ctvae.generate import load

        rebuild = load(model).reconstruct_volume
    with Progress("evaluate") as bar:
        evaluate(
            real, synthetic, out, split=split, reconstruct=rebuild, seed=seed, format=format, medicalnet=medicalnet, cache=cache,
            progress=bar.report,
        )  # fmt: skip
    typer.echo(out / ("report.md" if format == "md" else "index.html"))


@app.command()
def compare(
    dataset: DatasetArgument,
    methods: Annotated[str, typer.Option(metavar="A,B,...", help="Methods to train; `ctvae methods` lists them.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time of each method.")],
    out: Out,
    count: Count = 8,
    settings: Settings = None,
    window: Window = None,
    seed: Seed = 0,
) -> None:
    """Train several methods alike and compare them.

    The same time on the same patients for each; two priors of every method, ranked in one report; one table, one picture.

    Example: ctvae compare dataset --methods slice2d,wavelet3d --minutes 30 --out comparison
    """
    from ctvae.compare import compare

    names = [name.strip() for name in methods.split(",") if name.strip()]
    page = compare(dataset, names, minutes, out, overrides=options.overrides(settings, window), count=count, seed=seed)
    typer.echo((page.parent / "table.md").read_text(encoding="utf-8"))
    typer.echo(page)


@app.command()
def export(
    model: ModelArgument,
    out: Out,
    card: Annotated[Path | None, typer.Option(help="Markdown file that goes along as README.md.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How it draws, e.g. prior.autoguidance=1.3; repeatable."),
    ] = None,
) -> None:
    """Make a small copy of a run to hand on.

    Half-precision weights, no scans or latents (what the flow keeps of them: docs); every command takes the folder as MODEL.

    Example: ctvae export run --out model --card model-card.md
    """
    from ctvae.export import export

    typer.echo(export(model, out, card=card, overrides=settings or []))


@app.command()
def demo(out: Out) -> None:
    """Run the whole path, with no scans needed.

    Draws phantoms, trains on them, generates and judges: about six minutes on two cores, then a page to look at.

    Example: ctvae demo --out demo
    """
    from ctvae.demo import demo

    typer.echo(demo(out))


def _next(command: str) -> None:
    typer.secho(f"next: {command}", err=True, dim=True)
