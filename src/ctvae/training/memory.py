"""When memory runs out in the middle of training: the state is kept, and the stage goes on with a smaller plan.

    loop (training/autoencoder.py, training/prior.py)    raises MemoryRanOut, with a way to save what it had
    repeated_smaller                                     saves it, makes the settings smaller, calls the loop again

An allocation fails in a forward or backward pass, before anything was changed, so the step is simply done again. Only where
it fails in the middle of the optimiser's own update is the state half new; the loop then goes back to its last checkpoint.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ctvae.config import Config
from ctvae.errors import DoesNotFit

PHRASES = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "could not create a memory")


class MemoryRanOut(Exception):
    """At `step`; `keep` writes the state to go on from, or is None where the checkpoint before is all there is."""

    def __init__(self, step: int, keep: Callable[[], None] | None, cause: str):
        super().__init__(cause)
        self.step, self.keep = step, keep


def is_allocation_failure(error: BaseException) -> bool:
    """Python's, CUDA's, and what PyTorch's CPU allocator and oneDNN call a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in PHRASES)


@contextmanager
def kept_when_memory_runs_out(
    optimizer: torch.optim.Optimizer, step: Callable[[], int], keep: Callable[[], None] | None
) -> Iterator[None]:
    """An allocation failure inside the block becomes MemoryRanOut. `step` tells where the loop is, `keep` saves its state.

    None: it cannot be saved then, as that of a sharded network, which takes all processes.
    """
    updating = [-1]  # the step that the optimiser is at, or was at last

    def note(*_: object) -> None:
        updating[0] = step()

    hook = optimizer.register_step_pre_hook(note)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise MemoryRanOut(step(), None if updating[0] == step() else keep, str(error) or "MemoryError") from error
    finally:
        hook.remove()


def repeated_smaller(stage: Callable[[Config], None], cfg: Config, smaller: Callable[[Config, int], Config | None]) -> None:
    """Run `stage`; each time its memory runs out, save its state and run it again with `smaller(settings, step)`.

    The failed step's tensors hang on the exception, so it is let go before anything else is done. Raises DoesNotFit, in one
    line, where `smaller` knows nothing less, or where memory ran out between the steps.
    """
    while True:
        failure = _failure_of(stage, cfg)
        if failure is None:
            return
        step, keep = failure
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if keep is not None:
            keep()
        less = smaller(cfg, step)
        if less is None:
            raise DoesNotFit(
                f"memory ran out at step {step}, and no plan is smaller; the state is saved: free memory or start on a larger "
                "machine, and run the same command again"
            )
        cfg = less


def _failure_of(stage: Callable[[Config], None], cfg: Config) -> tuple[int, Callable[[], None] | None] | None:
    try:
        stage(cfg)
    except MemoryRanOut as error:
        return error.step, error.keep
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise DoesNotFit("memory ran out before the first step; free memory and run the same command again") from error
    return None

