# SPDX-License-Identifier: Apache-2.0
"""The taps of a trace beside the enclosures of one pass: the material of every measure of a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, Enclosure, quiet
from refmoe.arithmetic.formats import FLOAT64, Format, cell, nearest, representable, ulp
from refmoe.checkpoints.size import total_parameters
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import step_of
from refmoe.steps.enclosure_ops import MATRIX_BYTES
from refmoe.traces.trace import Trace
from refmoe.verifier.findings import FAIL, PASS, Check
from refmoe.verifier.passes import Key, Pass
from refmoe.verifier.subject import Subject

FARTHEST = 2.0**400
"""A distance counts as this many units at most, so that sums of squares of distances stay finite."""
MOST_KEPT = 1 << 20
"""The most values of a trace whose enclosures are kept by the verification. Else a diagnosis computes them again."""
SAMPLED = 1 << 20
"""The most values of a check that are kept. Of a longer one every n-th value is."""


def sampled(values: Any, size: int) -> Any:
    """Every n-th of the values, [n].   size: the number of values in the whole tap"""
    return values[:: -(-max(size, 1) // SAMPLED)]


def size_of(trace: Trace, key: Key) -> int:
    """The number of values of a tap of the trace."""
    run, tap = key
    return math.prod(trace.tensors[f"{run}/{tap}"].shape)


@dataclass(frozen=True)
class Recorded:
    """The values of a tap, and their enclosures before the last rounding, all [n]."""

    mid: Any
    variance: Any
    radius: Any
    found: Any
    read: Any
    """Whether later steps read the value: booleans. Masked scores are never read, and may be anything."""


@dataclass(frozen=True)
class Observed:
    """A tap of the trace beside the enclosures of the specification."""

    found: Any
    """[n]; of a choice of experts the sorted ids, integers [T, k]."""
    mid: Any
    """Exact arithmetic from the trace's own inputs, as `found`."""
    variance: Any
    """Before the last rounding, [n]."""
    format: Format
    """The dtype of the last rounding."""
    read: Any
    """As in `Recorded`."""
    wrong: Any
    """The values that the policy does not allow, or the tokens whose choice is illegal: booleans [n] or [T]."""
    passes: bool
    as_stored: bool
    """Whether its verdict is that of a pass in which each step read the trace's values. Other measures mislead."""

    @property
    def choice(self) -> bool:
        """Whether the tap is a choice of experts."""
        return bool(self.found.ndim == 2)

    @cached_property
    def gaps(self) -> Any:
        """The values that are not finite: booleans [n]."""
        return ~np.isfinite(self.found)

    @cached_property
    def spacing(self) -> Any:
        """The unit of distances: the spacing of the dtype at the specification's value, [n]."""
        return ulp(np.where(np.isfinite(self.mid), self.mid, 0.0), self.format)

    @cached_property
    def storage(self) -> Any:
        """The variance of the last rounding, [n]."""
        return self.spacing**2 / 12 if self.format != FLOAT64 else (OWN * self.mid) ** 2

    @cached_property
    def deviation(self) -> Any:
        """Standard deviation of legal values, [n]."""
        return np.sqrt(self.variance + self.storage)

    @cached_property
    def _cell(self) -> tuple[Any, Any]:
        fits = representable(self.found, self.format)
        known = np.where(self.gaps, 0.0, self.found)
        start, end = cell(known, self.format)
        # a value of more precision than the policy's dtype stands for itself
        return np.where(fits, start, known), np.where(fits, end, known)

    def beyond(self, mid: Any) -> Any:
        """The distances from midpoints to the cells of the values found, in units of spacing. mid: [n]"""
        start, end = self._cell
        return self.distance(np.maximum(np.maximum(mid - end, start - mid), 0.0))

    def distance(self, difference: Any) -> Any:
        """Differences in units of spacing. Those that are not finite, at gaps or never read count as zero. [n]"""
        far = difference / self.spacing
        return np.where(np.isfinite(far) & ~self.gaps & self.read, np.clip(far, -FARTHEST, FARTHEST), 0.0)


