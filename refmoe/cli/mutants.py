"""``refmoe mutants``: the catalogue of known bugs, and the matrix that proves the suite can fail."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from refmoe.atomic import replacing
from refmoe.checkpoint.json_file import read_json
from refmoe.cli.options import GOLDEN, PATH, jobs_option, json_option, progress_bar
from refmoe.errors import InputError
from refmoe.golden import find_cases
from refmoe.mutants.catalogue import MUTANTS
from refmoe.mutants.matrix import MATRIX_FILE, POLICIES, compute_matrix, runnable, summarise, to_json
from refmoe.mutants.mutant import Mutant

Names = tuple[str, ...]


@click.group("mutants", short_help="Known bugs of the field, and the proof that each is caught.")
def mutants_command() -> None:
    """The catalogue of known bugs as variations of the specification.

    \b
    refmoe mutants list
    refmoe mutants show norm-eps-outside-sqrt
    refmoe mutants matrix
    """


@mutants_command.command("list", short_help="All mutants, a line each.")
@json_option
def list_command(as_json: bool) -> None:
    """Print id, class, the clauses that it breaks and what it does.

    \b
    refmoe mutants list
    """
    if as_json:
        click.echo(json.dumps([record(each) for each in MUTANTS.values()]))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("mutant", "class", "breaks", "what it does"):
        table.add_column(heading, overflow="fold")
    for each in MUTANTS.values():
        table.add_row(each.id, each.kind, " ".join(each.breaks), each.about)
    Console(highlight=False).print(table)


@mutants_command.command("show", short_help="One mutant in full.")
@click.argument("name", metavar="ID")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Print everything that is known of one mutant.

    \b
    refmoe mutants show attn-gqa-tile
    """
    each = _named(name)
    if as_json:
        click.echo(json.dumps(record(each)))
        return
    for field, value in record(each).items():
        if value:
            click.echo(f"{field:10} {', '.join(value) if isinstance(value, list) else value}")


@mutants_command.command("matrix", short_help="Run mutants on cases at dtypes and judge each.")
@click.option("--golden", type=PATH, default=GOLDEN, show_default=True, help="Where cases are, and the matrix.")
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; may be given again.")
@click.option("--mutant", "names", multiple=True, metavar="ID", help="Only this mutant; may be given again.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES), help="Only this dtype.")
@jobs_option
@json_option
@click.pass_context
def matrix_command(
    context: click.Context, golden: Path, cases: Names, names: Names, policies: Names, jobs: int | None, as_json: bool
) -> None:
    """Judge every mutant on every case in float32, bfloat16 and float16 as if it were a foreign engine.

    \b
    refmoe mutants matrix
    refmoe mutants matrix --mutant rope-sign-flipped --case walking-skeleton

    The whole matrix is written to golden/matrix.json; a part of it is printed. Exit status 1 when the specification
    itself fails somewhere, or a mutant lives in float32.
    """
    for name in names:
        _named(name)
    folders = [golden / name for name in cases] if cases else find_cases(golden)
    chosen, used = names or runnable(), policies or POLICIES
    with progress_bar("matrix", len(folders) * len(used)) as advance:
        outcomes = compute_matrix(folders, chosen, used, jobs, advance)
    if not (cases or names or policies):
        with replacing(golden / MATRIX_FILE) as temporary:
            temporary.write_text(to_json(outcomes, golden))
        _report(context, golden, as_json)
        return
    if as_json:
        click.echo(json.dumps([asdict(each) for each in outcomes]))
        return
    for each in outcomes:
        place = f"{each.step}: {each.by}, {each.rung}" if each.killed else ""
        click.echo(f"{each.mutant:32} {each.case:28} {each.policy:9} {each.verdict:15} {place}")


def _report(context: click.Context, golden: Path, as_json: bool) -> None:
    values: dict[str, Any] = read_json(golden / MATRIX_FILE).values
    summary = summarise(values["kills"], [folder.name for folder in find_cases(golden)])
    if as_json:
        click.echo(json.dumps(asdict(summary)))
    else:
        for policy in POLICIES:
            alive = f"; alive: {', '.join(summary.alive[policy])}" if summary.alive[policy] else ""
            click.echo(f"{policy:9} {summary.killed[policy]} of {summary.mutants} mutants killed{alive}")
        click.echo(f"the specification itself fails in {len(summary.false_alarms)} of its runs")
        click.echo(f"cases that alone kill nothing: {', '.join(summary.redundant) or 'none'}")
    if summary.false_alarms or summary.alive["float32"]:
        context.exit(1)


def record(each: Mutant) -> dict[str, Any]:
    """A mutant as JSON."""
    return {
        "id": each.id, "class": each.kind, "about": each.about, "breaks": list(each.breaks),
        "needs": list(each.needs), "touches": list(each.touches), "severity": each.severity, "fix": each.fix,
        "equivalent": each.equivalent, "sources": list(each.sources),
    }  # fmt: skip


def _named(name: str) -> Mutant:
    if name not in MUTANTS:
        raise InputError(f"mutant '{name}' is unknown; `refmoe mutants list` has all {len(MUTANTS)}")
    return MUTANTS[name]
