"""Progress: what it says about speed and time left, and when it says it."""

from __future__ import annotations

import math

import pytest

from ctvae.progress import Progress, clock_time, facts, share_done


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "progress must not mix with results"
    return captured.err.splitlines()


def test_a_line_every_ten_seconds_where_there_is_no_terminal(capsys):
    clock = Clock()
    with Progress("autoencoder", total=1000, clock=clock) as bar:
        for step in range(0, 101):
            bar.update(step, loss=0.5)
            clock.now += 0.25
    lines = lines_of(capsys)
    assert len(lines) == 3  # at 10 s, at 20 s, at the end
    assert all(line.startswith("autoencoder: ") for line in lines)
    assert lines[0] == "autoencoder: 40/1000  loss 0.5  4/s  0:10 gone  4:00 left"
    assert lines[-1].startswith("autoencoder: 100/1000")


def test_the_speed_of_a_resumed_run_counts_its_own_steps(capsys):
    clock = Clock()
    with Progress("prior", total=2000, clock=clock) as bar:
        bar.update(1000)
        clock.now += 20
        bar.update(1040)
    assert lines_of(capsys) == ["prior: 1040/2000  2/s  0:20 gone  8:00 left"]


def test_the_clock_can_be_what_ends_the_work(capsys):
    clock = Clock()
    with Progress("prior", total=20000, clock=clock) as bar:
        bar.update(1)
        clock.now += 15
        bar.update(31, seconds_left=45.0)
    assert lines_of(capsys) == ["prior: 31/20000  2/s  0:15 gone  0:45 left"]
    assert share_done(31, 20000, elapsed=15, seconds_left=45) == 0.25


def test_what_is_not_known_is_left_out(capsys):
    with Progress("prior", total=10, clock=Clock()) as bar:
        bar.update(1, seconds_left=math.nan)
    assert lines_of(capsys) == ["prior: 1/10  0:00 gone"]


def test_as_a_callback(capsys):
    clock = Clock()
    with Progress("prepare", clock=clock) as bar:
        clock.now += 12
        bar.report(3, 12, "case_3.nii.gz")
    assert lines_of(capsys) == ["prepare: 3/12  0.25/s  0:12 gone  0:36 left  case_3.nii.gz"]


def test_no_work_no_line(capsys):
    with Progress("prepare"):
        pass
    assert lines_of(capsys) == []


def test_an_error_passes_through(capsys):
    def interrupted() -> None:
        with Progress("prior", total=10) as bar:
            bar.update(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(lines_of(capsys)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (29.6, "0:30"), (1434, "23:54"), (3723, "1:02:03"), (-3, "0:00")]
)
def test_times_as_people_write_them(seconds, text):
    assert clock_time(seconds) == text


def test_a_step_count_without_a_total():
    assert facts(7, None, loss=None, speed=None, elapsed=1, seconds_left=None) == "7  0:01 gone"
