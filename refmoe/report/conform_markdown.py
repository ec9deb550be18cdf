# SPDX-License-Identifier: Apache-2.0
"""A run of cases as Markdown, for the page on which a CI system shows the summary of a job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refmoe.engines.known import CANNOT, WELL, Failures, KnownFailure
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.engines.scoreboard import KINDS, Entrant, alike, places
from refmoe.files.markdown import plain, table
from refmoe.report.conform_words import about_weights, cause, engine_words, where
from refmoe.report.standing import standing
from refmoe.report.wording import is_link, visible

LISTED = 10
"""The most cases that are named in a cell."""
MOST = 50
"""The most rows of a table of failures."""
MARKS = {WELL: "✅", CANNOT: "❔"}


def run_markdown(results: Results, failures: Failures) -> str:
    """The page: the standing of the engine, counts, failures, known failures, and all that was not judged."""
    found = standing(results, failures)
    parts = [
        f"### {MARKS.get(found.verdict, '❌')} {_plain(engine_words(results.engine))}",
        f"**{_plain(found.words)}**",
        _counts(results),
        _failures(failures.failing),
        _listed("Known to fail", failures.known),
        _listed("Conformant, but listed as known to fail", failures.passing),
        *(_others(results, verdict) for verdict in (NOT_JUDGED, SKIPPED)),
        "\n".join(f"- {_plain(note)}" for note in _notes(results)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    return plain(visible(text))


def _counts(results: Results) -> str:
    """The scoreboard of this engine alone: per dtype its policy, and the number of cases of each kind."""
    entrant = Entrant(results.engine.name, results)
    kinds = list(dict.fromkeys(KINDS.values()))
    return table(("dtype", "policy", *kinds), [
        (dtype, _plain(str(entrant.policies[dtype])), *(str(entrant.tally(dtype)[kind]) for kind in kinds))
        for dtype in entrant.dtypes
    ])  # fmt: skip


def _failures(failing: Sequence[Outcome]) -> str:
    rows = []
    for outcomes in alike(failing):
        first = outcomes[0]
        step = "" if first.first_wrong is None else f"`{visible(first.first_wrong[1])}`<br>{_plain(where(first))}"
        why = [_plain(said) for said in (first.reason, *cause(first))]
        rows.append((_cases(outcomes), step or _plain(first.verdict), "<br>".join(why)))
    rest = f"\n\nand {len(rows) - MOST} more" if len(rows) > MOST else ""
    return table(("case", "first wrong step", "why"), rows[:MOST]) + rest if rows else ""


def _listed(title: str, found: Sequence[tuple[Outcome, KnownFailure]]) -> str:
    rows = [(_plain(f"{each.case} {each.dtype}"), _plain(entry.reason) + _issue(entry.issue)) for each, entry in found]
    return f"{title}:\n\n{table(('case', 'reason'), rows)}" if rows else ""


def _others(results: Results, verdict: str) -> str:
    """Outcomes that say nothing about the engine, by their reasons."""
    reasons: dict[str, list[Outcome]] = {}
    for each in results.outcomes:
        if each.verdict == verdict:
            reasons.setdefault(_plain(each.reason) + _issue(each.issue), []).append(each)
    rows = [(_cases(outcomes), reason) for reason, outcomes in reasons.items()]
    return f"{verdict.capitalize()}:\n\n{table(('case', 'reason'), rows)}" if rows else ""


def _cases(outcomes: Iterable[Outcome]) -> str:
    found = [f"{case} ({', '.join(dtypes)})" for case, dtypes in places(outcomes).items()]
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return _plain(", ".join(found[:LISTED])) + more


def _issue(issue: str | None) -> str:
    """A link to an issue; its text where it is no address."""
    if issue is None:
        return ""
    return f" ([issue]({issue.replace(')', '%29').replace('|', '%7C')}))" if is_link(issue) else f" ({_plain(issue)})"


def _notes(results: Results) -> Iterable[str]:
    yield f"smoke test: {results.smoke}"
    yield f"judged by refmoe {results.refmoe}, at significance {results.significance:g} for each case and dtype"
    yield from about_weights(results)
    yield from results.notes
