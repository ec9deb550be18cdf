# SPDX-License-Identifier: Apache-2.0
"""Switch Transformers: one expert per token, with capacity."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.losses import load_balancing_loss
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax


def switch(ops: ArrayOps, logits: Array, capacity: int | None) -> Routing:
    """Each token to its most probable expert, while there is room.

    SWITCH-1  p = softmax(logits) over all experts (eq. 1); the expert is the one with the largest logit, of equal ones
              the lower id.
    SWITCH-2  The weight is p of that expert (eq. 2). It is not normalised to 1, so that the router learns through it.
    SWITCH-3  An expert computes the first C tokens that choose it, in token order (CAP-1 to CAP-4); the rest are
              dropped.

    logits: [T, E]   capacity: C of CAP-1; None: no token is dropped
    Fedus et al. 2021, "Switch Transformers", section 2.1 and 2.2.
    """
    ids = ops.top_k(logits, 1)
    return admit(ops, ids, ops.gather(softmax(ops, logits), ids), logits.shape[1], capacity)


def switch_loss(ops: ArrayOps, logits: Array) -> Array:
    """The load-balancing loss, without its coefficient alpha = 0.01.

    SWITCH-4  loss = E * sum over experts of f_e * P_e, f_e the fraction of tokens whose choice is e, before any is
              dropped, and P_e the mean of p_e: AUX-1 to AUX-3 with k = 1. It is 1 when f or P is uniform.

    logits: [T, E]   returns: a scalar
    Fedus et al. 2021, eq. 4 to 6.
    """
    return load_balancing_loss(ops, [logits], 1)
