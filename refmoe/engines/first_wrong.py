# SPDX-License-Identifier: Apache-2.0
"""The place of the first wrong step: the token to look at first, and the wrong choices of experts."""

from __future__ import annotations

from refmoe.spec.taps import layer_of, step_of
from refmoe.verifier.findings import Decision, Report
from refmoe.verifier.subject import DIMENSIONS

CHOSEN = ("router.experts", "router.weights")
"""The steps that are wrong where a choice of experts is."""


def wrong_choices(report: Report, run: str, tap: str) -> tuple[Decision, ...]:
    """The illegal decisions of a tap's layer, if the tap is router.experts or router.weights; else none."""
    if step_of(tap) not in CHOSEN:
        return ()
    place = run, layer_of(tap)
    return tuple(each for each in report.decisions if not each.legal and (each.run, each.layer) == place)


def first_token(report: Report) -> int | None:
    """The token of the worst value of the first wrong step, or of its first illegal choice.

    None for a report without a wrong step, and for a value that is no token's.
    """
    if report.first_wrong is None:
        return None
    choices = wrong_choices(report, *report.first_wrong)
    if choices:
        return choices[0].token
    check = report.check(*report.first_wrong)
    dimensions = DIMENSIONS.get(step_of(report.first_wrong[1]), [])
    if check is None or check.worst is None or len(check.worst.where) != len(dimensions):
        return None
    return check.worst.where[dimensions.index("T")]
