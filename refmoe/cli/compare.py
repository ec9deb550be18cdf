"""``refmoe compare``: how far a trace is from a golden."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from refmoe.cli.options import PATH, json_option
from refmoe.report.terminal import print_comparison
from refmoe.suite import trace_path
from refmoe.traces.trace import read_trace
from refmoe.verify.distances import compare_traces


@click.command("compare", short_help="Print how far each tap of a trace is from a golden.")
@click.argument("trace", type=PATH)
@click.argument("golden", type=PATH)
@click.option("--run", "only", metavar="NAME", help="Only this run.")
@json_option
def compare_command(trace: Path, golden: Path, only: str | None, as_json: bool) -> None:
    """Print, per layer and tap, the distance of TRACE from GOLDEN (a trace, or the folder of a case).

    \b
    refmoe compare engine.safetensors golden/walking-skeleton
    refmoe compare engine.safetensors reference.safetensors --json

    Relative RMS, the worst element and where it is; routing decisions that differ. These are distances, and exit
    status 0 whatever they are; `refmoe verify` gives a verdict.
    """
    reference = trace_path(golden) if golden.is_dir() else golden
    comparison = compare_traces(read_trace(trace), read_trace(reference))
    if as_json:
        click.echo(json.dumps(asdict(comparison)))
    else:
        print_comparison(comparison, only)
