# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform``: run an engine on the golden cases and judge each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refmoe.api.conforming import (
    CANNOT,
    DTYPES,
    FAILED,
    FAMILIES,
    GGUF_FORMS,
    RECIPE_NAMES,
    SCAFFOLDS,
    SHIPPED,
    SYSTEMS,
    WELL,
    Ci,
    Conformance,
    Failures,
    HarnessUnusable,
    Repeatable,
    Results,
    check_source,
    conform,
    read_known,
    read_results,
    run_facts,
    sort_failures,
    usage,
    whole_verdict,
    write_results,
    write_scaffold,
)
from refmoe.api.engines import Listed, engine, engines
from refmoe.api.files import write_text
from refmoe.api.serving import KINDS, Served, judge_server, server_results, verdict_facts, write_server_files
from refmoe.cli.guard import OUTPUT, OUTPUT_FOLDER, GuardedCommand
from refmoe.cli.options import (
    PATH,
    Decimal,
    Integer,
    executor_option,
    golden_option,
    json_option,
    progress_bar,
    record_of,
    sarif_options,
    significance_option,
    words_of,
)
from refmoe.errors import InputError
from refmoe.report.json_text import json_text
from refmoe.report.sources import Sources, read_sources

UNUSABLE = 2
EXIT_STATUS = {WELL: 0, FAILED: 1, CANNOT: 3}


@dataclass(frozen=True)
class Files:
    """The options that name files to read and to write."""

    known: Path | None
    out: Path | None
    resume: bool
    """Whether outcomes that `out` already has are kept."""
    write_ci: tuple[tuple[str, Path], ...]
    """Per CI system the root of the repository."""
    refmoe_from: str | None
    """``OWNER/REPOSITORY[@REF]`` of refmoe."""
    junit: Path | None
    sarif: Path | None
    sources: tuple[str, ...]
    """The places of steps in the engine's source."""
    badge: Path | None
    summary: Path | None

    def check(self, asked: Repeatable) -> tuple[Ci | None, Sources | None]:
        """The files of CI systems to write, and the places of alerts.

        Raises InputError for options without the other, and files that cannot be written.
        """
        if self.refmoe_from is not None and not self.write_ci and self.sarif is None:
            raise InputError("--refmoe-from is about --write-ci and --sarif, but neither was given")
        if self.write_ci and self.refmoe_from is None:
            raise InputError(
                "--write-ci needs --refmoe-from OWNER/REPOSITORY, the repository on GitHub that has refmoe and its "
                "cases"
            )
        if self.sources and self.sarif is None:
            raise InputError("--source is about --sarif, which was not given")
        if self.resume and self.out is None:
            raise InputError("--resume needs --out FILE, which has the results so far")
        if self.refmoe_from is not None:
            check_source(self.refmoe_from)
        ci = None
        if self.write_ci and self.refmoe_from is not None:
            ci = Ci(systems=self.write_ci, source=self.refmoe_from, known=self.known, places=self.sources)
            ci.check(asked)
        return ci, None if self.sarif is None else read_sources(self.sources, self._candidates(asked))

    def _candidates(self, asked: Repeatable) -> list[Path]:
        """Files in which all is shown that has no line: the adapter, the program, the list of known failures."""
        words = asked.repeated().get("adapter") or [w for word in asked.harness for w in words_of(word)]
        return [Path(word) for word in words] + ([] if self.known is None else [self.known])

    def reports(self, results: Results, failures: Failures, sources: Sources | None) -> Iterator[tuple[Path, str]]:
        """The reports of a run: each file with its text."""
        if self.junit is not None:
            from refmoe.report.conform_junit import run_junit

            yield self.junit, run_junit(results, failures)
        if self.sarif is not None and sources is not None:
            from refmoe.report.conform_sarif import run_sarif

            yield self.sarif, run_sarif(results, failures, sources, self.refmoe_from)
        if self.badge is not None:
            from refmoe.report.standing import badge, standing

            yield self.badge, badge(standing(results, failures))
        if self.summary is not None:
            from refmoe.report.conform_markdown import run_markdown

            yield self.summary, run_markdown(results, failures)

    def before(self) -> Results | None:
        """The results to go on with, None without any. Raises InputError for a file that holds no results."""
        if self.resume and self.out is not None and self.out.exists():
            return read_results(self.out)
        return None


