"""Ops at a hardware dtype: the fast path. Bits depend on the machine; `exact` is the one where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.ops.arrays import ArrayOps, StoredWeight, Tap
from refmoe.ops.lanes import lanes
from refmoe.ops.streaming import linear_by_blocks
from refmoe.ops.weight_cache import STREAMED, WeightCache

UPCAST_BYTES = 2 << 30
SIDE_BY_SIDE = 16
"""Rows from which a product, experts, or tokens of a head are worth lanes: below, waking one takes as long."""


def upcast(stored: Any, dtype: np.dtype[Any]) -> Any:
    """Stored values at the computing dtype: exact, as each stored dtype is a subset of float32."""
    if stored.dtype == dtype:
        return stored
    if stored.dtype == ml_dtypes.bfloat16:
        # a bfloat16 is the upper half of a float32: a shift is several times faster than a cast
        wide = stored.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        stored = wide.view(np.float32)
    return stored.astype(dtype, copy=False)


def product(x: Any, matrix: Any) -> Any:
    """x times the transpose of the matrix, some of its rows in each lane.

    x: [T, n]   matrix: [m, n]   returns: [T, m]
    """
    here = lanes()
    if here.count == 1 or here.busy > 1:
        return x @ matrix.T
    result = np.empty((len(x), len(matrix)), x.dtype)
    size = -(-len(matrix) // here.count)
    here.run([
        partial(np.matmul, x, matrix[start : start + size].T, out=result[:, start : start + size])
        for start in range(0, len(matrix), size)
    ])  # fmt: skip
    return result


class NativeOps(ArrayOps):
    """NumPy at float32 or float64; weights in a narrower dtype are converted when they are used."""

    def __init__(self, dtype: Any = np.float64, tap: Tap | None = None, upcast_bytes: int = UPCAST_BYTES) -> None:
        """dtype: float32 or float64.   upcast_bytes: memory for converted weights that are kept for later calls.

        A weight of more than a fourth of that is streamed: at no time is the whole of it in memory.
        """
        super().__init__(dtype, tap)
        self._upcast = WeightCache(upcast_bytes)
        self.turns: list[Any] = []
        """What the last rotary table was asked for, and the table: all layers of a call ask for the same."""

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        if math.prod(weight.shape) * self.dtype.itemsize > self._upcast.limit // STREAMED:
            return linear_by_blocks(x, weight, lambda stored: upcast(stored, self.dtype), lambda x, w: x @ w.T)
        matrix = self._upcast.get(weight, lambda: upcast(weight.read(), self.dtype), lambda array: array.nbytes)
        return product(x, matrix) if len(x) >= SIDE_BY_SIDE else x @ matrix.T

    def matmul(self, a: Any, b: Any) -> Any:
        return a @ b

    def sum(self, x: Any, axis: int) -> Any:
        return x.sum(axis=axis)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def sqrt(self, x: Any) -> Any:
        return np.sqrt(x)

    def sigmoid(self, x: Any) -> Any:
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, 1, small) / (1 + small)

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        exponents = -np.asarray(numerators, dtype=np.float64) / denominator
        angles = positions[:, None] * base**exponents
        return self.array(np.cos(angles)), self.array(np.sin(angles))
