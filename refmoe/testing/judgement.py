# SPDX-License-Identifier: Apache-2.0
"""The judgement of one output of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from refmoe.api.arguments import whole_number
from refmoe.profiles.policy import Policy
from refmoe.testing.call import Output
from refmoe.testing.checking import checked_in_pieces, enclosed
from refmoe.testing.explanation import Failure, explain
from refmoe.testing.message import message_of
from refmoe.testing.options import significance_of
from refmoe.testing.proof import kept, proven
from refmoe.testing.screening import parts, shown
from refmoe.verifier.findings import FAIL, PASS, Check, Element


@dataclass(frozen=True)
class Judgement:
    """The figures of one judged output. Its truth value is whether the output is legal.

    Few values that a short proof shows to be legal have their figures computed when one is read, from copies of the
    arrays.
    """

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
    undecided: int = field(default_factory=int)
    """The number of elements that have no bound."""
    worst: Element | None = field(default_factory=lambda: None)
    place: str = field(default_factory=str)
    """The place of the worst element, in words."""
    judged: int = field(default_factory=int)
    """The number of elements that were judged. All others were only compared with a plain evaluation."""
    explanations: tuple[str, ...] = ()
    """The mistakes that explain a failure: with any of them all values would be legal."""
    message: str = field(default="", repr=False)
    """All that is known about a failure."""

    def __bool__(self) -> bool:
        return self.verdict == PASS

    # Fields without a default are no attributes of the class. So this is called for those that are not yet there, and
    # for nothing else. To a type checker all fields are always there.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            waiting = vars(self).get("_figures")
            if waiting is None or name not in self.__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            vars(self).update(waiting())
            vars(self).pop("_figures", None)
            return vars(self)[name]

        def __getstate__(self) -> dict[str, Any]:
            _ = self.reason  # what waits for its figures cannot be stored
            return vars(self)


def passing(output: Output, policy: Policy, check: Callable[[], Check]) -> Judgement:
    """A judgement that passes, whose figures are computed when one of them is read.

    check: the check of the output, which has the figures
    """
    judgement = object.__new__(Judgement)
    vars(judgement).update(
        what=output.what, policy=policy.name, verdict=PASS, values=output.found.size, rows=len(output.found),
        explanations=(), message="", _figures=lambda: figures_of(output, check()),
    )  # fmt: skip
    return judgement


def figures_of(output: Output, done: Check) -> dict[str, Any]:
    """The fields of a judgement that a check has."""
    return {
        "reason": done.reason,
        "headroom": done.worst_error,
        "deviations": done.excess,
        "limit": done.excess_limit,
        "size": done.rms,
        "lean": done.truncation,
        "statistics": not np.isnan(done.rms_limit),
        "undecided": done.undecided,
        "judged": done.values,
        "worst": done.worst,
        "place": "" if done.worst is None else output.where(done.worst.where),
    }


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
    if proven(output, policy, significance):
        own = kept(output)

        def later() -> Check:
            then = own()
            return checked_in_pieces(then, policy, significance, parts(then, policy.at(then.step), seed))

        return passing(output, policy, later)
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
        values=values,
        rows=rows,
        **figures_of(output, done),
        explanations=explanations,
        message=message,
    )


def require(judgement: Judgement) -> Judgement:
    """The judgement. Raises AssertionError with its message unless it passes."""
    __tracebackhide__ = True  # pytest shows the line of the test
    if not judgement:
        raise AssertionError(judgement.message)
    return judgement
