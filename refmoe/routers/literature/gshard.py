# SPDX-License-Identifier: Apache-2.0
"""GShard and GLaM: two experts per token, with capacity, the second one by chance."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.losses import load_balancing_loss
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax


def gshard(ops: ArrayOps, logits: Array, capacity: int | None, uniforms: Array | None = None) -> Routing:
    """Top-2 gating of one group of tokens.

    GSHARD-1  e1, e2 = the experts of the two largest gates of softmax(logits), of equal logits the lower id first.
    GSHARD-2  Their weights are g1 / (g1 + g2) and g2 / (g1 + g2), which is the softmax over the two logits.
    GSHARD-3  The second expert is asked for when 2 * weight2 > u, u uniform in [0, 1): in proportion to its weight.
              Without `uniforms` it always is; that is GLaM's top-2.
    GSHARD-4  A second choice that chance refused still takes a place in the queue (algorithm 1, line 22).
              Mesh TensorFlow and lingvo, released by the same authors, give it none: STMOE-3.
    GSHARD-5  All first choices have priority over all second ones; a choice without room is dropped (CAP-2 to CAP-4).

    logits: [T, E], E >= 2   capacity: C of CAP-1; None: no limit   uniforms: [T]
    Lepikhin et al. 2020, "GShard", algorithm 1; Du et al. 2021, "GLaM".
    """
    ids = ops.top_k(logits, 2)
    weights: Array = softmax(ops, ops.gather(logits, ids))
    asked = ids >= 0
    if uniforms is not None:
        asked = ops.concatenate([asked[:, :1], (2 * weights[:, 1:] > uniforms[:, None])], axis=1)
    return admit(ops, ids, weights, logits.shape[1], capacity, asked, refused_take_a_place=True)


def gshard_loss(ops: ArrayOps, logits: Array) -> Array:
    """The auxiliary loss of one group, without its coefficient.

    GSHARD-6  loss = (1 / E) * sum over experts of (c_e / S) * m_e; c_e of the S tokens have e as first choice, dropped
              or not; m_e is the mean gate. It is the loss of SWITCH-4 over E^2, so 1 / E^2 when c or m is uniform.

    logits: [T, E]   returns: a scalar
    Lepikhin et al. 2020, algorithm 1, line 13. GLaM adds it times 0.01.
    """
    experts = logits.shape[1]
    return load_balancing_loss(ops, [logits], 1) / (experts * experts)
