# SPDX-License-Identifier: Apache-2.0
"""The conformance run: first a smoke test of the harness, then every case at every dtype, and a verdict on each."""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from refmoe import __version__
from refmoe.checkpoints.size import total_parameters
from refmoe.engines.harness import Description, Harness, HarnessUnusable, Refused
from refmoe.engines.process import BROKEN, CRASHED, HarnessError
from refmoe.engines.protocol import TAPS
from refmoe.engines.results import SKIPPED, Cause, Engine, Outcome, Results
from refmoe.engines.run_case import kept_file, lacks, materialised, run_case
from refmoe.errors import InputError
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case
from refmoe.suite.power import with_power
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import FAIL, NOT_CONFORMANT, Report
from refmoe.verifier.intake import take_in
from refmoe.verifier.verify import SIGNIFICANCE, Settings, verify

TRIED = 3
"""The smoke test tries this many cases, the smallest for which the harness has the abilities."""

Log = Callable[[Outcome, str], None]
"""Called with each outcome and, where the harness has failed, the end of its standard error."""


@dataclass(frozen=True)
class Judge:
    """The settings by which traces are judged."""

    significance: float = SIGNIFICANCE
    diagnosing: bool = True
    """Whether failures are explained."""
    named: dict[str, float] = field(default_factory=dict, compare=False)
    """The causes named so far, each with the largest residual that it has left. The next failure tries them first."""

    def judge(self, case: Case, parameters: Parameters, dtype: str, trace: Trace, policy: Policy) -> Outcome:
        """The outcome of a case at a dtype. A trace that cannot come from this model is a broken answer."""
        name, config, runs = f"case {case.name}", case.config, case.runs()
        outcome = Outcome(case=case.name, dtype=dtype, policy=policy.name, verdict=BROKEN, reason="")
        try:
            report = verify(trace, name, config, parameters, runs, policy, Settings(self.significance))
            report = with_power(report, trace, config, policy)
        except InputError as error:
            return replace(outcome, reason=_about_its_file(error, trace))
        if self.diagnosing and report.verdict == NOT_CONFORMANT:
            report = self._diagnosed(report, case, parameters, trace, policy)
        return replace(
            outcome,
            verdict=report.verdict,
            reason=reason_of(report),
            first_wrong=report.first_wrong,
            worst_errors=worst_errors(report),
            explanations=tuple(
                Cause(name=each.name, kind=each.kind, about=each.about, fix=each.fix, sources=each.sources)
                for each in report.explanations or ()
            ),
        )

    def _diagnosed(self, report: Report, case: Case, parameters: Parameters, trace: Trace, policy: Policy) -> Report:
        from refmoe.bugs.catalogue import MUTANTS
        from refmoe.verifier.diagnosis import explained, gather, search

        evidence = gather(trace, case.config, parameters, case.runs(), policy, report)
        found = search(evidence, MUTANTS.values(), before=self.named)
        for each in found:
            if each.explains and math.isfinite(each.residual):
                self.named[each.name] = max(each.residual, self.named.get(each.name, 0.0))
        return explained(report, found)


def _about_its_file(error: InputError, trace: Trace) -> str:
    return f"its file: {str(error).removeprefix(f'{trace.path}: ')}"


def reason_of(report: Report) -> str:
    """The reason of the first wrong step; without one, the headline after its verdict."""
    check = report.check(*report.first_wrong) if report.first_wrong is not None else None
    return report.headline.partition(": ")[2] if check is None else check.reason


def worst_errors(report: Report) -> dict[str, float]:
    """Per step, in order of computation, the largest error over the allowed one. NaN counts as the largest.

    A check that did not fail counts as at most 1. It may have passed by a second reading of its input, and its own
    error belongs to the first.
    """
    worst: dict[str, float] = {}
    for check in report.checks:
        if check.step == "router.experts":
            continue  # a choice has no size of error
        before, now = worst.get(check.step, 0.0), check.worst_error
        if check.verdict != FAIL:
            now = min(now, 1.0)
        worst[check.step] = math.nan if math.isnan(before) or math.isnan(now) else max(before, now)
    return {step: worst[step] for step in TAPS if step in worst}


@dataclass(frozen=True)
class Suite:
    """The cases and dtypes that an engine is held against."""

    cases: Sequence[Case]
    """The cases to run."""
    smoke: Sequence[Case]
    """The cases among which the smoke test chooses."""
    dtypes: Sequence[str] = ()
    """The dtypes to run; empty: all that the harness has."""
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """Per dtype a policy in place of the one that the harness declares."""
    judge: Judge = field(default_factory=Judge)
    keep: Path | None = None
    """A folder for the traces that come back."""


