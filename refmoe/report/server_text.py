# SPDX-License-Identifier: Apache-2.0
"""The verdict on a running server, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from refmoe.engines.known import Failures
from refmoe.engines.server.interview import WAYS
from refmoe.engines.server.judging import by_way
from refmoe.engines.server.verdict import Verdict
from refmoe.report.terminal import INDENT, open_console, print_text
from refmoe.report.wording import NOTHING_EXPLAINS, count, explanation, visible
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

LISTED = 10
"""The most wrong tokens and broken laws that are listed, and the most bugs that are named."""
KNOWN, STALE = "known to fail", "conformant, but listed as known to fail"
STYLES = {CONFORMANT: "bold green", CANNOT_JUDGE: "bold yellow"}


def print_verdict(found: Verdict, failures: Failures) -> None:
    """Print the verdict, what is wrong and why, how it was asked, and what such evidence cannot see.

    failures: the verdict as a failure that is listed as known, or no longer is one
    """
    console = open_console()
    judgement = found.judgement
    print_text(console, found.verdict.upper(), STYLES.get(found.verdict, "bold red"))
    print_text(console, INDENT + visible(found.reason), "bold")
    if found.explanations is not None:
        console.print()
        if not found.explanations:
            print_text(console, INDENT + NOTHING_EXPLAINS)
        for each in found.explanations[:LISTED]:
            first, *rest = explanation(each)
            print_text(console, f"explained by {first}", "bold")
            for line in rest:
                print_text(console, INDENT + line)
    console.print()
    if found.gives:
        print_text(console, f"server: {found.kind}, {found.gives}")
    print_text(console, f"judged: {visible(found.policy.name)}")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("asked", "rows", "tokens", ""):
        table.add_column(name, justify="right" if name in ("rows", "tokens") else "left", no_wrap=True)
    for way, (rows, tokens, right) in sorted(by_way(judgement, found.answers.said).items(), key=_order):
        mark = Text("✓", "green") if right else Text("✕", "bold red")
        table.add_row(way, str(rows), str(tokens), mark)
    console.print(table)
    _lines("wrong token", [
        f"{each.way}: after {count(len(each.before), 'token')} it gives {each.found}; {each.expected} is larger by "
        f"{each.gap:.3g}"
        for each in judgement.wrong
    ])  # fmt: skip
    _lines("broken", [f"{each.way}: {each.kind}: {each.reason}" for each in judgement.broken])
    console.print()
    counts = ", ".join(f"{number} {name}" for name, number in judgement.counted().items() if number)
    print_text(console, f"tokens: {counts or 'none'}")
    if judgement.open_rows:
        print_text(console, f"rows without a bound: {judgement.open_rows} of {judgement.rows}")
    power = found.power
    print_text(
        console,
        f"power: {found.level} show {power.seen} of {power.known} known bugs at {power.dtype}, on refmoe's own model",
    )
    for note in found.notes:
        print_text(console, f"note: {visible(note)}", "dim")
    for said, listed in ((KNOWN, failures.known), (STALE, failures.passing)):
        for _, entry in listed:
            print_text(console, visible(f"{said}: {entry.reason}"), "bold")


def _order(item: tuple[str, tuple[int, int, bool]]) -> int:
    return [*WAYS].index(item[0])


def _lines(title: str, lines: list[str]) -> None:
    console = open_console()
    for line in lines[:LISTED]:
        print_text(console, f"{title}: {visible(line)}", "red")
    if len(lines) > LISTED:
        print_text(console, f"and {len(lines) - LISTED} more")


def print_commands(folder: str, commands: Mapping[str, tuple[str, str]], url: str) -> None:
    """Print the commands that serve the files of a folder."""
    console = open_console()
    print_text(console, visible(f"{folder}: the model for servers. One of these commands serves it:"))
    for server, (words, about) in commands.items():
        console.print()
        print_text(console, f"{server}: {about}")
        print_text(console, visible(f"    {words}"))
    console.print()
    print_text(console, visible(f"then: refmoe conform --server {url} --dtype DTYPE"))
