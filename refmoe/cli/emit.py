"""``refmoe emit``: golden activations, from a case or from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal

from refmoe import suite as golden
from refmoe.cli.options import (
    GOLDEN,
    PATH,
    Command,
    Input,
    checkpoint_options,
    device_option,
    input_options,
    jobs_option,
    json_option,
    progress_bar,
    record_of,
    synthetic_option,
)
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.jobs.emission import Emission, check_emission, cpu_only, emit, require_memory
from refmoe.jobs.estimate import Estimate
from refmoe.jobs.job import POLICY
from refmoe.jobs.source import find_source, loaded
from refmoe.parallel import results
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.traces.script import plan
from refmoe.traces.trace import Header, Recorder, write_trace


def scale_options(command: Command) -> Command:
    """Add the options for a checkpoint that does not fit into memory, or that takes long."""
    for option in (
        click.option(
            "--digest/--no-digest", default=True, show_default=True,
            help="Whether the trace names the checkpoint by its SHA-256, which reads every byte once more.",
        ),
        click.option("--estimate", "only_estimate", is_flag=True, help="Print the cost, and compute nothing."),
        click.option(
            "--executor", metavar="processes[:N]|dask:ADDRESS",
            help="Spread the experts of each layer over processes of this machine, or a Dask cluster.",
        ),
        click.option("--states", type=PATH, metavar="TRACE", help="With --layers A:B, A > 0: the input of layer A."),
        click.option("--layers", metavar="A:B", help="Only layers A to below B; the rest of the model is not read."),
        synthetic_option,
    ):  # fmt: skip
        command = option(command)
    return command


@dataclass(frozen=True)
class ScaleOptions:
    """The values of `scale_options`."""

    synthetic: int | None
    layers: str | None
    states: Path | None
    executor: str | None
    only_estimate: bool
    digest: bool


@dataclass(frozen=True)
class EmitOptions:
    """The values of the other options of ``refmoe emit``."""

    checkpoint: Path | None
    layout: str | None
    case_name: str | None
    every: bool
    golden_folder: Path
    out: Path | None
    taps: str
    dtype: str
    policy_name: str | None
    device: Place
    jobs: int | None
    as_json: bool


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
def emit_command(**options: Any) -> None:
    """Run the specification and write every named intermediate.

    \b
    refmoe emit --checkpoint DIR --tokens 1,2,3 --out trace.safetensors
    refmoe emit --checkpoint DIR --prompt 'The capital of France is' --taps 'logits,layers.0.*' --out t.safetensors
    refmoe emit --checkpoint DIR --tokens 1,2,3,4 --chunk 5,6 --decode 7,8 --out trace.safetensors
    refmoe emit --checkpoint mixtral:8x7b --synthetic 1 --layers 0:2 --tokens 1,2,3 --out trace.safetensors
    refmoe emit --case walking-skeleton
    refmoe emit --case walking-skeleton --policy hf-bfloat16 --out ideal.safetensors
    refmoe emit --all

    --all skips cases of full size, and cases that this version has already written from their present case.toml.
    --case skips nothing. If either is killed, each case is the old one or the new one; the same command goes on.

    A checkpoint is run layer by layer, and its weights are read block by block. Finished layers are kept in TRACE.parts
    until the trace is written.
    """
    script, scale = record_of(Input, options), record_of(ScaleOptions, options)
    asked = EmitOptions(**options)
    if asked.policy_name is not None:
        _check_policy(asked)
        rules = policy(asked.policy_name)
        if asked.case_name is not None:
            _emit_ideal_case(asked, rules)
            return
    if asked.case_name is not None or asked.every:
        _emit_goldens(asked)
        return
    if asked.checkpoint is None or asked.out is None:
        raise InputError("--checkpoint DIR and --out TRACE were expected, or --case NAME")
    _emit_checkpoint(asked, asked.checkpoint, asked.out, script, scale)


def _check_policy(asked: EmitOptions) -> None:
    """Raises InputError for options that contradict --policy."""
    if asked.device.on_gpu:
        raise InputError("--policy is computed on the CPU, but --device cuda was given")
    if asked.every or asked.dtype != "exact" or None not in (asked.case_name, asked.checkpoint):
        raise InputError("--policy goes with either --checkpoint or --case; --all and --dtype do not apply")
    if asked.case_name is not None and asked.out is None:
        raise InputError("--policy with --case writes a trace of its own, not the golden: --out TRACE was expected")


def _emit_checkpoint(asked: EmitOptions, checkpoint: Path, out: Path, script: Input, scale: ScaleOptions) -> None:
    """Run a script on a checkpoint and write the trace, or print its cost."""
    if scale.only_estimate and asked.device.on_gpu:
        raise cpu_only("--estimate", asked.device)
    source = find_source(checkpoint, asked.layout, scale.synthetic)
    config = loaded(source).config
    emission = Emission(
        source=source,
        runs=plan(script.calls(checkpoint), config.vocab),
        out=out,
        arithmetic=asked.dtype if asked.policy_name is None else POLICY + asked.policy_name,
        taps=asked.taps,
        place=asked.device,
        layers=scale.layers,
        states=scale.states,
        executor=scale.executor,
        digest=scale.digest,
    )
    needed = check_emission(emission)
    if scale.only_estimate:
        facts = {"memory_bytes": needed.memory, "weight_bytes": needed.weights, "trace_bytes": needed.trace}
        click.echo(json.dumps(facts) if asked.as_json else in_words(needed))
        return
    require_memory(emission, needed)
    console, on_cpu = Console(stderr=True), not asked.device.on_gpu
    if on_cpu and console.is_terminal:
        console.print(f"emit: {in_words(needed)}", highlight=False)
    with progress_bar("emit", len(emission.runs) * len(emission.computed)) as advance:
        emit(emission, advance)
    _report(asked.as_json, out, len(emission.runs), {"memory_bytes": needed.memory} if on_cpu else {})


def _emit_goldens(asked: EmitOptions) -> None:
    """Write the golden of one case, or of all cases."""
    if asked.checkpoint is not None or asked.out is not None or asked.taps != "*" or asked.dtype != "exact":
        raise InputError(
            f"{'--all' if asked.every else '--case'} writes a golden as it is defined: --checkpoint, --out, --taps and "
            "--dtype do not apply"
        )
    if asked.case_name is not None and asked.every:
        raise InputError("one of --case NAME and --all was expected, but both were given")
    if asked.every:
        _emit_all(asked.golden_folder, asked.jobs, asked.as_json, asked.device)
        return
    case = golden.read_case(asked.golden_folder / str(asked.case_name))
    with progress_bar(case.name, len(case.runs()) * len(case.computed)) as advance:
        path = golden.emit(case, advance, asked.device)
    _report(asked.as_json, path, len(case.runs()))


def _emit_ideal_case(asked: EmitOptions, rules: Policy) -> None:
    """Write a trace of the ideal run of a case by a policy."""
    case = golden.read_case(asked.golden_folder / str(asked.case_name))
    runs = case.runs()
    with progress_bar("emit", len(runs) * case.config.layers) as advance:
        recorder = Recorder(asked.taps, advance)
        golden.compute_ideal(case, rules, recorder)
    if not recorder.arrays:
        raise InputError(f"--taps {asked.taps!r} matches no tap")
    out = Path(str(asked.out))
    write_trace(out, Header(runs, case.name, policy=rules.name), recorder.arrays)
    _report(asked.as_json, out, len(runs))


def _emit_all(folder: Path, jobs: int | None, as_json: bool, device: Place) -> None:
    cases = [golden.read_case(path) for path in golden.find_cases(folder)]
    if cases[0].folder == folder:
        raise InputError(f"{folder}: is a case, but a folder of cases was expected")
    for place in [folder, *(case.folder for case in cases)]:
        golden.remove_leftovers(place)
    wanted = [case for case in cases if not golden.is_emitted(case)]
    work, jobs = partial(golden.emit, place=device), device.jobs(jobs)
    with progress_bar("emit", len(cases)) as advance, results(work, wanted, jobs) as emitted:
        for _ in range(len(cases) - len(wanted)):
            advance()
        for _ in emitted:
            advance()
    golden.write_folder_manifest(folder)
    if as_json:
        click.echo(json.dumps({"emitted": [case.name for case in wanted], "cases": len(cases)}))
    else:
        click.echo(f"{folder}: {len(wanted)} of {len(cases)} cases written, the others were up to date")


def in_words(needed: Estimate) -> str:
    """The cost of a run in one line."""
    return (
        f"up to {decimal(needed.memory)} of memory, {decimal(needed.weights)} of weights to read, "
        f"{decimal(needed.trace)} to write"
    )


def _report(as_json: bool, path: Path, runs: int, more: dict[str, int] | None = None) -> None:
    """Print the path and the size of the file written.   more: further facts for JSON."""
    size = path.stat().st_size
    if as_json:
        click.echo(json.dumps({"trace": str(path), "bytes": size, "runs": runs, **(more or {})}))
    else:
        click.echo(f"{path}: {runs} run{'s' * (runs != 1)}, {size:,} bytes")
