# SPDX-License-Identifier: Apache-2.0
"""Facts about single bugs and about quantised checkpoints, beside those that hold for every bug."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.formats import FLOAT32
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.changed_weights import with_layers
from refmoe.bugs.quantised_checkpoint import FP8, INT8, quantised
from refmoe.bugs.run_engine import run, same
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.traces.held import held_trace
from refmoe.verifier.findings import CONFORMANT, FAIL
from tests.bugs.judging import (
    DTYPES,
    case_named,
    explained,
    first_wrong_step,
    judge,
    judged,
    judged_under,
    parameters_of,
    traced,
    traced_under,
)
from tests.bugs.shown_by import SHOWN_BY, STRICT, bugs

BY_DTYPE = [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype == "float16")) for dtype in DTYPES]


# ---- attention, cache, norms and positions


def test_padding_poisons_the_shorter_rows_from_the_second_layer_on() -> None:
    trace, _ = judge("attn-fully-masked-row-nan", SHOWN_BY["attn-fully-masked-row-nan"], "float32")
    lost = {key for key in trace.tensors if np.isnan(np.asarray(trace.get(*key.split("/")), np.float64)).any()}
    assert {key.split("/")[0] for key in lost} == {
        each.run for each in case_named("batch-ragged").runs() if each.sequence < 2
    }
    assert not any("/layers.0." in key for key in lost)


def test_the_cache_rolls_too_early_in_one_step_only() -> None:
    _, report = judge("cache-window-update-at-boundary", SHOWN_BY["cache-window-update-at-boundary"], "float32")
    assert {check.run for check in report.checks if check.verdict == FAIL} == {"decode1"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_before_the_rounding_is_legal(dtype: str) -> None:
    name = "huge-embedding"
    trace = traced("norm-gain-before-downcast", name, dtype)
    assert not same(trace, traced(None, name, dtype))
    assert judged(trace, name, dtype).verdict == CONFORMANT
    assert MUTANTS["norm-gain-before-downcast"].equivalent


def test_exchanged_gains_show_nothing_where_they_are_equal() -> None:
    name, used = SHOWN_BY["norm-pair-swapped"], policy("float32")
    case = case_named(name)
    equal = with_layers(parameters_of(name), lambda layer: replace(layer, moe_norm=layer.attention_norm))
    right = run(None, case.config, equal, case.runs(), used)
    assert same(run(MUTANTS["norm-pair-swapped"], case.config, equal, case.runs(), used), right)


def test_single_tokens_of_other_rows_are_not_turned_and_the_first_row_is() -> None:
    _, report = judge("rope-batch-row0-only", SHOWN_BY["rope-batch-row0-only"], "float32")
    runs = case_named("batch-ragged").runs()
    failed = {check.run for check in report.checks if check.verdict == FAIL}
    assert failed == {each.run for each in runs if each.sequence > 0 and len(each.tokens) == 1}


# ---- router, experts, residual and precision


def strict(bug: str, dtype: str) -> Policy:
    """The policy that promises float32 where the bug has less, and in which each step reads stored values."""
    return replace(policy(dtype), cuts=dict.fromkeys(STRICT[bug], FLOAT32), consumers="stored")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bug", [*STRICT])
def test_a_policy_that_promises_float32_does_not_allow_less(bug: str, dtype: str) -> None:
    name, used = SHOWN_BY[bug], strict(bug, dtype)
    control = judged_under(traced_under(None, name, parameters_of(name), used), name, parameters_of(name), used)
    assert control.verdict == CONFORMANT, explained(control)
    report = judged_under(traced_under(bug, name, parameters_of(name), used), name, parameters_of(name), used)
    assert first_wrong_step(report) in MUTANTS[bug].touches


@pytest.mark.parametrize("dtype", BY_DTYPE)
def test_either_of_two_equal_experts_is_legal_where_the_policy_does_not_say(dtype: str) -> None:
    bug, used = "router-tie-break-high-index", policy(dtype)
    parameters = parameters_of(SHOWN_BY[bug])
    trace = traced_under(bug, SHOWN_BY[bug], parameters, used)
    assert not same(trace, traced_under(None, SHOWN_BY[bug], parameters, used))
    assert judged_under(trace, SHOWN_BY[bug], parameters, used).verdict == CONFORMANT


def test_a_shifted_tap_fails_alone() -> None:
    """Only the shown hidden states are wrong. The steps that read the real ones pass."""
    _, report = judge("hidden-tap-off-by-one", SHOWN_BY["hidden-tap-off-by-one"], "float32")
    failed = [check.tap for check in report.checks if check.verdict == FAIL and check.run == "prefill"]
    assert failed == [f"layers.{i}.residual" for i in range(4)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_before_the_last_projection_is_legal_where_it_does_not_show(dtype: str) -> None:
    """In exact arithmetic the output is equal: only the taps between differ."""
    bug, used = "expert-weight-before-w2", policy(dtype)
    trace = traced_under(bug, SHOWN_BY[bug], parameters_of(SHOWN_BY[bug]), used)
    shown: Any = {key: trace.get(*key.split("/")) for key in trace.tensors if ".expert." not in key}
    report = judged_under(held_trace(trace.header, shown), SHOWN_BY[bug], parameters_of(SHOWN_BY[bug]), used)
    assert report.verdict == CONFORMANT, explained(report)


def test_drifting_token_indices_are_right_for_whole_tiles_and_single_tokens() -> None:
    bug, used = "expert-token-index-drift", policy("float32")
    trace = traced_under(bug, "token-sweep", parameters_of("token-sweep"), used)
    report = judged_under(trace, "token-sweep", parameters_of("token-sweep"), used)
    failed = {check.run for check in report.checks if check.verdict == FAIL}
    wrong = {len(each.tokens) for each in case_named("token-sweep").runs() if each.run in failed}
    assert wrong == {2, 3, 9, 31, 33, 63, 65}


def test_hidden_values_overflow_where_the_case_says_they_do() -> None:
    trace, _ = judge("prec-fp16-ffn-overflow", SHOWN_BY["prec-fp16-ffn-overflow"], "bfloat16")
    hidden = [trace.get(*key.split("/")) for key in trace.tensors if key.endswith("expert.hidden")]
    assert any(np.isinf(np.asarray(part, np.float64)).any() for part in hidden)


# ---- quantised checkpoints


@pytest.mark.parametrize("to", [INT8, FP8], ids=lambda to: to.name)
def test_quantisation_errs_by_less_than_half_a_step(to: Any) -> None:
    right = parameters_of("walking-skeleton").layers[0].experts[0]
    held: Any = quantised(parameters_of("walking-skeleton"), to).layers[0].experts[0]
    stored = held.w2.stored()
    assert stored.scales.shape == (48, 3)  # 80 inputs: two groups of 32 and one of 16
    spread = np.repeat(stored.scales, 32, axis=1)[:, :80]
    error = np.abs(held.w2.read() - right.w2.read())  # type: ignore[attr-defined]
    codes = np.abs(held.w2.read()) / spread
    # float8_e4m3 has four bits of significand: from 2^e on its steps are 2^(e - 3)
    step = spread * (1 if to is INT8 else 2.0 ** (np.floor(np.log2(np.maximum(codes, 2.0**-6))) - 3))
    assert (error <= step / 2 * (1 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("to", [INT8, FP8], ids=lambda to: to.name)
def test_the_right_quantised_engine_passes_against_dequantised_weights(to: Any, dtype: str) -> None:
    held, used = quantised(parameters_of("mini-8x7b"), to), policy(dtype)
    report = judged_under(traced_under(None, "mini-8x7b", held, used), "mini-8x7b", held, used)
    assert report.verdict == CONFORMANT, explained(report)


@pytest.mark.parametrize("bug", [each.id for each in bugs() if "QUANT" in each.needs])
def test_quantised_bugs_are_seen_in_fp8_too(bug: str) -> None:
    fp8, used = quantised(parameters_of("mini-8x7b"), FP8), policy("bfloat16")
    report = judged_under(traced_under(bug, "mini-8x7b", fp8, used), "mini-8x7b", fp8, used)
    assert first_wrong_step(report) in MUTANTS[bug].touches, explained(report)
