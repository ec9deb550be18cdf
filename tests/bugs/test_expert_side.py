"""The bugs of router, experts, residual, precision, loading and quantisation: each is seen, blamed and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.bugs.quantised_checkpoint import FP8, INT8, quantised
from refmoe.bugs.run_engine import held_trace, run, same
from refmoe.policy.load import policy
from refmoe.spec.model import Layer, Parameters
from refmoe.suite.conditions import CONDITIONS, NOT_OF_A_CASE
from refmoe.traces.trace import Run
from refmoe.verify.diagnosis import diagnose
from refmoe.verify.findings import CONFORMANT, FAIL, NOT_CONFORMANT
from tests.bugs.expert_side import (
    INERT,
    SHOWN_BY,
    STRICT,
    UNSEEN,
    judge,
    judged_under,
    mine,
    policy_for,
    reference,
    strict,
    traced_under,
)
from tests.bugs.judging import (
    DTYPES,
    assert_named,
    case_named,
    cases_aimed_at,
    explained,
    first_wrong_step,
    parameters_of,
)

BY_DTYPE = [pytest.param(dtype, marks=[pytest.mark.slow] * (dtype == "float16")) for dtype in DTYPES]

NAMED_FAST = (
    "router-softmax-over-tokens", "expert-unpermute-missing", "hidden-tap-off-by-one", "prec-logits-lowprec",
    "load-sanitise-twice", "quant-smoothing-skips-router",
)  # fmt: skip
"""One of each class, for the default run."""


# ---- every bug is seen


def test_every_bug_has_a_case() -> None:
    assert {each.id for each in mine()} == set(SHOWN_BY)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_bug_is_seen_and_its_own_step_is_blamed(bug: str, dtype: str) -> None:
    _, report = judge(bug, dtype)
    if (bug, dtype) in UNSEEN:
        assert report.verdict != NOT_CONFORMANT, explained(report)
        return
    assert report.verdict == NOT_CONFORMANT, explained(report)
    failed = {check.step for check in report.checks if check.verdict == FAIL}
    assert first_wrong_step(report) in MUTANTS[bug].touches
    assert failed <= set(MUTANTS[bug].touches), explained(report)


@pytest.mark.parametrize("dtype", BY_DTYPE)
@pytest.mark.parametrize("name", sorted(set(SHOWN_BY.values())))
def test_the_specification_itself_passes_there(name: str, dtype: str) -> None:
    used = policy(dtype)
    trace = traced_under(None, name, parameters_of(name), used)
    report = judged_under(trace, name, parameters_of(name), used)
    # in float16 the case of overflow is beyond judgement, for bug and specification alike
    assert report.verdict == CONFORMANT or (name, dtype) == ("huge-activations", "float16"), explained(report)
    assert report.verdict != NOT_CONFORMANT


@pytest.mark.parametrize("bug", [*SHOWN_BY])
def test_the_case_lists_the_bug_or_has_what_it_needs(bug: str) -> None:
    needs = [name for name in MUTANTS[bug].needs if name in CONDITIONS]
    assert SHOWN_BY[bug] in cases_aimed_at(bug) or set(needs) <= set(case_named(SHOWN_BY[bug]).conditions)


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


# ---- and changes nothing where it needs something that is not there


def constant(weight: Any) -> Any:
    """All elements equal: no permutation, transposition or exchange of matrices changes anything."""
    return mapped(weight, lambda values: np.full_like(values, 0.0625))


def symmetric(parameters: Parameters) -> Parameters:
    """The opposite of LOAD: every matrix constant, layers and experts alike."""

    def alike(layer: Layer) -> Layer:
        names = ("attention_norm", "wq", "wk", "wv", "wo", "moe_norm", "gate")
        return replace(layer, **{name: constant(getattr(layer, name)) for name in names})

    changed = with_experts(
        with_layers(parameters, alike),
        lambda expert: replace(expert, w1=constant(expert.w1), w2=constant(expert.w2), w3=constant(expert.w3)),
    )
    return replace(changed, embedding=constant(parameters.embedding), output=constant(parameters.output))


@pytest.mark.parametrize(("bug", "need", "name"), INERT)
def test_bug_changes_nothing_without_what_it_needs(bug: str, need: str, name: str) -> None:
    case = case_named(name)
    assert need not in case.conditions or need in ("T>1", "LOAD")  # these hold in every golden case
    parameters, runs, used = parameters_of(name), case.runs(), policy("float32")
    if need == "LOAD":
        parameters = symmetric(parameters)
        parameters = quantised(parameters, INT8) if "QUANT" in MUTANTS[bug].needs else parameters
    elif need == "T>1":
        runs = (Run(run="prefill", op="prefill", sequence=0, tokens=runs[0].tokens[:1], positions=(0,), past=0),)
    right = run(None, case.config, parameters, runs, used)
    assert same(run(MUTANTS[bug], case.config, parameters, runs, used), right)


def test_every_need_is_known_and_proven() -> None:
    proven = {(bug, need) for bug, need, _ in INERT}
    needs = {(each.id, need) for each in mine() for need in each.needs}
    assert {need for _, need in needs} <= {*CONDITIONS, *NOT_OF_A_CASE}
    assert needs <= proven


# ---- and is named


def name_it(bug: str, dtype: str) -> None:
    trace, report = judge(bug, dtype)
    if (bug, dtype) in UNSEEN:
        pytest.skip(UNSEEN[bug, dtype])
    case = case_named(SHOWN_BY[bug])
    found = diagnose(trace, case.config, reference(bug, case.name), case.runs(), policy_for(bug, dtype), report, mine())
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


def test_a_shifted_tap_is_not_blamed_on_the_model() -> None:
    """Only the shown hidden states are wrong; all that was computed from the real ones is acquitted."""
    _, report = judge("hidden-tap-off-by-one", "float32")
    failed = [check.tap for check in report.checks if check.verdict == FAIL and check.run == "prefill"]
    assert failed == [f"layers.{i}.residual" for i in range(4)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_before_the_last_projection_is_legal_where_it_does_not_show(dtype: str) -> None:
    """By exact arithmetic it is the same number: only the taps between tell."""
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
    trace, _ = judge("prec-fp16-ffn-overflow", "bfloat16")
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


@pytest.mark.parametrize("bug", [each.id for each in mine() if "QUANT" in each.needs])
def test_quantised_bugs_are_seen_in_fp8_too(bug: str) -> None:
    fp8, used = quantised(parameters_of("mini-8x7b"), FP8), policy("bfloat16")
    report = judged_under(traced_under(bug, "mini-8x7b", fp8, used), "mini-8x7b", fp8, used)
    assert first_wrong_step(report) in MUTANTS[bug].touches, explained(report)
