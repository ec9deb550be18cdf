# SPDX-License-Identifier: Apache-2.0
"""``refmoe suite``: check, certify, audit, emit and pack the golden cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from refmoe.api.auditing import Audited, audit_suite
from refmoe.api.facts import FAMILIES, case_facts
from refmoe.api.goldens import Checked, certify_goldens, check_goldens, emit_goldens
from refmoe.api.known_bugs import mutants
from refmoe.api.new_cases import PRESETS, SMALL, Call, Wanted, new_case
from refmoe.api.packing import SIZES, STANDARD, pack_suite
from refmoe.api.rebuilding import Rebuilding, rebuild_goldens, rebuilding_facts
from refmoe.cli.guard import OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import (
    PATH,
    Command,
    Integer,
    Tokens,
    device_option,
    executor_option,
    golden_option,
    json_option,
    progress_bar,
    written_golden_option,
)
from refmoe.cli.sections import Sections
from refmoe.cli.table import print_table
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.matrix_text import failures, stale_lines
from refmoe.report.neutral import sentence

Names = tuple[str, ...]


def cases_argument(command: Command) -> Command:
    """Add the names of cases."""
    return click.argument("names", nargs=-1, metavar="[CASE]...")(command)


@click.group("suite", cls=Sections, short_help="Check, certify, audit and emit the golden cases, and make new ones.")
def suite_command() -> None:
    """The golden cases and the specification themselves.

    \b
    refmoe suite check walking-skeleton near-tie
    """


@click.command("check", cls=GuardedCommand, short_help="Recompute goldens and compare their bits.")
@cases_argument
@golden_option
@device_option("One case at a time; the bits must be the CPU's.")
@executor_option("Work on cases side by side,")
@json_option
@click.pass_context
def check_command(
    context: click.Context, names: Names, golden: Path, device: Place, executor: str | None, as_json: bool
) -> None:
    """Recompute the goldens of each CASE, or of all, and compare every bit, and the digest of every file.

    \b
    refmoe suite check
    refmoe suite check walking-skeleton --json
    refmoe suite check mixtral-8x7b

    A case of full size takes minutes. It is recomputed only if it is named; else its files are compared with their
    digests.

    Exit status 1 when anything differs; each line names the case, the tensor and the element. 2 when nothing differs,
    but the worker process of a case died. A file that a killed `refmoe suite emit`
    left behind is reported, and is harmless.
    """
    found = check_goldens(golden, names, place=device, executor=executor, bars=progress_bar)
    if as_json:
        facts = {"ok": found.ok, "cases": found.cases, "documents": found.documents or []}
        more = {"leftovers": found.leftovers, "not_recomputed": [case.name for case in found.not_recomputed]}
        click.echo(json_text(facts | more | {"unchecked": found.unchecked}))
    else:
        print_checked(found)
    if found.differs:
        context.exit(1)
    if found.unchecked:
        context.exit(2)


def print_checked(found: Checked) -> None:
    """Print a line per case, its differences, and the number of cases."""
    skipped = {case.name for case in found.not_recomputed}
    documents = [] if found.documents is None else [("(documents)", found.documents)]
    for name, differences in [*found.cases.items(), *documents]:
        click.echo(f"{'FAIL' if differences else 'skip' if name in skipped else 'ok  '}  {sentence(name)}")
        for difference in differences:
            click.echo(f"      {sentence(difference)}")
    for path in found.leftovers:
        click.echo(f"note  {sentence(path)}: left over by an emission that was killed; the next one removes it")
    for case in found.not_recomputed:
        click.echo(
            f"note  {case.name}: of full size, so only its files were compared; `refmoe suite check {case.name}` "
            "recomputes it"
        )
    for death in found.unchecked:
        click.echo(f"refmoe: {sentence(death)}", err=True)
    bad = sum(map(bool, found.cases.values()))
    click.echo(f"{found.recomputed} case{'s' * (found.recomputed != 1)} recomputed, {bad} differ")


@click.command(
    "rebuild", cls=GuardedCommand, short_help="Compute goldens anew in an empty folder, and compare digests."
)
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@cases_argument
@click.option(
    "--digests", type=PATH, metavar="FILE", show_default="SHA256SUMS of the golden folder",
    help="The published list of digests.",
)  # fmt: skip
@golden_option
@executor_option("Work on cases side by side,")
@json_option
@click.pass_context
def rebuild_command(
    context: click.Context, folder: Path, names: Names, digests: Path | None, golden: Path, executor: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Compute each CASE, or all, from case.toml into DIR, and compare every file with a published list of digests.

    \b
    refmoe suite rebuild rebuilt
    refmoe suite rebuild rebuilt walking-skeleton --digests refmoe-goldens.SHA256SUMS

    Small cases come first. A case of full size takes minutes, so that it is rebuilt only if it is named. Of it, and of
    the documents beside the cases, the files at hand are compared. A manifest takes its certificate from the golden at
    hand; `refmoe suite certify` proves it.

    Exit status 1 when a digest differs; each line names the file, the digest found and the one expected. 2 when none
    differs, but the worker process of a case died.
    """
    found = rebuild_goldens(
        folder, names, digests=digests, golden=golden, executor=executor, bars=progress_bar
    )  # fmt: skip
    if as_json:
        click.echo(json_text({"folder": str(folder)} | rebuilding_facts(found)))
    else:
        print_rebuilding(found)
    if found.differs:
        context.exit(1)
    if found.unchecked:
        context.exit(2)


