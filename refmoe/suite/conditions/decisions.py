# SPDX-License-Identifier: Apache-2.0
"""Conditions of the router's decisions."""

from __future__ import annotations

import numpy as np

from refmoe.suite.conditions.observed import FLOAT32_EXP_ZERO, Floats, Observed, condition

BELOW_BFLOAT16 = 2.0**-9
"""The relative error of rounding to bfloat16, at its smallest. Rounding can close a gap below it."""


@condition("routing", "COVER", "every expert at every rank in every layer", "COVER")
def _cover(seen: Observed) -> bool:
    for i in range(seen.config.layers):
        chosen = np.concatenate([seen.arrays[f"{run.run}/layers.{i}.router.experts"] for run in seen.read])
        if any(len(np.unique(rank)) < seen.config.experts for rank in chosen.T):
            return False
    return True


@condition("routing", "EMPTY", "an expert without tokens before one with some, in a call with several", "EMPTY")
def _empty(seen: Observed) -> bool:
    return any(len(run.tokens) > 1 and (count[: count.nonzero()[0][-1]] == 0).any() for run, count in seen.counts())


@condition("routing", "IMBAL", "an expert that gets at least three quarters of four or more tokens", "IMBAL")
def _imbalanced(seen: Observed) -> bool:
    return seen.config.experts_per_token < seen.config.experts and any(
        len(run.tokens) > 3 and count.max() >= 0.75 * len(run.tokens) for run, count in seen.counts()
    )


@condition("routing", "ONE-PAIR", "a call whose four or more tokens choose the same experts, in every layer", "IMBAL")
def _one_pair(seen: Observed) -> bool:
    same: dict[str, bool] = {}
    for run, count in seen.counts():
        collapsed = (count > 0).sum() == seen.config.experts_per_token < seen.config.experts
        same[run.run] = same.get(run.run, len(run.tokens) > 3) and bool(collapsed)
    return any(same.values())


@condition("routing", "TIE-INSIDE", "equal logits among the chosen: at ranks 1/2 only the order depends on it", "TIE")
def _tie_inside(seen: Observed) -> bool:
    k = seen.config.experts_per_token
    return any((np.diff(top[:, :k], axis=-1) == 0).any() for top in seen.ranked())


@condition("routing", "TIE-EDGE", "the last chosen and the first left out equal: ranks 2/3 of two chosen", "TIE")
def _tie_edge(seen: Observed) -> bool:
    k = seen.config.experts_per_token
    return k < seen.config.experts and any((top[:, k - 1] == top[:, k]).any() for top in seen.ranked())


def _near(ranked: Floats, k: int) -> bool:
    """Whether, in some row, the k-th and the next value differ by less than bfloat16 resolves. ranked: [T, E]"""
    gap = ranked[:, k - 1] - ranked[:, k]
    size = np.maximum(np.abs(ranked[:, k - 1]), np.abs(ranked[:, k]))
    return bool(((gap > 0) & (gap < BELOW_BFLOAT16 * size)).any())


@condition("routing", "NEARTIE", "the last chosen and the first left out closer than bfloat16 resolves", "NEARTIE")
def _near_tie(seen: Observed) -> bool:
    k = seen.config.experts_per_token
    return k < seen.config.experts and any(_near(ranked, k) for ranked in seen.ranked())


@condition("routing", "LOGIT-NEARTIE", "the two largest logits of a token closer than bfloat16 resolves", "NEARTIE")
def _near_logits(seen: Observed) -> bool:
    return any(_near(-np.sort(-seen.arrays[f"{run.run}/logits"], axis=-1), 1) for run in seen.read)


@condition("routing", "FLATROUTER", "on average over a quarter of the router's mass on experts left out", "FLATROUTER")
def _flat(seen: Observed) -> bool:
    return bool(seen.router_mass()[:, seen.config.experts_per_token :].sum(axis=-1).mean() > 0.25)


@condition("routing", "SKEW", "weights of a token that differ by more than a half, none under 0.05", "FLATROUTER")
def _skew(seen: Observed) -> bool:
    weights = np.concatenate([w for _, w in seen.layers("router.weights")])
    return bool(((np.ptp(weights, axis=-1) > 0.5) & (weights.min(axis=-1) > 0.05)).any())


@condition("routing", "PEAKED", "over 0.95 of the router's mass, on average, on the first choice")
def _peaked(seen: Observed) -> bool:
    return bool(seen.router_mass()[:, 0].mean() > 0.95)


@condition("routing", "ROUTER-UNDERFLOW", "a router's logit whose exp underflows to zero in float32")
def _router_underflow(seen: Observed) -> bool:
    return any(np.ptp(ranked, axis=-1).max() > FLOAT32_EXP_ZERO for ranked in seen.ranked())
