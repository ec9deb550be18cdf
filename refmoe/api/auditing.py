# SPDX-License-Identifier: Apache-2.0
"""The audit: every clause of the specification with its proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refmoe.api.known_bugs import recorded_matrix
from refmoe.bugs.catalogue import MUTANTS
from refmoe.errors import InputError
from refmoe.suite.audit import Audit, Coverage, audit
from refmoe.suite.golden_folder import PACKAGE, golden_folder
from refmoe.suite.matrix.summary import Summary


@dataclass(frozen=True)
class Audited:
    """Every clause with its proof, and the problems found."""

    found: Audit
    summary: Summary
    problems: list[str]
    stale: list[str]
    """The parts that have changed since the matrix was computed."""

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The number of clauses by the kind of their proof: of all, and of those of the forward pass."""
        rows = self.found.rows
        return {"all": counts(rows), "forward pass": counts([row for row in rows if row.forward_pass])}


def audit_suite(golden: Path | None = None, tests: Path | None = None) -> Audited:
    """The proof of every clause of the specification: tests that name it, and killed mutants that break it.

    tests: the folder of tests; None: that of the clone, since an installed package has none
    Raises InputError when the folder of tests, or the matrix, is missing.
    """
    golden = golden_folder(golden)
    tests = tests if tests is not None else PACKAGE.parent / "tests"
    if not tests.is_dir():
        raise InputError(f"{tests}: no such folder, but that of the tests was expected")
    recorded = recorded_matrix(golden)
    found = audit(golden, MUTANTS, recorded.summary.dead, tests)
    problems = [f"{row.clause} ({row.code}): {gap}" for row in found.gaps for gap in row.gaps]
    problems += [f"{stray} names it, but nobody states it" for stray in found.strays]
    more = [] if recorded.production is None else recorded.production.stale
    return Audited(found, recorded.summary, problems + recorded.problems, sorted({*recorded.stale, *more}))


def counts(rows: Sequence[Coverage]) -> dict[str, int]:
    """The number of clauses, by the kind of their proof."""
    return {
        "stated": len(rows),
        "with a killed mutant": sum(bool(row.killed) for row in rows),
        "named by a test": sum(bool(row.tests) for row in rows),
        "both": sum(bool(row.killed and row.tests) for row in rows),
        "neither": sum(bool(row.gaps) for row in rows),
    }
