# SPDX-License-Identifier: Apache-2.0
"""The command line: a thin layer over `refmoe.api`. No other room imports it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click
import numpy as np

from refmoe import __version__
from refmoe.cli.sections import Later, Sections
from refmoe.cli.streams import safe_streams
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.neutral import sentence
from refmoe.signals import EndedBySignal, ended_by_signals

UNUSABLE = 2
INTERNAL = 70
"""The exit status of a defect of refmoe itself; 70 is the convention of sysexits.h, as 74 is."""
LOST = 74
"""The exit status when standard output cannot be written."""
INTERRUPTED = 128 + signal.SIGINT
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
COMPLETION = "_REFMOE_COMPLETE"
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

    Exit status 0: well, or conformant. Status 1: not conformant, or a difference was found. Status 2: the input cannot
    be used. Status 3: no verdict can be given. Status 70: a defect of refmoe. Status 74: standard output cannot be
    written. Status 128 + N: ended by signal N. With --json the answer is JSON in all cases. Of status 2 and 70 it is
    {"error": SENTENCE}.
    """


assert isinstance(commands, Sections)
commands.section(
    "Judge an engine",
    Later("verify", "Judge values: conformant, or wrong, where and by how much."),
    Later("conform", "Run an engine on the golden cases, and judge each."),
    Later("engines", "List the adapters, their options, or install an engine."),
    Later("capture", "Record a trace from an engine."),
    Later("scoreboard", "Put the results of several engines side by side."),
    Later("evidence", "Write the evidence of a run as a package, or check such a package."),
    Later("policies", "List the numeric policies, or print where some of them differ."),
    Later("cases", "List the golden cases, or print one in full."),
)
commands.section(
    "Models",
    Later("info", "Print the configuration, parameters and memory of a model."),
    Later("emit", "Compute the values of a checkpoint or a case."),
    Later("generate", "Stream text from a checkpoint."),
    Later("materialise", "Write the model of a golden case as an ordinary checkpoint."),
)
commands.section(
    "Routers and kernels",
    Later("router", "Show what a router does; check one of your own."),
    Later("kernel", "Check a kernel of your own by the laws of its contract."),
)
commands.section(
    "The suite itself",
    Later("suite", "Check, certify, audit and emit the golden cases, and make new ones."),
    Later("mutants", "Known bugs of the field, and the proof that each is caught."),
)


def main() -> None:
    """Run the command line. After a user's mistake, print one sentence and exit with status 2."""
    if COMPLETION in os.environ:
        commands.main(prog_name="refmoe")  # answers the shell, and exits
    with safe_streams() as out, ended_by_signals(), quiet_numbers():
        status = run()
        out.flush()
        failure = out.lost.failure
        if failure is not None and not out.lost.reader_gone:
            status = LOST
            click.echo(f"refmoe: standard output cannot be written: {failure.strerror}", err=True)
    sys.exit(status)


def run() -> int:
    """Run the command that the arguments name. Returns the exit status, whatever happens."""
    try:
        with commands.make_context("refmoe", sys.argv[1:]) as context:
            commands.invoke(context)
        return 0
    except click.exceptions.Exit as left:
        return left.exit_code
    except InputError as error:
        return refuse(str(error))
    except MemoryError as error:
        return refuse(f"out of memory: {error or 'no more could be had'}")
    except click.ClickException as error:
        return refuse_options(error)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except EndedBySignal as ended:
        return int(str(ended.code))
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            return defect(error)
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return refuse(f"{place}{error.strerror}")
    except BaseException as error:
        return defect(error)


def refuse(message: str) -> int:
    """Say why the input cannot be used, on standard error, and with --json on standard output too."""
    return say(message, UNUSABLE)


def say(message: str, status: int) -> int:
    """Say why a command ended, and return its exit status."""
    said = sentence(message)
    if wants_json():
        click.echo(json_text({"error": said}))
    click.echo(f"refmoe: {said}", err=True)
    return status


def refuse_options(error: click.ClickException) -> int:
    """Say what is wrong with the options, below the usage of the command."""
    if wants_json():
        click.echo(json_text({"error": sentence(error.format_message())}))
    text, message = io.StringIO(), error.format_message()
    error.show(text)
    # a value that is repeated in the message may have several lines
    for line in text.getvalue().replace(message, sentence(message)).splitlines():
        click.echo(sentence(line), err=True)
    return UNUSABLE


def defect(error: BaseException) -> int:
    """Report a defect of refmoe: the traceback, then what to do."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        click.echo(sentence(line), err=True)
    name = type(error).__name__
    return say(f"internal error ({name}), a defect of refmoe; please report it with the traceback above", INTERNAL)


@contextmanager
def quiet_numbers() -> Iterator[None]:
    """Let no warning of NumPy reach a user: infinities and NaN in results are reported by name where they matter."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def wants_json() -> bool:
    """Whether --json is among the arguments; those after ``--`` are of another program."""
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
