# SPDX-License-Identifier: Apache-2.0
"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

from refmoe.spec.interface import Array, Ops, Weight
from refmoe.spec.softmax import softmax


def route(ops: Ops, x: Array, router: Weight, k: int) -> tuple[Array, Array]:
    """Choose k experts for every token.

    ROUTE-1  logits = x times the transpose of the router's matrix. It reads the normed hidden state that the
             experts read, and no noise or bias is added.
    ROUTE-2  The experts chosen are those of the k largest logits, in order of falling logit.
    ROUTE-3  Of equal logits the one with the lower expert id comes first.
    ROUTE-4  weights = softmax over the k chosen logits alone: they sum to 1. (Softmax over all experts,
             renormalised on the chosen, is the same number.)

    x: [T, D]   router: [E, D]   returns: expert ids, integers [T, k], and weights [T, k]
    Jiang et al. 2024, section 2.1.
    """
    logits = ops.tap("router.logits", ops.linear(x, router))
    chosen = ops.tap("router.experts", ops.top_k(logits, k))
    return chosen, ops.tap("router.weights", softmax(ops, ops.gather(logits, chosen)))
