"""``refmoe verify``: is a trace what the declared policy allows, and if not, where does it first go wrong?"""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import click

from refmoe.checkpoints.load import checkpoint_digest
from refmoe.cli.emit_job import synthetic_option
from refmoe.cli.options import GOLDEN, PATH, checkpoint_options, device_option, json_option, progress_bar
from refmoe.cuda.place import Place
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.json_file import shown
from refmoe.jobs.source import Source, find_source, loaded
from refmoe.jobs.spread import open_executor, parse_executor
from refmoe.policy.load import policy as named_policy
from refmoe.policy.policy import Policy
from refmoe.suite import case_source, read_case
from refmoe.traces.trace import Run, Trace, read_trace
from refmoe.verify.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verify.segments import Spread
from refmoe.verify.verify import SIGNIFICANCE, verify

EXIT_STATUS = {CONFORMANT: 0, NOT_CONFORMANT: 1, CANNOT_JUDGE: 2}


LEAST_SIGNIFICANCE = 1e-100
"""Below it every threshold goes to infinity."""


def is_significance(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """A probability strictly between 0 and 1, and not so small that nothing would be improbable."""
    if not LEAST_SIGNIFICANCE <= value < 1:
        raise InputError(
            f"--significance is {value:g}, but a probability from {LEAST_SIGNIFICANCE:g} to below 1 was expected"
        )
    return value


@click.command("verify", short_help="Judge a trace: conformant, or wrong, where and by how much.")
@click.argument("trace", type=PATH)
@click.option("--case", "case_name", metavar="NAME", help="The golden case that was run; the trace's own if not given.")
@click.option("--golden", "golden_folder", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@checkpoint_options
@click.option("--policy", metavar="POLICY", help="What rounding is legal; see `refmoe policies`. Else the trace's own.")
@click.option(
    "--significance", type=float, default=SIGNIFICANCE, show_default=True, callback=is_significance,
    help="The probability that a healthy engine fails.",
)  # fmt: skip
@click.option(
    "--diagnose/--no-diagnose", "diagnosing", default=True, show_default=True,
    help="Look for what explains a failure: the same again for each known bug.",
)  # fmt: skip
@device_option(
    "There, the products with weights are computed, of the bounds and of the replicas; all else is on the CPU, as "
    "is the search for what explains a failure."
)
@synthetic_option
@click.option(
    "--executor", metavar="processes[:N]|dask:ADDRESS",
    help="Judge layers side by side, in processes of this machine or on a Dask cluster.",
)  # fmt: skip
@click.option("--html", type=PATH, metavar="FILE", help="Write the report as one page that needs no network.")
@click.option("--junit", type=PATH, metavar="FILE", help="Write the report as JUnit XML.")
@json_option
@click.pass_context
def verify_command(
    context: click.Context, trace: Path, case_name: str | None, golden_folder: Path, checkpoint: Path | None,
    layout: str | None, policy: str | None, significance: float, diagnosing: bool, device: Place, html: Path | None,
    junit: Path | None, synthetic: int | None, executor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Hold TRACE against a case or a checkpoint, step by step, and judge it by its policy.

    \b
    refmoe verify engine.safetensors --case walking-skeleton
    refmoe verify engine.safetensors --checkpoint DIR --policy bfloat16 --html report.html
    refmoe verify engine.safetensors --checkpoint mixtral:8x7b --synthetic 1 --executor processes --no-diagnose

    Each step is recomputed from the trace's own inputs, as an interval of everything that the policy allows. Exit
    status 0: conformant. 1: not conformant. 2: cannot judge, or the trace cannot be used.
    """
    for out in (html, junit):
        if out is not None:
            _refuse_output(out, trace)
    if html is not None and junit is not None and html.absolute() == junit.absolute():
        raise InputError(f"{html}: both --html and --junit name it, but two files were expected")
    opened = read_trace(trace)
    declared = named_policy(policy) if policy is not None else _declared(opened)
    if executor is not None:
        parse_executor(executor)
    against = _against(opened, case_name, golden_folder, checkpoint, layout, synthetic)
    report = _verify(opened, against, declared, significance, diagnosing, device, executor)
    # first of all what a person waits for: a full disk must not take it away
    if as_json:
        from refmoe.report.verification_json import to_json

        click.echo(to_json(report), nl=False)
    else:
        from refmoe.report.verification import print_report

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that a locale lacks
        print_report(report)
    if html is not None:
        from refmoe.report.html import to_html

        _write(html, to_html(report))
    if junit is not None:
        from refmoe.report.junit import to_junit

        _write(junit, to_junit(report))
    context.exit(EXIT_STATUS[report.verdict])


def _refuse_output(path: Path, trace: Path) -> None:
    """Before hours of work rather than after them."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
        if path.exists() and trace.exists() and path.samefile(trace):
            raise InputError(f"{path}: is the trace itself, but another file to write was expected")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _declared(trace: Trace) -> Policy:
    """The policy that the trace names: one of refmoe's own, since a stranger's file could allow anything."""
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
    """What the trace is held against."""

    name: str
    source: Source
    runs: tuple[Run, ...] | None
    """Those of the case; None for the trace's own."""


def _against(
    trace: Trace, case_name: str | None, golden: Path, checkpoint: Path | None, layout: str | None,
    synthetic: int | None,
) -> Against:  # fmt: skip
    if case_name is not None and checkpoint is not None:
        raise InputError("one of --case NAME and --checkpoint DIR was expected, but both were given")
    if checkpoint is None:
        if synthetic is not None:
            raise InputError(f"--synthetic {synthetic} goes with --checkpoint, but none was given")
        folder = golden / (case_name if case_name is not None else _named_case(trace))
        case = read_case(folder)
        if trace.header.case not in (None, case.name, folder.name):
            raise InputError(
                f"{trace.path}: metadata field 'case' is {shown(trace.header.case)}, but --case is {shown(case.name)}"
            )
        return Against(f"case {case.name}", case_source(case), case.runs())
    source = find_source(checkpoint, layout, synthetic)
    found, files = trace.header.checkpoint, loaded(source).files
    if found is not None and (not files or found != checkpoint_digest(files)):
        digest = (
            f'"{checkpoint_digest(files)}", the digest of {checkpoint},' if files else "null, as there are no files,"
        )
        raise InputError(f"{trace.path}: metadata field 'checkpoint' is {shown(found)}, but {digest} was expected")
    return Against(f"checkpoint {checkpoint}", source, None)


def _verify(
    trace: Trace, against: Against, policy: Policy, significance: float, diagnosing: bool, device: Place,
    executor: str | None,
) -> Report:  # fmt: skip
    name, source, runs = against
    config, parameters = loaded(source).config, loaded(source).parameters
    total = len(runs if runs is not None else trace.header.runs) * config.layers
    place = nullcontext() if executor is None else open_executor(executor)
    with progress_bar("verify", total) as advance, place as opened:
        spread = None if opened is None else Spread(opened, source)
        report = verify(
            trace, name, config, parameters, runs, policy, significance, advance, device.enclosures(), spread
        )
    if not diagnosing or report.verdict != NOT_CONFORMANT:
        return report
    from refmoe.bugs.catalogue import MUTANTS
    from refmoe.verify.diagnosis import diagnose, explained

    with progress_bar("diagnose", 2 * len(MUTANTS)) as advance:
        explanations = diagnose(
            trace, config, parameters, runs, policy, report, MUTANTS.values(), significance, advance
        )
    return explained(report, explanations)


def _named_case(trace: Trace) -> str:
    """The case that the trace names: a plain name, since a path would read a stranger's file."""
    name = trace.header.case
    if name is None:
        raise InputError(f"{trace.path}: names no case, so --case NAME or --checkpoint DIR was expected")
    if Path(name).name != name or name in ("", ".", ".."):
        raise InputError(f"{trace.path}: metadata field 'case' is {shown(name)}, but the name of a case was expected")
    return name


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
