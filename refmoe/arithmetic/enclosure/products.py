# SPDX-License-Identifier: Apache-2.0
"""Sums and matrix products, for every order, tree, blocking and fusion of the additions.

Let m be the sum of n terms, and A the sum of their magnitudes. Each partial sum, in any order, is at most
(A + |m|) / 2: the larger of the sum of the positive terms and that of the negative ones. So n roundings of unit u move
the result by at most about n u (A + |m|) / 2. The variance assumes an order of terms that does not depend on their
values. It follows the partial sums along the index, since structured rows can make these far larger than chance would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, UNDERFLOW, Enclosure, bounded, quiet, unbounded_beyond
from refmoe.arithmetic.formats import Format, representable

CHUNK = 16
"""Terms between two checkpoints of the partial sums. Within a chunk, sorted terms at most double the spread."""
CHUNKS = 32
"""The most checkpoints. More would cost more than the products themselves."""
BLOCK = 4
"""The fewest terms that a truncating accumulator aligns together: 4 in Volta's tensor cores, more in later ones."""


@dataclass(frozen=True)
class Accumulator:
    """The arithmetic in which products are summed."""

    format: Format
    inputs: Format
    """The dtype of factors that are stored."""
    truncates: bool = False
    flushes: bool = False
    rescales: bool = False
    """Whether the sum so far may be rescaled before each term, as the sums of flash attention are."""

    def growth(self, n: int) -> float:
        """The bound on the error of a sum of n terms, relative to the largest partial sum.

        Every tree has n - 1 roundings. Their errors add up, each u times a partial sum that has an error itself.
        A truncating accumulator cuts off up to 2 u of the largest exponent of a block. It cuts each term of the block,
        the sum so far, and the result.
        """
        count = 2 * (n + 2 * math.ceil(n / BLOCK)) if self.truncates else n - 1
        return math.expm1(min((count + self.rescales * n) * self.format.u, 700.0))

    def underflow(self, n: int) -> tuple[float, float]:
        """Radius and variance of the losses of n products and n sums below the smallest normal value."""
        n *= 1 + self.rescales
        if self.flushes:  # flushing always goes towards zero, so that losses add up
            lost = 2 * n * self.format.tiny
            return lost, lost**2 / 3 + UNDERFLOW
        half = self.format.u * self.format.tiny + UNDERFLOW
        return n * half, n * half**2 / 3 + UNDERFLOW

    def holds_products(self, x: Enclosure, w: Matrix) -> bool:
        """Whether a product of two factors needs no rounding: both are stored values with short significands."""
        if 2 * self.inputs.precision > self.format.precision or x.radius is not None or w.radius is not None:
            return False
        return w.fits(self.inputs) and bool(representable(x.mid, self.inputs).all())


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

    def below(self, tiny: float) -> Any:
        """The magnitudes smaller than `tiny`, with zeros for the others. None if all of these are zero."""
        if tiny not in self._below:
            small = np.where(self.size < tiny, self.size, 0.0)
            self._below[tiny] = small if small.any() else None
        return self._below[tiny]

    def fits(self, format: Format) -> bool:
        """Whether the format holds all elements."""
        if format not in self._fits:
            self._fits[format] = bool(representable(self.mid, format).all())
        return self._fits[format]


