# SPDX-License-Identifier: Apache-2.0
"""Sums of products of codes in a coarse accumulator. To import this registers no bug, so a diagnosis may do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import Codes, Factors, InputFormat
from refmoe.arithmetic.formats import FLOAT32, Format, nearest, ulp

TOGETHER = 32
"""The terms whose sum reaches an accumulator at once, as kernels add up integers."""


@dataclass(frozen=True)
class CoarseSums(InputFormat):
    """Codes whose products are added up in another dtype than float32, 32 terms at a time, in order."""

    accumulator: Format = FLOAT32

    def depth(self, terms: int) -> int:
        """In roundings of float32, of which one of the accumulator counts as many."""
        return (-(-terms // TOGETHER) + 2) * int(self.accumulator.u / FLOAT32.u) + super().depth(terms)


def added_up(codes: Codes, groups: int, factors: Factors, how: CoarseSums) -> tuple[Any, Any]:
    """The sums of the products of all blocks and offsets, each partial sum rounded to the accumulator: [t, m].

    returns: the sums, and the variance of their error for any engine that adds up so
    """
    rows, height = len(codes.codes), len(factors.terms)
    left, right = codes.values.reshape(rows, -1, TOGETHER), factors.terms.reshape(height, -1, TOGETHER)
    sums = codes.sums(groups) if groups else np.zeros((rows, 0))
    total = variance = np.zeros((rows, height))
    for step in range(left.shape[1] + sums.shape[1]):
        if step < left.shape[1]:
            term = left[:, step] @ right[:, step].T.astype(np.float64)
        else:
            term = np.outer(sums[:, step - left.shape[1]], factors.offsets[:, step - left.shape[1]])
        total = nearest(total + term, how.accumulator)
        variance = variance + ulp(total, how.accumulator) ** 2 / 12
    return total, variance
