# SPDX-License-Identifier: Apache-2.0
"""The command line: a thin layer over `refmoe.api`. No other room imports it."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

import click

from refmoe import __version__
from refmoe.cli.capture import capture_command
from refmoe.cli.cases import cases_command
from refmoe.cli.conform import conform_command
from refmoe.cli.emit import emit_command
from refmoe.cli.generate import generate_command
from refmoe.cli.info import info_command
from refmoe.cli.materialise import materialise_command
from refmoe.cli.mutants import mutants_command
from refmoe.cli.policies import policies_command
from refmoe.cli.router import router_command
from refmoe.cli.scoreboard import scoreboard_command
from refmoe.cli.sections import Sections
from refmoe.cli.suite import suite_command
from refmoe.cli.verify import verify_command
from refmoe.errors import InputError

UNUSABLE = 2
EPILOG = """\b
Completion of names and options by the Tab key, for bash (zsh and fish likewise):
  eval "$(_REFMOE_COMPLETE=bash_source refmoe)"
Write this line into ~/.bashrc to have it in every shell."""


@click.group(
    cls=Sections, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="refmoe")
def commands() -> None:
    """Check whether an implementation of Mixtral is right, and if it is not, learn which step is wrong and why.

    \b
    refmoe cases
    refmoe conform --adapter my_engine.py
    refmoe verify trace.safetensors --case walking-skeleton

    Exit status: 0 well, or conformant. 1 not conformant, or a difference was found. 2 the input cannot be used.
    3 no verdict can be given. With --json the answer is JSON in all cases; of status 2 it is {"error": SENTENCE}.
    """


assert isinstance(commands, Sections)
commands.section(
    "Judge an engine",
    verify_command, conform_command, capture_command, scoreboard_command, policies_command, cases_command,
)  # fmt: skip
commands.section("Models", info_command, emit_command, generate_command, materialise_command)
commands.section("Routers", router_command)
commands.section("The suite itself", suite_command, mutants_command)


def main() -> None:
    """Run the command line. After a user's mistake, print one sentence and exit with status 2."""
    try:
        status = commands.main(standalone_mode=False)
    except InputError as error:
        refuse(f"refmoe: {error}", str(error))
    except MemoryError as error:
        sentence = f"out of memory: {error or 'no more could be had'}"
        refuse(f"refmoe: {sentence}", sentence)
    except click.ClickException as error:
        if wants_json():
            click.echo(json.dumps({"error": error.format_message()}))
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def refuse(line: str, sentence: str) -> NoReturn:
    """Say why the input cannot be used, on standard error, and with --json on standard output too."""
    if wants_json():
        click.echo(json.dumps({"error": sentence}))
    click.echo(line, err=True)
    sys.exit(UNUSABLE)


def wants_json() -> bool:
    """Whether --json is among the arguments; those after ``--`` are of another program."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
