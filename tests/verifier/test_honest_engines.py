# SPDX-License-Identifier: Apache-2.0
"""Unpatched transformers must pass under the policies that it follows, and fail under policies that it does not follow.

The expected verdicts follow from the source of transformers. MixtralRMSNorm, the eager softmax and the router's softmax
compute in float32 at every dtype of the model. The router takes softmax first, and then the largest probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.spec import model as spec
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, PASS
from tests.verifier.engines import (
    captured,
    case_names,
    explained,
    failed_steps,
    first_wrong_step,
    honest,
    judged,
    model_named,
    only,
)

pytestmark = pytest.mark.engines

DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa")

OVERFLOWS = ("huge-activations", "float16")
"""The case and dtype where gate times up is infinite (`why` of the case), so that no later value can be judged."""


def assert_not_wrong(name: str, dtype: str, attention: str, rules: str) -> None:
    """Assert that the trace is conformant, or cannot be judged where float16 overflows."""
    report = judged(name, honest(name, dtype, attention), rules)
    assert report.verdict == (CANNOT_JUDGE if (name, dtype) == OVERFLOWS else CONFORMANT), explained(report)


def by_default(number: int, dtype: str, attention: str) -> bool:
    """The marks: the default run has every case and dtype once, with eager and sdpa in turn; the rest is slow."""
    return (number + DTYPES.index(dtype) + ATTENTIONS.index(attention)) % 2 == 0


def every(dtypes: tuple[str, ...], generic: bool) -> list[Any]:
    """All cases, dtypes and kinds of attention.   generic: whether the default run has only one dtype of each case"""
    found = []
    for number, name in enumerate(case_names()):
        for dtype in dtypes:
            for attention in ATTENTIONS:
                now = by_default(number, dtype, attention)
                if generic:
                    now &= number % len(dtypes) == dtypes.index(dtype)
                marks = () if now else (pytest.mark.slow,)
                found.append(pytest.param(name, dtype, attention, marks=marks, id=f"{name}-{dtype}-{attention}"))
    return found


@pytest.mark.parametrize(("name", "dtype", "attention"), every(DTYPES, generic=False))
def test_its_own_profile_never_fails_it(name: str, dtype: str, attention: str) -> None:
    assert_not_wrong(name, dtype, attention, f"hf-{dtype}")


@pytest.mark.parametrize(("name", "dtype", "attention"), every(("float32", "bfloat16", "float16"), generic=True))
def test_the_policy_of_its_dtype_never_fails_it(name: str, dtype: str, attention: str) -> None:
    """The exception is a softmax that underflows: it chooses among equal zeros, which no rounding of a logit
    explains."""
    if name != "router-underflow":
        assert_not_wrong(name, dtype, attention, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_choice_lost_to_underflow_is_illegal_for_a_router_that_compares_logits(dtype: str) -> None:
    """`router-underflow`: the second choice of float32 probabilities that are all zero but one."""
    report = judged("router-underflow", honest("router-underflow", dtype), dtype)
    assert failed_steps(report) == {"router.experts"}, explained(report)
    illegal = [decision for decision in report.decisions if not decision.legal]
    assert illegal
    assert all(decision.found[0] == decision.expected[0] for decision in illegal)
    assert_not_wrong("router-underflow", dtype, "eager", f"hf-{dtype}")


@pytest.mark.parametrize("name", ["walking-skeleton", "four-layers", "token-sweep"])
def test_float64_throughout_is_not_what_it_does(name: str) -> None:
    """Its norms are in float32: the first step after the embedding is 2^29 times as wrong as float64 allows."""
    report = judged(name, honest(name, "float64"), "float64")
    assert report.verdict == NOT_CONFORMANT
    assert report.first_wrong is not None
    assert report.first_wrong[1] == "layers.0.attention_norm"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rules", ["float32", "hf-float32"])
def test_a_coarser_engine_declared_as_float32_fails(dtype: str, rules: str) -> None:
    """The weights, and so the embeddings, are exact in both; the first norm is rounded."""
    report = judged("walking-skeleton", honest("walking-skeleton", dtype), rules)
    assert first_wrong_step(report) == "attention_norm", explained(report)


@pytest.mark.parametrize("rules", ["bfloat16", "float16", "hf-bfloat16", "hf-float16"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_more_precision_than_declared_is_legal(dtype: str, rules: str) -> None:
    report = judged("walking-skeleton", honest("walking-skeleton", dtype), rules)
    assert report.verdict == CONFORMANT, explained(report)


def test_decisions_that_rounding_flips_are_legal() -> None:
    """Tiny embeddings in bfloat16: choices differ from the exact run's, but each follows from the engine's values."""
    name = "small-embeddings"
    model, exact = model_named(name), Recorder("*router.experts")
    execute(ExactOps(exact), spec.Model(model.config, model.checkpoint.parameters), model.runs, exact)
    found = honest(name, "bfloat16")
    flipped = sum(
        int((np.sort(found[key], -1) != np.sort(expected, -1)).any(-1).sum()) for key, expected in exact.arrays.items()
    )
    assert flipped > 10
    for rules in ("hf-bfloat16", "bfloat16"):
        report = judged(name, found, rules)
        assert report.verdict == CONFORMANT, explained(report)


# ---- a cache kept in float16


@pytest.fixture
def _float16_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values pass through float16 on their way into the cache, as they are read from it afterwards."""
    import torch
    from transformers import DynamicCache

    update = DynamicCache.update

    def rounded(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = (part.to(torch.float16).to(part.dtype) for part in (keys, values))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", rounded)


@pytest.mark.usefixtures("_float16_cache")
@pytest.mark.parametrize("name", ["walking-skeleton", "shared-prefix", "window-chunks", "positions-2048"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_float16_cache_is_legal_where_the_policy_says_so_and_nowhere_else(name: str, attention: str) -> None:
    """Keys show in the probabilities, values in the context. Probabilities of sdpa are not in the trace."""
    found = captured(name, "float32", attention)
    report = judged(name, found, "hf-float32+cache=float16")
    assert report.verdict == CONFORMANT, explained(report)
    report = judged(name, found, "hf-float32")
    shown = {"attention.probs", "attention.context"} if attention == "eager" else {"attention.context"}
    assert failed_steps(report) == shown, explained(report)


# ---- traces with few taps

SUBSETS = {
    "hidden states": lambda step: step in ("embedding", "residual"),
    "logits": lambda step: step == "logits",
    "router": lambda step: step.startswith("router."),
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [name if name in ("head-dim-free", "near-tie", "tiny-embedding") else pytest.param(name, marks=pytest.mark.slow)
     for name in case_names()],
)  # fmt: skip
def test_few_taps_are_no_fault_and_the_report_says_what_is_missing(name: str, dtype: str, subset: str) -> None:
    wanted = SUBSETS[subset]
    found = only(honest(name, dtype), wanted)
    report = judged(name, found, f"hf-{dtype}")
    assert report.verdict != NOT_CONFORMANT, explained(report)
    assert "moe_norm" in report.missing
    assert not any(wanted(step) for step in report.missing)
    assert any("moe_norm" in note for note in report.notes)


@pytest.mark.parametrize("dtype", ["float16"])
def test_a_legal_infinity_is_no_error_beyond_the_allowed_one(dtype: str) -> None:
    """Past 65504 a value is infinite as it should be: the report must not say that it errs by more than is allowed."""
    report = judged("huge-activations", honest("huge-activations", dtype, "eager"), "hf-float16")
    assert [check.tap for check in report.checks if check.verdict == PASS and not check.worst_error <= 1] == []
