# SPDX-License-Identifier: Apache-2.0
"""The record that every router of the family returns."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.arithmetic.arrays import Array, ArrayOps


@dataclass(frozen=True)
class Routing:
    """Which experts every token goes to, with what weight, and its place in each expert's queue.

    Token t has k slots; its slot j asks for expert ids[t, j]. A router in which the experts choose the tokens
    (`refmoe.routers.literature.expert_choice`) has one slot per expert: k = E and ids[t, j] = j.
    """

    ids: Array
    """Integers [T, k]: the expert of each slot, distinct within a token, 0 .. experts - 1."""
    weights: Array
    """[T, k]: the factor of the expert's output; exactly zero where the slot is not kept."""
    asked: Array
    """Booleans [T, k]: the slot is asked for. False where chance refused it (GSHARD-3) or no expert chose it."""
    kept: Array
    """Booleans [T, k]: the slot is computed: asked, and the expert had room."""
    positions: Array
    """Integers [T, k]: the place in the expert's queue, first 0; -1 for a slot that is in no queue."""
    experts: int
    """E, the number of experts."""
    capacity: int | None
    """How many slots an expert computes; None: as many as ask."""


def gates(ops: ArrayOps, routing: Routing) -> Array:
    """The routing as a matrix: the weight of each token on each expert, zero where it does not go.

    returns: [T, E]
    """
    goes = (routing.ids[:, :, None] == ops.integers(range(routing.experts))) & routing.kept[:, :, None]
    return ops.sum(ops.where(goes, routing.weights[:, :, None], 0.0), axis=1)