def print_rebuilding(found: Rebuilding) -> None:
    """Print a line per case, its differences, and the number of cases."""
    lines: dict[str, Sequence[str]] = {name: each.differences for name, each in found.cases.items()}
    documents = {} if found.documents is None else {"(files that were not rebuilt)": found.documents}
    for name, differences in {**lines, **documents}.items():
        click.echo(f"{'FAIL' if differences else 'ok  '}  {sentence(name)}")
        for difference in differences:
            click.echo(f"      {sentence(difference)}")
    for name in found.not_rebuilt:
        click.echo(f"note  {name}: of full size, so it was not rebuilt; name it to rebuild it")
    for death in found.unchecked:
        click.echo(f"refmoe: {sentence(death)}", err=True)
    bad = sum(bool(each.differences) for each in found.cases.values())
    click.echo(f"{len(found.cases)} case{'s' * (len(found.cases) != 1)} rebuilt, {bad} differ")


@click.command("certify", cls=GuardedCommand, short_help="Prove how close goldens are to the real numbers.")
@cases_argument
@written_golden_option("the certificates are")
@executor_option("Work on cases side by side,")
@json_option
def certify_command(names: Names, golden: Path | None, executor: str | None, as_json: bool) -> None:
    """Run each CASE, or all, in ball arithmetic (Arb), which encloses the real numbers.

    \b
    refmoe suite certify walking-skeleton
    refmoe suite certify --golden golden

    A certificate has per tap a proven bound on |golden - real value|, and the routing decisions that are not proven.
    With --golden it is written into the manifest of each case. Needs the extra 'certify' (python-flint).
    """
    named = certify_goldens(golden, names, write=golden is not None, executor=executor, bars=progress_bar)
    if as_json:
        click.echo(json_text({name: certificate.to_json() for name, certificate in named.items()}))
        return
    for name, certificate in named.items():
        key = max(certificate.relative, key=lambda tap: certificate.relative[tap])
        proven = certificate.decisions - len(certificate.unproven)
        click.echo(
            f"{name}: every value within {certificate.relative[key]:.2e} of its tap's RMS (worst: {key}); "
            f"{proven} of {certificate.decisions} routing decisions proven"
        )


