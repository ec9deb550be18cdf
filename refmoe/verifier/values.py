# SPDX-License-Identifier: Apache-2.0
"""The figures of single values: distance from the midpoint, from the cell, and from the ends of the legal interval.

`judged` computes them all, whatever the values are. `measured` serves finite values, with half as many operations. It
computes the size and the lean of all errors. Of the largest figures it computes bounds only. It returns the values that
may exceed the figures so far: `judged` has to look at these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, UNDERFLOW
from refmoe.arithmetic.formats import FLOAT32, Format, cell, nearest, ulp

MANY = 64
"""Values above the largest excess so far, of which it is worth a call to find the farthest before the others."""
SPARE = 1 - 2.0**-30
"""A factor on half a spacing and on the figures so far. It covers the rounding of the bounds themselves."""


class Values(NamedTuple):
    """Values found, and their enclosure before the last rounding. Each is of shape [n], or a number for all."""

    found: Any
    mid: Any
    radius: Any
    variance: Any
    format: Format
    """The dtype of the last rounding."""
    later: Callable[[], tuple[Any, Any]] | None = None
    """Makes the whole variance, and the distances by which an accumulator may shift the values, each [n] or a number.
    None: `variance` is the whole one, and nothing shifts."""
    calm: float = 0.0
    """Standard deviations from the cell up to which nobody asks `later`."""

    def at(self, places: Any) -> Values:
        """Some of the values.   places: integers [k]"""
        later, rest = self.later, None
        if later is not None:
            rest = lambda: tuple(_some(part, places) for part in later())  # noqa: E731
        return self._replace(
            found=_some(self.found, places), mid=_some(self.mid, places), radius=_some(self.radius, places),
            variance=_some(self.variance, places), later=rest,
        )  # fmt: skip


def _some(array: Any, places: Any) -> Any:
    return array[places] if np.ndim(array) else array


class Sizes(NamedTuple):
    """The values of which size and lean of errors are taken. Each is of shape [n], or a number for all."""

    error: Any
    mid: Any
    variance: Any
    spacing: Any
    """The spacing of the dtype at the midpoint."""
    usable: Any
    """Whether an error counts; True for all."""

    def first(self, count: int) -> Sizes:
        """The first values, none where the count is below 0."""
        part = slice(max(count, 0))
        return Sizes._make(_some(each, part) for each in self)

    def weighed(self, variance: Any) -> Weighed:
        """The sums over the values, each weighed by the inverse of a variance [n]."""
        error, cut = self.error, np.sign(self.mid) * self.spacing
        if self.usable is True and variance.min() > 0:
            weight, count = 1 / variance, error.size
        else:
            known = self.usable & (variance > 0) & (variance < np.inf)
            weight, count = np.where(known, 1 / variance, 0.0), int(np.count_nonzero(known))
            error, cut = np.where(known, error, 0.0), np.where(known, cut, 0.0)
        weighted = error * weight
        squares, leaning, reach = weighted @ error, weighted @ cut, (cut * weight) @ cut
        # truncation errs by half a spacing, towards zero
        return Weighed(float(squares), count, float(leaning) / -2, float(reach) / 4)


class Weighed(NamedTuple):
    """Sums over values: of squares of errors, of errors times those of truncation, and of squares of the latter."""

    squares: float
    counted: int
    """The number of values that have a weight."""
    leaning: float
    reach: float


# ---- all figures


class Judged(NamedTuple):
    """The figures of values, [n] each."""

    outside: Any
    """Whether a value lies outside the legal interval."""
    bounded: Any
    """Whether the interval has ends; True for all."""
    ratio: Any
    """The error over the largest legal one."""
    excess: Any
    """The distance from the midpoint to the cell of the value, in standard deviations."""
    low: Any
    high: Any
    sigma: Any
    sizes: Sizes
    undecided: int = 0
    not_finite: int = 0
    gaps: int = 0

    def worst(self) -> tuple[int, float]:
        """The position of the worst value, and its score: the largest among values outside, else bounded, else any."""
        any_outside = self.outside.any()
        score = np.where(self.outside, self.ratio, self.excess) if any_outside else self.excess
        if self.bounded is True and not any_outside:
            at = int(np.argmax(score))
        else:
            candidates = self.outside if any_outside else np.broadcast_to(self.bounded, self.outside.shape)
            score = np.fmax(score, 0.0)
            at = int(np.argmax(np.where(candidates, score, -1.0) if candidates.any() else score))
        return at, float(score[at])


def judged(values: Values, may_overflow: bool) -> Judged:
    """The figures of any values.

    may_overflow: whether a legal implementation may have overflowed before
    What values have `later` counts where a value is far from its cell.
    """
    y, m, r, v, format = values.found, values.mid, values.radius, values.variance, values.format
    clean = bool(np.isfinite(y + m + r + v).all())
    bounded: Any = True
    spread: Any = True
    if not clean:
        r = np.where(np.isnan(r) | np.isnan(m), np.inf, r)
        v = np.where(np.isnan(v), np.inf, v)
        bounded, spread = np.isfinite(r), np.isfinite(v)
    low, high = nearest(pair(m - r, m + r), format)
    finite: Any = True
    undecided = not_finite = gaps = 0
    if clean:
        outside = (y < low) | (y > high)
    else:
        low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
        finite, known = np.isfinite(y), np.isfinite(m)
        outside = ~((y >= low) & (y <= high)) | (np.isinf(y) & np.isinf(r))
        # an infinity or NaN in an interval without ends is legal only if an earlier step may have overflowed
        outside &= finite | bounded | (not may_overflow)
        outside &= known | (finite & bounded) | (~finite & (not may_overflow))
        spread = spread & known
        undecided = int((~(outside | bounded | (spread & finite))).sum())
        not_finite = int((outside & ~finite).sum())
        gaps = int((~finite).sum())
        finite = finite & known
    error = y - m if clean else np.where(finite, y - np.where(finite, m, 0.0), np.inf)
    spacing, allowed = ulp(pair(m, np.abs(m) + r), format)
    ratio = np.abs(error) / (r + allowed / 2 if format.precision < 53 else r)
    if not clean:
        # no ratio where the radius is unknown, nor where a legal value is infinite
        ratio = np.where(bounded & (finite | outside), ratio, 0.0)

    start, end = cell(y if clean else np.where(finite, y, 0.0), format)
    beyond = np.maximum(m - end, start - m)

    def distance(variance: Any, shift: Any) -> tuple[Any, Any]:
        """The excess and its unit."""
        sigma = np.sqrt(variance + (OWN * m) ** 2)
        # a variance of zero beside a positive radius has underflowed and cannot be used
        if clean and variance.min(initial=math.inf) > 0:
            return np.maximum(beyond - shift, 0.0) / sigma, sigma
        usable = (beyond > 0) & ((variance > 0) | (r == 0)) & finite & spread & (variance < np.inf)
        return np.where(usable, np.maximum(beyond - shift, 0.0) / sigma, 0.0), sigma

    excess, sigma = distance(v, 0.0)
    if values.later is not None and excess.max(initial=0.0) > values.calm:
        # value by value, so that a figure does not depend on what is tested with it
        far, whole = excess > values.calm, distance(*values.later())
        excess, sigma = (np.where(far, new, old) for new, old in zip(whole, (excess, sigma), strict=True))
    sizes = Sizes(error=error, mid=m, variance=v, spacing=spacing, usable=finite & spread)
    return Judged(
        outside=outside, bounded=bounded, ratio=ratio, excess=excess, low=low, high=high, sigma=sigma, sizes=sizes,
        undecided=undecided, not_finite=not_finite, gaps=gaps,
    )  # fmt: skip


def pair(a: Any, b: Any) -> Any:
    """Two arrays in one, so that one call treats both. a, b: [n]   returns: [2, n]"""
    both = np.empty((2, *np.shape(a)))
    both[0], both[1] = a, b
    return both


# ---- finite values


class Measured(NamedTuple):
    """The contribution of finite values to size and lean, and the values of which all figures are needed."""

    sizes: Sizes
    suspects: Any
    """Integers [k] in rising order: all values that may be outside, or above the figures so far."""


def measured(values: Values, ratio: float, excess: float) -> Measured | None:
    """The contribution of values if all are finite and narrower than binary64, else None.

    values: the dtype has all of those that were found. If they have `later`, the result is None as well where one may
    be so far from its cell that this counts.
    ratio, excess: the largest figures so far

    Let h be half the spacing at the smaller of |y| and |m|. Where y and m have one sign, the cell of y reaches at least
    h from y towards m. So |y - m| > radius + h for all values outside, the ratio is at most |y - m| / (radius + h), and
    the distance of m from the cell is at most |y - m| - h. All values that may have two signs are suspects.
    """
    y, m, r, v, format = values.found, values.mid, values.radius, values.variance, values.format
    if format.precision > FLOAT32.precision or not y.size:
        return None
    error = y - m
    size, around = np.abs(error), np.abs(m)
    if not np.isfinite(size.max() + r.max() + v.max()):
        return None
    half = ulp(np.minimum(np.abs(y), around), format)
    half *= 0.5
    legal = half + r
    # a value of another sign than m is farther from m than zero is
    suspect = size > np.minimum(legal * (min(ratio, 1.0) * SPARE), around)
    if suspect.any():
        share = size / legal
        at = int(share.argmax())
        reached = float(size[at]) / (_number(r, at) + float(ulp(around[at] + _number(r, at), format)) / 2)
        least = min(max(ratio, reached), 1.0)
        suspect = (size > around) | (share > least * SPARE)
        if least == 1.0:
            # a tie of exact values: size and half are exact, and it is no farther than the first one
            suspect &= (r > 0) | (size > half)
            suspect[at] |= reached > ratio
    beyond = np.subtract(size, half, out=half)
    beyond *= np.abs(beyond)  # the square, negative within the cell
    spread = v * (excess * excess * SPARE)
    above = beyond > spread
    if above.any():
        if values.later is not None and ((size > around).any() or (beyond > v * values.calm**2).any()):
            return None
        if np.count_nonzero(above) > MANY:
            farthest = values.at(np.array([(beyond / np.maximum(v, UNDERFLOW)).argmax()]))
            reached = max(excess, float(judged(farthest, may_overflow=False).excess[0]))
            above &= beyond > v * (reached * reached * SPARE)
        suspect |= above
    sizes = Sizes(error=error, mid=m, variance=v, spacing=ulp(m, format), usable=True)
    return Measured(sizes, np.flatnonzero(suspect))


def _number(array: Any, at: int) -> float:
    return float(array[at] if np.ndim(array) else array)
