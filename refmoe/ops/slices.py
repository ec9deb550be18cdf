"""Splitting float64 arrays into slices whose products sum exactly, and weights split once for many products.

A slice of a row is the row rounded to multiples of a power of two, its unit, and at most 2^width of them in magnitude.
Products of slices are integers times one power of two; while their sum stays within 2^53 of it, every partial sum in
every order is a float64, so a BLAS of any kind, blocking or thread count returns it without a rounding, fused
multiply-adds included. The proofs are in golden/dot.md.

Sources: Rump, Ogita and Oishi 2008, "Accurate floating-point summation part I" (extraction by sigma); Ozaki, Ogita,
Oishi and Rump 2012, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from refmoe.ops.native import upcast

Array: TypeAlias = Any
"""An array of NumPy or CuPy."""

COVERAGE = 67
"""Bits below a row's largest exponent that its slices hold: 53, and 14 for the elements smaller than the largest.

What a row has below is bounded, not dropped, so this decides how often the exact path is taken and nothing else.
"""
MOST_BITS = 50
"""Widest slice: x + sigma must stay in the binade of sigma."""
SMALLEST, LARGEST = 2.0**-400, 2.0**400
"""A row is safe if its largest magnitude is zero or in [SMALLEST, LARGEST).

No sigma or product of safe rows overflows, and the units of all slice products are above 2^-1074.
"""
ROUNDING = 2.0**-90
"""Bound on the roundings inside `settle`, per unit of n * max|a| * max|b|, for up to 42 parts (golden/dot.md)."""
NEGLIGIBLE = 2.0**-500
"""What a nonzero remainder is raised to, so that the product of two bounds does not underflow."""
BLOCK = 1 << 17
"""Elements of a weight prepared at a time: few enough that the temporaries stay in cache."""
SAMPLE = 16
"""Rows of a weight that decide how many slices its inputs are given: a matter of cost only."""
GATHER_COST = 40
"""Cost of a gathered product in units of one inside a matrix product (measured; a matter of cost only)."""
FEW_ROWS = 3
"""Up to so many rows, one product of matrix and vector each is faster than a matrix product."""
MOST_PARTS = 6
"""Slices of a weight's remainder; a row with more left (in float64 alone) takes the exact path."""


def bits(n: int) -> int:
    """ceil(log2 n) for n >= 1: what a sum of n terms adds to their width."""
    return (n - 1).bit_length()


