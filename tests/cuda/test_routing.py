# SPDX-License-Identifier: Apache-2.0
"""Routing and permutation: the integers equal NumPy's exactly."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.laws import route_law, sort_law
from tests.cuda.on_cpu import DTYPES, in_every_order, needs_compiler

pytestmark = needs_compiler


@st.composite
def logits(draw: Any) -> tuple[Any, int]:
    """Logits of any number of experts: of few different values, so that ties are frequent, or of any values."""
    experts = draw(st.integers(1, 256))
    k = draw(st.integers(1, min(8, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(0, 6)), experts)
    values = rng.integers(-2, 3, shape) if draw(st.booleans()) else rng.standard_normal(shape) * 10
    return values.astype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))]), k


@given(logits())
@settings(max_examples=40)
def test_routing_is_the_specs(case: tuple[Any, int]) -> None:
    """ROUTE-2 to ROUTE-4 for any number of experts up to 256 and of slots up to 8."""
    route_law(in_every_order, *case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_logits_are_ordered_as_numpy_orders_them(dtype: str) -> None:
    """Signed zeros tie. Subnormals do not, even where they are flushed. NaN is last, and infinities are numbers."""
    tiny = float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal)
    rows = [
        [0.0, -0.0, 0.0, -0.0, -1.0],
        [-0.0, tiny, 0.0, 2 * tiny, -tiny],
        [np.nan, 1.0, np.nan, -np.inf, 0.0],
        [np.inf, -np.inf, 1.0, np.inf, np.nan],
        [-np.inf] * 5,
        [np.nan] * 5,
        [-np.nan, np.nan, 3.0, -3.0, -np.inf],
    ]
    with np.errstate(invalid="ignore"):
        route_law(in_every_order, np.array(rows).astype(DTYPES[dtype]), 5)


def test_more_slots_than_the_models_have() -> None:
    """Up to one slot per lane."""
    route_law(in_every_order, np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32), 32)


@st.composite
def choices(draw: Any) -> tuple[Any, int]:
    """Any number of experts and pairs, around the blocks of 256; all on one expert, or any."""
    experts, tokens = draw(st.integers(1, 256)), draw(st.sampled_from([0, 1, 5, 31, 127, 128, 129, 200, 300]))
    k = draw(st.integers(1, 8 if tokens < 100 else 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = draw(st.integers(1, experts))
    return (experts - 1 - rng.integers(0, few, (tokens, k))).astype(np.int32), experts


@given(choices())
@settings(max_examples=40)
def test_pairs_are_sorted_stably(case: tuple[Any, int]) -> None:
    """Order, inverse and offsets equal those of `group` and `inverse` of the ops."""
    sort_law(in_every_order, *case)


def test_no_tokens_are_no_pairs() -> None:
    route_law(in_every_order, np.zeros((0, 8), np.float32), 2)
    sort_law(in_every_order, np.zeros((0, 2), np.int32), 8)