@quiet
def parts_of(x: Enclosure, format: Format, dumped: Any, read: Any, size: int) -> tuple[Any, ...]:
    """The arrays of `Recorded`, for one block of a tap.   format: of the tap   size: values of the whole tap"""
    before = x if x.biased or (x.owed and format == x.accumulation) else x.settle()
    values = np.where(read, np.asarray(dumped, np.float64), before.mid)
    return tuple(
        sampled((part if part.shape == x.shape else np.broadcast_to(part, x.shape)).reshape(-1), size)
        for part in (before.mid, np.asarray(before.v), np.asarray(before.r), values, read)
    )


class Recording(Pass):
    """A pass that keeps the enclosures of all taps, beside the verdicts. A long tap is sampled."""

    late = False
    """Whether variances that are made on demand are made when somebody asks for the record. Until then the enclosures
    hold the weights that they are made of."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parts: dict[Key, list[Callable[[], tuple[Any, ...]]]] = {}

    def _test(self, name: str, step: str, x: Enclosure, dumped: Any) -> int:
        key = (self._run.run, name)
        read = self._visible()[None] if step == "attention.scores" else np.ones((), bool)
        part = partial(parts_of, x, self.policy.at(step), dumped, read, size_of(self.trace, key))
        if not self.late:
            made = part()
            part = partial(lambda: made)
        self._parts.setdefault(key, []).append(part)
        return super()._test(name, step, x, dumped)

    def recorded(self) -> dict[Key, Recorded]:
        """The enclosures of all taps so far."""
        found = {key: [part() for part in parts] for key, parts in self._parts.items()}
        return {
            key: Recorded(*(np.concatenate(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True)))
            for key, parts in found.items()
        }


class Keeper:
    """Makes the passes of a verification. The enclosures of the first one are kept for a diagnosis, if they are few."""

    first: Recording | None = None
    """The first pass, in which each step reads the trace's values."""

    def __call__(self, trace: Trace, subject: Subject, *others: Any) -> Pass:
        small = sum(math.prod(tensor.shape) for tensor in trace.tensors.values()) <= MOST_KEPT
        if self.first is not None or not small:
            return Pass(trace, subject, *others)
        self.first = Recording(trace, subject, *others)
        # the pass keeps all prepared weights of such a model anyway
        self.first.late = FLOAT64.dtype.itemsize * total_parameters(subject.config) <= MATRIX_BYTES
        return self.first


def observe(
    recorded: Mapping[Key, Recorded], policy: Policy, limit: float, checks: Sequence[Check], report: Sequence[Check]
) -> dict[Key, Observed]:
    """The taps of real numbers.

    limit: of the excess, in standard deviations
    checks: of the pass that recorded   report: of the whole verification
    """
    final = {(check.run, check.tap): check.verdict for check in report}
    taps = {}
    for check in checks:
        key = (check.run, check.tap)
        if key not in recorded:
            continue
        made = recorded[key]
        tap = Observed(
            found=made.found,
            mid=made.mid,
            variance=made.variance + (OWN * made.mid) ** 2,
            format=policy.at(step_of(check.tap)),
            read=made.read,
            wrong=np.zeros(made.found.shape, bool),
            passes=final.get(key) == PASS,
            as_stored=check.verdict != FAIL or final.get(key) == FAIL,
        )
        taps[key] = replace(tap, wrong=_wrong(tap, made.radius, limit)) if final.get(key) == FAIL else tap
    return taps


def _wrong(tap: Observed, radius: Any, limit: float) -> Any:
    """The values of a failed check that the policy does not allow: booleans [n].

    A check may fail as a whole, by the size or the lean of its errors. Then all its values count as wrong.
    """
    y, mid = tap.found, tap.mid
    low, high = nearest(mid - radius, tap.format), nearest(mid + radius, tap.format)
    outside = np.where(representable(y, tap.format), ~((y >= low) & (y <= high)), ~(np.abs(y - mid) <= radius))
    wrong = outside | (tap.beyond(mid) * tap.spacing > limit * np.sqrt(tap.variance))
    return wrong if wrong.any() else np.ones(y.shape, bool)
