# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that proves, sum by sum, that float32 gets it exactly in any order, or adds in an order of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.native.ops import NativeOps

EXACT_IN_FLOAT32 = 2.0**24
"""Integers up to here are float32 numbers, and so are they times a power of two."""


def lowest_bits(x: Any) -> Any:
    """The value of the lowest bit set of each number; infinity for zero. x: float64"""
    mantissa, exponent = np.frexp(np.abs(x))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = np.ldexp((whole & -whole).astype(np.float64), exponent - 53)
    return np.where(x == 0, np.inf, lowest)


class ProvingOps(NativeOps):
    """float64, refusing a sum of which some partial sum, in some order, might not be a float32 number.

    All terms are multiples of the lowest bit of any, and no partial sum exceeds the sum of magnitudes: if that is at
    most 2^24 times the lowest bit, every partial sum in every order is an integer of 24 bits times a power of two.
    """

    def __init__(self, tap: Any = None) -> None:
        super().__init__(np.float64, tap)
        self.sums: list[int] = []
        """How many sums each operation made."""

    def linear(self, x: Any, weight: Any) -> Any:
        return self._added(x[..., None, :] * np.asarray(weight.read(), np.float64))

    def matmul(self, a: Any, b: Any) -> Any:
        return self._added(a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :])

    def sum(self, x: Any, axis: int) -> Any:
        return self._added(np.moveaxis(x, axis, -1))

    def _added(self, terms: Any) -> Any:
        """terms: exact products of numbers of few bits [..., n]   returns: [...]"""
        size = np.abs(terms).sum(axis=-1)
        assert (size <= EXACT_IN_FLOAT32 * lowest_bits(terms).min(axis=-1, initial=np.inf)).all()
        self.sums.append(size.size)
        return terms.sum(axis=-1)


class OrderedOps(NativeOps):
    """float32, every sum added one term at a time in an order drawn from a seed."""

    def __init__(self, seed: int, tap: Any = None) -> None:
        super().__init__(np.float32, tap)
        self.rng = np.random.default_rng(seed)

    def linear(self, x: Any, weight: Any) -> Any:
        return self._added(x[..., None, :] * np.asarray(weight.read(), np.float32))

    def matmul(self, a: Any, b: Any) -> Any:
        return self._added(a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :])

    def sum(self, x: Any, axis: int) -> Any:
        return self._added(np.moveaxis(x, axis, -1))

    def _added(self, terms: Any) -> Any:
        assert terms.dtype == np.float32
        total = np.zeros(terms.shape[:-1], np.float32)
        for j in self.rng.permutation(terms.shape[-1]):
            total = total + terms[..., j]
        return total