def covering(width: int) -> int:
    """How many slices of this width hold COVERAGE bits; each but the last gives one more bit by its sign."""
    return -(-(COVERAGE + 1) // (width + 1))


def width_of(count: int) -> int:
    """The width at which `count` slices hold COVERAGE bits."""
    return -(-(COVERAGE + 1) // count) - 1


def tame(x: Array, axis: int, xp: Any) -> tuple[Array, Array, Array | None]:
    """x with its unsafe rows replaced by zeros, the largest magnitude of each row, and which rows are unsafe.

    x: [..., n along axis, ...] with n > 0   returns: as x; as x with n = 1; booleans as that, or None if all are safe
    """
    top = xp.abs(x).max(axis=axis, keepdims=True)
    safe = ((top >= SMALLEST) & (top < LARGEST)) | (top == 0)
    if safe.all():
        return x, top, None
    return xp.where(safe, x, 0.0), xp.where(safe, top, 0.0), ~safe


def sigma_above(top: Array, width: int, xp: Any) -> Array:
    """What extracts slices of this width from rows with largest magnitude top < 2^e: 1.5 * 2^(e + 52 - width)."""
    return xp.ldexp(xp.full_like(top, 1.5), xp.frexp(top)[1] + (52 - width))


def split(x: Array, sigma: Array, width: int, slices: Sequence[Array]) -> tuple[int, Array | None]:
    """Write leading slices of x; returns how many were needed and the remainder, None if it is zero.

    x, each of slices: one shape   sigma: `sigma_above` of the rows of x, broadcasting to it
    x == slices[0] + ... + slices[count - 1] + remainder exactly.
    """
    rest = x
    for count, piece in enumerate(slices, 1):
        np.add(rest, sigma, out=piece)  # CuPy arrays take this over
        piece -= sigma
        rest = np.subtract(rest, piece, out=None if rest is x else rest)
        if not rest.any():
            return count, None
        sigma = sigma * 2.0 ** -(width + 1)
    return len(slices), rest


def remainder_bound(rest: Array | None, axis: int, xp: Any) -> Array | float:
    """At least the sum of the magnitudes that the slices left, per row; 0.0 for None."""
    if rest is None:
        return 0.0
    total = xp.abs(rest).sum(axis=axis, keepdims=True)
    return xp.where(total > 0, xp.maximum(2 * total, NEGLIGIBLE), 0.0)


@dataclass(frozen=True)
class Remainder:
    """What the leading slice of a weight left, in the rows where it left anything.

    rows: integers [r]   parts: slices that sum to the remainder exactly, each [r, n], or, where `columns` is integers
    [k, r], each [k, r]: the k elements per row that are not zero
    """

    rows: Array
    columns: Array | None
    parts: tuple[Array, ...]

    def products(self, x: Array, xp: Any) -> list[Array]:
        """x: slices [t, n]   returns: one exact product [t, r] per part"""
        if self.columns is None:
            return [times(x, part, xp) for part in self.parts]
        by_column, totals = xp.ascontiguousarray(x.T), []
        for part in self.parts:
            total = xp.zeros((len(self.rows), len(x)))
            for column, value in zip(self.columns, part, strict=True):
                total += by_column[column] * value[:, None]
            totals.append(total.T)
        return totals

    def row(self, index: int, n: int, xp: Any) -> Array:
        """The remainder of one row of the weight: [n], exact, as it is part of a float64."""
        values = xp.zeros(n)
        for at in xp.nonzero(self.rows == index)[0].tolist():
            for part in self.parts:
                if self.columns is None:
                    values += part[at]
                else:
                    for column, value in zip(self.columns[:, at], part[:, at], strict=True):
                        values[column] += value  # one by one: a padded slot repeats column 0
        return values


@dataclass(frozen=True)
class PreparedWeight:
    """A matrix as `linear` wants it.

    leading: float64 [m, n], its leading slice   top: [m], largest magnitude of each row   width, count: of the slices
    of inputs, such that products with `leading` sum exactly   wild: rows that take the exact path, as they were
    """

    leading: Array
    top: Array
    width: int
    count: int
    remainder: Remainder | None = None
    wild: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        rest = () if self.remainder is None else (self.remainder.rows, self.remainder.columns, *self.remainder.parts)
        arrays = (self.leading, self.top, *self.wild.values(), *rest)
        return sum(array.nbytes for array in arrays if array is not None)

    def row(self, index: int, xp: Any) -> np.ndarray[Any, Any]:
        """One row of the weight, exactly: [n] on the host."""
        if index in self.wild:
            return self.wild[index]
        row = self.leading[index]
        return on_host(row if self.remainder is None else row + self.remainder.row(index, len(row), xp))


def on_host(x: Array) -> np.ndarray[Any, Any]:
    return x.get() if hasattr(x, "get") else np.asarray(x)


def times(x: Array, weight: Array, xp: Any) -> Array:
    """x @ weight.T in row-major order. x: slices [t, n]   weight: slices [m, n]   returns: [t, m], exact"""
    if len(x) <= FEW_ROWS:
        return xp.stack([weight @ row for row in x])
    return xp.ascontiguousarray((weight @ x.T).T)  # this way around OpenBLAS is faster for few rows


def take_leading(weight: Array, width: int, xp: Any) -> tuple[Array, Array]:
    """The leading slice of safe rows, for inputs with slices of `width` bits, and what it leaves.

    The unit of a row is 2^(e + width - 53), where 2^e is above its sum of magnitudes, with room for the roundings to
    that unit and in the sum (golden/dot.md). weight: [m, n]   returns: twice [m, n]
    """
    room = 1 + math.ldexp(weight.shape[1], width - 52)
    sigma = sigma_above(xp.abs(weight).sum(axis=1, keepdims=True) * room, 53 - width, xp)
    leading = (weight + sigma) - sigma
    return leading, weight - leading


def pack(rows: Array, columns: Array, values: Array, n: int, width: int, xp: Any) -> tuple[Remainder, Array]:
    """A remainder from its elements in row-major order; and those of its rows that have still more (integers).

    rows, columns, values: [z], not empty   n: columns of the weight   width: of the slices of inputs
    """
    present, place, counts = xp.unique(rows, return_inverse=True, return_counts=True)
    most = int(counts.max())
    sparse = 2 * GATHER_COST * most <= n
    if sparse:
        slot = xp.arange(len(rows)) - (xp.cumsum(counts) - counts)[place]
        rest, where = xp.zeros((most, len(present))), xp.zeros((most, len(present)), dtype=np.int64)
        rest[slot, place], where[slot, place] = values, columns
    else:
        rest, where = xp.zeros((len(present), n)), None
        rest[place, columns] = values
    axis, part_width = 0 if sparse else 1, 53 - width - bits(most)
    parts: list[Array] = []
    left = xp.zeros(len(present), dtype=bool)
    while rest is not None and len(parts) < MOST_PARTS:
        top = xp.abs(rest).max(axis=axis, keepdims=True)
        left |= ((top > 0) & (top < NEGLIGIBLE)).squeeze(axis)  # products with it may underflow
        part = xp.empty_like(rest)
        rest = split(rest, sigma_above(top, part_width, xp), part_width, [part])[1]
        parts.append(part)
    if rest is not None:
        left |= rest.any(axis=axis)
    return Remainder(present, where, tuple(parts)), present[left]


def choose_count(sample: Array, xp: Any) -> int:
    """How many slices inputs are best given, from some safe rows of a weight [m, n]. Decides cost, not results."""
    n = sample.shape[1]
    costs = {}
    for count in range(2, 7):
        width = width_of(count)
        if math.ldexp(n, width - 52) > 0.5:
            continue
        rest = take_leading(sample, width, xp)[1]
        rows, columns = xp.nonzero(rest)
        cost = 1.0
        if len(rows):
            remainder, _ = pack(rows, columns, rest[rows, columns], n, width, xp)
            relative = 1.0 if remainder.columns is None else GATHER_COST * len(remainder.columns) / n
            cost += len(remainder.parts) * relative * len(remainder.rows) / len(sample)
        costs[2 + count * cost] = count  # reading the weight costs about as much as two slices
        if cost == 1.0:
            break
    return costs[min(costs)]


def prepare(stored: np.ndarray[Any, Any], xp: Any = np) -> PreparedWeight:
    """Split a weight, once for all its products.

    stored: [m, n] on the host, in bfloat16, float16, float32 or float64   xp: where `dot.linear` is to run
    """
    m, n = stored.shape
    leading, top = xp.empty((m, n)), xp.zeros((m, 1))
    if not leading.size:
        return PreparedWeight(leading, top[:, 0], width_of(2), 2)
    chosen = np.linspace(0, m - 1, min(m, SAMPLE)).astype(np.int64)
    count = choose_count(tame(xp.asarray(upcast(stored[chosen], np.dtype(np.float64))), 1, xp)[0], xp)
    wild, found = {}, []
    step = max(1, BLOCK // n)
    for start in range(0, m, step):
        block = xp.asarray(upcast(stored[start : start + step], np.dtype(np.float64)))
        block, top[start : start + step], unsafe = tame(block, 1, xp)
        for row in () if unsafe is None else xp.nonzero(unsafe[:, 0])[0].tolist():
            wild[start + row] = upcast(stored[start + row], np.dtype(np.float64))
        leading[start : start + step], rest = take_leading(block, width_of(count), xp)
        if rest.any():
            rows, columns = xp.nonzero(rest)
            found.append((rows + start, columns, rest[rows, columns]))
    if not found:
        return PreparedWeight(leading, top[:, 0], width_of(count), count, None, wild)
    rows, columns, values = (xp.concatenate(part) for part in zip(*found, strict=True))
    remainder, left = pack(rows, columns, values, n, width_of(count), xp)
    for row in left.tolist():
        wild[row] = upcast(stored[row], np.dtype(np.float64))
    return PreparedWeight(leading, top[:, 0], width_of(count), count, remainder, wild)
