# SPDX-License-Identifier: Apache-2.0
"""Capacity: how many slots an expert computes, and which of them when too many ask."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from math import ceil

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.record import Routing


def expert_capacity(tokens: int, experts: int, factor: float | Fraction, k: int = 1) -> int:
    """How many slots one expert computes.

    CAP-1  C = factor * k * T / E, rounded up, at least 1. The factor means its decimal digits: 1.1 is 11/10.

    Fedus et al. 2021, eq. 3, with k = 1; the equation does not say how it rounds. Rounded up, a perfectly balanced
    routing loses nothing at factor 1 whatever T is. (Mesh TensorFlow rounds down, lingvo then up to a multiple of 4.)
    """
    exact = factor if isinstance(factor, Fraction) else Fraction(str(factor))
    return max(1, ceil(exact * k * tokens / experts))


def queue(ops: ArrayOps, ids: Array, experts: int, counted: Array | None = None) -> Array:
    """The place of every slot in the queue of its expert.

    CAP-2  Priority: slot 0 of all tokens in token order, then slot 1 of all tokens, and so on. A slot's place is the
           number of counted slots of the expert before it. A slot that is not counted has no place: -1.

    ids: integers [T, k]   counted: booleans [T, k]; None: all   returns: integers [T, k]
    Lepikhin et al. 2020, "GShard", algorithm 1, lines 4 to 23.
    """
    tokens, k = ids.shape
    inside = ops.integers(ids >= 0 if counted is None else counted)
    line = (
        (ids * inside + experts * (1 - inside)).transpose(1, 0).reshape(-1)
    )  # slot-major; the uncounted in a last group
    order, counts = ops.group(line, experts + 1)
    starts = ops.integers([0, *accumulate(counts)])
    places = (ops.inverse(order) - starts[line]).reshape(k, tokens).transpose(1, 0)
    return places * inside - (1 - inside)


def admit(
    ops: ArrayOps, ids: Array, weights: Array, experts: int, capacity: int | None = None, asked: Array | None = None,
    refused_take_a_place: bool = False,
) -> Routing:  # fmt: skip
    """The routing of slots that are asked for, limited by the capacity.

    CAP-3  A slot is kept when it is asked for and its place is below the capacity. The others are dropped, and the
           layer adds nothing for them: the residual alone carries the token on.
    CAP-4  The weights of the kept slots stay as the router gave them. A dropped slot's weight is not redistributed.

    ids: integers [T, k]   weights: [T, k]   asked: booleans [T, k]; None: all
    refused_take_a_place: whether a slot that is not asked for still has a place in the queue (GSHARD-4)
    """
    everything = ids >= 0
    wanted = everything if asked is None else asked
    positions = queue(ops, ids, experts, everything if refused_take_a_place else wanted)
    kept = wanted if capacity is None else wanted & (positions < capacity)
    return Routing(
        ids=ids,
        weights=ops.where(kept, weights, 0.0),
        asked=wanted,
        kept=kept,
        positions=positions,
        experts=experts,
        capacity=capacity,
    )
