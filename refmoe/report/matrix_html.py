# SPDX-License-Identifier: Apache-2.0
"""The matrix as one self-contained HTML page. It needs no network, and can be read without script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from refmoe.bugs.catalogue import MUTANTS
from refmoe.report.page import render
from refmoe.report.wording import count
from refmoe.suite import Case
from refmoe.suite.matrix.file import Matrix
from refmoe.suite.matrix.outcomes import IMPOSSIBLE, IMPROBABLE, INERT, POLICIES, ROUTING, runnable
from refmoe.suite.matrix.summary import Summary, summarise
from refmoe.suite.matrix.surroundings import outside
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT

STATES = {
    IMPOSSIBLE: ("■", "killed: a value that the policy makes impossible"),
    IMPROBABLE: ("◆", "killed: values that the policy makes improbable"),
    ROUTING: ("▲", "killed: an illegal choice of experts"),
    CONFORMANT: ("○", "changes something, all of it legal"),
    CANNOT_JUDGE: ("?", "changes something that cannot be judged"),
    INERT: ("·", "changes no bit"),
}
"""The outcomes of a mutant on a case under a policy, each with its mark and its words in the legend."""
CLASSES = {state: state.replace(" ", "-") for state in STATES}


@dataclass(frozen=True)
class Cell:
    """The outcomes of a mutant on a case."""

    marks: tuple[tuple[str, str], ...]
    """CSS class and text of each stretch of equal marks, a mark per policy; empty if it is inert under every policy."""
    words: str


@dataclass(frozen=True)
class Row:
    """The outcomes of a mutant on all cases."""

    mutant: str
    about: str
    lives: str
    """The policies under which it lives without a known reason."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Life:
    """A mutant that no case kills under some policies."""

    mutant: str
    policies: str
    reason: str


@dataclass(frozen=True)
class Weight:
    """The worth of a case, by the kills that it makes."""

    case: str
    why: str
    kills: int
    """The number of killed pairs of mutant and policy."""
    alone: int
    """The number of those pairs that no other case kills."""


def to_html(matrix: Matrix, cases: Sequence[Case]) -> str:
    """The page as text, to be written as UTF-8. Raises InputError when Jinja2 is missing."""
    names = [case.name for case in cases]
    summary = summarise(matrix, names)
    return render(
        "matrix.html.j2",
        ["verification.css", "matrix.css"],
        "matrix.js",
        "the HTML page of the matrix",
        summary=summary,
        policies=POLICIES,
        cases=names,
        classes={kind: [row(matrix, summary, name, names) for name in group] for kind, group in by_kind()},
        states=[(CLASSES[state], mark, words) for state, (mark, words) in STATES.items()],
        lives=lives(summary),
        weights=weights(matrix, summary, cases),
        outside=[(name, MUTANTS[name].about, matrix.outside.get(name, {})) for name in outside()],
        count=count,
    )


def by_kind() -> list[tuple[str, list[str]]]:
    """The mutants that a forward pass can show, class by class."""
    # the sort is stable, so within a class the order of the catalogue stays
    names = sorted(runnable(), key=lambda name: MUTANTS[name].kind)
    return [(kind, list(group)) for kind, group in groupby(names, key=lambda name: MUTANTS[name].kind)]


def row(matrix: Matrix, summary: Summary, mutant: str, cases: Sequence[str]) -> Row:
    """The outcomes of a mutant on these cases."""
    alive = ", ".join(policy for policy in POLICIES if mutant in summary.alive[policy])
    return Row(mutant, MUTANTS[mutant].about, alive, tuple(cell(matrix, mutant, case) for case in cases))


def cell(matrix: Matrix, mutant: str, case: str) -> Cell:
    """The outcomes of a mutant on a case, policy by policy."""
    states, said = [], []
    for policy in POLICIES:
        step, state, rung = outcome(matrix, mutant, case, policy)
        states.append(state)
        said.append(f"{step}, {state} ({rung})" if step else STATES[state][1])
    if {*states} == {INERT}:
        return Cell((), "")
    marks = tuple((CLASSES[state], STATES[state][0] * len([*same])) for state, same in groupby(states))
    together = groupby(zip(said, POLICIES, strict=True), key=lambda pair: pair[0])
    return Cell(marks, "; ".join(f"{', '.join(policy for _, policy in pairs)}: {words}" for words, pairs in together))


def outcome(matrix: Matrix, mutant: str, case: str, policy: str) -> tuple[str, str, str]:
    """The first wrong step, one of `STATES`, and the rung. Step and rung are empty if the mutant is not killed."""
    place = matrix.killers(mutant, policy).get(case)
    if place is not None:
        step, by, rung = place.split()
        return step, by, rung
    return "", matrix.lives.get(mutant, {}).get(policy, {}).get(case, INERT), ""


def lives(summary: Summary) -> list[Life]:
    """The mutants that live, under which policies and why; the ones without a reason first."""
    found: dict[tuple[str, str], list[str]] = {}
    for policy in POLICIES:
        for name in summary.alive[policy]:
            found.setdefault((name, ""), []).append(policy)
        for name, reason in summary.unseen[policy].items():
            found.setdefault((name, reason), []).append(policy)
    table = [Life(name, ", ".join(policies), reason) for (name, reason), policies in found.items()]
    return sorted(table, key=lambda life: bool(life.reason))


def weights(matrix: Matrix, summary: Summary, cases: Sequence[Case]) -> list[Weight]:
    """The cases, sorted by the number of kills that no other case makes, the largest first."""
    table = [
        Weight(
            case.name,
            " ".join(case.why.split()),
            sum(case.name in matrix.killers(name, policy) for name in runnable() for policy in POLICIES),
            summary.unique.get(case.name, 0),
        )
        for case in cases
    ]
    return sorted(table, key=lambda weight: (-weight.alone, -weight.kills))
