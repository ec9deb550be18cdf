# SPDX-License-Identifier: Apache-2.0
"""Gather and combine, bit for bit."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.laws import combine_law, gather_law
from tests.cuda.on_cpu import DTYPES, in_every_order, kernels, needs_compiler, stored
from tests.cuda.runner.module import Conditions

pytestmark = needs_compiler
MAP_NORESERVE = 0x4000  # of Linux; the module mmap does not name it
COLUMNS = st.sampled_from([1, 2, 7, 8, 9, 16, 63, 64, 65, 100, 2047, 2051])


@st.composite
def routed(draw: Any) -> tuple[Any, Any, Any, int, Any]:
    """Rows of tokens, the order of their pairs and its inverse."""
    tokens, k, columns = draw(st.integers(0, 5)), draw(st.integers(1, 8)), draw(COLUMNS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = stored(rng, (tokens, columns), draw(st.sampled_from(sorted(DTYPES))))
    order = rng.permutation(tokens * k).astype(np.int32)
    return rng, x, order, k, np.argsort(order).astype(np.int32).reshape(tokens, k)


@given(routed())
@settings(max_examples=30)
def test_rows_are_gathered_bit_for_bit(case: Any) -> None:
    rng, x, order, k, _ = case
    bits = rng.integers(0, 256, x.nbytes, dtype=np.uint8)  # any bits, as a gather only copies
    gather_law(in_every_order, bits.view(x.dtype).reshape(x.shape), order, k)


@given(routed())
@settings(max_examples=30)
def test_combining_is_the_stated_float32_sum(case: Any) -> None:
    """COMBINE-1, slot after slot."""
    rng, x, order, k, position = case
    outputs = stored(rng, (len(order), x.shape[1]), str(x.dtype))
    combine_law(in_every_order, outputs, position, rng.random((len(x), k)).astype(np.float32))


def far_rows(rows: int, columns: int) -> Any:
    """An array of more than 2^31 elements in which only touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, rows * columns * 2, flags=flags), np.float16).reshape(rows, columns)


def test_rows_beyond_2_to_the_31_elements_are_reached() -> None:
    x = far_rows(70_000, 1 << 15)
    x[-1] = np.arange(1 << 15) % 1000
    unguarded, last = kernels(Conditions(guard=None)), np.array([len(x) - 1], np.int32)
    assert np.array_equal(unguarded.gather_rows(x, last, 1), x[-1:])
    assert np.array_equal(unguarded.combine(x, last.reshape(1, 1), np.ones((1, 1), np.float32)), x[-1:])
