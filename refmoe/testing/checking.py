# SPDX-License-Identifier: Apache-2.0
"""One output of a kernel held against the enclosure of its step: the verifier's local check, for one array.

The enclosure, the tests and their limits are those of `refmoe.verifier`: the step is one that a trace has, and its
inputs are the arrays of the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE
from refmoe.arithmetic.memory import keep_memory
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.call import Call, Output
from refmoe.verifier.findings import LOCAL, REPLAYED, Check
from refmoe.verifier.provenance import Origin
from refmoe.verifier.tally import LIKE_POINTWISE, Limits, Tally
from refmoe.verifier.verify import NO_BOUND, alike_values, reads_coarser


def enclosed(call: Call, policy: Policy) -> tuple[Enclosure, bool]:
    """The enclosure of a call's output, and whether a legal kernel may overflow on the way."""
    ops = EnclosureOps(policy)
    with np.errstate(all="ignore"):
        x = call.enclose(ops)
    return x, bool(ops.events)


PIECE = 1 << 14
"""Values of a step without a matrix that are judged at a time, so that their arrays stay in the cache."""


@dataclass(frozen=True)
class Parts:
    """The rows or columns of an output that are judged, where not all are."""

    axis: int
    """0 for rows, 1 for columns."""
    drawn: NDArray[Any]
    """Integers [n], drawn at random: of all tests."""
    far: NDArray[Any]
    """Integers [m], farthest off: only of the tests of single values."""
    columns: NDArray[Any] | None = None
    """Of the rows that are drawn, the places of the next axis that are judged: integers. None: all."""

    @property
    def groups(self) -> Iterator[tuple[NDArray[Any], int, NDArray[Any] | None]]:
        """The places that are judged alike, how many of them were drawn, and their columns. Those drawn come first."""
        if self.columns is None:
            yield np.concatenate([self.drawn, self.far]), len(self.drawn), None
        else:
            yield self.drawn, len(self.drawn), self.columns
            yield self.far, 0, None


