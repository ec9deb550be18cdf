"""Which known bug, or which two at once, explain a failed verification.

A mutant is a specification too. It explains a trace if the steps that failed are right under it, all of them, and none
that was right is wrong. That is a proof within the mutant's own enclosures; the matched filter beside it says how much
of the error is the mutant's (1: all of it, in size and direction), and orders siblings by what they leave over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.bugs.mutant import Mutant
from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verify.diagnosis.evidence import (
    Chooser,
    Evidence,
    Key,
    UnderBug,
    Variation,
    changes_choice,
    judge_again,
    judge_first,
    middle,
    newly_failing,
    still_failing,
    subject_of,
    weighted,
)
from refmoe.verify.findings import KNOWN_BUG, TWO_BUGS, Explanation
from refmoe.verify.passes import Pass

WORSE = 1.5
"""A mutant that leaves more of the error than this has nothing to do with it: an independent one of the same size, as
of other roundings, leaves the root of two."""
EXPLAINED, UNRELATED = 0.5, 0.9
"""What an explanation leaves at most to end the search among mutants that leave more than this."""
PAIRS = 6
"""Pairs of mutants, those that leave least, that are held against the trace."""
PAIR_LEAVES = 0.5
"""A pair that leaves more of the error than this is none."""


@dataclass(frozen=True)
class Suspect:
    """A mutant with what it does to the failed steps."""

    mutant: Mutant
    wrong: dict[Key, Any]
    delta: Any
    """Its effect in units of spacing [n], or None where it changes shapes."""
    coefficient: float
    residual: float


def suspects(evidence: Evidence, mutants: Iterable[Mutant], progress: Callable[[], None]) -> list[Suspect]:
    """The mutants that touch a step that failed or is missing; first those that leave the least of the error."""
    steps, found = {check.step for check in evidence.failed}, []
    shown = {check.step for check in evidence.report.checks}
    for each in mutants:
        # what a step that the trace lacks gets wrong, shows further on
        if each.in_one_pass and (steps & set(each.touches) or not shown >= set(each.touches)):
            found.append(suspect(evidence, each))
        progress()
    return sorted(found, key=lambda each: each.residual)


def suspect(evidence: Evidence, mutant: Mutant) -> Suspect:
    """What a mutant makes of the trace's own inputs."""
    subject = subject_of(evidence, mutant)
    wrong = middle(evidence, subject, mutant.policy(evidence.policy), set(evidence.expected))
    delta = weighted(evidence, wrong)
    return Suspect(mutant, wrong, delta, *matched_filter(evidence.error, delta))


def matched_filter(error: Any, delta: Any) -> tuple[float, float]:
    """How much of the error the mutant is, and what it leaves, as a part of the error. error, delta: [n]"""
    if delta is None or delta.shape != error.shape:
        return math.nan, math.inf
    reach, size = float(delta @ delta), float(error @ error)
    if reach == 0 or size == 0:
        return 0.0, math.inf
    return float(error @ delta) / reach, math.sqrt(float((error - delta) @ (error - delta)) / size)


def explanations(evidence: Evidence, suspected: list[Suspect], progress: Callable[[], None]) -> list[Explanation]:
    """The suspects held against the trace. Once one explains it, those whose effect is no part of the error are not."""
    found: list[Explanation] = []
    for each in suspected:
        known = any(other.explains and other.residual < EXPLAINED for other in found)
        explanation = None if known and each.residual > UNRELATED else explain(evidence, each)
        if explanation is not None:
            found.append(explanation)
        progress()
    return found


def explain(evidence: Evidence, found: Suspect) -> Explanation | None:
    """Hold the trace against a mutant as if it were the specification; None where its effect is another."""
    mutant = found.mutant
    if WORSE < found.residual < math.inf:
        return None
    still, newly = _held_against(evidence, mutant, found.wrong)
    return Explanation(
        mutant.id, KNOWN_BUG, mutant.about, mutant.fix, mutant.sources, not still and not newly, still, newly,
        found.coefficient, found.residual, len(mutant.touches),
    )  # fmt: skip


def _held_against(evidence: Evidence, variation: Variation, wrong: dict[Key, Any]) -> tuple[int, int]:
    """How many checks fail still, and how many newly; of a variation that explains nothing, at least so many."""
    judge: type[Pass] = Chooser if changes_choice(variation) else UnderBug
    subject, policy = subject_of(evidence, variation), variation.policy(evidence.policy)
    for judging in (judge_first, judge_again):
        verdicts = judging(evidence, subject, policy, judge)
        still, newly = still_failing(evidence, verdicts, wrong), newly_failing(evidence, verdicts)
        if still or newly:
            break
    return still, newly


def unrelated(found: Explanation) -> bool:
    """Whether it allows the error but does not predict it."""
    return UNRELATED < found.residual < math.inf


def rank(found: Explanation) -> tuple[Any, ...]:
    """The best first: what explains, then what leaves the least."""
    left = found.residual if math.isfinite(found.residual) else math.inf
    return (
        not found.explains,
        unrelated(found),
        round(left, 2),
        found.still_failing + found.newly_failing,
        found.touches,
        found.name,
    )


@dataclass(frozen=True)
class Pair:
    """Two mutants at once."""

    one: Mutant
    two: Mutant

    @property
    def touches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.one.touches, *self.two.touches)))

    @property
    def possible(self) -> bool:
        """Whether they replace different steps."""
        return not self.one.steps.keys() & self.two.steps.keys()

    def model(self, config: Config, parameters: Parameters) -> Model:
        first = self.one.model(config, parameters)
        second = self.two.model(first.config, first.parameters)
        replaced = {**self.one.steps, **self.two.steps}
        return Model(second.config, second.parameters, replace(CUT_STEPS, **replaced))

    def policy(self, policy: Policy) -> Policy:
        return self.two.policy(self.one.policy(policy))

    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        return self.two.runs(self.one.runs(runs))


def pairs(evidence: Evidence, found: list[Suspect]) -> list[Explanation]:
    """The pairs of mutants that explain the trace, where the sum of two effects is the error."""
    able = [each for each in found if each.delta is not None and each.delta.shape == evidence.error.shape]
    able = [each for each in able if np.any(each.delta)]
    size = float(evidence.error @ evidence.error)
    if len(able) < 2 or not size:
        return []
    effects = np.stack([each.delta for each in able])
    gram, reach = effects @ effects.T, effects @ evidence.error
    left: list[tuple[float, float, Pair]] = []
    for i, j in combinations(range(len(able)), 2):
        both, along = gram[i, i] + gram[j, j] + 2 * gram[i, j], reach[i] + reach[j]
        residual = math.sqrt(max(float(size + both - 2 * along), 0.0) / size)  # |e - d_i - d_j| / |e|
        pair = Pair(able[i].mutant, able[j].mutant)
        if pair.possible and residual < PAIR_LEAVES * min(1.0, able[i].residual, able[j].residual):
            left.append((residual, float(along / both), pair))
    explained = []
    for residual, coefficient, pair in sorted(left, key=lambda each: each[0])[:PAIRS]:
        still, newly = _held_against(evidence, pair, {})
        if still or newly:
            continue
        explained.append(
            Explanation(
                f"{pair.one.id} + {pair.two.id}", TWO_BUGS, f"{pair.one.about} And: {pair.two.about}",
                "; ".join(filter(None, (pair.one.fix, pair.two.fix))), (*pair.one.sources, *pair.two.sources), True,
                0, 0, coefficient, residual, len(pair.touches),
            )
        )  # fmt: skip
    return explained
