"""``refmoe emit``: golden activations, from a case or from a checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmoe import suite as golden
from refmoe.cli.emit_job import emit_job, report, scale_options
from refmoe.cli.emit_on_gpu import emit_on_gpu
from refmoe.cli.options import (
    GOLDEN,
    PATH,
    checkpoint_options,
    device_option,
    input_calls,
    input_options,
    jobs_option,
    json_option,
    progress_bar,
)
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.jobs.job import POLICY
from refmoe.parallel import results
from refmoe.policy.load import policy
from refmoe.policy.policy import Policy
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, write_trace


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
@scale_options
@click.option(
    "--dtype", type=click.Choice(["exact", "float64", "float32"]), default="exact", show_default=True,
    help="exact: the same bits on every machine; the others are the hardware's arithmetic, faster.",
)  # fmt: skip
@click.option(
    "--policy", "policy_name", metavar="NAME",
    help="The ideal run of this numeric policy (refmoe policies): exact, and rounded at its cut points.",
)  # fmt: skip
@device_option(
    "Exact values have the CPU's bits; with a checkpoint, --layers, --states, --executor and --estimate do not apply, "
    "nor does --policy."
)
@jobs_option
@json_option
def emit_command(
    checkpoint: Path | None, layout: str | None, tokens: Any, prompt: str | None, chat: Path | None, chunk: Any,
    decode: Any, case_name: str | None, every: bool, golden_folder: Path, out: Path | None, taps: str, dtype: str,
    policy_name: str | None, device: Place, jobs: int | None, as_json: bool, **scale: Any,
) -> None:  # fmt: skip
    """Run the specification and write every named intermediate.

    \b
    refmoe emit --checkpoint DIR --tokens 1,2,3 --out trace.safetensors
    refmoe emit --checkpoint DIR --prompt 'The capital of France is' --taps 'logits,layers.0.*' --out t.safetensors
    refmoe emit --checkpoint DIR --tokens 1,2,3,4 --chunk 5,6 --decode 7,8 --out trace.safetensors
    refmoe emit --checkpoint mixtral:8x7b --synthetic 1 --layers 0:2 --tokens 1,2,3 --out trace.safetensors
    refmoe emit --case walking-skeleton
    refmoe emit --case walking-skeleton --policy hf-bfloat16 --out ideal.safetensors
    refmoe emit --all

    --all passes over cases that this version has written from their case.toml as it is, and over those of full size;
    --case never does. Killed at any moment, either leaves the old case or the new one; start it again to go on. A
    checkpoint is run layer by layer, its weights read block by block; finished layers are kept in TRACE.parts until the
    trace is whole.
    """
    rules = None if policy_name is None else policy(policy_name)
    if rules is not None and device.on_gpu:
        raise InputError("--policy is computed on the CPU, but --device cuda was given")
    if rules is not None and (every or dtype != "exact" or None not in (case_name, checkpoint)):
        raise InputError("--policy goes with either --checkpoint or --case; --all and --dtype do not apply")
    if rules is not None and case_name is not None:
        if out is None:
            raise InputError("--policy with --case writes a trace of its own, not the golden: --out TRACE was expected")
        _emit_ideal(out, golden.read_case(golden_folder / case_name), rules, taps, as_json)
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
            _emit_all(golden_folder, jobs, as_json, device)
            return
        case = golden.read_case(golden_folder / str(case_name))
        with progress_bar(case.name, len(case.runs()) * len(case.computed)) as advance:
            path = golden.emit(case, advance, device)
        report(as_json, path, len(case.runs()))
        return
    if checkpoint is None or out is None:
        raise InputError("--checkpoint DIR and --out TRACE were expected, or --case NAME")
    calls = partial(input_calls, checkpoint, tokens, prompt, chat, chunk, decode)
    if device.on_gpu:
        emit_on_gpu(device, checkpoint, layout, calls, out, taps, dtype, as_json, **scale)
        return
    named = dtype if policy_name is None else f"{POLICY}{policy_name}"
    emit_job(checkpoint, layout, calls, out, taps, named, as_json, **scale)


def _emit_ideal(out: Path, case: golden.Case, rules: Policy, taps: str, as_json: bool) -> None:
    """Run a case by a policy and write what the taps ask for."""
    model, runs = Model(case.config, case.checkpoint().parameters, CUT_STEPS), case.runs()
    # a value beyond a dtype is an infinity, and what follows from it is in the trace for all to see
    quiet = np.errstate(over="ignore", invalid="ignore")
    with quiet, progress_bar("emit", len(runs) * model.config.layers) as advance:
        recorder = Recorder(taps, advance)
        execute(PolicyOps(rules, recorder), model, runs, recorder)
    if not recorder.arrays:
        raise InputError(f"--taps {taps!r} matches no tap")
    write_trace(out, Header(runs, case.name, policy=rules.name), recorder.arrays)
    report(as_json, out, len(runs))


def _emit_all(folder: Path, jobs: int | None, as_json: bool, device: Place) -> None:
    cases = [golden.read_case(path) for path in golden.find_cases(folder)]
    if cases[0].folder == folder:
        raise InputError(f"{folder}: is a case, but a folder of cases was expected")
    for place in [folder, *(case.folder for case in cases)]:
        golden.remove_leftovers(place)
    wanted = [case for case in cases if not golden.is_emitted(case)]
    emit, jobs = partial(golden.emit, place=device), device.jobs(jobs)
    with progress_bar("emit", len(cases)) as advance, results(emit, wanted, jobs) as emitted:
        for _ in range(len(cases) - len(wanted)):
            advance()
        for _ in emitted:
            advance()
    golden.write_folder_manifest(folder)
    if as_json:
        click.echo(json.dumps({"emitted": [case.name for case in wanted], "cases": len(cases)}))
    else:
        click.echo(f"{folder}: {len(wanted)} of {len(cases)} cases written, the others were up to date")
