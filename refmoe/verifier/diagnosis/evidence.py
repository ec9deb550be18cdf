# SPDX-License-Identifier: Apache-2.0
"""A failed trace, and its checks against a specification with a bug."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from refmoe.arithmetic.formats import ulp
from refmoe.bugs.mutant import Mutant
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.findings import FAIL, FORCED, PASS, UNDECIDABLE, Check, Report
from refmoe.verifier.free_running import Replica
from refmoe.verifier.intake import Contents, take_in
from refmoe.verifier.passes import Key, Pass, Reading
from refmoe.verifier.routing import Routing, consistent, valid
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import apply_second_pass, assemble

FARTHEST = 2.0**400
"""A distance counts as this many spacings at most, so that sums of squares of distances stay finite."""
SAMPLED = 1 << 18
"""The most values of an error that the matched filter reads. Of a longer error it reads every n-th value."""


class Variation(Protocol):
    """A changed specification that a trace can be held against: a mutant, or two mutants at once."""

    @property
    def touches(self) -> tuple[str, ...]: ...
    def model(self, config: Config, parameters: Parameters) -> Model: ...
    def policy(self, policy: Policy) -> Policy: ...
    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]: ...


@dataclass(frozen=True)
class Evidence:
    """A failed trace, its report, and exact results at its failed taps."""

    trace: Trace
    right: Subject
    policy: Policy
    contents: Contents
    limits: Limits
    report: Report
    failed: tuple[Check, ...]
    expected: dict[Key, Any] = field(default_factory=dict)
    """Exact results from the trace's own inputs, at the first failed tap of each step and at each with NaN."""
    error: Any = None
    """The errors at all expected taps, in units of their spacing, at most `SAMPLED` of them. [n]"""


def gather(
    trace: Trace, config: Config, parameters: Parameters, runs: tuple[Run, ...] | None, policy: Policy, report: Report
) -> Evidence:
    """The evidence of a trace that has failed."""
    contents = take_in(trace, config, runs)
    limits = Limits(report.significance, contents.values, contents.tensors)
    right = Subject(config, parameters, contents.runs)
    failed = tuple(check for check in report.checks if check.verdict == FAIL)
    firsts = {check.step: (check.run, check.tap) for check in reversed(failed) if check.step != "router.experts"}
    wanted = {*firsts.values(), *((c.run, c.tap) for c in failed if not _finite(trace, c))}
    evidence = Evidence(
        trace=trace, right=right, policy=policy, contents=contents, limits=limits, report=report, failed=failed
    )
    found = {key: np.asarray(trace.get(*key), np.float64) for key in wanted}
    expected = middle(evidence, right, policy, wanted)
    expected = {key: array for key, array in expected.items() if found[key].shape == array.shape}
    evidence = replace(evidence, expected=expected)
    return replace(evidence, error=weighted(evidence, found))


def _finite(trace: Trace, check: Check) -> bool:
    if check.step == "router.experts":
        return True
    return bool(np.isfinite(np.asarray(trace.get(check.run, check.tap), np.float64)).all())


