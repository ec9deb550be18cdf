# SPDX-License-Identifier: Apache-2.0
"""The results of `dot` on few values, proven in few calls, because there a call takes longer than its work.

A function returns a value and where it is not proven, which `dot` decides (None: it is proven everywhere). It returns
None alone where more than `MOST_UNSURE` elements are not proven, or can be expected not to be: `dot` has another path.

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
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact.prepared_weight import PreparedWeight
from refmoe.arithmetic.exact.slices import LARGEST, MOST_BITS, SMALLEST, bits

DOUBT = 2.0**-60
"""The bounds of all elements together, per unit of X, above which the proof is not tried: it would fail too often."""
MOST_UNSURE = 4
"""Elements up to which it takes less time to compute each exactly than to take the other path (measured)."""
REMEMBERED = 1 << 16
"""Bytes of inputs at most that are kept with their slices."""
ZERO = np.asarray(0.0)

Proven: TypeAlias = tuple[Array, Array | None]
"""Values, and booleans of the same shape: where they are not proven. None: nowhere."""


class Sliced(NamedTuple):
    """Rows [t, n] of a magnitude below 2^e."""

    parts: Array
    """Float64 [2 t, n]: a slice of the rows, and below it what it leaves."""
    e: int
    whole: bool
    """Whether what the slice leaves is a slice of the same width."""


_latest: list[tuple[Any, Sliced]] = []
"""The arguments of the last call of `sliced` that have been kept, and its result. Threads may share it."""


@lru_cache(1 << 10)
def bound_per_unit(n: int, width: int) -> float:
    """The bound of `rounded` for sums of n terms and slices of this width, per unit of X."""
    return math.ldexp(n * (n + 2) * (1 + 2.0**-8), -53 - width)


def top_of(size: Array) -> tuple[float, int]:
    """The largest of an array of magnitudes, and its e; zeros where it is not in the safe range, or NaN."""
    top = size.item(size.argmax())
    return (top, math.frexp(top)[1]) if SMALLEST <= top < LARGEST else (0.0, 0)


@lru_cache(1 << 10)
def sigma_above(e: int, width: int) -> Array:
    """The sigma that extracts slices of this width from values below 2^e. It has no dimension."""
    return np.asarray(math.ldexp(1.5, e + 52 - width))  # takes less time than a float with arrays


@lru_cache(1 << 6)
def ones(n: int) -> Array:
    return np.ones(n)


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


def sliced(x: Array, width: int) -> Sliced | None:
    """Rows in slices, or None if they are not safe. Several products in turn often have the same input. x: [t, n]"""
    key = (width, x.shape, x.tobytes()) if x.nbytes <= REMEMBERED else None
    if key and _latest and (latest := _latest[0])[0] == key:
        return latest[1]
    t, n = x.shape
    size = np.abs(x)
    top, e = top_of(size)
    if not top:
        return None
    parts = np.empty((2 * t, n))
    _, rest = slice_of(x, sigma_above(e, width), parts[:t], parts[t:])
    # the last bit of such an element is at least the unit of the second slice
    whole = size.item(size.argmin()) >= math.ldexp(1.0, e + 51 - 2 * width) or is_slice(rest, e, width)
    made = Sliced(parts, e, whole)
    if key:
        _latest[:] = [(key, made)]
    return made


def rounded(high: Array, low: Array, bound: float) -> Proven | None:
    """high + low, rounded, and where this is not proven to be the rounded exact value. One shape.

    bound: on what `low` lacks; 0.0 where both are exact, so that one addition rounds once
    """
    if not bound:
        value = high + low
        value += ZERO  # an exactly zero sum is +0.0
        return value, None
    margin = np.asarray(bound)
    value = low - margin
    value += high
    other = low + margin
    other += high
    if value.tobytes() == other.tobytes():
        return value, None
    unsure = value != other
    return (value, unsure) if np.count_nonzero(unsure) <= MOST_UNSURE else None


def linear(x: Array, weight: PreparedWeight) -> Proven | None:
    """x @ weight.T. x: float64 [t, n], neither of them 0   weight: [m, n]   returns: [t, m]"""
    t, n = x.shape
    bound = bound_per_unit(n, weight.width)
    if bound * t * len(weight.leading) > DOUBT or not weight.plain_top:
        return None
    split = sliced(x, weight.width)
    if split is None:
        return None
    products = split.parts @ weight.leading.T
    bound = 0.0 if split.whole else bound * math.ldexp(weight.plain_top, split.e - 1)
    return rounded(products[:t], products[t:], bound)


def matmul(a: Array, b: Array) -> Proven | None:
    """a @ b. a: float64 [..., m, n]   b: float64 [..., n, p]   returns: [..., m, p], not empty"""
    n, p = b.shape[-2:]
    width = (53 - bits(n)) // 2
    bound = bound_per_unit(n, width)
    if bound * (a.size // n * p) > DOUBT:
        return None
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)  # each operation below takes less time
    (a_top, a_e), (b_top, b_e) = top_of(np.abs(a)), top_of(np.abs(b))
    if not (a_top and b_top):
        return None
    a_slice, a_rest = slice_of(a, sigma_above(a_e, width))
    b_slice, b_rest = slice_of(b, sigma_above(b_e, width))
    low = a_rest @ b
    low += a_slice @ b_rest
    return rounded(a_slice @ b_slice, low, bound * (math.ldexp(b_top, a_e - 1) + math.ldexp(a_top, b_e - 1)))


def sum(x: Array, axis: int) -> Proven | None:
    """The sum along an axis. x: float64 [..., n, ...], not empty   returns: without that axis"""
    n = x.shape[axis]
    width = min(53 - bits(n), MOST_BITS)
    bound = bound_per_unit(n, width)
    if bound * (x.size // n) > DOUBT:
        return None
    top, e = top_of(np.abs(x))
    if not top:
        return None
    if n <= 2:
        first, last = (x[(slice(None),) * axis + (at,)] for at in (0, -1))
        return rounded(first, last if n == 2 else 0.0, 0.0)
    parts = np.empty((2, *x.shape))
    _, rest = slice_of(x, sigma_above(e, width), parts[0], parts[1])
    bound = 0.0 if is_slice(rest, e, width) else math.ldexp(bound, e - 1)
    # a product with ones takes half the time of a sum
    sums = parts.dot(ones(n)) if axis == x.ndim - 1 else np.add.reduce(parts, axis + 1)
    return rounded(sums[0], sums[1], bound)
