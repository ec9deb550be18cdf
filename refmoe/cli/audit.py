"""``refmoe audit``: the proof of each clause of the specification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from refmoe.bugs.catalogue import MUTANTS
from refmoe.cli.options import GOLDEN, PATH, json_option
from refmoe.errors import InputError
from refmoe.report.matrix_text import failures, stale_lines
from refmoe.suite import find_cases
from refmoe.suite.audit import Coverage, audit
from refmoe.suite.matrix.dependencies import changed
from refmoe.suite.matrix.file import MATRIX_FILE, read_matrix
from refmoe.suite.matrix.summary import summarise


@click.command("audit", short_help="The proof of each clause: code, tests, mutants, cases.")
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

    A clause is proven by a test that names it in its own source, or by a killed mutant of it: golden/matrix.json says
    whether it is killed wherever a case can show it. Exit status 1 when a clause has neither, something names a
    clause that nobody states, a mutant lives without a known reason, or the specification itself fails.
    """
    if not tests.is_dir():
        raise InputError(f"{tests}: no such folder, but that of the tests was expected")
    matrix = read_matrix(golden / MATRIX_FILE)
    summary = summarise(matrix, [folder.name for folder in find_cases(golden)])
    found = audit(golden, MUTANTS, summary.dead, tests)
    problems = [f"{row.clause} ({row.code}): {gap}" for row in found.gaps for gap in row.gaps]
    problems += [f"{stray} names it, but nobody states it" for stray in found.strays]
    problems += summary.problems
    numbers = {"all": counts(found.rows), "forward pass": counts([row for row in found.rows if row.forward_pass])}
    stale = sorted(changed(matrix.sources, golden))
    if as_json:
        rows = [asdict(row) | {"area": row.area, "gaps": row.gaps} for row in found.rows]
        values = {
            "clauses": rows, "counts": numbers, "mutants": len(MUTANTS), "killed": len(summary.dead),
            "problems": problems, "changed": stale,
        }  # fmt: skip
        click.echo(json.dumps(values))
    else:
        _print(found.rows)
        for what, count in numbers.items():
            click.echo(f"clauses, {what}: {', '.join(f'{number} {name}' for name, number in count.items())}")
        click.echo(f"mutants: {len(summary.dead)} of {len(MUTANTS)} killed, {len(summary.equivalent)} equivalent")
        for line in [*stale_lines(stale), *failures(problems)]:
            click.echo(line)
    if problems:
        context.exit(1)


def counts(rows: Sequence[Coverage]) -> dict[str, int]:
    """The number of clauses, by the kind of their proof."""
    return {
        "stated": len(rows),
        "with a killed mutant": sum(bool(row.killed) for row in rows),
        "named by a test": sum(bool(row.tests) for row in rows),
        "both": sum(bool(row.killed and row.tests) for row in rows),
        "neither": sum(bool(row.gaps) for row in rows),
    }


def _print(rows: Sequence[Coverage]) -> None:
    """A table for each area, so that the model's clauses stand apart from those of routers, text and ranks."""
    console = Console(highlight=False, soft_wrap=True)
    for area, group in groupby(rows, key=lambda row: row.area):
        table = Table(box=None, pad_edge=False, title=f"clauses: {area}", title_justify="left")
        for heading in ("clause", "code", "tests", "mutants", "cases"):
            table.add_column(heading, overflow="fold")
        for row in group:
            style = "bold red" if row.gaps else None
            tests = f"{len(row.tests)}: {row.tests[0]}" if row.tests else "-"
            mutants = ", ".join(row.mutants) or "-"
            table.add_row(row.clause, row.code, tests, mutants, str(len(row.cases)) if row.cases else "-", style=style)
        console.print(table)
