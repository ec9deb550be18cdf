# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine: the sparse layer as explicit moves of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.record import Routing, gates
from refmoe.spec.experts import combine as weighted_sum

ExpertFunction = Callable[[Array], Array]
"""One expert: rows [n, D] to rows [n, D'], each row for itself; n may be 0."""


@dataclass(frozen=True)
class Plan:
    """A permutation between the slots of a routing and the rows of the experts' batches.

    Slots are numbered t * k + j. The n kept slots, sorted by expert and within an expert by their place in the queue,
    are the rows; the slots that are not kept follow.
    """

    order: Array
    """Integers [T k]: the slot of each row. Entries from n on are the slots that are not kept."""
    rows: Array
    """Integers [T k]: the row of each slot, the inverse of `order`; n for a slot that is not kept."""
    counts: tuple[int, ...]
    """[E]: how many rows each expert has; they sum to n."""
    k: int


def make_plan(ops: ArrayOps, routing: Routing) -> Plan:
    """The row of every kept slot.

    DISPATCH-1  Rows are grouped by expert, expert 0 first. Within an expert they are in the order of the queue, which
                the sort does not disturb. Every kept slot has exactly one row, a slot that is not kept none.

    Batches are not padded; `buffers` pads them to [E, C, D], as GShard does.
    """
    k = routing.ids.shape[1]
    kept = ops.integers(routing.kept.reshape(-1))
    place = (routing.positions.reshape(-1) + 1) * kept
    by_place, _ = ops.group(place, len(kept) + 1)
    expert = routing.ids.reshape(-1) * kept + routing.experts * (1 - kept)
    by_expert, counts = ops.group(expert[by_place], routing.experts + 1)
    order = by_place[by_expert]
    rows = ops.inverse(order) * kept + (len(kept) - counts[-1]) * (1 - kept)
    return Plan(order, rows, tuple(counts[:-1]), k)


def dispatch(ops: ArrayOps, plan: Plan, x: Array) -> list[Array]:
    """The rows of each expert.

    DISPATCH-2  Row r is a copy of the token of slot order[r]; no weight is applied on the way in.

    x: [T, D]   returns: E arrays [n_e, D]
    """
    return [x[plan.order[start:stop] // plan.k] for start, stop in pairwise([0, *accumulate(plan.counts)])]


def buffers(ops: ArrayOps, routing: Routing, batches: Sequence[Array]) -> Array:
    """The experts' batches as one array of full buffers, unused places zero, as GShard's all-to-all sends them.

    DISPATCH-3  Place p of expert e holds row p of its batch; the places behind its n_e rows are zero.

    batches: E arrays [n_e, D]   returns: [E, C, D], C the capacity, or the largest n_e where there is none
    """
    size = max(map(len, batches)) if routing.capacity is None else routing.capacity
    width = batches[0].shape[1]
    padded = [
        ops.concatenate([rows, ops.array([[0.0] * width] * size).reshape(size, width)])[:size] for rows in batches
    ]
    return ops.concatenate([rows[None] for rows in padded])


def combine(ops: ArrayOps, routing: Routing, plan: Plan, outputs: Sequence[Array]) -> Array:
    """The weighted sum of the experts' rows, for each token.

    DISPATCH-4  y_t = sum over the kept slots j of weights[t, j] times the output of that slot's row (COMBINE-1). A
                token without a kept slot gets zero.

    outputs: E arrays [n_e, D']   returns: [T, D']
    """
    width = outputs[0].shape[1]
    nothing = ops.array([[0.0] * width])
    slots = ops.concatenate([*outputs, nothing])[plan.rows]
    return weighted_sum(ops, slots.reshape(-1, plan.k, width), routing.weights)


def mixture(ops: ArrayOps, routing: Routing, experts: Sequence[ExpertFunction], x: Array) -> Array:
    """The sparse layer: dispatch, run every expert on its own rows, combine.

    x: [T, D]   returns: [T, D']
    """
    plan = make_plan(ops, routing)
    batches = dispatch(ops, plan, x)
    return combine(ops, routing, plan, [run(rows) for run, rows in zip(experts, batches, strict=True)])


def dense_mixture(ops: ArrayOps, routing: Routing, experts: Sequence[ExpertFunction], x: Array) -> Array:
    """The sparse layer without moving rows: every expert on every token, and a mask. It is a check of `mixture`.

    DISPATCH-5  y_t = sum over all experts e of g[t, e] * f_e(x_t), where g[t, e] is the weight of the kept slot of t
                that has expert e, and zero where there is none. Under exact ops its bits are those of `mixture`: adding
                a zero changes no correctly rounded sum. (It needs finite outputs: zero times infinity is NaN.)

    x: [T, D]   returns: [T, D']
    """
    outputs = ops.concatenate([run(x)[:, None, :] for run in experts], axis=1)
    return ops.sum(outputs * gates(ops, routing)[:, :, None], axis=1)
