"""``refmoe check``: recompute every golden and compare its bits."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refmoe import golden
from refmoe.cli.options import GOLDEN, PATH, jobs_option, json_option, progress_bar
from refmoe.parallel import results


@click.command("check", short_help="Recompute every golden and compare its bits.")
@click.argument("folder", type=PATH, default=GOLDEN, required=False)
@jobs_option
@json_option
@click.pass_context
def check_command(context: click.Context, folder: Path, jobs: int | None, as_json: bool) -> None:
    """Recompute every golden case below FOLDER (default: golden), compare every bit, and digest every other file.

    \b
    refmoe check
    refmoe check golden/walking-skeleton --json

    Exit status 1 when anything differs; each line names the case, the tensor and the element. A file that a killed
    `refmoe emit` left over is noted and harms nothing.
    """
    folders = golden.find_cases(folder)
    whole = folders != [folder]
    with progress_bar("check", len(folders)) as advance, results(golden.check, folders, jobs) as checked:
        found = {}
        for case, differences in checked:
            found[case] = differences
            advance()
    named = {case.resolve().name: [difference.what for difference in found[case]] for case in folders}
    documents = [difference.what for difference in golden.verify_documents(folder)] if whole else []
    left = [str(path) for place in [folder, *folders][not whole :] for path in golden.leftovers(place)]
    bad = sum(map(bool, named.values()))
    if as_json:
        ok = not bad and not documents
        click.echo(json.dumps({"ok": ok, "cases": named, "documents": documents, "leftovers": left}))
    else:
        for name, whats in [*named.items(), *([("(documents)", documents)] if whole else [])]:
            click.echo(f"{'FAIL' if whats else 'ok  '}  {name}")
            for what in whats:
                click.echo(f"      {what}")
        for path in left:
            click.echo(f"note  {path}: left over by an emission that was killed; the next one removes it")
        click.echo(f"{len(named)} case{'s' * (len(named) != 1)} recomputed, {bad} differ")
    if bad or documents:
        context.exit(1)
