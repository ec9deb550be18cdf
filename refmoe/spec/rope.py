# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding."""

from __future__ import annotations

from refmoe.spec.interface import Array, Ops


def rotary_table(ops: Ops, positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of every angle that a query or key at these positions is turned by.

    ROPE-1  The angle of pair i at position p is p * theta^(-2i / head_dim), for i = 0 .. head_dim/2 - 1.
    ROPE-2  Positions count from 0 at the first token of a sequence, cached tokens included, unscaled.

    positions: integers [T]   returns: two of [T, d/2]
    Su et al. 2021, "RoFormer", eq. 15.
    """
    return ops.unit_circle(positions, theta, range(0, head_dim, 2), head_dim)


def rotate(ops: Ops, x: Array, table: tuple[Array, Array]) -> Array:
    """Turn each pair of elements of each head by its angle.

    ROPE-3  Element i of a head pairs with element i + head_dim/2 (half-split). Checkpoints that pair 2i
            with 2i + 1 (interleaved) have the rows of their projections reordered when they are loaded.
    ROPE-4  (a, b) becomes (a cos - b sin, b cos + a sin): a turn counter-clockwise.
    ROPE-5  All heads turn alike; queries and keys turn, values do not.

    x: [T, heads, d]   table: two of [T, d/2]   returns: [T, heads, d]
    Su et al. 2021, eq. 34.
    """
    cos, sin = (part[:, None, :] for part in table)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return ops.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