@quiet
def product(x: Enclosure, w: Matrix, how: Accumulator, exact_mid: Any = None) -> Enclosure:
    """The enclosure of x [..., l, n] times w [..., n, m].

    exact_mid: the product rounded once. At float64 it is needed, because the verifier's own sums err like the engine's.
    """
    x = x.settle()
    n, u = x.shape[-1], how.format.u
    size, square = np.abs(x.mid), x.mid**2
    mid, path, longest = _product_and_path(x.mid, w.mid)
    mid = mid if exact_mid is None else exact_mid
    pairs = x.length is not None and w.length is not None
    if pairs:
        total, energy, inherited = _of_pairs(x, w)
    else:
        total, energy, inherited = size @ w.size, square @ w.square, inherited_radius(x, size, w)
    partial = (total + np.abs(mid)) / 2

    @quiet
    def bias() -> Any:
        # the signs of turned elements are not known: at worst all terms are cut off in the same direction
        one_way = n if pairs else np.abs(np.sign(x.mid).astype(np.float32) @ w.signs)
        return bounded(u * partial * one_way)

    result = partial + inherited  # without roundings, no partial sum of any legal factors is larger
    rounds = not how.holds_products(x, w)
    largest = result * (1 + 2 * u) if rounds else result
    result = inherited + how.growth(n) * largest
    spread = np.maximum(n / 3 * mid**2 + n / 2 * energy, path + longest / 2 * energy)
    if rounds:
        result += u * (total + inherited)
        spread += energy
    spread = spread * (1 + how.rescales)
    lost, lost_spread = how.underflow(n)
    if how.flushes:
        inputs = how.format.tiny * _lengths(x, w) if pairs else flushed(size, w, how.format)
        lost, lost_spread = lost + inputs, lost_spread + inputs**2 / 3
    own = OWN * np.abs(mid) if exact_mid is not None else (n + 2) * OWN * total
    # every sum used here has n additions of positive terms, each with an error of half of OWN
    result = (result + lost + own) * (SLACK + n * OWN)
    result = unbounded_beyond(largest * (1 + how.growth(n)), result, how.format)
    variance = inherited_variance(x, square, w) + (u * u / 3 * spread + lost_spread)
    bias_or_none = bias if how.truncates else None
    return Enclosure(mid, bounded(result), bounded(variance), accumulation=x.accumulation, bias=bias_or_none)


