# SPDX-License-Identifier: Apache-2.0
"""Of several causes that explain a whole trace at most one is right: the one that leaves least, or one of its rivals.

A cause is a rival of the best one if it leaves as little, up to rounding. Two independent roundings of one size leave
sqrt(2) times what one leaves, so the limit is `ALIKE` = 1.5 times what the best cause leaves. If that is less than what
rounding under the policy makes, the limit is 1.5 times that.

Causes that predict only the size of errors count if none predicts their values. All of them are rivals, since a size is
known only up to a factor. Other arithmetic that allows more than a rival is left out: the narrower change suffices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

import numpy as np

from refmoe.arithmetic.formats import Format
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import BUDGETS, CHOICES, DTYPES, FLAGS, NUMBERS, differences
from refmoe.profiles.policy import Policy
from refmoe.spec.taps import tap_names
from refmoe.verifier.diagnosis.evidence import Evidence, Variation, predict
from refmoe.verifier.findings import ARITHMETIC, KNOWN_BUG, STRUCTURE, Explanation
from refmoe.verifier.passes import Key

ALIKE = 1.5
"""The largest residual of a rival, over that of the best cause."""
APART = 8.0
"""Two predictions differ in a tap if their distance is this many roundings of its dtype, relative to their size."""


def settle(evidence: Evidence, found: Sequence[Explanation], variations: Mapping[str, Variation]) -> list[Explanation]:
    """The explanations, where only the best and its rivals still explain the trace.

    found: each explains the whole trace, or does not explain it   variations: by the names of the explanations
    """
    able = sorted((each for each in found if each.explains), key=lambda each: (each.by_size, each.residual))
    if not able:
        return [*found]
    able = [*{each.name: each for each in reversed(able)}.values()][::-1]
    if able[0].by_size:
        arithmetic = [variations[each.name].policy(evidence.policy) for each in able if each.kind == ARITHMETIC]
        wide = {each.name for each in arithmetic if any(allows_more(each, other) for other in arithmetic)}
        tied = sorted((each for each in able if each.name not in wide), key=lambda each: each.touches)
    else:
        limit = ALIKE * max(able[0].residual, noise(evidence))
        tied = [each for each in able if each.residual <= limit and not each.by_size]
        read = [variations[each.name].policy(evidence.policy) for each in tied if each.kind == ARITHMETIC]
        coarse = {each.name for each in read if any(reads_coarser(each, other) for other in read)}
        tied = [each for each in tied if each.name not in coarse]
    bugs = [each.residual for each in tied if each.kind == KNOWN_BUG]
    # a wrong setting that is also a bug of the catalogue is one cause with two names
    tied = [each for each in tied if each.kind != STRUCTURE or not any(map(partial(_equal, each.residual), bugs))]
    kept = {each.name for each in tied}
    worse = [replace(each, explains=False, values=0) for each in able if each.name not in kept]
    names = [each.name for each in tied]
    said = [
        replace(
            each,
            rivals=tuple(name for name in names if name != each.name),
            told_apart_by=_apart(evidence, variations[each.name], variations[names[each.name == names[0]]]),
        )
        if len(tied) > 1
        else each
        for each in tied
    ]
    return said + worse + [each for each in found if not each.explains]


def allows_more(wide: Policy, narrow: Policy) -> bool:
    """Whether one policy allows all that the other allows, and more. Then the other suffices as an explanation."""
    same = all(getattr(wide, name) == getattr(narrow, name) for name in (*CHOICES, *BUDGETS))
    coarser = all(getattr(narrow, name).holds(getattr(wide, name)) for name in DTYPES)
    coarser &= all(narrow.at(cut).holds(wide.at(cut)) for cut in CUT_POINTS)
    more = all(getattr(wide, name) >= getattr(narrow, name) for name in (*FLAGS, *NUMBERS))
    return same and coarser and more and bool(differences([wide, narrow]))


def reads_coarser(wide: Policy, narrow: Policy) -> bool:
    """Whether two policies differ in the dtypes alone in which products read their inputs, and one is the coarser."""
    rest = [each.name for each in fields(Policy) if each.name not in ("name", "about", "source", "inputs")]
    if any(getattr(wide, name) != getattr(narrow, name) for name in rest) or wide.inputs.keys() != narrow.inputs.keys():
        return False
    pairs = [(each, narrow.inputs[name]) for name, each in wide.inputs.items() if each != narrow.inputs[name]]
    return bool(pairs) and all(
        isinstance(one, Format) and isinstance(two, Format) and two.holds(one) for one, two in pairs
    )


def _equal(one: float, other: float) -> bool:
    return f"{one:.6g}" == f"{other:.6g}"


def noise(evidence: Evidence) -> float:
    """The residual that rounding under the policy leaves, before the last rounding, at the failed taps."""
    rounding = error = 0.0
    for key in evidence.keys(evidence.whole):
        tap = evidence.observed[key]
        if not tap.choice:
            spread, far = tap.distance(np.sqrt(tap.variance)), tap.beyond(tap.mid)
            rounding, error = rounding + float(spread @ spread), error + float(far @ far)
    return math.sqrt(rounding / error) if error else 0.0


def _apart(evidence: Evidence, one: Variation, two: Variation) -> str:
    """The first tap, in order of computation, that the trace lacks and in which two variations differ; or empty."""
    missing = frozenset(evidence.contents.missing) - {"router.experts"}
    if not missing:
        return ""
    first, second = (predict(evidence, each, evidence.whole, missing) for each in (one, two))
    order = {tap: i for i, tap in enumerate(tap_names(evidence.right.config))}
    runs = {run.run: i for i, run in enumerate(evidence.contents.runs)}
    keys = sorted(first.keys() & second.keys(), key=lambda key: (runs[key[0]], order[key[1]]))
    return next((tap for run, tap in keys if _differ(evidence, (run, tap), first, second)), "")


def _differ(evidence: Evidence, key: Key, first: Mapping[Key, np.ndarray], second: Mapping[Key, np.ndarray]) -> bool:
    one, two = first[key], second[key]
    if one.shape != two.shape:
        return True
    unit = evidence.policy.storage.u
    return bool(np.linalg.norm(one - two) > APART * unit * np.linalg.norm(two))
