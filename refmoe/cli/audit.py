"""``refmoe audit``: what proves each clause of the specification."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from refmoe.audit import Coverage, coverage, unknown
from refmoe.checkpoint.json_file import read_json
from refmoe.cli.options import GOLDEN, PATH, json_option
from refmoe.golden import find_cases, read_case
from refmoe.mutants.catalogue import MUTANTS
from refmoe.mutants.matrix import MATRIX_FILE, summarise


@click.command("audit", short_help="What proves each clause: code, tests, mutants, cases.")
@click.option("--golden", type=PATH, default=GOLDEN, show_default=True, help="Where cases are, and the matrix.")
@click.option("--tests", type=PATH, default=Path("tests"), show_default=True, help="Where tests are.")
@json_option
@click.pass_context
def audit_command(context: click.Context, golden: Path, tests: Path, as_json: bool) -> None:
    """Print every clause with the code that states it, the tests that name it, the mutants that break it and the cases
    that exercise it.

    \b
    refmoe audit
    refmoe audit --json

    Exit status 1 when nothing proves a clause, a mutant breaks a clause that nobody states, or a mutant lives in
    float32 according to the matrix.
    """
    cases = [read_case(folder) for folder in find_cases(golden)]
    rows = coverage(cases, MUTANTS, tests if tests.is_dir() else None)
    strays = unknown(rows, MUTANTS)
    alive = _alive(golden, [case.name for case in cases])
    if as_json:
        values = {"clauses": [asdict(row) | {"gaps": row.gaps} for row in rows], "unknown": strays, "alive": alive}
        click.echo(json.dumps(values))
    else:
        _print(rows)
        for stray in strays:
            click.echo(f"FAIL  {stray} is stated nowhere")
        for name in alive:
            click.echo(f"FAIL  mutant {name} lives in float32")
        lacking = sum(bool(row.gaps) for row in rows)
        click.echo(
            f"{len(rows)} clauses, {lacking} without proof; {len(MUTANTS)} mutants, {len(alive)} alive in float32"
        )
    if strays or alive or any(row.gaps for row in rows):
        context.exit(1)


def _alive(golden: Path, cases: list[str]) -> list[str]:
    values: dict[str, Any] = read_json(golden / MATRIX_FILE).values
    return list(summarise(values["kills"], cases).alive["float32"])


def _print(rows: list[Coverage]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("clause", "code", "tests", "mutants", "cases"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = "bold red" if row.gaps else None
        tests = f"{len(row.tests)}: {row.tests[0]}" if row.tests else "-"
        mutants = ", ".join(row.mutants) or "-"
        table.add_row(row.clause, row.code, tests, mutants, str(len(row.cases)) if row.cases else "-", style=style)
    console.print(table)
