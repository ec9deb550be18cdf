# SPDX-License-Identifier: Apache-2.0
"""This refmoe as evidence packages need it, read once for many tests: it has every file of suite and tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

from refmoe.api import evidence
from refmoe.evidence import write
from refmoe.evidence.own import this_refmoe


@contextmanager
def read_once() -> Iterator[None]:
    """Let all packages within be written and checked by one reading. No file of the suite or the tests may change."""
    once = cache(this_refmoe)
    with pytest.MonkeyPatch.context() as patch:
        for module in (write, evidence):
            patch.setattr(module, "this_refmoe", lambda golden: once(golden.resolve()))
        yield
