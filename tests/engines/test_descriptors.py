# SPDX-License-Identifier: Apache-2.0
"""A harness runs however many files refmoe has open."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refmoe.api.conforming import Conformance, conform

HONEST = Path(__file__).parent / "harnesses" / "honest.py"


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """More open files than `select` can name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if wanted < 4096:
        pytest.skip(f"a process here may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for each in opened:
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_harness_runs_beside_many_open_files(many_open_files: None) -> None:
    asked = Conformance(
        harness=(sys.executable, str(HONEST)), cases=("top-1",), dtypes=("float32",), diagnose=False
    )  # fmt: skip
    results, _ = conform(asked)
    assert [each.verdict for each in results.outcomes] == ["conformant"]


CLOSED = """
import os, sys
for number in {numbers}:
    os.close(number)
from refmoe.api.conforming import Conformance, conform
asked = Conformance(harness=(sys.executable, {honest!r}), cases=("top-1",), dtypes=("float32",), diagnose=False)
results, _ = conform(asked)
sys.exit([each.verdict for each in results.outcomes] != ["conformant"])
"""


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_a_harness_runs_without_standard_streams(numbers: tuple[int, ...]) -> None:
    """A service has none: a pipe must not get the number of one."""
    code = CLOSED.format(numbers=numbers, honest=str(HONEST))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
