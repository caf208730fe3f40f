"""Two processes against one: the same loss curve, the same files; and a worker that is killed does not end the training.

    python benchmarks/many_processes.py [--processes 2] [--tolerance 1e-5] [--parts curve,machines,elastic,generate,shard,memory]

Phantoms are prepared and a network of a few thousand weights is trained in fp32, autoencoder, polish and prior: once by one
process, once by several that torchrun starts on this machine (gloo), at the same batches. Then once more by several, of which
one is killed -9 after the first checkpoint, and once by two agents of torchrun that meet, as on two machines. The prior alone is
trained once more with its network cut up over the processes (prior.shard), and a larger one's step is weighed (sharded_step.py).
Exit code 1 where curves differ by more than the tolerance, relative to the loss (of a flow: to its latents' variance, of which
the loss is a small share), or anything else is not as it should be.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
STAGES = ("autoencoder", "polish", "flow")
LIMIT_SECONDS = 1500  # of one command: a deadlock must not hang the benchmark
LENGTHS = (
    "autoencoder.steps=30", "polish.steps=20", "prior.steps=40", "autoencoder.save_every=10", "polish.save_every=10",
    "prior.save_every=10", "autoencoder.batch=2", "polish.batch=2", "prior.batch=4", "data.noise_hu=5",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--parts", default="curve,machines,elastic,generate,shard,memory")
    arguments = parser.parse_args()
    parts = {
        "curve": compare_curves, "machines": meet, "elastic": survive_a_kill, "generate": compare_files, "shard": cut_up,
        "memory": weigh,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="many") as scratch:
        staged = Staged(Path(scratch), arguments.processes, arguments.tolerance)
        failed = [name for name in arguments.parts.split(",") if not parts[name](staged)]
    print(f"failed: {failed}" if failed else "all as it should be")
    sys.exit(bool(failed))


class Staged:
    """A dataset of phantoms, a run of one process and one of several."""

    def __init__(self, folder: Path, processes: int, tolerance: float):
        from conftest import TINY

        from ctvae.phantoms import write_phantoms
        from ctvae.prepare import prepare

        self.folder, self.processes, self.tolerance = folder, processes, tolerance
        write_phantoms(folder / "scans", 8, shape=(64, 32, 32), spacing_mm=(12.5, 12.5, 4.5))
        prepare(folder / "scans", folder / "data", slices=64, fractions=(0.5, 0.25, 0.25), workers=1)
        self.settings = [word for setting in (*TINY, *LENGTHS) for word in ("--set", setting)]
        self.alone = folder / "alone"
        finished(alone(self.train(self.alone)))

    @cached_property
    def together(self) -> Path:
        """The run of several."""
        finished(shared(self.processes, self.train(self.folder / "together")))
        return self.folder / "together"

    def train(self, out: Path, *settings: str) -> list[str]:
        return ["train", str(self.folder / "data"), "--out", str(out), *self.settings, *settings]

    def without_prior(self, name: str) -> Path:
        """A copy of the run of one, as it was before its prior."""
        run = Path(shutil.copytree(self.alone, self.folder / name))
        for path in [*run.glob("prior-*"), *run.glob("logs/flow*")]:
            path.unlink()
        state = json.loads((run / "run.json").read_text())
        del state["stages"]["prior"]
        (run / "run.json").write_text(json.dumps(state))
        return run


def compare_curves(staged: Staged) -> bool:
    """One process against several, every report of every stage; the flow once more from the same latents.

    From latents of its own it differs by more: some of them, in half precision, fall to the neighbouring number.
    """
    again = staged.without_prior("flow-together")
    finished(shared(staged.processes, staged.train(again)))
    runs = {"autoencoder": staged.together, "polish": staged.together, "flow": again}
    worst = 0.0
    for stage, run in runs.items():
        one = curve(staged.alone, stage)
        largest, said = difference(staged.alone, run, stage)
        print(f"{stage}: {one[-1][0]} steps, {len(one)} reports, loss {one[0][1]:.4g} to {one[-1][1]:.4g}; "
              f"{staged.processes} processes differ by {said}", flush=True)  # fmt: skip
        worst = max(worst, largest)
    largest, said = difference(staged.alone, staged.together, "flow")
    print(f"flow from latents of its own: {staged.processes} processes differ by {said}", flush=True)
    worst = max(worst, largest)
    one, several = flat_weights(staged.alone), flat_weights(staged.together)
    change = (one - several).norm() / one.norm()
    print(f"weights of all networks: {one.numel()} numbers, differ by {change:.1e} of their norm", flush=True)
    return worst <= staged.tolerance and len(one) == len(several)


def difference(first: Path, second: Path, stage: str) -> tuple[float, str]:
    """Largest between two runs' curves, relative to the loss (of a flow: to its latents' variance, which is 1), and in words.

    Infinite where they report at other steps.
    """
    one, other = curve(first, stage), curve(second, stage)
    if [step for step, _ in one] != [step for step, _ in other]:
        return math.inf, "the steps at which they report"
    pairs = [(a, abs(a - b)) for (_, a), (_, b) in zip(one, other, strict=True)]
    of_loss, of_variance = max(gap / abs(loss) for loss, gap in pairs), max(gap for _, gap in pairs)
    if stage == "flow":
        return of_variance, f"{of_variance:.1e} of the latents' variance at most, {of_loss:.1e} of the loss"
    return of_loss, f"{of_loss:.1e} of the loss at most"


def meet(staged: Staged) -> bool:
    """Two agents, each with half of the processes, as on two machines that share a folder."""
    run, half = staged.folder / "met", staged.processes // 2
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    meeting = ["--nnodes", "2", "--nproc-per-node", str(half), "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "ctvae", *staged.train(run)]
    agents = [subprocess.Popen(command, env=environment()) for _ in range(2)]
    codes = [agent.wait(LIMIT_SECONDS) for agent in agents]
    equal = codes == [0, 0] and weights(run) == weights(staged.together)
    print(f"machines: 2 agents of {half} processes each, exit codes {codes}; weights {'bit-equal to' if equal else 'OTHER than'} "
          "those of one agent", flush=True)  # fmt: skip
    return equal


def survive_a_kill(staged: Staged) -> bool:
    """One of the workers is killed; the agent starts them all again, and they go on from the last checkpoint."""
    run = staged.folder / "killed"
    agent = subprocess.Popen(shared(staged.processes, staged.train(run), restarts=2), env=environment())
    kill(workers_once_saved(agent, run, "autoencoder")[-1:])
    return undisturbed("elastic", agent.wait(LIMIT_SECONDS), run, staged.together, STAGES)


def workers_once_saved(agent: subprocess.Popen, run: Path, stage: str) -> list[psutil.Process]:
    """The agent's workers, the first rank first, once `stage` has a checkpoint."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not list((run / "checkpoints").glob(f"{stage}-*[0-9].safetensors")):
        if agent.poll() is not None or time.monotonic() > deadline:
            agent.kill()
            raise SystemExit(f"{stage}: no checkpoint was seen")
        time.sleep(0.05)
    workers = [child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") is not None]
    return sorted(workers, key=lambda child: int(child.environ()["RANK"]))


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def undisturbed(name: str, code: int, run: Path, other: Path, stages: tuple[str, ...]) -> bool:
    """Whether a run of which a worker was killed ended as the other one."""
    equal = code == 0 and weights(run) == weights(other)
    same_curve = code == 0 and all(curve(run, stage) == curve(other, stage) for stage in stages)
    print(f"{name}: the last worker killed after the first checkpoint; exit code {code}; "
          f"weights {'bit-equal to' if equal else 'OTHER than'} undisturbed ones, curves {'equal' if same_curve else 'OTHER'}",
          flush=True)  # fmt: skip
    return equal and same_curve


def cut_up(staged: Staged) -> bool:
    """The prior with its network cut up: against one process; killed and restarted; begun so, and ended by one process."""
    sharded, killed, moved = (staged.without_prior(name) for name in ("sharded", "sharded-killed", "moved"))

    def command(run: Path, restarts: int = 0) -> list[str]:
        return shared(staged.processes, staged.train(run, "--set", "prior.shard=true"), restarts)

    finished(command(sharded))
    agent = subprocess.Popen(command(killed, restarts=2), env=environment())
    kill(workers_once_saved(agent, killed, "flow")[-1:])
    survived = undisturbed("shard", agent.wait(LIMIT_SECONDS), killed, sharded, ("flow",))
    agent = subprocess.Popen(command(moved), env=environment())
    kill([psutil.Process(agent.pid), *workers_once_saved(agent, moved, "flow")])
    agent.wait(LIMIT_SECONDS)
    finished(alone(staged.train(moved)))
    expected, worst = flow_weights(staged.alone), 0.0
    for name, run in ((f"{staged.processes} processes", sharded), ("the same, ended by one process with the whole", moved)):
        largest, said = difference(staged.alone, run, "flow")
        change = (flow_weights(run) - expected).norm() / expected.norm()
        print(f"shard: {name}: curve of the flow differs from that of one by {said}, trained weights by {change:.1e} of their "
              "norm", flush=True)  # fmt: skip
        worst = max(worst, largest)
    return survived and worst <= staged.tolerance


def weigh(staged: Staged) -> bool:
    """Memory of a larger network's step, whole and cut up."""
    script = str(Path(__file__).with_name("sharded_step.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(staged.processes), script]
    most = {}
    for name, options in (("whole", []), ("cut up", ["--shard"])):
        text = finished([*launcher, *options], MALLOC_MMAP_THRESHOLD_="131072")  # or glibc keeps what is freed, as if in use
        said = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        most[name] = {key: max(line[key] for line in said) for key in said[0]}
        print(f"memory: {most[name]['weights'] / 1e6:.0f} M weights {name}, {staged.processes} processes: "
              f"{most[name]['state_mb']:.0f} MB of weights, gradients, momentum and averages in each, peak of a step "
              f"{most[name]['peak_mb']:.0f} MB, {most[name]['seconds']:.1f} s", flush=True)  # fmt: skip
    share = most["cut up"]["state_mb"] / most["whole"]["state_mb"]
    return share < 1.1 / staged.processes and most["cut up"]["peak_mb"] < most["whole"]["peak_mb"]


def compare_files(staged: Staged) -> bool:
    """Scans by one process, by several, and by two commands at once that know nothing of each other."""
    count = 2 * staged.processes + 1

    def command(out: str) -> list[str]:
        return ["generate", str(staged.alone), "--out", str(staged.folder / out), "-n", str(count), "--seed", "3"]

    finished(alone(command("by-one")))
    finished(shared(staged.processes, command("by-several")))
    both = [subprocess.Popen(alone(command("at-once")), env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    codes = [process.wait(LIMIT_SECONDS) for process in both]
    expected = content(staged.folder / "by-one")
    several, at_once = content(staged.folder / "by-several") == expected, content(staged.folder / "at-once") == expected
    print(f"generate: {len(expected)} files of one process, {'equal' if several else 'OTHER'} by {staged.processes} processes, "
          f"{'equal' if at_once else 'OTHER'} by two commands at once (exit codes {codes})", flush=True)  # fmt: skip
    return several and at_once and codes == [0, 0] and len(expected) == 2 * count + 1


def alone(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "ctvae", *command]


def shared(processes: int, command: list[str], restarts: int = 0) -> list[str]:
    """Under torchrun, on a free port of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "--max-restarts", str(restarts), "-m", "ctvae", *command]


def finished(command: list[str], **variables: str) -> str:
    """What it prints."""
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def curve(run: Path, stage: str) -> list[tuple[int, float]]:
    with (run / "logs" / f"{stage}.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, bytes]:
    from ctvae.checkpoint import load

    return {
        f"{path.stem}/{name}": tensor.numpy().tobytes()
        for path in sorted(run.glob("*.safetensors"))
        for name, tensor in load(path)[0].items()
    }


def flat_weights(run: Path) -> torch.Tensor:
    """Of the autoencoder and the flow, one after the other."""
    from ctvae.checkpoint import load

    names = ("autoencoder", "prior-flow")
    return torch.cat([value.double().flatten() for name in names for value in load(run / f"{name}.safetensors")[0].values()])


def flow_weights(run: Path) -> torch.Tensor:
    """What was trained of the flow, one after the other."""
    from ctvae.checkpoint import load

    tensors, _ = load(run / "prior-flow.safetensors")
    return torch.cat([value.double().flatten() for name, value in tensors.items() if name.startswith("flow.correction.")])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
