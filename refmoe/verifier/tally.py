# SPDX-License-Identifier: Apache-2.0
"""The tests on one tap: legal interval, cell excess, matched filter against truncation, and size of the error.

    interval  A value outside the rounded ends of the legal interval is impossible under the policy.
    excess    The distance from the midpoint to the cell of the value found, in standard deviations. The limit is
              lambda = ln(2 N / alpha) / 2 for N values: the measured tail of legal sums stays under exp(-2 lambda).
    filter    The lean of the errors towards zero: 0 for rounding to nearest, 1 for truncation. The limit is 1/2.
    size      The mean square of error over variance. The test is one-sided, because more precision is always legal.
              Where errors are larger than expected, the bias of a truncating accumulator counts as spread.

A tap may come in pieces. The tally keeps sums and no arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import FLOAT64, Format, cell, nearest, representable, ulp
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Check, Element
from refmoe.verifier.provenance import Origin

SNR = 26.0
"""The filter applies if truncation would be this many standard errors away. Honest runs then stay within 0.26."""
LEAN = 0.5
"""Halfway between rounding to nearest and truncation."""
ROWS = 30
"""Below this number of rows, errors of a norm or of equal tokens are too similar for the tests of size and filter."""
CALM = 5.0
"""Standard deviations below which the bias of a truncating accumulator is not computed: no limit is as low."""
PIECE = 1 << 16
"""Values tested at once: about thirty temporary arrays of this length fit in the cache."""
LIKE_POINTWISE = 32.0
"""The number of values that err alike in elementwise steps and in segments up to a layer."""

Place = Callable[[int], tuple[int, ...]]
"""The function from the position of a value in a block to its index in the tap."""


@dataclass(frozen=True)
class Limits:
    """The thresholds of a whole verification: one significance, split over the tests."""

    significance: float
    values: int
    """The number of values in all checks."""
    tensors: int
    """The number of checks."""

    @property
    def excess(self) -> float:
        """The limit in standard deviations. A third of the significance is split over all values."""
        return math.log(2 * max(self.values, 1) * 3 / self.significance) / 2

    @property
    def part(self) -> float:
        """The significance of each of the three tests against replicas. Together they have a third of the whole."""
        return self.significance / 9

    def rms(self, values: int, alike: float) -> float:
        """The limit of the root mean square of `values` errors, of which `alike` at a time are equal.

        A third of the significance is split over all tensors.
        """
        level = self.significance / (3 * max(self.tensors, 1))
        return math.sqrt(1 + 3 * math.sqrt(math.log(1 / level) / (2 * values / alike)))


@dataclass(frozen=True)
class Sizes:
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
        return Sizes(*(each[part] if np.ndim(each) else each for each in vars(self).values()))


@dataclass
class Tally:
    """The sums and extremes of the values of one tap of one run that were tested so far."""

    values: int = 0
    undecided: int = 0
    outside: int = 0
    not_finite: int = 0
    gaps: int = 0
    """The number of values that are NaN or infinite, illegal or not."""
    worst_error: float = 0.0
    excess: float = 0.0
    squares: float = 0.0
    counted: int = 0
    rows: int = 0
    leaning: float = 0.0
    reach: float = 0.0
    worst: Element | None = None
    worst_rank: tuple[int, float] = (-1, -1.0)

    def add(
        self, x: Enclosure, found: Any, policy_format: Format, found_format: Format, place: Place, may_overflow: bool,
        counted: int | None = None,
    ) -> None:  # fmt: skip
        """Test values against their enclosure.

        x: the enclosure before the last rounding, [n]   found: binary64 [n]   place: from position to index
        may_overflow: whether a legal implementation may have overflowed before this tap
        counted: the first values, of which size and lean are taken; None: all values

        A value that the policy's dtype holds is tested as rounded to that dtype. Any other value was stored more
        precisely, and is tested as rounded to the dtype of the trace.
        """
        counted = found.size if counted is None else counted
        with np.errstate(all="ignore"):
            for start in range(0, found.size, PIECE):
                part = slice(start, start + PIECE)
                self._add_piece(
                    x if found.size <= PIECE else x[part], found[part], policy_format, found_format, place, start,
                    may_overflow, counted - start,
                )  # fmt: skip

    def _add_piece(
        self, x: Enclosure, found: Any, policy_format: Format, found_format: Format, place: Place, start: int,
        may_overflow: bool, counted: int,
    ) -> None:  # fmt: skip
        fits = policy_format.holds(found_format) or representable(found, policy_format)
        if np.all(fits):
            self._add(x, found, policy_format, _from(place, range(start, start + found.size)), may_overflow, counted)
            return
        finer = found_format if found_format.precision > policy_format.precision else policy_format
        for chosen, format in ((fits, policy_format), (~fits, finer)):
            at = np.flatnonzero(chosen)
            if at.size:
                first = int(np.searchsorted(at, counted))
                self._add(x[at], found[at], format, _from(place, start + at), may_overflow, first)

    def _add(self, x: Enclosure, y: Any, format: Format, place: Place, may_overflow: bool, counted: int) -> None:
        # if the operation rounds its result to this very dtype, that rounding is the last one, tested below
        before = x if x.biased or (x.owed and format == x.accumulation) else x.settle()
        m, r, v = before.mid, np.asarray(before.r), np.asarray(before.v)
        clean = bool(np.isfinite(y + m + r + v).all())
        bounded: Any = True
        spread: Any = True
        if not clean:
            r = np.where(np.isnan(r) | np.isnan(m), np.inf, r)
            v = np.where(np.isnan(v), np.inf, v)
            bounded, spread = np.isfinite(r), np.isfinite(v)
        low, high = nearest(pair(m - r, m + r), format)
        finite: Any = True
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
            self.undecided += int((~(outside | bounded | (spread & finite))).sum())
            self.not_finite += int((outside & ~finite).sum())
            self.gaps += int((~finite).sum())
            finite = finite & known
        error = y - m if clean else np.where(finite, y - np.where(finite, m, 0.0), np.inf)
        spacing, allowed = ulp(pair(m, np.abs(m) + r), format)
        ratio = np.abs(error) / (r + allowed / 2 if format.precision < 53 else r)
        if not clean:
            # no ratio where the radius is unknown, nor where a legal value is infinite
            ratio = np.where(bounded & (finite | outside), ratio, 0.0)

        start, end = cell(y if clean else np.where(finite, y, 0.0), format)
        beyond = np.maximum(m - end, start - m)
        sigma = np.sqrt(v + (OWN * m) ** 2)
        # a variance of zero beside a positive radius has underflowed and cannot be used
        if clean and v.min(initial=math.inf) > 0:
            usable: Any = True
            excess = np.maximum(beyond, 0.0) / sigma
        else:
            usable = (beyond > 0) & ((v > 0) | (r == 0)) & finite & spread
            excess = np.where(usable, beyond / sigma, 0.0)
        if x.biased and excess.max(initial=0.0) > CALM:
            excess = np.where(usable, np.maximum(beyond - x.bias, 0.0) / sigma, 0.0)

        self.values += y.size
        self.outside += int(outside.sum())
        # fmax ignores NaN: no error where no error is allowed
        self.worst_error = float(np.fmax.reduce(ratio, initial=self.worst_error))
        self.excess = float(np.fmax.reduce(excess, initial=self.excess))
        sizes = Sizes(error=error, mid=m, variance=v, spacing=spacing, usable=finite & spread)
        self._add_size(sizes.first(counted) if counted < y.size else sizes, x, format)
        at, score = _worst(outside, bounded, np.where(outside, ratio, excess) if outside.any() else excess)
        rank = (bool(outside[at]), score)
        if rank > self.worst_rank or self.worst is None:
            self.worst_rank = rank
            self.worst = Element(
                where=place(at),
                found=float(y[at]),
                expected=float(m[at]),
                low=float(low[at]),
                high=float(high[at]),
                sigma=float(sigma[at]),
            )

    def _add_size(self, sizes: Sizes, x: Enclosure, format: Format) -> None:
        """Count the size and the lean of some errors.   x: the enclosure of these, and of those after them"""
        error, spacing, usable = sizes.error, sizes.spacing, sizes.usable
        total = sizes.variance + (spacing**2 / 12 if format != FLOAT64 else 0.0)
        if x.biased and np.where(usable, error**2 / total - 1, 0.0).sum() > 0:
            # only where errors are larger than expected, because the bias costs a matrix product
            total = total + x.bias[: error.size] ** 2
        weight, delta = 1 / total, -np.sign(sizes.mid) * spacing / 2
        if usable is not True or not total.min(initial=math.inf) > 0:
            weight = np.where(usable & (total > 0), weight, 0.0)
            error, delta = np.where(weight > 0, error, 0.0), np.where(weight > 0, delta, 0.0)
        weighted = error * weight
        self.squares += float((weighted * error).sum())
        self.counted += int(np.count_nonzero(weight))
        if format != FLOAT64:
            self.leaning += float((weighted * delta).sum())
            self.reach += float((delta**2 * weight).sum())

    @property
    def rms(self) -> float:
        """Root mean square of error over standard deviation."""
        return math.sqrt(self.squares / self.counted) if self.counted else 0.0

    @property
    def truncation(self) -> float:
        """The coefficient of the matched filter against truncation."""
        return self.leaning / self.reach if self.reach > 0 else 0.0

    @property
    def snr(self) -> float:
        """The distance between rounding to nearest and truncation, in standard errors."""
        return math.sqrt(self.reach)

    def check(
        self, run: str, tap: str, origin: Origin, limits: Limits, alike: float | None, leans: bool, why: str
    ) -> Check:
        """The check with its verdict.

        alike: the number of values that err alike; None where the tests of size and filter do not apply
        leans: whether the filter applies   why: the reason for undecided values, in words
        """
        enough = alike is not None and self.rows >= ROWS and self.counted > 0
        rms_limit = limits.rms(self.counted, alike) if enough and alike is not None else float("nan")
        reasons = []
        if self.outside:
            kind = f", {self.not_finite} of them not finite" if self.not_finite else ""
            reasons.append(f"{self.outside} of {self.values} values lie outside the legal interval{kind}")
        if self.excess > limits.excess:
            reasons.append(f"a value is {self.excess:.4g} standard deviations from its cell, limit {limits.excess:.1f}")
        if enough and self.rms > rms_limit:
            reasons.append(f"errors are {self.rms:.3g} times their expected size, limit {rms_limit:.3g}")
        if enough and leans and self.snr > SNR and abs(self.truncation) > LEAN:
            toward = "toward zero, as truncation does" if self.truncation > 0 else "away from zero"
            reasons.append(f"errors lean {toward}: {self.truncation:.2f}, where rounding to nearest gives 0")
        if reasons:
            verdict, reason = FAIL, "; ".join(reasons)
        elif self.undecided * 2 > self.values or not self.values:
            verdict, reason = UNDECIDABLE, f"{self.undecided} of {self.values} values have no bound: {why}"
        else:
            rest = f"; {self.undecided} of {self.values} values have no bound: {why}" if self.undecided else ""
            verdict, reason = PASS, f"within what the policy allows{rest}"
        return Check(
            run=run,
            tap=tap,
            since=origin.since,
            rung=origin.rung,
            verdict=verdict,
            reason=reason,
            values=self.values,
            undecided=self.undecided,
            outside=self.outside,
            worst_error=self.worst_error,
            excess=self.excess,
            excess_limit=limits.excess,
            rms=self.rms,
            rms_limit=rms_limit,
            truncation=self.truncation,
            truncation_snr=self.snr,
            worst=self.worst,
        )


def _worst(outside: Any, bounded: Any, score: Any) -> tuple[int, float]:
    """The position of the worst value, and its score: the largest among values outside, else bounded, else any.

    outside: booleans [n]   bounded: booleans [n], or True   score: [n]
    """
    if bounded is True and not outside.any():
        at = int(np.argmax(score))
    else:
        candidates = outside if outside.any() else np.broadcast_to(bounded, outside.shape)
        score = np.fmax(score, 0.0)
        at = int(np.argmax(np.where(candidates, score, -1.0) if candidates.any() else score))
    return at, float(score[at])


def pair(a: Any, b: Any) -> Any:
    """Two arrays in one, so that one call treats both. a, b: [n]   returns: [2, n]"""
    both = np.empty((2, *np.shape(a)))
    both[0], both[1] = a, b
    return both


def _from(place: Place, positions: Any) -> Place:
    """The `Place` of a selection of values.   positions: integers [n], the positions of the selected values"""
    return lambda at: place(int(positions[at]))
