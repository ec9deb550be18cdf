# SPDX-License-Identifier: Apache-2.0
"""Slabs: a matrix of middle size keeps its values and gets memory of its own; other matrices are not moved."""

from __future__ import annotations

import numpy as np
import pytest

from refmoe.arithmetic.native import slabs
from refmoe.arithmetic.native.slabs import ALIGNMENT, HUGE_BY_ITSELF, IN_CACHE_ANYWAY, Slabs


@pytest.mark.parametrize("size", [0, 1, IN_CACHE_ANYWAY - 1, HUGE_BY_ITSELF, HUGE_BY_ITSELF + 1])
def test_small_and_large_arrays_are_left_where_they_are(size: int) -> None:
    array = np.zeros((size, 1), np.uint8)
    assert Slabs().settle(array) is array


@pytest.mark.parametrize("slab", [HUGE_BY_ITSELF + ALIGNMENT, 16 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_matrix_keeps_its_values(monkeypatch: pytest.MonkeyPatch, slab: int, dtype: type) -> None:
    """The values stay when later matrices are settled, in this slab or in the next."""
    monkeypatch.setattr(slabs, "SLAB", slab)
    rng, here = np.random.default_rng(1), Slabs()
    shapes = [(600, 129), (300, 999), (1, 130_001), (511, 512), (700, 700)]
    given = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    settled = [here.settle(matrix) for matrix in given]
    for before, after in zip(given, settled, strict=True):
        np.testing.assert_array_equal(after, before)
        assert not np.shares_memory(after, before)
        assert after.ctypes.data % ALIGNMENT == 0
        assert after.flags.c_contiguous


def test_a_view_with_gaps_is_settled_without_them() -> None:
    wide = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    settled = Slabs().settle(wide[:, ::2])
    np.testing.assert_array_equal(settled, wide[:, ::2])
    assert settled.flags.c_contiguous
