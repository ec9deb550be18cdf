# SPDX-License-Identifier: Apache-2.0
"""Weights split into slices once, for many products.

`slices` defines a slice and explains why products of slices sum exactly; golden/dot.md has the proofs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, Grid
from refmoe.arithmetic.exact.slices import (
    NEGLIGIBLE,
    SAFE_EXPONENTS,
    all_safe,
    bits,
    is_safe,
    on_host,
    sigma_above,
    split,
    tame,
    times,
    width_of,
)
from refmoe.arithmetic.formats import upcast

BLOCK = 1 << 15
"""Elements of a weight prepared at a time: few enough that the temporaries stay in the second-level cache."""
WIDEST = 44
"""Bits of a slice of inputs at most, so that the unit of a second one is within the range of golden/dot.md."""
HOLDS = 62
"""Bits of two slices from which on they nearly always hold a float64, or leave too little to change a rounding."""
SAMPLE = 16
"""Rows of a weight that decide into how many slices its inputs are split. This affects cost only."""
GATHER_COST = 40
"""Cost of a gathered product, relative to one inside a matrix product (measured). This affects cost only."""
MOST_PARTS = 6
"""Slices of a weight's remainder at most. A row with a longer remainder (only in float64) takes the exact path."""


@dataclass(frozen=True)
class Remainder:
    """A weight less its leading slice, for the r rows where the difference is not zero."""

    rows: Array
    """Integers [r]: which rows of the weight."""
    columns: Array | None
    """Integers [k, r]: the columns of the nonzero elements, k per row; None where the parts are whole rows."""
    parts: tuple[Array, ...]
    """Slices that sum to the remainder exactly: each [r, n], or each [k, r] at `columns`."""

    def products(self, x: Array, xp: Any) -> list[Array]:
        """One exact product [t, r] per part. x: slices [t, n]"""
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
        """The remainder of one row of the weight: [n], exact, as it consists of bits of a float64."""
        values = xp.zeros(n)
        for at in xp.nonzero(self.rows == index)[0].tolist():
            for part in self.parts:
                if self.columns is None:
                    values += part[at]
                else:
                    for column, value in zip(self.columns[:, at], part[:, at], strict=True):
                        values[column] += value  # one by one, because a padded slot repeats column 0
        return values


@dataclass(frozen=True)
class PreparedWeight:
    """A matrix [m, n] in the form that `dot.linear` takes."""

    leading: Array
    """Float64 [m, n]: the leading slice."""
    top: Array
    """[m]: the largest magnitude of each row."""
    width: int
    """Bits of the slices of inputs, such that products with `leading` sum exactly."""
    count: int
    """The number of slices of inputs."""
    remainder: Remainder | None = None
    wild: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    """The unchanged rows that take the exact path, by index."""

    @property
    def holds_inputs(self) -> bool:
        """Whether the slices of an input leave so little of it that the product with the rest is seldom needed."""
        return self.remainder is None and self.count * (self.width + 1) >= HOLDS

    @cached_property
    def plain_top(self) -> float:
        """The largest magnitude, where the leading slice is all of the weight; else 0.0."""
        return 0.0 if self.remainder is not None or self.wild else float(self.top.max())

    @property
    def nbytes(self) -> int:
        rest = () if self.remainder is None else (self.remainder.rows, self.remainder.columns, *self.remainder.parts)
        arrays = (self.leading, self.top, *self.wild.values(), *rest)
        return sum(array.nbytes for array in arrays if array is not None)

    def row(self, index: int, xp: Any) -> np.ndarray[Any, Any]:
        """One row of the weight, exact: [n] on the host."""
        if index in self.wild:
            return self.wild[index]
        row = self.leading[index]
        return on_host(row if self.remainder is None else row + self.remainder.row(index, len(row), xp))


def row_sigma(sums: Array, n: int, width: int) -> Array:
    """The sigma that extracts the leading slice of rows, for inputs with slices of `width` bits.

    The unit of a row is 2^(e + width - 53), where 2^e is above the row's sum of magnitudes. It leaves room for the
    roundings to that unit and in the sum (golden/dot.md).

    sums: [m, 1], the computed sums of magnitudes of safe rows of n elements   returns: [m, 1]
    """
    return sigma_above(sums * (1 + math.ldexp(n, width - 52)), 53 - width)


def take_leading(weight: Array, width: int, xp: Any) -> tuple[Array, Array]:
    """The leading slice of safe rows, for inputs with slices of `width` bits, and the remainder.

    weight: [m, n]   returns: twice [m, n]
    """
    sigma = row_sigma(xp.abs(weight).sum(axis=1, keepdims=True), weight.shape[1], width)
    leading = (weight + sigma) - sigma
    return leading, weight - leading


