# SPDX-License-Identifier: Apache-2.0
"""Grouped-query causal attention with an optional sliding window, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refmoe.spec.interface import Array, Ops
from refmoe.spec.softmax import softmax
from refmoe.spec.taps import offer

if TYPE_CHECKING:
    from refmoe.spec.model import Layer, Model


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far in one layer of one sequence.

    k, v: [S, K, d], keys already rotated   positions: integers [S]
    """

    k: Array
    v: Array
    positions: Array


def extend_cache(ops: Ops, cache: Cache | None, k: Array, v: Array, positions: Array) -> Cache:
    """Append the keys and values of new tokens.

    CACHE-1  New tokens follow the cached ones in order; nothing is overwritten, skipped or padded.
    CACHE-2  Keys are stored after rotation and are never rotated again.
    CACHE-3  A sliding window hides old tokens (ATTN-4); whether their storage is kept is not observable.

    k, v: [T, K, d]   positions: integers [T]   returns: a cache of S = past + T tokens
    """
    if cache is None:
        return Cache(k, v, positions)
    return Cache(
        k=ops.concatenate([cache.k, k]),
        v=ops.concatenate([cache.v, v]),
        positions=ops.concatenate([cache.positions, positions]),
    )


def attend(ops: Ops, q: Array, cache: Cache, mask: Array) -> Array:
    """Mix the cached values, each query head by its own weights.

    ATTN-1  Query head h reads key/value head h // (H / K): consecutive query heads share one.
    ATTN-2  scores = q . k / sqrt(head_dim).
    ATTN-3  Causal: the query at position p sees keys at positions up to p, its own included.
    ATTN-4  With a sliding window W it sees only positions above p - W: W tokens, itself counted.
    ATTN-5  probs = softmax of the visible scores over the cached positions; context = probs times v.

    q: [T, H, d]   cache: S tokens   mask: booleans [T, S], as `visible` gives them   returns: [T, H, d]
    Ainslie et al. 2023, "GQA", section 2.2; Vaswani et al. 2017, eq. 1.
    """
    tokens, heads, head_dim = q.shape
    cached, kv_heads, _ = cache.k.shape
    scores, probs = ops.empty(heads, tokens, cached), ops.empty(heads, tokens, cached)
    context = ops.empty(tokens, heads, head_dim)
    for h in range(heads):
        shared = h // (heads // kv_heads)
        k, v = cache.k[:, shared], cache.v[:, shared]
        scores[h] = ops.matmul(q[:, h], k.T) / ops.sqrt(ops.array(head_dim))
        probs[h] = softmax(ops, scores[h], mask)
        context[:, h] = ops.matmul(probs[h], v)
    return offer(ops, "attention", scores=scores, probs=probs, context=context)


def visible(positions: Array, cached: Array, window: int | None) -> Array:
    """Which cached token each query may attend to: the mask of ATTN-3 and ATTN-4.

    positions: integers [T]   cached: integers [S]   returns: booleans [T, S]
    Jiang et al. 2023, section 2.
    """
    distance = positions[:, None] - cached[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention(
    ops: Ops, model: Model, layer: Layer, x: Array, positions: Array, cache: Cache | None
) -> tuple[Array, Cache]:
    """The attention block: project, rotate, extend the cache, attend, project back.

    ATTN-6  q, k, v = x times the transposes of wq, wk, wv, no biases; the rows of head h are h d .. h d + d - 1.
    ATTN-7  output = the contexts of all heads, head 0 first, times the transpose of wo.

    x: [T, D]   positions: integers [T]   returns: [T, D] and the extended cache
    """
    config, steps = model.config, model.steps
    by_head = (x.shape[0], -1, config.head_dim)
    q = ops.tap("attention.q", ops.linear(x, layer.wq).reshape(*by_head))
    k = ops.tap("attention.k", ops.linear(x, layer.wk).reshape(*by_head))
    v = ops.tap("attention.v", ops.linear(x, layer.wv).reshape(*by_head))
    table = steps.rotary_table(ops, positions, config.head_dim, config.rope_theta)
    q_rope = ops.tap("attention.q_rope", steps.rotate(ops, q, table))
    k_rope = ops.tap("attention.k_rope", steps.rotate(ops, k, table))
    cache = steps.extend_cache(ops, cache, k_rope, v, positions)
    context = steps.attend(ops, q_rope, cache, steps.visible(positions, cache.positions, config.window))
    return ops.tap("attention.output", ops.linear(context.reshape(x.shape[0], -1), layer.wo)), cache
