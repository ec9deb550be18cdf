# SPDX-License-Identifier: Apache-2.0
"""The steps of the model with their cut points: the places where an engine may round inside a step.

The mathematics is that of `refmoe.spec`, clause by clause. `ops.cut(name, x)` marks each place where a real engine
stores a value or passes it from one kernel to the next. Every tap is a cut point as well. Under ops whose cuts do
nothing, these steps are the specification itself; a test compares the bits.

The `ops` here have the methods of the spec's ops and more, such as `cut`. `softmax` and `silu` are single operations,
because the enclosure of the whole is much tighter than the enclosure of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.profiles.policy import Policy
from refmoe.spec.attention import Cache
from refmoe.spec.attention import extend_cache as spec_extend_cache
from refmoe.spec.experts import Expert
from refmoe.spec.interface import Weight
from refmoe.spec.model import Steps
from refmoe.spec.rope import rotary_table as spec_rotary_table
from refmoe.steps.grouped import grouped_by_kv_head


class CutOps(ArrayOps):
    """Ops that also have cut points and compound functions."""

    policy: Policy

    def cut(self, name: str, x: Array) -> Array:
        """`x` after the cut point."""
        raise NotImplementedError

    def turned(self, cut: str, x: Array) -> Array:
        """Heads [..., d] turned as the policy turns what it keeps at this cut point."""
        raise NotImplementedError

    def softmax(self, x: Array, mask: Array | None) -> Array:
        """`refmoe.spec.softmax.softmax` as one operation of the statistics dtype."""
        raise NotImplementedError

    def log_softmax(self, x: Array) -> Array:
        """The logarithm of the softmax over the last axis, as one operation of the statistics dtype."""
        raise NotImplementedError

    def silu(self, x: Array) -> Array:
        """x * sigmoid(x), with the cut points `expert.sigmoid` and `expert.silu` inside."""
        raise NotImplementedError

    def weigh(self, logits: Array, experts: Array) -> Array:
        """The weights of the chosen experts, in the policy's order of softmax and choice."""
        raise NotImplementedError

    def accumulate(self, x: Array, axis: int) -> Array:
        """The sum over an axis, element by element. Each partial sum is cut as `combine.partial`.

        With several ranks it is cut as `rank.partial` too, and so is the last sum.
        """
        raise NotImplementedError


def cut_again(ops: CutOps, name: str, before: str, x: Array) -> Array:
    """`x` after the cut point `name`. `x` was last stored at `before`, and a dtype that holds it changes nothing."""
    if name not in ops.policy.kept and ops.policy.at(name).holds(ops.policy.at(before)):
        return x
    return ops.cut(name, x)


def turned(ops: CutOps, cut: str, x: Array) -> Array:
    """Heads [..., d], turned where the policy turns what it keeps at this cut point. A second turn takes it back."""
    return ops.turned(cut, x) if ops.policy.turned(cut, x.shape[-1]) else x


def rms_norm(ops: CutOps, x: Array, gain: Array, eps: float) -> Array:
    """`refmoe.spec.norm.rms_norm`. x: [T, D]   gain: [D]   returns: [T, D]"""
    x = ops.cut("norm.input", x)
    mean_square = ops.sum(x * x, axis=-1) / x.shape[-1]
    normed = x / ops.sqrt(mean_square + eps)[:, None]
    return ops.cut("norm.normed", normed) * gain


def rotary_table(ops: CutOps, positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """`refmoe.spec.rope.rotary_table`. positions: integers [T]   returns: two of [T, d/2]"""
    cos, sin = spec_rotary_table(ops, positions, head_dim, theta)
    return ops.cut("rope.table", cos), ops.cut("rope.table", sin)


def rotate(ops: CutOps, x: Array, table: tuple[Array, Array]) -> Array:
    """`refmoe.spec.rope.rotate`. x: [T, heads, d]   table: two of [T, d/2]   returns: [T, heads, d]"""
    cos, sin = (part[:, None, :] for part in table)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    ac, bs, bc, as_ = (ops.cut("rope.products", part) for part in (a * cos, b * sin, b * cos, a * sin))
    return ops.at_any_offset(ops.concatenate([ac - bs, bc + as_], axis=-1), x, (cos, sin))


def extend_cache(ops: CutOps, cache: Cache | None, k: Array, v: Array, positions: Array) -> Cache:
    """`refmoe.spec.attention.extend_cache`. k, v: [T, K, d]   returns: a cache of S tokens"""
    k, v = kept_keys(ops, k), kept_values(ops, v)
    return spec_extend_cache(ops, cache, ops.remembered(k), ops.remembered(v), positions)


def kept_keys(ops: CutOps, k: Array) -> Array:
    """Keys as the cache keeps them, turned where the policy turns them. k, returns: [T, K, d]"""
    return cut_again(ops, "cache.k", "attention.k_rope", turned(ops, "cache.k", k))


def kept_values(ops: CutOps, v: Array) -> Array:
    """Values as the cache keeps them, turned where the policy turns them. v, returns: [T, K, d]"""
    return cut_again(ops, "cache.v", "attention.v", turned(ops, "cache.v", v))


def attend(ops: CutOps, q: Array, cache: Cache, mask: Array) -> Array:
    """`refmoe.spec.attention.attend`. q: [T, H, d]   mask: [T, S]   returns: [T, H, d]"""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(ops, scores), mask[None]))
    return ops.tap("attention.context", context_of(ops, probs, cache.v))


