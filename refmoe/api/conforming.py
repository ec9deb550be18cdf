# SPDX-License-Identifier: Apache-2.0
"""Conformance: run an engine on the golden cases and judge each; put the results of several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from refmoe.api.progress import Bars, silent
from refmoe.engines.adapter import adapter_command
from refmoe.engines.adapters import SHIPPED
from refmoe.engines.conform import Suite, Watch
from refmoe.engines.conform import conform as run_suite
from refmoe.engines.harness import Harness, HarnessUnusable
from refmoe.engines.judge import Judge, engines
from refmoe.engines.known import (
    CANNOT,
    FAILED,
    WELL,
    Failures,
    known_failures,
    read_known,
    sort_failures,
    whole_verdict,
    write_known,
)
from refmoe.engines.observations import policies_used
from refmoe.engines.options import options_of
from refmoe.engines.protocol import DTYPES
from refmoe.engines.quantised import FORMS, PREFIX, Quantised
from refmoe.engines.results import (
    Outcome,
    Results,
    json_number,
    read_results,
    to_json,
    write_results,
)
from refmoe.engines.run_case import keep_folder
from refmoe.engines.scaffold import SCAFFOLDS, usage, write_scaffold
from refmoe.engines.scaffold.ci import (
    KNOWN,
    SYSTEMS,
    Pipeline,
    check_source,
    ci_file,
    ci_text,
    refuse_existing,
    write_ci,
)
from refmoe.engines.scoreboard import KINDS, Entrant, Scoreboard, result_files, scoreboard
from refmoe.errors import InputError
from refmoe.files.parsing import strict_json
from refmoe.files.writable import make_folder, refuse_output
from refmoe.parallel import ONE_THREAD, environment, parse_executor
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.signals import ended_by_signals
from refmoe.suite import FAMILIES, PRODUCTION, SMALL, Case, find_cases, read_case
from refmoe.suite.fresh import fresh_case
from refmoe.suite.golden_folder import case_folder, golden_folder
from refmoe.verifier.segments import SIGNIFICANCE

Names = Sequence[str]
GGUF_FORMS = tuple(form for form in FORMS if form.startswith(PREFIX))
RECIPE_NAMES = tuple(form for form in FORMS if not form.startswith(PREFIX))
"""How `conform` can quantise the weights that an engine gets: as a GGUF file, or as a folder."""
Logs = dict[tuple[str, str], str]
"""Per case and dtype the end of standard error where the harness failed."""


@dataclass(frozen=True)
class Conformance:
    """The engine, and how it is held against the cases."""

    adapter: str | None = None
    """The name of an adapter, a file or a module; None with a harness."""
    harness: Names = ()
    """The command of a harness and its arguments; empty with an adapter."""
    options: Names = ()
    """The adapter's, each ``key=value``."""
    python: Path | None = None
    """The Python in which the adapter runs; None: this one."""
    cases: Names = ()
    """The cases to run; empty: all of the families."""
    families: Names = ()
    """The families of cases to run, some of `FAMILIES`; empty: those with small dimensions.

    With quantised weights empty means those for production kernels, whose rows are whole blocks.
    """
    dtypes: Names = ()
    """The dtypes to run; empty: all that the engine has."""
    policies: Names = ()
    """Each judges the dtype that it stores."""
    timeout: float = 300.0
    """Seconds for each request."""
    significance: float = SIGNIFICANCE
    diagnose: bool = True
    golden: Path | None = None
    keep: Path | None = None
    """A folder for the traces that come back."""
    fresh: int | None = None
    """A seed of other weights and tokens for the same cases; None: the cases as they are."""
    gguf: str | None = None
    """``gguf:`` and a type or mixture: the engine gets GGUF files, whose weights are quantised so."""
    quantise: str | None = None
    """One of `RECIPE_NAMES`: the engine gets folders whose weights are quantised so."""
    executor: str | None = None
    """Judges cases, and runs as many engines side by side, each with one BLAS thread, as it has workers. As
    `parse_executor` reads it; None: one engine, and this process."""

    def check(self) -> None:
        """Raises InputError for fields that contradict each other, and a folder that cannot be made."""
        if (self.adapter is None) != bool(self.harness):
            raise InputError("exactly one of --adapter NAME and -- COMMAND was expected")
        if self.adapter is None and (self.options or self.python is not None):
            raise InputError("--option and --python are about an adapter, but no --adapter was given")
        if self.executor is not None:
            parse_executor(self.executor)
        if self.gguf is not None and self.quantise is not None:
            raise InputError(f"--quantise {self.quantise} was given beside --format {self.gguf}, but one was expected")
        if self.cases and self.families:
            raise InputError("--family says which cases are run, so no --case was expected beside it")
        if self.keep is not None:
            keep_folder(self.keep)

    def suite(self) -> Suite:
        """The cases and dtypes to run. Raises InputError."""
        golden, form = golden_folder(self.golden), self.gguf or self.quantise
        families = self.families or (SMALL if form is None else PRODUCTION,)
        try:
            folders = find_cases(golden, families)
        except InputError as error:
            raise InputError(f"{error}; --golden DIR says where they are") from None
        wanted = {case_folder(name, golden) for name in self.cases} or {*folders}
        if not wanted:
            raise InputError(
                f"{golden}: no case is of the family {' or '.join(families)}; --family or --case says which are run"
            )
        others = wanted - {*folders}
        return Suite(
            cases=[self._read(folder) for folder in [*folders, *sorted(others)] if folder in wanted],
            smoke=[self._read(folder) for folder in folders],
            dtypes=[*dict.fromkeys(self.dtypes)],
            policies=policies_of(self.policies),
            judge=Judge(self.significance, self.diagnose),
            keep=self.keep,
            fresh=self.fresh,
            quantised=None if form is None else Quantised(form),
        )

    def _read(self, folder: Path) -> Case:
        case = read_case(folder)
        return case if self.fresh is None else fresh_case(case, self.fresh)

    def repeated(self) -> dict[str, Names]:
        """The options of ``refmoe conform`` that a run on another machine needs too, each with its values."""
        options = {
            "adapter": [self.adapter] if self.adapter is not None else [], "option": self.options, "case": self.cases,
            "family": self.families, "dtype": self.dtypes, "policy": self.policies,
            "fresh": [] if self.fresh is None else [str(self.fresh)], "timeout": [f"{self.timeout:g}"],
            "format": [] if self.gguf is None else [self.gguf], "quantise": [self.quantise] if self.quantise else [],
        }  # fmt: skip
        return {name: values for name, values in options.items() if values}


