# SPDX-License-Identifier: Apache-2.0
"""Cases that overflow in a dtype: the specification itself, rounded as a policy says, is infinite there.

No engine can be judged on what follows such a value. Whether a case overflows follows from the case and the policy
alone; no value of an engine is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refmoe.bugs.run_engine import run
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.spec.taps import tap_names
from refmoe.suite.case import Case
from refmoe.verifier.findings import UNDECIDABLE, Report


@dataclass(frozen=True)
class Overflow:
    """The first value of a case, in order of computation, that is not finite under a policy."""

    run: str
    tap: str

    def __str__(self) -> str:
        return f"{self.run}/{self.tap}"


def overflow(case: Case, parameters: Parameters, policy: Policy) -> Overflow | None:
    """The first overflow of the case under a policy, or None."""
    ideal = run(None, case.config, parameters, case.runs(), policy)
    for key in _keys(case):
        tensor = ideal.tensors.get("/".join(key))
        if tensor is not None and not np.isfinite(np.asarray(tensor.map(), np.float64)).all():
            return Overflow(*key)
    return None


def explains_open(report: Report, case: Case, first: Overflow) -> bool:
    """Whether all that a verification left open lies at the overflow or behind it, in order of computation.

    A value that is open before it has another reason.
    """
    order = {key: place for place, key in enumerate(_keys(case))}
    opened = [order[check.run, check.tap] for check in report.checks if check.verdict == UNDECIDABLE or check.undecided]
    return min(opened, default=len(order)) >= order[first.run, first.tap]


def _keys(case: Case) -> list[tuple[str, str]]:
    """Every run and tap of a case, in order of computation."""
    return [(each.run, tap) for each in case.runs() for tap in tap_names(case.config)]
