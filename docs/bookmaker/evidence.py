# SPDX-License-Identifier: Apache-2.0
"""The evidence of each clause and each step: tests, known bugs, cases, engines, certificates."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from refmoe.api.auditing import Audited, audit_suite
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.engines.known import KnownFailure, read_known, sort_failures
from refmoe.engines.results import Outcome, Results, read_results
from refmoe.spec.taps import step_of
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import Case, find_cases, read_case, read_manifest
from refmoe.suite.audit import Coverage
from refmoe.suite.matrix.file import MATRIX_FILE, Matrix, read_matrix
from refmoe.suite.matrix.outcomes import POLICIES
from refmoe.verifier.findings import CONFORMANT


@dataclass(frozen=True)
class Evidence:
    """All that is known about the clauses."""

    root: Path
    """The repository."""
    audited: Audited
    matrix: Matrix
    cases: tuple[Case, ...]
    engines: tuple[Results, ...]
    known: tuple[KnownFailure, ...]

    @cached_property
    def clauses(self) -> Mapping[str, Coverage]:
        """Per clause its proof, in reading order."""
        return {row.clause: row for row in self.audited.found.rows}

    def bugs_of(self, clauses: Mapping[str, object]) -> list[Mutant]:
        """The known bugs that break some of these clauses."""
        return [each for each in MUTANTS.values() if clauses.keys() & {*each.breaks}]

    @cached_property
    def families(self) -> Mapping[str, str]:
        """Per case its family."""
        return {case.name: case.family for case in self.cases}

    @cached_property
    def kills(self) -> Mapping[str, dict[str, dict[str, str]]]:
        """Per known bug and policy the cases that kill it, each with the first wrong step, the manner and the rung."""
        return {
            mutant: {policy: dict(self.matrix.killers(mutant, policy)) for policy in POLICIES} for mutant in MUTANTS
        }

    @cached_property
    def failures(self) -> list[tuple[Results, Outcome, KnownFailure]]:
        """The known failures of all engines."""
        return [
            (results, outcome, known)
            for results in self.engines
            for outcome, known in sort_failures(results, self.known).known
        ]

    def killing(self, mutant: str) -> set[str]:
        """The cases that kill a known bug at any dtype."""
        return {case for at in self.kills[mutant].values() for case in at}

    def killers(self, mutants: list[Mutant]) -> dict[str, list[str]]:
        """Per case those of these bugs that it kills at any dtype, the case with the most first."""
        found: dict[str, list[str]] = {}
        for each in mutants:
            for case in self.killing(each.id):
                found.setdefault(case, []).append(each.id)
        return dict(sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0])))

    def certificates(self) -> Iterator[tuple[Case, dict[str, object]]]:
        """Each case that has a certificate, with it."""
        for case in self.cases:
            certificate = read_manifest(case.folder)["certificate"]
            if certificate is not None:
                yield case, certificate


def evidence(root: Path) -> Evidence:
    """Read all of it.   root: the repository"""
    golden = root / "golden"
    folder = root / "bench" / "results" / "conform"
    return Evidence(
        root=root,
        audited=audit_suite(golden, root / "tests"),
        matrix=read_matrix(golden / MATRIX_FILE),
        cases=tuple(map(read_case, find_cases(golden, ("small", "production")))),
        engines=tuple(map(read_results, sorted(folder.glob("*.json")))),
        known=tuple(read_known(folder / "known.toml")),
    )


def title(results: Results) -> str:
    """An engine with its version and the options that it ran with."""
    options = " ".join(f"{name}={value}" for name, value in results.engine.options.items())
    return f"{results.engine.name} {results.engine.version} {options}".strip()


def worst(results: Results, taps: tuple[str, ...]) -> dict[str, float]:
    """Per dtype the largest error of an engine at some taps, in units of what its policy allows, where it conforms."""
    found: dict[str, float] = {}
    for each in results.outcomes:
        if each.verdict == CONFORMANT:
            errors = [each.worst_errors[tap] for tap in taps if tap in each.worst_errors]
            if errors:
                found[each.dtype] = max(found.get(each.dtype, 0.0), *errors)
    return found


def failures_at(every: Evidence, taps: tuple[str, ...]) -> Iterator[tuple[Results, Outcome, KnownFailure]]:
    """The known failures whose first wrong step is one of these taps."""
    for results, outcome, known in every.failures:
        if outcome.first_wrong is not None and step_of(outcome.first_wrong[1]) in taps:
            yield results, outcome, known


# ---- the source of a known bug, and of a test


def difference(mutant: Mutant) -> tuple[str, str]:
    """The language and the text of what a known bug changes.

    A bug in a step is a difference from the right step with cut points. Any other one is a function of its own.
    """
    texts = []
    for name, function in mutant.steps.items():
        right = getattr(CUT_STEPS, name)
        old, new = without_docstring(right), without_docstring(function)
        lines = [*difflib.unified_diff(old, new, lineterm="", n=1)][2:]
        texts.append("\n".join(lines))
    if texts and all(texts):
        return "diff", "\n".join(texts)
    return "python", "\n".join(without_docstring(mutant.function))


def without_docstring(function: object) -> list[str]:
    """The lines of a function, without its decorators and its docstring."""
    source = textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    if not isinstance(node, ast.FunctionDef):
        return lines
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        del lines[first.lineno - 1 : first.end_lineno]
    return lines[node.lineno - 1 :]


def source_of_test(root: Path, test: str) -> tuple[int, str]:
    """The first line and the source of a test, ``tests/spec/test_model.py::test_name``.

    Of a class, or of a file that speaks for all its tests, the docstring.
    """
    path, _, name = test.partition("::")
    tree, lines = parsed(root / path)
    if not name:
        first = tree.body[0]
        return first.lineno, "\n".join(lines[first.lineno - 1 : first.end_lineno])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            end = node.end_lineno if isinstance(node, ast.FunctionDef) else node.body[0].end_lineno
            return start, "\n".join(lines[start - 1 : end])
    raise ValueError(f"{test}: no such test")


@lru_cache(maxsize=4)
def parsed(path: Path) -> tuple[ast.Module, list[str]]:
    """The syntax tree and the lines of a file."""
    text = path.read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines()
