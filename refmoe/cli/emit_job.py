"""``refmoe emit --checkpoint``: a script on a model of any size, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.filesize import decimal

from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cli.options import PATH, progress_bar
from refmoe.errors import InputError
from refmoe.jobs.estimate import Estimate, available_memory, estimate
from refmoe.jobs.job import POLICY, Job, compute, parse_layers
from refmoe.jobs.source import SIZES, Folder, Source, find_source, loaded
from refmoe.traces.script import Call, plan
from refmoe.traces.trace import Header, Recorder, join_trace

Command = TypeVar("Command", bound=Callable[..., Any])


def synthetic_option(command: Command) -> Command:
    """Weights from the formula."""
    return click.option(
        "--synthetic", type=click.IntRange(0), metavar="SEED",
        help=f"With --checkpoint {' or '.join(SIZES)}: weights from the formula, no download.",
    )(command)  # fmt: skip


def scale_options(command: Command) -> Command:
    """How a checkpoint is run that does not fit into memory, or that takes long."""
    for option in (
        click.option(
            "--digest/--no-digest", default=True, show_default=True,
            help="Whether the trace names the checkpoint by its SHA-256, for which every byte is read once more.",
        ),
        click.option("--estimate", "only_estimate", is_flag=True, help="Say what it would take, and compute nothing."),
        click.option(
            "--executor", metavar="processes[:N]|dask:ADDRESS",
            help="Spread the experts of each layer over processes of this machine, or a Dask cluster.",
        ),
        click.option("--states", type=PATH, metavar="TRACE", help="With --layers A:B, A > 0: what A begins with."),
        click.option("--layers", metavar="A:B", help="Only layers A to below B; the rest of the model is not read."),
        synthetic_option,
    ):  # fmt: skip
        command = option(command)
    return command


def emit_job(
    checkpoint: Path, layout: str | None, calls: Callable[[], list[Call]], out: Path, taps: str, arithmetic: str,
    as_json: bool, *, synthetic: int | None, layers: str | None, states: Path | None, executor: str | None,
    only_estimate: bool, digest: bool,
) -> None:  # fmt: skip
    """Compute and write the trace; what was finished before is not computed again."""
    source = find_source(checkpoint, layout, synthetic)
    model = loaded(source)
    config, wanted = model.config, parse_layers(layers, model.config)
    if states is not None and not wanted.start:
        raise InputError(
            f"--states {states}: layer 0 begins with the embedding, so --layers A:B with A > 0 was expected"
        )
    runs = plan(calls(), config.vocab)
    needed = estimate(config, runs, wanted, arithmetic, taps, _stored_bytes(source))
    if not needed.trace:
        raise InputError(f"--taps {taps!r} matches no tap of layers {wanted.start} to {wanted.stop - 1}")
    if only_estimate:
        _print_estimate(needed, as_json)
        return
    _refuse_too_little(needed)
    header = Header(
        runs, None, checkpoint_digest(model.files) if digest and model.files else None,
        arithmetic.removeprefix(POLICY),
    )  # fmt: skip
    job = Job(source, header, arithmetic, wanted, taps, executor=executor, begin=states)
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(f"emit: {in_words(needed)}", highlight=False)
    with progress_bar("emit", len(runs) * len(wanted)) as advance:
        parts = compute(job, out.with_name(out.name + ".parts"), Recorder(taps, advance))
    join_trace(out, header, parts.tensors())
    parts.remove()
    report(as_json, out, len(runs), needed)


def _stored_bytes(source: Source) -> int:
    """Bytes of a stored parameter; from the formula none is stored, and float32 is what it gives."""
    return (
        max({"F64": 8, "F32": 4}.get(dtype, 2) for dtype in loaded(source).dtypes) if isinstance(source, Folder) else 4
    )


def _refuse_too_little(needed: Estimate) -> None:
    free = available_memory()
    if free is not None and needed.memory > free:
        raise InputError(
            f"out of memory: up to {decimal(needed.memory)} are needed, but {decimal(free)} are available; fewer "
            "tokens need less"
        )


def in_words(needed: Estimate) -> str:
    """What a run takes, in one line."""
    return (
        f"up to {decimal(needed.memory)} of memory, {decimal(needed.weights)} of weights to read, "
        f"{decimal(needed.trace)} to write"
    )


def _print_estimate(needed: Estimate, as_json: bool) -> None:
    facts = {"memory_bytes": needed.memory, "weight_bytes": needed.weights, "trace_bytes": needed.trace}
    click.echo(json.dumps(facts) if as_json else in_words(needed))


def report(as_json: bool, path: Path, runs: int, needed: Estimate | None = None) -> None:
    """What was written."""
    size = path.stat().st_size
    if as_json:
        stated = {} if needed is None else {"memory_bytes": needed.memory}
        click.echo(json.dumps({"trace": str(path), "bytes": size, "runs": runs, **stated}))
    else:
        click.echo(f"{path}: {runs} run{'s' * (runs != 1)}, {size:,} bytes")