def pack(rows: Array, columns: Array, values: Array, n: int, width: int, xp: Any) -> tuple[Remainder, Array]:
    """A remainder from its elements in row-major order, and the rows (integers) that it does not hold completely.

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
        rest = split(rest, sigma_above(top, part_width), part_width, [part])[1]
        parts.append(part)
    if rest is not None:
        left |= rest.any(axis=axis)
    return Remainder(present, where, tuple(parts)), present[left]


def widest(sample: Array, xp: Any) -> int:
    """The greatest width at which the leading slice of some safe rows is all of them. It is below 1 if there is none.

    sample: [m, n]
    """
    n, rows = sample.shape[1], sample[xp.abs(sample).max(axis=1) > 0]
    most = min(WIDEST, 47 - bits(n))  # leaves room for roundings that is less than a 32nd of a row's sum
    if not len(rows):
        return most
    fraction, exponent = xp.frexp(rows)
    whole = (fraction * 2.0**53).astype(np.int64)
    lowest = xp.frexp((whole & -whole).astype(np.float64))[1] + exponent - 54  # the power of two of the last bit set
    unit = xp.where(whole == 0, lowest.max(), lowest).min(axis=1)
    room = xp.abs(rows).sum(axis=1) * (1 + math.ldexp(n, most - 52))
    return min(most, int((unit + 53 - xp.frexp(room)[1]).min()))


def slices_for(grid: Grid, n: int) -> tuple[int, int] | None:
    """The number of slices for inputs, and their width, for rows of n elements on a grid: two that hold nearly all.

    Returns None where two such slices are too wide, or an element or a sum of a row is out of the safe range.
    """
    most = min(WIDEST, 47 - bits(n))
    # n most is above a row's sum of magnitudes; the unit is that of the grid, or finer
    width = min(most, 53 - math.frexp(n * grid.most * (1 + math.ldexp(n, most - 52)))[1])
    safe = SAFE_EXPONENTS.start <= grid.exponent and grid.exponent + grid.most.bit_length() < SAFE_EXPONENTS.stop
    return (2, width) if 2 * (width + 1) >= HOLDS and safe else None


def choose_slices(sample: Array, xp: Any) -> tuple[int, int]:
    """The cheapest number of slices for inputs, and their width, from some safe rows of a weight [m, n].

    Neither affects results. Two slices that are wide enough to hold nearly all of a float64 are cheaper than any
    others: what they leave need not be multiplied.
    """
    n = sample.shape[1]
    width = widest(sample, xp)
    if 2 * (width + 1) >= HOLDS:
        return 2, width
    costs = {}
    for count in range(2, 5):
        width = width_of(count, n)
        if math.ldexp(n, width - 52) > 0.5:
            continue
        rest = take_leading(sample, width, xp)[1]
        rows, columns = xp.nonzero(rest)
        cost = 1.0
        if len(rows):
            remainder, _ = pack(rows, columns, rest[rows, columns], n, width, xp)
            relative = 1.0 if remainder.columns is None else GATHER_COST * len(remainder.columns) / n
            cost += len(remainder.parts) * relative * len(remainder.rows) / len(sample)
        costs[2 + (count + 1) * cost] = count, width  # reading the weight costs about as much as two slices
        if cost == 1.0:
            break
    return costs[min(costs)]


def prepare(stored: np.ndarray[Any, Any], xp: Any = np, grid: Grid | None = None) -> PreparedWeight:
    """Split a weight, once for all its products.

    stored: [m, n] on the host, in bfloat16, float16, float32 or float64   xp: the array module of `dot.linear`
    grid: of its elements, where it is known
    """
    m, n = stored.shape
    known = slices_for(grid, n) if grid is not None and stored.size else None
    if grid is not None and known is not None:
        count, width = known
        top = xp.zeros(m) + math.ldexp(grid.most, grid.exponent)
        return PreparedWeight(
            leading=xp.asarray(upcast(stored, np.dtype(np.float64))), top=top, width=width, count=count
        )
    leading, top = xp.empty((m, n)), xp.zeros((m, 1))
    if not leading.size:
        return PreparedWeight(leading, top[:, 0], 1, 1)
    chosen = np.linspace(0, m - 1, min(m, SAMPLE)).astype(np.int64)
    count, width = choose_slices(tame(xp.asarray(upcast(stored[chosen], np.dtype(np.float64))), 1, xp)[0], xp)
    wild, found = {}, []
    step = max(1, BLOCK // n)
    scratch = xp.empty((min(step, m), n))
    for start in range(0, m, step):
        block = leading[start : start + step]
        block[:] = xp.asarray(upcast(stored[start : start + step], np.dtype(np.float64)))
        other = np.abs(block, out=scratch[: len(block)])  # NumPy passes this to CuPy for CuPy arrays
        peak = other.max(axis=1, keepdims=True)
        if not all_safe(peak):
            for row in xp.nonzero(~is_safe(peak[:, 0]))[0].tolist():
                wild[start + row] = upcast(stored[start + row], np.dtype(np.float64))
                block[row] = other[row] = peak[row] = 0.0
        top[start : start + step] = peak
        sigma = row_sigma(other.sum(axis=1, keepdims=True), n, width)
        if (sigma == sigma[0]).all():
            sigma = sigma[0, 0]  # NumPy adds a number in less than half the time of a column
        np.add(block, sigma, out=other)
        other -= sigma
        if not (other == block).all():
            block -= other
            rows, columns = xp.nonzero(block)
            found.append((rows + start, columns, block[rows, columns]))
            block[:] = other
    remainder = None
    if found:
        rows, columns, values = (xp.concatenate(part) for part in zip(*found, strict=True))
        remainder, left = pack(rows, columns, values, n, width, xp)
        for row in left.tolist():
            wild[row] = upcast(stored[row], np.dtype(np.float64))
    return PreparedWeight(leading=leading, top=top[:, 0], width=width, count=count, remainder=remainder, wild=wild)
