# SPDX-License-Identifier: Apache-2.0
"""The right factor of a product whose elements are float32 values: bounds of the sums over terms, mostly in float32.

The midpoint and its partial sums need binary64. The other sums are bounds. They need few digits but must not be too
small. So they are computed in float32, and then increased by the most that this may have lost:

- Each rounding multiplies a term by at least 1 - u. After k roundings, `excess(k)` times the sum covers the loss.
- An operation whose result lies below 2^-126 may return zero, and so may one on such numbers. It loses at most
  `FLUSHED`, or that times the other factor.

Rows of the left factor are first brought to a largest magnitude between 1 and 2 by a power of two. The largest element
of the matrix is of moderate size. So no sum overflows, and what is lost below 2^-126 is negligible.

Columns are taken block after block, and rows tile after tile, so that all arrays made from them stay in the cache.
Each product is made of products over a part of the terms, which are small. OpenBLAS packs the factors of a larger one
first. With few rows, that takes several times as long as the product. Only the stored values are kept between products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from threading import local
from typing import Any, Protocol
from weakref import ref

import numpy as np

from refmoe.arithmetic.enclosure.array import SLACK, Enclosure, quiet
from refmoe.arithmetic.enclosure.matrices import Matrix, Squared, Squares, Summed, Sums, between, checkpoints
from refmoe.arithmetic.formats import FLOAT32, OF_DTYPE, Format, largest, nearest, representable, upcast

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
BLOCK = 1 << 18
"""Elements of a block of columns. A cache of the second level holds most of its copies."""
TILE = 1 << 12
"""The most elements of the product with a block that are summed at a time, at each checkpoint."""
ROWS = 64
"""The most rows of the left factor in a tile."""
FEWEST = 32
"""The fewest columns of a block. A BLAS without products of small matrices packs the left factor for each block."""
TERMS = 128
"""The fewest terms that are summed apart from others, if nobody asks for their sum. With less, to add up costs most."""
ROOT_OF_HALF = math.nextafter(math.sqrt(0.5), 1.0)
"""Of the square of the last sum, the energy of a path has one half."""
KEPT = 1 << 23
"""The most bytes of an array that a thread keeps for the next block."""


class Rows(Protocol):
    """Stored rows of a matrix that are read a few at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def each(self, use: Callable[[int, Any], None]) -> None:
        """`use` of the number of a row, and of this and the rows after it, until all have been used.

        Several threads may call it.
        """


class NotHeld(Exception):
    """The error for a question about all rows of a matrix at once, where they are not in memory."""


def matrix_of(rows: Any, held: Format, fewest: int = LARGE, most: float | None = None) -> Matrix:
    """The matrix [n, m] of stored rows [m, n], as an engine holds them: rounded to nearest once.

    It is a `NarrowMatrix` unless its values, their size or their number are beyond float32, or it has less than
    `fewest` elements. It may refer to `rows`.

    most: the largest magnitude of the rows, if it is known
    """
    stored = OF_DTYPE.get(rows.dtype)
    if stored is not None and FLOAT32.holds(stored):
        if not held.holds(stored):
            with np.errstate(over="ignore"):
                rows = rows.astype(held.dtype)  # rounds once, because each stored value is a float32
            most = None
        narrow = rows
    else:
        wide = nearest(rows, held)
        if not FLOAT32.holds(held):
            return Matrix(Enclosure(wide.T), held)
        narrow, most = wide.astype(np.float32), None
    if narrow.size >= fewest and narrow.shape[1] <= MOST_TERMS:
        most = largest(narrow) if most is None else most
        if moderate(most):
            return NarrowMatrix(narrow, held, most)
    return Matrix(Enclosure(upcast(narrow, np.dtype(np.float32)).T), held)


def moderate(most: float) -> bool:
    """Whether sums over a matrix with this largest magnitude can be in float32."""
    return MODERATE[0] <= most <= MODERATE[1]  # NaN is no such number


