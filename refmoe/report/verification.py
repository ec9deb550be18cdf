# SPDX-License-Identifier: Apache-2.0
"""A verification as text on a terminal: what is wrong, the known bug that explains it, and then the numbers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refmoe.report.summary import Routing, StepSummary, summarise_routing, summarise_steps, telling
from refmoe.report.terminal import INDENT, open_console, print_text
from refmoe.report.wording import (
    NOTHING_EXPLAINS,
    basis,
    choice,
    code,
    code_place,
    codes,
    count,
    error_text,
    explanation,
    found_and_expected,
    in_short,
    lead,
    number,
    place,
    power,
    preceding,
    visible,
    why,
)
from refmoe.suite.power import in_words
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, FAIL, UNDECIDABLE, Check, Decision, Report

LISTED = 10
"""The most failures and decisions that are listed. Of the rest, the number is printed."""

STYLES = {CONFORMANT: "bold green", CANNOT_JUDGE: "bold yellow"}
WHOLE_TABLE = 80
"""Columns that the table of steps needs. A narrower terminal gets fewer columns."""


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a verification. A narrow terminal gets fewer columns of the table; a pipe gets all of them."""
    if console is None:
        console = open_console()
    _headline(console, report)
    _explanations(console, report)
    _first_wrong(console, report)
    _failures(console, report)
    _steps(console, summarise_steps(report))
    _routing(console, report, summarise_routing(report))
    _codes(console, report)
    _gaps(console, report)
    _judged(console, report)


def _headline(console: Console, report: Report) -> None:
    print_text(console, visible(in_words(report)).upper(), STYLES.get(report.verdict, "bold red"))
    print_text(console, INDENT + lead(report), "bold")


def _judged(console: Console, report: Report) -> None:
    """Print the trace, the model that it was held against, and the rules."""
    console.print()
    producer, policy = visible(report.producer), visible(report.policy)
    against = f"against {visible(report.subject)}, policy {policy}, significance {report.significance:g}"
    print_text(console, f"judged: {visible(report.trace)}, written by {producer}, {against}", "dim")


def _first_wrong(console: Console, report: Report) -> None:
    if report.first_wrong is None:
        return
    run, tap = report.first_wrong
    check = report.check(run, tap)
    console.print()
    print_text(console, f"first wrong step: {visible(tap)}, run {visible(run)}{_at(check)}", "bold")
    if check is not None:
        if check.worst is not None:
            print_text(console, INDENT + found_and_expected(check.worst))
        print_text(console, INDENT + why(check, report))
        print_text(console, f"{INDENT}{basis(check)}; {preceding(report, run, tap)}")


def _explanations(console: Console, report: Report) -> None:
    if report.explanations is None:
        return
    if not report.explanations:
        print_text(console, INDENT + NOTHING_EXPLAINS)
        return
    console.print()
    for found in report.explanations[:LISTED]:
        first, *rest = explanation(found)
        print_text(console, f"explained by {first}", "bold")
        for line in rest:
            print_text(console, INDENT + line)


def _failures(console: Console, report: Report) -> None:
    """Print the failed checks after the first wrong step, in one line each, and the reasons of undecidable checks."""
    failed = [check for check in report.checks if check.verdict == FAIL]
    others = [check for check in failed if (check.run, check.tap) != report.first_wrong]
    if others:
        console.print()
        print_text(console, f"{count(len(others), 'other failed check')}:")
    for check in others[:LISTED]:
        print_text(console, f"FAIL  {visible(check.tap)}, {visible(check.run)}{_at(check)}: {in_short(check)}", "red")
    if len(others) > LISTED:
        print_text(console, f"and {len(others) - LISTED} more")
    open_ones = [check for check in report.checks if check.verdict == UNDECIDABLE]
    reasons = dict.fromkeys(visible(check.reason) for check in open_ones)
    if reasons:
        console.print()
    for reason in list(reasons)[:LISTED]:
        same = sum(visible(check.reason) == reason for check in open_ones)
        print_text(console, f"UNDECIDABLE  {count(same, 'check')}: {reason}", "yellow")
    if len(reasons) > LISTED:
        print_text(console, f"and {count(len(reasons) - LISTED, 'reason')} more")