def scores_of(ops: CutOps, q: Array, k: Array, scaled: bool = True) -> Array:
    """The scores of ATTN-1 and ATTN-2.   scaled: whether they are divided by sqrt(d)

    q: [T, H, d]   k: [S, K, d], as the cache keeps them   returns: [H, T, S]
    """
    q = turned(ops, "cache.k", q)
    root, in_query = ops.sqrt(ops.array(q.shape[-1])), ops.policy.scale == "query"
    if scaled and in_query:
        q = ops.cut("attention.query", q / root)
    else:
        q = cut_again(ops, "attention.query", "attention.q_rope", q)
    rows = grouped_by_kv_head(q, k.shape[1])
    dots = ops.product("attention.scores", rows, k.transpose(1, 2, 0)).reshape(q.shape[1], q.shape[0], k.shape[0])
    return dots if in_query or not scaled else ops.cut("attention.dots", dots) / root


def as_softmax_reads(ops: CutOps, scores: Array) -> Array:
    """The scores after the cut point between their tap and the softmax. scores: [H, T, S]"""
    return cut_again(ops, "attention.softmax_input", "attention.scores", scores)


def context_of(ops: CutOps, probs: Array, v: Array) -> Array:
    """The contexts of ATTN-5. probs: [H, T, S]   v: [S, K, d], as the cache keeps them   returns: [T, H, d]"""
    heads, tokens, cached = probs.shape
    kv_heads, head_dim = v.shape[1:]
    probs = cut_again(ops, "attention.mixing", "attention.probs", probs)
    rows = probs.reshape(kv_heads, heads // kv_heads * tokens, cached)
    mixed = ops.product("attention.context", rows, v.transpose(1, 0, 2))
    return turned(ops, "cache.v", mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2))


def route(ops: CutOps, x: Array, router: Weight, k: int) -> tuple[Array, Array]:
    """`refmoe.spec.router.route`. x: [T, D]   router: [E, D]   returns: expert ids [T, k], weights [T, k]"""
    logits = ops.tap("router.logits", ops.linear(x, router))
    experts = ops.tap("router.experts", ops.top_k(logits, k))
    weights = ops.weigh(cut_again(ops, "router.softmax_input", "router.logits", logits), experts)
    return experts, ops.tap("router.weights", weights)


def run_experts(ops: CutOps, experts: Sequence[Expert], x: Array, chosen: Array) -> Array:
    """`refmoe.spec.experts.run_experts`, each tap offered once for all experts before the next step reads it.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    tokens, k = chosen.shape
    order, counts = ops.group(chosen.reshape(-1), len(experts))

    def project(rows: Array, name: str) -> Array:
        """Each expert's matrix `name` on its own rows [T k, n], in the order of experts; in slot order: [T, k, m]"""
        results, start = [], 0
        for expert, count in zip(experts, counts, strict=True):
            if count:
                results.append(ops.linear(rows[start : start + count], getattr(expert, name)))
                start += count
        return ops.placed(results, order).reshape(tokens, k, -1)

    rows = x[order // k]
    gate = ops.tap("expert.gate", project(rows, "w1"))
    up = ops.tap("expert.up", project(rows, "w3"))
    hidden = ops.tap("expert.hidden", ops.silu(gate) * up)
    return ops.tap("expert.output", project(hidden.reshape(tokens * k, -1)[order], "w2"))


def combine(ops: CutOps, outputs: Array, weights: Array) -> Array:
    """`refmoe.spec.experts.combine`. outputs: [T, k, D]   weights: [T, k]   returns: [T, D]"""
    weighted = ops.cut("combine.weighted", outputs * weights[:, :, None])
    if ops.policy.ranks > 1:  # a rank may have one of the experts alone, and store its part
        weighted = cut_again(ops, "rank.partial", "combine.weighted", weighted)
    return ops.accumulate(weighted, axis=1)


CUT_STEPS: Any = Steps(
    rms_norm=rms_norm, rotary_table=rotary_table, rotate=rotate, extend_cache=extend_cache, attend=attend, route=route,
    run_experts=run_experts, combine=combine,
)  # fmt: skip
"""The steps of the spec. Steps with cut points inside are replaced by those of this module."""
