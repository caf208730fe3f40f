"""Memory and sizes as people write them, and the sizes that a network can take."""

from __future__ import annotations

import pytest

from ctvae.errors import ConfigError
from ctvae.planning.sizes import parse_memory, parse_size, smaller, strides_for


@pytest.mark.parametrize(("text", "gb"), [("24GB", 24), ("12gb", 12), ("500MB", 0.5), ("1.5 GB", 1.5), ("2GiB", 2 * 1.073741824)])
def test_memory_as_people_write_it(text, gb):
    assert parse_memory(text) == pytest.approx(gb)


@pytest.mark.parametrize("text", ["24", "GB", "-3GB", "0GB", "1e3GB", "lots", "24TBs", ""])
def test_memory_that_says_nothing(text):
    with pytest.raises(ConfigError, match=r"write an amount with its unit, e\.g\. 24GB or 500MB"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["64x512", "64,512,512", "0x512x512", "64x512x99999", "ax512x512", "64x²x512", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"^size "):
        parse_size(text)
    assert parse_size("64X512x500") == (64, 512, 500)


@pytest.mark.parametrize(
    ("spacing_mm", "slices", "steps"),
    [
        ((1.0, 1.0, 1.0), 64, (2, 2, 2)),  # cubes: as the recipe
        ((0.8, 0.8, 1.5), 64, (2, 2, 2)),
        ((0.8, 0.8, 2.5), 64, (1, 2, 2)),  # pixels of 1.6 mm come first
        ((0.8, 0.8, 5.0), 64, (1, 1, 2)),
        ((0.8, 0.8, 5.0), 64, (1, 1)),  # of two levels
        ((4.6, 4.6, 3.0), 64, (2, 2, 2)),
        ((1.0, 1.0, 1.0), 8, (2, 1, 1)),  # few slices: four latents along them are left
        ((1.0, 1.0, 1.0), 4, (1, 1, 1)),
    ],
)
def test_strides_follow_spacing_and_slice_count(spacing_mm, slices, steps):
    assert strides_for(spacing_mm, (slices, 512, 512), len(steps)) == tuple((step, 2, 2) for step in steps)


def test_smaller_sizes_stay_on_the_grid():
    assert list(smaller((64, 512, 512), (4, 4, 4))) == [(64, 256, 256), (64, 128, 128), (64, 64, 64), (32, 64, 64), (16, 64, 64)]
    assert next(smaller((24, 252, 300), (4, 4, 4))) == (24, 128, 152)
