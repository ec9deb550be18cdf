# SPDX-License-Identifier: Apache-2.0
"""The causes that explain a failed verification: known bugs, other arithmetic, settings, single or in pairs.

A cause is a changed specification. It explains a trace if every failed check passes under it, and no passed check fails
in any call. It must also account for the errors, as `refmoe.verifier.diagnosis.fit` says. That is a proof within the
cause's own enclosures. Causes are first filtered by predictions, which cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.bugs.mutant import POLICY, Mutant
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis.evidence import (
    Chooser,
    Evidence,
    Part,
    UnderBug,
    Variation,
    changes_choice,
    judge_part,
    newly_failing,
    predict,
    still_failing,
    subject_of,
)
from refmoe.verifier.diagnosis.fit import (
    CENTRE,
    CLEAR,
    NOTHING,
    Fit,
    by_size,
    by_value,
    contradicted,
    explains_from_afar,
    moves,
)
from refmoe.verifier.diagnosis.independence import of_other_weights
from refmoe.verifier.diagnosis.observed import Recorded
from refmoe.verifier.diagnosis.one_step import fails_alone
from refmoe.verifier.diagnosis.rivals import noise
from refmoe.verifier.findings import (
    ARITHMETIC,
    BUG_AND_ARITHMETIC,
    KNOWN_BUG,
    LOCAL,
    TWO_BUGS,
    UNDECIDABLE,
    Explanation,
)
from refmoe.verifier.passes import Key

MAYBE = 0.9
"""The largest residual in the first part of a trace with which a cause is held against the whole trace. It is laxer
than for an explanation, because rounding may leave more in a part."""
ALIKE = 2.0
"""The largest factor between the size of the error and of an effect of equal size but another direction."""
PAIRS = 6
"""The number of pairs of causes that are tried: those with the smallest residuals."""
PAIR_LEAVES = 0.5
"""The largest residual of a pair, over the smaller residual of its two causes."""
REJECTED = 5
"""The most causes that are reported although they explain only a part."""


@dataclass(frozen=True)
class Cause:
    """A changed specification with a name."""

    name: str
    kind: str
    about: str
    fix: str
    variation: Variation
    sources: tuple[str, ...] = ()


def cause_of(mutant: Mutant, kind: str = KNOWN_BUG) -> Cause:
    """A mutant as a cause."""
    return Cause(
        name=mutant.id, kind=kind, about=mutant.about, fix=mutant.fix, variation=mutant, sources=mutant.sources
    )


@dataclass(frozen=True)
class Candidate:
    """A cause with its effect on the first part of a trace with a failed check."""

    cause: Cause
    delta: Any
    """Its effect in units of spacing, [n]. None if it changes shapes."""
    fit: Fit
    alike: bool
    """Whether the effect has the size of the error, though perhaps another direction, as noise has."""
    fails: bool = False
    """Whether the first failed check fails under the cause too. Then nothing is predicted."""


def touching(evidence: Evidence, causes: Iterable[Cause]) -> list[Cause]:
    """The causes that touch a failed step, or one that the trace lacks: an error there shows in a later step.

    Other arithmetic may change choices of experts, although the policy says which are legal.
    """
    steps = {check.step for check in evidence.failed}
    shown = {check.step for check in evidence.report.checks}
    found = []
    for each in causes:
        touches = set(each.variation.touches)
        if each.kind == ARITHMETIC:
            touches.add("router.experts")
        if steps & touches or not shown >= touches:
            found.append(each)
    return found


def candidates(evidence: Evidence, causes: Iterable[Cause], progress: Callable[[], None]) -> list[Candidate]:
    """The causes with an effect on the first part, by rising residual.

    One step alone is the cheapest test: it refutes most changes of the policy, so that these need no prediction.
    """
    found = []
    for cause in touching(evidence, causes):
        if _of_policy(cause) and fails_alone(evidence, cause.variation.policy(evidence.policy)):
            found.append(Candidate(cause=cause, delta=None, fit=NOTHING, alike=False, fails=True))
        else:
            found.append(_candidate(evidence, cause))
        progress()
    return sorted(found, key=lambda each: each.fit.residual)


def _of_policy(cause: Cause) -> bool:
    """Whether a cause changes the policy and nothing else."""
    return cause.kind == ARITHMETIC or (isinstance(cause.variation, Mutant) and cause.variation.changes == POLICY)


def _only_by_size(cause: Cause) -> bool:
    """Whether a cause is a bug of which only the size of its effect is known."""
    return isinstance(cause.variation, Mutant) and cause.variation.by_size


def _candidate(evidence: Evidence, cause: Cause) -> Candidate:
    part = evidence.first
    keys = evidence.keys(part)
    predicted = predict(evidence, cause.variation, part)
    delta = _effect(evidence, keys, predicted)
    error = _error(evidence, keys)
    alike = cause.kind == ARITHMETIC or _only_by_size(cause)  # sizes may change that are not predicted value by value
    if delta is not None and error.size and not alike:
        size, reach = float(np.linalg.norm(error)), float(np.linalg.norm(delta))
        alike = 0 < size <= ALIKE * reach and reach <= ALIKE * size
    return Candidate(cause, delta, by_value(evidence.observed, keys, predicted), alike)


def _error(evidence: Evidence, keys: Iterable[Key]) -> Any:
    """The errors of taps in units of spacing, [n]."""
    taps = [evidence.observed[key] for key in keys]
    parts = [tap.distance(tap.found - tap.mid) for tap in taps if not tap.choice]
    return np.concatenate(parts) if parts else np.zeros(0)


def _effect(evidence: Evidence, keys: Iterable[Key], predicted: dict[Key, Any]) -> Any:
    """The effect on taps in units of spacing, [n]. None if it changes shapes."""
    parts = []
    for key in keys:
        tap, mid = evidence.observed[key], predicted.get(key)
        if tap.choice:
            continue
        if mid is None or mid.shape != tap.mid.shape:
            return None
        parts.append(tap.distance(mid - tap.mid))
    return np.concatenate(parts) if parts else np.zeros(0)


def explanations(
    evidence: Evidence, tried: Iterable[Candidate], progress: Callable[[], None] = lambda: None
) -> list[Explanation]:
    """The candidates that explain the trace, and a few that explain a part of it, by rising residual.

    Once one explains the trace by its values, candidates that predict no value are not tried.
    """
    found: list[Explanation] = []
    rejected: list[Explanation] = []
    local = _local(evidence)
    for each in tried:
        if each.fit.residual <= MAYBE or (local and each.alike and all(other.by_size for other in found)):
            explanation = explain(evidence, each.cause)
            (found if explanation.explains else rejected).append(explanation)
        progress()
    return found + rejected[:REJECTED]


def explain(evidence: Evidence, cause: Cause) -> Explanation:
    """Hold the trace against a cause as if it were the specification.

    What costs least comes first: predictions, then the enclosures of a part of the trace, then those of all of it. The
    part is left out where the predictions leave little, because then it hardly ever refutes.
    """
    variation, keys = cause.variation, evidence.keys(evidence.whole)
    predicted = predict(evidence, variation, evidence.whole)
    fit = by_value(evidence.observed, keys, predicted)
    if _only_by_size(cause) and fit.residual > CLEAR:
        fit = NOTHING  # an engine draws other noise than the bug here, so that values agree by accident
    if not _may_explain(evidence, cause, fit, predicted):
        return refuted(evidence, cause, fit)
    local, part = _local(evidence), evidence.first
    if fit.residual <= max(noise(evidence), CLEAR):
        part = evidence.whole
    still, newly, recorded = _held_against(evidence, variation, part)
    if not still and not newly and part != evidence.whole:
        still, newly, recorded = _held_against(evidence, variation, evidence.whole)
    right = not still and not newly
    middles = {key: each.mid for key, each in recorded.items()}
    values = fit
    if right and not fit.explains and local:
        any_values = _only_by_size(cause)
        if any_values or not moves(evidence.observed, keys, middles):
            sizes = by_size(evidence.observed, keys, recorded, 1.0 if any_values else CENTRE)
            fit = min(fit, sizes, key=lambda each: each.residual)
        right = any_values or contradicted(evidence.observed, middles) is None
    if right and not local:
        ideal = partial(predict, evidence, variation, evidence.whole, rounds=True)
        right = not _blank(evidence) and explains_from_afar(fit, evidence.observed, keys, predicted, ideal)
    sized = fit is not values
    if right and sized:
        # a single step does not show that the others do the same
        right = cause.kind != ARITHMETIC or len(variation.touches) == 1 or len(fit.steps) > 1
        right = right and not of_other_weights(evidence, keys)
    return replace(
        refuted(evidence, cause, fit),
        by_size=sized,
        explains=right and fit.explains,
        still_failing=still,
        newly_failing=newly,
        values=evidence.wrong_values if right and fit.explains else 0,
    )


def _may_explain(evidence: Evidence, cause: Cause, fit: Fit, predicted: Mapping[Key, Any]) -> bool:
    """Whether the predictions of a cause leave it possible. They are the middles of its enclosures.

    fit: of the predictions at all failed checks
    """
    if not fit.explains:  # then only the size of errors may explain the trace
        keys = evidence.keys(evidence.whole)
        return _local(evidence) and (_only_by_size(cause) or not moves(evidence.observed, keys, predicted))
    return contradicted(evidence.observed, predicted) is None


def refuted(evidence: Evidence, cause: Cause, fit: Fit) -> Explanation:
    """The cause as one that does not explain the trace. It then leaves all that failed."""
    return Explanation(
        name=cause.name,
        kind=cause.kind,
        about=cause.about,
        fix=cause.fix,
        sources=cause.sources,
        explains=False,
        still_failing=len(evidence.failed),
        newly_failing=0,
        coefficient=fit.coefficient,
        residual=fit.residual,
        touches=len(cause.variation.touches),
        values=0,
    )


def _local(evidence: Evidence) -> bool:
    """Whether the trace has all inputs of each failed step."""
    return all(check.rung == LOCAL for check in evidence.failed)


def _blank(evidence: Evidence) -> bool:
    """Whether no failed check has a finite value. Then only the step that made the others could tell why."""
    taps = [evidence.observed[key] for key in evidence.keys(evidence.whole)]
    numbers = [tap for tap in taps if not tap.choice]
    return bool(numbers) and all(bool(tap.gaps.all()) for tap in numbers)


def _held_against(evidence: Evidence, variation: Variation, part: Part) -> tuple[int, int, dict[Key, Recorded]]:
    """The numbers of checks of a part that still fail and that newly fail, and the enclosures under the variation."""
    judge = Chooser if changes_choice(variation) else UnderBug
    judged = judge_part(evidence, part, subject_of(evidence, variation), variation.policy(evidence.policy), judge)
    verdicts = judged.verdicts
    open_ = any(verdicts.get(key) == UNDECIDABLE for key in evidence.keys(part))
    predicted = predict(evidence, variation, part) if open_ else {}
    ideal = predict(evidence, variation, part, rounds=True) if open_ else {}
    return still_failing(evidence, verdicts, predicted, ideal), newly_failing(evidence, verdicts), judged.recorded


def rank(found: Explanation) -> tuple[Any, ...]:
    """The sort key that puts the best first: those that explain all, then by what they leave, then by touched taps."""
    left = found.residual if math.isfinite(found.residual) else math.inf
    return (
        not found.explains,
        found.by_size,
        0.0 if found.by_size and found.explains else round(left, 2),  # sizes do not tell which of two is nearer
        found.still_failing + found.newly_failing,
        found.touches,
        found.name,
    )


@dataclass(frozen=True)
class Pair:
    """Two variations at once, as one."""

    one: Variation
    two: Variation

    @property
    def touches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.one.touches, *self.two.touches)))

    @property
    def possible(self) -> bool:
        """Whether the two replace different steps."""
        return not _steps(self.one) & _steps(self.two)

    def model(self, config: Config, parameters: Parameters) -> Model:
        first = self.one.model(config, parameters)
        second = self.two.model(first.config, first.parameters)
        steps = {
            name: getattr(each.steps, name)
            for variation, each in ((self.one, first), (self.two, second))
            for name in _steps(variation)
        }
        return Model(second.config, second.parameters, replace(CUT_STEPS, **steps))

    def policy(self, policy: Policy) -> Policy:
        return self.two.policy(self.one.policy(policy))

    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        return self.two.runs(self.one.runs(runs))


def _steps(variation: Variation) -> set[str]:
    """The steps of the model that a variation replaces."""
    return set(variation.steps) if isinstance(variation, Mutant) else set()


def pairs(evidence: Evidence, found: list[Candidate]) -> list[Explanation]:
    """The pairs of causes that explain the trace. Their effects must add up to the error."""
    error = _error(evidence, evidence.keys(evidence.first))
    found = [_candidate(evidence, each.cause) if each.fails else each for each in found]
    able = [each for each in found if each.delta is not None and each.delta.shape == error.shape and np.any(each.delta)]
    size = float(error @ error)
    if len(able) < 2 or not size:
        return []
    effects = np.stack([each.delta for each in able])
    gram, reach = effects @ effects.T, effects @ error
    alone = size + np.diagonal(gram) - 2 * reach
    left: list[tuple[float, Cause, Cause]] = []
    for i, j in combinations(range(len(able)), 2):
        rest = max(float(alone[i] + alone[j] - size + 2 * gram[i, j]), 0.0)  # |e - d_i - d_j|^2
        least = min(size, alone[i], alone[j])
        one, two = able[i].cause, able[j].cause
        possible = Pair(one.variation, two.variation).possible and {one.kind, two.kind} != {ARITHMETIC}
        if rest < PAIR_LEAVES**2 * least and possible:
            left.append((rest, one, two))
    explained = []
    for _, one, two in sorted(left, key=lambda each: each[0])[:PAIRS]:
        explanation = explain(evidence, together(one, two))
        if explanation.explains:
            explained.append(explanation)
    return explained


def together(one: Cause, two: Cause) -> Cause:
    """Two causes at once."""
    mixed = ARITHMETIC in (one.kind, two.kind)
    if two.kind == ARITHMETIC:
        one, two = two, one  # a policy is changed by name, so before a bug changes it
    return Cause(
        name=f"{one.name} + {two.name}",
        kind=BUG_AND_ARITHMETIC if mixed else TWO_BUGS,
        about=f"{one.about.rstrip('.')}. And: {two.about}",
        fix="; ".join(filter(None, (one.fix, two.fix))),
        variation=Pair(one.variation, two.variation),
        sources=(*one.sources, *two.sources),
    )
