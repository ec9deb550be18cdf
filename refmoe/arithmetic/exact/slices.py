# SPDX-License-Identifier: Apache-2.0
"""Splitting float64 arrays into slices whose products sum exactly.

A slice of a row is the row rounded to multiples of a power of two, its unit. Its elements are at most 2^width units in
magnitude. Products of slices are integers times one power of two. While their sum stays within 2^53 of that power,
every partial sum in every order is a float64. So a BLAS of any kind, blocking or thread count returns it without a
rounding, also with fused multiply-adds. The proofs are in golden/dot.md.

Sources: Rump, Ogita and Oishi 2008, "Accurate floating-point summation part I" (extraction by sigma); Ozaki, Ogita,
Oishi and Rump 2012, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array

MOST_BITS = 50
"""Widest slice: x + sigma must stay in the binade of sigma."""
SAFE_EXPONENTS = range(-400, 400)
SMALLEST, LARGEST = 2.0**SAFE_EXPONENTS.start, 2.0**SAFE_EXPONENTS.stop
"""A row is safe if its largest magnitude is zero or in [SMALLEST, LARGEST).

No sigma or product of safe rows overflows, and the units of all slice products are above 2^-1074.
"""
ROUNDING = 2.0**-90
"""Bound on the roundings inside `settle`, per unit of n * max|a| * max|b|, for up to 42 parts (golden/dot.md)."""
PLAIN = 2.0**-50
"""Bound on the roundings of an ordinary sum, per unit of n and of the sum of its terms' magnitudes (golden/dot.md)."""
NEGLIGIBLE = 2.0**-500
"""The least bound of a nonzero remainder, so that the product of two bounds does not underflow."""
FEW_ROWS = 3
"""Up to this number of rows, one matrix-vector product per row is faster than a matrix product."""

MANY_ROWS = 32
"""From this number of rows on, OpenBLAS is as fast in the order that needs no transposition (measured)."""
EXPONENT = np.int64(0x7FF0000000000000)
"""The bits of a float64 that hold its exponent."""


def bits(n: int) -> int:
    """ceil(log2 n) for n >= 1: the bits by which a sum of n terms is wider than a term."""
    return (n - 1).bit_length()


def coverage(n: int) -> int:
    """How many bits below a row's largest exponent its slices should hold, for sums of n products.

    Lower bits go into an ordinary product, whose rounding error is at most about 2^-48 n^2 2^-coverage of the largest
    possible term: here 2^-68, so that few rounding tests fail. This affects cost, not results.
    """
    return 20 + 2 * bits(n)


def width_of(count: int, n: int) -> int:
    """The width at which `count` slices reach `coverage(n)`. The sign gives each slice one bit more than its width."""
    return -(-coverage(n) // count) - 1


def is_safe(top: Array) -> Array:
    """Which rows are safe, from their largest magnitudes. A NaN is not."""
    return ((top >= SMALLEST) & (top < LARGEST)) | (top == 0)


def all_safe(top: Array) -> bool:
    """Whether all rows are surely safe, from their largest magnitudes."""
    return bool(top.min() >= SMALLEST and top.max() < LARGEST) or bool(is_safe(top).all())


def tame(x: Array, axis: int, xp: Any) -> tuple[Array, Array, Array | None]:
    """x with its unsafe rows replaced by zeros, the largest magnitude of each row, and which rows are unsafe.

    x: [..., n along axis, ...] with n > 0
    returns: an array like x; one with n = 1; booleans with n = 1, or None if all rows are safe
    """
    top = xp.abs(x).max(axis=axis, keepdims=True)
    if all_safe(top):
        return x, top, None
    safe = is_safe(top)
    return xp.where(safe, x, 0.0), xp.where(safe, top, 0.0), ~safe


def sigma_above(top: Array, width: int) -> Array:
    """The sigma that extracts slices of this width from safe rows of magnitude top < 2^e: 1.5 * 2^(e + 52 - width).

    It is 0.0 for a row of zeros.
    """
    return (top.view(np.int64) & EXPONENT).view(np.float64) * math.ldexp(1.5, 53 - width)


def split(x: Array, sigma: Array, width: int, slices: Sequence[Array]) -> tuple[int, Array | None]:
    """Write leading slices of x. Returns the number of slices needed and the remainder, None if it is zero.

    x, each of slices: one shape   sigma: `sigma_above` of the rows of x, which broadcasts to x
    x == slices[0] + ... + slices[count - 1] + remainder exactly.
    """
    rest = x
    for count, piece in enumerate(slices, 1):
        np.add(rest, sigma, out=piece)  # NumPy passes this to CuPy for CuPy arrays
        piece -= sigma
        rest = np.subtract(rest, piece, out=None if rest is x else rest)
        if not rest.any():
            return count, None
        sigma = sigma * 2.0 ** -(width + 1)
    return len(slices), rest


def remainder_bound(rest: Array | None, axis: int, xp: Any) -> Array | float:
    """At least twice the sum of the magnitudes of a remainder, per row; 0.0 for None."""
    if rest is None:
        return 0.0
    total = xp.abs(rest).sum(axis=axis, keepdims=True)
    return xp.where(total > 0, xp.maximum(2 * total, NEGLIGIBLE), 0.0)


def on_host(x: Array) -> np.ndarray[Any, Any]:
    """The array as NumPy's, copied from the device where it is CuPy's."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def times(x: Array, weight: Array, xp: Any) -> Array:
    """x @ weight.T in row-major order. x: slices [t, n]   weight: slices [m, n]   returns: [t, m]"""
    if len(x) <= FEW_ROWS:
        return xp.stack([weight @ row for row in x])
    if len(x) >= MANY_ROWS:
        return x @ weight.T
    return xp.ascontiguousarray((weight @ x.T).T)  # OpenBLAS is faster in this order for few rows
