# SPDX-License-Identifier: Apache-2.0
"""The known bugs, single or in pairs, that explain a failed verification.

A mutant is a specification too. It explains a trace if every failed step passes under it, and no passed step fails.
That is a proof within the mutant's own enclosures. The matched filter compares the error with the mutant's effect
(1: equal in size and direction). Mutants with similar effects are ordered by their residuals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.bugs.mutant import Mutant
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis.evidence import (
    Chooser,
    Evidence,
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
from refmoe.verifier.findings import KNOWN_BUG, TWO_BUGS, Explanation
from refmoe.verifier.passes import Key, Pass

WORSE = 1.5
"""A mutant with a larger residual is unrelated to the error. An independent effect of the same size, such as other
roundings, has a residual of sqrt(2)."""
EXPLAINED, UNRELATED = 0.5, 0.9
"""Once an explanation has a residual below the first, mutants with a residual above the second are not tried."""
PAIRS = 6
"""The number of pairs of mutants that are tried: those with the smallest residuals."""
PAIR_LEAVES = 0.5
"""The largest residual of a pair, over the smaller residual of its two mutants."""


@dataclass(frozen=True)
class Candidate:
    """A mutant with its effect on the failed steps."""

    mutant: Mutant
    wrong: dict[Key, Any]
    """Its results at the expected taps."""
    delta: Any
    """Its effect in units of spacing, [n]. None if it changes shapes."""
    coefficient: float
    residual: float


def candidates(evidence: Evidence, mutants: Iterable[Mutant], progress: Callable[[], None]) -> list[Candidate]:
    """The mutants that touch a failed step or one that the trace lacks, by rising residual."""
    steps, found = {check.step for check in evidence.failed}, []
    shown = {check.step for check in evidence.report.checks}
    for each in mutants:
        # an error in a step that the trace lacks shows in a later step
        if each.in_one_pass and (steps & set(each.touches) or not shown >= set(each.touches)):
            found.append(candidate(evidence, each))
        progress()
    return sorted(found, key=lambda each: each.residual)


def candidate(evidence: Evidence, mutant: Mutant) -> Candidate:
    """A mutant with its results from the trace's own inputs."""
    subject = subject_of(evidence, mutant)
    wrong = middle(evidence, subject, mutant.policy(evidence.policy), set(evidence.expected))
    delta = weighted(evidence, wrong)
    coefficient, residual = matched_filter(evidence.error, delta)
    return Candidate(mutant=mutant, wrong=wrong, delta=delta, coefficient=coefficient, residual=residual)


def matched_filter(error: Any, delta: Any) -> tuple[float, float]:
    """Coefficient and residual of a mutant's effect. error, delta: [n]"""
    if delta is None or delta.shape != error.shape:
        return math.nan, math.inf
    reach, size = float(delta @ delta), float(error @ error)
    if reach == 0 or size == 0:
        return 0.0, math.inf
    return float(error @ delta) / reach, math.sqrt(float((error - delta) @ (error - delta)) / size)


def explanations(evidence: Evidence, tried: list[Candidate], progress: Callable[[], None]) -> list[Explanation]:
    """The candidates as explanations. Once one explains the trace, candidates unrelated to the error are skipped."""
    found: list[Explanation] = []
    for each in tried:
        known = any(other.explains and other.residual < EXPLAINED for other in found)
        explanation = None if known and each.residual > UNRELATED else explain(evidence, each)
        if explanation is not None:
            found.append(explanation)
        progress()
    return found


def explain(evidence: Evidence, found: Candidate) -> Explanation | None:
    """Hold the trace against a mutant as if it were the specification. None if its effect is unrelated to the error."""
    mutant = found.mutant
    if WORSE < found.residual < math.inf:
        return None
    still, newly = _held_against(evidence, mutant, found.wrong)
    return Explanation(
        name=mutant.id,
        kind=KNOWN_BUG,
        about=mutant.about,
        fix=mutant.fix,
        sources=mutant.sources,
        explains=not still and not newly,
        still_failing=still,
        newly_failing=newly,
        coefficient=found.coefficient,
        residual=found.residual,
        touches=len(mutant.touches),
    )


def _held_against(evidence: Evidence, variation: Variation, wrong: dict[Key, Any]) -> tuple[int, int]:
    """The numbers of checks that still fail and that newly fail. Once one is known to, these are lower limits."""
    judge: type[Pass] = Chooser if changes_choice(variation) else UnderBug
    subject, policy = subject_of(evidence, variation), variation.policy(evidence.policy)
    for judging in (judge_first, judge_again):
        verdicts = judging(evidence, subject, policy, judge)
        still, newly = still_failing(evidence, verdicts, wrong), newly_failing(evidence, verdicts)
        if still or newly:
            break
    return still, newly


def unrelated(found: Explanation) -> bool:
    """Whether the explanation allows the error but does not predict it."""
    return UNRELATED < found.residual < math.inf


def rank(found: Explanation) -> tuple[Any, ...]:
    """The sort key that puts the best first: those that explain all, then by rising residual."""
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
    """Two mutants at once, as one variation."""

    one: Mutant
    two: Mutant

    @property
    def touches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.one.touches, *self.two.touches)))

    @property
    def possible(self) -> bool:
        """Whether the two mutants replace different steps."""
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


def pairs(evidence: Evidence, found: list[Candidate]) -> list[Explanation]:
    """The pairs of mutants that explain the trace. Their effects must add up to the error."""
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
                name=f"{pair.one.id} + {pair.two.id}",
                kind=TWO_BUGS,
                about=f"{pair.one.about} And: {pair.two.about}",
                fix="; ".join(filter(None, (pair.one.fix, pair.two.fix))),
                sources=(*pair.one.sources, *pair.two.sources),
                explains=True,
                still_failing=0,
                newly_failing=0,
                coefficient=coefficient,
                residual=residual,
                touches=len(pair.touches),
            )
        )
    return explained
