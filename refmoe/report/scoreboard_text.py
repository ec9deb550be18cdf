# SPDX-License-Identifier: Apache-2.0
"""The results of an engine, and the scoreboard, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refmoe.engines.known import Failures
from refmoe.engines.observations import policies_used
from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.engines.scoreboard import (
    DEVIATES,
    FAILED,
    KINDS,
    NOT_RUN,
    OVERFLOWS,
    UNDECIDABLE,
    UNSUPPORTED,
    Group,
    Scoreboard,
    alike,
    places,
)
from refmoe.report.conform_words import about_weights
from refmoe.report.terminal import WIDE, open_console, print_text
from refmoe.report.wording import count, number, visible
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

STYLES = {
    CONFORMANT: "green", NOT_CONFORMANT: "bold red", CANNOT_JUDGE: "yellow", NOT_JUDGED: "dim", SKIPPED: "dim",
    CRASHED: "bold red", TIMED_OUT: "bold red", BROKEN: "bold red",
}  # fmt: skip
MARKS = {CONFORMANT: "✓", DEVIATES: "✕", UNDECIDABLE: "?", OVERFLOWS: "∞", UNSUPPORTED: "-", FAILED: "!", NOT_RUN: "·"}
"""Per kind of outcome its mark, one character."""
LISTED = 10
"""The most cases of a group that are named, and the most lines of standard error that are shown."""
INDENT = "    "


def print_results(results: Results, failures: Failures, logs: Mapping[tuple[str, str], str]) -> None:
    """Print a table, case by dtype, then the failures.

    logs: per case and dtype the end of the harness's standard error
    """
    console = open_console()
    engine = results.engine
    options = " ".join(f"{key}={value}" for key, value in engine.options.items())
    print_text(console, visible(f"{engine.name} {engine.version}  {options}".strip()), "bold")
    print_text(console, visible(f"smoke test: {results.smoke}"))
    used = ", ".join(f"{dtype} by {policy}" for dtype, policy in policies_used(results).items())
    print_text(console, visible(f"policies: {used}"))
    for said in about_weights(results):
        print_text(console, said)
    console.print()
    console.print(_case_table(results))
    console.print()
    for outcomes in alike(failures.failing):
        _print_failures(console, outcomes, logs.get((outcomes[0].case, outcomes[0].dtype), ""))
    for outcome, entry in failures.known:
        print_text(console, f"{_place(outcome)}: known to fail: {visible(entry.reason)}{_issue(entry.issue)}", "dim")
    for outcome, entry in failures.passing:
        print_text(
            console, f"{_place(outcome)}: conformant, but listed as known to fail: {visible(entry.reason)}", "bold red"
        )
    for verdict in (NOT_JUDGED, SKIPPED):
        for reason, outcomes in _with_verdict(results, verdict).items():
            print_text(console, f"{verdict}: {visible(reason)}: {_places(outcomes)}", "dim")
    for note in results.notes:
        print_text(console, f"note: {visible(note)}")
    counts = results.counts
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict])
    known = f"; {count(len(failures.known), 'failure')} known" if failures.known else ""
    print_text(console, f"{count(len(results.outcomes), 'outcome')}: {said}{known}", "bold")


def _case_table(results: Results) -> Table:
    dtypes = list(dict.fromkeys(each.dtype for each in results.outcomes))
    found = {(each.case, each.dtype): each for each in results.outcomes}
    table = Table(box=None, pad_edge=False)
    for heading in ("case", *dtypes):
        table.add_column(heading, no_wrap=True)
    for case in dict.fromkeys(each.case for each in results.outcomes):
        row = [found[case, dtype].verdict for dtype in dtypes]
        table.add_row(Text(visible(case)), *(Text(verdict, STYLES[verdict]) for verdict in row))
    return table


def _print_failures(console: Console, outcomes: Sequence[Outcome], log: str) -> None:
    """Print the first of some outcomes that are alike, and the places of the others.   log: of the first"""
    outcome, others = outcomes[0], outcomes[1:]
    first = f": first wrong step {'/'.join(outcome.first_wrong)}" if outcome.first_wrong else ""
    print_text(console, visible(f"{_place(outcome)}: {outcome.verdict}{first}"), STYLES[outcome.verdict])
    print_text(console, INDENT + visible(outcome.reason))
    for cause in outcome.explanations[:1]:
        print_text(console, visible(f"{INDENT}{cause.kind}: {cause.name}: {cause.about}"))
        if cause.fix:
            print_text(console, visible(f"{INDENT}fix: {cause.fix}"))
    if others:
        print_text(console, f"{INDENT}the same in {len(others)} more: {_listed(places(others))}")
    if log and outcome.verdict in (CRASHED, TIMED_OUT, BROKEN):
        print_text(console, f"{INDENT}the end of its standard error:")
        for line in log.splitlines()[-LISTED:]:
            print_text(console, f"{INDENT}  {visible(line)}", "dim")


def _with_verdict(results: Results, verdict: str) -> dict[str, list[Outcome]]:
    """Per reason, with its issue, the outcomes of this verdict."""
    found: dict[str, list[Outcome]] = {}
    for each in results.outcomes:
        if each.verdict == verdict:
            found.setdefault(each.reason + _issue(each.issue), []).append(each)
    return found


def _place(outcome: Outcome) -> str:
    return visible(f"{outcome.case} {outcome.dtype}")


def _places(outcomes: Sequence[Outcome]) -> str:
    return _first(list(dict.fromkeys(each.case for each in outcomes)))


def _listed(places: Mapping[str, Sequence[str]]) -> str:
    """places: per case the dtypes"""
    return _first([f"{case} ({', '.join(dtypes)})" for case, dtypes in places.items()])


def _first(cases: Sequence[str]) -> str:
    more = f" and {len(cases) - LISTED} more cases" if len(cases) > LISTED else ""
    return visible(", ".join(cases[:LISTED])) + more


def _issue(issue: str | None) -> str:
    return "" if issue is None else f" ({visible(issue)})"


# ---- the scoreboard


def print_scoreboard(board: Scoreboard) -> None:
    """Print counts by engine and dtype, marks by case and engine, deviations, and the largest error of each step."""
    console = open_console()
    narrow = console.width < WIDE
    if narrow:
        for name, entrant in zip(_names(board), board.entrants, strict=True):
            print_text(console, visible(f"{name}  {entrant.label}"))
        console.print()
    console.print(_counts(board, labels=not narrow))
    console.print()
    print_text(
        console,
        ", ".join(f"{mark} {kind}" for kind, mark in MARKS.items()) + "; a mark for each dtype, in the order above",
    )
    console.print(_marks(board))
    for kind in (DEVIATES, FAILED, UNDECIDABLE, OVERFLOWS, UNSUPPORTED):
        groups = board.groups(kind)
        if groups:
            console.print()
            print_text(console, kind, "bold")
        for group in groups:
            _print_group(console, group)
    console.print()
    print_text(console, "largest error of each step, in units of the allowed error: above 1 is impossible", "bold")
    console.print(_errors(board))
    for note in (*board.notes, *(f"{each.label}: {said}" for each in board.entrants for said in each.results.notes)):
        print_text(console, f"note: {visible(note)}")


def _names(board: Scoreboard) -> list[str]:
    """Short names of the engines, for the heads of columns."""
    return [f"#{i}" for i in range(1, len(board.entrants) + 1)]


def _counts(board: Scoreboard, *, labels: bool) -> Table:
    """The counts of each engine at each dtype.   labels: whether the table has room for the names of the engines"""
    table = Table(box=None, pad_edge=False)
    kinds = list(dict.fromkeys(KINDS.values()))
    for heading in ("", *["engine"] * labels, "dtype", "policy", *kinds):
        table.add_column(heading, justify="right" if heading in kinds else "left")
    for name, entrant in zip(_names(board), board.entrants, strict=True):
        for dtype in entrant.dtypes:
            tally = entrant.tally(dtype)
            label = [Text(visible(entrant.label))] * labels
            policy = Text(visible(str(entrant.policies[dtype])))
            table.add_row(name, *label, dtype, policy, *(str(tally[kind]) for kind in kinds))
    return table


def _marks(board: Scoreboard) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in _names(board):
        table.add_column(name, no_wrap=True)
    for case in board.cases:
        cells = ("".join(MARKS[entrant.kind(case, dtype)] for dtype in entrant.dtypes) for entrant in board.entrants)
        table.add_row(Text(visible(case)), *cells)
    return table


def _print_group(console: Console, group: Group) -> None:
    cause = f": {group.cause.kind}: {group.cause.name}" if group.cause else ""
    what = f"first wrong step {group.step}{cause}" if group.step else f"{group.reason}{_issue(group.issue)}"
    print_text(console, visible(f"  {group.label}: {what}"))
    print_text(console, f"{INDENT}{_listed(group.places)}", "dim")


def _errors(board: Scoreboard) -> Table:
    worst = [entrant.worst_errors() for entrant in board.entrants]
    table = Table(box=None, pad_edge=False)
    table.add_column("step")
    for name in _names(board):
        table.add_column(name, justify="right")
    for step in dict.fromkeys(step for errors in worst for step in errors):
        table.add_row(step, *(number(errors[step], "NaN") if step in errors else "-" for errors in worst))
    return table