def _at(check: Check | None) -> str:
    words = (
        place(check.step, check.worst.where, check.worst.expert)
        if check is not None and check.worst is not None
        else ""
    )
    return f", {words}" if words else ""


def _steps(console: Console, steps: list[StepSummary]) -> None:
    console.print()
    if not steps:
        print_text(console, "no step was checked")
        return
    headings = ["step", "fail", "undecidable", "largest error"]
    if console.width >= WHOLE_TABLE:
        headings = ["step", "pass", "fail", "undecidable", "largest error", "excess", "limit"]
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=heading != "step")
    for s in steps:
        cells = {
            "step": visible(s.step), "pass": str(s.passed), "fail": str(s.failed), "undecidable": str(s.undecidable),
            "largest error": error_text(s.error), "excess": number(s.excess), "limit": number(s.excess_limit),
        }  # fmt: skip
        style = "bold red" if s.failed else "yellow" if s.undecidable else None
        table.add_row(*(Text(cells[heading]) for heading in headings), style=style)
    console.print(table)
    print_text(console, "largest error: legal, or in multiples of the error that the policy allows", "dim")
    if "excess" in headings:
        print_text(console, "excess: standard deviations from exact arithmetic; improbable above its limit", "dim")


def _routing(console: Console, report: Report, routing: Routing) -> None:
    console.print()
    if not routing.decisions:
        print_text(console, "routing: no decision could be judged")
        return
    kinds = ", ".join(f"{amount} {kind}" for kind, amount in routing.kinds.items())
    absent = f"; {routing.absent} not in the trace" if routing.absent else ""
    print_text(console, f"routing: {count(routing.decisions, 'decision')}: {kinds}{absent}")
    print_text(
        console, f"{INDENT}{len(routing.illegal)} illegal, {len(routing.deviating)} legal but not the exact choice"
    )
    _decisions(console, report, routing.illegal)


def _decisions(console: Console, report: Report, illegal: tuple[Decision, ...]) -> None:
    for d in illegal[:LISTED]:
        where = f"layers.{d.layer}.router.experts   {visible(d.run)}, token {d.token}"
        print_text(console, f"FAIL  {where}", "red")
        print_text(console, INDENT + choice(d, report.policy))
    if len(illegal) > LISTED:
        print_text(console, f"and {count(len(illegal) - LISTED, 'illegal decision')} more")


def _codes(console: Console, report: Report) -> None:
    """Print the codes that rounding alone decides. The first one is where two legal engines part."""
    if not report.codes:
        return
    console.print()
    print_text(console, f"codes: {codes(report.codes, report.policy)}")
    shown = telling(report.codes)
    for each in shown[:LISTED]:
        print_text(console, f"{INDENT}{code_place(each)}")
        print_text(console, f"{INDENT}{INDENT}{code(each)}")
    if len(shown) > LISTED:
        print_text(console, f"{INDENT}and {len(shown) - LISTED} more codes")


def _gaps(console: Console, report: Report) -> None:
    """Print the missing taps, the unknown keys, and the notes about their consequences."""
    if report.missing or report.unknown or report.notes or report.power is not None:
        console.print()
    for title, names in (("not in the trace", report.missing), ("keys that name no tap", report.unknown)):
        if names:
            more = f" and {len(names) - 3 * LISTED} more" if len(names) > 3 * LISTED else ""
            print_text(console, f"{title}: {', '.join(map(visible, names[: 3 * LISTED]))}{more}")
    for note in report.notes:
        print_text(console, f"note: {visible(note)}")
    if report.power is not None:
        print_text(console, f"power: {power(report.power)}")
