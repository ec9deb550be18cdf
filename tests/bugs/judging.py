# SPDX-License-Identifier: Apache-2.0
"""The golden cases, engines with a bug, and verdicts that the tests of mutants share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case, find_cases, read_case
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import Explanation, diagnose
from refmoe.verifier.findings import FAIL, Report
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
DTYPES = ("float32", "bfloat16", "float16")


@cache
def case_named(name: str) -> Case:
    """A golden case."""
    return read_case(GOLDEN / name)


@cache
def parameters_of(name: str) -> Parameters:
    """The weights of a golden case."""
    return case_named(name).checkpoint().parameters


@cache
def cases_aimed_at(bug: str) -> tuple[str, ...]:
    """The cases that list a bug."""
    return tuple(folder.name for folder in find_cases(GOLDEN) if bug in case_named(folder.name).bugs)


def policy_for(bug: str, dtype: str) -> Policy:
    """The policy that a bug is judged under. The generic policies allow either of two equal experts."""
    found = policy(dtype)
    return replace(found, ties="lower", compared="stored") if bug == "router-tie-break-high-index" else found


def reference(bug: str, name: str) -> Parameters:
    """The parameters that a bug is held against: those of the case, or of a quantised checkpoint, dequantised."""
    found = parameters_of(name)
    return quantised(found, INT8) if "QUANT" in MUTANTS[bug].needs else found


def traced_under(bug: str | None, name: str, parameters: Parameters, used: Policy) -> Trace:
    """The trace of an engine with this bug; None: without any bug."""
    case = case_named(name)
    return run(None if bug is None else MUTANTS[bug], case.config, parameters, case.runs(), used)


def judged_under(trace: Trace, name: str, parameters: Parameters, used: Policy) -> Report:
    """The verdict about a trace, with these parameters and this policy."""
    case = case_named(name)
    return verify(trace, f"case {name}", case.config, parameters, case.runs(), used)


def traced(mutant: Mutant | str | None, name: str, dtype: str) -> Trace:
    """The trace of an engine with this bug on a case at a dtype; None: without any bug."""
    case, found = case_named(name), MUTANTS[mutant] if isinstance(mutant, str) else mutant
    return run(found, case.config, parameters_of(name), case.runs(), policy(dtype))


def judged(trace: Trace, name: str, dtype: str) -> Report:
    """The verdict about a trace, held against the specification."""
    return judged_under(trace, name, parameters_of(name), policy(dtype))


def judge(bug: str, name: str, dtype: str) -> tuple[Trace, Report]:
    """The trace of an engine with this bug, and the verdict, under the policy and parameters of the bug."""
    used, parameters = policy_for(bug, dtype), reference(bug, name)
    trace = traced_under(bug, name, parameters, used)
    return trace, judged_under(trace, name, parameters, used)


def diagnosed(
    trace: Trace, name: str, dtype: str, report: Report, mutants: Iterable[Mutant]
) -> tuple[Explanation, ...]:
    """The bugs among these that may explain the trace, best first."""
    case = case_named(name)
    return diagnose(trace, case.config, parameters_of(name), case.runs(), policy(dtype), report, mutants)


def assert_named(bug: str, found: tuple[Explanation, ...]) -> None:
    """Assert that the bug explains the trace, and comes first of all that do."""
    assert found[0].explains, found[:3]
    assert found[0].name == bug, found[:3]


def first_wrong_step(report: Report) -> str:
    """The first failed step, without run and layer; empty if none failed."""
    return next((check.step for check in report.checks if check.verdict == FAIL), "")


def explained(report: Report) -> str:
    """The headline and the first failed checks, for the message of an assertion."""
    checks = [check for check in report.checks if check.verdict == FAIL]
    return "\n".join([report.headline, *(f"{c.run}/{c.tap} {c.rung}: {c.reason}; {c.worst}" for c in checks[:8])])
