# SPDX-License-Identifier: Apache-2.0
"""A sample of the campaign of hostile engines; ``python -m tests.fuzz.hostile_engines --all`` is the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.hostile_engines import BEHAVIOURS, sample, trials

ROOT = Path(__file__).parents[2]
RUNS, KILLS = 6, 1


def test_the_table_is_large_and_the_sample_is_the_same_each_time() -> None:
    assert len(BEHAVIOURS) >= 60
    assert len(trials([0])) >= 500
    assert sample(RUNS) == sample(RUNS)
    assert len({each.behaviour for each in sample(RUNS)}) > RUNS / 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives the processes that a command has left to another")
def test_a_sample_has_no_fault(tmp_path: Path) -> None:
    """In a process of its own, since it adopts and ends whatever processes the commands leave."""
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.fuzz.hostile_engines", "--sample", str(RUNS), "--kills", str(KILLS)]
    done = subprocess.run([*command, "--json", str(counts)], cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(counts.read_text())
    assert found["faults"] == [], done.stderr
    assert done.returncode == 0, done.stderr
    assert (found["runs"], found["kills"]) == (RUNS, KILLS)
    assert found["verdicts"]["conformant"] >= RUNS
