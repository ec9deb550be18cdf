# SPDX-License-Identifier: Apache-2.0
"""The heat map of a verification: a row per step, a column per layer. A cell shows one run, or all runs together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from refmoe.report.summary import in_order, largest, run_names, share, worst_verdict
from refmoe.report.wording import (
    RUNGS,
    count,
    error_words,
    excess_words,
    found_and_expected,
    number,
    place,
    visible,
    why,
)
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Check, Report

ROOMY = 8
"""The most layers at which a cell has room for a number."""

EXPLAINED = 1000
"""The most checks whose reasons a page holds. The JSON report has the reasons of all checks."""

LEVELS = {
    "a": ("pass1", "·", "passes"), "b": ("pass2", "·", "passes, with an excess above half of its limit"),
    "e": ("fail1", "✕", "fails, up to 3 times the limit"), "f": ("fail2", "✕", "fails, up to 30 times"),
    "g": ("fail3", "✕", "fails, beyond 30 times"), "u": ("open", "?", "undecidable"), "-": ("none", "", "no check"),
}  # fmt: skip
"""Per code of a cell's state: its CSS class, the symbol of its verdict, and its words in the legend."""

PASS_BOUNDS, FAIL_BOUNDS = (0.5,), (3.0, 30.0)


@dataclass(frozen=True)
class Cell:
    """The contents of a cell, over all runs."""

    level: str
    symbol: str
    number: str
    detail: str
    first: bool
    """Whether the first wrong step of the trace is among the checks of this cell."""


@dataclass(frozen=True)
class Row:
    """A step. Outside the layers it has one cell; inside, one per layer, or None where there is no check."""

    step: str
    cells: tuple[Cell | None, ...]
    outside: bool


@dataclass(frozen=True)
class HeatMap:
    """The map over all runs, and the JSON that the page's script needs to show a single run."""

    layers: tuple[int, ...]
    rows: tuple[Row, ...]
    data: str
    roomy: bool


def heat_map(report: Report) -> HeatMap:
    """Lay out all checks. Cells count row by row, from left to right, as in the page's script."""
    layers = tuple(sorted({check.layer for check in report.checks if check.layer is not None}))
    groups: dict[tuple[str, int | None], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.step, check.layer), []).append(check)
    roomy = len(layers) <= ROOMY
    rows = []
    shown: list[list[Check]] = []
    for step in in_order(step for step, _ in groups):
        for columns in ((None,), layers):
            here = [groups.get((step, column), []) for column in columns]
            if any(here):
                cells = tuple(_cell(report, checks, roomy) if checks else None for checks in here)
                rows.append(Row(visible(step), cells, columns == (None,)))
                shown += [checks for checks in here if checks]
    return HeatMap(layers, tuple(rows), _data(report, shown, roomy), roomy)


def level(verdict: str | None, amount: float) -> str:
    """The code of a cell's state.   amount: the largest distance in units of its limit, as `share` gives it"""
    if verdict is None:
        return "-"
    if verdict == UNDECIDABLE:
        return "u"
    codes, bounds = ("efg", FAIL_BOUNDS) if verdict == FAIL else ("ab", PASS_BOUNDS)
    return codes[sum(amount > bound for bound in bounds)]


def _cell(report: Report, checks: Sequence[Check], roomy: bool) -> Cell:
    verdict = worst_verdict(checks)
    name, symbol, _ = LEVELS[level(verdict, largest(map(share, checks)))]
    first = report.first_wrong in {(check.run, check.tap) for check in checks}
    return Cell(
        level=name, symbol=symbol, number=_amount(checks) if roomy else "", detail=_detail(checks, first), first=first
    )


def _amount(checks: Sequence[Check]) -> str:
    amount = largest(map(share, checks))
    return "" if worst_verdict(checks) == UNDECIDABLE else number(amount, "")


def _detail(checks: Sequence[Check], first: bool) -> str:
    """The tooltip of a cell over all runs."""
    failed = [check for check in checks if check.verdict == FAIL]
    unsure = [check for check in checks if check.verdict == UNDECIDABLE]
    runs = count(len(checks), "run")
    if failed:
        words = [f"fails in {len(failed)} of {runs}"] + [f"undecidable in {len(unsure)}"] * bool(unsure)
    elif unsure:
        words = [f"undecidable in {len(unsure)} of {runs}"]
    else:
        words = [f"passes in {runs}"]
    worst = max(checks, key=lambda check: (check.verdict == FAIL, -1.0 if math.isnan(share(check)) else share(check)))
    if worst.verdict != UNDECIDABLE:
        words += [f"{'worst' if failed else 'closest to a limit'} in run {visible(worst.run)}: {_numbers(worst)}"]
    if first:
        words += ["here is the first wrong step"]
    return f"{visible(checks[0].tap)}: {'; '.join(words)}."


def _numbers(check: Check) -> str:
    excess = excess_words(check)
    return f"largest error {error_words(check.worst_error)}" + (f", excess {excess}" if excess else "")


def _data(report: Report, shown: list[list[Check]], roomy: bool) -> str:
    """All checks as JSON, by run and cell. Texts that repeat are stored once, and referred to by number."""
    runs = run_names(report)
    index = {run: i for i, run in enumerate(runs)}
    texts: dict[str, int] = {"": 0}
    states = [["-"] * len(shown) for _ in runs]
    numbers = [[""] * len(shown) for _ in runs]
    explained = 0
    for position, checks in enumerate(shown):
        for check in checks:
            i = index[check.run]
            states[i][position] = level(check.verdict, share(check))
            reason = ""
            if check.reason and explained < EXPLAINED:
                explained += check.verdict != PASS
                reason = _reason(check, report)
            known = [texts.setdefault(text, len(texts)) for text in (RUNGS.get(check.rung, ""), reason)]
            error = "legal" if check.worst_error <= 1 else number(check.worst_error)
            values = [error, number(check.excess), number(check.excess_limit)]
            amount = [_amount([check])] if roomy else []
            numbers[i][position] = " ".join([*values, *map(str, known), *amount])
    document = {
        "runs": [visible(run) for run in runs],
        "first": visible(report.first_wrong[0]) if report.first_wrong else "",
        "taps": [visible(checks[0].tap) for checks in shown],
        "levels": {code: [name, symbol] for code, (name, symbol, _) in LEVELS.items()},
        "states": ["".join(state) for state in states],
        "numbers": numbers,
        "texts": list(texts),
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # so that no name can end the script element that holds the JSON


def _reason(check: Check, report: Report) -> str:
    parts = [why(check, report)]
    if check.verdict == FAIL and check.worst is not None:
        parts.append(
            ", ".join(
                filter(
                    None, (place(check.step, check.worst.where, check.worst.expert), found_and_expected(check.worst))
                )
            )
        )
    return "; ".join(parts)
