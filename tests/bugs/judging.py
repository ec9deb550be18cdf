"""What tests of mutants share: golden cases, engines with a bug, and what the verifier says of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.run_engine import run
from refmoe.policy.load import policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case, find_cases, read_case
from refmoe.traces.trace import Trace
from refmoe.verify.diagnosis import Explanation, diagnose
from refmoe.verify.findings import FAIL, Report
from refmoe.verify.verify import verify

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


def traced(mutant: Mutant | str | None, name: str, dtype: str) -> Trace:
    """What an engine with this bug (None: without any) leaves of a case at a dtype."""
    case, found = case_named(name), MUTANTS[mutant] if isinstance(mutant, str) else mutant
    return run(found, case.config, parameters_of(name), case.runs(), policy(dtype))


def judged(trace: Trace, name: str, dtype: str) -> Report:
    """The verdict about a trace, held against the specification."""
    case = case_named(name)
    return verify(trace, f"case {name}", case.config, parameters_of(name), case.runs(), policy(dtype))


def diagnosed(
    trace: Trace, name: str, dtype: str, report: Report, mutants: Iterable[Mutant]
) -> tuple[Explanation, ...]:
    """Which of these bugs explain it, the best first."""
    case = case_named(name)
    return diagnose(trace, case.config, parameters_of(name), case.runs(), policy(dtype), report, mutants)


def assert_named(bug: str, found: tuple[Explanation, ...]) -> None:
    """The bug explains the trace, and comes first of all that do."""
    assert found[0].explains, found[:3]
    assert found[0].name == bug, found[:3]


def first_wrong_step(report: Report) -> str:
    """The step that is blamed first, without run and layer; empty where none is."""
    return next((check.step for check in report.checks if check.verdict == FAIL), "")


def explained(report: Report) -> str:
    """What an assertion shows when a report is not as expected."""
    checks = [check for check in report.checks if check.verdict == FAIL]
    return "\n".join([report.headline, *(f"{c.run}/{c.tap} {c.rung}: {c.reason}; {c.worst}" for c in checks[:8])])