def _product_and_path(x: Any, w: Any) -> tuple[Any, Any, int]:
    """The product, the energy of its partial sums at checkpoints in index order, and the terms between checkpoints.

    From S to S' over L terms, the squares of the partial sums add up to L (S^2 + S S' + S'^2) / 3. That is at most
    L (S^2 + S'^2) / 2.
    """
    n = x.shape[-1]
    chunks = min(max(n // CHUNK, 1), CHUNKS)
    longest = -(-n // chunks)
    if chunks == 1:
        return x @ w, 0.0, n
    ends = [n * (i + 1) // chunks for i in range(chunks)]
    total = x[..., : ends[0]] @ w[..., : ends[0], :]
    path = np.zeros_like(total)
    for start, end in pairwise(ends):
        path += total * total
        total += x[..., start:end] @ w[..., start:end, :]
    path += total * total / 2
    path *= longest
    return total, path, longest


def inherited_radius(x: Enclosure, size: Any, w: Matrix) -> Any:
    """The part of the product's radius that comes from inexact factors."""
    radius: Any = 0.0
    if x.radius is not None:
        radius = radius + _from_zero_up(x.radius, w.size)
    if w.radius is not None:
        radius = radius + _from_zero_up(size + x.r, w.radius)
    return radius


def inherited_variance(x: Enclosure, square: Any, w: Matrix) -> Any:
    """The part of the product's variance that comes from inexact factors."""
    variance: Any = 0.0
    if x.variance is not None:
        variance = variance + _from_zero_up(x.variance, w.square)
    if w.variance is not None:
        variance = variance + _from_zero_up(square + x.v, w.variance)
    return variance


def _of_pairs(x: Enclosure, w: Matrix) -> tuple[Any, Any, Any]:
    """Bounds for rows of pairs, if both factors hold each pair turned by one unknown angle: the same in x and in w.

    The two products of a pair are at most its lengths multiplied, in magnitude together and in energy together. Its
    error is at most the length of one error times the other length. Each pair has two elements here, hence the halves.
    returns: the sum of magnitudes, the sum of squares, the inherited radius
    """
    inherited = _from_zero_up(x.r, w.length) + _from_zero_up(x.length + x.r, w.radius)
    return x.length @ w.length / 2, x.length**2 @ w.length**2 / 2, inherited / 2


def _lengths(x: Enclosure, w: Matrix) -> Any:
    """The sum of all lengths of pairs that meet in an element of the product."""
    return x.length.sum(-1)[..., None] + w.length.sum(-2)[..., None, :]


def _from_zero_up(a: Any, b: Any) -> Any:
    """The product of two arrays of numbers from zero up, where infinity times zero is zero.

    Such a zero is a masked probability. The value that it multiplies, such as that of a later token, may be unknown.
    """
    if np.isfinite(a.max(initial=0.0)) and np.isfinite(b.max(initial=0.0)):
        return a @ b
    endless_a, endless_b = ~np.isfinite(a), ~np.isfinite(b)
    result = np.where(endless_a, 0.0, a) @ np.where(endless_b, 0.0, b)
    reached = endless_a.astype(float) @ (b != 0) + (a != 0).astype(float) @ endless_b
    return np.where(reached > 0, np.inf, result)


def flushed(size: Any, w: Matrix, format: Format) -> Any:
    """The error when factors below the smallest normal value of the format count as zero."""
    lost: Any = 0.0
    small = np.where(size < format.tiny, size, 0.0)
    if small.any():
        lost = lost + small @ w.size
    below = w.below(format.tiny)
    return lost if below is None else lost + size @ below


@quiet
def total(x: Enclosure, axis: int, how: Accumulator, exact_mid: Any = None) -> Enclosure:
    """The enclosure of the sum over one axis, which is dropped.   exact_mid: as for `product`"""
    x = x.settle()
    n, u = x.shape[axis], how.format.u
    mid = x.mid.sum(axis) if exact_mid is None else exact_mid
    size = np.abs(x.mid).sum(axis)
    inherited = 0.0 if x.radius is None else x.radius.sum(axis)
    largest = (size + np.abs(mid)) / 2 + inherited
    own = OWN * np.abs(mid) if exact_mid is not None else (n + 2) * OWN * size
    result = (inherited + how.growth(n) * largest + own + UNDERFLOW) * (SLACK + n * OWN)
    result = unbounded_beyond(largest * (1 + how.growth(n)), result, how.format)
    variance = u * u / 3 * (n / 3 * mid**2 + n / 2 * (x.mid**2).sum(axis)) + UNDERFLOW
    if x.variance is not None:
        variance = variance + x.variance.sum(axis)
    return Enclosure(mid, bounded(result), bounded(variance), accumulation=x.accumulation)


@quiet
def over_ranks(parts: Sequence[Enclosure], stored: Format, flushes: bool) -> Enclosure:
    """The sum of the parts that ranks have, each stored and all added in one dtype, in any order.

    All roundings are relative to sums of magnitudes. So the enclosure also holds for an engine that weights and adds
    the outputs of several experts on each rank, and sums over ranks last. The last rounding is owed.
    """
    parts = [part.settle() for part in parts]
    n, accumulation = len(parts), parts[0].accumulation
    mid, size = sum(part.mid for part in parts), sum(np.abs(part.mid) for part in parts)
    inherited, variance = sum(part.r for part in parts), sum(part.v for part in parts)
    narrow = stored.u if stored != accumulation else 0.0
    unit, twice = accumulation.u + narrow, accumulation.u if narrow else 0.0  # the last addition may round to both
    reach = ((size + np.abs(mid)) / 2 + inherited) * math.exp(min((n + 1) * unit, 700.0))
    lost = sum(each.tiny * (1.0 if flushes else each.u) for each in (stored, accumulation)) + UNDERFLOW
    radius = inherited + narrow * (size + inherited) + (max(n - 2, 0) * unit + twice) * reach + 2 * n * lost
    radius = bounded((radius + (n + 2) * OWN * size) * SLACK)
    variance = variance + narrow**2 / 3 * sum(part.mid**2 for part in parts)
    variance = bounded(variance + (max(n - 2, 0) * unit**2 + twice**2) / 3 * reach**2 + n * lost**2)
    radius = unbounded_beyond(reach, radius, stored)
    return Enclosure(mid, radius, variance, accumulation=stored if narrow else accumulation, owed=True)
