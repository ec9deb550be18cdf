# SPDX-License-Identifier: Apache-2.0
"""Legal variants are never flagged by the generic policy of their dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.legal import LEGAL
from refmoe.bugs.legal.precision import SequentialOps
from refmoe.bugs.run_engine import same
from refmoe.profiles.load import policy
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT
from tests.bugs.judging import DTYPES, case_named, explained, first_wrong_step, judged, parameters_of, traced

OVERFLOWS = ("huge-activations", "float16")
"""The case and dtype where gate times up is infinite (`why` of the case), so that no later value can be judged."""

NOW = ("walking-skeleton", "top-3", "window-chunks")
"""Cases with pieces and steps, with more than two experts to add, and with a window."""
LATER = (
    "router-underflow", "attention-underflow", "huge-embedding", "huge-activations", "tie-first-second",
    "tie-second-third", "near-tie", "positions-32768", "top-all", "head-dim-64", "tiny-embedding", "square",
    "shared-prefix", "batch-ragged", "packed", "dims-distinct", "experts-12", "dyadic", "dyadic-top-4", "mini-8x7b",
    "every-expert", "token-sweep",
)  # fmt: skip

ROTATED = ("attention.q_rope", "attention.k_rope")

WITHOUT_A_TRACE = ("no-cache", "experts-last-first")
"""Variants that differ only in the order of sums and calls. If sums are exact, as here, no bit differs."""


def run_variant(variant: str, name: str, dtype: str) -> Trace:
    """The trace of a golden case by an engine with this variant."""
    case = case_named(name)
    return LEGAL[variant].run(case.config, parameters_of(name), case.runs(), policy(dtype))


def every_case() -> list[Any]:
    """The parameters: a few cases in the default run, each dtype in turn; the others are slow."""
    found = []
    for i, variant in enumerate(LEGAL):
        for j, name in enumerate((*NOW, *LATER)):
            for n, dtype in enumerate(DTYPES):
                now = name in NOW and (name == NOW[0] or (i + j) % len(DTYPES) == n)
                marks = () if now else (pytest.mark.slow,)
                found.append(pytest.param(variant, name, dtype, marks=marks, id=f"{variant}-{name}-{dtype}"))
    return found


@pytest.mark.parametrize(("variant", "name", "dtype"), every_case())
def test_a_legal_variant_is_never_flagged(variant: str, name: str, dtype: str) -> None:
    report = judged(run_variant(variant, name, dtype), name, dtype)
    expected = CANNOT_JUDGE if (name, dtype) == OVERFLOWS else CONFORMANT
    assert report.verdict == expected, explained(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shown", ["attention.q_rope", "attention.k_rope"])
def test_an_offset_is_found_where_a_rotated_tap_shows_it(shown: str, dtype: str) -> None:
    """The variant is legal only as long as no tap shows positions themselves."""
    variant = replace(LEGAL["uniform-position-offset"], leaves_out=tuple({*ROTATED} - {shown}))
    case = case_named("window-chunks")
    trace = variant.run(case.config, parameters_of("window-chunks"), case.runs(), policy(dtype))
    assert first_wrong_step(judged(trace, "window-chunks", dtype)) == shown


@pytest.mark.parametrize("variant", LEGAL)
def test_a_variant_leaves_out_what_it_has_no_value_for_and_nothing_else(variant: str) -> None:
    report = judged(run_variant(variant, NOW[0], "float32"), NOW[0], "float32")
    assert set(report.missing) == {*LEGAL[variant].leaves_out}


@pytest.mark.parametrize("variant", [variant for variant in LEGAL if variant not in WITHOUT_A_TRACE])
def test_a_variant_does_vary(variant: str) -> None:
    """In float32 or bfloat16 some bit differs, or some tap is missing: the variant is not the specification itself."""
    varied = [not same(run_variant(variant, NOW[0], dtype), traced(None, NOW[0], dtype)) for dtype in DTYPES[:2]]
    assert any(varied)


@pytest.mark.parametrize("variant", WITHOUT_A_TRACE)
@pytest.mark.parametrize("name", ["walking-skeleton", "shared-prefix"])
def test_with_exact_sums_order_and_calls_change_no_bit(variant: str, name: str) -> None:
    """MODEL-4, EXPERT-3: with two experts to add, not even the order of the sum can be seen."""
    assert same(run_variant(variant, name, "bfloat16"), traced(None, name, "bfloat16"))


def test_a_sum_in_another_order_is_the_sum() -> None:
    """The arithmetic of `SequentialOps` in float64 against NumPy's, to 10 decimals."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((3, 5, 8)), rng.standard_normal((3, 8, 4))
    for lanes in (1, 4):
        ops = SequentialOps(policy("float64"), None, lambda n: np.arange(n)[::-1], lanes)
        np.testing.assert_array_almost_equal(ops.matmul(a, b), a @ b, 10)
        np.testing.assert_array_almost_equal(ops.sum(a, 1), a.sum(1), 10)
