# SPDX-License-Identifier: Apache-2.0
"""The scoreboard as one HTML page that needs no network and no other file, and can be read without script."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refmoe.engines.protocol import EVERY_TAP
from refmoe.engines.scoreboard import (
    DEVIATES,
    FAILED,
    KINDS,
    NOT_RUN,
    OVERFLOWS,
    UNDECIDABLE,
    UNSUPPORTED,
    Entrant,
    Scoreboard,
)
from refmoe.report.page import render
from refmoe.report.wording import count, number
from refmoe.verifier.findings import CONFORMANT

MARKS = {
    CONFORMANT: ("good", "✓", "conformant"),
    DEVIATES: ("bad", "✕", "deviates from what its policy allows"),
    UNDECIDABLE: ("unsure", "?", "undecidable: too few values have a bound, or refmoe could not judge it"),
    OVERFLOWS: ("absent", "∞", "not judged: the case overflows in this dtype, for every engine"),
    UNSUPPORTED: ("absent", "-", "not supported, by the engine's own word"),
    FAILED: ("bad", "!", "crashed, timed out, or gave a broken answer"),
    NOT_RUN: ("absent", "·", "not run"),
}
"""Per kind of outcome its CSS class, its mark and its meaning."""


@dataclass(frozen=True)
class Mark:
    """The mark of a case of an engine at a dtype."""

    kind: str
    """A CSS class."""
    mark: str
    """One character."""
    words: str
    """A sentence for a reader who points at it."""


@dataclass(frozen=True)
class Amount:
    """The largest error of a step."""

    level: str
    """A CSS class."""
    text: str


def to_html(board: Scoreboard) -> str:
    """The page as text, to be written as UTF-8. Raises InputError when Jinja2 is missing."""
    entrants = board.entrants
    kinds = list(dict.fromkeys(KINDS.values()))
    return render(
        "scoreboard.html.j2",
        ["verification.css", "scoreboard.css"],
        "scoreboard.js",
        "the HTML page of the scoreboard",
        board=board,
        kinds=kinds,
        totals={kind: sum(each.tally(dtype)[kind] for each in entrants for dtype in each.dtypes) for kind in kinds},
        rows=[
            (case, [[mark(each, case, dtype) for dtype in each.dtypes] for each in entrants]) for case in board.cases
        ],
        marks=list(MARKS.values()),
        groups={kind: board.groups(kind) for kind in (DEVIATES, FAILED, UNDECIDABLE, OVERFLOWS, UNSUPPORTED)},
        errors=errors(board),
        count=count,
    )


def mark(entrant: Entrant, case: str, dtype: str) -> Mark:
    """The mark of a case."""
    name, character, meaning = MARKS[entrant.kind(case, dtype)]
    outcome = entrant.outcome(case, dtype)
    where = f"{entrant.label}, {case}, {dtype}"
    if outcome is None:
        return Mark(name, character, f"{where}: {meaning}")
    first = f"; first wrong step {'/'.join(outcome.first_wrong)}" if outcome.first_wrong else ""
    cause = f"; {outcome.explanations[0].kind}: {outcome.explanations[0].name}" if outcome.explanations else ""
    return Mark(name, character, f"{where}, policy {outcome.policy}: {outcome.verdict}{first}{cause}: {outcome.reason}")


def errors(board: Scoreboard) -> list[tuple[str, list[Amount | None]]]:
    """Per step, in order of computation, the largest error of each engine at each dtype. None: not seen."""
    columns = [entrant.worst_errors(dtype) for entrant in board.entrants for dtype in entrant.dtypes]
    seen = {step for column in columns for step in column}
    return [
        (step, [amount(column[step]) if step in column else None for column in columns])
        for step in EVERY_TAP
        if step in seen
    ]


def amount(error: float) -> Amount:
    """A cell of the table of errors: above 1 is impossible under the policy. The others are legal and look alike."""
    if math.isnan(error) or error > 1:
        return Amount("fail2", number(error, "NaN"))
    return Amount("pass1", number(error))
