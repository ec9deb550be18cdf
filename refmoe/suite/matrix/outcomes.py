# SPDX-License-Identifier: Apache-2.0
"""The matrix: every mutant on every case at every dtype, judged as if it were a foreign engine.

It proves that the suite can fail. Beside the mutants the specification itself is run, and must pass everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import PARALLEL, Mutant
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.run_engine import run, same
from refmoe.bugs.sharded_mutant import ONE_DEVICE, on_ranks
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.steps.sharded.layout import layouts
from refmoe.suite import Case, read_case
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import FAIL, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

POLICIES = ("float32", "bfloat16", "float16")
SPECIFICATION = "-"
"""The name under which the specification itself is run."""

IMPOSSIBLE, IMPROBABLE, ROUTING = MANNERS = ("impossible", "improbable", "routing")
"""The ways to be killed: a value outside its legal interval, a statistic, an illegal choice of experts."""
INERT = "inert"
"""The verdict of a mutant that changes no bit of the trace."""


@dataclass(frozen=True)
class Work:
    """A case at a dtype, and the mutants to run on it."""

    case: Path
    policy: str
    mutants: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """One mutant on one case at one dtype."""

    mutant: str
    case: str
    policy: str
    verdict: str
    """`INERT`, or the verdict of the verification."""
    step: str = ""
    """The first wrong step, where it is killed."""
    by: str = ""
    """One of `MANNERS`, where it is killed."""
    rung: str = ""

    @property
    def killed(self) -> bool:
        return self.verdict == NOT_CONFORMANT


def judge_case(work: Work) -> list[Outcome]:
    """Run the mutants on a case and judge them; the specification itself comes first."""
    case = read_case(work.case)
    ground = case.checkpoint().parameters
    outcomes, judged = [], set()
    for name in (SPECIFICATION, *work.mutants):
        each = MUTANTS.get(name)
        text = work.policy + (each.judged_by if each else "")
        quantised_model = each is not None and _quantised_model(each)
        policy, parameters = named_policy(text), quantised(ground, INT8) if quantised_model else ground
        right = _right_run(work.case, text, quantised_model)
        if (text, quantised_model) not in judged:
            # the specification itself, under each policy and on each checkpoint that a mutant is judged by
            judged.add((text, quantised_model))
            report = verify(right, f"case {case.name}", case.config, parameters, case.runs(), policy)
            outcomes.append(outcome_of(SPECIFICATION, case.name, work.policy, report))
        if each is None:
            continue
        if each.changes == PARALLEL:
            outcomes.append(judge_parallel(each, case, work.policy))
            continue
        trace = run(each, case.config, parameters, case.runs(), policy)
        if same(trace, right):
            outcomes.append(Outcome(name, case.name, work.policy, INERT))
            continue
        report = verify(trace, f"case {case.name}", case.config, parameters, case.runs(), policy)
        outcomes.append(outcome_of(name, case.name, work.policy, report))
    return outcomes


def setting(mutant: str, case: Case, policy: str) -> tuple[Policy, Parameters]:
    """The policy and the weights by which a mutant is judged on a case at a dtype."""
    each, ground = MUTANTS[mutant], case.checkpoint().parameters
    return named_policy(policy + each.judged_by), quantised(ground, INT8) if _quantised_model(each) else ground


def _quantised_model(mutant: Mutant) -> bool:
    return "QUANT" in mutant.needs


def judge_parallel(mutant: Mutant, case: Case, policy: str) -> Outcome:
    """A mutant of the sharded run on a case: the first layout that kills it, or the last one that fits the model."""
    parameters, outcome = case.checkpoint().parameters, Outcome(mutant.id, case.name, policy, INERT)
    for layout in layouts(case.config):
        if layout == ONE_DEVICE:
            continue
        trace = run(on_ranks(mutant, layout), case.config, parameters, case.runs(), named_policy(policy))
        report = verify(trace, f"case {case.name}", case.config, parameters, case.runs(), named_policy(policy))
        outcome = outcome_of(mutant.id, case.name, policy, report)
        if outcome.killed:
            break
    return outcome


@lru_cache(maxsize=4)
def _right_run(folder: Path, policy: str, quantised_model: bool) -> Trace:
    case = read_case(folder)
    ground = case.checkpoint().parameters
    parameters = quantised(ground, INT8) if quantised_model else ground
    return run(None, case.config, parameters, case.runs(), named_policy(policy))


def outcome_of(mutant: str, case: str, policy: str, report: Report) -> Outcome:
    """The outcome of a mutant whose trace was verified."""
    if report.verdict != NOT_CONFORMANT or report.first_wrong is None:
        return Outcome(mutant, case, policy, report.verdict)
    check = next(check for check in report.checks if check.verdict == FAIL)
    by = ROUTING if check.step == "router.experts" else IMPOSSIBLE if check.outside else IMPROBABLE
    return Outcome(
        mutant=mutant, case=case, policy=policy, verdict=report.verdict, step=check.step, by=by, rung=check.rung
    )


def whole(cases: Sequence[Path], mutants: Sequence[str], policies: Sequence[str] = POLICIES) -> list[Work]:
    """The work of running all these mutants on all these cases."""
    return [Work(case, policy, tuple(mutants)) for case in cases for policy in policies]


def runnable() -> tuple[str, ...]:
    """The mutants that are variations of a forward pass, sharded or not."""
    return tuple(
        each.id for each in MUTANTS.values() if (each.in_one_pass or each.changes == PARALLEL) and not each.equivalent
    )
