# SPDX-License-Identifier: Apache-2.0
"""The steps that sharding changes: attention and the experts. All other steps run as they are.

SHARD-7  What is not linear reads complete values, never a part of a sum: norms, softmax, the activation and the router
         come after the sum over ranks. The residual is added to the complete output, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from refmoe.arithmetic.arrays import Array
from refmoe.spec.model import Model, Steps


def all_reduce(partial: Sequence[Array]) -> Array:
    """The sum over ranks, in their order, in the dtype of accumulation (SHARD-6)."""
    total = partial[0]
    for each in partial[1:]:
        total = total + each
    return total


def attention(ops: Any, model: Model, layer: Any, x: Array, positions: Array, cache: Any) -> Any:
    """`refmoe.spec.attention.attention` over the ranks of `layer.attention`. x: [T, D]   returns: [T, D], the cache"""
    partial, cache = attention_partials(ops, model, layer, x, positions, cache)
    return ops.tap("attention.output", all_reduce(partial)), cache


def attention_partials(ops: Any, model: Model, layer: Any, x: Array, positions: Array, cache: Any) -> Any:
    """Each rank's part of the sum that is the output of attention.

    SHARD-12  A rank rotates and caches the key/value heads that it holds. A tap shows one copy of each head; copies are
              equal.

    Ranks stand side by side in one array. On every rank, query heads are in the same order as the heads that they read.
    So the attentions of all ranks are one attention over all heads held, copies included.

    x: [T, D]   returns: TP arrays [T, D], and the cache of all ranks, [S, heads held, d]
    """
    config, steps, ranks = model.config, model.steps, layer.attention
    held = [head for rank in ranks for head in rank.kv_heads]

    def project(name: str, heads: Sequence[int]) -> Array:
        """The projections of all ranks, one copy of each head, in order: [T, heads, d]"""
        parts = [ops.linear(x, getattr(rank, name)).reshape(x.shape[0], -1, config.head_dim) for rank in ranks]
        return ops.concatenate(parts, axis=1)[:, [heads.index(head) for head in sorted(set(heads))]]

    q = ops.tap("attention.q", project("wq", range(config.heads)))
    k = ops.tap("attention.k", project("wk", held))
    v = ops.tap("attention.v", project("wv", held))
    table = steps.rotary_table(ops, positions, config.head_dim, config.rope_theta)
    q_rope = ops.tap("attention.q_rope", steps.rotate(ops, q, table))
    k_rope = ops.tap("attention.k_rope", steps.rotate(ops, k, table))
    cache = steps.extend_cache(ops, cache, k_rope[:, held], v[:, held], positions)
    context = steps.attend(ops, q_rope, cache, steps.visible(positions, cache.positions, config.window))
    return [ops.linear(context[:, rank.heads].reshape(x.shape[0], -1), rank.wo) for rank in ranks], cache


def received(group: Any, chosen: Array) -> list[Array]:
    """The rows that each expert of a group gets.

    SHARD-9   Group g owns block g of a call's tokens: it routes them, each by its own row alone, and combines them.
    SHARD-11  Dispatch: for each slot of each token its owner sends the row to the group that holds the chosen expert,
              by the local id. Combine: the output comes back to the very slot, and is weighted there, by the weights
              that the owner routed it with.

    Owners stand side by side: their blocks in order are the call's tokens in order.

    chosen: integers [T, k]   returns: for each local id, the slots whose rows it gets, counted from the first token's
    """
    local = chosen.reshape(-1) - group.first
    return [(local == i).nonzero()[0] for i in range(len(group.experts))]


def run_experts(ops: Any, groups: Sequence[Any], x: Array, chosen: Array) -> Array:
    """`refmoe.steps.rounding.run_experts` over groups, and over the ranks of each.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    tokens, k = chosen.shape
    sent = [
        (expert, slots)
        for group in groups
        for expert, slots in zip(group.experts, received(group, chosen), strict=True)
        if len(slots)
    ]
    back = ops.inverse(ops.concatenate([slots for _, slots in sent]))

    def each(compute: Callable[[Any, Array], Array]) -> Array:
        """`compute(expert, slots)` of all experts, in slot order: [T, k, ...]"""
        return ops.concatenate([compute(expert, slots) for expert, slots in sent])[back].reshape(tokens, k, -1)

    def column_parallel(name: str) -> Array:
        return each(
            lambda expert, slots: ops.concatenate(
                [ops.linear(x[slots // k], getattr(rank, name)) for rank in expert], axis=-1
            )
        )

    def row_parallel(expert: Any, rows: Array) -> Array:
        partial, start = [], 0
        for rank in expert:
            width = rank.w2.shape[1]
            partial.append(ops.linear(rows[:, start : start + width], rank.w2))
            start += width
        return all_reduce(partial)

    gate = ops.tap("expert.gate", column_parallel("w1"))
    up = ops.tap("expert.up", column_parallel("w3"))
    hidden = ops.tap("expert.hidden", ops.silu(gate) * up).reshape(tokens * k, -1)
    return ops.tap("expert.output", each(lambda expert, slots: row_parallel(expert, hidden[slots])))


def sharded(steps: Steps) -> Steps:
    """The steps over the ranks of a model that `shard` made."""
    return replace(steps, attention=attention, run_experts=run_experts)
