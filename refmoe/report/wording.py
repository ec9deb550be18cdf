# SPDX-License-Identifier: Apache-2.0
"""The words that all forms of a report share, so that no two forms say different things."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from refmoe.engines.first_wrong import wrong_choices
from refmoe.spec.taps import step_of
from refmoe.verifier.findings import (
    FAIL,
    FREE,
    LOCAL,
    PASS,
    REPLAYED,
    UNDECIDABLE,
    Check,
    ContestableCode,
    Decision,
    Element,
    Explanation,
    Power,
    Report,
    as_set,
)
from refmoe.verifier.subject import DIMENSIONS

AXES = {
    "T": "token", "H": "head", "K": "key/value head", "E": "expert", "k": "slot", "S": "cached position",
    "F": "hidden unit", "D": "channel", "d": "channel", "V": "vocabulary item",
    "n": "vocabulary item",
}  # fmt: skip
"""The noun for an index along each dimension of a tap."""

NOUNS = {
    "embedding": "the embedding", "attention_norm": "the normalised input of attention", "attention.q": "the query",
    "attention.k": "the key", "attention.v": "the value", "attention.q_rope": "the rotated query",
    "attention.k_rope": "the rotated key", "attention.scores": "the attention score",
    "attention.probs": "the attention probability", "attention.context": "the weighted sum of values",
    "attention.output": "the output of attention", "attention_residual": "the sum after attention",
    "moe_norm": "the normalised input of the experts", "router.logits": "the router logit",
    "router.experts": "the choice of experts", "router.weights": "the weight of an expert",
    "expert.gate": "the gate projection (w1)", "expert.up": "the up projection (w3)",
    "expert.hidden": "the hidden activation", "expert.output": "the output of an expert (w2)",
    "moe.output": "the weighted sum of the experts", "residual": "the output of the layer",
    "final_norm": "the final norm", "logits": "the logit", "logprobs": "the log-probability",
    "logprobs.ids": "the list of largest log-probabilities",
}  # fmt: skip
"""Per step the noun for one value of it."""

CHOICES = ("router.experts", "logprobs.ids")
"""The steps that are choices: their checks count tokens."""

CHANNELS = "DdF"
"""The dimensions that a sentence for a person leaves out: in a wrong row, which channel is the worst says little."""

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
    shape = DIMENSIONS.get(step, [])
    if len(shape) != len(where):
        return f"element {list(where)}" if where else ""
    return _indices(zip(shape, where, strict=True), expert)


def lead(report: Report) -> str:
    """The verdict in one plain sentence: for a wrong trace the step, and the value that is furthest off."""
    if report.first_wrong is None:
        return visible(report.headline)
    run, tap = report.first_wrong
    check = report.check(run, tap)
    unseen = check is not None and check.rung != LOCAL
    step = f"{tap}, or a step before it that is not in the trace," if unseen else tap
    value = _value(report, check, run, tap)
    return visible(f"{step} is wrong in run {run}" + (f": {value}" if value else ""))


def _value(report: Report, check: Check | None, run: str, tap: str) -> str:
    """The worst value of a step in words: ``the rotated query of token 2, head 0``. Empty for an unknown step."""
    step = step_of(tap)
    if step not in NOUNS:
        return ""
    noun = NOUNS[step]
    choices = wrong_choices(report, run, tap)
    if choices:
        return f"{noun} of token {choices[0].token}"
    if check is None or check.worst is None:
        return noun
    shape = DIMENSIONS.get(step, [])
    named = [(d, i) for d, i in zip(shape, check.worst.where, strict=False) if d not in CHANNELS]
    if not named or len(shape) != len(check.worst.where):
        return noun
    return f"{noun} of {_indices(named, check.worst.expert)}"


def _indices(named: Iterable[tuple[str, int]], expert: int | None) -> str:
    """Indices along dimensions in words, the token first."""
    slot = None if expert is None else f"expert {expert}"
    token_first = sorted(named, key=lambda pair: pair[0] != "T")
    return ", ".join((dimension == "k" and slot) or f"{AXES[dimension]} {index}" for dimension, index in token_first)


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


def error_text(error: float) -> str:
    """The largest error of a check, in a table: ``legal``, or ``150x``, in multiples of the allowed error.

    Honest engines use nearly all of the allowed error, because rounding to nearest is a part of it. A number below 1
    would look like a near miss.
    """
    if math.isnan(error):
        return "-"
    if math.isinf(error):
        return "infinite"
    return "legal" if error <= 1 else f"{_above_one(error)}x"


def error_words(error: float) -> str:
    """The largest error of a check, in a sentence."""
    if math.isnan(error):
        return "not known"
    if math.isinf(error):
        return "infinite"
    return "within what is allowed" if error <= 1 else f"{_above_one(error)} times what is allowed"


def _above_one(error: float) -> str:
    return number(error) if number(error) != "1" else "1.01"


def excess_words(check: Check) -> str:
    """The excess of a check and its limit; empty where the test does not apply."""
    if not check.excess_limit > 0 or math.isnan(check.excess):
        return ""
    return f"{number(check.excess)} standard deviations, improbable above {number(check.excess_limit)}"


def in_short(check: Check) -> str:
    """The reason of a failed check in a few words."""
    parts = []
    if check.outside and check.values and check.step not in CHOICES:
        parts.append(f"{check.outside} of {count(check.values, 'value')} impossible")
    if 0 < check.excess_limit < check.excess:
        parts.append(f"excess {number(check.excess)}, limit {number(check.excess_limit)}")
    return ", ".join(parts) or visible(check.reason)


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


def codes(found: tuple[ContestableCode, ...], policy: str) -> str:
    """The codes that rounding alone decides, in one line."""
    others = sum(code.deviates for code in found)
    shown = f"{others} {'is' if others == 1 else 'are'} not what the rule of {visible(policy)} gives, and as legal"
    return f"{count(len(found), 'code')} of inputs that rounding alone decides; {shown}"


def code(found: ContestableCode) -> str:
    """A code that rounding alone decides, in words, without its place."""
    engine = "the products leave it open" if found.found is None else f"the engine has {number(found.found)}"
    by_rule = f"the rule gives {number(found.rule)}, and {number(found.other)} is as legal"
    return f"{value_text(found.ideal)} is rounded to a code of {visible(found.format)}: {by_rule}; {engine}"


def code_place(found: ContestableCode) -> str:
    """The place of a code: its tap, its run and its index in words."""
    where = place(step_of(found.tap), found.where)
    return f"{visible(found.tap)}, run {visible(found.run)}, {where}"


def fit(found: Explanation) -> str:
    """How well an explanation predicts the error, and for how many values; empty where that was not measured."""
    parts = []
    if found.by_size:
        parts.append(f"errors {found.coefficient:.3f} times as large as predicted, their values are not predicted")
    elif not math.isnan(found.coefficient) and not math.isnan(found.residual):
        parts.append(f"coefficient {found.coefficient:.3f} (1 if it predicts the whole error)")
    if not math.isnan(found.residual) and not found.by_size:
        parts.append(f"residual {small(found.residual)} (the part of the error left over)")
    if found.values:
        parts.append(f"accounts for {count(found.values, 'wrong value')}")
    return ", ".join(parts)


def small(residual: float) -> str:
    """A residual, which may be far below 1."""
    return f"{residual:.3f}" if residual == 0 or residual >= 5e-4 else f"{residual:.1e}"


def alternatives(found: Explanation) -> str:
    """The other explanations that leave as little, and the tap that tells them apart; empty if there is none."""
    if not found.rivals:
        return ""
    names = " or ".join(map(visible, found.rivals))
    if not found.told_apart_by:
        return f"or {names}: this trace, and any other of these calls, cannot tell them apart"
    return f"or {names}: the tap {visible(found.told_apart_by)} tells them apart"


def power(found: Power) -> str:
    """The power of a verification in one line."""
    if not found.taps:
        return "not measured for these taps, which lack the logits or hold them in some calls only"
    line = f"{found.taps} show {found.seen} of {found.known} known bugs at {found.dtype}, on golden cases"
    few = f", such as {', '.join(found.unseen[:SOURCES])}" if found.unseen else ""
    return f"{line}; {len(found.unseen)} stay unseen{few}" if found.unseen else line


def explanation(found: Explanation) -> list[str]:
    """An explanation as lines: its kind and name, a description, the fix, its sources, and how well it fits."""
    lines = [visible(f"{found.kind}: {found.name}"), visible(found.about.rstrip("."))]
    if found.where:
        lines.append(visible(f"only in {found.where}"))
    if found.fix:
        lines.append(visible(f"fix: {found.fix}"))
    lines += [visible(f"met in: {source}") for source in found.sources[:SOURCES]]
    return lines + [line for line in (fit(found), alternatives(found)) if line]


def is_link(text: str) -> bool:
    """Whether a source can be the address of a link: http or https, and nothing but printable characters."""
    return re.fullmatch(r"https?://[^\s<>\"']+", text) is not None and text.isprintable()


NOTHING_EXPLAINS = "no known bug, no two of them, no structure and no other arithmetic explains it"
SOURCES = 3
"""The most sources of a bug that are listed. `refmoe mutants show` prints all of them."""
