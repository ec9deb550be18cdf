"""``refmoe scoreboard``: the results of several engines side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from refmoe.cli.options import PATH, json_option
from refmoe.engines.results import json_number
from refmoe.engines.scoreboard import KINDS, Entrant, Scoreboard, result_files, scoreboard
from refmoe.files.atomic import replacing


@click.command("scoreboard", short_help="Engines by cases by dtypes, from results of conform.")
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="RESULTS...")
@click.option("--html", type=PATH, metavar="FILE", help="Write it as one page that needs no network.")
@json_option
def scoreboard_command(paths: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Put the results of `refmoe conform --out` side by side. RESULTS are files, or folders of them.

    \b
    refmoe scoreboard results/
    refmoe scoreboard results/*.json --html scoreboard.html

    Each case of an engine at a dtype has one of five marks. It is conformant, deviates (with the first wrong step and
    its explanation), is undecidable, is not supported (skipped), or crashed. A time-out and a broken answer count as
    crashed. Exit status 0.
    """
    board = scoreboard(result_files(paths))
    if html is not None:
        from refmoe.report.scoreboard import to_html

        with replacing(html) as temporary:
            temporary.write_text(to_html(board), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(record(board)))
    else:
        from refmoe.report.scoreboard_text import print_scoreboard

        print_scoreboard(board)


def record(board: Scoreboard) -> dict[str, Any]:
    """The scoreboard as JSON."""
    return {
        "cases": list(board.cases),
        "engines": [_engine(each) for each in board.entrants],
        "notes": list(board.notes),
    }


def _engine(entrant: Entrant) -> dict[str, Any]:
    results = entrant.results
    outcomes = [
        {
            "case": each.case, "dtype": each.dtype, "kind": KINDS[each.verdict], "verdict": each.verdict,
            "reason": each.reason, "issue": each.issue,
            "first_wrong": None if each.first_wrong is None else "/".join(each.first_wrong),
            "explanation": each.explanations[0].name if each.explanations else None,
        }
        for each in results.outcomes
    ]  # fmt: skip
    return {
        "engine": entrant.label, "name": results.engine.name, "version": results.engine.version,
        "options": {**results.engine.options}, "platform": {**results.platform},
        "counts": {dtype: {kind: entrant.tally(dtype)[kind] for kind in KINDS.values()} for dtype in entrant.dtypes},
        "worst_errors": {
            dtype: {step: json_number(x) for step, x in entrant.worst_errors(dtype).items()}
            for dtype in entrant.dtypes
        },
        "outcomes": outcomes,
    }  # fmt: skip
