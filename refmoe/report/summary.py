"""Findings counted and put in order: by step, by run, and over all routing decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from refmoe.spec.taps import LAYER_TAPS
from refmoe.verify.findings import CONTESTABLE, FAIL, FORCED, PASS, TIE, UNDECIDABLE, Check, Decision, Report

STEPS = ("embedding", *LAYER_TAPS, "final_norm", "logits")
"""Steps in order of computation, the layers' own once."""


@dataclass(frozen=True)
class StepSummary:
    """One step over all layers and runs."""

    step: str
    checks: int
    passed: int
    failed: int
    undecidable: int
    error: float
    """Worst error in units of the allowed error; NaN where none is known."""
    excess: float
    """The excess that comes closest to its own limit or goes furthest beyond, in standard deviations."""
    excess_limit: float


@dataclass(frozen=True)
class Routing:
    """All decisions, counted, and those to look at."""

    decisions: int
    kinds: dict[str, int]
    absent: int
    """Decisions for which the trace shows no choice."""
    illegal: tuple[Decision, ...]
    deviating: tuple[Decision, ...]
    """Legal choices that exact arithmetic would not have made."""


def largest(values: Iterable[float]) -> float:
    """The largest that is a number, or NaN where there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def excess_share(check: Check) -> float:
    """The excess in units of its limit; NaN where there is no limit."""
    return check.excess / check.excess_limit if check.excess_limit > 0 else math.nan


def share(check: Check) -> float:
    """How much of what is allowed a check uses up: the larger of its error and its excess, each over its limit.

    Where the hard radius is infinite the error is nothing, and the excess alone speaks.
    """
    return largest((check.worst_error, excess_share(check)))


def worst_verdict(checks: Iterable[Check]) -> str | None:
    """The verdict that matters most, or None without checks."""
    verdicts = {check.verdict for check in checks}
    return next((verdict for verdict in (FAIL, UNDECIDABLE, PASS) if verdict in verdicts), None)


def run_names(report: Report) -> tuple[str, ...]:
    """The runs in the order in which they were executed."""
    return tuple(dict.fromkeys([c.run for c in report.checks] + [d.run for d in report.decisions]))


def in_order(steps: Iterable[str]) -> list[str]:
    """Steps in order of computation, each once; those that the specification does not know come last."""
    known = dict(zip(STEPS, range(len(STEPS)), strict=True))
    return sorted(dict.fromkeys(steps), key=lambda step: known.get(step, len(STEPS)))


def summarise_steps(report: Report) -> list[StepSummary]:
    """One summary per step that was checked, in order of computation."""
    groups: dict[str, list[Check]] = {}
    for check in report.checks:
        groups.setdefault(check.step, []).append(check)
    return [_summarise(step, groups[step]) for step in in_order(groups)]


def _summarise(step: str, checks: list[Check]) -> StepSummary:
    verdicts = [check.verdict for check in checks]
    limited = [check for check in checks if not math.isnan(excess_share(check))]
    closest = max(limited, key=excess_share, default=None)
    return StepSummary(
        step,
        len(checks),
        verdicts.count(PASS),
        verdicts.count(FAIL),
        verdicts.count(UNDECIDABLE),
        largest(check.worst_error for check in checks),
        closest.excess if closest else math.nan,
        closest.excess_limit if closest else math.nan,
    )


def summarise_routing(report: Report) -> Routing:
    """Counts of the kinds of decision, the illegal ones and the legal ones that deviate."""
    found = [d.kind for d in report.decisions]
    return Routing(
        len(report.decisions),
        {kind: found.count(kind) for kind in (FORCED, TIE, CONTESTABLE)},
        sum(not d.found for d in report.decisions),
        tuple(d for d in report.decisions if not d.legal),
        tuple(d for d in report.decisions if d.legal and deviates(d)),
    )


def deviates(decision: Decision) -> bool:
    """Whether the trace chose other experts than exact arithmetic; their order is not looked at."""
    return bool(decision.found) and set(decision.found) != set(decision.expected)


def wrong_choices(report: Report, run: str, tap: str) -> tuple[Decision, ...]:
    """The illegal decisions of the layer that a tap belongs to, where the tap is its choice of experts."""
    parts = tap.split(".")
    if parts[0] != "layers" or parts[2:] not in (["router", "experts"], ["router", "weights"]):
        return ()
    return tuple(d for d in report.decisions if not d.legal and (d.run, str(d.layer)) == (run, parts[1]))
