# SPDX-License-Identifier: Apache-2.0
"""The runs that a change makes necessary again, and what they say of the recorded matrix.

A changed file of the catalogue can change its own mutants, everywhere. A changed case can change every mutant, there.
A change of the core can change everything. A sample of the matrix, each mutant on a case that killed it, is cheap
enough to be run with the tests each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite import Case
from refmoe.suite.matrix.dependencies import CASES, CATALOGUE, VECTORS
from refmoe.suite.matrix.file import Matrix, to_matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, Outcome, Work, runnable
from refmoe.suite.matrix.surroundings import Outside, outside

RENEW = "refmoe mutants matrix --changed --golden golden"
"""The command that makes the recorded matrix current."""


def cost(case: Case) -> int:
    """The time of a run of a case, in no unit. The models are so small that only the number of layers counts."""
    return case.config.layers * len(case.runs())


def witnesses(killers: Mapping[str, Collection[str]], costs: Mapping[str, int]) -> dict[str, str]:
    """Per mutant one case that kills it, chosen so that few and cheap cases serve all mutants.

    Greedy: the next case is the cheapest per mutant that it adds. The specification itself runs on each case too.
    killers: per mutant the cases that kill it.   costs: of each case.
    """
    found: dict[str, str] = {}
    while left := {mutant: by for mutant, by in killers.items() if by and mutant not in found}:
        gains = {case: sum(case in by for by in left.values()) for by in left.values() for case in by}
        best = min(gains, key=lambda case: (costs[case] * (1 + gains[case]) / gains[case], -gains[case], case))
        found |= {mutant: best for mutant, by in left.items() if best in by}
    return found


def sample(matrix: Matrix, cases: Mapping[str, Case]) -> list[Work]:
    """A part of the matrix that is cheap: each mutant under each policy on one case that killed it.

    cases: all that there are now.
    """
    costs = {name: cost(case) for name, case in cases.items()}
    found = []
    for policy in POLICIES:
        killers = {name: cases.keys() & matrix.killers(name, policy).keys() for name in runnable()}
        found += [(policy, case, mutant) for mutant, case in witnesses(killers, costs).items()]
    return to_work(by_place(found), cases)


def by_place(runs: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, set[str]]]:
    """Per policy and case the mutants.   runs: policy, case and mutant of each"""
    found: dict[str, dict[str, set[str]]] = {}
    for policy, case, mutant in runs:
        found.setdefault(policy, {}).setdefault(case, set()).add(mutant)
    return found


def plan(matrix: Matrix, parts: Collection[str], cases: Mapping[str, Case]) -> list[Work]:
    """The runs whose outcomes changes can affect: all of the matrix where the core has changed.

    Where a file of the catalogue has changed, its mutants on every case; where a case has, every mutant there.
    parts: the names of what has changed, as `refmoe.suite.matrix.dependencies` gives them.   cases: all that there are.
    """
    wanted = {case: set(affected(parts, case)) for case in cases}
    return to_work({policy: {case: names for case, names in wanted.items() if names} for policy in POLICIES}, cases)


def affected(parts: Collection[str], case: str) -> Iterator[str]:
    """The mutants whose outcome on a case the changes can affect."""
    everything = "core" in parts or CASES + case in parts
    return (name for name in runnable() if everything or CATALOGUE + MUTANTS[name].kind in parts)


def to_work(wanted: Mapping[str, Mapping[str, Collection[str]]], cases: Mapping[str, Case]) -> list[Work]:
    """The work of running some mutants. wanted: per policy and case the mutants"""
    return [
        Work(cases[case].folder, policy, tuple(name for name in runnable() if name in wanted[policy][case]))
        for case in cases
        for policy in POLICIES
        if case in wanted.get(policy, {})
    ]


@dataclass(frozen=True)
class Loss:
    """A mutant that was killed somewhere, and is not any more."""

    mutant: str
    where: str
    """A case and a policy, or a file of vectors."""
    was: str
    now: str

    def __str__(self) -> str:
        return f"mutant {self.mutant} on {self.where}: was seen ({self.was}), but now {self.now}"


def revised_matrix(matrix: Matrix, outcomes: Sequence[Outcome], seen: Outside, sources: dict[str, str]) -> Matrix:
    """The matrix with these outcomes instead of the recorded ones.   seen: the failed vectors of every mutant"""
    again = {(each.mutant, each.policy, each.case) for each in outcomes}
    new = to_matrix(outcomes, seen, sources)
    for recorded, recomputed in ((matrix.kills, new.kills), (matrix.lives, new.lives)):
        for mutant, policies in recorded.items():
            for policy, found in policies.items():
                kept = {case: text for case, text in found.items() if (mutant, policy, case) not in again}
                if kept:
                    recomputed.setdefault(mutant, {}).setdefault(policy, {}).update(kept)
    return new


def losses(matrix: Matrix, outcomes: Sequence[Outcome], seen: Outside) -> list[Loss]:
    """The recorded kills that did not happen again."""
    found = [
        Loss(each.mutant, f"case {each.case} in {each.policy}", was, each.verdict)
        for each in outcomes
        if each.mutant != SPECIFICATION
        and not each.killed
        and (was := matrix.killers(each.mutant, each.policy).get(each.case))
    ]
    for mutant in outside():
        for place, names in matrix.outside.get(mutant, {}).items():
            missed = [name for name in names if name not in seen.get(mutant, {}).get(place, [])]
            if missed:
                found.append(Loss(mutant, place, ", ".join(missed), "right"))
    return found


def gains(matrix: Matrix, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The kills that are not recorded."""
    return [each for each in outcomes if each.killed and each.case not in matrix.killers(each.mutant, each.policy)]


def outside_changed(parts: Collection[str]) -> bool:
    """Whether the mutants of tokenizer, sampler and loss have to be judged again."""
    kinds = {CATALOGUE + MUTANTS[name].kind for name in outside()}
    return any(part == "surroundings" or part in kinds or part.startswith(VECTORS) for part in parts)
