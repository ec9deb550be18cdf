# SPDX-License-Identifier: Apache-2.0
"""Traceability: each clause with its code, its tests, the bugs that break it, the cases that name it, the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from refmoe.evidence.given import Given
from refmoe.evidence.own import Own


def clauses(given: Given, own: Own, absent: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The document: a row for each clause, in reading order, without its tests.   absent: per dtype the absent bugs"""
    verdicts: dict[str, dict[str, str]] = {}
    for each in given.results.outcomes:
        verdicts.setdefault(each.dtype, {})[each.case] = each.verdict
    table = []
    for row in own.clauses:
        run = [case for case in row.cases if case in given.results.cases]
        results = {dtype: dict(Counter(of[case] for case in run if case in of)) for dtype, of in verdicts.items()}
        shown = {dtype: [bug for bug in row.mutants if bug in bugs] for dtype, bugs in absent.items()}
        table.append({
            "clause": row.clause, "text": row.text, "area": row.area, "code": row.code, "bugs": list(row.mutants),
            "cases": run, "cases_not_run": [case for case in row.cases if case not in given.results.cases],
            "verdicts": results, "bugs_absent": shown,
        })  # fmt: skip
    return table
