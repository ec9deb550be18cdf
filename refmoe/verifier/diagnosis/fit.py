# SPDX-License-Identifier: Apache-2.0
"""How well a changed specification accounts for the errors of a trace: one rule, with one threshold.

A change explains by the values that it predicts, not by what it allows. Let b be the distance from the specification's
value to the cell of the value found: the real numbers that round to it. Let b' be the distance from the changed value.
The residual is norm(b') / norm(b) over all values of the failed checks, in units of their spacing.

    predicts  The residual must be at most LEFT = sqrt(1/2), so that at most half of the mean square is left. That is
              halfway between an error that is all predicted (0) and one to which the change is indifferent (1). A
              change that only widens intervals leaves b' = b.
    own       The values left must also pass as its own rounding: every failed check passes in its own enclosures.
    far       Where the trace lacks inputs of a failed step, those enclosures are wide, and unlike causes have like
              effects. There the residual must be at most FAR = 1/2. Above CLEAR = 1/8, what is left must also be at
              most TWICE what the roundings of one ideal engine with the change make. Another engine makes as much.
    chance    Above CLEAR, the agreement must be no accident either. Let n be the number of values that carry the error:
              sum(b^2)^2 / sum(b^4). An effect that has no relation to the error, in direction or size, leaves r or less
              with a probability below r^n. That must be at most 2^-CHANCE = 2^-27, which is one in a million for a
              catalogue of 128 causes.
    nowhere   In each check, failed or passed, where its effect is beyond what rounding hides, the matched filter must
              lean to it by more than LEAN = 1/2. The effect counts beyond CALM = 5 standard deviations a value, and
              from SNR = 26 in all, as in the test of truncation.

Some changes predict no value, but only the size of errors: sums in another order and dtype, noise. Let z be the error
over its predicted deviation. A deviation is an upper size: legal errors are SMALLEST = 0.25 to LARGEST = 1.15 of it.
Let CENTRE be the geometric mean of the two, and R the factor from it to either, times 1 + 3 / sqrt(2 n): three standard
errors of a size estimated from n values. The residual is LEFT abs(ln z / CENTRE) / ln R. A bug that makes noise of a
known size has 1 for CENTRE. The residual is the worst over each step in each call, over each step in each layer, and
over all failed checks. Only values count for which the change predicts errors twice as large as the policy does. z
is taken as a root mean square and as a mean: a single large value makes the two disagree. A size counts only where the
trace has all inputs of each failed step: further on, any change of arithmetic makes errors of about any size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.spec.taps import layer_of, step_of
from refmoe.verifier.diagnosis.observed import FARTHEST, Observed, Recorded
from refmoe.verifier.passes import Key
from refmoe.verifier.tally import LEAN, SNR

LEFT = math.sqrt(0.5)
"""The largest residual of an explanation."""
FAR = 0.5
"""The largest residual of an explanation where inputs of a failed step are lacking."""
CLEAR = 0.125
"""The largest residual that suffices there by itself."""
TWICE = 2.0
"""The most that may be left there above it, over what the change's own rounding makes."""
CALM = 5.0
"""Standard deviations that an effect has to exceed at a value, to be looked for there."""
CHANCE = 27.0
"""The negative logarithm, to base 2, of the largest probability that a change explains such a trace by accident."""
SIZE = 4.0
"""The most that may be left where nothing bounds it, over what one ideal engine's rounding makes."""
SMALLEST, LARGEST = 0.25, 1.15
"""The sizes of legal errors over their deviations, as `python -m bench.enclosures` measures them."""
WIDER = 2.0
"""A change predicts the size of errors where its deviation is this many times that of the policy."""
FEWEST = 8
"""The fewest values from which a size is estimated."""
CENTRE = math.sqrt(SMALLEST * LARGEST)
"""The size of errors, over their deviation, that a change of their size alone predicts."""
REACH = math.sqrt(LARGEST / SMALLEST)
"""The factor up to which that size is known."""
WHOLE = ("", "")
"""The name of the group of all failed checks."""
HALF_NORMAL = math.sqrt(2 / math.pi)
"""The mean absolute value of a normal variable with deviation 1."""


