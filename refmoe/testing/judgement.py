# SPDX-License-Identifier: Apache-2.0
"""One output of a kernel held against the enclosure of its step: the verifier's local check, for one array.

The enclosure, the tests and their limits are those of `refmoe.verifier`: the step is the one that a trace has, its
inputs are the arrays of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.verifier.findings import FAIL, LOCAL, PASS, REPLAYED, Check, Element
from refmoe.verifier.provenance import Origin
from refmoe.verifier.tally import LIKE_POINTWISE, Limits, Tally
from refmoe.verifier.verify import NO_BOUND, alike_values, reads_coarser

Enclose = Callable[[EnclosureOps], Enclosure]
"""Makes the enclosure of an output from the kernel's inputs, before the last rounding."""


@dataclass(frozen=True)
class Output:
    """An output of a kernel and what it must be."""

    what: str
    """The function under test, in words."""
    step: str
    """The tap whose cut point has the dtype of the output."""
    found: NDArray[Any]
    """The values to judge, in their own dtype; rows first."""
    enclose: Enclose
    """Makes the enclosure, of the shape of `found`."""
    where: Callable[[tuple[int, ...]], str]
    """The place of an element of `found`, in words."""
    reads: NDArray[Any]
    """The rows that the step reads, of which equal ones err alike: [rows, n]."""
    spans: int = 1
    """The number of steps from the inputs to the output."""
    normalises: bool = False
    """Whether one of these steps is a norm."""


@dataclass(frozen=True)
class Judgement:
    """The figures of one judged output. Its truth value is whether the output is legal."""

    what: str
    policy: str
    verdict: str
    """pass, fail or undecidable."""
    reason: str
    values: int
    """The number of elements judged."""
    rows: int
    """The number of rows judged."""
    wrong: int
    """The number of elements that are impossible or improbable by themselves."""
    headroom: float
    """The worst element's share of its legal interval. Above 1 is impossible under the policy."""
    deviations: float
    """The largest distance of an element's cell from the exact value, in standard deviations."""
    limit: float
    """The most that `deviations` may be."""
    size: float
    """The root mean square of all errors over their standard deviations."""
    lean: float
    """The lean of all errors: 0 where they are rounded to nearest, 1 where they are truncated."""
    statistics: bool
    """Whether size and lean counted. They need enough rows, whose errors are independent enough."""
    undecided: int
    """The number of elements that have no bound."""
    worst: Element | None
    place: str
    """The place of the worst element, in words."""
    message: str = field(default="", repr=False)
    """All that is known about a failure."""

    def __bool__(self) -> bool:
        return self.verdict == PASS


def judge(output: Output, policy: Policy, significance: float) -> Judgement:
    """Judge all values of an output under a policy."""
    ops = EnclosureOps(policy)
    with np.errstate(all="ignore"):
        x = output.enclose(ops) if output.found.size else Enclosure(np.zeros(output.found.shape))
    check = checked(output, x, policy, significance, bool(ops.events))
    if not output.found.size:
        verdict, reason = PASS, "there are no values"
    else:
        verdict, reason = check.verdict, check.reason
    place = "" if check.worst is None else output.where(check.worst.where)
    return Judgement(
        what=output.what,
        policy=policy.name,
        verdict=verdict,
        reason=reason,
        values=check.values,
        rows=len(output.found),
        wrong=check.outside,
        headroom=check.worst_error,
        deviations=check.excess,
        limit=check.excess_limit,
        size=check.rms,
        lean=check.truncation,
        statistics=not np.isnan(check.rms_limit),
        undecided=check.undecided,
        worst=check.worst,
        place=place,
    )


def checked(output: Output, x: Enclosure, policy: Policy, significance: float, may_overflow: bool) -> Check:
    """The verifier's check of these values.   x: their enclosure   may_overflow: whether an earlier step may have"""
    tally = Tally(rows=len(output.found))
    shape = output.found.shape
    flat = x.map(lambda part: (part if part.shape == shape else np.broadcast_to(part, shape)).reshape(-1))
    values = output.found.astype(np.float64).reshape(-1)

    def place(at: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(at, shape))

    tally.add(flat, values, policy.at(output.step), OF_DTYPE[output.found.dtype], place, may_overflow)
    tap = f"layers.0.{output.step}"
    origin = Origin(
        since=(tap,), rung=LOCAL if output.spans == 1 else REPLAYED, spans=output.spans, normalises=output.normalises
    )
    limits = Limits(significance, max(tally.values, 1), 1)
    alike = alike_values(tap, origin, repeats(output.reads))
    if alike is not None and reads_coarser(policy, output.step):
        alike = max(alike, LIKE_POINTWISE)
    alike_rows = output.normalises and policy.statistics.precision <= policy.at(output.step).precision
    if alike is not None and alike_rows:
        alike = max(alike, tally.values / max(tally.rows, 1))
    return tally.check("", tap, origin, limits, alike, not alike_rows, NO_BOUND)


def repeats(rows: NDArray[Any]) -> int:
    """The number of times that the most frequent row occurs.   rows: [n, m]"""
    counts: dict[bytes, int] = {}
    for row in rows:
        key = row.tobytes()
        counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=1)


def require(judgement: Judgement) -> Judgement:
    """The judgement. Raises AssertionError with its message unless it passes."""
    __tracebackhide__ = True  # pytest shows the line of the test
    if not judgement:
        raise AssertionError(judgement.message or f"{judgement.what}: {judgement.verdict}: {judgement.reason}")
    return judgement


def is_failure(judgement: Judgement) -> bool:
    """Whether the output is certainly wrong."""
    return judgement.verdict == FAIL
