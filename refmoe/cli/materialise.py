# SPDX-License-Identifier: Apache-2.0
"""``refmoe materialise``: the model of a case as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from refmoe.api.recording import WRITTEN_DTYPES, materialise
from refmoe.cli.guard import OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import LAYOUTS, golden_option, json_option
from refmoe.report.json_text import json_text


@click.command(
    "materialise", cls=GuardedCommand, short_help="Write the model of a golden case as an ordinary checkpoint."
)
@click.argument("case_name", metavar="CASE")
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@golden_option
@click.option(
    "--dtype", type=click.Choice(WRITTEN_DTYPES), default="bfloat16", show_default=True,
    help="The dtype in which the weights are written.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default="hf", show_default=True,
    help="How DIR is laid out: as Hugging Face does, or Mistral.",
)  # fmt: skip
@json_option
def materialise_command(
    case_name: str, folder: Path, golden: Path, dtype: str, layout: str, as_json: bool
) -> None:  # fmt: skip
    """Write the model of CASE to DIR as a checkpoint that other engines load unchanged.

    \b
    refmoe materialise walking-skeleton /tmp/model --dtype bfloat16
    """
    parameters = materialise(case_name, folder, golden, dtype, layout)
    if as_json:
        click.echo(json_text({"checkpoint": str(folder), "parameters": parameters, "dtype": dtype}))
    else:
        click.echo(f"{folder}: {parameters:,} parameters in {dtype}")
