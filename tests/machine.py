# SPDX-License-Identifier: Apache-2.0
"""What this machine can run."""

from __future__ import annotations

import sys
from platform import machine

import pytest

needs_mkl = pytest.mark.skipif(
    sys.platform != "linux" or machine() != "x86_64", reason="the package mkl is for Linux on x86-64"
)