def checked_in_pieces(output: Output, policy: Policy, significance: float, parts: Parts | None) -> Check:
    """The check of an output, some rows after others where a row does not read a matrix.

    parts: the rows or columns that are judged; None: all rows
    The significance is split over all values of the output.
    """
    keep_memory()
    found = output.found
    axis = 0 if parts is None else parts.axis
    groups = [(np.arange(len(found)), len(found), None)] if parts is None else list(parts.groups)
    rows = sum(len(places) for places, *_ in groups) if axis == 0 else len(found)
    tally = Tally(rows=rows, calm=limits_of(significance, found.size).calm)
    may_overflow = False
    for places, drawn, columns in groups:
        each = found.size // found.shape[axis] if columns is None else found[:1, columns].size
        step = len(places) if output.cost else max(1, PIECE // each)
        for start in range(0, len(places), step):
            at = places[start : start + step]
            part: Any = output.call
            values = found
            if parts is not None or step < len(places):
                part = part.part(at) if axis else part.some(at)
                values = found.take(at, axis)
            if columns is not None:
                part, values = part.narrow(columns), values[:, columns]
            x, overflows = enclosed(part, policy)
            may_overflow |= overflows
            site = Site(
                policy=policy, step=output.step, may_overflow=may_overflow, axis=axis, at=at, columns=columns
            )  # fmt: skip
            add(tally, values, x, site, drawn - start)
    reads = output.reads if parts is None or axis else tuple(array[parts.drawn] for array in output.reads)
    # rows of a norm err alike, as far as they are counted
    wide = found[0].size if parts is None or parts.columns is None else found[0, parts.columns].size
    return conclude(output, tally, policy, Material(significance, found.size, repeats(*reads), wide))


def check(output: Output, x: Enclosure, policy: Policy, significance: float, may_overflow: bool) -> Check:
    """The verifier's check of the values found.

    x: their enclosure   may_overflow: whether a legal kernel may have overflowed before the output
    """
    tally = Tally(rows=len(output.found), calm=limits_of(significance, output.found.size).calm)
    add(tally, output.found, x, Site(policy, output.step, may_overflow))
    wide = tally.values // max(tally.rows, 1)
    return conclude(output, tally, policy, Material(significance, tally.values, repeats(*output.reads), wide))


@dataclass(frozen=True)
class Material:
    """The numbers that a verdict needs beside the sums of a tally."""

    significance: float
    values: int
    """The number of values over which the significance is split."""
    equal: int
    """The rows that the step reads most often."""
    wide: int
    """The values of a row of which size and lean are taken."""


@dataclass(frozen=True)
class Site:
    """Where values stand, and what may round them."""

    policy: Policy
    step: str
    may_overflow: bool
    """Whether a legal kernel may have overflowed before the output."""
    axis: int = 0
    at: NDArray[Any] | None = None
    """The places of the values in the whole output, along the axis: integers. None: their own."""
    columns: NDArray[Any] | None = None
    """The places along the next axis, where the axis is 0: integers. None: their own."""

    def index(self, flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The index in the whole output of a value.   flat, shape: of the values, with the axis first"""
        place, *others = (int(i) for i in np.unravel_index(flat, shape))
        if self.columns is not None:
            others[0] = int(self.columns[others[0]])
        others.insert(self.axis, place if self.at is None else int(self.at[place]))
        return tuple(others)


def add(tally: Tally, found: NDArray[Any], x: Enclosure, site: Site, counted: int | None = None) -> None:
    """Test values against their enclosure.

    found: [rows, ...]   x: of a shape that broadcasts to it
    counted: the first places of the axis, of which size and lean are taken; None: all
    """
    shape, axis = found.shape, site.axis
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])

    def move(part: Any) -> Any:
        whole = part if part.shape == shape else np.broadcast_to(part, shape)
        return (np.moveaxis(whole, axis, 0) if axis else whole).reshape(-1)

    tally.add(
        x.map(move),
        move(found.astype(np.float64)),
        site.policy.at(site.step),
        OF_DTYPE[found.dtype],
        lambda at: site.index(at, moved),
        site.may_overflow,
        None if counted is None else min(max(counted, 0), shape[axis]) * (found.size // max(shape[axis], 1)),
    )


def limits_of(significance: float, values: int) -> Limits:
    """The limits of a check of so many values."""
    return Limits(significance, max(values, 1), 1)


def conclude(output: Output, tally: Tally, policy: Policy, given: Material) -> Check:
    """The check of all values in a tally, with the limits of the verifier."""
    tap = f"layers.0.{output.step}"
    origin = Origin(
        since=(tap,), rung=LOCAL if output.spans == 1 else REPLAYED, spans=output.spans, normalises=output.normalises
    )
    limits = limits_of(given.significance, given.values)
    alike = alike_values(tap, origin, given.equal)
    if alike is not None and reads_coarser(policy, output.step):
        alike = max(alike, LIKE_POINTWISE)  # all outputs share the roundings of one input
    alike_rows = output.normalises and policy.statistics.precision <= policy.at(output.step).precision
    if alike is not None and alike_rows:
        alike = max(alike, given.wide)
    return tally.check("", tap, origin, limits, alike, not alike_rows, NO_BOUND)


def repeats(*arrays: NDArray[Any]) -> int:
    """The number of times that the most frequent row occurs.   arrays: whose rows belong together, [n, ...] each"""
    if all(len(array) == 1 for array in arrays):
        return 1
    for array in arrays:
        if array.size and len(np.unique(array.reshape(len(array), -1)[:, 0])) == len(array):
            return 1  # the rows of most kernels differ in their first element
    counts = Counter(tuple(row.tobytes() for row in rows) for rows in zip(*arrays, strict=True))
    return max(counts.values(), default=1)
