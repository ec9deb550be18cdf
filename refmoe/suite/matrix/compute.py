# SPDX-License-Identifier: Apache-2.0
"""Compute outcomes of the matrix side by side: a piece of work is a case at a dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refmoe.bugs.catalogue import MUTANTS
from refmoe.parallel import results
from refmoe.suite.matrix.outcomes import SPECIFICATION, Outcome, Work, judge_case
from refmoe.suite.work import work_in


def compute(
    work: Sequence[Work], executor: str | None = None, progress: Callable[[], None] | None = None
) -> list[Outcome]:
    """All outcomes, in an order that does not depend on the executor.

    executor: as `refmoe.parallel.parse_executor` reads it; None: one process per core.
    progress: called after each piece of work.
    """
    found: list[Outcome] = []
    # the longest first, so that no worker is left alone with one at the end
    ordered = sorted(work, key=lambda each: work_in(each.case) * len(each.mutants), reverse=True)
    with results(judge_case, ordered, executor) as judged:
        for _, outcomes in judged:
            found += outcomes
            if progress is not None:
                progress()
    order = {name: i for i, name in enumerate((SPECIFICATION, *MUTANTS))}
    return sorted(found, key=lambda each: (order[each.mutant], each.policy, each.case))
