# SPDX-License-Identifier: Apache-2.0
"""Run a part of a test in its own process: JAX starts threads, and other tests fork the process that they run in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def with_jax(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a module of tests, which may import jax. Skips the test where jax is not installed."""
    if find_spec("jax") is None:
        pytest.skip("jax not installed")
    code = f"from {function.__module__} import {function.__name__} as f; f(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
