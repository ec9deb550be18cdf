# SPDX-License-Identifier: Apache-2.0
"""``refmoe mutants``: the catalogue of known bugs, and the matrix that proves the suite can fail."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from refmoe.api.facts import PRODUCTION
from refmoe.api.files import write_text
from refmoe.api.known_bugs import (
    DTYPES,
    Part,
    Recorded,
    Repeated,
    every_bug,
    judge_all,
    judge_mutants,
    known_bug,
    matrix_page,
    measure_power,
    measured_power,
    mutant_facts,
    recorded_matrix,
    repeat,
    repeat_production,
    specification_fails,
)
from refmoe.cli.guard import OUTPUT, PAGE, GuardedCommand
from refmoe.cli.options import executor_option, golden_option, json_option, progress_bar, written_golden_option
from refmoe.cli.table import print_table
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.matrix_text import family_lines, repeated_lines, stale_lines, summary_lines

Names = tuple[str, ...]


@click.group("mutants", short_help="Known bugs of the field, and the proof that each is caught.")
def mutants_command() -> None:
    """The catalogue of known bugs as variations of the specification.

    \b
    refmoe mutants list
    refmoe mutants show norm-eps-outside-sqrt
    refmoe mutants results
    refmoe mutants matrix --changed --golden golden
    """


@mutants_command.command("list", cls=GuardedCommand, short_help="All mutants, a line each.")
@json_option
def list_command(as_json: bool) -> None:
    """Print id, class, the clauses that it breaks and what it does.

    \b
    refmoe mutants list
    """
    if as_json:
        click.echo(json_text([mutant_facts(each) for each in every_bug()]))
        return
    rows = [(each.id, each.kind, " ".join(each.breaks), " ".join(each.about.split())) for each in every_bug()]
    print_table(("mutant", "class", "breaks", "what it does"), rows, optional=[1, 2])


@mutants_command.command("show", cls=GuardedCommand, short_help="One mutant in full.")
@click.argument("name", metavar="ID")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Print everything that is known of one mutant.

    \b
    refmoe mutants show attn-gqa-tile
    """
    facts = mutant_facts(known_bug(name))
    if as_json:
        click.echo(json_text(facts))
        return
    for field, value in facts.items():
        if field == "unseen":
            for dtype, reason in value.items():
                click.echo(f"{field:10} {dtype}: {reason}")
        elif value:
            click.echo(f"{field:10} {', '.join(value) if isinstance(value, list) else value}")


@mutants_command.command("matrix", cls=GuardedCommand, short_help="Run mutants on cases at dtypes and judge each.")
@written_golden_option("the matrix is")
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@click.option("--mutant", "names", multiple=True, metavar="ID", help="Only this mutant; repeatable.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this dtype; repeatable.")
@click.option("--changed", "mode", flag_value="changed", help="Only the runs that changed files can affect.")
@click.option("--sample", "mode", flag_value="sample", help="Each mutant on one case that killed it; writes nothing.")
@executor_option("Judge cases side by side,")
@json_option
@click.pass_context
def matrix_command(
    context: click.Context,
    /,
    golden: Path | None,
    cases: Names,
    names: Names,
    dtypes: Names,
    mode: str | None,
    executor: str | None,
    as_json: bool,
) -> None:
    """Judge every mutant on every case in float32, bfloat16 and float16 as if it were a foreign engine.

    \b
    refmoe mutants matrix --golden golden
    refmoe mutants matrix --changed --golden golden
    refmoe mutants matrix --mutant rope-sign-flipped --case walking-skeleton

    The whole matrix takes some twenty minutes of two cores. With --golden it is written to matrix.json of that folder,
    with digests of all that it depends on, and entered in the manifest. A part of it is printed only. With --changed,
    the runs that changed files can affect are repeated, and with --golden matrix.json is made current. On the cases for
    production kernels each mutant runs until one kills it; matrix-production.json has that.

    Exit status 1 when the specification itself fails somewhere, or a mutant lives without a known reason. With
    --changed and --sample, also when a mutant that was killed is not any more.
    """
    part = Part(cases, names, dtypes)
    if mode is not None and part.given:
        raise InputError(f"--{mode} says what is run, so no --case, --mutant or --dtype was expected beside it")
    if mode is not None:
        _again(context, mode, golden, executor, as_json)
    elif part.given:
        outcomes = judge_mutants(part, golden, executor=executor, bars=progress_bar)
        if as_json:
            click.echo(json_text([asdict(each) for each in outcomes]))
        else:
            places = [f"{each.step}: {each.by}, {each.rung}" if each.killed else "" for each in outcomes]
            rows = [
                (each.mutant, each.case, each.policy, each.verdict, place)
                for each, place in zip(outcomes, places, strict=True)
            ]
            print_table([""] * 5, rows)
        if specification_fails(outcomes):
            context.exit(1)
    else:
        _summary(context, judge_all(golden, write=golden is not None, executor=executor, bars=progress_bar), as_json)


