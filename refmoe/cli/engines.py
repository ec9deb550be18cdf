# SPDX-License-Identifier: Apache-2.0
"""``refmoe engines``: the adapters of real engines, their options, and an environment for each."""

from __future__ import annotations

from pathlib import Path

import click

from refmoe.api.engines import Engine, engine, engine_facts, engines, install
from refmoe.cli.guard import OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import json_option
from refmoe.cli.table import print_table
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.wording import visible


@click.command("engines", cls=GuardedCommand, short_help="List the adapters, their options, or install an engine.")
@click.argument("adapter", required=False)
@click.option(
    "--install", "folder", type=OUTPUT_FOLDER, metavar="DIR",
    help="Make DIR a virtual environment that has the engine. pip downloads it, and executes it with your rights.",
)  # fmt: skip
@json_option
def engines_command(adapter: str | None, folder: Path | None, as_json: bool) -> None:
    """List the adapters that refmoe ships; or print one's options and the packages that it pins.

    \b
    refmoe engines
    refmoe engines transformers
    refmoe engines openvino --install envs/openvino
    refmoe conform --adapter openvino --python envs/openvino/bin/python

    ADAPTER is one of those listed, or a FILE.py or module.of.yours with a class Adapter, executed with your rights.
    """
    if adapter is None:
        if folder is not None:
            raise InputError("--install needs the name of an adapter, but none was given")
        found = engines()
        if as_json:
            click.echo(json_text({"engines": [engine_facts(each) for each in found]}))
            return
        rows = [(each.adapter, ", ".join(option.name for option in each.options), each.about) for each in found]
        print_table(("adapter", "options", "engine"), rows, wrap=True)
        return
    chosen = engine(adapter)
    python = None if folder is None else install(adapter, folder, lambda said: click.echo(visible(said), err=True))
    if as_json:
        click.echo(json_text({**engine_facts(chosen), "python": None if python is None else str(python)}))
    elif python is not None:
        click.echo(visible(f"refmoe conform --adapter {adapter} --python {python}"))
    else:
        print_engine(chosen)


def print_engine(found: Engine) -> None:
    """Print one adapter: what it is, its packages, its options."""
    click.echo(visible(f"{found.adapter}: {found.about}"))
    click.echo()
    pinned = " ".join(found.requirements) or "it declares none"
    click.echo(visible(f"packages  {pinned}"))
    if not found.options:
        click.echo("options   none")
        return
    click.echo("options   --option KEY=VALUE\n")
    rows = [
        (each.name, each.takes, "it has to be given" if each.default is None else each.default, each.about)
        for each in found.options
    ]
    print_table(("key", "value", "default", "what it sets"), rows, wrap=True)
