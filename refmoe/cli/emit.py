"""``refmoe emit``: golden activations, from a case or from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from refmoe import golden
from refmoe.checkpoint.load import checkpoint_digest, load_checkpoint
from refmoe.cli.options import GOLDEN, PATH, checkpoint_options, input_calls, input_options, json_option, progress_bar
from refmoe.errors import InputError
from refmoe.ops.exact import ExactOps
from refmoe.ops.native import NativeOps
from refmoe.script import execute, plan
from refmoe.spec.model import Model
from refmoe.trace import Header, Recorder, write_trace


@click.command("emit", short_help="Compute golden activations of a checkpoint or a case.")
@checkpoint_options
@input_options
@click.option("--case", "case_name", metavar="NAME", help="Recompute and write this golden case instead.")
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@click.option("--out", type=PATH, metavar="TRACE", help="The trace to write (safetensors).")
@click.option("--taps", default="*", show_default=True, help="Shell patterns of taps to keep, by commas.")
@click.option(
    "--dtype", type=click.Choice(["exact", "float64", "float32"]), default="exact", show_default=True,
    help="exact: the same bits on every machine; the others are NumPy's arithmetic, faster.",
)  # fmt: skip
@json_option
def emit_command(
    checkpoint: Path | None, layout: str | None, tokens: Any, prompt: str | None, chat: Path | None, chunk: Any,
    decode: Any, case_name: str | None, golden_folder: Path, out: Path | None, taps: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Run the specification and write every named intermediate.

    \b
    refmoe emit --checkpoint DIR --tokens 1,2,3 --out trace.safetensors
    refmoe emit --checkpoint DIR --prompt 'The capital of France is' --taps 'logits,layers.0.*' --out t.safetensors
    refmoe emit --checkpoint DIR --tokens 1,2,3,4 --chunk 5,6 --decode 7,8 --out trace.safetensors
    refmoe emit --case walking-skeleton
    """
    if case_name is not None:
        if checkpoint is not None or out is not None or taps != "*" or dtype != "exact":
            raise InputError(
                "--case writes a golden as it is defined: --checkpoint, --out, --taps and --dtype do not apply"
            )
        case = golden.read_case(golden_folder / case_name)
        with progress_bar(case.name, len(case.runs()) * case.config.layers) as advance:
            golden.emit(case, advance)
        _report(as_json, case.folder / golden.TRACE_FILE, len(case.runs()))
        return
    if checkpoint is None or out is None:
        raise InputError("--checkpoint DIR and --out TRACE were expected, or --case NAME")
    loaded = load_checkpoint(checkpoint, layout)
    runs = plan(input_calls(checkpoint, tokens, prompt, chat, chunk, decode), loaded.config.vocab)
    with progress_bar("emit", len(runs) * loaded.config.layers) as advance:
        recorder = Recorder(taps, advance)
        ops = ExactOps(recorder) if dtype == "exact" else NativeOps(dtype, recorder)
        execute(ops, Model(loaded.config, loaded.parameters), runs, recorder)
    if not recorder.arrays:
        raise InputError(f"--taps {taps!r} matches no tap")
    write_trace(out, Header(runs, None, checkpoint_digest(loaded.files), dtype), recorder.arrays)
    _report(as_json, out, len(runs))


def _report(as_json: bool, path: Path, runs: int) -> None:
    size = path.stat().st_size
    if as_json:
        click.echo(json.dumps({"trace": str(path), "bytes": size, "runs": runs}))
    else:
        click.echo(f"{path}: {runs} run{'s' * (runs != 1)}, {size:,} bytes")
