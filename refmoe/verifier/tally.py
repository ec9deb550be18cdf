# SPDX-License-Identifier: Apache-2.0
"""The tests on one tap: legal interval, cell excess, matched filter against truncation, and size of the error.

    interval  A value outside the rounded ends of the legal interval is impossible under the policy.
    excess    The distance from the midpoint to the cell of the value found, in standard deviations. The limit is
              lambda = ln(2 N / alpha) / 2 for N values: the measured tail of legal sums stays under exp(-2 lambda).
    filter    The lean of the errors towards zero: 0 for rounding to nearest, 1 for truncation. The limit is 1/2.
    size      The mean square of error over variance. The test is one-sided, because more precision is always legal.

Where the variance of a product costs more products, a part of it is known first. Then the rest of it, and the bias of a
truncating accumulator, count only where errors are larger than that part lets expect. No limit is as low. So the
figures of smaller errors are upper bounds.

A tap may come in pieces. The tally keeps sums and no arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FLOAT64, Format, representable
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Check, Element
from refmoe.verifier.provenance import Origin
from refmoe.verifier.values import Sizes, Values, judged, measured

SNR = 26.0
"""The filter applies if truncation would be this many standard errors away. Honest runs then stay within 0.26."""
LEAN = 0.5
"""Halfway between rounding to nearest and truncation."""
ROWS = 30
"""Below this number of rows, errors of a norm or of equal tokens are too similar for the tests of size and filter."""
PIECE = 1 << 13
"""Values tested at once: the temporary arrays of this length fit in the second-level cache."""
FEW = 1 << 11
"""The most values that are judged whole: for them, the calls of two passes take longer than their operations."""
CALM = 0.5
"""The share of its limit up to which a figure may be an upper bound, and the whole spread is not computed for it."""
LIKE_POINTWISE = 32.0
"""The number of values that err alike in elementwise steps and in segments up to a layer."""

Place = Callable[[int], tuple[int, ...]]
"""The function from the position of a value in a block to its index in the tap."""


@dataclass(frozen=True)
class Calm:
    """The figures up to which the whole spread of errors is not computed. By default it always is."""

    excess: float = 0.0
    """Standard deviations."""
    squares: float = -math.inf
    """Roots of N by which the sum of N squares exceeds N."""


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
    def calm(self) -> Calm:
        """The figures that are far below these limits."""
        return Calm(excess=CALM * self.excess, squares=CALM * 3 * math.sqrt(math.log(1 / self._level) / 2))

    @property
    def _level(self) -> float:
        """The significance of the test of size of a tensor: a third of the whole is split over all tensors."""
        return self.significance / (3 * max(self.tensors, 1))

    @property
    def part(self) -> float:
        """The significance of each of the three tests against replicas. Together they have a third of the whole."""
        return self.significance / 9

    def rms(self, values: int, alike: float) -> float:
        """The limit of the root mean square of `values` errors, of which `alike` at a time are equal."""
        return math.sqrt(1 + 3 * math.sqrt(math.log(1 / self._level) / (2 * values / alike)))


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
    calm: Calm = Calm()

    def add(
        self, x: Enclosure, found: Any, policy_format: Format, found_format: Format, place: Place, may_overflow: bool,
        counted: int | None = None,
    ) -> None:  # fmt: skip
        """Test values against their enclosure.

        x: the enclosure before the last rounding, [n]   found: floats [n]   place: from position to index
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
                    x if found.size <= PIECE else x[part], np.asarray(found[part], np.float64), policy_format,
                    found_format, place, start, may_overflow, counted - start,
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
                first, held = int(np.searchsorted(at, counted)), chosen is fits or format is found_format
                self._add(x[at], found[at], format, _from(place, start + at), may_overflow, first, held)

    def _add(
        self, x: Enclosure, y: Any, format: Format, place: Place, may_overflow: bool, counted: int, held: bool = True
    ) -> None:  # fmt: skip
        """Test values as rounded to a dtype.   held: whether that dtype has all of them"""
        # if the operation rounds its result to this very dtype, that rounding is the last one, tested below
        before = x if x.biased or (x.owed and format == x.accumulation) else x.settle()
        least = 0.0 if before.least_variance is None else before.least_variance
        values = Values(
            found=y, mid=before.mid, radius=np.asarray(before.r), variance=np.asarray(least), format=format,
            later=(lambda: (x.v, x.bias if x.biased else 0.0)) if before.defers else None,
            calm=self.calm.excess,
        )  # fmt: skip
        self.values += y.size
        calm = measured(values, self.worst_error, self.excess) if held and y.size > FEW else None
        if calm is None:
            tested = judged(values, may_overflow)
        sizes = tested.sizes if calm is None else calm.sizes
        self._add_size(sizes.first(counted) if counted < y.size else sizes, values.later, format)
        if calm is not None:
            # where no value has any excess, the first one is shown
            suspects = calm.suspects if self.worst is not None else np.union1d(calm.suspects, 0)
            if not suspects.size:
                return
            values, place = values.at(suspects), _from(place, suspects)
            tested = judged(values, may_overflow)
        self.undecided += tested.undecided
        self.outside += int(tested.outside.sum())
        self.not_finite += tested.not_finite
        self.gaps += tested.gaps
        # fmax ignores NaN: no error where no error is allowed
        self.worst_error = float(np.fmax.reduce(tested.ratio, initial=self.worst_error))
        self.excess = float(np.fmax.reduce(tested.excess, initial=self.excess))
        at, score = tested.worst()
        rank = (bool(tested.outside[at]), score)
        if rank > self.worst_rank or self.worst is None:
            self.worst_rank = rank
            self.worst = Element(
                where=place(at),
                found=float(values.found[at]),
                expected=float(values.mid[at]),
                low=float(tested.low[at]),
                high=float(tested.high[at]),
                sigma=float(tested.sigma[at]),
            )

    def _add_size(self, sizes: Sizes, later: Callable[[], tuple[Any, Any]] | None, format: Format) -> None:
        """Count the size and the lean of some errors.   later: as in `Values`, of these values and of those after"""
        if not sizes.error.size:
            return
        stored = sizes.spacing * sizes.spacing * (1 / 12) if format != FLOAT64 else 0.0
        found = sizes.weighed(sizes.variance + stored)
        count = self.counted + found.counted
        if later is not None and self.squares + found.squares - count > self.calm.squares * math.sqrt(count):
            variance, shift = (part[: sizes.error.size] if np.ndim(part) else part for part in later())
            found = sizes.weighed(variance + shift**2 + stored)
        self.squares += found.squares
        self.counted += found.counted
        if format != FLOAT64:
            self.leaning += found.leaning
            self.reach += found.reach

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


def _from(place: Place, positions: Any) -> Place:
    """The `Place` of a selection of values.   positions: integers [n], the positions of the selected values"""
    return lambda at: place(int(positions[at]))
