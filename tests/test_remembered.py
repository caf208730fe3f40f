"""A dry run that is asked for again is not made again, and one of other settings is."""

from __future__ import annotations

import pytest

from ctvae.config import load_recipe
from ctvae.planning import dry
from ctvae.planning.remembered import remembered
from ctvae.planning.workspace import Kernels

SMALL = ("data.shape=[16,32,32]", "data.patch=[16,32,32]", "model.widths=[4,8]", "model.blocks=[1,1]", "finish.enabled=false")


def test_it_is_what_a_dry_run_says(tiny_settings):
    cfg = load_recipe("wavelet3d", (*tiny_settings, *SMALL))
    assert remembered(dry.training, cfg, Kernels()) == dry.training(cfg, Kernels())
    assert remembered(dry.prior, cfg, 7, Kernels("cpu", 2)) == dry.prior(cfg, 7, Kernels("cpu", 2))
    size, tile = (16, 32, 32), (16, 16, 16)
    assert remembered(dry.decoding, cfg, size, tile, Kernels()) == dry.decoding(cfg, size, tile, Kernels())


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("seed=3", False), ("autoencoder.steps=77", False), ("prior.minutes=3", False), ("polish.save_every=7", False),
        ("autoencoder.batch=2", True), ("autoencoder.accumulate=2", True), ("prior.precision=bf16", True),
        ("autoencoder.optimizer=adam", True), ("model.widths=[4,16]", True), ("prior.encodings=2", True),
        ("data.tile=[8,8,8]", True),
    ],
)  # fmt: skip
def test_what_makes_no_difference_to_memory_makes_none_here(change, again, tiny_settings):
    calls = []

    def cost(cfg, *rest):
        calls.append((cfg, rest))
        return len(calls)

    of = [load_recipe("wavelet3d", (*tiny_settings, *SMALL, "polish.log_every=1", *more)) for more in ((), (change,), ())]
    answers = [remembered(cost, cfg, Kernels()) for cfg in of]
    assert answers == ([1, 2, 1] if again else [1, 1, 1])
    assert remembered(cost, of[0], Kernels("cuda")) == len(calls)  # another device is asked anew
    assert len(calls) == 2 + again
