# SPDX-License-Identifier: Apache-2.0
"""Dispatch plans are exact: a right one passes, and each mistake fails at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmoe.testing as assertions


def plan_of(ids: Any, experts: int, block: int, padding: int) -> dict[str, Any]:
    """A plan and its tables, expert by expert."""
    flat = ids.reshape(-1)
    order, blocks, counts = [], [], []
    for expert in range(experts):
        mine = [slot for slot, e in enumerate(flat) if e == expert]
        counts.append(len(mine))
        mine += [padding] * (-len(mine) % block)
        order += mine
        blocks += [expert] * (len(mine) // block)
    sizes = [-(-count // block) * block for count in counts]
    return {
        "order": np.array(order, np.int32), "counts": np.array(counts), "offsets": np.cumsum(sizes),
        "expert_of_block": np.array(blocks, np.int32), "total": np.array([len(order)]),
    }  # fmt: skip


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 6), st.sampled_from([1, 4, 16]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_right_plan(seed: int, tokens: int, experts: int, block: int, sentinel: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, experts, (tokens, 2))
    padding = -1 if sentinel else ids.size
    plan = plan_of(ids, experts, block, padding)
    order = plan.pop("order")
    x = rng.standard_normal((tokens, 3)).astype(np.float32)
    rows = np.array([x[slot // 2] if 0 <= slot < ids.size else [np.nan] * 3 for slot in order], np.float32).reshape(
        -1, 3
    )
    assertions.assert_permutation(
        order, ids, experts=experts, block=block, padding=padding, stable=True, rows=rows, x=x, **plan
    )
    with_first = np.concatenate([[0], plan["offsets"]])
    unused = np.concatenate([plan["expert_of_block"], [99, 99]])
    assertions.assert_permutation(order, ids, experts=experts, block=block, offsets=with_first, expert_of_block=unused)
    back = np.zeros((ids.size, 3), np.float32)
    for row, slot in zip(rows, order, strict=True):
        if 0 <= slot < ids.size:
            back[slot] = row
    assertions.assert_unpermutation(back, rows, order)
    assertions.assert_unpermutation(back.reshape(tokens, 2, 3), rows, order)


IDS = np.array([[2, 0], [1, 2], [0, -1]])
RIGHT = plan_of(IDS, 3, 4, -1)


def changed(name: str, at: int, value: int) -> dict[str, Any]:
    copy = {key: np.array(array) for key, array in RIGHT.items()}
    copy[name][at] = value
    return copy


MISTAKES: dict[str, Callable[[], dict[str, Any]]] = {
    "slot 4 (expert 0) has no place": lambda: changed("order", 1, -1),
    "slot 1 (expert 0) has several places": lambda: changed("order", 2, 1),
    "slot 5 (expert -1) has a place, but no expert": lambda: changed("order", 2, 5),
    "place 2 holds 99": lambda: changed("order", 2, 99),
    "counts[1] is 2, but 1 was expected": lambda: changed("counts", 1, 2),
    "offsets[0] is 3, but 4 was expected": lambda: changed("offsets", 0, 3),
    "expert_of_block[2] is 1, but 2 was expected": lambda: changed("expert_of_block", 2, 1),
    "total is [11], but 12 was expected": lambda: changed("total", 0, 11),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_wrong_plan(words: str) -> None:
    plan = MISTAKES[words]()
    order = plan.pop("order")
    with pytest.raises(AssertionError) as failed:
        assertions.assert_permutation(order, IDS, experts=3, block=4, padding=-1, **plan)
    assert words in str(failed.value)


def test_experts_in_the_wrong_order() -> None:
    with pytest.raises(AssertionError, match="place 0 holds 2"):
        assertions.assert_permutation([2, 1, 4, 0, 3], IDS)


def test_slots_in_the_wrong_order() -> None:
    assertions.assert_permutation([4, 1, 2, 0, 3], IDS)
    with pytest.raises(AssertionError, match="place 1 holds slot 1 after slot 4"):
        assertions.assert_permutation([4, 1, 2, 0, 3], IDS, stable=True)


def test_rows_that_are_no_copies() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    order = [1, 4, 2, 0, 3]
    rows = x[np.array(order) // 2]
    assertions.assert_permutation(order, IDS, rows=rows, x=x)
    rows[3, 1] = np.nextafter(rows[3, 1], np.float32(9))
    with pytest.raises(AssertionError, match="row 3 is no copy of the row of token 0"):
        assertions.assert_permutation(order, IDS, rows=rows, x=x)
    back = np.zeros((6, 4), np.float32)
    back[order] = rows
    assertions.assert_unpermutation(back, rows, order)
    back[5] = 1
    with pytest.raises(AssertionError, match="slot 5 has no place, but is not zero"):
        assertions.assert_unpermutation(back, rows, order)
    assertions.assert_unpermutation(back, rows, order, zero=False)
    back[2] = back[0]
    with pytest.raises(AssertionError, match="slot 2 is no copy of row 2"):
        assertions.assert_unpermutation(back, rows, order, zero=False)