@dataclass(frozen=True)
class ServerOptions:
    """The options about a running server."""

    server: str | None
    server_kind: str | None
    server_model: str | None
    server_files: Path | None

    @property
    def given(self) -> bool:
        """Whether a server is judged, or its files are written. Raises InputError for options without the other."""
        if self.server is None and (self.server_kind or self.server_model):
            raise InputError("--server-kind and --server-model are about --server, which was not given")
        return self.server is not None or self.server_files is not None

    def check(self, context: click.Context) -> None:
        """Raises InputError for an option of the command that has no meaning for a server, or for its files alone."""
        judged = self.server is not None
        applies = (*self.__dataclass_fields__, *APPLIES, *(REPORTS if judged else ()), "as_json")
        for parameter in context.command.params:
            source = context.get_parameter_source(str(parameter.name))
            if parameter.name not in applies and source is click.core.ParameterSource.COMMANDLINE:
                beside = "--server" if judged else "--server-files without --server"
                raise InputError(
                    f"{parameter.opts[0]} has no meaning for a server, but none was expected beside {beside}"
                )

    def asked(self, options: Mapping[str, Any]) -> Served:
        """The server, and how it is judged.   options: of the run"""
        assert self.server is not None
        return Served(
            url=self.server, kind=self.server_kind, model=self.server_model, dtype=_single(options, "dtypes"),
            policy=_single(options, "policies"), case=_single(options, "cases"), golden=options["golden"],
            files=self.server_files, command=options["harness"], timeout=options["timeout"],
            significance=options["significance"], diagnose=options["diagnose"],
        )  # fmt: skip


APPLIES = ("harness", "cases", "dtypes", "policies", "timeout", "significance", "diagnose", "golden")
"""The options of a run that a server takes as well."""
REPORTS = ("known", "out", "write_ci", "refmoe_from", "junit", "sarif", "sources", "badge", "summary")
"""The options about files of a run that a server takes as well."""
ONCE = {"cases": "--case", "dtypes": "--dtype", "policies": "--policy"}
"""The options that a server has once at most."""


def _single(options: Mapping[str, Any], name: str) -> str | None:
    """The value of an option of `ONCE`, None without any. Raises InputError for several."""
    values: Sequence[str] = options[name]
    if len(values) > 1:
        raise InputError(f"{ONCE[name]} was given {len(values)} times, but a server has one at most")
    return values[0] if values else None


@dataclass(frozen=True)
class Ran:
    """A run that has come to its end."""

    results: Results
    show: Callable[[Failures], None]
    """Prints the run."""
    facts: Mapping[str, Any]
    """Facts about the run beside its results."""


class ConformCommand(GuardedCommand):
    """The command, whose help ends with the options of the adapter that is named, or of every one."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of options."""
        named = ctx.params.get("adapter")
        for each in engines() if named is None else [engine(named)]:
            with formatter.section(f"Options of --adapter {each.adapter}, each as --option KEY=VALUE"):
                rows = [(option.name, _about(option)) for option in each.options]
                formatter.write_dl(rows or [("none", "")])


def _about(option: Listed) -> str:
    default = "it has to be given" if option.default is None else f"default: {option.default}"
    about = f"{option.about[:1].upper()}{option.about[1:]}: " if option.about else ""
    return f"{about}{option.takes}.  [{default}]"


