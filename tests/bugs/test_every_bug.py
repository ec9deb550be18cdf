# SPDX-License-Identifier: Apache-2.0
"""Every bug of a forward pass is seen, fails first at its own step, is inert without what it needs, and is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.bugs.mutant import prose_of
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.run_engine import run, same
from refmoe.profiles.load import policy
from refmoe.spec.model import Layer, Parameters
from refmoe.suite.conditions import CONDITIONS, NOT_OF_A_CASE
from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.findings import CONFORMANT, FAIL, NOT_CONFORMANT
from tests.bugs.judging import (
    DTYPES,
    assert_named,
    case_named,
    cases_aimed_at,
    explained,
    first_wrong_step,
    judge,
    judged,
    parameters_of,
    policy_for,
    reference,
    traced,
)
from tests.bugs.shown_by import HIDDEN, INERT, NAMED_FAST, NOT_LISTED, SHOWN_BY, UNSEEN, bugs, rivals

BY_DTYPE = [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype == "float16")) for dtype in DTYPES]

ALWAYS = ("T>1", "LOAD")
"""The conditions that hold in every golden case."""


def test_every_bug_has_a_case() -> None:
    assert {each.id for each in bugs()} == set(SHOWN_BY)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_bug_is_seen_and_its_own_step_fails_first(bug: str, dtype: str) -> None:
    _, report = judge(bug, SHOWN_BY[bug], dtype)
    if (bug, dtype) in UNSEEN:
        assert report.verdict != NOT_CONFORMANT, explained(report)
        return
    assert report.verdict == NOT_CONFORMANT, explained(report)
    failed = {check.step for check in report.checks if check.verdict == FAIL}
    assert first_wrong_step(report) in MUTANTS[bug].touches, explained(report)
    assert failed <= set(MUTANTS[bug].touches), explained(report)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_the_specification_itself_passes_there(name: str, dtype: str) -> None:
    report = judged(traced(None, name, dtype), name, dtype)
    # in float16 the case of overflow cannot be judged, for bug and specification alike
    assert report.verdict == CONFORMANT or (name, dtype) == ("huge-activations", "float16"), explained(report)
    assert report.verdict != NOT_CONFORMANT


@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_the_case_lists_the_bug_or_has_what_it_needs(bug: str) -> None:
    needs = {name for name in MUTANTS[bug].needs if name in CONDITIONS}
    assert (SHOWN_BY[bug] in cases_aimed_at(bug)) == (bug not in NOT_LISTED)
    assert bug not in NOT_LISTED or needs <= set(case_named(SHOWN_BY[bug]).conditions)


# ---- inert without what it needs


def constant(weight: Any) -> Any:
    """The weight with equal elements, which no permutation, transposition or exchange changes."""
    return mapped(weight, lambda values: np.full_like(values, 0.0625))


def symmetric(parameters: Parameters) -> Parameters:
    """The opposite of LOAD: every matrix constant, so that layers and experts are alike."""

    def alike(layer: Layer) -> Layer:
        names = ("attention_norm", "wq", "wk", "wv", "wo", "moe_norm", "router")
        return replace(layer, **{name: constant(getattr(layer, name)) for name in names})

    changed = with_experts(
        with_layers(parameters, alike),
        lambda expert: replace(expert, w1=constant(expert.w1), w2=constant(expert.w2), w3=constant(expert.w3)),
    )
    return replace(changed, embedding=constant(parameters.embedding), output=constant(parameters.output))


@pytest.mark.parametrize(("bug", "need", "name"), INERT)
def test_bug_changes_nothing_without_what_it_needs(bug: str, need: str, name: str) -> None:
    case = case_named(name)
    assert need not in case.conditions or need in ALWAYS
    parameters, runs, used = parameters_of(name), case.runs(), policy("float32")
    if need == "LOAD":
        parameters = symmetric(parameters)
        parameters = quantised(parameters, INT8) if "QUANT" in MUTANTS[bug].needs else parameters
    elif need == "T>1":
        runs = (Run("prefill", op="prefill", sequence=0, tokens=runs[0].tokens[:1], positions=(0,), past=0),)
    right = run(None, case.config, parameters, runs, used)
    assert same(run(MUTANTS[bug], case.config, parameters, runs, used), right)


@pytest.mark.parametrize(("bug", "need", "name"), HIDDEN)
def test_bug_is_not_seen_without_what_it_needs(bug: str, need: str, name: str) -> None:
    assert need not in case_named(name).conditions
    assert judged(traced(bug, name, "bfloat16"), name, "bfloat16").verdict == CONFORMANT


def test_every_need_is_known_and_proven() -> None:
    needs = {(each.id, need) for each in bugs() for need in each.needs}
    assert {need for _, need in needs} <= {*CONDITIONS, *NOT_OF_A_CASE}
    assert needs <= {(bug, need) for bug, need, _ in (*INERT, *HIDDEN)}


# ---- named


def name_it(bug: str, dtype: str) -> None:
    """Assert that the bug comes first among its rivals, and explains the trace."""
    trace, report = judge(bug, SHOWN_BY[bug], dtype)
    if (bug, dtype) in UNSEEN:
        pytest.skip(UNSEEN[bug, dtype])
    case, used = case_named(SHOWN_BY[bug]), policy_for(bug, dtype)
    assert_named(bug, diagnose(trace, case.config, reference(bug, case.name), case.runs(), used, report, rivals(bug)))


@pytest.mark.parametrize("bug", NAMED_FAST)
def test_bug_is_named(bug: str) -> None:
    name_it(bug, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_every_bug_is_named_first(bug: str, dtype: str) -> None:
    name_it(bug, dtype)


# ---- described


@pytest.mark.parametrize("bug", [*MUTANTS])
def test_a_description_is_prose_without_shapes(bug: str) -> None:
    assert MUTANTS[bug].about
    assert not any(mark in MUTANTS[bug].about for mark in ("[", "]", "returns:", "->"))


@pytest.mark.parametrize(
    "shapes",
    ["", "x: [T, D]", "x: [T, D]   returns: [T, S]", "returns: booleans [T, S]", "-> [T, S]",
     "q, k: integers [T]   table: two of\n    [T, d/2]   returns: the same shape"],
)  # fmt: skip
def test_shapes_are_cut_off_wherever_they_stand(shapes: str) -> None:
    for between in (" ", "\n    ", "\n\n    "):
        assert (
            prose_of(f"A query sees\n    `<` keys: all of them.{between}{shapes}")
            == "A query sees `<` keys: all of them."
        )
