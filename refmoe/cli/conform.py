"""``refmoe conform``: run an engine on the golden cases and judge each."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refmoe.cli.options import GOLDEN, PATH, json_option, progress_bar
from refmoe.cli.verify import is_significance
from refmoe.engines.adapter import adapter_command, options_of
from refmoe.engines.conform import Judge, Suite, conform
from refmoe.engines.harness import Harness, HarnessUnusable
from refmoe.engines.known import Failures, known_failures, read_known, sort_failures, write_known
from refmoe.engines.protocol import DTYPES
from refmoe.engines.results import SKIPPED, Outcome, Results, to_json, write_results
from refmoe.engines.run_case import keep_folder
from refmoe.engines.scaffold import SCAFFOLDS, usage, write_scaffold
from refmoe.engines.scaffold.workflow import check_source, known_file, write_workflow
from refmoe.errors import InputError
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite import Case, find_cases, read_case
from refmoe.verifier.verify import SIGNIFICANCE

Names = tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """The options of ``refmoe conform``. Fields without a description are as in its help."""

    harness: Names
    """The command of a harness and its arguments; empty with an adapter."""
    adapter: str | None
    options: Names
    """The adapter's, each ``key=value``."""
    python: Path | None
    names: Names
    """The cases to run; empty: all."""
    dtypes: Names
    policies: Names
    """Each ``DTYPE=POLICY``."""
    timeout: float
    """Seconds for each request."""
    significance: float
    diagnosing: bool
    golden: Path
    known: Path | None
    out: Path | None
    keep: Path | None
    write_ci: Path | None
    source: str | None
    """``OWNER/REPOSITORY[@REF]`` of refmoe, for the workflow."""
    scaffold: tuple[str, Path] | None
    """A language and the file to write."""
    as_json: bool

    def check(self) -> None:
        """Raises InputError for options that contradict each other, and for files that cannot be written."""
        if (self.adapter is None) != bool(self.harness):
            raise InputError("exactly one of --adapter NAME and -- COMMAND was expected")
        if self.adapter is None and (self.options or self.python is not None):
            raise InputError("--option and --python are about an adapter, but no --adapter was given")
        _check_ci(self.write_ci, self.source)
        for path in (self.out, self.write_ci, None if self.write_ci is None else known_file(self.write_ci)):
            if path is not None:
                _refuse_output(path)
        if self.keep is not None:
            keep_folder(self.keep)

    def suite(self) -> Suite:
        """The suite that these options choose. Raises InputError."""
        cases = golden_cases(self.golden)
        return Suite(
            cases=chosen_cases(cases, self.names),
            smoke=cases,
            dtypes=[*dict.fromkeys(self.dtypes)],
            policies=policies_of(self.policies),
            judge=Judge(self.significance, self.diagnosing),
            keep=self.keep,
        )


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
def conform_command(context: click.Context, /, **options: Any) -> None:
    """Hold an engine against the golden cases at its dtypes, over the protocol of refmoe/engines/PROTOCOL.md.

    \b
    refmoe conform --adapter transformers --option attention=sdpa --out results/transformers.json
    refmoe conform --adapter ./my_adapter.py --python ../venv/bin/python
    refmoe conform --keep traces -- ./my-harness --threads 4
    refmoe conform --scaffold c harness.c

    Exit status 0: every case is conformant, skipped or known to fail. 1: one is not, or one that is known to fail
    conforms. 2: the engine cannot be run, or skips every case.
    """
    chosen = Options(**options)
    if chosen.scaffold is not None:
        write_scaffold(*chosen.scaffold)
        path = chosen.scaffold[1]
        click.echo(f"{path}: a harness that skips every case as yet; run it with\n    {usage(*chosen.scaffold)}")
        return
    chosen.check()
    listed = read_known(chosen.known) if chosen.known is not None else []
    results, logs = _run(chosen, chosen.suite())
    failures = sort_failures(results, listed)
    status = exit_status(results, failures)
    if chosen.out is not None:
        write_results(chosen.out, results)
    if chosen.write_ci is not None and chosen.source is not None:
        write_known(known_file(chosen.write_ci), known_failures(results))
        write_workflow(chosen.write_ci, chosen.source, _arguments(chosen), chosen.harness, chosen.adapter)
    if chosen.as_json:
        click.echo(json.dumps(_record(results, failures, status)))
    else:
        from refmoe.report.scoreboard_text import print_results

        print_results(results, failures, logs)
    context.exit(status)


