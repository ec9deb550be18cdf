# SPDX-License-Identifier: Apache-2.0
"""Ops at a hardware dtype: the fast path. Its bits depend on the machine, those of `exact` do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refmoe.arithmetic.arrays import ArrayOps, StoredWeight, Tap
from refmoe.arithmetic.formats import upcast
from refmoe.arithmetic.native.lanes import lanes
from refmoe.arithmetic.native.slabs import Slabs
from refmoe.arithmetic.streaming import linear_by_blocks
from refmoe.arithmetic.weight_cache import STREAMED, WeightCache

UPCAST_BYTES = 2 << 30
SIDE_BY_SIDE = 16
"""Rows from which a product, experts, or tokens of a head are spread over lanes. Below, waking a lane takes as long."""
ALONE = 1 << 21
"""Multiplications up to which a product is not divided among lanes."""


ALL = slice(None)


class Part(NamedTuple):
    """Some rows and columns of a weight."""

    weight: StoredWeight
    rows: slice = ALL
    columns: slice = ALL


class NativeOps(ArrayOps):
    """NumPy at float32 or float64; weights in a narrower dtype are converted when they are used."""

    def __init__(self, dtype: Any = np.float64, tap: Tap | None = None, upcast_bytes: int = UPCAST_BYTES) -> None:
        """dtype: float32 or float64.   upcast_bytes: memory for converted weights that are kept for later calls.

        A weight of more than a fourth of that is streamed, so that memory never holds all of it.
        """
        super().__init__(dtype, tap)
        self._upcast = WeightCache(upcast_bytes)
        self._slabs = Slabs()
        self.memo: dict[Any, tuple[tuple[Any, ...], Any]] = {}
        """By function: the arguments of its last call and the result, which all layers of a forward pass share."""

    def vector(self, weight: StoredWeight) -> Any:
        return self.matrix(weight)

    def ready(self, x: Any) -> Any:
        """The factor x in a form for several products, so that its preparation is done once. x: [T, n]"""
        return x

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        if len(x) < SIDE_BY_SIDE:
            matrix = self._upcast.find(weight)
            if matrix is not None:
                return x @ matrix.T
        if self.streams(weight):
            return self._streamed(x, weight)
        m, n = weight.shape
        if x.ndim != 2:
            return self.linear(x.reshape(-1, n), weight).reshape(*x.shape[:-1], m)
        out = np.empty((len(x), m), self.dtype)
        here, rows = lanes(), m
        if len(x) >= SIDE_BY_SIDE and here.busy == 1 and len(x) * m * n > ALONE:
            rows = -(-m // here.count)
        parts = [slice(start, start + rows) for start in range(0, m, rows)]
        pieces = [partial(self.multiply, x, (Part(weight, part),), out[:, part]) for part in parts]
        if len(x) >= SIDE_BY_SIDE:
            here.run(pieces)
        else:
            pieces[0]()
        return out

    def multiply(self, x: Any, parts: Sequence[Part], out: Any) -> None:
        """x times the transposes of parts of weights, side by side in `out`. One thread computes it if x has many rows.

        x: [T, n]   out: [T, the total number of rows of the parts]
        """
        start = 0
        for part in parts:
            if self.streams(part.weight):
                product = self._streamed(x, part.weight)[:, part.rows]
                out[:, start : start + product.shape[1]] = product
                start += product.shape[1]
            else:
                matrix = self.matrix(part.weight)[part.rows, part.columns]
                np.matmul(x, matrix.T, out=out[:, start : start + len(matrix)])
                start += len(matrix)

    def _streamed(self, x: Any, weight: StoredWeight) -> Any:
        return linear_by_blocks(x, weight, partial(upcast, dtype=self.dtype), lambda x, w: x @ w.T)

    def hold(self, weight: StoredWeight, rows: int) -> None:
        """Convert the weight once, before each lane asks for its part. rows: of the other factor"""
        if not self.streams(weight):
            self.matrix(weight)

    def streams(self, weight: StoredWeight) -> bool:
        """Whether a weight is too large to be held. Parts of such a weight cannot be multiplied separately."""
        return bool(math.prod(weight.shape) * self.dtype.itemsize > self._upcast.limit // STREAMED)

    def matrix(self, weight: StoredWeight) -> Any:
        """The weight at the dtype of these ops."""

        def prepare() -> Any:
            return self._slabs.settle(upcast(weight.read(), self.dtype))

        return self._upcast.get(weight, prepare, lambda matrix: matrix.nbytes)

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
