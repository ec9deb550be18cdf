# SPDX-License-Identifier: Apache-2.0
"""Attention for `NativeOps`: heads in parallel lanes, and fewer intermediate arrays.

It runs only where no tap is set. A tap needs the arrays that this step avoids, so the spec's step runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native.lanes import lanes
from refmoe.arithmetic.native.ops import ALL, SIDE_BY_SIDE, Part
from refmoe.spec.attention import Cache, visible
from refmoe.spec.rope import rotary_table
from refmoe.steps.native_cache import with_room

Native = Any
"""A `NativeOps`, typed as Any because its weights can be read, while those of the spec's `Ops` only have a shape."""

QUERIES = 128
"""Queries that attend at a time. Keys that are hidden from all of them are skipped."""

Table = tuple[Array, Array]


@dataclass(frozen=True)
class Block:
    """A range of queries and the keys that any of them sees."""

    queries: slice
    keys: slice
    hidden: Array | None
    """0 or -inf for each pair of query and key; None if every query sees every key."""


def once(ops: Native, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(ops, *arguments)`, which all layers of a forward pass share. It is kept until the arguments change."""
    last = ops.memo.get(function)
    if last is None or any(a is not b for a, b in zip(last[0], arguments, strict=True)):
        last = ops.memo[function] = arguments, function(ops, *arguments)
    return last[1]


def tables(ops: Native, positions: Array, head_dim: int, theta: float) -> tuple[Table, Table]:
    """`refmoe.spec.rope.rotary_table` for queries (divided by sqrt(head_dim)) and for keys.

    returns: two of [T, d/2], two of [T, 1, d/2]
    """
    cos, sin = rotary_table(ops, positions, head_dim, theta)
    scale = ops.sqrt(ops.array(head_dim))
    return (cos / scale, sin / scale), (cos[:, None], sin[:, None])


def blocks(ops: Native, positions: Array, cached: Array, window: int | None) -> list[Block]:
    """The blocks of `refmoe.spec.attention.visible`. positions: integers [T]   cached: integers [S], consecutive"""
    if len(positions) == 1:
        first = 0 if window is None else max(len(cached) - window, 0)
        return [Block(slice(0, 1), slice(first, len(cached)), None)]
    mask: Array = visible(positions, cached, window)
    found = []
    for start in range(0, len(mask), QUERIES):
        queries = slice(start, start + QUERIES)
        seen = np.flatnonzero(mask[queries].any(axis=0))
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        part = mask[queries, keys]
        hidden = None if part.all() else np.where(part, ops.dtype.type(0), ops.dtype.type("-inf"))
        found.append(Block(queries, keys, hidden))
    return found


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """`refmoe.spec.rope.rotate` with any axes before the last. x, returns: [..., d]   cos, sin: [..., d/2]"""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    turned = np.empty(x.shape, x.dtype)
    first, second = turned[..., :half], turned[..., half:]
    np.multiply(a, cos, out=first)
    first -= b * sin
    np.multiply(b, cos, out=second)
    second += a * sin
    return turned


def attention(ops: Native, model: Any, layer: Any, x: Array, positions: Array, cache: Cache | None) -> Any:
    """`refmoe.spec.attention.attention`. x: [T, D]   returns: [T, D] and the extended cache

    Heads are divided among lanes. Each lane projects, rotates, attends and projects back for its own heads, and the
    results are added. Shoeybi et al. 2019, "Megatron-LM", section 3, does so with several devices.
    """
    config, tokens = model.config, len(x)
    d, share = config.head_dim, config.heads // config.kv_heads
    cache = with_room(cache, positions, config.kv_heads, d, x.dtype)
    of_queries, of_keys = once(ops, tables, positions, d, config.rope_theta)
    seen = once(ops, blocks, positions, cache.positions, config.window)
    keys: Array = cache.k
    values: Array = cache.v
    ready = ops.ready(x)

    def contribution(group: slice) -> Array:
        """The part of the output that a group of key/value heads and their query heads add. Writes keys and values."""
        rows, query_rows = scaled(group, d), scaled(group, share * d)
        parts = (Part(layer.wq, query_rows), Part(layer.wk, rows), Part(layer.wv, rows))
        projected = product(ops, ready, parts).reshape(tokens, -1, d)
        heads = projected.shape[1] // (share + 2)
        q, k, v = np.split(projected, (heads * share, heads * (share + 1)), axis=1)
        keys[-tokens:, group], values[-tokens:, group] = rotate(k, *of_keys), v
        q = q.reshape(tokens, heads, share, d)
        context = np.empty(q.shape, q.dtype)
        for block in seen:
            mix(ops, q, of_queries, keys[:, group], values[:, group], context, block)
        return product(ops, context.reshape(tokens, -1), (Part(layer.wo, ALL, query_rows),))

    groups = min(lanes().count, config.kv_heads) if tokens >= SIDE_BY_SIDE and not ops.streams(layer.wq) else 1
    if groups == 1:
        return contribution(ALL), cache
    for weight in (layer.wq, layer.wk, layer.wv, layer.wo):
        ops.hold(weight, tokens)
    outputs: dict[int, Array] = {}

    def run(i: int) -> None:
        outputs[i] = contribution(slice(config.kv_heads * i // groups, config.kv_heads * (i + 1) // groups))

    lanes().run([partial(run, i) for i in range(groups)])
    output = outputs[0]
    for i in range(1, groups):  # always in the same order, for equal bits
        output += outputs[i]
    return output, cache


def scaled(part: slice, size: int) -> slice:
    """The slice of elements of a slice of heads that have `size` elements each."""
    return part if part is ALL else slice(part.start * size, part.stop * size)


def product(ops: Native, x: Array, parts: Sequence[Part]) -> Array:
    """x times the transposes of parts of weights, side by side. x: [T, n]   returns: [T, m]"""
    m = sum(len(range(part.weight.shape[0])[part.rows]) for part in parts)
    out = np.empty((len(x), m), ops.dtype)
    ops.multiply(x, parts, out)
    return out


def mix(ops: Native, q: Array, table: Table, k: Array, v: Array, context: Array, block: Block) -> None:
    """`refmoe.spec.attention.attend` for a block of queries, which it first rotates and divides by sqrt(d).

    It divides a context by the sum of its weights, where the spec divides the weights.

    q, context: [T, K, H/K, d], for some of the K heads   k, v: [S, K, d], for the same heads
    table: two of [T, d/2], divided by sqrt(d)
    """
    some = q[block.queries].transpose(1, 2, 0, 3)  # [heads of K, H/K, t, d]
    turned = rotate(some, *(part[block.queries] for part in table))
    kv_heads, share, tokens, head_dim = some.shape
    by_head = turned.reshape(kv_heads, share * tokens, head_dim)
    weights = ops.matmul(by_head, k[block.keys].transpose(1, 2, 0))
    if block.hidden is not None:
        by_query = weights.reshape(kv_heads, share, tokens, -1)
        by_query += block.hidden
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    mixed = ops.matmul(weights, v[block.keys].transpose(1, 0, 2))
    mixed /= weights.sum(axis=-1, keepdims=True)
    context[block.queries] = mixed.reshape(some.shape).transpose(2, 0, 1, 3)
