# SPDX-License-Identifier: Apache-2.0
"""Traces of engines met in the field: the right cause is named, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import gather, search
from refmoe.verifier.findings import ARITHMETIC, BUG_AND_ARITHMETIC, KNOWN_BUG, STRUCTURE
from tests.bugs.judging import case_named, judged, parameters_of, traced
from tests.bugs.left_out import keeping
from tests.bugs.test_diagnosis import found_in, held


def engine(name: str, arithmetic: str, bug: Mutant | None = None, declared: str = "float32") -> Trace:
    """The trace of an engine with this arithmetic, which declares another one."""
    case = case_named(name)
    made = run(bug, case.config, parameters_of(name), case.runs(), policy(arithmetic))
    return held_trace(replace(made.header, policy=declared), held(made))


@pytest.mark.parametrize("taps", ["hidden states", "logits"])
@pytest.mark.parametrize("name", ["one-pair", "top-3", "walking-skeleton"])
def test_a_float16_cache_is_named_from_few_taps(name: str, taps: str) -> None:
    found = found_in(keeping(engine(name, "float32+cache=float16"), taps), name, "float32")
    assert [(each.kind, each.name) for each in found] == [(ARITHMETIC, "float32+cache=float16")]
    assert found[0].coefficient == pytest.approx(1, abs=0.01)
    assert found[0].residual < 0.01


@pytest.mark.parametrize("taps", ["all", "hidden states", "logits"])
def test_an_engine_that_is_bfloat16_throughout_is_named(taps: str) -> None:
    found = found_in(keeping(engine("one-pair", "bfloat16"), taps), "one-pair", "float32")
    assert [each.name for each in found] == ["float32+storage=bfloat16"]


def test_a_router_that_takes_the_softmax_first_is_named() -> None:
    name = "router-underflow"
    found = found_in(engine(name, "float32+router_order=softmax-then-top-k"), name, "float32")
    assert [each.name for each in found] == ["float32+router_order=softmax-then-top-k"]


@pytest.mark.parametrize("taps", ["all", "logits"])
def test_a_bug_and_an_undeclared_arithmetic_are_named_together(taps: str) -> None:
    trace = keeping(engine("walking-skeleton", "float32+cache=float16", MUTANTS["router-no-renorm"]), taps)
    found = found_in(trace, "walking-skeleton", "float32")
    assert [each.kind for each in found] == [BUG_AND_ARITHMETIC]
    assert found[0].name == "float32+cache=float16 + router-no-renorm"


def test_one_negated_value_is_no_coarse_softmax() -> None:
    """The bug of a coarse softmax allows the value, and does not predict it."""
    honest = traced(None, "dyadic-top-4", "float32")
    arrays = {key: array for key, array in held(honest).items() if not key.endswith(("scores", "probs"))}
    arrays["chunk1/layers.0.attention.context"][0, 0, 0] *= -1
    found = found_in(held_trace(honest.header, arrays), "dyadic-top-4", "float32")
    assert {each.kind for each in found} <= {STRUCTURE}


def frozen(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """Experts that read zeros in calls of one token."""
    return CUT_STEPS.run_experts(ops, experts, x * 0.0 if len(x) == 1 else x, chosen)


FROZEN = Mutant(
    id="frozen", about="", kind="", function=frozen, steps={"run_experts": frozen}, touches=("expert.gate",)
)


@pytest.mark.parametrize("taps", ["all", "no expert internals", "hidden states"])
def test_a_fault_of_some_calls_is_no_bug_of_the_weights(taps: str) -> None:
    """Experts that were never loaded would be zero in all calls."""
    name = "one-shot-chunked-stepwise"
    trace = keeping(engine(name, "float32", FROZEN), taps)
    rest = [each for each in found_in(trace, name, "float32") if each.kind != STRUCTURE]
    assert [each.name for each in rest] == ["expert-graph-reads-frozen-buffer"]


def test_two_bugs_that_are_one_function_here_are_rivals() -> None:
    """With head_dim 4, interleaving and its inverse are the same permutation."""
    name = "mini-8x7b"
    assert case_named(name).config.head_dim == 4
    found = found_in(traced("load-sanitise-twice", name, "float32"), name, "float32")
    names = {each.name for each in found if each.kind == KNOWN_BUG}
    assert {"load-sanitise-twice", "load-qk-permute-missing"} <= names
    for each in found:
        assert set(each.rivals) == {other.name for other in found} - {each.name}


def test_a_cause_named_before_is_tried_first_and_alone() -> None:
    """A suite of failures with one cause is searched once."""
    name, named = "walking-skeleton", "attn-scale-missing"
    trace, case = traced(named, name, "float32"), case_named(name)
    report = judged(trace, name, "float32")
    evidence = gather(trace, case.config, parameters_of(name), case.runs(), policy("float32"), report)
    steps: list[None] = []
    found = search(evidence, MUTANTS.values(), lambda: steps.append(None), {named: 1e-3, "rope-sign-flipped": 1e-3})
    assert [each.name for each in found if each.explains] == [named]
    assert not steps
    others = search(evidence, MUTANTS.values(), lambda: steps.append(None), {"rope-sign-flipped": 1e-3})
    assert [each.name for each in others if each.explains] == [named]
    assert steps
