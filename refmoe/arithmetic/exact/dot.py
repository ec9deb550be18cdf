# SPDX-License-Identifier: Apache-2.0
"""Matrix products and sums in float64, each element the correctly rounded value of the exact real sum.

DOT-1  A sum of products is the exact real sum, rounded once to the nearest float64, ties to even. No order, blocking,
       BLAS, thread count or device can change a bit of it. An exactly zero sum is +0.0, and so is an empty one.
DOT-2  A NaN factor, infinity times zero, or infinite terms of both signs give NaN; other infinite terms give their
       infinity. A rounded sum beyond the largest float64 is an infinity; a subnormal one is rounded once.

`slices`, `prepared_weight` and golden/dot.md explain the computation and prove that it meets the definition. Every `@`
and `.sum` below is on slices, hence exact, or on the remainders of slices. The error of the latter is bounded and
counts in the rounding test. The few elements that this does not prove are computed on the host. NumPy's arrays of few
values go to `few` first, which has its own proof. Arrays may be CuPy's: pass the module as `xp`.

Sources: those of `slices.py`; Ziv 1991, "Fast evaluation of elementary mathematical functions with correctly rounded
last bit" (the rounding test); Kulisch 2013, "Computer arithmetic and validity" (the exact accumulator).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact import double_double, few
from refmoe.arithmetic.exact.double_double import two_sum
from refmoe.arithmetic.exact.prepared_weight import PreparedWeight, prepare, slices_for
from refmoe.arithmetic.exact.slices import (
    MOST_BITS,
    PLAIN,
    ROUNDING,
    bits,
    coverage,
    is_safe,
    on_host,
    remainder_bound,
    sigma_above,
    split,
    tame,
    times,
)

__all__ = ["PreparedWeight", "linear", "linear_sliced", "matmul", "prepare", "slice_rows", "slices_for", "sum"]

CHUNK = 1 << 23
"""Elements of the slice products of `linear` that are in memory at a time."""
LITTLE = 2.0**-61
"""The remainder of a row, per unit of its largest magnitude, that leaves about one element in 1000 in doubt."""
MOST_UNSURE = 2.0**-10
"""The share of elements of `linear` in doubt above which a product takes less time than the exact path (measured)."""
SHORT = 128
"""Terms of which an exact sum takes less time by `math.fsum` than by integers (measured)."""
IN_CACHE = 1 << 16
"""Elements of operands that `matmul` and `sum` split at a time on a CPU, so that the temporaries stay in cache."""


@dataclass(frozen=True)
class SlicedRows:
    """Rows [t, n] of inputs in slices, for products with weights that take slices of this number and width."""

    rows: Array
    """Float64 [t, n], unchanged."""
    stack: Array
    """The slices of the safe rows, then what they leave, if it is not zero: [count or count + 1, t, n]."""
    count: int
    """The slices in the stack."""
    top: Array
    """[t, 1]: the largest magnitude of each safe row."""
    left: Array | float
    """[t, 1]: `remainder_bound` of what the slices leave."""
    unsafe: Array | None
    """Booleans [t, 1]: which rows take the exact path; None: none."""

    @property
    def exact(self) -> bool:
        """Whether the slices are all of the rows."""
        return len(self.stack) == self.count

    @property
    def nearly_exact(self) -> bool:
        """Whether the slices leave so little that few elements are in doubt without it. This affects cost only."""
        return bool((self.left <= LITTLE * self.top).all())

    def bound(self, multiplied: bool = True) -> Array:
        """The bound that `settle` takes, per unit of a weight's largest magnitude: [t, 1].

        multiplied: whether the product with what the slices leave is one of the parts. If it is not, and two slices
        are all of a row, the bound is zero.
        """
        n = self.rows.shape[1]
        rounding = n * ROUNDING * self.top
        if multiplied:
            return n * PLAIN * self.left + rounding
        return self.left + (rounding if self.count > 2 else rounding * (self.left > 0))

    def stacked(self, rest: bool) -> Array:
        """The slices one below the other, with what they leave if `rest`: [s t, n]."""
        return self.stack[: self.count + rest].reshape(-1, self.rows.shape[1])


def slice_rows(x: Array, count: int, width: int, xp: Any = np) -> SlicedRows:
    """x: float64 [t, n], neither of them 0   count, width: of the slices"""
    safe, top, unsafe = tame(x, 1, xp)
    stack = xp.empty((count + 1, *x.shape))
    found, rest = split(safe, sigma_above(top, width), width, stack[:-1])
    if rest is not None:
        stack[found] = rest
    left = remainder_bound(rest, 1, xp)
    return SlicedRows(rows=x, stack=stack[: found + (rest is not None)], count=found, top=top, left=left, unsafe=unsafe)


def linear(x: Array, weight: PreparedWeight, xp: Any = np) -> Array:
    """x @ weight.T, by DOT-1 and DOT-2. x: float64 [..., n]   weight: [m, n]   returns: [..., m]"""
    m, n = weight.leading.shape
    if not (x.size and m):
        return xp.zeros((*x.shape[:-1], m))
    if x.ndim != 2:
        return linear(x.reshape(-1, n), weight, xp).reshape(*x.shape[:-1], m)
    if xp is np and (proven := few.linear(x, weight)) is not None:
        return decide(*proven, lambda at: exact_dot(x[at[0]], weight.row(at[1], np)), np)
    step = max(1, CHUNK // (m * weight.count))
    if len(x) <= step:
        return linear_sliced(slice_rows(x, weight.count, weight.width, xp), weight, xp)
    result = xp.empty((len(x), m))
    for start in range(0, len(x), step):
        sliced = slice_rows(x[start : start + step], weight.count, weight.width, xp)
        result[start : start + step] = linear_sliced(sliced, weight, xp)
    return result


def linear_sliced(x: SlicedRows, weight: PreparedWeight, xp: Any = np) -> Array:
    """`linear` of a few rows, with one product of the stacked slices and remainder, which reads the weight once.

    Where the slices hold nearly all of x, the remainder is first bounded and not multiplied.
    x: [t, n], in slices of the weight's count and width   returns: [t, m]
    """
    t, m = len(x.rows), len(weight.leading)
    bounded = not x.exact and weight.holds_inputs and x.nearly_exact
    stacked = x.stacked(rest=not x.exact and not bounded)
    parts = times(stacked, weight.leading, xp).reshape(-1, t, m)
    if x.exact and x.count <= 2:
        value, unsure = settle(parts, None)
    elif bounded:
        value, unsure = settle(parts, x.bound(multiplied=False) * weight.top)
        if unsure is not None and int(unsure.sum()) > MOST_UNSURE * t * m:
            value, unsure = settle([*parts, times(x.stack[-1], weight.leading, xp)], x.bound() * weight.top)
    else:
        value, unsure = settle(parts, x.bound() * weight.top)
    if x.unsafe is not None or weight.remainder is not None or weight.wild:
        unsure = xp.zeros((t, m), dtype=bool) if unsure is None else unsure
        if weight.remainder is not None:
            rows = weight.remainder.rows
            more = [part.reshape(-1, t, len(rows)) for part in weight.remainder.products(stacked, xp)]
            every = [*parts[:, :, rows], *(part for products in more for part in products)]
            few = x.exact and len(every) <= 2
            value[:, rows], doubted = settle(every, None if few else x.bound() * weight.top[rows])
            unsure[:, rows] = False if doubted is None else doubted
        if x.unsafe is not None:
            unsure |= x.unsafe
        for row in weight.wild:
            unsure[:, row] = True
    return decide(value, unsure, lambda at: exact_dot(on_host(x.rows[at[0]]), weight.row(at[1], xp)), xp)


def matmul(a: Array, b: Array, xp: Any = np) -> Array:
    """a @ b, by DOT-1 and DOT-2. a: float64 [..., m, n]   b: float64 [..., n, p]   returns: [..., m, p]"""
    lead = a.shape[:-2]
    if b.shape[:-2] != lead:
        lead = np.broadcast_shapes(lead, b.shape[:-2])
        a, b = xp.broadcast_to(a, (*lead, *a.shape[-2:])), xp.broadcast_to(b, (*lead, *b.shape[-2:]))
    if not (a.size and b.size):
        return xp.zeros((*lead, a.shape[-2], b.shape[-1]))
    if xp is np and lead and lead[0] > 1 and a.size + b.size > IN_CACHE:
        step = max(1, IN_CACHE * lead[0] // (a.size + b.size))
        blocks = [slice(start, start + step) for start in range(0, lead[0], step)]
        return np.concatenate([_matmul_block(a[block], b[block], np) for block in blocks])
    return _matmul_block(a, b, xp)


def _matmul_block(a: Array, b: Array, xp: Any) -> Array:
    """`matmul` of operands with equal leading axes.

    With slices a_0, a_1, ... and b_0, b_1, ... of one width, all a_i b_j with i + j = k have one unit. The width leaves
    room to add them exactly.
    """

    def exact(at: tuple[int, ...]) -> float:
        return exact_dot(on_host(a[at[:-1]]), on_host(b[(*at[:-2], slice(None), at[-1])]))

    if xp is np and (proven := few.matmul(a, b)) is not None:
        return decide(*proven, exact, np)
    n = a.shape[-1]
    most = 2
    while most * ((width := (53 - bits(most * n)) // 2) + 1) < coverage(n):
        most += 1
    a_safe, a_top, a_unsafe = tame(a, -1, xp)
    b_safe, b_top, b_unsafe = tame(b, -2, xp)
    a_slices, b_slices = xp.empty((most, *a.shape)), xp.empty((most, *b.shape))
    a_count, a_rest = split(a_safe, sigma_above(a_top, width), width, a_slices)
    b_count, b_rest = split(b_safe, sigma_above(b_top, width), width, b_slices)
    parts = []
    for k in range(a_count + b_count - 1):
        first, last = max(0, k - b_count + 1), min(k, a_count - 1)
        part = a_slices[first] @ b_slices[k - first]
        for i in range(first + 1, last + 1):
            part += a_slices[i] @ b_slices[k - i]
        parts.append(part)
    bound = None
    if a_rest is not None or b_rest is not None or len(parts) > 2:
        a_bound, b_bound = remainder_bound(a_rest, -1, xp), remainder_bound(b_rest, -2, xp)
        bound = n * (PLAIN * a_bound + ROUNDING * a_top) * b_top + (n * PLAIN * b_bound) * a_top
        if a_rest is not None:
            parts.append(a_rest @ b_safe)
        if b_rest is not None:
            parts.append(a_safe @ b_rest)
        if a_rest is not None and b_rest is not None:  # both have counted a_rest @ b_rest
            bound = bound + a_bound * xp.abs(b_rest).max(axis=-2, keepdims=True)
    value, unsure = settle(parts, bound, whole=a_rest is None and b_rest is None)
    if a_unsafe is not None or b_unsafe is not None:
        unsure = xp.zeros(value.shape, dtype=bool) if unsure is None else unsure
        for unsafe in (a_unsafe, b_unsafe):
            unsure |= False if unsafe is None else unsafe
    return decide(value, unsure, exact, xp)


def sum(x: Array, axis: int, xp: Any = np) -> Array:
    """The sum along an axis, by DOT-1 and DOT-2. x: float64 [..., n, ...]   returns: without that axis"""
    axis %= x.ndim
    if not x.size:
        return xp.zeros((*x.shape[:axis], *x.shape[axis + 1 :]))
    if x.ndim == 1:
        return _sum_block(x[None], 1, xp)[0]  # an element that is not proven is replaced, which needs an array
    if xp is np and axis and x.size > IN_CACHE and len(x) > 1:
        step = max(1, IN_CACHE * len(x) // x.size)
        return np.concatenate([_sum_block(x[start : start + step], axis, np) for start in range(0, len(x), step)])
    return _sum_block(x, axis, xp)


def _sum_block(x: Array, axis: int, xp: Any) -> Array:
    n = x.shape[axis]

    def exact(at: tuple[int, ...]) -> float:
        return exact_dot(on_host(xp.moveaxis(x, axis, -1)[at]), np.ones(n))

    if xp is np and (proven := few.sum(x, axis)) is not None:
        return decide(*proven, exact, np)
    width = min(53 - bits(n), MOST_BITS)
    safe, top, unsafe = tame(x, axis, xp)
    stack = xp.empty((2, *x.shape))  # nearly always two slices hold all of x, and then no rounding test is needed
    count, rest = split(safe, sigma_above(top, width), width, stack)
    parts = [piece.sum(axis=axis) for piece in stack[:count]]
    bound = None
    if count > 2 or rest is not None:
        bound = n * (PLAIN * remainder_bound(rest, axis, xp) + ROUNDING * top).squeeze(axis)
        parts += [] if rest is None else [rest.sum(axis=axis)]
    value, unsure = settle(parts, bound)
    if unsafe is not None:
        unsafe = unsafe.squeeze(axis)
        unsure = unsafe if unsure is None else unsure | unsafe
    return decide(value, unsure, exact, xp)


def settle(parts: Sequence[Array], bound: Array | None, whole: bool = False) -> tuple[Array, Array | None]:
    """The rounded sum of the parts, and where this rounding is not proven (None: it is proven everywhere).

    parts: exact float64 arrays of one shape, largest first
    bound: at least |exact value - exact sum of the parts| plus the roundings in this function; None where the exact
        value is the sum of at most two parts
    whole: whether the exact value is the exact sum of the parts, so that a tie can be proven
    """
    if bound is None:
        value = parts[0] + (parts[1] if len(parts) == 2 else 0.0)
        value += 0.0  # an exactly zero sum is +0.0
        return value, None
    high, low = parts[-1], None
    for part in reversed(parts[:-1]):
        high, error = two_sum(part, high)
        low = error if low is None else low + error
    low = 0.0 if low is None else low
    value = high + (low - bound)
    unsure = value != high + (low + bound)
    if whole and unsure.any():
        at = unsure.nonzero()
        sums, proven = _sum_of_few([part[at] for part in parts])
        value[at] = sums  # the elements that are not proven are replaced anyway
        unsure[at] = ~proven
    value += 0.0
    return value, unsure


def _sum_of_few(parts: Sequence[Array]) -> tuple[Array, Array]:
    """The sum of the parts as one addition of two float64s, and where these two are exactly that sum."""
    high, low = parts[-1], parts[-1] * 0.0
    proven = low == 0
    for part in reversed(parts[:-1]):
        high, error = two_sum(part, high)
        low, slip = two_sum(low, error)
        proven &= slip == 0
    return high + low, proven


def decide(value: Array, unsure: Array | None, exact: Callable[[tuple[int, ...]], float], xp: Any) -> Array:
    """`value`, in which `exact` of its index has replaced each element that is not proven."""
    if unsure is not None and unsure.any():
        index = xp.nonzero(unsure)
        value[index] = xp.asarray([exact(at) for at in zip(*(i.tolist() for i in index), strict=True)])
    return value


def exact_dot(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The correctly rounded value of the exact sum of a[i] * b[i]: of few terms by `math.fsum`, else by integers.

    a, b: float64 [n], any values   returns: NaN, an infinity or the sum rounded once, half to even; +0.0 if exactly 0
    """
    if len(a) <= SHORT and (found := _short_dot(a, b)) is not None:
        return found
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return _not_finite(a, b)
    terms = (a != 0) & (b != 0)
    if not terms.any():
        return 0.0
    (a, a_exponent), (b, b_exponent) = np.frexp(a[terms]), np.frexp(b[terms])
    exponent = a_exponent.astype(np.int64) + b_exponent
    least = int(exponent.min())
    # 53-bit integers as halves of 26 and 27 bits, and their products as four digits of base 2^27, each below 2^29
    half, mask = 27, (1 << 27) - 1
    whole_a, whole_b = np.ldexp(a, 53).astype(np.int64), np.ldexp(b, 53).astype(np.int64)
    (high_a, low_a), (high_b, low_b) = (whole_a >> half, whole_a & mask), (whole_b >> half, whole_b & mask)
    high, middle, low = high_a * high_b, high_a * low_b + low_a * high_b, low_a * low_b
    digits = (low & mask, (low >> half) + (middle & mask), (middle >> half) + (high & mask), high >> half)
    total = 0
    for place, digit in enumerate(digits):
        # sums of fewer than 2^24 such digits are exact in float64
        for start in range(0, len(digit), 1 << 23):
            block = slice(start, start + (1 << 23))
            by_exponent = np.bincount(exponent[block] - least, weights=digit[block])
            for shift in np.flatnonzero(by_exponent).tolist():
                total += int(by_exponent[shift]) << (shift + half * place)
    return _rounded(total, least - 106)


def _short_dot(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    """`exact_dot` of safe elements, else None: the rounded sum of the products of their halves, which are exact."""
    both = np.array([a, b])
    if not is_safe(np.abs(both)).all():
        return None
    halves = np.array(double_double.split(both))  # of 26 bits: [the half, the factor, n]
    return math.fsum((halves[:, None, 0] * halves[:, 1]).ravel().tolist())


def _not_finite(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The IEEE value of a sum of products with a NaN or an infinity among the factors."""
    infinite = np.isinf(a) | np.isinf(b)
    signs = np.sign(a[infinite]) * np.sign(b[infinite])
    if np.isnan(a).any() or np.isnan(b).any() or signs.min() != signs.max() or not signs[0]:
        return float("nan")
    return float(signs[0]) * float("inf")


def _rounded(total: int, exponent: int) -> float:
    """total * 2^exponent to the nearest float64, ties to even; beyond the largest, an infinity."""
    try:
        return float(total << exponent) if exponent >= 0 else total / (1 << -exponent)
    except OverflowError:
        return float("inf") if total > 0 else float("-inf")
