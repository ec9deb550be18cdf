"""``refmoe mutants``: the catalogue of known bugs, and the matrix that proves the suite can fail."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.cli.options import GOLDEN, PATH, jobs_option, json_option, progress_bar
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.report.matrix_text import repeated_lines, stale_lines, summary_lines
from refmoe.suite import MANIFEST_FILE, file_digest, find_cases, read_case, read_folder_manifest, write_manifest
from refmoe.suite.matrix.changes import gains, losses, outside_changed, plan, revised_matrix, sample
from refmoe.suite.matrix.dependencies import changed, digests
from refmoe.suite.matrix.file import MATRIX_FILE, Matrix, read_matrix, to_matrix, write_matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, Outcome, compute_matrix, runnable, whole
from refmoe.suite.matrix.summary import summarise
from refmoe.suite.matrix.surroundings import judge_outside

Names = tuple[str, ...]


@click.group("mutants", short_help="Known bugs of the field, and the proof that each is caught.")
def mutants_command() -> None:
    """The catalogue of known bugs as variations of the specification.

    \b
    refmoe mutants list
    refmoe mutants show norm-eps-outside-sqrt
    refmoe mutants results
    refmoe mutants matrix --changed
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
        if field == "unseen":
            for policy, reason in value.items():
                click.echo(f"{field:10} {policy}: {reason}")
        elif value:
            click.echo(f"{field:10} {', '.join(value) if isinstance(value, list) else value}")