@mutants_command.command(
    "results", cls=GuardedCommand, short_help="What the recorded matrix says, in short or as a page."
)
@golden_option
@click.option("--html", type=PAGE, metavar="FILE", help="Write the whole matrix as one page that needs no network.")
@json_option
@click.pass_context
def results_command(context: click.Context, golden: Path, html: Path | None, as_json: bool) -> None:
    """Print who is killed and who lives, and which cases do the killing, as matrix.json of the golden folder has it.

    \b
    refmoe mutants results
    refmoe mutants results --html matrix.html

    Exit status 1 when the specification itself fails somewhere, or a mutant lives without a known reason.
    """
    recorded = recorded_matrix(golden)
    if html is not None:
        write_text(html, matrix_page(recorded, golden))
    _summary(context, recorded, as_json)


@mutants_command.command("power", cls=GuardedCommand, short_help="How many known bugs each set of taps shows.")
@click.option("--measure", "out", type=OUTPUT, metavar="FILE", help="Measure, and write the table to this file.")
@click.option("--mutant", "names", multiple=True, metavar="ID", help="Measure this mutant; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Measure all mutants; default: those that the table lacks.")
@golden_option
@executor_option("Judge cases side by side,")
@json_option
def power_command(
    out: Path | None, names: Names, everything: bool, golden: Path, executor: str | None, as_json: bool
) -> None:
    """Print how many known bugs are seen with each set of taps, at each dtype.

    \b
    refmoe mutants power
    refmoe mutants power --measure refmoe/suite/power.json
    refmoe mutants power --measure refmoe/suite/power.json --all

    The package holds the table, and every report states its own line of it. Each mutant is judged on a golden case that
    shows it with all taps, and there with fewer. All mutants take about ten minutes of one core.
    """
    if out is None and (names or everything):
        raise InputError("--mutant and --all say what is measured, so --measure FILE was expected beside them")
    if out is not None:
        measure_power(out, names, golden, everything=everything, executor=executor, bars=progress_bar)
        return
    known, found = measured_power()
    if as_json:
        click.echo(json_text({"known": known, "seen": found}))
        return
    rows = [(taps, *(str(found[dtype][taps]) for dtype in DTYPES)) for taps in found[DTYPES[0]]]
    print_table(("taps", *DTYPES), rows)
    click.echo(f"of {known} known bugs")


def _summary(context: click.Context, recorded: Recorded, as_json: bool) -> None:
    summary = recorded.summary
    production = recorded.production
    if as_json:
        facts = asdict(summary) | {"problems": recorded.problems, "changed": recorded.stale}
        if production is not None:
            facts |= {"production": {"killed": production.summary.killed, "changed": production.stale}}
        click.echo(json_text(facts))
    else:
        lines = [*summary_lines(summary), *stale_lines(recorded.stale)]
        if production is not None:
            lines += [*family_lines(PRODUCTION, production.summary), *stale_lines(production.stale)]
        for line in lines:
            click.echo(line)
    if recorded.problems:
        context.exit(1)


def _again(context: click.Context, mode: str, golden: Path | None, executor: str | None, as_json: bool) -> None:
    """Repeat a part of the recorded matrix."""
    done = repeat(mode, golden, write=golden is not None, executor=executor, bars=progress_bar)
    production = repeat_production(mode, golden, write=golden is not None, executor=executor, bars=progress_bar)
    if as_json:
        more = {} if production is None else {"production": _repeated_facts(production)}
        click.echo(json_text(_repeated_facts(done) | more))
    else:
        for line in repeated_lines(done.parts, done.work, done.problems):
            click.echo(line)
        if production is not None:
            click.echo("\nthe cases for production kernels")
            for line in repeated_lines(production.parts, production.work, production.problems):
                click.echo(line)
    if done.problems or (production is not None and production.problems):
        context.exit(1)


def _repeated_facts(done: Repeated) -> dict[str, Any]:
    return {
        "changed": done.parts, "runs": len(done.outcomes), "lost": [asdict(each) for each in done.lost],
        "gained": [asdict(each) for each in done.gained], "problems": done.problems,
    }  # fmt: skip