@click.command("emit", cls=GuardedCommand, short_help="Write goldens into a folder of cases.")
@cases_argument
@written_golden_option("the goldens are", required=True)
@device_option("Exact values have the CPU's bits.")
@executor_option("Work on cases side by side,")
@json_option
def emit_command(names: Names, golden: Path, device: Place, executor: str | None, as_json: bool) -> None:
    """Compute each CASE of a folder and write its golden, as its case.toml defines it.

    \b
    refmoe suite emit --golden golden
    refmoe suite emit walking-skeleton --golden golden

    Without a CASE, write those that this version has not already written from their present case.toml, and the
    manifest of the folder; cases of full size must be named. If it is killed, each case is the old one or the new one;
    the same command goes on.
    """
    written = emit_goldens(golden, names, place=device, executor=executor, bars=progress_bar)
    if as_json:
        emitted = [path.parent.resolve().name for path in written]
        click.echo(json_text({"emitted": emitted, "files": [str(path) for path in written]}))
        return
    for path in written:
        click.echo(f"{path}: {path.stat().st_size:,} bytes")
    if not names:
        click.echo(f"{golden}: {len(written)} cases written, the others were up to date")


@click.command("new", cls=GuardedCommand, short_help="Make a case of your own dimensions, with its golden.")
@click.argument("name")
@written_golden_option("the case is", required=True)
@click.option(
    "--like", metavar="CASE", default="walking-skeleton", show_default=True,
    help=f"The case, or {' or '.join(PRESETS)}, whose dimensions it has.",
)  # fmt: skip
@click.option("--config", type=PATH, metavar="FILE", help="A config.json whose dimensions it has instead.")
@click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE",
    help="Change a field of [config] in case.toml, such as layers=2 or window=none; repeatable.",
)  # fmt: skip
@click.option("--seed", type=Integer(0), default=1, show_default=True, help="The weights, by the weight formula.")
@click.option("--tokens", type=Tokens(), help="Token ids of the prefill; drawn by the seed if not given.")
@click.option("--chunk", type=Tokens(), multiple=True, help="After the prefill, a chunk of tokens; repeatable.")
@click.option("--decode", type=Tokens(), help="After the prefill and chunks, decode these tokens one by one.")
@click.option("--why", default="", metavar="TEXT", help="What the case is there to show.")
@click.option("--family", type=click.Choice(FAMILIES), default=SMALL, show_default=True, help="Its family.")
@json_option
def new_command(golden: Path, as_json: bool, **options: Any) -> None:
    """Make the case NAME in a folder of your own: case.toml, its golden and the manifests.

    \b
    refmoe suite new mine --golden my-cases --config path/to/config.json --set layers=2
    refmoe suite new long --golden my-cases --like production-first --set window=16 --tokens 1,2,3 --decode 4,5
    refmoe conform --golden my-cases --adapter transformers

    The conditions that hold are found and written. Weights come from the formula, so nothing is downloaded. Where all
    values would take more than 4 MiB, a fingerprint of each tap is stored; every command takes either.
    """
    tokens, chunk, decode = (options.pop(each) for each in ("tokens", "chunk", "decode"))
    if tokens is None and (chunk or decode):
        raise InputError("--chunk and --decode come after a prefill, so --tokens was expected beside them")
    calls = [] if tokens is None else [Call("prefill", 0, tokens), *(Call("chunk", 0, piece) for piece in chunk)]
    calls += [Call("decode", 0, decode)] if decode else []
    case = new_case(golden, Wanted(calls=tuple(calls), **options))
    if as_json:
        click.echo(json_text(case_facts(case) | {"folder": str(case.folder)}))
        return
    click.echo(f"{case.folder}: {len(case.runs())} runs; conditions: {', '.join(case.conditions) or 'none'}")
    click.echo(f"run an engine on it: refmoe conform --golden {golden} --case {case.name} --adapter NAME")