def conform(harness: Harness, options: Mapping[str, str], suite: Suite, log: Log = lambda *_: None) -> Results:
    """Run a suite on a harness that has been started, then end the harness.

    options: further identification of the engine, such as the options of its adapter.   log: called after each outcome.
    Raises HarnessUnusable where the smoke test finds the harness itself broken, InputError where it lacks a dtype.
    """
    described = harness.description
    try:
        policies = chosen_policies(described, suite)
        with tempfile.TemporaryDirectory(prefix="refmoe-conform-") as temporary:
            folder = Path(temporary)
            smoke = smoke_test(harness, suite.smoke, next(iter(policies)), folder)
            outcomes = []
            for case in suite.cases:
                for outcome in _outcomes(harness, case, policies, suite, folder):
                    outcomes.append(outcome)
                    log(outcome, harness.log if outcome.failed else "")
        note = harness.stop()
    finally:
        harness.kill()
    return Results(
        engine=Engine(described.name, described.version, options),
        platform={"system": platform.system(), "machine": platform.machine()},
        refmoe=__version__,
        significance=suite.judge.significance,
        cases={case.name: case.digest for case in suite.cases},
        smoke=smoke,
        outcomes=tuple(outcomes),
        notes=() if note is None else (note,),
    )


def chosen_policies(described: Description, suite: Suite) -> dict[str, Policy]:
    """The policy of each dtype to be run. Raises InputError for a dtype that the harness lacks."""
    for dtype in (*suite.dtypes, *suite.policies):
        if dtype not in described.dtypes:
            raise InputError(
                f"dtype {dtype}: {described.name} {described.version} does not have it, but one of "
                f"{', '.join(described.dtypes)} was expected"
            )
    return {
        dtype: suite.policies.get(dtype) or named_policy(described.policies.get(dtype, dtype))
        for dtype in suite.dtypes or described.dtypes
    }


def _outcomes(
    harness: Harness, case: Case, policies: Mapping[str, Policy], suite: Suite, folder: Path
) -> Iterator[Outcome]:
    """The outcomes of one case, dtype by dtype."""
    kept = {dtype: None if suite.keep is None else kept_file(suite.keep, case.name, dtype) for dtype in policies}
    skipped = {
        dtype: Outcome(case=case.name, dtype=dtype, policy=policy.name, verdict=SKIPPED, reason="")
        for dtype, policy in policies.items()
    }
    lacking = lacks(case.runs(), harness.description.abilities)
    if lacking is not None:
        yield from (replace(each, reason=lacking) for each in skipped.values())
        return
    parameters = case.checkpoint().parameters
    with materialised(case, parameters, folder, harness.description.layout) as checkpoint:
        for dtype, policy in policies.items():
            try:
                with run_case(harness, case, checkpoint, dtype, policy.name, kept[dtype]) as trace:
                    outcome = suite.judge.judge(case, parameters, dtype, trace, policy)
            except Refused as refused:
                outcome = replace(skipped[dtype], reason=refused.reason, issue=refused.issue)
            except HarnessError as error:
                outcome = replace(skipped[dtype], verdict=error.kind, reason=error.reason)
            yield outcome


# ---- the smoke test


def smoke_test(harness: Harness, cases: Sequence[Case], dtype: str, folder: Path) -> str:
    """Find faults of the harness itself, before anything is said about its engine.

    The smallest case is run twice. Both files must have every promised tap, in shapes that fit the model, and the same
    dtypes. Values are not looked at. An engine that refuses the case, reports an error or dies proves nothing about
    its harness. Then the next larger case is tried, up to `TRIED`; the suite finds out the rest.

    returns: in words, what was run.   Raises HarnessUnusable with the fault of the harness.
    """
    able = [case for case in cases if lacks(case.runs(), harness.description.abilities) is None]
    said = "nothing: no case needs only the abilities of the harness"
    for case in sorted(able, key=work)[:TRIED]:
        what = f"case {case.name} in {dtype}"
        try:
            with materialised(case, case.checkpoint().parameters, folder, harness.description.layout) as checkpoint:
                if _form(harness, case, checkpoint, dtype) != _form(harness, case, checkpoint, dtype):
                    raise HarnessUnusable(f"the harness is broken: {what}, run twice, gave other dtypes", harness.log)
            return f"{what}, twice"
        except Refused as refused:
            said = f"nothing: {what} was skipped: {refused.reason}"
        except HarnessError as error:
            if error.kind != CRASHED:
                raise HarnessUnusable(f"the harness is broken: {what}: {error.reason}", harness.log) from None
            said = f"nothing: {what} crashed: {error.reason}"
    return said


def _form(harness: Harness, case: Case, checkpoint: Path, dtype: str) -> dict[str, str]:
    """Run a case; the dtype of each key of its file. Raises HarnessUnusable where a shape does not fit the model."""
    with run_case(harness, case, checkpoint, dtype, dtype) as trace:
        try:
            take_in(trace, case.config, case.runs())
        except InputError as error:
            raise HarnessUnusable(
                f"the harness is broken: case {case.name} in {dtype}: {_about_its_file(error, trace)}", harness.log
            ) from None
        return {key: tensor.dtype for key, tensor in trace.tensors.items()}


def work(case: Case) -> tuple[int, str]:
    """The size of a case, parameters times tokens, and its name: a key for sorting."""
    return total_parameters(case.config) * sum(len(run.tokens) for run in case.runs()), case.name