@mutants_command.command("matrix", short_help="Run mutants on cases at dtypes and judge each.")
@click.option("--golden", type=PATH, default=GOLDEN, show_default=True, help="Where cases are, and the matrix.")
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; may be given again.")
@click.option("--mutant", "names", multiple=True, metavar="ID", help="Only this mutant; may be given again.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES), help="Only this dtype.")
@click.option("--changed", "mode", flag_value="changed", help="Only what changed files can affect, and write it.")
@click.option("--sample", "mode", flag_value="sample", help="Each mutant on one case that killed it; writes nothing.")
@jobs_option
@json_option
@click.pass_context
def matrix_command(context: click.Context, /, golden: Path, jobs: int | None, as_json: bool, **options: Any) -> None:
    """Judge every mutant on every case in float32, bfloat16 and float16 as if it were a foreign engine.

    \b
    refmoe mutants matrix
    refmoe mutants matrix --changed
    refmoe mutants matrix --mutant rope-sign-flipped --case walking-skeleton

    The whole matrix takes some twenty minutes of two cores. It is written to golden/matrix.json, with digests of all
    that it depends on, and entered in golden/manifest.json. A part of it is printed only. With --changed, the runs that
    changed files can affect are repeated, and golden/matrix.json is made current.

    Exit status 1 when the specification itself fails somewhere, or a mutant lives without a known reason. With
    --changed and --sample, also when a mutant that was killed is not any more.
    """
    part = Part(**options)
    for name in part.names:
        _named(name)
    if part.mode and part.given:
        raise InputError(f"--{part.mode} says what is run, so no --case, --mutant or --policy was expected beside it")
    if part.mode:
        _again(context, golden, part.mode, jobs, as_json)
        return
    folders = [golden / name for name in part.cases] if part.cases else find_cases(golden)
    work = whole(folders, part.names or runnable(), part.policies or POLICIES)
    seen = {} if part.given else judge_outside(golden)
    with progress_bar("matrix", len(work)) as advance:
        outcomes = compute_matrix(work, jobs, advance)
    if part.given:
        _print_outcomes(outcomes, as_json)
        if any(each.killed for each in outcomes if each.mutant == SPECIFICATION):
            context.exit(1)
        return
    matrix = to_matrix(outcomes, seen, digests(golden))
    write_matrix(golden / MATRIX_FILE, matrix)
    _enter_in_manifest(golden)
    _summary(context, matrix, golden, as_json)


@dataclass(frozen=True)
class Part:
    """The part of the matrix that the options name."""

    cases: Names
    names: Names
    """Ids of mutants."""
    policies: Names
    mode: str | None
    """``changed``, ``sample``, or None."""

    @property
    def given(self) -> bool:
        """Whether cases, mutants or dtypes are named."""
        return bool(self.cases or self.names or self.policies)


@mutants_command.command("results", short_help="What the recorded matrix says, in short or as a page.")
@click.option("--golden", type=PATH, default=GOLDEN, show_default=True, help="Where cases are, and the matrix.")
@click.option("--html", type=PATH, metavar="FILE", help="Write the whole matrix as one page that needs no network.")
@json_option
@click.pass_context
def results_command(context: click.Context, golden: Path, html: Path | None, as_json: bool) -> None:
    """Print who is killed and who lives, and which cases do the killing, as golden/matrix.json has it.

    \b
    refmoe mutants results
    refmoe mutants results --html matrix.html

    Exit status 1 when the specification itself fails somewhere, or a mutant lives without a known reason.
    """
    matrix = read_matrix(golden / MATRIX_FILE)
    if html is not None:
        from refmoe.report.matrix_html import to_html

        cases = [read_case(folder) for folder in find_cases(golden)]
        with replacing(html) as temporary:
            temporary.write_text(to_html(matrix, cases), encoding="utf-8")
    _summary(context, matrix, golden, as_json)


def _enter_in_manifest(golden: Path) -> None:
    """Tell the manifest of the golden folder, where there is one, of the matrix and of nothing else."""
    if (golden / MANIFEST_FILE).exists():
        manifest = read_folder_manifest(golden)
        files = manifest["files"] | {MATRIX_FILE: file_digest(golden / MATRIX_FILE)}
        write_manifest(golden, manifest | {"files": dict(sorted(files.items()))})


def _summary(context: click.Context, matrix: Matrix, golden: Path, as_json: bool) -> None:
    summary = summarise(matrix, [folder.name for folder in find_cases(golden)])
    stale = sorted(changed(matrix.sources, golden))
    if as_json:
        click.echo(json.dumps(asdict(summary) | {"problems": summary.problems, "changed": stale}))
    else:
        for line in [*summary_lines(summary), *stale_lines(stale)]:
            click.echo(line)
    if summary.problems:
        context.exit(1)


def _again(context: click.Context, golden: Path, mode: str, jobs: int | None, as_json: bool) -> None:
    """Repeat a part of the recorded matrix. mode: ``changed``, which makes the record current, or ``sample``"""
    matrix = read_matrix(golden / MATRIX_FILE)
    parts = changed(matrix.sources, golden)
    cases = {case.name: case for case in map(read_case, find_cases(golden))}
    work = plan(matrix, parts, cases) if mode == "changed" else sample(matrix, cases)
    with progress_bar("matrix", len(work)) as advance:
        outcomes = compute_matrix(work, jobs, advance)
    seen = judge_outside(golden) if outside_changed(parts) else matrix.outside
    lost = losses(matrix, outcomes, seen)
    revised = revised_matrix(matrix, outcomes, seen, digests(golden) if mode == "changed" else matrix.sources)
    if mode == "changed" and parts:
        write_matrix(golden / MATRIX_FILE, revised)
        _enter_in_manifest(golden)
    problems = [*map(str, lost), *summarise(revised, [*cases]).problems]
    if as_json:
        more = gains(matrix, outcomes)
        values = {
            "changed": sorted(parts), "runs": len(outcomes), "lost": [asdict(each) for each in lost],
            "gained": [asdict(each) for each in more], "problems": problems,
        }  # fmt: skip
        click.echo(json.dumps(values))
    else:
        for line in repeated_lines(sorted(parts), work, problems):
            click.echo(line)
    if problems:
        context.exit(1)


def _print_outcomes(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(each) for each in outcomes]))
        return
    for each in outcomes:
        place = f"{each.step}: {each.by}, {each.rung}" if each.killed else ""
        click.echo(f"{each.mutant:32} {each.case:28} {each.policy:9} {each.verdict:15} {place}")


def record(each: Mutant) -> dict[str, Any]:
    """A mutant as JSON."""
    return {
        "id": each.id, "class": each.kind, "about": each.about, "breaks": list(each.breaks),
        "needs": list(each.needs), "touches": list(each.touches), "severity": each.severity, "fix": each.fix,
        "equivalent": each.equivalent, "unseen": dict(each.unseen), "sources": list(each.sources),
    }  # fmt: skip


def _named(name: str) -> Mutant:
    if name not in MUTANTS:
        raise InputError(f"mutant '{name}' is unknown; `refmoe mutants list` has all {len(MUTANTS)}")
    return MUTANTS[name]
