"""Long JSON, an entry at a time: against the standard library's reader of whole files, and in memory that stays flat."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctvae import entries
from ctvae.entries import Packed, Spool, members

NUMBERS = st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4))


def whole(path: Path) -> dict:
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in members(path)}


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=5), st.sampled_from([None, 0, 3]), st.integers(1, 9))
def test_a_file_says_what_the_standard_library_reads(tmp_path_factory, content, indent, chunk):
    """However its text falls into chunks."""
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "CHUNK", chunk)
        assert whole(path) == content


@settings(deadline=None)
@given(text=st.text(alphabet='{}[]:,"a1 \n-.etrufalsn\\', max_size=25).filter(lambda text: "111" not in text))  # such as 1e1111
def test_what_the_standard_library_refuses_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(text, encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if isinstance(content, dict):
        assert whole(path) == content
    else:
        with pytest.raises(ValueError):  # noqa: PT011 (what it says is the standard library's)
            whole(path)


NO_NUMBERS = ['{"a": NaN}', '{"a": 1e999}', '{"a": ' + "1" * 30 + "}"]
UNFINISHED = ["", "{", '{"a"', '{"a": [1, 2', '{"a": ' + "[" * 100_000]
DAMAGED = [*NO_NUMBERS, *UNFINISHED, '{"a": [1,]}', '{"a": 1,}', '{"a": 1} x', "[1]", "{1: 2}"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_files_are_refused(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        whole(tmp_path / "file.json")
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ValueError, match="larger than 0 bytes"):
        list(members(tmp_path / "file.json", most_bytes=0))


def test_a_list_that_nobody_wants_is_passed_over(tmp_path):
    (tmp_path / "file.json").write_text('{"a": [1, [2], {"b": 3}], "c": 4}')
    assert [key for key, _ in members(tmp_path / "file.json")] == ["a", "c"]


@settings(deadline=None)
@given(values=st.lists(VALUES, max_size=200))
def test_packed_values_come_out_as_they_went_in(values):
    packed = Packed(values)
    assert list(packed) == list(packed) == values
    assert len(packed) == len(values)


def test_spooled_values_are_read_in_any_order_and_leave_no_file(tmp_path):
    values = [{"n": n, "text": "é" * (n % 7)} for n in range(300)]
    with closing(Spool(tmp_path)) as spool:
        for value in values:
            spool.append(value)
        assert [spool[n] for n in reversed(range(300))] == values[::-1]
        assert spool[7] == values[7]
    assert list(tmp_path.iterdir()) == []


def test_a_long_file_takes_the_memory_of_an_entry(tmp_path):
    """Ten times as many entries: not a tenth more at the peak."""
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps({"rows": [{"id": f"{n:09d}", "numbers": [0.5] * 20} for n in range(count)]}))
        tracemalloc.start()
        for _, rows in members(path):
            assert sum(1 for _ in rows) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 0.3 * path.stat().st_size
