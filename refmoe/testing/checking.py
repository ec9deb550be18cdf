# SPDX-License-Identifier: Apache-2.0
"""One output of a kernel held against the enclosure of its step: the verifier's local check, for one array.

The enclosure, the tests and their limits are those of `refmoe.verifier`: the step is one that a trace has, and its
inputs are the arrays of the call.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE
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


KEPT = 1 << 22
"""Bytes of the array that is freed to make the allocator keep memory: more than the arrays of a piece take."""


@cache
def keep_memory() -> None:
    """Make the allocator of the C library keep memory for later arrays.

    glibc gives memory back as soon as 128 KiB are free, and maps blocks of that size anew each time. So two thirds of
    the time went into the page faults of temporary arrays. The largest block that was freed raises both limits, for the
    whole process (mallopt(3), M_MMAP_THRESHOLD). The memory of this block is never touched, so it takes none.
    """
    np.empty(KEPT, np.uint8)


@dataclass(frozen=True)
class Parts:
    """The rows or columns of an output that are judged, where not all are."""

    axis: int
    """0 for rows, 1 for columns."""
    drawn: NDArray[Any]
    """Integers [n], drawn at random: of all tests."""
    far: NDArray[Any]
    """Integers [m], farthest off: only of the tests of single values."""

    @property
    def places(self) -> NDArray[Any]:
        """All of them, those that are drawn first: integers [n + m]"""
        return np.concatenate([self.drawn, self.far])


def checked_in_pieces(output: Output, policy: Policy, significance: float, parts: Parts | None) -> Check:
    """The check of an output, some rows after others where a row does not read a matrix.

    parts: the rows or columns that are judged; None: all rows
    The significance is split over all values of the output.
    """
    keep_memory()
    found = output.found
    axis, drawn = (0, len(found)) if parts is None else (parts.axis, len(parts.drawn))
    places = np.arange(drawn) if parts is None else parts.places
    count = len(places)
    step = count if output.cost else max(1, PIECE * found.shape[axis] // found.size)
    tally, may_overflow = Tally(rows=count if axis == 0 else len(found)), False
    for start in range(0, count, step):
        at = places[start : start + step]
        x, overflows = enclosed(_part(output.call, at, axis, parts is None and step >= count), policy)
        may_overflow |= overflows
        values = found if parts is None and step >= count else found.take(at, axis)
        add(
            tally,
            values,
            x,
            Site(policy=policy, step=output.step, may_overflow=may_overflow, axis=axis, at=at),
            drawn - start,
        )
    reads = output.reads if parts is None or axis else tuple(array[parts.drawn] for array in output.reads)
    return conclude(output, tally, policy, significance, found.size, repeats(*reads))


def _part(call: Any, at: NDArray[Any], axis: int, whole: bool) -> Any:
    if whole:
        return call
    return call.part(at) if axis else call.some(at)


def check(output: Output, x: Enclosure, policy: Policy, significance: float, may_overflow: bool) -> Check:
    """The verifier's check of the values found.

    x: their enclosure   may_overflow: whether a legal kernel may have overflowed before the output
    """
    tally = Tally(rows=len(output.found))
    add(tally, output.found, x, Site(policy, output.step, may_overflow))
    return conclude(output, tally, policy, significance, tally.values, repeats(*output.reads))


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

    def index(self, flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The index in the whole output of a value.   flat, shape: of the values, with the axis first"""
        place, *others = (int(i) for i in np.unravel_index(flat, shape))
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


def conclude(output: Output, tally: Tally, policy: Policy, significance: float, values: int, equal: int) -> Check:
    """The check of all values in a tally, with the limits of the verifier.

    values: over which the significance is split   equal: rows that the step reads most often
    """
    tap = f"layers.0.{output.step}"
    origin = Origin(
        since=(tap,), rung=LOCAL if output.spans == 1 else REPLAYED, spans=output.spans, normalises=output.normalises
    )
    limits = Limits(significance, max(values, 1), 1)
    alike = alike_values(tap, origin, equal)
    if alike is not None and reads_coarser(policy, output.step):
        alike = max(alike, LIKE_POINTWISE)  # all outputs share the roundings of one input
    alike_rows = output.normalises and policy.statistics.precision <= policy.at(output.step).precision
    if alike is not None and alike_rows:
        alike = max(alike, tally.values / max(tally.rows, 1))
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
