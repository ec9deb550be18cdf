# SPDX-License-Identifier: Apache-2.0
"""Ops whose bits are the same on every machine: correctly rounded sums and products, fixed elementary functions.

`golden/dot.md` and `golden/elementary.md` tell how to compute the same bits in another language.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import ArrayOps, StoredWeight, Tap
from refmoe.arithmetic.exact import dot, elementary
from refmoe.arithmetic.streaming import linear_by_blocks
from refmoe.arithmetic.weight_cache import STREAMED, WeightCache

PREPARED_BYTES = 4 << 30


class ExactOps(ArrayOps):
    """IEEE-754 binary64. NumPy's elementwise ``+ - * /`` round once each; all other operations are defined here."""

    def __init__(self, tap: Tap | None = None, xp: Any = np, prepared_bytes: int = PREPARED_BYTES) -> None:
        """prepared_bytes: memory for prepared weights that are kept for later calls.

        A weight of more than a fourth of that is streamed, so that memory never holds all of it.
        """
        super().__init__(np.float64, tap, xp)
        self._prepared = WeightCache(prepared_bytes)
        self._circle: dict[Any, Any] = {}  # the last call of `unit_circle`: all layers of a forward pass share it

    def vector(self, weight: StoredWeight) -> Any:
        return self._prepared.get(weight, lambda: self.array(weight.read()), lambda made: made.nbytes)

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        prepared = self._prepared.find(weight)
        if prepared is None:
            if math.prod(weight.shape) * self.dtype.itemsize > self._prepared.limit // STREAMED and self.xp is np:
                return _streamed(x, weight)
            made = dot.prepare(weight.read(), self.xp, weight.grid)
            prepared = self._prepared.get(weight, lambda: made, lambda made: made.nbytes)
        return dot.linear(x, prepared, self.xp)

    def matmul(self, a: Any, b: Any) -> Any:
        return dot.matmul(a, b, self.xp)

    def sum(self, x: Any, axis: int) -> Any:
        return dot.sum(x, axis, self.xp)

    def exp(self, x: Any) -> Any:
        return elementary.exp(x, self.xp)

    def log(self, x: Any) -> Any:
        return elementary.log(x, self.xp)

    def sqrt(self, x: Any) -> Any:
        return self.xp.sqrt(x)  # correctly rounded by IEEE-754

    def sigmoid(self, x: Any) -> Any:
        return elementary.sigmoid(x, self.xp)

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        if self.xp is not np:
            return elementary.unit_circle(positions, base, numerators, denominator, self.xp)
        key = positions.dtype, positions.shape, positions.tobytes(), base, tuple(numerators), denominator
        table = self._circle.get(key)
        if table is None:
            table = elementary.unit_circle(positions, base, numerators, denominator)
            for part in table:
                part.flags.writeable = False  # several layers have it
            self._circle.clear()
            self._circle[key] = table
        return table


def _streamed(x: Any, weight: StoredWeight) -> Any:
    """x times the transpose of a weight that is too large to be held. x: [..., n]   returns: [..., m]"""
    m, n = weight.shape
    known = None if weight.grid is None or not x.size else dot.slices_for(weight.grid, n)
    if known is None:
        return linear_by_blocks(x, weight, dot.prepare, dot.linear)
    rows = x.reshape(-1, n)
    sliced = dot.slice_rows(rows, *known)  # once for all blocks
    prepare = partial(dot.prepare, grid=weight.grid)
    return linear_by_blocks(rows, weight, prepare, lambda _, block: dot.linear_sliced(sliced, block)).reshape(
        *x.shape[:-1], m
    )