def policies_of(names: Names) -> dict[str, Policy]:
    """The policy of each dtype, which is the one that it stores. Raises InputError for two of one dtype."""
    found: dict[str, Policy] = {}
    for name in names:
        rules = named_policy(name)
        dtype = rules.storage.name
        if dtype not in DTYPES:
            raise InputError(f"--policy {name} stores {dtype}, but one of {', '.join(DTYPES)} was expected")
        if dtype in found:
            raise InputError(f"--policy {name} stores {dtype}, as {found[dtype].name} does, but one was expected")
        found[dtype] = rules
    return found


def conform(
    asked: Conformance,
    bars: Bars = silent,
    out: Path | None = None,
    before: Results | None = None,
) -> tuple[Results, Logs]:
    """Run an engine on the cases and judge each.

    out: a file that is written after each outcome, with a note that the run has not ended. So nothing is lost where
        the run is killed.
    before: the results of a run that was ended. Its outcomes are kept, and the others are added.
    SIGTERM and SIGHUP end the engine and remove temporary files, and raise SystemExit. Raises InputError when the
    engine cannot be run, or `before` is of another run.
    """
    asked.check()
    suite = asked.suite()
    logs: Logs = {}
    with ended_by_signals(), ExitStack() as stack:
        variables: Mapping[str, str] = {}
        if asked.adapter is None:
            command, label = [*asked.harness], f"harness '{asked.harness[0]}'"
            identity: Mapping[str, str] = {"command": shlex.join(command)}
        else:
            served = adapter_command(asked.adapter, asked.options, asked.python)
            command, variables = stack.enter_context(served)
            label, identity = f"adapter '{asked.adapter}'", options_of(asked.options)
        if asked.executor is not None:
            stack.enter_context(environment(ONE_THREAD))
        more = engines(asked.executor, len(suite.cases)) - 1
        harness = Harness(command, asked.timeout, variables, label=label, more=more)
        dtypes = suite.dtypes or harness.description.dtypes
        advance = stack.enter_context(bars("conform", len(suite.cases) * len(dtypes)))

        def log(outcome: Outcome, said: str) -> None:
            logs[outcome.case, outcome.dtype] = said
            advance()

        def save(results: Results) -> None:
            if out is not None:
                with suppress(InputError):  # the disk may be full for now; at the end it is tried once more
                    write_results(out, results)

        return run_suite(harness, identity, replace(suite, before=before), Watch(log, save), asked.executor), logs


# ---- as plain values


def run_facts(results: Results, failures: Failures) -> dict[str, Any]:
    """The run as plain values."""

    def places(outcomes: Iterable[Outcome]) -> list[dict[str, str]]:
        return [{"case": each.case, "dtype": each.dtype} for each in outcomes]

    return {
        "policies": policy_facts(results),
        "fresh": results.fresh,
        "failing": places(failures.failing),
        "known": places(each for each, _ in failures.known),
        "unexpected_passes": places(each for each, _ in failures.passing),
        "results": strict_json(to_json(results)),
    }


