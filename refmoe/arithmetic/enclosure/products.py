# SPDX-License-Identifier: Apache-2.0
"""Sums and matrix products, for every order, tree, blocking and fusion of the additions.

Let m be the sum of n terms, and A the sum of their magnitudes. Each partial sum, in any order, is at most
(A + |m|) / 2: the larger of the sum of the positive terms and that of the negative ones. So n roundings of unit u move
the result by at most about n u (A + |m|) / 2. The variance assumes an order of terms that does not depend on their
values. It follows the partial sums along the index, since structured rows can make these far larger than chance would.

An accumulator that cuts off loses half a unit of 2 u towards zero, on average. Losses in one direction do not average
out, so they are a bias and no part of the variance. `Accumulator.bias` adds up three parts:

terms     A term loses against its own sign. Positive and negative terms cancel, but for the surplus of one sign.
results   The result of a step loses against the sign of the sum so far, which it keeps for many steps. Together this is
          u N s, with N steps and the mean magnitude s of the partial sums. It grows like N, and not like its root.
sums      The sum so far loses where a term of the step is larger: u times the largest term of the step, at most. Over N
          steps, this adds up to u sqrt(N Q), where Q is the sum of the squares of the terms (Cauchy and Schwarz).

docs/verification.md derives s, for terms in random order and along the index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import (
    OWN,
    SLACK,
    UNDERFLOW,
    Enclosure,
    Most,
    Partial,
    bounded,
    overflow,
    quiet,
    unbounded_beyond,
)
from refmoe.arithmetic.enclosure.matrices import Matrix, Squared, Squares, Sums, between
from refmoe.arithmetic.formats import Format

PIECE = 1 << 15
"""Elements of a product whose bounds are computed at once: their temporary arrays fit in the cache."""
BLOCK = 4
"""The fewest terms that a truncating accumulator aligns together: 4 in Volta's tensor cores, more in later ones."""
REACH = 2.0
"""The mean distance of partial sums from a line, in roots of Q, that terms in random order do not exceed.

That mean is about 0.31, and larger by r with a probability of 2 exp(-6 r^2): 1e-7 for 2. Half a unit is 0.7 u of a
number on average, which counts as u here. So an excess needs 2.8, with a probability of 1e-16.
"""


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

    def bias(self, sums: Sums, squares: Squares, one_way: Any, n: int) -> Any:
        """The bound on what a truncating accumulator is expected to lose in one direction, [..., l, m].

        one_way: the surplus of terms of one sign, [..., l, m]; or n, where the signs of terms are not known
        """
        size, steps = np.abs(sums.mid), math.ceil(n / BLOCK)
        largest, root = (sums.total + size) / 2, np.sqrt(squares.energy)
        along = np.sqrt((squares.path + between(n) / 2 * squares.energy) / max(n, 1))
        mean = np.minimum(np.maximum(size / 2 + REACH * root, along), largest)
        return self.format.u * (one_way * largest + steps * mean + math.sqrt(steps) * root)

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
        return w.fits(self.inputs) and x.fits(self.inputs)

    def radius(self, sums: Sums, flushed: Any, terms: Terms) -> Any:
        """The radius of a product, [..., l, m].

        flushed: the error when factors below the smallest normal value count as zero, of that shape or a number
        """
        n, u, growth = terms.count, self.format.u, self.growth(terms.count)
        size = np.abs(sums.mid)
        # without roundings, no partial sum is larger than (total + size) / 2 + inherited
        rounds = 1 + 2 * u if terms.rounds else 1.0
        product = u if terms.rounds else 0.0
        lost, _ = self.underflow(n)
        # every sum used here has n additions of positive terms, each with an error of half of OWN
        own = SLACK + n * OWN
        of_total = growth * rounds / 2 + product + (0.0 if terms.exact else (n + 2) * OWN)
        of_size = growth * rounds / 2 + (OWN if terms.exact else 0.0)
        radius = sums.total * (of_total * own)
        radius += size * (of_size * own)
        radius += sums.inherited * ((1 + growth * rounds + product) * own) + (lost + flushed) * own
        # no magnitude of a sum exceeds the sum of the magnitudes
        most = 2 * float(sums.total.max(initial=0.0)) + float(np.maximum.reduce(sums.inherited, None, initial=0.0))
        if not most * rounds * (1 + growth) < overflow(self.format):
            # only here a sum may be NaN or infinite
            largest = ((sums.total + size) / 2 + sums.inherited) * rounds
            radius = bounded(unbounded_beyond(largest * (1 + growth), radius, self.format))
        return radius

    def variance(self, mid: Any, squares: Squares, flushed: Any, terms: Terms) -> Any:
        """The variance of a product, [..., l, m].   mid: of that shape   flushed: as for `radius`"""
        n = terms.count
        size = mid * mid
        size *= n / 3
        spread = squares.energy * (n / 2)
        spread += size
        np.maximum(spread, squares.path + between(n) / 2 * squares.energy, out=spread)
        if terms.rounds:
            spread += squares.energy
        spread *= self._unit
        spread += squares.variance + self._lost_variance(flushed, n)
        return bounded(spread)

    def least_variance(self, sums: Sums, flushed: Any, terms: Terms) -> Any:
        """A lower bound of the variance of a product of exact factors, [..., l, m], from the magnitudes of terms alone.

        The square of a sum of n magnitudes is at most n times the sum of their squares (Cauchy and Schwarz).
        """
        n, unit = terms.count, self._unit / SLACK**2
        spread, size = sums.least_total, sums.mid * math.sqrt(unit * n / 3)
        spread *= math.sqrt(unit * (n / 2 + terms.rounds) / max(n, 1))
        spread *= spread
        size *= size
        spread += size
        spread += self._lost_variance(flushed, n)
        return bounded(spread)

    @property
    def _unit(self) -> float:
        """The variance of a rounding of 1."""
        return (1 + self.rescales) * self.format.u**2 / 3

    def _lost_variance(self, flushed: Any, n: int) -> Any:
        """The variance of losses below the smallest normal value."""
        _, lost = self.underflow(n)
        return lost + flushed**2 / 3