def unread(rows: Rows, held: Format) -> NarrowMatrix | None:
    """The matrix [n, m] of stored rows [m, n] that are read in each pass over them, as an engine holds them.

    None if it is too small or too large for a `NarrowMatrix`, or an engine rounds it.
    """
    stored, (height, width) = OF_DTYPE.get(rows.dtype), rows.shape
    if stored is None or not (FLOAT32.holds(stored) and held.holds(stored)):
        return None
    return NarrowMatrix(rows, held) if height * width >= LARGE and width <= MOST_TERMS else None


def _blocks(shape: tuple[int, int], rows: int = 1) -> Iterator[slice]:
    """Columns of the matrix that are taken together.   shape: of its transpose   rows: of the left factor"""
    step = min(max(BLOCK // max(shape[1], 1), FEWEST), TILE // max(min(rows, ROWS), 1))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _tiles(rows: int) -> Iterator[slice]:
    """Rows of the left factor that are taken together, in tiles of about the same size."""
    count = -(-rows // ROWS)
    return (slice(rows * i // count, rows * (i + 1) // count) for i in range(count))


@cache
def parts_of(n: int) -> int:
    """The number of parts of the same size, of `TERMS` terms or more if there are as many, into which n are divided."""
    count = len(checkpoints(n))
    while count > 1 and (n % count or n // count < TERMS):
        count //= 2
    return count


class _Scratch(local):
    """Arrays that a thread fills again and again. New ones would be mapped anew each time, page after page."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array with the values that it happens to have. The next one of this name takes its memory."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = np.empty(size, np.uint8)
            if size <= KEPT:
                self._held[name] = held
        return held[:size].view(dtype).reshape(shape)


_scratch = _Scratch()


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


def scaled(rows: Any) -> Scaled:
    """Rows of binary64 [l, n], scaled."""
    largest = np.maximum(rows.max(-1, initial=0.0, keepdims=True), -rows.min(-1, initial=0.0, keepdims=True))
    # a divisor that is subnormal would have no inverse
    exponent = np.where(np.isfinite(largest), np.maximum(np.frexp(largest)[1] - 1, -1000), 0)
    narrow = (rows * np.ldexp(1.0, -exponent)).astype(np.float32)
    return Scaled(narrow, np.where(largest == 0, 0.0, np.ldexp(1.0, exponent)))


class NarrowMatrix(Matrix):
    """A `Matrix` [n, m] of float32 values that are known exactly, of moderate size.

    Its rows may be read anew in each pass over them. Then what needs all of them at once raises NotHeld.
    """

    def __init__(self, rows: Any, held: Format, most: float = math.nan) -> None:
        """rows: the transpose [m, n], as stored: an array, or `Rows`   held: a dtype that holds all of it

        most: the largest magnitude. Where it is not given, the first pass over the rows finds it.
        """
        self._rows = rows
        self.radius = self.variance = self.length = None
        self._below: dict[float, Any] = {}
        self._fits: dict[Format, bool] = {held: True}
        self.most = most

    @property
    def columns(self) -> int:
        return int(self._rows.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    @property
    def mid(self) -> Any:  # type: ignore[override]
        """The elements in binary64, made anew each time. So are the next ones."""
        return upcast(self._whole, np.dtype(np.float64)).T

    @property
    def size(self) -> Any:  # type: ignore[override]
        return np.abs(self.mid)

    @property
    def square(self) -> Any:  # type: ignore[override]
        return self.mid**2

    @property
    def signs(self) -> Any:
        return signs_of(self._whole).astype(np.float32).T

    @property
    def _held(self) -> bool:
        """Whether all rows are in memory."""
        return isinstance(self._rows, np.ndarray)

    @property
    def _whole(self) -> Any:
        """All rows. Raises NotHeld where they are not in memory."""
        if self._held:
            return self._rows
        raise NotHeld

    def _each(self, rows: int, use: Callable[[slice, Any], None]) -> None:
        """`use` of blocks of columns, and of the stored rows there. Several threads may call it.

        rows: of the left factor.   Raises NotHeld where the largest magnitude turns out not to be moderate.
        """

        def in_blocks(first: int, stored: Any) -> None:
            for part in _blocks(stored.shape, rows):
                use(slice(first + part.start, first + part.stop), stored[part])

        if self._held:
            in_blocks(0, self._rows)
            return
        found = [] if math.isnan(self.most) else [self.most]

        @quiet  # in the thread that calls it
        def measured(first: int, stored: Any) -> None:
            if math.isnan(self.most):
                found.append(largest(stored))
            in_blocks(first, stored)

        self._rows.each(measured)
        self.most = float(np.max(found))
        if not moderate(self.most):
            raise NotHeld

    def one_way(self, x: Enclosure) -> Any:
        if x.mid.ndim != 2:
            return super().one_way(x)
        left = left_of(x)
        surplus = np.empty((left.rows, self.columns), np.float32)

        def add(columns: slice, stored: Any) -> None:
            made = _scratch.array("float32", stored.shape, np.float32)
            np.copyto(made, signs_of(stored))
            for tile, signs in zip(left.tiles, left.signs, strict=True):
                np.abs(summed(made, signs), out=surplus[tile.part, columns])

        self._each(left.rows, add)
        return surplus

    def fits(self, format: Format) -> bool:
        if format not in self._fits:
            found: list[bool] = []
            self._each(1, lambda _, stored: found.append(bool(representable(stored, format).all())))
            self._fits[format] = all(found)
        return self._fits[format]

    def below(self, tiny: float) -> Any:
        return super().below(tiny) if self._least < tiny else None

    def times_size(self, left: Any) -> Any:
        return super().times_size(left) if self._held else self._times(left, lambda size: size)

    def times_below(self, left: Any, tiny: float) -> Any:
        if self._held or self._least >= tiny:
            return super().times_below(left, tiny)
        return self._times(left, lambda size: np.where(size < tiny, size, 0.0))

    def times_lacking(self, left: Any, tiny: float) -> Any:
        if self._held or self._least >= tiny:
            return super().times_lacking(left, tiny)
        return self._times(left, lambda size: np.where((size > 0) & (size < tiny), tiny - size, 0.0))

    def _times(self, left: Any, of: Callable[[Any], Any]) -> Any:
        """left [l, n] times a function of the magnitudes of the elements, block by block: [l, m]"""
        made = np.empty((len(left), self.columns))

        def add(columns: slice, stored: Any) -> None:
            made[:, columns] = left @ of(np.abs(upcast(stored, np.dtype(np.float64)))).T

        self._each(len(left), add)
        return made

    @cached_property
    def _least(self) -> float:
        """The smallest magnitude that is not zero, infinite if there is none.

        Without their sign, the bits of the values have the order of the values. Zero less 1 is the largest integer.
        """
        integer = np.dtype(f"u{np.dtype(self._rows.dtype).itemsize}").type
        one, most = integer(1), integer(np.iinfo(integer).max)
        found = [most]
        self._each(1, lambda _, stored: found.append(((stored.view(integer) & (most >> one)) - one).min()))
        least = min(found)
        return math.inf if least == most else float((least + one).view(self._rows.dtype))

    def sums(self, x: Enclosure, exact_mid: Any) -> Summed:
        if x.mid.ndim != 2:
            return Matrix(Enclosure(self.mid)).sums(x, exact_mid)
        found = NarrowSums(left_of(x), self, exact_mid)
        self._each(len(x.mid), found.add)
        return found

    def squares(self, x: Enclosure) -> Squared:
        if x.mid.ndim != 2:
            return Matrix(Enclosure(self.mid)).squares(x)
        found = NarrowSquares(left_of(x), self)
        self._each(len(x.mid), found.add)
        return found


@dataclass(frozen=True)
class Tile:
    """Some rows of a left factor, transposed: [n, rows] each."""

    part: slice
    mid: Any
    """binary64."""
    sizes: tuple[Any, ...]
    """Magnitudes, and the radius if there is one: float32, scaled."""
    variances: tuple[Any, ...]
    """The variance if there is one: float32, scaled."""
    endless: dict[str, Any]

    @cached_property
    def squares(self) -> tuple[Any, ...]:
        """Squares of the scaled magnitudes, and the variance if there is one."""
        return (self.sizes[0] ** 2, *self.variances)


class Left:
    """The left factor of a product, scaled.   x: [l, n]"""

    def __init__(self, x: Enclosure) -> None:
        self.rows, self.terms = x.shape
        values = scaled(x.mid)
        self.endless: dict[str, Any] = {}
        np.abs(values.rows, out=values.rows)
        sizes, variances = [values], list[Scaled]()
        for name, part, factors in (("radius", x.radius, sizes), ("variance", x.variance, variances)):
            if part is not None:
                part = np.broadcast_to(part, x.shape)
                unknown = ~np.isfinite(part)
                if unknown.any():
                    self.endless[name] = unknown.astype(np.float32)
                    part = np.where(unknown, 0.0, part)
                factors.append(scaled(part))
        self.sizes = [each.power for each in sizes]
        """Powers of two, [l, 1] each."""
        self.squares = [values.power**2, *(each.power for each in variances)]
        self.tiles = [
            Tile(
                part=part,
                mid=_turned(x.mid, part),
                sizes=tuple(_turned(each.rows, part) for each in sizes),
                variances=tuple(_turned(each.rows, part) for each in variances),
                endless={name: _turned(each, part) for name, each in self.endless.items()},
            )
            for part in _tiles(self.rows)
        ]

    @cached_property
    def signs(self) -> list[Any]:
        """The signs of each tile, float32 [n, rows]."""
        return [signs_of(tile.mid).astype(np.float32) for tile in self.tiles]


def signs_of(stored: Any) -> Any:
    """The signs of stored floats as int8, from their bits, which takes a tenth of the time of `np.sign`."""
    bits = stored.view(f"i{stored.itemsize}")
    above, below = bits > 0, bits.view(f"u{stored.itemsize}") > 1 + np.iinfo(bits.dtype).max
    return np.subtract(above.view(np.int8), below.view(np.int8))


def _turned(rows: Any, part: slice) -> Any:
    """Some rows of [l, n], as columns."""
    return np.ascontiguousarray(rows[part].T)


class _Last(local):
    """The left factor of the last product of a thread. Blocks of one matrix are multiplied by the same one."""

    of: Callable[[], Enclosure | None] = staticmethod(lambda: None)
    left: Left


_last = _Last()


def left_of(x: Enclosure) -> Left:
    """The left factor x [l, n], scaled."""
    if _last.of() is not x:
        _last.left, _last.of = Left(x), ref(x)
    return _last.left


def sums_up_to(ends: list[int], w: Any, x: Any, out: Any) -> None:
    """The products of terms up to each end.   w: [m, n]   x: [n, l]   out: [ends, m, l]"""
    count, n = len(ends), len(x)
    if n % count == 0:
        np.matmul(w.reshape(len(w), count, -1).transpose(1, 0, 2), x.reshape(count, -1, x.shape[1]), out=out)
    else:
        for start, end, each in zip([0, *ends], ends, out, strict=False):
            np.matmul(w[:, start:end], x[start:end], out=each)
    for before, after in pairwise(out):
        np.add(before, after, out=after)


def energy_of_path(ends: list[int], w: Any, x: Any) -> Any:
    """The energy of the partial sums over the terms between two ends, as `product_and_path` counts it.

    w: [m, n]   x: [n, l]   returns: [m, l]
    """
    shape = (len(ends), len(w), x.shape[1])
    partial = _scratch.array("partial", shape, np.float64)
    sums_up_to(ends, w, x, partial)
    partial[-1] *= ROOT_OF_HALF
    partial = partial.reshape(shape[0], -1)
    return np.einsum("ij,ij->j", partial, partial).reshape(shape[1:])


def summed(w: Any, x: Any) -> Any:
    """The product of w [m, n] and x [n, l], transposed: [l, m]. The next one takes its memory."""
    count = parts_of(len(x))
    made = _scratch.array("parts", (count, len(w), x.shape[1]), w.dtype)
    np.matmul(w.reshape(len(w), count, -1).transpose(1, 0, 2), x.reshape(count, -1, x.shape[1]), out=made)
    return (made[0] if count == 1 else made.sum(0)).T


class _NarrowBounds:
    """Bounds of sums over terms, from sums in float32."""

    def __init__(self, left: Left, matrix: NarrowMatrix, powers: list[Any], inexact: str) -> None:
        """powers: of the rows of each sum, [l, 1] each   inexact: the part of `left` that the second sum has"""
        self._left, self._matrix, self._powers, self._inexact = left, matrix, powers, inexact
        self._shape = (left.rows, matrix.columns)
        self._sums = np.empty((len(powers), *self._shape), np.float32)
        self._endless = np.empty(self._shape, bool) if inexact in left.endless else None

    def _add(self, made: Any, columns: slice, factors: Callable[[Tile], tuple[Any, ...]]) -> None:
        """Sum some columns.   made: float32 [columns, n], from zero up"""
        for tile in self._left.tiles:
            for i, each in enumerate(factors(tile)):
                self._sums[i, tile.part, columns] = summed(made, each)
            if self._endless is not None:
                reached = summed((made != 0).astype(np.float32), tile.endless[self._inexact])
                self._endless[tile.part, columns] = reached > 0

    def _bound(self, i: int, lost: float, part: slice) -> Any:
        """A bound of sums of scaled factors, each of which may have lost so much."""
        bound = np.add(self._sums[i, part], lost, dtype=np.float64)
        bound *= self._powers[i][part] * excess(self._left.terms + ROUNDINGS)
        return bound

    def _inherited(self, lost: float, part: slice) -> Any:
        """The sum that comes from inexact factors, infinite where an infinite one meets an element that is not zero."""
        if len(self._powers) == 1:
            return 0.0
        found = self._bound(1, lost, part)
        return found if self._endless is None else np.where(self._endless[part], np.inf, found)


class NarrowSums(_NarrowBounds):
    """The sums of a product, as they were computed. `rows` has the bounds."""

    def __init__(self, left: Left, matrix: NarrowMatrix, exact_mid: Any) -> None:
        super().__init__(left, matrix, left.sizes, "radius")
        self._exact = exact_mid is not None
        self.mid = exact_mid if self._exact else np.empty(self._shape)

    def add(self, columns: slice, rows: Any) -> None:
        """Compute the sums for these columns.   rows: [columns, n], the transpose of the matrix there, as stored"""
        made = _scratch.array("float32", rows.shape, np.float32)
        np.copyto(made, rows)
        if not self._exact:
            wide = _scratch.array("float64", rows.shape, np.float64)
            np.copyto(wide, made)
            for tile in self._left.tiles:
                self.mid[tile.part, columns] = summed(wide, tile.mid)
        self._add(np.abs(made, out=made), columns, lambda tile: tile.sizes)

    def rows(self, part: slice) -> Sums:
        """The bounds of some rows."""
        n = self._left.terms
        # the products and additions lose `FLUSHED` each, and so does each factor, times the other one
        lost = n * FLUSHED * (self._matrix.most + 4)
        return Sums(
            mid=self.mid[part],
            total=self._bound(0, lost, part),
            inherited=self._inherited(lost, part),
            loose=excess(n + ROUNDINGS) ** 2,
            lost=2 * lost * self._powers[0][part],
        )


class NarrowSquares(_NarrowBounds):
    """The sums of squares of a product, as they were computed. `rows` has the bounds."""

    def __init__(self, left: Left, matrix: NarrowMatrix) -> None:
        super().__init__(left, matrix, left.squares, "variance")
        self._ends = checkpoints(left.terms)
        self._path = np.empty(self._shape) if len(self._ends) > 1 else None

    def add(self, columns: slice, rows: Any) -> None:
        """Compute the sums for these columns.   rows: [columns, n], the transpose of the matrix there, as stored"""
        made = _scratch.array("float32", rows.shape, np.float32)
        np.copyto(made, rows)
        if self._path is not None:
            wide = _scratch.array("float64", rows.shape, np.float64)
            np.copyto(wide, made)
            for tile in self._left.tiles:
                self._path[tile.part, columns] = energy_of_path(self._ends, wide, tile.mid).T
        self._add(np.multiply(made, made, out=made), columns, lambda tile: tile.squares)

    def rows(self, part: slice) -> Squares:
        """The bounds of some rows."""
        n = self._left.terms
        lost = n * FLUSHED * (2 * self._matrix.most**2 + 10)
        return Squares(
            energy=self._bound(0, lost, part),
            path=0.0 if self._path is None else self._path[part] * between(n),
            variance=self._inherited(lost, part),
        )
