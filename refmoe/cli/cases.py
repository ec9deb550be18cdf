# SPDX-License-Identifier: Apache-2.0
"""``refmoe cases``: the golden cases, and one of them in full."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from refmoe.api.facts import FAMILIES, case_facts, listed_cases, named_case
from refmoe.cli.guard import GuardedCommand
from refmoe.cli.options import golden_option, json_option
from refmoe.cli.table import print_table
from refmoe.errors import InputError
from refmoe.report.json_text import json_text

LISTED = ("bfloat16", "float32")
"""The dtypes whose sizes are listed; float16 takes as much as bfloat16."""
MANY = 12
"""The most token ids of a call that are printed."""


@click.command("cases", cls=GuardedCommand, short_help="List the golden cases, or print one in full.")
@click.argument("name", required=False)
@click.option(
    "--family", "families", multiple=True, type=click.Choice(FAMILIES),
    help="Only the cases of this family; repeatable.",
)  # fmt: skip
@golden_option
@json_option
def cases_command(name: str | None, families: tuple[str, ...], golden: Path, as_json: bool) -> None:
    """List the golden cases with what each shows, its dimensions and the size of its weights; or print one in full.

    \b
    refmoe cases
    refmoe cases near-tie
    refmoe cases --family production
    refmoe cases --json

    The family `small` has dimensions as small as a bug allows. `production` has those that the kernels of production
    engines take, such as head_dim 64 and 128, and rows in multiples of 256.
    """
    if name is not None and families:
        raise InputError("--family says which cases are listed, but one case was named")
    if name is not None:
        facts = case_facts(named_case(name, golden))
        click.echo(json_text(facts)) if as_json else print_case(facts)
        return
    found = [case_facts(case) for case in listed_cases(golden, families)]
    if as_json:
        click.echo(json_text(found))
        return
    rows = [[each["name"], *cells(each), each["shows"]] for each in found]
    headings = ["case", "dims", "layers", "experts", "tokens", *LISTED, "what it shows"]
    print_table(headings, rows, right=range(2, 7), optional=[4, 2, 6, 5, 3, 1])


def cells(facts: dict[str, Any]) -> list[str]:
    """The numbers of a case for its row."""
    config = facts["config"]
    return [
        f"{config['dim']} x {config['hidden_dim']}",
        str(config["layers"] if facts["layers"] is None else facts["layers"][1]),
        f"{config['experts_per_token']} of {config['experts']}",
        str(facts["tokens"]),
        *(decimal(facts["weight_bytes"][dtype]) for dtype in LISTED),
    ]


def print_case(facts: dict[str, Any]) -> None:
    """Print a case in full."""
    click.echo(f"{facts['name']}\n\n{filled(facts['why'], '  ', '  ')}\n")
    for field in ("clauses", "bugs", "conditions"):
        click.echo(filled(f"{field:12}{', '.join(facts[field]) or 'none'}", "", " " * 12))
    click.echo(f"{'weights':12}formula of seed {facts['seed']}, {facts['parameters']:,} parameters; " + "; ".join(
        f"{dtype} {decimal(size)}" for dtype, size in facts["weight_bytes"].items()
    ))  # fmt: skip
    if facts["layers"] is not None:
        click.echo(f"{'computed':12}layers {facts['layers'][0]} to {facts['layers'][1] - 1} only")
    click.echo(f"{'golden':12}{'every value' if facts['store'] == 'trace' else 'fingerprints of the values'}")
    click.echo("\nconfig")
    for field, value in facts["config"].items():
        click.echo(f"  {field:18}{'none' if value is None else value}")
    click.echo("\ncalls")
    for call in facts["calls"]:
        if call["op"] == "packed":
            click.echo(f"  packed  {'; '.join(map(ids, call['segments']))}")
            continue
        kept = "" if call["keep"] is None else f", cache cut to {call['keep']} tokens"
        unread = "" if call["read"] else "; nobody reads its outputs"
        click.echo(f"  {call['op']:8}sequence {call['sequence']}: {ids(call['tokens'])}{kept}{unread}")


def filled(text: str, first: str, others: str) -> str:
    """Text in lines of readable length; no name is broken at its hyphens."""
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def ids(tokens: list[int]) -> str:
    """Token ids; of many the first few and their number."""
    shown = ",".join(map(str, tokens[:MANY]))
    return shown if len(tokens) <= MANY else f"{shown},... ({len(tokens)} tokens)"
