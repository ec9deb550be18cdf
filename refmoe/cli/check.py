"""``refmoe check``: recompute every golden and compare its bits."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refmoe import golden
from refmoe.cli.options import GOLDEN, PATH, json_option, progress_bar


@click.command("check", short_help="Recompute every golden and compare its bits.")
@click.argument("folder", type=PATH, default=GOLDEN, required=False)
@json_option
@click.pass_context
def check_command(context: click.Context, folder: Path, as_json: bool) -> None:
    """Recompute every golden case below FOLDER (default: golden) and compare every bit and digest.

    \b
    refmoe check
    refmoe check golden/walking-skeleton --json

    Exit status 1 when anything differs; each line names the case, the tensor and the element.
    """
    folders = golden.find_cases(folder)
    results: dict[str, list[golden.Difference]] = {}
    with progress_bar("check", len(folders)) as advance:
        for case in folders:
            results[case.name] = golden.check(case)
            advance()
    if as_json:
        cases = {name: [difference.what for difference in found] for name, found in results.items()}
        click.echo(json.dumps({"ok": not any(cases.values()), "cases": cases}))
    else:
        for name, found in results.items():
            click.echo(f"{'FAIL' if found else 'ok  '}  {name}")
            for difference in found:
                click.echo(f"      {difference.what}")
        bad = sum(bool(found) for found in results.values())
        click.echo(f"{len(results)} case{'s' * (len(results) != 1)} recomputed, {bad} differ")
    if any(results.values()):
        context.exit(1)
