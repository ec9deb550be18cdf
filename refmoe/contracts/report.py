# SPDX-License-Identifier: Apache-2.0
"""Verdicts in words, for the command line and for pytest."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from refmoe.contracts.checking import Verdict, printable

WIDTH = 118
MOST_ROWS = 6


def explain(verdict: Verdict) -> str:
    """The report of a broken law: the law, the finding, and the smallest example."""
    lines = [f"FAIL  {verdict.law.name}{at(verdict)}"]
    lines += block("law", verdict.law.words)
    lines += block("source", verdict.law.source)
    lines += block("found", verdict.words)
    for name, value in (printable(verdict.example) if verdict.example else {}).items():
        shown = rows(value)
        lines += block(name, shown[0], clip=False)
        lines += [" " * 12 + row for row in shown[1:]]
    return "\n".join(lines)


def at(verdict: Verdict) -> str:
    """The number of the token at fault and of all tokens, for a heading."""
    tokens = verdict.law.contract.tokens(printable(verdict.example or {}))
    if verdict.token is None:
        return f"   {tokens} token{'s' * (tokens != 1)}" if tokens else ""
    return f"   token {verdict.token} of {tokens}"


def block(title: str, words: str, clip: bool = True) -> list[str]:
    """A titled paragraph, indented."""
    if not clip:
        return [f"      {title:<6}{words}" if len(title) < 6 else f"      {title} {words}"]
    lines = textwrap.wrap(words, WIDTH - 14, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"      {title:<7} {lines[0]}", *(" " * 14 + line for line in lines[1:])]


def rows(value: Any) -> list[str]:
    """The lines of a value. A table takes a line per row, of which only the first are shown."""
    if not (isinstance(value, list) and value and isinstance(value[0], list)):
        return [f"= {value}"]
    shown = [f"{row}" for row in value[:MOST_ROWS]]
    if len(value) > MOST_ROWS:
        shown.append(f"... and {len(value) - MOST_ROWS} rows more")
    return (
        ["= [" + shown[0], *(f"   {row}" for row in shown[1:-1]), f"   {shown[-1]}]"]
        if shown[1:]
        else [f"= [{shown[0]}]"]
    )


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of laws with each outcome."""
    counts = {outcome: sum(v.outcome == outcome for v in verdicts) for outcome in ("pass", "fail")}
    rest = len(verdicts) - sum(counts.values())
    return f"{len(verdicts)} laws: {counts['pass']} pass, {counts['fail']} fail, {rest} not applicable or not judged"


def as_data(verdict: Verdict) -> dict[str, Any]:
    """A verdict for JSON. (NaN and infinity appear as Python writes them.)"""
    return {
        "law": verdict.law.name, "words": verdict.law.words, "source": verdict.law.source, "outcome": verdict.outcome,
        "found": verdict.words, "examples": verdict.examples, "token": verdict.token,
        "example": printable(verdict.example) if verdict.example else None,
    }  # fmt: skip
