# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands that check a function by a contract: their options, and how verdicts are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from refmoe.api.contract_process import TIMEOUT, Checked
from refmoe.api.contracts import verdict_facts, verdict_summary, verdict_words
from refmoe.cli.options import Decimal, Integer
from refmoe.cli.table import print_table
from refmoe.report.json_text import json_text
from refmoe.report.neutral import sentence

if TYPE_CHECKING:
    from refmoe.contracts.checking import Verdict

SHOWN = 5
"""The most lines of what a function printed that are shown."""


def check_options(examples: int) -> Callable[[Any], Any]:
    """The options of a check by a contract.   examples: the number for each law, unless told otherwise"""

    def add(command: Any) -> Any:
        for option in reversed((
            click.option("--examples", type=Integer(1), default=examples, show_default=True, help="Examples per law."),
            click.option("--law", "laws", multiple=True, metavar="NAME", help="Only this law; repeatable."),
            click.option(
                "--timeout", type=Decimal(0, 86400, min_open=True), default=TIMEOUT, show_default=True,
                metavar="SECONDS", help="The time for each law, and for the import of MODULE.",
            ),
        )):  # fmt: skip
            command = option(command)
        return command

    return add


def show_checked(found: Checked, as_json: bool) -> int:
    """Print the verdicts, and what the function printed. Returns the exit status."""
    if found.bytes_printed:
        name = found.verdicts[0].law.contract.subject if found.verdicts else "function"
        click.echo(f"the {name} printed {found.bytes_printed:,} bytes, which end with", err=True)
        for line in found.printed[-SHOWN:]:
            click.echo(f"  {sentence(line)}", err=True)
    if as_json:
        click.echo(json_text({"laws": [verdict_facts(verdict) for verdict in found.verdicts]}))
    else:
        print_verdicts(found.verdicts)
    outcomes = {verdict.outcome for verdict in found.verdicts}
    return 1 if "fail" in outcomes else 3 if "not judged" in outcomes else 0


def print_verdicts(verdicts: list[Verdict]) -> None:
    """Print a table of the laws, then each broken law with its smallest example."""
    rows, styles = [], []
    for verdict in verdicts:
        failed = verdict.outcome == "fail"
        words = "smallest example below" if failed else verdict.words
        rows.append((verdict.law.name, "FAIL" if failed else verdict.outcome, str(verdict.examples or ""), words))
        styles.append("bold red" if failed else "dim" if verdict.outcome != "pass" else None)
    print_table(("law", "", "examples", ""), rows, styles=styles, right=[2], wrap=True)
    for verdict in verdicts:
        if verdict.outcome == "fail":
            click.echo("\n" + verdict_words(verdict))
    click.echo("\n" + verdict_summary(verdicts))
