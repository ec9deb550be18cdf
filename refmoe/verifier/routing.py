# SPDX-License-Identifier: Apache-2.0
"""Routing decisions: the choices of experts that the policy allows.

Once a choice is replayed, no check of values can see that it was wrong. So each choice is judged by itself: it must be
a top-k of logits that the policy can produce from the trace's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.functions import relative_error
from refmoe.profiles.policy import Policy
from refmoe.verifier.findings import CONTESTABLE, FORCED, TIE, Decision

NO_PADDING = "A trace has no padding: leave padded rows out of all arrays"


@dataclass(frozen=True)
class Routing:
    """The decisions of some tokens in one layer."""

    expected: Any
    """The choice of exact arithmetic, integers [T, k]."""
    kind: Any
    """`FORCED`, `TIE` or `CONTESTABLE`, [T]"""
    legal: Any
    """Booleans [T]; true where the trace has no choice to judge."""
    margin: Any
    """As in `Decision`, [T]"""
    movable: Any
    """As in `Decision`, [T]"""
    found: Any
    """The trace's choice, integers [T, k], or None."""

    def decisions(self, run: str, layer: int, start: int) -> Iterator[Decision]:
        """One record per token.   start: the position of the first token in its run."""
        for t in range(len(self.expected)):
            found = () if self.found is None else tuple(int(e) for e in self.found[t])
            yield Decision(
                run=run,
                layer=layer,
                token=start + t,
                kind=str(self.kind[t]),
                legal=bool(self.legal[t]),
                found=found,
                expected=tuple(int(e) for e in self.expected[t]),
                margin=float(self.margin[t]),
                movable=float(self.movable[t]),
            )


def judge(x: Enclosure, dumped: Any, trusted: bool, found: Any, k: int, policy: Policy, spreads: float) -> Routing:
    """Judge the choices of some tokens.

    x: the logits that the policy can produce, before they are stored, [T, E]
    dumped: the trace's logits [T, E], or None   trusted: whether the dumped logits lie in the legal interval
    found: the trace's choices, integers [T, k], or None
    spreads: standard deviations that count as certain where they are less than the radius
    """
    certain = sharper(x.settle(), spreads)
    stored = certain.cut(policy.at("router.logits"))
    m = stored.mid
    r = np.where(np.isnan(stored.r) | np.isnan(m), np.inf, stored.r)
    m = np.nan_to_num(m, nan=0.0)
    low, high = blur(m - r, m + r, policy)
    expected = np.argsort(-m, axis=-1, kind="stable")[:, :k]
    rows = np.arange(len(m))
    inside = np.zeros(m.shape, bool)
    np.put_along_axis(inside, expected, True, axis=-1)
    last = expected[:, -1]
    rest = np.where(inside, -np.inf, m)
    best = rest.argmax(-1)
    margin = np.where(np.isfinite(rest.max(-1)), m[rows, last] - rest.max(-1), np.inf)
    movable = (m - low)[rows, last] + (high - m)[rows, best]
    lowest_in = np.where(inside, low, np.inf).min(-1)
    highest_out = np.where(inside, -np.inf, high).max(-1)
    kind = np.where(lowest_in > highest_out, FORCED, np.where(margin == 0, TIE, CONTESTABLE))
    if k == m.shape[-1]:
        kind = np.full(len(m), FORCED)
    legal = np.ones(len(m), bool)
    if found is not None:
        by_enclosure = consistent(low, high, found)
        legal = by_enclosure
        if dumped is not None:
            values = np.nan_to_num(np.asarray(dumped, np.float64), nan=0.0)
            by_dump = consistent(*blur(values, values, policy), found, policy.ties == "lower")
            legal = by_dump if policy.compared == "stored" or not trusted else by_dump | by_enclosure
    return Routing(expected=expected, kind=kind, legal=legal, margin=margin, movable=movable, found=found)


def sharper(x: Enclosure, spreads: float) -> Enclosure:
    """The enclosure with the smaller radius: the proven one, or `spreads` standard deviations."""
    if x.radius is None or x.variance is None:
        return x
    spread = np.where(x.variance > 0, spreads * np.sqrt(x.variance), np.inf)
    return Enclosure(x.mid, np.fmin(x.radius, spread), x.variance, accumulation=x.accumulation)


def consistent(low: Any, high: Any, found: Any, lower_first: bool = False) -> Any:
    """Whether some logits within [low, high] have the choice as their top-k.

    low, high: [T, E]   found: integers [T, k]   returns: booleans [T]
    lower_first: whether of equal logits only the lower id may be chosen
    """
    chosen = np.zeros(low.shape, bool)
    np.put_along_axis(chosen, found, True, axis=-1)
    fits = np.where(chosen, high, np.inf).min(-1) >= np.where(chosen, -np.inf, low).max(-1)
    if lower_first:
        # a chosen logit that equals a refused one must have the lower id
        equal = (high[:, :, None] == low[:, None, :]) & chosen[:, :, None] & ~chosen[:, None, :]
        ids = np.arange(low.shape[-1])
        fits &= ~(equal & (ids[:, None] > ids[None, :])).any((1, 2))
    return fits


def valid(found: Any, experts: int) -> Any:
    """Whether the ids of a row are in range and all different. found: integers [T, k]   returns: booleans [T]"""
    ordered = np.sort(found, axis=-1)
    return (ordered[:, 0] >= 0) & (ordered[:, -1] < experts) & (np.diff(ordered, axis=-1) > 0).all(-1)


def invalid_choices(found: Any, experts: int, start: int) -> str:
    """The tokens with ids that are no choice of experts, in words; empty where there are none.

    found: integers [T, k]   start: the position of the first token in its run
    Many engines write -1 for a padded row, and some for a token that they drop.
    """
    wrong = ~valid(found, experts)
    if not wrong.any():
        return ""
    token = int(np.flatnonzero(wrong)[0])
    reason = (
        f"{int(wrong.sum())} tokens have no {found.shape[1]} different experts from 0 to {experts - 1}: token "
        f"{start + token} has {found[token].tolist()}"
    )
    if (found[wrong] == -1).all():
        reason += f". Its row is padding, or no expert was given the token. {NO_PADDING}"
    return reason


def blur(low: Any, high: Any, policy: Policy) -> tuple[Any, Any]:
    """The bounds widened by the logits that the router cannot tell apart. low, high: [T, E]

    A router that takes softmax first compares probabilities. Its exponentials err by their budget, and are rounded
    where probabilities are stored. Probabilities that underflow are equal.
    """
    if policy.router_order == "top-k-then-softmax":
        return low, high
    top = np.maximum(high.max(-1, keepdims=True), low.max(-1, keepdims=True))
    stored = policy.at("router.probs")
    below = np.minimum(top - low, -np.log(stored.tiny))
    error = relative_error(policy.exp, policy.statistics, below) + 4 * policy.statistics.u + stored.u
    # below the smallest normal a probability may be flushed, or keep too few bits to differ
    lowest = top + np.log(stored.tiny)
    return np.maximum(low - error, lowest), np.maximum(high + error, lowest)
