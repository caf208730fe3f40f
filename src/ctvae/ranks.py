"""Which of several processes this is, and how they agree. torchrun says it in the environment; alone, it is the first of one.

    torchrun --nproc-per-node 8 -m ctvae train dataset --out run

A batch is the batch of all processes together. Each takes its rows of it, with the noise that these rows have in one process,
and averages are over all: the loss curve is that of one process at the same batch, to rounding. Only the first one writes.

torch is imported by what needs it, so that `progress` and `--help` stay quick.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ctvae.errors import ConfigError, CtvaeError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store

CONNECTING = timedelta(seconds=5)
PATIENCE = timedelta(hours=2)  # for another process; one that died is noticed at once, by torchrun
Said = TypeVar("Said")  # what JSON can say


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`, number `local` of the `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch of all processes."""
        share, rest = divmod(batch, self.world)
        assert rest == 0, f"batch {batch} among {self.world}"
        return slice(self.rank * share, (self.rank + 1) * share)

    def normal(self, shape: Sequence[int], random: torch.Generator) -> Tensor:
        """Standard normal numbers for this process's rows [b ...]: what is drawn is for all rows, as one process would."""
        import torch

        whole = torch.randn((shape[0] * self.world, *shape[1:]), generator=random)
        return whole[self.rows(len(whole))]

    # --- what all processes call together ------------------------------------------------------------------------------

    def mean(self, value: Tensor) -> Tensor:
        """Over all processes, without a gradient."""
        if self.world == 1:
            return value
        from torch import distributed

        total = value.detach().float().clone()
        distributed.all_reduce(total)
        return (total / self.world).to(value.dtype)

    def gathered(self, rows: Tensor) -> Tensor:
        """Every process's rows [b ...], in order: [world * b ...], without a gradient."""
        if self.world == 1:
            return rows
        import torch
        from torch import distributed

        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world)]
        distributed.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def any(self, flag: Tensor) -> bool:
        """Whether `flag` is set on one of the processes. Waits for the device."""
        return bool(self.mean(flag.float()) > 0)

    def told(self, say: Callable[[], Said]) -> Said:
        """What `say` returns on the first process, the only one that calls it. Travels as JSON.

        Where it raises CtvaeError there, the others leave without a word.
        """
        if self.world == 1:
            return say()
        import torch
        from torch import distributed

        failure: CtvaeError | None = None
        text = b""
        if self.first:
            try:
                text = json.dumps(say()).encode()
            except CtvaeError as error:
                failure = error
        length = torch.tensor([len(text)])
        distributed.broadcast(length, 0)
        if not length:
            raise failure or SystemExit(2)
        letters = torch.tensor(list(text), dtype=torch.uint8) if text else torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(letters, 0)
        return json.loads(bytes(letters.tolist()))  # type: ignore[no-any-return]

    def agreed(self, step: int) -> int:
        """`step`, if it is that of all processes. Raises InputError where they do not see the same checkpoints."""
        import torch

        steps = self.gathered(torch.tensor([step])).tolist()
        if len(set(steps)) > 1:
            raise InputError(f"the processes find the run at steps {steps}; --out must name a folder that all machines share")
        return step

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            import torch

            self.any(torch.tensor(False))


ALONE = Ranks()


def here() -> Ranks:
    """As torchrun has it; ALONE without it."""
    said = os.environ
    if "TORCHELASTIC_RUN_ID" not in said:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Ranks(*(int(said[name]) for name in names))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return here().first


def _fresh_store(ranks: Ranks) -> Store:
    """Where the processes find each other's addresses, made by the first one, so that it ends with it.

    torchrun's own store outlives the workers: after a restart they would read the addresses of the dead (pytorch issue 135712).
    So it only says where the new one is, and who reads there of a dead one is refused, and reads again.
    """
    from torch.distributed import DistError, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, ranks.world, is_master=ranks.first, timeout=PATIENCE)
    board = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    if ranks.first:
        store = TCPStore(host, 0, ranks.world, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        board.set("ctvae", str(store.port))
        return store
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            store = TCPStore(host, int(board.get("ctvae")), is_master=False, timeout=CONNECTING)
        except DistError:
            if time.monotonic() > deadline:
                raise
            continue
        store.set_timeout(PATIENCE)
        return store


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several at once, without taking Python apart.

    PyTorch's caches keep a sharded network's groups, whose threads so outlive them, and one that lets a tensor go while Python
    is being taken apart aborts the process, after all is done (pytorch pull request 179291).
    """
    if here().world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def refuse_several(verb: str) -> None:
    """Raises ConfigError where torchrun started several processes of a command that is not shared out."""
    if here().world > 1:
        raise ConfigError(f"{verb} is not shared out; start it without torchrun")


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes, able to talk to each other inside the block; each with a card of its own where there are cards.

    Raises ConfigError where there are more processes than cards.
    """
    ranks = here()
    if ranks.world == 1:
        yield ranks
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        if ranks.local_world > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun starts {ranks.local_world} processes on a machine with {torch.cuda.device_count()} cards; "
                f"say --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_fresh_store(ranks), rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE,
    )  # fmt: skip
    yield ranks  # what fails in the block ends this process, and torchrun the others: no goodbye is said then
    distributed.destroy_process_group()
