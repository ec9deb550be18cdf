# SPDX-License-Identifier: Apache-2.0
"""Expert choice: the experts choose the tokens."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax


def expert_choice(ops: ArrayOps, logits: Array, capacity: int) -> Routing:
    """Every expert takes the `capacity` tokens that score highest with it.

    CHOICE-1  S = softmax(logits) over the experts, row by row.
    CHOICE-2  Expert e takes the C tokens with the largest S[t, e], of equal ones the lower token. C = T * c / E, where
              a token has c experts on average: CAP-1 with factor c. No expert overflows, as the load is even.
    CHOICE-3  The weight of a token on an expert that took it is S[t, e], not normalised: a token may have every expert
              or none.
    CHOICE-4  A token's experts depend on the other tokens of the batch, also on later ones.

    logits: [T, E]   capacity: C, at most T
    returns: k = E slots per token, slot e for expert e, asked and kept where the expert chose; positions[t, e] is the
        rank of token t with expert e
    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2.
    """
    tokens, experts = logits.shape
    scores: Array = softmax(ops, logits)
    ranking = ops.top_k(scores.transpose(1, 0), tokens)
    positions = ops.concatenate([ops.inverse(order)[:, None] for order in ranking], axis=1)
    taken = positions < capacity
    ids = ops.integers(range(experts)) + positions * 0
    return Routing(
        ids=ids,
        weights=ops.where(taken, scores, 0.0),
        asked=taken,
        kept=taken,
        positions=positions,
        experts=experts,
        capacity=capacity,
    )
