# SPDX-License-Identifier: Apache-2.0
"""Enclosures of the scores and weights that a router of the declared arithmetic may return, and forced decisions.

BOUND-1  exp(s) is computed from s within kappa = r + u (c0 + (1 + c1) |s|). Here r is the error of the logit itself,
         u |s| the rounding of s = logit - largest, and c0 + c1 |s| the budget of exp. For sigmoid, where nothing is
         subtracted, kappa = r + u (c0 + c1 |logit|).
BOUND-2  The softmax of n numbers lies between e_i e^-kappa_i / (e_i e^-kappa_i + sum of the other e_j e^kappa_j) and
         this expression with exchanged signs: each exp has its largest error, in opposite directions.
BOUND-3  Sums, divisions and the scale add a factor (1 + u)^m, m = E + k + 4: softmax over all experts (E - 1 additions,
         a division), renormalisation (k - 1 additions, a division), scale, and three to spare for conversions. The
         softmax over only the chosen experts needs fewer. Storing the weight adds one rounding to its stored format.
BOUND-4  A number that underflows has the error `underflow` of the format. Division by a share of at least 1 / E
         multiplies that error by up to E: (E + 3) such errors in all.
BOUND-5  The reference computes in float64, so every u above is u + 2^-53.

The rules of `refmoe.arithmetic.enclosure.functions` are similar. No bound depends on the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refmoe.arithmetic.exact import elementary
from refmoe.contracts.formats import Booleans, Floats
from refmoe.routers.contract.arithmetic import REFERENCE_UNIT
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.subject import Routing


@dataclass(frozen=True)
class Enclosure:
    """Every legal value is in [low, high]. `middle` is the reference's value."""

    low: Floats
    middle: Floats
    high: Floats

    @property
    def width(self) -> Floats:
        return self.high - self.low


def unit(d: Declaration) -> float:
    return d.working.unit + REFERENCE_UNIT


def roundings(d: Declaration) -> float:
    """The relative error of BOUND-3, without that of storing the weight."""
    return float(np.expm1((d.experts + d.top_k + 4) * np.log1p(unit(d))))


def exp_error(d: Declaration, size: Floats, radius: Floats) -> Floats:
    """kappa of BOUND-1. size: |s| for softmax, |logit| otherwise. radius: r"""
    linear = d.exp_budget.linear + (0.0 if d.scoring == "sigmoid" else 1.0)
    return radius + unit(d) * d.exp_budget.constant + unit(d) * linear * size  # the largest size must not overflow


def exponentials(d: Declaration, logits: Floats, radius: Floats) -> Enclosure:
    """exp(logit - largest) of each row, by BOUND-1. A logit of -Inf gives exactly zero."""
    with np.errstate(all="ignore"):
        s = logits - logits.max(axis=-1, keepdims=True)
        error = np.where(np.isneginf(s), 0.0, exp_error(d, np.abs(s), radius))
        return Enclosure(*elementary.exp(np.stack([s - error, s, s + error])))


def shares(d: Declaration, parts: Enclosure, epsilon: float = 0.0) -> Enclosure:
    """part_i / (sum of all parts + epsilon), by BOUND-2. An epsilon that underflows may count as zero.

    Where the divisor may be zero, the share has no bound, and `high` is infinite.
    """
    least = epsilon if epsilon > d.working.underflow else 0.0
    others = 1.0 - np.eye(parts.middle.shape[-1])
    with np.errstate(all="ignore"):
        low = parts.low / (parts.low + parts.high @ others + epsilon)
        middle = parts.middle / (parts.middle.sum(axis=-1, keepdims=True) + epsilon)
        high = parts.high / (parts.high + parts.low @ others + least)
    unknown = parts.low.sum(axis=-1, keepdims=True) + least == 0
    return Enclosure(np.where(unknown, 0.0, low), middle, np.where(unknown, np.inf, high))


def widened(e: Enclosure, relative: float, absolute: float) -> Enclosure:
    """The enclosure extended by a relative and an absolute error."""
    return Enclosure(np.maximum(e.low / (1 + relative) - absolute, 0.0), e.middle, e.high * (1 + relative) + absolute)