@click.command("conform", cls=ConformCommand, short_help="Run an engine on the golden cases, and judge each.")
@click.argument("harness", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARGUMENTS]]")
@click.option(
    "--adapter", metavar="NAME", is_eager=True,  # so that --help after it knows the name
    help=f"{', '.join(SHIPPED)}; or a FILE.py or module.of.yours with a class Adapter, executed with your rights.",
)  # fmt: skip
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of the adapter; repeatable.")
@click.option(
    "--python", type=PATH, metavar="PROGRAM",
    help="The Python that runs the adapter, executed with your rights; else this one.",
)  # fmt: skip
@click.option(
    "--case", "cases", multiple=True, metavar="NAME", help="Only this case (refmoe cases lists them); repeatable."
)
@click.option(
    "--family", "families", multiple=True, type=click.Choice(FAMILIES), 
    show_default="small; production with --format or --quantise",
    help="The cases of this family; production has the dimensions of production kernels; repeatable.",
)  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this dtype; repeatable.")
@click.option(
    "--policy", "policies", multiple=True, metavar="POLICY",
    help="Judge the dtype that this policy stores by it (refmoe policies lists them); repeatable.",
)  # fmt: skip
@click.option(
    "--timeout", type=Decimal(0, 86400, min_open=True), default=300, show_default=True, metavar="SECONDS",
    help="The time for each request.",
)  # fmt: skip
@significance_option("a healthy engine fails at a case and dtype")
@click.option("--diagnose/--no-diagnose", default=True, show_default=True, help="Explain failures.")
@golden_option
@executor_option("Judge cases, and run an engine of one thread for each worker,", "one engine, all its threads")
@click.option(
    "--fresh", type=Integer(0), metavar="SEED",
    help="Other weights and tokens for the same cases, by this seed: an engine that returns stored goldens fails.",
)  # fmt: skip
@click.option(
    "--format", "gguf", type=click.Choice(GGUF_FORMS), metavar="gguf:TYPE",
    help="Give the engine GGUF files with weights in TYPE, as materialise does, and judge it on these weights.",
)  # fmt: skip
@click.option(
    "--quantise", type=click.Choice(RECIPE_NAMES),
    help="Give the engine folders with quantised weights, and judge it on these weights.",
)  # fmt: skip
@click.option("--known", type=PATH, metavar="FILE", help="Failures that are known (TOML).")
@click.option("--out", type=OUTPUT, metavar="FILE", help="Write the results (JSON), after each outcome anew.")
@click.option(
    "--resume", is_flag=True, help="Go on with the results in --out, where the run that wrote them was ended."
)
@click.option(
    "--keep", type=OUTPUT_FOLDER, metavar="DIR", help="Keep the traces that the engine returned, one for each case."
)
@click.option("--junit", type=OUTPUT, metavar="FILE", help="Write the outcomes as JUnit XML.")
@sarif_options
@click.option("--badge", type=OUTPUT, metavar="FILE", help="Write the JSON of a badge, for shields.io.")
@click.option("--summary", type=OUTPUT, metavar="FILE", help="Write a summary in Markdown.")
@click.option(
    "--write-ci", type=(click.Choice([*SYSTEMS]), OUTPUT_FOLDER), multiple=True, metavar="SYSTEM DIR",
    help=f"Write files that repeat this run: {', '.join(SYSTEMS)}. DIR is the root of the repository. Repeatable.",
)  # fmt: skip
@click.option(
    "--scaffold", type=(click.Choice([*SCAFFOLDS]), OUTPUT), metavar="LANGUAGE FILE",
    help=f"Only write a harness to begin with: {' or '.join(SCAFFOLDS)}.",
)  # fmt: skip
@click.option(
    "--server", metavar="URL",
    help="Judge a running server over HTTP; after -- the command that starts it, with {checkpoint} or {gguf}.",
)  # fmt: skip
@click.option("--server-kind", type=click.Choice(KINDS), help="The kind of server; else it is found by asking.")
@click.option("--server-model", metavar="NAME", help="The name of the model in requests; else the server's first one.")
@click.option(
    "--server-files", type=OUTPUT_FOLDER, metavar="DIR",
    help="Write the model that a server is to serve, and show the commands that serve it.",
)  # fmt: skip
@json_option
@click.pass_context
def conform_command(
    context: click.Context, /, scaffold: tuple[str, Path] | None, as_json: bool, **options: Any
) -> None:
    """Hold an engine against the golden cases at its dtypes, over the protocol of refmoe/engines/PROTOCOL.md.

    \b
    refmoe conform --adapter transformers --option attention=sdpa --out results/transformers.json
    refmoe conform --adapter ./my_adapter.py --python ../venv/bin/python
    refmoe conform --family production --adapter transformers
    refmoe conform --family production --adapter llama_cpp --format gguf:Q4_K_M
    refmoe conform --keep traces -- ./my-harness --threads 4
    refmoe conform --fresh 20261128 -- ./my-harness
    refmoe conform --adapter llama_cpp --out llama.json --resume
    refmoe conform --sarif alerts.sarif --source attention.q_rope=rope.cpp:apply_rope -- ./my-harness
    refmoe conform --write-ci github . --refmoe-from OWNER/refmoe -- ./my-harness
    refmoe conform --scaffold c harness.c
    refmoe conform --server-files model
    refmoe conform --server http://127.0.0.1:8000 --dtype bfloat16
    refmoe conform --adapter transformers --help

    COMMAND, an adapter of your own and the Python that runs it are programs. They are executed with your rights.

    Exit status 0: every case is conformant, skipped or known to fail. 1: one is not, or one that is known to fail
    conforms. 2: the engine cannot be run. 3: it skips every case, or no case that fails could be judged.
    """
    if scaffold is not None:
        write_scaffold(*scaffold)
        if as_json:
            click.echo(json_text({"harness": str(scaffold[1]), "usage": usage(*scaffold)}))
        else:
            click.echo(f"{scaffold[1]}: a harness that skips every case as yet; run it with\n    {usage(*scaffold)}")
        return
    server = record_of(ServerOptions, options)
    files = record_of(Files, options)
    asked: Served | Conformance
    if server.given:
        server.check(context)
        if server.server is None:
            _write_server_files(server.server_files, options, as_json)
            return
        asked = server.asked(options)
    else:
        asked = Conformance(**options)
    asked.check()
    ci, sources = files.check(asked)
    listed = read_known(files.known) if files.known is not None else []
    try:
        ran = _served(asked) if isinstance(asked, Served) else _run(asked, files)
    except HarnessUnusable as unusable:
        from refmoe.report.wording import visible

        for line in unusable.log.splitlines():
            click.echo(f"  {visible(line)}", err=True)
        raise
    results, failures = ran.results, sort_failures(ran.results, listed)
    status = EXIT_STATUS[whole_verdict(results, failures)]
    unwritten: InputError | None = None
    try:
        if files.out is not None:
            write_results(files.out, results)
        for path, text in files.reports(results, failures, sources):
            write_text(path, text)
        written = [] if ci is None else ci.write(asked, results)
    except InputError as error:  # the verdicts are said all the same
        unwritten, status, written = error, UNUSABLE, []
    if as_json:
        why = {} if unwritten is None else {"error": str(unwritten)}
        click.echo(json_text({"status": status, **why, **ran.facts, **run_facts(results, failures)}))
    else:
        ran.show(failures)
        for path in written:
            click.echo(f"written: {path}")
        if unwritten is not None:
            raise unwritten
    context.exit(status)


