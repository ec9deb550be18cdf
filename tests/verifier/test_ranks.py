# SPDX-License-Identifier: Apache-2.0
"""Policies of engines on several ranks: honest engines conform at every degree, a lost or doubled rank never does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.profiles.load import policy
from refmoe.spec.taps import LAYER_TAPS
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CONFORMANT, FAIL, NOT_CONFORMANT, Report
from tests.verifier.ranked_engines import FORMS, Fault, Ranks, doubled, dropped, healthy, judged, ranked_trace

DEGREES = (1, 2, 3, 4, 8)
STATES = tuple(tap for tap in LAYER_TAPS if tap not in ("residual", "router.experts"))
"""The taps that a trace of hidden states lacks."""
LOCAL = ("bfloat16", "float16", "hf-bfloat16", "float32+rank.partial=bfloat16")


def failures(report: Report) -> str:
    return "; ".join(f"{c.run}/{c.tap}: {c.reason}" for c in report.checks if c.verdict == FAIL)


def trace_of(
    form: str, local: str, count: int, seed: int, fault: Fault = healthy, leave_out: tuple[str, ...] = ()
) -> Trace:
    used = policy(local)
    return ranked_trace(form, used, Ranks(count, used, np.random.default_rng(seed), fault), leave_out)


def honest() -> list[Any]:
    """Form, degree, taps left out, local policy. A few in the default run; the others are slow."""
    taps = {"all": (), "no-outputs": ("expert.output",), "states": STATES}
    return [
        pytest.param(
            form, count, taps[name], local, id=f"{form}-{count}-{name}-{local}",
            marks=() if count == 8 and i == j and local == LOCAL[i] else pytest.mark.slow,
        )
        for i, form in enumerate(FORMS) for j, name in enumerate(taps) for count in DEGREES for local in LOCAL
    ]  # fmt: skip


@pytest.mark.parametrize(("form", "count", "leave_out", "local"), honest())
def test_an_honest_engine_on_ranks_is_never_flagged(
    form: str, count: int, leave_out: tuple[str, ...], local: str
) -> None:
    """Under its own policy, and under one with more ranks."""
    trace = trace_of(form, local, count, seed=100 * count + LOCAL.index(local), leave_out=leave_out)
    for ranks in {count, 8}:
        report = judged(trace, f"{local}+ranks={ranks}")
        assert report.verdict == CONFORMANT, (ranks, failures(report))


@pytest.mark.parametrize("fault", [dropped, doubled])
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("form", FORMS)
def test_a_lost_or_doubled_rank_fails(form: str, count: int, fault: Fault) -> None:
    trace = trace_of(form, "bfloat16", count, seed=count, fault=fault)
    report = judged(trace, f"bfloat16+ranks={count}")
    assert report.verdict == NOT_CONFORMANT
    assert report.first_wrong is not None
    assert report.first_wrong[1] == "layers.0.attention.output"


@pytest.mark.parametrize("form", FORMS)
def test_eight_ranks_are_no_single_device(form: str) -> None:
    """The partial sums of eight ranks in bfloat16 are not those that the generic policy allows."""
    report = judged(trace_of(form, "bfloat16", 8, seed=1), "bfloat16")
    wrong = {check.step for check in report.checks if check.verdict == FAIL}
    assert "attention.output" in wrong
    assert wrong <= {"attention.output", "expert.output", "moe.output"}
