# SPDX-License-Identifier: Apache-2.0
"""The work that a case makes, to order cases by."""

from __future__ import annotations

from refmoe.checkpoints.size import total_parameters
from refmoe.suite.case import Case


def work(case: Case) -> int:
    """Parameters times tokens."""
    return total_parameters(case.config) * sum(len(run.tokens) for run in case.runs())
