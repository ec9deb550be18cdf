"""``refmoe info``: what a checkpoint or a published size is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from refmoe.checkpoint.load import load_checkpoint
from refmoe.checkpoint.size import active_parameters, total_parameters
from refmoe.cli.options import json_option
from refmoe.spec.config import PRESETS, Config

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@click.command("info", short_help="Print the configuration, parameters and memory of a model.")
@click.argument("model", metavar="DIR|" + "|".join(PRESETS))
@click.option("--layout", type=click.Choice(["hf", "mistral"]), help="How DIR is laid out.")
@json_option
def info_command(model: str, layout: str | None, as_json: bool) -> None:
    """Print the configuration, total and active parameters, and memory per dtype.

    \b
    refmoe info mixtral-8x7b
    refmoe info path/to/Mixtral-8x7B-v0.1 --json

    Total and active parameters are derived from the configuration. Of a checkpoint, every tensor is accounted for.
    """
    stored: dict[str, object] = {}
    if model in PRESETS:
        config = PRESETS[model]
    else:
        loaded = load_checkpoint(Path(model), layout)
        config = loaded.config
        stored = {"layout": loaded.layout, "files": [path.name for path in loaded.files], "stored": loaded.dtypes}
    facts = describe(config)
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


def describe(config: Config) -> dict[str, object]:
    """The facts that are derived from a configuration, for a program to read."""
    total = total_parameters(config)
    return {
        "config": asdict(config),
        "total_parameters": total,
        "active_parameters": active_parameters(config),
        "weight_bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "cache_bytes_per_token_float32": cache_bytes(config),
    }


def cache_bytes(config: Config) -> int:
    """Bytes of keys and values that one token adds to the caches of all layers, in float32."""
    return config.layers * 2 * config.kv_heads * config.head_dim * BYTES["float32"]
