# SPDX-License-Identifier: Apache-2.0
"""Laws of special logits: masked experts, NaN and infinity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken, Raised
from refmoe.contracts.drawing import marks
from refmoe.contracts.formats import Booleans, Floats
from refmoe.contracts.law import Need, Strategy
from refmoe.routers.contract.declaration import Behaviour, Declaration
from refmoe.routers.contract.examples import MODERATE, batches
from refmoe.routers.contract.law import LOGITS, NO_BIAS, NO_CAPACITY, law
from refmoe.routers.contract.selection import check_optimal
from refmoe.routers.contract.subject import Subject
from refmoe.routers.contract.symmetry import rows
from refmoe.routers.contract.weights import same_routing, weight_values


def with_mask(d: Declaration) -> Strategy:
    def unless_all(mask: Booleans) -> Booleans:
        return mask & ~mask.all()

    masks = marks(d.experts, 3).map(unless_all)
    return st.fixed_dictionaries({"logits": batches(d, MODERATE), "masked": masks})


@law(
    "masked-experts",
    "An expert with logit -Inf has weight zero, is not chosen while others are left, and the rest is routed as if it "
    "were not there.",
    "SOFTMAX-2: a masked element is exactly zero and takes no part",
    with_mask,
    LOGITS,
    NO_BIAS,
)
def masked_experts(subject: Subject, logits: Floats, masked: Booleans) -> None:
    d = subject.declaration
    given = np.where(masked, -np.inf, logits)
    routing = subject.route(given)
    check_optimal(d, routing)  # its enclosures allow that the score of an unmasked expert has underflowed to zero
    for token, chosen in enumerate(routing.ids):
        useless = masked[chosen]
        if (routing.weights[token, useless] != 0).any():
            weights = routing.weights[token, useless].tolist()
            raise LawBroken(f"experts {chosen[useless].tolist()} with logit -Inf have weights {weights}, not 0", token)
    if (~masked).sum() < d.top_k:  # an expert of the lowest logit is then chosen, and its weight is small but not zero
        if d.scoring != "other":
            weight_values.check(subject, given)
        return
    lowest = np.where(masked, logits.min(axis=1, keepdims=True) - 64, logits)
    same_routing(d, subject.route(lowest), routing, "when experts with the lowest logits get -Inf instead")


def with_special(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, MODERATE, 3), "spots": marks(d.experts, 4)})


def as_declared(subject: Subject, logits: Floats, row: Floats, name: str, behaviour: Behaviour) -> None:
    """With `row` as the last token, the router must raise, or give a NaN weight to that token only, as declared."""
    given, last = logits.copy(), len(logits) - 1
    given[last] = row
    try:
        routing = subject.route(given)
    except Raised:
        if behaviour == "raise":
            return
        raise
    if behaviour == "raise":
        raise LawBroken(f"the router returned weights {routing.weights[-1].tolist()}; it was declared to raise", last)
    if not np.isnan(routing.weights[-1]).any():
        raise LawBroken(
            f"found ids {routing.ids[-1].tolist()} with weights {routing.weights[-1].tolist()}: {name} is swallowed",
            last,
        )
    others = np.arange(len(logits) - 1)
    same_routing(subject.declaration, rows(subject.route(logits), others), rows(routing, others), f"after {name}")


def declared(field: str) -> Need:
    """The need of a declared behaviour."""
    get: Callable[[Subject], bool] = lambda s: getattr(s.declaration, field) != "unspecified"  # noqa: E731
    return Need(f"a declared behaviour: {field}", get)


@law(
    "nan",
    "A token with a NaN among its logits raises or gets a weight that is NaN, as declared, and no other token notices.",
    "IEEE 754-2019, 6.2: a NaN operand gives a NaN",
    with_special,
    declared("nan"),
    NO_CAPACITY,
)
def nan(subject: Subject, logits: Floats, spots: Booleans) -> None:
    row = np.where(spots if spots.any() else np.arange(len(spots)) == 0, np.nan, logits[-1])
    as_declared(subject, logits, row, "NaN", subject.declaration.nan)


@law(
    "infinity",
    "A token with +Inf among its logits raises or gets a weight that is NaN (Inf - Inf), as declared.",
    "SOFTMAX-1; IEEE 754-2019, 7.2",
    with_special,
    declared("infinity"),
    LOGITS,
    NO_CAPACITY,
)
def infinity(subject: Subject, logits: Floats, spots: Booleans) -> None:
    row = np.where(spots if spots.any() else np.arange(len(spots)) == 0, np.inf, logits[-1])
    as_declared(subject, logits, row, "+Inf", subject.declaration.infinity)


@law(
    "all-masked",
    "A token whose logits are all -Inf raises or gets a weight that is NaN (Inf - Inf), as declared.",
    "SOFTMAX-2 asks for one unmasked element; IEEE 754-2019, 7.2",
    with_special,
    declared("all_masked"),
    LOGITS,
    NO_CAPACITY,
)
def all_masked(subject: Subject, logits: Floats, spots: Booleans) -> None:
    row = np.full(len(spots), -np.inf)
    as_declared(subject, logits, row, "a token of nothing but -Inf", subject.declaration.all_masked)
