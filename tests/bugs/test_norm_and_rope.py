"""The bugs of norm, embedding and rotary positions: each is seen, blamed and named."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.changed_weights import with_layers
from refmoe.bugs.run_engine import run, same
from refmoe.policy.load import policy
from refmoe.suite.conditions import CONDITIONS
from refmoe.traces.trace import Run, Trace
from refmoe.verify.findings import CONFORMANT, FAIL, NOT_CONFORMANT, Report
from tests.bugs.judging import (
    DTYPES,
    assert_named,
    case_named,
    cases_aimed_at,
    diagnosed,
    explained,
    first_wrong_step,
    judged,
    parameters_of,
    traced,
)

KINDS = ("rmsnorm", "embedding", "rope")
MINE = [each for each in MUTANTS.values() if each.kind in KINDS and each.in_one_pass]
BY_DTYPE = [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype == "float16")) for dtype in DTYPES]

SHOWN_BY = {
    "norm-eps-1e-6": "tiny-embedding",
    "norm-eps-outside-sqrt": "tiny-embedding",
    "norm-lowprec-variance": "huge-embedding",
    "norm-applied-twice": "mean-not-zero",
    "norm-layernorm-mean": "mean-not-zero",
    "norm-pair-swapped": "four-layers",
    "emb-scale-sqrt-d": "edge-tokens",
    "emb-pad-row-zeroed": "edge-tokens",
    "rope-theta-default": "head-dim-64",
    "rope-tables-lowprec": "positions-256",
    "rope-table-too-short": "positions-4096",
    "rope-unwanted-scaling": "head-dim-64",
    "rope-interleaved-vs-half": "head-dim-64",
    "rope-sign-flipped": "walking-skeleton",
    "rope-decode-position-zero": "one-shot-chunked-stepwise",
    "rope-decode-position-plus-one": "window-decode",
    "rope-offset-from-kept-rows": "window-decode",
    "rope-reapplied-to-cache": "one-shot-chunked-stepwise",
    "rope-batch-row0-only": "batch-ragged",
}
"""A small golden case for each bug that is a variation of a forward pass."""

INERT = [
    ("norm-lowprec-variance", "LOWPREC", "dyadic"),
    ("emb-pad-row-zeroed", "EDGE-IDS", "mini-8x7b"),
    ("rope-theta-default", "T>1", "mini-8x7b"),
    ("rope-tables-lowprec", "T>1", "mini-8x7b"),
    ("rope-tables-lowprec", "LOWPREC", "dyadic"),
    ("rope-table-too-short", "P>4096", "positions-2048"),
    ("rope-unwanted-scaling", "T>1", "mini-8x7b"),
    ("rope-interleaved-vs-half", "T>1", "mini-8x7b"),
    ("rope-sign-flipped", "T>1", "mini-8x7b"),
    ("rope-decode-position-zero", "DECODE", "one-pair"),
    ("rope-decode-position-plus-one", "DECODE", "one-pair"),
    ("rope-offset-from-kept-rows", "DECODE", "one-pair"),
    ("rope-offset-from-kept-rows", "SWA", "mini-8x7b"),
    ("rope-reapplied-to-cache", "DECODE", "one-pair"),
    ("rope-batch-row0-only", "BATCH", "window-lengths"),
]
"""Bug, the condition that it needs, and a case without it (of T>1, which all have: its first token alone)."""

HIDDEN = [
    ("norm-eps-1e-6", "TINYMAG", "mini-8x7b"),
    ("norm-eps-outside-sqrt", "TINYMAG", "mini-8x7b"),
]
"""The same where the bug changes less than bfloat16 can tell: a part in 10^5 of rows of ordinary size."""

NAMED_FAST = ("norm-lowprec-variance", "emb-pad-row-zeroed", "rope-unwanted-scaling", "rope-batch-row0-only")
"""Some of each class, for the default run."""


def shown_by(bug: str, dtype: str) -> str:
    return SHOWN_BY[bug]


@cache
def judge(bug: str, dtype: str) -> tuple[Trace, Report]:
    """The engine with a bug on the case that shows it."""
    name = shown_by(bug, dtype)
    trace = traced(bug, name, dtype)
    return trace, judged(trace, name, dtype)


# ---- every bug is seen


def test_every_bug_has_a_case() -> None:
    assert {each.id for each in MINE} == set(SHOWN_BY)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_bug_is_seen_and_its_own_step_is_blamed(bug: str, dtype: str) -> None:
    _, report = judge(bug, dtype)
    assert report.verdict == NOT_CONFORMANT, explained(report)
    failed = {check.step for check in report.checks if check.verdict == FAIL}
    assert first_wrong_step(report) in MUTANTS[bug].touches
    assert failed <= set(MUTANTS[bug].touches), explained(report)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("name", sorted({*SHOWN_BY.values()}))
def test_the_specification_itself_passes_there(name: str, dtype: str) -> None:
    report = judged(traced(None, name, dtype), name, dtype)
    assert report.verdict == CONFORMANT, explained(report)


@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_the_case_lists_the_bug(bug: str) -> None:
    assert SHOWN_BY[bug] in cases_aimed_at(bug)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_before_the_rounding_is_legal(dtype: str) -> None:
    name = "huge-embedding"
    trace = traced("norm-gain-before-downcast", name, dtype)
    assert not same(trace, traced(None, name, dtype))
    assert judged(trace, name, dtype).verdict == CONFORMANT
    assert MUTANTS["norm-gain-before-downcast"].equivalent


# ---- and changes nothing where it needs something that is not there


@pytest.mark.parametrize(("bug", "need", "name"), INERT)
def test_bug_changes_nothing_without_what_it_needs(bug: str, need: str, name: str) -> None:
    case = case_named(name)
    runs = case.runs()
    if need == "T>1":
        runs = (Run(run="prefill", op="prefill", sequence=0, tokens=runs[0].tokens[:1], positions=(0,), past=0),)
    else:
        assert need not in case.conditions
    used = policy("float32")
    right = run(None, case.config, parameters_of(name), runs, used)
    assert same(run(MUTANTS[bug], case.config, parameters_of(name), runs, used), right)


@pytest.mark.parametrize(("bug", "need", "name"), HIDDEN)
def test_bug_is_not_seen_without_what_it_needs(bug: str, need: str, name: str) -> None:
    assert need not in case_named(name).conditions
    assert judged(traced(bug, name, "bfloat16"), name, "bfloat16").verdict == CONFORMANT


def test_every_need_is_known_and_proven() -> None:
    proven = {(bug, need) for bug, need, _ in (*INERT, *HIDDEN)}
    needs = {(each.id, need) for each in MINE for need in each.needs}
    assert {need for _, need in needs} <= {*CONDITIONS}
    # LOAD holds in every golden case: its proof is below
    assert needs - proven == {("norm-pair-swapped", "LOAD")}


def test_exchanged_gains_show_nothing_where_they_are_equal() -> None:
    name, used = SHOWN_BY["norm-pair-swapped"], policy("float32")
    case = case_named(name)
    equal = with_layers(parameters_of(name), lambda layer: replace(layer, moe_norm=layer.attention_norm))
    right = run(None, case.config, equal, case.runs(), used)
    assert same(run(MUTANTS["norm-pair-swapped"], case.config, equal, case.runs(), used), right)


# ---- and is named


def name_it(bug: str, dtype: str) -> None:
    trace, report = judge(bug, dtype)
    found = diagnosed(trace, shown_by(bug, dtype), dtype, report, MINE)
    assert_named(bug, found)


@pytest.mark.parametrize("bug", NAMED_FAST)
def test_bug_is_named(bug: str) -> None:
    name_it(bug, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_every_bug_is_named_first(bug: str, dtype: str) -> None:
    name_it(bug, dtype)


# ---- what is particular to some of them


def test_single_tokens_of_other_rows_are_not_turned_and_the_first_row_is() -> None:
    _, report = judge("rope-batch-row0-only", "float32")
    runs = case_named("batch-ragged").runs()
    failed = {check.run for check in report.checks if check.verdict == FAIL}
    assert failed == {each.run for each in runs if each.sequence > 0 and len(each.tokens) == 1}
