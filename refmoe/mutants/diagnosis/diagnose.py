"""The whole diagnosis of a failed verification: known bugs, then two at once, then structures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from refmoe.mutants.diagnosis.evidence import gather
from refmoe.mutants.diagnosis.known import explain, pairs, rank, suspects
from refmoe.mutants.diagnosis.structure import structural
from refmoe.mutants.diagnosis.weights import of_weights
from refmoe.mutants.mutant import Mutant
from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.trace import Run, Trace
from refmoe.verify.findings import FAIL, Explanation, Report
from refmoe.verify.verify import SIGNIFICANCE


def diagnose(
    trace: Trace, config: Config, parameters: Parameters, runs: tuple[Run, ...] | None, policy: Policy, report: Report,
    mutants: Iterable[Mutant], significance: float = SIGNIFICANCE, progress: Callable[[], None] | None = None,
) -> tuple[Explanation, ...]:  # fmt: skip
    """What can explain a failed trace, what does explain it first, the best of it at the top.

    A mutant that explains nothing but might explain a part stays in the list, with `explains` false. Pairs and
    structures are sought only where no mutant explains the trace, and are there only if they do.
    progress: called after each mutant.
    """
    if not any(check.verdict == FAIL for check in report.checks):
        return ()
    evidence = gather(trace, config, parameters, runs, policy, report, significance)
    suspected, found = suspects(evidence, mutants), []
    for each in suspected:
        explanation = explain(evidence, each)
        if explanation is not None:
            found.append(explanation)
        if progress is not None:
            progress()
    if not any(each.explains for each in found):
        found += pairs(evidence, suspected)
    if not any(each.explains for each in found):
        found += [*of_weights(evidence), *structural(evidence)]
    return tuple(sorted(found, key=rank))


def explained(report: Report, found: tuple[Explanation, ...]) -> Report:
    """The report with what explains it, and nothing that does not."""
    return replace(report, explanations=tuple(each for each in found if each.explains))
