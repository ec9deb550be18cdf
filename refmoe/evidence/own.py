# SPDX-License-Identifier: Apache-2.0
"""This refmoe and its suite: what documents are derived with, beside the inputs of a package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.evidence.declared import source_digest, suite_digest
from refmoe.files.reading import exists
from refmoe.suite.audit import Coverage, audit, named_in
from refmoe.suite.golden_folder import PACKAGE, case_folders
from refmoe.suite.manifest import file_digest
from refmoe.suite.matrix.dependencies import changed
from refmoe.suite.matrix.file import MATRIX_FILES, Matrix, read_matrix


@dataclass(frozen=True)
class Own:
    """This refmoe and a suite."""

    golden: Path
    """The folder of the suite."""
    cases: Mapping[str, Path]
    """The folder of each case, by name."""
    clauses: Sequence[Coverage]
    """In reading order, with the cases of the suite that name each, and without tests."""
    tests: Mapping[str, Any] | None
    """Per clause the tests that name it, and the digests of their files. None: an installed package has no tests."""
    matrices: Sequence[Matrix]
    stale: Sequence[str]
    """The parts of the code that have changed since the matrices were computed."""
    source: str
    suite: str
    """The digests of refmoe and of the suite, as a package declares them."""

    def killers(self, bug: str, dtype: str) -> set[str]:
        """The cases that kill a bug at a dtype, under its generic policy and with all taps."""
        return {case for matrix in self.matrices for case in matrix.killers(bug, dtype)}


def this_refmoe(golden: Path) -> Own:
    """This refmoe, and the suite in a folder. Raises InputError for a folder without cases, and for a broken matrix."""
    cases = case_folders(golden)
    found = {family: golden / name for family, name in MATRIX_FILES.items() if exists(golden / name)}
    matrices = {family: read_matrix(path) for family, path in found.items()}
    return Own(
        golden=golden,
        cases=cases,
        clauses=audit(golden, MUTANTS, frozenset(), None).rows,
        tests=clause_tests(),
        matrices=[*matrices.values()],
        stale=sorted({part for family, each in matrices.items() for part in changed(each.sources, golden, family)}),
        source=source_digest(),
        suite=suite_digest(golden),
    )


def clause_tests(package: Path = PACKAGE) -> dict[str, Any] | None:
    """Per clause the tests that name it, and the digests of their files; None where the package has no tests."""
    tests = package.parent / "tests"
    if not (tests / "test_audit.py").is_file():
        return None
    found = {clause: sorted(names) for clause, names in sorted(named_in(tests).items())}
    files = sorted({name.partition("::")[0] for names in found.values() for name in names})
    return {"clauses": found, "files": {name: file_digest(tests.parent / name) for name in files}}