@dataclass(frozen=True)
class Terms:
    """The terms that each element of a product sums."""

    count: int
    rounds: bool
    """Whether a term may round before it is added."""
    exact: bool
    """Whether the midpoint is the sum rounded once. Otherwise it is a sum in binary64, in any order."""


@quiet
def product(x: Enclosure, w: Matrix, how: Accumulator, exact_mid: Any = None) -> Enclosure:
    """The enclosure of x [..., l, n] times w [..., n, m].

    exact_mid: the product rounded once. At float64 it is needed, because the verifier's own sums err like the engine's.
    """
    x = x.settle()
    sums, n = w.sums(x, exact_mid), x.shape[-1]
    pairs = x.length is not None and w.length is not None
    inputs: Any = 0.0
    if how.flushes:
        inputs = how.format.tiny * _lengths(x, w) if pairs else flushed(np.abs(x.mid), w, how.format)
    terms = Terms(n, rounds=not how.holds_products(x, w), exact=exact_mid is not None)
    held: list[Squared] = []

    def squares() -> Squared:
        """The sums of squares, computed at the first call."""
        if not held:
            held.append(w.squares(x))
        return held[0]

    pieces = [(part, inputs[part] if np.ndim(inputs) else inputs) for part in _pieces(sums.mid.shape)]

    def whole() -> Any:
        made = np.empty(sums.mid.shape)
        with np.errstate(all="ignore"):
            for part, lost in pieces:
                made[part] = how.variance(sums.mid[part], squares().rows(part), lost, terms)
        return made

    # errors of factors are most of the spread, so that nothing is deferred where these have any
    defers = x.variance is None and w.variance is None
    radius, variance = np.empty(sums.mid.shape), np.empty(sums.mid.shape) if defers else whole()
    most = np.zeros(3)
    for part, lost in pieces:
        rows = sums.rows(part)
        radius[part] = how.radius(rows, lost, terms)
        if defers:
            variance[part] = how.least_variance(rows, lost, terms)
        # asked here, while the cache has them
        np.maximum(most, [each.max(initial=0.0) for each in (rows.total, radius[part], variance[part])], out=most)
    bias: Callable[[], Any] | None = None
    if how.truncates:
        tiny = how.inputs.tiny
        apart = tiny * (_lengths(x, w) + n * tiny) if pairs else misaligned(np.abs(x.mid), w, tiny)
        apart = how.growth(n) * (SLACK + n * OWN) * apart
        radius = bounded(radius + apart)

        def lost_one_way() -> Any:
            # the signs of turned elements are not known: at worst all terms are cut off in the same direction
            one_way, every = n if pairs else w.one_way(x), slice(None)
            with np.errstate(all="ignore"):
                return bounded(how.bias(sums.rows(every), squares().rows(every), one_way, n) + apart)

        bias = lost_one_way
    spread = Partial(variance, whole) if defers else variance
    made = Enclosure(sums.mid, radius, spread, accumulation=x.accumulation, bias=bias)
    if not how.truncates:
        # twice covers that the sum of magnitudes may itself be too small by its roundings
        made.most = Most(size=2 * float(most[0]), radius=float(most[1]), least_variance=float(most[2]))
    return made


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis that have about `PIECE` elements each."""
    step = max(1, PIECE // max(math.prod(shape[1:]), 1))
    if step >= shape[0]:
        yield slice(None)
    else:
        yield from (slice(start, start + step) for start in range(0, shape[0], step))


def _lengths(x: Enclosure, w: Matrix) -> Any:
    """The sum of all lengths of pairs that meet in an element of the product."""
    return x.length.sum(-1)[..., None] + w.length.sum(-2)[..., None, :]


def flushed(size: Any, w: Matrix, format: Format) -> Any:
    """The error when factors below the smallest normal value of the format count as zero."""
    lost: Any = 0.0
    small = np.where(size < format.tiny, size, 0.0)
    if small.any():
        lost = w.times_size(small)
    return lost + w.times_below(size, format.tiny)


def misaligned(size: Any, w: Matrix, tiny: float) -> Any:
    """The sum of what terms with a subnormal factor lack to the magnitudes as which they are aligned, [..., l, m].

    A tensor core takes the exponent of the smallest normal value for such a factor. So other terms lose more.
    """
    apart: Any = 0.0
    lacks = np.where((size > 0) & (size < tiny), tiny - size, 0.0)
    if lacks.any():
        apart, size = w.times_size(lacks), size + lacks
    return apart + w.times_lacking(size, tiny)


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
