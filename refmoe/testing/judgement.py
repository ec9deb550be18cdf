# SPDX-License-Identifier: Apache-2.0
"""The judgement of one output of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmoe.api.arguments import whole_number
from refmoe.profiles.policy import Policy
from refmoe.testing.call import Output
from refmoe.testing.checking import checked_in_pieces, enclosed
from refmoe.testing.explanation import Failure, explain
from refmoe.testing.message import message_of
from refmoe.testing.options import significance_of
from refmoe.testing.screening import parts, shown
from refmoe.verifier.findings import FAIL, PASS, Element


@dataclass(frozen=True)
class Judgement:
    """The figures of one judged output. Its truth value is whether the output is legal."""

    what: str
    policy: str
    verdict: str
    """pass, fail or undecidable."""
    reason: str
    values: int
    """The number of elements."""
    rows: int
    """The number of rows."""
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
    undecided: int = 0
    """The number of elements that have no bound."""
    worst: Element | None = None
    place: str = ""
    """The place of the worst element, in words."""
    judged: int = 0
    """The number of elements that were judged. All others were only compared with a plain evaluation."""
    explanations: tuple[str, ...] = ()
    """The mistakes that explain a failure: with any of them all values would be legal."""
    message: str = field(default="", repr=False)
    """All that is known about a failure."""

    def __bool__(self) -> bool:
        return self.verdict == PASS


def judge(output: Output, policy: Policy, options: Mapping[str, Any]) -> Judgement:
    """Judge all values of an output under a policy. Raises InputError for a wrong significance."""
    significance = significance_of(options)
    if not output.found.size:
        return Judgement(
            what=output.what, policy=policy.name, verdict=PASS, reason="there are no values", values=0,
            rows=len(output.found), headroom=0.0, deviations=0.0, limit=0.0, size=0.0, lean=0.0, statistics=False,
        )  # fmt: skip
    values, rows = output.found.size, len(output.found)
    seed = whole_number(options.get("seed", 0), "seed")
    chosen = parts(output, policy.at(output.step), seed)
    done = checked_in_pieces(output, policy, significance, chosen)
    if done.verdict != PASS and chosen is not None:  # the verdict is that of all values
        done = checked_in_pieces(output, policy, significance, None)
    explanations: tuple[str, ...] = ()
    message = ""
    if done.verdict != PASS:
        part, check = shown(output, done, seed)
        x, _ = enclosed(part.call, policy)
        failure = Failure(output=part, policy=policy, significance=significance, x=x, check=check)
        seen = None
        if done.verdict == FAIL and options.get("explain", True):
            seen = explain(failure)
            explanations = seen.names
        message = message_of(failure, seen)
    return Judgement(
        what=output.what,
        policy=policy.name,
        verdict=done.verdict,
        reason=done.reason,
        values=values,
        rows=rows,
        headroom=done.worst_error,
        deviations=done.excess,
        limit=done.excess_limit,
        size=done.rms,
        lean=done.truncation,
        statistics=not np.isnan(done.rms_limit),
        undecided=done.undecided,
        judged=done.values,
        worst=done.worst,
        place="" if done.worst is None else output.where(done.worst.where),
        explanations=explanations,
        message=message,
    )


def require(judgement: Judgement) -> Judgement:
    """The judgement. Raises AssertionError with its message unless it passes."""
    __tracebackhide__ = True  # pytest shows the line of the test
    if not judgement:
        raise AssertionError(judgement.message)
    return judgement
