# SPDX-License-Identifier: Apache-2.0
"""The work that a case makes, to order cases by."""

from __future__ import annotations

from pathlib import Path

from refmoe.checkpoints.size import total_parameters
from refmoe.errors import InputError
from refmoe.suite.case import Case, read_case


def work(case: Case) -> int:
    """Parameters times tokens."""
    return total_parameters(case.config) * sum(len(run.tokens) for run in case.runs())


def work_in(folder: Path) -> int:
    """The work for the case in a folder; 0 where the case cannot be read."""
    try:
        return work(read_case(folder))
    except InputError:
        return 0  # who reads it again says what is wrong
