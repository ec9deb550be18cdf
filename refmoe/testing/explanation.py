# SPDX-License-Identifier: Apache-2.0
"""The search for a mistake that explains a failure, by the rule of `refmoe.verifier.diagnosis.fit`.

A mistake is named only if it passes three tests:
1. Its values account for the errors: the residual is small, and nothing contradicts it.
2. Every value found is legal for a kernel with the mistake, by the same check that failed.
3. For other arithmetic, the errors have the size that it predicts.

The first test needs a few rows, the second one all. So most mistakes cost little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, OF_DTYPE, Format, nearest, representable, ulp
from refmoe.profiles.policy import Policy
from refmoe.testing.call import Change, Output, Rearranged, Rounding, Truncated, whole
from refmoe.testing.checking import check, enclosed
from refmoe.verifier.diagnosis.fit import by_size, by_value, contradicted
from refmoe.verifier.diagnosis.observed import Observed, Recorded
from refmoe.verifier.findings import PASS, Check

KEY = ("", "output")
TRIAL = 16
"""Rows on which a mistake is tried first."""
PER_TRIAL = 1 << 28
"""Elements of parameters that a trial may read."""
NAMED = 3
"""The most mistakes that are named. More would say that the arrays cannot tell them apart."""
SIMPLE = 64
"""The largest denominator of a factor that is tried as a fraction."""
FEWEST = 8
"""Columns from which a row can be recognised in another place."""
SEARCHED = 1 << 22
"""Pairs of wrong and right rows that are compared."""


@dataclass(frozen=True)
class Failure:
    """A failed check with its material."""

    output: Output
    policy: Policy
    significance: float
    x: Enclosure
    """The enclosure of the output."""
    check: Check

    @property
    def format(self) -> Format:
        return self.policy.at(self.output.step)

    @cached_property
    def right(self) -> Enclosure:
        """The enclosure in arrays of the full shape."""
        return whole(self.x)

    @cached_property
    def found(self) -> NDArray[Any]:
        """The values found, in binary64."""
        return np.asarray(self.output.found, np.float64)

    @cached_property
    def interval(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The ends of the legal interval of each value."""
        x = self.x if self.x.biased or (self.x.owed and self.format == self.x.accumulation) else self.right
        with np.errstate(all="ignore"):
            radius = np.broadcast_to(np.asarray(x.r), x.shape)
            return nearest(x.mid - radius, self.format), nearest(x.mid + radius, self.format)

    @cached_property
    def spacing(self) -> NDArray[Any]:
        """The distance of two values at the right one: of the coarser dtype, if the values found have it."""
        return ulp(np.where(np.isfinite(self.right.mid), self.right.mid, 0.0), self.format)

    @cached_property
    def room(self) -> NDArray[Any]:
        """The error from which a value is certainly seen by itself."""
        with np.errstate(all="ignore"):
            spread = self.check.excess_limit * np.sqrt(self.right.v + (OWN * self.right.mid) ** 2)
            return np.asarray(self.spacing + np.fmin(self.right.r, spread))

    @cached_property
    def wrong(self) -> NDArray[Any]:
        """The values that are impossible or improbable by themselves: booleans of the output's shape."""
        low, high = self.interval
        y = self.found
        with np.errstate(all="ignore"):
            fits = representable(y, self.format)
            outside = np.where(fits, ~((y >= low) & (y <= high)), ~(np.abs(y - self.right.mid) <= self.right.r))
            sigma = np.sqrt(self.right.v + (OWN * self.right.mid) ** 2)
            half = np.where(fits, self.spacing, ulp(y, OF_DTYPE[self.output.found.dtype])) / 2
            far = np.abs(y - self.right.mid) - half > self.check.excess_limit * sigma
        known = np.isfinite(self.right.mid)
        return np.asarray((outside | far) & known)

    @cached_property
    def wrong_rows(self) -> NDArray[Any]:
        """The rows with a wrong value: integers [n]."""
        return np.flatnonzero(self.wrong.reshape(len(self.found), -1).any(1))

    @cached_property
    def trial(self) -> NDArray[Any]:
        """The rows on which mistakes are tried: wrong ones first, and others."""
        most = int(np.clip(PER_TRIAL // max(self.output.cost, 1), 2, TRIAL))
        count = len(self.found)
        others = np.linspace(0, count - 1, min(most, count)).astype(np.int64)
        spread = (
            self.wrong_rows[np.linspace(0, len(self.wrong_rows) - 1, most // 2).astype(np.int64)]
            if len(self.wrong_rows)
            else others
        )
        return np.unique(np.concatenate([spread, others[: most - len(np.unique(spread))]]))

    def observed(self, at: Any) -> Observed:
        """The values of some rows beside their enclosures."""
        mid, variance = self.right.mid[at].reshape(-1), np.asarray(self.right.v)[at].reshape(-1)
        return Observed(
            found=self.found[at].reshape(-1),
            mid=mid,
            variance=variance + (OWN * mid) ** 2,
            format=self.format,
            read=np.ones((), bool),
            wrong=self.wrong[at].reshape(-1),
            passes=False,
            as_stored=True,
        )


@dataclass(frozen=True)
class Explanation:
    """The mistakes that explain a failure, and those that the arrays cannot show."""

    names: tuple[str, ...]
    unseen: tuple[str, ...]
    """The mistakes that these arrays would not show."""
    tried: int
    """The number of mistakes that were tried."""


def explain(failure: Failure) -> Explanation:
    """Name the mistakes that explain a failure, and those that these arrays would not show."""
    trial = failure.trial
    observed = {KEY: failure.observed(trial)}
    room = failure.room[trial].reshape(-1)
    candidates: list[tuple[float, Change]] = []
    unseen: list[str] = []
    tried = 0
    with np.errstate(all="ignore"):
        for change in failure.output.changes():
            tried += 1
            mid = _values(change, trial, failure.policy)
            if not (np.abs(mid - observed[KEY].mid) > room).any() and np.isfinite(mid).all():
                unseen.append(change.name)
                continue
            residual = _residual(observed, mid)
            if residual is not None:
                candidates.append((residual, change))
        for change in structures(failure):
            residual = _residual(observed, _values(change, trial, failure.policy))
            if residual is not None:
                candidates.append((residual, change))
        names = _proven(failure, candidates)
        if not names:
            names = [each.name for each in roundings(failure) if _has_size(failure, each)]
    return Explanation(tuple(names[:NAMED]), tuple(unseen), tried)


def _values(change: Change, rows: NDArray[Any], policy: Policy) -> NDArray[Any]:
    """The exact values of some rows with a mistake, [n]."""
    x, _ = enclosed(change.call.some(rows), policy)
    return x.mid.reshape(-1)


def _residual(observed: dict[Any, Observed], mid: NDArray[Any]) -> float | None:
    """The residual of predicted values; None if they do not explain the errors."""
    predicted = {KEY: mid}
    fit = by_value(observed, [KEY], predicted)
    return fit.residual if fit.explains and contradicted(observed, predicted) is None else None


def _proven(failure: Failure, candidates: list[tuple[float, Change]]) -> list[str]:
    """The names of the mistakes with which all values are legal, the best fit first."""
    names: list[str] = []
    for _, change in sorted(candidates, key=lambda each: each[0]):
        if len(names) == NAMED:
            break
        x, may_overflow = enclosed(change.call, failure.policy)
        again = check(failure.output, x, failure.policy, failure.significance, may_overflow)
        if again.verdict == PASS and not again.undecided and change.name not in names:
            names.append(change.name + (f" (known bug {change.bug})" if change.bug else ""))
    return names


# ---- the right values elsewhere


def structures(failure: Failure) -> Iterator[Change]:
    """Mistakes that the values found suggest: rows of zeros, rows or columns that moved, a factor, truncation."""
    output, found, mid = failure.output, failure.found, failure.right.mid
    count, call = len(found), output.call
    if not np.isfinite(mid).all():
        return
    own = np.arange(count)
    yield Change("values are cut off toward zero where they are stored, not rounded", Truncated(call, output.step))
    flat, right = found.reshape(count, -1), mid.reshape(count, -1)
    zero = np.flatnonzero((flat == 0).all(1) & (right != 0).any(1))
    if zero.size:
        yield Change(f"{_listed(zero, 'row')} zeros", Rearranged(call, np.where(np.isin(own, zero), -1, own)))
    if mid.ndim == 2:
        empty = np.flatnonzero((found == 0).all(0) & (mid != 0).any(0))
        if empty.size and not (found == 0).all():
            columns = np.where(np.isin(np.arange(mid.shape[1]), empty), -1, np.arange(mid.shape[1]))
            yield Change(f"{_listed(empty, 'column')} zeros", Rearranged(call, own, columns))
    if np.isfinite(found).all():
        yield from _factors(failure, own)
        yield from _moved_rows(failure, flat, right, own)
        if mid.ndim == 2 and mid.shape[0] >= FEWEST:
            yield from _moved_columns(failure, found, mid, own)


def _factors(failure: Failure, own: NDArray[Any]) -> Iterator[Change]:
    """All values times one number."""
    weight = 1 / np.maximum(failure.spacing, np.finfo(float).tiny)
    y, m = (failure.found * weight).reshape(-1), (failure.right.mid * weight).reshape(-1)
    reach = float(m @ m)
    if not (np.isfinite(reach) and reach > 0):
        return
    factor = float(y @ m) / reach
    if not 2.0**-40 < abs(factor) < 2.0**40 or factor == 1:
        return
    nice = Fraction(factor).limit_denominator(SIMPLE)
    tries = [(float(nice), str(nice))] if nice else []
    if abs(factor) < 1:
        inverse = Fraction(1 / factor).limit_denominator(SIMPLE)
        tries += [(float(1 / inverse), f"1/({inverse})" if inverse.denominator > 1 else f"1/{inverse}")]
    for value, words in dict(tries).items():
        if value not in (0.0, 1.0) and abs(value - factor) <= 1e-2 * abs(factor):
            yield Change(
                f"all values are {words} of the right ones", Rearranged(failure.output.call, own, factor=value)
            )
    yield Change(f"all values are {factor:.6g} of the right ones", Rearranged(failure.output.call, own, factor=factor))


def _nearest_rows(wrong: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """The row of `right` that is nearest to each row of `wrong`: integers [n].   wrong: [n, m]   right: [t, m]"""
    distance = (right**2).sum(1)[None, :] - 2 * (wrong @ right.T)
    return np.asarray(distance.argmin(1))


def _moved_rows(failure: Failure, flat: NDArray[Any], right: NDArray[Any], own: NDArray[Any]) -> Iterator[Change]:
    """Rows that have the result of other rows."""
    wrong = failure.wrong_rows
    if not wrong.size or flat.shape[1] < FEWEST or len(wrong) * len(flat) > SEARCHED:
        return
    source = own.copy()
    source[wrong] = _nearest_rows(flat[wrong], right)
    if (source == own).all():
        return
    moved = np.flatnonzero(source != own)
    shift = np.unique(source[moved] - moved)
    if len(np.unique(source[moved])) == 1 and len(moved) > 1:
        words = f"{_listed(moved, 'row', 'have')} the result of row {source[moved][0]}"
    elif len(shift) == 1 and len(moved) > 1:
        side = "after" if shift[0] > 0 else "before"
        words = f"{_listed(moved, 'row', 'have')} the result of the row {abs(shift[0])} {side}"
    else:
        words = f"{_listed(moved, 'row', 'have')} the results of {_listed(source[moved], 'row', '').strip()}"
    yield Change(words, Rearranged(failure.output.call, source))


def _moved_columns(failure: Failure, found: NDArray[Any], mid: NDArray[Any], own: NDArray[Any]) -> Iterator[Change]:
    """Columns that have the result of other columns."""
    wrong = np.flatnonzero(failure.wrong.any(0))
    rows = failure.trial if len(failure.trial) >= FEWEST else np.arange(min(len(found), TRIAL))
    if not wrong.size or len(wrong) * mid.shape[1] > SEARCHED:
        return
    source = np.arange(mid.shape[1])
    source[wrong] = _nearest_rows(found[rows].T[wrong], mid[rows].T)
    moved = np.flatnonzero(source != np.arange(mid.shape[1]))
    if moved.size:
        words = f"{_listed(moved, 'column', 'have')} the results of {_listed(source[moved], 'column', '').strip()}"
        yield Change(words, Rearranged(failure.output.call, own, source))


def _listed(places: NDArray[Any], noun: str, verb: str = "are") -> str:
    """Places in words, such as "rows 3 to 7 are"."""
    count = len(places)
    if count == 1:
        one = {"are": "is", "have": "has"}.get(verb, verb)
        return f"{noun} {places[0]} {one}".rstrip() if verb else f"{noun} {places[0]}"
    if (np.diff(places) == 1).all():
        text = f"{noun}s {places[0]} to {places[-1]}"
    else:
        shown = ", ".join(str(each) for each in places[:5])
        text = f"{noun}s {shown}{', ...' if count > 5 else ''} ({count})"
    return f"{text} {verb}".rstrip()


# ---- other arithmetic


def roundings(failure: Failure) -> Iterable[Rounding]:
    """The arithmetic of coarser kernels: their sums, or the values between two steps."""
    policy, output = failure.policy, failure.output
    for format in (FLOAT16, BFLOAT16):
        if format.precision < policy.accumulation.precision:
            coarse = replace(policy, accumulation=format)
            yield Rounding(f"sums and products are kept in {format}", coarse)
    for cut in output.cuts:
        for format in (FLOAT16, BFLOAT16):
            if format.precision < policy.at(cut).precision:
                changed = replace(policy, cuts={**policy.cuts, cut: format})
                yield Rounding(f"{cut} is stored in {format}", changed)
    for format in (FLOAT16, BFLOAT16):
        if format.precision < policy.at(output.step).precision:
            changed = replace(policy, cuts={**policy.cuts, output.step: format})
            yield Rounding(f"the output is rounded to {format}", changed)


def _has_size(failure: Failure, rounding: Rounding) -> bool:
    """Whether the errors have the size that other arithmetic predicts, and all values are legal under it."""
    x, may_overflow = enclosed(failure.output.call, rounding.policy)
    again = check(failure.output, x, rounding.policy, failure.significance, may_overflow)
    if again.verdict != PASS or again.undecided:
        return False
    new, everything = whole(x), np.arange(len(failure.found))
    last = ulp(new.mid, rounding.policy.at(failure.output.step)) ** 2 / 12
    own = failure.spacing**2 / 12
    recorded = Recorded(
        mid=new.mid.reshape(-1),
        variance=np.maximum(np.asarray(new.v) + last - own, 0.0).reshape(-1),
        radius=np.asarray(new.r).reshape(-1),
        found=failure.found.reshape(-1),
        read=np.ones((), bool),
    )
    return by_size({KEY: failure.observed(everything)}, [KEY], {KEY: recorded}).explains
