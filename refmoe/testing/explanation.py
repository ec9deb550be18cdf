# SPDX-License-Identifier: Apache-2.0
"""The search for a mistake that explains a failure, by the rule of `refmoe.verifier.diagnosis.fit`.

A mistake is named only if it passes two tests:
1. Its values account for the errors: the residual is small, and nothing contradicts it.
2. Every value found is legal for a kernel with the mistake, by the same check that failed.

The first test needs a few rows, the second one all. So most mistakes cost little. Coarser sums predict no values, so
only the size of the errors is stated for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, OF_DTYPE, Format, nearest, representable, ulp
from refmoe.profiles.policy import Policy
from refmoe.testing.call import Change, Output
from refmoe.testing.checking import check, enclosed
from refmoe.testing.structures import Masked, Rearranged, Rounded, StoredBetween, Truncated, whole
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
NEAR = 1e-4
"""The relative distance of a factor from the fraction that is tried for it."""
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
    size: str = ""
    """The dtype whose arithmetic makes errors of this size, where no mistake explains them."""


def explain(failure: Failure) -> Explanation:
    """Name the mistakes that explain a failure, and those that these arrays would not show."""
    trial = failure.trial
    observed = {KEY: failure.observed(trial)}
    room = failure.room[trial].reshape(-1)
    candidates: list[tuple[float, Change]] = []
    unseen: list[str] = []
    tried: set[str] = set()
    with np.errstate(all="ignore"):
        for change in failure.output.changes():
            if change.name in tried:
                continue
            tried.add(change.name)
            mid = _values(change, trial, failure.policy)
            if not (np.abs(mid - observed[KEY].mid) > room).any() and np.isfinite(mid).all():
                if _nowhere(failure, change):
                    unseen.append(change.name)
            else:
                candidates += _fits(observed, change, mid)
        names = _proven(failure, candidates)
        for others in (structures, roundings):
            if not names:
                tries = [(change, _values(change, trial, failure.policy)) for change in others(failure)]
                names = _proven(failure, [each for change, mid in tries for each in _fits(observed, change, mid)])
        names = names or plain_facts(failure)
        size = "" if names else size_of(failure)
    return Explanation(names=tuple(names[:NAMED]), unseen=tuple(unseen), tried=len(tried), size=size)


def _nowhere(failure: Failure, change: Change) -> bool:
    """Whether a mistake that some rows do not show shows in no row. A very large call is not looked at again."""
    everything = np.arange(len(failure.found))
    if len(everything) * max(failure.output.cost, 1) > PER_TRIAL:
        return False
    mid = _values(change, everything, failure.policy).reshape(failure.found.shape)
    return not (np.abs(mid - failure.right.mid) > failure.room).any()


def _values(change: Change, rows: NDArray[Any], policy: Policy) -> NDArray[Any]:
    """The exact values of some rows with a mistake, [n]."""
    x, _ = enclosed(change.call.some(rows), policy)
    return np.asarray(x.mid.reshape(-1))


def _fits(observed: dict[Any, Observed], change: Change, mid: NDArray[Any]) -> list[tuple[float, Change]]:
    """The mistake with the residual of its predicted values, or nothing if these do not explain the errors."""
    predicted = {KEY: mid}
    fit = by_value(observed, [KEY], predicted)
    explains = fit.explains and contradicted(observed, predicted) is None
    return [(fit.residual, change)] if explains else []


def _proven(failure: Failure, candidates: list[tuple[float, Change]]) -> list[str]:
    """The names of the mistakes with which all values are legal, the best fit first."""
    names: list[str] = []
    for _, change in sorted(candidates, key=lambda each: each[0]):
        if len(names) == NAMED:
            break
        x, may_overflow = enclosed(change.call, failure.policy)
        again = check(failure.output, x, failure.policy, failure.significance, may_overflow)
        if again.verdict == PASS and not again.undecided:
            names.append(change.name + (f" (known bug {change.bug})" if change.bug else ""))
    return names


# ---- the right values elsewhere


def structures(failure: Failure) -> Iterator[Change]:
    """Mistakes that the values found suggest: zeros, rows or columns that moved, a factor."""
    found, mid = failure.found, failure.right.mid
    if not np.isfinite(mid).all():
        return
    yield from _zeros(failure)
    if np.isfinite(found).all():
        if not failure.output.leans:
            yield from _factors(failure)
        yield from _moved_rows(failure)
        if mid.ndim == 2 and mid.shape[0] >= FEWEST:
            yield from _moved_columns(failure)


def _zeros(failure: Failure) -> Iterator[Change]:
    """Zeros in some rows, heads or columns, or in a block of them."""
    zero = (failure.found == 0) & (failure.right.mid != 0)
    if not zero.any():
        return
    axes = tuple(range(zero.ndim))
    inside = [zero.any(tuple(each for each in axes if each != axis)) for axis in axes]
    block = np.ones(zero.shape, bool)
    for axis, here in enumerate(inside):
        block &= here.reshape([-1 if each == axis else 1 for each in axes])
    if (block & ~zero & (failure.right.mid != 0)).any():
        return
    nouns = ["row", *["head"] * (zero.ndim - 2), "column"][: zero.ndim]
    parts = [
        _listed(np.flatnonzero(here), noun, "") for here, noun in zip(inside, nouns, strict=True) if not here.all()
    ]
    yield Change(f"{', '.join(parts) or 'all values'}: zeros", Masked(failure.output.call, ~block))


def _factors(failure: Failure) -> Iterator[Change]:
    """All values times one number."""
    weight = 1 / np.maximum(failure.spacing, np.finfo(float).tiny)
    y, m = (failure.found * weight).reshape(-1), (failure.right.mid * weight).reshape(-1)
    reach = float(m @ m)
    if not (np.isfinite(reach) and reach > 0):
        return
    factor, own = float(y @ m) / reach, np.arange(len(failure.found))
    if not 2.0**-40 < abs(factor) < 2.0**40 or factor == 1:
        return
    nice = [Fraction(factor).limit_denominator(SIMPLE)]
    if 0 < abs(factor) < 1:
        nice.append(1 / Fraction(1 / factor).limit_denominator(SIMPLE))
    tries = {float(each): str(each) for each in nice if abs(float(each) - factor) <= NEAR * abs(factor)}
    for value, words in (tries or {factor: f"{factor:.6g}"}).items():
        moved = Rearranged(failure.output.call, own, factor=value)
        yield Change(f"all values are {words} times the right ones", moved)


def _nearest_rows(wrong: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """The row of `right` that is nearest to each row of `wrong`: integers [n].   wrong: [n, m]   right: [t, m]"""
    distance = (right**2).sum(1)[None, :] - 2 * (wrong @ right.T)
    return np.asarray(distance.argmin(1))


def _moved_rows(failure: Failure) -> Iterator[Change]:
    """Rows that have the result of other rows."""
    count, wrong = len(failure.found), failure.wrong_rows
    flat, right = failure.found.reshape(count, -1), failure.right.mid.reshape(count, -1)
    if not wrong.size or flat.shape[1] < FEWEST or len(wrong) * count > SEARCHED:
        return
    own = np.arange(count)
    source = own.copy()
    source[wrong] = _nearest_rows(flat[wrong], right)
    if (source == own).all():
        return
    moved = np.flatnonzero(source != own)
    subject = _listed(moved, "row", "have")
    shift = np.unique((source[moved] - moved) % count)
    if len(np.unique(source[moved])) == 1:
        words = f"{subject} the result of row {source[moved][0]}"
    elif len(shift) == 1:
        back = int(shift[0]) > count // 2
        words = (
            f"{subject} the result of the row {count - shift[0] if back else shift[0]} {'before' if back else 'after'}"
        )
    else:
        words = f"{subject} the results of {_listed(source[moved], 'row', '')}"
    yield Change(words, Rearranged(failure.output.call, source))


def _moved_columns(failure: Failure) -> Iterator[Change]:
    """Columns that have the result of other columns."""
    found, mid = failure.found, failure.right.mid
    wrong = np.flatnonzero(failure.wrong.any(0))
    rows = failure.trial if len(failure.trial) >= FEWEST else np.arange(min(len(found), TRIAL))
    if not wrong.size or len(wrong) * mid.shape[1] > SEARCHED:
        return
    source = np.arange(mid.shape[1])
    source[wrong] = _nearest_rows(found[rows].T[wrong], mid[rows].T)
    moved = np.flatnonzero(source != np.arange(mid.shape[1]))
    if moved.size:
        words = f"{_listed(moved, 'column', 'have')} the results of {_listed(source[moved], 'column', '')}"
        yield Change(words, Rearranged(failure.output.call, np.arange(len(found)), source))


def _listed(places: NDArray[Any], noun: str, verb: str) -> str:
    """Places in words, such as "rows 3 to 7 have"."""
    if len(places) == 1:
        text, verb = f"{noun} {places[0]}", "has" if verb else ""
    elif (np.diff(places) == 1).all():
        text = f"{noun}s {places[0]} to {places[-1]}"
    else:
        shown = ", ".join(str(each) for each in places[:5])
        text = f"{noun}s {shown}{', ...' if len(places) > 5 else ''} ({len(places)})"
    return f"{text} {verb}".rstrip()


# ---- other arithmetic


def roundings(failure: Failure) -> Iterator[Change]:
    """Values that are cut off or rounded more coarsely than the policy says, where they are stored or before."""
    policy, output = failure.policy, failure.output
    for format in (failure.format, FLOAT16, BFLOAT16):
        if failure.format.holds(format) and representable(failure.found, format).all():
            name = f"values are cut off to {format}, toward zero, not rounded to nearest"
            if not output.leans:
                yield Change(name, Truncated(output.call, format))
            if format != failure.format:
                yield Change(f"the output is rounded to {format}", Rounded(output.call, format))
    for cut in output.cuts:
        for format in (FLOAT16, BFLOAT16):
            if format.precision < policy.at(cut).precision:
                yield Change(f"{cut} is stored in {format}", StoredBetween(output.call, cut, format))


def plain_facts(failure: Failure) -> list[str]:
    """Plain words for values that no computation from the inputs gives: one constant, or an input."""
    found = failure.output.found
    if np.isnan(failure.found).all():
        return ["all values are not a number"]
    for name, array in failure.output.inputs.items():
        if array.shape == found.shape and np.array_equal(array.astype(np.float64), failure.found):
            return [f"the output is the input {name}"]
    if found.size > 1 and (failure.found == failure.found.flat[0]).all():
        return [f"all values are {failure.found.flat[0]:g}"]
    return []


def size_of(failure: Failure) -> str:
    """The coarser dtype whose arithmetic makes errors of this size, or nothing.

    The order of a sum is not known, so no value can be predicted. So this is no explanation.
    """
    policy = failure.policy
    for format in (FLOAT16, BFLOAT16):
        if format.precision < policy.accumulation.precision and _has_size(
            failure, replace(policy, accumulation=format)
        ):
            return str(format)
    return ""


def _has_size(failure: Failure, policy: Policy) -> bool:
    """Whether the errors have the size that other arithmetic predicts, and all values are legal under it."""
    x, may_overflow = enclosed(failure.output.call, policy)
    again = check(failure.output, x, policy, failure.significance, may_overflow)
    if again.verdict != PASS or again.undecided:
        return False
    new = whole(x)
    recorded = Recorded(
        mid=new.mid.reshape(-1),
        variance=np.asarray(new.v).reshape(-1),
        radius=np.asarray(new.r).reshape(-1),
        found=failure.found.reshape(-1),
        read=np.ones((), bool),
    )
    observed = {KEY: failure.observed(np.arange(len(failure.found)))}
    return by_size(observed, [KEY], {KEY: recorded}).explains
