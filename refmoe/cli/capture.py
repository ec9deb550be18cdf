# SPDX-License-Identifier: Apache-2.0
"""``refmoe capture``: run a checkpoint or a case in transformers or another engine, and record its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refmoe.api.recording import ATTENTIONS, DTYPES, Recording, record
from refmoe.cli.guard import OUTPUT, GuardedCommand
from refmoe.cli.options import (
    Input,
    case_option,
    checkpoint_options,
    golden_option,
    input_options,
    json_option,
    progress_bar,
    record_of,
    taps_option,
)
from refmoe.report.json_text import json_text


@click.command("capture", cls=GuardedCommand, short_help="Record a trace from an engine.")
@checkpoint_options
@input_options
@case_option("Run the model and the calls of this case instead")
@golden_option
@click.option("--out", type=OUTPUT, required=True, metavar="TRACE", help="The trace to write (safetensors).")
@taps_option
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="The dtype of the engine."
)
@click.option(
    "--attention", type=click.Choice(ATTENTIONS), default="eager", show_default=True,
    help="The engine's attention; only eager shows the probabilities.",
)  # fmt: skip
@click.option(
    "--adapter", metavar="NAME", help="Another engine: an adapter as of refmoe conform, executed with your rights."
)
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the adapter; repeatable.")
@json_option
def capture_command(case_name: str | None, as_json: bool, **given: Any) -> None:
    """Load a checkpoint into an engine, run it, and record the values that its steps exchange.

    The engine is transformers' MixtralForCausalLM, or the one of an adapter. An adapter gets the checkpoint as it is.

    \b
    refmoe capture --case walking-skeleton --dtype bfloat16 --out engine.safetensors
    refmoe capture --checkpoint DIR --tokens 1,2,3 --decode 4,5 --out engine.safetensors
    refmoe capture --checkpoint model.gguf --adapter llama_cpp --tokens 1,2,3 --out engine.safetensors
    """
    script = record_of(Input, given)
    asked = Recording(case=case_name, **given)
    counted = record(asked, lambda: script.calls(asked.checkpoint or Path()), progress_bar)
    size = asked.out.stat().st_size
    if as_json:
        click.echo(json_text({"trace": str(asked.out), "bytes": size, **counted}))
    else:
        click.echo(f"{asked.out}: {counted['runs']} runs, {counted['taps']} arrays, {size:,} bytes")
