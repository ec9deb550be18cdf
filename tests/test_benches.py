# SPDX-License-Identifier: Apache-2.0
"""Every benchmark can be started: most of them are not run for weeks, while the code that they import moves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHES = [path.stem for path in sorted((ROOT / "bench").glob("*.py")) if not path.stem.startswith("test_")]


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_imports_names_that_there_are(name: str) -> None:
    code = f"import bench.{name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    absent = re.search(r"No module named '(\w+)", done.stderr)
    if absent is not None and absent[1] not in ("refmoe", "tests", "bench"):
        pytest.skip(f"{absent[1]} is not installed")
    assert done.returncode == 0, done.stderr
