# SPDX-License-Identifier: Apache-2.0
"""The whole diagnosis of a failed verification: known bugs, settings, other arithmetic, two at once, structures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import numpy as np

from refmoe.bugs.mutant import PARALLEL, Mutant
from refmoe.bugs.sharded_mutant import ONE_DEVICE, on_ranks
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.sharded.layout import layouts
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.diagnosis.arithmetic import other_arithmetic
from refmoe.verifier.diagnosis.evidence import Evidence, gather
from refmoe.verifier.diagnosis.grammar import of_grammar
from refmoe.verifier.diagnosis.known import candidates, cause_of, explanations, pairs, rank
from refmoe.verifier.diagnosis.read_outs import under_the_other_name
from refmoe.verifier.diagnosis.rivals import ALIKE, noise, settle
from refmoe.verifier.diagnosis.settings import other_settings
from refmoe.verifier.findings import FAIL, STRUCTURE, Explanation, Report


@np.errstate(all="ignore")  # a stranger's values may be anything: infinities and NaN explain nothing
def diagnose(
    trace: Trace,
    config: Config,
    parameters: Parameters,
    runs: tuple[Run, ...] | None,
    policy: Policy,
    report: Report,
    mutants: Iterable[Mutant],
    progress: Callable[[], None] | None = None,
) -> tuple[Explanation, ...]:
    """The possible explanations of a failed trace, best first, those that explain all of it before the others.

    A cause that may explain only a part stays in the list, with `explains` false. Pairs and structures are tried only
    if no single cause explains the trace.

    report: the report of `verify` for the same trace, config, parameters, runs and policy
    progress: called for each cause, and once more for each that touches a failed step
    """
    if not any(check.verdict == FAIL for check in report.checks):
        return ()
    return search(gather(trace, config, parameters, runs, policy, report), mutants, progress)


@np.errstate(all="ignore")
def search(
    evidence: Evidence,
    mutants: Iterable[Mutant],
    progress: Callable[[], None] | None = None,
    before: Collection[str] = (),
) -> tuple[Explanation, ...]:
    """The explanations of a failed trace, as `diagnose` gives them.

    before: the names of what explains other traces of the same engine. These causes are tried first. If one leaves no
    more than rounding does, no other cause can be better, and none is tried.
    """
    step = progress if progress is not None else lambda: None
    misnamed = under_the_other_name(evidence)
    if misnamed:
        return tuple(misnamed)
    known, config = tuple(mutants), evidence.right.config
    causes = [cause_of(each) for each in known if each.in_one_pass]
    causes += [cause_of(each, STRUCTURE) for each in other_settings(config)]
    causes += other_arithmetic(evidence.policy, config.head_dim)
    again = [each for each in causes if each.name in before]
    if again:
        found = explanations(evidence, candidates(evidence, again, lambda: None))
        found = settle(evidence, found, {each.name: each.variation for each in again})
        best = next((each for each in found if each.explains), None)
        if best is not None and best.residual <= ALIKE * noise(evidence):
            return tuple(sorted(found, key=rank))
    tried = candidates(evidence, causes, step)
    found = explanations(evidence, tried, step)
    if not any(each.explains for each in found):
        sharded = [cause_of(each) for each in placed(known, config)]
        found += explanations(evidence, candidates(evidence, sharded, lambda: None))
        causes += sharded
    found = settle(evidence, found, {each.name: each.variation for each in causes})
    if not any(each.explains for each in found):
        found += pairs(evidence, tried)
    if not any(each.explains for each in found):
        found += of_grammar(evidence)
    return tuple(sorted(found, key=rank))


def placed(mutants: Iterable[Mutant], config: Config) -> list[Mutant]:
    """The mutants of a sharded run, on every layout with several devices that the model fits."""
    parallel = [each for each in mutants if each.changes == PARALLEL]
    return [on_ranks(each, layout) for each in parallel for layout in layouts(config) if layout != ONE_DEVICE]


def explained(report: Report, found: tuple[Explanation, ...]) -> Report:
    """The report with the explanations that hold, and no others."""
    return replace(report, explanations=tuple(each for each in found if each.explains))
