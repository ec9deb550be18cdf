# SPDX-License-Identifier: Apache-2.0
"""Ops on Arb balls: every result encloses the real number that the spec defines.

Arrays are NumPy object arrays of `flint.arb`. Only the selection of experts is a decision, and balls cannot always
decide it. `top_k` follows the midpoints, and `chooses` says for which tokens that choice is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import ArrayOps, StoredWeight, Tap
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.errors import require

PRECISION = 128
"""Bits of the midpoints."""


class BallOps(ArrayOps):
    """Ball arithmetic of python-flint, at `PRECISION` bits."""

    def __init__(self, tap: Tap | None = None, precision: int = PRECISION) -> None:
        """Raises InputError when python-flint is not installed."""
        super().__init__(object, tap)
        self.flint = require("flint", "certify", "ball arithmetic")
        self.flint.ctx.prec = precision
        self._matrices = WeightCache(1 << 30)

    def array(self, values: Any) -> Any:
        values = np.asarray(values)
        if values.dtype == object:
            return values
        return self._map(self.flint.arb, values.astype(np.float64))

    def max(self, x: Any, axis: int) -> Any:
        # the maximum is only subtracted before exp, where any number is correct; the largest midpoint keeps balls small
        at = np.argmax(midpoints(x), axis=axis, keepdims=True)
        return np.take_along_axis(x, at, axis=axis).squeeze(axis)

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        def transposed() -> Any:
            return self.flint.arb_mat(np.asarray(weight.read(), np.float64).T.tolist())

        matrix = self._matrices.get(weight, transposed, lambda _: 64 * weight.shape[0] * weight.shape[1])
        rows = x.reshape(-1, x.shape[-1])
        return self._product(rows, matrix).reshape(*x.shape[:-1], weight.shape[0])

    def matmul(self, a: Any, b: Any) -> Any:
        lead = a.shape[:-2]
        pairs = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
        products = [self._product(left, self.flint.arb_mat(right.tolist())) for left, right in pairs]
        return np.stack(products).reshape(*lead, a.shape[-2], b.shape[-1])

    def sum(self, x: Any, axis: int) -> Any:
        return np.add.reduce(x, axis=axis)

    def exp(self, x: Any) -> Any:
        return self._map(lambda ball: ball.exp(), x)

    def log(self, x: Any) -> Any:
        return self._map(lambda ball: ball.log(), x)

    def sqrt(self, x: Any) -> Any:
        return self._map(lambda ball: ball.sqrt(), x)

    def sigmoid(self, x: Any) -> Any:
        return self._map(lambda ball: 1 / (1 + (-ball).exp()), x)

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        arb = self.flint.arb
        frequencies = [arb(base) ** (-arb(numerator) / denominator) for numerator in numerators]
        angles = np.array([[p * f for f in frequencies] for p in positions.tolist()], dtype=object)
        return self._map(lambda ball: ball.cos(), angles), self._map(lambda ball: ball.sin(), angles)

    def top_k(self, x: Any, k: int) -> Any:
        return np.argsort(-midpoints(x), axis=-1, kind="stable")[:, :k]

    def _map(self, function: Callable[[Any], Any], x: Any) -> Any:
        return np.frompyfunc(function, 1, 1)(x)

    def _product(self, rows: Any, matrix: Any) -> Any:
        product = self.flint.arb_mat(rows.tolist()) * matrix
        return np.array(product.tolist(), dtype=object).reshape(len(rows), -1)


def midpoints(x: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The midpoints, rounded to float64."""
    return np.asarray(np.frompyfunc(lambda ball: float(ball.mid()), 1, 1)(x), np.float64)


def chooses(logits: Any, ids: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Per token, whether the balls prove that `ids` are the largest logits in falling order.

    Equal logits of radius zero are proven by the tie rule ROUTE-3.   logits: balls [T, E]   ids: [T, k]
    """

    def before(a: Any, i: int, b: Any, j: int) -> bool:
        return bool(a > b) or (i < j and bool(a.is_exact() and b.is_exact() and a == b))

    def row(balls: Any, chosen: list[int]) -> bool:
        rest = [e for e in range(len(balls)) if e not in chosen]
        pairs = [*pairwise(chosen), *((chosen[-1], e) for e in rest)]
        return all(before(balls[i], i, balls[j], j) for i, j in pairs)

    return np.array([row(balls, chosen) for balls, chosen in zip(logits, ids.tolist(), strict=True)])
