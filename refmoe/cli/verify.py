# SPDX-License-Identifier: Apache-2.0
"""``refmoe verify``: judge values by a policy and find the first wrong step, or print distances from a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from refmoe.api.report import Report, check_places
from refmoe.api.verifying import Judging, ModelChoice, distances, verify_file
from refmoe.cli.guard import OUTPUT, PAGE, GuardedCommand
from refmoe.cli.options import (
    ONE_PROCESS,
    PATH,
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
    sarif_options,
    seed_option,
    significance_option,
)
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

EXIT_STATUS = {CONFORMANT: 0, NOT_CONFORMANT: 1, CANNOT_JUDGE: 3}


@dataclass(frozen=True)
class Output:
    """The options that say what to print and what to write."""

    html: Path | None
    junit: Path | None
    sarif: Path | None
    sources: tuple[str, ...]
    refmoe_from: str | None
    as_json: bool

    def check(self) -> None:
        """Raises InputError for options without the other, and places that are none."""
        if self.sarif is None and (self.sources or self.refmoe_from is not None):
            raise InputError("--source and --refmoe-from are about --sarif, which was not given")
        if self.sarif is not None:
            check_places(self.sources, self.refmoe_from)


@click.command("verify", cls=GuardedCommand, short_help="Judge values: conformant, or wrong, where and by how much.")
@click.argument("values", type=PATH)
@case_option("The golden case that was run; the trace's own if not given")
@golden_option
@checkpoint_options
@seed_option
@input_options
@click.option(
    "--policy",
    metavar="POLICY",
    help="The policy to judge by (refmoe policies lists them); default: the trace's, or the dtype.",
)
@significance_option("a healthy engine fails")
@click.option(
    "--diagnose/--no-diagnose", default=True, show_default=True,
    help="Look for an explanation of a failure; each known bug is simulated.",
)  # fmt: skip
@device_option(
    "The products with weights, of the enclosures and of the replicas, are computed there. All other work, and the "
    "search for an explanation, is on the CPU."
)
@executor_option("Judge layers side by side,", ONE_PROCESS)
@click.option("--html", type=PAGE, metavar="FILE", help="Write the report as one page that needs no network.")
@click.option("--junit", type=OUTPUT, metavar="FILE", help="Write the report as JUnit XML.")
@sarif_options
@click.option(
    "--distances", "reference", type=PATH, metavar="REFERENCE",
    help="Only print the distance from this trace, or from the golden of this case; no verdict.",
)  # fmt: skip
@click.option("--run", "only", metavar="NAME", help="With --distances: print this run only.")
@json_option
@click.pass_context
def verify_command(
    context: click.Context, /, values: Path, reference: Path | None, only: str | None, golden: Path, **options: Any
) -> None:
    """Hold VALUES against a case or a checkpoint, step by step, and judge them by a policy.

    \b
    refmoe verify engine.safetensors --case walking-skeleton
    refmoe verify engine.safetensors --checkpoint DIR --policy bfloat16 --html report.html
    refmoe verify values.npz --checkpoint DIR --tokens 1,2,3 --policy bfloat16
    refmoe verify engine.safetensors --checkpoint mixtral-8x7b --seed 1 --executor processes --no-diagnose
    refmoe verify engine.safetensors --distances walking-skeleton

    VALUES is a trace, or arrays by their taps in a .npz, .pt or .safetensors file. For arrays held against a
    checkpoint, --tokens, --chunk and --decode say which calls the engine made. Each step is recomputed from the
    engine's own inputs, as an interval of all values that the policy allows. Exit status 0: conformant. 1: not
    conformant. 2: the input cannot be used. 3: cannot judge, or conformant
    by taps that show fewer than half of the known bugs.

    --distances prints, per layer and tap, the relative RMS, the worst element and its place, and the routing decisions
    that differ. It needs neither model nor policy, and the exit status is 0 whatever the distances are.
    """
    if reference is not None:
        refuse_judging(context)
        print_distances(values, reference, golden, only, options["as_json"])
        return
    if only is not None:
        raise InputError(f"--run {only} goes with --distances REFERENCE, but that was not given")
    script, output = record_of(Input, options), record_of(Output, options)
    output.check()
    model = ModelChoice(
        case=options.pop("case_name"), golden=golden, checkpoint=options.pop("checkpoint"),
        layout=options.pop("layout"), seed=options.pop("seed"),
    )  # fmt: skip
    judging = Judging(place=options.pop("device"), **options)
    calls = script.calls(model.checkpoint or Path(), model.layout) if script.given else None
    report = verify_file(values, model, judging, calls, progress_bar)
    show(report, output)
    context.exit(exit_status(report))


def exit_status(report: Report) -> int:
    """The exit status of a verdict. Evidence too weak to see half of the known bugs is no judgement for a script."""
    power = report.power
    weak = report.verdict == CONFORMANT and power is not None and power.taps != "" and power.weak
    return EXIT_STATUS[CANNOT_JUDGE if weak else report.verdict]


def refuse_judging(context: click.Context) -> None:
    """Raises InputError for options of a verdict beside --distances, which gives none."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        given = source not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
        if given and parameter.name not in ("values", "reference", "only", "as_json", "golden"):
            raise InputError(f"--distances gives no verdict, so {parameter.opts[0]} does not apply")


def print_distances(values: Path, reference: Path, golden: Path, only: str | None, as_json: bool) -> None:
    """Print how far a trace is from a reference: a trace, or the golden of a case."""
    comparison = distances(values, reference, golden)
    if as_json:
        click.echo(json_text(asdict(comparison)))
        return
    from refmoe.report.distances import print_distances as print_table

    print_table(comparison, only)


def show(report: Report, output: Output) -> None:
    """Print the report, then write its files: a full disk must not take away the report that a person waits for."""
    if output.as_json:
        from refmoe.report.verification_json import to_json

        click.echo(to_json(report.findings), nl=False)
    else:
        from refmoe.report.verification import print_report

        print_report(report.findings)
    if output.html is not None:
        report.html(output.html)
    if output.junit is not None:
        report.junit(output.junit)
    if output.sarif is not None:
        report.sarif(output.sarif, output.sources, output.refmoe_from)
