# SPDX-License-Identifier: Apache-2.0
"""Counts of the findings: by step, by run, and over all routing decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from refmoe.spec.taps import LAYER_TAPS, READ_OUT_TAPS
from refmoe.verifier.findings import (
    CONTESTABLE,
    FAIL,
    FORCED,
    PASS,
    TIE,
    UNDECIDABLE,
    Check,
    ContestableCode,
    Decision,
    Report,
)

STEPS = ("embedding", *LAYER_TAPS, "final_norm", "logits", *READ_OUT_TAPS)
"""The steps in order of computation. A layer's steps occur once."""


@dataclass(frozen=True)
class StepSummary:
    """The checks of one step, over all layers and runs."""

    step: str
    checks: int
    passed: int
    failed: int
    undecidable: int
    error: float
    """The worst error of the decided checks, in units of the allowed error; NaN if none is known."""
    excess: float
    """The excess with the largest share of its limit, in standard deviations; NaN if there is none."""
    excess_limit: float


@dataclass(frozen=True)
class Routing:
    """Counts of all routing decisions, and the decisions worth a look."""

    decisions: int
    kinds: dict[str, int]
    absent: int
    """The number of decisions that the trace does not show."""
    illegal: tuple[Decision, ...]
    deviating: tuple[Decision, ...]
    """The legal decisions that differ from the choice of exact arithmetic."""


def largest(values: Iterable[float]) -> float:
    """The largest value that is not NaN, or NaN if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def excess_share(check: Check) -> float:
    """The excess in units of its limit; NaN if there is no limit."""
    return check.excess / check.excess_limit if check.excess_limit > 0 else math.nan


def share(check: Check) -> float:
    """The distance of a check from its limits: 1 is at a limit. NaN where no limit applies.

    For a check that passes it is the excess in units of its limit. Its error says nothing: rounding to nearest brings
    every honest engine close to the end of the legal interval. For any other check it is the larger of error and
    excess, each in units of its limit.
    """
    if check.verdict == PASS:
        return excess_share(check)
    return largest((check.worst_error, excess_share(check)))


def worst_verdict(checks: Iterable[Check]) -> str | None:
    """The worst verdict of the checks, or None without checks."""
    verdicts = {check.verdict for check in checks}
    return next((verdict for verdict in (FAIL, UNDECIDABLE, PASS) if verdict in verdicts), None)


def run_names(report: Report) -> tuple[str, ...]:
    """The names of the runs, in order of execution."""
    return tuple(dict.fromkeys([c.run for c in report.checks] + [d.run for d in report.decisions]))


def in_order(steps: Iterable[str]) -> list[str]:
    """The steps in order of computation, each once. Unknown steps come last."""
    known = dict(zip(STEPS, range(len(STEPS)), strict=True))
    return sorted(dict.fromkeys(steps), key=lambda step: known.get(step, len(STEPS)))


def summarise_steps(report: Report) -> list[StepSummary]:
    """A summary per checked step, in order of computation."""
    groups: dict[str, list[Check]] = {}
    for check in report.checks:
        groups.setdefault(check.step, []).append(check)
    return [_summarise(step, groups[step]) for step in in_order(groups)]


def _summarise(step: str, checks: list[Check]) -> StepSummary:
    verdicts = [check.verdict for check in checks]
    limited = [check for check in checks if not math.isnan(excess_share(check))]
    closest = max(limited, key=excess_share, default=None)
    return StepSummary(
        step=step,
        checks=len(checks),
        passed=verdicts.count(PASS),
        failed=verdicts.count(FAIL),
        undecidable=verdicts.count(UNDECIDABLE),
        error=largest(check.worst_error for check in checks if check.verdict != UNDECIDABLE),
        excess=closest.excess if closest else math.nan,
        excess_limit=closest.excess_limit if closest else math.nan,
    )


def summarise_routing(report: Report) -> Routing:
    """The counts of each kind of decision, the illegal decisions, and the legal ones that deviate."""
    found = [d.kind for d in report.decisions]
    return Routing(
        decisions=len(report.decisions),
        kinds={kind: found.count(kind) for kind in (FORCED, TIE, CONTESTABLE)},
        absent=sum(not d.found for d in report.decisions),
        illegal=tuple(d for d in report.decisions if not d.legal),
        deviating=tuple(d for d in report.decisions if d.legal and deviates(d)),
    )


def telling(codes: tuple[ContestableCode, ...]) -> tuple[ContestableCode, ...]:
    """The codes worth a look: those by which the engine differs from the policy's own rule, or else all."""
    return tuple(code for code in codes if code.deviates) or codes


def deviates(decision: Decision) -> bool:
    """Whether the trace chose another set of experts than exact arithmetic. The order does not count."""
    return bool(decision.found) and set(decision.found) != set(decision.expected)