def policy_facts(results: Results) -> dict[str, Any]:
    """Per dtype the policy by which it was judged, and whether that allows more than the dtype's own generic one."""
    return {dtype: {"policy": used.name, "wider": used.wider} for dtype, used in policies_used(results).items()}


# ---- files


class Repeatable(Protocol):
    """A run that a CI system can repeat."""

    @property
    def harness(self) -> Names:
        """The command of a harness or of a server, and its arguments; empty without one."""

    def repeated(self) -> dict[str, Names]:
        """The options of ``refmoe conform`` that a run on another machine needs too, each with its values."""


@dataclass(frozen=True)
class Ci:
    """Files by which CI systems repeat a run."""

    systems: Sequence[tuple[str, Path]]
    """Each one of `SYSTEMS`, and the root of the repository."""
    source: str
    """``OWNER/REPOSITORY[@REF]`` of refmoe."""
    known: Path | None
    """The list of known failures; None: it is written, beside the files."""
    places: Names
    """The values of ``--source``."""

    def check(self, asked: Repeatable) -> None:
        """Raises InputError when a file is there already or cannot hold the run, or the source is none."""
        check_source(self.source)
        for system, root in self.systems:
            refuse_existing(ci_file(system, root))
            ci_text(system, self._pipeline(asked, root))
        for root in self._roots() if self.known is None else ():
            if (root / KNOWN).exists():
                raise InputError(f"{root / KNOWN}: is there already; --known {root / KNOWN} takes it as it is")

    def write(self, asked: Repeatable, results: Results) -> list[Path]:
        """Write the files, and beside them the list of today's failures.   returns: the files"""
        written = []
        for root in self._roots() if self.known is None else ():
            make_folder(root, parents=True)
            write_known(root / KNOWN, known_failures(results))
            written.append(root / KNOWN)
        for system, root in self.systems:
            write_ci(system, root, self._pipeline(asked, root))
            written.append(ci_file(system, root))
        return written

    def _pipeline(self, asked: Repeatable, root: Path) -> Pipeline:
        known = Path(KNOWN) if self.known is None else _relative(self.known, root)
        return Pipeline(
            source=self.source, options=asked.repeated(), harness=asked.harness, known=known, places=self.places
        )

    def _roots(self) -> list[Path]:
        return list(dict.fromkeys(root for _, root in self.systems))


def _relative(path: Path, root: Path) -> Path:
    """The path relative to the root of the repository, if it lies inside."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root) if path.is_relative_to(root) else path


def board_facts(board: Scoreboard) -> dict[str, Any]:
    """A scoreboard as plain values."""
    return {
        "cases": list(board.cases),
        "engines": [_engine(each) for each in board.entrants],
        "notes": list(board.notes),
    }


def _engine(entrant: Entrant) -> dict[str, Any]:
    results = entrant.results
    outcomes = [
        {
            "case": each.case, "dtype": each.dtype, "kind": KINDS[each.verdict], "verdict": each.verdict,
            "reason": each.reason, "issue": each.issue,
            "first_wrong": None if each.first_wrong is None else "/".join(each.first_wrong),
            "explanation": each.explanations[0].name if each.explanations else None,
        }
        for each in results.outcomes
    ]  # fmt: skip
    return {
        "engine": entrant.label, "name": results.engine.name, "version": results.engine.version,
        "options": {**results.engine.options}, "platform": {**results.platform},
        "policies": policy_facts(results), "fresh": results.fresh, "notes": [*results.notes],
        "counts": {dtype: {kind: entrant.tally(dtype)[kind] for kind in KINDS.values()} for dtype in entrant.dtypes},
        "worst_errors": {
            dtype: {step: json_number(x) for step, x in entrant.worst_errors(dtype).items()}
            for dtype in entrant.dtypes
        },
        "outcomes": outcomes,
    }  # fmt: skip


__all__ = [
    "CANNOT", "DTYPES", "FAILED", "FAMILIES", "GGUF_FORMS", "RECIPE_NAMES", "SCAFFOLDS", "SHIPPED", "SYSTEMS", "WELL",
    "Ci", "Conformance", "Failures", "HarnessUnusable", "Repeatable", "Results", "Scoreboard", "board_facts",
    "check_source", "conform", "read_known", "read_results", "refuse_output", "result_files", "run_facts", "scoreboard",
    "sort_failures", "usage", "whole_verdict", "write_results", "write_scaffold",
]  # fmt: skip