@dataclass(frozen=True)
class Fit:
    """The account of a changed specification for errors."""

    coefficient: float
    residual: float
    steps: frozenset[str] = frozenset()
    """Of sizes: the steps whose errors are larger than those that the policy allows."""
    carriers: float = math.inf
    """Of values: how many of them carry the error."""

    @property
    def explains(self) -> bool:
        """Whether the change leaves little enough."""
        return self.residual <= LEFT

    @property
    def bits(self) -> float:
        """The negative logarithm, to base 2, of the probability that a change leaves as little by accident."""
        return -self.carriers * math.log2(self.residual) if self.residual else math.inf


NOTHING = Fit(math.nan, math.inf)
"""The fit of a change that accounts for nothing."""


def by_value(observed: Mapping[Key, Observed], failed: Iterable[Key], changed: Mapping[Key, Any]) -> Fit:
    """The fit of predicted values.   failed: the taps that count   changed: the predicted values at these taps, [n]

    Values that are not finite must be predicted as such, in the same places.
    """
    before = after = along = reach = 0.0
    whole_before = whole_after = choices = missed = gaps = 0.0
    beyond: list[Any] = []
    whole: list[Any] = []
    for key in failed:
        right, mid = observed[key], changed.get(key)
        if mid is None or mid.shape != right.mid.shape:
            return NOTHING
        if right.choice:
            choices += float(right.wrong.sum())
            missed += float((right.wrong & (right.found != mid).any(-1)).sum())
            continue
        here, there = right.gaps, ~np.isfinite(mid)
        if ((here != there) & right.read).any():
            return NOTHING
        gaps += float(here.sum())
        if here.any() and not (right.wrong & ~here).any():
            continue  # it fails by its gaps alone; the errors of its other values are those of rounding
        e, d = right.distance(right.found - right.mid), right.distance(mid - right.mid)
        along, reach = along + float(e @ d), reach + float(d @ d)
        b, c = right.beyond(right.mid), right.beyond(mid)
        before, after = before + float(b @ b), after + float(c @ c)
        beyond.append(b)
        whole.append(e)
        rest = e - d
        whole_before, whole_after = whole_before + float(e @ e), whole_after + float(rest @ rest)
    residuals = [missed / choices] if choices else []
    if before:
        residuals.append(after / before)
    elif whole_before:
        # no single value is wrong: the errors as a whole have the wrong size, or lean
        residuals.append(whole_after / whole_before)
    elif gaps:
        residuals.append(0.0)
    coefficient = along / reach if reach else 1 - missed / choices if choices else 1.0 if gaps else math.nan
    carriers = choices + gaps + carriers_of(beyond if before else whole)
    return Fit(coefficient, math.sqrt(max(residuals)), carriers=carriers) if residuals else NOTHING


def carriers_of(parts: list[Any]) -> float:
    """How many values carry the error of arrays together: sum(b^2)^2 / sum(b^4). 0 where there is no error."""
    largest = max((float(np.abs(each).max(initial=0.0)) for each in parts), default=0.0)
    if not largest:
        return 0.0
    squares = [(each / largest) ** 2 for each in parts]
    return float(sum(each.sum() for each in squares) ** 2 / sum((each * each).sum() for each in squares))


def within_own_rounding(
    observed: Mapping[Key, Observed], key: Key, predicted: Mapping[Key, Any], ideal: Mapping[Key, Any]
) -> bool:
    """Whether a change predicts the values of a tap, and leaves no more than `SIZE` times what its rounding makes.

    ideal: the predictions of an engine that rounds at every cut point, [n]
    """
    right, mid, run = observed[key], predicted.get(key), ideal.get(key)
    if not by_value(observed, [key], predicted).explains or mid is None or run is None or run.shape != mid.shape:
        return False
    left, made = right.beyond(mid), right.distance(run - mid)
    return bool(np.linalg.norm(left) <= SIZE * np.linalg.norm(made))


def explains_from_afar(
    fit: Fit, observed: Mapping[Key, Observed], failed: Iterable[Key], predicted: Mapping[Key, Any],
    ideal: Callable[[], Mapping[Key, Any]],
) -> bool:  # fmt: skip
    """Whether a change explains a trace that lacks inputs of a failed step.

    fit: of the predictions at all failed checks   failed: these checks' taps   predicted: [n]
    ideal: makes the predictions of an engine that rounds at every cut point, [n]
    """
    if fit.residual <= CLEAR:
        return True
    if fit.residual > FAR or fit.bits < CHANCE:
        return False
    left = made = 0.0
    rounded = ideal()
    for key in failed:
        right, mid, run = observed[key], predicted.get(key), rounded.get(key)
        if right.choice or mid is None or run is None or run.shape != mid.shape:
            continue
        left, made = left + float((right.beyond(mid) ** 2).sum()), made + float((right.distance(run - mid) ** 2).sum())
    return left <= TWICE**2 * made


