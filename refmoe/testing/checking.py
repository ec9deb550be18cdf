# SPDX-License-Identifier: Apache-2.0
"""One output of a kernel held against the enclosure of its step: the verifier's local check, for one array.

The enclosure, the tests and their limits are those of `refmoe.verifier`: the step is one that a trace has, and its
inputs are the arrays of the call.
"""

from __future__ import annotations

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


PIECE = 1 << 17
"""Values of a step without a matrix that are judged at a time, so that their arrays stay in the cache."""


def checked_in_pieces(output: Output, policy: Policy, significance: float, values: int) -> Check:
    """The check of an output, some rows after others where a row does not read a matrix.

    values: that are tested in all, over which the significance is split
    """
    count = len(output.found)
    height = count if output.cost else max(1, PIECE * count // max(output.found.size, 1))
    tally, may_overflow = Tally(rows=count), False
    for start in range(0, count, max(height, 1)):
        at = np.arange(start, min(start + height, count))
        x, overflows = enclosed(output.call if len(at) == count else output.call.some(at), policy)
        may_overflow |= overflows
        add(tally, output.found[at], x, policy, output.step, may_overflow, start)
    return conclude(output, tally, policy, significance, values)


def check(output: Output, x: Enclosure, policy: Policy, significance: float, may_overflow: bool) -> Check:
    """The verifier's check of the values found.

    x: their enclosure   may_overflow: whether a legal kernel may have overflowed before the output
    """
    tally = Tally(rows=len(output.found))
    add(tally, output.found, x, policy, output.step, may_overflow)
    return conclude(output, tally, policy, significance, tally.values)


def add(
    tally: Tally, found: NDArray[Any], x: Enclosure, policy: Policy, step: str, may_overflow: bool, first: int = 0
) -> None:
    """Test values against their enclosure.   found: [rows, ...]   first: the number of the first row"""
    shape = found.shape
    flat = x.map(lambda part: (part if part.shape == shape else np.broadcast_to(part, shape)).reshape(-1))

    def place(at: int) -> tuple[int, ...]:
        row, *rest = (int(i) for i in np.unravel_index(at, shape))
        return (first + row, *rest)

    values = found.astype(np.float64).reshape(-1)
    tally.add(flat, values, policy.at(step), OF_DTYPE[found.dtype], place, may_overflow)


def conclude(output: Output, tally: Tally, policy: Policy, significance: float, values: int) -> Check:
    """The check of all values in a tally, with the limits of the verifier."""
    tap = f"layers.0.{output.step}"
    origin = Origin(
        since=(tap,), rung=LOCAL if output.spans == 1 else REPLAYED, spans=output.spans, normalises=output.normalises
    )
    limits = Limits(significance, max(values, 1), 1)
    alike = alike_values(tap, origin, repeats(output.reads))
    if alike is not None and reads_coarser(policy, output.step):
        alike = max(alike, LIKE_POINTWISE)  # all outputs share the roundings of one input
    alike_rows = output.normalises and policy.statistics.precision <= policy.at(output.step).precision
    if alike is not None and alike_rows:
        alike = max(alike, tally.values / max(tally.rows, 1))
    return tally.check("", tap, origin, limits, alike, not alike_rows, NO_BOUND)


def repeats(rows: NDArray[Any]) -> int:
    """The number of times that the most frequent row occurs.   rows: [n, ...]"""
    counts: dict[bytes, int] = {}
    for row in rows:
        key = row.tobytes()
        counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=1)
