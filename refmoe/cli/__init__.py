"""The command line. It may import every other room, and no other room imports it."""

from __future__ import annotations

import sys

import click

from refmoe import __version__
from refmoe.cli.audit import audit_command
from refmoe.cli.capture import capture_command, materialise_command
from refmoe.cli.certify import certify_command
from refmoe.cli.check import check_command
from refmoe.cli.conform import conform_command
from refmoe.cli.emit import emit_command
from refmoe.cli.generate import generate_command
from refmoe.cli.info import info_command
from refmoe.cli.mutants import mutants_command
from refmoe.cli.policies import policies_command
from refmoe.cli.route import route_command
from refmoe.cli.routers import routers_command
from refmoe.cli.scoreboard import scoreboard_command
from refmoe.cli.verify import verify_command
from refmoe.errors import InputError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="refmoe")
def commands() -> None:
    """The executable specification of Mixtral, and the oracle for its implementations.

    Exit status: 0 done and all well, 1 a difference was found, 2 the input cannot be used.
    """


for command in (
    emit_command,
    check_command,
    certify_command,
    verify_command,
    capture_command,
    materialise_command,
    conform_command,
    scoreboard_command,
    policies_command,
    mutants_command,
    audit_command,
    info_command,
    generate_command,
    route_command,
    routers_command,
):
    commands.add_command(command)


def main() -> None:
    """Run the command line. After a user's mistake, print one sentence and exit with status 2."""
    try:
        commands(standalone_mode=True)
    except InputError as error:
        click.echo(f"refmoe: {error}", err=True)
        sys.exit(2)
    except MemoryError as error:
        click.echo(f"refmoe: out of memory: {error or 'no more could be had'}", err=True)
        sys.exit(2)
