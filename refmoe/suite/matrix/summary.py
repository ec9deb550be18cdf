# SPDX-License-Identifier: Apache-2.0
"""The matrix in short: the mutants that are killed, those that live, and the cases that kill them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite.matrix.file import Matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, runnable
from refmoe.suite.matrix.surroundings import outside

LIVES = "mutant {name} lives in {policies}: no case kills it"
REFUTED = "mutant {name} is killed in {policies}, where it is said that nothing can show it"


@dataclass(frozen=True)
class Summary:
    """The counts of a matrix, for the catalogue as it is now."""

    mutants: int
    """The number of mutants that are variations of a forward pass."""
    killed: dict[str, int]
    """Per policy, the number of these that at least one case kills."""
    alive: dict[str, tuple[str, ...]]
    """Per policy, the mutants that no case kills without a known reason."""
    unseen: dict[str, dict[str, str]]
    """Per policy, the mutants that no case can kill, and the reason."""
    refuted: dict[str, tuple[str, ...]]
    """Per policy, the mutants that a case kills in spite of such a reason."""
    outside: int
    """The number of mutants that are held against vectors or laws instead."""
    outside_alive: tuple[str, ...]
    """The mutants among them that get every vector right."""
    false_alarms: tuple[str, ...]
    """Where the specification itself fails: a case and a policy, or a file of vectors."""
    unique: dict[str, int]
    """Per case how many pairs of mutant and policy it alone kills, the most first; not the cases without any."""
    redundant: tuple[str, ...]
    """Cases that kill nothing which no other case kills under the same policy."""

    equivalent: dict[str, str]
    """Mutants of any kind that no legal run can show, and the argument."""

    @property
    def dead(self) -> frozenset[str]:
        """The mutants of any kind that are killed wherever anything can show them."""
        living = {*self.equivalent, *self.outside_alive}.union(*self.alive.values())
        return frozenset(name for name in MUTANTS if name not in living)

    @property
    def problems(self) -> list[str]:
        """The faults of the proof, a sentence each."""
        found = [f"the specification itself fails: {place}" for place in self.false_alarms]
        for where, told in ((self.alive, LIVES), (self.refuted, REFUTED)):
            for name in MUTANTS:
                policies = [policy for policy in where if name in where[policy]]
                if policies:
                    found.append(told.format(name=name, policies=", ".join(policies)))
        return found + [f"mutant {name} lives: it gets every vector right" for name in self.outside_alive]


def summarise(matrix: Matrix, cases: Sequence[str], policies: Sequence[str] = POLICIES) -> Summary:
    """cases: the names of all present cases. Mutants and cases that are gone do not count.

    policies: those under which each mutant has to be killed
    """
    names, existing = runnable(), set(cases)
    killers = {(name, policy): existing & matrix.killers(name, policy).keys() for name in names for policy in policies}
    surviving = {policy: [name for name in names if not killers[name, policy]] for policy in policies}
    alone = Counter(next(iter(by)) for by in killers.values() if len(by) == 1)
    alarms = [
        f"case {case} in {policy}"
        for policy in policies
        for case in matrix.killers(SPECIFICATION, policy)
        if case in existing
    ]
    return Summary(
        mutants=len(names),
        killed={policy: len(names) - len(surviving[policy]) for policy in policies},
        alive={policy: tuple(n for n in surviving[policy] if policy not in MUTANTS[n].unseen) for policy in policies},
        unseen={
            policy: {n: MUTANTS[n].unseen[policy] for n in surviving[policy] if policy in MUTANTS[n].unseen}
            for policy in policies
        },
        refuted={
            policy: tuple(n for n in names if policy in MUTANTS[n].unseen and killers[n, policy]) for policy in policies
        },
        outside=len(outside()),
        outside_alive=tuple(name for name in outside() if not matrix.outside.get(name)),
        false_alarms=(*alarms, *matrix.outside.get(SPECIFICATION, {})),
        unique=dict(sorted(alone.items(), key=lambda entry: (-entry[1], entry[0]))),
        redundant=tuple(case for case in cases if not alone[case]),
        equivalent={each.id: each.equivalent for each in MUTANTS.values() if each.equivalent},
    )
