"""Which known bug explains a failed verification.

A mutant is a specification too. It explains a trace if the steps that failed are right under it, all of them, and none
that was right is wrong. That is a proof within the mutant's own enclosures; the matched filter beside it says how much
of the error is the mutant's (1: all of it, in size and direction), and orders siblings by what they leave over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.mutants.mutant import Mutant
from refmoe.policy.formats import ulp
from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import step_of
from refmoe.trace import Run, Trace
from refmoe.verify.findings import FAIL, FORCED, PASS, Check, Report
from refmoe.verify.free_running import Replica
from refmoe.verify.intake import Contents, take_in
from refmoe.verify.passes import Pass
from refmoe.verify.routing import Routing, valid
from refmoe.verify.subject import Subject
from refmoe.verify.tally import Limits
from refmoe.verify.verify import SIGNIFICANCE, acquit, assemble

Key = tuple[str, str]


@dataclass(frozen=True)
class Explanation:
    """How well one known bug explains a trace."""

    mutant: str
    about: str
    fix: str
    sources: tuple[str, ...]
    explains: bool
    """Whether all that failed passes under it, and all that passed still does."""
    still_failing: int
    newly_failing: int
    coefficient: float
    """Of the matched filter: 1 where the error is the mutant's, 0 where it has nothing to do with it."""
    residual: float
    """What it leaves of the error, root mean square over that of the whole error."""
    touches: int = 0
    """How many taps it can make wrong: of two that explain alike, the one that touches fewer says more."""


def diagnose(
    trace: Trace, config: Config, parameters: Parameters, runs: tuple[Run, ...] | None, policy: Policy, report: Report,
    mutants: Iterable[Mutant], significance: float = SIGNIFICANCE,
) -> tuple[Explanation, ...]:  # fmt: skip
    """The mutants that touch a failed step, those that explain the trace first, the best of them at the top."""
    failed = [check for check in report.checks if check.verdict == FAIL]
    if not failed:
        return ()
    steps = {check.step for check in failed}
    contents = take_in(trace, config, runs)
    limits = Limits(significance, contents.values, contents.tensors)
    wanted = {(check.run, check.tap) for check in failed if check.step != "router.experts"}
    right = Subject(config, parameters, contents.runs)
    expected = middle(trace, right, policy, wanted)
    found = [
        explain(each, trace, contents, right, policy, limits, report, expected)
        for each in mutants
        if each.in_one_pass and steps & set(each.touches)
    ]
    return tuple(sorted(found, key=rank))


def rank(found: Explanation) -> tuple[Any, ...]:
    """The best first: what explains, then what leaves the least."""
    left = found.residual if math.isfinite(found.residual) else math.inf
    return (not found.explains, round(left, 2), found.still_failing + found.newly_failing, found.touches, found.mutant)


def explain(
    mutant: Mutant, trace: Trace, contents: Contents, right: Subject, policy: Policy, limits: Limits, report: Report,
    expected: dict[Key, Any],
) -> Explanation:  # fmt: skip
    """Hold the trace against the mutant as if it were the specification."""
    model = mutant.model(right.config, right.parameters)
    wrong = Subject(model.config, model.parameters, mutant.runs(contents.runs), model.steps)
    mutated = mutant.policy(policy)
    judge = Chooser if "router.experts" in mutant.touches else Pass
    checks = judge_again(trace, wrong, mutated, contents, limits, right.config, judge)
    verdicts = {(check.run, check.tap): check.verdict for check in checks}
    still = sum(check.verdict == FAIL and verdicts[check.run, check.tap] != PASS for check in report.checks)
    newly = sum(check.verdict == PASS and verdicts[check.run, check.tap] == FAIL for check in report.checks)
    coefficient, residual = matched_filter(trace, policy, expected, middle(trace, wrong, mutated, set(expected)))
    explains, size = not still and not newly, len(mutant.touches)
    return Explanation(
        mutant.id, mutant.about, mutant.fix, mutant.sources, explains, still, newly, coefficient, residual, size
    )


class Chooser(Pass):
    """A pass under a bug that chooses by another rule: the right choice is its own, not the largest logits."""

    def _choose(self, name: str, expected: Any) -> Any:
        found = self._found(name, expected)
        if found is None:
            return super()._choose(name, expected)
        nothing = np.zeros(len(found))
        legal = (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all(axis=-1)
        self._record(
            self._run.run, name, Routing(expected, np.full(len(found), FORCED), legal, nothing, nothing, found)
        )
        self._unknown = None
        return found

    def _found(self, name: str, expected: Any) -> Any:
        """The trace's choice [T, k], or None where there is none, or one that is no choice at all."""
        if name not in self._present:
            return None
        found = np.asarray(self._read(name, "router.experts")).astype(np.int64)
        return found if valid(found, self.subject.config.experts).all() else None


def judge_again(
    trace: Trace, subject: Subject, policy: Policy, contents: Contents, limits: Limits, config: Config,
    judge: type[Pass] = Pass,
) -> list[Check]:  # fmt: skip
    """The checks of a trace against another specification, acquitted as `verify` acquits them."""

    def checked(recomputed: frozenset[Key] = frozenset(), unrounded: bool = False) -> list[Check]:
        seen = judge(trace, subject, policy, limits.excess, recomputed, unrounded).go()
        return assemble(seen, contents, config, limits)

    checks = checked()
    failed = frozenset((check.run, check.tap) for check in checks if check.verdict == FAIL)
    if failed:
        checks = acquit(checks, checked(recomputed=failed), "")
    if policy.consumers == "unrounded" and any(check.verdict == FAIL for check in checks):
        checks = acquit(checks, checked(unrounded=True), "")
    return checks


def middle(trace: Trace, subject: Subject, policy: Policy, wanted: set[Key]) -> dict[Key, Any]:
    """What exact arithmetic makes of the trace's own inputs, at the wanted taps."""
    with np.errstate(all="ignore"):
        return Replica(trace, subject, policy, {}, wanted, None).arrays()


def matched_filter(
    trace: Trace, policy: Policy, expected: dict[Key, Any], mutated: dict[Key, Any]
) -> tuple[float, float]:
    """How much of the error the mutant is, and what it leaves, over all failed taps."""
    product = reach = error_size = left = 0.0
    for key, right in expected.items():
        wrong = mutated.get(key)
        if wrong is None or wrong.shape != right.shape:
            return math.nan, math.inf
        found = np.asarray(trace.get(*key), np.float64)
        if found.shape != right.shape:
            return math.nan, math.inf
        with np.errstate(all="ignore"):
            scale = 1 / (ulp(right, policy.at(step_of(key[1]))) ** 2 + np.mean(right**2) * 1e-30)
            usable = np.isfinite(found) & np.isfinite(right) & np.isfinite(wrong)
            error, delta = np.where(usable, found - right, 0.0), np.where(usable, wrong - right, 0.0)
            product += float((error * delta * scale).sum())
            reach += float((delta**2 * scale).sum())
            error_size += float((error**2 * scale).sum())
            left += float(((error - delta) ** 2 * scale).sum())
    if reach == 0 or error_size == 0:
        return 0.0, math.inf
    return product / reach, math.sqrt(left / error_size)


def with_explanations(report: Report, found: tuple[Explanation, ...]) -> Report:
    """The report, with what explains it among its notes."""
    notes = [
        f"behaves like a known bug: {each.mutant} ({each.about}){f' Fix: {each.fix}.' if each.fix else ''}"
        for each in found
        if each.explains
    ]
    if not notes and any(check.verdict == FAIL for check in report.checks):
        notes = ["no known bug explains it"]
    return replace(report, notes=(*notes, *report.notes))