def _run(asked: Conformance, files: Files) -> Ran:
    """Run an engine on cases."""
    results, logs = conform(asked, progress_bar, files.out, files.before())

    def show(failures: Failures) -> None:
        from refmoe.report.scoreboard_text import print_results

        print_results(results, failures, logs)

    return Ran(results, show, {})


def _served(asked: Served) -> Ran:
    """Judge a server."""
    verdict = judge_server(asked, progress_bar)

    def show(failures: Failures) -> None:
        from refmoe.report.server_text import print_verdict

        print_verdict(verdict, failures)

    return Ran(server_results(asked, verdict), show, verdict_facts(verdict))


def _write_server_files(folder: Path | None, options: Mapping[str, Any], as_json: bool) -> None:
    """Write the files that a server loads, and show the commands that serve them."""
    assert folder is not None
    if options["harness"]:
        raise InputError("a command that starts a server needs --server URL, where it answers")
    url, dtype, case = "http://127.0.0.1:8000", _single(options, "dtypes"), _single(options, "cases")
    commands = write_server_files(folder, dtype, url, case, options["golden"])
    if as_json:
        shown = {name: {"command": words, "about": about} for name, (words, about) in commands.items()}
        click.echo(json_text({"folder": str(folder), "commands": shown}))
        return
    from refmoe.report.server_text import print_commands

    print_commands(str(folder), commands, url)
