# SPDX-License-Identifier: Apache-2.0
"""The standing of an engine after a run of cases, in one line: for a badge, and at the head of a summary."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from refmoe.engines.known import CANNOT, FAILED, WELL, Failures, whole_verdict
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.engines.server.power import LEVELS
from refmoe.engines.server.power import power_of as server_power_of
from refmoe.profiles.load import policy as named_policy
from refmoe.report.summary import in_order
from refmoe.report.wording import count
from refmoe.spec.taps import step_of
from refmoe.suite.power import TAP_SETS, power_of
from refmoe.verifier.findings import ALL_TAPS, CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

GREEN, ALMOST, PARTIAL, OPEN, STALE, RED = "brightgreen", "yellowgreen", "yellow", "lightgrey", "orange", "red"
"""The colours of badges, of https://shields.io."""
LABEL = "refmoe"


@dataclass(frozen=True)
class Standing:
    """One line about a run."""

    verdict: str
    """`WELL`, `FAILED` or `CANNOT`, as the exit status has it."""
    words: str
    """Such as ``wrong at router.logits: 3 of 44``."""
    color: str
    """`GREEN` says that every outcome is conformant by all taps. `ALMOST`: all that any engine can be judged by, with
    taps that were measured to show most known bugs."""


def standing(results: Results, failures: Failures) -> Standing:
    """The standing of an engine. Only what was judged to be conformant is counted as such."""
    verdict, total = whole_verdict(results, failures), len(results.outcomes)
    right = results.counts[CONFORMANT]
    if verdict == FAILED:
        what, color, some = _failure(failures)
        return Standing(verdict, f"{what}: {some} of {total}", color)
    if verdict == CANNOT:
        said = ", ".join(f"{results.counts[name]} {name}" for name in _OPEN if results.counts[name])
        return Standing(verdict, f"cannot judge: {right} of {total} conformant{said and f', {said}'}", OPEN)
    taps = judged_taps(results)
    far = "" if taps == ALL_TAPS else f" as far as {taps or 'its taps'} show"
    rest = [f"{results.counts[name]} {name}" for name in (NOT_JUDGED, SKIPPED) if results.counts[name]]
    rest = [count(len(failures.known), "known failure")] * bool(failures.known) + rest
    words = f"conformant{far}: {', '.join([f'{right} of {total}', *rest])}"
    if failures.known or results.counts[SKIPPED] or _weak(results, taps):
        return Standing(verdict, words, PARTIAL)
    return Standing(verdict, words, GREEN if right == total and taps == ALL_TAPS else ALMOST)


_OPEN = (CANNOT_JUDGE, NOT_JUDGED, SKIPPED)


def _failure(failures: Failures) -> tuple[str, str, int]:
    """The failure to look at first, its colour, and the number of outcomes with it."""
    wrong = [each for each in failures.failing if each.verdict == NOT_CONFORMANT]
    if wrong:
        steps = Counter(step_of(each.first_wrong[1]) for each in wrong if each.first_wrong is not None)
        if not steps:
            return "wrong", RED, len(wrong)
        first = max(in_order(steps), key=lambda step: steps[step])
        more = f" and {count(len(steps) - 1, 'other step')}" if len(steps) > 1 else ""
        return f"wrong at {first}{more}", RED, len(wrong)
    ended = [each for each in failures.failing if each.verdict != CANNOT_JUDGE]
    if ended:
        kind = Counter(each.verdict for each in ended).most_common(1)[0][0]
        return kind, RED, len(ended)
    return "conformant where a known failure is listed", STALE, len(failures.passing)


def judged_taps(results: Results) -> str:
    """The smallest set of taps by which an outcome is conformant, as `Power` names it; empty where one has no set."""
    order = [*TAP_SETS, *reversed(LEVELS)]
    found = [each.taps or "" for each in _right(results)]
    if not found or "" in found:
        return ""
    return max(found, key=order.index)


def _right(results: Results) -> list[Outcome]:
    return [each for each in results.outcomes if each.verdict == CONFORMANT]


def _weak(results: Results, taps: str) -> bool:
    """Whether the taps were measured to show fewer than half of the known bugs in some dtype."""
    steps = frozenset(TAP_SETS.get(taps, ()))
    policies = [named_policy(dtype) for dtype in {each.dtype for each in _right(results)}]
    found = [server_power_of(taps, each) if taps in LEVELS else power_of(steps, each) for each in policies]
    return any(each.weak for each in found)


def badge(found: Standing) -> str:
    """The JSON of a badge, as https://shields.io/badges/endpoint-badge reads it.

    A standing that is not good is an error, whose colour no address of a badge can change.
    """
    values = {"schemaVersion": 1, "label": LABEL, "message": found.words, "color": found.color}
    if found.verdict != WELL:
        values["isError"] = True
    return json.dumps(values) + "\n"
