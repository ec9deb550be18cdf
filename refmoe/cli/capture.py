"""``refmoe capture`` and ``refmoe materialise``: run another engine on a case or a checkpoint."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refmoe.checkpoints.load import checkpoint_digest, load_checkpoint
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.write import DTYPE_NAMES, write_checkpoint
from refmoe.cli.options import (
    GOLDEN,
    PATH,
    Input,
    checkpoint_options,
    input_options,
    json_option,
    progress_bar,
    record_of,
)
from refmoe.engines.capture import transformers as engine
from refmoe.errors import InputError
from refmoe.suite import read_case
from refmoe.traces.script import plan
from refmoe.traces.trace import Recorder, write_trace


@click.command("materialise", short_help="Write the model of a golden case as an ordinary checkpoint.")
@click.argument("case_name", metavar="CASE")
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@click.option("--dtype", type=click.Choice([*DTYPE_NAMES]), default="bfloat16", show_default=True)
@click.option("--layout", type=click.Choice(["hf", "mistral"]), default="hf", show_default=True)
def materialise_command(case_name: str, folder: Path, golden_folder: Path, dtype: str, layout: str) -> None:
    """Write the model of CASE to DIR as a checkpoint that other engines load unchanged.

    \b
    refmoe materialise walking-skeleton /tmp/model --dtype bfloat16
    """
    case = read_case(golden_folder / case_name)
    write_checkpoint(folder, case.config, case.checkpoint().parameters, dtype, layout)
    click.echo(f"{folder}: {total_parameters(case.config):,} parameters in {dtype}")


@dataclass(frozen=True)
class Options:
    """The options of ``refmoe capture``, besides its `Input`."""

    checkpoint: Path | None
    layout: str | None
    case_name: str | None
    golden_folder: Path
    out: Path
    taps: str
    """Shell patterns of taps, separated by commas."""
    dtype: str
    attention: str
    """The attention implementation, ``eager`` or ``sdpa``."""
    as_json: bool


@click.command("capture", short_help="Record a trace from another engine (transformers).")
@checkpoint_options
@input_options
@click.option("--case", "case_name", metavar="NAME", help="Run the model and the script of this golden case instead.")
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@click.option("--out", type=PATH, required=True, metavar="TRACE", help="The trace to write (safetensors).")
@click.option("--taps", default="*", show_default=True, help="Shell patterns of taps to keep, by commas.")
@click.option("--dtype", type=click.Choice(engine.DTYPES), default="float32", show_default=True)
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), default="eager", show_default=True)
@json_option
def capture_command(**options: Any) -> None:
    """Load a checkpoint into transformers' MixtralForCausalLM, run it, and record the values that its modules exchange.

    \b
    refmoe capture --case walking-skeleton --dtype bfloat16 --out engine.safetensors
    refmoe capture --checkpoint DIR --tokens 1,2,3 --decode 4,5 --out engine.safetensors
    """
    script = record_of(Input, options)
    chosen = Options(**options)
    if (chosen.checkpoint is None) == (chosen.case_name is None):
        raise InputError("exactly one of --checkpoint DIR and --case NAME was expected")
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.checkpoint is None:
            assert chosen.case_name is not None
            case = read_case(chosen.golden_folder / chosen.case_name)
            folder, runs, digest = Path(temporary), case.runs(), None
            write_checkpoint(folder, case.config, case.checkpoint().parameters, "float32")
        else:
            loaded = load_checkpoint(chosen.checkpoint, chosen.layout)
            if loaded.layout != "hf":
                raise InputError(f"{chosen.checkpoint}: transformers reads the Hugging Face layout only")
            runs = plan(script.calls(chosen.checkpoint), loaded.config.vocab)
            folder, digest = chosen.checkpoint, checkpoint_digest(loaded.files)
        model = engine.load_model(folder, chosen.dtype, chosen.attention)
        with progress_bar("capture", len(runs) * model.config.num_hidden_layers) as advance:
            recorder = Recorder(chosen.taps, advance)
            engine.capture(model, runs, recorder)
    if not recorder.arrays:
        raise InputError(f"--taps {chosen.taps!r} matches no tap")
    write_trace(chosen.out, engine.header(model, runs, chosen.case_name, digest), recorder.arrays)
    size = chosen.out.stat().st_size
    counted = {"runs": len(runs), "taps": len(recorder.arrays)}
    if chosen.as_json:
        click.echo(json.dumps({"trace": str(chosen.out), "bytes": size, **counted}))
    else:
        click.echo(f"{chosen.out}: {counted['runs']} runs, {counted['taps']} arrays, {size:,} bytes")
