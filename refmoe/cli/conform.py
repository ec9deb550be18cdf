"""``refmoe conform``: run an engine on the golden cases and judge each."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from refmoe.cli.options import GOLDEN, PATH, json_option, progress_bar
from refmoe.cli.verify import is_significance
from refmoe.engines.adapter import DTYPES
from refmoe.engines.adapter_command import adapter_command
from refmoe.engines.conform import Suite, conform
from refmoe.engines.harness import Harness, HarnessUnusable
from refmoe.engines.judgement import Judge
from refmoe.engines.keeping import keep_folder
from refmoe.engines.known import Held, hold, known_failures, read_known, write_known
from refmoe.engines.outcome import SKIPPED, Outcome, Results
from refmoe.engines.results import to_json, write_results
from refmoe.engines.scaffold import SCAFFOLDS, usage, write_scaffold
from refmoe.engines.serve import options_of
from refmoe.engines.workflow import check_source, known_file, write_workflow
from refmoe.errors import InputError
from refmoe.policy.load import policy as named_policy
from refmoe.policy.policy import Policy
from refmoe.suite import Case, find_cases, read_case
from refmoe.verify.verify import SIGNIFICANCE

Names = tuple[str, ...]


@click.command("conform", short_help="Run an engine on the golden cases, and judge each.")
@click.argument("harness", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARGUMENTS]]")
@click.option("--adapter", metavar="NAME", help="transformers or another of refmoe's own, FILE.py or module.of.yours.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the adapter; repeatable.")
@click.option("--python", type=PATH, metavar="PROGRAM", help="The Python in which the adapter runs; else this one.")
@click.option("--case", "names", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this dtype; repeatable.")
@click.option("--policy", "policies", multiple=True, metavar="DTYPE=POLICY", help="Judge a dtype by this policy.")
@click.option(
    "--timeout", type=click.FloatRange(0, 86400, min_open=True), default=300, show_default=True, metavar="SECONDS",
    help="The time for each request.",
)  # fmt: skip
@click.option(
    "--significance", type=float, default=SIGNIFICANCE, show_default=True, callback=is_significance,
    help="The probability that a healthy engine fails at a case and dtype.",
)  # fmt: skip
@click.option("--diagnose/--no-diagnose", "diagnosing", default=True, show_default=True, help="Explain failures.")
@click.option("--golden", type=PATH, default=GOLDEN, show_default=True, help="Where cases are.")
@click.option("--known", type=PATH, metavar="FILE", help="Failures that are known (TOML).")
@click.option("--out", type=PATH, metavar="FILE", help="Write the results (JSON).")
@click.option("--keep", type=PATH, metavar="DIR", help="Keep what the engine returned, a trace for each case.")
@click.option("--write-ci", type=PATH, metavar="FILE", help="Write a GitHub workflow, today's failures known.")
@click.option(
    "--refmoe-from", "source", metavar="OWNER/REPOSITORY[@REF]",
    help="With --write-ci: where on GitHub it gets refmoe and the cases.",
)  # fmt: skip
@click.option(
    "--scaffold", type=(click.Choice([*SCAFFOLDS]), PATH), metavar="LANGUAGE FILE",
    help=f"Only write a harness to begin with: {' or '.join(SCAFFOLDS)}.",
)  # fmt: skip
@json_option
@click.pass_context
def conform_command(
    context: click.Context, harness: Names, adapter: str | None, options: Names, python: Path | None, names: Names,
    dtypes: Names, policies: Names, timeout: float, significance: float, diagnosing: bool, golden: Path,
    known: Path | None, out: Path | None, keep: Path | None, write_ci: Path | None, source: str | None,
    scaffold: tuple[str, Path] | None, as_json: bool,
) -> None:  # fmt: skip
    """Hold an engine against the golden cases at its dtypes, over the protocol of refmoe/engines/PROTOCOL.md.

    \b
    refmoe conform --adapter transformers --option attention=sdpa --out results/transformers.json
    refmoe conform --adapter ./my_adapter.py --python ../venv/bin/python
    refmoe conform --keep traces -- ./my-harness --threads 4
    refmoe conform --scaffold c harness.c

    Exit status 0: every case is conformant, skipped or known to fail. 1: one is not, or one that is known to fail
    conforms. 2: the engine cannot be run, or skips every case.
    """
    if scaffold is not None:
        write_scaffold(*scaffold)
        click.echo(f"{scaffold[1]}: a harness that skips every case as yet; run it with\n    {usage(*scaffold)}")
        return
    if (adapter is None) != bool(harness):
        raise InputError("exactly one of --adapter NAME and -- COMMAND was expected")
    if adapter is None and (options or python is not None):
        raise InputError("--option and --python are about an adapter, but no --adapter was given")
    _check_ci(write_ci, source)
    for path in (out, write_ci, None if write_ci is None else known_file(write_ci)):
        if path is not None:
            _refuse_output(path)
    if keep is not None:
        keep_folder(keep)
    listed = read_known(known) if known is not None else []
    cases = golden_cases(golden)
    suite = Suite(
        chosen_cases(cases, names),
        cases,
        [*dict.fromkeys(dtypes)],
        policies_of(policies),
        Judge(significance, diagnosing),
        keep,
    )
    if adapter is None:
        results, logs = _run(
            list(harness), {}, f"harness '{harness[0]}'", timeout, {"command": shlex.join(harness)}, suite
        )
    else:
        with adapter_command(adapter, options, python) as (command, variables):
            results, logs = _run(command, variables, f"adapter '{adapter}'", timeout, options_of([*options]), suite)
    held = hold(results, listed)
    status = exit_status(results, held)
    if out is not None:
        write_results(out, results)
    if write_ci is not None and source is not None:
        write_known(known_file(write_ci), known_failures(results))
        write_workflow(
            write_ci, source, _arguments(adapter, options, names, dtypes, policies, timeout), harness, adapter
        )
    if as_json:
        click.echo(json.dumps(_record(results, held, status)))
    else:
        from refmoe.report.scoreboard_text import print_results

        print_results(results, held, logs)
    context.exit(status)


def exit_status(results: Results, held: Held) -> int:
    """0, 1 or 2, as the command's help says."""
    if held.failing or held.passing:
        return 1
    return 2 if all(each.verdict == SKIPPED for each in results.outcomes) else 0