def weighted(evidence: Evidence, arrays: dict[Key, Any]) -> Any:
    """The distances of arrays from the expected ones, in units of their spacing. A distance that is not finite is 0.

    returns: [n], at most `SAMPLED` values; None if an array is missing or has another shape
    """
    parts = []
    for key, right in evidence.expected.items():
        array = arrays.get(key)
        if array is None or array.shape != right.shape:
            return None
        with np.errstate(all="ignore"):
            distance = ((array - right) / ulp(right, evidence.policy.at(step_of(key[1])))).reshape(-1)
        parts.append(np.where(np.isfinite(distance), np.clip(distance, -FARTHEST, FARTHEST), 0.0))
    if not parts:
        return np.zeros(0)
    together = np.concatenate(parts)
    return together[:: -(-max(together.size, 1) // SAMPLED)]


def middle(evidence: Evidence, subject: Subject, policy: Policy, wanted: set[Key]) -> dict[Key, Any]:
    """The results of exact arithmetic at the wanted taps, from the trace's own inputs."""
    subject = replace(subject, runs=until(subject.runs, {run for run, _ in wanted}))
    with np.errstate(all="ignore"):
        return Exact(evidence.trace, subject, policy, open_choices={}, wanted=wanted, generator=None).arrays()


class Exact(Replica):
    """A replica without any rounding. It replaces a choice of experts that is invalid by the right one."""

    def _tap(self, name: str, x: Any) -> Any:
        chosen = super()._tap(name, x)
        if step_of(name) != "router.experts":
            return chosen
        return np.where(valid(chosen, self.subject.config.experts)[:, None], chosen, x)


class UnderBug(Pass):
    """A pass under a bug. The bug may produce infinities and NaN, so every overflow is allowed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ops.events.append("bug")


class Chooser(UnderBug):
    """A pass under a bug that chooses experts by another rule. The choice of that rule is the legal one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chosen_by: tuple[Any, Any] | None = None
        ops: Any = self.ops
        choose = ops.top_k

        def top_k(scores: Any, k: int) -> Any:
            ids = choose(scores, k)
            self._chosen_by = scores, ids
            return ids

        ops.top_k = top_k

    def _choose(self, name: str, expected: Any) -> Any:
        found = self._found(name)
        if found is None:
            return super()._choose(name, expected)
        zeros = np.zeros(len(found))
        legal = (np.sort(found, axis=-1) == np.sort(expected, axis=-1)).all(axis=-1)
        if self._chosen_by is not None and np.array_equal(self._chosen_by[1], expected):
            # the ids are a top-k of the scores: where scores are equal, or rounding can exchange two, either is legal
            scores = self._chosen_by[0].settle()
            legal |= consistent(scores.mid - scores.r, scores.mid + scores.r, found)
        forced = np.full(len(found), FORCED)
        routing = Routing(expected=expected, kind=forced, legal=legal, margin=zeros, movable=zeros, found=found)
        self._record(self._run.run, name, routing)
        self._unknown = None
        return found

    def _found(self, name: str) -> Any:
        """The trace's choice, integers [T, k]. None if the trace has none, or one with invalid ids."""
        if name not in self._present:
            return None
        found = np.asarray(self._read(name, "router.experts")).astype(np.int64)
        return found if valid(found, self.subject.config.experts).all() else None


def subject_of(evidence: Evidence, variation: Variation) -> Subject:
    """The specification with the variation."""
    right = evidence.right
    model = variation.model(right.config, right.parameters)
    return Subject(model.config, model.parameters, variation.runs(evidence.contents.runs), model.steps)


def until(runs: tuple[Run, ...], names: Set[str]) -> tuple[Run, ...]:
    """The runs up to the last one with one of these names."""
    last = max((i for i, run in enumerate(runs) if run.run in names), default=len(runs) - 1)
    return runs[: last + 1]


def judge_again(
    evidence: Evidence, subject: Subject, policy: Policy, judge: Callable[..., Pass] = UnderBug
) -> dict[Key, str]:
    """The verdict of each check against a changed specification."""
    return {(check.run, check.tap): check.verdict for check in checks_again(evidence, subject, policy, judge)}


def judge_first(evidence: Evidence, subject: Subject, policy: Policy, judge: Callable[..., Pass]) -> dict[Key, str]:
    """The verdicts for the runs up to the first one with a failed check.

    This costs a fraction of `judge_again` and rejects most specifications. Once it is known that some check fails,
    other verdicts may be FAIL where `judge_again` gives another one.
    """
    first = {evidence.failed[0].run}
    contents = replace(evidence.contents, runs=until(evidence.contents.runs, first))
    subject = replace(subject, runs=until(subject.runs, first))
    found = checks_again(replace(evidence, contents=contents), subject, policy, judge, hurried=True)
    return {(check.run, check.tap): check.verdict for check in found}


def checks_again(
    evidence: Evidence, subject: Subject, policy: Policy, judge: Callable[..., Pass], hurried: bool = False
) -> list[Check]:
    """The checks against a changed specification or policy, with the same second passes as in `verify`.

    The order of the second passes is reversed: unrounded inputs come first, because only they can change the verdict
    of the first failed check.

    hurried: whether to skip the last pass if the first failed check keeps its verdict. Other checks may then keep a
    FAIL that the last pass would change.
    """
    right, limits = evidence.right.config, evidence.limits

    def checked(reading: Reading) -> list[Check]:
        seen = judge(evidence.trace, subject, policy, limits.excess, reading).go()
        return assemble(seen, evidence.contents, right, policy, limits)

    checks = first = checked(Reading())
    failed = frozenset((check.run, check.tap) for check in checks if check.verdict == FAIL)
    if failed and policy.consumers == "unrounded":
        checks = apply_second_pass(checks, checked(Reading(unrounded=True)), "")
    if failed and not (hurried and _stays(evidence, first, checks)):
        checks = apply_second_pass(checks, checked(Reading(recomputed=failed)), "")
    return checks


def _stays(evidence: Evidence, first: list[Check], checks: list[Check]) -> bool:
    """Whether the first failed check counts and still fails. Its inputs passed, so recomputing them changes nothing.

    first: the checks before any second pass
    """
    at = next(i for i, check in enumerate(first) if check.verdict == FAIL)
    wrong = {check.run for check in evidence.failed}
    before = {(check.run, check.tap): check.verdict for check in evidence.report.checks}
    counted = first[at].run in wrong and before[first[at].run, first[at].tap] in (PASS, FAIL)
    return counted and checks[at].verdict == FAIL


def still_failing(
    evidence: Evidence, verdicts: dict[Key, str], wrong: dict[Key, Any], checks: Sequence[Check] | None = None
) -> int:
    """The number of failed checks that were judged again and still fail.

    A check with values that are not finite has no bound under a bug that produces such values. The bug explains the
    check if it produces them in the same places.

    wrong: the results of the changed specification at the expected taps
    """
    count = 0
    for check in evidence.failed if checks is None else checks:
        key = (check.run, check.tap)
        if key not in verdicts or verdicts[key] == PASS:
            continue
        count += not (verdicts[key] == UNDECIDABLE and _same_gaps(evidence, key, wrong.get(key)))
    return count


def _same_gaps(evidence: Evidence, key: Key, wrong: Any) -> bool:
    """Whether trace and changed specification have values that are not finite, in the same places."""
    if wrong is None:
        return False
    gaps = ~np.isfinite(np.asarray(evidence.trace.get(*key), np.float64))
    return bool(gaps.shape == wrong.shape and gaps.any() and (gaps == ~np.isfinite(wrong)).all())


def newly_failing(evidence: Evidence, verdicts: dict[Key, str]) -> int:
    """The number of passed checks that were judged again and now fail.

    Only runs with a failed check count, because a bug may affect only prompts, or only single tokens.
    """
    wrong = {check.run for check in evidence.failed}
    passed = (check for check in evidence.report.checks if check.verdict == PASS and check.run in wrong)
    return sum(verdicts.get((check.run, check.tap)) == FAIL for check in passed)


def changes_choice(mutant: Mutant | Variation) -> bool:
    """Whether the mutant chooses experts by another rule."""
    return "router.experts" in mutant.touches
