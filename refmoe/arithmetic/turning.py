# SPDX-License-Identifier: Apache-2.0
"""Rows turned by a Hadamard matrix, as engines turn heads before they make codes of them.

A turn spreads a large value over its block, so that no single value decides the scale. The matrix is Sylvester's with
entries +-1 / sqrt(n). It is symmetric and orthogonal: queries and keys that are both turned have the same products, and
a second turn takes the first one back.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np


def factor(n: int) -> float:
    """1 / sqrt(n) in float32, the magnitude of every entry."""
    return float(np.float32(1 / math.sqrt(n)))


@cache
def matrix(n: int) -> Any:
    """The matrix as engines hold it: binary64 [n, n].   n: a power of two"""
    made = np.ones((1, 1))
    while len(made) < n:
        made = np.block([[made, made], [made, -made]])
    made *= factor(n)
    made.flags.writeable = False
    return made


def turn(x: Any, n: int, dtype: Any) -> Any:
    """Each block of n values turned in log2(n) stages, with one rounding to `dtype` in each.

    Values are scaled first. Stage i adds and subtracts values that are 2^i apart.

    x: [..., m], m whole blocks   n: a power of two   dtype: float32, as engines have it, or float64
    returns: binary64 [..., m]
    """
    rows = x.astype(dtype).reshape(-1, n) * dtype(factor(n))
    apart = 1
    while apart < n:
        parts = rows.reshape(-1, 2, apart)
        rows = np.stack([parts[:, 0] + parts[:, 1], parts[:, 0] - parts[:, 1]], axis=1)
        apart *= 2
    return rows.reshape(x.shape).astype(np.float64)