def golden_cases(golden: Path) -> list[Case]:
    """All cases of a folder. Raises InputError when there is none, or one is not readable."""
    try:
        folders = find_cases(golden)
    except InputError as error:
        raise InputError(f"{error}; --golden PATH says where they are") from None
    return [read_case(folder) for folder in folders]


def chosen_cases(cases: list[Case], names: Names) -> list[Case]:
    """The cases of these names, in the order of all; all where there are none. Raises InputError."""
    known = {case.name for case in cases}
    for name in names:
        if name not in known:
            raise InputError(f"case '{name}' is unknown, but one of {', '.join(sorted(known))} was expected")
    return [case for case in cases if not names or case.name in names]


def policies_of(arguments: Names) -> dict[str, Policy]:
    """Per dtype the policy, from arguments ``DTYPE=POLICY``. Raises InputError."""
    found = {}
    for argument in arguments:
        dtype, equals, name = argument.partition("=")
        if not equals or dtype not in DTYPES:
            raise InputError(f"--policy is '{argument}', but DTYPE=POLICY with one of {', '.join(DTYPES)} was expected")
        found[dtype] = named_policy(name)
    return found


def _run(
    command: list[str], variables: Mapping[str, str], label: str, timeout: float, options: Mapping[str, str],
    suite: Suite,
) -> tuple[Results, dict[tuple[str, str], str]]:  # fmt: skip
    """The results, and per case and dtype the end of standard error where the harness failed."""
    logs: dict[tuple[str, str], str] = {}
    try:
        harness = Harness(command, timeout, variables, label)
        dtypes = suite.dtypes or harness.description.dtypes
        with progress_bar("conform", len(suite.cases) * len(dtypes)) as advance:

            def log(outcome: Outcome, said: str) -> None:
                logs[outcome.case, outcome.dtype] = said
                advance()

            return conform(harness, options, suite, log), logs
    except HarnessUnusable as unusable:
        from refmoe.report.wording import visible

        for line in unusable.log.splitlines():
            click.echo(f"  {visible(line)}", err=True)
        raise


def _record(results: Results, held: Held, status: int) -> dict[str, Any]:
    def places(outcomes: Iterable[Outcome]) -> list[dict[str, str]]:
        return [{"case": each.case, "dtype": each.dtype} for each in outcomes]

    return {
        "status": status, "failing": places(held.failing), "known": places(each for each, _ in held.known),
        "unexpected_passes": places(each for each, _ in held.passing), "results": json.loads(to_json(results)),
    }  # fmt: skip


def _arguments(
    adapter: str | None, options: Names, names: Names, dtypes: Names, policies: Names, timeout: float
) -> list[str]:
    """The arguments of this run that another machine's run needs too."""
    repeated = {"--option": options, "--case": names, "--dtype": dtypes, "--policy": policies}
    words = ["--adapter", adapter] if adapter is not None else []
    for option, values in repeated.items():
        words += [word for value in values for word in (option, value)]
    return [*words, "--timeout", f"{timeout:g}"]


def _check_ci(write_ci: Path | None, source: str | None) -> None:
    """Only the user knows where refmoe is, to a workflow that runs elsewhere. Raises InputError."""
    if write_ci is None and source is not None:
        raise InputError("--refmoe-from is about --write-ci, which was not given")
    if write_ci is not None and source is None:
        raise InputError(
            "--write-ci needs --refmoe-from OWNER/REPOSITORY, the repository on GitHub that has refmoe and its cases"
        )
    if source is not None:
        check_source(source)


def _refuse_output(path: Path) -> None:
    """Before minutes of work rather than after them."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
