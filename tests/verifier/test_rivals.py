# SPDX-License-Identifier: Apache-2.0
"""Of two policies that explain the same errors, the one that allows less suffices."""

from __future__ import annotations

import pytest

from refmoe.profiles.load import policy
from refmoe.verifier.diagnosis.rivals import allows_more


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("accumulation=float16", "attention.context.accumulation=float16"),
        ("linear.input=bfloat16", "linear.input=bfloat16+router.logits.input=float32"),
        ("ranks=8", "ranks=2"),
        ("cache=float16+truncates=true", "cache=float16"),
    ],
)
def test_a_change_of_more_allows_more(wide: str, narrow: str) -> None:
    one, two = (policy(f"hf-float32+{change}") for change in (wide, narrow))
    assert allows_more(one, two)
    assert not allows_more(two, one)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("accumulation=float16", "accumulation=bfloat16"),
        ("ranks=2", "attention.context.accumulation=float16"),
        ("router_order=softmax-then-top-k", "router_order=softmax-then-top-k"),
        ("router_order=softmax-then-top-k", "sigmoid=absolute"),
    ],
)
def test_other_changes_are_in_no_order(one: str, two: str) -> None:
    first, second = (policy(f"hf-float32+{change}") for change in (one, two))
    assert not allows_more(first, second)
    assert not allows_more(second, first)
