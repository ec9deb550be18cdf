# SPDX-License-Identifier: Apache-2.0
"""``refmoe scoreboard``: the results of several engines side by side."""

from __future__ import annotations

from pathlib import Path

import click

from refmoe.api.conforming import board_facts, result_files, scoreboard
from refmoe.api.files import write_text
from refmoe.cli.guard import PAGE, GuardedCommand
from refmoe.cli.options import PATH, json_option
from refmoe.report.json_text import json_text


@click.command("scoreboard", cls=GuardedCommand, short_help="Put the results of several engines side by side.")
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="RESULTS...")
@click.option("--html", type=PAGE, metavar="FILE", help="Write it as one page that needs no network.")
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

        write_text(html, to_html(board))
    if as_json:
        click.echo(json_text(board_facts(board)))
    else:
        from refmoe.report.scoreboard_text import print_scoreboard

        print_scoreboard(board)
