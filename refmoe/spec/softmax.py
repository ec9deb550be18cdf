# SPDX-License-Identifier: Apache-2.0
"""The softmax of attention and router."""

from __future__ import annotations

from refmoe.spec.interface import Array, Ops


def softmax(ops: Ops, x: Array, mask: Array | None = None) -> Array:
    """exp(x) divided by its sum over the last axis.

    SOFTMAX-1  The largest unmasked element of the row is subtracted first: exp never overflows, and the
               result is unchanged in exact arithmetic.
    SOFTMAX-2  A masked element is exactly zero and takes no part in the maximum or the sum.

    x: [..., n]   mask: booleans that broadcast to x, at least one true per row   returns: [..., n]
    """
    if mask is None:
        weight = ops.exp(x - ops.max(x, axis=-1)[..., None])
    else:
        shifted = x - ops.max(ops.where(mask, x, float("-inf")), axis=-1)[..., None]
        weight = ops.where(mask, ops.exp(ops.where(mask, shifted, 0.0)), 0.0)
    return weight / ops.sum(weight, axis=-1)[..., None]
