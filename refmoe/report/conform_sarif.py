# SPDX-License-Identifier: Apache-2.0
"""A run of cases as SARIF: an alert for each failure, at the line that the user named for the first wrong step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from refmoe.engines.known import Failures, KnownFailure
from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.report import sarif
from refmoe.report.conform_words import about_weights, cause, engine_words, what
from refmoe.report.sarif import Alert, Log, to_sarif
from refmoe.report.sources import Sources
from refmoe.report.wording import count
from refmoe.spec.taps import layer_of, step_of
from refmoe.verifier.findings import CANNOT_JUDGE

RULES = {
    CRASHED: sarif.CRASHED, TIMED_OUT: sarif.TIMED_OUT, BROKEN: sarif.BROKEN, CANNOT_JUDGE: sarif.CANNOT_JUDGE,
}  # fmt: skip
"""Per verdict without a first wrong step its rule."""


def run_sarif(results: Results, failures: Failures, sources: Sources, home: str | None = None) -> str:
    """The file as text.   home: as in `Log`"""
    known = {(each.case, each.dtype): entry for each, entry in failures.known}
    alerts = [
        _alert(results, each, sources, known.get((each.case, each.dtype))) for each in results.outcomes if each.failed
    ]
    alerts += [_stale(results, each, entry, sources) for each, entry in failures.passing]
    notes = [*about_weights(results), *results.notes]
    for verdict in (NOT_JUDGED, SKIPPED):
        places = [f"{each.case} in {each.dtype}" for each in results.outcomes if each.verdict == verdict]
        notes += [f"{count(len(places), 'outcome')} {verdict}: {', '.join(places)}"] * bool(places)
    lasting = replace(results, fresh=None).settings  # a seed that changes with each run would leave old alerts behind
    return to_sarif(Log(" ".join([results.engine.name, *lasting]), alerts, notes, home))


def _alert(results: Results, outcome: Outcome, sources: Sources, entry: KnownFailure | None) -> Alert:
    step = "" if outcome.first_wrong is None else step_of(outcome.first_wrong[1])
    rule = RULES.get(outcome.verdict) or sarif.rule_of(step)
    told = [what(outcome), outcome.reason, *cause(outcome), f"engine: {engine_words(results.engine)}"]
    place = [outcome.case, outcome.dtype, *(outcome.first_wrong or ())]
    facts = {
        "case": outcome.case, "dtype": outcome.dtype, "policy": outcome.policy, "verdict": outcome.verdict,
        "explanation": outcome.explanations[0].name if outcome.explanations else None, "token": outcome.token,
    }  # fmt: skip
    if outcome.first_wrong is not None:
        run, tap = outcome.first_wrong
        facts |= {"run": run, "tap": tap, "layer": layer_of(tap)}
    return Alert(
        rule=rule,
        message=_sentences(told),
        place=sources.of(step),
        within="/".join(place),
        identity=(results.engine.name, outcome.case, outcome.dtype),
        known=None if entry is None else _why(entry),
        properties={name: value for name, value in facts.items() if value is not None},
    )


def _stale(results: Results, outcome: Outcome, entry: KnownFailure, sources: Sources) -> Alert:
    told = f"{outcome.case} in {outcome.dtype} is conformant, but listed as known to fail", f"listed: {_why(entry)}"
    return Alert(
        rule=sarif.LISTED,
        message=_sentences(told),
        place=sources.rest,
        within=f"{outcome.case}/{outcome.dtype}",
        identity=(results.engine.name, outcome.case, outcome.dtype),
        properties={"case": outcome.case, "dtype": outcome.dtype},
    )


def _why(entry: KnownFailure) -> str:
    return entry.reason + (f" ({entry.issue})" if entry.issue else "")


def _sentences(parts: Iterable[str]) -> str:
    """Parts as sentences: GitHub shows the first one where there is little room."""
    return " ".join(f"{part[:1].upper()}{part[1:].rstrip('.')}." for part in parts if part)