@click.command("pack", cls=GuardedCommand, short_help="Write cases as data, for tests without Python.")
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@click.option(
    "--size", type=click.Choice(SIZES), default=STANDARD, show_default=True,
    help="Few cases for each change, those that show nearly all known bugs, or all.",
)  # fmt: skip
@golden_option
@executor_option("Work on cases side by side,")
@json_option
def pack_command(folder: Path, size: str, golden: Path, executor: str | None, as_json: bool) -> None:
    """Write golden cases into DIR, with the legal interval of every value in float32, bfloat16 and float16.

    \b
    refmoe suite pack mixtral-pack
    refmoe suite pack mixtral-pack --size smoke

    An engine in any language judges itself by it, without Python: it reads weights and tokens, and compares its values
    with the intervals. PACK.md in the folder defines the layout, and says what the pack cannot see. The same version
    gives the same bytes. DIR is a new folder, or one that holds a pack, which is replaced.
    """
    packed = pack_suite(folder, size, golden, executor=executor, bars=progress_bar)
    if as_json:
        click.echo(json_text(asdict(packed) | {"folder": str(packed.folder)}))
        return
    click.echo(
        f"{sentence(str(packed.folder))}: pack {packed.version}, {packed.size}: {len(packed.cases)} cases, "
        f"{packed.bytes:,} bytes"
    )
    click.echo("PACK.md in it defines the layout, and says what the pack cannot see")


@click.command("audit", cls=GuardedCommand, short_help="Print the proof of each clause: code, tests, mutants, cases.")
@golden_option
@click.option(
    "--tests", type=PATH, metavar="DIR", show_default="those of the clone",
    help="The folder of tests; an installed package has none.",
)  # fmt: skip
@json_option
@click.pass_context
def audit_command(context: click.Context, golden: Path, tests: Path | None, as_json: bool) -> None:
    """Print every clause with the code that states it, the tests that name it, the mutants that break it and the cases
    that exercise it.

    \b
    refmoe suite audit
    refmoe suite audit --json

    A clause is proven by a test that names it in its own source, or by a killed mutant of it: matrix.json of the golden
    folder says whether it is killed wherever a case can show it. Exit status 1 when a clause has neither, something
    names a clause that nobody states, a mutant lives without a known reason, or the specification itself fails.
    """
    audited = audit_suite(golden, tests)
    if as_json:
        click.echo(json_text(audit_facts(audited)))
    else:
        print_audit(audited)
    if audited.problems:
        context.exit(1)


def audit_facts(audited: Audited) -> dict[str, object]:
    """The audit as JSON."""
    return {
        "clauses": [asdict(row) | {"area": row.area, "gaps": row.gaps} for row in audited.found.rows],
        "counts": audited.counts, "mutants": len(mutants()), "killed": len(audited.summary.dead),
        "problems": audited.problems, "changed": audited.stale,
    }  # fmt: skip


def print_audit(audited: Audited) -> None:
    """A table for each area, so that the model's clauses stand apart from those of routers, text and ranks."""
    headings = ("clause", "code", "tests", "mutants", "cases")
    for area, group in groupby(audited.found.rows, key=lambda row: row.area):
        rows = [*group]
        cells = [
            (
                row.clause,
                row.code,
                f"{len(row.tests)}: {row.tests[0]}" if row.tests else "-",
                ", ".join(row.mutants) or "-",
                str(len(row.cases)) if row.cases else "-",
            )
            for row in rows
        ]
        styles = ["bold red" if row.gaps else None for row in rows]
        print_table(headings, cells, title=f"clauses: {area}", styles=styles)
    for what, numbers in audited.counts.items():
        click.echo(f"clauses, {what}: {', '.join(f'{number} {name}' for name, number in numbers.items())}")
    summary = audited.summary
    click.echo(f"mutants: {len(summary.dead)} of {len(mutants())} killed, {len(summary.equivalent)} equivalent")
    for line in [*stale_lines(audited.stale), *failures(audited.problems)]:
        click.echo(line)


assert isinstance(suite_command, Sections)
suite_command.section("Commands", check_command, rebuild_command, certify_command, audit_command)
suite_command.section("Write", emit_command, new_command, pack_command)
