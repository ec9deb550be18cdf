"""From a verification of what a harness wrote to an outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refmoe.engines.adapter import TAPS
from refmoe.engines.outcome import Cause, Outcome
from refmoe.engines.process import BROKEN
from refmoe.errors import InputError
from refmoe.policy.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case
from refmoe.traces.trace import Trace
from refmoe.verify.findings import FAIL, NOT_CONFORMANT, Report
from refmoe.verify.verify import SIGNIFICANCE, verify


@dataclass(frozen=True)
class Judge:
    """How traces are judged."""

    significance: float = SIGNIFICANCE
    diagnosing: bool = True
    """Whether what explains a failure is sought."""

    def judge(self, case: Case, parameters: Parameters, dtype: str, trace: Trace, policy: Policy) -> Outcome:
        """The outcome of a case at a dtype. What cannot be a result of this model at all is a broken answer."""
        name, config, runs = f"case {case.name}", case.config, case.runs()
        try:
            report = verify(trace, name, config, parameters, runs, policy, self.significance)
        except InputError as error:
            reason = str(error).removeprefix(f"{trace.path}: ")
            return Outcome(case.name, dtype, policy.name, BROKEN, f"its file: {reason}")
        if self.diagnosing and report.verdict == NOT_CONFORMANT:
            report = self._diagnosed(report, case, parameters, trace, policy)
        causes = tuple(
            Cause(each.name, each.kind, each.about, each.fix, each.sources) for each in report.explanations or ()
        )
        return Outcome(
            case.name, dtype, policy.name, report.verdict, why(report), None, report.first_wrong,
            worst_errors(report), causes,
        )  # fmt: skip

    def _diagnosed(self, report: Report, case: Case, parameters: Parameters, trace: Trace, policy: Policy) -> Report:
        from refmoe.bugs.catalogue import MUTANTS
        from refmoe.verify.diagnosis import diagnose, explained

        found = diagnose(
            trace, case.config, parameters, case.runs(), policy, report, MUTANTS.values(), self.significance
        )
        return explained(report, found)


def why(report: Report) -> str:
    """The reason of the first wrong step, or of the verdict without the verdict itself."""
    check = report.check(*report.first_wrong) if report.first_wrong is not None else None
    return report.headline.partition(": ")[2] if check is None else check.reason


def worst_errors(report: Report) -> dict[str, float]:
    """Per step, in order of computation, the largest error over the allowed one; NaN counts as the largest.

    What did not fail is within what is allowed, at most 1: where a check was acquitted, its own number is about
    another reading of its input.
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
