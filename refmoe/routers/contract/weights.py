# SPDX-License-Identifier: Apache-2.0
"""Laws of the weights, by which the experts' outputs are multiplied."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.formats import Floats
from refmoe.contracts.law import Need, Strategy
from refmoe.routers.contract.bounds import exp_error, forced, keys, roundings, weight_enclosure, weight_slack
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import MODERATE, any_batch, batches, moderate_batch
from refmoe.routers.contract.law import ANY_K, KNOWN_SCORING, NO_BIAS, NO_CAPACITY, NORMALISED, SEVERAL, law
from refmoe.routers.contract.subject import Routing, Subject


@law(
    "weights-are-shares",
    "Weights are finite and not negative; normalised ones sum to 1 (times the declared scale), others to no more.",
    "ROUTE-4; Shazeer et al. 2017, eq. 3",
    any_batch,
)
def weights_are_shares(subject: Subject, logits: Floats) -> None:
    d = subject.declaration
    routing = subject.route(logits)
    known = weight_enclosure(d, routing) if d.scoring == "sigmoid" or d.epsilon else None
    for token, weights in enumerate(routing.weights):
        if known is not None and not np.isfinite(known.high[token]).all():
            continue  # all scores underflow: the arithmetic cannot tell the shares
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise LawBroken(f"found weights {weights.tolist()}, finite ones that are not negative were expected", token)
        total, slack = float(weights.sum()), sum_slack(d, routing, token)
        least, most = -np.inf, np.inf
        if d.normalised:
            least, most = d.scale * (1 - slack), d.scale * (1 + slack)
            if known is not None and d.epsilon:
                least = min(least, float(known.low[token].sum()))
        elif d.scoring != "other":
            most = d.scale * (1.0 if d.scoring == "softmax" else d.top_k) * (1 + slack)
        if not least <= total <= most:
            wanted = f"{d.scale:g}" if d.normalised else f"at most {most:g}"
            raise LawBroken(
                f"found weights {weights.tolist()} with the sum {total:.9g}, {wanted} within {slack:.2g} was expected",
                token,
            )


def sum_slack(d: Declaration, routing: Routing, token: int) -> float:
    """The relative error that the sum of a token's weights may have.

    An error of exp counts in proportion to its weight. Such errors cancel where the weights are divided by their own
    sum, but not in exp(logit - log sum exp), which is legal too.
    """
    logits = routing.logits[token, routing.ids[token]]
    size = np.abs(logits - logits.max()) if d.scoring == "softmax" else np.abs(logits)
    with np.errstate(all="ignore"):
        errors = exp_error(d, size, routing.radius[token, routing.ids[token]])
        each = np.where(routing.weights[token] > 0, routing.weights[token] * errors, 0.0) / d.scale
        weighted = float(np.expm1(each.sum()))
    few = (d.experts + 3) * (d.working.underflow + d.stored.underflow) * d.top_k
    return weighted + roundings(d) + d.stored.unit + few


@law(
    "weight-values",
    "Every weight lies within the enclosure of its formula in the declared arithmetic.",
    "ROUTE-4, SOFTMAX-1 within BOUND-1 to BOUND-5; DeepSeek-V3 eq. 12 to 16 for sigmoid",
    any_batch,
    KNOWN_SCORING,
)
def weight_values(subject: Subject, logits: Floats) -> None:
    routing = subject.route(logits)
    known = weight_enclosure(subject.declaration, routing)
    assert known is not None
    inside = (known.low <= routing.weights) & (routing.weights <= known.high)
    inside |= np.isinf(known.high)
    for token, slot in np.argwhere(~inside)[:1]:
        low, middle, high = (float(side[token, slot]) for side in (known.low, known.middle, known.high))
        raise LawBroken(
            f"found weight {float(routing.weights[token, slot])!r} of expert {routing.ids[token, slot]}, "
            f"{middle:.9g} was expected: [{low:.9g}, {high:.9g}] holds all legal values",
            int(token),
        )


def lowered(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, MODERATE), "by": st.sampled_from([1.0, 16.0, 64.0])})


@law(
    "unchosen-logits",
    "Softmax over all experts renormalised on the chosen equals softmax over the chosen alone: a logit that was not "
    "chosen does not enter the weights.",
    "ROUTE-4, second sentence",
    lowered,
    NORMALISED,
    SEVERAL,
    NO_BIAS,
)
def unchosen_logits(subject: Subject, logits: Floats, by: float) -> None:
    d = subject.declaration
    before = subject.route(logits)
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, before.ids, True, axis=1)
    after = subject.route(np.where(chosen, logits, np.minimum(logits, logits.min(axis=1, keepdims=True)) - by))
    same_weights(d, before, after, "after the logits of the others were lowered")


def same_weights(d: Declaration, before: Routing, after: Routing, when: str) -> None:
    """Raises LawBroken where both calls chose the same experts with weights that differ by more than rounding."""
    if np.array_equal(before.ids, after.ids) and np.array_equal(before.weights, after.weights):
        return
    first, second = (in_id_order(routing) for routing in (before, after))
    same = (first.ids == second.ids).all(axis=1, keepdims=True)  # laws of the selection judge different sets
    differ = same & (first.weights != second.weights) & ~(np.isnan(first.weights) & np.isnan(second.weights))
    if not differ.any():
        return
    room = weight_slack(d, first) + weight_slack(d, second)
    apart = differ & ~(np.abs(first.weights - second.weights) <= room)
    for token, slot in np.argwhere(apart)[:1]:
        was, now = (float(routing.weights[token, slot]) for routing in (first, second))
        raise LawBroken(f"expert {first.ids[token, slot]} had weight {was!r} and has {now!r} {when}", int(token))


def in_id_order(routing: Routing) -> Routing:
    """A call's result with each token's slots in order of id."""
    order = np.argsort(routing.ids, axis=1, kind="stable")
    ids, weights = np.take_along_axis(routing.ids, order, 1), np.take_along_axis(routing.weights, order, 1)
    return Routing(routing.logits, routing.radius, ids, weights)


def same_routing(d: Declaration, before: Routing, after: Routing, when: str) -> None:
    """Raises LawBroken where experts differ though both decisions are forced, or equal experts differ in weight."""
    if np.array_equal(before.ids, after.ids):
        return same_weights(d, before, after, when)
    was, now = np.sort(before.ids, axis=1), np.sort(after.ids, axis=1)
    differ = (was != now).any(axis=1)
    if differ.any():
        for routing in (before, after):
            differ &= forced(d, keys(d, routing.logits, routing.radius))
        for token in np.flatnonzero(differ)[:1]:
            words = f"the experts were {before.ids[token].tolist()} and are {after.ids[token].tolist()} {when}"
            raise LawBroken(words, int(token))
    same_weights(d, before, after, when)


@law(
    "dense-at-k-equals-E",
    "With k = E every expert is chosen, with its weight in the dense mixture of all experts.",
    "ROUTE-4; Jacobs et al. 1991, eq. 1",
    moderate_batch,
    ANY_K,
    KNOWN_SCORING,
    NO_CAPACITY,
    Need("no scale: a dense mixture has none", lambda s: s.declaration.scale == 1.0),
)
def dense(subject: Subject, logits: Floats) -> None:
    weight_values.check(subject.at_top_k(subject.declaration.experts), logits)
