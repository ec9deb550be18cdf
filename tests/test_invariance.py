# SPDX-License-Identifier: Apache-2.0
"""P2: the bits of a golden do not depend on the BLAS kernel, the thread count or NumPy's SIMD level.

The whole table is made by `bench/invariance.py`; here three settings that are far apart, in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "oldest kernel, one thread": {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1"},
    "AVX2 kernel, two threads": {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"},
    "no SIMD beyond the baseline": {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"},
}


def survives(extra: dict[str, str]) -> bool:
    """Whether NumPy alone can multiply in this setting: the processor may lack it, and OpenBLAS 0.3.34 may crash."""
    product = "import numpy; numpy.ones((300, 700)) @ numpy.ones((700, 24))"
    return subprocess.run([sys.executable, "-c", product], env=os.environ | extra, check=False).returncode == 0


def digests(extra: dict[str, str]) -> dict[str, str]:
    """SHA-256 over all taps of the first case, in a process with these variables set."""
    command = [sys.executable, "bench/invariance.py", "--child", "--golden", "golden/walking-skeleton"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | extra
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return digests({})


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_bits_are_the_same_elsewhere(setting: str, here: dict[str, str]) -> None:
    if not survives(SETTINGS[setting]):
        pytest.skip("NumPy's own matrix product dies in this setting, on this machine")
    assert digests(SETTINGS[setting])["exact"] == here["exact"]


def test_plain_float64_is_not_the_same_and_exact_is_not_plain(here: dict[str, str]) -> None:
    """The digest can tell: otherwise equality above would say nothing."""
    assert here["exact"] != here["float64"]
