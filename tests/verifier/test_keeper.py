# SPDX-License-Identifier: Apache-2.0
"""The enclosures that a verification keeps are those that a diagnosis would compute by itself."""

from __future__ import annotations

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.verifier.diagnosis import Keeper, gather, observed, search
from refmoe.verifier.segments import Settings
from refmoe.verifier.verify import verify
from tests.bugs.judging import case_named, policy_for, reference, traced_under

TRIED = [
    ("rope-interleaved-vs-half", "walking-skeleton", "float32"),
    ("router-double-softmax", "flat-router", "bfloat16"),
    ("cache-length-rounded-up", "one-shot-chunked-stepwise", "bfloat16"),
    ("attn-fully-masked-row-nan", "batch-ragged", "float32"),
]


@pytest.mark.parametrize("small", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize(("bug", "name", "dtype"), TRIED, ids=[each[0] for each in TRIED])
def test_report_and_explanations_are_the_same_with_and_without_it(
    bug: str, name: str, dtype: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small model, variances are made when a diagnosis asks for them."""
    if not small:
        monkeypatch.setattr(observed, "MATRIX_BYTES", 1000)
    used, parameters, case = policy_for(bug, dtype), reference(bug, name), case_named(name)
    trace = traced_under(bug, name, parameters, used)
    keeper = Keeper()
    arguments = (case.config, parameters, case.runs(), used)
    report = verify(trace, name, *arguments, Settings(passes=keeper))
    assert repr(report) == repr(verify(trace, name, *arguments))  # figures that do not exist are NaN
    assert keeper.first is not None
    assert keeper.first.late == small
    mutants = [MUTANTS[bug], MUTANTS["rope-theta-default"], MUTANTS["router-no-renorm"]]
    with_it = search(gather(trace, *arguments, report, keeper.first), mutants)
    assert repr(with_it) == repr(search(gather(trace, *arguments, report), mutants))
    assert with_it[0].name == bug


def test_a_large_trace_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bug, name, dtype = TRIED[0]
    used, parameters, case = policy_for(bug, dtype), reference(bug, name), case_named(name)
    trace = traced_under(bug, name, parameters, used)
    monkeypatch.setattr(observed, "MOST_KEPT", 100)
    keeper = Keeper()
    verify(trace, name, case.config, parameters, case.runs(), used, Settings(passes=keeper))
    assert keeper.first is None
