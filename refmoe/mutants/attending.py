"""The parts of `attend` with their cut points, for bugs that change what is between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.policy.steps import cut_again
from refmoe.spec.attention import Cache


def scores_of(ops: Any, q: Any, k: Any, scaled: bool = True) -> Any:
    """ATTN-1 and ATTN-2, without the tap. q: [T, H, d]   k: [S, K, d]   returns: [H, T, S]"""
    tokens, heads, head_dim = q.shape
    cached, kv_heads, _ = k.shape
    share = heads // kv_heads
    root, in_query = ops.sqrt(ops.array(head_dim)), ops.policy.scale == "query"
    if scaled and in_query:
        q = ops.cut("attention.query", q / root)
    else:
        q = cut_again(ops, "attention.query", "attention.q_rope", q)
    grouped = q.reshape(tokens, kv_heads, share, head_dim).transpose(1, 2, 0, 3)
    rows = grouped.reshape(kv_heads, share * tokens, head_dim)
    dots = ops.matmul(rows, k.transpose(1, 2, 0)).reshape(heads, tokens, cached)
    return dots if in_query or not scaled else ops.cut("attention.dots", dots) / root


def read(ops: Any, scores: Any) -> Any:
    """The scores as the softmax reads them."""
    return cut_again(ops, "attention.softmax_input", "attention.scores", scores)


def context_of(ops: Any, probs: Any, v: Any) -> Any:
    """ATTN-5 after the softmax, without the tap. probs: [H, T, S]   v: [S, K, d]   returns: [T, H, d]"""
    heads, tokens, cached = probs.shape
    kv_heads, head_dim = v.shape[1:]
    probs = cut_again(ops, "attention.mixing", "attention.probs", probs)
    rows = probs.reshape(kv_heads, heads // kv_heads * tokens, cached)
    mixed = ops.matmul(rows, v.transpose(1, 0, 2))
    return mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2)


def attend_to_more(ops: Any, q: Any, cache: Cache, mask: Any, k: Any, v: Any) -> Any:
    """`attend` where every query also sees n slots that hold no token of its sequence. The taps have none of them.

    q: [T, H, d]   mask: [T, S]   k, v: what the slots hold, [n, K, d]   returns: [T, H, d]
    """
    cached = mask.shape[1]
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    others = ops.cut("attention.scores", scores_of(ops, q, k))
    seen = np.concatenate([mask, np.ones((mask.shape[0], k.shape[0]), bool)], axis=1)
    probs = ops.softmax(read(ops, ops.concatenate([scores, others], axis=-1)), seen[None])
    shown = ops.tap("attention.probs", probs[..., :cached])
    probs = ops.concatenate([shown, ops.cut("attention.probs", probs[..., cached:])], axis=-1)
    return ops.tap("attention.context", context_of(ops, probs, ops.concatenate([cache.v, v])))
