"""The words that all forms of a report share, so that no two forms say different things."""

from __future__ import annotations

import math

from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.verifier.findings import (
    FAIL,
    FREE,
    LOCAL,
    PASS,
    REPLAYED,
    UNDECIDABLE,
    Check,
    Decision,
    Element,
    Explanation,
    Report,
    as_set,
)

AXES = {
    "T": "token", "H": "head", "K": "key/value head", "E": "expert", "k": "slot", "S": "cached position",
    "F": "hidden unit", "D": "channel", "d": "channel", "V": "vocabulary entry",
}  # fmt: skip
"""The noun for an index along each dimension of a tap."""

RUNGS = {
    LOCAL: "local, from the trace's own inputs of the step",
    REPLAYED: "recomputed with the trace's own choice of experts",
    FREE: "recomputed with experts that refmoe chose",
}
"""The rungs in words, for a reader who does not know their names."""


def visible(text: str) -> str:
    """The text with every unprintable character escaped. Names come from files, which anybody may have written.

    A terminal obeys escape sequences. XML 1.0 cannot write control characters. A lone surrogate, from a file name that
    is not UTF-8, cannot be encoded at all.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def number(value: float, unknown: str = "-") -> str:
    """A number with three significant digits, or as an integer from 100 to 99999.   unknown: the text for NaN"""
    if math.isnan(value):
        return unknown
    return f"{value:.0f}" if 100 <= abs(value) < 99999.5 else f"{value:.3g}"


def value_text(value: float) -> str:
    """A value of a tensor, with enough digits to tell neighbours in float32 apart."""
    return f"{value:.9g}"


def count(amount: int, noun: str) -> str:
    """A number with its noun, which gets a plural s if needed."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def place(step: str, where: tuple[int, ...], expert: int | None = None) -> str:
    """An index in words, the token first: ``token 11, expert 7``; empty for an index without dimensions.

    expert: the expert of the slot; if given, it is named instead of the slot.
    """
    shape = (LAYER_TAPS | MODEL_TAPS).get(step, "").split()
    if len(shape) != len(where):
        return f"element {list(where)}" if where else ""
    named = sorted(zip(shape, where, strict=True), key=lambda pair: pair[0] != "T")
    slot = None if expert is None else f"expert {expert}"
    return ", ".join((dimension == "k" and slot) or f"{AXES[dimension]} {index}" for dimension, index in named)


def legal(element: Element) -> str:
    """The legal interval in words."""
    if math.isnan(element.low) or math.isnan(element.high):
        return "not known"
    if math.isinf(element.low) and math.isinf(element.high):
        return "any value (no finite bound)"
    return f"{value_text(element.low)} to {value_text(element.high)}"


def found_and_expected(element: Element) -> str:
    """The value found in an element, the expected value and the legal interval, in one line."""
    sigma = f", sigma {number(element.sigma)}" if not math.isnan(element.sigma) else ""
    values = f"found {value_text(element.found)}, expected {value_text(element.expected)}"
    return f"{values}, legal {legal(element)}{sigma}"


def manner(check: Check, report: Report) -> str:
    """The meaning of a failure: impossible, or improbable at the stated significance; empty if neither is claimed.

    The test against truncation has a threshold without a significance, so it claims neither.
    """
    if check.verdict != FAIL:
        return ""
    if check.outside or check.worst_error > 1:
        return "impossible under the policy"
    if 0 < check.excess_limit < check.excess or check.rms > check.rms_limit:
        return f"improbable at significance {report.significance:g}"
    return ""


def why(check: Check, report: Report) -> str:
    """The meaning of a failed check, and its reason."""
    return ": ".join(filter(None, (manner(check, report), visible(check.reason))))


def basis(check: Check) -> str:
    """The taps that a check was computed from, and its rung in words."""
    since = ", ".join(map(visible, check.since))
    return f"{f'computed from {since}; ' if since else ''}{RUNGS.get(check.rung, visible(check.rung))}"


def preceding(report: Report, run: str, tap: str) -> str:
    """The verdicts of the checks before a check, in order of computation; empty if there is no such check."""
    checks = [(check.run, check.tap) for check in report.checks]
    if (run, tap) not in checks:
        return ""
    earlier = [check.verdict for check in report.checks[: checks.index((run, tap))]]
    if not earlier:
        return "it is the first check"
    passed, undecidable = earlier.count(PASS), earlier.count(UNDECIDABLE)
    if passed == len(earlier):
        return f"everything before it passes ({count(passed, 'check')})"
    failed = earlier.count(FAIL)
    return f"before it {passed} pass, {undecidable} undecidable{f', {failed} fail' if failed else ''}"


def choice(decision: Decision, policy: str) -> str:
    """A routing decision in words, without its place."""
    found = f"found {as_set(decision.found)}" if decision.found else "not in the trace"
    margin = f"margin {number(decision.margin)} against {number(decision.movable)} that {visible(policy)} can move"
    return f"{found}, expected {as_set(decision.expected)}: {decision.kind}, {margin}"


def explanation(found: Explanation) -> list[str]:
    """An explanation as lines: its kind and name, a description, the fix, and the places where it was met."""
    lines = [visible(f"{found.kind}: {found.name}"), visible(found.about.rstrip("."))]
    if found.fix:
        lines.append(visible(f"fix: {found.fix}"))
    return lines + [visible(f"met in: {source}") for source in found.sources[:SOURCES]]


NOTHING_EXPLAINS = "no known bug, no two of them, no structure and no other arithmetic explains it"
SOURCES = 3
"""The most sources of a bug that are listed. `refmoe mutants show` prints all of them."""
