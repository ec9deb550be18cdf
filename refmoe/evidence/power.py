# SPDX-License-Identifier: Apache-2.0
"""The power of a run: the known bugs that it would have shown, and those that it shows to be absent.

A known bug is absent where the engine conforms on a case that kills the bug. The matrix says that for traces with all
taps, and the table of power for smaller sets of taps. Both were measured under the generic policy of a dtype. A policy
that allows more may hide more, so under such a policy no bug is said to be absent. Nor is it for fresh cases: other
weights may hide a bug that the golden case shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.engines.observations import policies_used
from refmoe.evidence.given import Given
from refmoe.evidence.judged import Judged
from refmoe.evidence.own import Own
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.suite.matrix.outcomes import runnable
from refmoe.suite.power import TAP_SETS, power_of, table
from refmoe.verifier.findings import ALL_TAPS, CONFORMANT


def power(given: Given, judged: Mapping[tuple[str, str], Judged], own: Own) -> dict[str, Any]:
    """The document, per dtype.   judged: by case and dtype"""
    used = policies_used(given.results)
    return {
        dtype: _of_dtype(given, dtype, judged, own) | {"policy": used[dtype].name, "wider": used[dtype].wider}
        for dtype in given.dtypes
    }


def _of_dtype(
    given: Given, dtype: str, judged: Mapping[tuple[str, str], Judged], own: Own
) -> dict[str, Any]:  # fmt: skip
    mine = {case: each for (case, other), each in judged.items() if other == dtype}
    steps = frozenset((*MODEL_TAPS, *LAYER_TAPS)) if mine else frozenset[str]()
    for each in mine.values():
        steps &= each.steps
    found = power_of(steps, given.policies[given.dtypes[dtype]])
    unlike = policies_used(given.results)[dtype].wider is not False or given.results.fresh is not None
    excluded = {bug: [] if unlike else absent(bug, dtype, mine, own) for bug in runnable()}
    return {
        "taps": found.taps, "seen": found.seen, "known": found.known, "unseen": list(found.unseen),
        "absent": {bug: cases for bug, cases in excluded.items() if cases},
        "not_excluded": [bug for bug, cases in excluded.items() if not cases],
        "outside": [bug for bug in MUTANTS if bug not in excluded],
        "matrix_changed": list(own.stale),
    }  # fmt: skip


def absent(bug: str, dtype: str, judged: Mapping[str, Judged], own: Own) -> list[str]:
    """The cases on which the engine conforms, although the bug would have been found there.   judged: by case"""
    killers, found = own.killers(bug, dtype), []
    measured = table().get(bug, {}).get(dtype, {})
    for case, each in judged.items():
        if each.outcome.verdict != CONFORMANT:
            continue
        held = [name for name, steps in TAP_SETS.items() if each.steps >= frozenset(steps)]
        seen = measured.get("case") == case and any(name in measured.get("seen", ()) for name in held)
        if seen or (ALL_TAPS in held and case in killers):
            found.append(case)
    return found
