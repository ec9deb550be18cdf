"""Grouped-query causal attention with an optional sliding window, and its cache."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.spec.interface import Array, Ops


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
    return Cache(*(ops.concatenate(pair) for pair in ((cache.k, k), (cache.v, v), (cache.positions, positions))))


def visible(positions: Array, cached: Array, window: int | None) -> Array:
    """Which cached token each query may attend to.

    ATTN-3  Causal: the query at position p sees keys at positions up to p, its own included.
    ATTN-4  With a sliding window W it sees only positions above p - W: W tokens, itself counted.

    positions: integers [T]   cached: integers [S]   returns: booleans [T, S]
    Jiang et al. 2023, section 2.
    """
    distance = positions[:, None] - cached[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


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


def attend(ops: Ops, q: Array, cache: Cache, mask: Array) -> Array:
    """Mix the cached values, each query head by its own weights.

    ATTN-1  Query head h reads key/value head h // (H / K): consecutive query heads share one.
    ATTN-2  scores = q . k / sqrt(head_dim).
    ATTN-5  probs = softmax of the visible scores over the cached positions; context = probs times v.

    q: [T, H, d]   cache: S tokens   mask: [T, S]   returns: [T, H, d]
    Ainslie et al. 2023, "GQA", section 2.2; Vaswani et al. 2017, eq. 1.
    """
    tokens, heads, head_dim = q.shape
    cached, kv_heads, _ = cache.k.shape
    share = heads // kv_heads
    grouped = q.reshape(tokens, kv_heads, share, head_dim).transpose(1, 2, 0, 3)  # [K, H/K, T, d]
    rows = grouped.reshape(kv_heads, share * tokens, head_dim)
    dots = ops.matmul(rows, cache.k.transpose(1, 2, 0)).reshape(heads, tokens, cached)
    scores = ops.tap("attention.scores", dots / ops.sqrt(ops.array(head_dim)))
    probs = ops.tap("attention.probs", softmax(ops, scores, mask[None]))
    mixed = ops.matmul(probs.reshape(kv_heads, share * tokens, cached), cache.v.transpose(1, 0, 2))
    context = mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2)
    return ops.tap("attention.context", context)
