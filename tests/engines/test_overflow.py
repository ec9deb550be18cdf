# SPDX-License-Identifier: Apache-2.0
"""Cases that overflow in a dtype cost no healthy engine its exit status, and hide no fault of an engine's own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.api.conforming import CANNOT, FAILED, WELL, sort_failures, whole_verdict
from refmoe.bugs.run_engine import run
from refmoe.engines.judge import Judge, Question
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Engine, Outcome, Results, read_results, write_results
from refmoe.profiles.load import policy
from refmoe.spec.model import Parameters
from refmoe.suite import Case, read_case
from refmoe.suite.overflow import Overflow, explains_open, overflow
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, UNDECIDABLE
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
FIRST = Overflow("prefill", "layers.0.expert.hidden")
"""gate x up passes 65504, the largest float16, as the exact golden says."""


@cache
def setting(name: str) -> tuple[Case, Parameters]:
    case = read_case(GOLDEN / name)
    return case, case.checkpoint().parameters


def traced(name: str, dtype: str, **changes: Any) -> Trace:
    """The trace of a healthy engine, in which the first value of some taps is replaced."""
    case, parameters = setting(name)
    trace = run(None, case.config, parameters, case.runs(), policy(dtype))
    arrays = {key: np.array(tensor.map()) for key, tensor in trace.tensors.items()}
    for key, value in changes.items():
        arrays[key].flat[0] = value
    return held_trace(trace.header, arrays, "an engine")


def judged(name: str, dtype: str, trace: Trace) -> Outcome:
    case, parameters = setting(name)
    question = Question(case, dtype, policy(dtype), trace, golden=False)
    return Judge(diagnosing=False).judge(question, parameters)


def test_the_overflow_is_where_the_golden_passes_the_largest_number() -> None:
    case, parameters = setting("huge-activations")
    assert overflow(case, parameters, policy("float16")) == FIRST
    assert overflow(case, parameters, policy("bfloat16")) is None
    assert overflow(*setting("near-tie"), policy("float16")) is None


def test_a_healthy_engine_is_not_judged_there() -> None:
    outcome = judged("huge-activations", "float16", traced("huge-activations", "float16"))
    assert (outcome.verdict, outcome.failed) == (NOT_JUDGED, False)
    assert str(FIRST) in outcome.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tap", ["embedding", "layers.0.attention.probs", "layers.0.expert.gate"])
def test_an_engines_own_nan_before_the_overflow_is_its_fault(tap: str, value: float) -> None:
    trace = traced("huge-activations", "float16", **{f"prefill/{tap}": value})
    outcome = judged("huge-activations", "float16", trace)
    assert (outcome.verdict, outcome.first_wrong) == (NOT_CONFORMANT, ("prefill", tap))


def test_a_nan_where_nothing_overflows_is_its_fault() -> None:
    for name, dtype in (("huge-activations", "bfloat16"), ("near-tie", "float16")):
        trace = traced(name, dtype, **{"prefill/layers.0.expert.hidden": np.nan})
        assert judged(name, dtype, trace).verdict == NOT_CONFORMANT


def test_what_is_open_before_the_overflow_has_another_reason() -> None:
    case, parameters = setting("huge-activations")
    trace = traced("huge-activations", "float16")
    report = verify(trace, "a case", case.config, parameters, case.runs(), policy("float16"))
    assert report.verdict == CANNOT_JUDGE
    assert explains_open(report, case, FIRST)
    opened = tuple(
        replace(check, verdict=UNDECIDABLE) if check.tap == "layers.0.attention.q" else check for check in report.checks
    )
    assert not explains_open(replace(report, checks=opened), case, FIRST)


def results_of(*verdicts: str) -> Results:
    outcomes = tuple(
        Outcome(case=f"case{i}", dtype="float16", policy="float16", verdict=verdict, reason="why")
        for i, verdict in enumerate(verdicts)
    )
    return Results(
        engine=Engine("an engine", "1", {}),
        platform={},
        refmoe="0",
        significance=1e-6,
        cases={},
        smoke="none",
        outcomes=outcomes,
    )


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ((CONFORMANT, NOT_JUDGED), WELL),
        ((CONFORMANT, CANNOT_JUDGE), CANNOT),
        ((NOT_CONFORMANT, NOT_JUDGED), FAILED),
        ((NOT_JUDGED, SKIPPED), CANNOT),
    ],
)
def test_the_exit_status_of_a_run(verdicts: tuple[str, ...], whole: str) -> None:
    results = results_of(*verdicts)
    assert whole_verdict(results, sort_failures(results, [])) == whole


def test_the_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", results_of(NOT_JUDGED))
    assert read_results(tmp_path / "results.json") == results_of(NOT_JUDGED)
