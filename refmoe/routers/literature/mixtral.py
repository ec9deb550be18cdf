# SPDX-License-Identifier: Apache-2.0
"""Mixtral: softmax over the k largest logits, no capacity."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax


def mixtral(ops: ArrayOps, logits: Array, k: int = 2) -> Routing:
    """The router of `refmoe.spec.router`, from its logits on (ROUTE-2, ROUTE-3, ROUTE-4).

    G(x) = softmax(top-k(x Wg)): the k largest logits, of equal ones the lower expert id, weights that sum to 1.
    No token is dropped. In training, Hugging Face adds `refmoe.routers.literature.losses.load_balancing_loss`.

    logits: [T, E]
    Jiang et al. 2024, "Mixtral of Experts", section 2.1.
    """
    ids = ops.top_k(logits, k)
    return admit(ops, ids, softmax(ops, ops.gather(logits, ids)), logits.shape[1])
