# SPDX-License-Identifier: Apache-2.0
"""The scoreboard: the results of several engines side by side, by case and dtype."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refmoe.engines.observations import Used, policies_used
from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.protocol import DTYPES, EVERY_TAP
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Cause, Outcome, Results, read_results
from refmoe.errors import InputError
from refmoe.spec.taps import step_of
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

DEVIATES, UNDECIDABLE, UNSUPPORTED, FAILED = "deviates", "undecidable", "not supported", "crashed"
OVERFLOWS = "overflows"
KINDS = {
    CONFORMANT: CONFORMANT, NOT_CONFORMANT: DEVIATES, CANNOT_JUDGE: UNDECIDABLE, NOT_JUDGED: OVERFLOWS,
    SKIPPED: UNSUPPORTED, CRASHED: FAILED, TIMED_OUT: FAILED, BROKEN: FAILED,
}  # fmt: skip
"""Per verdict the kind of outcome under which the scoreboard counts it."""
NOT_RUN = "not run"
"""The kind of a case that an engine has no outcome for."""


@dataclass(frozen=True)
class Entrant:
    """An engine on the scoreboard."""

    label: str
    """Name, version, options; with the platform where two engines would otherwise have one label."""
    results: Results

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that were run, the widest first."""
        run = {each.dtype for each in self.results.outcomes}
        return tuple(dtype for dtype in DTYPES if dtype in run)

    @property
    def policies(self) -> dict[str, Used]:
        """Per dtype the policy by which it was judged."""
        return policies_used(self.results)

    def outcome(self, case: str, dtype: str) -> Outcome | None:
        """The outcome of a case at a dtype, or None."""
        return next((x for x in self.results.outcomes if (x.case, x.dtype) == (case, dtype)), None)

    def kind(self, case: str, dtype: str) -> str:
        """One of the values of `KINDS`, or `NOT_RUN`."""
        outcome = self.outcome(case, dtype)
        return NOT_RUN if outcome is None else KINDS[outcome.verdict]

    def tally(self, dtype: str) -> Counter[str]:
        """The number of cases per kind."""
        return Counter(KINDS[each.verdict] for each in self.results.outcomes if each.dtype == dtype)

    def worst_errors(self, dtype: str | None = None) -> dict[str, float]:
        """Per step the largest error over all cases, in units of the allowed one.   dtype: None for all"""
        worst: dict[str, float] = {}
        for each in self.results.outcomes:
            if dtype in (None, each.dtype):
                for step, error in each.worst_errors.items():
                    before = worst.get(step, 0.0)
                    worst[step] = math.nan if math.isnan(before) or math.isnan(error) else max(before, error)
        return {step: worst[step] for step in EVERY_TAP if step in worst}


@dataclass(frozen=True)
class Group:
    """Outcomes of an engine that differ only by case and dtype."""

    label: str
    kind: str
    step: str
    """The first wrong step without its layer, empty where there is none."""
    cause: Cause | None
    """The best explanation."""
    reason: str
    """The reason of the first outcome."""
    issue: str | None
    places: dict[str, tuple[str, ...]]
    """Per case the dtypes."""


@dataclass(frozen=True)
class Scoreboard:
    """Several engines."""

    entrants: tuple[Entrant, ...]
    cases: tuple[str, ...]
    notes: tuple[str, ...]
    """Sentences about differences that make the results less comparable."""

    def groups(self, kind: str) -> list[Group]:
        """The outcomes of a kind, grouped by engine, first wrong step, and explanation or reason."""
        return [
            _group(entrant.label, kind, outcomes)
            for entrant in self.entrants
            for outcomes in alike(each for each in entrant.results.outcomes if KINDS[each.verdict] == kind)
        ]


def alike(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """The outcomes of one engine, grouped by kind, first wrong step, and explanation or reason."""
    found: dict[tuple[str, ...], list[Outcome]] = {}
    for each in outcomes:
        found.setdefault((KINDS[each.verdict], *_likeness(each)), []).append(each)
    return [*found.values()]


def places(outcomes: Iterable[Outcome]) -> dict[str, tuple[str, ...]]:
    """Per case the dtypes."""
    found: dict[str, tuple[str, ...]] = {}
    for each in outcomes:
        found[each.case] = (*found.get(each.case, ()), each.dtype)
    return found


def _likeness(outcome: Outcome) -> tuple[str, str]:
    """A key that outcomes of one group share. The layer and the numbers in a reason are not part of it."""
    if outcome.first_wrong is not None:
        return step_of(outcome.first_wrong[1]), outcome.explanations[0].name if outcome.explanations else ""
    if KINDS[outcome.verdict] == UNDECIDABLE and outcome.worst_errors:
        return "", ""
    return outcome.verdict, outcome.reason


def _group(label: str, kind: str, outcomes: Sequence[Outcome]) -> Group:
    first = outcomes[0]
    step = step_of(first.first_wrong[1]) if first.first_wrong is not None else ""
    cause = first.explanations[0] if first.explanations else None
    return Group(
        label=label,
        kind=kind,
        step=step,
        cause=cause,
        reason=first.reason,
        issue=first.issue,
        places=places(outcomes),
    )


def result_files(paths: Iterable[Path]) -> list[Path]:
    """The files given, and the ``*.json`` of the folders given, by name. Raises InputError when a folder has none."""
    found = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: has no file *.json, but results of `refmoe conform --out` were expected")
        found += inside
    return found


def scoreboard(paths: Sequence[Path]) -> Scoreboard:
    """The scoreboard of these files.

    Raises InputError when a file does not hold results, or two files are about one engine.
    """
    every = [read_results(path) for path in paths]
    for describe in (_short, _with_platform):
        labels = [describe(results) for results in every]
        if len(set(labels)) == len(labels):
            break
    else:
        again = next(i for i, label in enumerate(labels) if label in labels[:i])
        raise InputError(
            f"{paths[again]}: is about {labels[again]}, as is {paths[labels.index(labels[again])]}, but one file for "
            "each engine was expected"
        )
    entrants = tuple(Entrant(label, results) for label, results in zip(labels, every, strict=True))
    cases = sorted({case for results in every for case in results.cases})
    changed = [case for case in cases if len({r.cases[case] for r in every if case in r.cases}) > 1]
    notes = [f"case {case} has changed between these results" for case in changed]
    return Scoreboard(entrants, tuple(cases), tuple(notes))


def _short(results: Results) -> str:
    return " ".join([results.engine.name, results.engine.version, *results.settings])


def _with_platform(results: Results) -> str:
    return f"{_short(results)} on {' '.join(results.platform.values())}"
