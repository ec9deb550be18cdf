# SPDX-License-Identifier: Apache-2.0
"""The results of `dot` on few values, proven in few calls, because there a call takes longer than its work.

A function returns None where the proof fails for any element, or can be expected to. Then `dot` takes its own path.

One sigma splits a whole operand x of magnitude top, 2^(e-1) <= top < 2^e: x = slice + rest, |rest| <= 2^(e-1-width)
(golden/dot.md). Products and sums of slices are exact: `high`. The others are ordinary: `low`. With u = 2^-53, a sum of
n products, in any order, with or without fused operations, errs by at most n u (1 + n u) times the sum of their
magnitudes. That sum is at most n 2^-width X:

- X = 2^(e-1) for a sum, 2^(e-1) top_w for `linear` with weights of magnitude top_w, and
- X = 2^(e_a-1) top_b + top_a (1 + 2^-width) 2^(e_b-1) for `matmul`, whose two rests are multiplied and then added.

So in units of u 2^-width X, `low` errs by n^2 (1 + n u), and by n more where two products are added. `rounded`
subtracts and adds a bound, which errs by u |low|, at most n of these units, and by u times the bound. The bound is
n (n + 2) of them, and a 2^8th more. That covers (1 + n u), 2^-width, u bound and underflow. Then fl(low - bound) and
fl(low + bound) enclose what `high` lacks, and where both give one rounded sum, it is the result. As the bound is not
zero, it is not -0.0.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact.prepared_weight import PreparedWeight
from refmoe.arithmetic.exact.slices import LARGEST, MOST_BITS, SMALLEST, bits

DOUBT = 2.0**-60
"""The bounds of all elements together, per unit of X, above which the proof is not tried: it would fail too often."""
ZERO = np.asarray(0.0)


@lru_cache(1 << 10)
def bound_per_unit(n: int, width: int) -> float:
    """The bound of `rounded` for sums of n terms and slices of this width, per unit of X."""
    return math.ldexp(n * (n + 2) * (1 + 2.0**-8), -53 - width)


def largest(x: Array) -> tuple[float, int]:
    """The largest magnitude of an array with elements, and its e; zeros where it is not in the safe range, or NaN."""
    size = np.abs(x)
    top = size.item(size.argmax())
    return (top, math.frexp(top)[1]) if SMALLEST <= top < LARGEST else (0.0, 0)


@lru_cache(1 << 10)
def sigma_above(e: int, width: int) -> Array:
    """The sigma that extracts slices of this width from values below 2^e. It has no dimension."""
    return np.asarray(math.ldexp(1.5, e + 52 - width))  # takes less time than a float with arrays


def slice_of(x: Array, sigma: Array, piece: Array | None = None, rest: Array | None = None) -> tuple[Array, Array]:
    """The slice of an array and what it leaves, written to `piece` and `rest` where they are given. One shape."""
    piece = np.add(x, sigma, piece)
    piece -= sigma
    return piece, np.subtract(x, piece, rest)


def is_slice(rest: Array, e: int, width: int) -> bool:
    """Whether what a slice of values below 2^e leaves is a slice of the same width."""
    sigma = sigma_above(e - 1 - width, width)
    piece = rest + sigma
    piece -= sigma
    return bool(piece.tobytes() == rest.tobytes())


def rounded(high: Array, low: Array, bound: float) -> Array | None:
    """high + low, rounded, if this is proven for every element to be the rounded exact value. One shape.

    bound: on what `low` lacks; 0.0 where both are exact, so that one addition rounds once
    """
    if not bound:
        value = high + low
        value += ZERO  # an exactly zero sum is +0.0
        return value
    margin = np.asarray(bound)
    value = low - margin
    value += high
    other = low + margin
    other += high
    return value if value.tobytes() == other.tobytes() else None


def linear(x: Array, weight: PreparedWeight) -> Array | None:
    """x @ weight.T. x: float64 [t, n], neither of them 0   weight: [m, n]   returns: [t, m]"""
    t, n = x.shape
    width = weight.width
    bound = bound_per_unit(n, width)
    if bound * t * len(weight.leading) > DOUBT or not weight.plain_top:
        return None
    top, e = largest(x)
    if not top:
        return None
    parts = np.empty((2 * t, n))
    _, rest = slice_of(x, sigma_above(e, width), parts[:t], parts[t:])
    products = parts @ weight.leading.T
    bound = 0.0 if is_slice(rest, e, width) else bound * math.ldexp(weight.plain_top, e - 1)
    return rounded(products[:t], products[t:], bound)


def matmul(a: Array, b: Array) -> Array | None:
    """a @ b. a: float64 [..., m, n]   b: float64 [..., n, p]   returns: [..., m, p], not empty"""
    n, p = b.shape[-2:]
    width = (53 - bits(n)) // 2
    bound = bound_per_unit(n, width)
    if bound * (a.size // n * p) > DOUBT:
        return None
    (a_top, a_e), (b_top, b_e) = largest(a), largest(b)
    if not (a_top and b_top):
        return None
    a_slice, a_rest = slice_of(a, sigma_above(a_e, width))
    b_slice, b_rest = slice_of(b, sigma_above(b_e, width))
    low = a_rest @ b
    low += a_slice @ b_rest
    return rounded(a_slice @ b_slice, low, bound * (math.ldexp(b_top, a_e - 1) + math.ldexp(a_top, b_e - 1)))


def sum(x: Array, axis: int) -> Array | None:
    """The sum along an axis. x: float64 [..., n, ...], not empty   returns: without that axis"""
    n = x.shape[axis]
    width = min(53 - bits(n), MOST_BITS)
    bound = bound_per_unit(n, width)
    if bound * (x.size // n) > DOUBT:
        return None
    top, e = largest(x)
    if not top:
        return None
    if n <= 2:
        first, last = (x[(slice(None),) * axis + (at,)] for at in (0, -1))
        return rounded(first, last if n == 2 else 0.0, 0.0)
    piece, rest = slice_of(x, sigma_above(e, width))
    bound = 0.0 if is_slice(rest, e, width) else math.ldexp(bound, e - 1)
    return rounded(np.add.reduce(piece, axis), np.add.reduce(rest, axis), bound)