def exit_status(results: Results, failures: Failures) -> int:
    """The exit status 0, 1 or 2, as the command's help defines it."""
    if failures.failing or failures.passing:
        return 1
    return 2 if all(each.verdict == SKIPPED for each in results.outcomes) else 0


def golden_cases(golden: Path) -> list[Case]:
    """All cases of a folder. Raises InputError when there is none, or one cannot be read."""
    try:
        folders = find_cases(golden)
    except InputError as error:
        raise InputError(f"{error}; --golden PATH says where they are") from None
    return [read_case(folder) for folder in folders]


def chosen_cases(cases: list[Case], names: Names) -> list[Case]:
    """The cases of these names, in the order of `cases`; without names, all. Raises InputError."""
    known = {case.name for case in cases}
    for name in names:
        if name not in known:
            raise InputError(f"case '{name}' is unknown, but one of {', '.join(sorted(known))} was expected")
    return [case for case in cases if not names or case.name in names]


def policies_of(arguments: Names) -> dict[str, Policy]:
    """The policy of each dtype, from arguments ``DTYPE=POLICY``. Raises InputError."""
    found = {}
    for argument in arguments:
        dtype, equals, name = argument.partition("=")
        if not equals or dtype not in DTYPES:
            raise InputError(f"--policy is '{argument}', but DTYPE=POLICY with one of {', '.join(DTYPES)} was expected")
        found[dtype] = named_policy(name)
    return found


Logs = dict[tuple[str, str], str]
"""Per case and dtype the end of standard error where the harness failed."""


def _run(chosen: Options, suite: Suite) -> tuple[Results, Logs]:
    """Run the suite on the adapter or the harness. Raises InputError."""
    logs: Logs = {}
    with ExitStack() as stack:
        variables: Mapping[str, str] = {}
        if chosen.adapter is None:
            command, label = [*chosen.harness], f"harness '{chosen.harness[0]}'"
            identity: Mapping[str, str] = {"command": shlex.join(command)}
        else:
            served = adapter_command(chosen.adapter, chosen.options, chosen.python)
            command, variables = stack.enter_context(served)
            label, identity = f"adapter '{chosen.adapter}'", options_of(chosen.options)
        try:
            harness = Harness(command, chosen.timeout, variables, label)
            dtypes = suite.dtypes or harness.description.dtypes
            advance = stack.enter_context(progress_bar("conform", len(suite.cases) * len(dtypes)))

            def log(outcome: Outcome, said: str) -> None:
                logs[outcome.case, outcome.dtype] = said
                advance()

            return conform(harness, identity, suite, log), logs
        except HarnessUnusable as unusable:
            from refmoe.report.wording import visible

            for line in unusable.log.splitlines():
                click.echo(f"  {visible(line)}", err=True)
            raise


def _record(results: Results, failures: Failures, status: int) -> dict[str, Any]:
    """The run as a JSON object."""

    def places(outcomes: Iterable[Outcome]) -> list[dict[str, str]]:
        return [{"case": each.case, "dtype": each.dtype} for each in outcomes]

    return {
        "status": status,
        "failing": places(failures.failing),
        "known": places(each for each, _ in failures.known),
        "unexpected_passes": places(each for each, _ in failures.passing),
        "results": json.loads(to_json(results)),
    }


def _arguments(chosen: Options) -> list[str]:
    """The arguments of this run that a run on another machine needs too."""
    repeated = {
        "--option": chosen.options, "--case": chosen.names, "--dtype": chosen.dtypes, "--policy": chosen.policies,
    }  # fmt: skip
    words = ["--adapter", chosen.adapter] if chosen.adapter is not None else []
    for option, values in repeated.items():
        words += [word for value in values for word in (option, value)]
    return [*words, "--timeout", f"{chosen.timeout:g}"]


def _check_ci(write_ci: Path | None, source: str | None) -> None:
    """Raises InputError unless both options or none are given: only the user knows where a workflow finds refmoe."""
    if write_ci is None and source is not None:
        raise InputError("--refmoe-from is about --write-ci, which was not given")
    if write_ci is not None and source is None:
        raise InputError(
            "--write-ci needs --refmoe-from OWNER/REPOSITORY, the repository on GitHub that has refmoe and its cases"
        )
    if source is not None:
        check_source(source)


def _refuse_output(path: Path) -> None:
    """Raises InputError for a file that cannot be written, before minutes of work rather than after them."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
