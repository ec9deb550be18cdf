"""``refmoe check``: recompute every golden and compare its bits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from refmoe import suite as golden
from refmoe.cli.options import GOLDEN, PATH, device_option, jobs_option, json_option, progress_bar
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.parallel import results


@click.command("check", short_help="Recompute every golden and compare its bits.")
@click.argument("folder", type=PATH, default=GOLDEN, required=False)
@device_option("One case at a time; the bits must be the CPU's.")
@jobs_option
@json_option
@click.pass_context
def check_command(context: click.Context, folder: Path, device: Place, jobs: int | None, as_json: bool) -> None:
    """Recompute every golden case below FOLDER (default: golden) and compare every bit, and the digest of every file.

    \b
    refmoe check
    refmoe check golden/walking-skeleton --json
    refmoe check golden/mixtral-8x7b

    A case of full size takes minutes. It is recomputed only if FOLDER is its own folder; else its files are compared
    with their digests.

    Exit status 1 when anything differs; each line names the case, the tensor and the element. A file that a killed
    `refmoe emit` left behind is reported, and is harmless.
    """
    folders = golden.find_cases(folder)
    whole = folders != [folder]
    # to recompute one of these takes minutes: only the digests of its files are compared
    large = golden.find_full_size_cases(folder) if whole else []
    found = _recompute(folders, device, jobs) | {case: golden.verify_case_files(case) for case in large}
    named = {case.resolve().name: [difference.what for difference in found[case]] for case in [*folders, *large]}
    documents = [difference.what for difference in golden.verify_documents(folder)] if whole else []
    left = [str(path) for place in [folder, *folders][not whole :] for path in golden.leftovers(place)]
    bad = sum(map(bool, named.values()))
    if as_json:
        ok = not bad and not documents
        facts = {"ok": ok, "cases": named, "documents": documents, "leftovers": left}
        click.echo(json.dumps(facts | {"not_recomputed": [case.name for case in large]}))
    else:
        skipped = {case.name for case in large}
        for name, whats in [*named.items(), *([("(documents)", documents)] if whole else [])]:
            click.echo(f"{'FAIL' if whats else 'skip' if name in skipped else 'ok  '}  {name}")
            for what in whats:
                click.echo(f"      {what}")
        for path in left:
            click.echo(f"note  {path}: left over by an emission that was killed; the next one removes it")
        for case in large:
            click.echo(
                f"note  {case}: of full size, so only its files were compared; `refmoe check {case}` recomputes it"
            )
        click.echo(f"{len(folders)} case{'s' * (len(folders) != 1)} recomputed, {bad} differ")
    if bad or documents:
        context.exit(1)


def _recompute(folders: list[Path], device: Place, jobs: int | None) -> dict[Path, list[golden.Difference]]:
    """Recompute cases and return the differences of each. The bar counts layers of a single case, else cases."""
    try:
        alone = golden.read_case(folders[0]) if len(folders) == 1 else None
    except InputError:
        alone = None  # recomputing it says what is wrong
    if alone is not None:
        with progress_bar(alone.name, len(alone.runs()) * len(alone.computed)) as advance:
            return {alone.folder: golden.check(alone.folder, advance, device)}
    check = partial(golden.check, place=device)
    with progress_bar("check", len(folders)) as advance, results(check, folders, device.jobs(jobs)) as checked:
        found = {}
        for case, differences in checked:
            found[case] = differences
            advance()
    return found
