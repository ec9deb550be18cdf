# SPDX-License-Identifier: Apache-2.0
"""The right factor of a product, and the sums over terms that the rules of a product need, in binary64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, Enclosure
from refmoe.arithmetic.formats import Format, representable

CHUNK = 16
"""Terms between two checkpoints of the partial sums. Within a chunk, sorted terms at most double the spread."""
CHUNKS = 32
"""The most checkpoints. More would cost more than the products themselves."""


class Summed(Protocol):
    """The sums of a product, of which some rows are asked for at a time."""

    mid: Any
    """The product of the midpoints, [..., l, m]."""

    def rows(self, part: slice) -> Sums:
        """The sums of some entries of the first axis."""


class Squared(Protocol):
    """The sums of squares of a product, of which some rows are asked for at a time."""

    def rows(self, part: slice) -> Squares:
        """The sums of some entries of the first axis."""


@dataclass
class Sums:
    """Sums over the n terms of each element of a product, [..., l, m] each; 0.0 stands for zeros everywhere."""

    mid: Any
    """The product of the midpoints."""
    total: Any
    """The magnitudes of the terms: an upper bound."""
    inherited: Any
    """The radius that comes from inexact factors."""
    loose: float
    """The exact sum of magnitudes is at least total / loose - lost."""
    lost: Any = 0.0
    """[..., l, 1], or a number."""

    def rows(self, part: slice) -> Sums:
        if part == slice(None):
            return self
        mid, total, inherited, lost = (_some(each, part) for each in (self.mid, self.total, self.inherited, self.lost))
        return Sums(mid=mid, total=total, inherited=inherited, loose=self.loose, lost=lost)

    @property
    def least_total(self) -> Any:
        """A lower bound of the magnitudes of the terms."""
        least = self.total * (1 / self.loose)
        least -= self.lost
        return np.maximum(least, 0.0, out=least)


@dataclass
class Squares:
    """Sums of squares over the n terms of each element of a product, [..., l, m] each; 0.0 stands for zeros."""

    energy: Any
    """The squares of the terms."""
    path: Any
    """The squares of the partial sums in index order, as `product_and_path` counts them."""
    variance: Any
    """The variance that comes from inexact factors."""

    def rows(self, part: slice) -> Squares:
        return Squares(*(_some(each, part) for each in (self.energy, self.path, self.variance)))


def _some(array: Any, part: slice) -> Any:
    return array[part] if np.ndim(array) else array


class Matrix:
    """The right factor of a product, with the arrays that the rules need. mid: [..., n, m], and so are the others."""

    def __init__(self, x: Enclosure, held: Format | None = None) -> None:
        """held: a dtype that is known to hold all elements"""
        x = x.settle()
        self.mid, self.radius, self.variance, self.length = x.mid, x.radius, x.variance, x.length
        self.size, self.square = np.abs(x.mid), x.mid**2
        self._below: dict[float, Any] = {}
        self._fits: dict[Format, bool] = {} if held is None else {held: True}

    @property
    def nbytes(self) -> int:
        return int(self.mid.nbytes + self.size.nbytes + self.square.nbytes)

    @cached_property
    def signs(self) -> Any:
        """The signs of the elements in float32, which counts terms exactly."""
        return np.sign(self.mid, dtype=np.float64).astype(np.float32)

    def one_way(self, x: Enclosure) -> Any:
        """The surplus of terms of one sign in each element of the product.   x: [..., l, n]   returns: [..., l, m]"""
        return np.abs(np.sign(x.mid).astype(np.float32) @ self.signs)

    def below(self, tiny: float) -> Any:
        """The magnitudes smaller than `tiny`, with zeros for the others. None if all of these are zero."""
        if tiny not in self._below:
            small = np.where(self.size < tiny, self.size, 0.0)
            self._below[tiny] = small if small.any() else None
        return self._below[tiny]

    def lacking(self, tiny: float) -> Any:
        """How far the elements between zero and `tiny` are below it, zero for the others. None if there are none."""
        small = self.below(tiny)
        return None if small is None else np.where(small > 0, tiny - small, 0.0)

    def times_size(self, left: Any) -> Any:
        """left [..., l, n], from zero up, times the magnitudes of the elements: [..., l, m]"""
        return left @ self.size

    def times_below(self, left: Any, tiny: float) -> Any:
        """As `times_size`, with zero for the elements that are not below `tiny`; 0.0 if these are all."""
        small = self.below(tiny)
        return 0.0 if small is None else left @ small

    def times_lacking(self, left: Any, tiny: float) -> Any:
        """As `times_below`, with what the elements between zero and `tiny` lack to it."""
        lacking = self.lacking(tiny)
        return 0.0 if lacking is None else left @ lacking

    def fits(self, format: Format) -> bool:
        """Whether the format holds all elements."""
        if format not in self._fits:
            self._fits[format] = bool(representable(self.mid, format).all())
        return self._fits[format]

    def sums(self, x: Enclosure, exact_mid: Any) -> Summed:
        """The sums of x [..., l, n] times this matrix.   exact_mid: the product if it is known, else None"""
        size = np.abs(x.mid)
        if x.length is not None and self.length is not None:
            total, inherited = _of_pairs(x, self)
        else:
            total, inherited = size @ self.size, inherited_radius(x, size, self)
        mid = x.mid @ self.mid if exact_mid is None else exact_mid
        return Sums(mid=mid, total=total, inherited=inherited, loose=SLACK + 2 * x.shape[-1] * OWN)

    def squares(self, x: Enclosure) -> Squared:
        """The sums of squares of x [..., l, n] times this matrix."""
        square = x.mid**2
        pairs = x.length is not None and self.length is not None
        return Squares(
            energy=x.length**2 @ self.length**2 / 2 if pairs else square @ self.square,
            path=product_and_path(x.mid, self.mid)[1],
            variance=inherited_variance(x, square, self),
        )


def checkpoints(n: int) -> list[int]:
    """The numbers of terms, of n, after which `product_and_path` looks at the partial sums."""
    chunks = min(max(n // CHUNK, 1), CHUNKS)
    return [n * (i + 1) // chunks for i in range(chunks)]


def between(n: int) -> int:
    """The most terms between two checkpoints of n terms."""
    return -(-n // len(checkpoints(n)))


def product_and_path(x: Any, w: Any) -> tuple[Any, Any]:
    """The product of x [..., l, n] and w [..., n, m], and the energy of its partial sums at checkpoints.

    From S to S' over L terms, the squares of the partial sums add up to L (S^2 + S S' + S'^2) / 3. That is at most
    L (S^2 + S'^2) / 2.
    """
    first, *others = checkpoints(x.shape[-1])
    if not others:
        return x @ w, 0.0
    total = x[..., :first] @ w[..., :first, :]
    path, spare = np.zeros_like(total), np.empty_like(total)
    for start, end in pairwise([first, *others]):
        np.multiply(total, total, out=spare)
        path += spare
        total += x[..., start:end] @ w[..., start:end, :]
    np.multiply(total, total, out=spare)
    spare /= 2
    path += spare
    path *= between(x.shape[-1])
    return total, path


def inherited_radius(x: Enclosure, size: Any, w: Matrix) -> Any:
    """The part of the product's radius that comes from inexact factors."""
    radius: Any = 0.0
    if x.radius is not None:
        radius = radius + from_zero_up(x.radius, w.size)
    if w.radius is not None:
        radius = radius + from_zero_up(size + x.r, w.radius)
    return radius


def inherited_variance(x: Enclosure, square: Any, w: Matrix) -> Any:
    """The part of the product's variance that comes from inexact factors."""
    variance: Any = 0.0
    if x.variance is not None:
        variance = variance + from_zero_up(x.variance, w.square)
    if w.variance is not None:
        variance = variance + from_zero_up(square + x.v, w.variance)
    return variance


def _of_pairs(x: Enclosure, w: Matrix) -> tuple[Any, Any]:
    """Bounds for rows of pairs, if both factors hold each pair turned by one unknown angle: the same in x and in w.

    The two products of a pair are at most its lengths multiplied, in magnitude together and in energy together. Its
    error is at most the length of one error times the other length. Each pair has two elements here, hence the halves.
    returns: the sum of magnitudes, the inherited radius
    """
    inherited = from_zero_up(x.r, w.length) + from_zero_up(x.length + x.r, w.radius)
    return x.length @ w.length / 2, inherited / 2


def from_zero_up(a: Any, b: Any) -> Any:
    """The product of two arrays of numbers from zero up, where infinity times zero is zero.

    Such a zero is a masked probability. The value that it multiplies, such as that of a later token, may be unknown.
    """
    if np.isfinite(a.max(initial=0.0)) and np.isfinite(b.max(initial=0.0)):
        return a @ b
    endless_a, endless_b = ~np.isfinite(a), ~np.isfinite(b)
    result = np.where(endless_a, 0.0, a) @ np.where(endless_b, 0.0, b)
    reached = endless_a.astype(float) @ (b != 0) + (a != 0).astype(float) @ endless_b
    return np.where(reached > 0, np.inf, result)
