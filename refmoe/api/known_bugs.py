# SPDX-License-Identifier: Apache-2.0
"""The catalogue of known bugs, and the matrix that proves the suite can fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from refmoe.api.goldens import chosen
from refmoe.api.progress import Bars, silent
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised.catalogue import QUANTISED
from refmoe.errors import InputError
from refmoe.suite import (
    MANIFEST_FILE,
    PRODUCTION,
    SMALL,
    Case,
    file_digest,
    find_cases,
    read_case,
    read_folder_manifest,
    write_manifest,
)
from refmoe.suite.digests import renew_digests
from refmoe.suite.golden_folder import golden_folder
from refmoe.suite.matrix.changes import (
    Loss,
    by_place,
    gains,
    losses,
    outside_changed,
    plan,
    revised_matrix,
    sample,
    to_work,
)
from refmoe.suite.matrix.compute import compute
from refmoe.suite.matrix.dependencies import changed, digests
from refmoe.suite.matrix.file import MATRIX_FILE, MATRIX_FILES, Matrix, read_matrix, to_matrix, write_matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, Outcome, Work, runnable, whole
from refmoe.suite.matrix.power import compute_power, write_power
from refmoe.suite.matrix.power import plan as plan_power
from refmoe.suite.matrix.search import SEARCHED, Search, affected_pairs, pairs_of, search, searched
from refmoe.suite.matrix.summary import Summary, summarise
from refmoe.suite.matrix.surroundings import judge_outside
from refmoe.suite.power import TAP_SETS, table

Names = Sequence[str]
DTYPES = POLICIES
"""The dtypes at which mutants run."""


def mutants() -> list[Mutant]:
    """The known bugs that golden cases show, in the order of the catalogue."""
    return [*MUTANTS.values()]


def every_bug() -> list[Mutant]:
    """All known bugs, with those that only quantised matrices show."""
    return [*mutants(), *QUANTISED.values()]


def mutant(name: str) -> Mutant:
    """The known bug of this id that golden cases show. Raises InputError, with similar ids, when there is none."""
    return _named(name, mutants())


def known_bug(name: str) -> Mutant:
    """The known bug of this id. Raises InputError, with similar ids, when there is none."""
    return _named(name, every_bug())


def _named(name: str, bugs: Sequence[Mutant]) -> Mutant:
    known = {each.id: each for each in bugs}
    if name not in known:
        similar = get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"`refmoe mutants list` has all {len(known)}"
        raise InputError(f"mutant '{name}' is unknown; {hint}")
    return known[name]


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
    production: Recorded | None = None
    """The matrix of the family of cases for production kernels; None where the folder has no such case."""

    @property
    def problems(self) -> list[str]:
        """The faults of the proof of either family, a sentence each."""
        more = [] if self.production is None else self.production.summary.problems
        return [*self.summary.problems, *(f"{PRODUCTION} cases: {each}" for each in more)]


def recorded_matrix(golden: Path | None = None) -> Recorded:
    """The matrix of a golden folder. Raises InputError when it is missing."""
    golden = golden_folder(golden)
    matrix = read_matrix(golden / MATRIX_FILE)
    return replace(_in_short(matrix, golden), production=recorded_production(golden, matrix))


def production_cases(golden: Path) -> dict[str, Case]:
    """The cases for production kernels in a golden folder, by name."""
    return {case.name: case for case in map(read_case, find_cases(golden, (PRODUCTION,))) if case.family == PRODUCTION}


def recorded_production(golden: Path, small: Matrix) -> Recorded | None:
    """The recorded matrix of the cases for production kernels, or None where there is no such case.

    small: the matrix of the first family, which has the mutants outside of the forward pass
    """
    cases = production_cases(golden)
    if not cases:
        return None
    return _of_production(read_matrix(golden / MATRIX_FILES[PRODUCTION]), small, cases, golden)


def _of_production(matrix: Matrix, small: Matrix, cases: Mapping[str, Case], golden: Path) -> Recorded:
    summary = summarise(replace(matrix, outside=small.outside), [*cases], SEARCHED)
    return Recorded(matrix, summary, sorted(changed(matrix.sources, golden, PRODUCTION)))


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
    """Empty: those of the first family."""
    mutants: Names = ()
    dtypes: Names = ()

    @property
    def given(self) -> bool:
        """Whether cases, mutants or dtypes are named."""
        return bool(self.cases or self.mutants or self.dtypes)


def judge_mutants(
    part: Part, golden: Path | None = None, *, executor: str | None = None, bars: Bars = silent
) -> list[Outcome]:
    """Run mutants on cases at dtypes, and judge each as if it were a foreign engine. Raises InputError."""
    golden = golden_folder(golden)
    for name in part.mutants:
        mutant(name)
    work = whole(chosen(part.cases, golden, (SMALL,)), part.mutants or runnable(), part.dtypes or DTYPES)
    with bars("matrix", len(work)) as advance:
        return compute(work, executor, advance)


def specification_fails(outcomes: Sequence[Outcome]) -> bool:
    """Whether the specification itself, which runs beside every mutant, is found wrong."""
    return any(each.killed for each in outcomes if each.mutant == SPECIFICATION)


def judge_all(
    golden: Path | None = None, *, write: bool = False, executor: str | None = None, bars: Bars = silent
) -> Recorded:
    """Compute the whole matrix.   write: whether it becomes that of the golden folder"""
    golden = golden_folder(golden)
    seen = judge_outside(golden)
    matrix = to_matrix(judge_mutants(Part(), golden, executor=executor, bars=bars), seen, digests(golden))
    if write:
        _write(matrix, golden, SMALL)
    cases = production_cases(golden)
    if not cases:
        return _in_short(matrix, golden)
    asked = Search(pairs_of(runnable()), cases, _known(golden))
    with bars("production cases", 0) as advance:
        outcomes = search(asked, executor, advance)
    found = to_matrix(outcomes, {}, digests(golden, PRODUCTION))
    if write:
        _write(found, golden, PRODUCTION)
    return replace(_in_short(matrix, golden), production=_of_production(found, matrix, cases, golden))


def _known(golden: Path) -> Matrix | None:
    """The recorded matrix of the cases for production kernels, whose killers are tried first, if it can be read."""
    try:
        return read_matrix(golden / MATRIX_FILES[PRODUCTION])
    except InputError:
        return None


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
    executor: str | None = None,
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
        write_power(out, compute_power(work, table(), executor, advance))


@dataclass(frozen=True)
class Repeated:
    """A part of the recorded matrix, computed again."""

    parts: list[str]
    """The parts that have changed since the matrix was computed."""
    work: list[Work]
    """The mutants that were run, by case and policy."""
    outcomes: list[Outcome]
    lost: list[Loss]
    """The mutants that were killed and are not any more."""
    gained: list[Outcome]
    problems: list[str]


def repeat(
    mode: str, golden: Path | None = None, *, write: bool = False, executor: str | None = None, bars: Bars = silent
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
        outcomes = compute(work, executor, advance)
    seen = judge_outside(golden) if outside_changed(parts) else matrix.outside
    lost = losses(matrix, outcomes, seen)
    revised = revised_matrix(matrix, outcomes, seen, digests(golden) if mode == "changed" else matrix.sources)
    if write and mode == "changed" and parts:
        _write(revised, golden, SMALL)
    problems = [*map(str, lost), *summarise(revised, [*cases]).problems]
    return Repeated(
        parts=sorted(parts), work=work, outcomes=outcomes, lost=lost, gained=gains(matrix, outcomes), problems=problems
    )


def repeat_production(
    mode: str, golden: Path | None = None, *, write: bool = False, executor: str | None = None, bars: Bars = silent
) -> Repeated | None:
    """Compute a part of the matrix of the cases for production kernels again; None where there is no such case.

    mode, write: as for `repeat`. With ``changed``, a matrix that is not there is computed as a whole.
    """
    golden = golden_folder(golden)
    cases = production_cases(golden)
    if not cases:
        return None
    if mode == "changed" and not (golden / MATRIX_FILES[PRODUCTION]).exists():
        matrix = Matrix({}, {}, {}, {})
    else:
        matrix = read_matrix(golden / MATRIX_FILES[PRODUCTION])
    parts = changed(matrix.sources, golden, PRODUCTION)
    if mode == "changed":
        asked = Search(affected_pairs(parts, matrix) if parts else (), cases, matrix)
        with bars("production cases", 0) as advance:
            outcomes = search(asked, executor, advance) if parts else []
        revised = searched(matrix, asked, outcomes, digests(golden, PRODUCTION))
    else:
        work = sample(matrix, cases)
        with bars("production cases", len(work)) as advance:
            outcomes = compute(work, executor, advance)
        revised = revised_matrix(matrix, outcomes, {}, matrix.sources)
    lost = losses(matrix, outcomes, {}) if mode == "sample" else []
    if write and mode == "changed" and parts:
        _write(revised, golden, PRODUCTION)
    small = read_matrix(golden / MATRIX_FILE)
    problems = summarise(replace(revised, outside=small.outside), [*cases], SEARCHED).problems
    return Repeated(
        parts=sorted(parts),
        work=to_work(by_place((each.policy, each.case, each.mutant) for each in outcomes), cases),
        outcomes=outcomes,
        lost=lost,
        gained=gains(matrix, outcomes),
        problems=[*map(str, lost), *problems],
    )


def _write(matrix: Matrix, golden: Path, family: str) -> None:
    """Write the matrix of a family, and enter it in the manifest and the list of digests, where the folder has them."""
    name = MATRIX_FILES[family]
    write_matrix(golden / name, matrix)
    if (golden / MANIFEST_FILE).exists():
        manifest = read_folder_manifest(golden)
        files = manifest["files"] | {name: file_digest(golden / name)}
        write_manifest(golden, manifest | {"files": dict(sorted(files.items()))})
    renew_digests(golden)
