# SPDX-License-Identifier: Apache-2.0
"""``refmoe emit``: the values of a checkpoint or a case, at every step of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from refmoe.api.emitting import (
    ARITHMETICS,
    Emission,
    Estimate,
    arithmetic_of,
    case_emission,
    checkpoint_emission,
    emit_trace,
    estimate_emission,
)
from refmoe.cli.guard import OUTPUT, GuardedCommand
from refmoe.cli.options import (
    ONE_PROCESS,
    PATH,
    Command,
    Input,
    case_option,
    checkpoint_options,
    device_option,
    executor_option,
    golden_option,
    input_options,
    json_option,
    progress_bar,
    record_of,
    seed_option,
    taps_option,
)
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.terminal import error_console


def scale_options(command: Command) -> Command:
    """Add the options for a checkpoint that does not fit into memory, or that takes long."""
    for option in (
        click.option(
            "--digest/--no-digest", default=True, show_default=True,
            help="Whether the trace names the checkpoint by its SHA-256, which reads every byte once more.",
        ),
        click.option("--estimate", "only_estimate", is_flag=True, help="Print the cost, and compute nothing."),
        executor_option("Spread the experts of each layer,", ONE_PROCESS),
        click.option("--states", type=PATH, metavar="TRACE", help="With --layers A:B, A > 0: the input of layer A."),
        click.option("--layers", metavar="A:B", help="Only layers A to below B; the rest of the model is not read."),
        seed_option,
    ):  # fmt: skip
        command = option(command)
    return command


@dataclass(frozen=True)
class Wanted:
    """The options that go into an `Emission` as they are."""

    out: Path
    taps: str
    layers: str | None
    states: Path | None
    executor: str | None
    digest: bool


@click.command("emit", cls=GuardedCommand, short_help="Compute the values of a checkpoint or a case.")
@checkpoint_options
@input_options
@case_option("Run the model and the calls of this case instead")
@golden_option
@click.option("--out", type=OUTPUT, required=True, metavar="TRACE", help="The trace to write (safetensors).")
@taps_option
@scale_options
@click.option(
    "--dtype", type=click.Choice(ARITHMETICS), default="exact", show_default=True,
    help="exact: the same bits on every machine; the others are the hardware's arithmetic, faster.",
)  # fmt: skip
@click.option(
    "--policy", metavar="NAME",
    help="The ideal run of this numeric policy (refmoe policies): exact, and rounded at its cut points.",
)  # fmt: skip
@device_option(
    "Exact values have the CPU's bits; --layers, --states, --executor, --estimate and --policy do not apply."
)
@json_option
def emit_command(
    checkpoint: Path | None,
    layout: str | None,
    case_name: str | None,
    golden: Path,
    device: Place,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the specification and write every named intermediate.

    \b
    refmoe emit --checkpoint DIR --tokens 1,2,3 --out trace.safetensors
    refmoe emit --checkpoint DIR --prompt 'The capital of France is' --taps 'logits,layers.0.*' --out t.safetensors
    refmoe emit --checkpoint DIR --tokens 1,2,3,4 --chunk 5,6 --decode 7,8 --out trace.safetensors
    refmoe emit --checkpoint mixtral-8x7b --seed 1 --layers 0:2 --tokens 1,2,3 --out trace.safetensors
    refmoe emit --case walking-skeleton --policy hf-bfloat16 --out ideal.safetensors

    The model is run layer by layer, and its weights are read block by block. Finished layers are kept in TRACE.parts
    until the trace is written. `refmoe suite emit` writes goldens.
    """
    script, wanted, seed = record_of(Input, options), record_of(Wanted, options), options["seed"]
    arithmetic = arithmetic_of(options["dtype"], options["policy"])
    if (checkpoint is None) == (case_name is None):
        raise InputError("exactly one of --checkpoint DIR and --case NAME was expected")
    settings = {**vars(wanted), "arithmetic": arithmetic, "place": device}
    if case_name is not None:
        if script.given or seed is not None or layout is not None:
            raise InputError(f"--case {case_name} has its own model and calls, so options about those do not apply")
        emission = case_emission(case_name, golden, settings)
    else:
        assert checkpoint is not None
        emission = checkpoint_emission(checkpoint, layout, seed, lambda: script.calls(checkpoint, layout), settings)
    _emit(emission, options["only_estimate"], as_json)


def _emit(emission: Emission, only_estimate: bool, as_json: bool) -> None:
    """Print the cost of an emission, or write its trace and print its size."""
    if only_estimate:
        needed = estimate_emission(emission)
        facts = {"memory_bytes": needed.memory, "weight_bytes": needed.weights, "trace_bytes": needed.trace}
        click.echo(json_text(facts) if as_json else in_words(needed))
        return
    console, on_cpu = error_console(), not emission.place.on_gpu
    if on_cpu and console.is_terminal:
        console.print(f"emit: {in_words(estimate_emission(emission))}", highlight=False)
    needed = emit_trace(emission, progress_bar)
    runs, size = len(emission.runs), emission.out.stat().st_size
    if as_json:
        more = {"memory_bytes": needed.memory} if on_cpu else {}
        click.echo(json_text({"trace": str(emission.out), "bytes": size, "runs": runs, **more}))
    else:
        click.echo(f"{emission.out}: {runs} run{'s' * (runs != 1)}, {size:,} bytes")


def in_words(needed: Estimate) -> str:
    """The cost of a run in one line."""
    return (
        f"up to {decimal(needed.memory)} of memory, {decimal(needed.weights)} of weights to read, "
        f"{decimal(needed.trace)} to write"
    )
