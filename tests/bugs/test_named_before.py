# SPDX-License-Identifier: Apache-2.0
"""What an engine was said to have in one trace is tried first in the next. It changes the work, and never the name."""

from __future__ import annotations

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import gather, search
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.findings import NOT_CONFORMANT
from tests.bugs.judging import case_named, judged, parameters_of, traced


def evidence_of(trace: Trace, case: str, dtype: str) -> Evidence:
    report = judged(trace, case, dtype)
    assert report.verdict == NOT_CONFORMANT
    found = case_named(case)
    return gather(trace, found.config, parameters_of(case), found.runs(), policy(dtype), report)


def named(evidence: Evidence, before: set[str]) -> tuple[list[str], int]:
    """The names of what explains the trace, best first, and the number of causes that were tried in a full search."""
    tried: list[None] = []
    found = search(evidence, MUTANTS.values(), lambda: tried.append(None), before)
    return [each.name for each in found if each.explains], len(tried)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", ["attn-gqa-tile", "attn-wo-head-order"])
def test_the_same_bug_again_needs_no_search(bug: str, dtype: str) -> None:
    evidence = evidence_of(traced(bug, "dims-distinct", dtype), "dims-distinct", dtype)
    first, tried = named(evidence, set())
    assert first == [bug]
    assert tried
    assert named(evidence, {bug, "expert-gelu"}) == ([bug], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_bug_is_named_whatever_was_named_before(dtype: str) -> None:
    evidence = evidence_of(traced("expert-gelu", "dims-distinct", dtype), "dims-distinct", dtype)
    names, _ = named(evidence, set())
    assert names[0] == "expert-gelu"
    for before in ("attn-gqa-tile", "expert-w1-w3-swapped", f"{dtype}+accumulation=float16", "attention.q: times 2"):
        assert named(evidence, {before})[0] == names, before


def test_a_worse_cause_named_before_takes_no_trace_from_a_better_one() -> None:
    """A cache in bfloat16 also allows the errors of one in float16. Only the narrower one predicts them."""
    case = case_named("walking-skeleton")
    made = policy("float32+cache=float16")
    trace = run(None, case.config, parameters_of(case.name), case.runs(), made)
    evidence = evidence_of(trace, case.name, "float32")
    names, _ = named(evidence, set())
    for before in ("float32+cache=bfloat16", "float32+statistics=float16", "float32+storage=float16"):
        assert named(evidence, {before})[0] == names, before
