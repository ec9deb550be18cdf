# SPDX-License-Identifier: Apache-2.0
"""ST-MoE: top-n gating with a threshold for the later choices, and the router z-loss."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.losses import load_balancing_loss, router_z_loss
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax

BALANCE_COEFFICIENT = 0.01
Z_COEFFICIENT = 0.001


def st_moe(
    ops: ArrayOps,
    logits: Array,
    capacity: int | None,
    uniforms: Array | None = None,
    k: int = 2,
    threshold: float = 0.2,
) -> Routing:
    """Top-k gating in which a later choice is computed with a probability that grows with its weight.

    STMOE-1  The experts of the k largest logits, of equal ones the lower id first; weights = softmax over them.
    STMOE-2  The first choice is always asked for; a later one when weight > threshold * u, u uniform in [0, 1), so with
             probability min(1, weight / threshold). Without `uniforms` all choices are asked for.
    STMOE-3  A choice that chance refused takes no place in the queue.
    STMOE-4  Capacity as in CAP-1 to CAP-4: factor 1.25 in training, 2 in evaluation, of T / E tokens (k = 1 in CAP-1).

    logits: [T, E]   capacity: C; None: no limit   uniforms: [T, k - 1]
    Zoph et al. 2022, "ST-MoE"; the threshold as in `_top_2_gating` of mesh_tensorflow/transformer/moe.py, which is for
    k = 2.
    """
    ids = ops.top_k(logits, k)
    weights = softmax(ops, ops.gather(logits, ids))
    asked = ids >= 0
    if uniforms is not None:
        asked = ops.concatenate([asked[:, :1], weights[:, 1:] > uniforms * threshold], axis=1)
    return admit(ops, ids, weights, logits.shape[1], capacity, asked)


def st_moe_loss(ops: ArrayOps, logits: Array) -> Array:
    """The auxiliary loss, with its coefficients, which training adds to the cross entropy.

    STMOE-5  loss = 0.01 * L_B + 0.001 * L_z: L_B the load-balancing loss of the first choices (SWITCH-4), L_z the
             router z-loss (AUX-6), which keeps logits small for the sake of low precision.

    logits: [T, E]   returns: a scalar
    Zoph et al. 2022, eq. 5 and 6.
    """
    balance = load_balancing_loss(ops, [logits], 1)
    return balance * BALANCE_COEFFICIENT + router_z_loss(ops, logits) * Z_COEFFICIENT
