# SPDX-License-Identifier: Apache-2.0
"""``refmoe info``: the configuration, parameters and memory of a checkpoint, a case or a published size."""

from __future__ import annotations

from typing import Any

import click

from refmoe.api.facts import BYTES, gibibytes, model_facts
from refmoe.cli.guard import GuardedCommand
from refmoe.cli.options import Integer, device_option, json_option, layout_option
from refmoe.cli.table import print_table
from refmoe.cuda.place import Place
from refmoe.files.sentences import one_line
from refmoe.report.json_text import json_text
from refmoe.spec.config import PRESETS

CALLS = "With --device cuda: "


@click.command("info", cls=GuardedCommand, short_help="Print the configuration, parameters and memory of a model.")
@click.argument("model", metavar="DIR|FILE|CASE|" + "|".join(PRESETS))
@layout_option
@device_option("Print the memory that the model needs there, and the memory that is free.")
@click.option(
    "--tokens", type=Integer(1), default=2048, show_default=True,
    help=f"{CALLS}length of the prompt, read in one call.",
)  # fmt: skip
@click.option(
    "--max-new-tokens", type=Integer(0), default=64, show_default=True,
    help=f"{CALLS}tokens after it that the cache has room for.",
)  # fmt: skip
@json_option
def info_command(
    model: str, layout: str | None, device: Place, tokens: int, max_new_tokens: int, as_json: bool
) -> None:
    """Print the configuration, total and active parameters, and memory per dtype.

    \b
    refmoe info mixtral-8x7b
    refmoe info path/to/Mixtral-8x7B-v0.1 --json
    refmoe info path/to/config.json
    refmoe info path/to/model.gguf
    refmoe info mixtral-8x7b --device cuda --tokens 4096

    Total and active parameters are derived from the configuration. A checkpoint's tensors are all checked against it.
    FILE is a config.json, a params.json or a GGUF file (pip install 'refmoe[llama-cpp]'), whose tensors are not.
    """
    facts = model_facts(model, layout, place=device, tokens=tokens, max_new_tokens=max_new_tokens)
    if as_json:
        click.echo(json_text(facts))
        return
    rows = [(name, "none" if value is None else worded(value)) for name, value in facts["config"].items()]
    for name in ("total", "active"):
        count = facts[f"{name}_parameters"]
        rows.append((f"{name} parameters", f"{count:,} ({count / 1e9:.1f} B)"))
    rows += [(f"weights in {dtype}", f"{facts['weight_bytes'][dtype] / 2**30:,.1f} GiB") for dtype in BYTES]
    rows.append(("cache per token, float32", f"{facts['cache_bytes_per_token_float32']:,} bytes"))
    rows += [("output matrix", "the embedding")] if facts.get("tied") else []
    rows += [(name, worded(facts[name])) for name in ("layout", "files") if name in facts]
    for name, found in facts.get("formats", {}).items():
        rows.append((f"stored as {name}", f"{found['weights']:,} weights of {found['bits_per_weight']:.5g} bits"))
    rows += [("stored in all", f"{facts['bits_per_weight']:.5g} bits a weight")] if "formats" in facts else []
    if "unknown_fields" in facts:
        rows.append(("fields not obeyed", worded([one_line(name) for name in facts["unknown_fields"]])))
    print_table(("", ""), rows, title=model, wrap=True)
    if "device" in facts:
        print_device(facts["device"])


def worded(value: Any) -> str:
    """A value in words."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_device(found: dict[str, Any]) -> None:
    """Print the memory that is free on the device, and the memory that the model takes."""
    click.echo(
        f"on the device {gibibytes(found['free_bytes'])} are free; a prompt of {found['tokens']} tokens and "
        f"{found['max_new_tokens']} more, computed in float32, take"
    )
    parts = ("weights", "cache", "buffers", "total")
    rows = [(dtype, *(gibibytes(need[part]) for part in parts)) for dtype, need in found["needed"].items()]
    print_table(("weights in", "weights", "cache", "buffers", "in all"), rows, right=range(1, 5))
    for dtype, need in found["needed"].items():
        click.echo(f"{dtype}: {need['missing'] or 'there is enough'}")
