"""``refmoe emit``: golden activations, from a case or from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from refmoe import golden
from refmoe.checkpoint.load import checkpoint_digest, load_checkpoint
from refmoe.cli.options import (
    GOLDEN,
    PATH,
    checkpoint_options,
    input_calls,
    input_options,
    jobs_option,
    json_option,
    progress_bar,
)
from refmoe.errors import InputError
from refmoe.ops.exact import ExactOps
from refmoe.ops.native import NativeOps
from refmoe.ops.policy import PolicyOps
from refmoe.parallel import results
from refmoe.policy.load import policy
from refmoe.policy.policy import Policy
from refmoe.policy.steps import CUT_STEPS
from refmoe.script import execute, plan
from refmoe.spec.model import Model, Steps
from refmoe.trace import Header, Recorder, write_trace


@click.command("emit", short_help="Compute golden activations of a checkpoint or a case.")
@checkpoint_options
@input_options
@click.option("--case", "case_name", metavar="NAME", help="Recompute and write this golden case instead.")
@click.option(
    "--all", "every", is_flag=True, help="Write every golden case that is not written yet, and their manifest."
)
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@click.option("--out", type=PATH, metavar="TRACE", help="The trace to write (safetensors).")
@click.option("--taps", default="*", show_default=True, help="Shell patterns of taps to keep, by commas.")
@click.option(
    "--dtype", type=click.Choice(["exact", "float64", "float32"]), default="exact", show_default=True,
    help="exact: the same bits on every machine; the others are NumPy's arithmetic, faster.",
)  # fmt: skip
@click.option(
    "--policy", "policy_name", metavar="NAME",
    help="The ideal run of this numeric policy (refmoe policies): exact, and rounded at its cut points.",
)  # fmt: skip
@jobs_option
@json_option
def emit_command(
    checkpoint: Path | None, layout: str | None, tokens: Any, prompt: str | None, chat: Path | None, chunk: Any,
    decode: Any, case_name: str | None, every: bool, golden_folder: Path, out: Path | None, taps: str, dtype: str,
    policy_name: str | None, jobs: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Run the specification and write every named intermediate.

    \b
    refmoe emit --checkpoint DIR --tokens 1,2,3 --out trace.safetensors
    refmoe emit --checkpoint DIR --prompt 'The capital of France is' --taps 'logits,layers.0.*' --out t.safetensors
    refmoe emit --checkpoint DIR --tokens 1,2,3,4 --chunk 5,6 --decode 7,8 --out trace.safetensors
    refmoe emit --case walking-skeleton
    refmoe emit --case walking-skeleton --policy hf-bfloat16 --out ideal.safetensors
    refmoe emit --all

    --all passes over cases that this version has written from their case.toml as it is; --case never does. Killed at
    any moment, either leaves the old case or the new one; start it again to go on.
    """
    rules = None if policy_name is None else policy(policy_name)
    if rules is not None and (every or dtype != "exact" or None not in (case_name, checkpoint)):
        raise InputError("--policy goes with either --checkpoint or --case; --all and --dtype do not apply")
    if rules is not None and case_name is not None:
        if out is None:
            raise InputError("--policy with --case writes a trace of its own, not the golden: --out TRACE was expected")
        case = golden.read_case(golden_folder / case_name)
        model = Model(case.config, case.checkpoint().parameters)
        _emit_trace(out, model, Header(case.runs(), case.name), taps, arithmetic(dtype, rules), as_json)
        return
    if case_name is not None or every:
        if checkpoint is not None or out is not None or taps != "*" or dtype != "exact":
            raise InputError(
                f"{'--all' if every else '--case'} writes a golden as it is defined: --checkpoint, --out, --taps and "
                "--dtype do not apply"
            )
        if case_name is not None and every:
            raise InputError("one of --case NAME and --all was expected, but both were given")
        if every:
            _emit_all(golden_folder, jobs, as_json)
            return
        case = golden.read_case(golden_folder / str(case_name))
        with progress_bar(case.name, len(case.runs()) * case.config.layers) as advance:
            path = golden.emit(case, advance)
        _report(as_json, path, len(case.runs()))
        return
    if checkpoint is None or out is None:
        raise InputError("--checkpoint DIR and --out TRACE were expected, or --case NAME")
    loaded = load_checkpoint(checkpoint, layout)
    runs = plan(input_calls(checkpoint, tokens, prompt, chat, chunk, decode), loaded.config.vocab)
    header, model = Header(runs, None, checkpoint_digest(loaded.files)), Model(loaded.config, loaded.parameters)
    _emit_trace(out, model, header, taps, arithmetic(dtype, rules), as_json)


class Arithmetic(NamedTuple):
    """What a trace is computed with: the name in its header, the steps, and the ops that tap into a recorder."""

    name: str
    steps: Steps
    ops: Callable[[Recorder], Any]


def arithmetic(dtype: str, rules: Policy | None) -> Arithmetic:
    """By the options of the command."""
    if rules is not None:
        return Arithmetic(rules.name, CUT_STEPS, partial(PolicyOps, rules))
    return Arithmetic(dtype, Steps(), ExactOps if dtype == "exact" else partial(NativeOps, dtype))


def _emit_trace(out: Path, model: Model, header: Header, taps: str, using: Arithmetic, as_json: bool) -> None:
    """Run the script of the header on the model and write what the taps ask for."""
    runs = header.runs
    # a value beyond a dtype is an infinity, and what follows from it is in the trace for all to see
    quiet = np.errstate(over="ignore", invalid="ignore")
    with quiet, progress_bar("emit", len(runs) * model.config.layers) as advance:
        recorder = Recorder(taps, advance)
        execute(using.ops(recorder), replace(model, steps=using.steps), runs, recorder)
    if not recorder.arrays:
        raise InputError(f"--taps {taps!r} matches no tap")
    write_trace(out, replace(header, policy=using.name), recorder.arrays)
    _report(as_json, out, len(runs))


def _emit_all(folder: Path, jobs: int | None, as_json: bool) -> None:
    cases = [golden.read_case(path) for path in golden.find_cases(folder)]
    if cases[0].folder == folder:
        raise InputError(f"{folder}: is a case, but a folder of cases was expected")
    for place in [folder, *(case.folder for case in cases)]:
        golden.remove_leftovers(place)
    wanted = [case for case in cases if not golden.is_emitted(case)]
    with progress_bar("emit", len(cases)) as advance, results(golden.emit, wanted, jobs) as emitted:
        for _ in range(len(cases) - len(wanted)):
            advance()
        for _ in emitted:
            advance()
    golden.write_folder_manifest(folder)
    if as_json:
        click.echo(json.dumps({"emitted": [case.name for case in wanted], "cases": len(cases)}))
    else:
        click.echo(f"{folder}: {len(wanted)} of {len(cases)} cases written, the others were up to date")


def _report(as_json: bool, path: Path, runs: int) -> None:
    size = path.stat().st_size
    if as_json:
        click.echo(json.dumps({"trace": str(path), "bytes": size, "runs": runs}))
    else:
        click.echo(f"{path}: {runs} run{'s' * (runs != 1)}, {size:,} bytes")
