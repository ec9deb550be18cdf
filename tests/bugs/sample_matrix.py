# SPDX-License-Identifier: Apache-2.0
"""A golden folder of one tiny case, and a matrix in which that case kills all that can be killed."""

from __future__ import annotations

from pathlib import Path

from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite.matrix.dependencies import digests
from refmoe.suite.matrix.file import Cells, Matrix
from refmoe.suite.matrix.outcomes import POLICIES, Outcome, runnable
from refmoe.suite.matrix.surroundings import outside
from refmoe.verifier.findings import LOCAL, NOT_CONFORMANT
from tests.bugs.judging import GOLDEN
from tests.golden_cases import write_case

PLACE = "attention.q impossible local"


def killed(mutant: str, case: str, policy: str = "float32") -> Outcome:
    """An outcome whose place is `PLACE`."""
    return Outcome(mutant, case, policy, NOT_CONFORMANT, step="attention.q", by="impossible", rung=LOCAL)


def golden_folder(folder: Path, *cases: str) -> Path:
    """A folder with tiny cases (``tiny`` where none is named) and the vectors of the repository."""
    for seed, name in enumerate(cases or ("tiny",), start=1):
        write_case(folder / name, seed)
    (folder / "vectors").symlink_to(GOLDEN / "vectors")
    return folder


def kills(case: str = "tiny") -> Cells:
    """Every mutant is killed by this case, but for what nothing can show."""
    return {
        name: {policy: {case: PLACE} for policy in POLICIES if policy not in MUTANTS[name].unseen}
        for name in runnable()
    }


def all_killed(golden: Path, case: str = "tiny") -> Matrix:
    """A matrix without any problem, of the sources that there are."""
    return Matrix(digests(golden), kills(case), {}, {name: {"vectors/some.json": ["a-vector"]} for name in outside()})
