# SPDX-License-Identifier: Apache-2.0
"""Laws of the selection: which experts a token goes to."""

from __future__ import annotations

import numpy as np

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.formats import Floats
from refmoe.contracts.law import Need
from refmoe.routers.contract.bounds import Enclosure, keys
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import any_batch, close_batch, tied_batch, wide_batch
from refmoe.routers.contract.law import NO_BIAS, SEVERAL, law
from refmoe.routers.contract.subject import Routing, Subject, right_inverse
from refmoe.routers.contract.ties import describe, expected_ids, seeming_rule


@law(
    "distinct-ids",
    "Every token gets k distinct expert ids in 0 .. E-1, and k weights.",
    "ROUTE-2; Shazeer et al. 2017, eq. 5",
    any_batch,
)
def distinct_ids(subject: Subject, logits: Floats) -> None:
    subject.route(logits)


def check_optimal(d: Declaration, routing: Routing) -> None:
    """Raises LawBroken where an expert that was left out is certainly better than one that was chosen."""
    compared = keys(d, routing.logits, routing.radius)
    for token, chosen in enumerate(routing.ids):
        out = np.setdiff1d(np.arange(d.experts), chosen)
        if len(out) == 0:
            continue
        worst = chosen[np.argmin(compared.high[token, chosen])]
        best = out[np.argmax(compared.low[token, out])]
        if compared.low[token, best] > compared.high[token, worst]:
            raise LawBroken(
                f"found experts {chosen.tolist()}: {value(d, routing, compared, token, worst)} is chosen, "
                f"{value(d, routing, compared, token, best)} is not",
                token,
            )


def value(d: Declaration, routing: Routing, compared: Enclosure, token: int, expert: int) -> str:
    """An expert with its logit and the enclosure of its score, in words."""
    words = f"expert {expert} with logit {float(routing.logits[token, expert])!r}"
    if d.selection == "logits":
        return words
    low, high = (float(side[token, expert]) for side in (compared.low, compared.high))
    return f"{words} (relative score in [{low:.6g}, {high:.6g}])"


@law(
    "optimal-selection",
    "No expert left out has a larger logit (or biased score) than one that is chosen.",
    "ROUTE-2; Jiang et al. 2024, section 2.1",
    wide_batch,
    SEVERAL,
)
def optimal_selection(subject: Subject, logits: Floats) -> None:
    check_optimal(subject.declaration, subject.route(logits))


@law(
    "near-ties",
    "Logits a few places apart are told apart, except where scores of the declared arithmetic may coincide.",
    "ROUTE-2 within BOUND-1",
    close_batch,
    SEVERAL,
)
def near_ties(subject: Subject, logits: Floats) -> None:
    check_optimal(subject.declaration, subject.route(logits))


@law(
    "falling-order",
    "Each token's ids are in order of falling logit.",
    "ROUTE-2",
    wide_batch,
    Need("k > 1", lambda s: s.declaration.top_k > 1),
    Need("ids declared in falling order", lambda s: s.declaration.descending),
)
def falling_order(subject: Subject, logits: Floats) -> None:
    routing = subject.route(logits)
    compared = keys(subject.declaration, routing.logits, routing.radius)
    high = np.take_along_axis(compared.high, routing.ids, 1)
    low = np.take_along_axis(compared.low, routing.ids, 1)
    for token, slot in np.argwhere(low[:, 1:] > high[:, :-1])[:1]:
        row = routing.logits[token, routing.ids[token]].tolist()
        raise LawBroken(f"found ids {routing.ids[token].tolist()} with logits {row}: slot {slot + 1} is larger", token)


def seeming(subject: Subject, count: int) -> str:
    """The note of the law `tie-rule`."""
    return describe(seeming_rule(subject, count), subject.declaration)


@law(
    "tie-rule",
    "Of equal logits the declared id, lower or higher, is chosen, and comes first if the ids are in order.",
    "ROUTE-3",
    tied_batch,
    NO_BIAS,
    Need("exact logits: a gate with a column for each expert, or none", lambda s: exact(s.declaration)),
    note=seeming,
)
def tie_rule(subject: Subject, logits: Floats) -> None:
    d = subject.declaration
    routing = subject.route(logits)
    if d.ties == "unspecified":
        return
    expected = expected_ids(routing.logits, d.top_k, d.ties)
    found = routing.ids
    if not d.descending:
        expected, found = np.sort(expected, axis=1), np.sort(found, axis=1)
    for token in np.flatnonzero((expected != found).any(axis=1))[:1]:
        raise LawBroken(
            f"found ids {routing.ids[token].tolist()}, expected {expected[token].tolist()} by the declared rule "
            f"'{d.ties}'",
            int(token),
        )


def exact(d: Declaration) -> bool:
    """Whether the router sees exactly the logits of the example."""
    return d.gate is None or right_inverse(d)[1]
