# SPDX-License-Identifier: Apache-2.0
"""What is computed only where it is needed: the whole spread of products, and the head."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import ref

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import Format, representable
from refmoe.bugs.run_engine import run
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.load import policy
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier import tally
from refmoe.verifier.findings import CONFORMANT, Report
from refmoe.verifier.passes import Pass
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits
from refmoe.verifier.verify import verify
from tests.bugs.judging import case_named, parameters_of, traced

OWN_LIMIT = 8.0
"""Below the least limit of the excess, for one value at the default significance."""
JUDGED = [
    (None, "walking-skeleton", "float32", "float32"),
    (None, "dims-distinct", "bfloat16", "bfloat16"),
    (None, "window-chunks", "float16", "float16"),
    (None, "dims-distinct", "float32+cache=float16", "float32"),
    (None, "dims-distinct", "bfloat16", "float32"),
    ("expert-gelu", "dims-distinct", "float32", "float32"),
    ("norm-eps-outside-sqrt", "walking-skeleton", "float32", "float32"),
    ("expert-w1-w3-swapped", "dims-distinct", "bfloat16", "bfloat16"),
]
"""A bug, a case, the policy of the engine, and the one that it is judged by."""


def judged(trace: Trace, name: str, rules: str) -> Report:
    case = case_named(name)
    return verify(trace, name, case.config, parameters_of(name), case.runs(), policy(rules))


@pytest.mark.parametrize(("bug", "name", "made", "rules"), JUDGED)
def test_the_verdict_is_that_of_the_whole_spread(
    bug: str | None, name: str, made: str, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_named(name)
    trace = traced(bug, name, made) if bug else run(None, case.config, parameters_of(name), case.runs(), policy(made))
    usual = judged(trace, name, rules)
    assert (usual.verdict == CONFORMANT) == (bug is None and made == rules)
    for room, constant, number in ((tally, "FEW", 1 << 62), (tally, "CALM", -np.inf)):
        monkeypatch.setattr(room, constant, number)
    whole = judged(trace, name, rules)
    assert (usual.verdict, usual.first_wrong) == (whole.verdict, whole.first_wrong)
    for one, other in zip(usual.checks, whole.checks, strict=True):
        for field in ("tap", "verdict", "values", "undecided", "outside", "worst_error", "excess_limit"):
            assert repr(getattr(one, field)) == repr(getattr(other, field)), (one.tap, field)
        # figures are upper bounds where they are small, and the same where they are not
        assert one.excess >= other.excess
        assert one.rms >= other.rms * (1 - 1e-12)
        if one.excess > OWN_LIMIT:
            assert one.excess == pytest.approx(other.excess, rel=1e-9), one.tap


@pytest.mark.parametrize("rules", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_said_to_have_all_midpoints_has_them(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each result of a step and of each value of a trace, also after it was moved."""
    name, said = "dims-distinct", 0
    make = Enclosure.fits

    def fits(self: Enclosure, format: Format) -> bool:
        nonlocal said
        said += self.held is not None
        assert self.held is None or representable(self.mid, self.held).all()
        return make(self, format)

    monkeypatch.setattr(Enclosure, "fits", fits)
    case = case_named(name)
    trace = run(None, case.config, parameters_of(name), case.runs(), policy(rules))
    assert judged(trace, name, rules).verdict == CONFORMANT
    assert said


def test_a_pass_is_freed_as_soon_as_nobody_holds_it() -> None:
    """It holds all prepared weights. In a cycle they would stay until Python looks for cycles."""
    case, used = case_named("walking-skeleton"), policy("float32")
    trace = run(None, case.config, parameters_of(case.name), case.runs(), used)
    subject = Subject(case.config, parameters_of(case.name), case.runs())
    judging = Pass(trace, subject, used, Limits(1e-6, 1000, 10))
    judging.go()
    held = ref(judging.ops), ref(judging)
    gc.disable()
    try:
        del judging
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


def test_the_head_is_not_read_for_a_trace_without_its_taps() -> None:
    name = "dims-distinct"
    case, used = case_named(name), policy("float32")
    trace = run(None, case.config, parameters_of(name), case.runs(), used)
    last = f"layers.{case.config.layers - 1}.residual"
    kept = {key: np.array(tensor.get()) for key, tensor in trace.tensors.items() if key.endswith((last, "embedding"))}

    def unread() -> Any:
        raise AssertionError("the head is read")

    matrix = parameters_of(name).output
    head = Weight(matrix.name, matrix.shape, matrix.dtype, source=unread, origin="head")
    parameters = replace(parameters_of(name), output=head)
    for arrays, asked in ((kept, False), ({key: np.array(t.get()) for key, t in trace.tensors.items()}, True)):
        again = held_trace(trace.header, arrays)
        with pytest.raises(AssertionError, match="head") if asked else nullcontext():
            report = verify(again, name, case.config, parameters, case.runs(), used)
            assert report.verdict == CONFORMANT