def contradicted(observed: Mapping[Key, Observed], changed: Mapping[Key, Any]) -> Key | None:
    """The first tap that shows that the change is not there, or None.

    changed: the predicted values, [n]
    """
    for key, right in observed.items():
        mid = changed.get(key)
        if mid is None or right.choice or not right.as_stored:
            continue
        if mid.shape != right.mid.shape:
            return key
        if right.passes and (~np.isfinite(mid) & ~right.gaps & right.read).any():
            return key
        sigma = right.deviation
        d = _ratio(mid - right.mid, sigma)
        seen = (np.abs(d) > CALM) & right.read
        if not seen.any():
            continue
        d = np.where(seen, d, 0.0)
        reach = float(d @ d)
        if math.sqrt(reach) > SNR and float(_ratio(right.found - right.mid, sigma) @ d) < LEAN * reach:
            return key
    return None


def by_size(
    observed: Mapping[Key, Observed], failed: Iterable[Key], changed: Mapping[Key, Recorded], centre: float = CENTRE
) -> Fit:
    """The fit of predicted sizes of errors.

    failed: the taps that must be among those with a predicted size
    centre: the likeliest size over its deviation: 1 for noise of known size, less where the deviation is an upper size
    """
    groups: dict[tuple[str, Any], list[Any]] = defaultdict(list)
    own: dict[str, list[Any]] = defaultdict(list)
    predicted, wanted = set(), set(failed)
    for key, right in observed.items():
        new = changed.get(key)
        if new is None or right.choice or not right.as_stored or new.mid.shape != right.mid.shape:
            continue
        sigma = np.sqrt(new.variance + right.storage)
        wider = (sigma > WIDER * right.deviation) & np.isfinite(sigma) & np.isfinite(right.found - new.mid) & right.read
        if not wider.any():
            continue
        predicted.add(key)
        error = np.abs(right.found - new.mid)[wider]
        z = error / sigma[wider]
        run, tap = key
        own[step_of(tap)].append(error / right.deviation[wider])
        for group in ((step_of(tap), run), (step_of(tap), layer_of(tap)), *[WHOLE] * (key in wanted)):
            groups[group].append(z)
    if not groups or not wanted <= predicted:
        return NOTHING
    residuals: list[float] = []
    whole = math.nan
    for name, parts in groups.items():
        z = np.minimum(np.concatenate(parts), FARTHEST)
        if z.size < FEWEST:
            continue
        both = float(np.sqrt((z * z).mean())), float(z.mean()) / HALF_NORMAL
        if name == WHOLE:
            whole = both[0]
        known = math.log(REACH * (1 + 3 / math.sqrt(2 * z.size)))
        residuals += [LEFT * abs(math.log(size / centre)) / known if size > 0 else 1.0 for size in both]
    if not whole >= 0:
        return NOTHING
    return Fit(
        whole, max(residuals), frozenset(step for step, parts in own.items() if _root_mean_square(parts) > LARGEST)
    )


def _root_mean_square(parts: list[Any]) -> float:
    """The root mean square of arrays together. Each value counts at most as `FARTHEST`."""
    z = np.minimum(np.concatenate(parts), FARTHEST)
    return float(np.sqrt((z * z).mean()))


def moves(observed: Mapping[Key, Observed], failed: Iterable[Key], changed: Mapping[Key, Any]) -> bool:
    """Whether a change predicts values: its effect has at least half the size of the error. Then no size counts."""
    error = effect = 0.0
    for key in failed:
        right, mid = observed[key], changed.get(key)
        if mid is not None and not right.choice and mid.shape == right.mid.shape:
            e, d = right.distance(right.found - right.mid), right.distance(mid - right.mid)
            error, effect = error + float(e @ e), effect + float(d @ d)
    return 4 * effect >= error


def _ratio(error: Any, sigma: Any) -> Any:
    """Errors over deviations; 0 where the quotient is not known, and at most `FARTHEST`. [n]"""
    ratio = np.where(error == 0, 0.0, error / sigma)
    return np.where(np.isnan(ratio), 0.0, np.clip(ratio, -FARTHEST, FARTHEST))
