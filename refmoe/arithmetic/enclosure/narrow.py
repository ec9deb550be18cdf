# SPDX-License-Identifier: Apache-2.0
"""The right factor of a product whose elements are float32 values: bounds of the sums over terms, mostly in float32.

The midpoint needs binary64, and gives the partial sums as well. The other sums are bounds. They need few digits but
must not be too small. So they are computed in float32, and then increased by the most that this may have lost:

- Each rounding multiplies a term by at least 1 - u. After k roundings, `excess(k)` times the sum covers the loss.
- An operation whose result lies below 2^-126 may return zero, and so may one on such numbers. It loses at most
  `FLUSHED`, or that times the other factor.

Rows of the left factor are first brought to a largest magnitude between 1 and 2 by a power of two. The largest element
of the matrix is of moderate size. So no sum overflows, and what is lost below 2^-126 is negligible.

Columns are taken block after block, so that all arrays made from a block stay in the cache. Only the float32 values are
kept between products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import SLACK, Enclosure
from refmoe.arithmetic.enclosure.matrices import Matrix, Summed, Sums, product_and_path
from refmoe.arithmetic.formats import FLOAT32, OF_DTYPE, Format, nearest, upcast

LARGE = 1 << 18
"""The fewest elements for which sums in float32 save more time than the calls for their bounds take."""
FLUSHED = 2.0**-126
"""The most that an operation in float32 loses below the smallest normal value."""
MODERATE = (2.0**-30, 2.0**30)
"""The least and the most that the largest magnitude of a matrix may be."""
MOST_TERMS = 1 << 20
"""The most terms of a sum in float32. With more, the bounds of its error would be loose."""
ROUNDINGS = 8
"""The most roundings of a term besides those of additions: of two factors, their squares, and their product."""
BLOCK = 1 << 20
"""Elements of a block of columns. Its copies take 16 MiB, which a cache of the third level holds."""
SMALL_BLOCK = 1 << 18
"""Elements of a block where the left factor has few rows. A cache of the second level holds its copies."""
MANY = 32
"""Rows of a left factor from which the products take longer than the preparation of a block."""
TILE = 1 << 16
"""Elements of the product with a block. Several arrays of that size are added to again and again."""
FEWEST = 16
"""Columns with which a product is worth its overhead."""


def matrix_of(rows: Any, held: Format, fewest: int = LARGE) -> Matrix:
    """The matrix [n, m] of stored rows [m, n], as an engine holds them: rounded to nearest once.

    It is a `NarrowMatrix` unless its values, their size or their number are beyond float32, or it has less than
    `fewest` elements. It may refer to `rows`.
    """
    stored = OF_DTYPE.get(rows.dtype)
    if stored is not None and FLOAT32.holds(stored):
        if not held.holds(stored):
            with np.errstate(over="ignore"):
                rows = rows.astype(held.dtype)  # rounds once, because each stored value is a float32
        narrow = upcast(rows, np.dtype(np.float32))
    else:
        wide = nearest(rows, held)
        if not FLOAT32.holds(held):
            return Matrix(Enclosure(wide.T), held)
        narrow = wide.astype(np.float32)
    if narrow.size >= fewest and narrow.shape[1] <= MOST_TERMS:
        ends = [(narrow[part].max(), -narrow[part].min()) for part in _blocks(narrow.shape)]
        most = float(np.max(ends))
        if MODERATE[0] <= most <= MODERATE[1]:  # NaN is no such number
            return NarrowMatrix(narrow, held, most)
    return Matrix(Enclosure(narrow.T), held)


def _blocks(shape: tuple[int, int], rows: int = 1) -> Iterator[slice]:
    """Columns of the matrix that are taken together.   shape: of its transpose   rows: of the left factor"""
    block = BLOCK if rows >= MANY else SMALL_BLOCK
    step = max(FEWEST, min(block // max(shape[1], 1), TILE // max(rows, 1)))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def excess(roundings: int) -> float:
    """The factor from a sum in float32 of numbers from zero up to a bound of the exact sum."""
    return math.exp(roundings * FLOAT32.u * (1 + 2 * FLOAT32.u)) * SLACK


@dataclass(frozen=True)
class Scaled:
    """Rows over powers of two, rounded to float32."""

    rows: Any
    """float32 [l, n]. The largest magnitude of a row is 0 or from 1 to 2, or the row is not finite."""
    power: Any
    """float64 [l, 1], zero for rows of zeros."""

    def squared(self) -> Scaled:
        """The squares of the rows. A row of them has a largest magnitude from 1 to 4."""
        return Scaled(self.rows * self.rows, self.power**2)


def scaled(rows: Any) -> Scaled:
    """Rows of binary64 [l, n], scaled."""
    largest = np.maximum(rows.max(-1, initial=0.0, keepdims=True), -rows.min(-1, initial=0.0, keepdims=True))
    # a divisor that is subnormal would have no inverse
    exponent = np.where(np.isfinite(largest), np.maximum(np.frexp(largest)[1] - 1, -1000), 0)
    narrow = (rows * np.ldexp(1.0, -exponent)).astype(np.float32)
    return Scaled(narrow, np.where(largest == 0, 0.0, np.ldexp(1.0, exponent)))


class NarrowMatrix(Matrix):
    """A `Matrix` [n, m] of float32 values that are known exactly, of moderate size."""

    def __init__(self, rows: Any, held: Format, most: float) -> None:
        """rows: float32 [m, n], the transpose   held: a dtype that holds all elements   most: the largest magnitude"""
        self._rows = rows
        self.radius = self.variance = self.length = None
        self._below: dict[float, Any] = {}
        self._fits: dict[Format, bool] = {held: True}
        self.most = most

    @property
    def columns(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    @property
    def mid(self) -> Any:  # type: ignore[override]
        """The elements in binary64, made anew each time. So are the next ones."""
        return self._rows.T.astype(np.float64)

    @property
    def size(self) -> Any:  # type: ignore[override]
        return np.abs(self.mid)

    @property
    def square(self) -> Any:  # type: ignore[override]
        return self.mid**2

    @property
    def signs(self) -> Any:
        return np.sign(self._rows).T

    def below(self, tiny: float) -> Any:
        return super().below(tiny) if self._least < tiny else None

    @cached_property
    def _least(self) -> float:
        """The smallest magnitude that is not zero, infinite if there is none.

        Without their sign, the bits of float32 values have the order of the values. Zero less 1 is the largest integer.
        """
        least = 2**32 - 1
        for part in _blocks(self._rows.shape):
            bits = self._rows[part].view(np.uint32) & np.uint32(0x7FFFFFFF)
            bits -= np.uint32(1)
            least = min(least, int(bits.min()))
        return float(np.uint32(min(least + 1, 0x7F800000)).view(np.float32))

    def sums(self, x: Enclosure, exact_mid: Any) -> Summed:
        if x.mid.ndim != 2:
            return Matrix(Enclosure(self.mid)).sums(x, exact_mid)
        found = NarrowSums(Left(x), self, exact_mid)
        for columns in _blocks(self._rows.shape, len(x.mid)):
            found.add(self._rows[columns], columns)
        return found


class Left:
    """The left factor of a product, scaled.   x: [l, n]"""

    def __init__(self, x: Enclosure) -> None:
        self.mid = x.mid
        self.values = scaled(x.mid)
        self.endless: dict[str, Any] = {}
        sizes, squares = [Scaled(np.abs(self.values.rows), self.values.power)], [self.values.squared()]
        for name, part, factors in (("radius", x.radius, sizes), ("variance", x.variance, squares)):
            if part is not None:
                part = np.broadcast_to(part, x.shape)
                unknown = ~np.isfinite(part)
                if unknown.any():
                    self.endless[name] = unknown.astype(np.float32)
                    part = np.where(unknown, 0.0, part)
                factors.append(scaled(part))
        self.sizes, self.squares = stacked(sizes), stacked(squares)


def stacked(parts: list[Scaled]) -> Scaled:
    """Several factors of the same shape [l, n] as one of shape [parts, l, n]."""
    return Scaled(np.stack([part.rows for part in parts]), np.stack([part.power for part in parts]))


def _flat(parts: Any) -> Any:
    """[parts, l, n] as rows [parts * l, n], in the same memory."""
    return parts.reshape(-1, parts.shape[-1])


class NarrowSums:
    """The sums of a product, as they were computed. `rows` has the bounds."""

    def __init__(self, left: Left, matrix: NarrowMatrix, exact_mid: Any) -> None:
        self._left, self._most = left, matrix.most
        self._terms, columns = left.mid.shape[1], matrix.columns
        self._exact = exact_mid is not None
        self.mid = exact_mid if self._exact else np.empty((len(left.mid), columns))
        self._sizes, self._squares = (
            np.empty((*part.rows.shape[:2], columns), np.float32) for part in (left.sizes, left.squares)
        )
        self._path = np.empty(self.mid.shape)
        self._endless = {name: np.empty(self.mid.shape, bool) for name in left.endless}

    def add(self, rows: Any, columns: slice) -> None:
        """Compute the sums for these columns.   rows: float32 [columns, n], the transpose of the matrix there"""
        mid, self._path[:, columns] = product_and_path(self._left.mid, rows.astype(np.float64).T)
        if not self._exact:
            self.mid[:, columns] = mid
        made = np.abs(rows)
        np.matmul(_flat(self._left.sizes.rows), made.T, out=_flat(self._sizes)[:, columns])
        np.multiply(rows, rows, out=made)
        np.matmul(_flat(self._left.squares.rows), made.T, out=_flat(self._squares)[:, columns])
        for name, unknown in self._left.endless.items():
            self._endless[name][:, columns] = unknown @ (rows != 0).astype(np.float32).T > 0

    def rows(self, part: slice) -> Sums:
        """The bounds of some rows."""
        n, most, factor = self._terms, self._most, excess(self._terms + ROUNDINGS)
        sizes, squares = (each[:, part].astype(np.float64) for each in (self._sizes, self._squares))
        # the products and additions lose `FLUSHED` each, and so does each factor, times the other one
        sizes = (sizes + n * FLUSHED * (most + 4)) * factor * self._left.sizes.power[:, part]
        squares = (squares + n * FLUSHED * (2 * most**2 + 10)) * factor * self._left.squares.power[:, part]
        return Sums(
            mid=self.mid[part],
            total=sizes[0],
            energy=squares[0],
            path=self._path[part],
            inherited=self._inherited("radius", sizes, part),
            variance=self._inherited("variance", squares, part),
        )

    def _inherited(self, name: str, sums: Any, part: slice) -> Any:
        """The sum that comes from inexact factors, infinite where an infinite one meets an element that is not zero."""
        if len(sums) == 1:
            return 0.0
        return np.where(self._endless[name][part], np.inf, sums[1]) if name in self._endless else sums[1]
