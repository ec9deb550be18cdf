"""``refmoe info``: the configuration, parameters and memory of a checkpoint or a published size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.size import active_parameters, total_parameters
from refmoe.cli.options import device_option, json_option
from refmoe.cuda.memory import cache_bytes, gibibytes, missing, resident, widest
from refmoe.cuda.place import Place
from refmoe.spec.config import PRESETS, Config

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@click.command("info", short_help="Print the configuration, parameters and memory of a model.")
@click.argument("model", metavar="DIR|" + "|".join(PRESETS))
@click.option("--layout", type=click.Choice(["hf", "mistral"]), help="How DIR is laid out.")
@device_option("Print the memory that the model needs there, and the memory that is free.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="With --device cuda: length of the prompt, read in one call.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="With --device cuda: tokens after it that the cache has room for.",
)
@json_option
def info_command(
    model: str, layout: str | None, device: Place, tokens: int, max_new_tokens: int, as_json: bool
) -> None:
    """Print the configuration, total and active parameters, and memory per dtype.

    \b
    refmoe info mixtral-8x7b
    refmoe info path/to/Mixtral-8x7B-v0.1 --json
    refmoe info mixtral-8x7b --device cuda --tokens 4096

    Total and active parameters are derived from the configuration. A checkpoint's tensors are all checked against it.
    """
    stored: dict[str, object] = {}
    if model in PRESETS:
        config = PRESETS[model]
    else:
        loaded = load_checkpoint(Path(model), layout)
        config = loaded.config
        stored = {"layout": loaded.layout, "files": [path.name for path in loaded.files], "stored": loaded.dtypes}
    facts = describe(config)
    if device.on_gpu:
        widths = ("bfloat16", "float32") if model in PRESETS else (widest(loaded.dtypes),)
        facts["device"] = on_device(config, tokens, max_new_tokens, widths, device.free_memory())
    if as_json:
        click.echo(json.dumps(facts | stored))
        return
    console = Console(highlight=False)
    table = Table(title=model, show_header=False, title_justify="left", box=None)
    for name, value in asdict(config).items():
        table.add_row(name, "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value))
    table.add_section()
    for name, count in (("total", total_parameters(config)), ("active", active_parameters(config))):
        table.add_row(f"{name} parameters", f"{count:,} ({count / 1e9:.1f} B)")
    for dtype, size in BYTES.items():
        table.add_row(f"weights in {dtype}", f"{total_parameters(config) * size / 2**30:,.1f} GiB")
    table.add_row("cache per token, float32", f"{cache_bytes(config):,} bytes")
    for name, found in stored.items():
        table.add_row(name, ", ".join(found) if isinstance(found, list | tuple) else str(found))
    console.print(table)
    if device.on_gpu:
        _print_device(console, facts["device"])


def describe(config: Config) -> dict[str, Any]:
    """The facts that follow from a configuration, as JSON."""
    total = total_parameters(config)
    return {
        "config": asdict(config),
        "total_parameters": total,
        "active_parameters": active_parameters(config),
        "weight_bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "cache_bytes_per_token_float32": cache_bytes(config),
    }


def on_device(config: Config, tokens: int, max_new_tokens: int, dtypes: Sequence[str], free: int) -> dict[str, Any]:
    """The memory that float32 generation takes on a device, as JSON, for weights stored in each of the dtypes."""
    needs = {dtype: resident(config, tokens, max_new_tokens, dtype, "float32") for dtype in dtypes}
    return {
        "free_bytes": free,
        "tokens": tokens,
        "max_new_tokens": max_new_tokens,
        "needed": {
            dtype: asdict(need) | {"total": need.total, "missing": missing(need, free)} for dtype, need in needs.items()
        },
    }


def _print_device(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"on the device {gibibytes(found['free_bytes'])} are free; a prompt of {found['tokens']} tokens and "
        f"{found['max_new_tokens']} more, computed in float32, take"
    )
    table = Table("weights in", box=None)
    for heading in ("weights", "cache", "buffers", "in all"):
        table.add_column(heading)
    for dtype, need in found["needed"].items():
        table.add_row(dtype, *(gibibytes(need[part]) for part in ("weights", "cache", "buffers", "total")))
    console.print(table)
    for dtype, need in found["needed"].items():
        console.print(f"{dtype}: {need['missing'] or 'there is enough'}", soft_wrap=True)
