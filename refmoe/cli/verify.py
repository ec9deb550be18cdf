"""``refmoe verify``: judge a trace by its policy and find the first wrong step, or print distances from a reference."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cli.options import (
    GOLDEN,
    PATH,
    checkpoint_options,
    device_option,
    json_option,
    progress_bar,
    record_of,
    synthetic_option,
)
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import shown
from refmoe.jobs.source import Source, find_source, loaded
from refmoe.jobs.spread import open_executor, parse_executor
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite import case_source, read_case, trace_path
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verifier.distances import compare_traces
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.segments import Spread
from refmoe.verifier.verify import SIGNIFICANCE, Settings, verify

EXIT_STATUS = {CONFORMANT: 0, NOT_CONFORMANT: 1, CANNOT_JUDGE: 2}

LEAST_SIGNIFICANCE = 1e-100
"""Below it every threshold goes to infinity."""


def is_significance(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """The value, if it is a probability from `LEAST_SIGNIFICANCE` to below 1. Raises InputError if not."""
    if not LEAST_SIGNIFICANCE <= value < 1:
        raise InputError(
            f"--significance is {value:g}, but a probability from {LEAST_SIGNIFICANCE:g} to below 1 was expected"
        )
    return value


@dataclass(frozen=True)
class ModelOptions:
    """The options that name the model which the trace should have run."""

    case_name: str | None
    golden_folder: Path
    checkpoint: Path | None
    layout: str | None
    synthetic: int | None


@dataclass(frozen=True)
class JudgingOptions:
    """The options that say how to judge."""

    policy: str | None
    significance: float
    diagnosing: bool
    device: Place
    executor: str | None


@dataclass(frozen=True)
class OutputOptions:
    """The options that say what to print and what to write."""

    html: Path | None
    junit: Path | None
    as_json: bool


@click.command("verify", short_help="Judge a trace: conformant, or wrong, where and by how much.")
@click.argument("trace", type=PATH)
@click.option("--case", "case_name", metavar="NAME", help="The golden case that was run; the trace's own if not given.")
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@checkpoint_options
@click.option(
    "--policy", metavar="POLICY", help="The policy to judge by (refmoe policies); the trace's own if not given."
)
@click.option(
    "--significance", type=float, default=SIGNIFICANCE, show_default=True, callback=is_significance,
    help="The probability that a healthy engine fails.",
)  # fmt: skip
@click.option(
    "--diagnose/--no-diagnose", "diagnosing", default=True, show_default=True,
    help="Look for an explanation of a failure; each known bug is simulated.",
)  # fmt: skip
@device_option(
    "The products with weights, of the enclosures and of the replicas, are computed there. All other work, and the "
    "search for an explanation, is on the CPU."
)
@synthetic_option
@click.option(
    "--executor", metavar="processes[:N]|dask:ADDRESS",
    help="Judge layers side by side, in processes of this machine or on a Dask cluster.",
)  # fmt: skip
@click.option("--html", type=PATH, metavar="FILE", help="Write the report as one page that needs no network.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write the report as JUnit XML.")
@click.option(
    "--distances", "reference", type=PATH, metavar="REFERENCE",
    help="Only print the distance from this trace, or from the golden of this case's folder; no verdict.",
)  # fmt: skip
@click.option("--run", "only", metavar="NAME", help="With --distances: print this run only.")
@json_option
@click.pass_context
def verify_command(
    context: click.Context, /, trace: Path, reference: Path | None, only: str | None, **options: Any
) -> None:
    """Hold TRACE against a case or a checkpoint, step by step, and judge it by its policy.

    \b
    refmoe verify engine.safetensors --case walking-skeleton
    refmoe verify engine.safetensors --checkpoint DIR --policy bfloat16 --html report.html
    refmoe verify engine.safetensors --checkpoint mixtral:8x7b --synthetic 1 --executor processes --no-diagnose
    refmoe verify engine.safetensors --distances golden/walking-skeleton

    Each step is recomputed from the trace's own inputs, as an interval of all values that the policy allows. Exit
    status 0: conformant. 1: not conformant. 2: cannot judge, or the trace cannot be used.

    --distances prints, per layer and tap, the relative RMS, the worst element and its place, and the routing decisions
    that differ. It needs neither model nor policy, and the exit status is 0 whatever the distances are.
    """
    if reference is not None:
        _refuse_judging(context)
        _print_distances(trace, reference, only, options["as_json"])
        return
    if only is not None:
        raise InputError(f"--run {only} goes with --distances REFERENCE, but that was not given")
    model, judging, output = (
        record_of(ModelOptions, options),
        record_of(JudgingOptions, options),
        record_of(OutputOptions, options),
    )
    for out in (output.html, output.junit):
        if out is not None:
            _refuse_output(out, trace)
    if output.html is not None and output.junit is not None and output.html.absolute() == output.junit.absolute():
        raise InputError(f"{output.html}: both --html and --junit name it, but two files were expected")
    opened = read_trace(trace)
    declared = named_policy(judging.policy) if judging.policy is not None else _declared(opened)
    if judging.executor is not None:
        parse_executor(judging.executor)
    report = _verify(opened, _against(opened, model), declared, judging)
    _show(report, output)
    context.exit(EXIT_STATUS[report.verdict])


def _refuse_judging(context: click.Context) -> None:
    """Raises InputError for options of a verdict beside --distances, which gives none."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        given = source not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
        if given and parameter.name not in ("trace", "reference", "only", "as_json"):
            raise InputError(f"--distances gives no verdict, so {parameter.opts[0]} does not apply")


