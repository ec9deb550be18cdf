# SPDX-License-Identifier: Apache-2.0
"""The steps in which the spec loops over heads or experts, with fewer and larger products.

In exact arithmetic the bits are those of the spec. In native arithmetic the last bits may differ.
`tests/steps/test_grouped.py` compares these steps with the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.spec.attention import Cache
from refmoe.spec.experts import Expert, run_expert
from refmoe.spec.model import Steps
from refmoe.spec.softmax import softmax
from refmoe.spec.taps import offer

EXPERT_TAPS = ("gate", "up", "hidden", "output")


def attend(ops: ArrayOps, q: Array, cache: Cache, mask: Array) -> Array:
    """`refmoe.spec.attention.attend`, with one product for all query heads that share a key/value head.

    q: [T, H, d]   cache: S tokens   mask: [T, S]   returns: [T, H, d]
    """
    tokens, heads, head_dim = q.shape
    k: Array = cache.k
    v: Array = cache.v
    rows = grouped_by_kv_head(q, k.shape[1])
    dots = ops.matmul(rows, k.transpose(1, 2, 0)).reshape(heads, tokens, -1)
    scores = ops.tap("attention.scores", dots / ops.sqrt(ops.array(head_dim)))
    probs: Array = ops.tap("attention.probs", softmax(ops, scores, mask[None]))
    mixed = ops.matmul(probs.reshape(len(rows), -1, probs.shape[-1]), v.transpose(1, 0, 2))
    return ops.tap("attention.context", mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2))


def grouped_by_kv_head(q: Array, kv_heads: int) -> Array:
    """The rows that are multiplied by each key/value head: its query heads one after another.

    q: [T, H, d]   returns: [K, H / K * T, d]
    """
    tokens, heads, head_dim = q.shape
    by_head = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)
    return by_head.reshape(kv_heads, -1, head_dim)


def run_experts(ops: ArrayOps, experts: Sequence[Expert], x: Array, chosen: Array) -> Array:
    """`refmoe.spec.experts.run_experts`, with the rows sorted by expert once.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """

    def run(parts: Sequence[tuple[int, Array]]) -> list[tuple[Array, ...]]:
        return [run_expert(ops, experts[e], rows) for e, rows in parts]

    return by_expert(ops, len(experts), x, chosen, run)


def by_expert(
    ops: ArrayOps, experts: int, x: Array, chosen: Array,
    run: Callable[[Sequence[tuple[int, Array]]], Sequence[tuple[Array, ...]]],
) -> Array:  # fmt: skip
    """The outputs of the chosen experts, as `run` computes them.

    run: from (expert id, its rows [n, D]) of each expert that a token chose to its gate, up, hidden and output
    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    order, counts = ops.group(chosen.reshape(-1), experts)
    rows, parts, start = x[order // chosen.shape[1]], [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, rows[start : start + count]))
            start += count
    slot, results = ops.inverse(order), run(parts)
    values = {
        name: ops.concatenate(pieces)[slot].reshape(*chosen.shape, -1)
        for name, pieces in zip(EXPERT_TAPS, zip(*results, strict=True), strict=True)
    }
    return offer(ops, "expert", **values)


GROUPED_STEPS = Steps(attend=attend, run_experts=run_experts)
"""The steps of the spec, with the two that have loops replaced."""
