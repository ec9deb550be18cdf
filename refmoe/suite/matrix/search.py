# SPDX-License-Identifier: Apache-2.0
"""The matrix of a family in which one case per mutant is enough: each mutant runs until a case kills it.

The first family has every mutant on every case, to show what each case is for. Of another family it is asked only
whether it kills every mutant by itself, at a small part of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.checkpoints.size import active_parameters
from refmoe.suite import Case
from refmoe.suite.matrix.changes import by_place, to_work
from refmoe.suite.matrix.compute import compute
from refmoe.suite.matrix.dependencies import CASES, CATALOGUE
from refmoe.suite.matrix.file import Cells, Matrix, to_matrix
from refmoe.suite.matrix.outcomes import SPECIFICATION, Outcome, runnable

SEARCHED = ("float32",)
"""The policies under which each mutant has to be killed by such a family. The specification runs under these alone."""

Pair = tuple[str, str]
"""A mutant and a policy."""


@dataclass(frozen=True)
class Search:
    """The pairs of mutant and policy for which a case that kills is sought."""

    pairs: tuple[Pair, ...]
    cases: Mapping[str, Case]
    """All cases of the family, by name."""
    before: Matrix | None = None
    """The recorded matrix, whose killers are tried first."""

    def order(self, pair: Pair) -> list[str]:
        """The cases, the most likely killer first."""
        mutant, policy = pair
        known: Collection[str] = self.before.killers(mutant, policy) if self.before is not None else ()

        def key(name: str) -> Any:
            case, each = self.cases[name], MUTANTS[mutant]
            lacking = len({*each.needs} - {*case.conditions})
            return name not in known, mutant not in case.bugs, lacking, products(case), name

        return sorted(self.cases, key=key)


def products(case: Case) -> int:
    """The number of products in a run of a case."""
    return active_parameters(case.config) * sum(len(run.tokens) for run in case.runs())


def pairs_of(mutants: Sequence[str], policies: Sequence[str] = SEARCHED) -> tuple[Pair, ...]:
    """The pairs that a case can kill: not those of which it is said that nothing can show them."""
    return tuple((name, policy) for name in mutants for policy in policies if policy not in MUTANTS[name].unseen)


def search(asked: Search, executor: str | None = None, progress: Callable[[], None] | None = None) -> list[Outcome]:
    """The outcomes of each pair on the cases in its order, up to the first that kills it.

    progress: called after each case and policy.   The specification itself runs on every case.
    """
    orders = {pair: asked.order(pair) for pair in asked.pairs}
    left, found, step = [*asked.pairs], [], 0
    while left and step < len(asked.cases):
        wanted = by_place((policy, orders[mutant, policy][step], mutant) for mutant, policy in left)
        outcomes = compute(to_work(wanted, asked.cases), executor, progress)
        killed = {(each.mutant, each.policy) for each in outcomes if each.killed}
        left, step = [pair for pair in left if pair not in killed], step + 1
        found += outcomes
    tried = {(each.policy, each.case) for each in found if each.mutant == SPECIFICATION}
    alone = {p: {name: () for name in asked.cases if (p, name) not in tried} for p in SEARCHED}
    return found + compute(to_work(alone, asked.cases), executor, progress)


def affected_pairs(parts: Collection[str], matrix: Matrix) -> tuple[Pair, ...]:
    """The pairs whose proof the changes can affect.

    parts: the names of what has changed, as `refmoe.suite.matrix.dependencies` gives them
    """
    everything = "core" in parts
    return tuple(
        (name, policy)
        for name, policy in pairs_of(runnable())
        if everything
        or CATALOGUE + MUTANTS[name].kind in parts
        or not (killers := matrix.killers(name, policy))
        or any(CASES + case in parts for case in killers)
    )


def searched(before: Matrix, asked: Search, outcomes: Sequence[Outcome], sources: dict[str, str]) -> Matrix:
    """The recorded matrix, with these outcomes in the place of all that it had about the pairs of the search.

    Nothing is kept of mutants, or cases, that are gone.
    """
    new = to_matrix(outcomes, {}, sources)
    again, known = {*asked.pairs}, {*runnable()}

    def keep(recorded: Cells, found: Cells) -> None:
        for mutant, policies in recorded.items():
            for policy, cases in policies.items():
                kept = {case: text for case, text in cases.items() if case in asked.cases}
                if mutant in known and (mutant, policy) not in again and kept:
                    found.setdefault(mutant, {})[policy] = kept

    keep(before.kills, new.kills)
    keep(before.lives, new.lives)
    return new