def sigmoids(d: Declaration, logits: Floats, radius: Floats) -> Enclosure:
    """1 / (1 + exp(-logit)), with the roundings of the addition and the division."""
    error = exp_error(d, np.abs(logits), radius)
    error = np.where(np.isinf(logits), 0.0, error)
    exact = Enclosure(*elementary.sigmoid(np.stack([logits - error, logits, logits + error])))
    return widened(exact, float(np.expm1(2 * np.log1p(unit(d)))), d.working.underflow)


def weight_enclosure(d: Declaration, routing: Routing) -> Enclosure | None:
    """The weights of the chosen experts, [T, k]; None where the scoring is not known."""
    pick = np.clip(routing.ids, 0, d.experts - 1)
    logits, radius = routing.logits, routing.radius
    if d.scoring == "other":
        return None
    if d.normalised:
        logits, radius = np.take_along_axis(logits, pick, 1), np.take_along_axis(radius, pick, 1)
    if d.scoring == "softmax":
        found = shares(d, exponentials(d, logits, radius), d.epsilon)
    else:
        scores = sigmoids(d, logits, radius)
        found = shares(d, scores, d.epsilon) if d.normalised else scores
    if not d.normalised:
        found = Enclosure(*(np.take_along_axis(part, pick, 1) for part in (found.low, found.middle, found.high)))
    found = widened(found, roundings(d), (d.experts + 3) * d.working.underflow)
    scaled = Enclosure(found.low * d.scale, found.middle * d.scale, found.high * d.scale)
    return widened(scaled, d.stored.unit, d.stored.underflow)


def weight_slack(d: Declaration, routing: Routing) -> Floats:
    """How far a weight may be from the true one, [T, k]. Two legal calls differ by at most the sum of their slacks."""
    known = weight_enclosure(d, routing)
    if known is not None:
        return known.width
    size = np.abs(np.take_along_axis(routing.logits, np.clip(routing.ids, 0, d.experts - 1), 1)).max(axis=1)
    error = np.expm1(2 * exp_error(d, size, routing.radius.max(axis=1)))[:, None] + roundings(d) + d.stored.unit
    slack = routing.weights * error + (d.experts + 3) * max(d.working.underflow, d.stored.underflow)
    return np.asarray(slack)


def keys(d: Declaration, logits: Floats, radius: Floats) -> Enclosure:
    """The values that the selection compares, [T, E]: the logits, or scores in the same order."""
    if d.selection == "logits" or d.scoring == "other":
        slack = radius
        if d.selection == "scores":
            size = np.where(np.isfinite(logits), np.abs(logits), 0.0).max(axis=-1, keepdims=True)
            slack = radius + np.expm1(exp_error(d, size, radius) + roundings(d))
        return Enclosure(logits - slack, logits, logits + slack)
    if d.scoring == "sigmoid":
        scores = sigmoids(d, logits, radius)
    elif d.bias is not None:
        scores = widened(
            shares(d, exponentials(d, logits, radius)), roundings(d), (d.experts + 3) * d.working.underflow
        )
    else:  # all scores of a token are divided by one sum, and correctly rounded division keeps their order
        rounds = float(np.expm1(2 * np.log1p(unit(d))))
        scores = widened(exponentials(d, logits, radius), rounds, (d.experts + 3) * d.working.underflow)
    if d.bias is None:
        return scores
    biased = (scores.low + d.bias, scores.middle + d.bias, scores.high + d.bias)
    slack = unit(d) * np.abs(biased[2])
    return Enclosure(biased[0] - slack, biased[1], biased[2] + slack)


def forced(d: Declaration, compared: Enclosure) -> Booleans:
    """Which tokens have only one legal set of experts: booleans [T]."""
    if d.top_k == d.experts:
        return np.ones(len(compared.low), dtype=bool)
    order = np.argsort(-compared.middle, axis=1, kind="stable")
    least = np.take_along_axis(compared.low, order[:, : d.top_k], 1).min(axis=1)
    most = np.take_along_axis(compared.high, order[:, d.top_k :], 1).max(axis=1)
    return np.asarray(least > most)
