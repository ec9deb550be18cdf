# SPDX-License-Identifier: Apache-2.0
"""``refmoe materialise``: the model of a case as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from refmoe.api.recording import GGUF_KINDS, RECIPE_NAMES, WRITTEN_DTYPES, Written, materialise
from refmoe.cli.guard import OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import LAYOUTS, golden_option, json_option
from refmoe.errors import InputError
from refmoe.report.json_text import json_text

PREFIX = "gguf:"


@click.command(
    "materialise", cls=GuardedCommand, short_help="Write the model of a golden case as an ordinary checkpoint."
)
@click.argument("case_name", metavar="CASE")
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@golden_option
@click.option(
    "--dtype", type=click.Choice(WRITTEN_DTYPES), show_default="bfloat16",
    help="The dtype in which the weights are written.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(LAYOUTS), show_default="hf",
    help="How DIR is laid out: as Hugging Face does, or Mistral.",
)  # fmt: skip
@click.option(
    "--format", "gguf", type=click.Choice([PREFIX + kind for kind in GGUF_KINDS]), metavar="gguf:TYPE",
    help=f"Write DIR/model.gguf instead, with matrices in TYPE: {', '.join(GGUF_KINDS)}.",
)  # fmt: skip
@click.option(
    "--quantise", type=click.Choice(RECIPE_NAMES),
    help="Quantise the matrices of attention and experts, or of attention alone, in Hugging Face's layout.",
)  # fmt: skip
@json_option
def materialise_command(
    case_name: str, folder: Path, golden: Path, dtype: str | None, layout: str | None, gguf: str | None,
    quantise: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the model of CASE to DIR as a checkpoint that other engines load unchanged.

    \b
    refmoe materialise walking-skeleton /tmp/model --dtype bfloat16
    refmoe materialise production-sequences /tmp/model --format gguf:Q4_K_M
    refmoe materialise production-sequences /tmp/model --quantise fp8-block128
    """
    alone = {"--dtype": dtype, "--layout": layout, "--quantise": quantise}
    for name, value in alone.items() if gguf is not None else ():
        if value is not None:
            raise InputError(f"{name} {value} goes with safetensors, but none was expected beside --format {gguf}")
    if quantise is not None and layout == "mistral":
        raise InputError("--layout mistral was given beside --quantise, but hf was expected")
    form = Written(
        dtype=dtype or "bfloat16", layout=layout or "hf", recipe=quantise,
        gguf=None if gguf is None else gguf.removeprefix(PREFIX),
    )  # fmt: skip
    parameters = materialise(case_name, folder, golden, form)
    written = form.gguf or form.recipe or form.dtype
    if as_json:
        click.echo(json_text({"checkpoint": str(folder), "parameters": parameters, "dtype": written}))
    else:
        click.echo(f"{folder}: {parameters:,} parameters in {written}")
