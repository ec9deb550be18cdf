# SPDX-License-Identifier: Apache-2.0
"""The inputs of a package, from which its documents follow: results, golden cases, policies and kept traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.results import SKIPPED, Outcome, Results, read_results
from refmoe.errors import InputError
from refmoe.evidence.declared import Declared, read_declared
from refmoe.evidence.layout import CASES, POLICIES, RESULTS, trace_file
from refmoe.files.reading import exists
from refmoe.files.sentences import quoted
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.suite import Case, read_case
from refmoe.suite.fresh import fresh_case
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT

FROM_A_TRACE = (CONFORMANT, NOT_CONFORMANT)
"""The verdicts that are given on a trace alone, so that the trace must be kept."""
WITHOUT_A_TRACE = (SKIPPED, CRASHED, TIMED_OUT, BROKEN)
"""The verdicts on an engine that gave no trace."""


@dataclass(frozen=True)
class Given:
    """The inputs of a package."""

    folder: Path
    results: Results
    declared: Declared
    stored: Mapping[str, Case]
    """The golden cases in the package, by name, in the order of the results."""
    cases: Mapping[str, Case]
    """The cases that were run: the same, or with a seed the fresh cases that follow from them."""
    policies: Mapping[str, Policy]
    """By the names that the results have for them."""

    def trace(self, outcome: Outcome) -> Path | None:
        """The kept trace of an outcome, None where there is none."""
        path = self.folder / trace_file(outcome.case, outcome.dtype)
        return path if exists(path) else None

    @property
    def dtypes(self) -> dict[str, str]:
        """Per dtype the name of the policy that judged it."""
        return {each.dtype: each.policy for each in self.results.outcomes}


def read_given(folder: Path) -> Given:
    """Read the inputs of a package. Raises InputError for the first that cannot be read."""
    results = read_results(folder / RESULTS)
    for name in results.cases:
        if name in (".", "..", "") or name != Path(name).name:
            raise InputError(f"{folder / RESULTS}: 'cases' has {quoted(name)}, but the name of a case was expected")
    for each in results.outcomes:
        if each.case not in results.cases:
            raise InputError(f"{folder / RESULTS}: has an outcome of {quoted(each.case)}, which 'cases' lacks")
    stored = {name: read_case(folder / CASES / name) for name in results.cases}
    return Given(
        folder=folder,
        results=results,
        declared=read_declared(folder),
        stored=stored,
        cases={name: as_run(case, results.fresh) for name, case in stored.items()},
        policies={name: policy_of(folder, name) for name in {each.policy: None for each in results.outcomes}},
    )


def as_run(case: Case, fresh: int | None) -> Case:
    """The case that a run had.   fresh: the seed of fresh cases; None: the case as it is"""
    return case if fresh is None else fresh_case(case, fresh)


def policy_of(folder: Path, name: str) -> Policy:
    """A policy by the name that results have for it: of the user's file in the package, or one of refmoe's own."""
    base, plus, changes = name.partition("+")
    path = folder / POLICIES / f"{base}.toml"
    if base != Path(base).name:
        raise InputError(f"{folder / RESULTS}: {quoted(base)} was found, but the name of a policy was expected")
    found = named_policy(f"{path}{plus}{changes}" if exists(path) else name)
    if found.name != name:
        raise InputError(f"{path}: has the policy '{found.name}', but '{name}' was expected")
    return found
