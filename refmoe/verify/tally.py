"""The tests on one tap: hard interval, cell excess, matched filter against truncation, and size of the error.

    hard     the value found lies outside the rounded ends of the interval: impossible under the policy
    excess   the distance from the midpoint to the cell of the value found, in standard deviations: exp(-2 lambda) is
             what the tail of legal sums was measured to stay under, so lambda = ln(2 N / alpha) / 2 for N values
    filter   how far errors lean towards zero, 0 for rounding to nearest and 1 for truncation; 1/2 lies between
    size     the mean square of error over variance; one-sided, since more precision is always legal

A tap may come in pieces; all sums are kept, no arrays are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import FLOAT64, Format, cell, nearest, representable, ulp
from refmoe.verify.findings import FAIL, PASS, UNDECIDABLE, Check, Element

SNR = 26.0
"""The filter speaks where truncation would be this many standard errors away: honest runs then stay within 0.26."""
LEAN = 0.5
"""Halfway between rounding to nearest and truncation."""
ROWS = 30
"""Below this number of rows the errors of a norm, or of equal tokens, are too much alike for size and filter."""
CALM = 5.0
"""Standard deviations below which nobody asks how far a truncating accumulator leans: no limit is as low."""
PIECE = 1 << 16
"""Values tested at once: some thirty temporary arrays of them stay in the cache, however long a tap is."""
LIKE_POINTWISE = 32.0
"""How many values err as one in elementwise steps and in segments up to a layer."""


Place = Callable[[int], tuple[int, ...]]
"""From the position of a value among those given to its index in the tap."""


@dataclass(frozen=True)
class Limits:
    """The thresholds of a whole verification, from one significance split over the tests."""

    significance: float
    values: int
    """How many values all checks hold."""
    tensors: int
    """How many checks there are."""

    @property
    def excess(self) -> float:
        """Standard deviations; a third of the significance, over all values."""
        return math.log(2 * max(self.values, 1) * 3 / self.significance) / 2

    def rms(self, values: int, alike: float) -> float:
        """The largest root mean square of `values` errors of which `alike` err as one; a third, over all tensors."""
        level = self.significance / (3 * max(self.tensors, 1))
        return math.sqrt(1 + 3 * math.sqrt(math.log(1 / level) / (2 * values / alike)))


@dataclass
class Tally:
    """What has been seen of one tap of one run."""

    values: int = 0
    undecided: int = 0
    outside: int = 0
    not_finite: int = 0
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
        self, x: Enclosure, found: Any, policy_format: Format, found_format: Format, place: Place, may_overflow: bool
    ) -> None:
        """Test values. x: before its last rounding, [n]   found: binary64 [n]   place: from position to index

        A value that the policy's dtype holds is tested as rounded to it; another one has been kept more precisely, and
        is tested as rounded to the dtype of the trace.
        """
        with np.errstate(all="ignore"):
            for start in range(0, found.size, PIECE):
                part = slice(start, start + PIECE)
                self._add_piece(x[part], found[part], policy_format, found_format, place, start, may_overflow)

    def _add_piece(
        self, x: Enclosure, found: Any, policy_format: Format, found_format: Format, place: Place, start: int,
        may_overflow: bool,
    ) -> None:  # fmt: skip
        fits = policy_format.holds(found_format) or representable(found, policy_format)
        if np.all(fits):
            self._add(x, found, policy_format, _from(place, range(start, start + found.size)), may_overflow)
            return
        finer = found_format if found_format.precision > policy_format.precision else policy_format
        for chosen, format in ((fits, policy_format), (~fits, finer)):
            at = np.flatnonzero(chosen)
            if at.size:
                self._add(x[at], found[at], format, _from(place, start + at), may_overflow)

    def _add(self, x: Enclosure, y: Any, format: Format, place: Place, may_overflow: bool) -> None:
        # where the operation's own rounding is to this very dtype, it is the last rounding, tested below
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
            # an infinity or NaN where the interval has no end is legal only if something can have overflowed
            outside &= finite | bounded | (not may_overflow)
            outside &= known | (finite & bounded) | (~finite & (not may_overflow))
            spread = spread & known
            self.undecided += int((~(outside | bounded | (spread & finite))).sum())
            self.not_finite += int((outside & ~finite).sum())
            finite = finite & known
        error = y - m if clean else np.where(finite, y - np.where(finite, m, 0.0), np.inf)
        spacing, allowed = ulp(pair(m, np.abs(m) + r), format)
        ratio = np.abs(error) / (r + allowed / 2 if format.precision < 53 else r)
        if not clean:
            # nothing is allowed too little where nothing is known, nor where a legal value is infinite
            ratio = np.where(bounded & (finite | outside), ratio, 0.0)

        start, end = cell(y if clean else np.where(finite, y, 0.0), format)
        beyond = np.maximum(m - end, start - m)
        sigma = np.sqrt(v + (OWN * m) ** 2)
        # a variance that is zero beside a radius that is not has underflowed, and says nothing
        usable = (beyond > 0) & ((v > 0) | (r == 0)) & finite & spread
        excess = np.where(usable, beyond / sigma, 0.0)
        if x.biased and excess.max(initial=0.0) > CALM:
            excess = np.where(usable, np.maximum(beyond - x.bias, 0.0) / sigma, 0.0)

        self.values += y.size
        self.outside += int(outside.sum())
        # fmax passes over the NaN of no error where none is allowed
        self.worst_error = float(np.fmax.reduce(ratio, initial=self.worst_error))
        self.excess = float(np.fmax.reduce(excess, initial=self.excess))
        self._add_size(error, m, v, spacing, format, finite & spread)
        self._keep_worst(outside, bounded, np.where(outside, ratio, excess), y, m, low, high, sigma, place)

    def _add_size(self, error: Any, m: Any, v: Any, spacing: Any, format: Format, usable: Any) -> None:
        total = v + (spacing**2 / 12 if format != FLOAT64 else 0.0)
        weight = np.where(usable & (total > 0), 1 / total, 0.0)
        error = np.where(weight > 0, error, 0.0)
        weighted = error * weight
        self.squares += float((weighted * error).sum())
        self.counted += int(np.count_nonzero(weight))
        if format != FLOAT64:
            delta = np.where(weight > 0, -np.sign(m) * spacing / 2, 0.0)
            self.leaning += float((weighted * delta).sum())
            self.reach += float((delta**2 * weight).sum())

    def _keep_worst(
        self, outside: Any, bounded: Any, score: Any, y: Any, m: Any, low: Any, high: Any, sigma: Any, place: Place
    ) -> None:
        """score: [n], among elements that are outside, else bounded, else any, the largest is the worst."""
        if bounded is True and not outside.any():
            at = int(np.argmax(score))
        else:
            candidates = outside if outside.any() else np.broadcast_to(bounded, y.shape)
            score = np.fmax(score, 0.0)
            at = int(np.argmax(np.where(candidates, score, -1.0) if candidates.any() else score))
        mine = (bool(outside[at]), float(score[at]))
        if mine > self.worst_rank or self.worst is None:
            self.worst_rank = mine
            self.worst = Element(
                place(at), float(y[at]), float(m[at]), float(low[at]), float(high[at]), float(sigma[at])
            )

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.counted) if self.counted else 0.0

    @property
    def truncation(self) -> float:
        return self.leaning / self.reach if self.reach > 0 else 0.0

    @property
    def snr(self) -> float:
        return math.sqrt(self.reach)

    def check(
        self, run: str, tap: str, since: tuple[str, ...], rung: str, limits: Limits, alike: float | None,
        leans: bool, why: str,
    ) -> Check:  # fmt: skip
        """The verdict.   alike: how many values err as one; None where size and filter do not apply.   leans: whether a
        lean of the errors says anything.   why: what makes values undecided, in words."""
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
            run, tap, since, rung, verdict, reason, self.values, self.undecided, self.outside, self.worst_error,
            self.excess, limits.excess, self.rms, rms_limit, self.truncation, self.snr, self.worst,
        )  # fmt: skip


def pair(a: Any, b: Any) -> Any:
    """Two arrays as one, so that both are treated in one call. a, b: [n] -> [2, n]"""
    both = np.empty((2, *np.shape(a)))
    both[0], both[1] = a, b
    return both


def _from(place: Place, positions: Any) -> Place:
    """The same for some of the values.   positions: where they are among all of them"""
    return lambda at: place(int(positions[at]))
