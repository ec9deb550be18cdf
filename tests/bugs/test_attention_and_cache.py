"""The bugs of attention and of its cache: each is seen, blamed and named."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
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

BY_DTYPE = [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype == "float16")) for dtype in DTYPES]

SHOWN_BY = {
    "attn-scale-missing": "walking-skeleton",
    "attn-causal-strict": "walking-skeleton",
    "attn-causal-top-left": "window-chunks",
    "attn-swa-wrongly-on": "walking-skeleton",  # window-lengths, which lists it, has a window of its own
    "attn-swa-off-by-one": "window-decode",
    "attn-swa-dropped-in-one-backend": "window-chunks",
    "attn-window-none-as-zero": "walking-skeleton",  # the windowed cases, which list it, have a window
    "attn-mask-polarity-inverted": "batch-ragged",
    "attn-gqa-tile": "dims-distinct",
    "attn-gqa-index-by-nkv": "dims-distinct",
    "attn-wo-head-order": "dims-distinct",
    "attn-softmax-lowprec": "mini-8x7b",  # attention-underflow, which lists it, does not show it in bfloat16
    "attn-softmax-wrong-axis": "walking-skeleton",
    "attn-fully-masked-row-nan": "batch-ragged",
    "cache-write-hole": "shared-prefix",
    "cache-length-rounded-up": "one-shot-chunked-stepwise",
    "cache-window-update-at-boundary": "window-decode",
    "cache-chunk-larger-than-window": "window-chunks",
    "cache-prefill-skips-tokens": "one-shot-chunked-stepwise",
    "cache-stale-tail-after-trim": "shared-prefix",
}
"""A small golden case for each bug."""

INERT = [
    # the condition that does not hold, and a case where it does not
    ("attn-causal-strict", "T>1", "walking-skeleton"),
    ("attn-swa-wrongly-on", "T>1", "walking-skeleton"),
    ("attn-swa-off-by-one", "SWA", "walking-skeleton"),
    ("attn-swa-dropped-in-one-backend", "SWA", "walking-skeleton"),
    ("attn-window-none-as-zero", "T>1", "walking-skeleton"),
    ("attn-mask-polarity-inverted", "T>1", "walking-skeleton"),
    ("attn-softmax-lowprec", "LOWPREC", "dyadic"),
    ("attn-softmax-wrong-axis", "T>1", "walking-skeleton"),
    ("attn-fully-masked-row-nan", "RAGGED", "walking-skeleton"),
    ("cache-write-hole", "DECODE", "packed"),
    ("cache-length-rounded-up", "DECODE", "packed"),
    ("cache-window-update-at-boundary", "DECODE-ACROSS-W", "window-chunks"),
    ("cache-chunk-larger-than-window", "SWA", "one-shot-chunked-stepwise"),
    ("cache-stale-tail-after-trim", "SEQMIX", "walking-skeleton"),
    # no condition has a name for these: as many query heads as key/value heads, or one of these; no piece behind
    # another (CHUNK leaves out those longer than what is cached) or none longer than the window; a window of its own
    ("attn-gqa-tile", "", "square"),
    ("attn-gqa-tile", "", "head-dim-64"),
    ("attn-gqa-index-by-nkv", "", "head-dim-64"),
    ("attn-wo-head-order", "", "square"),
    ("attn-wo-head-order", "", "head-dim-64"),
    ("attn-causal-top-left", "", "mini-8x7b"),
    ("cache-prefill-skips-tokens", "", "mini-8x7b"),
    ("cache-chunk-larger-than-window", "", "window-lengths"),
    ("attn-swa-wrongly-on", "", "window-decode"),
    ("attn-window-none-as-zero", "", "window-decode"),
]
"""Bug, the condition that it needs, and a case without it (of T>1: its first token alone)."""

NAMED_FAST = (
    "attn-scale-missing", "attn-causal-top-left", "attn-window-none-as-zero", "attn-gqa-tile", "attn-wo-head-order",
    "cache-window-update-at-boundary", "cache-chunk-larger-than-window",
)  # fmt: skip
"""One of each kind, for the default run."""


def mine() -> list[Mutant]:
    """The bugs of these files."""
    return [each for each in MUTANTS.values() if each.kind in ("attention", "kv_cache") and each.in_one_pass]


@cache
def judge(bug: str, dtype: str) -> tuple[Trace, Report]:
    """The engine with a bug on the case that shows it, and the verdict."""
    trace = traced(bug, SHOWN_BY[bug], dtype)
    return trace, judged(trace, SHOWN_BY[bug], dtype)


def test_every_bug_has_a_case() -> None:
    assert {each.id for each in mine()} == set(SHOWN_BY)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_bug_is_seen_and_its_own_step_is_blamed(bug: str, dtype: str) -> None:
    _, report = judge(bug, dtype)
    assert report.verdict == NOT_CONFORMANT, explained(report)
    failed = {check.step for check in report.checks if check.verdict == FAIL}
    assert first_wrong_step(report) in MUTANTS[bug].touches, explained(report)
    assert failed <= set(MUTANTS[bug].touches), explained(report)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_the_specification_itself_passes_there(name: str, dtype: str) -> None:
    report = judged(traced(None, name, dtype), name, dtype)
    assert report.verdict == CONFORMANT, explained(report)


@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_the_case_lists_the_bug_or_has_what_it_needs(bug: str) -> None:
    assert SHOWN_BY[bug] in cases_aimed_at(bug) or set(MUTANTS[bug].needs) <= set(case_named(SHOWN_BY[bug]).conditions)


@pytest.mark.parametrize(("bug", "need", "name"), INERT)
def test_bug_changes_nothing_without_what_it_needs(bug: str, need: str, name: str) -> None:
    case = case_named(name)
    assert not need or need not in case.conditions or need == "T>1"  # which holds in every golden case
    runs = (
        (Run(run="prefill", op="prefill", sequence=0, tokens=case.runs()[0].tokens[:1], positions=(0,), past=0),)
        if need == "T>1"
        else case.runs()
    )
    used, parameters = policy("float32"), parameters_of(name)
    right = run(None, case.config, parameters, runs, used)
    assert same(run(MUTANTS[bug], case.config, parameters, runs, used), right)


def test_every_need_is_known_and_proven() -> None:
    needs = {(each.id, need) for each in mine() for need in each.needs}
    assert {need for _, need in needs} <= set(CONDITIONS)
    assert needs <= {(bug, need) for bug, need, _ in INERT}


def name_it(bug: str, dtype: str) -> None:
    """The bug comes first among all of these files, and explains the trace."""
    trace, report = judge(bug, dtype)
    found = diagnosed(trace, SHOWN_BY[bug], dtype, report, mine())
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


def test_padding_poisons_the_shorter_rows_from_the_second_layer_on() -> None:
    trace, _ = judge("attn-fully-masked-row-nan", "float32")
    lost = {key for key in trace.tensors if np.isnan(np.asarray(trace.get(*key.split("/")), np.float64)).any()}
    assert {key.split("/")[0] for key in lost} == {
        each.run for each in case_named("batch-ragged").runs() if each.sequence < 2
    }
    assert not any("/layers.0." in key for key in lost)


def test_the_cache_rolls_too_early_in_one_step_only() -> None:
    _, report = judge("cache-window-update-at-boundary", "float32")
    assert {check.run for check in report.checks if check.verdict == FAIL} == {"decode1"}
