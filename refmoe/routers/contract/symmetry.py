# SPDX-License-Identifier: Apache-2.0
"""Laws of symmetry: changes of the input that do not change the result, or change it in a known direction."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken, Raised
from refmoe.contracts.drawing import block_counts, permutations
from refmoe.contracts.formats import Floats, Ints, rounded
from refmoe.contracts.law import Example, Need, Strategy
from refmoe.routers.contract import examples as kinds
from refmoe.routers.contract.bounds import keys, weight_slack
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import EVERYTHING, MODERATE, batches, coarse, plain
from refmoe.routers.contract.law import NO_BIAS, NO_CAPACITY, law
from refmoe.routers.contract.subject import Routing, Subject
from refmoe.routers.contract.weights import same_routing


def with_expert_order(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, (plain, kinds.skewed)), "order": permutations(d.experts)})


@law(
    "expert-permutation",
    "Experts are known by their logits alone: permuting the experts permutes the ids and nothing else.",
    "Equivariance; ROUTE-2, ROUTE-4",
    with_expert_order,
    NO_BIAS,
)
def expert_permutation(subject: Subject, logits: Floats, order: Ints) -> None:
    before, after = subject.route(logits), subject.route(logits[:, order])
    back = Routing(logits, before.radius, order[after.ids], after.weights)
    same_routing(subject.declaration, before, back, f"when the experts stand in the order {order.tolist()}")


def with_token_order(d: Declaration) -> Strategy:
    def cut(logits: Floats, order: Ints) -> Example:
        return {"logits": logits, "order": order[order < len(logits)]}

    return st.builds(cut, batches(d, MODERATE, 6), permutations(6))


def rows(routing: Routing, pick: Ints) -> Routing:
    """Some tokens of a call."""
    return Routing(routing.logits[pick], routing.radius[pick], routing.ids[pick], routing.weights[pick])


@law(
    "token-permutation",
    "A token's place in the batch does not matter: permuting the tokens permutes the rows of the result.",
    "Equivariance; ROUTE-2, ROUTE-4",
    with_token_order,
    NO_CAPACITY,
)
def token_permutation(subject: Subject, logits: Floats, order: Ints) -> None:
    before, after = subject.route(logits), subject.route(logits[order])
    same_routing(
        subject.declaration, rows(before, order), after, f"when the tokens stand in the order {order.tolist()}"
    )


def with_other_tokens(d: Declaration) -> Strategy:
    def cut(logits: Floats, others: Floats, kept: int, poison: bool) -> Example:
        return {"logits": logits, "others": others[: len(logits)], "kept": kept % len(logits), "poison": poison}

    poison = st.booleans() if d.nan != "raise" else st.just(False)
    return st.builds(cut, batches(d, MODERATE, 4, 2), batches(d, EVERYTHING, 4, 4), st.integers(0, 3), poison)


@law(
    "other-tokens",
    "A token's result does not depend on the other tokens' logits, be they extreme or NaN.",
    "ROUTE-2, ROUTE-4: each row for itself",
    with_other_tokens,
    NO_CAPACITY,
)
def other_tokens(subject: Subject, logits: Floats, others: Floats, kept: int, poison: bool) -> None:
    before = subject.route(logits)
    changed = others.copy()
    if poison:
        changed[:, 0] = np.nan
    changed[kept] = logits[kept]
    try:
        after = subject.route(changed)
    except LawBroken as broken:
        if poison and (isinstance(broken, Raised) or broken.token not in (None, kept)):
            return  # another law judges the result of a token that is NaN itself
        raise
    pick = np.array([kept])
    same_routing(subject.declaration, rows(before, pick), rows(after, pick), "when the other tokens are changed")


def with_count(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, MODERATE), "tokens": block_counts()})


@law(
    "batch-size",
    "A token's result does not depend on how many tokens there are, around block sizes least of all.",
    "ROUTE-2, ROUTE-4: each row for itself",
    with_count,
    NO_CAPACITY,
)
def batch_size(subject: Subject, logits: Floats, tokens: int) -> None:
    pick = np.arange(tokens) % len(logits)
    before, after = subject.route(logits), subject.route(logits[pick])
    same_routing(subject.declaration, rows(before, pick), after, f"in a batch of {tokens}, these tokens over and over")


SHIFTS = (1.0, -1.0, 16.0, -16.0, 128.0, -128.0, 1024.0, -1024.0)


def with_shift(d: Declaration) -> Strategy:
    def exact(logits: Floats, shift: float) -> Example:
        """The drawn shift, made smaller until adding it to the logits is exact."""
        while (rounded(logits + shift, d.given) != logits + shift).any():
            shift /= 8
        return {"logits": logits, "shift": shift}

    return st.builds(exact, batches(d, (coarse, kinds.ties)), st.sampled_from(SHIFTS))


@law(
    "shift",
    "Adding one constant to all logits of a token changes nothing.",
    "SOFTMAX-1",
    with_shift,
    Need("softmax, or a declared invariance to shifts", lambda s: s.declaration.any_shift),
)
def shift_invariance(subject: Subject, logits: Floats, shift: float) -> None:
    before, after = subject.route(logits), subject.route(logits + shift)
    same_routing(subject.declaration, before, after, f"when {shift:g} is added to every logit")


def with_raise(d: Declaration) -> Strategy:
    return st.fixed_dictionaries(
        {
            "logits": batches(d, (plain, coarse, kinds.ties)),
            "slot": st.integers(0, 7),
            "by": st.sampled_from([0.5, 1.0, 4.0]),
        }
    )


@law(
    "monotone",
    "The larger logit never has the smaller weight, and raising a chosen expert's logit neither drops it nor lowers "
    "its weight.",
    "ROUTE-2, ROUTE-4: scores increase with the logit",
    with_raise,
)
def monotone(subject: Subject, logits: Floats, slot: int, by: float) -> None:
    d = subject.declaration
    slot %= d.top_k
    before = subject.route(logits)
    check_falling_weights(d, before)
    lifted = logits.copy()
    lifted[np.arange(len(logits)), before.ids[:, slot]] += by
    after = subject.route(rounded(lifted, d.given))
    for token, expert in enumerate(before.ids[:, slot].tolist()):
        found = after.ids[token].tolist()
        if expert not in found:
            now = keys(d, after.logits, after.radius)
            if now.low[token, expert] > now.high[token, found].min():
                raise LawBroken(f"expert {expert} was chosen; {by:g} was added to its logit, and it is not", token)
            continue
        old, new = float(before.weights[token, slot]), float(after.weights[token, found.index(expert)])
        if new < old and set(found) == set(before.ids[token].tolist()):
            room = weight_slack(d, before)[token, slot] + weight_slack(d, after)[token, found.index(expert)]
            if new < old - room:
                raise LawBroken(f"expert {expert} had weight {old!r}; {by:g} was added to its logit: {new!r}", token)


def check_falling_weights(d: Declaration, routing: Routing) -> None:
    """Raises LawBroken where, of two chosen experts, the one with the larger logit has the smaller weight."""
    chosen = np.take_along_axis(routing.logits, routing.ids, 1)
    order = np.argsort(-chosen, axis=1, kind="stable")
    sorted_logits = np.take_along_axis(chosen, order, 1)
    apart = sorted_logits[:, :-1] - sorted_logits[:, 1:] > 2 * routing.radius.max(axis=1, keepdims=True)
    weights = np.take_along_axis(routing.weights, order, 1)
    rising = apart & (weights[:, :-1] < weights[:, 1:])
    if not rising.any():
        return
    slack = np.take_along_axis(weight_slack(d, routing), order, 1)
    wrong = rising & (weights[:, :-1] + slack[:, :-1] + slack[:, 1:] < weights[:, 1:])
    for token, place in np.argwhere(wrong)[:1]:
        a, b = (routing.ids[token, order[token, place + offset]] for offset in (0, 1))
        first, second = (float(weights[token, place + offset]) for offset in (0, 1))
        words = f"expert {a} has the larger logit and weight {first!r}, expert {b} has weight {second!r}"
        raise LawBroken(words, int(token))
