# SPDX-License-Identifier: Apache-2.0
"""Whether a fault has one size everywhere: the same in each layer, call, head, slot and expert.

A fitted number, such as a factor, may be the mean of several. In a coarse dtype each of these can be near enough to it
that every value is still legal. So the coefficient of each row is measured: its error over the effect of the fault. If
the number is right, the rows of one group scatter about the same mean as those of another. The test is an analysis of
variance, weighted by what a row tells. Let n rows lie in G groups, and let r be the share of the scatter that is
between groups. By chance a share of r or more has a probability of about n^((G - 1) / 2) (1 - r)^((n - G) / 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.verifier.diagnosis.fit import SMALLEST

LOST = 14.0
"""The negative logarithm, to base 2, of the probability that a right name is lost by chance."""


@dataclass(frozen=True)
class Share:
    """The rows of one tap: all indices but the last one."""

    error: Any
    """Found minus right, of the tap's shape."""
    effect: Any
    """Predicted minus right, of the tap's shape."""
    predicted: Any
    """The values under the fault, of the tap's shape; 0 where it does not act."""
    variance: Any
    """Of the error under the fault, of the tap's shape."""
    groups: dict[str, Any]
    """Per kind of group the number of each row's group, in a shape that broadcasts to the rows."""


def uneven(shares: Sequence[Share], unit: float) -> str:
    """The kind of group in which the fault has different sizes, such as ``layer``; empty if there is none.

    unit: the roundoff of the step. Differences below it are none: all values of a row may share one rounding.
    """
    if not shares:
        return ""
    rows = Measured(*(np.concatenate(each) for each in zip(*map(_rows, shares), strict=True)))
    for kind in dict.fromkeys(name for share in shares for name in share.groups):
        if all(kind in share.groups for share in shares):
            parts = [np.broadcast_to(share.groups[kind], share.error.shape[:-1]).reshape(-1) for share in shares]
            if _differ(rows, np.concatenate(parts), unit):
                return kind
    return ""


@dataclass(frozen=True)
class Measured:
    """The coefficient of each row of all taps, and the weight that it has: an array [n] each."""

    weight: Any
    """The inverse of the variance of the coefficient; 0 where the fault does not act."""
    coefficient: Any
    """The error over the effect."""
    effect: Any
    """The sum of the squares of the effects."""
    predicted: Any
    """The sum of the squares of the predicted values."""


def _rows(share: Share) -> tuple[Any, ...]:
    """The rows of one tap, in the order of the fields of `Measured`."""
    with np.errstate(all="ignore"):
        scaled = np.where(share.variance > 0, share.effect / share.variance, 0.0)
        weight, along = (scaled * share.effect).sum(-1).reshape(-1), (scaled * share.error).sum(-1).reshape(-1)
        able = np.isfinite(weight) & np.isfinite(along) & (weight > 0)
        coefficient = np.where(able, along / np.where(able, weight, 1.0), 0.0)
        sizes = ((each**2).sum(-1).reshape(-1) for each in (share.effect, share.predicted))
        return np.where(able, weight, 0.0), coefficient, *sizes


def _differ(rows: Measured, group: Any, unit: float) -> bool:
    """Whether the mean coefficients of groups differ by more than their scatter allows, and by more than a roundoff."""
    told = rows.weight > 0
    weight, coefficient = rows.weight[told], rows.coefficient[told]
    names, at = np.unique(group[told], return_inverse=True)
    n, groups = len(weight), len(names)
    if groups < 2 or n <= groups:
        return False
    total = np.bincount(at, weight)
    means = np.bincount(at, weight * coefficient) / total
    apart = means - (total * means).sum() / total.sum()
    between = float((total * apart**2).sum())
    # legal errors are at least this part of their deviation, whatever a few rows show
    within = max(float((weight * (coefficient - means[at]) ** 2).sum()), SMALLEST**2 * (n - groups))
    bits = (n - groups) / 2 * math.log2(1 + between / within) - (groups - 1) / 2 * math.log2(n)
    moved, size = (np.bincount(at, each[told]) for each in (rows.effect, rows.predicted))
    # a part that the fault makes zero has no size to compare with
    return bits > LOST and bool((apart**2 * moved > unit**2 * size)[size > 0].any())
