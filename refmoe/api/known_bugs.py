# SPDX-License-Identifier: Apache-2.0
"""The catalogue of known bugs, and the matrix that proves the suite can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from refmoe.api.goldens import chosen
from refmoe.api.progress import Bars, silent
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.errors import InputError
from refmoe.suite import (
    MANIFEST_FILE,
    Case,
    file_digest,
    find_cases,
    read_case,
    read_folder_manifest,
    write_manifest,
)
from refmoe.suite.golden_folder import golden_folder
from refmoe.suite.matrix.changes import Loss, gains, losses, outside_changed, plan, revised_matrix, sample
from refmoe.suite.matrix.dependencies import changed, digests
from refmoe.suite.matrix.file import MATRIX_FILE, Matrix, read_matrix, to_matrix, write_matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, Outcome, Work, compute_matrix, runnable, whole
from refmoe.suite.matrix.power import compute_power, write_power
from refmoe.suite.matrix.power import plan as plan_power
from refmoe.suite.matrix.summary import Summary, summarise
from refmoe.suite.matrix.surroundings import judge_outside
from refmoe.suite.power import TAP_SETS, table

Names = Sequence[str]
DTYPES = POLICIES
"""The dtypes at which mutants run."""


def mutants() -> list[Mutant]:
    """All known bugs, in the order of the catalogue."""
    return [*MUTANTS.values()]


def mutant(name: str) -> Mutant:
    """The known bug of this id. Raises InputError, with similar ids, when there is none."""
    if name not in MUTANTS:
        similar = get_close_matches(name, MUTANTS, n=3)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"`refmoe mutants list` has all {len(MUTANTS)}"
        raise InputError(f"mutant '{name}' is unknown; {hint}")
    return MUTANTS[name]


def mutant_facts(each: Mutant) -> dict[str, Any]:
    """A mutant as JSON."""
    return {
        "id": each.id, "class": each.kind, "about": each.about, "breaks": list(each.breaks),
        "needs": list(each.needs), "touches": list(each.touches), "severity": each.severity, "fix": each.fix,
        "equivalent": each.equivalent, "unseen": dict(each.unseen), "sources": list(each.sources),
    }  # fmt: skip


# ---- the recorded matrix


@dataclass(frozen=True)
class Recorded:
    """The matrix of a golden folder, in short."""

    matrix: Matrix
    summary: Summary
    stale: list[str]
    """The parts that have changed since it was computed."""


def recorded_matrix(golden: Path | None = None) -> Recorded:
    """The matrix of a golden folder. Raises InputError when it is missing."""
    golden = golden_folder(golden)
    return _in_short(read_matrix(golden / MATRIX_FILE), golden)


def matrix_page(recorded: Recorded, golden: Path | None = None) -> str:
    """The whole matrix as one page of HTML."""
    from refmoe.report.matrix_html import to_html

    return to_html(recorded.matrix, [read_case(folder) for folder in find_cases(golden_folder(golden))])


def _in_short(matrix: Matrix, golden: Path) -> Recorded:
    summary = summarise(matrix, [folder.name for folder in find_cases(golden)])
    return Recorded(matrix, summary, sorted(changed(matrix.sources, golden)))


# ---- computing it


@dataclass(frozen=True)
class Part:
    """A part of the matrix."""

    cases: Names = ()
    mutants: Names = ()
    dtypes: Names = ()

    @property
    def given(self) -> bool:
        """Whether cases, mutants or dtypes are named."""
        return bool(self.cases or self.mutants or self.dtypes)


def judge_mutants(
    part: Part, golden: Path | None = None, *, jobs: int | None = None, bars: Bars = silent
) -> list[Outcome]:
    """Run mutants on cases at dtypes, and judge each as if it were a foreign engine. Raises InputError."""
    golden = golden_folder(golden)
    for name in part.mutants:
        mutant(name)
    work = whole(chosen(part.cases, golden), part.mutants or runnable(), part.dtypes or DTYPES)
    with bars("matrix", len(work)) as advance:
        return compute_matrix(work, jobs, advance)


def specification_fails(outcomes: Sequence[Outcome]) -> bool:
    """Whether the specification itself, which runs beside every mutant, is found wrong."""
    return any(each.killed for each in outcomes if each.mutant == SPECIFICATION)


def judge_all(
    golden: Path | None = None, *, write: bool = False, jobs: int | None = None, bars: Bars = silent
) -> Recorded:
    """Compute the whole matrix.   write: whether it becomes that of the golden folder"""
    golden = golden_folder(golden)
    seen = judge_outside(golden)
    matrix = to_matrix(judge_mutants(Part(), golden, jobs=jobs, bars=bars), seen, digests(golden))
    if write:
        _write(matrix, golden)
    return _in_short(matrix, golden)


# ---- power


def measured_power() -> tuple[int, dict[str, dict[str, int]]]:
    """The number of known bugs that were tried, and per dtype and set of taps the number that is seen."""
    return len(table()), {
        dtype: {taps: sum(taps in at.get(dtype, {}).get("seen", ()) for at in table().values()) for taps in TAP_SETS}
        for dtype in DTYPES
    }


def measure_power(
    out: Path,
    names: Names = (),
    golden: Path | None = None,
    *,
    everything: bool = False,
    jobs: int | None = None,
    bars: Bars = silent,
) -> None:
    """Measure the power of each set of taps, and write the table.

    names: the mutants to measure; of others the table keeps what it has. Without names: those that it lacks
    everything: whether all mutants are measured
    Raises InputError for an unknown mutant, or a file that cannot be written.
    """
    golden = golden_folder(golden)
    for name in names:
        mutant(name)
    lacking = tuple(name for name in runnable() if everything or name not in table())
    matrix = read_matrix(golden / MATRIX_FILE) if (golden / MATRIX_FILE).exists() else None
    work = plan_power(names or lacking, [*map(read_case, find_cases(golden))], matrix)
    with bars("power", len(work)) as advance:
        write_power(out, compute_power(work, table(), jobs, advance))


@dataclass(frozen=True)
class Repeated:
    """A part of the recorded matrix, computed again."""

    parts: list[str]
    """The parts that have changed since the matrix was computed."""
    work: list[Work]
    outcomes: list[Outcome]
    lost: list[Loss]
    """The mutants that were killed and are not any more."""
    gained: list[Outcome]
    problems: list[str]


def repeat(
    mode: str, golden: Path | None = None, *, write: bool = False, jobs: int | None = None, bars: Bars = silent
) -> Repeated:
    """Compute a part of the recorded matrix again.

    mode: ``changed``, everything that changed files can affect, or ``sample``, each mutant on a case that killed it
    write: whether the matrix of the golden folder is made current; with ``changed`` only
    Raises InputError when there is no matrix.
    """
    golden = golden_folder(golden)
    matrix = read_matrix(golden / MATRIX_FILE)
    parts = changed(matrix.sources, golden)
    cases: dict[str, Case] = {case.name: case for case in map(read_case, find_cases(golden))}
    work = plan(matrix, parts, cases) if mode == "changed" else sample(matrix, cases)
    with bars("matrix", len(work)) as advance:
        outcomes = compute_matrix(work, jobs, advance)
    seen = judge_outside(golden) if outside_changed(parts) else matrix.outside
    lost = losses(matrix, outcomes, seen)
    revised = revised_matrix(matrix, outcomes, seen, digests(golden) if mode == "changed" else matrix.sources)
    if write and mode == "changed" and parts:
        _write(revised, golden)
    problems = [*map(str, lost), *summarise(revised, [*cases]).problems]
    return Repeated(
        parts=sorted(parts), work=work, outcomes=outcomes, lost=lost, gained=gains(matrix, outcomes), problems=problems
    )


def _write(matrix: Matrix, golden: Path) -> None:
    """Write the matrix, and enter it in the manifest of the golden folder, where there is one."""
    write_matrix(golden / MATRIX_FILE, matrix)
    if (golden / MANIFEST_FILE).exists():
        manifest = read_folder_manifest(golden)
        files = manifest["files"] | {MATRIX_FILE: file_digest(golden / MATRIX_FILE)}
        write_manifest(golden, manifest | {"files": dict(sorted(files.items()))})
