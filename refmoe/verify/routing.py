"""Routing decisions: which choices of experts the policy's arithmetic leaves open.

No check of values sees a wrong choice once the choice is replayed, so each is judged by itself: it must be a top-k of
logits that the policy can produce from the trace's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.functions import relative_error
from refmoe.policy.policy import Policy
from refmoe.verify.findings import CONTESTABLE, FORCED, TIE, Decision


@dataclass(frozen=True)
class Routing:
    """The decisions of some tokens in one layer."""

    expected: Any
    """The choice of exact arithmetic, integers [T, k]."""
    kind: Any
    """[T]"""
    legal: Any
    """booleans [T]; true where there is nothing to judge."""
    margin: Any
    movable: Any
    found: Any
    """The trace's choice, integers [T, k], or None."""

    def decisions(self, run: str, layer: int, start: int) -> Iterator[Decision]:
        """One record per token.   start: the position of the first token in its run."""
        for t in range(len(self.expected)):
            found = () if self.found is None else tuple(int(e) for e in self.found[t])
            yield Decision(
                run, layer, start + t, str(self.kind[t]), bool(self.legal[t]), found,
                tuple(int(e) for e in self.expected[t]), float(self.margin[t]), float(self.movable[t]),
            )  # fmt: skip


def judge(x: Enclosure, dumped: Any, trusted: bool, found: Any, k: int, policy: Policy, spreads: float) -> Routing:
    """Which choices are legal, and whether the one found is.

    x: the logits that the policy can produce, before they are stored, [T, E]   dumped: the trace's logits or None
    trusted: whether the dumped logits are what x allows   found: [T, k] or None
    spreads: standard deviations that count as certain where there is no hard radius
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
    return Routing(expected, kind, legal, margin, movable, found)


def sharper(x: Enclosure, spreads: float) -> Enclosure:
    """With the radius that is proven, or that many standard deviations where these are less."""
    if x.radius is None or x.variance is None:
        return x
    spread = np.where(x.variance > 0, spreads * np.sqrt(x.variance), np.inf)
    return Enclosure(x.mid, np.fmin(x.radius, spread), x.variance, x.accumulation)


def consistent(low: Any, high: Any, found: Any, lower_first: bool = False) -> Any:
    """Whether logits within [low, high] exist for which each choice is a top-k. low, high: [T, E]   found: [T, k]

    lower_first: of equal logits only the lower id may be chosen.
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
    """Whether each row holds different expert ids from 0. found: integers [T, k]   returns: booleans [T]"""
    ordered = np.sort(found, axis=-1)
    return (ordered[:, 0] >= 0) & (ordered[:, -1] < experts) & (np.diff(ordered, axis=-1) > 0).all(-1)


def blur(low: Any, high: Any, policy: Policy) -> tuple[Any, Any]:
    """Bounds of logits as far as the router can tell them apart: one that takes softmax first compares probabilities.

    Its exponentials err by their budget and round where probabilities are stored; those that underflow are equal.
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
