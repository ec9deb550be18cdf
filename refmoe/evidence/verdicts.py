# SPDX-License-Identifier: Apache-2.0
"""The verdicts of the results against those that the kept traces give again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refmoe.engines.observations import is_wider
from refmoe.engines.results import Outcome, json_number
from refmoe.evidence.compare import differences
from refmoe.evidence.given import FROM_A_TRACE, WITHOUT_A_TRACE, Given
from refmoe.evidence.judged import Judged
from refmoe.evidence.layout import RESULTS, trace_file
from refmoe.files.sentences import quoted

FRACTION = re.compile(r"\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)")
"""A figure in a reason that may have other last digits on another machine. Counts are compared as they are."""


def verdict_faults(given: Given, judged: Mapping[tuple[str, str], Judged]) -> list[str]:
    """The faults of the results, a sentence each.   judged: by case and dtype, of each trace that was kept"""
    wider = tuple(dtype for dtype, name in given.dtypes.items() if is_wider(given.policies[name], dtype))
    found = [] if wider == given.results.wider else [
        f"{RESULTS}: 'wider' is {[*given.results.wider]}, but {[*wider]} follows from the policies"
    ]  # fmt: skip
    return found + [each for outcome in given.results.outcomes for each in _faults(outcome, judged)]


def _faults(outcome: Outcome, judged: Mapping[tuple[str, str], Judged]) -> Iterator[str]:
    place, again = f"{outcome.case} in {outcome.dtype}", judged.get((outcome.case, outcome.dtype))
    name = trace_file(outcome.case, outcome.dtype)
    if again is None:
        if outcome.verdict in FROM_A_TRACE:
            yield f"{name}: is missing, but {RESULTS} says that {place} is {outcome.verdict}"
        return
    if outcome.verdict in WITHOUT_A_TRACE:
        yield f"{RESULTS}: says that {place} is {outcome.verdict}, but {name} is there"
        return
    taps = None if outcome.taps is None else again.outcome.taps  # results of earlier versions do not have it
    for difference in differences(figures(outcome), figures(replace(again.outcome, taps=taps))):
        yield f"{RESULTS}: {place}: {difference} ({name}, judged again)"
    recorded, now = (FRACTION.sub("#", each.reason) for each in (outcome, again.outcome))
    if recorded != now and not recorded.startswith(f"{now}; "):  # what follows was said about the run
        yield f"{RESULTS}: {place}: 'reason' is {quoted(outcome.reason)}, but {quoted(again.outcome.reason)} follows"


def figures(outcome: Outcome) -> dict[str, Any]:
    """The values of an outcome that its trace decides."""
    return {
        "verdict": outcome.verdict,
        "first_wrong": None if outcome.first_wrong is None else list(outcome.first_wrong),
        "worst_errors": {step: json_number(error) for step, error in outcome.worst_errors.items()},
        "golden_bits": outcome.golden_bits,
        "taps": outcome.taps,
    }


def not_judged_again(given: Given, judged: Mapping[tuple[str, str], Judged]) -> list[str]:
    """The outcomes that no trace shows, a sentence each."""
    found = [
        f"{each.case} in {each.dtype} is {each.verdict}: the engine gave no trace to judge again"
        for each in given.results.outcomes
        if (each.case, each.dtype) not in judged
    ]
    named = [each for each in given.results.outcomes if each.explanations]
    return found + [
        f"{each.case} in {each.dtype}: its explanation ({each.explanations[0].name}) is not searched for again"
        for each in named
    ]
