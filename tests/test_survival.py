"""The survival benchmarks, in small: killed commands go on, damaged files are refused, time and memory grow in a line.

The large runs and their figures: docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def ran(script: str, *arguments: str) -> str:
    """What a benchmark prints; it fails the test by its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("verb", "trials", "kills"), [("prepare", 3, 3), ("train", 1, 10), ("generate", 3, 3), ("evaluate", 3, 3)]
)
def test_a_verb_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(verb, trials, kills):
    """Training with bit-equal weights, of both stages and the polish."""
    said = ran("kills.py", "--trials", str(trials), "--kills", str(kills), "--seed", "1", "--verbs", verb)
    assert f"{trials} ended equal, 0 did not" in said
    assert not said.startswith(f"{verb}: 0 kills")


def test_damaged_files_are_refused_within_limits_of_time_and_memory():
    said = ran("fuzz_files.py", "--count", "300", "--seed", "1")
    assert "300 cases, seed 1" in said
    assert " 0 failures" in said


def test_preparing_ten_times_as_many_scans_takes_ten_times_as_long_and_little_more_memory(tmp_path):
    said = ran("scaling.py", "--counts", "20", "200", "2000", "--workers", "1", "--out", str(tmp_path))
    few, some, many = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    per_scan = (many["cpu_seconds"] - some["cpu_seconds"]) / (many["scans"] - some["scans"])
    before = (some["cpu_seconds"] - few["cpu_seconds"]) / (some["scans"] - few["scans"])
    assert per_scan < 2 * before
    assert many["leader_mb"] - few["leader_mb"] < 40


def test_a_prior_of_five_times_as_many_latents_takes_no_more_memory(tmp_path):
    """Beyond the thousand that closed forms are fitted to."""
    said = ran("scaling.py", "--what", "prior", "--counts", "1000", "5000", "--out", str(tmp_path))
    few, many = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert many["latents_mb"] - few["latents_mb"] > 60
    assert many["mb"] - few["mb"] < 20


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a disk")
def test_a_disk_that_is_full_costs_nothing_that_was_there():
    said = ran("full_disk.py", "--sizes", "3")
    assert said.count(", 0 not as they should be") == 8


def test_two_processes_train_as_one_outlive_a_kill_and_share_out_scans():
    said = ran("many_processes.py")
    assert "exit code 0; weights bit-equal to undisturbed ones, curves equal" in said
    assert "all as it should be" in said


def test_every_mutation_of_a_core_line_is_caught():
    caught, lines = map(int, re.findall(r"(\d+) of (\d+) mutations caught", ran("mutations.py"))[0])
    assert caught == lines >= 10