def _print_distances(trace: Path, reference: Path, only: str | None, as_json: bool) -> None:
    """Print how far a trace is from a reference: a trace, or the folder of a case."""
    expected = trace_path(reference) if reference.is_dir() else reference
    comparison = compare_traces(read_trace(trace), read_trace(expected))
    if as_json:
        click.echo(json.dumps(asdict(comparison)))
        return
    from refmoe.report.distances import print_distances

    print_distances(comparison, only)


def _show(report: Report, output: OutputOptions) -> None:
    """Print the report, then write its files: a full disk must not take away the report that a person waits for."""
    if output.as_json:
        from refmoe.report.verification_json import to_json

        click.echo(to_json(report), nl=False)
    else:
        from refmoe.report.verification import print_report

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that a locale lacks
        print_report(report)
    if output.html is not None:
        from refmoe.report.html import to_html

        _write(output.html, to_html(report))
    if output.junit is not None:
        from refmoe.report.junit import to_junit

        _write(output.junit, to_junit(report))


def _refuse_output(path: Path, trace: Path) -> None:
    """Raises InputError when a report cannot be written to this path: before hours of work, not after them."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
        if path.exists() and trace.exists() and path.samefile(trace):
            raise InputError(f"{path}: is the trace itself, but another file to write was expected")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _declared(trace: Trace) -> Policy:
    """The policy that the trace names. It must be one of refmoe's own: a stranger's file could allow anything."""
    name = trace.header.policy
    if ".toml" in name:
        raise InputError(
            f"{trace.path}: metadata field 'policy' is {shown(name)}, but the name of a policy was expected; a file of "
            "one's own is given with --policy"
        )
    try:
        return named_policy(name)
    except InputError as error:
        raise InputError(f"{trace.path}: metadata field 'policy': {error}") from None


class Against(NamedTuple):
    """The model and the script that the trace is held against."""

    name: str
    source: Source
    runs: tuple[Run, ...] | None
    """The runs of the case; None: the trace's own runs."""


def _against(trace: Trace, model: ModelOptions) -> Against:
    case_name, checkpoint, synthetic = model.case_name, model.checkpoint, model.synthetic
    if case_name is not None and checkpoint is not None:
        raise InputError("one of --case NAME and --checkpoint DIR was expected, but both were given")
    if checkpoint is None:
        if synthetic is not None:
            raise InputError(f"--synthetic {synthetic} goes with --checkpoint, but none was given")
        folder = model.golden_folder / (case_name if case_name is not None else _named_case(trace))
        case = read_case(folder)
        if trace.header.case not in (None, case.name, folder.name):
            raise InputError(
                f"{trace.path}: metadata field 'case' is {shown(trace.header.case)}, but --case is {shown(case.name)}"
            )
        return Against(f"case {case.name}", case_source(case), case.runs())
    source = find_source(checkpoint, model.layout, synthetic)
    found, files = trace.header.checkpoint, loaded(source).files
    if found is not None and (not files or found != checkpoint_digest(files)):
        digest = (
            f'"{checkpoint_digest(files)}", the digest of {checkpoint},' if files else "null, as there are no files,"
        )
        raise InputError(f"{trace.path}: metadata field 'checkpoint' is {shown(found)}, but {digest} was expected")
    return Against(f"checkpoint {checkpoint}", source, None)


def _verify(trace: Trace, against: Against, policy: Policy, judging: JudgingOptions) -> Report:
    name, source, runs = against
    config, parameters = loaded(source).config, loaded(source).parameters
    total = len(runs if runs is not None else trace.header.runs) * config.layers
    place = nullcontext() if judging.executor is None else open_executor(judging.executor)
    with progress_bar("verify", total) as advance, place as opened:
        spread = None if opened is None else Spread(opened, source)
        settings = Settings(
            significance=judging.significance, progress=advance, ops=judging.device.enclosures(), spread=spread
        )
        report = verify(trace, name, config, parameters, runs, policy, settings)
    if not judging.diagnosing or report.verdict != NOT_CONFORMANT:
        return report
    from refmoe.bugs.catalogue import MUTANTS
    from refmoe.verifier.diagnosis import diagnose, explained

    with progress_bar("diagnose", 2 * len(MUTANTS)) as advance:
        explanations = diagnose(trace, config, parameters, runs, policy, report, MUTANTS.values(), advance)
    return explained(report, explanations)


def _named_case(trace: Trace) -> str:
    """The case that the trace names. It must be a plain name: a path could read any file of this machine."""
    name = trace.header.case
    if name is None:
        raise InputError(f"{trace.path}: names no case, so --case NAME or --checkpoint DIR was expected")
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{trace.path}: metadata field 'case' is {shown(name)}, but the name of a case was expected")
    return name


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
